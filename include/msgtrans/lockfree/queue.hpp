// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <msgtrans/detail/pause.hpp>
#include <new>
#include <optional>
#include <thread>
#include <type_traits>
#include <utility>

namespace msgtrans::lockfree {

/// An unbounded queue for many producers and many consumers: a linked list of blocks of 31 slots. The algorithm is that
/// of crossbeam's `SegQueue` (crossbeam-queue 0.3, `seg_queue.rs`), with claims of several values at once added.
///
/// Beside moodycamel's queue it is the small one: an empty queue has no memory, one that has been used has one block,
/// no thread leaves anything behind, and the order is that of all producers, not of each. For a queue each session,
/// say.
///
/// Order: first in, first out, linearizable: if one push happens before another, its value is popped first.
///
/// Thread safety: every call from any thread, except the destructor. Progress: lock-free but for two short waits, of a
/// consumer for the producer whose slot it has claimed to write it, and of all for the one that goes on to the next
/// block.
///
/// Errors: `push` may throw `std::bad_alloc`; the queue and the value are then as they were.
template <class T>
class LockFreeQueue {
  static_assert(std::is_nothrow_move_constructible_v<T> && std::is_nothrow_destructible_v<T>,
                "LockFreeQueue<T>: T must be nothrow move constructible, or a value could be lost half-way; wrap it in "
                "a std::unique_ptr");

 public:
  LockFreeQueue() noexcept = default;
  /// Destroys what was not popped.
  ~LockFreeQueue() {
    while (try_pop([](T&&) noexcept {})) {
    }
    delete head_.block.load(std::memory_order_relaxed);
  }
  LockFreeQueue(const LockFreeQueue&) = delete;
  LockFreeQueue& operator=(const LockFreeQueue&) = delete;

  /// O(1).
  void push(T&& value) {
    std::unique_ptr<Block> spare;
    Backoff backoff;
    std::uint64_t tail = tail_.index.load(std::memory_order_acquire);
    for (;;) {
      Block* block = tail_.block.load(std::memory_order_acquire);
      const std::uint64_t offset = offset_of(tail);
      if (offset == block_slots) {  // somebody is going on to the next block
        backoff.wait();
        tail = tail_.index.load(std::memory_order_acquire);
        continue;
      }
      // The next block is made before the slot is taken, so that nothing can fail later.
      if (offset + 1 == block_slots && !spare) spare = std::make_unique<Block>();
      if (block == nullptr) {
        if (!spare) spare = std::make_unique<Block>();
        if (tail_.block.compare_exchange_strong(block, spare.get(), std::memory_order_release,
                                                std::memory_order_relaxed)) {
          block = spare.release();
          head_.block.store(block, std::memory_order_release);
        } else {
          tail = tail_.index.load(std::memory_order_acquire);
          continue;
        }
      }
      if (!tail_.index.compare_exchange_weak(tail, tail + step, std::memory_order_seq_cst, std::memory_order_acquire)) {
        continue;
      }
      if (offset + 1 == block_slots) {
        Block* const next = spare.release();
        tail_.block.store(next, std::memory_order_release);
        tail_.index.store(tail + 2 * step);
        block->next.store(next, std::memory_order_release);
      }
      Slot& slot = block->slots[offset];
      ::new (static_cast<void*>(slot.room)) T(std::move(value));
      slot.state.fetch_or(written, std::memory_order_release);
      return;
    }
  }

  /// Nothing if the queue was empty at some moment of the call. O(1).
  [[nodiscard]] std::optional<T> try_pop() noexcept {
    std::optional<T> value;
    (void)try_pop([&value](T&& popped) noexcept { value.emplace(std::move(popped)); });
    return value;
  }
  /// The same: calls `take(T&&)`, which must not throw, with the value; false if there is none.
  template <class Take>
  [[nodiscard]] bool try_pop(Take take) noexcept {
    return try_pop_many(1, take) != 0;
  }

  /// Pops some that lie together, at most `max`: calls `take(T&&)`, which must not throw, with each in turn; how many.
  /// 0 only if the queue was empty at some moment of the call; else fewer than there are is no sign of anything.
  template <class Take>
  std::size_t try_pop_many(std::size_t max, Take take) noexcept {
    if (max == 0) return 0;
    Backoff backoff;
    std::uint64_t head = head_.index.load();
    for (;;) {
      Block* const block = head_.block.load(std::memory_order_acquire);
      const std::uint64_t offset = offset_of(head);
      if (offset == block_slots) {
        backoff.wait();
        head = head_.index.load();
        continue;
      }
      // All that is left of this block, unless the tail is in it: `not_last` says that it has moved on for good.
      std::uint64_t count = block_slots - offset;
      std::uint64_t not_last_now = head & not_last;
      if (not_last_now == 0) {
        const std::uint64_t tail = tail_.index.load();
        if (position_of(tail) == position_of(head)) return 0;
        if (position_of(head) / lap == position_of(tail) / lap) {
          count = position_of(tail) - position_of(head);
          if (count > block_slots - offset) count = block_slots - offset;
        } else {
          not_last_now = not_last;
        }
      }
      if (block == nullptr) {  // the first push is about to tell where its block is
        backoff.wait();
        head = head_.index.load();
        continue;
      }
      if (count > max) count = max;
      const std::uint64_t next_head = (head & ~not_last) + count * step;
      if (!head_.index.compare_exchange_weak(head, next_head | not_last_now)) continue;

      const bool reaches_end = offset + count == block_slots;
      if (reaches_end) {
        Block* const next = wait_for_next(*block);
        const std::uint64_t flag = next->next.load(std::memory_order_relaxed) != nullptr ? not_last : 0;
        head_.block.store(next, std::memory_order_release);
        head_.index.store((next_head + step) | flag);
      }
      for (std::uint64_t i = offset; i < offset + count; ++i) {
        Slot& slot = block->slots[i];
        wait_until_written(slot);
        T& value = *std::launder(reinterpret_cast<T*>(slot.room));
        take(std::move(value));
        value.~T();
        if (i + 1 == block_slots) {
          release(block, 0);
        } else if ((slot.state.fetch_or(read, std::memory_order_acq_rel) & abandoned) != 0) {
          release(block, i + 1);
        }
      }
      return static_cast<std::size_t>(count);
    }
  }

  /// How many are in it, at some moment of the call if nobody else uses it, else about that. O(1).
  [[nodiscard]] std::size_t size_approx() const noexcept {
    const std::uint64_t head = values_before(position_of(head_.index.load()));
    const std::uint64_t tail = values_before(position_of(tail_.index.load()));
    return static_cast<std::size_t>(tail > head ? tail - head : 0);
  }
  /// True if it was empty at some moment of the call.
  [[nodiscard]] bool empty() const noexcept {
    const std::uint64_t head = head_.index.load();
    return position_of(head) == position_of(tail_.index.load());
  }

 private:
  static constexpr std::uint64_t lap = 32;          // positions a block spans; the last is passed while changing blocks
  static constexpr std::uint64_t block_slots = 31;  // of which these hold values
  static constexpr std::uint64_t step = 2;          // of an index
  static constexpr std::uint64_t not_last = 1;      // flag of the head's index: its block has a next one

  static constexpr std::uint32_t written = 1;
  static constexpr std::uint32_t read = 2;
  static constexpr std::uint32_t abandoned = 4;

  struct Slot {
    alignas(T) std::byte room[sizeof(T)];
    std::atomic<std::uint32_t> state{0};
  };
  struct Block {
    std::atomic<Block*> next{nullptr};
    Slot slots[block_slots];
  };
  struct End {
    std::atomic<std::uint64_t> index{0};
    std::atomic<Block*> block{nullptr};
  };

  class Backoff {
   public:
    void wait() noexcept {
      if (++rounds_ < 64) {
        detail::pause_briefly();
      } else {
        std::this_thread::yield();
      }
    }

   private:
    unsigned rounds_ = 0;
  };

  static std::uint64_t position_of(std::uint64_t index) noexcept { return index / step; }
  static std::uint64_t offset_of(std::uint64_t index) noexcept { return position_of(index) % lap; }
  static std::uint64_t values_before(std::uint64_t position) noexcept {
    return position / lap * block_slots + position % lap;
  }

  static void wait_until_written(Slot& slot) noexcept {
    Backoff backoff;
    while ((slot.state.load(std::memory_order_acquire) & written) == 0) backoff.wait();
  }
  static Block* wait_for_next(Block& block) noexcept {
    Backoff backoff;
    for (;;) {
      if (Block* const next = block.next.load(std::memory_order_acquire); next != nullptr) return next;
      backoff.wait();
    }
  }

  /// Frees the block, unless a slot from `first` on is still being read: its reader goes on here then.
  static void release(Block* block, std::uint64_t first) noexcept {
    for (std::uint64_t i = first; i < block_slots - 1; ++i) {  // the last slot's reader is who began this
      Slot& slot = block->slots[i];
      if ((slot.state.load(std::memory_order_acquire) & read) == 0 &&
          (slot.state.fetch_or(abandoned, std::memory_order_acq_rel) & read) == 0) {
        return;
      }
    }
    delete block;
  }

  // Positions count up for ever, `lap` to a block; a position is claimed by a compare-exchange of the index, by one
  // producer and by one consumer. Who claims a block's last slot moves its end on to the next block, and the others
  // wait at the offset behind it.
  //
  // A block is touched only by those who have claimed one of its slots, so a pointer loaded too early is never
  // followed: index is loaded before block, and block changes only while the index stands behind the last slot, so that
  // the claim fails if block did not belong to index.
  //
  // A block is freed by the last of its readers: each marks its slot `read`; the reader of the last slot passes over
  // the others and leaves `abandoned` in the first that is not `read` yet, whose reader goes on from there. fetch_or
  // orders the two marks of a slot, acquire and release carry the end of each reading to the one who frees.
  //
  // Memory order: index is sequentially consistent where emptiness is decided: a consumer that loads the same position
  // from the head and then from the tail saw an empty queue at the second load, since the head never passes the tail.
  // `written` is released by the producer and acquired by the consumer. block and next are released after the block was
  // made, and index after block.
  alignas(64) End head_;
  alignas(64) End tail_;
};

}  // namespace msgtrans::lockfree
