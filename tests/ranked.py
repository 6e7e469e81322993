"""Work for several ranks, and processes that do it: two on one CPU, connected by gloo."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from killed import warm_processes
from pte.arguments import TrainArguments
from pte.cli import parse
from pte.commands import train_command
from pte.learn.stage import TIMING_METRICS
from pte.learn.trainer import build_stages, open_run, save
from pte.ranks import Ranks, open_ranks
from pte.session import Session, open_session
from pte.tasks.evaluate import EvaluatedCompletion, Evaluation, evaluate_session
from short_runs import odd_ids, open_short, parameters, rewarded, short_config

Result = TypeVar("Result")
Steps = tuple[dict[str, torch.Tensor], list[dict[str, float]], list[list[int]]]

# Traces of 24 tokens, evictions before tokens 8, 12, 16, 20; hot, so that completions end anywhere. Three groups of
# three on two ranks: shares are never equal, and one group in four ties and is sampled again.
GRPO = {
    "distill__steps": 1,
    "distill__batch_size": 3,
    "distill__micro_batch_size": 2,
    "task__num_statements": 2,
    "cache__window_tokens": 8,
    "rollout__max_new_tokens": 26,
    "rollout__temperature": 1.5,
    "train__steps": 3,
    "train__prompts_per_step": 3,
    "train__group_size": 3,
    "train__minibatches_per_step": 3,
    "train__micro_batch_size": 2,
    "train__dynamic_sampling": True,
    "train__kl_beta": 0.1,
    "train__weight_decay": 0.01,
}


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def on_ranks(work: Callable[[Ranks], Result], *, size: int = 2) -> list[Result | str]:
    """What the work of each rank returned, or the words of the error that ended it."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        processes = [
            warm_processes().Process(target=be_rank, args=(work, rank, size, port, directory)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(100)
        waiting = [process for process in processes if process.exitcode is None]
        for process in waiting:
            process.kill()
        assert not waiting, "a rank waits for ever"
        return [pickle.loads((Path(directory) / str(rank)).read_bytes()) for rank in range(size)]


def be_rank(work: Callable[[Ranks], object], rank: int, size: int, port: int, directory: str) -> None:
    """Works as one of several ranks, in this process."""
    torch.set_num_threads(1)
    os.environ.update(launched(rank, size, port))
    try:
        with open_ranks() as ranks:
            result = work(ranks)
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    (Path(directory) / str(rank)).write_bytes(pickle.dumps(result))


def launched(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher sets for a process."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def do_steps(
    ranks: Ranks,
    changes: Mapping[str, object],
    reward: Callable[..., list[float]] = odd_ids,
    shards: bool = False,
) -> Steps:
    """All steps of all stages in float64: the adapter, the metrics and the lengths of the completions.

    Every ninth token ends a completion, so that they end anywhere.
    """
    config, session = open_short(**changes)
    session = replace(rewarded(session, reward), ranks=ranks)
    session = replace(session, task=replace(session.task, more_stop_token_ids=tuple(range(5, 90, 9))))
    if shards:
        session = sharded(session, ranks)
    metrics, completions = [], []
    for stage in build_stages(session, config):
        for index in range(stage.steps):
            result = stage.step(index)
            unlike = (*TIMING_METRICS, "cache_bytes")
            metrics.append({key: value for key, value in result.metrics.items() if key not in unlike})
            completions.append([int(row["tokens"]) for row in result.completions])
    whole = [one for one in session.policy.base.get_decoder().layers.parameters() if not isinstance(one, DTensor)]
    assert not (shards and whole), "a layer stays whole when nobody needs it"
    return parameters(session), metrics, completions


def do_evaluation(ranks: Ranks, changes: Mapping[str, object]) -> tuple[Evaluation, list[EvaluatedCompletion]]:
    """Scores of the embedded task."""
    config, session = open_short(**changes)
    return evaluate_session(replace(session, ranks=ranks), config, name="chained")


def disagree(ranks: Ranks, kind: type[Exception], rank: int) -> object:
    """Words between ranks, of which one fails."""

    def work() -> int:
        if ranks.rank == rank:
            raise kind("no more")
        return ranks.rank

    return ranks.together(work, stop=ValueError)


def deal(ranks: Ranks, count: int) -> tuple[list[int], list[int], list[int]]:
    """Items dealt out and collected; gradients added where only some ranks have them."""
    own = ranks.share(range(count))
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), 1.0 + ranks.rank)
    if ranks.first:
        parameters[1].grad = torch.full((2,), 5.0)
    ranks.sum_gradients(parameters)
    sums = [-1 if parameter.grad is None else int(parameter.grad[0]) for parameter in parameters]
    return own, ranks.whole(ranks.gather(own)), sums


CALLS: list[int] = []


def deadly_for_rank_1(completion_ids: list[list[int]], **_: object) -> list[float]:
    """The same for the command, which asks once before the first step."""
    CALLS.append(1)
    if len(CALLS) == 4 and os.environ.get("RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return odd_ids(completion_ids)


def sharded(session: Session, ranks: Ranks) -> Session:
    """The same session with the base's layers in shards."""
    from pte.model.sharding import ShardedLayers, place_sharded

    layers = ShardedLayers(ranks, device=torch.device("cpu"))
    place_sharded(session.policy.base, layers, device=torch.device("cpu"))
    layers.begin()
    return replace(session, policy=replace(session.policy, sharded=layers))


def do_command(ranks: Ranks, words: Sequence[str]) -> dict[str, int]:
    """`pte train` on these ranks, and the bytes of the base that lie whole and in shards on this one."""
    arguments = parse("train", words)
    assert isinstance(arguments, TrainArguments)
    train_command(arguments, Console(quiet=True), ranks=ranks)
    base = open_session(arguments.experiment, ranks=ranks, shard_base=arguments.shard_base).policy.base
    layers = set(base.get_decoder().layers.parameters())
    sizes = {"whole": 0, "shards": 0}
    for parameter in base.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        sizes["shards" if parameter in layers else "whole"] += local.nbytes
    return sizes


def drift_apart(ranks: Ranks, directory: Path) -> None:
    """A checkpoint of a run whose adapter is another one on rank 1."""
    run = open_run(short_config(run__output_dir=str(directory)), ranks=ranks)
    adapter = run.session.policy.adapter
    assert adapter is not None
    if not ranks.first:
        with torch.no_grad():
            next(adapter.parameters())[0, 0] += 1
    save(run, 1)
