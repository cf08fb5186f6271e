// SPDX-License-Identifier: Apache-2.0
#include "session_registry.hpp"

#include <msgtrans/session/session_manager.hpp>

namespace msgtrans {

namespace detail {

bool SessionRegistry::admit(const asio::ip::address& address) {
  std::size_t taken = places_taken_.load(std::memory_order_relaxed);
  do {
    if (taken >= max_sessions_) return false;
  } while (!places_taken_.compare_exchange_weak(taken, taken + 1, std::memory_order_relaxed));
  if (max_per_address_ == 0) return true;
  try {
    const std::lock_guard lock(addresses_mutex_);
    auto& count = addresses_[address.to_string()];
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

void SessionRegistry::leave(const asio::ip::address& address) noexcept {
  places_taken_.fetch_sub(1, std::memory_order_relaxed);
  if (max_per_address_ == 0) return;
  const std::lock_guard lock(addresses_mutex_);
  const auto found = addresses_.find(address.to_string());
  if (found != addresses_.end() && --found->second == 0) addresses_.erase(found);
}

void SessionRegistry::add(const SessionPtr& session) {
  Stripe& in = stripe(session->id());
  const std::lock_guard lock(in.mutex);
  in.sessions.emplace(session->id(), session);
  size_.fetch_add(1, std::memory_order_relaxed);
}

bool SessionRegistry::remove(SessionId id) noexcept {
  Stripe& in = stripe(id);
  SessionPtr removed;  // outlives the lock: the last reference may go with it
  const std::lock_guard lock(in.mutex);
  const auto found = in.sessions.find(id);
  if (found == in.sessions.end()) return false;
  removed = std::move(found->second);
  in.sessions.erase(found);
  size_.fetch_sub(1, std::memory_order_relaxed);
  return true;
}

SessionPtr SessionRegistry::find(SessionId id) const noexcept {
  const Stripe& in = stripe(id);
  const std::lock_guard lock(in.mutex);
  const auto found = in.sessions.find(id);
  return found == in.sessions.end() ? nullptr : found->second;
}

std::vector<SessionPtr> SessionRegistry::all() const {
  std::vector<SessionPtr> sessions;
  sessions.reserve(size() + 16);
  for (const Stripe& in : stripes_) {
    const std::lock_guard lock(in.mutex);
    for (const auto& [id, session] : in.sessions) sessions.push_back(session);
  }
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

}  // namespace msgtrans
