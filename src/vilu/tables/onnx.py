"""Export for table methods: writes a method as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from vilu.artifacts.disk import write_bytes
from vilu.artifacts.documents import plain_json
from vilu.artifacts.paths import claim_file
from vilu.embeddings.columns import NUMBERS
from vilu.embeddings.source import Batch
from vilu.errors import DataError
from vilu.extras import import_extra
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.predictors.persistence.files import SavedModel, folder_of
from vilu.predictors.persistence.onnx import (
    MAX_DIFFERENCE,
    GraphInputs,
    onnx_function,
    predictor_metadata,
    write_graph,
)
from vilu.predictors.persistence.storage import load_predictor
from vilu.tables.methods import WIDTH_KEY, AnswerMethod
from vilu.tables.table import FEATURES

N_RANDOM_ROWS: Final = 257
"""Number of random rows for comparing the file with the predictor."""


class TableGraph(nn.Module):
    """A predictor's score as a module.

    The inputs are numbers (N, C) and, for a predictor with features, features (N, F).
    """

    def __init__(self, predictor: AnswerMethod) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, numbers: Tensor, features: Tensor | None = None) -> Tensor:
        """Compute the uncertainties (N,) float64."""
        batch = batch_of(numbers, features)
        return self.predictor.score_batch(batch)


def batch_of(numbers: Tensor, features: Tensor | None = None) -> Batch:
    """Return a batch of rows with these columns only."""
    columns = {NUMBERS: numbers}
    if features is not None:
        columns[FEATURES] = features
    # The score of a table does not use images, texts, targets or row numbers. These inputs are made
    # from ``numbers``, so an export keeps the row count variable.
    no_images = numbers[:, :0].float()  # (N, 0)
    no_texts = no_images[:0]  # (0, 0)
    zeros = torch.zeros_like(numbers[:, :1], dtype=torch.int64).sum(dim=1)  # (N,)
    return Batch(no_images, no_texts, target=zeros, index=zeros, logit_scale=1.0, columns=columns)


def export_answers(folder: str | Path | SavedModel, path: str | Path) -> float:
    """Write the score of a saved method for tables as an ONNX file.

    The inputs are ``numbers`` (N, C) float64, and ``features`` (N, F) float32 if the fit had any.
    "vilu.columns" in the metadata lists the columns of ``numbers`` in order. The output is
    ``uncertainty`` (N,) float64. Before the file is written, onnxruntime runs the file on random
    rows near the fitted rows.

    Returns the largest difference between the file's and the predictor's uncertainties.

    Raises:
        DataError: If the difference is above 1e-5. Then nothing is written.
        MissingModelError: If the extra ``onnx`` is not installed.
    """
    for module in ("onnx", "onnxscript"):  # torch needs these modules for an export
        import_extra(module, "onnx")
    claim_file(path, "ONNX export", overwrite=True)
    predictor_folder = folder_of(folder)
    predictor = load_predictor(predictor_folder)
    if not isinstance(predictor, AnswerMethod):
        raise DataError(
            f"{predictor_folder} holds a {predictor.name}, which is no method for tables."
        )
    random_inputs = random_graph_inputs(predictor)
    fingerprint = fit_fingerprint(predictor_folder)
    metadata = _metadata(predictor, fingerprint)
    graph = TableGraph(predictor).eval()
    content = write_graph(graph, random_inputs, ("uncertainty",), metadata)
    difference = _difference(predictor, content, random_inputs)
    write_bytes(path, content)
    return difference


def _difference(predictor: AnswerMethod, content: bytes, inputs: GraphInputs) -> float:
    """Return the largest difference between the file's and the predictor's uncertainties.

    Raises DataError if the difference is above ``MAX_DIFFERENCE``. ``content`` is the file's bytes.
    """
    graph_function = onnx_function(content)
    (uncertainty,) = graph_function(inputs)
    with torch.no_grad():
        batch = batch_of(**inputs)
        expected_scores = predictor.score_batch(batch)
        expected_uncertainty = expected_scores.numpy()
    differences = np.abs(uncertainty - expected_uncertainty)
    difference = float(differences.max())
    if not difference <= MAX_DIFFERENCE:  # true also if the difference is NaN
        raise DataError(
            f"the exported {predictor.name} differs by {difference:.2g} from the predictor. "
            "Nothing was written."
        )
    return difference


def _metadata(predictor: AnswerMethod, fingerprint: str) -> dict[str, str]:
    """Return the file's metadata. ``fingerprint`` is the hash of the fit."""
    columns_json = plain_json(list(predictor.used_columns))
    return {
        **predictor_metadata(predictor, fingerprint),
        "vilu.columns": columns_json.decode(),
    }


def random_graph_inputs(predictor: AnswerMethod) -> GraphInputs:
    """Make random rows near the fitted rows. Return input name -> numbers, for the graph."""
    generator = torch.Generator().manual_seed(0)
    n_columns = len(predictor.used_columns)
    width = n_columns + predictor.notes_.get(WIDTH_KEY, 0)
    noise = torch.randn(N_RANDOM_ROWS, width, generator=generator, dtype=torch.float64)
    centre, spread = _centre_and_spread(predictor)
    inputs = centre + spread * noise
    rows: GraphInputs = {NUMBERS: inputs[:, :n_columns].contiguous()}
    if width > n_columns:
        rows[FEATURES] = inputs[:, n_columns:].float()
    return rows


def _centre_and_spread(predictor: AnswerMethod) -> tuple[Tensor, Tensor]:
    """Return centre (I,) and spread (I,) of the fitted inputs, or 0 and 1 if nothing was learned.

    Far from the fitted inputs, all rows have the same score. A comparison of such rows would show
    nothing.
    """
    learned = predictor.learned_
    if "mean" in learned:  # a probe
        return learned["mean"], learned["scale"]
    if "lower" not in learned:  # a single column, without a fit
        unit_spread = torch.ones(len(predictor.used_columns), dtype=torch.float64)
        return torch.zeros_like(unit_spread), unit_spread
    # A combination: a column's function rises from the first piece to the last piece. A column
    # without a piece gets the range from 0 to 0.
    is_piece = learned["rise"] > 0
    upper = learned["lower"] + learned["width"]
    lower_of_pieces = learned["lower"].where(is_piece, torch.inf)
    upper_of_pieces = upper.where(is_piece, -torch.inf)
    lowest = lower_of_pieces.amin(dim=1).nan_to_num(posinf=0.0)
    highest = upper_of_pieces.amax(dim=1).nan_to_num(neginf=0.0)
    # The pieces are for the column times the direction 1 or -1. The product is undone here.
    centre = learned["direction"] * (lowest + highest) / 2
    spread = (highest - lowest) / 2
    return centre, spread
