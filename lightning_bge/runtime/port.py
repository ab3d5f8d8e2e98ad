"""Ports of this machine that a server is to listen at."""

import socket

from lightning_bge.errors import ConfigError


def check_port(host: str, port: int) -> None:
    """Check that nothing listens at a port, and that the host is an address of this machine.

    grpc shares a port with another server that allows it, as another proxy does: clients would get the studies of
    either database by chance.

    Raises:
        ConfigError: it can't be listened at.
    """
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise port_error(host, port, error.strerror or str(error)) from error


def free_port() -> int:
    """A port of this machine that nothing listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def port_error(host: str, port: int, reason: str) -> ConfigError:
    """The error of a server that can't listen."""
    return ConfigError(
        f"{host}:{port} can't be listened at: {reason}. Name another --port, or an address of this machine as --host"
    )
