"""Export image tower, classes, predictor and rule as a single ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vilu.artifacts.disk import write_bytes
from vilu.artifacts.documents import plain_json
from vilu.artifacts.paths import claim_file, inputs_digest
from vilu.backbones.base import PROJECTION_TOLERANCE, Backbone
from vilu.calibration.rules import Rule
from vilu.errors import DataError
from vilu.extras import import_extra
from vilu.guard.guard import Guard
from vilu.predictors.contract.predictor import NotExportable
from vilu.predictors.nn.attention import FEATURES
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.predictors.persistence.files import VOCABULARY, SavedModel
from vilu.predictors.persistence.onnx import (
    OUTPUT_NAMES,
    GraphInputs,
    file_metadata,
    largest_difference,
    onnx_function,
    reference_scores,
    score_graph,
    write_graph,
)
from vilu.predictors.plus.ood import NEGATIVES

PIXELS = "pixels"
"""Name of the graph's input."""

EMBEDDINGS = "image"
"""Name of the output with the embeddings. A graph with only a predictor has an input so named."""

ACCEPT = "accept"
"""Name of the output with the decisions."""

ADVICE_PREDICTOR_ALONE = (
    "Without --with-backbone, only the predictor is exported; its inputs are embeddings."
)
"""Last sentence in errors about the image tower."""

TEST_BATCH_SIZES = (1, 2, 7)
"""Batch sizes for testing an export with random pictures."""


class ImageGraph(nn.Module):
    """The graph from pixels (N, 3, H, W) to a guard's answers.

    Attributes:
        arrays: Names of the arrays from the image tower: embeddings, and for some predictors
            features.
        limits: Uncertainty limits (2, K): a floor and a threshold for each of the K answers
            (``floors_and_thresholds``). None without a rule.
        outputs: Names of what ``forward`` returns, in order.
    """

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.score = score_graph(guard.predictor)
        self.backbone = guard.backbone
        vocabulary = guard.vocabulary
        self.text = nn.Buffer(vocabulary.text)
        self.dtype = getattr(torch, vocabulary.dtype)
        columns = guard.predictor.columns_to_score
        words: Tensor | None = None  # embeddings of everyday words, if the score needs words
        if NEGATIVES in columns:
            words = nn.Buffer(vocabulary.columns[NEGATIVES])
        self.words = words
        self.arrays: tuple[str, ...] = (EMBEDDINGS,)
        if FEATURES in columns:
            self.arrays = (EMBEDDINGS, FEATURES)
        self.limits = floors_and_thresholds(guard)
        self.outputs: tuple[str, ...] = (*OUTPUT_NAMES, *self.arrays)
        if self.limits is not None:
            self.outputs = (*OUTPUT_NAMES, ACCEPT, *self.arrays)

    def embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return embeddings (N, D), and features (N, F) if the score uses features.

        All numbers are rounded to the store's number format.
        """
        arrays: tuple[Tensor, ...]
        if FEATURES in self.arrays:
            arrays = self.backbone.encode_images_and_features(pixels)
        else:
            arrays = (self.backbone.encode_images(pixels),)
        return tuple(array.to(self.dtype).float() for array in arrays)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return uncertainty (N,), answer (N,), is_accepted (N,) with a rule, and the arrays."""
        arrays = self.embed(pixels)
        inputs = self.inputs(arrays)
        uncertainty, answer = self.score(**inputs)
        if self.limits is None:
            return uncertainty, answer, *arrays
        floors = self.limits[0]
        thresholds = self.limits[1]
        floors_of_rows = floors[answer]
        thresholds_of_rows = thresholds[answer]
        is_accepted = (uncertainty > floors_of_rows) & (uncertainty <= thresholds_of_rows)
        return uncertainty, answer, is_accepted, *arrays

    def inputs(self, arrays: tuple[Tensor, ...]) -> GraphInputs:
        """Return the score's inputs by name: arrays, texts, and everyday words if needed."""
        inputs = dict(zip(self.arrays, arrays, strict=True))
        inputs["text"] = self.text
        if self.words is not None:
            inputs[NEGATIVES] = self.words
        return inputs


def rule_of(guard: Guard) -> Rule | None:
    """Return the rule that decides which answers a guard accepts. Return None without a rule."""
    if guard.calibration is None:
        return None
    return guard.calibration.rule


def floors_and_thresholds(guard: Guard) -> Tensor | None:
    """Return the floors and the thresholds of K answers, as (2, K). Return None without a rule."""
    rule = rule_of(guard)
    if rule is None:
        return None
    names = guard.names
    # The limits are computed for K answers, one answer per class. If the rule has a threshold per
    # class, an answer's group is the answer's class.
    groups: Sequence[str] | None = None
    if rule.grouped_by == "prediction":
        groups = names
    floors, thresholds = rule.limits(len(names), groups)
    stacked_limits = np.stack([floors, thresholds])
    limits = torch.from_numpy(stacked_limits)
    return nn.Buffer(limits)


def export_fingerprint(folder: str | Path) -> str:
    """Return a digest of what an export reads in a folder: predictor, rule and classes."""
    folder_path = Path(folder)
    return inputs_digest(folder_path, folder_path / VOCABULARY, graph=PIXELS)


def export_image_graph(
    folder: str | Path | SavedModel,
    path: str | Path,
    *,
    models: str | Path | None = None,
    backbone: Backbone | None = None,
) -> float:
    """Write a folder's backbone, classes, predictor and rule as a single ONNX file.

    The input is ``pixels`` (N, 3, H, W) float32 for any N >= 1: images after the backbone's
    ``preprocess``. Decoding, resizing and scaling are not in the file.

    Outputs:

    - ``uncertainty`` (N,) float64.
    - ``prediction`` (N,) int64, an index into the classes. The metadata list the classes
      (``vilu.classes``, JSON).
    - ``accept`` (N,) bool, if the folder has a rule.
    - ``image`` (N, D) float32, unit-norm embeddings, rounded as by ``vilu.Guard``.
    - ``features`` (N, F), if the predictor uses features.

    Before writing, the file is tested: onnxruntime runs the graph on random pictures.

    1. Embeddings from the file and from torch must agree, up to one step in the number format and
       the rounding of sums.
    2. Uncertainties and answers must agree with the predictor on the embeddings from the file,
       within ``export_onnx``'s tolerance.
    3. Decisions must agree with the rule.

    Args:
        folder: A predictor with classes, as written by ``vilu triage`` and ``vilu calibrate``, or a
            ``vilu.Selective``.
        path: The file to write. An existing file must be an earlier export.
        models: As in ``vilu.Guard``.
        backbone: As in ``vilu.Guard``. The backbone must be on the CPU.

    Returns:
        The largest difference between uncertainties from the file and from torch for the same
        pixels.

    Raises:
        NotExportable: If the predictor has no graph, if the image tower cannot be written as ONNX
            or runs in bfloat16, or if there is only a single class.
        UsageError: If ``path`` holds a file that is no ONNX export, if the rule needs more than an
            image and the answer, or if the predictor uses several views per image.
        DataError: If the file and torch give different results.

    Example::

        export_image_graph("out/predictor", "guard.onnx")
        session = onnxruntime.InferenceSession("guard.onnx")
        pixels = backbone.preprocess(PIL.Image.open("photo.jpg"))[None].numpy()
        accept, answer = session.run(["accept", "prediction"], {"pixels": pixels})
    """
    for module in ("onnx", "onnxscript"):  # torch's export needs both
        import_extra(module, "onnx")
    claim_file(path, "ONNX export", overwrite=True)
    guard = Guard(folder, models=models, device="cpu", backbone=backbone)
    _require_graph(guard)
    graph = ImageGraph(guard).eval()
    # Torch runs before the export. A tower may be loaded at the first use, and the export must not
    # record the loading.
    test_batches = []
    for n_pictures in TEST_BATCH_SIZES:
        pixels = _random_pixels(n_pictures, guard.backbone)
        test_batches.append((pixels, graph.embed(pixels)))
    example_pixels, _ = test_batches[-1]
    example = {PIXELS: example_pixels}
    try:
        content = write_graph(graph, example, graph.outputs, _metadata_of_file(guard))
    except (torch.onnx.OnnxExporterError, NotExportable) as error:
        cause = error.__cause__ or error
        reason, *_ = str(cause).strip().split("\n")  # the first line
        raise NotExportable(
            f"{guard.backbone.space.backbone} cannot be written as ONNX: {reason} "
            f"{ADVICE_PREDICTOR_ALONE}"
        ) from error
    difference = _check_file(guard, graph, content, test_batches)
    write_bytes(path, content)
    return difference


def _require_graph(guard: Guard) -> None:
    """Raise NotExportable if a runtime other than torch could give different answers."""
    space = guard.backbone.space
    if space.precision == "bf16":
        raise NotExportable(
            f"the image tower of {space.backbone} runs in bfloat16, which other runtimes round "
            f"differently. Embed with --precision fp32. {ADVICE_PREDICTOR_ALONE}"
        )
    if len(guard.vocabulary.text) < 2:
        raise NotExportable("with only one class there is nothing to decide. Give more classes.")


def _metadata_of_file(guard: Guard) -> dict[str, str]:
    """Return the file's metadata: first the whole graph's entries, then the predictor's.

    The predictor's entries are last, because ``vilu.artifacts.paths`` looks for them near the end
    of a file.
    """
    space = guard.vocabulary.space
    decision = ""
    if guard.calibration is not None and guard.calibration.rule is not None:
        decision = guard.calibration.guarantee_text or ""
    class_names = plain_json(list(guard.names))
    fingerprint_of_fit = fit_fingerprint(guard.folder)
    fingerprint_of_export = export_fingerprint(guard.folder)
    return {
        "vilu.classes": class_names.decode(),
        "vilu.decision": decision,
        "vilu.preprocess": space.preprocess or "",
        "vilu.predictor": fingerprint_of_fit,
        **file_metadata(guard.predictor, space, fingerprint_of_export),
    }


def _random_pixels(n_pictures: int, backbone: Backbone) -> Tensor:
    """Return pixels (N, 3, H, W) of random pictures, from large patches to fine grain."""
    generator = np.random.default_rng(n_pictures)
    pixels_of_pictures = []
    for index in range(n_pictures):
        side = 2 ** (1 + index % 7)  # number of patches in a row: 2, 4, ..., 128
        noise = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        patches = Image.fromarray(noise)
        picture = patches.resize((256, 256), Image.Resampling.BICUBIC)
        pixels = backbone.preprocess(picture)
        pixels_of_pictures.append(pixels)
    return torch.stack(pixels_of_pictures)


def _check_file(
    guard: Guard,
    graph: ImageGraph,
    content: bytes,
    test_batches: list[tuple[Tensor, tuple[Tensor, ...]]],
) -> float:
    """Run a file on test batches, and compare the results with torch.

    Args:
        guard: The exported guard.
        graph: The guard's graph in torch.
        content: The file's content.
        test_batches: For every batch: pixels, and the arrays from torch.

    Returns:
        The largest difference between uncertainties from the file and from torch.

    Raises:
        DataError: If the file and torch give different results.
    """
    run_onnx = onnx_function(content)
    relative_step = torch.finfo(graph.dtype).eps
    rule = rule_of(guard)
    results = []
    max_difference = 0.0
    for pixels, torch_arrays in test_batches:
        outputs = dict(zip(graph.outputs, run_onnx({PIXELS: pixels}), strict=True))
        uncertainty, answer = (outputs[name] for name in OUTPUT_NAMES)
        arrays = tuple(torch.from_numpy(outputs[name]) for name in graph.arrays)
        for name, array, expected_array in zip(graph.arrays, arrays, torch_arrays, strict=True):
            _require_near(name, array, expected_array, relative_step)
        if rule is not None:
            predicted_names = [guard.names[index] for index in answer.tolist()]
            _require_same_decisions(outputs[ACCEPT], rule.accept(uncertainty, predicted_names))
        # kept to compare the predictor alone, on the embeddings from the file
        results.append((graph.inputs(arrays), uncertainty, answer))
        # Compare the whole graph with torch's uncertainties for the same pixels. An answer is clear
        # if rounding cannot change it.
        expected_uncertainty, _, is_clear = reference_scores(
            guard.predictor, graph.inputs(torch_arrays)
        )
        differences = np.abs(uncertainty - expected_uncertainty)[is_clear]
        max_difference = max(max_difference, float(differences.max(initial=0.0)))
    largest_difference(guard.predictor, results)  # raises an error if a difference is too large
    return max_difference


def _require_near(name: str, array: Tensor, expected_array: Tensor, relative_step: float) -> None:
    """Raise DataError if embeddings from the file and from torch differ too much.

    Allowed differences are one step in the number format, and the rounding of sums. The rounding is
    proportional to the largest number in a row.

    Args:
        name: The array's name, for the error.
        array: Embeddings (N, D) from the file.
        expected_array: Embeddings (N, D) from torch.
        relative_step: The number format's relative step.
    """
    difference = (array - expected_array).abs()
    magnitude = expected_array.abs()
    largest_of_row = magnitude.amax(dim=1, keepdim=True)
    is_near = difference <= relative_step * magnitude + PROJECTION_TOLERANCE * largest_of_row
    if not bool(is_near.all()):
        largest = float(difference.max())
        raise DataError(
            f"the {name} rows of the exported tower differ from torch's by "
            f"{largest:.2g}. Nothing was written."
        )


def _require_same_decisions(is_accepted: np.ndarray, is_accepted_by_rule: np.ndarray) -> None:
    """Raise DataError if the file's decisions differ from the rule's decisions."""
    if not np.array_equal(is_accepted, is_accepted_by_rule):
        raise DataError("the exported graph does not decide as the rule does. Nothing was written.")
