"""What Alembic runs to migrate: with the connection that the caller has opened, in the caller's transaction."""

from __future__ import annotations

from alembic import context

from petals_chat.history.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
