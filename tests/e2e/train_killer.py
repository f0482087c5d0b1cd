"""Train once per death point for ``test_checkpoint``, each time in a child that kills itself there.

A point is "step-N" or "sync-N" (before the N-th sync for a file or folder). One process imports
torch and forks, because an import per point would take as long as the whole test. This process
computes nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path

from tests.conftest import toy_embeddings
from tests.e2e.ddp_worker import QUICK, Brake
from tests.e2e.embed_killer import die, die_in_sync
from vilu.predictors.nn.checkpoint import checkpointing
from vilu.progress import reporting
from vilu_bench.methods.ensembles import MCDropout


def main(folder: Path, points: list[str]) -> None:
    for point in points:
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                sys.exit(f"{point}: ended with status {status} instead of being killed")
            continue
        kind, n = point.split("-")
        if kind == "sync":
            die_in_sync(int(n))
        steps = int(n) if kind == "step" else 10**6
        with reporting(Brake(steps, die)), checkpointing(folder / point):
            MCDropout(**QUICK).fit(toy_embeddings(n=330))
        os._exit(0)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), sys.argv[2:])
