"""Ask Kosmos-2 about an image: print the answer, save the image with its boxes drawn.

    python sample.py                                          the bundled image and the bundled small model
    python sample.py photo.jpg --checkpoint microsoft/kosmos-2-patch14-224
    python sample.py tiny/scene.png --task ground --text "a snowman"
    python sample.py tiny/busy.png --task vqa --text "What color is the car?"
    python sample.py tiny/scene.png --task refer --box 140,80,255,295

Text and JSON go to stdout, the rest to stderr. Exit status: 0 done, 1 an image failed (the others
are still processed), 2 usage, 130 interrupted. For folders, request files, beams and ranked boxes:
python -m inference.batch.
"""

import argparse
import json
import os
import re
import sys
import time
import warnings
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from tokenizer import (
    CONTINUED,
    TASKS,
    Entity,
    as_boxes,
    check_box,
    clip_box,
    iou,
    printable,
    strip_literal,
    task_prompts,
)

HERE = Path(__file__).resolve().parent
DEFAULT_NEW_TOKENS = 430  # the original demo's limit; fewer if the context has no room
DECODING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
PROBABLY_ABSENT = 0.1  # a phrase whose box has a lower score is probably not in the image (tiny/README.md)


# ---- Requests and answers --------------------------------------------------------------------------


class Request(NamedTuple):
    """What to ask about some images."""

    images: tuple[str, ...]  # file names
    prompt: str
    boxes: tuple = ()  # one for each phrase of the prompt, as given by the user
    continued: bool = True  # the prompt is the beginning of the answer
    wants_boxes: bool = False  # the boxes are the answer
    block_ngrams: bool = True


class Answer(NamedTuple):
    """The answer to a request."""

    text: str
    raw: str  # prompt and answer as tagged text
    entities: list[Entity]


def make_requests(images: tuple, task, texts, prompt, boxes) -> list[Request]:
    """The requests about some images: one, or one for each of `texts`."""
    if prompt is not None:
        if task or texts:
            raise ValueError("a prompt replaces task and text; use one or the other")
        return [Request(images, prompt, tuple(boxes))]
    task = task or "caption"
    continued = task in CONTINUED
    wants_boxes = task in ("ground", "refer") and bool(texts)
    prompts = task_prompts(task, texts, boxes)
    return [Request(images, one, tuple(boxes), continued, wants_boxes, task != "context") for one in prompts]


def encode_request(tokenizer, request: Request, sizes: list) -> tuple:
    """The ids and image_mask of a request. A box in pixels refers to the image before its phrase."""
    starts = [match.start() for match in re.finditer("<phrase>", request.prompt)]
    boxes = []
    for i, entry in enumerate(request.boxes):
        before = request.prompt[: starts[i]] if i < len(starts) else ""
        image = max(before.count("<image>") - 1, 0)
        size = sizes[min(image, len(sizes) - 1)] if sizes else (1, 1)
        boxes.append([normalize_box(box, size) for box in as_boxes(entry)])
    return tokenizer.encode_prompt(request.prompt, len(sizes), boxes or None)


def normalize_box(box, size: tuple[int, int]) -> tuple:
    """A box in 0..1, in pixels of an image of this (width, height), or as two location indices ->
    the box in 0..1, or the indices as they are. ValueError for a box that is not in the image."""
    check_box(box)
    if len(box) == 2:
        return tuple(box)
    width, height = size if max(box) >= 2 else (1, 1)
    x1, y1, x2, y2 = box
    try:
        return clip_box((x1 / width, y1 / height, x2 / width, y2 / height))
    except (ValueError, OverflowError):
        raise ValueError(f"box {box} is empty, reversed or outside the image; its size is {size}") from None


def decoding_options(model, tokenizer, request: Request, length: int, given: dict) -> dict:
    """The options of `Kosmos2.prefill` for a prompt of this length; `given` overrides the defaults."""
    limit = max(1, min(DEFAULT_NEW_TOKENS, model.config.text.max_positions - length))
    defaults = {"constraint": tokenizer.allowed_tokens, "max_new_tokens": limit}
    if request.block_ngrams:
        defaults["no_repeat_ngram_size"] = model.config.text.no_repeat_ngram_size
    return defaults | given


def ask(model, tokenizer, request: Request, image_embeds, sizes, given: dict, stream=False):
    """Answer a request about encoded images -> (Answer, its timings). stream: print it as generated."""
    import torch

    from kosmos2 import decode

    started = time.perf_counter()
    ids, mask = encode_request(tokenizer, request, sizes)
    options = decoding_options(model, tokenizer, request, len(ids), given)
    device = model.decoder.layer_norm.weight.device
    tokens = torch.tensor([ids], device=device)
    image_mask = torch.tensor([mask], device=device)
    state = model.prefill(tokens, None, image_embeds, image_mask, **options)
    times = []
    printed = 0
    for rows in decode(state):
        times.append(time.perf_counter())
        if stream:
            text = read_answer(tokenizer, request, rows[0]).text
            print(text[printed:], end="", flush=True)
            printed = len(text)
    timings = f"first token {(times[0] - started) * 1000:.0f} ms" if times else "no tokens"
    if len(times) > 1:
        timings += f", then {(len(times) - 1) / (times[-1] - times[0]):.0f} tokens/s"
    answer = read_answer(tokenizer, request, state.rows[0])
    if stream:
        print(answer.text[printed:], end="", flush=True)
    return answer, timings


def read_answer(tokenizer, request: Request, row) -> Answer:
    """The answer in a row of `kosmos2.decode`: its text continues the prompt if request.continued."""
    prompt = tokenizer.after_images(row.prompt) if request.continued else []
    text, entities = tokenizer.parse_output(prompt, row.ids, row.probabilities)
    return Answer(text, tokenizer.decode(row.all_ids).strip(), entities)


def as_json(request: Request, answer: Answer, size: tuple[int, int]) -> dict:
    """One line of --json output. Boxes are in 0..1, and in pixels of the last image, upright."""
    width, height = size
    entities = []
    for entity in answer.entities:
        pixel_boxes = [[x1 * width, y1 * height, x2 * width, y2 * height] for x1, y1, x2, y2 in entity.boxes]
        entities.append(entity._asdict() | {"pixel_boxes": pixel_boxes})
    image = list(request.images) if len(request.images) > 1 else next(iter(request.images), None)
    return {
        "image": image,
        "prompt": strip_literal(request.prompt),
        "given_boxes": request.boxes,
        "text": answer.text,
        "raw": answer.raw,
        "entities": entities,
    }


def box_lines(request: Request, answer: Answer, size: tuple[int, int]) -> list[str]:
    """If the answer is boxes: one line per box, with its score, its corners in pixels and its phrase."""
    lines = []
    for entity in as_json(request, answer, size)["entities"] if request.wants_boxes else []:
        for box, score in zip(entity["pixel_boxes"], entity["scores"], strict=True):
            note = "  (probably not in the image)" if score < PROBABLY_ABSENT else ""
            lines.append(f"  {score:.3f}  {','.join(map('{:.0f}'.format, box))}  {entity['phrase']}{note}")
    return lines


# ---- Drawing ---------------------------------------------------------------------------------------

PALETTE = ["#c62828", "#1565c0", "#2e7d32", "#8e24aa", "#b85a00", "#00798a", "#ad1457", "#4e5d00"]


def draw_answers(image: Image.Image, answers: list[Answer]) -> Image.Image:
    """The image with a box and a label for every entity, one color for each."""
    scale = max(1.0, 480 / max(image.size))  # a thumbnail has no room for labels
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = image.resize((width, height), Image.Resampling.LANCZOS)
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(13, min(width, 1600) // 40))
    labels = []
    entities = [entity for answer in answers for entity in answer.entities]
    for i, entity in enumerate(entities):
        color = PALETTE[i % len(PALETTE)]
        for x1, y1, x2, y2 in entity.boxes:
            corners = (x1 * width, y1 * height, x2 * width, y2 * height)
            pen.rectangle(corners, outline=color, width=max(3, round(font.size / 6)))
            if entity.span[0] != entity.span[1]:  # there are boxes without a phrase
                labels.append((entity.phrase, color, corners))
    placed = []
    for phrase, color, (left, top, _, bottom) in labels:
        label_width = pen.textlength(phrase, font=font) + 8
        line = round(font.size * 1.35)
        x = max(0, min(left, width - label_width))
        tops = [y for y in (top - line, top, bottom - line, bottom, 0) if 0 <= y <= height - line]
        spots = [(x, y, x + label_width, y + line) for y in tops or [0]]
        free = [spot for spot in spots if all(iou(spot, other) == 0 for other in placed)]
        spot = (free or spots)[0]
        pen.rectangle(spot, fill=color)
        pen.text((x + 4, spot[1] + line / 2), phrase, fill="white", font=font, anchor="lm")
        placed.append(spot)
    return canvas


# ---- The command -----------------------------------------------------------------------------------


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, name: str, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(name, description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {printable(message, 300)} (--help lists the options)\n")


def add_options(p: argparse.ArgumentParser) -> None:
    """The options about the question, decoding and the model."""
    add = p.add_argument_group("what to ask").add_argument
    add("--task", choices=TASKS, help="use the published prompt of this task (default: caption)")
    add("--text", action="append", default=[], help="the {text} of the task; repeatable")
    add("--prompt", help="your own prompt instead of a task; <image> marks where images go")
    box_help = "box of the next <phrase> in the prompt: 0..1, pixels or two location indices; repeatable"
    add("--box", action="append", default=[], type=parse_box, metavar="X1,Y1,X2,Y2", help=box_help)
    add = p.add_argument_group("decoding").add_argument
    add("--max-new-tokens", type=int, metavar="N", help=f"upper limit (default: {DEFAULT_NEW_TOKENS})")
    add("--temperature", type=float, metavar="T", help="0 (default): the most likely token; above 0: sample")
    add("--top-k", type=int, metavar="K", help="sample among the k most likely tokens")
    add("--top-p", type=float, metavar="P", help="sample among the top tokens that reach probability p")
    add("--seed", type=int, metavar="N", help="make sampling repeatable")
    add = p.add_argument_group("the model").add_argument
    add("--checkpoint", default=str(HERE / "tiny"), help="folder, file or hub id (default: bundled model)")
    add("--tokenizer", help="the sentencepiece model, if it is not next to the weights")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    precision_help = "fp32 (default) is exact, int8 is the fastest on an x86 CPU, bf16 is for GPUs"
    add("--precision", choices=["fp32", "bf16", "fp16", "int8"], default="fp32", help=precision_help)


def parse_arguments(argv=None) -> argparse.Namespace:
    p = CommandParser("sample.py", __doc__)
    p.add_argument("images", nargs="*", metavar="IMAGE", help="image files; default: the bundled image")
    add_options(p)
    add = p.add_argument_group("output").add_argument
    output_help = "draw the boxes: an image file or a folder (default for one image: STEM.boxes.png)"
    add("--output", type=Path, metavar="PATH", help=output_help)
    add("--json", action="store_true", help="print a JSON object per line instead of the text")
    args, unknown = p.parse_known_intermixed_args(argv)
    if unknown:
        p.error(f"unknown option {unknown[0]}; python -m inference.batch has more options")
    for name in args.images:
        if os.path.isdir(name):
            p.error(f"{name} is a folder; use python -m inference.batch")
    try:
        args.groups = group_images(args)
        args.requests = make_requests((), args.task, args.text, args.prompt, args.box)
        args.drawings = choose_drawings(args)
    except ValueError as error:
        p.error(str(error))
    return args


def parse_box(text: str) -> tuple:
    try:
        box = tuple(int(v) if v.strip().isdecimal() else float(v) for v in text.split(","))
        check_box(box)
        return box
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected x1,y1,x2,y2 or two indices, got {text!r}") from None


def group_images(args) -> list[tuple[str, ...]]:
    """The images of each prompt: one, or all together if the prompt has several <image> tags."""
    if args.task == "text":
        if args.images or args.output:
            raise ValueError("--task text takes no IMAGE and no --output")
        return [()]
    names = args.images or [str(HERE / "tiny" / "scene.png")]
    if args.task == "context" or (args.prompt or "").count("<image>") > 1:
        return [tuple(names)]
    return [(name,) for name in names]


def choose_drawings(args) -> dict[str, Path]:
    """The file for the drawing of each image; ValueError if --output is not possible."""
    names = [images[-1] for images in args.groups if images]
    if args.output is None and (args.json or len(names) != 1):
        return {}
    folder = args.output or Path()
    drawings = {name: folder / drawing_name(name) for name in names}
    if folder.suffix and not folder.is_dir():
        drawings = dict.fromkeys(names, folder)
        if Image.registered_extensions().get(folder.suffix.lower()) not in Image.SAVE:
            raise ValueError(f"--output {folder}: Pillow writes no images of this type")
    if len(set(drawings.values())) < len(names):
        raise ValueError(f"--output {folder}: one file for two images; pass a folder and different names")
    inputs = {os.path.realpath(name) for group in args.groups for name in group}
    if inputs & {os.path.realpath(file) for file in drawings.values()}:
        raise ValueError(f"--output {folder} is one of the images; use another name")
    return drawings


def drawing_name(image: str) -> str:
    stem = "image" if image.startswith("data:") else Path(image).stem
    return os.fsdecode(os.fsencode(stem)[:200]) + ".boxes.png"  # not too long for a file name


def load_model(args):
    """The model and tokenizer of the command line. (PyTorch is imported here, so that --help is fast.)"""
    import load_weights
    from inference.fast import load_checkpoint

    started = time.perf_counter()
    device = load_weights.choose_device(args.device, args.precision)
    loaded = load_checkpoint(args.checkpoint, args.precision, device, args.tokenizer)
    print(f"loaded {printable(args.checkpoint)} in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return loaded


def given_options(args, names=DECODING) -> dict:
    """The decoding options that the command line sets; ValueError for one out of range."""
    from kosmos2 import GenerationOptions

    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    GenerationOptions(**given)
    return given


def answer_image(args, model, tokenizer, names, given: dict):
    """Ask everything about one image (or one group of images), print the answers, draw the boxes."""
    import torch

    from kosmos2 import open_image, preprocess_image

    images = [open_image(name) for name in names]
    image_embeds = None
    if images:
        started = time.perf_counter()
        pixels = [preprocess_image(image, model.config.vision.image_size) for image in images]
        device = model.decoder.layer_norm.weight.device
        with torch.inference_mode():
            image_embeds = model.encode_image(torch.stack(pixels).to(device))  # (I, Q, D)
        print(f"vision {(time.perf_counter() - started) * 1000:.0f} ms", file=sys.stderr)
    sizes = [image.size for image in images]
    size = sizes[-1] if sizes else (1, 1)
    stream = not args.json and sys.stdout.isatty()
    prefix = f"{printable(names[-1])}: " if len(args.groups) > 1 else ""
    answers = []
    for request in args.requests:
        request = request._replace(images=names)
        print(prefix if stream else "", end="", flush=True)
        answer, timings = ask(model, tokenizer, request, image_embeds, sizes, given, stream)
        if args.json:
            print(json.dumps(as_json(request, answer, size), ensure_ascii=False), flush=True)
        else:
            text = "" if stream else prefix + answer.text
            print("\n".join([text, *box_lines(request, answer, size)]), flush=True)
        print(timings, file=sys.stderr)
        answers.append(answer)
    if images and names[-1] in args.drawings:
        file = args.drawings[names[-1]]
        drawing = BytesIO()  # an earlier file is only replaced by a complete one
        draw_answers(images[-1], answers).save(drawing, Image.registered_extensions()[file.suffix.lower()])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(drawing.getvalue())
        print(f"wrote {printable(str(file))}", file=sys.stderr)


def main(argv=None) -> int:
    args = parse_arguments(argv)
    try:
        from kosmos2 import open_image

        given = given_options(args)
        for name in args.groups[0] if len(args.groups) == 1 else []:
            open_image(name)  # fail on a bad image before loading the model
        model, tokenizer = load_model(args)
    except (OSError, ValueError, RuntimeError) as error:
        return report_error("sample", error)
    status = 0
    for names in args.groups:
        try:
            answer_image(args, model, tokenizer, names, given)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            status = report_error("sample", error)
    return status


def report_error(name: str, error: Exception) -> int:
    """Print an error as one line; returns the exit status 1. (`run_command` handles closed pipes.)"""
    if isinstance(error, BrokenPipeError):
        raise error
    print(f"{name}: {printable(str(error) or type(error).__name__, 2000)}", file=sys.stderr)
    return 1


def run_command(name: str, main) -> int:
    """main() as a process (from `__main__` only): UTF-8 streams, short warnings, Ctrl-C, closed pipes."""
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # it was closed
            setattr(sys, stream, open(os.devnull, "r+"))  # noqa: SIM115
        errors = "strict" if stream == "stdin" else "backslashreplace"  # names may not be valid text
        getattr(sys, stream).reconfigure(encoding="utf-8", errors=errors)
    warnings.filterwarnings("ignore", module="PIL")
    warnings.showwarning = lambda message, *_, **__: print(f"{name}: {message}", file=sys.stderr)
    try:
        return main()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # stdout was closed early, as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(run_command("sample", main))
