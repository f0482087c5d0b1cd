"""Run a driver in its own process, because the driver dies: ``python -m tests.executors.driver MODE
NAME ROOT LOG``.

``third`` embeds and kills itself after a third of the receipts. ``slowly`` embeds slowly, so that a
test can stop it. ``ranks`` forks a rank until the rank ends well, and prints how each fork ended.
All these forks share one import.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.executors.fakes import N_PARTS, SETTINGS, Clumsy, die, pictures
from vilu.store.embed import embed
from vilu.store.executors import make_executor
from vilu.store.executors.local import RankExecutor

ALONE = {"RANK": "0", "WORLD_SIZE": "1"}


class Mortal:
    """An executor that wraps another executor and kills its driver after some receipts."""

    def __init__(self, executor, left: int) -> None:
        self.executor, self.left = executor, left

    def run(self, job, parts: Sequence[int]) -> Iterator[object]:
        for receipt in self.executor.run(job, parts):
            self.left -= 1
            if not self.left:
                die()
            yield receipt


def rank_until_done(root: Path, model: Clumsy) -> list[int]:
    ends: list[int] = []
    while not ends or (ends[-1] and len(ends) < 9):
        if child := os.fork():
            ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            continue
        try:
            embed(pictures(), model, root, executor=RankExecutor(ALONE), shared=True, **SETTINGS)
        except Exception as error:  # noqa: BLE001 - the test looks at its exit code
            os._exit(getattr(error, "exit_code", 99))
        os._exit(0)
    return ends


def main(mode: str, name: str, root: Path, log: Path) -> None:
    if mode == "ranks":
        model = Clumsy(log, json.loads(os.environ["ACCIDENTS"]))
        sys.stdout.write(json.dumps(rank_until_done(root, model)))
        return
    executor = RankExecutor(ALONE) if name == "rank" else make_executor(name, 2)
    if mode == "third":
        embed(
            pictures(),
            Clumsy(log),
            root,
            executor=Mortal(executor, N_PARTS // 3),
            shared=name == "rank",
            **SETTINGS,
        )
    elif mode == "slowly":
        embed(pictures(), Clumsy(log, slow=0.5), root, executor=executor, **SETTINGS)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
