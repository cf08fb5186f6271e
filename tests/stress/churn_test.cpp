// SPDX-License-Identifier: Apache-2.0
// Sessions with a coroutine each come, talk and vanish while other threads send, broadcast, tell, iterate, subscribe
// and stop; and at the end everything is accounted for.
#include "support/fixture.hpp"
#include "support/process.hpp"

#include <atomic>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <cstdlib>
#include <gtest/gtest.h>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;

int rounds() {
  const char* const factor = std::getenv("MSGTRANS_STRESS");
  return 2 * (factor != nullptr ? std::atoi(factor) : 1);
}

std::atomic<std::uint64_t> accepted{0};  // for sending
std::atomic<std::uint64_t> received{0};  // by coroutines
std::atomic<std::uint64_t> running{0};   // coroutines

asio::awaitable<void> talk(SessionActor actor) {
  struct Running {
    Running() { ++running; }
    ~Running() { --running; }
  } here;
  while (auto message = co_await actor.receive()) {
    ++received;
    if (message->text() == "throw") throw std::runtime_error("as told");
    if (message->is_local()) continue;
    const auto result =
        message->is_request() ? message->respond(message->payload()) : actor.session().send(message->payload());
    if (result == SendResult::queued) ++accepted;
    if (message->text() == "leave") co_return;
  }
}

void come_talk_and_vanish(const Endpoint& to, std::mt19937& random) {
  try {
    RawPeer peer(to);
    const auto messages = random() % 20;
    for (std::uint32_t i = 1; i <= messages; ++i) {
      switch (random() % 12) {
        case 0: peer.send(one_way(i, "throw")); break;
        case 1: peer.send(request(i, pattern(random() % 3000))); break;
        case 2: peer.send(packet(wire::PacketType::one_way, i, "urgent", {}, 0, wire::flags::high_priority)); break;
        default: peer.send(one_way(i, pattern(random() % 300))); break;
      }
    }
    switch (random() % 5) {
      case 0: peer.send(one_way(99, "leave")); break;
      case 1: peer.reset(); return;
      case 2: peer.send(Bytes(16, std::byte{77})); break;  // no such version
      case 3: return;
      default: break;
    }
    (void)peer.readable(std::chrono::milliseconds(random() % 3));
  } catch (const std::runtime_error&) {
    // The server stops meanwhile.
  }
}

TEST(Churn, OfSessionsWithCoroutinesLeavesNothingUnaccountedFor) {
  for (int round = 0; round < rounds(); ++round) {
    accepted = received = 0;
    TestServer server({.event_capacity = 1 << 16, .session = {.outbound_bytes = 64 * 1024, .close_timeout = 300ms}});
    auto& transport = server.transport;
    transport.on_session(talk, {.mailbox = 16, .restart_delay = 1ms, .max_restarts = 3});
    auto events = transport.subscribe();
    server.start();

    std::atomic<bool> stop{false};
    std::vector<std::thread> crew;
    const auto hire = [&](auto work) {
      crew.emplace_back([&stop, work, seed = static_cast<unsigned>(100 * round) + static_cast<unsigned>(crew.size())] {
        std::mt19937 random(seed);
        while (!stop) work(random);
      });
    };
    for (int i = 0; i < 2; ++i) hire([&](std::mt19937& random) { come_talk_and_vanish(server.endpoint, random); });
    hire([&](std::mt19937& random) {
      for (const SessionId id : transport.session_manager().ids()) {
        if (transport.send(id, "sent") == SendResult::queued) ++accepted;
        (void)transport.actor_manager().try_tell(id, OwnedMessage(random() % 30 == 0 ? "throw" : "told"),
                                                 random() % 2 == 0 ? Urgency::urgent : Urgency::normal);
        if (random() % 20 == 0) transport.actor_manager().stop(id);
        if (random() % 20 == 0) transport.close(id);
      }
      std::this_thread::yield();
    });
    hire([&](std::mt19937&) {
      accepted += transport.broadcast("to all").queued;
      transport.actor_manager().for_each([](const ActorHandle<OwnedMessage>& actor) { (void)actor.mailbox_size(); });
      (void)transport.subscribe().try_next();
      (void)transport.session_manager().sweep(1h);
      (void)transport.stats();
      (void)transport.actor_manager().stats();
      std::this_thread::yield();
    });

    EXPECT_TRUE(wait_until([&] { return server.came.size() > 300; }, 60s));
    const auto report = transport.stop(std::chrono::milliseconds(round % 2 == 0 ? 200 : 0));
    EXPECT_TRUE(report.complete);
    stop = true;
    for (auto& thread : crew) thread.join();

    // No actor and no session is left, and each session came and went once.
    EXPECT_EQ(transport.actor_manager().size(), 0U);
    EXPECT_EQ(running, 0U);
    const auto stats = transport.stats();
    EXPECT_EQ(stats.sessions, 0U);
    EXPECT_EQ(server.ends.size(), server.came.size());
    EXPECT_EQ(stats.sessions_total, server.came.size());

    // Every accepted packet was written, or counted as dropped.
    EXPECT_EQ(accepted, stats.packets_out + stats.dropped_at_close);
    // Everything received was taken by a coroutine, or counted as left by one, or refused by one that had ended.
    const auto actors = transport.actor_manager().stats();
    EXPECT_EQ(received, actors.told - actors.dropped);
    EXPECT_EQ(actors.mailbox_depth, 0U);
    EXPECT_EQ(actors.spawned, stats.sessions_total);
    EXPECT_EQ(actors.failures, actors.restarts + actors.given_up);

    // The events say the same, in order.
    const auto control = transport.session_manager().stats();
    EXPECT_EQ(control.events_dropped, 0U);
    EXPECT_EQ(control.waiting, 0U);
    std::map<SessionId, int> state;
    std::uint64_t failures = 0;
    for (;;) {
      const auto next = events.next_for(patience);
      if (next.closed()) break;
      ASSERT_TRUE(next) << "lagged " << next.lagged();
      int& now = state[next->session];
      switch (next->kind) {
        case EventKind::session_connected: EXPECT_EQ(now++, 0); break;
        case EventKind::session_disconnected: EXPECT_EQ(now++, 1); break;
        case EventKind::protocol_error: EXPECT_EQ(now, 1); break;
        case EventKind::actor_failed:
        case EventKind::actor_stopped: ++failures; break;
        default: break;
      }
    }
    EXPECT_EQ(failures, actors.failures);
    std::size_t whole = 0;
    for (const auto& [id, now] : state) whole += now == 2 ? 1 : 0;
    EXPECT_EQ(whole, stats.sessions_total);
  }
  EXPECT_TRUE(wait_until([] { return library_threads() == 0; }));
}

}  // namespace
}  // namespace msgtrans::test
