// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <algorithm>
#include <ctime>
#include <functional>
#include <gtest/gtest.h>
#include <map>
#include <memory>
#include <msgtrans/wire/compression.hpp>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace msgtrans::test {
namespace {

/// A server whose peers need not say anything, and these peers.
class Crowd {
 public:
  explicit Crowd(ServerOptions options = {}, const std::function<void(TestServer&)>& prepare = {})
      : server(patient(std::move(options))), groups(server.transport.groups()) {
    if (prepare) prepare(server);
    server.start();
  }

  /// \returns which one it is.
  std::size_t add(int receive_buffer = 0) {
    peers.push_back(std::make_unique<RawPeer>(server.endpoint, receive_buffer));
    sessions.push_back(server.session(*peers.back()));
    return peers.size() - 1;
  }
  /// So many more.
  Crowd& add_many(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) add();
    return *this;
  }
  [[nodiscard]] SessionId id(std::size_t which) const { return sessions[which].id(); }
  [[nodiscard]] std::size_t shards_used() const {
    std::vector<boost::asio::any_io_executor> seen;
    for (const auto& session : sessions) {
      if (std::ranges::find(seen, session.get_executor()) == seen.end()) seen.push_back(session.get_executor());
    }
    return seen.size();
  }

  TestServer server;
  Groups groups;
  std::vector<std::unique_ptr<RawPeer>> peers;
  std::vector<Session> sessions;

 private:
  static ServerOptions patient(ServerOptions options) {
    options.session.first_packet_timeout = 0ms;
    return options;
  }
};

void expect(const BroadcastResult& result, std::size_t queued, std::size_t dropped = 0, std::size_t refused = 0) {
  EXPECT_EQ(result.queued, queued);
  EXPECT_EQ(result.dropped, dropped);
  EXPECT_EQ(result.refused, refused);
}

TEST(Groups, MembersOnEveryShardGetEachMessageOnceAndInTheOrderOfItsSender) {
  Crowd crowd({.shards = 4});
  while (crowd.peers.size() < 12 || (crowd.shards_used() < 4 && crowd.peers.size() < 200)) crowd.add();
  ASSERT_EQ(crowd.shards_used(), 4U);
  // Every third is in no group.
  std::size_t members = 0;
  for (std::size_t i = 0; i < crowd.peers.size(); ++i) {
    if (i % 3 == 2) continue;
    EXPECT_TRUE(crowd.groups.join("all", crowd.id(i)));
    ++members;
  }
  constexpr int senders = 3, count = 200;
  std::vector<std::thread> threads;
  for (int sender = 0; sender < senders; ++sender) {
    threads.emplace_back([&, sender] {
      for (int i = 0; i < count; ++i) {
        expect(crowd.groups.send("all", std::to_string(i), {.biz_type = static_cast<std::uint8_t>(sender)}), members);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (auto& session : crowd.sessions) ASSERT_EQ(session.send("the end", {.biz_type = 99}), SendResult::queued);
  for (std::size_t i = 0; i < crowd.peers.size(); ++i) {
    std::map<int, int> next;
    for (auto got = crowd.peers[i]->next(); got.header.biz_type != 99; got = crowd.peers[i]->next()) {
      ASSERT_EQ(got.payload, std::to_string(next[got.header.biz_type]++));
    }
    for (int sender = 0; sender < senders; ++sender) EXPECT_EQ(next[sender], i % 3 == 2 ? 0 : count);
  }
}

TEST(Groups, SendSkipsTheOneThatIsExcepted) {
  Crowd crowd;
  crowd.add_many(4);
  for (std::size_t i = 0; i < 3; ++i) crowd.groups.join("room", crowd.id(i));
  expect(crowd.groups.send("room", "not to 1", {}, crowd.id(1)), 2);
  expect(crowd.groups.send("room", "to all of them", {}, crowd.id(3)), 3);  // which is no member
  EXPECT_EQ(crowd.peers[0]->next().payload, "not to 1");
  EXPECT_EQ(crowd.peers[0]->next().payload, "to all of them");
  EXPECT_EQ(crowd.peers[1]->next().payload, "to all of them");
  EXPECT_EQ(crowd.peers[2]->next().payload, "not to 1");
}

TEST(Groups, SendKeepsToTheOptionsOfSending) {
  Crowd crowd;
  crowd.add_many(2);
  for (std::size_t i = 0; i < 2; ++i) crowd.groups.join("room", crowd.id(i));
  expect(crowd.groups.send("room", "x", {.biz_type = 7, .extension = "about it", .high_priority = true}), 2);
  for (const auto& peer : crowd.peers) {
    const auto got = peer->next();
    EXPECT_EQ(got.header.biz_type, 7);
    EXPECT_EQ(got.extension, "about it");
    EXPECT_EQ(got.header.flags, wire::flags::high_priority);
  }
  expect(crowd.groups.send("room", "x", {.extension = pattern(65536)}), 0, 0, 2);
}

TEST(Groups, ANameThatNobodyJoinedIsEmpty) {
  Crowd crowd;
  crowd.add();
  expect(crowd.groups.send("nobody", "x"), 0);
  EXPECT_EQ(crowd.groups.size("nobody"), 0U);
  EXPECT_TRUE(crowd.groups.members("nobody").empty());
  EXPECT_TRUE(crowd.groups.groups_of(crowd.id(0)).empty());
  EXPECT_FALSE(crowd.groups.leave("nobody", crowd.id(0)));
  EXPECT_EQ(crowd.groups.leave_all(crowd.id(0)), 0U);
  EXPECT_EQ(crowd.groups.count(), 0U);
}

TEST(Groups, JoinAndLeaveAreSeenAtOnceAndLeavingStopsDelivery) {
  Crowd crowd;
  crowd.add_many(3);
  const Groups groups = crowd.server.transport.groups();  // another handle to the same
  for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(crowd.groups.join("a", crowd.id(i)));
  EXPECT_FALSE(groups.join("a", crowd.id(0))) << "joined twice";
  EXPECT_TRUE(groups.join("b", crowd.id(0)));
  EXPECT_TRUE(groups.join("c", crowd.id(0)));
  EXPECT_EQ(groups.size("a"), 3U);
  EXPECT_EQ(groups.count(), 3U);
  auto names = groups.groups_of(crowd.id(0));
  std::ranges::sort(names);
  EXPECT_EQ(names, (std::vector<std::string>{"a", "b", "c"}));
  auto members = groups.members("a");
  std::ranges::sort(members);
  EXPECT_EQ(members, (std::vector{crowd.id(0), crowd.id(1), crowd.id(2)}));

  EXPECT_TRUE(groups.leave("a", crowd.id(1)));
  EXPECT_FALSE(groups.leave("a", crowd.id(1)));
  EXPECT_FALSE(groups.contains("a", crowd.id(1)));
  EXPECT_TRUE(groups.contains("a", crowd.id(2)));
  expect(groups.send("a", "without 1"), 2);
  EXPECT_EQ(groups.leave_all(crowd.id(0)), 3U);
  EXPECT_EQ(groups.count(), 1U) << "empty groups are gone";
  expect(groups.send("a", "without 0 and 1"), 1);
  expect(groups.send("b", "to nobody"), 0);
  for (auto& session : crowd.sessions) session.send("the end");
  EXPECT_EQ(crowd.peers[0]->next().payload, "without 1");
  EXPECT_EQ(crowd.peers[0]->next().payload, "the end");
  EXPECT_EQ(crowd.peers[1]->next().payload, "the end");
  EXPECT_EQ(crowd.peers[2]->next().payload, "without 1");
  EXPECT_EQ(crowd.peers[2]->next().payload, "without 0 and 1");
  EXPECT_EQ(crowd.peers[2]->next().payload, "the end");
  EXPECT_TRUE(groups.join("a", crowd.id(1))) << "it may come back";
}

TEST(Groups, SendAccountsForWhoIsFullAndWhoIsEnding) {
  Crowd crowd({.session = {.outbound_bytes = 64 * 1024}});
  const std::size_t full = crowd.add(4096), ending = crowd.add(4096), well = crowd.add();
  for (const auto& session : crowd.sessions) crowd.groups.join("room", session.id());
  EXPECT_GT(fill(crowd.sessions[full], pattern(30'000)), 0U);
  fill(crowd.sessions[ending], pattern(30'000));
  crowd.sessions[ending].close();
  expect(crowd.groups.send("room", pattern(40'000)), 1, 1, 1);
  EXPECT_TRUE(crowd.peers[well]->next().payload == pattern(40'000));
  EXPECT_LE(crowd.sessions[full].stats().queued_bytes, 64U * 1024);
}

TEST(Groups, AMemberThatIsFullIsClosedIfItsPolicySaysSo) {
  Crowd crowd({.session = {.outbound_bytes = 64 * 1024, .slow_consumer = SlowConsumer::close, .close_timeout = 100ms}});
  const std::size_t slow = crowd.add(4096), well = crowd.add();
  for (const auto& session : crowd.sessions) crowd.groups.join("room", session.id());
  std::size_t refused = 0;
  for (const auto until = Clock::now() + patience; refused == 0 && Clock::now() < until;) {
    const auto result = crowd.groups.send("room", pattern(20'000));
    EXPECT_EQ(result.queued + result.refused, 2U);
    EXPECT_EQ(result.dropped, 0U);
    refused = result.refused;
    ASSERT_TRUE(crowd.peers[well]->receive()) << "the other got it";
  }
  EXPECT_EQ(refused, 1U);
  EXPECT_EQ(crowd.server.ends.at(0).id, crowd.id(slow));
  EXPECT_EQ(crowd.server.ends.at(0).code, Errc::slow_consumer);
  EXPECT_EQ(crowd.groups.members("room"), std::vector{crowd.id(well)});
  expect(crowd.groups.send("room", "goes on"), 1);
}

TEST(Groups, AMemberThatIsFullLosesItsOldestIfItsPolicySaysSo) {
  Crowd crowd({.session = {.outbound_bytes = 64 * 1024, .slow_consumer = SlowConsumer::drop_oldest}});
  const std::size_t slow = crowd.add(4096);
  crowd.groups.join("room", crowd.id(slow));
  std::uint64_t sent = 0;
  while (crowd.server.transport.stats().dropped_oldest < 10) {
    ASSERT_TRUE(wait_until([&] { return crowd.groups.send("room", pattern(1000)).queued == 1; }));
    ++sent;
  }
  crowd.sessions[slow].send("the end");
  std::uint64_t received = 0;
  while (crowd.peers[slow]->next().payload != "the end") ++received;
  EXPECT_EQ(received + crowd.server.transport.stats().dropped_oldest, sent);
}

TEST(Groups, ASessionThatEndsHasLeftThemBeforeItsEndIsTold) {
  struct Seen {
    std::size_t size = 99, count = 99, groups_of = 99;
    bool contains = true;
    error_code join;
  };
  Record<Seen> seen;
  Crowd crowd({}, [&seen](TestServer& server) {
    server.transport.on_disconnect([seen, groups = server.transport.groups()](Session& session, const Error&) {
      Error error;
      EXPECT_FALSE(groups.join("room", session.id(), error));
      seen.add({groups.size("room"), groups.count(), groups.groups_of(session.id()).size(),
                groups.contains("room", session.id()), error.code});
    });
  });
  crowd.add_many(2);
  for (const auto& session : crowd.sessions) {
    crowd.groups.join("room", session.id());
    crowd.groups.join("alone in " + to_string(session.id()), session.id());
  }
  EXPECT_EQ(crowd.groups.count(), 3U);
  crowd.peers[0]->close();
  EXPECT_EQ(seen.at(0).size, 1U);
  EXPECT_EQ(seen.at(0).count, 2U);
  EXPECT_EQ(seen.at(0).groups_of, 0U);
  EXPECT_FALSE(seen.at(0).contains);
  EXPECT_EQ(seen.at(0).join, Errc::not_found);
  expect(crowd.groups.send("room", "x"), 1);
  crowd.sessions[1].close();
  EXPECT_EQ(seen.at(1).size, 0U);
  EXPECT_EQ(seen.at(1).count, 0U);
}

TEST(Groups, JoiningInOnConnectWorksAndWhoIsRefusedIsNoMember) {
  Record<SessionId> refused;
  Crowd crowd({}, [refused](TestServer& server) {
    server.transport.on_connect(
        [refused, came = server.came, groups = server.transport.groups()](Session& session) mutable {
          EXPECT_TRUE(groups.join("room", session.id()));
          came.add(session.id());
          groups.send("room", to_string(session.id()) + " has come");
          if (came.size() == 1) return Admission::accept();
          refused.add(session.id());
          return Admission::refuse("full");
        });
  });
  const std::size_t first = crowd.add();
  EXPECT_EQ(crowd.peers[first]->next().payload, to_string(crowd.id(first)) + " has come") << "also to itself";
  RawPeer second(crowd.server.endpoint);
  EXPECT_TRUE(second.sees_end());
  EXPECT_EQ(crowd.peers[first]->next().payload, to_string(refused.at(0)) + " has come");
  EXPECT_TRUE(wait_until([&] { return crowd.groups.size("room") == 1; }));
  EXPECT_EQ(crowd.groups.members("room"), std::vector{crowd.id(first)});
  EXPECT_EQ(crowd.groups.groups_of(refused.at(0)).size(), 0U);
}

TEST(Groups, WhoIsNotDecidedOnCannotJoinYet) {
  Record<error_code> told;
  Crowd crowd({}, [told](TestServer& server) {
    server.transport.on_connect([told, came = server.came, groups = server.transport.groups()](
                                    Session& session, AdmissionPromise promise) mutable {
      Error error;
      EXPECT_FALSE(groups.join("room", session.id(), error));
      told.add(error.code);
      came.add(session.id());
      promise.decide(Admission::accept());
    });
  });
  const std::size_t first = crowd.add();
  EXPECT_EQ(told.at(0), Errc::not_found);
  EXPECT_EQ(crowd.groups.count(), 0U);
  EXPECT_TRUE(wait_until([&] { return crowd.server.transport.session_count() == 1; }));
  EXPECT_TRUE(crowd.groups.join("room", crowd.id(first)));
}

TEST(Groups, OnlyOpenSessionsOfThisServerCanJoin) {
  Crowd crowd({.session = {.outbound_bytes = 64 * 1024}}), other;
  other.add();
  crowd.add(4096);
  std::string text;
  EXPECT_EQ(thrown([&] { crowd.groups.join("room", other.id(0)); }, &text), Errc::not_found);
  EXPECT_NE(text.find(to_string(other.id(0))), std::string::npos) << text;
  EXPECT_EQ(thrown([&] { crowd.groups.join("room", SessionId()); }), Errc::not_found);
  // Ending, and it cannot yet, since it has much to write and its peer takes nothing.
  crowd.groups.join("before", crowd.id(0));
  fill(crowd.sessions[0], pattern(30'000));
  crowd.sessions[0].close();
  EXPECT_EQ(thrown([&] { crowd.groups.join("room", crowd.id(0)); }, &text), Errc::closed);
  EXPECT_NE(text.find(to_string(crowd.id(0))), std::string::npos) << text;
  EXPECT_EQ(crowd.groups.size("before"), 1U) << "it has not ended yet";
  crowd.peers[0]->close();
  EXPECT_TRUE(wait_until([&] { return crowd.groups.count() == 0; }));
}

TEST(Groups, ASessionCanBeInSoManyAndNoMore) {
  Crowd crowd({.max_groups_per_session = 2});
  crowd.add_many(2);
  crowd.groups.join("a", crowd.id(0));
  crowd.groups.join("b", crowd.id(0));
  std::string text;
  EXPECT_EQ(thrown([&] { crowd.groups.join("c", crowd.id(0)); }, &text), Errc::too_many_groups);
  EXPECT_NE(text.find("max_groups_per_session"), std::string::npos) << text;
  EXPECT_NE(text.find('2'), std::string::npos) << text;
  EXPECT_EQ(crowd.groups.count(), 2U);
  Error error;
  EXPECT_FALSE(crowd.groups.join("b", crowd.id(0), error)) << "is in it already";
  EXPECT_FALSE(error) << error.message();
  EXPECT_TRUE(crowd.groups.join("a", crowd.id(1))) << "the limit is each session's own";
  crowd.groups.leave("a", crowd.id(0));
  EXPECT_TRUE(crowd.groups.join("c", crowd.id(0), error));
  EXPECT_FALSE(error) << error.message();
}

TEST(Groups, TheLimitsAreAsTheDefaultsSayOrOff) {
  Crowd crowd, unlimited({.max_groups_per_session = 0});
  crowd.add();
  unlimited.add();
  Error error;
  for (int i = 0; i < 1000; ++i) ASSERT_TRUE(crowd.groups.join(std::to_string(i), crowd.id(0), error));
  EXPECT_FALSE(crowd.groups.join("one more", crowd.id(0), error));
  EXPECT_EQ(error.code, Errc::too_many_groups);
  for (int i = 0; i < 1500; ++i) ASSERT_TRUE(unlimited.groups.join(std::to_string(i), unlimited.id(0), error));
  EXPECT_EQ(unlimited.groups.count(), 1500U);
  EXPECT_EQ(unlimited.groups.leave_all(unlimited.id(0)), 1500U);
  EXPECT_EQ(unlimited.groups.count(), 0U);
}

TEST(Groups, NamesHaveFromOneByteToSoMany) {
  Crowd crowd, narrow({.max_group_name = 3});
  crowd.add();
  narrow.add();
  std::string text;
  EXPECT_EQ(thrown([&] { crowd.groups.join("", crowd.id(0)); }), Errc::invalid_option);
  EXPECT_TRUE(crowd.groups.join(pattern(256), crowd.id(0))) << "any bytes";
  EXPECT_EQ(crowd.groups.size(pattern(256)), 1U);
  EXPECT_EQ(thrown([&] { crowd.groups.join(pattern(257), crowd.id(0)); }, &text), Errc::invalid_option);
  EXPECT_NE(text.find("257"), std::string::npos) << text;
  EXPECT_NE(text.find("256"), std::string::npos) << text;
  EXPECT_TRUE(narrow.groups.join("abc", narrow.id(0)));
  EXPECT_EQ(thrown([&] { narrow.groups.join("abcd", narrow.id(0)); }), Errc::invalid_option);
  EXPECT_EQ(narrow.groups.count(), 1U);
  for (const std::size_t wrong : {std::size_t{0}, std::size_t{65536}}) {
    EXPECT_EQ(thrown([&] { ServerTransport server({.max_group_name = wrong}); }, &text), Errc::invalid_option);
    EXPECT_NE(text.find("max_group_name"), std::string::npos) << text;
  }
}

/// Processor time of the calling thread, on which compressing is done.
double cpu_seconds(const std::function<void()>& work) {
  const auto now = [] {
    timespec time{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
  };
  const double begun = now();
  work();
  return now() - begun;
}

TEST(Groups, SendCompressesOnceForAll) {
  constexpr std::size_t members = 40;
  const CompressionOptions hard{.codec = Compression::zstd, .level = 19};
  Crowd crowd({.shards = 4});
  crowd.add_many(members + 1);
  for (std::size_t i = 0; i < members; ++i) crowd.groups.join("room", crowd.id(i));
  std::string payload;
  for (const char c : pattern(10'000)) payload += std::to_string(static_cast<unsigned char>(c) % 50 * 7919) + " ";
  auto& alone = crowd.sessions[members];
  ASSERT_EQ(alone.send(payload, {.compression = hard}), SendResult::queued);  // gets the codec's memory
  const double once = cpu_seconds([&] { ASSERT_EQ(alone.send(payload, {.compression = hard}), SendResult::queued); });
  const double for_all =
      cpu_seconds([&] { expect(crowd.groups.send("room", payload, {.compression = hard}), members); });
  EXPECT_LT(for_all, 10 * once) << "not for each of the " << members;
  const auto packet = crowd.peers[0]->next();
  EXPECT_EQ(packet.header.compression, Compression::zstd);
  EXPECT_LT(packet.payload.size(), payload.size());
  Bytes unpacked;
  EXPECT_FALSE(wire::decompress(packet.header.compression, BytesView(packet.payload), 64 << 20, unpacked));
  EXPECT_EQ(BytesView(unpacked).text(), payload);
  for (std::size_t i = 1; i < members; ++i) EXPECT_EQ(crowd.peers[i]->next().payload, packet.payload);
  EXPECT_EQ(crowd.server.transport.stats().compressed_packets, members + 2);
}

TEST(Groups, AHandleMayOutliveTheServer) {
  std::optional<Groups> groups;
  std::optional<SessionId> id;
  {
    Crowd crowd;
    crowd.add();
    id = crowd.id(0);
    groups = crowd.server.transport.groups();
    groups->join("room", *id);
  }
  EXPECT_EQ(groups->count(), 0U);
  EXPECT_EQ(groups->size("room"), 0U);
  expect(groups->send("room", "x"), 0);
  Error error;
  EXPECT_FALSE(groups->join("room", *id, error));
  EXPECT_EQ(error.code, Errc::not_found);
}

}  // namespace
}  // namespace msgtrans::test
