"""What one client may use: a key's models, and how much in a minute and at once. No I/O.

A client is an API key or, without one, an address. Who it is, is found out elsewhere: here it has a name, the same as
everywhere else (`petals_chat.gateway.owners`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, contextmanager
from itertools import islice

import msgspec

from petals_chat.engine.interface import (
    Chunk,
    Engine,
    EngineSession,
    EngineTokenizer,
    ModelStatus,
    client_of,
)
from petals_chat.errors import (
    ConfigurationError,
    InvalidApiKeyError,
    ModelNotAllowedError,
    RateLimitExceededError,
)
from petals_chat.protocol.messages import GenerationRequest
from petals_chat.settings import ApiKeySettings, ApiSettings

MAX_REMEMBERED_CLIENTS = 10_000
MAX_LOOKED_AT = 100
"""Clients looked at to find one that can be forgotten."""
RETRY_AT_ONCE_SECONDS = 1.0
"""When to try again if generations of one's own have to end first: nobody knows how long they take."""

COUNTED_CHUNK_TOKENS = 16
"""An answer is counted in such pieces, if it does not come in smaller ones: who goes away has used what was generated
by then."""

Clock = Callable[[], float]


class Allowance:
    """So many things a minute: what is used comes back evenly over time, up to a minute's worth."""

    def __init__(self, per_minute: int, clock: Clock) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._left = float(per_minute)
        self._counted_at = clock()

    @property
    def left(self) -> float:
        """How many may be used now; below 0 if more were used than there were."""
        now = self._clock()
        self._left = min(self.per_minute, self._left + (now - self._counted_at) * self.per_minute / 60)
        self._counted_at = now
        return self._left

    def use(self, count: int) -> None:
        """Take so many, even if there are fewer."""
        self._left = self.left - count

    def seconds_until(self, count: float) -> float:
        """When there will be so many."""
        return max(0.0, (count - self.left) * 60 / self.per_minute)


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a client may use; None = without limit."""

    models: Collection[str] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent_generations: int | None


class Client:
    """What a client has used."""

    def __init__(self, limits: Limits, clock: Clock = time.monotonic) -> None:
        self.limits = limits
        self.running = 0
        self._requests = _allowance(limits.requests_per_minute, clock)
        self._tokens = _allowance(limits.tokens_per_minute, clock)

    @contextmanager
    def generation(self) -> Iterator[None]:
        """A generation, as long as the block runs.

        Raises:
            RateLimitExceededError: the client has no room for another one.
        """
        if (wait := self.seconds_until_next) > 0:
            raise self._refusal(wait)
        if self._requests:
            self._requests.use(1)
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1

    def use_tokens(self, count: int) -> None:
        """Note tokens of a prompt or an answer. They are known only afterwards: a debt has to be paid by waiting."""
        if self._tokens:
            self._tokens.use(count)

    def may_use(self, model_key: str) -> bool:
        """Whether the client may use the model."""
        return self.limits.models is None or model_key in self.limits.models

    @property
    def seconds_until_next(self) -> float:
        """How long to wait before the next generation; 0 = it may begin now."""
        waits = [RETRY_AT_ONCE_SECONDS] if self._is_busy else [0.0]
        if self._requests:
            waits.append(self._requests.seconds_until(1))
        if self._tokens and self._tokens.left < 1:
            waits.append(self._tokens.seconds_until(1))
        return max(waits)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What is left, in the headers that the SDKs of OpenAI read."""
        headers = {}
        for name, allowance in (("requests", self._requests), ("tokens", self._tokens)):
            if allowance:
                headers[f"limit-{name}"] = f"{allowance.per_minute}"
                headers[f"remaining-{name}"] = f"{max(0, math.floor(allowance.left))}"
                headers[f"reset-{name}"] = f"{allowance.seconds_until(allowance.per_minute):.3f}s"
        return [(f"x-ratelimit-{name}".encode(), value.encode()) for name, value in headers.items()]

    @property
    def is_limited(self) -> bool:
        """Whether the client can be refused at all."""
        limits = (self._requests, self._tokens, self.limits.concurrent_generations)
        return any(limit is not None for limit in limits)

    @property
    def counts_tokens(self) -> bool:
        """Whether there is a limit of tokens."""
        return self._tokens is not None

    @property
    def is_idle(self) -> bool:
        """Whether it makes no difference if the client is forgotten."""
        allowances = [allowance for allowance in (self._requests, self._tokens) if allowance]
        return not self.running and all(each.left >= each.per_minute for each in allowances)

    @property
    def _is_busy(self) -> bool:
        limit = self.limits.concurrent_generations
        return limit is not None and self.running >= limit

    def _refusal(self, wait: float) -> RateLimitExceededError:
        if self._requests and self._requests.left < 1:
            return RateLimitExceededError(self._requests.per_minute, "requests a minute", wait)
        if self._tokens and self._tokens.left < 1:
            return RateLimitExceededError(self._tokens.per_minute, "tokens a minute", wait)
        return RateLimitExceededError(self.limits.concurrent_generations or 0, "generations at once", wait)


class Clients:
    """All clients.

    Args:
        model_keys: of the served models.

    Raises:
        ConfigurationError: two keys have the same name, or one names a model that is not served.
    """

    def __init__(
        self, settings: ApiSettings, model_keys: Collection[str], clock: Clock = time.monotonic
    ) -> None:
        _check(settings.keys, model_keys)
        self._keys = {_owner(key): key for key in settings.keys}
        self._settings = settings
        self._clock = clock
        self._clients: OrderedDict[str, Client] = OrderedDict()

    @property
    def need_keys(self) -> bool:
        """Whether the APIs are for those with a key."""
        return bool(self._keys)

    def owner_of_key(self, key: str | None) -> str:
        """The name under which the owner of this key is known here.

        Raises:
            InvalidApiKeyError: there is no such key, or none was given.
        """
        if key is None:
            raise InvalidApiKeyError(is_missing=True)
        digest = hash_of(key)
        # All are compared, each in constant time, so that the time tells nothing.
        owners = [owner for owner, each in self._keys.items() if hmac.compare_digest(each.hash, digest)]
        if not owners:
            raise InvalidApiKeyError(is_missing=False)
        return owners[0]

    def of(self, owner: str) -> Client:
        """The client of this name, whichever visitor he is."""
        owner = client_of(owner)
        client = self._clients.get(owner)
        if client is None:
            if len(self._clients) >= MAX_REMEMBERED_CLIENTS:
                self._forget_one()
            client = self._clients[owner] = Client(self._limits(owner), self._clock)
        self._clients.move_to_end(owner)
        return client

    def _limits(self, owner: str) -> Limits:
        common, key = self._settings, self._keys.get(owner)

        def limit(name: str) -> int | None:
            own = getattr(key, name, None)
            return (getattr(common, name) if own is None else own) or None

        return Limits(
            models=key.models if key else None,
            requests_per_minute=limit("requests_per_minute"),
            tokens_per_minute=limit("tokens_per_minute"),
            concurrent_generations=limit("concurrent_generations"),
        )

    def _forget_one(self) -> None:
        """Of the oldest ones the first that is idle; else the oldest one, which then begins anew."""
        oldest = islice(self._clients.items(), MAX_LOOKED_AT)
        idle = (owner for owner, client in oldest if client.is_idle)
        del self._clients[next(idle, next(iter(self._clients)))]


class MeteredEngine:
    """An `Engine` that knows what its clients may use."""

    def __init__(self, engine: Engine, clients: Clients) -> None:
        self._engine = engine
        self._clients = clients

    @property
    def statuses(self) -> Mapping[str, ModelStatus]:
        """See `Engine.statuses`."""
        return self._engine.statuses

    async def open_session(
        self, model_key: str, max_length: int, *, owner: str = "", is_stateless: bool = False
    ) -> EngineSession:
        """See `Engine.open_session`.

        Raises:
            ModelNotAllowedError: the owner's key is not for this model; and what the engine raises.
        """
        client = self._clients.of(owner)
        if not client.may_use(model_key):
            raise ModelNotAllowedError(model_key)
        session = await self._engine.open_session(
            model_key, max_length, owner=owner, is_stateless=is_stateless
        )
        return _MeteredSession(session, client)

    def tokenizer(self, model_key: str) -> EngineTokenizer:
        """See `Engine.tokenizer`."""
        return self._engine.tokenizer(model_key)


class _MeteredSession:
    """An engine's session whose generations count."""

    def __init__(self, session: EngineSession, client: Client) -> None:
        self._session = session
        self._client = client

    @property
    def session_id(self) -> str:
        return self._session.session_id

    @property
    def max_length(self) -> int:
        return self._session.max_length

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        if self._client.counts_tokens:
            request = _in_countable_pieces(request)
        with self._client.generation():
            prompt_tokens = tokens_ahead = 0
            async with aclosing(self._session.generate(request)) as chunks:
                async for chunk in chunks:
                    # With the first chunk that tells them: who leaves before the end has used them as well.
                    new_prompt_tokens = max(0, chunk.prompt_tokens - prompt_tokens)
                    prompt_tokens += new_prompt_tokens
                    new_tokens = chunk.tokens_ahead
                    if chunk.token_count:
                        new_tokens += chunk.token_count - tokens_ahead
                        tokens_ahead = 0
                    tokens_ahead += chunk.tokens_ahead
                    self._client.use_tokens(new_tokens + new_prompt_tokens)
                    if not chunk.tokens_ahead:
                        yield chunk

    async def close(self) -> None:
        await self._session.close()


def _in_countable_pieces(request: GenerationRequest) -> GenerationRequest:
    if request.chunk_tokens is None:
        return msgspec.structs.replace(request, chunk_tokens=COUNTED_CHUNK_TOKENS)
    if request.chunk_tokens > COUNTED_CHUNK_TOKENS:  # each chunk is a reply, so they stay as they are
        return msgspec.structs.replace(request, progress_tokens=COUNTED_CHUNK_TOKENS)
    return request


def hash_of(key: str) -> str:
    """What the configuration has of a key. Keys are long and random, so nothing slower is needed."""
    return f"sha256:{hashlib.sha256(key.encode(errors='surrogatepass')).hexdigest()}"


def _owner(key: ApiKeySettings) -> str:
    return f"key:{key.name}"


def _allowance(per_minute: int | None, clock: Clock) -> Allowance | None:
    return None if per_minute is None else Allowance(per_minute, clock)


def _check(keys: Collection[ApiKeySettings], model_keys: Collection[str]) -> None:
    names = [key.name for key in keys]
    for key in keys:
        if names.count(key.name) > 1:
            raise ConfigurationError(f"api.keys: two keys have the name {key.name!r}")
        for model in key.models or ():
            if model not in model_keys:
                raise ConfigurationError(f"api.keys: {key.name!r} names {model!r}, which is not served")
