"""Commands for a user's photos: triage, and commands to collect and check labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from typer import Option

from vilu.cli import console
from vilu.cli.console import log_next_step
from vilu.cli.help import DATA, GUARANTEE, SORTING
from vilu.cli.images import backbone_spec, templates_of
from vilu.cli.options import (
    MAX_SEED,
    Backbone,
    BatchSize,
    ClusterColumn,
    Device,
    FollowLinks,
    ImagesRoot,
    ImagesSplit,
    LabelFiles,
    Models,
    Overwrite,
    Precision,
    Seed,
    Template,
    path_argument,
    path_option,
)
from vilu.errors import UsageError
from vilu.text import plural

if TYPE_CHECKING:
    from vilu.embeddings.source import EmbeddingSource
    from vilu.tables.table import AnswerTable
    from vilu.triage.outputs import TriageSummary
    from vilu.triage.review import Review

Names = Annotated[Path, path_option("The class names, one per line.", metavar="FILE")]
Labels = Annotated[
    list[Path] | None,
    path_option(
        "CSV with the columns path and label, of randomly picked photos; or a filled-in "
        "next_labels.csv; or labels.parquet of another triage. May be repeated.",
        metavar="FILE",
    ),
]
OutsideLabels = Annotated[
    list[str] | None,
    Option(
        metavar="NAME",
        help="A label that means none of the classes. May be repeated.",
        rich_help_panel=DATA,
    ),
]
Risk = Annotated[float, Option(min=0, max=1, help="Largest error rate among accepted answers.")]
Confidence = Annotated[
    float,
    Option(
        min=0,
        max=1,
        help="Probability with which the guarantee of --max-risk holds.",
        rich_help_panel=GUARANTEE,
    ),
]
GuaranteeScope = Annotated[
    Literal["new", "folder"],
    Option(
        help="Which photos the guarantee is about. new: photos that are drawn as these were. "
        "folder: the accepted photos of this folder that nobody has labelled.",
        rich_help_panel=GUARANTEE,
    ),
]
NumberOfLabels = Annotated[
    int, Option("-n", "--next", min=0, max=100_000, help="Number of labels to ask for.")
]
LinkFlag = Annotated[
    bool,
    Option(
        "--link",
        help="Sort links to the photos into accepted/CLASS, review and outside.",
        rich_help_panel=SORTING,
    ),
]
MoveFlag = Annotated[
    bool,
    Option(
        "--move",
        help="Move the photos into accepted/CLASS, review and outside.",
        rich_help_panel=SORTING,
    ),
]
Sidecars = Annotated[
    bool,
    Option(
        "--xmp",
        help="Write the accepted labels as dc:subject to PHOTO.xmp beside each photo.",
        rich_help_panel=SORTING,
    ),
]


@console.resumable
def triage(  # noqa: PLR0913, PLR0917 - one parameter per flag
    photos: Annotated[Path, path_argument("Folder of photos, in sub-folders of any kind.")],
    classes: Names,
    output: Annotated[
        Path, Option("--output", "-o", help="Folder of all results, which the next run reads.")
    ],
    labels: Labels = None,
    outside: OutsideLabels = None,
    max_risk: Risk = 0.05,
    confidence: Confidence = 0.95,
    n_next: NumberOfLabels = 50,
    answer: Annotated[
        Literal["zero_shot", "adapted"] | None,
        Option(
            help="The answer that is judged. zero_shot: the candidate with the largest logit. "
            "adapted: the likeliest candidate of the method's own posterior."
        ),
    ] = None,
    about: GuaranteeScope = "new",
    backbone: Backbone = "compact",
    models: Models = None,
    template: Template = None,
    link: LinkFlag = False,
    move: MoveFlag = False,
    xmp: Sidecars = False,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    precision: Precision = "fp32",
    follow_links: FollowLinks = False,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Decide for each photo of a folder: accept the answer of the model, or let a person review it.

    Prints the output folder. The folder contains decisions.csv, report.html, next_labels.csv (fill
    in the column label, and give the file back with --labels) and predictor/ for vilu.Guard. A
    later run with more photos or labels only processes what is new. Half of the photos, chosen by a
    hash of the picture, are used for fitting. The labels of the second half support the guarantee,
    and the guarantee stays valid after every new label. Labels from other sources than
    next_labels.csv must be of randomly picked photos. With --about folder, all photos except those
    picked for fitting support the guarantee. Without --answer, the zero-shot answers are judged
    until there are labels to fit on, and the answers of the fitted predictor afterwards.
    """
    sorting_mode = _sorting_mode(link=link, move=move)
    from vilu.backbones.zeroshot import everyday_words
    from vilu.datasets.classes import read_classes
    from vilu.triage.outputs import triage_photos
    from vilu.triage.photos import EmbeddingSettings
    from vilu.triage.state import TriageSettings

    _, names = read_classes(classes)
    embedding = EmbeddingSettings(
        backbone=backbone_spec(backbone, device, precision, models),
        names=names,
        templates=templates_of(template),
        negatives=everyday_words(),
        batch_size=batch_size,
    )
    settings = TriageSettings(
        photos=photos,
        embedding=embedding,
        outside=tuple(outside or ()),
        max_risk=max_risk,
        confidence=confidence,
        n_next=n_next,
        seed=seed,
        answer=answer,
        follow_links=follow_links,
        about=about,
    )
    summary = triage_photos(
        settings, output, labels or (), sort=sorting_mode, xmp=xmp, overwrite=overwrite
    )
    console.print_outputs(output)
    _log_summary(summary, output)


def _log_summary(summary: TriageSummary, output: Path) -> None:
    """Log a summary's texts, and the next command."""
    texts = (
        summary.verdict,
        summary.counts,
        summary.forecast,
        summary.answer,
        summary.guarantee,
        summary.likely,
        summary.prompts,
        summary.no_request_reason,
        summary.sidecars,
    )
    for text in texts:
        if text:
            log_next_step(text)
    if summary.n_asked:
        table_to_fill_in = console.shell_command(output / "next_labels.csv")
        page_command = console.shell_command(
            "vilu", "review", output, "--serve", "-o", "labels.csv"
        )
        photos_in_words = plural(summary.n_asked, "photo")
        log_next_step(
            f"next: fill in the column label of {table_to_fill_in} "
            f"({photos_in_words}; or label them on a page: {page_command}), then "
            f"the same command with --labels {table_to_fill_in}"
        )


def _sorting_mode(*, link: bool, move: bool) -> Literal["move", "link"] | None:
    """Return how to sort the photos, by the flags --link and --move. None without a flag.

    Raises:
        UsageError: If both flags are given.
    """
    if link and move:
        raise UsageError("--link and --move exclude each other. Give only one of them.")
    if move:
        return "move"
    return "link" if link else None


EarlierOutputs = Annotated[
    list[Path] | None,
    path_option(
        "Earlier output files of this command, filled in or not. May be repeated.", metavar="FILE"
    ),
]
RiskOfDraw = Annotated[
    float | None,
    Option(
        min=0,
        max=1,
        help="Largest error rate among accepted answers. It decides up to which uncertainty images "
        "are drawn. [0.05]",
    ),
]
DEFAULT_DRAW_RISK: Final = 0.05
"""Value for ``--max-risk`` in a draw if the flag is not given."""

SplitSeed = Annotated[
    int,
    Option(
        min=0,
        max=MAX_SEED,
        help="Seed of the split into a half to fit on and a half for the guarantee, and of the "
        "random order of the draw.",
    ),
]
PerClassFlag = Annotated[
    bool,
    Option(
        "--per-class",
        help="Ask for labels of the classes that do not have enough labels for a guarantee of "
        "their own.",
    ),
]
ForGuaranteeFlag = Annotated[
    bool,
    Option(
        "--for-guarantee",
        help="Draw all images at random from the answers that could be accepted, for one test by "
        "`vilu calibrate --drawn-below OUTPUT`. The record of the draw is written beside OUTPUT, "
        "with the suffix .draw.json.",
    ),
]


def next_(  # noqa: PLR0913, PLR0917 - one parameter per flag
    store: Annotated[
        Path,
        path_argument(
            "Store of the images to choose from; its labels are used, too. Or a table of answers."
        ),
    ],
    output: Annotated[Path, Option("--output", "-o", help="File, .csv.")],
    predictor: Annotated[Path, path_option("Folder of a fitted predictor.", metavar="PREDICTOR")],
    n_next: NumberOfLabels = 50,
    labels: EarlierOutputs = None,
    max_risk: RiskOfDraw = None,
    seed: SplitSeed = 0,
    per_class: PerClassFlag = False,
    for_guarantee: ForGuaranteeFlag = False,
    cluster_column: ClusterColumn = None,
    overwrite: Overwrite = False,
) -> None:
    """Choose the images to label next: half to fit on, half for a guarantee.

    Writes a list of the images to OUTPUT, and prints the path of OUTPUT.

    The images to fit on are uncertain and different from each other. A hash reserves half of STORE
    for the guarantee, and this half is never used for fitting. The images for the guarantee are
    drawn from the answers in this half that could be accepted. A guarantee needs the labels of all
    drawn images. `vilu triage` includes this step, and stores the labels. With --for-guarantee all
    images are for the guarantee. The guarantee is tested once, when all labels are there.
    """
    if for_guarantee and per_class:
        raise UsageError(
            "--for-guarantee draws from all answers, and --per-class from the answers of some "
            "classes. Give only one of them."
        )
    if output.resolve() in {file.resolve() for file in labels or ()}:
        raise UsageError(
            f"{output} is one of --labels, so its labels would be lost. Give another file."
        )
    from vilu.artifacts.paths import claim_file, inputs_digest
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.store.reader import EmbeddingStore
    from vilu.tables.files import may_be_table
    from vilu.triage.answers import write_next
    from vilu.triage.ask import choose_rows_to_label

    if may_be_table(store):
        _refuse_for_tables(max_risk, per_class=per_class, for_guarantee=for_guarantee)
        _write_rows_to_label_next(
            store, output, predictor, labels or [], cluster_column, n=n_next, seed=seed
        )
        return
    if cluster_column is not None:
        raise UsageError(f"--clusters is for a table of answers, and {store} is none.")
    if max_risk is None:
        max_risk = DEFAULT_DRAW_RISK
    settings: dict[str, object] = {"n": n_next, "max_risk": max_risk, "seed": seed}
    # Older versions had no flag --per-class. Without this flag, the digest must be the same as in
    # older versions.
    if per_class:
        settings["per_class"] = True
    input_digest = inputs_digest(store, predictor, *(labels or ()), **settings)
    claim_file(output, "labels", input_digest, overwrite=overwrite)
    if for_guarantee:
        _draw_for_guarantee(
            store,
            predictor,
            labels=labels or [],
            output=output,
            n=n_next,
            max_risk=max_risk,
            seed=seed,
            overwrite=overwrite,
        )
        return
    loaded_predictor = load_predictor(predictor)
    rows_to_label, answers = choose_rows_to_label(
        EmbeddingStore(store),
        loaded_predictor,
        labels or (),
        n=n_next,
        max_risk=max_risk,
        seed=seed,
        per_class=per_class,
    )
    write_next(output, rows_to_label, answers, loaded_predictor.answer)
    console.print_outputs(output)
    advice = _advice_after_asking(len(rows_to_label), n_next)
    log_next_step(f"{plural(len(rows_to_label), 'image')} asked for; {advice}")


def _advice_after_asking(n_asked: int, n_wanted: int) -> str:
    """Return the next step for the user, or the reason why no image was asked for."""
    if n_asked:
        return "fill in the column label"
    if n_wanted:
        return "every image that could help has a label, or was asked for before"
    return "-n is 0"


def _refuse_for_tables(max_risk: float | None, *, per_class: bool, for_guarantee: bool) -> None:
    """Raise UsageError for flags that are only for images in a store."""
    if max_risk is not None:
        raise UsageError(
            "the rows of a table are drawn from all of its answers, whatever risk is allowed. "
            "Leave --max-risk out, and give it to `vilu calibrate`."
        )
    if per_class:
        raise UsageError("a table of answers has no classes. Leave --per-class out.")
    if for_guarantee:
        raise UsageError(
            "--for-guarantee draws images of a store. For a table of answers leave it out: `vilu "
            "next` asks for rows to calibrate on, too."
        )


def _require_new_table(output: Path) -> None:
    """Refuse an output that exists, is no .csv file, or would lie next to a feature file."""
    from vilu.tables.files import FEATURES_SUFFIX

    if output.exists() or output.suffix.lower() != ".csv":
        raise UsageError(f"the answers to label go to a new .csv file. Got {output} instead.")
    features_file = output.with_suffix(FEATURES_SUFFIX)
    if features_file.exists():
        raise UsageError(
            f"{features_file} is there, and would be read as the features of {output}. "
            "Give another file."
        )


def _write_rows_to_label_next(
    table: Path,
    output: Path,
    predictor: Path,
    labels: list[Path],
    cluster_column: str | None,
    *,
    n: int,
    seed: int,
) -> None:
    """Write the table's answers to label next. An existing file is never replaced."""
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.tables.ask import choose_next_answers, read_asked_ids, write_label_requests
    from vilu.tables.read import open_table

    _require_new_table(output)
    answers = open_table(table, clusters=cluster_column)
    loaded_predictor = load_predictor(predictor)
    asked_ids = read_asked_ids(labels)
    rows, purposes = choose_next_answers(answers, loaded_predictor, asked_ids, n, seed)
    if not len(rows):
        raise UsageError(
            f"every answer of {table} has a label, was fitted on or was asked for before, or is in "
            "a cluster of such an answer; or -n is 0. Give a table with further answers."
        )
    answers_to_label = answers.take(rows)
    write_label_requests(output, answers_to_label, purposes)
    console.print_outputs(output)
    advice = _labelling_advice(answers_to_label, output)
    log_next_step(advice)


def _labelling_advice(answers_to_label: AnswerTable, output: Path) -> str:
    """Return the closing line: the next step for the answers to label."""
    clusters_text = ""
    if answers_to_label.cluster is not None:
        n_clusters = len(set(answers_to_label.cluster))
        clusters_text = f" of {plural(n_clusters, 'whole cluster')}"
    fit_command = console.shell_command("vilu", "fit", output, "-o", "better")
    calibrate_command = console.shell_command(
        "vilu", "calibrate", "better", output, "--max-risk", "0.05"
    )
    return (
        f"{plural(len(answers_to_label), 'answer')}{clusters_text} to label: write 1 or 0 into the "
        f"column correct. `{fit_command}` takes the rows to fit on, and `{calibrate_command}` "
        "takes the rows to calibrate on."
    )


def _draw_for_guarantee(
    store: Path,
    predictor: Path,
    *,
    labels: list[Path],
    output: Path,
    n: int,
    max_risk: float,
    seed: int,
    overwrite: bool,
) -> None:
    """Draw images from the answers that could be accepted, write them, and log the next step."""
    from vilu.store.reader import EmbeddingStore
    from vilu.triage.drawn import draw_for_guarantee

    data = EmbeddingStore(store)
    draw = draw_for_guarantee(
        predictor, data, labels, output, n=n, max_risk=max_risk, seed=seed, overwrite=overwrite
    )
    console.print_outputs(output)
    calibrate_command = console.shell_command(
        "vilu", "calibrate", predictor, store, "--drawn-below", output
    )
    draw_in_words = draw.in_words()
    log_next_step(f"{draw_in_words}; then: {calibrate_command}")


def review(  # noqa: PLR0913, PLR0917 - one parameter per flag
    source: Annotated[
        Path, path_argument("Folder of `vilu triage`, or scores that `vilu score` wrote.")
    ],
    output: Annotated[
        Path,
        Option("--output", "-o", help="File; fiftyone: a folder; with --serve: a CSV of labels."),
    ],
    to: Annotated[
        Literal["label-studio", "fiftyone", "csv"], Option(help="The tool that takes the tasks.")
    ] = "csv",
    which: Annotated[
        Literal["asked", "review", "all"],
        Option(
            help="asked: the photos that a triage asks to label (of scores: the same as review). "
            "review: the answers that are not accepted. all: all answers."
        ),
    ] = "asked",
    max_photos: Annotated[
        int | None, Option("-n", min=1, help="Maximum number of photos. [all]")
    ] = None,
    photos: Annotated[
        Path | None,
        path_option(
            "Folder that paths are relative to. [recorded in the folder of a triage]",
            metavar="DIR",
        ),
    ] = None,
    prefix: Annotated[
        str,
        Option(
            help="Label Studio: text before every path, e.g. /data/local-files/?d=photos/.",
        ),
    ] = "",
    serve: Annotated[
        bool,
        Option(
            "--serve", help="Show the photos on a page on this machine, to be labelled by keyboard."
        ),
    ] = False,
    port: Annotated[
        int, Option(min=0, max=65535, help="With --serve: port of the page. [a free port]")
    ] = 0,
) -> None:
    """Give photos to people to label, as tasks for another tool or on a page of vilu.

    Prints the written files, or the address of the page. On the page, every answer is saved to
    OUTPUT at once, and the same command continues where it stopped. Only a single command at a time
    can label into a file (exit code 75). Changes to the file by another program are never
    overwritten. `vilu labels` reads the finished tasks of a tool.
    """
    import dataclasses

    from vilu.triage.review import open_review
    from vilu.triage.review_files import write_review

    review_tasks = open_review(source, which, max_photos)
    if photos is not None:
        review_tasks = dataclasses.replace(review_tasks, photos=photos)
    if not review_tasks.tasks:
        raise UsageError(
            f"{source} has no photo to look at ({which}). Choose other photos with --which."
        )
    if serve:
        _serve_review(review_tasks, output, port)
        return
    console.print_outputs(*write_review(review_tasks, to, output, prefix=prefix))
    labels_command = console.shell_command("vilu", "labels", "DONE", "-o", "reviewed.csv")
    log_next_step(f"{plural(len(review_tasks.tasks), 'task')}; afterwards: {labels_command}")


def _serve_review(review_tasks: Review, output: Path, port: int) -> None:
    """Show the photos on a page until the user stops the command."""
    from vilu.artifacts.disk import locked, make_folder
    from vilu.triage.serve import ReviewSession, serve_page

    if output.suffix.lower() != ".csv":
        raise UsageError(f"labels are saved in a .csv file. Got {output} instead.")

    def announce(address: str) -> None:  # called after ``session`` is made below
        log_next_step(
            f"{plural(len(review_tasks.tasks), 'photo')}; open this address, and stop with Ctrl-C "
            f"when you are done; then: {session.next_command()}"
        )
        console.print_outputs(address)

    with locked(
        make_folder(output.parent),
        activity=f"labelling into {output.name} in",
        lock_name=f".{output.name}.lock",
        holder_kind="review",
    ):
        session = ReviewSession(review_tasks, output)
        serve_page(session, port, announce)
    n_unanswered = sum(task.path not in session.labels for task in review_tasks.tasks)
    sentences = [f"{plural(len(session.labels), 'answer')} in {output}"]
    if n_unanswered:
        rest = plural(n_unanswered, "photo")
        sentences.append(f"the same command goes on with the rest ({rest})")
    sentences.append(f"next: {session.next_command()}")
    log_next_step("; ".join(sentences))


def labels(
    done: Annotated[
        Path,
        path_argument(
            "Folder of `vilu triage`, Label Studio's export (JSON), a FiftyOne data set, or a CSV."
        ),
    ],
    output: Annotated[
        Path, Option("--output", "-o", help="File, .csv; with --scores .parquet or .csv.")
    ],
    scores: Annotated[
        Path | None,
        path_option(
            "Write these scores with their failures, for `vilu monitor --late-labels`.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Write labels, or the known failures of scores, from a triage or from finished tasks.

    A triage gives all labels, also labels of deleted classes. Prints the file, for `--labels` of
    `vilu triage`, `fit`, `calibrate` and `audit-labels`.
    """
    from vilu.triage.label_files import write_labels
    from vilu.triage.review_files import read_finished_tasks

    label_of_path, stream_of_path = read_finished_tasks(done)
    n_labels = write_labels(label_of_path, output, scores, stream_of_path)
    console.print_outputs(output)
    log_next_step(plural(n_labels, "label"))


def audit_labels(  # noqa: PLR0913, PLR0917 - one parameter per flag
    store: Annotated[Path, path_argument("Store of the labelled images.")],
    output: Annotated[Path, Option("--output", "-o", help="Table, .csv or .parquet.")],
    labels: LabelFiles = None,
    predictor: Annotated[
        Path | None,
        path_option(
            "Predictor whose posterior judges the labels; not fitted on these rows. [vilu_plus, "
            "cross-fitted in five folds]"
        ),
    ] = None,
    images: Annotated[
        Path | None, path_option("Images as given to `vilu embed`, for --sheet.", metavar="PATH")
    ] = None,
    sheet: Annotated[
        Path | None,
        Option(help="Also draw the worst and the best labels: a .png, .svg or .webp file."),
    ] = None,
    split: ImagesSplit = None,
    root: ImagesRoot = None,
    seed: Annotated[int, Option(min=0, max=MAX_SEED, help="Seed of the folds.")] = 0,
) -> None:
    """List the probably wrong labels, the worst first (confident learning by cleanlab).

    Prints the file of the table.
    """
    has_sheet = sheet is not None
    has_images = images is not None
    has_only_one = has_sheet != has_images
    if has_only_one:
        raise UsageError("--sheet needs --images, and --images needs --sheet. Give both or none.")
    if sheet is not None:
        _require_new_figure(sheet)
    from vilu.artifacts.paths import claim_file
    from vilu.datasets.catalog import open_dataset
    from vilu.predictors.persistence.storage import load_predictor
    from vilu.store.reader import EmbeddingStore
    from vilu.triage.label_errors import contact_sheet, find_label_errors
    from vilu.triage.store_labels import labelled_rows

    claim_file(output, "label errors", overwrite=True)
    pictures = None
    if images is not None:
        pictures = open_dataset(images, split=split, root=root)
    judging_predictor = None
    if predictor is not None:
        judging_predictor = load_predictor(predictor)
    source: EmbeddingSource = EmbeddingStore(store)
    if labels:
        source = labelled_rows(EmbeddingStore(store), labels)
    label_errors = find_label_errors(source, judging_predictor, seed=seed)
    label_errors.save(output)
    written_files = [output]
    if pictures is not None and sheet is not None:
        contact_sheet(label_errors, pictures, sheet)
        written_files.append(sheet)
    console.print_outputs(*written_files)
    n_wrong = int(label_errors.is_error.sum())
    log_next_step(f"{n_wrong:,} of {plural(len(label_errors.keys), 'label')} probably wrong")


def _require_new_figure(path: Path) -> None:
    """Raise UsageError unless a new figure can be written to this path."""
    is_figure = path.suffix.lower() in {".png", ".svg", ".webp"}
    if not is_figure or path.exists() or not path.parent.is_dir():
        raise UsageError(
            "--sheet must be a new .png, .svg or .webp file in an existing folder. Got "
            f"{path} instead."
        )
