# %% [markdown]
# # 7. Tasks: one model, many questions
#
# Captions, finding, describing, answering, examples in the prompt: all of them are prompts. Here each is tried
# on fresh scenes that the model never saw, with the raw text beside the cleaned one, and with its failures.

# %%
from figures import ROOT, show_image, table  # isort: skip
import random
from collections import defaultdict

import torch
from evaluate import HELD_OUT, answers, ask_about, encode_example, iou, score
from scenes import Scene, resolve

from kosmos2 import pad_left, preprocess_image, rank_boxes
from load_weights import load_checkpoint
from sample import draw_answers
from tokenizer import parse, tokens_to_box

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
scene = Scene.random(HELD_OUT + 77)
picture = scene.draw(448)
pixels = preprocess_image(picture, model.config.vision.image_size)[None]
print("in the scene:", ", ".join(s.name for s in scene.shapes))


def ask(prompt: str, *pictures, boxes=None) -> str:
    """The continuation of a prompt about this scene (or about these pictures), as tagged text."""
    shown = pictures or (pixels,)
    ids, mask = tokenizer.encode_prompt(prompt, len(shown), boxes)
    return tokenizer.decode(model.generate(torch.tensor([ids]), torch.cat(shown), None, torch.tensor([mask]), max_new_tokens=100)[0])


# %% [markdown]
# ## Raw and cleaned

# %%
for prompt in (
    "<grounding>An image of", "An image of", "<grounding>Describe this image in detail:",
    "Question: How many shapes are there? Answer:", "<grounding> Question: How many shapes are there? Answer:",
):  # fmt: skip
    raw = ask(prompt)
    print(f"prompt   {prompt}\nraw      {raw}\ncleaned  {parse(raw)[0]}\n")

# %% [markdown]
# ## There and back
#
# A box in the prompt gives words (referring expression generation); words give a box (comprehension). If the
# words single the shape out, the second undoes the first. Predict: which shapes have a name of their own, and
# for which must the model say more than colour and shape?

# %%
rows = []
for shape in scene.shapes:
    words = ask("<grounding><phrase> It</phrase> is", boxes=[shape.box]).strip(" .")
    entities = parse(ask(f"<grounding><phrase> {words}</phrase>"))[1]
    back = max((iou(b, shape.box) for e in entities for b in e.boxes), default=0)
    meant = resolve(words, scene)
    rows.append((shape.name, words, "yes" if meant == [shape] else "no", f"{back:.2f}"))
table(rows, ("shape", "the model's words for its box", "unambiguous?", "IoU of the way back"))

# %% [markdown]
# ## Ranked boxes
#
# An ambiguous phrase has several right answers. A beam over the two location tokens gives the likeliest boxes:

# %%
prefix = tokenizer.encode_prompt("<grounding><phrase> a shape</phrase><object>")
tokens, mask, _ = pad_left([prefix])
state = model.start(tokens, pixels, image_mask=mask, max_new_tokens=2)
ranked = rank_boxes(state, range(tokenizer.first_location, tokenizer.vocab_size), 4)
for rank, (p, ul, lr) in enumerate(ranked, start=1):
    box = tokens_to_box(ul, lr)
    nearest = max(scene.shapes, key=lambda s, box=box: iou(s.box, box))
    print(f"{rank}. score {p:.3f}  IoU {iou(nearest.box, box):.2f} with the {nearest.name}")

# %% [markdown]
# ## Two pictures: an example says what is asked
#
# Nothing in the prompt says "color" or "shape". The first picture and what is said about its box are the only
# hint. This is in-context learning, of a small kind: the bundled model saw such prompts in training.

# %%
other = Scene.random(HELD_OUT + 50)
first = preprocess_image(other.draw(), model.config.vision.image_size)[None]
shown, asked = other.shapes[0], scene.shapes[-1]
print(f"shown: {shown.name}; asked about: {asked.name}")
for said in (f"{shown.color}.", f"a {shown.shape}."):
    prompt = f"<image><grounding><phrase> It</phrase> is {said}<image><grounding><phrase> It</phrase> is"
    print(f"  “It is {said}” …  “It is {ask(prompt, first, pixels, boxes=[shown.box, asked.box]).strip()}”")

# %% [markdown]
# ## Counting hits
#
# One question of each kind for each of 40 scenes. (`tiny/evaluate.py` asks 500; its table is in
# `tiny/README.md`.)

# %%
examples = ask_about(40, HELD_OUT + 20_000)
hits = defaultdict(list)
misses = []
for (s, example), reply in zip(examples, answers(model, tokenizer, examples), strict=True):
    found = score(example, tokenizer.decode(reply), s)
    hits[example.task] += found
    if not all(found):
        misses.append((example, tokenizer.decode(reply), s))
table([(task, f"{sum(h) / len(h):.2f}", len(h)) for task, h in sorted(hits.items())], ("task", "hits", "of"))

# %% [markdown]
# ## What it gets wrong
#
# A demonstration without its failures would teach the wrong thing. Some of the misses above, with what would
# have been right:

# %%
for example, reply, _ in random.Random(1).sample(misses, min(5, len(misses))):
    print(f"[{example.task}] {parse(example.prompt)[0]}\n   said  {parse(reply)[0]}\n   right {parse(example.answer)[0]}\n")

# %% [markdown]
# And one of them with its boxes, to see whether it is the eye or the tongue that failed:

# %%
if worst := next((m for m in misses if m[0].task == "caption"), None):
    example, reply, s = worst
    caption, entities = tokenizer.read(encode_example(tokenizer, example)[0], tokenizer.encode_caption(reply))
    print("right:", parse(example.prompt + example.answer)[0])
    show_image(draw_answers(s.draw(336), [{"text": caption, "entities": entities}]), "A scene with the model's boxes and its caption, in which something is wrong.", width=340)

# %% [markdown]
# ## Exercises
#
# 1. Ask about something that is not there ("the black heart"). What does the model do? What do its scores do?
# 2. Give the example picture last and the question first. Does it still work?
# 3. Which task gets worse first when the picture is made smaller (draw at 56 and resize)? Measure with `score`.
# 4. `score` wants answers letter by letter. Find a reply that is right, but counts as a miss.
