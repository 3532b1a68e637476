"""The Linux backend: real containers by the OCI runtime, the agent, cgroups, nftables and overlayfs."""

from __future__ import annotations

from garden_py.backend.linux.backend import open_linux_backend

__all__ = ["open_linux_backend"]
