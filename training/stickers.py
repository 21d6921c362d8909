"""Stickers: transparent PNGs of objects by other artists, mixed into scenes with our own drawings.

A folder has them as STYLE/KIND--NAME.png (`noto/palm-tree--tall.png` is a palm tree); a kind is a
singular noun. A sticker in a scene is changed at random, so a model learns kinds rather than styles:
mirrored, turned, warped, in other colors, flat, as black lines on flat colors, with an outline.
"""

import random
import re
from functools import lru_cache
from itertools import product
from pathlib import Path

from PIL import Image, ImageChops, ImageEnhance, ImageFilter, ImageOps

from training.things import Color

SIDE = 112  # pixels; larger stickers are reduced
OPAQUE = 128  # from this alpha on, a pixel belongs to the thing and its box


class Stickers:
    """The stickers of a folder by kind and style; ValueError names an invalid file."""

    def __init__(self, folder: Path):
        self.files: dict[str, dict[str, list[Path]]] = {}
        for path in sorted(Path(folder).glob("*/*.png")):
            name = re.fullmatch(r"([a-z]+(-[a-z]+)*)--.+", path.stem)
            if name is None:
                raise ValueError(f"{path}: expected a name such as palm-tree--tall.png (KIND--NAME.png)")
            open_sticker(path)
            styles = self.files.setdefault(name[1].replace("-", " "), {})
            styles.setdefault(path.parent.name, []).append(path)
        if not self.files:
            raise ValueError(f"{folder} has no stickers; expected PNGs named STYLE/KIND--NAME.png")
        self.kinds = list(self.files)

    def choose(self, rng: random.Random, kind: str) -> Path:
        """A sticker of this kind; all of its styles are equally likely."""
        styles = self.files[kind]
        return rng.choice(styles[rng.choice(list(styles))])


@lru_cache(maxsize=2000)
def open_sticker(path: Path) -> Image.Image:
    """A sticker as RGBA, cropped to its opaque pixels; ValueError if it has none or no alpha channel."""
    try:
        with Image.open(path) as image:
            has_alpha = image.has_transparency_data
            image = image.convert("RGBA")
    except Exception as error:  # Pillow's decoders raise many kinds
        raise ValueError(f"cannot read sticker {path} ({error})") from None
    if not has_alpha:
        raise ValueError(f"{path} has no alpha channel; expected a sticker on a transparent background")
    image.thumbnail((SIDE, SIDE))
    return crop(image, path)


def crop(image: Image.Image, path: Path) -> Image.Image:
    """An RGBA image without the rows and columns around its opaque pixels."""
    box = image.getchannel("A").point(lambda a: 255 * (a >= OPAQUE)).getbbox()
    if box is None:
        raise ValueError(f"{path} has no opaque pixels")
    return image.crop(box)


@lru_cache(maxsize=256)
def sticker_image(path: Path, look: int) -> Image.Image:
    """A sticker, changed at random by the seed `look` (0: as it is), cropped to its opaque pixels."""
    sticker = open_sticker(path)
    if look == 0:
        return sticker
    rng = random.Random(look)
    width, height = sticker.size
    image = sticker.resize((max(round(width * rng.uniform(0.85, 1.18)), 1), height))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = ImageOps.expand(image, 8)  # room for an outline
    if rng.random() < 0.7:
        image = warp(image, rng)
    if rng.random() < 0.6:
        image = image.rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC, expand=True)
    alpha = image.getchannel("A")
    colors = image.convert("RGB")
    lines = rng.random() < 0.35
    if lines:
        colors = line_art(colors, rng)
    elif rng.random() < 0.35:
        colors = few_colors(colors, 3, rng)
    colors = recolor(colors, rng, gradient=not lines)
    if rng.random() < (0.85 if lines else 0.25):
        edge = (12, 12, 16) if lines else rng.choice([(0, 0, 0), (20, 20, 24), (255, 255, 255), (70, 60, 60)])
        colors, alpha = add_outline(colors, alpha, edge, rng.uniform(1, 3))
    if rng.random() < 0.12:
        colors = colors.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.5)))
    colors.putalpha(alpha)
    return crop(colors, path)


def warp(image: Image.Image, rng: random.Random) -> Image.Image:
    """Other proportions: a grid of 4 x 4 points, each moved at random."""
    width, height = image.size
    points = {}
    for i, j in product(range(4), repeat=2):
        x = width * (i / 3 + rng.uniform(-0.06, 0.06))
        y = height * (j / 3 + rng.uniform(-0.06, 0.06))
        points[i, j] = (x, y)
    mesh = []  # of each tile: where it goes, and its corners in the old image
    for i, j in product(range(3), repeat=2):
        tile = (width * i // 3, height * j // 3, width * (i + 1) // 3, height * (j + 1) // 3)
        corners = points[i, j] + points[i, j + 1] + points[i + 1, j + 1] + points[i + 1, j]
        mesh.append((tile, corners))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)


def recolor(image: Image.Image, rng: random.Random, gradient: bool = True) -> Image.Image:
    """Other hues, saturation, brightness and contrast; sometimes gray or with a gradient."""
    if rng.random() < 0.5:
        shift = rng.choice([12, 12, 30, 128])
        hue, saturation, value = image.convert("HSV").split()
        turn = rng.randint(-shift, shift)
        image = Image.merge("HSV", (hue.point(lambda h: (h + turn) % 256), saturation, value)).convert("RGB")
    if rng.random() < 0.06:
        image = ImageOps.grayscale(image).convert("RGB")
    for enhancer, low, high in (
        (ImageEnhance.Color, 0.5, 1.6),
        (ImageEnhance.Brightness, 0.75, 1.25),
        (ImageEnhance.Contrast, 0.75, 1.3),
    ):
        if rng.random() < 0.5:
            image = enhancer(image).enhance(rng.uniform(low, high))
    if gradient and rng.random() < 0.15:
        ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize(image.size)
        tone = Image.new("RGB", image.size, rng.choice([(255, 255, 255), (0, 0, 0), (90, 60, 120)]))
        image = Image.composite(Image.blend(image, tone, rng.uniform(0.15, 0.45)), image, ramp)
    return image


def few_colors(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """Flat areas instead of details; in half of the images, each area in another color."""
    image = image.filter(ImageFilter.MedianFilter(size)).quantize(rng.randint(3, 9))
    if rng.random() < 0.5:
        image.putpalette([min(max(v + rng.randint(-60, 60), 0), 255) for v in image.getpalette()])
    return image.convert("RGB")


def line_art(image: Image.Image, rng: random.Random) -> Image.Image:
    """Flat, sometimes pale colors with black lines between them."""
    flat = few_colors(image, 5, rng)
    size = rng.choice([3, 3, 5])
    brightest = flat.filter(ImageFilter.MaxFilter(size))
    contrast = ImageChops.subtract(brightest, flat.filter(ImageFilter.MinFilter(size)))
    least = rng.randint(30, 90)
    lines = contrast.convert("L").point(lambda v: 255 * (v >= least)).filter(ImageFilter.GaussianBlur(0.6))
    pale = Image.blend(flat, Image.new("RGB", flat.size, "white"), rng.choice([0, 0, 0, 0.3, 0.8]))
    pale.paste((12, 12, 16), mask=lines)
    return pale


def add_outline(colors: Image.Image, alpha: Image.Image, edge: Color, width: float) -> tuple:
    """The colors and the alpha of an image with an outline around its opaque pixels."""
    spread = alpha.filter(ImageFilter.GaussianBlur(width)).point(lambda a: min(255, 10 * max(0, a - 12)))
    outlined = Image.new("RGB", colors.size, edge)
    outlined.paste(colors, mask=alpha)
    return outlined, ImageChops.lighter(alpha, spread)
