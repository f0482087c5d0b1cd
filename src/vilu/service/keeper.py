"""What all who judge share: the journal of every predictor, and which one answers."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from vilu.artifacts.disk import make_folder
from vilu.artifacts.documents import Document, read_document
from vilu.calibration.calibration import Calibration
from vilu.calibration.monitor.status import Status
from vilu.errors import DataError, UsageError
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.service.journal import Journal
from vilu.service.kept import NAMES, Kept, PromiseState, Scores

SERVING: Final = "serving.json"


class ServingState(Document):
    """``serving.json``: which of the predictors answers."""

    again = "Serve with a new --state"
    fault = DataError

    kind: str = "serving"
    answers: str


class Bookkeeper:
    """The journals of the predictors in some folders, by name; without a promise there is none.

    Raises:
        UsageError: If a predictor is there twice, or the one that is to answer is not there.
        DataError: If a rule does not verify, or what is kept is damaged.
    """

    def __init__(self, state: Path, predictors: Mapping[str, Path]) -> None:
        self.state, self._lock = make_folder(state), threading.Lock()
        self.fingerprints = {
            name: fit_fingerprint(folder)[:16] for name, folder in predictors.items()
        }
        if len(set(self.fingerprints.values())) < len(predictors):
            folders = " and ".join(map(str, predictors.values()))
            raise UsageError(
                f"{folders} are one predictor, which answers already. Give another one to --second."
            )
        self._answering = self._remembered()
        self._journals = dict[str, Journal]()
        for name, folder in predictors.items():
            calibration = Calibration.find(folder)
            if calibration is not None and calibration.guarantee is not None:
                risk = calibration.fingerprint
                self._journals[name] = Journal(
                    state / f"{self.fingerprints[name]}-{risk[:16]}", folder
                )

    def _remembered(self) -> str:
        path = self.state / SERVING
        if not path.is_file():
            return NAMES[0]
        wanted = read_document(path, ServingState).answers
        for name, fingerprint in self.fingerprints.items():
            if fingerprint == wanted:
                return name
        raise UsageError(
            f"{path} says that the predictor {wanted} answers, and this service has "
            f"{', '.join(self.fingerprints.values())}. Start with that predictor too, or remove {path} to have the "
            "first one answer."
        )

    def record(self, ids: Sequence[str], said: Mapping[str, Scores]) -> Kept:
        """Write what the predictors said of some rows, before anybody is told; the state after it."""
        for name, journal in self._journals.items():
            journal.record(ids, *said[name])
        return self.kept()

    def kept(self) -> Kept:
        """The state."""
        promises: dict[str, PromiseState] = dict.fromkeys(self.fingerprints, "none")
        return Kept(
            self._answering,
            promises | {name: journal.promise for name, journal in self._journals.items()},
            any(journal.lost for journal in self._journals.values()),
        )

    def label(self, labels: Mapping[str, str]) -> dict[str, tuple[int, list[str]]]:
        """Of every predictor how many labels are new, and of which rows it knows nothing; DataError as ``Journal``."""
        return {name: journal.label(labels) for name, journal in self._journals.items()}

    def statuses(self) -> dict[str, Status]:
        """What the monitors say."""
        return {name: journal.status for name, journal in self._journals.items()}

    def switch(self, name: str) -> Kept:
        """From now on the predictor of this name answers. UsageError if there is none."""
        if name not in self.fingerprints:
            raise UsageError(
                f"there is no predictor {name!r:.40}; there is {' and '.join(self.fingerprints)}."
            )
        with self._lock:
            ServingState(answers=self.fingerprints[name]).write(self.state / SERVING)
            self._answering = name
        return self.kept()

    def close(self) -> None:
        """Save the monitors."""
        for journal in self._journals.values():
            journal.close()
