"""Drawings by other code: circles, squares, triangles and stars made with plain Pillow calls.

    python tests/drawings.py [--checkpoint tiny] [--count 150] [--save DIR] [--sides 0.11 0.2]

They share no code with training/scenes.py, so they show whether a model has learned shapes or only
the style of one renderer. Prints two accuracies per kind of background: shapes that a caption names
and boxes with an IoU of at least 0.5, and shapes that are grounded when their name is given. The row
"outlined" is for the shapes with an outline, on all backgrounds.
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

from inference.fast import load_checkpoint  # noqa: E402
from kosmos2 import finish, pad_left, preprocess_image  # noqa: E402
from tokenizer import Box, iou, parse  # noqa: E402

RGB = {
    "red": (255, 0, 0), "orange": (255, 165, 0), "yellow": (255, 255, 0), "green": (0, 128, 0),
    "blue": (0, 0, 255), "purple": (128, 0, 128), "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip
SHAPES = ["circle", "square", "triangle", "star"]
SIZES = [(300, 300), (400, 250), (250, 400), (480, 240)]
BACKGROUNDS = ["white", "light", "dark", "gradient", "noisy"]
SIDES = (0.22, 0.5)  # the smallest and the largest side of a shape, relative to the image's shorter side
LEAST_DISTANCE = 100  # between the RGB values of a shape and of each pixel of its background


class Shape(NamedTuple):
    name: str  # "red circle"
    box: Box  # in 0..1
    outlined: bool


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


def shape_points(shape: str, x: int, y: int, side: int) -> list[tuple[float, float]]:
    """The corners of a shape in the square at (x, y); for a circle, two opposite corners of its box."""
    if shape in ("circle", "square"):
        return [(x, y), (x + side, y + side)]
    if shape == "triangle":
        return [(x + side / 2, y), (x + side, y + side), (x, y + side)]
    points = []
    for i in range(10):
        radius = side / 2 if i % 2 == 0 else side / 5
        angle = math.pi * i / 5 - math.pi / 2
        points.append((x + side / 2 + radius * math.cos(angle), y + side / 2 + radius * math.sin(angle)))
    return points


def draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, points: list[tuple[float, float]], fill, outline
) -> None:
    width = 3 if outline else 0
    if shape == "circle":
        pen.ellipse(points, fill=fill, outline=outline, width=width)
    elif shape == "square":
        pen.rectangle(points, fill=fill, outline=outline, width=width)
    else:
        pen.polygon(points, fill=fill, outline=outline, width=width)


def bounding_box(points: list[tuple[float, float]], size: tuple[int, int]) -> Box:
    xs = [x for x, _ in points]
    ys = [y for _, y in points]
    return min(xs) / size[0], min(ys) / size[1], max(xs) / size[0], max(ys) / size[1]


def visible_colors(background: Image.Image, box: Box) -> list[str]:
    """The names of colors that stand out from the background inside a box."""
    width, height = background.size
    pixels = np.asarray(background.crop((box[0] * width, box[1] * height, box[2] * width, box[3] * height)))
    colors = np.reshape(pixels, (-1, 3)).astype(float)
    return [
        name for name, color in RGB.items() if np.linalg.norm(colors - color, axis=1).min() > LEAST_DISTANCE
    ]


def drawing(seed: int, sides=SIDES) -> tuple[Image.Image, list[Shape], str]:
    """(image, its shapes, the kind of its background)"""
    rng = random.Random(f"drawing {seed}")
    kind = BACKGROUNDS[seed % len(BACKGROUNDS)]
    size = rng.choice(SIZES)
    image = make_background(kind, size, rng)
    background = image.copy()
    pen = ImageDraw.Draw(image)
    outline = None
    if rng.random() < 0.4:
        outline = "white" if kind == "dark" else "black"
    shapes: list[Shape] = []
    for _ in range(rng.randint(1, 3)):
        shape = rng.choice(SHAPES)
        points, box = free_place(shape, shapes, size, sides, rng)
        if box is None:
            continue
        color = rng.choice(visible_colors(background, box))
        name = f"{color} {shape}"
        if name not in [other.name for other in shapes]:
            draw_shape(pen, shape, points, RGB[color], outline)
            shapes.append(Shape(name, box, outline is not None))
    return image, shapes, kind


def free_place(shape: str, others: list[Shape], size: tuple[int, int], sides, rng: random.Random):
    """(the points of a shape, their bounding box) in a place where it overlaps no other shape.

    The box is None if no place was found.
    """
    for _ in range(30):
        side = rng.randint(*[round(side * min(size)) for side in sides])
        x, y = rng.randint(2, size[0] - side - 3), rng.randint(2, size[1] - side - 3)
        points = shape_points(shape, x, y, side)
        box = bounding_box(points, size)
        if all(iou(box, other.box) == 0 for other in others):
            return points, box
    return [], None


@torch.inference_mode()
def run(model, tokenizer, images: list[Image.Image], prompts: list[str]) -> list[str]:
    """The tagged answers to one prompt about each image."""
    texts = []
    for start in range(0, len(images), 32):
        part = slice(start, start + 32)
        size = model.config.vision.image_size
        pixels = torch.stack([preprocess_image(image, size) for image in images[part]])
        tokens, image_mask, pad_mask = pad_left([tokenizer.encode_prompt(prompt) for prompt in prompts[part]])
        state = model.prefill(tokens, pixels, None, image_mask, pad_mask, max_new_tokens=110)
        texts += [tokenizer.decode(result.ids) for result in finish(state)]
    return texts


def measure(model, tokenizer, count: int, sides=SIDES) -> dict[str, Accuracy]:
    """Accuracy by kind of background, of shapes with an outline, and of "all"."""
    drawings = [drawing(seed, sides) for seed in range(count)]
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
            for group in groups_of(shape, kind):
                named[group].append(hit)
    for (_, shape, kind), text in zip(asked, grounded, strict=True):
        boxes = [box for entity in parse(text)[1] for box in entity.boxes]
        hit = bool(boxes) and iou(boxes[0], shape.box) >= 0.5
        for group in groups_of(shape, kind):
            found[group].append(hit)
    return {
        group: Accuracy(np.mean(named[group]), np.mean(found[group]), len(named[group]))
        for group in [*BACKGROUNDS, "all", "outlined"]
        if named[group]
    }


def groups_of(shape: Shape, background: str) -> list[str]:
    return [background, "outlined", "all"] if shape.outlined else [background, "all"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default=str(ROOT / "tiny"))
    parser.add_argument("--count", type=int, default=150)
    sides_help = "smallest and largest side, relative to the image's shorter side (default: 0.22 0.5)"
    parser.add_argument("--sides", type=float, nargs=2, default=SIDES, metavar="SIDE", help=sides_help)
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write the images, to look at")
    args = parser.parse_args()
    model, tokenizer = load_checkpoint(args.checkpoint)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        for seed in range(args.count):
            drawing(seed, args.sides)[0].save(args.save / f"{seed}.png")
    print("| background | named and boxed in the caption | grounded | shapes |\n|---|---|---|---|")
    for kind, accuracy in measure(model, tokenizer, args.count, args.sides).items():
        print(f"| {kind} | {accuracy.captions:.3f} | {accuracy.grounding:.3f} | {accuracy.shapes} |")


if __name__ == "__main__":
    main()
