"""The same application on many machines, by Ray Serve: replicas of the model, one keeper for all of them."""

from __future__ import annotations

import logging
import queue
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, cast

from vilu.artifacts.disk import locked, make_folder
from vilu.calibration.monitor.status import Status
from vilu.errors import UsageError, ViLUError
from vilu.extras import import_extra
from vilu.process import keep_freed_memory
from vilu.registry import load_plugin, plugins
from vilu.service.app import Service
from vilu.service.keeper import Bookkeeper
from vilu.service.kept import Kept, Scores
from vilu.service.limits import Gate, log_access
from vilu.service.setup import Setup, load_engine

NAME: Final = "vilu"
"""Of the application."""

DRAIN: Final = 60.0
"""Seconds that a replica has for what is under way when it is told to stop."""

HEALTH: Final = 5.0
"""Seconds between two looks whether a replica lives, and the patience of each."""


class RemoteKeeper:
    """A keeper that lives in an actor.

    A row that is sent twice, as after the actor's death, is one row.
    """

    def __init__(self, actor: Any) -> None:  # noqa: ANN401 - a handle of Ray
        self._actor = actor

    def _ask(self, method: str, *given: object) -> Any:  # noqa: ANN401 - what the method gives
        ray = import_extra("ray", "serve-ray")
        try:
            return ray.get(getattr(self._actor, method).remote(*given))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ViLUError):
                raise error.cause from None
            raise

    def record(self, ids: Sequence[str], said: Mapping[str, Scores]) -> Kept:
        """As ``Bookkeeper``."""
        return cast("Kept", self._ask("record", ids, said))

    def kept(self) -> Kept:
        """As ``Bookkeeper``."""
        return cast("Kept", self._ask("kept"))

    def label(self, labels: Mapping[str, str]) -> dict[str, tuple[int, list[str]]]:
        """As ``Bookkeeper``."""
        return cast("dict[str, tuple[int, list[str]]]", self._ask("label", labels))

    def statuses(self) -> dict[str, Status]:
        """As ``Bookkeeper``."""
        return cast("dict[str, Status]", self._ask("statuses"))

    def switch(self, name: str) -> Kept:
        """As ``Bookkeeper``."""
        return cast("Kept", self._ask("switch", name))

    def close(self) -> None:
        """As ``Bookkeeper``."""
        self._ask("close")


def replicas_of(text: str) -> tuple[int, int]:
    """Least and most replicas: "2", or "1:8"."""
    first, _, second = text.partition(":")
    with suppress(ValueError):
        least = int(first)
        most = int(second or first)
        if 1 <= least <= most:
            return least, most
    raise UsageError(
        f"--replicas is a number, or the least and the most, as 1:8. Got {text!r:.40} instead."
    )


def begin(
    setup: Setup, host: str, port: int, replicas: tuple[int, int]
) -> tuple[str, RemoteKeeper]:
    """Have Ray serve it, in the cluster that this process is connected to; the address, and the keeper."""
    ray = import_extra("ray", "serve-ray")
    serve = import_extra("ray.serve", "serve-ray")
    # it comes back after its machine's death where the state lies on a disk that all share
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1)(
        Bookkeeper
    )
    keeper = RemoteKeeper(actor.remote(setup.state, setup.predictors))
    keeper.kept()  # what does not verify is refused here

    modules = plugins()

    def build() -> Gate:
        """In a replica, a process of its own: the application with a model of its own."""
        for module in modules:
            load_plugin(module)
        keep_freed_memory()
        log_access()
        service = Service(setup.limits, setup.keep)
        service.start(load_engine(setup, keeper))
        return service.gate

    serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    least, most = replicas
    size: dict[str, Any] = {"num_replicas": least}
    if most > least:
        size = {"autoscaling_config": {"min_replicas": least, "max_replicas": most}}
    deployment = serve.deployment(serve.ingress(build)())
    settings = {
        "max_ongoing_requests": 4 * setup.limits.queue,
        "graceful_shutdown_timeout_s": DRAIN,
    }
    health = {"health_check_period_s": HEALTH, "health_check_timeout_s": HEALTH}
    serve.run(
        deployment.options(name=NAME, **size, **settings, **health).bind(),
        name=NAME,
        route_prefix="/",
    )
    return f"http://{host}:{port}", keeper


def serve_ray(
    setup: Setup, host: str, port: int, replicas: tuple[int, int], told: Callable[[str], None]
) -> None:
    """Serve until a signal comes, then drain the replicas and save.

    A cluster that is there is used (``RAY_ADDRESS``); else this machine is one.

    Raises:
        UsageError: If no port is given: Ray does not say which free one it took.
        BusyError: If another process serves with this state.
        ViLUError: What speaks against a predictor.
    """
    ray = import_extra("ray", "serve-ray")
    serve = import_extra("ray.serve", "serve-ray")
    if port == 0:
        raise UsageError("with --executor ray give a --port other than 0.")
    make_folder(setup.state)
    with locked(setup.state, "serving with the state in"):
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
            ignore_reinit_error=True,
        )
        try:
            address, keeper = begin(setup, host, port, replicas)
            told(address)
            told("ready")
            number = _signalled()
            serve.delete(NAME)
            keeper.close()
        finally:
            serve.shutdown()
            ray.shutdown()
    raise (
        KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
    )  # Ray keeps handlers of its own


def _signalled() -> int:
    """Wait until a signal asks to stop; its number."""
    came: queue.SimpleQueue[int] = queue.SimpleQueue()
    asked = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda found, _: came.put(found)) for number in asked}
    try:
        return came.get()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
