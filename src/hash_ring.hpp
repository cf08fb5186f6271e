// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace msgtrans::detail {

/// Consistent hashing: D. Karger, E. Lehman, T. Leighton, R. Panigrahy, M. Levine, D. Lewin, "Consistent Hashing and
/// Random Trees" (STOC 1997). Each name has many places on a ring of 64-bit numbers, and a key belongs to the name
/// whose place is the next one behind the key's. The places depend on the names alone, so whoever has the same names
/// has the same ring, in every process.
class HashRing {
 public:
  /// O(n log n) in all places.
  HashRing(const std::vector<std::string>& names, std::size_t places_each) {
    places_.reserve(names.size() * places_each);
    for (std::size_t index = 0; index < names.size(); ++index) {
      const std::uint64_t base = hash(names[index]);
      for (std::size_t i = 0; i < places_each; ++i) {
        places_.emplace_back(finish(base + i * 0x9e3779b97f4a7c15ULL), index);
      }
    }
    // By name where two have the same place, not by the order in which they were added.
    std::sort(places_.begin(), places_.end(), [&names](const auto& a, const auto& b) {
      return a.first != b.first ? a.first < b.first : names[a.second] < names[b.second];
    });
  }

  /// Of the names that will do, the one that the key belongs to, by its index; none if none will do. O(log n) if the
  /// first one will.
  template <class Usable>
  [[nodiscard]] std::optional<std::size_t> find(std::uint64_t key, Usable usable) const {
    const auto first = std::lower_bound(places_.begin(), places_.end(), key,
                                        [](const auto& place, std::uint64_t at) { return place.first < at; });
    for (auto place = first; place != places_.end(); ++place) {
      if (usable(place->second)) return place->second;
    }
    for (auto place = places_.begin(); place != first; ++place) {
      if (usable(place->second)) return place->second;
    }
    return std::nullopt;
  }

  /// FNV-1a (G. Fowler, L. C. Noll, K.-P. Vo), and then the end of MurmurHash3 (A. Appleby), since FNV alone leaves
  /// what differs in the last bytes close together.
  [[nodiscard]] static std::uint64_t hash(std::string_view text) noexcept {
    std::uint64_t value = 0xcbf29ce484222325ULL;
    for (const char c : text) value = (value ^ static_cast<unsigned char>(c)) * 0x100000001b3ULL;
    return finish(value);
  }

 private:
  static constexpr std::uint64_t finish(std::uint64_t x) noexcept {
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdULL;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ULL;
    return x ^ (x >> 33);
  }

  std::vector<std::pair<std::uint64_t, std::size_t>> places_;  // sorted
};

}  // namespace msgtrans::detail
