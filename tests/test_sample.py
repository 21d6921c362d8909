"""The script, run as users run it."""

import io
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, copy, run
from PIL import Image, ImageDraw, features
from scenes import Scene, Thing
from things import DRAWINGS

import sample as script
from kosmos2 import Kosmos2, open_image
from tokenizer import Entity, parse

SCENE = TINY / "scene.png"


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_arguments():
    """In a new process: the caption on stdout, the annotated image, and its path on stderr."""
    done = subprocess.run([sys.executable, ROOT / "sample.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("An image of") and done.stdout.count("\n") == 1
    assert "wrote scene.boxes.png" in done.stderr and "first token" in done.stderr
    assert Image.open("scene.boxes.png").width >= Image.open(SCENE).width
    assert os.listdir() == ["scene.boxes.png"]


@pytest.mark.parametrize(
    ("arguments", "beginning"),
    [
        (["--task", "caption"], "An image of"), (["--task", "detail"], "There is"),
        (["--task", "ground", "--text", "a fire"], "a fire\n  0."), (["--task", "refer", "--box", "0.1,0.1,0.4,0.4"], "It is the"),
        (["--task", "refer", "--text", "the fire"], "the fire\n  0."),
        (["--task", "vqa", "--text", "How many things are there?"], ""),
        (["--task", "plain"], "An image of"), (["--task", "answer", "--text", "How many things are there?"], ""),
        (["--prompt", "Question: How many things are there? Answer:"], "Question: How many things are there? Answer:"),
        (["--prompt", "An image of"], "An image of"), (["--num-beams", "3"], "An image of"),
        (["--temperature", "0.7", "--top-p", "0.9", "--top-k", "20", "--seed", "1"], "An image of"),
        (["--task", "refer", "--box", "44,863"], "It is the"), (["--task", "refer", "--box", "60,60,300,300"], "It is the"),
        (["--precision", "bf16"], "An image of"),
    ],
)  # fmt: skip
def test_tasks_and_options(capsys, arguments, beginning):
    status, out, err = run(capsys, SCENE, *arguments)
    assert status == 0, err
    assert out.startswith(beginning) and out.strip() and out.count("\n") == 1 + beginning.count("\n")


def test_text_alone(capsys):
    status, out, err = run(capsys, "--task", "text", "--text", "An image of a", "--text", "An image of two")
    assert status == 0 and os.listdir() == [] and "no image" in err
    assert [line[:13] for line in out.splitlines()] == ["An image of a", "An image of t"]


def test_the_example_defines_the_task(capsys, tmp_path):
    """Two images in one prompt: the box is described the way the box of the first image was."""
    Scene((Thing("heart", "green", (0.7, 0.3), 0.35),), "light", 1).draw().resize((300, 200)).save(
        "first.png"
    )
    Scene((Thing("star", "red", (0.4, 0.5), 0.35),), "light", 2).draw().save("second.png")
    answers = {}
    boxes = ["--box", "158,25,263,95", "--box", "0.225,0.325,0.575,0.675"]
    for words in ("green.", "a heart."):
        arguments = ["--task", "context", "--text", words, *boxes]
        status, answers[words], err = run(capsys, "first.png", "second.png", *arguments)
        assert status == 0, err
    assert answers == {"green.": "red.\n", "a heart.": "a star.\n"}
    status, out, _ = run(capsys, "first.png", "second.png", "--task", "context", "--text", "heart.", "--json")
    row = json.loads(out)
    assert status == 0 and row["image"] == ["first.png", "second.png"] and row["text"]
    assert row["prompt"] == "<image> heart.<image>"
    assert run(capsys, "first.png", "--task", "context", "--text", "heart.")[0] == 1


def test_results_and_resume(capsys, tmp_path):
    """A run that stopped within a line is continued and gives the results of an uninterrupted run."""
    folder, complete, cut = tmp_path / "images", tmp_path / "complete.jsonl", tmp_path / "cut.jsonl"
    folder.mkdir()
    for i in range(5):
        Image.open(SCENE).rotate(90 * i).save(folder / f"{i}.png")
    questions = ["--text", "What color is the house?", "--text", "How many things are there?"]
    ask = [folder, "--task", "answer", *questions, "--batch-size", 2]
    status, out, _ = run(capsys, *ask, "--results", complete)
    rows = [json.loads(line) for line in complete.read_text().splitlines()]
    assert status == 0 and out == "" and len(rows) == 10
    assert [Path(row["image"]).stem for row in rows[::2]] == list("01234")
    for keep in (0, 3, 1500, len(complete.read_bytes()) - 1):
        cut.write_bytes(complete.read_bytes()[:keep])
        if keep:
            assert run(capsys, *ask, "--results", cut)[0] == 1  # the file exists
        assert run(capsys, *ask, "--results", cut, "--resume")[0] == 0
        assert cut.read_text() == complete.read_text()
    status, _, err = run(capsys, folder, "--results", complete, "--resume")
    assert status == 1 and "a different prompt" in err and complete.read_text() == cut.read_text()
    (tmp_path / "notes.txt").write_text("dear diary\n")
    assert run(capsys, *ask, "--results", tmp_path / "notes.txt", "--resume")[0] == 1


def test_processes_share_the_images(capsys, tmp_path, monkeypatch):
    """Each rank of torchrun writes its own file; --resume skips what is in any of them."""
    folder, results = tmp_path / "images", tmp_path / "out.jsonl"
    folder.mkdir()
    for i in range(5):
        Image.open(SCENE).save(folder / f"{i}.png")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert run(capsys, folder, "--results", results)[0] == 0
    found = [
        [json.loads(line)["image"] for line in (tmp_path / f"out.{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    ]
    assert [[Path(name).stem for name in part] for part in found] == [["0", "2", "4"], ["1", "3"]]
    Image.open(SCENE).save(folder / "5.png")
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name)
    (tmp_path / "out.backup.jsonl").write_text(
        '{"image": "5.png", "prompt": "of another run"}\n'
    )  # not the file of a rank
    assert run(capsys, folder, "--results", results, "--resume")[0] == 0
    assert [Path(json.loads(line)["image"]).stem for line in results.read_text().splitlines()] == ["5"]


def test_json(capsys):
    status, out, _ = run(capsys, SCENE, "--json")
    assert status == 0 and os.listdir() == []
    row = json.loads(out)
    assert row["image"] == str(SCENE) and row["raw"].startswith("<grounding> An image of")
    assert (row["text"], [tuple(e["phrase"] for e in row["entities"])]) == (
        parse(row["raw"])[0], [tuple(e.phrase for e in parse(row["raw"])[1])])  # fmt: skip
    width, height = Image.open(SCENE).size
    for entity in row["entities"]:
        start, end = entity["span"]
        assert row["text"][start:end] == entity["phrase"]
        for box, pixels in zip(entity["boxes"], entity["pixel_boxes"], strict=True):
            assert pixels == [box[0] * width, box[1] * height, box[2] * width, box[3] * height]


def test_folders_batches_and_failures(capsys, tmp_path):
    """A bad image does not stop the others; batching does not change the texts."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    image = Image.open(SCENE)
    for i in range(3):
        image.rotate(90 * i).save(folder / f"{i} größe.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (folder / "notes.txt").write_text("not an image")
    texts = []
    for size in (1, 8):
        status, out, err = run(capsys, folder, "--batch-size", size, "--output", tmp_path / "out", "--json")
        assert status == 1 and "broken.jpg" in err and "1 of 4 failed" in err and "Traceback" not in err
        texts.append([json.loads(line)["text"] for line in out.splitlines()])
    assert texts[0] == texts[1] and len(texts[0]) == 3
    assert sorted(os.listdir(tmp_path / "out")) == [f"{i} größe.boxes.png" for i in range(3)]
    status, out, err = run(capsys, folder / "0 größe.png", tmp_path / "none.png")
    assert status == 1 and out.count("An image of") == 1 and "no image at" in err


def test_streaming_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, out, _ = run(capsys, SCENE)
    assert out.startswith("An image of") and out.count("\n") == 1
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert run(capsys, SCENE)[1] == out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--task", "ground"], 2, "needs a non-empty text"), (["--task", "vqa", "--text", " "], 2, "needs a non-empty text"),
        (["--task", "refer"], 2, "needs a box"), (["--task", "dance"], 2, "invalid choice"), (["--box", "1,2,3"], 2, "1,2,3"),
        (["--prompt", "a", "--text", "b"], 2, "--prompt"), (["--batch-size", "0"], 2, "--batch-size"),
        (["--text", "a"], 2, "takes no text"), (["--top-boxes", "3"], 2, "--top-boxes"), (["none.png"], 1, "no image at none.png"),
        (["https://example.org/a.png"], 1, "download"), (["--checkpoint", "nothing"], 1, "no checkpoint at nothing"),
        (["--max-new-tokens", "5000"], 1, "context holds 2048"), (["--temperature", "-1"], 1, "temperature"),
        (["--box", "0.1,0.1,0.5,0.5"], 1, "boxes: 1, phrases: 0"), (["--device", "toaster"], 1, "toaster"),
        (["--task", "refer", "--box", "1,1,9000,9000"], 1, "beyond the image"), (["."], 1, "no images in folder"),
        (["--prompt", "<image> and <image>"], 1, "2 <image> tags"), (["--task", "text", "--text", "a", "--output", "x.png"], 2, "--output"), (["--output", "no/such/x.png"], 1, "no/such"),
        (["--task", "refer", "--text", " "], 2, "non-empty"), (["--task", "ground", "--text", "a", "--box", "1,2"], 2, "not both"),
        (["--task", "vqa", "--text", "<image>?"], 2, "<image>"), (["--task", "refer", "--box", "0.1,0.1,1.5,0.5"], 1, "mixes"),
        ([SCENE, "--output", SCENE], 1, "one of the images"), (["--output", "x.xyz"], 1, "x.xyz"), (["--output", "x.psd"], 1, "x.psd"), (["--device", "cuda:9"], 1, "cuda"),
        (["--checkpoint", "../nothing/here"], 1, "no checkpoint at"),
    ],
)  # fmt: skip
def test_errors_are_one_line(capsys, arguments, status, words):
    found, out, err = run(capsys, *arguments)
    if arguments[:2] == ["--device", "cuda:9"] and torch.cuda.is_available():
        pytest.skip("there is a cuda device")
    assert found == status and words in err and "Traceback" not in err and out.count("An image") <= 1
    if status == 1:
        assert sum(line.startswith("sample: ") for line in err.splitlines()) == 1


def test_interrupted(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "run", stop)
    assert run(capsys)[0] == 130


def test_stdout_closed_early():
    command = f'"{sys.executable}" "{ROOT / "sample.py"}" "{SCENE}" "{SCENE}" --json | head -c 1'
    done = subprocess.run(
        ["bash", "-c", command + '; exit "${PIPESTATUS[0]}"'], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_ngram_blocking_comes_from_the_checkpoint(capsys, tmp_path):
    folder = copy(TINY, tmp_path / "blocked")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["no_repeat_ngram_size"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    texts = [
        run(capsys, SCENE, "--task", "detail", "--json", *more)[1]
        for more in ([], ["--checkpoint", folder], ["--checkpoint", folder, "--no-repeat-ngram-size", "0"])
    ]
    raws = [json.loads(text)["raw"] for text in texts]
    assert raws[0] == raws[2] != raws[1]


def test_many_questions_encode_the_image_once(capsys, monkeypatch):
    questions = ["How many things are there?", "Is there a red star?", "What is left of the fire?"]
    alone = [run(capsys, SCENE, "--task", "vqa", "--text", q, "--json")[1] for q in questions]
    calls, encode = [], Kosmos2.encode_image
    monkeypatch.setattr(Kosmos2, "encode_image", lambda self, *a: calls.append(1) or encode(self, *a))
    texts = [part for q in questions for part in ("--text", q)]
    status, out, err = run(capsys, SCENE, "--task", "vqa", *texts, "--json")
    assert status == 0, err
    assert len(calls) == 1
    for line, single in zip(out.splitlines(), alone, strict=True):
        assert json.loads(line)["raw"] == json.loads(single)["raw"]


def test_top_boxes_and_scores(capsys):
    status, out, err = run(
        capsys, SCENE, "--task", "ground", "--text", "the fire", "--top-boxes", "4", "--json"
    )
    assert status == 0, err
    entity = json.loads(out)["entities"][0]
    assert entity["phrase"] == "the fire" and entity["scores"] == sorted(entity["scores"], reverse=True)
    assert 1 <= len(entity["boxes"]) == len(entity["scores"]) <= 4
    status, out, _ = run(capsys, SCENE, "--task", "refer", "--text", "the fire", "--top-boxes", "2")
    assert status == 0 and out.startswith("the fire\n  ") and os.listdir() == ["scene.boxes.png"]
    _, out, _ = run(capsys, SCENE, "--json")
    assert all(0 < score <= 1 for e in json.loads(out)["entities"] for score in e["scores"])


def test_several_images_in_one_prompt(capsys):
    status, out, err = run(capsys, SCENE, SCENE, "--prompt", "<image>An image of a star.<image>An image of")
    assert status == 0, err
    assert out.count("\n") == 1


def test_images_of_every_kind(tmp_path):
    base = Image.open(SCENE).convert("RGB").resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees
    base.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (40, 60)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    Image.fromarray((torch.arange(16).reshape(4, 4) * 4096).to(torch.uint16).numpy()).save(
        tmp_path / "deep.png"
    )
    assert open_image(tmp_path / "deep.png").getpixel((0, 2)) == (128, 128, 128)
    for mode, name in (
        ("L", "gray.png"),
        ("CMYK", "print.jpg"),
        ("P", "palette.gif"),
        ("1", "bits.tif"),
        ("LA", "la.png"),
    ):
        base.convert(mode).save(tmp_path / name)
        image = open_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (60, 40)


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 700), (640, 480)])
def test_labels_stay_inside(size, monkeypatch):
    """Labels stay within the image for images of any size and phrases of any length."""
    drawn = []
    original = ImageDraw.ImageDraw.text

    def spy(self, at, text, *args, **kwargs):
        font = kwargs["font"]
        drawn.append((at[0], self.textlength(text, font=font), self._image.size, kwargs.get("anchor")))
        return original(self, at, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    entities = [
        Entity("a snowman in a very long red scarf " * 3, (0, 9), [(0.9, 0.0, 1.0, 0.1)]),
        Entity("x", (9, 10), [(0, 0, 1, 1)]),
    ]
    answer = script.Answer("a snowman in a very long red scarf", "", entities)
    out = script.draw_answers(Image.new("RGB", size), [answer, answer])
    assert out.size[0] >= size[0] and drawn
    for x, length, (width, _), _ in drawn:
        assert x >= 0 and x + length <= width + 1


# ------------------------------------------------------------------------------------------------- requests


REQUESTS = [
    {"image": "a.png", "task": "caption", "id": 1},
    {"image": "a.png", "task": "answer", "text": "Is there a fire?", "id": "two"},
    {"image": "a.png", "task": "ground", "text": "the fire"},
    {"image": "b.png", "prompt": "<grounding><phrase> It</phrase> is", "boxes": [[0.1, 0.4, 0.4, 0.8]], "id": 4},
    {"image": "b.png", "task": "refer", "boxes": [10, 20, 100, 200]},
    {"image": ["a.png", "b.png"], "task": "context", "text": "a fire.", "boxes": [[0.5, 0.5, 0.8, 0.9], [44, 863]]},
    {"task": "text", "text": "An image of a", "note": {"any": ["thing"]}},
    {"image": "a.png", "task": "detail"},
]  # fmt: skip


@pytest.fixture
def requests_file():
    """REQUESTS as a file, with the images next to it."""
    Image.open(SCENE).save("a.png")
    Image.open(TINY / "busy.png").save("b.png")
    Path("requests.jsonl").write_text("\n".join(map(json.dumps, REQUESTS)))
    return "requests.jsonl"


def ask_stdin(capsys, monkeypatch, lines: list[str], *arguments) -> tuple[int, str, str]:
    """sample.py with these lines as the requests on stdin."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return run(capsys, "--requests", "-", *arguments)


def without_scores(line: str) -> dict:
    """A line of --json without its scores, which differ by rounding between batches."""
    row = json.loads(line)
    for entity in row["entities"]:
        del entity["scores"]
    return row


def test_requests(capsys, monkeypatch, requests_file):
    """Requests of all kinds in common batches are answered as if each was run on its own; other keys
    are copied."""
    alone = []
    for request in REQUESTS:
        status, out, err = ask_stdin(capsys, monkeypatch, [json.dumps(request)], "--json")
        assert status == 0, err
        alone.append(without_scores(out))
    for size in (1, 3, 8):
        status, out, err = run(capsys, "--requests", requests_file, "--json", "--batch-size", size)
        assert status == 0 and [without_scores(line) for line in out.splitlines()] == alone, err
    assert [row.get("id") for row in alone] == [1, "two", None, 4, None, None, None, None]
    assert alone[6]["note"] == {"any": ["thing"]} and alone[6]["image"] is None
    assert alone[5]["image"] == ["a.png", "b.png"]
    command_line = ["a.png", "--task", "answer", "--text", "Is there a fire?", "--json"]
    assert alone[1] == {"id": "two"} | without_scores(run(capsys, *command_line)[1])


def test_requests_that_fail(capsys, monkeypatch, requests_file):
    """A missing image, a bad box and a prompt that is too long fail alone: the other requests, also
    those about the same image, are answered."""
    bad = [
        {"image": "none.png"},
        {"image": "a.png", "task": "refer", "boxes": [[0.5, 0.5, 0.2, 0.6]]},
        {"image": "a.png", "prompt": "An image of " + "a red cup and " * 900},
        {"image": "b.png", "prompt": "<phrase> a <phrase> b</phrase>"},
    ]
    good = [{"image": "a.png", "id": 1}, {"image": "b.png", "task": "plain", "id": 2}]
    lines = [json.dumps(row) for row in [good[0], bad[0], bad[1], good[0], bad[2], good[0], bad[3], good[1]]]
    status, out, err = ask_stdin(capsys, monkeypatch, lines, "--json")
    assert [json.loads(line)["id"] for line in out.splitlines()] == [1, 1, 1, 2]
    assert status == 1 and "4 of 8 failed" in err and "Traceback" not in err
    for words in (
        "no image at none.png",
        "box 0.5,0.5,0.2,0.6",
        "context holds 2048",
        "inside another <phrase>",
    ):
        assert words in err


def test_requests_are_resumed(capsys, requests_file):
    assert run(capsys, "--requests", requests_file, "--results", "out.jsonl")[0] == 0
    complete = Path("out.jsonl").read_text()
    Path("out.jsonl").write_text("".join(complete.splitlines(keepends=True)[:3]))
    assert run(capsys, "--requests", requests_file, "--results", "out.jsonl", "--resume")[0] == 0
    assert Path("out.jsonl").read_text() == complete


def test_many_requests_about_one_image(capsys, monkeypatch, requests_file):
    """--batch-size limits the rows of a batch, also if all requests are about the same image."""
    rows = []
    prefill = Kosmos2.prefill

    def count(self, tokens, *args, **kwargs):
        rows.append(len(tokens))
        return prefill(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Kosmos2, "prefill", count)
    lines = [
        json.dumps({"image": "a.png", "task": "answer", "text": f"Is there a {kind}?"}) for kind in DRAWINGS
    ]
    status, out, _ = ask_stdin(capsys, monkeypatch, lines, "--batch-size", 4, "--json")
    assert status == 0 and len(out.splitlines()) == len(DRAWINGS) and max(rows) == 4


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nonsense", "Expecting value"), ("[1]", "JSON object"), ('{"task": "dance"}', "'dance'"),
        ('{"image": "a.png", "task": "vqa"}', "needs a non-empty text"), ('{"prompt": "a", "task": "caption"}', "one or the other"),
        ('{"task": "vqa", "text": ["a", "b"]}', "one text"), ('{"images": "a.png"}', "needs an image"),
        ('{"image": 5}', "image: expected"), ('{"image": "a.png", "prompt": 5}', "prompt: expected"),
        ('{"image": "a.png", "task": "vqa", "text": 5}', "text: expected"),
        ('{"image": "a.png", "task": "refer", "boxes": [[1, 2, 3]]}', "box 1,2,3"),
        ('{"image": "a.png", "task": "refer", "boxes": "0,0,1,1"}', "box '0,0,1,1'"),
    ],
)  # fmt: skip
def test_bad_requests_are_named_by_line(capsys, monkeypatch, line, words):
    status, out, err = ask_stdin(capsys, monkeypatch, ['{"image": "a.png"}', line])
    assert status == 1 and "stdin, line 2: " in err and words in err and err.count("\n") == 1 and out == ""


def test_top_boxes_requires_requests_for_boxes(capsys, monkeypatch, requests_file):
    phrase = '{"image": "a.png", "task": "ground", "text": "the fire"}'
    status, out, _ = ask_stdin(capsys, monkeypatch, [phrase], "--top-boxes", 2, "--json")
    assert status == 0 and len(json.loads(out)["entities"][0]["boxes"]) == 2
    status, out, err = ask_stdin(capsys, monkeypatch, [phrase, '{"image": "a.png"}'], "--top-boxes", 2)
    assert status == 1 and out == "" and "--top-boxes" in err


def test_resume_compares_resolved_paths_and_checkpoints(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    Image.open(SCENE).save("images/a.png")
    Path("link").symlink_to("images")
    assert run(capsys, "images/a.png", "--results", "out.jsonl")[0] == 0
    for spelling in ("./images/a.png", tmp_path / "images" / "a.png", "link/a.png", "images/../images/a.png"):
        assert run(capsys, spelling, "--results", "out.jsonl", "--resume")[0] == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 1
    folder = copy(TINY, tmp_path / "other")
    status, _, err = run(capsys, "images/a.png", "--results", "out.jsonl", "--resume", "--checkpoint", folder)
    assert status == 1 and "a different checkpoint" in err
    for spelling in (folder, f"{folder}/", "./other"):
        options = ("--results", "other.jsonl", "--resume", "--checkpoint", spelling)
        assert run(capsys, "images/a.png", *options)[0] == 0
    assert len(Path("other.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("box", ["100,20,30,40", "0.25,0.5,0.75,0.4", "9000,1,9001,2", "0.5,0.5,70,80"])
def test_errors_quote_the_box_as_typed(capsys, box):
    status, _, err = run(capsys, SCENE, "--task", "refer", "--box", box)
    assert status == 1 and f"box {box}" in err


def test_results_in_a_folder(capsys):
    status, out, err = run(capsys, SCENE, "--results", ".")
    assert status == 2 and "is a folder" in err and out == ""


@pytest.mark.parametrize(
    "kind", [TypeError, NotImplementedError, RuntimeError, MemoryError, ZeroDivisionError, struct.error]
)
def test_any_error_of_a_decoder_concerns_one_image(capsys, monkeypatch, kind):
    """Whatever exception Pillow raises: the other images are done, and --resume continues after it."""
    for name in ("a.png", "b.png", "c.png"):
        Image.open(SCENE).save(name)
    original = Image.open

    def fails_for_b(path, *args, **kwargs):
        if str(path).endswith("b.png"):
            raise kind("broken")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Image, "open", fails_for_b)
    for more in ([], ["--resume"]):
        status, _, err = run(capsys, "a.png", "b.png", "c.png", "--results", "out.jsonl", *more)
        assert status == 1 and "b.png: broken" in err and "Traceback" not in err
        images = [json.loads(line)["image"] for line in Path("out.jsonl").read_text().splitlines()]
        assert images == ["a.png", "c.png"]
    status, _, err = run(capsys, "b.png")
    assert status == 1 and "b.png: broken" in err and err.count("\n") == 1


def test_folders_take_every_format_and_name_the_rest(capsys, tmp_path):
    folder = tmp_path / "mixed"
    (folder / "inner").mkdir(parents=True)
    image = Image.open(SCENE).convert("RGB")
    image.save(folder / "a.jfif", "JPEG")
    image.save(folder / "b.webp")
    image.save(folder / "c.ppm")
    image.save(folder / "d.TIFF")
    expected = ["a.jfif", "b.webp", "c.ppm", "d.TIFF"]
    if features.check("avif"):
        image.save(folder / "e.avif")
        expected.append("e.avif")
    (folder / "f.heic").write_bytes(b"")
    (folder / "g.txt").write_bytes(b"")
    (folder / "h.txt").write_bytes(b"")
    status, out, err = run(capsys, folder, "--json")
    names = [Path(json.loads(line)["image"]).name for line in out.splitlines()]
    assert status == 0 and names == expected
    assert "1 x .heic" in err and "2 x .txt" in err and "1 x folder" in err


CP1252 = {"PYTHONIOENCODING": "cp1252", "LC_ALL": "C", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_output_is_utf8_in_any_locale(arguments):
    """With a file name that is not Latin and one that is not valid UTF-8, into a file."""
    Image.open(SCENE).save("猫.png")
    Image.open(SCENE).save(b"bad\xff.png".decode("utf-8", "surrogateescape"))
    command = [sys.executable, ROOT / "sample.py", ".", *arguments]
    with open("out.txt", "wb") as out:
        done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, env=os.environ | CP1252)
    assert done.returncode == 0, done.stderr
    lines = Path("out.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 and "猫.png" in lines[1]
    if arguments:
        assert all(json.loads(line)["text"] for line in lines)


def test_stdin_is_utf8_in_any_locale():
    Image.open(SCENE).save("猫.png")
    request = json.dumps({"image": "猫.png", "note": "猫"}, ensure_ascii=False)
    command = [sys.executable, ROOT / "sample.py", "--requests", "-", "--json"]
    done = subprocess.run(command, input=request.encode(), capture_output=True, env=os.environ | CP1252)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert (row["image"], row["note"]) == ("猫.png", "猫")


def test_html_page(capsys, tmp_path):
    name = '<img src=x onerror=alert(1)>&".png'
    Image.open(SCENE).save(name)
    status, out, err = run(capsys, name, SCENE, "--output", "page.html")
    page = Path("page.html").read_text(encoding="utf-8")
    assert status == 0 and page.count("<figure>") == 2 and "<img src=x" not in page
    assert "&lt;img src=x" in page and page.count("data:image/jpeg;base64,") == 2
    sources = re.findall(r'<[^<>]*\s(?:src|href)\s*=\s*"([^"]*)', page)
    assert len(sources) == 2 and all(source.startswith("data:") for source in sources)
    assert not re.search(r"url\(|@import|https?:", page)  # nothing is loaded from elsewhere
    entity = Entity("<b>", (0, 3), [(0.1, 0.1, 0.5, 0.5)], [0.5])
    figure = script.html_figure(Image.new("RGB", (9, 9)), [script.Answer("<b> & <i>", "", [entity])])
    assert "&lt;b&gt;" in figure and "<b>" not in figure and "<i>" not in figure and "50%" in figure


def test_html_page_escapes_prompts(capsys):
    prompt = '<script>alert(1)</script> & "'
    assert run(capsys, SCENE, "--prompt", prompt, "--output", "page.html", "--max-new-tokens", 3)[0] == 0
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1 and "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in page


def test_length_limits_cut_the_text(capsys):
    """A shorter answer is the beginning of a longer one, and its boxes are boxes of the longer one."""
    row = json.loads(run(capsys, TINY / "busy.png", "--json")[1])
    boxes = [box for entity in row["entities"] for box in entity["boxes"]]
    for limit in (1, 2, 3, 5, 6, 8, 9, 11, 14, 20, 26):
        cut = json.loads(run(capsys, TINY / "busy.png", "--json", "--max-new-tokens", limit)[1])
        assert row["text"].startswith(cut["text"])
        assert all(box in boxes for entity in cut["entities"] for box in entity["boxes"])


def test_large_images_are_resized_while_reading(tmp_path):
    """A batch of twelve photos of 24 megapixels takes less than half the memory of their pixels."""
    script_text = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\nimport sample\n"
        "sample.main(['one.png', '--json'])\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "sample.main(['photos', '--json', '--batch-size', '12'])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    Image.open(SCENE).save("one.png")
    Path("photos").mkdir()
    photo = Image.new("RGB", (6000, 4000), "white")
    for i in range(12):
        photo.save(f"photos/{i}.jpg")
    command = [sys.executable, "-c", script_text, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 400_000  # KiB; the pixels of all twelve are 864,000


def test_a_long_prompt_does_not_shorten_the_answers_beside_it(capsys, monkeypatch, requests_file):
    """Only the answer to a prompt that nearly fills the context has a lower limit of new tokens."""
    detail = json.dumps({"image": "a.png", "task": "detail"})
    long = json.dumps({"image": "b.png", "prompt": "An image of " + "a red cup and " * 502})
    status, alone, _ = ask_stdin(capsys, monkeypatch, [detail], "--json")
    assert status == 0
    status, out, err = ask_stdin(capsys, monkeypatch, [detail, long], "--json")
    assert status == 0 and without_scores(out.splitlines()[0]) == without_scores(alone), err
    # The long prompt has no room for 200 new tokens: only this request fails.
    status, out, err = ask_stdin(capsys, monkeypatch, [detail, long], "--json", "--min-new-tokens", 200)
    assert status == 1 and len(out.splitlines()) == 1 and "context holds 2048" in err


def test_images_of_the_same_name_keep_their_files(capsys, tmp_path):
    """Each has a file of its own, also if its number is another image's name, and also after --resume."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.bmp", "a.png", "a-2.png"):
        Image.open(SCENE).save(folder / name)
    options = ["--output", "drawn", "--results", "out.jsonl"]
    assert run(capsys, folder / "a.bmp", folder / "a-2.png", *options)[0] == 0
    first = {path.name: path.stat().st_mtime_ns for path in Path("drawn").iterdir()}
    assert sorted(first) == ["a-2.boxes.png", "a.boxes.png"]
    inputs = [folder / "a.bmp", folder / "a-2.png", folder / "a.png"]
    assert run(capsys, *inputs, *options, "--resume")[0] == 0
    assert sorted(path.name for path in Path("drawn").iterdir()) == [
        "a-2.boxes.png",
        "a-3.boxes.png",
        "a.boxes.png",
    ]
    assert all((Path("drawn") / name).stat().st_mtime_ns == time for name, time in first.items())


def test_processes_write_their_own_pages_and_agree_on_what_is_done(capsys, monkeypatch, requests_file):
    """Of three requests, two of them equal, one is done: the processes answer the other two."""
    lines = ['{"image": "a.png"}', '{"image": "b.png"}', '{"image": "a.png"}']
    Path("three.jsonl").write_text("\n".join(lines))
    assert run(capsys, "a.png", "--results", "out.jsonl")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        options = ["--results", "out.jsonl", "--resume", "--output", "page.html"]
        assert run(capsys, "--requests", "three.jsonl", *options)[0] == 0
    names = [
        Path(json.loads(line)["image"]).name
        for file in ("out.jsonl", "out.0.jsonl", "out.1.jsonl")
        for line in Path(file).read_text().splitlines()
    ]
    assert sorted(names) == ["a.png", "a.png", "b.png"]
    figures = [Path(f"page.{rank}.html").read_text().count("<figure>") for rank in (0, 1)]
    assert figures == [1, 1] and not Path("page.html").exists()


@pytest.mark.parametrize("arguments", [["--num-beams", "3"], ["--task", "ground", "--text", "the fire"]])
def test_a_terminal_shows_the_same_as_a_pipe(capsys, monkeypatch, arguments):
    """Beam search cannot be streamed, and boxes are known only at the end."""
    expected = run(capsys, SCENE, *arguments)[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert expected and run(capsys, SCENE, *arguments)[1] == expected


def test_answers_are_not_printed_behind_the_progress_bar(capsys, monkeypatch):
    for name in ("a.png", "b.png", "c.png"):
        Image.open(SCENE).save(name)
    monkeypatch.setattr(script.Progress, "clear", lambda self: print("cleared"))
    lines = run(capsys, "a.png", "b.png", "c.png", "--batch-size", "1")[1].splitlines()
    answers = [i for i, line in enumerate(lines) if "An image of" in line]
    assert len(answers) == 3 and all(lines[i - 1] == "cleared" for i in answers)


def test_output_needs_an_image(capsys, monkeypatch):
    lines = ['{"task": "text", "text": "An image of"}']
    for path in ("o.png", "folder", "page.html"):
        status, out, err = ask_stdin(capsys, monkeypatch, lines, "--output", path)
        assert status == 1 and "no request has an image" in err and "Traceback" not in err and out == ""


def test_a_wrong_checkpoint_leaves_earlier_files_alone(capsys):
    """A failed start does not make the results file count as existing, nor empty the page."""
    assert run(capsys, SCENE, "--output", "page.html")[0] == 0
    page = Path("page.html").read_text(encoding="utf-8")
    options = [SCENE, "--output", "page.html", "--results", "out.jsonl"]
    assert run(capsys, *options, "--checkpoint", "nothing")[0] == 1
    assert Path("page.html").read_text(encoding="utf-8") == page
    assert run(capsys, *options)[0] == 0 and len(Path("out.jsonl").read_text().splitlines()) == 1


def test_a_results_file_of_something_else(capsys):
    Path("out.jsonl").write_text('{"image": 42, "prompt": "a", "given_boxes": [], "checkpoint": "b"}\n')
    status, _, err = run(capsys, SCENE, "--results", "out.jsonl", "--resume")
    assert status == 1 and "not a results file" in err


def test_a_batch_that_fails_does_not_stop_the_others(capsys, monkeypatch):
    """Such as one that needs more memory than the GPU has."""
    for name in ("a.png", "b.png", "c.png"):
        Image.open(SCENE).save(name)
    encode = Kosmos2.encode_image
    calls = []

    def fail_once(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory\nand a long report")
        return encode(self, *args)

    monkeypatch.setattr(Kosmos2, "encode_image", fail_once)
    status, out, err = run(capsys, "a.png", "b.png", "c.png", "--batch-size", "1", "--json")
    assert status == 1 and [json.loads(line)["image"] for line in out.splitlines()] == ["a.png", "c.png"]
    assert "sample: b.png: out of memory\n" in err and "1 of 3 failed: b.png" in err


def test_a_text_that_is_not_unicode_concerns_one_request(capsys, monkeypatch, requests_file):
    lines = [json.dumps({"image": "a.png", "task": "ground", "text": "\ud800"}), '{"image": "a.png"}']
    status, out, err = ask_stdin(capsys, monkeypatch, lines, "--json")
    assert (
        status == 1
        and len(out.splitlines()) == 1
        and "not valid Unicode" in err
        and err.count("sample: ") == 2
    )


def test_the_output_never_replaces_an_input(capsys):
    for name in ("first.png", "second.png"):
        Image.open(TINY / name).save(name)
    context = ["first.png", "second.png", "--task", "context", "--text", "red."]
    status, _, err = run(capsys, *context, "--output", "first.png")
    assert status == 1 and "one of the images" in err
    Path("in").mkdir()
    Image.open(SCENE).save("in/a.png")
    Image.open(TINY / "busy.png").save("in/a.boxes.png")
    before = Path("in/a.boxes.png").read_bytes()
    for folder in ("in", Path("in").resolve()):
        assert run(capsys, "in/a.png", "in/a.boxes.png", "--output", folder)[0] == 0
        assert Path("in/a.boxes.png").read_bytes() == before and Path("in/a-2.boxes.png").exists()
    for options in (["--results", "x.html"], ["--requests", "x.html"]):
        assert run(capsys, *options, "--output", "x.html")[0] == 2


def test_requests_that_differ_only_in_extra_keys_are_resumed(capsys, monkeypatch, requests_file):
    lines = [json.dumps({"image": name, "id": i}) for i, name in enumerate(("a.png", "b.png", "a.png"))]
    Path("three.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = ["--requests", "three.jsonl", "--results", "out.jsonl", "--resume"]
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, *options)[0] == 0
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert run(capsys, *options)[0] == 0
    rows = Path("out.jsonl").read_text() + Path("out.1.jsonl").read_text()
    assert sorted(json.loads(line)["id"] for line in rows.splitlines()) == [0, 1, 2]


def test_resume_keeps_earlier_drawings(capsys):
    options = [SCENE, "--task", "ground", "--results", "out.jsonl", "--output", "drawn"]
    assert run(capsys, *options, "--text", "a fire")[0] == 0
    before = Path("drawn/scene.boxes.png").read_bytes()
    assert run(capsys, *options, "--text", "a fire", "--text", "a snowman", "--resume")[0] == 0
    assert Path("drawn/scene.boxes.png").read_bytes() == before
    assert Path("drawn/scene-2.boxes.png").exists()


def test_resume_repairs_a_cut_page(capsys):
    Image.open(SCENE).save("a.png")
    Image.open(SCENE).save("b.png")
    options = ["a.png", "b.png", "--batch-size", "1", "--output", "page.html", "--results", "out.jsonl"]
    assert run(capsys, *options)[0] == 0
    page, rows = Path("page.html").read_bytes(), Path("out.jsonl").read_text().splitlines(keepends=True)
    for cut in (len(page) - 10_000, 100, 0):  # in the second figure, in the head, before it
        Path("page.html").write_bytes(page[:cut])
        Path("out.jsonl").write_text(rows[0] if cut > 1000 else "")
        assert run(capsys, *options, "--resume")[0] == 0
        assert Path("page.html").read_bytes() == page


def test_names_that_are_too_long(capsys, monkeypatch):
    long = "x" * 246 + ".png"
    Image.open(SCENE).save(long)
    status, out, err = run(capsys, long)
    assert status == 0 and out.startswith("An image of") and f"wrote {'x' * 200}.boxes.png" in err
    lines = [json.dumps({"image": "x" * 300 + ".png"}), json.dumps({"image": long})]
    status, out, err = ask_stdin(capsys, monkeypatch, lines, "--results", "out.jsonl")
    assert status == 1 and "1 of 2 failed" in err and len(Path("out.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "size"), [("o.blp", (300, 200)), ("o.webp", (17_000, 20)), ("o.gif", (70_000, 2))]
)
def test_drawings_that_pillow_cannot_write(capsys, name, size):
    Image.new("RGB", size).save("a.png")
    status, out, err = run(capsys, "a.png", "--output", name)
    assert status == 1 and f"cannot write {name}" in err and "Traceback" not in err and out


@pytest.mark.parametrize("streams", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams(streams):
    command = f'"{sys.executable}" "{ROOT / "sample.py"}" "{SCENE}" --json --results out.jsonl {streams}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(Path("out.jsonl").read_text().splitlines()) == 1
    assert done.stdout == "" or json.loads(done.stdout)


def test_a_pipe_is_not_an_image(capsys):
    os.mkfifo("pipe.png")
    status, _, err = run(capsys, "pipe.png")
    assert status == 1 and "not a regular file" in err


@pytest.mark.parametrize(
    "line", ['{"image": "a.png", "x": NaN}', '{"image": "a.png", "x": 1e999}', "[" * 9999]
)
def test_requests_that_json_cannot_repeat(capsys, monkeypatch, requests_file, line):
    status, out, err = ask_stdin(capsys, monkeypatch, ['{"image": "a.png"}', line], "--json")
    assert status == 1 and "stdin, line 2" in err and err.count("\n") == 1 and out == ""


def test_a_wrong_rank(capsys, monkeypatch):
    for rank, world in (("a", "2"), ("3", "2"), ("0", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        status, _, err = run(capsys, SCENE)
        assert status == 1 and "WORLD_SIZE" in err


def test_no_new_tokens(capsys, monkeypatch):
    expected = run(capsys, SCENE, "--max-new-tokens", 0)[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert expected == "An image of\n" == run(capsys, SCENE, "--max-new-tokens", 0)[1]
