// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <any>
#include <boost/asio/awaitable.hpp>
#include <cstdint>
#include <functional>
#include <memory>
#include <msgtrans/message.hpp>
#include <msgtrans/session/session.hpp>
#include <string>
#include <utility>

namespace msgtrans {

/// What `on_connect` says of a newcomer.
struct Admission {
  bool accepted = true;
  /// Why not: `on_error` is told, and over WebSocket the peer, in its Close frame, as much as fits there (123 bytes).
  std::string reason = {};
  /// Becomes `Session::user_data` of an accepted session, if it holds something.
  std::any user_data = {};

  static Admission accept(std::any user_data = {}) { return {true, {}, std::move(user_data)}; }
  static Admission refuse(std::string why = {}) { return {false, std::move(why), {}}; }
};

namespace detail {
class PendingAdmission;
}

/// The decision that an asynchronous `on_connect` owes. Destroyed without one, it refuses. Move-only; each object is
/// used by one thread at a time, any thread.
class AdmissionPromise {
 public:
  explicit AdmissionPromise(std::shared_ptr<detail::PendingAdmission> pending) noexcept
      : pending_(std::move(pending)) {}
  AdmissionPromise(AdmissionPromise&&) noexcept = default;
  AdmissionPromise& operator=(AdmissionPromise&& other) noexcept;
  ~AdmissionPromise();

  /// Once; again, or if the newcomer has left or its time is over, it has no effect. Never blocks.
  void decide(Admission admission) noexcept;
  /// False once it was decided, the newcomer has left, its time is over or the server stops: then nobody waits for it.
  [[nodiscard]] bool is_awaited() const noexcept;

 private:
  std::shared_ptr<detail::PendingAdmission> pending_;
};

/// Connections that were refused, by reason; together they are `ServerStats::sessions_refused`.
struct RefusalCounts {
  std::uint64_t sessions = 0;      ///< `max_sessions` were there
  std::uint64_t address = 0;       ///< `max_sessions_per_address` of its address were there
  std::uint64_t rate = 0;          ///< over `accept_rate`
  std::uint64_t address_rate = 0;  ///< over `accept_rate_per_address`
  std::uint64_t on_connect = 0;    ///< `on_connect` refused it, threw, or dropped its promise
  std::uint64_t timeout = 0;       ///< `on_connect` had not decided within `admission_timeout`
};

namespace detail {

using AdmissionCoroutine = std::function<asio::awaitable<Admission>(Session&, OwnedMessage&)>;
using AdmissionCallback = std::function<void(Session&, OwnedMessage&, AdmissionPromise)>;

}  // namespace detail

}  // namespace msgtrans
