// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/wire/deflate.hpp>
#include <msgtrans/wire/header.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>

/// \file
/// WebSocket (RFC 6455) behind its handshake: what lies between the frames on the connection and the packets. The only
/// extension there is is permessage-deflate (RFC 7692) without context takeover; else the reserved bits must be 0.

namespace msgtrans::wire {

/// RFC 6455, 5.2. The value is the one on the wire.
enum class Opcode : std::uint8_t { continuation = 0, text = 1, binary = 2, close = 8, ping = 9, pong = 10 };

/// RFC 6455, 7.4.1.
namespace close_code {
inline constexpr std::uint16_t normal = 1000;
inline constexpr std::uint16_t going_away = 1001;
inline constexpr std::uint16_t protocol_error = 1002;
inline constexpr std::uint16_t unsupported_data = 1003;
inline constexpr std::uint16_t no_status = 1005;  ///< never on the wire: the Close frame had none
inline constexpr std::uint16_t invalid_payload = 1007;
inline constexpr std::uint16_t policy_violation = 1008;
inline constexpr std::uint16_t message_too_big = 1009;
inline constexpr std::uint16_t internal_error = 1011;
inline constexpr std::uint16_t try_again_later = 1013;

/// True if a Close frame may have it.
[[nodiscard]] constexpr bool valid(std::uint16_t code) noexcept {
  return (code >= 1000 && code <= 1003) || (code >= 1007 && code <= 1014) || (code >= 3000 && code <= 4999);
}
}  // namespace close_code

/// In the first byte of a message's first frame: the message is compressed.
inline constexpr std::byte compressed_bit{0x40};
/// Bytes of the longest frame header, with a mask key.
inline constexpr std::size_t max_frame_header = 14;
/// Bytes of the longest payload of a ping, pong or Close frame.
inline constexpr std::size_t max_control_payload = 125;
/// Bytes of the longest text of a Close frame.
inline constexpr std::size_t max_close_text = max_control_payload - 2;

/// The four bytes of a mask key, as they lie in memory.
using MaskKey = std::uint32_t;

/// Which end of the connection is this one: a client masks what it sends, a server does not.
enum class WebSocketRole : std::uint8_t { server, client };

namespace detail {

/// The key for what comes `count` bytes later.
[[nodiscard]] constexpr MaskKey advance_mask(MaskKey key, std::size_t count) noexcept {
  const int bits = static_cast<int>(count % 4) * 8;
  return std::endian::native == std::endian::little ? std::rotr(key, bits) : std::rotl(key, bits);
}

/// Copies and masks (or unmasks). `to` may be `from`, or lie anywhere before it.
inline void mask_copy(std::byte* to, const std::byte* from, std::size_t count, MaskKey key) noexcept {
  using Block = std::uint64_t __attribute__((vector_size(16)));
  const std::uint64_t word_key = std::uint64_t{key} << 32 | key;
  const Block block_key = {word_key, word_key};
  for (; count >= 2 * sizeof(Block); count -= 2 * sizeof(Block)) {
    Block first;
    Block second;
    std::memcpy(&first, from, sizeof first);
    std::memcpy(&second, from + sizeof first, sizeof second);
    first ^= block_key;
    second ^= block_key;
    std::memcpy(to, &first, sizeof first);
    std::memcpy(to + sizeof first, &second, sizeof second);
    to += 2 * sizeof(Block);
    from += 2 * sizeof(Block);
  }
  for (; count >= sizeof word_key; count -= sizeof word_key) {
    std::uint64_t word;
    std::memcpy(&word, from, sizeof word);
    word ^= word_key;
    std::memcpy(to, &word, sizeof word);
    to += sizeof word;
    from += sizeof word;
  }
  if (count >= sizeof key) {
    MaskKey half;
    std::memcpy(&half, from, sizeof half);
    half ^= key;
    std::memcpy(to, &half, sizeof half);
    to += sizeof half;
    from += sizeof half;
    count -= sizeof half;
  }
  std::array<std::byte, 4> key_bytes;
  std::memcpy(key_bytes.data(), &key, sizeof key);
  for (std::size_t i = 0; i < count; ++i) to[i] = from[i] ^ key_bytes[i];
}

/// Bytes of the UTF-8 sequence (RFC 3629) at the start of `text`, which is not empty; 0 if there is no valid one.
[[nodiscard]] inline std::size_t utf8_sequence(std::string_view text) noexcept {
  const auto at = [&text](std::size_t i) -> unsigned {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0;
  };
  const auto follows = [&at](std::size_t i) { return (at(i) & 0xc0U) == 0x80; };
  const unsigned lead = at(0);
  if (lead < 0x80) return 1;
  if (lead < 0xc2) return 0;
  if (lead < 0xe0) return follows(1) ? 2 : 0;
  if (lead < 0xf0) {
    if (lead == 0xe0 && at(1) < 0xa0) return 0;  // overlong
    if (lead == 0xed && at(1) > 0x9f) return 0;  // surrogates
    return follows(1) && follows(2) ? 3 : 0;
  }
  if (lead > 0xf4 || (lead == 0xf0 && at(1) < 0x90) || (lead == 0xf4 && at(1) > 0x8f)) return 0;
  return follows(1) && follows(2) && follows(3) ? 4 : 0;
}

[[nodiscard]] inline bool is_utf8(std::string_view text) noexcept {
  while (!text.empty()) {
    const std::size_t size = utf8_sequence(text);
    if (size == 0) return false;
    text.remove_prefix(size);
  }
  return true;
}

[[nodiscard]] inline std::uint64_t load_be64(const std::byte* from) noexcept {
  return std::uint64_t{load_be32(from)} << 32 | load_be32(from + 4);
}

inline void store_be64(std::byte* to, std::uint64_t value) noexcept {
  store_be32(to, static_cast<std::uint32_t>(value >> 32));
  store_be32(to + 4, static_cast<std::uint32_t>(value));
}

/// Bytes of the packet whose 16 header bytes are at `from`, whatever they say.
[[nodiscard]] inline std::size_t packet_size(const std::byte* from) noexcept {
  return header_size + std::size_t{load_be16(from + 8)} + std::size_t{load_be32(from + 10)};
}

}  // namespace detail

/// Writes the header of a final frame of `size` bytes, masked if there is a key, and returns its length, at most
/// `max_frame_header`.
inline std::size_t encode_frame_header(Opcode opcode, std::uint64_t size, std::optional<MaskKey> key,
                                       std::byte* to) noexcept {
  const std::byte masked{static_cast<std::uint8_t>(key ? 0x80 : 0)};
  std::size_t length = 2;
  to[0] = static_cast<std::byte>(0x80U | static_cast<unsigned>(opcode));
  if (size <= 125) {
    to[1] = masked | static_cast<std::byte>(size);
  } else if (size <= 0xffff) {
    to[1] = masked | std::byte{126};
    detail::store_be16(to + 2, static_cast<std::uint16_t>(size));
    length = 4;
  } else {
    to[1] = masked | std::byte{127};
    detail::store_be64(to + 2, size);
    length = 10;
  }
  if (!key) return length;
  std::memcpy(to + length, &*key, sizeof *key);
  return length + sizeof *key;
}

/// Room for any control frame.
using ControlFrame = std::array<std::byte, 2 + sizeof(MaskKey) + max_control_payload>;

/// Writes a ping, pong or Close frame of at most `max_control_payload` bytes, and returns its length.
inline std::size_t encode_control_frame(Opcode opcode, std::span<const std::byte> payload, std::optional<MaskKey> key,
                                        ControlFrame& to) noexcept {
  const std::size_t head = encode_frame_header(opcode, payload.size(), key, to.data());
  if (!payload.empty()) detail::mask_copy(to.data() + head, payload.data(), payload.size(), key.value_or(0));
  return head + payload.size();
}

/// Writes a Close frame with code and text, and returns its length. Of a text that is too long the beginning is taken,
/// up to a whole character; a byte that is no UTF-8 becomes a question mark. `close_code::no_status` stands for a frame
/// without code and text.
inline std::size_t encode_close_frame(std::uint16_t code, std::string_view text, std::optional<MaskKey> key,
                                      ControlFrame& to) noexcept {
  if (code == close_code::no_status) return encode_control_frame(Opcode::close, {}, key, to);
  std::array<std::byte, max_control_payload> payload;
  detail::store_be16(payload.data(), code);
  std::size_t size = 2;
  while (!text.empty()) {
    const std::size_t sequence = detail::utf8_sequence(text);
    const std::size_t taken = std::max<std::size_t>(sequence, 1);
    if (size + taken > payload.size()) break;
    if (sequence == 0) {
      payload[size] = std::byte{'?'};
    } else {
      std::memcpy(payload.data() + size, text.data(), taken);
    }
    size += taken;
    text.remove_prefix(taken);
  }
  return encode_control_frame(Opcode::close, std::span(payload).first(size), key, to);
}

/// Reads frames and yields what is in the binary messages, one behind the other: a stream of packets. Each message is
/// seen to be exactly one packet, and within `limits` before any of its bytes is yielded; so is all that RFC 6455 says
/// of frames. Of a message in several frames the first bytes are yielded before the last have come: that it is too
/// short or too long may be found only then.
///
/// Holds no memory but itself, whatever the peer announces, and in the middle of a compressed message an inflater; O(1)
/// for each frame and linear in its bytes, and in what they inflate to. Not thread-safe.
class FrameReader {
 public:
  enum class Event : std::uint8_t {
    need_more,  ///< all input is used up
    ping,       ///< `control_payload` is to be answered
    pong,       ///< `control_payload` is what came
    close,      ///< `peer_code` and `peer_text`; everything behind it is passed over
    violation,  ///< the peer broke RFC 6455 or the wire format: `error` and `violation_code`. Final
    full,       ///< `out` is used up, and there may be more for it
  };

  FrameReader(WebSocketRole role, const Limits& limits) noexcept
      : max_message_(header_size + limits.max_extension + limits.max_payload), limits_(limits), role_(role) {}
  ~FrameReader() { release_inflater(); }
  FrameReader(const FrameReader&) = delete;
  FrameReader& operator=(const FrameReader&) = delete;

  /// permessage-deflate without context takeover was agreed on: messages may be compressed. From now on only the
  /// `read` that is told how much room there is.
  void take_compressed() noexcept { takes_compressed_ = true; }

  /// Takes from the front of `in`, until there is an event or nothing left, and puts packet bytes to `out`, which is
  /// moved on behind them: never more than were taken. `out` may be where `in` begins, or before.
  [[nodiscard]] Event read(std::span<const std::byte>& in, std::byte*& out) {
    if (stopped_) [[unlikely]] {
      in = in.last(0);
      return error_ != nullptr ? Event::violation : Event::need_more;
    }
    while (!in.empty()) {
      if (frame_left_ == 0) {
        if (!in_message_ && header_have_ == 0) {
          read_whole_messages(in, out);
          if (in.empty()) break;
        }
        if (!read_frame_header(in)) [[unlikely]]
          return error_ != nullptr ? Event::violation : Event::need_more;
        if (!is_control(opcode_)) {
          if (compressed_) [[unlikely]] {
            inflates_ = true;
            return Event::need_more;
          }
          if (frame_left_ == 0) {
            if (final_) in_message_ = false;
            continue;
          }
        }
      }
      if (is_control(opcode_)) [[unlikely]] {
        if (read_control(in)) return control_event();
      } else if (!read_data(in, out)) [[unlikely]] {
        return Event::violation;
      }
    }
    return Event::need_more;
  }

  /// The same where messages may be compressed, which are more when inflated: `out` is other memory than `in`, and is
  /// moved on behind what was put; with `full` some of `in` may be left. Put is never more than there is room for, and
  /// of a message never more than a packet within `limits`. Throws std::bad_alloc.
  [[nodiscard]] Event read(std::span<const std::byte>& in, std::span<std::byte>& out) {
    for (;;) {
      if (inflates_) {
        if (const Event event = inflate(in, out); event != Event::need_more) return event;
        if (inflates_) return Event::need_more;
      }
      auto part = in.first(std::min(in.size(), out.size()));
      const std::size_t offered = part.size();
      std::byte* to = out.data();
      const Event event = read(part, to);
      in = stopped_ ? in.last(0) : in.subspan(offered - part.size());
      out = out.subspan(static_cast<std::size_t>(to - out.data()));
      if (inflates_) continue;
      if (event != Event::need_more || in.empty()) return event;
      if (out.empty()) return Event::full;
    }
  }
  /// True if there may be output without further input, after `full`.
  [[nodiscard]] bool has_output() const noexcept { return output_left_; }

  /// Of the ping, pong or Close frame just read.
  [[nodiscard]] std::span<const std::byte> control_payload() const noexcept {
    return std::span(control_).first(control_have_);
  }
  /// After `close`; `close_code::no_status` if the frame had none.
  [[nodiscard]] std::uint16_t peer_code() const noexcept {
    return control_have_ < 2 ? close_code::no_status : detail::load_be16(control_.data());
  }
  /// After `close`: UTF-8.
  [[nodiscard]] std::string_view peer_text() const noexcept {
    if (control_have_ <= 2) return {};
    return {reinterpret_cast<const char*>(control_.data()) + 2, control_have_ - 2U};
  }

  /// True in the middle of a message: some of it has come, or of its first frame.
  [[nodiscard]] bool has_partial() const noexcept {
    return !stopped_ && (in_message_ || frame_left_ != 0 || header_have_ != 0);
  }

  /// After `violation`; its text names field and value. An empty Error before.
  [[nodiscard]] const Error& error() const noexcept {
    static const Error none;
    return error_ != nullptr ? *error_ : none;
  }
  /// After `violation`: what the Close frame is to say.
  [[nodiscard]] std::uint16_t violation_code() const noexcept { return violation_code_; }

 private:
  static constexpr bool is_control(Opcode opcode) noexcept { return static_cast<unsigned>(opcode) >= 8; }

  /// Between messages: takes those that are whole, of one frame, and have no fault, and stops at the first other. This
  /// is what nearly all are, and nothing need be remembered of them.
  void read_whole_messages(std::span<const std::byte>& in, std::byte*& out) noexcept {
    const bool server = role_ == WebSocketRole::server;
    const std::byte* at = in.data();
    std::size_t left = in.size();
    std::byte* to = out;
    while (left >= max_frame_header + header_size && at[0] == std::byte{0x82}) {
      const auto second = std::to_integer<unsigned>(at[1]);
      if ((second >= 0x80U) != server) break;
      std::size_t size = second & 0x7fU;
      std::size_t head = server ? 6 : 2;
      if (size > 125) {
        if (size == 127) break;
        size = detail::load_be16(at + 2);
        head += 2;
        if (size < 126) break;
      }
      if (size < header_size || size > max_message_ || head + size > left) break;
      MaskKey key = 0;
      if (server) std::memcpy(&key, at + head - sizeof key, sizeof key);
      std::array<std::byte, header_size> packet;  // of it, what tells the size; the input must stay as it is
      std::uint64_t lengths;
      std::memcpy(&lengths, at + head + 8, sizeof lengths);
      lengths ^= std::uint64_t{key} << 32 | key;
      std::memcpy(packet.data() + 8, &lengths, sizeof lengths);
      if (detail::packet_size(packet.data()) != size) break;
      detail::mask_copy(to, at + head, size, key);
      to += size;
      at += head + size;
      left -= head + size;
    }
    in = in.last(left);
    out = to;
  }

  /// Goes on with a frame's header; false if it is not whole yet, or wrong.
  bool read_frame_header(std::span<const std::byte>& in) {
    if (header_have_ == 0 && in.size() >= max_frame_header) [[likely]] {
      const std::byte* const at = in.data();
      if (!take_start(at)) return false;
      const std::size_t size = header_bytes(at);
      if (!take_rest(at, size)) return false;
      in = in.subspan(size);
      return true;
    }
    if (!collect(in, 2)) return false;
    if (!take_start(header_.data())) return false;
    const std::size_t size = header_bytes(header_.data());
    if (!collect(in, size)) return false;
    header_have_ = 0;
    return take_rest(header_.data(), size);
  }

  bool collect(std::span<const std::byte>& in, std::size_t wanted) noexcept {
    if (header_have_ >= wanted) return true;
    const std::size_t count = std::min(wanted - header_have_, in.size());
    if (count != 0) std::memcpy(header_.data() + header_have_, in.data(), count);
    header_have_ = static_cast<std::uint8_t>(header_have_ + count);
    in = in.subspan(count);
    return header_have_ == wanted;
  }

  static std::size_t header_bytes(const std::byte* at) noexcept {
    const auto second = std::to_integer<unsigned>(at[1]);
    const unsigned length = second & 0x7fU;
    return 2U + (length == 126 ? 2U : length == 127 ? 8U : 0U) + ((second & 0x80U) != 0 ? 4U : 0U);
  }

  /// The first two bytes. May be called again with the same ones.
  bool take_start(const std::byte* at) {
    const auto first = std::to_integer<unsigned>(at[0]);
    const auto second = std::to_integer<unsigned>(at[1]);
    const unsigned plain = in_message_ ? 0x00U : 0x02U;
    const unsigned mask = role_ == WebSocketRole::server ? 0x80U : 0U;
    if ((first & 0x7fU) == plain && (second & 0x80U) == mask) [[likely]]
      return true;
    return check_start(first, second);
  }

  [[gnu::noinline]] bool check_start(unsigned first, unsigned second) {
    const unsigned opcode = first & 0x0fU;
    const bool masked = (second & 0x80U) != 0;
    const bool data = opcode == 1 || opcode == 2;
    if ((first & 0x70U) != 0 && !(takes_compressed_ && data && (first & 0x70U) == 0x40)) {
      return broken("reserved bits are " + std::to_string(first >> 4 & 7) + ", must be 0");
    }
    if (opcode > 10 || (opcode > 2 && opcode < 8)) {
      return broken("opcode is " + std::to_string(opcode) + ", must be 0, 1, 2, 8, 9 or 10");
    }
    if (masked != (role_ == WebSocketRole::server)) {
      return broken(masked ? "masked, must not be from a server" : "not masked, must be from a client");
    }
    if (opcode >= 8) {
      if ((first & 0x80U) == 0) return broken("control frame is fragmented");
      if (const unsigned length = second & 0x7fU; length > max_control_payload) {
        return broken("control frame's length is " + std::to_string(length) + ", must be at most 125");
      }
      return true;
    }
    if (opcode == 0 && !in_message_) return broken("continuation of no message");
    if (opcode != 0 && in_message_) return broken("new message inside a fragmented one");
    if (opcode == 1) {
      return violate(close_code::unsupported_data,
                     Error(Errc::websocket_violation, "WebSocket message is text, must be binary"));
    }
    return true;
  }

  /// The whole header.
  bool take_rest(const std::byte* at, std::size_t size) {
    const auto first = std::to_integer<unsigned>(at[0]);
    std::uint64_t length = std::to_integer<unsigned>(at[1]) & 0x7fU;
    if (length == 126) {
      length = detail::load_be16(at + 2);
      if (length < 126) return not_minimal(length);
    } else if (length == 127) {
      length = detail::load_be64(at + 2);
      if (length >> 63 != 0) return broken("length has its highest bit set");
      if (length <= 0xffff) return not_minimal(length);
    }
    key_ = 0;
    if (role_ == WebSocketRole::server) std::memcpy(&key_, at + size - sizeof key_, sizeof key_);
    opcode_ = static_cast<Opcode>(first & 0x0fU);
    if (is_control(opcode_)) {
      control_have_ = 0;
    } else {
      if (!in_message_) {
        in_message_ = true;
        compressed_ = (first & 0x40U) != 0;
        message_size_ = message_taken_ = packet_size_ = 0;
      }
      final_ = (first & 0x80U) != 0;
      if (length > most_of_message() - message_size_) return too_big(length);
      message_size_ += static_cast<std::size_t>(length);
      if (!compressed_) {
        if (message_taken_ >= header_size && !check_size()) return false;
        if (final_ && message_size_ < header_size) return too_short(message_size_);
      }
    }
    frame_left_ = length;
    return true;
  }

  bool read_data(std::span<const std::byte>& in, std::byte*& out) {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(frame_left_, in.size()));
    if (role_ == WebSocketRole::server) {
      detail::mask_copy(out, in.data(), count, key_);
      key_ = detail::advance_mask(key_, count);
    } else if (out != in.data()) {
      std::memmove(out, in.data(), count);
    }
    if (message_taken_ < header_size) {
      if (const std::byte* const head = packet_head(out, count); head != nullptr) {
        packet_size_ = detail::packet_size(head);
        if (message_size_ != packet_size_ && !check_size(head)) return false;
      }
    }
    message_taken_ += count;
    frame_left_ -= count;
    out += count;
    in = in.subspan(count);
    if (frame_left_ == 0 && final_) in_message_ = false;
    return true;
  }

  /// The packet's header, of which the bytes behind `message_taken_` are these; null if it is not whole yet.
  const std::byte* packet_head(const std::byte* from, std::size_t count) noexcept {
    if (message_taken_ == 0 && count >= header_size) return from;
    std::memcpy(packet_head_.data() + message_taken_, from, std::min(count, header_size - message_taken_));
    return message_taken_ + count >= header_size ? packet_head_.data() : nullptr;
  }

  /// Whether the message as far as it is announced fits its packet.
  bool check_size(const std::byte* head = nullptr) {
    if (message_size_ == packet_size_ || (message_size_ < packet_size_ && !final_)) return true;
    if (head != nullptr && !check_header(head)) return false;
    return wrong_size(std::to_string(message_size_) + (final_ ? "" : " or more") + " bytes long");
  }

  bool check_header(const std::byte* head) {
    Header header;
    if (detail::read_header(head, limits_, header)) return true;
    Error error = detail::explain_header(head, limits_);
    const bool size = error.code == make_error_code(Errc::payload_too_large) ||
                      error.code == make_error_code(Errc::extension_too_large);
    return violate(size ? close_code::message_too_big : close_code::protocol_error, std::move(error));
  }

  /// Goes on with a frame of a compressed message, and ends the message with its last. `need_more`: of this frame all
  /// that came is used up, and while `inflates_` some of it is still to come.
  Event inflate(std::span<const std::byte>& in, std::span<std::byte>& out) {
    if (!inflater_) inflater_ = detail::DeflateStreams::lend_inflater();
    output_left_ = false;
    for (;;) {
      std::byte beyond;  // of a whole packet only the end may follow
      if (out.empty() && (message_taken_ < header_size || message_taken_ != packet_size_)) {
        output_left_ = true;
        return Event::full;
      }
      std::span<std::byte> room = out.empty() ? std::span(&beyond, 1) : out;
      const std::size_t most = room.size();
      std::array<std::byte, 8192> unmasked;
      std::span<const std::byte> source;
      const bool payload = frame_left_ != 0;
      if (payload) {
        source = in.first(static_cast<std::size_t>(std::min<std::uint64_t>(frame_left_, in.size())));
        if (role_ == WebSocketRole::server && !source.empty()) {
          source = source.first(std::min(source.size(), unmasked.size()));
          detail::mask_copy(unmasked.data(), source.data(), source.size(), key_);
          source = std::span(unmasked).first(source.size());
        }
      } else if (final_) {
        source = std::span(detail::deflate_tail).subspan(tail_taken_);
      }
      const std::size_t offered = source.size();
      const bool right = inflater_->run(source, room);
      const std::size_t taken = offered - source.size();
      if (payload) {
        key_ = detail::advance_mask(key_, taken);
        frame_left_ -= taken;
        in = in.subspan(taken);
      } else {
        tail_taken_ = static_cast<std::uint8_t>(tail_taken_ + taken);
      }
      // What is wrong with the packet is told before what is wrong behind it.
      const std::size_t put = most - room.size();
      if (put != 0 && !take_inflated(out, put)) return Event::violation;
      if (!right) return corrupt(inflater_->reason());
      if (put == most || !source.empty()) continue;
      if (frame_left_ != 0) {
        if (in.empty()) return Event::need_more;
      } else if (!final_) {
        inflates_ = false;
        return Event::need_more;
      } else if (tail_taken_ == detail::deflate_tail.size()) {
        return end_inflated() ? Event::need_more : Event::violation;
      }
    }
  }

  bool take_inflated(std::span<std::byte>& out, std::size_t count) {
    if (message_taken_ < header_size) {
      if (const std::byte* const head = packet_head(out.data(), count); head != nullptr) {
        if (!check_header(head)) return false;
        packet_size_ = detail::packet_size(head);
      }
    }
    message_taken_ += count;
    if (message_taken_ > packet_size_ && message_taken_ >= header_size) {
      if (packet_size_ != max_message_) return wrong_size("more than " + std::to_string(packet_size_) + " bytes long");
      return violate(close_code::message_too_big,
                     Error(Errc::payload_too_large, "WebSocket message inflates to more than the limit of " +
                                                        std::to_string(max_message_) + " bytes"));
    }
    out = out.subspan(count);
    return true;
  }

  bool end_inflated() {
    if (!inflater_->at_boundary()) {
      corrupt("it ends within a block");
      return false;
    }
    if (message_taken_ < header_size) return too_short(message_taken_);
    if (message_taken_ != packet_size_) return wrong_size(std::to_string(message_taken_) + " bytes long");
    in_message_ = compressed_ = inflates_ = false;
    tail_taken_ = 0;
    release_inflater();
    return true;
  }

  void release_inflater() noexcept { detail::DeflateStreams::give_back(std::move(inflater_)); }

  [[nodiscard]] std::size_t most_of_message() const noexcept {
    // What does not get smaller gets larger, with the worst of compressors by a thirtieth.
    return compressed_ ? max_message_ + max_message_ / 16 + 64 : max_message_;
  }

  /// \returns true if the frame is whole.
  bool read_control(std::span<const std::byte>& in) noexcept {
    const auto count = static_cast<std::size_t>(std::min<std::uint64_t>(frame_left_, in.size()));
    if (count != 0) detail::mask_copy(control_.data() + control_have_, in.data(), count, key_);
    key_ = detail::advance_mask(key_, count);
    control_have_ = static_cast<std::uint8_t>(control_have_ + count);
    frame_left_ -= count;
    in = in.subspan(count);
    return frame_left_ == 0;
  }

  Event control_event() {
    const Opcode opcode = std::exchange(opcode_, Opcode::continuation);
    if (opcode == Opcode::ping) return Event::ping;
    if (opcode == Opcode::pong) return Event::pong;
    if (control_have_ == 1) {
      broken("Close frame's length is 1, must be 0 or at least 2");
      return Event::violation;
    }
    if (control_have_ >= 2 && !close_code::valid(peer_code())) {
      broken("Close frame's code is " + std::to_string(peer_code()) + ", which may not be sent");
      return Event::violation;
    }
    if (!detail::is_utf8(peer_text())) {
      violate(close_code::invalid_payload,
              Error(Errc::websocket_violation, "WebSocket frame: Close frame's text is not UTF-8"));
      return Event::violation;
    }
    stopped_ = true;
    release_inflater();
    return Event::close;
  }

  bool not_minimal(std::uint64_t length) {
    return broken("length " + std::to_string(length) + " is not in its shortest form");
  }

  [[gnu::noinline]] bool too_big(std::uint64_t length) {
    return violate(close_code::message_too_big,
                   Error(Errc::payload_too_large, std::string(compressed_ ? "compressed " : "") +
                                                      "WebSocket message has " + std::to_string(message_size_) + " + " +
                                                      std::to_string(length) + " bytes, over the limit of " +
                                                      std::to_string(most_of_message()) + " bytes"));
  }

  [[gnu::noinline]] bool too_short(std::size_t size) {
    return violate(close_code::protocol_error,
                   Error(Errc::websocket_violation,
                         "WebSocket message is " + std::to_string(size) + " bytes long, a packet has at least 16"));
  }

  [[gnu::noinline]] bool wrong_size(const std::string& what) {
    return violate(close_code::protocol_error,
                   Error(Errc::websocket_violation,
                         "WebSocket message is " + what + ", its packet is " + std::to_string(packet_size_)));
  }

  [[gnu::noinline]] Event corrupt(const char* why) {
    violate(close_code::invalid_payload,
            Error(Errc::websocket_violation, std::string("WebSocket message does not inflate: ") + why));
    return Event::violation;
  }

  [[gnu::noinline]] bool broken(const std::string& what) {
    return violate(close_code::protocol_error, Error(Errc::websocket_violation, "WebSocket frame: " + what));
  }

  /// \returns false.
  bool violate(std::uint16_t code, Error error) {
    error_ = std::make_unique<Error>(std::move(error));
    violation_code_ = code;
    stopped_ = true;
    inflates_ = output_left_ = false;
    release_inflater();
    return false;
  }

  std::uint64_t frame_left_ = 0;   // payload bytes of the frame that are still to come
  std::size_t message_size_ = 0;   // of all its frames so far, as announced
  std::size_t message_taken_ = 0;  // and as yielded, which of a compressed one is another number
  std::size_t packet_size_ = 0;    // once its header has come
  std::size_t max_message_;
  std::unique_ptr<Error> error_;
  std::unique_ptr<detail::Inflater> inflater_;  // in the middle of a compressed message
  MaskKey key_ = 0;                             // for the next byte
  Limits limits_;
  std::uint16_t violation_code_ = 0;
  WebSocketRole role_;
  Opcode opcode_ = Opcode::continuation;
  bool final_ = false;  // the data frame is its message's last
  bool in_message_ = false;
  bool stopped_ = false;
  bool takes_compressed_ = false;
  bool compressed_ = false;  // the message is
  bool inflates_ = false;    // in the middle of a frame of such a one
  bool output_left_ = false;
  std::uint8_t tail_taken_ = 0;  // of what was not sent
  std::uint8_t header_have_ = 0;
  std::uint8_t control_have_ = 0;
  std::array<std::byte, max_frame_header> header_;  // what has come of a header that was cut
  std::array<std::byte, header_size> packet_head_;  // and of a packet's
  std::array<std::byte, max_control_payload> control_;
};

/// Puts each packet of a byte stream into a binary frame. Packets may be cut anywhere between calls; a header is held
/// back until it is whole. What is given must be packets.
class PacketFramer {
 public:
  explicit PacketFramer(WebSocketRole role) noexcept : role_(role) {}

  /// True if another frame may be sent now: none is begun and unfinished.
  [[nodiscard]] bool at_boundary() const noexcept { return left_ == 0; }
  /// Bytes of the frame that are still to come.
  [[nodiscard]] std::size_t left() const noexcept { return left_; }
  /// Bytes that are still to come of a header of which some is held back; 0 if none is.
  [[nodiscard]] std::size_t head_left() const noexcept { return have_ == 0 ? 0 : header_size - have_; }

  /// Takes from the front of `in` and writes frames to the front of `out`; both are moved on. Ends when nothing is
  /// left, or when there is too little room for more. A frame of fewer than `direct` bytes is begun only if there is
  /// room for all of it: `max_frame_header + direct` is always enough for something. A server's also ends at `direct`
  /// bytes or more in a row of one frame: those the caller may send himself, and `skip`. \param direct  at least
  /// `header_size` \param keys  MaskKey(), called for each frame of a client: it must be unpredictable.
  template <class Keys>
  void frame(std::span<const std::byte>& in, std::span<std::byte>& out, std::size_t direct, Keys&& keys) {
    while (!in.empty()) {
      if (left_ != 0) {
        const std::size_t here = std::min(left_, in.size());
        if (here >= direct && role_ == WebSocketRole::server) return;
        const std::size_t count = std::min(here, out.size());
        if (count == 0) return;
        put(in.data(), count, out);
        in = in.subspan(count);
        continue;
      }
      if (have_ == 0 && in.size() >= header_size) [[likely]] {
        if (!begin(in.data(), out, direct, keys)) return;
        continue;
      }
      const std::size_t count = std::min(header_size - have_, in.size());
      std::memcpy(head_.data() + have_, in.data(), count);
      if (have_ + count < header_size) {
        have_ = static_cast<std::uint8_t>(have_ + count);
        in = in.subspan(count);
        return;
      }
      if (!begin(head_.data(), out, direct, keys)) return;
      have_ = 0;
      in = in.subspan(count);
      put(head_.data(), header_size, out);
    }
  }

  /// A server's caller has sent the next `count` bytes of the frame, at most `left()`.
  void skip(std::size_t count) noexcept { left_ -= count; }

 private:
  /// \returns false if there is no room.
  template <class Keys>
  bool begin(const std::byte* head, std::span<std::byte>& out, std::size_t direct, Keys& keys) {
    const std::size_t size = detail::packet_size(head);
    if (out.size() < max_frame_header + (size < direct ? size : header_size)) return false;
    left_ = size;
    std::optional<MaskKey> key;
    if (role_ == WebSocketRole::client) key = key_ = keys();
    out = out.subspan(encode_frame_header(Opcode::binary, size, key, out.data()));
    return true;
  }

  void put(const std::byte* from, std::size_t count, std::span<std::byte>& out) noexcept {
    if (role_ == WebSocketRole::client) {
      detail::mask_copy(out.data(), from, count, key_);
      key_ = detail::advance_mask(key_, count);
    } else {
      std::memcpy(out.data(), from, count);
    }
    out = out.subspan(count);
    left_ -= count;
  }

  std::size_t left_ = 0;
  MaskKey key_ = 0;
  WebSocketRole role_;
  std::uint8_t have_ = 0;
  std::array<std::byte, header_size> head_;  // what has come of a header that was cut
};

}  // namespace msgtrans::wire
