"""The step whose cost is measured: a GRPO step of an experiment on completions of one fixed length.

Decides: what makes arms comparable. The end token is one that no draw can give, so that all completions have the length
asked for and the host looks for stopped rows as it does in training; advantages are +1 and -1 in turns, as if half of
every group were right, so that every completion costs its backward whatever it earned; dynamic sampling is off.
Everything else is the experiment's own: prompts, slots, cache, adapter, gradient mode, micro-batches, loss, optimizer.
The base alone (`adapter.kind` none) has rollouts and rewards and no update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from pte.learn.scored import ScoredRollout, score_rollouts
from pte.learn.trainer import build_grpo
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import Rollout, RolloutRequest
from pte.rollout.sampling import stream_seed
from pte.session import open_session

if TYPE_CHECKING:
    from pte.config import ExperimentConfig
    from pte.tasks.problems import Problem


class CostStep:
    """Rollouts, rewards and updates of an experiment, each to be measured by itself.

    Args:
        config: Of the arm; `rollout.max_new_tokens` is not read, the length is given with each call.

    Raises:
        ValueError, OSError: The session cannot be opened.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.config = config
        self.session = open_session(config)
        self.stage = None if config.adapter.kind == "none" else build_grpo(self.session, config)
        self.cache_bytes = 0
        self.state_bytes = 0

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.session.policy.device

    @property
    def sequences(self) -> int:
        """Completions in a step."""
        return self.config.train.prompts_per_step * self.config.train.group_size

    def problems(self, index: int) -> list[Problem]:
        """The problem of each completion of step `index`."""
        count, group = self.config.train.prompts_per_step, self.config.train.group_size
        training = self.session.task.training
        return [training(index * count + offset).problem for offset in range(count) for _ in range(group)]

    def sample(self, tokens: int, index: int) -> list[Rollout]:
        """Completions of exactly `tokens` tokens.

        Raises:
            ValueError: Prompt and completion are longer than the trained positions.
        """
        config, task = self.config, self.session.task
        engine = RolloutEngine(
            self.session.policy,
            slots=config.rollout.slots,
            max_new_tokens=tokens,
            temperature=config.rollout.temperature,
            stop_token_ids=(self.session.policy.vocab,),
            allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
        )
        rollouts = engine.run(
            [
                RolloutRequest(task.prompt_ids(problem), stream_seed(config.run.seed, "cost", index, row))
                for row, problem in enumerate(self.problems(index))
            ]
        )
        self.cache_bytes, self.state_bytes = engine.peak_cache_bytes, engine.peak_state_bytes
        return rollouts

    def score(self, rollouts: Sequence[Rollout], index: int) -> list[ScoredRollout]:
        """Their rewards by the experiment's own function, and advantages of +1 and -1."""
        scored = score_rollouts(self.session.task, rollouts, self.problems(index))
        return [replace(one, advantage=1.0 - 2.0 * (row % 2)) for row, one in enumerate(scored)]

    def update(self, scored: Sequence[ScoredRollout]) -> None:
        """The optimizer steps on a batch of rollouts; nothing for the base alone."""
        if self.stage is None:
            return
        size = -(-len(scored) // self.config.train.minibatches_per_step)
        for start in range(0, len(scored), size):
            self.stage.update(scored[start : start + size], first=start == 0)

    def run(self, tokens: int, index: int) -> None:
        """The whole step."""
        self.update(self.score(self.sample(tokens, index), index))
