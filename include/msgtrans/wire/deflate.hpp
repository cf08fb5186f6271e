// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <span>
#include <utility>
#include <zlib.h>

/// \file
/// The compression of WebSocket's permessage-deflate (RFC 7692) where each message stands for itself: nothing is kept
/// from one to the next, so that a thread needs one stream for each direction, and a session at rest none.

namespace msgtrans::wire {

/// Of the windows there are, in bits; zlib cannot compress with one of 8.
inline constexpr int least_window_bits = 8;
inline constexpr int least_deflate_window_bits = 9;
inline constexpr int most_window_bits = 15;

namespace detail {

/// What ends the data of a message and is not sent (RFC 7692, 7.2.1).
inline constexpr std::array<std::byte, 4> deflate_tail{std::byte{0x00}, std::byte{0x00}, std::byte{0xff},
                                                       std::byte{0xff}};

/// A message on its way in. About 8 KiB, and the window of 32 KiB once something was put.
class Inflater {
 public:
  /// Throws std::bad_alloc.
  Inflater() {
    if (inflateInit2(&stream_, -most_window_bits) != Z_OK) throw std::bad_alloc();
  }
  ~Inflater() { inflateEnd(&stream_); }
  Inflater(const Inflater&) = delete;
  Inflater& operator=(const Inflater&) = delete;

  void begin() noexcept {
    inflateReset(&stream_);
    at_boundary_ = true;
  }

  /// Takes from the front of `in` and puts to the front of `out`, which is not empty, until one of them is used up;
  /// both are moved on. Where there is room left, nothing more can be had from what was taken. Throws std::bad_alloc.
  /// \returns false if this is no DEFLATE.
  [[nodiscard]] bool run(std::span<const std::byte>& in, std::span<std::byte>& out) {
    constexpr std::size_t most = std::numeric_limits<uInt>::max();
    for (;;) {
      // zlib's pointer is not const unless ZLIB_CONST is set; inflate() does not write through it.
      stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(in.data()));
      const auto size = static_cast<uInt>(std::min(in.size(), most));
      stream_.avail_in = size;
      stream_.next_out = reinterpret_cast<Bytef*>(out.data());
      const auto room = static_cast<uInt>(std::min(out.size(), most));
      stream_.avail_out = room;
      const int result = inflate(&stream_, Z_SYNC_FLUSH);
      in = in.subspan(size - stream_.avail_in);
      out = out.subspan(room - stream_.avail_out);
      switch (result) {
        case Z_OK: at_boundary_ = (stream_.data_type & 128) != 0; break;  // just behind the end of a block
        case Z_STREAM_END: begin(); break;  // a block that says it is the last; others may follow (RFC 7692, 7.2.3.4)
        case Z_BUF_ERROR: return true;      // nothing left to do
        case Z_MEM_ERROR: throw std::bad_alloc();
        default: return false;
      }
      if (in.empty() || out.empty()) return true;
    }
  }

  /// True if what was taken ends with a block.
  [[nodiscard]] bool at_boundary() const noexcept { return at_boundary_; }
  /// After `run` has returned false.
  [[nodiscard]] const char* reason() const noexcept {
    return stream_.msg != nullptr ? stream_.msg : "not a DEFLATE stream";
  }

 private:
  z_stream stream_{};
  bool at_boundary_ = true;
};

/// A message on its way out. Up to 268 KiB.
class Deflater {
 public:
  /// \param level  0 for zlib's default. Throws std::bad_alloc.
  Deflater(int level, int window_bits) : level_(level), window_bits_(window_bits) {
    constexpr int memory = 8;  // zlib's default
    if (deflateInit2(&stream_, level == 0 ? Z_DEFAULT_COMPRESSION : level, Z_DEFLATED, -window_bits, memory,
                     Z_DEFAULT_STRATEGY) != Z_OK) {
      throw std::bad_alloc();
    }
  }
  ~Deflater() { deflateEnd(&stream_); }
  Deflater(const Deflater&) = delete;
  Deflater& operator=(const Deflater&) = delete;

  [[nodiscard]] bool is(int level, int window_bits) const noexcept {
    return level == level_ && window_bits == window_bits_;
  }

  /// Begins a message, which is put to `out`: at most 4 GiB.
  void begin(std::span<std::byte> out) noexcept {
    deflateReset(&stream_);
    stream_.next_out = reinterpret_cast<Bytef*>(out.data());
    room_ = static_cast<uInt>(std::min<std::size_t>(out.size(), std::numeric_limits<uInt>::max()));
    stream_.avail_out = room_;
  }
  /// At most 4 GiB. \returns false if there is no room for it.
  bool add(std::span<const std::byte> in) noexcept { return run(in, Z_NO_FLUSH); }
  /// \returns the message's size, without what is not sent of it; 0 if there was no room for all and one byte more.
  std::size_t finish() noexcept { return run({}, Z_SYNC_FLUSH) ? room_ - stream_.avail_out - deflate_tail.size() : 0; }

 private:
  bool run(std::span<const std::byte> in, int flush) noexcept {
    stream_.next_in = reinterpret_cast<Bytef*>(const_cast<std::byte*>(in.data()));
    stream_.avail_in = static_cast<uInt>(in.size());
    deflate(&stream_, flush);
    return stream_.avail_out != 0;
  }

  z_stream stream_{};
  uInt room_ = 0;
  int level_;
  int window_bits_;
};

/// The streams of a thread. An inflater is lent for as long as a message is on its way in, which may be longer than one
/// read and end on another thread.
class DeflateStreams {
 public:
  DeflateStreams() = default;
  DeflateStreams(const DeflateStreams&) = delete;
  DeflateStreams& operator=(const DeflateStreams&) = delete;
  ~DeflateStreams() { gone_ = true; }

  /// At the beginning of a message. Throws std::bad_alloc.
  [[nodiscard]] static std::unique_ptr<Inflater> lend_inflater() {
    auto inflater = gone_ ? nullptr : std::move(of_this_thread().inflater_);
    if (!inflater) return std::make_unique<Inflater>();
    inflater->begin();
    return inflater;
  }
  static void give_back(std::unique_ptr<Inflater> inflater) noexcept {
    if (inflater && !gone_) of_this_thread().inflater_ = std::move(inflater);
  }

  /// Until the next call; null if there is no memory, or the thread ends.
  [[nodiscard]] static Deflater* deflater(int level, int window_bits) noexcept {
    if (gone_) return nullptr;
    auto& deflater = of_this_thread().deflater_;
    if (deflater && deflater->is(level, window_bits)) return deflater.get();
    deflater.reset();
    try {
      deflater = std::make_unique<Deflater>(level, window_bits);
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
    return deflater.get();
  }

 private:
  static DeflateStreams& of_this_thread() noexcept {
    thread_local DeflateStreams streams;
    return streams;
  }

  static inline constinit thread_local bool gone_ = false;

  std::unique_ptr<Inflater> inflater_;
  std::unique_ptr<Deflater> deflater_;
};

}  // namespace detail

}  // namespace msgtrans::wire
