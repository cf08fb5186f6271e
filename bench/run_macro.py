#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the library's server against its rivals: the same frames, the same load, the same machine, in turns.

Each figure is a row of repetitions; in each repetition every rival runs once, one after the other (A B C, A B C, ...), each
time a new server process on one core and the load generator on another. A ratio is formed within a repetition, never
across: the machine's mood changes from minute to minute. bench/README.md says what the figures mean.
"""

import argparse
import contextlib
import datetime
import functools
import json
import os
import pathlib
import platform
import re
import resource
import select
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

BENCH = pathlib.Path(__file__).resolve().parent
ROOT = BENCH.parent

RIVALS = {
    "epoll": ["bench_epoll_server"],
    "asio": ["bench_asio_server", "--style", "callback"],
    "asio-coroutine": ["bench_asio_server", "--style", "coroutine"],
    "msgtrans": ["bench_msgtrans_server"],
    "msgtrans-coroutine": ["bench_msgtrans_server", "--coroutines"],
    # Of the figures about transports:
    "asio-tls": ["bench_asio_tls_server", "--style", "batch"],
    "asio-tls-message": ["bench_asio_tls_server", "--style", "message"],
    "msgtrans-tls": ["bench_msgtrans_server", "--transport", "tls"],
    "msgtrans-unix": ["bench_msgtrans_server", "--transport", "unix"],
    "beast": ["bench_beast_server"],
    "msgtrans-ws": ["bench_msgtrans_server", "--transport", "ws"],
    "msgtrans-wss": ["bench_msgtrans_server", "--transport", "wss"],
}
NEEDS_CERTIFICATE = ("asio-tls", "asio-tls-message", "msgtrans-tls", "msgtrans-wss")
REFERENCE = "epoll"
OURS = "msgtrans"


class Failure(Exception):
    """Something went wrong that makes a figure worthless."""


class Figure:
    """One line of the report: what is run, which of its numbers counts, and what the ratio to the reference should be."""

    def __init__(self, name, title, load, metrics, rivals=tuple(RIVALS), server_args=(), timed=True,
                 reference=REFERENCE, ours=OURS, group="", beside=()):
        self.name = name
        self.title = title
        self.load = load  # arguments of bench_load
        self.metrics = metrics  # list of Metric
        self.rivals = rivals
        self.server_args = list(server_args)
        self.timed = timed  # takes --duration and --warmup
        self.reference = reference
        self.ours = ours  # whose ratio to the reference is wanted
        self.group = group  # a name for several figures; their rivals are what they are, whatever --rivals says
        self.beside = beside  # further (reference, Target or None): rates, where the target holds, and CPU time


class Metric:
    def __init__(self, key, unit, scale=1.0, target=None, digits=1):
        self.key = key  # dotted path in the JSON object of bench_load
        self.unit = unit
        self.scale = scale
        self.target = target  # text and what it is compared with, or None
        self.digits = digits

    def of(self, result):
        value = result
        for part in self.key.split("."):
            value = value[part]
        return value * self.scale


class Target:
    """What the ratio (or the value itself) should be. Shown beside what was measured, never enforced."""

    def __init__(self, kind, bound, value="ratio"):
        self.kind = kind  # "at least" or "at most"
        self.bound = bound
        self.value = value  # "ratio" to the reference, "difference" from it, or the "value" alone

    def met(self, measured):
        return measured >= self.bound if self.kind == "at least" else measured <= self.bound

    def __str__(self):
        what = " more than the reference" if self.value == "difference" else ""
        return f"{self.kind} {self.bound:g}{what}"


def echo(name, title, connections, pipeline, size, target=None, metrics=None, **others):
    load = ["echo", "--connections", str(connections), "--pipeline", str(pipeline), "--size", str(size)]
    if metrics is None:
        metrics = [
            Metric("messages_per_second", "k messages/s", 1e-3, target),
            Metric("latency_us.p50", "us p50"),
            Metric("latency_us.p99", "us p99"),
            Metric("server_ns_per_message", "ns of server CPU a message", digits=0),
        ]
    return Figure(name, title, load, metrics, **others)


def transport(name, title, connections, pipeline, size, target, rivals, ours, beside=()):
    return echo(name, title, connections, pipeline, size, target, rivals=rivals, reference=rivals[0], ours=ours,
                group="transports", beside=beside)


def idle(name, title, connections, rivals, ours, target=None):
    return Figure(
        name,
        title,
        ["idle", "--connections", str(connections)],
        [
            Metric("resident_per_session", "resident bytes an idle session", 1, target, 0),
            Metric("server_us_per_connection", "us of server CPU a connection"),
        ],
        rivals=rivals,
        timed=False,
        reference=rivals[0],
        ours=ours,
        group="transports",
    )


TLS = ("asio-tls", "asio-tls-message", "msgtrans-tls")
UNIX = ("msgtrans", "msgtrans-unix")
WEBSOCKET = ("epoll", "beast", "msgtrans", "msgtrans-ws")

FIGURES = [
    echo("echo64", "echo, 64 bytes, 100 connections x 16 in flight", 100, 16, 64, Target("at least", 0.85)),
    echo("echo1k", "echo, 1 KiB, 100 connections x 16 in flight", 100, 16, 1024, Target("at least", 0.9)),
    echo("echo64k", "echo, 64 KiB, 100 connections x 1 in flight", 100, 1, 65536, Target("at least", 0.9)),
    echo("echo64k-4", "echo, 64 KiB, 100 connections x 4 in flight", 100, 4, 65536, Target("at least", 0.9)),
    echo(
        "latency",
        "echo, 64 bytes, 1 connection x 1 in flight",
        1,
        1,
        64,
        metrics=[
            Metric("latency_us.p50", "us p50", 1, Target("at most", 1.15), 2),
            Metric("latency_us.p99", "us p99"),
            Metric("messages_per_second", "k messages/s", 1e-3),
            Metric("server_ns_per_message", "ns of server CPU a message", digits=0),
        ],
    ),
    echo("echo100x1", "echo, 64 bytes, 100 connections x 1 in flight", 100, 1, 64),
    Figure(
        "accept",
        "10,000 connections opened as fast as one client can, one exchange each, then idle",
        ["accept", "--connections", "10000", "--window", "64"],
        [
            Metric("connections_per_second", "k connections/s", 1e-3, Target("at least", 0.7), 2),
            Metric("server_us_per_connection", "us of server CPU a connection"),
            Metric("resident_per_session", "resident bytes an idle session", 1, Target("at most", 1024, "difference"), 0),
        ],
        timed=False,
    ),
    Figure(
        "fanout",
        "one-way fan-out, 64 bytes to 1,000 sessions, one packet at a time",
        ["fanout", "--connections", "1000", "--burst", "1", "--size", "64"],
        [
            Metric("messages_per_second", "k messages/s delivered", 1e-3, Target("at least", 0.7)),
            Metric("server_ns_per_message", "ns of server CPU a message", digits=0),
        ],
        rivals=("epoll", "msgtrans"),
        server_args=["--fanout"],
    ),
    Figure(
        "fanout-burst",
        "one-way fan-out, 64 bytes to 1,000 sessions, 64 packets at a time",
        ["fanout", "--connections", "1000", "--burst", "64", "--size", "64"],
        [
            Metric("messages_per_second", "k messages/s delivered", 1e-3, Target("at least", 0.7)),
            Metric("server_ns_per_message", "ns of server CPU a message", digits=0),
        ],
        rivals=("epoll", "msgtrans"),
        server_args=["--fanout"],
    ),
    transport("tls1k", "TLS, 1 KiB, 100 connections x 16 in flight", 100, 16, 1024, Target("at least", 0.9), TLS,
              "msgtrans-tls"),
    transport("tls64k", "TLS, 64 KiB, 100 connections x 1 in flight", 100, 1, 65536, Target("at least", 0.9), TLS,
              "msgtrans-tls"),
    transport("unix64", "Unix socket, 64 bytes, 100 connections x 16 in flight", 100, 16, 64, Target("at least", 1),
              UNIX, "msgtrans-unix"),
    transport("unix1k", "Unix socket, 1 KiB, 100 connections x 16 in flight", 100, 16, 1024, Target("at least", 1),
              UNIX, "msgtrans-unix"),
    transport("unix64k", "Unix socket, 64 KiB, 100 connections x 1 in flight", 100, 1, 65536, Target("at least", 1),
              UNIX, "msgtrans-unix"),
    transport("ws64", "WebSocket, 64 bytes, 100 connections x 16 in flight", 100, 16, 64, Target("at least", 0.75),
              WEBSOCKET, "msgtrans-ws", [("beast", Target("at least", 8)), ("msgtrans", None)]),
    transport("ws64k", "WebSocket, 64 KiB, 100 connections x 1 in flight", 100, 1, 65536, Target("at least", 0.75),
              WEBSOCKET, "msgtrans-ws", [("beast", None), ("msgtrans", None)]),
    idle("ws-idle", "10,000 WebSocket sessions opened one after the other, one exchange each, then idle", 10000,
         WEBSOCKET, "msgtrans-ws", Target("at most", 2048, "value")),
    idle("tls-idle", "2,000 TLS sessions, the same", 2000, (*TLS[:1], "msgtrans-tls", "msgtrans-wss"),
         "msgtrans-tls"),
]

GROUPS = sorted({figure.group for figure in FIGURES if figure.group})

COMPILE = "compile"
COMPILE_TITLE = "compiling a ten-line server that includes the facade, against a file that includes <boost/asio.hpp>"
COMPILE_TARGET = Target("at most", 1.5)

TEN_LINES = """#include <msgtrans/msgtrans.hpp>

int main() {
  msgtrans::ServerTransport server;
  server.listen(msgtrans::tcp("127.0.0.1:8001"));
  server.on_message([](msgtrans::Session& session, const msgtrans::Message& message) {
    if (message.is_request()) session.respond(message, message.payload());
    else session.send(message.payload());
  });
  server.run();
}
"""
ASIO_ALONE = "#include <boost/asio.hpp>\n\nint main() {}\n"


def output_of(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_machine(cores):
    model = ""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.*)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found.group(1) if found else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # git describe of a checkout with local changes says so by "-dirty".
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": model,
        "cores": os.cpu_count(),
        "cores_used": list(cores),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "commit": output_of(["git", "describe", "--always", "--dirty", "--tags"]) or "unknown",
    }


def describe_build(binaries):
    """The compiler and the build type, from the build folder that holds the programs."""
    for folder in (binaries, *binaries.parents):
        cache = folder / "CMakeCache.txt"
        if cache.is_file():
            values = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(errors="replace"), re.MULTILINE))
            compiler = values.get("CMAKE_CXX_COMPILER", "")
            version = output_of([compiler, "--version"]) if compiler else None
            flags = f"{values.get('CMAKE_CXX_FLAGS', '')} {values.get('CMAKE_CXX_FLAGS_RELEASE', '')}".strip()
            return {
                "compiler": version.splitlines()[0] if version else compiler or "unknown",
                "build_type": values.get("CMAKE_BUILD_TYPE", "unknown"),
                "flags": flags,
            }
    return {"compiler": "unknown", "build_type": "unknown", "flags": ""}


def pinned(core):
    def before_exec():
        os.sched_setaffinity(0, {core})
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    return before_exec


class Server:
    """A server process on its core, from "listening" to its exit."""

    def __init__(self, command, core):
        self.name = shlex.join([pathlib.Path(command[0]).name, *command[1:]])
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.errors, text=True, preexec_fn=pinned(core)
        )
        try:
            self.address = self.wait_until_listening()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def wait_until_listening(self):
        ready, _, _ = select.select([self.process.stdout], [], [], 10)
        line = self.process.stdout.readline() if ready else ""
        found = re.fullmatch(r"listening (?:(tcp|tls|ws|wss) 127\.0\.0\.1:(\d+)/?|unix (\S+))\n", line)
        if not found:
            self.process.kill()
            self.process.wait()
            raise Failure(f"{self.name} does not listen (said {line!r}){self.complaints()}")
        transport, port, path = found.groups()
        if path is not None:
            return ["--transport", "unix", "--path", path]
        return ["--port", port] if transport == "tcp" else ["--transport", transport, "--port", port]

    def complaints(self):
        self.errors.seek(0)
        text = self.errors.read().strip()
        return f"; on standard error: {text[-2000:]}" if text else ""

    def check_alive(self):
        if self.process.poll() is not None:
            raise Failure(f"{self.name} died with status {self.process.returncode}{self.complaints()}")

    def stop(self):
        self.check_alive()
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            raise Failure(f"{self.name} does not end after SIGTERM{self.complaints()}") from None
        if status != 0:
            raise Failure(f"{self.name} ended with status {status}{self.complaints()}")

    def end(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()


@functools.cache
def certificate_folder():
    """A folder with a key (EC P-256) and a certificate for it, the same for all servers of this run."""
    folder = tempfile.TemporaryDirectory(prefix="msgtrans-bench-")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    command += ["-subj", "/CN=localhost", "-days", "2", "-keyout", "key.pem", "-out", "certificate.pem"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder.name, check=False)
    except OSError as error:
        raise Failure(f"no certificate: openssl: {error.strerror}") from None
    if done.returncode != 0:
        raise Failure(f"no certificate: {done.stderr.strip()}")
    return folder


def certificate_arguments():
    folder = pathlib.Path(certificate_folder().name)
    return ["--certificate", str(folder / "certificate.pem"), "--key", str(folder / "key.pem")]


def measure(options, figure, rival):
    command = [str(options.bin / RIVALS[rival][0]), *RIVALS[rival][1:], *figure.server_args]
    if rival == "msgtrans-unix":
        command += ["--path", f"@msgtrans-bench-{os.getpid()}"]
    else:
        command += ["--port", "0"]
    if rival in NEEDS_CERTIFICATE:
        command += certificate_arguments()
    server = Server(command, options.cores[0])
    try:
        load = [str(options.bin / "bench_load"), *figure.load]
        load += [*server.address, "--pid", str(server.process.pid)]
        if figure.timed:
            load += ["--duration", str(options.duration), "--warmup", str(options.warmup)]
        try:
            done = subprocess.run(
                load,
                capture_output=True,
                text=True,
                timeout=options.duration + options.warmup + 120,
                preexec_fn=pinned(options.cores[1]),
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"{figure.name}, {rival}: the load generator does not come to an end") from None
        server.check_alive()
        if done.returncode != 0:
            raise Failure(f"{figure.name}, {rival}: {done.stderr.strip()}{server.complaints()}")
        result = json.loads(done.stdout)
        server.stop()
        return result
    finally:
        server.end()


def spread(values, digits):
    return f"{statistics.median(values):,.{digits}f}", f"{min(values):,.{digits}f} - {max(values):,.{digits}f}"


def verdict(target, measured):
    if target is None:
        return ""
    return f"{target}: {'met' if target.met(measured) else 'NOT MET'}"


def print_rows(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        first, *rest = row
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest[:-1], widths[1:-1])]
        print(("  " + "  ".join(cells) + "  " + rest[-1]).rstrip())


def summarise(metric, values, reference, ours_name):
    """One metric's numbers of all rivals: the table's rows, and what goes into the file."""
    rows = []
    summary = {"unit": metric.unit, "rivals": {}}
    for rival, numbers in values.items():
        median, range_ = spread(numbers, metric.digits)
        entry = {"values": numbers, "median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
        ratio_text, ratio_range, judged = "", "", ""
        pairs = list(zip(numbers, values.get(reference, [])))
        if rival != reference and pairs and all(other > 0 for _, other in pairs):
            entry["ratios"] = [own / other for own, other in pairs]
            ratio_text, ratio_range = spread(entry["ratios"], 3)
        target = metric.target
        if rival == ours_name and target is not None and (pairs or target.value == "value"):
            if target.value == "value":
                measured = entry["median"]
            elif target.value == "difference":
                measured = statistics.median(own - other for own, other in pairs)
                entry["difference"] = measured
            else:
                measured = statistics.median(entry["ratios"]) if "ratios" in entry else float("nan")
            entry["target"] = str(target)
            entry["target_met"] = target.met(measured)
            judged = verdict(target, measured)
        summary["rivals"][rival] = entry
        rows.append([rival, median, range_, ratio_text, ratio_range, judged])
    return rows, summary


def compare(figure, metric, values, judged):
    """The ratios to further references: a line each, and what goes into the file."""
    compared = []
    for reference, target in figure.beside:
        target = target if judged else None
        ratios = [own / other for own, other in zip(values[figure.ours], values[reference])]
        ratio = statistics.median(ratios)
        entry = {"reference": reference, "metric": metric.unit, "ratios": ratios, "ratio": ratio}
        if target is not None:
            entry |= {"target": str(target), "target_met": target.met(ratio)}
        compared.append(entry)
        median, range_ = spread(ratios, 3)
        print(f"  {metric.unit}, {figure.ours} of {reference}: {median} ({range_})  {verdict(target, ratio)}".rstrip())
    return compared


def report(figure, metrics):
    """Prints a figure's tables; `metrics` is a list of (metric, {rival: numbers})."""
    print(f"\n{figure.title}")
    summaries = []
    for metric, values in metrics:
        rows, summary = summarise(metric, values, figure.reference, figure.ours)
        summaries.append(summary)
        print_rows([[metric.unit, "median", "min - max", f"of {figure.reference}", "min - max", "wanted"], *rows])
    return summaries


def run_figure(options, figure):
    rivals = figure.rivals if figure.group else [rival for rival in options.rivals if rival in figure.rivals]
    results = {rival: [] for rival in rivals}
    for repetition in range(options.repetitions):
        for rival in rivals:
            progress(f"{figure.name}: {rival}, {repetition + 1} of {options.repetitions}")
            results[rival].append(measure(options, figure, rival))
    progress("")
    metrics = [
        (metric, {rival: [metric.of(result) for result in results[rival]] for rival in rivals})
        for metric in figure.metrics
    ]
    summaries = report(figure, metrics)
    compared = [entry for metric, values in metrics if metric.key in ("messages_per_second", "server_ns_per_message")
                for entry in compare(figure, metric, values, metric is metrics[0][0])]
    # A server below full load means that the load generator, or the wire, was the limit.
    for rival in rivals:
        busy = [f"{result['server_cpu']:.2f} / {result['loader_cpu']:.2f}" for result in results[rival]]
        print(f"  busy cores, server / load, {rival}: {', '.join(busy)}")
    return {"title": figure.title, "load": figure.load, "runs": results, "metrics": summaries, "compared": compared}


def run_compile(options):
    compiler = shlex.split(options.cxx)
    environment = dict(os.environ, CCACHE_DISABLE="1")
    with tempfile.TemporaryDirectory(prefix="msgtrans-bench-") as folder:
        sources = {"asio": ASIO_ALONE, "msgtrans": TEN_LINES}
        times = {name: [] for name in sources}
        for name, text in sources.items():
            (pathlib.Path(folder) / f"{name}.cpp").write_text(text, encoding="utf-8")
        # The first round fills the page cache with the headers and does not count.
        for repetition in range(options.repetitions + 1):
            for name in sources:
                progress(f"{COMPILE}: {name}, {repetition} of {options.repetitions}")
                command = [*compiler, "-std=c++20", "-O2", "-I", str(ROOT / "include"), "-c", f"{name}.cpp", "-o"]
                command.append(f"{name}.o")
                begin = time.monotonic()
                done = subprocess.run(
                    command,
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                    preexec_fn=pinned(options.cores[0]),
                    check=False,
                )
                elapsed = time.monotonic() - begin
                if done.returncode != 0:
                    progress("")
                    raise Failure(f"compiling {name}.cpp: {done.stderr.strip()[-2000:]}")
                if repetition > 0:
                    times[name].append(elapsed)
    progress("")
    ratios = [ours / asio for ours, asio in zip(times["msgtrans"], times["asio"])]
    rows = [["seconds", "median", "min - max", "of asio", "min - max", "wanted"]]
    rows.append(["asio", *spread(times["asio"], 2), "", "", ""])
    ratio = statistics.median(ratios)
    rows.append(["msgtrans", *spread(times["msgtrans"], 2), *spread(ratios, 3), verdict(COMPILE_TARGET, ratio)])
    version = output_of([*compiler, "--version"])
    print(f"\n{COMPILE_TITLE}")
    print_rows(rows)
    return {
        "title": COMPILE_TITLE,
        "compiler": version.splitlines()[0] if version else options.cxx,
        "seconds": times,
        "ratios": ratios,
        "ratio": ratio,
        "target": str(COMPILE_TARGET),
        "target_met": COMPILE_TARGET.met(ratio),
    }


def progress(text):
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def parse_options():
    parser = argparse.ArgumentParser(description="Measures msgtrans against its rivals. Exit status 1 only for errors.")
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help="what to measure, by name or group; all unless named (see --list)")
    parser.add_argument("--list", action="store_true", help="print the figures' names and end")
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build" / "release" / "bench",
                        help="folder of the built programs (default: build/release/bench)")
    parser.add_argument("--rivals", default="epoll,asio,msgtrans",
                        help="comma-separated, in the order they run: " + ", ".join(RIVALS) + " (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, help="of each figure (default: 5)")
    parser.add_argument("--duration", type=float, help="seconds of each timed run (default: 3)")
    parser.add_argument("--warmup", type=float, help="seconds before each of them (default: 0.5)")
    parser.add_argument("--quick", action="store_true", help="two repetitions of one second: shows that it works")
    parser.add_argument("--cores", default="", help="two numbers, for the server and for the load (default: the first two)")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"), help="compiler of the figure 'compile' (default: %(default)s)")
    parser.add_argument("--output", type=pathlib.Path, help="file for the results (default: a new one in bench/results)")
    options = parser.parse_args()

    known = [figure.name for figure in FIGURES] + [COMPILE] + GROUPS
    for name in options.figures:
        if name not in known:
            parser.error(f"no figure is called '{name}' (there are: {', '.join(known)})")
    options.rivals = options.rivals.split(",")
    for rival in options.rivals:
        if rival not in RIVALS:
            parser.error(f"no rival is called '{rival}' (there are: {', '.join(RIVALS)})")
    defaults = (2, 1.0, 0.3) if options.quick else (5, 3.0, 0.5)
    for name, default in zip(("repetitions", "duration", "warmup"), defaults):
        if getattr(options, name) is None:
            setattr(options, name, default)
    if options.repetitions < 1 or options.duration <= 0 or options.warmup < 0:
        parser.error("--repetitions and --duration must be positive, --warmup not negative")

    available = sorted(os.sched_getaffinity(0))
    if options.cores:
        try:
            options.cores = [int(core) for core in options.cores.split(",")]
        except ValueError:
            parser.error("--cores wants two numbers, such as 0,1")
        if len(options.cores) != 2 or not set(options.cores) <= set(available):
            parser.error(f"--cores wants two of the cores {available}")
    else:
        options.cores = [available[0], available[min(1, len(available) - 1)]]
    options.bin = options.bin.resolve()
    return options


def main():
    options = parse_options()
    if options.list:
        for figure in FIGURES:
            print(f"{figure.name:14}{figure.title}" + (f" ({figure.group})" if figure.group else ""))
        print(f"{COMPILE:14}{COMPILE_TITLE}")
        return 0

    wanted = [figure for figure in FIGURES
              if not options.figures or {figure.name, figure.group} & set(options.figures)]
    if wanted:
        named = {rival for figure in wanted for rival in (figure.rivals if figure.group else options.rivals)}
        programs = {RIVALS[rival][0] for rival in named} | {"bench_load"}
        for program in sorted(programs):
            if not shutil.which(str(options.bin / program)):
                raise Failure(f"{options.bin / program} is not there: build the benchmarks in Release, or name their folder by --bin")

    machine = describe_machine(options.cores)
    build = describe_build(options.bin)
    print(f"{machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}; commit {machine['commit']}")
    print(f"{build['compiler']}, {build['build_type']} ({build['flags']})")
    print(f"server on core {options.cores[0]}, load on core {options.cores[1]}; "
          f"{options.repetitions} repetitions, {options.duration:g} s each")
    if build["build_type"] not in ("Release", "RelWithDebInfo"):
        print("WARNING: this is not a Release build; the figures mean nothing")
    if options.cores[0] == options.cores[1]:
        print("WARNING: one core for server and load; the figures are not those of the README")
    if machine["load_average_before"] > 0.5:
        print(f"WARNING: the machine was not idle (load average {machine['load_average_before']})")

    results = {"machine": machine, "build": build, "options": {
        "repetitions": options.repetitions, "duration": options.duration, "warmup": options.warmup,
        "rivals": options.rivals}, "figures": {}, "errors": {}}
    status = 0
    for figure in wanted:
        try:
            results["figures"][figure.name] = run_figure(options, figure)
        except Failure as failure:
            progress("")
            print(f"\n{figure.title}\n  ERROR: {failure}")
            results["errors"][figure.name] = str(failure)
            status = 1
    if not options.figures or COMPILE in options.figures:
        try:
            results["figures"][COMPILE] = run_compile(options)
        except Failure as failure:
            print(f"\n{COMPILE_TITLE}\n  ERROR: {failure}")
            results["errors"][COMPILE] = str(failure)
            status = 1

    output = options.output
    if output is None:
        stamp = machine["time"].replace(":", "").replace("+0000", "Z")
        output = BENCH / "results" / f"macro-{stamp}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {output}")
    return status


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        print(f"run_macro.py: {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
