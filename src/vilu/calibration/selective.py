"""A predictor and the calibration that decides about its answers, as one object."""

from __future__ import annotations

import copy
import shutil
import weakref
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

from vilu.artifacts.disk import or_refuse, write_bytes
from vilu.calibration.calibration import Calibration
from vilu.calibration.procedure import calibrate_predictor
from vilu.calibration.target import Target
from vilu.embeddings.columns import AnswerKind
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import NotFittedError, UsageError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.persistence.files import LOOKS, RISK, ROWS, VOCABULARY
from vilu.predictors.persistence.storage import load, write_card
from vilu.scoring.score import score
from vilu.validation import checked

OF_CALIBRATION = (ROWS, LOOKS, VOCABULARY, RISK)
"""Files of a calibration beside those of its predictor; the last one makes it valid."""


class Selective:
    """A predictor with the calibration that accepts its answers or leaves them for review.

    ``vilu fit`` and ``vilu calibrate`` leave the same in a folder. ``save`` writes such a folder,
    and ``load`` reads one, whichever way it was made.

    Args:
        predictor: The method with its parameters, of which a copy is taken. The copy keeps its fit,
            unless ``answer`` is another one.
        answer: Which answer is judged ("zero_shot", "adapted" or "given"); None: that of the
            predictor.

    Attributes:
        predictor: The predictor; after ``calibrate`` with the calibrated probability of failure.
        calibration: The calibration; None before ``calibrate``.

    Raises:
        UsageError: If the answer is "adapted" and the method has no posterior of its own.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> target = rng.integers(4, size=600)
        >>> image = np.eye(4, 8)[target] + 0.3 * rng.normal(size=(600, 8))
        >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
        >>> data = vilu.Embeddings(image, np.eye(4, 8), target)
        >>> parts = data.split(fit=0.4, calibration=0.4, test=0.2)
        >>> model = vilu.Selective(vilu.PREDICTORS["linear_probe"](), answer="adapted")
        >>> _ = model.fit(parts.fit).calibrate(parts.calibration, max_risk=0.05)
        >>> outcomes = model.predict(parts.test)
        >>> accepted = np.array(outcomes.decision) == "accept"
        >>> bool(accepted.mean() > 0.5), bool(outcomes.failure[accepted].mean() < 0.05)
        (True, True)
    """

    @checked
    def __init__(self, predictor: FailurePredictor, *, answer: AnswerKind | None = None) -> None:
        if answer is not None and answer != predictor.answer:
            predictor = type(predictor)(**{**predictor.get_params(), "answer": answer})
        predictor.check_answer()
        self.predictor = copy.copy(predictor)  # a fit must not change the caller's object
        self.calibration: Calibration | None = None
        self._folder: Path | None = None

    def __repr__(self) -> str:
        decides = "not calibrated"
        if self.calibration is not None:
            decides = self.calibration.guarantee_text or "calibrated, without a rule"
        return f"Selective({self.predictor!r}, {decides})"

    @checked
    def fit(
        self,
        train: EmbeddingSource,
        validation: EmbeddingSource | None = None,
        *,
        unlabelled: EmbeddingSource | None = None,
    ) -> Self:
        """Fit the predictor, as ``FailurePredictor.fit``; an earlier calibration is dropped.

        Examples:
            >>> import numpy as np, vilu
            >>> angle = np.linspace(0, np.pi / 2, 100)
            >>> image = np.c_[np.cos(angle), np.sin(angle)]
            >>> train = vilu.Embeddings(image, np.eye(2), np.repeat([0, 1], [70, 30]))
            >>> vilu.Selective(vilu.PREDICTORS["linear_probe"]()).fit(train)
            Selective(LinearProbe(), not calibrated)
        """
        self.predictor.fit(train, validation, unlabelled=unlabelled)
        self.calibration = None
        self._folder = None
        return self

    @checked
    def calibrate(
        self,
        data: EmbeddingSource,
        target: Target | None = None,
        *,
        max_risk: float | None = None,
        dataset: str | None = None,
        split: str | None = None,
    ) -> Self:
        """Learn a rule and the probability of failure, as ``vilu.calibrate_predictor``.

        Args:
            data: Labelled rows that were not fitted on.
            target: What the rule must reach.
            max_risk: In place of a target: the largest share of wrong answers among the accepted
                ones, with a confidence of 95 %.
            dataset: Name of the data set.
            split: Name of its part.

        Raises:
            UsageError: If neither or both of ``target`` and ``max_risk`` are there, or the target
                is not possible.
            NotFittedError: If the predictor needs ``fit`` first.
            DataError: If more than 1 % of the rows were used in the fit.
            InfeasibleError: If the target cannot be reached; the message says what is missing.

        Examples:
            >>> import numpy as np, vilu
            >>> rows = np.random.default_rng(0).normal(size=(200, 8))
            >>> rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            >>> data = vilu.Embeddings(rows, np.eye(8), rows.argmax(axis=1))
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, vilu.Target(max_risk=0.05))
            >>> model.calibration.rule.n_accepted
            200
        """
        if (target is None) == (max_risk is None):
            raise UsageError("calibrate takes a target or max_risk, one of the two.")
        goal = Target(max_risk=max_risk) if target is None else target
        folder = self._working_folder()
        self.calibration = calibrate_predictor(folder, data, goal, dataset=dataset, split=split)
        self.predictor = load(folder)
        return self

    @checked
    def predict(
        self, data: EmbeddingSource, *, dataset: str | None = None, split: str | None = None
    ) -> Outcomes:
        """Answers, probabilities of failure and decisions about every row of ``data``.

        Raises:
            UsageError: If it is not calibrated.
            ProvenanceError: If the rows come from another embedding space, or have other candidates
                than the calibration.

        Examples:
            >>> import numpy as np, vilu
            >>> rows = np.random.default_rng(0).normal(size=(200, 8))
            >>> rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            >>> data = vilu.Embeddings(rows, np.eye(8), rows.argmax(axis=1))
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, max_risk=0.05)
            >>> model.predict(data.take([0, 1])).decision
            ('accept', 'accept')
        """
        calibration = self._require_calibrated()
        return score(self.predictor, data, dataset=dataset, split=split, calibration=calibration)

    @checked
    def save(self, folder: str | Path) -> None:
        """Write the folder that ``vilu calibrate`` leaves, for ``vilu score`` and ``vilu serve``.

        Raises:
            UsageError: If it is not calibrated, or the folder holds something else.
            StorageError: If the file system refuses.

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> rows = np.random.default_rng(0).normal(size=(200, 8))
            >>> rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            >>> data = vilu.Embeddings(rows, np.eye(8), rows.argmax(axis=1))
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, max_risk=0.05)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save(folder)
            ...     again = vilu.Selective.load(folder)
            >>> again.calibration == model.calibration
            True
        """
        self._require_calibrated()
        path = Path(folder)
        self.predictor.save(path)
        _copy_calibration(self._working_folder(), path)
        write_card(path)

    @classmethod
    @checked
    def load(cls, folder: str | Path) -> Self:
        """Read a calibrated predictor back.

        Raises:
            DataError: If the folder holds no predictor, no calibration, or a damaged one.
            ProvenanceError: If predictor and calibration do not belong together.

        Examples:
            >>> import tempfile, vilu
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = vilu.MCM().save(folder)
            ...     try:
            ...         vilu.Selective.load(folder)
            ...     except vilu.errors.DataError as error:
            ...         print(str(error).endswith("is not calibrated. Run `vilu calibrate` first."))
            True
        """
        model = cls(load(folder))
        model.calibration = Calibration.load(folder)
        _copy_calibration(Path(folder), model._working_folder())
        return model

    def _require_calibrated(self) -> Calibration:
        if self.calibration is None:
            raise UsageError(
                "this model is not calibrated, so it decides nothing: call calibrate on labelled "
                "rows. `vilu.score(model.predictor, data)` gives uncertainties without decisions."
            )
        return self.calibration

    def _working_folder(self) -> Path:
        """A folder of this object with its predictor, where calibrations and looks are kept."""
        if self.predictor.needs_fit and self.predictor.space_ is None:
            raise NotFittedError(f"this {self.predictor.name} is not fitted yet. Call fit first.")
        if self._folder is None:
            self._folder = Path(mkdtemp(prefix="vilu-selective-"))
            # the folder goes with this object
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self.predictor.save(self._folder)
        return self._folder


def _copy_calibration(source: Path, folder: Path) -> None:
    """Copy the files of a calibration; the one that makes it valid comes last."""
    for name in OF_CALIBRATION:
        if (source / name).is_file():
            with or_refuse(f"read {source / name}"):
                content = (source / name).read_bytes()
            write_bytes(folder / name, content)
