// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace msgtrans::test {

/// Makes one allocation of this thread fail: the one after `successes` further ones. Ends with the object.
class AllocationFailure {
 public:
  explicit AllocationFailure(long successes) noexcept;
  ~AllocationFailure();
  AllocationFailure(const AllocationFailure&) = delete;
  AllocationFailure& operator=(const AllocationFailure&) = delete;

  /// True once it has failed; false means that there were fewer allocations.
  [[nodiscard]] bool happened() const noexcept;
};

}  // namespace msgtrans::test
