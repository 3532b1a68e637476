"""How a container is walled off: decided when it is made, and kept with it for what is started in it later."""

from __future__ import annotations

from dataclasses import dataclass

from garden_py.backend.host.idmap import IdMap, map_root_apart, range_of
from garden_py.config import UIDS_PER_CONTAINER, Config


@dataclass(frozen=True, slots=True)
class Isolation:
    """Settings of the server as they were when a container was made; a privileged one has none of the walls.

    Attributes:
        id_base: first host id of its range; None: no range of its own, but the mapping that all share, or none at all.
        as_reference: no stricter than the Garden reference (`--compat garden`).
        no_new_privileges: nothing in it may gain privileges.
        apparmor: profile of its processes; empty: none.
    """

    privileged: bool
    id_base: int | None = None
    as_reference: bool = False
    no_new_privileges: bool = False
    apparmor: str = ""

    def id_map(self, highest_id: int) -> IdMap | None:
        """Its mapping of ids; None without a user namespace."""
        if self.privileged:
            return None
        return (
            map_root_apart(highest_id) if self.id_base is None else range_of(self.id_base, UIDS_PER_CONTAINER)
        )


def choose_isolation(config: Config, *, privileged: bool, id_base: int | None) -> Isolation:
    """What the settings say of a container that is made now."""
    return Isolation(
        privileged,
        id_base,
        as_reference=config.compat == "garden",
        no_new_privileges=config.no_new_privileges and not privileged,
        apparmor="" if privileged else config.apparmor,
    )
