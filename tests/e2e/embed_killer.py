"""Embed once per death point for ``test_embed_kill``, each time in a child that kills itself there.

If a point ends in "+columns", its run keeps columns beside the embeddings.

One process imports torch and forks, because an import per point would take as long as the whole
test. This process computes nothing, so a fork loses no thread.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.builders.store_fakes import NAMES, FakeBackbone, dataset
from vilu.store.embed import ExtraColumns, embed


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Mortal(FakeBackbone):
    """A backbone that kills its process in its n-th picture or its n-th batch."""

    def __init__(self, stage: str, n: int) -> None:
        super().__init__()
        self.stage, self.left = stage, n

    def _tick(self, stage: str) -> None:
        if stage == self.stage:
            if self.left == 0:
                die()
            self.left -= 1

    def preprocess(self, image):
        self._tick("decode")
        return super().preprocess(image)

    def encode_images(self, pixels):
        self._tick("encode")
        return super().encode_images(pixels)


def die_in_sync(n: int) -> None:
    """Kill the process before the n-th sync.

    An even sync is for a file before its rename. An odd sync is for the folder after the rename.
    """
    fsync, calls = os.fsync, iter(range(10**6))

    def patched(descriptor: int) -> None:
        if next(calls) == n:
            die()
        fsync(descriptor)

    os.fsync = patched


def main(folder: Path, points: list[str]) -> None:
    for point in points:
        if child := os.fork():
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                sys.exit(f"{point}: ended with status {status} instead of being killed")
            continue
        stage, n = point.removesuffix("+columns").split("-")
        if stage == "sync":
            die_in_sync(int(n))
        bad = {4: b"", 17: b"<html>"}
        settings = {"names": NAMES, "batch_size": 4, "part_size": 10, "max_error_rate": 0.5}
        if point.endswith("+columns"):
            settings["columns"] = ExtraColumns(features=True, views=2, prompts=("the {}.",))
        embed(dataset(35, bad=bad), Mortal(stage, int(n)), folder / point, **settings)
        os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
