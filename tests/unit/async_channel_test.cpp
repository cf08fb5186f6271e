// SPDX-License-Identifier: Apache-2.0
// What AsyncChannel does beyond blocking calls, which tests/conformance has.
#include "support/counted.hpp"
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
#include <boost/asio/deferred.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <chrono>
#include <cstddef>
#include <deque>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/channel/channel_strategy.hpp>
#include <msgtrans/error.hpp>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace {

namespace asio = boost::asio;
using namespace std::chrono_literals;
using namespace asio::experimental::awaitable_operators;
using asio::awaitable;
using asio::use_awaitable;
using msgtrans::AsyncChannel;
using msgtrans::ChannelCapacity;
using msgtrans::ChannelStatus;
using msgtrans::Errc;
using msgtrans::error_code;
using msgtrans::make_error_code;
using msgtrans::test::Counted;
using msgtrans::test::CountingAllocator;

constexpr auto as_tuple = asio::as_tuple(use_awaitable);
const auto unbounded = ChannelCapacity::unbounded();
const error_code aborted = asio::error::operation_aborted;
const error_code closed = make_error_code(Errc::closed);

static_assert(
    std::is_same_v<msgtrans::Channel<msgtrans::ChannelStrategy::sync_high_perf, int>, msgtrans::SyncChannel<int>>);
static_assert(std::is_same_v<msgtrans::Channel<msgtrans::ChannelStrategy::async_high_perf, int>, AsyncChannel<int>>);
static_assert(
    std::is_same_v<msgtrans::Channel<msgtrans::ChannelStrategy::broadcast, int>, msgtrans::BroadcastChannel<int>>);

class AsyncChannels : public testing::Test {
 protected:
  asio::io_context context_{1};
};

TEST_F(AsyncChannels, NothingCompletesInsideTheCall) {
  AsyncChannel<int> channel(context_.get_executor(), unbounded);
  ASSERT_EQ(channel.try_send(1), ChannelStatus::ok);
  int calls = 0;
  asio::post(context_, [&] {
    channel.async_recv([&](error_code, int) { ++calls; });
    channel.async_send(2, [&](error_code, std::optional<int>) { ++calls; });
    std::vector<int> out;
    channel.async_recv_many(0, [&](error_code, std::vector<int>) { ++calls; });
    EXPECT_EQ(calls, 0);
  });
  context_.run();
  EXPECT_EQ(calls, 3);
}

TEST_F(AsyncChannels, ReceivesWhatComesLater) {
  AsyncChannel<std::string> channel(context_.get_executor(), unbounded);
  std::string got;
  channel.async_recv([&](error_code error, std::string value) {
    EXPECT_FALSE(error);
    got = std::move(value);
  });
  std::thread runner([&] { context_.run(); });
  ASSERT_EQ(channel.send("hello"), ChannelStatus::ok);
  runner.join();
  EXPECT_EQ(got, "hello");
}

TEST_F(AsyncChannels, TakesFuturesAndDeferred) {
  AsyncChannel<int> channel(context_.get_executor(), unbounded);
  ASSERT_EQ(channel.try_send(5), ChannelStatus::ok);
  auto future = channel.async_recv(asio::use_future);
  auto deferred = channel.async_recv(asio::deferred);
  int got = 0;
  std::move(deferred)([&](error_code, int value) { got = value; });
  ASSERT_EQ(channel.try_send(6), ChannelStatus::ok);
  context_.run();
  EXPECT_EQ(future.get() + got, 11);
  channel.close();
  auto failing = channel.async_recv(asio::use_future);
  context_.restart();
  context_.run();
  try {
    failing.get();
    FAIL();
  } catch (const boost::system::system_error& error) {
    EXPECT_EQ(error.code(), closed);
  }
}

awaitable<void> receive_all(AsyncChannel<std::unique_ptr<int>>& channel, std::vector<int>& got) {
  for (;;) {
    auto [error, value] = co_await channel.async_recv(as_tuple);
    if (error) co_return;
    got.push_back(*value);
  }
}
awaitable<void> send_all(AsyncChannel<std::unique_ptr<int>>& channel, int count) {
  for (int i = 0; i < count; ++i) {
    auto rejected = co_await channel.async_send(std::make_unique<int>(i), use_awaitable);
    EXPECT_FALSE(rejected);
  }
  channel.close();
}

TEST_F(AsyncChannels, CoroutinesPassMoveOnlyValuesThroughOnePlace) {
  AsyncChannel<std::unique_ptr<int>> channel(context_.get_executor(), ChannelCapacity::bounded(1));
  std::vector<int> got;
  asio::co_spawn(context_, receive_all(channel, got), asio::detached);
  asio::co_spawn(context_, send_all(channel, 1000), asio::detached);
  context_.run();
  ASSERT_EQ(got.size(), 1000U);
  for (int i = 0; i < 1000; ++i) EXPECT_EQ(got[static_cast<std::size_t>(i)], i);
}

TEST_F(AsyncChannels, ReceivesManyIntoTheCallersVectorAndIntoItsOwn) {
  AsyncChannel<int> channel(context_.get_executor(), unbounded);
  for (int i = 0; i < 10; ++i) ASSERT_EQ(channel.try_send(i), ChannelStatus::ok);
  std::vector<int> mine{-1};
  std::vector<int> theirs;
  channel.async_recv_many(mine, 4, [&](error_code error, std::size_t count) {
    EXPECT_FALSE(error);
    EXPECT_EQ(count, 4U);
    channel.async_recv_many(100, [&](error_code again, std::vector<int> values) {
      EXPECT_FALSE(again);
      theirs = std::move(values);
    });
  });
  context_.run();
  EXPECT_EQ(mine, (std::vector<int>{-1, 0, 1, 2, 3}));
  EXPECT_EQ(theirs, (std::vector<int>{4, 5, 6, 7, 8, 9}));
}

TEST_F(AsyncChannels, AFullChannelHoldsTheSenderUntilThereIsRoom) {
  AsyncChannel<int> channel(context_.get_executor(), ChannelCapacity::bounded(2));
  ASSERT_EQ(channel.try_send(1), ChannelStatus::ok);
  ASSERT_EQ(channel.try_send(2), ChannelStatus::ok);
  bool sent = false;
  channel.async_send(3, [&](error_code error, std::optional<int> rejected) {
    EXPECT_FALSE(error);
    EXPECT_FALSE(rejected);
    sent = true;
  });
  context_.poll();
  EXPECT_FALSE(sent);
  EXPECT_EQ(channel.size(), 2U);
  EXPECT_EQ(*channel.try_recv(), 1);
  context_.run();
  EXPECT_TRUE(sent);
  EXPECT_EQ(channel.size(), 2U);
}

TEST_F(AsyncChannels, CloseEndsWhoWaitsAndGivesValuesBack) {
  AsyncChannel<std::unique_ptr<int>> full(context_.get_executor(), ChannelCapacity::bounded(1));
  ASSERT_EQ(full.try_send(std::make_unique<int>(0)), ChannelStatus::ok);
  AsyncChannel<int> empty(context_.get_executor(), unbounded);
  int ended = 0;
  for (int i = 1; i <= 3; ++i) {
    full.async_send(std::make_unique<int>(i), [&ended, i](error_code error, std::optional<std::unique_ptr<int>> mine) {
      EXPECT_EQ(error, closed);
      ASSERT_TRUE(mine);
      EXPECT_EQ(**mine, i);
      ++ended;
    });
    empty.async_recv([&ended](error_code error, int) {
      EXPECT_EQ(error, closed);
      ++ended;
    });
    empty.async_recv_many(5, [&ended](error_code error, std::vector<int> values) {
      EXPECT_EQ(error, closed);
      EXPECT_TRUE(values.empty());
      ++ended;
    });
  }
  context_.poll();
  EXPECT_EQ(ended, 0);
  full.close();
  empty.close();
  context_.run();
  EXPECT_EQ(ended, 9);
  EXPECT_EQ(**full.try_recv(), 0) << "what was accepted before";
}

TEST_F(AsyncChannels, DestroyingItEndsWhoWaitsAsynchronously) {
  auto channel = std::make_unique<AsyncChannel<int>>(context_.get_executor(), unbounded);
  int ended = 0;
  for (int i = 0; i < 3; ++i) {
    channel->async_recv([&](error_code error, int) {
      EXPECT_EQ(error, closed);
      ++ended;
    });
  }
  context_.poll();
  channel.reset();
  context_.run();
  EXPECT_EQ(ended, 3);
}

TEST_F(AsyncChannels, CancellingAParkedReceiveLosesNothing) {
  AsyncChannel<int> channel(context_.get_executor(), unbounded);
  asio::cancellation_signal signal;
  error_code result;
  channel.async_recv(asio::bind_cancellation_slot(signal.slot(), [&](error_code error, int) { result = error; }));
  int got = 0;
  channel.async_recv([&](error_code, int value) { got = value; });
  context_.poll();
  signal.emit(asio::cancellation_type::none);
  context_.restart();
  context_.poll();
  EXPECT_FALSE(result);
  signal.emit(asio::cancellation_type::partial);
  ASSERT_EQ(channel.try_send(8), ChannelStatus::ok);
  context_.restart();
  context_.run();
  EXPECT_EQ(result, aborted);
  EXPECT_EQ(got, 8) << "the other one was woken";
  EXPECT_FALSE(signal.slot().has_handler()) << "the slot is free again";
}

// It was woken for a value already when it is cancelled: the value and the wake go to the next.
TEST_F(AsyncChannels, CancellingAWokenReceivePassesTheWakeOn) {
  AsyncChannel<int> channel(context_.get_executor(), unbounded);
  asio::cancellation_signal signal;
  error_code first;
  std::optional<int> second;
  channel.async_recv(asio::bind_cancellation_slot(signal.slot(), [&](error_code error, int) { first = error; }));
  channel.async_recv([&](error_code, int value) { second = value; });
  context_.poll();
  ASSERT_EQ(channel.try_send(9), ChannelStatus::ok);  // wakes the first
  signal.emit(asio::cancellation_type::all);
  context_.restart();
  context_.run();
  EXPECT_EQ(first, aborted);
  EXPECT_EQ(second, 9);
}

TEST_F(AsyncChannels, CancellingASendGivesTheValueBack) {
  AsyncChannel<std::string> channel(context_.get_executor(), ChannelCapacity::bounded(1));
  ASSERT_EQ(channel.try_send("full"), ChannelStatus::ok);
  asio::cancellation_signal signal;
  std::optional<std::string> back;
  channel.async_send(
      "mine", asio::bind_cancellation_slot(signal.slot(), [&](error_code error, std::optional<std::string> rejected) {
        EXPECT_EQ(error, aborted);
        back = std::move(rejected);
      }));
  context_.poll();
  signal.emit(asio::cancellation_type::terminal);
  context_.restart();
  context_.run();
  EXPECT_EQ(back, "mine");
  EXPECT_EQ(channel.size(), 1U);
}

/// Each operation, on a channel where it has to wait, and what ends its waiting.
class AsyncOperations : public testing::Test {
 protected:
  AsyncOperations() { (void)full_.try_send(0); }

  /// Calls `check(start, wake)` for each; `start` takes the handler.
  template <class Check>
  void for_each(Check check) {
    const auto send = [this] { ASSERT_EQ(empty_.try_send(1), ChannelStatus::ok); };
    const auto take = [this] { ASSERT_TRUE(full_.try_recv()); };
    {
      SCOPED_TRACE("async_recv");
      check([this](auto handler) { empty_.async_recv(std::move(handler)); }, send);
    }
    {
      SCOPED_TRACE("async_recv_many");
      check([this](auto handler) { empty_.async_recv_many(4, std::move(handler)); }, send);
    }
    {
      SCOPED_TRACE("async_recv_many into a vector");
      check([this](auto handler) { empty_.async_recv_many(values_.emplace_back(), 4, std::move(handler)); }, send);
    }
    {
      SCOPED_TRACE("async_send");
      check([this](auto handler) { full_.async_send(1, std::move(handler)); }, take);
    }
    EXPECT_EQ(empty_.size(), 0U);
    EXPECT_EQ(full_.size(), 1U);
  }

  asio::io_context context_{1};
  AsyncChannel<int> empty_{context_.get_executor(), unbounded};
  AsyncChannel<int> full_{context_.get_executor(), ChannelCapacity::bounded(1)};
  std::deque<std::vector<int>> values_;  // one for each operation
};

TEST_F(AsyncOperations, RunHandlersOnTheirExecutor) {
  for_each([](auto start, auto wake) {
    asio::thread_pool pool(1);
    std::atomic<bool> on_pool{false};
    start(asio::bind_executor(pool.get_executor(),
                              [&](auto&&...) { on_pool = pool.get_executor().running_in_this_thread(); }));
    wake();
    pool.join();  // what waits counts as work there
    EXPECT_TRUE(on_pool);
  });
}

TEST_F(AsyncOperations, TakeMemoryFromTheHandlersAllocatorAndGiveItBackBeforeTheCall) {
  for_each([this](auto start, auto wake) {
    int allocated = 0;
    int alive = 0;
    int alive_in_handler = -1;
    start(asio::bind_allocator(CountingAllocator<int>(allocated, alive), [&](auto&&...) { alive_in_handler = alive; }));
    context_.restart();
    context_.poll();
    EXPECT_GT(allocated, 0);
    EXPECT_EQ(alive_in_handler, -1);
    wake();
    context_.restart();
    context_.run();
    EXPECT_EQ(alive_in_handler, 0);
    EXPECT_EQ(alive, 0);
  });
}

TEST_F(AsyncOperations, LoseNothingWhenTheyAreCancelled) {
  for_each([this](auto start, auto wake) {
    for (const bool woken_before : {false, true}) {
      asio::cancellation_signal signal;
      error_code result;
      bool other = false;
      start(asio::bind_cancellation_slot(signal.slot(), [&](error_code error, auto&&...) { result = error; }));
      start([&](error_code error, auto&&...) { other = !error; });
      context_.restart();
      context_.poll();
      if (woken_before) wake();
      signal.emit(asio::cancellation_type::total);
      if (!woken_before) wake();
      context_.restart();
      context_.run();
      EXPECT_EQ(result, aborted);
      EXPECT_TRUE(other) << "the other one was woken";
      EXPECT_FALSE(signal.slot().has_handler()) << "the slot is free again";
    }
  });
}

TEST_F(AsyncChannels, WaitingIsWorkForTheHandlersContext) {
  AsyncChannel<int> channel(context_.get_executor(), unbounded);
  bool called = false;
  channel.async_recv([&](error_code, int) { called = true; });
  std::thread sender([&] {
    std::this_thread::sleep_for(20ms);  // run() would have returned by then
    channel.send(1);
  });
  context_.run();
  EXPECT_TRUE(called);
  sender.join();
}

TEST_F(AsyncChannels, OperationsLeftInADestroyedContextAreDestroyed) {
  auto context = std::make_unique<asio::io_context>();
  AsyncChannel<int> channel(context->get_executor(), ChannelCapacity::bounded(1));
  const auto token = std::make_shared<int>(0);
  bool called = false;
  channel.async_recv([token, &called](error_code, int) { called = true; });  // parks
  context->poll();
  channel.async_recv([token, &called](error_code, int) { called = true; });  // on its way
  EXPECT_EQ(token.use_count(), 3);
  context.reset();
  EXPECT_EQ(token.use_count(), 1);
  EXPECT_FALSE(called);
  EXPECT_EQ(channel.try_send(1), ChannelStatus::ok) << "the channel goes on without";
}

awaitable<void> own_channel(std::shared_ptr<AsyncChannel<int>> channel) {
  co_await channel->async_recv(use_awaitable);
}

TEST_F(AsyncChannels, ACoroutineThatOwnsWhatItWaitsForDoesNotLeak) {
  std::weak_ptr<AsyncChannel<int>> left;
  {
    asio::io_context context;
    auto channel = std::make_shared<AsyncChannel<int>>(context.get_executor(), unbounded);
    left = channel;
    asio::co_spawn(context, own_channel(std::move(channel)), asio::detached);
    context.poll();
    EXPECT_FALSE(left.expired());
  }
  EXPECT_TRUE(left.expired());
}

TEST_F(AsyncChannels, AHandlerThatThrowsTakesNobodyAlong) {
  AsyncChannel<int> channel(context_.get_executor(), unbounded);
  channel.async_recv([](error_code, int) { throw std::runtime_error("thrown"); });
  int got = 0;
  channel.async_recv([&](error_code, int value) { got = value; });
  context_.poll();
  ASSERT_EQ(channel.try_send(1), ChannelStatus::ok);
  ASSERT_EQ(channel.try_send(2), ChannelStatus::ok);
  context_.restart();
  EXPECT_THROW(context_.run(), std::runtime_error);
  context_.run();
  EXPECT_EQ(got, 2);
}

TEST_F(AsyncChannels, EveryValueBuiltIsDestroyedOnce) {
  const long before = Counted::alive();
  {
    AsyncChannel<Counted> channel(context_.get_executor(), ChannelCapacity::bounded(2));
    for (int i = 0; i < 5; ++i) channel.async_send(Counted(i), [](error_code, std::optional<Counted>) {});
    context_.poll();
    EXPECT_EQ(Counted::alive() - before, 5);
    channel.async_recv([](error_code, Counted value) { EXPECT_EQ(value.value(), 0); });
    context_.restart();
    context_.poll();
    EXPECT_EQ(Counted::alive() - before, 4);
  }
  context_.restart();
  context_.run();
  EXPECT_EQ(Counted::alive(), before);
}

TEST_F(AsyncChannels, ASendWithoutMemoryLeavesTheValueAndTheChannel) {
  AsyncChannel<std::unique_ptr<int>> channel(context_.get_executor(), unbounded);
  auto value = std::make_unique<int>(1);
  {
    const msgtrans::test::AllocationFailure failing(0);
    EXPECT_THROW(channel.try_send(std::move(value)), std::bad_alloc);
  }
  ASSERT_TRUE(value);
  EXPECT_EQ(channel.try_recv().status(), ChannelStatus::empty);
  EXPECT_EQ(channel.size(), 0U);
  EXPECT_EQ(channel.try_send(std::move(value)), ChannelStatus::ok);
  EXPECT_EQ(**channel.try_recv(), 1);
}

awaitable<void> race_with_timer(AsyncChannel<int>& channel, long& sum, std::atomic<int>& timeouts) {
  asio::steady_timer timer(co_await asio::this_coro::executor);
  for (;;) {
    timer.expires_after(20us);
    const auto first = co_await (channel.async_recv(as_tuple) || timer.async_wait(as_tuple));
    if (first.index() == 1) {
      ++timeouts;
      continue;
    }
    const auto& [error, value] = std::get<0>(first);
    if (error) co_return;
    sum += value;
  }
}

TEST_F(AsyncChannels, ReceivingOrATimerLosesNoValue) {
  AsyncChannel<int> channel(context_.get_executor(), unbounded);
  long sum = 0;
  std::atomic<int> timeouts{0};
  asio::co_spawn(context_, race_with_timer(channel, sum, timeouts), asio::detached);
  std::thread runner([&] { context_.run(); });
  constexpr int values = 20000;
  for (int i = 1; i <= values; ++i) {
    ASSERT_EQ(channel.send(i), ChannelStatus::ok);
    if (i % 50 != 0) continue;
    const int before = timeouts;  // the timer wins, and the next value comes about when it does so again
    ASSERT_TRUE(msgtrans::test::wait_until([&] { return timeouts > before; }));
  }
  channel.close();
  runner.join();
  EXPECT_EQ(sum, static_cast<long>(values) * (values + 1) / 2);
  EXPECT_GE(timeouts, values / 50);
}

awaitable<void> either_channel(AsyncChannel<int>& a, AsyncChannel<int>& b, long& sum, int& got) {
  for (;;) {
    const auto first = co_await (a.async_recv(as_tuple) || b.async_recv(as_tuple));
    const auto& [error, value] = first.index() == 0 ? std::get<0>(first) : std::get<1>(first);
    if (error) {
      // The other one may have some left.
      while (auto more = a.try_recv()) sum += *more, ++got;
      while (auto more = b.try_recv()) sum += *more, ++got;
      co_return;
    }
    sum += value;
    ++got;
  }
}

TEST_F(AsyncChannels, ReceivingFromOneOfTwoLosesNoValue) {
  AsyncChannel<int> a(context_.get_executor(), unbounded);
  AsyncChannel<int> b(context_.get_executor(), unbounded);
  long sum = 0;
  int got = 0;
  asio::co_spawn(context_, either_channel(a, b, sum, got), asio::detached);
  std::thread runner([&] { context_.run(); });
  constexpr int each = 20000;
  std::thread other([&] {
    for (int i = 1; i <= each; ++i) ASSERT_EQ(b.send(i), ChannelStatus::ok);
  });
  for (int i = 1; i <= each; ++i) ASSERT_EQ(a.send(i), ChannelStatus::ok);
  other.join();
  a.close();
  b.close();
  runner.join();
  EXPECT_EQ(got, 2 * each);
  EXPECT_EQ(sum, static_cast<long>(each) * (each + 1));
}

}  // namespace
