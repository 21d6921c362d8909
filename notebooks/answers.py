"""Answers to the exercises of the notebooks, with code that checks what can be checked.

    python notebooks/answers.py

Make your own prediction before you read an answer.
"""

from figures import ROOT  # isort: skip  (it sets the paths)
import math
import shutil
import tempfile
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from PIL import Image
from recording import record
from safetensors.torch import load_file, save_file

import kosmos2
from inference.beam import finish_beams
from inference.fast import quantize
from kosmos2 import Kosmos2, Kosmos2Config, TextConfig, finish, open_image, preprocess_image, sample
from load_weights import Checkpoint, load_checkpoint
from tokenizer import Tokenizer, box_to_tokens, parse, tokens_to_box
from training.evaluate import HELD_OUT, answers, choose_examples, score
from training.scenes import SECOND, Example, Scene, cells, link

torch.set_grad_enabled(False)
torch.manual_seed(0)
model, tokenizer = load_checkpoint(ROOT / "tiny")
image = open_image(ROOT / "tiny" / "scene.png")
pixels = preprocess_image(image, model.config.vision.image_size)[None]


def say(prompt: str, image_embeds=None, **options):
    """(caption, entities, raw) of a prompt about the image, or about these embeddings."""
    ids, mask = tokenizer.encode_prompt(prompt)
    embeds = model.encode_image(pixels) if image_embeds is None else image_embeds
    state = model.prefill(
        torch.tensor([ids]), None, embeds, torch.tensor([mask]), max_new_tokens=100, **options
    )
    row = finish(state)[0]
    caption, entities = tokenizer.parse_output(ids, row.ids, row.probabilities)
    return caption, entities, tokenizer.decode(row.ids)


# ------------------------------------------------------------------------------------------------ 0. Overview

# 0.1 Without <grounding> there are no tags and no locations: only training examples that began with it had any.
assert "<" not in say("An image of")[2]

# 0.2 "An image of nothing.": empty images were part of its training.
size = model.config.vision.image_size
black = model.encode_image(preprocess_image(Image.new("RGB", (size, size)), size)[None])
print("0.2:", say("<grounding>An image of", black)[0])

# 0.3 It can: slots have positions, and each latent is always in the same slot during training.
embeds = model.encode_image(pixels)
swapped = embeds.clone()
swapped[0, [3, 20]] = embeds[0, [20, 3]]
print("0.3:", say("<grounding>An image of", swapped)[0])

# 0.4 (1, H, Q, N + Q): the latents are appended to the keys (notebook 2).
with record(model) as recorded:
    model.encode_image(pixels)
N, Q = model.config.vision.positions, model.config.latent_query_num
assert recorded["resampler.x_attn"][0].shape == (1, model.config.text.heads, Q, N + Q)

# -------------------------------------------------------------------------------------------------- 1. Vision

vit, E = model.vision, model.config.vision.width


def features(order=None, before=False):
    """The ViT with its patches in another order, changed before or after the positions are added."""
    patches = vit.patch_embedding(pixels).flatten(2).mT[0]
    positions = vit.position_embedding
    if order is not None and before:
        patches = patches[order]
    x = torch.cat([vit.class_embedding[None], patches]) + positions
    if order is not None and not before:
        x = torch.cat([x[:1], x[1:][order]])
    x = vit.pre_layernorm(x[None])
    for layer in vit.layers:
        x = layer(x)
    return F.normalize(vit.post_layernorm(x), dim=-1)[0]


# 1.1 The outputs are shuffled in the same way and otherwise equal: attention does not depend on the order of its inputs.
order = torch.randperm(N - 1)
torch.testing.assert_close(features(order)[1:], features()[1:][order], rtol=1e-3, atol=1e-4)
torch.testing.assert_close(features(order)[0], features()[0], rtol=1e-3, atol=1e-4)

# 1.2 Now the patches have wrong positions: this is another image, with other features.
assert (features(order, before=True)[0] - features()[0]).norm() > 0.05

# 1.3 A change of a few percent or less, which a caption may not show.
with patch.object(kosmos2, "quick_gelu", F.gelu):
    other = Kosmos2(model.config).eval()
other.load_state_dict(model.state_dict())
change = float((other.vision(pixels) - vit(pixels)).norm() / vit(pixels).norm())
assert 1e-3 < change < 0.2

# 1.4 The row of [CLS] belongs to no place in the image. If it were part of the "image" that is resized, all others would
# move by one patch, and G² + 1 rows do not form a grid.
assert math.isqrt(N) ** 2 != N

# ----------------------------------------------------------------------------------------------- 2. Resampler

# 2.1 Attention weights sum to one, so each head would have to attend to the image, even if nothing there matters to it.

# 2.2 Only the latents: all other shapes follow from the widths.
half = Kosmos2(replace(model.config, latent_query_num=model.config.latent_query_num // 2)).state_dict()
assert [n for n, t in model.state_dict().items() if t.shape != half[n].shape] == ["resampler.latent_query"]

# 2.3 Longer keys give larger scores, of both signs: attention becomes sharper, and its balance between image and latents
# changes.
with record(model) as longer:
    model.resampler(10 * vit(pixels))
aways = [s["resampler.x_attn"][0][..., N:].sum(-1).mean() for s in (recorded, longer)]
print(f"2.3: attention on the latents {aways[0]:.2f}, with features ten times as long {aways[1]:.2f}")
assert not torch.allclose(model.resampler(10 * vit(pixels)), model.resampler(vit(pixels)), atol=0.1)

# 2.4 A second cross-attention whose result is added to that of the first (a residual). With an `out_proj` of zeros it
# adds nothing until it is trained. The outputs of the first layer are longer than the projected features. As keys
# without normalization, they would get more than their share of the attention, nearly all of it in some models, and the
# new layer would start blind, like the blind models of notebook 2. So both kinds of keys go through a LayerNorm; then
# attention starts almost uniform over image and latents. To save and load such a model, NAMES needs no new rows,
# because the names "resampler.x_attn2..." begin with "resampler."; in fp16 and int8, `read_packed` packs its four
# projections one by one (in a Block, q, k and v are stacked first).


class TwoLayers(kosmos2.Resampler):
    def __init__(self, config, normalize=True):
        super().__init__(config)
        width = config.text.width
        self.norm = torch.nn.LayerNorm(width) if normalize else torch.nn.Identity()
        self.x_attn2 = kosmos2.Attention(width, config.text.heads)
        self.x_attn2.out_proj.weight.zero_()
        self.x_attn2.out_proj.bias.zero_()

    def forward(self, features):
        latents = super().forward(features)  # (B, Q, D)
        keys = torch.cat([self.norm(self.dense(features)), self.norm(latents)], dim=1)
        return latents + self.x_attn2(self.norm(latents), context=keys)


def attention_on_image(resampler) -> float:
    """The share of attention that the second layer pays to the image."""
    with record(resampler) as seen:
        resampler(vit(pixels))
    return float(seen["x_attn2"][0][..., :N].sum(-1).mean())


features_of_image = vit(pixels)
keys, latents = model.resampler.dense(features_of_image), model.resampler(features_of_image)
assert latents.norm(dim=-1).mean() > 1.5 * keys.norm(dim=-1).mean()
shares = {False: 0.0, True: 0.0}  # means over a few random layers
for seed in range(5):
    for normalize in shares:
        torch.manual_seed(seed)
        two_layers = TwoLayers(model.config, normalize)
        two_layers.load_state_dict(model.resampler.state_dict(), strict=False)  # all but the new layer
        torch.testing.assert_close(two_layers(features_of_image), latents)
        shares[normalize] += attention_on_image(two_layers) / 5
print(f"2.4: attention on the image {shares[False]:.2f}, with a LayerNorm {shares[True]:.2f}")
assert shares[False] < shares[True] - 0.1
assert abs(shares[True] - N / (N + Q)) < 0.1  # uniform
before = say("<grounding>An image of")[0]
with patch.object(model, "resampler", two_layers):
    assert say("<grounding>An image of")[0] == before

# 2.5 8 (Q + 2) + 1 <= 2048: above Q = 253.
assert 8 * (253 + 2) + 1 <= TextConfig().max_positions < 8 * (254 + 2) + 1

# ------------------------------------------------------------------------------------------------- 3. Decoder

# 3.1 Text in front of the image cannot attend to it (causal attention). What follows the image can, so the model may
# still write a caption, but no caption was in front of its image in training.

# 3.2 mask[:P, :P] = True for the first P positions (a "prefix LM").
mask = kosmos2.causal_mask(5, torch.zeros(1, 5, dtype=torch.bool))
mask[:3, :3] = True
assert mask[0].tolist() == [True, True, True, False, False]

# 3.3 It would need a row of NAMES for the projection instead of OUTPUT_PROJECTIONS, and the model another tensor: 533 MB
# more for the published sizes.
assert TextConfig().vocab_size * TextConfig().width * 4 == 532_783_104

# 3.4 The bias of k_proj: it adds the same q·b to all scores of a query, which softmax ignores.
ids, image_mask = tokenizer.encode_prompt("<grounding>An image of")
before = model(torch.tensor([ids]), pixels, image_mask=torch.tensor([image_mask]))
for block in model.decoder.layers:
    block.attn.k_proj.bias += 3.0
after = model(torch.tensor([ids]), pixels, image_mask=torch.tensor([image_mask]))
for block in model.decoder.layers:
    block.attn.k_proj.bias -= 3.0
torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-3)

# ----------------------------------------------------------------------------------------------- 4. Grounding

# 4.1 The delimiter </delimiter_of_multi_objects/>.
boxes = (
    "<patch_index_0001><patch_index_0044></delimiter_of_multi_objects/><patch_index_0002><patch_index_0099>"
)
assert len(parse(f"<phrase>a</phrase><object>{boxes}</object>")[1][0].boxes) == 2

# 4.2 The inner cell; the original data loader used the outer one.
assert box_to_tokens((0, 0, 0.5, 0.5)) == (0, 15 * 32 + 15)
assert cells((0, 0, 0.5, 0.5)) == (0, 16 * 32 + 16)

# 4.3 The location embeddings, and with a small learning rate all other weights. The tokenizer of the new model is
# Tokenizer(file, grid=16), and config.json needs `"location_grid": 16`.
assert tokens_to_box(0, 17, grid=16) == (0.03125, 0.03125, 0.09375, 0.09375)
assert Tokenizer(tokenizer.model_file, Q, grid=16).vocab_size == tokenizer.vocab_size - 32 * 32 + 16 * 16

# 4.4 Text after a tag is tokenized separately, and sentencepiece puts a space in front of each text: "▁" and ".".
ids = tokenizer.encode("</phrase>.", add_bos=False)
assert [tokenizer.id_to_token[i] for i in ids] == ["</phrase>", "▁", "."]

# ---------------------------------------------------------------------------------------------- 5. Generation

# 5.1 `chosen` counts the entries of the cumulative distribution below u · total. Tokens of probability zero are last,
# where it is constant, and since u < 1, the count stops before them. At u = 0 the count is zero: the most likely token.
assert sample(torch.tensor([[-math.inf, 0.0, 1.0]]), 1.0, None, None, torch.tensor([0.0])).item() == 2

# 5.2 Yes: `best > finished[prompt][-1][0]`. It stops when num_beams sequences have ended and the best unfinished one scores
# no better than the worst of them. Scores are means over the length so far, so an unfinished one could still improve.

# 5.3 It counts them like the other ids of the prompt: after the pieces 4 and 5, the piece 6 is forbidden.
assert kosmos2.repeated_ngrams([*range(4, 4 + Q), 4, 5], 3) == [6]

# 5.4 Four times the cache, from the first new token on: `KVCache.keep` copies the rows of the chosen beams.
ids, image_mask = tokenizer.encode_prompt("<grounding>An image of")
state = model.prefill(torch.tensor([ids]), pixels, None, torch.tensor([image_mask]), max_new_tokens=3)
assert state.caches[0].keys.shape[0] == 1
finish_beams(state, 4)
assert state.caches[0].keys.shape[0] == 4

# -------------------------------------------------------------------------------------------------- 6. Weights

# 6.1 Four bytes for each of the 1,664,485,376 parameters and for the 133,195,776 of a second matrix.
assert 4 * (1_664_485_376 + 133_195_776) == 7_190_724_608
# 6.2 position_ids are 0, 1, 2, ...; embed_positions is the sinusoidal table. Both are computed, not learned.
# 6.3 The decoder's blocks grow by a third; 128 latents add 64 x 2,048 numbers to the resampler.
fewer, more = (Kosmos2Config(latent_query_num=n) for n in (64, 128))
with torch.device("meta"):
    counts = [sum(p.numel() for p in Kosmos2(c).parameters()) for c in (fewer, more)]
assert counts[1] - counts[0] == 64 * 2048

# 6.4 In `Checkpoint.tensor`: the sum of a tensor is not finite if one entry is not. It needs no copy of the tensor.
with tempfile.TemporaryDirectory() as folder:
    tensors = load_file(ROOT / "tiny" / "model.safetensors")
    tensors["image_to_text_projection.dense.weight"][0, 0] = torch.nan
    save_file(tensors, f"{folder}/model.safetensors")
    shutil.copy(ROOT / "tiny" / "config.json", folder)
    try:
        Checkpoint(folder).tensor("resampler.dense.weight", torch.float32)
        raise AssertionError("a NaN went through")
    except ValueError as error:
        assert "NaN" in str(error)

# ---------------------------------------------------------------------------------------------------- 7. Tasks

# 7.1 It still returns a box, but the score is lower: in training, absent phrases had random boxes.
present, absent = (say(f"<grounding><phrase> {what}</phrase>")[1] for what in ("a fire", "a black heart"))
print(f"7.1: {present[0].scores[0]:.2f} for a fire, {absent[0].scores[0]:.2f} for a black heart")
assert present[0].scores[0] > absent[0].scores[0]

# 7.2 No: the last image is the one that is described. Here the prompts ask for the color, in both orders.
hits = {"example first": 0, "example last": 0}
pairs = [(Scene.random(seed), Scene.random(seed + SECOND)) for seed in range(HELD_OUT, HELD_OUT + 60)]
colored = [[t for t in s.things if t.color] for pair in pairs for s in pair]
chosen = [(pair, *both) for pair, *both in zip(pairs, colored[::2], colored[1::2], strict=True) if all(both)][
    :30
]
for (scene, second), shown_things, asked_things in chosen:
    shown, asked = shown_things[0], asked_things[0]
    told, question = f"{link('It', [shown])} is {shown.color}.", f"{link('It', [asked])} is"
    for name, prompt, first, last in (
        ("example first", f"<grounding>{told}<image><grounding>{question}", scene, second),
        ("example last", f"<grounding>{question}<image><grounding>{told}", second, scene),
    ):
        example = Example("example of a box", prompt, f" {asked.color}.", (asked,), last)
        reply = tokenizer.decode(answers(model, tokenizer, [(first, example)])[0].ids)
        hits[name] += asked.color in reply
print("7.2:", hits, "of", len(chosen))
assert hits["example first"] > hits["example last"]


# 7.3 The kind of an object, which depends on details.
def small(scene):
    """The same scene, drawn with few pixels."""
    return SimpleNamespace(draw=lambda *a: scene.draw(28))


asked = choose_examples(40, HELD_OUT + 20_000, only=("color of box", "kind in box", "where", "ground"))
for name, drawn in (("sharp", asked), ("small", [(small(scene), example) for scene, example in asked])):
    found = {}
    for (scene, example), result in zip(asked, answers(model, tokenizer, drawn), strict=True):
        found.setdefault(example.task, []).extend(score(example, tokenizer.decode(result.ids), scene))
    shares = {task: sum(h) / len(h) for task, h in found.items()}
    print("7.3:", name, {task: round(share, 2) for task, share in shares.items()})
assert shares["kind in box"] == min(shares.values())

# 7.4 "a moon" instead of "moon" (to "Which thing is red?"), or instead of "a red moon" (to "What is it?").

# ------------------------------------------------------------------------------------------------- 8. Training

# 8.1 exp(0.3) = 1.35 cells.
assert abs(math.exp(0.3) - 1.35) < 0.01

# 8.2 `self.targets += [-100] * (len(prompt) - 1) + ...` in Row.add. It would also learn to write questions.

# 8.3 Nothing: the embeddings of neighboring cells would be unrelated.

# 8.4 Those of the resampler:
print(f"8.4: {sum(p.numel() for p in model.resampler.parameters()):,} parameters")

# ---------------------------------------------------------------------------------------------------- 9. Speed

# 9.1 Four times if memory is the limit for both. With 16 rows, fp32 does 8 operations per byte and int8 32, because its weights
# take a quarter of the bytes. So int8 reaches the ridge with fewer rows; above it, arithmetic is the limit.

# 9.2 Each rounding is off by up to 6e-8 of the partial sum. The errors have random signs, and kernels keep many partial
# sums, so a few 1e-7 of the result remain: tens of thousands of times less than the 1e-2 of int8.
x, w = torch.randn(64, 2048), torch.randn(256, 2048)
exact = x.double() @ w.double().T
assert 1e-8 < (x @ w.T - exact).norm() / exact.norm() < 1e-6

# 9.3 A step is 127/7 = 18 times as large, and so is the error.
weight = torch.randn(256, 2048)
q, scale = quantize(weight)
error8 = (q * scale[:, None] - weight).norm() / weight.norm()
scale4 = weight.abs().amax(1, keepdim=True) / 7
error4 = ((weight / scale4).round() * scale4 - weight).norm() / weight.norm()
assert 15 < error4 / error8 < 21
# 9.4 1.34 GB of weights, 393,216 bytes of cache per token: from 3,400 tokens on, beyond the context of 2,048.
assert TextConfig().max_positions < 1_342_000_000 // (2 * 24 * 2048 * 4)

# ----------------------------------------------------------------------------------------------- 10. Departures

# 10.1 Positions from 1 shift all encodings by one place, and attention depends mostly on distances. Without the scale,
# every token is several times shorter than the position that is added to it.
# 10.2 Scores that are √hd times as large make the softmax pick a single position. `attention_weights` in recording.py shows
# the formula; patch `torch.nn.functional.scaled_dot_product_attention` with one that passes scale=1.
# 10.3 Three standard errors must be at most 0.01. They shrink with the square root of the number of scenes, so with a
# standard deviation of 0.2 of the differences it takes (3 · 0.2 / 0.01)² scenes:
assert round((3 * 0.2 / 0.01) ** 2) == 3600

# ----------------------------------------------------------------------------------------------- 11. Fine-tuning

# 11.1 It can learn to describe a ladder in words the decoder has already learned, but it is unlikely to learn the word itself:
# the token embeddings and the order of the tokens belong to the decoder, which is frozen.
# 11.2 Run `python sample.py IMAGE --checkpoint RUN --task ground --text "a ladder"`: captions taught it the word and
# what a ladder looks like, and grounding needs nothing else.
# 11.3 The model gradually forgets tasks that are not in the data. Mix some of the old tasks into the new data.

print("all answers are correct")
