"""What is in the server's table, as plain text, one word list per thing. Pure.

member gdn3fa1-7 10.254.0.7            a container's link may send with this address
portmap tcp 61001 10.254.0.7 8080      a host port leads to a container's port
egress 10.254.0.7 egress_7             a privileged container's traffic is judged by this chain

Elements of IPv6 are written alike; they are in sets and maps of their own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from garden_py.backend.net.host_firewall import HOOKED_CHAINS, forget_element, set_of
from garden_py.backend.net.plan import HostPlan


@dataclass(frozen=True, slots=True)
class Survey:
    """What of one server instance is on the host.

    Attributes:
        links: host links with the server's prefix: name to kind.
        anchor: whether the link with the gateway address is there.
        table: whether the table is there.
        elements: of its sets and maps, as in the module's docstring; sorted.
        chains: of the table; sorted.
        in_force: whether the chains of a table that is there, to which packets come by themselves, have rules.
    """

    links: dict[str, str]
    anchor: bool
    table: bool
    elements: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()
    in_force: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values for another process; `from_json` is the inverse."""
        return {**asdict(self), "elements": list(self.elements), "chains": list(self.chains)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Survey:
        """Rebuild from `to_json`."""
        return cls(
            value["links"],
            value["anchor"],
            value["table"],
            tuple(value["elements"]),
            tuple(value["chains"]),
            value["in_force"],
        )


def read_elements(objects: list[dict[str, Any]]) -> tuple[str, ...]:
    """The elements of the table's sets and maps, from a JSON listing (libnftables-json(5))."""
    found: list[str] = []
    for entry in objects:
        container = entry.get("set") or entry.get("map")
        if container is None:
            continue
        for element in container.get("elem", ()):
            match container["name"]:
                case "members" | "members6":
                    found.append(f"member {_words(element)}")
                case "portmap" | "portmap6":
                    found.append(f"portmap {_words(element[0])} {_words(element[1])}")
                case "egress" | "egress6":
                    found.append(f"egress {element[0]} {element[1]['goto']['target']}")
                case "told":
                    continue  # by the kernel itself, and forgotten by it
                case name:
                    found.append(f"{name} {element}")
    return tuple(sorted(found))


def _words(value: Any) -> str:
    return " ".join(str(part) for part in value["concat"]) if isinstance(value, dict) else str(value)


def read_chains(objects: list[dict[str, Any]]) -> tuple[str, ...]:
    """Names of the chains in a JSON listing."""
    return tuple(sorted(entry["chain"]["name"] for entry in objects if "chain" in entry))


def is_in_force(objects: list[dict[str, Any]]) -> bool:
    """Whether all chains with a hook have rules, in a JSON listing."""
    return {entry["rule"]["chain"] for entry in objects if "rule" in entry}.issuperset(HOOKED_CHAINS)


def compile_forget(host: HostPlan, element: str) -> str:
    """A transaction that removes one such element, present or not.

    Raises:
        ValueError: it is none that the server makes.
    """
    match element.split(" "):
        case ["member", link, address]:
            return _forget(host, "members", address, f'"{link}" . {address}', f'"{link}" . {address}')
        case ["portmap", protocol, host_port, address, port]:
            key = f"{protocol} . {host_port}"
            return _forget(host, "portmap", address, key, f"{key} : {address} . {port}")
        case ["egress", address, chain]:
            return _forget(host, "egress", address, address, f"{address} : goto {chain}")
    raise ValueError(element)


def _forget(host: HostPlan, name: str, address: str, key: str, element: str) -> str:
    return "\n".join(forget_element(host, set_of(name, address), key, element)) + "\n"


def compile_forget_chain(host: HostPlan, chain: str) -> str:
    """A transaction that removes a privileged container's chain, present or not."""
    name = f"inet {host.table} {chain}"
    return f"add chain {name}\nflush chain {name}\ndelete chain {name}\n"
