#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Drives the example chat_server over TCP and HTTP, and exits 0 if it keeps what the head of its source promises; and
chat_client, over TCP and WebSocket.

chat_test.py CHAT_SERVER CHAT_CLIENT
"""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest

import wire_client
from tool_fixture import _Lines

PROGRAM = CLIENT = ""
HELLO, JOIN, LEAVE, SAY, WHISPER, ROOMS = range(1, 7)
MESSAGE, PRESENCE, ROOM, PRIVATE, ERROR = range(16, 21)
DEADLINE = 20.0


class ChatServer:
    def __init__(self) -> None:
        command = [PROGRAM, "--http", "127.0.0.1:0", "--ws", "127.0.0.1:0", "--tcp", "127.0.0.1:0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        watchdog = threading.Timer(DEADLINE, self.process.kill)
        watchdog.start()
        lines = [self.process.stdout.readline() for _ in range(3)]
        watchdog.cancel()
        found = [re.fullmatch(r"chat at (ws|tcp|http)://127\.0\.0\.1:(\d+)(/?)\n", line) for line in lines]
        if not all(found) or [m.group(1, 3) for m in found] != [("ws", ""), ("tcp", ""), ("http", "/")]:
            self.process.kill()
            raise AssertionError(f"instead of its addresses the server printed {lines}")
        self.ws, self.tcp, self.http = (int(match.group(2)) for match in found)

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        printed, _ = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == 0, f"after SIGTERM it ended with {self.process.returncode}"
        return printed


class User:
    """One client; what the server tells it of its own accord is kept until asked for."""

    def __init__(self, server: ChatServer, name: str | None = None, rooms: tuple[str, ...] = ()) -> None:
        self.wire = wire_client.Client("127.0.0.1", server.tcp)
        self.told: list[wire_client.Packet] = []
        if name:
            self.hello = self.ok(HELLO, name=name)
        for room in rooms:
            self.ok(JOIN, room=room)

    def ask(self, kind: int, **fields: object) -> dict:
        return self.ask_raw(kind, json.dumps(fields).encode())

    def ask_raw(self, kind: int, payload: bytes) -> dict:
        answer = self.wire.request(payload, biz_type=kind)
        assert answer.biz_type == kind, answer
        return json.loads(answer.payload)

    def ok(self, kind: int, **fields: object) -> dict:
        answer = self.ask(kind, **fields)
        assert answer["ok"] is True, (kind, fields, answer)
        return answer

    def refused(self, error: str, kind: int, **fields: object) -> dict:
        answer = self.ask(kind, **fields)
        assert (answer["ok"], answer["error"]) == (False, error), (kind, fields, answer)
        assert answer["text"], answer
        return answer

    def next(self, kind: int) -> dict:
        """The next of that kind; those of other kinds stay."""
        for index, packet in enumerate(self.told):
            if packet.biz_type == kind:
                return json.loads(self.told.pop(index).payload)
        while True:
            packet = self.wire.receive()
            if packet.biz_type == kind:
                return json.loads(packet.payload)
            self.told.append(packet)

    def next_request(self) -> wire_client.Packet:
        while True:
            packet = self.wire.receive()
            if packet.type == wire_client.REQUEST:
                return packet
            self.told.append(packet)

    def nothing_of(self, kind: int) -> None:
        """The server has nothing of that kind for this client by now."""
        self.ask(ROOMS)  # what came before its answer is there
        while self.wire._inbox:
            self.told.append(self.wire.receive())
        assert not [p for p in self.told if p.biz_type == kind], self.told

    def close(self) -> None:
        self.wire.close()


class Terminal:
    """chat_client with pipes for its terminal."""

    def __init__(self, url: str, *arguments: str) -> None:
        self.process = subprocess.Popen([CLIENT, url, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)
        self.out, self.err = _Lines(self.process.stdout), _Lines(self.process.stderr)

    def type(self, *lines: str) -> None:
        for line in lines:
            self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def prints(self, *lines: str) -> None:
        """All that it has printed so far, once it is so much."""
        printed = self.out.wait(lambda all: len(all) >= len(lines), DEADLINE)
        assert printed == list(lines), f"it printed {printed}; {self.process.poll()}"

    def end(self) -> int:
        self.process.stdin.close()
        return self.process.wait(DEADLINE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()


class ChatTest(unittest.TestCase):
    def setUp(self) -> None:
        self.server = ChatServer()
        self.addCleanup(self.end)

    def end(self) -> None:
        if self.server.process.poll() is None:
            self.server.process.kill()
        self.server.process.communicate()

    def user(self, name: str | None = None, *rooms: str) -> User:
        user = User(self.server, name, rooms)
        self.addCleanup(user.close)
        return user

    # --- names ---

    def test_hello_comes_first_and_once(self) -> None:
        user = self.user()
        for kind in (JOIN, LEAVE, SAY, WHISPER, ROOMS):
            user.refused("hello_first", kind, room="Lobby", text="x", to="x")
        answer = user.ok(HELLO, name="Ada")
        self.assertEqual(answer["name"], "Ada")
        self.assertEqual(answer["limits"], {"name": 24, "text": 2000, "rooms": 8, "history": 50})
        self.assertEqual(
            sorted(answer["rooms"], key=lambda room: room["room"]),
            [{"room": room, "members": 0} for room in ("Help", "Lobby", "Random")],
        )
        user.refused("already_named", HELLO, name="Eva")

    def test_names_are_unique(self) -> None:
        ada = self.user("Ada")
        other = self.user()
        other.refused("name_taken", HELLO, name="Ada")
        other.refused("name_taken", HELLO, name="aDA")
        other.refused("name_taken", HELLO, name="Ada", token="0" * 32)
        other.refused("name_taken", HELLO, name="Ada", token=None)
        other.ok(HELLO, name="Adam")
        ada.close()
        third = self.user()
        self.eventually(lambda: third.ask(HELLO, name="Ada")["ok"])

    def test_names_have_limits(self) -> None:
        user = self.user()
        for bad in ("", " ", "a" * 25, "\u00e9" * 25, " a", "a ", "a  b", "a\nb", "a\u200bb", "\u202eabc", "a\u00a0b", "\x7f"):
            user.refused("bad_name", HELLO, name=bad)
            time.sleep(0.2)  # more of them at once are refused for that
        user.refused("bad_field", HELLO)
        user.refused("bad_field", HELLO, name=5)
        user.ok(HELLO, name="\U0001f600" * 23 + "<")

    def test_a_name_is_taken_back_with_its_token(self) -> None:
        ada = self.user("Ada", "Lobby")
        eva = self.user("Eva", "Lobby")
        again = self.user()
        answer = again.ok(HELLO, name="Ada", token=ada.hello["token"])
        self.assertNotEqual(answer["token"], ada.hello["token"])
        ada.wire.wait_end(5)
        self.assertEqual(eva.next(PRESENCE), {"room": "Lobby", "name": "Ada", "event": "gone"})
        self.assertEqual(again.ok(JOIN, room="Lobby")["members"], ["Eva", "Ada"])
        late = self.user()
        late.refused("name_taken", HELLO, name="Ada", token=ada.hello["token"])

    # --- rooms ---

    def test_messages_reach_the_members_of_the_room_in_order(self) -> None:
        ada, eva, bob = self.user("Ada", "Lobby"), self.user("Eva", "Lobby", "Help"), self.user("Bob", "Help")
        before = time.time() * 1000
        for number in range(1, 6):
            answer = ada.ok(SAY, room="lobby", text=f"<b>{number}</b>")
            self.assertEqual(answer["id"], number)
        for user in (ada, eva):
            for number in range(1, 6):
                message = user.next(MESSAGE)
                self.assertLess(abs(message.pop("time") - before), 60_000)
                self.assertEqual(message, {"room": "Lobby", "id": number, "from": "Ada", "text": f"<b>{number}</b>"})
        bob.nothing_of(MESSAGE)
        bob.refused("not_in_room", SAY, room="Lobby", text="x")
        bob.refused("not_in_room", SAY, room="nowhere", text="x")

    def test_presence(self) -> None:
        ada = self.user("Ada", "Lobby")
        eva = self.user("Eva")
        joined = eva.ok(JOIN, room="Lobby")
        self.assertEqual((joined["room"], joined["members"], joined["history"]), ("Lobby", ["Ada", "Eva"], []))
        self.assertEqual(ada.next(PRESENCE), {"room": "Lobby", "name": "Eva", "event": "join"})
        self.assertEqual(eva.ok(JOIN, room="Lobby")["members"], ["Ada", "Eva"])  # again: no news
        eva.ok(LEAVE, room="Lobby")
        self.assertEqual(ada.next(PRESENCE), {"room": "Lobby", "name": "Eva", "event": "leave"})
        eva.refused("not_in_room", LEAVE, room="Lobby")
        eva.ok(JOIN, room="Lobby")
        self.assertEqual(ada.next(PRESENCE)["event"], "join")
        eva.close()
        self.assertEqual(ada.next(PRESENCE), {"room": "Lobby", "name": "Eva", "event": "gone"})
        # everybody hears how many are in each room
        bob = self.user("Bob")
        ada.ok(JOIN, room="Tea")
        self.assertEqual(bob.next(ROOM), {"room": "Tea", "members": 1})
        self.assertIn({"room": "Tea", "members": 1}, bob.ok(ROOMS)["rooms"])

    def test_history_holds_the_last_fifty(self) -> None:
        ada = self.user("Ada", "Lobby")
        for number in range(1, 61):
            while not ada.ask(SAY, room="Lobby", text=f"text {number}")["ok"]:
                time.sleep(0.1)  # the rate limit
        history = self.user("Eva").ok(JOIN, room="Lobby")["history"]
        self.assertEqual([m["id"] for m in history], list(range(11, 61)))
        self.assertEqual([m["text"] for m in history], [f"text {n}" for n in range(11, 61)])
        self.assertEqual({m["from"] for m in history}, {"Ada"})

    def test_a_history_of_long_texts_is_given_whole(self) -> None:
        users = [self.user(f"user {n}", "Lobby") for n in range(3)]
        text = "\U0001f600" * 2000
        for number in range(51):
            users[number % 3].ok(SAY, room="Lobby", text=text)
        history = self.user("Eva").ok(JOIN, room="Lobby")["history"]
        self.assertEqual([m["text"] for m in history], [text] * 50)

    def test_rooms_have_limits(self) -> None:
        user = self.user("Ada")
        for bad in ("", "r" * 25, "a\u202e", " x"):
            user.refused("bad_room", JOIN, room=bad)
        for number in range(8):
            user.ok(JOIN, room=f"room {number}")
        user.refused("too_many_rooms", JOIN, room="one more")
        user.ok(JOIN, room="ROOM 7")
        user.ok(LEAVE, room="room 0")
        user.ok(JOIN, room="one more")

    def test_empty_rooms_make_place_for_new_ones(self) -> None:
        users = [self.user(f"user {n}") for n in range(8)]
        for index, user in enumerate(users):
            for room in range(8 if index < 7 else 5):
                user.ok(JOIN, room=f"room {index} {room}")
        users[7].refused("no_more_rooms", JOIN, room="one more")
        users[0].ok(LEAVE, room="room 0 3")
        users[7].ok(JOIN, room="one more")
        names = {room["room"] for room in users[7].ok(ROOMS)["rooms"]}
        self.assertEqual(len(names), 64)
        self.assertNotIn("room 0 3", names)
        self.assertIn("Lobby", names)

    # --- private messages ---

    def test_a_private_message_is_delivered(self) -> None:
        ada, eva, bob = self.user("Ada"), self.user("Eva"), self.user("Bob")
        asked = ada.wire.start_request(json.dumps({"to": "eva", "text": "psst"}).encode(), biz_type=WHISPER)
        request = eva.next_request()
        self.assertEqual(request.biz_type, PRIVATE)
        private = json.loads(request.payload)
        self.assertLess(abs(private.pop("time") - time.time() * 1000), 60_000)
        self.assertEqual(private, {"from": "Ada", "text": "psst"})
        eva.wire.respond(request, b'{"ok":true}')
        self.assertEqual(json.loads(ada.wire.response(asked).payload), {"ok": True, "delivered": True})
        bob.nothing_of(PRIVATE)
        self.assertIn("1 private ones, 1 of them delivered", self.server.stop())

    def test_a_private_message_is_not_delivered(self) -> None:
        ada, eva = self.user("Ada"), self.user("Eva")
        ada.refused("no_such_user", WHISPER, to="Nobody", text="x")
        ada.refused("no_such_user", WHISPER, to="ada", text="x")
        ada.refused("bad_text", WHISPER, to="Eva", text="")
        for answer in (b'{"ok":false}', b'{"ok":1}', b"[]", b"", b"\xff"):
            asked = ada.wire.start_request(b'{"to":"Eva","text":"x"}', biz_type=WHISPER)
            eva.wire.respond(eva.next_request(), answer)
            refused = json.loads(ada.wire.response(asked).payload)
            self.assertEqual((refused["error"], refused["text"]), ("not_delivered", "Eva did not take it"))
        asked = ada.wire.start_request(b'{"to":"Eva","text":"x"}', biz_type=WHISPER)
        eva.next_request()
        eva.close()
        refused = json.loads(ada.wire.response(asked).payload)
        self.assertEqual((refused["error"], refused["text"]), ("not_delivered", "Eva did not answer"))

    def test_who_does_not_answer_is_not_waited_for_for_ever(self) -> None:
        ada, eva = self.user("Ada"), self.user("Eva", "Lobby")
        asked = ada.wire.start_request(b'{"to":"Eva","text":"x"}', biz_type=WHISPER)
        ada.ok(JOIN, room="Lobby")  # meanwhile all goes on
        self.assertEqual(json.loads(ada.wire.response(asked, 10).payload)["error"], "not_delivered")
        eva.wire.respond(eva.next_request(), b'{"ok":true}')
        eva.ok(SAY, room="Lobby", text="late, and nothing comes of it")

    # --- the client for terminals ---

    def terminal(self, url: str, *arguments: str) -> Terminal:
        terminal = Terminal(url, *arguments)
        self.addCleanup(terminal.close)
        return terminal

    def urls(self) -> tuple[str, str]:
        return f"tcp://127.0.0.1:{self.server.tcp}", f"ws://127.0.0.1:{self.server.ws}/"

    def test_a_terminal_takes_part(self) -> None:
        for room, url in zip(("Tea", "Milk"), self.urls()):
            with self.subTest(url):
                ada = self.user("Ada L", room)
                ada.ok(SAY, room=room, text="one\nEva: two")
                expected = ["Ada L: one", "  Eva: two", f"* in {room}: Ada L, Grace"]
                grace = self.terminal(url, "Grace", room.lower())
                grace.prints(*expected)
                self.assertEqual(ada.next(PRESENCE), {"room": room, "name": "Grace", "event": "join"})
                grace.type("caf\u00e9 <b>?", "")
                while (said := ada.next(MESSAGE))["from"] == "Ada L":
                    pass
                self.assertEqual((said["from"], said["text"]), ("Grace", "caf\u00e9 <b>?"))
                ada.ok(SAY, room=room, text="why not")
                eva = self.user("Eva", room)
                eva.ok(LEAVE, room=room)
                expected += ["Ada L: why not", "* Eva came in", "* Eva left"]
                grace.prints(*expected)

                grace.type('/to "ada l"  psst ')
                request = ada.next_request()
                self.assertEqual(json.loads(request.payload)["text"], "psst ")
                grace.prints(*expected)  # it has not been shown yet
                ada.wire.respond(request, b'{"ok":true}')
                expected += ["* delivered to ada l"]
                grace.prints(*expected)
                self.assertTrue(ada.ok(WHISPER, to="Grace", text="yes?")["delivered"])
                expected += ["Ada L to you alone: yes?"]
                for line, said in (("/to Bob x", "nobody of that name is here"), ("/to Eva", "there is only /to NAME TEXT"),
                                   ("/help", "there is only /to NAME TEXT"), ("x" * 2001, "a text may have 2000 characters")):
                    grace.type(line)
                    expected += [f"! {said}"]
                    grace.prints(*expected)

                grace.process.stdin.write("bye")  # without an end of the line
                self.assertEqual(grace.end(), 0)
                self.assertEqual((grace.out.text().splitlines(), grace.err.text()), (expected, ""))
                self.assertEqual(ada.next(MESSAGE)["text"], "why not")
                self.assertEqual(ada.next(MESSAGE)["text"], "bye")
                for event in ("join", "leave"):
                    self.assertEqual(ada.next(PRESENCE), {"room": room, "name": "Eva", "event": event})
                self.assertEqual(ada.next(PRESENCE), {"room": room, "name": "Grace", "event": "leave"})
                for user in (ada, eva):
                    user.close()
                other = self.user()
                self.eventually(lambda: other.ask(HELLO, name="Ada L")["ok"])
                other.close()

    def test_a_terminal_ends_with_the_reason(self) -> None:
        tcp, ws = self.urls()
        ada = self.user("Ada")
        done = self.terminal(ws, "ada")
        self.assertEqual((done.process.wait(DEADLINE), done.out.text()), (1, ""))
        self.assertEqual(done.err.text(), "chat_client: somebody is called ada already\n")
        done = self.terminal(ws, "Eva", " ")
        self.assertEqual(done.process.wait(DEADLINE), 1)
        self.assertIn("single spaces", done.err.text())
        done = self.terminal(f"ws://127.0.0.1:{self.server.tcp}/", "Eva")
        self.assertEqual(done.process.wait(DEADLINE), 1)
        self.assertIn("WebSocket", done.err.text())
        for arguments, status in ((["--help"], 0), ([], 2), (["a", "b", "c", "d"], 2)):
            ran = subprocess.run([CLIENT, *arguments], capture_output=True, text=True, timeout=DEADLINE)
            self.assertEqual((ran.returncode, "/to NAME TEXT" in ran.stdout + ran.stderr), (status, True))
        waiting = [self.terminal(url, name) for url, name in ((tcp, "Eva"), (ws, "Bob"))]
        for terminal in waiting:
            terminal.out.wait(lambda all: any(line.startswith("* in Lobby: ") for line in all), DEADLINE)
        self.server.stop()
        for terminal in waiting:
            self.assertEqual(terminal.process.wait(DEADLINE), 1)
            self.assertRegex(terminal.out.text(), r"(?m)^\* the connection has ended: ")
        ada.wire.wait_end(5)

    # --- what is hostile ---

    def test_bad_input_is_answered(self) -> None:
        user = self.user("Ada", "Lobby")
        for payload in (b"", b"{", b"\xff\xfe", b'{"room":"\xff"}', b"[" * 10_000, b"nonsense"):
            self.assertEqual(user.ask_raw(SAY, payload)["error"], "bad_json")
        for payload in (b"[]", b"5", b"null", b'"text"'):
            self.assertEqual(user.ask_raw(SAY, payload)["error"], "bad_json")
        self.assertEqual(user.ask_raw(SAY, b" " * 32 * 1024 + b"{}")["error"], "too_long")
        time.sleep(2)
        for kind in (0, 7, 16, 19, 255):
            user.refused("unknown_kind", kind)
        for bad in ("", " \n\t", "x" * 2001, "a\x00b", "a\x1bb", "\u202ex"):
            user.refused("bad_text", SAY, room="Lobby", text=bad)
        user.refused("bad_field", SAY, room="Lobby", text=["x"])
        user.ok(SAY, room="Lobby", text="x" * 1999 + "\n")
        user.ok(SAY, room="Lobby", text="\U0001f469\u200d\U0001f52c")

    def test_one_way_messages_count_too_and_their_errors_come_back(self) -> None:
        user = self.user("Ada", "Lobby")
        user.wire.send(b'{"room":"Lobby","text":"one-way"}', biz_type=SAY)
        self.assertEqual(user.next(MESSAGE)["text"], "one-way")
        user.wire.send(b'{"room":"elsewhere","text":"one-way"}', biz_type=SAY)
        self.assertEqual(user.next(ERROR)["error"], "not_in_room")
        user.wire.send(b'{"to":"nobody","text":"x"}', biz_type=WHISPER)
        self.assertEqual(user.next(ERROR)["error"], "no_such_user")

    def test_a_flood_is_refused_and_in_the_end_cut_off(self) -> None:
        ada, eva = self.user("Ada", "Lobby"), self.user("Eva", "Lobby")
        answers = [ada.ask(SAY, room="Lobby", text="x") for _ in range(30)]
        refused = [answer for answer in answers if not answer["ok"]]
        self.assertEqual({answer["error"] for answer in refused}, {"too_fast"})
        self.assertGreaterEqual(len(refused), 5)
        time.sleep(0.5)
        self.assertTrue(ada.ask(SAY, room="Lobby", text="slower")["ok"])
        with self.assertRaises(wire_client.ConnectionEnded):
            for _ in range(100_000):
                ada.wire.send(b"{}", biz_type=SAY)
        self.assertEqual(eva.next(PRESENCE)["event"], "gone")
        eva.ok(SAY, room="Lobby", text="still here")

    def test_what_breaks_the_wire_format_ends_that_session_only(self) -> None:
        ada, eva = self.user("Ada", "Lobby"), self.user("Eva", "Lobby")
        ada.wire.send_raw(wire_client.encode_header(payload_len=1024 * 1024 + 1))
        ada.wire.wait_end(5)
        self.assertEqual(eva.next(PRESENCE), {"room": "Lobby", "name": "Ada", "event": "gone"})
        eva.ok(SAY, room="Lobby", text="still here")

    def test_a_client_that_does_not_read_is_left_behind(self) -> None:
        deaf = User.__new__(User)
        deaf.wire = wire_client.Client("127.0.0.1", self.server.tcp, receive_buffer=4096)
        deaf.told = []
        self.addCleanup(deaf.close)
        deaf.ok(HELLO, name="Deaf")
        deaf.ok(JOIN, room="Lobby")
        talkers = [self.user(f"talker {n}", "Lobby") for n in range(40)]
        text = "\U0001f600" * 2000
        for _ in range(18):
            for talker in talkers:
                talker.ok(SAY, room="Lobby", text=text)
        self.eventually(lambda: self.members("Lobby") == 40)

    def members(self, room: str) -> int:
        watcher = self.user()
        found = [r["members"] for r in watcher.ok(HELLO, name=f"watcher {time.monotonic()}"[:24])["rooms"] if r["room"] == room]
        watcher.close()
        return found[0]

    # --- the page ---

    def get(self, target: str, method: str = "GET", **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.http, timeout=10)
        self.addCleanup(connection.close)
        connection.putrequest(method, target, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        response = connection.getresponse()
        return response, response.read()

    def test_the_files(self) -> None:
        for path, kind, within in (
            ("/", "text/html; charset=utf-8", b"<!doctype html>"),
            ("/index.html", "text/html; charset=utf-8", b"<!doctype html>"),
            ("/?x=1", "text/html; charset=utf-8", b"<!doctype html>"),
            ("/style.css", "text/css; charset=utf-8", b"{"),
            ("/chat.js", "text/javascript; charset=utf-8", b"/msgtrans.js"),
            ("/msgtrans.js", "text/javascript; charset=utf-8", b"export class Client"),
            ("/icon.svg", "image/svg+xml", b"<svg"),
            ("/config.json", "application/json", b'"ws"'),
        ):
            response, body = self.get(path)
            self.assertEqual((response.status, response.headers["Content-Type"]), (200, kind), path)
            self.assertIn(within, body)
            head, nothing = self.get(path, "HEAD")
            self.assertEqual((head.status, nothing), (200, b""))
            self.assertEqual(head.headers["Content-Length"], str(len(body)))
            self.assertEqual(response.headers["X-Content-Type-Options"], "nosniff")
            self.assertEqual(response.headers["Referrer-Policy"], "no-referrer")

    def test_the_page_may_connect_to_the_chat_and_to_nothing_else(self) -> None:
        ws = json.loads(self.get("/config.json")[1])["ws"]
        self.assertEqual(ws, self.server.ws)
        socket.create_connection(("127.0.0.1", ws), 5).close()
        policy = self.get("/")[0].headers["Content-Security-Policy"]
        self.assertIn("default-src 'none'", policy)
        self.assertIn(f"connect-src 'self' ws://127.0.0.1:{ws} wss://127.0.0.1:{ws};", policy)
        self.assertNotIn("unsafe", policy)
        policy = self.get("/", Host="chat.example:80")[0].headers["Content-Security-Policy"]
        self.assertIn(f"connect-src 'self' ws://chat.example:{ws} wss://chat.example:{ws};", policy)
        policy = self.get("/", Host="x; script-src *")[0].headers["Content-Security-Policy"]
        self.assertIn("connect-src 'self' ws: wss:;", policy)
        self.assertNotIn("*", policy)

    def test_nothing_else_is_served(self) -> None:
        for path in ("/../chat.cpp", "/..%2fserver.cpp", "//etc/passwd", "/chat", "/style.css/", "/%2e%2e/", "/STYLE.CSS", "*"):
            self.assertEqual(self.get(path)[0].status, 404, path)
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            response, _ = self.get("/", method)
            self.assertEqual((response.status, response.headers["Allow"]), (405, "GET, HEAD"))

    def test_bad_http_ends_that_connection_only(self) -> None:
        for data in (b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n", b"\x00" * 100):
            with socket.create_connection(("127.0.0.1", self.server.http), 5) as connection:
                connection.sendall(data)
                try:
                    self.assertEqual(connection.recv(100), b"")
                except ConnectionResetError:
                    pass
        self.assertEqual(self.get("/")[0].status, 200)

    def test_who_asks_nothing_is_closed_in_the_end_and_too_many_at_once(self) -> None:
        idle = [socket.create_connection(("127.0.0.1", self.server.http), 5) for _ in range(300)]
        for connection in idle:
            self.addCleanup(connection.close)
        with self.assertRaises((http.client.HTTPException, OSError)):
            self.get("/")
        begun = time.monotonic()
        for connection in idle:
            connection.settimeout(20)
            self.assertEqual(connection.recv(1), b"")
        self.assertLess(time.monotonic() - begun, 15)
        self.eventually(lambda: self.get("/")[0].status == 200)

    def test_one_connection_may_ask_many_times(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.http, timeout=10)
        for method in ("GET", "HEAD", "POST", "GET"):
            connection.request(method, "/style.css", headers={"Content-Length": "0"} if method == "POST" else {})
            connection.getresponse().read()
        connection.close()

    # --- its life ---

    def test_sigterm_ends_it_with_a_summary(self) -> None:
        ada = self.user("Ada", "Lobby")
        ada.ok(SAY, room="Lobby", text="x")
        ada.refused("not_in_room", SAY, room="Help", text="x")
        self.assertEqual(
            self.server.stop(), "served 1 sessions: 1 messages, 0 private ones, 0 of them delivered; 1 refused\n"
        )
        ada.wire.wait_end(5)

    def test_options(self) -> None:
        for arguments, status, said in (
            (["--help"], 0, "--http"),
            (["--nonsense"], 2, "--nonsense is not known"),
            (["--ws"], 2, "--ws needs a value"),
            (["--ws", "nowhere"], 1, "nowhere"),
            (["--ws", "127.0.0.1:0", "--http", f"127.0.0.1:{self.server.http}"], 1, f"127.0.0.1:{self.server.http}: "),
            (["--ws", "127.0.0.1:0", "--http", "127.0.0.1:0", "--files", "/nonexistent"], 1, "/nonexistent"),
        ):
            done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=DEADLINE)
            self.assertEqual(done.returncode, status, arguments)
            self.assertIn(said, done.stdout + done.stderr)

    def eventually(self, condition) -> None:  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + 10
        while not condition():
            self.assertLess(time.monotonic(), deadline, "not within 10 s")
            time.sleep(0.25)


if __name__ == "__main__":
    PROGRAM, CLIENT = sys.argv.pop(1), sys.argv.pop(1)
    unittest.main()
