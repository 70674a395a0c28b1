"""The display of a run: plain lines in pipes, a bar on a terminal, nothing if asked for."""

from __future__ import annotations

import io
import sys

import pytest

from compress.cli import progress
from compress.cli.progress import Display, Pace


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_rest_is_predicted_from_recent_steps_and_counts_down(clock):
    pace = Pace(10)
    assert pace.remaining is None
    for seconds in (1, 1, 1, 8, 8, 8, 8):  # a resumed run: the first ones were only replayed
        clock.now += seconds
        pace.advance(1)
    assert pace.remaining == pytest.approx(3 * 8)
    clock.now += 5
    assert pace.remaining == pytest.approx(3 * 8 - 5)
    clock.now += 500
    assert pace.remaining == 0
    pace.advance(3)
    assert pace.remaining == 0


def test_a_pipe_gets_a_line_every_ten_seconds_and_at_both_ends(clock, capsys):
    with Display() as display:
        display.begin("compress", 100, "block")
        for _ in range(100):
            clock.now += 1
            display.advance(1, "model.layers.3")
        display.end()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compress: 100 blocks"
    assert lines[1].startswith("compress: 10/100 blocks, 10 s, 90 s left, ")
    assert lines[1].endswith(", model.layers.3")
    assert lines[-1].startswith("compress: 100/100 blocks in 100 s, ")
    assert len(lines) == 12


def test_a_terminal_gets_a_bar_and_the_notes_above_it(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with Display() as display:
        display.begin("compress", 2, "block")
        display.advance(1)
        display.note("model.layers.[0-5]: more damping")
        display.advance(1)
        display.end()
    shown = terminal.getvalue()
    assert "━" in shown
    assert "0/2 blocks" in shown
    assert "2/2 blocks" in shown
    assert "of memory, peak" in shown
    assert "note: model.layers.[0-5]: more damping" in shown
    assert display.notes == ["model.layers.[0-5]: more damping"]


def test_an_error_takes_the_bar_away(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(ValueError, match="x"), Display() as display:
        display.begin("compress", 2, "block")
        raise ValueError("x")
    assert terminal.getvalue().rstrip().endswith(("\x1b[2K", "\x1b[?25h"))


def test_quiet_shows_nothing_and_keeps_the_notes(capsys):
    with Display(quiet=True) as display:
        display.begin("compress", 1, "block")
        display.note("more damping")
        display.advance()
        display.end()
        display.repeat_notes()
    assert capsys.readouterr() == ("", "")
    assert display.notes == ["more damping"]
