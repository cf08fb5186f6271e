// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <msgtrans/error.hpp>
#include <optional>
#include <string>
#include <utility>

namespace msgtrans {

/// How a synchronous call on a channel ended.
enum class ChannelStatus : unsigned char {
  ok,                 ///< sent, or received
  full,               ///< not sent: no room; the value stays the caller's
  empty,              ///< nothing to receive now
  timeout,            ///< the time went by first
  closed,             ///< not sent, or nothing will ever be received again: the channel is closed (and drained)
  blocking_on_shard,  ///< a call that would block, on a thread that must not block; nothing was done
};

[[nodiscard]] constexpr const char* to_string(ChannelStatus status) noexcept {
  switch (status) {
    case ChannelStatus::ok: return "ok";
    case ChannelStatus::full: return "full";
    case ChannelStatus::empty: return "empty";
    case ChannelStatus::timeout: return "timeout";
    case ChannelStatus::closed: return "closed";
    case ChannelStatus::blocking_on_shard: return "blocking_on_shard";
  }
  return "?";
}

/// What a receive gives: a value, or why there is none.
template <class T>
class [[nodiscard]] RecvResult {
 public:
  RecvResult(T value) : status_(ChannelStatus::ok), value_(std::move(value)) {}
  /// Without a value; not `ok`.
  RecvResult(ChannelStatus status) noexcept : status_(status) {}

  explicit operator bool() const noexcept { return value_.has_value(); }
  [[nodiscard]] bool has_value() const noexcept { return value_.has_value(); }
  [[nodiscard]] ChannelStatus status() const noexcept { return status_; }
  /// Undefined without a value, as for `std::optional`.
  T& operator*() & noexcept { return *value_; }
  const T& operator*() const& noexcept { return *value_; }
  T&& operator*() && noexcept { return *std::move(value_); }
  T* operator->() noexcept { return &*value_; }
  const T* operator->() const noexcept { return &*value_; }
  /// Throws `std::bad_optional_access` without a value.
  T& value() & { return value_.value(); }
  T&& value() && { return std::move(value_).value(); }

 private:
  ChannelStatus status_;
  std::optional<T> value_;
};

/// How many values a channel holds at most: a choice that has to be made, so there is no default.
class ChannelCapacity {
 public:
  /// The largest bound; more is an error, and surely a mistake.
  static constexpr std::size_t max_bound = std::size_t{1} << 30;

  /// At most `count` values, from 1 to `max_bound`; `Exception` with `Errc::invalid_option` otherwise.
  [[nodiscard]] static ChannelCapacity bounded(std::size_t count) {
    if (count == 0 || count > max_bound) {
      throw Exception(Error(Errc::invalid_option, "channel capacity is " + std::to_string(count) +
                                                      ", must be from 1 to " + std::to_string(max_bound)));
    }
    return ChannelCapacity(count);
  }
  /// As many as memory holds.
  [[nodiscard]] static ChannelCapacity unbounded() noexcept { return ChannelCapacity(0); }

  [[nodiscard]] bool is_bounded() const noexcept { return count_ != 0; }
  /// 0 if unbounded.
  [[nodiscard]] std::size_t count() const noexcept { return count_; }

 private:
  explicit ChannelCapacity(std::size_t count) noexcept : count_(count) {}
  std::size_t count_;
};

}  // namespace msgtrans
