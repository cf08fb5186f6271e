// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/async_result.hpp>
#include <chrono>
#include <cstddef>
#include <memory>
#include <msgtrans/channel/channel_status.hpp>
#include <msgtrans/detail/async_operation.hpp>
#include <msgtrans/detail/async_waiters.hpp>
#include <msgtrans/detail/blocking.hpp>
#include <msgtrans/detail/tickets.hpp>
#include <msgtrans/detail/waiting_room.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/lockfree/queue.hpp>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace msgtrans {
namespace detail {

/// What a channel and the operations that wait for it share; the operations may be on their way when the channel goes.
template <class T>
class AsyncChannelState final : public ContextMember {
 public:
  AsyncChannelState(boost::asio::any_io_executor executor, ChannelCapacity capacity)
      : ContextMember(executor),
        executor_(std::move(executor)),
        limit_(capacity.is_bounded() ? capacity.count() : Tickets::no_limit) {}

  [[nodiscard]] const boost::asio::any_io_executor& executor() const noexcept { return executor_; }
  [[nodiscard]] std::uint64_t limit() const noexcept { return limit_; }
  [[nodiscard]] const Tickets& tickets() const noexcept { return tickets_; }

  /// Throws `std::bad_alloc`, and the value is as it was.
  ChannelStatus put(T&& value) {
    switch (tickets_.add(limit_)) {
      case Tickets::Added::full: return ChannelStatus::full;
      case Tickets::Added::closed: return ChannelStatus::closed;
      case Tickets::Added::ok: break;
    }
    try {
      queue_.push(std::move(value));
    } catch (...) {
      tickets_.give_back(1);
      if (limit_ != Tickets::no_limit) wake_sender();
      throw;
    }
    wake_receiver();
    return ChannelStatus::ok;
  }

  /// Calls `take(T&&)`, which must not throw, with at most `max` values; how many. If none, `closed` says whether there
  /// will never be any.
  template <class Take>
  std::size_t get(std::size_t max, bool& closed, Take take) noexcept {
    while (const std::size_t taken = tickets_.take(max, closed)) {
      const std::size_t got =
          tickets_.redeem(taken, [&](std::size_t count) { return queue_.try_pop_many(count, take); });
      if (limit_ != Tickets::no_limit) wake_sender();
      if (got != 0) return got;
    }
    return 0;
  }

  void wake_receiver() noexcept {
    receivers_.wake_one();
    receiving_threads_.notify();
  }
  void wake_sender() noexcept {
    senders_.wake_one();
    sending_threads_.notify();
  }

  bool close() noexcept {
    if (!tickets_.close()) return false;
    receivers_.wake_all();
    senders_.wake_all();
    receiving_threads_.notify();
    sending_threads_.notify();
    return true;
  }
  void wait_until_no_thread_waits() const noexcept {
    receiving_threads_.wait_until_empty();
    sending_threads_.wait_until_empty();
  }

  [[nodiscard]] bool can_receive() const noexcept { return tickets_.count() != 0 || tickets_.closed(); }
  [[nodiscard]] bool can_send() const noexcept { return tickets_.count() < limit_ || tickets_.closed(); }

  [[nodiscard]] AsyncWaiters& receivers() noexcept { return receivers_; }
  [[nodiscard]] AsyncWaiters& senders() noexcept { return senders_; }
  [[nodiscard]] WaitingRoom& receiving_threads() noexcept { return receiving_threads_; }
  [[nodiscard]] WaitingRoom& sending_threads() noexcept { return sending_threads_; }

 private:
  void on_context_end() noexcept override {
    receivers_.discard_all();
    senders_.discard_all();
  }

  const boost::asio::any_io_executor executor_;
  const std::uint64_t limit_;
  lockfree::LockFreeQueue<T> queue_;
  // A sender changes the tickets and then looks who waits to receive: one line.
  alignas(64) Tickets tickets_;
  AsyncWaiters receivers_;
  WaitingRoom receiving_threads_;
  alignas(64) AsyncWaiters senders_;
  WaitingRoom sending_threads_;
};

/// What the steps of receiving share.
template <class T>
struct ReceiveStep {
  using State = AsyncChannelState<T>;
  struct Probe {
    static bool ready(State& state) noexcept { return state.can_receive(); }
    static void wake(State& state) noexcept { state.receivers().wake_one(); }
  };
  static Probe probe() noexcept { return {}; }
  static AsyncWaiters& waiters(State& state) noexcept { return state.receivers(); }
  static void pass_on(State& state) noexcept {
    if (state.receivers().count() != 0 && state.can_receive()) state.receivers().wake_one();
  }
};

template <class T>
class ReceiveOne : public ReceiveStep<T> {
 public:
  bool attempt(AsyncChannelState<T>& state) noexcept {
    bool closed = false;
    return state.get(1, closed, [this](T&& value) noexcept { value_.emplace(std::move(value)); }) != 0 || closed;
  }
  template <class Handler>
  void complete(Handler&& handler, error_code cancelled) {
    if (value_) return std::forward<Handler>(handler)(error_code(), std::move(*value_));
    std::forward<Handler>(handler)(cancelled ? cancelled : make_error_code(Errc::closed), T());
  }

 private:
  std::optional<T> value_;
};

/// Room for what there is, at most `max`, so that nothing can fail once it is claimed.
template <class T>
[[nodiscard]] std::size_t make_room(std::vector<T>& out, std::size_t there, std::size_t max) {
  const std::size_t wanted = there < max ? there : max;
  if (out.capacity() - out.size() < wanted) {
    const std::size_t doubled = 2 * out.size();
    out.reserve(out.size() + wanted < doubled ? doubled : out.size() + wanted);
  }
  return wanted;
}

/// Into `Out`, a vector or a pointer to the caller's.
template <class T, class Out>
class ReceiveMany : public ReceiveStep<T> {
 public:
  ReceiveMany(Out out, std::size_t max) noexcept : out_(std::move(out)), max_(max) {}

  bool attempt(AsyncChannelState<T>& state) noexcept {
    if (max_ == 0) return true;
    auto& out = vector();
    try {
      const std::size_t wanted = make_room(out, static_cast<std::size_t>(state.tickets().count()), max_);
      bool closed = false;
      count_ = state.get(wanted, closed, [&out](T&& value) noexcept { out.push_back(std::move(value)); });
      if (closed) error_ = make_error_code(Errc::closed);
    } catch (const std::bad_alloc&) {
      error_ = boost::system::errc::make_error_code(boost::system::errc::not_enough_memory);
    }
    return count_ != 0 || error_;
  }
  template <class Handler>
  void complete(Handler&& handler, error_code cancelled) {
    const error_code error = cancelled ? cancelled : error_;
    if constexpr (std::is_pointer_v<Out>) {
      std::forward<Handler>(handler)(error, count_);
    } else {
      std::forward<Handler>(handler)(error, std::move(out_));
    }
  }

 private:
  std::vector<T>& vector() noexcept {
    if constexpr (std::is_pointer_v<Out>) {
      return *out_;
    } else {
      return out_;
    }
  }

  Out out_;
  std::size_t max_;
  std::size_t count_ = 0;
  error_code error_;
};

/// How `SendStep` sends to a channel.
template <class T>
struct IntoChannel {
  using Value = T;
  using State = AsyncChannelState<T>;
  static State& lane(State& state) noexcept { return state; }
  static ChannelStatus put(State& state, T&& value) { return state.put(std::move(value)); }
};

/// Sends to `Way::State`, waiting for room in `Way::lane` of it.
template <class Way>
class SendStep {
 public:
  using T = typename Way::Value;
  using State = typename Way::State;
  explicit SendStep(T&& value) noexcept : value_(std::move(value)) {}

  struct Probe {
    static bool ready(State& state) noexcept { return Way::lane(state).can_send(); }
    static void wake(State& state) noexcept { Way::lane(state).senders().wake_one(); }
  };
  static Probe probe() noexcept { return {}; }
  static AsyncWaiters& waiters(State& state) noexcept { return Way::lane(state).senders(); }
  static void pass_on(State& state) noexcept {
    auto& lane = Way::lane(state);
    if (lane.senders().count() != 0 && lane.can_send()) lane.senders().wake_one();
  }
  bool attempt(State& state) noexcept {
    try {
      switch (Way::put(state, std::move(*value_))) {
        case ChannelStatus::ok: value_.reset(); return true;
        case ChannelStatus::full: return false;
        default: error_ = make_error_code(Errc::closed); return true;
      }
    } catch (const std::bad_alloc&) {
      error_ = boost::system::errc::make_error_code(boost::system::errc::not_enough_memory);
      return true;
    }
  }
  template <class Handler>
  void complete(Handler&& handler, error_code cancelled) {
    std::forward<Handler>(handler)(cancelled ? cancelled : error_, std::move(value_));
  }

 private:
  std::optional<T> value_;
  error_code error_;
};

}  // namespace detail

/// Many send, many receive, each value goes to one of them; senders and receivers are Asio's coroutines and callbacks,
/// or plain threads, mixed as they come. The channel for actors' mailboxes and pipelines.
///
/// It stands on a LockFreeQueue, with the account of what is in it in a word of tickets beside; only an operation that
/// parks, or has to be woken, takes a lock. A send makes no system call unless it wakes somebody who sleeps.
///
/// Order: first in, first out; if one send happens before another, its value is received first. Operations of one kind
/// that are under way at the same time may end in any order.
///
/// Capacity: at most that many values are sent and not yet received, at any moment. An operation that waits has no
/// place kept for it: one that comes later may be faster. Among those that wait, the first is woken first.
///
/// Close: what was accepted before is still received, then every receive ends with `closed`. A send that fails gives
/// its value back.
///
/// Asynchronous calls take any completion token and never complete inside the call. They honour the handler's executor
/// (by default the channel's), allocator and cancellation slot. Cancellation of every type ends an operation with
/// `boost::asio::error::operation_aborted`, and then it has had no effect: what was not yet received stays in the
/// channel, and what was not yet sent is given back. So `channel.async_recv(use_awaitable) ||
/// timer.async_wait(use_awaitable)` loses nothing. When memory is short they complete with `not_enough_memory` rather
/// than throw, once they have begun.
///
/// Thread safety: every call from any thread, except the destructor. That closes, waits until the threads that are
/// blocked in it have left, and leaves the asynchronous operations to end with `closed` by themselves. Calls that block
/// do not on a thread that must not (a shard's): they say `blocking_on_shard` instead.
///
/// When the execution context of `executor` is destroyed first, the operations that still wait are destroyed without
/// completing, as those of Asio's own objects; other contexts whose handlers wait here must outlive their waiting.
///
/// T needs a move constructor that does not throw, and for `async_recv` a default constructor, as with Asio's channels.
template <class T>
class AsyncChannel {
  static_assert(
      std::is_nothrow_move_constructible_v<T>,
      "AsyncChannel<T>: T must be nothrow move constructible, or a value could be lost half-way; wrap it in a "
      "std::unique_ptr");
  static_assert(std::is_nothrow_destructible_v<T> && std::is_object_v<T>);

 public:
  using executor_type = boost::asio::any_io_executor;

  AsyncChannel(executor_type executor, ChannelCapacity capacity)
      : state_(std::make_shared<State>(std::move(executor), capacity)) {}
  ~AsyncChannel() {
    close();
    state_->wait_until_no_thread_waits();
  }
  AsyncChannel(const AsyncChannel&) = delete;
  AsyncChannel& operator=(const AsyncChannel&) = delete;

  [[nodiscard]] const executor_type& get_executor() const noexcept { return state_->executor(); }

  // --- sending

  /// `ok`, `full` or `closed`; the value stays the caller's unless `ok`. Never waits; lock-free but for memory and for
  /// waking. With `std::bad_alloc` nothing was sent.
  ChannelStatus try_send(T&& value) { return state_->put(std::move(value)); }
  ChannelStatus try_send(const T& value) requires std::is_copy_constructible_v<T> { return state_->put(T(value)); }

  /// Blocks the thread until there is room: `ok` or `closed`.
  ChannelStatus send(T&& value) { return send_until(std::move(value), detail::no_deadline); }
  ChannelStatus send(const T& value) requires std::is_copy_constructible_v<T> {
    return send_until(T(value), detail::no_deadline);
  }
  /// The same, at most that long: also `timeout`.
  template <class Rep, class Period>
  ChannelStatus send_for(T&& value, std::chrono::duration<Rep, Period> time) {
    return send_until(std::move(value), detail::deadline_after(time));
  }

  /// Waits for room. Completes with `void(error_code, std::optional<T> rejected)`: success and nothing; or `closed`,
  /// `operation_aborted` or `not_enough_memory`, and the value.
  template <class CompletionToken>
  auto async_send(T value, CompletionToken&& token) {
    return initiate<void(error_code, std::optional<T>)>(std::forward<CompletionToken>(token),
                                                        detail::SendStep<detail::IntoChannel<T>>(std::move(value)));
  }

  // --- receiving

  /// A value, or `empty` or `closed`. Lock-free, but for a sender that is between its two steps.
  RecvResult<T> try_recv() noexcept {
    std::optional<T> value;
    bool closed = false;
    if (get(*state_, value, closed)) return RecvResult<T>(std::move(*value));
    return closed ? ChannelStatus::closed : ChannelStatus::empty;
  }
  /// Appends what is there to `out`, at most `max`; how many. `closed`, if given, says whether nothing will ever come
  /// again. If `out` cannot grow, throws `std::bad_alloc`, and nothing was received.
  std::size_t try_recv_many(std::vector<T>& out, std::size_t max, bool* closed = nullptr) {
    bool is_closed = false;
    const std::size_t count = get_many(*state_, out, max, is_closed);
    if (closed != nullptr) *closed = is_closed;
    return count;
  }

  /// Blocks the thread until there is a value, or until `closed`.
  RecvResult<T> recv() noexcept { return recv_until(detail::no_deadline); }
  /// The same, at most that long: also `timeout`.
  template <class Rep, class Period>
  RecvResult<T> recv_for(std::chrono::duration<Rep, Period> time) noexcept {
    return recv_until(detail::deadline_after(time));
  }
  /// Blocks the thread until there is something, and appends it to `out`, at most `max`; how many. 0: closed and empty,
  /// or it would have had to block a thread that must not be; `status`, if given, says which (`ok` otherwise).
  std::size_t recv_many(std::vector<T>& out, std::size_t max, ChannelStatus* status = nullptr) {
    const auto state = state_;  // the channel may be destroyed while this waits
    for (;;) {
      bool closed = false;
      const std::size_t count = get_many(*state, out, max, closed);
      const bool refused = count == 0 && !closed && max != 0 && detail::must_not_block != 0;
      if (count != 0 || closed || max == 0 || refused) {
        if (status != nullptr) {
          *status = refused            ? ChannelStatus::blocking_on_shard
                    : closed && !count ? ChannelStatus::closed
                                       : ChannelStatus::ok;
        }
        return count;
      }
      const auto ready = [&state] { return state->can_receive(); };
      state->receiving_threads().wait(ready, ready, detail::no_deadline);
    }
  }

  /// Completes with `void(error_code, T)`: a value; or `closed` or `operation_aborted`, and a `T()`.
  template <class CompletionToken>
  auto async_recv(CompletionToken&& token) {
    static_assert(std::is_default_constructible_v<T>,
                  "AsyncChannel<T>::async_recv: T must be default constructible, for when there is none; "
                  "async_recv_many does not need it");
    return initiate<void(error_code, T)>(std::forward<CompletionToken>(token), detail::ReceiveOne<T>());
  }
  /// Completes with `void(error_code, std::vector<T>)`: what there is, one at least and `max` at most; or an error.
  template <class CompletionToken>
  auto async_recv_many(std::size_t max, CompletionToken&& token) {
    return initiate<void(error_code, std::vector<T>)>(std::forward<CompletionToken>(token),
                                                      detail::ReceiveMany<T, std::vector<T>>(std::vector<T>(), max));
  }
  /// The same, appended to the caller's vector, which he leaves alone until then: nothing is allocated once it has
  /// grown. Completes with `void(error_code, std::size_t)`: how many.
  template <class CompletionToken>
  auto async_recv_many(std::vector<T>& out, std::size_t max, CompletionToken&& token) {
    return initiate<void(error_code, std::size_t)>(std::forward<CompletionToken>(token),
                                                   detail::ReceiveMany<T, std::vector<T>*>(&out, max));
  }

  // --- life

  /// Ends all waiting. Again: nothing.
  void close() noexcept { state_->close(); }
  [[nodiscard]] bool is_closed() const noexcept { return state_->tickets().closed(); }

  /// How many values are sent and not received. While others send and receive: as it was at some moment of the call,
  /// give or take sends that there was no memory for.
  [[nodiscard]] std::size_t size() const noexcept { return static_cast<std::size_t>(state_->tickets().values()); }
  /// 0: unbounded.
  [[nodiscard]] std::size_t capacity() const noexcept {
    return state_->limit() == detail::Tickets::no_limit ? 0 : static_cast<std::size_t>(state_->limit());
  }

 private:
  using State = detail::AsyncChannelState<T>;

  template <class Signature, class CompletionToken, class Step>
  auto initiate(CompletionToken&& token, Step step) {
    return boost::asio::async_initiate<CompletionToken, Signature>(
        [](auto handler, std::shared_ptr<State> state, Step begun) {
          using Operation = detail::AsyncOperation<State, Step, decltype(handler)>;
          Operation::start(std::move(state), std::move(begun), std::move(handler));
        },
        token, state_, std::move(step));
  }

  static bool get(State& state, std::optional<T>& value, bool& closed) noexcept {
    return state.get(1, closed, [&value](T&& received) noexcept { value.emplace(std::move(received)); }) != 0;
  }
  static std::size_t get_many(State& state, std::vector<T>& out, std::size_t max, bool& closed) {
    const std::size_t wanted = detail::make_room(out, static_cast<std::size_t>(state.tickets().count()), max);
    return state.get(wanted, closed, [&out](T&& value) noexcept { out.push_back(std::move(value)); });
  }

  ChannelStatus send_until(T&& value, detail::WaitDeadline deadline) {
    auto status = state_->put(std::move(value));
    if (status != ChannelStatus::full) return status;
    if (detail::must_not_block != 0) return ChannelStatus::blocking_on_shard;
    const auto state = state_;  // the channel may be destroyed while this waits
    const auto ready = [&state] { return state->can_send(); };
    do {
      if (!state->sending_threads().wait(ready, ready, deadline)) return ChannelStatus::timeout;
      status = state->put(std::move(value));
    } while (status == ChannelStatus::full);
    return status;
  }

  RecvResult<T> recv_until(detail::WaitDeadline deadline) noexcept {
    std::optional<T> value;
    bool closed = false;
    if (!get(*state_, value, closed) && !closed) {
      if (detail::must_not_block != 0) return ChannelStatus::blocking_on_shard;
      const auto state = state_;  // the channel may be destroyed while this waits
      state->receiving_threads().wait([&] { return get(*state, value, closed) || closed; },
                                      [&] { return state->can_receive(); }, deadline);
    }
    if (value) return RecvResult<T>(std::move(*value));
    return closed ? ChannelStatus::closed : ChannelStatus::timeout;
  }

  const std::shared_ptr<State> state_;
};

}  // namespace msgtrans
