# SPDX-License-Identifier: Apache-2.0
"""Starts, watches and stops the command-line tool for the tests. Every wait here is for a thing, with a deadline."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import unittest
from collections.abc import Callable

import wire_client

START_DEADLINE = 10.0
_LISTENING = re.compile(r"listening tcp (?:\[(?P<v6>[^\]]+)\]|(?P<v4>[^:\[\]]+)):(?P<port>\d+)")


class ToolFailed(AssertionError):
    """The tool did not do what the caller relied on; the text holds what it said."""


def eventually(condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    """Polls until the condition holds; fails with `what` at the deadline."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what}")
        time.sleep(0.005)


def sanitizer_memory(tool: str, most: int) -> int:
    """What a sanitizer's shadow memory and its store of freed blocks may add to a process: `most`, or nothing where
    there is none. Fails if there is no such tool."""
    if not os.access(tool, os.X_OK):
        raise RuntimeError(f"MSGTRANS_TOOL must name the msgtrans executable, and is {tool!r}")
    with open(tool, "rb") as executable:
        program = executable.read()
    return most if b"__asan_init" in program or b"__tsan_init" in program else 0


def start_bench(case: unittest.TestCase, tool: str, url: str, *options: str) -> subprocess.Popen[str]:
    """Clients that go on until they are done or the test is over."""
    process = subprocess.Popen(
        [tool, "bench", url, "--connections", "4", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def clean_up() -> None:
        process.kill()
        process.communicate()

    case.addCleanup(clean_up)
    return process


@dataclasses.dataclass(frozen=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"tcp://{self}"


@dataclasses.dataclass
class Finished:
    """What a process left behind."""

    status: int
    stdout: str
    stderr: str
    seconds: float

    def summary(self) -> dict[str, int]:
        """The one JSON object that `serve --json` prints when it ends, after its `listening` lines."""
        rest = [line for line in self.stdout.splitlines() if not _LISTENING.fullmatch(line)]
        try:
            summary = json.loads("\n".join(rest))
        except json.JSONDecodeError as error:
            raise ToolFailed(f"no JSON summary on standard output: {error}\n{self.stdout}\n{self.stderr}") from error
        if not isinstance(summary, dict):
            raise ToolFailed(f"the summary is not an object: {self.stdout}")
        return summary


def run_tool(tool: str, *arguments: str, stdin: str = "", timeout: float = 20.0) -> Finished:
    """Runs the tool to its end."""
    begun = time.monotonic()
    try:
        done = subprocess.run([tool, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise ToolFailed(f"{' '.join(arguments)}: still running after {timeout} s; said {error.stdout!r}") from error
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - begun)


class _Lines:
    """What a pipe says, line by line, read by a thread of its own so that the writer never blocks on it."""

    def __init__(self, pipe) -> None:  # type: ignore[no-untyped-def]
        self._pipe = pipe
        self._changed = threading.Condition()
        self._lines: list[str] = []
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._pipe:
            with self._changed:
                self._lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def wait(self, enough: Callable[[list[str]], bool], timeout: float) -> list[str]:
        """The lines so far, once they are enough, or the pipe is at its end, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: enough(self._lines) or self._ended, timeout)
            return list(self._lines)

    def text(self, timeout: float = 5.0) -> str:
        self._thread.join(timeout)
        with self._changed:
            return "".join(line + "\n" for line in self._lines)


class ToolServer:
    """`msgtrans serve`, running. With `--json`, so that `stop` returns the summary."""

    def __init__(self, tool: str, *options: str, listen: tuple[str, ...] = ("127.0.0.1:0",)) -> None:
        command = [tool, "serve", "--json"]
        for address in listen:
            command += ["--tcp", address]
        self._begun = time.monotonic()
        self.process = subprocess.Popen(
            [*command, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._stdout = _Lines(self.process.stdout)
        self._stderr = _Lines(self.process.stderr)
        lines = self._stdout.wait(lambda so_far: len(so_far) >= len(listen), START_DEADLINE)
        matches = [_LISTENING.fullmatch(line) for line in lines[: len(listen)]]
        if len(matches) != len(listen) or not all(matches):
            self.kill()
            raise ToolFailed(f"{' '.join(command)}: not listening; said {lines}\n{self._stderr.text()}")
        self.addresses = [Address(m["v6"] or m["v4"], int(m["port"])) for m in matches if m]
        self.start_seconds = time.monotonic() - self._begun

    @property
    def address(self) -> Address:
        return self.addresses[0]

    def connect(self, **options: object) -> wire_client.Client:
        return wire_client.Client(self.address.host, self.address.port, **options)  # type: ignore[arg-type]

    def resident_bytes(self) -> int:
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as status:
            for line in status:
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        raise ToolFailed(f"process {self.process.pid} has no resident memory; status {self.process.poll()}")

    def sockets(self) -> int:
        """How many sockets it holds, listening ones included."""
        count = 0
        for descriptor in os.scandir(f"/proc/{self.process.pid}/fd"):
            try:
                count += os.readlink(descriptor.path).startswith("socket:")
            except FileNotFoundError:  # closed meanwhile
                pass
        return count

    def send_signal(self, number: int) -> None:
        if self.process.poll() is not None:
            raise ToolFailed(f"the server ended by itself, status {self.process.returncode}\n{self._stderr.text()}")
        self.process.send_signal(number)

    def wait(self, timeout: float = 15.0) -> Finished:
        """Waits for its end."""
        begun = time.monotonic()
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise ToolFailed(f"still running after {timeout} s\n{self._stderr.text()}") from error
        return Finished(status, self._stdout.text(), self._stderr.text(), time.monotonic() - begun)

    def stop(self, number: int = signal.SIGTERM, timeout: float = 15.0) -> Finished:
        self.send_signal(number)
        return self.wait(timeout)

    def kill(self) -> None:
        """Ends it in any case; for cleaning up."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for lines, pipe in ((self._stdout, self.process.stdout), (self._stderr, self.process.stderr)):
            lines.text()
            if pipe:
                pipe.close()


class Bystander:
    """Well-behaved sessions that ask and are answered all the time, in a thread of their own: whatever happens to
    others, these must notice nothing. Several connections, so that each shard has some."""

    def __init__(self, address: Address, connections: int = 4) -> None:
        self._clients = [wire_client.Client(address.host, address.port) for _ in range(connections)]
        self._stop = threading.Event()
        self._progress = threading.Condition()
        self._rounds = 0
        self._failure: BaseException | None = None
        self.slowest = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                begun = time.monotonic()
                asked = []
                for index, client in enumerate(self._clients):
                    payload = b"bystander %d round %d" % (index, self._rounds)
                    asked.append((client, client.start_request(payload, biz_type=index), payload, index))
                for client, message_id, payload, biz_type in asked:
                    answer = client.response(message_id)
                    if (answer.payload, answer.biz_type) != (payload, biz_type):
                        raise AssertionError(f"a bystander asked {payload!r} and was answered {answer}")
                self.slowest = max(self.slowest, time.monotonic() - begun)
                with self._progress:
                    self._rounds += 1
                    self._progress.notify_all()
        except BaseException as error:
            with self._progress:
                self._failure = error
                self._progress.notify_all()

    def check(self, rounds: int = 3, timeout: float = 10.0) -> None:
        """Waits until all its sessions were served `rounds` more times, from this moment on."""
        with self._progress:
            # The round under way began before this moment.
            goal = self._rounds + rounds + 1
            self._progress.wait_for(lambda: self._failure is not None or self._rounds >= goal, timeout)
            if self._failure is not None:
                raise AssertionError(f"a bystander session was disturbed: {self._failure!r}") from self._failure
            if self._rounds < goal:
                raise AssertionError(f"bystander sessions were not served within {timeout} s")

    def stop(self) -> list[wire_client.Client]:
        """Ends it, and returns its clients, closed, for their counts."""
        self._stop.set()
        self._thread.join(20)
        for client in self._clients:
            client.close()
        if self._failure is not None:
            raise AssertionError(f"a bystander session was disturbed: {self._failure!r}") from self._failure
        if self._thread.is_alive():
            raise AssertionError("a bystander session still waits for its answer")
        return self._clients


class ScriptedServer:
    """A server in Python for testing clients: hands every packet to `answer(packet)`, and sends the packets it returns
    (an empty list: never answers). `received` keeps all packets in the order they came."""

    def __init__(self, answer: Callable[[wire_client.Packet], list[wire_client.Packet]]) -> None:
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._listener.getsockname()[1])
        self.received: collections.deque[wire_client.Packet] = collections.deque()
        self.connections = 0
        self.failures: list[BaseException] = []
        self._accepted: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> "ScriptedServer":
        return self

    def __exit__(self, *_: object) -> None:
        # Wakes a thread that is blocked in the call; `close` alone would not.
        for opened in [self._listener, *self._accepted]:
            try:
                opened.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self._threads:
            thread.join(5)
        for opened in [self._listener, *self._accepted]:
            opened.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._accepted.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        decoder = wire_client.Decoder()
        try:
            while data := connection.recv(65536):
                decoder.feed(data)
                while (packet := decoder.next()) is not None:
                    self.received.append(packet)
                    for reply in self._answer(packet):
                        connection.sendall(wire_client.encode(reply))
        except OSError:
            return
        except wire_client.ProtocolError as error:
            self.failures.append(error)
        finally:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def unused_port(host: str = "127.0.0.1") -> tuple[socket.socket, int]:
    """A port that is taken, so that nobody else gets it, but where nothing listens: connecting is refused. It is free
    again when the socket is closed."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    holder = socket.socket(family, socket.SOCK_STREAM)
    holder.bind((host, 0))
    return holder, holder.getsockname()[1]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
