"""The processes of a run: which of them this one is, and the few things that they say to each other.

Decides: what a launcher's environment means (torchrun and `accelerate launch` set the same variables), how work is
dealt out (item i to rank i modulo their number), that gradients are added in one flat all-reduce of their dtype, and
how a rank that is gone looks to the others (`RankLost`). One process is the same program without a process group.
Does not know: policies, stages, files.

Words between ranks go through gloo, on GPUs too, so that a closed connection is noticed at once; gradients and weights
through nccl where they lie on GPUs.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LONGEST_WAIT = timedelta(hours=1)
"""A rank whose completions are long keeps the others waiting; a dead one is noticed by its connections, not by this."""
IGNORED_BY_US = {
    "ACCELERATE_USE_FSDP": ("false", "pte shards a base by --shard-base"),
    "ACCELERATE_USE_DEEPSPEED": ("false", "pte shards a base by --shard-base"),
    "ACCELERATE_USE_MEGATRON_LM": ("false", "pte shards a base by --shard-base"),
    "ACCELERATE_DYNAMO_BACKEND": ("no", "pte has kernels of its own and compiles no model"),
    "ACCELERATE_MIXED_PRECISION": ("no", "the base's dtype is model.dtype, the adapter is float32"),
}


class RankLost(RuntimeError):
    """Another process of the run has failed, has ended, or cannot be reached; this one cannot go on alone."""


class Ranks:
    """The processes of a run, seen from one of them.

    What exchanges words or tensors is collective: all ranks call it, in the same order.

    Args:
        rank: Of this process, from 0.
        size: Processes of the run.
        local_rank: Of this process among those of its machine: the index of its GPU.
        local_size: Processes of this machine.
    """

    def __init__(self, *, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.local_size = local_size
        self.before_words: Callable[[], None] | None = None
        """What this rank still owes the others while they work; called before it waits for them."""

    @property
    def first(self) -> bool:
        """True for the one rank that writes files and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """Where a rank computes: with several ranks, `cuda` is the GPU of its own.

        Raises:
            ValueError: Several ranks would share a device that is named for all of them, or there are too few GPUs.
        """
        if self.size == 1 or name == "cpu":
            return name
        if name != "cuda":
            raise ValueError(
                f"model.device must be 'cuda' or 'cpu' with {self.size} ranks, got {name!r}; with 'cuda' each rank "
                f"takes the GPU of its number"
            )
        if self.local_rank >= (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"model.device 'cuda' needs a GPU for each process of a machine, got {gpus} for {self.local_size}; "
                f"start as many processes as GPUs, or set model.device to 'cpu'"
            )
        return f"cuda:{self.local_rank}"

    def share(self, items: Sequence[Value]) -> list[Value]:
        """This rank's items, in order: item i is for rank i modulo the number of ranks."""
        return list(items[self.rank :: self.size])

    def whole(self, shares: Sequence[Sequence[Value]]) -> list[Value]:
        """The items whose shares, from each rank, are given: the inverse of `share`."""
        count = sum(map(len, shares))
        return [shares[index % self.size][index // self.size] for index in range(count)]

    def gather(self, value: Value) -> list[Value]:
        """What each rank has said, in the order of ranks.

        Raises:
            RankLost: A rank is gone.
        """
        if self.size == 1:
            return [value]
        self.ready()
        values: list[Value | None] = [None] * self.size
        with watched():
            distributed.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def together(self, work: Callable[[], Value], *, stop: type[Exception]) -> list[Value]:
        """What each rank's work has returned, in the order of ranks; no rank goes on where one has failed.

        Args:
            work: Of this rank alone; nothing collective.
            stop: Errors of this type mean the same to all ranks: what one raises, all raise.

        Raises:
            RankLost: The work of another rank has failed in another way, or it is gone.
        """
        if self.size == 1:
            return [work()]
        result, failure = None, None
        try:
            result = work()
        except RankLost:
            raise
        except Exception as error:
            failure = error
        said = None if failure is None else (isinstance(failure, stop), str(failure))
        outcomes = self.gather((result, said))
        if failure is not None:
            raise failure
        for rank, (_, said) in enumerate(outcomes):
            if said is not None:
                raise stop(said[1]) if said[0] else RankLost(f"rank {rank} has failed ({said[1]})")
        return [outcome for outcome, _ in outcomes]  # type: ignore[misc]

    def from_first(self, work: Callable[[], Value]) -> Value:
        """What the work of rank 0 has returned, on every rank; the others do not work.

        Raises:
            Exception: What the work raised on rank 0; RankLost on the others.
        """
        return self.together(lambda: work() if self.first else None, stop=RankLost)[0]  # type: ignore[return-value]

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Makes tensors of every rank those of rank 0, bit for bit."""
        if self.size == 1:
            return
        self.ready()
        with torch.no_grad(), watched():
            for tensor in tensors:
                distributed.broadcast(tensor.data, src=0)

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Adds the gradients of all ranks; a parameter gets one where any rank has one.

        Args:
            parameters: The same of every rank, of one dtype.
        """
        if self.size == 1:
            return
        self.ready()
        with torch.no_grad(), watched():
            present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int64)
            distributed.all_reduce(present)
            moved = [parameter for parameter, ranks in zip(parameters, present.tolist(), strict=True) if ranks]
            if not moved:
                return
            flat = torch.cat(
                [
                    (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
                    for parameter in moved
                ]
            )
            distributed.all_reduce(flat)
            for parameter, gradient in zip(moved, flat.split([one.numel() for one in moved]), strict=True):
                parameter.grad = gradient.view_as(parameter).clone()

    def turns(self) -> Iterator[None]:
        """One turn, while no other rank of this machine has its own; it ends when all have had theirs."""
        for turn in range(max(self.gather(self.local_size))):
            if turn == self.local_rank:
                yield
            self.gather(None)

    def ready(self) -> None:
        """Pays what is owed to the others before this rank waits for them."""
        if self.before_words is not None:
            self.before_words()

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        with watched():
            smallest = torch.tensor(number)
            distributed.all_reduce(smallest, op=distributed.ReduceOp.MIN)
        return int(smallest)


ALONE = Ranks()


@contextmanager
def open_ranks() -> Iterator[Ranks]:
    """The ranks that the launcher has started, connected; `ALONE` where there is no launcher.

    While it is open, being told to end (SIGTERM, as launchers do when another rank has failed) raises RankLost.

    Raises:
        ValueError: The environment is half a launcher's, or asks for what pte does not do.
    """
    size = launched_size(os.environ)
    if size == 1:
        yield ALONE
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)
    distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    before = signal.signal(signal.SIGTERM, _told_to_end)
    try:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        ranks = Ranks(rank=rank, size=size, local_rank=local_rank, local_size=local_size)
        yield ranks
        # A rank that left while others still write would look like one that died.
        ranks.gather(None)
        distributed.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before)


def launched_size(environment: Mapping[str, str]) -> int:
    """Processes that a launcher has started; 1 without a launcher.

    Args:
        environment: Variables of this process.

    Raises:
        ValueError: Several processes and a variable is missing, or the launcher was asked for what pte does not do.
    """
    size = int(environment.get("WORLD_SIZE", "1"))
    if size == 1:
        return 1
    missing = [name for name in LAUNCHED if name not in environment]
    if missing:
        raise ValueError(
            f"a launcher must set {', '.join(LAUNCHED)}, got WORLD_SIZE={size} without {', '.join(missing)}; start "
            f"with torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    for name, (plain, instead) in IGNORED_BY_US.items():
        if environment.get(name, plain).lower() != plain:
            raise ValueError(f"{name} must be {plain!r} for pte, got {environment[name]!r}: {instead}; leave it out")
    return size


@contextmanager
def watched() -> Iterator[None]:
    """Turns what torch raises when a connection breaks into RankLost."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, RankLost):
            raise
        # The launcher will tell this process to end as well: once is enough. Backward passes on a GPU have a thread.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RankLost(f"another rank has ended or cannot be reached ({str(error).splitlines()[0]})") from error


def _told_to_end(_signal: int, _frame: FrameType | None) -> None:
    """Ends this process by an error that says why."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise RankLost("this process was told to end (SIGTERM), as launchers do when another rank has failed")
