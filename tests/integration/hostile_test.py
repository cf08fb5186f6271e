# SPDX-License-Identifier: Apache-2.0
"""`msgtrans serve` against peers that break the rules, and the command line of the tool against users who do.

Each kind of bad input meets a real server while bystander sessions ask and are answered all the time. The offender's
session must end (or, where the protocol says so, must not), the others must notice nothing, memory must stay bounded,
and when the server is stopped every count of its summary must agree with what was sent and received.

    MSGTRANS_TOOL=build/.../msgtrans python3 -m unittest tests/integration/hostile_test.py
    python3 tests/integration/hostile_test.py build/.../msgtrans [unittest's arguments]
"""

from __future__ import annotations

import errno
import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
import zlib

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import payloads
from tool_fixture import (
    Address,
    Bystander,
    Finished,
    ScriptedServer,
    ToolServer,
    eventually,
    has_ipv6,
    run_tool,
    sanitizer_memory,
    unused_port,
)
from wire_client import (
    FRAGMENTED,
    NONE,
    ONE_WAY,
    REQUEST,
    RESPONSE,
    ZLIB,
    ZSTD,
    Client,
    ConnectionEnded,
    Decoder,
    MessageIds,
    Packet,
    ProtocolError,
    encode,
    encode_header,
)

TOOL = os.environ.get("MSGTRANS_TOOL", "")

KIB, MIB = 1 << 10, 1 << 20

#: "At once": below every timeout of the server that could end a session too, unless the test sets it.
AT_ONCE = 6.0

#: What a sanitizer's shadow memory and its store of freed blocks may add to a process.
SANITIZER_MEMORY = 0


def setUpModule() -> None:
    global SANITIZER_MEMORY
    SANITIZER_MEMORY = sanitizer_memory(TOOL, 768 * MIB)


class ServerCase(unittest.TestCase):
    """One server a test, with bystanders; `finish` stops it and compares its summary with what the clients counted."""

    def serve(self, *options: str, bystanders: bool = True, **more: object) -> ToolServer:
        self.server = ToolServer(TOOL, *options, **more)  # type: ignore[arg-type]
        self.addCleanup(self.server.kill)
        self.clients: list[Client] = []
        self.bystander = Bystander(self.server.address) if bystanders else None
        if self.bystander:
            self.bystander.check()
        return self.server

    def connect(self, **options: object) -> Client:
        client = self.server.connect(**options)
        self.addCleanup(client.close)
        self.clients.append(client)
        return client

    def assert_memory(self, before: int, growth: int) -> None:
        """The server has grown by less than `growth` bytes since it had `before`."""
        self.assertLess(self.server.resident_bytes() - before, growth + SANITIZER_MEMORY, "the server's memory grows")

    def check_others(self) -> None:
        assert self.bystander is not None
        self.bystander.check()

    def finish(self, number: int = signal.SIGTERM, **expected: int) -> Finished:
        """`expected` counts are zero where not given."""
        if self.bystander:
            self.clients += self.bystander.stop()
        for client in self.clients:
            client.close()
        done = self.server.stop(number)
        self.assertEqual(done.status, 0, done.stderr)
        want = {
            "sessions": len(self.clients),
            "packets_in": sum(client.packets_sent for client in self.clients),
            "packets_out": sum(client.packets_received for client in self.clients),
            "dropped": 0,
            "protocol_errors": 0,
            "unmatched_responses": 0,
            "refused": 0,
            **expected,
        }
        summary = done.summary()
        self.assertEqual({key: summary.get(key) for key in want}, want)
        return done

    def assert_ends(self, client: Client, within: float = AT_ONCE, after: float = 0.0, begun: float = 0.0) -> None:
        """The session ends, with nothing sent to it before, not later than `within` from now, and not earlier than
        `after` from `begun`."""
        try:
            came = client.wait_end(within)
        except TimeoutError:
            self.fail(f"the session is still open after {within} s")
        self.assertEqual(came, [])
        if after:
            self.assertGreater(time.monotonic() - begun, after, "the session ended too early")


class BadPackets(ServerCase):
    """What breaks the protocol ends its session at once, is counted, and is never answered."""

    def offend(self, data: bytes) -> None:
        """A session that was served before, sends `data`, and behind it a good request that must never be served."""
        client = self.connect()
        self.assertEqual(client.request(b"before", biz_type=1).payload, b"before")
        hidden = encode(Packet(REQUEST, 77, b"hidden behind a bad packet"))
        try:
            client.send_raw(data + hidden)
        except ConnectionEnded:
            pass
        self.assert_ends(client)

    def offend_all(self, cases: dict[str, bytes], *options: str, named: str | None = None) -> None:
        """Each case ends its session, and the reason that is given for it holds each word of the case's name."""
        self.serve("--verbose", *options)
        for name, data in cases.items():
            with self.subTest(name):
                self.offend(data)
                self.check_others()
        said = self.finish(protocol_errors=len(cases)).stderr
        reasons = [line for line in said.splitlines() if " ended: " in line]
        for name in cases:
            words = (named or name).split()
            self.assertTrue(any(all(word in line for word in words) for line in reasons), f"{words} in\n{said}")

    def test_garbage_ends_the_session(self) -> None:
        noise = random.Random(1)
        self.offend_all(
            {
                "another protocol": b"GET / HTTP/1.1\r\nHost: example.com\r\n\r\n",
                "zeros": bytes(4096),
                "ones": b"\xff" * 4096,
                "noise": b"\xa5" + noise.randbytes(100_000),
                "noise after a good version": b"\x01\xa5" + noise.randbytes(100_000),
            },
            named="version 71",
        )

    def test_a_wrong_version_ends_the_session(self) -> None:
        self.offend_all({f"version {v}": encode_header(version=v) for v in (0, 2, 255)})

    def test_an_unknown_compression_ends_the_session(self) -> None:
        self.offend_all(
            {f"compression {c}": encode_header(compression=c, payload_len=1) + b"x" for c in (3, 4, 255)}
        )

    def test_an_unknown_type_ends_the_session(self) -> None:
        self.offend_all({f"type {t}": encode_header(type=t) for t in (3, 4, 255)})

    def test_the_fragment_flag_ends_the_session(self) -> None:
        self.offend_all({f"flags {f}": encode_header(flags=f) for f in (FRAGMENTED, 0x0007, 0xFFFF)})

    def test_a_payload_len_over_the_limit_ends_the_session(self) -> None:
        lengths = (1001, 16 * MIB, 0x7FFFFFFF, 0xFFFFFFFF)
        self.offend_all(
            {f"payload_len {n}": encode_header(payload_len=n) for n in lengths}, "--max-message", "1000"
        )

    def test_a_header_alone_over_the_limit_ends_the_session_at_once_and_takes_no_memory(self) -> None:
        # No timeout of the server is near, so what ends the session is the header itself.
        server = self.serve("--max-message", "1000", "--first-packet-timeout", "60", "--idle-timeout", "60")
        before = server.resident_bytes()
        for length in (1001, 1 << 30, 0xFFFFFFFF):
            with self.subTest(length):
                client = self.connect()
                client.send_raw(encode_header(type=REQUEST, payload_len=length))
                self.assert_ends(client)
                self.check_others()
        self.assert_memory(before, 8 * MIB)
        self.finish(protocol_errors=3)

    def test_a_payload_of_the_limit_itself_is_served(self) -> None:
        self.serve("--max-message", "1000")
        client = self.connect()
        self.assertEqual(client.request(b"x" * 1000).payload, b"x" * 1000)
        for compression, payload in ((ZSTD, payloads.zstd_run(b"y", 1000)), (ZLIB, b"y" * 1000)):
            self.assertEqual(client.request(payload, compression=compression).payload, b"y" * 1000)
        self.finish()

    def test_flags_that_are_ignored_do_not_end_the_session(self) -> None:
        self.serve()
        client = self.connect()
        for bit in range(1, 16):
            self.assertEqual(client.request(b"flag", flags=1 << bit).payload, b"flag", f"bit {bit}")
        self.finish()

    def test_many_offenders_at_once(self) -> None:
        self.serve("--max-message", "100000")
        bad = [
            b"garbage, and more of it",
            encode_header(version=9),
            encode_header(compression=9),
            encode_header(type=9),
            encode_header(flags=FRAGMENTED),
            encode_header(payload_len=100001),
        ]
        offenders = [self.connect() for _ in range(20 * len(bad))]
        for index, client in enumerate(offenders):
            client.send_raw(bad[index % len(bad)])
        for client in offenders:
            self.assert_ends(client)
        self.check_others()
        self.finish(protocol_errors=len(offenders))


class BadCompression(ServerCase):
    """The limit holds while decompressing; what does not decompress is never passed on."""

    def offend_with(self, cases: dict[str, tuple[int, bytes]], *options: str) -> None:
        server = self.serve(*options)
        before = server.resident_bytes()
        for name, (compression, payload) in cases.items():
            with self.subTest(name):
                client = self.connect()
                header = encode_header(compression=compression, type=REQUEST, payload_len=len(payload))
                client.send_raw(header + payload)
                self.assert_ends(client)
                self.check_others()
        self.assert_memory(before, 24 * MIB)
        self.finish(protocol_errors=len(cases))

    def test_decompression_bombs_end_the_session_within_bounded_memory(self) -> None:
        gib = 1 << 30
        self.offend_with(
            {
                "zlib, 256 MiB": (ZLIB, payloads.zlib_run(b"\0", 256 * MIB)),
                "zlib, one byte over": (ZLIB, payloads.zlib_run(b"\0", MIB + 1)),
                "zstd, 8 GiB": (ZSTD, payloads.zstd_run(b"\0", 8 * gib)),
                "zstd, 8 GiB, and it says so": (ZSTD, payloads.zstd_run(b"\0", 8 * gib, announce=8 * gib)),
                "zstd, 1 GiB that says it is 10 bytes": (ZSTD, payloads.zstd_run(b"\0", gib, announce=10)),
                "zstd, one byte over": (ZSTD, payloads.zstd_run(b"\0", MIB + 1)),
                "zstd, two frames, each below": (ZSTD, 2 * payloads.zstd_run(b"\0", MIB - 1000)),
            },
            "--max-message",
            str(MIB),
        )

    def test_a_payload_that_does_not_decompress_ends_the_session(self) -> None:
        good = zlib.compress(b"good " * 100)
        wrong_sum = good[:-1] + bytes([good[-1] ^ 1])
        frame = payloads.ZSTD_FRAME
        self.offend_with(
            {
                "zlib, plain text": (ZLIB, b"this was never compressed"),
                "zlib, cut": (ZLIB, good[:-6]),
                "zlib, wrong checksum": (ZLIB, wrong_sum),
                "zlib, raw deflate": (ZLIB, good[2:-4]),
                "zlib, bytes behind the end": (ZLIB, good + b"junk"),
                "zlib, but a zstd frame": (ZLIB, frame),
                "zstd, plain text": (ZSTD, b"this was never compressed"),
                "zstd, cut": (ZSTD, frame[:-10]),
                "zstd, wrong checksum": (ZSTD, frame[:-1] + bytes([frame[-1] ^ 1])),
                "zstd, bytes behind the end": (ZSTD, frame + b"junk"),
                "zstd, but a zlib stream": (ZSTD, good),
            }
        )


class Silence(ServerCase):
    """Peers that begin and do not go on."""

    def test_a_header_and_then_silence_ends_by_the_first_packet_timeout(self) -> None:
        self.serve("--first-packet-timeout", "0.6")
        for name, data in {
            "not a byte": b"",
            "half a header": encode_header(payload_len=10)[:8],
            "a header": encode_header(payload_len=10),
            "half a payload": encode_header(payload_len=10) + b"12345",
        }.items():
            with self.subTest(name):
                begun = time.monotonic()
                client = self.connect()
                client.send_raw(data)
                self.assert_ends(client, after=0.5, begun=begun)
                self.check_others()
        # Late or broken off is not against the protocol.
        self.finish()

    def test_a_byte_now_and_then_does_not_put_off_the_first_packet_timeout(self) -> None:
        self.serve("--first-packet-timeout", "0.6")
        client = self.connect()
        begun = time.monotonic()
        data = encode_header(payload_len=1000) + bytes(1000)
        for byte in data:
            try:
                client.send_raw(bytes([byte]))
                self.assertEqual(client.wait_end(timeout=0.05), [])
                break
            except TimeoutError:
                self.assertLess(time.monotonic() - begun, AT_ONCE, "a session that drips bytes is still open")
            except ConnectionEnded:
                break
        self.assertGreater(time.monotonic() - begun, 0.5)
        self.check_others()
        self.finish()

    def test_the_first_packet_timeout_spares_a_session_that_sent_its_first_packet(self) -> None:
        self.serve("--first-packet-timeout", "0.4")
        quiet, watch = self.connect(), self.connect()
        self.assertEqual(quiet.request(b"first").payload, b"first")
        self.assert_ends(watch)
        self.assertEqual(quiet.request(b"after the timeout").payload, b"after the timeout")
        self.finish()

    def test_the_idle_timeout_ends_a_session_that_sends_nothing_more(self) -> None:
        self.serve("--idle-timeout", "0.6")
        idle, busy = self.connect(), self.connect()
        begun = time.monotonic()
        idle.request(b"once")
        ended = False
        while not ended:
            self.assertEqual(busy.request(b"busy").payload, b"busy")
            try:
                self.assertEqual(idle.wait_end(timeout=0.05), [])
                ended = True
            except TimeoutError:
                self.assertLess(time.monotonic() - begun, AT_ONCE, "an idle session is still open")
        self.assertGreater(time.monotonic() - begun, 0.5)
        self.assertEqual(busy.request(b"still").payload, b"still")
        self.finish()

    def test_half_a_packet_and_then_close_disturbs_nobody(self) -> None:
        server = self.serve()
        sockets = server.sockets()
        whole = encode(Packet(REQUEST, 1, b"0123456789", extension=b"ext"))
        for cut in (1, 15, 16, 18, 20, len(whole) - 1):
            with self.subTest(cut=cut, end="orderly"):
                client = self.connect()
                client.send_raw(whole[:cut])
                client.half_close()
                self.assert_ends(client)
            with self.subTest(cut=cut, end="reset"):
                client = self.connect()
                # Served once, so that the server has accepted it before it vanishes.
                self.assertEqual(client.request(b"here").payload, b"here")
                client.send_raw(whole[:cut])
                client.reset()
            self.check_others()
        for client in self.clients:
            client.close()
        eventually(lambda: server.sockets() <= sockets, "all sockets of ended sessions closed")
        self.finish()

    def test_half_close_still_gets_every_answer(self) -> None:
        self.serve()
        client = self.connect()
        ids = [client.start_request(b"%d" % i * 1000) for i in range(200)]
        client.half_close()
        for i, message_id in enumerate(ids):
            self.assertEqual(client.response(message_id).payload, b"%d" % i * 1000)
        self.assert_ends(client)
        self.finish()


class Flood(ServerCase):
    """Peers that send and never read."""

    def flood(self, client: Client, data: bytes, until_ended: float | None = None) -> int:
        """Writes `data` again and again and never reads: until the server takes no more for half a second, or, if
        `until_ended`, until the connection is gone (at the latest after so many seconds). Returns the bytes taken."""
        raw = client.raw_socket
        raw.setblocking(False)
        poll = select.poll()
        poll.register(raw, select.POLLOUT | select.POLLRDHUP)
        begun = time.monotonic()
        deadline = None if until_ended is None else begun + until_ended
        taken = 0
        while True:
            events = poll.poll(500)
            if events and events[0][1] & (select.POLLHUP | select.POLLERR | select.POLLRDHUP):
                self.assertIsNotNone(until_ended, "the session ended")
                return taken
            if deadline is not None and time.monotonic() > deadline:
                self.fail(f"the session is still open after {until_ended} s")
            if not events:
                if deadline is None:
                    return taken
                continue
            try:
                taken += raw.send(data[taken % len(data) :])
            except BlockingIOError:
                pass
            except ConnectionError:
                self.assertIsNotNone(until_ended, "the session ended")
                return taken
            # The kernel's buffers on the way there and back, and the server's own limit, are far below this.
            self.assertLess(taken, 128 * MIB, "the server takes without end from a peer that never reads")
            self.assertLess(time.monotonic() - begun, 20, "the server takes without end, though slowly")

    def test_a_peer_that_never_reads_is_held_back_and_ends_by_the_write_stall(self) -> None:
        server = self.serve("--write-stall", "1.5", "--outbound-limit", str(MIB))
        before = server.resident_bytes()
        client = self.connect(receive_buffer=4096)
        begun = time.monotonic()
        request = encode(Packet(REQUEST, 1, bytes(64 * KIB)))
        self.flood(client, request, until_ended=15)
        self.assertGreater(time.monotonic() - begun, 1.2, "it ended before the write stall deadline")
        self.assert_memory(before, 16 * MIB)
        self.check_others()
        self.finish_flood()

    def test_memory_is_bounded_for_many_small_requests_that_nobody_reads_the_answers_of(self) -> None:
        server = self.serve("--outbound-limit", str(64 * KIB))
        before = server.resident_bytes()
        burst = b"".join(encode(Packet(REQUEST, i + 1, b"x" * 8)) for i in range(4096))
        for _ in range(4):
            self.flood(self.connect(receive_buffer=4096), burst)
            self.check_others()
        self.assert_memory(before, 16 * MIB)
        for client in self.clients:
            client.reset()
        self.finish_flood()

    def test_a_held_back_peer_gets_every_answer_once_it_reads(self) -> None:
        self.serve("--outbound-limit", str(64 * KIB))
        for _ in range(5):
            self.flood_and_then_read(REQUEST, RESPONSE)
        self.check_others()
        self.finish()

    def test_echoes_are_answers_and_are_neither_dropped_nor_a_reason_to_close(self) -> None:
        for policy in ("wait", "drop-oldest", "close"):
            with self.subTest(policy):
                self.serve("--slow-consumer", policy, "--outbound-limit", str(64 * KIB))
                self.flood_and_then_read(ONE_WAY, ONE_WAY)
                self.check_others()
                self.finish()

    def flood_and_then_read(self, type_: int, expected: int) -> None:
        """Fills the server with packets of 10 KiB until it holds the sender back, and then takes back every one."""
        client = self.connect(receive_buffer=4096)
        packet = encode(Packet(type_, 1, bytes(range(256)) * 40, 3))
        taken = self.flood(client, packet)
        count = taken // len(packet)
        self.assertGreater(count, 10)
        client.packets_sent += count
        for _ in range(count):
            came = client.next_packet()
            self.assertEqual((came.type, came.payload, came.biz_type), (expected, packet[16:], 3))

    def finish_flood(self) -> None:
        """What a peer that is cut off was sent and never read nobody can count; the bystanders' share is exact."""
        if self.bystander:
            self.clients += self.bystander.stop()
        done = self.server.stop()
        self.assertEqual(done.status, 0, done.stderr)
        summary = done.summary()
        self.assertEqual(summary["sessions"], len(self.clients))
        self.assertEqual((summary["protocol_errors"], summary["refused"], summary["unmatched_responses"]), (0, 0, 0))
        self.assertGreaterEqual(summary["packets_out"], sum(client.packets_received for client in self.clients))
        # Every packet that was handed out was answered, or its answer is counted as dropped.
        self.assertEqual(summary["packets_in"], summary["packets_out"] + summary["dropped"])


class Compression(ServerCase):
    def test_is_off_unless_asked_for(self) -> None:
        self.serve(bystanders=False)
        self.assertEqual(self.connect().request(b"a" * 10_000, compression=ZLIB).compression, NONE)
        summary = self.finish().summary()
        self.assertEqual([value for key, value in summary.items() if "compress" in key], [0, 0, 0, 0])

    def test_what_gets_smaller_is_compressed_from_the_size_on_and_counted(self) -> None:
        self.serve("--compress", "zlib", "--compress-above", "1000", bystanders=False)
        client = self.connect()
        noise = os.urandom(1000)
        for payload, compression in ((b"a" * 999, NONE), (b"a" * 1000, ZLIB), (b"b" * 50_000, ZLIB), (noise, NONE)):
            answer = client.request(payload, biz_type=3)
            self.assertEqual((answer.payload, answer.compression, answer.biz_type), (payload, compression, 3))
        summary = self.finish(compressed_packets=2, compressed_bytes_before=51_000, incompressible_packets=1).summary()
        self.assertEqual(summary["compressed_bytes_after"], summary["bytes_out"] - 4 * 16 - 999 - 1000)

    def test_zstd_too(self) -> None:
        self.serve("--compress", "zstd", bystanders=False)
        done = run_tool(TOOL, "send", self.server.address.url, "--request", "z" * 5000)
        self.assertEqual((done.status, done.stdout), (0, "z" * 5000 + "\n"))
        words = ["--compress", "zstd", "--size", "2000", "--connections", "2", "--duration", "0.3", "--json"]
        report = json.loads(run_tool(TOOL, "bench", self.server.address.url, *words).stdout)
        self.assertEqual(report["errors"], 0)
        summary = self.server.stop().summary()
        packets = report["messages"] + 2 + 1
        self.assertEqual(summary["compressed_packets"], packets)
        self.assertEqual(summary["compressed_bytes_before"], (packets - 1) * 2000 + 5000)
        self.assertLess(summary["bytes_in"], packets * 100 + 5000, "bench sent them as they are")

    def test_the_summary_for_people_tells_it_where_it_was_asked_for(self) -> None:
        for words, told in (([], False), (["--compress", "zlib"], True)):
            with self.subTest(words):
                command = [TOOL, "serve", "--tcp", "127.0.0.1:0", *words]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
                self.addCleanup(process.kill)
                assert process.stdout is not None
                url = "tcp://" + process.stdout.readline().split()[-1]
                run_tool(TOOL, "send", url, "x" * 1000)
                process.terminate()
                said, _ = process.communicate(timeout=15)
                self.assertEqual("compressed 1 payloads from 1000 bytes to" in said, told, said)
                self.assertEqual("would not get smaller" in said, told, said)


class Connections(ServerCase):
    def test_a_thousand_connections_opened_and_dropped(self) -> None:
        server = self.serve("--shards", "2")
        sockets, memory = server.sockets(), server.resident_bytes()
        for _ in range(1000):
            socket.create_connection((server.address.host, server.address.port), timeout=10).close()
        self.check_others()
        self.all_accepted()
        eventually(lambda: server.sockets() <= sockets, "all dropped connections closed")
        self.assert_memory(memory, 16 * MIB)
        self.check_others()
        self.finish(sessions=1000 + len(self.clients) + 4)

    def test_a_thousand_connections_reset_in_the_middle_of_a_packet(self) -> None:
        server = self.serve("--shards", "2")
        sockets = server.sockets()
        half = encode(Packet(REQUEST, 1, b"0123456789"))[:20]
        for _ in range(1000):
            client = server.connect()
            client.send_raw(half)
            client.reset()
        self.all_accepted()
        eventually(lambda: server.sockets() <= sockets, "all dropped connections closed")
        self.check_others()
        # A connection that is reset before it is accepted may or may not become a session.
        sessions = len(self.clients) + 4
        self.clients += self.bystander.stop()  # type: ignore[union-attr]
        summary = self.server.stop().summary()
        self.assertLessEqual(sessions, summary["sessions"])
        self.assertLessEqual(summary["sessions"], sessions + 1000)
        self.assertEqual((summary["protocol_errors"], summary["dropped"], summary["refused"]), (0, 0, 0))

    def all_accepted(self) -> None:
        """Listening queues are served in order, so once newcomers on every shard are answered, all that came before
        them were accepted. Which shard gets whom is the kernel's choice: 32 newcomers miss none."""
        newcomers = [self.connect() for _ in range(32)]
        for client in newcomers:
            self.assertEqual(client.request(b"accepted").payload, b"accepted")
        for client in newcomers:
            client.close()

    def test_max_sessions_refuses_and_counts_the_next_and_takes_it_once_there_is_room(self) -> None:
        self.serve("--max-sessions", "3", bystanders=False)
        inside = [self.connect() for _ in range(3)]
        for client in inside:
            self.assertEqual(client.request(b"inside").payload, b"inside")
        self.assert_ends(self.server.connect())
        for client in inside:
            self.assertEqual(client.request(b"still inside").payload, b"still inside")
        inside[0].close()
        refused = 1 + self.enter_eventually()
        self.finish(refused=refused)

    def test_max_sessions_per_address_counts_each_address_by_itself(self) -> None:
        self.serve("--max-sessions-per-address", "2", bystanders=False)
        inside = [self.connect() for _ in range(2)] + [self.connect(source="127.0.0.2") for _ in range(2)]
        for client in inside:
            self.assertEqual(client.request(b"inside").payload, b"inside")
        for source in ("127.0.0.1", "127.0.0.2"):
            self.assert_ends(self.server.connect(source=source))
        self.assertEqual(self.connect(source="127.0.0.3").request(b"another").payload, b"another")
        inside[1].close()
        refused = 2 + self.enter_eventually()
        self.finish(refused=refused)

    def enter_eventually(self) -> int:
        """Tries to become a session until that succeeds; returns how many tries were refused."""
        deadline = time.monotonic() + 10
        refused = 0
        while True:
            client = self.server.connect()
            try:
                self.assertEqual(client.request(b"room?").payload, b"room?")
                self.addCleanup(client.close)
                self.clients.append(client)
                return refused
            except ConnectionEnded:
                client.close()
                refused += 1
                self.assertLess(time.monotonic(), deadline, "the place of a session that ended is never given again")


class ForgedResponses(ServerCase):
    def test_unasked_responses_are_counted_and_never_delivered_and_the_session_lives(self) -> None:
        self.serve()
        client = self.connect()
        forged = [0, 1, 2, 1000, 0xFFFFFFFF, *range(1, 96)]
        for message_id in forged:
            client.send_packet(Packet(RESPONSE, message_id, b"forged", 7))
        # Were one of them echoed, it would come before this answer.
        client.send(b"after")
        self.assertEqual(client.receive().payload, b"after")
        self.assertEqual(client.request(b"and on").payload, b"and on")
        self.assertEqual(client.unmatched_responses, 0)
        self.check_others()
        self.finish(unmatched_responses=len(forged))


class EverythingAtOnce(ServerCase):
    def test_all_kinds_of_offenders_on_one_server_are_each_counted_once(self) -> None:
        server = self.serve(
            "--shards", "2", "--max-message", str(MIB), "--first-packet-timeout", "0.6", "--write-stall", "1"
        )
        before = server.resident_bytes()
        bomb = payloads.zstd_run(b"\0", 1 << 30)
        not_zlib = b"not zlib at all"
        broken = [
            b"garbage, garbage, garbage",
            encode_header(version=2),
            encode_header(compression=3),
            encode_header(type=3),
            encode_header(flags=FRAGMENTED),
            encode_header(payload_len=MIB + 1),
        ]
        undecodable = [
            encode_header(compression=ZSTD, payload_len=len(bomb)) + bomb,
            encode_header(compression=ZLIB, payload_len=len(not_zlib)) + not_zlib,
        ]
        silent = [encode_header(payload_len=100), b"\x01", b""]
        rounds = 5
        ending: list[Client] = []
        for _ in range(rounds):
            for data in broken + undecodable + silent:
                client = self.connect()
                client.send_raw(data)
                ending.append(client)
            forger = self.connect()
            forger.send_packet(Packet(RESPONSE, 5, b"forged"))
            self.assertEqual(forger.request(b"lives").payload, b"lives")
        for client in ending:
            self.assert_ends(client)
        self.check_others()
        self.assert_memory(before, 32 * MIB)
        self.finish(
            protocol_errors=rounds * len(broken + undecodable),
            unmatched_responses=rounds,
        )


class Stopping(ServerCase):
    def test_sigint_stops_like_sigterm(self) -> None:
        self.serve()
        self.check_others()
        self.finish(signal.SIGINT)

    def test_every_request_that_was_taken_is_answered_when_sigterm_comes_while_they_are_queued(self) -> None:
        server = self.serve("--drain", "10", "--outbound-limit", str(MIB), bystanders=False)
        client = self.connect(receive_buffer=64 * KIB)
        payload = os.urandom(16 * KIB)
        first = client.start_request(payload)
        self.assertEqual(client.response(first).payload, payload)
        # More than the socket buffers and the server's queue hold together: when the signal comes, answers are queued
        # in the server and requests wait in its socket.
        requests = b"".join(encode(Packet(REQUEST, i + 2, payload)) for i in range(4000))
        client.raw_socket.setblocking(False)
        written, poll = 0, select.poll()
        poll.register(client.raw_socket, select.POLLOUT)
        while written < len(requests) and poll.poll(300):
            written += client.raw_socket.send(requests[written : written + MIB])
        self.assertLess(written, len(requests), "nothing held this peer back: no answer is queued")
        # The request that is cut is finished, else the server would wait for its rest.
        cut = written % len(encode(Packet(REQUEST, 2, payload)))
        rest = requests[written : written - cut + len(encode(Packet(REQUEST, 2, payload)))] if cut else b""
        server.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        with client.raw_socket.dup() as other_end:
            other_end.settimeout(10)
            writer = threading.Thread(target=other_end.sendall, args=(rest,))
            writer.start()
            answers = client.wait_end(timeout=12)
            writer.join()
        client.close()
        done = server.wait()
        self.assertEqual(done.status, 0, done.stderr)
        self.assertLess(time.monotonic() - begun, 8, "it waited for the drain time though all was answered")
        self.assertGreater(len(answers), 1)
        self.assertEqual([a.message_id for a in answers], list(range(2, len(answers) + 2)), "answers missing")
        self.assertTrue(all(a.payload == payload for a in answers))
        summary = done.summary()
        counts = {key: summary[key] for key in ("sessions", "packets_in", "packets_out", "dropped")}
        got = len(answers) + 1
        self.assertEqual(counts, {"sessions": 1, "packets_in": got, "packets_out": got, "dropped": 0})

    def test_the_drain_time_ends_a_stop_that_a_peer_would_hold_up(self) -> None:
        server = self.serve("--drain", "0.7", bystanders=False)
        client = self.connect(receive_buffer=4096)
        flood = encode(Packet(REQUEST, 1, bytes(64 * KIB))) * 16
        client.raw_socket.setblocking(False)
        poll = select.poll()
        poll.register(client.raw_socket, select.POLLOUT)
        while poll.poll(300):
            client.raw_socket.send(flood)
        done = server.stop()
        self.assertEqual(done.status, 0, done.stderr)
        self.assertGreater(done.seconds, 0.6, "it did not wait for what was queued")
        self.assertLess(done.seconds, 3.0)
        summary = done.summary()
        self.assertGreater(summary["dropped"], 0, "answers were cut and not counted")
        self.assertEqual(summary["packets_in"], summary["packets_out"] + summary["dropped"])

    def test_a_stopping_server_takes_no_newcomers(self) -> None:
        self.serve()
        self.finish()
        with self.assertRaises(ConnectionRefusedError):
            self.server.connect()


class Listening(ServerCase):
    def test_ipv6(self) -> None:
        if not has_ipv6():
            self.skipTest("this machine has no IPv6")
        server = self.serve(listen=("[::1]:0",))
        self.assertEqual(server.address.host, "::1")
        self.assertEqual(self.connect().request(b"six").payload, b"six")
        done = run_tool(TOOL, "send", server.address.url, "--request", "six by the tool")
        self.assertEqual((done.status, done.stdout), (0, "six by the tool\n"), done.stderr)
        self.finish(sessions=6, **self.plus_one_packet())

    def test_two_listeners_share_one_server(self) -> None:
        server = self.serve("--max-sessions", "6", listen=("127.0.0.1:0", "127.0.0.2:0"))
        self.assertEqual([a.host for a in server.addresses], ["127.0.0.1", "127.0.0.2"])
        for address in server.addresses:
            client = Client(address.host, address.port)
            self.addCleanup(client.close)
            self.clients.append(client)
            self.assertEqual(client.request(b"which?").payload, b"which?")
        # The limit counts them together: with the bystanders' four, six are in.
        other = server.addresses[1]
        self.assert_ends(Client(other.host, other.port))
        self.finish(refused=1)

    def test_any_number_of_shards_serves_all(self) -> None:
        for shards in (1, 2, 5):
            with self.subTest(shards=shards):
                server = self.serve("--shards", str(shards))
                for i in range(20):
                    self.assertEqual(self.connect().request(b"%d" % i).payload, b"%d" % i)
                threads = len(os.listdir(f"/proc/{server.process.pid}/task"))
                self.assertGreaterEqual(threads, shards)
                self.finish()

    def plus_one_packet(self) -> dict[str, int]:
        """Counts for a session that was not ours and sent and received one packet."""
        clients = self.clients + self.bystander.stop()  # type: ignore[union-attr]
        self.clients, self.bystander = clients, None
        return {
            "packets_in": sum(client.packets_sent for client in clients) + 1,
            "packets_out": sum(client.packets_received for client in clients) + 1,
        }


class CommandLine(unittest.TestCase):
    def assert_refused(self, done: Finished, named: str) -> None:
        self.assertIn(done.status, (1, 2), done.stdout + done.stderr)
        self.assertIn(named, done.stderr)
        self.assertNotIn("listening", done.stdout)

    def test_a_port_in_use_is_named(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as holder:
            port = holder.getsockname()[1]
            self.assert_refused(run_tool(TOOL, "serve", "--tcp", f"127.0.0.1:{port}"), f"127.0.0.1:{port}")

    def test_a_second_server_does_not_share_the_port_of_the_first(self) -> None:
        server = ToolServer(TOOL, "--shards", "2")
        self.addCleanup(server.kill)
        self.assert_refused(run_tool(TOOL, "serve", "--tcp", str(server.address)), str(server.address))
        # The address of another machine can be bound by nobody here.
        self.assert_refused(run_tool(TOOL, "serve", "--tcp", "192.0.2.1:0"), "192.0.2.1")

    def test_a_bad_address_is_named(self) -> None:
        for address in ("nonsense", "127.0.0.1", "127.0.0.1:", "127.0.0.1:99999", "127.0.0.1:x", "[::1:8001", "::1:80"):
            with self.subTest(address):
                self.assert_refused(run_tool(TOOL, "serve", "--tcp", address, timeout=5), address)

    def test_a_bad_option_is_named(self) -> None:
        for options in (
            ["--no-such-option"],
            ["--shards", "banana"],
            ["--shards", "100000"],
            ["--shards", "-1"],
            ["--max-message", "0"],
            ["--max-message", "99999999999"],
            ["--outbound-limit", "0"],
            ["--slow-consumer", "maybe"],
            ["--compress", "gzip"],
            ["--compress-above", "-1"],
            ["--compress-above", "2000000000"],
            ["--max-sessions", "0"],
            ["--max-sessions", "-1"],
            ["--max-sessions-per-address", "-1"],
            ["--idle-timeout", "soon"],
            ["--first-packet-timeout", "-1"],
            ["--write-stall", "-1"],
            ["--drain", "-1"],
        ):
            with self.subTest(" ".join(options)):
                done = run_tool(TOOL, "serve", "--tcp", "127.0.0.1:0", *options, timeout=5)
                self.assertIn(done.status, (1, 2), done.stdout + done.stderr)
                self.assertNotIn("listening", done.stdout)
                # By the option's name on the command line, or by the library's name for it.
                text = done.stderr.replace("_", "-")
                self.assertTrue(options[0].lstrip("-") in text or options[-1] in text, done.stderr)

    def test_help_of_each_command(self) -> None:
        for command, options in {
            "": ["serve", "send", "bench"],
            "serve": ["--tcp", "--shards", "--max-message", "--outbound-limit", "--slow-consumer", "--max-sessions",
                      "--max-sessions-per-address", "--idle-timeout", "--first-packet-timeout", "--write-stall",
                      "--drain", "--compress", "--compress-above", "--json"],
            "send": ["--request", "--count", "--biz", "--compress", "--compress-above", "--timeout"],
            "bench": ["--connections", "--pipeline", "--size", "--duration", "--mode", "--compress",
                      "--compress-above", "--json"],
        }.items():  # fmt: skip
            with self.subTest(command):
                done = run_tool(TOOL, *filter(None, [command]), "--help")
                self.assertEqual((done.status, done.stderr), (0, ""))
                for option in options:
                    self.assertIn(option, done.stdout)

    def test_usage_errors_of_the_tool_itself(self) -> None:
        for words in ([], ["dance"], ["send"], ["bench"], ["send", "tcp://127.0.0.1:1", "--count", "many"]):
            with self.subTest(" ".join(words)):
                done = run_tool(TOOL, *words)
                self.assertEqual(done.status, 2, done.stderr)
                self.assertNotEqual(done.stderr, "")


class Send(unittest.TestCase):
    """`msgtrans send` against the tool's own server, and against servers in Python that see what it sends."""

    def echo(self) -> ToolServer:
        server = ToolServer(TOOL)
        self.addCleanup(server.kill)
        return server

    def assert_printed(self, done: Finished, expected: str) -> None:
        self.assertEqual((done.status, done.stdout, done.stderr), (0, expected, ""))

    def test_a_line_of_text_comes_back(self) -> None:
        url = self.echo().address.url
        self.assert_printed(run_tool(TOOL, "send", url, "hello world"), "hello world\n")
        self.assert_printed(run_tool(TOOL, "send", url, "--request", "hello world"), "hello world\n")

    def test_each_line_of_standard_input_comes_back_in_order(self) -> None:
        url = self.echo().address.url
        text = "".join(f"line {i}\n" for i in range(300))
        self.assert_printed(run_tool(TOOL, "send", url, "-", stdin=text), text)
        self.assert_printed(run_tool(TOOL, "send", url, "--request", "-", stdin=text), text)

    def test_count_sends_the_text_so_many_times(self) -> None:
        url = self.echo().address.url
        self.assert_printed(run_tool(TOOL, "send", url, "--count", "5", "again"), "again\n" * 5)
        self.assert_printed(run_tool(TOOL, "send", url, "--request", "--count", "7", "ask"), "ask\n" * 7)

    def test_what_it_puts_on_the_wire(self) -> None:
        ids = MessageIds()

        def answer(packet: Packet) -> list[Packet]:
            if packet.type == REQUEST:
                return [Packet(RESPONSE, packet.message_id, b"answer to " + packet.payload, packet.biz_type)]
            return [Packet(ONE_WAY, ids.take(), b"echo of " + packet.payload, packet.biz_type)]

        for request in (True, False):
            with self.subTest(request=request), ScriptedServer(answer) as server:
                words = ["--biz", "42", "--count", "3", *(["--request"] if request else [])]
                done = run_tool(TOOL, "send", server.address.url, *words, "text")
                self.assert_printed(done, ("answer to text\n" if request else "echo of text\n") * 3)
                got = list(server.received)
                self.assertEqual(
                    got, [Packet(REQUEST if request else ONE_WAY, i, b"text", 42) for i in (1, 2, 3)]
                )
                self.assertEqual((server.connections, server.failures), (1, []))

    def test_compresses_lines_from_the_size_that_it_is_told(self) -> None:
        lines = ["x" * 99, "x" * 100, "x" * 1000]
        with ScriptedServer(lambda packet: [Packet(RESPONSE, packet.message_id, b"ok")]) as server:
            words = ["--request", "--compress", "zlib", "--compress-above", "100", "-"]
            done = run_tool(TOOL, "send", server.address.url, *words, stdin="\n".join(lines))
            self.assert_printed(done, "ok\n" * 3)
            got = [(packet.compression, packet.payload.decode()) for packet in server.received]
            self.assertEqual(got, list(zip((NONE, ZLIB, ZLIB), lines)))

    def test_a_forged_answer_is_not_taken_for_the_answer(self) -> None:
        def answer(packet: Packet) -> list[Packet]:
            return [
                Packet(RESPONSE, packet.message_id + 1000, b"forged"),
                Packet(RESPONSE, packet.message_id, b"true", packet.biz_type),
                Packet(RESPONSE, packet.message_id, b"once more"),
            ]

        with ScriptedServer(answer) as server:
            self.assert_printed(run_tool(TOOL, "send", server.address.url, "--request", "x"), "true\n")

    def test_a_server_that_never_answers_ends_by_the_timeout(self) -> None:
        for words in (["--request"], []):
            with self.subTest(words), ScriptedServer(lambda packet: []) as server:
                done = run_tool(TOOL, "send", server.address.url, *words, "--timeout", "0.5", "anybody there?")
                self.assertEqual((done.status, done.stdout), (1, ""))
                self.assertNotEqual(done.stderr, "")
                self.assertGreater(done.seconds, 0.4)
                self.assertLess(done.seconds, 5)
                self.assertEqual([p.payload for p in server.received], [b"anybody there?"])

    def test_a_server_that_hangs_up_or_breaks_the_protocol_is_reported(self) -> None:
        def hang_up(packet: Packet) -> list[Packet]:
            raise ConnectionResetError

        def other_version(packet: Packet) -> list[Packet]:
            return [Packet(RESPONSE, packet.message_id, b"x", flags=FRAGMENTED)]

        for answer in (hang_up, other_version):
            with self.subTest(answer.__name__), ScriptedServer(answer) as server:
                done = run_tool(TOOL, "send", server.address.url, "--request", "--timeout", "15", "x")
                self.assertEqual((done.status, done.stdout), (1, ""))
                self.assertNotEqual(done.stderr, "")
                self.assertLess(done.seconds, 5, "it waited for its timeout")

    def test_connection_refused_is_reported_with_the_address(self) -> None:
        holder, port = unused_port()
        with holder:
            for words in (["send", "--request"], ["bench"]):
                tail = ["x"] if words[0] == "send" else ["--duration", "1"]
                done = run_tool(TOOL, words[0], f"tcp://127.0.0.1:{port}", *words[1:], *tail)
                self.assertEqual((done.status, done.stdout), (1, ""))
                self.assertIn(f"127.0.0.1:{port}", done.stderr)

    def test_a_bad_url_is_named(self) -> None:
        for url in ("127.0.0.1:8001", "http://127.0.0.1:8001", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:0x1"):
            with self.subTest(url):
                done = run_tool(TOOL, "send", url, "x")
                self.assertIn(done.status, (1, 2))
                self.assertIn(url, done.stderr)


class Bench(unittest.TestCase):
    def test_its_report_agrees_with_the_server(self) -> None:
        for mode in ("request", "oneway"):
            with self.subTest(mode):
                server = ToolServer(TOOL, "--shards", "2")
                self.addCleanup(server.kill)
                words = ["--connections", "3", "--pipeline", "4", "--size", "100", "--duration", "0.5", "--mode", mode]
                done = run_tool(TOOL, "bench", server.address.url, *words, "--json")
                self.assertEqual(done.status, 0, done.stderr)
                report = json.loads(done.stdout)
                self.assertEqual(report["errors"], 0)
                self.assertGreater(report["messages"], 0)
                self.assertGreater(report["seconds"], 0.4)
                self.assertLess(report["seconds"], 5)
                rate = report["messages"] / report["seconds"]
                self.assertAlmostEqual(report["messages_per_second"] / rate, 1, delta=0.02)
                self.assertGreaterEqual(report["bytes_per_second"] / rate, 99)
                order = [report[key] for key in ("p50_us", "p90_us", "p99_us", "p99_9_us", "max_us")]
                self.assertEqual(order, sorted(order))
                self.assertGreater(order[0], 0)
                stopped = server.stop()
                self.assertEqual(stopped.status, 0, stopped.stderr)
                summary = stopped.summary()
                self.assertEqual(summary["sessions"], 3)
                # What is in flight when the time is over is waited for, and not measured.
                sent = report["messages"] + 3 * 4
                self.assertEqual((summary["packets_in"], summary["packets_out"]), (sent, sent))
                self.assertEqual((summary["protocol_errors"], summary["unmatched_responses"]), (0, 0))


class WireClient(unittest.TestCase):
    """The client that all this relies on, by the document's own vectors."""

    def test_vectors(self) -> None:
        for packet, expected in (
            (Packet(ONE_WAY, 1), "01000000000000010000000000000000"),
            (Packet(ONE_WAY, 42, b"hello world", 5), "010000050000002a00000000000b000068656c6c6f20776f726c64"),
            (Packet(REQUEST, 100, b"ping", 10), "0100010a000000640000000000040000 70696e67"),
            (Packet(RESPONSE, 100, b"pong", 10), "0100020a000000640000000000040000 706f6e67"),
        ):
            data = bytes.fromhex(expected)
            self.assertEqual(encode(packet), data)
            decoder = Decoder()
            for byte in data[:-1]:
                decoder.feed(bytes([byte]))
                self.assertIsNone(decoder.next())
            decoder.feed(data[-1:])
            self.assertEqual(decoder.next(), packet)
            self.assertIsNone(decoder.next())

    def test_extreme_fields_survive_the_round_trip(self) -> None:
        packet = Packet(REQUEST, 0xFFFFFFFF, b"p" * 70_000, 255, b"e" * 65535, 0xFFFE, ZLIB)
        decoder = Decoder()
        decoder.feed(encode(packet))
        self.assertEqual(decoder.next(), packet)

    def test_bad_headers_are_refused_by_name(self) -> None:
        for header, named in (
            (encode_header(version=2), "version is 2"),
            (encode_header(compression=3), "compression is 3"),
            (encode_header(type=3), "type is 3"),
            (encode_header(flags=1), "fragmented"),
            (encode_header(payload_len=101), "payload_len is 101"),
            (encode_header(compression=ZLIB, payload_len=3) + b"bad", "zlib"),
        ):
            decoder = Decoder(max_payload=100)
            decoder.feed(header)
            with self.assertRaisesRegex(ProtocolError, named):
                decoder.next()

    def test_ids_wrap_past_zero(self) -> None:
        ids = MessageIds(0xFFFFFFFE)
        self.assertEqual([ids.take() for _ in range(3)], [0xFFFFFFFE, 0xFFFFFFFF, 1])


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        TOOL = sys.argv.pop(1)
    unittest.main()
