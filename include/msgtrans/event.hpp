// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <msgtrans/error.hpp>
#include <msgtrans/session_id.hpp>
#include <string>

namespace msgtrans {

/// What there is news about. Messages are no news: they go through their sessions' queues, where none is lost.
enum class EventKind : std::uint8_t {
  session_connected,     ///< a session was accepted
  session_disconnected,  ///< it has ended; `error` is the reason, as `on_disconnect` gets it
  protocol_error,        ///< it ends because its peer broke the protocol; `error` names the field and the value
  slow_consumer,    ///< its outbound queue was found full, for the first time since it was last down to its low mark
  actor_failed,     ///< an exception left an actor, which is started again; `error` has its text
  actor_stopped,    ///< an exception left an actor, which is not started again; `error` has its text
  pool_grown,       ///< a pool's limits were raised, or a connection was made
  pool_shrunk,      ///< a pool's limits were lowered, or a connection was given up; `error` says why
  endpoint_down,    ///< a health check took an endpoint out; `error` is the last probe's
  endpoint_up,      ///< a health check put an endpoint back
  session_refused,  ///< a connection was refused, by a limit or by `on_connect`; `error` says why
};

[[nodiscard]] constexpr const char* to_string(EventKind kind) noexcept {
  switch (kind) {
    case EventKind::session_connected: return "session_connected";
    case EventKind::session_disconnected: return "session_disconnected";
    case EventKind::protocol_error: return "protocol_error";
    case EventKind::slow_consumer: return "slow_consumer";
    case EventKind::actor_failed: return "actor_failed";
    case EventKind::actor_stopped: return "actor_stopped";
    case EventKind::pool_grown: return "pool_grown";
    case EventKind::pool_shrunk: return "pool_shrunk";
    case EventKind::endpoint_down: return "endpoint_down";
    case EventKind::endpoint_up: return "endpoint_up";
    case EventKind::session_refused: return "session_refused";
  }
  return "?";
}

/// One piece of news. Subscribers get copies, all in the same order; what concerns one session is in the order in which
/// it happened.
struct Event {
  EventKind kind = EventKind::session_connected;
  /// Whom it concerns; 0 if no session and no actor.
  SessionId session = {};
  /// What is known beside it: the peer of a session, the URL of a pool's or a health check's endpoint.
  std::string subject = {};
  /// Why, where there is a reason.
  Error error = {};
};

}  // namespace msgtrans
