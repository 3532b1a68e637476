"""Times between messages and values."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp


def duration_to_pb(span: timedelta) -> Duration:
    """A Duration of the same length, exact to the microsecond."""
    message = Duration()
    message.FromTimedelta(span)
    return message


def moment(stamp: Timestamp, present: bool) -> datetime | None:
    """A Timestamp as a moment in UTC; None if it is not there."""
    return stamp.ToDatetime(tzinfo=UTC) if present else None
