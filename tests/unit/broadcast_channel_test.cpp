// SPDX-License-Identifier: Apache-2.0
#include "support/counting_allocator.hpp"
#include "support/wait.hpp"
#include "unit/allocation_failure.hpp"

#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_allocator.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <chrono>
#include <cstdint>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/channel/broadcast_channel.hpp>
#include <msgtrans/channel/event_broadcaster.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/lockfree/epoch.hpp>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

namespace asio = boost::asio;
using namespace std::chrono_literals;
using namespace asio::experimental::awaitable_operators;
using asio::awaitable;
using asio::use_awaitable;
using msgtrans::BroadcastChannel;
using msgtrans::ChannelStatus;
using msgtrans::Errc;
using msgtrans::error_code;
using msgtrans::EventBroadcaster;
using msgtrans::EventBroadcasterOptions;
using msgtrans::make_error_code;
using msgtrans::NextResult;
using msgtrans::Subscription;
using msgtrans::test::CountingAllocator;
using msgtrans::test::wait_until;

constexpr auto as_tuple = asio::as_tuple(use_awaitable);
const error_code aborted = asio::error::operation_aborted;
const error_code closed = make_error_code(Errc::closed);

// Events that lie in the ring, and such that have a node: every case for both.
template <class T>
T event(int number);
template <>
int event<int>(int number) {
  return number;
}
template <>
std::string event<std::string>(int number) {
  return "event number " + std::to_string(number);
}

template <class T>
class Broadcast : public testing::Test {
 protected:
  using Kind = typename NextResult<T>::Kind;
  asio::io_context context_{1};
};
struct Names {
  template <class T>
  static std::string GetName(int) {
    return std::is_same_v<T, int> ? "InTheRing" : "WithNodes";
  }
};
using Events = testing::Types<int, std::string>;
TYPED_TEST_SUITE(Broadcast, Events, Names);

TYPED_TEST(Broadcast, EverySubscriberGetsEveryEventInOrder) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 8);
  auto one = channel.subscribe();
  auto two = channel.subscribe();
  EXPECT_EQ(channel.subscribers(), 2U);
  for (int i = 0; i < 5; ++i) ASSERT_EQ(channel.send(event<TypeParam>(i)), ChannelStatus::ok);
  for (auto* subscription : {&one, &two}) {
    for (int i = 0; i < 5; ++i) {
      auto next = subscription->try_next();
      ASSERT_TRUE(next);
      EXPECT_EQ(*next, event<TypeParam>(i));
    }
    EXPECT_EQ(subscription->try_next().kind(), TestFixture::Kind::empty);
  }
  EXPECT_EQ(channel.sent(), 5U);
}

TYPED_TEST(Broadcast, ASubscriberBeginsWithTheEventsAfterIt) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 8);
  channel.send(event<TypeParam>(1));
  auto subscription = channel.subscribe();
  channel.send(event<TypeParam>(2));
  EXPECT_EQ(*subscription.try_next(), event<TypeParam>(2));
}

TYPED_TEST(Broadcast, CapacityIsAPowerOfTwoAndStated) {
  for (const auto& [asked, given] : {std::pair{1U, 1U}, {2U, 2U}, {3U, 4U}, {1000U, 1024U}}) {
    BroadcastChannel<TypeParam> channel(this->context_.get_executor(), asked);
    EXPECT_EQ(channel.capacity(), given);
  }
  for (const std::size_t bad : {std::size_t{0}, BroadcastChannel<TypeParam>::max_capacity + 1, ~std::size_t{0}}) {
    try {
      BroadcastChannel<TypeParam> channel(this->context_.get_executor(), bad);
      FAIL() << bad;
    } catch (const msgtrans::Exception& exception) {
      EXPECT_EQ(exception.code(), make_error_code(Errc::invalid_option));
    }
  }
}

TYPED_TEST(Broadcast, LagIsExactAlsoAfterSeveralLaps) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 4);
  for (const int sent : {4, 5, 8, 9, 23, 400}) {
    auto subscription = channel.subscribe();
    for (int i = 0; i < sent; ++i) channel.send(event<TypeParam>(i));
    if (sent > 4) {
      const auto lag = subscription.try_next();
      ASSERT_EQ(lag.kind(), TestFixture::Kind::lagged);
      EXPECT_EQ(lag.lagged(), static_cast<std::uint64_t>(sent - 4));
      EXPECT_FALSE(lag);
    }
    for (int i = sent - 4; i < sent; ++i) EXPECT_EQ(*subscription.try_next(), event<TypeParam>(i));
    EXPECT_EQ(subscription.try_next().kind(), TestFixture::Kind::empty);
    EXPECT_EQ(subscription.missed(), static_cast<std::uint64_t>(sent - 4));
  }
  EXPECT_EQ(channel.missed(), 0U + 1 + 4 + 5 + 19 + 396);
}

TYPED_TEST(Broadcast, AfterCloseWhatWasSentIsStillReceived) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 4);
  auto subscription = channel.subscribe();
  channel.send(event<TypeParam>(1));
  channel.close();
  channel.close();
  EXPECT_TRUE(channel.is_closed());
  EXPECT_EQ(channel.send(event<TypeParam>(2)), ChannelStatus::closed);
  EXPECT_EQ(channel.sent(), 1U);
  EXPECT_EQ(*subscription.next(), event<TypeParam>(1));
  EXPECT_TRUE(subscription.next().closed());
  EXPECT_TRUE(subscription.next_for(1h).closed());
}

TYPED_TEST(Broadcast, ASubscriptionOutlivesItsChannel) {
  auto channel = std::make_unique<BroadcastChannel<TypeParam>>(this->context_.get_executor(), 4);
  auto subscription = channel->subscribe();
  channel->send(event<TypeParam>(1));
  channel.reset();
  auto moved = std::move(subscription);
  EXPECT_EQ(*moved.try_next(), event<TypeParam>(1));
  EXPECT_TRUE(moved.try_next().closed());
}

TYPED_TEST(Broadcast, ClosingAndUnsubscribingWakeThreadsThatWait) {
  for (const bool by_close : {true, false}) {
    BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 4);
    auto subscription = channel.subscribe();
    auto other = channel.subscribe();
    std::thread one([&] { EXPECT_TRUE(subscription.next().closed()); });
    std::thread two([&] {
      const auto next = other.next_for(by_close ? 1h : 50ms);
      EXPECT_EQ(next.kind(), by_close ? TestFixture::Kind::closed : TestFixture::Kind::timeout);
    });
    std::this_thread::sleep_for(10ms);  // most are asleep then; if not, the test is only less of one
    if (by_close) {
      channel.close();
    } else {
      subscription.unsubscribe();
    }
    one.join();
    two.join();
  }
}

TYPED_TEST(Broadcast, AnEventWakesEveryThreadThatWaits) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 4);
  std::vector<std::thread> threads;
  for (int i = 0; i < 5; ++i) {
    threads.emplace_back([subscription = std::make_shared<Subscription<TypeParam>>(channel.subscribe())] {
      EXPECT_EQ(*subscription->next(), event<TypeParam>(1));
    });
  }
  std::this_thread::sleep_for(10ms);  // as above
  channel.send(event<TypeParam>(1));
  for (auto& thread : threads) thread.join();
}

TYPED_TEST(Broadcast, WaitingTimesOutAndIsRefusedWhereItMustNotBlock) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 4);
  auto subscription = channel.subscribe();
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(subscription.next_for(30ms).kind(), TestFixture::Kind::timeout);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, 30ms);
  std::thread([&] {
    ++msgtrans::detail::must_not_block;
    EXPECT_EQ(subscription.next().kind(), TestFixture::Kind::blocking_on_shard);
    --msgtrans::detail::must_not_block;
  }).join();
}

TYPED_TEST(Broadcast, AsynchronousReceivesGetEventsLagAndTheEnd) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 2);
  auto subscription = channel.subscribe();
  for (int i = 0; i < 5; ++i) channel.send(event<TypeParam>(i));
  std::vector<std::string> seen;
  std::function<void(error_code, NextResult<TypeParam>)> handler = [&](error_code error, NextResult<TypeParam> next) {
    if (error) return seen.push_back(error == closed ? "closed" : error.message());
    seen.push_back(next ? "event" : "lagged " + std::to_string(next.lagged()));
    if (next) {
      const bool expected = *next == event<TypeParam>(static_cast<int>(seen.size()) + 1);
      EXPECT_TRUE(expected);
    }
    subscription.async_next(handler);
  };
  subscription.async_next(handler);
  EXPECT_TRUE(seen.empty()) << "never inside the call";
  this->context_.poll();
  EXPECT_EQ(seen, (std::vector<std::string>{"lagged 3", "event", "event"}));
  channel.close();
  this->context_.restart();
  this->context_.run();
  EXPECT_EQ(seen.back(), "closed");
}

TYPED_TEST(Broadcast, ParkedReceivesAreWokenByEventsCloseAndUnsubscribing) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 4);
  auto a = channel.subscribe();
  auto b = channel.subscribe();
  auto future_a = a.async_next(asio::use_future);
  auto future_b = b.async_next(asio::use_future);
  this->context_.poll();
  channel.send(event<TypeParam>(7));
  this->context_.restart();
  this->context_.poll();
  EXPECT_EQ(*future_a.get(), event<TypeParam>(7));
  EXPECT_EQ(*future_b.get(), event<TypeParam>(7));
  error_code error_a;
  error_code error_b;
  a.async_next([&](error_code error, const NextResult<TypeParam>&) { error_a = error; });
  b.async_next([&](error_code error, const NextResult<TypeParam>&) { error_b = error; });
  this->context_.restart();
  this->context_.poll();
  a.unsubscribe();
  this->context_.restart();
  this->context_.poll();
  EXPECT_EQ(error_a, closed);
  EXPECT_FALSE(error_b);
  channel.close();
  this->context_.restart();
  this->context_.run();
  EXPECT_EQ(error_b, closed);
}

TYPED_TEST(Broadcast, CancellingLosesNoEvent) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 4);
  auto subscription = channel.subscribe();
  asio::cancellation_signal signal;
  error_code result;
  subscription.async_next(asio::bind_cancellation_slot(
      signal.slot(), [&](error_code error, const NextResult<TypeParam>&) { result = error; }));
  this->context_.poll();
  channel.send(event<TypeParam>(1));  // wakes it
  signal.emit(asio::cancellation_type::all);
  this->context_.restart();
  this->context_.run();
  EXPECT_EQ(result, aborted);
  EXPECT_EQ(*subscription.try_next(), event<TypeParam>(1));
}

template <class T>
awaitable<void> race_with_timer(Subscription<T>& subscription, std::uint64_t& seen, std::atomic<int>& timeouts) {
  asio::steady_timer timer(co_await asio::this_coro::executor);
  for (;;) {
    timer.expires_after(20us);
    const auto first = co_await (subscription.async_next(as_tuple) || timer.async_wait(as_tuple));
    if (first.index() == 1) {
      ++timeouts;
      continue;
    }
    const auto& [error, next] = std::get<0>(first);
    if (error) co_return;
    seen += next ? 1 : next.lagged();
  }
}

TYPED_TEST(Broadcast, ReceivingOrATimerLosesNoEvent) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 64);
  auto subscription = channel.subscribe();
  std::uint64_t seen = 0;
  std::atomic<int> timeouts{0};
  asio::co_spawn(this->context_, race_with_timer(subscription, seen, timeouts), asio::detached);
  std::thread runner([&] { this->context_.run(); });
  constexpr int events = 10000;
  for (int i = 0; i < events; ++i) {
    channel.send(event<TypeParam>(i));
    if (i % 50 != 0) continue;
    const int before = timeouts;
    ASSERT_TRUE(wait_until([&] { return timeouts > before; }));
  }
  channel.close();
  runner.join();
  EXPECT_EQ(seen, static_cast<std::uint64_t>(events));
}

TYPED_TEST(Broadcast, OperationsLeftInADestroyedContextAreDestroyed) {
  auto context = std::make_unique<asio::io_context>();
  BroadcastChannel<TypeParam> channel(context->get_executor(), 4);
  auto one = channel.subscribe();
  auto two = channel.subscribe();
  const auto token = std::make_shared<int>(0);
  one.async_next([token](error_code, const NextResult<TypeParam>&) {});
  context->poll();
  two.async_next([token](error_code, const NextResult<TypeParam>&) {});
  EXPECT_EQ(token.use_count(), 3);
  context.reset();
  EXPECT_EQ(token.use_count(), 1);
}

// ---- waking many

struct CountingExecutor {
  asio::io_context::executor_type inner;
  std::atomic<int>* posts;

  asio::execution_context& query(asio::execution::context_t) const noexcept { return inner.context(); }
  static constexpr asio::execution::blocking_t query(asio::execution::blocking_t) noexcept {
    return asio::execution::blocking.never;
  }
  CountingExecutor require(asio::execution::blocking_t::never_t) const { return *this; }
  template <class F>
  void execute(F f) const {
    ++*posts;
    asio::post(inner, std::move(f));
  }
  friend bool operator==(const CountingExecutor&, const CountingExecutor&) noexcept = default;
};

awaitable<void> count_events(Subscription<int> subscription, int& seen) {
  for (;;) {
    auto [error, next] = co_await subscription.async_next(as_tuple);
    if (error) co_return;
    ++seen;
  }
}

TYPED_TEST(Broadcast, HandlersRunOnTheirExecutor) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 8);
  auto subscription = channel.subscribe();
  asio::thread_pool pool(1);
  std::atomic<bool> on_pool{false};
  subscription.async_next(asio::bind_executor(pool.get_executor(), [&](error_code error, NextResult<TypeParam> next) {
    on_pool = !error && next && pool.get_executor().running_in_this_thread();
  }));
  channel.send(event<TypeParam>(1));
  pool.join();  // what waits counts as work there
  EXPECT_TRUE(on_pool);
}

TYPED_TEST(Broadcast, MemoryComesFromTheHandlersAllocatorAndIsGivenBackBeforeTheCall) {
  BroadcastChannel<TypeParam> channel(this->context_.get_executor(), 8);
  auto subscription = channel.subscribe();
  int allocated = 0;
  int alive = 0;
  int alive_in_handler = -1;
  subscription.async_next(
      asio::bind_allocator(CountingAllocator<int>(allocated, alive),
                           [&](error_code, const NextResult<TypeParam>&) { alive_in_handler = alive; }));
  this->context_.poll();
  EXPECT_GT(allocated, 0);
  EXPECT_EQ(alive_in_handler, -1);
  channel.send(event<TypeParam>(1));
  this->context_.restart();
  this->context_.run();
  EXPECT_EQ(alive_in_handler, 0);
  EXPECT_EQ(alive, 0);
}

TEST(BroadcastWaking, AnEventIsOnePostForAllOfOneExecutor) {
  asio::io_context context(1);
  BroadcastChannel<int> channel(context.get_executor(), 64);
  std::atomic<int> posts{0};
  int seen = 0;
  const asio::any_io_executor executor = CountingExecutor{context.get_executor(), &posts};
  for (int i = 0; i < 20; ++i) asio::co_spawn(executor, count_events(channel.subscribe(), seen), asio::detached);
  context.poll();  // all have parked
  posts = 0;
  channel.send(1);
  EXPECT_EQ(posts, 1);
  context.restart();
  context.poll();
  EXPECT_EQ(seen, 20);
  channel.close();
  context.restart();
  context.run();
}

TEST(BroadcastWaking, AHandlerThatThrowsTakesNoOtherAlong) {
  asio::io_context context(1);
  BroadcastChannel<int> channel(context.get_executor(), 64);
  std::vector<Subscription<int>> subscriptions;
  int seen = 0;
  for (int i = 0; i < 5; ++i) {
    subscriptions.push_back(channel.subscribe());
    subscriptions.back().async_next([&seen, i](error_code, const NextResult<int>&) {
      ++seen;
      if (i == 1) throw std::runtime_error("thrown");
    });
  }
  context.poll();
  channel.send(1);
  context.restart();
  EXPECT_THROW(context.run(), std::runtime_error);
  context.run();
  EXPECT_EQ(seen, 5);
}

// ---- what an event is made of

struct Copied {
  static inline int alive = 0;
  static inline bool throws = false;
  Copied() { ++alive; }
  Copied(const Copied&) {
    if (throws) throw std::runtime_error("copy");
    ++alive;
  }
  Copied(Copied&&) noexcept { ++alive; }
  ~Copied() { --alive; }
};

TEST(BroadcastEvents, EveryValueBuiltIsDestroyedOnce) {
  asio::io_context context;
  {
    BroadcastChannel<Copied> channel(context.get_executor(), 4);
    auto subscription = channel.subscribe();
    for (int i = 0; i < 100; ++i) channel.send(Copied());
    while (subscription.try_next().kind() != NextResult<Copied>::Kind::empty) {
    }
  }
  msgtrans::lockfree::Epoch::collect();
  EXPECT_EQ(Copied::alive, 0);
}

TEST(BroadcastEvents, ACopyThatThrowsLeavesTheEventToBeReceived) {
  asio::io_context context;
  BroadcastChannel<Copied> channel(context.get_executor(), 4);
  auto subscription = channel.subscribe();
  channel.send(Copied());
  Copied::throws = true;
  EXPECT_THROW((void)subscription.try_next(), std::runtime_error);
  error_code result;
  subscription.async_next([&](error_code error, const NextResult<Copied>&) { result = error; });
  context.run();
  EXPECT_EQ(result, boost::system::errc::not_enough_memory);
  Copied::throws = false;
  EXPECT_TRUE(subscription.try_next());
}

TEST(BroadcastEvents, ASendWithoutMemorySendsNothing) {
  asio::io_context context;
  BroadcastChannel<std::string> channel(context.get_executor(), 4);
  auto subscription = channel.subscribe();
  std::string text(100, 'x');
  {
    const msgtrans::test::AllocationFailure failing(0);
    EXPECT_THROW(channel.send(std::move(text)), std::bad_alloc);
  }
  EXPECT_EQ(channel.sent(), 0U);
  channel.send("next");
  EXPECT_EQ(*subscription.try_next(), "next");
}

TEST(BroadcastEvents, AnEventThatCannotBeSentStaysTheCallers) {
  asio::io_context context;
  BroadcastChannel<std::string> channel(context.get_executor(), 4);
  channel.close();
  std::string text(100, 'x');
  EXPECT_EQ(channel.send(std::move(text)), ChannelStatus::closed);
  EXPECT_EQ(text, std::string(100, 'x'));

  // Also when the close comes between its look and its place.
  for (int round = 0; round < 500; ++round) {
    BroadcastChannel<std::string> racing(context.get_executor(), 4);
    std::atomic<int> ready{0};
    std::thread closer([&] {
      ++ready;
      while (ready != 2) std::this_thread::yield();
      racing.close();
    });
    ++ready;
    while (ready != 2) std::this_thread::yield();
    for (;;) {
      std::string event(40, 'y');
      if (racing.send(std::move(event)) == ChannelStatus::ok) continue;
      ASSERT_EQ(event, std::string(40, 'y'));
      break;
    }
    closer.join();
  }
}

// ---- EventBroadcaster

TEST(EventBroadcasters, SendWhatIsPublishedToAllAndEndAfterTheRest) {
  asio::io_context context(1);
  EventBroadcaster<std::string> broadcaster(context.get_executor());
  auto one = broadcaster.subscribe();
  auto two = broadcaster.subscribe();
  for (int i = 0; i < 100; ++i) ASSERT_EQ(broadcaster.publish(std::to_string(i)), ChannelStatus::ok);
  broadcaster.stop();
  EXPECT_EQ(broadcaster.publish("late"), ChannelStatus::closed);
  context.run();
  for (auto* subscription : {&one, &two}) {
    for (int i = 0; i < 100; ++i) EXPECT_EQ(*subscription->try_next(), std::to_string(i));
    EXPECT_TRUE(subscription->try_next().closed());
  }
  const auto statistics = broadcaster.statistics();
  EXPECT_EQ(statistics.published, 100U);
  EXPECT_EQ(statistics.broadcast, 100U);
  EXPECT_EQ(statistics.dropped, 1U);
  EXPECT_EQ(statistics.subscribers, 2U);
}

TEST(EventBroadcasters, CountWhatDoesNotFit) {
  asio::io_context context(1);
  EventBroadcasterOptions<int> options;
  options.input_capacity = 3;
  EventBroadcaster<int> broadcaster(context.get_executor(), std::move(options));
  for (int i = 0; i < 3; ++i) EXPECT_EQ(broadcaster.publish(i), ChannelStatus::ok);
  EXPECT_EQ(broadcaster.publish(3), ChannelStatus::full);
  EXPECT_EQ(broadcaster.statistics().dropped, 1U);
}

TEST(EventBroadcasters, TickAlsoWhileThereIsAlwaysSomethingElse) {
  asio::io_context context(1);
  int ticks = 0;
  EventBroadcasterOptions<int> options;
  options.tick = 1ms;
  options.on_tick = [&ticks]() -> std::optional<int> {
    if (++ticks == 2) throw std::runtime_error("thrown");
    return -ticks;
  };
  EventBroadcaster<int> broadcaster(context.get_executor(), std::move(options));
  auto subscription = broadcaster.subscribe();
  std::atomic<bool> done{false};
  std::thread runner([&] { context.run(); });
  std::thread publisher([&] {
    while (!done) (void)broadcaster.publish(1);
  });
  int seen = 0;
  std::vector<int> ticked;
  while (ticked.size() < 3 || seen == 0) {
    const auto next = subscription.next();
    if (next && *next < 0) ticked.push_back(*next);
    if (next && *next > 0) ++seen;
  }
  done = true;
  publisher.join();
  broadcaster.stop();
  runner.join();
  EXPECT_GT(seen, 0);
  EXPECT_EQ(broadcaster.statistics().failed_ticks, 1U);
  EXPECT_GE(broadcaster.statistics().ticks, 3U);
}

/// Reads what is left, up to the end; how many.
template <class T>
std::uint64_t drain(Subscription<T>& subscription) {
  std::uint64_t events = 0;
  for (;;) {
    const auto next = subscription.try_next();
    if (next) {
      ++events;
      continue;
    }
    EXPECT_TRUE(next.closed());
    return events;
  }
}

TEST(EventBroadcasters, EndWithTheirContextAndCountWhatIsLost) {
  for (const bool begun : {false, true}) {
    for (const bool stopped : {false, true}) {
      auto context = std::make_unique<asio::io_context>(1);
      EventBroadcaster<std::string> broadcaster(context->get_executor());
      auto subscription = broadcaster.subscribe();
      std::uint64_t sent = 0;
      if (begun) {
        for (; sent < 3; ++sent) ASSERT_EQ(broadcaster.publish("sent"), ChannelStatus::ok);
        context->poll();
      }
      for (int i = 0; i < 5; ++i) ASSERT_EQ(broadcaster.publish("lost"), ChannelStatus::ok);
      int calls = 0;
      if (stopped) broadcaster.stop([&calls] { ++calls; });
      std::thread sleeper([&broadcaster, waiting = broadcaster.subscribe()]() mutable {
        EXPECT_TRUE(waiting.next().closed());
        EXPECT_EQ(broadcaster.publish("late"), ChannelStatus::closed);
      });
      context.reset();
      sleeper.join();
      EXPECT_EQ(calls, stopped ? 1 : 0);
      broadcaster.stop([&calls] { ++calls; });
      EXPECT_EQ(calls, stopped ? 2 : 1) << "it has ended already";
      EXPECT_EQ(drain(subscription), sent);
      const auto statistics = broadcaster.statistics();
      EXPECT_EQ(statistics.published, sent + 5);
      EXPECT_EQ(statistics.broadcast, sent);
      EXPECT_EQ(statistics.lost, 5U);
      EXPECT_EQ(statistics.dropped, 1U);
    }
  }
}

TEST(EventBroadcasters, BadOptionsAreRefused) {
  asio::io_context context;
  const auto code_of = [&](EventBroadcasterOptions<int> options) {
    try {
      EventBroadcaster<int> broadcaster(context.get_executor(), std::move(options));
    } catch (const msgtrans::Exception& exception) {
      return exception.code();
    }
    return error_code();
  };
  EventBroadcasterOptions<int> no_input;
  no_input.input_capacity = 0;
  EventBroadcasterOptions<int> no_ring;
  no_ring.ring_capacity = 0;
  EventBroadcasterOptions<int> no_function;
  no_function.tick = 1s;
  EventBroadcasterOptions<int> negative;
  negative.tick = -1s;
  for (const auto& bad : {no_input, no_ring, no_function, negative}) {
    EXPECT_EQ(code_of(bad), make_error_code(Errc::invalid_option));
  }
}

}  // namespace
