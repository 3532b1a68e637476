"""Where fuzzing begins: well-formed inputs of each target, and the words that they are made of."""

from __future__ import annotations

import gzip
import json

from kit import hostile_layers as build

from garden_py import wire

_RUN = json.dumps(
    {
        "id": "p", "path": "sh", "args": ["-c", "x"], "env": ["A=b"], "dir": "/d", "user": "u:g",
        "rlimits": {"nofile": 5, "core": 18446744073709551615}, "tty": {"window_size": {"columns": 80, "rows": 24}},
        "limits": {"memory_limits": {"limit_in_bytes": 1}, "cpu_limits": {"weight": 1, "limit_in_shares": 2}},
        "image": {"uri": ""}, "bind_mounts": None,
    }
).encode()  # fmt: skip
_CREATE = json.dumps(
    {
        "handle": "h", "grace_time": 5000000000, "rootfs": "raw:///x", "privileged": True, "env": ["A=b"],
        "properties": {"k": "v"}, "netin": [{"host_port": 0, "container_port": 8080}],
        "bind_mounts": [{"src_path": "/s", "dst_path": "/d", "mode": 1, "origin": 0}],
        "netout_rules": [
            {"protocol": 1, "networks": [{"start": "1.1.1.1", "end": "1.1.1.9"}], "ports": [{"start": 1, "end": 2}]},
            {"protocol": 3, "icmps": {"type": 8, "code": 0}, "log": True},
        ],
        "limits": {"pid_limits": {"max": 5}, "disk_limits": {"byte_hard": 0, "scope": 1}},
    }
).encode()  # fmt: skip
_MESSAGES = (
    b'{"process_id":"p","source":0,"data":"a\\"b\\\\\\u00e9\\ud83d\\ude00"}\n'
    b'{"process_id":"p","tty":{"window_size":{"columns":80,"rows":24}}}\n{"signal":1}{"source":0}\n'
)


def _request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: api", *headers]
    if body and not headers:
        lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


_CHUNKED = b"2\r\n{}\r\n1;x=y\r\n \r\n0\r\nTrailer: t\r\n\r\n"

SEEDS: dict[str, tuple[bytes, ...]] = {
    "requests": (
        _request("GET", "/ping") + _request("GET", "/containers?a=b&c=%20+%"),
        _request("POST", "/containers", _CREATE),
        _request("POST", "/containers/h/processes", _RUN) + _MESSAGES,
        _request("POST", "/containers/h/net/out", b"{}", "Transfer-Encoding: chunked") + _CHUNKED,
        _request("POST", "/containers/h/net/in", _CHUNKED, "Transfer-Encoding: chunked"),
        _request("PUT", "/containers/h/grace_time", b"5", "Expect: 100-continue", "Content-Length: 1"),
        _request("GET", "/containers/h/processes/p?stdout_offset=1") + _MESSAGES,
        _request("HEAD", "/capacity", b"", "Connection: close"),
        b"GET /ping HTTP/1.0\r\n\r\n",
    ),
    "messages": (_MESSAGES, b'{"a":[1,{"b":"}"}]} {"source":0,"data":null}'),
    "frames": (
        wire.encode_frame(wire.REQUEST, 1, {"op": "spawn", "id": "p", "argv": [b"sh"], "env": [b"A=b"], "user": "u"}, 3)
        + wire.encode_frame(wire.REPLY, 1, {"pid": 5, "fds": ["stdin", "stdout", "stderr"]}, 3),
        wire.encode_frame(
            wire.REPLY,
            7,
            {
                "wire": 2, "build": "b", "agent": "2",
                "processes": [{"id": "p", "exited": True, "status": 9, "ended_ns": -1, "tty": False}],
            },
        ),
        wire.encode_frame(wire.EVENT, 0, {"event": "exited", "process": "p", "status": 0, "ended_ns": 1})
        + wire.encode_frame(wire.ERROR, 2, {"code": "internal", "message": "m", "x": None, "y": {"z": [True]}}),
    ),
    "layers": (
        build.layer(build.file(b"./d/f", b"x")),
        build.pax({b"path": b"p/f", b"mtime": b"-1.5", b"uid": b"70000", b"SCHILY.xattr.user.a": b"b"})
        + build.file(b"f"),
        build.pax({b"GNU.sparse.map": b"512,1", b"GNU.sparse.size": b"1024"})[512:] + build.file(b"f", b"x"),
        build.long_name(b"n" * 120)[:1024] + build.hard_link(b"h", b"f")[:400],
        build.header(b"s", b"S", size=1, tail=(bytes(41) + build.octal(512, 12) + build.octal(1, 12)).ljust(138, b"\0")
                     + build.octal(513, 12)) + b"x".ljust(512, b"\0"),
        build.header(b"b", size=1 << 40, mtime=-1, uid=1 << 30),
    ),
    "compressed": (
        gzip.compress(b"text " * 50, mtime=0) + gzip.compress(b"", mtime=0) + bytes(9),
        build.zstd_frames(b"text " * 50),
        build.zstd_frames(bytes(300_000), pieces=1),
        b"plain",
    ),
}  # fmt: skip

WORDS: dict[str, tuple[bytes, ...]] = {
    "requests": (
        b"\r\n", b"\r\n\r\n", b"GET ", b"POST ", b"CONNECT ", b"HTTP/1.1", b"HTTP/1.0", b"Content-Length: ", b"0",
        b"-1", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n",
        b"Connection: upgrade\r\nUpgrade: x\r\n", b"Host: b\r\n", b"Expect: 100-continue\r\n", b"/containers",
        b"/processes", b"%2f", b"?", b"&", b"\x00", b"\xff", b"null", b"{", b"}", b"[", b"]", b'"',
        b"99999999999999999999", b"NaN", b"1e999", b"\\ud800",
    ),
    "messages": (
        b"{", b"}", b"[", b"]", b'"', b"\\", b"\\\\", b'\\"', b":", b",", b"\n", b" ", b"\xff", b"\xe2\x82",
        b"\\ud800", b"null", b"true", b"-1", b"1" * 40, b'"source":0', b'"data":"', b'"signal":', b'"tty":{',
        b'"window_size":{', b'"rows":65536', b"{}",
    ),
    "frames": (
        b"GA\x01\x01", b"GA", b"N", b"T", b"F", b"i" + bytes(8), b"y\x01\0\0\0x", b"s\x02\0\0\0\xc3\xa9",
        b"l\x01\0\0\0", b"d\x01\0\0\0\x01\0\0\0a", b"\xff\xff\xff\xff", bytes(4), b"\x01\0\0\0",
        b"\x04\0\0\0wire", b"\x09\0\0\0processes",
    ),
    "layers": (
        bytes(512), b"0" * 12, b"\x80" + bytes(11), b"\xff" * 12, b"00000001000\0", b"ustar\0", b"ustar  \0", b"x",
        b"L", b"S", b"5", b"2", b"1", b"11 path=a/b\n", b"10 size=5\n", b"15 mtime=1.5\n", b"../", b"/", b"\n",
        b"22 GNU.sparse.major=1\n", b"22 GNU.sparse.minor=0\n", b"25 GNU.sparse.realsize=9\n", b"1\n0\n1\n",
    ),
    "compressed": (
        b"\x1f\x8b\x08", bytes(8), b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18", b"\x01\0\0", b"\x03\0\x10",
        b"\x02\0\x10",
        b"\x04\0", b"\x24\0", b"\xff\xff\xff\xff", gzip.compress(b"", mtime=0),
    ),
}  # fmt: skip
