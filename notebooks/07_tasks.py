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
from evaluate import HELD_OUT, answers, ask_about, encode_example, score
from scenes import Scene, resolve

from kosmos2 import pad_left, preprocess_image
from load_weights import load_checkpoint
from sample import draw_answers
from tokenizer import iou, parse, tokens_to_box

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
scene = Scene.random(HELD_OUT + 28)
picture = scene.draw(448)
pixels = preprocess_image(picture, model.config.vision.image_size)[None]
print("in the scene:", ", ".join(s.name for s in scene.shapes))
show_image(
    picture,
    "Two yellow stars, a large one at the lower left and a small one at the top, a small green moon and a small white star.",
    width=200,
)


def ask(prompt: str, *pictures, boxes=None) -> str:
    """The continuation of a prompt about this scene (or about these pictures), as tagged text."""
    shown = pictures or (pixels,)
    ids, mask = tokenizer.encode_prompt(prompt, len(shown), boxes)
    return tokenizer.decode(
        model.generate(torch.tensor([ids]), torch.cat(shown), None, torch.tensor([mask]), max_new_tokens=100)[
            0
        ]
    )


# %% [markdown]
# ## Raw and cleaned

# %%
moon = scene.shapes[1]
for prompt, boxes in (
    ("<grounding>An image of", None), ("An image of", None), ("<grounding>Describe this image in detail:", None),
    ("Question: How many shapes are there? Answer:", None), ("<grounding> Question: Where is the moon? Answer:", None),
    ("<grounding> Question: What color is<phrase> it</phrase>? Answer:", [moon.box]),
):  # fmt: skip
    raw = ask(prompt, boxes=boxes)
    print(f"prompt   {prompt}\nraw      {raw}\ncleaned  {parse(raw)[0]}\n")

# %% [markdown]
# (The last prompt is about a box: `encode_prompt` puts the box's two tokens behind "it". And there are four shapes,
# whatever it says: counting is one of its weak points.)
#
# ## There and back
#
# A box in the prompt gives words (referring expression generation); words give a box (comprehension). If the
# words single the shape out, the second undoes the first. Predict: which shapes have a name of their own, and
# for which must the model say more than colour and shape? (A rule-based reader judges whether it did.)

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
# An ambiguous phrase has several right answers. A beam over the two location tokens gives the likeliest boxes: the
# 32 likeliest upper left corners, for each all lower right ones, ranked by the square root of the product of both
# probabilities; of boxes that overlap by half only the best is kept. "A shape" fits all four here, but the first
# place takes most of the probability, and below it there are mixtures of two shapes' corners:

# %%
prefix = tokenizer.encode_prompt("<grounding><phrase> a shape</phrase><object>")
tokens, mask, _ = pad_left([prefix])
state = model.start(tokens, pixels, image_mask=mask, max_new_tokens=2)
ranked = tokenizer.rank_boxes(state, 4)
for rank, (p, ul, lr) in enumerate(ranked, start=1):
    box = tokens_to_box(ul, lr)
    nearest = max(scene.shapes, key=lambda s, box=box: iou(s.box, box))
    print(f"{rank}. score {p:.3f}  IoU {iou(nearest.box, box):.2f} with the {nearest.name}")

# %% [markdown]
# ## Two pictures: an example says what is asked
#
# Nothing in the prompt says "color" or "shape". The first picture and what is said about its box are the only
# hint. This is in-context learning, of a small kind: the bundled model saw such prompts in training. In the text
# `<image>` stands for a whole picture; in the tokens it opens Q slots, and `</image>` closes them. `pixels` are in
# the order in which the pictures are read.

# %%
ids, mask = tokenizer.encode_prompt("<image> red.<image>", 2)
opening = [(t, tokenizer.tokens[i]) for t, (i, m) in enumerate(zip(ids, mask, strict=True)) if not m]
print(f"{len(ids)} positions, {sum(mask)} slots; the others: {opening}")

# %%
other = Scene.random(HELD_OUT + 50)
first = preprocess_image(other.draw(), model.config.vision.image_size)[None]
shown, asked = other.shapes[0], scene.shapes[1]
print(f"shown: {shown.name}; asked about: {asked.name}")
for said in (f"{shown.color}.", f"a {shown.shape}."):
    prompt = f"<image><grounding><phrase> It</phrase> is {said}<image><grounding><phrase> It</phrase> is"
    print(f"  “It is {said}” …  “It is {ask(prompt, first, pixels, boxes=[shown.box, asked.box]).strip()}”")

# %% [markdown]
# ## Counting hits
#
# One question of each kind for each of 40 scenes, if the scene has any (a relation wants a shape on that side). A
# caption counts once for each shape it should name. (`tiny/evaluate.py` asks 500; its table is in
# `tiny/README.md`.) First an example of each kind:

# %%
examples = ask_about(40, HELD_OUT + 20_000)
kinds = {example.task: example for _, example in examples}
for task in sorted(kinds):
    print(f"{task:22}{parse(kinds[task].prompt)[0]} …{parse(kinds[task].answer)[0]}"[:130])

# %%
hits = defaultdict(list)
misses = []
for (s, example), reply in zip(examples, answers(model, tokenizer, examples), strict=True):
    found = score(example, tokenizer.decode(reply), s)
    hits[example.task] += found
    if not all(found):
        misses.append((example, tokenizer.decode(reply), s))
table([(task, f"{sum(h) / len(h):.2f}", len(h)) for task, h in sorted(hits.items())], ("task", "hits", "of"))

# %% [markdown]
# The weakest, "example of a picture", is two pictures without boxes: a list of colours or of shapes or a number is
# said of the first, and the same kind of thing is wanted for the second. It must find out what is asked *and* read
# the whole second picture, and one wrong word is a miss.
#
# ## What it gets wrong
#
# A demonstration without its failures would teach the wrong thing. Some of the misses above, with what would
# have been right:

# %%
for example, reply, _ in random.Random(1).sample(misses, min(5, len(misses))):
    print(
        f"[{example.task}] {example.prompt}\n   said  {parse(reply)[0]}\n   right {parse(example.answer)[0]}\n"
    )

# %% [markdown]
# And one of them with its boxes. Is it the eye that failed, or the tongue? If a box is where a shape is and only its
# name is wrong, the model saw that something was there, and where; what failed was to make out, or to say, what it is:

# %%
if worst := next((m for m in misses if m[0].task == "caption"), None):
    example, reply, s = worst
    caption, entities = tokenizer.read(encode_example(tokenizer, example)[0], tokenizer.encode_caption(reply))
    print("right:", parse(example.prompt + example.answer)[0])
    show_image(
        draw_answers(s.draw(336), [{"text": caption, "entities": entities}]),
        "A scene with the model's boxes and its caption, in which something is wrong.",
        width=340,
    )

# %% [markdown]
# ## Exercises
#
# 1. Ask about something that is not there ("the black heart"). What does the model do? What do its scores do?
# 2. Give the example picture last and the question first. Does it still work?
# 3. Which task gets worse first when the picture is made smaller (draw at 28 and resize)? Measure with `score`.
# 4. `score` wants answers letter by letter. Find a reply that is right, but counts as a miss.
