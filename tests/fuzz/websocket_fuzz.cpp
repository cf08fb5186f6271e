// SPDX-License-Identifier: Apache-2.0
// The reader of WebSocket frames against itself and against a plain reading of RFC 6455: one stream, read whole, byte
// by byte, and in pieces, must give the same packets, events and fault. The same where messages may be compressed
// (RFC 7692), with much room and little. And packets that are framed, or compressed, must be read again.
//
// Input: byte 0 picks the role, the limits and what is done, byte 1 seeds the cuts, the rest is the stream.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <msgtrans/wire/decoder.hpp>
#include <msgtrans/wire/websocket.hpp>
#include <random>
#include <span>
#include <string>
#include <vector>
#include <zlib.h>

namespace {

using namespace msgtrans;
using namespace msgtrans::wire;
using Bytes = std::vector<std::byte>;
using View = std::span<const std::byte>;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

struct Event {
  std::size_t at;  // packet bytes before it
  int opcode;
  Bytes payload;
  friend bool operator==(const Event&, const Event&) = default;
};

struct Outcome {
  Bytes data;
  std::vector<Event> events;
  unsigned fault = 0;  // the code of the Close frame
  std::string text;
  bool partial = false;
};

struct Inflated {
  Bytes bytes;
  bool corrupt = false;
  bool at_boundary = true;
};

/// All at once, up to `most` bytes.
Inflated inflate_whole(View in, std::size_t most) {
  Inflated result;
  result.bytes.resize(most);
  z_stream stream{};
  require(inflateInit2(&stream, -15) == Z_OK, "there is memory");
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(in.data()));
  stream.avail_in = static_cast<uInt>(in.size());
  stream.next_out = reinterpret_cast<Bytef*>(result.bytes.data());
  stream.avail_out = static_cast<uInt>(most);
  while (stream.avail_out != 0) {
    const int status = inflate(&stream, Z_SYNC_FLUSH);
    if (status == Z_BUF_ERROR) break;
    if (status == Z_STREAM_END) {
      inflateReset(&stream);
      result.at_boundary = true;
    } else if (status == Z_OK) {
      result.at_boundary = (stream.data_type & 128) != 0;
    } else {
      result.corrupt = true;
      break;
    }
    if (stream.avail_in == 0) break;
  }
  result.bytes.resize(most - stream.avail_out);
  inflateEnd(&stream);
  return result;
}

/// The documents, read plainly: whole frames only, no state but the message.
class Reference {
 public:
  Reference(WebSocketRole role, const Limits& limits, bool deflate = false)
      : server_(role == WebSocketRole::server), deflate_(deflate), limits_(limits) {}

  Outcome read(View in) {
    while (!in.empty() && outcome_.fault == 0 && !closed_) {
      const std::size_t used = frame(in);
      outcome_.partial = used == 0;
      if (used == 0) break;
      in = in.subspan(used);
    }
    outcome_.partial = (outcome_.partial || in_message_) && outcome_.fault == 0 && !closed_;
    return outcome_;
  }

 private:
  static std::uint64_t number(View in, std::size_t at, std::size_t size) {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < size; ++i) value = value * 256 + std::to_integer<std::uint64_t>(in[at + i]);
    return value;
  }

  std::size_t fault(unsigned code) {
    outcome_.fault = code;
    return 1;
  }

  /// How many bytes the frame has, 0 if it is not whole.
  std::size_t frame(View in) {
    if (in.size() < 2) return 0;
    const auto first = number(in, 0, 1);
    const auto second = number(in, 1, 1);
    const auto opcode = first % 16;
    const bool final = first >= 128;
    const bool masked = second >= 128;
    const bool compressed = deflate_ && first / 16 % 8 == 4 && (opcode == 1 || opcode == 2);
    if (first / 16 % 8 != 0 && !compressed) return fault(1002);
    if (opcode > 10 || (opcode > 2 && opcode < 8)) return fault(1002);
    if (masked != server_) return fault(1002);
    const bool control = opcode >= 8;
    if (control && (!final || second % 128 > 125)) return fault(1002);
    if (!control && (opcode == 0) != in_message_) return fault(1002);
    if (opcode == 1) return fault(1003);
    const std::size_t extra = second % 128 == 126 ? 2 : second % 128 == 127 ? 8 : 0;
    const std::size_t head = 2 + extra + (masked ? 4 : 0);
    if (in.size() < head) return 0;
    const std::uint64_t length = extra == 0 ? second % 128 : number(in, 2, extra);
    if ((extra == 2 && length < 126) || (extra == 8 && (length < 65536 || length >= std::uint64_t{1} << 63))) {
      return fault(1002);
    }
    const std::uint64_t most = 16 + std::uint64_t{limits_.max_extension} + limits_.max_payload;
    if (!control) {
      if (opcode == 2) {
        message_.clear();
        inflated_ = 0;
        compressed_ = compressed;
      }
      in_message_ = true;
      if (length > (compressed_ ? most + most / 16 + 64 : most) - message_.size()) return fault(1009);
      const std::uint64_t size = message_.size() + length;
      if (!compressed_) {
        if (message_.size() >= 16 && !fits(message_, size, final)) return 1;
        if (final && size < 16) return fault(1002);
      }
    }
    Bytes payload(in.begin() + static_cast<std::ptrdiff_t>(head),
                  in.begin() + static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(in.size(), head + length)));
    if (masked) {
      for (std::size_t i = 0; i < payload.size(); ++i) payload[i] ^= in[head - 4 + i % 4];
    }
    if (!control && compressed_) {
      message_.insert(message_.end(), payload.begin(), payload.end());
      if (!inflates(most, final && payload.size() == length)) return 1;
    } else if (!control) {
      Bytes message = message_;
      message.insert(message.end(), payload.begin(), payload.end());
      if (message_.size() < 16 && message.size() >= 16 && !fits(message, message_.size() + length, final)) return 1;
      outcome_.data.insert(outcome_.data.end(), payload.begin(), payload.end());
      message_ = std::move(message);
    }
    if (payload.size() < length) return 0;
    if (control) {
      if (opcode == 8 && !close(payload)) return 1;
      outcome_.events.push_back({outcome_.data.size(), static_cast<int>(opcode), payload});
    } else if (final) {
      in_message_ = false;
    }
    return head + payload.size();
  }

  /// Whether a message whose header is there may have that size.
  bool fits(View message, std::uint64_t size, bool final) {
    const std::uint64_t wanted = 16 + number(message, 8, 2) + number(message, 10, 4);
    if (size == wanted || (size < wanted && !final)) return true;
    // A header that is wrong itself is the fault.
    const bool right = number(message, 0, 1) == 1 && number(message, 1, 1) <= 2 && number(message, 2, 1) <= 2;
    const bool large = number(message, 8, 2) > limits_.max_extension || number(message, 10, 4) > limits_.max_payload;
    // Behind the header only the size is looked at again.
    fault(message_.size() < 16 && right && large ? 1009 : 1002);
    return false;
  }

  /// Whether what came of a compressed message may be of one packet.
  bool inflates(std::uint64_t most, bool whole) {
    Bytes deflated = message_;
    if (whole) {
      for (const unsigned octet : {0x00U, 0x00U, 0xffU, 0xffU}) deflated.push_back(static_cast<std::byte>(octet));
    }
    const Inflated got = inflate_whole(deflated, static_cast<std::size_t>(most) + 1);
    const std::uint64_t wanted = got.bytes.size() < 16 ? most : 16 + number(got.bytes, 8, 2) + number(got.bytes, 10, 4);
    const std::size_t right = std::min<std::size_t>(got.bytes.size(), static_cast<std::size_t>(wanted));
    if (right > inflated_) {
      outcome_.data.insert(outcome_.data.end(), got.bytes.begin() + static_cast<std::ptrdiff_t>(inflated_),
                           got.bytes.begin() + static_cast<std::ptrdiff_t>(right));
      inflated_ = right;
    }
    if (got.bytes.size() >= 16) {
      const View head = got.bytes;
      if (number(head, 0, 1) != 1 || number(head, 1, 1) > 2 || number(head, 2, 1) > 2) return fault(1002) == 0;
      if (number(head, 8, 2) > limits_.max_extension || number(head, 10, 4) > limits_.max_payload) {
        return fault(1009) == 0;
      }
      if (number(head, 14, 2) % 2 != 0) return fault(1002) == 0;
      if (got.bytes.size() > wanted) return fault(wanted == most ? 1009 : 1002) == 0;
    }
    if (got.corrupt) return fault(1007) == 0;
    if (!whole) return true;
    if (!got.at_boundary) return fault(1007) == 0;
    return (got.bytes.size() >= 16 && got.bytes.size() == wanted) || fault(1002) == 0;
  }

  bool close(View payload) {
    closed_ = true;
    if (payload.empty()) return true;
    if (payload.size() == 1) return fault(1002) == 0;
    const auto code = number(payload, 0, 2);
    const bool known =
        (code >= 1000 && code <= 1003) || (code >= 1007 && code <= 1014) || (code >= 3000 && code < 5000);
    if (!known) return fault(1002) == 0;
    if (!is_utf8(payload.subspan(2))) return fault(1007) == 0;
    return true;
  }

  /// By decoding: RFC 3629.
  static bool is_utf8(View text) {
    while (!text.empty()) {
      const auto lead = number(text, 0, 1);
      const std::size_t size = lead < 128 ? 1 : lead / 32 == 6 ? 2 : lead / 16 == 14 ? 3 : lead / 8 == 30 ? 4 : 0;
      if (size == 0 || text.size() < size) return false;
      std::uint64_t value = size == 1 ? lead : lead % (std::uint64_t{1} << (7 - size));
      for (std::size_t i = 1; i < size; ++i) {
        if (number(text, i, 1) / 64 != 2) return false;
        value = value * 64 + number(text, i, 1) % 64;
      }
      constexpr std::array<std::uint64_t, 5> least{0, 0, 0x80, 0x800, 0x10000};
      if (value < least[size] || value > 0x10ffff || (value >= 0xd800 && value < 0xe000)) return false;
      text = text.subspan(size);
    }
    return true;
  }

  bool server_;
  bool deflate_;
  bool compressed_ = false;
  bool in_message_ = false;
  bool closed_ = false;
  Limits limits_;
  Bytes message_;
  std::size_t inflated_ = 0;  // of the message, and yielded
  Outcome outcome_;
};

class Run {
 public:
  /// \param room  0, or messages may be compressed, and that much is read at a time
  Run(WebSocketRole role, const Limits& limits, std::size_t room = 0) : reader_(role, limits), room_(room) {
    if (room != 0) reader_.take_compressed();
  }

  void feed(View bytes) {
    if (room_ == 0) {
      feed_in_place(bytes);
    } else {
      feed_apart(bytes);
    }
  }

  [[nodiscard]] const Outcome& outcome() const { return outcome_; }

 private:
  /// Reads a copy of exactly these bytes, in place: reading or writing beyond is seen by the sanitizer.
  void feed_in_place(View bytes) {
    Bytes buffer(bytes.begin(), bytes.end());
    View in = buffer;
    std::byte* out = buffer.data();
    for (;;) {
      std::byte* const from = out;
      const FrameReader::Event event = reader_.read(in, out);
      require(out - buffer.data() <= in.data() - buffer.data(), "no more is yielded than was taken");
      outcome_.data.insert(outcome_.data.end(), from, out);
      require(event != FrameReader::Event::full, "in place there is always room");
      if (!take(event, in)) return;
    }
  }

  void feed_apart(View bytes) {
    const Bytes lent(bytes.begin(), bytes.end());
    View in = lent;
    for (;;) {
      Bytes buffer(room_);
      std::span<std::byte> out = buffer;
      const FrameReader::Event event = reader_.read(in, out);
      outcome_.data.insert(outcome_.data.end(), buffer.begin(), buffer.end() - static_cast<std::ptrdiff_t>(out.size()));
      if (event == FrameReader::Event::full) {
        require(out.empty(), "full means full");
      } else if (!take(event, in)) {
        return;
      }
    }
  }

  /// \returns false if that was all.
  bool take(FrameReader::Event event, View in) {
    switch (event) {
      case FrameReader::Event::need_more:
        require(in.empty() && !reader_.has_output(), "all was taken");
        outcome_.partial = reader_.has_partial();
        return false;
      case FrameReader::Event::ping: add(9); return true;
      case FrameReader::Event::pong: add(10); return true;
      case FrameReader::Event::close: add(8); return true;
      case FrameReader::Event::full: return true;
      case FrameReader::Event::violation:
        outcome_.fault = reader_.violation_code();
        outcome_.text = reader_.error().text;
        outcome_.partial = false;
        require(is_protocol_error(reader_.error().code) && !outcome_.text.empty(), "a fault is a protocol error");
        return false;
    }
    return false;
  }

  void add(int opcode) {
    const View payload = reader_.control_payload();
    outcome_.events.push_back({outcome_.data.size(), opcode, {payload.begin(), payload.end()}});
  }

  FrameReader reader_;
  std::size_t room_;
  Outcome outcome_;
};

/// Of a message that turns out wrong, more or less may have been yielded before that was seen.
void require_same(const Outcome& a, const Outcome& b, const char* what) {
  require(a.fault == b.fault, what);
  require(a.events == b.events, what);
  require(a.partial == b.partial, what);
  const std::size_t common = std::min(a.data.size(), b.data.size());
  require(std::equal(a.data.begin(), a.data.begin() + static_cast<std::ptrdiff_t>(common), b.data.begin()), what);
  require(a.fault != 0 || a.data.size() == b.data.size(), what);
}

/// \param most_room  0, or messages may be compressed
void check_reading(WebSocketRole role, const Limits& limits, View stream, std::mt19937& random, std::size_t most_room) {
  Run whole(role, limits, most_room);
  whole.feed(stream);
  require_same(whole.outcome(), Reference(role, limits, most_room != 0).read(stream), "as the documents say");

  Run single(role, limits, most_room == 0 ? 0 : 1 + random() % most_room);
  for (std::size_t i = 0; i < stream.size() && single.outcome().fault == 0; ++i) single.feed(stream.subspan(i, 1));
  require_same(whole.outcome(), single.outcome(), "byte by byte as whole");
  require(whole.outcome().text == single.outcome().text, "the same text");

  Run pieces(role, limits, most_room == 0 ? 0 : 1 + random() % 20);
  const std::size_t largest = std::size_t{1} << (random() % 12);
  for (std::size_t at = 0; at < stream.size() && pieces.outcome().fault == 0;) {
    const std::size_t count = std::min(stream.size() - at, 1 + random() % largest);
    pieces.feed(stream.subspan(at, count));
    at += count;
  }
  require_same(whole.outcome(), pieces.outcome(), "in pieces as whole");
}

/// The packets that the stream begins with.
std::vector<Bytes> packets_of(View stream) {
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  decoder.feed(stream);
  PacketView view;
  std::vector<Bytes> packets;
  while (decoder.next(view) == Decoder::Status::packet) packets.emplace_back(view.bytes.begin(), view.bytes.end());
  decoder.clear();
  return packets;
}

Bytes joined(const std::vector<Bytes>& packets) {
  Bytes all;
  for (const Bytes& one : packets) all.insert(all.end(), one.begin(), one.end());
  return all;
}

/// They are compressed or not, sent in fragments, and read again.
void check_deflating(WebSocketRole role, View stream, std::mt19937& random) {
  const std::vector<Bytes> packets = packets_of(stream);
  const int bits = 9 + static_cast<int>(random() % 7);
  const int level = static_cast<int>(random() % 10);
  Bytes frames;
  for (const Bytes& packet : packets) {
    Bytes payload = packet;
    unsigned first = 2;
    if (random() % 4 != 0) {
      first = 0x42;
      payload.resize(packet.size() + packet.size() / 100 + 100);
      wire::detail::Deflater* const deflater = wire::detail::DeflateStreams::deflater(level, bits);
      require(deflater != nullptr, "there is memory");
      deflater->begin(payload);
      const std::size_t cut = random() % packet.size();
      require(deflater->add(View(packet).first(cut)) && deflater->add(View(packet).subspan(cut)), "there is room");
      payload.resize(deflater->finish());
      require(!payload.empty(), "a message is never nothing");
    }
    const std::size_t largest = std::size_t{1} << (random() % 12);
    for (std::size_t at = 0; at < payload.size(); first = 0) {
      const std::size_t count = std::min<std::size_t>({payload.size() - at, 1 + random() % largest, 125});
      if (at + count == payload.size()) first |= 0x80;
      const bool masked = role == WebSocketRole::client;
      frames.push_back(static_cast<std::byte>(first));
      frames.push_back(static_cast<std::byte>((masked ? 0x80U : 0U) | count));
      if (masked) frames.insert(frames.end(), 4, std::byte{0x5a});
      for (std::size_t i = 0; i < count; ++i)
        frames.push_back(payload[at + i] ^ std::byte{masked ? std::uint8_t{0x5a} : std::uint8_t{0}});
      at += count;
    }
  }
  Run run(role == WebSocketRole::server ? WebSocketRole::client : WebSocketRole::server, Limits{}, 1 + random() % 5000);
  run.feed(frames);
  require(run.outcome().fault == 0 && !run.outcome().partial && run.outcome().events.empty(),
          "messages without a fault");
  require(run.outcome().data == joined(packets), "the packets that were compressed");
}

/// They are framed in pieces and read again.
void check_framing(WebSocketRole role, View stream, std::mt19937& random) {
  const Limits limits;
  const Bytes packets = joined(packets_of(stream));
  PacketFramer framer(role);
  Bytes frames;
  const std::size_t direct = 16 + random() % 200;
  const std::size_t largest = std::size_t{1} << (random() % 12);
  for (std::size_t at = 0; at < packets.size();) {
    const std::size_t count = std::min(packets.size() - at, 1 + random() % largest);
    const Bytes lent(packets.begin() + static_cast<std::ptrdiff_t>(at),
                     packets.begin() + static_cast<std::ptrdiff_t>(at + count));
    at += count;
    for (View in = lent; !in.empty();) {
      Bytes buffer(max_frame_header + direct + random() % 200);
      std::span<std::byte> room = buffer;
      const std::size_t before = in.size();
      framer.frame(in, room, direct, [&random] { return static_cast<MaskKey>(random()); });
      require(room.size() < buffer.size() || in.size() < before || framer.left() >= direct, "there is progress");
      frames.insert(frames.end(), buffer.begin(), buffer.end() - static_cast<std::ptrdiff_t>(room.size()));
      if (role == WebSocketRole::client) continue;
      if (const std::size_t here = std::min(framer.left(), in.size()); here >= direct) {
        frames.insert(frames.end(), in.begin(), in.begin() + static_cast<std::ptrdiff_t>(here));
        framer.skip(here);
        in = in.subspan(here);
      }
    }
  }
  require(framer.at_boundary(), "all frames are whole");
  Run run(role == WebSocketRole::server ? WebSocketRole::client : WebSocketRole::server, limits);
  run.feed(frames);
  require(run.outcome().fault == 0 && !run.outcome().partial && run.outcome().events.empty(), "frames without a fault");
  require(run.outcome().data == packets, "the packets that were framed");
}

constexpr std::array<Limits, 2> deflate_limits{Limits{64, 16, 64}, Limits{4000, 100, 4000}};
constexpr std::array<Limits, 3> limit_sets{Limits{}, Limits{64, 16, 64}, Limits{0xffffffff, 65535, 0xffffffff}};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const WebSocketRole role = data[0] % 2 == 0 ? WebSocketRole::server : WebSocketRole::client;
  std::mt19937 random(data[1]);
  const View stream(reinterpret_cast<const std::byte*>(data) + 2, size - 2);
  if (data[0] >= 192) {
    check_framing(role, stream, random);
  } else if (data[0] >= 160) {
    check_deflating(role, stream, random);
  } else if (data[0] >= 128) {
    check_reading(role, deflate_limits[data[0] / 2 % deflate_limits.size()], stream, random, 5000);
  } else {
    check_reading(role, limit_sets[data[0] / 2 % limit_sets.size()], stream, random, 0);
  }
  return 0;
}
