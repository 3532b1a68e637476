"""How calls of the gRPC door end, for the metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from grpc import StatusCode

from garden_py.api.grpc.status import code_of
from garden_py.model.errors import GardenError
from garden_py.observe.metrics import Metrics

log = structlog.get_logger()


class Outcome:
    """One call under way."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.code = StatusCode.OK
        self.answered_after_s: float | None = None

    @property
    def took_ms(self) -> float:
        """Since its begin."""
        return round((time.monotonic() - self._started) * 1000, 2)

    def answered(self) -> None:
        """The caller is given its answer, or one of them; the first counts."""
        if self.answered_after_s is None:
            self.answered_after_s = time.monotonic() - self._started

    def failed(self, error: Exception) -> None:
        """It ends with this error."""
        self.code = code_of(error) if isinstance(error, GardenError) else StatusCode.INTERNAL


@contextmanager
def counted(metrics: Metrics, method: str) -> Iterator[Outcome]:
    """The length of one call, counted at its end.

    Args:
        metrics: to count in.
        method: its short name, e.g. Ping.
    """
    outcome = Outcome()
    try:
        yield outcome
    except (asyncio.CancelledError, GeneratorExit) as error:  # the caller has left
        outcome.code = StatusCode.CANCELLED
        if isinstance(error, asyncio.CancelledError):  # a stream that is closed later is so by nobody's call
            log.debug("rpc.left", method=method, took_ms=outcome.took_ms)
        raise
    finally:
        metrics.grpc_calls.labels(method, outcome.code.name).inc()
        if outcome.code is StatusCode.OK and outcome.answered_after_s is not None:
            metrics.grpc_seconds.labels(method).observe(outcome.answered_after_s)
