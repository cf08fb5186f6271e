// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#if __has_include(<concurrentqueue/moodycamel/concurrentqueue.h>)
#include <concurrentqueue/moodycamel/concurrentqueue.h>
#elif __has_include(<concurrentqueue/concurrentqueue.h>)
#include <concurrentqueue/concurrentqueue.h>
#else
#include <concurrentqueue.h>
#endif

namespace msgtrans::detail {

/// For queues of which many exist: nothing is set aside for producers without a token, which there are none of. Memory
/// comes from `operator new`, as all other of the library, for programs that replace it.
struct QueueTraits : moodycamel::ConcurrentQueueDefaultTraits {
  static constexpr std::size_t INITIAL_IMPLICIT_PRODUCER_HASH_SIZE = 0;

  static void* malloc(std::size_t size) noexcept { return ::operator new(size, std::nothrow); }
  static void free(void* memory) noexcept { ::operator delete(memory); }
};

/// What a thread holds to put values into one moodycamel queue. The queue keeps the order of what one token has put in,
/// and producers without a token stay in the queue for ever when their threads end. So every thread has a seat, always
/// the same one while it lives, and gives it back for the next thread.
struct Seat {
  template <class Queue>
  explicit Seat(Queue& queue) : producer(queue) {
    if (!producer.valid()) throw std::bad_alloc();  // moodycamel says so only here, and would use it all the same
  }

  moodycamel::ProducerToken producer;
};

/// The seats of one queue. Threads know of it longer than the queue lives.
class SeatPool {
 public:
  SeatPool() = default;
  SeatPool(const SeatPool&) = delete;
  SeatPool& operator=(const SeatPool&) = delete;

  /// Any thread. Throws `std::bad_alloc`.
  template <class Queue>
  [[nodiscard]] Seat* take(Queue& queue) {
    const std::lock_guard lock(mutex_);
    if (!free_.empty()) {
      Seat* const seat = free_.back();
      free_.pop_back();
      return seat;
    }
    // Room in both before anything is done, so that giving back cannot fail.
    if (free_.capacity() <= all_.size()) free_.reserve(std::max<std::size_t>(4, 2 * (all_.size() + 1)));
    all_.push_back(std::make_unique<Seat>(queue));
    return all_.back().get();
  }
  void give_back(Seat* seat) noexcept {
    const std::lock_guard lock(mutex_);
    if (!gone_.load(std::memory_order_relaxed)) free_.push_back(seat);
  }
  /// Before the queue goes: its tokens go, and what threads give back later is ignored.
  void close() noexcept {
    const std::lock_guard lock(mutex_);
    gone_.store(true, std::memory_order_relaxed);
    free_.clear();
    all_.clear();
  }
  /// A hint for those who tidy up.
  [[nodiscard]] bool gone() const noexcept { return gone_.load(std::memory_order_relaxed); }
  [[nodiscard]] std::size_t size() const noexcept {
    const std::lock_guard lock(mutex_);
    return all_.size();
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Seat>> all_;
  std::vector<Seat*> free_;
  std::atomic<bool> gone_{false};
};

/// The calling thread's seats, by queue.
class ThreadSeats {
 public:
  /// The thread's seat in that queue; null when the thread is ending and its seats have been given back already.
  /// Throws `std::bad_alloc`. `id` is the queue's, never used again.
  template <class Queue>
  [[nodiscard]] static Seat* find(std::uint64_t id, const std::shared_ptr<SeatPool>& pool, Queue& queue) {
    Cached& cached = cache_[id % cache_size];
    if (cached.id == id) return cached.seat;
    if (ended_) return nullptr;
    static thread_local ThreadSeats seats;
    cached.seat = seats.look_up(id, pool, queue);
    cached.id = id;
    return cached.seat;
  }

  ~ThreadSeats() {
    ended_ = true;
    for (Cached& cached : cache_) cached = {};
    for (const auto& [id, entry] : entries_) entry.pool->give_back(entry.seat);
  }

 private:
  struct Cached {
    std::uint64_t id;  // 0: none
    Seat* seat;
  };
  struct Entry {
    std::shared_ptr<SeatPool> pool;
    Seat* seat;
  };

  template <class Queue>
  Seat* look_up(std::uint64_t id, const std::shared_ptr<SeatPool>& pool, Queue& queue) {
    const auto [entry, added] = entries_.try_emplace(id, Entry{pool, nullptr});
    if (!added) return entry->second.seat;
    try {
      entry->second.seat = pool->take(queue);
    } catch (...) {
      entries_.erase(entry);
      throw;
    }
    Seat* const seat = entry->second.seat;
    // Queues that have gone leave their entries behind; a sweep each time the number has doubled costs next to nothing.
    if (entries_.size() >= sweep_at_) {
      std::erase_if(entries_, [](const auto& item) { return item.second.pool->gone(); });
      sweep_at_ = std::max<std::size_t>(64, 2 * entries_.size());
    }
    return seat;
  }

  // Constant-initialised, so that the common case is two plain loads: of the last queues used, whose ids are different
  // in their last digit, as those of queues made one after the other are.
  static constexpr std::size_t cache_size = 16;
  static inline constinit thread_local Cached cache_[cache_size] = {};
  static inline constinit thread_local bool ended_ = false;

  std::unordered_map<std::uint64_t, Entry> entries_;
  std::size_t sweep_at_ = 64;
};

// Visible, so that there is one in the process and not one in each shared library: else two channels of the same id met
// in a thread's cache, and one got the other's seat.
[[gnu::visibility("default")]] inline constinit std::atomic<std::uint64_t> last_queue_id{0};

/// Ids that are never used again in this process; not 0.
[[nodiscard]] inline std::uint64_t next_queue_id() noexcept {
  return last_queue_id.fetch_add(1, std::memory_order_relaxed) + 1;
}

}  // namespace msgtrans::detail
