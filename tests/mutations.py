"""Check the tests: change one thing at a time in a copy of the code and see whether a test fails.

    python tests/mutations.py [--only WORDS]

Prints a table of the mutations and the first test that fails for each; exit status 1 if a mutation
survives. The tests must pass without a mutation, or those that fail seem to catch it. Changes that
alter no result are not in the list: without the bias of `k_proj`, for example, all scores of a query
shift by the same amount, which softmax ignores. Takes about ten minutes.
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
MODEL, TOKENIZER, LOADER = "kosmos2.py", "tokenizer.py", "load_weights.py"
FAST, CONVERT = "inference/fast.py", "inference/convert.py"
BEAM, SHORTCUTS = "inference/beam.py", "inference/shortcuts.py"
DATA, SCENES = "training/data.py", "training/scenes.py"
# The tests of each file, which are tried first; then all others.
TESTS_OF = {
    MODEL: ["test_parity", "test_model", "test_grounding"],
    TOKENIZER: ["test_tokenizer", "test_grounding"],
    LOADER: ["test_loader"],
    FAST: ["test_fast", "test_convert"],
    CONVERT: ["test_convert"],
    BEAM: ["test_beam"],
    SHORTCUTS: ["test_shortcuts"],
    DATA: ["test_tokenizer", "test_training"],
    SCENES: ["test_tokenizer", "test_training"],
}
SUITE = list(dict.fromkeys(name for names in TESTS_OF.values() for name in names))
# fmt: off
MUTATIONS = [
    # name, file, the code as it is, the code as it should not be
    ("no sub-LN in attention", MODEL, "self.out_proj(self.inner_attn_ln(attended))", "self.out_proj(attended)"),
    ("no sub-LN in the MLP", MODEL, "self.fc2(self.ffn_layernorm(hidden))", "self.fc2(hidden)"),
    ("sub-LN before the activation", MODEL, "hidden = self.activation(self.fc1(x))\n        return self.fc2(self.ffn_layernorm(hidden))", "return self.fc2(self.activation(self.ffn_layernorm(self.fc1(x))))"),
    ("sub-LN in the ViT as well", MODEL, "quick_gelu, sub_ln=False", "quick_gelu, sub_ln=True"),
    ("post-norm instead of pre-norm", MODEL, "x = x + self.mlp(self.norm2(x))", "x = self.norm2(x + self.mlp(x))"),
    ("features not of unit length", MODEL, "F.normalize(self.post_layernorm(x), dim=-1)", "self.post_layernorm(x)"),
    ("no norm after the ViT", MODEL, "F.normalize(self.post_layernorm(x), dim=-1)", "F.normalize(x, dim=-1)"),
    ("ViT positions after its first norm", MODEL, "self.pre_layernorm(x + self.position_embedding)", "self.pre_layernorm(x) + self.position_embedding"),
    ("[CLS] last", MODEL, "x = torch.cat([cls, patches], dim=1)", "x = torch.cat([patches, cls], dim=1)"),
    ("patches column by column", MODEL, "patches.flatten(2).transpose(1, 2)", "patches.transpose(2, 3).flatten(2).transpose(1, 2)"),
    ("exact GELU in the ViT", MODEL, "return x * torch.sigmoid(1.702 * x)", "return F.gelu(x)"),
    ("tanh GELU in the decoder", MODEL, "config.mlp_width, F.gelu,", 'config.mlp_width, partial(F.gelu, approximate="tanh"),'),
    ("latents not among the keys", MODEL, "context=torch.cat([features, latents], dim=1)", "context=features"),
    ("queries and keys exchanged", MODEL, "q = self.q_proj(x)\n        k = self.k_proj(context)", "q = self.k_proj(x)\n        k = self.q_proj(context)"),
    ("no bias on values", MODEL, "v = self.v_proj(context)", "v = F.linear(context, self.v_proj.weight)"),
    ("no bias on queries", MODEL, "q = self.q_proj(x)", "q = F.linear(x, self.q_proj.weight)"),
    ("attention not scaled", MODEL, "(q, k, v, attn_mask=mask)", "(q, k, v, attn_mask=mask, scale=1.0)"),
    ("heads not in order", MODEL, "attended.transpose(1, 2).reshape(B, T, D)", "attended.reshape(B, T, D)"),
    ("one token of the future", MODEL, "device=pad_mask.device).tril(S - T)", "device=pad_mask.device).tril(S - T + 1)"),
    ("a token does not attend to itself", MODEL, "device=pad_mask.device).tril(S - T)", "device=pad_mask.device).tril(S - T - 1)"),
    ("padding is attended to", MODEL, "mask = mask & ~pad_mask[:, None, :]", "mask = mask.expand(len(pad_mask), -1, -1)"),
    ("padding has positions", MODEL, "(~pad_mask).cumsum(dim=1)", "torch.ones_like(pad_mask).cumsum(dim=1)"),
    ("positions from 1", MODEL, "FIRST_POSITION = 2", "FIRST_POSITION = 1"),
    ("wrong guesses stay in the cache", SHORTCUTS, "cache.length -= count", "pass"),
    ("a guess is accepted unseen", SHORTCUTS, "if self.guesses and self.guesses[0][0] == tokens[0]:", "if self.guesses:"),
    ("the logits of a guess are those before it", SHORTCUTS, "(token, logits[:, i]) for i, token in enumerate(draft, start=1)", "(token, logits[:, i]) for i, token in enumerate(draft)"),
    ("scales of int8 checkpoints not read", FAST, "scale = scale.float()", "scale = torch.ones(scale.shape) / 127"),
    ("positions do not advance while decoding", MODEL, "self.next_position = positions[:, -1:] + 1", "self.next_position = positions[:, -1:]"),
    ("prefix does not shift positions", SHORTCUTS, "state.next_position = prefix.next_position.expand(B, 1)", "pass"),
    ("sines and cosines interleaved", MODEL, "torch.cat([angles.sin(), angles.cos()], dim=-1)", "torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)"),
    ("textbook frequencies", MODEL, "math.log(10000) / max(half - 1, 1)", "math.log(10000) / half"),
    ("embeddings not scaled", MODEL, "x = x * math.sqrt(D) + sin", "x = x + sin"),
    ("image inserted after the scale", MODEL, "image_embeds.to(x.dtype))", "image_embeds.to(x.dtype) / math.sqrt(x.shape[-1]))"),
    ("no final norm", MODEL, "return self.layer_norm(x)", "return x"),
    ("loss not shifted", MODEL, "predicted = logits[:, :-1].flatten(0, 1).float()", "predicted = logits[:, 1:].flatten(0, 1).float()"),
    ("bilinear pixels", MODEL, "Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR"),
    ("blue, green, red", MODEL, "to_rgb(image).resize", 'Image.merge("RGB", to_rgb(image).split()[::-1]).resize'),
    ("transparency on black", MODEL, 'image.size, "white")', 'image.size, "black")'),
    ("16-bit images clipped", MODEL, 'if image.mode.startswith("I") or image.mode == "F":', 'if image.mode == "F":'),
    ("rotated the wrong way", MODEL, "6: Image.Transpose.ROTATE_270", "6: Image.Transpose.ROTATE_90"),
    ("the cache forgets a token", MODEL, "self.keys[:, :, start : self.length] = k", "self.keys[:, :, start + 1 : self.length] = k[:, :, 1:]"),
    ("nucleus without the token that crosses p", MODEL, "probs[before >= top_p] = 0", "probs[probs.cumsum(dim=-1) > top_p] = 0"),
    ("nucleus of all tokens by subtraction", MODEL, "F.pad(probs.cumsum(dim=-1)[:, :-1], (1, 0))", "probs.cumsum(dim=-1) - probs"),
    ("beams continue after cut markup", BEAM, "token = EOS if row.cut else cut_markup", "token = cut_markup"),
    ("beams not scored by length", BEAM, "(candidate.score / length, row)", "(candidate.score, row)"),
    ("n-grams one too short", MODEL, "repeated_ngrams(row.all_ids, options.no_repeat_ngram_size)", "repeated_ngrams(row.all_ids, options.no_repeat_ngram_size - 1)"),
    ("<pad> is generated", MODEL, "scores[:, PAD] = -math.inf", "scores[:, PAD] += 0"),
    ("the length limit changes the text", MODEL, "options.constraint(row.all_ids, state.model.config.text.max_positions)", "options.constraint(row.all_ids, options.max_new_tokens - len(row.ids))"),
    ("int8 rows not scaled back", FAST, "torch.addcmul(self.bias, y, size, out=y)", "self.bias + y"),
    ("int8 sums that overflow without VNNI", FAST, "return 127 if exact else 63", "return 127"),
    ("int8 rows share one scale", FAST, "high = x.amax(dim=-1, keepdim=True)", "high = x.amax()[None]"),
    ("packed keys and values exchanged", FAST, 'for part in "qkv"]', 'for part in "qvk"]'),
    ("slices of a matrix out of order", FAST, "weight.unflatten(0, (count, -1))", "weight.unflatten(0, (-1, count)).transpose(0, 1)"),
    ("prefixes of names stay", LOADER, 'prefix.sub("", re.sub(WRAPPERS, "", name), count=1)', 're.sub(WRAPPERS, "", name)'),
    ("compressed files are read", LOADER, "item.compress_type != zipfile.ZIP_STORED", "False"),
    ("the grid of config.json is not read", LOADER, '("latent_query_num", "location_grid")', '("latent_query_num",)'),
    ("surplus rows are generated", TOKENIZER, "self.free_text[self.first_location :] = False", "self.free_text[self.first_location : self.end_of_locations] = False"),
    ("damaged models are saved", CONVERT, "    check_finite(model)\n", ""),
    ("half of a file is left", CONVERT, "part.unlink(missing_ok=True)", "pass"),
    ("a repeated row is not copied", MODEL, "row = replace(row, ids=[*row.ids], probabilities=[*row.probabilities])", "pass"),
    ("padding of other rows is kept", MODEL, "self.pad_mask = self.pad_mask[index]", "self.pad_mask = self.pad_mask[: len(index)]"),
    ("pieces keep sentencepiece's ids", TOKENIZER, "[i + 1 if i else", "[i if i else"),
    ("box corners of the training code", TOKENIZER, "math.ceil(x2 * grid - 1))", "math.floor(min(x2, 0.99999) * grid))"),
    ("boxes are not clipped", TOKENIZER, "(min(max(v, 0.0), 1.0) for v in values)", "values"),
    ("tags in a text are tags", TOKENIZER, 'strip_literal(text.strip()).replace("<", "<" + LITERAL)', "strip_literal(text.strip())"),
    ("tags that a model spells are tags", TOKENIZER, 'token.replace("▁", " ").replace("<", "<" + LITERAL)', 'token.replace("▁", " ")'),
    ("cells instead of centers", TOKENIZER, "left + 0.5, top + 0.5, right + 0.5, bottom + 0.5", "left, top, right + 1, bottom + 1"),
    ("thin boxes from center to center", TOKENIZER, "if left == right or top == bottom:", "if False:"),
    ("bottom-right corner anywhere", TOKENIZER, "[top:, left:] = True", "[:] = True"),
    ("score of one corner only", TOKENIZER, "probabilities[2 * i : 2 * i + 2]", "[probabilities[2 * i]] * 2 if probabilities else []"),
    ("box corners of the tokenizer in training", SCENES, "math.floor(min(x2, 0.99999) * grid))", "math.ceil(x2 * grid - 1))"),
    ("spans end at the shared prefix", DATA, "return first, len(through)", "return first, len(through) - 1"),
]
# fmt: on


def first_failure(name: str, file: str, old: str, new: str) -> str | None:
    """The first test that fails, None if none does."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(
            ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", ".pytest_cache")
        )
        text = (copy / file).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise SystemExit(f"mutation {name!r}: expected {old!r} once in {file}, got {text.count(old)}")
        (copy / file).write_text(text.replace(old, new), encoding="utf-8")
        names = dict.fromkeys([*TESTS_OF[file], *SUITE])  # without repetition
        tests = [f"tests/{name}.py" for name in names]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "--no-header",
            *tests,
        ]
        output = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        ).stdout
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output, re.MULTILINE)
    return failed.group(1) if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="only mutations with these words in their name")
    args = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if args.only in mutation[0]]
    survivors = 0
    print("| mutation | caught by |\n|---|---|")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutation, found in zip(
            chosen, pool.map(lambda mutation: first_failure(*mutation), chosen), strict=True
        ):
            survivors += found is None
            print(f"| {mutation[0]} | {f'`{found}`' if found else '**nothing**'} |", flush=True)
    print(f"\n{len(chosen) - survivors} of {len(chosen)} mutations are caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
