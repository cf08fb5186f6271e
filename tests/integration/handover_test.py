#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""`msgtrans serve` is restarted under load, started by systemd (as far as that can be played), and drained.

MSGTRANS_TOOL names the tool.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest

import wire_client
from tool_fixture import ToolFailed, _Lines, eventually, run_tool

TOOL = os.environ["MSGTRANS_TOOL"]
DEADLINE = 60.0
_LISTENING = re.compile(r"listening (?P<transport>\w+) (?P<address>\S+)")
_TAKEN_OVER = re.compile(r"msgtrans: process (?P<process>\d+) has taken over")


class Server:
    """`msgtrans serve`, and whoever comes after it: they share standard output and error."""

    def __init__(self, command: list[str], listeners: int, **options: object) -> None:
        self.first = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,  # type: ignore[call-overload]
        )
        self.process = self.first.pid
        self.stdout = _Lines(self.first.stdout)
        self.stderr = _Lines(self.first.stderr)
        self.listeners = listeners
        self.addresses = self.wait_listening(1)
        self.successors = 0

    def wait_listening(self, generation: int) -> list[tuple[str, str]]:
        """What that generation said that it listens on."""

        def said(lines: list[str]) -> list[re.Match[str]]:
            return [m for m in map(_LISTENING.fullmatch, lines) if m]

        wanted = generation * self.listeners
        found = said(self.stdout.wait(lambda lines: len(said(lines)) >= wanted, DEADLINE))
        if len(found) < wanted:
            raise ToolFailed(f"not listening: {self.stdout.wait(lambda _: True, 0)} {self.stderr.wait(lambda _: True, 0)}")
        return [(m["transport"], m["address"]) for m in found[wanted - self.listeners : wanted]]

    def hand_over(self) -> int:
        """Has the process replaced by a successor; returns the old one's number."""
        old = self.process
        self.successors += 1
        os.kill(old, signal.SIGUSR2)

        def said(lines: list[str]) -> list[re.Match[str]]:
            return [m for m in map(_TAKEN_OVER.fullmatch, lines) if m]

        lines = self.stderr.wait(lambda so_far: len(said(so_far)) >= self.successors, DEADLINE)
        if len(said(lines)) < self.successors:
            raise ToolFailed(f"nobody has taken over: {lines}")
        self.process = int(said(lines)[-1]["process"])
        return old

    def gone(self, process: int) -> bool:
        if process == self.first.pid:
            return self.first.poll() is not None
        try:
            with open(f"/proc/{process}/stat", encoding="ascii") as stat:
                return stat.read().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True

    def stop(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.process, number)
        eventually(lambda: self.gone(self.process), "the server ends", DEADLINE)

    def kill(self) -> None:
        for process in {self.process, self.first.pid}:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.first.wait()
        for lines, pipe in ((self.stdout, self.first.stdout), (self.stderr, self.first.stderr)):
            lines.text()
            if pipe:
                pipe.close()


def connect_to(transport: str, address: str) -> socket.socket:
    if transport == "unix":
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.settimeout(DEADLINE)
        made.connect(address)
        return made
    host, port = address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=DEADLINE)


def ask(connection: socket.socket, number: int) -> None:
    """Sends one request and reads its answer."""
    payload = b"question %d" % number
    connection.sendall(wire_client.encode(wire_client.Packet(wire_client.REQUEST, number, payload)))
    decoder = wire_client.Decoder()
    while (packet := decoder.next()) is None:
        data = connection.recv(65536)
        if not data:
            raise ConnectionError(f"closed instead of an answer to {payload!r}")
        decoder.feed(data)
    if packet.payload != payload or packet.message_id != number:
        raise ConnectionError(f"asked {payload!r}, answered {packet}")


class Load(threading.Thread):
    """A client that connects, asks a few times and hangs up, again and again. Whatever goes wrong is a failure: a
    connection refused or reset, and an answer that does not come."""

    def __init__(self, transport: str, address: str, stop: threading.Event, pause: float) -> None:
        super().__init__(daemon=True)
        self._where = (transport, address)
        self._stop_it = stop
        self._pause = pause
        self.sessions = 0
        self.answers = 0
        self.failure: str | None = None

    def run(self) -> None:
        try:
            while not self._stop_it.is_set():
                with connect_to(*self._where) as connection:
                    for number in range(1, 6):
                        ask(connection, number)
                        self.answers += 1
                        if self._pause:
                            time.sleep(self._pause)
                self.sessions += 1
        except Exception as error:  # noqa: BLE001: told by the test
            self.failure = f"{self._where} after {self.sessions} sessions: {error!r}"


class Asking(threading.Thread):
    """One session that asks all the time."""

    def __init__(self, address: tuple[str, str]) -> None:
        super().__init__(daemon=True)
        self.connection = connect_to(*address)
        self.answers = 0
        self.failure: str | None = None
        self._stop_it = threading.Event()
        self.start()
        self.answers_more(1)

    def run(self) -> None:
        try:
            while not self._stop_it.wait(0.02):
                ask(self.connection, self.answers + 1)
                self.answers += 1
        except Exception as error:  # noqa: BLE001: told by the test
            self.failure = f"closed after {self.answers} answers: {error!r}"

    def answers_more(self, count: int) -> None:
        goal = self.answers + count
        eventually(lambda: self.failure is not None or self.answers >= goal, "its requests are answered", DEADLINE)
        if self.failure is not None:
            raise AssertionError(self.failure)

    def stop_asking(self) -> None:
        self._stop_it.set()
        self.join(DEADLINE)


class ServerTest(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = tempfile.TemporaryDirectory(prefix="msgtrans-")
        self.addCleanup(self.directory.cleanup)
        self.file = str(pathlib.Path(self.directory.name) / "socket")

    def run_server(self, command: list[str], listeners: int, **options: object) -> Server:
        server = Server(command, listeners, **options)
        self.addCleanup(server.kill)
        return server

    def serve(self, *arguments: str, listeners: int, tool: str = TOOL, **options: object) -> Server:
        return self.run_server([tool, "serve", *arguments], listeners, **options)

    def ask(self, transport: str, address: str) -> None:
        with connect_to(transport, address) as connection:
            ask(connection, 1)


class HandoverTest(ServerTest):
    def test_under_load_refuses_nobody_and_answers_everything(self) -> None:
        server = self.serve(
            "--tcp", "127.0.0.1:0", "--unix", self.file, "--tcp", "127.0.0.1:0", "--shards", "3", listeners=3
        )
        first = server.addresses
        stop = threading.Event()
        loads = [Load(*first[i % 3], stop, 0.02 if i % 4 == 0 else 0) for i in range(16)]
        for load in loads:
            load.start()

        def everybody_has_gone_on() -> None:
            before = [load.sessions for load in loads]
            eventually(
                lambda: all(load.failure or load.sessions >= was + 3 for load, was in zip(loads, before)),
                "every client is served",
                DEADLINE,
            )
            self.assertEqual([load.failure for load in loads if load.failure], [])

        everybody_has_gone_on()
        gone = []
        for generation in range(2, 5):
            gone.append(server.hand_over())
            self.assertEqual(server.wait_listening(generation), first)
            everybody_has_gone_on()
        for process in gone:
            eventually(lambda: server.gone(process), "the predecessor ends", DEADLINE)
        self.assertEqual(len({*gone, server.process}), 4)
        everybody_has_gone_on()
        stop.set()
        for load in loads:
            load.join(DEADLINE)
        self.assertEqual([load.failure for load in loads if load.failure], [])
        self.assertTrue(os.path.exists(self.file), "a predecessor removed the socket's file")
        server.stop()
        self.assertFalse(os.path.exists(self.file), "the last one left the socket's file")

    def test_lets_sessions_finish_and_then_ends(self) -> None:
        server = self.serve("--tcp", "127.0.0.1:0", "--handover-quiet", "3", listeners=1)
        asking = Asking(server.addresses[0])
        old = server.hand_over()
        asking.answers_more(5)
        asking.stop_asking()
        self.assertIsNone(asking.failure)
        self.assertEqual(asking.connection.recv(1), b"", "the end, and no reset")
        asking.connection.close()
        eventually(lambda: server.gone(old), "the predecessor ends", DEADLINE)
        self.assertEqual(server.first.returncode, 0)
        server.stop()

    def test_cuts_who_does_not_finish(self) -> None:
        server = self.serve(
            *("--tcp", "127.0.0.1:0", "--handover-quiet", "2.5", "--handover-drain", "3", "--json"), listeners=1
        )
        asking = Asking(server.addresses[0])
        old = server.hand_over()
        eventually(lambda: server.gone(old), "the predecessor ends though somebody still asks", DEADLINE)
        asking.join(DEADLINE)
        self.assertIn("closed", asking.failure or "")
        summaries = [line for line in server.stdout.wait(lambda _: True, 0) if line.startswith("{")]
        self.assertEqual([json.loads(line)["sessions_cut"] for line in summaries], [1])
        asking.connection.close()
        server.stop()

    def test_goes_on_if_the_successor_fails(self) -> None:
        # Files that are there when the server starts, and are not when its successor does.
        with tempfile.TemporaryDirectory(prefix="msgtrans-") as other:
            made = subprocess.run([TOOL, "cert", "localhost"], cwd=other, capture_output=True, text=True, timeout=30)
            self.assertEqual(made.returncode, 0, made.stderr)
            cert, key = f"{other}/cert.pem", f"{other}/key.pem"
            server = self.serve(
                *("--tcp", "127.0.0.1:0", "--tls", "127.0.0.1:0", "--unix", self.file),
                *("--cert", cert, "--key", key),
                listeners=3,
            )
        client = wire_client.Client(*self._host_port(server))
        os.kill(server.process, signal.SIGUSR2)
        lines = server.stderr.wait(lambda so_far: any("no successor" in line for line in so_far), DEADLINE)
        self.assertTrue(any("ended before it was ready" in line for line in lines), lines)
        self.assertEqual(client.request(b"still").payload, b"still")
        client.close()
        for transport, address in server.addresses:
            if transport != "tls":
                for _ in range(4):
                    self.ask(transport, address)
        server.stop()
        self.assertFalse(os.path.exists(self.file))

    def test_a_slow_successor_is_given_up(self) -> None:
        program = pathlib.Path(self.directory.name) / "msgtrans"
        program.symlink_to(TOOL)
        server = self.serve("--tcp", "127.0.0.1:0", "--handover-timeout", "0.3", listeners=1, tool=str(program))
        program.unlink()
        program.write_text("#!/bin/sh\nexec sleep 1000\n")
        program.chmod(0o755)
        os.kill(server.process, signal.SIGUSR2)
        lines = server.stderr.wait(lambda so_far: any("no successor" in line for line in so_far), DEADLINE)
        self.assertTrue(any("was not ready within 300 ms" in line for line in lines), lines)
        self.ask(*server.addresses[0])
        # And a second attempt may succeed.
        program.unlink()
        program.symlink_to(TOOL)
        old = server.hand_over()
        self.ask(*server.addresses[0])
        eventually(lambda: server.gone(old), "the predecessor ends", DEADLINE)
        server.stop()

    def test_a_signal_ends_the_wait_for_a_successor(self) -> None:
        program = pathlib.Path(self.directory.name) / "msgtrans"
        program.symlink_to(TOOL)
        server = self.serve("--tcp", "127.0.0.1:0", listeners=1, tool=str(program))
        program.unlink()
        program.write_text(f"#!/bin/sh\necho $$ > {self.directory.name}/started\nexec sleep 1000\n")
        program.chmod(0o755)
        os.kill(server.process, signal.SIGUSR2)
        started = pathlib.Path(self.directory.name) / "started"
        eventually(lambda: started.exists() and started.read_text().strip() != "", "the successor starts")
        successor = int(started.read_text())
        server.stop()
        self.assertEqual(server.first.returncode, 0)
        eventually(lambda: server.gone(successor), "the successor ends too")

    @staticmethod
    def _host_port(server: Server) -> tuple[str, int]:
        host, port = server.addresses[0][1].rsplit(":", 1)
        return host, int(port)


#: Puts the descriptors of its arguments at 3, 4, ... and becomes the tool, as systemd does it.
_AS_SYSTEMD = """
import os, sys
process, count, names, *rest = sys.argv[1:]
split = rest.index("--")
for place, descriptor in enumerate(rest[:split]):
    os.dup2(int(descriptor), 100 + place)
for place in range(split):
    os.dup2(100 + place, 3 + place)
os.closerange(3 + split, 200)  # where they were, which may be the next place
os.environ["LISTEN_PID"] = str(os.getpid()) if process == "self" else process
os.environ["LISTEN_FDS"] = count
if names:
    os.environ["LISTEN_FDNAMES"] = names
os.execv(rest[split + 1], rest[split + 1:])
"""


class SocketActivationTest(ServerTest):
    def command(
        self, sockets: list[socket.socket], *arguments: str, process: str = "self", count: str = "", names: str = ""
    ) -> list[str]:
        descriptors = [str(one.fileno()) for one in sockets]
        return [
            *(sys.executable, "-c", _AS_SYSTEMD, process, count or str(len(sockets)), names, *descriptors),
            *("--", TOOL, "serve", *arguments),
        ]

    def start(self, sockets: list[socket.socket], *arguments: str, listeners: int, **options: str) -> Server:
        command = self.command(sockets, *arguments, **options)
        return self.run_server(command, listeners, pass_fds=[one.fileno() for one in sockets])

    def listening(self, family: int = socket.AF_INET, address: object = ("127.0.0.1", 0)) -> socket.socket:
        made = socket.socket(family, socket.SOCK_STREAM)
        self.addCleanup(made.close)
        made.bind(address)  # type: ignore[arg-type]
        made.listen(64)
        return made

    @staticmethod
    def address(of: socket.socket) -> str:
        return "%s:%d" % of.getsockname()

    def test_serves_on_what_it_is_given_and_on_nothing_else(self) -> None:
        given = self.listening()
        waiting = connect_to("tcp", self.address(given))  # before anybody serves
        server = self.start([given], listeners=1)
        self.assertEqual(server.addresses, [("tcp", self.address(given))])
        ask(waiting, 1)
        waiting.close()
        self.assertEqual(len(server.stdout.wait(lambda _: True, 0)), 1, "the default address is not for it")
        server.stop()
        self.assertEqual(server.first.returncode, 0)
        # Who has the socket goes on listening: nobody is refused between two starts.
        connect_to("tcp", self.address(given)).close()

    def test_takes_the_protocol_from_the_name(self) -> None:
        sockets = [self.listening(), self.listening(socket.AF_UNIX, self.file), self.listening()]
        server = self.start(sockets, listeners=3, names="ws/chat:whatever:msgtrans.socket")
        self.assertEqual(
            server.addresses,
            [("ws", self.address(sockets[0]) + "/chat"), ("unix", self.file), ("tcp", self.address(sockets[2]))],
        )
        self.ask("unix", self.file)
        self.ask("tcp", self.address(sockets[2]))
        answered = run_tool(TOOL, "send", f"ws://{self.address(sockets[0])}/chat", "--request", "hello")
        self.assertEqual((answered.stdout, answered.status), ("hello\n", 0))
        server.stop()
        self.assertTrue(os.path.exists(self.file), "the file is systemd's")

    def test_gives_a_socket_to_the_argument_with_its_address(self) -> None:
        given = self.listening()
        server = self.start([given], "--ws", self.address(given) + "/x", "--tcp", "127.0.0.1:0", listeners=2)
        self.assertEqual(server.addresses[1], ("ws", self.address(given) + "/x"))
        self.ask(*server.addresses[0])
        server.stop()

    def test_hands_them_over_as_well(self) -> None:
        sockets = [self.listening(), self.listening(socket.AF_UNIX, self.file)]
        server = self.start(sockets, listeners=2)
        for generation in (2, 3):
            old = server.hand_over()
            self.assertEqual(server.wait_listening(generation), server.addresses)
            eventually(lambda: server.gone(old), "the predecessor ends", DEADLINE)
            for where in server.addresses:
                self.ask(*where)
        server.stop()
        self.assertTrue(os.path.exists(self.file), "the file is systemd's")

    def test_ignores_what_is_for_another_process(self) -> None:
        given = self.listening()
        server = self.start([given], "--tcp", "127.0.0.1:0", listeners=1, process=str(os.getpid()))
        self.assertNotEqual(server.addresses[0][1], self.address(given))
        self.ask(*server.addresses[0])
        server.stop()

    def fails(self, sockets: list[socket.socket], *said: str, **options: str) -> None:
        done = subprocess.run(
            self.command(sockets, **options),
            pass_fds=[one.fileno() for one in sockets],
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        self.assertEqual(done.returncode, 1, done.stderr)
        for what in said:
            self.assertIn(what, done.stderr)

    def test_says_what_is_wrong_with_a_descriptor(self) -> None:
        given = self.listening()
        self.fails([given], "descriptor 4 of LISTEN_FDS=2", "Bad file descriptor", count="2")
        self.fails([given], 'LISTEN_FDS is "many"', count="many")
        self.fails([given], 'LISTEN_FDNAMES is "a:b"', names="a:b")
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(datagrams.close)
        self.fails([datagrams], "descriptor 3 is no stream socket")

    def test_systemd_is_told_when_it_is_ready_and_by_whom(self) -> None:
        told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(told.close)
        told.bind(str(pathlib.Path(self.directory.name) / "notify"))
        told.settimeout(DEADLINE)
        environment = {**os.environ, "NOTIFY_SOCKET": told.getsockname()}
        server = self.serve("--tcp", "127.0.0.1:0", listeners=1, env=environment)
        self.assertEqual(told.recv(1000).decode(), f"READY=1\nMAINPID={server.process}")
        server.hand_over()
        self.assertEqual(told.recv(1000).decode(), f"READY=1\nMAINPID={server.process}")
        server.stop()


class DrainTest(ServerTest):
    def test_sigterm_answers_what_was_asked_and_ends(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            server = self.serve("--tcp", "127.0.0.1:0", "--shards", "2", listeners=1)
            host, port = server.addresses[0][1].rsplit(":", 1)
            clients = [wire_client.Client(host, int(port)) for _ in range(8)]
            large = b"x" * 1_000_000
            for client in clients:
                self.assertEqual(client.request(b"hello").payload, b"hello")
            asked = [client.start_request(large) for client in clients]
            # All has arrived, and is being answered, when the first bytes come back.
            for client in clients:
                client.raw_socket.recv(1, socket.MSG_PEEK)
            os.kill(server.process, number)
            for client, message_id in zip(clients, asked):
                self.assertEqual(client.response(message_id).payload, large)
                self.assertEqual(client.wait_end(DEADLINE), [])
                client.close()
            eventually(lambda: server.gone(server.process), "the server ends", DEADLINE)
            self.assertEqual(server.first.returncode, 0)


if __name__ == "__main__":
    unittest.main(verbosity=2)
