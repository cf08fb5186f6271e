// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/associator.hpp>
#include <boost/asio/async_result.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <msgtrans/actor/actor_options.hpp>
#include <msgtrans/actor/protocol_actor.hpp>
#include <msgtrans/actor/reply_to.hpp>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/detail/blocking.hpp>
#include <msgtrans/detail/exception_text.hpp>
#include <msgtrans/detail/insist.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/event.hpp>
#include <msgtrans/lockfree/counter.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <msgtrans/session_id.hpp>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace msgtrans {

struct ActorManagerOptions {
  /// Told what happens to actors: `actor_failed`, `actor_stopped`. On the manager's executor; must not block. What it
  /// throws is dropped.
  std::function<void(const Event&)> on_event = {};
  /// Told of a failure that was everybody's (`OnFailure::escalate`), after all actors were told to stop. On the
  /// manager's executor.
  std::function<void(const Error&)> on_escalation = {};
};

/// An ActorManager's counters since it began, and what is there now.
struct ActorStats {
  std::size_t actors = 0;         ///< running now
  std::uint64_t spawned = 0;      ///< ever
  std::uint64_t told = 0;         ///< messages accepted by mailboxes
  std::uint64_t refused = 0;      ///< messages not accepted: the mailbox was full, or the actor had ended
  std::uint64_t dropped = 0;      ///< messages accepted, which their actor ended without taking
  std::size_t mailbox_depth = 0;  ///< messages that wait in all mailboxes now
  std::uint64_t failures = 0;     ///< exceptions that left actors
  std::uint64_t restarts = 0;     ///< actors started again after one
  std::uint64_t given_up = 0;     ///< actors not started again after one
  std::uint64_t commands = 0;     ///< of the manager's own channel: ends, failures, stops
};

namespace detail {

/// What a manager, its actors and their handles share.
template <class M>
class ActorManagerState final : public std::enable_shared_from_this<ActorManagerState<M>> {
 public:
  using Core = ActorCore<M>;
  using CorePtr = std::shared_ptr<Core>;

  /// What the manager's loop is told.
  struct Failed {
    SessionId actor;
    Error error;
    bool given_up;
    bool escalated;
  };
  struct Ended {};
  struct StopAll {
    bool cut;
    std::function<void()> done;  // when no actor is left; may be empty
  };
  using Command = std::variant<Ended, Failed, StopAll>;

  ActorManagerState(std::vector<boost::asio::any_io_executor> where, ActorManagerOptions with)
      : executors_(std::move(where)),
        options_(std::move(with)),
        commands_(executors_.front(), ChannelCapacity::unbounded()) {}

  [[nodiscard]] const boost::asio::any_io_executor& executor() const noexcept { return executors_.front(); }
  [[nodiscard]] const boost::asio::any_io_executor& next_executor() noexcept {
    return executors_[next_executor_.fetch_add(1, std::memory_order_relaxed) % executors_.size()];
  }
  [[nodiscard]] const lockfree::LockFreeHashMap<SessionId, ActorHandle<M>>& actors() const noexcept { return actors_; }

  /// Throws; then there is no such actor.
  void spawn(const CorePtr& core) {
    if (auto error = validate(core->options)) throw Exception(error);
    if (stopped_.load() || commands_.is_closed()) {
      throw Exception(Error(Errc::wrong_state, "the actor manager has been stopped"));
    }
    if (!actors_.insert(core->id, ActorHandle<M>(core))) {
      throw Exception(Error(Errc::wrong_state, "there is an actor " + to_string(core->id)));
    }
    alive_.fetch_add(1);
    End end(core);  // from here on it ends as actors do
    spawned_.add();
    boost::asio::co_spawn(core->executor, supervise(core, std::move(end)),
                          boost::asio::bind_cancellation_slot(core->cut_signal.slot(), boost::asio::detached));
    // Whoever stopped all meanwhile may have missed it.
    if (stopped_.load()) core->stop();
  }

  ChannelStatus count(ChannelStatus status) noexcept {
    (status == ChannelStatus::ok ? told_ : refused_).add();
    return status;
  }

  void stop_all(bool cut, std::function<void()> done) {
    if (commands_.try_send(Command(StopAll{cut, done})) != ChannelStatus::ok && done) done();
  }
  /// No actor can be spawned any more; those that are there are told to stop.
  void close() {
    stopped_.store(true);
    tell_all_to_stop(false);
  }
  [[nodiscard]] std::size_t alive() const noexcept { return alive_.load(); }

  [[nodiscard]] ActorStats stats() const {
    ActorStats stats;
    stats.actors = alive_.load();
    stats.spawned = static_cast<std::uint64_t>(spawned_.value());
    stats.told = static_cast<std::uint64_t>(told_.value());
    stats.refused = static_cast<std::uint64_t>(refused_.value());
    stats.dropped = static_cast<std::uint64_t>(dropped_.value());
    stats.failures = static_cast<std::uint64_t>(failures_.value());
    stats.restarts = static_cast<std::uint64_t>(restarts_.value());
    stats.given_up = static_cast<std::uint64_t>(given_up_.value());
    stats.commands = static_cast<std::uint64_t>(handled_.value());
    actors_.for_each([&stats](SessionId, const ActorHandle<M>& actor) { stats.mailbox_depth += actor.mailbox_size(); });
    return stats;
  }

  /// The manager's loop, as long as `commands_` is open.
  static boost::asio::awaitable<void> run(std::shared_ptr<ActorManagerState> self) {
    std::vector<Command> batch;
    std::vector<std::function<void()>> waiting;  // for the last actor's end
    for (;;) {
      batch.clear();
      const auto [error, count] =
          co_await self->commands_.async_recv_many(batch, 64, boost::asio::as_tuple(boost::asio::use_awaitable));
      if (error == make_error_code(Errc::closed)) break;
      for (Command& command : batch) self->carry_out(command, waiting);
      // What the last ones told before they ended may be behind what was taken.
      if (self->alive() == 0 && self->commands_.size() == 0) {
        for (const auto& done : std::exchange(waiting, {})) done();
      }
    }
    for (const auto& done : waiting) done();
  }
  void end_loop() noexcept { commands_.close(); }

 private:
  /// In the frame of an actor's coroutine, and so goes with it, whatever ends it.
  class End {
   public:
    explicit End(CorePtr core) noexcept : core_(std::move(core)) {}
    End(End&&) noexcept = default;
    End& operator=(End&&) = delete;
    ~End() {
      if (core_) core_->manager->ended(*core_);
    }

   private:
    CorePtr core_;
  };

  static boost::asio::awaitable<void> supervise(CorePtr core, End) {
    for (;;) {
      std::exception_ptr exception;
      try {
        co_await core->behaviour(ProtocolActor<M>(core));
      } catch (...) {
        exception = std::current_exception();
      }
      // An actor that is cut is left by the exception of what was cancelled.
      if (!exception || core->cut_asked.load()) break;
      const auto delay = core->manager->failed(*core, exception);
      if (!delay) break;
      if (delay->count() != 0) {
        core->backoff.emplace(core->executor, *delay);
        core->backing_off.store(true);
        if (!core->stopping.load()) {
          co_await core->backoff->async_wait(boost::asio::as_tuple(boost::asio::use_awaitable));
        }
        core->backing_off.store(false);
        core->backoff.reset();
      }
      if (core->cut_asked.load()) {
        core->manager->given_up_.add();
        break;
      }
      core->manager->restarts_.add();
    }
  }

  /// How long to wait before it is started again; nothing if it is given up.
  std::optional<std::chrono::milliseconds> failed(Core& core, const std::exception_ptr& exception) {
    failures_.add();
    const auto& options = core.options;
    const auto now = Clock::now();
    if (options.restart_window.count() != 0) {
      while (!core.failures.empty() && core.failures.front() + options.restart_window <= now) {
        core.failures.pop_front();
      }
    }
    const Error error(Errc::actor_failed, text_of(exception));
    const bool again = options.on_failure == OnFailure::restart && core.failures.size() < options.max_restarts;
    if (!again) {
      given_up_.add();
      core.failure = error;
    }
    insist([&] {
      return commands_.try_send(Command(Failed{core.id, error, !again, options.on_failure == OnFailure::escalate}));
    });
    if (!again) return std::nullopt;
    double delay = static_cast<double>(options.restart_delay.count());
    for (std::size_t i = 0; i < core.failures.size(); ++i) delay *= options.restart_delay_factor;
    core.failures.push_back(now);
    return std::chrono::milliseconds(static_cast<std::chrono::milliseconds::rep>(
        std::min(delay, static_cast<double>(options.longest_restart_delay.count()))));
  }

  void ended(Core& core) noexcept {
    core.stop();
    std::size_t left = core.batch.size() - core.next;
    // Theirs is the duty to tell who waits for an answer that there will be none.
    core.batch.clear();
    core.next = 0;
    for (bool closed = false; !closed;) {
      try {
        left += core.mailbox->take(core.batch, Core::batch_size, closed);
      } catch (const std::bad_alloc&) {
        continue;  // room for at least one was there when the actor began
      }
      core.batch.clear();
    }
    dropped_.add(static_cast<std::int64_t>(left));
    if (core.on_end) core.on_end(core.failure);
    insist([&] { return actors_.erase(core.id); });  // a thread's first use of the map takes a few words of memory
    alive_.fetch_sub(1);
    // Who waits for the last one's end waits for this.
    insist([&] { return commands_.try_send(Command(Ended{})); });
  }

  void tell_all_to_stop(bool cut) {
    actors_.for_each([cut](SessionId, const ActorHandle<M>& actor) { cut ? actor.cut() : actor.stop(); });
  }

  void carry_out(Command& command, std::vector<std::function<void()>>& waiting) {
    handled_.add();
    try {
      if (auto* const failed = std::get_if<Failed>(&command)) {
        if (options_.on_event) {
          options_.on_event({failed->given_up ? EventKind::actor_stopped : EventKind::actor_failed,
                             failed->actor,
                             {},
                             failed->error});
        }
        if (failed->escalated) {
          close();
          if (options_.on_escalation) options_.on_escalation(failed->error);
        }
      } else if (auto* const stop = std::get_if<StopAll>(&command)) {
        if (stop->done) waiting.push_back(std::move(stop->done));
        tell_all_to_stop(stop->cut);
      }
    } catch (...) {
      // What the application's functions throw is theirs.
    }
  }

  const std::vector<boost::asio::any_io_executor> executors_;
  const ActorManagerOptions options_;
  lockfree::LockFreeHashMap<SessionId, ActorHandle<M>> actors_;
  AsyncChannel<Command> commands_;
  std::atomic<std::size_t> next_executor_{0};
  std::atomic<std::size_t> alive_{0};
  std::atomic<bool> stopped_{false};
  lockfree::LockFreeCounter spawned_;
  lockfree::LockFreeCounter told_;
  lockfree::LockFreeCounter refused_;
  lockfree::LockFreeCounter dropped_;
  lockfree::LockFreeCounter failures_;
  lockfree::LockFreeCounter restarts_;
  lockfree::LockFreeCounter given_up_;
  lockfree::LockFreeCounter handled_;
};

/// The handler of a message that waits for room, which counts what became of it.
template <class M, class Handler>
struct CountTold {
  std::shared_ptr<ActorCore<M>> core;
  Handler handler;

  void operator()(error_code error, std::optional<M> rejected) {
    core->manager->count(error ? ChannelStatus::closed : ChannelStatus::ok);
    std::move(handler)(error, std::move(rejected));
  }
};

}  // namespace detail

/// Spawns actors, knows them by their id, tells them things, and supervises them: an exception that leaves an actor is
/// told as an event and the actor is started again, given up, or all are, as its options say. No exception of an actor
/// gets any further.
///
/// Looking an actor up is wait-free, telling it something lock-free but for memory and for waking it. What happens to
/// actors goes through an asynchronous channel to the manager's own coroutine, in the order in which it happened.
///
/// Thread safety: every call from any thread, except the destructor. That tells all actors to stop and does not wait
/// for them: they end by themselves, as long as their executors run.
template <class M>
class ActorManager {
  static_assert(std::is_nothrow_move_constructible_v<M>,
                "ActorManager<M>: M must be nothrow move constructible; wrap it in a std::unique_ptr");

 public:
  /// A coroutine over the actor's mailbox: it ends when `receive` gives nothing, or when it likes. Called again after a
  /// failure. (A named function or a lambda without captures: what a coroutine lambda captures is not the coroutine's.)
  using Behaviour = std::function<boost::asio::awaitable<void>(ProtocolActor<M>)>;

  /// Actors run on the executors in turn; the manager's own loop on the first. Each must run one thing at a time.
  /// \throws Exception with `invalid_option` if there is none.
  explicit ActorManager(std::vector<boost::asio::any_io_executor> executors, ActorManagerOptions options = {})
      : state_(std::make_shared<State>(checked(std::move(executors)), std::move(options))) {
    boost::asio::co_spawn(state_->executor(), State::run(state_), boost::asio::detached);
  }
  explicit ActorManager(const boost::asio::any_io_executor& executor, ActorManagerOptions options = {})
      : ActorManager(std::vector<boost::asio::any_io_executor>{executor}, std::move(options)) {}
  ~ActorManager() {
    try {
      state_->close();
    } catch (const std::bad_alloc&) {
      // Their executors end them.
    }
    state_->end_loop();
  }
  ActorManager(const ActorManager&) = delete;
  ActorManager& operator=(const ActorManager&) = delete;

  /// Starts an actor. \throws Exception with `invalid_option`, or with `wrong_state` after `close`.
  ActorHandle<M> spawn(Behaviour behaviour, const ActorOptions& options = {}) {
    auto core = std::make_shared<Core>(detail::next_session_id(), state_->next_executor(), options,
                                       std::move(behaviour), state_);
    state_->spawn(core);
    return ActorHandle<M>(std::move(core));
  }

  /// The actor with that id, while it runs. Wait-free, but for the copy.
  [[nodiscard]] std::optional<ActorHandle<M>> find(SessionId id) const { return state_->actors().get(id); }
  /// As the calls of ActorHandle; `closed` also if there is no actor with that id.
  ChannelStatus try_tell(SessionId id, M&& message, Urgency urgency = Urgency::normal) {
    auto status = ChannelStatus::closed;
    const bool found = state_->actors().visit(
        id, [&](const ActorHandle<M>& actor) { status = actor.try_tell(std::move(message), urgency); });
    return found ? status : state_->count(ChannelStatus::closed);
  }
  ChannelStatus tell(SessionId id, M&& message, Urgency urgency = Urgency::normal) {
    auto actor = find(id);
    return actor ? actor->tell(std::move(message), urgency) : state_->count(ChannelStatus::closed);
  }

  /// Asks an actor: `make(ReplyTo<R>)` makes the message, which carries where the answer goes. Completes with
  /// `void(error_code, R)`: the answer; or `closed` (no such actor), `would_block` (its mailbox was full), `no_answer`
  /// (it dropped the question, or ended), `request_timeout` (zero: never), or `operation_aborted`. On failure an `R()`.
  /// Cancellation of every type ends the wait; the actor may still act on the question.
  template <class R, class Make, class CompletionToken>
  auto async_ask(SessionId id, Make make, std::chrono::milliseconds timeout, CompletionToken&& token) {
    return boost::asio::async_initiate<CompletionToken, void(error_code, R)>(
        [](auto handler, std::shared_ptr<State> state, SessionId whom, Make how, std::chrono::milliseconds within) {
          const auto question = std::make_shared<detail::AsyncQuestion<R>>(std::move(handler), state->executor());
          question->start(within);
          send_question<R>(*state, whom, how, question);
        },
        token, state_, id, std::move(make), timeout);
  }
  /// The same, blocking the thread; on one that must not, `error` is `blocking_on_shard`.
  template <class R, class Make>
  R ask(SessionId id, Make make, std::chrono::milliseconds timeout, error_code& error) {
    if (detail::must_not_block != 0) {
      error = Errc::blocking_on_shard;
      return R();
    }
    const auto question = std::make_shared<detail::BlockingQuestion<R>>();
    send_question<R>(*state_, id, make, question);
    return question->wait(timeout, error);
  }

  /// Tells it to stop: what it was told is still received. False if there is none with that id.
  bool stop(SessionId id) {
    return state_->actors().visit(id, [](const ActorHandle<M>& actor) { actor.stop(); });
  }
  /// Tells all to stop that are there. Goes through the manager's channel, and so does nothing to those spawned later.
  void stop_all() { state_->stop_all(false, {}); }
  /// The same, and cancels whatever they wait for; calls `done`, on the manager's executor, when none is left.
  void cut_all(std::function<void()> done = {}) { state_->stop_all(true, std::move(done)); }
  /// The same as `stop_all`, completing with `void()` when none is left. Not cancellable: they stop anyway.
  template <class CompletionToken>
  auto async_stop_all(CompletionToken&& token) {
    return boost::asio::async_initiate<CompletionToken, void()>(
        [](auto handler, std::shared_ptr<State> state) {
          auto executor = boost::asio::prefer(boost::asio::get_associated_executor(handler, state->executor()),
                                              boost::asio::execution::outstanding_work.tracked);
          auto shared = std::make_shared<decltype(handler)>(std::move(handler));
          state->stop_all(false,
                          [executor, shared] { boost::asio::post(executor, [shared] { std::move (*shared)(); }); });
        },
        token, state_);
  }
  /// For good: stops all, and none is spawned any more.
  void close() { state_->close(); }

  /// Calls `f(ActorHandle)` for each actor that is there the whole time of the call. O(n).
  template <class F>
  void for_each(F f) const {
    for (const auto& [id, actor] : state_->actors().snapshot()) f(actor);
  }
  [[nodiscard]] std::size_t size() const noexcept { return state_->alive(); }
  /// O(actors), for the depth of the mailboxes.
  [[nodiscard]] ActorStats stats() const { return state_->stats(); }

  // --- for the library

  using Core = detail::ActorCore<M>;
  using State = detail::ActorManagerState<M>;
  [[nodiscard]] const std::shared_ptr<State>& state() const noexcept { return state_; }

 private:
  static std::vector<boost::asio::any_io_executor> checked(std::vector<boost::asio::any_io_executor> executors) {
    if (executors.empty() || std::ranges::any_of(executors, [](const auto& executor) { return !executor; })) {
      throw Exception(Error(Errc::invalid_option, "executors is empty, or holds an empty executor"));
    }
    return executors;
  }

  template <class R, class Make, class Question>
  static void send_question(State& state, SessionId id, Make& make, const std::shared_ptr<Question>& question) {
    auto status = ChannelStatus::closed;
    {
      M message = make(ReplyTo<R>(question));
      const auto actor = state.actors().get(id);
      if (actor) {
        status = actor->try_tell(std::move(message));
      } else {
        state.count(status);
      }
      // Before the message that was not taken tells that it was dropped.
      if (status != ChannelStatus::ok) {
        question->settle(make_error_code(status == ChannelStatus::full ? Errc::would_block : Errc::closed), R());
      }
    }
  }

  const std::shared_ptr<State> state_;
};

template <class M>
ChannelStatus ActorHandle<M>::try_tell(M&& message, Urgency urgency) const {
  return core_->manager->count(core_->mailbox->put(std::move(message), urgency == Urgency::urgent));
}

template <class M>
ChannelStatus ActorHandle<M>::tell(M&& message, Urgency urgency) const {
  const bool urgent = urgency == Urgency::urgent;
  const auto core = core_;
  auto& lane = core->mailbox->lane(urgent);
  auto status = core->mailbox->put(std::move(message), urgent);
  while (status == ChannelStatus::full) {
    if (detail::must_not_block != 0) {
      status = ChannelStatus::blocking_on_shard;
      break;
    }
    const auto ready = [&lane] { return lane.can_send(); };
    lane.sending_threads().wait(ready, ready, detail::no_deadline);
    status = core->mailbox->put(std::move(message), urgent);
  }
  return core->manager->count(status);
}

template <class M>
template <class CompletionToken>
auto ActorHandle<M>::async_tell(M message, Urgency urgency, CompletionToken&& token) const {
  return boost::asio::async_initiate<CompletionToken, void(error_code, std::optional<M>)>(
      [](auto handler, std::shared_ptr<detail::ActorCore<M>> core, M what, bool urgent) {
        // Counted where it ends, whose handler keeps the caller's executor, allocator and slot.
        auto counted = detail::CountTold<M, decltype(handler)>{core, std::move(handler)};
        const auto start = [&](auto step) {
          using Operation = detail::AsyncOperation<detail::Mailbox<M>, decltype(step), decltype(counted)>;
          Operation::start(core->mailbox, std::move(step), std::move(counted));
        };
        if (urgent) {
          start(detail::SendStep<detail::IntoMailbox<M, true>>(std::move(what)));
        } else {
          start(detail::SendStep<detail::IntoMailbox<M, false>>(std::move(what)));
        }
      },
      token, core_, std::move(message), urgency == Urgency::urgent);
}

}  // namespace msgtrans

// What the handler is associated with, the wrapper is too.
template <template <class, class> class Associator, class M, class Handler, class Default>
struct boost::asio::associator<Associator, msgtrans::detail::CountTold<M, Handler>, Default>
    : Associator<Handler, Default> {
  static auto get(const msgtrans::detail::CountTold<M, Handler>& wrapper) noexcept {
    return Associator<Handler, Default>::get(wrapper.handler);
  }
  static auto get(const msgtrans::detail::CountTold<M, Handler>& wrapper, const Default& otherwise) noexcept {
    return Associator<Handler, Default>::get(wrapper.handler, otherwise);
  }
};
