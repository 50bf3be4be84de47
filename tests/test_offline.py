"""The tests' own guard against the network: see ``tests/offline``."""

import socket
import subprocess
import sys

import pytest

ELSEWHERE = ("192.0.2.1", 9)  # kept for documentation: nothing is there
PROGRAM = f"import socket; socket.create_connection({ELSEWHERE}, timeout=0.1)"


def test_connections_to_other_machines_are_refused():
    with socket.socket() as connection:
        connection.settimeout(0.1)
        with pytest.raises(BaseException, match="tests open no connections"):
            connection.connect(ELSEWHERE)
    with pytest.raises(BaseException, match="tests open no connections"):
        socket.getaddrinfo("minrl.invalid", 80)


def test_connections_to_other_machines_are_refused_in_child_processes():
    child = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert "tests open no connections" in child.stderr


def test_connections_within_this_machine_are_made():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
