"""What the kept stores, scores, monitors and studies are asked,
through public names and commands alone.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vilu
from tests.compat.bed import Arrays

STORES = ("train", "val", "test", "unlabelled", "captions", "tars")

EXPORTED = "vilu-plain"
"""The kept predictor that was written for another runtime."""

RULES: dict[str, tuple[str, list[str]]] = {
    "ltt": ("mcm", ["--max-risk", "0.22", "--confidence", "0.7"]),
    "crc": ("mcm", ["--max-risk", "0.2", "--method", "crc"]),
    "selection": ("mcm", ["--max-risk", "0.25", "--method", "selection"]),
    "coverage": ("vilu", ["--min-coverage", "0.7"]),
    "per_class": ("mcm", ["--max-risk", "0.6", "--confidence", "0.5", "--per-class"]),
    "lac": (
        "vilu_plus",
        ["--max-risk", "0.28", "--confidence", "0.5", "--label-sets", "lac", "--max-miss", "0.2"],
    ),
    "aps": ("mcm", ["--label-sets", "aps", "--max-miss", "0.2"]),
    "probabilities": ("doctor", []),
}
"""Method, and what ``vilu calibrate`` is asked for."""

PAIRS = ["--pool-size", "4"]


def sources(stores: Path) -> dict[str, vilu.EmbeddingSource]:
    """Every kept store, and shards of another tool, opened in several ways."""
    pairs: dict[str, tuple[str, dict[str, Any]]] = {
        "captions": ("captions", {"pools": vilu.Pools(8)}),
        "captions of a fold": ("captions", {"pools": vilu.Pools(4, seed=2), "fold": "train"}),
        "tars": ("tars", {"pools": vilu.Pools(4, seed=None)}),
        "laion": ("laion", {"pools": vilu.Pools(8, seed=1), "logit_scale": 12.0}),
        "laion turned": (
            "laion",
            {"pools": vilu.Pools(8, direction="text_to_image"), "logit_scale": 12.0},
        ),
    }
    return {
        **{
            name: vilu.EmbeddingStore(stores / name)
            for name in ("train", "val", "test", "unlabelled")
        },
        **{name: vilu.open_source(stores / folder, **how) for name, (folder, how) in pairs.items()},
    }


def inspected(stores: Path, name: str) -> str:
    """What ``vilu inspect`` says of a store."""
    return run("inspect", stores / name, "--json").replace(str(stores), "STORES")


def score_in_parts(rules: Path, stores: Path, output: Path) -> vilu.ScoreFolder:
    """A folder of four parts and one of rows that fill no pool, or what is missing of it."""
    many = vilu.open_source(stores / "captions", pools=vilu.Pools(5))
    return vilu.score_parts(
        vilu.load(rules / "pairs"), many, output, rows_per_part=10, dataset="captions"
    )


def rendered(study: Path) -> str:
    """Write everything that a study shows anew; what is printed."""
    intro = ("--title", "Kept", "--intro", "Rendered from kept cells.")
    return run("render", study, "--document", study / "docs" / "kept.md", *intro)


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and standard output of ``vilu``, run in this process."""
    from vilu.cli import main

    given, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["vilu", "--quiet", *map(str, arguments)]
    try:
        with redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so few rows are told to be few
            with pytest.raises(SystemExit) as end:
                main()
    finally:
        sys.argv = given
        signal.signal(signal.SIGTERM, handler)
    return int(end.value.code or 0), out.getvalue()


def of_source(source: vilu.EmbeddingSource) -> Arrays:
    """Everything that a source of embeddings holds."""
    every = torch.arange(len(source))
    found = {
        "ids": np.array(list(source.ids)),
        "status": np.asarray(source.status),
        "target": source.target.numpy(),
        "image": source.image_rows(every).numpy()
        if source.pool_size is None
        else source.picture_rows(every).numpy(),
        "usable": source.usable_rows.numpy(),
        **{
            f"columns/{name}": source.column(name, every).numpy() for name in sorted(source.columns)
        },
    }
    if source.pool_size is None:
        return found | {
            "text": source.candidates(every).text.numpy(),
            "names": np.array(source.class_names or ()),
        }
    return found | {"text": source.caption_rows(every).numpy()}


def of_outcomes(outcomes: vilu.Outcomes) -> Arrays:
    """Everything that scores hold, by column; texts that are missing as empty ones."""
    floats = {
        "uncertainty": outcomes.uncertainty,
        "failure_probability": outcomes.failure_probability,
    }
    wholes = {
        "failure": outcomes.failure,
        "prediction": outcomes.prediction,
        "target": outcomes.target,
    }
    texts = {
        name: [text or "" for text in column]
        for name in ("ids", "reason", "decision", "decision_reason", "label_set", "class_names")
        if (column := getattr(outcomes, name)) is not None
    }
    about = {
        name: getattr(outcomes, name)
        for name in ("method", "dataset", "split", "seed", "is_probability")
    }
    about["provenance"] = dict(outcomes.provenance)
    return {
        **{
            name: np.asarray(column)
            for name, column in {**floats, **wholes}.items()
            if column is not None
        },
        **{name: np.array(column) for name, column in texts.items()},
        "about": np.array(json.dumps(about, sort_keys=True)),
    }


def run(*arguments: object) -> str:
    """Standard output of a command that succeeds."""
    code, text = command(*arguments)
    assert code == 0, f"exit code {code} of vilu {' '.join(map(str, arguments))}"
    return text


def of_folder(scores: vilu.ScoreFolder) -> Arrays:
    """The same of a folder of scores, and its counts."""
    scores.verify()
    histogram = {name: getattr(scores.histogram, name) for name in ("bins", "correct", "wrong")}
    return of_outcomes(scores.outcomes()) | {
        f"histogram/{name}": value for name, value in histogram.items()
    }


def evaluated(scores: Path) -> dict[str, Any]:
    """What ``vilu evaluate`` says of kept scores: the table that is printed, and the rows."""
    given = [*sorted(scores.glob("*.*")), scores / "folder", scores / "parts"]
    rows = run("evaluate", *given, "--resamples", 50, "--json").replace(f"{scores}/", "")
    return {
        "table": run("evaluate", *given, "--resamples", 50).replace(f"{scores}/", ""),
        "rows": json.loads(rows),
    }


def explained(rules: Path, stores: Path) -> dict[str, Any]:
    """What ``vilu explain`` says of two answers, and of all together,
    with three methods of different kinds.
    """
    found = {}
    for label in ("ltt", "coverage", "lac"):
        asked = ("explain", rules / label, stores / "test", "--json")
        found[label] = json.loads(run(*asked, "--train", stores / "train", "-n", 2))
        found[f"{label}, all"] = json.loads(run(*asked, "--summary"))
    return found


def watch(predictor: Path, state: Path, scores: Path) -> dict[str, Any]:
    """What ``vilu monitor`` says of scores, going on from a state, and leaves in it."""
    code, text = command("monitor", predictor, scores, "--state", state, "--json")
    status = {
        key: value for key, value in json.loads(text).items() if key not in {"predictor", "batches"}
    }
    return {"code": code, "status": status}
