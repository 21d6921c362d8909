"""inference.batch: many requests, results, resuming, several processes."""

import base64
import json
from pathlib import Path

import pytest
from conftest import TINY, run
from PIL import Image

from inference import batch
from inference.results import Results
from tokenizer import CONTROL, TAGS

SCENE = TINY / "scene.png"


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def ask(capsys, *arguments):
    return run(capsys, *arguments, command=batch)


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def write_requests(*requests) -> str:
    lines = [request if isinstance(request, str) else json.dumps(request) for request in requests]
    Path("requests.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return "requests.jsonl"


@pytest.fixture
def folder() -> Path:
    Path("images").mkdir()
    for i in range(3):
        Image.open(SCENE).save(f"images/{i} größe.png")
    return Path("images")


def test_a_folder(capsys, folder):
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.jpg").write_bytes(b"no image")
    status, out, err = ask(capsys, folder, "--batch-size", "2")
    assert status == 1 and "1 x .txt" in err and "broken.jpg" in err
    assert [Path(row["image"]).name for row in rows(out)] == [f"{i} größe.png" for i in range(3)]
    assert all(
        Path(row["image"]).is_absolute() and row["text"].startswith("An image of") for row in rows(out)
    )


def test_requests_copy_other_keys(capsys):
    requests = [
        {"image": str(SCENE), "task": "ground", "text": "the fire", "id": 7},
        {"image": str(SCENE), "task": "refer", "box": [10, 20, 100, 200]},
        {"task": "text", "text": "An image of a", "note": {"any": ["thing"]}},
    ]
    status, out, err = ask(capsys, "--requests", write_requests(*requests))
    found = rows(out)
    assert status == 0, err
    assert found[0]["id"] == 7 and found[0]["entities"][0]["scores"]
    assert found[1]["given_boxes"] == [[10, 20, 100, 200]]
    assert found[2]["note"] == {"any": ["thing"]} and found[2]["image"] is None


def test_tags_in_a_text_are_words(capsys):
    text = " ".join([*CONTROL, *TAGS, "<patch_index_0000>"])
    status, out, err = ask(
        capsys, "--requests", write_requests({"image": str(SCENE), "task": "answer", "text": text})
    )
    assert status == 0, err
    assert rows(out)[0]["entities"] == [] and text in rows(out)[0]["prompt"]


def test_data_addresses(capsys):
    address = "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()
    status, out, err = ask(capsys, "--requests", write_requests({"image": address}, {"image": "data:,no"}))
    assert status == 1 and rows(out)[0]["image"] == address and len(rows(out)) == 1
    assert max(map(len, err.splitlines())) < 300


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("[1]", "one JSON object per line"), ("{", "one JSON object per line"), ("image,task", "one JSON object per line"),
        ('{"image": 3}', "image: expected a string"), ('{"image": "a.png", "x": NaN}', "x: NaN"),
        ('{"image": "a.png", "boxes": [[1, 2, 3]]}', "box"), ('{"task": "caption"}', "needs an image"),
        ('{"image": "a.png", "prompt": "a", "task": "vqa"}', "prompt"), ('{"image": "a.png", "task": "dance"}', "dance"),
    ],
)  # fmt: skip
def test_bad_requests_are_named_by_line(capsys, line, words):
    status, _, err = ask(capsys, "--requests", write_requests({"image": str(SCENE)}, line))
    assert status == 1 and "line 2" in err and words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["a.png", "--page", "p.html"], ["a.png", "--resume"], ["a.png", "--batch-size", "0"], ["a.png", "--top-boxes", "2"],
        ["a.png", "--requests", "r.jsonl"], ["a.png", "--num-beams", "2", "--temperature", "1"], ["a.png", "--nonsense"],
    ],
)  # fmt: skip
def test_usage_errors_are_one_line(capsys, arguments):
    status, out, err = ask(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)


def test_results_are_resumed_from_another_folder(capsys, folder, monkeypatch):
    results = Path("r.jsonl").resolve()
    image = folder.resolve() / "0 größe.png"
    assert ask(capsys, "images/0 größe.png", "--results", results)[0] == 0
    assert ask(capsys, folder, "--results", results)[0] == 1  # it exists
    monkeypatch.chdir(folder)
    assert ask(capsys, "../images", "--results", results, "--resume")[0] == 0
    found = rows(results.read_text(encoding="utf-8"))
    assert [row["image"] for row in found] == [str(image.with_name(f"{i} größe.png")) for i in range(3)]
    results.write_bytes(results.read_bytes()[:-20])  # the last line is cut off
    assert ask(capsys, ".", "--results", results, "--resume")[0] == 0
    assert len(rows(results.read_text(encoding="utf-8"))) == 3


def test_two_runs_on_one_file(capsys):
    first = Results(Path("r.jsonl"), str(TINY), [], resume=False, rank=0, world=1)
    status, _, err = ask(capsys, SCENE, "--results", "r.jsonl")
    assert status == 1 and "another run" in err and first.path.read_text() == ""


def test_processes_share_the_images(capsys, folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        status, _, err = ask(capsys, folder, "--results", "r.jsonl")
        assert status == 0 and f"process {rank} of 2" in err
    assert [len(Path(f"r.{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)] == [2, 1]
    assert ask(capsys, "--requests", "-")[0] == 2
    assert ask(capsys, folder, "--results", "x.jsonl", "--page", "p.html")[0] == 2


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", "4"), ("RANK", "1"), ("WORLD_SIZE", "two")])
def test_a_half_set_environment(capsys, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    status, out, err = ask(capsys, SCENE)
    assert status == 1 and out == "" and "RANK" in err and err.count("\n") == 1


def test_top_boxes_and_beams(capsys):
    status, out, err = ask(capsys, SCENE, "--task", "ground", "--text", "a fire", "--top-boxes", "3")
    scores = rows(out)[0]["entities"][0]["scores"]
    assert status == 0 and scores == sorted(scores, reverse=True) and f"{scores[0]:.3f}" in err
    assert ask(capsys, SCENE, "--num-beams", "3")[0] == 0


def test_questions_about_one_image_share_its_encoding(capsys, monkeypatch):
    from kosmos2 import Kosmos2

    encoded = []
    original = Kosmos2.encode_image
    monkeypatch.setattr(
        Kosmos2, "encode_image", lambda self, pixels: encoded.append(len(pixels)) or original(self, pixels)
    )
    texts = ["How many things are there?", "Is there a fire?"]
    status, out, _ = ask(capsys, SCENE, "--task", "answer", "--text", texts[0], "--text", texts[1])
    alone = [rows(ask(capsys, SCENE, "--task", "answer", "--text", text)[1])[0]["raw"] for text in texts]
    assert status == 0 and [row["raw"] for row in rows(out)] == alone and encoded[0] == 1
