"""What stands in the JSON files of a store: its inputs, its run, receipts and the manifest."""

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

from vilu.artifacts.documents import Document, Model
from vilu.artifacts.hashing import digest
from vilu.backbones.base import Backbone
from vilu.backbones.zeroshot import fill_templates, mean_texts, prompt_texts
from vilu.embeddings.checks import require_usable
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import ProvenanceError
from vilu.store.ledger import AnyReceipt, Count, FileInfo


class StoreDocument(Document):
    """A file of a store."""

    again = "Run `vilu embed` (or `vilu import`) again"


SMALLEST = 0.5  # smallest share of the area that a view shows


class Views(Model):
    """V random crops, each mirrored or not, on their way into the model's own preprocessing.

    A crop has the shape of the picture, so that the preprocessing treats it as it treats the
    picture: a share of the area uniform in [1/2, 1], at a uniform place. View v of an image depends
    on nothing but its key, v and the seed.
    """

    n: Annotated[int, Field(ge=1)]  # V
    seed: int = 0  # of the views
    # what is drawn; part of what a store is made from
    recipe: Literal["crop of 0.5 to 1 of the area, mirrored with probability 0.5"] = (
        "crop of 0.5 to 1 of the area, mirrored with probability 0.5"
    )

    def of(self, image: Image.Image, key: str) -> list[Image.Image]:
        """The V views of a picture."""
        return [augment(image, *_uniform(self.seed, number, key)) for number in range(self.n)]


def augment(image: Image.Image, area: float, left: float, top: float, mirror: float) -> Image.Image:
    """A crop, mirrored or not, from four numbers in [0, 1)."""
    # the side is the root of the share of the area, which is uniform
    side = math.sqrt(SMALLEST + (1 - SMALLEST) * area)
    width, height = (max(round(side * length), 1) for length in image.size)
    x = int(left * (image.width - width + 1))
    y = int(top * (image.height - height + 1))
    view = image.crop((x, y, x + width, y + height))
    if mirror < 0.5:
        return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view


def _uniform(seed: int, number: int, key: str) -> tuple[float, float, float, float]:
    """Four numbers in [0, 1) from a hash, which no version of a library will draw otherwise."""
    words = hashlib.sha256(f"{seed} {number} {key}".encode("utf-8", "surrogatepass")).digest()
    # a float64 holds 53 bits, so the upper 53 of each 64 are a uniform number without rounding
    area, left, top, mirror = (np.frombuffer(words, "<u8") >> np.uint64(11)) * 2.0**-53
    return float(area), float(left), float(top), float(mirror)


CLASSES = "classes.json"
TEXT: Final = "text_emb/classes.npy"
IMAGE: Final = "img_emb"
"""The array of the image embeddings; arrays of columns have the columns' names."""

# the array of the embeddings of the images' captions, where they have some
CAPTION: Final = "text_emb"
# more files than a file system likes; also keeps a forged document from asking for endless work
MAX_PARTS = 1_000_000

SHARED = ("names", "folders", "templates", "features", "prompts", "negatives")
"""What the class table repeats of the run."""

ClassColumn = Literal[
    "prompts", "text_features", "image_projection", "text_projection", "negatives", "second_text"
]
ImageColumn = Literal["features", "views", "second_image"]


class Imported(Model):
    """What is known of arrays that no model of ours made."""

    # what is kept of each row beside its embedding, with the shape of one row
    columns: dict[ImageColumn, tuple[Annotated[int, Field(ge=1)], ...]] = Field(
        default_factory=dict
    )
    # whether rows came with identifiers; else their keys are their numbers, which identify nothing
    ids: bool
    source: str | None = None  # where they come from, as the user said it


class Inputs(StoreDocument):
    """Everything that decides what a store holds; its hash is the fingerprint of the run.

    Batch size, device and number of threads are not among them: they move a value by rounding only,
    and a run that ran out of memory must be able to go on with smaller batches.
    """

    dataset_fingerprint: str  # hash of the listing of the images, or of the names of the shards
    # number of images, readable or not; of shards 0, since only reading them tells (the manifest
    # has it)
    n_in: Count
    split: str | None  # name of the split, if any
    space: EmbeddingSpace  # the embedding space, with all that is known about the model
    # the K class names as they stand in the prompts; none where captions are the candidates
    names: tuple[str, ...]
    # the K class names as the data set has them; None when it is unlabelled
    folders: tuple[str, ...] | None
    templates: tuple[str, ...]  # prompt templates; none where there are no classes
    limits: dict[str, float]  # what an image may be (``ImageLimits``)
    part_size: Annotated[int, Field(ge=1)]  # images per part, or shards
    dtype: Literal["float16", "float32"]  # number format of what is stored of the images
    # width F of the features that are kept of each image; None where they are not
    features: Annotated[int, Field(ge=1)] | None = None
    views: Views | None = None  # augmented views whose embeddings are kept of each image, if any
    prompts: tuple[str, ...] = ()  # templates in which the embedding of every class is kept
    # words, none of which need be a class, whose embedding is kept in ``templates``
    negatives: tuple[str, ...] = ()
    # whether each image has a caption, whose embedding is kept, and there are no classes
    captions: bool = False
    # number of shards of which the parts are made; 0 where they are made of images
    shards: Count = 0
    # names of folders or labels, as the data have them, that are none of the classes
    outside: tuple[str, ...] = ()
    imported: Imported | None = None  # of embeddings that were imported; None where they were made

    @model_validator(mode="after")
    def _check_number_of_parts(self) -> Self:
        if self.extent > self.part_size * MAX_PARTS:
            unit = "shards" if self.shards else "images"
            raise ValueError(
                f"part_size={self.part_size} makes more than {MAX_PARTS} parts of {self.extent} "
                f"{unit}"
            )
        return self

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        of_classes = (self.names, self.folders, self.templates, self.prompts, self.negatives)
        if self.captions and any(of_classes):
            raise ValueError(
                "with captions there are no classes, so no names, templates, prompts or negatives "
                "either"
            )
        return self

    @property
    def extent(self) -> int:
        """Number of what parts are made of: images, or shards."""
        return self.shards or self.n_in

    @property
    def arrays(self) -> dict[str, tuple[int, ...]]:
        """What is kept of an image, by name and shape; the embedding first."""
        dim = self.space.embed_dim
        shapes: dict[str, tuple[int, ...]] = {IMAGE: (dim,)}
        if self.imported is not None:
            for name, shape in self.imported.columns.items():
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
    def pictures(self) -> bool:
        """Whether the metadata hold a digest of every picture, by which rows are recognised."""
        return self.imported is None

    def identity(self) -> dict[str, object]:
        """The fields that are hashed, one level deep (``space.weights``)."""
        hashed = set(Inputs.model_fields)
        if self.shards:
            # it is known only once all shards have been read, and is 0 until then
            hashed.remove("n_in")
        flat: dict[str, object] = {}
        for name, value in self.model_dump(mode="json", include=hashed).items():
            if not isinstance(value, dict):
                flat[name] = value
                continue
            for key, item in value.items():
                flat[f"{name}.{key}"] = item
        return flat

    def require_match(self, inputs: Inputs, store: Path) -> None:
        """Refuse to mix the rows of two different runs."""
        before = self.identity()
        now = inputs.identity()
        differences: list[str] = []
        for name in before | now:
            was = before.get(name)
            is_now = now.get(name)
            if was != is_now:
                differences.append(f"{name} was {was!r:.120} and is now {is_now!r:.120}")
        if differences:
            raise ProvenanceError(
                f"{store} was made from other inputs: {'; '.join(differences)}. "
                "Nothing was changed. Give another output folder, or --overwrite to replace this "
                "one."
            )


class Run(Inputs):
    """``run.json``, written first."""

    fingerprint: str  # hash of the inputs
    dataset: str  # where the images came from, for people (base name only)
    vilu: str  # version that began the run

    @model_validator(mode="after")
    def _check_fingerprint(self) -> Self:
        if self.fingerprint != digest(self.identity()):
            raise ValueError("the fingerprint is not that of the inputs beside it")
        return self


class Counted(StoreDocument):
    """Every image that went in came out as a row or as an error."""

    n_in: Count
    n_ok: Count
    n_error: Count
    errors: dict[str, Count]

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        all_in = self.n_in == self.n_ok + self.n_error
        all_kinds = self.n_error == sum(self.errors.values())
        if not (all_in and all_kinds):
            raise ValueError(
                f"n_in={self.n_in} is not n_ok={self.n_ok} plus n_error={self.n_error} "
                f"({self.errors})"
            )
        return self


class ArrayInfo(FileInfo):
    """Of a file of a float32 array, with its shape."""

    shape: tuple[Count, ...]


class Receipt(AnyReceipt, Counted):
    """``receipts/00000.json``, written last of a part.

    The part exists if and only if its receipt does and the sizes agree.
    """

    fingerprint: str  # fingerprint of the run
    part: Count  # number of the part
    start: Count  # position of its first image, or number of its first shard
    stop: Count  # position after its last image, or number after its last shard
    files: dict[str, FileInfo]  # its files by name
    batch_size: Annotated[int, Field(ge=1)]  # images per forward pass
    # of shards, ``ShardedDataset.shard_fingerprint`` before they were read; empty of images
    source: str = ""


class StoredClasses(StoreDocument):
    """``classes.json``: the K candidates and how their texts were made."""

    names: tuple[str, ...]  # class names as they stand in the prompts
    folders: tuple[str, ...] | None  # class names as the data set has them
    templates: tuple[str, ...]  # prompt templates; the K texts are their mean, normalised
    tokenizer: str | None  # description of the tokenizer
    text_emb: Literal["text_emb/classes.npy"] = TEXT  # file of the (K, D) float32 text embeddings
    text_file: FileInfo  # its size and hash
    features: int | None = None  # width of the image features, as in the run
    prompts: tuple[str, ...] = ()  # templates of the column ``prompts``
    negatives: tuple[str, ...] = ()  # words of the column ``negatives``
    # what else is kept of the classes and the model, each in ``columns/NAME.npy``
    columns: dict[ClassColumn, ArrayInfo] = Field(default_factory=dict)
    hash: str

    @model_validator(mode="after")
    def _check_hash(self) -> Self:
        if self.hash != self.digest():
            raise ValueError("the hash is not that of the classes beside it")
        return self

    @classmethod
    def of(
        cls, run: Run, text_file: FileInfo, columns: Mapping[ClassColumn, ArrayInfo] | None = None
    ) -> Self:
        """The table of a run whose text embeddings are in a file, and its columns in others."""
        shared = {name: getattr(run, name) for name in SHARED}
        # without validation: it would ask for the hash, which is of all other fields
        draft = cls.model_construct(
            **shared,
            tokenizer=run.space.tokenizer,
            text_file=text_file,
            columns=dict(columns or {}),
        )
        return draft.model_copy(update={"hash": draft.digest()})

    def digest(self) -> str:
        """Hash of all other fields."""
        return digest(self.model_dump(mode="json", exclude={"hash"}))


class Manifest(Counted, Run):
    """``manifest.json``, written at the end: the store is complete and within its error budget."""

    parts: Count  # number of parts
    classes: str  # hash of the class table; empty where captions are the candidates
    content: str  # hash over the SHA-256 of every file of every part


logger = logging.getLogger(__name__)


def class_columns(backbone: Backbone, run: Run) -> dict[ClassColumn, Tensor]:
    """The columns (``vilu.embeddings.columns``) of classes and model of a run, float32."""
    columns: dict[ClassColumn, Tensor] = {}
    if run.prompts:
        prompts = prompt_texts(backbone, run.names, run.prompts)
        rows = require_usable(prompts.flatten(0, 1), "prompt")
        columns["prompts"] = rows.view(prompts.shape)
    if run.negatives:
        words = mean_texts(backbone, run.negatives, run.templates)
        columns["negatives"] = require_usable(words, "negative")
    if run.features is not None:
        columns |= _linear_columns(backbone, run)
    return columns


def _linear_columns(backbone: Backbone, run: Run) -> dict[ClassColumn, Tensor]:
    """Both last maps and the text features that go into the text's, where there are such maps."""
    if backbone.projections is None:
        logger.info(
            "the last maps of %s are not both linear: of its features the images' are kept",
            run.space.backbone,
        )
        return {}
    image, text = backbone.projections
    columns: dict[ClassColumn, Tensor] = {"image_projection": image, "text_projection": text}
    if len(run.templates) != 1:
        logger.info(
            "no text_features: a class text is the mean over %d templates, of no text",
            len(run.templates),
        )
        return columns
    prompts = fill_templates(run.names, run.templates)
    columns["text_features"] = backbone.encode_text_features(prompts)
    return columns
