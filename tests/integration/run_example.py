#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs an example as its user would, and exits 0 if it did what it promises.

run_example.py echo-server EXAMPLE TOOL   EXAMPLE listens, answers `TOOL send`, and ends well at SIGTERM
run_example.py handover EXAMPLE TOOL      the same, and at SIGUSR2 a successor of it takes over
run_example.py prints EXAMPLE LINE...     EXAMPLE ends by itself with status 0 and prints these lines, in any order
run_example.py matches EXAMPLE ARGUMENT... -- PATTERN...
                                          EXAMPLE ends by itself with status 0 and prints a line like each pattern
"""

import os
import re
import signal
import subprocess
import sys
import threading

DEADLINE = 30.0


def fail(what):
    sys.exit(f"run_example: {what}")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode != 0:
        fail(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done.stdout


def expect_line(server, pattern):
    line = server.stdout.readline()
    found = re.fullmatch(pattern + r"\n", line)
    if not found:
        fail(f"instead of a line like {pattern} the example printed {line!r}")
    return found.group(1)


def drive_echo_server(server, tool):
    url = "tcp://" + expect_line(server, r"listening tcp (\S+:\d+)")
    expect_echoes(url, tool)
    server.send_signal(signal.SIGTERM)
    status = server.wait(timeout=DEADLINE)
    if status != 0:
        fail(f"after SIGTERM the example ended with {status}")


def drive_handover(server, tool):
    address = expect_line(server, r"listening tcp (\S+:\d+)")
    expect_echoes("tcp://" + address, tool)
    server.send_signal(signal.SIGUSR2)
    expect_line(server, f"listening tcp ({address})")
    successor = int(expect_line(server, r"process (\d+) has taken over"))
    status = server.wait(timeout=DEADLINE)
    if status != 0:
        fail(f"after SIGUSR2 the example ended with {status}")
    try:
        expect_echoes("tcp://" + address, tool)
    finally:
        os.kill(successor, signal.SIGTERM)
    if server.stdout.read() != "":  # until the last one has closed it
        fail("the successor printed more")


def expect_echoes(url, tool):
    for arguments in (["--request", "a request"], ["a message"]):
        reply = run(tool, "send", url, *arguments)
        if reply != arguments[-1] + "\n":
            fail(f"send {arguments} printed {reply!r}")


def echo_server(example, tool, drive=drive_echo_server):
    server = subprocess.Popen([example, "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
    # readline() has no deadline of its own: killing the server ends it
    watchdog = threading.Timer(DEADLINE, server.kill)
    watchdog.start()
    try:
        drive(server, tool)
    finally:
        watchdog.cancel()
        server.kill()
        server.wait()


def handover(example, tool):
    echo_server(example, tool, drive_handover)


def prints(example, *lines):
    printed = run(example)
    if sorted(printed.splitlines()) != sorted(lines):
        fail(f"the example printed\n{printed}instead of\n" + "\n".join(lines))


def matches(*arguments):
    split = arguments.index("--")
    printed = run(*arguments[:split])
    for pattern in arguments[split + 1:]:
        if not any(re.search(pattern, line) for line in printed.splitlines()):
            fail(f"the example printed\n{printed}and no line like {pattern}")


if __name__ == "__main__":
    {"echo-server": echo_server, "handover": handover, "prints": prints, "matches": matches}[sys.argv[1]](*sys.argv[2:])
