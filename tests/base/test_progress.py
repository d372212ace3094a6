"""What the argument `progress` of long functions stands for."""

import io
import sys
from types import SimpleNamespace

import pytest

from fewstep.base.progress import SILENT, Progress, progress_of


class Recorder:
    def __init__(self):
        self.seen = []

    def stage(self, name, total=None, *, done=0):
        self.seen.append((name, total, done))

    def tick(self, amount=1, note=""):
        self.seen.append((amount, note))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(progress):
    with progress_of(progress) as shown:
        shown.stage("first [bold]", 3, done=1)
        shown.tick()
        shown.tick(1, "loss [0.5]")
        shown.stage("second")
        shown.tick(5)


@pytest.mark.parametrize("value", [None, False])
def test_nothing_is_shown_unless_asked_for(value, capsys):
    work(value)
    assert capsys.readouterr() == ("", "")
    with progress_of(value) as shown:
        assert shown is SILENT


def test_an_object_with_both_methods_is_called(capsys):
    recorder = Recorder()
    assert isinstance(recorder, Progress)
    work(recorder)
    assert recorder.seen == [
        ("first [bold]", 3, 1),
        (1, ""),
        (1, "loss [0.5]"),
        ("second", None, 0),
        (5, ""),
    ]
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_each_stage_is_one_line_of_the_error_stream(capsys):
    work(True)
    assert capsys.readouterr() == ("", "first [bold]: 1 of 3\nsecond\n")


def test_on_a_terminal_each_stage_has_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    work(True)
    text = terminal.getvalue()
    assert "first [bold]" in text
    assert "loss [0.5]" in text
    assert "3/3" in text
    assert "second" in text
    assert "5/?" in text


def test_the_bar_is_closed_by_an_error(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    def failing():
        with progress_of(True) as shown:
            shown.tick()
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    # The cursor, hidden while the bar lives, is shown again.
    assert "\x1b[?25h" in terminal.getvalue()


def test_of_many_processes_the_first_shows_progress(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    work(True)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", [1, "yes", print, SimpleNamespace(stage=print), Recorder])
def test_anything_else_is_refused(value):
    with (
        pytest.raises(TypeError, match=r"progress is True, False, or an object .* got \w+"),
        progress_of(value),
    ):
        pass
