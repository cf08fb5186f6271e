// SPDX-License-Identifier: Apache-2.0
#include "admission.hpp"

#include "server.hpp"

#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/post.hpp>
#include <exception>
#include <msgtrans/detail/insist.hpp>
#include <string>
#include <utility>

namespace msgtrans {

AdmissionPromise& AdmissionPromise::operator=(AdmissionPromise&& other) noexcept {
  AdmissionPromise(std::move(other)).pending_.swap(pending_);
  return *this;
}

AdmissionPromise::~AdmissionPromise() {
  if (pending_ && pending_->is_awaited()) pending_->decide(Admission::refuse("on_connect has not decided"));
}

void AdmissionPromise::decide(Admission admission) noexcept {
  if (pending_) pending_->decide(std::move(admission));
}

bool AdmissionPromise::is_awaited() const noexcept {
  return pending_ && pending_->is_awaited();
}

namespace detail {

namespace {

/// What `on_connect` refers to lives as long as this.
asio::awaitable<Admission> call(std::shared_ptr<const AdmissionCoroutine> coroutine, Session session,
                                OwnedMessage first) {
  co_return co_await (*coroutine)(session, first);
}

}  // namespace

PendingAdmission::PendingAdmission(std::shared_ptr<Server> server, SessionPtr session, bool wants_first)
    : shard_(session->shard().shared_from_this()),
      server_(std::move(server)),
      session_(std::move(session)),
      wants_first_(wants_first),
      timer_(*this) {}

PendingAdmission::~PendingAdmission() = default;

void PendingAdmission::start(std::chrono::milliseconds timeout) {
  timeout_ = timeout;
  if (timeout.count() != 0) shard_->timers().arm(timer_, shard_->now() + std::min(timeout, longest_duration));
  if (!wants_first_) ask({});
}

void PendingAdmission::ask(OwnedMessage first) noexcept {
  if (!session_) return;
  const auto keep = shared_from_this();
  const SessionPtr session = session_;
  server_->ask_on_connect(*session, std::move(first), keep);
}

void PendingAdmission::run(const std::shared_ptr<const AdmissionCoroutine>& coroutine, OwnedMessage first) {
  auto done = [self = shared_from_this()](const std::exception_ptr& exception, Admission admission) {
    self->runs_ = false;
    if (exception && self->is_awaited()) {
      const auto server = self->server_;
      const auto session = self->session_;
      if (server && session) server->on_connect_threw(*session, exception);
      admission = Admission::refuse();
    }
    self->decide(std::move(admission));
  };
  asio::co_spawn(server_->executor_of(*shard_), call(coroutine, Session(session_), std::move(first)),
                 asio::bind_cancellation_slot(cancel_.slot(), std::move(done)));
  runs_ = true;
}

void PendingAdmission::give_up() noexcept {
  if (!session_) return;
  decided_.store(true, std::memory_order_release);
  cancel();
  release();
}

void PendingAdmission::decide(Admission admission) noexcept {
  if (decided_.exchange(true, std::memory_order_acq_rel)) return;
  decision_ = std::move(admission);
  // Behind everything that was sent before.
  insist([&] { shard_->post([self = shared_from_this()] { self->carry_out(); }); });
}

void PendingAdmission::carry_out() noexcept {
  if (!session_) return;
  const auto server = server_;
  const auto session = release();
  server->decided(*session, std::move(decision_));
}

void PendingAdmission::expired() noexcept {
  const auto keep = shared_from_this();
  decided_.store(true, std::memory_order_release);
  cancel();
  const auto server = server_;
  const auto session = release();
  Error late(Errc::admission_timeout);
  try {
    late.text = "not admitted within " + std::to_string(timeout_.count()) + " ms";
  } catch (const std::bad_alloc&) {
    // The code says enough.
  }
  server->not_admitted(*session, late);
}

void PendingAdmission::gone(const Error& reason) noexcept {
  if (!session_) return;
  decided_.store(true, std::memory_order_release);
  cancel();
  const auto server = server_;
  const auto session = release();
  server->left_unadmitted(*session, reason);
}

void PendingAdmission::cancel() noexcept {
  if (!runs_) return;
  try {
    // Not from inside of whatever this is called by: what the coroutine waits for may be anything.
    asio::post(server_->executor_of(*shard_), [self = shared_from_this()] {
      if (self->runs_) self->cancel_.emit(asio::cancellation_type::terminal);
    });
  } catch (const std::exception&) {
    // It goes on, and its decision has no effect.
  }
}

SessionPtr PendingAdmission::release() noexcept {
  shard_->timers().disarm(timer_);
  server_ = nullptr;
  session_->end_admission();
  return std::exchange(session_, nullptr);
}

}  // namespace detail

}  // namespace msgtrans
