// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "group_registry.hpp"
#include "session_state.hpp"

#include <array>
#include <atomic>
#include <boost/asio/ip/address.hpp>
#include <boost/unordered/unordered_flat_map.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <msgtrans/protocol/token_bucket.hpp>
#include <mutex>
#include <vector>

namespace msgtrans::detail {

/// Who counts as one: an address, of IPv6 the network of it (/64). What is mapped into IPv6 is IPv4.
using AddressKey = std::array<unsigned char, 16>;
[[nodiscard]] AddressKey key_of(const asio::ip::address& address) noexcept;

/// A token bucket for each address that came lately, in memory that is bounded whoever comes. Not thread-safe.
///
/// There are two generations. Who comes is put into the young one, with what he had in the old. When the time has
/// passed in which an empty bucket becomes full, the old ones are full, and forgotten, and the young ones are the old
/// ones from now on. When the young ones are too many, the same is done too early.
class AddressRates {
 public:
  static constexpr std::size_t most = 65'536;

  AddressRates(std::uint64_t per_second, std::uint64_t burst, TimePoint now) noexcept;

  [[nodiscard]] bool try_take(const AddressKey& address, TimePoint now);
  [[nodiscard]] std::size_t size() const noexcept { return young_.size() + old_.size(); }

 private:
  void grow_old(TimePoint now) noexcept;

  std::uint64_t per_second_;
  std::uint64_t burst_;
  protocol::Duration generation_;
  TimePoint began_;
  boost::unordered_flat_map<AddressKey, protocol::TokenBucket> young_, old_;
};

/// The sessions of a server by id, the limits on their number, and the groups that they are in. Any thread.
class SessionRegistry {
 public:
  struct Limits {
    std::size_t sessions = 1;
    std::size_t sessions_per_address = 0;
    std::uint64_t rate = 0;  // 0: none
    std::uint64_t burst = 0;
    std::uint64_t rate_per_address = 0;  // 0: none
    std::uint64_t burst_per_address = 0;
  };
  enum class Refusal : std::uint8_t { none, sessions, address, rate, address_rate };

  SessionRegistry(const Limits& limits, TimePoint now, GroupLimits groups = {});

  /// Takes a place for a newcomer, unless a limit forbids it. \throws std::bad_alloc; then nothing has changed.
  [[nodiscard]] Refusal admit(const Peer& peer, TimePoint now);
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
  const Limits limits_;
  std::atomic<std::size_t> places_taken_{0};
  lockfree::LockFreeHashMap<SessionId, SessionPtr> sessions_;
  std::mutex limits_mutex_;
  protocol::TokenBucket rate_;
  AddressRates address_rates_;
  boost::unordered_flat_map<AddressKey, std::size_t> addresses_;  // empty unless there is a limit
  GroupRegistry groups_;
};

}  // namespace msgtrans::detail
