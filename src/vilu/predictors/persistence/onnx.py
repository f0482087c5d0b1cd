"""How a predictor is exported as an ONNX file."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
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
from vilu.extras import import_extra, suppress_messages
from vilu.predictors.contract.catalogue import PREDICTORS
from vilu.predictors.contract.given_logits import is_of_given_logits
from vilu.predictors.contract.predictor import FailurePredictor, NotExportable
from vilu.predictors.nn.attention import FEATURES
from vilu.predictors.nn.head import Graph
from vilu.predictors.persistence.description import fit_fingerprint
from vilu.predictors.persistence.files import SavedModel, folder_of
from vilu.predictors.persistence.storage import load_predictor
from vilu.predictors.plus.ood import NEGATIVES


class GraphBatch(Batch):
    """A batch for an exported graph. No property branches in Python on values or sizes.

    All (N, K) logits are computed at once.
    """

    @cached_property
    def logits(self) -> Tensor:
        """(N, K) float32 logits, from products summed in float64.

        ONNX runtimes and torch sum in different orders. If the sums were in float32, logits at a
        logit scale of 100 would differ by 1e-4.
        """
        cosine = self.image.double() @ self.text.double().T
        return (cosine * self.logit_scale + self.logit_bias).to(self.image.dtype)

    @cached_property
    def zero_shot(self) -> ZeroShot:
        """The zero-shot answers, from the logits."""
        return self.rivals.zero_shot(self.first_equal_index)

    @cached_property
    def first_equal_index(self) -> Tensor:
        """(K,) int64: for every candidate, the index of the first candidate with equal embedding.

        The function ``vilu.embeddings.similarity.index_of_first_equal`` has the same result.
        """
        _, group_of_text = torch.unique(self.text, dim=0, return_inverse=True)
        # without this conversion, torch 2.10 exports the groups with the dtype of the text
        group_of_text = group_of_text.long()
        indices = row_numbers(self.text)
        after_last = torch.full_like(indices, self.text.shape[0])
        first_of_group = after_last.scatter_reduce(0, group_of_text, indices, reduce="amin")
        return first_of_group[group_of_text]

    def alike(self, answer: Tensor) -> Tensor:
        """Return a mask (N, K): whether each candidate is a row's ``answer`` (N,).

        In a graph all candidates are different answers, so the indices are compared.
        """
        answer_column = answer[:, None]
        return row_numbers(self.text) == answer_column


class Float32Batch(GraphBatch):
    """A ``GraphBatch`` with logits computed in float32, as predictors compute them.

    It is used to measure how much rounding changes the scores.
    """

    logits = Batch.logits


def row_numbers(rows: Tensor) -> Tensor:
    """Return the N rows' indices 0 ... N - 1, for any N in an exported graph."""
    return torch.arange(rows.shape[0], device=rows.device)


class ScoreGraph(nn.Module):
    """Module that computes uncertainties and answers from images, texts and columns.

    Attributes:
        batch_class: Class for the batches to score.
    """

    batch_class: type[GraphBatch] = GraphBatch

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
        """Compute uncertainties (N,) float64 and the judged answers (N,) int64."""
        rows = row_numbers(image)
        columns = {FEATURES: features, NEGATIVES: negatives}
        target = torch.full_like(rows, UNKNOWN)
        batch = self.batch_class(
            image=image,
            text=text,
            target=target,
            index=rows,
            logit_scale=self.space.logit_scale,
            logit_bias=self.space.logit_bias,
            columns={name: column for name, column in columns.items() if column is not None},
        )
        judged_batch = self.judged(batch)
        score: Tensor = self.score(judged_batch)
        uncertainty = score.double()
        return uncertainty, judged_batch.prediction

    def judged(self, batch: GraphBatch) -> Batch:
        """Return the batch with the judged answers, here the zero-shot answers."""
        return batch


class AdaptedGraph(ScoreGraph):
    """A ``ScoreGraph`` for adapted answers. Its ``score`` has a method ``log_posterior``.

    The score computes the posterior a second time, but onnxruntime merges equal parts of a graph.
    """

    def judged(self, batch: GraphBatch) -> Batch:
        """Return the batch with the likeliest candidates as answers."""
        score: Any = self.score
        log_posterior: Tensor = score.log_posterior(batch)
        answer = log_posterior.argmax(dim=1)
        return batch.judging(answer)


def score_graph(predictor: FailurePredictor) -> ScoreGraph:
    """Make a module that computes a predictor's scores from images (N, D) and texts (K, D).

    The module works for any N and K.

    Raises:
        NotExportable: If the method has no graph, was fitted on given logits, or judges given
            answers.
    """
    _require_exportable(predictor)
    predictor.require_fitted()
    space = predictor.fitted_space
    if predictor.answer == "adapted":
        graph: ScoreGraph = AdaptedGraph(predictor.graph(), space)
        return graph.eval()
    constant = predictor.constant_
    if constant is None:
        graph = ScoreGraph(predictor.graph(), space)
        return graph.eval()

    def constant_score(batch: Batch) -> Tensor:
        return torch.full_like(batch.image[:, 0], constant, dtype=torch.float64)

    graph = ScoreGraph(Graph(constant_score), space)
    return graph.eval()


def _require_exportable(predictor: FailurePredictor) -> None:
    """Refuse a predictor whose score cannot be a graph with image and text as inputs."""
    if is_of_given_logits(predictor.notes_):
        raise NotExportable(
            f"this {predictor.name} was fitted on given logits, and a graph takes image and text. "
            "Score with `vilu score`, or vilu.load(folder)."
        )
    if "graph" not in vars(type(predictor)):
        exportable_names = sorted(name for name, cls in PREDICTORS.items() if "graph" in vars(cls))
        listed_names = ", ".join(exportable_names)
        raise NotExportable(
            f"{predictor.name} cannot be exported as a graph of image and text. These can: "
            f"{listed_names}."
        )
    if predictor.answer == "given":
        raise NotExportable(
            f"a graph computes its answers, and this {predictor.name} judges given answers of "
            "another model. Export a predictor of other answers: `vilu fit --answer zero_shot`."
        )


MAX_DIFFERENCE = 1e-5
"""This difference between uncertainties by ONNX and by torch is always allowed."""

MAX_ROUNDINGS = 4
"""A difference up to this many times the score's rounding is allowed, too.

The rounding is the difference between the torch scores in float32 and in float64.
"""

MIN_COSINE_GAP = 1e-4
"""A zero-shot answer is clear if the relative gap between the two largest cosines is above this.

The relative gap is the difference divided by the largest cosine's absolute value. With a smaller
gap, rounding may change the zero-shot answer.
"""

MIN_POSTERIOR_GAP = 1e-2
"""An adapted answer is clear if the two largest log probabilities differ by more than this."""

TRIAL_SIZES = ((1, 2), (2, 3), (7, 40), (64, 1_000), (300, 17))
"""Image count and candidate count for each test of an export."""

N_TRIAL_WORDS = 40
"""How many everyday words the tests of an export use."""

MAX_ONNX_BYTES = 2**31 - 1  # a protocol buffer holds no more


GraphInputs = dict[str, Tensor]
"""Graph inputs by name, in the graph's order.

The inputs are ``image`` (N, D) and ``text`` (K, D). If used by the score, ``features`` (N, F) and
``negatives`` (M, D) follow.
"""

OUTPUT_NAMES = ("uncertainty", "prediction")
"""Names of a graph's outputs."""


def export_onnx(folder: str | Path | SavedModel, path: str | Path) -> float:
    """Write a saved predictor's score as an ONNX file.

    Returns the largest difference between uncertainties by the file and by the predictor.

    The graph's inputs are

    - ``image`` (N, D) and ``text`` (K, D), float32 rows with unit norm,
    - ``features`` (N, F), if the predictor was fitted on features,
    - ``negatives`` (M, D), the column with everyday words, if the predictor uses this column.

    Any N >= 1, K >= 2 and M >= 2 are allowed. All texts must be different, because equal texts
    would be a single candidate in ``vilu.Embeddings``. The outputs are ``uncertainty`` (N,) float64
    and ``prediction`` (N,) int64, the judged answers. Logit scale and bias are constants in the
    graph.

    Before the file is written, onnxruntime runs the graph on random rows. All answers must equal
    the predictor's answers. All uncertainties may differ by the larger of ``MAX_DIFFERENCE``
    and ``MAX_ROUNDINGS`` times the score's rounding in float32. The rounding is large for a
    predictor with a large logit scale or with a memory (``vilu.predictors.nn.experts.Memory``).

    Args:
        folder: A saved predictor, or a ``vilu.Selective``.
        path: The file to write. An earlier export is replaced, and any other file is refused.
    """
    for module in ("onnx", "onnxscript"):  # torch needs these modules for an export
        import_extra(module, "onnx")
    claim_file(path, "ONNX export", overwrite=True)
    predictor_folder = folder_of(folder)
    predictor = load_predictor(predictor_folder)
    content = to_onnx(predictor, fit_fingerprint(predictor_folder))
    run_onnx = onnx_function(content)
    results = []
    for inputs in trial_inputs(predictor, TRIAL_SIZES):
        uncertainty, answer = run_onnx(inputs)
        results.append((inputs, uncertainty, answer))
    difference = largest_difference(predictor, results)
    write_bytes(path, content)
    return difference


def to_onnx(predictor: FailurePredictor, fingerprint: str) -> bytes:
    """Return an ONNX file's bytes for a predictor's score, with metadata on the predictor.

    The file is not compared with the predictor here.
    """
    graph = score_graph(predictor)
    example_sizes = ((3, 5),)  # three images and five texts
    example = next(trial_inputs(predictor, example_sizes))
    facts = file_metadata(predictor, graph.space, fingerprint)
    try:
        return write_graph(graph, example, OUTPUT_NAMES, facts)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        first_line, *_ = str(cause).strip().split("\n")
        reason = first_line.rstrip(".")
        raise NotExportable(
            f"{predictor.name} cannot be written as ONNX: {reason}. Its _score must branch on no "
            "values and no sizes, and compute by torch alone."
        ) from error


def write_graph(
    graph: nn.Module, example: GraphInputs, outputs: Sequence[str], facts: dict[str, str]
) -> bytes:
    """Return a module's ONNX file as bytes, with the ``facts`` as metadata.

    The file accepts any row count for an input: K texts, M everyday words, and N rows in all
    remaining inputs.
    """
    n_rows = torch.export.Dim("N")
    dimensions = {"text": torch.export.Dim("K", min=2), NEGATIVES: torch.export.Dim("M", min=2)}
    # dimension 0 of every input has a variable size
    dynamic_shapes = {name: {0: dimensions.get(name, n_rows)} for name in example}
    with suppress_messages():
        exported_program = torch.onnx.export(
            graph,
            kwargs=example,
            dynamo=True,
            verbose=False,
            input_names=list(example),
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
        )
    program = cast("torch.onnx.ONNXProgram", exported_program)  # always with dynamo=True
    fixed_inputs = _names_of_fixed_inputs(program)
    if fixed_inputs:
        listed_names = ", ".join(fixed_inputs)
        raise NotExportable(
            f"the graph would accept only one number of rows of {listed_names}, because "
            "something in it reads that number (as len(x) does; x.shape[0] leaves it open)."
        )
    program.model.metadata_props.update(facts)
    model = program.model_proto
    size = model.ByteSize()
    if size > MAX_ONNX_BYTES:
        raise UsageError(f"the graph has {size} bytes as ONNX; at most {MAX_ONNX_BYTES} fit.")
    return bytes(model.SerializeToString())


def _names_of_fixed_inputs(program: torch.onnx.ONNXProgram) -> list[str]:
    """Return the names of a graph's inputs that accept only one row count."""
    fixed_inputs = []
    for graph_input in program.model.graph.inputs:
        shape = graph_input.shape
        if shape is None or isinstance(shape[0], int):
            fixed_inputs.append(str(graph_input.name))
    return fixed_inputs


def predictor_metadata(predictor: FailurePredictor, fingerprint: str) -> dict[str, str]:
    """Return an ONNX file's metadata for images or for tables: facts on the predictor."""
    return {
        "vilu.version": version("vilu"),
        "vilu.method": predictor.name,
        "vilu.answer": predictor.answer,
        "vilu.fingerprint": fingerprint,
        "vilu.is_probability": str(predictor.is_probability).lower(),
    }


def file_metadata(
    predictor: FailurePredictor, space: EmbeddingSpace, fingerprint: str
) -> dict[str, str]:
    """Return an ONNX file's metadata for images: facts on the predictor and embedding space."""
    return {
        **predictor_metadata(predictor, fingerprint),
        "vilu.embeddings.space": space.fingerprint,
        "vilu.backbone": space.backbone or "",
        "vilu.embed_dim": str(space.embed_dim),
        "vilu.logit_scale": repr(space.logit_scale),
        "vilu.logit_bias": repr(space.logit_bias),
    }


def onnx_function(content: bytes) -> Callable[[GraphInputs], Any]:
    """Return a function that runs an ONNX file on inputs. It returns a list of the outputs."""
    onnxruntime = import_extra("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(inputs: GraphInputs) -> list[NDArray[Any]]:
        arrays = {name: rows.numpy() for name, rows in inputs.items()}
        all_outputs = None  # no output names: onnxruntime returns all outputs
        outputs = session.run(all_outputs, arrays)
        return cast("list[NDArray[Any]]", outputs)

    return run


def largest_difference(
    predictor: FailurePredictor, results: Iterable[tuple[GraphInputs, NDArray[Any], NDArray[Any]]]
) -> float:
    """Return the largest difference between uncertainties by an ONNX file and by the predictor.

    ``results`` are the file's inputs, uncertainties (N,) and answers (N,). Rows without a clear
    answer (``reference_scores``) are left out.

    Raises:
        DataError: If answers differ, or uncertainties differ by more than the allowed rounding.
    """
    differences = []
    inputs_and_clear_rows = []
    for inputs, uncertainty, answer in results:
        expected_uncertainty, expected_answer, is_clear = reference_scores(predictor, inputs)
        is_different = answer != expected_answer
        if is_different[is_clear].any():
            raise DataError(
                f"the exported {predictor.name} gives other answers. Nothing was written."
            )
        differences.append(largest_absolute(uncertainty - expected_uncertainty, is_clear))
        inputs_and_clear_rows.append((inputs, is_clear))
    difference = float(np.max(differences))
    if difference <= MAX_DIFFERENCE:
        return difference
    rounding = largest_rounding(predictor, inputs_and_clear_rows)
    allowed_difference = max(MAX_DIFFERENCE, MAX_ROUNDINGS * rounding)
    if not difference <= allowed_difference:  # true also if the difference is NaN
        raise DataError(
            f"the exported {predictor.name} differs by {difference:.2g} from the predictor, "
            f"and rounding explains {allowed_difference:.2g} of it. Nothing was written."
        )
    return difference


def largest_rounding(
    predictor: FailurePredictor, inputs_and_clear_rows: Iterable[tuple[GraphInputs, NDArray[Any]]]
) -> float:
    """Return the largest difference between torch's scores in float32 and in float64.

    Only rows with a clear answer count. If a score is NaN, the result is NaN. Raise DataError if
    the score cannot be computed in float64.
    """
    float32_graph = score_graph(predictor)
    float64_graph = copy.deepcopy(float32_graph).double()
    float32_graph.batch_class = Float32Batch
    roundings = []
    for inputs, is_clear in inputs_and_clear_rows:
        float64_inputs = {name: rows.double() for name, rows in inputs.items()}
        try:
            with torch.no_grad():
                float32_score, _ = float32_graph(**inputs)
                float64_score, _ = float64_graph(**float64_inputs)
        except RuntimeError as error:  # torch refuses products of float32 and float64
            raise DataError(
                f"the exported {predictor.name} differs from the predictor by more than "
                f"{MAX_DIFFERENCE}, and how much of that is rounding is not known, because its "
                f"_score does not compute in float64: {error}. Nothing was written."
            ) from error
        rounding = (float32_score - float64_score).numpy()
        roundings.append(largest_absolute(rounding, is_clear))
    return float(np.max(roundings))


def largest_absolute(differences: NDArray[np.float64], is_counted: NDArray[np.bool_]) -> float:
    """Return the largest absolute value in ``differences`` (N,), for rows with ``is_counted``.

    If one of these values is NaN, the result is NaN.
    """
    absolute_differences = np.abs(differences)
    return float(absolute_differences[is_counted].max(initial=0.0))


def reference_scores(
    predictor: FailurePredictor, inputs: GraphInputs
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return the predictor's uncertainties (N,), answers (N,) and a mask (N,) of clear answers.

    An answer is clear if rounding cannot change the answer (``MIN_COSINE_GAP``,
    ``MIN_POSTERIOR_GAP``).
    """
    image = inputs["image"]
    text = inputs["text"]
    columns = {name: inputs[name] for name in predictor.columns_to_score}
    source = Embeddings(image, text, space=predictor.space_, columns=columns)
    # the predictor may warn that random rows differ from its training rows
    with suppress_messages():
        scored_batches = list(predictor.scored(source))
    uncertainty = np.concatenate([scores for _, scores in scored_batches])
    answers = [batch.prediction.numpy(force=True) for batch, _ in scored_batches]
    answer = np.concatenate(answers)
    if predictor.answer == "adapted":
        posteriors = [predictor.log_posterior(batch).cpu() for batch, _ in scored_batches]
        two_largest = torch.cat(posteriors).topk(2, dim=1).values
        largest, second_largest = two_largest.unbind(dim=1)
        is_clear = largest - second_largest > MIN_POSTERIOR_GAP
    else:
        cosines = image @ text.unique(dim=0).T
        two_largest = cosines.topk(2, dim=1).values
        largest, second_largest = two_largest.unbind(dim=1)
        is_clear = largest - second_largest > MIN_COSINE_GAP * largest.abs()
    return uncertainty, answer, is_clear.numpy()


def trial_inputs(
    predictor: FailurePredictor, sizes: tuple[tuple[int, int], ...]
) -> Iterator[GraphInputs]:
    """Yield random inputs with unit norm, one for each of the ``sizes`` (images, candidates).

    Some graphs treat the texts of their ``classes`` differently from other texts. For such graphs,
    further inputs have these texts as candidates: in the original order, shuffled, only two of
    them, and all together with other texts.
    """
    space = predictor.fitted_space
    score = score_graph(predictor).score
    generator = torch.Generator().manual_seed(0)
    no_classes = torch.empty(0, 0, dtype=torch.float32)
    stored_classes: Tensor = getattr(score, "classes", no_classes)
    classes = stored_classes.cpu()
    known_widths = {NEGATIVES: space.embed_dim, **getattr(score, "widths", {})}
    column_widths = {name: known_widths[name] for name in predictor.columns_to_score}
    random_texts = []
    for _, n_candidates in sizes:
        random_text = random_rows(n_candidates, space.embed_dim, generator)
        random_texts.append(random_text)
    for (n_images, _), text in zip(sizes, random_texts, strict=True):
        yield random_inputs(column_widths, n_images, text, generator)
    if len(classes) > 1:
        shuffled_classes = classes[torch.randperm(len(classes), generator=generator)]
        two_classes = shuffled_classes[:2]
        classes_and_others = torch.cat([shuffled_classes, random_texts[0]])
        for text in (classes, shuffled_classes, two_classes, classes_and_others):
            yield random_inputs(column_widths, n_images=9, text=text, generator=generator)


def random_inputs(
    column_widths: dict[str, int], n_images: int, text: Tensor, generator: torch.Generator
) -> GraphInputs:
    """Draw random images for the candidates ``text``, and random columns by name.

    Every second image is near a candidate. ``column_widths`` maps a column's name to the
    width.
    """
    image = random_rows(n_images, text.shape[1], generator)
    candidate = text[torch.randint(len(text), (n_images,), generator=generator)]
    near_candidate = functional.normalize(candidate + image / 2, dim=1)
    image[::2] = near_candidate[::2]
    inputs = {"image": image, "text": text}
    for name, width in column_widths.items():
        if name == NEGATIVES:
            inputs[name] = random_rows(N_TRIAL_WORDS, width, generator)
        else:
            inputs[name] = torch.randn(n_images, width, generator=generator, dtype=torch.float32)
    return inputs


def random_rows(n: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draw (n, dim) float32 random rows with unit norm."""
    rows = torch.randn(n, dim, generator=generator, dtype=torch.float32)
    return functional.normalize(rows, dim=1)
