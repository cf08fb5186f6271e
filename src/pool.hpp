// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "control_loop.hpp"
#include "shard.hpp"

#include <array>
#include <atomic>
#include <boost/asio/any_completion_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/post.hpp>
#include <boost/intrusive/list.hpp>
#include <condition_variable>
#include <functional>
#include <memory>
#include <msgtrans/client_transport.hpp>
#include <msgtrans/lockfree/counter.hpp>
#include <msgtrans/lockfree/queue.hpp>
#include <msgtrans/pool/connection_pool.hpp>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

namespace msgtrans::detail {

/// Functions of the user's that must not be called any more once their owner is gone.
class UserCalls {
 public:
  /// True inside of one that may be called; encloses the call.
  class Entry {
   public:
    explicit Entry(UserCalls& calls) noexcept : calls_(calls) { calls_.running_.fetch_add(1); }
    ~Entry() {
      if (calls_.running_.fetch_sub(1) == 1) calls_.running_.notify_all();
    }
    Entry(const Entry&) = delete;
    Entry& operator=(const Entry&) = delete;
    explicit operator bool() const noexcept { return !calls_.silent_.load(); }

   private:
    UserCalls& calls_;
  };

  /// Waits for those that run, unless on a thread that must not block, which may be inside of one.
  void silence() noexcept {
    silent_.store(true);
    if (Shard::must_not_block()) return;
    for (unsigned left; (left = running_.load()) != 0;) running_.wait(left);
  }

 private:
  // Sequentially consistent: either the caller sees the silence, or the silence sees the caller.
  std::atomic<bool> silent_{false};
  std::atomic<unsigned> running_{0};
};

/// Calls `f` on the executor, so many turns later.
template <class F>
void after_turns(const asio::any_io_executor& executor, int turns, F f) {
  asio::post(executor, [executor, turns, f = std::move(f)]() mutable {
    if (turns <= 1) {
      f();
    } else {
      after_turns(executor, turns - 1, std::move(f));
    }
  });
}

/// So many turns later ends the loop, if `own_loop()` gives one, and then the shard; then calls `done` on it.
template <class OwnLoop, class Done>
void finish_after_turns(const std::shared_ptr<Shard>& shard, int turns, OwnLoop own_loop, Done done) {
  after_turns(shard->executor(), turns, [shard, own_loop, last = [shard, done] { shard->finish(done); }] {
    if (const auto loop = own_loop()) {
      loop->shut_down(last);
    } else {
      last();
    }
  });
}

/// Who has a connection: a destroyed pool's thread is not waited for while users have some, since that may be for ever,
/// but it is for requests, which end with their connections.
enum class Borrower : std::uint8_t { user, request };

/// Why a connection is given up.
enum class Retired : std::uint8_t { idle, expired, broken, probe, shrunk, discarded, at_end };

/// One connection of a pool. A `std::shared_ptr` of it is the right to use it: the idle list's, a user's, or that of an
/// operation under way; whoever holds it may touch what is not atomic. So it is in one place at a time.
class PoolSlot : public std::enable_shared_from_this<PoolSlot> {
 public:
  explicit PoolSlot(std::shared_ptr<Pool> owner);
  ~PoolSlot();

  [[nodiscard]] bool usable() const noexcept {
    return !ended.load(std::memory_order_acquire) && client->is_connected();
  }

  /// On its way to the pool's executor: made together with the slot, so that giving back cannot fail.
  class Report;
  enum class What : std::uint8_t { connected, probed, given_back };

  const std::shared_ptr<Pool> pool;
  std::optional<ClientTransport> client;  // from its beginning to its end
  std::unique_ptr<Report> report;
  std::atomic<bool> ended{false};  // the connection, whoever has it
  bool discarded = false;
  bool was_lent = false;
  Borrower borrower = Borrower::user;  // while it is lent
  TimePoint made;
  TimePoint last_used;
  std::uint32_t failures_before = 0;  // attempts that had failed, one after the other, before it was begun
};

class PoolWaiter;

/// What a cancellation slot and the shard share of a waiter. The shard's.
struct PoolWaitState {
  PoolWaiter* waiter = nullptr;  // while it stands in line
  bool cancelled = false;
};

/// A call that stands in line, or is on its way there.
class PoolWaiter final : public Command, public boost::intrusive::list_base_hook<> {
 public:
  PoolWaiter(std::shared_ptr<Pool> owner, AcquireHandler h, asio::any_completion_executor w,
             std::shared_ptr<PoolWaitState> s, Borrower b, bool is_patient) noexcept
      : pool(std::move(owner)),
        handler(std::move(h)),
        work(std::move(w)),
        state(std::move(s)),
        borrower(b),
        patient(is_patient) {}

  void run(std::unique_ptr<Command> self) noexcept override;

  const std::shared_ptr<Pool> pool;
  AcquireHandler handler;
  asio::any_completion_executor work;
  const std::shared_ptr<PoolWaitState> state;
  const Borrower borrower;
  const bool patient;
  TimePoint deadline = TimePoint::max();
};

/// What `ConnectionPool` refers to. Slots and waiters keep it alive; so it must be closed to end.
///
/// Its shard is where everything but the fast path happens, and whose executor the connections run on. Members are for
/// the shard unless marked.
class Pool final : public std::enable_shared_from_this<Pool> {
 public:
  explicit Pool(ConnectionPoolOptions options);
  ~Pool();
  void start();

  // --- any thread

  [[nodiscard]] PooledConnection try_acquire(Borrower borrower) noexcept;
  /// Stands in line. If not `patient`, it leaves with the error of the last attempt as soon as there is no connection,
  /// and the server could not be reached just now.
  void acquire(AcquireHandler handler, Borrower borrower, bool patient);
  void give_back(std::shared_ptr<PoolSlot> slot) noexcept;
  void resize(std::size_t min, std::size_t max);
  void close();
  /// `close`, and cuts what is left. Connections that users have keep the shard until they are given back; unless there
  /// are any, this waits for a thread of the pool's own. `done` is called on the shard when all is over.
  void destroy(std::function<void()> done = {});
  /// Whether its executor may run nothing any more.
  [[nodiscard]] bool has_ended() const noexcept { return finishing_.load(); }

  [[nodiscard]] PoolStats stats() const;
  /// Connections that users have, those of requests not counted.
  [[nodiscard]] std::size_t users() const noexcept { return lent_[static_cast<std::size_t>(Borrower::user)].load(); }
  [[nodiscard]] std::size_t in_use() const noexcept {
    return lent_[0].load(std::memory_order_relaxed) + lent_[1].load(std::memory_order_relaxed);
  }
  /// In use and wanted.
  [[nodiscard]] std::size_t load() const noexcept { return in_use() + waiting_.load(std::memory_order_relaxed); }
  [[nodiscard]] const ConnectionPoolOptions& options() const noexcept { return options_; }
  [[nodiscard]] const std::shared_ptr<Shard>& shard() const noexcept { return shard_; }
  /// Null once the context of the user's executor has gone.
  [[nodiscard]] std::shared_ptr<ControlLoop> loop() const noexcept {
    const std::lock_guard lock(mutex_);
    return loop_;
  }
  [[nodiscard]] error_code last_failure() const noexcept;

  // --- for slots

  /// Has the shard look at the slot; if the shard has ended, the slot is gone.
  static void report(std::shared_ptr<PoolSlot> slot, PoolSlot::What what, error_code code) noexcept;
  void reported(std::shared_ptr<PoolSlot> slot, PoolSlot::What what, error_code code) noexcept;

 private:
  friend class PoolWaiter;

  [[nodiscard]] bool on_own_thread() const noexcept { return !options_.executor; }
  /// From the idle list; null if there is none.
  [[nodiscard]] std::shared_ptr<PoolSlot> take_idle() noexcept;
  [[nodiscard]] PooledConnection lend(std::shared_ptr<PoolSlot> slot, Borrower borrower) noexcept;

  void arrived(std::unique_ptr<PoolWaiter> waiter) noexcept;
  void leave(PoolWaiter& waiter, error_code code) noexcept;
  void cancel(PoolWaitState& state) noexcept;
  /// After anything has happened: serves who waits, makes connections, sets the alarm.
  void settle() noexcept;
  void serve() noexcept;
  void expire_waiters(TimePoint now) noexcept;
  void refuse_impatient() noexcept;
  void fill() noexcept;
  void connect() noexcept;
  void connected(std::shared_ptr<PoolSlot> slot, error_code code) noexcept;
  void attempt_failed(std::uint32_t failures, error_code code) noexcept;
  void probe(std::shared_ptr<PoolSlot> slot) noexcept;
  void place(std::shared_ptr<PoolSlot> slot) noexcept;
  void retire(std::shared_ptr<PoolSlot> slot, Retired why) noexcept;
  void ended(const std::shared_ptr<PoolSlot>& slot) noexcept;
  /// Looks at every idle connection.
  void sweep() noexcept;
  void set_limits(std::size_t min, std::size_t max) noexcept;
  void arm() noexcept;
  void alarm() noexcept;
  void announce(EventKind kind, Error error) noexcept;

  void begin_close() noexcept;
  void cut() noexcept;
  void finish_if_empty() noexcept;
  void finish() noexcept;
  void abandoned() noexcept;
  void set_finished();

  ConnectionPoolOptions options_;
  const std::shared_ptr<Shard> shard_;
  const bool owns_loop_;
  const std::shared_ptr<UserCalls> user_calls_ = std::make_shared<UserCalls>();

  // --- any thread
  lockfree::LockFreeQueue<std::shared_ptr<PoolSlot>> idle_;
  // Who waits counts up before it sends itself to the shard, which looks into the idle list then; who gives back puts
  // it into the list and then looks whether somebody waits. All four are sequentially consistent: one of the two sees
  // the other. And since nobody takes a connection after having seen this above zero, nobody overtakes.
  alignas(64) std::atomic<std::size_t> waiting_{0};
  std::atomic<std::size_t> count_{0};  // connections, those being made included; written by the shard
  std::atomic<std::size_t> min_;
  std::atomic<std::size_t> max_;
  std::atomic<bool> closed_{false};
  std::atomic<bool> finishing_{false};
  alignas(64) std::array<std::atomic<std::size_t>, 2> lent_{};  // in use, by Borrower
  lockfree::LockFreeCounter acquired_;

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::shared_ptr<ControlLoop> loop_;
  bool finished_ = false;
  bool left_to_users_ = false;  // it was destroyed, and ends when they have given back what they have
  std::vector<std::function<void()>> on_finished_;
  error_code last_failure_;  // of the attempts since the last success

  // --- the shard's, some read by any thread
  boost::intrusive::list<PoolWaiter> waiters_;  // owned; in the order they came
  std::unordered_map<PoolSlot*, std::weak_ptr<PoolSlot>> slots_;
  std::unordered_set<std::shared_ptr<PoolSlot>> closing_;  // until the peer has seen the end
  std::uint32_t failures_ = 0;                             // attempts, one after the other
  std::size_t to_replace_ = 0;
  bool sweep_now_ = false;
  bool was_cut_ = false;
  TimePoint next_attempt_ = TimePoint::min();
  TimePoint next_sweep_ = TimePoint::max();
  TimePoint armed_for_ = TimePoint::max();
  std::atomic<std::size_t> connecting_{0};
  std::atomic<std::size_t> probing_{0};
  protocol::Counter made_, failed_, replaced_, waited_, timed_out_, cancelled_;
  std::atomic<std::uint64_t> refused_{0};
  std::array<protocol::Counter, 7> closed_by_;
  std::atomic<std::uint64_t> handler_failures_{0};
};

/// A request by way of a pool: acquires, asks, gives back; and goes on to another connection as long as nothing was
/// sent. After its first step it lives on the executor of its pools.
class PoolRequest : public std::enable_shared_from_this<PoolRequest> {
 public:
  PoolRequest(BytesView payload, const RequestOptions& options);
  virtual ~PoolRequest() = default;

  void start(ReplyHandler handler);

 protected:
  /// The pool to ask next, and whether to wait while its server cannot be reached; null: none, or none any more.
  virtual std::shared_ptr<Pool> next(bool& patient) = 0;
  /// The error if there never was a pool to ask.
  [[nodiscard]] virtual error_code nobody() const noexcept = 0;
  /// What became of it at the last pool; `sent`: whether it was asked there.
  virtual void note(bool sent, error_code code) noexcept = 0;
  [[nodiscard]] virtual const std::shared_ptr<Shard>& home() const noexcept = 0;
  /// Whether home's executor may run nothing any more.
  [[nodiscard]] virtual bool home_has_ended() const noexcept = 0;

 private:
  void cancel();
  void go_on(bool initiating);
  void try_pool();
  void acquired(error_code code, PooledConnection connection);
  void ask(PooledConnection connection);
  void answered(error_code code, Reply reply);
  void finish(error_code code, Reply reply, bool initiating);
  /// Runs a step; when memory is short, ends with that.
  template <class F>
  void step(F&& f);

  std::vector<std::byte> bytes_;  // extension, then payload
  std::size_t extension_size_;
  RequestOptions options_;
  ReplyHandler handler_;
  asio::any_completion_executor work_;
  asio::cancellation_signal signal_;  // of the current step
  bool cancelled_ = false;
  int not_taken_ = 0;  // by connections of the current pool, which had ended
  error_code last_;
  std::shared_ptr<Pool> current_;
  bool patient_ = true;
  PooledConnection connection_;
};

/// Waits for what `start` begins with the handler that it is given. `blocking_on_shard` on a thread that must not.
[[nodiscard]] Reply wait_for_reply(const std::function<void(ReplyHandler)>& start, const char* what, Error& error);

/// Names the first option of a pool's that is out of its range.
[[nodiscard]] Error validate(const ConnectionPoolOptions& options);

}  // namespace msgtrans::detail
