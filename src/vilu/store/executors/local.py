"""Executors for this machine: ``LocalExecutor`` (processes) and ``RankExecutor`` (one rank)."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from vilu.errors import StorageError, UsageError, ViLUError
from vilu.process import keep_freed_memory
from vilu.registry import load_plugin, plugins
from vilu.store.job import EmbedJob
from vilu.store.manifest import Receipt
from vilu.store.mapped import n_cores
from vilu.validation import require_at_least


class Worker:
    """The object in a worker process that does a job's parts.

    The job is unpickled when the first part arrives, and the model is loaded once. The process does
    nothing but this job. So the worker also loads plugins, and sets the thread count and the memory
    use for the whole process.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._job: EmbedJob | None = None

    def do_part(self, part_number: int) -> bytes:
        """Do the part with the number ``part_number``, and return the pickled outcome.

        The outcome is the part's receipt, or the exception raised during the work.
        """
        try:
            if self._job is None:
                self._job = self._unpack_job()
            receipt = self._job.process(part_number)
            return pickle.dumps(receipt)
        # Any exception is caught, because the model or the reader may come from a plugin. The
        # driver gets the exception as bytes and raises it. Uncaught, it would end this process, and
        # the driver would not know why.
        except Exception as error:  # noqa: BLE001
            return _pack_error(error)

    def _unpack_job(self) -> EmbedJob:
        """Unpickle the job, and set up the process: plugins, thread count, memory use."""
        packed_job: PackedJob = pickle.loads(self._payload)  # noqa: S301 - from our own driver
        for module in packed_job.plugins:
            load_plugin(module)
        torch.set_num_threads(packed_job.threads)
        keep_freed_memory()
        self._payload = b""
        return packed_job.job


@dataclass(frozen=True)
class PackedJob:
    """Message from the driver to a worker: plugins to load, thread count, and the job."""

    plugins: Sequence[str]  # module names
    threads: int  # number of threads for tensors
    job: EmbedJob


def unpack_receipt(packed_outcome: bytes) -> Receipt:
    """Return the receipt in an outcome from ``Worker.do_part``, or raise the exception."""
    outcome = pickle.loads(packed_outcome)  # noqa: S301 - from our own worker
    if isinstance(outcome, Exception):
        raise outcome
    if not isinstance(outcome, Receipt):
        raise TypeError(f"a part must end with a receipt. Got {outcome!r:.200} instead.")
    return outcome


def pack_job(job: EmbedJob, threads: int) -> bytes:
    """Return a job's pickled ``PackedJob``, for workers with ``threads`` threads for tensors.

    Unless ``job.workers`` is set, a worker also has ``threads`` threads for decoding.
    """
    job_of_worker = replace(job, workers=job.workers or threads)
    try:
        packed_job = PackedJob(plugins=plugins(), threads=threads, job=job_of_worker)
        return pickle.dumps(packed_job)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UsageError(
            f"this job cannot go to other processes: {error}. Give the model by name "
            "(BackboneSpec), and a data set that can be pickled."
        ) from error


def _pack_error(error: Exception) -> bytes:
    """Pickle an exception. Unless it is a ViLUError, add the traceback as a note.

    The note is needed because a pickled exception has no traceback.
    """
    if not isinstance(error, ViLUError):
        note = "".join(traceback.format_exception(error))
        error.add_note(note)
    try:
        packed_error = pickle.dumps(error)
        # The bytes are unpickled as a test. For example, this fails for a class whose __init__
        # takes more than a message.
        pickle.loads(packed_error)  # noqa: S301 - our own bytes
    # Pickling and unpickling run methods from elsewhere, which may raise any exception. In this
    # case, the driver gets the original exception as text.
    except Exception:  # noqa: BLE001
        text = "".join(traceback.format_exception(error))
        return pickle.dumps(RuntimeError(text))
    return packed_error


def check_processes(processes: int | None) -> int | None:
    """Check and return the number of processes. None means the executor's default."""
    if processes is not None:
        require_at_least("processes", processes, 1)
    return processes


def threads_per_process(processes: int) -> int:
    """Return the number of threads per process: an equal share of the cores, at least 1."""
    return max(1, n_cores() // processes)


def take_gpu(gpu_number: int) -> None:
    """Choose the GPU that "cuda" means. Of n GPUs, this is number ``gpu_number`` modulo n."""
    if torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        torch.cuda.set_device(gpu_number % n_gpus)


# The run ends after this number of worker deaths in a single part. The number is larger than a
# job's ``MAX_ATTEMPTS``, so that the job gives up a crashing part first.
MAX_DEATHS = 5
READY_MESSAGE = b""  # message from a worker that has started and waits for the job
GRACE_SECONDS = 5.0  # time for a worker to end, before the worker is killed
# advice if workers die before their first part
MAIN_GUARD_HINT = (
    "A script that embeds in processes needs its work under `if __name__ == '__main__':`."
)
# advice if workers die in a part
MEMORY_HINT = (
    "Finished parts are kept. If memory ran out, take fewer processes or a smaller batch size."
)

logger = logging.getLogger(__name__)


class LocalExecutor:
    """An executor that does parts in processes on this machine.

    The driver (this process) has a pipe to each worker process. Through the pipe, the driver sends
    the job and then part numbers, and the worker sends receipts. Workers share no lock. So if a
    worker is killed, only the unfinished part is lost, and another worker does this part again.
    When the driver dies, all workers end at once.

    Workers are started with "spawn" and not by a fork. A fork would copy the driver's locks, even
    held locks, but not the threads that would release them.
    """

    name = "local"

    def __init__(self, processes: int | None = None, max_deaths: int = MAX_DEATHS) -> None:
        self.processes = check_processes(processes) or n_cores()
        self.max_deaths = max_deaths

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """Yield the receipt of each part as soon as the part is done."""
        worker_pool = _WorkerPool(job, parts, self.processes, self.max_deaths)
        try:
            yield from worker_pool.receipts()
        finally:
            worker_pool.stop()


@contextmanager
def ctrl_c_blocked() -> Iterator[None]:
    """Hold Ctrl-C back from processes that are started in the ``with`` statement.

    Ctrl-C reaches all processes in the terminal. It would end a new process during the imports,
    with a traceback. Ctrl-C is also held back from the calling thread, until the ``with`` statement
    ends. On Windows, this does nothing.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Starting the first process would also start this helper of multiprocessing. In Python 3.11,
    # the helper's start lets Ctrl-C through again. So the helper is started before.
    resource_tracker.ensure_running()
    mask_before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)


class _WorkerProcess:
    """The driver's record of a worker process: the process, the pipe, and the current part.

    ``number`` is the worker's number among all workers in a run.
    """

    def __init__(self, number: int) -> None:
        context = get_context("spawn")
        self.number = number
        self.part_number: int | None = None  # the current part, None if the process is idle
        self.has_job = False  # whether the process has started and got the job
        self.pipe, worker_end = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_run_worker, args=(worker_end, number), daemon=True
        )
        try:
            with ctrl_c_blocked():
                self.process.start()
        finally:
            # The driver notices the worker's death only when all copies of the worker's pipe end
            # are closed. So the driver closes its own copy.
            worker_end.close()

    def end(self) -> int | None:
        """Close the pipe, so that the process ends. Return the exit code.

        If the process is still running after ``GRACE_SECONDS``, it is killed.
        """
        self.pipe.close()
        self.process.join(GRACE_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode


class _WorkerPool:
    """The workers in a ``run``, with the parts that wait for a worker."""

    def __init__(
        self, job: EmbedJob, parts: Sequence[int], processes: int, max_deaths: int
    ) -> None:
        self.max_deaths = max_deaths
        threads = threads_per_process(processes)
        self.payload = pack_job(job, threads)
        self.waiting_part_numbers = deque(parts)
        self.max_workers = min(processes, len(parts))
        self.workers: dict[object, _WorkerProcess] = {}  # pipe -> the worker at the far end
        # part number -> number of workers that died in the part. None -> deaths before the first
        # part.
        self.n_deaths_in_part: Counter[int | None] = Counter()

    def receipts(self) -> Iterator[Receipt]:
        """Yield the receipts in the order of arrival."""
        while self.waiting_part_numbers or self._n_busy():
            self._start_workers()
            self._assign_parts()
            pipes = [worker.pipe for worker in self.workers.values()]
            for pipe in connection.wait(pipes):
                worker = self.workers.get(pipe)
                if worker is None:  # the worker has died, and _assign_parts has removed it
                    continue
                outcome = self._receive(worker)
                if outcome is not None:
                    # before the yield, because the caller may need some time for the receipt
                    self._assign_parts()
                    yield unpack_receipt(outcome)

    def stop(self) -> None:
        """End all workers."""
        for worker in self.workers.values():
            if worker.part_number is None:
                worker.process.kill()
            else:
                worker.process.terminate()  # lets the process remove its temporary files
        for worker in self.workers.values():
            worker.end()
        self.workers.clear()

    def _n_busy(self) -> int:
        """Return the number of workers with a part."""
        return sum(worker.part_number is not None for worker in self.workers.values())

    def _start_workers(self) -> None:
        """Start workers: one for each unfinished part, but at most ``max_workers``."""
        n_parts_left = self._n_busy() + len(self.waiting_part_numbers)
        n_wanted = min(self.max_workers, n_parts_left)
        n_missing = max(0, n_wanted - len(self.workers))
        used_numbers = {worker.number for worker in self.workers.values()}
        # a new worker gets a dead worker's number, and so also the worker's GPU (``take_gpu``)
        free_numbers = sorted(set(range(self.max_workers)) - used_numbers)
        for number in free_numbers[:n_missing]:
            worker = _WorkerProcess(number)
            self.workers[worker.pipe] = worker

    def _assign_parts(self) -> None:
        """Send waiting parts to idle workers."""
        # a copy of the values, because _remove_dead_worker removes a worker from the dictionary
        for worker in list(self.workers.values()):
            is_idle = worker.has_job and worker.part_number is None
            if not is_idle:
                continue
            if not self.waiting_part_numbers:
                return
            worker.part_number = self.waiting_part_numbers.popleft()
            try:
                worker.pipe.send(worker.part_number)
            except OSError:
                self._remove_dead_worker(worker)

    def _receive(self, worker: _WorkerProcess) -> bytes | None:
        """Return a worker's outcome, or None if the worker has just started or has died."""
        try:
            message = worker.pipe.recv_bytes()
            if message == READY_MESSAGE:
                # the job is sent once, and only after the worker has started
                worker.pipe.send_bytes(self.payload)
                worker.has_job = True
                return None
        except (EOFError, OSError):
            self._remove_dead_worker(worker)
            return None
        worker.part_number = None
        return message

    def _remove_dead_worker(self, worker: _WorkerProcess) -> None:
        """Remove a dead worker, and put the worker's part back into the queue.

        Raises:
            StorageError: If ``max_deaths`` workers have died in this part, or before the first
                part.
        """
        del self.workers[worker.pipe]
        part_number = worker.part_number
        self.n_deaths_in_part[part_number] += 1
        if part_number is not None:
            self.waiting_part_numbers.appendleft(part_number)
        moment_text = "before its first part" if part_number is None else f"in part {part_number}"
        exit_code = worker.end()
        exit_text = _describe_exit_code(exit_code)
        logger.warning(
            "worker %d ended %s with %s; another one goes on", worker.number, moment_text, exit_text
        )
        if self.n_deaths_in_part[part_number] < self.max_deaths:
            return
        hint = MEMORY_HINT
        if part_number is None:
            hint = MAIN_GUARD_HINT
        raise StorageError(
            f"workers ended {self.max_deaths} times {moment_text}, last with {exit_text}. {hint}"
        )


def _describe_exit_code(exit_code: int | None) -> str:
    """Return "exit code N", or the name of the signal that ended the process."""
    # if a signal ended the process, the exit code is minus the signal number
    if exit_code is not None and exit_code < 0:
        return f"signal {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _run_worker(pipe: Connection, worker_number: int) -> None:
    """Run a worker: receive part numbers and send outcomes until the driver closes the pipe.

    ``worker_number`` decides the worker's GPU.
    """
    # Ctrl-C reaches all processes in the terminal. A worker ignores Ctrl-C, because the driver ends
    # the worker. Until here, Ctrl-C was blocked (``ctrl_c_blocked``).
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # sys.exit runs the ``finally`` blocks, and these blocks remove temporary files
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=end_with_driver, daemon=True).start()
    take_gpu(worker_number)
    try:
        pipe.send_bytes(READY_MESSAGE)
        worker = Worker(pipe.recv_bytes())
        while True:
            part_number = pipe.recv()
            outcome = worker.do_part(part_number)
            pipe.send_bytes(outcome)
    except (EOFError, OSError):
        return


def end_with_driver() -> None:
    """Wait until the driver has ended, and then end this process at once.

    Files are written atomically, so no file is left half-written.
    """
    driver = parent_process()
    if driver is not None:
        connection.wait([driver.sentinel])
        os._exit(1)


# environment variables for the rank and the number of ranks
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_NTASKS")
# environment variables in a Slurm job array: this job's index, number of jobs, smallest index
ARRAY_VARIABLES = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")


@dataclass(frozen=True)
class Rank:
    """The number of this process among several processes."""

    rank: int  # number of this process, from 0
    world: int  # number of processes

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(
                f"the rank must be from 0 to {self.world - 1} in a world of {self.world}. Got "
                f"{self.rank}."
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Rank:
        """Return the rank according to the environment variables.

        ``RANK`` and ``WORLD_SIZE`` (torchrun) have precedence. In Slurm, the rank is
        ``array_index * SLURM_NTASKS + SLURM_PROCID``. Here ``array_index`` is the job's index in
        the job array (0 without an array).
        """
        rank_of_torchrun = _read_rank(environment, *TORCHRUN_VARIABLES)
        rank_in_job = _read_rank(environment, *SLURM_VARIABLES)
        if rank_of_torchrun is not None:
            return rank_of_torchrun
        rank_in_array = _read_array_rank(environment)
        if rank_in_job is None and rank_in_array is None:
            raise UsageError(
                "the rank executor needs to know which process this is: start it with torchrun "
                "(RANK, WORLD_SIZE), with srun (SLURM_PROCID, SLURM_NTASKS) or as a Slurm job "
                "array (SLURM_ARRAY_TASK_ID, _COUNT, _MIN). Found none of these variables."
            )
        only_rank = cls(rank=0, world=1)
        if rank_in_job is None:
            rank_in_job = only_rank
        if rank_in_array is None:
            rank_in_array = only_rank
        return cls(
            rank=rank_in_array.rank * rank_in_job.world + rank_in_job.rank,
            world=rank_in_array.world * rank_in_job.world,
        )


class RankExecutor:
    """An executor that does the parts with ``number % world == rank`` in this process.

    ``number`` is the part's number in the run, not the index among the missing parts.
    Processes may begin at different times, with different parts missing. Still no part is left out.
    """

    name = "rank"

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        own_rank = Rank.from_environment(environment)
        self.rank = own_rank.rank
        self.world = own_rank.world
        # variables with this process's number on the machine: from torchrun, or else from Slurm
        for name in ("LOCAL_RANK", "SLURM_LOCALID"):
            if name in environment:
                gpu_number = _parse_number(name, environment[name])
                take_gpu(gpu_number)
                break

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """Yield the receipts for this rank's parts."""
        for part in parts:
            if part % self.world == self.rank:
                yield job.process(part)


def _read_rank(environment: Mapping[str, str], rank_name: str, world_name: str) -> Rank | None:
    """Return the rank according to two environment variables, or None if both are unset."""
    set_names = [name for name in (rank_name, world_name) if name in environment]
    if not set_names:
        return None
    if len(set_names) == 1:
        raise UsageError(
            f"{rank_name} and {world_name} must be set together. Found {set_names[0]} alone."
        )
    rank = _parse_number(rank_name, environment[rank_name])
    world = _parse_number(world_name, environment[world_name])
    return Rank(rank, world)


def _read_array_rank(environment: Mapping[str, str]) -> Rank | None:
    """Return this job's rank in the Slurm job array, or None without an array."""
    missing_names = sorted(set(ARRAY_VARIABLES) - environment.keys())
    if len(missing_names) == len(ARRAY_VARIABLES):
        return None
    if missing_names:
        raise UsageError(
            f"{', '.join(ARRAY_VARIABLES)} must be set together. Missing: "
            f"{', '.join(missing_names)}."
        )
    array_index, n_jobs, min_index = (
        _parse_number(name, environment[name]) for name in ARRAY_VARIABLES
    )
    step_text = environment.get("SLURM_ARRAY_TASK_STEP", "1")
    step = _parse_number("SLURM_ARRAY_TASK_STEP", step_text)
    # indices may begin above 0 and have steps: for indices 2, 4, 6 the ranks are 0, 1, 2
    offset = array_index - min_index
    if step < 1 or offset % step != 0:
        raise UsageError(
            f"array task {array_index} is not in steps of {step} from {min_index}. Give the array "
            "as 0-N."
        )
    try:
        return Rank(rank=offset // step, world=n_jobs)
    except UsageError as error:
        raise UsageError(
            f"array task {array_index} is not among {n_jobs} from {min_index} on. Give the array "
            "as 0-N."
        ) from error


def _parse_number(name: str, text: str) -> int:
    """Parse ``text``, the value of the environment variable ``name``, as a whole number from 0."""
    if not text.isdecimal():
        raise UsageError(f"{name} must be a whole number from 0. Got {text!r} instead.")
    return int(text)
