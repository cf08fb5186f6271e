// SPDX-License-Identifier: Apache-2.0
// Sections are those of RFC 6455, and of RFC 7692 where messages are compressed. Bytes are written out, so that nothing
// here is made by what it tests.
#include "wire_test_util.hpp"

#include <algorithm>
#include <array>
#include <gtest/gtest.h>
#include <msgtrans/wire/encoder.hpp>
#include <msgtrans/wire/websocket.hpp>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>
#include <zlib.h>

namespace msgtrans::wire {
namespace {

using namespace test;
using Event = FrameReader::Event;

/// A packet of 16 + `payload` bytes, as text of hexadecimal digits.
std::string packet(std::size_t payload) {
  Bytes bytes = from_hex("01000005 0000002a 0000 00000000 0000");
  for (int i = 0; i < 4; ++i) bytes[10 + static_cast<std::size_t>(i)] = static_cast<std::byte>(payload >> (24 - 8 * i));
  for (std::size_t i = 0; i < payload; ++i) bytes.push_back(static_cast<std::byte>(i * 7 + 1));
  return to_hex(bytes);
}

constexpr std::string_view key = "37fa213d";

/// Masked with `key`, byte by byte as 5.3 says it.
std::string masked(std::string_view hex, std::size_t from = 0) {
  const Bytes mask = from_hex(key);
  Bytes bytes = from_hex(hex);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] ^= mask[(i + from) % 4];
  return to_hex(bytes);
}

/// Packet bytes as digits, and in between, in brackets, what else was reported.
class Reading {
 public:
  Reading(WebSocketRole role, const Limits& limits) : reader_(role, limits) {}
  /// Where messages may be compressed, with so much room at a time.
  Reading(WebSocketRole role, const Limits& limits, std::size_t room) : reader_(role, limits), room_(room) {
    reader_.take_compressed();
  }

  void feed(std::span<const std::byte> bytes) {
    if (room_ == 0) {
      feed_in_place(bytes);
    } else {
      feed_apart(bytes);
    }
  }

  [[nodiscard]] const std::string& log() const { return log_; }
  [[nodiscard]] const FrameReader& reader() const { return reader_; }

 private:
  void feed_in_place(std::span<const std::byte> bytes) {
    // Exactly as large as the input, and in place: nothing may be read or written beyond.
    Bytes buffer(bytes.begin(), bytes.end());
    std::span<const std::byte> in = buffer;
    std::byte* out = buffer.data();
    for (;;) {
      const std::byte* const from = out;
      const Event event = reader_.read(in, out);
      EXPECT_LE(out - buffer.data(), in.data() - buffer.data()) << "more was yielded than taken";
      log_ += to_hex(std::span(from, out));
      EXPECT_NE(event, Event::full);
      if (event == Event::need_more) {
        EXPECT_TRUE(in.empty());
        return;
      }
      if (!note(event)) return;
    }
  }

  void feed_apart(std::span<const std::byte> bytes) {
    const Bytes lent(bytes.begin(), bytes.end());
    std::span<const std::byte> in = lent;
    for (;;) {
      Bytes buffer(room_);
      std::span<std::byte> out = buffer;
      const Event event = reader_.read(in, out);
      log_ += to_hex(std::span(buffer).first(buffer.size() - out.size()));
      EXPECT_TRUE(event != Event::full || out.empty());
      EXPECT_TRUE(event == Event::full || !reader_.has_output());
      if (event == Event::need_more) {
        EXPECT_TRUE(in.empty());
        return;
      }
      if (event != Event::full && !note(event)) return;
    }
  }

  /// \returns false if nothing follows.
  bool note(Event event) {
    switch (event) {
      case Event::ping: log_ += "[ping " + to_hex(reader_.control_payload()) + "]"; break;
      case Event::pong: log_ += "[pong " + to_hex(reader_.control_payload()) + "]"; break;
      case Event::close:
        log_ += "[close " + std::to_string(reader_.peer_code()) + " " + std::string(reader_.peer_text()) + "]";
        break;
      case Event::violation:
        log_ += "[violation " + std::to_string(reader_.violation_code()) + " " + reader_.error().text + "]";
        EXPECT_TRUE(is_protocol_error(reader_.error().code));
        return false;
      default: break;
    }
    return true;
  }

  FrameReader reader_;
  std::size_t room_ = 0;  // 0: where the input is
  std::string log_;
};

constexpr Limits small_limits{.max_payload = 1000, .max_extension = 100, .max_decompressed = 1000};

std::string read_whole(WebSocketRole role, std::string_view hex, const Limits& limits = small_limits) {
  Reading reading(role, limits);
  reading.feed(from_hex(hex));
  return reading.log();
}

struct Case {
  const char* name;
  WebSocketRole role;  // of the end that reads
  std::string bytes;
  std::string expected;
};

std::string violation(int code, std::string_view text) {
  return "[violation " + std::to_string(code) + " " + std::string(text) + "]";
}

std::string frame_fault(std::string_view text) {
  return violation(1002, "WebSocket frame: " + std::string(text));
}

std::vector<Case> cases() {
  constexpr auto server = WebSocketRole::server;
  constexpr auto client = WebSocketRole::client;
  const std::string k(key);
  const std::string p0 = packet(0);      // 16 bytes
  const std::string p109 = packet(109);  // 125
  const std::string p110 = packet(110);  // 126
  const std::string p300 = packet(300);  // 316
  const auto part = [](const std::string& hex, std::size_t from, std::size_t size) {
    return hex.substr(2 * from, 2 * size);
  };
  const std::string text_123(123, 'x');
  return {
      // 5.2, lengths
      {"OnePacket", client, "8210" + p0, p0},
      {"OnePacketMasked", server, "8290" + k + masked(p0), p0},
      {"MaskOfZeros", server, "829000000000" + p0, p0},
      {"TwoPackets", client, "8210" + p0 + "827d" + p109, p0 + p109},
      {"TwoPacketsMasked", server, "8290" + k + masked(p0) + "82fd" + k + masked(p109), p0 + p109},
      {"Length125", client, "827d" + p109, p109},
      {"Length126", client, "827e007e" + p110, p110},
      {"Length16Bit", client, "827e013c" + p300, p300},
      {"Length16BitMasked", server, "82fe013c" + k + masked(p300), p300},
      {"Length125In16Bits", client, "827e007d" + p109, frame_fault("length 125 is not in its shortest form")},
      {"Length16In16BitsMasked", server, "82fe0010" + k, frame_fault("length 16 is not in its shortest form")},
      {"Length16BitIn64Bits", client, "827f000000000000ffff", frame_fault("length 65535 is not in its shortest form")},
      {"Length16In64Bits", client, "827f0000000000000010", frame_fault("length 16 is not in its shortest form")},
      {"Length64BitWithHighestBit", client, "827f8000000000000010", frame_fault("length has its highest bit set")},
      {"LengthZero", client, "8200", violation(1002, "WebSocket message is 0 bytes long, a packet has at least 16")},
      // limits, before anything of it has come: 16 + 100 + 1000 bytes
      {"TooLong16Bit", client, "827e045d",
       violation(1009, "WebSocket message has 0 + 1117 bytes, over the limit of 1116 bytes")},
      {"TooLong64Bit", client, "827f7fffffffffffffff",
       violation(1009, "WebSocket message has 0 + 9223372036854775807 bytes, over the limit of 1116 bytes")},
      {"TooLongInFragments", client, "027e013c" + packet(1000).substr(0, 632) + "007e0321",
       packet(1000).substr(0, 632) +
           violation(1009, "WebSocket message has 316 + 801 bytes, over the limit of 1116 bytes")},
      // 5.2, reserved bits and opcodes
      {"Reserved1", client, "c210" + p0, frame_fault("reserved bits are 4, must be 0")},
      {"Reserved2", client, "a210" + p0, frame_fault("reserved bits are 2, must be 0")},
      {"Reserved3", client, "9210" + p0, frame_fault("reserved bits are 1, must be 0")},
      {"ReservedInPing", client, "c900", frame_fault("reserved bits are 4, must be 0")},
      {"ReservedInContinuation", client, "0208" + part(p0, 0, 8) + "c008" + part(p0, 8, 8),
       part(p0, 0, 8) + frame_fault("reserved bits are 4, must be 0")},
      {"Opcode3", client, "8300", frame_fault("opcode is 3, must be 0, 1, 2, 8, 9 or 10")},
      {"Opcode7", client, "8700", frame_fault("opcode is 7, must be 0, 1, 2, 8, 9 or 10")},
      {"Opcode11", client, "8b00", frame_fault("opcode is 11, must be 0, 1, 2, 8, 9 or 10")},
      {"Opcode15", client, "8f00", frame_fault("opcode is 15, must be 0, 1, 2, 8, 9 or 10")},
      // 5.1 and 5.3, masking
      {"NotMasked", server, "8210" + p0, frame_fault("not masked, must be from a client")},
      {"PingNotMasked", server, "8900", frame_fault("not masked, must be from a client")},
      {"Masked", client, "8290" + k + masked(p0), frame_fault("masked, must not be from a server")},
      {"CloseMasked", client, "8880" + k, frame_fault("masked, must not be from a server")},
      // 5.7's own examples
      {"TextHello", client, "810548656c6c6f", violation(1003, "WebSocket message is text, must be binary")},
      {"TextHelloMasked", server, "818537fa213d7f9f4d5158",
       violation(1003, "WebSocket message is text, must be binary")},
      {"TextHelInFragments", client, "010348656c80026c6f",
       violation(1003, "WebSocket message is text, must be binary")},
      {"PingHello", client, "890548656c6c6f", "[ping 48656c6c6f]"},
      {"PongHelloMasked", server, "8a8537fa213d7f9f4d5158", "[pong 48656c6c6f]"},
      // 5.4, fragments
      {"TwoFragments", client, "0208" + part(p0, 0, 8) + "8008" + part(p0, 8, 8), p0},
      {"TwoFragmentsMasked", server, "0287" + k + masked(part(p0, 0, 7)) + "8089" + k + masked(part(p0, 7, 9)), p0},
      {"ThreeFragments", client, "0201" + part(p109, 0, 1) + "0014" + part(p109, 1, 20) + "8068" + part(p109, 21, 104),
       p109},
      {"EmptyFragments", client,
       "0200"
       "0000"
       "0010" +
           p0 +
           "0000"
           "8000",
       p0},
      {"EmptyFragmentsMasked", server, "0280" + k + "0080" + k + "0090" + k + masked(p0) + "8080" + k, p0},
      {"FragmentsThenWhole", client, "0208" + part(p0, 0, 8) + "8008" + part(p0, 8, 8) + "827d" + p109, p0 + p109},
      {"ControlsBetweenFragments", server,
       "0288" + k + masked(part(p0, 0, 8)) + "8983" + k + masked("616263") + "8a80" + k + "0084" + k +
           masked(part(p0, 8, 4)) + "8980" + k + "8084" + k + masked(part(p0, 12, 4)),
       part(p0, 0, 8) + "[ping 616263][pong ]" + part(p0, 8, 4) + "[ping ]" + part(p0, 12, 4)},
      {"CloseBetweenFragments", client,
       "0208" + part(p0, 0, 8) +
           "880203e8"
           "8008" +
           part(p0, 8, 8),
       part(p0, 0, 8) + "[close 1000 ]"},
      {"ContinuationOfNothing", client, "8010" + p0, frame_fault("continuation of no message")},
      {"ContinuationAfterWhole", client, "8210" + p0 + "8000", p0 + frame_fault("continuation of no message")},
      {"BinaryInsideFragments", client, "0208" + part(p0, 0, 8) + "8208",
       part(p0, 0, 8) + frame_fault("new message inside a fragmented one")},
      {"TextInsideFragments", client, "0208" + part(p0, 0, 8) + "8108",
       part(p0, 0, 8) + frame_fault("new message inside a fragmented one")},
      // 5.5, control frames
      {"PingEmpty", client, "8900", "[ping ]"},
      {"PongEmpty", client, "8a00", "[pong ]"},
      {"Ping125", client, "897d" + p109, "[ping " + p109 + "]"},
      {"Ping125Masked", server, "89fd" + k + masked(p109), "[ping " + p109 + "]"},
      {"Ping126", client, "897e007e" + p110, frame_fault("control frame's length is 126, must be at most 125")},
      {"Ping127", client, "897f", frame_fault("control frame's length is 127, must be at most 125")},
      {"PingFragmented", client, "0900", frame_fault("control frame is fragmented")},
      {"PongFragmented", client, "0a00", frame_fault("control frame is fragmented")},
      {"CloseFragmented", client, "080203e8", frame_fault("control frame is fragmented")},
      {"PingsBetweenPackets", client,
       "89013a"
       "8210" +
           p0 +
           "89013b"
           "8210" +
           p0,
       "[ping 3a]" + p0 + "[ping 3b]" + p0},
      // 5.5.1 and 7.4, close
      {"CloseEmpty", client, "8800", "[close 1005 ]"},
      {"CloseOneByte", client, "880103", frame_fault("Close frame's length is 1, must be 0 or at least 2")},
      {"CloseWithCode", client, "880203e9", "[close 1001 ]"},
      {"CloseWithText", client, "880603e862796521", "[close 1000 bye!]"},
      {"CloseWithTextMasked", server, "8886" + k + masked("03e862796521"), "[close 1000 bye!]"},
      {"CloseWithLongestText", client, "887d03e8" + to_hex(bytes_of(text_123)), "[close 1000 " + text_123 + "]"},
      {"NothingBehindCloseIsRead", client,
       "880203e8"
       "ffff" +
           p0,
       "[close 1000 ]"},
      {"CloseCode0", client, "88020000", frame_fault("Close frame's code is 0, which may not be sent")},
      {"CloseCode999", client, "880203e7", frame_fault("Close frame's code is 999, which may not be sent")},
      {"CloseCode1004", client, "880203ec", frame_fault("Close frame's code is 1004, which may not be sent")},
      {"CloseCode1005", client, "880203ed", frame_fault("Close frame's code is 1005, which may not be sent")},
      {"CloseCode1006", client, "880203ee", frame_fault("Close frame's code is 1006, which may not be sent")},
      {"CloseCode1007", client, "880203ef", "[close 1007 ]"},
      {"CloseCode1014", client, "880203f6", "[close 1014 ]"},
      {"CloseCode1015", client, "880203f7", frame_fault("Close frame's code is 1015, which may not be sent")},
      {"CloseCode2999", client, "88020bb7", frame_fault("Close frame's code is 2999, which may not be sent")},
      {"CloseCode3000", client, "88020bb8", "[close 3000 ]"},
      {"CloseCode4999", client, "88021387", "[close 4999 ]"},
      {"CloseCode5000", client, "88021388", frame_fault("Close frame's code is 5000, which may not be sent")},
      // 8.1, UTF-8
      {"CloseUtf8", client, "880c03e8ceba e282ac f09f9880 7a", "[close 1000 \u03ba\u20ac\U0001f600z]"},
      {"CloseUtf8Truncated", client,
       "880503e8e282"
       "61",
       violation(1007, "WebSocket frame: Close frame's text is not UTF-8")},
      {"CloseUtf8Cut", client, "880403e8e282", violation(1007, "WebSocket frame: Close frame's text is not UTF-8")},
      {"CloseUtf8Overlong", client, "880403e8c0af",
       violation(1007, "WebSocket frame: Close frame's text is not UTF-8")},
      {"CloseUtf8Overlong3", client, "880503e8e09f80",
       violation(1007, "WebSocket frame: Close frame's text is not UTF-8")},
      {"CloseUtf8Overlong4", client, "880603e8f08f8080",
       violation(1007, "WebSocket frame: Close frame's text is not UTF-8")},
      {"CloseUtf8Surrogate", client, "880503e8eda080",
       violation(1007, "WebSocket frame: Close frame's text is not UTF-8")},
      {"CloseUtf8TooLarge", client, "880603e8f4908080",
       violation(1007, "WebSocket frame: Close frame's text is not UTF-8")},
      {"CloseUtf8Continuation", client, "880303e880",
       violation(1007, "WebSocket frame: Close frame's text is not UTF-8")},
      {"CloseUtf8Fe", client, "880303e8fe", violation(1007, "WebSocket frame: Close frame's text is not UTF-8")},
      // T2 of docs/wire_format.md: a message is a packet
      {"ShorterThanAHeader", client, "820f" + part(p0, 0, 15),
       violation(1002, "WebSocket message is 15 bytes long, a packet has at least 16")},
      {"FragmentsShorterThanAHeader", client, "0208" + part(p0, 0, 8) + "8007" + part(p0, 8, 7),
       part(p0, 0, 8) + violation(1002, "WebSocket message is 15 bytes long, a packet has at least 16")},
      {"TwoPacketsInAMessage", client, "8220" + p0 + p0,
       violation(1002, "WebSocket message is 32 bytes long, its packet is 16")},
      {"HalfAPacketInAMessage", client, "8220" + part(p300, 0, 32),
       violation(1002, "WebSocket message is 32 bytes long, its packet is 316")},
      {"OneByteTooMany", server, "8291" + k + masked(p0 + "00"),
       violation(1002, "WebSocket message is 17 bytes long, its packet is 16")},
      {"FragmentTooMany", client,
       "0210" + p0 +
           "0001"
           "00",
       p0 + violation(1002, "WebSocket message is 17 or more bytes long, its packet is 16")},
      {"FragmentTooFew", client, "0220" + part(p109, 0, 32) + "805c",
       part(p109, 0, 32) + violation(1002, "WebSocket message is 124 bytes long, its packet is 125")},
      {"EndsBehindTheHeader", client, "0210" + part(p109, 0, 16) + "8000",
       part(p109, 0, 16) + violation(1002, "WebSocket message is 16 bytes long, its packet is 125")},
      // A header that is wrong itself is named before its length ...
      {"WrongHeaderAndLength", client,
       "8211"
       "02" +
           part(p0, 1, 15) + "00",
       violation(1002, "version is 2, must be 1")},
      {"PayloadOverTheLimit", client,
       "8210"
       "01000000 00000000 0000 ffffffff 0000",
       violation(1009, "payload_len is 4294967295, over the limit of 1000 bytes")},
      // ... and else is for the decoder.
      {"WrongHeader", client,
       "8210"
       "02" +
           part(p0, 1, 15),
       "02" + part(p0, 1, 15)},
  };
}

TEST(WireWebSocket, FramesAreReadAsTheRfcSays) {
  for (const Case& c : cases()) EXPECT_EQ(read_whole(c.role, c.bytes), c.expected) << c.name;
}

/// The digits up to a fault may be fewer where it is found later, or more where its bytes came before it.
std::string fault_of(const std::string& log) {
  const std::size_t at = log.find("[violation");
  return at == std::string::npos ? log : log.substr(at);
}

TEST(WireWebSocket, AnInputCutAnywhereIsReadAsTheWhole) {
  for (const Case& c : cases()) {
    const Bytes bytes = from_hex(c.bytes);
    for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
      Reading reading(c.role, small_limits);
      reading.feed(std::span(bytes).first(cut));
      if (reading.log().find("[violation") == std::string::npos) reading.feed(std::span(bytes).subspan(cut));
      ASSERT_EQ(fault_of(reading.log()), fault_of(c.expected)) << c.name << " cut at " << cut;
    }
    Reading reading(c.role, small_limits);
    for (const std::byte b : bytes) {
      if (reading.log().find("[violation") == std::string::npos) reading.feed({&b, 1});
    }
    ASSERT_EQ(fault_of(reading.log()), fault_of(c.expected)) << c.name << " byte by byte";
  }
}

TEST(WireWebSocket, AFaultIsFinal) {
  Reading reading(WebSocketRole::client, small_limits);
  reading.feed(from_hex("8300"));
  const std::string once = reading.log();
  reading.feed(from_hex("8210" + packet(0)));
  EXPECT_EQ(reading.log(), once + once);
  EXPECT_EQ(reading.reader().error().code, Errc::websocket_violation);
  EXPECT_FALSE(reading.reader().has_partial());
}

TEST(WireWebSocket, TheLimitItselfIsAllowed) {
  const std::string hex = "827e03f8" + packet(1000);
  EXPECT_EQ(read_whole(WebSocketRole::client, hex), packet(1000));
  const Limits less{.max_payload = 999, .max_extension = 0, .max_decompressed = 1000};
  EXPECT_EQ(read_whole(WebSocketRole::client, hex, less),
            violation(1009, "WebSocket message has 0 + 1016 bytes, over the limit of 1015 bytes"));
}

TEST(WireWebSocket, AMessageOf64KibibytesHasALengthOf64Bits) {
  const std::string hex = packet(65520);
  EXPECT_EQ(read_whole(WebSocketRole::client, "827f0000000000010000" + hex, Limits{}), hex);
  EXPECT_EQ(read_whole(WebSocketRole::server, "82ff0000000000010000" + std::string(key) + masked(hex), Limits{}), hex);
}

TEST(WireWebSocket, InTheMiddleOfAMessageItSaysSo) {
  const Bytes bytes = from_hex("8210" + packet(0));
  for (std::size_t cut = 0; cut <= bytes.size(); ++cut) {
    Reading reading(WebSocketRole::client, small_limits);
    reading.feed(std::span(bytes).first(cut));
    EXPECT_EQ(reading.reader().has_partial(), cut != 0 && cut != bytes.size()) << cut;
  }
  Reading reading(WebSocketRole::client, small_limits);
  reading.feed(from_hex("0208" + packet(0).substr(0, 16) + "8900"));
  EXPECT_TRUE(reading.reader().has_partial());
}

TEST(WireWebSocket, MaskingIsByByteWhateverTheLengthAndThePlace) {
  const Bytes source = random_bytes(300, 1);
  MaskKey mask = 0;
  std::memcpy(&mask, from_hex(key).data(), sizeof mask);
  for (std::size_t size = 0; size < 200; ++size) {
    for (const std::size_t before : {0U, 1U, 2U, 6U, 14U, 40U}) {  // how far the bytes move in place
      Bytes buffer(source.begin(), source.begin() + static_cast<std::ptrdiff_t>(before + size));
      const std::string expected = masked(to_hex(std::span(buffer).subspan(before)));
      detail::mask_copy(buffer.data(), buffer.data() + before, size, mask);
      ASSERT_EQ(to_hex(std::span(buffer).first(size)), expected) << size << " bytes moved by " << before;
    }
    // in two parts
    const std::size_t cut = size / 3;
    Bytes parts(size);
    detail::mask_copy(parts.data(), source.data(), cut, mask);
    detail::mask_copy(parts.data() + cut, source.data() + cut, size - cut, detail::advance_mask(mask, cut));
    ASSERT_EQ(to_hex(parts), masked(to_hex(std::span(source).first(size))));
  }
}

// --- compressed messages (RFC 7692)

/// As a block that is not compressed, and the octet of the next that is sent (7.2.3.3).
std::string stored(const std::string& hex) {
  const std::size_t size = hex.size() / 2;
  const Bytes lengths{static_cast<std::byte>(size), static_cast<std::byte>(size >> 8), static_cast<std::byte>(~size),
                      static_cast<std::byte>(~size >> 8)};
  return "00" + to_hex(lengths) + hex + "00";
}

/// A frame whose payload is that, not masked.
std::string framed_as(std::string_view first, const std::string& hex) {
  const std::size_t size = hex.size() / 2;
  if (size <= 125) return std::string(first) + to_hex(Bytes{static_cast<std::byte>(size)}) + hex;
  return std::string(first) + "7e" + to_hex(Bytes{static_cast<std::byte>(size >> 8), static_cast<std::byte>(size)}) +
         hex;
}

/// And masked.
std::string masked_as(std::string_view first, const std::string& hex) {
  EXPECT_LE(hex.size() / 2, 125U);
  return std::string(first) + to_hex(Bytes{static_cast<std::byte>(0x80 | hex.size() / 2)}) + std::string(key) +
         masked(hex);
}

std::string short_of(int size) {
  return violation(1002, "WebSocket message is " + std::to_string(size) + " bytes long, a packet has at least 16");
}

std::string not_inflating(std::string_view why) {
  return violation(1007, "WebSocket message does not inflate: " + std::string(why));
}

/// Behind its header a packet of the most that `small_limits` allow has as many zeros, and then `more`.
Bytes largest_packet(std::size_t more) {
  Bytes bytes = from_hex("01000005 0000002a 0064 000003e8 0000");
  bytes.resize(1116 + more);
  return bytes;
}

std::vector<Case> compressed_cases() {
  constexpr auto server = WebSocketRole::server;
  constexpr auto client = WebSocketRole::client;
  const std::string p0 = packet(0);
  const std::string p40 = packet(40);
  const std::string s40 = stored(p40);
  const std::string hello = "48656c6c6f";
  const Bytes zeros = from_hex("01000005 0000002a 0000 000003e8 0000" + std::string(2000, '0'));
  const std::string z1000 = deflated(zeros);
  const auto part = [](const std::string& hex, std::size_t from, std::size_t size = std::string::npos) {
    return hex.substr(2 * from, size == std::string::npos ? size : 2 * size);
  };
  return {
      // 7.2.3's own examples: what they inflate to is too short for a packet
      {"7231OneFrame", client, "c207f248cdc9c90700", hello + short_of(5)},
      {"7231OneFrameMasked", server, masked_as("c2", "f248cdc9c90700"), hello + short_of(5)},
      {"7231TwoFrames", client, "4203f248cd8004c9c90700", hello + short_of(5)},
      {"7231AsText", client, "c107f248cdc9c90700", violation(1003, "WebSocket message is text, must be binary")},
      {"7232WithTheContextOfNoMessage", client, "c205f200110000",
       "48" + not_inflating("invalid distance too far back")},
      {"7233NotCompressed", client, "c20b000500faff48656c6c6f00", hello + short_of(5)},
      {"7234Final", client, "c208f348cdc9c9070000", hello + short_of(5)},
      {"7235TwoBlocks", client, "c20df248050000 00ffffcac9c90700", hello + short_of(5)},
      {"7236Empty", client, "c20100", short_of(0)},
      // packets
      {"Packet", client, framed_as("c2", s40), p40},
      {"PacketMasked", server, masked_as("c2", s40), p40},
      {"PacketByZlib", client, framed_as("c2", deflated(from_hex(p40))), p40},
      {"Zeros", client, framed_as("c2", z1000), to_hex(zeros)},
      {"ZerosInFragments", server,
       masked_as("42", part(z1000, 0, 3)) + masked_as("00", part(z1000, 3, 9)) + masked_as("80", part(z1000, 12)),
       to_hex(zeros)},
      {"TwoPackets", client, framed_as("c2", s40) + framed_as("c2", stored(p0)), p40 + p0},
      {"BetweenThoseThatAreNot", client, framed_as("82", p0) + framed_as("c2", s40) + framed_as("82", p40),
       p0 + p40 + p40},
      {"FragmentedBehindACompressedOne", client,
       framed_as("c2", s40) + framed_as("02", part(p0, 0, 8)) + framed_as("80", part(p0, 8)), p40 + p0},
      {"FinalBlocks", client,
       framed_as("c2", "01" + part(stored(part(p0, 0, 8)), 1, 12) + "01" + part(stored(part(p0, 8)), 1)), p0},
      {"TheTailIsTheLastBlock", client, framed_as("c2", part(s40, 0, s40.size() / 2 - 1) + "01"), p40},
      {"ControlsBetweenFragments", server,
       masked_as("42", part(s40, 0, 20)) + masked_as("89", "616263") + masked_as("00", part(s40, 20, 10)) +
           masked_as("8a", "") + masked_as("80", part(s40, 30)) + masked_as("89", ""),
       part(p40, 0, 15) + "[ping 616263]" + part(p40, 15, 10) + "[pong ]" + part(p40, 25) + "[ping ]"},
      {"CloseBetweenFragments", client, framed_as("42", part(s40, 0, 20)) + "880203e8" + framed_as("80", part(s40, 20)),
       part(p40, 0, 15) + "[close 1000 ]"},
      {"EmptyFragments", client,
       "4200"
       "0000" +
           framed_as("00", s40) +
           "0000"
           "8000",
       p40},
      {"EmptyFragmentsOfNothing", client, "42008000", not_inflating("it ends within a block")},
      // 6: the bit is the first frame's of a message, and the other two are nobody's
      {"BitInContinuation", client, framed_as("42", part(s40, 0, 20)) + framed_as("c0", part(s40, 20)),
       part(p40, 0, 15) + frame_fault("reserved bits are 4, must be 0")},
      {"BitInContinuationOfAPlainOne", client, framed_as("02", part(p0, 0, 8)) + framed_as("c0", part(p0, 8)),
       part(p0, 0, 8) + frame_fault("reserved bits are 4, must be 0")},
      {"BitInPing", client, "c900", frame_fault("reserved bits are 4, must be 0")},
      {"BitInPong", client, "ca00", frame_fault("reserved bits are 4, must be 0")},
      {"BitInClose", client, "c800", frame_fault("reserved bits are 4, must be 0")},
      {"OtherBit", client, "a210" + p0, frame_fault("reserved bits are 2, must be 0")},
      {"OtherBitToo", client, framed_as("e2", s40), frame_fault("reserved bits are 6, must be 0")},
      {"AllBits", client, framed_as("f2", s40), frame_fault("reserved bits are 7, must be 0")},
      {"BitInsideAMessage", client, framed_as("42", part(s40, 0, 20)) + framed_as("c2", s40),
       part(p40, 0, 15) + frame_fault("new message inside a fragmented one")},
      // what is no DEFLATE
      {"BlockType3", client, "c20106", not_inflating("invalid block type")},
      {"StoredLengths", client, "c20700 1000 1000 0000", not_inflating("invalid stored block lengths")},
      {"CutInAStoredBlock", client, framed_as("c2", part(s40, 0, 40)),
       part(p40, 0, 35) + "0000ffff" + not_inflating("it ends within a block")},
      {"WithoutItsLastOctet", client, framed_as("c2", part(s40, 0, s40.size() / 2 - 1)),
       p40 + not_inflating("it ends within a block")},
      {"Nothing", client, "c200", not_inflating("it ends within a block")},
      {"CorruptBehindThePacket", client, framed_as("c2", part(s40, 0, s40.size() / 2 - 1) + "0600"),
       p40 + not_inflating("invalid block type")},
      // a message is a packet
      {"ShorterThanItsPacket", client, framed_as("c2", stored(part(p40, 0, 55))),
       part(p40, 0, 55) + violation(1002, "WebSocket message is 55 bytes long, its packet is 56")},
      {"LongerThanItsPacket", client, framed_as("c2", stored(p40 + "00")),
       p40 + violation(1002, "WebSocket message is more than 56 bytes long, its packet is 56")},
      {"TwoPacketsInAMessage", client, framed_as("c2", stored(p40 + p0)),
       p40 + violation(1002, "WebSocket message is more than 56 bytes long, its packet is 56")},
      {"WrongHeader", client, framed_as("c2", stored("02" + part(p40, 1))),
       part("02" + part(p40, 1), 0, 15) + violation(1002, "version is 2, must be 1")},
      // limits, of what it inflates to ...
      {"PayloadOverTheLimit", client, framed_as("c2", stored("01000000000000000000ffffffff0000")),
       "01000000000000000000ffffffff00" + violation(1009, "payload_len is 4294967295, over the limit of 1000 bytes")},
      {"TheLimit", client, framed_as("c2", deflated(largest_packet(0))), to_hex(largest_packet(0))},
      {"OverTheLimit", client, framed_as("c2", deflated(largest_packet(1))),
       to_hex(largest_packet(0)) + violation(1009, "WebSocket message inflates to more than the limit of 1116 bytes")},
      {"Bomb", client, framed_as("c2", deflated(largest_packet(1'000'000))),
       to_hex(largest_packet(0)) + violation(1009, "WebSocket message inflates to more than the limit of 1116 bytes")},
      // ... and of what comes: 1116 bytes, a sixteenth of that, and 64
      {"ManyBytes", client, "c27e04e2",
       violation(1009, "compressed WebSocket message has 0 + 1250 bytes, over the limit of 1249 bytes")},
      {"ManyBytesInFragments", client, framed_as("42", "000000ffff") + "007e04dd",
       violation(1009, "compressed WebSocket message has 5 + 1245 bytes, over the limit of 1249 bytes")},
  };
}

/// Bytes up to a fault are told only as far as they come before it.
void expect_same_reading(const Reading& reading, const Case& c, const std::string& how) {
  ASSERT_EQ(fault_of(reading.log()), fault_of(c.expected)) << c.name << " " << how;
  const std::size_t at = reading.log().find("[violation");
  const std::string bytes = reading.log().substr(0, at);
  ASSERT_TRUE(c.expected.starts_with(bytes)) << c.name << " " << how << ": " << bytes;
  if (at == std::string::npos) {
    ASSERT_EQ(reading.log(), c.expected) << c.name << " " << how;
  }
}

TEST(WireWebSocketDeflate, MessagesAreInflated) {
  for (const Case& c : compressed_cases()) {
    Reading reading(c.role, small_limits, 100'000);
    reading.feed(from_hex(c.bytes));
    expect_same_reading(reading, c, "whole");
  }
}

TEST(WireWebSocketDeflate, WithLittleRoomTheyAreInflatedAlike) {
  for (const Case& c : compressed_cases()) {
    for (const std::size_t room : {1U, 7U, 16U, 56U, 1116U}) {
      Reading reading(c.role, small_limits, room);
      reading.feed(from_hex(c.bytes));
      expect_same_reading(reading, c, "with room for " + std::to_string(room));
    }
  }
}

TEST(WireWebSocketDeflate, AnInputCutAnywhereIsInflatedAsTheWhole) {
  const auto feed = [](Reading& reading, std::span<const std::byte> bytes) {
    if (reading.log().find("[violation") == std::string::npos) reading.feed(bytes);
  };
  for (const Case& c : compressed_cases()) {
    const Bytes bytes = from_hex(c.bytes);
    for (std::size_t cut = 0; cut <= std::min<std::size_t>(bytes.size(), 200); ++cut) {
      Reading reading(c.role, small_limits, 50);
      feed(reading, std::span(bytes).first(cut));
      feed(reading, std::span(bytes).subspan(cut));
      ASSERT_NO_FATAL_FAILURE(expect_same_reading(reading, c, "cut at " + std::to_string(cut)));
    }
    Reading reading(c.role, small_limits, 3);
    for (const std::byte& b : bytes) feed(reading, {&b, 1});
    ASSERT_NO_FATAL_FAILURE(expect_same_reading(reading, c, "byte by byte"));
  }
}

TEST(WireWebSocketDeflate, WhatIsNotCompressedIsReadAsEver) {
  for (const Case& c : cases()) {
    if (std::string_view(c.name) == "Reserved1") continue;  // which is another thing here
    for (const std::size_t room : {1U, 100'000U}) {
      Reading reading(c.role, small_limits, room);
      reading.feed(from_hex(c.bytes));
      ASSERT_EQ(fault_of(reading.log()), fault_of(c.expected)) << c.name << " with room for " << room;
    }
  }
}

TEST(WireWebSocketDeflate, NoMoreIsInflatedThanThereIsRoomFor) {
  const Bytes bytes = from_hex(framed_as("c2", deflated(from_hex(packet(0).substr(0, 20) + "00100000" + "0000" +
                                                                 std::string(std::size_t{2} << 20, '0')))));
  FrameReader reader(WebSocketRole::client, Limits{});
  reader.take_compressed();
  std::span<const std::byte> in = bytes;
  Bytes room(1000);
  std::size_t total = 0;
  for (Event event = Event::full; event == Event::full;) {
    std::span<std::byte> out = room;
    event = reader.read(in, out);
    total += room.size() - out.size();
    EXPECT_EQ(event == Event::full, out.empty());
    EXPECT_EQ(reader.has_output(), event == Event::full);
    EXPECT_EQ(reader.has_partial(), event == Event::full);
  }
  EXPECT_EQ(total, 16U + (1U << 20));
  EXPECT_TRUE(in.empty());
}

TEST(WireWebSocketDeflate, ADeflaterEndsItsMessageAsTheRfcSays) {
  detail::Deflater deflater(0, 15);
  const Bytes hello = bytes_of("Hello");
  for (int i = 0; i < 2; ++i) {  // 7.2.3.1, and not 7.2.3.2
    Bytes out(12);
    deflater.begin(out);
    EXPECT_TRUE(deflater.add(std::span(hello).first(2)));
    EXPECT_TRUE(deflater.add(std::span(hello).subspan(2)));
    EXPECT_EQ(deflater.finish(), 7U);
    EXPECT_EQ(to_hex(std::span(out).first(7)), "f248cdc9c90700");
  }
  Bytes out(11);
  deflater.begin(out);
  deflater.add(hello);
  EXPECT_EQ(deflater.finish(), 0U) << "there is no room that is left over";
}

TEST(WireWebSocketDeflate, WhatWasDeflatedInflates) {
  for (const int bits : {9, 12, 15}) {
    detail::Deflater deflater(9, bits);
    for (std::uint32_t seed = 0; seed < 20; ++seed) {
      Bytes bytes = random_bytes(3000, seed);
      for (std::size_t i = 300; i < bytes.size(); ++i) bytes[i] = bytes[i - 290 - seed % 10];
      Bytes wire(bytes.size() + 4);
      deflater.begin(wire);
      ASSERT_TRUE(deflater.add(bytes));
      const std::size_t size = deflater.finish();
      ASSERT_GT(size, 0U);
      // A peer that was told of the window has no larger one.
      z_stream stream{};
      ASSERT_EQ(inflateInit2(&stream, -bits), Z_OK);
      std::ranges::copy(detail::deflate_tail, wire.begin() + static_cast<std::ptrdiff_t>(size));
      Bytes inflated(bytes.size() + 1);
      stream.next_in = reinterpret_cast<Bytef*>(wire.data());
      stream.avail_in = static_cast<uInt>(size + 4);
      stream.next_out = reinterpret_cast<Bytef*>(inflated.data());
      stream.avail_out = static_cast<uInt>(inflated.size());
      EXPECT_EQ(inflate(&stream, Z_SYNC_FLUSH), Z_OK);
      inflated.resize(stream.total_out);
      inflateEnd(&stream);
      ASSERT_TRUE(inflated == bytes);
    }
  }
}

// --- writing

std::string frame_header(Opcode opcode, std::uint64_t size, std::optional<MaskKey> mask = {}) {
  std::array<std::byte, max_frame_header> header;
  return to_hex(std::span(header).first(encode_frame_header(opcode, size, mask, header.data())));
}

MaskKey the_key() {
  MaskKey mask = 0;
  std::memcpy(&mask, from_hex(key).data(), sizeof mask);
  return mask;
}

TEST(WireWebSocket, HeadersHaveTheShortestLength) {
  EXPECT_EQ(frame_header(Opcode::binary, 0), "8200");
  EXPECT_EQ(frame_header(Opcode::binary, 125), "827d");
  EXPECT_EQ(frame_header(Opcode::binary, 126), "827e007e");
  EXPECT_EQ(frame_header(Opcode::binary, 256), "827e0100");  // 5.7
  EXPECT_EQ(frame_header(Opcode::binary, 65535), "827effff");
  EXPECT_EQ(frame_header(Opcode::binary, 65536), "827f0000000000010000");  // 5.7
  EXPECT_EQ(frame_header(Opcode::binary, 0x100000000), "827f0000000100000000");
  EXPECT_EQ(frame_header(Opcode::ping, 5), "8905");
  EXPECT_EQ(frame_header(Opcode::binary, 16, the_key()), "829037fa213d");
  EXPECT_EQ(frame_header(Opcode::binary, 65536, the_key()), "82ff000000000001000037fa213d");
}

TEST(WireWebSocket, ControlFramesAreThoseOfTheRfc) {
  ControlFrame frame;
  const auto control = [&](Opcode opcode, std::string_view text, std::optional<MaskKey> mask) {
    return to_hex(std::span(frame).first(encode_control_frame(opcode, bytes_of(text), mask, frame)));
  };
  EXPECT_EQ(control(Opcode::ping, "Hello", {}), "890548656c6c6f");
  EXPECT_EQ(control(Opcode::pong, "Hello", the_key()), "8a8537fa213d7f9f4d5158");
  EXPECT_EQ(control(Opcode::pong, "", {}), "8a00");
  EXPECT_EQ(control(Opcode::pong, std::string(125, 'a'), the_key()).size(), 2U * 131);
}

std::string close_frame(std::uint16_t code, std::string_view text, std::optional<MaskKey> mask = {}) {
  ControlFrame frame;
  return to_hex(std::span(frame).first(encode_close_frame(code, text, mask, frame)));
}

TEST(WireWebSocket, ACloseFrameHasCodeAndText) {
  EXPECT_EQ(close_frame(1000, "bye!"), "880603e862796521");
  EXPECT_EQ(close_frame(1001, ""), "880203e9");
  EXPECT_EQ(close_frame(close_code::no_status, "never seen"), "8800");
  EXPECT_EQ(close_frame(1000, "bye!", the_key()), "8886" + std::string(key) + masked("03e862796521"));
}

TEST(WireWebSocket, ACloseTextIsCutAtACharacter) {
  const std::string full(123, 'a');
  EXPECT_EQ(close_frame(1000, full + "b"), "887d03e8" + to_hex(bytes_of(full)));
  const std::string almost(121, 'a');
  EXPECT_EQ(close_frame(1000, almost + "\u20ac"), "887b03e8" + to_hex(bytes_of(almost)))
      << "three bytes do not fit two";
  EXPECT_EQ(close_frame(1000, almost + "\u03ba"), "887d03e8" + to_hex(bytes_of(almost + "\u03ba")));
}

TEST(WireWebSocket, WhatIsNoUtf8InACloseTextIsReplaced) {
  EXPECT_EQ(close_frame(1000, "a\xff\xe2\x82z"), "880703e8613f3f3f7a");
  EXPECT_EQ(read_whole(WebSocketRole::client, close_frame(1000, std::string(200, '\x80'))),
            "[close 1000 " + std::string(123, '?') + "]");
}

// --- framing packets

/// Gives `stream` in the pieces that `cut` says to a framer with little room, and returns what it wrote.
template <class Cut>
Bytes framed(WebSocketRole role, const Bytes& stream, std::size_t room, std::size_t direct, Cut&& cut) {
  PacketFramer framer(role);
  Bytes out;
  std::uint32_t keys = 0x9e3779b9;
  for (std::size_t at = 0; at < stream.size();) {
    const std::size_t size = std::min(cut(), stream.size() - at);
    const Bytes lent(stream.begin() + static_cast<std::ptrdiff_t>(at),
                     stream.begin() + static_cast<std::ptrdiff_t>(at + size));
    at += size;
    std::span<const std::byte> in = lent;
    while (!in.empty()) {
      Bytes buffer(room);
      std::span<std::byte> rest = buffer;
      framer.frame(in, rest, direct, [&] { return keys *= 3; });
      out.insert(out.end(), buffer.begin(), buffer.end() - static_cast<std::ptrdiff_t>(rest.size()));
      if (const std::size_t here = std::min(in.size(), framer.left());
          role == WebSocketRole::server && here >= direct) {
        out.insert(out.end(), in.begin(), in.begin() + static_cast<std::ptrdiff_t>(here));
        framer.skip(here);
        in = in.subspan(here);
      }
    }
  }
  EXPECT_TRUE(framer.at_boundary());
  return out;
}

TEST(WireWebSocket, EachPacketIsFramedAsOneMessage) {
  const Bytes stream = from_hex(packet(0) + packet(300));
  const auto whole = [&] { return stream.size(); };
  EXPECT_EQ(to_hex(framed(WebSocketRole::server, stream, 1000, 100000, whole)),
            "8210" + packet(0) + "827e013c" + packet(300));
}

TEST(WireWebSocket, ASmallFrameIsBegunOnlyWhereAllOfItHasRoom) {
  const Bytes stream = from_hex(packet(64) + packet(64) + packet(64));
  PacketFramer framer(WebSocketRole::server);
  Bytes buffer(2 * 82 + 81);
  std::span<std::byte> room = buffer;
  std::span<const std::byte> in = stream;
  framer.frame(in, room, 1000, [] { return MaskKey{0}; });
  EXPECT_TRUE(framer.at_boundary()) << "so that a control frame may follow";
  EXPECT_EQ(in.size(), 80U);
  EXPECT_EQ(room.size(), 81U);
}

TEST(WireWebSocket, PacketsCutAnywhereAreFramedAlike) {
  for (std::uint32_t seed = 0; seed < 50; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const Stream stream = random_stream(1 + random() % 30, 60, seed % 2 == 0 ? 100 : 3000, seed);
    for (const WebSocketRole role : {WebSocketRole::server, WebSocketRole::client}) {
      const std::size_t largest = std::size_t{1} << (random() % 12);
      const std::size_t direct = random() % 2 == 0 ? 64 : 4000;
      const Bytes whole = framed(role, stream.bytes, 1 << 20, 100000, [&] { return stream.bytes.size(); });
      const Bytes pieces = framed(role, stream.bytes, max_frame_header + direct + random() % 500, direct,
                                  [&] { return 1 + random() % largest; });
      ASSERT_TRUE(pieces == whole);
      const auto other = role == WebSocketRole::server ? WebSocketRole::client : WebSocketRole::server;
      ASSERT_TRUE(read_whole(other, to_hex(whole), Limits{}) == to_hex(stream.bytes));
      ASSERT_EQ((std::to_integer<unsigned>(whole[1]) & 0x80U) != 0, role == WebSocketRole::client);
    }
  }
}

}  // namespace
}  // namespace msgtrans::wire
