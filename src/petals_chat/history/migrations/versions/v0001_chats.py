"""Chats, their messages, and what of them is shared."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "chats",
        sa.Column("pk", _KEY, nullable=False),
        sa.Column("visitor", sa.String(64), nullable=False),
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("model", sa.String(200)),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("current", sa.String(36)),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("pk", name="pk_chats"),
    )
    op.create_index("ux_chats_visitor_id", "chats", ["visitor", "id"], unique=True)
    op.create_index("ix_chats_visitor_order", "chats", ["visitor", "pinned", "updated_at", "pk"])
    op.create_index("ix_chats_updated_at", "chats", ["updated_at"])

    op.create_table(
        "messages",
        sa.Column("pk", _KEY, nullable=False),
        sa.Column("chat_pk", _KEY, nullable=False),
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("parent", sa.String(36)),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("model", sa.String(200)),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("error", sa.String(200)),
        sa.Column("generation", sa.String(64)),
        sa.Column("finish_reason", sa.String(16)),
        sa.Column("tokens", sa.Integer()),
        sa.Column("seconds", sa.Double()),
        sa.Column("first_token_seconds", sa.Double()),
        sa.PrimaryKeyConstraint("pk", name="pk_messages"),
        sa.ForeignKeyConstraint(
            ["chat_pk"], ["chats.pk"], name="fk_messages_chat_pk_chats", ondelete="CASCADE"
        ),
    )
    op.create_index("ux_messages_chat_pk_id", "messages", ["chat_pk", "id"], unique=True)
    answering = sa.text("state = 'answering'")
    op.create_index(
        "ix_messages_answering", "messages", ["state"], sqlite_where=answering, postgresql_where=answering
    )

    op.create_table(
        "shares",
        sa.Column("pk", _KEY, nullable=False),
        sa.Column("chat_pk", _KEY, nullable=False),
        sa.Column("token", sa.String(64), nullable=False),
        sa.Column("title", sa.String(200), nullable=False),
        sa.Column("model", sa.String(200)),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("messages", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("pk", name="pk_shares"),
        sa.ForeignKeyConstraint(
            ["chat_pk"], ["chats.pk"], name="fk_shares_chat_pk_chats", ondelete="CASCADE"
        ),
    )
    op.create_index("ux_shares_chat_pk", "shares", ["chat_pk"], unique=True)
    op.create_index("ux_shares_token", "shares", ["token"], unique=True)
