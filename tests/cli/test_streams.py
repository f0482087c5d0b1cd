"""Test a standard output that is full, closed or in another encoding, signals, and shell
completion.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import command
from tests.conftest import few
from vilu.cli.options import complete_methods

FULL = Path("/dev/full")
VILU = "import sys; sys.argv[0] = 'vilu'; from vilu.cli import main; main()"


def vilu(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command under its own name, because completion looks at the name."""
    words = [sys.executable, "-c", VILU, *args]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, **env}
    )


@pytest.mark.skipif(not FULL.exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["list", "metrics"]])
def test_a_full_disk_behind_stdout(words: list[str], unbuffered: str) -> None:
    with FULL.open("w") as full:
        done = subprocess.run(
            command(*words), stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert done.returncode == 7
    assert done.stderr == "vilu: error: cannot write to stdout: No space left on device.\n"


def test_nobody_reads_stdout() -> None:
    """If nobody reads stdout, the command must end silently, with the exit code for SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        command("list", "metrics"), stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("words", "code"), [("list metrics", 0), ("-q inspect nowhere", 2), ("frobnicate", 2)]
)
def test_a_stream_that_is_closed(words: str, code: int) -> None:
    """If a stream is closed, its text is lost, and all else must be as usual."""
    for closed in ("2>&-", ">&-", ">&- 2>&-"):
        line = f"{shlex.join(command(*words.split()))} {closed}"
        done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)  # noqa: S602
        assert done.returncode == code
        assert ("aurc" in done.stdout) == (code == 0 and closed == "2>&-")
        assert ("error" in done.stderr.lower()) == (code != 0 and closed == ">&-")


def test_stdout_of_another_encoding() -> None:
    done = vilu("datasets", "list", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert "imagenet" in done.stdout


@pytest.mark.parametrize("shell", few(["bash", "zsh", "fish"], 1))
def test_the_shell_is_told_how_to_complete(shell: str, tmp_path: Path) -> None:
    detected = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = vilu("--show-completion", shell, **detected)
    assert shown.returncode == 0
    assert f"_VILU_COMPLETE=complete_{shell}" in shown.stdout
    installed = vilu("--install-completion", shell, **detected)
    assert installed.returncode == 0, installed.stderr
    assert any(
        shown.stdout.strip() in path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    )


def complete(*words: str) -> list[str]:
    line = {"COMP_WORDS": " ".join(["vilu", *words]), "COMP_CWORD": str(len(words))}
    return vilu(_VILU_COMPLETE="complete_bash", **line).stdout.split()


def test_what_the_shell_completes() -> None:
    assert complete("sc") == ["score"]
    assert complete("embed", "x", "--backbone", "clip-vit-b") == ["clip-vit-b32", "clip-vit-b16"]
    assert complete("embed", "x", "--dataset", "cifar1") == ["cifar10", "cifar100"]
    assert complete_methods("delta_k") == ["delta_knn", "delta_knn_margin"]
    assert complete("list", "pre") == ["predictors"]


def test_help_loads_nothing_slow() -> None:
    code = f"import atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {VILU}"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert "--install-completion" in done.stdout
    assert not {"torch", "numpy", "pydantic", "pyarrow", "rich.progress"} & set(done.stderr.split())


SWALLOWED = """
import os, signal, sys, time
import vilu.cli

# what is begun in the background may ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)

class Library:
    def __del__(self):
        os.kill(os.getpid(), int(sys.argv[1]))
        time.sleep(1)

def work(standalone_mode):
    Library()
    time.sleep(60)

vilu.cli.app = work
vilu.cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_could_not_pass_on_comes_again(number: signal.Signals) -> None:
    """If a library's callback swallows a signal, the signal must come again.

    In pydantic's callbacks, for example, Python would only report the signal and go on. The command
    would go on, too.
    """
    words = [sys.executable, "-c", SWALLOWED, str(int(number))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stderr) == (128 + number, "")
