"""Colours are for terminals, and a guest cannot steer the user's terminal."""

import io

import pytest

from vmm.cli.style import Style, visible


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_colours_without_a_terminal() -> None:
    assert Style(io.StringIO()).paint("x", "red") == "x"


def test_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Style(Terminal()).paint("x", "red") == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Style(Terminal()).paint("x", "red") == "x"


def test_closed_stream_is_no_terminal() -> None:
    stream = io.StringIO()
    stream.close()
    assert not Style(stream).terminal


def test_visible() -> None:
    assert visible("grün\tok\r\n".encode()) == "grün\tok\r\n".encode()
    assert visible(b"\x1b]0;title\x07\x7f") == b"\\x1b]0;title\\x07\\x7f"
