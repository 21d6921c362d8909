# %% [markdown]
# # 7. Tasks: one model, many prompts
#
# Captions, grounding, referring, questions, few-shot examples: each task is a prompt. Here each is tried on scenes
# that the model has not seen, with the raw text next to the parsed one, and with failures. (Reading time: 20 minutes.)
# Scenes, tasks and scores come from `training/scenes.py` and `training/evaluate.py`.

# %%
from figures import ROOT, show_answers, show_image, table  # isort: skip
import random
from collections import defaultdict

import torch
from evaluate import HELD_OUT, answers, choose_examples, encode_example, score
from scenes import Scene, resolve

from kosmos2 import pad_left, preprocess_image, rank_boxes
from load_weights import load_checkpoint
from sample import Answer
from tokenizer import iou, parse, tokens_to_box

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
scene = Scene.random(HELD_OUT + 71)
image = scene.draw(448)
pixels = preprocess_image(image, model.config.vision.image_size)[None]
print("the scene:", ", ".join(thing.name for thing in scene.things))
show_image(image, "A random scene; its things are listed above.", width=200)


def ask(prompt: str, *images, boxes=None) -> str:
    """The answer to a prompt about this scene (or about these images), as tagged text."""
    shown = images or (pixels,)
    ids, mask = tokenizer.encode_prompt(prompt, len(shown), boxes)
    return tokenizer.decode(
        model.generate(torch.tensor([ids]), torch.cat(shown), None, torch.tensor([mask]), max_new_tokens=100)[
            0
        ]
    )


# %% [markdown]
# ## Raw and parsed answers

# %%
thing = scene.things[1]
for prompt, boxes in (
    ("<grounding>An image of", None), ("An image of", None), ("<grounding>Describe this image in detail:", None),
    ("Question: How many things are there? Answer:", None), (f"<grounding> Question: Where is the {thing.name}? Answer:", None),
    ("<grounding> Question: What color is<phrase> it</phrase>? Answer:", [thing.box]),
):  # fmt: skip
    raw = ask(prompt, boxes=boxes)
    print(f"prompt   {prompt}\nraw      {raw}\nparsed   {parse(raw)[0]}\n")

# %% [markdown]
# (The last prompt is about a box: `encode_prompt` inserts its two tokens behind "it".)
#
# ## Referring, in both directions
#
# A box in the prompt gives an expression (referring expression generation); an expression gives a box
# (comprehension). If the expression fits only that thing, the second undoes the first. A rule-based reader (`resolve`)
# decides whether it does.

# %%
rows = []
for thing in scene.things:
    words = ask("<grounding><phrase> It</phrase> is", boxes=[thing.box]).strip(" .")
    entities = parse(ask(f"<grounding><phrase> {words}</phrase>"))[1]
    back = max((iou(b, thing.box) for e in entities for b in e.boxes), default=0)
    meant = resolve(words, scene)
    rows.append((thing.name, words, "yes" if meant == [thing] else "no", f"{back:.2f}"))
table(rows, ("thing", "expression for its box", "unambiguous?", "IoU of the box for the expression"))

# %% [markdown]
# ## Ranked boxes
#
# An ambiguous phrase has several right answers. `rank_boxes` runs a beam search over the two location tokens: the 32
# most likely top-left corners with all bottom-right ones, ranked by the square root of the product of both
# probabilities; of boxes that overlap with IoU 0.5 or more, only the most likely is kept.

# %%
prefix = tokenizer.encode_prompt("<grounding><phrase> a thing</phrase><object>")
tokens, mask, _ = pad_left([prefix])
state = model.prefill(tokens, pixels, image_mask=mask, max_new_tokens=2)
ranked = rank_boxes(state, tokenizer, 4)
for rank, (p, ul, lr) in enumerate(ranked, start=1):
    box = tokens_to_box(ul, lr)
    nearest = max(scene.things, key=lambda s, box=box: iou(s.box, box))
    print(f"{rank}. score {p:.3f}  IoU {iou(nearest.box, box):.2f} with the {nearest.name}")

# %% [markdown]
# ## Two images: the example defines the task
#
# The prompt does not contain the words "color" or "kind". The first image, and what is said about its box, is the only
# hint. The bundled model was trained on such prompts, with boxes. In the text, `<image>` stands for an image; in the
# tokens it is followed by Q slots and `</image>`. The images are given in the order of their tags.

# %%
ids, mask = tokenizer.encode_prompt("<image> red.<image>", 2)
opening = [(t, tokenizer.id_to_token[i]) for t, (i, m) in enumerate(zip(ids, mask, strict=True)) if not m]
print(f"{len(ids)} positions, {sum(mask)} slots; other tokens: {opening}")

# %%
other = Scene.random(HELD_OUT + 64)
first = preprocess_image(other.draw(), model.config.vision.image_size)[None]
shown = next(thing for thing in other.things if thing.color)
asked = next(thing for thing in scene.things if thing.color)
print(f"shown: {shown.name}; asked about: {asked.name}")
for said in (f"{shown.color}.", f"a {shown.kind}."):
    prompt = f"<image><grounding><phrase> It</phrase> is {said}<image><grounding><phrase> It</phrase> is"
    print(f"  “It is {said}” …  “It is {ask(prompt, first, pixels, boxes=[shown.box, asked.box]).strip()}”")

# %% [markdown]
# ## Accuracy
#
# One example of each task for each of 30 scenes, if the scene has one. A caption counts once for each thing.
# (`training/evaluate.py` uses 500 scenes; its table is in `tiny/README.md`.) First an example of each task:

# %%
examples = choose_examples(30, HELD_OUT + 20_000)
kinds = {example.task: example for _, example in examples}
for task in sorted(kinds):
    print(f"{task:22}{parse(kinds[task].prompt)[0]} …{parse(kinds[task].answer)[0]}"[:130])

# %%
hits = defaultdict(list)
misses = []
for (s, example), result in zip(examples, answers(model, tokenizer, examples), strict=True):
    if example.task == "ground absent":
        continue
    found = score(example, tokenizer.decode(result.ids), s)
    hits[example.task] += found
    if not all(found):
        misses.append((example, result, s))
table([(task, f"{sum(h) / len(h):.2f}", len(h)) for task, h in sorted(hits.items())], ("task", "accuracy", "of"))

# %% [markdown]
# ## Failures
#
# Some of the misses above, with the right answers:

# %%
for example, result, _ in random.Random(1).sample(misses, min(5, len(misses))):
    print(f"[{example.task}] {example.prompt}")
    print(f"   model {parse(tokenizer.decode(result.ids))[0]}")
    print(f"   right {parse(example.answer)[0]}\n")

# %% [markdown]
# And one of them with its boxes. If a box is on a thing and only its name is wrong, the model has found the thing but
# not recognized it:

# %%
if worst := next((m for m in misses if m[0].task == "caption"), None):
    example, result, s = worst
    prompt = encode_example(tokenizer, example)[0]
    caption, entities = tokenizer.parse_output(prompt, result.ids, result.probabilities)
    print("right:", parse(example.prompt + example.answer)[0])
    show_answers(s.draw(336), Answer(caption, "", entities))

# %% [markdown]
# ## Exercises
#
# 1. Ground something that is not there. What happens to the score?
# 2. Give the example image last and the question first. Does it still work?
# 3. Which task gets worse first when the image is made smaller (draw at 28 pixels)? Measure with `score`.
# 4. `score` compares answers letter by letter. Find a right answer that counts as a miss.
