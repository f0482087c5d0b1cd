"""Run by ``test_embed_kill``:
embeds once per point of death, each time in a child that kills itself there.

A point that ends in "+columns" is one of a run that keeps columns beside the embeddings.

One process imports torch and forks, since importing it once per point would take the time of the
whole test. It never computes anything itself, so no thread is lost in a fork.
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
    """Dies in its n-th picture or n-th batch."""

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
    """Die before the n-th sync:
    even ones are of a file not yet renamed, odd ones of the folder after the renaming.
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
