// SPDX-License-Identifier: Apache-2.0
// The reader of WebSocket frames against itself and against a plain reading of RFC 6455: one stream, read whole, byte
// by byte, and in pieces, must give the same packets, events and fault. And packets that are framed must be read again.
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

/// The documents, read plainly: whole frames only, no state but the message.
class Reference {
 public:
  Reference(WebSocketRole role, const Limits& limits) : server_(role == WebSocketRole::server), limits_(limits) {}

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
    if (first / 16 % 8 != 0) return fault(1002);
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
      if (opcode == 2) message_.clear();
      in_message_ = true;
      if (length > most - message_.size()) return fault(1009);
      const std::uint64_t size = message_.size() + length;
      if (message_.size() >= 16 && !fits(message_, size, final)) return 1;
      if (final && size < 16) return fault(1002);
    }
    Bytes payload(in.begin() + static_cast<std::ptrdiff_t>(head),
                  in.begin() + static_cast<std::ptrdiff_t>(std::min<std::uint64_t>(in.size(), head + length)));
    if (masked) {
      for (std::size_t i = 0; i < payload.size(); ++i) payload[i] ^= in[head - 4 + i % 4];
    }
    if (!control) {
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
  bool in_message_ = false;
  bool closed_ = false;
  Limits limits_;
  Bytes message_;
  Outcome outcome_;
};

class Run {
 public:
  Run(WebSocketRole role, const Limits& limits) : reader_(role, limits) {}

  /// Reads a copy of exactly these bytes, in place: reading or writing beyond is seen by the sanitizer.
  void feed(View bytes) {
    Bytes buffer(bytes.begin(), bytes.end());
    View in = buffer;
    std::byte* out = buffer.data();
    for (;;) {
      std::byte* const from = out;
      const FrameReader::Event event = reader_.read(in, out);
      require(out - buffer.data() <= in.data() - buffer.data(), "no more is yielded than was taken");
      outcome_.data.insert(outcome_.data.end(), from, out);
      switch (event) {
        case FrameReader::Event::need_more:
          require(in.empty(), "all was taken");
          outcome_.partial = reader_.has_partial();
          return;
        case FrameReader::Event::ping: add(9); break;
        case FrameReader::Event::pong: add(10); break;
        case FrameReader::Event::close: add(8); break;
        case FrameReader::Event::violation:
          outcome_.fault = reader_.violation_code();
          outcome_.text = reader_.error().text;
          outcome_.partial = false;
          require(is_protocol_error(reader_.error().code) && !outcome_.text.empty(), "a fault is a protocol error");
          return;
      }
    }
  }

  [[nodiscard]] const Outcome& outcome() const { return outcome_; }

 private:
  void add(int opcode) {
    const View payload = reader_.control_payload();
    outcome_.events.push_back({outcome_.data.size(), opcode, {payload.begin(), payload.end()}});
  }

  FrameReader reader_;
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

void check_reading(WebSocketRole role, const Limits& limits, View stream, std::mt19937& random) {
  Run whole(role, limits);
  whole.feed(stream);
  require_same(whole.outcome(), Reference(role, limits).read(stream), "as the documents say");

  Run single(role, limits);
  for (std::size_t i = 0; i < stream.size(); ++i) single.feed(stream.subspan(i, 1));
  require_same(whole.outcome(), single.outcome(), "byte by byte as whole");
  require(whole.outcome().text == single.outcome().text, "the same text");

  Run pieces(role, limits);
  const std::size_t largest = std::size_t{1} << (random() % 12);
  for (std::size_t at = 0; at < stream.size();) {
    const std::size_t count = std::min(stream.size() - at, 1 + random() % largest);
    pieces.feed(stream.subspan(at, count));
    at += count;
  }
  require_same(whole.outcome(), pieces.outcome(), "in pieces as whole");
}

/// The packets that the stream begins with, framed in pieces and read again.
void check_framing(WebSocketRole role, View stream, std::mt19937& random) {
  BufferPool pool;
  const Limits limits;
  Decoder decoder(limits, pool);
  decoder.feed(stream);
  PacketView view;
  Bytes packets;
  while (decoder.next(view) == Decoder::Status::packet) {
    packets.insert(packets.end(), view.bytes.begin(), view.bytes.end());
  }
  decoder.clear();

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
  } else {
    check_reading(role, limit_sets[data[0] / 2 % limit_sets.size()], stream, random);
  }
  return 0;
}
