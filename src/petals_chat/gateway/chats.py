"""The chats of the page's visitors, over HTTP. What is kept, and how, is `petals_chat.history`'s affair.

A visitor is known by a cookie (`petals_chat.gateway.visitors`). Whatever is another visitor's is not there.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar
from urllib.parse import quote

import msgspec
from fastapi import APIRouter, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from petals_chat.errors import (
    ForeignOriginError,
    HistoryDisabledError,
    InvalidParameterError,
    UnknownChatError,
)
from petals_chat.gateway.answers import Answers
from petals_chat.gateway.deadlines import deadline
from petals_chat.gateway.origins import is_foreign_origin
from petals_chat.gateway.parameters import Id, Text
from petals_chat.gateway.request_body import read_body
from petals_chat.gateway.visitors import VisitorCookie, visitor_of
from petals_chat.history.exchange import from_json, to_json, to_markdown
from petals_chat.history.interface import MAX_NAME_CHARS, MAX_TITLE_CHARS, Chat, Message
from petals_chat.settings import HistorySettings, LimitSettings

if TYPE_CHECKING:  # it brings the database's libraries, which a gateway without history does not need
    from petals_chat.history.store import ChatStore

MAX_IMPORT_BYTES = 16 * 1024 * 1024
MAX_IMPORT_MESSAGES = 10_000
"""Messages in one file, those of all its chats together; one chat may always have what the settings allow."""
DEFAULT_PAGE = 50
MAX_PAGE = 200
MAX_QUERY_CHARS = 200
MAX_SYSTEM_CHARS = 100_000

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_FILE_NAME = re.compile(r"[^\w -]+")
_ALL_METHODS = ["GET", "POST", "PATCH", "DELETE"]


def _refuse_nul(text: str) -> str:
    # PostgreSQL cannot keep it.
    if "\0" in text:
        raise ValueError("it may not have the character U+0000")
    return text


_Text = Annotated[Text, AfterValidator(_refuse_nul)]
_Title = Annotated[_Text, Field(max_length=MAX_TITLE_CHARS)]
_Model = Annotated[_Text, Field(max_length=MAX_NAME_CHARS)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class ChatOptions(_Body):
    """How a chat's answers are generated; what is not given is as the model has it."""

    system: Annotated[_Text, Field(max_length=MAX_SYSTEM_CHARS)] | None = None
    """What the model is told before the first message."""
    do_sample: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


class NewChat(_Body):
    """A chat to be made."""

    id: Id
    """A UUID of the client's choice. If there is one already, nothing changes."""
    title: _Title
    model: _Model | None = None
    settings: ChatOptions = ChatOptions()


class ChatChanges(_Body):
    """What shall be otherwise."""

    title: _Title = ""
    pinned: bool = False
    model: _Model | None = None
    settings: ChatOptions = ChatOptions()
    current: Id | None = None
    """The last message of the branch that is shown."""


class NewMessage(_Body):
    """What the visitor writes."""

    id: Id
    """A UUID of the client's choice. If there is this message already, nothing changes."""
    parent: Id | None = None
    """The message before it; those with the same one are branches."""
    content: Annotated[_Text, Field(min_length=1)]


class Chats:
    """The endpoints.

    Args:
        store: None if no history is kept.
        answers: stopped if their chats are deleted.
    """

    def __init__(
        self,
        store: ChatStore | None,
        answers: Answers,
        settings: HistorySettings,
        limits: LimitSettings,
    ) -> None:
        self._chats = store
        self._answers = answers
        self._settings = settings
        self._limits = limits
        self._importing = asyncio.Lock()

    def router(self) -> APIRouter:
        """The routes, with their documentation."""
        router = APIRouter(prefix="/api", tags=["Chats"])
        router.add_api_route("/history", self.describe_history)
        if self._chats is None:
            for path in ("/chats", "/chats/{rest:path}", "/shared/{rest:path}"):
                router.add_api_route(path, _disabled, methods=_ALL_METHODS, include_in_schema=False)
            return router
        add = router.add_api_route
        add("/chats", self.list_chats)
        add("/chats", self.create_chat, methods=["POST"], openapi_extra=_body(NewChat))
        add("/chats", self.delete_chats, methods=["DELETE"])
        add("/chats/import", self.import_chats, methods=["POST"])
        add("/chats/{chat_id}", self.read_chat)
        add("/chats/{chat_id}", self.change_chat, methods=["PATCH"], openapi_extra=_body(ChatChanges))
        add("/chats/{chat_id}", self.delete_chat, methods=["DELETE"])
        add("/chats/{chat_id}/messages", self.add_message, methods=["POST"], openapi_extra=_body(NewMessage))
        add("/chats/{chat_id}/export", self.export_chat)
        add("/chats/{chat_id}/share", self.share_chat, methods=["POST"])
        add("/chats/{chat_id}/share", self.unshare_chat, methods=["DELETE"])
        add("/shared/{token}", self.read_shared)
        return router

    async def describe_history(self, request: Request) -> Response:
        """Say whether chats are kept here, and for how long. Gives the cookie by which a visitor is known."""
        if self._chats is None:
            return _json({"enabled": False, "expire_days": None})
        response = _json({"enabled": True, "expire_days": self._settings.expire_days})
        if not is_foreign_origin(request):
            VisitorCookie(request).set_on(response)
        return response

    async def list_chats(
        self,
        request: Request,
        query: Annotated[
            str, Query(max_length=MAX_QUERY_CHARS, description="What a title or message has.")
        ] = "",
        cursor: Annotated[
            str | None, Query(max_length=100, description="`next` of the reply before.")
        ] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="How many at most.")] = DEFAULT_PAGE,
    ) -> Response:
        """List the visitor's chats: the pinned ones first, then the newest."""
        visitor = visitor_of(request)
        if visitor is None:
            return _json({"chats": [], "next": None})
        chats, more = await self._store.list_chats(visitor, query=query.strip(), cursor=cursor, limit=limit)
        return _json({"chats": chats, "next": more})

    async def create_chat(self, request: Request) -> Response:
        """Make a chat."""
        cookie = _writer_with_cookie(request)
        new = await self._read(request, NewChat)
        chat = await self._store.create_chat(
            cookie.visitor, new.id, title=new.title, model=new.model, settings=_given(new.settings)
        )
        response = _json(chat)
        cookie.set_on(response)
        return response

    async def read_chat(self, request: Request, chat_id: str) -> Response:
        """Read a chat with all its messages, the oldest first."""
        chat, messages = await self._store.read_chat(_visitor(request), chat_id)
        return _json({**msgspec.structs.asdict(chat), "messages": list(map(self._answers.latest, messages))})

    async def change_chat(self, request: Request, chat_id: str) -> Response:
        """Change a chat's title, model, settings, whether it is pinned, or which branch is shown."""
        visitor = _writer(request)
        changes = await self._read(request, ChatChanges)
        values: dict[str, Any] = {name: getattr(changes, name) for name in changes.model_fields_set}
        if "settings" in values:
            values["settings"] = _given(changes.settings)
        return _json(await self._store.change_chat(visitor, chat_id, values))

    async def delete_chat(self, request: Request, chat_id: str) -> Response:
        """Delete a chat for good. Its link leads nowhere then, and an answer that is being written is stopped."""
        self._stop(await self._store.delete_chat(_writer(request), chat_id))
        return _json({"ok": True})

    async def delete_chats(self, request: Request) -> Response:
        """Delete all chats of the visitor for good."""
        if is_foreign_origin(request):
            raise ForeignOriginError
        if (visitor := visitor_of(request)) is not None:
            self._stop(await self._store.delete_chats(visitor))
        return _json({"ok": True})

    async def add_message(self, request: Request, chat_id: str) -> Response:
        """Add what the visitor writes. Answers are added by way of the WebSocket API."""
        visitor = _writer(request)
        new = await self._read(request, NewMessage)
        return _json(
            await self._store.add_message(visitor, chat_id, new.id, parent=new.parent, content=new.content)
        )

    async def export_chat(
        self,
        request: Request,
        chat_id: str,
        format: Annotated[  # noqa: A002 - the name in the query string
            Literal["json", "markdown"], Query(description="JSON can be imported again.")
        ] = "json",
    ) -> Response:
        """Download a chat."""
        chat, messages = await self._store.read_chat(_visitor(request), chat_id)
        body: bytes | str
        if format == "json":
            body, kind, suffix = to_json(chat, messages), "application/json", "json"
        else:
            body, kind, suffix = to_markdown(chat, messages), "text/markdown", "md"
        return Response(body, media_type=kind, headers={**_HEADERS, **_download(chat.title, suffix)})

    async def import_chats(self, request: Request) -> Response:
        """Add the chats of a file that was exported as JSON, under new ids.

        Nothing is added of a file that is refused. If the server's room ends in the middle, the chats before that stay.
        """
        cookie = _writer_with_cookie(request)
        body = await self._body(request, MAX_IMPORT_BYTES)
        async with self._importing:  # a large file takes a second of a processor, and much memory
            imported = await asyncio.to_thread(self._read_file, body)
            response = _json({"chats": await self._store.import_chats(cookie.visitor, imported)})
        cookie.set_on(response)
        return response

    async def share_chat(self, request: Request, chat_id: str) -> Response:
        """Make a copy of what the chat shows now, which whoever has the token can read."""
        return _json({"token": await self._store.share(_writer(request), chat_id)})

    async def unshare_chat(self, request: Request, chat_id: str) -> Response:
        """Take the copy away again."""
        await self._store.unshare(_writer(request), chat_id)
        return _json({"ok": True})

    async def read_shared(self, token: str) -> Response:
        """Read a copy that somebody has shared."""
        return _json(await self._store.read_shared(token))

    @property
    def _store(self) -> ChatStore:
        assert self._chats is not None
        return self._chats

    def _read_file(self, body: bytes) -> list[tuple[Chat, list[Message]]]:
        max_messages = self._settings.max_chat_messages
        file = from_json(
            body,
            max_chats=self._settings.max_chats,
            max_chat_messages=max_messages,
            max_messages=max(MAX_IMPORT_MESSAGES, max_messages),
        )
        return [(_with_valid_settings(chat), messages) for chat, messages in file]

    def _stop(self, generations: Iterable[str]) -> None:
        for generation in generations:
            self._answers.stop_if_running(generation)

    async def _read(self, request: Request, kind: type[BodyT]) -> BodyT:
        return _validate(kind, await self._body(request, self._limits.max_message_bytes))

    async def _body(self, request: Request, max_bytes: int) -> bytes:
        try:
            async with deadline(self._limits.request_timeout_seconds):
                return await read_body(request, max_bytes)
        except ClientDisconnect:
            raise InvalidParameterError("body", "it broke off") from None


BodyT = TypeVar("BodyT", bound=_Body)


async def _disabled(request: Request) -> Response:
    raise HistoryDisabledError


def _visitor(request: Request) -> str:
    """Who asks.

    Raises:
        UnknownChatError: nobody known, who therefore has no chats.
    """
    visitor = visitor_of(request)
    if visitor is None:
        raise UnknownChatError
    return visitor


def _writer(request: Request) -> str:
    """Who asks for a change.

    Raises:
        ForeignOriginError: the page of another site does.
        UnknownChatError: nobody known.
    """
    if is_foreign_origin(request):
        raise ForeignOriginError
    return _visitor(request)


def _writer_with_cookie(request: Request) -> VisitorCookie:
    """Who asks for a change, with a new cookie if there is none.

    Raises:
        ForeignOriginError: the page of another site asks.
    """
    if is_foreign_origin(request):
        raise ForeignOriginError
    return VisitorCookie(request)


def _validate(kind: type[BodyT], body: bytes | dict[str, Any]) -> BodyT:
    """The parameters in a JSON body.

    Raises:
        InvalidParameterError: with the parameter's name, and what is wrong with it.
    """
    try:
        if isinstance(body, bytes):
            return kind.model_validate_json(body, strict=True)
        return kind.model_validate(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidParameterError(name or "body", first["msg"]) from None


def _with_valid_settings(chat: Chat) -> Chat:
    return msgspec.structs.replace(chat, settings=_given(_validate(ChatOptions, chat.settings)))


def _given(options: ChatOptions) -> dict[str, Any]:
    return options.model_dump(exclude_unset=True)


def _download(title: str, suffix: str) -> dict[str, str]:
    """The header that names the file; the name in ASCII is for clients that know no other (RFC 6266)."""
    name = " ".join(_FILE_NAME.sub(" ", title).split())[:80] or "chat"
    plain = name.encode("ascii", "ignore").decode().strip() or "chat"
    names = f"filename=\"{plain}.{suffix}\"; filename*=UTF-8''{quote(name)}.{suffix}"
    return {"Content-Disposition": f"attachment; {names}"}


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": kind.model_json_schema()}}}}


def _json(reply: object) -> Response:
    return Response(msgspec.json.encode(reply), media_type="application/json", headers=_HEADERS)
