"""What a long command says where there is no terminal: a log file, CI."""

import io
import time

import pytest
from securefedcollm_cli import progress
from securefedcollm_cli.progress import Bars


def said(bars: Bars, monkeypatch: pytest.MonkeyPatch, seconds: float) -> list[str]:
    """All lines that stand on stderr after so long."""
    told = io.StringIO()
    monkeypatch.setattr(bars.console, "file", told)
    with bars:
        bars.report(1, 4, "rounds")
        for step in range(1, 11):
            bars.report(step, 100, "distillation")
            time.sleep(seconds / 10)
    return told.getvalue().splitlines()


def test_without_a_terminal_a_line_now_and_then_says_what_is_under_way(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.3)
    lines = said(Bars(), monkeypatch, 1.0)
    assert 2 <= len(lines) <= 4
    assert all(line.startswith("  rounds: 1 of 4") for line in lines)
    assert "; distillation: " in lines[-1]
    assert lines[-1].endswith(" s left")


def test_it_says_so_every_half_minute_and_nothing_if_the_output_is_for_machines(monkeypatch):
    assert progress.EVERY == 30
    monkeypatch.setattr(progress, "EVERY", 0.05)
    assert said(Bars(quiet=True), monkeypatch, 0.3) == []


def test_what_others_wrote_is_shown_as_text(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    bars = Bars()
    told = io.StringIO()
    monkeypatch.setattr(bars.console, "file", told)
    with bars:
        for silo in ("[red]a", "b\x1b[2J", "c", "d", "e"):
            bars.report(0, 3, f"{silo}: local tuning")
        time.sleep(0.2)
    first = told.getvalue().splitlines()[0]
    shown = "; ".join(f"{silo}: local tuning: 0 of 3" for silo in "cde")
    assert first == f"  {shown}; and 2 more"
    assert "\x1b" not in told.getvalue()


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (119, "119 s"), (150, "2 min"), (7199, "120 min"), (9000, "2 h")],
)
def test_durations_are_short(seconds, shown):
    assert progress._duration(seconds) == shown
