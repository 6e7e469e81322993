"""Transformers' `generate`, run by the rollout engine: prompts as padded tensors in, sequences as padded tensors out.

Decides: that all rows run at once, from where their random streams come (torch's default generator:
`torch.manual_seed` governs them), and that stopping criteria and streamers see every token of the batch in the order in
which Transformers' own loop shows them. Does not know: PEFT, what an option means (`generation_options`).

Paper: Section 3, sequences from pi^D_theta(y_t | C_t^D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pte.integrations.generation_options import GenerateOptions, end_tokens, merged_config, pad_token, read_options
from pte.integrations.generation_prompts import checked_mask, inferred_mask, prompt_tensor, prompts_of
from pte.integrations.generation_refusals import check_arguments, check_config
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import RolloutRequest

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import GenerationConfig

    from pte.model.policy import BoundedPolicy
    from pte.rollout.sequences import NewTokens

STREAM_SEEDS = 2**63 - 1


@runtime_checkable
class Streamer(Protocol):
    """What tokens are handed to as they come, as `transformers.TextStreamer`."""

    def put(self, value: Tensor) -> None:
        """Takes the prompts, then the tokens of one step."""

    def end(self) -> None:
        """Learns that nothing follows."""


@torch.no_grad()
def generate(
    policy: BoundedPolicy,
    inputs: object = None,
    *,
    generation_config: GenerationConfig | None = None,
    arguments: Mapping[str, object],
) -> Tensor | GenerateDecoderOnlyOutput:
    """Prompts with their completions under the bounded policy, as Transformers' `generate` returns them.

    Args:
        policy: The bounded policy.
        inputs: Token ids of the prompts, (batch, tokens); None for `input_ids` among the arguments.
        generation_config: Options of the call.
        arguments: Keywords of the call: options, which win over the config, and `input_ids`, `attention_mask`,
            `stopping_criteria`, `streamer`, `tokenizer`.

    Raises:
        ValueError, TypeError: An argument or option is none of the bounded policy's, or a prompt is empty.
    """
    config, others = merged_config(policy.base, generation_config, arguments)
    check_arguments(others)
    check_config(config)
    begin = None if config.bos_token_id is None else torch.full((1, 1), config.bos_token_id, device=policy.device)
    input_ids = prompt_tensor(inputs, others.get("input_ids"), begin=begin)
    ends, pad = end_tokens(config), pad_token(config)
    mask = checked_mask(others.get("attention_mask"), input_ids)
    if mask is None:
        mask = inferred_mask(input_ids, pad_token_id=pad, end_token_ids=ends)
    prompts = prompts_of(input_ids, mask)
    streamer = checked_streamer(others.get("streamer"))
    options = read_options(
        config,
        others,
        prompt_width=input_ids.shape[1],
        longest_prompt=max(map(len, prompts)),
        trained=policy.base.config.max_position_embeddings,
    )
    rows = input_ids.repeat_interleave(options.num_return_sequences, dim=0)
    if options.criteria and len(rows) > 1 and pad is None:
        raise ValueError(
            "pad_token_id must be set where stopping criteria end some sequences of a batch before others, got none; "
            "pass pad_token_id=tokenizer.pad_token_id"
        )
    # Greedy decoding leaves the generator as it was, as in Transformers: a script that trains goes on as without it.
    with torch.random.fork_rng(devices=(), enabled=options.temperature == 0):
        seeds = torch.randint(STREAM_SEEDS, (len(rows),), device="cpu").tolist()
    requests = [
        RolloutRequest(prompt, seed)
        for prompt, seed in zip(
            [prompt for prompt in prompts for _ in range(options.num_return_sequences)],
            seeds,
            strict=True,
        )
    ]
    engine = RolloutEngine(
        policy,
        slots=len(requests),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        stop_token_ids=ends,
    )
    # The policy is what a rollout samples and a replay scores: in the base's own dtype, whoever calls it.
    with torch.autocast(policy.device.type, enabled=False):
        if options.criteria or streamer is not None:
            watch = Watch(rows, options=options, streamer=streamer, pad_token_id=pad)
            completions = run_watched(engine, requests, watch)
        else:
            completions = [list(rollout.completion_ids) for rollout in engine.run(requests)]
    sequences = padded_sequences(rows, completions, pad_token_id=pad)
    if options.returns_dict:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
    return sequences


def checked_streamer(streamer: object) -> Streamer | None:
    """The streamer of a call.

    Raises:
        TypeError: It is something else.
    """
    if streamer is None or isinstance(streamer, Streamer):
        return streamer
    raise TypeError(f"streamer must have put and end, got {type(streamer).__name__}; pass TextStreamer(tokenizer)")


class Watch:
    """Shows a batch to stopping criteria and a streamer, token by token, as Transformers' loop does.

    All rows begin at once and take their tokens in step, so that the tokens with one index are one step of that loop;
    a row that has ended shows the pad token.

    Args:
        rows: Prompts as they were given, one row for each sequence.
        options: Of the call; its criteria are asked after every step.
        streamer: Gets the prompts, then the tokens of every step; perhaps None.
        pad_token_id: Perhaps None, where all rows end together.
    """

    def __init__(
        self,
        rows: Int[Tensor, "rows prompt"],
        *,
        options: GenerateOptions,
        streamer: Streamer | None,
        pad_token_id: int | None,
    ) -> None:
        self.criteria = options.criteria
        self.streamer = streamer
        self.pad_token_id = pad_token_id
        self.prompt_width = rows.shape[1]
        self.sequences = torch.cat([rows, rows.new_zeros(len(rows), options.max_new_tokens)], dim=1)
        self.completions: list[list[int]] = [[] for _ in rows]
        self.steps = 0
        if streamer is not None:
            streamer.put(rows.cpu())

    def take(self, new: NewTokens) -> None:
        """Notes tokens that the engine has drawn."""
        self.completions[new.order] += new.token_ids

    def advance(self) -> list[int]:
        """Shows the steps that have not been shown; the sequences that a criterion has ended, cut behind that step."""
        ended = []
        while self.steps < max(map(len, self.completions)):
            step = self.steps
            self.steps += 1
            tokens = torch.tensor([self.pad_token_id if len(one) <= step else one[step] for one in self.completions])
            end = self.prompt_width + self.steps
            self.sequences[:, end - 1] = tokens.to(self.sequences)
            if self.criteria:
                done = self.criteria(self.sequences[:, :end], None)
                for row in done.nonzero().flatten().tolist():
                    del self.completions[row][self.steps :]
                    ended.append(row)
            if self.streamer is not None:
                self.streamer.put(tokens)
        return ended


def run_watched(engine: RolloutEngine, requests: Sequence[RolloutRequest], watch: Watch) -> list[list[int]]:
    """The completions of requests that run in step while they are watched.

    Args:
        engine: Closed, with a row for each request.
        requests: In the order of the watch's rows.
        watch: May end them.
    """
    engine.open(
        rows=len(requests),
        prompt_slots=max(len(request.prompt_ids) for request in requests),
        on_finish=lambda order, rollout: None,
        on_tokens=watch.take,
    )
    try:
        for request in requests:
            engine.submit(request)
        engine.refill()
        while True:
            for order in watch.advance():
                engine.cancel(order)
            engine.compact()
            if not engine.busy:
                break
            engine.step()
    finally:
        engine.close()
    if watch.streamer is not None:
        watch.streamer.end()
    return watch.completions


def padded_sequences(
    rows: Int[Tensor, "rows prompt"], completions: Sequence[Sequence[int]], *, pad_token_id: int | None
) -> Int[Tensor, "rows tokens"]:
    """Prompts as they were given, each followed by its completion, padded on the right.

    Args:
        rows: One for each sequence.
        completions: In the same order.
        pad_token_id: Perhaps None, where all are equally long.
    """
    longest = max(map(len, completions))
    padded = [[*one, *[pad_token_id] * (longest - len(one))] for one in completions]
    return torch.cat([rows, torch.tensor(padded).to(rows)], dim=1)
