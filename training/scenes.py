"""Random images of shapes and things, and captions, questions and answers about them.

This is the world of the bundled model: up to five things on a background, drawn by things.py or taken
from a folder of stickers (stickers.py). `Scene.random` makes a scene, `Scene.draw` paints it,
`Scene.record` describes it as a GRIT record (caption, noun chunks, boxes), and `tasks` lists what can
be asked about it in the prompts of the paper, each with an answer that follows from rules
(`resolve`), so scoring is automatic.

    python -m training.scenes FOLDER [--count 9] [--stickers DIR]    write images and grit.jsonl to look at
"""

import io
import json
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sample import CommandParser, report_error, run_command
from tokenizer import GRID, PROMPTS, Box, boxes_to_text, clip_box, parse, strip_tags
from training import things as drawn
from training.stickers import Stickers, sticker_image
from training.things import BODY, DRAWINGS, SHADE, SHAPES, UNCOLORED, Color, Part, Point, plural

# Each color name covers everything between its samples.
COLORS: dict[str, list[Color]] = {
    "red": [(214, 48, 49), (255, 0, 0), (200, 24, 40), (232, 70, 60)],
    "orange": [(240, 138, 36), (255, 165, 0), (255, 128, 0), (236, 120, 30)],
    "yellow": [(247, 214, 60), (255, 255, 0), (255, 224, 30), (240, 206, 40)],
    "green": [(46, 158, 76), (0, 128, 0), (0, 255, 0), (60, 190, 90), (20, 110, 50)],
    "blue": [(44, 98, 204), (0, 0, 255), (30, 60, 220), (60, 130, 230)],
    "purple": [(134, 66, 176), (128, 0, 128), (150, 60, 200), (110, 40, 150)],
    "black": [(36, 36, 40), (0, 0, 0), (20, 20, 24)],
    "white": [(250, 250, 250), (255, 255, 255), (240, 240, 244)],
}
BACKGROUNDS = {  # weights
    "white": 16, "light": 18, "dark": 16, "any": 10, "gradient": 18, "day": 10, "night": 6, "snow": 6,
}  # fmt: skip
MOST = 5  # things in a scene
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
PLACES = [
    ["at the top left", "at the top", "at the top right"],
    ["on the left", "in the middle", "on the right"],
    ["at the bottom left", "at the bottom", "at the bottom right"],
]
KINDS = list(DRAWINGS)
ANYTHING = "thing"  # the word that fits every kind

SMALLEST = 0.12  # sizes of things
LARGEST = 0.5
LARGE = 0.30  # sizes in between have no size word
SMALL = 0.20
MARGIN = 0.10  # centers closer than this along an axis are neither left nor right, neither above nor below
NEXT_TO = 0.15  # things side by side with a smaller gap are "next to" each other
SECOND = 50_000_000  # from a scene's seed to the seed of the other scene in its two-image prompts


# ---- Things in a scene -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """One drawing or sticker in a scene.

    center: of its box, in 0..1 of the image. size: its longer side, as a fraction of sqrt(width *
    height) of the image. look: seed of its proportions, tilt and direction, and of a sticker's
    colors. aspect: width / height of the image."""

    kind: str
    color: str | None  # None for stickers and for kinds with colors of their own
    center: tuple[float, float]
    size: float
    look: int = 0
    aspect: float = 1.0
    sticker: Path | None = None  # drawn by things.py if None

    @cached_property
    def parts(self) -> list[Part]:
        """Its polygons, in 0..1 of the image."""
        rng = random.Random(self.look)
        parts = DRAWINGS[self.kind](lambda value: value * rng.uniform(0.88, 1.12))
        tilt = math.radians(rng.choice([0, rng.uniform(-12, 12)]))
        stretch = rng.uniform(0.88, 1.14) * rng.choice([-1, 1])  # negative: mirrored
        turned = moved(parts, lambda x, y: rotate(x * stretch, y, tilt))
        x1, y1, x2, y2 = extent(turned)
        scale = self.size / max(x2 - x1, y2 - y1)
        x_scale = scale / math.sqrt(self.aspect)
        y_scale = scale * math.sqrt(self.aspect)
        x_middle = (x1 + x2) / 2
        y_middle = (y1 + y2) / 2
        cx, cy = self.center
        return moved(turned, lambda x, y: (cx + (x - x_middle) * x_scale, cy + (y - y_middle) * y_scale))

    @cached_property
    def box(self) -> Box:
        if self.sticker is None:
            return extent(self.parts)
        width, height = sticker_image(self.sticker, self.look).size
        scale = self.size / max(width, height) / 2
        dx = width * scale / math.sqrt(self.aspect)
        dy = height * scale * math.sqrt(self.aspect)
        return self.center[0] - dx, self.center[1] - dy, self.center[0] + dx, self.center[1] + dy

    @property
    def size_word(self) -> str | None:
        return "large" if self.size >= LARGE else "small" if self.size <= SMALL else None

    @property
    def place(self) -> str:
        """The ninth of the image its center is in: "at the top left", "on the right", "in the middle"."""
        column, row = (min(int(c * 3), 2) for c in self.center)
        return PLACES[row][column]

    @property
    def clear_place(self) -> str | None:
        """Its place; None if its center is too close to the border of two places."""
        close = any(abs(c - border) < 0.03 for c in self.center for border in (1 / 3, 2 / 3))
        return None if close else self.place

    @property
    def name(self) -> str:
        return self.kind if self.color is None else f"{self.color} {self.kind}"

    def is_a(self, kind: str, color: str | None = None, size: str | None = None) -> bool:
        if kind not in (self.kind, ANYTHING):
            return False
        return color in (self.color, None) and size in (self.size_word, None)

    def side_of(self, side: str, other: "Thing") -> bool | None:
        """Whether it is left of (right of, above, below) another; None if too close to say."""
        dx, dy = SIDES[side]
        across = self.center[0] - other.center[0]
        down = self.center[1] - other.center[1]
        distance = dx * across + dy * down
        return None if abs(distance) < MARGIN else distance > 0


def rotate(x: float, y: float, angle: float) -> tuple[float, float]:
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def moved(parts: list[Part], move: Callable[[float, float], Point]) -> list[Part]:
    return [Part([move(x, y) for x, y in part.points], part.color) for part in parts]


def extent(parts: list[Part]) -> Box:
    """The bounding box of some polygons."""
    xs = [x for part in parts for x, _ in part.points]
    ys = [y for part in parts for _, y in part.points]
    return min(xs), min(ys), max(xs), max(ys)


def random_thing(rng, others: list[Thing], background, aspect, stickers=None, repeat=0.0) -> Thing | None:
    """A thing in a free place; sometimes of the kind or color of an earlier one. None if no place was
    found. repeat: with stickers, the probability that it has the name of an earlier one."""
    kind = rng.choice(KINDS)
    color = rng.choice(list(COLORS))
    if rng.random() < 0.35:
        kind = rng.choice(list(SHAPES))
    elif rng.random() < 0.15:
        kind = rng.choice(list(UNCOLORED))
    if others and rng.random() < 0.35:
        twin = rng.choice(others)
        shared = rng.choice(["kind", "color", "both"])
        if shared == "kind" or (shared == "both" and twin.color):
            kind = twin.kind
        if shared != "kind" and twin.color:
            color = twin.color
    thing = Thing(kind, None if kind in UNCOLORED else color, (0.5, 0.5), 0, 0, aspect)
    smallest, largest = SMALLEST, LARGEST
    if stickers is not None:  # stickers may be larger, and our drawings smaller
        thing = random_sticker(rng, thing, others, stickers, repeat)
        smallest, largest = (0.075, 0.3) if thing.kind in SHAPES else (0.1, LARGEST)
        if thing.sticker is not None:
            smallest, largest = 0.15, 0.7
    gap = rng.choice([0.01, 0.01, -0.03])  # one in three may overlap its neighbors a little
    for _ in range(40):
        size = smallest * (largest / smallest) ** rng.random()
        look = rng.getrandbits(30) if thing.sticker is None else thing.look
        if placed := try_place(rng, replace(thing, size=size, look=look), others, background, gap):
            return placed
    return None


def try_place(rng, thing: Thing, others: list[Thing], background: str, gap: float) -> Thing | None:
    """The thing in a random place; None if that place is not free or, for a drawing, not natural."""
    x1, y1, x2, y2 = thing.box
    half_width = (x2 - x1) / 2 + 0.01
    half_height = (y2 - y1) / 2 + 0.01
    if max(half_width, half_height) > 0.5:
        return None
    x = rng.uniform(half_width, 1 - half_width)
    y = rng.uniform(half_height, 1 - half_height)
    in_landscape = background in ("day", "night", "snow") and rng.random() < 0.8
    if in_landscape and thing.sticker is None and (y < 0.45) != (thing.kind in drawn.AIRBORNE):
        return None
    thing = replace(thing, center=(x, y))
    return None if any(overlap(thing.box, other.box, gap) for other in others) else thing


def random_sticker(rng, thing: Thing, others: list[Thing], stickers: Stickers, repeat: float) -> Thing:
    """A drawing, or a sticker in its place. With probability `repeat`, it has the name of an earlier thing.
    Things of one kind are all drawings or all stickers, so "the cat" has only one meaning."""
    path = None
    if others and rng.random() < repeat:
        twin = rng.choice(others)
        thing = replace(thing, kind=twin.kind, color=twin.color)
        path = twin.sticker if rng.random() < 0.4 else None
    elif rng.random() < 0.7:
        known = [kind for kind in stickers.kinds if kind in KINDS]  # our drawings alone do not teach them
        thing = replace(thing, kind=rng.choice([*stickers.kinds, *known]), color=None)
        path = stickers.choose(rng, thing.kind)
    for other in others:
        if other.kind == thing.kind and (path is None) != (other.sticker is None):
            path = None if other.sticker is None else stickers.choose(rng, thing.kind)
            thing = replace(thing, color=other.color)
    return replace(thing, sticker=path, look=1 + rng.getrandbits(30))


def overlap(a: Box, b: Box, gap: float) -> bool:
    across = a[0] < b[2] + gap and b[0] < a[2] + gap
    down = a[1] < b[3] + gap and b[1] < a[3] + gap
    return across and down


# ---- Scenes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scene:
    """An image before it is drawn: its things from left to right, its background, its aspect ratio."""

    things: tuple[Thing, ...]
    background: str
    seed: int
    aspect: float = 1.0  # width / height
    plain: bool = False  # drawn without outlines and noise
    stickers: Stickers | None = field(default=None, compare=False, repr=False)  # what may be in it

    @classmethod
    def random(cls, seed: int, stickers: Stickers | None = None) -> "Scene":
        """The scene of this seed, of up to MOST things; one in thirty is empty. With stickers, seven
        scenes in ten may have them."""
        rng = random.Random(seed)
        background = rng.choices(list(BACKGROUNDS), list(BACKGROUNDS.values()))[0]
        aspect = rng.choice([1.0, 2 ** rng.uniform(-1, 1)])
        count = 0 if rng.random() < 1 / 30 else rng.randint(1, MOST)
        things: list[Thing] = []
        used = stickers if stickers is not None and rng.random() < 0.7 else None
        # Few images repeat things, but those repeat most of them: groups should be easy to notice.
        repeat = 0.7 if used is not None and rng.random() < 0.3 else 0.0
        for _ in range(count):
            thing = random_thing(rng, things, background, aspect, used, repeat)
            if thing is not None:
                things.append(thing)
        things.sort(key=lambda thing: thing.center[0])
        return cls(tuple(things), background, seed, aspect, stickers=stickers)

    @classmethod
    def of_stickers(cls, seed: int, stickers: Stickers) -> "Scene":
        """One to three stickers of different kinds, as they are, on a plain color or a landscape."""
        rng = random.Random(f"stickers {seed}")
        background = rng.choice(["white", "light", "dark", "day", "night", "snow"])
        aspect = rng.choice([1, 4 / 3, 3 / 4])
        things: list[Thing] = []
        for kind in rng.sample(stickers.kinds, min(rng.randint(1, 3), len(stickers.kinds))):
            path = stickers.choose(rng, kind)
            for _ in range(40):
                thing = Thing(kind, None, (0.5, 0.5), rng.uniform(0.25, 0.5), 0, aspect, path)
                if placed := try_place(rng, thing, things, background, gap=0.01):
                    things.append(placed)
                    break
        things.sort(key=lambda thing: thing.center[0])
        return cls(tuple(things), background, seed, aspect, plain=True, stickers=stickers)

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of this world: those of our drawings and then those of the stickers."""
        return list(dict.fromkeys([*KINDS, *(self.stickers.kinds if self.stickers else [])]))

    @property
    def has_stickers(self) -> bool:
        return any(thing.sticker is not None for thing in self.things)

    def draw(self, side: int | None = None) -> Image.Image:
        """The image.

        side: sqrt(width * height) in pixels, by default different from scene to scene."""
        rng = random.Random(f"{self.seed} drawing")
        side = side or rng.randint(160, 360)
        smooth = rng.choice([1, 2, 2])  # drawn twice as large, then reduced: antialiased
        width = round(side * math.sqrt(self.aspect)) * smooth
        height = round(side / math.sqrt(self.aspect)) * smooth
        image, colors = paint_background(self.background, width, height, rng)
        style = "flat" if self.plain else rng.choice(["flat", "flat", "outlined", "mixed"])
        for thing in self.things:
            outlined = style == "outlined" or (style == "mixed" and rng.random() < 0.5)
            draw_thing(image, thing, colors, outlined, rng)
        image = image.reduce(smooth)
        if not self.plain and rng.random() < 0.3:
            image = add_noise(image, rng)
        return degrade(image, rng) if self.has_stickers and not self.plain else image

    def find(self, kind: str, color: str | None = None, size: str | None = None) -> list[Thing]:
        return [thing for thing in self.things if thing.is_a(kind, color, size)]

    def groups(self) -> list[list[Thing]]:
        """Things of the same name together, in the order of their leftmost."""
        groups: dict[str, list[Thing]] = {}
        for thing in self.things:
            groups.setdefault(thing.name, []).append(thing)
        return list(groups.values())

    def record(self, detailed: bool = False) -> dict:
        """The scene as a GRIT record. Brief:
        "An image of a snowman next to a fire." or "An image of a red cup, a tree and two blue stars."
        Detailed: one sentence with the place of every thing."""
        caption, entities = parse(linked_caption(self, detailed))
        groups = [[thing] for thing in self.things] if detailed else self.groups()
        rows = []
        for entity, group in zip(entities, groups, strict=True):
            rows += [[*entity.span, *thing.box, 1.0] for thing in group]
        return {"caption": caption, "noun_chunks": rows, "ref_exps": [list(row) for row in rows]}


def joint(groups: list[list[Thing]], i: int, detailed: bool) -> str:
    """The words between things i - 1 and i of a caption; two single things are joined by their relation."""
    if i == 0:
        return ""
    if i < len(groups) - 1:
        return ","
    if detailed or len(groups) > 2 or len(groups[0]) > 1 or len(groups[1]) > 1:
        return " and"
    return " " + relation(groups[0][0], groups[1][0])


def relation(a: Thing, b: Thing) -> str:
    """Where `a` is relative to `b`, which is not left of it: above, below, next to or left of it."""
    across = b.center[0] - a.center[0]
    down = b.center[1] - a.center[1]
    if abs(down) > across:
        return "above" if down > 0 else "below"
    return "next to" if b.box[0] - a.box[2] < NEXT_TO else "left of"


def counted(group: list[Thing]) -> str:
    """ "a red cup", "an apple", "two blue squares"."""
    return amount(len(group), group[0].name, group[0].kind)


def amount(number: int, name: str, kind: str) -> str:
    if number == 1:
        return f"{article(name)} {name}"
    return f"{NUMBERS[number]} {name.removesuffix(kind)}{plural(kind)}"


def described(thing: Thing) -> str:
    """ "a large red cup"."""
    words = thing.name if thing.size_word is None else f"{thing.size_word} {thing.name}"
    return f"{article(words)} {words}"


def article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


# ---- Painting --------------------------------------------------------------------------------------


def mix(a: Color, b: Color, share: float) -> Color:
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def random_color(rng: random.Random, low: int, high: int) -> Color:
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def paint_background(name: str, width: int, height: int, rng) -> tuple[Image.Image, list[Color]]:
    """An image without things, and its main colors."""
    size = (width, height)
    if name == "gradient":
        low, high = rng.choice([(0, 255), (150, 255), (0, 110)])
        colors = [random_color(rng, low, high), random_color(rng, low, high)]
        ramp = Image.linear_gradient("L").rotate(rng.choice([0, 90, 180, 270])).resize(size)
        first, second = (Image.new("RGB", size, color) for color in colors)
        return Image.composite(first, second, ramp), colors
    if name in ("day", "night", "snow"):
        return paint_landscape(name, width, height, rng)
    low, high = {"white": (250, 255), "light": (170, 255), "dark": (0, 80), "any": (0, 255)}[name]
    color = random_color(rng, low, high)
    if name == "white":
        color = (255, 255, 255)
    return Image.new("RGB", size, color), [color]


def paint_landscape(name: str, width: int, height: int, rng) -> tuple[Image.Image, list[Color]]:
    """Sky and ground; stars at night, flakes of snow."""
    sky, ground = {
        "day": ((150, 206, 240), rng.choice([(132, 190, 96), (226, 206, 150), (110, 160, 90)])),
        "night": ((22, 28, 66), rng.choice([(30, 56, 44), (214, 222, 240), (44, 40, 60)])),
        "snow": (rng.choice([(196, 212, 232), (60, 74, 116)]), (240, 244, 250)),
    }[name]
    sky = mix(sky, random_color(rng, 0, 255), 0.08)
    ground = mix(ground, random_color(rng, 0, 255), 0.08)
    image = Image.new("RGB", (width, height), sky)
    pen = ImageDraw.Draw(image)
    horizon = height * rng.uniform(0.5, 0.8)
    hill = height * rng.choice([0, 0.08])
    pen.rectangle([0, horizon, width, height], fill=ground)
    pen.ellipse([-width * 0.2, horizon - hill, width * 0.7, horizon + hill], fill=ground)
    if name != "day":
        radius = max(1, round(width / 220))
        for _ in range(rng.randint(8, 40)):
            x = rng.uniform(0, width)
            y = rng.uniform(0, height if name == "snow" else horizon)
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=(250, 250, 240))
    return image, [sky, ground]


def draw_thing(image: Image.Image, thing: Thing, background: list[Color], outlined: bool, rng) -> None:
    """Draw a thing. First the lines around all its polygons, then the polygons, so that only its
    silhouette is outlined."""
    width, height = image.size
    if thing.sticker is not None:
        x1, y1, x2, y2 = (round(v * n) for v, n in zip(thing.box, (width, height) * 2, strict=True))
        cutout = sticker_image(thing.sticker, thing.look).resize((max(x2 - x1, 1), max(y2 - y1, 1)))
        image.paste(cutout, (x1, y1), cutout)
        return
    body = drawn.BROWN
    if thing.color is not None:
        samples = COLORS[thing.color]
        body = mix(rng.choice(samples), rng.choice(samples), rng.random())
    body = mix(body, random_color(rng, 0, 255), rng.uniform(0, 0.06))
    fills = {BODY: body, SHADE: mix(body, (0, 0, 0), 0.35)}
    if thing.color == "black":
        fills[SHADE] = (92, 92, 98)
    polygons = []
    for part in thing.parts:
        points = [(x * width, y * height) for x, y in part.points]
        polygons.append((points, fills.get(part.color, part.color)))
    main = fills.get(BODY) if thing.color else max(thing.parts, key=area).color
    hidden = any(math.dist(main, color) < 75 for color in background)
    edges = [(20, 20, 20), (250, 250, 250), mix(main, (0, 0, 0), 0.4)]
    edge = rng.choice(edges)
    if hidden:  # it would not show on this background
        edge = max(edges, key=lambda color: min(math.dist(color, other) for other in background))
    side = math.sqrt(width * height)
    line = max(2, round(side * rng.uniform(0.006, 0.022)))
    pen = ImageDraw.Draw(image)
    if thing.kind in SHAPES and not hidden and rng.random() < 0.15:  # only its outline, in its color
        points = polygons[0][0]
        thick = max(line, round(side * thing.size * 0.09))
        pen.line([*points, *points[:2]], fill=body, width=thick, joint="curve")
        return
    if outlined or hidden:
        for points, _ in polygons:
            pen.line([*points, *points[:2]], fill=edge, width=line, joint="curve")
    for points, fill in polygons:
        pen.polygon(points, fill=fill)


def area(part: Part) -> float:
    """The area of the box of a polygon."""
    x1, y1, x2, y2 = extent([part])
    return (x2 - x1) * (y2 - y1)


def add_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    """Gaussian noise on every pixel, gray or colored."""
    generator = np.random.default_rng(rng.getrandbits(32))
    channels = rng.choice([1, 3])
    shape = (image.height, image.width, channels)
    noise = generator.normal(0, rng.uniform(2, 12), shape).astype(np.float32)
    noisy = (np.asarray(image) + noise).clip(0, 255)
    return Image.fromarray(noisy.astype(np.uint8))


def degrade(image: Image.Image, rng: random.Random) -> Image.Image:
    """Sometimes blurred, sometimes with the artifacts of a JPEG."""
    if rng.random() < 0.12:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2) * image.width / 250))
    if rng.random() < 0.15:
        content = io.BytesIO()
        image.save(content, "jpeg", quality=rng.randint(15, 80))
        image = Image.open(content).convert("RGB")
    return image


# ---- Referring expressions -------------------------------------------------------------------------

ADJECTIVES = {"large": "size", "small": "size"} | dict.fromkeys(COLORS, "color")  # what each describes


@cache
def kind_words(stickers: Stickers | None) -> dict[str, str]:
    """{"cup": "cup", "cups": "cup", ...}: the words for the kinds of this world."""
    kinds = [*KINDS, *drawn.OTHER_KINDS, *(stickers.kinds if stickers else []), ANYTHING]
    return {word: kind for kind in kinds for word in (kind, plural(kind))}


def read_words(words: str, stickers: Stickers | None = None) -> tuple[int | None, dict[str, str]] | None:
    """ "two large red cups" -> (2, {"size": "large", "color": "red", "kind": "cup"}), or None."""
    number = None
    meaning: dict[str, str] = {}
    rest = words.split()
    while rest:
        kind = kind_words(stickers).get(" ".join(rest))  # such as "palm trees"
        if kind is not None:
            return number, {**meaning, "kind": kind}
        word = rest.pop(0)
        slot = ADJECTIVES.get(word)
        if word in NUMBERS:
            number = NUMBERS.index(word)
        elif slot is not None and slot not in meaning:
            meaning[slot] = word
        elif word not in ("the", "a", "an"):
            return None
    return None


def resolve(expression: str, scene: Scene) -> list[Thing] | None:
    """The things an expression fits, found by rules; None if it is not an expression or cannot be
    decided. "the large red cup", "a star", "the two blue squares", "the star left of the blue
    square"."""
    words = expression.lower().strip(" .")
    anchor = None
    match = re.search(f" ({'|'.join(SIDES)}) ", words)
    if match is not None:
        anchors = resolve(words[match.end() :], scene)
        if not anchors or len(anchors) != 1:
            return None
        anchor = anchors[0]
        words = words[: match.start()]
    understood = read_words(words, scene.stickers)
    if understood is None:
        return None
    number, meaning = understood
    found = scene.find(**meaning)
    if anchor is not None:
        side = match.group(1)
        sides = [(thing, thing.side_of(side, anchor)) for thing in found if thing is not anchor]
        if any(answer is None for _, answer in sides):
            return None
        found = [thing for thing, answer in sides if answer]
    return found if number in (None, len(found)) else None


def names(target: Thing, scene: Scene) -> list[str]:
    """What identifies a thing by its appearance, shortest first: "the star", "the small red star"."""
    words = [target.kind]
    if target.color is not None:
        words.append(target.name)
    if target.size_word is not None:
        words.append(f"{target.size_word} {target.name}")
    return [f"the {w}" for w in words if resolve(f"the {w}", scene) == [target]]


def relations(target: Thing, scene: Scene, rng: random.Random) -> Iterator[str]:
    """What identifies a thing by its position, in random order: "the star left of the red cup"."""
    heads = dict.fromkeys([target.kind, ANYTHING, target.name])
    others = [thing for thing in scene.things if thing is not target]
    anchors = [thing for thing in others if len(scene.find(thing.kind, thing.color)) == 1]
    choices = [(anchor, side, head) for anchor in anchors for side in SIDES for head in heads]
    for anchor, side, head in rng.sample(choices, len(choices)):
        expression = f"the {head} {side} the {anchor.name}"
        if target.side_of(side, anchor) and resolve(expression, scene) == [target]:
            yield expression


def listed(caption: str) -> list[str]:
    """The phrases of a caption: "An image of a cup and two stars." -> ["a cup", "two stars"]."""
    caption = re.sub(r"^\s*(An image of|There is) ", "", caption.strip()).removesuffix(".")
    parts = re.split(r", | and | next to | above | below | left of ", caption)
    return [re.split(r" (?:at|in|on) the ", part)[0].strip() for part in parts]


# ---- Tasks -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A prompt of the paper and its answer, both tagged text."""

    task: str
    prompt: str
    answer: str
    targets: tuple[Thing, ...] = ()  # the things that the boxes of the answer, or of the prompt, belong to
    second: "Scene | None" = None  # the other image, shown where the prompt has <image>
    alone: bool = False  # a sequence without an image


def cells(box: Box, grid: int = GRID) -> tuple[int, int]:
    """The location indices of a box as the original data loader chose them. `tokenizer.box_to_tokens`
    differs: there, a bottom-right coordinate exactly on a cell boundary is assigned to the inner cell,
    here to the outer one."""
    x1, y1, x2, y2 = clip_box(box)
    left = math.floor(x1 * grid)
    top = math.floor(y1 * grid)
    right = max(left, math.floor(min(x2, 0.99999) * grid))
    bottom = max(top, math.floor(min(y2, 0.99999) * grid))
    return top * grid + left, bottom * grid + right


def objects_text(boxes: list[Box], grid: int = GRID) -> str:
    """Boxes as `<object>…</object>`."""
    return boxes_to_text([cells(box, grid) for box in boxes], grid)


def objects(things) -> str:
    """The boxes of some things as `<object>…</object>`."""
    return objects_text([thing.box for thing in things])


def link(phrase: str, things) -> str:
    """`<phrase> words</phrase><object>…</object>` with the boxes of these things."""
    return f"<phrase> {phrase}</phrase>{objects(things)}"


def linked_caption(scene: Scene, detailed: bool = False) -> str:
    """The caption of a scene with a link for every phrase."""
    text = "There is" if detailed else "An image of"
    groups = [[thing] for thing in scene.things] if detailed else scene.groups()
    for i, group in enumerate(groups):
        words = described(group[0]) if detailed else counted(group)
        text += joint(groups, i, detailed) + link(words, group)
        if detailed:
            text += f" {group[0].place}"
    return text + "." if groups else text + " nothing."


def captions(scene: Scene) -> list[Example]:
    """Brief and detailed, grounded and plain."""
    brief = linked_caption(scene)
    detailed = linked_caption(scene, detailed=True)
    start = PROMPTS["plain"]
    describe = PROMPTS["detail"].removeprefix("<grounding>")
    return [
        Example("caption", PROMPTS["caption"], brief.removeprefix(start), scene.things),
        Example("detail", PROMPTS["detail"], f" {detailed}", scene.things),
        Example("plain caption", start, strip_tags(brief).removeprefix(start), scene.things),
        Example("plain detail", describe, f" {strip_tags(detailed)}", scene.things),
    ]


def ground_prompt(phrase: str) -> str:
    return PROMPTS["ground"].replace("{text}", phrase)


def grounding(scene: Scene, rng: random.Random) -> list[Example]:
    """A phrase of the caption in the prompt, its boxes in the answer. A phrase for something that is not
    in the scene gets a random box, so the model learns to spread its probability."""
    found = []
    for group in scene.groups():
        phrases = [counted(group)]
        if len(group) > 1:
            phrases.append(f"the {counted(group)}")
        task = "ground" if len(group) == 1 else "ground several"
        for phrase in phrases:
            found.append(Example(task, ground_prompt(phrase), objects(group), tuple(group)))
    absent = random_name(rng, scene)
    if not resolve(absent, scene):
        x1, x2 = sorted([rng.random(), rng.random()])
        y1, y2 = sorted([rng.random(), rng.random()])
        box = (x1, y1, min(1, x2 + 0.01), min(1, y2 + 0.01))
        prompt = ground_prompt(f"{article(absent)} {absent}")
        found.append(Example("ground absent", prompt, objects_text([box])))
    return found


def random_name(rng: random.Random, scene: Scene) -> str:
    """The name of any thing of the scene's world: "red cup", "snowman"."""
    kind = rng.choice(scene.kinds)
    sticker = scene.stickers is not None and kind in scene.stickers.kinds and rng.random() < 0.6
    if kind in UNCOLORED or kind not in KINDS or sticker:
        return kind
    return f"{rng.choice(list(COLORS))} {kind}"


def referring(scene: Scene, rng: random.Random) -> list[Example]:
    """Referring expressions to boxes (comprehension), and boxes to expressions (generation)."""
    found = []
    for thing in scene.things:
        by_appearance = names(thing, scene)
        by_position = list(islice(relations(thing, scene, rng), 2))
        for task, expressions in (("refer", by_appearance), ("refer relation", by_position)):
            for words in expressions:
                found.append(Example(task, ground_prompt(words), objects([thing]), (thing,)))
        full_names = [words for words in by_appearance if thing.name in words]
        for words in (full_names or by_position)[:1]:
            prompt = f"<grounding>{link('It', [thing])} is"
            found.append(Example("describe box", prompt, f" {words}.", (thing,)))
    return found


def ask(task: str, question: str, answer: str, grounded: str, targets) -> list[Example]:
    """A question twice: plain (the answer in a word) and grounded (with boxes)."""
    plain = PROMPTS["answer"].replace("{text}", question)
    prompt = PROMPTS["vqa"].replace("{text}", question)
    with_boxes = Example(f"{task} grounded", prompt, f" {grounded}", tuple(targets))
    return [Example(task, plain, f" {answer}"), with_boxes]


def questions(scene: Scene, rng: random.Random) -> list[Example]:
    """Visual question answering about single things."""
    found = []
    for thing in scene.things:
        a_name = f"{article(thing.name)} {thing.name}"
        the_name = f"the {thing.name}"
        if thing.color and len(scene.find(thing.kind)) == 1:
            question = f"What color is the {thing.kind}?"
            grounded = f"{link(f'the {thing.kind}', [thing])} is {thing.color}."
            found += ask("color", question, thing.color, grounded, [thing])
        if thing.color and not scene.has_stickers and len(scene.find(ANYTHING, thing.color)) == 1:
            question = f"Which thing is {thing.color}?"
            found += ask("kind", question, thing.kind, f"{link(a_name, [thing])}.", [thing])
        if len(scene.find(thing.kind, thing.color)) == 1:
            if thing.clear_place:
                grounded = f"{link(the_name, [thing])} is {thing.place}."
                found += ask("where", f"Where is {the_name}?", thing.place, grounded, [thing])
            for side in SIDES:
                others = [other for other in scene.things if other is not thing]
                answers = [other.side_of(side, thing) for other in others]
                if answers.count(True) == 1 and None not in answers:
                    there = others[answers.index(True)]
                    name = f"{article(there.name)} {there.name}"
                    question = f"What is {side} {the_name}?"
                    found += ask("relation", question, name, f"{link(name, [there])}.", [there])
        it = link("it", [thing])
        if thing.color:
            prompt = PROMPTS["vqa"].replace("{text}", f"What color is{it}?")
            found.append(Example("color of box", prompt, f" {thing.color}"))
        prompt = PROMPTS["vqa"].replace("{text}", f"What is{it}?")
        found.append(Example("kind in box", prompt, f" {a_name}"))
    return found


def counting(scene: Scene, rng: random.Random) -> list[Example]:
    """How many there are of a kind or a color, and whether there is one at all. (Stickers may have any
    color, so in scenes with stickers, questions name a color only together with a kind.)"""
    found = []
    color = rng.choice(list(COLORS))
    kind = rng.choice(scene.kinds)
    choices: list[tuple[str, str | None]] = [(ANYTHING, None), (ANYTHING, color), (kind, None)]
    if scene.things:
        some = rng.choice(scene.things)
        choices += [(some.kind, None), (some.kind, some.color), (ANYTHING, some.color)]
    for kind, color in dict.fromkeys(choices):
        if scene.has_stickers and kind == ANYTHING and color is not None:
            continue
        group = scene.find(kind, color)
        prefix = "" if color is None else f"{color} "
        number = NUMBERS[len(group)]
        noun = kind if len(group) == 1 else plural(kind)
        grounded = f"{link(f'{number} {prefix}{noun}', group)}." if group else f"{number}."
        found += ask("count", f"How many {prefix}{plural(kind)} are there?", number, grounded, group)
    present = [rng.choice(scene.things).name] if scene.things else []
    for name in [*present, random_name(rng, scene)]:
        _, meaning = read_words(name, scene.stickers)
        group = scene.find(**meaning)
        question = f"Is there {article(name)} {name}?"
        if group:
            words = amount(len(group), name, meaning["kind"])
            found += ask("yes or no", question, "yes", f"yes,{link(words, group)}.", group)
        else:
            found += ask("yes or no", question, "no", "no.", group)
    return found


def in_context(scene: Scene, rng: random.Random) -> list[Example]:
    """Two images in one prompt: the sentence about a box of the first shows what to say about a box of
    the second: the color, the kind or the place of the thing in the box."""
    second = Scene.random(scene.seed + SECOND, scene.stickers)
    if not scene.things or not second.things:
        return []
    found = []
    for say in (lambda t: t.color, lambda t: f"{article(t.kind)} {t.kind}", lambda t: t.clear_place):
        shown = rng.choice(scene.things)
        asked = rng.choice(second.things)
        if say(shown) and say(asked):
            prompt = f"<grounding>{link('It', [shown])} is {say(shown)}."
            prompt += f"<image><grounding>{link('It', [asked])} is"
            found.append(Example("example of a box", prompt, f" {say(asked)}.", (asked,), second))
    return found


def unseen(scene: Scene) -> Example:
    """Text alone: the beginning of the caption, without the image. Any ending that makes a caption is
    correct."""
    words = scene.record()["caption"].split(" ")
    cut = 3 + scene.seed % (len(words) - 3)
    return Example("text alone", " ".join(words[:cut]), " " + " ".join(words[cut:]), alone=True)


def is_caption(text: str, stickers: Stickers | None = None) -> bool:
    """Whether some scene has this brief caption, with every article, plural and comma in place."""
    if text == "An image of nothing.":
        return True
    phrases = listed(text)
    groups = []
    for phrase in phrases:
        understood = read_words(phrase, stickers)
        if understood is None:
            return False
        number, meaning = understood
        kind, color = meaning["kind"], meaning.get("color")
        is_sticker = stickers is not None and kind in stickers.kinds
        fits = (is_sticker or kind not in SHAPES) if color is None else kind in SHAPES | drawn.COLORED
        if kind == ANYTHING or number in (0, 1) or not fits:
            return False
        group = [Thing(kind, color, (0, 0), 0)] * (number or 1)
        if phrase != counted(group):
            return False
        groups.append(group)
    names_used = {group[0].name for group in groups}
    # A kind is all drawings or all stickers.
    forms = {(group[0].kind, group[0].color is None) for group in groups}
    if len(names_used) < len(groups) or len(forms) > len(dict(forms)) or sum(map(len, groups)) > MOST:
        return False
    joints = [" and "]
    if len(groups) == 2 and len(groups[0]) == len(groups[1]) == 1:  # they are joined by their relation
        joints = [" next to ", " above ", " below ", " left of "]
    first = ", ".join(phrases[:-1])
    last = phrases[-1]
    return text in [f"An image of {first}{joint if first else ''}{last}." for joint in joints]


def tasks(scene: Scene, rng: random.Random, two_images: bool = True) -> list[Example]:
    """All examples of a scene, including the one without an image. Those with two images need another scene."""
    found = [*captions(scene), unseen(scene)]
    for make in (grounding, referring, questions, counting):
        found += make(scene, rng)
    return found + in_context(scene, rng) if two_images else found


def main(argv=None) -> int:
    parser = CommandParser("training.scenes", "Write random scenes and their GRIT records.")
    parser.add_argument("folder", type=Path, help="where to write the PNGs and grit.jsonl")
    parser.add_argument("--count", type=int, default=9, help="number of scenes (default: 9)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first scene (default: 0)")
    parser.add_argument("--stickers", type=Path, metavar="DIR", help="mix in these stickers")
    args = parser.parse_args(argv)
    try:
        stickers = Stickers(args.stickers) if args.stickers else None
        args.folder.mkdir(parents=True, exist_ok=True)
        with open(args.folder / "grit.jsonl", "w", encoding="utf-8") as lines:
            for seed in range(args.seed, args.seed + args.count):
                scene = Scene.random(seed, stickers)
                scene.draw().save(args.folder / f"{seed}.png")
                lines.write(json.dumps({"image": f"{seed}.png", **scene.record()}) + "\n")
    except (OSError, ValueError) as error:
        return report_error("scenes", error)
    print(f"wrote {args.count} scenes to {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("scenes", main))
