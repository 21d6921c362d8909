"""Turn the paper's grounding benchmarks into requests for inference/batch.py.

    python -m training.benchmarks refcoco ANNOTATIONS.json IMAGES --out requests.jsonl
    python -m training.benchmarks flickr ANNOTATIONS.json IMAGES --out requests.jsonl
    python -m inference.batch --requests requests.jsonl --results results.jsonl --checkpoint WEIGHTS
    python -m training.evaluate --results results.jsonl

ANNOTATIONS are the files that MDETR published in COCO's format: finetune_refcoco_val.json and
similar files for RefCOCO, RefCOCO+ and RefCOCOg, final_flickr_separateGT_val.json for Flickr30k
Entities. IMAGES is the folder with the images (COCO train2014, flickr30k-images). The prompts are
those of the original evaluation, and every request has its ground truth: "phrase" and "target", the
correct boxes in 0..1.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from sample import CommandParser, report_error, run_command
from tokenizer import Box


def normalize(bbox: list[float], image: dict) -> Box:
    """COCO's (x, y, width, height) in pixels -> (x1, y1, x2, y2) in 0..1."""
    x, y, width, height = bbox
    x_scale = 1 / image["width"]
    y_scale = 1 / image["height"]
    return x * x_scale, y * y_scale, (x + width) * x_scale, (y + height) * y_scale


def refcoco_requests(images: list[dict], annotations: dict[int, list[dict]]) -> Iterator[dict]:
    """One request per expression: the caption of an entry is the expression, its annotation the box."""
    for image in images:
        expression = image["caption"].strip()
        yield {
            "file_name": image["file_name"],
            "prompt": f"<grounding><phrase> {expression}</phrase>",
            "phrase": expression,
            "target": [normalize(found["bbox"], image) for found in annotations[image["id"]]],
        }


def flickr_requests(images: list[dict], annotations: dict[int, list[dict]]) -> Iterator[dict]:
    """One request per phrase of a caption; the prompt has the caption up to the phrase. Each annotation
    is a box, with the characters of its phrase in tokens_positive."""
    for image in images:
        caption = image["caption"]
        for spans in image["tokens_positive_eval"]:
            start, end = spans[0]
            boxes = [
                normalize(found["bbox"], image)
                for found in annotations[image["id"]]
                if [start, end] in [list(span) for span in found["tokens_positive"]]
            ]
            if boxes:
                yield {
                    "file_name": image["file_name"],
                    "prompt": f"<grounding>{caption[:start]} <phrase>{caption[start:end]}</phrase>",
                    "phrase": caption[start:end],
                    "target": boxes,
                }


BENCHMARKS = {"refcoco": refcoco_requests, "flickr": flickr_requests}


def read_requests(benchmark: str, annotation_file: Path, folder: Path) -> list[dict]:
    """The requests of a benchmark, sorted by image; ValueError if the file is of another kind."""
    try:
        content = json.loads(annotation_file.read_text(encoding="utf-8"))
        annotations = defaultdict(list)
        for found in content["annotations"]:
            annotations[found["image_id"]].append(found)
        requests = list(BENCHMARKS[benchmark](content["images"], annotations))
        for request in requests:
            request["image"] = str(folder / request.pop("file_name"))
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{annotation_file} is not a {benchmark} file of MDETR ({what})") from None
    return sorted(requests, key=lambda request: request["image"])  # each image is encoded once


def main(argv=None) -> int:
    parser = CommandParser("training.benchmarks", __doc__)
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("annotations", type=Path)
    parser.add_argument("images", type=Path, help="folder with the images")
    parser.add_argument("--out", type=Path, required=True, metavar="JSONL")
    args = parser.parse_args(argv)
    try:
        requests = read_requests(args.benchmark, args.annotations, args.images)
        lines = [json.dumps(request, ensure_ascii=False) + "\n" for request in requests]
        args.out.write_text("".join(lines), encoding="utf-8")
    except (OSError, ValueError) as error:
        return report_error("benchmarks", error)
    print(f"wrote {len(requests)} requests to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command("benchmarks", main))
