"""Keeps what people write, and what models answer, out of the log of the server under the gateway.

Our own modules log neither; but uvicorn logs query strings, which in API v1 may be the prompt, and in its
debug mode each frame's text. For a frame that is not UTF-8 it adds a Python traceback, which is left out too.
"""

from __future__ import annotations

import logging


class _NoTexts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(_without_query_string(argument) for argument in record.args)
        if isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], UnicodeDecodeError):
            record.exc_info = None  # the client's fault, and the line says it already
        return record.levelno >= logging.INFO


_no_texts = _NoTexts()


def keep_texts_out_of_uvicorns_log() -> None:
    """Do so from now on, however uvicorn was started and configured."""
    for name in ("uvicorn.access", "uvicorn.error"):
        logging.getLogger(name).addFilter(_no_texts)


def _without_query_string(argument: object) -> object:
    is_path = isinstance(argument, str) and argument.startswith("/")
    return str(argument).partition("?")[0] if is_path else argument
