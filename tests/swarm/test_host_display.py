from __future__ import annotations

import io

import pytest

from petals_chat.swarm.host_display import HostDisplay, block_ranges, status_text
from petals_chat.swarm.host_options import HostLoad


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def load(tokens: int = 0, start: int = 0, end: int = 18, sessions: int = 3) -> HostLoad:
    return HostLoad(start=start, end=end, num_blocks=36, sessions=sessions, tokens=tokens, cache_used=0.125)


def screen(text: str) -> list[str]:
    """The lines as a terminal shows them at the end."""
    return [line.rsplit("\r\x1b[K", 1)[-1] for line in text.split("\n")]


def test_the_line_says_blocks_sessions_cache_and_speed() -> None:
    assert status_text(load(), [], 41.4) == "blocks 0:18 of 36  3 sessions  cache 12%  41 tokens/s"
    assert status_text(load(sessions=1), [18, 19, 35], 0.25) == (
        "blocks 0:18 of 36  1 session  cache 12%  0.2 tokens/s  nobody serves 18:20, 35:36"
    )


def test_on_a_terminal_one_line_changes() -> None:
    stream = Terminal()
    display = HostDisplay(stream, is_quiet=False)
    display.say("Loading blocks")
    for number in (1, 2, 3):
        display.show_loading(number, 3)
    display.say("Serving")
    for second in range(20):
        display.show_load(load(tokens=10 * second), [], now=100.0 + second)
    assert screen(stream.getvalue()) == [
        "Loading blocks",
        "Serving",
        "blocks 0:18 of 36  3 sessions  cache 12%  10 tokens/s",
    ]
    display.show_load(load(tokens=190), [], now=200.0)
    assert screen(stream.getvalue())[-1].endswith("0.5 tokens/s")
    display.clear()
    assert screen(stream.getvalue()) == ["Loading blocks", "Serving", ""]


def test_elsewhere_there_is_a_line_each_minute() -> None:
    stream = io.StringIO()
    display = HostDisplay(stream, is_quiet=False)
    display.show_loading(1, 3)
    for second in range(150):
        display.show_load(load(tokens=10 * second), [], now=100.0 + second)
    display.clear()
    assert stream.getvalue() == 2 * "blocks 0:18 of 36  3 sessions  cache 12%  10 tokens/s\n"


def test_other_blocks_than_before_are_announced() -> None:
    stream = io.StringIO()
    display = HostDisplay(stream, is_quiet=False)
    display.show_load(load(), [], now=0)
    display.show_load(load(start=18, end=36), [], now=1)
    assert stream.getvalue() == "The swarm needs blocks 18:36 more: serving them now.\n"


@pytest.mark.parametrize("stream_class", [io.StringIO, Terminal])
def test_a_quiet_display_writes_nothing(stream_class: type[io.StringIO]) -> None:
    stream = stream_class()
    display = HostDisplay(stream, is_quiet=True)
    display.say("Hello")
    display.show_loading(1, 2)
    display.show_load(load(), [], now=0)
    display.show_load(load(), [], now=1000)
    display.clear()
    assert stream.getvalue() == ""


def test_a_reader_who_has_gone_is_no_error() -> None:
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    stream = Gone()
    display = HostDisplay(stream, is_quiet=False)
    display.say("Hello")
    display.say("Is anybody there?")
    assert stream.getvalue() == "Hello\n"


def test_ranges() -> None:
    assert block_ranges([]) == ""
    assert block_ranges([0, 1, 2, 7, 9, 10]) == "0:3, 7:8, 9:11"
