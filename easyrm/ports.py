"""TCP ports by their address, HOST:PORT: HOST is a name, an IPv4 address, or an IPv6 address in brackets."""

import socket


def bound_socket(address: str) -> socket.socket:
    """A socket bound to the port of HOST:PORT on every address of this machine, as JAX's coordinator will be.

    Raises OSError where another program holds the port.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind(("", int(address.rpartition(":")[2])))
    except OSError:
        bound.close()
        raise
    return bound


def unreachable(address: str) -> str:
    """Why nothing answers there; empty where something does."""
    try:
        connect(address, 2).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def connect(address: str, seconds: float) -> socket.socket:
    """A connection to HOST:PORT. Raises OSError where there is none after so many seconds."""
    host, _, port = address.rpartition(":")
    try:
        return socket.create_connection((host.strip("[]"), int(port)), timeout=seconds)
    except UnicodeError as error:  # two dots in a row, or more than 63 characters between them
        raise OSError(f"{host} is not the name of a host") from error
