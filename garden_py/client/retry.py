"""When to try again after the connection broke, and when to give up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from garden_py.client.errors import GardenError, Unavailable

# The server keeps trying to kill what it could not kill; asking again at once helps nobody.
_FINAL_CODES: Final = frozenset({"UNKILLABLE"})

# A stream that held this long was sound, even if its process had nothing to say.
_STABLE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounded, growing delays between tries to reach the server again.

    Attributes:
        first_delay_s: seconds before the first new try.
        max_delay_s: no delay is longer.
        total_s: all delays together; after that the error is raised. Zero: never try again.
    """

    first_delay_s: float = 0.05
    max_delay_s: float = 1.0
    total_s: float = 30.0

    def delays_s(self) -> Iterator[float]:
        """Seconds to wait before each try; ends when no further try is due."""
        spent, delay = 0.0, self.first_delay_s
        while spent + delay <= self.total_s:
            yield delay
            spent += delay
            delay = min(delay * 2, self.max_delay_s)


class Patience:
    """How much of a RetryPolicy is left since the last sign of life.

    Args:
        policy: how much there is.
        clock_s: a monotonic clock, in seconds.
    """

    def __init__(self, policy: RetryPolicy, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock_s = clock_s
        self._last_break_s = clock_s()
        self.restore()

    def restore(self) -> None:
        """Progress was made: the next break begins from the first delay."""
        self._delays_s = self._policy.delays_s()

    def next_delay_s(self, error: GardenError) -> float:
        """Seconds to wait before trying again.

        Raises:
            GardenError: the given error, because it is not a lost connection or no try is left.
        """
        if not isinstance(error, Unavailable) or error.code in _FINAL_CODES:
            raise error
        now_s = self._clock_s()
        if now_s - self._last_break_s > _STABLE_S:
            self.restore()
        self._last_break_s = now_s
        delay_s = next(self._delays_s, None)
        if delay_s is None:
            raise error
        return delay_s
