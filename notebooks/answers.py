"""Answers to the exercises of the notebooks, with code that checks what can be checked.

    python notebooks/answers.py

Read an answer after you have made your own prediction.
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
from evaluate import HELD_OUT, answers, ask_about, score
from PIL import Image
from safetensors.torch import load_file, save_file
from scenes import SECOND, Example, Scene, link

import kosmos2
from kosmos2 import Kosmos2, Kosmos2Config, TextConfig, preprocess_image, quantize, record, sample
from load_weights import Checkpoint, load_checkpoint
from tokenizer import Tokenizer, box_to_tokens, parse, tokens_to_box

torch.set_grad_enabled(False)
torch.manual_seed(0)
model, tokenizer = load_checkpoint(ROOT / "tiny")
picture = Image.open(ROOT / "tiny" / "scene.png").convert("RGB")
pixels = preprocess_image(picture, model.config.vision.image_size)[None]


def say(prompt: str, image_embeds=None, **options):
    """(text, entities, raw) of a prompt about the picture, or about these embeddings."""
    ids, mask = tokenizer.encode_prompt(prompt)
    embeds = model.encode_image(pixels) if image_embeds is None else image_embeds
    new = model.generate(
        torch.tensor([ids]), None, embeds, torch.tensor([mask]), max_new_tokens=100, **options
    )[0]
    return *tokenizer.read(ids, new), tokenizer.decode(new)


# ------------------------------------------------------------------------------------------------ 0. Overview

# 0.1 Without <grounding> no tags and no locations come: in training only texts that began with it had any.
assert "<" not in say("An image of")[2]

# 0.2 It speaks all the same, of shapes that are not there; it knows nothing else. Its scores are low.
black = model.encode_image(preprocess_image(Image.new("RGB", (112, 112)), 112)[None])
seen, unseen = say("<grounding>An image of")[1], say("<grounding>An image of", black)[1]
mean = lambda entities: (
    sum(s for e in entities for s in e.scores) / max(1, sum(len(e.scores) for e in entities))
)  # noqa: E731
assert mean(unseen) < mean(seen)

# 0.3 It should matter: slots have positions, and latents have roles, learned together. But every slot is seen
# by all words, so the change is small where a latent's role does not hang on its place.
embeds = model.encode_image(pixels)
swapped = embeds.clone()
swapped[0, [3, 20]] = embeds[0, [20, 3]]
print("0.3:", say("<grounding>An image of", swapped)[0])

# 0.4 (1, H, Q, N + Q): the latents are among their own keys (notebook 2).
with record(model) as seen_there:
    model.encode_image(pixels)
N, Q = model.config.vision.positions, model.config.latent_query_num
assert seen_there["resampler.x_attn"][0].shape == (1, model.config.text.heads, Q, N + Q)

# -------------------------------------------------------------------------------------------------- 1. Vision

vit, E = model.vision, model.config.vision.width


def features(order=None, before=False):
    """The ViT with its patches in another order, changed before or after the positions are added."""
    patches = vit.patch_embedding(pixels).flatten(2).mT[0]
    places = vit.position_embedding
    if order is not None and before:
        patches = patches[order]
    x = torch.cat([vit.class_embedding[None], patches]) + places
    if order is not None and not before:
        x = torch.cat([x[:1], x[1:][order]])
    x = vit.pre_layernorm(x[None])
    for layer in vit.layers:
        x = layer(x)
    return F.normalize(vit.post_layernorm(x), dim=-1)[0]


# 1.1 The outputs are shuffled in the same way, and nothing else happens: attention does not know an order.
order = torch.randperm(N - 1)
torch.testing.assert_close(features(order)[1:], features()[1:][order], rtol=1e-3, atol=1e-4)
torch.testing.assert_close(features(order)[0], features()[0], rtol=1e-3, atol=1e-4)

# 1.2 Now the patches stand at wrong places: that is another picture, a jigsaw, with other features.
assert (features(order, before=True)[0] - features()[0]).norm() > 0.05

# 1.3 A change of about a percent: hardly to be seen in a caption, and yet not the published model.
with patch.object(kosmos2, "quick_gelu", F.gelu):
    other = Kosmos2(model.config).eval()
other.load_state_dict(model.state_dict())
change = float((other.vision(pixels) - vit(pixels)).norm() / vit(pixels).norm())
assert 1e-3 < change < 0.2

# 1.4 [CLS] has no place in the grid: its position stays as it is, only the patches' are interpolated.
torch.testing.assert_close(vit.place_embedding(5, 9)[0], vit.position_embedding[0])

# ----------------------------------------------------------------------------------------------- 2. Resampler

# 2.1 A head could not look away: softmax must spend its attention somewhere, and without the latents all of it
# goes to the picture. It could not say "what I look for is not here" except by averaging over everything.

# 2.2 Only the latents themselves: all other shapes follow from widths.
half = Kosmos2(replace(model.config, latent_query_num=16)).state_dict()
assert [n for n, t in model.state_dict().items() if t.shape != half[n].shape] == ["resampler.latent_query"]

# 2.3 Louder keys mean larger scores, of both signs: attention gets sharper, and the balance between picture and
# latents moves (here it is measured), without anything new having been seen.
with record(model) as loud:
    model.resampler(10 * vit(pixels))
aways = [s["resampler.x_attn"][0][..., N:].sum(-1).mean() for s in (seen_there, loud)]
print(f"2.3: attention on the latents {aways[0]:.2f}, with features ten times as long {aways[1]:.2f}")
assert not torch.allclose(model.resampler(10 * vit(pixels)), model.resampler(vit(pixels)), atol=0.1)

# 2.4 A second cross-attention whose result is added to the first one's. With an `out_proj` of zeros it adds
# nothing until it is trained; without the residual it would have to relearn everything. A checkpoint of it needs a
# row in NAMES only if its names are to differ.


class TwoLayers(kosmos2.Resampler):
    def __init__(self, config):
        super().__init__(config)
        self.x_attn2 = kosmos2.Attention(config.text.width, config.text.heads)
        self.x_attn2.out_proj.weight.zero_()
        self.x_attn2.out_proj.bias.zero_()

    def forward(self, features):
        latents = super().forward(features)  # (B, Q, D)
        return latents + self.x_attn2(latents, torch.cat([self.dense(features), latents], dim=1))


two_layers = TwoLayers(model.config)
two_layers.load_state_dict(model.resampler.state_dict(), strict=False)  # all but the new layer
torch.testing.assert_close(two_layers(vit(pixels)), model.resampler(vit(pixels)))
with patch.object(model, "resampler", two_layers):
    assert say("<grounding>An image of")[0].startswith("An image of a green triangle")

# 2.5 8 (Q + 2) + 1 <= 2048: above Q = 253.
assert 8 * (253 + 2) + 1 <= TextConfig().max_positions < 8 * (254 + 2) + 1

# ------------------------------------------------------------------------------------------------- 3. Decoder

# 3.1 Words before the picture cannot see it: causal attention. They are read as if there were none. (The first
# word after it can; so the model may still caption, but it never saw this order in training.)

# 3.2 Let the first P columns be seen by all of the first P rows: mask[:P, :P] = True. (A "prefix LM".)
mask = kosmos2.causal_mask(5, 5)
mask[:3, :3] = True
assert mask[0].tolist() == [True, True, True, False, False]

# 3.3 It would need a row of NAMES for the projection, instead of an entry in TIED, and a tensor of its own in
# the model: 533 MB more for the published sizes.
assert TextConfig().vocab_size * TextConfig().width * 4 == 532_783_104

# 3.4 The bias of k_proj: every score of a query gains the same q·b, and softmax forgets it.
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
two = "<phrase>a</phrase><object><patch_index_0001><patch_index_0044></delimiter_of_multi_objects/><patch_index_0002><patch_index_0099></object>"
assert len(parse(two)[1][0].boxes) == 2

# 4.2 Inside the box; the training code took the cell beyond the line.
assert box_to_tokens((0, 0, 0.5, 0.5)) == (0, 15 * 32 + 15) and box_to_tokens(
    (0, 0, 0.5, 0.5), training=True
) == (0, 16 * 32 + 16)

# 4.3 One line, GRID in tokenizer.py: everything that reads or writes locations takes it from there, and the model
# knows it only by the size of its vocabulary. To be trained again: the location embeddings, and with a small learning
# rate all the rest, which has learned to say 1,024 others.
assert tokens_to_box(0, 17, grid=16) == (0.03125, 0.03125, 0.09375, 0.09375)
assert Tokenizer(tokenizer.model_file, Q, grid=16).vocab_size == tokenizer.vocab_size - 32 * 32 + 16 * 16

# 4.4 A tag ends a text, and sentencepiece puts a space in front of each text it is given: "▁" and ".".
assert [tokenizer.tokens[i] for i in tokenizer.encode("</phrase>.", add_bos=False)] == ["</phrase>", "▁", "."]

# ---------------------------------------------------------------------------------------------- 5. Generation

# 5.1 `drawn` counts the entries of the cumulative distribution below u · total. Tokens of probability zero come
# last, where it is flat, and u < 1 ends before them. At u = 0 nothing is below: the first, likeliest token.
assert sample(torch.tensor([[-math.inf, 0.0, 1.0]]), 1.0, None, None, torch.tensor([0.0])).item() == 2

# 5.2 When K texts have ended and the best running one scores no better than the worst of them. (Scores are means
# over the length so far: a running text could still improve. The published search stops here all the same.)

# 5.3 One id in all slots would be a 3-gram that repeats itself at once. With different ids no 3-gram comes twice in
# the slots; they only forbid a text to run through these very pieces in this order.
assert len(set(range(4, 4 + Q))) == Q

# 5.4 Four times the cache, taken at the first step: `KVCache.select` copies the rows of the beams that won.

# -------------------------------------------------------------------------------------------------- 6. Weights

# 6.1 Four bytes for each of the 1,664,485,376 parameters and for the 133,195,776 of a second matrix.
assert 4 * (1_664_485_376 + 133_195_776) == 7_190_724_608
# 6.2 position_ids are 0, 1, 2, ...; embed_positions is the table of sines. Both are computed, not learned.
# 6.3 The decoder's blocks grow by a third; 128 latents add 64 x 2,048 numbers to the resampler.
fewer, more = (Kosmos2Config(latent_query_num=n) for n in (64, 128))
with torch.device("meta"):
    counts = [sum(p.numel() for p in Kosmos2(c).parameters()) for c in (fewer, more)]
assert counts[1] - counts[0] == 64 * 2048

# 6.4 In `Checkpoint.tensor`: a sum over the tensor is not finite if one of its entries is not.
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

# 7.1 It points at something all the same: it was never asked to find what is not there. The score is lower.
there, missing = (say(f"<grounding><phrase> the {what}</phrase>")[1] for what in ("red star", "black heart"))
assert there[0].scores[0] > missing[0].scores[0]

# 7.2 The question first and its example last: the last picture is the one that is described, and the example has
# turned into the question. Here a shape is asked about by an example of a color, in both orders.
hits = {"example first": 0, "example last": 0}
for seed in range(HELD_OUT, HELD_OUT + 30):
    scene, second = Scene.random(seed), Scene.random(seed + SECOND)
    shown, asked = scene.shapes[0], second.shapes[0]
    told, wanted = f"{link('It', [shown])} is {shown.color}.", f"{link('It', [asked])} is"
    for name, prompt, first, last in (
        ("example first", f"<grounding>{told}<image><grounding>{wanted}", scene, second),
        ("example last", f"<grounding>{wanted}<image><grounding>{told}", second, scene),
    ):
        example = Example("example of a box", prompt, f" {asked.color}.", (asked,), last)
        reply = tokenizer.decode(answers(model, tokenizer, [(first, example)])[0])
        hits[name] += asked.color in reply
print("7.2:", hits, "of 30")
assert hits["example first"] > 20 > hits["example last"]


# 7.3 Everything that hangs on outlines; colors and places last of all.
def small(scene):
    """The same scene, drawn with a quarter as many pixels a side."""
    return SimpleNamespace(draw=lambda *a: scene.draw(28).resize((112, 112), Image.Resampling.BICUBIC))


asked = ask_about(40, HELD_OUT + 20_000, only=("color of box", "shape in box", "where", "ground"))
for name, pictures in (("sharp", asked), ("small", [(small(scene), example) for scene, example in asked])):
    found = {}
    for (scene, example), reply in zip(asked, answers(model, tokenizer, pictures), strict=True):
        found.setdefault(example.task, []).extend(score(example, tokenizer.decode(reply), scene))
    shares = {task: sum(h) / len(h) for task, h in found.items()}
    print("7.3:", name, {task: round(share, 2) for task, share in shares.items()})
assert shares["shape in box"] == min(shares.values())

# 7.4 "the top left" where "top left" was wanted.

# ------------------------------------------------------------------------------------------------- 8. Training

# 8.1 exp(0.3) = 1.35 cells.
assert abs(math.exp(0.3) - 1.35) < 0.01
# 8.2 `self.targets += [-100] * (len(prompt) - 1) + ...` in Row.add. It would learn to ask questions, at the cost
# of some of its answers. 8.3 Nothing: it would have to learn for each of 1,024 tokens alone what it means.
# 8.4 The resampler's; of the bundled model:
print(f"8.4: {sum(p.numel() for p in model.resampler.parameters()):,} parameters")

# ---------------------------------------------------------------------------------------------------- 9. Speed

# 9.1 Four times while memory decides. With 16 rows fp32 does 8 operations for a byte: above the ridge the processor
# decides, and then it depends on how many int8 products it does at once.
# 9.2 Rounding errors of fp32, 6e-8 each, add as a random walk: about 6e-8 · √2048 of a typical term.
# 9.3 A step is 127/7 = 18 times as large, and so is the error.
weight = torch.randn(256, 2048)
q, scale = quantize(weight)
error8 = (q * scale[:, None] - weight).norm() / weight.norm()
scale4 = weight.abs().amax(1, keepdim=True) / 7
error4 = ((weight / scale4).round() * scale4 - weight).norm() / weight.norm()
assert 15 < error4 / error8 < 21
# 9.4 1.34 GB of weights, 393,216 bytes of cache a token: from 3,400 tokens on, beyond the trained 2,048.
assert TextConfig().max_positions < 1_342_000_000 // (2 * 24 * 2048 * 4)

print("all answers hold")
