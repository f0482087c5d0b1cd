"""The contract of every failure predictor."""

from __future__ import annotations

import copy
import dataclasses
import logging
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeVar, overload

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from vilu.device import each_with_torch_defaults, resolve_device, torch_defaults
from vilu.embeddings.columns import (
    ANSWER,
    COLUMN_COMMANDS,
    SECOND_MODEL_COLUMNS,
    AnswerKind,
    DataKind,
)
from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import float64, n_rows_in_cache
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError, NotFittedError, UsageError
from vilu.predictors.contract import parameters
from vilu.validation import checked

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from vilu.embeddings.new_images import NewImages
    from vilu.predictors.contract.coalitions import Coalitions
    from vilu.predictors.contract.held_out import HeldOutAnswers
    from vilu.predictors.contract.labelled import Needs
    from vilu.predictors.contract.probability import Calibrator
    from vilu.predictors.contract.seen import Overlap, Sketches
    from vilu.predictors.persistence.fit_sample import FitSample

# Modules needed only for a fit, a file or an explanation are imported inside functions. A program
# that only computes scores from logits then imports a third of the modules.

CONSTANT = "constant"
"""Name of a constant fit's only tensor: the score for all rows, if nothing can be learned."""
CLASSES = "classes"
"""Name of the saved tensor with the embedded class texts."""

MIN_CANDIDATES = 2
"""Minimum candidate count. With a single candidate only one answer is possible, and u is NaN."""

logger = logging.getLogger(__name__)
RowsLike = ArrayLike | Tensor
"""Rows of a matrix, as a tensor or as anything that numpy converts to an array."""

Settings = TypeVar("Settings", bound="DataclassInstance")


class NotExportable(UsageError):  # noqa: N818 - an expected outcome, not an error
    """The method has no graph from image and text to a score. The message gives the reason."""


class Learnt(NamedTuple):
    """The result of a fit.

    Attributes:
        tensors: The tensors to save, on the CPU.
        notes: Notes for people to read, as plain JSON.
        held_out: Uncertainties and failures for held-out rows. None if the fit computes none.
    """

    tensors: dict[str, Tensor]
    notes: Mapping[str, Any] = MappingProxyType({})
    held_out: HeldOutAnswers | None = None


@dataclasses.dataclass
class FailurePredictor(ABC):
    """Base class for methods that estimate from embeddings how likely an answer is wrong.

    Higher uncertainty means that the answer is more likely wrong. The parameter ``answer`` chooses
    the judged answer:

    - "zero_shot", the default: the candidate with the largest logit.
    - "adapted": argmax_j q_j, where q is the method's posterior (``log_posterior``). This is only
      possible for methods with ``has_posterior``.
    - "given": the answer in the data column "answer".

    A subclass is a dataclass with the hyper-parameters as fields. ``get_params``, ``set_params``
    and ``repr`` are as in scikit-learn, and ``sklearn.base.clone`` works. Attributes set by ``fit``
    have names that end in an underscore. A method has to define ``name``, ``summary``,
    ``reference`` and ``_score``. A method that learns also defines ``_learn``, and ``tensors`` or
    ``module``. All remaining attributes have defaults. Exports, explanations and given logits need
    ``graph``, ``coalitions`` and ``looks_at`` in the class itself. Inherited definitions do not
    count, since they may be wrong for the subclass.

    A parameter name has the same meaning in all methods:

    - ``seed`` decides everything random in ``fit``.
    - ``device`` is "auto", "cpu", "cuda", "cuda:N" or "mps". The device is not saved.
    - ``allow_degenerate`` is for methods that learn from failures. It says what happens if all
      training rows or no training rows are failures: True makes the fit a constant, and False
      refuses the rows.
    - ``max_bank`` is the maximum number of training images to keep. A larger set is sampled with
      ``seed``.

    Attributes:
        name: Key in ``vilu.PREDICTORS``.
        summary: One line for ``vilu list predictors``.
        reference: Where the method comes from, in a few words.
        cost: What fitting and scoring cost, in a few words.
        columns: Columns required in the data, in addition to the embeddings
            (``vilu.embeddings.columns``).
        optional_columns: Columns used by the method where the data have these columns.
        no_captions: Why the method cannot work on image-caption pairs. None if captions work.
        closed_set: Whether the method scores only the classes in its fit.
        is_probability: Whether the uncertainty estimates P(failure).
        has_posterior: Whether the method defines ``log_posterior``, a posterior over the
            candidates.
        learns_failure: Whether the method learns to tell failures from successes. Such a method
            needs both among the training rows.
        looks_at: The inputs to the score: "logits", "image", or both. Empty if the score also uses
            the candidates' embeddings. A method works on given logits
            (``vilu.Embeddings.from_logits``) only if ``looks_at`` is not empty.
        depends_on_answer: Whether the score depends on the judged answer.
        tensors: Names of the saved tensors, without the weights in ``module``.
        needs_fit: Whether the method defines ``_learn``, and must be fitted before scoring.
        needs_labels: Whether a fit needs labelled rows. Otherwise a fit uses all usable rows.
        uses_unlabelled: Whether a fit can also learn from rows without labels
            (``Rows.unlabelled``).
        takes: Kind of data: "embeddings", or "answers" from a table.
        learned_: The saved tensors by name, without the network weights.
        network_: The ``module`` with fitted weights, ready to score. None without a module.
        space_: The training data's embedding space. None before a fit.
        seen_: A sketch of the rows used by ``fit``, for each identity kind. Empty if the rows
            cannot be recognised.
        similarity_: Mean and standard deviation of the training rows' largest cosines. None before
            a fit.
        notes_: Notes on the fit for people to read, as plain JSON.
        held_out_: Uncertainties and failures for held-out rows. None if the fit computed none.
        calibrator_: Function from uncertainty to P(failure), learned on calibration rows. None
            before ``calibrate_probability``.
        sample_: Image vectors from random fit rows, at most 2 MB, to detect near copies. None if no
            sample is stored.

    Examples:
        >>> import dataclasses, numpy as np, vilu
        >>> @dataclasses.dataclass
        ... class Farness(vilu.FailurePredictor):
        ...     name, summary, reference = "farness", "one minus the largest cosine", "nowhere"
        ...
        ...     def _score(self, batch):
        ...         return 1 - (batch.image @ batch.text.T).amax(dim=1)
        >>> image, text = [[1.0, 0.0], [0.6, 0.8]], np.eye(2)  # the largest cosines are 1 and 0.8
        >>> Farness().predict_uncertainty(vilu.Embeddings(image, text)).round(2)
        array([0. , 0.2])
    """

    # phrase for messages about a wrong argument: how to get a predictor
    how_to_make: ClassVar[str] = "a predictor (such as vilu.MCM(), or vilu.load(folder))"
    name: ClassVar[str]
    summary: ClassVar[str]
    reference: ClassVar[str]
    cost: ClassVar[str] = "none"
    columns: ClassVar[tuple[str, ...]] = ()
    optional_columns: ClassVar[tuple[str, ...]] = ()
    no_captions: ClassVar[str | None] = None
    closed_set: ClassVar[bool] = False
    is_probability: ClassVar[bool] = False
    learns_failure: ClassVar[bool] = False
    looks_at: ClassVar[frozenset[str]] = frozenset()
    depends_on_answer: ClassVar[bool] = True
    tensors: ClassVar[tuple[str, ...]] = ()
    needs_fit: ClassVar[bool] = False
    has_posterior: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    uses_unlabelled: ClassVar[bool] = False
    takes: ClassVar[DataKind] = "embeddings"
    # The saved tensors' names, types and shapes, in the notation of ``state.require_forms``. A
    # class with ``_forms`` needs no ``tensors``.
    _forms: ClassVar[str] = ""

    answer: AnswerKind = dataclasses.field(default="zero_shot", kw_only=True)

    learned_: dict[str, Tensor] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    network_: nn.Module | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    space_: EmbeddingSpace | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    seen_: Sketches = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)
    similarity_: tuple[float, float] | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    notes_: dict[str, Any] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    calibrator_: Calibrator | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    sample_: FitSample | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )
    held_out_: HeldOutAnswers | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.needs_fit = cls._learn is not FailurePredictor._learn
        cls.has_posterior = cls.log_posterior is not FailurePredictor.log_posterior
        forms = vars(cls).get("_forms", "").split()
        if forms:
            # a form begins with the tensor name and a colon
            cls.tensors = tuple(form.split(":")[0] for form in forms)
        # __repr__ is set here, because the dataclass decorator would otherwise add a __repr__. A
        # __repr__ defined in the class itself is kept. mypy forbids assignments to a method.
        repr_of_class = vars(cls).get("__repr__", parameters.constructor_call)
        cls.__repr__ = repr_of_class  # type: ignore[method-assign]

    get_params = parameters.get_params
    set_params = parameters.set_params
    __sklearn_tags__ = parameters.refuse_scikit_learn

    # Definitions in a method.

    @abstractmethod
    def _score(self, batch: Batch) -> Tensor:
        """Return the uncertainty (B,) of a batch, float32 or float64, on any device."""

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        """Learn from the rows ``train``, and return the result. ``take`` stores the result later.

        ``failure`` (M,) is 1, 0, or -1 (unknown) for each training row. Only methods that need no
        labels get unknown failures. ``validation`` are rows for model selection, if the caller has
        any.
        """
        # Not abstract, because methods that score without a fit do not define ``_learn``. ``fit``
        # calls ``_learn`` only if the class defines it (``needs_fit``).
        raise NotImplementedError(f"{self.name} has nothing to learn: it scores without a fit")

    def module(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        space: EmbeddingSpace,  # noqa: ARG002
    ) -> nn.Module | None:
        """Make a network to save with the predictor. A method without a network returns None.

        The initial weights must come from the method's own ``torch.Generator``, since torch's
        global generator is not seeded.

        Args:
            tensors: The tensors that the network will hold. The layer sizes may depend on the
                tensor shapes. Empty before a fit.
            space: The embedding space.

        Examples:
            >>> import vilu
            >>> space = vilu.EmbeddingSpace(embed_dim=2, logit_scale=100.0)
            >>> head = vilu.LVU(hidden=(4,)).module({}, space)
            >>> # the two layers have 2 x 4 + 4 and 4 + 1 weights
            >>> sum(weight.numel() for weight in head.parameters())
            17
        """
        return None

    def tensor_names(self) -> tuple[str, ...]:
        """Return the saved tensors' names: ``tensors``, unless names depend on the parameters.

        Examples:
            >>> import vilu
            >>> vilu.PREDICTORS["sirc"](typicality="residual").tensor_names()
            ('shift', 'slope', 'complement')
        """
        return self.tensors

    def graph(self) -> nn.Module:
        """Make a module that computes scores (N,) float64 from a batch, for export as ONNX.

        If ``_score`` can be exported as it is, the method has the line ``graph = own_graph``.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], np.eye(2), logit_scale=10.0)
            >>> batch = next(data.batches(2))
            >>> # the logits are (10, 0) and (6, 8)
            >>> vilu.Margin().graph()(batch).round(decimals=2).tolist()
            [-10.0, -2.0]
        """
        raise NotExportable(f"{self.name} defines no graph of image and text")

    def coalitions(self) -> Coalitions:
        """Return the coalitions for Shapley values: input groups, and the value of every coalition.

        The default works if ``looks_at`` has one input.

        Examples:
            >>> import vilu
            >>> vilu.MCM().coalitions().players
            ('zero-shot score',)
            >>> vilu.PREDICTORS["knn_distance"]().coalitions().players
            ('image',)
        """
        from vilu.predictors.contract.coalitions import (
            PLAYER_OF_INPUT,
            NoAttribution,
            SingleCoalitions,
        )

        looks_at = vars(type(self)).get("looks_at", frozenset())  # not inherited inputs
        if len(looks_at) != 1:
            raise NoAttribution(f"no attribution is defined for {self.name}")
        (kind_of_input,) = looks_at
        return SingleCoalitions(PLAYER_OF_INPUT[kind_of_input])

    @property
    def label(self) -> str:
        """The name in results: ``name``, with the kind of fit if a method has several kinds."""
        return self.name

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules with the code that computes the scores, without the modules imported there."""
        return (type(self).__module__,)

    @property
    def needs(self) -> Needs:
        """The requirement for a training row: nothing, a known failure, or a known class."""
        if not self.needs_labels:
            return "nothing"
        if self.learns_failure:
            return "failure"
        return "class"

    # ARG002: subclasses use the argument
    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:  # noqa: ARG002
        """Return the columns of ``train`` that a fit uses.

        Examples:
            >>> import numpy as np, vilu
            >>> columns = {"features": np.eye(2), "negatives": np.eye(2)}
            >>> data = vilu.Embeddings(np.eye(2), np.eye(2), columns=columns)
            >>> vilu.ViLUPlus().columns_to_fit(data)
            ('features', 'negatives')
            >>> vilu.ViLUPlus(features=False).columns_to_fit(data)
            ('negatives',)
        """
        return self.columns

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """Columns required in data to be scored."""
        return self.columns

    def log_posterior(self, batch: Batch) -> Tensor:  # noqa: ARG002 - subclasses use the argument
        """Return log probabilities (B, K) float64 of the candidates, if ``has_posterior``.

        Raises:
            UsageError: If the method has no posterior.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.eye(2)[[0, 1] * 10]  # images of class 0 and of class 1 in turn
            >>> data = vilu.Embeddings(image, np.eye(2), target=[0, 1] * 10)
            >>> probe = vilu.PREDICTORS["linear_probe"]().fit(data)
            >>> probe.log_posterior(next(data.batches(4))).argmax(dim=1).tolist()
            [0, 1, 0, 1]
        """
        raise self._no_posterior_error()

    def judged(self, batch: Batch) -> Batch:
        """Return the batch with the answers to judge, chosen by the parameter ``answer``.

        Raises:
            UsageError: If the answer is "adapted" and the method has no posterior.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings(np.eye(2), np.eye(2), columns={"answer": [1, 1]})
            >>> batch = next(data.batches(2, columns=["answer"]))
            >>> vilu.MCM(answer="given").judged(batch).prediction.tolist()
            [1, 1]
        """
        if self.answer != "adapted":
            return batch
        with torch.no_grad():
            likeliest_candidate = self.log_posterior(batch).argmax(dim=1)
            return batch.judging(likeliest_candidate)

    def judging(self, answer: AnswerKind) -> Self:
        """Return a copy with the same fit, for judging the kind of answers named by ``answer``.

        If the kind changes, the copy is not calibrated, since a calibration holds for one kind.

        Raises:
            UsageError: If the answer is "adapted" and the method has no posterior, or if the method
                learned the failures of a different kind.

        Examples:
            >>> import numpy as np, vilu
            >>> image = np.eye(2)[[0, 1] * 10]
            >>> data = vilu.Embeddings(image, np.eye(2), target=[1, 0] * 10)
            >>> probe = vilu.PREDICTORS["linear_probe"]().fit(data)
            >>> batch = next(data.batches(2))
            >>> probe.judged(batch).prediction.tolist()  # all zero-shot answers are wrong
            [0, 1]
            >>> probe.judging("adapted").judged(batch).prediction.tolist()
            [1, 0]
        """
        if answer != self.answer and self.learns_failure:
            raise UsageError(
                f"this {self.name} learned the failures of {self.answer} answers. Fit it again "
                f'with answer="{answer}".'
            )
        predictor = copy.copy(self)
        predictor.answer = answer
        predictor.check_answer()
        if answer != self.answer:
            predictor.calibrator_ = None
        return predictor

    @property
    def answer_columns(self) -> tuple[str, ...]:
        """The column with the given answers, if given answers are judged. Otherwise empty."""
        return (ANSWER,) if self.answer == "given" else ()

    def _settings(self, settings_class: type[Settings], **replacements: object) -> Settings:
        """Make settings of a class whose fields are named like this predictor's parameters.

        If a field has no replacement, the field gets the value of the parameter with the field's
        name. The field ``device`` gets the resolved device.
        """
        names = [field.name for field in dataclasses.fields(settings_class)]
        values = {name: getattr(self, name) for name in names}
        values["device"] = self.device_
        values.update(replacements)
        return settings_class(**values)

    def _log_odds_bias(self) -> float:
        """Return the bias that a weighted loss adds to the log-odds of failure."""
        return 0.0

    @checked
    @torch_defaults()
    def fit(
        self,
        train: EmbeddingSource,
        validation: EmbeddingSource | None = None,
        *,
        unlabelled: EmbeddingSource | None = None,
    ) -> Self:
        """Learn from embeddings, which must have labels unless ``needs_labels`` is false.

        A method without ``_learn`` only stores the embedding space.

        Args:
            train: Rows to learn from. Rows without the label required by ``needs`` are left out
                with a warning.
            validation: Rows for model selection. At most 1 % of these rows may be training rows.
                Such training rows are left out with a warning. Without validation rows, a method
                that selects a model holds out some training rows.
            unlabelled: Further rows with the same candidates, for methods with ``uses_unlabelled``.
                Labels in these rows are ignored.

        Warns:
            UserWarning: If training rows are left out.

        Raises:
            UsageError: If a hyper-parameter is out of range, the method does not work on
                image-caption pairs, or the method cannot use unlabelled rows.
            DataError: If nothing can be learned from the rows: no rows, a single candidate, over
                1 % unusable rows, or no labels. Or if over 1 % of the validation rows are training
                rows, or a required column is missing.
            ProvenanceError: If the row sets come from different embedding spaces.

        Examples:
            >>> import numpy as np, vilu
            >>> # the answers are 0, 0, 1, 1
            >>> image = [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]]
            >>> data = vilu.Embeddings(image, np.eye(2), target=[0, 1, 1, 1])
            >>> predictor = vilu.PREDICTORS["knn_vote"](k=2).fit(data)
            >>> predictor.notes_["n_train"], predictor.notes_["n_failures"]
            (4, 1)
        """
        if self.needs_fit:
            parameters.check_parameters(self)
        self.check_answer()
        if self.answer == "given" and not self.depends_on_answer:
            logger.warning(
                "%s knows no answer: its uncertainties are the same for given answers as for "
                "zero-shot ones. Only the failures differ",
                self.name,
            )
        columns = (*self.columns_to_fit(train), *self.answer_columns)
        self._check_source(train, columns)
        if unlabelled is not None:
            self._check_unlabelled(train, unlabelled, columns)
        if self.needs_fit:
            self._fit_rows(Rows(train, train.usable_rows, columns, unlabelled), validation)
        self.space_ = train.space
        self.calibrator_ = None
        return self

    def _check_unlabelled(
        self, train: EmbeddingSource, unlabelled: EmbeddingSource, columns: Sequence[str]
    ) -> None:
        """Refuse unlabelled rows that this predictor cannot use."""
        from vilu.predictors.contract.given_logits import refuse_unlabelled
        from vilu.predictors.contract.labelled import require_comparable

        if not self.uses_unlabelled:
            raise UsageError(
                f"{self.name} learns nothing from rows without labels. Leave them out."
            )
        refuse_unlabelled(self.name, train)
        self._check_source(unlabelled, columns)
        require_comparable(train, unlabelled)

    def _fit_rows(self, train: Rows, validation: EmbeddingSource | None) -> None:
        """Learn from the rows with the label required by ``needs``.

        Sketches and a sample of the rows are stored, to recognise the rows later.
        """
        from vilu.predictors.contract import labelled, seen
        from vilu.predictors.persistence.fit_sample import FitSample

        source = train.source
        sources = [source]
        if validation is not None:
            validation = labelled.without_training_rows(validation, source)
            sources.append(validation)
        if train.unlabelled is not None:
            sources.append(train.unlabelled)
        rows, failure = labelled.trainable_rows(
            source, role="training", needs=self.needs, columns=self.answer_columns
        )
        sketches = seen.make_sketches(source)
        seen.warn_of_repeats(source, sketches)
        learnt = self.learn(dataclasses.replace(train, index=rows), failure, validation)
        for further_source in sources[1:]:
            sketches = seen.join_sketches(sketches, seen.make_sketches(further_source))
        sample = FitSample.draw(sources, getattr(self, "seed", 0))
        similarity = seen.similarity_statistics(source)
        counts = {"n_train": len(failure), "n_failures": int((failure == 1).sum())}
        notes = {**counts, **seen.describe_candidates(source), **learnt.notes}
        if self.answer == "given":
            has_class = ~source.outside[rows]
            notes["given_answers"] = labelled.count_right_answers(failure[has_class])
        # All results are stored at the end. If a fit is interrupted, for example by Ctrl-C, the
        # predictor stays as before.
        self.take(learnt.tensors, source.space)
        self.seen_ = sketches
        self.sample_ = sample
        self.similarity_ = similarity
        self.notes_ = notes
        self.held_out_ = learnt.held_out

    def learn(
        self, train: Rows, failure: Tensor, validation: EmbeddingSource | None = None
    ) -> Learnt:
        """Learn by ``_learn``, or learn a constant from failures that are all equal.

        Only a method with ``learns_failure`` learns a constant, and only if it may
        (``allow_degenerate``).
        """
        from vilu.predictors.contract.labelled import degenerate_rate, warn_of_few_rows

        if self.learns_failure:
            allow_degenerate = getattr(self, "allow_degenerate", False)
            rate = degenerate_rate(failure, self.name, allow_degenerate=allow_degenerate)
            if rate is not None:
                constant = torch.tensor(rate, dtype=torch.float64)
                return Learnt({CONSTANT: constant})
        elif self.is_probability:
            warn_of_few_rows(failure, self.name)
        return self._learn(train, failure, validation)

    # The learned state, in memory and in files.

    @torch_defaults()
    def take(self, tensors: dict[str, Tensor], space: EmbeddingSpace | None) -> None:
        """Store learned tensors. Refuse tensors with wrong names, types or shapes."""
        from vilu.predictors.persistence.state import StateLayout

        if self._is_constant(tensors):
            form = f"{CONSTANT}:d"  # a float64 number
            layout = StateLayout(self.name, (CONSTANT,), form, make_network=None)
        else:
            tensor_names = self.tensor_names()
            layout = StateLayout(self.name, tensor_names, self._forms, self.module)
        self.learned_, self.network_ = layout.read(tensors, space)
        self.space_ = space

    def _is_constant(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether these tensors belong to a constant fit."""
        return self.learns_failure and tensors.keys() == {CONSTANT}

    @property
    def constant_(self) -> float | None:
        """The score for all rows after a constant fit. Otherwise None."""
        if not self._is_constant(self.learned_):
            return None
        return float(self.learned_[CONSTANT])

    def state(self) -> dict[str, Tensor]:
        """Return everything that ``fit`` learned, as tensors on the CPU.

        Examples:
            >>> import numpy as np, vilu
            >>> target = [0, 0, 0, 1] * 10  # 3 of 4 answers are right
            >>> data = vilu.Embeddings(
            ...     np.eye(2)[[0] * 40], np.eye(2), target=target, logit_scale=1.0
            ... )
            >>> state = vilu.PREDICTORS["mcm_ts"]().fit(data).state()
            >>> # The logits are (1, 0). With the factor log 3 = 1.1, their softmax is (3/4, 1/4).
            >>> {name: round(tensor.exp().item(), 2) for name, tensor in state.items()}
            {'log_multiplier': 1.1}
        """
        if self.network_ is None:
            return dict(self.learned_)
        network_state = self.network_.state_dict()
        weights = {name: tensor.cpu() for name, tensor in network_state.items()}
        return {**weights, **self.learned_}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Store the tensors from ``state``. Refuse tensors with wrong names, types or shapes.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> predictor = vilu.PREDICTORS["mcm_ts"]()
            >>> predictor.space_ = vilu.EmbeddingSpace(embed_dim=2, logit_scale=1.0)
            >>> predictor.restore({"log_multiplier": torch.tensor(np.log(np.log(3)))})
            >>> data = vilu.Embeddings(np.eye(2), np.eye(2), logit_scale=1.0)
            >>> predictor.predict_uncertainty(data).round(2)  # softmax of (log 3, 0) is (3/4, 1/4)
            array([0.25, 0.25])
        """
        self.take(state, self.space_)

    @checked
    def save(self, folder: str | Path) -> str:
        """Write the predictor to a folder, and return the fingerprint.

        Raises:
            UsageError: If parameters were changed after the fit, and now contradict the fit.

        Examples:
            >>> import tempfile, vilu
            >>> folder = tempfile.mkdtemp()
            >>> fingerprint = vilu.MCM().save(folder)
            >>> vilu.load(folder)
            MCM()
        """
        from vilu.predictors.persistence.description import save

        self.require_fitted()
        return save(self, folder)

    def require_fitted(self) -> None:
        """Refuse an unfitted predictor if the method needs ``fit``."""
        if self.needs_fit and self.space_ is None:
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted yet. Call fit, or vilu.load a saved one."
            )

    # Scores.

    @property
    def device_(self) -> torch.device:
        """Device on which scores are computed."""
        return resolve_device(getattr(self, "device", "cpu"))

    @overload
    def predict_uncertainty(self, data: Tensor, text: RowsLike | None = None) -> Tensor: ...

    @overload
    def predict_uncertainty(
        self, data: EmbeddingSource | ArrayLike, text: RowsLike | None = None
    ) -> NDArray[np.float64]: ...

    @checked
    def predict_uncertainty(
        self, data: EmbeddingSource | RowsLike, text: RowsLike | None = None
    ) -> NDArray[np.float64] | Tensor:
        """Compute the uncertainty (N,) float64 of every row. Higher means more likely wrong.

        If the embedding is not usable (``data.status``), the uncertainty is NaN. With a single
        candidate all uncertainties are NaN, since only one answer is possible.

        Args:
            data: Embeddings. A fitted predictor also takes bare image embeddings (N, D) in the
                space of the fit, as an array or a tensor. For a tensor, the scores are computed on
                the tensor's device, and the result is a tensor there.
            text: Candidates (K, D) for bare image embeddings, all different. By default the
                candidates are the fitted classes, if the method keeps the class texts.

        Raises:
            NotFittedError: If the predictor needs ``fit`` first.
            ProvenanceError: If data and training data come from different embedding spaces.
            UsageError: If a hyper-parameter is out of range, or the method does not work on
                image-caption pairs, or there are no candidates.
            DataError: If the data lack a required column, or a shape is wrong.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> image = [[1.0, 0.0], [0.6, 0.8], [np.nan, 0.0]]
            >>> data = vilu.Embeddings(image, np.eye(2), logit_scale=10.0)
            >>> vilu.MCM().predict_uncertainty(data).round(2)
            array([0.  , 0.12,  nan])
            >>> predictor = vilu.MCM().fit(data)  # stores the logit scale of the data
            >>> bare_image = torch.tensor([[0.6, 0.8]])
            >>> predictor.predict_uncertainty(bare_image, np.eye(2)).round(decimals=2)
            tensor([0.1200], dtype=torch.float64)
        """
        if not isinstance(data, EmbeddingSource):
            uncertainty = self.uncertainty_of(self._new_images(data, text))
            return uncertainty if isinstance(data, Tensor) else uncertainty.numpy()
        if text is not None:
            raise UsageError("text is for bare image embeddings: these data have their candidates.")
        all_scores = np.full(len(data), np.nan)
        for batch, scores in self.scored(data):
            rows = batch.index.numpy(force=True)
            all_scores[rows] = scores
        return all_scores

    @torch_defaults()
    def _new_images(self, image: RowsLike, text: RowsLike | None) -> NewImages:
        """Make a source from bare image embeddings in the space of the fit."""
        from vilu.embeddings.new_images import NewImages

        self.require_fitted()
        if self.space_ is None:
            raise UsageError(
                f"this {self.name} knows no embedding space, so it knows no logit scale for bare "
                "embeddings. Fit it, or give vilu.Embeddings(image, text, logit_scale=...)."
            )
        if text is None:
            text = self.learned_.get(CLASSES)
        if text is None:
            raise UsageError(
                f"this {self.name} keeps no texts of classes. Give them too: "
                "predict_uncertainty(image, text)."
            )
        return NewImages.from_arrays(image, text, self.space_)

    @torch_defaults()
    def uncertainty_of(self, data: NewImages) -> Tensor:
        """Compute the uncertainty (N,) float64 of new images, on the images' device.

        If an embedding is not usable, the uncertainty is NaN.

        Raises:
            DataError: If a score is not finite. The errors of ``predict_uncertainty`` are raised as
                well.
        """
        # without images, this empty part is the result
        parts = [torch.empty(0, dtype=torch.float64, device=data.device)]
        all_rows = torch.arange(len(data), device="cpu")
        for _, scores in self._scored_on_device(data, all_rows):
            parts.append(scores.to(data.device))  # the method ``stacking`` scores on the CPU
        uncertainty = torch.cat(parts)
        if data.n_candidates >= MIN_CANDIDATES:
            is_broken = ~torch.isfinite(uncertainty)
            n_broken = int(is_broken.sum())
            self._require_finite(n_broken)
        return uncertainty.masked_fill(~data.is_usable, torch.nan)

    @checked
    def scored(
        self, data: EmbeddingSource, rows: Tensor | None = None
    ) -> Iterator[tuple[Batch, NDArray[np.float64]]]:
        """Yield batches on ``device_``, each with uncertainties (B,) float64.

        By default all usable rows are scored. Memory does not grow with the row count. A batch
        keeps the zero-shot answer computed for the score.

        Raises:
            DataError: If a score is not finite. All errors of ``predict_uncertainty`` are raised
                as well.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], np.eye(2), logit_scale=10.0)
            >>> for batch, uncertainty in vilu.MCM().scored(data):
            ...     print(batch.prediction.tolist(), uncertainty.round(2))
            [0, 1] [0.   0.12]
        """
        scored_batches = self._scored(data, rows)
        return each_with_torch_defaults(scored_batches)

    def _scored(
        self, data: EmbeddingSource, rows: Tensor | None
    ) -> Generator[tuple[Batch, NDArray[np.float64]], None, None]:
        """Yield batches with scores (B,). Raise if a score is not finite."""
        for batch, scores_on_device in self._scored_on_device(data, rows):
            scores = scores_on_device.numpy(force=True)
            n_candidates = batch.text.shape[-2]
            if n_candidates >= MIN_CANDIDATES:
                is_broken = ~np.isfinite(scores)
                n_broken = int(np.count_nonzero(is_broken))
                self._require_finite(n_broken)
            yield batch, scores

    def _scored_on_device(
        self, data: EmbeddingSource, rows: Tensor | None
    ) -> Iterator[tuple[Batch, Tensor]]:
        """Yield batches, each with uncertainties (B,) float64 on the device."""
        self._check_ready(data)
        device = self.device_ if data.device is None else data.device
        read_blocks = data.batches
        block_rows = SCORING_BATCH
        if self.looks_at == {"logits"}:
            # Such scores spend most time on reading memory. Small blocks are therefore faster,
            # because their logits stay in the processor's cache.
            read_blocks = data.many
            block_rows = n_rows_in_cache(data.n_candidates)
        columns = (*self.columns_to_score, *self.answer_columns)
        for block in read_blocks(block_rows, rows=rows, columns=columns):
            batch = block.to(device)
            n_candidates = batch.text.shape[-2]  # equal captions of a pool are a single candidate
            if n_candidates < MIN_CANDIDATES:
                nan_scores = torch.full((len(batch.index),), torch.nan, dtype=torch.float64)
                yield batch, nan_scores.to(device)
                continue
            judged_batch = self.judged(batch)
            with torch.no_grad():
                scores = self.score_batch(judged_batch)
                self._require_score_per_row(scores, len(batch.index))
                float64_scores = float64(scores)
            yield judged_batch, float64_scores

    def _require_score_per_row(self, scores: object, n_rows: int) -> None:
        """Refuse a result of ``_score`` that is not one number for each row."""
        if not isinstance(scores, Tensor):
            raise UsageError(
                f"_score of {self.name} must return a tensor. Got {type(scores).__name__} instead."
            )
        if scores.shape != (n_rows,):
            raise UsageError(
                f"_score of {self.name} must return one number for each row, here a tensor of "
                f"shape ({n_rows},). Got the shape {tuple(scores.shape)} instead."
            )

    def _require_finite(self, n_broken: int) -> None:
        """Raise DataError if ``n_broken`` is not 0. It counts the scores that are not finite."""
        if n_broken == 0:
            return
        problem = f"{self.name} gave {n_broken} scores that are not finite"
        learned_tensors = self.state().values()
        is_intact = all(bool(tensor.isfinite().all()) for tensor in learned_tensors)
        if not is_intact:
            raise DataError(f"{problem}: its weights are damaged. Fit it again.")
        raise DataError(
            f"{problem}, although its weights are finite. Its _score must return a finite number "
            "for each row."
        )

    def score_batch(self, batch: Batch) -> Tensor:
        """Return the uncertainty (B,): by ``_score``, or ``constant_`` if the fit is a constant.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], np.eye(2), logit_scale=10.0)
            >>> batch = next(data.batches(2))
            >>> vilu.MCM().score_batch(batch).round(decimals=2).tolist()
            [0.0, 0.12]
        """
        if self.constant_ is not None:
            return torch.full_like(batch.image[:, 0], self.constant_, dtype=torch.float64)
        if self.network_ is not None:
            self.network_.to(batch.image.device)
        return self._score(batch)

    @property
    def fitted_space(self) -> EmbeddingSpace:
        """The embedding space of the fit.

        Raises:
            UsageError: If the predictor has no embedding space.
        """
        if self.space_ is None:
            raise UsageError(
                f"this {self.name} knows no embedding space, so the logit scale of its graph is "
                f"not known. Make it with `vilu fit STORE --method {self.name}`."
            )
        return self.space_

    @property
    def network(self) -> nn.Module:
        """The fitted network.

        Raises:
            DataError: If the predictor has no network.
        """
        if self.network_ is None:
            raise DataError(
                f"this {self.name} holds no network: it was not fitted, or its file is damaged."
            )
        return self.network_

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """Return the learned tensor with this name, on a device."""
        return self.learned_[name].to(device)

    def seen(self, data: EmbeddingSource, rows: NDArray[np.int64] | None = None) -> Overlap:
        """Find which ``rows`` (M,) were used to fit. By default all rows are checked.

        If the fit used more than 16,384 rows, only a sample is recognised.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings(np.eye(3), np.eye(3), target=[0, 1, 2], ids=["a", "b", "c"])
            >>> predictor = vilu.PREDICTORS["knn_distance"]().fit(data.take([0, 1]))
            >>> predictor.seen(data).shared
            array([ True,  True, False])
        """
        from vilu.predictors.contract.seen import Overlap, common_identity

        kind = common_identity(self.seen_, data.identified_by, names=("the fit", "these"))
        if rows is None:
            rows = np.arange(len(data))
        if kind is None:
            none_shared = np.zeros(len(rows), np.bool_)
            return Overlap(none_shared, n_comparable=0)
        return self.seen_[kind].overlap(data, kind, rows)

    def unseen(self, data: EmbeddingSource, role: str) -> NDArray[np.bool_]:
        """Return a mask (N,): true for rows not used to fit. Warn if some rows were used.

        Messages name the rows by ``role``, such as "calibration".

        Raises:
            DataError: If more than 1 % of the rows were used to fit.
        """
        from vilu.predictors.contract.seen import WHY_NOT_FIT_ROWS

        overlap = self.seen(data)
        return overlap.unshared_mask(
            data,
            rows_name=f"{role} rows",
            predicate=f"were used to fit this {self.name}",
            remedy=f"{WHY_NOT_FIT_ROWS} Take rows that it has not seen.",
        )

    def _check_source(self, data: EmbeddingSource, columns: Sequence[str]) -> None:
        """Refuse data that the method cannot use."""
        if self.takes != data.data_kind:
            from vilu.predictors.contract.given_logits import require_kind

            require_kind(type(self), data)
        if self.no_captions is not None and data.pool_size is not None:
            raise UsageError(
                f"{self.name} does not work on image-caption pairs: {self.no_captions}."
            )
        if not data.has_texts and data.data_kind == "embeddings":
            from vilu.predictors.contract.given_logits import require_inputs

            require_inputs(type(self), data)
        for column in columns:
            if column not in data.columns:
                remedy = f"Make it with `{COLUMN_COMMANDS[column]}`"
                can_be_imported = column not in SECOND_MODEL_COLUMNS and column != ANSWER
                if can_be_imported:
                    remedy += ", or give it to `vilu import`"
                raise DataError(f"{self.name} needs the column {column!r}. {remedy}.")

    def check_answer(self) -> None:
        """Refuse adapted answers if the method has no posterior."""
        if self.answer == "adapted" and not self.has_posterior:
            raise self._no_posterior_error()

    def _no_posterior_error(self) -> UsageError:
        """Return the error for adapted answers if the method has no posterior."""
        from vilu.registry import METHODS

        names = [name for name in METHODS.names() if METHODS[name].has_posterior]
        return UsageError(
            f"{self.name} has no posterior of its own, so it knows no other answer than the "
            f"zero-shot one. Take one of {', '.join(names)}, or leave "
            'answer="adapted" out.'
        )

    def _check_ready(self, data: EmbeddingSource) -> None:
        """Refuse invalid settings, a missing fit, and data that do not match the fit."""
        parameters.check_parameters(self)
        self.check_answer()
        self._check_source(data, (*self.columns_to_score, *self.answer_columns))
        self.require_fitted()
        # a score computed only from logits may be fitted on some classes and used on different
        # classes
        scores_any_classes = self.looks_at == {"logits"} and not self.closed_set
        if self.needs_fit and not scores_any_classes:
            from vilu.predictors.contract.given_logits import require_same_logits

            require_same_logits(self.name, self.notes_, data)
        if self.space_ is None:
            return
        self.space_.require_match(
            data.space, name=f"the fitted {self.name}", other_name="the data to score"
        )
        is_unverified = self.space_.anonymous or data.space.anonymous
        if self.similarity_ and is_unverified:
            from vilu.predictors.contract.seen import warn_of_other_space

            mean, deviation = self.similarity_
            warn_of_other_space(data, mean, deviation)

    # Probabilities.

    def predict_failure_probability(self, data: EmbeddingSource) -> NDArray[np.float64]:
        """Compute P(failure) (N,) float64 of every row, by ``failure_probability``.

        Raises:
            UsageError: If the method's uncertainty is not a probability, and the predictor was not
                calibrated.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], np.eye(2), logit_scale=10.0)
            >>> vilu.MCM().predict_failure_probability(data).round(2)
            array([0.  , 0.12])
        """
        self.failure_probability([])  # raises the UsageError before anything is computed
        uncertainty = self.predict_uncertainty(data)
        return self.failure_probability(uncertainty)

    def failure_probability(self, uncertainty: ArrayLike) -> NDArray[np.float64]:
        """Compute P(failure) (N,) float64 from this predictor's uncertainties (N,).

        After calibration the result is the calibrated probability. Before calibration the result is
        the uncertainty, if the uncertainty is a probability. The bias from a weighted loss is
        removed (``_log_odds_bias``). NaN stays NaN.

        Raises:
            UsageError: If the method's uncertainty is not a probability, and the predictor was not
                calibrated.

        Examples:
            >>> import vilu
            >>> vilu.MCM().failure_probability([0.1, float("nan")]).round(2)
            array([0.1, nan])
        """
        if self.calibrator_ is None:
            return self.raw_failure_probability(uncertainty)
        score = self._calibration_score(uncertainty)
        return self.calibrator_(score)

    def raw_failure_probability(self, uncertainty: ArrayLike) -> NDArray[np.float64]:
        """Compute P(failure) (N,) as before calibration, even if the predictor is calibrated.

        Examples:
            >>> import vilu
            >>> failure = [0, 0, 0, 1] * 10  # a quarter of the answers is wrong
            >>> predictor = vilu.MCM().calibrate_scores([0.1] * 40, failure)
            >>> predictor.raw_failure_probability([0.1]).round(2)
            array([0.1])
            >>> predictor.failure_probability([0.1]).round(2)
            array([0.25])
        """
        from vilu.predictors.contract.probability import expit

        if not self.is_probability:
            raise UsageError(
                f"{self.name} gives a score, not a probability of failure. "
                "Calibrate it (`vilu calibrate`), or take vilu_plus."
            )
        score = self._calibration_score(uncertainty)
        return expit(score)

    @checked
    @torch_defaults()
    def calibrate_probability(self, calibration: EmbeddingSource) -> Self:
        """Learn the probability of failure from labelled rows.

        Rows used to fit are left out with a warning. All rows of a picture count as one row. This
        row is a failure if any row of the picture is a failure. For image-caption pairs, a
        picture's first row counts.

        Raises:
            DataError: If more than 1 % of the rows were used to fit, or no row has an uncertainty
                and a known failure.

        Examples:
            >>> import numpy as np, vilu
            >>> angle = np.arange(40)  # 40 pictures, each with the cosines 0.71 and 0
            >>> image = np.c_[np.ones(40), np.zeros(40), np.cos(angle), np.sin(angle)] / 2**0.5
            >>> target = [0, 0, 0, 1] * 10  # 3 of 4 answers are right
            >>> data = vilu.Embeddings(image, np.eye(2, 4), target=target)
            >>> predictor = vilu.MCM().calibrate_probability(data)
            >>> predictor.predict_failure_probability(data)[:2].round(2)
            array([0.25, 0.25])
        """
        from vilu.predictors.contract.calibrating import failure_of_pictures, scores_and_failures

        is_unseen = self.unseen(calibration, role="calibration")
        uncertainty, failure = scores_and_failures(self, calibration, is_unseen)
        failure = failure_of_pictures(calibration, is_unseen, uncertainty, failure)
        return self.calibrate_scores(uncertainty[is_unseen], failure[is_unseen])

    def calibrate_scores(self, uncertainty: ArrayLike, failure: ArrayLike) -> Self:
        """Learn the probability of failure from uncertainties (N,) and failures (N,).

        Rows without an uncertainty or a known failure are left out.

        Raises:
            DataError: If no row is left, or a failure is not 1, 0, or -1 (unknown).

        Examples:
            >>> import vilu
            >>> uncertainty = [-3.0, -2.0, -1.0, 0.0] * 10
            >>> failure = [0, 0, 0, 1] * 10  # the answers with uncertainty 0 are wrong
            >>> margin = vilu.Margin().calibrate_scores(uncertainty, failure)
            >>> margin.failure_probability([-3.0, 0.0]).round(2)
            array([0.  , 0.83])
        """
        from vilu.predictors.contract.calibrating import known_pairs
        from vilu.predictors.contract.probability import fit_calibrator

        known_uncertainty, known_failure = known_pairs(uncertainty, failure)
        score = self._calibration_score(known_uncertainty)
        self.calibrator_ = fit_calibrator(score, known_failure, is_log_odds=self.is_probability)
        return self

    def _calibration_score(self, uncertainty: ArrayLike) -> NDArray[np.float64]:
        """Return the calibrator's inputs (N,): the uncertainties, or log-odds of probabilities.

        From log-odds the bias of a weighted loss is subtracted.
        """
        from vilu.metrics.counts import real_vector
        from vilu.predictors.contract.calibrating import log_odds

        scores = real_vector(uncertainty, "uncertainty")
        if not self.is_probability:
            return scores
        return log_odds(scores) - self._log_odds_bias()


def own_graph(predictor: FailurePredictor) -> nn.Module:
    """Make a ``graph`` for methods whose ``_score`` has no Python branch on values or sizes."""
    from vilu.predictors.nn.head import Graph

    return Graph(predictor._score, predictor.network_)
