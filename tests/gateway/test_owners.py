"""Whose requests these are, by the addresses that they come from."""

from __future__ import annotations

import pytest
from starlette.requests import HTTPConnection

from petals_chat.engine.interface import client_of
from petals_chat.gateway.owners import KEY_OWNER, owner_among, owner_of


def connection_from(address: str, **scope: str) -> HTTPConnection:
    return HTTPConnection({"type": "http", "client": (address, 50000), **scope})


@pytest.mark.parametrize(
    ("first", "second", "are_one"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_addresses_of_one_network_are_one_owner(first: str, second: str, are_one: bool) -> None:
    owners = [owner_of(connection_from(address)) for address in (first, second)]
    assert (owners[0] == owners[1]) is are_one


def test_visitors_are_owners_and_not_clients() -> None:
    owners = [owner_of(connection_from(address)) for address in ("2001:db8::1", "2001:db8::2")]
    visitors = [owner_among(owner, visitor) for owner, visitor in zip(owners, "ab", strict=True)]
    assert visitors[0] != visitors[1]
    assert client_of(visitors[0]) == client_of(visitors[1]) == owners[0]


def test_whose_key_it_is_counts_more_than_the_address() -> None:
    assert owner_of(connection_from("2001:db8::1", **{KEY_OWNER: "key:ada"})) == "key:ada"
