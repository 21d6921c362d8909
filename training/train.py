"""Train a Kosmos-2: the bundled model from scratch, or any checkpoint on GRIT data.

    python -m training.train --out runs/tiny    from scratch, on scenes; about five hours on two cores
    python -m training.train --out runs/short --vision-steps 20 --steps 50    to see that it works
    python -m training.train --checkpoint WEIGHTS --data grit.jsonl ...    fine-tuning: training/README.md
    python -m training.train --out more --stickers DIR --continue-from tiny    with stickers, too
    torchrun --nproc-per-node 8 -m training.train ...     the same on many processes

Writes checkpoint.pt (a run resumes from it), and at the end the model in the published layout and
log.jsonl. The data of each step depends only on its number: a resumed run sees the same data, on any
number of processes. tiny/README.md describes the runs that made the bundled model.
"""

import argparse
import json
import math
import os
import sys
import time
import zipfile
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

# The number of targets differs from batch to batch. oneDNN would cache kernels for a thousand such
# shapes, with several GB of scratch memory.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from inference.convert import check_finite, check_target, replacing, save_checkpoint
from inference.fast import load_checkpoint
from inference.progress import Progress, progress_bar, torchrun_rank
from kosmos2 import Kosmos2, VisionTransformer
from load_weights import SENTENCEPIECE
from sample import CommandParser, report_error, run_command
from tokenizer import Tokenizer
from training.data import Grit, Scenes, Steps, read_ahead
from training.evaluate import HELD_OUT, evaluate
from training.muon import Muon
from training.patches import PatchHead
from training.scenes import NUMBERS, Scene
from training.setup import CONFIG, carry_over, init_weights, train_vocabulary
from training.stickers import Stickers

ROOT = Path(__file__).resolve().parent.parent

PARTS = ["vision", "resampler", "decoder"]
# In scenes, the losses of these words have a larger weight. Whether equal objects are grouped ("two cats")
# is decided by one token of about seventy; without the weight, the model does not learn to compare objects.
AMOUNTS = ["a", "an", "nothing", *NUMBERS]
AMOUNT_WEIGHT = 10


# ---- The objective ---------------------------------------------------------------------------------


def features_of(vision: VisionTransformer, pixels: Tensor) -> Tensor:
    """The ViT's features (I, N, E) of images of any size. The position embeddings of the patches are resized
    like an image, as in notebooks/01_vision; at the model's image size, they stay the same."""
    cls, patches = vision.position_embedding.tensor_split([1])
    grid = math.isqrt(len(patches))
    side = pixels.shape[-1] // vision.patch_embedding.stride[0]
    table = patches.T.reshape(1, -1, grid, grid)
    resized = F.interpolate(table, size=(side, side), mode="bicubic").flatten(2)[0].T
    positions = torch.cat([cls, resized])
    return torch.func.functional_call(vision, {"position_embedding": positions}, pixels)


class Losses(nn.Module):
    """The losses of a batch from data.py: those of the next tokens, one per target, and with a PatchHead
    that of the patches' labels. The attention mask lets each sequence attend to itself and, unless its
    number is negative, to the image (number 0)."""

    def __init__(self, model: Kosmos2, patch_head: PatchHead | None = None):
        super().__init__()
        self.model = model
        self.patch_head = patch_head

    def forward(self, pixels, image_mask, tokens, positions, sequences, targets, patch_labels=None):
        model = self.model
        T = tokens.shape[1]
        features = features_of(model.vision, pixels)  # (I, N, E)
        patch_loss = features.new_zeros(())
        if self.patch_head is not None:
            patch_loss = self.patch_head(features, patch_labels)
        has_target = targets != -100
        if not has_target.any():  # images without sequences
            return features.new_zeros(0), patch_loss
        x = model.embed(tokens, image_embeds=model.resampler(features), image_mask=image_mask)  # (B, T, D)
        same = sequences[:, :, None] == sequences[:, None, :]  # (B, T, T)
        image = (sequences[:, :, None] > 0) & (sequences[:, None, :] == 0)
        mask = (same | image) & torch.ones(T, T, dtype=torch.bool, device=tokens.device).tril()
        x = model.decoder(x, positions, mask[:, None])
        logits = model.decoder.unembed(x[has_target]).float()  # (targets, V)
        losses = F.cross_entropy(logits, targets[has_target], reduction="none")  # (targets,)
        return losses, patch_loss


def recompute_activations(model: Kosmos2) -> None:
    """Activation checkpointing: run each block again in the backward pass. Saves memory and costs time."""
    for block in [*model.vision.layers, *model.decoder.layers]:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


# ---- The run ---------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, a constant rate, and over the last 60 % of the steps a linear decay to zero. To extend
    a run, keep a copy of checkpoint.pt from before the decay, and rerun from it with more steps."""
    rising = (step + 1) / warmup
    falling = (steps - step) / (0.6 * steps)
    return peak * min(rising, 1.0, falling)


def make_optimizers(model: Kosmos2, name: str, lr: float) -> list[torch.optim.Optimizer]:
    """AdamW; or Muon for the matrices inside the blocks and AdamW for the rest, with one learning rate."""
    inside = []  # matrices inside the blocks
    others = []
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name == "muon" and ".layers." in parameter_name and parameter.dim() == 2:
            inside.append(parameter)
        else:
            others.append(parameter)
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    return [Muon(inside, lr), adamw] if inside else [adamw]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices; other CPUs emulate it, which is slower than float32."""
    names = ("avx512_bf16", "amx_bf16", "sve_bf16")
    return device.type == "cuda" or any(torch.cpu.get_capabilities().get(name) for name in names)


def mean_losses(steps: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each loss over the steps that have it: a step may have no locations, for instance."""
    values: dict[str, list[float]] = defaultdict(list)
    for losses in steps:
        for name, value in losses.items():
            values[name].append(value)
    return {name: round(sum(found) / len(found), 4) for name, found in values.items()}


class Run:
    """A training run and the files in its folder."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.output = Progress(args.steps)
        self.folder = args.out
        self.rank, self.world = torchrun_rank()
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", self.rank % torch.cuda.device_count())
        self.autocast = has_bfloat16(self.device) and not args.fp32
        check_target(self.folder)
        self.stickers = Stickers(args.stickers) if args.stickers else None
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model, self.tokenizer = self.open_model()
        for name, part in self.model.named_children():
            part.requires_grad_(name in args.train)
        self.patch_head = None
        self.vision_steps = 0
        if not args.checkpoint:
            kinds = len(Scene((), "white", 0, stickers=self.stickers).kinds)
            self.patch_head = PatchHead(self.model.config.vision.width, kinds)
            self.vision_steps = args.vision_steps
        self.last_step = self.vision_steps + args.steps
        if args.recompute:
            recompute_activations(self.model)
        self.losses = Losses(self.model, self.patch_head).to(self.device)
        if self.world > 1:
            unused = self.patch_head is not None
            self.losses = nn.parallel.DistributedDataParallel(self.losses, find_unused_parameters=unused)
        self.optimizers = make_optimizers(self.losses, args.optimizer, args.lr)
        config = self.model.config
        self.weights = torch.ones(config.text.vocab_size, device=self.device)  # of the losses, by target
        if args.data:
            self.source = Grit(args.data, self.tokenizer, config, args.seed)
            self.say(self.source.summary())
        else:
            first = args.seed * 100_000_000
            rows = self.vision_steps * args.batch  # without sequences
            self.source = Scenes(self.tokenizer, config, args.length, first, rows, self.stickers, args.batch)
            for word in AMOUNTS:
                self.weights[self.tokenizer.encode_words(word)] = AMOUNT_WEIGHT
        self.step = 0
        self.minutes = 0.0
        self.log: list[dict] = []
        if (self.folder / "checkpoint.pt").exists():
            self.resume()

    def open_model(self) -> tuple[Kosmos2, Tokenizer]:
        """The checkpoint to fine-tune; without one, the small model with a new vocabulary."""
        if self.args.checkpoint:
            return load_checkpoint(self.args.checkpoint)
        words = self.folder / SENTENCEPIECE
        if self.rank == 0 and not words.exists():
            self.say("training the vocabulary")
            train_vocabulary(words, self.stickers)
        if self.world > 1:
            dist.barrier()
        tokenizer = Tokenizer(words, CONFIG.latent_query_num)
        model = Kosmos2(replace(CONFIG, text=replace(CONFIG.text, vocab_size=tokenizer.vocab_size)))
        init_weights(model, tokenizer.first_location, self.args.seed)
        if self.args.continue_from:
            carry_over(model, tokenizer, *load_checkpoint(self.args.continue_from))
        return model, tokenizer

    def resume(self) -> None:
        """Continue from checkpoint.pt; ValueError if it is damaged or does not fit this model."""
        file = self.folder / "checkpoint.pt"
        try:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:
                    raise ValueError("checksum error")
            state = torch.load(file, weights_only=True, map_location=self.device)
            for name, value in self.settings().items():
                if state["settings"].get(name) != value:
                    raise ValueError(f"{name} was {state['settings'].get(name)}, is {value}")
            if state["model"].keys() != self.trained_parameters().keys():
                raise ValueError("other parameters are trained")
            self.model.load_state_dict(self.model.state_dict() | state["model"])
            if self.patch_head is not None:
                self.patch_head.load_state_dict(state["patch_head"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]
            self.minutes = state["minutes"]
            self.log = state["log"]
        except Exception as error:  # a damaged file can raise anything
            reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
            remedy = "use the settings it was made with, or another --out"
            raise ValueError(f"cannot resume from {file} ({reason}); {remedy}") from None
        self.say(f"resuming {self.folder} at step {self.step}")

    def settings(self) -> dict:
        """The options that may not change when a run is resumed."""
        names = ("seed", "batch", "length", "vision_steps", "optimizer")
        values = {name: getattr(self.args, name) for name in names}
        values["train"] = sorted(self.args.train)
        values["data"] = [os.path.realpath(path) for path in self.args.data or []]
        for name in ("checkpoint", "stickers", "continue_from"):
            values[name] = getattr(self.args, name)
            if values[name] is not None and os.path.exists(values[name]):
                values[name] = os.path.realpath(values[name])
        return values

    def trained_parameters(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def save(self) -> None:
        """Write checkpoint.pt; a run that is killed meanwhile keeps the previous one."""
        if self.rank == 0:
            check_finite(self.model)
            state = {
                "kosmos2_training": True,  # load_weights.py rejects it by this key
                "step": self.step, "minutes": self.minutes, "log": self.log, "settings": self.settings(),
                "model": self.trained_parameters(),
                "optimizers": [o.state_dict() for o in self.optimizers],
            }  # fmt: skip
            if self.patch_head is not None:
                state["patch_head"] = self.patch_head.state_dict()
            with replacing(self.folder / "checkpoint.pt") as part:
                try:
                    torch.save(state, part)
                except RuntimeError as error:  # such as a full disk
                    raise OSError(f"cannot write {part} ({str(error).splitlines()[0]})") from None

    def set_learning_rate(self) -> None:
        peak, warmup = self.args.lr, self.args.warmup
        lr = learning_rate(self.step, self.last_step, peak, warmup)
        if self.step >= self.vision_steps > 0:  # warm up again for the parts that start now
            lr = min(lr, learning_rate(self.step - self.vision_steps, self.last_step, peak, warmup))
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = lr

    def train_step(self, micro_batches: list[dict[str, np.ndarray]]) -> dict[str, float]:
        """One update from all micro-batches of all processes; returns the mean losses. The gradient is
        that of the weighted losses, summed and divided by the number of targets, plus the mean patch loss."""
        self.set_learning_rate()
        counts = [float((batch["targets"] != -100).sum()) for batch in micro_batches]
        count = max(sum(self.sum_over_processes(counts)), 1.0)
        sums = torch.zeros(5)  # location loss and count, word loss and count, patch loss
        for i, batch in enumerate(micro_batches):
            batch = {name: torch.from_numpy(array).to(self.device) for name, array in batch.items()}
            synchronize = nullcontext()
            if self.world > 1 and i < len(micro_batches) - 1:
                synchronize = self.losses.no_sync()  # gradients are averaged after the last one
            with synchronize:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                    losses, patch_loss = self.losses(**batch)
                targets = batch["targets"][batch["targets"] != -100]
                # The processes' gradients are averaged.
                token_loss = (self.weights[targets] * losses).sum() * self.world / count
                (token_loss + patch_loss / len(micro_batches)).backward()
            is_location = targets >= self.tokenizer.first_location
            losses = losses.detach()
            parts = [losses[is_location].sum(), is_location.sum()]
            parts += [losses[~is_location].sum(), (~is_location).sum(), patch_loss.detach()]
            sums += torch.stack(parts).cpu()
        totals = self.sum_over_processes(sums.tolist())
        if not math.isfinite(sum(totals)):
            remedy = "lower --lr and rerun, which continues from the last checkpoint.pt"
            raise ValueError(f"the loss is not finite at step {self.step}; {remedy}")
        torch.nn.utils.clip_grad_norm_([p for p in self.losses.parameters() if p.requires_grad], 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        first = {"locations": 0, "words": 2}  # where the sum of the losses is; their number follows
        means = {name: totals[i] / totals[i + 1] for name, i in first.items() if totals[i + 1]}
        if self.patch_head is not None:
            means["patches"] = totals[4] / len(micro_batches) / self.world
        return means

    def sum_over_processes(self, values: list[float]) -> list[float]:
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(totals)
        return totals.tolist()

    def train(self) -> None:
        args = self.args
        end = max(self.last_step, self.step)
        steps = Steps(self.source, self.step, end, args.batch, args.accumulate, self.rank, self.world)
        if self.world > 1:
            share = f"{args.batch // self.world} of the {args.batch} images of each step"
            self.output.message(f"process {self.rank} of {self.world} trains on {share}")
        recent = []
        clock = time.perf_counter()
        for micro_batches in read_ahead(steps):
            recent.append(self.train_step(micro_batches))
            now = time.perf_counter()
            self.minutes += (now - clock) / 60
            clock = now
            last = self.step == self.last_step
            if self.step % args.log_every == 0 or self.step == self.vision_steps or last:
                means = mean_losses(recent)
                self.log.append({"step": self.step, "minutes": round(self.minutes, 2), **means})
                self.progress(means)
                recent = []
            due = self.step % (4 * args.save_every) == 0 or last
            if due and not args.data and self.step > self.vision_steps and self.rank == 0:
                found = evaluate(self.model, self.tokenizer, args.scenes, HELD_OUT, stickers=self.stickers)
                accuracy = {task: round(share, 4) for task, (share, _) in found.items()}
                self.log.append({"step": self.step, "accuracy": accuracy})
                self.say(json.dumps(self.log[-1]))
            if self.step % args.save_every == 0 or last:
                self.save()
        self.finish()

    def say(self, text: str, end: str = "\n") -> None:
        if self.rank == 0:
            self.output.message(text, end=end)

    def progress(self, losses: dict[str, float]) -> None:
        left = self.minutes / self.step * (self.last_step - self.step)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        bar = progress_bar(self.step, self.last_step, f"loss: {shown}  {left:.0f} min left")
        self.say(bar, end="" if self.output.in_place else "\n")

    def finish(self) -> None:
        """Write the model in the published layout and the log."""
        if self.rank == 0:
            save_checkpoint(self.model, self.tokenizer.model_file, self.folder)
            with open(self.folder / "log.jsonl", "w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in self.log)
            self.say(f"wrote {self.folder}")


def parse_arguments(argv=None) -> argparse.Namespace:
    p = CommandParser("training.train", __doc__)
    add = p.add_argument
    add("--out", type=Path, default=ROOT / "runs" / "tiny", help="folder of the run")
    add("--checkpoint", help="fine-tune these weights (anything that load_weights.py reads)")
    data_help = "files of GRIT-format records (default: scenes)"
    add("--data", type=Path, nargs="+", metavar="JSONL", help=data_help)
    add("--stickers", type=Path, metavar="DIR", help="PNGs STYLE/KIND--NAME.png to mix into scenes")
    add("--continue-from", metavar="DIR", help="initial weights; the vocabulary is a new one")
    train_help = f"what to train, of {', '.join(PARTS)} (default: all)"
    add("--train", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=train_help)
    add("--log-every", type=int, default=20, metavar="STEPS", help="log the losses (default: 20)")
    save_help = "write checkpoint.pt (default: 250); on scenes, every fourth time also measure accuracy"
    add("--save-every", type=int, default=250, metavar="STEPS", help=save_help)
    add("--scenes", type=int, default=40, help="held-out scenes to measure on (default: 40)")
    add = p.add_argument_group("optimization").add_argument
    vision_help = "steps that train only the ViT, before --steps (scenes without --checkpoint; default: 2500)"
    add("--vision-steps", type=int, default=2500, help=vision_help)
    add("--steps", type=int, default=6000, help="steps of the whole model (default: 6000)")
    add("--batch", type=int, default=32, help="images per step, over all processes (default: 32)")
    add("--accumulate", type=int, default=1, metavar="N", help="split each batch into N parts")
    add("--length", type=int, default=256, help="tokens per row of scenes (default: 256)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    warmup_help = "steps in which the learning rate rises (default: a tenth of --steps, at most 100)"
    add("--warmup", type=int, metavar="STEPS", help=warmup_help)
    add("--optimizer", choices=["muon", "adamw"], default="muon", help="default: muon")
    add("--fp32", action="store_true", help="compute in float32 even if the device has bfloat16")
    add("--recompute", action="store_true", help="activation checkpointing: saves memory, costs time")
    seed_help = "random seed of the initial weights and the order of the data"
    add("--seed", type=int, default=0, choices=range(10), help=seed_help)
    args = p.parse_args(argv)
    if args.warmup is None:
        args.warmup = min(100, max(1, args.steps // 10))
    if not 0 <= args.steps < 2**31 or not 0 <= args.vision_steps < 2**31:
        p.error("--steps and --vision-steps must be between 0 and 2^31")
    for name in ("batch", "accumulate", "length", "warmup", "log_every", "save_every", "scenes"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 < args.lr < math.inf:
        p.error("--lr must be a positive number")
    if args.data and not args.checkpoint:
        p.error("--data needs --checkpoint, the model to fine-tune")
    if args.continue_from and args.checkpoint or args.stickers and args.data:
        p.error("--continue-from does not go with --checkpoint, nor --stickers with --data")
    return args


def main(argv=None) -> int:
    args = parse_arguments(argv)
    try:
        if torchrun_rank()[1] > 1:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        Run(args).train()
    except KeyboardInterrupt:
        print("\nstopped; rerun the same command to resume from the last checkpoint", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        lines = str(error).strip().split("\n")
        if lines[0].startswith("Caught "):  # in the process that loads the data: its traceback follows
            error = ValueError(lines[-1].removeprefix("ValueError: "))
        return report_error("train", error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_command("train", main))
