"""Training shared by several processes."""

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

Result = TypeVar("Result")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes."""


class World:
    """One process, which is all there are: its number, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and talks to people."""
        return self.rank == 0

    def mine(self, n_rows: int) -> slice:
        """This process's contiguous share of ``n_rows``.

        Shares differ by one row at most, and may be empty.
        """
        start = n_rows * self.rank // self.size
        stop = n_rows * (self.rank + 1) // self.size
        return slice(start, stop)

    def shared(self, network: nn.Module) -> nn.Module:
        """The network for steps that all processes take together: gradients are their mean."""
        return network

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes."""

    def total(self, n: int) -> int:
        """Sum of a count over the processes."""
        count = torch.tensor(n)
        self.sum_(count)
        return int(count)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the values (B,) of all processes, without gradient."""
        return values.detach().mean()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order; numbers of rows may differ."""
        return rows

    def broadcast(self, data: bytes) -> bytes:
        """The bytes of the process that leads."""
        return data

    def call_on_leader(self, act: Callable[[], Result]) -> Result | None:
        """Call ``act`` on the leading process alone; if it raises, every process raises.

        Returns what ``act`` returns on the leading process, and None on the others.
        """
        return act()


class Group(World):
    """One of several processes of ``torch.distributed``; every call must be made by all of them."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device

    def shared(self, network: nn.Module) -> nn.Module:
        """Torch averages the gradients when they are there."""
        return DistributedDataParallel(network)

    def sum_(self, tensor: Tensor) -> None:
        """By one trip."""
        dist.all_reduce(tensor)

    def mean(self, values: Tensor) -> Tensor:
        """The sum over all processes, divided by their number of values."""
        total = values.detach().float().sum()
        count = values.new_tensor(len(values), dtype=torch.float32)
        sums = torch.stack([total, count])  # both travel in one trip
        dist.all_reduce(sums)
        return sums[0] / sums[1]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows travel padded to one length, since a process must know what size arrives."""
        n_rows = torch.tensor(len(rows), device=self.device)
        counts = [torch.zeros_like(n_rows) for _ in range(self.size)]
        dist.all_gather(counts, n_rows)
        longest = max(int(count) for count in counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        blocks = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(blocks, padded)
        shares = []
        for block, count in zip(blocks, counts, strict=True):
            shares.append(block[: int(count)])
        return torch.cat(shares)

    def broadcast(self, data: bytes) -> bytes:
        """The number of bytes travels first, since the receivers do not know it."""
        count = torch.tensor(len(data), device=self.device)
        dist.broadcast(count, 0)
        content = torch.empty(int(count), dtype=torch.uint8, device=self.device)
        if self.leads and data:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(content, 0)
        return content.cpu().numpy().tobytes()

    def call_on_leader(self, act: Callable[[], Result]) -> Result | None:
        """The others wait for the kind and the message of the error; both are empty without one."""
        if not self.leads:
            failure = self.broadcast(b"")
            if failure:
                raise _error_of_leader(failure.decode())
            return None
        try:
            result = act()
        except Exception as error:
            self.broadcast(f"{type(error).__name__}\n{error}".encode())
            raise
        self.broadcast(b"")
        return result


def _error_of_leader(failure: str) -> Exception:
    """The error of the leading process for another process, from its kind and its message."""
    kind, _, message = failure.partition("\n")
    text = f"the leading process stopped with {kind}: {message}"
    for cls in ViLUError.__subclasses__():
        if cls.__name__ == kind:  # so that all processes end with the same exit code
            return cls(text)
    return RuntimeError(text)


# the default is shared by all contexts, which does no harm: it has no state
_world: ContextVar[World] = ContextVar("world", default=World())  # noqa: B039


def current_world() -> World:
    """The processes that train together; outside a ``with world()`` block there is one."""
    return _world.get()


@contextmanager
def world(
    device: str = "auto", environment: Mapping[str, str] = os.environ, timeout: float = 1800
) -> Iterator[World]:
    """Join the processes that torchrun started, for the length of a ``with`` block.

    Without torchrun there is one process.

    Tensors on the CPU travel by gloo, tensors on a GPU by NCCL; each process takes the GPU of its
    LOCAL_RANK.

    Args:
        device: Where heads are trained, as for ``resolve_device``.
        environment: Where torchrun's variables are.
        timeout: Seconds after which a process that does not answer is an error.

    Raises:
        UsageError: If the variables contradict each other, there are fewer GPUs than processes on
            this machine, or the other processes cannot be reached.
    """
    rank, size, local = read_environment(environment)
    chosen = resolve_device(device)
    if chosen.type == "cuda" and size > 1:
        _take_gpu(local)
    joined = World()
    if size > 1:
        joined = _join(rank, size, chosen, environment, timeout)
    token = _world.set(joined)
    try:
        yield joined
    finally:
        _world.reset(token)
        if size > 1:
            dist.destroy_process_group()


def _take_gpu(local: int) -> None:
    """Let "cuda" be the GPU of this process from now on."""
    n_gpus = torch.cuda.device_count()
    if local >= n_gpus:
        raise UsageError(
            f"LOCAL_RANK is {local}, but this machine has {n_gpus} GPUs: one process each. "
            "Start fewer with torchrun --nproc-per-node, or train with device=cpu."
        )
    torch.cuda.set_device(local)


def read_environment(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine), from torchrun's variables.

    Without these it is (0, 1, 0).
    """
    if not environment.keys() & {"RANK", "WORLD_SIZE"}:
        return 0, 1, 0
    _require_all(environment)
    rank, size, local = _whole_numbers(environment)
    if rank >= size or local > rank:
        raise UsageError(
            f"RANK={rank} must be below WORLD_SIZE={size}, and LOCAL_RANK={local} not above RANK."
        )
    return rank, size, local


def _require_all(environment: Mapping[str, str]) -> None:
    """Refuse an environment in which only some of torchrun's variables are set."""
    missing = [name for name in VARIABLES if not environment.get(name)]
    if not missing:
        return
    present = [name for name in VARIABLES if environment.get(name)]
    raise UsageError(
        f"{', '.join(missing)} not set, but {', '.join(present)} set: "
        "start all processes with torchrun, which sets them all, or unset RANK and WORLD_SIZE."
    )


def _whole_numbers(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK; they and the port must be whole numbers."""
    wrong = []
    for name in VARIABLES:
        value = environment[name]
        is_whole = value.isascii() and value.isdigit()
        if name != "MASTER_ADDR" and not is_whole:
            wrong.append(f"{name}={value!r}")
    if wrong:
        raise UsageError(f"{', '.join(wrong)} must be whole numbers, as torchrun sets them.")
    rank = int(environment["RANK"])
    size = int(environment["WORLD_SIZE"])
    local = int(environment["LOCAL_RANK"])
    return rank, size, local


def _join(
    rank: int, size: int, device: torch.device, environment: Mapping[str, str], timeout: float
) -> Group:
    """Meet the other processes; all of them wait here until the last one has come."""
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
    return Group(rank, size, torch.device("cpu"))


def _meeting_address(environment: Mapping[str, str]) -> str:
    """Host and port of the leading process."""
    host = environment["MASTER_ADDR"]
    port = environment["MASTER_PORT"]
    if ":" in host:  # an IPv6 address stands in brackets before its port
        return f"[{host}]:{port}"
    return f"{host}:{port}"
