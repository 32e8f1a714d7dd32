"""Where a process is, and how processes meet before JAX's runtime lets them."""

import socket
import sys
import time

import pytest
from test_doctor import holder

from easyrm.errors import InputError
from easyrm.health import meeting, processes
from easyrm.health.meeting import Desk, Refused, Visit
from easyrm.health.place import Place, expected_devices, find_place
from easyrm.ports import bound_socket

LISTEN = "s = socket.socket(); s.bind(('', int(sys.argv[1]))); s.listen()"


def test_where_a_process_is(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    assert find_place("auto") == Place()
    with pytest.raises(InputError, match="JAX finds no cluster"):
        find_place("true")
    for name, value in (("COORDINATOR_ADDRESS", "host:1"), ("NUM_PROCESSES", "4"), ("PROCESS_ID", "3")):
        monkeypatch.setenv(f"JAX_{name}", value)
    assert find_place("auto") == Place(3, 4, "host:1") and Place(3, 4, "host:1").name_of(0) == "process 0 (host)"
    kinds = {"v5p-64": 32, "v4-8": 4, "v5litepod-16": 16, "v6e-8": 8, "v3-8": 8, "tpu7x-8": 0}
    for kind, expected in kinds.items():
        monkeypatch.setenv("TPU_ACCELERATOR_TYPE", kind)
        assert expected_devices(0)[0] == expected
    assert expected_devices(3) == (3, "--devices=3")


def place_of(count=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return Place(0, count, f"localhost:{free.getsockname()[1]}")


def visit(place, index, seconds=10, **more):
    hello = {"index": index, "count": place.count, "host": f"h{index}", "facts": {}, "settings": {}} | more
    return Visit(place, hello, time.monotonic() + seconds)


def test_a_meeting_that_leaves_the_port_and_keeps_its_connections():
    place = place_of(3)
    early = visit(place, 2)  # before anyone listens
    time.sleep(0.3)
    desk = Desk(place)
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\2[]", b"\xff\xff\xff\xff"):
        with socket.create_connection(("localhost", int(place.coordinator.split(":")[1]))) as stranger:
            stranger.sendall(noise)
    assert desk.unreachable() == ""
    connection = early.join()
    for other, why in ((visit(place, 2), "process 2, as h2 does"), (visit(place, 1, count=4), "there are 4 processes")):
        with pytest.raises(Refused, match=why):
            other.join()
    until = time.monotonic() + 10
    while len(desk.strange) < 2 and time.monotonic() < until:
        desk.wait(time.monotonic() + 0.2)
    assert desk.missing() == [1] and len(desk.strange) == 2
    desk.close_door()
    with bound_socket(place.coordinator) as jax_would:  # the port is free for JAX
        jax_would.listen()
        desk.tell({"question": 1})
        assert connection.receive(time.monotonic() + 5) == {"question": 1}
        connection.send({"answer": 2})
        assert desk.hear(time.monotonic() + 5) == {2: {"answer": 2}}
    connection.close()
    assert desk.hear(time.monotonic() + 5) == {} and desk.lost == {2}


def test_a_port_that_is_held_and_an_address_that_leads_elsewhere():
    place = place_of()
    port = place.coordinator.split(":")[1]
    with holder(LISTEN, port) as process:
        with pytest.raises(OSError, match="in use"):
            Desk(place)
        assert processes.listeners(int(port))[0].startswith(f"pid {process.pid} ({sys.executable}")
    desk = Desk(Place(0, 2, f"nosuch.invalid:{port}"))
    assert desk.unreachable().startswith("name not found")
    desk.close_door()


def test_another_program_at_the_address(monkeypatch):
    monkeypatch.setattr(meeting, "_STRANGE", 0.5)
    place = place_of()
    talks = "threading.Thread(target=lambda: [s.accept()[0].send(b'SSH-2.0-x') for _ in range(99)]).start()"
    program = holder(f"{LISTEN}; import threading; {talks}", place.coordinator.split(":")[1])
    with program, pytest.raises(ConnectionRefusedError, match=meeting.STRANGER):
        visit(place, 1, seconds=20).join()
    with pytest.raises(ConnectionRefusedError, match="Connection refused"):
        visit(place_of(), 1, seconds=1).join()
