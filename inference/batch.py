"""Answer many requests: folders, request files, batches, beams, ranked boxes, several processes.

    python -m inference.batch folder --results captions.jsonl              --resume continues a stopped run
    python -m inference.batch folder --results captions.jsonl --page page.html
    python -m inference.batch --requests requests.jsonl > results.jsonl    a request per line
    python -m inference.batch tiny/busy.png --task ground --text "a cat" --top-boxes 5
    torchrun --nproc-per-node 8 -m inference.batch folder --results captions.jsonl

A line of a requests file is a JSON object: image (a name or a list), boxes, and either task and text or
prompt; other keys are copied to the result. Results are JSON lines, on stdout or in the --results
file. Progress and errors go to stderr. Exit status: 0 done, 1 something failed (the other requests
are still answered), 2 usage, 130 interrupted.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import sample
from inference.progress import Progress, torchrun_rank
from inference.requests import Job, image_jobs, read_jobs
from inference.results import Results, checkpoint_name, is_page
from sample import (
    CommandParser,
    add_options,
    as_json,
    box_lines,
    given_options,
    load_model,
    make_requests,
    report_error,
    run_command,
)
from tokenizer import printable

DECODING = (*sample.DECODING, "min_new_tokens", "no_repeat_ngram_size")


# ---- The command line ------------------------------------------------------------------------------


def make_parser() -> CommandParser:
    p = CommandParser("inference.batch", __doc__)
    p.add_argument("images", nargs="*", metavar="IMAGE", help="image files and folders")
    requests_help = "a request per line: image, task, text, prompt, boxes; - is stdin"
    p.add_argument("--requests", metavar="JSONL", help=requests_help)
    add_options(p)
    top_help = "the K most likely boxes of a phrase (ground, refer)"
    p.add_argument("--top-boxes", type=int, metavar="K", help=top_help)
    add = p.add_argument_group("more decoding options").add_argument
    add("--min-new-tokens", type=int, metavar="N", help="do not end before this many tokens")
    ngram_help = "forbid repeated n-grams; 0: off (default: the checkpoint's; off for --task context)"
    add("--no-repeat-ngram-size", type=int, metavar="N", help=ngram_help)
    add("--num-beams", type=int, default=1, metavar="N", help="above 1: beam search")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests per batch (default: 8)")
    add = p.add_argument_group("output").add_argument
    results_help = "write the results to this file, after each batch (default: stdout)"
    add("--results", type=Path, metavar="JSONL", help=results_help)
    resume_help = "continue a --results file: skip the requests it already answers"
    add("--resume", action="store_true", help=resume_help)
    add("--page", type=Path, metavar="HTML", help="at the end, make a page of the results file")
    add("--drawings", type=Path, metavar="DIR", help="at the end, draw the boxes of the results file")
    return p


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line; conflicting options exit with status 2."""
    p = make_parser()
    args = p.parse_intermixed_args(argv)
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if not args.images and not args.requests and args.task != "text":
        p.error("expected images, folders or --requests")
    if args.requests and (args.images or args.prompt or args.task or args.text or args.box):
        p.error("--requests replaces IMAGE, --task, --text, --prompt and --box")
    if args.requests == "-" and several:
        p.error("--requests - cannot be shared by several processes; write the requests to a file")
    if args.batch_size < 1 or args.num_beams < 1 or (args.top_boxes is not None and args.top_boxes < 1):
        p.error("--batch-size, --num-beams and --top-boxes must be positive")
    if args.num_beams > 1 and args.temperature:
        p.error("--num-beams does not sample; use --temperature 0")
    if args.results is None and (args.resume or args.page or args.drawings):
        p.error("--resume, --page and --drawings require --results")
    if args.page is not None and not is_page(args.page):
        p.error(f"--page {args.page}: expected a name that ends in .html")
    if args.drawings is not None and (is_page(args.drawings) or args.drawings.is_file()):
        p.error(f"--drawings {args.drawings}: expected a folder")
    if args.results is not None and args.results.is_dir():
        p.error(f"--results {args.results} is a folder; expected a file")
    if (args.page or args.drawings) and several:
        p.error("with several processes, run python -m inference.page on all results files afterwards")
    if args.task == "text" and args.images:
        p.error("--task text takes no IMAGE")
    if args.top_boxes and not args.requests and not (args.text and args.task in ("ground", "refer")):
        p.error("--top-boxes requires --task ground or refer with --text")
    named = [path for path in (args.requests, args.results, args.page) if path is not None]
    if len({os.path.realpath(path) for path in named}) < len(named):
        p.error("--requests, --results and --page must be different files")
    if not args.requests:
        try:
            make_requests((), args.task, args.text, args.prompt, args.box)
        except ValueError as error:
            p.error(str(error))
    return args


# ---- Reading ahead ---------------------------------------------------------------------------------


def read_ahead(groups: list[list[Job]], load, batch_size: int) -> Iterator[list]:
    """Batches of about batch_size requests; the next batch loads in the background."""
    with ThreadPoolExecutor(2) as pool:
        loading: list[Future] = []
        for batch in batched(groups, batch_size):
            following = [pool.submit(load, jobs) for jobs in batch]
            if loading:
                yield [future.result() for future in loading]
            loading = following
        if loading:
            yield [future.result() for future in loading]


def batched(groups: list[list[Job]], batch_size: int) -> Iterator[list[list[Job]]]:
    batch: list[list[Job]] = []
    for group in groups:
        batch.append(group)
        if sum(map(len, batch)) >= batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---- The run ---------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Answer all requests, write the results; returns the exit status."""
    jobs = read_jobs(args.requests) if args.requests else image_jobs(args)
    if args.top_boxes and not all(job.request.wants_boxes for job in jobs):
        raise ValueError("--top-boxes requires --task ground or refer, with text in every request")
    groups = []  # of consecutive requests about the same images
    for _, found in groupby(jobs, key=lambda job: job.request.images):
        same = list(found)
        groups += [same[start : start + args.batch_size] for start in range(0, len(same), args.batch_size)]
    rank, world = torchrun_rank()
    given = given_options(args, DECODING)
    results = None
    if args.results:
        results = Results(args.results, args.checkpoint, jobs, args.resume, rank, world)
    mine = results.remaining(groups, rank, world) if results else groups[rank::world]
    total = sum(map(len, mine))
    progress = Progress(total)
    if world > 1:
        progress.message(f"process {rank} of {world} answers {total} of {len(jobs)} requests")
    elif total < len(jobs):
        progress.message(f"batch: {len(jobs) - total} of {len(jobs)} requests are already answered")
    failed = []
    if mine:
        from inference.runner import Runner

        model, tokenizer = load_model(args)
        failed = answer_groups(mine, Runner(args, model, tokenizer, given), results, progress)
    if failed and total > 1:
        names = dict.fromkeys(printable(name) for job in failed for name in job.request.images or [job.where])
        progress.message(f"batch: {len(failed)} of {total} failed: {', '.join(names)}")
    status = 1 if failed else 0
    for target in (args.page, args.drawings):
        if target is not None:
            from inference.page import write_target

            status = max(status, write_target([args.results], target))
    return status


def answer_groups(groups: list[list[Job]], runner, results: Results | None, progress: Progress) -> list[Job]:
    """Answer all requests, batch by batch, and write the results; returns the requests that failed."""
    args = runner.args
    failed = []

    def fail(jobs: list[Job], error: Exception) -> None:
        progress.message(f"batch: {describe_error(error, jobs)}")
        failed.extend(jobs)

    for batch in read_ahead(groups, runner.load, args.batch_size):
        for group in batch:
            for jobs, error in group.errors:
                fail(jobs, error)
        answered = [group for group in batch if group.questions]
        try:
            runner.answer(answered)
        except (RuntimeError, ValueError, MemoryError) as error:  # such as a GPU without enough memory
            fail([question.job for group in answered for question in group.questions], error)
            answered = []
        for group in answered:
            size = group.sizes[-1] if group.sizes else (1, 1)
            lines = []
            for question in group.questions:
                line = as_json(question.job.request, question.answer, size)
                lines.append(question.job.extra | line | {"checkpoint": checkpoint_name(args.checkpoint)})
                for shown in box_lines(question.job.request, question.answer, size) if args.top_boxes else []:
                    progress.message(shown)
            if results is not None:
                results.write(lines)
            else:
                progress.clear()
                for line in lines:
                    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")  # one write, too
                sys.stdout.flush()
        progress.update(sum(len(group.jobs) for group in batch))
    return failed


def describe_error(error: Exception, jobs: list[Job]) -> str:
    """One line that names the images, and the line of the requests file if there is one request."""
    names = ", ".join(dict.fromkeys(printable(name) for job in jobs for name in job.request.images))
    text = str(error).split("\n")[0] or type(error).__name__
    parts = [jobs[0].where if len(jobs) == 1 else "", "" if names in text else names, text]
    return ": ".join(part for part in parts if part)


def main(argv=None) -> int:
    args = parse_arguments(argv)
    try:
        return run(args)
    except (OSError, ValueError, RuntimeError) as error:
        return report_error("batch", error)


if __name__ == "__main__":
    sys.exit(run_command("batch", main))
