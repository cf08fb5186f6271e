// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <msgtrans/wire/header.hpp>
#include <optional>
#include <span>

namespace msgtrans::wire {

/// How long whoever asks still waits for the answer, as the first 8 bytes of a request's extension header: "MTto", then
/// milliseconds, 32 bits, big-endian. An agreement of both ends beside the wire format, to which extension headers are
/// the application's; what follows is the application's as ever.
inline constexpr std::size_t told_timeout_size = 8;
inline constexpr std::array told_timeout_mark{std::byte{'M'}, std::byte{'T'}, std::byte{'t'}, std::byte{'o'}};

/// Less than none is written as none, more than fits as the most that does.
inline void write_told_timeout(std::chrono::milliseconds left, std::span<std::byte, told_timeout_size> to) noexcept {
  const auto value = std::clamp<std::int64_t>(left.count(), 0, 0xFFFF'FFFF);
  std::memcpy(to.data(), told_timeout_mark.data(), told_timeout_mark.size());
  detail::store_be32(to.data() + told_timeout_mark.size(), static_cast<std::uint32_t>(value));
}

/// Nothing if the extension header does not begin with one.
[[nodiscard]] inline std::optional<std::chrono::milliseconds> read_told_timeout(
    std::span<const std::byte> extension) noexcept {
  if (extension.size() < told_timeout_size ||
      !std::ranges::equal(extension.first(told_timeout_mark.size()), told_timeout_mark)) {
    return std::nullopt;
  }
  return std::chrono::milliseconds(detail::load_be32(extension.data() + told_timeout_mark.size()));
}

}  // namespace msgtrans::wire
