"""The published results, with the official weights in the folder KOSMOS2_CHECKPOINT.

KOSMOS2_REFERENCE is the folder with the official demo image, snowman.png. The original demo saved
it as JPEG first, and the published ids are those of that image.
"""

import io
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from kosmos2 import pad_left, preprocess_image
from load_weights import load_checkpoint

pytestmark = pytest.mark.official

CAPTION = (
    "64007 10 43867 64008 64009 64057 64876 64010 5950 597 32 64007 10 646 64008 64009 64018 64924 64010 4 2"
)
DETAIL = (
    "24 1648 1338 10 43867 1280 32 64007 10 30879 64008 64009 64018 65020 64010 12 5 1842 4 71 17 1679 64007 10 3958 "
    "64008 64009 64061 64263 64010 6 64007 15719 64008 64009 64253 64617 64010 6 8 64007 9626 64008 64009 64413 64545 "
    "64010 6 23 64007 10 4363 64008 64009 64623 64885 64010 2255 8 64007 10 3486 64008 64009 64809 65036 64010 1560 "
    "2255 4 24 43867 1684 7 27 3774 5 10356 9 5 646 6 8 22 1684 7 30 10 2007 8 16239 4337 4 2"
)
LOGITS = {  # of ids 0, 1, 2, after one, two and three new tokens
    CAPTION: [(-1.56726, -5.00741, 4.36449), (-2.14702, -4.96630, 4.59256), (-0.93524, -4.68829, 6.24061)],
    DETAIL: [(-0.90936, -4.57837, 5.96361), (2.45213, -4.09060, 8.73868), (-0.76246, -4.77166, 6.57630)],
}


@pytest.fixture(scope="module")
def official():
    folder, reference = os.environ.get("KOSMOS2_CHECKPOINT"), os.environ.get("KOSMOS2_REFERENCE")
    if not folder or not reference:
        pytest.skip("KOSMOS2_CHECKPOINT and KOSMOS2_REFERENCE are not set")
    model, tokenizer = load_checkpoint(folder)
    jpeg = io.BytesIO()
    Image.open(Path(reference) / "snowman.png").convert("RGB").save(jpeg, "JPEG")
    return model, tokenizer, preprocess_image(Image.open(jpeg), 224)[None]


@pytest.mark.parametrize(
    ("prompt", "published"),
    [("<grounding>An image of", CAPTION), ("<grounding>Describe this image in detail:", DETAIL)],
)
def test_published_ids_and_logits(official, prompt, published):
    model, tokenizer, pixels = official
    ids, mask = tokenizer.encode_prompt(prompt)
    arguments = dict(pixels=pixels, image_mask=torch.tensor([mask]))
    new = model.generate(torch.tensor([ids]), max_new_tokens=128, no_repeat_ngram_size=3, **arguments)[0]
    assert new == list(map(int, published.split()))
    text = torch.tensor([ids + new[:3]])
    arguments["image_mask"] = torch.tensor([mask + [False] * 3])
    with torch.no_grad():
        logits = model(text, **arguments)[0, -3:, :3]
    torch.testing.assert_close(logits, torch.tensor(LOGITS[published]), rtol=1e-5, atol=1e-5)


def test_a_left_padded_batch_of_both_prompts(official):
    """Each prompt is answered as it is alone."""
    model, tokenizer, pixels = official
    prompts = ["<grounding>An image of", "<grounding>Describe this image in detail:"]
    tokens, image_mask, pad_mask = pad_left([tokenizer.encode_prompt(prompt) for prompt in prompts])
    new = model.generate(
        tokens,
        pixels.expand(2, -1, -1, -1),
        None,
        image_mask,
        pad_mask,
        max_new_tokens=128,
        no_repeat_ngram_size=3,
    )
    assert new == [list(map(int, published.split())) for published in (CAPTION, DETAIL)]
