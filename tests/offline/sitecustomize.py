"""Refuses connections to other machines, in every Python that finds this on its path."""

import ipaddress
import os
import socket
import sys


class ConnectionRefused(BaseException):
    """Not an Exception, so that no library takes it for a network that happens to be down."""


def _is_name(host):
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return True
    return False


def _is_here(host):
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    if _is_name(host):
        return False
    own = socket.gethostbyname(socket.gethostname())
    return host == own or ipaddress.ip_address(host).is_loopback


def _watch(event, arguments):
    if event not in ("socket.connect", "socket.getaddrinfo"):
        return
    if os.environ.get("MINRL_TEST_NETWORK"):
        return
    if event == "socket.getaddrinfo":  # a name is looked up by asking elsewhere
        host = os.fsdecode(arguments[0] or "")
        refused = _is_name(host) and not _is_here(host)
    else:
        connection, address = arguments
        of_internet = connection.family in (socket.AF_INET, socket.AF_INET6)
        streams = of_internet and connection.type == socket.SOCK_STREAM
        refused = streams and not _is_here(address[0])
    if refused:
        raise ConnectionRefused(f"tests open no connections: {arguments}")


sys.addaudithook(_watch)
