"""The system calls of Garden statement SE3: what is allowed without a condition, with one, and not at all."""

from __future__ import annotations

import pytest

from garden_py.backend.oci.data import load_runc_config

ALLOWED = """
accept4 brk chroot clock_nanosleep dup3 epoll_pwait execveat fanotify_mark flistxattr getrandom io_submit ipc kill
link mknodat modify_ldt mq_unlink newfstatat openat2 prlimit64 recvmmsg renameat2 seccomp statx syslog tgkill ugetrlimit
vmsplice waitid writev
"""
REFUSED = "mount unshare setns bpf keyctl pivot_root reboot sethostname init_module"


@pytest.fixture
def allowed() -> tuple[set[str], set[str]]:
    """Without a condition, and with one."""
    found: tuple[set[str], set[str]] = (set(), set())
    for rule in load_runc_config().seccomp["syscalls"]:
        if rule["action"] == "SCMP_ACT_ALLOW":
            found[bool(rule.get("args"))].update(rule["names"])
    return found


def test_a_sample_of_the_list_is_allowed(allowed: tuple[set[str], set[str]]) -> None:
    assert set(ALLOWED.split()) <= allowed[False]


def test_new_namespaces_and_personalities_take_the_right_arguments(
    allowed: tuple[set[str], set[str]],
) -> None:
    assert {"personality", "clone"} <= allowed[True]
    assert not allowed[False] & {"personality", "clone", "clone3"}


@pytest.mark.parametrize("name", REFUSED.split())
def test_what_the_statement_names_as_refused_is(allowed: tuple[set[str], set[str]], name: str) -> None:
    assert name not in allowed[False] | allowed[True]
