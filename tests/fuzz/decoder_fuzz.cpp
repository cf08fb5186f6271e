// SPDX-License-Identifier: Apache-2.0
// The decoder against itself and against a plain reading of the document: one stream, fed whole, byte by byte, and in
// pieces with parks, must give the same packets and the same error, and every packet must encode to what it came from.
//
// Input: byte 0 picks the limits, byte 1 seeds the cuts, the rest is the stream.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <msgtrans/wire/decoder.hpp>
#include <msgtrans/wire/encoder.hpp>
#include <optional>
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

struct Packet {
  Header header;
  Bytes extension;
  Bytes payload;
  friend bool operator==(const Packet&, const Packet&) = default;
};

struct Outcome {
  std::vector<Packet> packets;
  std::optional<std::string> error;
  int code = 0;
  std::size_t rest = 0;
  friend bool operator==(const Outcome&, const Outcome&) = default;
};

/// The document, read plainly: no buffers, no views, no words loaded.
Outcome reference(View stream, const Limits& limits) {
  Outcome outcome;
  const auto number = [&stream](std::size_t at, std::size_t size) {
    std::uint64_t value = 0;
    for (std::size_t i = 0; i < size; ++i) value = value * 256 + std::to_integer<std::uint64_t>(stream[at + i]);
    return value;
  };
  while (stream.size() >= 16) {
    std::optional<Errc> fault;
    if (number(0, 1) != 1) {
      fault = Errc::bad_version;
    } else if (number(1, 1) > 2) {
      fault = Errc::bad_compression;
    } else if (number(2, 1) > 2) {
      fault = Errc::bad_type;
    } else if (number(8, 2) > limits.max_extension) {
      fault = Errc::extension_too_large;
    } else if (number(10, 4) > limits.max_payload) {
      fault = Errc::payload_too_large;
    } else if (number(14, 2) % 2 == 1) {
      fault = Errc::fragmented;
    }
    if (fault) {
      outcome.code = static_cast<int>(*fault);
      outcome.error = "";
      return outcome;
    }
    const std::size_t extension = number(8, 2);
    const std::size_t payload = number(10, 4);
    if (stream.size() < 16 + extension + payload) break;
    Packet packet;
    packet.header.compression = static_cast<Compression>(number(1, 1));
    packet.header.type = static_cast<PacketType>(number(2, 1));
    packet.header.biz_type = static_cast<std::uint8_t>(number(3, 1));
    packet.header.message_id = static_cast<std::uint32_t>(number(4, 4));
    packet.header.ext_len = static_cast<std::uint16_t>(extension);
    packet.header.payload_len = static_cast<std::uint32_t>(payload);
    packet.header.flags = static_cast<std::uint16_t>(number(14, 2));
    const View extension_view = stream.subspan(16, extension);
    const View payload_view = stream.subspan(16 + extension, payload);
    packet.extension.assign(extension_view.begin(), extension_view.end());
    packet.payload.assign(payload_view.begin(), payload_view.end());
    outcome.packets.push_back(std::move(packet));
    stream = stream.subspan(16 + extension + payload);
  }
  outcome.rest = stream.size();
  return outcome;
}

void check_reencoded(const PacketView& view) {
  Bytes again;
  append_packet(again, view.header, view.extension, view.payload);
  Bytes original(view.bytes.begin(), view.bytes.end());
  original[14] = std::byte{0};
  original[15] &= std::byte{flags::high_priority | flags::route_tag};
  require(again == original, "a packet encodes to the bytes it came from");
}

class Run {
 public:
  Run(const Limits& limits, std::size_t keep) : pool_(keep), decoder_(limits, pool_) {}

  /// Lends a copy of exactly these bytes that is gone afterwards: reading beyond or later is seen by the sanitizer.
  /// Takes at most `most` packets, then parks.
  void feed(View bytes, std::size_t most = SIZE_MAX) {
    const Bytes lent(bytes.begin(), bytes.end());
    fed_ += bytes.size();
    decoder_.feed(lent);
    PacketView view;
    for (std::size_t i = 0; i < most; ++i) {
      if (!step(view)) return;
    }
    decoder_.park();
    check_memory();
  }

  Outcome finish() {
    PacketView view;
    while (step(view)) {
    }
    if (outcome_.error) {
      require(decoder_.next(view) == Decoder::Status::error, "an error stays");
      require(decoder_.held_bytes() == 0 && !decoder_.has_partial(), "an error keeps nothing");
    } else {
      require(decoder_.next(view) == Decoder::Status::need_more, "the end of the stream stays");
      require(decoder_.has_partial() == (decoder_.buffered_bytes() != 0), "a rest is reported");
    }
    outcome_.rest = decoder_.buffered_bytes();
    return outcome_;
  }

 private:
  bool step(PacketView& view) {
    switch (decoder_.next(view)) {
      case Decoder::Status::packet:
        check_reencoded(view);
        outcome_.packets.push_back(
            {view.header, {view.extension.begin(), view.extension.end()}, {view.payload.begin(), view.payload.end()}});
        return true;
      case Decoder::Status::error:
        outcome_.error = decoder_.error().text;
        outcome_.code = decoder_.error().code.value();
        require(!outcome_.error->empty(), "an error has a text");
        return false;
      case Decoder::Status::need_more:
        require(decoder_.held_bytes() <=
                    (decoder_.buffered_bytes() == 0 ? 0 : std::max<std::size_t>(256, 4 * decoder_.buffered_bytes())),
                "memory is in proportion to the bytes kept");
        return false;
    }
    return false;
  }

  void check_memory() const {
    require(decoder_.held_bytes() <= std::max<std::size_t>(256, 4 * fed_), "memory is in proportion to the bytes fed");
  }

  BufferPool pool_;
  Decoder decoder_;
  Outcome outcome_;
  std::size_t fed_ = 0;
};

constexpr std::array<Limits, 4> limit_sets{Limits{}, Limits{64, 16, 64}, Limits{0, 0, 0},
                                           Limits{0xffffffff, 65535, 0xffffffff}};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const Limits& limits = limit_sets[data[0] % limit_sets.size()];
  std::mt19937 random(data[1]);
  const View stream(reinterpret_cast<const std::byte*>(data) + 2, size - 2);

  Run whole(limits, 1 << 20);
  whole.feed(stream);
  const Outcome expected = whole.finish();

  Outcome plain = reference(stream, limits);
  require(plain.error.has_value() == expected.error.has_value(), "an error exactly where the document has one");
  plain.error = expected.error;
  require(plain == expected, "the packets of the document");

  Run single(limits, 1 << 20);
  for (std::size_t i = 0; i < stream.size(); ++i) single.feed(stream.subspan(i, 1));
  require(single.finish() == expected, "byte by byte as whole");

  Run pieces(limits, random() % 2 == 0 ? 0 : 4096);
  const std::size_t largest = std::size_t{1} << (random() % 12);
  for (std::size_t at = 0; at < stream.size();) {
    const std::size_t count = std::min(stream.size() - at, 1 + random() % largest);
    pieces.feed(stream.subspan(at, count), random() % 2 == 0 ? random() % 4 : SIZE_MAX);
    at += count;
  }
  require(pieces.finish() == expected, "in pieces with parks as whole");
  return 0;
}
