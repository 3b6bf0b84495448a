from __future__ import annotations

import base64
import random
import string
import zlib

import pytest

from petals_chat.errors import ConfigurationError
from petals_chat.swarm.join_token import FORMAT, JoinToken, decode_token, encode_token, is_address, shortened

PEER = "12D3KooWDf3X6jWcvvVjk4FmRsxxjNdjVzKbZBtkpph67men6VX4"
RSA_PEER = "QmcXhze98AcgGQDDYna23s4Jho96n8wkwLJv78vxtFNq44"
ADDRESSES = (
    f"/ip4/192.0.2.1/tcp/31337/p2p/{PEER}",
    f"/ip6/2001:db8::1/tcp/1/p2p/{RSA_PEER}",
    f"/dns4/host-1.example.org/tcp/65535/p2p/{PEER}",
    f"/ip4/192.0.2.7/tcp/4001/p2p/{RSA_PEER}/p2p-circuit/p2p/{PEER}",
)
TOKEN = JoinToken("Qwen3-8B", bytes(range(8)), ADDRESSES[:1])


@pytest.mark.parametrize("peers", [*((address,) for address in ADDRESSES), ADDRESSES])
def test_what_is_encoded_comes_back(peers: tuple[str, ...]) -> None:
    token = JoinToken("Qwen3-8B", random.Random(0).randbytes(8), peers)
    assert decode_token(encode_token(token)) == token


def test_a_token_is_short_and_can_be_part_of_a_url_and_a_command() -> None:
    text = encode_token(TOKEN)
    assert len(text) < 120
    assert set(text) <= {*string.ascii_letters, *string.digits, *"-_."}


def test_spaces_and_line_breaks_that_slipped_in_do_not_matter() -> None:
    text = encode_token(TOKEN)
    assert decode_token(f" {text[:30]}\n  {text[30:]} ") == TOKEN


def test_every_changed_or_missing_character_is_noticed() -> None:
    text = encode_token(TOKEN)
    for position in range(len(FORMAT), len(text)):
        other = "A" if text[position] != "A" else "B"
        for damaged in (
            text[:position] + other + text[position + 1 :],
            text[:position] + text[position + 1 :],
        ):
            with pytest.raises(ConfigurationError, match="the join token is damaged"):
                decode_token(damaged)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is no join token"),
        ("/ip4/192.0.2.1/tcp/31337", "this is no join token"),
        ("pcj2." + "A" * 40, "of the kind pcj2, which this version does not know"),
        (FORMAT, "damaged"),
        (FORMAT + "ä" * 20, "damaged"),
        (FORMAT + "A" * 3000, "longer than 2048 characters"),
    ],
)
def test_what_is_no_token_is_refused_with_the_reason(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        decode_token(text)


def signed(body: bytes) -> str:
    return FORMAT + base64.urlsafe_b64encode(body + zlib.crc32(body).to_bytes(4)).decode().rstrip("=")


@pytest.mark.parametrize(
    "body",
    [
        bytes(8),
        bytes(8) + b"\x01a",
        bytes(8) + b"\x03a b\x08" + b"\x04" + bytes(7),
        bytes(8) + b"\x01a\x05\x63abcd",
        bytes(8) + b"\x01a" + 9 * b"\x00",
        bytes(8) + b"\x01\xff" + b"\x01\x22",
        bytes(8) + b"\x01a\x08\x04\x7f\x00\x00\x01\x06\x00\x00",
        bytes(8) + b"\x01a\x0a\x35\x08../../ab",
    ],
)
def test_what_only_a_forger_would_write_is_refused(body: bytes) -> None:
    with pytest.raises(ConfigurationError, match="has parts that this version does not know"):
        decode_token(signed(body))


def test_random_content_is_refused() -> None:
    generator = random.Random(1)
    for _ in range(2000):
        with pytest.raises(ConfigurationError):
            decode_token(signed(bytes(8) + generator.randbytes(generator.randrange(80))))


@pytest.mark.parametrize(
    "address",
    [
        "example.org",
        "/ip4/192.0.2.1/tcp/31337",
        f"/ip4/192.0.2.256/tcp/31337/p2p/{PEER}",
        f"/ip4/192.0.2.1/tcp/0/p2p/{PEER}",
        f"/ip4/192.0.2.1/tcp/65536/p2p/{PEER}",
        f"/ip4/192.0.2.1/tcp/31337/p2p/{PEER[:-9]}!",
        "/ip4/192.0.2.1/tcp/31337/p2p/",
        f"/unix/tmp/socket/p2p/{PEER}",
        f"ip4/192.0.2.1/tcp/31337/p2p/{PEER}",
    ],
)
def test_what_is_no_address_of_a_peer(address: str) -> None:
    assert not is_address(address)


def test_addresses_that_other_machines_may_reach_come_first() -> None:
    local = f"/ip4/127.0.0.1/tcp/1/p2p/{PEER}"
    assert shortened([local, *ADDRESSES], 2) == ADDRESSES[:2]
    assert shortened([local, "/unix/a"], 2) == (local,)
