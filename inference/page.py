"""Make one HTML page, or drawings, from results files.

    python -m inference.page captions.jsonl page.html      images, captions and boxes that highlight each other
    python -m inference.page captions.jsonl drawings       a folder with a drawing of each image

TARGET is a page if it ends in .html, otherwise a folder. Several results files, as torchrun writes
them, can be given. All lines about the same image make one figure.
"""

import base64
import html
import io
import sys
from pathlib import Path

from PIL import Image

from inference.convert import replacing
from inference.requests import as_list
from inference.results import is_page, read_lines
from kosmos2 import open_image
from sample import PALETTE, Answer, CommandParser, draw_answers, drawing_name, report_error, run_command
from tokenizer import DELIMITER, IMAGE_CLOSE, LINK, Entity, printable, strip_tags

HTML_HEAD = """<!DOCTYPE html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Kosmos-2</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1rem; display: grid; gap: 1.5rem;
       grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0 } .kosmos2-image { position: relative; display: inline-block }
.kosmos2-image img { display: block; max-width: 100%; height: auto }
.kosmos2-image div { position: absolute; box-sizing: border-box; border: 3px solid var(--c);
                     border-radius: 3px; box-shadow: 0 0 0 1px #fffa }
figcaption p { margin: .4rem 0; overflow-wrap: anywhere } figcaption small { opacity: .7 }
a.kosmos2 { color: inherit; text-decoration: underline 3px var(--c); cursor: pointer }
.kosmos2-on { background: color-mix(in srgb, var(--c) 30%, transparent) }
</style>
<script>
function highlight(event) {
  const entity = event.target.closest && event.target.closest("[data-entity]");
  if (!entity) return;
  const on = /over|in$/.test(event.type);
  for (const other of entity.closest("figure").querySelectorAll("[data-entity]"))
    other.classList.toggle("kosmos2-on", on && other.dataset.entity === entity.dataset.entity);
}
for (const type of ["mouseover", "mouseout", "focusin", "focusout"])
  document.addEventListener(type, highlight);
</script>
"""


def html_figure(image: Image.Image | None, lines: list[dict], title: str = "") -> str:
    """An image with its boxes and the captions that link to them, as HTML.

    lines: of a results file, all about this image. Needs HTML_HEAD once per page.
    """
    boxes = ""
    captions = ""
    count = 0  # of the entities so far
    for line in lines:
        captions += f"<p>{html_caption(line, count)}</p>"
        for entity in line["entities"]:
            boxes += html_boxes(entity, count)
            count += 1
    captions += f"<small>{html.escape(title)}</small>"
    shown = ""
    if image is not None:
        source = base64.b64encode(encode_jpeg(image)).decode()
        shown = f'<div class="kosmos2-image"><img alt="" src="data:image/jpeg;base64,{source}">{boxes}</div>'
    return f"<figure>{shown}<figcaption>{captions}</figcaption></figure>\n"


def html_caption(line: dict, first: int) -> str:
    """The text with its phrases as links, and their scores. first: the number of its first entity."""
    text = line["text"]
    caption = ""
    done = 0
    for number, entity in enumerate(line["entities"], first):
        start, end = entity["span"]
        if start < done:  # inside another phrase
            continue
        phrase = html.escape(text[start:end] or "▢")
        scores = [f"{score:.0%}" for score in entity["scores"] if score is not None]
        caption += html.escape(text[done:start])
        caption += f'<a class="kosmos2" tabindex="0" {html_entity(number)}>{phrase}</a>'
        caption += f"<small> {' '.join(scores)}</small>"
        done = end
    return caption + html.escape(text[done:])


def html_boxes(entity: dict, number: int) -> str:
    boxes = ""
    for x1, y1, x2, y2 in entity["boxes"]:
        place = f" left: {x1:.2%}; top: {y1:.2%}; width: {x2 - x1:.2%}; height: {y2 - y1:.2%}"
        boxes += f'<div {html_entity(number, place)} title="{html.escape(entity["phrase"])}"></div>'
    return boxes


def html_entity(number: int, style: str = "") -> str:
    """The attributes that a phrase and its boxes share."""
    return f'data-entity="{number}" style="--c: {PALETTE[number % len(PALETTE)]};{style}"'


def encode_jpeg(image: Image.Image) -> bytes:
    small = image.copy()
    small.thumbnail((1024, 1024))
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=88)
    return encoded.getvalue()


def to_markdown(tagged_text: str) -> str:
    """Tagged text as the hyperlinks of the paper:

    `[a snowman](<patch_index_0044><patch_index_0863>)`.
    """
    text = tagged_text.rsplit(IMAGE_CLOSE, 1)[-1]
    markdown = ""
    done = 0
    for link in LINK.finditer(text):
        phrase, objects = link.groups(default="")
        space = " " if phrase.startswith(" ") else ""
        boxes = objects.replace(DELIMITER, ", ")
        markdown += strip_tags(text[done : link.start()])
        markdown += f"{space}[{phrase.strip()}]({boxes})"
        done = link.end()
    return (markdown + strip_tags(text[done:])).strip()


# ---- From results files to a page or a folder ------------------------------------------------------


def group_lines(files: list[Path]) -> list[tuple[int, str | None, list[dict]]]:
    """(number of the first line, image, lines) of each image, in the order of the lines.

    Images are identified by name; of several images in one prompt, the last one is shown. Each line
    without an image is a group of its own.
    """
    groups: dict = {}
    number = 0
    for file in files:
        for line, _ in read_lines(file):
            names = as_list(line["image"])
            identity = tuple(names) or number
            groups.setdefault(identity, (number, names[-1] if names else None, []))[2].append(line)
            number += 1
    return list(groups.values())


def try_open(name: str | None) -> Image.Image | None:
    """The image; None if there is none, or if it cannot be read, which is reported on stderr."""
    try:
        return open_image(name) if name else None
    except (OSError, ValueError) as error:
        report_error("page", error)
        return None


def write_page(files: list[Path], page: Path) -> int:
    """Write an HTML page; returns the exit status."""
    status = 0
    page.parent.mkdir(parents=True, exist_ok=True)
    with replacing(page) as part, open(part, "w", encoding="utf-8", errors="backslashreplace") as output:
        output.write(HTML_HEAD)
        for _, name, lines in group_lines(files):
            image = try_open(name)
            if name and image is None:
                status = 1
            output.write(html_figure(image, lines, short_title(name)))
    return status


def write_drawings(files: list[Path], folder: Path) -> int:
    """Draw the boxes of each image to a file of its own; returns the exit status.

    A file is named after the number of the image's first line: lines are only appended, so names
    never change.
    """
    status = 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, name, lines in group_lines(files):
        if name is None:
            continue
        image = try_open(name)
        if image is None:
            status = 1
            continue
        answers = []
        for line in lines:
            entities = [
                Entity(e["phrase"], tuple(e["span"]), e["boxes"], e["scores"]) for e in line["entities"]
            ]
            answers.append(Answer(line["text"], line["raw"], entities))
        with replacing(folder / f"{number:05d}-{drawing_name(name)}") as part:
            draw_answers(image, answers).save(part, format="PNG")
    return status


def short_title(name: str | None) -> str:
    """The file name of an image, for its figure."""
    if name is None:
        return ""
    return "image" if name.startswith("data:") else printable(Path(name).name)


def write_target(files: list[Path], target: Path) -> int:
    """A page or drawings, by the ending of the target; returns the exit status."""
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no results file at {file}")
        if file.resolve() == target.resolve():
            raise ValueError(f"{target} is a results file; expected PAGE.html or a folder")
    if not is_page(target) and target.is_file():
        raise ValueError(f"{target} is a file; expected PAGE.html or a folder")
    status = write_page(files, target) if is_page(target) else write_drawings(files, target)
    print(f"wrote {printable(str(target))}", file=sys.stderr)
    return status


def main(argv=None) -> int:
    parser = CommandParser("inference.page", __doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="results files (JSON lines)")
    parser.add_argument("target", type=Path, metavar="TARGET", help="PAGE.html, or a folder for drawings")
    args = parser.parse_args(argv)
    try:
        return write_target(args.results, args.target)
    except (OSError, ValueError) as error:
        return report_error("page", error)


if __name__ == "__main__":
    sys.exit(run_command("page", main))
