// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <msgtrans/wire/decoder.hpp>
#include <msgtrans/wire/encoder.hpp>
#include <msgtrans/wire/header.hpp>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>
#include <zlib.h>

namespace msgtrans::wire::test {

using Bytes = std::vector<std::byte>;

/// The bytes of a text of hexadecimal digits; blanks are skipped.
inline Bytes from_hex(std::string_view text) {
  const auto digit = [](char c) -> unsigned { return static_cast<unsigned>(c <= '9' ? c - '0' : c - 'a' + 10); };
  std::string digits;
  for (const char c : text) {
    if (c != ' ') digits += c;
  }
  Bytes out;
  for (std::size_t i = 0; i + 1 < digits.size(); i += 2) {
    out.push_back(static_cast<std::byte>(digit(digits[i]) << 4 | digit(digits[i + 1])));
  }
  return out;
}

inline std::string to_hex(std::span<const std::byte> bytes) {
  std::string out;
  for (const std::byte b : bytes) {
    constexpr std::string_view digits = "0123456789abcdef";
    out += digits[std::to_integer<unsigned>(b) >> 4];
    out += digits[std::to_integer<unsigned>(b) & 15];
  }
  return out;
}

/// The payload of a compressed WebSocket message, by zlib itself and as small as can be; hexadecimal.
inline std::string deflated(const Bytes& bytes) {
  z_stream stream{};
  EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, -15, 9, Z_DEFAULT_STRATEGY), Z_OK);
  Bytes out(bytes.size() + bytes.size() / 1000 + 100);
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_SYNC_FLUSH), Z_OK);
  out.resize(stream.total_out - 4);
  deflateEnd(&stream);
  return to_hex(out);
}

inline Bytes bytes_of(std::string_view text) {
  const auto* first = reinterpret_cast<const std::byte*>(text.data());
  return {first, first + text.size()};
}

inline std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

inline Bytes random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  Bytes out(count);
  for (std::byte& b : out) b = static_cast<std::byte>(random());
  return out;
}

/// A packet copied out of its view.
struct Packet {
  Header header;
  Bytes extension;
  Bytes payload;

  friend bool operator==(const Packet&, const Packet&) = default;
};

inline Packet copy_of(const PacketView& view) {
  return {view.header, {view.extension.begin(), view.extension.end()}, {view.payload.begin(), view.payload.end()}};
}

/// A stream of packets and what it must decode to.
struct Stream {
  Bytes bytes;
  std::vector<Packet> packets;

  void add(Header header, const Bytes& extension, const Bytes& payload) {
    append_packet(bytes, header, extension, payload);
    header.ext_len = static_cast<std::uint16_t>(extension.size());
    header.payload_len = static_cast<std::uint32_t>(payload.size());
    packets.push_back({header, extension, payload});
  }
};

/// `count` packets of every type with extension headers and payloads of up to the given sizes.
inline Stream random_stream(std::size_t count, std::size_t max_extension, std::size_t max_payload, std::uint32_t seed) {
  std::mt19937 random(seed);
  Stream stream;
  for (std::size_t i = 0; i < count; ++i) {
    Header header;
    header.compression = static_cast<Compression>(random() % 3);
    header.type = static_cast<PacketType>(random() % 3);
    header.biz_type = static_cast<std::uint8_t>(random());
    header.message_id = static_cast<std::uint32_t>(random());
    header.flags = static_cast<std::uint16_t>((random() % 4) << 1);
    // A third of the packets without the one, a third without the other: empty parts are the edges.
    const std::size_t extension = random() % 3 == 0 ? 0 : random() % (max_extension + 1);
    const std::size_t payload = random() % 3 == 0 ? 0 : random() % (max_payload + 1);
    stream.add(header, random_bytes(extension, static_cast<std::uint32_t>(random())),
               random_bytes(payload, static_cast<std::uint32_t>(random())));
  }
  return stream;
}

}  // namespace msgtrans::wire::test
