// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <exception>
#include <string>

namespace msgtrans::detail {

/// The text of an exception; empty if there is no memory for it.
[[nodiscard]] inline std::string text_of(const std::exception_ptr& exception) noexcept {
  try {
    try {
      std::rethrow_exception(exception);
    } catch (const std::exception& known) {
      return known.what();
    } catch (...) {
      return "something that is no std::exception";
    }
  } catch (...) {
    return {};
  }
}

}  // namespace msgtrans::detail
