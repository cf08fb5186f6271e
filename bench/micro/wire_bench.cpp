// SPDX-License-Identifier: Apache-2.0

// wire/ against the least code that can do the work, in one binary: what the decoder's and encoder's checks, views and
// buffers cost a packet. Every benchmark reports items_per_second, an item being a packet, and each pair ("..., limit"
// and "...") does the same work on the same bytes.

#include <algorithm>
#include <array>
#include <benchmark/benchmark.h>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <msgtrans/wire/buffer_pool.hpp>
#include <msgtrans/wire/decoder.hpp>
#include <msgtrans/wire/encoder.hpp>
#include <msgtrans/wire/header.hpp>
#include <span>
#include <vector>

namespace {

namespace wire = msgtrans::wire;

constexpr std::size_t read_size = 65536;

/// As many whole packets of `payload` bytes as `bytes` holds, at least one.
std::vector<std::byte> make_stream(std::size_t payload, std::size_t bytes) {
  std::vector<std::byte> stream;
  const std::vector<std::byte> body(payload, std::byte{0x5A});
  wire::Header header;
  header.type = wire::PacketType::request;
  header.biz_type = 7;
  do {
    ++header.message_id;
    wire::append_packet(stream, header, {}, body);
  } while (stream.size() + wire::packet_size(0, payload) <= bytes);
  return stream;
}

struct Sums {
  std::uint64_t packets = 0;
  std::uint64_t ids = 0;
  std::uint64_t bytes = 0;
};

// What a handler must learn of a packet: whose it is and where its payload lies. The payload itself is not read.
void count(Sums& sums, const wire::PacketView& packet) {
  ++sums.packets;
  sums.ids += packet.header.message_id + packet.header.biz_type;
  sums.bytes += packet.payload.size();
  benchmark::DoNotOptimize(packet.payload.data());
}

/// Fails the benchmark if the work was not done.
bool complete(benchmark::State& state, const Sums& sums, std::uint64_t packets, std::uint64_t payload) {
  if (sums.packets == packets && sums.bytes == packets * payload) return true;
  state.SkipWithError("not every packet was decoded");
  return false;
}

std::uint32_t load_be32(const std::byte* from) noexcept {
  std::uint32_t value = 0;
  std::memcpy(&value, from, sizeof value);
  return __builtin_bswap32(value);
}

std::uint16_t load_be16(const std::byte* from) noexcept {
  std::uint16_t value = 0;
  std::memcpy(&value, from, sizeof value);
  return __builtin_bswap16(value);
}

// The limit: one read that holds whole packets only, by a loop that checks what the protocol demands and keeps nothing.
void decode_limit(benchmark::State& state) {
  const auto payload = static_cast<std::size_t>(state.range(0));
  const std::vector<std::byte> stream = make_stream(payload, read_size);
  const std::uint64_t packets = stream.size() / wire::packet_size(0, payload);
  for (auto _ : state) {
    Sums sums;
    const std::byte* at = stream.data();
    const std::byte* const end = at + stream.size();
    while (end - at >= 16) {
      const std::size_t extension = load_be16(at + 8);
      const std::size_t body = load_be32(at + 10);
      const auto version = std::to_integer<unsigned>(at[0]);
      const auto compression = std::to_integer<unsigned>(at[1]);
      const auto type = std::to_integer<unsigned>(at[2]);
      const auto fragmented = std::to_integer<unsigned>(at[15]) & 1U;
      if (version != 1 || compression > 2 || type > 2 || fragmented != 0 || body > (16U << 20)) break;
      const std::size_t size = 16 + extension + body;
      if (static_cast<std::size_t>(end - at) < size) break;
      ++sums.packets;
      sums.ids += load_be32(at + 4) + std::to_integer<unsigned>(at[3]);
      sums.bytes += body;
      benchmark::DoNotOptimize(at + 16 + extension);
      at += size;
    }
    benchmark::DoNotOptimize(sums.ids);
    if (!complete(state, sums, packets, payload)) return;
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(packets) * state.iterations());
}

void decode(benchmark::State& state) {
  const auto payload = static_cast<std::size_t>(state.range(0));
  const std::vector<std::byte> stream = make_stream(payload, read_size);
  const std::uint64_t packets = stream.size() / wire::packet_size(0, payload);
  wire::BufferPool pool;
  wire::Decoder decoder(wire::Limits{}, pool);
  for (auto _ : state) {
    Sums sums;
    wire::PacketView packet;
    decoder.feed(stream);
    while (decoder.next(packet) == wire::Decoder::Status::packet) count(sums, packet);
    benchmark::DoNotOptimize(sums.ids);
    if (!complete(state, sums, packets, payload)) return;
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(packets) * state.iterations());
}

// The same bytes in reads of `range(1)` bytes, so that packets are cut, each time at another place.
void decode_cut(benchmark::State& state) {
  const auto payload = static_cast<std::size_t>(state.range(0));
  const auto piece = static_cast<std::size_t>(state.range(1));
  const std::vector<std::byte> stream = make_stream(payload, std::size_t{4} * read_size);
  const std::uint64_t packets = stream.size() / wire::packet_size(0, payload);
  wire::BufferPool pool;
  wire::Decoder decoder(wire::Limits{}, pool);
  for (auto _ : state) {
    Sums sums;
    wire::PacketView packet;
    for (std::span<const std::byte> rest = stream; !rest.empty();) {
      const auto part = rest.first(std::min(piece, rest.size()));
      rest = rest.subspan(part.size());
      decoder.feed(part);
      while (decoder.next(packet) == wire::Decoder::Status::packet) count(sums, packet);
    }
    benchmark::DoNotOptimize(sums.ids);
    if (!complete(state, sums, packets, payload)) return;
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(packets) * state.iterations());
  state.SetBytesProcessed(static_cast<std::int64_t>(stream.size()) * state.iterations());
}

// The limit of the encoder: a header and a payload written behind one another into memory that is there.
void encode_limit(benchmark::State& state) {
  const auto payload = static_cast<std::size_t>(state.range(0));
  const std::vector<std::byte> body(payload, std::byte{0x5A});
  const std::size_t size = 16 + payload;
  const std::size_t packets = std::max<std::size_t>(read_size / size, 1);
  std::vector<std::byte> out(packets * size);
  std::uint32_t id = 0;
  for (auto _ : state) {
    std::byte* at = out.data();
    for (std::size_t i = 0; i < packets; ++i) {
      const std::uint32_t big_id = __builtin_bswap32(++id);
      const std::uint32_t big_size = __builtin_bswap32(static_cast<std::uint32_t>(payload));
      std::array<std::byte, 16> header{std::byte{1}, std::byte{0}, std::byte{1}, std::byte{7}};
      std::memcpy(header.data() + 4, &big_id, 4);
      std::memcpy(header.data() + 10, &big_size, 4);
      std::memcpy(at, header.data(), header.size());
      if (payload != 0) std::memcpy(at + 16, body.data(), payload);
      at += size;
    }
    benchmark::DoNotOptimize(out.data());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(packets) * state.iterations());
}

// The same by append_packet, as a session gathers what it sends; the vector is reused.
void encode(benchmark::State& state) {
  const auto payload = static_cast<std::size_t>(state.range(0));
  const std::vector<std::byte> body(payload, std::byte{0x5A});
  const std::size_t packets = std::max<std::size_t>(read_size / (16 + payload), 1);
  std::vector<std::byte> out;
  wire::Header header;
  header.type = wire::PacketType::request;
  header.biz_type = 7;
  for (auto _ : state) {
    out.clear();
    for (std::size_t i = 0; i < packets; ++i) {
      ++header.message_id;
      wire::append_packet(out, header, {}, body);
    }
    benchmark::DoNotOptimize(out.data());
    benchmark::ClobberMemory();
  }
  if (out.size() != packets * (16 + payload)) state.SkipWithError("not every packet was encoded");
  state.SetItemsProcessed(static_cast<std::int64_t>(packets) * state.iterations());
}

void encode_header_alone(benchmark::State& state) {
  wire::Header header;
  header.type = wire::PacketType::request;
  header.payload_len = 64;
  std::array<std::byte, wire::header_size> out{};
  for (auto _ : state) {
    ++header.message_id;
    wire::encode_header(header, out);
    benchmark::DoNotOptimize(out);
  }
  state.SetItemsProcessed(state.iterations());
}

void decode_header_alone(benchmark::State& state) {
  wire::Header header;
  header.type = wire::PacketType::request;
  header.payload_len = 64;
  std::array<std::byte, wire::header_size> bytes{};
  wire::encode_header(header, bytes);
  for (auto _ : state) {
    benchmark::DoNotOptimize(bytes);
    if (wire::decode_header(bytes, wire::Limits{}, header)) {
      state.SkipWithError("a good header was refused");
      return;
    }
    benchmark::DoNotOptimize(header);
  }
  state.SetItemsProcessed(state.iterations());
}

constexpr std::array payloads{0, 64, 1024};

void each_payload(benchmark::internal::Benchmark* bench) {
  for (const int payload : payloads) bench->Arg(payload);
}

BENCHMARK(decode_limit)->Name("decode a 64 KiB read, limit")->ArgName("payload")->Apply(each_payload);
BENCHMARK(decode)->Name("decode a 64 KiB read")->ArgName("payload")->Apply(each_payload);
BENCHMARK(decode_cut)
    ->Name("decode a cut stream")
    ->ArgNames({"payload", "read"})
    ->Args({64, 1})
    ->Args({64, 100})
    ->Args({64, 1448})
    ->Args({1024, 1448})
    ->Args({65536, 16384})
    ->Args({65536, 65536});
BENCHMARK(encode_limit)->Name("encode 64 KiB, limit")->ArgName("payload")->Apply(each_payload);
BENCHMARK(encode)->Name("encode 64 KiB")->ArgName("payload")->Apply(each_payload);
BENCHMARK(encode_header_alone)->Name("encode a header");
BENCHMARK(decode_header_alone)->Name("decode a header");

}  // namespace

BENCHMARK_MAIN();
