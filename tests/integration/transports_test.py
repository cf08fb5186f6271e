# SPDX-License-Identifier: Apache-2.0
"""The tool over every transport, and against peers that are not ours: OpenSSL's s_client, and the WebSocket library of
Debian's python3-websockets, in a Python that has it (MSGTRANS_WEBSOCKETS_PYTHON, else /usr/bin/python3).

    MSGTRANS_TOOL=PROGRAM python3 transports_test.py
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tempfile
import unittest

from tool_fixture import ToolFailed, _Lines, eventually, run_tool

TOOL = os.environ.get("MSGTRANS_TOOL", "build/dev/bin/msgtrans")
PYTHON = os.environ.get("MSGTRANS_WEBSOCKETS_PYTHON", "/usr/bin/python3")


def has_websockets() -> bool:
    try:
        return subprocess.run([PYTHON, "-c", "import websockets"], capture_output=True, timeout=20).returncode == 0
    except FileNotFoundError:
        return False


class Served:
    """`msgtrans serve` on a free port or name of each transport."""

    def __init__(self, directory: pathlib.Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [TOOL, "serve", "--shards", "2", "--json", "--verbose", "--tcp", "127.0.0.1:0", "--tls", "127.0.0.1:0",
             "--unix", str(directory / "socket"), "--ws", "127.0.0.1:0/chat", "--wss", "127.0.0.1:0",
             "--cert", str(directory / "cert.pem"), "--key", str(directory / "key.pem"), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.out, self.err = _Lines(self.process.stdout), _Lines(self.process.stderr)
        lines = self.out.wait(lambda all: len(all) >= 5, 20)
        if len(lines) < 5:
            raise ToolFailed(f"it did not listen: {lines}, {self.err.text()}")
        self.at = {line.split()[1]: line.split()[2] for line in lines}

    def url(self, scheme: str) -> str:
        return f"{scheme}://{self.at[scheme]}"

    def stop(self) -> dict[str, int]:
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(20) != 0:
            raise ToolFailed(f"it ended with {self.process.returncode}: {self.err.text()}")
        return json.loads(self.out.text().splitlines()[-1])

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            pipe.close()


class Transports(unittest.TestCase):
    def setUp(self) -> None:
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="msgtrans-"))
        self.addCleanup(shutil.rmtree, self.directory)
        self.certificate = str(self.directory / "cert.pem")
        made = self.make_certificate()
        self.assertEqual(made.status, 0, made.stderr)

    def make_certificate(self, *arguments: str):  # type: ignore[no-untyped-def]
        return run_tool(TOOL, "cert", "--cert", self.certificate, "--key", str(self.directory / "key.pem"), *arguments)

    def serve(self, *arguments: str) -> Served:
        served = Served(self.directory, *arguments)
        self.addCleanup(served.close)
        return served

    def ask(self, url: str, *arguments: str, text: str = "hello"):  # type: ignore[no-untyped-def]
        return run_tool(TOOL, "send", url, "--request", *arguments, text)

    def expect_answer(self, url: str, *arguments: str) -> None:
        done = self.ask(url, *arguments)
        self.assertEqual((done.status, done.stdout), (0, "hello\n"), f"{url}: {done.stderr}")

    def test_a_url_of_each_is_served_and_measured(self) -> None:
        server = self.serve()
        for scheme in server.at:
            with self.subTest(scheme):
                self.expect_answer(server.url(scheme), "--ca", self.certificate)
                done = run_tool(TOOL, "bench", server.url(scheme), "--ca", self.certificate, "--connections", "3",
                                "--pipeline", "4", "--size", "1000", "--duration", "0.3", "--json")
                self.assertEqual(done.status, 0, done.stderr)
                measured = json.loads(done.stdout)
                self.assertGreater(measured["messages"], 100)
                self.assertEqual(measured["errors"], 0)
        summary = server.stop()
        self.assertEqual(summary["sessions"], 5 * 4)
        self.assertEqual(summary["protocol_errors"] + summary["handshake_failures"], 0)
        self.assertFalse((self.directory / "socket").exists())

    def test_websockets_own_compression_is_agreed_on_where_both_ends_are_told(self) -> None:
        for at_server in ([], ["--ws-deflate"]):
            server = self.serve(*at_server)
            for scheme in ("ws", "wss"):
                for at_client in ([], ["--ws-deflate"]):
                    with self.subTest(scheme, server=at_server, client=at_client):
                        text = "much of the same " * 3000
                        done = self.ask(server.url(scheme), "--ca", self.certificate, *at_client, text=text)
                        self.assertEqual((done.status, done.stdout), (0, text + "\n"), done.stderr)
                        done = run_tool(TOOL, "bench", server.url(scheme), "--ca", self.certificate, "--pipeline", "4",
                                        "--size", "5000", "--duration", "0.2", "--json", *at_client)
                        self.assertEqual(done.status, 0, done.stderr)
                        self.assertEqual(json.loads(done.stdout)["errors"], 0)
            self.assertEqual(server.stop()["protocol_errors"], 0)

    def test_a_server_nobody_vouches_for_is_refused_unless_the_danger_is_taken(self) -> None:
        server = self.serve()
        done = self.ask(server.url("tls"))
        self.assertEqual(done.status, 1)
        self.assertIn("unknown authority", done.stderr)
        done = self.ask(server.url("wss"), "--ca", self.certificate, "--server-name", "elsewhere.example")
        self.assertEqual(done.status, 1)
        self.assertIn("host name mismatch", done.stderr)
        self.expect_answer(server.url("tls"), "--danger-accept-any-certificate")
        self.assertEqual(server.stop()["handshake_failures"], 2)

    def test_a_client_without_a_certificate_is_refused_where_one_is_required(self) -> None:
        mine = [str(self.directory / name) for name in ("mine.pem", "mine-key.pem")]
        self.assertEqual(run_tool(TOOL, "cert", "worker-7", "--cert", mine[0], "--key", mine[1]).status, 0)
        server = self.serve("--client-ca", mine[0])
        done = self.ask(server.url("tls"), "--ca", self.certificate)
        self.assertEqual(done.status, 1)
        self.assertRegex(done.stderr, "certificate required")
        self.expect_answer(server.url("tls"), "--ca", self.certificate, "--cert", mine[0], "--key", mine[1])
        self.assertEqual(server.stop()["handshake_failures"], 1)
        self.assertIn("CN=worker-7", server.err.text())

    def test_a_certificate_is_renewed_at_sighup_and_a_bad_one_is_not_taken(self) -> None:
        server = self.serve()
        old = str(self.directory / "old.pem")
        shutil.copy(self.certificate, old)
        self.assertEqual(self.make_certificate("--force").status, 0)
        server.process.send_signal(signal.SIGHUP)
        told = server.err.wait(lambda all: sum("certificate renewed" in line for line in all) == 2, 10)
        self.assertEqual(sum("certificate renewed" in line for line in told), 2, told)
        self.expect_answer(server.url("tls"), "--ca", self.certificate)
        self.assertEqual(self.ask(server.url("tls"), "--ca", old).status, 1)
        (self.directory / "key.pem").write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        told = server.err.wait(lambda all: sum("not renewed" in line for line in all) == 2, 10)
        self.assertEqual(sum("not renewed" in line and "key.pem" in line for line in told), 2, told)
        self.expect_answer(server.url("tls"), "--ca", self.certificate)

    def test_the_wrong_transport_is_an_error_that_says_so(self) -> None:
        server = self.serve()
        for url, said in (
            (f"tls://{server.at['tcp']}", "perhaps it does not speak TLS"),
            (f"ws://{server.at['tcp']}", "WebSocket handshake"),
            (f"ws://{server.at['tls']}", "WebSocket handshake"),
            (f"ws://{server.at['ws'].split('/')[0]}/elsewhere", "404"),
            (f"tcp://{server.at['tls']}", "connection lost|closed"),
        ):
            with self.subTest(url):
                done = self.ask(url, "--ca", self.certificate, "--timeout", "5")
                self.assertEqual(done.status, 1)
                self.assertRegex(done.stderr, said)
        self.expect_answer(server.url("tls"), "--ca", self.certificate)
        server.stop()
        for guess in ("perhaps the peer speaks TLS", "perhaps the peer speaks HTTP", "no such path"):
            self.assertIn(guess, server.err.text())

    def test_a_certificate_is_not_written_over_and_its_key_is_its_owners(self) -> None:
        done = self.make_certificate()
        self.assertEqual(done.status, 1)
        self.assertIn("key.pem", done.stderr)
        self.assertEqual((self.directory / "key.pem").stat().st_mode & 0o777, 0o600)
        done = run_tool(TOOL, "serve", "--tls", "127.0.0.1:0")
        self.assertEqual(done.status, 1)
        self.assertIn("certificate", done.stderr)

    @unittest.skipUnless(shutil.which("openssl"), "there is no openssl")
    def test_openssl_as_the_peer(self) -> None:
        server = self.serve()
        packet = bytes.fromhex("01000107000000010000000000050000") + b"hello"  # a request, biz_type 7
        for version in ("-tls1_2", "-tls1_3"):
            with self.subTest(version):
                with subprocess.Popen(
                    ["openssl", "s_client", "-quiet", "-connect", server.at["tls"], "-CAfile", self.certificate,
                     "-verify_return_error", "-alpn", "msgtrans/1", version],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as peer:
                    peer.stdin.write(packet)
                    peer.stdin.flush()
                    answer = peer.stdout.read(len(packet))
                    peer.kill()
                self.assertEqual(answer, packet[:2] + b"\x02" + packet[3:])
        done = subprocess.run(["openssl", "s_client", "-connect", server.at["tls"], "-alpn", "other"],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)
        self.assertIn("no application protocol", done.stderr)
        eventually(lambda: any("no application protocol" in line.lower() or "alpn" in line.lower()
                               for line in server.err.wait(lambda _: True, 1)), "the server says why")

    def expect_websockets_client(self, what: str, server: Served) -> None:
        done = subprocess.run([PYTHON, str(pathlib.Path(__file__).with_name("websockets_peer.py")), what,
                               server.url("ws"), server.url("wss"), self.certificate],
                              capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        server.stop()

    @unittest.skipUnless(has_websockets(), "python3-websockets is not installed")
    def test_a_websocket_library_as_the_client(self) -> None:
        self.expect_websockets_client("client", self.serve("--max-message", "100000"))

    @unittest.skipUnless(has_websockets(), "python3-websockets is not installed")
    def test_a_websocket_library_as_a_client_that_compresses(self) -> None:
        for what in ("deflate", "client"):
            with self.subTest(what):
                self.expect_websockets_client(what, self.serve("--max-message", "100000", "--ws-deflate"))

    @unittest.skipUnless(has_websockets(), "python3-websockets is not installed")
    def test_a_websocket_library_as_the_server(self) -> None:
        with subprocess.Popen([PYTHON, str(pathlib.Path(__file__).with_name("websockets_peer.py")), "server",
                               self.certificate, str(self.directory / "key.pem")],
                              stdout=subprocess.PIPE, text=True) as peer, contextlib.ExitStack() as at_end:
            at_end.callback(peer.kill)
            plain, encrypted = peer.stdout.readline().split()
            self.expect_answer(plain)
            self.expect_answer(encrypted, "--ca", self.certificate)
            for compressed, extensions in (([], ""), (["--ws-deflate"], "permessage-deflate")):
                for url in (plain, encrypted):
                    done = self.ask(url, "--ca", self.certificate, *compressed, text="extensions")
                    self.assertEqual((done.status, done.stdout), (0, extensions + "\n"), done.stderr)
                    done = run_tool(TOOL, "send", url, "--ca", self.certificate, *compressed, "x" * 70000)
                    self.assertEqual((done.status, done.stdout), (0, "x" * 70000 + "\n"), done.stderr)
            done = self.ask(plain, text="close 4001")
            self.assertEqual(done.status, 1)


if __name__ == "__main__":
    unittest.main()
