#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the channels and the map against their rivals, in C++ and in Rust: the same workload, the same machine, in turns.

Every workload is a row of repetitions; in each repetition every library runs it once, one after the other, each time in a
process of its own. Virtual cores move: a cache line's round trip between the two is measured before each run, and runs in
which it was short ("near") and long ("far") are never compared with each other. bench/README.md says what the workloads are.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys

BENCH = pathlib.Path(__file__).resolve().parent
ROOT = BENCH.parent
NEAR = 150  # ns

OURS = "msgtrans"


class Workload:
    """One line of the report: who runs it, by what means, and what ratio is wanted."""

    def __init__(self, name, program, rust=None, wanted=(), unit="M ops/s", limits=()):
        self.name = name
        self.program = program  # of C++; its cases are name/<library>
        self.rust = rust or []  # of (library, [arguments])
        self.wanted = wanted  # of (our library, rivals, the least ratio to the best of them)
        self.unit = unit  # M ops/s, or ns an operation, or an extra counter
        self.limits = limits  # of (counter, the most of ours)


def rust(bench, libraries, **only):
    """The Rust cases with these parameters, one for each library."""
    return [(lib, [bench] + [f for k, v in dict(only, lib=lib).items() for f in ("--only", f"{k}={v}")])
            for lib in libraries]


def workloads():
    for messages in (100_000, 1_000_000):
        per = messages // 4
        yield Workload(f"seed/{messages}", "bench_channel",
                       rust("seed", ["crossbeam", "flume_sync"], per_actor=per, producer="thread"),
                       [(OURS, ["crossbeam"], 3.0), (OURS, ["mutex_deque"], 10.0)])
        yield Workload(f"async-seed/{messages}", "bench_async",
                       rust("seed", ["flume_async", "tokio_mpsc"], per_actor=per, producer="block_on"),
                       [(OURS, ["flume_async", "tokio_mpsc"], 3.0)])
    for kind, rust_kind in (("unbounded", "unbounded"), ("bounded", "bounded1024")):
        for shape in ("1x1", "4x1", "4x4", "1x4"):
            yield Workload(f"mpmc/{kind}/{shape}", "bench_channel",
                           rust("mpmc", ["crossbeam", "flume_sync"], test="throughput", kind=rust_kind, shape=shape),
                           [(OURS, ["crossbeam"], 1.0)])
            yield Workload(f"mpmc-many/{kind}/{shape}", "bench_channel")
            # flume's plain send would block a task where the channel is bounded
            rivals = ["flume_send"] * (kind == "unbounded") + ["flume_send_async", "async_channel"]
            yield Workload(f"async-mpmc/{kind}/{shape}", "bench_async",
                           rust("async", rivals, test="throughput", kind=rust_kind, shape=shape),
                           [(OURS, rivals, 1.0), ("msgtrans_many", rivals, 1.0)])
    yield Workload("pingpong", "bench_channel", rust("mpmc", ["crossbeam", "flume_sync"], test="pingpong", kind="unbounded"),
                   [(OURS, ["crossbeam"], 1.0)], unit="ns")
    yield Workload("async-pingpong/same", "bench_async",
                   rust("async", ["flume_send", "flume_send_async", "async_channel", "tokio_mpsc"], test="pingpong",
                        kind="unbounded"),
                   [(OURS, ["flume_send", "flume_send_async"], 1.0)], unit="ns")
    yield Workload("async-pingpong/two", "bench_async", unit="ns")
    for subscribers in (1, 4, 16, 64):
        yield Workload(f"broadcast/paced/{subscribers}", "bench_async",
                       rust("broadcast", ["tokio_broadcast"], mode="paced", payload="struct32", cap=1024,
                            subs=subscribers),
                       [(OURS, ["tokio_broadcast"], 1.5)])
        yield Workload(f"broadcast/flood/{subscribers}", "bench_async",
                       rust("broadcast", ["tokio_broadcast"], mode="flood_thread", payload="struct32", cap=1024,
                            subs=subscribers),
                       [(OURS, ["tokio_broadcast"], 1.0)], unit="send_ns")
    for size in (1_000, 100_000, 1_000_000):
        for mix in ("100/0", "90/10", "50/50"):
            for threads in (1, 2):
                wanted = {"100/0": [(OURS, ["dashmap"], 2.0), (OURS, ["dashmap_fmix64"], 2.0)],
                          "90/10": [(OURS, ["dashmap"], 1.0), (OURS, ["dashmap_fmix64"], 1.0)]}.get(mix, [])
                if mix == "100/0" and threads == 1:
                    wanted = wanted + [(OURS, ["flat_map_unsynchronised"], 0.5)]
                yield Workload(f"map/{size}/{mix.replace('/', '-')}/{threads}", "bench_map",
                               rust("map", ["dashmap", "dashmap_fmix64"], size=size, mix=mix, threads=threads), wanted)
    for size in (1_000, 100_000, 1_000_000):
        yield Workload(f"map-iterate/{size}", "bench_map", unit="ns",
                       limits=[("ns", 30), ("bytes_per_entry", 64)])
    for size in (1_000, 100_000, 1_000_000):
        for threads in (1, 2):
            yield Workload(f"migrate-sessions/{size}/{threads}", "bench_migration",
                           wanted=[(OURS, ["locked_map"], 1.0)])
    yield Workload("migrate-actors/1000/1", "bench_migration", wanted=[(OURS, ["locked_map"], 1.0)])
    for threads in (1, 2):
        yield Workload(f"migrate-pool/16/{threads}", "bench_migration", wanted=[(OURS, ["locked_deque"], 1.0)])
    yield Workload("idle", "bench_channel", unit="core_share", limits=[("core_share", 0.01)])
    yield Workload("async-idle", "bench_async", unit="core_share", limits=[("core_share", 0.01)])


def run(command):
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit status {result.returncode}\n{result.stderr}")
    return result.stdout


def run_cpp(binary, case):
    report = json.loads(run([binary, f"--benchmark_filter=^{case}/iterations:1/manual_time$", "--benchmark_format=json"]))
    (one,) = report["benchmarks"]
    if one.get("error_occurred"):
        raise RuntimeError(f"{case}: {one.get('error_message')}")
    values = {"M ops/s": one["items_per_second"] / 1e6, "ns": one["ns_per_op"]}
    for key in ("send_ns", "core_share", "bytes_per_entry"):
        if key in one:
            values[key] = one[key]
    return values, one["line_rt_ns"]


def run_rust(binary, arguments):
    lines = [json.loads(line) for line in run([binary, *arguments, "--reps", "1", "--warmup", "1"]).splitlines()]
    (one,) = (line for line in lines if line["bench"] != "calibrate")
    values = {"M ops/s": one["ops_per_s"] / 1e6, "ns": one["secs"] * 1e9 / one["ops"]}
    if "send_ns_per_event" in one:
        values["send_ns"] = one["send_ns_per_event"]
    return values, one["line_rt_ns"]


def libraries_of(binary):
    """Of a C++ program: {workload: [library]}."""
    found = {}
    for line in run([binary, "--benchmark_list_tests=true"]).split():
        name = line.removesuffix("/iterations:1/manual_time")
        workload, library = name.rsplit("/", 1)
        found.setdefault(workload, []).append(library)
    return found


def median_of(runs, unit, state):
    values = [values[unit] for values, line in runs if (line < NEAR) == (state == "near") and unit in values]
    return (statistics.median(values), min(values), max(values), len(values)) if values else None


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def report(workload, runs, out):
    """Prints the table of a workload; returns its lines for the summary."""
    lower_is_better = workload.unit != "M ops/s"
    summary = []
    for state in ("near", "far"):
        table = {lib: m for lib, all_runs in runs.items() if (m := median_of(all_runs, workload.unit, state))}
        if not table:
            continue
        print(f"\n{workload.name}, {workload.unit}, {state}", file=out)
        for lib, (median, low, high, count) in table.items():
            ratio = ""
            if OURS in table and lib != OURS and median and table[OURS][0]:
                ours = table[OURS][0]
                ratio = f"   {OURS} is {(median / ours if lower_is_better else ours / median):.2f} times as good"
            print(f"  {lib:26} {number(median):>10}   {number(low)} - {number(high)}   n={count}{ratio}", file=out)
        for ours, rivals, least in workload.wanted:
            there = [table[r][0] for r in rivals if r in table]
            if ours not in table or not there:
                continue
            best = min(there) if lower_is_better else max(there)
            ratio = best / table[ours][0] if lower_is_better else table[ours][0] / best
            verdict = "met" if ratio >= least else "NOT MET"
            print(f"  {ours} / best of {', '.join(rivals)}: {ratio:.2f}, wanted {least}: {verdict}", file=out)
            summary.append({"workload": workload.name, "unit": workload.unit, "state": state, "ours": ours,
                            "rivals": rivals, "median": table[ours][0], "low": table[ours][1], "high": table[ours][2],
                            "rival": best, "ratio": ratio, "wanted": least, "met": ratio >= least})
        for counter, most in workload.limits:
            measured = median_of(runs.get(OURS, []), counter, state)
            if measured is None:
                continue
            met = measured[0] <= most
            print(f"  {OURS}: {number(measured[0])} {counter}, at most {most}: {'met' if met else 'NOT MET'}", file=out)
            summary.append({"workload": workload.name, "unit": counter, "state": state, "ours": OURS, "rivals": [],
                            "median": measured[0], "low": measured[1], "high": measured[2], "rival": None, "ratio": None,
                            "wanted": most, "met": met})
    return summary


def markdown(summary, about):
    lines = [f"<!-- bench/run_micro.py: {', '.join(f'{key} {value}' for key, value in about.items())} -->", "",
             "| workload | state | unit | ours | median (min - max) | best rival | ratio | wanted |",
             "|---|---|---|---|---|---|---|---|"]
    for s in summary:
        rival, ratio, wanted = "", "", f"at most {s['wanted']:g}"
        if s["rivals"]:
            rival, ratio, wanted = f"{number(s['rival'])} ({', '.join(s['rivals'])})", f"{s['ratio']:.2f}", f"{s['wanted']:g}"
        wanted += "" if s["met"] else ", not met"
        lines.append(f"| {s['workload']} | {s['state']} | {s['unit']} | {s['ours']} | {number(s['median'])} "
                     f"({number(s['low'])} - {number(s['high'])}) | {rival} | {ratio} | {wanted} |")
    return "\n".join(lines) + "\n"


def plot(summary, path):
    """The ratios as bars; needs gnuplot."""
    summary = [s for s in summary if s["rivals"]]
    if shutil.which("gnuplot") is None or not summary:
        print("gnuplot is not installed, so nothing is drawn")
        return
    data = "\n".join(f"\"{s['workload']} {s['ours']} ({s['state']})\" {s['ratio']} {s['wanted']}" for s in summary)
    script = (f"set terminal svg size 1400,900 noenhanced\nset output '{path}'\nset style fill solid\n"
              "set boxwidth 0.7\nset logscale y\nset grid y\nset xtics rotate by -60 right font ',9'\n"
              "set ylabel 'times as good as the best rival named'\n$data << EOD\n" + data +
              "\nEOD\nplot $data using 2:xtic(1) with boxes title 'measured', '' using 0:3 with points pt 5 title 'wanted'\n")
    subprocess.run(["gnuplot"], input=script, text=True, check=True)
    print(f"drawn in {path}")


def about_machine(binaries):
    model = next((line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?")
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True).stdout.splitlines()
    rustc = subprocess.run(["rustc", "--version"], capture_output=True, text=True).stdout.strip() \
        if shutil.which("rustc") else "no rustc"
    return {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"), "commit": commit.strip(),
            "cpu": f"{model}, {os.cpu_count()} cores", "system": f"{platform.system()} {platform.release()}",
            "compiler": compiler[0] if compiler else "?", "rustc": rustc, "rust": "rust" in binaries}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", help="what workloads' names begin with; all without")
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "build/release/bench", help="where the C++ programs are")
    parser.add_argument("--rust", type=pathlib.Path, default=ROOT / "build/rust/release/rust-micro",
                        help="the Rust rivals' program; left out if it is not there")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two repetitions: shows that all of it works")
    parser.add_argument("--list", action="store_true", help="the workloads")
    arguments = parser.parse_args()
    chosen = [w for w in workloads() if not arguments.sections or any(w.name.startswith(s) for s in arguments.sections)]
    if arguments.list:
        print("\n".join(w.name for w in chosen))
        return 0
    if not chosen:
        parser.error("there is no such workload; see --list")
    repetitions = 2 if arguments.quick else arguments.repetitions
    binaries = {name: arguments.bin / name for name in {w.program for w in chosen}}
    if arguments.rust.exists():
        binaries["rust"] = arguments.rust
    else:
        print(f"The Rust rivals are left out: there is no {arguments.rust}")
    about = about_machine(binaries)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    if os.getloadavg()[0] > 0.5:
        print(f"WARNING: the machine is not idle (load average {os.getloadavg()[0]:.2f})")

    cases = {name: libraries_of(path) for name, path in binaries.items() if name != "rust"}
    results, summary = {}, []
    for workload in chosen:
        runs = {}
        for _ in range(repetitions):
            for lib in cases[workload.program].get(workload.name, []):
                runs.setdefault(lib, []).append(run_cpp(binaries[workload.program], f"{workload.name}/{lib}"))
            for lib, command in workload.rust if "rust" in binaries else []:
                runs.setdefault(lib, []).append(run_rust(binaries["rust"], command))
        results[workload.name] = runs
        summary += report(workload, runs, sys.stdout)
        sys.stdout.flush()

    directory = BENCH / "results"
    directory.mkdir(exist_ok=True)
    stem = directory / f"micro-{datetime.datetime.now(datetime.timezone.utc).strftime('%Y-%m-%dT%H%M%SZ')}"
    stem.with_suffix(".json").write_text(json.dumps({"about": about, "runs": results, "summary": summary}, indent=1))
    stem.with_suffix(".md").write_text(markdown(summary, about))
    print(f"\n{sum(s['met'] for s in summary)} of {len(summary)} wanted ratios met; written to {stem}.json and .md")
    plot(summary, stem.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
