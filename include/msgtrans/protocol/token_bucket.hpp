// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <msgtrans/protocol/time.hpp>

namespace msgtrans::protocol {

/// A rate with bursts: tokens come back at `per_second`, up to `burst`, and whoever does something takes some. Full at
/// the beginning. Counts in billionths of a token, so that nothing is lost however often it is asked; a time before an
/// earlier one is taken for that. Every call O(1), without allocating. Not thread-safe.
class TokenBucket {
 public:
  /// Larger rates, bursts and takings are taken for this.
  static constexpr std::uint64_t most = std::uint64_t{1} << 62;

  /// `per_second` 0: no limit, all calls let everything pass. `burst` 0 is taken for 1.
  TokenBucket(std::uint64_t per_second, std::uint64_t burst, TimePoint now) noexcept
      : level_(parts(std::max<std::uint64_t>(burst, 1))),
        per_second_(static_cast<std::int64_t>(std::min(per_second, most))),
        burst_(static_cast<std::int64_t>(std::clamp<std::uint64_t>(burst, 1, most))),
        at_(now) {}

  [[nodiscard]] bool limits() const noexcept { return per_second_ != 0; }

  /// Takes `n` tokens if there are so many, all or none. More than `burst` there never are: `take` is for those.
  [[nodiscard]] bool try_take(std::uint64_t n, TimePoint now) noexcept {
    if (!limits()) return true;
    refill(now);
    const Wide wanted = parts(n);
    if (level_ < wanted) return false;
    level_ -= wanted;
    return true;
  }

  /// Takes `n` tokens even if there are fewer; then the bucket is in debt, and `ready_at` says until when.
  void take(std::uint64_t n, TimePoint now) noexcept {
    if (!limits()) return;
    refill(now);
    level_ = std::max<Wide>(level_ - parts(n), -parts(most));
  }

  /// When there is a token again, unless some are taken meanwhile; `now` if there is one. TimePoint::max() if that is
  /// beyond what a clock can say.
  [[nodiscard]] TimePoint ready_at(TimePoint now) noexcept {
    if (!limits()) return now;
    refill(now);
    if (level_ >= one) return now;
    const Wide wait = (one - level_ + per_second_ - 1) / per_second_;  // rounded up
    const Wide ready = since_epoch(at_) + wait;
    if (ready >= since_epoch(TimePoint::max())) return TimePoint::max();
    return TimePoint(std::chrono::duration_cast<Duration>(std::chrono::nanoseconds(static_cast<std::int64_t>(ready))));
  }

  /// Whether it is as at the beginning.
  [[nodiscard]] bool full(TimePoint now) noexcept {
    if (!limits()) return true;
    refill(now);
    return level_ == full_level();
  }

 private:
  // A rate of 2^62 for all the nanoseconds that a clock counts does not overflow it.
  __extension__ typedef __int128 Wide;

  static constexpr Wide one = 1'000'000'000;

  [[nodiscard]] static constexpr Wide parts(std::uint64_t tokens) noexcept {
    return static_cast<Wide>(std::min(tokens, most)) * one;
  }
  [[nodiscard]] Wide full_level() const noexcept { return static_cast<Wide>(burst_) * one; }

  /// In nanoseconds; the difference of two may be more than a duration can hold.
  [[nodiscard]] static Wide since_epoch(TimePoint time) noexcept {
    return std::chrono::nanoseconds(time.time_since_epoch()).count();
  }

  void refill(TimePoint now) noexcept {
    if (now <= at_) return;
    const Wide passed = since_epoch(now) - since_epoch(at_);
    level_ = std::min<Wide>(full_level(), level_ + passed * per_second_);
    at_ = now;
  }

  Wide level_;  // billionths of a token; below zero: in debt
  std::int64_t per_second_;
  std::int64_t burst_;
  TimePoint at_;  // when level_ was true
};

}  // namespace msgtrans::protocol
