// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>

namespace msgtrans::protocol {

/// The protocol layer never asks what time it is: every call that needs the time is given it, on this clock.
using Clock = std::chrono::steady_clock;
using TimePoint = Clock::time_point;
using Duration = Clock::duration;

}  // namespace msgtrans::protocol
