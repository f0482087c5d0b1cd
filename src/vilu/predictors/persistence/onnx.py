"""A predictor as ONNX."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from functools import cached_property
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from vilu.artifacts.disk import write_bytes
from vilu.artifacts.paths import claim_file
from vilu.embeddings.memory import Embeddings
from vilu.embeddings.similarity import ZeroShot
from vilu.embeddings.source import Batch
from vilu.embeddings.space import EmbeddingSpace
from vilu.errors import UNKNOWN, DataError, UsageError
from vilu.extras import import_extra, quiet
from vilu.predictors.contract.catalogue import PREDICTORS
from vilu.predictors.contract.predictor import FailurePredictor, NotExportable
from vilu.predictors.nn.attention import FEATURES
from vilu.predictors.nn.head import Graph
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.predictors.persistence.storage import load
from vilu.predictors.plus.ood import NEGATIVES


class GraphBatch(Batch):
    """A batch whose properties are made without a look at values or sizes.

    All (N, K) logits are there at once.
    """

    @cached_property
    def logits(self) -> Tensor:
        """(N, K) float32, summed in float64.

        Runtimes add in other orders than torch, which at a scale of 100 differs by 1e-4.
        """
        cosine = self.image.double() @ self.text.double().T
        return (cosine * self.logit_scale + self.logit_bias).to(self.image.dtype)

    @cached_property
    def zero_shot(self) -> ZeroShot:
        """From the logits."""
        return self.rivals.zero_shot(self.first_equal)

    @cached_property
    def first_equal(self) -> Tensor:
        """(K,) as ``vilu.embeddings.similarity.first_equal``."""
        _, same = torch.unique(self.text, dim=0, return_inverse=True)
        indices = positions(self.text)
        nowhere = torch.full_like(indices, self.text.shape[0])
        same = same.long()  # torch 2.10 exports it as of the text's kind
        return nowhere.scatter_reduce(0, same, indices, "amin")[same]

    def alike(self, answer: Tensor) -> Tensor:
        """(N, K); all candidates are different answers."""
        return positions(self.text) == answer[:, None]


class PlainBatch(GraphBatch):
    """One whose logits are summed in float32, as the predictors' are: what they round."""

    logits = Batch.logits


def positions(rows: Tensor) -> Tensor:
    """0 ... len - 1, of a length that stays open."""
    return torch.arange(rows.shape[0], device=rows.device)


class ScoreGraph(nn.Module):
    """Image, text and what else is looked at, to uncertainty and zero-shot answer in one space."""

    batch: type[GraphBatch] = GraphBatch

    def __init__(self, score: nn.Module, space: EmbeddingSpace) -> None:
        super().__init__()
        self.score = score
        self.space = space

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        features: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(N,) float64 and (N,) int64."""
        rows = positions(image)
        columns = {FEATURES: features, NEGATIVES: negatives}
        batch = self.batch(
            image=image,
            text=text,
            target=torch.full_like(rows, UNKNOWN),
            index=rows,
            logit_scale=self.space.logit_scale,
            logit_bias=self.space.logit_bias,
            columns={name: values for name, values in columns.items() if values is not None},
        )
        return cast("Tensor", self.score(batch)).double(), batch.prediction


def score_graph(predictor: FailurePredictor) -> ScoreGraph:
    """The score of a predictor as a module of image (N, D) and text (K, D), N and K open."""
    if "graph" not in vars(type(predictor)):
        known = ", ".join(sorted(name for name, cls in PREDICTORS.items() if "graph" in vars(cls)))
        raise NotExportable(
            f"{predictor.name} cannot be exported as a graph of image and text. These can: {known}."
        )
    if predictor.answer != "zero_shot":
        raise NotExportable(
            f"a graph answers zero-shot, and this {predictor.name} judges {predictor.answer} "
            "answers. Export one that was fitted without answer."
        )
    predictor.require_fitted()
    space = predictor.fitted_space
    constant = predictor.constant_
    if constant is None:
        return ScoreGraph(predictor.graph(), space).eval()
    same = Graph(lambda batch: torch.full_like(batch.image[:, 0], constant, dtype=torch.float64))
    return ScoreGraph(same, space).eval()


TOLERANCE = 1e-5
"""Largest difference of an uncertainty from torch's that counts as rounding.

It does so without a further look.
"""

ROUNDINGS = 4
"""How many times the rounding of the formula in float32 is allowed else.

The rounding is its distance from float64, both in torch.
"""

TIE = 1e-4
"""Gap of the two largest logits below which rounding may decide.

Over the logit scale times the largest cosine.
"""

SIZES = ((1, 2), (2, 3), (7, 40), (64, 1_000), (300, 17))
"""Numbers of images and of candidates that an export is tried with."""

TRIED_WORDS = 40
"""Everyday words that an export is tried with."""

MAX_ONNX_BYTES = 2**31 - 1  # a protocol buffer holds no more


Trial = dict[str, Tensor]
"""Inputs of a graph in their order:

``image`` (N, D), ``text`` (K, D), and perhaps ``features`` (N, F) and ``negatives`` (M, D).
"""

SAID = ("uncertainty", "prediction")
"""Outputs of a graph."""


def export_onnx(folder: str | Path, path: str | Path) -> float:
    """Write the score of a saved predictor as an ONNX file.

    Returned is its largest difference from the predictor.

    Inputs are ``image`` (N, D) and ``text`` (K, D), float32 rows of unit norm, and ``features`` (N,
    F) where the predictor was fitted on them. Where it looks at everyday words for the outcome
    "outside", these are an input, too: ``negatives`` (M, D), the store's column of that name. N >=
    1, K >= 2 and M >= 2 are open, and no two texts are equal (``vilu.Embeddings`` makes one
    candidate of those). Outputs are ``uncertainty`` (N,)
    float64 and ``prediction`` (N,) int64. Logit scale and bias are constants. The file is run by
    onnxruntime on random rows of several numbers, and is written only where every answer is the
    same, and every uncertainty within ``TOLERANCE`` or, where the formula itself rounds more than
    that in float32 (a large logit scale, a memory), ``ROUNDINGS`` times that.

    Args:
        folder: A saved predictor.
        path: The file; another export that lies there is replaced, and no other file.
    """
    for module in ("onnx", "onnxscript"):  # torch imports them
        import_extra(module, "onnx")
    claim_file(path, "ONNX export", overwrite=True)
    predictor = load(folder)
    content = to_onnx(predictor, fit_fingerprint(folder))
    run = runner(content)
    runs = ((trial, *run(trial)) for trial in trials(predictor, SIZES))
    worst = largest_difference(predictor, runs)
    write_bytes(path, content)
    return worst


def to_onnx(predictor: FailurePredictor, fingerprint: str) -> bytes:
    """The score of a predictor as ONNX, with what it was made from in its metadata.

    It raises what ``export_onnx`` raises.
    """
    graph = score_graph(predictor)
    example = next(trials(predictor, ((3, 5),)))
    return write_graph(graph, example, SAID, metadata(predictor, graph.space, fingerprint))


def write_graph(
    graph: nn.Module, example: Trial, outputs: Sequence[str], facts: dict[str, str]
) -> bytes:
    """A module as ONNX, with metadata.

    Of its inputs the first size is open: K of texts, M of everyday words, N of images.
    """
    rows = torch.export.Dim("N")
    open_sizes = {"text": torch.export.Dim("K", min=2), NEGATIVES: torch.export.Dim("M", min=2)}
    with quiet(), redirect_stdout(StringIO()):  # where onnxscript before 0.7 says how it went
        exported = torch.onnx.export(
            graph,
            kwargs=example,
            dynamo=True,
            verbose=False,
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes={name: {0: open_sizes.get(name, rows)} for name in example},
        )
    program = cast("torch.onnx.ONNXProgram", exported)  # dynamo=True always gives one
    inputs = program.model.graph.inputs
    fixed = [
        str(entry.name)
        for entry in inputs
        if entry.shape is None or isinstance(entry.shape[0], int)
    ]
    if fixed:
        raise NotExportable(
            f"the graph would take one number of {', '.join(fixed)} alone, as something in it "
            "looks at that number (as by len(x), where x.shape[0] leaves it open)."
        )
    program.model.metadata_props.update(facts)
    model = program.model_proto
    if model.ByteSize() > MAX_ONNX_BYTES:
        raise UsageError(
            f"the graph has {model.ByteSize()} bytes as ONNX; at most {MAX_ONNX_BYTES} fit."
        )
    return bytes(model.SerializeToString())


def metadata(
    predictor: FailurePredictor, space: EmbeddingSpace, fingerprint: str
) -> dict[str, str]:
    """What binds a file to its predictor and to the embedding space, as texts."""
    return {
        "vilu.version": version("vilu"),
        "vilu.method": predictor.name,
        "vilu.fingerprint": fingerprint,
        "vilu.is_probability": str(predictor.is_probability).lower(),
        "vilu.embeddings.space": space.fingerprint,
        "vilu.backbone": space.backbone or "",
        "vilu.embed_dim": str(space.embed_dim),
        "vilu.logit_scale": repr(space.logit_scale),
        "vilu.logit_bias": repr(space.logit_bias),
    }


def runner(content: bytes) -> Callable[[Trial], Any]:
    """An ONNX file as onnxruntime runs it: from inputs to a list of outputs."""
    onnxruntime = import_extra("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda trial: session.run(None, {name: rows.numpy() for name, rows in trial.items()})


def largest_difference(
    predictor: FailurePredictor, runs: Iterable[tuple[Trial, NDArray[Any], NDArray[Any]]]
) -> float:
    """The largest difference from the predictor of what an ONNX file gives.

    That is inputs, uncertainty and answer (N,).

    Rows whose two largest logits are nearly equal are left out: there rounding chooses the answer.

    Raises:
        DataError: If an answer is another, or a difference is more than rounding explains.
    """
    plain = score_graph(predictor)
    exact = copy.deepcopy(plain).double()
    plain.batch = PlainBatch
    gaps = []
    roundings = []
    for trial, uncertainty, answer in runs:
        expected, prediction, clear = reference(predictor, trial)
        if (answer != prediction)[clear].any():
            raise DataError(
                f"the exported {predictor.name} gives other zero-shot answers. Nothing was written."
            )
        with torch.no_grad():
            rounded = (
                plain(**trial)[0]
                - exact(**{name: rows.double() for name, rows in trial.items()})[0]
            )
        gaps.append(largest(uncertainty - expected, clear))
        roundings.append(largest(rounded.numpy(), clear))
    worst = float(np.max(gaps))
    allowed = max(TOLERANCE, ROUNDINGS * max(roundings))
    if not worst <= allowed:
        raise DataError(
            f"the exported {predictor.name} differs by {worst:.2g} from the predictor, "
            f"and rounding explains {allowed:.2g} of it. Nothing was written."
        )
    return worst


def largest(differences: NDArray[np.float64], rows: NDArray[np.bool_]) -> float:
    """The largest absolute value among some rows; NaN where one is."""
    return float(np.abs(differences)[rows].max(initial=0.0))


def reference(
    predictor: FailurePredictor, trial: Trial
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Uncertainty and answer (N,) by the predictor itself, and whether the answer is clear."""
    image = trial["image"]
    text = trial["text"]
    columns = {name: trial[name] for name in predictor.columns_to_score}
    source = Embeddings(image, text, space=predictor.space_, columns=columns)
    with quiet():  # which may say that random rows are unlike those of the training
        scored = list(predictor.scored(source))
    uncertainty = np.concatenate([scores for _, scores in scored])
    prediction = np.concatenate([batch.prediction.numpy(force=True) for batch, _ in scored])
    first, second = (image @ text.unique(dim=0).T).topk(2, dim=1).values.unbind(dim=1)
    return uncertainty, prediction, (first - second > TIE * first.abs()).numpy()


def trials(predictor: FailurePredictor, sizes: tuple[tuple[int, int], ...]) -> Iterator[Trial]:
    """Random rows of unit norm: half of the images near a candidate.

    A graph that treats some texts unlike others (its ``classes``) also meets those alone, in
    another order, and beside others.
    """
    space = predictor.fitted_space
    graph = score_graph(predictor).score
    generator = torch.Generator().manual_seed(0)
    classes = cast(
        "Tensor", getattr(graph, "classes", torch.empty(0, 0, dtype=torch.float32))
    ).cpu()
    known = {NEGATIVES: space.embed_dim, **getattr(graph, "widths", {})}
    widths = {name: known[name] for name in predictor.columns_to_score}
    groups = [random_rows(k, space.embed_dim, generator) for _, k in sizes]
    for (n, _), text in zip(sizes, groups, strict=True):
        yield trial_of(widths, n, text, generator)
    if len(classes) > 1:
        order = classes[torch.randperm(len(classes), generator=generator)]
        for text in (classes, order, order[:2], torch.cat([order, groups[0]])):
            yield trial_of(widths, 9, text, generator)


def trial_of(widths: dict[str, int], n: int, text: Tensor, generator: torch.Generator) -> Trial:
    """``n`` images for some candidates, with columns of these widths."""
    image = random_rows(n, text.shape[1], generator)
    near = text[torch.randint(len(text), (n,), generator=generator)]
    image[::2] = functional.normalize(near + image / 2, dim=1)[::2]
    trial = {"image": image, "text": text}
    for name, width in widths.items():
        if name == NEGATIVES:
            trial[name] = random_rows(TRIED_WORDS, width, generator)
        else:
            trial[name] = torch.randn(n, width, generator=generator, dtype=torch.float32)
    return trial


def random_rows(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """(n, D) of unit norm."""
    return functional.normalize(
        torch.randn(n, dim, generator=generator, dtype=torch.float32), dim=1
    )
