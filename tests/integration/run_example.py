#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs an example as its user would, and exits 0 if it did what it promises.

run_example.py echo-server EXAMPLE TOOL   EXAMPLE listens, answers `TOOL send`, and ends well at SIGTERM
run_example.py prints EXAMPLE LINE...     EXAMPLE ends by itself with status 0 and prints these lines, in any order
run_example.py matches EXAMPLE ARGUMENT... -- PATTERN...
                                          EXAMPLE ends by itself with status 0 and prints a line like each pattern
"""

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


def drive_echo_server(server, tool):
    line = server.stdout.readline()
    ready = re.fullmatch(r"listening tcp (\S+:\d+)\n", line)
    if not ready:
        fail(f"instead of its listening line the example printed {line!r}")
    url = "tcp://" + ready.group(1)
    for arguments in (["--request", "a request"], ["a message"]):
        reply = run(tool, "send", url, *arguments)
        if reply != arguments[-1] + "\n":
            fail(f"send {arguments} printed {reply!r}")
    server.send_signal(signal.SIGTERM)
    status = server.wait(timeout=DEADLINE)
    if status != 0:
        fail(f"after SIGTERM the example ended with {status}")


def echo_server(example, tool):
    server = subprocess.Popen([example, "127.0.0.1:0"], stdout=subprocess.PIPE, text=True)
    # readline() has no deadline of its own: killing the server ends it
    watchdog = threading.Timer(DEADLINE, server.kill)
    watchdog.start()
    try:
        drive_echo_server(server, tool)
    finally:
        watchdog.cancel()
        server.kill()
        server.wait()


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
    {"echo-server": echo_server, "prints": prints, "matches": matches}[sys.argv[1]](*sys.argv[2:])
