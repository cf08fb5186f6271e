// SPDX-License-Identifier: Apache-2.0
// Hunts for lost wake-ups where many wait: whatever waits is made to wait, and woken, over and over; one wake that gets
// lost stops it all. wake_up_test.cpp does it with each operation by itself.
#include "support/counted.hpp"
#include "support/history.hpp"
#include "support/stress.hpp"
#include "support/wait.hpp"

#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <cstdint>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/channel/broadcast_channel.hpp>
#include <msgtrans/channel/sync_channel.hpp>
#include <msgtrans/lockfree/queue.hpp>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using namespace std::chrono_literals;
using asio::awaitable;

constexpr auto as_tuple = asio::as_tuple(asio::use_awaitable);

// ---- plain threads

template <class Channel>
void ping_pong(Channel& there, Channel& back, int rounds) {
  must_end(
      [&] {
        std::thread partner([&] {
          while (auto ball = there.recv()) back.send(std::move(*ball));
        });
        for (int i = 0; i < rounds; ++i) {
          there.send(i);
          const auto ball = i % 3 == 0 ? back.recv_for(stress_deadline) : back.recv();
          if (!ball) break;
        }
        there.close();
        partner.join();
      },
      [&] {
        there.close();
        back.close();
      });
}

TEST(LostWakeUps, OfThreadsThatReceiveFromASyncChannel) {
  SyncChannel<int> there(ChannelCapacity::unbounded());
  SyncChannel<int> back(ChannelCapacity::unbounded());
  ping_pong(there, back, 100000 * stress_factor());
}

TEST(LostWakeUps, OfThreadsThatReceiveFromAnAsyncChannel) {
  asio::io_context context;
  AsyncChannel<int> there(context.get_executor(), ChannelCapacity::unbounded());
  AsyncChannel<int> back(context.get_executor(), ChannelCapacity::unbounded());
  ping_pong(there, back, 100000 * stress_factor());
}

// With room for one value both sides wait in turn; with several of each, wakes are handed on.
template <class Channel>
void squeeze(Channel& channel, int values) {
  must_end(
      [&] {
        std::vector<std::thread> senders;
        std::vector<std::thread> receivers;
        std::atomic<long> sum{0};
        for (int t = 0; t < 3; ++t) {
          senders.emplace_back([&] {
            for (int i = 1; i <= values; ++i) channel.send(i);
          });
          receivers.emplace_back([&, t] {
            std::vector<int> many;
            for (;;) {
              many.clear();
              if (t == 0) {
                if (channel.recv_many(many, 4) == 0) return;
              } else if (auto one = channel.recv()) {
                many.push_back(*one);
              } else {
                return;
              }
              for (const int value : many) sum += value;
            }
          });
        }
        for (auto& sender : senders) sender.join();
        channel.close();
        for (auto& receiver : receivers) receiver.join();
        EXPECT_EQ(sum, 3L * values * (values + 1) / 2);
      },
      [&] { channel.close(); });
}

TEST(LostWakeUps, OfThreadsThatSendAndReceiveThroughOnePlace) {
  SyncChannel<int> sync(ChannelCapacity::bounded(1));
  squeeze(sync, 30000 * stress_factor());
  asio::io_context context;
  AsyncChannel<int> async(context.get_executor(), ChannelCapacity::bounded(1));
  squeeze(async, 30000 * stress_factor());
}

TEST(LostWakeUps, OfThreadsThatWaitForBroadcasts) {
  asio::io_context context;
  BroadcastChannel<int> there(context.get_executor(), 4);
  BroadcastChannel<std::string> back(context.get_executor(), 4);
  auto partners_end = there.subscribe();
  auto our_end = back.subscribe();
  must_end(
      [&] {
        std::thread partner([&] {
          while (auto ball = partners_end.next()) back.send(std::to_string(*ball));
        });
        for (int i = 0; i < 50000 * stress_factor(); ++i) {
          there.send(i);
          const auto ball = i % 3 == 0 ? our_end.next_for(stress_deadline) : our_end.next();
          if (!ball) break;
          ASSERT_EQ(*ball, std::to_string(i));
        }
        there.close();
        partner.join();
      },
      [&] {
        there.close();
        back.close();
      });
}

// ---- coroutines, each on a context of its own

awaitable<void> ping(AsyncChannel<int>& there, AsyncChannel<int>& back, int rounds, const Gate& done) {
  for (int i = 0; i < rounds; ++i) {
    auto [failed, rejected] = co_await there.async_send(i, as_tuple);
    if (failed) break;
    auto [error, ball] = co_await back.async_recv(as_tuple);
    if (error) break;
    EXPECT_EQ(ball, i);
  }
  there.close();
  done.open();
}
awaitable<void> pong(AsyncChannel<int>& there, AsyncChannel<int>& back) {
  std::vector<int> balls;
  for (;;) {
    balls.clear();
    auto [error, count] = co_await there.async_recv_many(balls, 3, as_tuple);
    if (error) co_return;
    for (const int ball : balls) (void)co_await back.async_send(ball, as_tuple);
  }
}

TEST(LostWakeUps, OfCoroutinesThatReceive) {
  Contexts contexts(2);
  AsyncChannel<int> there(contexts[0].get_executor(), ChannelCapacity::bounded(1));
  AsyncChannel<int> back(contexts[1].get_executor(), ChannelCapacity::unbounded());
  must_end(
      [&] {
        const Gate done;
        asio::co_spawn(contexts[0], ping(there, back, 20000 * stress_factor(), done), asio::detached);
        asio::co_spawn(contexts[1], pong(there, back), asio::detached);
        EXPECT_TRUE(done.wait(stress_deadline));
        contexts.finish();
      },
      [&] {
        there.close();
        back.close();
      });
}

awaitable<void> send_all(AsyncChannel<Counted>& channel, int values, std::atomic<int>& running) {
  for (int i = 1; i <= values; ++i) (void)co_await channel.async_send(Counted(i), as_tuple);
  if (--running == 0) channel.close();
}
awaitable<void> receive_all(AsyncChannel<Counted>& channel, std::atomic<long>& sum) {
  for (;;) {
    auto [error, value] = co_await channel.async_recv(as_tuple);
    if (error) co_return;
    sum += value.value();
  }
}

TEST(LostWakeUps, OfCoroutinesAndThreadsThatSendAndReceiveThroughOnePlace) {
  const long before = Counted::alive();
  const int values = 10000 * stress_factor();
  std::atomic<long> sum{0};
  {
    Contexts contexts(3);
    AsyncChannel<Counted> channel(contexts[0].get_executor(), ChannelCapacity::bounded(1));
    must_end(
        [&] {
          std::atomic<int> running{4};
          for (std::size_t i = 0; i < 3; ++i) {
            asio::co_spawn(contexts[i], send_all(channel, values, running), asio::detached);
            asio::co_spawn(contexts[(i + 1) % 3], receive_all(channel, sum), asio::detached);
          }
          std::thread sender([&] {
            for (int i = 1; i <= values; ++i) channel.send(Counted(i));
            if (--running == 0) channel.close();
          });
          std::thread receiver([&] {
            while (auto value = channel.recv()) sum += value->value();
          });
          sender.join();
          receiver.join();
          contexts.finish();
        },
        [&] { channel.close(); });
  }
  EXPECT_EQ(sum, 4L * values * (values + 1) / 2);
  EXPECT_EQ(Counted::alive(), before);
}

// ---- cancelling

/// Receives over and over, and is cancelled over and over, on a strand, at any moment; counts what it got.
class Cancelled : public std::enable_shared_from_this<Cancelled> {
 public:
  Cancelled(asio::io_context& context, AsyncChannel<int>& channel)
      : strand_(asio::make_strand(context)), channel_(channel) {}

  void receive() {
    channel_.async_recv(asio::bind_cancellation_slot(
        signal_.slot(), asio::bind_executor(strand_, [self = shared_from_this()](error_code error, int value) {
          if (!error) {
            self->sum_ += value;
          } else if (error != asio::error::operation_aborted) {
            return;
          } else {
            ++self->cancelled_;
          }
          self->receive();
        })));
  }
  void cancel() {
    asio::post(strand_, [self = shared_from_this()] { self->signal_.emit(asio::cancellation_type::terminal); });
  }
  [[nodiscard]] long sum() const { return sum_; }
  [[nodiscard]] long cancelled() const { return cancelled_; }

 private:
  asio::strand<asio::io_context::executor_type> strand_;
  AsyncChannel<int>& channel_;
  asio::cancellation_signal signal_;
  std::atomic<long> sum_{0};
  std::atomic<long> cancelled_{0};
};

TEST(LostWakeUps, WhenReceivesAreCancelledAtAnyMoment) {
  const int values = 50000 * stress_factor();
  Contexts contexts(2);
  AsyncChannel<int> channel(contexts[0].get_executor(), ChannelCapacity::unbounded());
  std::vector<std::shared_ptr<Cancelled>> receivers;
  for (std::size_t i = 0; i < 4; ++i) {
    receivers.push_back(std::make_shared<Cancelled>(contexts[i % 2], channel));
    asio::post(contexts[i % 2], [receiver = receivers.back()] { receiver->receive(); });
  }
  const auto total = [&receivers](auto of) {
    long sum = 0;
    for (const auto& receiver : receivers) sum += (*receiver.*of)();
    return sum;
  };
  must_end(
      [&] {
        std::atomic<bool> done{false};
        std::thread canceller([&] {
          std::mt19937 random(1);
          while (!done) {
            receivers[random() % receivers.size()]->cancel();
            if (random() % 4 == 0) std::this_thread::yield();
          }
        });
        long sent = 0;
        // How many that takes is the machine's business.
        const auto often_enough = [&] { return total(&Cancelled::cancelled) > values / 100 || channel.is_closed(); };
        for (int i = 1; i <= values || !often_enough(); ++i) {
          channel.send(i);
          sent += i;
          // Now and then all must have been received, and nobody left asleep beside a value.
          if (i % 16 != 0) continue;
          while (total(&Cancelled::sum) != sent && !channel.is_closed()) std::this_thread::yield();
        }
        done = true;
        canceller.join();
        channel.close();
        contexts.finish();
        EXPECT_EQ(total(&Cancelled::sum), sent);
        EXPECT_GE(sent, static_cast<long>(values) * (values + 1) / 2);
        EXPECT_GT(total(&Cancelled::cancelled), values / 100);
      },
      [&] { channel.close(); });
}

// ---- broadcast

struct Event {
  std::uint64_t publisher = 0;
  std::uint64_t number = 0;
  std::uint64_t check = 0;
};
Event make_event(std::uint64_t publisher, std::uint64_t number) {
  return {publisher, number, (publisher + 1) * 0x9e3779b97f4a7c15ULL ^ number};
}
bool is_whole(const Event& event) {
  return event.check == make_event(event.publisher, event.number).check;
}
bool is_whole(const std::shared_ptr<const Event>& event) {
  return is_whole(*event);
}
const Event& of(const Event& event) {
  return event;
}
const Event& of(const std::shared_ptr<const Event>& event) {
  return *event;
}
template <class T>
T make(std::uint64_t publisher, std::uint64_t number) {
  if constexpr (std::is_same_v<T, Event>) {
    return make_event(publisher, number);
  } else {
    return std::make_shared<const Event>(make_event(publisher, number));
  }
}

/// What a subscriber has seen: each publisher's in order, and all of them, counted.
struct Seen {
  template <class T>
  void add(const NextResult<T>& next) {
    if (!next) {
      missed += next.lagged();
      return;
    }
    ++events;
    if (!is_whole(*next)) ++torn;
    const Event& event = of(*next);
    auto& last = numbers[event.publisher];
    if (event.number <= last) ++out_of_order;
    last = event.number;
  }
  std::uint64_t events = 0;
  std::uint64_t missed = 0;
  std::uint64_t torn = 0;
  std::uint64_t out_of_order = 0;
  std::uint64_t numbers[4] = {};
};

template <class T>
awaitable<void> watch(Subscription<T> subscription, Seen& seen) {
  for (;;) {
    auto [error, next] = co_await subscription.async_next(as_tuple);
    if (error) co_return;
    seen.add(next);
  }
}

template <class T>
void broadcast_storm(std::size_t capacity, std::uint64_t each) {
  constexpr std::uint64_t publishers = 3;
  Contexts contexts(2);
  BroadcastChannel<T> channel(contexts[0].get_executor(), capacity);
  std::vector<Seen> seen(6);
  must_end(
      [&] {
        std::vector<std::thread> threads;
        for (std::size_t i = 0; i < 4; ++i) {
          asio::co_spawn(contexts[i % 2], watch(channel.subscribe(), seen[i]), asio::detached);
        }
        for (std::size_t i = 4; i < 6; ++i) {
          threads.emplace_back([subscription = std::make_shared<Subscription<T>>(channel.subscribe()), &seen, i] {
            for (;;) {
              const auto next = subscription->next();
              if (next.closed()) return;
              seen[i].add(next);
            }
          });
        }
        std::vector<std::thread> senders;
        for (std::uint64_t p = 0; p < publishers; ++p) {
          senders.emplace_back([&channel, p, each] {
            for (std::uint64_t i = 1; i <= each; ++i) {
              channel.send(make<T>(p, i));
              if (i % 64 == 0) std::this_thread::yield();
            }
          });
        }
        for (auto& sender : senders) sender.join();
        channel.close();
        for (auto& thread : threads) thread.join();
        contexts.finish();
      },
      [&] { channel.close(); });
  for (const Seen& one : seen) {
    EXPECT_EQ(one.events + one.missed, publishers * each);
    EXPECT_EQ(one.torn, 0U);
    EXPECT_EQ(one.out_of_order, 0U);
    EXPECT_GT(one.events, 0U);
  }
}

TEST(BroadcastStress, EveryEventIsSeenWholeAndInOrderOrCountedAsMissed) {
  const auto each = static_cast<std::uint64_t>(20000 * stress_factor());
  for (const std::size_t capacity : {1U, 2U, 16U, 1024U}) {
    broadcast_storm<Event>(capacity, each);
    broadcast_storm<std::shared_ptr<const Event>>(capacity, each);
  }
}

// ---- the queue below

struct RecordedQueue {
  lockfree::LockFreeQueue<Item> queue;
  std::atomic<bool> closed{false};

  Sent send(Item item) {
    queue.push(std::move(item));
    return Sent::ok;
  }
  std::optional<Item> receive() {
    for (;;) {
      const bool was_closed = closed;
      if (auto item = queue.try_pop()) return item;
      if (was_closed) return std::nullopt;
      std::this_thread::yield();
    }
  }
  void close() { closed = true; }
};

TEST(QueueStress, HistoriesAreFirstInFirstOut) {
  const int seeds = 30 * stress_factor();
  for (int seed = 1; seed <= seeds; ++seed) {
    RecordedQueue queue;
    const ChannelWorkload work{.producers = 1 + seed % 4,
                               .consumers = 1 + seed % 3,
                               .items_each = 400,
                               .seed = static_cast<std::uint64_t>(seed)};
    ASSERT_EQ(fault_of(record_channel(queue, work), ChannelOrder::real_time), "") << "seed " << seed;
    EXPECT_TRUE(queue.queue.empty());
    EXPECT_EQ(queue.queue.size_approx(), 0U);
  }
}

TEST(QueueStress, ManyAtATimeAreEachPoppedOnce) {
  const long before = Counted::alive();
  for (int round = 0; round < 20 * stress_factor(); ++round) {
    lockfree::LockFreeQueue<Counted> queue;
    constexpr int each = 2000;
    std::atomic<long> sum{0};
    std::atomic<int> popped{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        for (int i = 1; i <= each; ++i) queue.push(Counted(i));
      });
      threads.emplace_back([&, t] {
        while (popped < 3 * each - 100) {  // the rest is the destructor's
          const auto count = queue.try_pop_many(static_cast<std::size_t>(1 + t * 20),
                                                [&sum](Counted&& value) noexcept { sum += value.value(); });
          popped += static_cast<int>(count);
          if (count == 0) std::this_thread::yield();
        }
      });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(Counted::alive() - before, 3 * each - popped);
    EXPECT_EQ(queue.size_approx(), static_cast<std::size_t>(3 * each - popped));
  }
  EXPECT_EQ(Counted::alive(), before);
}

// ---- threads that come and go

TEST(ChannelStress, ThreadsByTheThousandLeaveNothingBehind) {
  SyncChannel<int> channel(ChannelCapacity::unbounded());
  long sum = 0;
  for (int i = 0; i < 3000; ++i) {
    std::thread([&channel, i] { channel.send(i); }).join();
    if (auto value = channel.recv()) sum += *value;
  }
  EXPECT_EQ(sum, 3000L * 2999 / 2);
  EXPECT_LE(channel.seats(), 2U) << "each takes over what the last one left";
}

}  // namespace
}  // namespace msgtrans::test
