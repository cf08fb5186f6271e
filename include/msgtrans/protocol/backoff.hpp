// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>

namespace msgtrans::protocol {

/// How long to wait before trying again: `initial` before the first attempt, `factor` times as long before each further
/// one, at most `max`; then more or less by the share `jitter`, so that many who lost the same server do not come back
/// at the same moment.
struct Backoff {
  std::chrono::milliseconds initial{100};
  double factor = 1.6;
  std::chrono::milliseconds max{30'000};
  double jitter = 0;

  /// Before attempt number `attempt`, from 1. `random`, from 0 to 1, says where between `1 - jitter` and `1 + jitter`
  /// of the delay it is. To the nearest millisecond.
  [[nodiscard]] std::chrono::milliseconds delay(std::uint64_t attempt, double random = 0.5) const noexcept {
    const double exponent = static_cast<double>(std::max<std::uint64_t>(attempt, 1)) - 1;
    const double wanted = static_cast<double>(initial.count()) * std::pow(factor, exponent);
    const double most = static_cast<double>(max.count());
    const double share = 1 + jitter * (2 * random - 1);
    return std::chrono::milliseconds(std::llround(std::min(wanted, most) * share));
  }
};

}  // namespace msgtrans::protocol
