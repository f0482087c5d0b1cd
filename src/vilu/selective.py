"""A predictor with a calibration, as one object that decides about answers."""

from __future__ import annotations

import copy
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Self, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vilu.artifacts.disk import convert_os_errors, write_bytes
from vilu.artifacts.paths import claim_file
from vilu.calibration.answer_choice import AnswerChoice, choose_answer
from vilu.calibration.calibration import Calibration
from vilu.calibration.methods import ClusterRisk, Method, SetMethod
from vilu.calibration.procedure import calibrate_predictor, require_probability
from vilu.calibration.target import Target
from vilu.embeddings.columns import AnswerKind
from vilu.embeddings.new_images import NewImages
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import NotFittedError, StorageError, UsageError, ViLUError
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor, RowsLike
from vilu.predictors.persistence.files import LIKELY, LOOKS, RISK, ROWS, VOCABULARY
from vilu.predictors.persistence.storage import load_predictor, write_card
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.scoring.score import DecidingModel, score
from vilu.store.reader import EmbeddingStore
from vilu.triage.answers import write_next
from vilu.triage.ask import calibrate_by_labels, choose_rows_to_label
from vilu.validation import checked

RISK_OF_CHOICE = 0.05
"""Zero-shot and adapted answers are compared at this risk if the target has no ``max_risk``."""

CALIBRATION_FILES = (ROWS, LOOKS, LIKELY, VOCABULARY, RISK)
"""A calibration's files, in the order of copying.

A folder with the file RISK counts as calibrated. RISK is the last file, so an incomplete copy does
not count.
"""


class Selective(DecidingModel):
    """A calibrated predictor: accepts answers or leaves answers for review.

    ``save`` writes the object into a folder, as ``vilu fit`` and ``vilu calibrate`` do, and
    ``vilu.load`` reads such a folder. ``vilu.score``, ``vilu.score_parts``, ``vilu.Guard``,
    ``vilu.Monitor.of_folder``, ``vilu serve``, the export as ONNX and the push to a hub take this
    object in place of the folder.

    Args:
        predictor: The method with all parameters. The object takes a copy. The copy keeps the fit
            unless ``answer`` differs from the predictor's answer.
        answer: Which answers to judge ("zero_shot", "adapted" or "given"). None: the predictor's
            answer. If that is the zero-shot answer and the method learns a posterior from labels,
            ``calibrate`` chooses between zero-shot and adapted answers (``choose_answer``).

    Attributes:
        predictor: The predictor. After ``calibrate``, with the calibrated failure probability.
        calibration: The calibration. None before ``calibrate``.
        choice: Which answers were chosen to judge, and the reason. None if there was no choice.
        vocabulary: The calibration rows' classes. None before ``calibrate``, and for captions.

    Raises:
        UsageError: If the answer is "adapted" and the method computes no posterior.

    Examples:
        >>> import numpy as np, vilu
        >>> rng = np.random.default_rng(0)
        >>> text = np.eye(4, 8)
        >>> target = rng.integers(4, size=600)
        >>> image = text[target] + 0.3 * rng.normal(size=(600, 8))
        >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
        >>> data = vilu.Embeddings(image, text, target=target)
        >>> parts = data.split(fit=0.4, calibration=0.4, test=0.2)
        >>> model = vilu.Selective(vilu.PREDICTORS["linear_probe"](), answer="adapted")
        >>> _ = model.fit(parts.fit).calibrate(parts.calibration, max_risk=0.05)
        >>> outcomes = model.predict(parts.test)
        >>> accepted = np.array(outcomes.decision) == "accept"
        >>> bool(accepted.mean() > 0.5)
        True
        >>> bool(outcomes.failure[accepted].mean() < 0.05)
        True
    """

    @checked
    def __init__(self, predictor: FailurePredictor, *, answer: AnswerKind | None = None) -> None:
        if answer is not None and answer != predictor.answer:
            parameters = {**predictor.get_params(), "answer": answer}
            predictor = type(predictor)(**parameters)
        predictor.check_answer()
        self.predictor = copy.copy(predictor)  # a fit must not change the caller's object
        self.calibration: Calibration | None = None
        self.choice: AnswerChoice | None = None
        self._chooses_answer = answer is None and predictor.answer == "zero_shot"
        # The labelled and the unlabelled rows of the fit. They are kept until the answers to judge
        # are chosen.
        self._fit_data: tuple[EmbeddingSource, EmbeddingSource | None] | None = None
        self.vocabulary: Vocabulary | None = None
        self._folder: Path | None = None
        # In a copy: the original's calibration files, written when this object gets a folder.
        self._files_of_original: Mapping[str, bytes] = {}

    @property
    def decides_by(self) -> Calibration | None:
        """The calibration. None before ``calibrate``."""
        return self.calibration

    def __repr__(self) -> str:
        state = "not calibrated"
        if self.calibration is not None:
            state = self.calibration.guarantee_text or "calibrated, without a rule"
        return f"Selective({self.predictor!r}, {state})"

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes and the calibration files, for a copy or a pickle.

        The folder is left out. It belongs to this object, and is removed together with it.
        """
        files = self._calibration_files()
        return {**self.__dict__, "_folder": None, "_files_of_original": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_files_of_original": {}, **state})
        self.predictor = copy.copy(self.predictor)  # a fit must not change the original's object

    @checked
    def fit(
        self,
        train: EmbeddingSource,
        validation: EmbeddingSource | None = None,
        *,
        unlabelled: EmbeddingSource | None = None,
    ) -> Self:
        """Fit the predictor, as ``FailurePredictor.fit`` does, and drop an earlier calibration.

        Examples:
            >>> import numpy as np, vilu
            >>> angle = np.linspace(0, np.pi / 2, 100)
            >>> image, text = np.c_[np.cos(angle), np.sin(angle)], np.eye(2)
            >>> target = np.repeat([0, 1], [70, 30])
            >>> train = vilu.Embeddings(image, text, target=target)
            >>> vilu.Selective(vilu.PREDICTORS["linear_probe"]()).fit(train)
            Selective(LinearProbe(), not calibrated)
        """
        self.predictor.fit(train, validation, unlabelled=unlabelled)
        self.calibration = None
        self.choice = None
        self._fit_data = (train, unlabelled) if self._chooses_answer else None
        self.vocabulary = None
        self._leave_folder()
        return self

    @checked
    def calibrate(  # noqa: PLR0913 - one argument per field of a target
        self,
        data: EmbeddingSource,
        target: Target | None = None,
        *,
        max_risk: float | None = None,
        min_coverage: float | None = None,
        confidence: float = Target.confidence,
        method: Method = Target.method,
        per_class: bool = Target.per_class,
        label_sets: SetMethod | None = None,
        max_miss: float = Target.max_miss,
        outside_share: float | None = None,
        class_shares: Mapping[str, float] | None = None,
        cluster_risk: ClusterRisk | None = None,
        largest_cluster: int | None = None,
        labels: Sequence[str | Path] = (),
        seed: int = 0,
        dataset: str | None = None,
        split: str | None = None,
    ) -> Self:
        """Learn a rule, label sets and the failure probability, as ``vilu calibrate`` does.

        In place of ``target``, a target's fields may be given: the arguments from ``max_risk`` to
        ``largest_cluster``.

        Args:
            data: Labelled rows not used in the fit. For "anytime", the store given to
                ``next_labels``.
            target: The guarantee to reach.
            max_risk: Largest share of wrong answers among the accepted answers.
            min_coverage: Smallest share of answers to accept.
            confidence: The guarantee's confidence.
            method: "ltt", "crc" or "selection" if all labels are there, or "anytime" for labels
                chosen by ``next_labels``. With "anytime", ``calibrate`` may be called again after
                every label.
            per_class: Whether every predicted class has a separate threshold.
            label_sets: "lac" or "aps". None: no label sets.
            max_miss: Largest share of label sets without the right label.
            outside_share: Expected share of pictures outside all classes.
            class_shares: Expected share of each class among the pictures within the classes.
            cluster_risk: For rows with clusters: "majority" or "ratio". None: every row counts.
            largest_cluster: For "ratio": rows of larger clusters are left for review.
            labels: For "anytime": all files of ``next_labels``, filled in.
            seed: For "anytime": the seed of ``next_labels``.
            dataset: The data set's name. Not for "anytime", because the store has a name.
            split: The split's name in the data set. Not for "anytime".

        Raises:
            UsageError: If ``target`` and all fields are missing, if both ``target`` and fields are
                given, or if the target is not possible.
            NotFittedError: If the predictor needs ``fit`` first.
            DataError: If more than 1 % of the rows were used in the fit.
            InfeasibleError: If the target cannot be reached. The message says what is missing.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> text = np.eye(8)
            >>> target = image.argmax(axis=1)  # the nearest class, so all answers are right
            >>> data = vilu.Embeddings(image, text, target=target)
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, vilu.Target(max_risk=0.05))
            >>> model.calibration.rule.n_accepted
            200
        """
        target_of_fields = Target(
            max_risk=max_risk,
            min_coverage=min_coverage,
            confidence=confidence,
            method=method,
            per_class=per_class,
            label_sets=label_sets,
            max_miss=max_miss,
            outside_share=outside_share,
            class_shares=class_shares,
            cluster_risk=cluster_risk,
            largest_cluster=largest_cluster,
        )
        has_fields = target_of_fields != Target()
        has_target = target is not None
        has_exactly_one = has_target != has_fields
        if not has_exactly_one:
            raise UsageError(
                "calibrate takes a target, or max_risk and other fields of a target. Give one of "
                "the two."
            )
        chosen_target = target_of_fields if target is None else target
        self._choose_answer(chosen_target.max_risk or RISK_OF_CHOICE)
        has_labels = len(labels) > 0 or seed != 0
        has_name = dataset is not None or split is not None
        _refuse_unused_arguments(chosen_target.method, has_labels=has_labels, has_name=has_name)
        if chosen_target.method == "anytime":
            self._calibrate_by_labels(data, chosen_target, labels, seed)
        else:
            calibrate_predictor(self.folder, data, chosen_target, dataset=dataset, split=split)
        self._read_folder(self.folder)
        return self

    def _calibrate_by_labels(
        self, data: EmbeddingSource, target: Target, labels: Sequence[str | Path], seed: int
    ) -> None:
        """Calibrate the predictor in the folder, with labels for rows from ``next_labels``."""
        if not isinstance(data, EmbeddingStore):
            raise UsageError(
                "anytime takes the store that next_labels has chosen rows of. `vilu embed` and "
                "vilu.import_arrays make one."
            )
        max_risk = target.risk_of_anytime()
        # a rule for the same target stays certified, even after new labels
        is_other_target = self.calibration is not None and self.calibration.target != target
        try:
            calibrate_by_labels(
                self.folder,
                data,
                [Path(file) for file in labels],
                max_risk=max_risk,
                confidence=target.confidence,
                seed=seed,
                per_class=target.per_class,
                overwrite=is_other_target,
            )
        except ViLUError:
            was_removed = Calibration.find(self.folder) is None
            if was_removed:  # because a calibration label has changed
                self.predictor = load_predictor(self.folder)
                self.calibration = None
                self.vocabulary = None
            raise

    @checked
    def next_labels(
        self,
        store: EmbeddingStore,
        output: str | Path,
        *,
        n: int = 50,
        max_risk: float = RISK_OF_CHOICE,
        labels: Sequence[str | Path] = (),
        seed: int = 0,
        per_class: bool = False,
        overwrite: bool = False,
    ) -> Path:
        """Choose which rows in a store to label next, and write a CSV to fill in, as ``vilu next``.

        Half of the chosen rows are for a fit. The remaining chosen rows are for a guarantee, by
        ``calibrate`` with the method "anytime". These rows are drawn from the answers that could be
        accepted. The first call fixes which answers are judged.

        Args:
            store: The rows. Labels in the store are used, too.
            output: The file, .csv. The column ``label`` is empty.
            n: Number of rows.
            max_risk: Largest error rate allowed by the guarantee.
            labels: Files from earlier calls, filled in.
            seed: Seed for the split into rows to fit on and rows for the guarantee.
            per_class: Whether every predicted class gets a separate guarantee.
            overwrite: Whether an earlier file may be replaced.

        Returns:
            The file's path.

        Raises:
            UsageError: If the output is among ``labels`` or exists already, or if the predictor
                gives no probability.

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     np.savez(
            ...         f"{folder}/a.npz", image=image, text=np.eye(8), class_names=[*"abcdefgh"]
            ...     )
            ...     store = vilu.import_arrays(
            ...         f"{folder}/a.npz", f"{folder}/store", logit_scale=10.0, logit_bias=0.0
            ...     )
            ...     path = vilu.Selective(vilu.MCM()).next_labels(store, f"{folder}/next.csv", n=10)
            ...     print(len(path.read_text().splitlines()))
            11
        """
        path = Path(output)
        files = [Path(file) for file in labels]
        if path.resolve() in {file.resolve() for file in files}:
            raise UsageError(
                f"{path} is one of the labels, which would be lost. Give another file."
            )
        claim_file(path, "labels", overwrite=overwrite)
        self._choose_answer(max_risk)
        predictor = load_predictor(self.folder)
        require_probability(predictor)
        rows_to_label, answers = choose_rows_to_label(
            store, predictor, files, n=n, max_risk=max_risk, seed=seed, per_class=per_class
        )
        write_next(path, rows_to_label, answers, predictor.answer)
        return path

    def _read_folder(self, folder: Path) -> None:
        """Take predictor, calibration and classes from a folder."""
        self.predictor = load_predictor(folder)
        self.calibration = Calibration.load(folder)
        self.vocabulary = None
        if (folder / VOCABULARY).is_file():
            self.vocabulary = Vocabulary.load(folder)

    @checked
    def predict(
        self,
        data: EmbeddingSource | RowsLike,
        *,
        dataset: str | None = None,
        split: str | None = None,
    ) -> Outcomes:
        """Return answers, failure probabilities and decisions about every row in ``data``.

        Args:
            data: Embeddings, or only image embeddings (N, D), with the calibration's classes as
                candidates. A tensor is scored on the tensor's device. Only results are copied to
                the CPU: a few numbers per row, and for label sets (N, K) probabilities. Embeddings
                are not copied, so rows on a GPU are not recognised as rows used in the fit or as
                equal pictures.
            dataset: The data set's name.
            split: The split's name in the data set.

        Raises:
            UsageError: If the model is not calibrated, or if ``data`` are bare image embeddings and
                the model has no classes.
            DataError: If there is no row, or if a shape is wrong.
            ProvenanceError: If the rows' embedding space or candidates differ from the
                calibration's.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> text = np.eye(8)
            >>> target = image.argmax(axis=1)  # the nearest class, so all answers are right
            >>> data = vilu.Embeddings(image, text, target=target)
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, max_risk=0.05)
            >>> model.predict(data.take([0, 1])).decision
            ('accept', 'accept')
            >>> model.predict(image[:2]).decision  # bare embeddings
            ('accept', 'accept')
        """
        self._require_calibrated()
        source = self._source_of(data)
        return score(self, source, dataset=dataset, split=split)

    @overload
    def predict_uncertainty(self, data: Tensor) -> Tensor: ...

    @overload
    def predict_uncertainty(self, data: EmbeddingSource | ArrayLike) -> NDArray[np.float64]: ...

    @checked
    def predict_uncertainty(self, data: EmbeddingSource | RowsLike) -> NDArray[np.float64] | Tensor:
        """Return every row's uncertainty (N,), as ``FailurePredictor.predict_uncertainty``.

        For bare image embeddings (N, D), the candidates are the calibration's classes. For a
        tensor, the result is a tensor on the tensor's device.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> text = np.eye(8)
            >>> target = image.argmax(axis=1)  # the nearest class, so all answers are right
            >>> data = vilu.Embeddings(image, text, target=target)
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, max_risk=0.05)
            >>> bool(model.predict_uncertainty(image[:1])[0] <= model.calibration.rule.threshold)
            True
        """
        source = self._source_of(data)
        if not isinstance(source, NewImages):
            return self.predictor.predict_uncertainty(source)
        uncertainty = self.predictor.uncertainty_of(source)
        return uncertainty if isinstance(data, Tensor) else uncertainty.numpy()

    @checked
    def predict_failure_probability(self, data: EmbeddingSource | RowsLike) -> NDArray[np.float64]:
        """Return every row's failure probability (N,) as an array, calibrated by ``calibrate``.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> text = np.eye(8)
            >>> target = image.argmax(axis=1)  # the nearest class, so all answers are right
            >>> data = vilu.Embeddings(image, text, target=target)
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, max_risk=0.05)
            >>> bool(model.predict_failure_probability(image[:1])[0] < 0.5)
            True
        """
        source = self._source_of(data)
        return self.predictor.predict_failure_probability(source)

    def _source_of(self, data: EmbeddingSource | RowsLike) -> EmbeddingSource:
        """Return the data as a source. Bare image embeddings get the calibration's classes."""
        if isinstance(data, EmbeddingSource):
            return data
        if self.predictor.takes == "answers":
            raise UsageError("this model judges tables of answers. Give vilu.open_table(data).")
        if self.vocabulary is None:
            raise UsageError(
                "this model keeps no classes for bare image embeddings: it was calibrated on "
                "captions, or not at all. Give vilu.Embeddings(image, text)."
            )
        return self.vocabulary.new_images(data)

    @checked
    def save(self, folder: str | Path) -> str:
        """Write a folder as ``vilu calibrate`` does, and return the predictor's fingerprint.

        Raises:
            UsageError: If the model is not calibrated, or if the folder holds something else.
            StorageError: If a file cannot be written, or if the temporary folder was removed.

        Examples:
            >>> import numpy as np, tempfile, vilu
            >>> image = np.random.default_rng(0).normal(size=(200, 8))
            >>> image /= np.linalg.norm(image, axis=1, keepdims=True)
            >>> text = np.eye(8)
            >>> target = image.argmax(axis=1)  # the nearest class, so all answers are right
            >>> data = vilu.Embeddings(image, text, target=target)
            >>> model = vilu.Selective(vilu.MCM()).calibrate(data, max_risk=0.05)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     fingerprint = model.save(folder)
            ...     again = vilu.load(folder)
            >>> again.calibration == model.calibration
            True
        """
        self._require_calibrated()
        files = self._calibration_files()
        path = Path(folder)
        fingerprint = self.predictor.save(path)
        _write_calibration(files, path)
        return fingerprint

    @classmethod
    @checked
    def load(cls, folder: str | Path) -> Self:
        """Read a calibrated predictor back.

        Raises:
            DataError: If the folder holds no predictor or no calibration, or damaged files.
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
        predictor = load_predictor(folder)
        model = cls(predictor)
        Calibration.load(folder)  # an error about a damaged calibration names this folder
        files = _read_calibration(Path(folder))
        _write_calibration(files, model.folder)
        model._read_folder(model.folder)
        return model

    def _choose_answer(self, max_risk: float) -> None:
        """Choose which answers to judge, once after every fit."""
        if self._fit_data is None:
            return
        train, unlabelled = self._fit_data
        self.choice = choose_answer(self.predictor, train, max_risk, unlabelled=unlabelled)
        self.predictor = self.predictor.judging(self.choice.answer)
        self._leave_folder()  # the folder holds the predictor before the choice
        self._fit_data = None  # a second calibration keeps the choice

    def _require_calibrated(self) -> Calibration:
        if self.calibration is None:
            raise UsageError(
                "this model is not calibrated, so it decides nothing: call calibrate on labelled "
                "rows. `vilu.score(model.predictor, data)` gives uncertainties without decisions."
            )
        return self.calibration

    def _calibration_files(self) -> Mapping[str, bytes]:
        """Return the content of the calibration's files in the folder, by name."""
        if self._folder is None:
            return self._files_of_original
        files = _read_calibration(self._folder)
        if self.calibration is not None and RISK not in files:
            raise StorageError(
                f"{self._folder} holds no calibration any more, so this model can be neither saved "
                "nor copied. Load it again, or fit and calibrate it again."
            )
        return files

    def _leave_folder(self) -> None:
        """Begin a new folder at the next use, without a calibration."""
        self._folder = None
        self._files_of_original = {}

    @property
    def folder(self) -> Path:
        """Temporary folder with the predictor, the calibration, and all targets so far."""
        if self.predictor.needs_fit and self.predictor.space_ is None:
            raise NotFittedError(f"this {self.predictor.name} is not fitted yet. Call fit first.")
        if self._folder is None:
            self._folder = Path(mkdtemp(prefix="vilu-selective-"))
            # The folder is removed together with this object.
            weakref.finalize(self, _remove_folder, self._folder, os.getpid())
            self.predictor.save(self._folder)
            if self._files_of_original:
                _write_calibration(self._files_of_original, self._folder)
        return self._folder


def _refuse_unused_arguments(method: Method, *, has_labels: bool, has_name: bool) -> None:
    """Raise UsageError for arguments of ``Selective.calibrate`` not used by the method.

    ``has_labels`` says whether ``labels`` or ``seed`` is given. ``has_name`` says whether
    ``dataset`` or ``split`` is given.
    """
    if method == "anytime" and has_name:
        raise UsageError(
            "anytime takes the name of the data from the store. Leave dataset and split out."
        )
    if method != "anytime" and has_labels:
        raise UsageError(
            f"labels in files and their seed are for the method anytime. {method} takes the labels "
            "of the data. Leave labels and seed out."
        )


def _remove_folder(folder: Path, owner: int) -> None:
    """Remove a temporary folder, unless this process is a fork of the process ``owner``."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)


def _read_calibration(folder: Path) -> dict[str, bytes]:
    """Return the content of a calibration's files, by name, in the order of CALIBRATION_FILES."""
    files: dict[str, bytes] = {}
    for name in CALIBRATION_FILES:
        if (folder / name).is_file():
            with convert_os_errors(f"cannot read {folder / name}"):
                files[name] = (folder / name).read_bytes()
    return files


def _write_calibration(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a calibration's files into a predictor's folder, and the predictor's card."""
    for name, content in files.items():
        write_bytes(folder / name, content)
    write_card(folder)


@checked
def load(folder: str | Path) -> FailurePredictor | Selective:
    """Load a ``Selective`` where the folder is calibrated, else a predictor.

    The loaded object and the saved object give bit for bit the same scores.
    ``vilu.Selective.load`` raises an error if there is no calibration.

    Raises:
        DataError: If the folder holds no predictor, or a damaged predictor or calibration.
        ProvenanceError: If the files' schema is from a different vilu version, or the files do not
            belong together.

    Examples:
        >>> import tempfile, numpy as np, vilu
        >>> text = np.eye(2)
        >>> image = text[[0] * 40]  # all answers are class 0
        >>> data = vilu.Embeddings(image, text, target=[0, 0, 0, 1] * 10)  # a quarter is wrong
        >>> folder = tempfile.mkdtemp()
        >>> fingerprint = vilu.PREDICTORS["mcm_ts"]().fit(data).save(folder)
        >>> vilu.load(folder).predict_uncertainty(data)[:2].round(2)
        array([0.25, 0.25])
    """
    if (Path(folder) / RISK).is_file():
        return Selective.load(folder)
    return load_predictor(folder)
