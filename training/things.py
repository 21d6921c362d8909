"""Drawings of shapes and things. A drawing is a list of colored polygons, so its exact bounding box
is known.

Coordinates have y pointing down and any scale: scenes.py scales and moves each drawing. A drawing
function takes `vary`, which returns its argument multiplied by a random factor near 1, so no two
drawings are quite the same.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

Point = tuple[float, float]
Color = tuple[int, int, int]
Vary = Callable[[float], float]

BODY = "body"  # the thing's own color
SHADE = "shade"  # a darker version of it

BLACK = (40, 40, 44)
WHITE = (248, 248, 248)
BROWN = (124, 82, 48)
GREEN = (52, 150, 76)
ORANGE = (242, 140, 40)
YELLOW = (252, 212, 60)
RED = (212, 52, 48)
SKY = (176, 216, 240)


class Part(NamedTuple):
    """One polygon of a drawing and its color: an RGB triple, BODY or SHADE."""

    points: list[Point]
    color: Color | str = BODY


def ellipse(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> list[Point]:
    """The arc of an ellipse around (x, y), in degrees clockwise from the right."""
    steps = max(8, round(abs(stop - start) / 10))
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def discs(radius: float, color: Color, *centers: Point) -> list[Part]:
    return [Part(ellipse(x, y, radius, radius), color) for x, y in centers]


def rectangle(x1: float, y1: float, x2: float, y2: float) -> list[Point]:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


# ---- Shapes ----------------------------------------------------------------------------------------


def circle(vary: Vary) -> list[Part]:
    return [Part(ellipse(0, 0, 1, 1))]


def square(vary: Vary) -> list[Part]:
    return [Part(rectangle(-1, -1, 1, 1))]


def triangle(vary: Vary) -> list[Part]:
    return [Part([(0, vary(-1.6)), (1, 0), (-1, 0)])]


def star(vary: Vary) -> list[Part]:
    inner = vary(0.42)
    points = []
    for i in range(10):
        radius = 1 if i % 2 == 0 else inner
        angle = math.radians(36 * i - 90)
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return [Part(points)]


def heart(vary: Vary) -> list[Part]:
    """The curve x = 16 sin³ t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((16 * math.sin(t) ** 3, -y))
    return [Part(points)]


def cross(vary: Vary) -> list[Part]:
    a = vary(0.34)
    corners = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1)]
    return [Part([*corners, (-a, a), (-1, a), (-1, -a), (-a, -a)])]


def diamond(vary: Vary) -> list[Part]:
    x = vary(0.65)
    return [Part([(0, -1), (x, 0), (0, 1), (-x, 0)])]


def moon(vary: Vary) -> list[Part]:
    """A crescent, open to the right."""
    return [Part(ellipse(0, 0, 1, 1, 45, 315) + ellipse(0.45, 0, 0.75, 0.75, 290, 70))]


# ---- Things with colors of their own ---------------------------------------------------------------


def snowman(vary: Vary) -> list[Part]:
    head = -0.62
    return [
        Part(ellipse(0, 0.55, vary(0.55), 0.48), WHITE),
        Part(ellipse(0, -0.08, vary(0.4), 0.38), WHITE),
        Part(ellipse(0, head, vary(0.29), 0.28), WHITE),
        Part(rectangle(-0.3, -0.42, 0.3, -0.32), RED),
        Part(rectangle(-0.2, -1.15, 0.2, -0.85), BLACK),
        Part(rectangle(-0.34, -0.88, 0.34, -0.8), BLACK),
        Part([(0, head), (vary(0.3), head + 0.08), (0, head + 0.12)], ORANGE),
        *discs(0.045, BLACK, (-0.1, head - 0.07), (0.1, head - 0.07)),
        *discs(0.05, BLACK, (0, -0.1), (0, 0.15)),
    ]


def fire(vary: Vary) -> list[Part]:
    left, top, right = vary(-0.35), vary(-1.0), vary(-0.45)
    outer = [(-0.6, 0.55), (-0.7, 0.1), (-0.48, left), (-0.3, 0), (0, top)]
    outer += [(0.25, -0.1), (0.5, right), (0.68, 0.15), (0.58, 0.55), (0, 0.7)]
    inner = [(-0.35, 0.55), (-0.38, 0.2), (-0.15, 0.1), (0.03, top * 0.5)]
    inner += [(0.2, 0.15), (0.4, 0.2), (0.34, 0.55), (0, 0.65)]
    return [
        Part([(-0.8, 0.6), (-0.75, 0.42), (0.8, 0.75), (0.75, 0.93)], BROWN),
        Part([(0.8, 0.6), (0.75, 0.42), (-0.8, 0.75), (-0.75, 0.93)], (98, 62, 36)),
        Part(outer, (236, 92, 32)),
        Part(inner, YELLOW),
    ]


def tree(vary: Vary) -> list[Part]:
    width = vary(0.62)
    trunk = Part(rectangle(-0.12, 0.3, 0.12, 1), BROWN)
    if vary(1) > 1:
        sizes = [(width, 0.6), (width * 0.8, 0.15), (width * 0.6, -0.3)]
        layers = [[(0, y - 0.65), (x, y), (-x, y)] for x, y in sizes]
    else:
        layers = [ellipse(x, y, width * 0.7, 0.42) for x, y in ((-0.3, 0.05), (0.3, 0.05), (0, -0.45))]
    return [trunk, *(Part(points, GREEN) for points in layers)]


def sun(vary: Vary) -> list[Part]:
    rays = 10
    length = vary(1.0)
    parts = []
    for i in range(rays):
        a = 2 * math.pi * i / rays
        x, y = math.cos(a), math.sin(a)
        base = [(0.5 * x - 0.16 * y, 0.5 * y + 0.16 * x), (0.5 * x + 0.16 * y, 0.5 * y - 0.16 * x)]
        parts.append(Part([*base, (length * x, length * y)], (255, 180, 30)))
    return [*parts, Part(ellipse(0, 0, 0.58, 0.58), YELLOW)]


def cloud(vary: Vary) -> list[Part]:
    color = (236, 240, 246)
    return [
        Part(ellipse(-0.55, 0.1, vary(0.42), 0.32), color),
        Part(ellipse(0.55, 0.12, vary(0.42), 0.3), color),
        Part(ellipse(-0.15, -0.15, vary(0.42), 0.4), color),
        Part(ellipse(0.28, -0.1, 0.36, vary(0.34)), color),
        Part(rectangle(-0.55, 0.1, 0.55, 0.42), color),
    ]


def mushroom(vary: Vary) -> list[Part]:
    cap = vary(0.75)
    return [
        Part([(-0.2, -0.05), (0.2, -0.05), (0.28, 0.75), (-0.28, 0.75)], (242, 228, 200)),
        Part(ellipse(0, 0, 0.85, cap, 180, 360), (206, 44, 40)),
        Part(ellipse(-0.4, -0.25, 0.12, 0.12), WHITE),
        Part(ellipse(0.05, -0.45, 0.14, 0.14), WHITE),
        Part(ellipse(0.45, -0.22, 0.11, 0.11), WHITE),
    ]


# ---- Things that come in every color ---------------------------------------------------------------


def house(vary: Vary) -> list[Part]:
    roof = vary(-0.75)
    return [
        Part(rectangle(0.35, roof + 0.05, 0.52, -0.1), BROWN),
        Part(rectangle(-0.7, -0.15, 0.7, 0.85)),
        Part([(-0.9, -0.1), (0, roof), (0.9, -0.1)], (140, 70, 50)),
        Part(rectangle(-0.15, 0.3, 0.15, 0.85), (96, 60, 40)),
        Part(rectangle(-0.55, 0.1, -0.27, 0.4), SKY),
        Part(rectangle(0.27, 0.1, 0.55, 0.4), SKY),
    ]


def car(vary: Vary) -> list[Part]:
    roof = vary(-0.5)
    return [
        Part([(-0.55, 0), (-0.35, roof), (0.3, roof), (0.58, 0)]),
        Part([(-0.42, -0.02), (-0.28, roof + 0.1), (-0.05, roof + 0.1), (-0.05, -0.02)], SKY),
        Part([(0.03, -0.02), (0.03, roof + 0.1), (0.25, roof + 0.1), (0.43, -0.02)], SKY),
        Part([(-1, 0), (0.8, 0), (1, 0.12), (1, 0.4), (-1, 0.4)]),
        *discs(0.22, BLACK, (-0.55, 0.4), (0.55, 0.4)),
        *discs(0.09, (190, 190, 190), (-0.55, 0.4), (0.55, 0.4)),
    ]


def boat(vary: Vary) -> list[Part]:
    top = vary(-1.0)
    return [
        Part(rectangle(-0.04, top, 0.04, 0.4), BROWN),
        Part([(0.1, top + 0.05), (0.1, 0.25), (0.75, 0.25)], WHITE),
        Part([(-0.1, top + 0.25), (-0.1, 0.25), (-0.55, 0.25)], (226, 226, 220)),
        Part([(-0.95, 0.35), (0.95, 0.35), (0.6, 0.85), (-0.6, 0.85)]),
    ]


def fish(vary: Vary) -> list[Part]:
    return [
        Part([(0.45, 0), (1, -0.42), (0.88, 0), (1, 0.42)]),
        Part([(-0.2, -0.3), (0.1, vary(-0.62)), (0.3, -0.25)], SHADE),
        Part(ellipse(-0.15, 0, 0.75, vary(0.42))),
        Part([(-0.05, 0.05), (0.2, 0.25), (-0.1, 0.28)], SHADE),
        Part(ellipse(-0.55, -0.1, 0.11, 0.11), WHITE),
        Part(ellipse(-0.57, -0.1, 0.06, 0.06), BLACK),
    ]


def bird(vary: Vary) -> list[Part]:
    return [
        Part([(0.4, 0.05), (1, vary(-0.2)), (0.95, 0.2)], SHADE),
        Part(rectangle(-0.12, 0.45, -0.06, 0.85), ORANGE),
        Part(rectangle(0.1, 0.45, 0.16, 0.85), ORANGE),
        Part([(-0.7, -0.5), (-1.05, -0.38), (-0.7, -0.3)], ORANGE),
        Part(ellipse(0, 0.15, 0.6, vary(0.4))),
        Part(ellipse(-0.5, -0.4, 0.3, 0.28)),
        Part(ellipse(0.12, 0.12, 0.34, 0.2), SHADE),
        Part(ellipse(-0.58, -0.46, 0.07, 0.07), BLACK),
    ]


def cat(vary: Vary) -> list[Part]:
    """A sitting cat: pointed ears, a tail that curls up."""
    ear = vary(-1.0)
    return [
        Part(ellipse(0.5, 0.45, 0.42, 0.45, -80, 90) + ellipse(0.5, 0.45, 0.26, 0.3, 90, -80)),
        Part(ellipse(0, 0.4, 0.5, vary(0.55))),
        Part([(-0.45, -0.3), (-0.42, ear), (-0.08, -0.62)]),
        Part([(0.45, -0.3), (0.42, ear), (0.08, -0.62)]),
        Part(ellipse(0, -0.32, 0.48, 0.4)),
        Part(ellipse(-0.18, -0.38, 0.08, 0.1), YELLOW),
        Part(ellipse(0.18, -0.38, 0.08, 0.1), YELLOW),
        Part(ellipse(-0.18, -0.38, 0.03, 0.09), BLACK),
        Part(ellipse(0.18, -0.38, 0.03, 0.09), BLACK),
        Part([(-0.07, -0.22), (0.07, -0.22), (0, -0.13)], (240, 150, 160)),
    ]


def dog(vary: Vary) -> list[Part]:
    """A standing dog, seen from the side: four legs, a hanging ear, a tail."""
    leg = vary(0.85)
    legs = [Part(rectangle(x, 0.1, x + 0.16, leg)) for x in (-0.5, -0.26, 0.3, 0.54)]
    return [
        *legs,
        Part([(0.6, -0.1), (0.95, vary(-0.55)), (1.02, -0.45), (0.7, 0.1)]),
        Part(rectangle(-0.55, -0.2, 0.72, 0.3)),
        Part([(-0.55, 0.1), (-0.62, -0.5), (-0.3, -0.5), (-0.2, -0.1)]),
        Part(ellipse(-0.6, -0.5, 0.32, 0.27)),
        Part(ellipse(-0.88, -0.4, 0.2, 0.15)),
        Part(ellipse(-0.42, -0.42, 0.12, 0.28), SHADE),
        Part(ellipse(-1.04, -0.44, 0.07, 0.07), BLACK),
        Part(ellipse(-0.7, -0.57, 0.06, 0.06), BLACK),
    ]


def cup(vary: Vary) -> list[Part]:
    return [
        Part(ellipse(0.5, 0, vary(0.42), 0.38, -90, 90) + ellipse(0.5, 0, 0.24, 0.22, 90, -90)),
        Part([(-0.65, -0.6), (0.65, -0.6), (0.5, 0.65), (-0.5, 0.65)]),
        Part(ellipse(0, -0.6, 0.65, 0.14), SHADE),
    ]


def hat(vary: Vary) -> list[Part]:
    top = vary(-0.8)
    return [
        Part(ellipse(0, 0.3, 1, 0.2)),
        Part([(-0.5, 0.3), (-0.55, top), (0.55, top), (0.5, 0.3)]),
        Part([(-0.51, 0.25), (-0.52, 0), (0.52, 0), (0.51, 0.25)], SHADE),
    ]


def balloon(vary: Vary) -> list[Part]:
    x = vary(0.12) - 0.12
    string = [(-0.02, 0.3), (0.03, 0.3), (x + 0.06, 0.75), (0.03, 1.2), (-0.02, 1.2), (x + 0.01, 0.75)]
    return [
        Part(string, (110, 110, 110)),
        Part([(0, 0.2), (0.12, 0.42), (-0.12, 0.42)]),
        Part(ellipse(0, -0.35, vary(0.55), 0.65)),
        Part(ellipse(-0.2, -0.58, 0.1, 0.16), WHITE),
    ]


def umbrella(vary: Vary) -> list[Part]:
    height = vary(0.8)
    scallops = [p for x in (0.67, 0, -0.67) for p in ellipse(x, 0, 0.33, 0.14, 0, -180)]
    return [
        Part(rectangle(-0.04, -0.1, 0.04, 0.85), BROWN),
        Part(ellipse(0.14, 0.85, 0.18, 0.16, 180, 0) + ellipse(0.14, 0.85, 0.1, 0.08, 0, 180), BROWN),
        Part([(-0.04, -height - 0.12), (0.04, -height - 0.12), (0.04, 0), (-0.04, 0)], BROWN),
        Part(ellipse(0, 0, 1, height, 180, 360) + scallops),
        Part([(-0.05, -height), (0.05, -height), (0.33, -0.02), (-0.33, -0.02)], SHADE),
    ]


def kite(vary: Vary) -> list[Part]:
    x = vary(0.55)
    string = [(0, 0.45), (0.04, 0.45), (-0.1, 0.85), (0.12, 1.3), (0.08, 1.3), (-0.15, 0.85)]
    parts = [
        Part(string, (120, 120, 120)),
        Part([(0, -1), (x, -0.35), (0, 0.5), (-x, -0.35)]),
        Part([(0, -1), (x, -0.35), (0, -0.35)], SHADE),
        Part([(0, 0.5), (-x, -0.35), (0, -0.35)], SHADE),
    ]
    for px, py in ((-0.1, 0.8), (0.05, 1.12)):
        bow = [(px - 0.17, py - 0.09), (px + 0.17, py + 0.09), (px + 0.17, py - 0.09), (px - 0.17, py + 0.09)]
        parts.append(Part(bow))
    return parts


def apple(vary: Vary) -> list[Part]:
    return [
        Part([(-0.05, -0.5), (0.02, vary(-1.0)), (0.12, -0.95), (0.06, -0.5)], BROWN),
        Part(ellipse(0.32, -0.8, 0.26, 0.12), GREEN),
        Part(ellipse(-0.3, 0, vary(0.48), 0.6)),
        Part(ellipse(0.3, 0, vary(0.48), 0.6)),
        Part(ellipse(0, 0.12, 0.5, 0.5)),
        Part(ellipse(-0.42, -0.2, 0.1, 0.18), WHITE),
    ]


def flower(vary: Vary) -> list[Part]:
    petal = vary(0.3)
    petals = [
        ellipse(0.4 * math.cos(a), -0.45 + 0.4 * math.sin(a), petal, petal)
        for a in (-1.57, -0.31, 0.94, 2.2, 3.46)
    ]
    return [
        Part(rectangle(-0.06, -0.1, 0.06, 1.1), GREEN),
        Part(ellipse(0.28, 0.6, 0.26, 0.12), GREEN),
        Part(ellipse(-0.28, 0.75, 0.26, 0.12), GREEN),
        *(Part(points) for points in petals),
        Part(ellipse(0, -0.45, 0.24, 0.24), (250, 206, 70)),
    ]


def rocket(vary: Vary) -> list[Part]:
    hull = [(0, -1.1), (0.28, -0.6), (0.34, -0.1), (0.28, 0.6), (-0.28, 0.6), (-0.34, -0.1), (-0.28, -0.6)]
    return [
        Part([(-0.25, 0.55), (0, vary(1.15)), (0.25, 0.55)], ORANGE),
        Part([(-0.3, 0.1), (-0.68, 0.65), (-0.28, 0.55)], SHADE),
        Part([(0.3, 0.1), (0.68, 0.65), (0.28, 0.55)], SHADE),
        Part(hull),
        Part(ellipse(0, -0.35, 0.15, 0.15), SKY),
    ]


def butterfly(vary: Vary) -> list[Part]:
    wing = vary(0.48)
    return [
        Part(ellipse(-0.5, -0.3, wing, 0.45)),
        Part(ellipse(0.5, -0.3, wing, 0.45)),
        Part(ellipse(-0.38, 0.4, 0.34, 0.36)),
        Part(ellipse(0.38, 0.4, 0.34, 0.36)),
        Part(ellipse(-0.5, -0.3, 0.2, 0.2), SHADE),
        Part(ellipse(0.5, -0.3, 0.2, 0.2), SHADE),
        Part(ellipse(0, 0, 0.1, 0.6), BLACK),
        Part([(0, -0.5), (-0.25, -0.9), (-0.2, -0.92), (0.03, -0.5)], BLACK),
        Part([(0, -0.5), (0.25, -0.9), (0.2, -0.92), (-0.03, -0.5)], BLACK),
    ]


SHAPES = {f.__name__: f for f in (circle, square, triangle, star, heart, cross, diamond, moon)}
UNCOLORED = {f.__name__: f for f in (snowman, fire, tree, sun, cloud, mushroom)}
COLORED = {
    f.__name__: f
    for f in (
        house, car, boat, fish, bird, cat, dog, cup, hat, balloon, umbrella, kite, apple, flower, rocket, butterfly
    )
}  # fmt: skip
DRAWINGS = SHAPES | UNCOLORED | COLORED
AIRBORNE = {"sun", "cloud", "moon", "bird", "balloon", "kite", "rocket", "butterfly"}  # above the horizon

# Kinds that only stickers have (stickers.py).
OTHER_KINDS = [
    "airplane", "anchor", "banana", "bee", "bell", "bicycle", "book", "bus", "cactus", "cake", "camera", "candle",
    "carrot", "castle", "chicken", "clock", "cow", "crab", "crown", "doughnut", "drum", "elephant", "ghost", "gift",
    "guitar", "hamburger", "hammer", "helicopter", "horse", "key", "ladybug", "lemon", "light bulb", "monkey",
    "octopus", "owl", "palm tree", "penguin", "pig", "pizza", "pumpkin", "rabbit", "rainbow", "ring", "shirt",
    "shoe", "snail", "snake", "spider", "strawberry", "tractor", "train", "trumpet", "turtle", "watermelon", "whale",
]  # fmt: skip

IRREGULAR_PLURALS = {"fish": "fish", "sheep": "sheep", "mouse": "mice", "goose": "geese", "knife": "knives"}


def plural(kind: str) -> str:
    """The plural of a noun: cats, foxes, butterflies, snowmen."""
    if kind in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[kind]
    if kind.endswith("man"):
        return kind.removesuffix("man") + "men"
    if kind.endswith("y") and kind[-2] not in "aeiou":
        return kind.removesuffix("y") + "ies"
    return kind + ("es" if kind.endswith(("s", "x", "ch", "sh")) else "s")
