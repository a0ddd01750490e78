"""Progress on stderr: bars on a terminal, and a line every half minute in a log file."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Final

from securefedcollm.foreign import as_text, printable

if TYPE_CHECKING:
    from rich.progress import Task, TaskID

EVERY: Final = 30.0
"""Seconds between two lines if there is no terminal."""
_MOST: Final = 3
"""Number of tasks that such a line names."""


class Bars:
    """A context manager whose ``report`` is a progress callback. Silent if ``quiet``.

    On a terminal the bars are live, with the remaining time. Elsewhere (a log file, CI) a line
    every half minute names the tasks under way, in addition to the permanent lines.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )
        # A line may quote another party: nothing in it is markup.
        self._tasks: dict[str, TaskID] = {}
        self._quiet = quiet
        self._over = threading.Event()
        self._teller: threading.Thread | None = None

    def __enter__(self) -> Bars:
        self._progress.start()
        if not self._quiet and not self.console.is_terminal:
            self._teller = threading.Thread(target=self._tell, name="progress", daemon=True)
            self._teller.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._teller is not None:
            self._teller.join()
        self._progress.stop()

    def report(self, done: int, total: int, text: str) -> None:
        text = printable(text)
        task = self._tasks.get(text)
        if task is None:
            task = self._tasks[text] = self._progress.add_task(text, total=total)
        self._progress.update(task, completed=done, total=total)
        if done >= total:
            self._progress.remove_task(task)
            del self._tasks[text]

    def say(self, text: str) -> None:
        """Print a permanent line.

        Adversary: a silo or server whose refusal, quoted here, holds markup or escape sequences.
        """
        if not self._quiet:
            # In a log file a line is a line, however long.
            self.console.print(as_text(text), soft_wrap=not self.console.is_terminal)

    def _tell(self) -> None:
        """Report the tasks under way, again and again: a thread's whole life."""
        while not self._over.wait(EVERY):
            if tasks := list(self._progress.tasks):
                shown = "; ".join(map(_sentence, tasks[-_MOST:]))
                more = f"; and {len(tasks) - _MOST} more" if len(tasks) > _MOST else ""
                self.say(f"  {shown}{more}")


def _sentence(task: Task) -> str:
    total = task.total or 0
    said = f"{task.description}: {task.completed:.0f} of {total:.0f}"
    left = task.time_remaining
    return said if left is None or not task.completed else f"{said}, {_duration(left)} left"


def _duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
