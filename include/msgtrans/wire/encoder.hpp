// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <msgtrans/wire/header.hpp>
#include <span>
#include <stdexcept>
#include <vector>

namespace msgtrans::wire {

/// Bytes a packet with these parts has on the wire.
[[nodiscard]] constexpr std::size_t packet_size(std::size_t extension, std::size_t payload) noexcept {
  return header_size + extension + payload;
}

/// Appends one packet to `out`. `ext_len` and `payload_len` come from the spans, the other fields from `header`; flag
/// bits as in `encode_header`. The spans must not lie in `out`. Throws std::length_error when a span is longer than its
/// field can say (65,535 and 2^32-1 bytes), or std::bad_alloc; `out` is then as it was. Amortised linear in the bytes
/// appended.
inline void append_packet(std::vector<std::byte>& out, const Header& header, std::span<const std::byte> extension,
                          std::span<const std::byte> payload) {
  if (extension.size() > std::numeric_limits<std::uint16_t>::max()) {
    throw std::length_error("msgtrans: an extension header has at most 65535 bytes");
  }
  if (payload.size() > std::numeric_limits<std::uint32_t>::max()) {
    throw std::length_error("msgtrans: a payload has at most 4294967295 bytes");
  }
  Header filled = header;
  filled.ext_len = static_cast<std::uint16_t>(extension.size());
  filled.payload_len = static_cast<std::uint32_t>(payload.size());

  const std::size_t needed = out.size() + filled.packet_size();
  // reserve() alone allocates exactly what it is asked for: a batch would be copied once a packet.
  if (needed > out.capacity()) out.reserve(std::max(needed, 2 * out.capacity()));
  std::array<std::byte, header_size> head;
  encode_header(filled, head);
  out.insert(out.end(), head.begin(), head.end());
  out.insert(out.end(), extension.begin(), extension.end());
  out.insert(out.end(), payload.begin(), payload.end());
}

/// The header of the answer to `request`: type response, and the request's biz_type and message_id; all else default.
[[nodiscard]] constexpr Header response_to(const Header& request) noexcept {
  Header header;
  header.type = PacketType::response;
  header.biz_type = request.biz_type;
  header.message_id = request.message_id;
  return header;
}

}  // namespace msgtrans::wire
