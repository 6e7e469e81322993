"""The laws on this machine: one policy in rollout and replay, and the plain model under the full cache.

Decides: what of the embedded reasoner is run, and within which gaps it must agree: those at which a training run would
stop. Takes seconds. Does not know: packages, devices' names.

Paper: pi^D_theta is one policy, whoever walks it; with an unbounded budget it is the base's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.doctor.findings import Finding

if TYPE_CHECKING:
    import torch

    from pte.model.policy import BoundedPolicy

SECTION = "self check"
REPORT = "report it with the output of pte doctor --output doctor.json; until then run on another device"
WINDOW_TOKENS, EVICT_TOKENS = 8, 2
NUM_STATEMENTS = 6
MAX_NEW_TOKENS = 10 * NUM_STATEMENTS + 4
PROMPTS, SAMPLES = 2, 2
ADAPTER_SCALE = 0.02
"""Of A's entries: a fresh adapter is the identity and would not show its states."""


@dataclass(frozen=True)
class SelfCheck:
    """What a device did.

    Args:
        device: Where.
        decode: What computed the tokens, as `decode_path` names it.
        logprob_gap: Largest difference of a token's log-prob between rollout and replay under the window, nats.
        largest_gap: At which a training run would stop, nats.
        evictions: Of all sampled completions.
        same_tokens: With the full cache and a fresh adapter, greedy completions are those of Transformers' generate.
        plain_gap: Largest difference of their log-probs to a plain forward of the base, nats.
        seconds: For all of it.
    """

    device: str
    decode: str
    logprob_gap: float
    largest_gap: float
    evictions: int
    same_tokens: bool
    plain_gap: float
    seconds: float


def check_device(device: torch.device) -> SelfCheck:
    """Runs the embedded reasoner on a device, in float32."""
    import torch

    from pte.learn.trainer import MAX_GAP
    from pte.method.adapter import ThoughtAdapter
    from pte.method.schedule import EvictionSchedule
    from pte.model.load import load_base, load_tokenizer
    from pte.model.policy import BoundedPolicy, attach_adapter, layer_sizes, query_maps
    from pte.rollout.token_step import decode_path
    from pte.tasks.chained import embedded_model_dir, generate_problems

    started = time.perf_counter()
    path = embedded_model_dir()
    base, tokenizer = load_base(path, dtype=torch.float32, device=device), load_tokenizer(path)
    adapter = ThoughtAdapter(layer_sizes(base), rank=8)
    adapter.start_from_queries(query_maps(base))
    problems = generate_problems(PROMPTS, seed=0, split="heldout", num_statements=NUM_STATEMENTS)
    prompts = [tuple(tokenizer(problem.problem)["input_ids"]) for problem in problems]
    end = int(tokenizer.eos_token_id)
    attach_adapter(base, adapter)
    policy = BoundedPolicy(base, adapter, EvictionSchedule(WINDOW_TOKENS, evict_tokens=EVICT_TOKENS))
    same_tokens, plain_gap = against_generate(policy.with_cache(EvictionSchedule(None)), prompts, end=end)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith(".up"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * ADAPTER_SCALE)
    gap, evictions = rollout_against_replay(policy, prompts, end=end)
    return SelfCheck(
        device=str(device),
        decode=decode_path(policy),
        logprob_gap=gap,
        largest_gap=MAX_GAP[policy.dtype],
        evictions=evictions,
        same_tokens=same_tokens,
        plain_gap=plain_gap,
        seconds=time.perf_counter() - started,
    )


def rollout_against_replay(policy: BoundedPolicy, prompts: list[tuple[int, ...]], *, end: int) -> tuple[float, int]:
    """Largest gap between recorded and replayed log-probs, and how many evictions there were."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from pte.rollout.generate import RolloutEngine
    from pte.rollout.record import RolloutRequest, collate_rollouts, logprob_gap
    from pte.rollout.replay import Replay

    engine = RolloutEngine(policy, slots=3, max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, stop_token_ids=[end])
    requests = [RolloutRequest(prompt, stream_seed=seed) for prompt in prompts for seed in range(SAMPLES)]
    rollouts = engine.run(requests)
    batch = collate_rollouts(rollouts, device=policy.device)
    recorded = pad_sequence([rollout.rollout_logprobs for rollout in rollouts], batch_first=True).to(policy.device)
    with torch.no_grad():
        replayed = Replay(policy)(batch).policy_logprobs
    gap = logprob_gap(replayed, recorded, completion_mask=batch.completion_mask)
    return gap.max, sum(rollout.evictions for rollout in rollouts)


def against_generate(policy: BoundedPolicy, prompts: list[tuple[int, ...]], *, end: int) -> tuple[bool, float]:
    """Whether greedy completions are those of Transformers' generate, and the gap to a plain forward's log-probs."""
    import torch

    from pte.rollout.generate import RolloutEngine
    from pte.rollout.record import RolloutRequest

    engine = RolloutEngine(policy, slots=3, max_new_tokens=MAX_NEW_TOKENS, temperature=0.0, stop_token_ids=[end])
    same, largest = True, 0.0
    for rollout in engine.run([RolloutRequest(prompt, stream_seed=0) for prompt in prompts]):
        ids = torch.tensor([rollout.prompt_ids], device=policy.device)
        made = policy.base.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=end,
            pad_token_id=end,
        )[0, ids.shape[1] :].tolist()
        same = same and tuple(made) == rollout.completion_ids
        whole = torch.tensor([rollout.prompt_ids + rollout.completion_ids], device=policy.device)
        with torch.no_grad():
            logits = policy.base(whole[:, :-1]).logits[0, ids.shape[1] - 1 :]
        plain = logits.float().log_softmax(-1).gather(1, whole[0, ids.shape[1] :, None])[:, 0].cpu()
        largest = max(largest, (plain - rollout.rollout_logprobs).abs().max().item())
    return same, largest


def self_check_findings(check: SelfCheck) -> list[Finding]:
    """What a device's check means."""

    def verdict(name: str, good: bool, says: str) -> Finding:
        return Finding(SECTION, f"{name} on {check.device}", "ok" if good else "wrong", says, None if good else REPORT)

    return [
        Finding(SECTION, f"decode on {check.device}", "ok", check.decode),
        verdict(
            "same policy",
            check.logprob_gap <= check.largest_gap and check.evictions > 0,
            f"rollout and replay differ by {check.logprob_gap:.1e} nats over {check.evictions} evictions, at most "
            f"{check.largest_gap:.0e}",
        ),
        verdict(
            "full cache",
            check.same_tokens and check.plain_gap <= check.largest_gap,
            f"{'the same' if check.same_tokens else 'other'} tokens as Transformers' generate, log-probs differ by "
            f"{check.plain_gap:.1e} nats, at most {check.largest_gap:.0e}; {check.seconds:.1f} s in all",
        ),
    ]
