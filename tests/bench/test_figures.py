"""The figures: all named in one place, read from the right rows, null where nothing was measured; and the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from pte.bench.figures import FIGURES, flat_figures, gpu_figures
from pte.bench.gpu_plan import GPU
from pte.bench.gpu_rollout import long_cases, rollout_cases
from pte.bench.gpu_step import step_cases
from pte.bench.gpu_update import update_cases
from pte.bench.rows import Case, Row, Values
from pte.bench.table import BEGIN, END, bench_table, with_table

ROOT = Path(__file__).parents[2]
ASKED_FOR = {
    "rollout_vs_generate_1024",
    "train_step_vs_lora_1024",
    "roofline_fraction_7b_b1",
    "roofline_fraction_7b_b64",
    "roofline_fraction_7b_b128",
    "state_step_ratio_7b_b128",
    "long_rollout_ratio_64k",
    "update_mfu_7b",
    "update_peak_ratio_64k",
    "step_peak_vs_lora_3k",
    "graph_capture_seconds",
}


def step(seconds: float, **more: float) -> Values:
    return {"seconds_per_step": {"median": seconds, "min": 0.0, "max": 9.0}, **more}


# One row for everything that a figure reads, with numbers that are easy to divide.
MEASURED: dict[Case, Values] = {
    Case("rollout", "start", 128, 1024): {"first_run_seconds": 20.0},
    Case("rollout", "pte", 128, 1024): {
        **step(0.0063, roofline_fraction=0.8, warm_up_seconds=10.0),
        "fill_seconds": {"median": 2.0},
    },
    Case("rollout", "pte", 64, 1024): step(0.005, roofline_fraction=0.7),
    Case("rollout", "pte", 1, 1024): step(0.004, roofline_fraction=0.6),
    Case("rollout", "window_lora", 128, 1024): step(0.006),
    Case("rollout", "window", 128, 1024): step(0.005),
    Case("rollout", "generate", 128, None, 3072): step(0.02),
    Case("long", "pte", 256, 1024, 3072): {"tokens_per_second": 32_768.0},
    Case("long", "pte", 256, 1024, 65_536): {"tokens_per_second": 30_000.0},
    Case("long", "generate", 0, None, 3072): {"tokens_per_second": 8192.0},
    Case("long", "full", 0, None, 65_536): {"tokens_per_second": 2000.0},
    Case("long", "generate", 0, None, 65_536): {"tokens_per_second": 1500.0},
    Case("update", "chain", 16, 1024, 4096): {"model_flops_fraction": 0.55},
    Case("update", "chain_checkpointed", 16, 1024, 4096): {"model_flops_fraction": 0.45},
    Case("update", "horizon", 4, 1024, 2048): {"peak_bytes": 40_000},
    Case("update", "horizon", 4, 1024, 65_536): {"peak_bytes": 41_000},
    Case("update", "chain", 4, 1024, 2048): {"peak_bytes": 40_000},
    Case("update", "chain", 4, 1024, 65_536): {"peak_bytes": 44_000},
    Case("step", "pte", 64, 1024, 3072): {"peak_bytes": 45, "state_fraction": 0.1},
    Case("step", "pte_checkpointed", 64, 1024, 3072): {"peak_bytes": 30, "state_fraction": 0.2},
    Case("step", "plain_lora", 64, None, 3072): {"peak_bytes": 60},
}
ROWS = {case: Row(case, "c1", values) for case, values in MEASURED.items()}


def test_the_figures_that_were_asked_for_are_there_each_once_with_a_meaning() -> None:
    names = [figure.name for figure in FIGURES]
    assert len(set(names)) == len(names) and set(names) >= ASKED_FOR
    assert all(figure.meaning for figure in FIGURES)
    assert not any(figure.at_least is not None and figure.at_most is not None for figure in FIGURES)


def test_gpu_figures_by_hand() -> None:
    measured = {name: value for name, value in gpu_figures(ROWS, model="7b").items() if value is not None}
    assert measured == {
        "roofline_fraction_7b_b1": 0.6,
        "roofline_fraction_7b_b64": 0.7,
        "roofline_fraction_7b_b128": 0.8,
        "state_step_ratio_7b_b128": pytest.approx(1.05),
        "adapter_step_ratio_7b_b128": pytest.approx(1.26),
        # 32,768 / 8192; at 64K against the faster full cache, 30,000 / 2000.
        "long_rollout_ratio_3k": 4.0,
        "long_rollout_ratio_64k": 15.0,
        "update_mfu_7b": 0.55,
        "update_peak_ratio_64k": pytest.approx(1.025),
        "update_peak_ratio_64k_chain": pytest.approx(1.1),
        "step_peak_vs_lora_3k": 0.5,
        "step_state_fraction_7b": 0.1,
        "graph_capture_seconds": 30.0,
        # 3072 steps of 20 ms by generate, 61.44 s; by PTE 2 s until 1025 tokens are there, 2047 steps of 6.3 ms.
        "graph_capture_repaid_rollouts": pytest.approx(30 / (61.44 - 14.8961)),
    }


@pytest.mark.parametrize("missing", MEASURED, ids=lambda case: case.label)
def test_a_figure_without_its_row_is_null_and_the_others_stay(missing: Case) -> None:
    whole, rest = gpu_figures(ROWS, model="7b"), {case: row for case, row in ROWS.items() if case != missing}
    without = gpu_figures(rest, model="7b")
    changed = {name for name in whole if without[name] != whole[name]}
    # The slower full cache takes the place of the faster one.
    allowed = {"long_rollout_ratio_64k"} if missing.arm in ("full", "generate") else set()
    # So does the slower way of the dense update. Without the slower one nothing changes.
    allowed |= {"update_mfu_7b"} if missing.part == "update" and missing.batch == 16 else set()
    slower = (Case("long", "generate", 0, None, 65_536), Case("update", "chain_checkpointed", 16, 1024, 4096))
    assert changed or missing in slower
    assert all(without[name] is None for name in changed - allowed)


def test_what_is_never_repaid_has_no_number_of_rollouts() -> None:
    case = Case("rollout", "generate", 128, None, 3072)
    # 3072 steps of 4 ms are 12.3 s, PTE takes 14.9 s.
    rows = {**ROWS, case: Row(case, "c1", step(0.004))}
    assert gpu_figures(rows, model="7b")["graph_capture_repaid_rollouts"] is None


def test_a_row_without_a_measurement_makes_no_figure() -> None:
    case = Case("rollout", "pte", 128, 1024)
    rows = {**ROWS, case: Row(case, "c1", {}, "out of memory")}
    assert gpu_figures(rows, model="7b")["roofline_fraction_7b_b128"] is None


def test_figures_of_another_model_are_null() -> None:
    assert set(gpu_figures(ROWS, model="8b").values()) == {None}
    assert list(gpu_figures(ROWS, model="8b")) == [figure.name for figure in FIGURES] == list(flat_figures({}))


def test_the_gpu_run_measures_every_row_that_a_figure_reads() -> None:
    cases = {*rollout_cases(GPU), *long_cases(GPU), *update_cases(GPU), *step_cases(GPU)}
    assert set(MEASURED) <= cases


def test_the_table_has_a_line_for_each_measured_topic_and_one_for_the_rest() -> None:
    figures = flat_figures({"rollout_vs_generate_1024": 1.5366, "roofline_fraction_7b_b1": 0.7123})
    lines = bench_table({"benchmarks/baselines/a-b.json": {"figures": figures}})
    link = "[a-b](benchmarks/baselines/a-b.json)"
    assert lines[2] == f"| CPU: rollout, tokens per CPU second against `generate` | 1.537 x | at least 1.5 | {link} |"
    assert lines[3].endswith(
        f"| 0.7123 x / not measured / not measured | at least 0.7 / at least 0.75 / at least 0.8 | {link} |"
    )
    assert len(lines) == 5 and "`update_mfu_7b`" in lines[4] and "not measured" in lines[4]


def test_two_machines_have_a_line_each() -> None:
    kept = {"figures": flat_figures({"rollout_vs_generate_1024": 2.0})}
    assert len(bench_table({"a.json": kept, "b.json": kept})) == 5


def test_a_page_without_its_markers_is_refused_and_one_with_them_keeps_all_else() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter"
    assert with_table(page, ["| new |"]) == f"before\n{BEGIN}\n| new |\n{END}\nafter"
    assert with_table(with_table(page, ["| new |"]), ["| new |"]) == with_table(page, ["| new |"])
    for wrong in ("no markers", f"{END}\n{BEGIN}", page + page):
        with pytest.raises(ValueError, match="the page must hold"):
            with_table(wrong, [])


def test_the_benchmark_s_page_says_of_every_figure_what_the_code_says() -> None:
    lines = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines()
    for figure in FIGURES:
        assert f"| `{figure.name}` | {figure.meaning} | {figure.target} |" in lines, figure.name
