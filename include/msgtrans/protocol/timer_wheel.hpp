// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <msgtrans/protocol/time.hpp>
#include <optional>
#include <stdexcept>
#include <utility>

namespace msgtrans::protocol {

/// Timers by the thousand, each usually disarmed before it fires: the hierarchical timing wheel of G. Varghese and
/// T. Lauck, "Hashed and Hierarchical Timing Wheels" (SOSP 1987, scheme 7).
///
/// Five levels of 64 slots; with ticks of 1 ms they reach 2^30 ms, about 12 days, and deadlines beyond that wait in a
/// list of their own until they come within reach. Every slot is an intrusive list and every level has a bitmap of
/// its occupied slots, so time in which nothing is due costs nothing, however long it is. The tick is the granularity
/// of the slots, not of the firing: a timer fires in the first `advance()` whose time is its deadline or later.
///
/// Thread safety: none; one thread at a time, timers included.
/// Complexity: `arm`, `disarm`, `next_deadline` O(1). `advance` O(1) plus O(levels) for every timer that fires or comes
/// nearer; timers of the tick that `now` lies in may be looked at again. No call allocates.
class TimerWheel {
  struct Link {
    Link* prev = nullptr;
    Link* next = nullptr;
  };

 public:
  /// One timer: derive from it or hold it as a member. Its address is its identity, so it is neither copied nor moved.
  /// Destroying it disarms it. It may outlive the wheel, whose destruction disarms it.
  class Timer : private Link {
   public:
    Timer() noexcept = default;
    Timer(const Timer&) = delete;
    Timer& operator=(const Timer&) = delete;
    ~Timer() {
      if (wheel_ != nullptr) wheel_->disarm(*this);
    }

    /// True from `arm` until it is disarmed or about to be handed to `on_expired`.
    [[nodiscard]] bool armed() const noexcept { return wheel_ != nullptr; }
    /// The deadline given last; meaningful if it has ever been armed.
    [[nodiscard]] TimePoint deadline() const noexcept { return deadline_; }

   private:
    friend class TimerWheel;
    TimePoint deadline_{};
    TimerWheel* wheel_ = nullptr;
  };

  /// `start` is the earliest time that `advance` will be given; a deadline before it is as good as `start`.
  /// Throws std::invalid_argument if `tick` is not positive.
  explicit TimerWheel(TimePoint start, Duration tick = std::chrono::milliseconds(1)) : start_(start), tick_(tick) {
    if (tick <= Duration::zero()) throw std::invalid_argument("TimerWheel: tick must be positive");
    for (Link& slot : slots_) reset(slot);
    reset(far_);
    reset(due_);
  }

  TimerWheel(const TimerWheel&) = delete;
  TimerWheel& operator=(const TimerWheel&) = delete;

  /// Disarms what is armed. Not to be destroyed inside `on_expired`.
  ~TimerWheel() {
    for (Link& slot : slots_) forget(slot);
    forget(far_);
    forget(due_);
  }

  /// Arms the timer, or arms it anew, also if it was armed on another wheel. A deadline that has passed already fires
  /// in the next `advance` (never in the one that is running).
  void arm(Timer& timer, TimePoint deadline) noexcept {
    if (timer.wheel_ != nullptr) timer.wheel_->disarm(timer);
    timer.deadline_ = deadline;
    timer.wheel_ = this;
    ++size_;
    place(timer);
  }

  /// Disarms the timer; without effect if it is not armed. `timer` must not be armed on another wheel.
  void disarm(Timer& timer) noexcept {
    if (timer.wheel_ == nullptr) return;
    unlink(timer);
    timer.wheel_ = nullptr;
    --size_;
  }

  /// Fires every timer whose deadline is `now` or earlier: calls `on_expired(Timer&)` for each, disarmed, in the order
  /// of their ticks and within one tick in the order armed. Returns how many fired. A `now` earlier than the latest one
  /// fires nothing that is later than it.
  ///
  /// `on_expired` may arm, disarm and destroy any timer, this one and those due in the same call included (they then
  /// do not fire), and may call `advance`. If it throws, the exception passes through; the timers not yet fired stay
  /// armed and fire in the next `advance`.
  template <class F>
  std::size_t advance(TimePoint now, F&& on_expired) {
    collect(now);
    std::size_t fired = 0;
    while (due_.next != &due_) {
      Timer& timer = static_cast<Timer&>(*due_.next);
      disarm(timer);
      ++fired;
      on_expired(timer);
    }
    return fired;
  }

  /// When to call `advance` next: a time no later than the earliest deadline, nullopt if nothing is armed. It may be
  /// early (an `advance` at that time then fires nothing, but brings this value closer), never late.
  [[nodiscard]] std::optional<TimePoint> next_deadline() const noexcept {
    if (size_ == 0) return std::nullopt;
    TimePoint bound = due_.next != &due_ ? due_earliest_ : TimePoint::max();
    if (occupied_[0] != 0) {
      bound = std::min(bound, earliest_[lowest(0)]);
    } else if (const std::optional<std::uint64_t> tick = next_event()) {
      bound = std::min(bound, time_of(*tick));
    }
    return bound;
  }

  [[nodiscard]] bool empty() const noexcept { return size_ == 0; }
  /// How many timers are armed.
  [[nodiscard]] std::size_t size() const noexcept { return size_; }

 private:
  static constexpr unsigned digit_bits = 6;
  static constexpr unsigned slots_per_level = 1U << digit_bits;
  static constexpr unsigned levels = 5;
  static constexpr std::uint64_t ticks_per_lap = std::uint64_t{1} << (digit_bits * levels);

  static void reset(Link& list) noexcept { list.prev = list.next = &list; }

  static void append(Link& list, Link& link) noexcept {
    link.prev = list.prev;
    link.next = &list;
    list.prev->next = &link;
    list.prev = &link;
  }

  /// Moves all of `from` to the end of `to`.
  static void splice(Link& to, Link& from) noexcept {
    if (from.next == &from) return;
    from.next->prev = to.prev;
    from.prev->next = &to;
    to.prev->next = from.next;
    to.prev = from.prev;
    reset(from);
  }

  void forget(Link& list) noexcept {
    for (Link* link = list.next; link != &list;) {
      Timer& timer = static_cast<Timer&>(*link);
      link = link->next;
      timer.wheel_ = nullptr;
    }
  }

  void unlink(Link& link) noexcept {
    link.prev->next = link.next;
    link.next->prev = link.prev;
    if (link.prev != link.next) return;
    // It was alone, so its neighbour on both sides is the list's head; a slot's head has a bit.
    const Link* const head = link.prev;
    const Link* const first = slots_.data();
    if (std::less<>{}(head, first) || !std::less<>{}(head, first + slots_.size())) return;
    const auto index = static_cast<std::size_t>(head - first);
    occupied_[index / slots_per_level] &= ~(std::uint64_t{1} << (index % slots_per_level));
  }

  /// The tick that `time` lies in. Unsigned, so that the distance of two extreme times does not overflow.
  [[nodiscard]] std::uint64_t tick_of(TimePoint time) const noexcept {
    if (time <= start_) return 0;
    const std::uint64_t since = static_cast<std::uint64_t>(time.time_since_epoch().count()) -
                                static_cast<std::uint64_t>(start_.time_since_epoch().count());
    return since / static_cast<std::uint64_t>(tick_.count());
  }

  /// When the tick begins.
  [[nodiscard]] TimePoint time_of(std::uint64_t tick) const noexcept {
    const std::uint64_t count = static_cast<std::uint64_t>(start_.time_since_epoch().count()) +
                                tick * static_cast<std::uint64_t>(tick_.count());
    return TimePoint(Duration(static_cast<Duration::rep>(count)));
  }

  [[nodiscard]] unsigned lowest(unsigned level) const noexcept {
    return static_cast<unsigned>(std::countr_zero(occupied_[level]));
  }

  /// The level is that of the highest digit (base 64) in which the deadline's tick and the current one differ: so a
  /// slot's timers are nearer than those of every higher slot and level, and one tick's timers share one slot.
  void place(Timer& timer) noexcept {
    const std::uint64_t tick = std::max(tick_of(timer.deadline_), current_);
    const std::uint64_t differing = tick ^ current_;
    if (differing >= ticks_per_lap) {
      far_first_ = far_.next == &far_ ? tick : std::min(far_first_, tick);
      append(far_, timer);
      return;
    }
    const unsigned level = differing == 0 ? 0 : (static_cast<unsigned>(std::bit_width(differing)) - 1) / digit_bits;
    const unsigned slot = static_cast<unsigned>(tick >> (digit_bits * level)) % slots_per_level;
    const std::uint64_t bit = std::uint64_t{1} << slot;
    if (level == 0) {
      const bool first = (occupied_[0] & bit) == 0;
      earliest_[slot] = first ? timer.deadline_ : std::min(earliest_[slot], timer.deadline_);
    }
    occupied_[level] |= bit;
    append(slots_[level * slots_per_level + slot], timer);
  }

  void place_all(Link& list) noexcept {
    while (list.next != &list) {
      Timer& timer = static_cast<Timer&>(*list.next);
      list.next = timer.next;
      timer.next->prev = &list;
      place(timer);
    }
  }

  /// The first tick of the next occupied slot, nullopt if there is none. The lowest occupied level has it.
  [[nodiscard]] std::optional<std::uint64_t> next_event() const noexcept {
    for (unsigned level = 0; level < levels; ++level) {
      if (occupied_[level] == 0) continue;
      const std::uint64_t above = current_ >> (digit_bits * (level + 1)) << (digit_bits * (level + 1));
      return above | (std::uint64_t{lowest(level)} << (digit_bits * level));
    }
    if (far_.next != &far_) return far_first_ / ticks_per_lap * ticks_per_lap;
    return std::nullopt;
  }

  /// Moves the current tick to that of `now`, and all that is due by `now` to `due_`, in order.
  void collect(TimePoint now) noexcept {
    const std::uint64_t target = tick_of(now);
    while (current_ < target) {
      const std::optional<std::uint64_t> event = next_event();
      if (!event || *event > target || (*event == target && occupied_[0] != 0)) {
        current_ = target;
        break;
      }
      // Level 0 first: its slots lie before the next tick of any other level, and a whole slot is due.
      if (occupied_[0] != 0) {
        const unsigned slot = lowest(0);
        take_due(slots_[slot], earliest_[slot]);
        occupied_[0] &= occupied_[0] - 1;
        continue;
      }
      current_ = *event;
      cascade();
    }
    collect_current(now);
  }

  /// Brings the timers of the slot (or of the far list) that begins at the current tick nearer.
  void cascade() noexcept {
    Link list;
    reset(list);
    for (unsigned level = 1; level < levels; ++level) {
      if (occupied_[level] == 0) continue;
      splice(list, slots_[level * slots_per_level + lowest(level)]);
      occupied_[level] &= occupied_[level] - 1;
      place_all(list);
      return;
    }
    splice(list, far_);
    place_all(list);
  }

  /// The slot of the tick that `now` lies in: only what is due by `now`, and only if something may be.
  void collect_current(TimePoint now) noexcept {
    const auto slot = static_cast<unsigned>(current_ % slots_per_level);
    const std::uint64_t bit = std::uint64_t{1} << slot;
    if ((occupied_[0] & bit) == 0 || earliest_[slot] > now) return;
    Link later;
    Link sooner;
    reset(later);
    reset(sooner);
    TimePoint earliest_later = TimePoint::max();
    Link& list = slots_[slot];
    while (list.next != &list) {
      Timer& timer = static_cast<Timer&>(*list.next);
      list.next = timer.next;
      timer.next->prev = &list;
      if (timer.deadline_ <= now) {
        append(sooner, timer);
      } else {
        earliest_later = std::min(earliest_later, timer.deadline_);
        append(later, timer);
      }
    }
    take_due(sooner, earliest_[slot]);
    splice(list, later);
    earliest_[slot] = earliest_later;
    if (list.next == &list) occupied_[0] &= ~bit;
  }

  void take_due(Link& list, TimePoint earliest) noexcept {
    if (list.next == &list) return;
    due_earliest_ = due_.next == &due_ ? earliest : std::min(due_earliest_, earliest);
    splice(due_, list);
  }

  TimePoint start_;
  Duration tick_;
  std::uint64_t current_ = 0;  // tick; every slot before it is empty, and no higher slot that holds it is occupied
  std::size_t size_ = 0;       // slots, far and due
  std::array<std::uint64_t, levels> occupied_{};  // a bit a slot: set if and only if the slot has timers
  std::array<Link, slots_per_level * levels> slots_;
  std::array<TimePoint, slots_per_level> earliest_{};  // of an occupied slot of level 0: no deadline in it is earlier
  Link far_;                                           // deadlines beyond the lap of `current_`
  std::uint64_t far_first_ = 0;                        // if far_ is not empty: no tick in it is earlier
  Link due_;                                           // being fired, or left by a callback that threw
  TimePoint due_earliest_{};                           // if due_ is not empty: no deadline in it is earlier
};

}  // namespace msgtrans::protocol
