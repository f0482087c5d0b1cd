"""Failure prediction on pairs with different numbers of candidates (ViLU, Table 6 and Fig. 4)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from vilu.embeddings.pairs import Pools
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError
from vilu.outcomes.evaluate import evaluate
from vilu.outcomes.results import ResultRow, ResultTable
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.progress import track
from vilu.scoring.score import score
from vilu.text import align_columns
from vilu.validation import require_at_least

logger = logging.getLogger("vilu.bench")

# pool sizes in the published table
PUBLISHED_SIZES = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
TABLE_METRICS = ("auroc", "fpr95", "aupr_failure", "augrc", "aurc")


def over_pool_sizes(
    predictors: Mapping[str, FailurePredictor],
    open_pairs: Callable[[Pools], EmbeddingSource],
    sizes: Sequence[int] = PUBLISHED_SIZES,
    *,
    pools: Pools | None = None,
    draws: int = 1,
    dataset: str = "pairs",
    n_resamples: int = 1000,
) -> ResultTable:
    """Measure fitted predictors on the same pairs, in pools of different sizes.

    A larger pool has more candidate captions for every image. A size above the number of
    pairs is left out with a log message.

    Args:
        predictors: Fitted predictors by label.
        open_pairs: Function that gets the pool settings and opens the pairs.
        sizes: Pool sizes.
        pools: Pool settings. Each draw replaces the size and the seed.
        draws: Number of pool draws, with the seeds 0 ... draws - 1. A result row has the seed of
            the draw.
        dataset: Name for the data set. The name in the results is "NAME, pool SIZE".
        n_resamples: Number of bootstrap resamples.
    """
    require_at_least("draws", draws, 1)
    if pools is None:
        pools = Pools()
    smallest_pools = replace(pools, size=min(sizes))
    n_pairs = len(open_pairs(smallest_pools))
    possible_sizes = _possible_sizes(sizes, n_pairs, dataset)
    table = ResultTable()
    with track("score", len(possible_sizes) * draws * len(predictors), "scorings") as task:
        for size in possible_sizes:
            outcomes = []
            for draw in range(draws):
                pairs = open_pairs(replace(pools, size=size, seed=draw))
                for name, predictor in predictors.items():
                    scored = score(predictor, pairs, dataset=f"{dataset}, pool {size}")
                    outcomes.append(replace(scored, method=name, seed=draw))
                    task.advance(1, f"{name}, pool {size}")
            table += evaluate(outcomes, metrics=TABLE_METRICS, n_resamples=n_resamples)
    return table


def _possible_sizes(sizes: Sequence[int], n_pairs: int, dataset: str) -> list[int]:
    """Return the pool sizes up to ``n_pairs``. Raise a DataError if there are none."""
    possible = [size for size in sizes if size <= n_pairs]
    if not possible:
        raise DataError(
            f"no pool can be filled: {dataset} has {n_pairs} pairs, "
            f"the smallest size is {min(sizes)}."
        )
    if len(possible) < len(sizes):
        logger.info("%s has %d pairs: pool sizes above that are left out", dataset, n_pairs)
    return possible


def size_table(table: ResultTable) -> str:
    """Make a table with a line per method and a column per pool size.

    A cell has "AUROC / FPR95" in percent. The first two lines have the pool sizes and the VLM's
    accuracies. Several draws are averaged, and "±" is the AUROC's standard deviation over draws.
    """
    rows = table.mean_over_seeds().rows
    datasets = dict.fromkeys(row.dataset for row in rows)
    methods = dict.fromkeys(row.method for row in rows)
    row_of = {(row.method, row.dataset, row.metric): row for row in rows}
    first_method = next(iter(methods))
    sizes = ["pool size"]
    accuracies = ["VLM accuracy"]
    for dataset in datasets:
        _, _, size = (dataset or "").rpartition(" ")  # the name is "NAME, pool SIZE"
        sizes.append(size)
        accuracy = row_of[first_method, dataset, "auroc"].accuracy
        accuracies.append(f"{100 * accuracy:.1f}")
    lines = [sizes, accuracies]
    for method in methods:
        line = [method or ""]
        for dataset in datasets:
            auroc = row_of[method, dataset, "auroc"]
            fpr95 = row_of[method, dataset, "fpr95"]
            line.append(_cell_text(auroc, fpr95))
        lines.append(line)
    return "\n".join(align_columns(lines))


def _cell_text(auroc: ResultRow, fpr95: ResultRow) -> str:
    """Write AUROC and FPR95 as text, in percent."""
    if auroc.value is None or fpr95.value is None:
        return "undefined"
    text = f"{100 * auroc.value:.1f}"
    is_mean_over_draws = auroc.seed is None
    if is_mean_over_draws and auroc.ci_high is not None:
        deviation = auroc.ci_high - auroc.value  # the interval is mean ± standard deviation
        text += f" ± {100 * deviation:.1f}"
    return f"{text} / {100 * fpr95.value:.1f}"
