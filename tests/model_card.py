"""The figures of the model card (tiny/README.md) that training/evaluate.py and drawings.py do not print.

    python tests/model_card.py world PNG                        random scenes with their boxes
    python tests/model_card.py losses PNG                       losses and accuracies in log.jsonl
    python tests/model_card.py calibration PNG [--scenes 500]   how often boxes of each score are correct
    python tests/model_card.py precision int8 [--scenes 250]    fp32 compared with another precision
    python tests/model_card.py stickers PNG --stickers DIR      captions of scenes of stickers

All but `world` take --checkpoint (default: tiny).
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from inference.fast import load_checkpoint  # noqa: E402
from kosmos2 import Row  # noqa: E402
from sample import Answer, draw_answers  # noqa: E402
from tokenizer import Entity, Tokenizer, iou, tokens_to_box  # noqa: E402
from training import scenes as world  # noqa: E402
from training.data import encode_example  # noqa: E402
from training.evaluate import (  # noqa: E402
    HELD_OUT,
    Chosen,
    accuracies,
    answers,
    choose_examples,
    name_of,
    table_rows,
)
from training.scenes import MOST, Scene  # noqa: E402
from training.stickers import Stickers  # noqa: E402

SIDE = 240  # of each image in a grid, in pixels
COLUMNS = 4


def generated_boxes(tokenizer: Tokenizer, example: world.Example, result: Row) -> list[Entity]:
    """The entities of an answer whose boxes the model generated, with their scores."""
    prompt = encode_example(tokenizer, example)[0]
    _, entities = tokenizer.parse_output(prompt, result.ids, result.probabilities)
    return [entity for entity in entities if entity.scores[0] is not None]


# ---- Precision -------------------------------------------------------------------------------------


def boxes_kept(tokenizer, chosen: Chosen, results: list[Row], others: list[Row]) -> tuple[float, int]:
    """(share, number) of the boxes in `results` that overlap a box in the other answer with IoU >= 0.9."""
    kept = []
    for (_, example), result, other in zip(chosen, results, others, strict=True):
        candidates = [box for entity in generated_boxes(tokenizer, example, other) for box in entity.boxes]
        for entity in generated_boxes(tokenizer, example, result):
            for box in entity.boxes:
                kept.append(any(iou(box, candidate) >= 0.9 for candidate in candidates))
    return sum(kept) / max(len(kept), 1), len(kept)


def print_comparison(checkpoint: str, precision: str, scenes: int) -> None:
    """A table of fp32 next to another precision."""
    model, tokenizer = load_checkpoint(checkpoint)
    chosen = choose_examples(scenes, HELD_OUT)
    results = answers(model, tokenizer, chosen)
    others = answers(load_checkpoint(checkpoint, precision)[0], tokenizer, chosen)
    rows = table_rows(accuracies(tokenizer, chosen, results))
    other_rows = table_rows(accuracies(tokenizer, chosen, others))
    title = f"task ({scenes} held-out scenes of up to {MOST} objects)"
    print(f"| {title} | fp32 | {precision} | of |\n|---|---|---|---|")
    for task, (share, count) in rows.items():
        print(f"| {task} | {share:.3f} | {other_rows[task][0]:.3f} | {count} |")
    same = sum(a.ids == b.ids for a, b in zip(results, others, strict=True))
    kept, boxes = boxes_kept(tokenizer, chosen, results, others)
    print(f"| answers with the same ids | | {same / len(chosen):.4f} | {len(chosen)} |")
    print(f"| boxes that keep IoU 0.9 with those of fp32 | | {kept:.4f} | {boxes} |")


# ---- Calibration -----------------------------------------------------------------------------------


def scored_boxes(model, tokenizer, chosen: Chosen) -> list[tuple[float, float, bool]]:
    """(score, best IoU with a correct box, whether both corners are correct) of every generated box."""
    found = []
    for (scene, example), result in zip(chosen, answers(model, tokenizer, chosen), strict=True):
        for entity in generated_boxes(tokenizer, example, result):
            boxes = [thing.box for thing in example.targets]
            if example.task == "caption":  # the objects that the phrase names
                name = name_of(entity.phrase, scene.stickers)
                boxes = [thing.box for thing in scene.things if name and thing.name == name[0]]
            exact = [tokens_to_box(*world.cells(box)) for box in boxes]
            for box, score in zip(entity.boxes, entity.scores, strict=True):
                best = max((iou(box, truth) for truth in boxes), default=0.0)
                found.append((score, best, box in exact))
    return found


def plot_calibration(found: list[tuple[float, float, bool]], path: Path, bins: int = 10) -> None:
    """Plot how good boxes are against their score, in `bins` groups of equal size. A score is sqrt(p(top
    left) p(bottom right)). If the probabilities are calibrated, a share of s² of the boxes with score s
    has both corners in the correct cells."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = torch.tensor(sorted(found)).tensor_split(bins)  # each (boxes, 3)
    scores = [group[:, 0].mean().item() for group in groups]
    fig, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for label, column, least, color in (
        ("IoU at least 0.5", 1, 0.5, "#1565c0"),
        ("IoU at least 0.75", 1, 0.75, "#8e24aa"),
        ("both cells correct", 2, 1, "#c62828"),
    ):
        shares = [(group[:, column] >= least).float().mean().item() for group in groups]
        axes.plot(scores, shares, color=color, marker="o", markersize=4, label=label)
    line = torch.linspace(0, 1, 50)
    axes.plot(line, line**2, color="#777777", linestyle="--", label="score², if calibrated")
    axes.set_title(f"{len(found):,} boxes in {bins} groups by score")
    axes.set(xlabel="mean score", ylabel="share of boxes", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    fig.savefig(path, dpi=110)


def calibrate(checkpoint: str, path: Path, scenes: int) -> None:
    model, tokenizer = load_checkpoint(checkpoint)
    chosen = choose_examples(scenes, HELD_OUT, {"caption", "ground", "refer relation"})
    plot_calibration(scored_boxes(model, tokenizer, chosen), path)


# ---- Losses ----------------------------------------------------------------------------------------


def plot_losses(path: Path, log: list[dict]) -> None:
    """The losses of a training run and its accuracy on some tasks over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = ("ground", "ground several", "refer relation", "caption", "describe box", "kind", "count")
    rows = [(row["step"], row | row.get("accuracy", {})) for row in log]
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, names in ((left, ("locations", "words", "patches")), (right, tasks)):
        for name in names:
            points = [(step, values[name]) for step, values in rows if values.get(name)]
            if points:
                axes.plot(*zip(*points, strict=True), label=name)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    left.set(title="Losses", xlabel="step", ylabel="nats per token; sum of patch losses", yscale="log")
    right.set(title="Accuracy on held-out scenes", xlabel="step", ylim=(0, 1.02))
    fig.savefig(path, dpi=110)


# ---- Grids of images -------------------------------------------------------------------------------


def save_grid(images: list[tuple[Image.Image, str]], path: Path) -> None:
    """Images in rows of COLUMNS, each with a caption below (none: "")."""
    font = ImageFont.load_default(13)
    lines = 2 if any(caption for _, caption in images) else 0
    height = SIDE + 18 * lines + 8
    rows = -(-len(images) // COLUMNS)
    grid = Image.new("RGB", (COLUMNS * (SIDE + 8), rows * height), "white")
    pen = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(images):
        image.thumbnail((SIDE, SIDE))
        x = i % COLUMNS * (SIDE + 8)
        y = i // COLUMNS * height
        grid.paste(image, (x + (SIDE - image.width) // 2, y + (SIDE - image.height) // 2))
        text = "\n".join(textwrap.wrap(caption, 36)[:lines])
        pen.multiline_text((x + 4, y + SIDE + 4), text, fill="black", font=font)
    grid.save(path)


def draw_world(path: Path, count: int = 12) -> None:
    """Random scenes, each phrase of their captions with its boxes."""
    images = []
    for seed in range(HELD_OUT, HELD_OUT + count):
        scene = Scene.random(seed)
        entities = []
        for group in scene.groups():
            boxes = [thing.box for thing in group]
            entities.append(Entity(group[0].name, (0, len(group[0].name)), boxes, [None] * len(boxes)))
        images.append((draw_answers(scene.draw(420), [Answer("", "", entities)]), ""))
    save_grid(images, path)


def draw_captions(checkpoint: str, path: Path, stickers: Stickers, count: int = 12) -> None:
    """Scenes of stickers with the caption and the boxes of the model. The scenes are the first ones."""
    model, tokenizer = load_checkpoint(checkpoint)
    chosen = [(scene, world.captions(scene)[0]) for scene in sticker_scenes(stickers, count)]
    images = []
    for (scene, _), row in zip(chosen, answers(model, tokenizer, chosen), strict=True):
        caption, entities = tokenizer.parse_output(row.prompt, row.ids, row.probabilities)
        images.append((draw_answers(scene.draw(420), [Answer(caption, "", entities)]), caption))
    save_grid(images, path)


def sticker_scenes(stickers: Stickers, count: int) -> list[Scene]:
    return [Scene.of_stickers(seed, stickers) for seed in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("figure", choices=["world", "losses", "calibration", "precision", "stickers"])
    parser.add_argument("target", help="the image to write, or the precision to compare")
    parser.add_argument("--checkpoint", default=str(ROOT / "tiny"))
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--stickers", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.figure == "world":
        draw_world(Path(args.target))
    elif args.figure == "losses":
        lines = (Path(args.checkpoint) / "log.jsonl").read_text().splitlines()
        plot_losses(Path(args.target), [json.loads(line) for line in lines])
    elif args.figure == "calibration":
        calibrate(args.checkpoint, Path(args.target), args.scenes)
    elif args.figure == "precision":
        print_comparison(args.checkpoint, args.target, args.scenes)
    else:
        draw_captions(args.checkpoint, Path(args.target), Stickers(args.stickers))


if __name__ == "__main__":
    main()
