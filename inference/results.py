"""The results file: one JSON line for each answer, appended after each batch.

A line is what `sample.as_json` gives, plus the checkpoint and the other keys of the request. Pages and
training/evaluate.py read it.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from inference.requests import RESULT_KEYS, Job, as_list
from tokenizer import strip_literal


class Results:
    """The results file of a run, locked during the run.

    Each torchrun process writes its own file, NAME.RANK.jsonl; `resume` reads all of them.
    """

    def __init__(self, path: Path, checkpoint: str, jobs: list[Job], resume: bool, rank: int, world: int):
        self.checkpoint = checkpoint_name(checkpoint)
        self.path = path.with_suffix(f".{rank}{path.suffix}") if world > 1 else path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Files that earlier runs left are divided among the processes.
        mine = {file for file, number in existing_files(path) if number % world == rank} | {self.path}
        for file in mine:
            if not resume and file.exists() and file.stat().st_size > 0:
                raise ValueError(f"{file} already exists; pass --resume to continue it, or another name")
        self.locked = {file: lock(file) for file in mine}  # kept open: closing a file unlocks it
        self.file = self.locked[self.path]
        prompts = {strip_literal(job.request.prompt) for job in jobs}
        self.done: Counter = Counter()
        for file, _ in existing_files(path) if resume else []:
            length = self.read_answered(file, prompts)
            if file in mine:
                os.truncate(file, length)  # drops a line that was cut off

    def read_answered(self, file: Path, prompts: set[str]) -> int:
        """Count the answered requests in a file; returns the bytes up to its last complete line."""
        length = 0
        for row, line in read_lines(file):
            if not line.endswith(b"\n"):
                break  # a run was stopped while it wrote
            length += len(line)
            if row["prompt"] not in prompts:
                raise ValueError(f"{file} is for a different prompt, {row['prompt']!r}; use another file")
            if row["checkpoint"] != self.checkpoint:
                raise ValueError(f"{file} is for a different checkpoint, {row['checkpoint']}; use another")
            self.done[row_key(row)] += 1
        return length

    def remaining(self, groups: list[list[Job]], rank: int, world: int) -> list[list[Job]]:
        """The requests of this process that are not in the files yet; each line answers one request."""
        left = []
        for number, group in enumerate(groups):
            jobs = []
            for job in group:
                if self.done[job_key(job)] > 0:
                    self.done[job_key(job)] -= 1
                else:
                    jobs.append(job)
            if jobs and number % world == rank:
                left.append(jobs)
        return left

    def write(self, rows: list[dict]) -> None:
        self.file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        self.file.flush()


def checkpoint_name(checkpoint: str) -> str:
    """The absolute path of a checkpoint, or its hub id."""
    return str(Path(checkpoint).resolve()) if Path(checkpoint).exists() else checkpoint


def lock(path: Path):
    """Open a file and lock it; ValueError if another run has locked it."""
    file = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another run") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return file


def read_lines(file: Path) -> Iterator[tuple[dict, bytes]]:
    """The complete lines of a results file: the object and its bytes. ValueError for other files."""
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if row is None and not line.endswith(b"\n"):  # a run was stopped while it wrote
            return
        if not is_result(row):
            raise ValueError(f"{file} is not a results file: {line[:60]!r}")
        yield row, line


def is_result(row) -> bool:
    """Whether an object has the keys of a result, with values that a page can show."""
    if not isinstance(row, dict) or any(key not in row for key in RESULT_KEYS):
        return False
    strings = [*as_list(row["image"]), row["text"], row["prompt"], row["raw"]]
    lists = [row["entities"]]
    for entity in as_list(row["entities"]):
        if not isinstance(entity, dict):
            return False
        strings.append(entity.get("phrase"))
        lists += [entity.get("span"), entity.get("boxes"), entity.get("scores")]
    return all(isinstance(v, str) for v in strings) and all(isinstance(v, list) for v in lists)


def is_page(target: Path) -> bool:
    """Whether results are shown on a page there; otherwise, it is a folder for drawings."""
    return target.suffix.lower() in (".html", ".htm")


def existing_files(path: Path) -> list[tuple[Path, int]]:
    """The existing results files, plain or of torchrun processes, each with the number of its process."""
    pattern = re.compile(re.escape(path.stem) + r"(?:\.(\d+))?" + re.escape(path.suffix))
    matches = [(file, pattern.fullmatch(file.name)) for file in sorted(path.parent.iterdir())]
    return [(file, int(match[1] or 0)) for file, match in matches if match]


def job_key(job: Job) -> tuple:
    """What identifies a request in a results file."""
    request = job.request
    return key(list(request.images), strip_literal(request.prompt), request.boxes, job.extra)


def row_key(row: dict) -> tuple:
    """The `job_key` of the request that a line answers."""
    return key(as_list(row["image"]), row["prompt"], row["given_boxes"], row)


def key(images: list, prompt: str, boxes, extra: dict) -> tuple:
    others = {name: value for name, value in extra.items() if name not in RESULT_KEYS}
    return tuple(images), prompt, json.dumps([boxes, others], sort_keys=True)
