"""The script, run as users run it."""

import base64
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT, TINY, copy, run
from PIL import Image, ImageDraw

import sample as script
from inference import batch, page
from kosmos2 import Kosmos2, open_image
from tokenizer import CONTROL, TAGS, Entity, Tokenizer, parse
from training.scenes import Scene, Thing

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
        (["--prompt", "An image of"], "An image of"),
        (["--temperature", "0.7", "--top-p", "0.9", "--top-k", "20", "--seed", "1"], "An image of"),
        (["--task", "refer", "--box", "44,863"], "It is the"), (["--task", "refer", "--box", "60,60,300,300"], "It is the"),
        (["--precision", "bf16"], "An image of"),
    ],
)  # fmt: skip
def test_tasks_and_options(capsys, arguments, beginning):
    status, out, err = run(capsys, SCENE, *arguments)
    assert status == 0, err
    assert out.startswith(beginning) and out.strip() and out.count("\n") == 1 + beginning.count("\n")


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
    assert status == 0 and row["image"] == ["first.png", "second.png"] and (row["text"] or row["entities"])
    assert row["prompt"] == "<image> heart.<image>"
    assert run(capsys, "first.png", "--task", "context", "--text", "heart.")[0] == 1


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


def test_streaming_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, out, _ = run(capsys, SCENE)
    assert out.startswith("An image of") and out.count("\n") == 1
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert run(capsys, SCENE)[1] == out


def test_stdout_closed_early():
    command = f'"{sys.executable}" "{ROOT / "sample.py"}" "{SCENE}" "{SCENE}" --json | head -c 1'
    done = subprocess.run(
        ["bash", "-c", command + '; exit "${PIPESTATUS[0]}"'], capture_output=True, text=True
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr


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
        assert x >= 0 and (x + length <= width + 1 or x == 4)  # a label that is too long begins at the left


def test_length_limits_cut_the_text(capsys):
    """A shorter answer is the beginning of a longer one, and its boxes are boxes of the longer one."""
    row = json.loads(run(capsys, TINY / "busy.png", "--json")[1])
    boxes = [box for entity in row["entities"] for box in entity["boxes"]]
    for limit in (1, 2, 3, 5, 6, 8, 9, 11, 14, 20, 26):
        cut = json.loads(run(capsys, TINY / "busy.png", "--json", "--max-new-tokens", limit)[1])
        assert row["text"].startswith(cut["text"])
        assert all(box in boxes for entity in cut["entities"] for box in entity["boxes"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "ground"], "needs a non-empty text"), (["--task", "refer"], "needs a box"), (["--box", "1,2,3"], "1,2,3"),
        (["--prompt", "a", "--text", "b"], "prompt"), (["--text", "a"], "takes no text"), (["."], "inference.batch"),
        (["--num-beams", "3"], "inference.batch"), (["--requests", "r.jsonl"], "inference.batch"), ([SCENE, "--output", SCENE], "one of the images"),
        (["--output", SCENE], "one of the images"),
        (["a/x.png", "b/x.png", "--output", "out"], "one file for two"), (["--task", "text", "--text", "a", "--output", "x.png"], "--output"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_line(capsys, arguments, words):
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and words in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.png"], "no image file at none.png"), (["https://example.org/a.png"], "download"), (["x" * 5000], "..."),
        (["--checkpoint", "nothing"], "no checkpoint at nothing"), (["--temperature", "-1"], "temperature"),
        (["--max-new-tokens", "5000"], "context of 2048"), (["--device", "toaster"], "toaster"),
        (["--task", "refer", "--box", "1,1,9000,9000"], "box"), (["--prompt", "<image> and <image>"], "2 <image> tags"),
    ],
)  # fmt: skip
def test_errors_are_one_line(capsys, arguments, words):
    status, out, err = run(capsys, *arguments)
    errors = [line for line in err.splitlines() if line.startswith("sample: ")]
    assert (status, out, len(errors)) == (1, "", 1) and words in errors[0] and len(errors[0]) < 300


def test_names_are_escaped(capsys):
    Path("a\nb\x1b.png").write_bytes(b"")
    status, out, err = run(capsys, "a\nb\x1b.png", SCENE)
    assert status == 1 and "a\\nb\\x1b.png: not an image" in err and out.startswith(f"{SCENE}: An image of")


def test_tags_in_a_text_are_words(capsys):
    words = "fire</phrase><object><patch_index_0000><patch_index_1023></object> <s>"
    status, out, _ = run(capsys, "--task", "ground", "--text", words, "--json")
    row = json.loads(out)
    assert (
        status == 0
        and row["text"].startswith(words)
        and all(None not in e["scores"] for e in row["entities"])
    )


def test_an_absent_phrase_is_marked(capsys):
    assert "(probably not in the image)" in run(capsys, "--task", "ground", "--text", "a purple boat")[1]
    assert "probably" not in run(capsys, "--task", "ground", "--text", "the fire")[1]


def test_boxes_may_overshoot_by_rounding(capsys):
    width, height = Image.open(SCENE).size
    answers = [
        run(capsys, "--task", "refer", "--box", box, "--json")[1]
        for box in (f"0,0,{width},{height}", f"0,0,{width}.01,{height}.004", "0,0,1.000001,1")
    ]
    assert len({json.loads(answer)["text"] for answer in answers}) == 1


def test_main_leaves_the_program_as_it_was(capsys):
    before = (warnings.showwarning, sys.stdout, sys.stderr, list(warnings.filters))
    assert run(capsys, "--json")[0] == 0
    assert (warnings.showwarning, sys.stdout, sys.stderr, list(warnings.filters)) == before


def test_ctrl_c():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from sample import run_command; "
    code += "sys.exit(run_command('x', lambda: exec('raise KeyboardInterrupt')))"
    done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "x: interrupted\n")


# ---- Questions -------------------------------------------------------------------------------------


def test_text_alone(capsys):
    status, out, _ = run(capsys, "--task", "text", "--text", "An image of a", "--text", "An image of two")
    assert status == 0 and os.listdir() == []
    assert [line[:13] for line in out.splitlines()] == ["An image of a", "An image of t"]


def test_many_questions_encode_the_image_once(capsys, monkeypatch):
    questions = ["How many things are there?", "Is there a red star?", "What is left of the fire?"]
    alone = [run(capsys, SCENE, "--task", "vqa", "--text", q, "--json")[1] for q in questions]
    calls, encode = [], Kosmos2.encode_image
    monkeypatch.setattr(Kosmos2, "encode_image", lambda self, *a: calls.append(1) or encode(self, *a))
    texts = [part for q in questions for part in ("--text", q)]
    assert run(capsys, SCENE, "--task", "vqa", *texts, "--json")[1] == "".join(alone)
    assert len(calls) == 1


@pytest.mark.parametrize("task", ["vqa", "answer", "ground", "refer"])
def test_every_tag_in_a_text_is_words(capsys, monkeypatch, task):
    """The prompt has the same special tokens as one without tags in the text."""
    special, prompts = set(), []

    def recorded(self, *args):
        special.update(self.special_ids.values())
        encoded = encode_prompt(self, *args)
        prompts.append(encoded[0])
        return encoded

    encode_prompt = Tokenizer.encode_prompt
    monkeypatch.setattr(Tokenizer, "encode_prompt", recorded)
    text = "is " + " ".join([*CONTROL, *TAGS, "<patch_index_0044>"]) + " a tag?"
    status, out, err = run(capsys, SCENE, "--task", task, "--text", text, "--json")
    assert status == 0 and text in json.loads(out)["prompt"], err
    if task != "vqa":  # whose answer may have phrases of its own
        assert all(entity["phrase"] == text for entity in json.loads(out)["entities"])
    assert run(capsys, SCENE, "--task", task, "--text", "a tag?", "--json")[0] == 0
    tagged, plain = ([i for i in ids if i in special] for ids in prompts)
    assert tagged == plain and len(plain) >= 3


def test_tags_in_few_shot_texts_are_words(capsys):
    text = "a <image> and </phrase> fire."
    status, out, err = run(capsys, SCENE, SCENE, "--task", "context", "--text", text, "--json")
    assert status == 0 and text in json.loads(out)["prompt"], err


def test_markup_belongs_to_the_prompt(capsys):
    prompt = "<phrase> fire</phrase><object><patch_index_0000><patch_index_1023></object>"
    entity = json.loads(run(capsys, SCENE, "--prompt", prompt, "--json")[1])["entities"][0]
    assert (entity["phrase"], entity["boxes"]) == ("fire", [[1 / 64, 1 / 64, 63 / 64, 63 / 64]])


def test_ngram_blocking_comes_from_the_checkpoint(capsys, tmp_path):
    folder = copy(TINY, tmp_path / "blocked")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["no_repeat_ngram_size"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    ask = [SCENE, "--task", "detail", "--json"]
    raws = [json.loads(run(capsys, *ask, *m)[1])["raw"] for m in ([], ["--checkpoint", folder])]
    assert raws[0] != raws[1]


@pytest.mark.parametrize("box", ["100,20,30,40", "0.25,0.5,0.75,0.4", "9000,1,9001,2", "0,0,1," + "9" * 400])
def test_boxes_that_do_not_fit(capsys, box):
    status, out, err = run(capsys, SCENE, "--task", "refer", "--box", box)
    errors = [line for line in err.splitlines() if line.startswith("sample: ")]
    assert (status, out, len(errors)) == (1, "", 1) and "box" in errors[0]


@pytest.mark.parametrize("box", ["-1e-7,0.2,0.5,0.5", "0.2,0.2,1.000001,0.5", "100,100,485,364.004"])
def test_boxes_beyond_the_border_by_rounding(capsys, box):
    assert Image.open(SCENE).size == (485, 364)
    assert run(capsys, SCENE, "--task", "refer", f"--box={box}")[0] == 0


@pytest.mark.parametrize("terminal", [False, True])
def test_no_new_tokens(capsys, monkeypatch, terminal):
    """The answer is the beginning that the task gives it."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    assert run(capsys, SCENE, "--max-new-tokens", 0)[1] == "An image of\n"


def test_a_terminal_shows_boxes_like_a_pipe(capsys, monkeypatch):
    """Boxes are known only at the end."""
    ask = [SCENE, "--task", "ground", "--text", "the fire"]
    expected = run(capsys, *ask)[1]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert expected and run(capsys, *ask)[1] == expected


# ---- Images and drawings ---------------------------------------------------------------------------


def test_a_bad_image_does_not_stop_the_others(capsys):
    status, out, err = run(capsys, SCENE, "none.png", SCENE)
    assert status == 1 and out.count("An image of") == 2 and "no image file at none.png" in err


def test_data_and_file_addresses(capsys):
    data = "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()
    expected = json.loads(run(capsys, SCENE, "--json")[1])["raw"]
    for address in (data, SCENE.as_uri()):
        status, out, err = run(capsys, address, "--json")
        assert status == 0 and json.loads(out)["raw"] == expected
        assert max(map(len, err.splitlines())) < 200


@pytest.mark.parametrize("address", ["data:image/png;base64,@@@@" + "A" * 5000, "file:///none/x.png"])
def test_bad_addresses_are_cut_in_messages(capsys, address):
    status, out, err = run(capsys, address)
    assert (status, out, err.count("\n")) == (1, "", 1) and len(err) < 300


def test_a_pipe_is_not_an_image(capsys):
    os.mkfifo("pipe.png")
    status, _, err = run(capsys, "pipe.png")
    assert status == 1 and "no image file at pipe.png" in err


def test_a_long_name(capsys):
    name = "x" * 246 + ".png"
    Image.open(SCENE).save(name)
    assert run(capsys, name)[0] == 0
    assert sorted(os.listdir(), key=len) == ["x" * 200 + ".boxes.png", name]


@pytest.mark.parametrize(("name", "expected"), [("o.xyz", 2), ("o.psd", 2), ("o.blp", 1)])
def test_drawings_of_kinds_that_pillow_cannot_write(capsys, name, expected):
    """An unknown kind is a usage error. (BLP cannot store RGB, which Pillow reports when it writes.)"""
    status, out, err = run(capsys, SCENE, "--output", name)
    assert status == expected and sum(line.startswith("sample") for line in err.splitlines()) == 1
    assert os.listdir() == []


def test_only_web_images_are_to_be_downloaded(capsys):
    assert "download" in run(capsys, "https://example.org/a.png")[2]
    assert "download" not in run(capsys, "file:///none/a.png")[2]


def test_images_on_both_sides_of_an_option(capsys):
    status, out, _ = run(capsys, SCENE, "--json", TINY / "busy.png")
    assert status == 0 and [json.loads(line)["image"] for line in out.splitlines()] == [
        str(SCENE), str(TINY / "busy.png")
    ]  # fmt: skip


def test_a_drawing_that_fails_leaves_the_earlier_file_alone(capsys):
    Image.new("RGB", (17_000, 20)).save("wide.png")  # more than WebP can hold
    Path("o.webp").write_bytes(b"earlier content")
    assert run(capsys, "wide.png", "--output", "o.webp")[0] == 1
    assert Path("o.webp").read_bytes() == b"earlier content"


def test_a_drawing_never_replaces_an_image_that_is_asked_about(capsys):
    Image.open(SCENE).save("a.png")
    Image.open(TINY / "busy.png").save("a.boxes.png")
    before = Path("a.boxes.png").read_bytes()
    run(capsys, "a.png", "a.boxes.png", "--output", ".")
    assert Path("a.boxes.png").read_bytes() == before


def test_names_of_drawings_are_escaped(capsys):
    _, _, err = run(capsys, SCENE, "--output", "o\nx.png")
    assert "wrote o\\nx.png" in err


# ---- The process -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--temprature", "1"], ["--seed", "x"], ["--task", "dance"], ["--precision"], ["--resume"], ["--top-boxes", "3"]],
)  # fmt: skip
def test_more_usage_errors_are_one_line(capsys, arguments):
    status, out, err = run(capsys, SCENE, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1) and arguments[0] in err


def test_main_leaves_the_encodings_of_streams(capsys, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="latin-1"))
    assert script.main([str(SCENE), "--json"]) == 0
    assert (sys.stdout.encoding, sys.stderr.encoding) == ("latin-1", "latin-1")


def test_main_does_not_catch_ctrl_c(monkeypatch):
    """A program that calls main() is interrupted as a whole."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "load_model", stop)
    with pytest.raises(KeyboardInterrupt):
        script.main([str(SCENE)])


@pytest.mark.parametrize("streams", ["2>&-", "<&- >&- 2>&-"])
def test_closed_streams(streams):
    command = f'"{sys.executable}" "{ROOT / "sample.py"}" "{SCENE}" --output o.png {streams}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and Path("o.png").exists()


def test_output_is_utf8_in_any_encoding():
    """With a file name that is not Latin and one that is not valid UTF-8."""
    names = ["猫.png", b"bad\xff.png".decode("utf-8", "surrogateescape")]
    for name in names:
        Image.open(SCENE).save(name)
    command = [sys.executable, ROOT / "sample.py", *names]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("utf-8").splitlines()
    assert len(lines) == 2 and lines[0].startswith("猫.png: An image of")


def test_help_does_not_wait_for_pytorch():
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import sample\n"
    code += "try: sample.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True, text=True)
    assert done.stdout.endswith("False\n")


# ---- Second round of reports -----------------------------------------------------------------------


@pytest.mark.parametrize("tag", [*CONTROL, *TAGS, "<patch_index_0000>", "</object><object>", "a<b>c"])
@pytest.mark.parametrize("task", ["ground", "refer", "vqa", "answer", "context", "text"])
def test_a_tag_in_a_text_adds_no_control_id(small_tokenizer, task, tag):
    """Whatever the text says, the markup is that of the task, and the words are all there."""

    def encode(text: str) -> tuple[list[int], str]:
        request = script.make_requests((), task, [text], None, [])[0]
        sizes = [(9, 9)] * {"context": 2, "text": 0}.get(task, 1)
        ids = script.encode_request(small_tokenizer, request, sizes)[0]
        first_tag = min(small_tokenizer.special_ids[name] for name in TAGS)
        return [i for i in ids if i < len(CONTROL) or i >= first_tag], small_tokenizer.decode(ids)

    text = f"one {tag} two"
    assert encode(text)[0] == encode("one two")[0] and text in encode(text)[1]


@pytest.mark.parametrize(
    ("box", "meant"),
    [
        ((0.25, 0.5, 1.000001, 1.0), (0.25, 0.5, 1, 1)),  # YOLO: six digits
        ((-1e-7, 0.2, 0.5, 1.0000005), (0, 0.2, 0.5, 1)),
        ((320, 120, 640.01, 480.004), (0.5, 0.25, 1, 1)),  # COCO: x + width
        ((-0.3, -0.004, 320, 240), (0, 0, 0.5, 0.5)),
    ],
)  # fmt: skip
def test_boxes_are_clipped_to_the_image(box, meant):
    assert script.normalize_box(box, (640, 480)) == meant


@pytest.mark.parametrize(
    "box", [(0, 0, 1.2, 1), (-0.1, 0, 0.5, 0.5), (0, 0, 700, 480), (-20, 0, 320, 240), (650, 10, 655, 20)]
)
def test_boxes_far_outside_are_refused(box):
    with pytest.raises(ValueError, match="box"):
        script.normalize_box(box, (640, 480))


def test_the_drawing_of_a_data_address(capsys):
    """Is not named after base64."""
    data = "data:image/png;base64," + base64.b64encode(SCENE.read_bytes()).decode()
    assert run(capsys, data)[0] == 0 and os.listdir() == ["image.boxes.png"]


def test_names_of_checkpoints_are_escaped(capsys):
    os.symlink(TINY, "a\nb\x1b")
    assert r"loaded a\nb\x1b in" in run(capsys, "--checkpoint", "a\nb\x1b")[2]


def test_commands_leave_loggers_and_filters(capsys):
    """sample, batch and page, called by a program, change nothing that is global."""

    def state() -> tuple:
        levels = [logging.getLogger(name).level for name in ("", "PIL", "PIL.Image", "PIL.PngImagePlugin")]
        return levels, warnings.showwarning, warnings.filters[:], Image.MAX_IMAGE_PIXELS, dict(os.environ)

    before = state()
    assert run(capsys, SCENE, "none.png", "--json")[0] == 1
    assert run(capsys, SCENE, "none.png", "--results", "r.jsonl", command=batch)[0] == 1
    assert run(capsys, "r.jsonl", "page.html", command=page)[0] == 0
    assert state() == before


def test_main_prints_to_any_stream(monkeypatch):
    """Also to one that cannot be reconfigured."""
    monkeypatch.setattr("sys.stdout", caught := io.StringIO())
    assert script.main([str(SCENE)]) == 0 and caught.getvalue().startswith("An image of")
