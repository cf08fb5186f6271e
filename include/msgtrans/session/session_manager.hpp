// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <msgtrans/session/session.hpp>
#include <optional>
#include <vector>

namespace msgtrans {

namespace detail {
class SessionRegistry;
}

/// Who is connected to a server. Any thread may make any call.
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

  explicit SessionManager(std::shared_ptr<detail::SessionRegistry> registry) noexcept
      : registry_(std::move(registry)) {}

 private:
  std::shared_ptr<detail::SessionRegistry> registry_;
};

}  // namespace msgtrans
