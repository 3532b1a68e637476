"""What is typed, as names of keys. Pure.

Source: ECMA-48 §5.4 for control sequences, xterm's ctlseqs for the keys' own.
"""

from __future__ import annotations

from typing import Final

UP, DOWN, PAGE_UP, PAGE_DOWN, HOME, END = "up", "down", "page-up", "page-down", "home", "end"
ENTER, ESCAPE, BACKSPACE, INTERRUPT = "enter", "escape", "backspace", "interrupt"

_SEQUENCES: Final = {
    "A": UP, "B": DOWN, "H": HOME, "F": END, "5~": PAGE_UP, "6~": PAGE_DOWN, "1~": HOME, "7~": HOME, "4~": END,
    "8~": END,
}  # fmt: skip
_CONTROLS: Final = {
    "\r": ENTER, "\n": ENTER, "\x7f": BACKSPACE, "\x08": BACKSPACE, "\x03": INTERRUPT, "\x04": INTERRUPT,
}  # fmt: skip


class KeyDecoder:
    """Names of keys from bytes as they come, cut anywhere."""

    def __init__(self) -> None:
        self._held = b""

    @property
    def is_waiting(self) -> bool:
        """Whether an escape is held back that may be a key of its own or the begin of a sequence."""
        return bool(self._held)

    def feed(self, data: bytes) -> list[str]:
        """The keys that are complete now: names as above, or the character that was typed."""
        text, self._held = self._take(self._held + data)
        found = []
        while text:
            if text[0] != "\x1b":
                key = _CONTROLS.get(text[0], text[0])
                found += [key] if key.isprintable() else []
                text = text[1:]
            elif len(text) == 1 or text[1] not in "[O":
                found.append(ESCAPE)
                text = text[1:]
            else:
                end = _end_of_sequence(text)
                if end is None:
                    break
                found += [_SEQUENCES[text[2:end]]] if text[2:end] in _SEQUENCES else []
                text = text[end:]
        return found

    def flush(self) -> list[str]:
        """Nothing came behind it: what is held back was an escape, or is half of something."""
        held, self._held = self._held, b""
        return [ESCAPE] if held == b"\x1b" else []

    def _take(self, data: bytes) -> tuple[str, bytes]:
        """Whole text, and what may be the begin of more: a sequence, or a character of UTF-8."""
        start = data.rfind(b"\x1b")
        if start >= 0 and _may_go_on(data[start:]):
            return data[:start].decode(errors="ignore"), data[start:]
        for cut in range(1, 4):
            if len(data) >= cut and data[-cut] >= 0xC0:  # first byte of a character of two bytes and more
                length = 2 if data[-cut] < 0xE0 else 3 if data[-cut] < 0xF0 else 4
                if length > cut:
                    return data[:-cut].decode(errors="ignore"), data[-cut:]
        return data.decode(errors="ignore"), b""


def _may_go_on(data: bytes) -> bool:
    text = data.decode(errors="ignore")
    return text == "\x1b" or (len(text) < 16 and text[1:2] in "[O" and _end_of_sequence(text) is None)


def _end_of_sequence(text: str) -> int | None:
    """Where a control sequence ends: behind its final byte, 0x40 to 0x7e; None: not yet."""
    for place, character in enumerate(text[2:], 2):
        if "@" <= character <= "~":
            return place + 1
    return None
