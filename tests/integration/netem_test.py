# SPDX-License-Identifier: Apache-2.0
"""The tool's server and clients with a bad network between them: two network namespaces joined by a cable (veth), which
loses packets, delays and reorders them (`tc netem`), or is pulled out.

Wants root, and `ip` and `tc` of iproute2. Where there are no namespaces all of it is skipped, and the exit status is 77;
where the kernel has no netem, what needs it is.

    sudo python3 tests/integration/netem_test.py build/.../msgtrans [unittest's arguments]
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from tool_fixture import ToolServer, eventually, run_tool, start_bench

TOOL = os.environ.get("MSGTRANS_TOOL", "")
SKIPPED = 77

#: Not to wait for what should happen: far beyond what a loaded machine and TCP's retransmissions need.
PATIENCE = 60.0

SERVER, CLIENT = "10.213.77.1", "10.213.77.2"
IDLE, WRITE_STALLED = "idle for too long", "peer stopped reading"


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


class Network:
    """Two namespaces, `a` with the server and `b` with the clients; `in_a` and `in_b` run the tool there."""

    def __init__(self) -> None:
        self.a, self.b = f"msgtrans-a-{os.getpid()}", f"msgtrans-b-{os.getpid()}"
        self._scripts = tempfile.TemporaryDirectory()
        try:
            run("ip", "netns", "add", self.a)
            run("ip", "netns", "add", self.b)
            run("ip", "-n", self.a, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", self.b)
            for namespace, address in ((self.a, SERVER), (self.b, CLIENT)):
                run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "cable")
                run("ip", "-n", namespace, "link", "set", "lo", "up")
                run("ip", "-n", namespace, "link", "set", "cable", "up")
        except BaseException:
            self.close()
            raise
        self.in_a, self.in_b = self._script(self.a), self._script(self.b)

    def _script(self, namespace: str) -> str:
        path = os.path.join(self._scripts.name, namespace)
        with open(path, "w", encoding="utf-8") as script:
            script.write(f'#!/bin/sh\nexec ip netns exec {namespace} "{os.path.abspath(TOOL)}" "$@"\n')
        os.chmod(path, stat.S_IRWXU)
        return path

    def impair(self, *how: str) -> None:
        """Both ways. \\raises subprocess.CalledProcessError where the kernel has no such discipline."""
        for namespace in (self.a, self.b):
            run("ip", "netns", "exec", namespace, "tc", "qdisc", "replace", "dev", "cable", "root", *how)

    def dropped(self) -> int:
        """Packets that the disciplines have dropped, both ways."""
        count = 0
        for namespace in (self.a, self.b):
            told = subprocess.run(
                ["ip", "netns", "exec", namespace, "tc", "-s", "qdisc", "show", "dev", "cable"],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            count += sum(int(number) for number in re.findall(r"dropped (\d+)", told))
        return count

    def pull(self) -> None:
        run("ip", "-n", self.b, "link", "set", "cable", "down")

    def plug(self) -> None:
        run("ip", "-n", self.b, "link", "set", "cable", "up")

    def close(self) -> None:
        for namespace in (self.a, self.b):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)
        self._scripts.cleanup()


def network_or_reason() -> tuple[Network | None, str]:
    if os.geteuid() != 0:
        return None, "not root"
    if not shutil.which("ip") or not shutil.which("tc"):
        return None, "no iproute2"
    try:
        return Network(), ""
    except subprocess.CalledProcessError as error:
        return None, f"no network namespaces: {error.stderr.strip()}"


class NetworkCase(unittest.TestCase):
    def setUp(self) -> None:
        network, reason = network_or_reason()
        if network is None:
            self.skipTest(reason)
        self.network = network
        self.addCleanup(network.close)

    def serve(self, *options: str) -> ToolServer:
        self.server = ToolServer(self.network.in_a, "--verbose", *options, listen=(f"{SERVER}:0",))
        self.addCleanup(self.server.kill)
        self.sockets = self.server.sockets()
        return self.server

    def impair(self, *how: str) -> None:
        try:
            self.network.impair(*how)
        except subprocess.CalledProcessError as error:
            self.skipTest(f"no {how[0]}: {error.stderr.strip()}")

    def bench(self, *options: str) -> subprocess.Popen[str]:
        return start_bench(self, self.network.in_b, self.server.address.url, "--json", *options)

    def result(self, process: subprocess.Popen[str]) -> dict[str, float]:
        """Of one that met no error."""
        said, problems = process.communicate(timeout=PATIENCE)
        self.assertEqual(process.returncode, 0, problems)
        return json.loads(said)

    def wait_for_sessions(self, process: subprocess.Popen[str]) -> None:
        eventually(lambda: self.server.sockets() >= self.sockets + 4, "the clients connect", PATIENCE)

    def stop(self) -> str:
        """What the server said."""
        done = self.server.stop(timeout=PATIENCE)
        self.assertEqual(done.status, 0, done.stderr)
        self.assertEqual(done.summary()["protocol_errors"], 0)
        return done.stderr


class BadNetwork(NetworkCase):
    def test_lost_packets_lose_no_message(self) -> None:
        self.impair("netem", "loss", "5%")
        self.serve()
        for options in (["--pipeline", "8"], ["--pipeline", "8", "--mode", "oneway", "--size", "5000"]):
            self.assertGreater(self.result(self.bench("--duration", "3", *options))["messages"], 0)
        self.stop()

    def test_delayed_and_reordered_packets_lose_no_message(self) -> None:
        self.impair("netem", "delay", "50ms", "20ms", "reorder", "25%", "50%")
        self.serve()
        result = self.result(self.bench("--duration", "3", "--pipeline", "8", "--size", "3000"))
        self.assertGreater(result["messages"], 0)
        self.assertGreater(result["p50_us"], 30_000, "the network delays nothing")
        self.stop()


    def test_a_narrow_cable_that_drops_what_is_too_much_loses_no_message(self) -> None:
        self.impair("tbf", "rate", "20mbit", "burst", "4000", "latency", "5ms")
        self.serve()
        for mode in ("request", "oneway"):
            result = self.result(self.bench("--duration", "3", "--pipeline", "8", "--size", "20000", "--mode", mode))
            self.assertGreater(result["messages"], 0)
        self.assertGreater(self.network.dropped(), 0, "the network drops nothing")
        self.stop()


class Cable(NetworkCase):
    def test_pulled_for_two_seconds_loses_no_message(self) -> None:
        self.serve()
        client = self.bench("--duration", "5", "--pipeline", "8")
        self.wait_for_sessions(client)
        self.network.pull()
        time.sleep(2)
        self.network.plug()
        result = self.result(client)
        self.assertGreater(result["messages"], 0)
        self.assertGreater(result["max_us"], 1_000_000, "the cable was not pulled")
        self.stop()

    def test_pulled_for_good_ends_sessions_that_have_something_to_write(self) -> None:
        # As many on their way as fill every buffer: then the server writes, whatever was in flight at that moment.
        self.serve("--write-stall", "2", "--idle-timeout", "20")
        client = self.bench("--duration", "60", "--pipeline", "64", "--size", "100000", "--mode", "oneway")
        self.wait_for_sessions(client)
        time.sleep(0.5)
        self.network.pull()
        eventually(lambda: self.server.sockets() <= self.sockets, "the sessions end", PATIENCE)
        said = self.stop()
        self.assertEqual(said.count(WRITE_STALLED) + said.count(IDLE), 4, said)

    def test_pulled_for_good_ends_idle_sessions(self) -> None:
        self.serve("--idle-timeout", "2")
        client = self.bench("--duration", "60")
        self.wait_for_sessions(client)
        self.network.pull()
        eventually(lambda: self.server.sockets() <= self.sockets, "the sessions end", PATIENCE)
        self.assertEqual(self.stop().count(IDLE), 4)

    def test_pulled_for_good_fails_what_a_client_begins(self) -> None:
        self.serve()
        self.network.pull()
        done = run_tool(self.network.in_b, "send", self.server.address.url, "hello", "--timeout", "2", timeout=PATIENCE)
        self.assertEqual(done.status, 1)
        self.assertRegex(done.stderr, "cannot connect to .*: (Network is unreachable|.*)|within 2000 ms")
        self.network.plug()
        done = run_tool(self.network.in_b, "send", self.server.address.url, "hello", "--timeout", "30", timeout=PATIENCE)
        self.assertEqual((done.status, done.stdout), (0, "hello\n"), done.stderr)
        self.stop()


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        TOOL = sys.argv.pop(1)
    if not os.access(TOOL, os.X_OK):
        sys.exit(f"MSGTRANS_TOOL must name the msgtrans executable, and is {TOOL!r}")
    outcome = unittest.main(exit=False, verbosity=2).result
    if not outcome.wasSuccessful():
        sys.exit(1)
    sys.exit(SKIPPED if outcome.testsRun == len(outcome.skipped) else 0)
