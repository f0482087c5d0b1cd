"""A sample of a fit's images, saved with the predictor.

Other rows are compared with the sample, to detect near copies of fitted images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from vilu.artifacts.disk import convert_os_errors, write_bytes
from vilu.artifacts.documents import parse_json, plain_json
from vilu.artifacts.hashing import digest, tensor_hash
from vilu.embeddings.copies import picture_vectors
from vilu.embeddings.source import EmbeddingSource
from vilu.errors import DataError
from vilu.predictors.persistence.files import SAMPLE, SAMPLE_KEY

MAX_SAMPLE_BYTES: Final = 2_000_000
"""Maximum bytes in a sample's vectors, for example for 1,953 rows of width 512."""

MAX_FILE_BYTES: Final = MAX_SAMPLE_BYTES + 2**16
"""Maximum bytes in a sample's file, with its metadata."""

SAMPLE_STREAM: Final = 0x5A
"""First part of the sample's seed. The second part is the fit's seed.

So the sample's random numbers differ from all other random numbers in the fit.
"""

BLOCK_ROWS: Final = 4096
"""How many rows are compared with the sample at the same time, to limit the memory."""


@dataclass(frozen=True)
class FitSample:
    """Unit image vectors for S random rows of a fit, and the fit's row count."""

    image: Tensor  # (S, D) float16
    n_rows: int  # how many rows the S rows were drawn from

    @classmethod
    def draw(cls, sources: Sequence[EmbeddingSource], seed: int) -> FitSample | None:
        """Draw a sample from the usable rows of all sources. All rows are equally likely.

        If the rows have no vectors, the result is None.
        """
        if not sources[0].has_vectors:
            return None
        counts = [len(source.usable_rows) for source in sources]
        n_rows = sum(counts)
        bytes_per_row = 2 * sources[0].space.embed_dim  # float16
        sample_size = min(n_rows, MAX_SAMPLE_BYTES // bytes_per_row)
        generator = np.random.default_rng([SAMPLE_STREAM, seed])
        # indices among the rows of all sources, one source after another
        indices = generator.choice(n_rows, sample_size, replace=False)
        indices = np.sort(indices)
        blocks = []
        start = 0
        for source, count in zip(sources, counts, strict=True):
            end = start + count
            is_in_source = (indices >= start) & (indices < end)
            index_in_source = torch.from_numpy(indices[is_in_source] - start)
            sorted_rows = source.usable_rows.sort().values
            block = picture_vectors(source, sorted_rows[index_in_source]).cpu()
            blocks.append(block)
            start = end
        image = torch.cat(blocks).to(torch.float16)
        return cls(image, n_rows)

    @property
    def share(self) -> float:
        """Share of the fitted rows in the sample."""
        return len(self.image) / self.n_rows

    def nearest_cosines(self, source: EmbeddingSource, rows: Tensor) -> Tensor:
        """Compute the largest cosine (M,) between each of the ``rows`` and the sample's rows."""
        sample = self.image.float().T
        blocks = []
        for block in rows.split(BLOCK_ROWS):
            image = picture_vectors(source, block).cpu()
            largest_cosines = (image @ sample).amax(dim=1)
            blocks.append(largest_cosines)
        return torch.cat(blocks)

    def nearest_cosines_within(self) -> Tensor:
        """Compute the largest cosine (S,) between each sample row and the other sample rows."""
        image = self.image.float()
        blocks = []
        for start in range(0, len(image), BLOCK_ROWS):
            cosine = image[start : start + BLOCK_ROWS] @ image.T
            row_in_block = torch.arange(len(cosine))
            # a row's cosine with itself does not count
            cosine[row_in_block, start + row_in_block] = -torch.inf
            largest_cosines = cosine.amax(dim=1)
            blocks.append(largest_cosines)
        return torch.cat(blocks)

    def save(self, folder: Path, weights_sha256: str) -> None:
        """Write the sample to a file, with a digest and the hash of the fit's weights."""
        facts = {
            "n_rows": self.n_rows,
            "weights_sha256": weights_sha256,
            "image_sha256": tensor_hash(self.image),
        }
        sealed_facts = facts | {"digest": digest(facts)}
        document = plain_json(sealed_facts)
        metadata = {SAMPLE_KEY: document.decode()}
        content = safetensors_torch.save({"image": self.image}, metadata)
        write_bytes(folder / SAMPLE, content)

    @classmethod
    def load(cls, folder: Path, weights_sha256: str) -> FitSample | None:
        """Load the sample from a folder. If there is no sample, return None.

        Raises:
            DataError: If the sample is damaged, or if the sample belongs to other weights. The
                right weights have the hash ``weights_sha256``.
        """
        path = folder / SAMPLE
        if not path.exists():
            return None
        remedy = "Run `vilu fit` again, or remove the file. Without it, copies are not detected"
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(
                f"{path} has {size:,} bytes, but a sample has at most {MAX_FILE_BYTES:,}. {remedy}."
            )
        try:
            with convert_os_errors(f"cannot read {path}"), safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}  # without the key, the file is damaged (KeyError)
                document = metadata[SAMPLE_KEY].encode()
                facts = parse_json(document)
                image = file.get_tensor("image")
            sample = cls._from_content(facts, image)
        except (KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}). {remedy}.") from error
        if facts["weights_sha256"] != weights_sha256:
            raise DataError(f"{path} is of another fit than the weights beside it. {remedy}.")
        return sample

    @classmethod
    def _from_content(cls, facts: dict[str, Any], image: Tensor) -> FitSample:
        """Make a sample of ``image`` vectors. Raise ValueError if ``facts`` do not match."""
        saved_digest = facts.pop("digest", None)
        is_intact = saved_digest == digest(facts) and facts["image_sha256"] == tensor_hash(image)
        if not is_intact:
            raise ValueError("its content is not what its digest says")
        n_rows = facts["n_rows"]
        is_matrix = image.dtype == torch.float16 and image.ndim == 2
        is_sample = is_matrix and 0 < len(image) <= n_rows
        if not is_sample:
            raise ValueError(f"it holds {image.dtype} of shape {tuple(image.shape)}")
        return cls(image, n_rows)
