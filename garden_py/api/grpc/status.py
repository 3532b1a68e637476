"""Errors as gRPC statuses with google.rpc details, in one table.

Source: google/rpc/error_details.proto; the codes' meanings are in proto/garden/v1/garden.proto.
"""

from __future__ import annotations

from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc import Status, StatusCode
from grpc_status import rpc_status

from garden_py.model import errors

DOMAIN = "garden.v1"
# As it travels in the header grpc-message. A client refuses some answers with more than 8 KiB of headers, and all with
# more than 16 (GRPC_ARG_MAX_METADATA_SIZE); the text is there up to three times: as message, and twice in the details.
_TEXT_MAX = 2048

CODES: dict[type[errors.GardenError], StatusCode] = {
    errors.InvalidRequest: StatusCode.INVALID_ARGUMENT,
    errors.ContainerNotFound: StatusCode.NOT_FOUND,
    errors.HandleInUse: StatusCode.ALREADY_EXISTS,
    errors.ContainerBusy: StatusCode.FAILED_PRECONDITION,
    errors.ContainerBroken: StatusCode.FAILED_PRECONDITION,
    errors.Unkillable: StatusCode.UNAVAILABLE,
    errors.NoLink: StatusCode.FAILED_PRECONDITION,
    errors.PoolExhausted: StatusCode.RESOURCE_EXHAUSTED,
    errors.TaskLimitReached: StatusCode.RESOURCE_EXHAUSTED,
    errors.PrivilegedDisabled: StatusCode.PERMISSION_DENIED,
    errors.PortInUse: StatusCode.ALREADY_EXISTS,
    errors.ProcessNotFound: StatusCode.NOT_FOUND,
    errors.ProcessIdInUse: StatusCode.ALREADY_EXISTS,
    errors.ExecutableNotFound: StatusCode.NOT_FOUND,
    errors.NotExecutable: StatusCode.FAILED_PRECONDITION,
    errors.UserNotFound: StatusCode.NOT_FOUND,
    errors.ProcessStartFailed: StatusCode.FAILED_PRECONDITION,
    errors.ProcessExited: StatusCode.FAILED_PRECONDITION,
    errors.ProcessNotLimited: StatusCode.FAILED_PRECONDITION,
    errors.ProcessNotCounted: StatusCode.FAILED_PRECONDITION,
    errors.StdinClosed: StatusCode.FAILED_PRECONDITION,
    errors.NoTty: StatusCode.FAILED_PRECONDITION,
    errors.OffsetOutOfRange: StatusCode.OUT_OF_RANGE,
    errors.LimitRefused: StatusCode.FAILED_PRECONDITION,
    errors.OffsetUnknown: StatusCode.FAILED_PRECONDITION,
    errors.EtagMismatch: StatusCode.ABORTED,
    errors.CopyFailed: StatusCode.FAILED_PRECONDITION,
    errors.BeingDestroyed: StatusCode.ABORTED,
    errors.PropertyNotFound: StatusCode.NOT_FOUND,
    errors.NotSupported: StatusCode.UNIMPLEMENTED,
    errors.HostFault: StatusCode.INTERNAL,
    errors.ImageUnknown: StatusCode.NOT_FOUND,
    errors.ImageInUse: StatusCode.FAILED_PRECONDITION,
    errors.ImageAccessDenied: StatusCode.PERMISSION_DENIED,
    errors.ImageUnreachable: StatusCode.UNAVAILABLE,
    errors.ImageInvalid: StatusCode.FAILED_PRECONDITION,
    errors.ImageTooLarge: StatusCode.RESOURCE_EXHAUSTED,
    errors.ContainerRecovering: StatusCode.UNAVAILABLE,
    errors.ShuttingDown: StatusCode.UNAVAILABLE,
}

_COPY_CODES = {
    "no_such_path": StatusCode.NOT_FOUND,
    "permission_denied": StatusCode.PERMISSION_DENIED,
    "broken_archive": StatusCode.INVALID_ARGUMENT,
    "no_space": StatusCode.RESOURCE_EXHAUSTED,
}


def code_of(error: errors.GardenError) -> StatusCode:
    """The gRPC code of an error: its class's, or that of the nearest class above."""
    if isinstance(error, errors.CopyFailed):
        return _COPY_CODES.get(error.reason, CODES[errors.CopyFailed])
    return next((CODES[c] for c in type(error).__mro__ if c in CODES), StatusCode.INTERNAL)


def status_of(error: errors.GardenError) -> Status:
    """The whole status of an error, details included."""
    code = code_of(error)
    proto = status_pb2.Status(code=code.value[0], message=_cut(str(error)))
    for detail in _details(error):
        packed = any_pb2.Any()
        packed.Pack(detail)
        proto.details.append(packed)
    return rpc_status.to_status(proto)


def _cut(text: str) -> str:
    """What of a text there is room for; it may be the words of a program of somebody else's.

    Source: gRPC over HTTP2, "Percent-Encoded".
    """
    left = _TEXT_MAX
    for i, character in enumerate(text):
        left -= 1 if " " <= character <= "~" and character != "%" else 3 * len(character.encode())
        if left < 0:
            return f"{text[:i]}..."
    return text


def _details(
    error: errors.GardenError,
) -> list[
    error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.QuotaFailure
    | error_details_pb2.ResourceInfo
]:
    info = error_details_pb2.ErrorInfo(reason=error.code.upper(), domain=DOMAIN)
    for name, value in vars(error).items():
        if isinstance(value, str | int) and name != "problem":
            info.metadata[name] = _cut(str(value))
    found: list[
        error_details_pb2.ErrorInfo
        | error_details_pb2.BadRequest
        | error_details_pb2.QuotaFailure
        | error_details_pb2.ResourceInfo
    ] = [info]
    match error:
        case errors.InvalidRequest():
            bad = error_details_pb2.BadRequest()
            for violation in error.violations:
                bad.field_violations.add(field=violation.field, description=violation.problem)
            found.append(bad)
        case errors.PoolExhausted():
            quota = error_details_pb2.QuotaFailure()
            quota.violations.add(
                subject=error.pool,
                description=f"size {error.size}" + (error.flag and f", set by {error.flag}"),
            )
            found.append(quota)
        case errors.TaskLimitReached():
            quota = error_details_pb2.QuotaFailure()
            quota.violations.add(subject="limits.pids", description=f"{error.tasks} of {error.limit} in use")
            found.append(quota)
        case errors.ContainerNotFound() | errors.HandleInUse():
            found.append(
                error_details_pb2.ResourceInfo(resource_type="container", resource_name=error.handle)
            )
        case errors.ProcessNotFound() | errors.ProcessIdInUse():
            name = f"{error.handle}/{error.process_id}"
            found.append(error_details_pb2.ResourceInfo(resource_type="process", resource_name=name))
        case errors.ImageUnknown() | errors.ImageInUse():
            found.append(error_details_pb2.ResourceInfo(resource_type="image", resource_name=error.image))
        case errors.PortInUse():
            found.append(
                error_details_pb2.ResourceInfo(
                    resource_type="host port", resource_name=str(error.port), owner=error.holder
                )
            )
    return found
