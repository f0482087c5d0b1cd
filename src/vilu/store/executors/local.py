"""Parts done on this machine: what an executor is, processes, and ranks."""

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
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from vilu.errors import StorageError, UsageError, ViLUError
from vilu.process import keep_freed_memory
from vilu.registry import load_plugin, plugins
from vilu.store.job import EmbedJob
from vilu.store.manifest import Receipt
from vilu.store.mapped import cores
from vilu.validation import require_at_least


class Worker:
    """The job in a worker process; it is unpickled at the first part, and the model loaded once.

    The process works for the job alone, so the worker sets its plugins, threads and memory.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._job: EmbedJob | None = None

    def outcome(self, part: int) -> bytes:
        """Do a part; its receipt or its exception, pickled, so that errors keep their type."""
        try:
            if self._job is None:
                self._job = self._begin()
            return pickle.dumps(self._job.process(part))
        # not swallowed: this is the end of a worker, and whatever it is travels as bytes to the
        # driver, which raises it
        except Exception as error:  # noqa: BLE001
            return _pack(error)

    def _begin(self) -> EmbedJob:
        order: Order = pickle.loads(self._payload)  # noqa: S301 - from our own driver
        for module in order.plugins:
            load_plugin(module)
        torch.set_num_threads(order.threads)
        keep_freed_memory()
        self._payload = b""
        return order.job


@dataclass(frozen=True)
class Order:
    """What a driver sends to a worker."""

    plugins: Sequence[str]
    threads: int
    job: EmbedJob


def receipt_of(packed: bytes) -> Receipt:
    """The receipt in an outcome."""
    outcome = pickle.loads(packed)  # noqa: S301 - from our own worker
    if isinstance(outcome, Exception):
        raise outcome
    if not isinstance(outcome, Receipt):
        raise TypeError(f"a part must end with a receipt. Got {outcome!r:.200} instead.")
    return outcome


def pack_job(job: EmbedJob, threads: int) -> bytes:
    """The job for a worker, pickled, with so many threads for tensors.

    There are as many for decoding, unless the job says itself.
    """
    shared = replace(job, workers=job.workers or threads)
    try:
        return pickle.dumps(Order(plugins(), threads, shared))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UsageError(
            f"this job cannot go to other processes: {error}. Give the model by name "
            "(BackboneSpec), and a data set that can be pickled."
        ) from error


def _pack(error: Exception) -> bytes:
    """An exception for the driver; of a foreign one the traceback, which does not travel, too."""
    if not isinstance(error, ViLUError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        packed = pickle.dumps(error)
        # read back: classes with other arguments than a message fail only here
        pickle.loads(packed)  # noqa: S301 - our own bytes
    # pickling runs the __reduce__ and __init__ of a foreign class, which may raise anything; what
    # the part itself raised is what counts, and still reaches the driver, as text
    except Exception:  # noqa: BLE001
        text = "".join(traceback.format_exception(error))
        return pickle.dumps(RuntimeError(text))
    return packed


def check_processes(processes: int | None) -> int | None:
    """The number of processes, or None for the executor's own choice."""
    if processes is not None:
        require_at_least("processes", processes, 1)
    return processes


def threads_per_process(processes: int) -> int:
    """Equal shares of the cores, at least one each."""
    return max(1, cores() // processes)


def take_gpu(number: int) -> None:
    """Make "cuda" mean the GPU of the process of this number on its machine, if there are any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


MAX_DEATHS = 5  # of processes over one part; a job sets a crashing part aside before that
# what a worker says when it is up, and what the driver hears from a dead one: nothing to hand on
READY = b""
GRACE = 5.0  # seconds that a worker has to die when told to

logger = logging.getLogger(__name__)


class LocalExecutor:
    """N processes, each with a pipe of its own.

    They are begun afresh ("spawn"), so no thread or lock is lost in a fork. Only part numbers and
    receipts travel. No lock is shared, so killing a worker harms nothing but the part under way,
    which another process does again. When the driver dies, however it dies, its workers end at
    once.
    """

    name = "local"

    def __init__(self, processes: int | None = None, max_deaths: int = MAX_DEATHS) -> None:
        self.processes = check_processes(processes) or cores()
        self.max_deaths = max_deaths

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """The receipts, as parts are done."""
        pool = _Pool(job, parts, self.processes, self.max_deaths)
        try:
            yield from pool.receipts()
        finally:
            pool.stop()


class _Process:
    """A process, our end of its pipe, and what it does."""

    def __init__(self, number: int) -> None:
        context = get_context("spawn")
        self.number = number
        self.part: int | None = None
        self.ready = False
        self.pipe, far_end = context.Pipe()
        self.process: SpawnProcess = context.Process(
            target=_serve, args=(far_end, number), daemon=True
        )
        try:
            self.process.start()
        finally:
            # Were it open here too, the death of the worker would not be the end of the pipe, and
            # nobody would hear of it.
            far_end.close()

    def exit_code(self) -> int | None:
        """How it ended; made to end if it does not by itself."""
        self.pipe.close()
        self.process.join(GRACE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode


class _Pool:
    """The state of one ``run``: parts that wait, workers, and deaths so far."""

    def __init__(
        self, job: EmbedJob, parts: Sequence[int], processes: int, max_deaths: int
    ) -> None:
        self.max_deaths = max_deaths
        self.payload = pack_job(job, threads_per_process(processes))
        self.waiting = deque(parts)
        self.size = min(processes, len(parts))
        self.workers: dict[object, _Process] = {}
        self.deaths: Counter[int | None] = Counter()

    def receipts(self) -> Iterator[Receipt]:
        """Receipts as they come in."""
        while self.waiting or self._busy():
            self._hire()
            self._assign()
            pipes = [worker.pipe for worker in self.workers.values()]
            for pipe in connection.wait(pipes):
                worker = self.workers.get(pipe)
                if worker is None:  # buried in the meantime
                    continue
                packed = self._hear(worker)
                if packed != READY:
                    # before the driver does something with the receipt, which may take a while
                    self._assign()
                    yield receipt_of(packed)

    def stop(self) -> None:
        """End all workers; those in the middle of a part may still remove their temporary files."""
        for worker in self.workers.values():
            if worker.part is None:
                worker.process.kill()
            else:
                worker.process.terminate()
        for worker in self.workers.values():
            worker.exit_code()
        self.workers.clear()

    def _busy(self) -> int:
        return sum(worker.part is not None for worker in self.workers.values())

    def _hire(self) -> None:
        """Keep as many workers as there is work for."""
        wanted = min(self.size, self._busy() + len(self.waiting))
        missing = max(0, wanted - len(self.workers))
        taken = {worker.number for worker in self.workers.values()}
        # a new worker takes the number of a dead one, and with it the dead one's GPU
        free = sorted(set(range(self.size)) - taken)
        for number in free[:missing]:
            worker = _Process(number)
            self.workers[worker.pipe] = worker

    def _assign(self) -> None:
        """Give parts to those who have none."""
        # a list of its own: burying one takes it out of the workers
        for worker in list(self.workers.values()):
            if not worker.ready or worker.part is not None:
                continue
            if not self.waiting:
                return
            worker.part = self.waiting.popleft()
            try:
                worker.pipe.send(worker.part)
            except OSError:
                self._bury(worker)

    def _hear(self, worker: _Process) -> bytes:
        """The outcome that a worker sends; nothing but ``READY`` if it is up, or died."""
        try:
            packed = worker.pipe.recv_bytes()
            if packed == READY:
                # the job travels once, and only to a worker that is there to read it
                worker.pipe.send_bytes(self.payload)
                worker.ready = True
        except (EOFError, OSError):
            self._bury(worker)
            return READY
        if packed != READY:
            worker.part = None
        return packed

    def _bury(self, worker: _Process) -> None:
        """Take a dead worker out and put its part back, unless that part has killed too many."""
        del self.workers[worker.pipe]
        part = worker.part
        self.deaths[part] += 1
        if part is not None:
            self.waiting.appendleft(part)
        where = "before its first part" if part is None else f"in part {part}"
        how = _ending(worker.exit_code())
        logger.warning("worker %d ended %s with %s; another one goes on", worker.number, where, how)
        if self.deaths[part] < self.max_deaths:
            return
        if part is None:
            hint = (
                "A script that embeds in processes needs its work under "
                "`if __name__ == '__main__':`."
            )
        else:
            hint = (
                "Finished parts are kept. If memory ran out, take fewer processes or a smaller "
                "batch size."
            )
        raise StorageError(
            f"workers ended {self.max_deaths} times {where}, last with {how}. {hint}"
        )


def _ending(code: int | None) -> str:
    """How a process ended, from its exit code, which is negative after a signal."""
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(pipe: Connection, number: int) -> None:
    """A worker: parts from the pipe, outcomes into it, until the driver closes it."""
    # Ctrl-C goes to the whole group; the driver says what becomes of us
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # temporary files are removed on the way out
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=end_with_driver, daemon=True).start()
    take_gpu(number)
    try:
        pipe.send_bytes(READY)
        worker = Worker(pipe.recv_bytes())
        while True:
            pipe.send_bytes(worker.outcome(pipe.recv()))
    except (EOFError, OSError):
        return


def end_with_driver() -> None:
    """End at once when the driver is gone, without a word.

    Files appear whole or not at all, so no part is left half-written.
    """
    driver = parent_process()
    if driver is not None:
        connection.wait([driver.sentinel])
        os._exit(1)


TORCHRUN = ("RANK", "WORLD_SIZE")
SLURM_TASK = ("SLURM_PROCID", "SLURM_NTASKS")
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")


@dataclass(frozen=True)
class Rank:
    """The place of this process among ``world`` of them, counted from 0."""

    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(
                f"the rank must be from 0 to {self.world - 1} in a world of {self.world}. Got "
                f"{self.rank}."
            )

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Rank:
        """The rank that the environment tells.

        ``RANK`` of ``WORLD_SIZE`` (torchrun) goes first. In Slurm, task ``SLURM_PROCID`` of
        ``SLURM_NTASKS`` in each of the jobs of an array has the rank (number of its job) * ntasks +
        procid.
        """
        torchrun = _pair(environment, *TORCHRUN)
        task = _pair(environment, *SLURM_TASK)
        if torchrun is not None:
            return torchrun
        array = _array(environment)
        if task is None and array is None:
            raise UsageError(
                "the rank executor needs to know which process this is: start it with torchrun "
                "(RANK, WORLD_SIZE), with srun (SLURM_PROCID, SLURM_NTASKS) or as a Slurm job "
                "array (SLURM_ARRAY_TASK_ID, _COUNT, _MIN). Found none of these variables."
            )
        if task is None:
            task = cls(0, 1)
        if array is None:
            array = cls(0, 1)
        return cls(array.rank * task.world + task.rank, array.world * task.world)


class RankExecutor:
    """Does the parts of this process's rank, here.

    These are the parts whose number leaves the remainder ``rank`` when divided by ``world``.
    Processes that see different parts missing, because one began later, so still never leave a gap
    between them.
    """

    name = "rank"

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.rank = Rank.of(environment)
        local = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID"))
        if local is not None:
            take_gpu(_number("LOCAL_RANK", local))

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """The receipts of our parts."""
        for part in parts:
            if part % self.rank.world == self.rank.rank:
                yield job.process(part)


def _pair(environment: Mapping[str, str], rank: str, world: str) -> Rank | None:
    """The rank in two variables; None where neither is set."""
    present = [name for name in (rank, world) if name in environment]
    if not present:
        return None
    if len(present) == 1:
        raise UsageError(f"{rank} and {world} must be set together. Found {present[0]} alone.")
    return Rank(_number(rank, environment[rank]), _number(world, environment[world]))


def _array(environment: Mapping[str, str]) -> Rank | None:
    """The place of this job in a Slurm job array; None where it is in none."""
    missing = sorted(set(ARRAY) - environment.keys())
    if len(missing) == len(ARRAY):
        return None
    if missing:
        raise UsageError(f"{', '.join(ARRAY)} must be set together. Missing: {', '.join(missing)}.")
    number, count, least = (_number(name, environment[name]) for name in ARRAY)
    step = _number("SLURM_ARRAY_TASK_STEP", environment.get("SLURM_ARRAY_TASK_STEP", "1"))
    if step < 1 or (number - least) % step:
        raise UsageError(
            f"array task {number} is not in steps of {step} from {least}. Give the array as 0-N."
        )
    try:
        return Rank((number - least) // step, count)
    except UsageError as error:
        raise UsageError(
            f"array task {number} is not among {count} from {least} on. Give the array as 0-N."
        ) from error


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{name} must be a whole number from 0. Got {text!r} instead.")
    return int(text)
