"""Answer many requests: folders, request files, batches, beams, ranked boxes, several processes.

    python -m inference.batch folder --results captions.jsonl              --resume continues a stopped run
    python -m inference.batch folder --results captions.jsonl --page page.html
    python -m inference.batch --requests requests.jsonl > results.jsonl    a request per line
    python -m inference.batch tiny/busy.png --task ground --text "a cat" --top-boxes 5
    torchrun --nproc-per-node 8 -m inference.batch folder --results captions.jsonl

A line of a requests file is a JSON object: image (a name or a list), task and text, or prompt, boxes;
other keys are copied to the result. Results are JSON lines, on stdout or in the --results file.
Progress and errors go to stderr. Exit status: 0 done, 1 something failed (the other requests are
still answered), 2 usage, 130 interrupted.
"""

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import sample
from inference.progress import Progress, torchrun_rank
from inference.requests import Job, image_jobs, read_jobs
from inference.results import Results
from sample import (
    Answer,
    CommandParser,
    add_options,
    as_json,
    box_lines,
    decoding_options,
    encode_request,
    given_options,
    load_model,
    make_requests,
    read_answer,
    report_error,
    run_command,
)
from tokenizer import Entity, printable, tokens_to_box

DECODING = (*sample.DECODING, "min_new_tokens", "no_repeat_ngram_size")


@dataclass
class Question:
    """A request as a row of a batch."""

    job: Job
    ids: list[int]  # the encoded prompt
    image_mask: list[bool]
    options: dict  # of `Kosmos2.prefill`
    image_embeds: object = None  # (I, Q, D), of all images of the prompt
    answer: Answer | None = None


@dataclass
class Group:
    """Consecutive requests about the same images."""

    jobs: list[Job]
    questions: list[Question] = field(default_factory=list)  # the requests that can be answered
    errors: list = field(default_factory=list)  # (jobs, exception) for the others
    pixels: list = field(default_factory=list)  # a tensor (3, image_size, image_size) for each image
    sizes: list[tuple[int, int]] = field(default_factory=list)  # (width, height) of each image


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
    ngram_help = "forbid repeated n-grams (default: the checkpoint's; off for --task context)"
    add("--no-repeat-ngram-size", type=int, metavar="N", help=ngram_help)
    add("--num-beams", type=int, default=1, metavar="N", help="above 1: beam search")
    p.add_argument("--batch-size", type=int, default=8, metavar="N", help="requests per batch (default: 8)")
    add = p.add_argument_group("output").add_argument
    results_help = "append the results to this file, after each batch (default: stdout)"
    add("--results", type=Path, metavar="JSONL", help=results_help)
    resume_help = "continue a --results file: skip the requests it already answers"
    add("--resume", action="store_true", help=resume_help)
    add("--page", type=Path, metavar="HTML", help="at the end, make a page of the results file")
    add("--drawings", type=Path, metavar="DIR", help="at the end, draw the boxes of the results file")
    return p


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line; conflicting options exit with status 2."""
    p = make_parser()
    args = p.parse_args(argv)
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if not args.images and not args.requests and args.task != "text":
        p.error("expected images, folders or --requests")
    if args.requests and (args.images or args.prompt or args.task or args.text or args.box):
        p.error("--requests replaces IMAGE, --task, --text, --prompt and --box")
    if args.requests == "-" and rank is not None and world != "1":
        p.error("--requests - cannot be shared by several processes; write the requests to a file")
    if args.batch_size < 1 or args.num_beams < 1 or (args.top_boxes is not None and args.top_boxes < 1):
        p.error("--batch-size, --num-beams and --top-boxes must be positive")
    if args.num_beams > 1 and args.temperature:
        p.error("--num-beams does not sample; use --temperature 0")
    if args.results is None and (args.resume or args.page or args.drawings):
        p.error("--resume, --page and --drawings require --results")
    if args.results is not None and args.results.is_dir():
        p.error(f"--results {args.results} is a folder; expected a file")
    if (args.page or args.drawings) and rank is not None and world != "1":
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


def load_group(jobs: list[Job], model, tokenizer, args, given: dict) -> Group:
    """Read and preprocess the images of requests that share them, and encode their prompts."""
    from kosmos2 import open_image, preprocess_image

    group = Group(jobs)
    try:
        for name in jobs[0].request.images:
            image = open_image(name)
            group.pixels.append(preprocess_image(image, model.config.vision.image_size))
            group.sizes.append(image.size)
    except Exception as error:  # Pillow's decoders raise many kinds
        group.errors.append((jobs, error))
        return group
    for job in jobs:
        try:
            ids, image_mask = encode_request(tokenizer, job.request, group.sizes)
            if args.top_boxes:
                ids.append(tokenizer.special_ids["<object>"])
                image_mask.append(False)
                model.check_length([len(ids)], 2)
                options = {"max_new_tokens": 2}
            else:
                options = decoding_options(model, tokenizer, job.request, len(ids), given)
                model.check_length([len(ids)], options["max_new_tokens"])
            group.questions.append(Question(job, ids, image_mask, options))
        except (ValueError, TypeError) as error:
            group.errors.append(([job], error))
    return group


def read_ahead(groups: list[list[Job]], load, batch_size: int) -> Iterator[list[Group]]:
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


# ---- Running the model -----------------------------------------------------------------------------


class Runner:
    """Answers batches with one model. `timings` describes the last batch."""

    def __init__(self, args: argparse.Namespace, model, tokenizer):
        self.args = args
        self.model = model
        self.tokenizer = tokenizer
        self.device = model.decoder.layer_norm.weight.device
        self.image_ids, _ = tokenizer.encode_prompt("")
        self.timings = ""

    def answer(self, groups: list[Group]) -> None:
        """Answer all requests of a batch: sets `question.answer`."""
        from inference.shortcuts import prefill_image

        self.encode_images(groups)
        together = []
        for group in groups:
            shared = group.questions if all(map(self.begins_with_image, group.questions)) else []
            if shared and (len(shared) > 1 or self.args.top_boxes):
                prefix = prefill_image(self.model, self.tokenizer, shared[0].image_embeds)
                for questions in self.parts(shared):
                    self.generate(questions, prefix)
            else:
                together += group.questions
        for questions in self.parts(together):
            self.generate(questions)

    def encode_images(self, groups: list[Group]) -> None:
        """Encode the images of all groups as one batch: sets `question.image_embeds`."""
        import torch

        started = time.perf_counter()
        pixels = [image for group in groups for image in group.pixels]
        if not pixels:
            self.timings = "no image"
            return
        with torch.inference_mode():
            image_embeds = self.model.encode_image(torch.stack(pixels).to(self.device))  # (I, Q, D)
            image_embeds[0, 0, 0].item()  # waits for a GPU
        self.timings = f"vision {(time.perf_counter() - started) * 1000:.0f} ms"
        start = 0
        for group in groups:
            end = start + len(group.pixels)
            for question in group.questions:
                question.image_embeds = image_embeds[start:end]
            start = end

    def begins_with_image(self, question: Question) -> bool:
        """Whether the prompt has one image, followed by text: such prompts can share its prefill."""
        count = len(self.image_ids)
        if question.ids[:count] != self.image_ids or len(question.ids) == count:
            return False
        return not any(question.image_mask[count:])

    def parts(self, questions: list[Question]) -> list[list[Question]]:
        """Batches of at most --batch-size questions with the same decoding options.

        (Few-shot prompts run without n-gram blocking, and a prompt that nearly fills the context has
        a limit of its own.)
        """
        same_options = defaultdict(list)
        for question in questions:
            values = (question.options.get("no_repeat_ngram_size"), question.options["max_new_tokens"])
            same_options[values].append(question)
        size = 1 if self.args.top_boxes else self.args.batch_size
        batches = []
        for same in same_options.values():
            batches += [same[start : start + size] for start in range(0, len(same), size)]
        return batches

    def generate(self, questions: list[Question], prefix=None) -> None:
        """Answer some questions as one batch. prefix: the state after their image."""
        import torch

        from inference.beam import finish_beams
        from inference.shortcuts import prefill_after, with_drafts
        from kosmos2 import pad_left

        started = time.perf_counter()
        past = 0 if prefix is None else len(self.image_ids)
        prompts = [(question.ids[past:], question.image_mask[past:]) for question in questions]
        tokens, image_mask, pad_mask = pad_left(prompts, self.device)
        options = questions[0].options
        if prefix is not None:
            state = prefill_after(prefix, tokens, pad_mask, **options)
        else:
            embeds = [question.image_embeds for question in questions if question.image_embeds is not None]
            image_embeds = torch.cat(embeds) if embeds else None  # (I, Q, D)
            state = self.model.prefill(tokens, None, image_embeds, image_mask, pad_mask, **options)
        if self.args.top_boxes:
            questions[0].answer = self.rank_boxes(questions[0], state)
            return
        if self.args.num_beams > 1:
            rows = finish_beams(state, self.args.num_beams)
        else:
            rows = self.decode(with_drafts(state, self.tokenizer), started)
        for question, row in zip(questions, rows, strict=True):
            question.answer = read_answer(self.tokenizer, question.job.request, row)

    def decode(self, state, started: float) -> list:
        """`kosmos2.finish`, with timings."""
        from kosmos2 import decode

        times = []
        for _ in decode(state):
            times.append(time.perf_counter())
        if len(times) > 1:
            tokens = sum(max(len(row.ids) - 1, 0) for row in state.rows)  # after the first of each
            self.timings += f", first token {(times[0] - started) * 1000:.0f} ms"
            self.timings += f", then {tokens / (times[-1] - times[0]):.0f} tokens/s"
        return state.rows

    def rank_boxes(self, question: Question, state) -> Answer:
        """The most likely boxes for the phrase that the prompt ends with, best first."""
        from inference.beam import rank_boxes

        ranked = rank_boxes(state, self.tokenizer, self.args.top_boxes)
        boxes = [tokens_to_box(ul, lr, self.tokenizer.grid) for _, ul, lr in ranked]
        scores = [score for score, _, _ in ranked]
        ids = question.ids[:-1]  # without <object>
        text, _ = self.tokenizer.parse_output(ids, [])
        raw = self.tokenizer.decode(ids).strip()
        return Answer(text, raw, [Entity(text, (0, len(text)), boxes, scores)])


# ---- The run ---------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Answer all requests, write the results; returns the exit status."""
    jobs = read_jobs(args.requests) if args.requests else image_jobs(args)
    if args.top_boxes and not all(job.request.wants_boxes for job in jobs):
        raise ValueError("--top-boxes requires --task ground or refer with a text in every request")
    groups = [list(group) for _, group in groupby(jobs, key=lambda job: job.request.images)]
    rank, world = torchrun_rank()
    given = given_options(args, DECODING)
    results = None
    if args.results:
        results = Results(args.results, args.checkpoint, jobs, args.resume, rank, world)
    mine = results.remaining(groups, rank, world) if results else groups[rank::world]
    total = sum(map(len, mine))
    if world > 1:
        print(f"process {rank} of {world} answers {total} of {len(jobs)} requests", file=sys.stderr)
    failed = []
    if mine:
        model, tokenizer = load_model(args)
        failed = answer_groups(mine, Runner(args, model, tokenizer), given, results)
    if failed and total > 1:
        names = dict.fromkeys(printable(name) for job in failed for name in job.request.images)
        print(f"batch: {len(failed)} of {total} failed: {', '.join(names)}", file=sys.stderr)
    status = 1 if failed else 0
    for target in (args.page, args.drawings):
        if target is not None:
            from inference.page import write_target

            status = max(status, write_target([args.results], target))
    return status


def answer_groups(groups: list[list[Job]], runner: Runner, given: dict, results: Results | None) -> list[Job]:
    """Answer all requests, batch by batch, and write the results; returns the requests that failed."""
    args = runner.args
    progress = Progress(sum(map(len, groups)))
    failed = []

    def load(jobs: list[Job]) -> Group:
        return load_group(jobs, runner.model, runner.tokenizer, args, given)

    def fail(jobs: list[Job], error: Exception) -> None:
        progress.message(f"batch: {describe_error(error, jobs)}")
        failed.extend(jobs)

    for batch in read_ahead(groups, load, args.batch_size):
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
                lines.append(question.job.extra | line)
                for shown in box_lines(question.job.request, question.answer, size) if args.top_boxes else []:
                    progress.message(shown)
            if results is not None:
                results.write(lines)
            else:
                progress.clear()
                for line in lines:
                    print(json.dumps(line, ensure_ascii=False), flush=True)
        progress.update(sum(len(group.jobs) for group in batch), runner.timings)
    return failed


def describe_error(error: Exception, jobs: list[Job]) -> str:
    """One line that names the images."""
    names = ", ".join(dict.fromkeys(printable(name) for job in jobs for name in job.request.images))
    text = str(error).split("\n")[0] or type(error).__name__
    return text if names in text else f"{names}: {text}"


def main(argv=None) -> int:
    args = parse_arguments(argv)
    try:
        return run(args)
    except (OSError, ValueError, RuntimeError) as error:
        return report_error("batch", error)


if __name__ == "__main__":
    sys.exit(run_command("batch", main))
