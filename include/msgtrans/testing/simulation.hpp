// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <concepts>
#include <cstdint>
#include <memory>
#include <msgtrans/detail/asio.hpp>
#include <msgtrans/detail/clock.hpp>
#include <msgtrans/transport/endpoint.hpp>

namespace msgtrans::testing {

/// What happens to what is sent over `inproc://` in a simulation. Chances are from 0 to 1; zero: never.
struct Faults {
  /// Of a packet: that it vanishes.
  double drop = 0;
  /// Of a packet: that the connection is cut somewhere inside of it, or right before it.
  double cut = 0;
  /// Of a write: that only a few of its bytes are taken, and the rest later.
  double half_write = 0;
  /// Of a write: that the connection takes nothing for a while, up to `longest_stall`.
  double stall = 0;
  std::chrono::microseconds longest_stall{100'000};
  /// Each packet is under way for some time between these. Those of one session stay in order, those of different
  /// sessions overtake each other.
  std::chrono::microseconds least_delay{0};
  std::chrono::microseconds most_delay{0};
};

/// Since the beginning.
struct SimulationStats {
  std::uint64_t packets = 0;  ///< written to connections, whatever became of them
  std::uint64_t dropped = 0;
  std::uint64_t delayed = 0;
  std::uint64_t cuts = 0;
  std::uint64_t half_writes = 0;
  std::uint64_t stalls = 0;
};

/// A world of its own for tests: one thread, on which servers and clients run that are given its executor, and a clock
/// that stands still until it is told to go on. They talk over `inproc://`, with faults if wanted. Nothing in it
/// depends on the machine: the same seed, and the same calls, give the same run, and hours of it take milliseconds.
///
///     msgtrans::testing::Simulation world(seed);
///     msgtrans::ServerTransport server({.executors = {world.executor()}});
///     msgtrans::ClientTransport client({.executor = world.executor()});
///     server.listen(msgtrans::in_process("server"));
///     ...
///     world.advance(1h);
///
/// For the thread that made it, which makes all calls and has only one at a time; what it makes in the meantime and
/// wants to wait for time (an `asio::steady_timer` does not) uses `Timer`. Blocking calls of the library would wait for
/// ever there: use the asynchronous ones. Servers and clients should be gone before it is.
class Simulation {
 public:
  using Clock = detail::Clock;
  using Timer = detail::Timer;

  explicit Simulation(std::uint64_t seed = 1);
  ~Simulation();
  Simulation(const Simulation&) = delete;
  Simulation& operator=(const Simulation&) = delete;

  /// One thing at a time, and only inside of the calls below.
  [[nodiscard]] detail::asio::any_io_executor executor() const;
  [[nodiscard]] Clock::time_point now() const noexcept;

  /// Runs all that can run without any time passing.
  void run();
  /// The same, then lets time pass: everything that is due meanwhile runs at its time and in its order.
  void advance(Clock::duration time);
  /// Lets time pass until `predicate()` holds, which is asked whenever something has run; false if it does not `within`
  /// that time.
  template <std::predicate F>
  bool run_until(F&& predicate, Clock::duration within) {
    const auto deadline = now() + within;
    for (run(); !predicate();) {
      if (!step(deadline)) return predicate();
    }
    return true;
  }

  /// From now on, for all connections. \throws Exception with `Errc::invalid_option`.
  void set_faults(const Faults& faults);
  /// Cuts the connection of that client, by the name the server knows it by (`Session::peer()`), at once and both ways.
  /// False if there is none.
  bool cut(const Endpoint& client);
  [[nodiscard]] SimulationStats stats() const noexcept;
  /// The next number of the simulation's own sequence, for tests that decide by chance.
  [[nodiscard]] std::uint64_t random() noexcept;

  struct Core;

 private:
  /// To the next moment at which something is due; false, and the time is `deadline`, if that is later.
  bool step(Clock::time_point deadline);

  const std::shared_ptr<Core> core_;
};

}  // namespace msgtrans::testing
