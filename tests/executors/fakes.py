"""A model with accidents, and pictures whose width tells their part. Workers import this module."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.builders.store_fakes import NAMES, FakeBackbone, FakeDataset, picture

N_PARTS, PER_PART = 12, 5
BAD = {7: b"", 23: b"<html>", 41: b"\x89PNG"}
"""Bad samples, which are five per cent."""

SETTINGS = {"names": NAMES, "batch_size": 2, "part_size": PER_PART, "max_error_rate": 0.1}
WIDTH = 16


def pictures(n_parts: int = N_PARTS) -> FakeDataset:
    """Return five pictures per part, where a picture's width tells its part."""
    n = n_parts * PER_PART
    blobs = [BAD.get(i, picture(i, (WIDTH + i // PER_PART, 18))) for i in range(n)]
    return FakeDataset(blobs, [i % 3 for i in range(n)])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Clumsy(FakeBackbone):
    """A model that logs its pictures, and kills its process at chosen moments.

    Args:
        log: A folder for the log.
        accidents: Parts by the moment: "decode", "encode" or "rename" (after the part's vectors
            have their name and before its metadata have). "poison" is "decode" every time. The
            other accidents happen once.
        slow: Seconds per batch.
    """

    def __init__(
        self, log: Path, accidents: dict[str, int] | None = None, slow: float = 0.0
    ) -> None:
        super().__init__()
        self.log, self.accidents, self.slow, self.part = log, accidents or {}, slow, -1

    def preprocess(self, image):
        self.part = image.width - WIDTH
        with (self.log / "pictures").open("a") as log:
            log.write(f"{os.getpid()} {self.part}\n")
        if self.part == self.accidents.get("poison"):
            die()
        self._once("decode", self.part)
        return super().preprocess(image)

    def encode_images(self, pixels):
        self._once("encode", self.part)
        if "rename" in self.accidents:
            self._watch_renames()
        if self.slow:
            time.sleep(self.slow)
        return super().encode_images(pixels)

    def _once(self, moment: str, part: int) -> None:
        if part != self.accidents.get(moment):
            return
        try:
            (self.log / moment).touch(exist_ok=False)
        except FileExistsError:
            return
        die()

    def _watch_renames(self) -> None:
        if getattr(os.replace, "watched", False):
            return
        replace, name = os.replace, f"metadata_{self.accidents['rename']:05d}.parquet"

        def watched(source, target, **options):
            if Path(target).name == name:
                self._once("rename", self.accidents["rename"])
            return replace(source, target, **options)

        watched.watched = True
        os.replace = watched
        Path.replace = lambda path, target: (watched(path, target), Path(target))[1]


def pictures_seen(log: Path) -> list[tuple[int, int]]:
    """Return (process, part) for every good picture that was preprocessed."""
    path = log / "pictures"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(int(process), int(part)) for process, part in map(str.split, lines)]
