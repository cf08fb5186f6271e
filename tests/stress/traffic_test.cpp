// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <array>
#include <atomic>
#include <condition_variable>
#include <gtest/gtest.h>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

namespace msgtrans::test {
namespace {

std::string stamped(int sender, int number, std::size_t size = 0) {
  std::string text = std::to_string(sender) + ":" + std::to_string(number) + ":";
  if (text.size() < size) text.resize(size, '.');
  return text;
}

/// Checks that each sender's numbers come in order. For one thread at a time.
class OrderCheck {
 public:
  /// False if that one is out of order (or, unless gaps are allowed, not the next).
  [[nodiscard]] bool take(std::string_view text, bool gaps = false) {
    const int sender = std::stoi(std::string(text));
    const int number = std::stoi(std::string(text.substr(text.find(':') + 1)));
    const auto [entry, first] = next_.try_emplace(sender, 0);
    if (gaps ? number < entry->second : number != entry->second) return false;
    entry->second = number + 1;
    ++count_;
    return true;
  }
  [[nodiscard]] int count() const noexcept { return count_; }

 private:
  std::map<int, int> next_;
  int count_ = 0;
};

constexpr int senders = 6;

template <class Work>
void in_threads(int count, Work work) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back([&work, i] { work(i); });
  for (auto& thread : threads) thread.join();
}

TEST(ManySenders, ToOneSessionKeepEachOnesOrderAndTheBudget) {
  constexpr std::size_t budget = 64 * 1024;
  TestServer server({.session = {.outbound_bytes = budget, .outbound_packets = 500}});
  server.start();
  RawPeer peer(server.endpoint, 16 * 1024);
  Session session = server.session();
  constexpr int each = 4000;
  std::atomic<bool> done = false;
  std::thread watch([&] {
    while (!done) {
      const auto stats = session.stats();
      EXPECT_LE(stats.queued_bytes, budget);
      EXPECT_LE(stats.queued_packets, 500U);
      std::this_thread::yield();
    }
  });
  std::thread reader([&] {
    OrderCheck order;
    while (order.count() < senders * each) ASSERT_TRUE(order.take(peer.next().payload));
  });
  in_threads(senders, [&](int sender) {
    Session mine = session;
    for (int i = 0; i < each; ++i) {
      // Now and then a large one, which goes another way.
      const std::string text = stamped(sender, i, i % 500 == 0 ? 20'000 : 0);
      ASSERT_TRUE(wait_until([&] { return mine.send(text) == SendResult::queued; }));
    }
  });
  reader.join();
  done = true;
  watch.join();
  EXPECT_EQ(server.transport.stats().packets_out, static_cast<std::uint64_t>(senders * each));
}

TEST(ManySenders, ThatWaitForRoomKeepEachOnesOrder) {
  TestServer server({.session = {.outbound_bytes = 16 * 1024}});
  server.start();
  RawPeer peer(server.endpoint, 16 * 1024);
  Session session = server.session();
  constexpr int each = 3000;
  std::atomic<int> completed = 0, failed = 0;
  std::thread reader([&] {
    OrderCheck order;
    while (order.count() < senders * each) ASSERT_TRUE(order.take(peer.next().payload));
  });
  in_threads(senders, [&](int sender) {
    Session mine = session;
    for (int i = 0; i < each; ++i) {
      mine.async_send(stamped(sender, i, 100), [&](error_code code) { ++(code ? failed : completed); });
    }
  });
  reader.join();
  EXPECT_TRUE(wait_until([&] { return completed == senders * each; }));
  EXPECT_EQ(failed, 0);
}

TEST(ManySenders, OfHandlersAndOthersToOneSessionKeepEachOnesOrder) {
  // From other threads, from handlers of the same shard and of another, and from its own.
  TestServer server({.session = {.outbound_bytes = 8 * 1024 * 1024, .outbound_packets = 100'000}});
  Record<std::shared_ptr<Session>> target;
  constexpr int each = 2000;
  server.transport.on_message([target](Session&, const Message& message) {
    const int sender = std::stoi(std::string(message.text()));
    const auto to = target.at(0);
    for (int i = 0; i < each; ++i) EXPECT_EQ(to->send(stamped(sender, i)), SendResult::queued);
  });
  server.start();
  RawPeer peer(server.endpoint);
  target.add(std::make_shared<Session>(server.session(peer)));
  std::vector<std::unique_ptr<RawPeer>> others;
  for (int i = 0; i < 6; ++i) others.push_back(std::make_unique<RawPeer>(server.endpoint));
  std::thread reader([&] {
    OrderCheck order;
    while (order.count() < 9 * each) ASSERT_TRUE(order.take(peer.next().payload));
  });
  for (int i = 0; i < 6; ++i) others[static_cast<std::size_t>(i)]->send(one_way(1, std::to_string(i)));
  peer.send(one_way(1, "6"));
  in_threads(2, [&](int i) {
    for (int n = 0; n < each; ++n) {
      ASSERT_TRUE(wait_until([&] { return target.at(0)->send(stamped(7 + i, n)) == SendResult::queued; }));
    }
  });
  reader.join();
}

TEST(ManySenders, WithDropOldestKeepEachOnesOrderAndEveryPacketIsAccountedFor) {
  TestServer server({.session = {.outbound_bytes = 16 * 1024, .slow_consumer = SlowConsumer::drop_oldest}});
  server.start();
  RawPeer peer(server.endpoint, 8 * 1024);
  Session session = server.session();
  constexpr int each = 10'000;
  std::atomic<int> accepted = 0;
  std::atomic<bool> done = false;
  std::atomic<int> received = 0;
  std::thread reader([&] {
    OrderCheck order;
    while (!done || peer.readable(50ms)) {
      if (!peer.readable(50ms)) continue;
      ASSERT_TRUE(order.take(peer.next().payload, true));
      received = order.count();
      if (order.count() % 100 == 0) std::this_thread::sleep_for(1ms);  // a slow reader is the point
    }
  });
  in_threads(senders, [&](int sender) {
    Session mine = session;
    for (int i = 0; i < each; ++i) {
      if (mine.send(stamped(sender, i, 800)) == SendResult::queued) ++accepted;
    }
  });
  EXPECT_TRUE(wait_until([&] { return session.stats().queued_packets == 0; }));
  done = true;
  reader.join();
  const auto stats = server.transport.stats();
  EXPECT_GT(stats.dropped_oldest, 0U);
  EXPECT_EQ(static_cast<std::uint64_t>(received), stats.packets_out);
  EXPECT_EQ(static_cast<std::uint64_t>(accepted), stats.packets_out + stats.dropped_oldest);
}

TEST(Broadcasts, FromManyThreadsReachEverySessionInEachOnesOrder) {
  TestServer server({.session = {.outbound_bytes = 16 * 1024 * 1024, .outbound_packets = 100'000}});
  server.start();
  constexpr int sessions = 8, each = 500;
  std::vector<std::unique_ptr<RawPeer>> peers;
  for (int i = 0; i < sessions; ++i) peers.push_back(std::make_unique<RawPeer>(server.endpoint));
  ASSERT_TRUE(server.came.wait_for(sessions));
  std::atomic<std::size_t> queued = 0;
  std::vector<std::thread> readers;
  for (auto& peer : peers) {
    readers.emplace_back([&peer = *peer] {
      OrderCheck order;
      while (order.count() < 3 * each) ASSERT_TRUE(order.take(peer.next().payload));
    });
  }
  in_threads(3, [&](int sender) {
    for (int i = 0; i < each; ++i) {
      const auto result = server.transport.broadcast(stamped(sender, i, i % 50 == 0 ? 17'000 : 0));
      EXPECT_EQ(result.queued, static_cast<std::size_t>(sessions));
      queued += result.queued;
    }
  });
  for (auto& reader : readers) reader.join();
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().packets_out == queued; }));
}

TEST(Requests, FromManyThreadsInBothDirectionsEachGetTheirOwnAnswer) {
  TestServer server;
  server.echo().start();
  constexpr int clients = 4, each = 2000;
  std::vector<std::unique_ptr<ClientTransport>> ends;
  for (int i = 0; i < clients; ++i) {
    ends.push_back(std::make_unique<ClientTransport>());
    ends.back()->on_message(
        [](Session& session, const Message& message) { session.respond(message, message.payload()); });
    ends.back()->connect(server.url());
  }
  ASSERT_TRUE(server.came.wait_for(clients));
  std::atomic<int> right = 0, wrong = 0;
  const auto ask_many = [&](Session session, int sender) {
    std::atomic<int> in_flight = 0;
    for (int i = 0; i < each; ++i) {
      const std::string text = stamped(sender, i);
      while (in_flight > 100) std::this_thread::yield();
      ++in_flight;
      session.async_request(text, {.timeout = patience}, [&, text](error_code code, const Reply& reply) {
        ++(!code && reply.text() == text ? right : wrong);
        --in_flight;
      });
    }
    EXPECT_TRUE(wait_until([&] { return in_flight == 0; }));
  };
  in_threads(2 * clients, [&](int i) {
    if (i < clients) {
      ask_many(*ends[static_cast<std::size_t>(i)]->session(), i);
    } else {
      ask_many(*server.transport.session_manager().get(server.came.at(static_cast<std::size_t>(i - clients))), i);
    }
  });
  EXPECT_EQ(right, 2 * clients * each);
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(server.transport.stats().unmatched_responses, 0U);
}

TEST(Requests, RetainedAndAnsweredByAPoolAllArrive) {
  TestServer server;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<OwnedMessage> jobs;
  bool done = false;
  server.transport.on_message([&](Session&, const Message& message) {
    const std::lock_guard lock(mutex);
    jobs.push_back(message.retain());
    changed.notify_one();
  });
  std::vector<std::thread> workers;
  for (int i = 0; i < 3; ++i) {
    workers.emplace_back([&] {
      for (;;) {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return done || !jobs.empty(); });
        if (jobs.empty()) return;
        OwnedMessage job = std::move(jobs.back());
        jobs.pop_back();
        lock.unlock();
        EXPECT_EQ(job.respond(job.payload()), SendResult::queued);
      }
    });
  }
  server.start();
  constexpr int each = 3000;
  std::atomic<int> right = 0;
  in_threads(3, [&](int sender) {
    ClientTransport client;
    client.connect(server.url());
    std::atomic<int> in_flight = 0;
    for (int i = 0; i < each; ++i) {
      const std::string text = stamped(sender, i);
      while (in_flight > 100) std::this_thread::yield();
      ++in_flight;
      client.async_request(text, {.timeout = patience}, [&, text](error_code code, const Reply& reply) {
        right += !code && reply.text() == text ? 1 : 0;
        --in_flight;
      });
    }
    EXPECT_TRUE(wait_until([&] { return in_flight == 0; }));
  });
  {
    const std::lock_guard lock(mutex);
    done = true;
    changed.notify_all();
  }
  for (auto& worker : workers) worker.join();
  EXPECT_EQ(right, 3 * each);
}

}  // namespace
}  // namespace msgtrans::test
