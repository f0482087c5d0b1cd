"""Commands on predictors: fit, score, evaluate, calibrate, export, push, pull, convert."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from vilu.calibration.methods import ClusterRisk, Method, SetMethod
from vilu.cli import console
from vilu.cli.console import log_next_step
from vilu.cli.help import GUARANTEE, MORE
from vilu.cli.options import (
    MAX_RESAMPLES,
    MAX_SEED,
    Answer,
    ClusterColumn,
    Data,
    Device,
    Fold,
    LabelFiles,
    Models,
    Overwrite,
    Predictor,
    ReadingFlags,
    RowsFile,
    Seed,
    complete_methods,
    path_argument,
    path_option,
    with_reading_flags,
)
from vilu.errors import UsageError
from vilu.text import plural

if TYPE_CHECKING:
    from vilu.calibration.calibration import Calibration
    from vilu.calibration.target import Target
    from vilu.embeddings.columns import AnswerKind, DataKind
    from vilu.embeddings.source import EmbeddingSource
    from vilu.outcomes.outcomes import SupportsTally
    from vilu.predictors.contract.predictor import FailurePredictor
    from vilu.predictors.nn.checkpoint import FolderSession
    from vilu.store.reader import EmbeddingStore

Output = Annotated[Path, Option("--output", "-o", help="Folder of the predictor.")]
Repository = Annotated[
    str, typer.Argument(metavar="REPO", help="ORG/NAME on the hub; or a folder, as ./DIR or /DIR.")
]
Revision = Annotated[str | None, Option(help="Branch, tag or commit on the hub. [main]")]

TrainingStores = Annotated[
    list[Path],
    path_argument(
        "Store that `vilu embed` or `vilu import` wrote, or precomputed embeddings in shards like "
        "LAION's; several stores with --pseudo; or a table of answers of any model, .csv or "
        ".parquet."
    ),
]
MethodName = Annotated[
    str | None,
    Option(
        help="See `vilu list predictors`. [vilu_plus; for a table of answers answer_scores]",
        autocompletion=complete_methods,
    ),
]
Validation = Annotated[
    Path | None,
    path_option("Validation store for model selection. [a held-out part of the training rows]"),
]
Settings = Annotated[
    list[str] | None,
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="A hyper-parameter, e.g. epochs=50; repeatable.",
        rich_help_panel=MORE,
    ),
]
Unlabelled = Annotated[
    Path | None,
    path_option(
        "Store of further rows for methods that learn from rows without labels; its labels are "
        "ignored.",
        metavar="STORE",
    ),
]
InitialPredictor = Annotated[
    Path | None,
    path_option(
        "Start from the weights of this predictor.", metavar="PREDICTOR", rich_help_panel=MORE
    ),
]
RowsPerClass = Annotated[
    int | None,
    Option(min=1, help="Use only this number of labelled rows per class.", rich_help_panel=MORE),
]
PseudoCaptionsFlag = Annotated[
    bool,
    Option(
        "--pseudo",
        help="Use class texts as captions, and mix the stores in pools.",
        rich_help_panel=MORE,
    ),
]
NoSample = Annotated[
    bool,
    Option(
        "--no-sample",
        help="Store no image vectors with the predictor. `vilu calibrate` then cannot detect "
        "near-copies of training rows.",
        rich_help_panel=MORE,
    ),
]


@with_reading_flags
def fit(  # noqa: PLR0913 - one parameter per flag
    stores: TrainingStores,
    output: Output,
    method: MethodName = None,
    answer: Answer = None,
    validation: Validation = None,
    seed: Seed = 0,
    settings: Settings = None,
    device: Device = "auto",
    *,
    reading_flags: ReadingFlags,
    labels: LabelFiles = None,
    unlabelled: Unlabelled = None,
    init: InitialPredictor = None,
    shots: RowsPerClass = None,
    pseudo: PseudoCaptionsFlag = False,
    no_sample: NoSample = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit a failure predictor on embeddings. Prints the folder of the predictor.

    Most methods need labels, but vilu_zero does not (see `vilu list predictors`). OUTPUT must be
    new or empty, or have a predictor of the same inputs. With such a predictor, nothing is done.
    --overwrite replaces another predictor and removes its calibration. After an interruption, the
    same command continues from the last checkpoint, which is next to OUTPUT. Under torchrun, all
    processes train heads together. The result does not depend on the number of processes.
    """
    from vilu.predictors.contract.seen import describe_candidates
    from vilu.predictors.nn.processes import world
    from vilu.predictors.persistence import storage
    from vilu.tables.files import with_features_files

    with ExitStack() as stack:
        processes = stack.enter_context(world(device))  # processes of torchrun, or only this one
        chosen_method = method or _default_method(stores)
        defaults: dict[str, object] = {"seed": seed, "device": device}
        all_settings = _add_answer_setting(settings or [], answer)
        predictor = _new_predictor(chosen_method, defaults, all_settings, init)
        if unlabelled is not None:
            _require_use_of_unlabelled(type(predictor))
        if labels:
            _require_use_of_labels(predictor, pseudo=pseudo)
        digest_flags = _flags_of_fit(
            stores,
            has_validation=validation is not None,
            has_init=init is not None,
            shots=shots,
            seed=seed,
            pseudo=pseudo,
            has_unlabelled=unlabelled is not None,
            has_labels=bool(labels),
            has_sample=not no_sample,
        )
        input_paths = [
            *with_features_files(*stores),
            *(labels or ()),
            *console.present_paths(validation, init, unlabelled),
            *reading_flags.input_paths,
        ]
        input_digest = storage.fit_inputs_digest(
            predictor, input_paths, reading=reading_flags.digest_settings, **digest_flags
        )
        is_fitted = storage.claim_output_folder(output, input_digest, overwrite=overwrite)
        if is_fitted:
            if processes.is_leader:
                _remove_old_checkpoints(stack, predictor, output, input_digest)
                console.print_outputs(output)
                console.log_nothing_to_do(output)
            return
        train = _open_training_set(stores, reading_flags, labels, shots, seed, pseudo=pseudo)
        validation_rows = _open_optional(reading_flags, validation, role="validation")
        unlabelled_rows = _open_optional(reading_flags, unlabelled)
        checkpoints = _open_checkpoints(stack, predictor, output)
        if checkpoints is not None:
            checkpoints.write_fit_digest(input_digest)
        predictor.fit(train, validation_rows, unlabelled=unlabelled_rows)
        predictor.notes_ |= {**describe_candidates(train), "inputs": input_digest}
        if no_sample:
            predictor.sample_ = None
        if not processes.is_leader:
            return
        predictor.save(output)
        if checkpoints is not None:
            checkpoints.remove()
        console.print_outputs(output)
        n_train = predictor.notes_.get("n_train", len(train))
        rows_in_words = plural(n_train, "row")
        hint = _score_hint(output, train.data_kind, has_second=reading_flags.second is not None)
        log_next_step(f"{predictor.name} fitted on {rows_in_words}; {hint}")


def _default_method(stores: list[Path]) -> str:
    """Return the method to fit if the user names no method: one for tables, or for embeddings."""
    from vilu.tables.files import may_be_table

    if may_be_table(stores[0]):
        return "answer_scores"
    return "vilu_plus"


def _flags_of_fit(  # noqa: PLR0913 - one parameter per flag
    stores: list[Path],
    *,
    has_validation: bool,
    has_init: bool,
    shots: int | None,
    seed: int,
    pseudo: bool,
    has_unlabelled: bool,
    has_labels: bool,
    has_sample: bool,
) -> dict[str, object]:
    """Collect the flags for a fit's digest."""
    # The key is called "with", although the values say which flags were left out. With another key,
    # the digests of all fits would change.
    flags_left_out = [not has_validation, not has_init]
    flags: dict[str, object] = {"with": flags_left_out, "shots": None, "pseudo": False}
    if shots is not None:
        flags["shots"] = [shots, seed]  # the seed draws the shots
    if pseudo:
        flags["pseudo"] = [store.name for store in stores]
    # Older versions had no such flags. A flag is added only if the user gave the flag, so that fits
    # without the flag have the same digest as in older versions.
    if has_unlabelled:
        flags["unlabelled"] = True
    if has_labels:
        flags["labels"] = True
    if not has_sample:
        flags["sample"] = False
    return flags


def _score_hint(
    predictor: Path,
    data_kind: DataKind = "embeddings",
    *,
    has_second: bool = False,
    cluster_column: str | None = None,
) -> str:
    """Return the end of a closing line: the next command, to score with the predictor.

    ``has_second`` says whether the predictor takes stores of two models. ``cluster_column`` is the
    table column with the clusters. It is None if the column is called "cluster".
    """
    data = ["STORE"]
    if data_kind == "answers":
        data = ["TABLE"]
    if has_second:
        data += ["--second", "SECOND_STORE"]
    if cluster_column is not None:
        data += ["--clusters", cluster_column]
    command = console.shell_command("vilu", "score", predictor, *data, "-o", "scores.parquet")
    return f"next: {command}"


def _new_predictor(
    method: str, defaults: dict[str, object], settings: list[str], init: Path | None
) -> FailurePredictor:
    """Make the predictor to fit.

    Args:
        method: The method's name.
        defaults: Parameter values. Parameters that the method does not know are left out.
        settings: The values KEY=VALUE from --set.
        init: Folder of a predictor whose weights start the fit. None: from scratch.
    """
    from vilu.predictors.contract.catalogue import find_method
    from vilu.predictors.contract.parameters import build_predictor, parameters, parse_settings
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.predictors.vilu.fine_tuning import start_from_fitted

    cls = find_method(method)
    known_parameters = parameters(cls)
    values = {key: value for key, value in defaults.items() if key in known_parameters}
    values |= parse_settings(settings)
    if init is None:
        predictor = build_predictor(cls, values)
    else:
        initial_predictor = load_predictor(init)
        predictor = start_from_fitted(cls, initial_predictor, values)
    predictor.check_answer()
    return predictor


def _add_answer_setting(settings: list[str], answer: AnswerKind | None) -> list[str]:
    """Return the settings from --set, plus a setting for --answer if this flag is given."""
    if answer is None:
        return settings
    for setting in settings:
        key, _, _ = setting.partition("=")
        if key.strip() == "answer":
            raise UsageError(
                "--answer and --set answer=... are one setting. Give only one of them."
            )
    return [*settings, f"answer={answer}"]


def _require_judged_answer(
    folder: Path, judged_answer: AnswerKind, wanted_answer: AnswerKind | None
) -> None:
    """Raise UsageError if --answer differs from the answer that the predictor judges."""
    if wanted_answer is None or wanted_answer == judged_answer:
        return
    raise UsageError(
        f"the predictor in {folder} judges {judged_answer} answers, and --answer asks for "
        f"{wanted_answer}. Leave --answer out, or fit a predictor with `vilu fit --answer "
        f"{wanted_answer}`."
    )


def _require_use_of_unlabelled(cls: type[FailurePredictor]) -> None:
    """Raise UsageError if a method does not use --unlabelled, before any row is read."""
    from vilu.predictors import PREDICTORS

    if cls.uses_unlabelled:
        return
    using_methods = []  # methods that use --unlabelled
    label_free_methods = []  # methods for rows without labels
    for method in PREDICTORS.values():
        if method.uses_unlabelled:
            using_methods.append(method.name)
        if method.needs_fit and not method.needs_labels:
            label_free_methods.append(method.name)
    if cls.name in label_free_methods:
        alternative = f"or give them as the STORE to fit {cls.name} on"
    else:
        alternative = f"or fit {_method_names(label_free_methods)} with them as the STORE"
    names_of_using_methods = _method_names(using_methods)
    raise UsageError(
        f"{cls.name} does not use --unlabelled. Give rows without labels as --unlabelled of "
        f"{names_of_using_methods}, {alternative}."
    )


def _require_use_of_labels(predictor: FailurePredictor, *, pseudo: bool) -> None:
    """Raise UsageError if a fit does not use --labels, before any row is read."""
    if not predictor.needs_labels:
        raise UsageError(
            f"{predictor.name} is fitted on rows without labels. Leave --labels out, or fit "
            "another method, such as --method vilu_plus."
        )
    if pseudo:
        raise UsageError(
            "--pseudo uses texts of classes as captions, which have no labels. Give only one of "
            "--labels and --pseudo."
        )


def _method_names(methods: list[str]) -> str:
    return ", ".join(methods) or "no method"


def _open_optional(
    reading_flags: ReadingFlags, store: Path | None, role: Fold | None = None
) -> EmbeddingSource | None:
    """Open an optional store. Return None if ``store`` is None."""
    if store is None:
        return None
    return reading_flags.open(store, role)


def _open_training_set(
    stores: list[Path],
    reading_flags: ReadingFlags,
    labels: list[Path] | None,
    n_shots: int | None,
    seed: int,
    *,
    pseudo: bool,
) -> EmbeddingSource:
    """Open the training rows: all rows, or ``n_shots`` rows per class, drawn with the seed.

    With files in ``labels``, only the rows with a label in these files or in the store are opened.
    """
    from vilu.embeddings.pairs import Pools, PseudoCaptions
    from vilu.predictors.contract.seen import draw_shots
    from vilu.tables.table import AnswerTable
    from vilu.triage.store_labels import rows_to_fit_on

    if not pseudo and len(stores) > 1:
        raise UsageError(
            f"one store is expected to fit on. Got {len(stores)} stores. Several stores can be "
            "mixed as captions with --pseudo."
        )
    pools = reading_flags.pools
    if pseudo and reading_flags.second is not None:
        raise UsageError(
            "--second is for classes, but --pseudo turns classes into captions. Leave one of the "
            "two flags out."
        )
    # With --pseudo, every store has classes and is opened without pools. ``PseudoCaptions`` makes
    # the pools at the end.
    pools_of_store = None if pseudo else pools
    sources = []
    for store in stores:
        source = reading_flags.open_with_pools(pools_of_store, store)
        source = reading_flags.with_second(source)
        if labels:
            source = rows_to_fit_on(_store_with_classes(source), labels)
        if isinstance(source, AnswerTable):
            if n_shots is not None or pseudo:
                raise UsageError(
                    "--shots and --pseudo are about classes, which a table of answers does not "
                    "have. Leave them out."
                )
            source = source.for_purpose("fit")
        if n_shots is not None:
            source = source.take(draw_shots(source, n_shots, seed))
        sources.append(source)
    if not pseudo:
        return sources[0]
    return PseudoCaptions(sources, pools or Pools(), [store.name for store in stores])


def _open_checkpoints(
    stack: ExitStack, predictor: FailurePredictor, output: Path
) -> FolderSession | None:
    """Open the checkpoints next to the output. None if the predictor is not trained in steps."""
    from vilu.predictors.nn.checkpoint import checkpointing
    from vilu.predictors.vilu.head import HeadPredictor

    if not isinstance(predictor, HeadPredictor):
        return None
    folder = output.with_name(f"{output.name}.checkpoints")
    session = checkpointing(folder, resume=True)
    return stack.enter_context(session)


def _remove_old_checkpoints(
    stack: ExitStack, predictor: FailurePredictor, output: Path, input_digest: str
) -> None:
    """Remove the checkpoints of a fit that was killed after writing the predictor.

    Checkpoints from another fit are kept.
    """
    checkpoint_folder = output.with_name(f"{output.name}.checkpoints")
    if not checkpoint_folder.is_dir():
        return
    checkpoints = _open_checkpoints(stack, predictor, output)
    if checkpoints is None:
        return
    is_of_this_fit = checkpoints.read_fit_digest() == input_digest
    is_empty = not checkpoints.run_folders()
    if is_of_this_fit or is_empty:
        checkpoints.remove()


@with_reading_flags
def score(
    predictor: Predictor,
    store: Data,
    output: Annotated[
        Path,
        Option("--output", "-o", help="File, .parquet or .csv; or a folder for very many rows."),
    ],
    answer: Answer = None,
    *,
    reading_flags: ReadingFlags,
    overwrite: Overwrite = False,
) -> None:
    """Write the judged answer and its uncertainty (higher = more likely wrong) of each image.

    Prints the file or folder. A predictor calibrated with `vilu calibrate` also gives the
    probability of failure, the decision (accept or review) with a reason, and label sets. A folder
    is written in parts, with bounded memory. After an interruption, the same command writes the
    missing parts.
    """
    from vilu.calibration.calibration import Calibration
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.scoring.score import score as score_rows
    from vilu.scoring.score import score_parts
    from vilu.tables.files import with_features_files

    is_folder = output.is_dir() or not output.suffix
    if not is_folder and output.suffix.lower() not in {".parquet", ".csv"}:
        raise UsageError(
            "scores go to a .parquet or .csv file, or to a folder without suffix. Got "
            f"{output} instead."
        )
    file: Path | None = output
    if is_folder:
        # With None, ``prepare_output`` checks nothing. ``score_parts`` checks the folder.
        file = None
    input_paths = [predictor, *with_features_files(store), *reading_flags.input_paths]
    write_output = console.prepare_output(
        file, "scores", input_paths, overwrite=overwrite, reading=reading_flags.digest_settings
    )
    loaded_predictor = load_predictor(predictor)
    _require_judged_answer(predictor, loaded_predictor.answer, answer)
    data = reading_flags.open_with_second(store)
    split = reading_flags.split_of(data)
    calibration = Calibration.find(predictor)
    if is_folder:
        score_parts(
            loaded_predictor,
            data,
            output,
            dataset=store.name,
            split=split,
            overwrite=overwrite,
            calibration=calibration,
        )
    else:

        def write(path: Path, inputs: str) -> None:
            outcomes = score_rows(
                loaded_predictor, data, dataset=store.name, split=split, calibration=calibration
            )
            outcomes.save(path, inputs=inputs)

        write_output(write)
    console.print_outputs(output)
    next_command = console.shell_command("vilu", "evaluate", output)
    without_decisions = ""
    if calibration is None or calibration.rule is None:
        without_decisions = " without decisions, because the predictor has no rule (vilu calibrate)"
    rows_in_words = plural(len(data), "row")
    log_next_step(
        f"{rows_in_words} scored{without_decisions}; next, where failures are known: {next_command}"
    )


def evaluate(
    scores: Annotated[
        list[Path],
        path_argument(
            "Files or folders that `vilu score` wrote; or tables of answers, each of whose columns "
            "of scores is evaluated."
        ),
    ],
    output: RowsFile = None,
    overwrite: Overwrite = False,
    resamples: Annotated[
        int, Option(min=1, max=MAX_RESAMPLES, help="Bootstrap resamples of each interval.")
    ] = 1000,
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Seed of the bootstrap.")] = 0,
    cluster_column: ClusterColumn = None,
) -> None:
    """Compute failure-prediction metrics with bootstrap intervals, one line per file."""
    from vilu.outcomes.evaluate import evaluate as evaluate_outcomes
    from vilu.outcomes.outcomes import Outcomes
    from vilu.scoring.score_folder import ScoreFolder
    from vilu.tables.files import is_answer_table, with_features_files

    settings: dict[str, object] = {"resamples": resamples, "seed": seed}
    # Older versions had no flag --clusters. Without this flag, the digest must be the same as in
    # older versions.
    if cluster_column is not None:
        settings["clusters"] = cluster_column
    files = with_features_files(*scores)
    write_output = console.prepare_output(output, "results", files, overwrite=overwrite, **settings)
    scored_sets: list[SupportsTally] = []
    for path in scores:
        if is_answer_table(path):
            # ``vilu.tables.scores`` imports torch, which takes a second.
            from vilu.tables.scores import scores_of_file

            scored_sets += scores_of_file(path, cluster_column=cluster_column)
            continue
        if cluster_column is not None:
            raise UsageError(
                f"--clusters names a column of a table of answers, and {path} is none. Leave it "
                "out: scores have the clusters of their table."
            )
        if path.is_dir():
            scored_sets.append(ScoreFolder(path))
        else:
            scored_sets.append(Outcomes.load(path))
    table = evaluate_outcomes(scored_sets, n_resamples=resamples, seed=seed)
    write_output(lambda path, inputs: table.save(path, inputs=inputs))
    rows = table.to_dicts()
    console.print_result(rows, str(table))


def convert(
    checkpoint: Annotated[
        Path, path_argument("Checkpoint (.ckpt) of the reference implementation.")
    ],
    output: Output,
    logit_scale: Annotated[
        float, Option(help="Logit scale of the VLM, which is not in the checkpoint.")
    ] = 100.0,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint of the reference implementation. No code in the checkpoint is run.

    Prints the folder of the predictor.
    """
    from vilu.artifacts.paths import inputs_digest
    from vilu.predictors.persistence import storage
    from vilu.predictors.persistence.convert import convert_official

    input_digest = inputs_digest(checkpoint, logit_scale=logit_scale)
    is_converted = storage.claim_output_folder(output, input_digest, overwrite=overwrite)
    if is_converted:
        console.print_outputs(output)
        console.log_nothing_to_do(output)
        return
    predictor = convert_official(checkpoint, logit_scale)
    predictor.notes_["inputs"] = input_digest
    predictor.save(output)
    console.print_outputs(output)
    hint = _score_hint(output)
    log_next_step(f"a {predictor.name} head; {hint}")


MaxRisk = Annotated[
    float | None,
    Option(min=0, max=1, help="Largest error rate among accepted answers, e.g. 0.05."),
]
Confidence = Annotated[
    float,
    Option(
        min=0,
        max=1,
        help="Probability with which the guarantee holds, over draws of the calibration rows.",
    ),
]
MinCoverage = Annotated[
    float | None,
    Option(
        min=0,
        max=1,
        help="Smallest share of answers to accept; alone or with --max-risk.",
        rich_help_panel=GUARANTEE,
    ),
]
RuleMethod = Annotated[
    Method,
    Option(
        help="ltt: Learn then Test. crc: bounds the mean share of answers that are both accepted "
        "and wrong. selection: bounds the mean share of wrong answers among the accepted answers "
        "of a batch. anytime: a bound from --labels that stays valid whenever labels are added."
    ),
]
Labels = Annotated[
    list[Path] | None,
    path_option(
        "CSV with the columns path and label, of randomly picked rows of the store. For anytime: "
        "all files of `vilu next`, filled in. Labels in the store count as well. May be repeated.",
        metavar="FILE",
    ),
]
DrawFile = Annotated[
    Path | None,
    path_option(
        "The file of `vilu next --for-guarantee`, filled in. Thresholds up to the uncertainty "
        "limit of the draw are tested once. [without --max-risk, the risk of the draw is used]",
        metavar="FILE",
        rich_help_panel=GUARANTEE,
    ),
]
DrawSeed = Annotated[
    int,
    Option(
        min=0, max=MAX_SEED, help="For anytime: the --seed of `vilu next`.", rich_help_panel=MORE
    ),
]
PerClass = Annotated[
    bool,
    Option(
        "--per-class",
        help="A threshold per predicted class with enough rows.",
        rich_help_panel=GUARANTEE,
    ),
]
LabelSets = Annotated[
    SetMethod | None,
    Option(
        help="Also give sets of labels that contain the right label.", rich_help_panel=GUARANTEE
    ),
]
MaxMiss = Annotated[
    float,
    Option(
        min=0,
        max=1,
        help="Largest share of label sets without the right label.",
        rich_help_panel=GUARANTEE,
    ),
]
OutsideShare = Annotated[
    float | None,
    Option(
        min=0,
        max=1,
        help="The guarantee holds up to this share of pictures of none of the classes. "
        "[their share in the calibration rows]",
        rich_help_panel=GUARANTEE,
    ),
]
ClusterRiskOption = Annotated[
    ClusterRisk | None,
    Option(
        help="For a table with a column cluster, whose rows may be wrong together. majority: at "
        "most --max-risk of the accepted clusters have a wrong majority answer. ratio: at most "
        "--max-risk of the accepted rows are wrong. [every row counts, with a warning]",
        rich_help_panel=GUARANTEE,
    ),
]
LargestCluster = Annotated[
    int | None,
    Option(
        min=1,
        help="For ratio: largest size of a cluster; rows of larger clusters are left for review. "
        "Choose it without a look at the labels. [the size of the largest cluster]",
        rich_help_panel=GUARANTEE,
    ),
]
OptionalData = Annotated[
    Path | None,
    path_argument(
        "Labelled store, or a table of answers, .csv or .parquet. [PREDICTOR, if it is a table]"
    ),
]
OutputWithoutPredictor = Annotated[
    Path | None,
    Option("--output", "-o", help="Folder for the result, if a table is calibrated alone."),
]
ClassShares = Annotated[
    Path | None,
    path_option(
        "CSV with the columns class and share, one line per class: the expected share of the class "
        "among the pictures of the classes. [the shares in the calibration rows]",
        metavar="FILE",
        rich_help_panel=GUARANTEE,
    ),
]


@with_reading_flags
def calibrate(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: Annotated[
        Path,
        path_argument(
            "Folder of a fitted predictor; the result is written into it. Or, without STORE, a "
            "table of answers with one column of scores, which needs no fit."
        ),
    ],
    store: OptionalData = None,
    max_risk: MaxRisk = None,
    confidence: Confidence = 0.95,
    min_coverage: MinCoverage = None,
    answer: Answer = None,
    method: RuleMethod = "ltt",
    labels: Labels = None,
    drawn_below: DrawFile = None,
    seed: DrawSeed = 0,
    per_class: PerClass = False,
    label_sets: LabelSets = None,
    max_miss: MaxMiss = 0.1,
    outside_share: OutsideShare = None,
    class_shares: ClassShares = None,
    cluster_risk: ClusterRiskOption = None,
    largest_cluster: LargestCluster = None,
    output: OutputWithoutPredictor = None,
    *,
    reading_flags: ReadingFlags,
    overwrite: Overwrite = False,
) -> None:
    """Calibrate probabilities and a threshold with a guaranteed risk on labelled embeddings.

    The predictor must not have been fitted on these rows. Afterwards `vilu score` also writes
    failure_probability and accept or review for every answer. Without a target (such as
    --max-risk), only probabilities are calibrated. The guarantee holds for new rows drawn like the
    calibration rows. `vilu monitor` checks the guarantee on new rows. Exit code 4: the target
    cannot be reached. Then the message says what is missing.
    """
    from vilu.calibration.shares import read_shares
    from vilu.calibration.target import Target
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.tables.table import AnswerTable

    if store is None:
        # The only argument is a table. The command line has passed this table as ``predictor``, the
        # first argument.
        store = predictor
        predictor = _write_score_predictor(store, output, reading_flags, overwrite=overwrite)
    elif output is not None:
        raise UsageError(
            "-o is for a table that is calibrated without a predictor. With a predictor the result "
            "is written into its folder. Leave -o out."
        )
    _require_judged_answer(predictor, load_predictor(predictor).answer, answer)
    data = reading_flags.open_with_second(store)
    if isinstance(data, AnswerTable):
        data = data.for_purpose("calibration")
    shares = None
    if class_shares is not None:
        shares = read_shares(class_shares)
    target = Target(
        max_risk=max_risk,
        min_coverage=min_coverage,
        confidence=confidence,
        method=method,
        per_class=per_class,
        label_sets=label_sets,
        max_miss=max_miss,
        outside_share=outside_share,
        class_shares=shares,
        cluster_risk=cluster_risk,
        largest_cluster=largest_cluster,
    )
    if drawn_below is not None:
        calibration = _calibrate_by_draw(
            predictor, data, target, labels, draw_file=drawn_below, overwrite=overwrite
        )
    elif method == "anytime":
        calibration = _calibrate_at_any_time(
            predictor, data, target, labels, seed=seed, overwrite=overwrite
        )
    else:
        calibration = _calibrate_once(
            predictor, data, target, labels, reading_flags, store=store, overwrite=overwrite
        )
    facts = calibration.model_dump(mode="json")
    console.print_result(facts, _calibration_in_words(calibration))
    has_second = reading_flags.second is not None
    column = reading_flags.cluster_column
    hint = _score_hint(predictor, data.data_kind, has_second=has_second, cluster_column=column)
    log_next_step(f"calibrated on {plural(calibration.n, 'row')}; {hint}")


def _write_score_predictor(
    table: Path, output: Path | None, reading_flags: ReadingFlags, *, overwrite: bool
) -> Path:
    """Write a predictor that reads a table's only score column. Return the predictor's folder."""
    from vilu.predictors.persistence import storage
    from vilu.tables.files import may_be_table
    from vilu.tables.methods import method_of_only_score
    from vilu.tables.read import open_table

    if not may_be_table(table):
        raise UsageError(
            f"STORE is missing: `vilu calibrate {table} STORE`. Only a table of answers (.csv or "
            ".parquet) with one column of scores is calibrated alone."
        )
    if output is None:
        raise UsageError("a table that is calibrated alone needs -o FOLDER for the result.")
    answers = open_table(table, clusters=reading_flags.cluster_column)
    predictor = method_of_only_score(answers, "vilu calibrate PREDICTOR ANOTHER_TABLE")
    input_digest = storage.fit_inputs_digest(predictor, [])
    has_result = storage.claim_output_folder(output, input_digest, overwrite=overwrite)
    if not has_result:
        predictor.notes_["inputs"] = input_digest
        predictor.save(output)
    return output


def _calibrate_at_any_time(
    predictor: Path,
    data: EmbeddingSource,
    target: Target,
    labels: list[Path] | None,
    *,
    seed: int,
    overwrite: bool,
) -> Calibration:
    """Calibrate with method anytime. The guarantee stays valid while labels are added."""
    from vilu.triage.ask import calibrate_by_labels

    max_risk = target.risk_of_anytime()
    if labels is None:
        raise UsageError(
            "anytime needs --labels. `vilu next` writes the file of labels to fill in."
        )
    store_with_classes = _store_with_classes(data)
    return calibrate_by_labels(
        predictor,
        store_with_classes,
        labels,
        max_risk=max_risk,
        confidence=target.confidence,
        seed=seed,
        per_class=target.per_class,
        overwrite=overwrite,
    )


def _calibrate_by_draw(
    predictor: Path,
    data: EmbeddingSource,
    target: Target,
    labels: list[Path] | None,
    *,
    draw_file: Path,
    overwrite: bool,
) -> Calibration:
    """Calibrate on the rows in ``draw_file``, with the labels that the user has filled in.

    `vilu next --for-guarantee` drew these rows and wrote the file.
    """
    from vilu.triage.drawn import calibrate_by_draw

    if labels is not None:
        raise UsageError(
            f"--drawn-below takes its labels from {draw_file}. Leave --labels out, and fill in the "
            "column label of that file."
        )
    store_with_classes = _store_with_classes(data)
    return calibrate_by_draw(predictor, store_with_classes, draw_file, target, overwrite=overwrite)


def _calibrate_once(
    predictor: Path,
    data: EmbeddingSource,
    target: Target,
    labels: list[Path] | None,
    reading_flags: ReadingFlags,
    *,
    store: Path,
    overwrite: bool,
) -> Calibration:
    """Calibrate on a fixed row set, with labels from the store or from label files."""
    from vilu.calibration.procedure import calibrate_predictor
    from vilu.triage.store_labels import rows_picked_at_random

    if labels is not None:
        store_with_classes = _store_with_classes(data)
        data = rows_picked_at_random(store_with_classes, labels)
    split = reading_flags.split_of(data)
    return calibrate_predictor(
        predictor, data, target, dataset=store.name, split=split, overwrite=overwrite
    )


def _store_with_classes(data: EmbeddingSource) -> EmbeddingStore:
    """Return ``data``. Raise UsageError unless ``data`` is a single store with classes."""
    from vilu.store.reader import EmbeddingStore

    if not isinstance(data, EmbeddingStore):
        raise UsageError(
            "tables of labels need a single store with classes. Leave them out for pairs and for "
            "two models."
        )
    return data


def _calibration_in_words(calibration: Calibration) -> str:
    """Return lines about the probabilities, and about the rule and the label sets, if any."""
    from vilu.calibration.thresholds import percent

    probability = calibration.probability
    log_loss = ""
    if probability.log_loss:
        losses = [f"{name} {loss:.4f}" for name, loss in probability.log_loss.items()]
        log_loss = f" (log-loss in cross-validation: {', '.join(losses)})"
    lines = [f"probability: {probability.form}{log_loss}"]
    if calibration.rule is not None:
        lines.append(f"decision: {calibration.guarantee_text}")
    label_sets = calibration.label_sets
    if label_sets is not None:
        max_miss_in_percent = percent(label_sets.max_miss, decimals=1)
        lines.append(
            f"label sets: {label_sets.method}, on average {label_sets.mean_size:.2f} labels; at "
            f"most {max_miss_in_percent} miss the right one "
            f"({label_sets.empirical_miss:.1%} of "
            f"{label_sets.n} calibration rows)"
        )
    return "\n".join(lines)


def export(
    predictor: Predictor,
    output: Annotated[Path, Option("--output", "-o", help="File, .onnx.")],
    onnx: Annotated[
        bool, Option("--onnx", help="Write ONNX, whatever the suffix of the file.")
    ] = False,
    with_backbone: Annotated[
        bool,
        Option(
            "--with-backbone",
            help="Include the model, the classes and the rule, so that the input is pixels.",
        ),
    ] = False,
    models: Models = None,
    overwrite: Overwrite = False,
) -> None:
    """Export the score of a predictor as ONNX, and compare the export with the predictor.

    Prints the file. The inputs are image (N, D) and text (K, D), both of unit norm. The outputs are
    uncertainty (N,) and prediction (N,). For tables of answers the inputs are numbers (N, C), and
    features (N, F) if the predictor uses features. With --with-backbone, the input is pixels
    (N, 3, H, W) after the preprocessing of the model, and accept (N,) is an additional output.
    """
    from vilu.artifacts.paths import claim_file
    from vilu.guard.image_graph import export_fingerprint, export_image_graph
    from vilu.predictors.persistence.description import fit_fingerprint
    from vilu.predictors.persistence.onnx import export_onnx
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.tables.onnx import export_answers

    if not onnx and output.suffix.lower() != ".onnx":
        raise UsageError(
            "a predictor is exported as ONNX: give a file that ends in .onnx, or --onnx. Got "
            f"{output}."
        )
    if models and not with_backbone:
        raise UsageError(
            "--models is the folder of the backbone, which only --with-backbone needs. Leave "
            "--models out."
        )
    takes_tables = load_predictor(predictor).takes == "answers"
    if takes_tables and with_backbone:
        raise UsageError(
            "a predictor for tables of answers has no backbone. Leave --with-backbone out."
        )
    if with_backbone:
        fingerprint = export_fingerprint(predictor)
    else:
        fingerprint = fit_fingerprint(predictor)
    is_exported = claim_file(output, "ONNX export", fingerprint, overwrite=overwrite)
    if is_exported:
        console.print_outputs(output)
        console.log_nothing_to_do(output)
        return
    if with_backbone:
        difference = export_image_graph(predictor, output, models=models)
    elif takes_tables:
        difference = export_answers(predictor, output)
    else:
        difference = export_onnx(predictor, output)
    console.print_outputs(output)
    log_next_step(
        f"onnxruntime gives the predictor's uncertainties; they differ by {difference:.1g} at most"
    )


def push(
    predictor: Predictor,
    repository: Repository,
    private: Annotated[
        bool | None,
        Option(
            "--private/--public", help="Visibility of a new repository. [the default of its owner]"
        ),
    ] = None,
    with_sample: Annotated[
        bool,
        Option(
            "--with-sample", help="Also copy the sample of training image vectors (at most 2 MB)."
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Copy a predictor and its card to the model hub (HF_TOKEN), or to a folder.

    Prints the address or the folder of the copy.
    """
    from vilu.predictors.persistence.hub import push as push_predictor

    address = push_predictor(
        predictor, repository, private=private, overwrite=overwrite, with_sample=with_sample
    )
    console.print_outputs(address)
    pull_command = console.shell_command("vilu", "pull", repository, "-o", "predictor")
    log_next_step(f"elsewhere: {pull_command}")


def pull(
    repository: Repository, output: Output, revision: Revision = None, overwrite: Overwrite = False
) -> None:
    """Copy a predictor from the model hub, or from a folder, and check the copy.

    Prints the folder of the predictor.
    """
    from vilu.embeddings.columns import SECOND_MODEL_COLUMNS
    from vilu.predictors.persistence.hub import pull as pull_predictor
    from vilu.predictors.persistence.storage import load_predictor

    folder = pull_predictor(repository, output, revision=revision, overwrite=overwrite)
    console.print_outputs(folder)
    predictor = load_predictor(folder)
    has_second = not SECOND_MODEL_COLUMNS.isdisjoint(predictor.columns_to_score)
    hint = _score_hint(output, predictor.takes, has_second=has_second)
    log_next_step(hint)
