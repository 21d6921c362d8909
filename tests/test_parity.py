"""Equal to transformers' Kosmos-2, through the loader, on random checkpoints of odd sizes.

A failure names the first layer that differs. Where transformers 5.23 has a bug, a comment describes
it, and the test compares with the result after a workaround.
"""

import copy

import pytest
import torch
from conftest import HAS_TRANSFORMERS, TINY, VOCAB, needs_transformers, prompt_batch, rough
from PIL import Image
from recording import record

import inference.fast
from inference.beam import beam_search
from kosmos2 import EOS, PAD, finish, preprocess_image
from load_weights import HUGGING_FACE, SENTENCEPIECE, load_checkpoint, rename
from training.train import features_of

pytestmark = needs_transformers
if HAS_TRANSFORMERS:
    from transformers import Kosmos2Config as ReferenceConfig
    from transformers import Kosmos2ForConditionalGeneration

PROMPTS = ["<grounding>An image of a red star and", "<grounding><phrase> the blue square</phrase>"]
SIZES = {
    "odd": dict(
        latent_query_num=7,
        text_config=dict(vocab_size=VOCAB, embed_dim=96, layers=3, ffn_dim=208, attention_heads=6),
        vision_config=dict(hidden_size=80, intermediate_size=176, num_hidden_layers=3, num_attention_heads=5, image_size=56),
    ),
    "deep, one head, images that do not divide into patches": dict(
        latent_query_num=1,
        text_config=dict(vocab_size=VOCAB, embed_dim=33, layers=7, ffn_dim=50, attention_heads=1),
        vision_config=dict(hidden_size=24, intermediate_size=30, num_hidden_layers=5, num_attention_heads=3,
                           image_size=50, patch_size=12),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=SIZES)
def both(request, tmp_path_factory):
    """(reference, ours, tokenizer) with the same random weights; ours with plain layers."""
    folder = tmp_path_factory.mktemp("reference")
    reference = rough(Kosmos2ForConditionalGeneration(ReferenceConfig(**SIZES[request.param])), seed=3).eval()
    reference.save_pretrained(folder)
    model, tokenizer = load_checkpoint(folder, tokenizer=TINY / SENTENCEPIECE)
    return reference, model, tokenizer


def batch(model, tokenizer, prompts):
    size = model.config.vision.image_size
    pixels = torch.randn(len(prompts), 3, size, size, generator=torch.Generator().manual_seed(0))
    return pixels, *prompt_batch(tokenizer, prompts)


def difference(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def first_difference(reference, model, run_reference, run_ours) -> str:
    """The first layer whose outputs differ, found with hooks on both models."""
    pairs = {
        "vision.post_layernorm": "vision_model.model.post_layernorm",
        "resampler": "image_to_text_projection",
    }
    for i in range(model.config.vision.layers):
        pairs[f"vision.layers.{i}"] = f"vision_model.model.encoder.layers.{i}"
    for i in range(model.config.text.layers):
        pairs[f"decoder.layers.{i}"] = f"text_model.model.layers.{i}"
    outputs: dict[str, list] = {name: [] for name in pairs}
    hooks = []
    for ours, theirs in pairs.items():
        for module in (model.get_submodule(ours), reference.get_submodule(theirs)):
            hooks.append(
                module.register_forward_hook(
                    lambda m, args, out, at=ours: outputs[at].append(
                        out[0] if isinstance(out, tuple) else out
                    )
                )
            )
    run_reference(), run_ours()
    for hook in hooks:
        hook.remove()
    order = sorted(
        pairs, key=lambda n: (["vision", "resampler", "decoder"].index(n.split(".")[0]), "post" in n, n)
    )
    bad = [name for name in order if difference(outputs[name][-1], outputs[name][0]) > 2e-5]
    return f"first layer that differs: {bad[0] if bad else 'none, so what follows the last layer'}"


def test_image_embeddings_logits_and_loss(both):
    reference, model, tokenizer = both
    pixels, tokens, image_mask, _ = batch(model, tokenizer, PROMPTS[:1] * 2)
    labels = tokens.masked_fill(image_mask, -100)

    @torch.no_grad()
    def theirs():
        return reference(
            pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=image_mask.long(), labels=labels
        )

    @torch.no_grad()
    def ours():
        return model(tokens, pixels=pixels, image_mask=image_mask, labels=labels)

    expected, (logits, loss) = theirs(), ours()
    with torch.no_grad():
        assert difference(model.encode_image(pixels), expected.image_embeds) < 2e-5
    assert difference(logits, expected.logits) < 2e-5, first_difference(reference, model, theirs, ours)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "options"),
    [(48, dict()), (48, dict(no_repeat_ngram_size=3)), (48, dict(no_repeat_ngram_size=1)), (24, dict(num_beams=3)),
     (24, dict(num_beams=3, no_repeat_ngram_size=3)), (24, dict(num_beams=4, min_new_tokens=24)), (12, dict(num_beams=2))],
)  # fmt: skip
@pytest.mark.parametrize("end_often", [False, True])
def test_generated_ids(both, length, options, end_often):
    """Greedy and beam search; with `end_often`, </s> is made likely, so that rows and beams end
    early."""
    reference, model, tokenizer = both
    pixels, tokens, image_mask, _ = batch(model, tokenizer, [PROMPTS[0], PROMPTS[0].replace("red", "two")])
    embedding = model.decoder.embed_tokens.weight
    before = embedding[EOS].clone()
    if end_often:
        raised = before + 0.35 * embedding[40:90].mean(0) / embedding[40:90].mean(0).norm() * before.norm()
        embedding.data[EOS] = raised
        reference.get_input_embeddings().weight.data[EOS] = raised
    try:
        inputs = dict(pixels=pixels, image_mask=image_mask, max_new_tokens=length, **options)
        ours = (
            beam_search(model, tokens, **inputs)
            if "num_beams" in options
            else model.generate(tokens, **inputs)
        )
        for row in range(2):  # one at a time: transformers lets rows of a batch wait for each other
            theirs = reference.generate(
                pixel_values=pixels[row : row + 1], input_ids=tokens[row : row + 1],
                image_embeds_position_mask=image_mask[row : row + 1].long(),
                attention_mask=torch.ones_like(tokens[row : row + 1]), do_sample=False, max_new_tokens=length,
                suppress_tokens=[PAD], **options,
            )[0, tokens.shape[1] :].tolist()  # fmt: skip
            assert ours[row] == (theirs[: theirs.index(EOS) + 1] if EOS in theirs else theirs)
    finally:
        embedding.data[EOS] = before
        reference.get_input_embeddings().weight.data[EOS] = before


def test_probabilities_at_every_step(both):
    """Ids can agree by chance, because a random model repeats itself; 48 probabilities in a row
    cannot."""
    reference, model, tokenizer = both
    pixels, tokens, image_mask, _ = batch(model, tokenizer, PROMPTS[:1])
    state = model.prefill(tokens, pixels, None, image_mask, max_new_tokens=48, min_new_tokens=48)
    ours = finish(state)[0]
    theirs = reference.generate(
        pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=image_mask.long(), do_sample=False,
        attention_mask=torch.ones_like(tokens), max_new_tokens=48, min_new_tokens=48, suppress_tokens=[PAD],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert ours.ids == theirs.sequences[0, tokens.shape[1] :].tolist()
    expected = [
        logits[0].softmax(-1)[token].item() for logits, token in zip(theirs.logits, ours.ids, strict=True)
    ]
    assert ours.probabilities == pytest.approx(expected, rel=1e-4)


def test_left_padded_rows_decode_like_unpadded_ones(both):
    """transformers 5.23 shifts the positions of padded rows while decoding, so it gets them
    unpadded."""
    reference, model, tokenizer = both
    pixels, tokens, image_mask, pad_mask = batch(model, tokenizer, PROMPTS)
    new = model.generate(tokens, pixels=pixels, image_mask=image_mask, pad_mask=pad_mask, max_new_tokens=16)
    with torch.no_grad():
        logits = model(tokens, pixels=pixels, image_mask=image_mask, pad_mask=pad_mask)
    for row in range(2):
        real = ~pad_mask[row]
        alone = dict(
            pixel_values=pixels[row : row + 1],
            input_ids=tokens[row : row + 1, real],
            image_embeds_position_mask=image_mask[row : row + 1, real].long(),
        )
        with torch.no_grad():
            expected = reference(**alone).logits[0]
        assert difference(logits[row, real], expected) < 2e-5
        theirs = reference.generate(
            **alone,
            attention_mask=real[None, real].long(),
            do_sample=False,
            max_new_tokens=16,
            suppress_tokens=[PAD],
        )
        theirs = theirs[0, int(real.sum()) :].tolist()
        assert new[row] == (theirs[: theirs.index(EOS) + 1] if EOS in theirs else theirs)


def test_gradients_of_every_parameter(both):
    reference, model, tokenizer = both
    pixels, tokens, image_mask, _ = batch(model, tokenizer, PROMPTS[:1])
    labels = tokens.masked_fill(image_mask, -100)
    model.requires_grad_(True)
    model(tokens, pixels=pixels, image_mask=image_mask, labels=labels)[1].backward()
    reference(
        pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=image_mask.long(), labels=labels
    ).loss.backward()
    theirs = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[rename(name, HUGGING_FACE)].grad
        if name.endswith("k_proj.bias"):  # zero: a bias of the keys shifts all scores of a query alike
            assert parameter.grad.abs().max() < 1e-5 and expected.abs().max() < 1e-5
        else:
            assert difference(parameter.grad, expected) < 1e-3, name
    model.zero_grad(), reference.zero_grad()


def test_hidden_states_and_attention_weights(both):
    """The output of every block and the attention weights of every layer."""
    reference, model, tokenizer = both
    pixels, tokens, image_mask, _ = batch(model, tokenizer, PROMPTS[:1])
    reference.set_attn_implementation("eager")
    with torch.no_grad(), record(model) as seen:
        model(tokens, pixels=pixels, image_mask=image_mask)
        found = reference(
            pixel_values=pixels,
            input_ids=tokens,
            image_embeds_position_mask=image_mask.long(),
            output_attentions=True,
            output_hidden_states=True,
        )
    layers = model.config.text.layers
    for i in range(layers):
        assert difference(seen[f"decoder.layers.{i}.attn"][0], found.attentions[i]) < 2e-5, i
        if i < layers - 1:  # transformers returns the last one after the final norm
            assert difference(seen[f"decoder.layers.{i}"][0], found.hidden_states[i + 1]) < 2e-5, i
    with torch.no_grad():
        vision = reference.vision_model(pixels, output_attentions=True, output_hidden_states=True)
    for i in range(model.config.vision.layers):
        assert difference(seen[f"vision.layers.{i}.attn"][0], vision.attentions[i]) < 2e-5, i
        assert difference(seen[f"vision.layers.{i}"][0], vision.hidden_states[i + 1]) < 2e-5, i
    assert difference(seen["resampler.x_attn"][0], found.projection_attentions) < 2e-5


@pytest.mark.parametrize("side", ["left", "right"])
def test_bfloat16_with_padding(both, side):
    """In half precision, a padded row has the logits of the unpadded row, on whichever side it is
    padded."""
    _, model, tokenizer = both
    pixels, tokens, image_mask, _ = batch(model, tokenizer, PROMPTS[:1])
    half = copy.deepcopy(model).to(torch.bfloat16)
    width = (5, 0) if side == "left" else (0, 5)
    padded = torch.nn.functional.pad(tokens, width, value=PAD)
    mask = torch.nn.functional.pad(image_mask, width, value=False)
    pad_mask = torch.nn.functional.pad(torch.zeros_like(image_mask), width, value=True)
    with torch.no_grad():
        expected = half(tokens, pixels=pixels, image_mask=image_mask)
        found = half(padded, pixels=pixels, image_mask=mask, pad_mask=pad_mask)[~pad_mask][None]
        exact = model(tokens, pixels=pixels, image_mask=image_mask)
    assert difference(found.float(), expected.float()) < 0.03
    assert difference(expected.float(), exact) < 0.2


def test_text_alone(both):
    """transformers raises for text without an image; its text model alone does not."""
    reference, model, tokenizer = both
    tokens = torch.tensor([tokenizer.encode("a red star and a blue square")])
    with torch.no_grad():
        assert difference(model(tokens), reference.text_model(input_ids=tokens).logits) < 2e-5


@pytest.mark.parametrize("load", [load_checkpoint, inference.fast.load_checkpoint])
def test_the_bundled_model(load):
    """With plain layers and with fast ones: transformers reads the same folder and generates the same ids for the bundled image."""
    reference = Kosmos2ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    model, tokenizer = load(TINY)
    assert reference.dtype == torch.float32
    pixels = preprocess_image(Image.open(TINY / "scene.png"), model.config.vision.image_size)[None]
    for prompt in [
        "<grounding>An image of",
        "<grounding>Describe this image in detail:",
        "Question: How many things are there? Answer:",
    ]:
        tokens, image_mask, _ = prompt_batch(tokenizer, [prompt])
        theirs = reference.generate(
            pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=image_mask.long(),
            attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=120,
        )[0, tokens.shape[1] :].tolist()  # fmt: skip
        ours = model.generate(tokens, pixels=pixels, image_mask=image_mask, max_new_tokens=120)[0]
        assert ours == theirs and ours[-1] == EOS


def test_pixels():
    """Equal to the pixels of the image processor, for odd sizes and modes."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False)
    gradient = Image.radial_gradient("L").resize((301, 97))
    for image in (
        gradient,
        Image.merge("RGB", [gradient, gradient.rotate(90, expand=False), gradient.rotate(180)]),
    ):
        theirs = processor(image, return_tensors="pt").pixel_values[0]
        assert (preprocess_image(image, 224) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("side", [3, 4, 7])
def test_images_of_another_size(both, side):
    """Training on scenes resizes the position embeddings as transformers does."""
    reference, model, _ = both
    vision = reference.vision_model.model
    pixels = torch.randn(2, 3, *[side * model.config.vision.patch_size] * 2)
    with torch.no_grad():
        expected = vision(pixels, interpolate_pos_encoding=True).last_hidden_state
        expected = torch.nn.functional.normalize(vision.post_layernorm(expected), dim=-1)
        assert difference(features_of(model.vision, pixels), expected) < 1e-5
