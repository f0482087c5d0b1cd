"""From a path to the methods of a page: what is read, how it is called, and that all of it is about the same rows."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vilu.errors import DataError, UsageError
from vilu.evaluation import require_same_rows
from vilu.outcomes import Outcomes
from vilu.scores.documents import RUN
from vilu.scores.folder import ScoreFolder

PREFERRED = ("vilu_plus", "vilu")
"""Methods that a page is about if none is chosen, by how their names begin."""


def read_scores(path: str | Path) -> list[Outcomes]:
    """The methods that were scored: every ``*.parquet`` of a folder by name, one file, or one folder of parts.

    A method that has no name, or one that another file has too, is called after its file.

    Raises:
        UsageError: If a file has another suffix.
        StorageError: If a file cannot be opened.
        DataError: If there is nothing, or a file holds no scores.
    """
    root = Path(path)
    if (root / RUN).is_file():
        return _named([(root, ScoreFolder(root).outcomes())])
    files = sorted(root.glob("*.parquet")) if root.is_dir() else [root]
    if not files:
        raise DataError(
            f"{root} holds no .parquet files. Give a folder with what `vilu score` wrote, a file per method."
        )
    return _named([(file, Outcomes.load(file)) for file in files])


def _named(found: Sequence[tuple[Path, Outcomes]]) -> list[Outcomes]:
    names = Counter(one.method for _, one in found)
    return [
        one if one.method and names[one.method] == 1 else dataclasses.replace(one, method=_call(one.method, path))
        for path, one in found
    ]


def _call(method: str | None, path: Path) -> str:
    return f"{method} ({path.stem})" if method else path.stem


def choose_main(outcomes: Sequence[Outcomes], main: str | None) -> Outcomes:
    """The method that a page is about: the one called ``main``, or else ViLU+, ViLU, or the first.

    Raises:
        UsageError: If there is none, none is called so, or two methods have one name.
        ProvenanceError: If not all are about the same answers; the message names two that are not.
    """
    names = [one.method or "" for one in outcomes]
    if not names:
        raise UsageError("a page needs at least one set of outcomes. Got none.")
    repeated = [name for name, count in Counter(names).items() if count > 1 or not name]
    if repeated:
        raise UsageError(
            f"every method of a page needs a name of its own. Several, or one without, are {repeated[0]!r}."
        )
    for one in outcomes[1:]:
        require_same_rows(outcomes[0], one)
    if main is not None:
        if main not in names:
            near = difflib.get_close_matches(main, names, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"no method here is called {main!r}.{hint} There are: {', '.join(names):.500}.")
        return outcomes[names.index(main)]
    preferred = (i for start in PREFERRED for i, name in enumerate(names) if name.startswith(start))
    return outcomes[next(preferred, 0)]
