"""Commands on studies: benchmark, render, submit, pools."""

from __future__ import annotations

import json
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from vilu.cli.console import (
    MOST_RESAMPLES,
    MOST_WORKERS,
    STORE,
    STUDIES,
    Data,
    Overwrite,
    Reading,
    RowsFile,
    RowsJson,
    existing,
    goes_on,
    keeping,
    next_step,
    path_argument,
    path_option,
    reads,
    wants,
)
from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.predictors.contract.predictor import FailurePredictor
    from vilu_bench.studies.study import Rendered


@goes_on
def benchmark(  # noqa: PLR0913, PLR0917 - one parameter per flag
    configs: Annotated[
        list[Path],
        path_argument(
            "Files such as configs/here/*.toml (see docs/benchmark.md).", metavar="CONFIG.toml..."
        ),
    ],
    data: Annotated[
        Path, Option(help="Folder that the paths in the files are relative to.")
    ] = Path("../shared/data"),
    output: Annotated[
        Path, Option("--output", "-o", help="Folder for embeddings, cells, tables and figures.")
    ] = Path("benchmark-output"),
    jobs: Annotated[
        int, Option(min=1, max=MOST_WORKERS, help="Processes; the number changes no result.")
    ] = 1,
    models: Annotated[
        Path | None, path_option("Folder of named backbones, in place of the hub's cache.")
    ] = None,
    shard: Annotated[
        str | None,
        Option(
            metavar="I/N",
            help="Only share I of N of the cells, for one of N machines; then run without.",
        ),
    ] = None,
    embed_only: Annotated[
        bool, Option("--embed-only", help="Make the embeddings and stop.")
    ] = False,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Say what would run, and its bytes; do nothing.")
    ] = False,
    smoke: Annotated[
        bool, Option("--smoke", help="All of it, tiny: few images, seeds, epochs; in OUTPUT/smoke.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Compare methods on data sets, over seeds, label budgets, pools, shifts and transfer: the studies of the paper.

    Prints tables and writes them, with figures, to OUTPUT/studies. Interrupt it at any moment: the
    next run does what is missing. Studies in one output share embeddings and cells.
    """
    from vilu_bench.studies.load import load_configs, shrink
    from vilu_bench.studies.run import Share
    from vilu_bench.studies.study import run_studies

    chosen = load_configs(configs)
    if smoke:
        chosen, output = [shrink(config) for config in chosen], output / "smoke"
    if dry_run:
        from vilu_bench.studies.dry_run import describe, estimate

        plans = [estimate(config, data, output) for config in chosen]
        typer.echo(
            json.dumps([plan.to_dict() for plan in plans], indent=2) if as_json else describe(plans)
        )
        return
    share = None if shard is None else Share.parse(shard)
    studies = run_studies(
        chosen, data, output, jobs=jobs, models=models, share=share, embed_only=embed_only
    )
    _print(studies, as_json=as_json)
    if embed_only:
        next_step(f"the embeddings are in {output / 'stores'}")
    elif share is not None and share.of > 1:
        next_step(
            f"share {shard} is done; when all are, run the same without --shard to see the results"
        )
    else:
        next_step(
            f"tables and figures are in {output / 'studies'}, every cell in {output / 'cells'}"
        )


@wants(run=STUDIES)
def render(
    run: Annotated[
        Path, path_argument("Output folder of `vilu benchmark`; its stores are not needed.")
    ],
    document: Annotated[
        Path | None,
        Option(help="Also write all studies as one Markdown file, figures in a folder beside it."),
    ] = None,
    title: Annotated[str, Option(help="Of that file.")] = "Results",
    intro: Annotated[str, Option(help="First paragraph of that file.")] = "",
    submitted: Annotated[
        Path | None, path_option("Cells that `vilu submit` wrote: checked, and shown beside.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Make the tables and figures of finished studies anew, from their cells alone."""
    from vilu_bench.studies.study import render_studies

    studies = render_studies(run, document, title, intro, submitted=submitted, overwrite=overwrite)
    _print(studies, as_json=as_json)
    next_step(
        f"tables and figures are in {run / 'studies'}"
        + (f", all of them in {document}" if document else "")
    )


@wants(run=STUDIES)
def submit(
    run: Annotated[
        Path, path_argument("Output folder of `vilu benchmark`; its stores are not needed.")
    ],
    method: Annotated[str, typer.Argument(help="Label of the method, as in [methods.LABEL].")],
    output: Annotated[
        Path, Option("--output", "-o", help="Folder for the files; others in it stay.")
    ],
) -> None:
    """Write the finished cells of a method as files to hand in, one each. Prints their folder."""
    from vilu_bench.studies.study import load_studies
    from vilu_bench.studies.submit import export

    written = export(load_studies(run), run, method, output)
    typer.echo(output)
    next_step(
        f"{len(written)} cells; whoever has the same study: vilu render RUN --submitted {output}"
    )


def _print(studies: list[Rendered], *, as_json: bool) -> None:
    from vilu_bench.studies.ranking import summarise

    if as_json:
        found = {study.board.config.name: summarise(study.board).to_dict() for study in studies}
        typer.echo(json.dumps(found, indent=2))
    elif studies:
        heading = "=== {} ===\n" if len(studies) > 1 else ""
        parts = [
            (heading.format(study.board.config.name) + study.text, study.times) for study in studies
        ]
        typer.echo("\n\n".join(filter(None, chain.from_iterable(parts))))


PUBLISHED = "128,512,1024,2048,4096,8192,16384,32768"


@wants(store=STORE)
@partial(reads, without={"pool_size", "second"})
def pools(  # noqa: PLR0913 - one parameter per flag
    store: Data,
    predictors: Annotated[
        list[str],
        typer.Argument(
            help="Folders that `vilu fit` wrote, or methods that need no fit (mcm, margin)."
        ),
    ],
    sizes: Annotated[str, Option(help="Pool sizes, joined by commas.")] = PUBLISHED,
    draws: Annotated[int, Option(min=1, help="Drawings of the pools, which are averaged.")] = 1,
    *,
    reading: Reading,
    as_json: RowsJson = False,
    output: RowsFile = None,
    overwrite: Overwrite = False,
    resamples: Annotated[
        int, Option(min=0, max=MOST_RESAMPLES, help="Bootstrap resamples of each interval.")
    ] = 1000,
) -> None:
    """Failure prediction on image-caption pairs against the number of captions to choose from: AUROC / FPR95.

    A method that does not work on pairs is refused with the reason. Sizes that the pairs do not
    fill are left out.
    """
    from vilu_bench.studies.pool_sizes import over_pool_sizes, size_table

    if len({Path(name).name for name in predictors}) < len(predictors):
        raise UsageError(
            f"folders must differ in their last names. Got {', '.join(predictors)}. Rename one."
        )
    read = [store, *(Path(name) for name in predictors if _is_folder(name))]
    settings = {
        "methods": predictors,
        "sizes": _sizes(sizes),
        "draws": draws,
        "resamples": resamples,
    }
    keep = keeping(
        output, "results", read, overwrite=overwrite, reading=reading.settings, **settings
    )
    found = over_pool_sizes(
        {Path(name).name: _predictor(name) for name in predictors},
        lambda pools: reading.open_in(pools, store),
        _sizes(sizes),
        pools=reading.pools,
        draws=draws,
        dataset=store.name,
        n_resamples=resamples,
    )
    keep(lambda path, inputs: found.save(path, inputs=inputs))
    typer.echo(json.dumps(found.to_dicts(), indent=2) if as_json else size_table(found))
    next_step(
        "AUROC / FPR95 in percent; positive=correct for FPR95"
        + (f", ± over {draws} draws" if draws > 1 else "")
    )


def _predictor(name: str) -> FailurePredictor:
    """A saved predictor, or a method by its name."""
    from vilu.predictors.contract.catalogue import find_method
    from vilu.predictors.persistence.storage import load

    if _is_folder(name):
        return load(existing(Path(name)))
    cls = find_method(name)
    if cls.needs_fit:
        raise UsageError(
            f"{name} must be fitted first: vilu fit STORE -o {name} --method {name}, then give its folder."
        )
    return cls()


def _is_folder(name: str) -> bool:
    return Path(name).name != name or Path(name).is_dir()


def _sizes(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() and int(word) > 1 for word in words):
        raise UsageError(
            f"--sizes must be whole numbers from 2, joined by commas. Got {text!r} instead."
        )
    return sorted({int(word) for word in words})
