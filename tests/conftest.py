"""Shared by the tests: paths, small random models, and the reference where it is installed."""

import importlib.util
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny"
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import sample as script  # noqa: E402
from inference.convert import save_checkpoint  # noqa: E402
from inference.fast import load_checkpoint  # noqa: E402
from kosmos2 import Kosmos2, Kosmos2Config, TextConfig, VisionConfig, pad_left  # noqa: E402
from load_weights import SENTENCEPIECE  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With KOSMOS2_NO_SKIPS, a skipped test is a failed test."""
    report = yield
    if report.skipped and os.environ.get("KOSMOS2_NO_SKIPS") and not item.get_closest_marker("official"):
        report.outcome, report.longrepr = (
            "failed",
            f"skipped, though KOSMOS2_NO_SKIPS is set: {report.longrepr}",
        )
    return report


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same random numbers in every run."""
    torch.manual_seed(0)


def rough(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random weights for which every part matters: norms far from 1, biases far from 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lm_head.weight"):
                continue  # tied to the embedding
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() > 1 and "position" not in name and "latent" not in name:
                noise *= (1.7 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(p[0].numel())
                if "fc2" in name or "out_proj" in name:
                    noise *= (
                        4  # let the blocks outweigh the embedding, or the tied output only echoes the input
                    )
            elif name.endswith("bias"):
                noise *= 0.2
            elif p.dim() == 1 and name.endswith("weight"):
                noise = 1 + 0.3 * noise
            p.copy_(noise)
    return model


VOCAB = Tokenizer(TINY / SENTENCEPIECE).vocab_size
SMALL = Kosmos2Config(
    vision=VisionConfig(image_size=42, patch_size=14, width=40, layers=2, heads=5, mlp_width=72),
    text=TextConfig(vocab_size=VOCAB, width=48, layers=3, heads=3, mlp_width=88, no_repeat_ngram_size=0),
    latent_query_num=5,
)


@pytest.fixture(scope="session")
def small() -> Kosmos2:
    """A small random model with the vocabulary of the bundled model."""
    return rough(Kosmos2(SMALL), seed=1).eval()


@pytest.fixture(scope="session")
def small_tokenizer() -> Tokenizer:
    return Tokenizer(TINY / SENTENCEPIECE, SMALL.latent_query_num)


@pytest.fixture(scope="session")
def small_folder(small, tmp_path_factory) -> Path:
    """The small model as a checkpoint in the published layout. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("small")
    save_checkpoint(small, TINY / SENTENCEPIECE, folder)
    return folder


@pytest.fixture(scope="session")
def tiny():
    """The bundled model and its tokenizer."""
    return load_checkpoint(TINY)


@pytest.fixture
def official_model_file() -> Path:
    """The path of the official sentencepiece model."""
    folder = os.environ.get("KOSMOS2_REFERENCE")
    if not folder:
        pytest.skip("KOSMOS2_REFERENCE is not set to a folder with the official sentencepiece model")
    return Path(folder) / SENTENCEPIECE


def copy(folder: Path, to: Path, **config_changes) -> Path:
    """Copy a checkpoint folder, with entries of config.json replaced (None removes one)."""
    shutil.copytree(folder, to)
    if config_changes:
        config = json.loads((to / "config.json").read_text()) | config_changes
        (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return to


def prompt_batch(tokenizer: Tokenizer, prompts: list[str], images: list[int] | None = None):
    """Prompts of any length -> tokens, image_mask, pad_mask, padded on the left."""
    return pad_left(
        [tokenizer.encode_prompt(p, n) for p, n in zip(prompts, images or [1] * len(prompts), strict=True)]
    )


def run(capsys, *arguments, command=script) -> tuple[int, str, str]:
    """A command (sample.py, or a module of inference/) in this process: (exit status, stdout, stderr)."""
    try:
        status = command.main([str(a) for a in arguments])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()
