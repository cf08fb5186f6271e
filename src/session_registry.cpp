// SPDX-License-Identifier: Apache-2.0
#include "session_registry.hpp"

#include "control_loop.hpp"

#include <algorithm>
#include <msgtrans/detail/insist.hpp>
#include <msgtrans/session/session_manager.hpp>

namespace msgtrans {

namespace detail {

AddressKey key_of(const asio::ip::address& address) noexcept {
  if (address.is_v4()) return asio::ip::make_address_v6(asio::ip::v4_mapped, address.to_v4()).to_bytes();
  auto bytes = address.to_v6().to_bytes();
  if (!address.to_v6().is_v4_mapped()) std::fill(bytes.begin() + 8, bytes.end(), static_cast<unsigned char>(0));
  return bytes;
}

AddressRates::AddressRates(std::uint64_t per_second, std::uint64_t burst, TimePoint now) noexcept
    : per_second_(per_second), burst_(burst == 0 ? per_second : burst), generation_(longest_duration), began_(now) {
  if (per_second_ == 0) return;
  const std::uint64_t seconds = burst_ / per_second_ + 1;
  generation_ = std::min<protocol::Duration>(
      longest_duration, std::chrono::seconds(static_cast<std::int64_t>(std::min<std::uint64_t>(seconds, 31'536'000))));
}

bool AddressRates::try_take(const AddressKey& address, TimePoint now) {
  if (now >= began_ + generation_ || young_.size() >= most / 2) grow_old(now);
  auto found = young_.find(address);
  if (found == young_.end()) {
    const auto before = old_.find(address);
    const protocol::TokenBucket fresh(per_second_, burst_, now);
    found = young_.emplace(address, before != old_.end() ? before->second : fresh).first;
    if (before != old_.end()) old_.erase(before);
  }
  return found->second.try_take(1, now);
}

void AddressRates::grow_old(TimePoint now) noexcept {
  // The memory too.
  boost::unordered_flat_map<AddressKey, protocol::TokenBucket>().swap(old_);
  old_.swap(young_);
  began_ = now;
}

SessionRegistry::SessionRegistry(const Limits& limits, TimePoint now, GroupLimits groups)
    : limits_(limits),
      rate_(limits.rate, limits.burst == 0 ? limits.rate : limits.burst, now),
      address_rates_(limits.rate_per_address, limits.burst_per_address, now),
      groups_(*this, groups) {}

SessionRegistry::Refusal SessionRegistry::admit(const Peer& peer, TimePoint now) {
  std::size_t taken = places_taken_.load(std::memory_order_relaxed);
  const bool has_address = peer.has_address();
  const bool by_address = has_address && (limits_.rate_per_address != 0 || limits_.sessions_per_address != 0);
  const bool locks = by_address || limits_.rate != 0;
  std::unique_lock lock(limits_mutex_, std::defer_lock);
  if (locks) {
    lock.lock();
    const AddressKey key = has_address ? key_of(peer.address.address()) : AddressKey{};
    // One address first: what is refused for its sake takes nothing from the others.
    if (has_address && limits_.rate_per_address != 0 && !address_rates_.try_take(key, now)) {
      return Refusal::address_rate;
    }
    if (has_address && limits_.sessions_per_address != 0) {
      const auto found = addresses_.find(key);
      if (found != addresses_.end() && found->second >= limits_.sessions_per_address) return Refusal::address;
    }
    if (!rate_.try_take(1, now)) return Refusal::rate;
  }
  do {
    if (taken >= limits_.sessions) return Refusal::sessions;
  } while (!places_taken_.compare_exchange_weak(taken, taken + 1, std::memory_order_relaxed));
  if (!has_address || limits_.sessions_per_address == 0) return Refusal::none;
  try {
    ++addresses_[key_of(peer.address.address())];
  } catch (...) {
    places_taken_.fetch_sub(1, std::memory_order_relaxed);
    throw;
  }
  return Refusal::none;
}

void SessionRegistry::leave(const Peer& peer) noexcept {
  places_taken_.fetch_sub(1, std::memory_order_relaxed);
  if (limits_.sessions_per_address == 0 || !peer.has_address()) return;
  const std::lock_guard lock(limits_mutex_);
  const auto found = addresses_.find(key_of(peer.address.address()));
  if (found != addresses_.end() && --found->second == 0) addresses_.erase(found);
}

void SessionRegistry::add(const SessionPtr& session) {
  sessions_.insert(session->id(), session);
}

bool SessionRegistry::remove(SessionId id) noexcept {
  // A thread's very first use of the map takes a few words of memory. The session must not stay behind.
  const bool was_there = insist([&] { return sessions_.erase(id); });
  groups_.leave_all(id);  // after that: see GroupRegistry::join
  return was_there;
}

SessionPtr SessionRegistry::find(SessionId id) const {
  SessionPtr found;
  sessions_.visit(id, [&found](const SessionPtr& session) { found = session; });
  return found;
}

std::vector<SessionPtr> SessionRegistry::all() const {
  std::vector<SessionPtr> sessions;
  sessions.reserve(size() + 16);
  sessions_.for_each([&sessions](SessionId, const SessionPtr& session) { sessions.push_back(session); });
  // In a simulation, where all is to come in the same order again, whatever numbers the sessions have.
  if (Clock::manual != nullptr) std::ranges::sort(sessions, {}, [](const SessionPtr& one) { return one->id(); });
  return sessions;
}

}  // namespace detail

std::optional<Session> SessionManager::get(SessionId id) const {
  if (auto session = registry_->find(id)) return Session(std::move(session));
  return std::nullopt;
}

std::size_t SessionManager::size() const noexcept {
  return registry_->size();
}

void SessionManager::for_each(const std::function<void(Session&)>& f) const {
  for (auto& state : registry_->all()) {
    Session session(std::move(state));
    f(session);
  }
}

std::vector<SessionId> SessionManager::ids() const {
  std::vector<SessionId> ids;
  for (const auto& session : registry_->all()) ids.push_back(session->id());
  return ids;
}

bool SessionManager::sweep(std::chrono::milliseconds idle_for) const {
  const auto longest = std::chrono::duration_cast<std::chrono::milliseconds>(detail::longest_duration);
  return control_->send({detail::ControlCommand::Sweep{std::clamp(idle_for, std::chrono::milliseconds{0}, longest)}});
}

ControlStats SessionManager::stats() const noexcept {
  return control_->stats();
}

}  // namespace msgtrans
