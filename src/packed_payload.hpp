// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <msgtrans/bytes_view.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/wire/compression.hpp>
#include <optional>

namespace msgtrans::detail {

/// What was made of a payload, for the counters.
struct Packing {
  std::uint32_t tried = 0;  // the bytes that were to become fewer; 0: it was not tried
  Compression codec = Compression::none;
};

/// False for nearly all messages: then there is nothing to think about.
[[nodiscard]] inline bool may_pack(const SessionOptions& session,
                                   const std::optional<CompressionOptions>& own) noexcept {
  return (own ? own->codec : session.compression.codec) != Compression::none;
}

/// How a message of that size is compressed when sent by that session; codec `none`: it is not.
[[nodiscard]] inline CompressionOptions packing_of(const SessionOptions& session,
                                                   const std::optional<CompressionOptions>& own,
                                                   std::size_t size) noexcept {
  const CompressionOptions& how = own ? *own : session.compression;
  if (how.codec == Compression::none || size == 0 || size < how.threshold) return {};
  if (size > session.max_decompressed) return {};  // a peer with the same limits would not take it
  return how;
}

/// A payload on its way out: the caller's, or what it was compressed to on the calling thread.
class PackedPayload {
 public:
  PackedPayload(const CompressionOptions& how, BytesView payload) noexcept : bytes_(payload) {
    if (how.codec != Compression::none) pack(how);
  }

  [[nodiscard]] BytesView bytes() const noexcept { return bytes_; }
  [[nodiscard]] Packing packing() const noexcept { return packing_; }

 private:
  void pack(const CompressionOptions& how) noexcept {
    using Outcome = wire::SmallerPayload::Outcome;
    const int level = how.level == 0 ? wire::default_compression_level : how.level;
    const auto outcome = smaller_.compress(how.codec, bytes_, level);
    if (outcome == Outcome::failed) return;
    packing_.tried = static_cast<std::uint32_t>(bytes_.size());
    if (outcome == Outcome::not_smaller) return;
    packing_.codec = how.codec;
    bytes_ = smaller_.bytes();
  }

  BytesView bytes_;
  Packing packing_;
  wire::SmallerPayload smaller_;
};

}  // namespace msgtrans::detail
