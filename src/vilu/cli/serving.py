"""The command that answers over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from vilu.cli.console import MOST_WORKERS, next_step, path_argument, path_option
from vilu.cli.images import Models
from vilu.errors import UsageError


def serve(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: Annotated[
        Path, path_argument("Folder of a predictor that `vilu triage` or `vilu calibrate` left.")
    ],
    second: Annotated[
        Path | None,
        path_option(
            "Another predictor of the same model: judges beside, answers when told to.",
            metavar="DIR",
        ),
    ] = None,
    host: Annotated[
        str, Option(help="Address to listen at; any but 127.0.0.1 needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: a free one.")] = 8000,
    state: Annotated[
        Path | None, Option(metavar="DIR", help="Kept through restarts. [PREDICTOR.serving]")
    ] = None,
    key_file: Annotated[
        Path | None,
        path_option("Keys, one a line; a client sends Authorization: Bearer KEY.", metavar="FILE"),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        Option(metavar="NAME", help="Name by which clients may ask for it. May be repeated."),
    ] = None,
    keep: Annotated[
        Path | None, Option(metavar="DIR", help="Keep every image that was answered. [keep none]")
    ] = None,
    models: Models = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    batch_size: Annotated[
        int, Option(min=1, max=4096, help="Images per forward pass, at most.")
    ] = 32,
    workers: Annotated[
        int | None, Option(min=1, max=MOST_WORKERS, help="Decoding threads. [one per core]")
    ] = None,
    queue: Annotated[
        int | None, Option(min=1, help="Images under way; beyond, 429. [the batch and an eighth]")
    ] = None,
    max_body: Annotated[int, Option(min=1, help="MiB of a request.")] = 32,
    max_images: Annotated[int, Option(min=1, help="Images, rows or labels of a request.")] = 256,
    executor: Annotated[
        Literal["local", "ray"], Option(help="A process here, or replicas of Ray Serve.")
    ] = "local",
    replicas: Annotated[
        str, Option(help="With --executor ray: how many, or the least and the most, as 1:8.")
    ] = "1",
    timeout: Annotated[
        float, Option(min=0.1, help="Seconds after which a request is given up.")
    ] = 60.0,
) -> None:
    """Answer over HTTP: images in, decisions out, with the state of the promise. Prints the address.

    /docs tells what programs can ask, / is a page to drop a photo on, /metrics is for Prometheus.
    Every row is on the disk before it is answered, and the monitor has it once, also after a kill.
    Ctrl-C or SIGTERM: what is under way is answered, then the state is saved. Nothing that a client
    sends is logged or kept, but for --keep.
    """
    from vilu.extras import import_extra

    for module in (
        "fastapi",
        "uvicorn",
        "python_multipart",
        "prometheus_client",
        "fastapi_offline",
    ):
        import_extra(module, "serve-ray" if executor == "ray" else "serve")
    from vilu.service.limits import LOOPBACK, ClientLimits, log_access, read_keys
    from vilu.service.server import Hosted
    from vilu.service.setup import Setup

    here = host in {"127.0.0.1", "localhost", "::1"}
    if not here and key_file is None:
        raise UsageError(
            f"--host {host} lets other machines ask, and then --key-file FILE is needed."
        )
    if host in {"0.0.0.0", "::"} and not allow_host:  # noqa: S104 - refused unless it is meant
        raise UsageError(
            f"--host {host} listens at every address: say with --allow-host NAME which names clients use."
        )
    hosts = frozenset(name.lower() for name in [*LOOPBACK, host, *(allow_host or ())])
    keys = frozenset[bytes]() if key_file is None else read_keys(key_file)
    limits = ClientLimits(
        hosts,
        keys,
        queue or batch_size + batch_size // 8,
        max_body * 2**20,
        max_images,
        answer=timeout,
    )
    setup = Setup(
        *(
            predictor,
            second,
            state or predictor.with_name(f"{predictor.name}.serving"),
            limits,
            keep,
        ),
        *(models, device, batch_size, workers),
    )
    log_access()

    def told(what: str) -> None:
        if what.startswith("http"):
            typer.echo(what)
        else:
            next_step(what)

    if executor == "local":
        Hosted(setup, host, port, told).run()
        return
    from vilu.service.ray_serve import replicas_of, serve_ray

    serve_ray(setup, host, port, replicas_of(replicas), told)
