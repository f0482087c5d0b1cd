"""What all executors share: the contract, a worker's side of it, and how what a part raises gets to the driver."""

from __future__ import annotations

import os
import pickle
import traceback
from dataclasses import replace

import torch

from vilu.errors import UsageError, ViLUError
from vilu.store.job import EmbedJob
from vilu.store.manifest import Receipt


class Worker:
    """The job in a worker process; it is unpickled at the first part, and the model loaded once.

    Args:
        payload: The pickled job.
    """

    def __init__(self, payload: bytes) -> None:
        self._payload = payload
        self._job: EmbedJob | None = None

    def outcome(self, part: int) -> bytes:
        """Do a part; its receipt or what it raised, pickled, so that errors keep their type on the way."""
        try:
            if self._job is None:
                self._job = pickle.loads(self._payload)  # noqa: S301 - from our own driver
                self._payload = b""
            return pickle.dumps(self._job.process(part))
        # not swallowed: this is the end of a worker, and whatever it is travels as bytes to the driver, which raises it
        except Exception as error:  # noqa: BLE001
            return _pack(error)


def receipt_of(packed: bytes) -> Receipt:
    """The receipt in an outcome.

    Raises:
        Exception: What the part raised.
    """
    found = pickle.loads(packed)  # noqa: S301 - from our own worker
    if isinstance(found, Exception):
        raise found
    if not isinstance(found, Receipt):
        raise TypeError(f"a part must end with a receipt. Got {found!r:.200} instead.")
    return found


def pack_job(job: EmbedJob, threads: int) -> bytes:
    """The job, pickled, with this share of threads for tensors and for decoding where it does not say itself.

    Raises:
        UsageError: If it cannot be pickled.
    """
    shared = replace(job, threads=job.threads or threads, workers=job.workers or threads)
    try:
        return pickle.dumps(shared)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UsageError(
            f"this job cannot go to other processes: {error}. Give the model by name (BackboneSpec), and a data set "
            "that can be pickled."
        ) from error


def _pack(error: Exception) -> bytes:
    """An exception for the driver; one of our own as it is, any other with its traceback, which does not travel."""
    if not isinstance(error, ViLUError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)  # noqa: S301 - our own bytes; classes with other arguments than a message fail here
    # pickling runs the __reduce__ and __init__ of a foreign class, which may raise anything; what the part itself
    # raised is what counts, and still reaches the driver, as text
    except Exception:  # noqa: BLE001
        packed = pickle.dumps(RuntimeError("".join(traceback.format_exception(error))))
    return packed


def check_processes(processes: int | None) -> int | None:
    """The number of processes, or None for the executor's own choice.

    Raises:
        UsageError: If it is below 1.
    """
    if processes is not None and processes < 1:
        raise UsageError(f"processes must be at least 1. Got {processes} instead.")
    return processes


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_process(processes: int) -> int:
    """Equal shares of the cores, at least one each."""
    return max(1, cores() // processes)


def take_gpu(number: int) -> None:
    """Make "cuda" mean the GPU that is the turn of the process of this number on its machine, where there are any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
