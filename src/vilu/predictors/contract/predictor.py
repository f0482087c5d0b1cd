"""The contract of every failure predictor."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from vilu.device import as_usual, each_as_usual, resolve_device
from vilu.embeddings.columns import HOW, SECOND
from vilu.embeddings.rows import SCORING_BATCH, Rows
from vilu.embeddings.similarity import cached_rows
from vilu.embeddings.source import Batch, EmbeddingSource
from vilu.embeddings.source import log_posterior as zero_shot_log_posterior
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import UNKNOWN, DataError, NotFittedError, UsageError
from vilu.metrics.counts import check_codes, real_vector, require_same_length
from vilu.predictors.contract.games import PLAYER_OF_LOOK, Game, NoAttribution, SingleGame
from vilu.predictors.contract.labelled import (
    Needs,
    degenerate_rate,
    disjoint,
    require_comparable,
    trainable_rows,
    warn_few,
)
from vilu.predictors.contract.parameters import (
    check_parameters,
    get_params,
    is_no_estimator,
    set_params,
    shown,
)
from vilu.predictors.contract.probability import Calibrator, expit, fit_calibrator
from vilu.predictors.contract.seen import (
    LEARNED_FROM,
    Overlap,
    Sketches,
    candidates_of,
    common_identity,
    join,
    one_per_picture,
    scored_of,
    similarity_range,
    sketch,
    warn_of_other_space,
    warn_of_repeats,
)
from vilu.predictors.nn.head import Graph, with_weights
from vilu.predictors.nn.train import AdamWConfig, TrainConfig
from vilu.predictors.persistence import record
from vilu.predictors.persistence.fit_sample import FitSample
from vilu.validation import checked

# probabilities nearer to 0 or 1 count as this far away, so that their log-odds are finite
CERTAIN = 1e-15
CONSTANT, CLASSES = "constant", "classes"
Settings = TypeVar("Settings", TrainConfig, AdamWConfig)


class NotExportable(UsageError):  # noqa: N818 - an answer, not an accident
    """A method has no graph of image and text; the message says why."""


class Learnt(NamedTuple):
    """What a fit found: the tensors that are saved, on the CPU, and notes for people, as plain JSON."""

    tensors: dict[str, Tensor]
    notes: Mapping[str, Any] = MappingProxyType({})


@dataclasses.dataclass
class FailurePredictor(ABC):
    """Says per image how likely the zero-shot answer is wrong, from embeddings alone.

    A subclass is a dataclass of hyper-parameters, with ``get_params``, ``set_params`` and ``repr``
    as in scikit-learn, whose ``clone`` works. What ``fit`` finds ends in an underscore. Higher
    uncertainty means more likely wrong. A method has to say ``name``, ``summary``, ``reference``
    and ``_score``; one that learns from labels also ``_learn``, and ``tensors`` or ``module``. All
    else has defaults. Of ``graph``, ``game`` and ``looks_at`` only what a class defines itself
    counts: what it inherits may be wrong for it.

    Parameters of the same name mean the same in all methods: ``seed`` is of everything random in
    ``fit``; ``device`` ("auto", "cpu", "cuda", "cuda:N" or "mps") is not part of what is saved;
    with ``allow_degenerate`` a method that learns from failures fits a constant where the training
    rows hold no failure, or nothing else, instead of refusing them; ``max_bank`` is the most
    training images to keep: of more, so many are drawn with ``seed``.

    Attributes:
        name: Key in ``vilu.PREDICTORS``.
        summary: One line for ``vilu list predictors``.
        reference: Where the method comes from, in a few words.
        cost: What fitting and scoring cost, in a few words.
        columns: What the data must carry beside the embeddings (``vilu.embeddings.columns``).
        optional_columns: What it makes use of where the data carry all of it.
        no_captions: Why it cannot work on image-caption pairs; None where it can.
        closed_set: Whether it scores the classes that it was fitted on and no others.
        is_probability: Whether the uncertainty estimates P(failure).
        learns_failure: Whether it learns to tell failures from successes, so that it needs both.
        looks_at: What its score is a function of, {"logits"} or {"image"}; nothing where it is more
            than one of them.
        tensors: Names of the saved tensors, beside those of its ``module``.
        needs_fit: Whether it has to be fitted first: whether it has a ``_learn``.
        needs_labels: Whether a fit needs labelled rows; without, it takes every usable row,
            labelled or not.
        uses_unlabelled: Whether a fit can also learn from rows without labels
            (``Rows.unlabelled``).
        learned_: The saved tensors by name, without those of the network.
        network_: The ``module`` with its weights, ready to score; None without.
        space_: Embedding space of the training data; None when never fitted.
        seen_: Sketches of the rows used by ``fit``, by what they are recognised by; empty where
            nothing tells.
        similarity_: Mean and standard deviation of the largest cosine of training rows; None when
            never fitted.
        calibrator_: From uncertainty to P(failure), learned on calibration rows; None without.
        sample_: Image vectors of random rows of the fit, at most 2 MB, by which near copies of them
            are told; None where none is kept.

    Examples:
        >>> import dataclasses, numpy as np, vilu
        >>> @dataclasses.dataclass
        ... class Farness(vilu.FailurePredictor):
        ...     name, summary, reference = "farness", "one minus the largest cosine", "nowhere"
        ...
        ...     def _score(self, batch):
        ...         return 1 - (batch.image @ batch.text.T).amax(dim=1)
        >>> Farness().predict_uncertainty(
        ...     vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], np.eye(2))
        ... ).round(2)
        array([0. , 0.2])
    """

    how: ClassVar[str] = "a predictor (such as vilu.MCM(), or vilu.load(folder))"
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
    tensors: ClassVar[tuple[str, ...]] = ()
    needs_fit: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True
    uses_unlabelled: ClassVar[bool] = False
    _forms: ClassVar[str] = ""  # of ``tensors``, which follow from it: see ``record.require_forms``

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

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.needs_fit = cls._learn is not FailurePredictor._learn
        cls.tensors = (
            tuple(form.partition(":")[0] for form in vars(cls).get("_forms", "").split())
            or cls.tensors
        )
        # before the dataclass writes one of its own, and mypy takes no method that is assigned
        cls.__repr__ = vars(cls).get("__repr__", shown)  # type: ignore[method-assign]

    get_params, set_params, __sklearn_tags__ = get_params, set_params, is_no_estimator

    # What a method says.

    @abstractmethod
    def _score(self, batch: Batch) -> Tensor:
        """(B,) uncertainty of a batch, float32 or better, from what was learned; on any device."""

    def _learn(self, train: Rows, failure: Tensor, validation: EmbeddingSource | None) -> Learnt:
        """Learn from usable labelled rows and their failures (M,) in {0, 1}, leaving the predictor as it is."""
        # only a call past ``fit`` comes here: ``needs_fit`` is whether a class has a ``_learn`` of
        # its own
        raise NotImplementedError(f"{self.name} learns nothing")

    def module(self, tensors: dict[str, Tensor], space: EmbeddingSpace) -> nn.Module | None:  # noqa: ARG002
        """A new network, whose weights are saved; None where ``tensors`` are all there is.

        Args:
            tensors: Those that it is to hold, whose shapes may decide its own; empty before a fit.
            space: Of the embeddings.

        Examples:
            >>> import vilu
            >>> head = vilu.LVU(hidden=(4,)).module(
            ...     {}, vilu.EmbeddingSpace(embed_dim=2, logit_scale=100.0)
            ... )
            >>> sum(weight.numel() for weight in head.parameters())  # 2 x 4 + 4 and 4 + 1
            17
        """
        return None

    def tensor_names(self) -> tuple[str, ...]:
        """``tensors``, where parameters decide which there are.

        Examples:
            >>> import vilu
            >>> vilu.PREDICTORS["sirc"](typicality="residual").tensor_names()
            ('shift', 'slope', 'complement')
        """
        return self.tensors

    def graph(self) -> nn.Module:
        """A module of a batch to its (N,) float64 scores that ONNX export can take (``own_graph`` often is one).

        Examples:
            >>> import numpy as np, vilu
            >>> batch = next(
            ...     vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], np.eye(2), logit_scale=10.0).batches(
            ...         2
            ...     )
            ... )
            >>> vilu.Margin().graph()(batch).round(decimals=2).tolist()
            [-10.0, -2.0]
        """
        raise NotExportable(f"{self.name} defines no graph of image and text")

    def game(self) -> Game:
        """Who plays for the score, and what coalitions are worth; the default knows scores of one kind of input.

        Examples:
            >>> import vilu
            >>> vilu.MCM().game().players, vilu.PREDICTORS["knn_distance"]().game().players
            (('zero-shot score',), ('image',))
        """
        looks_at = vars(type(self)).get("looks_at", frozenset())
        if len(looks_at) != 1:
            raise NoAttribution(f"no attribution is defined for {self.name}")
        return SingleGame(PLAYER_OF_LOOK[next(iter(looks_at))])

    @property
    def label(self) -> str:
        """What its scores and results are called: the name, and the kind of fit where a method has several."""
        return self.name

    @property
    def modules(self) -> tuple[str, ...]:
        """Where its code is; with what these import, it decides every score."""
        return (type(self).__module__,)

    @property
    def needs(self) -> Needs:
        """What a fit must know of a row; without it the row is left out."""
        return "nothing" if not self.needs_labels else "failure" if self.learns_failure else "class"

    def columns_to_fit(self, train: EmbeddingSource) -> tuple[str, ...]:  # noqa: ARG002 - some look at what there is
        """What these data must carry for a fit.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings(
            ...     np.eye(2), np.eye(2), columns={"features": np.eye(2), "negatives": np.eye(2)}
            ... )
            >>> (
            ...     vilu.ViLUPlus().columns_to_fit(data),
            ...     vilu.ViLUPlus(features=False).columns_to_fit(data),
            ... )
            (('features', 'negatives'), ('negatives',))
        """
        return self.columns

    @property
    def columns_to_score(self) -> tuple[str, ...]:
        """What data must carry to be scored."""
        return self.columns

    def log_posterior(self, batch: Batch) -> Tensor:
        """(B, K) float64 log probabilities of the candidates: the method's own, where it has some, or zero-shot.

        Examples:
            >>> import numpy as np, vilu
            >>> batch = next(
            ...     vilu.Embeddings(np.eye(2), np.eye(2), logit_scale=np.log(3)).batches(2)
            ... )
            >>> vilu.MCM().log_posterior(batch).exp().round(decimals=2).tolist()
            [[0.75, 0.25], [0.25, 0.75]]
        """
        return zero_shot_log_posterior(batch)

    def _settings(self, kind: type[Settings], **others: object) -> Settings:
        """The fields of ``kind`` as the parameters of the same names are, but for some others."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(kind)}
        return kind(**values | {"device": self.device_} | others)

    def _log_weight(self) -> float:
        """What a weighted loss adds to the log-odds of failure."""
        return 0.0

    @checked
    @as_usual()
    def fit(
        self,
        train: EmbeddingSource,
        validation: EmbeddingSource | None = None,
        *,
        unlabelled: EmbeddingSource | None = None,
    ) -> Self:
        """Learn from embeddings, labelled ones unless ``needs_labels`` is false; others only remember the space.

        Args:
            train: Rows to learn from; those without what the method ``needs`` to know are left out
                with a warning.
            validation: Rows to select on. Few may be training rows, too (1 %); these are left out
                with a warning. Where the method selects something and gets none, it holds out a
                part of ``train``.
            unlabelled: More rows against the same candidates, no label of which is looked at
                (``uses_unlabelled``).

        Warns:
            UserWarning: If training rows are left out.

        Raises:
            UsageError: If a hyper-parameter is out of range, the method does not work on
                image-caption pairs, or it cannot use unlabelled rows.
            DataError: If nothing can be learned from the rows: empty, one candidate, over 1 %
                unusable rows, no labels; or if the two sets have more rows in common, or lack a
                column that the method needs.
            ProvenanceError: If the two sets come from different embedding spaces.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings(
            ...     [[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]], np.eye(2), [0, 1, 1, 1]
            ... )
            >>> predictor = vilu.PREDICTORS["knn_vote"](k=2).fit(data)
            >>> predictor.notes_["n_train"], predictor.notes_["n_failures"]
            (4, 1)
        """
        if self.needs_fit:
            check_parameters(self)
        columns = self.columns_to_fit(train)
        self._check_source(train, columns)
        if unlabelled is not None:
            if not self.uses_unlabelled:
                raise UsageError(
                    f"{self.name} learns nothing from rows without labels. Leave them out."
                )
            self._check_source(unlabelled, columns)
            require_comparable(train, unlabelled)
        if self.needs_fit:
            self._fit_rows(Rows(train, train.usable_rows, columns, unlabelled), validation)
        self.space_, self.calibrator_ = train.space, None
        return self

    def _fit_rows(self, train: Rows, validation: EmbeddingSource | None) -> None:
        source, validation = (
            train.source,
            None if validation is None else disjoint(train.source, validation),
        )
        rows, failure = trainable_rows(source, "training", self.needs)
        own = sketch(source)
        warn_of_repeats(source, own)
        found = self.learn(dataclasses.replace(train, index=rows), failure, validation)
        self.take(found.tensors, source.space)
        more = [rows_of for rows_of in (validation, train.unlabelled) if rows_of is not None]
        self.seen_ = reduce(join, [sketch(rows_of) for rows_of in more], own)
        self.sample_ = FitSample.draw([source, *more], getattr(self, "seed", 0))
        self.similarity_ = similarity_range(source)
        counts = {"n_train": len(failure), "n_failures": int((failure == 1).sum())}
        self.notes_ = {**counts, **candidates_of(source), **found.notes}

    def learn(
        self, train: Rows, failure: Tensor, validation: EmbeddingSource | None = None
    ) -> Learnt:
        """As ``_learn``, or the constant of a method that learns from failures where there is nothing to learn."""
        if self.learns_failure:
            rate = degenerate_rate(
                failure, self.name, allowed=getattr(self, "allow_degenerate", False)
            )
            if rate is not None:
                return Learnt({CONSTANT: torch.tensor(rate, dtype=torch.float64)})
        elif self.is_probability:
            warn_few(failure, self.name)
        return self._learn(train, failure, validation)

    @as_usual()
    def take(self, tensors: dict[str, Tensor], space: EmbeddingSpace | None) -> None:
        """Hold what was learned."""
        if tensors and space is None:
            raise DataError("the saved predictor has weights but no embedding space.")
        is_constant = self.learns_failure and tensors.keys() == {CONSTANT}
        names, forms = (
            ((CONSTANT,), f"{CONSTANT}:d") if is_constant else (self.tensor_names(), self._forms)
        )
        network = None
        if space is not None and not is_constant:
            with torch.device("meta"):  # no numbers are drawn
                network = self.module(tensors, space)
        own = {
            name: tensor.contiguous() for name, tensor in tensors.items() if name in names
        }  # laid out as in a file
        if network is not None:
            weights = {name: tensor for name, tensor in tensors.items() if name not in names}
            network = with_weights(network, weights, self.name).requires_grad_(False)
        elif tensors.keys() != set(names):
            expected = (
                f"a {self.name} holds {', '.join(names)}"
                if names
                else f"{self.name} has no weights"
            )
            raise DataError(f"{expected}. The file has {', '.join(sorted(tensors)[:8])}.")
        record.require_forms(self.name, own, forms, space.embed_dim if space else 0)
        self.learned_, self.network_, self.space_ = own, network, space

    @property
    def constant_(self) -> float | None:
        """The one score of a fit where there was nothing to learn; None for others."""
        return (
            float(self.learned_[CONSTANT])
            if self.learns_failure and self.learned_.keys() == {CONSTANT}
            else None
        )

    def state(self) -> dict[str, Tensor]:
        """Everything that ``fit`` learned, as tensors on the CPU.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings(
            ...     np.eye(2)[[0] * 40], np.eye(2), [0, 0, 0, 1] * 10, logit_scale=1.0
            ... )
            >>> state = vilu.PREDICTORS["mcm_ts"]().fit(data).state()  # m = log 3, so that p is 3/4
            >>> {name: round(tensor.exp().item(), 2) for name, tensor in state.items()}
            {'log_multiplier': 1.1}
        """
        weights = {} if self.network_ is None else self.network_.state_dict()
        return {**{name: tensor.cpu() for name, tensor in weights.items()}, **self.learned_}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``state``; refuses tensors of the wrong names, types or shapes.

        Examples:
            >>> import numpy as np, torch, vilu
            >>> predictor = vilu.PREDICTORS["mcm_ts"]()
            >>> predictor.space_ = vilu.EmbeddingSpace(embed_dim=2, logit_scale=1.0)
            >>> predictor.restore({"log_multiplier": torch.tensor(np.log(np.log(3)))})
            >>> predictor.predict_uncertainty(
            ...     vilu.Embeddings(np.eye(2), np.eye(2), logit_scale=1.0)
            ... ).round(2)
            array([0.25, 0.25])
        """
        self.take(state, self.space_)

    @checked
    def save(self, folder: str | Path) -> str:
        """Write to a folder and return the fingerprint; a UsageError where parameters were set that do not fit the fit.

        Examples:
            >>> import tempfile, vilu
            >>> folder = tempfile.mkdtemp()
            >>> fingerprint = vilu.MCM().save(folder)
            >>> vilu.load(folder)
            MCM()
        """
        self.require_fitted()
        return record.save(self, folder)

    def require_fitted(self) -> None:
        """Refuse to go on without ``fit``, where it is needed."""
        if self.needs_fit and self.space_ is None:
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted yet. Call fit, or vilu.load a saved one."
            )

    # Scores.

    @property
    def device_(self) -> torch.device:
        """Where scores are computed."""
        return resolve_device(getattr(self, "device", "cpu"))

    @checked
    def predict_uncertainty(self, data: EmbeddingSource) -> NDArray[np.float64]:
        """Uncertainty (N,) float64 of every row, higher = more likely wrong.

        NaN where the embedding is not usable (``data.status``), and everywhere when there is only
        one candidate, since no other answer was possible.

        Raises:
            NotFittedError: If the predictor needs ``fit`` first.
            ProvenanceError: If the data come from another embedding space than the training data.
            UsageError: If a hyper-parameter is out of range, or the method does not work on
                image-caption pairs.
            DataError: If the data lack a column that the method needs.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings(
            ...     [[1.0, 0.0], [0.6, 0.8], [np.nan, 0.0]], np.eye(2), logit_scale=10.0
            ... )
            >>> vilu.MCM().predict_uncertainty(data).round(2)
            array([0.  , 0.12,  nan])
        """
        uncertainty = np.full(len(data), np.nan)
        for batch, scores in self.scored(data):
            uncertainty[batch.index.numpy(force=True)] = scores
        return uncertainty

    @checked
    def scored(
        self, data: EmbeddingSource, rows: Tensor | None = None
    ) -> Iterator[tuple[Batch, NDArray[np.float64]]]:
        """Batches of the ``rows`` (by default all usable ones) on ``device_``, each with its uncertainty (B,) float64.

        Nothing as large as the data is held, so the data may be of any size. A batch keeps the
        zero-shot answer that the score has computed.

        Raises:
            DataError: If a score is not finite, or as ``predict_uncertainty``, whose other errors
                it raises, too.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], np.eye(2), logit_scale=10.0)
            >>> [
            ...     (batch.prediction.tolist(), u.round(2).tolist())
            ...     for batch, u in vilu.MCM().scored(data)
            ... ]
            [([0, 1], [0.0, 0.12])]
        """
        return each_as_usual(self._scored(data, rows))

    def _scored(
        self, data: EmbeddingSource, rows: Tensor | None
    ) -> Generator[tuple[Batch, NDArray[np.float64]], None, None]:
        self._check_ready(data)
        device = self.device_
        only_logits = self.looks_at == {"logits"}
        take, size = (
            (data.many, cached_rows(data.n_candidates))
            if only_logits
            else (data.batches, SCORING_BATCH)
        )
        for found in take(size, rows=rows, columns=self.columns_to_score):
            batch = found.to(device)
            if batch.text.shape[-2] < 2:  # also a pool of equal captions
                yield batch, np.full(len(batch.index), np.nan)
                continue
            with torch.no_grad():
                score = self.score_batch(batch).cpu().double().numpy()
            if broken := int(np.count_nonzero(~np.isfinite(score))):
                raise DataError(
                    f"{self.name} gave {broken} scores that are not finite: its weights are damaged. Refit it."
                )
            yield batch, score

    def score_batch(self, batch: Batch) -> Tensor:
        """(B,) uncertainty: the constant where there is one, else as ``_score``.

        Examples:
            >>> import numpy as np, vilu
            >>> batch = next(
            ...     vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], np.eye(2), logit_scale=10.0).batches(
            ...         2
            ...     )
            ... )
            >>> vilu.MCM().score_batch(batch).round(decimals=2).tolist()
            [0.0, 0.12]
        """
        if self.constant_ is not None:
            return torch.full((len(batch.index),), self.constant_, dtype=torch.float64)
        if self.network_ is not None:
            self.network_.to(batch.image.device)
        return self._score(batch)

    @property
    def fitted_space(self) -> EmbeddingSpace:
        """The embedding space, which is there after a fit."""
        if self.space_ is None:
            raise UsageError(
                f"this {self.name} knows no embedding space, so the logit scale of its graph is not known. "
                f"Make it with `vilu fit STORE --method {self.name}`."
            )
        return self.space_

    @property
    def network(self) -> nn.Module:
        """The network, which is there after a fit."""
        if self.network_ is None:
            raise DataError(
                f"this {self.name} holds no network: it was not fitted, or its file is damaged."
            )
        return self.network_

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """A learned tensor where the batch is."""
        return self.learned_[name].to(device)

    def seen(self, data: EmbeddingSource, rows: NDArray[np.int64] | None = None) -> Overlap:
        """Which ``rows`` (M,), by default all, were used to fit, as far as known: of more than 16,384 a sample is.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings(np.eye(3), np.eye(3), [0, 1, 2], ids=["a", "b", "c"])
            >>> predictor = vilu.PREDICTORS["knn_distance"]().fit(data.take([0, 1]))
            >>> predictor.seen(data).shared
            array([ True,  True, False])
        """
        by = common_identity(self.seen_, data.identified_by, ("the fit", "these"))
        rows = np.arange(len(data)) if rows is None else rows
        return (
            Overlap(np.zeros(len(rows), np.bool_), 0)
            if by is None
            else self.seen_[by].overlap(data, by, rows)
        )

    def unseen(self, data: EmbeddingSource, role: str) -> NDArray[np.bool_]:
        """(N,) the rows that were not used to fit; warns of those that were, a DataError above 1 %."""
        remedy = f"{LEARNED_FROM} Take rows that it has not seen."
        return self.seen(data).others(
            data, f"{role} rows", f"were used to fit this {self.name}", remedy
        )

    def _check_source(self, data: EmbeddingSource, columns: Sequence[str]) -> None:
        if self.no_captions is not None and data.pool_size is not None:
            raise UsageError(
                f"{self.name} does not work on image-caption pairs: {self.no_captions}."
            )
        for column in columns:
            if column not in data.columns:
                given = "" if column in SECOND else ", or give it to `vilu import`"
                raise DataError(
                    f"{self.name} needs the column {column!r}. Make it with `{HOW[column]}`{given}."
                )

    def _check_ready(self, data: EmbeddingSource) -> None:
        check_parameters(self)
        self._check_source(data, self.columns_to_score)
        self.require_fitted()
        if self.space_ is None:
            return
        self.space_.require_match(
            data.space, mine=f"the fitted {self.name}", theirs="the data to score"
        )
        if self.similarity_ and (self.space_.anonymous or data.space.anonymous):
            warn_of_other_space(data, *self.similarity_)

    # Probabilities.

    def predict_failure_probability(self, data: EmbeddingSource) -> NDArray[np.float64]:
        """P(failure) (N,) float64 of every row; see ``failure_probability``. Else as ``predict_uncertainty``.

        Raises:
            UsageError: If the uncertainty of this method is a score without a scale, and it has not
                been calibrated.

        Examples:
            >>> import numpy as np, vilu
            >>> data = vilu.Embeddings([[1.0, 0.0], [0.6, 0.8]], np.eye(2), logit_scale=10.0)
            >>> vilu.MCM().predict_failure_probability(data).round(2)
            array([0.  , 0.12])
        """
        self.failure_probability([])  # says why not, before anything is computed
        return self.failure_probability(self.predict_uncertainty(data))

    def failure_probability(self, uncertainty: ArrayLike) -> NDArray[np.float64]:
        """P(failure) (N,) float64 of uncertainties (N,) of this predictor; NaN stays NaN.

        Calibrated, where ``calibrate`` was called; else of methods whose uncertainty is a
        probability, without the bias of a weighted loss (``_log_weight``).

        Raises:
            UsageError: If the uncertainty of this method is a score without a scale, and it has not
                been calibrated.

        Examples:
            >>> import vilu
            >>> vilu.MCM().failure_probability([0.1, float("nan")]).round(2)
            array([0.1, nan])
        """
        if self.calibrator_ is None:
            return self.raw_failure_probability(uncertainty)
        return self.calibrator_(self._calibration_score(real_vector(uncertainty, "uncertainty")))

    def raw_failure_probability(self, uncertainty: ArrayLike) -> NDArray[np.float64]:
        """As ``failure_probability`` before ``calibrate``.

        Examples:
            >>> import vilu
            >>> predictor = vilu.MCM().calibrate_scores([0.1] * 40, [0, 0, 0, 1] * 10)
            >>> (
            ...     predictor.raw_failure_probability([0.1]).round(2),
            ...     predictor.failure_probability([0.1]).round(2),
            ... )
            (array([0.1]), array([0.25]))
        """
        if not self.is_probability:
            raise UsageError(
                f"{self.name} gives a score, not a probability of failure. Calibrate it (`vilu calibrate`), or take "
                "vilu_plus."
            )
        return expit(self._calibration_score(real_vector(uncertainty, "uncertainty")))

    @checked
    @as_usual()
    def calibrate(self, calibration: EmbeddingSource) -> Self:
        """Learn the probability of failure on labelled rows; those used to fit are left out, with a warning.

        Rows of one picture count once, as wrong where any of them is.

        Raises:
            DataError: If more than 1 % were used to fit, or none has an uncertainty and a known
                failure.

        Examples:
            >>> import numpy as np, vilu
            >>> angle = np.arange(40)  # forty pictures, all as far from both texts
            >>> image = np.c_[np.ones(40), np.zeros(40), np.cos(angle), np.sin(angle)] / 2**0.5
            >>> data = vilu.Embeddings(image, np.eye(2, 4), [0, 0, 0, 1] * 10)  # 3 of 4 are right
            >>> vilu.MCM().calibrate(data).predict_failure_probability(data)[:2].round(2)
            array([0.25, 0.25])
        """
        fresh = self.unseen(calibration, "calibration")
        uncertainty, failure = np.full(len(calibration), np.nan), np.full(len(calibration), UNKNOWN)
        for batch, scores in self.scored(calibration, scored_of(calibration, fresh)):
            rows = batch.index.numpy(force=True)
            uncertainty[rows], failure[rows] = scores, batch.failure.numpy(force=True)
        known = np.flatnonzero(fresh & np.isfinite(uncertainty) & (failure != UNKNOWN))
        picture = calibration.picture_identities(known)
        wrong = failure[known] if calibration.pool_size is None else np.zeros_like(known)
        rows = known[one_per_picture(picture, wrong)]
        counted = np.full(len(calibration), UNKNOWN)
        counted[rows] = failure[rows]
        return self.calibrate_scores(uncertainty[fresh], counted[fresh])

    def calibrate_scores(self, uncertainty: ArrayLike, failure: ArrayLike) -> Self:
        """As ``calibrate``, from uncertainties (N,) of this predictor and failures (N,); unknown ones are left out.

        Raises:
            DataError: If no row has both, or a failure is not 1, 0, or -1 where it is unknown.

        Examples:
            >>> import vilu
            >>> margin = vilu.Margin().calibrate_scores(
            ...     [-3.0, -2.0, -1.0, 0.0] * 10, [0, 0, 0, 1] * 10
            ... )
            >>> margin.failure_probability([-3.0, 0.0]).round(2)
            array([0.  , 0.83])
        """
        scores, failures = (
            real_vector(uncertainty, "uncertainty"),
            check_codes(failure, "failure", 1),
        )
        require_same_length(scores, failures)
        known = np.isfinite(scores) & (failures != UNKNOWN)
        if not known.any():
            raise DataError(
                f"none of the {len(scores)} calibration rows has an uncertainty and a known failure."
            )
        score = self._calibration_score(scores[known])
        self.calibrator_ = fit_calibrator(score, failures[known], is_log_odds=self.is_probability)
        return self

    def _calibration_score(self, uncertainty: NDArray[np.float64]) -> NDArray[np.float64]:
        """Log-odds without the bias of the loss where the uncertainty is a probability, else the uncertainty itself."""
        if not self.is_probability:
            return uncertainty
        u = np.clip(uncertainty, CERTAIN, 1 - CERTAIN)
        return np.log(u) - np.log1p(-u) - self._log_weight()


def own_graph(predictor: FailurePredictor) -> nn.Module:
    """The ``graph`` of a method whose ``_score`` looks at no values and no sizes."""
    return Graph(predictor._score, predictor.network_)
