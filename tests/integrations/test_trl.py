"""TRL's GRPO through the bounded policy: the numbers of our own rollout, replay and loss, in TRL's own loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from trl import GRPOTrainer
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from peft_models import shake, thought_adapter
from pte.integrations.peft import PTEConfig, policy_of
from pte.integrations.trl import PTEGRPOTrainer
from pte.integrations.trl_batch import ReplayRecord, replay_batch
from pte.learn.loss import BatchTotals, PolicyObjective, policy_loss
from pte.learn.optimizer import TrainingStopped
from pte.method.schedule import EvictionSchedule
from pte.peft_folder import load_any_adapter
from pte.rollout.generate import RolloutEngine
from pte.rollout.prefill import PromptReader
from pte.rollout.record import RolloutRequest, collate_rollouts
from pte.rollout.replay import Replay
from pte.tasks.chained import embedded_model_dir
from trl_runs import (
    BUDGET,
    embedded_base,
    logged,
    moved_trainer,
    problems,
    ragged_problems,
    rows_of,
    snapshot,
    trainer_of,
)

pytestmark = pytest.mark.system
GAP = "sampling/sampling_logp_difference"


def gradients(trainer: PTEGRPOTrainer) -> dict[str, torch.Tensor]:
    adapter = thought_adapter(trainer.model)
    found = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad()
    return found


def same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, error: float = 1e-9) -> None:
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, theirs[name], rtol=0, atol=error * (1 + theirs[name].abs().max().item()))


@pytest.mark.parametrize(
    ("eviction", "loss", "masked"),
    [("window", "dapo", True), ("h2o", "dapo", False), ("random", "grpo", True), ("window", "dr_grpo", False)],
)
def test_a_step_has_the_loss_and_the_gradient_of_our_own(
    tmp_path: Path, eviction: str, loss: str, masked: bool
) -> None:
    trainer = moved_trainer(
        tmp_path,
        dataset=ragged_problems(),
        budget={"eviction": eviction},
        loss_type=loss,
        mask_truncated_completions=masked,
        temperature=1.3,
        max_completion_length=20,
        # TRL multiplies the KL term by the ratio otherwise, which changes its gradient.
        use_bias_correction_kl=False,
        steps_per_generation=1,
        num_iterations=1,
        per_device_train_batch_size=8,
    )
    torch.manual_seed(5)
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    found = trainer._compute_loss(trainer.model, batch)
    found.backward()
    theirs = gradients(trainer)

    policy = policy_of(trainer.model)
    torch.manual_seed(5)
    seeds = torch.randint(2**63 - 1, (8,)).tolist()
    prompts = [tuple(trainer.processing_class(row["prompt"])["input_ids"]) for row in rows_of(trainer)]
    assert len({len(prompt) for prompt in prompts}) == 2
    engine = RolloutEngine(policy, slots=3, max_new_tokens=20, temperature=1.3, stop_token_ids=trainer.eos_token_ids)
    rollouts = engine.run([RolloutRequest(*pair) for pair in zip(prompts, seeds, strict=True)])
    assert max(rollout.evictions for rollout in rollouts) > 3
    padded = collate_rollouts(rollouts)
    assert torch.equal(padded.completion_ids, batch["completion_ids"] * padded.completion_mask)
    finished = torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts])
    assert finished.any() and not finished.all()
    # Those that TRL leaves out of its loss are replayed as well, for the gap.
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attended = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    trainer.record = ReplayRecord.of_columns(batch)
    with torch.no_grad():
        scored, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, attended, 20, batch_size=3)
        torch.testing.assert_close(scored, Replay(policy)(padded).policy_logprobs, rtol=0, atol=1e-9)
    mask = padded.completion_mask & (finished[:, None] | (not masked))
    reference = Replay(policy.without_adapter().with_cache(EvictionSchedule(None)))
    expected = policy_loss(
        Replay(policy)(padded).policy_logprobs,
        pad_sequence([rollout.rollout_logprobs for rollout in rollouts], batch_first=True),
        advantages=batch["advantages"].double(),
        completion_mask=mask,
        objective=PolicyObjective(kind=loss, kl_beta=0.05, max_completion_tokens=20),
        totals=BatchTotals(sequences=8, tokens=int(mask.sum())),
        reference_logprobs=reference(padded).policy_logprobs.detach(),
    ).loss
    expected.backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    same(theirs, gradients(trainer))


@pytest.mark.parametrize("eviction", ["h2o", "random"])
def test_shuffled_mini_batches_take_their_records_along(tmp_path: Path, eviction: str) -> None:
    trainer = moved_trainer(tmp_path, dataset=ragged_problems(), budget={"eviction": eviction})
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    assert batch["old_per_token_logps"].shape == batch["completion_ids"].shape
    trainer._compute_loss(trainer.model, batch).backward()
    whole = gradients(trainer)
    for part in split_tensor_dict(shuffle_sequence_dict(batch), 2):
        trainer._compute_loss(trainer.model, part).backward()
    same(gradients(trainer), whole)


@pytest.mark.parametrize("kind", ["thought", "lora"])
def test_with_the_full_cache_log_probs_entropies_and_gradients_are_trl_s_own(tmp_path: Path, kind: str) -> None:
    budget = {"eviction": "none", "kind": kind}
    trainer = moved_trainer(tmp_path, dataset=ragged_problems(), budget=budget, temperature=0.7, pad_to_multiple_of=8)
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    completions = batch["completion_mask"].bool()
    assert (batch["prompt_mask"].sum(1) < batch["prompt_mask"].shape[1]).all() and not completions.all()
    wanted = torch.randn(completions.shape, dtype=torch.float64) * completions
    trainer.record = ReplayRecord.of_columns(batch)
    found = []
    for owner in (PTEGRPOTrainer, GRPOTrainer):
        logprobs, entropies, _ = owner._get_per_token_logps_and_entropies(
            trainer, trainer.model, ids, mask, completions.shape[1], batch_size=3, compute_entropy=True
        )
        (logprobs * wanted).sum().backward()
        found.append((logprobs, entropies, gradients(trainer)))
    (mine, my_entropies, my_gradients), (theirs, their_entropies, their_gradients) = found
    # TRL's head computes in float32.
    torch.testing.assert_close(mine.float(), theirs * completions, rtol=0, atol=1e-5)
    torch.testing.assert_close(my_entropies.float(), their_entropies * completions, rtol=0, atol=1e-5)
    same(my_gradients, their_gradients, error=1e-4)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    found = []
    for checkpointing in (True, False):
        trainer = moved_trainer(tmp_path, gradient_checkpointing=checkpointing)
        trainer.model.train()
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        trainer._compute_loss(trainer.model, trainer._generate_and_score_completions(rows_of(trainer))).backward()
        found.append(gradients(trainer))
    same(*found, error=1e-13)


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_the_reasoner_trains_through_trl_with_kl_iterations_and_checkpointing(
    tmp_path: Path, dtype: torch.dtype, largest: float
) -> None:
    trainer = trainer_of(tmp_path, model=embedded_base(dtype), max_steps=6, gradient_checkpointing=True)
    adapter, base = thought_adapter(trainer.model), trainer.policy.base
    own = {id(parameter) for parameter in adapter.parameters()}
    frozen = {name: p.detach().clone() for name, p in base.named_parameters() if id(p) not in own}
    before = snapshot(adapter)
    trainer.train()
    # TRL hands the sampling log-probs on in float32. Rounding alone passes 1e-5 on the sharply trained base in float32.
    assert len(logged(trainer, f"{GAP}/max")) == 2 and max(logged(trainer, f"{GAP}/max")) <= largest
    assert max(logged(trainer, f"{GAP}/mean")) <= 1e-5 and max(logged(trainer, f"{GAP}/kl")) <= 1e-9
    assert {name for name, tensor in snapshot(adapter).items() if torch.equal(tensor, before[name])} == set()
    after = {name: p for name, p in base.named_parameters() if id(p) not in own}
    assert len(frozen) == 38 and all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert all(0 < count <= (30 - 8) / 2 for count in logged(trainer, "rollout/evictions"))
    assert len(logged(trainer, "kl")) == len(logged(trainer, "entropy")) == 6 and min(logged(trainer, "kl")) > 0
    longest = max(len(trainer.processing_class(row["prompt"])["input_ids"]) for row in problems())
    slots = 8 * (longest + 8) * trainer.policy.cache_shape.token_bytes(dtype)
    assert logged(trainer, "rollout/cache_bytes") == [slots] * 2


def given_model() -> PeftModel:
    """The reasoner with an adapter that has been trained, so to speak."""
    model = get_peft_model(embedded_base(), PTEConfig(**BUDGET))
    shake(thought_adapter(model), seed=0)
    for name, parameter in thought_adapter(model).named_parameters():
        if name.endswith(".up"):
            parameter.data *= 0.1
    return model


@pytest.mark.parametrize("make", [embedded_base, given_model])
def test_a_resumed_run_goes_on_as_the_one_that_was_not_stopped(
    tmp_path: Path, make: Callable[[], PreTrainedModel | PeftModel]
) -> None:
    saving = {"num_iterations": 1, "save_strategy": "steps", "save_steps": 2}
    torch.manual_seed(1)
    whole = trainer_of(tmp_path, model=make(), **saving)
    whole.train()
    saved = load_any_adapter(tmp_path / "checkpoint-2")[0]
    files = [path.name for path in (tmp_path / "checkpoint-2").glob("*.safetensors")]
    assert files == ["adapter_model.safetensors"], "the base is not saved"
    assert all(not torch.equal(tensor, saved[name]) for name, tensor in snapshot(thought_adapter(whole.model)).items())
    torch.manual_seed(1)
    resumed = trainer_of(tmp_path, model=make(), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in snapshot(whole.model.base_model.pte_adapters).items():
        assert torch.equal(resumed.model.base_model.pte_adapters.state_dict()[name], tensor), name
    assert logged(resumed, "kl") == logged(whole, "kl") and len(logged(whole, "kl")) == 4


def test_several_iterations_lower_the_loss_of_their_batch(tmp_path: Path) -> None:
    one_batch = {"per_device_train_batch_size": 8, "steps_per_generation": 1, "num_iterations": 4, "beta": 0.0}
    trainer = trainer_of(tmp_path, temperature=1.3, lr_scheduler_type="constant", learning_rate=3e-3, **one_batch)
    trainer.train()
    first, *_, last = logged(trainer, "loss")
    assert len(logged(trainer, "reward")) == 1 and last < first - 1e-3


def test_what_is_saved_is_a_peft_folder_with_its_budget(tmp_path: Path) -> None:
    trainer = moved_trainer(tmp_path, budget={"eviction": "h2o"})
    trainer.save_model(str(tmp_path / "adapter"))
    assert load_any_adapter(tmp_path / "adapter")[0].keys() == snapshot(thought_adapter(trainer.model)).keys()
    again = policy_of(PeftModel.from_pretrained(embedded_base(), tmp_path / "adapter"))
    assert again.adapter is not None and again.schedule == trainer.policy.schedule and again.eviction.name == "h2o"
    again.adapter.double()
    batch = trainer._generate_and_score_completions(rows_of(trainer))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    batch = replay_batch(ids, batch["prompt_mask"], ReplayRecord.of_columns(batch), temperature=1.0)
    # The adapter that is loaded is float32.
    found, expected = (Replay(policy)(batch).policy_logprobs for policy in (again, trainer.policy))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_given_adapter_has_its_own_copy_as_reference(tmp_path: Path) -> None:
    model = given_model()
    trainer = trainer_of(tmp_path, model=model, max_steps=2, num_iterations=1)
    before = snapshot(thought_adapter(model))
    trainer.train()
    first, *later = logged(trainer, "kl")
    assert first <= 1e-12 < min(later), "the reference is the policy that training starts from, under its budget"
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(thought_adapter(model, "ref")).items())
    assert not any(torch.equal(tensor, before[name]) for name, tensor in snapshot(thought_adapter(model)).items())
    assert model.active_adapter == "default"


def test_a_name_is_loaded_in_bfloat16_and_small_steps_still_move_every_parameter(tmp_path: Path) -> None:
    model = str(embedded_model_dir())
    trainer = trainer_of(tmp_path, model=model, bf16=None, learning_rate=1e-5, num_iterations=1, beta=0.0)
    adapter = thought_adapter(trainer.model)
    assert trainer.policy.dtype == torch.bfloat16 and trainer.args.model_init_kwargs == {"dtype": "bfloat16"}
    before = snapshot(adapter)
    trainer.train()
    for name, parameter in adapter.named_parameters():
        moved = (parameter != before[name]).double().mean().item()
        assert parameter.dtype == torch.float32 and moved > 0.5, f"{name}: {moved:.0%} of its elements moved"
    assert trainer.max_logprob_gap == 1.0


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_run_stops_before_an_update_when_rollout_and_replay_part(tmp_path: Path, iterations: int) -> None:
    options = {"max_logprob_gap": 1e-9}
    steps = {"num_iterations": iterations, "steps_per_generation": iterations}
    trainer = trainer_of(tmp_path, model=embedded_base(torch.float32), options=options, **steps)
    before = snapshot(thought_adapter(trainer.model))
    with pytest.raises(
        TrainingStopped, match=r"must agree within max_logprob_gap \(1e-09 nats\), got .*PTEGRPOTrainer"
    ):
        trainer.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(thought_adapter(trainer.model)).items())
    assert len(trainer._metrics["train"][f"{GAP}/max"]) == 1


def test_evaluation_samples_the_bounded_policy_too(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, num_generations_eval=2, per_device_eval_batch_size=4)
    before = snapshot(thought_adapter(trainer.model))
    metrics = trainer.evaluate(problems(2))
    assert metrics["eval_rollout/evictions"] == 11.0 and metrics[f"eval_{GAP}/max"] <= 1e-5
    assert 0 <= metrics["eval_reward"] <= 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(thought_adapter(trainer.model)).items())


def test_a_group_s_prompt_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path)
    read: list[tuple[int, ...]] = []
    read_batch = PromptReader.read_batch

    def counted(self: PromptReader, prompts: list[tuple[int, ...]]) -> None:
        read.extend(prompts)
        read_batch(self, prompts)

    monkeypatch.setattr(PromptReader, "read_batch", counted)
    trainer._generate_and_score_completions(rows_of(trainer))
    assert len(read) == len(set(read)) == 2


def test_the_script_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    section = text.partition("\n## TRL\n")[2].partition("\n## ")[0]
    (script,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    assert "src/pte/tasks/embedded" in script
    names: dict[str, object] = {}
    exec(script.replace("src/pte/tasks/embedded", str(embedded_model_dir())), names)
    trainer = names["trainer"]
    assert isinstance(trainer, PTEGRPOTrainer) and trainer.state.global_step == 2
    tensors, _ = load_any_adapter("adapter")
    trained = snapshot(thought_adapter(trainer.model))
    assert all(torch.equal(tensor.to(trained[name].device), trained[name]) for name, tensor in tensors.items())
