"""Commands on studies: benchmark, init, render, submit, pools."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from vilu.cli.console import (
    BENCHMARK_KIND,
    STORE_KIND,
    log_next_step,
    prepare_output,
    print_outputs,
    print_result,
    resumable,
    shell_command,
    wants_inputs,
    wants_json,
)
from vilu.cli.help import MORE, SPEED
from vilu.cli.options import (
    MAX_RESAMPLES,
    MAX_WORKERS,
    Overwrite,
    ReadingFlags,
    RowsFile,
    path_argument,
    path_option,
    require_existing,
    with_reading_flags,
)
from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.embeddings.pairs import Pools
    from vilu.embeddings.source import EmbeddingSource
    from vilu.outcomes.results import ResultTable
    from vilu.predictors.contract.predictor import FailurePredictor
    from vilu_bench.studies.config import Config
    from vilu_bench.studies.study import Rendered


@resumable
def benchmark(  # noqa: PLR0913, PLR0917 - one parameter per flag
    configs: Annotated[
        list[str],
        typer.Argument(
            help="Studies that ship with vilu (paper/main; or paper: all of that group), "
            "or your own TOML files. An unknown name lists the studies.",
            metavar="STUDY",
        ),
    ],
    data: Annotated[
        Path,
        Option(help="Folder that the paths in the files are relative to."),
    ] = Path(),
    output: Annotated[
        Path, Option("--output", "-o", help="Folder for embeddings, cells, tables and figures.")
    ] = Path("benchmark-output"),
    jobs: Annotated[
        int, Option(min=1, max=MAX_WORKERS, help="Processes; the number changes no result.")
    ] = 1,
    models: Annotated[
        Path | None, path_option("Folder of named backbones, in place of the hub's cache.")
    ] = None,
    shard: Annotated[
        str | None,
        Option(
            metavar="I/N",
            help="Run only share I of N of the cells, one share on each of N machines. "
            "When all are done, run without it.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    embed_only: Annotated[
        bool, Option("--embed-only", help="Make the embeddings and stop.", rich_help_panel=MORE)
    ] = False,
    dry_run: Annotated[
        bool,
        Option(
            "--dry-run",
            help="Print what would be run and how many bytes it would take; run nothing.",
        ),
    ] = False,
    smoke: Annotated[
        bool, Option("--smoke", help="Tiny test run: few images, seeds, epochs; in OUTPUT/smoke.")
    ] = False,
) -> None:
    """Compare methods on data sets, over seeds, label budgets, pools, shifts and transfer.

    Runs the studies of the paper, and your own. Prints tables, and writes tables and figures to
    OUTPUT/studies. A run can be interrupted at any moment: the next run does the rest. Studies
    in the same output share embeddings and cells.
    """
    from vilu_bench.studies.load import load_configs, shrink_config
    from vilu_bench.studies.run import CellShare, limit_to_one_thread
    from vilu_bench.studies.study import run_studies

    studies = load_configs(configs)
    if smoke:
        studies = [shrink_config(study) for study in studies]
        output /= "smoke"
    if dry_run:
        _print_plans(studies, data, output)
        return
    share = None
    if shard is not None:
        share = CellShare.parse(shard)
    with limit_to_one_thread("blas"):
        rendered = run_studies(
            studies, data, output, jobs=jobs, models=models, share=share, embed_only=embed_only
        )
    _print_studies(rendered)
    if embed_only:
        log_next_step(f"the embeddings are in {output / 'stores'}")
    elif share is not None and share.n_shares > 1:
        log_next_step(
            f"share {shard} is done; when all are, run the same without --shard to see the results"
        )
    else:
        log_next_step(
            f"tables and figures are in {output / 'studies'}, every cell in {output / 'cells'}"
        )


def _print_plans(studies: list[Config], data: Path, output: Path) -> None:
    from vilu_bench.studies.dry_run import describe_plans, plan_study

    plans = [plan_study(study, data, output) for study in studies]
    facts = [plan.to_dict() for plan in plans]
    text = describe_plans(plans)
    print_result(facts, text)


@wants_inputs(train=STORE_KIND, test=STORE_KIND)
def init(
    train: Annotated[Path, path_argument("Store with labels to fit on.")],
    output: Annotated[Path, Option("--output", "-o", help="The file to write, .toml.")],
    test: Annotated[
        Path | None,
        path_option("Store with labels to test on. [the other half of TRAIN]", metavar="STORE"),
    ] = None,
) -> None:
    """Write a benchmark file for your stores, to change by hand. Prints the file."""
    from vilu.artifacts.disk import write_text
    from vilu_bench.studies.new import new_study

    if output.suffix.lower() != ".toml":
        raise UsageError(f"a benchmark file is a .toml file. Got {output} instead.")
    if output.exists():
        raise UsageError(
            f"{output} exists already, perhaps with changes of yours. Give another file."
        )
    study = new_study(train, test, output)
    write_text(output, study.text)
    print_outputs(output)
    command = shell_command("vilu", "benchmark", output, "--data", study.folder, "-o", "RUN")
    log_next_step(f"change it as you like; then: {command}")


@wants_inputs(run=BENCHMARK_KIND)
def render(
    run: Annotated[
        Path,
        path_argument(
            "Output folder of `vilu benchmark`, whose stores may be removed; or a file of --keep."
        ),
    ],
    document: Annotated[
        Path | None,
        Option(help="Also write all studies as one Markdown file, figures in a folder beside it."),
    ] = None,
    title: Annotated[str, Option(help="Title of that file.")] = "Results",
    intro: Annotated[str, Option(help="First paragraph of that file.")] = "",
    first: Annotated[
        Path | None,
        path_option("Markdown file whose text comes first in that file, before --intro."),
    ] = None,
    submitted: Annotated[
        Path | None,
        path_option(
            "Cells that `vilu submit` wrote. They are checked, and shown beside those of RUN."
        ),
    ] = None,
    keep_in: Annotated[
        Path | None,
        Option(
            "--keep",
            help="Also write the studies as one small .parquet file. It renders without RUN.",
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the tables and figures of finished studies again, from the cells alone.

    If RUN is a file of --keep, only the document and the figures of the document are written.
    """
    from vilu_bench.studies.keep import keep_studies, render_kept_file
    from vilu_bench.studies.study import render_studies

    if run.is_file():
        if keep_in is not None or submitted is not None:
            raise UsageError(
                f"{run} has no scores of rows, which --keep and --submitted need. Give the output "
                "folder of `vilu benchmark`."
            )
        kept_studies = render_kept_file(
            run, document, title, intro, preface_file=first, overwrite=overwrite
        )
        _print_studies(kept_studies)
        return
    studies = render_studies(
        run,
        document,
        title,
        intro,
        preface_file=first,
        submissions_folder=submitted,
        overwrite=overwrite,
    )
    _print_studies(studies)
    message = f"tables and figures are in {run / 'studies'}"
    if document is not None:
        message += f", all of them in {document}"
    if keep_in is not None:
        n_cells = keep_studies(run, keep_in, overwrite=overwrite)
        message += f"; {n_cells} cells are kept in {keep_in}"
    log_next_step(message)


@wants_inputs(run=BENCHMARK_KIND)
def submit(
    run: Annotated[
        Path, path_argument("Output folder of `vilu benchmark`. Its stores may be removed.")
    ],
    method: Annotated[str, typer.Argument(help="Label of the method, as in [methods.LABEL].")],
    output: Annotated[
        Path, Option("--output", "-o", help="Folder for the files; other files in it stay.")
    ],
) -> None:
    """Write each finished cell of a method as a file to hand in. Prints the folder."""
    from vilu_bench.studies.study import load_studies
    from vilu_bench.studies.submit import export_cells

    boards = load_studies(run)
    paths = export_cells(boards, run, method, output)
    print_outputs(output)
    log_next_step(
        f"{len(paths)} cells; whoever has the same study: vilu render RUN --submitted {output}"
    )


def _print_studies(studies: list[Rendered]) -> None:
    """Print the studies' tables, or with --json the studies' summaries."""
    if wants_json():
        _print_summaries(studies)
        return
    parts = []
    for study in studies:
        text = study.text
        if len(studies) > 1:
            text = f"=== {study.board.config.name} ===\n{text}"
        parts.append(text)
        parts.append(study.times)
    if parts:
        tables = "\n\n".join(part for part in parts if part)
        typer.echo(tables)


def _print_summaries(studies: list[Rendered]) -> None:
    from vilu_bench.studies.ranking import summarise

    summaries = {study.board.config.name: summarise(study.board).to_dict() for study in studies}
    text = json.dumps(summaries, indent=2)
    typer.echo(text)


PUBLISHED_SIZES = "128,512,1024,2048,4096,8192,16384,32768"  # pool sizes in ViLU's Table 6


@wants_inputs(store=STORE_KIND)
# the parameter ``reading_flags`` is replaced by several flags
@partial(with_reading_flags, excluded_flags={"pool_size", "second", "cluster_column"})
def pools(
    store: Annotated[Path, path_argument("Store of images with captions, or shards like LAION's.")],
    predictors: Annotated[
        list[str],
        typer.Argument(
            help="Folders that `vilu fit` wrote, or methods that need no fit (mcm, margin)."
        ),
    ],
    sizes: Annotated[str, Option(help="Pool sizes, joined by commas.")] = PUBLISHED_SIZES,
    draws: Annotated[int, Option(min=1, help="Number of pool draws, which are averaged.")] = 1,
    *,
    reading_flags: ReadingFlags,
    output: RowsFile = None,
    overwrite: Overwrite = False,
    resamples: Annotated[
        int, Option(min=0, max=MAX_RESAMPLES, help="Bootstrap resamples of each interval.")
    ] = 1000,
) -> None:
    """Measure failure prediction on image-caption pairs in pools of several sizes: AUROC / FPR95.

    A method that does not work on pairs is refused with the reason. Pool sizes above the
    number of pairs are left out.
    """
    from vilu_bench.studies.pool_sizes import over_pool_sizes

    argument_of_label = _arguments_by_label(predictors)
    folders = [Path(name) for name in predictors if _is_folder(name)]
    pool_sizes = _parse_sizes(sizes)
    write_output = prepare_output(
        output,
        "results",
        [store, *folders],
        overwrite=overwrite,
        reading=reading_flags.digest_settings,
        methods=predictors,
        sizes=pool_sizes,
        draws=draws,
        resamples=resamples,
    )

    def open_pairs(pools: Pools) -> EmbeddingSource:
        return reading_flags.open_with_pools(pools, store)

    table = over_pool_sizes(
        {label: _load_or_make_predictor(name) for label, name in argument_of_label.items()},
        open_pairs,
        pool_sizes,
        pools=reading_flags.pools,
        draws=draws,
        dataset=store.name,
        n_resamples=resamples,
    )
    write_output(lambda path, inputs: table.save(path, inputs=inputs))
    _print_sizes(table, draws)


def _arguments_by_label(predictors: list[str]) -> dict[str, str]:
    """Map a label to each argument, which is a folder or a method's name.

    The label is the argument's last part, such as "predictor" for "runs/predictor".

    Raises:
        UsageError: If two arguments have the same label.
    """
    argument_of_label = {Path(name).name: name for name in predictors}
    if len(argument_of_label) < len(predictors):
        names = ", ".join(predictors)
        raise UsageError(f"folders must differ in their last names. Got {names}. Rename one.")
    return argument_of_label


def _print_sizes(table: ResultTable, draws: int) -> None:
    """Print the results, with a column for each pool size."""
    from vilu_bench.studies.pool_sizes import size_table

    rows = table.to_dicts()
    text = size_table(table)
    print_result(rows, text)
    legend = "AUROC / FPR95 in percent; positive=correct for FPR95"
    if draws > 1:
        legend += f", ± over {draws} draws"
    log_next_step(legend)


def _load_or_make_predictor(name: str) -> FailurePredictor:
    """Load the predictor in a folder, or make a new predictor if the method needs no fit."""
    from vilu.predictors.contract.catalogue import find_method
    from vilu.predictors.persistence.storage import load_predictor

    if _is_folder(name):
        folder = Path(name)
        require_existing(folder)
        return load_predictor(folder)
    cls = find_method(name)
    if cls.needs_fit:
        raise UsageError(
            f"{name} must be fitted first: vilu fit STORE -o {name} --method {name}, "
            "then give its folder."
        )
    return cls()


def _is_folder(name: str) -> bool:
    """Return whether an argument is a folder's path, rather than a method's name."""
    path = Path(name)
    has_several_parts = path.name != name
    return has_several_parts or path.is_dir()


def _parse_sizes(text: str) -> list[int]:
    """Return the pool sizes in a text such as "128,512", each size once, in ascending order."""
    sizes = set()
    for word in text.split(","):
        size_text = word.strip()
        size = _whole_number(size_text)
        if size is None or size < 2:
            raise UsageError(
                f"--sizes must be whole numbers from 2, joined by commas. Got {text!r} instead."
            )
        sizes.add(size)
    return sorted(sizes)


def _whole_number(word: str) -> int | None:
    """Parse a text with only ASCII digits, or return None if the text has further characters."""
    if re.fullmatch("[0-9]+", word) is None:
        return None
    return int(word)
