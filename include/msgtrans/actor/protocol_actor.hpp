// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/async_result.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <msgtrans/actor/actor_options.hpp>
#include <msgtrans/channel/channel_status.hpp>
#include <msgtrans/detail/async_operation.hpp>
#include <msgtrans/detail/blocking.hpp>
#include <msgtrans/detail/clock.hpp>
#include <msgtrans/detail/mailbox.hpp>
#include <msgtrans/detail/waiting_room.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/session_id.hpp>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace msgtrans {

template <class M>
class ActorHandle;
template <class M>
class ActorManager;
template <class M>
class ProtocolActor;

/// Which lane of the mailbox a message takes: urgent ones are received before all normal ones.
enum class Urgency : std::uint8_t { normal, urgent };

namespace detail {

template <class M>
class ActorManagerState;

/// One actor: its mailbox, and what its supervisor knows.
template <class M>
class ActorCore : public std::enable_shared_from_this<ActorCore<M>> {
 public:
  using Behaviour = std::function<boost::asio::awaitable<void>(ProtocolActor<M>)>;
  static constexpr std::size_t batch_size = 64;

  ActorCore(SessionId name, boost::asio::any_io_executor on, const ActorOptions& with, Behaviour what,
            std::shared_ptr<ActorManagerState<M>> of)
      : id(name),
        executor(std::move(on)),
        options(with),
        behaviour(std::move(what)),
        manager(std::move(of)),
        mailbox(std::make_shared<Mailbox<M>>(executor, options.mailbox)) {}

  const SessionId id;
  const boost::asio::any_io_executor executor;
  const ActorOptions options;
  const Behaviour behaviour;
  const std::shared_ptr<ActorManagerState<M>> manager;
  const std::shared_ptr<Mailbox<M>> mailbox;
  /// Called on the executor whenever the actor has dealt with all that it took and comes for more.
  std::function<void()> on_idle;
  /// Called on the executor, or where that is destroyed, when the actor has ended; with the error that ended it, if one
  /// did.
  std::function<void(const Error&)> on_end;

  /// Messages taken out of the mailbox; a restart goes on with them. Of the executor, as all below but where it is
  /// said.
  std::vector<M> batch;
  std::size_t next = 0;
  std::deque<std::chrono::steady_clock::time_point> failures;
  std::optional<Timer> backoff;  // while it waits to be started again
  boost::asio::cancellation_signal cut_signal;
  Error failure;
  std::atomic<bool> busy{false};         // has taken messages that it may not have dealt with; read by anybody
  std::atomic<bool> backing_off{false};  // any thread
  std::atomic<bool> stopping{false};     // any thread
  std::atomic<bool> cut_asked{false};    // any thread

  /// Whether there is nothing that it has yet to deal with.
  [[nodiscard]] bool is_idle() const noexcept { return !busy.load(std::memory_order_acquire) && mailbox->size() == 0; }

  [[nodiscard]] bool has_next() const noexcept { return next != batch.size(); }
  [[nodiscard]] M take_next() noexcept { return std::move(batch[next++]); }

  /// Fetches what there is. False if there is nothing now; `closed` if there never will be.
  bool refill(bool& closed) {
    batch.clear();
    next = 0;
    if (busy.load(std::memory_order_relaxed)) {
      busy.store(false, std::memory_order_release);
      if (on_idle) on_idle();
    }
    // Before they leave the mailbox: in between nobody may take it for idle.
    busy.store(mailbox->size() != 0, std::memory_order_release);
    if (mailbox->take(batch, batch_size, closed) != 0) {
      busy.store(true, std::memory_order_release);
      return true;
    }
    busy.store(false, std::memory_order_release);
    return false;
  }

  /// No more is accepted; what is there is still received, at once if it waits to be started again.
  void stop() noexcept {
    // Either this sees that it waits, or it sees this before it does: both are sequentially consistent.
    stopping.store(true);
    mailbox->close();
    if (!backing_off.load()) return;
    try {
      boost::asio::post(executor, [core = this->shared_from_this()] {
        if (core->backoff) core->backoff->cancel();
      });
    } catch (const std::bad_alloc&) {
      // It waits its time.
    }
  }
};

/// The step of waiting for the next message of an actor.
template <class M>
class ActorReceiveStep {
 public:
  using State = Mailbox<M>;
  explicit ActorReceiveStep(std::shared_ptr<ActorCore<M>> core) noexcept : core_(std::move(core)) {}

  struct Probe {
    static bool ready(State& state) noexcept { return state.can_receive(); }
    static void wake(State& state) noexcept { state.receivers().wake_one(); }
  };
  static Probe probe() noexcept { return {}; }
  static AsyncWaiters& waiters(State& state) noexcept { return state.receivers(); }
  static void pass_on(State&) noexcept {}

  bool attempt(State&) noexcept {
    try {
      bool closed = false;
      if (core_->has_next() || core_->refill(closed)) {
        message_.emplace(core_->take_next());
        return true;
      }
      if (closed) error_ = make_error_code(Errc::closed);
      return closed;
    } catch (const std::bad_alloc&) {
      error_ = boost::system::errc::make_error_code(boost::system::errc::not_enough_memory);
      return true;
    }
  }
  template <class Handler>
  void complete(Handler&& handler, error_code cancelled) {
    core_.reset();
    std::forward<Handler>(handler)(cancelled ? cancelled : error_, std::move(message_));
  }

 private:
  std::shared_ptr<ActorCore<M>> core_;
  std::optional<M> message_;
  error_code error_;
};

}  // namespace detail

/// Somebody's reference to an actor: to tell it something, to ask, to stop it. Copies refer to the same actor, and may
/// outlive it: then everything says `closed`. Any thread may make any call.
template <class M>
class ActorHandle {
 public:
  /// Handles come from the manager.
  explicit ActorHandle(std::shared_ptr<detail::ActorCore<M>> core) noexcept : core_(std::move(core)) {}

  [[nodiscard]] SessionId id() const noexcept { return core_->id; }
  /// False once it has been told to stop, or has ended.
  [[nodiscard]] bool is_running() const noexcept { return !core_->mailbox->is_closed(); }
  /// Messages that wait in its mailbox.
  [[nodiscard]] std::size_t mailbox_size() const noexcept { return core_->mailbox->size(); }

  /// `ok`, `full` or `closed`; the message stays the caller's unless `ok`. Never waits. \throws std::bad_alloc; then
  /// nothing was sent.
  ChannelStatus try_tell(M&& message, Urgency urgency = Urgency::normal) const;
  /// The same, waiting for room: `ok`, `closed`, or on a thread that must not block, and only if it would have to,
  /// `blocking_on_shard`.
  ChannelStatus tell(M&& message, Urgency urgency = Urgency::normal) const;
  /// Waits for room. Completes with `void(error_code, std::optional<M> rejected)`: success and nothing; or `closed`,
  /// `operation_aborted` or `not_enough_memory`, and the message. Cancellation of every type: it was not sent.
  template <class CompletionToken>
  auto async_tell(M message, Urgency urgency, CompletionToken&& token) const;

  /// It is told nothing more; what it was told is still received, then `receive` says that there is no more.
  void stop() const noexcept { core_->stop(); }
  /// The same, and whatever it waits for is cancelled; it should end soon. What it was told and did not take is counted
  /// as dropped.
  void cut() const {
    core_->stop();
    if (core_->cut_asked.exchange(true)) return;
    boost::asio::post(core_->executor,
                      [core = core_] { core->cut_signal.emit(boost::asio::cancellation_type::terminal); });
  }

  friend bool operator==(const ActorHandle&, const ActorHandle&) noexcept = default;

 private:
  friend class ActorManager<M>;
  friend class detail::ActorManagerState<M>;
  std::shared_ptr<detail::ActorCore<M>> core_;
};

/// What an actor's coroutine is given: itself. A coroutine over a bounded mailbox, of which it takes up to 64 messages
/// at a time, urgent ones first, and lets others run in between.
///
/// Thread safety: for the actor's coroutine, on its executor; `self()` is for everybody.
template <class M>
class ProtocolActor {
 public:
  explicit ProtocolActor(std::shared_ptr<detail::ActorCore<M>> core) noexcept : core_(std::move(core)) {}

  [[nodiscard]] SessionId id() const noexcept { return core_->id; }
  [[nodiscard]] const boost::asio::any_io_executor& get_executor() const noexcept { return core_->executor; }
  [[nodiscard]] ActorHandle<M> self() const noexcept { return ActorHandle<M>(core_); }
  /// How often it has been started again.
  [[nodiscard]] std::size_t restarts() const noexcept { return core_->failures.size(); }

  /// The next message; nothing when it was stopped and has received all. A message that it took before it threw is gone
  /// with the exception; what it has not taken is there after a restart. Not to be raced against something else: what
  /// it gives could get lost there; `async_receive` is for that.
  /// (`while (auto message = co_await actor.receive())`: without the variable g++ 12 miscompiles the loop.)
  /// \throws boost::system::system_error: `operation_aborted` when it is cut, `not_enough_memory`.
  [[nodiscard]] boost::asio::awaitable<std::optional<M>> receive() { return receive_from(core_); }

  /// The same with any token: completes with `void(error_code, std::optional<M>)`: a message; or `closed`,
  /// `operation_aborted` or `not_enough_memory`. Cancellation of every type loses no message, so
  /// `actor.async_receive(use_awaitable) || timer.async_wait(use_awaitable)` is safe. One at a time.
  template <class CompletionToken>
  auto async_receive(CompletionToken&& token) {
    return boost::asio::async_initiate<CompletionToken, void(error_code, std::optional<M>)>(
        [](auto handler, std::shared_ptr<detail::ActorCore<M>> core) {
          using Step = detail::ActorReceiveStep<M>;
          using Operation = detail::AsyncOperation<detail::Mailbox<M>, Step, decltype(handler)>;
          auto mailbox = core->mailbox;
          Operation::start(std::move(mailbox), Step(std::move(core)), std::move(handler));
        },
        token, core_);
  }

 private:
  static boost::asio::awaitable<std::optional<M>> receive_from(std::shared_ptr<detail::ActorCore<M>> core) {
    if (core->has_next()) co_return core->take_next();
    auto [error, message] =
        co_await ProtocolActor(core).async_receive(boost::asio::as_tuple(boost::asio::use_awaitable));
    if (error && error != make_error_code(Errc::closed)) throw boost::system::system_error(error);
    co_return std::move(message);
  }

  std::shared_ptr<detail::ActorCore<M>> core_;
};

}  // namespace msgtrans
