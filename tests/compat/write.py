"""Write a release's kept artefacts and their numbers, if they do not exist yet.

    OMP_NUM_THREADS=1 python -m tests.compat.write

`make compat` does this with the wheels, in an environment without this source.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import vilu
from tests.compat.artefacts import ARCHIVE, NUMBERS, make, numbers, pack, unpack


def main() -> None:
    """Make all artefacts, keep them, and record the numbers that the kept files give."""
    if ARCHIVE.exists():
        print(f"{ARCHIVE.name} is there. What a release wrote is never written again.")  # noqa: T201
        return
    print(f"written by vilu {vilu.__version__} of {Path(vilu.__file__).parent}")  # noqa: T201
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        made.mkdir()
        make(made)
        pack(made)
        kept = numbers(unpack(Path(folder) / "kept"))
        NUMBERS.write_text(json.dumps(kept) + "\n", encoding="utf-8")
    for path in (ARCHIVE, NUMBERS):
        print(f"{path.stat().st_size:8,} {path.name}")  # noqa: T201


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
