"""inference.page: pages and drawings from results files."""

import json
import os
from pathlib import Path

import pytest
from conftest import TINY, run
from PIL import Image

from inference import batch, page
from inference.page import html_figure, to_markdown


@pytest.fixture
def results(capsys, tmp_path, monkeypatch) -> Path:
    """Two images with the same name, and two lines about the first."""
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Image.open(TINY / "scene.png").save(f"{folder}/x.png")
    lines = [
        {"image": "a/x.png"},
        {"image": "a/x.png", "task": "ground", "text": "a fire"},
        {"image": "b/x.png"},
    ]
    Path("requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(capsys, "--requests", "requests.jsonl", "--results", "r.jsonl", command=batch)[0] == 0
    return Path("r.jsonl")


def test_lines_about_one_image_make_one_figure(capsys, results):
    assert run(capsys, results, "page.html", command=page)[0] == 0
    html = Path("page.html").read_text(encoding="utf-8")
    assert html.count("<figure>") == 2 and html.count("<p>") == 3 and "data-entity" in html


def test_drawings_are_numbered_by_their_first_line(capsys, results):
    assert run(capsys, results, "drawings", command=page)[0] == 0
    assert sorted(os.listdir("drawings")) == ["00000-x.png", "00002-x.png"]


def test_an_image_that_is_gone(capsys, results):
    Path("a/x.png").unlink()
    status, _, err = run(capsys, results, "page.html", command=page)
    html = Path("page.html").read_text(encoding="utf-8")
    assert status == 1 and "x.png" in err and html.count("<figure>") == 2 and html.count("<img") == 1


def test_what_is_refused_leaves_the_page_alone(capsys, results):
    Path("page.html").write_text("before")
    Path("other.jsonl").write_text("{}\n")
    for source in ("none.jsonl", "other.jsonl"):
        status, _, err = run(capsys, source, "page.html", command=page)
        assert status == 1 and err.count("\n") == 1 and Path("page.html").read_text() == "before"


def test_captions_are_escaped():
    line = {
        "text": "<b> a fire",
        "entities": [{"phrase": "a fire", "span": [4, 10], "boxes": [[0, 0, 1, 1]], "scores": [0.5]}],
    }
    html = html_figure(Image.new("RGB", (9, 9)), [line], "<title>")
    assert "<b>" not in html and "&lt;b&gt;" in html and "<title>" not in html and "50%" in html


def test_markdown():
    text = "<grounding> An image of<phrase> a snowman</phrase><object><patch_index_0044><patch_index_0863></object>."
    assert to_markdown(text) == "An image of [a snowman](<patch_index_0044><patch_index_0863>)."
