"""The bundled model, and what made it: scenes, packing, training, scoring."""

import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL, TINY, rough
from data import ALONE, MIXTURE, Grit, Scenes, collate
from evaluate import HELD_OUT, answers, evaluate, named, score
from scenes import COLORS, SHAPES, Scene, Shape, names, relations, resolve, tasks
from train import Losses

from kosmos2 import EOS, Kosmos2
from load_weights import SENTENCEPIECE, load_checkpoint
from tokenizer import Tokenizer, grit_to_text, iou, parse


@pytest.fixture(scope="module")
def source(small_tokenizer):
    return Scenes(small_tokenizer, SMALL, length=260, first=5)


# ---------------------------------------------------------------------------------------------------- scenes


def test_scenes_are_what_their_records_say():
    for seed in range(60):
        scene = Scene.random(seed)
        assert scene == Scene.random(seed) and 1 <= len(scene.shapes) <= 5
        record = scene.record()
        for start, end, *box, _ in record["noun_chunks"]:
            assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
            assert record["caption"][start:end].split()[0] in ("a", "an", "two", "three", "four", "five")
        assert not any(iou(a.box, b.box) for a in scene.shapes for b in scene.shapes if a is not b)
        caption, entities = parse(grit_to_text(record))
        assert caption == record["caption"] and sum(len(e.boxes) for e in entities) == len(scene.shapes)


def test_pictures_show_the_shapes_where_the_boxes_are():
    """Inside its outline a shape has its colour; the background has not."""
    scene = Scene(
        (Shape("square", "red", (0.3, 0.4), 0.3), Shape("heart", "blue", (0.75, 0.7), 0.3)),
        (204, 204, 204),
        1,
    )
    picture = scene.draw(200)
    for shape in scene.shapes:
        pixel = picture.getpixel(tuple(round(c * 200) for c in shape.center))
        assert sum(abs(a - b) for a, b in zip(pixel, COLORS[shape.color], strict=True)) < 60
        x1, y1, x2, y2 = shape.box
        assert max(x2 - x1, y2 - y1) == pytest.approx(shape.size)
    assert sum(abs(c - 204) for c in picture.getpixel((5, 195))) < 80
    assert (
        len(
            {
                Scene((Shape(s, "red", (0.5, 0.5), 0.4),), (204, 204, 204), 1).draw(64).tobytes()
                for s in SHAPES
            }
        )
        == 8
    )


def test_the_rule_based_reader():
    star, heart, circle = (
        Shape("star", "red", (0.2, 0.2), 0.2),
        Shape("heart", "red", (0.8, 0.25), 0.35),
        Shape("circle", "blue", (0.5, 0.8), 0.2),
    )
    scene = Scene((star, circle, heart), (204, 204, 204), 0)
    assert resolve("the star", scene) == resolve("the small red star.", scene) == [star]
    assert resolve("the red shape right of the star", scene) == [heart]
    assert resolve("the circle below the red heart", scene) == [circle]
    assert (
        resolve("the two red shapes", scene) == [star, heart]
        and resolve("the three red shapes", scene) is None
    )
    assert resolve("the shape below the red heart", scene) is None  # is the star? too close to say
    assert (
        resolve("the dog", scene) is None
        and resolve("red", scene) is None
        and resolve("the star left of", scene) is None
    )
    assert names(star, scene) == ["the star", "the red star", "the small red star"]
    assert all(resolve(name, scene) == [circle] for name in relations(circle, scene, random.Random(0)))


def test_the_right_answer_scores():
    """And every kind of task comes up, with an answer that its own scorer accepts and others it does not."""
    seen = set()
    for seed in range(40):
        scene = Scene.random(seed)
        for example in tasks(scene, random.Random(seed)):
            seen.add(example.task)
            assert set(score(example, example.answer, scene)) == {1.0}, example
            assert not any(score(example, " nonsense", scene)), example
    assert seen == set(MIXTURE)


def test_captions_are_counted():
    assert named("two red circles, a large blue star and an orange moon") == {
        "red circle": 2,
        "blue star": 1,
        "orange moon": 1,
    }


# ------------------------------------------------------------------------------------------------- training


def test_texts_in_one_row_do_not_see_each_other(source):
    """The losses of a row are those of its texts one by one, each alone with the picture or without."""
    model = rough(Kosmos2(SMALL), seed=2).eval()
    made = [source.row(n) for n in range(20)]
    rows = [next(row for row in made if len(row.pixels) > 1), next(row for row in made if ALONE in row.texts)]
    assert all(max(row.texts) > 5 for row in rows)
    alone = []
    with torch.no_grad():
        losses = Losses(model)(**collate(rows))
        for row in rows:
            tokens, image_mask, targets, texts = map(
                torch.tensor, (row.tokens, row.image_mask, row.targets, row.texts)
            )
            seconds = iter(row.pixels[1:])
            for number in texts[texts != 0].unique_consecutive():
                mine, P = texts == number, 0 if number == ALONE else row.prefix
                pixels = [row.pixels[0]] * bool(P) + ([next(seconds)] if image_mask[mine].any() else [])
                mask = torch.cat([image_mask[:P], image_mask[mine]])[None]
                logits = model(
                    torch.cat([tokens[:P], tokens[mine]])[None],
                    torch.stack(pixels) if P else None,
                    None,
                    mask,
                )[0, P:]
                asked = targets[mine] != -100
                alone.append(
                    torch.nn.functional.cross_entropy(logits[asked], targets[mine][asked], reduction="none")
                )
    torch.testing.assert_close(losses, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_only_answers_carry_loss(source):
    row = source.row(7)
    tokens, texts, targets = map(torch.tensor, (row.tokens, row.texts, row.targets))
    assert (targets[texts == 0] == -100).all()
    for number in texts[texts > 0].unique():
        answer = targets[texts == number]
        assert answer[-2] == EOS and answer[-1] == -100 and answer[0] == -100
        wanted = answer != -100
        following = torch.cat([tokens[texts == number][1:], torch.tensor([-1])])
        assert torch.equal(answer[wanted], following[wanted])


def write_grit(folder, count=6):
    """Scenes as a GRIT-format file with its pictures."""
    folder.mkdir(exist_ok=True)
    with open(folder / "grit.jsonl", "w") as lines:
        for seed in range(count):
            Scene.random(seed).draw(90).save(folder / f"{seed}.png")
            lines.write(json.dumps({"image": f"{seed}.png", **Scene.random(seed).record()}) + "\n")
    return folder / "grit.jsonl"


def test_grit_rows(tmp_path, small_tokenizer):
    """All tokens of the text carry loss, the first one at </image>; every record comes once an epoch."""
    source = Grit(write_grit(tmp_path), small_tokenizer, SMALL, seed=0)
    row = source.row(0)
    assert row.targets[: row.prefix] == [-100] * (row.prefix - 1) + [small_tokenizer.special["<grounding>"]]
    assert row.targets[row.prefix - 1 : -1] == row.tokens[row.prefix :] and row.tokens[-1] == EOS
    wanted = sorted(grit_to_text(Scene.random(seed).record()) for seed in range(6))
    for epoch in range(2):
        texts = [small_tokenizer.decode(source.row(6 * epoch + n).tokens[row.prefix : -1]) for n in range(6)]
        assert sorted(t.replace("<grounding> ", "<grounding>") for t in texts) == wanted
    for content, words in (("{}", "line 1"), ("", "no records"), ("nonsense", "line 1")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(ValueError, match=words):
            Grit(tmp_path / "bad.jsonl", small_tokenizer, SMALL, seed=0)


def test_two_processes_train_like_one(tmp_path, small_folder):
    """Twenty steps on GRIT data: alone, in micro-batches with recomputation, and under torchrun with two processes."""
    data, curves = write_grit(tmp_path / "data"), {}
    for name, run, more in (
        ("one", [sys.executable], []),
        ("parts", [sys.executable], ["--accumulate", "2", "--recompute"]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"], []),
    ):
        command = [*run, TINY / "train.py", "--out", tmp_path / name, "--checkpoint", small_folder, "--data", data, "--steps", "20",
                   "--batch", "4", "--log-every", "1", "--fp32", "--optimizer", "adamw", "--lr", "1e-3", *more]  # fmt: skip
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        curves[name] = torch.tensor([[row["locations"], row["words"]] for row in rows])
    assert curves["one"].shape == (20, 2) and (curves["one"][-1] < curves["one"][0] - 0.05).all()
    assert (curves["one"] - curves["parts"]).abs().max() < 1e-3
    assert (curves["one"] - curves["two"]).abs().max() < 1e-3


def test_only_the_chosen_part_is_trained(tmp_path, small, small_folder):
    data = write_grit(tmp_path / "data")
    done = run_training(
        tmp_path / "run", 2, "--checkpoint", small_folder, "--data", data, "--train", "resampler"
    )
    assert done.returncode == 0, done.stderr
    trained = load_checkpoint(tmp_path / "run")[0].state_dict()
    moved = {
        name.split(".")[0]
        for name, tensor in small.state_dict().items()
        if not torch.equal(tensor, trained[name])
    }
    assert moved == {"resampler"}


def run_training(folder, steps, *more):
    folder.mkdir(exist_ok=True)
    shutil.copy(TINY / SENTENCEPIECE, folder)  # saves the time of making one
    command = [sys.executable, TINY / "train.py", "--out", folder, "--steps", str(steps), "--batch", "2", "--scenes", "1",
               "--save-every", "2", *more]  # fmt: skip
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_training_resumes_where_it_was(tmp_path):
    """Four steps at once, and the same run cut after two of them, end in the same weights."""
    from safetensors.torch import load_file

    assert run_training(tmp_path / "start", 0).returncode == 0
    whole = run_training(tmp_path / "whole", 4)
    assert whole.returncode == 0, whole.stderr
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import train\n"
        "train.Run.finish = lambda self: None\n"  # what a kill after step 2 leaves behind
        "train.Steps.__len__ = lambda self: 2\n"
        "sys.argv = ['train.py', '--out', sys.argv[2], '--steps', '4', '--batch', '2', '--save-every', '2']\n"
        "train.main()"
    )
    (tmp_path / "cut").mkdir()
    shutil.copy(TINY / SENTENCEPIECE, tmp_path / "cut")
    subprocess.run(
        [sys.executable, "-c", script, str(TINY), str(tmp_path / "cut")], check=True, capture_output=True
    )
    resumed = run_training(tmp_path / "cut", 4)
    assert resumed.returncode == 0 and "resuming" in resumed.stderr and "at step 2" in resumed.stderr
    start, a, b = (
        flat(load_file(tmp_path / name / "model.safetensors")) for name in ("start", "whole", "cut")
    )
    # Rounding alone turns single weights of a young Adam around; another order of data or a lost optimizer
    # state turns the whole direction.
    assert torch.cosine_similarity(a - start, b - start, dim=0) > 0.98
    assert (a - start).norm() / (b - start).norm() == pytest.approx(1, abs=0.02)


def test_training_killed_at_any_moment(tmp_path):
    """kill -9, twice: there is always a checkpoint that loads, and the next run goes on from it."""
    folder, steps = tmp_path / "run", [0]
    folder.mkdir()
    shutil.copy(TINY / SENTENCEPIECE, folder)
    command = [
        sys.executable,
        TINY / "train.py",
        "--out",
        folder,
        "--steps",
        "100000",
        "--batch",
        "2",
        "--save-every",
        "1",
        "--length",
        "60",
    ]
    for delay in (0.0, 0.43):
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL)
        while (saved := saved_step(folder)) <= steps[-1]:
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(delay)
        process.kill()
        process.wait()
        steps.append(saved_step(folder))
        assert steps[-1] >= saved
    assert steps == sorted(set(steps))


def saved_step(folder) -> int:
    """The step of a run's checkpoint, which must load whenever it is there."""
    file = folder / "checkpoint.pt"
    return torch.load(file, weights_only=True)["step"] if file.exists() else 0


def flat(state) -> torch.Tensor:
    return torch.cat([state[name].flatten() for name in sorted(state)])


# ------------------------------------------------------------------------------------------ the bundled model


def test_size_and_files():
    files = [
        TINY / name for name in ("config.json", "model.safetensors", "sentencepiece.bpe.model", "scene.png")
    ]
    assert all(f.is_file() for f in files) and sum(f.stat().st_size for f in files) < 20e6


def test_it_sees(tiny):
    """A sample of what tiny/evaluate.py measures on 500 scenes; the bounds leave room for a sample of 60."""
    model, tokenizer = tiny
    found = evaluate(
        model, tokenizer, 60, HELD_OUT + 10_000, 4, only={"caption", "ground", "refer relation", "count"}
    )
    assert found["ground"][0] > 0.8 and found["caption"][0] > 0.9 and found["count"][0] > 0.8


def test_it_does_not_answer_blindly(tiny):
    """The same question about two pictures gets two answers."""
    model, tokenizer = tiny
    pair = [Scene((Shape("star", color, (0.5, 0.5), 0.35),), (204, 204, 204), 3) for color in ("red", "blue")]
    question = next(e for e in tasks(pair[0], random.Random(0)) if e.task == "color")
    replies = answers(model, tokenizer, [(scene, question) for scene in pair])
    assert [tokenizer.decode(reply).strip() for reply in replies] == ["red", "blue"]


def test_evaluate_counts_what_is_there():
    blind = Kosmos2(replace(SMALL, vision=replace(SMALL.vision, image_size=28))).eval()
    found = evaluate(
        blind, Tokenizer(TINY / "sentencepiece.bpe.model", 5), 2, HELD_OUT, only={"caption", "ground"}
    )
    assert {task: share for task, (share, _) in found.items()} == {"caption": 0.0, "ground": 0.0}
    assert (ROOT / "tiny").samefile(TINY)
