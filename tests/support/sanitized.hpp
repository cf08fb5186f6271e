// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace msgtrans::test {

/// Whether this is a build with AddressSanitizer or ThreadSanitizer, where everything takes longer, and memory tells
/// little.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool sanitized = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
inline constexpr bool sanitized = true;
#else
inline constexpr bool sanitized = false;
#endif
#else
inline constexpr bool sanitized = false;
#endif

/// Whether UndefinedBehaviorSanitizer is in this build: clang's looks at an object's type through a pipe, and reports a
/// wrong one where the process has no descriptors left.
#if defined(__has_feature)
#if __has_feature(undefined_behavior_sanitizer)
inline constexpr bool types_checked_by_pipe = true;
#else
inline constexpr bool types_checked_by_pipe = false;
#endif
#else
inline constexpr bool types_checked_by_pipe = false;
#endif

}  // namespace msgtrans::test
