// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstdint>
#include <functional>
#include <msgtrans/session_id.hpp>
#include <string>
#include <string_view>
#include <type_traits>

namespace msgtrans::lockfree {

/// Keys that are a 64-bit number in disguise: LockFreeHashMap keeps them in its table alone. Specialise it for your own
/// strong types: `to_bits` must give different numbers for different keys, and `from_bits` the key again.
template <class K>
struct KeyBits {
  static constexpr bool is_known = false;
};
template <class K>
requires std::integral<K> &&(sizeof(K) <= 8) struct KeyBits<K> {
  static constexpr bool is_known = true;
  static constexpr std::uint64_t to_bits(K key) noexcept { return static_cast<std::uint64_t>(key); }
  static constexpr K from_bits(std::uint64_t bits) noexcept { return static_cast<K>(bits); }
};
template <class K>
requires std::is_enum_v<K>
struct KeyBits<K> {
  static constexpr bool is_known = true;
  static constexpr std::uint64_t to_bits(K key) noexcept { return static_cast<std::uint64_t>(key); }
  static constexpr K from_bits(std::uint64_t bits) noexcept { return static_cast<K>(bits); }
};
template <>
struct KeyBits<SessionId> {
  static constexpr bool is_known = true;
  static constexpr std::uint64_t to_bits(SessionId key) noexcept { return key.value(); }
  static constexpr SessionId from_bits(std::uint64_t bits) noexcept { return SessionId(bits); }
};

/// A bijection of 64 bits that spreads neighbours, and keys that differ in a few bits anywhere, over the high bits as
/// well as the low ones: D. Knuth's multiplicative hashing (TAOCP 3, 6.4), with the halves folded into each other
/// before and after.
[[nodiscard]] constexpr std::uint64_t mix(std::uint64_t x) noexcept {
  x = (x ^ (x >> 32)) * 0x9e3779b97f4a7c15ULL;
  return x ^ (x >> 32);
}
/// Its inverse: `unmix(mix(x)) == x`.
[[nodiscard]] constexpr std::uint64_t unmix(std::uint64_t x) noexcept {
  x = (x ^ (x >> 32)) * 0xf1de83e19937733dULL;
  return x ^ (x >> 32);
}
static_assert(unmix(mix(0x0123456789abcdefULL)) == 0x0123456789abcdefULL && unmix(mix(~0ULL)) == ~0ULL);

/// The hash of LockFreeHashMap unless another is given: strings are looked up by anything that is a string_view, the
/// rest by `std::hash`.
template <class K>
struct DefaultHash {
  static_assert(
      requires(const K& key) {
        { std::hash<K>{}(key) } -> std::convertible_to<std::size_t>;
      },
      "LockFreeHashMap: there is no std::hash of this key type; specialise it, or name a hash as the third "
      "template argument");
  [[nodiscard]] std::size_t operator()(const K& key) const noexcept(noexcept(std::hash<K>{}(key))) {
    return std::hash<K>{}(key);
  }
};
template <>
struct DefaultHash<std::string> {
  using is_transparent = void;
  [[nodiscard]] std::size_t operator()(std::string_view key) const noexcept {
    return std::hash<std::string_view>{}(key);
  }
};

}  // namespace msgtrans::lockfree
