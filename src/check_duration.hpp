// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <msgtrans/error.hpp>

namespace msgtrans::detail {

/// Names an option that is out of its range; zero means off where it is allowed.
[[nodiscard]] Error check_duration(const char* name, std::chrono::milliseconds value, bool zero_allowed = true);

}  // namespace msgtrans::detail
