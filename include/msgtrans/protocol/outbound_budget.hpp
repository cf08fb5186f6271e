// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace msgtrans::protocol {

/// How much is queued.
struct OutboundDepth {
  std::size_t bytes = 0;
  std::size_t packets = 0;

  friend bool operator==(const OutboundDepth&, const OutboundDepth&) = default;
};

/// What one session has accepted and not yet written, in bytes and packets, against a limit. Every call from any
/// thread, each O(1) and lock-free.
class OutboundBudget {
 public:
  static constexpr std::size_t max_bytes = std::size_t{16} << 30;
  static constexpr std::size_t max_packets = 50'000'000;

  /// Takes room for one packet of `bytes` if the sums with it stay within `limit`, or if nothing is queued at all.
  [[nodiscard]] bool try_reserve(std::size_t bytes, OutboundDepth limit) noexcept {
    std::uint64_t seen = state_.load(std::memory_order_relaxed);
    do {
      const OutboundDepth depth = unpack(seen);
      const bool fits = depth.bytes + bytes <= limit.bytes && depth.packets + 1 <= limit.packets;
      if (!fits && seen != 0) return false;
    } while (!state_.compare_exchange_weak(seen, seen + pack(bytes, 1), std::memory_order_relaxed));
    return true;
  }

  /// Takes room whatever the limit.
  void reserve(OutboundDepth depth) noexcept {
    state_.fetch_add(pack(depth.bytes, depth.packets), std::memory_order_relaxed);
  }

  /// Gives back what was written or dropped.
  void release(OutboundDepth depth) noexcept {
    state_.fetch_sub(pack(depth.bytes, depth.packets), std::memory_order_relaxed);
  }

  [[nodiscard]] OutboundDepth depth() const noexcept { return unpack(state_.load(std::memory_order_relaxed)); }

 private:
  static constexpr unsigned packet_bits = 27;

  static constexpr std::uint64_t pack(std::size_t bytes, std::size_t packets) noexcept {
    return (std::uint64_t{bytes} << packet_bits) | packets;
  }
  static constexpr OutboundDepth unpack(std::uint64_t state) noexcept {
    return {static_cast<std::size_t>(state >> packet_bits),
            static_cast<std::size_t>(state & ((std::uint64_t{1} << packet_bits) - 1))};
  }

  // bytes << 27 | packets, so that both are checked and taken in one step. Both are sums of what was reserved and not
  // yet released, and neither half can borrow from the other, because nobody releases what he did not reserve.
  // Relaxed is enough: it is a count; the packets themselves travel through the shard's inbox, which orders them.
  std::atomic<std::uint64_t> state_{0};
};

}  // namespace msgtrans::protocol
