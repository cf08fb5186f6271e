// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "complete.hpp"
#include "link.hpp"
#include "poller.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/intrusive/list.hpp>
#include <functional>
#include <memory>
#include <msgtrans/detail/asio.hpp>
#include <msgtrans/detail/blocking.hpp>
#include <msgtrans/detail/clock.hpp>
#include <msgtrans/detail/insist.hpp>
#include <msgtrans/lockfree/intrusive_inbox.hpp>
#include <msgtrans/message.hpp>
#include <msgtrans/protocol/counter.hpp>
#include <msgtrans/protocol/request_registry.hpp>
#include <msgtrans/protocol/session_protocol.hpp>
#include <msgtrans/protocol/timer_wheel.hpp>
#include <msgtrans/session/session.hpp>
#include <msgtrans/statistics.hpp>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <vector>

namespace msgtrans::detail {

using protocol::TimePoint;

/// The budget of all that the sessions of a server have queued, and what is done when there is room in it again.
struct OutboundShare {
  explicit OutboundShare(std::size_t limit) noexcept : total(limit) {}

  protocol::OutboundTotal total;
  std::function<void()> on_room;  // any thread
};

class ControlLoop;
struct ControlCommand;
struct DrainRule;
class Handshake;
class Shard;

/// "For ever" as people write it must not overflow when it is added to the time.
inline constexpr std::chrono::milliseconds longest_duration = std::chrono::hours(24 * 365);

/// The hook that a session hangs on in its shard's list.
using ShardMember = boost::intrusive::list_base_hook<>;

/// What a shard's wheel holds.
struct ShardTimer : protocol::TimerWheel::Timer {
  /// On the shard, when the time has come.
  virtual void expired() = 0;

 protected:
  ~ShardTimer() = default;
};

/// Something for a shard to do, sent from any thread.
class Command : public lockfree::InboxNode<Command> {
 public:
  virtual ~Command() = default;
  /// `self` owns this; kept or destroyed as the command likes.
  virtual void run(std::unique_ptr<Command> self) noexcept = 0;
};

/// What a cancellation slot and the shard share of one waiting operation. Only the shard touches the members.
struct Operation {
  std::uint32_t message_id = 0;  // once it is a pending request
};
using OperationPtr = std::shared_ptr<Operation>;

/// As `RequestCounts`. These counters are all written by a shard, and read by anybody.
struct RequestCounters {
  protocol::Counter made, sent, answered, timed_out, cancelled, connection_lost, refused;

  [[nodiscard]] RequestCounts value() const noexcept {
    // In this order: what has an outcome had been made before.
    RequestCounts counts{.made = 0,
                         .sent = sent.value(),
                         .answered = answered.value(),
                         .timed_out = timed_out.value(),
                         .cancelled = cancelled.value(),
                         .connection_lost = connection_lost.value(),
                         .refused = refused.value()};
    const std::uint64_t over =
        counts.answered + counts.timed_out + counts.cancelled + counts.connection_lost + counts.refused;
    counts.made = std::max(made.value(), over);
    counts.pending = counts.made - over;
    return counts;
  }
};

/// As `ErrorCounts`.
struct ErrorCounters {
  std::array<protocol::Counter, ErrorCounts::size> counters;

  void add(const error_code& code) noexcept { counters[ErrorCounts::index(code)].add(1); }
  void add_to(ErrorCounts& to) const noexcept {
    const error_code system(1, boost::system::system_category());
    for (std::size_t i = 0; i < counters.size(); ++i) {
      to.add(i == 0 ? system : make_error_code(static_cast<Errc>(i)), counters[i].value());
    }
  }
};

/// Of a listener's connections on one shard; of a client, of all.
struct alignas(64) ConnectionCounters {
  protocol::Counter sessions_total, sessions_ended, sessions_refused, accept_failures, handshake_failures, packets_in,
      packets_out, bytes_in, bytes_out;
};

/// A request that waits for its answer.
struct PendingRequest {
  PendingRequest(ReplyHandler h, asio::any_completion_executor w, OperationPtr o, TimePoint since,
                 RequestCounters* of_session) noexcept
      : handler(std::move(h)), work(std::move(w)), operation(std::move(o)), started(since), counters(of_session) {}
  PendingRequest(PendingRequest&&) noexcept = default;
  PendingRequest& operator=(PendingRequest&&) = delete;  // broken for ReplyHandler in Boost 1.81

  ReplyHandler handler;
  asio::any_completion_executor work;  // keeps the handler's context running meanwhile
  OperationPtr operation;              // null if it cannot be cancelled
  TimePoint started;
  RequestCounters* counters;  // its session's, which is there as long as this; null if there was no memory for them
};

/// One thread's worth of sessions: what they share, and the loop's few entry points. Unless said otherwise a member is
/// for code that runs on the shard.
class Shard : public std::enable_shared_from_this<Shard> {
 public:
  /// Written by the shard, read by anybody.
  struct Counters {
    protocol::Counter sessions_refused, accept_failures, protocol_errors, handler_failures, unhandled, dropped_oldest,
        dropped_at_close, dropped_inbound, unmatched_responses, sessions_swept, handshake_failures, compressed_packets,
        compressed_bytes_before, compressed_bytes_after, incompressible_packets, requests_received, answers_sent;
    // sessions_refused by reason
    protocol::Counter refused_sessions, refused_address, refused_rate, refused_address_rate, refused_on_connect,
        refused_timeout;
    protocol::Counter queued_bytes, queued_packets;  // now; what is taken away is added modulo 2^64
    ConnectionCounters connections;                  // a client's; a server's are with their listeners
    ErrorCounters ends, handshakes_failed_by;
    RequestCounters requests;
    protocol::LatencyRecorder request_latency;
  };

  /// With a thread of its own, not yet started.
  Shard();
  /// On the user's executor.
  explicit Shard(asio::any_io_executor executor);
  ~Shard();

  /// The shard whose code the calling thread runs; null elsewhere.
  [[nodiscard]] static Shard* current() noexcept { return current_; }
  /// True on threads that must not block: shards' own, and others while they run code of a shard.
  [[nodiscard]] static bool must_not_block() noexcept { return detail::must_not_block != 0; }

  /// Encloses each entry into the shard's code. The outermost one's end settles the sessions that were touched, and
  /// the commands that were sent meanwhile.
  class Scope {
   public:
    explicit Scope(Shard& shard) noexcept : shard_(shard), outer_(current_) {
      current_ = &shard;
      ++detail::must_not_block;
      if (shard_.depth_++ == 0) {
        shard_.busy_.store(true);
        shard_.now_ = Clock::now();
      }
    }
    ~Scope() {
      if (shard_.depth_ == 1) {
        shard_.settle_all();
        shard_.busy_.store(false);
        shard_.busy_.notify_all();
      }
      --shard_.depth_;
      --detail::must_not_block;
      current_ = outer_;
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Shard& shard_;
    Shard* outer_;
  };

  // --- any thread

  [[nodiscard]] const asio::any_io_executor& executor() const noexcept { return executor_; }
  [[nodiscard]] const Counters& counters() const noexcept { return counters_; }
  /// Hands a command over; false, and the command still the caller's, if the shard has ended.
  bool post(std::unique_ptr<Command>&& command) noexcept;
  /// Has it delivered; false if the shard has ended.
  bool post(ReadyState& ready) noexcept;
  /// Runs `f` on the shard.
  template <class F>
  bool post(F f) {
    struct Call final : Command {
      explicit Call(F&& body) : body_(std::move(body)) {}
      void run(std::unique_ptr<Command>) noexcept override { body_(); }
      F body_;
    };
    return post(std::unique_ptr<Command>(new Call(std::move(f))));
  }

  /// Waits until no code of the shard runs. With a flag that its code looks at, and that was set before, the two give
  /// "nobody is in there, and nobody will be". Not on the shard.
  void wait_until_idle() const noexcept { busy_.wait(true); }

  /// Once, before any session: starts the shard's own thread, if it has one. `on_exception` is told what completion
  /// handlers throw; `keep_alive` is released when the thread ends. `on_abandoned` is called on the shard should the
  /// user's context be destroyed before `finish`; then the sessions are cut.
  void start(std::function<void(std::exception_ptr)> on_exception, std::shared_ptr<void> keep_alive,
             std::function<void()> on_abandoned);
  /// Ends the shard: the commands that were sent are run, later ones are refused. Then calls `done` on the shard; the
  /// thread ends.
  void finish(std::function<void()> done);
  /// After `finish`: waits for the thread; not from a thread that must not block.
  void join();

  std::size_t index = 0;  ///< among those of its server

  /// Once, before any session: to whom the news of its sessions go.
  void set_control(std::shared_ptr<ControlLoop> control) noexcept { control_ = std::move(control); }
  /// Once, before any session.
  void set_outbound_share(std::shared_ptr<OutboundShare> share) noexcept {
    outbound_share_ = std::move(share);
    resources_.total = outbound_share_ ? &outbound_share_->total : nullptr;
  }
  /// Null: no limit.
  [[nodiscard]] protocol::OutboundTotal* outbound_total() const noexcept {
    return outbound_share_ ? &outbound_share_->total : nullptr;
  }
  /// Has all shards look for sessions that want room.
  void tell_room() const noexcept {
    insist([this] { outbound_share_->on_room(); });
  }
  [[nodiscard]] const protocol::SharedResources& resources() const noexcept { return resources_; }
  /// Null for a client's.
  [[nodiscard]] ControlLoop* control() const noexcept { return control_.get(); }
  /// What has to be kept for the executor; null on the user's.
  [[nodiscard]] std::shared_ptr<void> context() const noexcept { return own_context_; }

  // --- on the shard

  /// Calls `handler(args...)` on `executor` at the end of the turn, so never before this returns.
  template <class Handler, class... Args>
  void later(asio::any_completion_executor executor, Handler handler, Args... args) noexcept {
    try {
      auto call = [executor = std::move(executor), handler = std::move(handler), ... args = std::move(args)]() mutable {
        complete(executor, std::move(handler), std::move(args)...);
      };
      completions_.push_back(std::make_unique<CompletionOf<decltype(call)>>(std::move(call)));
    } catch (const std::bad_alloc&) {
      // No memory to tell it: the handler is destroyed, which ends its wait as well.
    }
  }

  /// Its executor's context is being destroyed, or has been.
  [[nodiscard]] bool abandoned() const noexcept { return abandoned_; }
  [[nodiscard]] TimePoint now() const noexcept { return now_; }
  [[nodiscard]] Counters& counters() noexcept { return counters_; }
  [[nodiscard]] protocol::SharedResources& resources() noexcept { return resources_; }
  [[nodiscard]] protocol::RequestRegistry<PendingRequest>& requests() noexcept { return requests_; }
  [[nodiscard]] Poller& poller() noexcept { return *poller_; }
  [[nodiscard]] protocol::TimerWheel& timers() noexcept { return timers_; }
  /// One read's worth of memory, shared by all that the thread serves: whoever reads is done with it before another
  /// reads.
  [[nodiscard]] static std::span<std::byte> read_buffer();
  /// True if everything sent so far has taken effect: then what is done directly keeps its place in the order.
  [[nodiscard]] bool caught_up() const noexcept { return !running_commands_ && backlog_ == nullptr && inbox_.empty(); }
  /// Asks for `SessionState::settle` at the end of the outermost scope.
  void touch(SessionState& session) noexcept;
  /// The same when the others that were touched, and the commands that were sent, have had their turn. From `settle`.
  void touch_later(SessionState& session) noexcept;

  /// The same when Asio's other handlers, and with them the other sessions that have something to read, have had
  /// theirs.
  void touch_next_turn(SessionState& session) noexcept;

  /// Calls `f` at that time, once, unless the shard ends before.
  void run_at(TimePoint when, std::function<void()> f);

  /// \throws boost::system::system_error when the system refuses to wait for it.
  void add(SessionState& session);
  void remove(SessionState& session) noexcept;
  /// Holds it until `remove`.
  void add(std::shared_ptr<Handshake> handshake);
  void remove(const Handshake& handshake) noexcept;
  /// How many of them only tell a peer that it is refused.
  std::size_t refusing = 0;
  /// Ends them all with that error.
  void end_handshakes(const Error& why) noexcept;
  /// A session has left the map, which keeps it for readers that may still look: it is to be given up at the turn's
  /// end.
  void collect_later() noexcept { has_ended_some_ = true; }
  [[nodiscard]] std::size_t session_count() const noexcept { return sessions_.size(); }
  /// A copy: sessions may end meanwhile.
  [[nodiscard]] std::vector<SessionPtr> sessions() const;
  /// Settles those that want room.
  void look_for_room() noexcept;
  /// Called once, when the last session has gone.
  std::function<void()> on_empty;
  /// The same, when no handshake is left either.
  std::function<void()> on_idle;
  /// The server stops: nobody new is admitted here, ...
  bool ending = false;
  /// ... but for those who are in their handshake, if this is set.
  std::shared_ptr<const DrainRule> drain_rule;
  /// What the control loop is told at the end of the turn, or by `send_control`.
  [[nodiscard]] std::vector<ControlCommand>& control_batch() noexcept { return control_batch_; }
  void send_control() noexcept;

 private:
  friend class Scope;

  struct Completion {
    virtual ~Completion() = default;
    virtual void run() = 0;
  };
  template <class F>
  struct CompletionOf final : Completion {
    explicit CompletionOf(F&& body) : body_(std::move(body)) {}
    void run() override { body_(); }
    F body_;
  };

  /// Marks a thread that may still touch Asio for us: the context must not go before.
  class Waker {
   public:
    explicit Waker(Shard& shard) noexcept : shard_(current_ == &shard ? nullptr : &shard) {
      if (shard_ != nullptr) shard_->wakers_.fetch_add(1);
    }
    ~Waker() {
      if (shard_ != nullptr && shard_->wakers_.fetch_sub(1) == 1) shard_->wakers_.notify_all();
    }
    Waker(const Waker&) = delete;
    Waker& operator=(const Waker&) = delete;

   private:
    Shard* shard_;
  };

  /// Nobody needs the poller or timers.
  [[nodiscard]] bool is_idle() const noexcept { return sessions_.empty() && handshakes_.empty(); }
  void settle_all() noexcept;
  void begin_next_turn() noexcept;
  void collect() noexcept;
  void run_completions() noexcept;
  [[nodiscard]] bool has_work() const noexcept {
    return backlog_ != nullptr || !inbox_.empty() || !ready_.empty() || !touched_.empty() || !completions_.empty();
  }
  void wake() noexcept;
  void run_commands() noexcept;
  void run_backlog(std::size_t most) noexcept;
  void deliver_ready() noexcept;
  void arm() noexcept;
  void tick();

  // constinit: without it every access from another file goes through a function that may have to initialise it
  static constinit thread_local Shard* current_;

  /// A context whose pending operations can be destroyed before itself: users' coroutines that wait in it may hold
  /// sessions, which hold the shard, which holds the context.
  class Context final : public asio::io_context {
   public:
    Context() : asio::io_context(1) {}
    using asio::execution_context::shutdown;
  };

  /// Tells the shards on a user's context that it is being destroyed, while it can still be used.
  class ContextService;
  /// The shards of one context; outlives it.
  struct Neighbours {
    std::mutex mutex;
    std::vector<Shard*> shards;
  };

  void abandon() noexcept;
  void leave_neighbours() noexcept;
  void release_context() noexcept;
  void close_inbox() noexcept;

  std::shared_ptr<Context> own_context_;
  std::shared_ptr<Neighbours> neighbours_;  // null on a context of its own
  asio::any_io_executor executor_;          // the system's once the user's has gone
  asio::any_io_executor work_;
  std::thread thread_;
  std::shared_ptr<ControlLoop> control_;
  std::shared_ptr<OutboundShare> outbound_share_;
  std::vector<ControlCommand> control_batch_;

  lockfree::IntrusiveInbox<Command> inbox_;
  lockfree::IntrusiveInbox<ReadyState> ready_;  // apart from the commands: nothing has its place behind these
  Command* backlog_ = nullptr;                  // taken out of the inbox, and left for a later turn
  Counters counters_;
  protocol::SharedResources resources_;
  protocol::RequestRegistry<PendingRequest> requests_;
  protocol::TimerWheel timers_;
  const std::shared_ptr<Poller> poller_ = std::make_shared<Poller>();
  std::optional<Timer> timer_;  // until finish(), as sessions' sockets
  std::optional<Timer> alarm_;  // of run_at
  TimePoint armed_for_ = TimePoint::max();
  TimePoint now_;
  unsigned depth_ = 0;
  // Sequentially consistent, as the flag of whoever waits for it: either he sees the shard busy, or the shard his flag.
  std::atomic<bool> busy_{false};
  std::atomic<unsigned> wakers_{0};
  bool running_commands_ = false;
  bool has_ended_some_ = false;
  std::vector<SessionPtr> touched_;
  std::vector<SessionPtr> touched_later_;
  std::vector<SessionPtr> next_turn_;
  bool next_turn_posted_ = false;
  std::vector<std::unique_ptr<Completion>> completions_;  // of this turn
  std::function<void(std::exception_ptr)> on_exception_;
  std::function<void()> on_abandoned_;
  std::function<void()> done_;  // of finish(), until it is called
  bool abandoned_ = false;
  boost::intrusive::list<ShardMember> sessions_;  // each holds a reference
  std::unordered_map<const Handshake*, std::shared_ptr<Handshake>> handshakes_;
};

}  // namespace msgtrans::detail
