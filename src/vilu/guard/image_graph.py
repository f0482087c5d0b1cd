"""Pixels to decisions as one ONNX file: image tower, classes, predictor and rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vilu.artifacts.disk import write_bytes
from vilu.artifacts.documents import plain_json
from vilu.artifacts.paths import claim_file, inputs_of
from vilu.backbones.base import ROUNDING, Backbone
from vilu.calibration.rules import Rule
from vilu.errors import DataError
from vilu.extras import import_extra
from vilu.guard.guard import Guard
from vilu.predictors.contract.predictor import NotExportable
from vilu.predictors.nn.attention import FEATURES
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.predictors.persistence.files import VOCABULARY
from vilu.predictors.persistence.onnx import (
    SAID,
    Trial,
    largest_difference,
    metadata,
    reference,
    runner,
    score_graph,
    write_graph,
)
from vilu.predictors.plus.ood import NEGATIVES

PIXELS = "pixels"
EMBEDDINGS = "image"
"""What the head calls them."""

ACCEPT = "accept"
ALONE = "Without --with-backbone the head alone is exported; it takes embeddings."
BATCHES = (1, 2, 7)
"""Numbers of random pictures that an export is tried with."""


class ImageGraph(nn.Module):
    """Pixels (N, 3, H, W) to the answers of a guard; ``outputs`` names what it gives."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.score = score_graph(guard.predictor)
        self.backbone = guard.backbone
        vocabulary = guard.vocabulary
        self.text = nn.Buffer(vocabulary.text)
        self.dtype = getattr(torch, vocabulary.dtype)
        columns = guard.predictor.columns_to_score
        words: Tensor | None = None
        if NEGATIVES in columns:
            words = nn.Buffer(vocabulary.columns[NEGATIVES])
        self.words = words
        self.arrays: tuple[str, ...] = (EMBEDDINGS,)
        if FEATURES in columns:
            self.arrays = (EMBEDDINGS, FEATURES)
        self.limits = limits_of(guard)
        self.outputs: tuple[str, ...] = (*SAID, *self.arrays)
        if self.limits is not None:
            self.outputs = (*SAID, ACCEPT, *self.arrays)

    def embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Embeddings (N, D), and features (N, F) where the score looks at them.

        They are rounded as a store rounds them.
        """
        arrays: tuple[Tensor, ...]
        if FEATURES in self.arrays:
            arrays = self.backbone.encode_images_and_features(pixels)
        else:
            arrays = (self.backbone.encode_images(pixels),)
        return tuple(array.to(self.dtype).float() for array in arrays)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Uncertainty, answer, whether it is accepted where there is a rule, and ``embed``."""
        arrays = self.embed(pixels)
        uncertainty, answer = self.score(**self.inputs(arrays))
        if self.limits is None:
            return uncertainty, answer, *arrays
        floor = self.limits[0][answer]
        threshold = self.limits[1][answer]
        is_accepted = (uncertainty > floor) & (uncertainty <= threshold)
        return uncertainty, answer, is_accepted, *arrays

    def inputs(self, arrays: tuple[Tensor, ...]) -> Trial:
        """The inputs of the score, by name."""
        trial = {**dict(zip(self.arrays, arrays, strict=True)), "text": self.text}
        if self.words is not None:
            trial[NEGATIVES] = self.words
        return trial


def rule_of(guard: Guard) -> Rule | None:
    """What decides which answers are accepted; None without a rule."""
    if guard.calibration is None:
        return None
    return guard.calibration.rule


def limits_of(guard: Guard) -> Tensor | None:
    """(2, K) floor and threshold of every answer; None without a rule."""
    rule = rule_of(guard)
    if rule is None:
        return None
    names = guard.vocabulary.names
    groups: Sequence[str] | None = None
    if rule.grouped_by == "prediction":
        groups = names
    floor, threshold = rule.limits(len(names), groups)
    return nn.Buffer(torch.from_numpy(np.stack([floor, threshold])))


def fingerprint_of(folder: str | Path) -> str:
    """Digest of what the file of a folder is made from: predictor, rule and classes."""
    return inputs_of(Path(folder), Path(folder) / VOCABULARY, graph=PIXELS)


def export_image_graph(
    folder: str | Path,
    path: str | Path,
    *,
    models: str | Path | None = None,
    backbone: Backbone | None = None,
) -> float:
    """Write backbone, classes, predictor and rule of a folder as one ONNX file.

    Input is ``pixels`` (N, 3, H, W) float32, N >= 1 open, as the backbone's ``preprocess`` makes
    them of an image: decoding, resizing and scaling stay outside. Outputs are ``uncertainty`` (N,)
    float64; ``prediction`` (N,) int64, a place in the classes, which the metadata name
    (``vilu.classes``, JSON); ``accept`` (N,) bool where the folder has a rule; ``image`` (N, D)
    float32, the embeddings, of unit norm and rounded as ``vilu.Guard`` rounds them; and
    ``features`` (N, F) where the predictor looks at them.

    onnxruntime runs the file on random pictures, and it is written only where embeddings are
    torch's but for one step of their number format, uncertainties and answers are the predictor's
    of these embeddings, as near as ``export_onnx`` demands, and decisions are the rule's.

    Args:
        folder: A predictor with its classes, as ``vilu triage`` and ``vilu calibrate`` leave it.
        path: The file; another export that lies there is replaced, and no other file.
        models: As of ``vilu.Guard``.
        backbone: As of ``vilu.Guard``; on the CPU.

    Returns:
        The largest difference between uncertainties of the file and of torch, from the pixels on.

    Raises:
        NotExportable: If the predictor has no graph, the image tower cannot be written as ONNX or
            runs in bfloat16, or there is one class alone.
        UsageError: If ``path`` holds something else, the rule needs more than an image and its
            answer, or the predictor looks at several views.
        DataError: If the file gives something else than torch.

    Example::

        export_image_graph("out/predictor", "guard.onnx")
        session = onnxruntime.InferenceSession("guard.onnx")
        pixels = backbone.preprocess(PIL.Image.open("photo.jpg"))[None].numpy()
        accept, answer = session.run(["accept", "prediction"], {"pixels": pixels})
    """
    for module in ("onnx", "onnxscript"):  # torch imports them
        import_extra(module, "onnx")
    claim_file(path, "ONNX export", overwrite=True)
    guard = Guard(folder, models=models, device="cpu", backbone=backbone)
    _require_graph(guard)
    graph = ImageGraph(guard).eval()
    # torch first: a tower may be loaded on its first use, which must not be in the export
    trials = []
    for n in BATCHES:
        pixels = _pictures(n, guard.backbone)
        trials.append((pixels, graph.embed(pixels)))
    example = {PIXELS: pixels}
    try:
        content = write_graph(graph, example, graph.outputs, _metadata(guard, Path(folder)))
    except (torch.onnx.OnnxExporterError, NotExportable) as error:
        why = str(error.__cause__ or error).strip().split("\n")[0]
        raise NotExportable(
            f"{guard.backbone.space.backbone} cannot be written as ONNX: {why} {ALONE}"
        ) from error
    worst = _check(guard, graph, content, trials)
    write_bytes(path, content)
    return worst


def _require_graph(guard: Guard) -> None:
    """Refuse a guard whose answers other runtimes would not give."""
    space = guard.backbone.space
    if space.precision == "bf16":
        raise NotExportable(
            f"the image tower of {space.backbone} runs in bfloat16, and other runtimes round "
            f"otherwise. Embed with --precision fp32. {ALONE}"
        )
    if len(guard.vocabulary.text) < 2:
        raise NotExportable(
            "with one class there is no other answer, so nothing to decide. Give more classes."
        )


def _metadata(guard: Guard, folder: Path) -> dict[str, str]:
    """The metadata of the head's file, after what the head does not know.

    Those of the head come last: ``vilu.artifacts.paths`` looks for them near the end of a file.
    """
    space = guard.vocabulary.space
    decision = ""
    if guard.calibration is not None and guard.calibration.rule is not None:
        decision = guard.calibration.guarantee_text or ""
    return {
        "vilu.classes": plain_json(list(guard.vocabulary.names)).decode(),
        "vilu.decision": decision,
        "vilu.preprocess": space.preprocess or "",
        "vilu.predictor": fit_fingerprint(folder),
        **metadata(guard.predictor, space, fingerprint_of(folder)),
    }


def _pictures(n: int, backbone: Backbone) -> Tensor:
    """(n, 3, H, W) pixels of random pictures, from large patches to fine grain."""
    random = np.random.default_rng(n)
    pictures = []
    for place in range(n):
        side = 2 ** (1 + place % 7)
        grain = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        picture = grain.resize((256, 256), Image.Resampling.BICUBIC)
        pictures.append(backbone.preprocess(picture))
    return torch.stack(pictures)


def _check(
    guard: Guard, graph: ImageGraph, content: bytes, trials: list[tuple[Tensor, tuple[Tensor, ...]]]
) -> float:
    """The largest difference of a file's uncertainties from torch's.

    DataError where it says something else.
    """
    run = runner(content)
    step = torch.finfo(graph.dtype).eps
    rule = rule_of(guard)
    answered = []
    worst = 0.0
    for pixels, by_torch in trials:
        outputs = dict(zip(graph.outputs, run({PIXELS: pixels}), strict=True))
        uncertainty, answer = (outputs[name] for name in SAID)
        arrays = tuple(torch.from_numpy(outputs[name]) for name in graph.arrays)
        for name, array, expected in zip(graph.arrays, arrays, by_torch, strict=True):
            _require_near(name, array, expected, step)
        if rule is not None:
            names = [guard.vocabulary.names[place] for place in answer.tolist()]
            _require_same_decisions(outputs[ACCEPT], rule.accept(uncertainty, names))
        # the head alone is judged on the file's own embeddings, the whole graph on torch's
        answered.append((graph.inputs(arrays), uncertainty, answer))
        expected_uncertainty, _, is_clear = reference(guard.predictor, graph.inputs(by_torch))
        differences = np.abs(uncertainty - expected_uncertainty)[is_clear]
        worst = max(worst, float(differences.max(initial=0.0)))
    largest_difference(guard.predictor, answered)
    return worst


def _require_near(name: str, array: Tensor, expected: Tensor, step: float) -> None:
    """Refuse embeddings that are not torch's.

    They may differ by a step of their number format, and by the order of sums, which counts in
    proportion to the largest number of a row.
    """
    gap = (array - expected).abs()
    size = expected.abs()
    largest = size.amax(dim=1, keepdim=True)
    is_near = gap <= step * size + ROUNDING * largest
    if not bool(is_near.all()):
        raise DataError(
            f"the exported tower gives other {name} rows, by {float(gap.max()):.2g}. Nothing was "
            "written."
        )


def _require_same_decisions(accepted: np.ndarray, expected: np.ndarray) -> None:
    if not np.array_equal(accepted, expected):
        raise DataError("the exported graph decides otherwise than the rule. Nothing was written.")
