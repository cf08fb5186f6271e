// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "session_state.hpp"

namespace msgtrans::test {

/// Of sessions in tests without a server: nobody hears of anything.
class NoHost final : public detail::SessionHost {
 public:
  void message(Session&, const Message&) override {}
  [[nodiscard]] bool handles_messages() const noexcept override { return false; }
  void writable(Session&) override {}
  void ended(detail::SessionState&, const Error&) noexcept override {}
  void failed(const ErrorEvent&) noexcept override {}
};

}  // namespace msgtrans::test
