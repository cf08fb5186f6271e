// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <iosfwd>
#include <string>

namespace msgtrans {

/// Names one session. Never reused while the process lives; 0 names none.
class SessionId {
 public:
  constexpr SessionId() noexcept = default;
  constexpr explicit SessionId(std::uint64_t value) noexcept : value_(value) {}

  [[nodiscard]] constexpr std::uint64_t value() const noexcept { return value_; }
  constexpr explicit operator bool() const noexcept { return value_ != 0; }

  friend constexpr auto operator<=>(SessionId, SessionId) noexcept = default;

 private:
  std::uint64_t value_ = 0;
};

namespace detail {

// Visible, so that there is one in the process and not one in each shared library.
[[gnu::visibility("default")]] inline constinit std::atomic<std::uint64_t> last_session_id{0};

/// Counted up for the whole process; sessions and free-standing actors share the numbers.
[[nodiscard]] inline SessionId next_session_id() noexcept {
  return SessionId(last_session_id.fetch_add(1, std::memory_order_relaxed) + 1);
}

}  // namespace detail

/// `session-<n>`.
[[nodiscard]] inline std::string to_string(SessionId id) {
  return "session-" + std::to_string(id.value());
}

template <class CharT, class Traits>
std::basic_ostream<CharT, Traits>& operator<<(std::basic_ostream<CharT, Traits>& out, SessionId id) {
  return out << "session-" << id.value();
}

}  // namespace msgtrans

template <>
struct std::hash<msgtrans::SessionId> {
  /// Ids are counted up, so neighbours must not land in neighbouring buckets of every table: splitmix64's finalizer
  /// (Steele, Lea, Flood 2014) spreads them.
  std::size_t operator()(msgtrans::SessionId id) const noexcept {
    std::uint64_t x = id.value();
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return static_cast<std::size_t>(x ^ (x >> 31));
  }
};
