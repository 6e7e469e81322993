"""`pte eval`, and how scores look: a progress bar a set, tables, JSON files.

Decides: what a person sees of an evaluation. Does not know how anything is computed (`tasks.evaluate`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from pte.progress import bar
from pte.ranks import Ranks
from pte.rollout.record import Rollout
from pte.rollout.token_step import decode_path
from pte.run_record import check_output, replace_synced
from pte.session import Session, check_evaluation, open_session
from pte.tasks.evaluate import Evaluation, evaluate_session
from pte.tasks.overlap import overlap_warnings
from pte.tasks.rollouts_file import write_rollouts
from pte.tasks.suites import SUITES, incomplete_sets, set_experiments, suite_experiment, suite_scores

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from pte.arguments import EvalArguments
    from pte.checkpoint_files import Json
    from pte.config import ExperimentConfig
    from pte.tasks.evaluate import EvaluatedCompletion


def eval_command(arguments: EvalArguments, console: Console, *, ranks: Ranks) -> None:
    """Scores as a table and, where asked for, as JSON."""
    config, suite = arguments.experiment, arguments.suite
    if (suite is None) != (arguments.data_dir is None):
        raise ValueError(
            f"--suite and --data-dir must be given together, got {suite!r} and {arguments.data_dir!r}; use for example "
            f"--suite math6 --data-dir data"
        )
    if suite is not None and arguments.data_dir is not None:
        config = suite_experiment(config, suite, directory=arguments.data_dir)
    for path in (arguments.output, arguments.completions, arguments.rollouts):
        check_output(path)
    if arguments.rollouts is not None and config.eval.state_control != "own":
        raise ValueError(
            f"--rollouts needs eval.state_control 'own', got {config.eval.state_control!r}: a control's states "
            f"cannot be walked again; leave out one of the two"
        )
    if arguments.train_path is not None:
        for path in config.task.eval_paths:
            for warning in overlap_warnings(arguments.train_path, path):
                console.print(f"[yellow]warning[/]: {warning}")
    session = open_session(config, ranks=ranks)
    if not session.task.evaluation:
        raise ValueError("task.eval_paths must name problem files for pte eval, got none; set --task.eval-paths FILE")
    check_evaluation(session, config)
    console.print(f"decode: {decode_path(session.policy)}", highlight=False)

    def write(evaluations: dict[str, Evaluation], completions: list[EvaluatedCompletion]) -> None:
        if not ranks.first:
            return
        if arguments.output is not None:
            content: dict[str, Json] = {name: evaluation.as_json() for name, evaluation in evaluations.items()}
            if suite is not None:
                content[suite] = dict(suite_scores(suite, evaluations))
            replace_synced(Path(arguments.output), json.dumps(content, indent=2).encode())
        if arguments.completions is not None:
            lines = [json.dumps(completion_row(one)) + "\n" for one in completions]
            replace_synced(Path(arguments.completions), "".join(lines).encode())
        if arguments.rollouts is not None:
            # The sampled sets of a suite are of another temperature than the others; the viewer's are of one.
            alike = [one for one in completions if one.rollout.temperature == completions[0].rollout.temperature]
            write_rollouts(arguments.rollouts, session.policy, session.task, alike)

    sets = dict.fromkeys(session.task.evaluation, config) if suite is None else set_experiments(config, suite)
    evaluations = evaluate_sets(session, sets, console, on_set=write)
    console.print(evaluation_table(evaluations.values()))
    if suite is not None:
        console.print(suite_table(suite, evaluations))
        for warning in incomplete_sets(suite, evaluations):
            console.print(f"[yellow]warning[/]: {warning}")


def evaluate_sets(
    session: Session,
    sets: Mapping[str, ExperimentConfig],
    console: Console,
    *,
    on_set: Callable[[dict[str, Evaluation], list[EvaluatedCompletion]], None] | None = None,
) -> dict[str, Evaluation]:
    """Scores of a session's policy on evaluation sets of its task, each as its experiment says.

    Args:
        session: Policy and task.
        sets: Their experiments by name.
        console: For the progress bar.
        on_set: Gets the scores so far after each set.
    """
    evaluations: dict[str, Evaluation] = {}
    completions: list[EvaluatedCompletion] = []
    for name, config in sets.items():
        with bar(console) as progress:
            completed = len(session.task.evaluation[name]) * config.eval.samples_per_problem
            total = len(session.ranks.share(range(completed)))
            task = progress.add_task(f"evaluating {name}", total=total)

            def on_finish(rollout: Rollout, progress: Progress = progress, task: object = task) -> None:
                progress.advance(task)  # type: ignore[arg-type]

            evaluations[name], done = evaluate_session(session, config, name=name, on_finish=on_finish)
            completions += done
        if on_set is not None:
            on_set(evaluations, completions)
    return evaluations


def evaluation_table(evaluations: Iterable[Evaluation]) -> Table:
    """Scores and costs, a line a set."""
    table = Table(title="held-out problems")
    for header in ("set", "problems", "accuracy", "95 %", "pass@k", "tokens", "cut off", "evictions", "cache"):
        table.add_column(header, justify="left" if header == "set" else "right")
    for one in evaluations:
        table.add_row(
            one.name,
            f"{one.problems} x {one.samples_per_problem}",
            f"{100 * one.accuracy:.1f} %",
            f"{100 * one.ci95[0]:.1f} to {100 * one.ci95[1]:.1f}",
            " ".join(f"@{k} {100 * value:.1f}" for k, value in one.pass_at.items()),
            f"{one.completion_tokens:.0f}",
            f"{100 * one.cut_off_fraction:.0f} %",
            f"{one.evictions:.1f}",
            f"{one.peak_cache_bytes / 2**20:.1f} MiB",
        )
    return table


def suite_table(suite: str, evaluations: Mapping[str, Evaluation]) -> Table:
    """One line, as in the paper's tables: the score of each set in percent, and their average."""
    table = Table(title=suite)
    for one in SUITES[suite]:
        table.add_column(one.title if one.samples is None else f"{one.title} {one.metric}", justify="right")
    table.add_column("average", justify="right")
    table.add_row(*(f"{100 * score:.1f}" for score in suite_scores(suite, evaluations).values()))
    return table


def completion_row(one: EvaluatedCompletion) -> dict[str, Json]:
    """A line of `pte eval --completions`."""
    return {
        "id": one.problem.id,
        "answer": one.problem.answer,
        "right": one.right,
        "completion": one.text,
        "tokens": len(one.rollout.completion_ids),
    }
