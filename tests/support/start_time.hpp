// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <msgtrans/protocol/time.hpp>

namespace msgtrans::test {

/// When simulated time begins: at no multiple of a tick.
inline constexpr protocol::TimePoint start_time{std::chrono::nanoseconds(987654321)};

}  // namespace msgtrans::test
