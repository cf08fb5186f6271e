// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "group_registry.hpp"
#include "session_state.hpp"

#include <atomic>
#include <boost/asio/ip/address.hpp>
#include <boost/unordered/unordered_flat_map.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <mutex>
#include <vector>

namespace msgtrans::detail {

/// The sessions of a server by id, the limits on their number, and the groups that they are in. Any thread.
class SessionRegistry {
 public:
  SessionRegistry(std::size_t max_sessions, std::size_t max_per_address, GroupLimits groups = {}) noexcept
      : max_sessions_(max_sessions), max_per_address_(max_per_address), groups_(*this, groups) {}

  /// Takes a place for a newcomer; false if there is none.
  [[nodiscard]] bool admit(const Peer& peer);
  /// Gives it back.
  void leave(const Peer& peer) noexcept;

  void add(const SessionPtr& session);
  /// It has left its groups when this returns, and comes into none again.
  bool remove(SessionId id) noexcept;
  [[nodiscard]] SessionPtr find(SessionId id) const;
  [[nodiscard]] std::size_t size() const noexcept { return sessions_.size(); }
  [[nodiscard]] std::vector<SessionPtr> all() const;
  [[nodiscard]] GroupRegistry& groups() noexcept { return groups_; }

 private:
  std::size_t max_sessions_;
  std::size_t max_per_address_;
  std::atomic<std::size_t> places_taken_{0};
  lockfree::LockFreeHashMap<SessionId, SessionPtr> sessions_;
  std::mutex addresses_mutex_;
  using Address = asio::ip::address_v6::bytes_type;  // of IPv4 the mapped one
  [[nodiscard]] static Address key_of(const asio::ip::address& address) noexcept;
  boost::unordered_flat_map<Address, std::size_t> addresses_;  // empty unless there is a limit
  GroupRegistry groups_;
};

}  // namespace msgtrans::detail
