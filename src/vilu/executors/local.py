"""Processes of this machine, one pipe each."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from vilu.errors import StorageError
from vilu.executors.base import Worker, check_processes, cores, pack_job, receipt_of, take_gpu, threads_per_process
from vilu.store.job import EmbedJob
from vilu.store.manifest import Receipt

MAX_DEATHS = 5
"""Of processes over one part; a job sets a crashing part aside before that."""

READY = b""
"""What a worker says when it is up, and what the driver hears from a dead one: nothing to hand on."""

GRACE = 5.0
"""Seconds that a worker has to die when told to."""

logger = logging.getLogger(__name__)


class LocalExecutor:
    """N processes, begun afresh ("spawn", so no thread or lock is lost in a fork), each with a pipe of its own.

    Only part numbers and receipts travel. No lock is shared, so killing a worker harms nothing but the part under way,
    which another process does again. When the driver dies, however it dies, its workers end at once.

    Args:
        processes: Number of workers; by default one per core.

    Raises:
        UsageError: If there is none.
    """

    name = "local"

    def __init__(self, processes: int | None = None) -> None:
        self.processes = check_processes(processes) or cores()

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """The receipts, as parts are done.

        Raises:
            StorageError: If the workers of one part died five times.
            Exception: What a part raised; the other workers are stopped.
        """
        pool = _Pool(job, parts, self.processes)
        try:
            yield from pool.receipts()
        finally:
            pool.stop()


class _Process:
    """A process, our end of its pipe, and what it does.

    Attributes:
        number: From 0, unique among those alive.
        part: The part under way.
        ready: Whether it has asked for work.
    """

    def __init__(self, number: int) -> None:
        context = get_context("spawn")
        self.number = number
        self.part: int | None = None
        self.ready = False
        self.pipe, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_serve, args=(theirs, number), daemon=True)
        try:
            self.process.start()
        finally:
            theirs.close()  # so that its death is the end of the pipe

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

    def __init__(self, job: EmbedJob, parts: Sequence[int], processes: int) -> None:
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
            for pipe in connection.wait([worker.pipe for worker in self.workers.values()]):
                worker = self.workers.get(pipe)
                packed = READY if worker is None else self._hear(worker)
                if packed != READY:
                    self._assign()  # before the driver does something with the receipt
                    yield receipt_of(packed)

    def stop(self) -> None:
        """End all workers; those in the middle of a part may still remove their temporary files."""
        for worker in self.workers.values():
            (worker.process.kill if worker.part is None else worker.process.terminate)()
        for worker in self.workers.values():
            worker.exit_code()
        self.workers.clear()

    def _busy(self) -> int:
        return sum(worker.part is not None for worker in self.workers.values())

    def _hire(self) -> None:
        """Keep as many workers as there is work for."""
        missing = min(self.size, self._busy() + len(self.waiting)) - len(self.workers)
        taken = {worker.number for worker in self.workers.values()}
        free = [number for number in range(self.size) if number not in taken]
        for number in free[: max(0, missing)]:
            worker = _Process(number)
            self.workers[worker.pipe] = worker

    def _assign(self) -> None:
        """Give parts to those who have none."""
        for worker in [worker for worker in self.workers.values() if worker.ready and worker.part is None]:
            if not self.waiting:
                return
            worker.part = self.waiting.popleft()
            try:
                worker.pipe.send(worker.part)
            except OSError:
                self._bury(worker)

    def _hear(self, worker: _Process) -> bytes:
        """What a worker says; nothing but ``READY`` if it died."""
        try:
            packed = worker.pipe.recv_bytes()
            if packed == READY:
                worker.pipe.send_bytes(self.payload)
                worker.ready = True
        except (EOFError, OSError):
            self._bury(worker)
            return READY
        if packed != READY:
            worker.part = None
        return packed

    def _bury(self, worker: _Process) -> None:
        del self.workers[worker.pipe]
        part, code = worker.part, worker.exit_code()
        self.deaths[part] += 1
        if part is not None:
            self.waiting.appendleft(part)
        what = "before its first part" if part is None else f"in part {part}"
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        logger.warning("worker %d ended %s with %s; another one goes on", worker.number, what, how)
        if self.deaths[part] >= MAX_DEATHS:
            hint = (
                "A script that embeds in processes needs its work under `if __name__ == '__main__':`."
                if part is None
                else "Finished parts are kept. If memory ran out, take fewer processes or a smaller batch size."
            )
            raise StorageError(f"workers ended {MAX_DEATHS} times {what}, last with {how}. {hint}")


def _serve(pipe: Connection, number: int) -> None:
    """A worker: parts from the pipe, outcomes into it, until the driver closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the driver says what becomes of us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # temporary files are removed on the way out
    threading.Thread(target=_end_with_driver, daemon=True).start()
    take_gpu(number)
    try:
        pipe.send_bytes(READY)
        worker = Worker(pipe.recv_bytes())
        while True:
            pipe.send_bytes(worker.outcome(pipe.recv()))
    except (EOFError, OSError):
        return


def _end_with_driver() -> None:
    """End at once when the driver is gone; files appear whole or not at all, so no part is left half-written."""
    driver = parent_process()
    if driver is not None:
        connection.wait([driver.sentinel])
        os._exit(1)
