// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <msgtrans/protocol/counter.hpp>

namespace msgtrans {

namespace protocol {
class LatencyRecorder;
}

/// How long things took, as a value: counts in buckets that are a sixteenth of their lower edge wide (log-linear, as in
/// HdrHistogram by Gil Tene), from 1 us to 73 minutes; below, buckets of 64 ns; above, one bucket for all. What is read
/// from a bucket is its middle, so a quantile is off by at most 1/32 (3.2 %) from 1 us on, by 32 ns below. Count, sum,
/// least and most are exact. 4.2 KiB, whatever it holds. Not thread-safe.
class LatencyHistogram {
 public:
  using Duration = std::chrono::nanoseconds;

  /// Negative durations count as zero.
  void record(Duration duration) noexcept {
    const std::uint64_t value = clamped(duration);
    ++buckets_[index(value)];
    least_ = std::min(least_, value);
    most_ = std::max(most_, value);
    ++count_;
    sum_ += value;
  }

  /// As if all that `other` has seen had been recorded here too.
  LatencyHistogram& operator+=(const LatencyHistogram& other) noexcept {
    for (std::size_t i = 0; i < size; ++i) buckets_[i] += other.buckets_[i];
    least_ = std::min(least_, other.least_);
    most_ = std::max(most_, other.most_);
    count_ += other.count_;
    sum_ += other.sum_;
    return *this;
  }
  friend LatencyHistogram operator+(LatencyHistogram left, const LatencyHistogram& right) noexcept {
    return left += right;
  }

  /// What was recorded since `earlier`, an older snapshot of the same. Its `min` and `max` are the edges of the first
  /// and the last bucket that holds something, within the true ones of all times.
  [[nodiscard]] LatencyHistogram since(const LatencyHistogram& earlier) const noexcept {
    LatencyHistogram result;
    for (std::size_t i = 0; i < size; ++i) {
      const std::uint64_t more = buckets_[i] - std::min(buckets_[i], earlier.buckets_[i]);
      if (more == 0) continue;
      result.buckets_[i] = more;
      result.count_ += more;
      if (result.least_ == none) result.least_ = std::max(least_, lower_edge(i));
      result.most_ = i + 1 < size ? std::min(most_, lower_edge(i + 1) - 1) : most_;
    }
    result.sum_ = sum_ - std::min(sum_, earlier.sum_);
    return result;
  }

  [[nodiscard]] std::uint64_t count() const noexcept { return count_; }
  [[nodiscard]] bool empty() const noexcept { return count_ == 0; }
  /// The sum of all. These are zero while there is none.
  [[nodiscard]] Duration total() const noexcept { return to_duration(sum_); }
  [[nodiscard]] Duration min() const noexcept { return to_duration(empty() ? 0 : least_); }
  [[nodiscard]] Duration max() const noexcept { return to_duration(most_); }
  [[nodiscard]] Duration mean() const noexcept { return to_duration(empty() ? 0 : sum_ / count_); }
  /// The duration that the share `q` of all does not exceed: of `count()` sorted ones the one with the number
  /// ceil(q * count()), to the precision of a bucket. `q` from 0 (the least) to 1 (the most); beyond is taken for
  /// these.
  [[nodiscard]] Duration quantile(double q) const noexcept {
    if (empty()) return Duration::zero();
    const double wanted = std::ceil(std::clamp(q, 0.0, 1.0) * static_cast<double>(count_));
    if (!(wanted > 1)) return min();
    const std::uint64_t rank = std::min(static_cast<std::uint64_t>(wanted), count_);
    if (rank == count_) return max();
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i + 1 < size; ++i) {
      seen += buckets_[i];
      if (seen >= rank) {
        return to_duration(std::clamp((lower_edge(i) + lower_edge(i + 1)) / 2, least_, most_));
      }
    }
    return max();
  }

  /// Calls `f(Duration from, Duration below, std::uint64_t count)` for each bucket that holds something, from the
  /// fastest on: for exporting it. Of the last bucket `below` is `Duration::max()`.
  template <class F>
  void for_each_bucket(F&& f) const {
    for (std::size_t i = 0; i < size; ++i) {
      if (buckets_[i] == 0) continue;
      f(to_duration(lower_edge(i)), i + 1 < size ? to_duration(lower_edge(i + 1)) : Duration::max(), buckets_[i]);
    }
  }

  friend bool operator==(const LatencyHistogram&, const LatencyHistogram&) noexcept = default;

 private:
  friend class protocol::LatencyRecorder;

  static constexpr unsigned unit_bits = 6;    // nanoseconds are counted in units of 64
  static constexpr unsigned step_bits = 4;    // steps from one power of two to the next
  static constexpr unsigned value_bits = 42;  // the last bucket ends at 2^42 ns, but for what is longer
  static constexpr std::uint64_t steps = 1U << step_bits;
  static constexpr std::size_t size = (value_bits - unit_bits - step_bits + 1) * steps;
  static constexpr std::uint64_t none = ~std::uint64_t{0};

  static std::uint64_t clamped(Duration duration) noexcept {
    return static_cast<std::uint64_t>(std::max<Duration::rep>(0, duration.count()));
  }
  static Duration to_duration(std::uint64_t value) noexcept { return Duration(static_cast<Duration::rep>(value)); }

  static std::size_t index(std::uint64_t value) noexcept {
    const std::uint64_t units = value >> unit_bits;
    if (units < steps) return static_cast<std::size_t>(units);
    const auto shift = static_cast<unsigned>(std::bit_width(units)) - step_bits - 1;
    const auto bucket = (std::uint64_t{shift} + 1) * steps + ((units >> shift) - steps);
    return static_cast<std::size_t>(std::min<std::uint64_t>(bucket, size - 1));
  }
  static std::uint64_t lower_edge(std::size_t bucket) noexcept {
    if (bucket < steps) return std::uint64_t{bucket} << unit_bits;
    const auto shift = static_cast<unsigned>(bucket / steps) - 1;
    return ((bucket % steps + steps) << shift) << unit_bits;
  }

  std::array<std::uint64_t, size> buckets_{};
  std::uint64_t count_ = 0;
  std::uint64_t sum_ = 0;
  std::uint64_t least_ = none;
  std::uint64_t most_ = 0;
};

namespace protocol {

/// A LatencyHistogram that one thread at a time records into, without a locked instruction, and any thread takes
/// snapshots of.
class LatencyRecorder {
 public:
  void record(LatencyHistogram::Duration duration) noexcept {
    const std::uint64_t value = LatencyHistogram::clamped(duration);
    if (value < least_.load(std::memory_order_relaxed)) least_.store(value, std::memory_order_relaxed);
    if (value > most_.load(std::memory_order_relaxed)) most_.store(value, std::memory_order_relaxed);
    sum_.add(value);
    buckets_[LatencyHistogram::index(value)].add(1);
  }

  /// Adds what was recorded so far. What is recorded meanwhile may be in some of the numbers and not in others; but
  /// `count()` is always the sum of the buckets.
  void add_to(LatencyHistogram& to) const noexcept {
    std::uint64_t count = 0;
    for (std::size_t i = 0; i < buckets_.size(); ++i) {
      const std::uint64_t here = buckets_[i].value();
      to.buckets_[i] += here;
      count += here;
    }
    to.count_ += count;
    to.sum_ += sum_.value();
    to.least_ = std::min(to.least_, least_.load(std::memory_order_relaxed));
    to.most_ = std::max(to.most_, most_.load(std::memory_order_relaxed));
  }

 private:
  std::array<Counter, LatencyHistogram::size> buckets_;
  Counter sum_;
  std::atomic<std::uint64_t> least_{LatencyHistogram::none};
  std::atomic<std::uint64_t> most_{0};
};

}  // namespace protocol

}  // namespace msgtrans
