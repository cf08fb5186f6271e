// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"
#include "support/process.hpp"

#include <array>
#include <atomic>
#include <gtest/gtest.h>
#include <memory>
#include <random>
#include <set>
#include <thread>

namespace msgtrans::test {
namespace {

/// Threads that are told to stop, and joined.
class Crew {
 public:
  ~Crew() { dismiss(); }
  template <class Work>
  void hire(int count, Work work) {
    for (int i = 0; i < count; ++i) {
      threads_.emplace_back([this, work, i]() mutable {
        std::mt19937 random(static_cast<unsigned>(i) * 7919 + 1);
        while (!done_) work(random);
      });
    }
  }
  void dismiss() {
    done_ = true;
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  std::atomic<bool> done_ = false;
  std::vector<std::thread> threads_;
};

int between(std::mt19937& random, int least, int most) {
  return std::uniform_int_distribution<int>(least, most)(random);
}

/// Connects, talks a little, and goes in one of several ways.
void come_talk_and_vanish(const Endpoint& to, std::mt19937& random) {
  try {
    if (between(random, 0, 2) == 0) {
      RawPeer peer(to);
      for (std::uint32_t id = 1; id <= 20; ++id) {
        if (!peer.send(id % 2 == 0 ? request(id, pattern(100)) : one_way(id, pattern(3000)))) return;
      }
      switch (between(random, 0, 3)) {
        case 0: peer.reset(); break;
        case 1: peer.shut_sending(); break;
        case 2: {
          const Bytes cut = one_way(1, "cut");
          peer.send(std::span(cut).first(17));
          break;
        }
        default: peer.send(std::array<std::byte, 16>{std::byte{200}}); break;  // no such version
      }
      return;
    }
    ClientTransport client;
    Error error;
    client.connect(to.url(), error);
    if (error) return;
    for (int i = 0; i < 10; ++i) {
      (void)client.send(pattern(static_cast<std::size_t>(between(random, 0, 2000))));
      client.async_request("x", {.timeout = 500ms}, [](error_code, const Reply&) {});
    }
    (void)client.request("y", {.timeout = 500ms}, error);
    if (between(random, 0, 1) == 0) client.close();
  } catch (const std::runtime_error&) {
    // The server stops meanwhile.
  }
}

class Policy : public testing::TestWithParam<SlowConsumer> {};

TEST_P(Policy, EverySessionThatComesGoesAndEveryAcceptedPacketIsAccountedFor) {
  for (int round = 0; round < 3; ++round) {
    TestServer server({.session = {.outbound_bytes = 32 * 1024,
                                   .outbound_packets = 64,
                                   .slow_consumer = GetParam(),
                                   .close_timeout = 300ms}});
    std::atomic<std::uint64_t> accepted = 0;
    server.transport.on_message([&](Session& session, const Message& message) {
      const auto result =
          message.is_request() ? session.respond(message, message.payload()) : session.send(message.payload());
      if (result == SendResult::queued) ++accepted;
    });
    server.start();
    auto& transport = server.transport;

    Crew visitors, users;
    visitors.hire(3, [&](std::mt19937& random) { come_talk_and_vanish(server.endpoint, random); });
    users.hire(1, [&](std::mt19937& random) {
      for (const SessionId id : transport.session_manager().ids()) {
        if (transport.send(id, pattern(500), {.high_priority = between(random, 0, 3) == 0}) == SendResult::queued) {
          ++accepted;
        }
        if (between(random, 0, 20) == 0) transport.close(id, "by chance");
      }
    });
    users.hire(1, [&](std::mt19937& random) {
      const auto result = transport.broadcast(pattern(static_cast<std::size_t>(between(random, 0, 1) * 20'000 + 10)));
      accepted += result.queued;
      std::this_thread::yield();
    });
    std::atomic<int> under_way = 0;
    users.hire(1, [&](std::mt19937& random) {
      transport.session_manager().for_each([&](Session& session) {
        (void)session.stats();
        (void)session.peer();
        if (under_way > 2'000) return std::this_thread::yield();  // faster than the shards, it would only fill memory
        ++under_way;
        session.async_send("waits", [&](error_code code) {
          if (!code) ++accepted;
          --under_way;
        });
        if (between(random, 0, 3) == 0) {
          ++under_way;
          session.async_request("?", {.timeout = 50ms}, [&](error_code, const Reply&) { --under_way; });
        }
      });
      (void)transport.stats();
      (void)transport.session_count();
    });

    EXPECT_TRUE(wait_until([&] { return server.came.size() > 60; }));
    const auto report = transport.stop(std::chrono::milliseconds(round * 30));
    EXPECT_TRUE(report.complete);
    const auto ended_at_return = server.ends.size();
    EXPECT_EQ(ended_at_return, transport.stats().sessions_total);
    users.dismiss();
    visitors.dismiss();
    EXPECT_TRUE(wait_until([&] { return under_way == 0; })) << under_way;

    const auto stats = transport.stats();
    std::multiset<SessionId> came, ended;
    for (const SessionId id : server.came.all()) came.insert(id);
    for (const End& end : server.ends.all()) ended.insert(end.id);
    EXPECT_EQ(came, ended);
    EXPECT_EQ(stats.sessions, 0U);
    EXPECT_EQ(stats.sessions_total, came.size());
    EXPECT_EQ(accepted + stats.requests_by_outcome.sent,
              stats.packets_out + stats.dropped_at_close + stats.dropped_oldest);
    if (GetParam() != SlowConsumer::drop_oldest) {
      EXPECT_EQ(stats.dropped_oldest, 0U);
    }
  }
  EXPECT_TRUE(wait_until([] { return library_threads() == 0; }));
}

INSTANTIATE_TEST_SUITE_P(SlowConsumers, Policy,
                         testing::Values(SlowConsumer::wait, SlowConsumer::drop_oldest, SlowConsumer::close));

TEST(StoppingUnderLoad, AtAnyMomentFromAnyThreadEndsAndTellsAll) {
  std::mt19937 random(42);
  for (int round = 0; round < 30; ++round) {
    TestServer server({.drain = 50ms});
    server.echo().start();
    std::vector<std::unique_ptr<ClientTransport>> clients;
    for (int i = 0; i < 4; ++i) {
      clients.push_back(std::make_unique<ClientTransport>());
      clients.back()->connect(server.url());
    }
    ASSERT_TRUE(server.came.wait_for(4));
    std::atomic<int> asked = 0, answered = 0;
    Crew crew;
    crew.hire(2, [&](std::mt19937&) {
      for (auto& client : clients) {
        ++asked;
        client->async_request("x", {.timeout = 0ms}, [&](error_code, const Reply&) { ++answered; });
        (void)client->send("y");
      }
      while (asked - answered > 500) std::this_thread::yield();
    });
    const auto moment = Clock::now() + std::chrono::microseconds(between(random, 0, 5000));
    while (Clock::now() < moment) std::this_thread::yield();
    switch (round % 3) {
      case 0: EXPECT_TRUE(server.transport.stop(0ms).complete); break;
      case 1: EXPECT_TRUE(server.transport.stop().complete); break;
      default: {
        std::thread other([&] { EXPECT_TRUE(server.transport.stop(20ms).complete); });
        EXPECT_TRUE(server.transport.stop(0ms).complete);
        other.join();
        break;
      }
    }
    EXPECT_EQ(server.ends.size(), 4U);
    crew.dismiss();
    clients.clear();
    EXPECT_TRUE(wait_until([&] { return asked == answered; })) << asked << " " << answered;
  }
}

TEST(DestroyingUnderLoad, OfServersAndClientsLeavesHandlesThatSayClosed) {
  for (int round = 0; round < 30; ++round) {
    auto server = std::make_unique<TestServer>(ServerOptions{.drain = 0ms});
    server->echo().start();
    auto client = std::make_unique<ClientTransport>();
    client->on_message([](Session& session, const Message& message) {
      if (message.is_request()) session.respond(message, message.payload());
    });
    client->connect(server->url());
    Session here = server->session();
    Session there = *client->session();
    const auto manager = server->transport.session_manager();
    std::atomic<int> asked = 0, answered = 0;
    Crew crew;
    for (const Session* session : {&here, &there}) {
      crew.hire(1, [&, handle = *session](std::mt19937&) mutable {
        (void)handle.send(pattern(1000));
        ++asked;
        handle.async_request("x", {.timeout = 0ms}, [&](error_code, const Reply&) { ++answered; });
        (void)handle.stats();
        (void)manager.size();
        (void)manager.ids();
        while (asked - answered > 500) std::this_thread::yield();
      });
    }
    ASSERT_TRUE(wait_until([&] { return answered > round * 3; }));
    if (round % 2 == 0) {
      server.reset();
      client.reset();
    } else {
      client.reset();
      server.reset();
    }
    crew.dismiss();
    EXPECT_TRUE(wait_until([&] { return asked == answered; })) << asked << " " << answered;
    EXPECT_EQ(here.send("x"), SendResult::closed);
    EXPECT_EQ(there.send("x"), SendResult::closed);
    EXPECT_EQ(in_time(ask(here, "x")).first, Errc::closed);
    EXPECT_EQ(manager.size(), 0U);
    here.close();
  }
  EXPECT_TRUE(wait_until([] { return library_threads() == 0; }));
}

TEST(ConnectingUnderLoad, ManyClientsAtOnceFromManyThreadsAllGetThrough) {
  const std::size_t descriptors_before = descriptors();
  {
    TestServer server;
    server.echo().start();
    std::atomic<int> right = 0;
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < 40; ++i) {
          ClientTransport client;
          client.connect(server.url());
          if (client.request("x").text() == "x") ++right;
          if (i % 2 == 0) {
            client.close();
            client.connect(server.url());
            if (client.request("again").text() == "again") ++right;
          }
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(right, 240);
    EXPECT_TRUE(server.ends.wait_for(240));
    EXPECT_EQ(server.transport.stats().sessions_total, 240U);
  }
  EXPECT_TRUE(wait_until([&] { return descriptors() <= descriptors_before; }));
}

}  // namespace
}  // namespace msgtrans::test
