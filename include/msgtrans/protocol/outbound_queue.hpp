// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <msgtrans/protocol/outbound_budget.hpp>
#include <msgtrans/wire/buffer_pool.hpp>
#include <msgtrans/wire/header.hpp>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace msgtrans::protocol {

/// A first-in, first-out queue in one contiguous block that is freed when it has become large and empty.
template <class T>
class Fifo {
 public:
  [[nodiscard]] bool empty() const noexcept { return head_ == items_.size(); }
  [[nodiscard]] std::size_t size() const noexcept { return items_.size() - head_; }
  T& operator[](std::size_t index) noexcept { return items_[head_ + index]; }
  const T& operator[](std::size_t index) const noexcept { return items_[head_ + index]; }
  T& front() noexcept { return items_[head_]; }
  T& back() noexcept { return items_.back(); }

  void push(T item) {
    // Amortised O(1): moved at most once for each item that was popped since.
    if (head_ != 0 && items_.size() == items_.capacity() && head_ >= items_.size() / 2) {
      items_.erase(items_.begin(), items_.begin() + static_cast<std::ptrdiff_t>(head_));
      head_ = 0;
    }
    items_.push_back(std::move(item));
  }
  void pop() noexcept {
    // Its place may not be used again for long: what the item held must not stay alive in it.
    if constexpr (!std::is_trivially_destructible_v<T>) items_[head_] = T{};
    ++head_;
    if (empty()) clear();
  }
  /// O(items to the nearer end).
  void erase(std::size_t index) noexcept {
    const auto at = items_.begin() + static_cast<std::ptrdiff_t>(head_ + index);
    if (index < size() / 2 || size() == 1) {
      std::move_backward(items_.begin() + static_cast<std::ptrdiff_t>(head_), at, at + 1);
      pop();
    } else {
      items_.erase(at);
    }
  }
  void clear() noexcept {
    items_.clear();
    head_ = 0;
    if (items_.capacity() * sizeof(T) > keep_bytes) std::vector<T>().swap(items_);
  }

 private:
  static constexpr std::size_t keep_bytes = 16 * 1024;

  std::vector<T> items_;
  std::size_t head_ = 0;
};

/// Bytes that several queues share: one message to many sessions, encoded once.
using SharedBytes = std::shared_ptr<const std::vector<std::byte>>;

/// Why a packet is in the queue; answers are counted apart, because they alone pause reading.
enum class OutboundKind : std::uint8_t { push, answer };

/// Some of the bytes that a session has still to write.
struct OutboundBlock {
  wire::Buffer own;
  SharedBytes shared;  // if set the bytes are its
  std::size_t begin = 0;
  std::size_t end = 0;

  [[nodiscard]] std::span<const std::byte> bytes() const noexcept {
    return {(shared ? shared->data() : own.data()) + begin, end - begin};
  }
  [[nodiscard]] std::size_t room() const noexcept { return shared ? 0 : own.capacity() - end; }
};

/// The packets one session has still to write, in two lanes: high priority overtakes normal, but never inside a
/// packet. Bytes lie in few large blocks, so that all of it goes out in one gathered write. Not thread-safe. Blocks
/// are taken from the pool and given back as they are written: an empty queue holds only a little bookkeeping, and is
/// meant to be lent to the next session that needs one.
class OutboundQueue {
 public:
  /// From this payload size on a payload is a block of its own.
  static constexpr std::size_t large_payload = 16 * 1024;

  /// What left the queue: in all, and apart from that the pushes, by lane, whose room is now free.
  struct Written {
    std::size_t packets = 0;
    OutboundDepth normal;
    OutboundDepth priority;
  };

  explicit OutboundQueue(wire::BufferPool& pool) noexcept : pool_(&pool) {}
  OutboundQueue(const OutboundQueue&) = delete;
  OutboundQueue& operator=(const OutboundQueue&) = delete;
  ~OutboundQueue() { clear(); }

  [[nodiscard]] bool empty() const noexcept { return lanes_[0].packets.empty() && lanes_[1].packets.empty(); }
  [[nodiscard]] std::size_t packets() const noexcept { return lanes_[0].packets.size() + lanes_[1].packets.size(); }
  /// Of the normal lane, each packet counted whole until its last byte is written.
  [[nodiscard]] OutboundDepth depth() const noexcept { return {lanes_[0].bytes, lanes_[0].packets.size()}; }
  /// Of the answers in both lanes, likewise.
  [[nodiscard]] OutboundDepth answers() const noexcept { return answers_; }

  /// About how many bytes will be added before they are written: they then lie in one block.
  void expect(std::size_t bytes) noexcept { expected_ = bytes; }

  /// Adds a packet; the lengths of `header` are set from the spans. O(size). \throws std::bad_alloc, and then nothing
  /// has changed.
  void append(wire::Header header, std::span<const std::byte> extension, std::span<const std::byte> payload,
              OutboundKind kind) {
    Lane& lane = lane_of(header);
    const std::size_t size = wire::header_size + extension.size() + payload.size();
    if (lane.blocks.empty() || lane.blocks.back().room() < size || payload.size() >= large_payload) {
      return append_rest(header, extension, payload, kind, 0);
    }
    lane.packets.push({static_cast<std::uint32_t>(size), kind});
    Block& block = lane.blocks.back();
    std::byte* at = block.own.data() + block.end;
    header.ext_len = static_cast<std::uint16_t>(extension.size());
    header.payload_len = static_cast<std::uint32_t>(payload.size());
    wire::encode_header(header, std::span<std::byte, wire::header_size>(at, wire::header_size));
    at += wire::header_size;
    if (!extension.empty()) std::memcpy(at, extension.data(), extension.size());
    if (!payload.empty()) std::memcpy(at + extension.size(), payload.data(), payload.size());
    block.end += size;
    note_added(lane, size, kind);
  }

  /// The same for a packet whose first `written` bytes (fewer than all) went out already: only into an empty queue.
  void append_rest(wire::Header header, std::span<const std::byte> extension, std::span<const std::byte> payload,
                   OutboundKind kind, std::size_t written) {
    const std::array head = encode(header, extension, payload);
    Lane& lane = lane_of(header);
    const std::size_t size = header.packet_size();
    auto rest = [written, offset = std::size_t{0}](std::span<const std::byte> part) mutable {
      const std::size_t skip = std::min(part.size(), written - std::min(written, offset));
      offset += part.size();
      return part.subspan(skip);
    };
    auto undo = lane.mark();
    try {
      copy(lane, rest(head));
      copy(lane, rest(extension));
      const auto body = rest(payload);
      if (body.size() >= large_payload) {
        own_block(lane, body);
      } else {
        copy(lane, body);
      }
      lane.packets.push({static_cast<std::uint32_t>(size), kind});
    } catch (...) {
      lane.rewind(undo, *pool_);
      throw;
    }
    note_added(lane, size, kind);
    if (written != 0) {
      current_ = static_cast<std::uint8_t>(&lane - lanes_.data());
      front_written_ = written;
    }
  }

  /// The same with a payload that other queues share; copied if it is small.
  void append(wire::Header header, std::span<const std::byte> extension, const SharedBytes& payload,
              OutboundKind kind) {
    if (payload->size() < large_payload) return append(header, extension, *payload, kind);
    const std::array head = encode(header, extension, *payload);
    Lane& lane = lane_of(header);
    auto undo = lane.mark();
    try {
      copy(lane, head);
      copy(lane, extension);
      lane.blocks.push(Block{{}, payload, 0, payload->size()});
      lane.packets.push({static_cast<std::uint32_t>(header.packet_size()), kind});
    } catch (...) {
      lane.rewind(undo, *pool_);
      throw;
    }
    note_added(lane, header.packet_size(), kind);
  }

  /// The bytes to write next, as at most `out.size()` pieces, in the order of the wire. \returns how many pieces.
  std::size_t gather(std::span<std::span<const std::byte>> out) const noexcept {
    std::size_t count = 0;
    const auto add = [&](const Lane& lane, std::size_t limit) {
      for (std::size_t i = 0; i < lane.blocks.size() && count < out.size() && limit != 0; ++i) {
        const auto bytes = lane.blocks[i].bytes();
        const std::size_t taken = std::min(bytes.size(), limit);
        if (taken != 0) out[count++] = bytes.first(taken);
        limit -= taken;
      }
    };
    // A normal packet that has begun must end before a priority packet may follow.
    if (front_written_ != 0 && current_ == 0 && !lanes_[1].packets.empty()) {
      add(lanes_[0], lanes_[0].packets[0].size - front_written_);
      add(lanes_[1], no_limit);
      return count;  // what else the normal lane holds goes with the next write
    }
    add(lanes_[1], no_limit);
    add(lanes_[0], no_limit);
    return count;
  }

  /// The first `count` bytes of what `gather` showed are written; nothing may have been added or dropped since.
  /// Amortised O(packets that ended).
  Written consume(std::size_t count) noexcept {
    Written done;
    while (count != 0) {
      if (front_written_ == 0) current_ = lanes_[1].packets.empty() ? 0 : 1;
      Lane& lane = lanes_[current_];
      const Packet packet = lane.packets.front();
      const std::size_t step = std::min(count, packet.size - front_written_);
      count -= step;
      front_written_ += step;
      drop_bytes(lane, step);
      if (front_written_ < packet.size) break;
      front_written_ = 0;
      lane.packets.pop();
      note_removed(lane, packet);
      note_left(done, current_, packet);
    }
    return done;
  }

  /// Takes the first bytes out in blocks that are handed over and not copied: `take(OutboundBlock&)`, which must not
  /// throw and leaves what it does not move from. About `most` bytes, at least a block; if `exact` no more than that,
  /// for which some are copied. Afterwards as `consume`. \throws std::bad_alloc if nothing could be taken.
  template <class Take>
  Written hand_over(std::size_t most, bool exact, Take&& take) {
    Written done;
    for (std::size_t taken = 0; taken < most && !empty();) {
      std::span<const std::byte> piece;
      if (gather({&piece, 1}) == 0) break;
      const std::size_t size = exact ? std::min(piece.size(), most - taken) : piece.size();
      const auto lane = static_cast<std::size_t>(front_written_ != 0 ? current_ : (lanes_[1].packets.empty() ? 0 : 1));
      OutboundBlock& front = lanes_[lane].blocks.front();
      OutboundBlock block;
      if (size == front.end - front.begin) {
        block = {std::move(front.own), std::move(front.shared), front.begin, front.end};
      } else {  // a priority packet comes in between
        try {
          block = {pool_->take(size), {}, 0, size};
        } catch (const std::bad_alloc&) {
          if (taken == 0) throw;
          break;
        }
        std::memcpy(block.own.data(), piece.data(), size);
      }
      take(block);
      pool_->give(std::move(block.own));
      const Written left = consume(size);
      done.packets += left.packets;
      done.normal.bytes += left.normal.bytes;
      done.normal.packets += left.normal.packets;
      done.priority.bytes += left.priority.bytes;
      done.priority.packets += left.priority.packets;
      taken += size;
    }
    return done;
  }

  /// Drops the oldest packet of the normal lane that is no answer and has not begun to be written.
  /// \returns its size, 0 if there is none. O(packets before it + bytes of the block it lies in).
  std::size_t drop_oldest() noexcept {
    Lane& lane = lanes_[0];
    std::size_t offset = 0;  // of the packet, in the bytes still queued
    for (std::size_t i = 0; i < lane.packets.size(); ++i) {
      const Packet packet = lane.packets[i];
      const bool begun = i == 0 && current_ == 0 && front_written_ != 0;
      if (packet.kind == OutboundKind::push && !begun) {
        cut(lane, offset, packet.size);
        lane.packets.erase(i);
        note_removed(lane, packet);
        return packet.size;
      }
      offset += packet.size - (begun ? front_written_ : 0);
    }
    return 0;
  }

  /// Forgets everything. \returns what was not written, a packet in part written included.
  Written clear() noexcept {
    Written left;
    for (std::size_t index = 0; index < lanes_.size(); ++index) {
      Lane& lane = lanes_[index];
      for (std::size_t i = 0; i < lane.packets.size(); ++i) note_left(left, index, lane.packets[i]);
      for (std::size_t i = 0; i < lane.blocks.size(); ++i) pool_->give(std::move(lane.blocks[i].own));
      lane.blocks.clear();
      lane.packets.clear();
      lane.bytes = 0;
    }
    answers_ = {};
    front_written_ = 0;
    return left;
  }

 private:
  static constexpr std::size_t no_limit = ~std::size_t{0};
  static constexpr std::size_t smallest_block = 2 * 1024;
  static constexpr std::size_t largest_block = 64 * 1024;

  struct Packet {
    std::uint32_t size;
    OutboundKind kind;
  };

  using Block = OutboundBlock;

  struct Lane {
    struct Mark {
      std::size_t blocks;
      std::size_t end;
    };

    Fifo<Block> blocks;
    Fifo<Packet> packets;
    std::size_t bytes = 0;

    [[nodiscard]] Mark mark() noexcept { return {blocks.size(), blocks.empty() ? 0 : blocks.back().end}; }
    void rewind(const Mark& mark, wire::BufferPool& pool) noexcept {
      while (blocks.size() > mark.blocks) {
        pool.give(std::move(blocks.back().own));
        blocks.erase(blocks.size() - 1);
      }
      if (!blocks.empty()) blocks.back().end = mark.end;
    }
  };

  static std::array<std::byte, wire::header_size> encode(wire::Header& header, std::span<const std::byte> extension,
                                                         std::span<const std::byte> payload) noexcept {
    header.ext_len = static_cast<std::uint16_t>(extension.size());
    header.payload_len = static_cast<std::uint32_t>(payload.size());
    std::array<std::byte, wire::header_size> bytes;
    wire::encode_header(header, bytes);
    return bytes;
  }

  Lane& lane_of(const wire::Header& header) noexcept {
    return lanes_[(header.flags & wire::flags::high_priority) != 0 ? 1 : 0];
  }

  void note_added(Lane& lane, std::size_t size, OutboundKind kind) noexcept {
    lane.bytes += size;
    if (kind == OutboundKind::answer) {
      answers_.bytes += size;
      ++answers_.packets;
    }
  }
  static void note_left(Written& sum, std::size_t lane, const Packet& packet) noexcept {
    ++sum.packets;
    if (packet.kind == OutboundKind::answer) return;
    OutboundDepth& depth = lane == 0 ? sum.normal : sum.priority;
    depth.bytes += packet.size;
    ++depth.packets;
  }
  void note_removed(Lane& lane, const Packet& packet) noexcept {
    lane.bytes -= packet.size;
    if (packet.kind == OutboundKind::answer) {
      answers_.bytes -= packet.size;
      --answers_.packets;
    }
  }

  void copy(Lane& lane, std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      if (lane.blocks.empty() || lane.blocks.back().room() == 0) {
        // Blocks grow with what is queued: a short burst costs little, a long one few pieces.
        const std::size_t wanted =
            std::clamp(std::max({bytes.size(), lane.bytes, expected_}), smallest_block, largest_block);
        lane.blocks.push(Block{pool_->take(wanted), {}, 0, 0});
      }
      Block& block = lane.blocks.back();
      const std::size_t taken = std::min(block.room(), bytes.size());
      std::memcpy(block.own.data() + block.end, bytes.data(), taken);
      block.end += taken;
      bytes = bytes.subspan(taken);
    }
  }

  void own_block(Lane& lane, std::span<const std::byte> bytes) {
    Block block{pool_->take(bytes.size()), {}, 0, bytes.size()};
    std::memcpy(block.own.data(), bytes.data(), bytes.size());
    lane.blocks.push(std::move(block));
  }

  void drop_bytes(Lane& lane, std::size_t count) noexcept {
    while (count != 0) {
      Block& block = lane.blocks.front();
      const std::size_t step = std::min(count, block.end - block.begin);
      block.begin += step;
      count -= step;
      if (block.begin == block.end) {
        pool_->give(std::move(block.own));
        lane.blocks.pop();
      }
    }
  }

  /// Takes `count` bytes out of the lane, `offset` bytes behind its front.
  void cut(Lane& lane, std::size_t offset, std::size_t count) noexcept {
    for (std::size_t i = 0; i < lane.blocks.size() && count != 0;) {
      Block& block = lane.blocks[i];
      const std::size_t size = block.end - block.begin;
      if (offset >= size) {
        offset -= size;
        ++i;
        continue;
      }
      const std::size_t taken = std::min(count, size - offset);
      if (offset == 0) {
        block.begin += taken;
      } else if (offset + taken == size) {
        block.end -= taken;
      } else {
        // A packet in the middle of a block of small ones (a shared or large payload is never in the middle).
        std::byte* const at = block.own.data() + block.begin + offset;
        std::memmove(at, at + taken, size - offset - taken);
        block.end -= taken;
      }
      count -= taken;
      if (block.begin == block.end) {
        pool_->give(std::move(block.own));
        lane.blocks.erase(i);
      } else if (offset != 0) {
        offset = 0;
        ++i;
      }
    }
  }

  std::array<Lane, 2> lanes_;  // normal, priority
  OutboundDepth answers_;
  std::size_t expected_ = 0;
  std::size_t front_written_ = 0;  // of the packet that has begun: the front of lanes_[current_]
  std::uint8_t current_ = 0;
  wire::BufferPool* pool_;
};

/// Lends queues to the sessions of a shard that have something to write, so that the others hold none. Not thread-safe.
class OutboundQueuePool {
 public:
  explicit OutboundQueuePool(wire::BufferPool& buffers) noexcept : buffers_(&buffers) {}

  /// An empty queue. \throws std::bad_alloc.
  [[nodiscard]] std::unique_ptr<OutboundQueue> take() {
    if (free_.empty()) return std::make_unique<OutboundQueue>(*buffers_);
    auto queue = std::move(free_.back());
    free_.pop_back();
    return queue;
  }

  /// Takes an empty queue back.
  void give(std::unique_ptr<OutboundQueue> queue) noexcept {
    if (free_.size() < free_.capacity()) free_.push_back(std::move(queue));
  }

 private:
  static constexpr std::size_t keep = 256;

  static std::vector<std::unique_ptr<OutboundQueue>> reserved() {
    std::vector<std::unique_ptr<OutboundQueue>> list;
    list.reserve(keep);
    return list;
  }

  wire::BufferPool* buffers_;
  std::vector<std::unique_ptr<OutboundQueue>> free_ = reserved();
};

}  // namespace msgtrans::protocol
