// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <msgtrans/detail/pause.hpp>
#include <sched.h>
#include <semaphore.h>
#include <thread>

namespace msgtrans::detail {

/// Until when a blocking call waits; the default is for ever. On the monotonic clock.
using WaitDeadline = std::chrono::steady_clock::time_point;
inline constexpr WaitDeadline no_deadline = WaitDeadline::max();

/// The deadline of a wait of that length; also of "for ever" as people write it.
template <class Rep, class Period>
[[nodiscard]] WaitDeadline deadline_after(std::chrono::duration<Rep, Period> time) noexcept {
  const auto now = std::chrono::steady_clock::now();
  if (time <= time.zero()) return now;
  if (std::chrono::duration<double>(time) >= std::chrono::duration<double>(no_deadline - now)) return no_deadline;
  return now + std::chrono::ceil<std::chrono::steady_clock::duration>(time);
}

/// Where threads sleep until something that they all wait for may be there: an event count (D. Vyukov's, as in Folly
/// and Eigen), with the wakes chained: at most one is under way, and who is woken wakes the next if there is more. So a
/// burst of messages costs its sender one wake, and not one for each.
///
/// The condition is the caller's: he changes it by a sequentially consistent operation and then calls `notify`; `wait`
/// asks for it.
class WaitingRoom {
 public:
  WaitingRoom() noexcept { ::sem_init(&sleepers_, 0, 0); }
  /// Nobody may be in it any more; see `wait_until_empty`.
  ~WaitingRoom() { ::sem_destroy(&sleepers_); }
  WaitingRoom(const WaitingRoom&) = delete;
  WaitingRoom& operator=(const WaitingRoom&) = delete;

  /// Who is inside. Its end is a waiter's last touch of the room: the owner may go then.
  class Visit {
   public:
    explicit Visit(std::atomic<std::uint32_t>& inside) noexcept : inside_(inside) {
      inside_.fetch_add(1, std::memory_order_relaxed);
    }
    ~Visit() { inside_.fetch_sub(1, std::memory_order_release); }
    Visit(const Visit&) = delete;
    Visit& operator=(const Visit&) = delete;

   private:
    std::atomic<std::uint32_t>& inside_;
  };

  /// For who still uses the owner when a wait is over.
  [[nodiscard]] Visit enter() noexcept { return Visit(inside_); }

  /// Waits until `attempt()` gives true, or the deadline; returns what it gave last. `more()` says whether the one who
  /// comes next would succeed as well. Spins, then yields, then sleeps; nothing of this is touched after the caller's
  /// attempt that succeeded, except to leave.
  template <class Attempt, class More>
  bool wait(Attempt attempt, More more, WaitDeadline deadline) noexcept {
    // A short spin, a few yields: a wake costs as much as a thousand messages. A long spin would take the core from
    // the very thread that is waited for.
    constexpr int spins = 20;
    constexpr int yields = 20;
    const Visit visit(inside_);
    for (int i = 0; i < spins; ++i) {
      if (attempt()) return true;
      pause_briefly();
    }
    if (deadline != no_deadline && std::chrono::steady_clock::now() >= deadline) return attempt();
    for (int i = 0; i < yields; ++i) {
      if (attempt()) return true;
      std::this_thread::yield();
    }
    waiting_.fetch_add(1);
    bool done = attempt();
    while (!done && sleep(deadline)) {
      waking_.store(false);
      done = attempt();
    }
    if (!done) done = attempt();  // what came at the last moment
    // The wake that we used up, or kept others from sending, goes on to the next.
    if (waiting_.load() > 1 && more()) wake();
    waiting_.fetch_sub(1);
    return done;
  }

  /// Wakes one sleeper, if there is one and no wake is under way. No lock, and no system call unless somebody sleeps.
  void notify() noexcept {
    if (waiting_.load() != 0) wake();
  }

  /// After a change that makes every wait succeed, and with nobody new coming.
  void wait_until_empty() const noexcept {
    while (inside_.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  }

 private:
  void wake() noexcept {
    // A look first: while a wake is under way the line stays shared.
    if (!waking_.load() && !waking_.exchange(true)) ::sem_post(&sleepers_);
  }

  /// False at the deadline.
  bool sleep(WaitDeadline deadline) noexcept {
    for (;;) {
      int result = 0;
      if (deadline == no_deadline) {
        result = ::sem_wait(&sleepers_);
      } else {
        const auto since_boot = deadline.time_since_epoch();
        const auto seconds = std::chrono::floor<std::chrono::seconds>(since_boot);
        timespec when{};
        when.tv_sec = static_cast<time_t>(seconds.count());
        when.tv_nsec = static_cast<long>(std::chrono::nanoseconds(since_boot - seconds).count());
        result = ::sem_clockwait(&sleepers_, CLOCK_MONOTONIC, &when);
      }
      if (result == 0) return true;
      if (errno != EINTR) return false;
    }
  }

  // No wake is lost. All operations on waiting_ and waking_, the caller's change of his condition and his attempts'
  // loads of it are sequentially consistent, so they stand in one order S.
  //
  // (1) Somebody registers in waiting_ and then attempts; somebody else changes the condition and then reads waiting_.
  //     In S either the registration comes before the reading, which then wakes, or the change comes before the
  //     attempt, which then succeeds (Dekker).
  // (2) Invariant: while waking_ is true, either the semaphore has a token, or a thread stands between the end of its
  //     sleep and its waking_ = false. So a wake that is left out because waking_ is true is made up for: that thread's
  //     attempt comes later in S than the change, and when it leaves it wakes the next if there is more. A sleeper
  //     that leaves without taking the token (its time was over, or its attempt succeeded before it slept) leaves the
  //     token to the next: it ends one sleep at once, and is gone with it.
  std::atomic<std::uint32_t> waiting_{0};
  std::atomic<bool> waking_{false};
  std::atomic<std::uint32_t> inside_{0};
  sem_t sleepers_;
};

}  // namespace msgtrans::detail
