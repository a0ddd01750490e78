"""Progress bars on stderr. One line per thing that is under way; finished lines disappear."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from securefedcollm.foreign import as_text, printable

if TYPE_CHECKING:
    from rich.progress import TaskID


class Bars:
    """A context manager whose ``report`` is a progress callback. Silent if ``quiet``.

    On a terminal the bars are live; elsewhere (a log file, CI) only finished rounds are printed.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        self.console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            transient=True,
        )
        # A line may quote another party: nothing in it is markup.
        self._tasks: dict[str, TaskID] = {}
        self._quiet = quiet

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        """A line that stays.

        Adversary: a silo or server whose refusal, quoted here, holds markup or escape sequences.
        """
        if not self._quiet:
            self._progress.console.print(as_text(text))
