// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "session_state.hpp"

#include <array>
#include <atomic>
#include <boost/asio/ip/address.hpp>
#include <boost/unordered/unordered_flat_map.hpp>
#include <mutex>
#include <vector>

namespace msgtrans::detail {

/// The sessions of a server by id, and the limits on their number. Any thread.
///
/// Striped locks, held for one look-up or insertion and never while anything else is called.
class SessionRegistry {
 public:
  SessionRegistry(std::size_t max_sessions, std::size_t max_per_address) noexcept
      : max_sessions_(max_sessions), max_per_address_(max_per_address) {}

  /// Takes a place for a newcomer; false if there is none.
  [[nodiscard]] bool admit(const asio::ip::address& address);
  /// Gives it back.
  void leave(const asio::ip::address& address) noexcept;

  void add(const SessionPtr& session);
  bool remove(SessionId id) noexcept;
  [[nodiscard]] SessionPtr find(SessionId id) const noexcept;
  [[nodiscard]] std::size_t size() const noexcept { return size_.load(std::memory_order_relaxed); }
  [[nodiscard]] std::vector<SessionPtr> all() const;

 private:
  struct IdHash {
    using is_avalanching = void;  // std::hash<SessionId> mixes; unordered_flat_map need not mix again
    std::size_t operator()(SessionId id) const noexcept { return std::hash<SessionId>()(id); }
  };
  struct alignas(64) Stripe {
    mutable std::mutex mutex;
    boost::unordered_flat_map<SessionId, SessionPtr, IdHash> sessions;
  };

  [[nodiscard]] Stripe& stripe(SessionId id) noexcept { return stripes_[id.value() % stripes_.size()]; }
  [[nodiscard]] const Stripe& stripe(SessionId id) const noexcept { return stripes_[id.value() % stripes_.size()]; }

  std::size_t max_sessions_;
  std::size_t max_per_address_;
  std::atomic<std::size_t> places_taken_{0};
  std::atomic<std::size_t> size_{0};
  std::array<Stripe, 16> stripes_;
  std::mutex addresses_mutex_;
  boost::unordered_flat_map<std::string, std::size_t> addresses_;  // empty unless there is a limit
};

}  // namespace msgtrans::detail
