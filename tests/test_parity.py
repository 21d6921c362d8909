"""Equal to transformers' Kosmos-2, through the real loader, on random checkpoints of odd sizes.

A failure names the first layer that differs. Where transformers 5.23 is wrong, the test says so and
compares with what it computes when its error is worked around.
"""

import pytest
import torch
from conftest import HAS_TRANSFORMERS, TINY, VOCAB, needs_transformers, prompt_batch, rough
from PIL import Image

from kosmos2 import EOS, PAD, preprocess_image
from load_weights import SENTENCEPIECE, load_checkpoint

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
    "deep, one head, pictures that do not divide into patches": dict(
        latent_query_num=1,
        text_config=dict(vocab_size=VOCAB, embed_dim=33, layers=7, ffn_dim=50, attention_heads=1),
        vision_config=dict(hidden_size=24, intermediate_size=30, num_hidden_layers=5, num_attention_heads=3,
                           image_size=50, patch_size=12),
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=SIZES)
def both(request, tmp_path_factory):
    """(reference, ours, tokenizer) with the same rough random weights."""
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

    wanted, (logits, loss) = theirs(), ours()
    with torch.no_grad():
        assert difference(model.encode_image(pixels), wanted.image_embeds) < 2e-5
    assert difference(logits, wanted.logits) < 2e-5, first_difference(reference, model, theirs, ours)
    assert loss.item() == pytest.approx(wanted.loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("length", "options"),
    [(48, dict()), (48, dict(no_repeat_ngram_size=3)), (48, dict(no_repeat_ngram_size=1)), (24, dict(num_beams=3)),
     (24, dict(num_beams=3, no_repeat_ngram_size=3)), (24, dict(num_beams=4, min_new_tokens=24)), (12, dict(num_beams=2))],
)  # fmt: skip
@pytest.mark.parametrize("end_often", [False, True])
def test_generated_ids(both, length, options, end_often):
    """Greedy and beam search; with `end_often`, </s> is made likely, so that rows and beams end early."""
    reference, model, tokenizer = both
    pixels, tokens, image_mask, _ = batch(model, tokenizer, [PROMPTS[0], PROMPTS[0].replace("red", "two")])
    embedding = model.decoder.embed_tokens.weight
    before = embedding[EOS].clone()
    if end_often:
        raised = before + 0.35 * embedding[40:90].mean(0) / embedding[40:90].mean(0).norm() * before.norm()
        embedding.data[EOS] = raised
        reference.get_input_embeddings().weight.data[EOS] = raised
    try:
        ours = model.generate(tokens, pixels=pixels, image_mask=image_mask, max_new_tokens=length, **options)
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
    """Ids can agree by luck, where a random model repeats itself; the probabilities of 48 tokens in a row cannot."""
    reference, model, tokenizer = both
    pixels, tokens, image_mask, _ = batch(model, tokenizer, PROMPTS[:1])
    ours = model.generate(tokens, pixels, None, image_mask, max_new_tokens=48, min_new_tokens=48)[0]
    theirs = reference.generate(
        pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=image_mask.long(), do_sample=False,
        attention_mask=torch.ones_like(tokens), max_new_tokens=48, min_new_tokens=48, suppress_tokens=[PAD],
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    assert ours == theirs.sequences[0, tokens.shape[1] :].tolist()
    wanted = [logits[0].softmax(-1)[token].item() for logits, token in zip(theirs.logits, ours, strict=True)]
    assert ours.probabilities == pytest.approx(wanted, rel=1e-4)


def test_left_padded_rows_decode_as_they_do_alone(both):
    """transformers 5.23 shifts the positions of padded rows while it decodes; without its cache it does not."""
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
            wanted = reference(**alone).logits[0]
        assert difference(logits[row, real], wanted) < 2e-5
        theirs = reference.generate(
            **alone,
            attention_mask=real[None, real].long(),
            do_sample=False,
            max_new_tokens=16,
            suppress_tokens=[PAD],
        )
        theirs = theirs[0, int(real.sum()) :].tolist()
        assert new[row] == (theirs[: theirs.index(EOS) + 1] if EOS in theirs else theirs)


def test_text_alone(both):
    """transformers refuses text without a picture; its text model alone does not."""
    reference, model, tokenizer = both
    tokens = torch.tensor([tokenizer.encode("a red star and a blue square")])
    with torch.no_grad():
        assert difference(model(tokens), reference.text_model(input_ids=tokens).logits) < 2e-5


def test_the_bundled_model():
    """Ours and transformers read the same folder and write the same ids about the bundled picture."""
    reference = Kosmos2ForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()
    model, tokenizer = load_checkpoint(TINY)
    assert reference.dtype == torch.float32
    pixels = preprocess_image(Image.open(TINY / "scene.png"), model.config.vision.image_size)[None]
    for prompt in [
        "<grounding>An image of",
        "<grounding>Describe this image in detail:",
        "Question: How many shapes are there? Answer:",
    ]:
        tokens, image_mask, _ = prompt_batch(tokenizer, [prompt])
        theirs = reference.generate(
            pixel_values=pixels, input_ids=tokens, image_embeds_position_mask=image_mask.long(),
            attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=120,
        )[0, tokens.shape[1] :].tolist()  # fmt: skip
        ours = model.generate(tokens, pixels=pixels, image_mask=image_mask, max_new_tokens=120)[0]
        assert ours == theirs and ours[-1] == EOS


def test_pixels():
    """The image processor's pixels, on pictures of odd sizes and modes."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False)
    gradient = Image.radial_gradient("L").resize((301, 97))
    for picture in (
        gradient,
        Image.merge("RGB", [gradient, gradient.rotate(90, expand=False), gradient.rotate(180)]),
    ):
        theirs = processor(picture, return_tensors="pt").pixel_values[0]
        assert (preprocess_image(picture, 224) - theirs).abs().max() < 1e-5
