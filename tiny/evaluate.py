"""Score a model on scenes it never saw, task by task, with the measures of the paper.

    python tiny/evaluate.py [--checkpoint tiny] [--scenes 500] [--most 5]

| task                      | a hit is                                                                      |
|---------------------------|-------------------------------------------------------------------------------|
| grounding, referring      | the first box overlaps the right one by IoU 0.5 or more (paper, section 4.1)   |
| several boxes             | a right box that some box overlaps by 0.5                                      |
| captions                  | a shape of the scene that the caption names with the right colour and outline |
| box to words              | an expression by which a rule-based reader picks the same shape               |
| questions                 | the right answer, letter by letter                                            |
"""

import argparse
import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from scenes import COLORS, NUMBERS, SHAPES, Example, Scene, plural, resolve, tasks  # noqa: E402

from kosmos2 import Kosmos2, pad_left, preprocess_image  # noqa: E402
from load_weights import load_checkpoint  # noqa: E402
from tokenizer import Tokenizer, parse  # noqa: E402

HELD_OUT = 1_000_000_000  # scenes from this seed on are never trained on


def iou(a, b) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    return width * height / (area(a) + area(b) - width * height)


def named(caption: str) -> Counter:
    """How often a caption names each colour and shape: "two red circles" counts twice."""
    singles = {w: s for s in SHAPES for w in (s, plural(s))}
    found: Counter = Counter()
    for number, color, shape in re.findall(rf"(\w+) (?:large |small )?({'|'.join(COLORS)}) (\w+)", caption):
        if shape in singles:
            found[f"{color} {singles[shape]}"] += max(1, NUMBERS.index(number)) if number in NUMBERS else 1
    return found


def score(example: Example, answer: str, scene: Scene) -> list[float]:
    """The hits and misses of one answer (tagged text without </s>)."""
    boxes = [box for entity in parse(answer)[1] for box in entity.boxes]
    truth = [shape.box for shape in example.targets]
    task = example.task
    if task in ("caption", "detail", "plain caption", "plain detail"):
        right = Counter(s.name for s in scene.shapes)
        hits = (named(parse(answer)[0]) & right).total()
        return [1.0] * hits + [0.0] * (right.total() - hits)
    if task == "ground several":
        return [float(any(iou(box, b) >= 0.5 for b in boxes)) for box in truth]
    if task in ("ground", "refer", "refer relation"):
        return [float(bool(boxes) and iou(boxes[0], truth[0]) >= 0.5)]
    if task == "describe box":
        return [float(resolve(answer, scene) == list(example.targets))]
    if task.endswith("grounded"):
        found = all(any(iou(box, b) >= 0.5 for b in boxes) for box in truth)
        return [float(found and parse(answer)[0] == parse(example.answer)[0])]
    return [float(answer.strip() == example.answer.strip())]


@torch.inference_mode()
def answers(model: Kosmos2, tokenizer: Tokenizer, questions: list[tuple[Scene, Example]], batch: int = 64) -> list[str]:
    """What the model replies, greedily, to every example about its scene."""
    replies = []
    device = next(model.parameters()).device
    for at in range(0, len(questions), batch):
        part = questions[at : at + batch]
        pixels = torch.stack([preprocess_image(s.draw(), model.config.vision.image_size) for s, _ in part])
        prompts = [tokenizer.encode_prompt(example.prompt) for _, example in part]
        tokens, image_mask, pad_mask = pad_left(prompts, device)
        new = model.generate(tokens, pixels.to(device), None, image_mask, pad_mask, max_new_tokens=110)
        replies += [tokenizer.decode(ids) for ids in new]
    return replies


def evaluate(model, tokenizer, scenes: int, first_seed: int, most: int = 5, only=None) -> dict[str, tuple[float, int]]:
    """{task: (share of hits, number of hits and misses)}, one example of a task for each scene that has any."""
    asked = []
    for seed in range(first_seed, first_seed + scenes):
        scene, rng = Scene.random(seed, most), random.Random(seed)
        by_task = defaultdict(list)
        for example in tasks(scene, rng):
            by_task[example.task].append(example)
        asked += [(scene, rng.choice(group)) for task, group in by_task.items() if only is None or task in only]
    hits = defaultdict(list)
    for (scene, example), reply in zip(asked, answers(model, tokenizer, asked), strict=True):
        hits[example.task] += score(example, reply, scene)
    return {task: (sum(h) / len(h), len(h)) for task, h in hits.items()}


# The rows of the table: what it is called, and the tasks of scenes.py it is made of.
TABLE = {
    "grounded caption: shapes named right": ["caption"],
    "detailed caption: shapes named right": ["detail"],
    "plain caption: shapes named right": ["plain caption", "plain detail"],
    "phrase grounding, accuracy at IoU 0.5": ["ground"],
    "phrase grounding, several boxes": ["ground several"],
    "referring expression comprehension, by looks": ["refer"],
    "referring expression comprehension, by relation": ["refer relation"],
    "referring expression generation": ["describe box"],
    "questions: color": ["color"],
    "questions: shape": ["shape"],
    "questions: count": ["count"],
    "questions: yes or no": ["yes or no"],
    "questions: where": ["where"],
    "questions: relation": ["relation"],
    "questions about a box": ["color of box", "shape in box"],
    "grounded questions: answer and boxes": [
        f"{task} grounded" for task in ("color", "shape", "count", "yes or no", "where", "relation")
    ],
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(HERE))
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--most", type=int, default=5, choices=range(1, 6), help="shapes in a scene, at most")
    args = parser.parse_args()
    model, tokenizer = load_checkpoint(args.checkpoint)
    found = evaluate(model, tokenizer, args.scenes, HELD_OUT, args.most)
    print(f"| task ({args.scenes} held-out scenes of 1 to {args.most} shapes) | hits | of |\n|---|---|---|")
    for title, names in TABLE.items():
        asked = [found[name] for name in names if name in found]
        if count := sum(count for _, count in asked):
            print(f"| {title} | {sum(share * count for share, count in asked) / count:.3f} | {count} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
