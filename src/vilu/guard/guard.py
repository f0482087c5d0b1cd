"""Answers about images, with decisions: a predictor and a model behind one call."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Final, Literal

import torch
from PIL import Image
from torch import Tensor

from vilu.backbones.base import Backbone, DualEncoder, jpeg_side_of
from vilu.calibration.calibration import Calibration, require_new_row_guarantee
from vilu.calibration.likely import LikelyFlags, LikelyRight
from vilu.datasets.base import ImageRecord
from vilu.datasets.files import read_file
from vilu.datasets.images import (
    CONVERTIBLE_MODES,
    DEFAULT_LIMITS,
    BadImage,
    ImageLimits,
    convert_pillow_errors,
    to_rgb,
)
from vilu.device import torch_defaults
from vilu.embeddings.columns import ROW_COLUMNS
from vilu.embeddings.source import Batch, EmbeddingSource, log_posterior
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.guard.first_photos import FirstPhotos
from vilu.outcomes.decisions import REVIEW
from vilu.outcomes.outcomes import Outcomes
from vilu.predictors.contract.predictor import FailurePredictor
from vilu.predictors.contract.spread import is_shown_as_probability, quantiles_in_spread
from vilu.predictors.nn.attention import FEATURES
from vilu.predictors.persistence.files import SavedModel, folder_of
from vilu.predictors.persistence.storage import load_predictor
from vilu.predictors.persistence.vocabulary import Vocabulary
from vilu.progress import SilentProgress
from vilu.scoring.score import provenance_of, require_streaming, score_rows
from vilu.store.job import BackboneSpec
from vilu.store.manifest import IMAGE
from vilu.store.mapped import default_workers, map_in_threads
from vilu.store.parts import PartContent
from vilu.store.pipeline import END_OF_PART, Decoder, Encoder, ImageOrError
from vilu.validation import checked, require_at_least

MAX_RUNNERS_UP: Final = 2
"""Maximum number of runners-up per answer."""

RunnersUp = tuple[tuple[str, float], ...]
"""Pairs (class name, probability), the most likely class first."""

ImageLike = str | os.PathLike[str] | bytes | Image.Image
"""A path, the bytes of an encoded image, or a Pillow image."""

PNG_MODES: Final = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}
"""Modes of Pillow images that PNG stores without conversion."""


@dataclass(frozen=True)
class Answer:
    """Answer about an image, with a score and a decision.

    Attributes:
        key: The image's path. If the image has no path, the key is the number in the image list:
            "0", "1", and so on.
        label: The judged answer. None if the image could not be read.
        failure_probability: Probability that the answer is wrong. None without an answer. Also None
            if the predictor is not calibrated and the scores are not probabilities, as in a triage
            without labels.
        uncertainty: The predictor's score, higher = more likely wrong. None without an answer.
        decision: "accept" or "review". None if the predictor has no rule.
        reason: Why the answer is not accepted ("above_threshold", "outside", "not_certified"), or
            the image's fault ("truncated", "bomb", "read_error", ...). None if the answer is
            accepted.
        runners_up: The next most likely answers with their probabilities, the most likely first. If
            adapted answers are judged, the probabilities come from the predictor's posterior,
            otherwise from the zero-shot posterior.
        zero_shot: The zero-shot answer if different from ``label``, otherwise None.
        likely: Whether the answer is likely right: an estimate, not a guarantee
            (``vilu.calibration.likely``). The estimate never changes the decision. None if there is
            no estimate, or no answer.
        quantile: Share of photos that are at most as doubtful as this image, from 0 to 1. A guard
            compares the image with the photos that the predictor was fitted on. None if the
            predictor has learned from labels, because such a predictor gives a probability.

    Examples:
        >>> import vilu
        >>> answer = vilu.Answer(
        ...     key="a.jpg",
        ...     label="cat",
        ...     failure_probability=0.03,
        ...     uncertainty=0.2,
        ...     decision="accept",
        ...     reason=None,
        ... )
        >>> f"{answer.label}, wrong with probability {answer.failure_probability}"
        'cat, wrong with probability 0.03'
    """

    key: str
    label: str | None
    failure_probability: float | None
    uncertainty: float | None
    decision: str | None
    reason: str | None
    runners_up: RunnersUp = ()
    zero_shot: str | None = None
    likely: bool | None = None
    quantile: float | None = None


@dataclass(frozen=True)
class ImageModel:
    """A model with decoder and encoder, to embed images in the same way as ``vilu embed``."""

    backbone: Backbone
    widths: dict[str, int]  # maps the names of embedding arrays to column counts
    encoder: Encoder
    decoder: Decoder
    first_photos: FirstPhotos | None = None  # compares the first photos with float32, if needed

    def embed(self, batch: Sequence[ImageOrError | None]) -> PartContent:
        """Embed decoded images. Bad images are listed in the result's ``errors``."""
        content = self.encoder.encode_part(iter([*batch, END_OF_PART]))
        if self.first_photos is not None:
            self.first_photos.compare(batch, content)
        return content


class Guard:
    """Gives answers about images by a predictor and a model, and decides about each answer.

    - The folder of the predictor also holds the candidate classes, as written by ``vilu triage``
      and ``vilu calibrate``.
    - The model must be the model that the predictor was fitted on. Fingerprints of weights,
      preprocessing and prompts are compared.
    - Images are decoded in threads and embedded in batches. More images need no more memory.
    - The scores equal the scores by ``vilu embed`` and ``vilu score`` up to rounding. The rounding
      differs because the batch size decides the order in which numbers are summed.
    - The answer about a bad image has a reason and no label.
    - A rule about whole batches (``--method selection``) cannot decide about a single image, so
      such a rule is refused.
    - Any number of threads may use a guard at once.

    Attributes:
        folder: The predictor's folder.
        predictor: Gives the scores.
        calibration: Gives the decisions. None if the predictor is not calibrated.
        likely: Estimates which answers are likely right. None if the folder has no estimate.
        vocabulary: The candidate classes for the answers.
        names: The candidate classes' names.
        arrays: Names of the embedding arrays for the predictor.

    Args:
        predictor: A predictor's folder, or a calibrated ``vilu.Selective``.
        models: Folder with one sub-folder per named backbone, in place of the model hub.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        batch_size: Number of images per forward pass.
        workers: Number of decoding threads, by default one per core.
        limits: Limits on the image size.
        backbone: A loaded model with the same weights, in place of the model named in the folder.
        precision: "fp32" or "bf16", for the model named in the folder. By default, the precision in
            which the photos for the fit were embedded. If that is float32 and the guard runs in
            bf16, the guard embeds its first 64 photos in both precisions and compares them.
        vectors_only: Load no model. Then only the method ``answer`` can be called, with embeddings.

    Raises:
        DataError: If the folder holds no predictor or no candidates, or if the candidates have no
            names.
        UsageError: If the rule needs all images at once, or if the predictor uses several views per
            image.
        ProvenanceError: If the predictor was fitted on another model, or if the rule is about the
            photos in one folder (``vilu triage --about folder``).
        MissingModelError: If the model is not on this machine.

    Examples:
        >>> import numpy as np, pathlib, tempfile, torch, vilu
        >>> from PIL import Image
        >>> from vilu.backbones.base import DualEncoder
        >>> from vilu.predictors.persistence.vocabulary import Vocabulary
        >>> space = vilu.EmbeddingSpace(3, logit_scale=10.0)
        >>> names, text = ("red", "green", "blue"), torch.eye(3)
        >>> def pixels_of(image):
        ...     return torch.tensor(np.array(image.convert("RGB")) / 255).permute(2, 0, 1).float()
        >>> model = DualEncoder(  # your own model: the embedding of an image is its mean colour
        ...     space,
        ...     torch.device("cpu"),
        ...     transform=pixels_of,
        ...     image_tower=lambda pixels: pixels.mean(dim=(2, 3)),
        ...     text_tower=lambda texts: text,
        ...     truncates=lambda texts: [False] * len(texts),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:  # `vilu triage` writes such a folder
        ...     _ = vilu.MCM().save(folder)
        ...     Vocabulary(names, text, space, "float32", {}).save(pathlib.Path(folder))
        ...     guard = vilu.Guard(folder, backbone=model, workers=1)
        >>> red, yellow = (Image.new("RGB", (8, 8), colour) for colour in ("red", "yellow"))
        >>> answers = guard([red, yellow])
        >>> [answer.label for answer in answers]
        ['red', 'red']
        >>> # yellow is as near to red as to green
        >>> [round(answer.failure_probability, 2) for answer in answers]
        [0.0, 0.5]
    """

    # `transformers.pipeline` reads this attribute from a model.
    config: ClassVar[SimpleNamespace] = SimpleNamespace(_commit_hash=None)

    @checked
    @torch_defaults()
    def __init__(  # noqa: PLR0913 - one keyword per flag of the command
        self,
        predictor: str | os.PathLike[str] | SavedModel,
        *,
        models: str | os.PathLike[str] | None = None,
        device: str = "auto",
        batch_size: int = 32,
        workers: int | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
        backbone: Backbone | None = None,
        precision: Literal["fp32", "bf16"] | None = None,
        vectors_only: bool = False,
    ) -> None:
        if workers is None:
            workers = default_workers()
        require_at_least("batch_size", batch_size, 1)
        require_at_least("workers", workers, 1)
        if not isinstance(backbone, Backbone | None):
            raise UsageError(
                f"backbone must be a model as vilu.load_backbone gives it. Got {backbone!r:.60} "
                "instead."
            )
        # A garbage-collected ``Selective`` removes the predictor's folder. So the guard holds a
        # reference to the ``Selective``.
        self._saved_model = predictor
        self.folder = folder_of(predictor)
        self.batch_size = batch_size
        self.workers = workers
        self.predictor = load_predictor(self.folder)
        self.calibration = Calibration.find(self.folder)
        require_streaming(self.calibration)
        if self.calibration is not None:
            require_new_row_guarantee(self.calibration.rule)
        self.likely = LikelyRight.find(self.folder)
        self.vocabulary = Vocabulary.load(self.folder)
        self.names = self._require_names()
        self.arrays = self._require_arrays()
        self._model: ImageModel | None = None
        if not vectors_only:
            if backbone is None:
                backbone = self._load_backbone(models, device, precision)
            self._model = self._open_model(backbone, limits)

    def _require_names(self) -> tuple[str, ...]:
        """Return the class names. Raise DataError if the classes have no names."""
        names = self.vocabulary.names
        if names is None:
            raise DataError(
                f"the classes of {self.folder} have no names, so there is no answer in words. Give "
                "class_names to vilu.Embeddings, and calibrate again."
            )
        return names

    def _require_arrays(self) -> tuple[str, ...]:
        """Return the names of the embedding arrays that the predictor uses.

        Raises:
            ProvenanceError: If calibration, predictor and candidates do not belong together.
            UsageError: If the predictor uses an array that cannot be made from a single image.
        """
        if self.calibration is not None:
            # only predictor and candidates are compared, so the source needs no rows
            no_rows = torch.empty(0, self.vocabulary.space.embed_dim, dtype=torch.float32)
            source = self.vocabulary.new_images(no_rows)
            self.calibration.require_match(self.predictor, source)
        if self.predictor.space_ is not None:
            self.predictor.space_.require_match(
                self.vocabulary.space,
                name=f"the predictor in {self.folder}",
                other_name="its candidates",
            )
        columns = {*self.predictor.columns_to_score, *self.predictor.answer_columns}
        row_columns = columns & ROW_COLUMNS  # without the candidates' columns
        impossible_columns = sorted(row_columns - {FEATURES})
        if impossible_columns:
            listed_columns = ", ".join(impossible_columns)
            raise UsageError(
                f"this {self.predictor.name} uses {listed_columns}, which cannot be "
                "made from one image. Embed and score with `vilu embed` and `vilu score`."
            )
        return (IMAGE, *sorted(row_columns))

    def _load_backbone(
        self, models: str | os.PathLike[str] | None, device: str, precision: str | None
    ) -> Backbone:
        """Load the model that the predictor was fitted on."""
        space = self.vocabulary.space
        if space.backbone is None:
            raise ProvenanceError(
                "this predictor was fitted on arrays of a model that is not named, so no image can "
                "be embedded for it. Give the model: vilu.Guard(folder, backbone=...)."
            )
        folder: Path | None = None
        if models is not None:
            folder = Path(models).absolute()
        if precision is None:
            precision = space.precision or "fp32"
        full_decode = not space.reduces_jpegs
        spec = BackboneSpec(
            name=space.backbone,
            device=device,
            precision=precision,
            models=folder,
            full_decode=full_decode,
        )
        return spec.load()

    def _open_model(self, backbone: Backbone, limits: ImageLimits) -> ImageModel:
        """Return an image model for the predictor's arrays."""
        require_same_model(self, backbone)
        all_widths = {IMAGE: self.vocabulary.space.embed_dim, FEATURES: backbone.feature_dim}
        widths = {name: all_widths[name] for name in self.arrays}
        row_shapes = {name: (width,) for name, width in widths.items()}
        encoder = Encoder(
            backbone,
            self.batch_size,
            strict=False,
            task=SilentProgress(),
            row_shapes=row_shapes,
            dtype=self.vocabulary.dtype,
        )
        jpeg_side = jpeg_side_of(backbone)
        decoder = Decoder(backbone.preprocess, limits, len(self.names), jpeg_side=jpeg_side)
        first_photos = None
        precision = backbone.space.precision or "fp32"
        is_below_fit = precision not in {"fp32", self.vocabulary.space.precision}
        if is_below_fit and isinstance(backbone, DualEncoder):
            float32_backbone = backbone.in_float32()
            float32_encoder = replace(encoder, backbone=float32_backbone)
            first_photos = FirstPhotos(precision, float32_encoder, self._answer_photos)
        return ImageModel(backbone, widths, encoder, decoder, first_photos)

    def _answer_photos(self, content: PartContent) -> list[Answer]:
        """Return answers about embedded photos."""
        keys = [row.key for row in content.metadata]
        arrays = join_arrays(content)
        answers, _ = self.answer(arrays, keys)
        return answers

    @property
    def model(self) -> ImageModel:
        """The model with decoder and encoder. UsageError if the guard is for vectors only."""
        if self._model is None:
            raise UsageError(
                f"this guard of {self.folder} was opened with vectors_only, so it has no model "
                "that reads images. Open it without vectors_only."
            )
        return self._model

    @property
    def backbone(self) -> Backbone:
        """The model."""
        return self.model.backbone

    def __call__(self, images: Iterable[ImageLike]) -> list[Answer]:
        """Return one answer per image, in the given order."""
        if isinstance(images, str | bytes | os.PathLike | Image.Image):
            raise UsageError("give a list of images, even for a single image: guard([image]).")
        return list(self.stream(images))

    def columns(self, images: Iterable[ImageLike]) -> dict[str, list[Any]]:
        """Return answers about images as columns, in the form for ``datasets.Dataset.map``.

        ``dataset.map(lambda rows: guard.columns(rows["image"]), batched=True)`` adds a column for
        every ``Answer`` attribute except ``key``.
        """
        answers = self(images)
        columns = {}
        for field in fields(Answer):
            if field.name != "key":
                columns[field.name] = [getattr(answer, field.name) for answer in answers]
        return columns

    def stream(self, images: Iterable[ImageLike]) -> Iterator[Answer]:
        """Yield one answer per image, in the given order, batch by batch."""
        records = ((index, make_record(index, image)) for index, image in enumerate(images))
        n_decoded_ahead = self.batch_size + self.workers  # maximum number of waiting decoded images
        with map_in_threads(
            self.model.decoder, records, self.workers, n_decoded_ahead
        ) as images_or_errors:
            batch = list(islice(images_or_errors, self.batch_size))
            while batch:
                yield from self._answer_batch(batch)
                batch = list(islice(images_or_errors, self.batch_size))

    def _answer_batch(self, batch: Sequence[ImageOrError | None]) -> list[Answer]:
        """Return one answer per decoded image, in the batch's order."""
        content = self.model.embed(batch)
        answer_of_position: dict[int, Answer] = {}  # maps an image's position to the answer
        for error in content.errors:
            answer_of_position[error.position] = answer_without_score(
                self, error.key, reason=error.kind
            )
        if content.metadata:
            for metadata, answer in zip(
                content.metadata, self._answer_photos(content), strict=True
            ):
                answer_of_position[metadata.position] = answer
        return [answer_of_position[position] for position in sorted(answer_of_position)]

    @torch_defaults()
    def answer(
        self, arrays: Mapping[str, Tensor], keys: Sequence[str]
    ) -> tuple[list[Answer], Outcomes]:
        """Return answers about embedded rows, and the rows' scores as outcomes.

        Args:
            arrays: The arrays named in the attribute ``arrays``: embeddings (B, D), and for some
                predictors features (B, F).
            keys: Names of the B rows.

        Examples:
            >>> import pathlib, tempfile, torch, vilu
            >>> from vilu.predictors.persistence.vocabulary import Vocabulary
            >>> space = vilu.EmbeddingSpace(3, logit_scale=10.0)
            >>> names, text = ("red", "green", "blue"), torch.eye(3)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = vilu.MCM().save(folder)
            ...     Vocabulary(names, text, space, "float32", {}).save(pathlib.Path(folder))
            ...     guard = vilu.Guard(folder, vectors_only=True)
            >>> image = torch.tensor([[0.0, 1.0, 0.0]])  # the embedding of "green"
            >>> guard.arrays
            ('img_emb',)
            >>> answers, outcomes = guard.answer({"img_emb": image}, keys=["a.jpg"])
            >>> answers[0].label, outcomes.uncertainty.round(4).tolist()
            ('green', [0.0001])
        """
        columns = {}
        for name in self.arrays:
            array = arrays[name].float()
            columns[name] = array.to(self.predictor.device_)
        image = columns.pop(IMAGE)  # the remaining arrays stay in ``columns``
        source = self.vocabulary.new_images(image, columns=columns, ids=keys)
        origin_fields = {
            "is_probability": is_shown_as_probability(self.predictor),
            "provenance": provenance_of(self.calibration),
        }
        outcomes = score_rows(
            self.predictor,
            source,
            origin_fields,
            calibration=self.calibration,
            task=SilentProgress(),
        )
        runners_up = self._runners_up(source, n_rows=len(keys))
        likely = self._likely_flags(outcomes)
        answers = []
        for row in range(len(keys)):
            answers.append(self._answer_of_row(outcomes, row, runners_up[row], likely[row]))
        return answers, outcomes

    def _runners_up(self, source: EmbeddingSource, n_rows: int) -> list[RunnersUp]:
        """Return the runners-up for each row in a source with ``n_rows`` rows."""
        device = self.predictor.device_
        runners_up: list[RunnersUp] = [()] * n_rows
        # The batches have only the usable rows. Any other row has no runner-up.
        for batch in source.batches(n_rows, columns=self.predictor.columns_to_score):
            runners_up_of_batch = runners_up_of(self.predictor, batch.to(device), self.names)
            rows_of_batch = batch.index.tolist()
            for row, runners_up_of_row in zip(rows_of_batch, runners_up_of_batch, strict=True):
                runners_up[row] = runners_up_of_row
        return runners_up

    def _likely_flags(self, outcomes: Outcomes) -> LikelyFlags:
        """Return for every row whether the answer is likely right, or None without an estimate."""
        if self.likely is None:
            return [None] * len(outcomes)
        return self.likely.flags_of_new_rows(outcomes.uncertainty)

    def _answer_of_row(
        self, outcomes: Outcomes, row: int, runners_up: RunnersUp, likely: bool | None
    ) -> Answer:
        """Return the answer about a row in the outcomes."""
        key = _text_of_row(outcomes.ids, row) or ""
        uncertainty = float(outcomes.uncertainty[row])
        if math.isnan(uncertainty):
            return answer_without_score(self, key, reason=_text_of_row(outcomes.reason, row))
        probability = _probability_of(outcomes, row)
        quantile: float | None = None
        if probability is None:
            one_uncertainty = outcomes.uncertainty[[row]]  # an array of length 1
            quantiles = quantiles_in_spread(self.predictor, one_uncertainty)
            if quantiles is not None:
                quantile = float(quantiles[0])
        label: str | None = None
        if outcomes.prediction is not None:
            label = self.names[int(outcomes.prediction[row])]
        return Answer(
            key=key,
            label=label,
            failure_probability=probability,
            uncertainty=uncertainty,
            decision=_text_of_row(outcomes.decision, row),
            reason=_text_of_row(outcomes.decision_reason, row),
            runners_up=runners_up,
            zero_shot=outcomes.zero_shot_beside(row),
            likely=likely,
            quantile=quantile,
        )

    def __repr__(self) -> str:
        rule = "no rule"
        if self.calibration is not None and self.calibration.guarantee_text is not None:
            rule = self.calibration.guarantee_text
        return f"Guard({self.predictor!r}, {self.vocabulary.space.backbone}, {rule})"


def _probability_of(outcomes: Outcomes, row: int) -> float | None:
    """Return a row's failure probability. Return None if the outcomes have no probabilities."""
    if outcomes.failure_probability is not None:
        return float(outcomes.failure_probability[row])
    if outcomes.is_probability:
        return float(outcomes.uncertainty[row])
    return None


def require_same_model(guard: Guard, backbone: Backbone) -> None:
    """Raise ProvenanceError if a guard's predictor was fitted on a different model."""
    guard.vocabulary.space.require_match(
        backbone.space, name=str(guard.folder), other_name=f"the model {backbone.space.backbone}"
    )


def answer_without_score(guard: Guard, key: str, reason: str | None) -> Answer:
    """Return a guard's answer about an image without a score."""
    decision: str | None = None
    if guard.calibration is not None and guard.calibration.has_rule:
        decision = REVIEW
    return Answer(
        key=key,
        label=None,
        failure_probability=None,
        uncertainty=None,
        decision=decision,
        reason=reason,
    )


def _text_of_row(texts: Sequence[str | None] | None, row: int) -> str | None:
    """Return a row's text in a text column. Return None if the outcomes have no such column."""
    if texts is None:
        return None
    return texts[row]


def join_arrays(content: PartContent) -> dict[str, Tensor]:
    """Join the blocks of each embedding array. Return the arrays by name."""
    return {name: torch.cat(blocks) for name, blocks in content.array_blocks.items()}


def runners_up_of(
    predictor: FailurePredictor, batch: Batch, names: Sequence[str]
) -> list[RunnersUp]:
    """Return every row's runners-up: the most likely answers except the judged answer.

    If the predictor judges adapted answers, the probabilities come from the predictor's posterior,
    otherwise from the zero-shot posterior.
    """
    log_posterior_of: Callable[[Batch], Tensor] = log_posterior
    if predictor.answer == "adapted":
        log_posterior_of = predictor.log_posterior
    judged_batch = predictor.judged(batch)  # in this batch, ``prediction`` is the judged answer
    n_classes = len(batch.text)
    if len(batch.index) == 0 or n_classes < 2:
        return [()] * len(batch.index)
    with torch.no_grad():
        posterior = log_posterior_of(judged_batch).exp()
    answer = judged_batch.prediction.to(posterior.device)[:, None]
    # The judged answer gets -1, which is below all other probabilities. There are at least k other
    # answers, so the judged answer is never among the k likeliest.
    masked_posterior = posterior.scatter(1, answer, -1.0)
    k = min(MAX_RUNNERS_UP, n_classes - 1)
    likeliest = masked_posterior.topk(k, dim=1)
    index_rows = likeliest.indices.tolist()
    probability_rows = likeliest.values.tolist()
    runners_up: list[RunnersUp] = []
    for indices, probabilities in zip(index_rows, probability_rows, strict=True):
        labels = [names[index] for index in indices]
        runners_up.append(tuple(zip(labels, probabilities, strict=True)))
    return runners_up


def make_record(index: int, image: ImageLike) -> ImageRecord:
    """Return an image's record. The key is the path, or without a path ``index``."""
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        read = partial(read_file, path)
        return ImageRecord(str(path), label=None, read=read)
    if isinstance(image, bytes):
        return ImageRecord(str(index), label=None, read=lambda: image)
    if isinstance(image, Image.Image):
        read = partial(_png_bytes, image)
        return ImageRecord(str(index), label=None, read=read)
    raise UsageError(
        f"an image is a path, encoded bytes or a picture of Pillow. Got {type(image).__name__} at "
        f"index {index}."
    )


def _png_bytes(image: Image.Image) -> bytes:
    """Encode a Pillow image as PNG, so that it is decoded and checked like all images.

    Raises:
        BadImage: If the image is damaged, or has no pixels.
    """
    if 0 in image.size:
        raise BadImage(
            f"{image.width} x {image.height} pixels", stage="geometry", kind="bad_geometry"
        )
    buffer = io.BytesIO()
    with convert_pillow_errors("decode", "damaged pixels"):
        image.load()  # Pillow may have read only the header so far
        if image.mode not in PNG_MODES:
            image = _in_rgb(image)
        image.save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _in_rgb(image: Image.Image) -> Image.Image:
    """Convert a loaded Pillow image to RGB. ``CONVERTIBLE_MODES`` are converted as in files."""
    if image.mode not in CONVERTIBLE_MODES:
        return image.convert("RGB")
    rgb_image, _ = to_rgb(image)
    return rgb_image
