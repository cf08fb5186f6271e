// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/wire/header.hpp>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <vector>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

namespace msgtrans::wire {

/// The codec's own default level (3 for zstd, 6 for zlib).
inline constexpr int default_compression_level = std::numeric_limits<int>::min();

namespace detail {

/// The codecs' working memory, kept by each thread between calls: making it anew costs more than a small payload.
class CodecContexts {
 public:
  CodecContexts() = default;
  CodecContexts(const CodecContexts&) = delete;
  CodecContexts& operator=(const CodecContexts&) = delete;
  ~CodecContexts() {
    gone_ = true;
    if (inflate_ready_) inflateEnd(&inflate_);
    if (deflate_ready_) deflateEnd(&deflate_);
  }

  static CodecContexts& of_this_thread() {
    thread_local CodecContexts contexts;
    return contexts;
  }

  /// True while the thread ends, for what it destroys later than this.
  [[nodiscard]] static bool gone() noexcept { return gone_; }

  ZSTD_DCtx* zstd_decoder() {
    if (!zstd_decoder_) zstd_decoder_.reset(ZSTD_createDCtx());
    if (!zstd_decoder_) throw std::bad_alloc();
    return zstd_decoder_.get();
  }

  ZSTD_CCtx* zstd_encoder() {
    if (!zstd_encoder_) zstd_encoder_.reset(ZSTD_createCCtx());
    if (!zstd_encoder_) throw std::bad_alloc();
    return zstd_encoder_.get();
  }

  z_stream& inflater() {
    if (!inflate_ready_) {
      inflate_ = {};
      if (inflateInit(&inflate_) != Z_OK) throw std::bad_alloc();
      inflate_ready_ = true;
    } else {
      inflateReset(&inflate_);
    }
    return inflate_;
  }

  z_stream& deflater(int level) {
    if (deflate_ready_ && level != deflate_level_) {
      deflateEnd(&deflate_);
      deflate_ready_ = false;
    }
    if (!deflate_ready_) {
      deflate_ = {};
      if (deflateInit(&deflate_, level) != Z_OK) throw std::bad_alloc();
      deflate_ready_ = true;
      deflate_level_ = level;
    } else {
      deflateReset(&deflate_);
    }
    return deflate_;
  }

  /// Memory for the output of `SmallerPayload`; null if there is none.
  std::unique_ptr<std::byte[]> lend(std::size_t size) noexcept {
    if (size <= kept_output) {
      if (output_) return std::move(output_);
      size = kept_output;
    }
    return std::unique_ptr<std::byte[]>(new (std::nothrow) std::byte[size]);
  }
  void give_back(std::unique_ptr<std::byte[]> memory, std::size_t size) noexcept {
    if (size <= kept_output) output_ = std::move(memory);
  }

  /// A frame with a large window makes zstd take that window; between calls a thread keeps only ordinary contexts.
  void trim() noexcept {
    if (zstd_decoder_ && ZSTD_sizeof_DCtx(zstd_decoder_.get()) > kept_bytes) zstd_decoder_.reset();
    if (zstd_encoder_ && ZSTD_sizeof_CCtx(zstd_encoder_.get()) > kept_bytes) zstd_encoder_.reset();
  }

 private:
  static constexpr std::size_t kept_bytes = std::size_t{4} << 20;
  static constexpr std::size_t kept_output = std::size_t{64} << 10;

  struct Free {
    void operator()(ZSTD_DCtx* context) const noexcept { ZSTD_freeDCtx(context); }
    void operator()(ZSTD_CCtx* context) const noexcept { ZSTD_freeCCtx(context); }
  };

  static inline constinit thread_local bool gone_ = false;

  std::unique_ptr<ZSTD_DCtx, Free> zstd_decoder_;
  std::unique_ptr<ZSTD_CCtx, Free> zstd_encoder_;
  z_stream inflate_{};
  z_stream deflate_{};
  bool inflate_ready_ = false;
  bool deflate_ready_ = false;
  int deflate_level_ = 0;
  std::unique_ptr<std::byte[]> output_;
};

/// Output that grows with what was really produced, up to one byte over the limit: that byte tells "too large" from
/// "exactly the limit".
class GrowingOutput {
 public:
  GrowingOutput(std::vector<std::byte>& out, std::size_t limit, std::size_t first)
      : out_(out), limit_(limit), most_(limit < out.max_size() ? limit + 1 : out.max_size()) {
    out_.resize(std::min(most_, std::max(first, std::size_t{64})));
  }

  std::byte* room() noexcept { return out_.data() + produced_; }
  [[nodiscard]] std::size_t room_size() const noexcept { return out_.size() - produced_; }
  void produced(std::size_t count) noexcept { produced_ += count; }
  [[nodiscard]] bool over_limit() const noexcept { return produced_ > limit_; }
  void grow() { out_.resize(out_.size() > most_ / 2 ? most_ : 2 * out_.size()); }
  void finish() { out_.resize(produced_); }

 private:
  std::vector<std::byte>& out_;
  std::size_t limit_;
  std::size_t most_;
  std::size_t produced_ = 0;
};

inline Error decompressed_too_large(const char* codec, std::size_t limit) {
  return {Errc::decompressed_too_large, std::string("payload (") + codec + ") decompresses to more than the limit of " +
                                            std::to_string(limit) + " bytes"};
}

inline Error decompression_failed(const char* codec, const std::string& reason) {
  return {Errc::decompression_failed, std::string("payload (") + codec + ") does not decompress: " + reason};
}

inline std::optional<Error> zstd_decompress(std::span<const std::byte> in, std::size_t limit,
                                            std::vector<std::byte>& out) {
  ZSTD_DCtx* const context = CodecContexts::of_this_thread().zstd_decoder();
  ZSTD_DCtx_reset(context, ZSTD_reset_session_only);
  const ZSTD_bounds bounds = ZSTD_dParam_getBounds(ZSTD_d_windowLogMax);
  const int limit_log = limit <= 1 ? 0 : static_cast<int>(std::bit_width(limit - 1));
  ZSTD_DCtx_setParameter(context, ZSTD_d_windowLogMax,
                         std::clamp(std::max(23, limit_log), bounds.lowerBound, bounds.upperBound));

  // The announced size is only a hint, and only as far as a good ratio makes it likely: with room for all of it zstd
  // writes into `out` without a window of its own.
  std::size_t first = 4 * std::min(in.size(), limit);
  const unsigned long long announced = ZSTD_getFrameContentSize(in.data(), in.size());
  if (announced != ZSTD_CONTENTSIZE_UNKNOWN && announced != ZSTD_CONTENTSIZE_ERROR) {
    first = static_cast<std::size_t>(
        std::min<unsigned long long>(announced, std::max<std::size_t>(4 * first, std::size_t{4096})));
  }
  GrowingOutput output(out, limit, first);

  ZSTD_inBuffer source{in.data(), in.size(), 0};
  bool frame_open = false;
  unsigned long long frame_announced = ZSTD_CONTENTSIZE_UNKNOWN;
  unsigned long long frame_produced = 0;
  // Frames may follow one another (RFC 8878, section 3); the limit is on their sum.
  while (frame_open || source.pos < source.size) {
    if (!frame_open) {
      frame_announced = ZSTD_getFrameContentSize(in.data() + source.pos, source.size - source.pos);
      frame_produced = 0;
    }
    if (output.room_size() == 0) output.grow();
    ZSTD_outBuffer target{output.room(), output.room_size(), 0};
    const std::size_t result = ZSTD_decompressStream(context, &target, &source);
    if (ZSTD_isError(result) != 0) return decompression_failed("zstd", ZSTD_getErrorName(result));
    output.produced(target.pos);
    if (output.over_limit()) return decompressed_too_large("zstd", limit);
    frame_open = result != 0;
    frame_produced += target.pos;
    // zstd itself checks this or not depending on the room it was given (a frame that ends in an empty block).
    if (!frame_open && frame_announced != ZSTD_CONTENTSIZE_UNKNOWN && frame_produced != frame_announced) {
      return decompression_failed("zstd", "a frame of " + std::to_string(frame_produced) + " bytes announced " +
                                              std::to_string(frame_announced));
    }
    if (frame_open && source.pos == source.size && target.pos == 0) {
      return decompression_failed("zstd", "incomplete frame");
    }
  }
  output.finish();
  return std::nullopt;
}

inline std::optional<Error> zlib_decompress(std::span<const std::byte> in, std::size_t limit,
                                            std::vector<std::byte>& out) {
  constexpr std::size_t most = std::numeric_limits<uInt>::max();
  z_stream& stream = CodecContexts::of_this_thread().inflater();
  GrowingOutput output(out, limit, 4 * std::min(in.size(), limit));

  std::span<const std::byte> rest = in;
  stream.avail_in = 0;
  for (;;) {
    if (stream.avail_in == 0 && !rest.empty()) {
      const std::size_t count = std::min(rest.size(), most);
      // zlib's pointer is not const unless ZLIB_CONST is set; inflate() does not write through it.
      stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(rest.data()));
      stream.avail_in = static_cast<uInt>(count);
      rest = rest.subspan(count);
    }
    if (output.room_size() == 0) output.grow();
    const auto room = static_cast<uInt>(std::min(output.room_size(), most));
    stream.next_out = reinterpret_cast<Bytef*>(output.room());
    stream.avail_out = room;
    const int result = inflate(&stream, Z_NO_FLUSH);
    output.produced(room - stream.avail_out);
    if (output.over_limit()) return decompressed_too_large("zlib", limit);
    if (result == Z_STREAM_END) break;
    if (result == Z_NEED_DICT) return decompression_failed("zlib", "preset dictionary needed");
    if (result == Z_MEM_ERROR) throw std::bad_alloc();
    if (result != Z_OK && result != Z_BUF_ERROR) {
      return decompression_failed("zlib", stream.msg != nullptr ? stream.msg : zError(result));
    }
    if (stream.avail_out != 0 && stream.avail_in == 0 && rest.empty()) {
      return decompression_failed("zlib", "incomplete stream");
    }
  }
  if (const std::size_t left = stream.avail_in + rest.size(); left != 0) {
    return decompression_failed("zlib", std::to_string(left) + " bytes after the end of the stream");
  }
  output.finish();
  return std::nullopt;
}

inline std::optional<Error> zstd_compress(std::span<const std::byte> in, std::vector<std::byte>& out, int level) {
  if (level == default_compression_level) level = ZSTD_CLEVEL_DEFAULT;
  if (level < ZSTD_minCLevel() || level > ZSTD_maxCLevel()) {
    return Error{Errc::invalid_option, "compression level (zstd) is " + std::to_string(level) + ", must be " +
                                           std::to_string(ZSTD_minCLevel()) + " to " +
                                           std::to_string(ZSTD_maxCLevel())};
  }
  ZSTD_CCtx* const context = CodecContexts::of_this_thread().zstd_encoder();
  ZSTD_CCtx_reset(context, ZSTD_reset_session_and_parameters);
  ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level);
  out.resize(ZSTD_compressBound(in.size()));
  const std::size_t written = ZSTD_compress2(context, out.data(), out.size(), in.data(), in.size());
  // With room for the worst case and a level in range only memory can run out.
  if (ZSTD_isError(written) != 0) throw std::bad_alloc();
  out.resize(written);
  return std::nullopt;
}

inline std::optional<Error> zlib_compress(std::span<const std::byte> in, std::vector<std::byte>& out, int level) {
  if (level == default_compression_level) level = Z_DEFAULT_COMPRESSION;
  if (level < Z_DEFAULT_COMPRESSION || level > Z_BEST_COMPRESSION) {
    return Error{Errc::invalid_option,
                 "compression level (zlib) is " + std::to_string(level) + ", must be -1 (default) or 0 to 9"};
  }
  constexpr std::size_t most = std::numeric_limits<uInt>::max();
  z_stream& stream = CodecContexts::of_this_thread().deflater(level);
  out.resize(deflateBound(&stream, static_cast<uLong>(in.size())));
  std::span<const std::byte> rest = in;
  std::size_t written = 0;
  stream.avail_in = 0;
  for (int result = Z_OK; result != Z_STREAM_END;) {
    if (stream.avail_in == 0 && !rest.empty()) {
      const std::size_t count = std::min(rest.size(), most);
      stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(rest.data()));
      stream.avail_in = static_cast<uInt>(count);
      rest = rest.subspan(count);
    }
    if (written == out.size()) out.resize(2 * out.size());
    const auto room = static_cast<uInt>(std::min(out.size() - written, most));
    stream.next_out = reinterpret_cast<Bytef*>(out.data() + written);
    stream.avail_out = room;
    result = deflate(&stream, rest.empty() ? Z_FINISH : Z_NO_FLUSH);
    written += room - stream.avail_out;
  }
  out.resize(written);
  return std::nullopt;
}

/// Into a given place. \returns the size, 0 if there is not enough room. Throws std::bad_alloc.
inline std::size_t zstd_compress_into(std::span<const std::byte> in, std::span<std::byte> out, int level) {
  ZSTD_CCtx* const context = CodecContexts::of_this_thread().zstd_encoder();
  ZSTD_CCtx_reset(context, ZSTD_reset_session_and_parameters);
  ZSTD_CCtx_setParameter(context, ZSTD_c_compressionLevel, level);
  const std::size_t written = ZSTD_compress2(context, out.data(), out.size(), in.data(), in.size());
  if (ZSTD_isError(written) == 0) return written;
  if (ZSTD_getErrorCode(written) == ZSTD_error_dstSize_tooSmall) return 0;
  throw std::bad_alloc();
}

inline std::size_t zlib_compress_into(std::span<const std::byte> in, std::span<std::byte> out, int level) {
  constexpr std::size_t most = std::numeric_limits<uInt>::max();
  if (in.size() > most) return 0;
  z_stream& stream = CodecContexts::of_this_thread().deflater(level);
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(in.data()));
  stream.avail_in = static_cast<uInt>(in.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  return deflate(&stream, Z_FINISH) == Z_STREAM_END ? out.size() - stream.avail_out : 0;
}

inline Error unknown_codec(Compression codec) {
  return {Errc::bad_compression, "compression is " + std::to_string(static_cast<unsigned>(codec)) +
                                     ", must be 0 (none), 1 (zstd) or 2 (zlib)"};
}

}  // namespace detail

/// Decompresses the whole of `in`, replacing what `out` holds; `out`'s capacity is used. `none` copies.
///
/// `limit` is the most bytes the result may have, itself allowed, and is enforced while decompressing: `out` grows
/// with what was really produced, by doubling, and never beyond `limit` + 1 bytes; what a frame announces is not
/// believed, but must be true. zstd's window is held to the larger of 8 MiB and `limit` rounded up to a power of
/// two (and to what zstd itself allows). For zstd `in` is one or more frames, for zlib exactly one stream (RFC 1950).
///
/// Errors: `decompressed_too_large` names the limit; `decompression_failed` has the codec's own text (incomplete,
/// garbage before, within or after, empty input, a dictionary needed, a window too large); `bad_compression` for a
/// codec that is none. After an error `out` is empty and holds no memory. Throws std::bad_alloc.
/// Any thread: each keeps its own codec contexts, at most a few MiB. Time is linear in `in` and the output.
[[nodiscard]] inline std::optional<Error> decompress(Compression codec, std::span<const std::byte> in,
                                                     std::size_t limit, std::vector<std::byte>& out) {
  std::optional<Error> error;
  if (codec == Compression::none) {
    if (in.size() > limit) {
      error = detail::decompressed_too_large("none", limit);
    } else {
      out.assign(in.begin(), in.end());
    }
  } else if (codec == Compression::zstd) {
    error =
        in.empty() ? detail::decompression_failed("zstd", "empty payload") : detail::zstd_decompress(in, limit, out);
    detail::CodecContexts::of_this_thread().trim();
  } else if (codec == Compression::zlib) {
    error =
        in.empty() ? detail::decompression_failed("zlib", "empty payload") : detail::zlib_decompress(in, limit, out);
  } else {
    error = detail::unknown_codec(codec);
  }
  if (error) std::vector<std::byte>().swap(out);
  return error;
}

/// Compresses `in`, replacing what `out` holds; the result is never empty, also for an empty `in`. `none` copies.
/// `level` is the codec's own scale: for zstd ZSTD_minCLevel() to ZSTD_maxCLevel(), for zlib 0 to 9.
/// Errors: `invalid_option` names a level out of range, `bad_compression` a codec that is none; `out` is then as it
/// was. Throws std::bad_alloc. Any thread, as `decompress`.
[[nodiscard]] inline std::optional<Error> compress(Compression codec, std::span<const std::byte> in,
                                                   std::vector<std::byte>& out, int level = default_compression_level) {
  if (codec == Compression::none) {
    out.assign(in.begin(), in.end());
    return std::nullopt;
  }
  if (codec == Compression::zstd) {
    std::optional<Error> error = detail::zstd_compress(in, out, level);
    detail::CodecContexts::of_this_thread().trim();
    return error;
  }
  if (codec == Compression::zlib) return detail::zlib_compress(in, out, level);
  return detail::unknown_codec(codec);
}

/// A payload compressed for sending, if that makes it smaller. The bytes lie in memory that this thread lends for as
/// long as the object lives, and keeps between calls if it is at most 64 KiB.
class SmallerPayload {
 public:
  enum class Outcome : std::uint8_t {
    smaller,      ///< `bytes` are fewer than there were
    not_smaller,  ///< it would not get smaller, or by so few bytes that the codec could not tell
    failed,       ///< no memory
  };

  SmallerPayload() noexcept = default;
  SmallerPayload(const SmallerPayload&) = delete;
  SmallerPayload& operator=(const SmallerPayload&) = delete;
  ~SmallerPayload() {
    if (memory_) detail::CodecContexts::of_this_thread().give_back(std::move(memory_), room_);
  }

  /// Once. `level` as for `compress`; one that is out of its range is taken for the nearest that is not.
  /// Time and memory are linear in `in`.
  Outcome compress(Compression codec, std::span<const std::byte> in, int level = default_compression_level) noexcept {
    if (in.size() < 2 || codec == Compression::none) return Outcome::not_smaller;
    if (detail::CodecContexts::gone()) return Outcome::failed;
    try {
      auto& contexts = detail::CodecContexts::of_this_thread();
      room_ = in.size() - 1;
      memory_ = contexts.lend(room_);
      if (!memory_) return Outcome::failed;
      const std::span out(memory_.get(), room_);
      if (codec == Compression::zstd) {
        if (level == default_compression_level) level = ZSTD_CLEVEL_DEFAULT;
        size_ = detail::zstd_compress_into(in, out, std::clamp(level, ZSTD_minCLevel(), ZSTD_maxCLevel()));
        contexts.trim();
      } else if (codec == Compression::zlib) {
        if (level == default_compression_level) level = Z_DEFAULT_COMPRESSION;
        size_ = detail::zlib_compress_into(in, out, std::clamp(level, Z_DEFAULT_COMPRESSION, Z_BEST_COMPRESSION));
      }
    } catch (const std::bad_alloc&) {
      size_ = 0;
      return Outcome::failed;
    }
    return size_ != 0 ? Outcome::smaller : Outcome::not_smaller;
  }

  /// Empty if it did not get smaller.
  [[nodiscard]] std::span<const std::byte> bytes() const noexcept { return {memory_.get(), size_}; }

 private:
  std::unique_ptr<std::byte[]> memory_;
  std::size_t room_ = 0;
  std::size_t size_ = 0;
};

}  // namespace msgtrans::wire
