"""inference.batch: many requests, results, resuming, several processes."""

import base64
import errno
import fcntl
import io
import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, copy, run
from PIL import Image, features

from inference import batch
from inference.results import Results
from kosmos2 import Kosmos2
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
        ('{"image": 3}', "image: expected a string"), ('{"image": ""}', "image: expected a string"),
        ('{"image": "a.png", "task": "refer", "box": [0, 0, 1, 1], "boxes": [[0, 0, 1, 1]]}', "expected box or boxes, not both"),
        ('{"image": "a.png", "x": NaN}', "x: NaN"),
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
    encoded = []
    original = Kosmos2.encode_image
    monkeypatch.setattr(
        Kosmos2, "encode_image", lambda self, pixels: encoded.append(len(pixels)) or original(self, pixels)
    )
    texts = ["How many things are there?", "Is there a fire?"]
    status, out, _ = ask(capsys, SCENE, "--task", "answer", "--text", texts[0], "--text", texts[1])
    alone = [rows(ask(capsys, SCENE, "--task", "answer", "--text", text)[1])[0]["raw"] for text in texts]
    assert status == 0 and [row["raw"] for row in rows(out)] == alone and encoded[0] == 1


# ---- Folders ---------------------------------------------------------------------------------------


def save_scenes(*names: str) -> list[str]:
    for name in names:
        Image.open(SCENE).save(name)
    return list(names)


def test_folders_take_every_format_and_name_the_rest(capsys):
    Path("mixed/inner").mkdir(parents=True)
    kinds = {"a.jfif": "JPEG", "b.webp": None, "c.ppm": None, "d.TIFF": None}
    if features.check("avif"):
        kinds["e.avif"] = None
    for name, kind in kinds.items():
        Image.open(SCENE).convert("RGB").save(f"mixed/{name}", kind)
    for name in ("f.heic", "g.txt", "h.txt"):
        Path(f"mixed/{name}").write_bytes(b"")
    status, out, err = ask(capsys, "mixed")
    assert status == 0 and [Path(row["image"]).name for row in rows(out)] == list(kinds)
    assert "1 x .heic" in err and "2 x .txt" in err and "1 x folder" in err


def test_a_folder_without_images(capsys):
    Path("empty").mkdir()
    status, out, err = ask(capsys, "empty")
    assert (status, out, err.count("\n")) == (1, "", 1) and "no images in folder empty" in err


def test_large_images_are_read_a_batch_at_a_time():
    """24 photos of 6 megapixels take less than half the memory of their pixels."""
    code = (
        "import resource, sys; sys.path.insert(0, sys.argv[1])\nfrom inference import batch\n"
        "batch.main(['one.png'])\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "batch.main(['photos', '--batch-size', '4'])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    save_scenes("one.png")
    Path("photos").mkdir()
    for i in range(24):
        Image.new("RGB", (3000, 2000), "white").save(f"photos/{i}.jpg")
    command = [sys.executable, "-c", code, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 200_000  # KiB; the pixels of all photos are 422,000


# ---- Requests --------------------------------------------------------------------------------------

REQUESTS = [
    {"image": "a.png", "task": "caption", "id": 1},
    {"image": "a.png", "task": "answer", "text": "Is there a fire?", "id": "two"},
    {"image": "a.png", "task": "ground", "text": "the fire"},
    {"image": "b.png", "prompt": "<grounding><phrase> It</phrase> is", "boxes": [[0.1, 0.4, 0.4, 0.8]]},
    {"image": "b.png", "task": "refer", "boxes": [10, 20, 100, 200]},
    {"image": ["a.png", "b.png"], "task": "context", "text": "a fire.", "boxes": [[0.5, 0.5, 0.8, 0.9], [44, 863]]},
    {"task": "text", "text": "An image of a"},
    {"image": "a.png", "task": "detail"},
]  # fmt: skip


@pytest.fixture
def images():
    save_scenes("a.png")
    Image.open(TINY / "busy.png").save("b.png")


def ask_stdin(capsys, monkeypatch, requests: list, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, requests))))
    return ask(capsys, "--requests", "-", *arguments)


def without_scores(text: str) -> list[dict]:
    """Result lines without their scores, which differ by rounding between batches."""
    found = rows(text)
    for row in found:
        for entity in row["entities"]:
            del entity["scores"]
    return found


def test_batches_do_not_change_answers(capsys, monkeypatch, images):
    alone = []
    for request in REQUESTS:
        status, out, err = ask_stdin(capsys, monkeypatch, [request])
        assert status == 0, err
        alone += without_scores(out)
    for size in (1, 3, 8):
        out = ask_stdin(capsys, monkeypatch, REQUESTS, "--batch-size", size)[1]
        assert without_scores(out) == alone


def test_requests_say_what_sample_says(capsys, monkeypatch, images):
    command_line = ["a.png", "--task", "answer", "--text", "Is there a fire?", "--json"]
    expected = rows(run(capsys, *command_line)[1])[0]
    found = rows(ask_stdin(capsys, monkeypatch, [REQUESTS[1]])[1])[0]
    assert found["raw"] == expected["raw"] and set(found) == {*expected, "id", "checkpoint"}


def test_images_are_absolute_also_in_lists(capsys, monkeypatch, images):
    row = rows(ask_stdin(capsys, monkeypatch, [REQUESTS[5]])[1])[0]
    assert row["image"] == [os.path.abspath("a.png"), os.path.abspath("b.png")]


def test_images_next_to_the_requests_file(capsys, images, monkeypatch):
    file = Path(write_requests({"image": "a.png"})).resolve()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    status, out, _ = ask(capsys, "--requests", file)
    assert status == 0 and rows(out)[0]["image"] == str(file.with_name("a.png"))


def test_requests_that_fail_do_so_alone(capsys, monkeypatch, images):
    """The others, also those about the same image, are answered."""
    bad = {
        "no image file at": {"image": "none.png"},
        "box": {"image": "a.png", "task": "refer", "boxes": [[0.5, 0.5, 0.2, 0.6]]},
        "context": {"image": "a.png", "prompt": "An image of " + "a red cup and " * 900},
        "inside another": {"image": "b.png", "prompt": "<phrase> a <phrase> b</phrase>"},
        "Unicode": {"image": "a.png", "task": "ground", "text": "\ud800"},
    }
    good = [{"image": "a.png", "id": 1}, {"image": "b.png", "task": "plain", "id": 2}]
    status, out, err = ask_stdin(capsys, monkeypatch, [good[0], *bad.values(), *good])
    assert status == 1 and [row["id"] for row in rows(out)] == [1, 1, 2]
    assert "5 of 8 failed" in err and all(words in err for words in bad)
    assert max(map(len, err.splitlines())) < 300


def test_a_long_prompt_does_not_shorten_the_answers_beside_it(capsys, monkeypatch, images):
    """Only the answer to a prompt that nearly fills the context has a lower limit of new tokens."""
    detail = {"image": "a.png", "task": "detail"}
    long = {"image": "b.png", "prompt": "An image of " + "a red cup and " * 502}
    alone = ask_stdin(capsys, monkeypatch, [detail])[1]
    status, out, err = ask_stdin(capsys, monkeypatch, [detail, long])
    assert status == 0 and without_scores(out)[:1] == without_scores(alone), err


def test_batch_size_limits_the_questions_about_one_image(capsys, monkeypatch, images):
    sizes, step = [], batch.Progress.update
    monkeypatch.setattr(batch.Progress, "update", lambda self, n: sizes.append(n) or step(self, n))
    decoded, decode = [], Kosmos2.next_logits
    monkeypatch.setattr(Kosmos2, "next_logits", lambda self, x: decoded.append(len(x)) or decode(self, x))
    requests = [{"image": "a.png", "task": "answer", "text": f"Are there {n} fires?"} for n in range(10)]
    status, out, _ = ask_stdin(capsys, monkeypatch, requests, "--batch-size", 4)
    assert status == 0 and len(rows(out)) == 10 and sizes == [4, 4, 2] and max(decoded) == 4
    questions = [{"task": "text", "text": f"{n} fires"} for n in range(6)]
    assert ask_stdin(capsys, monkeypatch, questions, "--batch-size", 4)[0] == 0 and sizes[3:] == [4, 2]


def test_a_prompt_without_room_for_min_new_tokens_fails_alone(capsys, monkeypatch, images):
    requests = [{"image": "a.png"}, {"image": "a.png", "prompt": "a car " * 980}, {"image": "b.png"}]
    status, out, err = ask_stdin(capsys, monkeypatch, requests, "--min-new-tokens", 100)
    assert status == 1 and len(rows(out)) == 2 and "stdin, line 2: " in err and "1 of 3 failed" in err


@pytest.mark.parametrize("key", ["entities", "raw", "given_boxes", "checkpoint"])
def test_keys_of_results_are_refused_in_requests(capsys, monkeypatch, images, key):
    status, _, err = ask_stdin(capsys, monkeypatch, [{"image": "a.png", key: "mine"}])
    assert status == 1 and f"line 1: {key} is a key of the result" in err and err.count("\n") == 1


@pytest.mark.parametrize("given", ["box", "boxes"])
def test_box_and_boxes_mean_the_same(capsys, monkeypatch, images, given):
    expected = rows(run(capsys, "a.png", "--task", "refer", "--box", "60,60,300,300", "--json")[1])[0]
    request = {"image": "a.png", "task": "refer", given: [60, 60, 300, 300]}
    assert rows(ask_stdin(capsys, monkeypatch, [request])[1])[0]["text"] == expected["text"]


def test_every_tag_in_a_few_shot_request_is_words(capsys, monkeypatch, images):
    text = " ".join([*CONTROL, *TAGS, "<patch_index_1023>"]) + " fire."
    request = {"image": ["a.png", "b.png"], "task": "context", "text": text}
    status, out, err = ask_stdin(capsys, monkeypatch, [request])
    assert status == 0 and text in rows(out)[0]["prompt"], err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"image": "a.png"},\n {"image": "b.png"}]', "line 1: expected one JSON object per line"),
        ('{\n  "image": "a.png"\n}', "line 1: expected one JSON object per line"),
        ("image,task\na.png,caption", "line 1: expected one JSON object per line"),
        ("[" * 9999, "line 1: expected one JSON object per line"), ("\n\n", "no requests"),
        ('{"image": "a.png", "weight": 1e999}', "weight: NaN and infinity"), ('{"image": "a.png", "scores": [NaN]}', "scores: NaN"),
        ('{"image": null}', "needs an image"),
        ('{"image": "a.png", "task": "vqa"}', "non-empty text"), ('{"image": "a.png", "task": "vqa", "text": ["a", "b"]}', "one string"),
        ('{"image": "a.png", "prompt": 5}', "prompt: expected a string"), ('{"image": "a.png", "task": "vqa", "text": 5}', "text: expected a string"),
        ('{"image": "a.png", "task": "refer", "boxes": "0,0,1,1"}', "box"),
    ],
)  # fmt: skip
def test_files_that_are_not_requests(capsys, images, text, words):
    Path("requests.jsonl").write_text(text)
    status, out, err = ask(capsys, "--requests", "requests.jsonl")
    assert (status, out, err.count("\n")) == (1, "", 1) and words in err and len(err) < 300


def test_a_box_with_nan(capsys, monkeypatch, images):
    requests = [{"image": "a.png", "task": "refer", "boxes": [math.nan, 0, 1, 1]}, {"image": "a.png"}]
    status, out, err = ask_stdin(capsys, monkeypatch, requests)
    assert status == 1 and len(rows(out)) == 1 and "box [nan, " in err


def test_names_with_control_characters(capsys, monkeypatch, images):
    requests = [{"image": "none\x1b[31m\n.png"}, {"image": "a.png"}]
    status, out, err = ask_stdin(capsys, monkeypatch, requests)
    assert status == 1 and len(rows(out)) == 1 and "none\\x1b[31m\\n.png" in err and "\x1b" not in err


# ---- Decoding options ------------------------------------------------------------------------------


def test_top_boxes_requires_requests_for_boxes(capsys, monkeypatch, images):
    phrase = {"image": "a.png", "task": "ground", "text": "the fire"}
    status, out, err = ask_stdin(capsys, monkeypatch, [phrase, {"image": "a.png"}], "--top-boxes", 2)
    assert (status, out) == (1, "") and "--top-boxes" in err


def test_top_boxes_mark_what_is_probably_absent(capsys):
    ask_for = [SCENE, "--task", "ground", "--text", "a purple boat", "--top-boxes", 1]
    assert "(probably not in the image)" in ask(capsys, *ask_for)[2]


def test_ngram_blocking_can_be_turned_off(capsys, tmp_path):
    folder = copy(TINY, tmp_path / "blocked")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["no_repeat_ngram_size"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    changed = ["--checkpoint", folder]
    options = ([], changed, [*changed, "--no-repeat-ngram-size", 0])
    raws = [rows(ask(capsys, SCENE, "--task", "detail", *more)[1])[0]["raw"] for more in options]
    assert raws[0] == raws[2] != raws[1]


def test_min_new_tokens(capsys, monkeypatch, images):
    ids = []
    monkeypatch.setattr(batch, "as_json", lambda request, answer, size: ids.append(answer.raw) or {})
    ask(capsys, "a.png")
    ask(capsys, "a.png", "--min-new-tokens", 60)
    assert len(ids[1]) > len(ids[0])


# ---- Results ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, 900, -1])
def test_a_cut_file_is_continued(capsys, folder, keep):
    """The result is that of an uninterrupted run."""
    questions = ["--text", "What color is the house?", "--text", "How many things are there?"]
    command = [folder, "--task", "answer", *questions, "--batch-size", 2, "--results", "r.jsonl"]
    assert ask(capsys, *command)[:2] == (0, "")
    complete = Path("r.jsonl").read_bytes()
    Path("r.jsonl").write_bytes(complete[:keep])
    assert ask(capsys, *command, "--resume")[0] == 0
    assert Path("r.jsonl").read_bytes() == complete


def test_resume_refuses_other_questions_and_checkpoints(capsys, tmp_path, images):
    assert ask(capsys, "a.png", "--results", "r.jsonl")[0] == 0
    before = Path("r.jsonl").read_bytes()
    other = {"prompt": ["--task", "detail"], "checkpoint": ["--checkpoint", copy(TINY, tmp_path / "other")]}
    for word, options in other.items():
        status, _, err = ask(capsys, "a.png", "--results", "r.jsonl", "--resume", *options)
        assert status == 1 and f"a different {word}" in err and err.count("\n") == 1
    assert Path("r.jsonl").read_bytes() == before


def test_spellings_of_an_image_and_a_checkpoint(capsys, tmp_path, images):
    copy(TINY, tmp_path / "model")
    for image in ("a.png", "./a.png", tmp_path / "a.png", "model/../a.png"):
        for checkpoint in ("model", "./model/", tmp_path / "model"):
            options = ["--results", "r.jsonl", "--resume", "--checkpoint", checkpoint]
            assert ask(capsys, image, *options)[0] == 0
    assert len(Path("r.jsonl").read_text().splitlines()) == 1


def test_requests_that_differ_only_in_extra_keys_are_all_answered(capsys, images):
    file = write_requests(
        {"image": "a.png", "id": 1}, {"image": "a.png", "id": 2}, {"image": "a.png", "id": 2}
    )
    assert ask(capsys, "--requests", file, "--results", "r.jsonl")[0] == 0
    lines = Path("r.jsonl").read_text().splitlines(keepends=True)
    Path("r.jsonl").write_text("".join(lines[1:2]))
    assert ask(capsys, "--requests", file, "--results", "r.jsonl", "--resume")[0] == 0
    assert sorted(row["id"] for row in rows(Path("r.jsonl").read_text())) == [1, 2, 2]


def test_tags_in_texts_are_resumed(capsys, images):
    """The prompt in the file is the one that was asked."""
    command = ["a.png", "--task", "answer", "--text", "Is x<y and <s> a tag?", "--results", "r.jsonl"]
    for more in ([], ["--resume"]):
        assert ask(capsys, *command, *more)[0] == 0
    assert len(Path("r.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize("text", ["dear diary\n", '{"image": 42, "prompt": "a"}\n', "[1]\n", "7\n", "null\n"])
def test_a_results_file_of_something_else(capsys, text):
    Path("notes.txt").write_text(text)
    status, _, err = ask(capsys, SCENE, "--results", "notes.txt", "--resume")
    assert status == 1 and "not a results file" in err and Path("notes.txt").read_text() == text


def test_results_in_a_folder(capsys):
    status, out, err = ask(capsys, SCENE, "--results", ".")
    assert (status, out, err.count("\n")) == (2, "", 1) and "is a folder" in err


def test_a_failed_start_leaves_no_results(capsys):
    """The results file does not count as existing afterwards."""
    command = [SCENE, "--results", "r.jsonl"]
    assert ask(capsys, *command, "--checkpoint", "nothing")[0] == 1
    assert ask(capsys, *command)[0] == 0


def test_a_file_system_without_locks(capsys, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert ask(capsys, SCENE, "--results", "r.jsonl")[0] == 0


def test_what_is_already_answered_is_reported(capsys):
    assert ask(capsys, SCENE, "--results", "r.jsonl")[0] == 0
    _, _, err = ask(capsys, SCENE, TINY / "busy.png", "--results", "r.jsonl", "--resume")
    assert "batch: 1 of 2 requests are already answered" in err


def test_the_lock_ends_with_the_run(capsys):
    for more in ([], ["--resume"], ["--resume"]):
        assert ask(capsys, SCENE, "--results", "r.jsonl", *more)[0] == 0


def test_a_second_process_is_refused(capsys):
    """Also with --resume, and what the first has written stays."""
    assert ask(capsys, SCENE, "--results", "r.jsonl")[0] == 0
    before = Path("r.jsonl").read_bytes()
    code = "import fcntl, sys; f = open('r.jsonl', 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        status, _, err = ask(capsys, SCENE, TINY / "busy.png", "--results", "r.jsonl", "--resume")
        other.communicate(b"\n")
    assert status == 1 and "another run" in err and err.count("\n") == 1
    assert Path("r.jsonl").read_bytes() == before


def test_files_of_earlier_processes(capsys):
    """They count as results, are completed on resuming, and may not be written meanwhile."""
    assert ask(capsys, SCENE, TINY / "busy.png", "--results", "r.jsonl")[0] == 0
    first, second = Path("r.jsonl").read_bytes().splitlines(keepends=True)
    Path("r.jsonl").unlink()
    Path("r.3.jsonl").write_bytes(first + second[:50])  # a process that was killed while it wrote
    status, _, err = ask(capsys, SCENE, "--results", "r.jsonl")
    assert status == 1 and "r.3.jsonl already exists" in err and not Path("r.jsonl").exists()
    with open("r.3.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err = ask(capsys, SCENE, "--results", "r.jsonl", "--resume")
        assert status == 1 and "r.3.jsonl is being written by another run" in err
    assert ask(capsys, SCENE, TINY / "busy.png", "--results", "r.jsonl", "--resume")[0] == 0
    assert Path("r.3.jsonl").read_bytes() == first
    assert [Path(row["image"]).name for row in rows(Path("r.jsonl").read_text())] == ["busy.png"]


def test_links_to_folders(capsys, images):
    """A folder has one name; '..' after a link is the parent of its target."""
    Path("far/deep").mkdir(parents=True)
    Path("link").symlink_to("far/deep")
    Path("far/a.png").write_bytes(Path("b.png").read_bytes())
    for name in ("far/a.png", "link/../a.png"):
        assert ask(capsys, name, "--results", "r.jsonl", "--resume")[0] == 0
    (row,) = rows(Path("r.jsonl").read_text())
    assert row["image"] == str(Path("far/a.png").resolve())


# ---- Failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [TypeError, RuntimeError, MemoryError, ZeroDivisionError, struct.error])
def test_any_error_of_a_decoder_concerns_one_image(capsys, monkeypatch, kind):
    """Whatever exception Pillow raises; --resume tries the image again."""
    names = save_scenes("a.png", "b.png", "c.png")
    original = Image.open

    def fails_for_b(path, *args, **kwargs):
        if str(path).endswith("b.png"):
            raise kind("broken")
        return original(path, *args, **kwargs)

    with monkeypatch.context() as broken:
        broken.setattr(Image, "open", fails_for_b)
        status, _, err = ask(capsys, *names, "--results", "r.jsonl")
        assert status == 1 and "b.png: broken" in err
    assert ask(capsys, *names, "--results", "r.jsonl", "--resume")[0] == 0
    found = [Path(row["image"]).name for row in rows(Path("r.jsonl").read_text())]
    assert found == ["a.png", "c.png", "b.png"]


def test_a_batch_that_fails_does_not_stop_the_others(capsys, monkeypatch):
    """Such as one that needs more memory than the GPU has."""
    names = save_scenes("a.png", "b.png", "c.png")
    encode, calls = Kosmos2.encode_image, []

    def fail_once(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory\nand a long report")
        return encode(self, *args)

    monkeypatch.setattr(Kosmos2, "encode_image", fail_once)
    status, out, err = ask(capsys, *names, "--batch-size", 1)
    assert status == 1 and [Path(row["image"]).name for row in rows(out)] == ["a.png", "c.png"]
    assert "b.png: out of memory\n" in err and "1 of 3 failed" in err and "long report" not in err


def test_answers_are_not_printed_behind_the_progress_bar(capsys, monkeypatch):
    names = save_scenes("a.png", "b.png", "c.png")
    monkeypatch.setattr(batch.Progress, "clear", lambda self: print("cleared"))
    lines = ask(capsys, *names, "--batch-size", 1)[1].splitlines()
    answers = [i for i, line in enumerate(lines) if line.startswith("{")]
    assert len(answers) == 3 and all(lines[i - 1] == "cleared" for i in answers)


# ---- Several processes -----------------------------------------------------------------------------


def test_a_line_is_one_write(folder, monkeypatch):
    """The processes of torchrun share stdout and stderr, which it does not buffer: a line in two writes could
    be split by another process."""
    writes = []

    class Stream(io.StringIO):
        def write(self, text: str) -> int:
            writes.append(text)
            return len(text)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "stdout", Stream())
    monkeypatch.setattr(sys, "stderr", Stream())
    assert batch.main([str(folder), "--batch-size", "1"]) == 0
    for start, count in (("process 0 of 2", 1), ('{"image": ', 2), ("[", 2)):  # "[": the progress bars
        lines = [text for text in writes if text.startswith(start)]
        assert len(lines) == count and all(text.endswith("\n") for text in lines)


def test_processes_agree_on_what_is_done(capsys, monkeypatch, images):
    """Of three requests, two of them equal, one is done: the processes answer the other two."""
    file = write_requests({"image": "a.png"}, {"image": "b.png"}, {"image": "a.png"})
    assert ask(capsys, "a.png", "--results", "r.jsonl")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert ask(capsys, "--requests", file, "--results", "r.jsonl", "--resume")[0] == 0
    files = [Path(name).read_text() for name in ("r.jsonl", "r.0.jsonl", "r.1.jsonl")]
    names = [Path(row["image"]).name for row in rows("".join(files))]
    assert sorted(names) == ["a.png", "a.png", "b.png"]


def test_one_process_continues_what_several_began(capsys, monkeypatch, folder):
    """Only files that are named like those of the processes count."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert ask(capsys, folder, "--results", "r.jsonl")[0] == 0
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    Path("r.backup.jsonl").write_text("not a results file\n")
    assert ask(capsys, folder, "--results", "r.jsonl", "--resume")[0] == 0
    assert [Path(row["image"]).name[0] for row in rows(Path("r.jsonl").read_text())] == ["0", "2"]


@pytest.mark.parametrize(("rank", "world"), [("a", "2"), ("3", "2"), ("0", "0"), ("-1", "2"), ("", "2")])
def test_a_wrong_rank(capsys, monkeypatch, rank, world):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    status, out, err = ask(capsys, SCENE)
    assert (status, out, err.count("\n")) == (1, "", 1) and "WORLD_SIZE" in err


def test_requests_from_stdin_with_half_an_environment(capsys, monkeypatch):
    """It is the environment that is named, before stdin is read."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.stdin", io.StringIO('{"task": "text", "text": "An image of"}\n'))
    status, out, err = ask(capsys, "--requests", "-")
    assert (status, out, err.count("\n")) == (1, "", 1) and "RANK" in err
