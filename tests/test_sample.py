"""The script, as people run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, copy, run
from PIL import Image, ImageDraw
from scenes import Scene, Shape

import sample as script
from kosmos2 import Kosmos2
from tokenizer import Entity, parse

SCENE = TINY / "scene.png"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_without_arguments():
    """In a process of its own: one sentence on stdout, the picture with boxes, and where it is."""
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
        (["--task", "ground", "--text", "a star"], "a star"), (["--task", "refer", "--box", "0.1,0.1,0.4,0.4"], "It is the"),
        (["--task", "refer", "--text", "the star"], "the star"),
        (["--task", "vqa", "--text", "How many shapes are there?"], ""),
        (["--task", "plain"], "An image of"), (["--task", "answer", "--text", "How many shapes are there?"], "five"),
        (["--prompt", "Question: How many shapes are there? Answer:"], "Question: How many shapes are there? Answer:"),
        (["--prompt", "An image of"], "An image of"), (["--num-beams", "3"], "An image of"),
        (["--temperature", "0.7", "--top-p", "0.9", "--top-k", "20", "--seed", "1"], "An image of"),
        (["--task", "refer", "--box", "44,863"], "It is the"), (["--task", "refer", "--box", "60,60,300,300"], "It is the"),
        (["--precision", "bf16"], "An image of"),
    ],
)  # fmt: skip
def test_tasks_and_options(capsys, arguments, beginning):
    status, out, err = run(capsys, SCENE, *arguments)
    assert status == 0, err
    assert out.startswith(beginning) and out.strip() and out.count("\n") == 1


def test_text_alone(capsys):
    status, out, err = run(capsys, "--task", "text", "--text", "An image of a", "--text", "An image of two")
    assert status == 0 and os.listdir() == [] and "no picture" in err
    assert [line[:13] for line in out.splitlines()] == ["An image of a", "An image of t"]


def test_an_example_says_what_is_asked(capsys, tmp_path):
    """Two pictures in one prompt: the same box is described as the box of the first picture was."""
    Scene((Shape("heart", "green", (0.7, 0.3), 0.35),), (204, 204, 204), 1).draw().resize((300, 200)).save(
        "first.png"
    )
    Scene((Shape("star", "red", (0.4, 0.5), 0.35),), (204, 204, 204), 2).draw().save("second.png")
    said = {}
    for words in ("green.", "a heart."):
        arguments = [
            "--task",
            "context",
            "--text",
            words,
            "--box",
            "158,25,263,95",
            "--box",
            "0.225,0.325,0.575,0.675",
        ]
        status, said[words], err = run(capsys, "first.png", "second.png", *arguments)
        assert status == 0, err
    assert said == {"green.": "red.\n", "a heart.": "a star.\n"}
    status, out, _ = run(capsys, "first.png", "second.png", "--task", "context", "--text", "heart.", "--json")
    row = json.loads(out)
    assert (
        status == 0
        and row["image"] == "second.png"
        and row["prompt"] == "<image> heart.<image>"
        and row["text"] == "star."
    )
    assert run(capsys, "first.png", "--task", "context", "--text", "heart.")[0] == 1


def test_results_and_resume(capsys, tmp_path):
    """A run that was cut in the middle of a line goes on where it stopped, and gives what one run gives."""
    folder, whole, cut = tmp_path / "pictures", tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    folder.mkdir()
    for i in range(5):
        Image.open(SCENE).rotate(90 * i).save(folder / f"{i}.png")
    ask = [
        folder,
        "--task",
        "answer",
        "--text",
        "What color is the star?",
        "--text",
        "How many shapes are there?",
        "--batch-size",
        2,
    ]
    status, out, _ = run(capsys, *ask, "--results", whole)
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert (
        status == 0
        and out == ""
        and len(rows) == 10
        and [Path(r["image"]).stem for r in rows[::2]] == list("01234")
    )
    for keep in (0, 3, 1500, len(whole.read_bytes()) - 1):
        cut.write_bytes(whole.read_bytes()[:keep])
        assert run(capsys, *ask, "--results", cut)[0] == 1  # would overwrite it
        assert run(capsys, *ask, "--results", cut, "--resume")[0] == 0
        assert cut.read_text() == whole.read_text()
    status, _, err = run(capsys, folder, "--results", whole, "--resume")
    assert status == 1 and "other prompts" in err and whole.read_text() == cut.read_text()
    (tmp_path / "notes.txt").write_text("dear diary\n")
    assert run(capsys, *ask, "--results", tmp_path / "notes.txt", "--resume")[0] == 1


def test_processes_share_the_pictures(capsys, tmp_path, monkeypatch):
    """Each of torchrun's ranks writes its own file; a later run with any number of them skips what is in any."""
    folder, results = tmp_path / "pictures", tmp_path / "out.jsonl"
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
    )  # not a rank's
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
    """A bad picture does not stop the others, and neither batch size nor neighbours change a text."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    picture = Image.open(SCENE)
    for i in range(3):
        picture.rotate(90 * i).save(folder / f"{i} größe.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no more")
    (folder / "notes.txt").write_text("not a picture")
    texts = []
    for size in (1, 8):
        status, out, err = run(capsys, folder, "--batch-size", size, "--output", tmp_path / "out", "--json")
        assert status == 1 and "broken.jpg" in err and "1 of 4 failed" in err and "Traceback" not in err
        texts.append([json.loads(line)["text"] for line in out.splitlines()])
    assert texts[0] == texts[1] and len(texts[0]) == 3
    assert sorted(os.listdir(tmp_path / "out")) == [f"{i} größe.boxes.png" for i in range(3)]
    status, out, err = run(capsys, folder / "0 größe.png", tmp_path / "none.png")
    assert status == 1 and out.count("An image of") == 1 and "no picture at" in err


def test_streaming_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, out, _ = run(capsys, SCENE)
    assert out.startswith("An image of") and out.count("\n") == 1
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert run(capsys, SCENE)[1] == out


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--task", "ground"], 2, "--text"), (["--task", "vqa", "--text", " "], 2, "--text"),
        (["--task", "refer"], 2, "--box"), (["--task", "dance"], 2, "invalid choice"), (["--box", "1,2,3"], 2, "1,2,3"),
        (["--prompt", "a", "--text", "b"], 2, "--prompt"), (["--batch-size", "0"], 2, "--batch-size"),
        (["--text", "a"], 2, "takes no --text"), (["--top-boxes", "3"], 2, "--top-boxes"), (["none.png"], 1, "no picture at none.png"),
        (["https://example.org/a.png"], 1, "download"), (["--checkpoint", "nothing"], 1, "no checkpoint at nothing"),
        (["--max-new-tokens", "5000"], 1, "2048 positions"), (["--temperature", "-1"], 1, "temperature"),
        (["--box", "0.1,0.1,0.5,0.5"], 1, "phrases in <phrase>…</phrase>: 0"), (["--device", "toaster"], 1, "toaster"),
        (["--task", "refer", "--box", "1,1,9000,9000"], 1, "beyond the picture"), (["."], 1, "holds no pictures"),
        (["--prompt", "<image> and <image>"], 1, "at 2 places"), (["--task", "text", "--text", "a", "--output", "x.png"], 2, "--output"), (["--output", "no/such/x.png"], 1, "no/such"),
        (["--task", "refer", "--text", " "], 2, "not empty"), (["--task", "ground", "--text", "a", "--box", "1,2"], 2, "one of them"),
        (["--task", "vqa", "--text", "<image>?"], 2, "pictures"), (["--task", "refer", "--box", "0.1,0.1,1.5,0.5"], 1, "mixes"),
        ([SCENE, "--output", SCENE], 1, "itself"), (["--output", "x.pdf"], 1, "x.pdf"), (["--device", "cuda:9"], 1, "cuda"),
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


def test_the_reader_leaves_early():
    command = f'"{sys.executable}" "{ROOT / "sample.py"}" "{SCENE}" "{SCENE}" --json | head -c 1'
    done = subprocess.run(
        ["bash", "-c", command + '; exit "${PIPESTATUS[0]}"'], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


def test_ngram_block_comes_from_the_checkpoint(capsys, tmp_path):
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


def test_many_questions_read_the_picture_once(capsys, monkeypatch):
    questions = ["How many shapes are there?", "Is there a red star?", "What is at the top?"]
    alone = [run(capsys, SCENE, "--task", "vqa", "--text", q, "--json")[1] for q in questions]
    calls, encode = [], Kosmos2.encode_image
    monkeypatch.setattr(Kosmos2, "encode_image", lambda self, *a: calls.append(1) or encode(self, *a))
    texts = [part for q in questions for part in ("--text", q)]
    status, out, err = run(capsys, SCENE, "--task", "vqa", *texts, "--json")
    assert status == 0 and len(calls) == 1, err
    for line, single in zip(out.splitlines(), alone, strict=True):
        assert json.loads(line)["raw"] == json.loads(single)["raw"]


def test_top_boxes_and_scores(capsys):
    status, out, err = run(
        capsys, SCENE, "--task", "ground", "--text", "the star", "--top-boxes", "4", "--json"
    )
    assert status == 0, err
    entity = json.loads(out)["entities"][0]
    assert entity["phrase"] == "the star" and entity["scores"] == sorted(entity["scores"], reverse=True)
    assert 1 <= len(entity["boxes"]) == len(entity["scores"]) <= 4
    status, out, _ = run(
        capsys, SCENE, "--task", "refer", "--text", "the star", "--top-boxes", "2", "--scores"
    )
    assert status == 0 and out.startswith("the star\n  ") and os.listdir() == ["scene.boxes.png"]
    _, out, _ = run(capsys, SCENE, "--json")
    assert all(0 < score <= 1 for e in json.loads(out)["entities"] for score in e["scores"])


def test_several_pictures_in_one_prompt(capsys):
    status, out, err = run(capsys, SCENE, SCENE, "--prompt", "<image>An image of a star.<image>An image of")
    assert status == 0, err
    assert out.count("\n") == 1


def test_pictures_of_every_kind(tmp_path):
    base = Image.open(SCENE).convert("RGB").resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 270 degrees
    base.save(tmp_path / "turned.jpg", exif=exif)
    assert script.open_picture(tmp_path / "turned.jpg").size == (40, 60)
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert script.open_picture(tmp_path / "clear.png").getpixel((1, 1)) == (255, 255, 255)
    Image.fromarray((torch.arange(16).reshape(4, 4) * 4096).to(torch.uint16).numpy()).save(
        tmp_path / "deep.png"
    )
    assert script.open_picture(tmp_path / "deep.png").getpixel((0, 2)) == (128, 128, 128)
    for mode, name in (
        ("L", "grey.png"),
        ("CMYK", "print.jpg"),
        ("P", "palette.gif"),
        ("1", "bits.tif"),
        ("LA", "la.png"),
    ):
        base.convert(mode).save(tmp_path / name)
        picture = script.open_picture(tmp_path / name)
        assert picture.mode == "RGB" and picture.size == (60, 40)


@pytest.mark.parametrize("size", [(1, 1), (2000, 3), (3, 700), (640, 480)])
def test_labels_stay_inside(size, monkeypatch):
    """Whatever the picture's size and the phrase's length, no label leaves the picture."""
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
    answer = {"text": "a snowman in a very long red scarf", "entities": entities}
    out = script.draw_answers(Image.new("RGB", size), [answer, answer], with_scores=True)
    assert out.size[0] >= size[0] and drawn
    for x, length, (width, _), _ in drawn:
        assert x >= 0 and x + length <= width + 1
