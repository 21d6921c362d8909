"""Teach the bundled model a new kind of object with the commands of training/README.md.

    python tests/finetuning.py [--images 12 60 300] [--old 300 0] [--steps 60 150 300]

For each number of images of ladders: how many of 20 other images the model then captions with a
ladder and its box (IoU 0.5), and what is left in held-out scenes of the kinds that it knew before,
with and without old drawings among the training images: captions, grounding, questions, and the
scores of absent phrases.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from inference.fast import load_checkpoint  # noqa: E402
from tokenizer import Box  # noqa: E402
from training.evaluate import (  # noqa: E402
    HELD_OUT,
    TABLE,
    accuracies,
    answers,
    choose_examples,
    first_scores,
    table_rows,
)
from training.scenes import BACKGROUNDS, paint_background  # noqa: E402

HELD_OUT_IMAGES = 20
QUESTIONS = "questions, all six"  # a row of TABLE


def draw_ladder(seed: int) -> tuple[Image.Image, Box]:
    """A ladder on a background of scenes.py, and its box in 0..1."""
    rng = random.Random(f"ladder {seed}")
    width, height = rng.choice([(300, 300), (400, 300), (300, 400)])
    image, _ = paint_background(rng.choice(list(BACKGROUNDS)), width, height, rng)
    w = rng.uniform(0.15, 0.25)
    h = rng.uniform(0.4, 0.7)
    x = rng.uniform(0.02, 0.98 - w)
    y = rng.uniform(0.02, 0.98 - h)
    box = (x, y, x + w, y + h)
    left, top, right, bottom = (v * n for v, n in zip(box, (width, height) * 2, strict=True))
    color = (rng.randint(100, 200), rng.randint(60, 120), rng.randint(20, 60))
    thick = round(0.15 * (right - left))
    pen = ImageDraw.Draw(image)
    rungs = rng.randint(4, 6)
    for i in range(rungs):
        level = top + (i + 0.5) / rungs * (bottom - top)
        pen.line([left, level, right, level], fill=color, width=thick)
    for rail in (left + thick / 2, right - thick / 2):
        pen.line([rail, top, rail, bottom], fill=color, width=thick)
    return image, box


def write_data(folder: Path, images: int) -> Path:
    """GRIT records of ladders."""
    folder.mkdir(parents=True)
    with open(folder / "grit.jsonl", "w") as lines:
        for seed in range(images):
            image, box = draw_ladder(seed)
            image.save(folder / f"{seed}.png")
            record = {
                "image": f"{seed}.png",
                "caption": "An image of a ladder.",
                "ref_exps": [[12, 20, *box, 1]],
            }
            lines.write(json.dumps(record) + "\n")
    return folder / "grit.jsonl"


def found_ladders(checkpoint: Path, folder: Path) -> float:
    """The share of held-out images whose caption has "a ladder" with the correct box."""
    folder.mkdir()
    with open(folder / "requests.jsonl", "w") as lines:
        for seed in range(-HELD_OUT_IMAGES, 0):
            image, box = draw_ladder(seed)
            image.save(folder / f"{seed}.png")
            request = {"image": f"{seed}.png", "task": "caption", "phrase": "a ladder", "target": [box]}
            lines.write(json.dumps(request) + "\n")
    results = folder / "results.jsonl"
    run(
        "inference.batch",
        "--requests",
        folder / "requests.jsonl",
        "--results",
        results,
        "--checkpoint",
        checkpoint,
    )
    printed = run("training.evaluate", "--results", results)
    return float(re.search(r"R@1 at IoU 0.5: ([\d.]+)", printed)[1])


def measure(checkpoint: Path, folder: Path) -> str:
    """The shares of ladders found, of other objects named and boxed, of other objects grounded, and of
    questions answered; and the score of the first box that 90% of the absent phrases stay below."""
    model, tokenizer = load_checkpoint(checkpoint)
    chosen = choose_examples(60, HELD_OUT, {"caption", "ground", "ground absent", *TABLE[QUESTIONS]})
    results = answers(model, tokenizer, chosen)
    known = accuracies(tokenizer, chosen, results)
    questions = table_rows(known)[QUESTIONS][0]
    absent = sorted(first_scores(tokenizer, chosen, results)["ground absent"])
    values = [found_ladders(checkpoint, folder), known["caption"][0], known["ground"][0]]
    values += [questions, absent[len(absent) * 9 // 10]]
    return " | ".join(f"{value:.2f}" for value in values)


def run(*command) -> str:
    """Run a module of the project; returns what it printed."""
    command = [sys.executable, "-m", *map(str, command)]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, nargs="+", default=[12, 60, 300])
    parser.add_argument("--steps", type=int, nargs="+", default=[60, 150, 300])
    parser.add_argument("--lr", default="6e-4")
    parser.add_argument(
        "--old", type=int, nargs="+", default=[300, 0], help="old drawings (default: 300, none)"
    )
    args = parser.parse_args()
    print("| images | old drawings | steps | ladders | other objects | grounded | questions | absent |")
    print("|---|---|---|---|---|---|---|---|")
    before = measure(ROOT / "tiny", Path(tempfile.mkdtemp()) / "held")
    print(f"| 0 | | 0 | {before} |", flush=True)
    for images in args.images:
        for old in args.old:
            for steps in args.steps:
                folder = Path(tempfile.mkdtemp())
                data = [write_data(folder / "mine", images)]
                if old:
                    run("training.scenes", folder / "old", "--count", old)
                    data.append(folder / "old" / "grit.jsonl")
                options = (
                    f"--checkpoint tiny --optimizer adamw --batch 16 --lr {args.lr} --steps {steps}".split()
                )
                run("training.train", *options, "--out", folder / "run", "--data", *data)
                after = measure(folder / "run", folder / "held")
                print(f"| {images} | {old} | {steps} | {after} |", flush=True)


if __name__ == "__main__":
    main()
