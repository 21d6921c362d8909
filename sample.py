"""Ask Kosmos-2 about pictures: the sentence on stdout, the picture with its boxes in a file.

    python sample.py                                          the bundled picture, the bundled small model
    python sample.py photo.jpg --checkpoint microsoft/kosmos-2-patch14-224
    python sample.py photo.jpg --task ground --text "a snowman"
    python sample.py photo.jpg --task vqa --text "What is special about this image?" --text "Where is the fire?"
    python sample.py photo.jpg --task refer --box 120,40,380,300
    python sample.py folder --results captions.jsonl          many pictures; --resume goes on after a stop

Progress, timings and errors go to stderr. Exit status: 0 done, 1 something could not be read or run (the
other pictures are still done), 2 usage, 130 interrupted. Under torchrun the pictures are shared out.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}

# The published prompts: for each task the prompt, and whether it is the beginning of the sentence to print.
TASKS = {
    "caption": ("<grounding>An image of", True),
    "detail": ("<grounding>Describe this image in detail:", False),
    "plain": ("An image of", True),
    "ground": ("<grounding><phrase> {text}</phrase>", True),
    "refer": ("<grounding><phrase> It</phrase> is", True),
    "vqa": ("<grounding> Question: {text} Answer:", False),
    "answer": ("Question: {text} Answer:", False),
    "context": ("<image> {text}<image>", False),
    "text": ("{text}", True),
}
NEEDED = {
    "ground": "a phrase", "vqa": "a question", "answer": "a question", "text": "the beginning of a text",
    "context": "what to say about a picture, for each picture but the last",
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="files or folders; none: the bundled picture")
    p.add_argument("--checkpoint", default=str(HERE / "tiny"), help="folder, file or hub id (default: the bundled model)")
    p.add_argument("--tokenizer", help="the sentencepiece model, if it is not beside the weights")
    what = p.add_argument_group("what to ask")
    what.add_argument("--task", choices=TASKS, default="caption", help="a published prompt (default: caption)")
    what.add_argument(
        "--text", action="append",
        help="the phrase to ground, the expression to refer by, or the question; repeatable: the picture is read once",
    )  # fmt: skip
    what.add_argument("--top-boxes", type=int, metavar="K", help="the K likeliest boxes for a phrase (ground, refer)")
    what.add_argument("--prompt", help="a prompt of your own instead of a task; <image> marks where pictures go")
    what.add_argument(
        "--box", action="append", type=box_argument, metavar="X1,Y1,X2,Y2",
        help="box of the next <phrase>…</phrase>: 0..1, or pixels, or two location indices; repeatable",
    )  # fmt: skip
    how = p.add_argument_group("how to decode")
    how.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    how.add_argument("--min-new-tokens", type=int, default=0, metavar="N")
    how.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token")
    how.add_argument("--top-k", type=int, metavar="K")
    how.add_argument("--top-p", type=float, metavar="P")
    how.add_argument("--num-beams", type=int, default=1, metavar="N")
    how.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="default: what the checkpoint asks for")
    how.add_argument("--seed", type=int, help="makes sampling repeatable")
    how.add_argument("--free-markup", action="store_true", help="let the model write broken boxes, if it wants to")
    where = p.add_argument_group("where to run")
    where.add_argument("--device", default="auto", help="auto (default), cpu, cuda, mps")
    where.add_argument("--precision", choices=["fp32", "bf16", "fp16", "int8"], default="fp32", help="of the weights; fp32 (default) is exact, int8 fastest on a CPU")
    where.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures at a time (default: 8)")
    out = p.add_argument_group("what to write")
    out.add_argument("--output", type=Path, metavar="FILE_OR_DIR", help="the picture with its boxes, or a folder for them (default: STEM.boxes.png for a single picture)")
    out.add_argument("--scores", action="store_true", help="write on the picture how sure the model is of each box")
    out.add_argument("--json", action="store_true", help="one JSON object a line instead of the sentence")
    out.add_argument("--results", type=Path, metavar="JSONL", help="write these lines to a file, each as it is done")
    out.add_argument("--resume", action="store_true", help="go on with a --results file: skip the pictures it holds")
    out.add_argument("--debug", action="store_true", help="show where an error came from")
    return p


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line; what contradicts itself ends in a line on stderr and exit status 2."""
    p = make_parser()
    args = p.parse_args(argv)
    if args.prompt is not None and (args.text is not None or args.task != "caption"):
        p.error("--prompt takes the place of --task and --text; give one or the other")
    if args.prompt is None:
        if args.task in ("caption", "detail", "plain") and args.text is not None:
            p.error(f"--task {args.task} takes no --text")
        needed = NEEDED.get(args.task)
        if (args.text or needed) and not all(text.strip() for text in args.text or [""]):
            p.error(f"--task {args.task} needs --text that is not empty: {needed or 'an expression'}")
        if args.task == "refer" and not args.text and not args.box:
            p.error("--task refer needs --box (to be put into words) or --text (an expression, to be found)")
        if args.task == "text" and (args.images or args.box or args.output):
            p.error("--task text goes without pictures: no IMAGE, --box or --output")
    if args.text and args.box and args.task in ("ground", "refer"):
        p.error("--text asks for a box and --box gives one; use one of them, or --prompt")
    if any(tag in text for text in args.text or [] for tag in ("<image>", "</image>")):
        p.error("--text cannot hold pictures; use --prompt")
    findable = args.task in ("ground", "refer") and args.text and args.prompt is None
    if args.top_boxes is not None and not (findable and args.top_boxes > 0):
        p.error("--top-boxes wants a number above zero and --task ground or refer with --text")
    if args.batch_size < 1:
        p.error("--batch-size must be at least 1")
    if args.resume and args.results is None:
        p.error("--resume needs --results, the file to go on with")
    return args


def box_argument(text: str) -> tuple:
    try:
        values = tuple(int(v) if v.strip().isdigit() else float(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) == 2 and all(isinstance(v, int) for v in values):
        return values
    if len(values) != 4 or any(v != v for v in values):
        raise argparse.ArgumentTypeError(f"{text!r} is not x1,y1,x2,y2 (0..1 or pixels) or two location indices")
    return tuple(float(v) for v in values)


def make_prompts(args: argparse.Namespace) -> list[str]:
    """What to ask about every picture, or in --task context about all of them together."""
    if args.prompt is not None:
        return [args.prompt]
    template, texts = TASKS[args.task][0], [text.strip() for text in args.text or [""]]
    if args.task == "refer" and args.text:
        template = TASKS["ground"][0]
    if args.task == "context":
        it = "<grounding><phrase> It</phrase> is" if args.box else ""
        return ["".join(f"<image>{it} {text}" for text in texts) + f"<image>{it}"]
    return [template.replace("{text}", text) for text in texts]


def main(argv=None) -> int:
    args = parse_arguments(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("sample: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # stdout was closed early, as by `| head`: nobody reads on, so nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (OSError, ValueError, RuntimeError) as error:
        if args.debug:
            raise
        print(f"sample: {error}", file=sys.stderr)
        return 1


# ----------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    """One row of a batch: the pictures that are shown together, and everything that is asked about them."""

    paths: list[Path]
    pictures: list  # of PIL, upright, RGB
    prompts: list[tuple[list[int], list[bool]]]  # (ids, image_mask) of each

    @property
    def path(self) -> Path | None:
        """The picture that the answers are about: the last."""
        return self.paths[-1] if self.paths else None


def run(args: argparse.Namespace) -> int:
    """Load, ask about every picture, write; returns the exit status."""
    started = time.perf_counter()
    prompts = make_prompts(args)
    paths = find_pictures(args.images) if args.images else [HERE / "tiny" / "scene.png"]
    together = prompts[0].count("<image>") > 1
    groups = [[]] if args.task == "text" else [paths] if together else [[path] for path in paths]
    if len(groups) == 1:
        for path in groups[0]:
            open_picture(path)  # a mistake in its name should not cost the time of loading a model
    if args.temperature == 0 and (args.top_k or args.top_p or args.seed is not None):
        print("sample: at --temperature 0 nothing is drawn: --top-k, --top-p and --seed do nothing", file=sys.stderr)
    names = output_names(args, [group[-1] for group in groups if group])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    results = Results(args, prompts, rank, world) if args.results else None
    groups = groups[rank::world]
    if results is not None:
        groups = [group for group in groups if str(group[-1] if group else None) not in results.done]
    asker = Asker(args, prompts)
    print(f"loaded {args.checkpoint} in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    asker.live = len(groups) == len(prompts) == 1 and sys.stdout.isatty() and not (args.json or results)
    progress, failed = Progress(len(groups)), []
    for asked, errors in read_ahead(groups, asker.encode, args.batch_size):
        for group, error in errors:
            progress.note(f"sample: {error}")
            failed += group
        for question, answers in zip(asked, asker.ask(asked), strict=True):
            name = names.get(question.path)
            try:
                write_answers(args, question, answers, prompts, name, results, printed=asker.live)
            except OSError as error:
                if isinstance(error, BrokenPipeError) or (results and not name):
                    raise
                progress.note(f"sample: cannot write {name}: {error.strerror or error}")
                failed += question.paths
        progress.show(len(asked) + len(errors), asker.timings)
    if failed and len(paths) > 1:
        print(f"sample: {len(failed)} of {len(paths)} failed: {', '.join(map(str, failed))}", file=sys.stderr)
    return 1 if failed else 0


def read_ahead(groups: list[list[Path]], encode, batch_size: int):
    """Groups of pictures -> batches of ([Question], [(group, error)]), the next one opened while this one is asked."""

    def read(group):
        pictures = [open_picture(path) for path in group]
        return Question(group, pictures, encode(pictures))

    def collect(reading):
        asked, errors = [], []
        for group, future in reading:
            try:
                asked.append(future.result())
            except (OSError, ValueError) as error:
                errors.append((group, error))
        return asked, errors

    with ThreadPoolExecutor(2) as pool:
        waiting: deque = deque()
        for at in range(0, len(groups), batch_size):
            waiting.append([(group, pool.submit(read, group)) for group in groups[at : at + batch_size]])
            if len(waiting) > 1:
                yield collect(waiting.popleft())
        while waiting:
            yield collect(waiting.popleft())


class Progress:
    """Where the run is, on stderr: the timings of a single batch, a bar over many."""

    def __init__(self, total: int):
        self.total, self.done, self.started = total, 0, time.perf_counter()
        self.bar = sys.stderr.isatty()

    def note(self, line: str) -> None:
        print(("\r\033[K" if self.bar else "") + line, file=sys.stderr)

    def show(self, pictures: int, timings: str) -> None:
        self.done += pictures
        if self.done == pictures == self.total:
            if timings:
                self.note(timings)
            return
        a_minute = 60 * self.done / (time.perf_counter() - self.started)
        filled = 30 * self.done // self.total
        left = (self.total - self.done) / a_minute
        line = f"[{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total}  {a_minute:.0f} a minute, {left:.1f} min left"
        end = "" if self.bar and self.done < self.total else "\n"
        print(("\r\033[K" if self.bar else "") + line, end=end, file=sys.stderr, flush=True)


class Results:
    """The --results file, a line for every answer, written when it is there; and which pictures it holds.

    Each process of a torchrun writes a file of its own, NAME.rank.jsonl; all are read when a run goes on.
    """

    def __init__(self, args: argparse.Namespace, prompts: list[str], rank: int, world: int):
        path = args.results
        self.path = path.with_suffix(f".{rank}{path.suffix}") if world > 1 else path
        for file in {path, self.path}:
            if file.exists() and not args.resume:
                raise ValueError(f"{file} exists; --resume goes on with it, another name starts anew")
        self.done: set[str] = set()
        make_folder(self.path.parent)
        of_a_rank = re.compile(re.escape(path.stem) + r"\.\d+" + re.escape(path.suffix))
        for file in [path, *(f for f in sorted(path.parent.iterdir()) if of_a_rank.fullmatch(f.name))]:
            if args.resume and file.exists():
                whole, images = finished(file, prompts)
                self.done |= images
                if file == self.path:
                    os.truncate(file, whole)  # the rest was cut off by the stop
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (open as long as the run)

    def write(self, lines: list[str]) -> None:
        """The lines of one picture, all at once."""
        self.file.write("".join(line + "\n" for line in lines))
        self.file.flush()


def finished(file: Path, prompts: list[str]) -> tuple[int, set[str]]:
    """(bytes up to the last finished picture, the finished pictures) of a results file.

    ValueError for a file that is something else, or answers other prompts.
    """
    whole, at, images, current = 0, 0, set(), []
    for line in file.read_bytes().splitlines(keepends=True):
        at += len(line)
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            current.append(row["prompt"])
            image = str(row["image"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{file} is not a results file: {line[:60]!r}") from None
        if current != prompts[: len(current)]:
            raise ValueError(f"{file} holds answers to {current[-1]!r}; give another --results for other prompts")
        if len(current) == len(prompts):
            whole, current = at, []
            images.add(image)
    return whole, images


# ----------------------------------------------------------------------------------------------------
# Asking
# ----------------------------------------------------------------------------------------------------


class Asker:
    """A model, its tokenizer and the prompts of this run."""

    def __init__(self, args: argparse.Namespace, prompts: list[str]):
        import torch

        from kosmos2 import GenerationOptions
        from load_weights import load_checkpoint

        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        device = args.device
        if device == "auto":
            device = "cpu" if args.precision == "int8" else next(name for name, there in here.items() if there)
        self.args, self.prompts, self.live, self.timings = args, prompts, False, ""
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None and "LOCAL_RANK" in os.environ:
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if not here.get(self.device.type, True):
            raise ValueError(f"--device {device}: this torch finds no such device here; use cpu")
        options = dict(
            max_new_tokens=args.max_new_tokens, min_new_tokens=args.min_new_tokens, temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, num_beams=args.num_beams, seed=args.seed,
            no_repeat_ngram_size=args.no_repeat_ngram_size or 0,
        )  # fmt: skip
        GenerationOptions(**options)  # refuses what is out of range, before a model is loaded
        self.model, self.tokenizer = load_checkpoint(args.checkpoint, args.precision, self.device, args.tokenizer)
        self.keep_prompt = args.prompt is not None or TASKS[args.task][1]
        if args.no_repeat_ngram_size is None:
            options["no_repeat_ngram_size"] = self.model.config.text.no_repeat_ngram_size
        self.options = options | dict(constraint=None if args.free_markup else self.tokenizer.well_formed)

    def encode(self, pictures) -> list[tuple[list[int], list[bool]]]:
        """Every prompt about these pictures as (ids, image_mask)."""
        return [self.tokenizer.encode_prompt(p, len(pictures), self.boxes_in(p, pictures)) for p in self.prompts]

    def boxes_in(self, prompt: str, pictures) -> list[tuple] | None:
        """The boxes given for the phrases of a prompt; those in pixels are in the picture in front of the phrase."""
        if self.args.box is None:
            return None
        phrases = [match.start() for match in re.finditer("<phrase>", prompt)]
        owners = [max(prompt[:at].count("<image>") - 1, 0) for at in phrases]
        pairs = zip_longest(self.args.box, owners[: len(self.args.box)], fillvalue=0)
        return [in_unit(box, pictures[min(owner, len(pictures) - 1)].size) for box, owner in pairs]

    def ask(self, questions: list[Question]) -> list[list[dict]]:
        """For each question its answers: raw text, sentence, entities."""
        if not questions:
            return []
        embeds = self.look([picture for q in questions for picture in q.pictures])
        if self.args.top_boxes:
            return [[self.rank(e[None], ids) for ids, _ in q.prompts] for e, q in zip(embeds, questions, strict=True)]
        if embeds is None:  # text alone
            return [self.ask_at_once(q.prompts) for q in questions]
        if len(self.prompts) > 1:
            return [self.ask_much(e[None], q.prompts) for e, q in zip(embeds, questions, strict=True)]
        return [[answer] for answer in self.ask_at_once([q.prompts[0] for q in questions], embeds)]

    def look(self, pictures: list):
        """Pictures -> their embeddings, None for none."""
        import torch

        from kosmos2 import preprocess_image

        started, self.vision = time.perf_counter(), "no picture"
        if not pictures:
            return None
        pixels = torch.stack([preprocess_image(p, self.model.config.vision.image_size) for p in pictures])
        with torch.inference_mode():
            embeds = self.model.encode_image(pixels.to(self.device))
        self.vision = f"vision {(time.perf_counter() - started) * 1000:.0f} ms"
        return embeds

    def ask_at_once(self, prompts, embeds=None) -> list[dict]:
        """Prompts, each a row of a batch, with the embeddings of all their pictures."""
        from kosmos2 import pad_left

        tokens, image_mask, pad_mask = pad_left(prompts, self.device)
        new = self.generate(tokens, image_embeds=embeds, image_mask=image_mask, pad_mask=pad_mask)
        return [self.answer(ids, ids_new) for (ids, _), ids_new in zip(prompts, new, strict=True)]

    def ask_much(self, embeds, prompts) -> list[dict]:
        """Many questions about one picture: its tokens go through the decoder once."""
        from kosmos2 import pad_left

        past = self.read_picture(embeds)
        P = len(past.prompts[0])
        tokens, _, pad_mask = pad_left([(ids[P:], mask[P:]) for ids, mask in prompts], self.device)
        new = self.generate(tokens, pad_mask=pad_mask, past=past)
        return [self.answer(ids, ids_new) for (ids, _), ids_new in zip(prompts, new, strict=True)]

    def read_picture(self, embeds):
        from kosmos2 import pad_left

        tokens, image_mask, _ = pad_left([self.tokenizer.encode_prompt("", 1)], self.device)
        return self.model.start(tokens, image_embeds=embeds, image_mask=image_mask, max_new_tokens=0)

    def rank(self, embeds, ids: list[int]) -> dict:
        """The likeliest boxes for the phrase that a prompt ends in, best first."""
        from kosmos2 import pad_left
        from tokenizer import Entity, parse, tokens_to_box

        past = self.read_picture(embeds)
        tokens, _, _ = pad_left([(ids[len(past.prompts[0]) :] + [self.tokenizer.special["<object>"]], [])], self.device)
        boxes = self.tokenizer.rank_boxes(self.model.start(tokens, past=past, max_new_tokens=2), self.args.top_boxes)
        raw = self.tokenizer.decode(ids)
        text, _ = parse(raw)
        self.timings = f"{self.vision}, ranked {len(boxes)} boxes"
        places, scores = [tokens_to_box(ul, lr) for _, ul, lr in boxes], [score for score, _, _ in boxes]
        return {"text": text, "raw": raw.strip(), "entities": [Entity(text, (0, len(text)), places, scores)]}

    def answer(self, ids: list[int], new) -> dict:
        """The sentence: what was generated, after what the prompt says about the last picture if that begins it."""
        raw = self.tokenizer.decode(ids + list(new))
        text, entities = self.tokenizer.read(self.kept(ids), new)
        return {"text": text, "raw": raw.strip(), "entities": entities}

    def kept(self, prompt: list[int]) -> list[int]:
        closing = self.tokenizer.special["</image>"]
        last = max((at for at, i in enumerate(prompt) if i == closing), default=-1)
        return prompt[last + 1 :] if self.keep_prompt else []

    def generate(self, tokens, **inputs):
        """New ids for every row; where self.live, the one text is printed as it comes."""
        from kosmos2 import beam_search

        clock = [time.perf_counter()]
        state = self.model.start(tokens, **inputs, **self.options)
        if self.args.num_beams > 1:
            new = beam_search(state)
            seconds, self.live = time.perf_counter() - clock[0], False  # its text is known only now
            self.timings = f"{self.vision}, {sum(map(len, new))} tokens by beam search in {seconds:.2f} s"
            return new
        printed = ""
        for _ in state:
            clock.append(time.perf_counter())
            if self.live:
                printed = self.show(tokens[0].tolist(), state.results[0], printed)
        if self.live:
            print(flush=True)
        first = clock[1] - clock[0] if len(clock) > 1 else 0.0
        rate = (len(clock) - 2) / (clock[-1] - clock[1]) if len(clock) > 2 else 0.0
        self.timings = f"{self.vision}, first token {first * 1000:.0f} ms, then {rate:.0f} tokens/s"
        return state.results

    def show(self, prompt: list[int], new: list[int], printed: str) -> str:
        """Print what the newest token added to the sentence."""
        from tokenizer import plain

        text = plain(self.tokenizer.decode(self.kept(prompt) + new)).lstrip()
        sys.stdout.write(text[len(printed) :])
        sys.stdout.flush()
        return text


def in_unit(box: tuple, size: tuple[int, int]) -> tuple:
    """A box in 0..1, in pixels of a picture of this (width, height), or location indices -> in 0..1 or indices."""
    if len(box) == 2 or max(box) <= 1:
        return box
    if any(0 < v < 1 for v in box):
        raise ValueError(f"box {box} mixes 0..1 and pixels")
    (width, height), (x1, y1, x2, y2) = size, box
    if x2 > width or y2 > height:
        raise ValueError(f"box {box} reaches beyond the picture, which is {width} x {height} pixels")
    return x1 / width, y1 / height, x2 / width, y2 / height


# ----------------------------------------------------------------------------------------------------
# Reading and writing pictures
# ----------------------------------------------------------------------------------------------------


def find_pictures(given: list[Path]) -> list[Path]:
    """Files as they are, folders as the pictures in them by name; ValueError for a folder without any."""
    found = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES and not p.stem.endswith(".boxes"))
            if not inside:
                raise ValueError(f"folder {path} holds no pictures ({', '.join(sorted(PICTURES))})")
            found += inside
        else:
            found.append(path)
    return found


def open_picture(path: Path):
    """A picture file -> an RGB picture, upright, transparency on white; ValueError naming the file."""
    import numpy as np
    from PIL import Image, ImageOps

    if "://" in str(path) or str(path).startswith(("http:/", "https:/")):
        raise ValueError(f"{path} is an address; download the picture and give its file")
    if not path.exists():
        raise FileNotFoundError(f"there is no picture at {path}")
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # 16 bits: Pillow would cut the values off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "it is not a picture Pillow can read" if "cannot identify" in str(error) else str(error)
        raise ValueError(f"cannot read {path}: {reason}") from None


def output_names(args: argparse.Namespace, paths: list[Path]) -> dict[Path, Path | None]:
    """Where the picture with boxes of every input goes; None for nowhere."""
    if args.output is None:
        if len(paths) != 1 or args.json or args.results:
            return dict.fromkeys(paths)
        return {paths[0]: Path(f"{paths[0].stem}.boxes.png")}
    if args.output.suffix and not args.output.is_dir():
        if len(paths) > 1:
            raise ValueError(f"--output {args.output} is one file for {len(paths)} pictures; give a folder")
        if args.output.suffix.lower() not in PICTURES:
            raise ValueError(f"--output {args.output}: pictures are written as {', '.join(sorted(PICTURES))}")
        if args.output.exists() and paths[0].exists() and args.output.samefile(paths[0]):
            raise ValueError(f"--output {args.output} is the picture itself; give another name")
        return {paths[0]: args.output}
    make_folder(args.output)
    names: dict[Path, Path | None] = {}
    for path in paths:  # two pictures of one stem, a.png and a.jpg, get two files
        taken = set(names.values())
        choices = [path.stem, path.name, *(f"{path.stem}-{n}" for n in range(2, len(paths) + 2))]
        names[path] = next(n for c in choices if (n := args.output / f"{c}.boxes.png") not in taken)
    return names


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}; give another place to write to") from None


def write_answers(args, question, answers: list[dict], prompts: list[str], name, results, printed: bool) -> None:
    """The sentences or the JSON lines to where they go, unless they are there; the picture with all boxes to its file."""
    path, picture = question.path, question.pictures[-1] if question.pictures else None
    rows = [as_json(path, prompt, answer, picture) for prompt, answer in zip(prompts, answers, strict=True)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if args.json:
        print("\n".join(lines), flush=True)
    elif not printed and results is None:
        many = len(args.images) > len(question.paths) or (path is not None and path.parent in args.images)
        for answer, row in zip(answers, rows, strict=True):
            print(f"{path}: {answer['text']}" if many else answer["text"], flush=True)
            boxes = [pair for e in row["entities"] for pair in zip(e["pixel_boxes"], e["scores"], strict=True)]
            for corners, score in boxes if args.top_boxes else []:
                print(f"  {score:.3f}  {','.join(f'{v:.0f}' for v in corners)}", flush=True)
    if name is not None:
        save_picture(draw_answers(picture, answers, args.scores or bool(args.top_boxes)), name)
        print(f"wrote {name}", file=sys.stderr)
    if results is not None:  # last: what is in there is done
        results.write(lines)


def as_json(path: Path | None, prompt: str, answer: dict, picture) -> dict:
    """A line of --json and --results. Boxes in 0..1, and in pixels of the picture as it is shown (upright)."""
    width, height = picture.size if picture is not None else (1, 1)
    entities = [
        {
            "phrase": e.phrase,
            "span": e.span,
            "boxes": e.boxes,
            "pixel_boxes": [[x1 * width, y1 * height, x2 * width, y2 * height] for x1, y1, x2, y2 in e.boxes],
            "scores": list(e.scores),
        }
        for e in answer["entities"]
    ]
    image = None if path is None else str(path)
    return {"image": image, "prompt": prompt, "text": answer["text"], "raw": answer["raw"], "entities": entities}


def save_picture(picture, name: Path) -> None:
    """Written beside its place and then moved there, so that the file is never half a picture."""
    from PIL import Image

    part = name.with_name(f".{name.name}.part")
    try:
        picture.save(part, format=Image.registered_extensions().get(name.suffix.lower(), "PNG"))
        os.replace(part, name)
    finally:
        part.unlink(missing_ok=True)


# Dark enough for white letters on them, and for themselves on white.
PALETTE = ["#c62828", "#1565c0", "#2e7d32", "#8e24aa", "#b85a00", "#00798a", "#ad1457", "#4e5d00", "#5d4037", "#37474f"]


def draw_answers(picture, answers: list[dict], with_scores: bool = False):
    """The picture with a box around every entity, its phrase on the box, and the sentences underneath.

    A phrase, its boxes and its label share one colour. Lines have a white rim, so that they show on any
    background; labels move inside the picture where they would leave it.
    """
    from PIL import Image, ImageDraw, ImageFont

    scale = max(1.0, 480 / max(picture.size))  # a thumbnail has no room for letters
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    width, height = max(size[0], 240), size[1]
    font_size = max(13, round(min(width, 1600) / 40))
    font = ImageFont.load_default(font_size)
    entities = [entity for answer in answers for entity in answer["entities"]]
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(entities))]
    lines, left = [], list(colors)
    for answer in answers:
        own, left = left[: len(answer["entities"])], left[len(answer["entities"]) :]
        lines += wrap(answer["text"], answer["entities"], own, font, width - 2 * font_size)
    line_height = round(font_size * 1.45)
    canvas = Image.new("RGB", (width, height + line_height * len(lines) + font_size), "white")
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS) if scale > 1 else picture, (0, 0))
    pen, thick = ImageDraw.Draw(canvas), max(2, font_size // 6)
    for entity, color in zip(entities, colors, strict=True):
        for x1, y1, x2, y2 in entity.boxes:
            corners = (x1 * size[0], y1 * size[1], x2 * size[0] - 1, y2 * size[1] - 1)
            corners = (*corners[:2], max(corners[0], corners[2]), max(corners[1], corners[3]))
            pen.rectangle([corners[0] - 2, corners[1] - 2, corners[2] + 2, corners[3] + 2], outline="white", width=thick + 4)
            pen.rectangle(corners, outline=color, width=thick)
    placed: list[tuple] = []
    for entity, color in zip(entities, colors, strict=True):
        if entity.span[0] != entity.span[1]:
            for box, score in zip_longest(entity.boxes, entity.scores):
                label = f"{entity.phrase} {score:.0%}" if with_scores and score is not None else entity.phrase
                draw_label(pen, label, box, size, color, font_size, placed)
    for row, line in enumerate(lines):
        x = font_size
        for word, color in line:
            y = height + font_size // 2 + row * line_height
            pen.text((x, y), word, fill=color or "#222222", font=font, stroke_width=0.4 if color else 0, stroke_fill=color)
            x += pen.textlength(word, font=font)
    return canvas


def draw_label(pen, phrase: str, box, size, color: str, font_size: int, placed: list[tuple]) -> None:
    """A phrase on its box: above it, or where that is outside the picture or taken, inside or below."""
    from PIL import ImageFont

    font = ImageFont.load_default(font_size)
    while pen.textlength(phrase, font=font) + 8 > size[0] and font_size > 8:
        font_size -= 1
        font = ImageFont.load_default(font_size)
    while pen.textlength(phrase, font=font) + 8 > size[0] and len(phrase) > 2:
        phrase = phrase.removesuffix("…")[:-1] + "…"
    w, h = pen.textlength(phrase, font=font) + 8, round(font_size * 1.35)
    x = min(max(box[0] * size[0], 0), max(size[0] - w, 0))
    top, bottom = box[1] * size[1], box[3] * size[1]
    ys = [min(max(y, 0), max(size[1] - h, 0)) for y in (top - h, top, bottom - h, bottom)]
    free = [y for y in ys if not any(x < b[2] and b[0] < x + w and y < b[3] and b[1] < y + h for b in placed)]
    y = (free or ys)[0]
    placed.append((x, y, x + w, y + h))
    pen.rectangle([x, y, x + w, y + h], fill=color)
    pen.text((x + 4, y + h / 2), phrase, fill="white", font=font, anchor="lm")


def wrap(text: str, entities, colors: list[str], font, width: float) -> list[list[tuple[str, str | None]]]:
    """The sentence as lines of (word with its space, colour of its phrase)."""
    lines: list[list[tuple[str, str | None]]] = [[]]
    used, at = 0.0, 0
    for word in text.split(" "):
        color = next((c for e, c in zip(entities, colors, strict=True) if e.span[0] <= at < e.span[1]), None)
        length = font.getlength(word + " ")
        if used + length > width and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append((word + " ", color))
        used += length
        at += len(word) + 1
    return lines


if __name__ == "__main__":
    sys.exit(main())
