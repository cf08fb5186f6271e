// SPDX-License-Identifier: Apache-2.0
// The rule numbers (F1, V2, ...) are those of docs/wire_format.md.
#include "wire_test_util.hpp"

#include <array>
#include <gtest/gtest.h>
#include <msgtrans/wire/compression.hpp>
#include <msgtrans/wire/decoder.hpp>
#include <msgtrans/wire/encoder.hpp>
#include <msgtrans/wire/header.hpp>
#include <msgtrans/wire/message_id.hpp>
#include <set>
#include <stdexcept>
#include <utility>

namespace msgtrans::wire {
namespace {

using namespace test;

struct Vector {
  const char* name;
  const char* hex;
  Header header;
  const char* extension_hex;
  const char* payload_hex;
};

Header header_of(PacketType type, std::uint32_t id, std::uint8_t biz, std::uint16_t flag_bits = 0,
                 Compression compression = Compression::none) {
  Header header;
  header.compression = compression;
  header.type = type;
  header.biz_type = biz;
  header.message_id = id;
  header.flags = flag_bits;
  return header;
}

/// The vectors V1 to V12 of docs/wire_format.md.
const Vector vectors[] = {
    {"V1", "01000000 00000001 0000 00000000 0000", header_of(PacketType::one_way, 1, 0), "", ""},
    {"V2", "01000005 0000002a 0000 0000000b 0000 68656c6c6f20776f726c64", header_of(PacketType::one_way, 42, 5), "",
     "68656c6c6f20776f726c64"},
    {"V3", "0100010a 00000064 0000 00000004 0000 70696e67", header_of(PacketType::request, 100, 10), "", "70696e67"},
    {"V4", "0100020a 00000064 0000 00000004 0000 706f6e67", header_of(PacketType::response, 100, 10), "", "706f6e67"},
    {"V5", "01000001 00000002 0003 00000002 0000 616263 6869", header_of(PacketType::one_way, 2, 1), "616263", "6869"},
    {"V6", "01000100 00000003 0004 00000000 0004 deadbeef", header_of(PacketType::request, 3, 0, flags::route_tag),
     "deadbeef", ""},
    {"V7", "01000000 00000004 0000 00000001 0002 78", header_of(PacketType::one_way, 4, 0, flags::high_priority), "",
     "78"},
    {"V8", "01000000 00000005 0002 00000001 0006 7231 78",
     header_of(PacketType::one_way, 5, 0, flags::high_priority | flags::route_tag), "7231", "78"},
    {"V9", "010002ff ffffffff 0000 00000000 0000", header_of(PacketType::response, 0xffffffff, 255), "", ""},
    {"V10", "01000000 00000000 0000 00000000 0000", header_of(PacketType::one_way, 0, 0), "", ""},
    {"V11", "01010007 00000009 0000 00000018 0000 28b52ffd045859000068656c6c6f20776f726c6468691eb2",
     header_of(PacketType::one_way, 9, 7, 0, Compression::zstd), "",
     "28b52ffd045859000068656c6c6f20776f726c6468691eb2"},
    {"V12", "01020007 0000000a 0000 00000013 0000 789ccb48cdc9c95728cf2fca4901001a0b045d",
     header_of(PacketType::one_way, 10, 7, 0, Compression::zlib), "", "789ccb48cdc9c95728cf2fca4901001a0b045d"},
};

TEST(WireHeader, EveryVectorEncodesToItsBytes) {
  for (const Vector& v : vectors) {
    SCOPED_TRACE(v.name);
    Bytes out;
    append_packet(out, v.header, from_hex(v.extension_hex), from_hex(v.payload_hex));
    EXPECT_EQ(to_hex(out), to_hex(from_hex(v.hex)));
  }
}

TEST(WireHeader, EveryVectorDecodesToItsFields) {
  for (const Vector& v : vectors) {
    SCOPED_TRACE(v.name);
    BufferPool pool;
    Decoder decoder(Limits{}, pool);
    const Bytes bytes = from_hex(v.hex);
    decoder.feed(bytes);
    PacketView packet;
    ASSERT_EQ(decoder.next(packet), Decoder::Status::packet) << decoder.error().message();
    Header expected = v.header;
    expected.ext_len = static_cast<std::uint16_t>(from_hex(v.extension_hex).size());
    expected.payload_len = static_cast<std::uint32_t>(from_hex(v.payload_hex).size());
    EXPECT_EQ(packet.header, expected);
    EXPECT_EQ(to_hex(packet.extension), v.extension_hex);
    EXPECT_EQ(to_hex(packet.payload), v.payload_hex);
    EXPECT_EQ(to_hex(packet.bytes), to_hex(bytes));
    EXPECT_EQ(decoder.next(packet), Decoder::Status::need_more);
    EXPECT_FALSE(decoder.has_partial());
  }
}

// X1 to X7 of docs/wire_format.md
TEST(WireHeader, EveryVectorThatMustBeRefusedIs) {
  const std::pair<const char*, Errc> refused[] = {
      {"00000000 00000001 0000 00000000 0000", Errc::bad_version},
      {"02000000 00000001 0000 00000000 0000", Errc::bad_version},
      {"01030000 00000001 0000 00000000 0000", Errc::bad_compression},
      {"01000300 00000001 0000 00000000 0000", Errc::bad_type},
      {"01000000 00000001 0000 01000001 0000", Errc::payload_too_large},
      {"01000000 00000001 0000 00000000 0001", Errc::fragmented},
      {"01010000 00000001 0000 00000000 0000", Errc::decompression_failed},
  };
  for (const auto& [hex, code] : refused) {
    SCOPED_TRACE(hex);
    BufferPool pool;
    Decoder decoder(Limits{}, pool);
    const Bytes bytes = from_hex(hex);
    decoder.feed(bytes);
    PacketView packet;
    if (code != Errc::decompression_failed) {
      ASSERT_EQ(decoder.next(packet), Decoder::Status::error);
      EXPECT_EQ(decoder.error().code, make_error_code(code));
      continue;
    }
    ASSERT_EQ(decoder.next(packet), Decoder::Status::packet);
    Bytes out;
    const std::optional<Error> error = decompress(packet.header.compression, packet.payload, 16U << 20, out);
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code, make_error_code(code));
  }
}

// V13
TEST(WireHeader, FlagBitsNoOneKnowsAreTaken) {
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  const Bytes bytes = from_hex("01000000 00000001 0000 00000000 fff8");
  decoder.feed(bytes);
  PacketView packet;
  ASSERT_EQ(decoder.next(packet), Decoder::Status::packet) << decoder.error().message();
  EXPECT_EQ(packet.header.message_id, 1U);
}

std::array<std::byte, header_size> encoded(const Header& header) {
  std::array<std::byte, header_size> out;
  encode_header(header, out);
  return out;
}

Header decoded(const std::array<std::byte, header_size>& bytes, const Limits& limits = {}) {
  Header header;
  const std::optional<Error> error = decode_header(bytes, limits, header);
  EXPECT_FALSE(error) << error->message();
  return header;
}

Limits no_limits() {
  return {0xffffffff, 65535, 0xffffffff};
}

// P2, F1-F8: each field at its place, big-endian.
TEST(WireHeader, EachFieldIsAtItsOffsetBigEndian) {
  Header h;
  h.compression = Compression::zlib;
  h.type = PacketType::request;
  h.biz_type = 0xa1;
  h.message_id = 0x01020304;
  h.ext_len = 0x0506;
  h.payload_len = 0x0708090a;
  h.flags = flags::high_priority;
  EXPECT_EQ(to_hex(encoded(h)), "010201a10102030405060708090a0002");
  EXPECT_EQ(decoded(encoded(h), no_limits()), h);
}

TEST(WireHeader, TheExtremesOfEachFieldGoThereAndBack) {
  for (const std::uint8_t biz : {std::uint8_t{0}, std::uint8_t{1}, std::uint8_t{127}, std::uint8_t{255}}) {
    for (const std::uint32_t id : {0U, 1U, 0x7fffffffU, 0x80000000U, 0xffffffffU}) {
      for (const std::uint16_t ext : {std::uint16_t{0}, std::uint16_t{1}, std::uint16_t{256}, std::uint16_t{65535}}) {
        for (const std::uint32_t payload : {0U, 1U, 0x00ffffffU, 0x80000000U, 0xffffffffU}) {
          Header h = header_of(PacketType::response, id, biz, flags::route_tag, Compression::zstd);
          h.ext_len = ext;
          h.payload_len = payload;
          EXPECT_EQ(decoded(encoded(h), no_limits()), h);
          EXPECT_EQ(h.packet_size(), 16ULL + ext + payload);
        }
      }
    }
  }
}

/// The error of a good header in which one byte was replaced.
Error error_with(std::size_t offset, unsigned value, const Limits& limits = {}) {
  std::array<std::byte, header_size> bytes = encoded(header_of(PacketType::request, 7, 3));
  bytes[offset] = static_cast<std::byte>(value);
  Header untouched = header_of(PacketType::response, 99, 98);
  const Header before = untouched;
  const std::optional<Error> error = decode_header(bytes, limits, untouched);
  if (!error) return {};
  EXPECT_EQ(untouched, before);
  EXPECT_TRUE(is_protocol_error(error->code));
  return *error;
}

// F1
TEST(WireHeader, AnyVersionBut1IsRefusedNamingIt) {
  for (unsigned version = 0; version < 256; ++version) {
    const Error error = error_with(0, version);
    if (version == 1) {
      EXPECT_FALSE(error);
    } else {
      EXPECT_EQ(error.code, make_error_code(Errc::bad_version));
      const std::string guess = version == 22                      ? "; perhaps the peer speaks TLS"
                                : version >= 'A' && version <= 'Z' ? "; perhaps the peer speaks HTTP"
                                                                   : "";
      EXPECT_EQ(error.text, "version is " + std::to_string(version) + ", must be 1" + guess);
    }
  }
}

// F2
TEST(WireHeader, AnUnknownCompressionIsRefusedNamingIt) {
  for (unsigned value = 0; value < 256; ++value) {
    const Error error = error_with(1, value);
    if (value <= 2) {
      EXPECT_FALSE(error);
    } else {
      EXPECT_EQ(error.code, make_error_code(Errc::bad_compression));
      EXPECT_EQ(error.text, "compression is " + std::to_string(value) + ", must be 0 (none), 1 (zstd) or 2 (zlib)");
    }
  }
}

// F3
TEST(WireHeader, AnUnknownTypeIsRefusedNamingIt) {
  for (unsigned value = 0; value < 256; ++value) {
    const Error error = error_with(2, value);
    if (value <= 2) {
      EXPECT_FALSE(error);
    } else {
      EXPECT_EQ(error.code, make_error_code(Errc::bad_type));
      EXPECT_EQ(error.text, "type is " + std::to_string(value) + ", must be 0 (one-way), 1 (request) or 2 (response)");
    }
  }
}

// F4, F5
TEST(WireHeader, EveryBizTypeAndMessageIdPasses) {
  for (unsigned value = 0; value < 256; ++value) {
    for (const std::size_t offset : {3U, 4U, 5U, 6U, 7U}) EXPECT_FALSE(error_with(offset, value));
  }
}

// F8
TEST(WireHeader, TheFragmentedFlagIsRefusedAndTheUnknownBitsPass) {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    std::array<std::byte, header_size> bytes = encoded(header_of(PacketType::one_way, 1, 0));
    bytes[14] = static_cast<std::byte>(bits >> 8);
    bytes[15] = static_cast<std::byte>(bits & 0xff);
    Header header;
    const std::optional<Error> error = decode_header(bytes, Limits{}, header);
    ASSERT_EQ(error.has_value(), (bits & 1) != 0) << bits;
    if (error) {
      ASSERT_EQ(error->code, make_error_code(Errc::fragmented));
      ASSERT_EQ(error->text, "flags is " + std::to_string(bits) + ", bit 0 (fragmented) is reserved and must be 0");
    } else {
      ASSERT_EQ(header.flags, bits);
    }
  }
}

// F8
TEST(WireHeader, TheEncoderSendsReservedFlagBitsAsZero) {
  Header header;
  header.flags = 0xffff;
  EXPECT_EQ(decoded(encoded(header)).flags, flags::high_priority | flags::route_tag);
}

// L1, L2, L4
TEST(WireHeader, AnExtensionOverTheLimitIsRefusedNamingBothAndTheLimitItselfPasses) {
  const Limits limits{1000, 300, 1000};
  Header h;
  h.ext_len = 300;
  EXPECT_EQ(decoded(encoded(h), limits), h);
  h.ext_len = 301;
  Header out;
  const std::optional<Error> error = decode_header(encoded(h), limits, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code, make_error_code(Errc::extension_too_large));
  EXPECT_EQ(error->text, "ext_len is 301, over the limit of 300 bytes");
}

TEST(WireHeader, APayloadOverTheLimitIsRefusedNamingBothAndTheLimitItselfPasses) {
  Header h;
  h.payload_len = 16777216;
  EXPECT_EQ(decoded(encoded(h)), h);
  h.payload_len = 16777217;
  Header out;
  const std::optional<Error> error = decode_header(encoded(h), Limits{}, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code, make_error_code(Errc::payload_too_large));
  EXPECT_EQ(error->text, "payload_len is 16777217, over the limit of 16777216 bytes");
}

TEST(WireHeader, TheDefaultLimitsAre16MiBAndTheWholeExtensionField) {
  EXPECT_EQ(Limits{}.max_payload, 16777216U);
  EXPECT_EQ(Limits{}.max_decompressed, 16777216U);
  EXPECT_EQ(Limits{}.max_extension, 65535U);
}

// E1
TEST(WireHeader, OfSeveralFaultsTheFirstFieldIsReported) {
  std::array<std::byte, header_size> bytes;
  bytes.fill(std::byte{0xff});
  const Limits limits{10, 10, 10};
  const Errc order[] = {Errc::bad_version,         Errc::bad_compression,   Errc::bad_type,
                        Errc::extension_too_large, Errc::payload_too_large, Errc::fragmented};
  const auto repair = [&bytes](std::size_t from, std::size_t to, unsigned last) {
    for (std::size_t i = from; i < to; ++i) bytes[i] = std::byte{0};
    bytes[to - 1] = static_cast<std::byte>(last);
  };
  const std::size_t fields[][2] = {{0, 1}, {1, 2}, {2, 3}, {8, 10}, {10, 14}, {14, 16}};
  const unsigned good[] = {1, 2, 2, 10, 10, 6};
  Header out;
  for (std::size_t i = 0; i < std::size(order); ++i) {
    const std::optional<Error> error = decode_header(bytes, limits, out);
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code, make_error_code(order[i])) << error->text;
    repair(fields[i][0], fields[i][1], good[i]);
  }
  EXPECT_FALSE(decode_header(bytes, limits, out));
}

TEST(WireEncoder, LengthsComeFromTheSpansNotFromTheHeader) {
  Header header = header_of(PacketType::one_way, 1, 2);
  header.ext_len = 77;
  header.payload_len = 88;
  Bytes out = bytes_of("before");
  append_packet(out, header, bytes_of("e"), bytes_of("pp"));
  EXPECT_EQ(to_hex(out), to_hex(bytes_of("before")) + "01000002000000010001000000020000" + "65" + "7070");
}

TEST(WireEncoder, TheLongestExtensionIsTakenAndALongerOneThrowsAndLeavesTheOutput) {
  Bytes out = bytes_of("x");
  const Bytes longest(65535, std::byte{1});
  append_packet(out, Header{}, longest, {});
  EXPECT_EQ(out.size(), 1 + 16 + 65535U);
  EXPECT_EQ(to_hex(std::span(out).subspan(9, 2)), "ffff");
  const Bytes before = out;
  const Bytes too_long(65536, std::byte{1});
  EXPECT_THROW(append_packet(out, Header{}, too_long, {}), std::length_error);
  EXPECT_EQ(out, before);
}

TEST(WireEncoder, AppendingManyPacketsDoesNotReallocateForEach) {
  Bytes out;
  std::set<const std::byte*> places;
  for (int i = 0; i < 10000; ++i) {
    append_packet(out, Header{}, {}, bytes_of("0123456789"));
    places.insert(out.data());
  }
  EXPECT_EQ(out.size(), 260000U);
  EXPECT_LE(places.size(), 20U);
}

// M5, Q2
TEST(WireEncoder, AResponseCarriesItsRequestsIdAndBizTypeAndNothingElse) {
  Header request = header_of(PacketType::request, 0xfedcba98, 200, flags::high_priority, Compression::zstd);
  request.ext_len = 5;
  request.payload_len = 6;
  const Header response = response_to(request);
  EXPECT_EQ(response, header_of(PacketType::response, 0xfedcba98, 200));
}

// M1, M2, M3
TEST(WireMessageId, CountsFrom1) {
  MessageIdCounter ids;
  EXPECT_EQ(ids.next(), 1U);
  EXPECT_EQ(ids.next(), 2U);
  EXPECT_EQ(ids.next(), 3U);
}

TEST(WireMessageId, WrapsFromTheLargestTo1AndNeverGives0) {
  MessageIdCounter ids(0xfffffffe);
  EXPECT_EQ(ids.next(), 0xfffffffeU);
  EXPECT_EQ(ids.next(), 0xffffffffU);
  EXPECT_EQ(ids.next(), 1U);
  EXPECT_EQ(ids.next(), 2U);
  EXPECT_EQ(MessageIdCounter(0).next(), 1U);
}

}  // namespace
}  // namespace msgtrans::wire
