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
    std::uint64_t seen = state_.load();
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
  void release(OutboundDepth depth) noexcept { state_.fetch_sub(pack(depth.bytes, depth.packets)); }

  [[nodiscard]] OutboundDepth depth() const noexcept { return unpack(state_.load(std::memory_order_relaxed)); }

 private:
  friend class OutboundLimit;

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
  // Relaxed is enough for the count; the packets themselves travel through the shard's inbox, which orders them.
  // Sequentially consistent are giving back and the look before taking: who finds no room says so in a flag and looks
  // again, and who gave back looks at the flag, so one of the two sees the other.
  std::atomic<std::uint64_t> state_{0};
};

/// A limit of an `OutboundBudget` that may be changed while others read it. Any thread.
class OutboundLimit {
 public:
  explicit OutboundLimit(OutboundDepth limit) noexcept : state_(OutboundBudget::pack(limit.bytes, limit.packets)) {}
  [[nodiscard]] OutboundDepth get() const noexcept {
    return OutboundBudget::unpack(state_.load(std::memory_order_relaxed));
  }
  void set(OutboundDepth limit) noexcept {
    state_.store(OutboundBudget::pack(limit.bytes, limit.packets), std::memory_order_relaxed);
  }

 private:
  std::atomic<std::uint64_t> state_;  // both halves at once; relaxed: it orders nothing
};

/// So many percent of a limit.
[[nodiscard]] constexpr OutboundDepth part_of(OutboundDepth limit, unsigned percent) noexcept {
  return {limit.bytes * percent / 100, limit.packets * percent / 100};
}

/// What all sessions of a server have accepted and not yet written, in bytes, against one limit. Any thread; lock-free.
class OutboundTotal {
 public:
  explicit OutboundTotal(std::size_t limit) noexcept : limit_(limit) {}

  /// Takes room if the sum stays within the limit, or if nothing is queued at all. After a refusal the next `release`
  /// that leaves enough says that there is somebody to wake.
  [[nodiscard]] bool try_reserve(std::size_t bytes) noexcept {
    if (take(bytes)) return true;
    // Both sequentially consistent, as in release(): either this sees the room that was given back, or that sees the
    // flag. What was not given back yet will be, with the flag set.
    starved_.store(true);
    return take(bytes);
  }
  /// Takes room whatever the limit.
  void reserve(std::size_t bytes) noexcept { used_.fetch_add(bytes, std::memory_order_relaxed); }
  /// \returns true if those who were refused are to be told: the sum has come down to half of the limit.
  [[nodiscard]] bool release(std::size_t bytes) noexcept {
    const std::size_t left = used_.fetch_sub(bytes) - bytes;
    return starved_.load() && left <= limit_ / 2 && starved_.exchange(false);
  }

  [[nodiscard]] std::size_t used() const noexcept { return used_.load(std::memory_order_relaxed); }
  [[nodiscard]] bool exhausted() const noexcept { return used() >= limit_; }
  /// Somebody was refused, and not told yet that there is room.
  [[nodiscard]] bool starved() const noexcept { return starved_.load(); }

 private:
  [[nodiscard]] bool take(std::size_t bytes) noexcept {
    std::size_t seen = used_.load();
    do {
      if (seen != 0 && (bytes > limit_ || seen > limit_ - bytes)) return false;
    } while (!used_.compare_exchange_weak(seen, seen + bytes, std::memory_order_relaxed));
    return true;
  }

  const std::size_t limit_;
  // The sum of what was reserved and not yet released. A count: what it counts is ordered by other means.
  std::atomic<std::size_t> used_{0};
  std::atomic<bool> starved_{false};
};

}  // namespace msgtrans::protocol
