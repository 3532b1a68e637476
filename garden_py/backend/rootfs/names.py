"""The files that make names work in a container: hosts, resolv.conf, hostname. Pure."""

from __future__ import annotations


def build_hosts(
    container_ip: str, container_ipv6: str, hostname: str, additional: tuple[str, ...] = ()
) -> str:
    """Content of /etc/hosts.

    Args:
        container_ip: empty: it has none.
        container_ipv6: likewise.
        hostname: of the container.
        additional: lines as they are.

    Source: Garden behaviour, statement N30.
    """
    lines = ["127.0.0.1 localhost"]
    if container_ipv6:
        lines.append("::1 localhost")
    lines += [f"{address} {hostname}" for address in (container_ip, container_ipv6) if address]
    lines += additional
    return "\n".join(lines) + "\n"


def build_resolv_conf(
    host_text: str,
    dns_servers: tuple[str, ...],
    gateway: str,
    additional: tuple[str, ...] = (),
    *,
    of_plugin: tuple[str, ...] = (),
    search: tuple[str, ...] = (),
) -> str:
    """Content of /etc/resolv.conf.

    Args:
        host_text: the host's own file.
        dns_servers: the server's setting, which replaces the host's name servers.
        gateway: used when the host asks only itself, since its loopback is not the container's; empty: there is none.
        additional: name servers after all others.
        of_plugin: name servers that a network plugin has told, which replace all others.
        search: domains that one has told, which replace the host's.

    Source: Garden behaviour, statement N31; resolv.conf(5).
    """
    more = [f"nameserver {server}" for server in additional]
    lines = [line for line in host_text.splitlines() if line.strip()]
    if of_plugin:
        lines, more = [f"nameserver {server}" for server in of_plugin], []
    elif dns_servers:
        lines = [f"nameserver {server}" for server in dns_servers]
    elif len(lines) == 1 and _is_the_hosts_own(lines[0]):
        lines = [f"nameserver {gateway}"] if gateway else []
    else:
        lines = [line for line in lines if not _is_the_hosts_own(line)]
    if search:
        lines = [f"search {' '.join(search)}", *(line for line in lines if line.split()[0] != "search")]
    return "".join(f"{line}\n" for line in (*lines, *more))


def _is_the_hosts_own(line: str) -> bool:
    """A name server on the host's loopback, or link-local: a container's packets do not get there."""
    words = line.split()
    if len(words) < 2 or words[0] != "nameserver":
        return False
    return words[1].startswith("127.") or words[1] == "::1" or words[1].lower().startswith("fe80:")
