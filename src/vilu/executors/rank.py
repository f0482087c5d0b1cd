"""One of several processes that somebody else started: torchrun, or tasks of a Slurm job or job array."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vilu.errors import UsageError
from vilu.executors.base import take_gpu
from vilu.store.job import EmbedJob
from vilu.store.manifest import Receipt

PAIRS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")


@dataclass(frozen=True)
class Rank:
    """The place of this process among ``world`` of them, counted from 0."""

    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(
                f"the rank must be from 0 to {self.world - 1} in a world of {self.world}. Got {self.rank}."
            )

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Rank:
        """The rank that the environment tells.

        ``RANK`` of ``WORLD_SIZE`` (torchrun) goes first. In Slurm, task ``SLURM_PROCID`` of ``SLURM_NTASKS`` in each
        of the jobs of an array has the rank (number of its job) * ntasks + procid.

        Raises:
            UsageError: If nothing is said, or it contradicts itself.
        """
        torchrun, task = (_pair(environment, *names) for names in PAIRS)
        if torchrun is not None:
            return torchrun
        array = _array(environment)
        if task is None and array is None:
            raise UsageError(
                "the rank executor needs to know which process this is: start it with torchrun (RANK, WORLD_SIZE), "
                "with srun (SLURM_PROCID, SLURM_NTASKS) or as a Slurm job array (SLURM_ARRAY_TASK_ID, _COUNT, _MIN). "
                "Found none of these variables."
            )
        task, array = task or cls(0, 1), array or cls(0, 1)
        return cls(array.rank * task.world + task.rank, array.world * task.world)


class RankExecutor:
    """Does the parts of this process's rank, here: those whose number leaves the remainder ``rank`` by ``world``.

    Processes that see different parts missing, because one began later, so still never leave a gap between them.

    Args:
        environment: Variables; by default the process's.

    Raises:
        UsageError: If they do not tell the rank.
    """

    name = "rank"

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.rank = Rank.of(environment)
        local = environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID"))
        if local is not None:
            take_gpu(_number("LOCAL_RANK", local))

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """The receipts of our parts.

        Raises:
            Exception: What a part raised.
        """
        for part in parts:
            if part % self.rank.world == self.rank.rank:
                yield job.process(part)


def _pair(environment: Mapping[str, str], rank: str, world: str) -> Rank | None:
    found = [name for name in (rank, world) if name in environment]
    if not found:
        return None
    if len(found) == 1:
        raise UsageError(f"{rank} and {world} must be set together. Found {found[0]} alone.")
    return Rank(_number(rank, environment[rank]), _number(world, environment[world]))


def _array(environment: Mapping[str, str]) -> Rank | None:
    found = [name for name in ARRAY if name in environment]
    if not found:
        return None
    if len(found) < len(ARRAY):
        missing = sorted(set(ARRAY) - set(found))
        raise UsageError(f"{', '.join(ARRAY)} must be set together. Missing: {', '.join(missing)}.")
    number, count, least = (_number(name, environment[name]) for name in ARRAY)
    step = _number("SLURM_ARRAY_TASK_STEP", environment.get("SLURM_ARRAY_TASK_STEP", "1"))
    if step < 1 or (number - least) % step:
        raise UsageError(f"array task {number} is not in steps of {step} from {least}. Give the array as 0-N.")
    try:
        return Rank((number - least) // step, count)
    except UsageError as error:
        raise UsageError(f"array task {number} is not among {count} from {least} on. Give the array as 0-N.") from error


def _number(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{name} must be a whole number from 0. Got {text!r} instead.")
    return int(text)
