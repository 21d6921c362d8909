"""Would the tests notice? Change one thing at a time in a copy of the code, and see that a test fails.

    python tests/mutations.py [--only WORDS]

Prints a table of the mutations and the first test that each one fails; exit status 1 if one survives. A
change that alters no result at all cannot be caught, and is no error: without the bias of `k_proj`, for
example, all scores of a query shift alike, and their softmax stays. Takes some ten minutes.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUITE = ["test_model", "test_parity", "test_grounding", "test_tokenizer", "test_sample", "test_packed"]

MODEL, WORDS, LOADER = "kosmos2.py", "tokenizer.py", "load_weights.py"
MUTATIONS = [
    # what is wrong, where, the line as it is, the line as it should not be
    ("no sub-LN in attention", MODEL, "self.out_proj(self.inner_attn_ln(x))", "self.out_proj(x)"),
    ("no sub-LN in the MLP", MODEL, "self.fc2(self.ffn_layernorm(self.activation(self.fc1(x))))", "self.fc2(self.activation(self.fc1(x)))"),
    ("sub-LN before the activation", MODEL, "self.ffn_layernorm(self.activation(self.fc1(x)))", "self.activation(self.ffn_layernorm(self.fc1(x)))"),
    ("sub-LN in the ViT as well", MODEL, "quick_gelu, sub_ln=False", "quick_gelu, sub_ln=True"),
    ("post-norm instead of pre-norm", MODEL, "x = x + self.mlp(self.norm2(x))", "x = self.norm2(x + self.mlp(x))"),
    ("features not of unit length", MODEL, "F.normalize(self.post_layernorm(x), dim=-1)", "self.post_layernorm(x)"),
    ("no norm after the ViT", MODEL, "F.normalize(self.post_layernorm(x), dim=-1)", "F.normalize(x, dim=-1)"),
    ("ViT positions after its first norm", MODEL, "self.pre_layernorm(x + places)", "self.pre_layernorm(x) + places"),
    ("[CLS] last", MODEL, "x = torch.cat([cls, patches], dim=1)", "x = torch.cat([patches, cls], dim=1)"),
    ("patches column by column", MODEL, "patches.flatten(2).transpose(1, 2)", "patches.transpose(2, 3).flatten(2).transpose(1, 2)"),
    ("exact GELU in the ViT", MODEL, "return x * torch.sigmoid(1.702 * x)", "return F.gelu(x)"),
    ("tanh GELU in the decoder", MODEL, "config.mlp_width, F.gelu,", 'config.mlp_width, partial(F.gelu, approximate="tanh"),'),
    ("latents not among the keys", MODEL, "torch.cat([features, latents], dim=1))", "features)"),
    ("queries and keys exchanged", MODEL, "q, k, v = self.q_proj(x), self.k_proj(context),", "q, k, v = self.k_proj(x), self.q_proj(context),"),
    ("no bias on values", MODEL, "self.k_proj(context), self.v_proj(context)", "self.k_proj(context), F.linear(context, self.v_proj.weight)"),
    ("no bias on queries", MODEL, "q, k, v = self.q_proj(x),", "q, k, v = F.linear(x, self.q_proj.weight),"),
    ("attention not scaled", MODEL, "(q, k, v, attn_mask=mask)", "(q, k, v, attn_mask=mask, scale=1.0)"),
    ("heads not put back in order", MODEL, "x = x.transpose(1, 2).reshape(B, T, D)  # (B, T, D)\n        return", "x = x.reshape(B, T, D)\n        return"),
    ("one token of the future", MODEL, "device=device).tril(S - T)", "device=device).tril(S - T + 1)"),
    ("a token does not see itself", MODEL, "device=device).tril(S - T)", "device=device).tril(S - T - 1)"),
    ("padding is seen", MODEL, "(mask & ~pad_mask[:, None, :] | itself)", "(mask | itself & pad_mask[:, None, :])"),
    ("padding has positions", MODEL, "torch.ones_like(tokens) if pad_mask is None else (~pad_mask).long()", "torch.ones_like(tokens)"),
    ("positions from 1", MODEL, "FIRST_POSITION = 2", "FIRST_POSITION = 1"),
    ("positions stand still while decoding", MODEL, "self.next_position = self.next_position + 1", "self.next_position = self.next_position + 0"),
    ("sines and cosines in turn", MODEL, "torch.cat([angles.sin(), angles.cos()], dim=-1)", "torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)"),
    ("textbook frequencies", MODEL, "math.log(10000) / max(half - 1, 1)", "math.log(10000) / half"),
    ("embeddings not scaled", MODEL, "x = x * math.sqrt(x.shape[-1]) + sin", "x = x + sin"),
    ("picture put in after the scale", MODEL, "image_embeds.to(x.dtype))", "image_embeds.to(x.dtype) / math.sqrt(D))"),
    ("no last norm", MODEL, "return self.layer_norm(x)", "return x"),
    ("loss not shifted", MODEL, "logits[:, :-1].flatten(0, 1).float(), labels[:, 1:]", "logits.flatten(0, 1).float(), labels"),
    ("bilinear pixels", MODEL, "Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR"),
    ("blue, green, red", MODEL, 'image.convert("RGB").resize', 'Image.merge("RGB", image.convert("RGB").split()[::-1]).resize'),
    ("positions interpolated bilinearly", MODEL, 'mode="bicubic"', 'mode="bilinear"'),
    ("the cache forgets a token", MODEL, "self.keys[:, :, start : self.length] = k", "self.keys[:, :, start + 1 : self.length] = k[:, :, 1:]"),
    ("nucleus without the token that crosses p", MODEL, "probs[ahead >= top_p] = 0", "probs[ahead + probs > top_p] = 0"),
    ("beams not scored by length", MODEL, "(score / length, text)", "(score, text)"),
    ("n-gram block one too short", MODEL, "repeated_ngrams(text, o.no_repeat_ngram_size)", "repeated_ngrams(text, o.no_repeat_ngram_size - 1)"),
    ("<pad> is generated", MODEL, "scores[:, PAD] = -math.inf", "scores[:, PAD] += 0"),
    ("int8 rows not scaled back", MODEL, "torch.addcmul(self.bias, y, size, out=y)", "self.bias + y"),
    ("int8 sums that overflow without VNNI", MODEL, "torch.tensor(64.0 * 127)) else 63", "torch.tensor(64.0 * 127)) else 127"),
    ("int8 rows share one scale", MODEL, "x.amax(dim=-1, keepdim=True), -x.amin(dim=-1, keepdim=True)", "x.amax()[None], -x.amin()[None]"),
    ("packed keys and values exchanged", LOADER, 'for part in "qkv"]', 'for part in "qvk"]'),
    ("all parts of a batch share the first rows of the cache", MODEL, "self.keys[rows], self.values[rows]\n        return part", "self.keys[: rows.stop - rows.start], self.values[: rows.stop - rows.start]\n        return part"),
    ("pieces keep sentencepiece's ids", WORDS, "[i + 1 if i else", "[i if i else"),
    ("box corners of the training code", WORDS, "math.ceil(x2 * grid - 1), math.ceil(y2 * grid - 1)", "math.floor(x2 * grid - 1e-9), math.floor(y2 * grid)"),
    ("cells instead of centres", WORDS, "left + 0.5, top + 0.5, right + 0.5, bottom + 0.5", "left, top, right + 1, bottom + 1"),
    ("thin boxes from centre to centre", WORDS, "if left == right or top == bottom:", "if False:"),
    ("lower right corner anywhere", WORDS, "(rows >= cell // self.grid) & (columns >= cell % self.grid)", "rows >= 0"),
    ("score of one corner only", WORDS, "probabilities[at + i : at + i + 2]", "[probabilities[at + i]] * 2 if probabilities else []"),
]  # fmt: skip


def first_failure(name: str, file: str, old: str, new: str) -> str | None:
    """The test that notices, None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".pytest_cache"))
        text = (copy / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"mutation {name!r}: {file} holds {text.count(old)} times {old!r}")
        (copy / file).write_text(text.replace(old, new), encoding="utf-8")
        tests = [f"tests/{suite}.py" for suite in SUITE]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *tests]
        output = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.MULTILINE)
    return failed.group(1) if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations with these words in their name")
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation[0]]
    survivors = 0
    print("| mutation | noticed by |\n|---|---|")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutation, found in zip(chosen, pool.map(lambda mutation: first_failure(*mutation), chosen), strict=True):
            survivors += found is None
            print(f"| {mutation[0]} | {f'`{found}`' if found else '**nothing**'} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutations are noticed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
