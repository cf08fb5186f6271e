// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdint>

namespace msgtrans::protocol {

/// A counter that one thread at a time adds to and any thread reads.
class Counter {
 public:
  // One writer, so a plain load and store do: a locked instruction a packet would be felt.
  void add(std::uint64_t n) noexcept {
    value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
  }
  [[nodiscard]] std::uint64_t value() const noexcept { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<std::uint64_t> value_{0};
};

}  // namespace msgtrans::protocol
