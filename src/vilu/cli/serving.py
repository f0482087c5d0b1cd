"""The command for starting an HTTP service: serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

from typer import Option

from vilu.cli.console import log_next_step, print_outputs
from vilu.cli.help import LIMITS, MORE, SPEED
from vilu.cli.options import Device, Models, path_argument, path_option
from vilu.errors import UsageError

if TYPE_CHECKING:
    from vilu.service.limits import ClientKey, ClientLimits

CalibratedPredictor = Annotated[
    Path, path_argument("Folder of a predictor that `vilu triage` or `vilu calibrate` wrote.")
]
SecondPredictor = Annotated[
    Path | None,
    path_option(
        "Another predictor of the same model. It judges every image, too, and the service can "
        "switch to it.",
        metavar="DIR",
        rich_help_panel=MORE,
    ),
]
PrecisionOfService = Annotated[
    Literal["fp32", "bf16"] | None,
    Option(
        help="Arithmetic of the image tower. bf16 is compared with fp32 on the first 64 images. "
        "[as for the photos that the predictor was fitted on]"
    ),
]
Host = Annotated[
    str, Option(help="Address to listen at; any address except 127.0.0.1 needs --key-file.")
]
Port = Annotated[int, Option(min=0, max=65535, help="Port to listen at; 0 for a free port.")]
StateFolder = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Folder of the state, kept over restarts. [PREDICTOR.serving]",
        rich_help_panel=MORE,
    ),
]
KeyFile = Annotated[
    Path | None,
    path_option(
        "Keys, one per line; a client sends Authorization: Bearer KEY. The line may also say what "
        "the key allows: ask, label, admin. [all]",
        metavar="FILE",
    ),
]
AllowHost = Annotated[
    list[str] | None,
    Option(
        metavar="NAME",
        help="Host name that clients use for this service; https://NAME if a proxy gives it TLS. "
        "May be repeated.",
        rich_help_panel=MORE,
    ),
]
ImagesFolder = Annotated[
    Path | None,
    Option(
        metavar="DIR", help="Store every answered image here. [store none]", rich_help_panel=MORE
    ),
]
MaxBatchSize = Annotated[
    int,
    Option(
        min=1, max=4096, help="Maximum number of images per forward pass.", rich_help_panel=SPEED
    ),
]
MaxQueue = Annotated[
    int | None,
    Option(
        min=1,
        help="Maximum number of images in progress; further requests get status 429. "
        "[9/8 of --batch-size]",
        rich_help_panel=LIMITS,
    ),
]
MaxBody = Annotated[
    int,
    Option(
        min=1,
        help="Maximum MiB of a request with images. All requests in progress together may have "
        "four times as much.",
        rich_help_panel=LIMITS,
    ),
]
MaxJson = Annotated[
    int,
    Option(
        min=1,
        help="Maximum MiB of a request with embeddings or labels.",
        rich_help_panel=LIMITS,
    ),
]
MaxMegapixels = Annotated[
    int,
    Option(
        min=1,
        max=89,
        help="Maximum size of an image in millions of pixels. A request may have ten times as "
        "much.",
        rich_help_panel=LIMITS,
    ),
]
MaxImages = Annotated[
    int,
    Option(
        min=1, help="Maximum number of images, rows or labels in a request.", rich_help_panel=LIMITS
    ),
]
ServiceExecutor = Annotated[
    Literal["local", "ray"],
    Option(help="One local process, or replicas of Ray Serve.", rich_help_panel=SPEED),
]
Replicas = Annotated[
    str,
    Option(
        help="With --executor ray: number of replicas, or a range such as 1:8.",
        rich_help_panel=SPEED,
    ),
]
Timeout = Annotated[
    float,
    Option(
        min=0.1,
        help="Maximum seconds of a request, before it is abandoned.",
        rich_help_panel=LIMITS,
    ),
]

SERVICE_MODULES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "fastapi_offline")
"""Modules from other packages that the service imports."""

TLS_PREFIX: Final = "https://"
"""Prefix for a host name behind a proxy with TLS."""


def serve(  # noqa: PLR0913, PLR0917 - one parameter per flag
    predictor: CalibratedPredictor,
    second: SecondPredictor = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    state: StateFolder = None,
    key_file: KeyFile = None,
    allow_host: AllowHost = None,
    keep: ImagesFolder = None,
    models: Models = None,
    device: Device = "auto",
    precision: PrecisionOfService = None,
    batch_size: MaxBatchSize = 32,
    queue: MaxQueue = None,
    max_body: MaxBody = 32,
    max_json: MaxJson = 1,
    max_images: MaxImages = 256,
    max_megapixels: MaxMegapixels = 25,
    executor: ServiceExecutor = "local",
    replicas: Replicas = "1",
    timeout: Timeout = 60.0,
) -> None:
    """Serve decisions about images over HTTP, with the state of the guarantee.

    Prints the address. /docs documents the API for programs, / is a page for dropping a photo, and
    /metrics is for Prometheus. Every row is written to the disk before its answer is sent, and the
    monitor counts every row exactly once, even if the service is killed. After Ctrl-C or SIGTERM,
    the requests in progress are answered, and then the state is saved. Nothing from a client is
    logged or stored, except with --keep.
    """
    _require_service(executor)
    from vilu.service.limits import log_access
    from vilu.service.server import HostedService
    from vilu.service.setup import Setup

    _require_protection(host, key_file, allow_host)
    if queue is None:
        queue = 9 * batch_size // 8  # a batch, and an eighth of the next batch
    if state is None:
        state = predictor.with_name(f"{predictor.name}.serving")
    limits = replace(
        _client_limits(host, allow_host or [], key_file),
        max_queued_images=queue,
        max_image_body_bytes=max_body * 2**20,
        max_other_body_bytes=max_json * 2**20,
        max_images=max_images,
        max_pixels=max_megapixels * 1_000_000,
        max_request_pixels=10 * max_megapixels * 1_000_000,
        answer_seconds=timeout,
    )
    setup = Setup(
        predictor=predictor,
        second=second,
        state=state,
        limits=limits,
        keep=keep,
        models=models,
        device=device,
        batch_size=batch_size,
        precision=precision,
    )
    log_access()
    if executor == "local":
        HostedService(setup, host, port, _announce).run()
        return
    from vilu.service.ray_serve import parse_replicas, serve_ray

    serve_ray(setup, host, port, parse_replicas(replicas), _announce)


def _require_service(executor: str) -> None:
    """Raise MissingModelError if a package for the service is missing."""
    from vilu.extras import import_extra

    extra = "serve"
    if executor == "ray":
        extra = "serve-ray"
    for module in SERVICE_MODULES:
        import_extra(module, extra)


def _require_protection(host: str, key_file: Path | None, allow_host: list[str] | None) -> None:
    """Raise UsageError if other machines could connect without a key or without a host name."""
    from vilu.service.limits import LOOPBACK_HOSTS, in_brackets

    if in_brackets(host) not in LOOPBACK_HOSTS and key_file is None:
        raise UsageError(
            f"--host {host} lets other machines connect, so --key-file FILE is needed."
        )
    listens_everywhere = host in {"0.0.0.0", "::"}  # noqa: S104 - refused without --allow-host
    if listens_everywhere and not allow_host:
        raise UsageError(
            f"--host {host} listens at every address. Give the host names that clients use with "
            "--allow-host NAME."
        )


def _client_limits(host: str, names: list[str], key_file: Path | None) -> ClientLimits:
    """Return the limits on clients: host names, with or without TLS, and keys."""
    from vilu.service.limits import LOOPBACK_HOSTS, ClientLimits, in_brackets, read_keys

    lower_names = [name.lower() for name in names]
    tls_hosts = {
        name.removeprefix(TLS_PREFIX) for name in lower_names if name.startswith(TLS_PREFIX)
    }
    hosts = {name.removeprefix(TLS_PREFIX) for name in lower_names}
    keys: frozenset[ClientKey] = frozenset()
    if key_file is not None:
        keys = read_keys(key_file)
    own_host = in_brackets(host.lower())
    return ClientLimits(
        hosts=frozenset([*LOOPBACK_HOSTS, own_host, *hosts]),
        tls_hosts=frozenset(tls_hosts),
        keys=keys,
    )


def _announce(message: str) -> None:
    """Print the service's address as the command's result. Log all other messages."""
    if message.startswith("http"):
        print_outputs(message)
    else:
        log_next_step(message)
