"""Bad input gives a one-line error, never a silently wrong result; finished results are never lost."""

import io
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL, TINY, rough, run
from PIL import Image

import sample as script
from inference import batch
from inference.beam import beam_search
from inference.convert import save_checkpoint
from kosmos2 import EOS, Kosmos2, open_image
from load_weights import SENTENCEPIECE, load_checkpoint
from training.scenes import Scene

SCENE = TINY / "scene.png"
THOROUGH = bool(os.environ.get("KOSMOS2_THOROUGH"))


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------------------------------------------- images


def good_images() -> dict[str, bytes]:
    """Names and contents of unusual but valid image files."""
    found = {}

    def add(name, image, **options):
        image.save(buffer := io.BytesIO(), Image.registered_extensions()[Path(name).suffix], **options)
        found[name] = buffer.getvalue()

    scene = Image.open(SCENE).convert("RGB")
    add("one pixel.png", scene.resize((1, 1)))
    add("wide.png", scene.resize((20000, 3)))
    add("tall größe 図.png", scene.resize((3, 5000)))
    add("animated.gif", scene, save_all=True, append_images=[Image.new("RGB", scene.size)])
    add("palette.png", scene.convert("P"))
    add("print.jpg", scene.convert("CMYK"))
    return found


def bad_images() -> dict[str, bytes]:
    animated = good_images()["animated.gif"]
    bomb = io.BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "PNG")  # 400 million pixels in 50 KB
    deep, bright = io.BytesIO(), io.BytesIO()
    Image.fromarray((torch.arange(64 * 64).reshape(64, 64) * 16).to(torch.uint16).numpy()).save(deep, "PNG")
    Image.fromarray(torch.rand(20, 20).numpy()).save(bright, "TIFF")
    png = SCENE.read_bytes()
    return {
        "deep.png": deep.getvalue(),  # more than 8 bits
        "float.tif": bright.getvalue(),
        "empty.png": b"",
        "text.png": b"dear diary",
        "truncated.png": png[: len(png) // 2],
        "cut.gif": animated[:300],
        "bomb.png": bomb.getvalue(),
    }


def test_images_in_a_folder(capsys, tmp_path):
    """Good images are captioned, bad ones named at the end, and none stops the others."""
    folder = tmp_path / "images"
    folder.mkdir()
    good, bad = good_images(), bad_images()
    for name, content in (good | bad).items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    options = ["--max-new-tokens", 8, "--results", "r.jsonl", "--drawings", "drawn"]
    status, _, err = run(capsys, folder, *options, command=batch)
    rows = [json.loads(line) for line in Path("r.jsonl").read_text(encoding="utf-8").splitlines()]
    assert status == 1 and sorted(Path(row["image"]).name for row in rows) == sorted(good)
    assert len(os.listdir("drawn")) == len(good)
    failed = next(line for line in err.splitlines() if " failed: " in line)
    assert f"{len(bad)} of {len(good) + len(bad)} failed" in failed and "1 x folder" in err
    assert all(name in failed for name in bad) and "Traceback" not in err


@pytest.mark.parametrize("name", bad_images())
def test_a_bad_image_is_named_before_a_model_is_loaded(capsys, name):
    Path(name).write_bytes(bad_images()[name])
    status, out, err = run(capsys, name, "--checkpoint", "nowhere")
    assert (status, out, err.count("\n")) == (1, "", 1) and name in err


def test_the_first_frame_of_an_animation(tmp_path):
    (tmp_path / "a.gif").write_bytes(good_images()["animated.gif"])
    assert open_image(tmp_path / "a.gif").getpixel((10, 10)) != (0, 0, 0)


# ---------------------------------------------------------------------------------------------------- output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_full_disk():
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "sample.py", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    err = done.stderr
    assert done.returncode == 1 and "space" in err and "Traceback" not in err and err.count("sample:") == 1


def test_an_image_is_never_half_written(capsys, monkeypatch, tmp_path):
    target = tmp_path / "out.png"
    target.write_bytes(b"earlier content")

    def fail(self, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Image.Image, "save", fail)
        status, out, err = run(capsys, SCENE, "--output", target)
    assert status == 1 and "No space left" in err and out.startswith("An image of")
    assert target.read_bytes() == b"earlier content" and os.listdir() == ["out.png"]
    assert run(capsys, SCENE, "--output", target)[0] == 0
    assert Image.open(target).size[0] > 0 and os.listdir() == ["out.png"]


@pytest.mark.parametrize(("command", "option"), [(script, "--output"), (batch, "--results")])
def test_places_that_cannot_be_written(capsys, tmp_path, command, option):
    (tmp_path / "file").write_text("not a folder")
    status, out, err = run(capsys, SCENE, option, tmp_path / "file" / "x.png", command=command)
    assert status == 1 and str(tmp_path / "file") in err and "Traceback" not in err, err
    name = command.__name__.split(".")[-1]
    assert sum(line.startswith(f"{name}: ") for line in err.splitlines()) == 1


# --------------------------------------------------------------------------------------------- interruptions


def test_killed_while_captioning_a_folder(capsys, tmp_path):
    """kill -9 at any moment: finished results are in the file, and the next run adds the rest once."""
    folder, results = tmp_path / "images", tmp_path / "out.jsonl"
    folder.mkdir()
    for seed in range(24):
        Scene.random(seed).draw(64).save(folder / f"{seed:02}.png")
    ask = [folder, "--results", results, "--batch-size", 1]
    command = [sys.executable, "-m", "inference.batch", *map(str, ask)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (results.exists() and results.read_bytes().count(b"\n") >= 2):
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = results.read_bytes().count(b"\n")
    assert 2 <= done < 24
    before = results.read_text().splitlines()[:done]
    status, _, err = run(capsys, *ask, "--resume", command=batch)
    assert status == 0, err
    lines = results.read_text().splitlines()
    assert lines[:done] == before and [Path(json.loads(line)["image"]).stem for line in lines] == [
        f"{i:02}" for i in range(24)
    ]


def test_memory_stays_flat(capsys, tmp_path):
    """Memory grows by less than 5% over a run with 300 images (60 without KOSMOS2_THOROUGH)."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(300 if THOROUGH else 60):
        Scene.random(seed).draw(300).save(folder / f"{seed}.jpg")
    seen = []
    update = batch.Progress.update

    def watch(self, *arguments):
        update(self, *arguments)
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch.Progress, "update", watch)
        options = ["--results", "out.jsonl", "--batch-size", 4]
        assert run(capsys, folder, *options, command=batch)[0] == 0
    assert len(seen) == len(list(folder.iterdir())) / 4
    assert seen[-1] < 1.05 * seen[len(seen) // 3]


# ---------------------------------------------------------------------------------------------- checkpoints


def test_mutated_headers(tmp_path):
    """A damaged safetensors file loads or raises; it never crashes or takes much memory."""
    import resource

    small = replace(
        SMALL,
        vision=replace(SMALL.vision, layers=1, width=5),
        text=replace(SMALL.text, layers=1, width=6, mlp_width=4),
    )
    model = rough(Kosmos2(small), seed=4)
    save_checkpoint(model, TINY / SENTENCEPIECE, tmp_path)
    file = tmp_path / "model.safetensors"
    original = file.read_bytes()
    size = int.from_bytes(original[:8], "little")
    header, rest = original[8 : 8 + size], original[8 + size :]
    rng, loaded, refused = random.Random(0), 0, 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5000 if THOROUGH else 400):
        content = mutated(header, rest, rng)
        file.write_bytes(content)
        try:
            found, _ = load_checkpoint(tmp_path)
            loaded += 1
            assert all(torch.isfinite(p).all() for p in found.parameters())
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert "\n" not in str(error)[:-1]
    assert refused > 100 and loaded > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    file.write_bytes(original)
    load_checkpoint(tmp_path)


def mutated(header: bytes, rest: bytes, rng: random.Random) -> bytes:
    """The content of a safetensors file with a random error in its header or length."""
    kind, length = rng.randrange(6), None
    if kind == 0:  # bytes changed
        changed = bytearray(header)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        header = bytes(changed)
    elif kind == 1:  # a wrong length of the header
        length = rng.choice(
            [0, 1, len(header) - 1, len(header) + 1, 2**31, 2**63, 2**64 - 1, rng.randrange(2**20)]
        )
    elif kind == 2:  # the file is too short or too long
        rest = rest[: rng.randrange(len(rest))] if rng.random() < 0.7 else rest + b"x" * rng.randint(1, 9)
    else:  # another number, name or type in an entry
        entries = json.loads(header)
        name = rng.choice([n for n in entries if n != "__metadata__"])
        if kind == 3:
            entries[name]["shape"] = [
                rng.choice([0, 1, -1, 2**40, 2**62, n + 1, n]) for n in entries[name]["shape"]
            ]
        elif kind == 4:
            entries[name]["data_offsets"] = [
                rng.choice([0, o, o + 4, 2**50, -4]) for o in entries[name]["data_offsets"]
            ]
        else:
            entries[rng.choice([name, name + "x", "", "a\nb"])] = entries.pop(name) | {
                "dtype": rng.choice(["F32", "F16", "I64", "F99", "", None])
            }
        header = json.dumps(entries).encode()
    return (len(header) if length is None else length).to_bytes(8, "little") + header + rest


def test_another_models_checkpoint(tmp_path):
    """Recognized by its config, or by its tensors if it has none."""
    from safetensors.torch import save_file

    save_file(
        {
            "vision_model.embeddings.class_embedding": torch.zeros(3),
            "text_model.final_layer_norm.bias": torch.zeros(3),
        },
        tmp_path / "model.safetensors",
    )
    with pytest.raises(ValueError, match="not Kosmos-2"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="'clip'; only 'kosmos-2' is supported"):
        load_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------------------ generation


def test_empty_batches_and_rows_that_end_at_once(small, small_tokenizer):
    none = torch.zeros(0, 4, dtype=torch.long)
    assert small.generate(none, max_new_tokens=3) == []
    assert beam_search(small, none, num_beams=2, max_new_tokens=3) == []
    tokens = torch.tensor([[0, 10, 11]] * 3)

    def only_end(ids, remaining):
        return torch.arange(small_tokenizer.vocab_size).numpy() == EOS

    ended = [[EOS]] * 3
    assert small.generate(tokens, max_new_tokens=9, constraint=only_end) == ended
    assert beam_search(small, tokens, num_beams=3, max_new_tokens=9, constraint=only_end) == ended
