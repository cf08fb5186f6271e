// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <msgtrans/detail/pause.hpp>
#include <msgtrans/lockfree/epoch.hpp>
#include <optional>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace msgtrans::detail {

/// What a look at a position of an EventRing finds.
enum class RingRead : unsigned char { value, not_yet, overwritten };

/// A place for events of which the last few are kept, for many writers and many readers; readers do not write. Every
/// position is written by one writer, who must have got it from a counter. A power of two of slots.
template <class T, bool = std::is_trivially_copyable_v<T>&& std::is_copy_constructible_v<T> && (sizeof(T) <= 64)>
class EventRing;

/// For events that are plain bytes: a sequence lock a slot (H.-J. Boehm, "Can seqlocks get along with programming
/// language memory models?", MSPC 2012). A writer waits until its slot's writer of the lap before is done.
template <class T>
class EventRing<T, true> {
 public:
  explicit EventRing(std::size_t slots) : mask_(slots - 1), slots_(slots) {}

  /// Nothing to prepare: writing cannot fail.
  struct Prepared {
    T value;
  };
  [[nodiscard]] static Prepared prepare(T&& value) noexcept { return {std::move(value)}; }
  /// The caller's value was copied, and is as it was.
  static void take_back(Prepared&, T&) noexcept {}

  void write(std::uint64_t position, Prepared prepared) noexcept {
    Slot& slot = slots_[position & mask_];
    const std::uint64_t before = position > mask_ ? done(position - mask_ - 1) : 0;
    for (unsigned round = 0; slot.sequence.load(std::memory_order_acquire) != before; ++round) {
      if (round < 64) {
        pause_briefly();
      } else {
        std::this_thread::yield();
      }
    }
    Words words{};
    std::memcpy(words.data(), static_cast<const void*>(std::addressof(prepared.value)), sizeof(T));
    slot.sequence.store(done(position) - 1, std::memory_order_relaxed);
    // The words must not be seen before the odd number. A release store of each instead of one fence, since
    // ThreadSanitizer does not know fences, and on x86 both cost nothing.
    for (std::size_t i = 0; i < words.size(); ++i) slot.words[i].store(words[i], std::memory_order_release);
    // Sequentially consistent for those who look for waiters after it.
    slot.sequence.store(done(position));
  }

  /// What is there: copies the event into `out`.
  RingRead read(std::uint64_t position, std::optional<T>& out) const noexcept {
    const Slot& slot = slots_[position & mask_];
    const std::uint64_t wanted = done(position);
    const std::uint64_t sequence = slot.sequence.load();
    if (sequence != wanted) return sequence < wanted ? RingRead::not_yet : RingRead::overwritten;
    Words words;
    // A word of a later lap was released after that lap's odd number: who acquires it sees that, or a later one, below.
    for (std::size_t i = 0; i < words.size(); ++i) words[i] = slot.words[i].load(std::memory_order_acquire);
    if (slot.sequence.load(std::memory_order_relaxed) != wanted) return RingRead::overwritten;
    alignas(T) std::byte room[sizeof(T)];
    std::memcpy(room, words.data(), sizeof(T));
    out.emplace(*std::launder(reinterpret_cast<const T*>(room)));
    return RingRead::value;
  }
  /// Whether `read` would not give `not_yet`.
  [[nodiscard]] bool is_written(std::uint64_t position) const noexcept {
    return slots_[position & mask_].sequence.load() >= done(position);
  }

 private:
  using Words = std::array<std::uint64_t, (sizeof(T) + 7) / 8>;
  struct Slot {
    std::atomic<std::uint64_t> sequence{0};  // done(p); one less while p is being written
    std::array<std::atomic<std::uint64_t>, (sizeof(T) + 7) / 8> words{};
  };
  static std::uint64_t done(std::uint64_t position) noexcept { return 2 * position + 2; }

  const std::size_t mask_;
  std::vector<Slot> slots_;
};

/// For events that own something: a slot points to a node, which is given up to Epoch when another takes its place.
/// Nobody waits for anybody; an event costs one allocation, however many read it.
template <class T>
class EventRing<T, false> {
 public:
  explicit EventRing(std::size_t slots) : mask_(slots - 1), slots_(slots) {}
  ~EventRing() {
    for (auto& slot : slots_) delete slot.load(std::memory_order_acquire);
  }
  EventRing(const EventRing&) = delete;
  EventRing& operator=(const EventRing&) = delete;

  struct Node : lockfree::Retired {
    explicit Node(T&& v) noexcept : value(std::move(v)) {
      destroy = [](lockfree::Retired* self) noexcept { delete static_cast<Node*>(self); };
    }
    std::uint64_t position = 0;
    T value;  // not changed once it is in the ring
  };
  using Prepared = std::unique_ptr<Node>;
  /// Throws `std::bad_alloc`, and the value is as it was.
  [[nodiscard]] static Prepared prepare(T&& value) {
    { const lockfree::Epoch::Guard attached; }  // so that it cannot fail later
    return std::make_unique<Node>(std::move(value));
  }
  /// Undoes it: the value is the caller's again. T may not be assignable.
  static void take_back(Prepared& prepared, T& value) noexcept {
    std::destroy_at(std::addressof(value));
    std::construct_at(std::addressof(value), std::move(prepared->value));
  }

  void write(std::uint64_t position, Prepared prepared) noexcept {
    prepared->position = position;
    const lockfree::Epoch::Guard guard;
    auto& slot = slots_[position & mask_];
    Node* old = slot.load(std::memory_order_acquire);
    do {
      // A later lap was faster: for everyone this event is one of those missed.
      if (old != nullptr && old->position > position) return;
      // Sequentially consistent for those who look for waiters after it.
    } while (!slot.compare_exchange_weak(old, prepared.get()));
    (void)prepared.release();
    if (old != nullptr) lockfree::Epoch::retire(*old);
  }

  /// May throw what copying throws.
  RingRead read(std::uint64_t position, std::optional<T>& out) const {
    const lockfree::Epoch::Guard guard;
    const Node* const node = slots_[position & mask_].load();
    if (node == nullptr || node->position < position) return RingRead::not_yet;
    if (node->position > position) return RingRead::overwritten;
    out.emplace(node->value);
    return RingRead::value;
  }
  [[nodiscard]] bool is_written(std::uint64_t position) const {
    const lockfree::Epoch::Guard guard;
    const Node* const node = slots_[position & mask_].load();
    return node != nullptr && node->position >= position;
  }

 private:
  const std::size_t mask_;
  std::vector<std::atomic<Node*>> slots_;
};

}  // namespace msgtrans::detail
