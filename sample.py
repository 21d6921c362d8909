"""Ask Kosmos-2 about an image: prints the text, saves the image with its boxes drawn.

    python sample.py                                          the bundled image and the bundled small model
    python sample.py photo.jpg --checkpoint microsoft/kosmos-2-patch14-224
    python sample.py tiny/scene.png --task ground --text "a snowman"
    python sample.py tiny/busy.png --task vqa --text "What color is the car?"
    python sample.py tiny/scene.png --task refer --box 140,80,255,295

Text and JSON go to stdout, progress, timings and errors to stderr. Exit status: 0 done, 1 something
failed (the other images are still done), 2 usage, 130 interrupted. Folders, request files, beams and
ranked boxes: python -m inference.batch.
"""

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from tokenizer import (
    CONTINUED,
    TASKS,
    TOLERANCE,
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

DEFAULT_NEW_TOKENS = 430  # the original demo's limit after a normal prompt; fewer if the context has no room
PROBABLY_ABSENT = 0.1  # a phrase whose box has a lower score is probably not in the image (tiny/README.md)


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


# ----------------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------------


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def __init__(self, name: str, description: str):
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(name, description=description, formatter_class=form, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {printable(message, 300)} (--help lists the options)\n")


def add_question_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("what to ask").add_argument
    add("--task", choices=TASKS, help="use the published prompt of this task (default: caption)")
    text_help = "phrase, referring expression or question; may be repeated (the image is encoded once)"
    add("--text", action="append", default=[], help=text_help)
    add("--prompt", help="your own prompt instead of a task; <image> marks where images go")
    box_help = "box of the next <phrase> in the prompt: 0..1, pixels or two location indices; may be repeated"
    add("--box", action="append", default=[], type=parse_box, metavar="X1,Y1,X2,Y2", help=box_help)


def add_decoding_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("decoding").add_argument
    limit_help = f"upper limit (default: {DEFAULT_NEW_TOKENS}, or what fits the context)"
    add("--max-new-tokens", type=int, metavar="N", help=limit_help)
    temperature_help = "0 (default) takes the most likely token, 1 samples from the model's distribution"
    add("--temperature", type=float, metavar="T", help=temperature_help)
    add("--top-k", type=int, metavar="K", help="sample among the k most likely tokens")
    top_p_help = "sample among the most likely tokens that together reach probability p"
    add("--top-p", type=float, metavar="P", help=top_p_help)
    add("--seed", type=int, metavar="N", help="make sampling repeatable")


def add_model_options(p: argparse.ArgumentParser) -> None:
    add = p.add_argument_group("the model").add_argument
    add("--checkpoint", default=str(HERE / "tiny"), help="folder, file or hub id (default: bundled model)")
    add("--tokenizer", help="the sentencepiece model, if it is not next to the weights")
    add("--device", default="auto", help="auto (default), cpu, cuda, mps")
    precision_help = "fp32 (default) is exact, int8 is the fastest on a CPU, bf16 is for GPUs"
    add("--precision", choices=["fp32", "bf16", "fp16", "int8"], default="fp32", help=precision_help)


def parse_arguments(argv=None) -> argparse.Namespace:
    p = CommandParser("sample.py", __doc__)
    p.add_argument("images", nargs="*", metavar="IMAGE", help="image files; default: the bundled image")
    add_question_options(p)
    add_decoding_options(p)
    add_model_options(p)
    add = p.add_argument_group("output").add_argument
    output_help = "draw the boxes: an image file or a folder (default for one image: STEM.boxes.png)"
    add("--output", type=Path, metavar="PATH", help=output_help)
    add("--json", action="store_true", help="print a JSON object per line instead of the text")
    args, unknown = p.parse_known_args(argv)
    if unknown:
        p.error(f"unknown option {unknown[0]}; python -m inference.batch has more options")
    for name in args.images:
        if os.path.isdir(name):
            p.error(f"{name} is a folder; use python -m inference.batch")
    try:
        args.groups = group_images(args)
        args.requests = make_requests((), args.task, args.text, args.prompt, args.box)
        check_output(args)
    except ValueError as error:
        p.error(str(error))
    return args


def parse_box(text: str) -> tuple:
    """ "120,40,380,300" -> a tuple of four numbers or two location indices."""
    try:
        box = tuple(int(v) if v.strip().isdecimal() else float(v) for v in text.split(","))
        check_box(box)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected x1,y1,x2,y2 (0..1 or pixels) or two location indices, got {text!r}"
        ) from None
    return box


def group_images(args: argparse.Namespace) -> list[tuple[str, ...]]:
    """The images of each prompt: one, or all together if the prompt has several <image> tags."""
    if args.task == "text":
        if args.images or args.output:
            raise ValueError("--task text takes no IMAGE and no --output")
        return [()]
    names = args.images or [str(HERE / "tiny" / "scene.png")]
    if args.task == "context" or (args.prompt or "").count("<image>") > 1:
        return [tuple(names)]
    return [(name,) for name in names]


def make_requests(images: tuple[str, ...], task, texts, prompt, boxes) -> list[Request]:
    """The requests about some images: one, or one for each text."""
    if prompt is not None:
        if task or texts:
            raise ValueError("a prompt replaces task and text; use one or the other")
        return [Request(images, prompt, tuple(boxes))]
    task = task or "caption"
    continued = task in CONTINUED
    wants_boxes = task in ("ground", "refer") and bool(texts)
    prompts = task_prompts(task, texts, boxes)
    return [Request(images, one, tuple(boxes), continued, wants_boxes, task != "context") for one in prompts]


def check_output(args: argparse.Namespace) -> None:
    """Choose the file of each drawing, args.drawings; ValueError if --output is not possible."""
    names = [images[-1] for images in args.groups if images]
    args.drawings = {}
    if args.output is None:
        if len(names) == 1 and not args.json:
            args.drawings = {names[0]: Path(drawing_name(names[0]))}
        return
    if args.output.is_dir() or not args.output.suffix:
        args.drawings = {name: args.output / drawing_name(name) for name in names}
        if len(set(args.drawings.values())) < len(names):
            raise ValueError(f"--output {args.output}: two images have the same name")
        return
    if len(names) > 1:
        raise ValueError(f"--output {args.output} is one file for {len(names)} images; pass a folder")
    if os.path.realpath(args.output) in map(os.path.realpath, args.images):
        raise ValueError(f"--output {args.output} is one of the images; use another name")
    if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output {args.output}: cannot write images of type {args.output.suffix}")
    args.drawings = {names[0]: args.output}


def drawing_name(image: str) -> str:
    """STEM.boxes.png; a long stem is cut, so that the name is not too long."""
    stem = "image" if image.startswith("data:") else Path(image).stem
    return os.fsdecode(os.fsencode(stem)[:200]) + ".boxes.png"


# ----------------------------------------------------------------------------------------------------
# From a request to its answer
# ----------------------------------------------------------------------------------------------------


def encode_request(tokenizer, request: Request, sizes: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """The ids and image_mask of a request; sizes: (width, height) of its images.

    A box in pixels refers to the image before its phrase. ValueError for boxes that do not fit.
    """
    if not request.boxes:
        return tokenizer.encode_prompt(request.prompt, len(sizes))
    starts = [match.start() for match in re.finditer("<phrase>", request.prompt)]
    boxes = []
    for i, entry in enumerate(request.boxes):
        before = request.prompt[: starts[i]] if i < len(starts) else ""
        image = max(before.count("<image>") - 1, 0)
        size = sizes[min(image, len(sizes) - 1)] if sizes else (1, 1)
        boxes.append([normalize_box(box, size) for box in as_boxes(entry)])
    return tokenizer.encode_prompt(request.prompt, len(sizes), boxes)


def normalize_box(box, size: tuple[int, int]) -> tuple:
    """A box in 0..1, in pixels of an image of this (width, height), or as two location indices ->
    the box in 0..1, or the indices as they are."""
    check_box(box)
    if len(box) == 2:
        return tuple(box)
    if max(box) <= 1 + TOLERANCE:
        return clip_box(box)
    x1, y1, x2, y2 = box
    width, height = size
    try:
        if max(box) < 2:
            raise ValueError
        return clip_box((x1 / width, y1 / height, x2 / width, y2 / height))
    except ValueError:
        raise ValueError(
            f"box {','.join(map(str, box))}: expected x1 < x2 and y1 < y2, in 0..1 or in pixels of the image, "
            f"which is {width} x {height}"
        ) from None


def decoding_options(model, tokenizer, request: Request, length: int, given: dict) -> dict:
    """The options of `Kosmos2.prefill` for a prompt of this length; `given` overrides the defaults.

    ValueError if the prompt leaves no room in the context.
    """
    limit = max(DEFAULT_NEW_TOKENS, given.get("min_new_tokens", 0))
    room = model.config.text.max_positions - length
    defaults = {"constraint": tokenizer.allowed_tokens, "max_new_tokens": max(1, min(limit, room))}
    if request.block_ngrams:
        defaults["no_repeat_ngram_size"] = model.config.text.no_repeat_ngram_size
    options = defaults | given
    model.check_length([length], options["max_new_tokens"])
    return options


def ask(model, tokenizer, request: Request, image_embeds, sizes, given: dict, stream=False):
    """Answer a request about images that are encoded already -> (Answer, its timings).

    image_embeds (I, Q, D); sizes: (width, height) of the images; given: decoding options. With
    stream, the text is printed while it is generated.
    """
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
    return read_answer(tokenizer, request, state.rows[0]), timings


def read_answer(tokenizer, request: Request, row) -> Answer:
    """The answer in a row of `kosmos2.decode`: its text continues the prompt if request.continued."""
    prompt = tokenizer.after_images(row.prompt) if request.continued else []
    text, entities = tokenizer.parse_output(prompt, row.ids, row.probabilities)
    return Answer(text, tokenizer.decode(row.all_ids).strip(), entities)


def as_json(request: Request, answer: Answer, size: tuple[int, int]) -> dict:
    """A line of --json. Boxes are in 0..1, and in pixels of the upright image (the last one)."""
    width, height = size
    entities = []
    for entity in answer.entities:
        pixel_boxes = []
        for x1, y1, x2, y2 in entity.boxes:
            pixel_boxes.append([x1 * width, y1 * height, x2 * width, y2 * height])
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


def print_json(lines: list[dict]) -> None:
    for line in lines:
        print(json.dumps(line, ensure_ascii=False), flush=True)


def box_lines(request: Request, answer: Answer, size: tuple[int, int]) -> list[str]:
    """Where boxes are the answer: a line for each, with its score and corners in pixels."""
    lines = []
    for entity in as_json(request, answer, size)["entities"] if request.wants_boxes else []:
        for box, score in zip(entity["pixel_boxes"], entity["scores"], strict=True):
            shown = "  -  " if score is None else f"{score:.3f}"
            line = f"  {shown}  {','.join(f'{value:.0f}' for value in box)}"
            if score is not None and score < PROBABLY_ABSENT:
                line += "  (probably not in the image)"
            lines.append(line)
    return lines


# ----------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------

# Dark enough to read as text on white and under white text.
PALETTE = ["#c62828", "#1565c0", "#2e7d32", "#8e24aa", "#b85a00", "#00798a", "#ad1457", "#4e5d00"]


def draw_answers(image: Image.Image, answers: list[Answer]) -> Image.Image:
    """The image with a box and a label for every entity, one color for each."""
    scale = max(1.0, 480 / max(image.size))  # a thumbnail has no room for text
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (max(width, 240), height), "white")  # wide enough for labels
    canvas.paste(image.resize((width, height), Image.Resampling.LANCZOS), (0, 0))
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(max(13, round(min(width, 1600) / 40)))
    line = max(2, round(font.size) // 6)
    entities = [entity for answer in answers for entity in answer.entities]
    labels = []
    for i, entity in enumerate(entities):
        color = PALETTE[i % len(PALETTE)]
        for x1, y1, x2, y2 in entity.boxes:
            left = x1 * width
            top = y1 * height
            right = max(left, x2 * width - 1)
            bottom = max(top, y2 * height - 1)
            pen.rectangle([left - 2, top - 2, right + 2, bottom + 2], outline="white", width=line + 4)
            pen.rectangle([left, top, right, bottom], outline=color, width=line)
            if entity.span[0] != entity.span[1]:
                labels.append((entity.phrase, color, (left, top, right, bottom)))
    placed: list[tuple] = []
    for phrase, color, box in labels:
        placed.append(draw_label(pen, font, phrase, color, box, placed))
    return canvas


def draw_label(pen, font, phrase: str, color: str, box: tuple, placed: list[tuple]) -> tuple:
    """Draw a phrase above its box, or inside or below it if another label is in the way.

    Returns the rectangle that the label occupies.
    """
    canvas_width, canvas_height = pen.im.size
    while pen.textlength(phrase, font=font) + 8 > canvas_width and len(phrase) > 2:
        phrase = phrase.removesuffix("…")[:-1] + "…"
    width = pen.textlength(phrase, font=font) + 8
    height = round(font.size * 1.35)
    left, top, _, bottom = box
    x = min(max(left, 0), max(canvas_width - width, 0))
    lowest = max(canvas_height - height, 0)
    rectangles = []
    for y in (top - height, top, bottom - height, bottom):
        y = min(max(y, 0), lowest)
        rectangles.append((x, y, x + width, y + height))
    free = [one for one in rectangles if all(iou(one, other) == 0 for other in placed)]
    rectangle = free[0] if free else rectangles[0]
    pen.rectangle(rectangle, fill=color)
    middle = rectangle[1] + height / 2
    pen.text((x + 4, middle), phrase, fill="white", font=font, anchor="lm")
    return rectangle


# ----------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------


def load_model(args: argparse.Namespace):
    """The model and tokenizer of the command line. (PyTorch is imported here: --help must not wait.)"""
    import load_weights
    from inference.fast import load_checkpoint

    started = time.perf_counter()
    device = load_weights.choose_device(args.device, args.precision)
    loaded = load_checkpoint(args.checkpoint, args.precision, device, args.tokenizer)
    print(f"loaded {args.checkpoint} in {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return loaded


def given_options(args: argparse.Namespace, names: list[str]) -> dict:
    """The decoding options that the command line sets; ValueError for one out of range."""
    from kosmos2 import GenerationOptions

    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    GenerationOptions(**given)
    if not args.temperature and given.keys() & {"top_k", "top_p", "seed"}:
        print("--top-k, --top-p and --seed have no effect at --temperature 0", file=sys.stderr)
    return given


def run(args: argparse.Namespace) -> int:
    """Load the model, answer everything; returns the exit status."""
    import torch

    from kosmos2 import open_image, preprocess_image

    given = given_options(args, ["max_new_tokens", "temperature", "top_k", "top_p", "seed"])
    if len(args.groups) == 1:
        for name in args.groups[0]:
            open_image(name)  # fail on a bad image before loading the model
    model, tokenizer = load_model(args)
    failed = 0
    for names in args.groups:
        try:
            images = [open_image(name) for name in names]
            started = time.perf_counter()
            image_embeds = None
            if images:
                pixels = [preprocess_image(image, model.config.vision.image_size) for image in images]
                device = model.decoder.layer_norm.weight.device
                with torch.inference_mode():
                    image_embeds = model.encode_image(torch.stack(pixels).to(device))  # (I, Q, D)
                print(f"vision {(time.perf_counter() - started) * 1000:.0f} ms", file=sys.stderr)
            answer_image(args, model, tokenizer, names, images, image_embeds, given)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            failed += report_error("sample", error)
    return 1 if failed else 0


def answer_image(args, model, tokenizer, names, images, image_embeds, given) -> None:
    """Ask everything about one image (or one group of images), print the answers, draw the boxes."""
    sizes = [image.size for image in images]
    size = sizes[-1] if sizes else (1, 1)
    stream = not args.json and sys.stdout.isatty()
    answers = []
    for request in args.requests:
        request = request._replace(images=names)
        name = f"{printable(names[-1])}: " if len(args.groups) > 1 else ""
        if stream:
            print(name, end="", flush=True)
        answer, timings = ask(model, tokenizer, request, image_embeds, sizes, given, stream)
        if args.json:
            print_json([as_json(request, answer, size)])
        else:
            text = "" if stream else name + answer.text
            print("\n".join([text, *box_lines(request, answer, size)]), flush=True)
        print(timings, file=sys.stderr)
        answers.append(answer)
    if images and names[-1] in args.drawings:
        file = args.drawings[names[-1]]
        file.parent.mkdir(parents=True, exist_ok=True)
        draw_answers(images[-1], answers).save(file)
        print(f"wrote {printable(str(file))}", file=sys.stderr)


def main(argv=None) -> int:
    args = parse_arguments(argv)
    try:
        return run(args)
    except (OSError, ValueError, RuntimeError) as error:
        return report_error("sample", error)


def report_error(name: str, error: Exception) -> int:
    """Print an error as one line; returns the exit status 1. A closed pipe is none: see `run_command`."""
    if isinstance(error, BrokenPipeError):
        raise error
    print(f"{name}: {printable(str(error) or type(error).__name__, 2000)}", file=sys.stderr)
    return 1


def run_command(name: str, main) -> int:
    """main() as a process: UTF-8 streams, warnings as one line, Ctrl-C, closed pipes.

    For `__main__` only: a program that calls main() keeps its own streams and warnings.
    """
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # it was closed
            setattr(sys, stream, open(os.devnull, "r+"))  # noqa: SIM115
    sys.stdin.reconfigure(encoding="utf-8-sig")
    for stream in (sys.stdout, sys.stderr):
        encoding = stream.encoding if stream.isatty() else "utf-8"
        stream.reconfigure(encoding=encoding, errors="backslashreplace")  # names may not be valid text
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
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
