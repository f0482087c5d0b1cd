"""A study as a page of Markdown: what it is about, its tables and figures, and what became of the claims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from vilu.benchmark.config import Config
from vilu.studies.claims import Verdict
from vilu.studies.exhibits import Exhibit
from vilu.studies.formats import in_markdown, to_markdown

RULINGS = {
    "holds": "**holds**",
    "does not hold": "**does not hold**",
    "open": "**open**: zero is in the interval",
    "not tested": "**not tested**",
}


HEADINGS = {
    "holds": "**Holds**",
    "does not hold": "**Does not hold**",
    "open": "**Open**, since zero is in the interval",
    "not tested": "**Not tested**",
}


def page(
    config: Config,
    exhibits: Sequence[Exhibit],
    verdicts: Sequence[Verdict],
    figure: Callable[[str], str],
) -> str:
    """Markdown of a study, to stand below a heading of level one.

    Args:
        config: The benchmark.
        exhibits: Its tables and figures.
        verdicts: On its claims.
        figure: From the name of a view to the link of its figure.
    """
    parts = [f"## {config.study.title if config.study else config.name}", *_about(config)]
    if verdicts:
        parts += ["What the paper says, and what is found here:", claims_table(config, verdicts)]
    for one in exhibits:
        if one.draw is not None:
            parts.append(f"![{in_markdown(one.title)}]({figure(one.name)})")
        parts.append(f"```\n{one.body}\n```" if isinstance(one.body, str) else to_markdown(one.body).rstrip())
    return "\n\n".join(parts) + "\n"


def all_claims(verdicts: Iterable[Sequence[Verdict]]) -> str:
    """Every claim of several studies under what became of it."""
    found: dict[str, list[Verdict]] = {ruling: [] for ruling in HEADINGS}
    for verdict in (one for several in verdicts for one in several):
        found[verdict.ruling].append(verdict)
    parts = []
    for ruling, heading in HEADINGS.items():
        lines = [f"- {in_markdown(one.claim.says)} ({in_markdown(one.claim.source)})" for one in found[ruling]]
        if lines:
            parts.append("\n".join([f"{heading} ({len(lines)}):", "", *lines]))
    return "\n\n".join(["## The paper's claims here", *parts, ""]) if parts else ""


def _about(config: Config) -> list[str]:
    """What the study reproduces, how, and the command."""
    study = config.study
    if study is None:
        return []
    lines = [f"Reproduces: {study.reproduces}." if study.reproduces else "", study.protocol]
    return [" ".join(filter(None, lines))] if any(lines) else []


def claims_table(config: Config, verdicts: Sequence[Verdict]) -> str:
    """Claims with what decides them, as Markdown."""
    lines = ["| claim | here | by | source |", "|---|---|---|---|"]
    for verdict in verdicts:
        ends = verdict.interval
        number = str(verdict.reason)
        if verdict.number is not None and ends is not None:
            number = (
                f"{in_markdown(verdict.what)}: {100 * verdict.number:+.1f} [{100 * ends.low:+.1f}, "
                f"{100 * ends.high:+.1f}] points"
            )
        cells = [in_markdown(verdict.claim.says), RULINGS[verdict.ruling], number, in_markdown(verdict.claim.source)]
        lines.append("| " + " | ".join(cells) + " |")
    note = f"Brackets: {100 * config.confidence:g} % bootstrap interval; a positive number speaks for the claim."
    return "\n".join([*lines, "", f"<sub>{note}</sub>"])
