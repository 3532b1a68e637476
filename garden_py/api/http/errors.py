"""Errors of the service as the Garden protocol tells them, in one table. Source: §1.3, statements 22 to 26."""

from __future__ import annotations

from dataclasses import dataclass

from garden_py.api.http.exchange import BodyTooLarge, BrokenBody
from garden_py.api.http.fields import BadJson
from garden_py.model import errors

_IMAGE_STEP = "running image plugin create"  # as the reference begins such messages (statement M11)


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A status and the five keys of an error object."""

    status: int
    type: str = ""
    message: str = ""
    handle: str = ""
    process_id: str = ""

    def as_json(self) -> dict[str, str]:
        """All keys, always; `Binary` is never filled."""
        return {
            "Type": self.type,
            "Message": self.message,
            "Handle": self.handle,
            "ProcessID": self.process_id,
            "Binary": "",
        }


def describe(error: Exception) -> ErrorReply:
    """What a client is told of a failed call; what is not among these classes is our bug, and told as one."""
    match error:
        case errors.ContainerNotFound():
            return ErrorReply(404, "ContainerNotFoundError", str(error), handle=error.handle)
        case errors.ProcessNotFound():
            return ErrorReply(404, "ProcessNotFoundError", str(error), process_id=error.process_id)
        case errors.ExecutableNotFound():
            return ErrorReply(500, "ExecutableNotFoundError", str(error))
        case errors.ShuttingDown() | errors.ContainerRecovering():
            return ErrorReply(500, "ServiceUnavailableError", str(error))
        case errors.ImageNotFound():
            return ErrorReply(500, "", f"{_IMAGE_STEP}: {error.problem}")
        case (
            errors.ImageUnknown()
            | errors.ImageAccessDenied()
            | errors.ImageUnreachable()
            | errors.ImageInvalid()
            | errors.ImageTooLarge()
        ):
            return ErrorReply(500, "", f"{_IMAGE_STEP}: {error}")
        case errors.GardenError() | BadJson() | BodyTooLarge() | BrokenBody():
            return ErrorReply(500, "", str(error))
        case _:
            return ErrorReply(500, "", f"internal error of the server: {type(error).__name__}")
