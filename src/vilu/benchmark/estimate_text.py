"""What benchmarks would do, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from vilu.benchmark.estimate import StudyPlan
from vilu.benchmark.layout import aligned


def describe(plans: Sequence[StudyPlan]) -> str:
    """The plans as text: a table of embeddings and one of cells for each, then the sums."""
    texts = [_describe(one) for one in plans]
    parts = {(part.data, part.part, part.backbone): part for one in plans for part in one.parts}
    total = [
        f"together: {len(parts)} sets of embeddings, {_gib(part.n_bytes for part in parts.values())}, "
        f"{_hours(part.seconds for part in parts.values())} of embedding on two CPU cores "
        f"({_hours(part.seconds_a100 for part in parts.values())} on an A100 by published rates); "
        f"{sum(one.runs for one in plans):,} runs (studies in one output share those that they have in common), "
        f"{_hours(one.seconds for one in plans)} on one core",
        "Numbers of images marked * are the catalogue's; times are guesses from rates measured on two CPU cores "
        "(embedding by vilu.backbones.named, methods by one run with ten classes, scaled with rows and width).",
    ]
    return "\n\n".join([*texts, "\n".join(total)])


def _describe(one: StudyPlan) -> str:
    heading = ["data", "part", "backbone", "images", "state", "MB", "CPU h", "A100 min"]
    rows = [
        [
            part.data,
            part.part,
            part.backbone,
            "?" if part.images is None else f"{part.images:,}" + ("*" if part.counted == "catalogue" else ""),
            part.state,
            "?" if part.n_bytes is None else f"{part.n_bytes / 1e6:,.1f}",
            "?" if part.seconds is None else f"{part.seconds / 3600:.2f}",
            "?" if part.seconds_a100 is None else f"{part.seconds_a100 / 60:.1f}",
        ]
        for part in one.parts
    ]
    counted = Counter((str(cell["data"]), str(cell["setting"])) for cell in one.listed)
    cells = ", ".join(f"{data}/{setting} {n}" for (data, setting), n in counted.items())
    problems = [f"{part.data} ({part.part}) cannot be read: {part.problem}" for part in one.parts if part.problem]
    untimed = f", {one.untimed} runs without an estimate" if one.untimed else ""
    return "\n".join(
        [
            f"{one.name}: {one.title}",
            *aligned([heading, *rows]),
            *problems,
            f"cells: {one.cells} ({cells})",
            f"runs: {one.runs} results from {one.fits} fits, about {_hours([one.seconds])} on one core{untimed}",
        ]
    )


def _hours(seconds: Iterable[float | None]) -> str:
    return f"{sum(filter(None, seconds)) / 3600:,.1f} h"


def _gib(sizes: Iterable[int | None]) -> str:
    return f"{sum(filter(None, sizes)) / 2**30:,.2f} GiB"
