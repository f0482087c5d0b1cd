"""Makes src/vilu_bench/assets/coop_splits.txt.xz, CoOp's splits for seven data sets.

    python tools/make_split_asset.py PATH/TO/splits

Input: the folder with CoOp's split_zhou_*.json, lists of [path, class index, class name]. Output:
the same facts as compressed text, sorted by class and path (the order in the lists decides nothing
here). ``vilu_bench/known_datasets/read.py`` describes the layout. The same input gives the same
text, and with the same liblzma the same bytes.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

FILES = {
    "eurosat": "EuroSAT",
    "stanford_cars": "StanfordCars",
    "oxford_pets": "OxfordPets",
    "flowers102": "OxfordFlowers",
    "caltech101": "Caltech101",
    "dtd": "DescribableTextures",
    "ucf101": "UCF101",
}
LETTERS = {"train": "t", "val": "v", "test": "e"}
MAX_BYTES = 300_000
TARGET = Path(__file__).parents[1] / "src" / "vilu_bench" / "assets" / "coop_splits.txt.xz"


def lines_of(name: str, file: Path) -> list[str]:
    """Return a data set's lines: a head, then per class the name, a letter per image, and paths."""
    images: dict[int, list[tuple[str, str]]] = {}
    names: dict[int, str] = {}
    text = file.read_text(encoding="utf-8")
    entries_of_split = json.loads(text)
    for split, entries in entries_of_split.items():
        for path, label, class_name in entries:
            images.setdefault(label, []).append((path, LETTERS[split]))
            if names.setdefault(label, class_name) != class_name:
                sys.exit(
                    f"{file.name}: label {label} has two names, {names[label]!r} and {class_name!r}"
                )
    lines = [f"{name}\t{len(names)}"]
    for label in range(len(names)):
        rows = sorted(images[label])
        lines += [names[label], "".join(letter for _, letter in rows), *(path for path, _ in rows)]
    return lines


def main() -> None:
    """Read the lists, sort the images, and write the asset."""
    folder = Path(sys.argv[1])
    lines = [
        line
        for name, file in FILES.items()
        for line in lines_of(name, folder / f"split_zhou_{file}.json")
    ]
    text = "\n".join(lines)
    content = text.encode() + b"\n"
    data = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    if len(data) > MAX_BYTES:
        sys.exit(f"{TARGET.name} would have {len(data):,} bytes; at most {MAX_BYTES:,} may ship")
    TARGET.write_bytes(data)
    print(f"{TARGET.name}: {len(lines):,} lines, {len(data):,} bytes")


if __name__ == "__main__":
    main()
