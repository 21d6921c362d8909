# %% [markdown]
# # 5. Generation: the cache, the choice of tokens, and rules
#
# The decoder gives a distribution over the next token. What remains: not to compute the same thing again at
# every step, to choose, and to see to it that what comes out is whole.

# %%
from figures import ROOT, plt, reference, show, table  # isort: skip
import math

import torch
from PIL import Image

from kosmos2 import pad_left, preprocess_image, repeated_ngrams, sample, token_positions
from load_weights import load_checkpoint
from tokenizer import parse

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
picture = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(picture, model.config.vision.image_size)[None]
image_embeds = model.encode_image(pixels)
ids, image_mask = tokenizer.encode_prompt("<grounding>Describe this image in detail:")
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])
T = len(ids)


def generate(**options):
    return model.generate(tokens, None, image_embeds, mask, max_new_tokens=110, **options)[0]


# %% [markdown]
# ## The key-value cache
#
# A new token attends to the keys and values of all earlier ones, and these never change: causal attention
# lets nothing flow backwards. So we keep them. By hand, without a cache: read the whole sequence again for
# every token. The ids must be the same.

# %%
sequence, steps = list(ids), 12
for _ in range(steps):
    row = torch.tensor([sequence])
    slots = torch.tensor([image_mask + [False] * (len(sequence) - T)])
    sequence.append(int(model(row, image_embeds=image_embeds, image_mask=slots)[0, -1].argmax()))
assert sequence[T:] == generate()[:steps]

# %% [markdown]
# What does it save? The number of positions that go through the decoder for n new tokens after a prompt of T:
# with a cache T + n - 1; without, T + (T + 1) + ... + (T + n - 1).

# %%
n = 100
with_cache, without = T + n - 1, sum(range(T, T + n))
print(
    f"prompt {T}, {n} new tokens: {with_cache} positions with a cache, {without} without: {without / with_cache:.0f} times as many"
)

fig, axis = plt.subplots(figsize=(6, 2.8))
new = range(1, 200)
axis.plot(new, [T + k - 1 for k in new], label="with a cache")
axis.plot(new, [sum(range(T, T + k)) for k in new], label="without")
axis.set(xlabel="new tokens", ylabel="positions computed", title="work for a caption")
axis.legend(frameon=False)
show(
    fig,
    "Two curves: with a cache the number of positions hardly leaves the axis, without one it grows with the square of the length.",
)

# %% [markdown]
# Its price is memory: 2 tensors x layers x D numbers for every position.

# %%
state = model.start(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=n)
held = sum(c.keys.nbytes + c.values.nbytes for c in state.caches)
text = model.config.text
assert held == 2 * text.layers * text.width * 4 * (T + n - 1)
print(f"{held / 2**20:.2f} MiB for {T + n - 1} positions")

# %% [markdown]
# ## Rows of different lengths
#
# A batch is a rectangle, so shorter prompts are filled up, and on the *left*: every row goes on at its right end.
# Then two things must be said: positions count only what is real, so that a row's first token is at 2 wherever it
# stands; and nobody looks at padding. With both, a row is answered as it is alone:

# %%
asked = [
    tokenizer.encode_prompt(p)
    for p in ("Question: How many shapes are there? Answer:", "<grounding>Describe this image in detail:")
]
rows, slots, pads = pad_left(asked)
print(
    "padding in front:",
    pads.sum(dim=1).tolist(),
    " first positions:",
    token_positions(rows, pads)[:, :6].tolist(),
)
both = model.generate(rows, None, image_embeds.expand(2, -1, -1), slots, pads, max_new_tokens=8)
alone = [
    model.generate(torch.tensor([i]), None, image_embeds, torch.tensor([m]), max_new_tokens=8)[0]
    for i, m in asked
]
assert both == alone
for row, lone in zip(both, alone, strict=True):
    torch.testing.assert_close(
        torch.tensor(row.probabilities), torch.tensor(lone.probabilities), rtol=1e-4, atol=1e-5
    )

# %% [markdown]
# transformers 5.23 does it right while it reads the prompts. With the first new token it counts positions from the
# length of the cache, padding included, and a padded row's positions jump. Its text changes a little, and nobody
# notices:

# %%
theirs = reference()


def their_logits(rows, slots, pads):
    out = theirs.generate(
        input_ids=rows, image_embeds=image_embeds.repeat(len(rows), 1, 1), image_embeds_position_mask=slots.long(),
        attention_mask=(~pads).long(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return torch.stack(out.logits)[:, int(pads.sum(1).argmax())]  # (steps, V), of the row with padding


short = int(pads.sum(1).argmax())
lone = [torch.tensor([v]) for v in asked[short]]
change = their_logits(rows, slots, pads) - their_logits(*lone, torch.zeros_like(lone[1]))
table(
    [(step, f"{float(row.abs().max()):.4f}") for step, row in enumerate(change)],
    ("step", "transformers: change of a logit by padding"),
)

# %% [markdown]
# ## Choosing: greedy, temperature, top-k, top-p
#
# Greedy takes the likeliest token. Sampling at temperature τ draws from softmax(logits / τ). Top-p keeps the
# fewest tokens whose probabilities reach p: *including* the one that crosses p. If that one were left out, a
# first token with p = 0.95 would be dropped at top-p 0.9, and nothing would remain.
#
# A toy distribution, and how often each token is drawn:

# %%
toy = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()
draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
rows = []
for name, options in (
    ("temperature 1", (1.0, None, None)), ("temperature 0.5", (0.5, None, None)), ("temperature 2", (2.0, None, None)),
    ("top-k 2", (1.0, 2, None)), ("top-p 0.8", (1.0, None, 0.8)), ("greedy", (0.0, None, None)),
):  # fmt: skip
    drawn = sample(toy.expand(len(draws), -1), *options, draws)
    rows.append((name, *(f"{v:.3f}" for v in drawn.bincount(minlength=5) / len(draws))))
table(rows, ("", *"ABCDE"))
expected = toy.exp()[:3] / toy.exp()[:3].sum()  # 0.5 + 0.25 < 0.8, so C crosses and stays
print("predicted for top-p 0.8:", [round(v, 3) for v in expected.tolist()])

# %% [markdown]
# One uniform number a token is all the randomness there is: `sample` inverts the cumulative distribution. With
# a seed, every row of a batch draws the numbers it would draw alone, so its text does not depend on the batch.
# (This model is so sure of its words that only a high temperature makes it say something else.)

# %%
for name, options in (
    ("greedy", {}),
    ("τ = 1", dict(temperature=1.0, seed=1)),
    ("τ = 3", dict(temperature=3.0, seed=1)),
):
    print(f"{name:7}", parse(tokenizer.decode(generate(**options)))[0][:150])

# %% [markdown]
# ## Beams
#
# Greedy can paint itself into a corner: the likeliest first word need not begin the likeliest sentence. A beam
# search keeps the K best beginnings. Texts of different lengths are compared by the mean log-probability of
# their tokens; a row is done when K texts have ended and the best running one is no better than the worst of these.
# It costs K times the arithmetic and K times the cache (but each step still reads the weights only once), and for a
# model as sure as this one it gains next to nothing:

# %%
rows = []
for beams in (1, 2, 4):
    found = generate(num_beams=beams)
    mean = sum(map(math.log, found.probabilities)) / len(found)
    rows.append((beams, len(found), f"{mean:.4f}"))
table(rows, ("beams", "tokens", "mean log-probability"))

# %% [markdown]
# ## The 3-gram block
#
# The published model is used with a rule: no three tokens in a row may come twice. It keeps a small model from
# going round in circles. It also forbids things that are right. What does it forbid next, here?

# %%
told = tokenizer.encode("<grounding> a red star and a red", add_bos=False)
print("after 'a red star and a red' no:", [tokenizer.tokens[i] for i in repeated_ngrams(told, 3)])
free, blocked = generate(), generate(no_repeat_ngram_size=3)
first = next((t for t, (a, b) in enumerate(zip(free, blocked, strict=False)) if a != b), None)
if first is not None:
    print("free:   ", [tokenizer.tokens[i] for i in free[max(0, first - 3) : first + 2]])
    print("blocked:", [tokenizer.tokens[i] for i in blocked[max(0, first - 3) : first + 2]])

# %% [markdown]
# It said "large green" before and may not again, although there are two such shapes. And tags are tokens like all others:

# %%
listed = "<grounding><phrase> a red star</phrase><object><patch_index_0661><patch_index_0927></object>,"
listed += "<phrase> a blue moon</phrase><object><patch_index_0546><patch_index_0907></object>,"
for told in (listed, listed + "<phrase> the star</phrase><object><patch_index_0661>"):
    ending = tokenizer.encode(told, add_bos=False)
    print(
        "after",
        [tokenizer.tokens[i] for i in ending[-2:]],
        "no:",
        [tokenizer.tokens[i] for i in repeated_ngrams(ending, 3)],
    )

# %% [markdown]
# The third thing of a list may not be linked in the way of the second, and no box may be given twice: the rule
# forces a wrong corner. The bundled model's config says 0; `sample.py` follows the checkpoint.
#
# ## Boxes that are always whole
#
# `Tokenizer.well_formed` names the tokens that keep the markup valid; a generation can be held to it. What may come
# after each part of a link? (Cell 661 is column 21 of row 20: a lower right corner is in one of the 12 rows from there
# on, and one of the 11 columns.)

# %%
link, rows = "<phrase> a star</phrase><object><patch_index_0661><patch_index_0927></object>", []
tags = range(tokenizer.first_location - 11, tokenizer.first_location)
for end in ("<phrase>", " a star", "</phrase>", "<object>", "<patch_index_0661>", "<patch_index_0927>"):
    allowed = tokenizer.well_formed(tokenizer.encode(link[: link.index(end) + len(end)]), 50)
    named = [tokenizer.tokens[i] for i in tags if allowed[i]]
    shown = " ".join(named) if len(named) < 3 else f"{len(named)} tags"
    rows.append((end.strip(), int(allowed[4 : tags[0] - 1].sum()), int(allowed[tags[-1] + 1 :].sum()), shown))
table(rows, ("after", "words", "locations", "tags"))
assert rows[4][2] == 12 * 11

# %% [markdown]
# A model that is well-formed by itself writes what it would write anyway. And one that is dizzy (τ = 2)?

# %%
assert generate() == generate(constraint=tokenizer.well_formed)
rows = []
for seed in (1, 2, 3):
    for name, rule in (("free", None), ("held to markup", tokenizer.well_formed)):
        raw = tokenizer.decode(generate(temperature=2.0, seed=seed, constraint=rule))
        rows.append(
            (
                seed,
                name,
                raw.count("<object>"),
                raw.count("</object>"),
                sum(len(e.boxes) for e in parse(raw)[1]),
            )
        )
table(rows, ("seed", "", "<object>", "</object>", "boxes that can be read"))

# %% [markdown]
# ## Many questions, one reading
#
# The cache of a prompt can be kept, too. `past` is a generation that has read the picture and written
# nothing; questions go on from there.

# %%
head, head_mask = tokenizer.encode_prompt("", 1)
past = model.start(
    torch.tensor([head]), image_embeds=image_embeds, image_mask=torch.tensor([head_mask]), max_new_tokens=0
)
for question in ("How many shapes are there?", "What color is the star?", "Where is the moon?"):
    rest = tokenizer.encode_prompt(f"Question: {question} Answer:")[0][len(head) :]
    answer = model.start(torch.tensor([rest]), past=past, max_new_tokens=8).finish()[0]
    print(
        f"{question:28}{tokenizer.decode(answer)}   ({len(rest)} positions instead of {len(head) + len(rest)})"
    )

# %% [markdown]
# ## Exercises
#
# 1. `sample` never draws a token of probability zero. Which line sees to that, and what could go wrong at
#    u = 0?
# 2. A running text could still get better than one that has ended. May a beam search miss it? Find the condition
#    in `beam_search`.
# 3. The image slots hold the ids 4, 5, 6, ... Why not the same id in all of them? (Think of the 3-gram block.)
# 4. How much memory does `num_beams=4` take, and when is it taken?
