"""No command may trust a damaged artefact: after any damage, a command must name the file or give
the same numbers, without a traceback.

``make test-corruption`` runs more than a thousand damages on all files in all artefacts. It also
runs a thousand edits on every document, with the old digest and with a matching digest. SEED=...
draws others. CI runs a share.
"""

from __future__ import annotations

import json
import os
import random
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.corruption.bed import Artefact, Refused, build, in_time
from tests.corruption.damage import KINDS, damage, edited
from vilu.artifacts.hashing import digest
from vilu.artifacts.tables import METADATA_KEY, table_digest
from vilu.errors import ViLUError

SEED = int(os.environ.get("SEED", "0"))
N_DAMAGES = int(os.environ.get("DAMAGES", "100"))
N_USES = int(os.environ.get("USES", "1"))
N_EDITS = int(os.environ.get("EDITS", "2"))
LOG = os.environ.get("CORRUPTION_LOG")

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> list[Artefact]:
    return build(tmp_path_factory.mktemp("bed"))


def note(*facts: object) -> None:
    """Write a line to the log at once."""
    if LOG:
        Path(LOG).parent.mkdir(parents=True, exist_ok=True)
        with Path(LOG).open("a", encoding="utf-8") as handle:
            handle.write(json.dumps([*map(str, facts)], ensure_ascii=False) + "\n")


def said_by(use: Any) -> tuple[str, object]:
    """Return "done" with the value, "refused" with the message, or "traceback" with the error."""
    try:
        with in_time(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "done", use()
    except (ViLUError, Refused) as error:
        return "refused", str(error)
    except Exception as error:  # noqa: BLE001 - the test looks for these
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "traceback",
            f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})",
        )


def names(message: object, changed: list[Path], artefact: Artefact) -> bool:
    """Return whether a message names a changed file."""
    return any(path.name in str(message) for path in changed)


def operations(
    bed: list[Artefact], n: int, draw: random.Random
) -> list[tuple[Artefact, Path, str]]:
    """Return n operations: every damage on every file in random order, repeated until there are
    n.
    """
    every = [
        (artefact, path, kind) for artefact in bed for path in artefact.pristine for kind in KINDS
    ]
    rounds = -(-n // len(every))
    found = []
    for _ in range(rounds):
        found += draw.sample(every, len(every))
    return found[:n]


def undamaged(artefact: Artefact, name: str) -> tuple[str, object]:
    """Run a use twice on the intact artefact, check that the results agree and return the
    result.
    """
    found = []
    for _ in range(2):
        found.append(said_by(artefact.uses[name]))
        artefact.restore()
    assert found[0] == found[1], f"{name} of {artefact.path} is not the same twice"
    assert found[0][0] == "done", found[0]
    return found[0]


def test_no_damage_is_believed(bed: list[Artefact]) -> None:
    draw, expected, faults = random.Random(SEED), {}, []
    counts = {"same": 0, "refused": 0}
    for number, (artefact, path, kind) in enumerate(operations(bed, N_DAMAGES, draw)):
        uses = draw.sample(sorted(artefact.uses), min(N_USES, len(artefact.uses)))
        for name in uses:
            if (artefact.path, name) not in expected:
                expected[artefact.path, name] = undamaged(artefact, name)
        state = draw.getstate()
        for name in uses:
            draw.setstate(state)
            changed = damage(kind, path, list(artefact.pristine), draw)
            if changed is None:
                break
            before = time.monotonic()
            ended, value = said_by(artefact.uses[name])
            artefact.restore()
            right = expected[artefact.path, name]
            if (ended, value) == right:
                verdict = "same"
            elif ended == "refused" and names(value, changed, artefact):
                verdict = "refused"
            else:
                verdict = {"done": "DIFFERENT", "refused": "UNNAMED"}.get(ended, "TRACEBACK")
                faults.append((verdict, path.name, kind, name, str(value)[-300:]))
            counts[verdict] = counts.get(verdict, 0) + 1
            told = "" if verdict == "same" else str(value)[-300:]
            where, seconds = (
                path.relative_to(artefact.path.parent),
                round(time.monotonic() - before, 2),
            )
            note(number, verdict, where, kind, name, seconds, told)
    note("counts", counts)
    assert not faults, f"{len(faults)} of {counts}: {faults[:5]}"
    assert counts["refused"] > N_DAMAGES / 2


ALIKE = {"receipts"}
"""Folders with documents that are all alike."""
BOUND = {"scores", "histograms", "all", "lvu", "mcm", "head"}
"""Folders whose tables are covered by a document, so an edited table is never read."""


def documents(bed: list[Artefact]) -> list[tuple[Artefact, Path]]:
    """Return every document and every vilu table that has a digest, but only the first receipt."""
    found: dict[Path, tuple[Artefact, Path]] = {}
    for artefact in bed:
        for path in artefact.pristine:
            table = path.suffix == ".parquet" and path.parent.name not in BOUND and is_ours(path)
            if path.suffix == ".json" or table:
                found.setdefault(
                    path.parent if path.parent.name in ALIKE else path, (artefact, path)
                )
    return list(found.values())


def is_ours(path: Path) -> bool:
    return METADATA_KEY in (pq.read_schema(path).metadata or {})


def content_of(path: Path) -> Any:
    """Return a document's content, or a table's metadata."""
    return json.loads(
        path.read_text() if path.suffix == ".json" else pq.read_schema(path).metadata[METADATA_KEY]
    )


def rewrite(path: Path, content: Any, *, sealed: bool) -> None:
    """Write edited content into a document or a table's metadata, with the old or a matching
    digest.
    """
    seal = "fingerprint" if path.name == "predictor.json" else "digest"
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        if sealed and isinstance(content, dict):
            content = {key: value for key, value in content.items() if key != seal}
            content[seal] = table_digest(table, content)
        pq.write_table(
            table.replace_schema_metadata({METADATA_KEY: json.dumps(content).encode()}), path
        )
        return
    if sealed and isinstance(content, dict):
        content = {key: value for key, value in content.items() if key != seal}
        content[seal] = digest(content)
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")


def test_no_edit_ends_in_a_traceback(bed: list[Artefact]) -> None:
    """If a document is edited, its reader must not end in a traceback.

    Each edit is read as it is and with a matching digest. Cards and rules are included.
    """
    draw, faults, counts = random.Random(SEED + 1), [], {"done": 0, "refused": 0}
    found = [(artefact, path, content_of(path)) for artefact, path in documents(bed)]
    for artefact in bed:
        assert said_by(artefact.read)[0] == "done", artefact.path
        artefact.restore()
    for number in range(N_EDITS):
        for artefact, path, document in found:
            content = edited(document, draw)
            for sealed in (False, True):
                rewrite(path, content, sealed=sealed)
                ended, value = said_by(artefact.read)
                artefact.restore()
                counts[ended] = counts.get(ended, 0) + 1
                if ended == "traceback":
                    faults.append((path.name, sealed, value))
                    note("edit", path.name, sealed, value, json.dumps(content)[:3000])
        note("edited", number + 1, len(found), counts)
    assert not faults, f"{len(faults)} of {counts}: {faults[:5]}"
