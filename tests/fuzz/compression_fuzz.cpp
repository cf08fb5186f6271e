// SPDX-License-Identifier: Apache-2.0
// decompress() on anything, and compress() undone by it.
//
// Input: byte 0 picks the codec and what is done, byte 1 the limit, the rest is the payload.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <msgtrans/wire/compression.hpp>
#include <optional>
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

constexpr std::array<std::size_t, 8> limits{0, 1, 64, 1000, 4096, 65536, 1 << 20, 16 << 20};

void check_failure(const Error& error, const Bytes& out, std::size_t limit) {
  require(out.empty() && out.capacity() == 0, "a failure leaves nothing");
  require(is_protocol_error(error.code), "a failure is a protocol error");
  require(!error.text.empty(), "a failure has a text");
  if (error.code == make_error_code(Errc::decompressed_too_large)) {
    require(error.text.find("limit of " + std::to_string(limit) + " bytes") != std::string::npos,
            "an output over the limit names the limit");
  }
}

void check_anything(Compression codec, View in, std::size_t limit) {
  Bytes out(7, std::byte{0xaa});
  const std::optional<Error> error = decompress(codec, in, limit, out);
  if (error) {
    check_failure(*error, out, limit);
    // What is too large for a limit fails for every smaller one too, and what is broken for every larger one.
    Bytes other;
    if (error->code == make_error_code(Errc::decompressed_too_large)) {
      require(decompress(codec, in, limit / 2, other).has_value(), "still too large for a smaller limit");
    } else {
      require(decompress(codec, in, std::max(limit / 2, std::size_t{1}), other).has_value(),
              "broken input fails under a smaller limit too");
    }
    return;
  }
  require(out.size() <= limit, "the output is within the limit");
  // Again, with exactly the room needed and with one byte less.
  Bytes exact;
  if (codec != Compression::zstd || limit <= (std::size_t{8} << 20)) {
    require(!decompress(codec, in, out.size(), exact), "the limit itself is allowed");
    require(exact == out, "the same output under the exact limit");
  }
  if (!out.empty()) {
    Bytes less;
    const std::optional<Error> over = decompress(codec, in, out.size() - 1, less);
    require(over.has_value(), "one byte over the limit is refused");
    check_failure(*over, less, out.size() - 1);
  }
}

void check_round_trip(Compression codec, View in) {
  Bytes packed;
  require(!compress(codec, in, packed), "anything can be compressed");
  require(codec == Compression::none || !packed.empty(), "a codec's result is never empty");
  Bytes out;
  require(!decompress(codec, packed, in.size(), out), "what was compressed decompresses");
  require(std::equal(out.begin(), out.end(), in.begin(), in.end()), "and is the same");
  if (codec == Compression::none) return;
  for (const std::size_t cut : {std::size_t{0}, packed.size() / 2, packed.size() - 1}) {
    require(decompress(codec, View(packed).first(cut), in.size(), out).has_value(), "a prefix is incomplete");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) return 0;
  const auto codec = static_cast<Compression>(data[0] % 3);
  const std::size_t limit = limits[data[1] % limits.size()];
  const View payload(reinterpret_cast<const std::byte*>(data) + 2, size - 2);
  if (data[0] >= 128) {
    check_round_trip(codec, payload);
  } else {
    check_anything(codec, payload, limit);
  }
  return 0;
}
