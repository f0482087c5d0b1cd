"""How failure prediction on image-caption pairs depends on the number of candidates (as ViLU's Table 6 and Fig. 4)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from vilu.embeddings.pairs import Pools
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError
from vilu.outcomes.evaluate import evaluate
from vilu.outcomes.results import ResultRow, ResultTable
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.progress import track
from vilu.scoring.score import score
from vilu.text import aligned
from vilu.validation import require_at_least

logger = logging.getLogger(__name__)

PUBLISHED = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # pool sizes of the published table
METRICS = ("auroc", "fpr95", "aupr_failure", "augrc", "aurc")


def over_pool_sizes(
    predictors: Mapping[str, FailurePredictor],
    open_pairs: Callable[[Pools], EmbeddingSource],
    sizes: Sequence[int] = PUBLISHED,
    *,
    pools: Pools | None = None,
    draws: int = 1,
    dataset: str = "pairs",
    n_resamples: int = 1000,
) -> ResultTable:
    """Metrics of every predictor at every pool size: the same pairs, matched against more and more captions.

    A predictor is fitted once, at whatever size, and not told the size. Sizes for which there are
    too few pairs are left out with a log message. ``pools`` are the other choices of the pools; its
    size does not count. The ``draws`` of pools are by seeds from 0, which become those of the rows;
    their data set reads "NAME, pool SIZE".
    """
    require_at_least("draws", draws, 1)
    pools = pools or Pools()
    n = len(open_pairs(dataclasses.replace(pools, size=min(sizes))))
    fitting = [size for size in sizes if size <= n]
    if not fitting:
        raise DataError(
            f"no pool can be filled: {dataset} has {n} pairs, the smallest size is {min(sizes)}."
        )
    if len(fitting) < len(sizes):
        logger.info("%s has %d pairs: pool sizes above that are left out", dataset, n)
    found = ResultTable()
    with track("score", len(fitting) * draws * len(predictors), "scorings") as task:
        for size in fitting:
            outcomes = []
            for draw in range(draws):
                pairs = open_pairs(dataclasses.replace(pools, size=size, seed=draw))
                for name, predictor in predictors.items():
                    one = score(predictor, pairs, dataset=f"{dataset}, pool {size}")
                    outcomes.append(dataclasses.replace(one, method=name, seed=draw))
                    task.advance(1, f"{name}, pool {size}")
            found += evaluate(outcomes, metrics=METRICS, n_resamples=n_resamples)
    return found


def size_table(table: ResultTable) -> str:
    """Methods as rows, pool sizes as columns, "AUROC / FPR95" in percent, the accuracy of the VLM on top.

    Of several draws the mean, and the standard deviation over draws of the AUROC.
    """
    rows = table.mean_over_seeds().rows
    datasets = list(dict.fromkeys(row.dataset for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    cells = {(row.method, row.dataset, row.metric): row for row in rows}
    first = [cells[methods[0], dataset, "auroc"] for dataset in datasets]
    lines = [
        ["pool size", *((dataset or "").rpartition(" ")[2] for dataset in datasets)],
        ["VLM accuracy", *(f"{100 * row.accuracy:.1f}" for row in first)],
    ]
    for method in methods:
        pairs = [
            (cells[method, dataset, "auroc"], cells[method, dataset, "fpr95"])
            for dataset in datasets
        ]
        lines.append([method or "", *(_cell(*pair) for pair in pairs)])
    return "\n".join(aligned(lines))


def _cell(auroc: ResultRow, fpr95: ResultRow) -> str:
    if auroc.value is None or fpr95.value is None:
        return "undefined"
    spread = (
        f" ± {100 * (auroc.ci_high - auroc.value):.1f}"
        if auroc.ci_high is not None and auroc.seed is None
        else ""
    )
    return f"{100 * auroc.value:.1f}{spread} / {100 * fpr95.value:.1f}"
