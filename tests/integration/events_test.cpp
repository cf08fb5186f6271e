// SPDX-License-Identifier: Apache-2.0
// The control path and the events it gives: what subscribers hear, in which order, until when.
#include "support/fixture.hpp"

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <gtest/gtest.h>
#include <map>
#include <string>
#include <vector>

namespace msgtrans::test {
namespace {

using Next = NextResult<Event>;

/// The next event of that kind; fails if none comes.
Event next_of(Subscription<Event>& events, EventKind kind) {
  for (;;) {
    auto next = events.next_for(patience);
    if (!next) {
      ADD_FAILURE() << "no " << to_string(kind);
      return {};
    }
    if (next->kind == kind) return *std::move(next);
  }
}

TEST(Events, TellOfSessionsThatComeAndGoAndWhy) {
  TestServer server;
  auto events = server.transport.subscribe();
  server.start();
  std::uint16_t port = 0;
  {
    RawPeer peer(server.endpoint);
    port = peer.port();
    ASSERT_TRUE(server.came.wait_for(1));
  }
  const Event came = next_of(events, EventKind::session_connected);
  EXPECT_EQ(came.session, server.came.at(0));
  EXPECT_EQ(came.subject, "127.0.0.1:" + std::to_string(port));
  EXPECT_FALSE(came.error);
  const Event gone = next_of(events, EventKind::session_disconnected);
  EXPECT_EQ(gone.session, came.session);
  EXPECT_EQ(gone.error.code, Errc::closed_by_peer);
}

TEST(Events, TellOfProtocolErrorsBetweenTheComingAndTheGoing) {
  TestServer server;
  auto events = server.transport.subscribe();
  server.start();
  RawPeer peer(server.endpoint);
  peer.send(Bytes(16, std::byte{9}));
  std::vector<EventKind> kinds;
  while (kinds.size() < 3) {
    const auto next = events.next_for(patience);
    ASSERT_TRUE(next);
    kinds.push_back(next->kind);
    if (next->kind == EventKind::protocol_error) {
      EXPECT_EQ(next->error.code, Errc::bad_version);
    }
  }
  EXPECT_EQ(kinds,
            (std::vector{EventKind::session_connected, EventKind::protocol_error, EventKind::session_disconnected}));
}

TEST(Events, TellOfASlowConsumerOnceUntilItHasCaughtUp) {
  TestServer server({.session = {.outbound_bytes = 64 * 1024}});
  auto events = server.transport.subscribe();
  server.start();
  RawPeer peer(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(1));
  Session session = server.session();
  const auto count = [&events] {
    std::size_t slow = 0;
    for (auto next = events.next_for(200ms); next; next = events.next_for(200ms)) {
      slow += next->kind == EventKind::slow_consumer ? 1 : 0;
    }
    return slow;
  };
  const std::string payload(8 * 1024, 'x');
  (void)fill(session, payload);
  EXPECT_GE(count(), 1U);
  // It is full, and stays so: that is no news any more.
  for (int i = 0; i < 10; ++i) EXPECT_EQ(session.send(payload), SendResult::would_block);
  EXPECT_EQ(count(), 0U);
  for (bool empty = false; !empty;) {
    if (peer.readable(1ms)) (void)peer.receive();  // what is on its way may be counted as queued a moment longer
    empty = session.stats().queued_packets == 0;
  }
  (void)fill(session, payload);
  EXPECT_GE(count(), 1U);
}

TEST(Events, ReachEverySubscriberInTheSameOrderAndEndWithTheServer) {
  TestServer server;
  server.start();
  auto first = server.transport.subscribe();
  auto second = server.transport.subscribe();
  constexpr int peers = 50;
  for (int i = 0; i < peers; ++i) RawPeer peer(server.endpoint);
  ASSERT_TRUE(server.ends.wait_for(peers));
  EXPECT_TRUE(server.transport.stop(1s).complete);
  const auto all = [](Subscription<Event>& events) {
    std::vector<std::pair<SessionId, EventKind>> seen;
    for (;;) {
      const auto next = events.next_for(patience);
      if (next.closed()) return seen;
      if (!next) {
        ADD_FAILURE() << "neither an event nor the end";
        return seen;
      }
      seen.emplace_back(next->session, next->kind);
    }
  };
  const auto seen = all(first);
  EXPECT_EQ(seen.size(), 2U * peers);
  EXPECT_EQ(seen, all(second));
  std::map<SessionId, EventKind> last;
  for (const auto& [session, kind] : seen) {
    if (kind == EventKind::session_connected) {
      EXPECT_FALSE(last.contains(session));
    } else {
      EXPECT_EQ(last.at(session), EventKind::session_connected);
    }
    last[session] = kind;
  }
}

TEST(Events, TellALateSubscriberExactlyHowManyItHasMissed) {
  TestServer server({.event_capacity = 16});
  auto events = server.transport.subscribe();
  server.start();
  constexpr int peers = 20;
  for (int i = 0; i < peers; ++i) {
    RawPeer peer(server.endpoint);
    ASSERT_TRUE(server.came.wait_for(static_cast<std::size_t>(i) + 1));
  }
  ASSERT_TRUE(server.ends.wait_for(peers));
  ASSERT_TRUE(wait_until([&] {
    const auto stats = server.transport.session_manager().stats();
    return stats.events + stats.events_dropped == 2U * peers;
  }));
  const auto sent = server.transport.session_manager().stats().events;
  const auto missed = events.next_for(patience).lagged();
  EXPECT_EQ(missed, sent - 16);
  std::size_t kept = 0;
  while (kept < 16 && events.next_for(patience)) ++kept;  // the last is counted a moment before it is there
  EXPECT_EQ(kept, 16U);
  EXPECT_FALSE(events.try_next());
  EXPECT_EQ(server.transport.session_manager().stats().events_missed, missed);
}

boost::asio::awaitable<std::size_t> count_to_the_end(Subscription<Event> events) {
  std::size_t count = 0;
  for (;;) {
    const auto [error, next] = co_await events.async_next(boost::asio::as_tuple(boost::asio::use_awaitable));
    if (error) co_return count;
    ++count;
  }
}

TEST(Events, AreForCoroutinesOnAnyContextAndMayOutliveTheServer) {
  boost::asio::io_context context(1);
  std::future<std::size_t> counted;
  auto kept = std::make_unique<TestServer>();
  auto late = kept->transport.subscribe();
  counted = boost::asio::co_spawn(context, count_to_the_end(kept->transport.subscribe()), boost::asio::use_future);
  std::thread runner([&context] { context.run(); });
  kept->start();
  { RawPeer peer(kept->endpoint); }
  ASSERT_TRUE(kept->ends.wait_for(1));
  kept.reset();
  EXPECT_EQ(in_time(counted), 2U);
  runner.join();
  EXPECT_TRUE(late.next());
  EXPECT_TRUE(late.next());
  EXPECT_TRUE(late.next().closed());
}

TEST(Events, OfAServerThatIsNeverStartedJustEnd) {
  auto server = std::make_unique<ServerTransport>();
  auto events = server->subscribe();
  server.reset();
  EXPECT_TRUE(events.next_for(patience).closed());
}

TEST(Control, SweepsTheSessionsThatHaveBeenIdleForThatLong) {
  TestServer server;
  server.echo().start();
  RawPeer idle(server.endpoint), busy(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(2));
  std::this_thread::sleep_for(60ms);  // what is idle for 50 ms must have been so
  busy.send(one_way(1, "x"));
  (void)busy.next();
  EXPECT_TRUE(server.transport.session_manager().sweep(50ms));
  EXPECT_TRUE(idle.sees_end());
  const End end = server.ends.at(0);
  EXPECT_EQ(end.code, Errc::idle_timeout);
  EXPECT_EQ(end.text, "swept");
  EXPECT_EQ(server.transport.stats().sessions_swept, 1U);
  busy.send(one_way(2, "still here"));
  EXPECT_EQ(busy.next().payload, "still here");
  EXPECT_TRUE(server.transport.stop(1s).complete);
  EXPECT_FALSE(server.transport.session_manager().sweep(0ms));
}

TEST(Control, CountsWhatWentThroughIt) {
  TestServer server;
  server.start();
  for (int i = 0; i < 10; ++i) RawPeer peer(server.endpoint);
  ASSERT_TRUE(server.ends.wait_for(10));
  EXPECT_TRUE(wait_until([&] { return server.transport.session_manager().stats().commands == 20; }));
  const auto stats = server.transport.session_manager().stats();
  EXPECT_EQ(stats.waiting, 0U);
  EXPECT_EQ(stats.refused, 0U);
  EXPECT_EQ(stats.events, 0U);  // nobody was there to hear them
}

TEST(Control, RefusesACapacityOfEventsThatIsOutOfRange) {
  EXPECT_EQ(thrown([] { ServerTransport server({.event_capacity = 0}); }), Errc::invalid_option);
  EXPECT_EQ(thrown([] { ServerTransport server({.event_capacity = (std::size_t{1} << 24) + 1}); }),
            Errc::invalid_option);
}

}  // namespace
}  // namespace msgtrans::test
