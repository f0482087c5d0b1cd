"""The command that answers over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Option

from vilu.cli.console import next_step
from vilu.cli.options import DecodingThreads, Device, Models, path_argument, path_option
from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.service.limits import ClientLimits

CalibratedPredictor = Annotated[
    Path, path_argument("Folder of a predictor that `vilu triage` or `vilu calibrate` left.")
]
Second = Annotated[
    Path | None,
    path_option(
        "Another predictor of the same model: it judges every image, too, and can be switched to.",
        metavar="DIR",
    ),
]
Host = Annotated[str, Option(help="Address to listen at; any but 127.0.0.1 needs a key.")]
Port = Annotated[int, Option(min=0, max=65535, help="0: a free one.")]
State = Annotated[
    Path | None, Option(metavar="DIR", help="Kept through restarts. [PREDICTOR.serving]")
]
KeyFile = Annotated[
    Path | None,
    path_option("Keys, one a line; a client sends Authorization: Bearer KEY.", metavar="FILE"),
]
AllowHost = Annotated[
    list[str] | None,
    Option(metavar="NAME", help="Name by which clients may ask for it. May be repeated."),
]
Keep = Annotated[
    Path | None, Option(metavar="DIR", help="Keep every image that was answered. [keep none]")
]
MostOfABatch = Annotated[int, Option(min=1, max=4096, help="Images per forward pass, at most.")]
Queue = Annotated[
    int | None, Option(min=1, help="Images under way; beyond, 429. [the batch and an eighth]")
]
MaxBody = Annotated[int, Option(min=1, help="MiB of a request.")]
MaxImages = Annotated[int, Option(min=1, help="Images, rows or labels of a request.")]
ServiceExecutor = Annotated[
    Literal["local", "ray"], Option(help="A process here, or replicas of Ray Serve.")
]
Replicas = Annotated[
    str, Option(help="With --executor ray: how many, or the least and the most, as 1:8.")
]
Timeout = Annotated[float, Option(min=0.1, help="Seconds after which a request is given up.")]

MODULES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "fastapi_offline")
"""Modules of other packages that the service needs."""


def serve(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: CalibratedPredictor,
    second: Second = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    state: State = None,
    key_file: KeyFile = None,
    allow_host: AllowHost = None,
    keep: Keep = None,
    models: Models = None,
    device: Device = "auto",
    batch_size: MostOfABatch = 32,
    workers: DecodingThreads = None,
    queue: Queue = None,
    max_body: MaxBody = 32,
    max_images: MaxImages = 256,
    executor: ServiceExecutor = "local",
    replicas: Replicas = "1",
    timeout: Timeout = 60.0,
) -> None:
    """Answer over HTTP: images in, decisions out, with the state of the guarantee.

    Prints the address. /docs tells what programs can ask, / is a page to drop a photo on, /metrics
    is for Prometheus. Every row is on the disk before it is answered, and the monitor has it once,
    also after a kill. Ctrl-C or SIGTERM: what is under way is answered, then the state is saved.
    Nothing that a client sends is logged or kept, but for --keep.
    """
    _require_service(executor)
    from vilu.service.limits import log_access
    from vilu.service.server import Hosted
    from vilu.service.setup import Setup

    _require_protection(host, key_file, allow_host)
    if queue is None:
        queue = batch_size + batch_size // 8
    if state is None:
        state = predictor.with_name(f"{predictor.name}.serving")
    limits = _limits(
        host,
        allow_host or [],
        key_file,
        queue=queue,
        max_body=max_body,
        max_images=max_images,
        timeout=timeout,
    )
    setup = Setup(predictor, second, state, limits, keep, models, device, batch_size, workers)
    log_access()
    if executor == "local":
        Hosted(setup, host, port, _announce).run()
        return
    from vilu.service.ray_serve import replicas_of, serve_ray

    serve_ray(setup, host, port, replicas_of(replicas), _announce)


def _require_service(executor: str) -> None:
    """Refuse to begin where a package of the service is missing."""
    from vilu.extras import import_extra

    extra = "serve"
    if executor == "ray":
        extra = "serve-ray"
    for module in MODULES:
        import_extra(module, extra)


def _require_protection(host: str, key_file: Path | None, allow_host: list[str] | None) -> None:
    """Refuse an address that other machines reach without a key, or without a name for it."""
    is_this_machine = host in {"127.0.0.1", "localhost", "::1"}
    if not is_this_machine and key_file is None:
        raise UsageError(
            f"--host {host} lets other machines ask, and then --key-file FILE is needed."
        )
    is_every_address = host in {"0.0.0.0", "::"}  # noqa: S104 - refused unless it is meant
    if is_every_address and not allow_host:
        raise UsageError(
            f"--host {host} listens at every address: say with --allow-host NAME which names "
            "clients use."
        )


def _limits(
    host: str,
    names: list[str],
    key_file: Path | None,
    *,
    queue: int,
    max_body: int,
    max_images: int,
    timeout: float,
) -> ClientLimits:
    """What clients may do: the names and keys that they use, and the size of a request."""
    from vilu.service.limits import LOOPBACK, ClientLimits, read_keys

    hosts = frozenset(name.lower() for name in [*LOOPBACK, host, *names])
    keys: frozenset[bytes] = frozenset()
    if key_file is not None:
        keys = read_keys(key_file)
    n_bytes = max_body * 2**20
    return ClientLimits(hosts, keys, queue, n_bytes, max_images, answer=timeout)


def _announce(message: str) -> None:
    """Print an address, which is the result; log every other message."""
    if message.startswith("http"):
        typer.echo(message)
    else:
        next_step(message)
