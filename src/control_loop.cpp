// SPDX-License-Identifier: Apache-2.0
#include "control_loop.hpp"

#include <boost/asio/post.hpp>
#include <limits>
#include <msgtrans/detail/insist.hpp>
#include <new>
#include <pthread.h>

namespace msgtrans::detail {

namespace {

constexpr std::size_t batch_size = 256;

}  // namespace

ControlLoop::ControlLoop(asio::any_io_executor executor, Runs runs, std::size_t event_capacity,
                         std::shared_ptr<void> context)
    : context_(std::move(context)),
      executor_(std::move(executor)),
      runs_(runs),
      broadcaster_(executor_, {.input_capacity = event_capacity, .ring_capacity = event_capacity}, context_) {
  batch_.reserve(batch_size);
}

ControlLoop::~ControlLoop() {
  // Left joinable only when a facade was destroyed inside a handler: nobody can wait for the thread then.
  if (thread_.joinable()) thread_.detach();
}

void ControlLoop::start(Sweeper sweeper) {
  sweeper_ = std::move(sweeper);
  started_.store(true);
  if (runs_ == Runs::on_executor) return schedule();
  thread_ = std::thread([self = shared_from_this()] {
#ifdef __linux__
    ::pthread_setname_np(::pthread_self(), "msgtrans-ctl");
#endif
    self->run_thread();
  });
}

void ControlLoop::shut_down(std::function<void()> done) {
  done_ = std::move(done);
  channel_.close();
  if (!started_.load() || abandoned_.load()) {
    run_here();
  } else if (runs_ == Runs::on_executor) {
    schedule();
  }
}

void ControlLoop::abandon() noexcept {
  if (runs_ == Runs::on_own_thread) return;
  abandoned_.store(true);
  if (channel_.is_closed()) run_here();
}

void ControlLoop::run_here() noexcept {
  if (finished_) return;
  while (insist([&] { return channel_.try_recv_many(batch_, batch_size); }) != 0) handle_batch();
  finish();
}

void ControlLoop::join() {
  if (thread_.joinable()) thread_.join();
}

bool ControlLoop::send(ControlCommand command) noexcept {
  if (insist([&] { return channel_.try_send(std::move(command)); }) != ChannelStatus::ok) {
    refused_.fetch_add(1, std::memory_order_relaxed);
    return false;
  }
  if (runs_ == Runs::on_executor) schedule();
  return true;
}

void ControlLoop::send_all(std::vector<ControlCommand>& commands) noexcept {
  // One by one: the first wakes the loop, and while that wake is under way the others cost no call.
  for (auto& command : commands) {
    if (insist([&] { return channel_.try_send(std::move(command)); }) != ChannelStatus::ok) {
      refused_.fetch_add(1, std::memory_order_relaxed);
    }
  }
  commands.clear();
  if (runs_ == Runs::on_executor) schedule();
}

void ControlLoop::send_about(SessionState& session, decltype(ControlCommand::what) what, bool last) noexcept {
  const auto sequence = session.control().next(last);
  if (!sequence) return;
  ControlCommand command{std::move(what), SessionPtr(&session), *sequence};
  // A shard sends what its turn has made at the turn's end, with one wake.
  if (Shard::current() == &session.shard()) {
    insist([&] { session.shard().control_batch().push_back(std::move(command)); });
  } else {
    send(std::move(command));
  }
}

void ControlLoop::announce(Event event) noexcept {
  if (has_subscribers()) send({ControlCommand::Announce{std::move(event)}});
}

ControlStats ControlLoop::stats() const noexcept {
  const auto events = broadcaster_.statistics();
  ControlStats stats;
  stats.commands = handled_.load(std::memory_order_relaxed);
  stats.waiting = channel_.size();
  stats.refused = refused_.load(std::memory_order_relaxed);
  stats.reordered = reordered_.load(std::memory_order_relaxed);
  stats.failed = failed_.load(std::memory_order_relaxed);
  stats.events = events.broadcast;
  stats.events_dropped = events.dropped + events.lost;
  stats.events_missed = events.missed;
  stats.event_lag = events.lag;
  stats.subscribers = events.subscribers;
  return stats;
}

// --- the loop

void ControlLoop::run_thread() noexcept {
  while (channel_.recv_many(batch_, batch_size) != 0) handle_batch();
  finish();
}

void ControlLoop::schedule() noexcept {
  // Sequentially consistent, as the channel's own word: either the one who sends sees that it was started, or the start
  // sees what was sent; and the same between a send and the end of a run.
  if (!started_.load() || abandoned_.load() || scheduled_.exchange(true)) return;
  try {
    insist([&] { asio::post(executor_, [self = shared_from_this()] { self->run_posted(); }); });
  } catch (...) {
    // An executor that takes nothing any more. What waits is never carried out, like everything on it.
  }
}

void ControlLoop::run_posted() noexcept {
  bool closed = false;
  if (insist([&] { return channel_.try_recv_many(batch_, batch_size, &closed); }) != 0) handle_batch();
  if (closed) return finish();  // and is never scheduled again
  scheduled_.store(false);
  if (channel_.size() != 0 || channel_.is_closed()) schedule();
}

void ControlLoop::handle_batch() noexcept {
  for (auto& command : batch_) {
    if (command.session) {
      in_order(command);
    } else {
      carry_out(command);
    }
  }
  batch_.clear();
}

void ControlLoop::in_order(ControlCommand& command) noexcept {
  const SessionPtr session = command.session;
  auto& handled = session->control().handled;
  if (command.sequence != handled) {
    reordered_.fetch_add(1, std::memory_order_relaxed);
    insist([&] { early_[session->id()].try_emplace(command.sequence, std::move(command)); });
    return;
  }
  carry_out(command);
  ++handled;
  if (early_.empty()) return;
  const auto found = early_.find(session->id());
  if (found == early_.end()) return;
  auto& waiting = found->second;
  for (auto next = waiting.find(handled); next != waiting.end(); next = waiting.find(handled)) {
    carry_out(next->second);
    ++handled;
    waiting.erase(next);
  }
  if (waiting.empty()) early_.erase(found);
}

void ControlLoop::carry_out(ControlCommand& command) noexcept {
  handled_.fetch_add(1, std::memory_order_relaxed);
  try {
    if (std::holds_alternative<ControlCommand::SessionAdded>(command.what)) {
      if (!has_subscribers()) return;
      publish({EventKind::session_connected, command.session->id(), command.session->peer().to_string()});
    } else if (auto* const removed = std::get_if<ControlCommand::SessionRemoved>(&command.what)) {
      if (!has_subscribers()) return;
      publish({EventKind::session_disconnected, command.session->id(), command.session->peer().to_string(),
               std::move(removed->reason)});
    } else if (auto* const news = std::get_if<ControlCommand::Announce>(&command.what)) {
      publish(std::move(news->event));
    } else if (const auto* const sweep = std::get_if<ControlCommand::Sweep>(&command.what)) {
      if (sweeper_) sweeper_(sweep->idle_for);
    } else if (const auto* const resize = std::get_if<ControlCommand::ResizePool>(&command.what)) {
      resize->apply();
    }
  } catch (...) {
    failed_.fetch_add(1, std::memory_order_relaxed);
  }
}

void ControlLoop::publish(Event event) noexcept {
  try {
    broadcaster_.publish(std::move(event));  // which counts what it has no room for
  } catch (const std::bad_alloc&) {
    failed_.fetch_add(1, std::memory_order_relaxed);
  }
}

void ControlLoop::finish() noexcept {
  finished_ = true;
  // A session's commands are all sent before the loop is shut down, so nothing should be left here.
  for (auto& [id, commands] : early_) {
    for (auto& [sequence, command] : commands) carry_out(command);
  }
  early_.clear();
  sweeper_ = nullptr;
  auto done = std::exchange(done_, nullptr);
  insist([&] {
    broadcaster_.stop([done] {
      if (done) done();
    });
  });
}

}  // namespace msgtrans::detail
