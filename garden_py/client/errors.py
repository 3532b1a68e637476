"""What can go wrong, as exceptions with the server's facts on them.

One class per gRPC status that the API uses; `code` tells apart what a class holds (`HANDLE_IN_USE`,
`CONTAINER_NOT_FOUND`, …) and is stable across releases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import grpc

# Key of the serialized google.rpc.Status among the trailing metadata.
# Source: grpc.io, "Richer error model"; the suffix -bin marks binary metadata (gRPC over HTTP/2).
_STATUS_DETAILS_KEY: Final = "grpc-status-details-bin"
_REQUEST_ID_KEY: Final = "x-request-id"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One bad field of a request and what would be right."""

    field: str
    problem: str


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """What the `google.rpc` details of a status said."""

    code: str = ""
    metadata: Mapping[str, str] = field(default_factory=lambda: dict[str, str]())
    fields: tuple[FieldViolation, ...] = ()
    quotas: tuple[FieldViolation, ...] = ()
    resource: str = ""
    request_id: str = ""


class GardenError(Exception):
    """A call failed.

    Attributes:
        message: the server's sentence.
        status: name of the gRPC status, e.g. "NOT_FOUND".
        code: the server's stable reason in capitals, e.g. "HANDLE_IN_USE"; empty when the server said none
        (it
            was never reached, or something between answered).
        fields: what is wrong with which field of the request.
        quotas: which pool is exhausted, and what the server says about it.
        metadata: further facts by name, as strings.
        resource: what was not found or was taken.
        request_id: what the call is called in the server's log; empty when no server has answered.
    """

    status: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str, details: ErrorDetails | None = None) -> None:
        super().__init__(message)
        details = details or ErrorDetails()
        self.message = message
        self.code = details.code
        self.request_id = details.request_id
        self.fields = details.fields
        self.quotas = details.quotas
        self.metadata = details.metadata
        self.resource = details.resource


class InvalidArgument(GardenError):
    """A field is bad; `fields` names it; nothing was changed."""

    status = "INVALID_ARGUMENT"


class NotFound(GardenError):
    """No such container or process, or a program or user that the container lacks."""

    status = "NOT_FOUND"


class AlreadyExists(GardenError):
    """A handle, process id or host port is in use."""

    status = "ALREADY_EXISTS"


class ResourceExhausted(GardenError):
    """A pool of the server is empty, or a message is over the size limit."""

    status = "RESOURCE_EXHAUSTED"


class FailedPrecondition(GardenError):
    """The container or process is in a state that does not allow the call."""

    status = "FAILED_PRECONDITION"


class Aborted(GardenError):
    """An etag did not match: read again, then retry."""

    status = "ABORTED"


class OutOfRange(GardenError):
    """The asked-for bytes or events are not kept, or not there yet."""

    status = "OUT_OF_RANGE"

    @property
    def first_offset(self) -> int | None:
        """The first byte still kept, if the server said so."""
        return self._offset("first_offset")

    @property
    def end_offset(self) -> int | None:
        """The offset after the last byte, if the server said so."""
        return self._offset("end_offset")

    def _offset(self, name: str) -> int | None:
        text = self.metadata.get(name, "")
        return int(text) if text.isascii() and text.isdecimal() else None


class Unimplemented(GardenError):
    """This server or host cannot do it; the message says why."""

    status = "UNIMPLEMENTED"


class Unavailable(GardenError):
    """The server cannot be reached or is stopping, or a container cannot be killed yet (code UNKILLABLE)."""

    status = "UNAVAILABLE"


class DeadlineExceeded(GardenError):
    """The call took longer than its time limit. What it asked for may have happened."""

    status = "DEADLINE_EXCEEDED"


class PermissionDenied(GardenError):
    """This caller may not do that, or nobody may on this server (code PRIVILEGED_DISABLED)."""

    status = "PERMISSION_DENIED"


class Unauthenticated(GardenError):
    """The server does not know this caller."""

    status = "UNAUTHENTICATED"


class Cancelled(GardenError):
    """The call was cancelled, here or by the server."""

    status = "CANCELLED"


class DataLoss(GardenError):
    """The server's answers contradict each other, e.g. leave a gap in a stream."""

    status = "DATA_LOSS"


class ServerFault(GardenError):
    """A host step failed, or the server has a bug; its log knows more."""

    status = "INTERNAL"


class ProcessFailed(GardenError):
    """A process that was to succeed did not; raised by this client only (`output(check=True)`)."""

    status = "PROCESS_FAILED"


class UnsafeArchive(GardenError):
    """A tar stream holds a member that would leave the target directory or is no file, directory or link."""

    status = "UNSAFE_ARCHIVE"


_BY_STATUS: Final[dict[str, type[GardenError]]] = {
    error.status: error
    for error in (
        InvalidArgument,
        NotFound,
        AlreadyExists,
        ResourceExhausted,
        FailedPrecondition,
        Aborted,
        OutOfRange,
        Unimplemented,
        Unavailable,
        DeadlineExceeded,
        PermissionDenied,
        Unauthenticated,
        Cancelled,
        DataLoss,
        ServerFault,
    )
}


def error_from_rpc(failure: Any) -> GardenError:
    """The typed exception for a failed call of either gRPC face.

    Args:
        failure: a `grpc.RpcError`; untyped because only its two subclasses (a `grpc.Call`, a
            `grpc.aio.AioRpcError`) have the methods used here.
    """
    return make_error(failure.code(), failure.details(), failure.trailing_metadata())


def make_error(
    code: grpc.StatusCode, message: str | None, trailing: Iterable[tuple[str, str | bytes]] | None
) -> GardenError:
    """The typed exception for a status and its trailing metadata."""
    found = dict(trailing or ())
    packed = found.get(_STATUS_DETAILS_KEY)
    details = _unpack_details(packed) if isinstance(packed, bytes) else ErrorDetails()
    details = replace(details, request_id=str(found.get(_REQUEST_ID_KEY, "")))
    error_class = _BY_STATUS.get(code.name, GardenError)
    return error_class(message or code.name.lower().replace("_", " "), details)


def _unpack_details(packed: bytes) -> ErrorDetails:
    # Imported here: only a failing call needs them, and they cost every start of the command line 20 ms.
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2 as rpc
    from google.rpc import status_pb2

    info, bad, quota, resource = rpc.ErrorInfo(), rpc.BadRequest(), rpc.QuotaFailure(), rpc.ResourceInfo()
    try:
        for detail in status_pb2.Status.FromString(packed).details:
            for message in (info, bad, quota, resource):
                detail.Unpack(message)  # a no-op for a detail of another type
    except DecodeError:
        return ErrorDetails()  # the code and the sentence are still worth raising
    return ErrorDetails(
        code=info.reason,
        metadata=dict(info.metadata),
        fields=tuple(FieldViolation(each.field, each.description) for each in bad.field_violations),
        quotas=tuple(FieldViolation(each.subject, each.description) for each in quota.violations),
        resource=resource.resource_name,
    )
