"""The files that make names work in a container: hosts, resolv.conf, hostname. Pure."""

from __future__ import annotations

LOOPBACK = "127.0.0.1"


def build_hosts(
    container_ip: str, container_ipv6: str, hostname: str, additional: tuple[str, ...] = ()
) -> str:
    """Content of /etc/hosts.

    Args:
        container_ip: empty: it is not known yet. LOOPBACK where there is nothing else.
        container_ipv6: likewise.
        hostname: of the container.
        additional: lines as they are.

    Source: Garden behaviour, statement N30.
    """
    lines = [f"{LOOPBACK} localhost"]
    if container_ipv6:
        lines.append("::1 localhost")
    lines += [f"{address} {hostname}" for address in (container_ip, container_ipv6) if address]
    lines += additional
    return "\n".join(lines) + "\n"


def add_own_name(host_text: str, hostname: str) -> str:
    """Content of /etc/hosts for a container in the host's network: the host's own file, and the container's name."""
    names = (line.partition("#")[0].split()[1:] for line in host_text.splitlines())
    if any(hostname in each for each in names):
        return host_text
    ending = "" if host_text.endswith("\n") or not host_text else "\n"
    return f"{host_text}{ending}{LOOPBACK} {hostname}\n"


def choose_resolv_conf(own: str, upstream: str) -> str:
    """The file that containers' name servers are taken from.

    Where the host asks only itself, the servers that its resolver asks in turn are better: they answer containers, too.

    Args:
        own: text of the host's /etc/resolv.conf.
        upstream: text of systemd-resolved's file with those servers; empty: there is none.

    Source: systemd-resolved.service(8), /ETC/RESOLV.CONF; Docker does the same.
    """
    reachable = [server for server in read_name_servers(upstream) if not _is_the_hosts_own(server)]
    asks_others = any(not _is_the_hosts_own(server) for server in read_name_servers(own))
    return upstream if reachable and not asks_others else own


def asks_only_itself(host_text: str) -> bool:
    """Whether a host has name servers, and all are its own, so that containers are to ask the gateway."""
    servers = read_name_servers(host_text)
    return bool(servers) and all(_is_the_hosts_own(server) for server in servers)


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
        host_text: from choose_resolv_conf. Its comments speak of the host, and are left out.
        dns_servers: the server's setting, which replaces the host's name servers.
        gateway: used when the host asks only itself, since its loopback is not the container's; empty: there is none.
        additional: name servers after all others.
        of_plugin: name servers that a network plugin has told, which replace all others.
        search: domains that one has told, which replace the host's.

    Source: Garden behaviour, statement N31; resolv.conf(5).
    """
    more = [f"nameserver {server}" for server in additional]
    if of_plugin:
        lines, more = [f"nameserver {server}" for server in of_plugin], []
    elif dns_servers:
        lines = [f"nameserver {server}" for server in dns_servers]
    else:
        lines = [f"nameserver {gateway}"] if gateway and asks_only_itself(host_text) else []
        lines += [line for line in _settings(host_text) if not _names_the_host(line)]
    if search:
        lines = [f"search {' '.join(search)}", *(line for line in lines if line.split()[0] != "search")]
    return "".join(f"{line}\n" for line in (*lines, *more))


def find_resolver_problem(
    resolv_conf: str, gateway: str, *, gateway_answers: bool, has_ipv6: bool
) -> tuple[str, str]:
    """Why containers with a resolv.conf find no names, and what helps; both empty: they do, for all that is known.

    Args:
        resolv_conf: from build_resolv_conf.
        gateway: of containers, as in there.
        gateway_answers: whether something on the host listens on its port 53.
        has_ipv6: whether containers do.
    """
    servers = read_name_servers(resolv_conf)
    remedy = "garden server --dns-server ADDRESS"
    if not servers:
        return "the host's resolv.conf names no DNS server", remedy
    asked = [server for server in servers if has_ipv6 or ":" not in server]
    if not asked:
        return "the host's DNS servers have only IPv6 addresses, and containers have no IPv6", remedy
    if gateway_answers or set(asked) != {gateway}:
        return "", ""
    return (
        f"the host asks only itself for names, and nothing listens for containers on {gateway} port 53",
        f"{remedy}, or a resolver on that address (systemd-resolved: DNSStubListenerExtra={gateway})",
    )


def read_name_servers(text: str) -> list[str]:
    """The name servers of a resolv.conf, in its order."""
    found = (line.split() for line in _settings(text))
    return [words[1] for words in found if words[0] == "nameserver" and len(words) > 1]


def _settings(text: str) -> list[str]:
    """The lines that say something: comments begin with ; or #, resolv.conf(5)."""
    return [line for line in text.splitlines() if line.strip() and line.strip()[0] not in "#;"]


def _names_the_host(line: str) -> bool:
    return any(_is_the_hosts_own(server) for server in read_name_servers(line))


def _is_the_hosts_own(server: str) -> bool:
    """On the host's loopback, or link-local: a container's packets do not get there."""
    return server.startswith("127.") or server == "::1" or server.lower().startswith("fe80:")
