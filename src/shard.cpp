// SPDX-License-Identifier: Apache-2.0
#include "shard.hpp"

#include "complete.hpp"
#include "control_loop.hpp"
#include "handshake.hpp"
#include "link.hpp"
#include "session_state.hpp"

#include <boost/asio/execution/context_as.hpp>
#include <boost/asio/execution/outstanding_work.hpp>
#include <boost/asio/execution_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/prefer.hpp>
#include <boost/asio/query.hpp>
#include <boost/asio/system_executor.hpp>
#include <msgtrans/detail/insist.hpp>
#include <msgtrans/lockfree/epoch.hpp>
#include <new>
#include <pthread.h>

namespace msgtrans::detail {

namespace {

constexpr std::size_t read_size = 256 * 1024;

}  // namespace

/// Shut down before Asio's own services, on which it was built.
class Shard::ContextService final : public asio::execution_context::service {
 public:
  using key_type = ContextService;
  static asio::execution_context::id id;

  explicit ContextService(asio::execution_context& context) : service(context) {}

  [[nodiscard]] const std::shared_ptr<Neighbours>& neighbours() const noexcept { return neighbours_; }

  void shutdown() override {
    std::vector<std::shared_ptr<Shard>> left;
    {
      const std::lock_guard lock(neighbours_->mutex);
      for (Shard* const shard : neighbours_->shards) {
        if (auto alive = shard->weak_from_this().lock()) left.push_back(std::move(alive));
      }
    }
    for (const auto& shard : left) shard->abandon();
  }

 private:
  const std::shared_ptr<Neighbours> neighbours_ = std::make_shared<Neighbours>();
};

asio::execution_context::id Shard::ContextService::id;

constinit thread_local Shard* Shard::current_ = nullptr;

Shard::Shard()
    : own_context_(std::make_shared<Context>()),
      executor_(own_context_->get_executor()),
      work_(asio::prefer(executor_, asio::execution::outstanding_work.tracked)),
      requests_(Clock::now()),
      timers_(Clock::now()),
      timer_(executor_),
      now_(Clock::now()) {}

Shard::Shard(asio::any_io_executor executor)
    : executor_(std::move(executor)),
      requests_(Clock::now()),
      timers_(Clock::now()),
      timer_(executor_),
      now_(Clock::now()) {
  auto& context = asio::query(executor_, asio::execution::context_as<asio::execution_context&>);
  neighbours_ = asio::use_service<ContextService>(context).neighbours();
  const std::lock_guard lock(neighbours_->mutex);
  neighbours_->shards.push_back(this);
}

Shard::~Shard() {
  leave_neighbours();
  // Left joinable only when a facade was destroyed inside a handler: nobody can wait for the thread then.
  if (thread_.joinable()) thread_.detach();
}

std::span<std::byte> Shard::read_buffer() {
  static thread_local std::vector<std::byte> buffer(read_size);
  return buffer;
}

bool Shard::post(std::unique_ptr<Command>&& command) noexcept {
  const Waker waker(*this);
  switch (inbox_.push(command.get())) {
    case lockfree::Pushed::closed: return false;
    case lockfree::Pushed::behind: command.release(); return true;
    case lockfree::Pushed::first: break;
  }
  command.release();
  // On the shard itself the outermost scope's end looks into the inbox anyway.
  if (current_ == this) return true;
  wake();
  return true;
}

bool Shard::post(ReadyState& ready) noexcept {
  const Waker waker(*this);
  switch (ready_.push(&ready)) {
    case lockfree::Pushed::closed: return false;
    case lockfree::Pushed::behind: return true;
    case lockfree::Pushed::first: break;
  }
  if (current_ != this) wake();
  return true;
}

void Shard::start(std::function<void(std::exception_ptr)> on_exception, std::shared_ptr<void> keep_alive,
                  std::function<void()> on_abandoned) {
  on_exception_ = std::move(on_exception);
  on_abandoned_ = std::move(on_abandoned);
  if (!own_context_) return;
  thread_ = std::thread([self = shared_from_this(), keep_alive = std::move(keep_alive)]() mutable {
#ifdef __linux__
    ::pthread_setname_np(::pthread_self(), "msgtrans");
#endif
    ++detail::must_not_block;  // for good
    for (;;) {
      try {
        self->own_context_->run();
        break;
      } catch (...) {
        if (self->on_exception_) self->on_exception_(std::current_exception());
      }
    }
    // Whoever got a command in before the inbox was closed may still be about to wake us.
    for (unsigned left; (left = self->wakers_.load()) != 0;) self->wakers_.wait(left);
    self->own_context_->shutdown();
    self->on_exception_ = nullptr;
    keep_alive.reset();
  });
}

void Shard::finish(std::function<void()> done) {
  if (abandoned_) return done();
  done_ = std::move(done);
  auto last = [self = shared_from_this()] {
    {
      Scope scope(*self);
      self->end_handshakes(Error(Errc::stopping));
      self->close_inbox();
    }
    self->release_context();
    // Behind the completions that closing the inbox may have caused.
    asio::post(self->executor_, [self] {
      self->work_ = {};
      if (self->own_context_) self->own_context_->stop();
      self->leave_neighbours();
      self->on_abandoned_ = nullptr;
      std::exchange(self->done_, nullptr)();
    });
  };
  if (own_context_ && !thread_.joinable()) {
    last();  // never started, so nobody else runs it
    own_context_->poll();
  } else {
    asio::post(executor_, std::move(last));
  }
}

void Shard::release_context() noexcept {
  next_turn_.clear();  // sessions hold the shard
  timer_.reset();
  alarm_.reset();
  poller_->stop();
}

void Shard::leave_neighbours() noexcept {
  if (!neighbours_) return;
  const std::lock_guard lock(neighbours_->mutex);
  std::erase(neighbours_->shards, this);
}

/// What is left is ended as a stop would, except that completions are destroyed by the context instead of run. Whoever
/// keeps a session finds it closed.
void Shard::abandon() noexcept {
  {
    Scope scope(*this);
    if (on_abandoned_) std::exchange(on_abandoned_, nullptr)();
    close_inbox();
    end_handshakes(Error(Errc::closed_by_user));
    for (const auto& session : sessions()) session->abort(Error(Errc::closed_by_user));
    abandoned_ = true;
  }
  while (has_work()) Scope scope(*this);
  release_context();
  executor_ = asio::system_executor();
  leave_neighbours();
  if (done_) std::exchange(done_, nullptr)();
}

void Shard::join() {
  if (!thread_.joinable()) {
    if (own_context_) own_context_->shutdown();
  } else if (must_not_block()) {
    return;
  } else {
    thread_.join();
  }
}

void Shard::touch(SessionState& session) noexcept {
  if (session.touched || session.finished()) return;
  insist([&] { touched_.emplace_back(&session); });
  session.touched = true;
}

void Shard::touch_later(SessionState& session) noexcept {
  if (session.touched || session.finished()) return;
  insist([&] { touched_later_.emplace_back(&session); });
  session.touched = true;
}

void Shard::touch_next_turn(SessionState& session) noexcept {
  if (session.next_turn || session.finished() || abandoned_) return;
  insist([&] { next_turn_.emplace_back(&session); });
  session.next_turn = true;
  if (next_turn_posted_) return;
  try {
    insist([this] { asio::post(executor_, [self = shared_from_this()] { self->begin_next_turn(); }); });
    next_turn_posted_ = true;
  } catch (const std::exception&) {
    // An executor that takes nothing any more.
  }
}

void Shard::begin_next_turn() noexcept {
  Scope scope(*this);
  next_turn_posted_ = false;
  for (const auto& session : std::exchange(next_turn_, {})) {
    session->next_turn = false;
    session->begin_turn();
    touch(*session);
  }
}

void Shard::run_at(TimePoint when, std::function<void()> f) {
  alarm_.emplace(executor_, when);
  alarm_->async_wait([self = shared_from_this(), f = std::move(f)](const error_code& error) {
    if (error) return;
    Scope scope(*self);
    f();
  });
}

void Shard::add(SessionState& session) {
  if (is_idle()) poller_->resume(executor_);
  intrusive_ptr_add_ref(&session);
  sessions_.push_back(session);
}

void Shard::remove(SessionState& session) noexcept {
  if (!session.is_linked()) return;
  sessions_.erase(sessions_.iterator_to(session));
  intrusive_ptr_release(&session);
  has_ended_some_ = true;
  if (is_idle()) poller_->pause();
  if (sessions_.empty() && on_empty) std::exchange(on_empty, nullptr)();
}

void Shard::add(std::shared_ptr<Handshake> handshake) {
  const bool first = is_idle();
  const auto* const key = handshake.get();
  handshakes_.emplace(key, std::move(handshake));
  if (!first) return;
  try {
    poller_->resume(executor_);
  } catch (...) {
    handshakes_.erase(key);
    throw;
  }
}

void Shard::remove(const Handshake& handshake) noexcept {
  if (handshakes_.erase(&handshake) != 0 && is_idle()) poller_->pause();
}

void Shard::end_handshakes(const Error& why) noexcept {
  while (!handshakes_.empty()) {
    const auto one = handshakes_.begin()->second;
    one->end(why);
    remove(*one);
  }
}

std::vector<SessionPtr> Shard::sessions() const {
  std::vector<SessionPtr> all;
  for (const ShardMember& member : sessions_) {
    all.emplace_back(const_cast<SessionState*>(static_cast<const SessionState*>(&member)));
  }
  return all;
}

void Shard::look_for_room() noexcept {
  for (ShardMember& member : sessions_) {
    auto& session = static_cast<SessionState&>(member);
    if (session.wants_room()) touch(session);
  }
}

void Shard::settle_all() noexcept {
  // Who floods the inbox must not keep Asio's other handlers from their turn.
  constexpr std::chrono::milliseconds longest_turn{1};
  do {
    run_commands();
    deliver_ready();
    // By index: settling touches others.
    for (std::size_t i = 0; i < touched_.size(); ++i) {
      const SessionPtr session = std::move(touched_[i]);
      session->touched = false;
      session->settle();
    }
    touched_.clear();
    touched_.swap(touched_later_);
    run_completions();
  } while (has_work() && Clock::now() - now_ < longest_turn);
  if (on_idle && is_idle()) std::exchange(on_idle, nullptr)();
  if (has_work()) wake();  // the inbox's pushers rely on us
  send_control();
  // What the map of sessions keeps for readers that may still look: now, as no later turn may come for long.
  if (has_ended_some_) collect();
  arm();
}

void Shard::send_control() noexcept {
  if (!control_batch_.empty()) control_->send_all(control_batch_);
}

void Shard::collect() noexcept {
  try {
    lockfree::Epoch::collect();
    // A reader may have held it up: then the next turn tries again.
    has_ended_some_ = lockfree::Epoch::pending() != 0;
  } catch (const std::bad_alloc&) {
    // A thread's first use takes memory; the next turn tries again.
  }
}

void Shard::run_completions() noexcept {
  auto ready = std::exchange(completions_, {});
  for (const auto& completion : ready) {
    try {
      completion->run();
    } catch (...) {
      if (on_exception_) on_exception_(std::current_exception());
    }
  }
}

void Shard::wake() noexcept {
  if (abandoned_) return;
  try {
    // Without it the shard would be deaf: whoever finds the inbox not empty relies on this.
    insist([this] { asio::post(executor_, [self = shared_from_this()] { Scope scope(*self); }); });
  } catch (const std::exception&) {
    // An executor that takes nothing any more.
  }
}

void Shard::run_commands() noexcept {
  // Senders can be faster than this: then all that is there would be more each time, and Asio's own handlers, a stop's
  // deadline among them, would wait longer each time.
  constexpr std::size_t most_a_round = 256;
  if (backlog_ == nullptr) backlog_ = inbox_.take_all();
  run_backlog(most_a_round);
}

void Shard::run_backlog(std::size_t most) noexcept {
  running_commands_ = true;
  for (; backlog_ != nullptr && most != 0; --most) {
    Command* const command = std::exchange(backlog_, backlog_->next);
    command->run(std::unique_ptr<Command>(command));
  }
  running_commands_ = false;
}

void Shard::deliver_ready() noexcept {
  for (ReadyState* next = ready_.take_all(); next != nullptr;) std::exchange(next, next->next)->deliver();
}

void Shard::close_inbox() noexcept {
  constexpr auto all = ~std::size_t{0};
  run_backlog(all);
  backlog_ = inbox_.close();
  run_backlog(all);
  for (ReadyState* next = ready_.close(); next != nullptr;) std::exchange(next, next->next)->discard();
  // Whoever got something in before may still be about to wake us, and the context must not go meanwhile.
  for (unsigned left; (left = wakers_.load()) != 0;) wakers_.wait(left);
}

void Shard::arm() noexcept {
  if (!timer_) return;
  if (is_idle() && requests_.size() == 0 && armed_for_ != TimePoint::max()) {
    timer_->cancel();  // lest it keep the user's context running for nothing
    armed_for_ = TimePoint::max();
  }
  TimePoint next = armed_for_;
  if (const auto at = timers_.next_deadline()) next = std::min(next, *at);
  if (const auto at = requests_.next_deadline()) next = std::min(next, *at);
  if (next >= armed_for_) return;
  try {
    timer_->expires_at(next);
    timer_->async_wait([self = shared_from_this()](const error_code& error) {
      if (!error) self->tick();
    });
    armed_for_ = next;
  } catch (const std::exception&) {
    armed_for_ = TimePoint::max();  // out of memory: the next event tries again
  }
}

void Shard::tick() {
  Scope scope(*this);
  armed_for_ = TimePoint::max();
  requests_.expire(now_, [this](SessionId, std::uint32_t, PendingRequest&& pending) {
    counters_.requests.timed_out.add(1);
    if (pending.counters != nullptr) pending.counters->timed_out.add(1);
    later(std::move(pending.work), std::move(pending.handler), make_error_code(Errc::request_timeout), Reply{});
  });
  timers_.advance(now_, [](protocol::TimerWheel::Timer& timer) { static_cast<ShardTimer&>(timer).expired(); });
}

}  // namespace msgtrans::detail
