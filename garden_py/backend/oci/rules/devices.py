"""Which devices processes may open, beyond those that every container has."""

from __future__ import annotations

from typing import Any

from garden_py.backend.oci.data import RuncConfigData
from garden_py.backend.oci.facts import HostFacts
from garden_py.backend.oci.request import BundleRequest
from garden_py.model.device import DeviceRule


def apply(config: dict[str, Any], request: BundleRequest, facts: HostFacts, data: RuncConfigData) -> None:
    """Add the server's rules; one about the same devices as a rule of the base configuration replaces it.

    Source: OCI runtime-spec, config-linux.md, "Allowed Device list"; Garden statement DV3.
    """
    allowed = config["linux"]["resources"]["devices"]
    for rule in request.device_rules:
        entry = _entry(rule)
        allowed[:] = [each for each in allowed if not each["allow"] or _devices(each) != _devices(entry)]
        allowed.append(entry)


def _entry(rule: DeviceRule) -> dict[str, Any]:
    found: dict[str, Any] = {"allow": True, "type": rule.type, "access": rule.access}
    for name, number in (("major", rule.major), ("minor", rule.minor)):
        if number is not None:
            found[name] = number
    return found


def _devices(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(name) for name in ("type", "major", "minor"))
