// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <msgtrans/bytes_view.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/send.hpp>
#include <msgtrans/session_id.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace msgtrans {

namespace detail {
class SessionRegistry;
}

/// The groups of a server's sessions, by name: rooms, channels, topics. A group comes into being with its first member
/// and is gone with its last. A session is a member from `join` to `leave`, or to its own end: at the point where it
/// leaves the `SessionManager`, before `on_disconnect`, it has left all its groups, and it cannot join again.
///
/// Any thread may make any call, also inside handlers; none waits for anything but a short lock that no handler, send
/// or compression runs under. A handle is cheap to copy and may outlive the server. Calls may throw std::bad_alloc,
/// and then have changed nothing.
class Groups {
 public:
  /// From now on the session gets what is sent to the group. Also allowed in an `on_connect` that decides at once; who
  /// is refused there is no member any more. One that decides later: `not_found` until the session is accepted.
  /// \returns false if it was a member already. O(log groups), amortised, whatever the group's size.
  /// \throws Exception: `not_found` (no session of this server has that id, or it has ended), `closed` (it is ending),
  /// `too_many_groups` (`ServerOptions::max_groups_per_session`), or `invalid_option` (the name is empty or longer than
  /// `ServerOptions::max_group_name`).
  bool join(std::string_view name, SessionId session) const;
  /// The same without exceptions: false with an error if it could not join, without one if it was a member already.
  bool join(std::string_view name, SessionId session, Error& error) const;

  /// What is sent to the group after this has returned does not reach the session. A send that another thread has
  /// begun may still, and so does what was queued. \returns false if it was no member. O(log groups + the groups that
  /// session is in).
  bool leave(std::string_view name, SessionId session) const noexcept;
  /// \returns how many groups it was in.
  std::size_t leave_all(SessionId session) const noexcept;

  /// Sends a one-way message to each session that is a member now, but not to `except`. Encoded once, and compressed
  /// once for all members whose options, or the override, name the same codec and level, on the calling thread. Never
  /// blocks, O(members). Each member's budget and `SlowConsumer` count as with `Session::send`; the order is as there:
  /// messages of one thread, to a group or to its members, reach each member in the order sent.
  /// \returns what became of it, which adds up to the members visited: all zero for a group that has none.
  BroadcastResult send(std::string_view name, BytesView payload, const SendOptions& options = {},
                       SessionId except = {}) const;

  /// How many members it has; those count that are ending and have not ended. O(log groups).
  [[nodiscard]] std::size_t size(std::string_view name) const noexcept;
  [[nodiscard]] bool contains(std::string_view name, SessionId session) const noexcept;
  /// In no particular order. O(members).
  [[nodiscard]] std::vector<SessionId> members(std::string_view name) const;
  /// In no particular order.
  [[nodiscard]] std::vector<std::string> groups_of(SessionId session) const;
  /// How many groups there are, each with at least one member. O(1).
  [[nodiscard]] std::size_t count() const noexcept;

  explicit Groups(std::shared_ptr<detail::SessionRegistry> registry) noexcept : registry_(std::move(registry)) {}

 private:
  std::shared_ptr<detail::SessionRegistry> registry_;
};

}  // namespace msgtrans
