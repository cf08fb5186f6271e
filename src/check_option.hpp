// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <msgtrans/error.hpp>
#include <string>
#include <utility>

namespace msgtrans::detail {

[[nodiscard]] inline Error invalid_option(std::string text) {
  return {Errc::invalid_option, std::move(text)};
}

/// Names an option that is out of its range; zero means off where it is allowed.
[[nodiscard]] inline Error check_duration(const char* name, std::chrono::milliseconds value, bool zero_allowed = true) {
  constexpr std::chrono::milliseconds most = std::chrono::hours(24 * 365);
  if (value.count() >= (zero_allowed ? 0 : 1) && value <= most) return {};
  return invalid_option(std::string(name) + " is " + std::to_string(value.count()) + " ms, must be from " +
                        (zero_allowed ? "0 (off)" : "1 ms") + " to a year");
}

/// The same of a number; `unit` stands behind its value.
template <class T>
[[nodiscard]] Error check_range(const char* name, T value, T least, T most, const char* unit = "") {
  if (value >= least && value <= most) return {};
  return invalid_option(std::string(name) + " is " + std::to_string(value) + unit + ", must be from " +
                        std::to_string(least) + " to " + std::to_string(most));
}

}  // namespace msgtrans::detail
