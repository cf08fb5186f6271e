// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <msgtrans/error.hpp>
#include <string>

namespace msgtrans {

/// What is done about an actor that an exception has left.
enum class OnFailure : std::uint8_t {
  restart,   ///< it is started again after a while, with the same mailbox; given up when that happens too often
  stop,      ///< it is given up
  escalate,  ///< it is given up, and so are all the others: the failure is everybody's
};

/// Of one actor. Durations: zero means at once, or off.
struct ActorOptions {
  /// Messages that wait for it, and as many urgent ones. 1 to 2^30.
  std::size_t mailbox = 1024;
  OnFailure on_failure = OnFailure::restart;
  /// How long after a failure it is started again: the first time, and by how much longer each further time within the
  /// window, up to the longest. The factor: 1 to 1000.
  std::chrono::milliseconds restart_delay{100};
  double restart_delay_factor = 2.0;
  std::chrono::milliseconds longest_restart_delay{10'000};
  /// So many restarts within that time are made; the next failure is the last. 0: none is made. A window of zero never
  /// forgets a failure.
  unsigned max_restarts = 5;
  std::chrono::milliseconds restart_window{60'000};
};

/// Names the first option that is out of its range, with its value; no error if none is.
[[nodiscard]] inline Error validate(const ActorOptions& options) {
  const auto invalid = [](const char* name, const std::string& value, const char* range) {
    return Error(Errc::invalid_option, std::string(name) + " is " + value + ", must be " + range);
  };
  constexpr std::size_t largest = std::size_t{1} << 30;
  if (options.mailbox < 1 || options.mailbox > largest) {
    return invalid("mailbox", std::to_string(options.mailbox), "from 1 to 1073741824");
  }
  if (options.restart_delay.count() < 0) {
    return invalid("restart_delay", std::to_string(options.restart_delay.count()) + " ms", "at least 0");
  }
  if (!(options.restart_delay_factor >= 1.0 && options.restart_delay_factor <= 1000.0)) {
    return invalid("restart_delay_factor", std::to_string(options.restart_delay_factor), "from 1 to 1000");
  }
  if (options.longest_restart_delay < options.restart_delay) {
    return invalid("longest_restart_delay", std::to_string(options.longest_restart_delay.count()) + " ms",
                   "at least restart_delay");
  }
  if (options.restart_window.count() < 0) {
    return invalid("restart_window", std::to_string(options.restart_window.count()) + " ms", "at least 0");
  }
  return {};
}

}  // namespace msgtrans
