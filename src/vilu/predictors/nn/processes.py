"""Training by several processes together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vilu.device import resolve_device
from vilu.errors import UsageError, ViLUError

ActionResult = TypeVar("ActionResult")

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables set by torchrun in its processes."""


class World:
    """The processes that train together, seen from this process.

    In this base class, this process trains alone.
    """

    rank: int = 0  # this process's number
    size: int = 1  # how many processes train together

    @property
    def is_leader(self) -> bool:
        """Whether this is the leading process. The leading process writes files and messages."""
        return self.rank == 0

    def process_slice(self, n_rows: int) -> slice:
        """Return the slice of ``n_rows`` rows that this process works on.

        The slices of all processes together are all rows. The slice lengths differ by at
        most 1, and may be 0. For example, four processes share 10 rows as 2, 3, 2 and 3.
        """
        start = n_rows * self.rank // self.size
        stop = n_rows * (self.rank + 1) // self.size
        return slice(start, stop)

    def wrap_for_averaging(self, network: nn.Module) -> nn.Module:
        """Return the network in a form that averages the gradients over the processes."""
        return network

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor in place by the tensor's sum over the processes."""

    def total(self, n: int) -> int:
        """Compute the sum of ``n`` over the processes."""
        count = torch.tensor(n)
        self.sum_(count)
        return int(count)

    def mean(self, values: Tensor) -> Tensor:
        """Compute the mean over the values (B,) in all processes, without gradient."""
        return values.detach().mean()

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows from all processes. The row counts may differ."""
        return rows

    def broadcast(self, data: bytes) -> bytes:
        """Return the leading process's ``data``, in every process."""
        return data

    def call_on_leader(self, action: Callable[[], ActionResult]) -> ActionResult | None:
        """Call ``action`` on the leading process alone. If ``action`` raises, all processes raise.

        Returns the result of ``action`` on the leading process, and None on all other processes.
        """
        return action()


class Group(World):
    """Several ``torch.distributed`` processes, seen from this process.

    A method returns only after all processes have called it.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device

    def wrap_for_averaging(self, network: nn.Module) -> nn.Module:
        """Wrap a network, so that torch averages the gradients in the backward pass."""
        return DistributedDataParallel(network)

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor in place by the tensor's sum over the processes."""
        dist.all_reduce(tensor)

    def mean(self, values: Tensor) -> Tensor:
        """Compute the mean over the values (B,) in all processes, without gradient."""
        detached_values = values.detach()
        total = detached_values.float().sum()
        count = values.new_tensor(len(values), dtype=torch.float32)
        total_and_count = torch.stack([total, count])
        dist.all_reduce(total_and_count)  # a single call for both sums
        total, count = total_and_count.unbind()
        return total / count

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows from all processes. The row counts may differ."""
        n_rows = torch.tensor(len(rows), device=self.device)
        counts = [torch.zeros_like(n_rows) for _ in range(self.size)]
        dist.all_gather(counts, n_rows)
        # ``all_gather`` needs equally large tensors, so all rows are padded to the largest number
        max_rows = max(int(count) for count in counts)
        padded_rows = rows.new_zeros(max_rows, *rows.shape[1:])
        padded_rows[: len(rows)] = rows
        blocks = [torch.empty_like(padded_rows) for _ in range(self.size)]
        dist.all_gather(blocks, padded_rows)
        rows_of_processes = []
        for block, count in zip(blocks, counts, strict=True):
            rows_of_processes.append(block[: int(count)])  # without the padding
        return torch.cat(rows_of_processes)

    def broadcast(self, data: bytes) -> bytes:
        """Return the leading process's ``data``, in every process."""
        # the byte count is sent first, because the other processes must allocate the memory
        leader = 0
        count = torch.tensor(len(data), device=self.device)
        dist.broadcast(count, src=leader)
        content = torch.empty(int(count), dtype=torch.uint8, device=self.device)
        if self.is_leader and data:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(content, src=leader)
        cpu_content = content.cpu()
        return cpu_content.numpy().tobytes()

    def call_on_leader(self, action: Callable[[], ActionResult]) -> ActionResult | None:
        """Call ``action`` on the leading process alone. If ``action`` raises, all processes raise.

        The other processes wait for a message with the error's kind and text. If there was no
        error, the message is empty.
        """
        if not self.is_leader:
            error_report = self.broadcast(b"")
            if error_report:
                report_text = error_report.decode()
                raise _error_of_leader(report_text)
            return None
        try:
            result = action()
        # Any exception is caught, because the other processes wait for a message in any case. In
        # this process, the exception is raised again.
        except Exception as error:
            self.broadcast(f"{type(error).__name__}\n{error}".encode())
            raise
        self.broadcast(b"")
        return result


def _error_of_leader(error_report: str) -> Exception:
    """Make the error that the other processes raise, from a report on the leading process's error.

    The report's first line is the error's class name. The other lines are the error's message.
    """
    kind, _, message = error_report.partition("\n")
    text = f"the leading process stopped with {kind}: {message}"
    for cls in ViLUError.__subclasses__():
        if cls.__name__ == kind:  # errors of the same kind have the same exit code
            return cls(text)
    return RuntimeError(text)


# All contexts share the default world. Sharing is harmless, because this world has no state.
_world: ContextVar[World] = ContextVar("world", default=World())  # noqa: B039


def current_world() -> World:
    """Return the world of the current ``with world()`` block.

    Outside such a block, the result is this process alone.
    """
    return _world.get()


@contextmanager
def world(
    device: str = "auto", environment: Mapping[str, str] = os.environ, timeout: float = 1800
) -> Iterator[World]:
    """Connect the processes started by torchrun, for the duration of a ``with`` block.

    Without torchrun there is only this process.

    Tensors on the CPU are exchanged by gloo, tensors on a GPU by NCCL. Each process uses the GPU
    with the number LOCAL_RANK.

    Args:
        device: Where heads are trained, as for ``resolve_device``.
        environment: Environment with torchrun's variables.
        timeout: Seconds to wait for a process to answer. Afterwards an error is raised.

    Raises:
        UsageError: If the variables contradict each other, there are fewer GPUs than processes on
            this machine, or the other processes cannot be reached.
    """
    rank, size, local_rank = read_environment(environment)
    resolved_device = resolve_device(device)
    if resolved_device.type == "cuda" and size > 1:
        _select_gpu(local_rank)
    connected_world = World()
    if size > 1:
        connected_world = _connect(rank, size, resolved_device, environment, timeout)
    token = _world.set(connected_world)
    try:
        yield connected_world
    finally:
        _world.reset(token)
        if size > 1:
            dist.destroy_process_group()


def _select_gpu(local_rank: int) -> None:
    """Select the GPU with the number ``local_rank`` as "cuda" in this process."""
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise UsageError(
            f"LOCAL_RANK is {local_rank}, but this machine has {n_gpus} GPUs: one process each. "
            "Start fewer with torchrun --nproc-per-node, or train with device=cpu."
        )
    torch.cuda.set_device(local_rank)


def read_environment(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Read the rank, the process count, and the rank on this machine from torchrun's variables.

    Without torchrun there is a single process: rank 0 of 1, and rank 0 on this machine.
    """
    is_from_torchrun = bool(environment.keys() & {"RANK", "WORLD_SIZE"})
    if not is_from_torchrun:
        return 0, 1, 0
    _require_all_variables(environment)
    rank, size, local_rank = _read_whole_numbers(environment)
    if rank >= size or local_rank > rank:
        raise UsageError(
            f"RANK={rank} must be below WORLD_SIZE={size}, "
            f"and LOCAL_RANK={local_rank} not above RANK."
        )
    return rank, size, local_rank


def _require_all_variables(environment: Mapping[str, str]) -> None:
    """Refuse an environment with only some of torchrun's variables."""
    missing_names = [name for name in TORCHRUN_VARIABLES if not environment.get(name)]
    if not missing_names:
        return
    present_names = [name for name in TORCHRUN_VARIABLES if environment.get(name)]
    missing = ", ".join(missing_names)
    present = ", ".join(present_names)
    raise UsageError(
        f"{missing} not set, but {present} set: "
        "start all processes with torchrun, which sets them all, or unset RANK and WORLD_SIZE."
    )


def _read_whole_numbers(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Read RANK, WORLD_SIZE and LOCAL_RANK as integers.

    If one of these variables or MASTER_PORT is no whole number, UsageError is raised.
    """
    wrong_settings = []
    for name in TORCHRUN_VARIABLES:
        value = environment[name]
        is_whole = value.isascii() and value.isdigit()
        if name != "MASTER_ADDR" and not is_whole:
            wrong_settings.append(f"{name}={value!r}")
    if wrong_settings:
        joined_settings = ", ".join(wrong_settings)
        raise UsageError(f"{joined_settings} must be whole numbers, as torchrun sets them.")
    rank = int(environment["RANK"])
    size = int(environment["WORLD_SIZE"])
    local_rank = int(environment["LOCAL_RANK"])
    return rank, size, local_rank


def _connect(
    rank: int, size: int, device: torch.device, environment: Mapping[str, str], timeout: float
) -> Group:
    """Connect this process with the other processes. Waits until all call this function."""
    address = _meeting_address(environment)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            f"tcp://{address}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=timeout),
        )
    except (dist.DistError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"process {rank} of {size} cannot join the others at {address}: {error}. "
            "Start all of them with the same torchrun command."
        ) from error
    cpu = torch.device("cpu")  # counts and messages are exchanged on the CPU
    return Group(rank, size, device=cpu)


def _meeting_address(environment: Mapping[str, str]) -> str:
    """Return the leading process's host and port, as HOST:PORT."""
    host = environment["MASTER_ADDR"]
    port = environment["MASTER_PORT"]
    if ":" in host:  # an IPv6 address needs brackets before a port
        return f"[{host}]:{port}"
    return f"{host}:{port}"
