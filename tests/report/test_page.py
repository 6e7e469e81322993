"""The page, the figures and the Markdown of `pte report`: complete, self-contained, the same every time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pte.cli import main
from pte.report.tables import Table

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def written(train_run: Path, evidence_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of a real run and of evidence."""
    directory = tmp_path_factory.mktemp("report")
    words = ["--output", str(directory / "report.html"), "--figures", str(directory / "figures")]
    words += ["--markdown", str(directory / "evidence.md")]
    assert main(["report", str(evidence_run), str(train_run), *words]) == 0
    return directory


def test_the_page_names_nothing_outside_itself(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert "default-src 'none'" in page
    text = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', text)
    links = set(re.findall(r"https?://[^\"' <)]+", text))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names of formats alone"
    assert "@import" not in text and "@font-face" not in text


def test_no_id_of_the_page_is_given_twice_and_every_reference_is_met(written: Path) -> None:
    page = (written / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'(?:url\(#|href="#)([^")]+)', page))
    assert wanted <= set(ids)


def test_the_same_runs_give_the_same_page(written: Path, train_run: Path, evidence_run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.html"
    assert main(["report", str(evidence_run), str(train_run), "--output", str(again)]) == 0
    made = re.compile(r"<footer>.*?</footer>")
    assert made.sub("", again.read_text()) == made.sub("", (written / "report.html").read_text())


def test_the_markdown_has_every_figure_every_table_and_where_they_come_from(written: Path) -> None:
    text = (written / "evidence.md").read_text()
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert {written / image for image in images} == set((written / "figures").glob("*.png")) and len(images) > 10
    for image in images:
        assert (written / image).read_bytes().startswith(b"\x89PNG")
    for told in (
        "pte evidence --preset full",
        "0123456789",
        "AMD EPYC",
        "0, 1, 2",
        "pte report",
        "PTE, rule delta",
    ):
        assert told in text
    for line in text.splitlines():
        if line.startswith("| ---"):
            assert re.fullmatch(r"\|( -+:? \|)+", line)


def test_a_table_is_a_pipe_table_whatever_its_cells_hold() -> None:
    table = Table("Title", ("name", "value"), (("a|b", "1"),), note="Note.")
    assert table.markdown() == "**Title**\n\n| name | value |\n| --- | ---: |\n| a\\|b | 1 |\n\nNote."


def test_text_of_a_rollout_cannot_end_the_script_or_become_markup(train_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for file in ("record.json", "metrics.jsonl", "summary.json"):
        (run / file).write_text((train_run / file).read_text())
    rollouts = json.loads((train_run / "rollouts.json").read_text())
    rollouts[0]["problem"] = "</script><script>alert(1)</script>"
    (run / "rollouts.json").write_text(json.dumps(rollouts))
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in page
    content = re.search(r'id="rollouts">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(content)[0]["rollouts"][0]["problem"] == "</script><script>alert(1)</script>"


def test_a_missing_run_among_others_is_a_sentence_on_the_page(
    evidence_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    assert main(["report", str(evidence_run), str(tmp_path / "gone"), "--output", str(output)]) == 0
    assert "is left out: a run must be a directory" in output.read_text()
    assert "is left out" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "needs at least 1 run directory, got none; name one, such as runs/embedded"),
        (("gone",), "a run must be a directory that a command wrote, got 'gone'; check the path"),
        (("empty",), "must hold record.json, metrics.jsonl, arms or parts, got 'empty'"),
        (("empty", "./empty"), "each run must be named once, got './empty' twice; drop one"),
        (("empty", "--output", "empty"), "an output file must not be a directory, got 'empty'"),
        (("empty", "--markdown", "gone/a.md"), "the directory of an output file must exist, got 'gone/a.md'"),
        (("empty", "--figures", "file"), "--figures must be a directory, got the file 'file'; name another"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_line(
    words: tuple[str, ...],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pte report: ") and error.count("\n") == 1 and text in error
    assert not (tmp_path / "report.html").exists()
