"""Which devices a container may open, as the device cgroup's rules say it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_RULE: Final = re.compile(r"([abc])\s+(\d{1,7}|\*):(\d{1,7}|\*)\s+([rwm]{1,3})", re.ASCII)


@dataclass(frozen=True, slots=True)
class DeviceRule:
    """One rule that allows.

    Attributes:
        type: `c` character devices, `b` block devices, `a` both.
        major, minor: numbers; None: all.
        access: of `r` read, `w` write, `m` mknod.
    """

    type: str
    major: int | None
    minor: int | None
    access: str


def parse_device_rule(text: str) -> DeviceRule:
    """Read `TYPE MAJOR:MINOR ACCESS`, e.g. `c 10:200 rwm` or `b *:* m`.

    Source: the kernel's cgroup-v1/devices.rst.

    Raises:
        ValueError: says what would be right.
    """
    match = _RULE.fullmatch(text.strip())
    if match is None or len(set(match[4])) != len(match[4]):
        raise ValueError(f"{text!r} is not 'TYPE MAJOR:MINOR ACCESS' such as 'c 10:200 rwm' or 'b *:* r'")
    if match[1] == "a" and (match[2], match[3]) != ("*", "*"):
        raise ValueError(f"{text!r}: type a is for all devices, *:*")
    major, minor = (None if number == "*" else int(number) for number in match.group(2, 3))
    return DeviceRule(match[1], major, minor, "".join(sorted(match[4], key="rwm".index)))
