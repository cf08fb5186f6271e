# SPDX-License-Identifier: Apache-2.0
"""What `msgtrans serve --stats` prints, against what was sent.

    MSGTRANS_TOOL=PROGRAM python3 tool_statistics_test.py
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import time
import unittest

import wire_client
from tool_fixture import ToolServer, eventually, run_tool

TOOL = os.environ.get("MSGTRANS_TOOL", "build/dev/bin/msgtrans")
LINE = re.compile(
    r"(?P<elapsed>[\d.]+) s: (?P<sessions>\d+) sessions, in (?P<packets_in>[\d.]+)/s (?P<mb_in>[\d.]+) MB/s, "
    r"out (?P<packets_out>[\d.]+)/s (?P<mb_out>[\d.]+) MB/s, queued (?P<queued>\d+) packets (?P<queued_mb>[\d.]+) MB, "
    r"dropped (?P<dropped>\d+), refused (?P<refused>\d+), protocol errors (?P<errors>\d+)")


class Server(ToolServer):
    """`msgtrans serve --stats`; `ToolServer` adds --json."""

    def lines(self) -> list[str]:
        return [line for line in self._stdout.wait(lambda _: True, 0) if not line.startswith("listening ")]

    def statistics(self) -> list[dict]:
        return [one for one in map(json.loads, self.lines()) if "server" in one]


def ask(server: ToolServer, count: int, size: int) -> None:
    with server.connect() as client:
        for index in range(count):
            payload = bytes([index % 256]) * size
            assert client.request(payload).payload == payload


class StatisticsTest(unittest.TestCase):
    def serve(self, *options: str) -> Server:
        server = Server(TOOL, *options)
        self.addCleanup(server.kill)
        return server

    def connect(self, server: Server) -> wire_client.Client:
        client = server.connect()
        self.addCleanup(client.close)
        return client

    def test_json_says_exactly_what_was_done(self) -> None:
        server = self.serve("--stats", "0.05", "--max-sessions", "3")
        held = self.connect(server)
        ask(server, 20, 100)
        done = run_tool(TOOL, "send", server.address.url, "hello", "--request")
        self.assertEqual(done.status, 0, done.stderr)
        held.send(b"one way")
        self.assertEqual(held.receive().payload, b"one way")
        with socket.create_connection((server.address.host, server.address.port)) as broken:
            broken.sendall(b"\x09" + bytes(15))
            broken.settimeout(10)
            broken.recv(1)  # the end
        eventually(lambda: any("bad_version" in one["server"]["ends"] for one in server.statistics()),
                   "the protocol error is shown")
        eventually(lambda: server.statistics()[-1]["server"]["sessions"] == 1, "only one session is left")
        live = server.statistics()[-1]
        self.assertEqual(live["server"]["ends"], {"bad_version": 1, "closed_by_peer": 2})
        self.assertEqual(live["server"]["protocol_errors"], 1)
        self.assertEqual(live["server"]["packets_in"], 22)
        self.assertEqual(live["server"]["packets_out"], 22)
        self.assertEqual(live["server"]["requests_received"], 21)
        self.assertEqual(live["server"]["answers_sent"], 21)
        self.assertEqual(live["server"]["bytes_out"], 22 * 16 + 20 * 100 + 5 + 7)
        self.assertEqual(live["server"]["requests"]["made"], 0)
        self.assertEqual(live["server"]["queued_packets"], 0)
        self.assertEqual(len(live["listeners"]), 1)
        listener = live["listeners"][0]
        self.assertEqual(listener["url"], server.address.url)
        for name in ("sessions", "sessions_total", "packets_in", "packets_out", "bytes_in", "bytes_out"):
            self.assertEqual(listener[name], live["server"][name], name)
        for client in (self.connect(server), self.connect(server)):
            client.request(b"x")
        with socket.create_connection((server.address.host, server.address.port)) as refused:
            refused.settimeout(10)
            self.assertEqual(refused.recv(1), b"")
        finished = server.stop()
        self.assertEqual(finished.status, 0, finished.stderr)
        objects = [json.loads(line) for line in finished.stdout.splitlines() if not line.startswith("listening ")]
        summary, last = objects[-1], objects[-2]
        self.assertNotIn("server", summary)
        self.assertEqual(last["server"]["sessions_refused"], 1)
        self.assertEqual(last["server"]["refusals"], {"sessions": 1, "address": 0, "rate": 0, "address_rate": 0,
                                                      "on_connect": 0, "timeout": 0})
        for name in ("awaiting_admission", "throttled", "rejected_inbound", "rejected_outbound",
                     "interceptor_failures", "dropped_inbound"):
            self.assertEqual(last["server"][name], 0, name)
        self.assertEqual(last["server"]["sessions_total"], summary["sessions"])
        self.assertEqual(last["server"]["packets_in"], summary["packets_in"])
        self.assertEqual(last["server"]["sessions"], 0)
        self.assertGreater(last["elapsed"], 0.05)
        self.assertLessEqual((len(objects) - 2) * 0.05, last["elapsed"], "but for the last a line an interval at most")
        self.assertAlmostEqual(sum(one["interval"] for one in objects[:-1]), last["elapsed"], places=6)
        # The rates, each over its interval, add up to what was carried.
        for name in ("packets_in", "packets_out", "bytes_in", "bytes_out"):
            carried = sum(one["rates"][name] * one["interval"] for one in objects[:-1])
            self.assertAlmostEqual(carried, last["server"][name], places=3, msg=name)

    def test_latency_and_counts_of_all_lines_never_go_back(self) -> None:
        server = self.serve("--stats", "0.02")
        ask(server, 200, 10)
        eventually(lambda: len(server.statistics()) >= 10, "ten lines")
        finished = server.stop()
        objects = [json.loads(line) for line in finished.stdout.splitlines() if not line.startswith("listening ")][:-1]
        for before, after in zip(objects, objects[1:]):
            self.assertGreater(after["elapsed"], before["elapsed"])
            for name in ("sessions_total", "packets_in", "packets_out", "bytes_in", "bytes_out"):
                self.assertGreaterEqual(after["server"][name], before["server"][name])
        self.assertEqual(objects[-1]["server"]["packets_in"], 200)

    def test_lines_for_people_add_up(self) -> None:
        process = subprocess.Popen([TOOL, "serve", "--tcp", "127.0.0.1:0", "--shards", "2", "--stats", "0.1"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(lambda: (process.kill(), process.communicate()))
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        with wire_client.Client("127.0.0.1", port) as client:
            for _ in range(50):
                client.request(bytes(10_000))
            deadline = time.monotonic() + 10
            while " 1 sessions," not in process.stdout.readline():
                self.assertLess(time.monotonic(), deadline)
        process.terminate()
        out, err = process.communicate(timeout=20)
        self.assertEqual(process.returncode, 0, err)
        lines = [LINE.fullmatch(line) for line in out.splitlines() if " s: " in line]
        self.assertTrue(lines)
        self.assertTrue(all(lines), out)
        self.assertEqual(lines[-1]["sessions"], "0")
        self.assertIn("served 1 sessions", out)

    def test_rates_for_people_are_those_of_the_interval(self) -> None:
        process = subprocess.Popen([TOOL, "serve", "--tcp", "127.0.0.1:0", "--stats", "3600"],
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.addCleanup(lambda: (process.kill(), process.communicate()))
        assert process.stdout is not None
        port = int(process.stdout.readline().rsplit(":", 1)[1])
        with wire_client.Client("127.0.0.1", port) as client:
            for _ in range(50):
                client.request(bytes(10_000))
        process.terminate()
        out, _ = process.communicate(timeout=20)
        (line,) = [LINE.fullmatch(line) for line in out.splitlines() if " s: " in line]  # the last one alone
        assert line is not None
        elapsed = float(line["elapsed"])
        for rate, total, digit in (("packets_in", 50, 0.1), ("packets_out", 50, 0.1),
                                   ("mb_in", 0.5008, 0.001), ("mb_out", 0.5008, 0.001)):
            # each is rounded by half of its last digit, the time too, which is short
            rounding = float(line[rate]) * 0.0006 + digit * 0.6 * elapsed
            self.assertAlmostEqual(float(line[rate]) * elapsed, total, delta=rounding)

    def test_without_it_nothing_is_printed(self) -> None:
        server = self.serve()
        ask(server, 1, 1)
        finished = server.stop()
        self.assertEqual(finished.summary()["packets_in"], 1)

    def test_interval_must_be_positive(self) -> None:
        for wrong in ("0", "-1", "soon"):
            done = run_tool(TOOL, "serve", "--stats", wrong)
            self.assertEqual(done.status, 2, wrong)
            self.assertIn("--stats", done.stderr)


if __name__ == "__main__":
    unittest.main()
