// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <msgtrans/wire/header.hpp>

namespace msgtrans {

using wire::Compression;

/// How payloads are compressed on their way out; unless told otherwise they are not. What does not get smaller is sent
/// as it is, and so is what there is no memory to compress. Receiving takes both codecs whatever this says.
struct CompressionOptions {
  Compression codec = Compression::none;
  /// Payloads of fewer bytes are sent as they are. 0 to 1 GiB.
  std::uint32_t threshold = 512;
  /// On the codec's own scale; 0: its default (zstd 3, zlib 6). zstd: ZSTD_minCLevel() to ZSTD_maxCLevel(); zlib: 1
  /// to 9. The working memory of high levels of zstd, where it is over 4 MiB, is taken anew for each message.
  int level = 0;
};

/// For a message that is sent as it is, whatever its session does.
inline constexpr CompressionOptions no_compression{};

}  // namespace msgtrans
