// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <utility>

namespace msgtrans {

namespace detail {
class ControlLoop;
}

/// The control path of a server: one loop that takes commands from everywhere, puts those about one session in the
/// order made, and tells the subscribers what happened. `ServerTransport::control()` gives it; a connection pool or a
/// health checker that is given it shares the loop and its subscribers instead of having its own. A handle; copies are
/// the same, and any thread may use them. It may outlive the server: then commands find a loop that has ended.
class Control {
 public:
  /// Handles come from the library.
  explicit Control(std::shared_ptr<detail::ControlLoop> loop) noexcept : loop_(std::move(loop)) {}

  [[nodiscard]] const std::shared_ptr<detail::ControlLoop>& loop() const noexcept { return loop_; }

 private:
  std::shared_ptr<detail::ControlLoop> loop_;
};

}  // namespace msgtrans
