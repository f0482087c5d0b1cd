"""Coverage as a function of the number of labels.

    python -m benchmarks.labels STORE... [--seeds 20] [--out build/labels.csv]

The store's labels are hidden until the triage asks for the labels. Coverage is the accepted
share of all rows at a certified 5 % risk (95 % confidence). The arms:

- ``next``: ``vilu triage`` asks for labels, round after round, and looks at the guarantee in every
  round.
- ``random``: the command and the guarantee of ``next``, but every round's photos are picked at
  random.
- ``random, one look``: as many labels, picked at random. ``vilu_plus`` is fitted on half of the
  labels. The second half is evidence as in ``random``, with the whole level. Every label count
  begins anew, as if nobody had looked before.
- ``uncertain, one look``: half of the labels is random, for the guarantee. The labels to fit on are
  again divided. The first half is random, and a predictor is fitted on this half. The second half
  has the rows that this predictor trusts least.
- ``random, exact``: like ``random, one look``, with the exact test of ``vilu calibrate``.

With ``--divided`` the arms are ways to divide random labels, with a single look:

- ``half``: fitted on the first half, tested exactly on the second half.
- ``folds``: K predictors, each fitted without a fold and tested on this fold with 1/K of the level.
  A hash picks the predictor for a photo.
- ``progressive``: fitted on the first half, and again after each of four blocks in the second half.
  Before a block is read, the present predictor must choose the block's accepted answers. These are
  the answers whose mean failure probability is at most a share of the risk. The guarantee is about
  the mixture of the four predictors (docs/triage.md).

The file has a line per store, arm, seed and label count: coverage, and the error rate among
accepted rows. ``--show`` prints these lines as tables.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from vilu.artifacts.tables import csv_rows
from vilu.calibration.anytime import BETS_WITH_SHARES, ThresholdTests, level_of, threshold_grid
from vilu.calibration.rules import certify
from vilu.embeddings.source import EmbeddingSource
from vilu.metrics.counts import Floats, Ints
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.plus.vilu_plus import ViLUPlus
from vilu.store.job import BackboneSpec
from vilu.store.reader import EmbeddingStore
from vilu.triage.labels import LabelBook
from vilu.triage.photos import EmbeddingSettings, Photos
from vilu.triage.run import advance
from vilu.triage.state import TriageSettings, TriageState

SIZES = (200, 300, 400, 600, 800, 1_200, 1_600, 2_000)
DIVIDED_SIZES = (400, 800, 2_000)
LABELS_PER_ROUND, LABELS_PER_LATER_ROUND, LABELS_BEFORE_LATER_ROUNDS = 50, 100, 400
"""Labels in a round, labels in a later round, and the label count where later rounds begin."""
MAX_RISK, DELTA = 0.05, 0.05
COLUMNS = ("store", "arm", "seed", "labels", "coverage", "risk")


def failures(source: EmbeddingSource) -> Ints:
    """Return for each row whether the zero-shot answer is wrong (N,)."""
    failure = np.zeros(len(source), dtype=np.int64)
    for batch in source.batches(4096):
        failure[batch.index.numpy()] = batch.failure.numpy()
    return failure


def fitted_scores(source: EmbeddingSource, rows: Ints, seed: int) -> Floats:
    """Fit a predictor on ``rows``, and return all rows' uncertainty (N,)."""
    labelled = source.take(rows)
    predictor = ViLUPlus(seed=seed)
    predictor.fit(labelled)
    return predictor.predict_uncertainty(source)


def single_look_arms(
    source: EmbeddingSource, wrong: Ints, seed: int, n: int
) -> Iterator[tuple[str, float, float]]:
    """Yield the arms with a single look at ``n`` labels: name, coverage and error rate."""
    rng = np.random.default_rng([seed, n])
    order = rng.permutation(len(source))
    fit_rows, rest = order[: n // 2], order[n // 2 :]
    u = fitted_scores(source, fit_rows, seed)
    held_out_rows = rest[: n - n // 2]
    held_out = Outcomes(u[held_out_rows], wrong[held_out_rows])
    rule = certify(held_out, max_risk=MAX_RISK)
    is_accepted = rule.accept(u)
    yield "random, exact", *coverage_and_risk(is_accepted, wrong)
    is_accepted = u <= certified_threshold(u, wrong, held_out_rows)
    yield "random, one look", *coverage_and_risk(is_accepted, wrong)
    u = fitted_scores(source, fit_rows[: n // 4], seed)
    others = np.setdiff1d(order, fit_rows[: n // 4])
    most_uncertain = others[np.argsort(-u[others], kind="stable")][: n // 2 - n // 4]
    fit_rows = np.concatenate([fit_rows[: n // 4], most_uncertain])
    held_out_rows = order[~np.isin(order, fit_rows)][: n - n // 2]
    u = fitted_scores(source, fit_rows, seed)
    is_accepted = u <= certified_threshold(u, wrong, held_out_rows)
    yield "uncertain, one look", *coverage_and_risk(is_accepted, wrong)


def divided_arms(
    source: EmbeddingSource, wrong: Ints, seed: int, n: int
) -> Iterator[tuple[str, float, float]]:
    """Yield the ways to divide ``n`` random labels: name, coverage and error rate."""
    order = np.random.default_rng([seed, n, 7]).permutation(len(source))[:n]
    for k in (2, 5):
        accepted = []
        for fold in np.array_split(order, k):
            u = fitted_scores(source, np.setdiff1d(order, fold), seed)
            held_out = Outcomes(u[fold], wrong[fold])
            rule = certify(held_out, max_risk=MAX_RISK, confidence=1 - DELTA / k)
            accepted.append(rule.accept(u))
            if k == 2 and len(accepted) == 1:
                whole = certify(held_out, max_risk=MAX_RISK, confidence=1 - DELTA)
                is_accepted = whole.accept(u)
                yield "half", *coverage_and_risk(is_accepted, wrong)
        yield f"{k} folds", *mixture_coverage_and_risk(accepted, wrong, np.ones(k))
    blocks = np.array_split(order[n // 2 :], 4)
    before = [np.concatenate([order[: n // 2], *blocks[:number]]) for number in range(len(blocks))]
    scores = [fitted_scores(source, rows, seed) for rows in before]
    for share in (0.3, 0.5, 0.7):
        wealth, accepted = np.zeros(len(BETS_WITH_SHARES)), []
        for u, rows in zip(scores, blocks, strict=True):
            ordered = np.sort(u)
            mean_up_to_row = np.cumsum(ordered) / np.arange(1, len(u) + 1)
            few = np.flatnonzero(mean_up_to_row <= share * MAX_RISK)
            accepted.append(u <= (ordered[few[-1]] if len(few) else -np.inf))
            accepted_rows = rows[accepted[-1][rows]]
            k, m = int(wrong[accepted_rows].sum()), len(accepted_rows)
            bet = np.array(BETS_WITH_SHARES)[:, 0]
            wealth += k * np.log1p(-bet) + (m - k) * np.log1p(bet * MAX_RISK / (1 - MAX_RISK))
        share_of_bet = np.array(BETS_WITH_SHARES)[:, 1]
        log_mean_wealth = np.logaddexp.reduce(wealth + np.log(share_of_bet))
        is_shown = log_mean_wealth >= -math.log(DELTA)
        found = mixture_coverage_and_risk(accepted, wrong, np.array([len(rows) for rows in blocks]))
        yield f"progressive, {share} of the risk", *(found if is_shown else (0.0, 0.0))


def mixture_coverage_and_risk(accepted: list[Any], wrong: Ints, weight: Any) -> tuple[float, float]:  # noqa: ANN401
    """Return a mixture's coverage and error rate: rules with the probabilities ``weight``."""
    coverages = [is_accepted.mean() for is_accepted in accepted]
    risks = [(is_accepted & (wrong == 1)).mean() for is_accepted in accepted]
    coverage = np.average(coverages, weights=weight)
    risk = np.average(risks, weights=weight)
    return float(coverage), float(risk / coverage) if coverage else 0.0


def certified_threshold(u: Floats, wrong: Ints, rows: Ints) -> float:
    """Return the threshold certified by the labels of ``rows``, with the whole level."""
    median = float(np.median(u))
    grid = threshold_grid(u, median)
    level = level_of(1, DELTA)
    looks = ThresholdTests(grid, MAX_RISK, level)
    at = looks.index_of_laxest_certified_threshold(u[rows], wrong[rows])
    return -np.inf if at is None else float(looks.grid[at])


def coverage_and_risk(accepted: Any, wrong: Ints) -> tuple[float, float]:  # noqa: ANN401 - a mask
    """Return the share of accepted rows, and the error rate among these rows."""
    return float(accepted.mean()), float(wrong[accepted].mean()) if accepted.any() else 0.0


def triage_rounds(
    store: EmbeddingStore, wrong: Ints, seed: int, max_labels: int, *, at_random: bool
) -> Iterator[tuple[int, float, float]]:
    """Yield the label count, coverage and error rate after every round of a triage.

    With ``at_random``, as many labels are picked at random.
    """
    photos = Photos([(store, np.arange(len(store)))], {})
    names = list(store.class_names or ())
    truth = {
        key: names[place] for key, place in zip(photos.ids, store.target.tolist(), strict=True)
    }
    rng = np.random.default_rng(seed)
    order = [photos.ids[row] for row in rng.permutation(len(photos)).tolist()]
    embedding = EmbeddingSettings(BackboneSpec("none"), tuple(names), None, ())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "out"
        root.mkdir()
        settings = TriageSettings(
            Path(folder), embedding, max_risk=MAX_RISK, n_next=LABELS_PER_ROUND, seed=seed
        )
        state = TriageState(settings=settings.recorded_settings)
        label_book = LabelBook()
        while True:
            if len(label_book.labels) >= LABELS_BEFORE_LATER_ROUNDS:
                settings = replace(settings, n_next=LABELS_PER_LATER_ROUND)
            state, found = advance(root, settings, state, photos, label_book)
            rule = None if found.rule is None else found.rule.threshold
            yield (
                len(label_book.labels),
                *coverage_and_risk(
                    found.outcomes.uncertainty <= (-np.inf if rule is None else rule), wrong
                ),
            )
            n = len(label_book.labels)
            paths_to_label = [one.path for one in found.entries_to_label]
            paths_to_label = (order[n : n + settings.n_next] if at_random else paths_to_label)[
                : max_labels - n
            ]
            if not paths_to_label:
                return
            label_book.note_labels({path: truth[path] for path in paths_to_label})


def result_lines(path: Path, seeds: int, *, divisions: bool) -> Iterator[dict[str, object]]:
    """Yield the result lines of a store."""
    store = EmbeddingStore(path)
    if int((store.target < 0).sum()):
        sys.exit(f"{path} must have a label for every row.")
    wrong = failures(store)
    sizes = [n for n in (DIVIDED_SIZES if divisions else SIZES) if n <= 0.7 * len(store)]
    for seed in range(seeds):
        found: list[tuple[str, int, float, float]] = []
        for arm in () if divisions else ("next", "random"):
            rounds = triage_rounds(store, wrong, seed, max(sizes), at_random=arm == "random")
            found += [(arm, *one) for one in rounds]
        for n in sizes:
            once = divided_arms if divisions else single_look_arms
            found += [
                (arm, n, coverage, risk) for arm, coverage, risk in once(store, wrong, seed, n)
            ]
        for arm, n, coverage, risk in found:
            yield {
                "store": path.name,
                "arm": arm,
                "seed": seed,
                "labels": n,
                "coverage": coverage,
                "risk": risk,
            }


def result_tables(path: Path) -> Iterator[str]:
    """Yield result tables: mean coverage with a 95 % interval (t), and labels until half-way.

    Below every row of ``next`` is the difference from ``random``, paired by seed.
    """
    columns, rows = csv_rows(path)
    missing = [name for name in COLUMNS if name not in columns]
    if missing:
        sys.exit(f"{path} has no column {', '.join(missing)}. Give a file that this command wrote.")
    for store in dict.fromkeys(row["store"] for row in rows):
        curves: dict[str, dict[str, list[tuple[int, float]]]] = {}
        for row in rows:
            if row["store"] == store:
                of = curves.setdefault(row["arm"], {}).setdefault(row["seed"], [])
                of.append((int(row["labels"]), float(row["coverage"])))
        most = max(n for of in curves.values() for curve in of.values() for n, _ in curve)
        sizes = [n for n in SIZES if n <= most]
        at = {
            arm: np.array([[coverage_reached(c, n) for n in sizes] for c in of.values()])
            for arm, of in curves.items()
        }
        yield f"{store}, {len(next(iter(at.values())))} seeds | " + " | ".join(
            f"{n:,}" for n in sizes
        )
        for arm, found in at.items():
            yield f"{arm} | " + " | ".join(
                f"{m:.3f} ± {h:.3f}" for m, h in zip(*interval(found), strict=True)
            )
        if "next" not in at:
            continue
        apart = at["next"] - at["random"]
        yield "next - random | " + " | ".join(
            f"{m:+.3f} ± {h:.3f}" for m, h in zip(*interval(apart), strict=True)
        )
        half = at["random"][:, -1].mean() / 2
        takes = {
            arm: labels_to_reach(curves[arm], half)
            for arm in ("next", "random", "random, one look")
        }
        yield f"half-way ({half:.3f}): " + ", ".join(f"{arm} {n:,.0f}" for arm, n in takes.items())


def coverage_reached(curve: Sequence[tuple[int, float]], n: int) -> float:
    """Return the coverage reached with at most ``n`` labels."""
    return max([(labels, coverage) for labels, coverage in curve if labels <= n], default=(0, 0.0))[
        1
    ]


def interval(found: Floats) -> tuple[Floats, Floats]:
    """Return the mean (N,) of ``found`` (S, N) over seeds, and the 95 % interval's half width."""
    n = len(found)
    half = (
        stats.t.ppf(0.975, n - 1) * found.std(axis=0, ddof=1) / np.sqrt(n)
        if n > 1
        else np.full(found.shape[1], np.nan)
    )
    return found.mean(axis=0), half


def labels_to_reach(curves: dict[str, list[tuple[int, float]]], coverage: float) -> float:
    """Return the label count where the mean over seeds reaches ``coverage``, or infinity."""
    sizes = sorted({n for curve in curves.values() for n, _ in curve})
    return next(
        (
            n
            for n in sizes
            if np.mean([coverage_reached(c, n) for c in curves.values()]) >= coverage
        ),
        math.inf,
    )


def main() -> None:
    """Measure and write line by line, or show tables."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("stores", type=Path, nargs="*")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("build/labels.csv"))
    parser.add_argument(
        "--show", action="store_true", help="Print the tables of --out, and run nothing."
    )
    parser.add_argument(
        "--divided", action="store_true", help="Ways to divide labels that are looked at once."
    )
    options = parser.parse_args()
    if options.show:
        lines = result_tables(options.out)
        print("\n".join(lines))
        return
    warnings.simplefilter("ignore")
    logging.getLogger("vilu").setLevel(logging.ERROR)
    options.out.parent.mkdir(exist_ok=True, parents=True)
    with options.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        for path in options.stores:
            for line in result_lines(path, options.seeds, divisions=options.divided):
                writer.writerow(line)
                file.flush()


if __name__ == "__main__":
    main()
