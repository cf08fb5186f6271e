# SPDX-License-Identifier: Apache-2.0
"""`msgtrans serve` under real pressure: peers that stop reading, that are stopped or killed, that come by the thousand
and say next to nothing, that send the largest packets; a server without file descriptors, or killed itself.

In every case bystander sessions are served all the time and must notice nothing, and what the server's memory grows by
is printed and bounded.

    python3 tests/integration/pressure_test.py build/.../msgtrans [unittest's arguments]
"""

from __future__ import annotations

import os
import random
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from tool_fixture import Bystander, Finished, ToolServer, eventually, sanitizer_memory, start_bench
from wire_client import ONE_WAY, REQUEST, Client, ConnectionEnded, Packet, encode, encode_header

TOOL = os.environ.get("MSGTRANS_TOOL", "")

KIB, MIB = 1 << 10, 1 << 20

#: Not to wait for what should happen: far beyond what a loaded machine needs.
PATIENCE = 30.0

#: What the server says of a session that ended because its peer took nothing for the time of `--write-stall`.
WRITE_STALLED = "peer stopped reading"
#: The same of `--idle-timeout`.
IDLE = "idle for too long"

#: What a sanitizer's shadow memory and its store of freed blocks may add to a process.
SANITIZER_MEMORY = 0


def setUpModule() -> None:
    global SANITIZER_MEMORY
    SANITIZER_MEMORY = sanitizer_memory(TOOL, 1024 * MIB)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # the server's too


def as_many_as(wanted: int) -> int:
    """So many connections, or what the limit of open files allows."""
    return min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200)


def cpu_seconds(process: subprocess.Popen[str]) -> float:
    with open(f"/proc/{process.pid}/stat", encoding="ascii") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class PressureCase(unittest.TestCase):
    maxDiff = 1000

    def serve(self, *options: str) -> ToolServer:
        self.server = ToolServer(TOOL, "--shards", "2", "--verbose", *options)
        self.addCleanup(self.server.kill)
        self.bystander = Bystander(self.server.address)
        self.bystander.check()
        self.before = self.server.resident_bytes()
        self.sockets = self.server.sockets()
        return self.server

    def connect(self, **options: object) -> Client:
        client = self.server.connect(timeout=PATIENCE, **options)
        self.addCleanup(client.close)
        return client

    def assert_memory(self, what: str, growth: int) -> None:
        """The server has grown by less than `growth` bytes since `serve`."""
        grown = self.server.resident_bytes() - self.before
        print(f"{what}: the server's resident memory grew by {grown / MIB:.1f} MiB", flush=True)
        self.assertLess(grown, growth + SANITIZER_MEMORY, f"{what}: the server's memory grows")

    def assert_all_gone(self) -> None:
        """Only listeners and bystanders are left."""
        eventually(lambda: self.server.sockets() <= self.sockets, "the other sessions end", PATIENCE)

    def finish(self, **expected: int) -> Finished:
        """The bystanders saw nothing, and the server stops in order."""
        self.bystander.check(timeout=PATIENCE)
        self.bystander.stop()
        done = self.server.stop(timeout=PATIENCE)
        self.assertEqual(done.status, 0, done.stderr)
        summary = done.summary()
        self.assertEqual({key: summary[key] for key in expected}, expected)
        self.assertEqual(summary["sessions_cut"], 0)
        return done


class Readers(PressureCase):
    def test_one_that_stops_reading_while_a_thousand_are_served(self) -> None:
        self.serve("--write-stall", "4", "--outbound-limit", str(256 * KIB))
        many = [self.connect() for _ in range(as_many_as(1000))]
        self.before = self.server.resident_bytes()
        stuck = self.connect(receive_buffer=4096)
        question = encode(Packet(REQUEST, 1, bytes(64 * KIB)))
        stuck.raw_socket.setblocking(False)
        sent = 0

        def push() -> bool:
            """False once it takes nothing more."""
            nonlocal sent
            try:
                while True:
                    sent += stuck.raw_socket.send(question[sent % len(question) :])
            except BlockingIOError:
                return False
            except ConnectionError:
                return True

        served = 0
        for _ in range(3):
            push()
            asked = [client.start_request(b"still there?") for client in many]
            for client, message_id in zip(many, asked):
                self.assertEqual(client.response(message_id).payload, b"still there?")
                served += 1
            self.bystander.check(timeout=PATIENCE)
        self.assertEqual(served, 3 * len(many))
        self.assertGreater(sent, 256 * KIB)
        # Its queue, what was read of it and not yet answered, and little else.
        self.assert_memory(f"a reader that took nothing, beside {len(many)} that were served", 16 * MIB)
        eventually(push, "the one that does not read is given up", PATIENCE)
        for client in many:
            client.close()
        self.assert_all_gone()
        done = self.finish(protocol_errors=0, refused=0)
        self.assertEqual(done.stderr.count(WRITE_STALLED), 1)


class Crowds(PressureCase):
    def test_ten_thousand_that_send_a_byte_now_and_then(self) -> None:
        self.serve("--first-packet-timeout", "6")
        count = as_many_as(10_000)
        header = encode_header(type=ONE_WAY, payload_len=100)
        crowd = []
        for _ in range(count):
            one = socket.create_connection((self.server.address.host, self.server.address.port), PATIENCE)
            self.addCleanup(one.close)
            one.sendall(header[:3])
            crowd.append(one)
        self.bystander.check(timeout=PATIENCE)
        self.assert_memory(f"{count} connections that hold a header back", count * 3 * KIB)
        for one in crowd:  # which does not put off the end
            try:
                one.sendall(header[3:4])
            except ConnectionError:
                pass
        self.bystander.check(timeout=PATIENCE)
        self.assert_all_gone()
        for one in crowd:
            one.close()
        self.assertEqual(self.connect().request(b"and now?").payload, b"and now?")
        done = self.finish(protocol_errors=0, refused=0)
        self.assertEqual(done.summary()["sessions"], count + 5)

    def test_a_storm_of_connects_and_disconnects(self) -> None:
        self.serve()
        rounds = 4000
        numbers = random.Random(1)
        request = encode(Packet(REQUEST, 1, b"x" * 100))
        host, port = self.server.address.host, self.server.address.port
        for i in range(rounds):
            one = socket.create_connection((host, port), PATIENCE)
            match numbers.randrange(4):
                case 0:
                    pass
                case 1:
                    one.sendall(request[: numbers.randrange(1, len(request))])
                case 2:
                    one.sendall(request * 3)
                case 3:
                    one.sendall(request)
                    one.recv(10)
            if numbers.randrange(2):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
            one.close()
            if i == rounds // 4:
                self.assert_all_gone()
                self.before = self.server.resident_bytes()
        self.assert_all_gone()
        self.assert_memory(f"a storm of {rounds} connections", 8 * MIB)
        self.finish(protocol_errors=0, refused=0)

    def test_a_flood_of_the_largest_packets(self) -> None:
        largest = 4 * MIB
        self.serve("--max-message", str(largest))
        peers, packets = 6, 5
        question = bytes(range(256)) * (largest // 256)
        wrong: list[BaseException] = []
        peak = [0]

        def flood() -> None:
            try:
                with Client(self.server.address.host, self.server.address.port, timeout=60) as client:
                    sender = threading.Thread(
                        target=lambda: [client.raw_socket.sendall(one) for one in questions], daemon=True
                    )
                    sender.start()
                    for _ in range(packets):
                        if client.next_packet().payload != question:
                            raise AssertionError("a wrong answer")
                    sender.join()
            except BaseException as error:
                wrong.append(error)

        questions = [encode(Packet(REQUEST, i + 1, question)) for i in range(packets)]
        threads = [threading.Thread(target=flood, daemon=True) for _ in range(peers)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            peak[0] = max(peak[0], self.server.resident_bytes())
            time.sleep(0.01)
        self.assertEqual(wrong, [])
        # For each: the packet that comes in, its answer, and what of either is being copied.
        grown = peak[0] - self.before
        print(f"{peers} peers with packets of {largest // MIB} MiB: at most {grown / MIB:.1f} MiB more", flush=True)
        self.assertLess(grown, peers * 4 * largest + 32 * MIB + SANITIZER_MEMORY)
        self.assert_all_gone()
        self.assert_memory("after the flood", 64 * MIB)
        self.finish(protocol_errors=0, refused=0, dropped=0)


class Processes(PressureCase):
    def bench(self, *options: str) -> subprocess.Popen[str]:
        process = start_bench(self, TOOL, self.server.address.url, "--pipeline", "8", *options)
        eventually(lambda: cpu_seconds(process) >= 0.1, "the clients talk", PATIENCE)
        return process

    def test_a_client_that_is_stopped_goes_on_where_it_was(self) -> None:
        self.serve()
        client = self.bench("--duration", "2")
        client.send_signal(signal.SIGSTOP)
        self.bystander.check(100, timeout=PATIENCE)
        client.send_signal(signal.SIGCONT)
        said, problems = client.communicate(timeout=PATIENCE)
        self.assertEqual(client.returncode, 0, problems)
        self.assertIn("messages/s", said)
        self.assert_all_gone()
        self.finish(dropped=0, protocol_errors=0)

    def test_a_client_that_stays_stopped_is_given_up(self) -> None:
        self.serve("--idle-timeout", "1")
        client = self.bench("--duration", "3")
        client.send_signal(signal.SIGSTOP)
        try:
            self.assert_all_gone()
            self.bystander.check(timeout=PATIENCE)
        finally:
            client.send_signal(signal.SIGCONT)
        _, problems = client.communicate(timeout=PATIENCE)
        self.assertEqual(client.returncode, 1, problems)
        self.assertEqual(self.finish(protocol_errors=0).stderr.count(IDLE), 4)

    def test_a_client_that_is_killed_leaves_nothing(self) -> None:
        self.serve()
        for _ in range(3):
            client = self.bench("--duration", "60", "--size", "10000")
            client.kill()
            client.wait(PATIENCE)
            self.assert_all_gone()
            self.bystander.check(timeout=PATIENCE)
        done = self.finish(protocol_errors=0)
        self.assertEqual(done.summary()["sessions"], 4 + 3 * 4)

    def test_a_server_that_is_stopped_goes_on_where_it_was(self) -> None:
        self.serve()
        client = self.connect()
        asked = [client.start_request(b"%d" % i) for i in range(100)]
        self.server.send_signal(signal.SIGSTOP)
        asked += [client.start_request(b"%d" % i) for i in range(100, 200)]
        late = self.connect()  # by the kernel, which knows of no stop
        waits = late.start_request(b"late")
        time.sleep(0.5)
        self.server.send_signal(signal.SIGCONT)
        self.assertEqual([client.response(one).payload for one in asked], [b"%d" % i for i in range(200)])
        self.assertEqual(late.response(waits).payload, b"late")
        client.close()
        late.close()
        self.finish(dropped=0, protocol_errors=0)

    def test_clients_of_a_server_that_is_killed_are_told(self) -> None:
        self.serve()
        client = self.bench("--duration", "3")
        raw = self.connect()
        raw.request(b"hello")
        try:
            self.bystander.stop()
        finally:
            self.server.process.kill()
        _, problems = client.communicate(timeout=PATIENCE)
        self.assertEqual(client.returncode, 1)
        self.assertRegex(problems, "closed|reset|lost|ended")
        with self.assertRaises(ConnectionEnded):
            raw.receive(PATIENCE)


class Descriptors(PressureCase):
    def test_accepting_goes_on_after_the_last_descriptor_was_taken(self) -> None:
        self.serve()
        limits = resource.prlimit(self.server.process.pid, resource.RLIMIT_NOFILE)
        room = 20
        used = max(int(name) for name in os.listdir(f"/proc/{self.server.process.pid}/fd")) + 1
        resource.prlimit(self.server.process.pid, resource.RLIMIT_NOFILE, (used + room, limits[1]))
        clients = [self.connect() for _ in range(3 * room)]
        asked = [(client, client.start_request(b"me?")) for client in clients]
        served: set[Client] = set()

        def answers(seconds: float) -> None:
            """Notes whom an answer has come for."""
            with selectors.DefaultSelector() as selector:
                for client, message_id in asked:
                    if client not in served:
                        selector.register(client.raw_socket, selectors.EVENT_READ, (client, message_id))
                end = time.monotonic() + seconds
                while (left := end - time.monotonic()) > 0 and selector.get_map():
                    for key, _ in selector.select(left):
                        client, message_id = key.data
                        self.assertEqual(client.response(message_id).payload, b"me?")
                        served.add(client)
                        selector.unregister(client.raw_socket)

        begun = cpu_seconds(self.server.process)
        answers(2)
        spent = cpu_seconds(self.server.process) - begun
        print(f"without descriptors for 2 s: {len(served)} of {len(clients)} served, {spent:.2f} s of CPU time")
        self.assertGreater(len(served), 0)
        self.assertLess(len(served), len(clients))
        self.bystander.check(timeout=PATIENCE)
        # Those who go make room for those who wait.
        gone = list(served)[:5]
        for client in gone:
            client.close()
        before = len(served)
        eventually(lambda: answers(0.2) or len(served) >= before + 5, "those who waited are served", PATIENCE)
        # So does a higher limit.
        resource.prlimit(self.server.process.pid, resource.RLIMIT_NOFILE, limits)
        eventually(lambda: answers(0.2) or len(served) == len(clients), "all are served", PATIENCE)
        for client in clients:
            client.close()
        self.assert_all_gone()
        done = self.finish(protocol_errors=0, dropped=0)
        self.assertGreater(done.summary()["accept_failures"], 0)


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        TOOL = sys.argv.pop(1)
    unittest.main()
