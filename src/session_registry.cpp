// SPDX-License-Identifier: Apache-2.0
#include "session_registry.hpp"

#include "control_loop.hpp"

#include <algorithm>
#include <msgtrans/detail/insist.hpp>
#include <msgtrans/session/session_manager.hpp>

namespace msgtrans {

namespace detail {

SessionRegistry::Address SessionRegistry::key_of(const asio::ip::address& address) noexcept {
  return address.is_v4() ? asio::ip::make_address_v6(asio::ip::v4_mapped, address.to_v4()).to_bytes()
                         : address.to_v6().to_bytes();
}

bool SessionRegistry::admit(const Peer& peer) {
  std::size_t taken = places_taken_.load(std::memory_order_relaxed);
  do {
    if (taken >= max_sessions_) return false;
  } while (!places_taken_.compare_exchange_weak(taken, taken + 1, std::memory_order_relaxed));
  if (max_per_address_ == 0 || !peer.has_address()) return true;
  try {
    const std::lock_guard lock(addresses_mutex_);
    auto& count = addresses_[key_of(peer.address.address())];
    if (count < max_per_address_) {
      ++count;
      return true;
    }
  } catch (...) {
    places_taken_.fetch_sub(1, std::memory_order_relaxed);
    throw;
  }
  places_taken_.fetch_sub(1, std::memory_order_relaxed);
  return false;
}

void SessionRegistry::leave(const Peer& peer) noexcept {
  places_taken_.fetch_sub(1, std::memory_order_relaxed);
  if (max_per_address_ == 0 || !peer.has_address()) return;
  const std::lock_guard lock(addresses_mutex_);
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
