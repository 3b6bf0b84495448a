"""The state of a swarm as text for a terminal: for each model a map of blocks and servers.

It knows neither where the state is from nor the terminal: whoever prints says how wide it is, and whether it has
colours. What strangers call their servers is printed without characters that could do more than be read.
"""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from petals_chat.swarm.state import ModelReport, ServerRow, SwarmState, spare_sentence

LARGEST_MAP = 48
SMALLEST_MAP = 16
MAX_NAME_COLUMNS = 14
_INDENT = "  "
_GAP = "  "
_MARKS = {"online": "#", "joining": "+", "offline": "-"}
_STATE_COLORS = {
    "online": "32",
    "ready": "32",
    "joining": "33",
    "loading": "33",
    "full": "33",
    "offline": "31",
    "broken": "31",
    "unavailable": "31",
}
_BOLD, _DIM, _RED = "1", "2", "31"

Column = tuple[str, Callable[[ServerRow], str]]


def draw(state: SwarmState, width: int, *, has_colors: bool) -> str:
    """All models of ``state``, in lines of at most ``width`` columns, if these are 80 or more."""
    if not state.model_reports:
        return "The swarm serves no model."
    paint = _colored if has_colors else _plain
    parts = ["\n".join(_model(report, width, paint)) for report in state.model_reports]
    if any(report.server_rows for report in state.model_reports):
        parts.append(paint("# online   + loads its blocks   - does not answer, or has left", _DIM))
    return "\n\n".join(parts)


def _model(report: ModelReport, width: int, paint: _Paint) -> Iterator[str]:
    name = _clean(report.display_name)
    if report.key != report.display_name:
        name += f" ({_clean(report.key)})"
    yield paint(name, _BOLD)
    status = _clean(report.status)
    state = textwrap.fill(", ".join(filter(None, (status, spare_sentence(report)))), width)
    yield paint(status, _STATE_COLORS.get(status, "")) + state[len(status) :]
    if not report.num_blocks:
        return
    online = sum(row.state == "online" for row in report.server_rows)
    facts = [_count(report.num_blocks, "block"), f"{_count(online, 'server')} online"]
    if report.age_seconds is not None:
        facts.append(f"seen {report.age_seconds:.0f} s ago")
    yield ", ".join(facts)
    yield ""
    yield from _table(report, width, paint)
    if report.join_command:  # not wrapped: it is for copying
        yield ""
        yield f"Add a machine: {_clean(report.join_command)}"


def _table(report: ModelReport, width: int, paint: _Paint) -> Iterator[str]:
    rows = report.server_rows
    before = [_Text("server", _label), _Text("blocks", lambda row: f"{row.span.start}:{row.span.end}")]
    after = [
        _Text("state", lambda row: row.state),
        _Text("ping", _ping, is_number=True),
        _Text("room", lambda row: _tokens(row.cache_tokens_left), is_number=True),
    ]
    for text in (*before, *after):
        text.fit(rows)
    left = width - len(_INDENT) - sum(len(_GAP) + text.width for text in (*before, *after))
    cells = max(min(report.num_blocks, LARGEST_MAP, left), min(report.num_blocks, SMALLEST_MAP))
    left -= cells
    for title, content in _DETAILS:
        detail = _Text(title, content)
        detail.fit(rows)
        if any(map(content, rows)) and detail.width + len(_GAP) <= left:
            after.append(detail)
            left -= detail.width + len(_GAP)
    cells += max(0, min(left, LARGEST_MAP - cells)) if cells < report.num_blocks else 0
    block_map = _BlockMap(report, min(cells, report.num_blocks))

    titles = [*(text.titled() for text in before), block_map.scale(), *(text.titled() for text in after)]
    yield paint(f"{_INDENT}{_GAP.join(titles)}".rstrip(), _DIM)
    for row in rows:
        color = _STATE_COLORS.get(row.state, "")
        texts = [text.of(row) for text in before]
        texts.append(_pad(paint(block_map.line(row), color), block_map.width - block_map.cells))
        texts += [paint(text.of(row), color if text.title == "state" else "") for text in after]
        yield f"{_INDENT}{_GAP.join(texts)}".rstrip()
    lead = sum(text.width for text in before) + len(_GAP) * (len(before) - 1)
    counts = "".join(paint(digit, _RED if digit == "0" else "") for digit in block_map.counts())
    yield f"{_INDENT}{'servers per block':>{lead}}{_GAP}{counts}"


class _Text:
    """A column of text, as wide as its widest content."""

    def __init__(self, title: str, content: Callable[[ServerRow], str], *, is_number: bool = False) -> None:
        self.title = title
        self.width = len(title)
        self._content = content
        self._is_number = is_number

    def fit(self, rows: Sequence[ServerRow]) -> None:
        self.width = max([len(self.title), *(_columns(self._content(row)) for row in rows)])

    def titled(self) -> str:
        return self._padded(self.title)

    def of(self, row: ServerRow) -> str:
        return self._padded(self._content(row))

    def _padded(self, text: str) -> str:
        padding = self.width - _columns(text)
        return " " * padding + text if self._is_number else _pad(text, padding)


class _BlockMap:
    """The column with a cell for each block, or for some blocks each where there is not enough room."""

    def __init__(self, report: ModelReport, cells: int) -> None:
        self.cells = cells
        self._rows = report.server_rows
        self._missing = set(report.missing_blocks)
        edges = [report.num_blocks * cell // cells for cell in range(cells + 1)]
        self._cells = [range(first, end) for first, end in pairwise(edges)]
        self._last_block = str(report.num_blocks - 1)

    @property
    def width(self) -> int:
        """Columns; the numbers of the first and the last block may need more than the cells."""
        return max(self.cells, len(self.scale()))

    def scale(self) -> str:
        """The first block's number above the first cell, the last one's above the last."""
        if self._last_block == "0":
            return "0"
        return "0" + " " * max(1, self.cells - 1 - len(self._last_block)) + self._last_block

    def line(self, row: ServerRow) -> str:
        """A server's row."""
        mark = _MARKS.get(row.state, "?")
        span = range(row.span.start, row.span.end)
        return "".join(mark if _overlap(cell, span) else "." for cell in self._cells)

    def counts(self) -> Iterator[str]:
        """For each cell, how many servers hold the rarest of its blocks; "+" = more than 9."""
        online = [range(row.span.start, row.span.end) for row in self._rows if row.state == "online"]
        for cell in self._cells:
            count = min(sum(block in span for span in online) for block in cell)
            if not self._missing.isdisjoint(cell):
                count = 0
            yield str(count) if count <= 9 else "+"


def _label(row: ServerRow) -> str:
    name = _clean(row.public_name or "")
    while _columns(name) > MAX_NAME_COLUMNS:
        name = name[:-1]
    return f"{_clean(row.short_peer_id)} {name}".rstrip()


def _ping(row: ServerRow) -> str:
    return "-" if row.ping_seconds is None else f"{max(1, round(1000 * row.ping_seconds))} ms"


def _precision(row: ServerRow) -> str:
    is_quantized = row.quant_type not in (None, "none")
    return _clean("/".join(filter(None, (row.torch_dtype, row.quant_type if is_quantized else None))))


def _rate(row: ServerRow) -> str:
    return "" if row.throughput is None else f"{row.throughput:.4g} tokens/s"


def _link(row: ServerRow) -> str:
    return "" if row.using_relay is None else ("relay" if row.using_relay else "direct")


_DETAILS: Sequence[Column] = (
    ("precision", _precision),
    ("rate", _rate),
    ("link", _link),
    ("adapters", lambda row: _clean(", ".join(row.adapters))),
    ("version", lambda row: _clean(row.version or "")),
)
"""Columns for which there is not room everywhere, the most telling first."""


def _tokens(count: int | None) -> str:
    if count is None:
        return "-"
    return str(count) if count < 10**6 else f"{count / 10**6:.4g} M"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _overlap(one: range, other: range) -> bool:
    return one.start < other.stop and other.start < one.stop


def _clean(text: str) -> str:
    """Without control characters, line breaks, and what turns the direction of writing."""
    return "".join(character for character in text if character.isprintable())


def _columns(text: str) -> int:
    """Columns that a terminal uses for the text."""
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def _pad(text: str, columns: int) -> str:
    return text + " " * max(0, columns)


_Paint = Callable[[str, str], str]


def _plain(text: str, color: str) -> str:
    return text


def _colored(text: str, color: str) -> str:
    return f"\N{ESCAPE}[{color}m{text}\N{ESCAPE}[0m" if color else text
