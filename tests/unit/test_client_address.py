"""How a channel to a server is set up."""

from __future__ import annotations

from garden_py.client.address import channel_options


def test_a_unix_socket_is_tried_again_after_the_same_short_pause_each_time() -> None:
    """A pause that grows over a restart of a second is half a second longer than the restart."""
    options = dict(channel_options("unix:/run/garden/garden.sock", None))
    assert options["grpc.initial_reconnect_backoff_ms"] == options["grpc.max_reconnect_backoff_ms"] == 100


def test_tries_to_reach_a_network_address_become_rarer() -> None:
    """There a try costs packets, and may be one of many clients'."""
    options = dict(channel_options("cell.example:7777", None))
    assert options["grpc.max_reconnect_backoff_ms"] == 1000
