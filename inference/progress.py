"""Progress and messages on stderr, and the share of work of each torchrun process."""

import os
import sys
import time

from tokenizer import printable


def torchrun_rank() -> tuple[int, int]:
    """(number of this process, number of processes): (0, 1) without torchrun.

    ValueError if only one of the two is set: other tools, such as SLURM scripts, set WORLD_SIZE alone, and
    part of the work would be skipped silently.
    """
    rank = os.environ.get("RANK")
    world = os.environ.get("WORLD_SIZE")
    if rank is None and world is None:
        return 0, 1
    are_numbers = (rank or "").isdecimal() and (world or "").isdecimal()
    if not are_numbers or not int(rank) < int(world):
        raise ValueError(
            f"RANK is {rank or 'not set'} and WORLD_SIZE {world or 'not set'}: expected both, as torchrun sets "
            "them (0 <= RANK < WORLD_SIZE), or neither"
        )
    return int(rank), int(world)


def progress_bar(done: int, total: int, note: str = "") -> str:
    filled = 30 * done // max(total, 1)
    bar = "#" * filled + "." * (30 - filled)
    return f"[{bar}] {done}/{total}  {note}"


class Progress:
    """Progress and messages on stderr; on a terminal, the bar stays on one line."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.started = time.perf_counter()
        self.in_place = sys.stderr.isatty()

    def clear(self) -> None:
        """Remove the bar, before anything else is printed."""
        if self.in_place:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def message(self, text: str, end: str = "\n") -> None:
        self.clear()
        sys.stderr.write(printable(text, 2000) + end)  # one write: the processes of torchrun share stderr
        sys.stderr.flush()

    def update(self, count: int) -> None:
        """The bar after a batch of `count` requests; nothing if it is the only batch."""
        self.done += count
        finished = self.done == self.total
        if count == self.total:
            return
        per_minute = 60 * self.done / (time.perf_counter() - self.started)
        minutes = (self.total - self.done) / per_minute
        bar = progress_bar(self.done, self.total, f"{per_minute:.0f} per minute, {minutes:.1f} min left")
        self.message(bar, end="\n" if finished or not self.in_place else "")
