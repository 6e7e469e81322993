"""`--preset gpu` through its own command, on a CPU with the tiny model: all parts, one file, nothing lost, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from pte.bench import arms, gpu_rollout
from pte.bench.__main__ import main
from pte.bench.arms import OurRollout, attached
from pte.bench.device import empty_kernel_cache
from pte.bench.figures import FIGURES
from pte.bench.gpu_plan import TINY
from pte.bench.gpu_report import gpu_table
from pte.bench.gpu_rollout import START_TOKENS
from pte.bench.gpu_run import PARTS, run_gpu
from pte.bench.plain import generate
from pte.bench.rows import Case, Row
from pte.bench.workload import random_ids
from pte.model.load import linear_maps
from pte.model.policy import BoundedPolicy
from pte.plan.shapes import SHAPES, random_base
from pte.rollout.generate import RolloutEngine
from pte.rollout.token_step import TokenStep
from pte.timing import SPANS

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

# Everything of the package's dependencies that the benchmark has no right to.
WITHOUT_THE_REST = """
import importlib.util, sys
absent = {"accelerate", "jinja2", "math_verify", "matplotlib", "rich", "tyro"}
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in absent else find_spec(name, package)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from pte.bench.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
TINY_RUN = ["--preset", "gpu", "--model", "tiny", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
# A busy machine may stop for longer than a tiny run takes.
NO_DIFFERENCE = ("vllm is not installed", "the clock sees", "a line can be drawn through")


def rows_of(report: dict) -> dict[Case, Row]:
    return {row.case: row for row in map(Row.from_json, report["rows"])}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """What the command prints, and the file that it leaves, where only the core's dependencies are installed."""
    output = tmp_path_factory.mktemp("bench") / "tiny.json"
    command = [sys.executable, "-c", WITHOUT_THE_REST, *TINY_RUN, "--output", str(output)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "path: eager" in done.stderr, "the log names the way in which tokens were computed"
    return done.stdout, json.loads(output.read_text())


def test_a_run_has_every_row_of_every_part_measured_or_with_a_reason(whole_run: tuple[str, dict]) -> None:
    rows = rows_of(whole_run[1])
    assert list(rows) == [case for cases, _ in PARTS.values() for case in cases(TINY)]
    missing = {case: row.not_measured for case, row in rows.items() if row.not_measured is not None}
    assert all(any(words in reason for words in NO_DIFFERENCE) for reason in missing.values()), missing
    assert sum(case.arm != "vllm" for case in missing) < len(rows) / 4
    assert not any(row.failed for row in rows.values())


def test_the_last_line_is_the_file_and_its_figures_are_all_null(whole_run: tuple[str, dict]) -> None:
    printed, report = whole_run
    assert json.loads(printed.splitlines()[-1]) == report
    assert list(report["figures"]) == [figure.name for figure in FIGURES]
    assert set(report["figures"].values()) == {None}, "figures are about the 7B model"
    assert set(report["parts"]) == set(PARTS)
    for part in report["parts"].values():
        assert part["rates"]["bytes_per_second"] > 0 and part["rates"]["flops_per_second"] > 0
        assert part["versions"]["torch"] == torch.__version__ and "commit" in part


def test_the_table_keeps_within_120_columns(whole_run: tuple[str, dict]) -> None:
    table = whole_run[0].splitlines()[:-1]
    assert max(map(len, table)) <= 120
    for part in PARTS:
        assert any(line.startswith(f"{part}: ") for line in table)


def test_rows_hold_what_they_say(whole_run: tuple[str, dict]) -> None:
    rows = {case: row for case, row in rows_of(whole_run[1]).items() if row.not_measured is None}
    for case, row in rows.items():
        for name in ("seconds_per_step", "seconds"):
            low, middle, high = (row.number(name, key) for key in ("min", "median", "max"))
            if middle is not None:
                assert low <= middle <= high and 1 <= row.number(name, "repeats") <= 8
        if row.number("roofline_fraction") is not None:
            bound, median = row.number("bound_seconds_per_step"), row.number("seconds_per_step", "median")
            assert row.number("roofline_fraction") == pytest.approx(bound / median)
        if case.part == "rollout" and row.number("seconds_per_step", "median"):
            assert row.number("tokens_per_second") == pytest.approx(
                case.batch / row.number("seconds_per_step", "median")
            )
    # Window 8, blocks of 4, prompt 3: 11 slots of 2 layers x 2 sides x 2 heads x 8 numbers x 2 bytes, two sequences.
    assert rows[Case("rollout", "pte", 2, 8)].number("cache_bytes") == 2 * 11 * 128
    # A state of 4 x 4 float32 numbers for each of two layers and two sequences; none without one.
    assert rows[Case("rollout", "pte", 2, 8)].number("state_bytes") == 2 * 2 * 4 * 4 * 4
    assert rows[Case("rollout", "window_lora", 2, 8)].number("state_bytes") == 0
    # Steady state: 3 prompt tokens, 4 to 7 kept and the token itself, on average 6.5.
    assert rows[Case("rollout", "pte", 2, 8)].number("attended_tokens") == 3 + 6.5


def test_a_step_s_spans_are_all_named_and_sum_to_its_time(whole_run: tuple[str, dict]) -> None:
    row = rows_of(whole_run[1])[Case("step", "pte", 2, 8, 24)]
    spans = row.values["spans"]
    assert list(spans) == [*SPANS, "other"]
    assert sum(spans.values()) == pytest.approx(row.number("clocked_seconds"))
    busy = {"prefill", "decode", "fold", "read", "reward", "forward", "backward", "optimizer"}
    assert {name for name, seconds in spans.items() if seconds > 0} >= busy


def test_only_the_update_whose_evicted_tokens_wait_reports_their_bytes(whole_run: tuple[str, dict]) -> None:
    updates = {case: row for case, row in rows_of(whole_run[1]).items() if case.part == "update"}
    assert {case.arm for case, row in updates.items() if row.number("evicted_bytes") is not None} == {
        "chain",
        "chain_checkpointed",
    }
    # 32 tokens, window 8, blocks of 4: evictions before tokens 8, 12, ... 28, of 4 tokens x 128 bytes, two sequences.
    assert updates[Case("update", "chain", 2, 8, 32)].number("evicted_bytes") == 2 * 6 * 4 * 128


def test_parts_run_one_by_one_add_up_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "parts.json"
    arguments = [*TINY_RUN, "--output", str(output), "--part"]
    assert main([*arguments, "kernels"]) == 0
    before = rows_of(json.loads(output.read_text()))
    assert {case.part for case in before} == {"kernels"}
    assert main([*arguments, "update"]) == 0
    report = json.loads(output.read_text())
    after = rows_of(report)
    assert {case: row for case, row in after.items() if case.part == "kernels"} == before
    assert {case.part for case in after} == set(report["parts"]) == {"kernels", "update"}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == report


def test_a_killed_run_loses_no_row_and_the_same_command_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "killed.json"
    arguments = [*TINY_RUN, "--part", "update", "--output", str(output)]
    running = subprocess.Popen(
        [sys.executable, "-m", "pte.bench", *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not output.exists() or len(json.loads(output.read_text())["rows"]) < 2):
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = rows_of(json.loads(output.read_text()))
    whole = PARTS["update"][0](TINY)
    assert 2 <= len(kept) < len(whole)
    assert main(arguments) == 0
    after = rows_of(json.loads(output.read_text()))
    assert {case: after[case] for case in kept} == kept, "what was measured is not measured again"
    assert set(after) == set(whole)


def test_a_part_that_runs_out_of_time_keeps_what_it_has_and_names_the_rest(tmp_path: Path) -> None:
    output = tmp_path / "short.json"
    plan = replace(TINY, part_seconds=1e-9)
    run_gpu("tiny", "cpu", parts=["kernels"], output=output, plan=plan)
    rows = rows_of(json.loads(output.read_text()))
    assert list(rows) == PARTS["kernels"][0](TINY)
    assert all("left out for time" in row.not_measured for row in rows.values())


def test_a_row_that_fails_is_reported_and_the_others_are_measured(tmp_path: Path) -> None:
    # A prompt beyond the model's 512 positions is refused by the engine; pieces of a step need no positions.
    plan = replace(TINY, prompt_tokens=600, batches=(1,), windows=(8,))
    output = tmp_path / "failed.json"
    with pytest.raises(RuntimeError, match="5 rows failed, the others are kept: rollout: start, .*trained positions"):
        run_gpu("tiny", "cpu", parts=["rollout", "kernels"], output=output, plan=plan)
    rows = rows_of(json.loads(output.read_text()))
    assert {case.arm for case, row in rows.items() if row.failed} == {"start", "pte", "window_lora", "window", "full"}
    assert all(row.not_measured is None for case, row in rows.items() if case.part == "kernels")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpux"], "preset must be one of cpu, gpu, got 'gpux'"),
        (["--preset", "gpu", "--model", "70b"], "model must be one of tiny, 3b, 7b, 8b, got '70b'"),
        (["--preset", "gpu", "--model", "7b", "--device", "cpu"], "device cpu is for model tiny alone"),
        (["--preset", "gpu", "--model", "tiny", "--device", "tpu"], "device must be cuda or cpu, got 'tpu'"),
        (
            [*TINY_RUN, "--part", "rollouts"],
            "part must be one of rollout, long, update, step, kernels, float8, got 'rollouts'",
        ),
        (["--part", "rollout"], "part is an option of preset gpu, got ('rollout',) with cpu"),
        (["--model", "7b"], "model is an option of preset gpu"),
    ],
)
def test_bad_requests_are_refused_before_any_work(arguments: list[str], message: str, capsys) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and "bench:" not in err.replace("pte.bench:", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_remedy_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "gpu"]) == 2
    assert "--device cpu --model tiny" in capsys.readouterr().err


def test_a_file_of_the_other_preset_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "cpu.json"
    output.write_text('{"figures": {}, "preset": {"name": "cpu"}}')
    assert main([*TINY_RUN, "--output", str(output)]) == 2
    assert "output must hold rows of preset 'gpu'" in capsys.readouterr().err
    assert json.loads(output.read_text()) == {"figures": {}, "preset": {"name": "cpu"}}


def test_generate_goes_on_from_a_filled_cache_as_if_it_had_read_it() -> None:
    base = random_base(SHAPES["tiny"])
    prompts = random_ids(64, batch=2, tokens=9)
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        base(input_ids=torch.tensor(prompts)[:, :-1], past_key_values=cache, use_cache=True)
    torch.manual_seed(7)
    whole = generate(base, prompts, new_tokens=6)
    torch.manual_seed(7)
    assert torch.equal(generate(base, prompts, new_tokens=6, cache=cache), whole)
    assert cache.get_seq_length() == 9 + 5, "the cache that was given is the one that went on"


def test_an_adapter_that_was_measured_leaves_the_base_as_it_was() -> None:
    base = random_base(SHAPES["tiny"])
    prompts = random_ids(64, batch=2, tokens=5)

    def sampled() -> list[tuple[int, ...]]:
        rollout = OurRollout(BoundedPolicy(base, None, TINY.schedule(8)), prompts)
        return [one.completion_ids for one in rollout.sample(20, seed=0)]

    plain = sampled()
    with attached(base, "thought", rank=4, global_tokens=3) as adapter:
        adapted = OurRollout(BoundedPolicy(base, adapter, TINY.schedule(8)), prompts).sample(20, seed=0)
        assert [one.completion_ids for one in adapted] != plain
    assert sampled() == plain
    assert {type(linear) for linear in linear_maps(base)} == {torch.nn.Linear}, "the next adapter finds a free base"


def test_the_start_runs_a_step_as_it_is_then_one_to_capture_and_one_to_replay(monkeypatch) -> None:
    calls: list[int] = []
    advance = TokenStep.__call__

    def counted(self: TokenStep, **arguments: object) -> None:
        calls.append(arguments["longest"])
        advance(self, **arguments)

    monkeypatch.setattr(TokenStep, "__call__", counted)
    OurRollout(
        BoundedPolicy(random_base(SHAPES["tiny"]), None, TINY.schedule(8)), random_ids(64, batch=2, tokens=5)
    ).run(START_TOKENS, 0)
    assert len(calls) == 3


def test_our_arms_look_for_an_end_token_that_no_draw_gives(monkeypatch) -> None:
    engines: list[RolloutEngine] = []

    class SeenEngine(RolloutEngine):
        def __init__(self, *arguments: object, **settings: object) -> None:
            super().__init__(*arguments, **settings)
            engines.append(self)

    monkeypatch.setattr(arms, "RolloutEngine", SeenEngine)
    rollout = OurRollout(BoundedPolicy(random_base(SHAPES["tiny"]), None, TINY.schedule(8)), [(1, 2, 3)])
    (completed,) = rollout.sample(20, seed=0)
    (engine,) = engines
    assert engine.stop_token_ids == {SHAPES["tiny"].vocab}
    assert completed.finish_reason == "length" and len(completed.completion_ids) == 20


def test_compiled_kernels_of_earlier_processes_are_out_of_sight_within_the_block(monkeypatch) -> None:
    for before in ("/somewhere", None):
        if before is None:
            monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        else:
            monkeypatch.setenv("TRITON_CACHE_DIR", before)
        with pytest.raises(KeyError), empty_kernel_cache():
            folder = Path(os.environ["TRITON_CACHE_DIR"])
            assert str(folder) != before and list(folder.iterdir()) == []
            raise KeyError
        assert os.environ.get("TRITON_CACHE_DIR") == before and not folder.exists()


def test_first_rollouts_alone_are_measured_without_compiled_kernels(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/somewhere")
    seen: list[tuple[int, bool]] = []

    class SeenRollout(OurRollout):
        def run(self, tokens: int, seed: int) -> None:
            seen.append((tokens, os.environ["TRITON_CACHE_DIR"] != "/somewhere"))
            super().run(tokens, seed)

    monkeypatch.setattr(gpu_rollout, "OurRollout", SeenRollout)
    monkeypatch.setitem(PARTS, "rollout", (lambda plan: gpu_rollout.rollout_cases(plan)[:2], PARTS["rollout"][1]))
    run_gpu("tiny", "cpu", parts=["rollout"], output=tmp_path / "start.json")
    assert seen[:3] == [(START_TOKENS, True), (START_TOKENS, False), (START_TOKENS, False)]
    assert seen[3] == (9, True) and len(seen) > 4
    assert not any(empty for _, empty in seen[4:])


def test_a_reason_is_told_below_its_table() -> None:
    row = Row(Case("long", "full", 0, None, 80), "c1", {}, "out of memory: " + "a long story " * 20)
    lines = list(gpu_table([row], "tiny", device="a GPU"))
    told = lines[lines.index(next(line for line in lines if "not measured" in line)) :]
    assert len(told) > 1 and "long: full, largest batch, 80 tokens: out of memory" in told[0]
