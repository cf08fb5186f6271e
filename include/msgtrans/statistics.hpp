// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <msgtrans/error.hpp>
#include <msgtrans/protocol/latency_histogram.hpp>
#include <numeric>

namespace msgtrans {

/// A number for each `Errc`, and one for all errors of other categories (the operating system's, Asio's). A value.
class ErrorCounts {
 public:
  /// Of `Errc`'s values, which begin at 1, and of all others, at 0.
  static constexpr std::size_t size = static_cast<std::size_t>(Errc::blocking_on_shard) + 1;

  void add(const error_code& code, std::uint64_t count = 1) noexcept { counts_[index(code)] += count; }

  [[nodiscard]] std::uint64_t operator[](Errc code) const noexcept { return counts_[index(code)]; }
  /// Of other categories than `Errc`'s: a connection that was reset, say.
  [[nodiscard]] std::uint64_t system() const noexcept { return counts_[0]; }
  [[nodiscard]] std::uint64_t total() const noexcept {
    return std::accumulate(counts_.begin(), counts_.end(), std::uint64_t{0});
  }
  /// Of those that say that the peer broke the protocol; see `is_protocol_error`.
  [[nodiscard]] std::uint64_t protocol_errors() const noexcept {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < size; ++i) sum += is_protocol_error(static_cast<Errc>(i)) ? counts_[i] : 0;
    return sum;
  }
  /// Calls `f(const char* name, std::uint64_t count)` for each that is not zero: the name of the `Errc`, or "system".
  template <class F>
  void for_each(F&& f) const {
    for (std::size_t i = 0; i < size; ++i) {
      if (counts_[i] != 0) f(i == 0 ? "system" : to_string(static_cast<Errc>(i)), counts_[i]);
    }
  }

  ErrorCounts& operator+=(const ErrorCounts& other) noexcept {
    for (std::size_t i = 0; i < size; ++i) counts_[i] += other.counts_[i];
    return *this;
  }
  friend bool operator==(const ErrorCounts&, const ErrorCounts&) noexcept = default;

  /// Where the code is counted, from 0 to `size - 1`.
  [[nodiscard]] static std::size_t index(const error_code& code) noexcept {
    if (code.category() != error_category() || code.value() < 1) return 0;
    const auto value = static_cast<std::size_t>(code.value());
    return value < size ? value : 0;
  }

 private:
  std::array<std::uint64_t, size> counts_{};
};

/// Requests that this end has made, by what became of them. At rest
/// `made == answered + timed_out + cancelled + connection_lost + refused + pending`.
struct RequestCounts {
  std::uint64_t made = 0;
  std::uint64_t sent = 0;  ///< of them, so far: accepted for sending
  std::uint64_t answered = 0;
  std::uint64_t timed_out = 0;        ///< `request_timeout`, whether they had been sent or waited for room
  std::uint64_t cancelled = 0;        ///< `operation_aborted`
  std::uint64_t connection_lost = 0;  ///< accepted for sending, and the session ended before the answer came
  std::uint64_t refused = 0;  ///< never sent: `closed`, `not_found`, `too_large`, `invalid_option`, `would_block`
  std::uint64_t pending = 0;  ///< now: sent or waiting for room

  RequestCounts& operator+=(const RequestCounts& other) noexcept {
    made += other.made;
    sent += other.sent;
    answered += other.answered;
    timed_out += other.timed_out;
    cancelled += other.cancelled;
    connection_lost += other.connection_lost;
    refused += other.refused;
    pending += other.pending;
    return *this;
  }
  friend bool operator==(const RequestCounts&, const RequestCounts&) noexcept = default;
};

/// A client's requests, of all its connections.
struct RequestStats {
  RequestCounts counts;
  LatencyHistogram latency;  ///< of the answered ones; see `ServerStats::request_latency`
};

}  // namespace msgtrans
