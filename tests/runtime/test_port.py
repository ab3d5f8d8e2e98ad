"""Ports that can't be listened at."""

import socket

import pytest

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.port import check_port


def test_a_port_that_is_taken_and_a_host_that_is_not_here() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"127.0.0.1:{port} can't be listened at: Address already in use.*--port"
        ):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"nowhere.invalid:80 can't be listened at: .*an address of this machine"):
        check_port("nowhere.invalid", 80)
