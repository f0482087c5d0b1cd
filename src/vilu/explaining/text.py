"""Explanations as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vilu.explaining.attribution import Attribution
from vilu.explaining.explanation import Competitor, Explanation, Explanations
from vilu.explaining.neighbours import Neighbour

if TYPE_CHECKING:
    from vilu.explaining.prompts import PromptGains
    from vilu.explaining.risk import RiskMap


SHOWN = 15
"""Lines of a table; the rest is counted."""


def explanations_text(found: Explanations) -> str:
    """What the numbers mean, and then one paragraph per row."""
    kind = "probability of failure" if found.is_probability else "a score, higher = more likely wrong"
    head = [
        f"method        {found.method}; uncertainty: {kind}",
        f"competitors   {found.weights}",
        f"attribution   {found.attribution}",
        f"neighbours    {found.neighbours}",
    ]
    return "\n\n".join(["\n".join(head), *(_row_text(row, found.unit) for row in found)])


def _row_text(row: Explanation, unit: str | None) -> str:
    verdict = {None: "", True: "  WRONG", False: "  right"}[row.wrong]
    truth = "" if row.truth is None else f"   truth {row.truth}{verdict}"
    lines = [
        f"row {row.row}  {row.key}",
        f"  answer      {row.answer} ({row.posterior:.1%})   uncertainty {row.uncertainty:.4g}{truth}",
        f"  competes    {'   '.join(map(_competitor, row.competitors))}",
    ]
    if row.attribution is not None:
        lines.append(f"  {unit}  {_sum(row.attribution)}")
    for kind, neighbours in (("failures", row.failures), ("successes", row.successes)):
        if neighbours is not None:
            lines += (
                [f"  nearest training {kind}", *map(_neighbour, neighbours)]
                if neighbours
                else [f"  no training {kind}"]
            )
    return "\n".join(lines)


def _competitor(candidate: Competitor) -> str:
    return f"{candidate.name} {candidate.weight:.3f}"


def _sum(attribution: Attribution) -> str:
    parts = "".join(f" {value:+.2f} {name}" for name, value in attribution.parts.items())
    return f"{attribution.score:.2f} = {attribution.baseline:.2f} mean{parts}"


def _neighbour(row: Neighbour) -> str:
    answered = f"answered {row.answer}" + ("" if row.answer == row.truth else f", true {row.truth}")
    return f"    {row.cosine:.3f}  {row.key}  {answered}"


def risk_text(found: RiskMap) -> str:
    """One line on the whole, and a table of the costliest confusions."""
    kind = "failures" if found.labelled else "expected failures"
    left_out = f"; {found.n_left_out:,} rows without score or label left out" if found.n_left_out else ""
    head = (
        f"{found.failures:,.1f} {kind} in {found.n:,} answers{left_out}. Of the {found.coverage:.0%} most trusted "
        f"(uncertainty up to {found.threshold:.4g}) {found.risk:.2%} are wrong."
    )
    other = "true" if found.labelled else "competitor"
    table = [
        (
            row.answer,
            row.instead,
            f"{row.failures:.1f}",
            f"{row.share:.1%}",
            f"{row.uncertainty:.3f}",
            f"{row.accepted:.1f}",
            f"{row.risk:.2%}",
        )
        for row in found.rows[:SHOWN]
    ]
    heading = ("answered", other, kind, "of all", "mean uncertainty", "accepted", "accepted risk")
    return "\n".join([head, "", *_aligned([heading, *table]), *_rest(len(found.rows), "confusions")])


def gains_text(found: PromptGains) -> str:
    """What is estimated, and a table of the classes that gain the most."""
    head = (
        f"Accuracy is {found.accuracy:.2%} on {found.n:,} labelled rows. With the text of one class moved towards its\n"
        f"images ({found.folds} folds, measured on rows not fitted on; an upper range for what wording can do):"
    )
    table = [
        (
            row.name,
            f"{row.n:,}",
            f"{row.failures:,}",
            f"{row.saved:,}",
            f"{row.lost:,}",
            f"{100 * row.gain:+.2f}",
            f"{100 * row.low:+.2f} to {100 * row.high:+.2f}",
        )
        for row in found.rows[:SHOWN]
    ]
    heading = ("class", "rows", "failures", "saved", "lost", "accuracy", "95 % interval")
    return "\n".join([head, "", *_aligned([heading, *table]), *_rest(len(found.rows), "classes")])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _rest(n: int, what: str) -> list[str]:
    return [f"... and {n - SHOWN:,} more {what} (--json has all)"] if n > SHOWN else []
