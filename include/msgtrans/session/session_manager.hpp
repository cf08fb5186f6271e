// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <msgtrans/session/session.hpp>
#include <optional>
#include <vector>

namespace msgtrans {

namespace detail {
class ControlLoop;
class SessionRegistry;
}  // namespace detail

/// Counters of the control path since it began, and what is in it now.
struct ControlStats {
  std::uint64_t commands = 0;        ///< carried out
  std::size_t waiting = 0;           ///< sent and not yet carried out
  std::uint64_t refused = 0;         ///< sent after the end
  std::uint64_t reordered = 0;       ///< came before an earlier one about the same session, and were put in order
  std::uint64_t failed = 0;          ///< could not be carried out for want of memory
  std::uint64_t events = 0;          ///< told to the subscribers
  std::uint64_t events_dropped = 0;  ///< not told: the broadcaster's queue was full, or there was no memory
  std::uint64_t events_missed = 0;   ///< events that subscribers were told they have missed, in all
  std::uint64_t event_lag = 0;       ///< events that the subscriber furthest behind has still to get, now
  std::size_t subscribers = 0;
};

/// Who is connected to a server. A session is there from before `on_connect` until before `on_disconnect`; coming and
/// going are also told to the control loop, which announces them in the order in which they happened.
///
/// Any thread may make any call. It may outlive the server.
class SessionManager {
 public:
  /// The session with that id, unless it has ended. O(1).
  [[nodiscard]] std::optional<Session> get(SessionId id) const;
  [[nodiscard]] bool contains(SessionId id) const { return get(id).has_value(); }
  [[nodiscard]] std::size_t size() const noexcept;
  /// Calls `f` for each session that is there the whole time of the call; those that come or go meanwhile may be
  /// missed. `f` runs without any lock held and may call anything. O(n).
  void for_each(const std::function<void(Session&)>& f) const;
  [[nodiscard]] std::vector<SessionId> ids() const;

  /// Asks the control loop to close the sessions that had no packet either way for at least `idle_for`: to make room,
  /// say. They end with `idle_timeout`, and are counted as `ServerStats::sessions_swept`. Returns at once; false if the
  /// server has stopped.
  bool sweep(std::chrono::milliseconds idle_for) const;
  /// Of the control path, through which sessions are announced as they come and go.
  [[nodiscard]] ControlStats stats() const noexcept;

  SessionManager(std::shared_ptr<detail::SessionRegistry> registry,
                 std::shared_ptr<detail::ControlLoop> control) noexcept
      : registry_(std::move(registry)), control_(std::move(control)) {}

 private:
  std::shared_ptr<detail::SessionRegistry> registry_;
  std::shared_ptr<detail::ControlLoop> control_;
};

}  // namespace msgtrans
