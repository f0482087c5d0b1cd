"""The journals of a service in this process, and which of its predictors answers."""

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
from vilu.service.journals import NAMES, GuaranteeState, Scores, ServiceState

SERVING: Final = "serving.json"


class AnsweringPredictor(Document):
    """``serving.json``: which of the predictors answers."""

    again = "Serve with a new --state"
    fault = DataError

    kind: str = "serving"
    answers: str  # its fingerprint


class LocalJournals:
    """The journals of predictors by name; a predictor without a guarantee has none.

    Args:
        folder: What is kept through restarts: a folder for each journal, and ``serving.json``.
        predictors: Folders of the predictors by name.

    Raises:
        UsageError: If a predictor is there twice, or the one that is to answer is not there.
        DataError: If a rule does not verify, or what is kept is damaged.
    """

    def __init__(self, folder: Path, predictors: Mapping[str, Path]) -> None:
        self.folder = make_folder(folder)
        self._lock = threading.Lock()
        self.fingerprints = _fingerprints(predictors)
        self._answering = self._last_answering()
        self._journals: dict[str, Journal] = {}
        for name, predictor in predictors.items():
            calibration = Calibration.find(predictor)
            if calibration is None or calibration.guarantee is None:
                continue
            # a guarantee belongs to its calibration: a new one begins a new journal
            journal_name = f"{self.fingerprints[name]}-{calibration.fingerprint[:16]}"
            self._journals[name] = Journal(folder / journal_name, predictor)

    def _last_answering(self) -> str:
        """The name of the predictor that answered before the last stop; at first ``NAMES[0]``."""
        path = self.folder / SERVING
        if not path.is_file():
            return NAMES[0]
        wanted = read_document(path, AnsweringPredictor).answers
        for name, fingerprint in self.fingerprints.items():
            if fingerprint == wanted:
                return name
        raise UsageError(
            f"{path} says that the predictor {wanted} answers, and this service has "
            f"{', '.join(self.fingerprints.values())}. Start with that predictor too, or remove "
            f"{path} to have the first one answer."
        )

    def record(self, ids: Sequence[str], scores: Mapping[str, Scores]) -> ServiceState:
        """Write what the predictors answered for some rows; the state after it.

        The disk has the rows when this returns, so nobody gets an answer before.
        """
        for name, journal in self._journals.items():
            answers, uncertainty = scores[name]
            journal.record(ids, answers, uncertainty)
        return self.state()

    def state(self) -> ServiceState:
        """The state now."""
        guarantees: dict[str, GuaranteeState] = dict.fromkeys(self.fingerprints, "none")
        has_lost_journal = False
        for name, journal in self._journals.items():
            guarantees[name] = journal.guarantee
            has_lost_journal |= journal.is_lost
        return ServiceState(self._answering, guarantees, has_lost_journal)

    def label(self, labels: Mapping[str, str]) -> dict[str, tuple[int, list[str]]]:
        """Per predictor how many labels are new, and the ids that it knows no row of.

        Raises:
            DataError: As ``Journal.label``.
        """
        return {name: journal.label(labels) for name, journal in self._journals.items()}

    def statuses(self) -> dict[str, Status]:
        """What the monitors say."""
        return {name: journal.status for name, journal in self._journals.items()}

    def switch(self, name: str) -> ServiceState:
        """From now on the predictor of this name answers.

        Raises:
            UsageError: If there is none.
        """
        if name not in self.fingerprints:
            raise UsageError(
                f"there is no predictor {name!r:.40}; there is {' and '.join(self.fingerprints)}."
            )
        with self._lock:  # so that the file names who answers, whoever switches at the same time
            choice = AnsweringPredictor(answers=self.fingerprints[name])
            choice.write(self.folder / SERVING)
            self._answering = name
        return self.state()

    def close(self) -> None:
        """Save the monitors."""
        for journal in self._journals.values():
            journal.close()


def _fingerprints(predictors: Mapping[str, Path]) -> dict[str, str]:
    """The fingerprints by name; UsageError where two are one predictor."""
    fingerprints = {name: fit_fingerprint(folder)[:16] for name, folder in predictors.items()}
    if len(set(fingerprints.values())) < len(predictors):
        folders = " and ".join(map(str, predictors.values()))
        raise UsageError(
            f"{folders} are one predictor, which answers already. Give another one to --second."
        )
    return fingerprints
