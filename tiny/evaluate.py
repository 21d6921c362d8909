"""Score a model on scenes it never saw, task by task, with the measures of the paper.

    python tiny/evaluate.py [--checkpoint tiny] [--scenes 500] [--most 5] [--calibration PNG]
    python tiny/evaluate.py --precision int8          what narrower weights change

| task                      | a hit is                                                                      |
|---------------------------|-------------------------------------------------------------------------------|
| grounding, referring      | the first box overlaps the right one by IoU 0.5 or more (paper, section 4.1)   |
| ranked boxes, R@k         | the right box among the k likeliest, by IoU 0.5                               |
| several boxes             | a right box that some box overlaps by 0.5                                      |
| captions                  | a shape of the scene that the caption names with the right colour and outline |
| box to words              | an expression by which a rule-based reader picks the same shape               |
| questions, in context     | the right answer, letter by letter                                            |
| text alone                | an ending that makes the beginning a caption some scene could have            |
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

from data import encode_example  # noqa: E402
from scenes import COLORS, NUMBERS, SHAPES, Example, Scene, is_caption, plural, resolve, tasks  # noqa: E402

from kosmos2 import Kosmos2, NewTokens, pad_left, preprocess_image  # noqa: E402
from load_weights import load_checkpoint  # noqa: E402
from tokenizer import Tokenizer, box_to_tokens, iou, parse, tokens_to_box  # noqa: E402

HELD_OUT = 1_000_000_000  # scenes from this seed on are never trained on


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
    if task == "text alone":
        joint = "" if answer[:1] in ",." else " "  # a first word comes without its space
        return [float(is_caption(example.prompt + joint + answer.strip()))]
    if task == "describe box":
        return [float(resolve(answer, scene) == list(example.targets))]
    if task.endswith("grounded"):
        found = all(any(iou(box, b) >= 0.5 for b in boxes) for box in truth)
        return [float(found and parse(answer)[0] == parse(example.answer)[0])]
    return [float(answer.strip() == example.answer.strip())]


@torch.inference_mode()
def answers(model: Kosmos2, tokenizer: Tokenizer, questions: list[tuple[Scene, Example]], batch: int = 64) -> list[NewTokens]:
    """What the model replies, greedily, to every example about its scene."""
    replies = []
    device = next(model.parameters()).device
    for at in range(0, len(questions), batch):
        part = questions[at : at + batch]
        scenes = [s for scene, example in part if not example.alone for s in (scene, example.second) if s]
        pictures = [preprocess_image(scene.draw(), model.config.vision.image_size) for scene in scenes]
        pixels = torch.stack(pictures).to(device) if pictures else None
        prompts = [encode_example(tokenizer, example) for _, example in part]
        tokens, image_mask, pad_mask = pad_left(prompts, device)
        replies += model.generate(tokens, pixels, None, image_mask, pad_mask, max_new_tokens=110)
    return replies


def ask_about(scenes: int, first_seed: int, most: int = 5, only=None) -> list[tuple[Scene, Example]]:
    """One example of each task (or of these only) for each of so many scenes that has any."""
    asked = []
    for seed in range(first_seed, first_seed + scenes):
        scene, rng = Scene.random(seed, most), random.Random(seed)
        by_task = defaultdict(list)
        for example in tasks(scene, rng):
            by_task[example.task].append(example)
        asked += [(scene, rng.choice(group)) for task, group in by_task.items() if only is None or task in only]
    return asked


def evaluate(model, tokenizer, scenes: int, first_seed: int, most: int = 5, only=None) -> dict[str, tuple[float, int]]:
    """{task: (share of hits, number of hits and misses)} over the examples of `ask_about`."""
    asked = ask_about(scenes, first_seed, most, only)
    return shares(tokenizer, asked, answers(model, tokenizer, asked))


def shares(tokenizer, asked: list[tuple[Scene, Example]], replies: list[NewTokens]) -> dict[str, tuple[float, int]]:
    hits = defaultdict(list)
    for (scene, example), reply in zip(asked, replies, strict=True):
        hits[example.task] += score(example, tokenizer.decode(reply), scene)
    return {task: (sum(h) / len(h), len(h)) for task, h in hits.items()}


def boxes_kept(tokenizer, asked, replies: list[NewTokens], others: list[NewTokens]) -> tuple[float, int]:
    """(share of the boxes in `replies` that some box of the same answer in `others` overlaps by 0.9, their number)."""
    kept = []
    for (_, example), reply, other in zip(asked, replies, others, strict=True):
        prompt = encode_example(tokenizer, example)[0]
        ours, theirs = ([e.boxes for e in tokenizer.read(prompt, r)[1] if e.scores[0] is not None] for r in (reply, other))
        kept += [any(iou(box, b) >= 0.9 for boxes in theirs for b in boxes) for boxes in ours for box in boxes]
    return sum(kept) / max(len(kept), 1), len(kept)


@torch.inference_mode()
def recall(model, tokenizer, asked: list[tuple[Scene, Example]], counts=(1, 5)) -> dict[int, float]:
    """{k: share of phrases for which one of the k likeliest boxes overlaps the right one by 0.5 or more} (R@k)."""
    hits: Counter = Counter()
    for scene, example in asked:
        pixels = preprocess_image(scene.draw(), model.config.vision.image_size)[None]
        ids, mask = tokenizer.encode_prompt(example.prompt + "<object>")
        state = model.start(torch.tensor([ids]), pixels, image_mask=torch.tensor([mask]), max_new_tokens=2)
        overlaps = [iou(tokens_to_box(*box), example.targets[0].box) for _, *box in tokenizer.rank_boxes(state, max(counts))]
        for k in counts:
            hits[k] += any(overlap >= 0.5 for overlap in overlaps[:k])
    return {k: hits[k] / len(asked) for k in counts}


def scored_boxes(model, tokenizer, asked: list[tuple[Scene, Example]]) -> list[tuple[float, float, bool]]:
    """(the model's score, best IoU with a right box, whether both corners are in the right cells) of all boxes."""
    found = []
    for (scene, example), reply in zip(asked, answers(model, tokenizer, asked), strict=True):
        for entity in tokenizer.read(encode_example(tokenizer, example)[0], reply)[1]:
            right = [shape.box for shape in example.targets]
            if example.task == "caption":  # what the phrase names
                right = [shape.box for shape in scene.shapes if named(entity.phrase)[shape.name]]
            exact = [tokens_to_box(*box_to_tokens(box, training=True)) for box in right]
            for box, score in zip(entity.boxes, entity.scores, strict=True):
                found.append((score, max((iou(box, truth) for truth in right), default=0.0), box in exact))
    return found


def draw_calibration(found: list[tuple[float, float, bool]], path: Path, bins: int = 10) -> None:
    """How good boxes of one score are, against the score: in `bins` groups of as many boxes each.

    A score is sqrt(p(upper left) p(lower right)); if the probabilities are true, then of boxes with score s
    the share s² has both corners in the right cells.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = torch.tensor(sorted(found)).tensor_split(bins)  # each (boxes, 3)
    scores = [group[:, 0].mean().item() for group in groups]
    fig, axes = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for label, column, least, color in (
        ("IoU at least 0.5", 1, 0.5, "#1565c0"), ("IoU at least 0.75", 1, 0.75, "#8e24aa"), ("both cells right", 2, 1, "#c62828"),
    ):  # fmt: skip
        shares = [(group[:, column] >= least).float().mean().item() for group in groups]
        axes.plot(scores, shares, color=color, marker="o", markersize=4, label=label)
    line = torch.linspace(0, 1, 50)
    axes.plot(line, line**2, color="#777777", linestyle="--", label="score²: both cells right, if calibrated")
    axes.set(title=f"{len(found):,} boxes in {bins} groups by score", xlabel="score, mean of the group", ylabel="share of its boxes")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.9), fontsize=9)
    fig.savefig(path, dpi=110)


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
    "in context: about a box, as shown with another picture": ["example of a box"],
    "in context: about a picture, as shown with another": ["example of a picture"],
    "text alone: captions finished without a picture": ["text alone"],
    "grounded questions: answer and boxes": [
        f"{task} grounded" for task in ("color", "shape", "count", "yes or no", "where", "relation")
    ],
}  # fmt: skip


def rows(found: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """{title of the table: (share, number)}"""
    together = {}
    for title, names in TABLE.items():
        asked = [found[name] for name in names if name in found]
        if count := sum(count for _, count in asked):
            together[title] = sum(share * count for share, count in asked) / count, count
    return together


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(HERE))
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--most", type=int, default=5, choices=range(1, 6), help="shapes in a scene, at most")
    parser.add_argument("--precision", choices=["bf16", "fp16", "int8"], help="compare fp32 with this")
    parser.add_argument("--calibration", type=Path, metavar="PNG", help="draw how good boxes are by their score")
    args = parser.parse_args()
    model, tokenizer = load_checkpoint(args.checkpoint)
    asked = ask_about(args.scenes, HELD_OUT, args.most)
    replies = answers(model, tokenizer, asked)
    table = rows(shares(tokenizer, asked, replies))
    title = f"task ({args.scenes} held-out scenes of 1 to {args.most} shapes)"
    if args.precision:
        others = answers(load_checkpoint(args.checkpoint, args.precision)[0], tokenizer, asked)
        theirs = rows(shares(tokenizer, asked, others))
        print(f"| {title} | fp32 | {args.precision} | of |\n|---|---|---|---|")
        for task, (share, count) in table.items():
            print(f"| {task} | {share:.3f} | {theirs[task][0]:.3f} | {count} |")
        same = sum(list(a) == list(b) for a, b in zip(replies, others, strict=True)) / len(asked)
        kept, boxes = boxes_kept(tokenizer, asked, replies, others)
        print(f"| answers with the same ids | | {same:.4f} | {len(asked)} |")
        print(f"| boxes that keep IoU 0.9 with those of fp32 | | {kept:.4f} | {boxes} |")
        return 0
    print(f"| {title} | hits | of |\n|---|---|---|")
    for task, (share, count) in table.items():
        print(f"| {task} | {share:.3f} | {count} |")
    phrases = ask_about(args.scenes, HELD_OUT, args.most, {"ground", "refer", "refer relation"})
    for k, share in recall(model, tokenizer, phrases).items():
        print(f"| ranked boxes of a phrase, R@{k} | {share:.3f} | {len(phrases)} |")
    if args.calibration:
        found = scored_boxes(model, tokenizer, ask_about(args.scenes, HELD_OUT, args.most, {"caption", "ground", "refer relation"}))
        draw_calibration(found, args.calibration)
        print(f"wrote {args.calibration}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
