// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "session_state.hpp"

#include <array>
#include <atomic>
#include <boost/smart_ptr/intrusive_ptr.hpp>
#include <boost/unordered/unordered_flat_map.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/session_id.hpp>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

namespace msgtrans::detail {

class SessionRegistry;

struct GroupLimits {
  std::size_t groups_per_session = 0;  // 0: none
  std::size_t name = 256;              // bytes
};

/// Members of a group. Those who send share them with the group, which copies what is shared before it changes it.
struct GroupChunk {
  GroupChunk() = default;
  explicit GroupChunk(const std::vector<SessionPtr>& from) : members(from) {}

  /// Only the group holds it. Acquire: what others did while they held it happens before. Nobody can come to hold it
  /// meanwhile, since that takes the lock which is held here.
  [[nodiscard]] bool is_unshared() const noexcept { return holders.load(std::memory_order_acquire) == 1; }

  mutable std::atomic<std::uint32_t> holders{0};
  std::vector<SessionPtr> members;
};
inline void intrusive_ptr_add_ref(const GroupChunk* chunk) noexcept {
  chunk->holders.fetch_add(1, std::memory_order_relaxed);
}
inline void intrusive_ptr_release(const GroupChunk* chunk) noexcept {
  if (chunk->holders.fetch_sub(1, std::memory_order_acq_rel) == 1) delete chunk;
}

/// The members of one group: an array in chunks, in which the last takes the place of one that leaves. To come or go
/// copies nothing, or if somebody is sending just then the one or two chunks that it changes.
class Group {
 public:
  static constexpr std::size_t chunk_size = 256;
  using Members = std::vector<boost::intrusive_ptr<const GroupChunk>>;

  explicit Group(std::string_view name) : name_(name) {}

  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  [[nodiscard]] std::size_t size() const noexcept { return places_.size(); }
  [[nodiscard]] bool contains(SessionId id) const noexcept { return places_.contains(id); }
  /// \throws std::bad_alloc; then nothing has changed. It must not be a member.
  void add(const SessionPtr& session);
  /// The same; it must be one.
  void remove(SessionId id);
  /// As they are now, which stays so.
  [[nodiscard]] Members members() const { return {chunks_.begin(), chunks_.end()}; }

 private:
  [[nodiscard]] std::vector<SessionPtr>& writable(std::size_t chunk);

  const std::string name_;
  std::vector<boost::intrusive_ptr<GroupChunk>> chunks_;
  boost::unordered_flat_map<SessionId, std::size_t, std::hash<SessionId>> places_;
};

/// The groups of a server's sessions. Any thread.
///
/// Two tables say the same thing from both sides: names to groups with their members, and sessions to the groups that
/// they are in. Each is cut into stripes with a lock. A change takes its session's stripe and then, for each group in
/// turn, that of the name; nobody takes two of one kind, so there is no circle. Who sends or counts takes that of the
/// name only.
class GroupRegistry {
 public:
  GroupRegistry(const SessionRegistry& sessions, GroupLimits limits) noexcept : sessions_(sessions), limits_(limits) {}

  bool join(std::string_view name, SessionId id, Error& error);
  bool leave(std::string_view name, SessionId id) noexcept;
  /// Also, of a session that has just been taken out of the registry: then it is in no group ever after.
  std::size_t leave_all(SessionId id) noexcept;

  [[nodiscard]] Group::Members members(std::string_view name) const;
  [[nodiscard]] std::size_t size(std::string_view name) const noexcept;
  [[nodiscard]] bool contains(std::string_view name, SessionId id) const noexcept;
  [[nodiscard]] std::vector<std::string> groups_of(SessionId id) const;
  [[nodiscard]] std::size_t count() const noexcept { return count_.load(std::memory_order_relaxed); }

 private:
  static constexpr std::size_t stripes = 64;

  struct alignas(64) NamesStripe {
    mutable std::mutex mutex;
    // A tree: names may be what peers choose, and no choice of theirs makes it slow. The keys are the groups' names.
    std::map<std::string_view, std::unique_ptr<Group>> groups;
  };
  struct alignas(64) SessionsStripe {
    mutable std::mutex mutex;
    boost::unordered_flat_map<SessionId, std::vector<Group*>, std::hash<SessionId>> groups;  // none is empty
  };

  [[nodiscard]] NamesStripe& stripe_of(std::string_view name) noexcept {
    return names_[std::hash<std::string_view>{}(name) % stripes];
  }
  [[nodiscard]] const NamesStripe& stripe_of(std::string_view name) const noexcept {
    return names_[std::hash<std::string_view>{}(name) % stripes];
  }
  [[nodiscard]] SessionsStripe& stripe_of(SessionId id) noexcept {
    return of_sessions_[std::hash<SessionId>{}(id) % stripes];
  }
  [[nodiscard]] const SessionsStripe& stripe_of(SessionId id) const noexcept {
    return of_sessions_[std::hash<SessionId>{}(id) % stripes];
  }
  /// With both locks.
  void remove(NamesStripe& stripe, Group& group, SessionId id) noexcept;

  const SessionRegistry& sessions_;
  const GroupLimits limits_;
  std::array<NamesStripe, stripes> names_;
  std::array<SessionsStripe, stripes> of_sessions_;
  std::atomic<std::size_t> count_{0};
};

}  // namespace msgtrans::detail
