"""Stop sequences are found wherever the pieces are cut."""

import pytest

from petals_chat.generation.stopping import StopMatcher


def first_end(stop_sequences: list[str], pieces: list[str]) -> int | None:
    """How many characters of the whole text come up to the end of the stop sequence."""
    matcher = StopMatcher(stop_sequences)
    before = 0
    for piece in pieces:
        end = matcher.add(piece)
        if end is not None:
            return before + end
        before += len(piece)
    return None


TEXT = "Human: hi\nAssistant: 你好 ### more"


@pytest.mark.parametrize("stop", ["###", "\nAssistant:", "好 #", "H", "more"])
def test_a_stop_sequence_is_found_at_every_split(stop: str) -> None:
    end = TEXT.index(stop) + len(stop)
    for first in range(len(TEXT) + 1):
        for second in range(first, len(TEXT) + 1):
            assert first_end([stop], [TEXT[:first], TEXT[first:second], TEXT[second:]]) == end
    assert first_end([stop], list(TEXT)) == end


def test_the_first_of_several_ends_the_text() -> None:
    assert first_end(["more", "###", "</s>"], list(TEXT)) == TEXT.index("###") + 3
    assert first_end(["more", "###"], [TEXT]) == TEXT.index("###") + 3


def test_nearly_a_stop_sequence_is_none() -> None:
    assert first_end(["###"], list("## # ## #")) is None
    assert first_end([], list(TEXT)) is None


def test_overlapping_beginnings_are_not_missed() -> None:
    assert first_end(["aab"], list("aaab")) == 4


def test_an_empty_stop_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher(["###", ""])
