// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <type_traits>
#include <utility>

#ifdef __linux__
#include <linux/membarrier.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__SANITIZE_THREAD__)
#define MSGTRANS_EPOCH_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MSGTRANS_EPOCH_TSAN 1
#endif
#endif
#ifndef MSGTRANS_EPOCH_TSAN
#define MSGTRANS_EPOCH_TSAN 0
#endif

namespace msgtrans::lockfree {

/// What is given to `Epoch::retire` derives from this. It is two words, and retiring allocates nothing.
struct Retired {
  Retired* next = nullptr;
  void (*destroy)(Retired*) noexcept = nullptr;
};

namespace epoch_detail {

inline constexpr std::size_t bag_count = 4;

/// A chain of retired objects.
struct Chain {
  Retired* first = nullptr;
  Retired* last = nullptr;
  std::size_t count = 0;

  void push(Retired& object) noexcept {
    object.next = first;
    if (first == nullptr) last = &object;
    first = &object;
    ++count;
  }
  void append(Chain other) noexcept {
    if (other.first == nullptr) return;
    other.last->next = first;
    if (first == nullptr) last = other.last;
    first = other.first;
    count += other.count;
  }
  Chain take() noexcept { return std::exchange(*this, Chain()); }
};
struct Bag {
  std::uint64_t stamp = 0;
  Chain objects;
  Chain take() noexcept { return objects.take(); }
};

struct alignas(128) Record {
  [[nodiscard]] bool is_pinned() const noexcept { return pinned.load(std::memory_order_relaxed) != 0; }

  // 0: not in a guard; else the epoch that was read on entering.
  std::atomic<std::uint64_t> pinned{0};
  // The rest is the owner's; in_use hands it over.
  bool due = false;
  std::size_t retired = 0;
  Bag bags[bag_count];
  Chain ready;  // may be destroyed at once
  std::atomic<bool> in_use{true};
  Record* next = nullptr;
};

struct Domain {
  std::atomic<std::uint64_t> epoch{1};
  std::atomic<Record*> records{nullptr};
  std::atomic<bool> asymmetric{false};  // the same once anybody has attached
  // What ended threads have left; rarely touched.
  std::mutex orphans_mutex;
  Bag orphans[bag_count];
  Chain orphans_ready;
  std::atomic<bool> has_orphans{false};
};

// Constant-initialised and trivially destroyed, so there from before the first line to after the last. Visible, so that
// there is one in the process: with one in each shared library, a map that two of them share would be read under the
// guards of one and reclaimed by the other.
[[gnu::visibility("default")]] inline constinit Domain domain;
static_assert(std::is_trivially_destructible_v<Domain>);

}  // namespace epoch_detail

/// Safe reclamation for lock-free structures: what was unlinked is destroyed when nobody can still be reading it.
/// Epochs as in K. Fraser, "Practical lock-freedom" (UCAM-CL-TR-579, 2004), laid out like crossbeam-epoch; the barrier
/// of readers is moved to the reclaimer by membarrier(2), so that entering a guard costs two plain stores.
///
/// There is one domain for the process, made when it is first used and never destroyed: it does not depend on the order
/// of static destruction, and what is still retired at the end of the process is left to its end.
///
/// A thread needs no set-up: its record is made when it first enters a guard (that may throw `std::bad_alloc`; nothing
/// else does) and is used again by another thread after its end. What it had retired by then is left to whoever
/// collects next. Guards work in destructors of `thread_local` and of static objects as well.
///
/// A reader that stays in a guard holds up destruction everywhere, and nothing else: nobody ever waits for it.
class Epoch {
  using Record = epoch_detail::Record;

 public:
  /// While it lives, nothing that could be reached through a lock-free structure is destroyed. Nests. Stays on its
  /// thread.
  class [[nodiscard]] Guard {
   public:
    Guard() : record_(current_ != nullptr ? *current_ : *attach()), is_outermost_(!record_.is_pinned()) {
      if (is_outermost_) pin(record_);
    }
    ~Guard() {
      if (is_outermost_) unpin(record_);
    }
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;

   private:
    Record& record_;
    const bool
        is_outermost_;  // and not a count in the record, which each guard would have to wait for the last one to store
  };

  /// Destroys `object` by `object.destroy` some time later, on any thread, outside of guards. The caller is in a guard
  /// and has made `object` unreachable for those who enter one later. `destroy` may use guards and retire. O(1), and
  /// every 128th time a walk over the threads.
  static void retire(Retired& object) noexcept {
    Record& record = *current_;
    const std::uint64_t now = epoch_detail::domain.epoch.load(std::memory_order_acquire);
    Bag& bag = record.bags[now % bag_count];
    if (bag.stamp != now) {
      // Another epoch's, four back at least: its time has come, see `expired`.
      record.ready.append(bag.take());
      bag.stamp = now;
    }
    bag.objects.push(object);
    if (++record.retired >= collect_every) record.due = true;
  }

  /// Destroys all that this thread, and threads that have ended, have retired, as far as nobody in a guard is in the
  /// way. Outside of a guard; in one it does nothing.
  static void collect() {
    if (current_ != nullptr && current_->is_pinned()) return;
    { const Guard attached; }
    // An object's epoch has to be three back.
    for (int i = 0; i < 3; ++i) advance();
    collect_from(current_);
  }

  /// How many objects this thread has retired that are not yet destroyed.
  [[nodiscard]] static std::size_t pending() noexcept {
    if (current_ == nullptr) return 0;
    std::size_t count = current_->ready.count;
    for (const Bag& bag : current_->bags) count += bag.objects.count;
    return count;
  }

 private:
  static constexpr std::size_t collect_every = 128;
  static constexpr std::size_t bag_count = epoch_detail::bag_count;
  static constexpr std::uint64_t safe_after = 3;

  using Chain = epoch_detail::Chain;
  using Bag = epoch_detail::Bag;

  /// Gives the thread's record back at its end.
  struct Detacher {
    ~Detacher() {
      ended_ = true;
      if (current_ == nullptr) return;
      if (current_->is_pinned()) {
        current_->due = true;
      } else {
        detach();
      }
    }
  };

  // How long it takes. An object unlinked by thread U, which then read epoch v, may be destroyed once the epoch is v
  // + 3.
  //
  // `light` and `heavy` are an asymmetric pair: for a light barrier of R and a heavy one of A, either A sees after its
  // own what R did before the light one, or R sees after it what A did before the heavy one.
  //
  // An advance from x to x + 1 reads epoch x (acquire), does `heavy`, reads all records, finds each out of guards or
  // pinned at x, and does the compare-exchange (acquire-release).
  //
  // (1) The advance from v + 1 to v + 2 happens after U's unlinking. U was in a guard, pinned at v or less. If the
  // advance
  //     saw U pinned at v + 1, or out of that guard, U's store came after the unlinking and was released. If it saw U
  //     as it was before that guard, then by the barriers U, after entering, would have read an epoch of at least v +
  //     1; but it read v.
  // (2) The advance from v + 2 to v + 3 finds no reader R that can hold the object. It happens after (1), so after the
  //     unlinking. If it saw R pinned at v + 2, R had read v + 2 (acquire) on entering, and so sees the unlinking. If
  //     it saw R out of a guard, R had done with all it read in it (release). If R has entered one unseen, then by the
  //     barriers R sees the unlinking.
  //
  // Bags are kept by epoch modulo four, so one that is found with another stamp is four or more back.
  static bool expired(const Bag& bag, std::uint64_t now) noexcept { return now - bag.stamp >= safe_after; }

#if MSGTRANS_EPOCH_TSAN
  // ThreadSanitizer knows no fences: there the two barriers are read-modify-writes of the record.
  static void pin(Record& record) noexcept {
    record.pinned.exchange(epoch_detail::domain.epoch.load(std::memory_order_acquire));
  }
  static void heavy_barrier() noexcept {}
  static std::uint64_t look_at(Record& record) noexcept {
    return record.pinned.fetch_add(0);
  }
#else
  static void pin(Record& record) noexcept {
    record.pinned.store(epoch_detail::domain.epoch.load(std::memory_order_acquire), std::memory_order_release);
    // The light barrier.
    if (epoch_detail::domain.asymmetric.load(std::memory_order_relaxed)) {
      std::atomic_signal_fence(std::memory_order_seq_cst);
    } else {
      std::atomic_thread_fence(std::memory_order_seq_cst);
    }
  }
  static void heavy_barrier() noexcept {
#ifdef __linux__
    if (epoch_detail::domain.asymmetric.load(std::memory_order_relaxed)) {
      ::syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
      return;
    }
#endif
    std::atomic_thread_fence(std::memory_order_seq_cst);
  }
  static std::uint64_t look_at(const Record& record) noexcept {
    return record.pinned.load(std::memory_order_acquire);
  }
#endif
  static void unpin(Record& record) noexcept {
    record.pinned.store(0, std::memory_order_release);
    if (record.due) tidy_up(record);
  }
  /// What is seldom to be done on leaving a guard.
  [[gnu::noinline]] static void tidy_up(Record& record) noexcept {
    record.due = false;
    if (record.retired >= collect_every) {
      record.retired = 0;
      advance();
      collect_from(&record);
    }
    if (ended_ && current_ != nullptr) detach();
  }

  static void advance() noexcept {
    auto& all = epoch_detail::domain;
    std::uint64_t now = all.epoch.load(std::memory_order_acquire);
    heavy_barrier();
    for (Record* record = all.records.load(std::memory_order_acquire); record != nullptr; record = record->next) {
      const std::uint64_t pinned = look_at(*record);
      if (pinned != 0 && pinned != now) return;
    }
    all.epoch.compare_exchange_strong(now, now + 1, std::memory_order_acq_rel);
  }

  /// `record` may be null: then only what ended threads have left.
  static void collect_from(Record* record) noexcept {
    auto& all = epoch_detail::domain;
    const std::uint64_t now = all.epoch.load(std::memory_order_acquire);
    Chain ready;
    if (record != nullptr) {
      ready = record->ready.take();
      for (Bag& bag : record->bags) {
        if (expired(bag, now)) ready.append(bag.take());
      }
    }
    if (all.has_orphans.load(std::memory_order_relaxed)) {
      const std::lock_guard lock(all.orphans_mutex);
      ready.append(all.orphans_ready.take());
      bool left = false;
      for (Bag& bag : all.orphans) {
        if (expired(bag, now)) ready.append(bag.take());
        left = left || bag.objects.count != 0;
      }
      all.has_orphans.store(left, std::memory_order_relaxed);
    }
    // Whatever a destructor does finds everything in order.
    for (Retired* object = ready.first; object != nullptr;) {
      Retired* const next = object->next;
      object->destroy(object);
      object = next;
    }
  }

  [[gnu::noinline]] static Record* attach() {
    auto& all = epoch_detail::domain;
#if defined(__linux__) && !MSGTRANS_EPOCH_TSAN
    // Before anybody's first guard.
    static const bool registered = ::syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0;
    all.asymmetric.store(registered, std::memory_order_relaxed);
#endif
    Record* record = all.records.load(std::memory_order_acquire);
    for (; record != nullptr; record = record->next) {
      bool used = record->in_use.load(std::memory_order_relaxed);
      if (!used && record->in_use.compare_exchange_strong(used, true, std::memory_order_acquire)) break;
    }
    if (record == nullptr) {
      record = new Record;
      record->next = all.records.load(std::memory_order_relaxed);
      while (!all.records.compare_exchange_weak(record->next, record, std::memory_order_acq_rel)) {
      }
    }
    current_ = record;
    if (ended_) {
      record->due = true;  // to be given back on leaving
    } else {
      static thread_local Detacher detacher;
      (void)detacher;
    }
    return record;
  }

  static void detach() noexcept {
    Record* const record = std::exchange(current_, nullptr);
    auto& all = epoch_detail::domain;
    {
      const std::lock_guard lock(all.orphans_mutex);
      for (Bag& bag : record->bags) {
        if (bag.objects.count == 0) continue;
        Bag& orphans = all.orphans[bag.stamp % bag_count];
        if (orphans.stamp > bag.stamp) {
          all.orphans_ready.append(bag.take());  // four or more back
          continue;
        }
        if (orphans.stamp != bag.stamp) {
          all.orphans_ready.append(orphans.take());
          orphans.stamp = bag.stamp;
        }
        orphans.objects.append(bag.take());
      }
      all.orphans_ready.append(record->ready.take());
      all.has_orphans.store(true, std::memory_order_relaxed);
    }
    record->due = false;
    record->in_use.store(false, std::memory_order_release);
  }

  [[gnu::visibility("default")]] static inline constinit thread_local Record* current_ = nullptr;
  [[gnu::visibility("default")]] static inline constinit thread_local bool ended_ = false;
};

}  // namespace msgtrans::lockfree
