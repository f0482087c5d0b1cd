"""The JSON files in a store: the run with its inputs, receipts, the class table, the manifest."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor

from vilu.artifacts.documents import Document, FrozenModel
from vilu.artifacts.hashing import digest
from vilu.backbones.base import Backbone
from vilu.backbones.zeroshot import embed_names, embed_prompts, fill_templates
from vilu.embeddings.checks import require_usable_rows
from vilu.embeddings.columns import ANSWER, LOGITS
from vilu.embeddings.space import FULL_DECODE_ADVICE, EmbeddingSpace
from vilu.errors import ProvenanceError
from vilu.store.ledger import AnyReceipt, Count, FileInfo


class StoreDocument(Document):
    """Base class for the JSON files in a store."""

    remedy = "Run `vilu embed` (or `vilu import`) again"


OTHER_FILES_ADVICE: Final = (
    "The image files have other names, labels, sizes or modification times than before. Copies of "
    "the same files are recognised if they keep their times (`cp -p`)."
)

MIN_AREA_SHARE = 0.5  # a view shows at least this share of the image area


class Views(FrozenModel):
    """V random crops from each image, mirrored with probability 1/2, before the preprocessing.

    A crop has the image's aspect ratio, so that the preprocessing treats crop and image alike. The
    crop area is a uniform share in [1/2, 1] of the image area. The crop position is uniform. View v
    depends only on the image, the image key, v and the seed.
    """

    n: Annotated[int, Field(ge=1)]  # number of views per image, V
    seed: int = 0  # seed for the views
    # fixed text about the random crops. As a field, it is one of the store's inputs.
    recipe: Literal["crop of 0.5 to 1 of the area, mirrored with probability 0.5"] = (
        "crop of 0.5 to 1 of the area, mirrored with probability 0.5"
    )

    def make_views(self, image: Image.Image, key: str) -> list[Image.Image]:
        """Return the V views of an image. The image key determines the crops."""
        views: list[Image.Image] = []
        for view_number in range(self.n):
            area_draw, left_draw, top_draw, mirror_draw = _uniform_numbers(
                self.seed, view_number, key
            )
            views.append(make_view(image, area_draw, left_draw, top_draw, mirror_draw))
        return views


def make_view(
    image: Image.Image, area_draw: float, left_draw: float, top_draw: float, mirror_draw: float
) -> Image.Image:
    """Return a crop from an image, possibly mirrored. All four draws are uniform in [0, 1).

    Args:
        image: The image.
        area_draw: Decides the crop's area.
        left_draw: Decides the crop's left edge.
        top_draw: Decides the crop's upper edge.
        mirror_draw: The crop is mirrored if this number is below 1/2.
    """
    share_of_area = MIN_AREA_SHARE + (1 - MIN_AREA_SHARE) * area_draw
    share_of_side = math.sqrt(share_of_area)
    width = max(round(share_of_side * image.width), 1)
    height = max(round(share_of_side * image.height), 1)
    # The n possible offsets are 0 to n - 1. The product of n and a draw is below n, because a draw
    # is below 1.
    n_offsets_x = image.width - width + 1
    n_offsets_y = image.height - height + 1
    x = int(left_draw * n_offsets_x)
    y = int(top_draw * n_offsets_y)
    view = image.crop((x, y, x + width, y + height))
    if mirror_draw < 0.5:
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view


def _uniform_numbers(seed: int, view_number: int, key: str) -> tuple[float, float, float, float]:
    """Return four uniform numbers in [0, 1) for view ``view_number`` of the image ``key``.

    The numbers come from a hash. Unlike a random generator, a hash gives the same numbers in every
    library version.
    """
    text = f"{seed} {view_number} {key}"
    text_bytes = text.encode("utf-8", "surrogatepass")
    digest_bytes = hashlib.sha256(text_bytes).digest()
    # the hash's 256 bits as four whole numbers with 64 bits
    whole_numbers = np.frombuffer(digest_bytes, "<u8")
    # A float64 has 53 bits of precision, so only the upper 53 of 64 bits are used: the lowest 11
    # are dropped. Then nothing is rounded.
    upper_bits = whole_numbers >> np.uint64(11)
    area, left, top, mirror = upper_bits * 2.0**-53
    return float(area), float(left), float(top), float(mirror)


CLASSES_FILE = "classes.json"  # file with the class table
TEXT_FILE: Final = "text_emb/classes.npy"  # file with the text embeddings for the classes
IMAGE: Final = "img_emb"
"""Name of the array with image embeddings. A column's array has the column name."""

# name of the array with caption embeddings, in stores with captions
CAPTION: Final = "text_emb"
# Maximum number of parts. File systems are slow with more files, and without a limit a forged
# ``run.json`` could ask for endless work.
MAX_PARTS = 1_000_000

SHARED_FIELDS = ("names", "folders", "templates", "features", "prompts", "negatives")
"""Names of the fields that ``StoredClasses`` copies from ``Run``."""

ClassColumn = Literal[
    "prompts", "text_features", "image_projection", "text_projection", "negatives", "second_text"
]
"""Columns with an entry per class or word, or with a map of the model. Each has its own file."""
ImageColumn = Literal["features", "views", "second_image", "logits", "answer"]
"""Columns with an entry per image. "answer" is a metadata column. The rest are arrays."""


class ImportFacts(FrozenModel):
    """Facts about imported embeddings, as opposed to embeddings computed by vilu."""

    # name of every imported image column -> row shape
    columns: dict[ImageColumn, tuple[Annotated[int, Field(ge=1)], ...]] = Field(
        default_factory=dict
    )
    # Whether the rows had identifiers. If not, the keys are row numbers and identify no image.
    ids: bool
    source: str | None = None  # origin of the embeddings, in the user's words


class StoreInputs(StoreDocument):
    """All inputs that decide a store's content. The hash of all inputs is the run's fingerprint.

    Batch size, device and thread count are no inputs, because they change values only by rounding.
    Also, a run that ran out of memory must be able to resume with smaller batches.
    """

    dataset_fingerprint: str  # hash of the image listing or the shard names
    # Number of images, readable or not. 0 if there are shards, because then the number is known
    # only at the end (``Manifest.n_in``).
    n_in: Count
    split: str | None  # name of the split, if any
    space: EmbeddingSpace  # the embedding space, with the known facts about the model
    # The K class names as spelled in the prompts. Empty if captions are the candidates.
    names: tuple[str, ...]
    # The K class names as spelled in the data set. None if the data set has no labels.
    folders: tuple[str, ...] | None
    templates: tuple[str, ...]  # prompt templates, empty if there are no classes
    limits: dict[str, float]  # limits on the images (``ImageLimits``)
    part_size: Annotated[int, Field(ge=1)]  # images per part, or shards per part
    dtype: Literal["float16", "float32"]  # number format of the image arrays
    # width F of each image's stored features. None if features are not stored.
    features: Annotated[int, Field(ge=1)] | None = None
    views: Views | None = None  # augmented views to embed, if any
    prompts: tuple[str, ...] = ()  # templates for the column ``prompts``
    # words for the column ``negatives``, embedded in ``templates``. The words need not be classes.
    negatives: tuple[str, ...] = ()
    # Whether images have captions. If so, the captions are embedded, and there are no classes.
    captions: bool = False
    # number of shards, if parts consist of shards. 0 if parts consist of images.
    shards: Count = 0
    # folders or labels in the data set for images outside all classes
    outside: tuple[str, ...] = ()
    imported: ImportFacts | None = None  # facts about imported embeddings. None: not imported.

    @model_validator(mode="after")
    def _check_number_of_parts(self) -> Self:
        if self.n_units > self.part_size * MAX_PARTS:
            unit = "shards" if self.shards else "images"
            raise ValueError(
                f"part_size={self.part_size} makes more than {MAX_PARTS} parts of {self.n_units} "
                f"{unit}"
            )
        return self

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        class_fields = (self.names, self.folders, self.templates, self.prompts, self.negatives)
        if self.captions and any(class_fields):
            raise ValueError(
                "with captions there are no classes, so there can be no names, templates, prompts "
                "or negatives"
            )
        return self

    @property
    def n_units(self) -> int:
        """Number of shards if parts are made of shards, or else number of images."""
        return self.shards or self.n_in

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Maps each image array to the row shape. Image embeddings come first."""
        dim = self.space.embed_dim
        shapes: dict[str, tuple[int, ...]] = {}
        if dim > 0:  # 0 means that the rows have logits and no embeddings
            shapes[IMAGE] = (dim,)
        if self.imported is not None:
            for name, shape in self.imported.columns.items():
                if name != ANSWER:
                    shapes[str(name)] = shape
            return shapes
        if self.captions:
            shapes[CAPTION] = (dim,)
        if self.features is not None:
            shapes["features"] = (self.features,)
        if self.views is not None:
            shapes["views"] = (self.views.n, dim)
        return shapes

    @property
    def has_texts(self) -> bool:
        """Whether the candidates have embeddings. If not, the rows have logits."""
        return LOGITS not in self.row_shapes

    @property
    def has_answers(self) -> bool:
        """Whether the metadata hold an answer by another model for every row."""
        return self.imported is not None and ANSWER in self.imported.columns

    @property
    def has_picture_column(self) -> bool:
        """Whether the metadata have the column ``picture``: a digest of every image."""
        return self.imported is None

    def fingerprint_fields(self) -> dict[str, object]:
        """Return the fields for the fingerprint. Names of nested fields have a dot.

        For example, "space.weights" is the field ``weights`` of ``space``.
        """
        # only fields in ``StoreInputs``, not the further fields in subclasses such as ``Run``
        covered_names = set(StoreInputs.model_fields)
        if self.shards:
            # With shards, the run's ``n_in`` is 0. The manifest's ``n_in`` is the number of images.
            # Without ``n_in``, run and manifest have the same fingerprint.
            covered_names.remove("n_in")
        flat_fields: dict[str, object] = {}
        covered_fields = self.model_dump(mode="json", include=covered_names)
        for name, value in covered_fields.items():
            if not isinstance(value, dict):
                flat_fields[name] = value
                continue
            for nested_name, nested_value in value.items():
                flat_fields[f"{name}.{nested_name}"] = nested_value
        return flat_fields

    def require_match(self, new_inputs: StoreInputs, store_path: Path) -> None:
        """Raise ProvenanceError if ``new_inputs`` differ from an existing store's inputs.

        ``self`` are the existing store's inputs. ``store_path`` is for the message.
        """
        old_fields = self.fingerprint_fields()
        new_fields = new_inputs.fingerprint_fields()
        differences: list[str] = []
        for name in old_fields | new_fields:
            old_value = old_fields.get(name)
            new_value = new_fields.get(name)
            if old_value != new_value:
                # at most 120 characters of each value, because a list of names may be long
                differences.append(f"{name} was {old_value!r:.120} and is now {new_value!r:.120}")
        if differences:
            advice = "Give another output folder, or --overwrite to replace this one."
            if self.space.differs_by_decoding(new_inputs.space):
                advice = f"{FULL_DECODE_ADVICE} {advice}"
            has_other_images = self.dataset_fingerprint != new_inputs.dataset_fingerprint
            if has_other_images and self.imported is None:
                advice = f"{OTHER_FILES_ADVICE} {advice}"
            raise ProvenanceError(
                f"{store_path} was made from other inputs: {'; '.join(differences)}. "
                f"Nothing was changed. {advice}"
            )


class Run(StoreInputs):
    """``run.json``, the first file in a store."""

    # with a damaged run.json, the run cannot be resumed and must be replaced
    remedy = f"{StoreDocument.remedy} with --overwrite"

    fingerprint: str  # hash of the inputs
    dataset: str  # the data set's short name, for reports: the last part of the source's path
    vilu: str  # vilu's version at the beginning of the run

    @model_validator(mode="after")
    def _check_fingerprint(self) -> Self:
        input_fields = self.fingerprint_fields()
        if self.fingerprint != digest(input_fields):
            raise ValueError("the fingerprint does not match the inputs")
        return self


class CountedDocument(StoreDocument):
    """Image counts. Every image is either a row or an error."""

    n_in: Count  # number of images
    n_ok: Count  # number of rows
    n_error: Count  # number of errors
    errors: dict[str, Count]  # error kind -> number of errors

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        do_images_add_up = self.n_in == self.n_ok + self.n_error
        do_kinds_add_up = self.n_error == sum(self.errors.values())
        if not do_images_add_up or not do_kinds_add_up:
            raise ValueError(
                f"n_in={self.n_in} is not n_ok={self.n_ok} plus n_error={self.n_error} "
                f"({self.errors})"
            )
        return self


class ArrayInfo(FileInfo):
    """Size and SHA-256 of a file with a float32 array, and the array's shape."""

    shape: tuple[Count, ...]


class Receipt(AnyReceipt, CountedDocument):
    """``receipts/00000.json``, the receipt for a part, written after the part's files.

    A part is done if the receipt exists and all files have the sizes in the receipt.
    """

    fingerprint: str  # fingerprint of the run
    part: Count  # number of the part
    start: Count  # position of the part's first image, or number of its first shard
    stop: Count  # position after the part's last image, or number after its last shard
    files: dict[str, FileInfo]  # name of each file in the part -> size and hash
    batch_size: Annotated[int, Field(ge=1)]  # images per forward pass
    # Fingerprint of the part's shards (``ShardedDataset.shard_fingerprint``), computed before the
    # shards were read. Empty if parts are made of images.
    source: str = ""


class StoredClasses(StoreDocument):
    """``classes.json``: the K candidates, and the settings for the text embeddings."""

    names: tuple[str, ...]  # class names as spelled in the prompts
    folders: tuple[str, ...] | None  # class names as spelled in the data set
    # Prompt templates. A class's text embedding is the normalised mean of the class's prompts.
    templates: tuple[str, ...]
    tokenizer: str | None  # description of the tokenizer
    text_emb: Literal["text_emb/classes.npy"] = TEXT_FILE  # file with (K, D) float32 embeddings
    text_file: FileInfo  # size and hash of the file ``text_emb``
    features: int | None = None  # width of the image features, as in the run
    prompts: tuple[str, ...] = ()  # templates for the column ``prompts``
    negatives: tuple[str, ...] = ()  # words for the column ``negatives``
    # class and model columns. Column NAME is in ``columns/NAME.npy``.
    columns: dict[ClassColumn, ArrayInfo] = Field(default_factory=dict)
    hash: str  # hash of all other fields

    @model_validator(mode="after")
    def _check_hash(self) -> Self:
        if self.hash != self.digest():
            raise ValueError("the hash does not match the other fields")
        return self

    @classmethod
    def from_files(
        cls, run: Run, text_file: FileInfo, columns: Mapping[ClassColumn, ArrayInfo] | None = None
    ) -> Self:
        """Return a run's class table, from the files with text embeddings and columns."""
        fields_of_run = {name: getattr(run, name) for name in SHARED_FIELDS}
        # The hash is computed from all other fields, so a draft without a hash is made first.
        # Validation would refuse this draft, so ``model_construct`` makes it without validation.
        draft = cls.model_construct(
            **fields_of_run,
            tokenizer=run.space.tokenizer,
            text_file=text_file,
            columns=dict(columns or {}),
        )
        draft_hash = draft.digest()
        return draft.model_copy(update={"hash": draft_hash})

    def digest(self) -> str:
        """Return the hash of all fields except ``hash``."""
        hashed_fields = self.model_dump(mode="json", exclude={"hash"})
        return digest(hashed_fields)


class Manifest(CountedDocument, Run):
    """``manifest.json``, the last written file in a complete store.

    The manifest is written only if the numbers of failed images and bad shards are accepted.
    """

    remedy = StoreDocument.remedy

    parts: Count  # number of parts
    classes: str  # hash in the class table, empty if captions are the candidates
    content: str  # a single hash over the hashes of all parts' files (``content_hash``)


logger = logging.getLogger(__name__)


def class_columns(backbone: Backbone, run: Run) -> dict[ClassColumn, Tensor]:
    """Compute the class and model columns for a run, in float32."""
    columns: dict[ClassColumn, Tensor] = {}
    if run.prompts:
        prompts = embed_prompts(backbone, run.names, run.prompts)  # (K, P, D)
        rows = require_usable_rows(prompts.flatten(0, 1), "prompt")  # (K * P, D)
        columns["prompts"] = rows.view(prompts.shape)
    if run.negatives:
        words = embed_names(backbone, run.negatives, run.templates)
        columns["negatives"] = require_usable_rows(words, "negative")
    if run.features is not None:
        columns |= _linear_columns(backbone, run)
    return columns


def _linear_columns(backbone: Backbone, run: Run) -> dict[ClassColumn, Tensor]:
    """Return both towers' last linear maps, and the input to the text tower's last map.

    The input is the column ``text_features``. With several templates, this column is left out. If
    one of the last maps is not linear, there are no columns.
    """
    if backbone.projections is None:
        logger.info(
            "the last maps of %s are not both linear: only the features of the images are stored",
            run.space.backbone,
        )
        return {}
    image_map, text_map = backbone.projections
    columns: dict[ClassColumn, Tensor] = {
        "image_projection": image_map,
        "text_projection": text_map,
    }
    if len(run.templates) != 1:
        logger.info(
            "no text_features: a class text is a mean over %d templates, not one text",
            len(run.templates),
        )
        return columns
    prompts = fill_templates(run.names, run.templates)
    columns["text_features"] = backbone.encode_text_features(prompts)
    return columns
