"""Which ends of processes OOM kills explain, of those that share a group."""

from __future__ import annotations

from garden_py.backend.linux.process import OomAccount


class Group:
    """A group that the test has the kernel kill tasks of."""

    def __init__(self) -> None:
        self.kills, self.now_s = 0, 100.0
        self.account = OomAccount(lambda: self.kills, lambda: self.now_s)


def test_one_kill_explains_one_end() -> None:
    group = Group()
    assert not group.account.claim(0)
    group.kills = 1
    assert group.account.claim(0)
    assert not group.account.claim(0), "somebody else has killed this one"
    group.kills = 2
    assert not group.account.claim(2), "it was started after both"
    assert group.account.claim(1)


def test_kills_at_once_explain_as_many_ends() -> None:
    """The first end is mostly heard of when the kernel has killed them all."""
    group = Group()
    group.kills = 3
    assert [group.account.claim(0) for _ in range(4)] == [True, True, True, False]


def test_what_explains_nothing_for_a_while_was_a_child() -> None:
    """A shell's pipeline of three may be killed with it: who is killed by hand an hour later was not out of memory."""
    group = Group()
    group.kills = 4
    assert group.account.claim(0)
    group.now_s += 5
    assert not group.account.claim(0)
    group.kills = 5
    assert group.account.claim(0)


def test_what_an_earlier_server_has_explained_is_not_explained_again() -> None:
    group = Group()
    group.kills = 2
    group.account.explains_another()
    assert group.account.claim(0)
    assert not group.account.claim(0)
