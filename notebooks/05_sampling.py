# %% [markdown]
# # 5. Generation: cache, sampling and constraints
#
# At each step, the decoder returns a distribution over the next token. This notebook covers how these distributions
# become text: the cache, padding, sampling, beams, constraints on the output, and guessing ahead. (Reading time: 35
# minutes.)

# %%
from figures import ROOT, plt, reference, show, table  # isort: skip
import math

import torch
from data import encode_answer
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
# A new token attends to the keys and values of all earlier tokens, and with causal attention these never change. So
# they can be kept. Without a cache, the whole sequence is run again for every token. The ids must be the same.

# %%
sequence, steps = list(ids), 12
for _ in range(steps):
    row = torch.tensor([sequence])
    slots = torch.tensor([image_mask + [False] * (len(sequence) - T)])
    sequence.append(int(model(row, image_embeds=image_embeds, image_mask=slots)[0, -1].argmax()))
assert sequence[T:] == generate()[:steps]

# %% [markdown]
# With the cache, the loop is: mask the logits, sample, append, step. Here it is without masking and with greedy
# decoding; `decode` in `kosmos2.py` is the whole loop. `prefill` runs the prompt. Generation ends at `</s>`, or after
# `max_new_tokens` (430 by default).

# %%
with torch.inference_mode():
    state = model.prefill(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=steps)
    for _ in range(steps - 1):
        token = int(state.logits[0].argmax())
        state.step([0], state.extended([0], [token]))
assert state.sequences[0].ids == generate()[: steps - 1]
state = model.prefill(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=steps)
assert [new_ids[0] for new_ids in decode(state)] == generate()[:steps]

# %% [markdown]
# How much does the cache save? The number of positions that go through the decoder for n new tokens after a prompt of
# T tokens is T + n - 1 with a cache, and T + (T + 1) + ... + (T + n - 1) without.

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
# The cache takes memory: 2 tensors x layers x D numbers per position.

# %%
state = model.prefill(tokens, image_embeds=image_embeds, image_mask=mask, max_new_tokens=n)
held = sum(c.keys.nbytes + c.values.nbytes for c in state.caches)
text = model.config.text
assert held == 2 * text.layers * text.width * 4 * (T + n - 1)
print(f"{held / 2**20:.2f} MiB for {T + n - 1} positions")

# %% [markdown]
# ## Rows of different lengths
#
# A batch is a rectangle, so shorter prompts are padded. The padding goes on the *left*, because every row continues
# at its right end. Position ids count only real tokens, so the first one of each row is 2, and padding is masked.
# With both, each row gives the same result as it does alone:

# %%
description = "<grounding>Describe this image in detail:"
question = "Question: How many things are there? Answer:"
asked = [tokenizer.encode_prompt(prompt) for prompt in (description, question)]
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
# What does padding on the right break? Here are both prompts again, with the padding of the shorter one moved to its
# end. We compare its logits in the last column with those that the prompt should have.

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
# The last column of the shorter row holds a padding token. The logits of its prompt are further to the left, at its
# last token, and they are correct there. So `forward`, which training uses, accepts padding on either side.
# Generation continues from the last column, so `generate` raises an error:

# %%
try:
    model.generate(right_rows, None, two, right_slots, right_pads)
    raise AssertionError("padding on the right was accepted")
except ValueError as error:
    print(error)

# %% [markdown]
# transformers 5.23 handles left-padded prompts correctly, but from the first new token on it counts positions from
# the length of the cache, padding included. So the positions of padded rows jump. By how much do the logits change?
# (`reference` of `figures.py` loads the same weights into transformers.)

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
assert change[0] < 1e-2 and change[1] > 10 * change[0]

# %% [markdown]
# At step 0, the logits agree up to rounding. From step 1 on, they differ.
#
# ## Choosing the next token: greedy, temperature, top-k, top-p
#
# Greedy decoding takes the most likely token. Sampling at temperature τ draws from softmax(logits / τ). Top-p keeps
# the smallest set of top tokens whose total probability is at least p, *including* the token that crosses p. If that
# token were excluded, a first token of probability 0.95 would be dropped at top-p 0.9, and no token would remain. The
# order is temperature, top-k, top-p.
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
# With top-p 0.8, A and B together have 0.75, so C crosses 0.8 and stays:

# %%
expected = toy.exp()[:3] / toy.exp()[:3].sum()
print("predicted for top-p 0.8:", [round(v, 3) for v in expected.tolist()])
assert abs(float(rows[4][1]) - float(expected[0])) < 0.02

# %% [markdown]
# `sample` inverts the cumulative distribution, with one uniform random number per token. With a seed, each step draws
# one number and uses it for every row, so a row gets the same result in any batch. (Equal prompts in one batch
# therefore get equal samples.) The first 150 characters at three temperatures:

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
# The most likely text does not have to begin with the most likely token. Beam search keeps the K best sequences so
# far. Finished texts of different lengths are compared by the mean log-probability of their tokens. The search stops
# once K texts have ended and no unfinished one scores better than the worst of them. This takes K times the
# arithmetic and K times the cache, but each step still reads the weights only once. (It is deterministic, so it
# cannot be combined with a temperature.)

# %%
rows = []
for beams in (1, 2, 4):
    state = model.prefill(tokens, None, image_embeds, mask, max_new_tokens=110, num_beams=beams)
    found = finish(state)[0]
    mean = sum(map(math.log, found.probabilities)) / len(found.ids)
    rows.append((beams, len(found.ids), f"{mean:.4f}"))
table(rows, ("beams", "tokens", "mean log-probability"))

# %% [markdown]
# Here all three find the same text. On other images, more beams can find one with a higher mean, but this is not
# guaranteed: the search may drop a sequence early that would have become the best one.
#
# ## N-gram blocking
#
# The published model is run with 3-gram blocking: no three tokens in a row may occur twice, prompt included. This
# prevents loops, but also forbids correct texts. After "a red star and a red", the token that completed the earlier
# 3-gram "a red star" is forbidden:

# %%
told = tokenizer.encode("<grounding> a red star and a red", add_bos=False)
forbidden = [tokenizer.id_to_token[i] for i in kosmos2.repeated_ngrams(told, 3)]
print("forbidden:", forbidden)
assert forbidden == ["▁star"]

# %% [markdown]
# Tags are tokens like all others. After the second link of a list and a comma, the rule forbids opening another link,
# because `</object>`, the comma and `<phrase>` would repeat. (`encode_answer` from `training/data.py` returns the
# tokens that a model generates for a text. `Tokenizer.encode`, for prompts, would put a space before the comma.)

# %%
star = "<phrase> a red star</phrase><object><patch_index_0661><patch_index_0927></object>"
moon = "<phrase> a blue moon</phrase><object><patch_index_0546><patch_index_0907></object>"
listed = encode_answer(tokenizer, f"{star},{moon},")
forbidden = [tokenizer.id_to_token[i] for i in kosmos2.repeated_ngrams(listed, 3)]
print("after", [tokenizer.id_to_token[i] for i in listed[-2:]], "forbidden:", forbidden)
assert forbidden == ["<phrase>"]
for end in range(len(listed)):  # the rule allows every token up to here
    assert listed[end] not in kosmos2.repeated_ngrams(listed[:end], 3)

# %% [markdown]
# Also, no two links can start with the same top-left corner: `</phrase>`, `<object>` and the corner would repeat.
# What does this do to the caption of an image with more things?

# %%
busy = Image.open(ROOT / "tiny" / "busy.png").convert("RGB")
busy_pixels = preprocess_image(busy, model.config.vision.image_size)[None]
busy_ids, busy_mask = tokenizer.encode_prompt("<grounding>An image of")
busy_inputs = {"pixels": busy_pixels, "image_mask": torch.tensor([busy_mask])}


def caption(**options):
    return model.generate(torch.tensor([busy_ids]), max_new_tokens=110, **busy_inputs, **options)[0]


def repeats(ids) -> int:
    """Number of 3-grams that occurred before."""
    return sum(ids[end] in kosmos2.repeated_ngrams(ids[:end], 3) for end in range(len(ids)))


# %%
free, blocked = caption(), caption(no_repeat_ngram_size=3)
for name, written in (("without the rule", free), ("with the rule", blocked)):
    print(f"{name}, {repeats(busy_ids + written)} repeated 3-grams:")
    print(tokenizer.decode(written))
assert repeats(busy_ids + free) > 0 and repeats(busy_ids + blocked) == 0

# %%
pairs = list(zip(free, blocked, strict=False))
first_change = [a == b for a, b in pairs].index(False)
assert free[first_change] in kosmos2.repeated_ngrams(busy_ids + free[:first_change], 3)
print("forbidden:", tokenizer.id_to_token[free[first_change]])
print("instead:  ", tokenizer.id_to_token[blocked[first_change]])
assert ",," in tokenizer.decode(blocked)

# %% [markdown]
# Both texts are the same up to the first repeated 3-gram. There the rule forces another token, and everything after
# it depends on that token. Here, a comma is doubled, and the rest of the text is worse than before. The config of the
# bundled model turns the rule off; `sample.py` uses the checkpoint's setting, except for `--task context`, where the
# rule is off because the prompt repeats itself.
#
# ## Complete boxes
#
# `Tokenizer.allowed_tokens` returns the tokens that keep the markup valid; generation accepts it as a constraint. It
# is applied before n-gram blocking, and if a rule would leave no token, that rule is skipped (`mask_logits`). How
# many tokens are allowed after each part of a link? (Cell 661 is column 21 of row 20, so the bottom-right corner is
# in one of the 12 rows and one of the 11 columns from there on.)

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
# The constraint has no effect on output that is already valid, such as the greedy text. What about a high
# temperature?

# %%
assert generate() == generate(constraint=tokenizer.allowed_tokens)
rows = []
for seed in (1, 2, 3):
    for name, rule in (("free", None), ("constrained", tokenizer.allowed_tokens)):
        raw = tokenizer.decode(generate(temperature=2.0, seed=seed, constraint=rule))
        boxes = sum(len(entity.boxes) for entity in parse(raw)[1])
        rows.append((seed, name, raw.count("<object>"), raw.count("</object>"), boxes))
        if rule is not None:
            assert raw.count("<object>") == raw.count("</object>") <= boxes
table(rows, ("seed", "", "<object>", "</object>", "boxes parsed"))

# %% [markdown]
# Without the constraint, nothing ensures that tags come in pairs. With it, every `<object>` is closed and has at
# least one box. (A phrase may still have none: after `</phrase>`, text can follow.)
#
# ## Sharing the prefill of an image
#
# Several questions about one image can share its prefill: `prefix` is the state after the image, and each question
# continues from it. How many positions does each question still run?

# %%
head_ids, head_mask = tokenizer.encode_prompt("", 1)
head = torch.tensor([head_ids]), None, image_embeds, torch.tensor([head_mask])
prefix = model.prefill(*head, max_new_tokens=0)
questions = ("How many things are there?", "Is there a fire?", "Where is the snowman?")

# %%
before = after = 0
for question in questions:
    whole, whole_mask = tokenizer.encode_prompt(f"Question: {question} Answer:")
    rest = torch.tensor([whole[len(head_ids) :]])
    answer = finish(model.prefill(rest, prefix=prefix, max_new_tokens=8))[0]
    inputs = torch.tensor([whole]), None, image_embeds, torch.tensor([whole_mask])
    assert answer.ids == finish(model.prefill(*inputs, max_new_tokens=8))[0].ids
    before += len(whole)
    after += rest.shape[1]
    print(f"{question:28}{tokenizer.decode(answer.ids)}")
    print(f"    {rest.shape[1]} of {len(whole)} positions")
after += len(head_ids)  # once, for the image
print(f"prefill of the three questions: {before} positions, with a shared prefix {after}")
assert after < before / 2

# %% [markdown]
# ## Guessing ahead (speculative decoding)
#
# Parts of grounded text are easy to predict: `</phrase>` is usually followed by `<object>`, and the second corner of
# a box by `</object>`. So each pass can run the token just sampled together with a guess of the next one. Where
# decoding is limited by reading the weights (notebook 9), a pass over two tokens can take about as long as a pass
# over one; whether it does depends on the matmul kernel. So we count passes, not seconds. How many are saved?
#
# The option `draft` is a function from the ids so far to the guessed ids; `Tokenizer.likely_next` is such a function.
# For comparison, the third row always guesses `</s>`, which is wrong until the text ends. A hook counts the passes
# through the decoder, including the one over the prompt.

# %%
passes = []
hook = model.decoder.register_forward_hook(lambda *_: passes.append(1))
drafts = {
    "no draft": None,
    "likely_next": tokenizer.likely_next,
    "wrong guesses": lambda ids: [kosmos2.EOS],
}
results, counts = {}, {}
for name, draft in drafts.items():
    passes.clear()
    results[name] = caption(draft=draft)
    counts[name] = len(passes)
hook.remove()
table([(name, len(results[name]), counts[name]) for name in drafts], ("draft", "tokens", "passes"))

# %%
written = results["no draft"]
assert written == results["likely_next"] == results["wrong guesses"]
assert counts["no draft"] == counts["wrong guesses"] == len(written)
assert counts["likely_next"] < counts["no draft"]

# %% [markdown]
# A pass over two tokens returns two rows of logits: those after the sampled token, and those after the guess. The
# next token is sampled from the first row as always. If it equals the guess, the second row already has the logits
# for the token after it, and one pass is saved. If not, the second row is discarded and the KV cache is shortened by
# one position, as if the guess had never been run. So the ids are the same in both cases, whatever the guesses are.
#
# ## Exercises
#
# 1. `sample` never returns a token of probability zero. Which line ensures that, and what could go wrong for a random
#    number of 0?
# 2. An unfinished text could still become better than a finished one. Can beam search miss it? Find the condition in
#    `beam_search`.
# 3. The image slots hold the ids 4, 5, 6, ... Why not the same id in all of them? (Think of n-gram blocking.)
# 4. How much memory does `num_beams=4` take, and when is it taken?
