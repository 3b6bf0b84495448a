"""Which models can be asked for."""

from __future__ import annotations

import pytest

from petals_chat.errors import ConfigurationError, ModelNotPublicError, UnknownModelError
from petals_chat.gateway.models import ModelRegistry
from tests.gateway.gateways import MODEL, PRIVATE_MODEL

REGISTRY = ModelRegistry([MODEL, PRIVATE_MODEL])


@pytest.mark.parametrize("name", ["org/model", "old/name", None])
def test_a_model_is_found_by_key_and_alias_and_the_first_by_default(name: str | None) -> None:
    assert REGISTRY.find(name) is MODEL


def test_an_unknown_model_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        UnknownModelError, match=r"'no/such' is not served here. Models: org/model, org/private"
    ):
        REGISTRY.find("no/such")


def test_an_endless_name_is_not_repeated_in_full() -> None:
    with pytest.raises(UnknownModelError) as refused:
        REGISTRY.find("x" * 1_000_000)
    assert len(str(refused.value)) < 300


def test_a_key_wins_over_another_models_alias() -> None:
    registry = ModelRegistry([MODEL, PRIVATE_MODEL.model_copy(update={"aliases": ("org/model",)})])
    assert registry.find("org/model") is MODEL


def test_a_model_without_public_api_is_usable_from_the_same_origin_alone() -> None:
    assert REGISTRY.find_usable("org/private", same_origin=True) is PRIVATE_MODEL
    assert REGISTRY.find_usable("org/model", same_origin=False) is MODEL
    with pytest.raises(ModelNotPublicError, match="org/private"):
        REGISTRY.find_usable("org/private", same_origin=False)


def test_a_server_needs_a_model() -> None:
    with pytest.raises(ConfigurationError, match="models: none is configured"):
        ModelRegistry([])
