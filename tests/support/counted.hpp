// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <utility>

namespace msgtrans::test {

/// A move-only value that knows how many of its kind hold something: every one made must end exactly once.
class Counted {
 public:
  Counted() noexcept = default;
  explicit Counted(int value) noexcept : value_(value), holds_(true) { alive_.fetch_add(1); }
  Counted(Counted&& other) noexcept : value_(other.value_), holds_(std::exchange(other.holds_, false)) {}
  Counted& operator=(Counted&& other) noexcept {
    if (this == &other) return *this;
    if (holds_) alive_.fetch_sub(1);
    value_ = other.value_;
    holds_ = std::exchange(other.holds_, false);
    return *this;
  }
  ~Counted() {
    if (holds_) alive_.fetch_sub(1);
  }

  [[nodiscard]] int value() const noexcept { return value_; }
  [[nodiscard]] bool holds() const noexcept { return holds_; }
  [[nodiscard]] static long alive() noexcept { return alive_.load(); }

 private:
  static inline std::atomic<long> alive_{0};
  int value_ = 0;
  bool holds_ = false;
};

}  // namespace msgtrans::test
