"""Which models can be asked for, under which names, and from where.

Knows the configured entries alone: not how a model is doing (that is the engine's), nor what it can do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from petals_chat.errors import ConfigurationError, ModelNotPublicError, UnknownModelError
from petals_chat.settings import ModelSettings

_MAX_SHOWN_CHARS = 100


class ModelRegistry:
    """The served models; the first one is the default.

    Raises:
        ConfigurationError: there is no model at all.
    """

    def __init__(self, models: Sequence[ModelSettings]) -> None:
        if not models:
            raise ConfigurationError("models: none is configured, and a server needs at least one")
        self.default = models[0]
        self._models = {model.key: model for model in models}
        self._by_name = {alias: model for model in models for alias in model.aliases} | self._models

    def __iter__(self) -> Iterator[ModelSettings]:
        return iter(self._models.values())

    def has(self, name: str) -> bool:
        """Whether a model goes by this name."""
        return name in self._by_name

    def find(self, name: str | None) -> ModelSettings:
        """The model with this key or alias; the default model for None.

        Raises:
            UnknownModelError: there is no such model.
        """
        if name is None:
            return self.default
        try:
            return self._by_name[name]
        except KeyError:
            raise UnknownModelError(name[:_MAX_SHOWN_CHARS], self._models) from None

    def find_usable(self, name: str | None, *, same_origin: bool) -> ModelSettings:
        """The model, if a request from this origin may use it.

        Raises:
            UnknownModelError: there is no such model.
            ModelNotPublicError: only this server's own page may use it.
        """
        model = self.find(name)
        require_permission(model, same_origin=same_origin)
        return model


def require_permission(model: ModelSettings, *, same_origin: bool) -> None:
    """Raise `ModelNotPublicError` if only this server's own page may use the model, and this is not it."""
    if not model.public_api and not same_origin:
        raise ModelNotPublicError(model.key)
