// SPDX-License-Identifier: Apache-2.0
// What every channel from many to one receiver does for plain threads: the same cases over SyncChannel, over
// AsyncChannel's blocking calls, and over a channel of a mutex and a deque that shows what is meant.
#include "support/counted.hpp"
#include "support/history.hpp"
#include "support/mutex_channel.hpp"
#include "support/process.hpp"
#include "support/stress.hpp"
#include "support/wait.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/channel/sync_channel.hpp>
#include <msgtrans/error.hpp>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <sys/types.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using boost::asio::awaitable;
using msgtrans::AsyncChannel;
using msgtrans::ChannelCapacity;
using msgtrans::ChannelStatus;
using msgtrans::SyncChannel;
using msgtrans::test::ChannelHistory;
using msgtrans::test::Contexts;
using msgtrans::test::Counted;
using msgtrans::test::HistoryClock;
using msgtrans::test::MutexChannel;
using msgtrans::test::patience;

// How to make each. What AsyncChannel's blocking calls do needs no context that runs.
template <class T>
struct Async {
  explicit Async(ChannelCapacity capacity) : channel(context.get_executor(), capacity) {}
  boost::asio::io_context context;
  AsyncChannel<T> channel;
};
template <class T>
struct Sync {
  explicit Sync(ChannelCapacity capacity) : channel(capacity) {}
  SyncChannel<T> channel;
};
template <class T>
struct Mutex {
  explicit Mutex(ChannelCapacity capacity) : channel(capacity) {}
  MutexChannel<T> channel;
};
struct SyncFamily {
  static constexpr auto order = msgtrans::test::ChannelOrder::per_producer;
  template <class T>
  using With = Sync<T>;
};
struct AsyncFamily {
  static constexpr auto order = msgtrans::test::ChannelOrder::real_time;
  template <class T>
  using With = Async<T>;
};
struct MutexFamily {
  static constexpr auto order = msgtrans::test::ChannelOrder::real_time;
  template <class T>
  using With = Mutex<T>;
};
struct Names {
  template <class Family>
  static std::string GetName(int) {
    if (std::is_same_v<Family, SyncFamily>) return "Sync";
    return std::is_same_v<Family, AsyncFamily> ? "Async" : "Mutex";
  }
};

template <class Family>
class Channel : public testing::Test {
 protected:
  template <class T>
  using With = typename Family::template With<T>;
};
using Families = testing::Types<SyncFamily, AsyncFamily, MutexFamily>;
TYPED_TEST_SUITE(Channel, Families, Names);

const auto unbounded = ChannelCapacity::unbounded();

TYPED_TEST(Channel, GivesWhatWasSentInOrder) {
  typename TestFixture::template With<int> it(unbounded);
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(it.channel.send(i), ChannelStatus::ok);
  EXPECT_EQ(it.channel.size(), 1000U);
  for (int i = 0; i < 1000; ++i) {
    auto result = it.channel.recv();
    ASSERT_TRUE(result);
    ASSERT_EQ(*result, i);
  }
  EXPECT_EQ(it.channel.size(), 0U);
}

TYPED_TEST(Channel, TakesMoveOnlyValues) {
  typename TestFixture::template With<std::unique_ptr<int>> it(unbounded);
  ASSERT_EQ(it.channel.try_send(std::make_unique<int>(7)), ChannelStatus::ok);
  auto result = it.channel.try_recv();
  ASSERT_TRUE(result);
  EXPECT_EQ(**result, 7);
}

TYPED_TEST(Channel, SaysEmpty) {
  typename TestFixture::template With<int> it(unbounded);
  EXPECT_EQ(it.channel.try_recv().status(), ChannelStatus::empty);
  std::vector<int> out;
  bool closed = true;
  EXPECT_EQ(it.channel.try_recv_many(out, 10, &closed), 0U);
  EXPECT_FALSE(closed);
}

TYPED_TEST(Channel, CapacityIsATrueMaximum) {
  typename TestFixture::template With<int> it(ChannelCapacity::bounded(3));
  EXPECT_EQ(it.channel.capacity(), 3U);
  for (int i = 0; i < 3; ++i) ASSERT_EQ(it.channel.try_send(i), ChannelStatus::ok);
  EXPECT_EQ(it.channel.try_send(3), ChannelStatus::full);
  EXPECT_EQ(*it.channel.try_recv(), 0);
  EXPECT_EQ(it.channel.try_send(4), ChannelStatus::ok);
  EXPECT_EQ(it.channel.try_send(5), ChannelStatus::full);
}

TYPED_TEST(Channel, CapacityOneWorks) {
  typename TestFixture::template With<int> it(ChannelCapacity::bounded(1));
  std::thread sender([&] {
    for (int i = 0; i < 2000; ++i) ASSERT_EQ(it.channel.send(i), ChannelStatus::ok);
  });
  for (int i = 0; i < 2000; ++i) ASSERT_EQ(*it.channel.recv(), i);
  sender.join();
}

TYPED_TEST(Channel, AZeroOrAbsurdCapacityIsAnError) {
  for (const std::size_t bad : {std::size_t{0}, ChannelCapacity::max_bound + 1, ~std::size_t{0}}) {
    try {
      typename TestFixture::template With<int> it(ChannelCapacity::bounded(bad));
      FAIL() << bad;
    } catch (const msgtrans::Exception& exception) {
      EXPECT_EQ(exception.code(), msgtrans::make_error_code(msgtrans::Errc::invalid_option));
      EXPECT_NE(std::string(exception.what()).find(std::to_string(bad)), std::string::npos);
    }
  }
}

TYPED_TEST(Channel, AFullChannelLeavesTheValueWithTheSender) {
  typename TestFixture::template With<std::unique_ptr<int>> it(ChannelCapacity::bounded(1));
  ASSERT_EQ(it.channel.try_send(std::make_unique<int>(1)), ChannelStatus::ok);
  auto mine = std::make_unique<int>(2);
  EXPECT_EQ(it.channel.try_send(std::move(mine)), ChannelStatus::full);
  ASSERT_TRUE(mine);
  EXPECT_EQ(it.channel.send_for(std::move(mine), 1ms), ChannelStatus::timeout);
  ASSERT_TRUE(mine);
  it.channel.close();
  EXPECT_EQ(it.channel.try_send(std::move(mine)), ChannelStatus::closed);
  EXPECT_EQ(it.channel.send(std::move(mine)), ChannelStatus::closed);
  ASSERT_TRUE(mine);
  EXPECT_EQ(*mine, 2);
}

TYPED_TEST(Channel, AfterCloseWhatWasSentIsStillReceived) {
  typename TestFixture::template With<int> it(unbounded);
  for (int i = 0; i < 3; ++i) ASSERT_EQ(it.channel.send(i), ChannelStatus::ok);
  EXPECT_FALSE(it.channel.is_closed());
  it.channel.close();
  it.channel.close();
  EXPECT_TRUE(it.channel.is_closed());
  EXPECT_EQ(it.channel.send(9), ChannelStatus::closed);
  for (int i = 0; i < 3; ++i) ASSERT_EQ(*it.channel.recv(), i);
  EXPECT_EQ(it.channel.recv().status(), ChannelStatus::closed);
  EXPECT_EQ(it.channel.try_recv().status(), ChannelStatus::closed);
  EXPECT_EQ(it.channel.recv_for(1h).status(), ChannelStatus::closed);
  std::vector<int> out;
  EXPECT_EQ(it.channel.recv_many(out, 5), 0U);
  bool closed = false;
  EXPECT_EQ(it.channel.try_recv_many(out, 5, &closed), 0U);
  EXPECT_TRUE(closed);
}

TYPED_TEST(Channel, CloseWakesThoseWhoWaitToReceive) {
  typename TestFixture::template With<int> it(unbounded);
  std::vector<std::thread> receivers;
  std::atomic<int> ended{0};
  for (int i = 0; i < 3; ++i) {
    receivers.emplace_back([&] {
      EXPECT_EQ(it.channel.recv().status(), ChannelStatus::closed);
      ++ended;
    });
  }
  std::this_thread::sleep_for(20ms);  // most are asleep then; if not, the test is only less of one
  EXPECT_EQ(ended, 0);
  it.channel.close();
  for (auto& receiver : receivers) receiver.join();
}

TYPED_TEST(Channel, CloseWakesThoseWhoWaitToSend) {
  typename TestFixture::template With<int> it(ChannelCapacity::bounded(1));
  ASSERT_EQ(it.channel.send(0), ChannelStatus::ok);
  std::vector<std::thread> senders;
  for (int i = 0; i < 3; ++i) {
    senders.emplace_back([&] { EXPECT_EQ(it.channel.send(1), ChannelStatus::closed); });
  }
  std::this_thread::sleep_for(20ms);  // as above
  it.channel.close();
  for (auto& sender : senders) sender.join();
  EXPECT_EQ(it.channel.size(), 1U);
}

TYPED_TEST(Channel, ReceivingTimesOut) {
  typename TestFixture::template With<int> it(unbounded);
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(it.channel.recv_for(30ms).status(), ChannelStatus::timeout);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 30ms);
  EXPECT_EQ(it.channel.recv_for(0ms).status(), ChannelStatus::timeout);
  EXPECT_EQ(it.channel.recv_for(-1h).status(), ChannelStatus::timeout);
}

TYPED_TEST(Channel, ReceivingForALongTimeIsNotAnEternityInThePast) {
  typename TestFixture::template With<int> it(unbounded);
  std::thread sender([&] { ASSERT_EQ(it.channel.send(1), ChannelStatus::ok); });
  EXPECT_EQ(*it.channel.recv_for(std::chrono::hours(24 * 365)), 1);
  sender.join();
}

TYPED_TEST(Channel, SendingTimesOutWhenThereIsNoRoom) {
  typename TestFixture::template With<int> it(ChannelCapacity::bounded(1));
  ASSERT_EQ(it.channel.send_for(1, 1h), ChannelStatus::ok);
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(it.channel.send_for(2, 30ms), ChannelStatus::timeout);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 30ms);
  EXPECT_EQ(it.channel.size(), 1U);
}

TYPED_TEST(Channel, ReceivesManyAtOnce) {
  typename TestFixture::template With<std::unique_ptr<int>> it(unbounded);
  for (int i = 0; i < 100; ++i) ASSERT_EQ(it.channel.send(std::make_unique<int>(i)), ChannelStatus::ok);
  std::vector<std::unique_ptr<int>> out;
  out.push_back(nullptr);
  EXPECT_EQ(it.channel.recv_many(out, 0), 0U);
  std::size_t got = 0;
  while (got < 60) got += it.channel.recv_many(out, 60 - got);
  EXPECT_EQ(got, 60U);
  while (got < 100) got += it.channel.try_recv_many(out, 1000);
  ASSERT_EQ(out.size(), 101U);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(*out[static_cast<std::size_t>(i) + 1], i);
}

TYPED_TEST(Channel, CallsThatWouldBlockAThreadThatMustNotSaySo) {
  typename TestFixture::template With<int> it(ChannelCapacity::bounded(1));
  std::thread([&] {
    ++msgtrans::detail::must_not_block;
    EXPECT_EQ(it.channel.recv().status(), ChannelStatus::blocking_on_shard);
    EXPECT_EQ(it.channel.recv_for(1h).status(), ChannelStatus::blocking_on_shard);
    std::vector<int> out;
    EXPECT_EQ(it.channel.recv_many(out, 1), 0U);
    EXPECT_EQ(it.channel.send(1), ChannelStatus::ok) << "there is room";
    EXPECT_EQ(it.channel.send(2), ChannelStatus::blocking_on_shard);
    EXPECT_EQ(it.channel.send_for(2, 1h), ChannelStatus::blocking_on_shard);
    EXPECT_EQ(*it.channel.recv(), 1) << "there is something";
    --msgtrans::detail::must_not_block;
  }).join();
}

TYPED_TEST(Channel, EveryValueBuiltIsDestroyedOnce) {
  {
    typename TestFixture::template With<Counted> it(ChannelCapacity::bounded(50));
    for (int i = 0; i < 60; ++i) (void)it.channel.try_send(Counted(i));
    EXPECT_EQ(Counted::alive(), 50);
    for (int i = 0; i < 20; ++i) EXPECT_EQ(it.channel.try_recv()->value(), i);
    EXPECT_EQ(Counted::alive(), 30);
    std::vector<Counted> out;
    EXPECT_EQ(it.channel.try_recv_many(out, 5), 5U);
    EXPECT_EQ(Counted::alive(), 30);
    it.channel.close();
  }
  EXPECT_EQ(Counted::alive(), 0) << "what was left in the channel";
}

// Every way to wait, on a channel that is empty (to receive) or full (to send). Each ends when the channel is closed,
// and when it is destroyed.
template <class Channel>
std::vector<std::function<void(Channel&)>> ways_to_wait(bool to_receive) {
  if (to_receive) {
    return {[](Channel& channel) { EXPECT_EQ(channel.recv().status(), ChannelStatus::closed); },
            [](Channel& channel) { EXPECT_EQ(channel.recv_for(patience).status(), ChannelStatus::closed); },
            [](Channel& channel) {
              std::vector<int> out;
              auto status = ChannelStatus::ok;
              EXPECT_EQ(channel.recv_many(out, 4, &status), 0U);
              EXPECT_EQ(status, ChannelStatus::closed);
            }};
  }
  std::vector<std::function<void(Channel&)>> ways{
      [](Channel& channel) { EXPECT_EQ(channel.send(1), ChannelStatus::closed); },
      [](Channel& channel) { EXPECT_EQ(channel.send_for(1, patience), ChannelStatus::closed); }};
  if constexpr (requires(Channel & channel, std::span<int> values) { channel.send_many(values); }) {
    ways.push_back([](Channel& channel) {
      std::vector<int> values{1, 2, 3};
      auto status = ChannelStatus::ok;
      EXPECT_EQ(channel.send_many(values, &status), 0U);
      EXPECT_EQ(status, ChannelStatus::closed);
    });
  }
  return ways;
}

TYPED_TEST(Channel, CloseWakesEveryOneOfManyWhoWait) {
  using Made = typename TestFixture::template With<int>;
  for (const bool to_receive : {true, false}) {
    for (const auto& way : ways_to_wait<decltype(Made::channel)>(to_receive)) {
      Made it(ChannelCapacity::bounded(1));
      if (!to_receive) {
        ASSERT_EQ(it.channel.send(0), ChannelStatus::ok);
      }
      std::vector<std::thread> waiting;
      for (int i = 0; i < 4; ++i) waiting.emplace_back([&way, &channel = it.channel] { way(channel); });
      std::this_thread::sleep_for(2ms);  // most of them sleep by then; the others find it closed
      it.channel.close();
      for (auto& thread : waiting) thread.join();
    }
  }
}

TYPED_TEST(Channel, DestroyingItEndsWhoWaits) {
  using Made = typename TestFixture::template With<int>;
  for (const bool to_receive : {true, false}) {
    for (const auto& way : ways_to_wait<decltype(Made::channel)>(to_receive)) {
      for (int round = 0; round < 20; ++round) {
        auto it = std::make_unique<Made>(ChannelCapacity::bounded(1));
        if (!to_receive) {
          ASSERT_EQ(it->channel.send(0), ChannelStatus::ok);
        }
        std::array<std::atomic<pid_t>, 2> ids{};
        std::vector<std::thread> waiting;
        for (auto& id : ids) {
          waiting.emplace_back([&id, &way, &channel = it->channel] {
            id = ::gettid();
            way(channel);
          });
        }
        // A call that has not begun by then would be the caller's error. A sanitizer's own locks may let a thread sleep
        // on its way, but not for long.
        int in_a_row = 0;
        EXPECT_TRUE(msgtrans::test::wait_until([&] {
          const bool all =
              std::ranges::all_of(ids, [](const auto& id) { return id != 0 && msgtrans::test::is_asleep(id); });
          in_a_row = all ? in_a_row + 1 : 0;
          return in_a_row == 5;
        }));
        it.reset();
        for (auto& thread : waiting) thread.join();
      }
    }
  }
}

TYPED_TEST(Channel, CallsForManySayWhyThereAreNone) {
  typename TestFixture::template With<int> it(ChannelCapacity::bounded(2));
  auto& channel = it.channel;
  std::vector<int> out;
  auto status = ChannelStatus::closed;
  ++msgtrans::detail::must_not_block;
  EXPECT_EQ(channel.recv_many(out, 4, &status), 0U);
  EXPECT_EQ(status, ChannelStatus::blocking_on_shard);
  if constexpr (requires(std::span<int> values) { channel.send_many(values); }) {
    std::vector<int> values{1, 2, 3};
    EXPECT_EQ(channel.send_many(values, &status), 2U);
    EXPECT_EQ(status, ChannelStatus::blocking_on_shard);
  } else {
    (void)channel.send(1);
    (void)channel.send(2);
  }
  --msgtrans::detail::must_not_block;
  EXPECT_EQ(channel.recv_many(out, 4, &status), 2U);
  EXPECT_EQ(status, ChannelStatus::ok);
  EXPECT_EQ(out, (std::vector<int>{1, 2}));
  channel.close();
  EXPECT_EQ(channel.recv_many(out, 4, &status), 0U);
  EXPECT_EQ(status, ChannelStatus::closed);
}

// ---- histories

using msgtrans::test::ChannelWorkload;
using msgtrans::test::Item;
using msgtrans::test::Sent;

/// The calls that wait.
template <class Channel>
struct WaitingCalls {
  Channel& channel;
  Sent send(Item item) { return channel.send(std::move(item)) == ChannelStatus::ok ? Sent::ok : Sent::closed; }
  std::optional<Item> receive() {
    auto result = channel.recv();
    if (!result) return std::nullopt;
    return *result;
  }
  void close() { channel.close(); }
};

/// The calls that do not, again and again. Each that says no more than that must not have done anything.
template <class Channel>
struct TryingCalls {
  Channel& channel;
  Sent send(Item item) {
    for (;;) {
      switch (channel.try_send(std::move(item))) {
        case ChannelStatus::ok: return Sent::ok;
        case ChannelStatus::full: std::this_thread::yield(); break;
        default: return Sent::closed;
      }
    }
  }
  std::optional<Item> receive() {
    for (;;) {
      auto result = channel.try_recv();
      if (result) return *result;
      if (result.status() == ChannelStatus::closed) return std::nullopt;
      std::this_thread::yield();
    }
  }
  void close() { channel.close(); }
};

/// Those with a time that is often over.
template <class Channel>
struct CallsInTime {
  Channel& channel;
  Sent send(Item item) {
    auto status = ChannelStatus::timeout;
    while (status == ChannelStatus::timeout) status = channel.send_for(std::move(item), 2us);
    return status == ChannelStatus::ok ? Sent::ok : Sent::closed;
  }
  std::optional<Item> receive() {
    for (;;) {
      auto result = channel.recv_for(2us);
      if (result) return *result;
      if (result.status() == ChannelStatus::closed) return std::nullopt;
    }
  }
  void close() { channel.close(); }
};

template <template <class> class Calls, class With>
void check_histories(msgtrans::test::ChannelOrder order) {
  const int seeds = 6 * msgtrans::test::stress_factor();
  for (int seed = 1; seed <= seeds; ++seed) {
    for (const auto& capacity : {unbounded, ChannelCapacity::bounded(1), ChannelCapacity::bounded(7)}) {
      for (const auto& [producers, consumers] : {std::pair{1, 1}, std::pair{3, 1}, std::pair{1, 3}, std::pair{3, 3}}) {
        With it(capacity);
        Calls<decltype(it.channel)> calls{it.channel};
        const ChannelWorkload work{.producers = producers,
                                   .consumers = consumers,
                                   .items_each = 200,
                                   .close_early = seed % 2 == 0,
                                   .seed = static_cast<std::uint64_t>(seed)};
        const auto history = record_channel(calls, work);
        ASSERT_EQ(fault_of(history, order), "")
            << "seed " << seed << ", " << producers << "x" << consumers << ", capacity " << capacity.count();
      }
    }
  }
}

TYPED_TEST(Channel, HistoriesOfManyThreadsAreRight) {
  check_histories<WaitingCalls, typename TestFixture::template With<Item>>(TypeParam::order);
}
TYPED_TEST(Channel, HistoriesOfCallsThatDoNotWaitAreRight) {
  check_histories<TryingCalls, typename TestFixture::template With<Item>>(TypeParam::order);
}
TYPED_TEST(Channel, HistoriesOfCallsWhoseTimeIsOverAreRight) {
  check_histories<CallsInTime, typename TestFixture::template With<Item>>(TypeParam::order);
}

// Calls for many at a time: each value of such a call is sent, or received, during that call.

template <class Channel>
void send_in_batches(Channel& channel, HistoryClock& clock, ChannelHistory& part, int producer,
                     const ChannelWorkload& work) {
  std::mt19937_64 random(work.seed * 100 + static_cast<std::uint64_t>(producer));
  for (int next = 0; next < work.items_each;) {
    std::vector<Item> batch;
    const int count = std::min(1 + static_cast<int>(random() % 9), work.items_each - next);
    for (int i = 0; i < count; ++i) batch.push_back({producer, next++});
    const auto begin = clock.now();
    std::size_t sent = 0;
    if constexpr (requires { channel.send_many(std::span<Item>(batch)); }) {
      sent = channel.send_many(batch);
    } else {
      while (sent < batch.size() && channel.send(batch[sent]) == ChannelStatus::ok) ++sent;
    }
    const auto end = clock.now();
    for (std::size_t i = 0; i < batch.size(); ++i) {
      (i < sent ? part.sent : part.refused).push_back({batch[i], begin, end});
    }
  }
}

template <class Channel>
void receive_in_batches(Channel& channel, HistoryClock& clock, ChannelHistory& part, bool waits) {
  for (;;) {
    std::vector<Item> batch;
    const auto begin = clock.now();
    bool closed = false;
    if (waits) {
      closed = channel.recv_many(batch, 5) == 0;
    } else {
      (void)channel.try_recv_many(batch, 5, &closed);
    }
    const auto end = clock.now();
    for (const Item& item : batch) part.received.push_back({item, begin, end});
    if (batch.empty() && closed) {
      part.ends.push_back({{}, begin, end});
      return;
    }
    if (batch.empty()) std::this_thread::yield();
  }
}

TYPED_TEST(Channel, HistoriesOfCallsForManyAreRight) {
  const int seeds = 12 * msgtrans::test::stress_factor();
  for (int seed = 1; seed <= seeds; ++seed) {
    for (const auto& capacity : {unbounded, ChannelCapacity::bounded(1), ChannelCapacity::bounded(7)}) {
      typename TestFixture::template With<Item> it(capacity);
      auto& channel = it.channel;
      const ChannelWorkload work{.producers = 3,
                                 .consumers = 3,
                                 .items_each = 200,
                                 .close_early = seed % 2 == 0,
                                 .seed = static_cast<std::uint64_t>(seed)};
      HistoryClock clock;
      std::vector<ChannelHistory> parts(7);
      std::vector<std::thread> producers;
      std::vector<std::thread> consumers;
      for (std::size_t i = 0; i < 3; ++i) {
        producers.emplace_back([&, i] { send_in_batches(channel, clock, parts[i], static_cast<int>(i), work); });
        consumers.emplace_back([&, i] { receive_in_batches(channel, clock, parts[3 + i], i != 0); });
      }
      if (work.close_early) {
        for (int i = seed * 10 % 200; i > 0; --i) std::this_thread::yield();
      } else {
        for (auto& producer : producers) producer.join();
      }
      const auto begin = clock.now();
      channel.close();
      parts[6].close = ChannelHistory::Call{{}, begin, clock.now()};
      if (work.close_early) {
        for (auto& producer : producers) producer.join();
      }
      for (auto& consumer : consumers) consumer.join();
      ChannelHistory all;
      for (const auto& part : parts) all.append(part);
      ASSERT_EQ(fault_of(all, TypeParam::order), "") << "seed " << seed << ", capacity " << capacity.count();
    }
  }
}

// ---- histories of coroutines, each on a context with a thread of its own

constexpr auto as_tuple = boost::asio::as_tuple(boost::asio::use_awaitable);

awaitable<void> send_asynchronously(AsyncChannel<Item>& channel, HistoryClock& clock, ChannelHistory& part,
                                    int producer, int items, std::atomic<int>& sending) {
  for (int i = 0; i < items; ++i) {
    ChannelHistory::Call call{{producer, i}, clock.now(), 0};
    const auto [error, rejected] = co_await channel.async_send(call.item, as_tuple);
    call.end = clock.now();
    EXPECT_EQ(rejected.has_value(), static_cast<bool>(error));
    (error ? part.refused : part.sent).push_back(call);
  }
  --sending;
}
awaitable<void> receive_asynchronously(AsyncChannel<Item>& channel, HistoryClock& clock, ChannelHistory& part) {
  for (;;) {
    ChannelHistory::Call call{{}, clock.now(), 0};
    const auto [error, item] = co_await channel.async_recv(as_tuple);
    call.end = clock.now();
    if (!error) call.item = item;
    (error ? part.ends : part.received).push_back(call);
    if (error) co_return;
  }
}
awaitable<void> receive_many_asynchronously(AsyncChannel<Item>& channel, HistoryClock& clock, ChannelHistory& part) {
  for (;;) {
    const auto begin = clock.now();
    const auto [error, items] = co_await channel.async_recv_many(5, as_tuple);
    const auto end = clock.now();
    for (const Item& item : items) part.received.push_back({item, begin, end});
    if (!error) continue;
    part.ends.push_back({{}, begin, end});
    co_return;
  }
}

TEST(AsyncChannelHistories, OfCoroutinesAreRight) {
  const int seeds = 6 * msgtrans::test::stress_factor();
  for (int seed = 1; seed <= seeds; ++seed) {
    for (const auto& capacity : {unbounded, ChannelCapacity::bounded(1), ChannelCapacity::bounded(7)}) {
      constexpr int producers = 3;
      const bool close_early = seed % 2 == 0;
      HistoryClock clock;
      std::vector<ChannelHistory> parts(7);
      std::atomic<int> sending{producers};
      Contexts contexts(4);
      AsyncChannel<Item> channel(contexts[0].get_executor(), capacity);
      for (std::size_t i = 0; i < 3; ++i) {
        boost::asio::co_spawn(contexts[i],
                              send_asynchronously(channel, clock, parts[i], static_cast<int>(i), 200, sending),
                              boost::asio::detached);
        auto& received = parts[3 + i];
        boost::asio::co_spawn(contexts[i + 1],
                              i == 0 ? receive_many_asynchronously(channel, clock, received)
                                     : receive_asynchronously(channel, clock, received),
                              boost::asio::detached);
      }
      if (close_early) {
        for (int i = seed * 10 % 200; i > 0; --i) std::this_thread::yield();
      } else {
        EXPECT_TRUE(msgtrans::test::wait_until([&] { return sending == 0; }));
      }
      const auto begin = clock.now();
      channel.close();
      parts[6].close = ChannelHistory::Call{{}, begin, clock.now()};
      contexts.finish();
      ChannelHistory all;
      for (const auto& part : parts) all.append(part);
      ASSERT_EQ(fault_of(all, msgtrans::test::ChannelOrder::real_time), "")
          << "seed " << seed << ", capacity " << capacity.count();
    }
  }
}

}  // namespace
