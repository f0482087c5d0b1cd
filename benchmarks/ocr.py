"""Which words read by Tesseract can be trusted? ``python -m benchmarks.ocr FOLDER``.

Pages with known words are rendered (``benchmarks.ocr_pages``) and read with Tesseract. The file
``words.csv`` in the folder gets a row for each word read. Pages read before are not read again, so
a stopped run can be continued.

Pages are divided at random into thirds: to fit, to calibrate, to test. Two scores are compared: the
word's confidence alone, and ``answer_probe`` on all number columns. Each score is calibrated by row
(every word is an independent draw) and by page (every page is an independent draw).
``splits.jsonl`` has a line per division. The tables have means over the divisions, and the range of
the middle 95 %. The confidence needs no fit, so by page the confidence is also
calibrated on two thirds. Finally, 200 draws show how often a guarantee by row is broken. Such a
guarantee can be broken, because words on a page are wrong together.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import vilu
from benchmarks.ocr_pages import MOST_WORDS, Page, words_of_pages
from vilu.calibration.clusters import correlation
from vilu.calibration.thresholds import lower_bound, upper_bound
from vilu.metrics.counts import Floats
from vilu.tables.methods import AnswerProbe, AnswerScore
from vilu.tables.sources import Converted, Word, word_answers

N_PAGES = 1_200
N_SPLITS = 20
MAX_RISKS = (0.01, 0.02, 0.05)
MAX_PAGE_WORDS = MOST_WORDS
"""The guarantee by page is for pages with at most this many words. A few pages are read as more."""

CONFIDENCE, PROBE = "confidence", "answer_probe"
NAMES = (CONFIDENCE, PROBE)
ROWS, PAGES = "rows", "pages"
N_DRAWS = 200
WORD_IN_DICTIONARY = re.compile(r"[a-z]+")
Mask = NDArray[np.bool_]
Result = dict[str, Any]


def dictionary() -> frozenset[str]:
    """Collect the words in NumPy's documentation. The text on the pages is a different one."""
    words: set[str] = set()
    for module in (np, np.fft, np.linalg, np.random):
        for name in dir(module):
            documentation = inspect.getdoc(getattr(module, name)) or ""
            text = documentation.casefold()
            words.update(WORD_IN_DICTIONARY.findall(text))
    return frozenset(words)


def read_page(page: Page, output: Path) -> None:
    """Let Tesseract read a page, with its defaults, into the TSV file ``output``."""
    environment = {**os.environ, "OMP_THREAD_LIMIT": "1"}
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "page.png"
        image = page.picture()
        image.save(picture)
        command = ["tesseract", str(picture), str(Path(folder) / "page"), "tsv"]
        subprocess.run(command, check=True, env=environment, capture_output=True)
        table_file = Path(folder) / "page.tsv"
        content = table_file.read_bytes()
        output.write_bytes(content)


def read_pages(folder: Path, n_pages: int, seed: int) -> Converted:
    """Render and read the pages missing in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    truth: dict[str, tuple[Word, ...]] = {}
    files = []
    for number, words in enumerate(words_of_pages(n_pages, seed)):
        page = Page(words, (seed, number))
        file = folder / f"{number:04}.tsv"
        if not file.is_file():
            read_page(page, file)
        truth[file.stem] = page.words
        files.append(file)
    known_words = dictionary()
    return word_answers(files, truth=truth, dictionary=known_words)


def split_in_thirds(table: vilu.AnswerTable, seed: int) -> list[vilu.AnswerTable]:
    """Divide the table into three parts with the same number of pages."""
    page_of_row = np.array(table.cluster)
    shuffled_pages = _shuffled_pages(table, seed)
    pages_of_parts = np.array_split(shuffled_pages, 3)
    return [table[np.isin(page_of_row, pages)] for pages in pages_of_parts]


def _shuffled_pages(table: vilu.AnswerTable, seed: int) -> NDArray[np.str_]:
    """Return the names of all pages in a random order."""
    page_of_row = np.array(table.cluster)
    pages = np.unique(page_of_row)
    rng = np.random.default_rng(seed)
    return rng.permutation(pages)


def split_result(table: vilu.AnswerTable, seed: int) -> Result:
    """Compute the results for a division into thirds."""
    fit, calibration, test = split_in_thirds(table, seed)
    methods = {
        CONFIDENCE: AnswerScore(column="score_confidence"),
        PROBE: AnswerProbe().fit(fit),
    }
    result: Result = {"seed": seed}
    for name, method in methods.items():
        calibration_outcomes = vilu.score(method, calibration)
        test_outcomes = vilu.score(method, test)
        is_wrong = test_outcomes.failure == 1
        result[f"{name} best"] = [best_coverage(test_outcomes, risk) for risk in MAX_RISKS]
        result["correlation of all"] = page_correlation(test, is_wrong, is_wrong | ~is_wrong)
        for risk in MAX_RISKS:
            by_row = vilu.certify(calibration_outcomes, max_risk=risk)
            by_page = vilu.certify_clusters(
                calibration_outcomes,
                calibration.cluster or (),
                "ratio",
                max_risk=risk,
                largest=MAX_PAGE_WORDS,
            )
            masks = {
                ROWS: by_row.accept(test_outcomes.uncertainty),
                PAGES: by_page.accept(test_outcomes.uncertainty, clusters=test.cluster),
            }
            for unit, mask in masks.items():
                result[f"{name} {unit} {risk}"] = [mask.mean(), risk_of(is_wrong, mask)]
            correlation_of_accepted = page_correlation(test, is_wrong, masks[ROWS])
            result[f"{name} correlation {risk}"] = correlation_of_accepted
    return result


def best_coverage(outcomes: vilu.Outcomes, risk: float) -> float:
    """Return the largest coverage with an error rate of at most ``risk``, known from all labels."""
    order = np.argsort(outcomes.uncertainty, kind="stable")
    uncertainty = outcomes.uncertainty[order]
    n_accepted = np.arange(1, len(order) + 1)
    risks = np.cumsum(outcomes.failure[order]) / n_accepted
    is_last_of_ties = np.append(uncertainty[1:] > uncertainty[:-1], True)
    n_accepted_within_risk = n_accepted[is_last_of_ties & (risks <= risk)]
    return float(n_accepted_within_risk.max(initial=0) / len(order))


def risk_of(wrong: Mask, accepted: Mask) -> float:
    """Return the share of wrong words among the accepted words, 0 if no word is accepted."""
    return float(wrong[accepted].mean()) if accepted.any() else 0.0


def page_correlation(table: vilu.AnswerTable, wrong: Mask, chosen: Mask) -> float:
    """Estimate the correlation between the errors of two words on a page, among ``chosen``."""
    page_of_row = np.array(table.cluster)
    _, page = np.unique(page_of_row[chosen], return_inverse=True)
    if not chosen.any():
        return float("nan")
    failure = wrong[chosen].astype(np.int64)
    return float(correlation(failure, page).value)


def split_results(table: vilu.AnswerTable, file: Path, n_splits: int) -> list[Result]:
    """Compute the results for all divisions. Results in the file are not computed again."""
    results: list[Result] = []
    if file.is_file():
        text = file.read_text()
        results = [json.loads(line) for line in text.splitlines()]
    with file.open("a") as lines:
        for seed in range(len(results), n_splits):
            results_of_seed = split_result(table, seed)
            results.append(results_of_seed)
            line = json.dumps(results_of_seed)
            lines.write(line + "\n")
            lines.flush()
    return results


def percent_range(values: Floats) -> str:
    """Format the mean over divisions, and the range of the middle 95 %, in percent."""
    if not values.any():
        return "0"
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{100 * values.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})"


def tables(results: list[Result]) -> Iterator[str]:
    """Yield the lines of the tables."""
    ways = "accepted by row | wrong of these | accepted by page | wrong of these"
    yield f"| at most wrong | score | {ways} |"
    yield "|---|---|---|---|---|---|"
    for risk in MAX_RISKS:
        for name in NAMES:
            by_row = np.array([result[f"{name} {ROWS} {risk}"] for result in results])
            by_page = np.array([result[f"{name} {PAGES} {risk}"] for result in results])
            cells = [*by_row.T, *by_page.T]
            texts = [percent_range(values) for values in cells]
            yield f"| {risk:.0%} | {name} | {' | '.join(texts)} |"
    yield ""
    yield "| at most wrong | gain by row | gain by page | gain where the errors are known |"
    yield "|---|---|---|---|"
    for place, risk in enumerate(MAX_RISKS):
        gains = [gain_of_probe(results, f"{way} {risk}", 0) for way in (ROWS, PAGES)]
        best_gain = gain_of_probe(results, "best", place)
        gains.append(best_gain)
        ranges = [percent_range(values) for values in gains]
        yield f"| {risk:.0%} | {' | '.join(ranges)} |"
    yield ""
    yield f"correlation within a page, of all words: {mean_of(results, 'correlation of all'):.2f}"
    for risk in MAX_RISKS:
        shown = [f"{mean_of(results, f'{name} correlation {risk}'):.2f} ({name})" for name in NAMES]
        yield f"of the words accepted at {risk:.0%}, by row: {', '.join(shown)}"


def mean_of(results: list[Result], key: str) -> float:
    """Average over the divisions with a defined number."""
    return float(np.nanmean([result[key] for result in results]))


def broken_lines(table: vilu.AnswerTable, n_draws: int) -> Iterator[str]:
    """Yield how often a guarantee by row is broken, calibrated on a third of the pages.

    The test is on the other two thirds.
    """
    confidence = AnswerScore(column="score_confidence")
    outcomes = vilu.score(confidence, table)
    page_of_row = np.array(table.cluster)
    pages = np.unique(page_of_row)
    for risk in MAX_RISKS:
        n_broken = 0
        for seed in range(n_draws):
            rng = np.random.default_rng(seed)
            calibration_pages = rng.permutation(pages)[: len(pages) // 3]
            is_calibration = np.isin(page_of_row, calibration_pages)
            calibration = vilu.Outcomes(
                outcomes.uncertainty[is_calibration], outcomes.failure[is_calibration]
            )
            rule = vilu.certify(calibration, max_risk=risk)
            accepted = rule.accept(outcomes.uncertainty[~is_calibration])
            n_broken += int(risk_of(outcomes.failure[~is_calibration] == 1, accepted) > risk)
        low = lower_bound(n_broken, n_draws, 0.025)
        high = upper_bound(n_broken, n_draws, 0.025)
        yield (
            f"at most {risk:.0%} by row, confidence: more are wrong in the other pages in "
            f"{n_broken / n_draws:.1%} ({low:.1%} to {high:.1%}) of {n_draws} draws"
        )


def by_page_of_two_thirds(table: vilu.AnswerTable, n_splits: int) -> Iterator[str]:
    """Yield results for the confidence by page, calibrated on two thirds (no fit is needed)."""
    outcomes = vilu.score(AnswerScore(column="score_confidence"), table)
    page_of_row = np.array(table.cluster)
    for risk in MAX_RISKS:
        coverages = []
        risks = []
        for seed in range(n_splits):
            *calibration_parts, test_pages = np.array_split(_shuffled_pages(table, seed), 3)
            is_calibration = np.isin(page_of_row, np.concatenate(calibration_parts))
            is_test = np.isin(page_of_row, test_pages)
            rule = vilu.certify_clusters(
                outcomes.take(is_calibration),
                page_of_row[is_calibration].tolist(),
                "ratio",
                max_risk=risk,
                largest=MAX_PAGE_WORDS,
            )
            test_outcomes = outcomes.take(is_test)
            test_clusters = page_of_row[is_test].tolist()
            accepted = rule.accept(test_outcomes.uncertainty, clusters=test_clusters)
            coverages.append(accepted.mean())
            risks.append(risk_of(test_outcomes.failure == 1, accepted))
        n_above = sum(share > risk for share in risks)
        yield (
            f"at most {risk:.0%} by page, two thirds calibrate, confidence: accepted "
            f"{percent_range(np.array(coverages))}, wrong {percent_range(np.array(risks))}, "
            "above the target in "
            f"{n_above} of {n_splits}"
        )


def gain_of_probe(results: list[Result], key: str, index: int) -> Floats:
    """Return coverage with the probe minus coverage with the confidence, in each division."""
    probe = np.array([result[f"{PROBE} {key}"] for result in results], dtype=np.float64)
    confidence = np.array([result[f"{CONFIDENCE} {key}"] for result in results], dtype=np.float64)
    difference: Floats = probe[:, index] - confidence[:, index]
    return difference


def main() -> None:
    """Read the missing pages, calibrate, and print the tables."""
    parser = argparse.ArgumentParser(description="Decisions about words that Tesseract read.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=N_PAGES)
    parser.add_argument("--splits", type=int, default=N_SPLITS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    # the warning is about words on a page that are wrong together, and this benchmark measures such
    # words
    warnings.simplefilter("ignore", UserWarning)
    words = read_pages(options.folder / "pages", options.pages, options.seed)
    words.write(options.folder / "words.csv")
    missed = words.missed_share or 0.0
    print(f"{options.pages} pages with {words.n_wanted} words, {missed:.1%} never read")
    n_wrong = words.columns["correct"].count(0)
    print(f"{len(words)} words read, {n_wrong / len(words):.1%} wrong", flush=True)
    table = vilu.open_table(options.folder / "words.csv")
    results = split_results(table, options.folder / "splits.jsonl", options.splits)
    for line in tables(results):
        print(line, flush=True)
    for line in by_page_of_two_thirds(table, options.splits):
        print(line, flush=True)
    for line in broken_lines(table, N_DRAWS):
        print(line, flush=True)


if __name__ == "__main__":
    main()
