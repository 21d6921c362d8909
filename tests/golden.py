"""Record in golden.json what transformers computes with the small random model of conftest.py.

    python tests/golden.py

The tests compare with this record, also on a machine without transformers.
"""

import json
import tempfile
from pathlib import Path

import torch
from conftest import SMALL, TINY, prompt_batch, rough
from test_model import GOLDEN, PROMPTS, pixels

from inference.convert import save_checkpoint
from kosmos2 import EOS, PAD, Kosmos2
from load_weights import SENTENCEPIECE
from tokenizer import Tokenizer

OPTIONS = {
    "greedy": dict(max_new_tokens=24),
    "3-gram block": dict(max_new_tokens=24, no_repeat_ngram_size=3),
    "beams": dict(max_new_tokens=16, num_beams=3),
}

if __name__ == "__main__":
    from transformers import Kosmos2ForConditionalGeneration

    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(rough(Kosmos2(SMALL), seed=1), TINY / SENTENCEPIECE, folder)
        reference = Kosmos2ForConditionalGeneration.from_pretrained(folder).eval()
    tokens, image_mask, _ = prompt_batch(Tokenizer(TINY / SENTENCEPIECE, SMALL.latent_query_num), PROMPTS[:1])
    inputs = dict(pixel_values=pixels(1), input_ids=tokens, image_embeds_position_mask=image_mask.long())
    with torch.no_grad():
        out = reference(**inputs, labels=tokens)
    ids, probabilities = {}, {}
    for name, options in OPTIONS.items():
        made = reference.generate(
            **inputs, attention_mask=torch.ones_like(tokens), do_sample=False, suppress_tokens=[PAD],
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        new = made.sequences[0, tokens.shape[1] :].tolist()
        ids[name] = new[: new.index(EOS) + 1] if EOS in new else new
        if "num_beams" not in options:
            steps = zip(made.logits, ids[name], strict=False)
            probabilities[name] = [logits[0].softmax(-1)[token].item() for logits, token in steps]
    record = {
        "image_embeds": out.image_embeds[0, 0, :8].tolist(), "logits": out.logits[0, -1, :8].tolist(),
        "loss": out.loss.item(), "options": OPTIONS, "ids": ids, "probabilities": probabilities,
    }  # fmt: skip
    Path(GOLDEN).write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {GOLDEN}")
