// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <msgtrans/error.hpp>
#include <optional>
#include <span>
#include <string>

namespace msgtrans::wire {

static_assert(sizeof(std::size_t) >= 8, "the size of a packet (up to 4 GiB + 64 KiB) must fit std::size_t");

/// Bytes of the fixed header, at the start of every packet.
inline constexpr std::size_t header_size = 16;
/// The only version there is.
inline constexpr std::uint8_t protocol_version = 1;

/// How the payload, and only the payload, is compressed. The value is the byte on the wire.
enum class Compression : std::uint8_t { none = 0, zstd = 1, zlib = 2 };

/// The value is the byte on the wire.
enum class PacketType : std::uint8_t { one_way = 0, request = 1, response = 2 };

/// Bits of `Header::flags`. The other bits are sent as 0 and ignored when received.
namespace flags {
inline constexpr std::uint16_t fragmented = 1;     ///< reserved: sent as 0, a received 1 is a protocol error
inline constexpr std::uint16_t high_priority = 2;  ///< may overtake packets without it
inline constexpr std::uint16_t route_tag = 4;      ///< the extension header holds a route tag
}  // namespace flags

/// The fields of the fixed header; the version is not among them, since there is one.
struct Header {
  Compression compression = Compression::none;
  PacketType type = PacketType::one_way;
  std::uint8_t biz_type = 0;      ///< the application's
  std::uint32_t message_id = 0;   ///< 0 is unset
  std::uint16_t ext_len = 0;      ///< bytes of extension header
  std::uint32_t payload_len = 0;  ///< bytes of payload on the wire, so after compression
  std::uint16_t flags = 0;        ///< as received, unknown bits included

  /// Bytes of the whole packet: header, extension header and payload.
  [[nodiscard]] constexpr std::size_t packet_size() const noexcept {
    return header_size + std::size_t{ext_len} + std::size_t{payload_len};
  }

  friend constexpr bool operator==(const Header&, const Header&) = default;
};

/// What a receiver takes. A length equal to its limit is allowed. In bytes.
struct Limits {
  std::uint32_t max_payload = 16U << 20;       ///< of payload_len
  std::uint32_t max_extension = 65535;         ///< of ext_len
  std::uint32_t max_decompressed = 16U << 20;  ///< of a compressed payload's true size
};

namespace detail {

[[nodiscard]] inline std::uint16_t load_be16(const std::byte* from) noexcept {
  std::uint16_t value;
  std::memcpy(&value, from, sizeof value);
  if constexpr (std::endian::native == std::endian::little) value = __builtin_bswap16(value);
  return value;
}

[[nodiscard]] inline std::uint32_t load_be32(const std::byte* from) noexcept {
  std::uint32_t value;
  std::memcpy(&value, from, sizeof value);
  if constexpr (std::endian::native == std::endian::little) value = __builtin_bswap32(value);
  return value;
}

inline void store_be16(std::byte* to, std::uint16_t value) noexcept {
  if constexpr (std::endian::native == std::endian::little) value = __builtin_bswap16(value);
  std::memcpy(to, &value, sizeof value);
}

inline void store_be32(std::byte* to, std::uint32_t value) noexcept {
  if constexpr (std::endian::native == std::endian::little) value = __builtin_bswap32(value);
  std::memcpy(to, &value, sizeof value);
}

/// Reads the fields of the 16 bytes at `from` and says whether a receiver takes them; `explain_header` says why not.
/// One branch for the good packet: the conditions are joined without short circuit.
[[nodiscard]] inline bool read_header(const std::byte* from, const Limits& limits, Header& out) noexcept {
  const auto version = std::to_integer<std::uint8_t>(from[0]);
  const auto compression = std::to_integer<std::uint8_t>(from[1]);
  const auto type = std::to_integer<std::uint8_t>(from[2]);
  out.compression = static_cast<Compression>(compression);
  out.type = static_cast<PacketType>(type);
  out.biz_type = std::to_integer<std::uint8_t>(from[3]);
  out.message_id = load_be32(from + 4);
  const std::uint16_t ext_len = load_be16(from + 8);
  const std::uint32_t payload_len = load_be32(from + 10);
  const std::uint16_t flag_bits = load_be16(from + 14);
  out.ext_len = ext_len;
  out.payload_len = payload_len;
  out.flags = flag_bits;
  return (static_cast<unsigned>(version == protocol_version) & static_cast<unsigned>(compression <= 2) &
          static_cast<unsigned>(type <= 2) & static_cast<unsigned>(ext_len <= limits.max_extension) &
          static_cast<unsigned>(payload_len <= limits.max_payload) &
          static_cast<unsigned>((flag_bits & flags::fragmented) == 0)) != 0;
}

/// The first fault of a header that `read_header` refused, in the order of the fields on the wire.
[[nodiscard]] inline Error explain_header(const std::byte* from, const Limits& limits) {
  const auto byte_at = [from](std::size_t i) { return std::to_integer<unsigned>(from[i]); };
  if (byte_at(0) != protocol_version) {
    const bool tls = byte_at(0) == 22, http = byte_at(0) >= 'A' && byte_at(0) <= 'Z';  // a handshake; a method
    const char* const guess = tls ? "; perhaps the peer speaks TLS" : http ? "; perhaps the peer speaks HTTP" : "";
    return {Errc::bad_version, "version is " + std::to_string(byte_at(0)) + ", must be 1" + guess};
  }
  if (byte_at(1) > 2) {
    return {Errc::bad_compression,
            "compression is " + std::to_string(byte_at(1)) + ", must be 0 (none), 1 (zstd) or 2 (zlib)"};
  }
  if (byte_at(2) > 2) {
    return {Errc::bad_type,
            "type is " + std::to_string(byte_at(2)) + ", must be 0 (one-way), 1 (request) or 2 (response)"};
  }
  if (const std::uint16_t ext_len = load_be16(from + 8); ext_len > limits.max_extension) {
    return {Errc::extension_too_large, "ext_len is " + std::to_string(ext_len) + ", over the limit of " +
                                           std::to_string(limits.max_extension) + " bytes"};
  }
  if (const std::uint32_t payload_len = load_be32(from + 10); payload_len > limits.max_payload) {
    return {Errc::payload_too_large, "payload_len is " + std::to_string(payload_len) + ", over the limit of " +
                                         std::to_string(limits.max_payload) + " bytes"};
  }
  return {Errc::fragmented,
          "flags is " + std::to_string(load_be16(from + 14)) + ", bit 0 (fragmented) is reserved and must be 0"};
}

}  // namespace detail

/// Writes the 16 bytes of `header`. Flag bits that a sender must leave 0 (the fragmented bit and the unknown ones) are
/// written as 0, whatever `header.flags` holds. Any thread.
inline void encode_header(const Header& header, std::span<std::byte, header_size> out) noexcept {
  std::byte* const to = out.data();
  to[0] = std::byte{protocol_version};
  to[1] = static_cast<std::byte>(header.compression);
  to[2] = static_cast<std::byte>(header.type);
  to[3] = std::byte{header.biz_type};
  detail::store_be32(to + 4, header.message_id);
  detail::store_be16(to + 8, header.ext_len);
  detail::store_be32(to + 10, header.payload_len);
  detail::store_be16(to + 14, static_cast<std::uint16_t>(header.flags & (flags::high_priority | flags::route_tag)));
}

/// Reads the 16 bytes of a header. The first fault in the order of the fields (version, compression, type, ext_len,
/// payload_len, flags) is returned; its text names the field, the value and, for a length, the limit, and `out` is then
/// as it was. message_id, biz_type and the unknown flag bits are taken as they are. Any thread.
[[nodiscard]] inline std::optional<Error> decode_header(std::span<const std::byte, header_size> bytes,
                                                        const Limits& limits, Header& out) {
  Header header;
  if (!detail::read_header(bytes.data(), limits, header)) return detail::explain_header(bytes.data(), limits);
  out = header;
  return std::nullopt;
}

}  // namespace msgtrans::wire
