"""Random pictures of coloured shapes, and everything that can truthfully be said about them.

The world the bundled model lives in: one to five shapes on a soft background, none covering another.
`Scene.random` makes one, `Scene.draw` paints it with Pillow, `Scene.record` describes it as GRIT does
(caption, noun chunks, referring expressions, boxes), and `tasks` asks about it in the prompts of the
paper, each with its one right answer.

    python tiny/scenes.py FOLDER [--count 9] [--seed 0]    writes pictures and grit.jsonl to look at
"""

import argparse
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 48, 49),
    "orange": (240, 138, 36),
    "yellow": (247, 214, 60),
    "green": (46, 158, 76),
    "blue": (44, 98, 204),
    "purple": (134, 66, 176),
    "black": (36, 36, 40),
    "white": (250, 250, 250),
}
BACKGROUNDS = [(196, 214, 226), (222, 206, 186), (205, 219, 196), (216, 202, 222), (204, 204, 204), (178, 190, 204)]
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
LARGE, SMALL = 0.30, 0.24  # of the picture's side: what lies between has no size word
SECOND = 50_000_000  # from a scene's seed to that of the other picture in its two-picture prompts
MARGIN = 0.10  # two centres closer than this along an axis are neither left nor right, above nor below


def regular(points: int, radius: float = 1.0, inner: float | None = None, turn: float = -90.0):
    """A regular polygon, or a star with an inner radius, around 0, 0."""
    count = points * (2 if inner else 1)
    radii = [radius, inner] if inner else [radius]
    angles = [math.radians(turn + 360 * i / count) for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def heart():
    """The classic curve x = 16 sin³ t."""
    ts = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)))
        for t in ts
    ]


def moon():
    """A crescent, open to the right."""
    outer = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in range(45, 316, 6)]
    inner = [(0.45 + 0.75 * math.cos(math.radians(a)), 0.75 * math.sin(math.radians(a))) for a in range(290, 69, -6)]
    return outer + inner


OUTLINES = {
    "circle": regular(60),
    "square": regular(4, turn=45),
    "triangle": regular(3),
    "star": regular(5, inner=0.45),
    "heart": heart(),
    "cross": [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)],
    "diamond": [(0, -1.3), (0.85, 0), (0, 1.3), (-0.85, 0)],
    "moon": moon(),
}  # fmt: skip
SHAPES = list(OUTLINES)


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


@dataclass(frozen=True)
class Shape:
    """One shape; center and size in 0..1 of the picture, size along the longer side of its box."""

    shape: str
    color: str
    center: tuple[float, float]
    size: float

    @cached_property
    def outline(self) -> list[tuple[float, float]]:
        """Its corners, in 0..1 of the picture."""
        xs, ys = zip(*OUTLINES[self.shape], strict=True)
        scale = self.size / max(max(xs) - min(xs), max(ys) - min(ys))
        mx, my = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
        cx, cy = self.center
        return [(cx + (x - mx) * scale, cy + (y - my) * scale) for x, y in zip(xs, ys, strict=True)]

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        xs, ys = zip(*self.outline, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def size_word(self) -> str | None:
        return "large" if self.size >= LARGE else "small" if self.size <= SMALL else None

    @property
    def place(self) -> str | None:
        """Which ninth of the picture its center is in; None too close to a border to say."""
        if any(abs(c - border) < 0.03 for c in self.center for border in (1 / 3, 2 / 3)):
            return None
        return nearest_place(self)

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    def is_a(self, shape: str, color: str | None = None, size: str | None = None) -> bool:
        return shape in (self.shape, "shape") and color in (self.color, None) and size in (self.size_word, None)

    def side_of(self, side: str, other: "Shape") -> bool | None:
        """Whether it is left of (right of, above, below) another; None if too close to say."""
        dx, dy = SIDES[side]
        distance = dx * (self.center[0] - other.center[0]) + dy * (self.center[1] - other.center[1])
        return None if abs(distance) < MARGIN else distance > 0


@dataclass(frozen=True)
class Scene:
    """A picture before it is painted: its shapes from left to right, and its background."""

    shapes: tuple[Shape, ...]
    background: tuple[int, int, int]
    seed: int

    @classmethod
    def random(cls, seed: int, most: int = 5) -> "Scene":
        """The scene of this seed, of one to `most` shapes; about one in four repeats a kind."""
        rng = random.Random(seed)
        shapes: list[Shape] = []
        for _ in range(rng.randint(1, most)):
            shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
            if shapes and rng.random() < 0.35:  # resemble an earlier one, so that words must be chosen with care
                twin = rng.choice(shapes)
                shape, color = rng.choice([(twin.shape, twin.color), (twin.shape, color), (shape, twin.color)])
            for _ in range(40):  # look for a free place; a full picture gets one shape fewer
                size = rng.uniform(0.17, 0.40)
                room = size / 2 + 0.02
                new = Shape(shape, color, (rng.uniform(room, 1 - room), rng.uniform(room, 1 - room)), size)
                if not any(overlap(new.box, other.box) for other in shapes):
                    shapes.append(new)
                    break
        shapes.sort(key=lambda s: s.center[0])
        return cls(tuple(shapes), rng.choice(BACKGROUNDS), seed)

    def draw(self, size: int = 224) -> Image.Image:
        """The picture, size x size, its colours a little different from scene to scene."""
        rng = random.Random(self.seed)

        def shade(color, by):
            light = rng.uniform(-by, by)
            return tuple(min(255, max(0, round(c + light + rng.uniform(-by, by) / 2))) for c in color)

        image = Image.new("RGB", (size, size), shade(self.background, 14))
        pen = ImageDraw.Draw(image)
        for shape in self.shapes:
            fill = shade(COLORS[shape.color], 12)
            corners = [(x * size, y * size) for x, y in shape.outline]
            pen.polygon(corners, fill=fill)
            edge = tuple(round(c * 0.72) for c in fill)
            pen.line([*corners, *corners[:2]], fill=edge, width=max(1, round(size / 110)), joint="curve")
        return image

    def find(self, shape: str, color: str | None = None, size: str | None = None) -> list[Shape]:
        return [s for s in self.shapes if s.is_a(shape, color, size)]

    def kinds(self) -> list[list[Shape]]:
        """Shapes of one colour and outline together, in the order of their leftmost."""
        groups: dict[str, list[Shape]] = {}
        for shape in self.shapes:
            groups.setdefault(shape.name, []).append(shape)
        return list(groups.values())

    def record(self, detailed: bool = False) -> dict:
        """The scene as a GRIT record; `shapes` is our own addition, the truth to check against.

        Brief: "An image of a red circle and two blue stars." Detailed: a sentence with every shape's place.
        """
        rows: list[list] = []
        caption = "There is" if detailed else "An image of"
        groups = [[s] for s in self.shapes] if detailed else self.kinds()
        for i, group in enumerate(groups):
            joint = "" if i == 0 else " and" if i == len(groups) - 1 else ","
            start = len(caption + joint) + 1
            caption += joint + " " + (described(group[0]) if detailed else counted(group))
            end = len(caption)
            if detailed:
                caption += f" at the {nearest_place(group[0])}"
            rows += [[start, end, *s.box, 1.0] for s in group]
        return {
            "caption": caption + ".",
            "noun_chunks": rows,
            "ref_exps": [list(row) for row in rows],
            "shapes": [{"shape": s.shape, "color": s.color, "box": s.box} for s in self.shapes],
        }


def overlap(a, b, gap: float = 0.01) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def counted(group: list[Shape]) -> str:
    """"a red circle", "an orange star", "two blue squares"."""
    one = group[0]
    if len(group) > 1:
        return f"{NUMBERS[len(group)]} {one.color} {plural(one.shape)}"
    return f"{article(one.name)} {one.name}"


def described(shape: Shape) -> str:
    words = " ".join(w for w in (shape.size_word, shape.name) if w)
    return f"{article(words)} {words}"


def article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def nearest_place(shape: Shape) -> str:
    """The ninth of the picture that a shape's center is in, however close to a border."""
    x, y = (min(int(c * 3), 2) for c in shape.center)
    return " ".join(w for w in (("top", "", "bottom")[y], ("left", "", "right")[x]) if w) or "middle"


# ----------------------------------------------------------------------------------------------------
# Referring expressions
# ----------------------------------------------------------------------------------------------------


MEANINGS = {
    **{word: ("shape", one) for one in [*SHAPES, "shape"] for word in (one, plural(one))},
    **{word: ("color", word) for word in COLORS},
    **{word: ("size", word) for word in ("large", "small")},
}


def resolve(expression: str, scene: Scene) -> list[Shape] | None:
    """The rule-based reader: the shapes an expression fits, None if it is not one or cannot be decided.

    "the large red circle", "a star", "the two blue squares", "the star left of the blue square".
    """
    words, side, anchor = expression.lower().strip(" ."), None, None
    for name in SIDES:
        if f" {name} " in words:
            words, _, rest = words.partition(f" {name} ")
            anchors = resolve(rest, scene)
            if not anchors or len(anchors) != 1:
                return None
            side, anchor = name, anchors[0]
    meaning: dict[str, str] = {}
    number = None
    for word in words.split():
        slot, single = MEANINGS.get(word, (None, word))
        if word in NUMBERS:
            number = NUMBERS.index(word)
        elif slot and slot not in meaning:
            meaning[slot] = single
        elif word not in ("the", "a", "an"):
            return None
    if "shape" not in meaning:
        return None
    found = scene.find(**meaning)
    if anchor is not None:
        sides = [(s, s.side_of(side, anchor)) for s in found if s is not anchor]
        if any(answer is None for _, answer in sides):
            return None
        found = [s for s, answer in sides if answer]
    return found if number in (None, len(found)) else None


def names(target: Shape, scene: Scene) -> list[str]:
    """What singles a shape out by its own looks, shortest first: "the star", "the small red star"."""
    words = [target.shape, target.name, *([f"{target.size_word} {target.name}"] if target.size_word else [])]
    return [f"the {w}" for w in words if resolve(f"the {w}", scene) == [target]]


def relations(target: Shape, scene: Scene, rng: random.Random) -> Iterator[str]:
    """What singles a shape out by its place to another, in random order: "the star left of the red circle"."""
    anchors = [s for s in scene.shapes if s is not target and len(scene.find(s.shape, s.color)) == 1]
    ways = [(anchor, side, head) for anchor in anchors for side in SIDES for head in (target.shape, "shape", target.name)]
    for anchor, side, head in rng.sample(ways, len(ways)):
        name = f"the {head} {side} the {anchor.name}"
        if target.side_of(side, anchor) and resolve(name, scene) == [target]:
            yield name


# ----------------------------------------------------------------------------------------------------
# Tasks
# ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A prompt of the paper and its answer, both tagged text; boxes in `link` form."""

    task: str
    prompt: str
    answer: str
    targets: tuple[Shape, ...] = ()  # what the boxes of the answer, or of the prompt, belong to
    second: "Scene | None" = None  # shown where the prompt says <image>
    alone: bool = False  # no picture at all


def link(phrase: str, shapes, brackets: bool = True) -> str:
    """`<phrase> words</phrase><object>…</object>` with the boxes of these shapes."""
    from tokenizer import boxes_to_text

    return (f"<phrase> {phrase}</phrase>" if brackets else "") + boxes_to_text([s.box for s in shapes], training=True)


def captions(scene: Scene) -> list[Example]:
    """Brief and detailed, grounded and plain."""
    from tokenizer import grit_to_text, plain

    brief, detailed = grit_to_text(scene.record()), grit_to_text(scene.record(detailed=True))
    start = "<grounding>An image of"
    describe = "Describe this image in detail:"
    return [
        Example("caption", start, brief.removeprefix(start), scene.shapes),
        Example("detail", f"<grounding>{describe}", " " + detailed.removeprefix("<grounding>"), scene.shapes),
        Example("plain caption", "An image of", plain(brief).removeprefix("An image of")),
        Example("plain detail", describe, " " + plain(detailed)),
    ]


def grounding(scene: Scene) -> list[Example]:
    """A phrase in the prompt, its boxes in the answer: every kind of shape by its caption's words."""
    found = []
    for group in scene.kinds():
        for phrase in [counted(group)] + ([f"the {counted(group)}"] if len(group) > 1 else []):
            task = "ground" if len(group) == 1 else "ground several"
            found.append(Example(task, f"<grounding><phrase> {phrase}</phrase>", link("", group, False), tuple(group)))
    return found


def referring(scene: Scene, rng: random.Random) -> list[Example]:
    """Referring expressions to boxes (comprehension), and boxes to expressions (generation)."""
    found = []
    for shape in scene.shapes:
        own, related = names(shape, scene), list(islice(relations(shape, scene, rng), 2))
        for task, expressions in (("refer", own), ("refer relation", related)):
            for words in expressions:
                prompt = f"<grounding><phrase> {words}</phrase>"
                found.append(Example(task, prompt, link("", [shape], False), (shape,)))
        plain_names = [words for words in own if shape.color in words]
        for words in (plain_names or related)[:1]:
            found.append(Example("describe box", f"<grounding>{link('It', [shape])} is", f" {words}.", (shape,)))
    return found


def questions(scene: Scene, rng: random.Random) -> list[Example]:
    """Visual question answering, each question plain (the answer in a word) and grounded (with boxes)."""
    found = []

    def ask(task, question, answer, grounded, targets):
        prompt = f"Question: {question} Answer:"
        found.append(Example(task, prompt, f" {answer}"))
        found.append(Example(f"{task} grounded", f"<grounding> {prompt}", f" {grounded}", tuple(targets)))

    for s in scene.shapes:
        a_name, the_name = f"{article(s.name)} {s.name}", f"the {s.name}"
        if len(scene.find(s.shape)) == 1:
            the_shape = link(f"the {s.shape}", [s])
            ask("color", f"What color is the {s.shape}?", s.color, f"{the_shape} is {s.color}.", [s])
        if len(scene.find("shape", s.color)) == 1:
            ask("shape", f"What shape is {s.color}?", s.shape, f"{link(a_name, [s])}.", [s])
        if len(scene.find(s.shape, s.color)) == 1:
            if s.place:
                ask("where", f"Where is {the_name}?", s.place, f"{link(the_name, [s])} is at the {s.place}.", [s])
            for side in SIDES:
                answers = [(o, o.side_of(side, s)) for o in scene.shapes if o is not s]
                there = [o for o, answer in answers if answer]
                if len(there) == 1 and not any(answer is None for _, answer in answers):
                    name = f"{article(there[0].name)} {there[0].name}"
                    ask("relation", f"What is {side} {the_name}?", name, f"{link(name, there)}.", there)
        for task, question, answer in (("color of box", "What color is", s.color), ("shape in box", "What is", a_name)):
            prompt = f"<grounding> Question: {question}{link('it', [s])}? Answer:"
            found.append(Example(task, prompt, f" {answer}"))
    some, color, shape = rng.choice(scene.shapes), rng.choice(list(COLORS)), rng.choice(SHAPES)
    counts = [("shape", None), ("shape", some.color), (some.shape, None), ("shape", color), (shape, None)]
    for kind, hue in counts:
        group = scene.find(kind, hue)
        one, many = (" ".join(w for w in (hue, word) if w) for word in (kind, plural(kind)))
        number = NUMBERS[len(group)]
        grounded = f"{link(f'{number} {one if len(group) == 1 else many}', group)}." if group else f"{number}."
        ask("count", f"How many {many} are there?", number, grounded, group)
    for kind, hue in ((some.shape, some.color), rng.choice([(some.shape, color), (shape, some.color), (shape, color)])):
        group, name = scene.find(kind, hue), f"{hue} {kind}"
        grounded = f"yes,{link(counted(group), group)}." if group else "no."
        ask("yes or no", f"Is there {article(name)} {name}?", "yes" if group else "no", grounded, group)
    return found


def in_context(scene: Scene, rng: random.Random) -> list[Example]:
    """Two pictures in one prompt: what is said about the first is the only hint at what to say about the second.

    Of a box: its color, its shape or its place. Of a picture: the colors or the shapes in it, or their number.
    """
    second = Scene.random(scene.seed + SECOND)
    found = []
    for say in (lambda s: s.color, lambda s: f"{article(s.shape)} {s.shape}", lambda s: s.place and f"at the {s.place}"):
        shown, asked = rng.choice(scene.shapes), rng.choice(second.shapes)
        if say(shown) and say(asked):
            it = f"{link('It', [shown])} is {say(shown)}.<image><grounding>{link('It', [asked])} is"
            found.append(Example("example of a box", f"<grounding>{it}", f" {say(asked)}.", (asked,), second))
    for say in (lambda s: s.color, lambda s: s.shape, None):
        told = [
            f" {', '.join(map(say, one.shapes))}." if say else f" {NUMBERS[len(one.shapes)]}." for one in (scene, second)
        ]
        found.append(Example("example of a picture", f"{told[0]}<image>", told[1], (), second))
    return found


def unseen(scene: Scene) -> Example:
    """Text alone: the beginning of the caption, without the picture. Any ending is right that makes a caption."""
    words = scene.record()["caption"].split(" ")
    cut = 4 + scene.seed % (len(words) - 4)
    return Example("text alone", " ".join(words[:cut]), "".join(f" {word}" for word in words[cut:]), alone=True)


def is_caption(text: str) -> bool:
    """Whether some scene has this brief caption, with every article, plural and comma in its place."""
    counts = {counted([Shape(s, c, (0, 0), 0)] * n): (c, s) for c in COLORS for s in SHAPES for n in range(1, 6)}
    parts = re.split(", | and ", text.removeprefix("An image of ").removesuffix("."))
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    kinds = {counts.get(part) for part in parts} - {None}
    return len(kinds) == len(parts) and text == f"An image of {listed}."


def tasks(scene: Scene, rng: random.Random) -> list[Example]:
    """Everything that can be asked about a scene, and what can be said without it."""
    about = captions(scene) + grounding(scene) + referring(scene, rng) + questions(scene, rng)
    return [*about, *in_context(scene, rng), unseen(scene)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write random scenes and their GRIT records, to look at.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    with open(args.folder / "grit.jsonl", "w") as lines:
        for seed in range(args.seed, args.seed + args.count):
            scene = Scene.random(seed)
            scene.draw(896).resize((448, 448)).save(args.folder / f"{seed}.png")
            print(json.dumps({"image": f"{seed}.png", **scene.record()}), file=lines)
    print(f"wrote {args.count} scenes to {args.folder}")
