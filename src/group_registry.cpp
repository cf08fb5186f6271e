// SPDX-License-Identifier: Apache-2.0
#include "group_registry.hpp"

#include "broadcast.hpp"
#include "session_registry.hpp"

#include <algorithm>
#include <msgtrans/detail/insist.hpp>
#include <msgtrans/session/groups.hpp>
#include <utility>

namespace msgtrans {

namespace detail {

// --- one group

std::vector<SessionPtr>& Group::writable(std::size_t chunk) {
  auto& held = chunks_[chunk];
  if (!held->is_unshared()) held = new GroupChunk(held->members);
  return held->members;
}

void Group::add(const SessionPtr& session) {
  const std::size_t place = size();
  const std::size_t chunk = place / chunk_size;
  // Of an earlier call that got no further there may be one that is empty.
  if (chunk == chunks_.size()) {
    decltype(chunks_)::value_type fresh(new GroupChunk);
    chunks_.push_back(std::move(fresh));
  }
  auto& members = writable(chunk);
  members.push_back(session);
  try {
    places_.emplace(session->id(), place);
  } catch (...) {
    members.pop_back();
    throw;
  }
}

void Group::remove(SessionId id) {
  const auto found = places_.find(id);
  const std::size_t place = found->second;
  const std::size_t last = size() - 1;
  auto& tail = writable(last / chunk_size);
  auto& members = writable(place / chunk_size);
  // Nothing throws any more. No session is destroyed by this: its end comes here before it lets go of it.
  if (place != last) {
    members[place % chunk_size] = std::move(tail.back());
    places_.find(members[place % chunk_size]->id())->second = place;
  }
  tail.pop_back();
  places_.erase(id);
  if (last % chunk_size == 0) chunks_.resize(last / chunk_size);
}

// --- all groups

bool GroupRegistry::join(std::string_view name, SessionId id, Error& error) {
  error = {};
  if (name.empty() || name.size() > limits_.name) {
    error = Error(Errc::invalid_option, "the name of a group has " + std::to_string(name.size()) +
                                            " bytes, must have from 1 to " + std::to_string(limits_.name));
    return false;
  }
  auto& of_session = stripe_of(id);
  const std::lock_guard session_lock(of_session.mutex);
  // A session that ends is taken out of the registry, and then `leave_all` takes this lock. If it is found here, then
  // that has yet to take the lock, and finds the new member; if that has had it, then the session was out of the
  // registry before, and is not found here. So none that has ended is left in a group.
  const SessionPtr session = sessions_.find(id);
  if (!session || !session->is_open()) {
    error = session ? Error(Errc::closed, to_string(id) + " is ending")
                    : Error(Errc::not_found, to_string(id) + " has ended, or is none of this server's");
    return false;
  }
  auto& stripe = stripe_of(name);
  const std::lock_guard lock(stripe.mutex);
  auto found = stripe.groups.find(name);
  if (found != stripe.groups.end() && found->second->contains(id)) return false;
  auto mine = of_session.groups.find(id);
  if (limits_.groups_per_session != 0 && mine != of_session.groups.end() &&
      mine->second.size() >= limits_.groups_per_session) {
    error = Error(Errc::too_many_groups, to_string(id) + " is in " + std::to_string(mine->second.size()) +
                                             " groups already: max_groups_per_session");
    return false;
  }
  if (mine == of_session.groups.end()) mine = of_session.groups.try_emplace(id).first;
  bool noted = false;
  try {
    mine->second.push_back(nullptr);
    noted = true;
    if (found == stripe.groups.end()) {
      auto group = std::make_unique<Group>(name);
      const std::string_view key = group->name();
      found = stripe.groups.emplace(key, std::move(group)).first;
      count_.fetch_add(1, std::memory_order_relaxed);
    }
    found->second->add(session);
    mine->second.back() = found->second.get();
  } catch (...) {
    if (noted) mine->second.pop_back();
    if (mine->second.empty()) of_session.groups.erase(mine);
    if (found != stripe.groups.end() && found->second->size() == 0) {
      stripe.groups.erase(found);
      count_.fetch_sub(1, std::memory_order_relaxed);
    }
    throw;
  }
  return true;
}

void GroupRegistry::remove(NamesStripe& stripe, Group& group, SessionId id) noexcept {
  insist([&] { group.remove(id); });
  if (group.size() != 0) return;
  stripe.groups.erase(stripe.groups.find(group.name()));
  count_.fetch_sub(1, std::memory_order_relaxed);
}

bool GroupRegistry::leave(std::string_view name, SessionId id) noexcept {
  auto& of_session = stripe_of(id);
  const std::lock_guard session_lock(of_session.mutex);
  const auto mine = of_session.groups.find(id);
  if (mine == of_session.groups.end()) return false;
  auto& stripe = stripe_of(name);
  const std::lock_guard lock(stripe.mutex);
  const auto found = stripe.groups.find(name);
  if (found == stripe.groups.end() || !found->second->contains(id)) return false;
  auto& groups = mine->second;
  *std::ranges::find(groups, found->second.get()) = groups.back();
  groups.pop_back();
  if (groups.empty()) of_session.groups.erase(mine);
  remove(stripe, *found->second, id);
  return true;
}

std::size_t GroupRegistry::leave_all(SessionId id) noexcept {
  auto& of_session = stripe_of(id);
  const std::lock_guard session_lock(of_session.mutex);
  const auto mine = of_session.groups.find(id);
  if (mine == of_session.groups.end()) return 0;
  const auto groups = std::move(mine->second);
  of_session.groups.erase(mine);
  for (Group* const group : groups) {
    // It cannot go before it has lost this member.
    auto& stripe = stripe_of(group->name());
    const std::lock_guard lock(stripe.mutex);
    remove(stripe, *group, id);
  }
  return groups.size();
}

Group::Members GroupRegistry::members(std::string_view name) const {
  const auto& stripe = stripe_of(name);
  const std::lock_guard lock(stripe.mutex);
  const auto found = stripe.groups.find(name);
  return found == stripe.groups.end() ? Group::Members{} : found->second->members();
}

std::size_t GroupRegistry::size(std::string_view name) const noexcept {
  const auto& stripe = stripe_of(name);
  const std::lock_guard lock(stripe.mutex);
  const auto found = stripe.groups.find(name);
  return found == stripe.groups.end() ? 0 : found->second->size();
}

bool GroupRegistry::contains(std::string_view name, SessionId id) const noexcept {
  const auto& stripe = stripe_of(name);
  const std::lock_guard lock(stripe.mutex);
  const auto found = stripe.groups.find(name);
  return found != stripe.groups.end() && found->second->contains(id);
}

std::vector<std::string> GroupRegistry::groups_of(SessionId id) const {
  const auto& of_session = stripe_of(id);
  const std::lock_guard session_lock(of_session.mutex);
  std::vector<std::string> names;
  if (const auto mine = of_session.groups.find(id); mine != of_session.groups.end()) {
    for (const Group* const group : mine->second) names.push_back(group->name());
  }
  return names;
}

}  // namespace detail

// --- the handle

bool Groups::join(std::string_view name, SessionId session) const {
  Error error;
  const bool joined = join(name, session, error);
  if (error) throw Exception(error);
  return joined;
}

bool Groups::join(std::string_view name, SessionId session, Error& error) const {
  return registry_->groups().join(name, session, error);
}

bool Groups::leave(std::string_view name, SessionId session) const noexcept {
  return registry_->groups().leave(name, session);
}

std::size_t Groups::leave_all(SessionId session) const noexcept {
  return registry_->groups().leave_all(session);
}

BroadcastResult Groups::send(std::string_view name, BytesView payload, const SendOptions& options,
                             SessionId except) const {
  const auto members = registry_->groups().members(name);
  if (members.empty()) return {};
  const auto send = [&](BytesView bytes, const SendOptions& how) {
    detail::Broadcast broadcast(bytes, how);
    for (const auto& chunk : members) {
      for (const auto& session : chunk->members) {
        if (session->id() != except) broadcast.add(session);
      }
    }
    return broadcast.send();
  };
  // All sessions of a server have the same interceptors.
  return detail::intercept_broadcast(members.front()->members.front()->outbound_interceptors(), payload, options, send);
}

std::size_t Groups::size(std::string_view name) const noexcept {
  return registry_->groups().size(name);
}

bool Groups::contains(std::string_view name, SessionId session) const noexcept {
  return registry_->groups().contains(name, session);
}

std::vector<SessionId> Groups::members(std::string_view name) const {
  std::vector<SessionId> ids;
  for (const auto& chunk : registry_->groups().members(name)) {
    for (const auto& session : chunk->members) ids.push_back(session->id());
  }
  return ids;
}

std::vector<std::string> Groups::groups_of(SessionId session) const {
  return registry_->groups().groups_of(session);
}

std::size_t Groups::count() const noexcept {
  return registry_->groups().count();
}

}  // namespace msgtrans
