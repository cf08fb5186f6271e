# SPDX-License-Identifier: Apache-2.0
"""Shows `msgtrans serve` at work: an independent client and the load generator drive it, and every answer is checked,
and at the end every count. Exit status 0 only if all checks held.

    python3 tests/integration/demo.py --tool build/.../msgtrans
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from collections.abc import Callable

import payloads
from tool_fixture import Bystander, ToolFailed, ToolServer, run_tool
from wire_client import (
    DEFAULT_MAX_PAYLOAD,
    HIGH_PRIORITY,
    ONE_WAY,
    REQUEST,
    RESPONSE,
    ROUTE_TAG,
    ZLIB,
    ZSTD,
    Client,
    encode,
    encode_header,
)

SHARDS = 2
BENCH_CONNECTIONS, BENCH_PIPELINE, BENCH_SIZE, BENCH_SECONDS = 50, 16, 64, 3


class Screen:
    """What the user reads: coloured with ticks on a terminal, plain text elsewhere."""

    def __init__(self) -> None:
        terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        unicode = terminal and (sys.stdout.encoding or "").lower().startswith("utf")
        self._green, self._red, self._bold, self._dim, self._plain = (
            ("\x1b[32m", "\x1b[31m", "\x1b[1m", "\x1b[2m", "\x1b[0m") if terminal else ("",) * 5
        )
        self._tick, self._cross = ("✓", "✗") if unicode else ("ok", "FAILED")

    def title(self, text: str) -> None:
        print(f"\n{self._bold}{text}{self._plain}", flush=True)

    def line(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def held(self, what: str, note: str) -> None:
        dots = " " * max(1, 62 - len(what))
        print(f"  {self._green}{self._tick}{self._plain} {what}{self._dim}{dots}{note}{self._plain}", flush=True)

    def failed(self, what: str, why: str) -> None:
        print(f"  {self._red}{self._cross} {what}{self._plain}\n      {why}", flush=True)

    def verdict(self, good: bool, text: str) -> None:
        print(f"\n{self._green if good else self._red}{text}{self._plain}", flush=True)


def must(condition: bool, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def must_equal(got: object, expected: object, what: str) -> None:
    if got != expected:
        shown = [repr(value) if len(repr(value)) < 100 else repr(value)[:100] + "..." for value in (got, expected)]
        raise AssertionError(f"{what} is {shown[0]}, expected {shown[1]}")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms" if seconds >= 0.0095 else f"{seconds * 1000:.2f} ms"


class Demo:
    def __init__(self, tool: str) -> None:
        self.tool = tool
        self.screen = Screen()
        self.checks = 0
        self.failures = 0
        self.clients: list[Client] = []
        self.bad_sessions = 0
        self.bench: dict[str, float] = {}

    def run(self) -> int:
        begun = time.monotonic()
        server = ToolServer(self.tool, "--shards", str(SHARDS))
        try:
            self.screen.title("msgtrans serve")
            self.screen.line(
                f"listening on {server.address.url}, {SHARDS} shards, ready after {milliseconds(server.start_seconds)}"
            )
            self.server = server
            self.good_traffic()
            self.bad_traffic()
            self.load()
            self.ending()
        finally:
            server.kill()
        took = time.monotonic() - begun
        if self.failures:
            self.screen.verdict(False, f"{self.failures} of {self.checks} checks FAILED ({took:.1f} s)")
            return 1
        self.screen.verdict(True, f"All {self.checks} checks held ({took:.1f} s).")
        return 0

    def check(self, what: str, body: Callable[[], str | None]) -> None:
        """One line: runs `body`, which raises if the check does not hold, or returns a note to show beside the time."""
        self.checks += 1
        begun = time.monotonic()
        try:
            note = body()
        except Exception as error:
            self.failures += 1
            self.screen.failed(what, f"{type(error).__name__}: {error}")
            return
        took = milliseconds(time.monotonic() - begun)
        self.screen.held(what, note if note else took)

    def connect(self) -> Client:
        client = self.server.connect()
        self.clients.append(client)
        return client

    # --- a client that knows only the document -------------------------------------------------------------------

    def good_traffic(self) -> None:
        self.screen.title("An independent client, in Python")
        self.check("a request is answered", self.one_request)
        self.check("a one-way message comes back, same payload and biz_type", self.one_way)
        self.check("a packet cut into single bytes", self.single_bytes)
        self.check("100 packets in one write, answered in order", self.hundred_in_one_write)
        self.check("100 requests at once over 5 connections", self.hundred_at_once)
        self.check("a zstd payload, answered with its plain text", self.zstd)
        self.check("a zlib payload, answered with its plain text", self.zlib)
        self.check("an extension header and flags", self.extension)
        self.check("a payload of 1 MiB", lambda: self.large(1 << 20))
        self.check("a payload of 16 MiB, the limit itself", lambda: self.large(DEFAULT_MAX_PAYLOAD))

    def one_request(self) -> str:
        with self.connect() as client:
            client.request(b"warm up")
            begun = time.monotonic()
            answer = client.request(b"ping", biz_type=10)
            took = time.monotonic() - begun
            must_equal((answer.type, answer.payload, answer.biz_type), (RESPONSE, b"ping", 10), "the answer")
            must_equal(answer.message_id, 2, "its message_id")
            empty = client.request(b"", biz_type=255)
            must_equal((empty.payload, empty.biz_type), (b"", 255), "the answer to an empty request")
        return f"{took * 1e6:.0f} us the round trip"

    def one_way(self) -> None:
        with self.connect() as client:
            for biz_type in (0, 5, 255):
                client.send(b"hello world %d" % biz_type, biz_type=biz_type)
                echo = client.receive()
                got = (echo.type, echo.payload, echo.biz_type)
                must_equal(got, (ONE_WAY, b"hello world %d" % biz_type, biz_type), "what came back")
                must(echo.message_id != 0, "a one-way message came with message_id 0, which means unset")

    def single_bytes(self) -> str:
        with self.connect() as client:
            packet = client.new_packet(REQUEST, b"one byte at a time", extension=b"ext")
            data = encode(packet)
            for i in range(len(data)):
                client.send_raw(data[i : i + 1])
            must_equal(client.response(packet.message_id).payload, packet.payload, "the answer")
        return f"{len(data)} writes"

    def hundred_in_one_write(self) -> None:
        with self.connect() as client:
            sent = [client.new_packet(ONE_WAY, b"packet %d" % i, biz_type=i) for i in range(100)]
            client.send_raw(b"".join(map(encode, sent)))
            for packet in sent:
                echo = client.receive()
                must_equal((echo.payload, echo.biz_type), (packet.payload, packet.biz_type), "what came back")

    def hundred_at_once(self) -> None:
        clients = [self.connect() for _ in range(5)]
        asked = []
        for i in range(100):
            client = clients[i % 5]
            asked.append((client, client.start_request(b"request %d" % i, biz_type=i), i))
        # The last first: answers are found by their id, not by their order.
        for client, message_id, i in reversed(asked):
            answer = client.response(message_id)
            must_equal((answer.payload, answer.biz_type), (b"request %d" % i, i), "the answer")
        for client in clients:
            client.close()

    def zstd(self) -> str:
        big = b"0123456789abcdef" * 20_000
        with self.connect() as client:
            for plain, frame in (
                (payloads.ZSTD_TEXT, payloads.ZSTD_FRAME),
                (big, payloads.zstd_stored(big)),
                (b"z" * 300_000, payloads.zstd_run(b"z", 300_000)),
            ):
                answer = client.request(frame, compression=ZSTD)
                must(answer.payload == plain, f"{len(frame)} bytes of zstd were answered with something else")
        return f"{len(frame)} bytes on the wire, {len(plain):,} inside"

    def zlib(self) -> str:
        plain = payloads.ZSTD_TEXT * 100
        with self.connect() as client:
            # The client compresses it.
            answer = client.request(plain, compression=ZLIB)
            must(answer.payload == plain, "the zlib payload was answered with something else")
        return f"{len(zlib.compress(plain))} bytes on the wire, {len(plain):,} inside"

    def extension(self) -> None:
        with self.connect() as client:
            for extension, flags in ((b"route: a/b", ROUTE_TAG), (bytes(65535), HIGH_PRIORITY), (b"x", 0xFFFE)):
                answer = client.request(b"after the extension", biz_type=9, extension=extension, flags=flags)
                must_equal((answer.payload, answer.biz_type), (b"after the extension", 9), "the answer")

    def large(self, size: int) -> str:
        # Random, so that a byte that moved cannot hide.
        payload = os.urandom(size)
        with self.connect() as client:
            begun = time.monotonic()
            answer = client.request(payload, timeout=10)
            took = time.monotonic() - begun
            must(answer.payload == payload, f"{len(answer.payload)} bytes came back, and not those sent")
        return f"{milliseconds(took)}, {2 * size / took / 2**20:,.0f} MiB/s there and back"

    # --- bad input -----------------------------------------------------------------------------------------------

    def bad_traffic(self) -> None:
        self.screen.title("Bad input, while others are served")
        bystander = Bystander(self.server.address)
        try:
            over = encode_header(payload_len=DEFAULT_MAX_PAYLOAD + 1)
            self.check("payload_len one over the limit ends the session", lambda: self.offend(bystander, over))
            self.check("version 2 ends the session", lambda: self.offend(bystander, encode_header(version=2)))
            self.check("garbage ends the session", lambda: self.offend(bystander, b"GET / HTTP/1.1\r\n\r\n"))
        finally:
            self.check("the bystanders never noticed", lambda: self.end_bystander(bystander))

    def offend(self, bystander: Bystander, data: bytes) -> str:
        with self.connect() as client:
            self.bad_sessions += 1
            must_equal(client.request(b"still good").payload, b"still good", "the answer before")
            begun = time.monotonic()
            client.send_raw(data)
            came = client.wait_end(timeout=3)
            took = time.monotonic() - begun
            must_equal(came, [], "what came after the bad packet")
        bystander.check()
        return f"after {milliseconds(took)}"

    def end_bystander(self, bystander: Bystander) -> str:
        clients = bystander.stop()
        self.clients += clients
        return f"{sum(c.packets_received for c in clients):,} answers, the slowest {milliseconds(bystander.slowest)}"

    # --- load ----------------------------------------------------------------------------------------------------

    def load(self) -> None:
        self.screen.title(
            f"msgtrans bench: {BENCH_CONNECTIONS} connections, {BENCH_PIPELINE} requests in flight on each, "
            f"{BENCH_SIZE} bytes, {BENCH_SECONDS} s"
        )
        self.check("every request answered, no error", self.run_bench)
        if self.bench:
            b = self.bench
            self.screen.line(f"{b['messages_per_second']:,.0f} messages/s, {b['bytes_per_second'] / 2**20:,.1f} MiB/s")
            self.screen.line(
                "latency: "
                + ", ".join(
                    f"{name} {b[key]:,.0f} us"
                    for name, key in (
                        ("p50", "p50_us"),
                        ("p90", "p90_us"),
                        ("p99", "p99_us"),
                        ("p99.9", "p99_9_us"),
                        ("max", "max_us"),
                    )
                )
            )

    def run_bench(self) -> str:
        options = {
            "--connections": BENCH_CONNECTIONS,
            "--pipeline": BENCH_PIPELINE,
            "--size": BENCH_SIZE,
            "--duration": BENCH_SECONDS,
            "--mode": "request",
        }
        words = [str(word) for option in options.items() for word in option]
        done = run_tool(self.tool, "bench", self.server.address.url, *words, "--json")
        must(done.status == 0, f"exit status {done.status}: {done.stderr.strip()}")
        bench = json.loads(done.stdout)
        must_equal(bench["errors"], 0, "errors")
        must(bench["messages"] > 0, "not one message")
        must(bench["seconds"] > 0.8 * BENCH_SECONDS, f"it ended after {bench['seconds']} s")
        order = [bench[key] for key in ("p50_us", "p90_us", "p99_us", "p99_9_us", "max_us")]
        must(0 < order[0] and order == sorted(order), f"percentiles out of order: {order}")
        self.bench = bench
        return f"{bench['messages']:,} messages in {bench['seconds']:.1f} s"

    # --- the end -------------------------------------------------------------------------------------------------

    def ending(self) -> None:
        self.screen.title("SIGTERM")
        self.summary: dict[str, int] = {}
        self.check("the server drains and exits with status 0", self.stop)
        if not self.summary:
            return
        s = self.summary
        sent = sum(client.packets_sent for client in self.clients)
        received = sum(client.packets_received for client in self.clients)
        sessions = len(self.clients) + BENCH_CONNECTIONS
        self.check(
            f"sessions: {len(self.clients)} here and {BENCH_CONNECTIONS} of bench",
            lambda: must_equal(s["sessions"], sessions, "sessions") or f"{s['sessions']:,}",
        )
        self.check(
            f"packets in: {sent:,} sent here, the rest by bench",
            lambda: self.bench_and_ours("packets_in", sent),
        )
        self.check(
            f"packets out: {received:,} received here, the rest by bench",
            lambda: self.bench_and_ours("packets_out", received),
        )
        self.check(
            f"protocol errors: {self.bad_sessions} offenders",
            lambda: must_equal(s["protocol_errors"], self.bad_sessions, "protocol_errors")
            or f"{s['protocol_errors']}",
        )
        for key in ("dropped", "unmatched_responses", "refused"):
            name = key.replace("_", " ")
            self.check(f"{name}: none", lambda key=key: must_equal(s[key], 0, key) or "0")  # type: ignore[misc]
        self.screen.title("The server's own summary")
        for key, value in s.items():
            shown = f"{value:>15,}" if isinstance(value, int) else f"{value!s:>15}"
            self.screen.line(f"{key.replace('_', ' '):<22}{shown}")

    def stop(self) -> str:
        done = self.server.stop()
        must(done.status == 0, f"exit status {done.status}: {done.stderr.strip()}")
        self.summary = done.summary()
        return f"after {milliseconds(done.seconds)}"

    def bench_and_ours(self, key: str, ours: int) -> str:
        # What bench has in flight when its time is over it waits for, but does not measure.
        in_flight = BENCH_CONNECTIONS * BENCH_PIPELINE
        must_equal(self.summary[key], ours + int(self.bench.get("messages", 0)) + in_flight, key)
        return f"{self.summary[key]:,}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tool", required=True, metavar="PATH", help="the msgtrans executable")
    try:
        return Demo(parser.parse_args().tool).run()
    except (ToolFailed, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
