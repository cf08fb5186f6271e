// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/basic_waitable_timer.hpp>
#include <chrono>

namespace msgtrans::detail {

/// The time of a thread on which it stands still until it is set: a test kit's.
struct ManualTime {
  std::chrono::steady_clock::time_point now;
  /// When the first timer is due, as far as it was asked.
  std::chrono::steady_clock::time_point next = std::chrono::steady_clock::time_point::max();
};

/// The system's steady clock, but for threads that have a time of their own.
struct Clock {
  using duration = std::chrono::steady_clock::duration;
  using rep = duration::rep;
  using period = duration::period;
  using time_point = std::chrono::steady_clock::time_point;
  static constexpr bool is_steady = true;

  static inline constinit thread_local ManualTime* manual = nullptr;

  [[nodiscard]] static time_point now() noexcept {
    return manual == nullptr ? std::chrono::steady_clock::now() : manual->now;
  }

  /// Asio's `WaitTraits`: it asks them how long to wait for the first timer of a context.
  struct Wait {
    static duration to_wait_duration(const duration& wait) noexcept {
      if (manual != nullptr) {
        manual->next = wait < time_point::max() - manual->now ? manual->now + wait : time_point::max();
      }
      return wait;
    }
    static duration to_wait_duration(const time_point& when) noexcept { return to_wait_duration(when - now()); }
  };
};

using Timer = boost::asio::basic_waitable_timer<Clock, Clock::Wait, boost::asio::any_io_executor>;

}  // namespace msgtrans::detail
