"""``python -m benchmarks [NAME ...]``: run the named measurements, by default all."""

from __future__ import annotations

import importlib
import json
import sys

NAMES = (
    "startup",
    "memory",
    "head_training",
    "small_fits",
    "zero_shot_scores",
    "plus_speed",
    "evaluating",
    "bf16_quality",
    "embed_throughput",
    "stream_scores",
    "verified_scores",
    "shuffle_reader",
    "contrast",
    "main_table",
)


def main() -> None:
    """Run the measurements, and print a line of JSON at the end."""
    chosen = sys.argv[1:] or NAMES
    unknown = sorted(set(chosen) - set(NAMES))
    if unknown:
        sys.exit(f"no benchmark called {', '.join(unknown)}; there are {', '.join(NAMES)}")
    figures: dict[str, object] = {}
    for name in chosen:
        figures |= importlib.import_module(f"benchmarks.{name}").main()
    print(json.dumps(figures))


main()
