# %% [markdown]
# # 5. Generation: cache, sampling and constraints
#
# The decoder returns a distribution over the next token. This notebook is about the rest: the cache, padding,
# sampling, beams, and constraints on the output. (Reading time: 35 minutes.)

# %%
from figures import ROOT, plt, reference, show, table  # isort: skip
import math

import torch
from PIL import Image

import kosmos2
from kosmos2 import decode, finish, pad_left, preprocess_image, sample, token_positions
from load_weights import load_checkpoint
from tokenizer import parse

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")

# %% [markdown]
# The running example is a detailed description of the bundled image.

# %%
image = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(image, model.config.vision.image_size)[None]
image_embeds = model.encode_image(pixels)
ids, image_mask = tokenizer.encode_prompt("<grounding>Describe this image in detail:")
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])
T = len(ids)


def generate(**options):
    return model.generate(tokens, None, image_embeds, mask, max_new_tokens=110, **options)[0]


# %% [markdown]
# ## The key-value cache
#
# A new token attends to the keys and values of all earlier tokens, and with causal attention these never change.
# So we keep them. By hand, without a cache: run the whole sequence for every token. The ids must be the same.

# %%
sequence, steps = list(ids), 12
for _ in range(steps):
    row = torch.tensor([sequence])
    slots = torch.tensor([image_mask + [False] * (len(sequence) - T)])
    sequence.append(int(model(row, image_embeds=image_embeds, image_mask=slots)[0, -1].argmax()))
assert sequence[T:] == generate()[:steps]

# %% [markdown]
# With the cache, the loop is: mask the logits, sample, append, step. Here it is without masks and with greedy
# choice; `decode` in `kosmos2.py` is the whole loop. `prefill` runs the prompt.

# %%
with torch.inference_mode():
    state = model.prefill(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=steps)
    for _ in range(steps - 1):
        token = int(state.logits[0].argmax())
        state.step([0], state.append([0], [token]))
assert state.sequences[0].ids == generate()[: steps - 1]
state = model.prefill(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=steps)
assert [new_ids[0] for new_ids in decode(state)] == generate()[:steps]

# %% [markdown]
# How much does the cache save? The number of positions that go through the decoder for n new tokens after a prompt
# of T tokens is T + n - 1 with a cache, and T + (T + 1) + ... + (T + n - 1) without.

# %%
n = 100
with_cache = T + n - 1
without = sum(range(T, T + n))
print(f"a prompt of {T} and {n} new tokens: {with_cache} positions with a cache")
print(f"{without} without, {without / with_cache:.0f} times as many")

# %%
fig, axis = plt.subplots(figsize=(6, 2.8))
new = range(1, 200)
axis.plot(new, [T + k - 1 for k in new], label="with a cache")
axis.plot(new, [sum(range(T, T + k)) for k in new], label="without")
axis.set(xlabel="new tokens", ylabel="positions computed", title="work for a caption")
axis.legend(frameon=False)
show(fig, "Two curves: with a cache, the work grows linearly, without one quadratically.")

# %% [markdown]
# It costs memory: 2 tensors x layers x D numbers per position.

# %%
state = model.prefill(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=n)
held = sum(c.keys.nbytes + c.values.nbytes for c in state.caches)
text = model.config.text
assert held == 2 * text.layers * text.width * 4 * (T + n - 1)
print(f"{held / 2**20:.2f} MiB for {T + n - 1} positions")

# %% [markdown]
# ## Rows of different lengths
#
# A batch is a rectangle, so shorter prompts are padded, on the *left*, because every row continues at its right end.
# Position ids count only real tokens, so the first one of each row is 2, and padding is masked. With both, a row has
# the same result as alone:

# %%
longer = "<grounding>Describe this image in detail:"
shorter = "Question: How many things are there? Answer:"
asked = [tokenizer.encode_prompt(prompt) for prompt in (longer, shorter)]
rows, slots, pads = pad_left(asked)
print("padding in front:", pads.sum(dim=1).tolist())
print("first positions:", token_positions(rows, pads)[:, :6].tolist())
two = image_embeds.expand(2, -1, -1)
both = finish(model.prefill(rows, None, two, slots, pads, max_new_tokens=8))

# %%
for (i, m), row in zip(asked, both, strict=True):
    tokens_alone, mask_alone = torch.tensor([i]), torch.tensor([m])
    state = model.prefill(tokens_alone, None, image_embeds, mask_alone, max_new_tokens=8)
    alone = finish(state)[0]
    assert alone.ids == row.ids
    p, q = torch.tensor(alone.probabilities), torch.tensor(row.probabilities)
    torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)

# %% [markdown]
# What does padding on the right break? Here are both prompts again, padded on the right. The next token follows the last
# column, and in the shorter row that is padding: its logits say nothing about the prompt.

# %%
short = int(pads.sum(dim=1).argmax())
padding = int(pads[short].sum())
right_rows, right_slots, right_pads = (t.clone() for t in (rows, slots, pads))
for t in (right_rows, right_slots, right_pads):
    t[short] = t[short].roll(-padding)
logits = model(right_rows, None, two, right_slots, right_pads)[short]
expected = model(rows, None, two, slots, pads)[short, -1]
print("best token in the last column:", tokenizer.id_to_token[int(logits[-1].argmax())])
print("best token after the prompt:  ", tokenizer.id_to_token[int(expected.argmax())])
torch.testing.assert_close(logits[-1 - padding], expected, rtol=1e-3, atol=1e-3)
assert not torch.allclose(logits[-1], expected, atol=1)

# %% [markdown]
# The logits at the end of the prompt are right, so `forward`, which training uses, accepts either side. `generate`
# raises an error for padding on the right.
#
# transformers 5.23 handles left-padded prompts correctly, but from the first new token on it counts positions from the
# length of the cache, padding included. So the positions of padded rows jump, and the logits change:

# %%
theirs = reference()


def their_logits(rows, slots, pads):
    out = theirs.generate(
        input_ids=rows,
        image_embeds=image_embeds.repeat(len(rows), 1, 1),
        image_embeds_position_mask=slots.long(),
        attention_mask=(~pads).long(),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(out.logits)[:, int(pads.sum(1).argmax())]  # (steps, V), of the padded row


# %%
lone_ids, lone_mask = (torch.tensor([v]) for v in asked[short])
lone = their_logits(lone_ids, lone_mask, torch.zeros_like(lone_mask))
change = (their_logits(rows, slots, pads) - lone).abs().amax(dim=-1)
table(list(enumerate(f"{c:.4f}" for c in change.tolist())), ("step", "largest change of a logit"))

# %% [markdown]
# ## Choosing: greedy, temperature, top-k, top-p
#
# Greedy decoding takes the most likely token. Sampling at temperature τ draws from softmax(logits / τ). Top-p keeps
# the smallest set of top tokens whose total probability is at least p, *including* the token that crosses p. Without
# that one, a first token of probability 0.95 would be dropped at top-p 0.9, and nothing would remain.
#
# A toy distribution, and how often each token is drawn:

# %%
toy = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()
draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
choices = {
    "temperature 1": (1.0, None, None),
    "temperature 0.5": (0.5, None, None),
    "temperature 2": (2.0, None, None),
    "top-k 2": (1.0, 2, None),
    "top-p 0.8": (1.0, None, 0.8),
    "greedy": (0.0, None, None),
}
rows = []
for name, options in choices.items():
    drawn = sample(toy.expand(len(draws), -1), *options, draws)
    rows.append((name, *(f"{v:.3f}" for v in drawn.bincount(minlength=5) / len(draws))))
table(rows, ("", *"ABCDE"))

# %% [markdown]
# With top-p 0.8, A and B together have 0.75, so C crosses and stays:

# %%
expected = toy.exp()[:3] / toy.exp()[:3].sum()
print("predicted for top-p 0.8:", [round(v, 3) for v in expected.tolist()])
assert abs(float(rows[4][1]) - float(expected[0])) < 0.02

# %% [markdown]
# `sample` inverts the cumulative distribution, with one uniform random number per token. With a seed, all rows of a
# batch share one random stream, so the result of a row does not depend on the batch.

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
# The most likely first token need not begin the most likely text. Beam search keeps the K best beginnings. Texts of
# different lengths are compared by the mean log-probability of their tokens; a prompt is done when K texts have ended
# and the best unfinished one is no better than the worst of these. It costs K times the arithmetic and K times the
# cache, but each step still reads the weights only once.

# %%
rows = []
for beams in (1, 2, 4):
    state = model.prefill(tokens, None, image_embeds, mask, max_new_tokens=110, num_beams=beams)
    found = finish(state)[0]
    mean = sum(map(math.log, found.probabilities)) / len(found.ids)
    rows.append((beams, len(found.ids), f"{mean:.4f}"))
table(rows, ("beams", "tokens", "mean log-probability"))

# %% [markdown]
# ## N-gram blocking
#
# The published model is used with a rule: no three tokens in a row may occur twice, prompt included. This prevents
# loops, but also forbids correct texts. After "a red star and a red", the token that completed the earlier 3-gram
# "a red star" is forbidden:

# %%
told = tokenizer.encode("<grounding> a red star and a red", add_bos=False)
forbidden = [tokenizer.id_to_token[i] for i in kosmos2.repeated_ngrams(told, 3)]
print(forbidden)
assert forbidden == ["▁star"]

# %% [markdown]
# Tags are tokens like all others. After the second link of a list and a comma, the rule forbids opening another:

# %%
star = "<phrase> a red star</phrase><object><patch_index_0661><patch_index_0927></object>"
moon = "<phrase> a blue moon</phrase><object><patch_index_0546><patch_index_0907></object>"
listed = f"<grounding>{star},{moon},"
ending = tokenizer.encode(listed, add_bos=False)
forbidden = [tokenizer.id_to_token[i] for i in kosmos2.repeated_ngrams(ending, 3)]
print("after", [tokenizer.id_to_token[i] for i in ending[-2:]], "forbidden:", forbidden)
assert forbidden == ["<phrase>"]

# %% [markdown]
# Also, no two links can start with the same top-left corner: `</phrase>`, `<object>` and the corner would repeat. The
# config of the bundled model turns the rule off; `sample.py` uses the setting of the checkpoint.
#
# ## Complete boxes
#
# `Tokenizer.allowed_tokens` returns the tokens that keep the markup valid; it is a constraint for generation. How
# many tokens are allowed after each part of a link? (Cell 661 is column 21 of row 20: a bottom-right corner is in one
# of the 12 rows from there on and one of the 11 columns.)

# %%
link = "<phrase> a star</phrase><object><patch_index_0661><patch_index_0927></object>"
first, grid = tokenizer.first_location, tokenizer.grid
ends = ("<phrase>", " a star", "</phrase>", "<object>", "<patch_index_0661>", "<patch_index_0927>")
rows = []
for end in ends:
    so_far = tokenizer.encode(link[: link.index(end) + len(end)])
    allowed = tokenizer.allowed_tokens(so_far, 50)
    named = [tokenizer.id_to_token[i] for i in range(first - 11, first) if allowed[i]]
    shown = " ".join(named) if len(named) < 3 else f"{len(named)} tags"
    rows.append((end.strip(), int(allowed[first:].sum()), shown))
table(rows, ("after", "locations", "tags"))
assert rows[4][1] == 12 * 11

# %% [markdown]
# The constraint has no effect on output that is already valid. At a high temperature it has:

# %%
assert generate() == generate(constraint=tokenizer.allowed_tokens)
rows = []
for seed in (1, 2, 3):
    for name, rule in (("free", None), ("constrained", tokenizer.allowed_tokens)):
        raw = tokenizer.decode(generate(temperature=2.0, seed=seed, constraint=rule))
        boxes = sum(len(entity.boxes) for entity in parse(raw)[1])
        rows.append((seed, name, raw.count("<object>"), raw.count("</object>"), boxes))
table(rows, ("seed", "", "<object>", "</object>", "boxes parsed"))

# %% [markdown]
# ## Sharing the prefill of an image
#
# Several questions about one image can share its prefill: `prefix` is the state after the image.

# %%
head, head_mask = (torch.tensor([v]) for v in tokenizer.encode_prompt("", 1))
prefix = model.prefill(head, None, image_embeds, head_mask, max_new_tokens=0)
shared = 0
for question in ("How many things are there?", "Is there a fire?", "Where is the snowman?"):
    whole, whole_mask = tokenizer.encode_prompt(f"Question: {question} Answer:")
    rest = torch.tensor([whole[head.shape[1] :]])
    answer = finish(model.prefill(rest, prefix=prefix, max_new_tokens=8))[0]
    inputs = torch.tensor([whole]), None, image_embeds, torch.tensor([whole_mask])
    assert answer.ids == finish(model.prefill(*inputs, max_new_tokens=8))[0].ids
    shared += head.shape[1]
    print(f"{question:28}{tokenizer.decode(answer.ids):20}{rest.shape[1]} of {len(whole)}")
print(f"positions saved: {shared - head.shape[1]}")

# %% [markdown]
# ## Guessing ahead
#
# Grounded text is predictable in places: after `</phrase>` comes `<object>`, after the second corner of a box usually
# `</object>`. Decoding is limited by reading the weights, so a pass over two tokens costs about as much as one over
# one. Therefore: run the sampled token together with a guess of the next one. If the guess turns out to be what is
# sampled next, its logits are already there, and a pass is saved. If not, the cache is shortened by the guess. The
# result is the same in both cases.
#
# The option `draft` is a function from the ids so far to the guesses; `Tokenizer.likely_next` is such a function.
# How many passes does it save?

# %%
passes = []
model.decoder.register_forward_hook(lambda *_: passes.append(1))
counts = {}
for name, draft in (("without", None), ("with draft", tokenizer.likely_next)):
    passes.clear()
    written = generate(draft=draft)
    counts[name] = len(passes)
    print(f"{name:12}{len(written)} tokens in {len(passes)} passes")
    assert written == generate()
assert counts["with draft"] < counts["without"]

# %% [markdown]
# ## Exercises
#
# 1. `sample` never returns a token of probability zero. Which line ensures that, and what could go wrong for a random
#    number of 0?
# 2. An unfinished text could still become better than a finished one. Can beam search miss it? Find the condition in
#    `beam_search`.
# 3. The image slots hold the ids 4, 5, 6, ... Why not the same id in all of them? (Think of n-gram blocking.)
# 4. How much memory does `num_beams=4` take, and when is it taken?
