"""The report as one HTML page, as PNG files and as Markdown.

Decides: how a report is written down. The page is one file: style, script and figures are in it, a content security
policy forbids it to load anything. The same runs give the same bytes.
"""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pte.report.sections import Report
    from pte.report.style import DrawnFigure

INTERVAL = re.compile(r" (\[[^\]]*, [^\]]*\])$")
ASSETS = files("pte.report") / "assets"


def render_page(report: Report) -> str:
    """The page.

    Args:
        report: What it shows.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["interval"] = lambda cell: Markup(
        INTERVAL.sub(r' <span class="interval">\1</span>', str(escape(cell)))
    )
    figures = all_figures(report)
    # `<` is written as an escape, so that no text of a rollout can end the script element.
    rollouts = json.dumps(report.viewer, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    rollouts = rollouts.replace("<", "\\u003c")
    return environment.from_string(asset("page.html.jinja")).render(
        report=report,
        css=Markup(asset("page.css")),
        script=Markup(asset("viewer.js")),
        svgs={drawn.name: Markup(drawn.svg()) for drawn in figures},
        numbers={drawn.name: number for number, drawn in enumerate(figures, start=1)},
        rollouts=Markup(rollouts),
    )


def render_markdown(report: Report, *, images: str | None) -> str:
    """The tables, sentences and provenance; images where figures were written.

    Args:
        report: What it shows.
        images: Directory of the PNG files, relative to the Markdown file; None without.
    """
    lines = [
        f"# {report.title}",
        "",
        f"{report.lead} Made by `{report.command}`; do not edit by hand.",
        "",
        *(f"- {name}: {value}" for name, value in report.facts),
        "",
    ]
    if report.notes:
        lines += ["Missing:", "", *(f"- {note}" for note in report.notes), ""]
    numbers = {drawn.name: number for number, drawn in enumerate(all_figures(report), start=1)}
    for section in report.sections:
        lines += [f"## {section.title}", "", section.question, ""]
        if section.findings:
            lines += [*(f"- {finding}" for finding in section.findings), ""]
        for drawn in section.figures if images is not None else ():
            caption = f"Figure {numbers[drawn.name]}. {drawn.caption}"
            lines += [f"![{drawn.name}]({images}/{drawn.name}.png)", "", f"*{caption}*", ""]
        for table in section.tables:
            lines += [table.markdown(), ""]
    lines += ["## Where it comes from", ""]
    for table in report.provenance:
        lines += [table.markdown(), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_figures(report: Report, directory: Path) -> list[Path]:
    """Every figure as PNG; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for drawn in all_figures(report):
        path = directory / f"{drawn.name}.png"
        path.write_bytes(drawn.png())
        written.append(path)
    return written


def image_directory(markdown: Path, figures: Path) -> str:
    """The directory of the figures as a link in the Markdown file."""
    return Path(os.path.relpath(figures, markdown.parent)).as_posix()


def all_figures(report: Report) -> list[DrawnFigure]:
    """In the order of the page."""
    return [drawn for section in report.sections for drawn in section.figures]


def asset(name: str) -> str:
    """A file that is shipped beside this one."""
    return (ASSETS / name).read_text(encoding="utf-8")
