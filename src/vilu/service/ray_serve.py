"""The service on many machines with Ray Serve: model replicas, and shared journals."""

from __future__ import annotations

import os
import queue
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

from vilu.artifacts.disk import locked, make_folder
from vilu.calibration.monitor.status import Status
from vilu.errors import UsageError, ViLUError
from vilu.extras import import_extra, start_ray
from vilu.process import RAY_CLUSTERS, keep_freed_memory
from vilu.registry import load_plugin, plugins
from vilu.service.app import Service
from vilu.service.journals import LabelCounts, ScoreColumns, ServiceState
from vilu.service.limits import Gate, log_access
from vilu.service.local_journals import LocalJournals
from vilu.service.setup import Setup, load_engine

APPLICATION_NAME: Final = "vilu"
"""The application's name in Ray Serve."""

HEALTH_SECONDS: Final = 5.0
"""Time between two health checks of a replica, and time limit of each check, in seconds."""


class RemoteJournals:
    """The journals in a Ray actor, shared by the model replicas.

    Every method calls the method of ``LocalJournals`` with the same name in the actor. If the actor
    fails, Ray may repeat a call. A row written twice is stored once.
    """

    def __init__(self, actor: Any) -> None:  # noqa: ANN401 - a Ray handle
        self._actor = actor

    def _call(self, method: str, *arguments: object) -> Any:  # noqa: ANN401 - depends on method
        """Call a method of the actor. A vilu error in the actor is raised here unchanged."""
        ray = import_extra("ray", "serve-ray")
        try:
            pending_call = getattr(self._actor, method).remote(*arguments)
            return ray.get(pending_call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ViLUError):
                raise error.cause from None
            raise

    def record(self, ids: Sequence[str], scores: Mapping[str, ScoreColumns]) -> ServiceState:
        """Call ``LocalJournals.record``."""
        state: ServiceState = self._call("record", ids, scores)
        return state

    def state(self) -> ServiceState:
        """Call ``LocalJournals.state``."""
        state: ServiceState = self._call("state")
        return state

    def label(self, labels: Mapping[str, str]) -> dict[str, LabelCounts]:
        """Call ``LocalJournals.label``."""
        counts: dict[str, LabelCounts] = self._call("label", labels)
        return counts

    def check_writable(self) -> ServiceState:
        """Call ``LocalJournals.check_writable``."""
        state: ServiceState = self._call("check_writable")
        return state

    def correct(self, labels_before: Mapping[str, str], labels_after: Mapping[str, str]) -> int:
        """Call ``LocalJournals.correct``."""
        n_corrected: int = self._call("correct", labels_before, labels_after)
        return n_corrected

    def statuses(self) -> dict[str, Status]:
        """Call ``LocalJournals.statuses``."""
        statuses: dict[str, Status] = self._call("statuses")
        return statuses

    def switch(self, name: str) -> ServiceState:
        """Call ``LocalJournals.switch``."""
        state: ServiceState = self._call("switch", name)
        return state

    def close(self) -> None:
        """Call ``LocalJournals.close``."""
        self._call("close")


class Replicas(NamedTuple):
    """Minimum and maximum number of replicas."""

    minimum: int
    maximum: int


def parse_replicas(text: str) -> Replicas:
    """Return the replica numbers in a text such as "2" or "1:8"."""
    minimum_text, _, maximum_text = text.partition(":")
    with suppress(ValueError):  # a text without a number raises the error below
        minimum = int(minimum_text)
        maximum = int(maximum_text or minimum_text)
        if 1 <= minimum <= maximum:
            return Replicas(minimum, maximum)
    raise UsageError(
        f"--replicas is a number, or a minimum and a maximum such as 1:8. Got {text!r:.40} instead."
    )


def deploy(setup: Setup, host: str, port: int, replicas: Replicas) -> tuple[str, RemoteJournals]:
    """Start the service in this process's Ray cluster.

    Args:
        setup: The service's settings.
        host: The address.
        port: The port.
        replicas: Minimum and maximum number of replicas.

    Returns:
        The URL, and the journals shared by all replicas.
    """
    serve = import_extra("ray.serve", "serve-ray")
    journals = _start_journals_actor(setup)

    modules = plugins()
    uses_one_machine = os.environ.get(RAY_CLUSTERS) == "0"

    def build_application() -> Gate:
        """Build the application, and load its model. Every replica is a process that calls this."""
        if uses_one_machine:
            listen_to_this_machine_alone()
        for module in modules:
            load_plugin(module)
        keep_freed_memory()
        log_access()
        service = Service(setup.limits, setup.keep)
        engine = load_engine(setup, journals)
        service.start(engine)
        return service.gate

    serve.start(http_options={"host": host, "port": port, "location": "HeadOnly"})
    make_replica_class = serve.ingress(build_application)
    replica_class = make_replica_class()
    options = _deployment_options(setup, replicas)
    deployment = serve.deployment(replica_class).options(**options)
    application = deployment.bind()
    serve.run(application, name=APPLICATION_NAME, route_prefix="/")
    return f"http://{host}:{port}", journals


def listen_to_this_machine_alone() -> None:
    """Let this process's gRPC servers listen only at 127.0.0.1, whatever address they ask for.

    A Ray Serve replica opens a port for other deployments at all addresses of the machine, even if
    Ray itself listens at 127.0.0.1 only. This port asks for no key, and reads pickles. Call this
    function before the port is opened, in a process used only as a replica.
    """
    server_class: Any = import_extra("grpc.aio._server", "serve-ray").Server
    add_port = server_class.add_insecure_port

    def add_local_port(self: Any, address: str) -> int:  # noqa: ANN401 - a gRPC server
        _, _, port = address.rpartition(":")
        return int(add_port(self, f"127.0.0.1:{port}"))

    server_class.add_insecure_port = add_local_port


def _start_journals_actor(setup: Setup) -> RemoteJournals:
    """Start an actor with the journals, and verify the journals."""
    ray = import_extra("ray", "serve-ray")
    # Ray restarts the actor after a failure, also on another machine if the state folder is on a
    # shared disk. -1 means no limit. The journals need a single call at a time (max_concurrency).
    make_remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=1)
    actor_class = make_remote(LocalJournals)
    actor = actor_class.remote(setup.state, setup.predictors)
    journals = RemoteJournals(actor)
    journals.state()  # raises the actor's error if the journals could not be opened
    return journals


def _deployment_options(setup: Setup, replicas: Replicas) -> dict[str, Any]:
    """Return the deployment options: number of replicas, largest load, and time limits."""
    return {
        "name": APPLICATION_NAME,
        "max_ongoing_requests": 4 * setup.limits.max_queued_images,
        "graceful_shutdown_timeout_s": setup.limits.max_request_seconds,
        "health_check_period_s": HEALTH_SECONDS,
        "health_check_timeout_s": HEALTH_SECONDS,
        **_replica_options(replicas),
    }


def _replica_options(replicas: Replicas) -> dict[str, Any]:
    """Return the deployment options for the number of replicas."""
    if replicas.minimum == replicas.maximum:
        return {"num_replicas": replicas.minimum}
    limits = {"min_replicas": replicas.minimum, "max_replicas": replicas.maximum}
    return {"autoscaling_config": limits}


def serve_ray(
    setup: Setup, host: str, port: int, replicas: Replicas, announce: Callable[[str], None]
) -> None:
    """Serve until a signal. Then drain the replicas, and save.

    The cluster at ``RAY_ADDRESS`` is used. Without ``RAY_ADDRESS``, a cluster is started here.

    Args:
        setup: The service's settings.
        host: The address.
        port: The port.
        replicas: Minimum and maximum number of replicas.
        announce: Called with the URL and then with "ready", as soon as all replicas answer.

    Raises:
        UsageError: If no cluster answers at ``RAY_ADDRESS``, if Ray cannot start, or if the port is
            0, since Ray does not report the free port it chose.
        BusyError: If another process serves with the same state folder.
        ViLUError: If a predictor's rule cannot be verified, or if the model differs from the
            predictor's model.
    """
    ray = import_extra("ray", "serve-ray")
    serve = import_extra("ray.serve", "serve-ray")
    if port == 0:
        raise UsageError("with --executor ray give a --port other than 0.")
    make_folder(setup.state)
    with locked(setup.state, activity="serving with the state in"):
        start_ray(include_dashboard=False)
        try:
            url, journals = deploy(setup, host, port, replicas)
            announce(url)
            announce("ready")
            signal_number = _wait_for_signal()
            serve.delete(APPLICATION_NAME)
            journals.close()
        finally:
            serve.shutdown()
            ray.shutdown()
    # The exception is raised here and not in a signal handler, since Ray replaces such handlers.
    if signal_number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + signal_number)  # the usual exit code after a signal


def _wait_for_signal() -> int:
    """Wait for SIGTERM or SIGINT, and return the number of the signal."""
    signal_numbers: queue.SimpleQueue[int] = queue.SimpleQueue()

    def put_number(number: int, _: object) -> None:
        signal_numbers.put(number)

    previous_handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous_handlers[number] = signal.signal(number, put_number)
    try:
        return signal_numbers.get()
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
