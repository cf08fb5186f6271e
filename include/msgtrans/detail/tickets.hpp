// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <msgtrans/detail/pause.hpp>
#include <thread>

namespace msgtrans::detail {

/// The account of a channel: how many values were accepted and not yet received, and whether it is closed. In one word,
/// so that "closed" has one place among the sends: what was accepted before it is received, and nothing is accepted
/// after.
///
/// A sender adds a ticket and then puts its value into the queue; a receiver takes a ticket and may then rely on a
/// value to come. The queue itself may be in disorder meanwhile.
class Tickets {
 public:
  enum class Added : unsigned char { ok, full, closed };
  static constexpr std::uint64_t no_limit = std::numeric_limits<std::uint64_t>::max() / 4;

  /// Lock-free. After `ok` the caller owes a value, or `void_one`. Not by a plain addition, also where there is no
  /// limit: a ticket added after the close could be taken by a receiver that comes after another was told the end, and
  /// bring it a value that a third one still had to fetch.
  [[nodiscard]] Added add(std::uint64_t limit) noexcept {
    std::size_t one = 1;
    return add_some(one, limit);
  }

  /// As many as there is room for of `count`, which becomes their number; `ok` if at least one.
  [[nodiscard]] Added add_some(std::size_t& count, std::uint64_t limit) noexcept {
    const std::size_t wanted = count;
    std::uint64_t word = word_.load(std::memory_order_relaxed);
    do {
      count = 0;
      if ((word & closed_bit) != 0) return Added::closed;
      const std::uint64_t used = word / one_ticket;
      if (used >= limit) return Added::full;
      count = static_cast<std::size_t>(std::min<std::uint64_t>(wanted, limit - used));
    } while (!word_.compare_exchange_weak(word, word + count * one_ticket, std::memory_order_seq_cst,
                                          std::memory_order_relaxed));
    return Added::ok;
  }

  /// For who has added tickets, and has no values for them: takes back what is still there. Receivers that hold the
  /// rest find out by themselves. If there is a limit, the caller has to wake who waits for room.
  void give_back(std::size_t count) noexcept {
    bool closed = false;
    for (count -= take(count, closed); count != 0; --count) void_one();
  }

  /// A ticket without a value. Whoever holds a ticket and finds no value may have drawn this one.
  void void_one() noexcept { voids_.fetch_add(1, std::memory_order_relaxed); }

  /// Takes up to `max`; 0 if there are none, and then `closed` says whether there never will be.
  [[nodiscard]] std::size_t take(std::size_t max, bool& closed) noexcept {
    std::uint64_t word = word_.load();
    for (;;) {
      const std::uint64_t there = word / one_ticket;
      if (there == 0) {
        closed = (word & closed_bit) != 0;
        return 0;
      }
      const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(max, there));
      if (word_.compare_exchange_weak(word, word - count * one_ticket)) return count;
    }
  }

  /// Turns tickets into values: calls `dequeue(n)`, which gives how many it got, until all are served; how many values
  /// there were (fewer, if some tickets were void). Waits for senders that have added a ticket and not yet put their
  /// value in: nanoseconds, unless such a sender lost its core in between.
  template <class Dequeue>
  std::size_t redeem(std::size_t count, Dequeue dequeue) noexcept {
    std::size_t got = dequeue(count);
    for (unsigned round = 0; got < count; ++round) {
      if (draw_void()) {
        --count;
        continue;
      }
      if (round < 64) {
        pause_briefly();
      } else if (round < 256) {
        std::this_thread::yield();
      } else {
        // The sender has not run for long: leave it the core, also if this thread's priority is higher.
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
      got += dequeue(count - got);
    }
    return got;
  }

  /// True the first time.
  bool close() noexcept { return (word_.fetch_or(closed_bit) & closed_bit) == 0; }

  [[nodiscard]] bool closed() const noexcept { return (word_.load() & closed_bit) != 0; }
  [[nodiscard]] std::uint64_t count() const noexcept { return word_.load() / one_ticket; }
  /// The same without those that nobody has a value for: for who asks how much is there, and not for who takes.
  [[nodiscard]] std::uint64_t values() const noexcept {
    const std::uint64_t there = count();
    return closed() ? there - std::min(there, voids_.load(std::memory_order_relaxed)) : there;
  }

 private:
  static constexpr std::uint64_t closed_bit = 1;
  static constexpr std::uint64_t one_ticket = 2;

  bool draw_void() noexcept {
    std::uint64_t voids = voids_.load(std::memory_order_relaxed);
    while (voids != 0) {
      if (voids_.compare_exchange_weak(voids, voids - 1, std::memory_order_relaxed)) return true;
    }
    return false;
  }

  // Invariant: tickets added = values that were or will be enqueued + voids made + tickets given back. Each ticket
  // taken ends one value or one void, so a holder of a ticket always ends, and no value is left behind without one. It
  // does not matter which ticket ends which: they are all alike.
  //
  // Memory order: the values themselves are published by the queue (release in enqueue, acquire in dequeue). word_
  // is sequentially consistent for WaitingRoom's sake: adding, taking and closing come before reading who waits.
  // voids_ is a plain count: a holder that does not see a void yet asks again.
  std::atomic<std::uint64_t> word_{0};
  std::atomic<std::uint64_t> voids_{0};
};

}  // namespace msgtrans::detail
