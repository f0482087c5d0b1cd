"""Commands about scores: explain, monitor, report."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer import Option

from vilu.cli import console
from vilu.cli.console import log_next_step
from vilu.cli.help import MORE
from vilu.cli.options import (
    MAX_SEED,
    STUDY_FLAGS,
    Data,
    ImagesRoot,
    ImagesSplit,
    JsonFile,
    Overwrite,
    Predictor,
    ReadingFlags,
    path_argument,
    path_option,
    with_reading_flags,
)
from vilu.errors import DataError, ProvenanceError, UsageError
from vilu.text import escape_unprintable, plural
from vilu.validation import require_between

if TYPE_CHECKING:
    from vilu.calibration.monitor.monitor import Monitor
    from vilu.embeddings.source import EmbeddingSource
    from vilu.outcomes.outcomes import Outcomes
    from vilu.predictors.contract.predictor import FailurePredictor
    from vilu.report.explain.explain import Explanations
    from vilu.report.explain.prompts import PromptGains
    from vilu.report.explain.risk import RiskMap
    from vilu.tables.table import AnswerTable

ALARM_EXIT_CODE = 8  # exit code of `vilu monitor`: the guarantee should no longer be relied on

TrainingStore = Annotated[
    Path | None,
    path_option("Labelled store that the predictor was fitted on; its nearest rows are shown."),
]
Keys = Annotated[list[str] | None, Option(help="Explain the row with this key; repeatable.")]
Rows = Annotated[
    list[int] | None, Option(min=0, help="Explain the row of this number; repeatable.")
]
RowCount = Annotated[
    int,
    Option(
        "-n",
        "--most-uncertain",
        min=1,
        help="Without --key and --row: number of rows to explain, the most uncertain first.",
    ),
]
SeedOfExplanation = Annotated[
    int,
    Option(
        min=0,
        max=MAX_SEED,
        help="Seed of the background rows, or of --summary's folds.",
        rich_help_panel=MORE,
    ),
]
SummaryFlag = Annotated[
    bool,
    Option(
        "--summary",
        help="For all rows, show which confusions cost the most and which texts to improve.",
    ),
]
AcceptedShare = Annotated[
    float | None, Option(help="With --summary: share of answers that are accepted. [0.8]")
]


# the parameter ``reading_flags`` is replaced by several flags
@partial(with_reading_flags, excluded_flags=STUDY_FLAGS | {"direction"})
def explain(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: Predictor,
    store: Data,
    train: TrainingStore = None,
    key: Keys = None,
    row: Rows = None,
    n: RowCount = 10,
    seed: SeedOfExplanation = 0,
    summary: SummaryFlag = False,
    coverage: AcceptedShare = None,
    *,
    reading_flags: ReadingFlags,
    output: JsonFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Explain why answers are suspicious, from embeddings alone.

    Shows the competitors of each answer, the nearest training rows, and each input's share in the
    score.
    """
    from vilu.artifacts.paths import write_with_inputs
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.report.explain.explain import Depth, require_json
    from vilu.report.explain.explain import explain as explain_rows
    from vilu.tables.files import with_features_files
    from vilu.tables.table import AnswerTable

    if output is not None:
        require_json(output)
    if coverage is not None and not summary:
        raise UsageError("--coverage needs --summary. Give both, or neither.")
    is_about_rows = train is not None or bool(key) or bool(row)
    if summary and is_about_rows:
        raise UsageError(
            "--summary is about all rows of the store. Leave --train, --key and --row out."
        )
    if coverage is None:
        coverage = 0.8
    require_between("coverage", coverage, "(0, 1]")
    depth = Depth(seed=seed)
    settings = {
        "summary": summary,
        "coverage": coverage,
        "key": key,
        "row": row,
        "n": n,
        "depth": str(depth),
    }
    input_paths = [
        predictor,
        *with_features_files(store),
        *reading_flags.input_paths,
        *console.present_paths(train),
    ]
    write_output = console.prepare_output(
        output,
        "explanation",
        input_paths,
        overwrite=overwrite,
        reading=reading_flags.digest_settings,
        **settings,
    )
    data = reading_flags.open_with_second(store)
    loaded_predictor = load_predictor(predictor)
    second_flag: list[object] = []
    if reading_flags.second is not None:
        second_flag = ["--second", reading_flags.second]
    command = console.shell_command("vilu", "explain", predictor, store, *second_flag)
    chosen_rows = [*(key or ()), *(row or ())]
    rows = chosen_rows or None  # None: the n most uncertain rows
    if isinstance(data, AnswerTable):
        if summary or train is not None:
            raise UsageError(
                "--summary is about classes and --train about images, which a table of answers "
                "does not have. Leave them out."
            )
        result = _answers_in_words(loaded_predictor, data, rows, n)
    elif summary:
        risk, gains = _compute_summary(loaded_predictor, data, coverage=coverage, seed=seed)
        result = _summary_in_words(risk, gains, command)
    else:
        training_rows = None
        if train is not None:
            training_rows = reading_flags.open(train, role="train")
        explanations = explain_rows(loaded_predictor, data, training_rows, rows, n=n, depth=depth)
        has_summary = data.pool_size is None  # a summary is about classes, and captions have none
        result = _rows_in_words(explanations, command, has_summary=has_summary)
    write_output(lambda path, input_digest: write_with_inputs(path, result.facts, input_digest))
    console.print_result(result.facts, escape_unprintable(result.text, keep="\n"))
    log_next_step(result.closing_line)


class ExplainOutput(NamedTuple):
    """The output of `vilu explain`."""

    facts: dict[str, Any]  # printed with --json, and written to the output file
    text: str  # printed without --json
    closing_line: str  # logged to stderr at the end


def _answers_in_words(
    predictor: FailurePredictor, table: AnswerTable, rows: list[int | str] | None, n: int
) -> ExplainOutput:
    """Return the `vilu explain` output for a table of answers."""
    from vilu.tables.explain import explain_answers

    explanation = explain_answers(predictor, table, rows, n)
    closing_line = f"{plural(len(explanation.rows), 'row')} explained"
    facts = explanation.to_dict()
    return ExplainOutput(facts, str(explanation), closing_line)


def _summary_in_words(risk: RiskMap, gains: PromptGains | None, command: str) -> ExplainOutput:
    """Return the output with --summary.

    ``command`` is `vilu explain` with the same inputs and no other flag.
    """
    facts: dict[str, Any] = {
        "kind": "summary",
        "risk_map": risk.to_dict(),
        "prompt_gains": None,
    }
    text = str(risk)
    if gains is not None:
        facts["prompt_gains"] = gains.to_dict()
        text += f"\n\n{gains}"
    return ExplainOutput(facts, text, f"to see single rows: {command}")


def _rows_in_words(explanations: Explanations, command: str, *, has_summary: bool) -> ExplainOutput:
    """Return the output without --summary.

    ``command`` is `vilu explain` with the same inputs and no other flag.
    """
    closing_line = f"{plural(len(explanations), 'row')} explained"
    if has_summary:
        closing_line += f"; where the failures are: {command} --summary"
    facts = explanations.to_dict()
    return ExplainOutput(facts, str(explanations), closing_line)


def _compute_summary(
    predictor: FailurePredictor, data: EmbeddingSource, *, coverage: float, seed: int
) -> tuple[RiskMap, PromptGains | None]:
    """Compute the risk map and, if there are labels, the gains from better texts."""
    from vilu.errors import UNKNOWN
    from vilu.report.explain.competitors import strongest_competitor
    from vilu.report.explain.prompts import prompt_gains
    from vilu.report.explain.risk import risk_map
    from vilu.scoring.score import score

    outcomes = score(predictor, data)
    has_labels = bool((data.target != UNKNOWN).any())
    # Pictures outside all classes have no label, but every answer to such a picture is a failure.
    has_known_failures = has_labels or bool(outcomes.outside.any())
    competitor = None
    if not has_known_failures:
        # the risk map takes the strongest competitor in place of the true class
        competitor = strongest_competitor(predictor, data)
    risk = risk_map(outcomes, competitor, coverage=coverage)
    gains = None
    if has_labels:
        gains = prompt_gains(data, seed=seed)
    return risk, gains


MonitoredPredictor = Annotated[
    Path, path_argument("Folder of a predictor that `vilu calibrate` has calibrated.")
]
Batches = Annotated[
    list[Path] | None,
    path_argument(
        "Files or folders that `vilu score` wrote, or tables of answers, in the order in which the "
        "rows arrived."
    ),
]
LateLabels = Annotated[
    list[Path] | None,
    path_option(
        "Scores of rows that were monitored before, and whose failures are known only now; "
        "repeatable."
    ),
]
StateFile = Annotated[
    Path | None,
    Option(help="File, .parquet: continue from its state if it exists, and save the new state."),
]
FalseAlarm = Annotated[
    float,
    Option(min=0, max=1, help="Maximum probability of a false alarm over the whole monitoring."),
]
ShuffleFlag = Annotated[
    bool,
    Option(
        "--shuffle",
        help="Take the rows of each file in random order, because they have no order of arrival.",
    ),
]
InOrderFlag = Annotated[
    bool,
    Option(
        "--in-order",
        help="The rows of each file arrived in this order, even if they look sorted.",
    ),
]
SeedOfTies = Annotated[
    int,
    Option(
        min=0,
        max=MAX_SEED,
        help="Seed of the random tie-breaking, and of --shuffle.",
        rich_help_panel=MORE,
    ),
]


def monitor(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: MonitoredPredictor,
    scores: Batches = None,
    late_labels: LateLabels = None,
    state: StateFile = None,
    false_alarm: FalseAlarm = 0.05,
    shuffle: ShuffleFlag = False,
    in_order: InOrderFlag = False,
    seed: SeedOfTies = 0,
    output: JsonFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Check whether the calibrated guarantee still holds for new rows, from scores and labels.

    Exit code 0: no evidence against the guarantee. Exit code 8: alarm. Either the rows have
    shifted, so the guarantee is void, or the labels show that the guarantee is broken. The first
    row of the alarm, the reason, and what to do are printed. Exit code 3: the rows are sorted, for
    example by class, and no row was used. Exit code 4: the predictor has no guarantee, and no row
    was read. If it is known whether the answer to a row is wrong, the row is audited. These rows
    must be a random sample of the accepted rows, or of all rows. Rows and labels that were given
    before are left out.
    """
    from vilu.artifacts.disk import locked
    from vilu.artifacts.paths import claim_file, inputs_digest
    from vilu.progress import track
    from vilu.tables.files import with_features_files

    new_paths = scores or []
    late_paths = late_labels or []
    if not new_paths and not late_paths:
        raise UsageError("nothing to monitor: give SCORES, --late-labels or both.")
    with ExitStack() as stack:
        if state is not None:
            # A state is updated even without the flag --overwrite, so ``overwrite`` is True. The
            # flag does not reset a state, because there is no other copy of the state.
            claim_file(state, "monitor state", overwrite=True)
            state_lock = locked(state.parent, activity="monitoring with a state in")
            stack.enter_context(state_lock)
        settings = {
            "false_alarm": false_alarm,
            "shuffle": shuffle,
            "in_order": in_order,
            "seed": seed,
        }
        loaded_monitor = _open_monitor(predictor, state, false_alarm=false_alarm, seed=seed)
        score_files = with_features_files(*new_paths, *late_paths)
        # The state is no part of the digest, because this command changes the state. ``n_new``
        # separates the new files from the files with late labels.
        input_digest = inputs_digest(predictor, *score_files, n_new=len(new_paths), **settings)
        has_report = False
        if output is not None:
            has_report = claim_file(output, "monitor report", input_digest, overwrite=overwrite)
        report_entries: list[dict[str, Any]] = []
        progress = track("monitor", len(new_paths) + len(late_paths), "files")
        task = stack.enter_context(progress)
        shuffle_seed = None
        if shuffle:
            shuffle_seed = seed
        for number, path in enumerate([*new_paths, *late_paths]):
            is_late = number >= len(new_paths)
            outcomes = _load_scores(path, predictor)
            report_entry = _monitor_file(
                loaded_monitor,
                path,
                outcomes,
                shuffle_seed=shuffle_seed,
                in_order=in_order,
                is_late=is_late,
            )
            report_entries.append(report_entry)
            task.advance(1, report_entry["verdict"])
        facts = {
            "predictor": str(predictor),
            "batches": report_entries,
            **loaded_monitor.status.model_dump(mode="json"),
        }
        document = {"kind": "monitoring", **facts}
        if output is not None:
            _write_report(output, document, input_digest, has_report=has_report)
        # The state is saved last. If the report cannot be written, the next run counts the same
        # rows again.
        if state is not None:
            loaded_monitor.save(state)
    console.print_result(document, str(loaded_monitor.status))
    if loaded_monitor.status.alarm:
        raise typer.Exit(ALARM_EXIT_CODE)
    if state is not None:
        command = console.shell_command("vilu", "monitor", predictor, "SCORES", "--state", state)
        log_next_step(f"next rows: {command}")


def _write_report(
    output: Path, document: dict[str, Any], input_digest: str, *, has_report: bool
) -> None:
    """Write the report, unless the file already has an equal report from the same command.

    The fact ``batches`` is not compared. It is different after a second call with the same rows,
    because the second call takes in no new row.
    """
    from vilu.artifacts.documents import read_json
    from vilu.artifacts.paths import write_with_inputs

    if has_report:
        present_report = read_json(output, "Run `vilu monitor` again")
        facts = dict(document)
        del facts["batches"]
        if all(present_report.get(name) == value for name, value in facts.items()):
            console.log_nothing_to_do(output)
            return
    write_with_inputs(output, document, input_digest)


def _open_monitor(predictor: Path, state: Path | None, *, false_alarm: float, seed: int) -> Monitor:
    """Open a calibrated predictor's monitor. Continue from the saved state, if there is one."""
    from vilu.calibration.monitor.monitor import Monitor

    if state is not None and not state.parent.is_dir():
        raise UsageError(
            f"the folder of the state, {state.parent}, does not exist. Make it, or give another "
            "--state."
        )
    monitor = Monitor.of_folder(predictor, false_alarm=false_alarm, seed=seed)
    if state is None or not state.exists():
        return monitor
    return monitor.resume(state)


def _monitor_file(
    loaded_monitor: Monitor,
    path: Path,
    outcomes: Outcomes,
    *,
    shuffle_seed: int | None,
    in_order: bool,
    is_late: bool,
) -> dict[str, Any]:
    """Give a file's rows to a monitor, and return the report entry for this file.

    Args:
        loaded_monitor: The monitor.
        path: The file.
        outcomes: The rows in the file.
        shuffle_seed: Seed for shuffling the rows. None: no shuffling.
        in_order: Whether the rows arrived in this order, even if the rows look sorted.
        is_late: Whether the rows were monitored before, and the failures are known only now.
    """
    import numpy as np

    if shuffle_seed is not None and in_order:
        raise UsageError(
            "--shuffle is for rows without an order of arrival, and --in-order is for rows that "
            "have one. Give only one of them."
        )
    n_repeated_before = loaded_monitor.repeated
    if shuffle_seed is not None:
        # the number of rows so far is a part of the seed, so each file gets an order of its own
        rng = np.random.default_rng([shuffle_seed, loaded_monitor.rows])
        outcomes = outcomes.take(rng.permutation(len(outcomes)))
    has_known_order = in_order or shuffle_seed is not None
    try:
        if is_late:
            status = loaded_monitor.audit(outcomes)
        else:
            status = loaded_monitor.update(outcomes, in_order=has_known_order)
    except (DataError, ProvenanceError) as error:
        raise type(error)(f"{path}: {error}") from error
    return {
        "scores": str(path),
        "rows": status.rows,
        "repeated": loaded_monitor.repeated - n_repeated_before,
        "verdict": status.verdict,
    }


def _load_scores(path: Path, predictor: Path) -> Outcomes:
    """Load the scores in a file or a folder. If the path is a table of answers, score the table."""
    from vilu.outcomes.outcomes import Outcomes
    from vilu.scoring.score_folder import ScoreFolder
    from vilu.tables.files import is_answer_table
    from vilu.tables.scores import scores_of_file

    if is_answer_table(path):
        (outcomes,) = scores_of_file(path, predictor)
        return outcomes
    if path.is_dir():
        return ScoreFolder(path).outcomes()
    return Outcomes.load(path)


ScoresToShow = Annotated[
    Path,
    path_argument(
        "Folder of .parquet files that `vilu score` wrote, or one of them; or a table of answers, "
        "scored by --predictor or else by its own columns."
    ),
]
PageFile = Annotated[Path, Option("--output", "-o", help="The page, .html.")]
MainMethod = Annotated[
    str | None,
    Option(
        help="Main method of the page. [the calibrated method, else vilu_plus, vilu, or the first]"
    ),
]
CalibratedPredictor = Annotated[
    Path | None,
    path_option("Folder of a calibrated predictor, whose rule accepts answers."),
]
RiskShown = Annotated[
    float,
    Option(
        help="Without --predictor: largest error rate among the accepted answers of these rows, "
        "without a guarantee."
    ),
]
ShownImages = Annotated[
    str | None,
    Option(help="The images that were embedded, as `vilu embed` reads them, for thumbnails."),
]
ScoredStore = Annotated[
    Path | None,
    path_option("Store that was scored, for the classes that compete with an answer."),
]
Title = Annotated[str | None, Option(help="Title of the page. [data set and split]")]


def report(  # noqa: PLR0913, PLR0917 - one parameter per flag
    run: ScoresToShow,
    output: PageFile,
    main: MainMethod = None,
    predictor: CalibratedPredictor = None,
    max_risk: RiskShown = 0.05,
    images: ShownImages = None,
    split: ImagesSplit = None,
    root: ImagesRoot = None,
    store: ScoredStore = None,
    title: Title = None,
    overwrite: Overwrite = False,
) -> None:
    """Write an HTML page about scores: curves, a movable threshold, classes, and pictures.

    The page needs no network. Prints the file.
    """
    from vilu.artifacts.disk import write_text
    from vilu.artifacts.paths import claim_file, inputs_digest, text_mark
    from vilu.datasets.catalog import open_dataset
    from vilu.report.page.build import report_page
    from vilu.report.page.choice import read_calibrated, read_scores
    from vilu.store.reader import open_source
    from vilu.tables.files import is_answer_table, with_features_files
    from vilu.tables.scores import scores_of_file

    if output.suffix.lower() not in {".html", ".htm"}:
        raise UsageError(f"the page is an .html file. Got {output} instead.")
    if images is None and (split is not None or root is not None):
        raise UsageError("--split and --root need --images. Give --images, too, or leave them out.")
    pictures = None
    fingerprint = None
    if images is not None:
        pictures = open_dataset(images, split=split, root=root)
        fingerprint = pictures.fingerprint
    score_files = with_features_files(run)
    if run.is_dir():
        # A folder without .parquet files is a single result of `vilu score`, written in parts.
        score_files = sorted(run.glob("*.parquet")) or [run]
    settings = {
        "main": main,
        "max_risk": max_risk,
        "title": title,
        # Whether the predictor and the store are missing. Without this entry, the same path would
        # give the same digest as --predictor and as --store.
        "with": [predictor is None, store is None],
    }
    optional_paths = console.present_paths(predictor, store)
    input_digest = inputs_digest(*score_files, *optional_paths, images=fingerprint, **settings)
    has_page = claim_file(output, "page", input_digest, overwrite=overwrite)
    if has_page:
        console.print_outputs(output)
        console.log_nothing_to_do(output)
        return
    if is_answer_table(run):
        outcomes = scores_of_file(run, predictor)
    else:
        outcomes = read_scores(run)
    calibrated_rule = None
    if predictor is not None:
        calibrated_rule = read_calibrated(predictor)
    embeddings = None
    if store is not None:
        embeddings = open_source(store)
    page = report_page(
        outcomes,
        main=main,
        calibrated=calibrated_rule,
        max_risk=max_risk,
        images=pictures,
        embeddings=embeddings,
        title=title,
    )
    write_text(output, page + text_mark("page", input_digest))
    console.print_outputs(output)
    log_next_step(f"{len(page) / 1000:,.0f} kB in one file; open it in a browser, or print it")
