"""The nft text that `firewall` compiles as messages of nf_tables. Pure; `rule_socket` sends them.

It is what libnftables makes of the same text, without a parser for all of nft(8) and a copy of the ruleset. Only the
statements that an egress policy consists of are known; any other word is an error, never left out. The text stays what
is read and tested: paste it into `nft -f -`.

    text                                            messages
    add table inet garden                           NEWTABLE
    chain output { type filter hook … }             NEWCHAIN
    tcp dport { 80, 443 } counter accept            NEWSET, NEWSETELEM, NEWRULE [meta, cmp, payload, lookup, counter, …]

What a field needs to be there, such as the protocol of a port, is compared before it, as libnftables does (`require`).

Source: nft(8); RFC 791, RFC 8200, RFC 9293, RFC 768, RFC 792, RFC 4443 for the places of fields.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from garden_py.backend.net import nft_messages as m
from garden_py.backend.net.firewall import merge
from garden_py.model.remember import is_short, remembered

_NFPROTO = {"ipv4": b"\x02", "ipv6": b"\x0a"}
_L4PROTO = {
    "tcp": bytes([socket.IPPROTO_TCP]),
    "udp": bytes([socket.IPPROTO_UDP]),
    "icmp": bytes([socket.IPPROTO_ICMP]),
    "icmpv6": bytes([socket.IPPROTO_ICMPV6]),
}
_ETHERTYPES = {"ip6": b"\x86\xdd"}
_PRIORITIES = {"raw": -300, "filter": 0}  # NF_IP_PRI_*
_REJECTS = {"tcp reset": m.REJECT_TCP_RESET, "icmpx admin-prohibited": m.REJECT_ICMPX_ADMIN_PROHIBITED}
_ICMPV6_TYPES = {
    "mld-listener-query": 130, "mld-listener-report": 131, "mld-listener-done": 132, "nd-router-solicit": 133,
    "nd-router-advert": 134, "nd-neighbor-solicit": 135, "nd-neighbor-advert": 136, "nd-redirect": 137,
    "mld2-listener-report": 143,
}  # fmt: skip
_IFNAME_BYTES = 16  # IFNAMSIZ
_WORDS = re.compile(r'"[^"]*"|[^\s"{};]+|[{};]')
_LIMIT = re.compile(r"rate ([0-9]+)/second burst ([0-9]+) packets")


class UnknownText(ValueError):
    """A line of nft that an egress policy does not consist of."""


@dataclass(frozen=True, slots=True)
class Transaction:
    """Messages that the kernel takes as a whole or not at all.

    Attributes:
        batch: what to send, in one piece.
        lines: of the text; message N (its sequence number) is of `lines[N - 1]`, and the last one is acknowledged.
    """

    batch: bytes
    lines: tuple[str, ...]

    def line(self, number: int) -> str:
        """What the message with this number was made from; 0: the transaction as such."""
        return self.lines[number - 1] if number else "the transaction"


def encode(text: str) -> Transaction:
    """What `firewall.compile_container_ruleset` and `host_firewall.compile_host_side_policy` say, as messages.

    Raises:
        UnknownText: naming the line.
    """
    reader = _Reader()
    for line in map(str.strip, text.split("\n")):
        try:
            if line:
                reader.take(line)
        except (LookupError, ValueError, StopIteration, OSError, OverflowError) as error:
            raise UnknownText(f"{line!r}: {error!r}") from error
    return reader.finish()


class _Reader:
    """Reads line by line."""

    def __init__(self) -> None:
        self._messages: list[m.Message] = []
        self._lines: list[str] = []
        self._line = ""
        self._sets = 0
        self._family = self._table = ""  # of the block it is in, and in that:
        self._limit = self._chain = ""
        self._is_new_chain = False

    def take(self, line: str) -> None:
        self._line = line
        if self._is_new_chain:  # with the hook that the next line may state
            self._is_new_chain = False
            hook = line if line.startswith("type ") else ""
            self._put_chain(self._family, self._table, self._chain, hook)
            if hook:
                return
        if line == "}":
            self._close_block()
        elif self._limit:
            body = m.limit_object(self._table, self._limit, *_read_limit(line))
            self._put(m.NEWOBJ, self._family, body)
        elif self._chain:
            self._put_rule(self._family, self._table, self._chain, line)
        elif self._table:
            self._open_block(line)
        else:
            self._command(line)

    def finish(self) -> Transaction:
        if self._table:
            raise UnknownText("a block has no end")
        return Transaction(m.batch(self._messages), tuple(self._lines))

    def _close_block(self) -> None:
        if self._limit or self._chain:
            self._limit = self._chain = ""
        elif self._table:
            self._table = ""
        else:
            raise ValueError("no block ends here")

    def _open_block(self, line: str) -> None:
        match line.split(" "):
            case ["limit", name, "{"]:
                self._limit = name
            case ["chain", name, "{"]:
                self._chain, self._is_new_chain = name, True
            case _:
                raise ValueError("no such block")

    def _command(self, line: str) -> None:
        match line.split(" ", 5):
            case ["table", family, table, "{"]:
                self._family, self._table = family, table
                self._put(m.NEWTABLE, family, m.new_table(table))
            case ["add", "table", family, table]:
                self._put(m.NEWTABLE, family, m.new_table(table))
            case ["delete", "table", family, table]:
                self._put(m.DELTABLE, family, m.table(table))
            case ["add", "chain", family, table, chain]:
                self._put_chain(family, table, chain, "")
            case ["add", "chain", family, table, chain, hook] if hook[0] == "{" and hook[-1] == "}":
                self._put_chain(family, table, chain, hook[1:-1])
            case ["flush", "chain", family, table, chain]:
                self._put(m.DELRULE, family, m.rules_of(table, chain))
            case ["add", "rule", family, table, chain, statements]:
                self._put_rule(family, table, chain, statements)
            case _:
                raise ValueError("no such command")

    def _put(self, kind: int, family: str, body: bytes) -> None:
        self._messages.append(m.Message(kind, m.FAMILIES[family], body))
        self._lines.append(self._line)

    def _put_chain(self, family: str, table: str, name: str, hook: str) -> None:
        self._put(m.NEWCHAIN, family, m.new_chain(table, name, _read_hook(family, hook)))

    def _put_rule(self, family: str, table: str, chain: str, line: str) -> None:
        statements, _, comment = line.partition(" comment ")
        rule = _read_rule(statements)
        expressions = list(rule.expressions)
        for each in rule.sets:
            self._sets += 1
            self._put(m.NEWSET, family, m.new_set(table, each, self._sets))
            for elements in each.elements:
                self._put(m.NEWSETELEM, family, m.set_elements(table, elements, self._sets))
            expressions[each.place] = m.look_up(self._sets)
        self._put(m.NEWRULE, family, m.rule(table, chain, expressions, _unquote(comment) if comment else ""))


@dataclass(frozen=True, slots=True)
class _Key:
    """What is compared.

    Attributes:
        type: see nft_messages.build_set.
        size: bytes.
        read: a value of the text as a number.
    """

    type: int
    size: int
    read: Callable[[str], int]


_Words = Iterator[str]


@dataclass(slots=True)
class _Rule:
    """One rule as far as it has been read."""

    expressions: list[bytes] = field(default_factory=list)
    sets: list[m.AnonymousSet] = field(default_factory=list)
    known: dict[str, bytes] = field(default_factory=dict)

    def add(self, *expressions: bytes) -> None:
        self.expressions += expressions

    def require(self, key: str, value: bytes) -> None:
        """Compare something of the packet that a later expression takes for granted; once."""
        if self.known.get(key) != value:
            self.known[key] = value
            self.add(m.load_meta(key), m.compare(m.EQUAL, value))

    def match(self, base: int, offset: int, key: _Key, words: _Words) -> None:
        """Compare a field of a header with a value, a range, a network, or a set of these."""
        word = next(words)
        if "/" in word:
            self._match_network(base, offset, key, word)
            return
        self.add(m.load_payload(base, offset, key.size))
        if word == "{":
            ranges = merge(_read_range(item, key) for item in _items(words))
            self.sets.append(m.build_set(len(self.expressions), key.type, key.size, ranges))
            self.add(b"")
            return
        start, end = _read_range(word, key)
        if start == end:
            self.add(m.compare(m.EQUAL, start.to_bytes(key.size)))
        else:
            self.add(m.compare(m.AT_LEAST, start.to_bytes(key.size)))
            self.add(m.compare(m.AT_MOST, end.to_bytes(key.size)))

    def _match_network(self, base: int, offset: int, key: _Key, word: str) -> None:
        start, end = _read_range(word, key)
        value, varying = start.to_bytes(key.size), (end - start).bit_length()
        if varying % 8:
            bits = (1 << 8 * key.size) - 1 - (end - start)
            self.add(m.load_payload(base, offset, key.size), m.mask(bits.to_bytes(key.size)))
        else:  # only the bytes that have to be equal
            value = value[: key.size - varying // 8]
            self.add(m.load_payload(base, offset, len(value)))
        self.add(m.compare(m.EQUAL, value))


@remembered(is_short)
def _read_rule(statements: str) -> _Rule:
    """What a rule says, without its comment."""
    rule, words = _Rule(), _split(statements)
    for word in words:
        _STATEMENTS[word](rule, words)
    return rule


# --- statements: each reads its words behind the first


def _address(nfproto: str, offset: int, key: _Key) -> Callable[[_Rule, _Words], None]:
    def read(rule: _Rule, words: _Words) -> None:
        _expect(words, "daddr")
        rule.require("nfproto", _NFPROTO[nfproto])
        rule.match(m.NETWORK_HEADER, offset, key, words)

    return read


def _port(protocol: str) -> Callable[[_Rule, _Words], None]:
    def read(rule: _Rule, words: _Words) -> None:
        _expect(words, "dport")
        rule.require("l4proto", _L4PROTO[protocol])
        rule.match(m.TRANSPORT_HEADER, 2, _PORT, words)

    return read


def _icmp(protocol: str, nfproto: str, key: _Key) -> Callable[[_Rule, _Words], None]:
    def read(rule: _Rule, words: _Words) -> None:
        offset = ("type", "code").index(next(words))
        rule.require("nfproto", _NFPROTO[nfproto])
        rule.require("l4proto", _L4PROTO[protocol])
        rule.match(m.TRANSPORT_HEADER, offset, key, words)

    return read


def _meta(rule: _Rule, words: _Words) -> None:
    match next(words), next(words):
        case "nfproto", value:
            rule.require("nfproto", _NFPROTO[value])
        case "l4proto", value:
            rule.require("l4proto", _L4PROTO[value])
        case "protocol", value:
            rule.add(m.load_meta("protocol"), m.compare(m.EQUAL, _ETHERTYPES[value]))
        case "rtclassid", value:
            rule.add(m.load_meta("rtclassid"), m.compare(m.EQUAL, _own_order(value)))
        case "mark", "set":
            rule.add(m.load_constant(_own_order(next(words))), m.store_meta("mark"))
        case key, value:
            raise ValueError(f"meta {key} {value}")


def _ct(rule: _Rule, words: _Words) -> None:
    match next(words), next(words):
        case "state", value:
            wanted = sum(m.CT_STATES[state] for state in value.split(","))
            rule.add(m.load_ct("state"), m.mask(struct.pack("=I", wanted)), m.compare(m.NOT_EQUAL, bytes(4)))
        case "direction", value:
            rule.add(m.load_ct("direction"), m.compare(m.EQUAL, bytes([m.CT_DIRECTIONS[value]])))
        case "mark", "set":
            rule.add(m.load_constant(_own_order(next(words))), m.store_ct("mark"))
        case "mark", value:
            rule.add(m.load_ct("mark"), m.compare(m.EQUAL, _own_order(value)))
        case key, value:
            raise ValueError(f"ct {key} {value}")


def _link_name(key: str) -> Callable[[_Rule, _Words], None]:
    def read(rule: _Rule, words: _Words) -> None:
        name = _unquote(next(words))
        if "*" in name or len(name) >= _IFNAME_BYTES:
            raise ValueError(name)
        rule.add(m.load_meta(key), m.compare(m.EQUAL, name.encode().ljust(_IFNAME_BYTES, b"\0")))

    return read


def _constant(expression: bytes) -> Callable[[_Rule, _Words], None]:
    return lambda rule, _: rule.add(expression)


def _goto(rule: _Rule, words: _Words) -> None:
    rule.add(m.decide(m.GOTO, next(words)))


def _reject(rule: _Rule, words: _Words) -> None:
    _expect(words, "with")
    rule.add(m.reject(*_REJECTS[f"{next(words)} {next(words)}"]))


def _named_limit(rule: _Rule, words: _Words) -> None:
    _expect(words, "name")
    rule.add(m.use_limit(_unquote(next(words))))


def _log(rule: _Rule, words: _Words) -> None:
    _expect(words, "prefix")
    prefix = _unquote(next(words))
    _expect(words, "group")
    group = int(next(words))
    _expect(words, "snaplen")
    rule.add(m.log(prefix, group, int(next(words))))


def _update(rule: _Rule, words: _Words) -> None:
    """`update @SET { iifname limit rate … }`: a limit for each link."""
    name = next(words).removeprefix("@")
    _expect(words, "{", "iifname", "limit")
    limit = _read_limit(" ".join(islice(words, 5)))
    _expect(words, "}")
    rule.add(m.load_meta("iifname"), m.limit_each(name, *limit))


# --- parts of them


def _items(words: _Words) -> Iterator[str]:
    """What is between braces, the first of which has been read."""
    for word in words:
        if word == "}":
            return
        yield word.removesuffix(",")
    raise ValueError("no end of the set")


def _read_range(item: str, key: _Key) -> tuple[int, int]:
    """First and last of a value, a range or a network."""
    address, slash, prefix = item.partition("/")
    if slash:
        varying, start = 8 * key.size - int(prefix), key.read(address)
        if not 0 <= varying < 8 * key.size or start & (1 << varying) - 1:
            raise ValueError(f"{item} is no network")
        return start, start | (1 << varying) - 1
    first, dash, last = item.partition("-")
    if not dash or item in _ICMPV6_TYPES:  # names that have dashes
        return key.read(item), key.read(item)
    return key.read(first), key.read(last)


def _read_hook(family: str, text: str) -> bytes:
    """`type filter hook output [device "eth0"] priority filter; policy drop;`, or nothing."""
    words = _split(text)
    said = {word: next(words) for word in words if word != ";"}
    if not said:
        return b""
    hook = m.hook(
        said.pop("type"),
        m.HOOKS[family][said.pop("hook")],
        _PRIORITIES[said.pop("priority")],
        {"accept": m.ACCEPT, "drop": m.DROP}[said.pop("policy")],
        _unquote(said.pop("device", '""')),
    )
    if said:
        raise ValueError(f"{said} of a hook")
    return hook


def _read_limit(text: str) -> tuple[int, int]:
    """Packets per second, and how many at once."""
    found = _LIMIT.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no limit")
    return int(found[1]), int(found[2])


def _own_order(word: str) -> bytes:
    """Marks and realms are numbers of this machine's byte order."""
    return struct.pack("=I", int(word, 0))


def _split(text: str) -> _Words:
    return iter(_WORDS.findall(text))


def _unquote(word: str) -> str:
    if len(word) < 2 or word[0] != '"' or word[-1] != '"':
        raise ValueError(f"{word} is not quoted")
    return word[1:-1]


def _expect(words: _Words, *wanted: str) -> None:
    for each in wanted:
        if (word := next(words)) != each:
            raise ValueError(f"{word} instead of {each}")


_IPV4 = _Key(7, 4, lambda text: int.from_bytes(socket.inet_pton(socket.AF_INET, text)))
_IPV6 = _Key(8, 16, lambda text: int.from_bytes(socket.inet_pton(socket.AF_INET6, text)))
_PORT = _Key(13, 2, int)
_ICMP_NUMBER = _Key(12, 1, int)
_ICMPV6_NUMBER = _Key(29, 1, lambda text: _ICMPV6_TYPES.get(text) or int(text))

_STATEMENTS: dict[str, Callable[[_Rule, _Words], None]] = {
    "ip": _address("ipv4", 16, _IPV4),
    "ip6": _address("ipv6", 24, _IPV6),
    "tcp": _port("tcp"),
    "udp": _port("udp"),
    "icmp": _icmp("icmp", "ipv4", _ICMP_NUMBER),
    "icmpv6": _icmp("icmpv6", "ipv6", _ICMPV6_NUMBER),
    "meta": _meta,
    "ct": _ct,
    "iifname": _link_name("iifname"),
    "oifname": _link_name("oifname"),
    "counter": _constant(m.COUNTER),
    "notrack": _constant(m.NOT_TRACKED),
    "limit": _named_limit,
    "log": _log,
    "update": _update,
    "accept": _constant(m.decide(m.ACCEPT)),
    "drop": _constant(m.decide(m.DROP)),
    "goto": _goto,
    "reject": _reject,
}
