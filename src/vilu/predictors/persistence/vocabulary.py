"""A predictor's candidate classes, saved beside the predictor.

To classify and score a new image, a user needs these classes, the predictor, and the
predictor's vision-language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from vilu.artifacts.disk import convert_os_errors, write_bytes
from vilu.artifacts.documents import parse_json, plain_json
from vilu.artifacts.hashing import digest, tensor_hash
from vilu.embeddings.checks import check_class_names, require_usable_rows
from vilu.embeddings.column_checks import check_columns
from vilu.embeddings.columns import ROW_COLUMNS
from vilu.embeddings.new_images import NewImages, image_matrix
from vilu.embeddings.source import EmbeddingSource
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import DataError
from vilu.predictors.persistence.description import RECALIBRATE_ADVICE
from vilu.predictors.persistence.files import VOCABULARY, VOCABULARY_KEY


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """K classes with text embeddings, and the data needed to embed new images in the same way.

    Attributes:
        names: K class names, or None if the classes have no names.
        text: (K, D) float32 unit-norm text embeddings for the classes.
        space: The embedding space.
        dtype: Number format for the stored image embeddings. New embeddings are rounded to this
            format.
        columns: Columns by name, whose rows do not belong to images, such as everyday words
            (``vilu.embeddings.columns``).
    """

    names: tuple[str, ...] | None
    text: Tensor
    space: EmbeddingSpace
    dtype: str
    columns: Mapping[str, Tensor]

    @classmethod
    def of(cls, source: EmbeddingSource, dtype: str | None = None) -> Vocabulary:
        """Make the vocabulary from a source with the same candidates for all rows.

        By default ``dtype`` is the store's number format, or float32 for arrays in memory.
        """
        dtype = dtype or source.stored_dtype or "float32"
        no_rows = torch.empty(0, dtype=torch.int64)
        names = sorted(source.columns - ROW_COLUMNS)
        columns = {name: source.column(name, no_rows) for name in names}
        return cls(source.class_names, source.text, source.space, dtype, columns)

    def new_images(
        self,
        image: ArrayLike | Tensor,
        *,
        columns: Mapping[str, Tensor] | None = None,
        ids: Sequence[str] | None = None,
    ) -> NewImages:
        """Combine new image embeddings (N, D) with the classes, rounded like the stored embeddings.

        Args:
            image: (N, D) embeddings.
            columns: Columns with a row for each image (``vilu.embeddings.columns``).
            ids: N identifiers. By default, the row numbers.
        """
        new_rows = image_matrix(image, self.space)
        return NewImages(
            new_rows,
            self.text,
            self.space,
            class_names=self.names,
            columns={**self.columns, **(columns or {})},
            ids=ids,
            dtype=self.dtype,
        )

    def save(self, folder: Path) -> None:
        """Write ``vocabulary.safetensors``, with a digest of the whole content as metadata."""
        tensors = {"text": self.text.contiguous()}
        for name, column in self.columns.items():
            tensors[f"columns.{name}"] = column.contiguous()
        header = {
            "names": list(self.names or ()),
            "space": dataclasses.asdict(self.space),
            "dtype": self.dtype,
            "tensors": _tensor_hashes(tensors),
        }
        sealed_header = header | {"digest": digest(header)}
        document = plain_json(sealed_header)
        metadata = {VOCABULARY_KEY: document.decode()}
        content = safetensors_torch.save(tensors, metadata)
        write_bytes(folder / VOCABULARY, content)

    @classmethod
    def load(cls, folder: Path) -> Vocabulary:
        """Load the vocabulary from a folder.

        Raises:
            DataError: If the file is missing or damaged.
        """
        path = folder / VOCABULARY
        if not path.is_file():
            raise DataError(
                f"{folder} does not say what its answers are chosen from: {path} is missing. It "
                f"was calibrated on captions, or not at all. {RECALIBRATE_ADVICE} on rows with "
                "classes; this writes it."
            )
        try:
            with convert_os_errors(f"cannot read {path}"), safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}  # without the key, the file is damaged (KeyError)
                header = parse_json(metadata[VOCABULARY_KEY].encode())
                names = list(file.keys())
                tensors = {name: file.get_tensor(name) for name in names}
            return cls._from_content(header, tensors)
        except (
            DataError,
            KeyError,
            RecursionError,
            RuntimeError,
            SafetensorError,
            TypeError,
            ValueError,
        ) as error:
            raise DataError(f"{path} is damaged ({error}). {RECALIBRATE_ADVICE}.") from error

    @classmethod
    def _from_content(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Vocabulary:
        """Make a vocabulary. Raise DataError if the header does not describe the tensors."""
        saved_digest = header.pop("digest", None)
        is_intact = saved_digest == digest(header) and _tensor_hashes(tensors) == header["tensors"]
        if not is_intact:
            raise DataError("its content is not what its digest says")
        text = require_usable_rows(tensors.pop("text"), "text")
        # an empty list means that the classes have no names
        names = check_class_names(header["names"] or None, len(text))
        columns = {name.removeprefix("columns."): column for name, column in tensors.items()}
        space = EmbeddingSpace(**header["space"])
        checked_columns = check_columns(columns, n_rows=0, n_texts=len(text))
        return cls(names, text, space, header["dtype"], checked_columns)


def _tensor_hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Hash each tensor, by name."""
    return {name: tensor_hash(tensor) for name, tensor in sorted(tensors.items())}
