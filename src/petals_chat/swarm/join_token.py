"""Join tokens: how a host of a private swarm tells other machines where it is, in one word that can be copied.

A token is ``pcj1.`` and the URL-safe base64 of these bytes, the checksum last:

    digest of the swarm's record   8 bytes, see `petals_chat.swarm.record`
    name of the swarm              length (1 byte), UTF-8
    addresses                      for each: length (1 byte), parts; a part is a code (1 byte) and its value
    CRC-32 of all before           4 bytes, big-endian

The name is the prefix of the blocks' names in the DHT. Addresses are libp2p multiaddresses; packed, they take half
the room of their text. A token is no secret that protects a swarm: who reaches a member's port can join without one.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import ipaddress
import re
import zlib
from collections.abc import Iterator, Sequence

import base58

from petals_chat.errors import ConfigurationError
from petals_chat.swarm.naming import is_peer_id

FORMAT = "pcj1."
DIGEST_BYTES = 8
MAX_ADDRESSES = 8
MAX_TOKEN_CHARS = 2048
MAX_NAME_BYTES = 255

_CHECKSUM_BYTES = 4
_NAME = re.compile(r"[^.\s\x00-\x1f\x7f]+")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_CODES = {
    "ip4": 4,
    "ip6": 41,
    "dns": 53,
    "dns4": 54,
    "dns6": 55,
    "tcp": 6,
    "udp": 17,
    "p2p": 165,
    "p2p-circuit": 34,
}
_PROTOCOLS = {code: protocol for protocol, code in _CODES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class JoinToken:
    """What a machine must know to join a private swarm."""

    name: str
    """Prefix of the names of the model's blocks in the swarm's DHT."""
    digest: bytes
    """Of the record in which the swarm says what it serves; no member can pass off another one."""
    peers: tuple[str, ...]
    """Multiaddresses of members."""


def encode_token(token: JoinToken) -> str:
    """The token as text.

    Raises:
        ConfigurationError: an address cannot be put into a token, or the name is too long.
    """
    if len(token.digest) != DIGEST_BYTES or not 0 < len(token.peers) <= MAX_ADDRESSES:
        raise ValueError(f"{len(token.digest)} bytes of digest, {len(token.peers)} addresses")
    name = token.name.encode()
    if len(name) > MAX_NAME_BYTES or not _NAME.fullmatch(token.name):
        raise ConfigurationError(f"{token.name!r} cannot be the name of a swarm")
    body = bytearray(token.digest) + _with_length(name)
    for address in token.peers:
        body += _with_length(b"".join(_packed_parts(address)))
    body += zlib.crc32(body).to_bytes(_CHECKSUM_BYTES)
    return FORMAT + base64.urlsafe_b64encode(body).rstrip(b"=").decode()


def decode_token(text: str) -> JoinToken:
    """The token that was copied as ``text``; spaces and line breaks that slipped in do not matter.

    Raises:
        ConfigurationError: it is no join token, or a damaged one, or one of a later version.
    """
    text = "".join(text.split())
    if not text.startswith(FORMAT):
        if re.match(r"pcj\d+\.", text):
            raise ConfigurationError(
                f"the join token is of the kind {text.split('.')[0]}, which this version does not know: "
                "install the version of Petals Chat that the other machine has"
            )
        raise ConfigurationError(
            f"this is no join token: it does not begin with {FORMAT!r}. Copy all of what `petals-chat host` "
            "printed on a machine of the swarm"
        )
    if len(text) > MAX_TOKEN_CHARS:
        raise ConfigurationError(f"the join token is longer than {MAX_TOKEN_CHARS} characters: it is none")
    body = _checked(text.removeprefix(FORMAT))
    try:
        return _parse(body)
    except (ValueError, LookupError):
        raise ConfigurationError(
            "the join token is intact, but has parts that this version does not know: install the version of "
            "Petals Chat that the other machine has"
        ) from None


def join_command(token: str, *, needs_directory: bool) -> str:
    """What is typed on another machine that joins.

    Args:
        needs_directory: the model is a directory, of which the other machine must have a copy.
    """
    return f"petals-chat host {'DIRECTORY ' if needs_directory else ''}--join {token}"


def is_address(text: str) -> bool:
    """Whether ``text`` is the multiaddress of a peer that a token can hold."""
    try:
        packed = b"".join(_packed_parts(text))
    except ConfigurationError:
        return False
    return "/p2p/" in text and len(packed) <= 255


def _checked(text: str) -> bytes:
    """The bytes of a token without their checksum."""
    damaged = ConfigurationError(
        "the join token is damaged: a part is missing or changed. Copy all of it again"
    )
    try:
        body = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise damaged from None
    content, checksum = body[:-_CHECKSUM_BYTES], body[-_CHECKSUM_BYTES:]
    if zlib.crc32(content).to_bytes(_CHECKSUM_BYTES) != checksum:
        raise damaged
    return content


def _parse(body: bytes) -> JoinToken:
    digest, rest = body[:DIGEST_BYTES], body[DIGEST_BYTES:]
    name, *addresses = _split(rest)
    token = JoinToken(name.decode(), digest, tuple(map(_unpacked, addresses)))
    if not _NAME.fullmatch(token.name) or not 0 < len(token.peers) <= MAX_ADDRESSES:
        raise ValueError("name or number of addresses")
    if not all(map(is_address, token.peers)):
        raise ValueError("an address")
    return token


def _with_length(data: bytes) -> bytes:
    if len(data) > 255:
        raise ConfigurationError(f"a part of the join token would have {len(data)} bytes; it may have 255")
    return bytes([len(data)]) + data


def _split(data: bytes) -> Iterator[bytes]:
    """The parts that `_with_length` has put together. Raises `ValueError` if the last one is cut off."""
    while data:
        length = data[0]
        if len(data) <= length:
            raise ValueError("cut off")
        yield data[1 : 1 + length]
        data = data[1 + length :]


def _packed_parts(address: str) -> Iterator[bytes]:
    words = iter(address.split("/")[1:])
    try:
        if not address.startswith("/"):
            raise ValueError
        for protocol in words:
            value = b"" if protocol == "p2p-circuit" else _packed_value(protocol, next(words))
            yield bytes([_CODES[protocol]]) + value
    except (ValueError, LookupError, StopIteration):
        raise ConfigurationError(f"{address!r} is not like /ip4/192.0.2.1/tcp/31337/p2p/QmPeer") from None


def _packed_value(protocol: str, value: str) -> bytes:
    match protocol:
        case "ip4":
            return ipaddress.IPv4Address(value).packed
        case "ip6":
            return ipaddress.IPv6Address(value).packed
        case "tcp" | "udp":
            if not re.fullmatch(r"[0-9]{1,5}", value) or not 0 < int(value) <= 65535:
                raise ValueError(value)
            return int(value).to_bytes(2)
        case "p2p":
            if not is_peer_id(value):
                raise ValueError(value)
            return _with_length(base58.b58decode(value))
        case "dns" | "dns4" | "dns6":
            if not _HOST_NAME.fullmatch(value):
                raise ValueError(value)
            return _with_length(value.encode())
    raise LookupError(protocol)


def _unpacked(data: bytes) -> str:
    text = ""
    while data:
        protocol, data = _PROTOCOLS[data[0]], data[1:]
        length = {"ip4": 4, "ip6": 16, "tcp": 2, "udp": 2, "p2p-circuit": 0}.get(protocol)
        if length is None:
            length, data = data[0], data[1:]
        if len(data) < length:
            raise ValueError("cut off")
        value, data = data[:length], data[length:]
        text += f"/{protocol}"
        if protocol != "p2p-circuit":
            text += f"/{_unpacked_value(protocol, value)}"
    return text


def _unpacked_value(protocol: str, value: bytes) -> str:
    match protocol:
        case "ip4" | "ip6":
            return str(ipaddress.ip_address(value))
        case "tcp" | "udp":
            return str(int.from_bytes(value))
        case "p2p":
            return base58.b58encode(value).decode()
        case _:
            return value.decode("ascii")


def shortened(addresses: Sequence[str], limit: int) -> tuple[str, ...]:
    """At most ``limit`` of a host's addresses, those that other machines may reach first.

    Addresses of this machine alone count only where there is no other.
    """
    usable = [address for address in addresses if is_address(address)]
    abroad = [address for address in usable if not is_loopback(address)]
    return tuple((abroad or usable)[:limit])


def is_loopback(address: str) -> bool:
    """Whether the multiaddress leads back to the machine that uses it."""
    return address.startswith(("/ip4/127.", "/ip6/::1/"))
