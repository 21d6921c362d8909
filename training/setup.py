"""What a training run starts with: the vocabulary and the initial weights."""

import io
import math
import random
import re
from pathlib import Path

import torch
import torch.nn.functional as F

from kosmos2 import Kosmos2, Kosmos2Config, TextConfig, VisionConfig
from tokenizer import GRID, Tokenizer, strip_tags
from training.scenes import Scene, tasks
from training.stickers import Stickers

# The sizes of the bundled model; each run sets vocab_size.
CONFIG = Kosmos2Config(
    vision=VisionConfig(image_size=168, patch_size=14, width=192, layers=6, heads=3, mlp_width=768),
    text=TextConfig(
        vocab_size=1, width=192, layers=4, heads=3, mlp_width=768, max_positions=2048, no_repeat_ngram_size=0
    ),
    latent_query_num=32,
    location_grid=GRID,
)


# ---- Vocabulary ------------------------------------------------------------------------------------


def train_vocabulary(model_file: Path, stickers: Stickers | None = None, scenes: int = 5000) -> None:
    """Train a sentencepiece model on prompts and answers about scenes; it covers all printable ASCII characters."""
    import sentencepiece

    sentences = []
    for seed in range(scenes):
        for example in tasks(Scene.random(seed, stickers), random.Random(seed)):
            sentences.append(strip_tags(example.prompt + " " + example.answer))
    # The trainer only considers pieces that at least two different words share.
    for word in sorted(set(re.findall(r"\w+", " ".join(sentences)))):
        sentences += [f"{word}.", f"{word},"]
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=content,  # a file name would be stored in the model
        vocab_size=480,
        hard_vocab_limit=False,
        model_type="unigram",
        required_chars="".join(chr(c) for c in range(33, 127)),
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=2,
    )
    model_file.write_bytes(content.getvalue())


# ---- Initial weights -------------------------------------------------------------------------------


def sincos_2d(rows: int, columns: int, width: int) -> torch.Tensor:
    """(rows * columns, width): sines and cosines of both coordinates, each row of unit length.
    Frequencies go from low to high."""
    quarter = width // 4
    frequencies = math.pi * torch.logspace(0, math.log10(min(rows, columns)), quarter) / 2
    y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    parts = []
    for coordinate in (x, y):
        angles = coordinate.flatten()[:, None] * frequencies  # (rows * columns, quarter)
        parts += [angles.sin(), angles.cos()]
    table = torch.cat(parts, dim=1)  # (rows * columns, 4 * quarter)
    return F.normalize(F.pad(table, (0, width - 4 * quarter)), dim=1)


@torch.no_grad()
def init_weights(model: Kosmos2, first_location: int, seed: int = 0) -> None:
    """Fan-in scaling, halved for the last matrix of each residual branch, and zero biases. Exceptions: ViT
    features have unit length, so `dense` starts near std 1, otherwise the latents outweigh the image. The
    ViT's position embeddings start as 2-D sinusoids, and location tokens as smooth functions of their
    position, so neighboring cells have similar embeddings."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.zero_()
    for block in [*model.vision.layers, *model.decoder.layers]:
        for last in (block.attn.out_proj, block.mlp.fc2):
            last.weight *= 0.5
    E = model.config.vision.width
    grid = model.config.vision.grid
    model.vision.class_embedding.normal_(std=E**-0.5)
    model.resampler.dense.weight.normal_(std=1.0)
    model.resampler.latent_query.normal_(std=1.0)
    model.vision.position_embedding[1:] = sincos_2d(grid, grid, E) * math.sqrt(E)
    locations = slice(first_location, first_location + GRID * GRID)
    model.decoder.embed_tokens.weight[locations] = sincos_2d(GRID, GRID, model.config.text.width)


@torch.no_grad()
def carry_over(model: Kosmos2, tokenizer: Tokenizer, old_model: Kosmos2, old_tokenizer: Tokenizer) -> None:
    """Copy the weights of another model of the same sizes, embeddings by the name of their token. A
    piece that is not in the other vocabulary starts as the mean of the pieces that spell it there."""
    old = old_model.state_dict()
    embedding = old.pop("decoder.embed_tokens.weight")
    try:
        model.load_state_dict(model.state_dict() | old)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"cannot continue from a model of other sizes ({reason})") from None
    old_ids = {token: i for i, token in enumerate(old_tokenizer.id_to_token)}
    for i, token in enumerate(tokenizer.id_to_token):
        ids = [old_ids[token]] if token in old_ids else old_tokenizer.encode_words(token.replace("▁", " "))
        model.decoder.embed_tokens.weight[i] = embedding[ids].mean(dim=0)
