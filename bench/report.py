"""Figures from rounds: a table for people, and ratios between contenders."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from measuring import percentile
from rounds import Opening, Round

GATEWAY, STREAM, REFERENCE, BARE = "gateway", "gateway, stream", "reference", "bare loop"
GATEWAY_BESIDE, REFERENCE_BESIDE = "gateway, prompts", "reference, prompts"

_COLUMNS = {
    "case": 12,
    "contender": 20,
    "users": 6,
    "prompt": 7,
    "served": 7,
    "refused": 8,
    "tok/s": 8,
    "first p50": 10,
    "p99 ms": 8,
    "next p50": 9,
    "p99 ms ": 8,
    "CPU ms/tok": 11,
    "host CPU": 9,
    "PSS MB": 7,
}


@dataclasses.dataclass
class Measured:
    """What a contender did under one load."""

    case: str
    contender: str
    users: int
    prompt_tokens: int
    served: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    first_token_seconds: list[float] = dataclasses.field(default_factory=list)
    rounds: list[Round] = dataclasses.field(default_factory=list)
    pss_megabytes: float = 0.0
    """The largest seen."""

    def note_opening(self, opening: Opening) -> None:
        """Users began; where each round has new sessions, the worst round counts."""
        self.served = min(self.served, opening.served) if self.rounds else opening.served
        self.errors += opening.errors
        self.first_token_seconds += opening.first_token_seconds

    def note_round(self, result: Round) -> None:
        self.rounds.append(result)
        self.errors += result.errors

    def note_memory(self, megabytes: float) -> None:
        self.pss_megabytes = max(self.pss_megabytes, megabytes)

    @property
    def tokens(self) -> int:
        return sum(result.tokens for result in self.rounds)

    @property
    def tokens_per_second(self) -> float | None:
        return _quotient(self.tokens, sum(result.seconds for result in self.rounds))

    @property
    def cpu_ms_per_token(self) -> float | None:
        return _quotient(1000 * sum(result.cpu_seconds for result in self.rounds), self.tokens)

    @property
    def host_cpu_ms_per_token(self) -> float | None:
        return _quotient(1000 * sum(result.host_cpu_seconds for result in self.rounds), self.tokens)

    def first_token_ms(self, percent: float) -> float | None:
        return _milliseconds(percentile(self.first_token_seconds, percent))

    def between_tokens_ms(self, percent: float) -> float | None:
        gaps = [gap for result in self.rounds for gap in result.gaps]
        return _milliseconds(percentile(gaps, percent))

    def as_json(self) -> dict[str, object]:
        """The row, and why users were refused."""
        return {
            "case": self.case,
            "contender": self.contender,
            "users": self.users,
            "prompt_tokens": self.prompt_tokens,
            "served": self.served,
            "refused": self.users - self.served,
            "errors": {error: self.errors.count(error) for error in sorted(set(self.errors))},
            "tokens": self.tokens,
            "tokens_per_second": _rounded(self.tokens_per_second),
            "first_token_ms_p50": _rounded(self.first_token_ms(50)),
            "first_token_ms_p99": _rounded(self.first_token_ms(99)),
            "between_tokens_ms_p50": _rounded(self.between_tokens_ms(50)),
            "between_tokens_ms_p99": _rounded(self.between_tokens_ms(99)),
            "cpu_ms_per_token": _rounded(self.cpu_ms_per_token),
            "cpu_ms_per_token_of_rounds": [
                _rounded(_quotient(1000 * result.cpu_seconds, result.tokens)) for result in self.rounds
            ],
            "host_cpu_ms_per_token": _rounded(self.host_cpu_ms_per_token),
            "pss_megabytes": round(self.pss_megabytes),
        }


def print_header() -> None:
    """The first line of the table."""
    print("".join(name.rjust(width) for name, width in _COLUMNS.items()), flush=True)


def print_row(row: Measured) -> None:
    """A line of the table, and below it why users were refused."""
    values = [
        row.case,
        row.contender,
        row.users,
        row.prompt_tokens,
        row.served,
        row.users - row.served,
        _shown(row.tokens_per_second),
        _shown(row.first_token_ms(50)),
        _shown(row.first_token_ms(99)),
        _shown(row.between_tokens_ms(50)),
        _shown(row.between_tokens_ms(99)),
        _shown(row.cpu_ms_per_token, 2),
        _shown(row.host_cpu_ms_per_token, 2),
        round(row.pss_megabytes) or "-",
    ]
    widths = _COLUMNS.values()
    print("".join(str(value).rjust(width) for value, width in zip(values, widths, strict=True)), flush=True)
    for error in sorted(set(row.errors)):
        print(f"{'':8}{row.errors.count(error)} x {error}", flush=True)


def ratios(rows: Sequence[Measured]) -> dict[str, float | None]:
    """The figures that matter most, each with what it should be in its name; None = not measured."""

    def find(case: str, contender: str, users: int, prompt_tokens: int | None = None) -> Measured | None:
        for row in rows:
            same_load = row.users == users and prompt_tokens in (None, row.prompt_tokens)
            if row.case == case and row.contender == contender and same_load:
                return row
        return None

    figures: dict[str, float | None] = {}
    for contender in (GATEWAY, STREAM):
        for users in (1, 4, 16, 32, 64):
            row = find("bundled", contender, users)
            name = f"CPU per token, {contender}, {users} users, bundled model"
            figures[f"{name}: times bare loop"] = _round_ratio(row, find("bundled", BARE, users), _cpu)
            figures[f"{name}: times reference"] = _round_ratio(row, find("bundled", REFERENCE, users), _cpu)
        figures[f"tokens per CPU second, {contender}, 32 users, large model: times reference"] = _round_ratio(
            find("large", contender, 32), find("large", REFERENCE, 32), lambda result: 1 / _cpu(result)
        )
        figures[f"tokens per second, {contender}, 32 users, large model: times reference"] = _round_ratio(
            find("large", contender, 32),
            find("large", REFERENCE, 32),
            lambda result: result.tokens / result.seconds,
        )
        for case in ("bundled", "large"):
            figures[f"time between tokens (p50), {contender}, {case} model: 32 users, times 1 user"] = _over(
                _between(find(case, contender, 32)), _between(find(case, contender, 1))
            )
        short, long = find("long", contender, 1, 100), find("long", contender, 1, 4100)
        figures[f"CPU per token, {contender}: after 4100 tokens, times after 100"] = _over(
            _cpu_of_all(long), _cpu_of_all(short)
        )
    for quiet, disturbed in ((GATEWAY, GATEWAY_BESIDE), (REFERENCE, REFERENCE_BESIDE)):
        for percent in (50, 99):
            figures[f"time between tokens (p{percent}), {quiet}: beside long prompts, times without"] = _over(
                _between(find("interleaved", disturbed, 4), percent),
                _between(find("interleaved", quiet, 4), percent),
            )
    return {name: figure for name, figure in figures.items() if figure is not None}


def print_ratios(figures: dict[str, float | None]) -> None:
    """One line for each."""
    for name, figure in figures.items():
        print(f"{_shown(figure, 2):>8}  {name}")


def _round_ratio(
    one: Measured | None, other: Measured | None, figure: Callable[[Round], float]
) -> float | None:
    """Median of the ratios of rounds that were next to each other in time."""
    if one is None or other is None:
        return None
    pairs = [
        (first, second)
        for first, second in zip(one.rounds, other.rounds, strict=False)
        if all(result.tokens and result.cpu_seconds and result.seconds for result in (first, second))
    ]
    if not pairs:
        return None
    return _rounded(statistics.median(figure(first) / figure(second) for first, second in pairs))


def _cpu(result: Round) -> float:
    return result.cpu_seconds / result.tokens


def _between(row: Measured | None, percent: float = 50) -> float | None:
    return row.between_tokens_ms(percent) if row else None


def _cpu_of_all(row: Measured | None) -> float | None:
    return row.cpu_ms_per_token if row else None


def _over(one: float | None, other: float | None) -> float | None:
    return _rounded(_quotient(one, other)) if one is not None and other is not None else None


def _quotient(one: float, other: float) -> float | None:
    return one / other if other else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
