// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace msgtrans::detail {

/// For the body of a short spin.
inline void pause_briefly() noexcept {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace msgtrans::detail
