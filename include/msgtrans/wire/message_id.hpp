// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace msgtrans::wire {

/// The message ids of one end of one connection: requests and one-way packets draw on the same counter, responses do
/// not. Counts 1, 2, ... 2^32-1, 1, ...; 0 is never given, it means unset. Not thread-safe; a new connection starts
/// with a new counter.
class MessageIdCounter {
 public:
  /// The first id to give; 0 counts as 1.
  explicit constexpr MessageIdCounter(std::uint32_t first = 1) noexcept : next_(first == 0 ? 1 : first) {}

  [[nodiscard]] constexpr std::uint32_t next() noexcept {
    const std::uint32_t id = next_;
    next_ = id == UINT32_MAX ? 1 : id + 1;
    return id;
  }

 private:
  std::uint32_t next_;
};

}  // namespace msgtrans::wire
