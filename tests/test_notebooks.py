"""The sources of the notebooks have short cells in plain order, and the committed notebooks are what
their sources say, with outputs and without errors. (CI runs the sources.)"""

import json
import re

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
MARKDOWN = " [markdown]"


def cells(source) -> list[tuple[bool, str]]:
    """(whether it is markdown, its lines) of each cell of a source."""
    parts = re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = []
    for part in parts:
        is_markdown = part.startswith(MARKDOWN)
        text = part.removeprefix(MARKDOWN).strip()
        if is_markdown:
            text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
        found.append((is_markdown, text))
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cells_are_explained_short_and_checked(source):
    found = cells(source)
    for (after_markdown, _), (is_markdown, text) in zip(found, found[1:], strict=False):
        if is_markdown:
            continue
        assert after_markdown, f"no markdown before: {text[:60]}"
        if not text.startswith("from figures"):  # the imports
            lines = [line for line in text.splitlines() if line.strip()]
            assert len(lines) <= 15, f"{len(lines)} lines: {text[:60]}"
        assert re.search(r"assert|print|table\(|show", text), f"no check, no output: {text[:60]}"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_committed_notebooks(source):
    file = source.with_suffix(".ipynb")
    assert file.stat().st_size < 2**20
    built = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert cells(source) == [
        (cell["cell_type"] == "markdown", "".join(cell["source"]).strip()) for cell in built
    ]
    outputs = [output for cell in built for output in cell.get("outputs", [])]
    assert outputs and not any(
        output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs
    )
    assert all(
        "alt" in str(output["metadata"]) for output in outputs if "image/png" in output.get("data", {})
    )


def test_every_notebook_is_listed_and_has_answers():
    contents = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    answers = (ROOT / "notebooks" / "answers.py").read_text(encoding="utf-8")
    assert len(SOURCES) == 12
    for source in SOURCES:
        assert f"({source.stem}.ipynb)" in contents
        text = source.read_text(encoding="utf-8")
        exercises = re.findall(r"^# (\d)\. ", text.split("## Exercises")[1], re.MULTILINE)
        assert 3 <= len(exercises) <= 5
        assert all(re.search(rf"\b{int(source.stem[:2])}\.{n}\b", answers) for n in exercises), source.stem
