# %% [markdown]
# # 7. Tasks: one model, many prompts
#
# Captions, phrase grounding, referring expressions, questions, few-shot examples: for Kosmos-2, each task is a
# prompt. We try each on one image, look at the raw and the parsed answers, and then measure accuracy and look at
# failures. (Reading time: 25 minutes.)
#
# `demo_scenes` from `demo.py` describes four of the images in `tiny/` exactly: their objects and boxes.
# `training/evaluate.py` selects and scores examples.

# %%
from figures import ROOT, show_answers, show_image, table  # isort: skip  (sets the paths)
import random
from collections import defaultdict

import torch
from demo import demo_scenes

from inference.beam import rank_boxes
from kosmos2 import finish, open_image, pad_left, preprocess_image
from load_weights import load_checkpoint
from sample import Answer
from tokenizer import PROMPTS, Entity, iou, parse, strip_tags, tokens_to_box
from training.data import encode_example
from training.evaluate import HELD_OUT, answers, choose_examples, score
from training.scenes import resolve

# %% [markdown]
# The image of this notebook:

# %%
torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
size = model.config.vision.image_size
scene = demo_scenes()["busy.png"]
image = open_image(ROOT / "tiny" / "busy.png")
pixels = preprocess_image(image, size)[None]
print("the scene:", ", ".join(thing.name for thing in scene.things))
show_image(image, "A drawing of two orange cats, a blue car, a cloud and a sun.", width=300)

# %% [markdown]
# A function that continues a prompt about this image, or about other images. Decoding is constrained to valid markup,
# so boxes are always complete (notebook 5). Boxes for the phrases of the prompt can be given separately:
# `encode_prompt` inserts them after the phrases.


# %%
def ask(prompt: str, boxes=None, images=pixels) -> Answer:
    """The caption, the tagged answer (without the prompt) and the entities."""
    ids, mask = tokenizer.encode_prompt(prompt, len(images), boxes)
    tokens, mask = torch.tensor([ids]), torch.tensor([mask])
    options = {"max_new_tokens": 120, "constraint": tokenizer.allowed_tokens}
    row = finish(model.prefill(tokens, images, image_mask=mask, **options))[0]
    caption, entities = tokenizer.parse_output(ids, row.ids, row.probabilities)
    return Answer(caption, tokenizer.decode(row.ids), entities)


print(ask(PROMPTS["caption"]).text)

# %% [markdown]
# ## Captions
#
# `PROMPTS` in `tokenizer.py` lists the prompts of the paper. Three of them make captions: brief with boxes, brief
# without (the same prompt without `<grounding>`), and detailed. Which of the raw answers will contain location
# tokens?

# %%
captions = {task: ask(PROMPTS[task]) for task in ("caption", "plain", "detail")}
for task, answer in captions.items():
    print(f"prompt   {PROMPTS[task]}\nraw      {answer.raw}\nparsed   {answer.text}\n")
assert captions["caption"].entities and captions["detail"].entities
assert strip_tags(captions["plain"].raw) == captions["plain"].raw

# %% [markdown]
# Only the prompts with `<grounding>` lead to boxes. The plain caption has a mistake: it lists a third orange cat. The
# two grounded captions as hyperlinks (in Jupyter, hovering over a phrase highlights its box):

# %%
show_answers(image, captions["caption"], captions["detail"])
for phrase, _, boxes, scores in captions["caption"].entities:
    overlap = max(iou(boxes[0], thing.box) for thing in scene.things)
    print(f"{phrase:20} score {scores[0]:.2f}   best IoU with an object {overlap:.2f}")

# %% [markdown]
# ## Questions
#
# Questions have the form `Question: ... Answer:`. With `<grounding>` in front, the answer usually has boxes, too. A
# question can also be about a box: here "it" is the box of the car, and the answer has no box of its own.

# %%
car = scene.find("car")[0]
asked = [
    (PROMPTS["answer"], "How many cats are there?", None),
    (PROMPTS["vqa"], "Where is the sun?", None),
    (PROMPTS["vqa"], "What is right of the car?", None),
    (PROMPTS["vqa"], "What color is<phrase> it</phrase>?", [car.box]),
]
for prompt, question, boxes in asked:
    answer = ask(prompt.format(text=question), boxes)
    print(f"{strip_tags(question):28} {strip_tags(answer.raw).strip():28} {answer.raw}")

# %% [markdown]
# ## Referring, in both directions
#
# Given a box, the model writes an expression for it (referring expression generation); given an expression, it writes
# a box (referring expression comprehension). If the expression matches only that object, the second step should lead
# back to the first box. `resolve` finds which objects an expression matches.

# %%
rows = []
for thing in scene.things:
    it = ask(PROMPTS["refer"], boxes=[thing.box])
    words = strip_tags(it.raw).strip(" .")
    matches = resolve(words, scene)
    found = ask(PROMPTS["ground"].format(text=words))
    back = max((iou(box, thing.box) for e in found.entities for box in e.boxes), default=0)
    rows.append((thing.name, words, "yes" if matches == [thing] else "no", f"{back:.2f}"))
table(rows, ("object", "expression for its box", "matches only this", "IoU of its box"))

# %% [markdown]
# The cats have the same name, so a good expression for them needs a relation ("the cat left of ..."). Where the third
# column is "no", the expression does not match exactly this object, and its box may be on another one.
#
# ## Ranked boxes
#
# "a cat" matches two objects. Greedy decoding gives one answer; `rank_boxes` in `inference/beam.py` gives several. It
# runs a beam search over the two location tokens of a box: it combines the 32 most likely top-left corners with all
# possible bottom-right ones, and of boxes that overlap with IoU 0.5 or more, it keeps only the most likely.

# %%
prompt = PROMPTS["ground"].format(text="a cat") + "<object>"
tokens, mask, _ = pad_left([tokenizer.encode_prompt(prompt)])
state = model.prefill(tokens, pixels, image_mask=mask, max_new_tokens=2)
ranked = rank_boxes(state, tokenizer, 4)
entities = []
for confidence, top_left, bottom_right in ranked:
    box = tokens_to_box(top_left, bottom_right)
    nearest = max(scene.things, key=lambda thing: iou(thing.box, box))
    near = f"{nearest.name} {nearest.place}"
    print(f"score {confidence:.3f}   IoU {iou(nearest.box, box):.2f} with the {near}")
    entities.append(Entity("a cat", (0, 5), [box], [confidence]))
show_answers(image, Answer("a cat", prompt, entities))
assert ranked == sorted(ranked, reverse=True)

# %% [markdown]
# The score is the square root of the product of both probabilities, so it can be read like the score of a generated
# box. The list is sorted by it. It also contains incorrect boxes, and no single threshold separates them from the
# correct ones for all phrases: the two cats share the probability of the first token, so each has a lower score than a
# single cat would.
#
# ## Few-shot prompts
#
# A prompt can contain several images. In the string, each `<image>` stands for one; in the tokens it is followed by Q
# slots and `</image>`. The images are given in the order of their tags.

# %%
ids, mask = tokenizer.encode_prompt("<image> red.<image>", 2)
visible = [(t, i) for t, (i, slot) in enumerate(zip(ids, mask, strict=True)) if not slot]
table([(t, tokenizer.id_to_token[i]) for t, i in visible], ("t", "token"))
assert sum(mask) == 2 * tokenizer.num_image_tokens

# %% [markdown]
# The prompt below does not say whether to name the color or the kind of the object. The model has to infer it from the
# example, a sentence about a box in the first image. (The bundled model was trained on such prompts with boxes, and
# only on those: without boxes, few-shot prompts do not work with it. The published model was trained on web pages
# with many images.)

# %%
pair = [demo_scenes()[name] for name in ("first.png", "second.png")]
files = [open_image(ROOT / "tiny" / name) for name in ("first.png", "second.png")]
two = torch.stack([preprocess_image(file, size) for file in files])
shown, asked_about = pair[0].things[0], pair[1].things[0]
print(f"first image: {shown.name}; second image: {asked_about.name}")
replies = {}
for example in (f"{shown.color}.", f"a {shown.kind}."):
    prompt = f"<image><grounding><phrase> It</phrase> is {example}"
    prompt += "<image><grounding><phrase> It</phrase> is"
    replies[example] = ask(prompt, [shown.box, asked_about.box], two).raw.strip()
    print(f"It is {example:10} ->  It is {replies[example]}")
assert len(set(replies.values())) == 2  # the answer depends on the example

# %% [markdown]
# The answer follows the example.
#
# ## Accuracy
#
# `choose_examples` takes one example of each task for each of 30 unseen scenes, if the scene has one.
# (`tiny/README.md` has a table for more scenes. `refer` here is expression to box, `describe box` is box to
# expression.) First, one example of each task:

# %%
examples = choose_examples(30, HELD_OUT + 20_000)
one_each = {example.task: example for _, example in examples}
for task in sorted(one_each):
    example = one_each[task]
    print(f"{task:20}{strip_tags(example.prompt)} ...{strip_tags(example.answer)}"[:99])

# %% [markdown]
# `score` returns a list of hits and misses: one entry for most answers, but one for each object in the scene for
# captions, and one for each matching object for phrases that match several. Boxes must overlap the correct one with
# IoU 0.5 or more. Phrases for absent objects ("ground absent") have no correct answer and are left out.

# %%
hits, misses = defaultdict(list), []
replies = answers(model, tokenizer, examples)
for (s, example), row in zip(examples, replies, strict=True):
    if example.task != "ground absent":
        found = score(example, tokenizer.decode(row.ids), s)
        hits[example.task] += found
        if not all(found):
            misses.append((s, example, row))
accuracy = {task: sum(h) / len(h) for task, h in sorted(hits.items())}
table([(task, f"{a:.2f}", len(hits[task])) for task, a in accuracy.items()], ("task", "accuracy", "of"))
assert accuracy["ground"] > 0.5 and accuracy["kind in box"] > 0.3
assert accuracy["color of box"] >= accuracy["kind in box"]

# %% [markdown]
# A random guess among 30 kinds of drawings is correct about 3% of the time. Kinds, many of which differ only in
# details, are usually harder than colors; on these sharp drawings, both are easy. (With so few examples per row,
# small differences mean nothing.)
#
# ## Failures
#
# Up to five of the misses, with the correct answers:

# %%
for _, example, row in random.Random(1).sample(misses, min(5, len(misses))):
    print(f"[{example.task}] {example.prompt}")
    print(f"   model    {tokenizer.decode(row.ids)}")
    print(f"   correct  {example.answer}\n")

# %% [markdown]
# Below is a caption with an error, if there is one: first the correct caption, then the model's. If a box is on an
# object and only its name is wrong, the model has found the object but not recognized it. If the two captions are
# equal, a box overlaps its object too little.

# %%
for s, example, row in [miss for miss in misses if miss[1].task == "caption"][:1]:
    correct_caption, correct_entities = parse(example.prompt + example.answer)
    prompt = encode_example(tokenizer, example)[0]
    caption, entities = tokenizer.parse_output(prompt, row.ids, row.probabilities)
    print("correct:", correct_caption, "\nmodel:  ", caption)
    correct = Answer(correct_caption, "", correct_entities)
    show_answers(s.draw(336), correct, Answer(caption, "", entities))

# %% [markdown]
# ## Exercises
#
# Predict, then run. Answers are in `answers.py`.
#
# 1. Ground something that is not there. What happens to the score?
# 2. Put the example after the question: the first image and its sentence last. Does it still work?
# 3. Which task gets worse first when images have fewer pixels (draw at 28 pixels)? Measure with `score`.
# 4. `score` compares answers to questions letter by letter. Find a correct answer that is scored as a miss.
