// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace msgtrans::tool {

/// Counts durations in buckets that are 1/32 of their value wide (log-linear, as in HdrHistogram by Gil Tene).
class Histogram {
 public:
  void add(std::chrono::nanoseconds duration) noexcept {
    const auto value = static_cast<std::uint64_t>(std::max<std::int64_t>(0, duration.count()));
    ++buckets_[index(value)];
    ++count_;
    max_ = std::max(max_, value);
  }
  void merge(const Histogram& other) noexcept {
    for (std::size_t i = 0; i < buckets_.size(); ++i) buckets_[i] += other.buckets_[i];
    count_ += other.count_;
    max_ = std::max(max_, other.max_);
  }
  [[nodiscard]] std::uint64_t count() const noexcept { return count_; }
  [[nodiscard]] double max_us() const noexcept { return static_cast<double>(max_) / 1000; }
  /// The upper edge of the bucket that holds the given share (0 to 1) of the durations, in microseconds.
  [[nodiscard]] double quantile_us(double share) const noexcept {
    const auto wanted = static_cast<std::uint64_t>(share * static_cast<double>(count_));
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i < buckets_.size(); ++i) {
      seen += buckets_[i];
      if (seen > wanted) return static_cast<double>(std::min(upper_edge(i), max_)) / 1000;
    }
    return max_us();
  }

 private:
  static constexpr unsigned step_bits = 5;
  static constexpr std::uint64_t steps = 1U << step_bits;

  static std::size_t index(std::uint64_t value) noexcept {
    if (value < steps) return static_cast<std::size_t>(value);
    const auto shift = static_cast<unsigned>(std::bit_width(value)) - step_bits - 1;
    return static_cast<std::size_t>((std::uint64_t{shift} + 1) * steps + ((value >> shift) - steps));
  }
  static std::uint64_t upper_edge(std::size_t index) noexcept {
    if (index < steps) return index;
    const auto shift = static_cast<unsigned>(index / steps) - 1;
    return ((index % steps + steps + 1) << shift) - 1;
  }

  std::array<std::uint64_t, (64 - step_bits + 1) * steps> buckets_{};
  std::uint64_t count_ = 0;
  std::uint64_t max_ = 0;
};

}  // namespace msgtrans::tool
