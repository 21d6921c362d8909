"""Drawings by other code: circles, squares, triangles and stars made with plain Pillow calls.

    python tests/drawings.py [--checkpoint tiny] [--count 150]

They share nothing with training/scenes.py, so they show whether a model has learned shapes or only
its own renderer. Prints, for each kind of background, how many of the shapes a caption names and
boxes (IoU of at least 0.5), and how many are grounded when their name is given.
"""

import argparse
import math
import random
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kosmos2 import finish, pad_left, preprocess_images  # noqa: E402
from load_weights import load_checkpoint  # noqa: E402
from tokenizer import Box, iou, parse  # noqa: E402

RGB = {
    "red": (255, 0, 0), "orange": (255, 165, 0), "yellow": (255, 255, 0), "green": (0, 128, 0),
    "blue": (0, 0, 255), "purple": (128, 0, 128), "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip
SHAPES = ["circle", "square", "triangle", "star"]
SIZES = [(300, 300), (400, 250), (250, 400), (480, 240)]
BACKGROUNDS = ["white", "light", "dark", "gradient", "noisy"]


class Shape(NamedTuple):
    name: str  # "red circle"
    box: Box  # in 0..1


class Accuracy(NamedTuple):
    captions: float
    grounding: float
    shapes: int


def make_background(kind: str, size: tuple[int, int], rng: random.Random) -> Image.Image:
    if kind == "white":
        return Image.new("RGB", size, "white")
    low, high = (10, 70) if kind == "dark" else (180, 245)
    color = tuple(rng.randint(low, high) for _ in range(3))
    image = Image.new("RGB", size, color)
    if kind == "gradient":
        end = np.array([rng.randint(120, 245) for _ in range(3)])
        ramp = np.linspace(0, 1, size[1])[:, None, None]
        pixels = (np.array(color) * (1 - ramp) + end * ramp) * np.ones((1, size[0], 1))
        image = Image.fromarray(pixels.astype(np.uint8))
    if kind == "noisy":
        noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 8, (size[1], size[0], 3))
        image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: int, y: int, side: int, fill, outline) -> None:
    corners = [x, y, x + side, y + side]
    width = 3 if outline else 0
    if shape == "circle":
        pen.ellipse(corners, fill=fill, outline=outline, width=width)
    elif shape == "square":
        pen.rectangle(corners, fill=fill, outline=outline, width=width)
    elif shape == "triangle":
        pen.polygon(
            [(x + side / 2, y), (x + side, y + side), (x, y + side)], fill=fill, outline=outline, width=width
        )
    else:
        points = []
        for i in range(10):
            radius = side / 2 if i % 2 == 0 else side / 5
            angle = math.pi * i / 5 - math.pi / 2
            points.append((x + side / 2 + radius * math.cos(angle), y + side / 2 + radius * math.sin(angle)))
        pen.polygon(points, fill=fill, outline=outline, width=width)


def drawing(seed: int) -> tuple[Image.Image, list[Shape], str]:
    """(image, its shapes, the kind of its background)"""
    rng = random.Random(f"drawing {seed}")
    kind = BACKGROUNDS[seed % len(BACKGROUNDS)]
    size = rng.choice(SIZES)
    image = make_background(kind, size, rng)
    around = np.asarray(image).mean(axis=(0, 1))
    pen = ImageDraw.Draw(image)
    visible = [name for name, color in RGB.items() if math.dist(color, around) > 130]
    outlined = rng.random() < 0.4
    shapes: list[Shape] = []
    for _ in range(rng.randint(1, 3)):
        for _ in range(30):
            side = rng.randint(round(0.22 * min(size)), round(0.5 * min(size)))
            x, y = rng.randint(2, size[0] - side - 2), rng.randint(2, size[1] - side - 2)
            box = (x / size[0], y / size[1], (x + side) / size[0], (y + side) / size[1])
            if all(iou(box, shape.box) == 0 for shape in shapes):
                break
        else:
            continue
        shape, color = rng.choice(SHAPES), rng.choice(visible)
        name = f"{color} {shape}"
        if name in [other.name for other in shapes]:
            continue
        outline = ("white" if kind == "dark" else "black") if outlined else None
        draw_shape(pen, shape, x, y, side, RGB[color], outline)
        shapes.append(Shape(name, box))
    return image, shapes, kind


@torch.inference_mode()
def run(model, tokenizer, images: list[Image.Image], prompts: list[str]) -> list[str]:
    """The tagged answers to one prompt about each image."""
    texts = []
    for start in range(0, len(images), 32):
        part = slice(start, start + 32)
        pixels = preprocess_images(images[part], model.config.vision.image_size)
        tokens, image_mask, pad_mask = pad_left([tokenizer.encode_prompt(prompt) for prompt in prompts[part]])
        state = model.prefill(tokens, pixels, None, image_mask, pad_mask, max_new_tokens=110)
        texts += [tokenizer.decode(result.ids) for result in finish(state)]
    return texts


def measure(model, tokenizer, count: int) -> dict[str, Accuracy]:
    """Accuracy by kind of background, and of "all"."""
    drawings = [drawing(seed) for seed in range(count)]
    captions = run(model, tokenizer, [image for image, _, _ in drawings], ["<grounding>An image of"] * count)
    asked = [(image, shape, kind) for image, shapes, kind in drawings for shape in shapes]
    prompts = []
    for _, shape, _ in asked:
        article = "an" if shape.name[0] == "o" else "a"
        prompts.append(f"<grounding><phrase> {article} {shape.name}</phrase>")
    grounded = run(model, tokenizer, [image for image, _, _ in asked], prompts)
    named, found = defaultdict(list), defaultdict(list)
    for (_, shapes, kind), text in zip(drawings, captions, strict=True):
        entities = parse(text)[1]
        for shape in shapes:
            boxes = [box for entity in entities if shape.name in entity.phrase for box in entity.boxes]
            hit = any(iou(box, shape.box) >= 0.5 for box in boxes)
            named[kind].append(hit)
            named["all"].append(hit)
    for (_, shape, kind), text in zip(asked, grounded, strict=True):
        boxes = [box for entity in parse(text)[1] for box in entity.boxes]
        hit = bool(boxes) and iou(boxes[0], shape.box) >= 0.5
        found[kind].append(hit)
        found["all"].append(hit)
    return {
        kind: Accuracy(np.mean(named[kind]), np.mean(found[kind]), len(named[kind]))
        for kind in [*BACKGROUNDS, "all"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(ROOT / "tiny"))
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write the images, to look at")
    args = parser.parse_args()
    model, tokenizer = load_checkpoint(args.checkpoint)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        for seed in range(args.count):
            drawing(seed)[0].save(args.save / f"{seed}.png")
    print("| background | named and boxed in the caption | grounded | shapes |\n|---|---|---|---|")
    for kind, accuracy in measure(model, tokenizer, args.count).items():
        print(f"| {kind} | {accuracy.captions:.3f} | {accuracy.grounding:.3f} | {accuracy.shapes} |")


if __name__ == "__main__":
    main()
