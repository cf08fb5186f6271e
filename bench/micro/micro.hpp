// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <benchmark/benchmark.h>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <sched.h>
#include <string>
#include <thread>
#include <utility>

/// What the micro benchmarks share: each case is one run of a workload, timed by itself, with the state of the machine
/// measured just before. bench/run_micro.py runs them in turns with their rivals, each time in a process of its own.
namespace micro {

using Clock = std::chrono::steady_clock;

[[nodiscard]] inline double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

/// What one run did.
struct Sample {
  std::uint64_t ops = 0;
  double secs = 0;
  std::map<std::string, double> extra = {};
};

/// Ends the program if the work was not done: its time would mean nothing.
inline void require(bool done, const char* what) {
  if (done) return;
  std::fprintf(stderr, "the work was not done: %s\n", what);
  std::exit(1);
}

inline void pin_to(int cpu) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  ::sched_setaffinity(0, sizeof set, &set);
}

/// How long a cache line takes from one core to the other and back: the median of nine batches. Virtual cores move, and
/// this with them, and with this whatever crosses cores.
[[nodiscard]] inline double line_round_trip_ns() {
  struct alignas(128) Line {
    std::atomic<std::uint64_t> turn{0};
  } line;
  cpu_set_t before;
  ::sched_getaffinity(0, sizeof before, &before);
  constexpr std::uint64_t stop = ~std::uint64_t{0};
  constexpr std::uint64_t rounds = 250;
  pin_to(0);
  std::thread other([&line] {
    pin_to(1);
    for (;;) {
      const auto turn = line.turn.load(std::memory_order_acquire);
      if (turn == stop) return;
      if (turn % 2 == 1) line.turn.store(turn + 1, std::memory_order_release);
    }
  });
  std::uint64_t turn = 0;
  std::array<double, 10> batches{};
  for (double& batch : batches) {
    const auto begin = Clock::now();
    for (std::uint64_t i = 0; i < rounds; ++i) {
      line.turn.store(turn + 1, std::memory_order_release);
      turn += 2;
      while (line.turn.load(std::memory_order_acquire) != turn) {
      }
    }
    batch = seconds_since(begin) * 1e9 / static_cast<double>(rounds);
  }
  line.turn.store(stop, std::memory_order_release);
  other.join();
  ::sched_setaffinity(0, sizeof before, &before);
  std::sort(batches.begin() + 1, batches.end());  // the first was to get going
  return batches[5];
}

/// Registers a case: one run to get going, and one that counts.
inline void add(const std::string& name, std::function<Sample()> run) {
  ::benchmark::RegisterBenchmark(
      name.c_str(),
      [run = std::move(run)](::benchmark::State& state) {
        for (auto _ : state) {
          (void)run();
          const double line = line_round_trip_ns();
          const Sample sample = run();
          state.SetIterationTime(sample.secs);
          state.SetItemsProcessed(static_cast<std::int64_t>(sample.ops));
          state.counters["ns_per_op"] = sample.secs * 1e9 / static_cast<double>(std::max<std::uint64_t>(sample.ops, 1));
          state.counters["line_rt_ns"] = line;
          for (const auto& [key, value] : sample.extra) state.counters[key] = value;
        }
      })
      ->Iterations(1)
      ->UseManualTime();
}

}  // namespace micro
