"""Structured logs on stderr: one line per finished operation, JSON for machines or text for a terminal.

Environment values, stdin, tokens and credentials are never logged, by anyone.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from garden_py.observe.recent import RECENT


@contextmanager
def _as_if_absent(name: str) -> Iterator[None]:
    """Let what is imported meanwhile find that a module is not installed. Source: the import system, 5.3.1."""
    kept = sys.modules.pop(name, None)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if kept is not None:
            sys.modules[name] = kept


# structlog imports rich where it is installed, which is a tenth of a server's start, to draw tracebacks that show
# local variables; those hold what is never logged.
with _as_if_absent("rich"):
    import structlog


def configure_logging(level: str, form: str) -> None:
    """Set up structlog for the whole process.

    Args:
        level: debug, info, warning or error.
        form: json, text, or auto (text when stderr is a terminal).
    """
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if text
        else structlog.processors.JSONRenderer()
    )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        RECENT,
    ]
    if not text:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
