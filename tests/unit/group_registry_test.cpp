// SPDX-License-Identifier: Apache-2.0
#include "group_registry.hpp"

#include "broadcast.hpp"
#include "session_registry.hpp"
#include "support/no_host.hpp"
#include "support/wait.hpp"
#include "unit/allocation_failure.hpp"

#include <algorithm>
#include <atomic>
#include <gtest/gtest.h>
#include <map>
#include <msgtrans/session_id.hpp>
#include <new>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace msgtrans::test {
namespace {

using detail::Broadcast;
using detail::Group;
using detail::GroupLimits;
using detail::SessionPtr;
using detail::SessionRegistry;
using detail::SessionState;
using detail::Shard;

/// Without a connection, and never opened.
class Sessions {
 public:
  explicit Sessions(std::size_t shards = 1) {
    for (std::size_t i = 0; i < shards; ++i) shards_.push_back(std::make_shared<Shard>());
  }

  SessionPtr make(const SessionOptions& options = {}) {
    const auto& shard = shards_[made_++ % shards_.size()];
    return SessionPtr(new SessionState(detail::next_session_id(), shard, host_,
                                       std::make_shared<const SessionOptions>(options), {}, {}));
  }
  std::vector<SessionPtr> make_many(std::size_t count) {
    std::vector<SessionPtr> all;
    while (all.size() < count) all.push_back(make());
    return all;
  }

 private:
  std::vector<std::shared_ptr<Shard>> shards_;
  std::shared_ptr<NoHost> host_ = std::make_shared<NoHost>();
  std::size_t made_ = 0;
};

std::multiset<SessionId> ids_in(const Group::Members& members) {
  std::multiset<SessionId> ids;
  for (const auto& chunk : members) {
    EXPECT_FALSE(chunk->members.empty());
    EXPECT_LE(chunk->members.size(), Group::chunk_size);
    for (const auto& session : chunk->members) ids.insert(session->id());
  }
  return ids;
}

TEST(Group, HoldsWhoHasJoinedAndNotLeft) {
  Sessions sessions;
  const auto all = sessions.make_many(3 * Group::chunk_size);
  std::mt19937 random(7);
  Group group("g");
  std::set<std::size_t> in;
  std::multiset<SessionId> expected;
  // Mostly coming, then mostly going, so that the sizes at which chunks begin and end are met.
  for (unsigned turn = 0; turn < 20'000; ++turn) {
    const std::size_t which = random() % all.size();
    const bool comes = random() % 8 < (turn < 10'000 ? 5U : 2U);
    if (comes == in.contains(which)) continue;
    if (comes) {
      group.add(all[which]);
      in.insert(which);
      expected.insert(all[which]->id());
    } else {
      group.remove(all[which]->id());
      in.erase(which);
      expected.erase(all[which]->id());
    }
    ASSERT_EQ(group.size(), in.size());
    ASSERT_EQ(group.contains(all[which]->id()), comes);
    if (turn % 16 == 0) {
      ASSERT_EQ(ids_in(group.members()), expected);
    }
  }
  for (const std::size_t which : in) group.remove(all[which]->id());
  EXPECT_EQ(group.size(), 0U);
  EXPECT_TRUE(group.members().empty());
}

TEST(Group, LeavesWhatASenderHasTakenAsItWas) {
  Sessions sessions;
  const auto all = sessions.make_many(2 * Group::chunk_size + 10);
  const auto late = sessions.make();
  Group group("g");
  for (const auto& session : all) group.add(session);
  const auto taken = group.members();
  const auto then = ids_in(taken);
  group.add(late);
  group.remove(all[5]->id());
  group.remove(all[Group::chunk_size]->id());
  EXPECT_EQ(ids_in(taken), then);
  EXPECT_EQ(ids_in(group.members()).size(), all.size() - 1);
}

TEST(Group, CopiesOnlyWhatChangesAndOnlyWhileSomebodyHoldsIt) {
  Sessions sessions;
  const auto all = sessions.make_many(4 * Group::chunk_size - 1);
  const auto late = sessions.make();
  Group group("g");
  for (const auto& session : all) group.add(session);
  auto before = group.members();
  group.add(late);
  auto after = group.members();
  ASSERT_EQ(before.size(), 4U);
  ASSERT_EQ(after.size(), 4U);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(before[i], after[i]);
  EXPECT_NE(before[3], after[3]) << "changed under who sends";
  before.clear();
  const auto* const address = after[3].get();
  after.clear();
  group.remove(late->id());
  EXPECT_EQ(group.members()[3].get(), address) << "copied for nobody";
}

TEST(GroupRegistry, AgreesWithAModel) {
  Sessions sessions;
  SessionRegistry registry({.sessions = 1000}, {});
  auto& groups = registry.groups();
  auto all = sessions.make_many(20);
  for (const auto& session : all) registry.add(session);
  std::map<std::string, std::set<SessionId>> model;
  std::mt19937 random(11);
  for (int turn = 0; turn < 20'000; ++turn) {
    auto& session = all[random() % all.size()];
    const SessionId id = session->id();
    const std::string name = "group " + std::to_string(random() % 10);
    Error error;
    const bool in = model.contains(name) && model[name].contains(id);
    switch (random() % 12) {
      case 0: {  // another instead of it
        ASSERT_TRUE(registry.remove(id));
        for (auto& [key, members] : model) members.erase(id);
        EXPECT_FALSE(groups.join(name, id, error));
        EXPECT_EQ(error.code, Errc::not_found);
        session = sessions.make();
        registry.add(session);
        break;
      }
      case 1: {
        std::size_t count = 0;
        for (auto& [key, members] : model) count += members.erase(id);
        EXPECT_EQ(groups.leave_all(id), count);
        break;
      }
      case 2:
      case 3:
      case 4:
        EXPECT_EQ(groups.leave(name, id), in);
        if (in) model[name].erase(id);
        break;
      default:
        EXPECT_EQ(groups.join(name, id, error), !in);
        EXPECT_FALSE(error) << error.message();
        model[name].insert(id);
        break;
    }
    std::erase_if(model, [](const auto& entry) { return entry.second.empty(); });
    ASSERT_EQ(groups.count(), model.size());
    const auto& members = model[name];
    ASSERT_EQ(groups.size(name), members.size());
    ASSERT_EQ(ids_in(groups.members(name)), std::multiset<SessionId>(members.begin(), members.end()));
    std::set<std::string> names;
    for (const auto& [key, those] : model) {
      if (those.contains(session->id())) names.insert(key);
    }
    const auto found = groups.groups_of(session->id());
    ASSERT_EQ(std::set<std::string>(found.begin(), found.end()), names);
    ASSERT_EQ(found.size(), names.size());
  }
}

TEST(GroupRegistry, JoinWithoutMemoryChangesNothing) {
  Sessions sessions;
  SessionRegistry registry({.sessions = 1000}, {});
  auto& groups = registry.groups();
  const auto all = sessions.make_many(Group::chunk_size + 1);
  for (const auto& session : all) registry.add(session);
  Error error;
  for (std::size_t i = 0; i < Group::chunk_size; ++i) ASSERT_TRUE(groups.join("large", all[i]->id(), error));
  const SessionId late = all.back()->id();
  const std::string long_name(100, 'x');
  for (const std::string& name : {std::string("large"), long_name}) {
    const std::size_t size = groups.size(name), count = groups.count(), of_it = groups.groups_of(late).size();
    const auto held = groups.members(name);  // so that something is to be copied, too
    long failures = 0;
    for (bool failed = true; failed; failures += failed ? 1 : 0) {
      bool joined = false;
      {
        const AllocationFailure failure(failures);
        try {
          joined = groups.join(name, late, error);
        } catch (const std::bad_alloc&) {
        }
        failed = failure.happened();
      }
      ASSERT_EQ(joined, !failed);
      if (!failed) break;
      ASSERT_EQ(groups.size(name), size);
      ASSERT_EQ(groups.count(), count);
      ASSERT_FALSE(groups.contains(name, late));
      ASSERT_EQ(groups.groups_of(late).size(), of_it);
    }
    EXPECT_GE(failures, 2);
    EXPECT_EQ(groups.size(name), size + 1);
  }
  // To leave must work without memory: it is done when there is some again.
  const auto held = groups.members("large");
  const AllocationFailure failure(0);
  EXPECT_EQ(groups.leave_all(all[1]->id()), 1U);
  EXPECT_TRUE(failure.happened());
  EXPECT_EQ(groups.size("large"), Group::chunk_size);
}

TEST(GroupRegistry, JoinThatRacesWithTheEndLeaksNoMember) {
  Sessions sessions;
  SessionRegistry registry({.sessions = 1000}, {});
  auto& groups = registry.groups();
  const std::vector<std::string> names{"a", "b", "c", "d"};
  std::atomic<std::uint64_t> current{0};
  std::atomic<bool> over{false};
  std::atomic<std::uint64_t> joined{0}, refused{0};
  std::vector<std::thread> joiners;
  for (unsigned which = 0; which < 2; ++which) {
    joiners.emplace_back([&, which] {
      for (std::size_t i = which; !over.load(); ++i) {
        Error error;
        if (groups.join(names[i % names.size()], SessionId(current.load()), error)) ++joined;
        if (error) ++refused;
      }
    });
  }
  // And somebody sends to them.
  std::atomic<std::uint64_t> seen{0};
  joiners.emplace_back([&] {
    while (!over.load()) {
      for (const auto& name : names) seen += ids_in(groups.members(name)).size();
    }
  });
  // Some thousands are enough to meet the race many times; on a busy machine as many as it gives in some seconds.
  const auto until = Clock::now() + 3s;
  for (int i = 0; i < 20'000 && (Clock::now() < until || joined < 100 || seen == 0); ++i) {
    const auto session = sessions.make();
    registry.add(session);
    current = session->id().value();
    if (i % 64 == 0) std::this_thread::yield();
    registry.remove(session->id());
  }
  over = true;
  for (auto& joiner : joiners) joiner.join();
  EXPECT_EQ(groups.count(), 0U) << "a session that has ended is still a member";
  for (const auto& name : names) EXPECT_EQ(groups.size(name), 0U);
  EXPECT_GT(joined, 0U);
  EXPECT_GT(refused, 0U);
  EXPECT_GT(seen, 0U);
}

TEST(BroadcastOfOneMessage, IsEncodedOnceForEachWayToCompressWhateverTheNumberOfShards) {
  Sessions sessions(4);
  const std::string payload(5'000, 'x');
  const SendOptions options;
  Broadcast broadcast(payload, options);
  std::vector<SessionPtr> all;
  EXPECT_EQ(broadcast.encodings(), 0U);
  for (int i = 0; i < 100; ++i) {
    broadcast.add(all.emplace_back(sessions.make()));
    ASSERT_EQ(broadcast.encodings(), 1U);
  }
  for (int i = 0; i < 100; ++i) {
    broadcast.add(all.emplace_back(sessions.make({.compression = {.codec = Compression::zstd}})));
    ASSERT_EQ(broadcast.encodings(), 2U);
  }
  for (int i = 0; i < 100; ++i) {
    broadcast.add(all.emplace_back(sessions.make({.compression = {.codec = Compression::zstd, .level = 19}})));
    ASSERT_EQ(broadcast.encodings(), 3U);
  }
  for (const auto& session : all) EXPECT_EQ(session->stats().queued_packets, 1U);
}

TEST(BroadcastOfOneMessage, GivesBackItsRoomIfItIsNotSent) {
  Sessions sessions(2);
  const auto all = sessions.make_many(10);
  const SendOptions options{.high_priority = true};
  {
    Broadcast broadcast("payload", options);
    for (const auto& session : all) broadcast.add(session);
    EXPECT_EQ(all[0]->stats().queued_packets, 1U);
  }
  for (const auto& session : all) EXPECT_EQ(session->stats().queued_bytes, 0U);
}

}  // namespace
}  // namespace msgtrans::test
