// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/wire/buffer_pool.hpp>
#include <msgtrans/wire/header.hpp>
#include <span>
#include <utility>

namespace msgtrans::wire {

/// One whole packet, seen in memory that belongs to someone else.
struct PacketView {
  Header header;
  std::span<const std::byte> extension;
  std::span<const std::byte> payload;  ///< as on the wire, so still compressed if `header.compression` says so
  std::span<const std::byte> bytes;    ///< the whole packet
};

/// Cuts a byte stream into packets.
///
/// `feed` lends the bytes of one read; `next`, called until it no longer says `packet`, yields each whole packet as a
/// view. A packet that lies whole in the lent bytes is not copied; one that is cut over several reads is put together
/// in a buffer of the decoder's own, from the pool. That buffer grows with the bytes that came, never with the length
/// that was announced (at most four times the bytes that came, and at least 256), and goes back to the pool when it is
/// empty: an idle decoder holds no memory.
///
/// A view is valid until the next call of `next`, `feed` or `park`. Lent bytes must stay valid until `next` says
/// `need_more` or `error`, or until `park`.
///
/// Total work is linear in the bytes fed, however they are cut, parked or not. Not thread-safe; the pool must outlive
/// the decoder. `next`, `feed` and `park` may throw std::bad_alloc; after that the decoder must only be destroyed.
class Decoder {
 public:
  enum class Status {
    packet,     ///< the view was filled
    need_more,  ///< all whole packets were yielded, the lent bytes are no longer needed
    error       ///< the stream broke the protocol; see `error()`. Final: nothing more is decoded or kept
  };

  Decoder(const Limits& limits, BufferPool& pool) noexcept : limits_(limits), pool_(&pool) {}
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;
  ~Decoder() { release(); }

  /// Lends the next bytes of the stream. If an earlier loan was not used up it is parked first (and so must still be
  /// valid). Bytes fed after an error are ignored.
  void feed(std::span<const std::byte> bytes) {
    if (cursor_ != end_) [[unlikely]] {
      park();
    } else if (own_consumed_ == own_.size()) {
      release();
    }
    if (error_ != nullptr) [[unlikely]]
      return;
    cursor_ = bytes.data();
    end_ = cursor_ + bytes.size();
  }

  /// Yields the next whole packet into `out`; for the other results `out` is unspecified. O(1) for a packet that lies
  /// whole in the lent or parked bytes.
  [[nodiscard]] Status next(PacketView& out) {
    if (own_.capacity() == 0) [[likely]] {
      const auto available = static_cast<std::size_t>(end_ - cursor_);
      if (available >= header_size) [[likely]] {
        if (!detail::read_header(cursor_, limits_, out.header)) [[unlikely]]
          return fail(cursor_);
        const std::size_t size = out.header.packet_size();
        if (size <= available) [[likely]] {
          view(cursor_, size, out);
          cursor_ += size;
          return Status::packet;
        }
      }
    }
    return next_slow(out);
  }

  /// Stop here, in the middle of a read: the lent bytes not yet decoded are copied, and the loan ends. A later `next`
  /// goes on from here, and bytes fed later come behind these. No effect when nothing is lent.
  void park() {
    if (own_consumed_ == own_.size() && cursor_ == end_) {
      release();
      return;
    }
    const auto available = static_cast<std::size_t>(end_ - cursor_);
    make_room(available, 0);
    append(available);
  }

  /// Forgets all bytes, lent and kept, and gives its memory back; an error stays. For a session that ends in the middle
  /// of a read. Bytes fed next are the start of a stream.
  void clear() noexcept {
    cursor_ = end_ = nullptr;
    release();
  }

  /// True if bytes that are not decoded are kept or lent. When `next` has said `need_more`: the stream is in the middle
  /// of a packet.
  [[nodiscard]] bool has_partial() const noexcept { return cursor_ != end_ || buffered_bytes() != 0; }

  /// Bytes kept and not yet decoded; lent bytes do not count.
  [[nodiscard]] std::size_t buffered_bytes() const noexcept { return own_.size() - own_consumed_; }

  /// Bytes of memory taken from the pool and held now.
  [[nodiscard]] std::size_t held_bytes() const noexcept { return own_.capacity(); }

  /// What `next` found wrong; its text names the field and the value. An empty Error before that.
  [[nodiscard]] const Error& error() const noexcept {
    static const Error none;
    return error_ != nullptr ? *error_ : none;
  }

 private:
  static void view(const std::byte* at, std::size_t size, PacketView& out) noexcept {
    out.extension = {at + header_size, out.header.ext_len};
    out.payload = {at + header_size + out.header.ext_len, out.header.payload_len};
    out.bytes = {at, size};
  }

  /// There are bytes of our own, or the lent bytes end within a packet.
  [[gnu::noinline]] Status next_slow(PacketView& out) {
    if (error_ != nullptr) return Status::error;
    if (own_.capacity() != 0 && own_consumed_ == own_.size()) {
      release();
      return next(out);
    }
    if (!pull(header_size, header_size)) return need_more();
    const std::byte* at = own_.data() + own_consumed_;
    if (!detail::read_header(at, limits_, out.header)) return fail(at);
    const std::size_t size = out.header.packet_size();
    if (!pull(size, size)) return need_more();
    at = own_.data() + own_consumed_;
    view(at, size, out);
    own_consumed_ += size;
    return Status::packet;
  }

  /// Makes the undecoded own bytes `wanted` many out of the lent ones; false when there are not enough. No more is
  /// taken: what follows can be seen where it lies.
  bool pull(std::size_t wanted, std::size_t packet) {
    const std::size_t have = buffered_bytes();
    if (have >= wanted) return true;
    const std::size_t taken = std::min(wanted - have, static_cast<std::size_t>(end_ - cursor_));
    if (taken != 0) {
      make_room(taken, std::min(packet, 2 * (have + taken)));
      append(taken);
    }
    return have + taken == wanted;
  }

  /// Room for `more` bytes behind the own ones; if that takes a new buffer, one of at least `hint` bytes.
  /// Bytes are moved only into a buffer twice as large, or when at least as many have been decoded since the last move:
  /// so the work is linear.
  void make_room(std::size_t more, std::size_t hint) {
    if (own_.capacity() - own_.size() >= more) return;
    const std::size_t have = buffered_bytes();
    if (have <= own_consumed_ && have + more <= own_.capacity()) {
      std::memmove(own_.data(), own_.data() + own_consumed_, have);
      own_.resize(have);
      own_consumed_ = 0;
      return;
    }
    move_to(pool_->take(std::max({have + more, hint, own_.capacity() + 1})));
  }

  void move_to(Buffer&& buffer) {
    if (const std::size_t have = buffered_bytes(); have != 0) {
      buffer.append({own_.data() + own_consumed_, have});
    }
    release();
    own_ = std::move(buffer);
  }

  void append(std::size_t count) {
    own_.append({cursor_, count});
    cursor_ += count;
  }

  Status need_more() {
    // A small rest must not hold the large buffer that many packets were parked in.
    const std::size_t have = buffered_bytes();
    if (own_.capacity() > BufferPool::min_capacity && have <= own_.capacity() / 4) {
      move_to(pool_->take(have));
    }
    return Status::need_more;
  }

  [[gnu::noinline]] Status fail(const std::byte* at) {
    error_ = std::make_unique<Error>(detail::explain_header(at, limits_));
    clear();
    return Status::error;
  }

  void release() noexcept {
    if (own_.capacity() != 0) pool_->give(std::move(own_));
    own_consumed_ = 0;
  }

  const std::byte* cursor_ = nullptr;  ///< the lent bytes not yet decoded: [cursor_, end_)
  const std::byte* end_ = nullptr;
  Buffer own_;                    ///< comes before the lent bytes in the stream
  std::size_t own_consumed_ = 0;  ///< decoded bytes at the front of own_
  Limits limits_;
  BufferPool* pool_;
  std::unique_ptr<Error> error_;
};

}  // namespace msgtrans::wire
