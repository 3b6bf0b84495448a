"""The tables of the history. What changes here needs a migration too: a test compares the two.

Rows refer to each other by ``pk``, which never leaves the database. Ids are the clients', unique within their visitor
or chat; so nobody can meet another's.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    text,
)

from petals_chat.history.interface import MAX_NAME_CHARS, MAX_TITLE_CHARS

REVISION = "0001"
"""The migration that makes these tables."""

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    }
)

_Key = BigInteger().with_variant(Integer, "sqlite")  # where only this counts up by itself


def _chat() -> Column[int]:
    return Column("chat_pk", _Key, ForeignKey("chats.pk", ondelete="CASCADE"), nullable=False)


chats = Table(
    "chats",
    metadata,
    Column("pk", _Key, primary_key=True),
    Column("visitor", String(64), nullable=False),  # SHA-256 of the cookie
    Column("id", String(36), nullable=False),
    Column("title", String(MAX_TITLE_CHARS), nullable=False),
    Column("model", String(MAX_NAME_CHARS)),
    Column("pinned", Boolean, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("current", String(36)),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Index("ux_chats_visitor_id", "visitor", "id", unique=True),
    Index("ix_chats_visitor_order", "visitor", "pinned", "updated_at", "pk"),
    Index("ix_chats_updated_at", "updated_at"),
)

messages = Table(
    "messages",
    metadata,
    Column("pk", _Key, primary_key=True),
    _chat(),
    Column("id", String(36), nullable=False),
    Column("parent", String(36)),
    Column("role", String(16), nullable=False),
    Column("content", Text, nullable=False),
    Column("model", String(MAX_NAME_CHARS)),
    Column("created_at", Double, nullable=False),
    Column("state", String(16), nullable=False),
    Column("error", String(MAX_NAME_CHARS)),
    Column("generation", String(64)),
    Column("finish_reason", String(16)),
    Column("tokens", Integer),
    Column("seconds", Double),
    Column("first_token_seconds", Double),
    Index("ux_messages_chat_pk_id", "chat_pk", "id", unique=True),
    Index(
        "ix_messages_answering",
        "state",
        sqlite_where=text("state = 'answering'"),
        postgresql_where=text("state = 'answering'"),
    ),
)

shares = Table(
    "shares",
    metadata,
    Column("pk", _Key, primary_key=True),
    _chat(),
    Column("token", String(64), nullable=False),
    Column("title", String(MAX_TITLE_CHARS), nullable=False),
    Column("model", String(MAX_NAME_CHARS)),
    Column("created_at", Double, nullable=False),
    Column("messages", Text, nullable=False),  # JSON
    Index("ux_shares_chat_pk", "chat_pk", unique=True),
    Index("ux_shares_token", "token", unique=True),
)
