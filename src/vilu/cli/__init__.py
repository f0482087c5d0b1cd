"""The command line: each command calls one public function; stdout is the result, stderr the log and the progress.

Exit codes: 0 done, 2 usage, 3 data, 4 the risk target is out of reach, 5 a model is missing, 6 artefacts do not fit
together, 7 storage, 8 a guarantee is void (`vilu monitor`), 75 busy, 130 Ctrl-C, 143 SIGTERM; anything else is a bug
and shows its traceback.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType

from vilu.cli.app import app
from vilu.cli.console import complain, show_warnings
from vilu.errors import ViLUError


def main() -> None:
    """Entry point of the ``vilu`` command."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with show_warnings():
            app()
    except ViLUError as error:
        complain("error", str(error))
        sys.exit(error.exit_code)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    """Unwind as Ctrl-C does, so that locks and temporary files go."""
    sys.exit(143)
