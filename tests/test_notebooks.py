"""The committed notebooks are what their sources say, with outputs and without errors. (CI runs the
sources.)"""

import json
import re

import pytest
from conftest import ROOT

SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_committed_notebooks(source):
    file = source.with_suffix(".ipynb")
    assert file.stat().st_size < 2**20
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    written = [
        part.removeprefix(" [markdown]").strip()
        for part in re.split(r"^# %%", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    ]
    shown = ["".join(cell["source"]).strip() for cell in cells]
    prose = [cell["cell_type"] == "markdown" for cell in cells]
    assert [
        re.sub(r"^# ?", "", text, flags=re.MULTILINE) if p else text
        for text, p in zip(written, prose, strict=True)
    ] == shown
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
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
