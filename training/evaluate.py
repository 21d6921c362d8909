"""Measure a model's accuracy on held-out scenes, by task.

    python -m training.evaluate [--checkpoint tiny] [--scenes 500]
    python -m training.evaluate --stickers DIR            stickers by style and by kind
    python -m training.evaluate --results FILE            score a results file (benchmarks.py)

| task                      | a hit is                                                                       |
|---------------------------|--------------------------------------------------------------------------------|
| grounding, referring      | the first box of the phrase has IoU >= 0.5 with the correct one (paper, 4.1)   |
| ranked boxes              | the correct box is among the k most probable boxes of the phrase (IoU >= 0.5)  |
| several boxes             | an object that some box of the phrase overlaps with IoU >= 0.5                 |
| grounded captions         | an object that a phrase names and links to a box with IoU >= 0.5               |
| plain captions            | an object that the caption names                                               |
| equal objects             | a group that one phrase of the caption names ("two red cups")                  |
| describing a box          | an expression that the rules of scenes.py resolve to the same object           |
| questions, in context     | exactly the correct answer; grounded: and a box on each object (IoU >= 0.5)    |
| text alone                | an ending that completes a valid caption                                       |
"""

import random
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import torch

from inference.beam import rank_boxes
from inference.fast import load_checkpoint
from inference.requests import read_objects
from kosmos2 import Kosmos2, Row, finish, pad_left, preprocess_image
from sample import CommandParser, report_error, run_command
from tokenizer import Box, Entity, Tokenizer, box_score, iou, parse, strip_tags, tokens_to_box
from training import scenes as world
from training.data import check_grid, encode_example
from training.scenes import MOST, Example, Scene, Thing
from training.stickers import Stickers

ROOT = Path(__file__).resolve().parent.parent

HELD_OUT = 1_000_000_000  # scenes from this seed on are never trained on

# The rows of the table: their titles, and the tasks of scenes.py they are made of.
TABLE = {
    "grounded caption: objects named and boxed": ["caption"],
    "detailed caption: objects named and boxed": ["detail"],
    "plain caption: objects named": ["plain caption", "plain detail"],
    "grounded caption: equal objects named in one phrase": ["groups"],
    "phrase grounding, accuracy at IoU 0.5": ["ground"],
    "phrase grounding, several boxes": ["ground several"],
    "referring expression comprehension, by appearance": ["refer"],
    "referring expression comprehension, by relation": ["refer relation"],
    "referring expression generation": ["describe box"],
    "questions: color": ["color"],
    "questions: kind": ["kind"],
    "questions: count": ["count"],
    "questions: yes or no": ["yes or no"],
    "questions: where": ["where"],
    "questions: relation": ["relation"],
    "questions, all six": ["color", "kind", "count", "yes or no", "where", "relation"],
    "questions about a box": ["color of box", "kind in box"],
    "in context: about a box, as shown with another image": ["example of a box"],
    "text alone: captions finished without an image": ["text alone"],
    "grounded questions: answer and boxes": [
        f"{task} grounded" for task in ("color", "kind", "count", "yes or no", "where", "relation")
    ],
}  # fmt: skip


# ---- Scoring one answer ----------------------------------------------------------------------------


def name_of(phrase: str, stickers: Stickers | None = None) -> tuple[str, int] | None:
    """What a phrase of a caption names, and how many: "two red cups" -> ("red cup", 2)."""
    understood = world.read_words(phrase, stickers)
    if understood is None:
        return None
    number, meaning = understood
    kind = meaning["kind"]
    color = meaning.get("color")
    name = kind if color is None else f"{color} {kind}"
    return name, 1 if number is None else number


def named(caption: str, stickers: Stickers | None = None) -> Counter:
    """How often a caption names each object: "two red cups" counts twice."""
    found: Counter = Counter()
    for phrase in world.listed(caption):
        name = name_of(phrase, stickers)
        if name is not None:
            found[name[0]] += name[1]
    return found


def caption_hits(entities: list[Entity], scene: Scene) -> list[float]:
    """For each object, whether some phrase names it and has a box on it. A box counts for one object only."""
    boxes = defaultdict(list)
    for entity in entities:
        name = name_of(entity.phrase, scene.stickers)
        if name is not None:
            boxes[name[0]] += entity.boxes
    hits = []
    for thing in scene.things:
        best = max(boxes[thing.name], key=lambda box: iou(box, thing.box), default=None)
        hit = best is not None and iou(best, thing.box) >= 0.5
        if hit:
            boxes[thing.name].remove(best)
        hits.append(float(hit))
    return hits


def groups_named(caption: str, scene: Scene) -> list[float]:
    """For each group of equal objects, whether one phrase of the caption names all of them ("two red cups")."""
    phrases = world.listed(caption)
    return [float(world.counted(group) in phrases) for group in scene.groups() if len(group) > 1]


def found_all(boxes: list[Box], things) -> list[float]:
    """For each object, whether some box overlaps it with IoU >= 0.5."""
    return [float(any(iou(box, thing.box) >= 0.5 for box in boxes)) for thing in things]


def asked_boxes(example: Example, answer: str) -> list[Box]:
    """The boxes of the phrase in the prompt; boxes of other phrases in the answer are ignored."""
    prompt_phrase = strip_tags(example.prompt).strip()
    _, entities = parse(example.prompt + answer)
    return next((entity.boxes for entity in entities if entity.phrase == prompt_phrase), [])


def score(example: Example, answer: str, scene: Scene) -> list[float]:
    """The hits (1) and misses (0) of one answer, tagged text without </s>."""
    caption, entities = parse(answer)
    boxes = [box for entity in entities for box in entity.boxes]
    task = example.task
    describes = task.endswith(("caption", "detail"))
    if describes and not scene.things:
        return [float(caption == parse(example.answer)[0])]
    if task in ("caption", "detail"):
        return caption_hits(entities, scene)
    if describes:
        truth = Counter(thing.name for thing in scene.things)
        hits = (named(caption, scene.stickers) & truth).total()
        return [1.0] * hits + [0.0] * (truth.total() - hits)
    if task == "ground several":
        return found_all(asked_boxes(example, answer), example.targets)
    if task in ("ground", "refer", "refer relation"):
        return found_all(asked_boxes(example, answer)[:1], example.targets)
    if task == "text alone":
        joint = "" if answer[:1] in ",." else " "  # the first word of an answer has no space before it
        return [float(world.is_caption(example.prompt + joint + answer.strip(), scene.stickers))]
    if task == "describe box":
        return [float(world.resolve(answer, scene) == list(example.targets))]
    if task.endswith("grounded"):
        right_words = caption == parse(example.answer)[0]
        return [float(right_words and all(found_all(boxes, example.targets)))]
    return [float(answer.strip() == example.answer.strip())]


# ---- Running a model -------------------------------------------------------------------------------

Chosen = list[tuple[Scene, Example]]  # examples, each with its scene


@torch.inference_mode()
def answers(model: Kosmos2, tokenizer: Tokenizer, chosen: Chosen, batch: int = 64) -> list[Row]:
    """The model's greedy answer to every example about its scene."""
    check_grid(tokenizer)
    results = []
    size = model.config.vision.image_size
    device = next(model.parameters()).device
    for start in range(0, len(chosen), batch):
        part = chosen[start : start + batch]
        images = []
        for scene, example in part:
            if not example.alone:
                images.append(scene.draw())
            if example.second is not None:
                images.append(example.second.draw())
        pixels = None
        if images:
            pixels = torch.stack([preprocess_image(image, size) for image in images]).to(device)
        prompts = [encode_example(tokenizer, example) for _, example in part]
        tokens, image_mask, pad_mask = pad_left(prompts, device)
        state = model.prefill(tokens, pixels, None, image_mask, pad_mask, max_new_tokens=120)
        results += finish(state)
    return results


def choose_examples(scenes: int, first_seed: int, only=None, stickers: Stickers | None = None) -> Chosen:
    """One example of every task (or of the tasks in `only`) for each of `scenes` scenes."""
    chosen = []
    for seed in range(first_seed, first_seed + scenes):
        scene = Scene.random(seed, stickers)
        rng = random.Random(seed)
        by_task = defaultdict(list)
        for example in world.tasks(scene, rng):
            by_task[example.task].append(example)
        for task, examples in by_task.items():
            if only is None or task in only:
                chosen.append((scene, rng.choice(examples)))
    return chosen


def evaluate(model, tokenizer, scenes: int, first_seed: int, only=None, stickers=None) -> dict[str, tuple]:
    """{task: (share of hits, number of hits and misses)} over `choose_examples`."""
    chosen = choose_examples(scenes, first_seed, only, stickers)
    return accuracies(tokenizer, chosen, answers(model, tokenizer, chosen))


def accuracies(tokenizer: Tokenizer, chosen: Chosen, results: list[Row]) -> dict[str, tuple[float, int]]:
    hits = defaultdict(list)
    for (scene, example), result in zip(chosen, results, strict=True):
        text = tokenizer.decode(result.ids)
        if example.task != "ground absent":
            hits[example.task] += score(example, text, scene)
        if example.task == "caption":
            hits["groups"] += groups_named(parse(text)[0], scene)
    return {task: (sum(h) / len(h), len(h)) for task, h in hits.items() if h}


def table_rows(found: dict[str, tuple[float, int]]) -> dict[str, tuple[float, int]]:
    """{title of TABLE: (accuracy, number)}"""
    rows = {}
    for title, names in TABLE.items():
        results = [found[name] for name in names if name in found]
        count = sum(count for _, count in results)
        if count:
            rows[title] = sum(share * count for share, count in results) / count, count
    return rows


@torch.inference_mode()
def ranked_accuracy(model: Kosmos2, tokenizer: Tokenizer, chosen: Chosen, counts=(1, 5)) -> dict[int, float]:
    """{k: share of phrases for which one of the k most probable boxes, found by beam search, has IoU >= 0.5
    with the correct one}. (R@k in the paper takes the first k boxes of one greedy answer instead.)"""
    hits: Counter = Counter()
    for scene, example in chosen:
        pixels = preprocess_image(scene.draw(), model.config.vision.image_size)[None]
        ids, mask = tokenizer.encode_prompt(example.prompt + "<object>")
        state = model.prefill(torch.tensor([ids]), pixels, image_mask=torch.tensor([mask]), max_new_tokens=2)
        ranked = rank_boxes(state, tokenizer, max(counts))
        truth = example.targets[0].box
        overlaps = [iou(tokens_to_box(ul, lr, tokenizer.grid), truth) for _, ul, lr in ranked]
        for k in counts:
            hits[k] += any(overlap >= 0.5 for overlap in overlaps[:k])
    return {k: hits[k] / len(chosen) for k in counts}


def first_scores(tokenizer: Tokenizer, chosen: Chosen, results: list[Row]) -> dict[str, list[float]]:
    """The score of the first box of every grounding answer, for present and for absent phrases."""
    scores = defaultdict(list)
    for (_, example), result in zip(chosen, results, strict=True):
        if example.task in ("ground", "ground absent"):
            pairs = zip(result.ids, result.probabilities, strict=True)
            locations = [p for i, p in pairs if tokenizer.location_index(i) is not None]
            scores[example.task].append(box_score(locations[:2]) or 0.0)
    return scores


# ---- Stickers --------------------------------------------------------------------------------------


def sticker_hits(model, tokenizer, stickers: Stickers, count: int) -> dict[Thing, list[float]]:
    """{sticker: [named and boxed in the caption, in a phrase of its own, grounded]} of `count` scenes."""
    chosen: Chosen = []
    for seed in range(count):
        scene = Scene.of_stickers(seed, stickers)
        examples = world.captions(scene)[:1] + world.grounding(scene, random.Random(seed))
        chosen += [(scene, example) for example in examples if example.task in ("caption", "ground")]
    hits = defaultdict(list)
    for (scene, example), result in zip(chosen, answers(model, tokenizer, chosen), strict=True):
        text = tokenizer.decode(result.ids)
        found = [score(example, text, scene)]
        if example.task == "caption":
            single = [entity.boxes[0] for entity in parse(text)[1] if len(entity.boxes) == 1]
            found.append(found_all(single, example.targets))
        for thing, *of_thing in zip(example.targets, *found, strict=True):
            hits[thing] += of_thing
    return hits


def print_stickers(found: dict[Thing, list[float]]) -> None:
    """A table by style and by kind, the worst kinds first."""
    groups = defaultdict(list)
    for thing, hits in found.items():
        for name in ("all", f"style {thing.sticker.parent.name}", thing.kind):
            groups[name].append(hits)
    means = {name: torch.tensor(hits).mean(dim=0).tolist() for name, hits in groups.items()}
    columns = ("stickers", "named and boxed in the caption", "in a phrase of its own", "grounded", "of")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for name in sorted(groups, key=lambda name: (name != "all", not name.startswith("style "), means[name])):
        print(f"| {name} | {' | '.join(map('{:.3f}'.format, means[name]))} | {len(groups[name])} |")


# ---- Results files with truth (benchmarks.py) ------------------------------------------------------


def score_results(file: Path, counts=(1, 5, 10)) -> tuple[dict[int, float], int]:
    """({k: share of requests for which one of the first k boxes is correct}, number of requests). A box is
    correct if its IoU with any target is at least 0.5. ValueError if no line has "phrase" and "target"."""
    hits = {k: [] for k in counts}
    for where, row in read_objects(file):
        if "target" not in row:
            continue
        try:
            boxes = boxes_of_phrase(row["entities"], row["phrase"])
            hit = [any(iou(box, target) >= 0.5 for target in row["target"]) for box in boxes]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{where}: not a result ({type(error).__name__}: {error})") from None
        for k in counts:
            hits[k].append(any(hit[:k]))
    total = len(hits[counts[0]])
    if not total:
        raise ValueError(f'{file} has no results with "phrase" and "target"; see training/benchmarks.py')
    return {k: sum(found) / total for k, found in hits.items()}, total


def boxes_of_phrase(entities: list[dict], phrase: str) -> list[Box]:
    """The boxes of the entity with this phrase. Answers are normalized (NFKC), like the training
    data of the vocabulary."""
    asked = " ".join(unicodedata.normalize("NFKC", phrase).split())
    return next((entity["boxes"] for entity in entities if entity["phrase"] == asked), [])


# ---- The command -----------------------------------------------------------------------------------


def print_results(model, tokenizer, scenes: int) -> None:
    """The table of the model card: accuracies, ranked boxes and scores."""
    chosen = choose_examples(scenes, HELD_OUT)
    results = answers(model, tokenizer, chosen)
    title = f"task ({scenes} held-out scenes of up to {MOST} objects)"
    print(f"| {title} | accuracy | of |\n|---|---|---|")
    for task, (share, count) in table_rows(accuracies(tokenizer, chosen, results)).items():
        print(f"| {task} | {share:.3f} | {count} |")
    phrases = [pair for pair in chosen if pair[1].task in ("ground", "refer", "refer relation")]
    for k, share in ranked_accuracy(model, tokenizer, phrases).items():
        print(f"| ranked boxes of a phrase: one of the top {k} is correct | {share:.3f} | {len(phrases)} |")
    for task, scores in first_scores(tokenizer, chosen, results).items():
        low, middle, high = (torch.tensor(scores).quantile(q).item() for q in (0.1, 0.5, 0.9))
        where = "not in the image" if task == "ground absent" else "in the image"
        figures = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        print(f"| score of the first box, phrase {where}: median (10% to 90%) | {figures} | {len(scores)} |")


def main(argv=None) -> int:
    parser = CommandParser("training.evaluate", __doc__)
    add = parser.add_argument
    add("--checkpoint", default=str(ROOT / "tiny"), help="default: tiny")
    add("--scenes", type=int, default=500, help="number of held-out scenes (default: 500)")
    add("--stickers", type=Path, metavar="DIR", help="measure on PNGs STYLE/KIND--NAME.png")
    add("--results", type=Path, metavar="JSONL", help="score this file instead")
    args = parser.parse_args(argv)
    if args.scenes < 1:
        parser.error("--scenes must be at least 1")
    try:
        if args.results:
            shares, total = score_results(args.results)
            for k, share in shares.items():
                print(f"R@{k} at IoU 0.5: {share:.4f} of {total}")
            return 0
        model, tokenizer = load_checkpoint(args.checkpoint)
        if args.stickers:
            print_stickers(sticker_hits(model, tokenizer, Stickers(args.stickers), args.scenes))
        else:
            print_results(model, tokenizer, args.scenes)
    except (OSError, ValueError, RuntimeError) as error:
        return report_error("evaluate", error)
    return 0


if __name__ == "__main__":
    sys.exit(run_command("evaluate", main))
