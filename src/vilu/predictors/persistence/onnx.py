"""Export of a predictor as an ONNX file."""

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
    """A batch for a graph: its properties are computed without reading values or sizes in Python.

    All (N, K) logits are computed at once.
    """

    @cached_property
    def logits(self) -> Tensor:
        """(N, K) float32 logits, summed in float64.

        Runtimes sum in another order than torch. In float32 and at a logit scale of 100, logits
        would differ by 1e-4.
        """
        cosine = self.image.double() @ self.text.double().T
        return (cosine * self.logit_scale + self.logit_bias).to(self.image.dtype)

    @cached_property
    def zero_shot(self) -> ZeroShot:
        """The zero-shot answers, from the logits."""
        return self.rivals.zero_shot(self.first_equal)

    @cached_property
    def first_equal(self) -> Tensor:
        """(K,) int64, as by ``vilu.embeddings.similarity.first_equal``."""
        _, same = torch.unique(self.text, dim=0, return_inverse=True)
        indices = positions(self.text)
        after_last = torch.full_like(indices, self.text.shape[0])
        same = same.long()  # torch 2.10 exports it with the dtype of the text otherwise
        return after_last.scatter_reduce(0, same, indices, "amin")[same]

    def alike(self, answer: Tensor) -> Tensor:
        """(N, K) bool: the candidates that are the answer; all candidates are different answers."""
        return positions(self.text) == answer[:, None]


class PlainBatch(GraphBatch):
    """A ``GraphBatch`` with logits in float32, as predictors have them, to measure the rounding."""

    logits = Batch.logits


def positions(rows: Tensor) -> Tensor:
    """Indices 0 ... N - 1 of the N rows; N stays open in an exported graph."""
    return torch.arange(rows.shape[0], device=rows.device)


class ScoreGraph(nn.Module):
    """From images, texts and further columns to uncertainties and zero-shot answers."""

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
        """Uncertainties (N,) float64 and zero-shot answers (N,) int64."""
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
    """The score of a predictor as a module of images (N, D) and texts (K, D), for any N and K."""
    if "graph" not in vars(type(predictor)):
        known = ", ".join(sorted(name for name, cls in PREDICTORS.items() if "graph" in vars(cls)))
        raise NotExportable(
            f"{predictor.name} cannot be exported as a graph of image and text. These can: {known}."
        )
    if predictor.answer != "zero_shot":
        raise NotExportable(
            f"a graph answers zero-shot, and this {predictor.name} judges {predictor.answer} "
            "answers. Export a predictor of zero-shot answers: `vilu fit` or `vilu triage` with "
            "--answer zero_shot."
        )
    predictor.require_fitted()
    space = predictor.fitted_space
    constant = predictor.constant_
    if constant is None:
        return ScoreGraph(predictor.graph(), space).eval()
    same = Graph(lambda batch: torch.full_like(batch.image[:, 0], constant, dtype=torch.float64))
    return ScoreGraph(same, space).eval()


TOLERANCE = 1e-5
"""Difference between uncertainties of ONNX and torch that is always allowed."""

ROUNDINGS = 4
"""Factor by which the difference may exceed the rounding of the score in float32.

The rounding is the difference between the score in float32 and in float64, both by torch.
"""

TIE = 1e-4
"""Difference between the two largest cosines below which rounding may decide the answer.

It is relative to the largest cosine.
"""

SIZES = ((1, 2), (2, 3), (7, 40), (64, 1_000), (300, 17))
"""Numbers of images and of candidates with which an export is tested."""

TRIED_WORDS = 40
"""Number of everyday words with which an export is tested."""

MAX_ONNX_BYTES = 2**31 - 1  # a protocol buffer holds no more


Trial = dict[str, Tensor]
"""Inputs of a graph by name, in the order of the graph.

They are ``image`` (N, D), ``text`` (K, D), and where the score uses them ``features`` (N, F) and
``negatives`` (M, D).
"""

SAID = ("uncertainty", "prediction")
"""Names of the outputs of a graph."""


def export_onnx(folder: str | Path, path: str | Path) -> float:
    """Write the score of a saved predictor as an ONNX file.

    The largest difference of its uncertainties from those of the predictor is returned.

    The inputs are

    - ``image`` (N, D) and ``text`` (K, D), float32 rows of unit norm,
    - ``features`` (N, F), if the predictor was fitted on them,
    - ``negatives`` (M, D), the column of everyday words, if the predictor uses them.

    Any N >= 1, K >= 2 and M >= 2 are allowed. All texts must be different: equal texts are one
    candidate of ``vilu.Embeddings``. The outputs are ``uncertainty`` (N,) float64 and
    ``prediction`` (N,) int64. Logit scale and bias are constants of the graph.

    Before the file is written, onnxruntime runs it on random rows. All answers must be the same as
    those of the predictor. All uncertainties must differ by at most ``TOLERANCE``, or by at most
    ``ROUNDINGS`` times the rounding of the score in float32 if that is larger. The rounding is
    large for a large logit scale or a memory.

    Args:
        folder: A saved predictor.
        path: The file to write. An earlier export there is replaced; any other file is refused.
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
    """The score of a predictor as the bytes of an ONNX file, whose metadata describe the predictor.

    It raises the same errors as ``export_onnx``, except those of the comparison.
    """
    graph = score_graph(predictor)
    example = next(trials(predictor, ((3, 5),)))
    return write_graph(graph, example, SAID, metadata(predictor, graph.space, fingerprint))


def write_graph(
    graph: nn.Module, example: Trial, outputs: Sequence[str], facts: dict[str, str]
) -> bytes:
    """The bytes of an ONNX file of a module, with the ``facts`` as metadata.

    The first size of every input stays open: K of texts, M of everyday words, N of all others.
    """
    rows = torch.export.Dim("N")
    open_sizes = {"text": torch.export.Dim("K", min=2), NEGATIVES: torch.export.Dim("M", min=2)}
    with quiet(), redirect_stdout(StringIO()):  # onnxscript before 0.7 prints its progress
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
            f"the graph would accept only one number of rows of {', '.join(fixed)}, because "
            "something in it reads that number (as len(x) does; x.shape[0] leaves it open)."
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
    """Metadata of a file: facts about its predictor and its embedding space, as strings."""
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
    """A function that runs an ONNX file by onnxruntime, from inputs to a list of outputs."""
    onnxruntime = import_extra("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda trial: session.run(None, {name: rows.numpy() for name, rows in trial.items()})


def largest_difference(
    predictor: FailurePredictor, runs: Iterable[tuple[Trial, NDArray[Any], NDArray[Any]]]
) -> float:
    """The largest difference between uncertainties of an ONNX file and of its predictor.

    ``runs`` are inputs of the file, with its uncertainties (N,) and its answers (N,). Rows whose
    two largest logits are nearly equal are left out, since rounding decides their answer.

    Raises:
        DataError: If answers differ, or uncertainties differ more than rounding explains.
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
    """The largest absolute value among some rows (N,) bool; NaN if one of them is NaN."""
    return float(np.abs(differences)[rows].max(initial=0.0))


def reference(
    predictor: FailurePredictor, trial: Trial
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Uncertainties (N,) and answers (N,) of the predictor, and whether answers are clear (N,).

    An answer is clear if rounding cannot change it.
    """
    image = trial["image"]
    text = trial["text"]
    columns = {name: trial[name] for name in predictor.columns_to_score}
    source = Embeddings(image, text, space=predictor.space_, columns=columns)
    with quiet():  # the predictor may warn that random rows differ from its training rows
        scored = list(predictor.scored(source))
    uncertainty = np.concatenate([scores for _, scores in scored])
    prediction = np.concatenate([batch.prediction.numpy(force=True) for batch, _ in scored])
    first, second = (image @ text.unique(dim=0).T).topk(2, dim=1).values.unbind(dim=1)
    return uncertainty, prediction, (first - second > TIE * first.abs()).numpy()


def trials(predictor: FailurePredictor, sizes: tuple[tuple[int, int], ...]) -> Iterator[Trial]:
    """Yield random inputs of the ``sizes``, of unit norm; every other image is near a candidate.

    Some graphs treat the texts of their ``classes`` differently from other texts. They are also
    tested with these texts alone, in another order, and together with other texts.
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
    """Random inputs: ``n`` images for the candidates ``text``, and columns of the ``widths``."""
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
    """(n, dim) float32 random rows of unit norm."""
    return functional.normalize(
        torch.randn(n, dim, generator=generator, dtype=torch.float32), dim=1
    )
