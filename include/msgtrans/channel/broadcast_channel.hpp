// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/async_result.hpp>
#include <boost/intrusive/list.hpp>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <msgtrans/channel/channel_status.hpp>
#include <msgtrans/detail/async_operation.hpp>
#include <msgtrans/detail/async_waiters.hpp>
#include <msgtrans/detail/blocking.hpp>
#include <msgtrans/detail/event_ring.hpp>
#include <msgtrans/detail/waiting_room.hpp>
#include <msgtrans/error.hpp>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>

namespace msgtrans {

/// What a subscription gives next: an event; or how many were missed; or why there is nothing.
template <class T>
class [[nodiscard]] NextResult {
 public:
  enum class Kind : unsigned char {
    event,
    lagged,             ///< so many events were overwritten before they were read; the next one is the oldest kept
    empty,              ///< nothing now
    timeout,            ///< the time went by first
    closed,             ///< nothing will come any more: the channel is closed, or the subscription ended
    blocking_on_shard,  ///< a call that would block, on a thread that must not; nothing was done
  };

  /// Not `event`, not `lagged`. The default is what Asio's operations that fail give beside their error.
  NextResult(Kind kind = Kind::closed) noexcept : kind_(kind) {}
  [[nodiscard]] static NextResult lag(std::uint64_t missed) noexcept {
    NextResult result(Kind::lagged);
    result.missed_ = missed;
    return result;
  }
  explicit NextResult(T event) noexcept : kind_(Kind::event), event_(std::move(event)) {}

  [[nodiscard]] Kind kind() const noexcept { return kind_; }
  /// True if there is an event.
  explicit operator bool() const noexcept { return kind_ == Kind::event; }
  /// How many were missed; 0 unless `lagged`.
  [[nodiscard]] std::uint64_t lagged() const noexcept { return missed_; }
  [[nodiscard]] bool closed() const noexcept { return kind_ == Kind::closed; }
  /// Undefined without an event, as for `std::optional`.
  T& operator*() & noexcept { return *event_; }
  const T& operator*() const& noexcept { return *event_; }
  T&& operator*() && noexcept { return *std::move(event_); }
  T* operator->() noexcept { return &*event_; }
  const T* operator->() const noexcept { return &*event_; }

 private:
  Kind kind_;
  std::uint64_t missed_ = 0;
  std::optional<T> event_;
};

namespace detail {

/// Where a subscriber stands, for those who ask how far it is behind.
struct SubscriberPlace : boost::intrusive::list_base_hook<> {
  explicit SubscriberPlace(std::uint64_t at) noexcept : cursor(at) {}

  std::atomic<std::uint64_t> cursor;  // moved by whoever receives for it at the moment
  std::atomic<bool> ended{false};
};

/// What a broadcast channel and its subscriptions share.
template <class T>
class BroadcastState final : public ContextMember {
 public:
  BroadcastState(boost::asio::any_io_executor executor, std::size_t capacity, std::shared_ptr<void> context)
      : ContextMember(executor),
        context_(std::move(context)),
        executor_(std::move(executor)),
        capacity_(capacity),
        ring_(capacity) {}

  [[nodiscard]] const boost::asio::any_io_executor& executor() const noexcept { return executor_; }
  [[nodiscard]] std::size_t capacity() const noexcept { return capacity_; }
  [[nodiscard]] std::uint64_t tail() const noexcept { return tail_.load() / one_event; }
  [[nodiscard]] bool is_closed() const noexcept { return (tail_.load() & closed_bit) != 0; }

  ChannelStatus send(T&& value) {
    std::uint64_t tail = tail_.load(std::memory_order_relaxed);
    if ((tail & closed_bit) != 0) return ChannelStatus::closed;
    auto prepared = ring_.prepare(std::move(value));
    do {
      if ((tail & closed_bit) != 0) {
        ring_.take_back(prepared, value);
        return ChannelStatus::closed;
      }
    } while (!tail_.compare_exchange_weak(tail, tail + one_event));
    ring_.write(tail / one_event, std::move(prepared));
    wake_all();
    return ChannelStatus::ok;
  }

  void close() noexcept {
    if ((tail_.fetch_or(closed_bit) & closed_bit) != 0) return;
    wake_all();
  }

  /// The next of a subscriber who stands at `cursor`, which moves on. May throw what copying an event throws, and then
  /// it stays.
  NextResult<T> next(std::uint64_t& cursor) {
    for (;;) {
      const std::uint64_t word = tail_.load();
      const std::uint64_t tail = word / one_event;
      if (cursor == tail) {
        return (word & closed_bit) != 0 ? NextResult<T>::Kind::closed : NextResult<T>::Kind::empty;
      }
      if (tail - cursor > capacity_) {
        const std::uint64_t gone = tail - cursor - capacity_;
        cursor += gone;
        return NextResult<T>::lag(gone);
      }
      std::optional<T> event;
      switch (ring_.read(cursor, event)) {
        case RingRead::value: ++cursor; return NextResult<T>(std::move(*event));
        case RingRead::not_yet: return NextResult<T>::Kind::empty;
        case RingRead::overwritten: break;  // and so the tail has moved on, further than the capacity
      }
    }
  }
  /// Whether `next` would not give `empty`.
  [[nodiscard]] bool ready(std::uint64_t cursor) const {
    const std::uint64_t word = tail_.load();
    const std::uint64_t tail = word / one_event;
    if (cursor == tail) return (word & closed_bit) != 0;
    return tail - cursor > capacity_ || ring_.is_written(cursor);
  }

  void wake_all() noexcept {
    waiters_.wake_all_grouped();
    if (sleepers_.load() != 0) {
      { const std::lock_guard lock(sleep_mutex_); }
      sleep_.notify_all();
    }
  }
  /// Blocks until `ready()`, or the deadline.
  template <class Ready>
  bool sleep_until(Ready ready, WaitDeadline deadline) {
    constexpr int spins = 20;
    constexpr int yields = 20;
    for (int i = 0; i < spins + yields; ++i) {
      if (ready()) return true;
      if (i < spins) {
        pause_briefly();
      } else {
        std::this_thread::yield();
      }
    }
    std::unique_lock lock(sleep_mutex_);
    sleepers_.fetch_add(1);
    bool done = false;
    if (deadline == no_deadline) {
      sleep_.wait(lock, ready);
      done = true;
    } else {
      done = sleep_.wait_until(lock, deadline, ready);
    }
    sleepers_.fetch_sub(1);
    return done;
  }

  void join(SubscriberPlace& place) noexcept {
    const std::lock_guard lock(places_mutex_);
    places_.push_back(place);
  }
  void leave(SubscriberPlace& place) noexcept {
    const std::lock_guard lock(places_mutex_);
    places_.erase(places_.iterator_to(place));
  }
  /// How many events there are for the one that is furthest behind.
  [[nodiscard]] std::uint64_t lag() const noexcept {
    const std::lock_guard lock(places_mutex_);
    std::uint64_t most = 0;
    for (const SubscriberPlace& place : places_) {
      if (!place.ended.load(std::memory_order_relaxed)) most = std::max(most, behind(place));
    }
    return most;
  }
  [[nodiscard]] std::uint64_t behind(const SubscriberPlace& place) const noexcept {
    // In this order: the tail is never behind a cursor that was seen before it.
    const std::uint64_t cursor = place.cursor.load(std::memory_order_acquire);
    return tail() - cursor;
  }

  [[nodiscard]] AsyncWaiters& waiters() noexcept { return waiters_; }
  std::atomic<std::size_t> subscribers{0};
  std::atomic<std::uint64_t> missed{0};

 private:
  static constexpr std::uint64_t closed_bit = 1;
  static constexpr std::uint64_t one_event = 2;

  void on_context_end() noexcept override { waiters_.discard_all(); }

  const std::shared_ptr<void> context_;  // of executor_, if it has to be kept for it
  const boost::asio::any_io_executor executor_;
  const std::size_t capacity_;
  EventRing<T> ring_;
  // Positions given out, twice, and whether there will be more. One word, so that closing has one place among the
  // sends.
  //
  // No wake is lost: a position is written, and closing done, by a sequentially consistent operation before the numbers
  // of those who wait are read; they are counted before they look for the last time. One of the two sees the other.
  alignas(64) std::atomic<std::uint64_t> tail_{0};
  AsyncWaiters waiters_;
  std::atomic<std::uint32_t> sleepers_{0};
  std::mutex sleep_mutex_;
  std::condition_variable sleep_;
  mutable std::mutex places_mutex_;  // of those who come, go or ask; receiving takes none
  boost::intrusive::list<SubscriberPlace, boost::intrusive::constant_time_size<false>> places_;
};

/// A subscriber's place. Its operation may be on its way when the subscription goes.
template <class T>
struct Subscriber : SubscriberPlace {
  explicit Subscriber(std::shared_ptr<BroadcastState<T>> in) : SubscriberPlace(in->tail()), state(std::move(in)) {
    state->subscribers.fetch_add(1, std::memory_order_relaxed);
    state->join(*this);
  }
  ~Subscriber() {
    state->leave(*this);
    state->subscribers.fetch_sub(1, std::memory_order_relaxed);
  }
  Subscriber(const Subscriber&) = delete;
  Subscriber& operator=(const Subscriber&) = delete;

  NextResult<T> next() {
    if (ended.load(std::memory_order_acquire)) return NextResult<T>::Kind::closed;
    std::uint64_t at = cursor.load(std::memory_order_relaxed);
    auto result = state->next(at);
    cursor.store(at, std::memory_order_release);
    if (result.lagged() != 0) {
      missed.fetch_add(result.lagged(), std::memory_order_relaxed);
      state->missed.fetch_add(result.lagged(), std::memory_order_relaxed);
    }
    return result;
  }

  const std::shared_ptr<BroadcastState<T>> state;
  std::atomic<std::uint64_t> missed{0};
};

template <class T>
class NextStep {
 public:
  using State = BroadcastState<T>;
  explicit NextStep(std::shared_ptr<Subscriber<T>> subscriber) noexcept : subscriber_(std::move(subscriber)) {}

  struct Probe {
    std::shared_ptr<Subscriber<T>> subscriber;
    std::uint64_t cursor;
    [[nodiscard]] bool ready(State& state) const { return subscriber->ended.load() || state.ready(cursor); }
    static void wake(State& state) noexcept { state.wake_all(); }
  };
  [[nodiscard]] Probe probe() const noexcept {
    return {subscriber_, subscriber_->cursor.load(std::memory_order_relaxed)};
  }
  static AsyncWaiters& waiters(State& state) noexcept { return state.waiters(); }
  static void pass_on(State&) noexcept {}

  bool attempt(State&) noexcept {
    try {
      result_.emplace(subscriber_->next());
      return result_->kind() != NextResult<T>::Kind::empty;
    } catch (...) {
      // What copying has thrown. The event is still there.
      error_ = boost::system::errc::make_error_code(boost::system::errc::not_enough_memory);
      return true;
    }
  }
  template <class Handler>
  void complete(Handler&& handler, error_code cancelled) {
    if (cancelled) error_ = cancelled;
    if (!error_ && result_->closed()) error_ = make_error_code(Errc::closed);
    subscriber_.reset();
    std::forward<Handler>(handler)(error_, error_ ? NextResult<T>() : std::move(*result_));
  }

 private:
  std::shared_ptr<Subscriber<T>> subscriber_;
  std::optional<NextResult<T>> result_;
  error_code error_;
};

}  // namespace detail

/// One reader of a BroadcastChannel. It begins with the events sent after it was made, gets every one of them or is
/// told how many it has missed, and may outlive the channel.
///
/// One receive at a time (they move its place); `unsubscribe` and the counters from any thread. Movable; what is moved
/// from may only be assigned to and destroyed.
template <class T>
class Subscription {
 public:
  Subscription(Subscription&&) noexcept = default;
  Subscription& operator=(Subscription&& other) noexcept {
    if (this != &other) {
      unsubscribe();
      subscriber_ = std::move(other.subscriber_);
    }
    return *this;
  }
  ~Subscription() { unsubscribe(); }

  /// An event, `lagged`, `empty` or `closed`. Does not wait. If copying an event throws, the event is the next one
  /// still.
  NextResult<T> try_next() { return subscriber_->next(); }
  /// Blocks the thread: an event, `lagged` or `closed`; `blocking_on_shard` on a thread that must not be blocked.
  NextResult<T> next() { return next_until(detail::no_deadline); }
  /// The same, at most that long: also `timeout`.
  template <class Rep, class Period>
  NextResult<T> next_for(std::chrono::duration<Rep, Period> time) {
    return next_until(detail::deadline_after(time));
  }
  /// Completes with `void(error_code, NextResult<T>)`: an event, or `lagged`, which is no error; or `Errc::closed`,
  /// `operation_aborted`, or `not_enough_memory` when an event could not be copied. Never inside the call; on the
  /// handler's executor (by default the channel's); with its allocator. Cancellation of every type loses no event.
  template <class CompletionToken>
  auto async_next(CompletionToken&& token) {
    using Step = detail::NextStep<T>;
    using State = detail::BroadcastState<T>;
    return boost::asio::async_initiate<CompletionToken, void(error_code, NextResult<T>)>(
        [](auto handler, std::shared_ptr<State> state, Step step) {
          using Operation = detail::AsyncOperation<State, Step, decltype(handler)>;
          Operation::start(std::move(state), std::move(step), std::move(handler));
        },
        token, subscriber_->state, Step(subscriber_));
  }

  /// Ends it: whoever waits in it gets `closed`. Again: nothing.
  void unsubscribe() noexcept {
    if (!subscriber_ || subscriber_->ended.exchange(true)) return;
    subscriber_->state->wake_all();
  }

  /// How many events it was told that it has missed.
  [[nodiscard]] std::uint64_t missed() const noexcept { return subscriber_->missed.load(std::memory_order_relaxed); }
  /// How many events were sent that it has neither got nor been told that it has missed. Any thread.
  [[nodiscard]] std::uint64_t lag() const noexcept { return subscriber_->state->behind(*subscriber_); }

 private:
  template <class>
  friend class BroadcastChannel;
  explicit Subscription(std::shared_ptr<detail::Subscriber<T>> subscriber) noexcept
      : subscriber_(std::move(subscriber)) {}

  NextResult<T> next_until(detail::WaitDeadline deadline) {
    using Kind = typename NextResult<T>::Kind;
    NextResult<T> result = subscriber_->next();
    if (result.kind() != Kind::empty) return result;
    if (detail::must_not_block != 0) return Kind::blocking_on_shard;
    const auto subscriber = subscriber_;  // the channel, or the subscription, may be destroyed while this waits
    const auto ready = [&subscriber] {
      return subscriber->ended.load() || subscriber->state->ready(subscriber->cursor.load(std::memory_order_relaxed));
    };
    do {
      if (!subscriber->state->sleep_until(ready, deadline)) return Kind::timeout;
      result = subscriber->next();
    } while (result.kind() == Kind::empty);
    return result;
  }

  std::shared_ptr<detail::Subscriber<T>> subscriber_;
};

/// Everything that is sent goes to every subscriber: the channel for events. A ring of the last events; a subscriber
/// that falls behind by more than the ring holds is told exactly how many it has missed, and goes on with the oldest
/// kept.
///
/// Sending waits for no subscriber, costs the same for any number of them while none of them sleeps, and allocates
/// nothing for each. An event of up to 64 bytes that is trivially copyable is kept in the ring itself, any other in a
/// node of its own; a receiver gets a copy, so T is copyable. Send a `std::shared_ptr<const Event>` if copying is dear.
///
/// Order: all subscribers see the same order, in which what one thread sends is in the order sent, and what is sent
/// before something else is sent comes first.
///
/// Thread safety: every call from any thread, except the destructor; that closes. Events sent before `close` are still
/// received, then every subscription says `closed`.
template <class T>
class BroadcastChannel {
  static_assert(std::is_copy_constructible_v<T>,
                "BroadcastChannel<T>: T must be copyable, since every subscriber gets one; wrap it in a "
                "std::shared_ptr<const T>");
  static_assert(std::is_nothrow_move_constructible_v<T> && std::is_nothrow_destructible_v<T>,
                "BroadcastChannel<T>: T must be nothrow move constructible; wrap it in a std::shared_ptr<const T>");

 public:
  static constexpr std::size_t max_capacity = std::size_t{1} << 24;

  /// Keeps `capacity` events, rounded up to a power of two; from 1 to `max_capacity`, or `Exception` with
  /// `Errc::invalid_option`. `executor`: for handlers that have none. `context`: what has to be kept for the executor,
  /// as long as the channel or a subscription is there; null if its context lives longer anyway.
  BroadcastChannel(boost::asio::any_io_executor executor, std::size_t capacity, std::shared_ptr<void> context = nullptr)
      : state_(std::make_shared<State>(std::move(executor), checked(capacity), std::move(context))) {}
  ~BroadcastChannel() { close(); }
  BroadcastChannel(const BroadcastChannel&) = delete;
  BroadcastChannel& operator=(const BroadcastChannel&) = delete;

  [[nodiscard]] const boost::asio::any_io_executor& get_executor() const noexcept { return state_->executor(); }

  /// `ok`, or `closed`, and then nothing was sent and the event is the caller's still. It waits for nobody but, when
  /// the ring holds plain bytes, for a sender who has been at the same slot for a whole round of the ring. With
  /// `std::bad_alloc` nothing was sent.
  ChannelStatus send(T&& event) { return state_->send(std::move(event)); }
  ChannelStatus send(const T& event) { return state_->send(T(event)); }

  /// Of the events that are sent from now on. Throws `std::bad_alloc`.
  [[nodiscard]] Subscription<T> subscribe() { return Subscription<T>(std::make_shared<detail::Subscriber<T>>(state_)); }

  /// Ends all waiting. Again: nothing.
  void close() noexcept { state_->close(); }
  [[nodiscard]] bool is_closed() const noexcept { return state_->is_closed(); }
  /// A power of two.
  [[nodiscard]] std::size_t capacity() const noexcept { return state_->capacity(); }
  [[nodiscard]] std::size_t subscribers() const noexcept { return state_->subscribers.load(std::memory_order_relaxed); }
  /// How many events were sent.
  [[nodiscard]] std::uint64_t sent() const noexcept { return state_->tail(); }
  /// How many its subscribers were told that they have missed, in all.
  [[nodiscard]] std::uint64_t missed() const noexcept { return state_->missed.load(std::memory_order_relaxed); }
  /// The `Subscription::lag` of the subscriber that is furthest behind. O(subscribers).
  [[nodiscard]] std::uint64_t lag() const noexcept { return state_->lag(); }

 private:
  using State = detail::BroadcastState<T>;

  static std::size_t checked(std::size_t capacity) {
    if (capacity == 0 || capacity > max_capacity) {
      throw Exception(Error(Errc::invalid_option, "broadcast capacity is " + std::to_string(capacity) +
                                                      ", must be from 1 to " + std::to_string(max_capacity)));
    }
    return std::bit_ceil(capacity);
  }

  const std::shared_ptr<State> state_;
};

}  // namespace msgtrans
