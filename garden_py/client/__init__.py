"""The Python client: `GardenClient` (blocking) and `AsyncGardenClient`.

Reading order: `values` (what is asked and answered), `calls` (every RPC as a value), `follow` (how output is
resumed without loss), then one of the two faces, `sync` or `aio`, which perform the calls.
"""

from typing import TYPE_CHECKING

from garden_py.client.address import BadAddress, Tls
from garden_py.client.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    GardenError,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    ProcessFailed,
    ResourceExhausted,
    ServerFault,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    UnsafeArchive,
)
from garden_py.client.image_values import (
    ImageConfig,
    ImageInfo,
    ImageLayer,
    Pruned,
    PullProgress,
    RegistryAuth,
    UsedImage,
)
from garden_py.client.retry import RetryPolicy
from garden_py.client.sync.client import GardenClient
from garden_py.client.sync.container import Container
from garden_py.client.sync.process import Process
from garden_py.client.values import (
    AgentInfo,
    BindMount,
    Capacity,
    ContainerInfo,
    ContainerMetrics,
    ContainerSpec,
    ContainerState,
    Destination,
    DiskScope,
    EgressAction,
    EgressCause,
    EgressDecision,
    EgressPolicy,
    EgressProtocol,
    EgressRule,
    Event,
    EventKind,
    ExitStatus,
    IcmpMatch,
    Leak,
    LeakDirection,
    LeakKind,
    Limits,
    MountMode,
    MountOrigin,
    NetworkMode,
    Output,
    OutputChunk,
    PortMapping,
    PortProtocol,
    PortRange,
    ProcessInfo,
    ProcessSpec,
    Sidecar,
    Stream,
    Tty,
)

if TYPE_CHECKING:
    from garden_py.client.aio.client import AsyncGardenClient
    from garden_py.client.aio.container import AsyncContainer
    from garden_py.client.aio.process import AsyncProcess

__all__ = [
    "Aborted",
    "AgentInfo",
    "AlreadyExists",
    "AsyncContainer",
    "AsyncGardenClient",
    "AsyncProcess",
    "BadAddress",
    "BindMount",
    "Cancelled",
    "Capacity",
    "Container",
    "ContainerInfo",
    "ContainerMetrics",
    "ContainerSpec",
    "ContainerState",
    "DataLoss",
    "DeadlineExceeded",
    "Destination",
    "DiskScope",
    "EgressAction",
    "EgressCause",
    "EgressDecision",
    "EgressPolicy",
    "EgressProtocol",
    "EgressRule",
    "Event",
    "EventKind",
    "ExitStatus",
    "FailedPrecondition",
    "FieldViolation",
    "GardenClient",
    "GardenError",
    "IcmpMatch",
    "ImageConfig",
    "ImageInfo",
    "ImageLayer",
    "InvalidArgument",
    "Leak",
    "LeakDirection",
    "LeakKind",
    "Limits",
    "MountMode",
    "MountOrigin",
    "NetworkMode",
    "NotFound",
    "OutOfRange",
    "Output",
    "OutputChunk",
    "PermissionDenied",
    "PortMapping",
    "PortProtocol",
    "PortRange",
    "Process",
    "ProcessFailed",
    "ProcessInfo",
    "ProcessSpec",
    "Pruned",
    "PullProgress",
    "RegistryAuth",
    "ResourceExhausted",
    "RetryPolicy",
    "ServerFault",
    "Sidecar",
    "Stream",
    "Tls",
    "Tty",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "UnsafeArchive",
    "UsedImage",
]


def __getattr__(name: str) -> object:
    # The command line is blocking and starts often; it does not pay for the other face (PEP 562).
    if name == "AsyncGardenClient":
        from garden_py.client.aio.client import AsyncGardenClient

        return AsyncGardenClient
    if name == "AsyncContainer":
        from garden_py.client.aio.container import AsyncContainer

        return AsyncContainer
    if name == "AsyncProcess":
        from garden_py.client.aio.process import AsyncProcess

        return AsyncProcess
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
