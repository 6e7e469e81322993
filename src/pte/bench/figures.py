"""Every figure of the benchmark: its name, what it means, in which unit, and what it has to reach.

Decides: the one flat map that a run's JSON ends with. A figure is None where it was not measured, which is so for all
of the GPU on a CPU and the other way round. GPU figures are about Qwen2.5-7B in bfloat16, prompts of 128 tokens, a
window of 1024 tokens and blocks of 256, ratios within one file. Does not know how rows are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pte.bench.gpu_plan import GPU
from pte.bench.presets import CPU
from pte.bench.rows import Case, Row

if TYPE_CHECKING:
    from pte.bench.presets import Preset

Figures = dict[str, float | None]
Rows = Mapping[Case, Row]
FIGURE_MODEL = "7b"
WINDOW = GPU.window_tokens


@dataclass(frozen=True)
class Figure:
    """What a number means.

    Args:
        name: In the map.
        topic: The line of the README's table that it stands in.
        meaning: In words.
        unit: `x` for ratios.
        at_least: What it has to reach, or None.
        at_most: What it must not pass, or None.
        read: The number from the rows of a GPU run; None for figures of the CPU, which `run.py` makes.
    """

    name: str
    topic: str
    meaning: str
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    read: Callable[[Rows], float | None] | None = None

    @property
    def target(self) -> str:
        """What it has to reach, in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        return "" if self.at_most is None else f"at most {self.at_most:g}"


def cpu_figures(preset: Preset) -> tuple[Figure, ...]:
    """The figures of a CPU preset: rollout, growth, horizon, chain, step; each name ends with its length."""
    short, long = preset.figure_tokens, preset.long_tokens
    return (
        Figure(
            f"rollout_vs_generate_{short}",
            "CPU: rollout, tokens per CPU second against `generate`",
            "our tokens per CPU second / those of Transformers' `generate`; median over pairs run in turns",
            "x",
            at_least=1.5,
        ),
        Figure(
            f"train_growth_mb_{short}",
            "CPU: memory growth of one training step; 4096 tokens against 1024, `horizon`; the same, `chain`",
            "growth of resident memory at the peak of one step, `chain`, 10^6 bytes",
            "MB",
            at_most=60,
        ),
        Figure(
            f"train_growth_ratio_{long}_horizon",
            "CPU: memory growth of one training step; 4096 tokens against 1024, `horizon`; the same, `chain`",
            f"that growth at {long} tokens / at {short}, both in `horizon`",
            "x",
            at_most=1.05,
        ),
        Figure(
            f"train_growth_excess_chain_{long}",
            "CPU: memory growth of one training step; 4096 tokens against 1024, `horizon`; the same, `chain`",
            f"(growth at {long} tokens - growth at {short}, `chain`) / (bytes of keys and values evicted over {long} "
            f"tokens - over {short})",
            "x",
            at_most=1.1,
        ),
        Figure(
            f"train_step_vs_lora_{short}",
            "CPU: training step against `generate` + plain LoRA GRPO, CPU seconds",
            "CPU seconds of our step (rollout, replay forward and backward in `chain`, loss, clipping, AdamW) / those "
            "of `generate` + plain LoRA GRPO; median over pairs run in turns",
            "x",
            at_most=0.8,
        ),
    )


def number(rows: Rows, case: Case, *names: str) -> float | None:
    """A reading of a row."""
    row = rows.get(case)
    return None if row is None else row.number(*names)


def ratio(above: float | None, below: float | None) -> float | None:
    """A quotient, None where one side is missing or nothing can be divided by."""
    return above / below if above is not None and below else None


def step_seconds(rows: Rows, arm: str) -> float | None:
    """Seconds of a decode step at batch 128 under the window."""
    return number(rows, Case("rollout", arm, 128, WINDOW), "seconds_per_step", "median")


def roofline_fraction(batch: int) -> Callable[[Rows], float | None]:
    """Reads the share of the roofline that PTE reaches."""
    return lambda rows: number(rows, Case("rollout", "pte", batch, WINDOW), "roofline_fraction")


def completion_rate(rows: Rows, arm: str, tokens: int) -> float | None:
    """Tokens per second of whole completions."""
    bounded = arm not in ("full", "generate")
    case = Case("long", arm, GPU.long_batch if bounded else 0, WINDOW if bounded else None, tokens)
    return number(rows, case, "tokens_per_second")


def long_ratio(tokens: int) -> Callable[[Rows], float | None]:
    """Reads PTE's tokens per second over those of the fastest full cache that was measured."""

    def read(rows: Rows) -> float | None:
        full = [rate for arm in ("full", "generate") if (rate := completion_rate(rows, arm, tokens)) is not None]
        return ratio(completion_rate(rows, "pte", tokens), max(full, default=None))

    return read


def peak_ratio(mode: str) -> Callable[[Rows], float | None]:
    """Reads the peak of an update at 64K tokens over that at 2K."""

    def peak(rows: Rows, tokens: int) -> float | None:
        return number(rows, Case("update", mode, GPU.update_batch, WINDOW, tokens), "peak_bytes")

    return lambda rows: ratio(peak(rows, 65_536), peak(rows, 2048))


def update_mfu(rows: Rows) -> float | None:
    """Model FLOPs of the dense update over the measured matrix rate, of the faster way that was measured."""
    batch, tokens = GPU.dense_update
    cases = [Case("update", arm, batch, WINDOW, tokens) for arm in ("chain", "chain_checkpointed")]
    found = [share for case in cases if (share := number(rows, case, "model_flops_fraction")) is not None]
    return max(found, default=None)


def whole_step(arm: str) -> Case:
    """The case of a GRPO step."""
    sequences, tokens, _ = GPU.step
    return Case("step", arm, sequences, None if arm == "plain_lora" else WINDOW, tokens)


def step_peak_ratio(rows: Rows) -> float | None:
    """Peak of our step with gradient checkpointing over that of plain LoRA's with the library's."""
    ours, theirs = (number(rows, whole_step(arm), "peak_bytes") for arm in ("pte_checkpointed", "plain_lora"))
    return ratio(ours, theirs)


def capture_seconds(rows: Rows) -> float | None:
    """What a new process pays before tokens flow."""
    start = number(rows, Case("rollout", "start", 128, WINDOW), "first_run_seconds")
    more = number(rows, Case("rollout", "pte", 128, WINDOW), "warm_up_seconds")
    return None if start is None or more is None else start + max(0.0, more)


def repaid_rollouts(rows: Rows) -> float | None:
    """Rollouts of 128 x 3072 tokens after which that is repaid against `generate`."""
    fill = number(rows, Case("rollout", "pte", 128, WINDOW), "fill_seconds", "median")
    steady = step_seconds(rows, "pte")
    theirs = number(rows, Case("rollout", "generate", 128, None, 3072), "seconds_per_step", "median")
    paid = capture_seconds(rows)
    if fill is None or steady is None or theirs is None or paid is None:
        return None
    saved = 3072 * theirs - (fill + (3072 - WINDOW - 1) * steady)
    return paid / saved if saved > 0 else None


ROOFLINE = "7B: share of the serial roofline of a PTE decode step, 1K attended tokens, batch 1 / 64 / 128"
STATE = "7B: PTE's decode step against the same window without state (LoRA), batch 128"
LONG = "7B: rollout to 64K tokens, window 1024, against a full cache at its largest batch, tokens per second"
UPDATE = "7B: update, model FLOPs of the measured matrix rate"
FLAT = "7B: peak of an update at 64K tokens against 2K, `horizon` / `chain`"
PEAK = "7B: peak of one GRPO step at 3K tokens against full-cache LoRA with checkpointing"
STEP = ("seconds_per_step", "median")
FLOAT8_ARMS = ("float8", "bfloat16")
START = "7B: seconds of compilation, graph capture and warm-up / rollouts that repay them"
GPU_FIGURES: tuple[Figure, ...] = (
    *(
        Figure(
            f"roofline_fraction_7b_b{batch}",
            ROOFLINE,
            f"bound / measured seconds of a PTE decode step at batch {batch}, steady state",
            "x",
            at_least=share,
            read=roofline_fraction(batch),
        )
        for batch, share in ((1, 0.70), (64, 0.75), (128, 0.80))
    ),
    Figure(
        "state_step_ratio_7b_b128",
        STATE,
        "seconds of a PTE decode step / of one of LoRA under the same window, batch 128",
        "x",
        at_most=1.05,
        read=lambda rows: ratio(step_seconds(rows, "pte"), step_seconds(rows, "window_lora")),
    ),
    Figure(
        "adapter_step_ratio_7b_b128",
        "",
        "seconds of a PTE decode step / of one of the base alone under the same window, batch 128",
        "x",
        read=lambda rows: ratio(step_seconds(rows, "pte"), step_seconds(rows, "window")),
    ),
    *(
        Figure(
            f"long_rollout_ratio_{tokens // 1024}k",
            LONG if tokens == 65_536 else "",
            f"PTE's tokens per second over completions of {tokens} tokens, batch {GPU.long_batch} / those of the "
            "fastest full cache that was measured (ours or `generate`) at its largest batch",
            "x",
            at_least=12.0 if tokens == 65_536 else None,
            read=long_ratio(tokens),
        )
        for tokens in GPU.lengths
    ),
    Figure(
        "update_mfu_7b",
        UPDATE,
        "model FLOPs of an update per second / measured matrix rate, `chain`, 16 completions of 4096 tokens, the "
        "faster that fits of with and without gradient checkpointing",
        "x",
        at_least=0.50,
        read=update_mfu,
    ),
    Figure(
        "update_peak_ratio_64k",
        FLAT,
        "peak bytes of an update on 4 completions of 65,536 tokens / of 2048 tokens, `horizon`, weights included",
        "x",
        at_most=1.05,
        read=peak_ratio("horizon"),
    ),
    Figure(
        "update_peak_ratio_64k_chain",
        FLAT,
        "the same in `chain`, whose evicted keys and values wait in host memory",
        "x",
        at_most=1.05,
        read=peak_ratio("chain"),
    ),
    Figure(
        "step_peak_vs_lora_3k",
        PEAK,
        "peak bytes of a GRPO step on 64 completions of 3072 tokens, micro-batches of 8, `chain` with our gradient "
        "checkpointing / of plain LoRA under a full cache with the library's, weights included and 2^24 logits at a "
        "time on both sides",
        "x",
        at_most=0.55,
        read=step_peak_ratio,
    ),
    Figure(
        "step_state_fraction_7b",
        "",
        "share of folding and reading the state, outside the decode kernels, in the wall time of that step",
        "x",
        read=lambda rows: number(rows, whole_step("pte"), "state_fraction"),
    ),
    Figure(
        "graph_capture_seconds",
        START,
        "seconds of the first rollout of 4 tokens in a process, batch 128 (no compiled kernel found; kernels compiled, "
        "graph captured and replayed, prompts read), and what the first full rollout takes longer than later ones",
        "s",
        read=capture_seconds,
    ),
    Figure(
        "graph_capture_repaid_rollouts",
        START,
        "these seconds / (seconds of 128 completions of 3072 tokens by `generate`, steps at half the length, prompts "
        "not counted - by PTE, the run that fills the window and steady steps)",
        "",
        at_most=10,
        read=repaid_rollouts,
    ),
    Figure(
        "float8_step_ratio_7b_b128",
        "",
        "seconds of a PTE decode step with linear maps and cache in float8 / of one in bfloat16, batch 128",
        "x",
        read=lambda rows: ratio(*(number(rows, Case("float8", arm, 128, WINDOW), *STEP) for arm in FLOAT8_ARMS)),
    ),
    *(
        Figure(
            f"{arm}_gap_7b",
            "",
            f"mean difference of rollout's and replay's log-probs in {arm}, random weights, batch 128",
            "nats",
            read=lambda rows, arm=arm: number(rows, Case("float8", arm, 128, WINDOW), "gap", "mean"),  # type: ignore[misc]
        )
        for arm in FLOAT8_ARMS
    ),
)
FIGURES: tuple[Figure, ...] = (*cpu_figures(CPU), *GPU_FIGURES)


def flat_figures(measured: Mapping[str, float | None]) -> Figures:
    """All figures by name, None where `measured` has none; names that are in `measured` alone come last."""
    return {**{figure.name: measured.get(figure.name) for figure in FIGURES}, **measured}


def gpu_figures(rows: Rows, *, model: str) -> Figures:
    """The figures of a GPU run; those of another model than the one that they are about are all None."""
    about = model == FIGURE_MODEL
    return flat_figures({figure.name: figure.read(rows) for figure in GPU_FIGURES if about and figure.read is not None})
