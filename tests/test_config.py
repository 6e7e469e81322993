"""Configurations: every rule refuses what breaks it, files and flags say the same, nothing is silently dropped."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from pte import config as configs
from pte.config import (
    AdapterConfig,
    CacheConfig,
    DistillConfig,
    EvalConfig,
    ExperimentConfig,
    LinearMap,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from pte.config_file import SECTIONS, flags_from_file, load_experiment, read_experiment_file, refuse_flags
from pte.config_rules import describe, fitting_value
from pte.method.adapter import LINEAR_MAPS
from pte.open_policy import eviction_policy

EVERY_FIELD = """
[model]
path = "some/model"
dtype = "bfloat16"
device = "cuda:1"
trust_remote_code = true
allow_beyond_trained_positions = true
[adapter]
kind = "lora"
rank = 8
scale = 2
targets = ["q_proj", "v_proj"]
layers = [1, 0]
update_rule = "paper"
key_space = "post_rotary"
down_start = "random"
global_tokens = 0
checkpoint = "runs/a b"
[cache]
policy = "sinks"
window_tokens = 64
evict_tokens = 16
sink_tokens = 3
recent_tokens = 5
[rollout]
temperature = 0.7
max_new_tokens = 99
slots = 5
[task]
kind = "jsonl"
train_path = "--train\\n x.jsonl"
eval_paths = ["a.jsonl", "b c.jsonl"]
prompt_template = "plain"
boxed_instruction = false
traces_path = "traces.jsonl"
reward = "my.rewards:short"
num_statements = 9
num_constants = 5
modulus = 7
min_distance = 2
max_distance = 3
num_names = 20
mixture = ["recall"]
num_facts = 5
num_queries = 2
num_keys = 8
max_age = 4
num_reveals = 2
steps_per_reveal = 5
moves_per_reveal = 2
num_generators = 3
left_digits = 2
right_digits = 1
[distill]
steps = 0
batch_size = 3
source = "teacher"
learning_rate = 3e-4
warmup_steps = 0
decay = "cosine"
max_grad_norm = 0.5
micro_batch_size = 2
gradient_mode = "exact"
horizon = 3
gradient_checkpointing = true
[train]
steps = 7
prompts_per_step = 3
group_size = 4
minibatches_per_step = 6
micro_batch_size = 1
loss = "dapo"
clip_low = 0.1
clip_high = 0.28
kl_beta = 0.01
reference = "bounded"
learning_rate = 1e-6
warmup_steps = 2
decay = "linear"
weight_decay = 0.1
max_grad_norm = 2.0
gradient_mode = "horizon"
horizon = 2
gradient_checkpointing = true
dynamic_sampling = true
max_resample_rounds = 1
max_logprob_gap = 0.5
checkpoint_every = 2
keep_checkpoints = 1
log_completions = false
[eval]
problems = 12
samples_per_problem = 4
temperature = 1.0
max_new_tokens = 77
pass_at = [1, 4]
state_control = "zeroed"
[run]
name = "x-1.2"
output_dir = "out"
seed = 5
resume = true
log_with = ["wandb", "tensorboard"]
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "experiment.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(path=""), "path must name a model"),
        (lambda: ModelConfig(device="gpu"), "device must be 'cpu', .* got 'gpu'; use 'cpu'"),
        (lambda: ModelConfig(dtype="float64"), "dtype must be one of 'float32', .* got 'float64'"),
        (lambda: AdapterConfig(kind="prefix"), "kind must be one of 'thought'"),
        (lambda: AdapterConfig(rank=0), "rank must be at least 1, got 0; the paper uses 32"),
        (lambda: AdapterConfig(scale=0.0), "scale must be above 0, got 0.0; use 1.0"),
        (lambda: AdapterConfig(targets=()), r"targets must name at least one linear map, got \(\)"),
        (lambda: AdapterConfig(targets=("q_proj", "q_proj")), "targets must name each linear map once"),
        (lambda: AdapterConfig(targets=("c_attn",)), r"targets\[0\] must be one of 'q_proj'"),
        (lambda: AdapterConfig(global_tokens=-1), "global_tokens must be at least 0, got -1"),
        (lambda: AdapterConfig(kind="global_only", global_tokens=0), "global_tokens must be at least 1 with kind"),
        (
            lambda: CacheConfig(window_tokens=1000),
            r"^window_tokens must be a multiple of evict_tokens \(256\), got 1000; use 1024$",
        ),
        (lambda: CacheConfig(evict_tokens=0), "evict_tokens must be at least 1 token, got 0"),
        (lambda: CacheConfig(window_tokens=-256), "window_tokens must be at least 1 token, got -256"),
        (lambda: CacheConfig(sink_tokens=0), "sink_tokens must be at least 1, got 0; use policy 'window'"),
        (
            lambda: CacheConfig(policy="sinks", window_tokens=512, sink_tokens=257),
            r"sink_tokens must leave room for a block: sink_tokens \+ evict_tokens \(256\) at most window_tokens "
            r"\(512\), got 257; use at most 256",
        ),
        (
            lambda: CacheConfig(recent_tokens=-1),
            "recent_tokens must be at least 0, got -1; leave it out for the policy",
        ),
        (
            lambda: CacheConfig(policy="h2o", window_tokens=512, recent_tokens=257),
            r"recent_tokens must leave room for a block: recent_tokens \+ evict_tokens \(256\) at most window_tokens "
            r"\(512\), got 257; use at most 256",
        ),
        (
            lambda: CacheConfig(policy="snapkv", recent_tokens=257),
            r"recent_tokens must be from 1 to evict_tokens \(256\) with policy 'snapkv', whose newest tokens observe, "
            r"got 257; use for example 256, with a window of two blocks or more",
        ),
        (
            lambda: CacheConfig(policy="snapkv", window_tokens=256),
            r"recent_tokens must be from 1 to evict_tokens \(256\) with policy 'snapkv', whose newest .* got 0; use",
        ),
        (lambda: RolloutConfig(temperature=0.0), r"temperature must be above 0, got 0.0; use 1.0 \(greedy rollouts"),
        (lambda: RolloutConfig(temperature=-1.0), "temperature must be above 0"),
        (lambda: RolloutConfig(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda: RolloutConfig(slots=0), "slots must be at least 1"),
        (lambda: TaskConfig(kind="jsonl"), "train_path must name a file, or eval_paths some"),
        (lambda: TaskConfig(kind="mixture"), "mixture must name two or more kinds, each once, with kind 'mixture'"),
        (lambda: TaskConfig(kind="mixture", mixture=("recall",)), "mixture must name two or more kinds"),
        (lambda: TaskConfig(kind="mixture", mixture=("recall", "recall")), "mixture must name two or more kinds"),
        (lambda: TaskConfig(num_facts=0), "num_facts must be at least 1, got 0; use 1 or more"),
        (lambda: TaskConfig(num_keys=1), "num_keys must be at least 2"),
        (lambda: TaskConfig(max_age=0), "max_age must be at least 1"),
        (lambda: TaskConfig(num_reveals=0), "num_reveals must be at least 1, got 0; use 1 or more"),
        (lambda: TaskConfig(steps_per_reveal=0), "steps_per_reveal must be at least 1"),
        (lambda: TaskConfig(moves_per_reveal=0), "moves_per_reveal must be at least 1, got 0; use 1 or more"),
        (lambda: TaskConfig(num_generators=1), "num_generators must be at least 2"),
        (lambda: TaskConfig(left_digits=0), "left_digits must be at least 1"),
        (lambda: TaskConfig(right_digits=0), "right_digits must be at least 1"),
        (
            lambda: ExperimentConfig(task=TaskConfig(kind="recall")),
            r"eval.temperature must be above 0 with problems of 'recall' \(completions choose values at random\)",
        ),
        (lambda: TaskConfig(eval_paths=("a", "a")), "eval_paths must name each file once"),
        (lambda: TaskConfig(prompt_template="{problem}"), "prompt_template must be one of 'auto', 'chat', 'plain'"),
        (lambda: TaskConfig(reward="my_rewards"), "reward must be 'math', 'exact' or 'module:function'"),
        (lambda: TaskConfig(num_statements=0), "num_statements must be at least 1"),
        (lambda: TaskConfig(num_constants=1), "num_constants must be at least 2"),
        (lambda: TaskConfig(modulus=1), "modulus must be at least 2"),
        (lambda: TaskConfig(min_distance=0), "min_distance must be at least 1"),
        (lambda: TaskConfig(min_distance=3, max_distance=2), "max_distance must be at least 3, got 2"),
        (lambda: DistillConfig(batch_size=0), "batch_size must be at least 1"),
        (lambda: DistillConfig(steps=-1), "steps must be at least 0, got -1; use 0 to skip"),
        (lambda: DistillConfig(micro_batch_size=0), "micro_batch_size must be at least 1"),
        (lambda: TrainConfig(learning_rate=0.0), "learning_rate must be above 0"),
        (lambda: TrainConfig(learning_rate=float("nan")), "learning_rate must be a finite number, got nan"),
        (lambda: TrainConfig(warmup_steps=-1), "warmup_steps must be at least 0"),
        (lambda: TrainConfig(max_grad_norm=0.0), "max_grad_norm must be above 0"),
        (lambda: TrainConfig(horizon=0), "horizon must be at least 1"),
        (lambda: TrainConfig(gradient_mode="full"), "gradient_mode must be one of 'chain', 'exact', 'horizon'"),
        (lambda: TrainConfig(prompts_per_step=0), "prompts_per_step must be at least 1"),
        (lambda: TrainConfig(minibatches_per_step=0), "minibatches_per_step must be at least 1"),
        (lambda: TrainConfig(checkpoint_every=0), "checkpoint_every must be at least 1"),
        (lambda: TrainConfig(keep_checkpoints=0), "keep_checkpoints must be at least 1"),
        (
            lambda: TrainConfig(group_size=1),
            r"group_size must be at least 2, got 1; use for example 8 \(a group",
        ),
        (
            lambda: TrainConfig(prompts_per_step=2, group_size=4, minibatches_per_step=3),
            r"minibatches_per_step must divide prompts_per_step \* group_size \(8\), got 3",
        ),
        (lambda: TrainConfig(clip_low=1.5), "clip_low must be above 0, at most 1"),
        (lambda: TrainConfig(clip_high=0.0), "clip_high must be above 0"),
        (lambda: TrainConfig(kl_beta=-0.1), "kl_beta must be at least 0"),
        (lambda: TrainConfig(weight_decay=-0.1), "weight_decay must be at least 0"),
        (lambda: TrainConfig(max_resample_rounds=-1), "max_resample_rounds must be at least 0"),
        (lambda: TrainConfig(max_logprob_gap=0.0), "max_logprob_gap must be above 0"),
        (lambda: EvalConfig(problems=0), "problems must be at least 1"),
        (lambda: EvalConfig(samples_per_problem=0), "samples_per_problem must be at least 1"),
        (lambda: EvalConfig(temperature=-0.5), "temperature must be at least 0"),
        (lambda: EvalConfig(max_new_tokens=0), "max_new_tokens must be at least 1"),
        (lambda: EvalConfig(samples_per_problem=4), "samples_per_problem must be 1 at temperature 0"),
        (
            lambda: EvalConfig(pass_at=(2,)),
            r"pass_at must hold numbers from 1 to samples_per_problem \(1\), got",
        ),
        (lambda: EvalConfig(pass_at=()), "pass_at must hold"),
        (lambda: RunConfig(name="a/b"), "name must be a directory name"),
        (lambda: RunConfig(name=".."), "name must be a directory name"),
        (lambda: RunConfig(name=""), "name must be a directory name"),
        (lambda: RunConfig(output_dir=""), "output_dir must name a directory"),
        (lambda: RunConfig(seed=-1), "seed must be from 0"),
        (lambda: RunConfig(log_with=("wandb", "wandb")), "log_with must name each tracker once"),
        (lambda: ExperimentConfig(eval=EvalConfig(problems=None)), "eval.problems must be a number with task.kind"),
        (
            lambda: ExperimentConfig(adapter=AdapterConfig(kind="none")).check_trainable(),
            "adapter.kind must be trainable",
        ),
        (
            lambda: ExperimentConfig(task=TaskConfig(kind="jsonl", eval_paths=("a",))).check_trainable(),
            "task.train_path must name a file of training problems, got None; set it to a JSONL file, or use pte eval",
        ),
    ],
)
def test_a_value_that_breaks_a_rule_is_refused_with_name_rule_value_and_remedy(make, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        make()
    assert "; " in str(refusal.value), "a refusal ends with the remedy"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CacheConfig(window_tokens=1024.0), "window_tokens must be an integer, got 1024.0 .float.; write it"),
        (lambda: CacheConfig(evict_tokens=0.25), "evict_tokens must be an integer"),
        (lambda: CacheConfig(evict_tokens=True), "evict_tokens must be an integer, got True"),
        (lambda: AdapterConfig(rank="32"), "rank must be an integer, got '32' .str.; write it without quotes"),
        (lambda: AdapterConfig(targets="q_proj"), "targets must be a list, each item one of 'q_proj'"),
        (lambda: AdapterConfig(kind=3), "kind must be one of 'thought', .* got 3"),
        (lambda: AdapterConfig(checkpoint=3), "checkpoint must be a string"),
        (lambda: TrainConfig(learning_rate=True), "learning_rate must be a number, got True"),
        (lambda: TrainConfig(dynamic_sampling=1), "dynamic_sampling must be true or false, got 1"),
        (lambda: TrainConfig(steps=None), "steps must be an integer, got None"),
        (lambda: EvalConfig(pass_at=(1, 2.0)), r"pass_at\[1\] must be an integer, got 2.0"),
    ],
)
def test_a_value_of_another_type_is_refused_with_both_types(make, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_every_default_is_valid_and_no_section_can_be_changed_afterwards() -> None:
    config = ExperimentConfig()
    config.check_trainable()
    for section in SECTIONS:
        part = getattr(config, section)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, None)


def test_the_linear_maps_that_can_be_named_are_those_that_the_adapter_knows() -> None:
    assert get_args(LinearMap) == LINEAR_MAPS == AdapterConfig().targets


def test_the_cache_section_becomes_the_schedule_of_the_method() -> None:
    schedule = CacheConfig(window_tokens=64, evict_tokens=16).schedule
    assert (schedule.window_tokens, schedule.evict_tokens) == (64, 16)
    assert CacheConfig(policy="none").schedule.is_full


def test_the_file_of_these_tests_sets_every_field_to_another_value_than_its_default(tmp_path: Path) -> None:
    values = read_experiment_file(write(tmp_path, EVERY_FIELD))
    for section, cls in SECTIONS.items():
        assert set(values[section]) == {field.name for field in dataclasses.fields(cls)}
        for name, value in values[section].items():
            unchanged = getattr(getattr(ExperimentConfig(), section), name) == value
            assert not unchanged or (section, name) == ("rollout", "temperature"), f"{section}.{name}"


def test_a_file_and_the_flags_made_from_it_give_the_same_configuration(tmp_path: Path) -> None:
    path = write(tmp_path, EVERY_FIELD)
    assert tyro.cli(ExperimentConfig, args=flags_from_file(path)) == load_experiment(path)
    assert load_experiment(path).task.train_path == "--train\n x.jsonl"
    assert load_experiment(path).adapter.scale == 2.0


def test_flags_of_the_user_win_over_the_file_for_every_field(tmp_path: Path) -> None:
    """A file with every field, then flags with every default: what comes out are the defaults."""
    from_file = flags_from_file(write(tmp_path, EVERY_FIELD))
    user: list[str] = []
    for section in SECTIONS:
        for field in dataclasses.fields(getattr(ExperimentConfig(), section)):
            value = getattr(getattr(ExperimentConfig(), section), field.name)
            flag = f"--{section}.{field.name.replace('_', '-')}"
            if isinstance(value, bool):
                user.append(flag if value else f"--{section}.no-{field.name.replace('_', '-')}")
            else:
                user += [flag, *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    assert tyro.cli(ExperimentConfig, args=from_file + user) == ExperimentConfig()


def test_a_flag_may_repair_what_a_file_and_a_default_break_together(tmp_path: Path) -> None:
    path = write(tmp_path, "[cache]\nwindow_tokens = 24\n")
    with pytest.raises(ValueError, match=r"experiment.toml: \[cache\] window_tokens must be a multiple"):
        load_experiment(path)
    config = tyro.cli(ExperimentConfig, args=[*flags_from_file(path), "--cache.evict-tokens", "6"])
    assert config.cache == CacheConfig(window_tokens=24, evict_tokens=6)
    assert load_experiment(path, overrides={"cache.evict_tokens": 6}) == config


def test_a_broken_rule_ends_the_parser_with_the_rule(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(ExperimentConfig, args=["--train.group-size", "1"])
    assert "group_size must be at least 2, got 1" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_every_field_has_its_words_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(ExperimentConfig, args=["--help"])
    shown = capsys.readouterr().out
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            assert f"--{section}.{field.name.replace('_', '-')}" in shown
    files = [Path(configs.__file__).with_name(name) for name in ("config.py", "config_policy.py", "config_stages.py")]
    lines = "".join(path.read_text() for path in files).splitlines()
    for number, line in enumerate(lines[:-1]):
        if line.startswith("    ") and line[4:5].isalpha() and ": " in line and " = " in line and "(" not in line:
            assert lines[number + 1].strip().startswith('"""'), f"{line.strip()} has no docstring"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 3", r"experiment.toml: \[train\] has no key 'step'; did you mean 'steps'\?"),
        ("[train]\nlearnig_rate = 3", r"\[train\] has no key 'learnig_rate'; did you mean 'learning_rate'\?"),
        ("[train]\nwindow_tokens = 3", r"\[train\] has no key 'window_tokens'; window_tokens belongs in \[cache\]"),
        ("[train]\nzzz = 3", r"\[train\] has no key 'zzz'; known are steps, "),
        ("[trian]\nsteps = 3", r"unknown section \[trian\]; did you mean 'train'\?"),
        ("[qqqqq]\nsteps = 3", r"unknown section \[qqqqq\]; known are model, adapter"),
        ("steps = 3", r"steps must stand in a section; steps belongs in \[distill\] or \[train\]"),
        ("[rollout]\ntop_p = 0.9", r"\[rollout\] top_p is not offered: sampling would follow another distribution"),
        ("[eval]\ntop_k = 5", r"\[eval\] top_k is not offered: .*; use temperature"),
        ("[train]\nloss = 'ppo'", r"\[train\] loss must be one of 'grpo', 'dr_grpo', 'dapo', 'gspo', got 'ppo'"),
        ("[train]\nsteps = -1", r"experiment.toml: \[train\] steps must be at least 0, got -1"),
        ("[train\n", r"experiment.toml: the experiment file must be TOML in UTF-8: .*line 1"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_file_section_and_the_nearest_right_name(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load_experiment(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nsteps = 3.0", r"experiment.toml: \[train\] steps must be an integer, got 3.0 .float."),
        ("[train]\nlearning_rate = '1e-5'", r"\[train\] learning_rate must be a number, got '1e-5' .str.; write it w"),
        ("[run]\nname = 3", r"\[run\] name must be a string, got 3"),
        ("[run]\nlog_with = 'wandb'", r"\[run\] log_with must be a list"),
        ("[run]\nresume = 'yes'", r"\[run\] resume must be true or false"),
    ],
)
def test_a_wrong_type_in_a_file_is_named_with_file_section_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        load_experiment(write(tmp_path, text))


def test_a_missing_file_and_a_wrong_override_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="experiment file must exist, got .*nowhere.toml"):
        load_experiment(tmp_path / "nowhere.toml")
    path = write(tmp_path, "")
    assert load_experiment(path) == ExperimentConfig()
    with pytest.raises(ValueError, match=r"overrides: \[train\] has no key 'step'; did you mean 'steps'"):
        load_experiment(path, overrides={"train.step": 3})
    with pytest.raises(ValueError, match=r"overrides: unknown section \[trains\]; did you mean 'train'"):
        load_experiment(path, overrides={"trains.steps": 3})
    with pytest.raises(TypeError, match="train.steps must be an integer"):
        load_experiment(path, overrides={"train.steps": 3.5})
    with pytest.raises(ValueError, match="eval_paths must hold no item that starts with '-'"):
        flags_from_file(write(tmp_path, "[task]\neval_paths = ['-a']"))


@pytest.mark.parametrize("flag", ["--top-p", "--rollout.top_p=0.9", "--eval.top-k", "--rollout.top-p"])
def test_flags_for_top_p_and_top_k_are_refused_with_the_reason(flag: str) -> None:
    refuse_flags(["--train.steps", "5", "--run.name", "top_p"])
    with pytest.raises(ValueError, match=r"^--[a-z._-]+ is not offered: sampling would follow another distribution"):
        refuse_flags(["--train.steps", "5", flag, "0.9"])


def value_of(annotation: object) -> st.SearchStrategy:
    """Values that fit an annotation, as TOML would give them."""
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) is tuple:
        return st.lists(value_of(get_args(annotation)[0]), max_size=3)
    if type(None) in get_args(annotation):
        return st.none() | value_of(next(part for part in get_args(annotation) if part is not type(None)))
    return {
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**50), 2**50),
        str: st.text(),
    }[annotation]


ANNOTATIONS = sorted({a for cls in SECTIONS.values() for a in get_type_hints(cls).values()}, key=str)


@given(st.sampled_from(ANNOTATIONS).flatmap(lambda a: st.tuples(st.just(a), value_of(a))))
def test_a_value_fits_its_own_annotation_unchanged(pair: tuple[object, object]) -> None:
    annotation, value = pair
    fitted = fitting_value("name", value, annotation=annotation)
    assert fitted == (tuple(value) if isinstance(value, list) else value)
    assert fitting_value("name", fitted, annotation=annotation) == fitted
    assert not isinstance(fitted, int) or float not in (annotation, *get_args(annotation)), "an integer becomes a float"
    assert describe(annotation)


def test_reading_a_configuration_loads_neither_torch_nor_transformers() -> None:
    program = "import sys, pte.config_file; print(sorted({'torch', 'transformers', 'tyro'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"


def test_every_shipped_experiment_loads() -> None:
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.toml")):
        assert tyro.cli(ExperimentConfig, args=flags_from_file(path)) == load_experiment(path)


@pytest.mark.parametrize(
    ("options", "protected"),
    [
        ({"policy": "h2o"}, 512),
        ({"policy": "rkv"}, 256),
        ({"policy": "h2o", "window_tokens": 256, "evict_tokens": 256}, 0),
        ({"policy": "rkv", "window_tokens": 256, "evict_tokens": 256}, 0),
        ({"policy": "h2o", "recent_tokens": 7}, 7),
        ({"policy": "rkv", "recent_tokens": 0}, 0),
        ({"policy": "scissorhands"}, 10),
        ({"policy": "scissorhands", "window_tokens": 12, "evict_tokens": 4}, 8),
        ({"policy": "snapkv"}, 32),
        ({"policy": "snapkv", "window_tokens": 64, "evict_tokens": 16}, 16),
        ({"policy": "keydiff"}, 0),
        ({"policy": "keydiff", "recent_tokens": 9}, 9),
    ],
)
def test_the_default_of_recent_tokens_is_the_policy_s_and_leaves_room_for_a_block(
    options: dict[str, object], protected: int
) -> None:
    config = CacheConfig(**options)
    assert config.protected_tokens == protected
    policy = eviction_policy(config)
    assert (policy.name, policy.recent_tokens) == (config.policy, protected)
    policy.check(config.window_tokens, config.evict_tokens)
