"""`pte report`: reads runs, writes a page and, where asked for, figures and Markdown.

Decides: what is refused before any work, and what is said at the end.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from pte.report.runs import RecordedRun


@dataclass(frozen=True)
class ReportFiles:
    """What a report is made from, and where it goes.

    Args:
        runs: Run directories.
        output: The page.
        figures: Directory for PNG files; None for none.
        markdown: File for the tables; None for none.
    """

    runs: tuple[str, ...]
    output: str
    figures: str | None = None
    markdown: str | None = None


def write_report(arguments: ReportFiles, console: Console) -> None:
    """Writes the report of the given runs.

    Raises:
        ValueError: No run is named, or one is named twice, or nothing that was named is a run.
        FileNotFoundError: The only run is missing.
        NotADirectoryError: The figures' directory is a file.
    """
    check(arguments)
    from pte.report.page import image_directory, render_markdown, render_page, write_figures
    from pte.report.sections import build_report

    runs, notes = read_runs(arguments.runs)
    report = build_report(runs, command=command_line(arguments), notes=notes)
    output = Path(arguments.output)
    output.write_text(render_page(report), encoding="utf-8")
    for note in report.notes:
        console.print(f"[yellow]note[/]: {note}", highlight=False)
    if arguments.figures is not None:
        written = write_figures(report, Path(arguments.figures))
        console.print(f"{len(written)} figures in {arguments.figures}")
    if arguments.markdown is not None:
        path = Path(arguments.markdown)
        images = None if arguments.figures is None else image_directory(path, Path(arguments.figures))
        path.write_text(render_markdown(report, images=images), encoding="utf-8")
        console.print(f"tables in {path}")
    size = output.stat().st_size / 2**20
    console.print(
        f"report of {len(runs)} run{'s' if len(runs) > 1 else ''} in {output} ({size:.1f} MiB, one file, works offline)"
    )


def check(arguments: ReportFiles) -> None:
    """Refuses what could not be read or written."""
    if not arguments.runs:
        raise ValueError("pte report needs at least 1 run directory, got none; name one, such as runs/embedded")
    resolved = [Path(run).resolve() for run in arguments.runs]
    for place, run in enumerate(resolved):
        if run in resolved[:place]:
            raise ValueError(f"each run must be named once, got {arguments.runs[place]!r} twice; drop one")
    if arguments.figures is not None and Path(arguments.figures).is_file():
        raise NotADirectoryError(f"--figures must be a directory, got the file {arguments.figures!r}; name another")


def read_runs(paths: Sequence[str]) -> tuple[list[RecordedRun], list[str]]:
    """The runs that can be read, and a sentence for each that cannot.

    Raises:
        FileNotFoundError, ValueError: None can.
    """
    from pte.report.runs import read_run

    runs: list[RecordedRun] = []
    notes: list[str] = []
    failure: Exception | None = None
    for path in paths:
        try:
            runs.append(read_run(path))
        except (FileNotFoundError, ValueError) as error:
            failure = failure or error
            notes.append(f"{path} is left out: {error}.")
    if not runs:
        assert failure is not None
        raise failure
    return runs, notes


def command_line(arguments: ReportFiles) -> str:
    """The command as it can be typed again."""
    words = ["pte", "report", *arguments.runs, "--output", arguments.output]
    for flag, value in (("--figures", arguments.figures), ("--markdown", arguments.markdown)):
        words += [] if value is None else [flag, value]
    return shlex.join(words)
