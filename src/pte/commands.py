"""What each command does with its arguments: build, run with a progress bar, print a table, write a summary.

Decides: what a person sees, and which commands share their work between the processes of a launcher; the first of them
alone prints and writes. Does not know how anything is computed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from pte.compare import compare
from pte.dry_run import dry_run
from pte.eval_command import eval_command, evaluate_sets, evaluation_table
from pte.learn.stage import StepResult
from pte.learn.trainer import Run, open_run, train
from pte.progress import bar
from pte.ranks import Ranks, launched_size, open_ranks
from pte.report.curves import learning_curve
from pte.rollout.generate import RolloutEngine
from pte.rollout.record import RolloutRequest
from pte.rollout.sampling import stream_seed
from pte.rollout.token_step import decode_path
from pte.run_record import check_output, replace_synced
from pte.session import open_session
from pte.tasks.evaluate import Evaluation
from pte.tasks.problems import Problem, load_problems
from pte.tasks.rollouts_file import ROLLOUTS_FILE, write_rollouts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pte.arguments import (
        BenchArguments,
        CompareArguments,
        EvidenceArguments,
        GenerateArguments,
        PlanArguments,
        ReportArguments,
        ServeArguments,
        TrainArguments,
    )
    from pte.tasks.evaluate import EvaluatedCompletion

LINES_WITHOUT_TERMINAL = 20
WIDTH_WITHOUT_TERMINAL = 120


def run(command: str, arguments: object) -> None:
    """Runs a parsed command.

    Raises:
        ValueError: A launcher has started several processes of a command that does not share its work.
    """
    console = Console()
    disable_progress_bar()
    if not console.is_terminal:
        console = Console(width=WIDTH_WITHOUT_TERMINAL)
    shared = {"train": train_command, "distill": distill_command, "eval": eval_command}
    if command in shared:
        with open_ranks() as ranks:
            console.quiet = not ranks.first
            shared[command](arguments, console, ranks=ranks)  # type: ignore[operator]
        return
    if (size := launched_size(os.environ)) > 1:
        raise ValueError(
            f"a launcher can start {', '.join(shared)}, got {size} processes of {command}; run pte {command} by itself"
        )
    {
        "generate": generate_command,
        "serve": serve_command,
        "compare": compare_command,
        "plan": plan_command,
        "evidence": evidence_command,
        "report": report_command,
        "bench": bench_command,
    }[command](arguments, console)  # type: ignore[operator]


def distill_command(arguments: TrainArguments, console: Console, *, ranks: Ranks) -> None:
    """The warm start alone."""
    experiment = arguments.experiment
    if not experiment.distill.steps:
        raise ValueError("distill.steps must be at least 1 for pte distill, got 0; set --distill.steps 500")
    only = replace(experiment, train=replace(experiment.train, steps=0))
    train_command(replace(arguments, experiment=only), console, ranks=ranks)


def train_command(arguments: TrainArguments, console: Console, *, ranks: Ranks) -> None:
    """Warm start and GRPO, then the evaluation; writes summary.json, rollouts.json and curve.png."""
    config = arguments.experiment
    if arguments.dry_run:
        console.print(dry_run(config, ranks=ranks, shard_base=arguments.shard_base))
        return
    started = time.perf_counter()
    run = open_run(config, ranks=ranks, shard_base=arguments.shard_base)
    adapter = run.session.policy.adapter
    assert adapter is not None
    processes = "" if ranks.size == 1 else f" of each of {ranks.size} ranks"
    console.print(
        f"run [bold]{run.directory}[/]: {sum(p.numel() for p in adapter.parameters()):,} trainable parameters, "
        f"steps {run.done_steps} of {run.total_steps} done; decode{processes}: {decode_path(run.session.policy)}"
    )
    with step_progress(run, console) as on_step:
        train(run, on_step=on_step)
    completions: list[EvaluatedCompletion] = []

    def keep(_: dict[str, Evaluation], done: list[EvaluatedCompletion]) -> None:
        completions[:] = done

    sets = dict.fromkeys(run.session.task.evaluation, config)
    evaluations = evaluate_sets(run.session, sets, console, on_set=keep)
    if not ranks.first:
        return
    summary = {
        "run": str(run.directory),
        "seconds": time.perf_counter() - started,
        "steps": run.total_steps,
        "ranks": ranks.size,
        "decode": decode_path(run.session.policy),
        "evaluations": {name: evaluation.as_json() for name, evaluation in evaluations.items()},
        "last_metrics": last_metrics(run),
    }
    replace_synced(run.directory / "summary.json", json.dumps(summary, indent=2).encode())
    if config.eval.state_control == "own":
        write_rollouts(run.directory / ROLLOUTS_FILE, run.session.policy, run.session.task, completions)
    learning_curve(run.directory / "metrics.jsonl", run.directory / "curve.png")
    console.print(evaluation_table(evaluations.values()))
    console.print(f"summary, metrics and curve.png in [bold]{run.directory}[/]")


def last_metrics(run: Run) -> dict[str, object]:
    """The last line of metrics.jsonl."""
    lines = (run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, object] = json.loads(lines[-1])
    return last


@contextmanager
def step_progress(run: Run, console: Console) -> Iterator[Callable[[str, int, StepResult], None]]:
    """A progress bar over steps; without a terminal, a line now and then. Warnings are printed once each."""
    every = max(1, run.total_steps // LINES_WITHOUT_TERMINAL)
    seen: set[str] = set()
    with bar(console) as progress:
        task = progress.add_task("start", total=run.total_steps, completed=run.done_steps)

        def on_step(stage: str, step: int, result: StepResult) -> None:
            metrics = result.metrics
            shown = [
                f"{label} {metrics[key]:.3g}"
                for label, key in (
                    ("loss", "loss"),
                    ("reward", "reward"),
                    ("tokens", "completion_tokens"),
                    ("gap", "logprob_gap_max"),
                )
                if key in metrics
            ]
            progress.update(task, completed=step, description=f"{stage} {' '.join(shown)}")
            if not console.is_terminal and (step % every == 0 or step == run.total_steps):
                console.print(f"step {step}/{run.total_steps} {stage} {' '.join(shown)}", highlight=False)
            for warning in result.warnings:
                kind = warning.split(":")[0][:40]
                if kind not in seen:
                    seen.add(kind)
                    console.print(f"[yellow]warning[/] step {step}: {warning}")

        yield on_step


def generate_command(arguments: GenerateArguments, console: Console) -> None:
    """Completions of the given problems, as text."""
    config = arguments.experiment
    texts = [Problem(f"prompt-{index}", text, "", "command line") for index, text in enumerate(arguments.prompt)]
    if arguments.problems is not None:
        texts += load_problems(arguments.problems)
    if not texts:
        raise ValueError("pte generate needs problems, got none; set --prompt TEXT or --problems FILE")
    session = open_session(config)
    requests = [
        RolloutRequest(session.task.prompt_ids(problem), stream_seed(config.run.seed, "generate", problem.id))
        for problem in texts
    ]
    engine = RolloutEngine(
        session.policy,
        slots=config.rollout.slots,
        max_new_tokens=config.eval.max_new_tokens,
        temperature=config.eval.temperature,
        stop_token_ids=session.task.stop_token_ids,
        allow_beyond_trained_positions=config.model.allow_beyond_trained_positions,
    )
    for problem, rollout in zip(texts, engine.run(requests), strict=True):
        console.rule(problem.id)
        console.print(problem.problem, style="dim", markup=False)
        console.print(session.task.text(rollout.completion_ids), markup=False, highlight=False)
        console.print(
            f"{len(rollout.completion_ids)} tokens, {rollout.evictions} evictions, ended by {rollout.finish_reason}",
            style="dim",
        )


def serve_command(arguments: ServeArguments, console: Console) -> None:
    """The server, until it is interrupted."""
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f'pte serve needs {" and ".join(missing)}, which this environment lacks; pip install -e ".[serve]" in the '
            f"checkout of pte"
        )
    from pte.serve.command import ServeSettings, serve

    serve(ServeSettings(**vars(arguments)), console)


def compare_command(arguments: CompareArguments, console: Console) -> None:
    """The main job."""
    compare(arguments.experiment, workers=arguments.workers, console=console, progress=bar(console))


def plan_command(arguments: PlanArguments, console: Console) -> None:
    """The plan of three arms: a table, what it means and, where a file is named, the same as JSON."""
    from pte.plan.command import PlanRequest, write_plan

    check_output(arguments.output)
    write_plan(PlanRequest(**vars(arguments)), console)


def bench_command(arguments: BenchArguments, console: Console) -> None:
    """The benchmark; it prints its own table and, as the last line, one JSON object."""
    from pte.bench import BenchRequest, run_bench

    check_output(arguments.output)
    run_bench(
        BenchRequest(
            arguments.preset,
            parts=arguments.part,
            model=arguments.model,
            device=arguments.device,
            output=None if arguments.output is None else Path(arguments.output),
        )
    )


def evidence_command(arguments: EvidenceArguments, console: Console) -> None:
    """The parts of a preset that are not done yet, then the report of all that are."""
    from pte.evidence.run import run_evidence
    from pte.report.command import ReportFiles, write_report

    directory = Path(arguments.directory or f"runs/evidence-{arguments.preset}")
    outcome = run_evidence(
        arguments.preset,
        directory,
        only=arguments.only,
        workers=arguments.workers,
        minutes=arguments.minutes,
        console=console,
        progress=bar(console),
    )
    if outcome.left:
        console.print(f"{len(outcome.left)} parts are left, {outcome.left[0]} is next; the same command goes on")
    report = ReportFiles(
        runs=(str(directory),),
        output=str(directory / "report.html"),
        figures=str(directory / "figures"),
        markdown=str(directory / "evidence.md"),
    )
    write_report(report, console)
    if outcome.failed:
        errors = "; ".join(f"{name}: {error}" for name, error in outcome.failed.items())
        raise RuntimeError(f"{len(outcome.failed)} parts failed: {errors}; the same command tries them again")


def report_command(arguments: ReportArguments, console: Console) -> None:
    """The page, the figures and the tables of any runs."""
    from pte.report.command import ReportFiles, write_report

    for path in (arguments.output, arguments.markdown):
        check_output(path)
    write_report(ReportFiles(**asdict(arguments)), console)
