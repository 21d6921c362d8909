# %% [markdown]
# # 11. Fine-tuning on your own boxes
#
# A model can learn a new kind of object from a file of images, captions and boxes. Here we teach the bundled model to
# recognize ladders. For the official weights, the recipe is similar. (Reading time: 15 minutes.)
#
# `Scene`, `Thing` (an object in a scene), `article` and `overlap` come from `training/scenes.py`, which draws the
# images that the bundled model was trained on.

# %%
from figures import ROOT, show_image, table  # isort: skip
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from kosmos2 import Kosmos2, Kosmos2Config, open_image, pad_left, preprocess_image
from load_weights import load_checkpoint
from tokenizer import PROMPTS, iou, parse
from training.data import grit_to_text
from training.scenes import Scene, Thing, article, overlap

print("the prompt that we will ask with:", PROMPTS["caption"])

# %% [markdown]
# ## The data
#
# A ladder has two rails and some rungs. We add one to scenes with a single object, where there is room.


# %%
def draw_ladder(image: Image.Image, box: tuple, rng: random.Random) -> None:
    pen = ImageDraw.Draw(image)
    left, top, right, bottom = (v * side for v, side in zip(box, image.size * 2, strict=True))
    brown = (rng.randint(110, 170), rng.randint(60, 100), 40)
    width = max(2, round(0.15 * (right - left)))
    rungs = rng.randint(4, 6)
    for i in range(rungs):
        y = top + (i + 0.5) / rungs * (bottom - top)
        pen.line([left, y, right, y], fill=brown, width=width)
    for x in (left + width / 2, right - width / 2):
        pen.line([x, top, x, bottom], fill=brown, width=width)


ladder = Image.new("RGB", (60, 150), "white")
draw_ladder(ladder, (0.1, 0.05, 0.9, 0.95), random.Random(0))
show_image(ladder, "A drawing of a brown ladder.")


# %% [markdown]
# The caption and the boxes are written in the format of GRIT: for each phrase the range of its characters in the
# caption (the end is exclusive), its box (x1, y1, x2, y2) in 0..1, and a score (boxes with a score below 0.65 are
# dropped, as in the original training).
#
# Training teaches the model to write exactly these captions. So they must begin with the prompt that you will use,
# here "An image of".


# %%
def write_record(thing: Thing, ladder: tuple) -> dict:
    beginning = "An image of "
    name = f"{article(thing.name)} {thing.name}"
    caption = f"{beginning}{name} and a ladder."
    start, end = len(beginning), len(beginning + name)
    spans = [[start, end, *thing.box, 1.0]]
    spans.append([caption.index("a ladder"), len(caption) - 1, *ladder, 1.0])
    return {"caption": caption, "ref_exps": spans}


record = write_record(Scene.random(3_000_000_001).things[0], (0.6, 0.3, 0.75, 0.8))
for start, end, *_ in record["ref_exps"]:
    print(record["caption"][start:end])


# %% [markdown]
# An example: such a scene with a ladder.


# %%
def example(seed: int) -> tuple[Image.Image, dict] | None:
    """An image and its record; None if there is no room for a ladder."""
    scene, rng = Scene.random(seed), random.Random(seed)
    width, height = rng.uniform(0.12, 0.2), rng.uniform(0.35, 0.6)
    x, y = rng.uniform(0.02, 0.98 - width), rng.uniform(0.02, 0.98 - height)
    box = (x, y, x + width, y + height)
    if len(scene.things) != 1 or overlap(box, scene.things[0].box, 0.02):
        return None
    image = scene.draw(240)
    draw_ladder(image, box, rng)
    return image, write_record(scene.things[0], box)


possible = sum(example(seed) is not None for seed in range(2_900_000_000, 2_900_000_100))
print(f"{possible} of 100 scenes have one object and room for a ladder")

# %% [markdown]
# 300 examples to learn from, and 40 others to measure on.

# %%
examples = []
seed = 3_000_000_000
while len(examples) < 340:
    made = example(seed)
    seed += 1
    if made is not None:
        examples.append(made)
held_out = examples[:40]

folder = Path(tempfile.mkdtemp())
with open(folder / "grit.jsonl", "w") as lines:
    for i, (image, record) in enumerate(examples[40:]):
        image.save(folder / f"{i}.png")
        lines.write(json.dumps({"image": f"{i}.png", **record}) + "\n")
print(json.dumps(examples[0][1]))

# %% [markdown]
# ## Before
#
# For each held-out image: does the caption name the ladder, with a box of IoU 0.5? And the other object?


# %%
def is_found(entities: list, record: dict, span: list) -> bool:
    start, end, *box, _ = span
    phrase = record["caption"][start:end]
    named = [found for entity in entities if entity.phrase == phrase for found in entity.boxes]
    return any(iou(found, box) >= 0.5 for found in named)


record = held_out[0][1]
_, entities = parse(grit_to_text(record))  # as if the model had written the record
print([is_found(entities, record, span) for span in record["ref_exps"]])
assert all(is_found(entities, record, span) for span in record["ref_exps"])

# %% [markdown]
# The share of all held-out images, from one batch of captions:


# %%
def accuracy(model, tokenizer) -> list[float]:
    """The share of (other objects, ladders) that captions name and box."""
    pixels = torch.stack([preprocess_image(image, model.config.vision.image_size) for image, _ in held_out])
    prompt = tokenizer.encode_prompt(PROMPTS["caption"])
    tokens, image_mask, _ = pad_left([prompt] * len(held_out))
    answers = model.generate(tokens, pixels, image_mask=image_mask, max_new_tokens=40)
    hits = torch.zeros(2)
    for ids, (_, record) in zip(answers, held_out, strict=True):
        _, entities = tokenizer.parse_output(prompt[0], ids)
        hits += torch.tensor([is_found(entities, record, span) for span in record["ref_exps"]])
    return (hits / len(held_out)).tolist()


model, tokenizer = load_checkpoint(ROOT / "tiny")
before = accuracy(model, tokenizer)
print(f"other objects {before[0]:.2f}, ladders {before[1]:.2f}")
assert before[1] == 0  # it has never seen the word

# %% [markdown]
# ## The command
#
# We use a lower learning rate than the default (6e-4 instead of 2e-3) and few steps, so that the model learns something
# new without forgetting the old. (No old drawings are needed here, since each image has an old object, too.) The
# optimizer is AdamW, because Muon, the default of `train.py`, is meant for training from scratch. We train every part,
# since the model is small. Larger models need a lower learning rate. 100 steps of 16 images show each of the 300 images
# about five times.

# %%
command = f"-m training.train --checkpoint tiny --data {folder}/grit.jsonl --out {folder}/run"
command += " --steps 100 --batch 16 --lr 6e-4 --optimizer adamw"
done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
assert done.returncode == 0, done.stderr
curve = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
print(*curve, sep="\n")

# %% [markdown]
# ## After

# %%
tuned, _ = load_checkpoint(folder / "run")
after = accuracy(tuned, tokenizer)
rows = [("before", *map("{:.2f}".format, before)), ("after", *map("{:.2f}".format, after))]
table(rows, ("", "other objects named and boxed", "ladders named and boxed"))
assert after[1] > 0.5 and after[0] > before[0] - 0.15

# %% [markdown]
# All or nearly all ladders are found now, and most of the other objects still are. One of the held-out images, with
# the answer of the fine-tuned model:

# %%
held_out[0][0].save(folder / "ladder.png")
command = f"sample.py {folder}/ladder.png --checkpoint {folder}/run --json --output {folder}/answer.png"
done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
answer = json.loads(done.stdout)
print(answer["text"])
for entity in answer["entities"]:
    print(entity["phrase"], [round(v, 3) for v in entity["boxes"][0]])
show_image(open_image(folder / "answer.png"), "The image with the boxes of its caption.", width=300)

# %% [markdown]
# ## The official size
#
# [`training/README.md`](../training/README.md) has the command; compared with this one, it has a lower learning rate,
# more steps, larger batches and `--train resampler decoder`. How much memory does it take? Weights and gradients take
# 4 bytes per parameter each, AdamW's two moments 8 more. Frozen parts need only their weights.

# %%
with torch.device("meta"):
    official = Kosmos2(Kosmos2Config())
total = sum(p.numel() for p in official.parameters())
for trained in (["vision", "resampler", "decoder"], ["resampler", "decoder"], ["resampler"]):
    count = sum(p.numel() for name in trained for p in getattr(official, name).parameters())
    gigabytes = (4 * total + 12 * count) / 1e9
    print(f"--train {' '.join(trained):<26} {count / 1e6:>7,.0f} M trained, {gigabytes:5.1f} GB")

# %% [markdown]
# Activations need additional memory; `--recompute` keeps only those between blocks, and `--accumulate` computes a batch
# in parts. With a few hundred images, freeze the ViT (`--train resampler decoder`): it was pretrained on far more
# images than you have, and the released training code of Kosmos-2 freezes it, too. For a new kind of image, such as
# X-rays, train it as well. Measure the old abilities as well as the new one on held-out images, as above.
#
# ## Exercises
#
# 1. Train only the resampler (`--train resampler`). Can it learn the ladder? The word?
# 2. All captions follow one template. What does the fine-tuned model answer to `--task ground --text "a ladder"`?
# 3. What happens to other tasks, such as counting? Measure it with `python -m training.evaluate --checkpoint RUN`
#    (`print(folder / "run")` shows RUN; start the command in the root of the repository).
