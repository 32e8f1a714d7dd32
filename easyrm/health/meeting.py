"""All processes meet at the coordinator's port, before JAX does: who came, with what, and what each has found.

JAX's runtime cannot say which process is missing, and may crash where versions differ. So process 0 listens at the port
first; the others connect, and keep their connection when the port is left to JAX. A message is four bytes of length,
then a JSON object; nothing else is read.
"""

import json
import os
import socket
import struct
import threading
import time
from typing import Any

from easyrm.health.place import Place
from easyrm.health.processes import why
from easyrm.ports import bound_socket, connect

STRANGER = "another program answers there, not the doctor of process 0"
_GREETING = {"easyrm": "doctor", "form": 1}
_MOST = 2**20  # bytes of a message
_ANSWER = 5.0  # seconds for an answer that needs no work
_STRANGE = 10.0  # seconds of answers that are no doctor's, after which a worker gives up


class Refused(Exception):
    """Process 0 does not take this one; the message says why."""


class Connection:
    """One end of a connection over which whole messages go. Both methods raise OSError and ValueError."""

    def __init__(self, sock: socket.socket):
        self._sock = sock

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        data = json.dumps(message).encode()
        self._sock.settimeout(_ANSWER)
        self._sock.sendall(struct.pack(">I", len(data)) + data)

    def receive(self, until: float) -> dict[str, Any]:
        """The next message, which has to come before `until` (time.monotonic())."""
        size = struct.unpack(">I", self._exactly(4, until))[0]
        if size > _MOST:
            raise ValueError(f"a message of {size} bytes")
        try:
            message = json.loads(self._exactly(size, until))
        except RecursionError as error:
            raise ValueError("a message nested too deeply") from error
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return message

    def close(self) -> None:
        """End the connection."""
        self._sock.close()

    def _exactly(self, size: int, until: float) -> bytes:
        data = b""
        while len(data) < size:
            self._sock.settimeout(max(0.05, until - time.monotonic()))
            chunk = self._sock.recv(size - len(data))
            if not chunk:
                raise ConnectionError("the other side closed the connection")
            data += chunk
        return data


class Desk:
    """Process 0's side: it takes every other process once, from now on until `close_door`.

    `guests`: what each process that came said of itself, by index. `strange`: one phrase for each that was refused.
    `lost`: those whose connection ended. Raises OSError where the port cannot be had.
    """

    def __init__(self, place: Place):
        self._place = place
        self._listener = bound_socket(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or place.coordinator)
        try:
            self._listener.listen(512)
        except OSError:
            self._listener.close()
            raise
        self._listener.settimeout(0.2)
        self.guests: dict[int, dict[str, Any]] = {}
        self.strange: list[str] = []
        self.lost: set[int] = set()
        self._connections: dict[int, Connection] = {}
        self._lock, self._closing, self._visited = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._accept, name="doctor-desk", daemon=True)
        self._thread.start()

    def unreachable(self) -> str:
        """Why the coordinator's address does not lead to this process; empty where it does."""
        try:
            connection = _connect(self._place.coordinator)
        except OSError as error:
            return why(error)
        try:
            connection.receive(time.monotonic() + _ANSWER)
            connection.send({"index": 0})
            return "" if self._visited.wait(_ANSWER) else "another machine or program answers there"
        except (OSError, ValueError):
            return "another machine or program answers there"
        finally:
            connection.close()

    def wait(self, until: float) -> None:
        """Return when all have come, or it is `until`."""
        while self.missing() and time.monotonic() < until:
            time.sleep(0.1)

    def missing(self) -> list[int]:
        """The processes that have not come."""
        return [index for index in range(1, self._place.count) if index not in self.guests]

    def close_door(self) -> None:
        """Leave the port; the connections stay, and who is not yet welcomed is not taken."""
        with self._lock:
            self._closing.set()
        self._thread.join()
        self._listener.close()

    def tell(self, message: dict[str, Any]) -> None:
        """Send the same message to all that came."""
        for index in self._present():
            try:
                self._connections[index].send(message)
            except OSError:
                self.lost.add(index)

    def hear(self, until: float) -> dict[int, dict[str, Any]]:
        """The next message of each that came, by index; who says nothing until then is lost."""
        heard = {}
        for index in self._present():
            try:
                heard[index] = self._connections[index].receive(until)
            except (OSError, ValueError):
                self.lost.add(index)
        return heard

    def _present(self) -> list[int]:
        return [index for index in sorted(self.guests) if index not in self.lost]

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, (address, *_) = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            threading.Thread(target=self._welcome, args=(Connection(sock), address), daemon=True).start()

    def _welcome(self, connection: Connection, address: str) -> None:
        try:
            connection.send(_GREETING)
            hello = connection.receive(time.monotonic() + _ANSWER)
            if hello.get("index") == 0 and len(hello) == 1:
                self._visited.set()
                return connection.close()
            with self._lock:
                if self._closing.is_set():
                    raise ConnectionAbortedError("too late")
                refused = self._objection(hello, address)
                connection.send({"refused": refused})  # before anyone can ask this guest anything
                if refused:
                    self.strange.append(refused)
                else:
                    self._connections[hello["index"]], self.guests[hello["index"]] = connection, hello
        except (OSError, ValueError, LookupError):
            connection.close()

    def _objection(self, hello: dict[str, Any], address: str) -> str:
        index, count, who = hello["index"], hello["count"], f"{hello['host']} ({address})"
        if not all(isinstance(hello[name], dict) for name in ("facts", "settings")) or type(hello["host"]) is not str:
            raise ValueError("a malformed hello")
        if count != self._place.count:
            return f"{who} says that there are {count} processes, not {self._place.count}"
        if type(index) is not int or not 0 < index < self._place.count:
            return f"{who} says that it is process {index} of {self._place.count}, which it cannot be"
        if index in self.guests:
            return f"{who} says that it is process {index}, as {self.guests[index]['host']} does"
        return ""


class Visit:
    """A worker's side: it tries to reach process 0 from now on until `until`, in the background."""

    def __init__(self, place: Place, hello: dict[str, Any], until: float):
        self._address, self._hello, self._until = place.coordinator, hello, until
        self._connection: Connection | None = None
        self._problem, self._refused = "no answer", ""
        self._thread = threading.Thread(target=self._meet, name="doctor-visit", daemon=True)
        self._thread.start()

    def join(self) -> Connection:
        """The connection to process 0. Raises ConnectionRefusedError, saying what was found instead, and Refused."""
        self._thread.join()
        if self._refused:
            raise Refused(self._refused)
        if self._connection is None:
            raise ConnectionRefusedError(self._problem)
        return self._connection

    def _meet(self) -> None:
        strange = None
        while time.monotonic() < self._until and (strange is None or time.monotonic() < strange + _STRANGE):
            try:
                connection = _connect(self._address)
            except OSError as error:
                self._problem, strange = why(error), None
                time.sleep(0.5)
                continue
            try:
                if connection.receive(time.monotonic() + _ANSWER) != _GREETING:
                    raise ValueError("another greeting")
                connection.send(self._hello)
                self._refused = str(connection.receive(time.monotonic() + _ANSWER)["refused"])
                self._connection = connection
                return
            except (OSError, ValueError, LookupError):
                connection.close()
                strange = strange or time.monotonic()
                self._problem = STRANGER
                time.sleep(0.5)


def _connect(address: str) -> Connection:
    return Connection(connect(address, _ANSWER))
