"""Training shared by several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from vilu.device import resolve_device
from vilu.errors import UsageError

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
        """This process's contiguous share of ``n_rows``; shares differ by one row at most and may be empty."""
        return slice(n_rows * self.rank // self.size, n_rows * (self.rank + 1) // self.size)

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the processes; all are of one type and on one device."""

    def total(self, n: int) -> int:
        """Sum of a count over the processes."""
        count = torch.tensor(n)
        self.sum_([count])
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


class Group(World):
    """One of several processes of ``torch.distributed``; every call must be made by all of them."""

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.device = rank, size, device

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """One sum of all of them in a row: many small ones would cost a trip each."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(
            tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))

    def mean(self, values: Tensor) -> Tensor:
        """Sum over all processes, over their number of values."""
        sums = torch.stack(
            [values.detach().float().sum(), values.new_tensor(len(values), dtype=torch.float32)]
        )
        dist.all_reduce(sums)
        return sums[0] / sums[1]

    def gather(self, rows: Tensor) -> Tensor:
        """Padded to one length on the way."""
        counts = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor(len(rows), device=self.device))
        longest = max(int(count) for count in counts)
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])

    def broadcast(self, data: bytes) -> bytes:
        """First their number, then the bytes."""
        count = torch.tensor(len(data), device=self.device)
        dist.broadcast(count, 0)
        content = torch.empty(int(count), dtype=torch.uint8, device=self.device)
        if self.leads and data:
            content.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(content, 0)
        return content.cpu().numpy().tobytes()


_world: ContextVar[World] = ContextVar("world", default=World())  # noqa: B039 - it has no state


def current_world() -> World:
    """The processes that the running code is one of; one, outside a ``with world()`` block."""
    return _world.get()


@contextmanager
def world(
    device: str = "auto", environment: Mapping[str, str] = os.environ, timeout: float = 1800
) -> Iterator[World]:
    """Join the processes that torchrun started, for the length of a ``with`` block; without torchrun there is one.

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
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"LOCAL_RANK is {local}, but this machine has {torch.cuda.device_count()} GPUs: one process each. "
                "Start fewer with torchrun --nproc-per-node, or train with device=cpu."
            )
        torch.cuda.set_device(local)  # "cuda" is this one from now on
    joined = World() if size == 1 else _join(rank, size, chosen, environment, timeout)
    token = _world.set(joined)
    try:
        yield joined
    finally:
        _world.reset(token)
        if size > 1:
            dist.destroy_process_group()


def read_environment(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) from torchrun's variables; (0, 1, 0) where there are none."""
    if not environment.keys() & {"RANK", "WORLD_SIZE"}:
        return 0, 1, 0
    if missing := [name for name in VARIABLES if not environment.get(name)]:
        raise UsageError(
            f"{', '.join(missing)} not set, but {', '.join(name for name in VARIABLES if environment.get(name))} set: "
            "start all processes with torchrun, which sets them all, or unset RANK and WORLD_SIZE."
        )
    values = {name: environment[name] for name in VARIABLES if name != "MASTER_ADDR"}
    wrong = [
        f"{name}={value!r}"
        for name, value in values.items()
        if not (value.isascii() and value.isdigit())
    ]
    if wrong:
        raise UsageError(f"{', '.join(wrong)} must be whole numbers, as torchrun sets them.")
    rank, size, local = (int(values[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if rank >= size or local > rank:
        raise UsageError(
            f"RANK={rank} must be below WORLD_SIZE={size}, and LOCAL_RANK={local} not above RANK."
        )
    return rank, size, local


def _join(
    rank: int, size: int, device: torch.device, environment: Mapping[str, str], timeout: float
) -> Group:
    host, port = environment["MASTER_ADDR"], environment["MASTER_PORT"]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
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
