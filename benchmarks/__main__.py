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
        unknown_names = ", ".join(unknown)
        known_names = ", ".join(NAMES)
        sys.exit(f"no benchmark called {unknown_names}; there are {known_names}")
    figures: dict[str, object] = {}
    for name in chosen:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        figures |= benchmark.main()
    print(json.dumps(figures))


main()
