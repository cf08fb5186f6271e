// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace msgtrans::lockfree {

/// A counter that many threads count up all the time and few read: each thread counts in one of several cells, in cache
/// lines of their own (D. Lea's LongAdder).
///
/// Thread safety: every call from any thread. `add` is wait-free; `value` is O(cells), and while others count it is the
/// sum of what was found, one cell after the other: all that was added before the call, and some of what is added
/// during it.
class LockFreeCounter {
 public:
  LockFreeCounter() noexcept = default;
  LockFreeCounter(const LockFreeCounter&) = delete;
  LockFreeCounter& operator=(const LockFreeCounter&) = delete;

  void add(std::int64_t amount = 1) noexcept { cells_[cell_of_thread()].count.fetch_add(amount, order); }
  void sub(std::int64_t amount = 1) noexcept { cells_[cell_of_thread()].count.fetch_sub(amount, order); }

  [[nodiscard]] std::int64_t value() const noexcept {
    std::int64_t sum = 0;
    for (const Cell& cell : cells_) sum += cell.count.load(order);
    return sum;
  }

 private:
  static constexpr std::size_t cells = 8;
  static constexpr auto order = std::memory_order_relaxed;  // it counts, and publishes nothing
  struct alignas(64) Cell {
    std::atomic<std::int64_t> count{0};
  };

  /// Threads take turns: neighbours in time have different cells.
  static std::size_t cell_of_thread() noexcept {
    static constinit std::atomic<std::size_t> next{0};
    static thread_local const std::size_t mine = next.fetch_add(1, std::memory_order_relaxed) % cells;
    return mine;
  }

  std::array<Cell, cells> cells_;
};

}  // namespace msgtrans::lockfree
