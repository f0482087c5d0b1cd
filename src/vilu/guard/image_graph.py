"""Pixels to decisions as one ONNX file: the image tower, the classes, the predictor and its rule."""

from __future__ import annotations

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
from vilu.predictors.persistence.record import fit_fingerprint
from vilu.predictors.plus.ood import NEGATIVES

PIXELS = "pixels"
ACCEPT = "accept"
ALONE = "Without --with-backbone the head alone is exported; it takes embeddings."
BATCHES = (1, 2, 7)
"""Numbers of random pictures that an export is tried with."""


class ImageGraph(nn.Module):
    """Pixels (N, 3, H, W) to what a guard says of them; ``outputs`` names it."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.score = score_graph(guard.predictor)
        self.backbone = guard.backbone
        wanted = guard.predictor.columns_to_score
        vocabulary = guard.vocabulary
        self.text = nn.Buffer(vocabulary.text)
        self.dtype = getattr(torch, vocabulary.dtype)
        words: Tensor | None = None
        if NEGATIVES in wanted:
            words = nn.Buffer(vocabulary.columns[NEGATIVES])
        self.words = words
        self.arrays: tuple[str, ...] = ("image",)
        if FEATURES in wanted:
            self.arrays = ("image", FEATURES)
        ends: Tensor | None = None
        self.outputs: tuple[str, ...] = (*SAID, *self.arrays)
        rule = rule_of(guard)
        if rule is not None:
            names = vocabulary.names
            groups = names if rule.grouped_by == "prediction" else None
            limits = np.stack(rule.limits(len(names), groups))
            ends = nn.Buffer(torch.from_numpy(limits))
            self.outputs = (*SAID, ACCEPT, *self.arrays)
        self.ends = ends  # (2, K) floor and threshold of every answer

    def embed(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Embeddings (N, D), and features (N, F) where the score looks at them, rounded as a store rounds them."""
        encode = self.backbone.encode_images_and_features
        rows = encode(pixels) if FEATURES in self.arrays else (self.backbone.encode_images(pixels),)
        return tuple(array.to(self.dtype).float() for array in rows)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Uncertainty, answer, whether it is accepted where there is a rule, and ``embed``."""
        image, *features = self.embed(pixels)
        uncertainty, answer = self.score(**self.inputs((image, *features)))
        if self.ends is None:
            return uncertainty, answer, image, *features
        floor = self.ends[0][answer]
        threshold = self.ends[1][answer]
        return (
            uncertainty,
            answer,
            (uncertainty > floor) & (uncertainty <= threshold),
            image,
            *features,
        )

    def inputs(self, arrays: tuple[Tensor, ...]) -> Trial:
        """What the score of such rows is a function of."""
        trial = {**dict(zip(self.arrays, arrays, strict=True)), "text": self.text}
        if self.words is not None:
            trial[NEGATIVES] = self.words
        return trial


def rule_of(guard: Guard) -> Rule | None:
    """What accepts or abstains; None where nothing does."""
    return None if guard.calibration is None else guard.calibration.rule


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
    """Write backbone, classes, predictor and rule of a folder as one ONNX file; returns its largest difference.

    Input is ``pixels`` (N, 3, H, W) float32, N >= 1 open, as the backbone's ``preprocess`` makes
    them of an image: decoding, resizing and scaling stay outside. Outputs are ``uncertainty`` (N,)
    float64; ``prediction`` (N,) int64, a place in the classes, which the metadata name
    (``vilu.classes``, JSON); ``accept`` (N,) bool where the folder has a rule; ``image`` (N, D)
    float32, the embeddings, of unit norm and rounded as ``vilu.Guard`` rounds them; and
    ``features`` (N, F) where the predictor looks at them.

    onnxruntime runs the file on random pictures, and it is written only where embeddings are
    torch's but for one step of their number format, uncertainties and answers are the predictor's
    of these embeddings, as near as ``export_onnx`` demands, and decisions are the rule's. What is
    returned is the difference of uncertainties between the two from the pixels on.

    Args:
        folder: A predictor with its classes, as ``vilu triage`` and ``vilu calibrate`` leave it.
        path: The file; another export that lies there is replaced, and no other file.
        models: As of ``vilu.Guard``.
        backbone: As of ``vilu.Guard``; on the CPU.

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
    trials = [
        (pixels, graph.embed(pixels)) for pixels in (_pictures(n, guard.backbone) for n in BATCHES)
    ]
    try:
        content = write_graph(
            graph, {PIXELS: trials[-1][0]}, graph.outputs, _metadata(guard, Path(folder))
        )
    except (torch.onnx.OnnxExporterError, NotExportable) as error:
        why = str(error.__cause__ or error).strip().split("\n")[0]
        raise NotExportable(
            f"{guard.backbone.space.backbone} cannot be written as ONNX: {why} {ALONE}"
        ) from error
    worst = _check(guard, graph, content, trials)
    write_bytes(path, content)
    return worst


def _require_graph(guard: Guard) -> None:
    """Refuse what no file could say."""
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
    """As of the head's file, which must come last to be found (``places``), and what the head does not know."""
    space = guard.vocabulary.space
    calibration = guard.calibration
    return {
        "vilu.classes": plain_json(list(guard.vocabulary.names)).decode(),
        "vilu.decision": (calibration and rule_of(guard) and calibration.guarantee_text) or "",
        "vilu.preprocess": space.preprocess or "",
        "vilu.predictor": fit_fingerprint(folder),
        **metadata(guard.predictor, space, fingerprint_of(folder)),
    }


def _pictures(n: int, backbone: Backbone) -> Tensor:
    """(n, 3, H, W) pixels of random pictures, from large patches to fine grain."""
    random = np.random.default_rng(n)
    sides = [2 ** (1 + place % 7) for place in range(n)]
    grains = [
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)) for side in sides
    ]
    return torch.stack(
        [
            backbone.preprocess(grain.resize((256, 256), Image.Resampling.BICUBIC))
            for grain in grains
        ]
    )


def _check(
    guard: Guard, graph: ImageGraph, content: bytes, trials: list[tuple[Tensor, tuple[Tensor, ...]]]
) -> float:
    """The largest difference of a file's uncertainties from torch's.

    DataError where it says something else.
    """
    run = runner(content)
    answered = []
    worst = 0.0
    rule = rule_of(guard)
    for pixels, expected in trials:
        outputs = dict(zip(graph.outputs, run({PIXELS: pixels}), strict=True))
        uncertainty, answer = (outputs[name] for name in SAID)
        arrays = tuple(torch.from_numpy(outputs[name]) for name in graph.arrays)
        for name, mine, theirs in zip(graph.arrays, arrays, expected, strict=True):
            _require_same(name, mine, theirs, torch.finfo(graph.dtype).eps)
        names = [guard.vocabulary.names[place] for place in answer.tolist()]
        if (
            ACCEPT in outputs
            and (outputs[ACCEPT] != (rule is not None and rule.accept(uncertainty, names))).any()
        ):
            raise DataError(
                "the exported graph decides otherwise than the rule. Nothing was written."
            )
        answered.append((graph.inputs(arrays), uncertainty, answer))
        by_torch, _, clear = reference(guard.predictor, graph.inputs(expected))
        worst = max(worst, float(np.abs(uncertainty - by_torch)[clear].max(initial=0.0)))
    largest_difference(guard.predictor, answered)
    return worst


def _require_same(name: str, found: Tensor, expected: Tensor, step: float) -> None:
    """Refuse rows that are farther apart than a step of their number format, and the order of sums, explain."""
    gap = (found - expected).abs()
    size = expected.abs()
    if not bool((gap <= step * size + ROUNDING * size.amax(dim=1, keepdim=True)).all()):
        raise DataError(
            f"the exported tower gives other {name} rows, by {float(gap.max()):.2g}. Nothing was "
            "written."
        )
