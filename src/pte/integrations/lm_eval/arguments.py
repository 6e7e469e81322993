"""What the harness passes as text, as what pte means by it: model arguments and a request's generation options.

Decides: which names model arguments have (fields of an experiment by dotted name, a few short ones), their order of
precedence (experiment file, saved adapter, the user's words), and which generation options a bounded policy can follow;
all others are refused by name. Which values a field may hold, `pte.config` says.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pte.config_file import REFUSED, load_experiment, read_experiment_file
from pte.config_rules import require
from pte.lora_folder import saved_fields
from pte.rollout.sampling import check_temperature
from pte.tasks.suites import sampling_temperature

if TYPE_CHECKING:
    from pte.config import ExperimentConfig
    from pte.config_rules import FieldValue

SHORT_NAMES = {
    "pretrained": "model.path",
    "dtype": "model.dtype",
    "device": "model.device",
    "trust_remote_code": "model.trust_remote_code",
    "adapter": "adapter.checkpoint",
    "policy": "cache.policy",
    "window_tokens": "cache.window_tokens",
    "evict_tokens": "cache.evict_tokens",
    "slots": "rollout.slots",
    "max_new_tokens": "eval.max_new_tokens",
    "temperature": "eval.temperature",
    "seed": "run.seed",
}
SECTIONS = ("model", "adapter", "cache")
FIELDS = ("rollout.slots", "rollout.temperature", "eval.max_new_tokens", "eval.temperature", "run.seed")
WORD_NONE = ("adapter.kind", "cache.policy")
NAMES = ("model.path", "adapter.checkpoint")
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
WITHOUT_EFFECT: dict[str, tuple[object, ...]] = {
    "top_p": (1, None),
    "top_k": (0, -1, None),
    "num_beams": (1,),
    "repetition_penalty": (1,),
}


@dataclass(frozen=True)
class Sampling:
    """How a completion is drawn and where it ends.

    Args:
        until: Strings that end it; none is part of it.
        max_new_tokens: Tokens at most.
        temperature: 0 for greedy.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    temperature: float


def experiment_of(arguments: Mapping[str, FieldValue]) -> ExperimentConfig:
    """The experiment that model arguments describe; the base alone where they name no adapter.

    Args:
        arguments: Short names, dotted names of fields, and `experiment` for an experiment file.

    Raises:
        ValueError, TypeError, FileNotFoundError: A name is unknown, a value breaks a rule, or a file is missing.
    """
    given = dict(arguments)
    path = given.pop("experiment", None)
    fields = {_field_of(name): value for name, value in given.items()}
    if len(fields) < len(given):
        raise ValueError(f"model arguments must name each field once, got {', '.join(given)}; drop the repetition")
    # The harness tells types by looks: the word none is None, a name may look like a number.
    for name in WORD_NONE:
        if name in fields and fields[name] is None:
            fields[name] = "none"
    for name in NAMES:
        if fields.get(name) is not None:
            fields[name] = str(fields[name])
    file = None if path is None else str(path)
    written = {} if file is None else read_experiment_file(file).get("adapter", {})
    checkpoint = fields.get("adapter.checkpoint", written.get("checkpoint"))
    if checkpoint is not None:
        fields = {**saved_fields(str(checkpoint)), **fields}
    config = load_experiment(file, overrides=fields)
    require(
        config.eval.state_control == "own",
        "eval.state_control",
        rule="be 'own' in the harness",
        value=config.eval.state_control,
        remedy="use pte eval for controls",
    )
    if checkpoint is not None or "adapter.kind" in fields:
        return config
    return replace(config, adapter=replace(config.adapter, kind="none"))


def _field_of(name: str) -> str:
    """The dotted name of the field that a model argument sets."""
    field = SHORT_NAMES.get(name, name.replace("-", "_"))
    section, dot, _ = field.partition(".")
    if not dot:
        close = difflib.get_close_matches(name, (*SHORT_NAMES, "experiment"), n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "write section.field for any field of an experiment"
        raise ValueError(
            f"model arguments must be among experiment, {', '.join(SHORT_NAMES)} or fields of an experiment, got "
            f"{name!r}; {remedy}"
        )
    if section not in SECTIONS and field not in FIELDS:
        raise ValueError(
            f"model arguments must be fields of {', '.join(SECTIONS)} or {', '.join(FIELDS)}, got {name!r}: problems, "
            f"samples and scores are the harness's; drop it"
        )
    return field


def sampling_of(options: Mapping[str, object], config: ExperimentConfig) -> Sampling:
    """How a request wants its completion: what it leaves open is the experiment's.

    Args:
        options: Generation options of a task and of `--gen_kwargs`.
        config: Its sections eval and rollout are read.

    Raises:
        ValueError, TypeError: An option that a bounded policy does not have, or a value that makes no sense.
    """
    rest = dict(options)
    until = rest.pop("until", None)
    stops = [] if until is None else [until] if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
        raise TypeError(f"until must be strings of a character or more, got {until!r}; write for example ['\\n']")
    lengths = {name: rest.pop(name) for name in LENGTH_NAMES if name in rest}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"the longest completion must be given once, got {lengths}; leave max_gen_toks alone")
    length = next(iter(lengths.values()), config.eval.max_new_tokens)
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"max_gen_toks must be an integer of at least 1, got {length!r}; use for example 256")
    sample, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    for name, value in rest.items():
        if value not in WITHOUT_EFFECT.get(name, ()):
            reason = REFUSED.get(name, "the bounded policy knows until, max_gen_toks, do_sample and temperature")
            neutral = f", or use --gen_kwargs {name}={WITHOUT_EFFECT[name][0]}" if name in WITHOUT_EFFECT else ""
            raise ValueError(f"{name}={value!r} is not offered: {reason}; drop it from the task's options{neutral}")
    return Sampling(tuple(stops), length, _temperature(sample, temperature, config))


def _temperature(sample: object, temperature: object, config: ExperimentConfig) -> float:
    """The temperature that `do_sample` and `temperature` mean together; do_sample=false is greedy, as everywhere."""
    if sample is False:
        return 0.0
    if temperature is None:
        return sampling_temperature(config) if sample else config.eval.temperature
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a number, got {temperature!r}; use for example 0.6")
    check_temperature(temperature)
    if sample and temperature == 0:
        raise ValueError("temperature must be above 0 with do_sample=true, got 0; use do_sample=false for greedy")
    return float(temperature)
