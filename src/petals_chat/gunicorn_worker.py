"""gunicorn's worker class: ``gunicorn -k petals_chat.gunicorn_worker.Worker 'petals_chat.asgi:create_app()'``.

With it, gunicorn serves under the same uvicorn configuration as ``petals-chat serve``. Where to listen is
gunicorn's affair then. Needs the extra ``gunicorn``.
"""

from __future__ import annotations

from typing import Any

from uvicorn_worker import UvicornWorker

from petals_chat.gateway.server import uvicorn_config
from petals_chat.settings import load_settings


class Worker(UvicornWorker):  # type: ignore[misc]  # which has no type information
    """The one worker process: it runs the gateway, to which the engine's processes belong.

    A second one would load all models again, and would not know the v1 sessions of the first.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.cfg.workers != 1:
            raise SystemExit(
                f"petals-chat: gunicorn has {self.cfg.workers} workers, but each would load all models. Start it "
                "with --workers 1: one serves all users"
            )

    def load_wsgi(self) -> None:
        """Load the application, and configure uvicorn for it."""
        super().load_wsgi()
        config = uvicorn_config(self.wsgi, load_settings())
        config.callback_notify = self.callback_notify  # tells gunicorn that the worker is alive
        config.timeout_notify = self.timeout
        self.config = config
