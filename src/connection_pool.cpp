// SPDX-License-Identifier: Apache-2.0
#include "check_option.hpp"
#include "client.hpp"
#include "complete.hpp"
#include "pool.hpp"

#include <algorithm>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/system_executor.hpp>
#include <msgtrans/protocol/backoff.hpp>
#include <new>

namespace msgtrans::detail {

namespace {

constexpr std::size_t most_connections = 100'000;

Error out_of_memory() {
  return Error(make_error_code(boost::system::errc::not_enough_memory));
}

Error check_limits(std::size_t min, std::size_t max) {
  if (auto error = check_range<std::size_t>("max_connections", max, 1, most_connections)) return error;
  if (min > max) {
    return Error(Errc::invalid_option, "min_connections is " + std::to_string(min) +
                                           ", must be at most max_connections, " + std::to_string(max));
  }
  return {};
}

const char* to_string(Retired why) noexcept {
  switch (why) {
    case Retired::idle: return "a connection was not used for idle_time";
    case Retired::expired: return "a connection was older than its lifetime";
    case Retired::broken: return "a connection has ended";
    case Retired::probe: return "a connection failed its probe";
    case Retired::shrunk: return "there were more connections than the maximum";
    case Retired::discarded: return "a connection was discarded";
    case Retired::at_end: return "the pool was closed";
  }
  return "?";
}

/// A thread that waits for a handler to be called, wherever that happens.
template <class... Results>
struct Meeting {
  std::mutex mutex;
  std::condition_variable ended;
  bool done = false;
  std::tuple<Results...> results;

  struct Handler {
    Meeting* meeting;
    using executor_type = asio::system_executor;
    [[nodiscard]] executor_type get_executor() const noexcept { return {}; }
    void operator()(Results... values) const {
      // Notified under the lock: the meeting lies on the stack of the thread that this lets go.
      const std::lock_guard lock(meeting->mutex);
      meeting->results = std::tuple<Results...>(std::move(values)...);
      meeting->done = true;
      meeting->ended.notify_one();
    }
  };
  [[nodiscard]] Handler handler() noexcept { return {this}; }
  std::tuple<Results...> wait() {
    std::unique_lock lock(mutex);
    ended.wait(lock, [this] { return done; });
    return std::move(results);
  }
};

}  // namespace

Error validate(const ConnectionPoolOptions& options) {
  Error error;
  if (!parse_url(options.url, error)) return error;
  const auto first = [&error](Error found) {
    if (!error) error = std::move(found);
  };
  first(check_limits(options.min_connections, options.max_connections));
  first(check_duration("idle_time", options.idle_time, true));
  first(check_duration("lifetime", options.lifetime, true));
  first(check_duration("probe.interval", options.probe.interval, true));
  first(check_duration("probe.timeout", options.probe.timeout, false));
  first(check_duration("acquire_timeout", options.acquire_timeout, true));
  first(check_duration("backoff.initial", options.backoff.initial, false));
  first(check_duration("backoff.max", options.backoff.max, false));
  if (!error && options.backoff.max < options.backoff.initial) {
    error = Error(Errc::invalid_option, "backoff.max is less than backoff.initial");
  }
  if (!error && !(options.backoff.factor >= 1 && options.backoff.factor <= 100)) {
    error = Error(Errc::invalid_option,
                  "backoff.factor is " + std::to_string(options.backoff.factor) + ", must be from 1 to 100");
  }
  if (!error && options.client.executor) {
    error = Error(Errc::invalid_option, "client.executor is set; a pool's executor is ConnectionPoolOptions::executor");
  }
  if (!error && options.client.reconnect.enabled) {
    error = Error(Errc::invalid_option, "client.reconnect.enabled is set; a pool replaces its connections itself");
  }
  first(check_duration("client.connect_timeout", options.client.connect_timeout, true));
  first(validate_connection(options.client));
  return error;
}

Reply wait_for_reply(const std::function<void(ReplyHandler)>& start, const char* what, Error& error) {
  error = {};
  if (Shard::must_not_block()) {
    error = Error(Errc::blocking_on_shard, what);
    return {};
  }
  Meeting<error_code, Reply> meeting;
  start(meeting.handler());
  auto [code, reply] = meeting.wait();
  if (code) error = Error(code);
  return std::move(reply);
}

// --- slots

class PoolSlot::Report final : public Command {
 public:
  void run(std::unique_ptr<Command> self) noexcept override {
    self.release();
    auto of = std::move(slot);
    of->report.reset(this);
    const auto owner = of->pool;
    owner->reported(std::move(of), what, code);
  }

  std::shared_ptr<PoolSlot> slot;
  What what = What::given_back;
  error_code code;
};

PoolSlot::PoolSlot(std::shared_ptr<Pool> owner) : pool(std::move(owner)), report(std::make_unique<Report>()) {}
PoolSlot::~PoolSlot() = default;

void Pool::report(std::shared_ptr<PoolSlot> slot, PoolSlot::What what, error_code code) noexcept {
  const auto pool = slot->pool;
  auto report = std::move(slot->report);
  report->what = what;
  report->code = code;
  report->slot = std::move(slot);
  std::unique_ptr<Command> command(std::move(report));
  if (pool->shard_->post(std::move(command))) return;
  // Nobody looks any more: the connection ends here.
  slot = std::move(static_cast<PoolSlot::Report&>(*command).slot);
}

// --- waiters

void PoolWaiter::run(std::unique_ptr<Command> self) noexcept {
  self.release();
  pool->arrived(std::unique_ptr<PoolWaiter>(this));
}

// --- life

Pool::Pool(ConnectionPoolOptions options)
    : options_(std::move(options)),
      shard_(options_.executor ? std::make_shared<Shard>(options_.executor) : std::make_shared<Shard>()),
      owns_loop_(!options_.control),
      min_(options_.min_connections),
      max_(options_.max_connections) {
  if (owns_loop_) {
    loop_ = std::make_shared<ControlLoop>(shard_->executor(), ControlLoop::Runs::on_executor,
                                          ControlLoop::default_event_capacity, shard_);
  } else {
    loop_ = options_.control->loop();
    options_.control.reset();  // so that it can be let go of
  }
}

Pool::~Pool() = default;

void Pool::start() {
  if (owns_loop_) loop_->start();
  shard_->start(
      [weak = weak_from_this()](const std::exception_ptr&) {
        if (const auto self = weak.lock()) self->handler_failures_.fetch_add(1, std::memory_order_relaxed);
      },
      nullptr,
      [weak = weak_from_this()] {
        if (const auto self = weak.lock()) self->abandoned();
      });
  shard_->post([self = shared_from_this()] { self->settle(); });
}

void Pool::close() {
  closed_.store(true);
  shard_->post([self = shared_from_this()] {
    self->begin_close();
    self->settle();
  });
}

void Pool::destroy(std::function<void()> done) {
  closed_.store(true);
  bool over = false;
  if (done) {
    const std::lock_guard lock(mutex_);
    over = finished_;
    if (!over) on_finished_.push_back(done);
  }
  if (over) done();
  shard_->post([self = shared_from_this()] {
    self->begin_close();
    self->cut();
    self->settle();
  });
  // On the user's executor there is nothing to wait for: it may never run again.
  if (on_own_thread() && !Shard::must_not_block()) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return finished_ || left_to_users_; });
    over = finished_;
    lock.unlock();
    if (over) shard_->join();
  }
  user_calls_->silence();
}

/// What waits or is idle or being made ends; what is in use does when it is given back.
void Pool::begin_close() noexcept {
  closed_.store(true);
  while (!waiters_.empty()) leave(waiters_.front(), Errc::closed);
  sweep();
  for (const auto& [key, weak] : slots_) {
    const auto slot = weak.lock();
    if (slot && slot->made == TimePoint()) slot->client.reset();  // being made: which ends the attempt
  }
}

void Pool::cut() noexcept {
  was_cut_ = true;
  closing_.clear();
  for (const auto& [key, weak] : slots_) {
    const auto slot = weak.lock();
    // Somebody else has it, so it cannot be destroyed; but requests under way learn of the end by this.
    if (!slot || !slot->client) continue;
    if (auto session = slot->client->session()) session->close("the pool was destroyed");
  }
  const std::lock_guard lock(mutex_);
  left_to_users_ = users() != 0;
  changed_.notify_all();
}

void Pool::finish_if_empty() noexcept {
  if (closed_.load() && count_.load() == 0 && closing_.empty()) finish();
}

void Pool::finish() noexcept {
  if (finishing_.exchange(true)) return;
  // Connections that were destroyed just now take a few turns to end, and should before their context may go.
  constexpr int turns = 4;
  finish_after_turns(
      shard_, turns, [self = shared_from_this()] { return self->owns_loop_ ? self->loop() : nullptr; },
      [self = shared_from_this()] { self->set_finished(); });
}

/// The context of the user's executor is being destroyed.
void Pool::abandoned() noexcept {
  std::shared_ptr<ControlLoop> gone;
  begin_close();
  cut();
  finishing_.store(true);
  {
    // It may run on the same context, and must not outlive that.
    const std::lock_guard lock(mutex_);
    gone.swap(loop_);
  }
  set_finished();
}

void Pool::set_finished() {
  std::vector<std::function<void()>> tell;
  {
    const std::lock_guard lock(mutex_);
    finished_ = true;
    tell.swap(on_finished_);
    changed_.notify_all();
  }
  for (const auto& done : tell) done();
}

// --- any thread

std::shared_ptr<PoolSlot> Pool::take_idle() noexcept {
  while (auto found = idle_.try_pop()) {
    if ((*found)->usable()) return std::move(*found);
    report(std::move(*found), PoolSlot::What::given_back, {});
  }
  return nullptr;
}

PooledConnection Pool::lend(std::shared_ptr<PoolSlot> slot, Borrower borrower) noexcept {
  slot->borrower = borrower;
  lent_[static_cast<std::size_t>(borrower)].fetch_add(1, std::memory_order_relaxed);
  acquired_.add();
  slot->was_lent = true;
  ClientTransport& client = *slot->client;
  return PooledConnection(std::move(slot), client);
}

PooledConnection Pool::try_acquire(Borrower borrower) noexcept {
  if (waiting_.load() != 0 || closed_.load()) return {};
  auto slot = take_idle();
  return slot ? lend(std::move(slot), borrower) : PooledConnection();
}

void Pool::give_back(std::shared_ptr<PoolSlot> slot) noexcept {
  lent_[static_cast<std::size_t>(slot->borrower)].fetch_sub(1, std::memory_order_relaxed);
  slot->last_used = Clock::now();
  const bool expired = options_.lifetime.count() != 0 && slot->last_used - slot->made >= options_.lifetime;
  if (slot->discarded || expired || !slot->usable() || count_.load() > max_.load() || waiting_.load() != 0 ||
      closed_.load()) {
    return report(std::move(slot), PoolSlot::What::given_back, {});
  }
  try {
    idle_.push(std::move(slot));
  } catch (const std::bad_alloc&) {
    return report(std::move(slot), PoolSlot::What::given_back, {});
  }
  if (waiting_.load() != 0 || closed_.load()) {
    // Whichever it is; if somebody else has it, he looks as well when he gives it back.
    if (auto other = idle_.try_pop()) report(std::move(*other), PoolSlot::What::given_back, {});
  }
}

void Pool::acquire(AcquireHandler handler, Borrower borrower, bool patient) {
  auto state = std::make_shared<PoolWaitState>();
  auto work =
      has_ended() ? tracked_executor(handler, asio::system_executor()) : tracked_executor(handler, shard_->executor());
  if (auto slot = asio::get_associated_cancellation_slot(handler); slot.is_connected()) {
    slot.assign([weak = weak_from_this(), shard = shard_, state](asio::cancellation_type type) {
      if (type == asio::cancellation_type::none) return;
      shard->post([weak, state] {
        if (const auto self = weak.lock()) self->cancel(*state);
      });
    });
  }
  std::unique_ptr<Command> waiter = std::make_unique<PoolWaiter>(shared_from_this(), std::move(handler),
                                                                 std::move(work), std::move(state), borrower, patient);
  waiting_.fetch_add(1);
  if (shard_->post(std::move(waiter))) return;
  waiting_.fetch_sub(1);
  refused_.fetch_add(1, std::memory_order_relaxed);
  // The shard has ended, so its executor may run nothing any more.
  auto& refused = static_cast<PoolWaiter&>(*waiter);
  auto where = tracked_executor(refused.handler, asio::system_executor());
  complete_later(asio::system_executor(), std::move(where), std::move(refused.handler), make_error_code(Errc::closed),
                 PooledConnection());
}

void Pool::resize(std::size_t min, std::size_t max) {
  if (Error error = check_limits(min, max)) throw Exception(error);
  const auto loop = this->loop();
  const bool sent =
      loop && !closed_.load() && loop->send({ControlCommand::ResizePool{[weak = weak_from_this(), min, max] {
        if (const auto self = weak.lock()) {
          self->shard_->post([self, min, max] { self->set_limits(min, max); });
        }
      }}});
  if (!sent) throw Exception(Error(Errc::closed, "the pool or its control loop has ended"));
}

error_code Pool::last_failure() const noexcept {
  const std::lock_guard lock(mutex_);
  return last_failure_;
}

PoolStats Pool::stats() const {
  PoolStats stats;
  stats.min_connections = min_.load();
  stats.max_connections = max_.load();
  stats.idle = idle_.size_approx();
  stats.in_use = in_use();
  stats.connecting = connecting_.load();
  stats.probing = probing_.load();
  stats.waiting = waiting_.load();
  stats.made = made_.value();
  stats.failed = failed_.value();
  stats.replaced = replaced_.value();
  const auto closed_by = [this](Retired why) { return closed_by_[static_cast<std::size_t>(why)].value(); };
  stats.closed_idle = closed_by(Retired::idle);
  stats.closed_expired = closed_by(Retired::expired);
  stats.closed_broken = closed_by(Retired::broken);
  stats.closed_probe = closed_by(Retired::probe);
  stats.closed_shrunk = closed_by(Retired::shrunk);
  stats.closed_discarded = closed_by(Retired::discarded);
  stats.closed_at_end = closed_by(Retired::at_end);
  stats.acquired = static_cast<std::uint64_t>(acquired_.value());
  stats.waited = waited_.value();
  stats.timed_out = timed_out_.value();
  stats.cancelled = cancelled_.value();
  stats.refused = refused_.load(std::memory_order_relaxed);
  stats.handler_failures = handler_failures_.load(std::memory_order_relaxed);
  return stats;
}

// --- on the shard: the line

void Pool::arrived(std::unique_ptr<PoolWaiter> waiter) noexcept {
  waited_.add(1);
  waiter->state->waiter = waiter.get();
  if (options_.acquire_timeout.count() != 0) waiter->deadline = Clock::now() + options_.acquire_timeout;
  PoolWaiter& arrived = *waiter.release();
  waiters_.push_back(arrived);
  if (closed_.load()) return leave(arrived, Errc::closed);
  if (arrived.state->cancelled) return leave(arrived, asio::error::operation_aborted);
  settle();
}

/// Without a connection.
void Pool::leave(PoolWaiter& waiter, error_code code) noexcept {
  const std::unique_ptr<PoolWaiter> mine(&waiter);
  waiters_.erase(waiters_.iterator_to(waiter));
  waiting_.fetch_sub(1);
  waiter.state->waiter = nullptr;
  if (code == asio::error::operation_aborted) {
    cancelled_.add(1);
  } else if (code == asio::error::timed_out) {
    timed_out_.add(1);
  } else {
    refused_.fetch_add(1, std::memory_order_relaxed);
  }
  shard_->later(std::move(waiter.work), std::move(waiter.handler), code, PooledConnection());
}

void Pool::cancel(PoolWaitState& state) noexcept {
  state.cancelled = true;
  if (state.waiter == nullptr) return;
  leave(*state.waiter, asio::error::operation_aborted);
  settle();
}

void Pool::serve() noexcept {
  while (!waiters_.empty()) {
    auto slot = take_idle();
    if (!slot) return;
    place(std::move(slot));
  }
}

/// They wait equally long, so the first one's time comes first.
void Pool::expire_waiters(TimePoint now) noexcept {
  while (!waiters_.empty() && waiters_.front().deadline <= now) leave(waiters_.front(), asio::error::timed_out);
}

void Pool::refuse_impatient() noexcept {
  if (failures_ == 0 || count_.load() != 0) return;
  const error_code code = last_failure();
  for (auto next = waiters_.begin(); next != waiters_.end();) {
    PoolWaiter& waiter = *next++;
    if (!waiter.patient) leave(waiter, code);
  }
}

// --- on the shard: connections

void Pool::settle() noexcept {
  if (sweep_now_) sweep();
  serve();
  expire_waiters(Clock::now());
  fill();
  refuse_impatient();
  finish_if_empty();
  arm();
}

void Pool::reported(std::shared_ptr<PoolSlot> slot, PoolSlot::What what, error_code code) noexcept {
  switch (what) {
    case PoolSlot::What::connected: connected(std::move(slot), code); break;
    case PoolSlot::What::given_back: place(std::move(slot)); break;
    case PoolSlot::What::probed:
      probing_.fetch_sub(1);
      slot->last_used = Clock::now();
      if (code && !closed_.load() && !slot->ended.load()) {
        retire(std::move(slot), Retired::probe);
      } else {
        place(std::move(slot));
      }
      break;
  }
  settle();
}

void Pool::fill() noexcept {
  if (closed_.load()) return;
  while (count_.load() < max_.load() && (count_.load() < min_.load() || connecting_.load() < waiters_.size())) {
    if (failures_ != 0 && (connecting_.load() != 0 || next_attempt_ > Clock::now())) return;
    connect();
  }
}

void Pool::connect() noexcept {
  count_.fetch_add(1);
  connecting_.fetch_add(1);
  std::shared_ptr<PoolSlot> slot;
  try {
    slot = std::make_shared<PoolSlot>(shared_from_this());
    slot->failures_before = failures_;
    slots_.emplace(slot.get(), slot);
    ClientOptions options = options_.client;
    options.executor = shard_->executor();
    ClientTransport& client = slot->client.emplace(std::move(options));
    if (options_.on_message) {
      client.on_message([weak = weak_from_this(), calls = user_calls_](Session& session, const Message& message) {
        const UserCalls::Entry entry(*calls);
        if (!entry) return;
        if (const auto self = weak.lock()) self->options_.on_message(session, message);
      });
    }
    client.on_disconnect([weak = std::weak_ptr(slot)](Session&, const Error&) {
      const auto its = weak.lock();
      if (!its) return;
      its->ended.store(true, std::memory_order_release);
      its->pool->shard_->post([its] { its->pool->ended(its); });
    });
    client.async_connect(options_.url,
                         [slot](error_code code) mutable { report(std::move(slot), PoolSlot::What::connected, code); });
  } catch (const std::exception&) {
    if (slot) slots_.erase(slot.get());
    count_.fetch_sub(1);
    connecting_.fetch_sub(1);
    failed_.add(1);
    attempt_failed(failures_ + 1, out_of_memory().code);
  }
}

void Pool::connected(std::shared_ptr<PoolSlot> slot, error_code code) noexcept {
  connecting_.fetch_sub(1);
  if (code || !slot->client) {
    slots_.erase(slot.get());
    count_.fetch_sub(1);
    if (closed_.load()) return;
    failed_.add(1);
    attempt_failed(slot->failures_before + 1, code);  // several at once count as one
    return;
  }
  made_.add(1);
  if (to_replace_ != 0) {
    --to_replace_;
    replaced_.add(1);
  }
  slot->made = slot->last_used = Clock::now();
  failures_ = 0;
  {
    const std::lock_guard lock(mutex_);
    last_failure_ = {};
  }
  for (const auto after : {options_.idle_time, options_.lifetime, options_.probe.interval}) {
    if (after.count() != 0) next_sweep_ = std::min<TimePoint>(next_sweep_, slot->made + after);
  }
  announce(EventKind::pool_grown, {});
  place(std::move(slot));
}

void Pool::attempt_failed(std::uint32_t failures, error_code code) noexcept {
  failures_ = std::max(failures_, failures);
  const auto& given = options_.backoff;
  const protocol::Backoff backoff{.initial = given.initial, .factor = given.factor, .max = given.max};
  next_attempt_ = Clock::now() + backoff.delay(failures_);
  const std::lock_guard lock(mutex_);
  last_failure_ = code;
}

/// Where a connection goes that nobody has: to the first in line, or into the idle list, or away.
void Pool::place(std::shared_ptr<PoolSlot> slot) noexcept {
  if (slot->discarded) return retire(std::move(slot), Retired::discarded);
  if (closed_.load()) return retire(std::move(slot), Retired::at_end);
  if (!slot->usable()) return retire(std::move(slot), Retired::broken);
  if (options_.lifetime.count() != 0 && Clock::now() - slot->made >= options_.lifetime) {
    return retire(std::move(slot), Retired::expired);
  }
  if (count_.load() > max_.load()) return retire(std::move(slot), Retired::shrunk);
  if (!waiters_.empty()) {
    const std::unique_ptr<PoolWaiter> first(&waiters_.front());
    waiters_.pop_front();
    waiting_.fetch_sub(1);
    first->state->waiter = nullptr;
    shard_->later(std::move(first->work), std::move(first->handler), error_code(),
                  lend(std::move(slot), first->borrower));
    return;
  }
  try {
    idle_.push(std::move(slot));
  } catch (const std::bad_alloc&) {
    retire(std::move(slot), Retired::discarded);
  }
}

void Pool::retire(std::shared_ptr<PoolSlot> slot, Retired why) noexcept {
  slots_.erase(slot.get());
  count_.fetch_sub(1);
  closed_by_[static_cast<std::size_t>(why)].add(1);
  if (why == Retired::broken || why == Retired::expired || why == Retired::probe || why == Retired::discarded) {
    ++to_replace_;
  }
  if (why == Retired::broken && !slot->was_lent && Clock::now() - slot->made < options_.backoff.initial) {
    attempt_failed(slot->failures_before + 1, asio::error::connection_aborted);
  }
  announce(EventKind::pool_shrunk, Error(error_code(), to_string(why)));
  if (was_cut_ || !slot->client || slot->ended.load()) return;
  slot->client->close();  // what its users sent is still written
  try {
    closing_.insert(std::move(slot));
  } catch (const std::bad_alloc&) {
    // It is cut instead.
  }
}

void Pool::ended(const std::shared_ptr<PoolSlot>& slot) noexcept {
  if (closing_.erase(slot) == 0) sweep_now_ = true;
  settle();
}

void Pool::probe(std::shared_ptr<PoolSlot> slot) noexcept {
  probing_.fetch_add(1);
  ClientTransport& client = *slot->client;
  try {
    client.async_request(options_.probe.payload,
                         {.biz_type = options_.probe.biz_type, .timeout = options_.probe.timeout},
                         asio::bind_executor(asio::system_executor(),
                                             [slot, calls = user_calls_](error_code code, const Reply& reply) mutable {
                                               const auto pool = slot->pool;
                                               const auto& accept = pool->options_.probe.accept;
                                               if (!code && accept) {
                                                 const UserCalls::Entry entry(*calls);
                                                 try {
                                                   if (entry && !accept(reply)) code = Errc::refused;
                                                 } catch (...) {
                                                   pool->handler_failures_.fetch_add(1, std::memory_order_relaxed);
                                                   code = Errc::handler_failed;
                                                 }
                                               }
                                               report(std::move(slot), PoolSlot::What::probed, code);
                                             }));
  } catch (const std::exception&) {
    probing_.fetch_sub(1);
    retire(std::move(slot), Retired::probe);
  }
}

void Pool::sweep() noexcept {
  sweep_now_ = false;
  std::erase_if(closing_, [](const auto& slot) { return slot->ended.load(); });
  if (closed_.load()) {
    while (auto slot = idle_.try_pop()) retire(std::move(*slot), Retired::at_end);
    return;
  }
  const auto now = Clock::now();
  TimePoint next = TimePoint::max();
  const auto due = [&](TimePoint since, std::chrono::milliseconds after) {
    if (after.count() == 0) return false;
    if (now - since >= after) return true;
    next = std::min<TimePoint>(next, since + after);
    return false;
  };
  for (std::size_t left = idle_.size_approx(); left != 0; --left) {
    auto found = idle_.try_pop();
    if (!found) break;
    auto slot = std::move(*found);
    if (slot->usable() && count_.load() > min_.load() && due(slot->last_used, options_.idle_time)) {
      retire(std::move(slot), Retired::idle);
    } else if (slot->usable() && due(slot->last_used, options_.probe.interval)) {
      probe(std::move(slot));
    } else {
      place(std::move(slot));
    }
  }
  // Those that are idle later are not due earlier than that.
  if (count_.load() > min_.load()) due(now, options_.idle_time);
  if (count_.load() != 0) due(now, options_.probe.interval);
  if (options_.lifetime.count() != 0) {
    for (const auto& [key, weak] : slots_) {
      const auto slot = weak.lock();
      if (slot && slot->made != TimePoint()) due(slot->made, options_.lifetime);
    }
  }
  next_sweep_ = next;
}

void Pool::set_limits(std::size_t min, std::size_t max) noexcept {
  if (closed_.load()) return;
  const auto old_min = min_.exchange(min);
  const auto old_max = max_.exchange(max);
  if (max > old_max || (max == old_max && min > old_min)) {
    announce(EventKind::pool_grown, {});
  } else if (max < old_max || min < old_min) {
    announce(EventKind::pool_shrunk, Error(error_code(), "the limits were lowered"));
  }
  sweep_now_ = true;
  settle();
}

void Pool::arm() noexcept {
  if (finishing_.load() || closed_.load()) return;
  TimePoint next = next_sweep_;
  if (!waiters_.empty()) next = std::min(next, waiters_.front().deadline);
  if (failures_ != 0 && connecting_.load() == 0 && (count_.load() < min_.load() || !waiters_.empty())) {
    next = std::min(next, next_attempt_);
  }
  if (next >= armed_for_) return;
  try {
    shard_->run_at(next, [weak = weak_from_this()] {
      if (const auto self = weak.lock()) self->alarm();
    });
    armed_for_ = next;
  } catch (const std::exception&) {
    armed_for_ = TimePoint::max();  // the next event tries again
  }
}

void Pool::alarm() noexcept {
  armed_for_ = TimePoint::max();
  if (next_sweep_ <= Clock::now()) sweep_now_ = true;
  settle();
}

void Pool::announce(EventKind kind, Error error) noexcept {
  const auto loop = this->loop();
  if (!loop || !loop->has_subscribers()) return;
  try {
    loop->announce({.kind = kind, .subject = options_.url, .error = std::move(error)});
  } catch (const std::bad_alloc&) {
    // News that there is no memory for.
  }
}

// --- requests

PoolRequest::PoolRequest(BytesView payload, const RequestOptions& options)
    : extension_size_(options.extension.size()), options_(options) {
  bytes_.reserve(extension_size_ + payload.size());
  bytes_.insert(bytes_.end(), options.extension.data(), options.extension.data() + extension_size_);
  bytes_.insert(bytes_.end(), payload.data(), payload.data() + payload.size());
  options_.extension = std::span(std::as_const(bytes_)).first(extension_size_);
}

void PoolRequest::start(ReplyHandler handler) {
  handler_.swap(handler);  // assigning is broken in Boost 1.81: it wraps the handler in itself without end
  work_ = home_has_ended() ? tracked_executor(handler_, asio::system_executor())
                           : tracked_executor(handler_, home()->executor());
  if (auto slot = asio::get_associated_cancellation_slot(handler_); slot.is_connected()) {
    slot.assign([weak = weak_from_this(), shard = home()](asio::cancellation_type type) {
      if (type == asio::cancellation_type::none) return;
      shard->post([weak] {
        if (const auto self = weak.lock()) self->cancel();
      });
    });
  }
  go_on(true);
}

void PoolRequest::cancel() {
  cancelled_ = true;
  signal_.emit(asio::cancellation_type::total);
}

template <class F>
void PoolRequest::step(F&& f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    finish(out_of_memory().code, {}, false);
  }
}

void PoolRequest::go_on(bool initiating) {
  current_ = next(patient_);
  not_taken_ = 0;
  if (!current_) return finish(last_ ? last_ : nobody(), {}, initiating);
  try_pool();
}

// Its handlers, and ask()'s, run where they are called: on the pool's executor, even if that is being destroyed.
void PoolRequest::try_pool() {
  const auto self = shared_from_this();
  const auto pool = current_;  // the operation may be elsewhere already when acquire() returns
  if (auto connection = pool->try_acquire(Borrower::request)) return ask(std::move(connection));
  pool->acquire(
      asio::bind_cancellation_slot(
          signal_.slot(), asio::bind_executor(asio::system_executor(),
                                              [self](error_code code, PooledConnection connection) {
                                                self->step([&] { self->acquired(code, std::move(connection)); });
                                              })),
      Borrower::request, patient_);
}

void PoolRequest::acquired(error_code code, PooledConnection connection) {
  if (cancelled_) code = asio::error::operation_aborted;
  if (!code) return ask(std::move(connection));
  note(false, code);
  last_ = code;
  if (cancelled_) return finish(code, {}, false);
  go_on(false);
}

void PoolRequest::ask(PooledConnection connection) {
  const auto self = shared_from_this();
  const auto slot = connection.slot_;  // the connection may be given up already when async_request() returns
  connection_ = std::move(connection);
  slot->client->async_request(
      std::span(std::as_const(bytes_)).subspan(extension_size_), options_,
      asio::bind_cancellation_slot(signal_.slot(),
                                   asio::bind_executor(asio::system_executor(), [self](error_code code, Reply reply) {
                                     self->step([&] { self->answered(code, std::move(reply)); });
                                   })));
}

void PoolRequest::answered(error_code code, Reply reply) {
  constexpr int most_not_taken = 3;
  if (code == Errc::closed) {
    // Not taken, so not sent. What it was asked of is no use to anybody.
    connection_.slot_->ended.store(true, std::memory_order_release);
    connection_ = {};
    if (!cancelled_ && ++not_taken_ <= most_not_taken) return try_pool();
    return acquired(code, {});
  }
  connection_ = {};
  note(true, code);
  finish(code, std::move(reply), false);
}

void PoolRequest::finish(error_code code, Reply reply, bool initiating) {
  ReplyHandler handler(std::move(handler_));
  auto work = std::exchange(work_, {});
  const bool ended = home_has_ended();
  if (ended) work = tracked_executor(handler, asio::system_executor());
  if (!initiating) return complete(work, std::move(handler), code, std::move(reply));
  if (ended) {
    complete_later(asio::system_executor(), std::move(work), std::move(handler), code, std::move(reply));
  } else {
    complete_later(home()->executor(), std::move(work), std::move(handler), code, std::move(reply));
  }
}

namespace {

/// Of one pool.
class OnePoolRequest final : public PoolRequest {
 public:
  OnePoolRequest(std::shared_ptr<Pool> of, BytesView payload, const RequestOptions& options)
      : PoolRequest(payload, options), shard_(of->shard()), pool_(std::move(of)) {}

 private:
  std::shared_ptr<Pool> next(bool& patient) override {
    patient = true;
    return asked_ ? nullptr : (asked_ = true, pool_);
  }
  [[nodiscard]] error_code nobody() const noexcept override { return Errc::closed; }
  void note(bool, error_code) noexcept override {}
  [[nodiscard]] const std::shared_ptr<Shard>& home() const noexcept override { return shard_; }
  [[nodiscard]] bool home_has_ended() const noexcept override { return pool_->has_ended(); }

  const std::shared_ptr<Shard> shard_;
  const std::shared_ptr<Pool> pool_;
  bool asked_ = false;
};

}  // namespace

void PoolRequestDeleter::operator()(PoolRequest* request) const noexcept {
  delete request;
}

PoolRequestPtr make_request(const std::shared_ptr<Pool>& pool, BytesView payload, const RequestOptions& options) {
  return PoolRequestPtr(new OnePoolRequest(pool, payload, options));
}

void start_request(PoolRequestPtr request, ReplyHandler handler) {
  const std::shared_ptr<PoolRequest> shared(std::move(request));
  shared->start(std::move(handler));
}

PooledConnection try_acquire(Pool& pool) noexcept {
  return pool.try_acquire(Borrower::user);
}

asio::any_io_executor executor_of(const Pool& pool) noexcept {
  return pool.shard()->executor();
}

void start_acquire(const std::shared_ptr<Pool>& pool, AcquireHandler handler) {
  pool->acquire(std::move(handler), Borrower::user, true);
}

}  // namespace msgtrans::detail

namespace msgtrans {

PooledConnection::~PooledConnection() {
  if (!slot_) return;
  const auto pool = slot_->pool;
  pool->give_back(std::move(slot_));
}

void PooledConnection::discard() noexcept {
  if (!slot_) return;
  slot_->discarded = true;
  *this = {};
}

ConnectionPool::ConnectionPool(ConnectionPoolOptions options) {
  if (Error error = detail::validate(options)) throw Exception(error);
  pool_ = std::make_shared<detail::Pool>(std::move(options));
  pool_->start();
}

ConnectionPool::~ConnectionPool() {
  pool_->destroy();
}

PooledConnection ConnectionPool::acquire() {
  Error error;
  auto connection = acquire(error);
  if (error) throw Exception(error);
  return connection;
}

PooledConnection ConnectionPool::acquire(Error& error) {
  error = {};
  if (detail::Shard::must_not_block()) {
    error = Error(Errc::blocking_on_shard, "acquire() would block a thread that runs handlers; use async_acquire");
    return {};
  }
  if (auto found = pool_->try_acquire(detail::Borrower::user)) return found;
  detail::Meeting<error_code, PooledConnection> meeting;
  pool_->acquire(meeting.handler(), detail::Borrower::user, true);
  auto [code, connection] = meeting.wait();
  if (!code) return std::move(connection);
  error = Error(code);
  if (code == boost::asio::error::timed_out) {
    error.text = "no connection to " + url() + " was free within " +
                 std::to_string(pool_->options().acquire_timeout.count()) + " ms";
    if (const auto failure = pool_->last_failure()) error.text += "; connecting failed: " + failure.message();
  }
  return {};
}

Reply ConnectionPool::request(BytesView payload, const RequestOptions& options) {
  Error error;
  Reply reply = request(payload, options, error);
  if (error) throw Exception(error);
  return reply;
}

Reply ConnectionPool::request(BytesView payload, const RequestOptions& options, Error& error) {
  return detail::wait_for_reply(
      [&](detail::ReplyHandler handler) {
        detail::start_request(detail::make_request(pool_, payload, options), std::move(handler));
      },
      "request() would block a thread that runs handlers; use async_request", error);
}

void ConnectionPool::resize(std::size_t min_connections, std::size_t max_connections) {
  pool_->resize(min_connections, max_connections);
}
void ConnectionPool::close() {
  pool_->close();
}
PoolStats ConnectionPool::stats() const {
  return pool_->stats();
}
Subscription<Event> ConnectionPool::subscribe() {
  const auto loop = pool_->loop();
  if (!loop) throw Exception(Error(Errc::closed, "the context of the pool's executor has gone"));
  return loop->subscribe();
}
const std::string& ConnectionPool::url() const noexcept {
  return pool_->options().url;
}

}  // namespace msgtrans
