"""inference.page: pages and drawings from results files."""

import base64
import json
import os
import re
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
    assert sorted(os.listdir("drawings")) == ["00000-x.boxes.png", "00002-x.boxes.png"]


def test_drawings_are_not_captioned(capsys, results):
    """--drawings may name the folder of the images."""
    assert run(capsys, "a", "--results", "one.jsonl", "--drawings", "a", command=batch)[0] == 0
    assert sorted(os.listdir("a")) == ["00000-x.boxes.png", "x.png"]
    assert run(capsys, "a", "--results", "two.jsonl", command=batch)[0] == 0
    assert len(Path("two.jsonl").read_text().splitlines()) == 1


def test_a_long_name_in_another_script(capsys, results):
    Path("a/x.png").rename("a/" + 82 * "犬" + ".png")
    options = ["a", "--results", "one.jsonl", "--drawings", "drawn"]
    assert run(capsys, *options, command=batch)[0] == 0 and len(os.listdir("drawn")) == 1


@pytest.mark.parametrize("name", ["page.html", "page.htm"])
def test_a_page_is_no_folder_for_drawings(capsys, results, name):
    status, _, err = run(capsys, "a", "--results", "one.jsonl", "--drawings", name, command=batch)
    assert status == 2 and "expected a folder" in err and not Path("one.jsonl").exists()


def test_a_last_line_without_a_newline(capsys, results):
    """It is shown; when the run is resumed, it is answered again."""
    results.write_bytes(results.read_bytes().rstrip(b"\n"))
    assert run(capsys, results, "page.html", command=page)[0] == 0
    assert Path("page.html").read_text(encoding="utf-8").count("<p>") == 3
    options = ["--requests", "requests.jsonl", "--results", results, "--resume"]
    assert run(capsys, *options, command=batch)[0] == 0
    assert len(results.read_text(encoding="utf-8").splitlines()) == 3


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


def ask_and_read(capsys, *arguments) -> str:
    """inference.batch with --page: the page."""
    status, _, err = run(capsys, *arguments, "--results", "new.jsonl", "--page", "new.html", command=batch)
    assert status == 0, err
    return Path("new.html").read_text(encoding="utf-8")


def test_batch_makes_the_same_page(capsys, results):
    options = ["--requests", "requests.jsonl", "--drawings", "drawn"]
    html = ask_and_read(capsys, *options)
    assert run(capsys, results, "page.html", command=page)[0] == 0
    assert html == Path("page.html").read_text(encoding="utf-8")
    assert sorted(os.listdir("drawn")) == ["00000-x.boxes.png", "00002-x.boxes.png"]


def test_nothing_is_loaded_from_elsewhere(capsys, results):
    html = ask_and_read(capsys, "a/x.png", "b/x.png")
    sources = re.findall(r'<[^<>]*\s(?:src|href)\s*=\s*"([^"]*)', html)
    assert len(sources) == 2 and all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert not re.search(r"url\(|@import|https?:", html)


def test_names_and_prompts_are_escaped(capsys, results):
    name = '<img src=x onerror=alert(1)>&".png'
    Image.open(TINY / "scene.png").save(name)
    html = ask_and_read(capsys, name, "--prompt", '<script>alert(1)</script> & "', "--max-new-tokens", 3)
    assert html.count("<script>") == 1 and html.count("<img") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in html and "&lt;img src=x" in html


def test_several_files_are_counted_through(capsys, results):
    """As the processes of torchrun write them; an image in both is drawn once."""
    lines = results.read_text().splitlines(keepends=True)
    Path("r.0.jsonl").write_text("".join(lines[:2]))
    Path("r.1.jsonl").write_text("".join(lines[2:] + lines[:1]))
    assert run(capsys, "r.0.jsonl", "r.1.jsonl", "drawn", command=page)[0] == 0
    assert sorted(os.listdir("drawn")) == ["00000-x.boxes.png", "00002-x.boxes.png"]


def test_a_resumed_run_keeps_the_names_of_drawings(capsys, results):
    assert run(capsys, results, "drawn", command=page)[0] == 0
    before = Path("drawn/00002-x.boxes.png").read_bytes()
    Image.open(TINY / "busy.png").save("c.png")
    with open("requests.jsonl", "a") as requests:
        requests.write('\n{"image": "c.png"}')
    options = ["--requests", "requests.jsonl", "--results", results, "--resume", "--drawings", "drawn"]
    assert run(capsys, *options, command=batch)[0] == 0
    assert sorted(os.listdir("drawn")) == ["00000-x.boxes.png", "00002-x.boxes.png", "00003-c.boxes.png"]
    assert Path("drawn/00002-x.boxes.png").read_bytes() == before


def test_a_line_that_is_not_complete_is_left_out(capsys, results):
    results.write_bytes(results.read_bytes()[:-20])
    assert run(capsys, results, "page.html", command=page)[0] == 0
    assert Path("page.html").read_text(encoding="utf-8").count("<figure>") == 1


def test_lines_without_an_image(capsys, results):
    html = ask_and_read(capsys, "--task", "text", "--text", "An image of a", "--text", "An image of two")
    assert html.count("<figure>") == 2 and "<img" not in html


def test_an_image_in_the_line_itself(capsys, results):
    """Its title is not kilobytes of base64."""
    data = "data:image/png;base64," + base64.b64encode((TINY / "scene.png").read_bytes()).decode()
    Path("data.jsonl").write_text(json.dumps({"image": data}))
    html = ask_and_read(capsys, "--requests", "data.jsonl")
    assert html.count("<img") == 1 and "data:image/png" not in html
    assert run(capsys, "new.jsonl", "drawn", command=page)[0] == 0
    assert os.listdir("drawn") == ["00000-image.boxes.png"]


def test_long_names_of_drawings(capsys, results):
    name = "y" * 250 + ".png"
    Image.open(TINY / "scene.png").save(name)
    options = [name, "--results", "new.jsonl", "--drawings", "drawn"]
    assert run(capsys, *options, command=batch)[0] == 0
    assert os.listdir("drawn")[0].startswith("00000-yyy")


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["r.jsonl"], 2, "TARGET"), ([], 2, "required"), (["r.jsonl", "page.html", "--json"], 2, "--json"),
        (["r.jsonl", "r.jsonl"], 1, "is a results file"), (["r.jsonl", "a/x.png"], 1, "is a file"),
        (["a", "page.html"], 1, "no results file at a"), (["a/x.png", "page.html"], 1, "not a results file"),
    ],
)  # fmt: skip
def test_errors_are_one_line(capsys, results, arguments, status, words):
    image = Path("a/x.png").read_bytes()
    found, out, err = run(capsys, *arguments, command=page)
    assert (found, out, err.count("\n")) == (status, "", 1) and words in err
    assert Path("a/x.png").read_bytes() == image and not Path("page.html").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"image": 5}, {"text": None}, {"entities": None}, {"entities": [{"phrase": "a fire"}]},
        {"entities": [{"phrase": "a fire", "span": None, "boxes": [], "scores": []}]},
    ],
)  # fmt: skip
def test_lines_with_wrong_values_are_one_line_errors(capsys, results, changed):
    line = json.loads(results.read_text().splitlines()[0]) | changed
    results.write_text(json.dumps(line) + "\n")
    status, _, err = run(capsys, results, "page.html", command=page)
    assert status == 1 and err.count("\n") == 1 and not Path("page.html").exists()


def test_names_of_pages_are_escaped(capsys, results):
    assert "wrote p\\x1b.html" in run(capsys, results, "p\x1b.html", command=page)[2]


def test_stdout_of_batch_is_a_results_file(capsys, results):
    """As in `python -m inference.batch ... > results.jsonl`."""
    Path("out.jsonl").write_text(run(capsys, "--requests", "requests.jsonl", command=batch)[1])
    assert Path("out.jsonl").read_text() == results.read_text()
    assert run(capsys, "out.jsonl", "page.html", command=page)[0] == 0


@pytest.mark.parametrize(
    "target", [["--page", "x"], ["--page", "x.png"], ["--drawings", "x.html"], ["--drawings", "a/x.png"]]
)
def test_targets_of_a_wrong_kind_are_refused_at_the_start(capsys, results, target):
    """Not after hours of work, and not by making the other kind."""
    status, out, err = run(capsys, "a/x.png", "--results", "new.jsonl", *target, command=batch)
    assert (
        (status, out, err.count("\n")) == (2, "", 1) and target[0] in err and not Path("new.jsonl").exists()
    )
