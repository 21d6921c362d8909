# %% [markdown]
# # 5. Generation: cache, sampling and constraints
#
# At each step, the decoder returns a distribution over the next token. This notebook shows how these distributions
# become a sequence. First we write the loop by hand, then we look at `decode`, the loop of `kosmos2.py`. Padding,
# sampling and constraints on the output follow. The last part builds beam search, shared prefixes and drafts on the
# same `DecodeState`. (Reading time: 45 minutes.)

# %%
from figures import ROOT, plt, reference, show, table  # isort: skip
import inspect
import math

import torch

import kosmos2
from inference.beam import finish_beams
from inference.shortcuts import DraftState, likely_next, prefill_after, prefill_image, with_drafts
from kosmos2 import EOS, KVCache, causal_mask, decode, finish, open_image, pad_left, preprocess_image, sample
from load_weights import load_checkpoint
from tokenizer import parse
from training.data import encode_answer

torch.set_grad_enabled(False)
model, tokenizer = load_checkpoint(ROOT / "tiny")
config = model.config.text

# %% [markdown]
# The running example is a detailed description of the bundled image.

# %%
image = open_image(ROOT / "tiny" / "scene.png")
image_embeds = model.encode_image(preprocess_image(image, model.config.vision.image_size)[None])
ids, image_mask = tokenizer.encode_prompt("<grounding>Describe this image in detail:")
tokens, mask = torch.tensor([ids]), torch.tensor([image_mask])
T = len(ids)


def prefill(**options):
    return model.prefill(tokens, None, image_embeds, mask, **{"max_new_tokens": 110, **options})


def generate(**options):
    return finish(prefill(**options))[0].ids


print(parse(tokenizer.decode(generate()))[0])

# %% [markdown]
# ## The loop by hand
#
# The simplest loop runs the whole sequence through the model for every new token, and appends the most likely one:

# %%
sequence, steps = list(ids), 12
for _ in range(steps):
    row = torch.tensor([sequence])
    slots = torch.tensor([image_mask + [False] * (len(sequence) - T)])
    logits = model(row, image_embeds=image_embeds, image_mask=slots)[0, -1]
    sequence.append(int(logits.argmax()))
assert sequence[T:] == generate()[:steps]

# %% [markdown]
# Most of this work is repeated. A new token attends to the keys and values of all earlier tokens, and with causal
# attention these never change. So they can be kept, and each step runs only the new token. A `KVCache` holds the keys
# and values of one layer; how many positions it can hold is fixed at the beginning. Here the prompt is run in two
# parts:


# %%
def run(x, first: int, caches):
    """Run embeddings x (1, n, D) at positions from `first` on -> logits of the next token (V,)."""
    n = x.shape[1]
    positions = torch.arange(first, first + n)[None]
    no_padding = torch.zeros(1, caches[0].length + n, dtype=torch.bool)
    return model.decoder.unembed(model.decoder(x, positions, causal_mask(n, no_padding), caches)[0, -1])


def new_caches(capacity: int):
    heads, like = config.heads, model.decoder.layer_norm.weight
    return [KVCache(1, heads, capacity, config.width // heads, like) for _ in model.decoder.layers]


x, caches = model.embed(tokens, None, image_embeds, mask), new_caches(T)
run(x[:, :-1], 2, caches)
logits = run(x[:, -1:], 2 + T - 1, caches)
torch.testing.assert_close(logits, prefill().logits[0], rtol=1e-3, atol=1e-3)

# %% [markdown]
# The loop has two phases. The *prefill* runs all positions of the prompt at once. Then each step of *decoding* chooses
# a token, appends it, and runs it. The loop ends at `</s>`, or at a limit.


# %%
def generate_by_hand(limit: int) -> list[int]:
    caches = new_caches(T + limit)
    x = model.embed(tokens, None, image_embeds, mask)  # (1, T, D)
    logits = run(x, 2, caches)  # positions start at 2
    new = []
    while True:
        token = int(logits.argmax())
        new.append(token)
        if token == EOS or len(new) == limit:
            return new
        x = model.decoder.embed_tokens(torch.tensor([[token]]))  # (1, 1, D)
        logits = run(x, 1 + T + len(new), caches)


assert generate_by_hand(110) == generate()
print(len(generate()), "ids, the same as those of `Kosmos2.generate`")

# %% [markdown]
# How much does the cache save? The number of positions that go through the decoder for n new tokens after a prompt of
# T tokens is T + n - 1 with a cache, and T + (T + 1) + ... + (T + n - 1) without.

# %%
n = 100
with_cache = T + n - 1
without = sum(range(T, T + n))
print(f"a prompt of {T} and {n} new tokens: {with_cache} positions with a cache")
print(f"{without} without, {without / with_cache:.0f} times as many")

# %% [markdown]
# The same for other lengths:

# %%
fig, axis = plt.subplots(figsize=(6, 2.8))
new = range(1, 200)
axis.plot(new, [T + k - 1 for k in new], label="with a cache")
axis.plot(new, [sum(range(T, T + k)) for k in new], label="without")
axis.set(xlabel="new tokens", ylabel="positions computed", yscale="log", title="work for a caption")
axis.legend(frameon=False)
show(fig, "Two curves on a logarithmic scale: without a cache, the work grows much faster.")

# %% [markdown]
# The cache takes memory: 2 tensors x layers x D numbers per position.

# %%
state = prefill(max_new_tokens=n)
held = sum(cache.keys.nbytes + cache.values.nbytes for cache in state.caches)
positions = state.caches[0].keys.shape[2]
assert held == 2 * config.layers * config.width * 4 * positions
print(f"{held / 2**20:.2f} MiB for {positions} positions")

# %% [markdown]
# ## One state, three operations
#
# `Kosmos2.prefill` returns a `DecodeState`: a batch that is being decoded. It has the caches, the logits of the next
# tokens, and a `Row` for each prompt with its new ids and their probabilities. Three operations change it:
#
# - `advance(x)` runs the next positions of every row, given their embeddings, and caches them;
# - `step(tokens)` is `advance` for one token per row, and computes the logits of the tokens after it;
# - `keep(indices)` drops, reorders or copies rows.
#
# The loop by hand once more, with this state:

# %%
state = prefill()
new = []
while True:
    new.append(int(state.logits[0].argmax()))
    if new[-1] == EOS:
        break
    state.step([new[-1]])
assert new == generate()
print("cached positions:", state.caches[0].length, "=", T, "+", len(new) - 1)

# %% [markdown]
# `decode` is the same loop for any number of rows, with all options. It yields the rows after every step, so a caller
# can print the answer while it is generated.

# %%
print(inspect.getsource(decode.__wrapped__))

# %% [markdown]
# Its three parts: choose a token for each row, append it with its probability, run it. (`mask_logits`, `sample` and
# `cut_markup` are explained below.) `finish` runs the loop to the end, and `generate` is `prefill` and `finish`.
#
# `keep` removes finished rows from the batch. Here are three questions about the image, answered together:

# %%
questions = ("Is there a fire?", "Where is the snowman?", "How many snowmen are there?")
prompts = [tokenizer.encode_prompt(f"Question: {question} Answer:") for question in questions]
rows, slots, pads = pad_left(prompts)
state = model.prefill(rows, None, image_embeds.expand(3, -1, -1), slots, pads, max_new_tokens=20)
running = []
for _ in decode(state):
    running.append(len(state.running))
for question, row in zip(questions, state.rows, strict=True):
    print(f"{question:30}{tokenizer.decode(row.ids):24}{len(row.ids)} tokens")
print("rows in the decoder, step by step:", running)
assert running[-1] < 3 and [row.ids[-1] for row in state.rows] == 3 * [EOS]

# %% [markdown]
# ## Rows of different lengths
#
# A batch is a rectangle, so shorter prompts are padded. The padding goes on the *left*, because every row continues
# at its right end. Position ids count only real tokens, so the first one of each row is 2, and padding is masked.
# With both, each row gives the same result as it does alone:

# %%
asked = [(ids, image_mask), prompts[2]]
rows, slots, pads = pad_left(asked)
print("padding in front:", pads.sum(dim=1).tolist())
print("first positions:", kosmos2.token_positions(pads)[:, :6].tolist())
two = image_embeds.expand(2, -1, -1)
both = finish(model.prefill(rows, None, two, slots, pads, max_new_tokens=8))

# %% [markdown]
# Each prompt alone gives the same ids and probabilities as its row of the batch:

# %%
for (i, m), row in zip(asked, both, strict=True):
    lone_state = model.prefill(torch.tensor([i]), None, image_embeds, torch.tensor([m]), max_new_tokens=8)
    alone = finish(lone_state)[0]
    assert alone.ids == row.ids
    p, q = torch.tensor(alone.probabilities), torch.tensor(row.probabilities)
    torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    print(tokenizer.decode(row.ids))

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
# last token, and they are correct there. So `forward`, which returns all logits, accepts padding on either side.
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


print(type(theirs).__name__)

# %% [markdown]
# The shorter prompt alone, and as a padded row:

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
# ## N-gram blocking
#
# The published model is run with 3-gram blocking: no three tokens in a row may occur twice, prompt included. This
# prevents loops, but also forbids correct sentences. After "a red star and a red", the token that completed the earlier
# 3-gram "a red star" is forbidden:

# %%
told = tokenizer.encode("<grounding> a red star and a red", add_bos=False)
forbidden = [tokenizer.id_to_token[i] for i in kosmos2.repeated_ngrams(told, 3)]
print("forbidden:", forbidden)
assert forbidden == ["▁star"]

# %% [markdown]
# Tags are tokens like all others. After the second link of a list and a comma, the rule forbids opening another link,
# because `</object>`, the comma and `<phrase>` would repeat. (`encode_answer` from `training/data.py` returns the
# tokens that a model generates for tagged text. `Tokenizer.encode`, for prompts, would put a space before the comma.)

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
# What does this do to the caption of an image with more objects?

# %%
busy = open_image(ROOT / "tiny" / "busy.png")
busy_pixels = preprocess_image(busy, model.config.vision.image_size)[None]
busy_ids, busy_mask = tokenizer.encode_prompt("<grounding>An image of")
busy_inputs = {"pixels": busy_pixels, "image_mask": torch.tensor([busy_mask])}


def caption(**options):
    return model.generate(torch.tensor([busy_ids]), max_new_tokens=110, **busy_inputs, **options)[0]


def repeats(ids) -> int:
    """Number of 3-grams that occurred before."""
    return sum(ids[end] in kosmos2.repeated_ngrams(ids[:end], 3) for end in range(len(ids)))


print("repeated 3-grams in the prompt:", repeats(busy_ids))

# %% [markdown]
# The caption without and with the rule:

# %%
free, blocked = caption(), caption(no_repeat_ngram_size=3)
for name, written in (("without the rule", free), ("with the rule", blocked)):
    print(f"{name}, {repeats(busy_ids + written)} repeated 3-grams:")
    print(tokenizer.decode(written))
assert repeats(busy_ids + free) > 0 and repeats(busy_ids + blocked) == 0

# %% [markdown]
# Where do they differ first?

# %%
pairs = list(zip(free, blocked, strict=False))
first_change = [a == b for a, b in pairs].index(False)
assert free[first_change] in kosmos2.repeated_ngrams(busy_ids + free[:first_change], 3)
print("forbidden:", tokenizer.id_to_token[free[first_change]])
print("instead:  ", tokenizer.id_to_token[blocked[first_change]])
assert tokenizer.decode(blocked).count("<phrase>") < tokenizer.decode(free).count("<phrase>")

# %% [markdown]
# Both captions are the same up to the first repeated 3-gram. There the rule forces another token, and everything
# after it depends on that token. Here, a phrase loses its first tag, and the rest of the caption is worse than before.
# The config of the bundled model turns the rule off; `sample.py` uses the checkpoint's setting, except for `--task
# context`, where the rule is off because the prompt repeats itself.
#
# ## Complete boxes
#
# `Tokenizer.allowed_tokens` returns the tokens that keep the markup valid; generation accepts it as a constraint. It is
# applied before n-gram blocking, and if a rule would leave no token, that rule is skipped (`mask_logits`). How many
# location tokens, and which tags, are allowed after each part of a link? (Other tokens are not shown. Cell 661 is
# column 21 of row 20, so the bottom-right corner is in one of the 12 rows and one of the 11 columns from there on.)

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
# The constraint does not change greedy output that is already valid, such as the greedy description. What about a high
# temperature?

# %%
assert generate() == generate(constraint=tokenizer.allowed_tokens)
rows = []
for seed in (1, 2, 3):
    for name, rule in (("free", None), ("constrained", tokenizer.allowed_tokens)):
        raw = tokenizer.decode(generate(temperature=3.0, seed=seed, constraint=rule))
        boxes = sum(len(entity.boxes) for entity in parse(raw)[1])
        rows.append((seed, name, raw.count("<object>"), raw.count("</object>"), boxes))
        if rule is not None:
            assert raw.count("<object>") == raw.count("</object>") <= boxes
table(rows, ("seed", "", "<object>", "</object>", "boxes parsed"))

# %% [markdown]
# Without the constraint, nothing ensures that tags come in pairs. With it, every `<object>` is closed and has at
# least one box. (A phrase may still have none: after `</phrase>`, other tokens can follow.)

# %% [markdown]
# ## The length limit
#
# A limit of new tokens could cut a box in half. With a constraint, it does not: if the chosen token is markup, or a
# word in a phrase, that no longer fits, `cut_markup` replaces it with `</s>`, or with the closing tag. Everything
# before it stays the same, so the limit only truncates.

# %%
free = generate()
for limit in (4, 5, 8, 12):
    cut = generate(max_new_tokens=limit, constraint=tokenizer.allowed_tokens)
    raw = tokenizer.decode(cut)
    print(f"{limit:2}  {raw}")
    assert raw.count("<phrase>") == raw.count("</phrase>") and raw.count("<object>") == raw.count("</object>")
    assert len(cut) <= limit and cut[:-1] == free[: len(cut) - 1]

# %% [markdown]
# ## Beam search
#
# The most likely sequence does not have to begin with the most likely token. Beam search keeps the K best sequences so
# far. At each step, it scores all continuations of all of them by their summed log-probability, and goes on with the K
# best. Several of these may continue the same sequence, so rows are dropped, reordered and copied, which is what `keep`
# does.

# %%
K, V = 4, config.vocab_size
state = prefill()
totals, beams = torch.zeros(1), [[]]
for _ in range(steps):
    scores = totals[:, None] + state.logits.log_softmax(dim=-1)  # (beams, V)
    totals, best = scores.flatten().topk(K)
    parents, chosen = (best // V).tolist(), (best % V).tolist()
    beams = [beams[parent] + [token] for parent, token in zip(parents, chosen, strict=True)]
    state.keep(parents)
    state.step(chosen)
for total, beam in zip(totals.tolist(), beams, strict=True):
    print(f"{total:.2f}  {tokenizer.decode(beam)}")
assert beams[0] == finish_beams(prefill(max_new_tokens=steps), K)[0].ids

# %% [markdown]
# `finish_beams` in `inference/beam.py` is this loop for a batch, with all options except those for sampling, and it
# handles sequences that end. Finished sequences of different lengths are compared by the mean log-probability of their
# tokens. The search stops once K sequences have ended and no unfinished one scores better than the worst of them. It
# takes K times the arithmetic and K times the cache, but each step still reads the weights only once. (It is
# deterministic, so it cannot be combined with a temperature.)

# %%
rows = []
for num_beams in (1, 2, 4):
    found = finish_beams(prefill(), num_beams)[0]
    mean = sum(map(math.log, found.probabilities)) / len(found.ids)
    rows.append((num_beams, len(found.ids), f"{mean:.4f}"))
table(rows, ("beams", "tokens", "mean log-probability"))

# %% [markdown]
# Here, all three find the same sequence. On other images, more beams can find one with a higher mean, but this is not
# guaranteed: the search may drop a sequence early that would have become the best one.
#
# ## A shared prefix
#
# Several questions about one image have the same beginning: `<s>`, `<image>`, the slots and `</image>`. It needs to be
# run only once. We prefill the image, copy its row for each question with `keep`, and run the rest of the questions
# with `advance`. The logits must be those of the whole prompts:

# %%
image_ids, image_slots = tokenizer.encode_prompt("")
start = len(image_ids)
rest, _, rest_pads = pad_left([(whole[start:], slots[start:]) for whole, slots in prompts])
with torch.inference_mode():
    images = torch.tensor([image_ids]), None, image_embeds, torch.tensor([image_slots])
    state = model.prefill(*images, max_new_tokens=rest.shape[1])  # room for the questions
    state.keep([0, 0, 0])
    x = state.advance(model.embed(rest, pad_mask=rest_pads), rest_pads)
    by_hand = model.next_logits(x[:, -1])
rows, slots, pads = pad_left(prompts)
whole = model.prefill(rows, None, image_embeds.expand(3, -1, -1), slots, pads)
torch.testing.assert_close(by_hand, whole.logits, rtol=1e-3, atol=1e-3)

# %% [markdown]
# `prefill_image` and `prefill_after` in `inference/shortcuts.py` do this, so that one prefix serves any number of
# batches. How many positions does the prefill of the three questions still run?

# %%
prefix = prefill_image(model, tokenizer, image_embeds)
state = prefill_after(prefix, rest, rest_pads, max_new_tokens=20)
torch.testing.assert_close(state.logits, by_hand, rtol=1e-3, atol=1e-3)
for question, row in zip(questions, finish(state), strict=True):
    print(f"{question:30}{tokenizer.decode(row.ids)}")
before = int((~pads).sum())
after = start + int((~rest_pads).sum())
print(f"{before} positions, with a shared prefix {after}")
assert after < before / 2

# %% [markdown]
# ## Speculative decoding
#
# Parts of grounded text are easy to predict: `</phrase>` is usually followed by `<object>`, and the second corner of a
# box by `</object>`. So each pass can run the token just chosen together with a guess (a *draft*) of the next one; this
# is called speculative decoding. `advance` takes any number of positions. First we run the two tokens one at a time:

# %%
new = generate()
at = new.index(tokenizer.special_ids["</phrase>"])
guess = likely_next(tokenizer, new[: at + 1])
print("guess after </phrase>:", tokenizer.id_to_token[guess[0]])
state = prefill()
for token in new[: at + 1]:
    state.step([token])
after_phrase = state.logits
state.step(guess)
after_guess = state.logits

# %% [markdown]
# Now we run both in one pass:

# %%
state = prefill()
for token in new[:at]:
    state.step([token])
with torch.inference_mode():
    pair = torch.tensor([[new[at], *guess]])
    x = state.advance(model.decoder.embed_tokens(pair))  # (1, 2, D)
    logits = model.next_logits(x)  # (1, 2, V)
torch.testing.assert_close(logits[:, 0], after_phrase, rtol=1e-3, atol=1e-3)
torch.testing.assert_close(logits[:, 1], after_guess, rtol=1e-3, atol=1e-3)

# %% [markdown]
# One pass has returned two rows of logits: those after the chosen token, and those after the guess. The next token is
# chosen from the first row as always. If it equals the guess, the second row already has the logits of the token after
# it, and one pass is saved. If not, the second row is discarded and the cache is shortened by one position, as if the
# guess had never been run. So the ids do not depend on the guesses.
#
# `DraftState` in `inference/shortcuts.py` does this in its `step`; everything else, `decode` included, stays the same.
# Where decoding is limited by reading the weights (notebook 9), a pass over two tokens can take about as long as a pass
# over one; whether it does depends on the matmul kernel. So we count passes, not seconds. `with_drafts` guesses by
# `likely_next`; for comparison, the third row of the table uses a draft that always guesses `</s>`, which is wrong
# until the sequence ends.

# %%
passes = []
hook = model.decoder.register_forward_hook(lambda *_: passes.append(1))
drafts = {
    "no draft": lambda state: state,
    "likely_next": lambda state: with_drafts(state, tokenizer),
    "wrong guesses": lambda state: DraftState(state, lambda ids: [EOS]),
}
results, counts = {}, {}
for name, draft in drafts.items():
    passes.clear()
    results[name] = finish(draft(prefill()))[0].ids
    counts[name] = len(passes)
hook.remove()
table([(name, len(results[name]), counts[name]) for name in drafts], ("draft", "tokens", "passes"))

# %% [markdown]
# (The pass over the prompt is counted, too.)

# %%
assert results["no draft"] == results["likely_next"] == results["wrong guesses"]
assert counts["no draft"] == counts["wrong guesses"] == len(results["no draft"])
assert counts["likely_next"] < counts["no draft"]

# %% [markdown]
# ## Exercises
#
# 1. `sample` never returns a token of probability zero. Which line ensures that, and what could go wrong for a random
#    number of 0?
# 2. An unfinished sequence could still become better than a finished one. Can beam search miss it? Find the condition
#    in `finish_beams`.
# 3. The image slots hold the ids 4, 5, 6, ..., which are also the ids of ordinary pieces. How does n-gram blocking
#    treat them?
# 4. How much memory do four beams need, and when is it allocated?
