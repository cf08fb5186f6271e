// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "session_state.hpp"
#include "shard.hpp"

#include <atomic>
#include <boost/asio/cancellation_signal.hpp>
#include <chrono>
#include <memory>
#include <msgtrans/admission.hpp>

namespace msgtrans::detail {

class Server;

/// A session that `on_connect` has not decided on. On its shard, unless marked.
class PendingAdmission final : public std::enable_shared_from_this<PendingAdmission> {
 public:
  PendingAdmission(std::shared_ptr<Server> server, SessionPtr session, bool wants_first);
  ~PendingAdmission();
  PendingAdmission(const PendingAdmission&) = delete;
  PendingAdmission& operator=(const PendingAdmission&) = delete;

  /// `timeout` zero: none.
  void start(std::chrono::milliseconds timeout);
  /// The session's first message, if that is wanted.
  void first(OwnedMessage message) noexcept { ask(std::move(message)); }
  [[nodiscard]] bool wants_first() const noexcept { return wants_first_; }
  /// The session ends, or its peer will send no more; again has no effect.
  void gone(const Error& reason) noexcept;

  /// The same without a word.
  void give_up() noexcept;

  /// Any thread; the first one counts.
  void decide(Admission admission) noexcept;
  [[nodiscard]] bool is_awaited() const noexcept { return !decided_.load(std::memory_order_acquire); }

  /// Runs `on_connect`'s coroutine, which decides.
  void run(const std::shared_ptr<const AdmissionCoroutine>& coroutine, OwnedMessage first);

 private:
  struct Timer final : ShardTimer {
    explicit Timer(PendingAdmission& owner) noexcept : pending(owner) {}
    void expired() override { pending.expired(); }
    PendingAdmission& pending;
  };

  void ask(OwnedMessage first) noexcept;
  void expired() noexcept;
  void carry_out() noexcept;
  void cancel() noexcept;
  /// Nothing refers to the session any more; it is returned.
  SessionPtr release() noexcept;

  const std::shared_ptr<Shard> shard_;
  std::shared_ptr<Server> server_;  // both null once it is over
  SessionPtr session_;
  const bool wants_first_;
  bool runs_ = false;  // the coroutine
  Timer timer_;
  std::chrono::milliseconds timeout_{0};
  asio::cancellation_signal cancel_;
  std::atomic<bool> decided_{false};
  Admission decision_;  // once decided
};

}  // namespace msgtrans::detail
