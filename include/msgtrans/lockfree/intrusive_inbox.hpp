// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace msgtrans::lockfree {

/// What an element of an IntrusiveInbox derives from, publicly: `struct Command : lockfree::InboxNode<Command>`.
/// `next` belongs to the inbox from `push` until `take_all` has returned the element, and then to the consumer.
template <class T>
struct InboxNode {
  T* next = nullptr;
};

/// What became of an element pushed to an inbox.
enum class Pushed : unsigned char {
  first,   ///< it is in, and the inbox was empty: the caller must wake the consumer
  behind,  ///< it is in, behind one whose pusher wakes the consumer
  closed,  ///< it is not in, and stays the caller's: the inbox was closed before
};

/// Hands elements from many producers to one consumer, which takes all there are at once: the stack of R. K. Treiber,
/// "Systems Programming: Coping with Parallelism" (IBM RJ 5118, 1986), emptied whole and reversed.
///
/// The inbox owns no element: one in it must stay alive and must not be pushed again until it has been taken, and
/// what is in it when it is destroyed is not touched. Nothing is allocated. `close` takes out the last elements and
/// refuses all later ones, so none can be left behind.
///
/// Order: if one push happens before another, in one thread or across threads, their elements come out in that order.
///
/// Thread safety: `push` and `empty` from any thread; `take_all` and `close` from one thread at a time, each call
/// happening before the next. Progress: `push` is lock-free, `take_all` wait-free but for the reversal, which is
/// O(elements taken).
template <class T>
class IntrusiveInbox {
 public:
  IntrusiveInbox() noexcept = default;
  IntrusiveInbox(const IntrusiveInbox&) = delete;
  IntrusiveInbox& operator=(const IntrusiveInbox&) = delete;

  /// Puts `element` in. There is exactly one `first` for each `take_all` or `close` that returns something, so a
  /// consumer that takes all whenever it is woken misses nothing. The consumer may have taken and destroyed `element`
  /// by the time this returns.
  [[nodiscard]] Pushed push(T* element) noexcept {
    static_assert(std::is_base_of_v<InboxNode<T>, T> && std::is_convertible_v<T*, InboxNode<T>*>,
                  "T must derive publicly from InboxNode<T>");
    Word head = head_.load(std::memory_order_relaxed);
    do {
      if (head == closed_mark) return Pushed::closed;
      static_cast<InboxNode<T>*>(element)->next = reinterpret_cast<T*>(head);
    } while (!head_.compare_exchange_weak(head, reinterpret_cast<Word>(element), std::memory_order_release,
                                          std::memory_order_relaxed));
    return head == 0 ? Pushed::first : Pushed::behind;
  }

  /// Takes out all there is: a chain through `next`, in the order pushed, ended by nullptr; nullptr if there is
  /// nothing.
  [[nodiscard]] T* take_all() noexcept {
    // A look first: polling an empty inbox then leaves the cache line shared.
    const Word seen = head_.load(std::memory_order_relaxed);
    if (seen == 0 || seen == closed_mark) return nullptr;
    return reversed(head_.exchange(0, std::memory_order_acquire));
  }

  /// Takes out all there is, as `take_all`, and refuses every later push. Closed is final; again returns nullptr.
  [[nodiscard]] T* close() noexcept {
    const Word last = head_.exchange(closed_mark, std::memory_order_acquire);
    return last == closed_mark ? nullptr : reversed(last);
  }

  /// True if nothing is in it. A hint while producers run: it orders nothing.
  [[nodiscard]] bool empty() const noexcept {
    const Word seen = head_.load(std::memory_order_relaxed);
    return seen == 0 || seen == closed_mark;
  }

 private:
  using Word = std::uintptr_t;

  static T* reversed(Word head) noexcept {
    T* newest = reinterpret_cast<T*>(head);
    T* oldest = nullptr;
    while (newest != nullptr) {
      InboxNode<T>* const node = newest;
      T* const older = node->next;
      node->next = oldest;
      oldest = newest;
      newest = older;
    }
    return oldest;
  }

  static constexpr std::size_t cache_line = 64;
  static constexpr Word closed_mark = 1;  // no element has that address: it would not be aligned
  static_assert(alignof(T) > 1);

  // Invariant: head_ is the element pushed last and not yet taken, and its chain through `next` is all the elements
  // not yet taken, newest first; 0 if there is none; closed_mark for ever once it was closed, because only
  // the consumer could change that, and take_all leaves it alone.
  //
  // ABA: no element is ever taken singly. A push whose CAS succeeds has seen head_ equal to the value in its `next`,
  // and that value is then the newest element in the inbox (or 0), even if it has been away and come back
  // meanwhile.
  //
  // Memory order: a push writes its element and `next`, then releases by the CAS. Every change of head_ is a
  // read-modify-write, so each CAS heads a release sequence that all later changes continue: the exchange, which reads
  // the last of them and acquires, synchronises with every one of them, and the consumer sees every element of the
  // chain whole. Producers never follow a pointer, so they need no acquire.
  //
  // Order: of two pushes where the first happens before the second, the second's CAS is later in head_'s modification
  // order, so the first is deeper in the chain, or was taken by an earlier exchange.
  //
  // A line of its own: producers write it, and nothing else should be slowed by that.
  alignas(cache_line) std::atomic<Word> head_{0};
};

}  // namespace msgtrans::lockfree
