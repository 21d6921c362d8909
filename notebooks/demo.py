"""The scenes of the images in tiny/, with the exact boxes of their objects."""

from training.scenes import Scene, Thing


def demo_scenes() -> dict[str, Scene]:
    """The scenes of the images in tiny/, by file name."""

    def scene(background: str, seed: int, aspect: float, *things: tuple) -> Scene:
        placed = [Thing(*thing, aspect) for thing in things]
        return Scene(tuple(sorted(placed, key=lambda thing: thing.center[0])), background, seed, aspect)

    snowman = ("snowman", None, (0.408, 0.526), 0.475, 16)
    fire = ("fire", None, (0.752, 0.67), 0.363, 21)
    cats = [("cat", "orange", (0.17, 0.68), 0.36, 31), ("cat", "orange", (0.82, 0.66), 0.34, 14)]
    car = ("car", "blue", (0.5, 0.7), 0.36, 37)
    sky = [("sun", None, (0.85, 0.17), 0.24, 15), ("cloud", None, (0.3, 0.17), 0.3, 40)]
    first = [("cup", "yellow", (0.3, 0.62), 0.35, 1), ("kite", "red", (0.7, 0.35), 0.45, 2)]
    second = [("umbrella", "purple", (0.33, 0.4), 0.45, 1), ("cat", "orange", (0.72, 0.66), 0.4, 2)]
    return {
        "scene.png": scene("snow", 8, 4 / 3, snowman, fire),
        "busy.png": scene("day", 21, 4 / 3, *cats, car, *sky),
        "first.png": scene("light", 14, 1.0, *first),
        "second.png": scene("light", 14, 1.0, *second),
    }
