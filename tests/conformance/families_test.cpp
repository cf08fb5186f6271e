// SPDX-License-Identifier: Apache-2.0
// What all three families have in common: the same cases over SyncChannel, AsyncChannel and BroadcastChannel, each with
// one receiver.
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/channel/channel_strategy.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/lockfree/epoch.hpp>
#include <optional>
#include <string>
#include <thread>
#include <utility>

namespace {

namespace asio = boost::asio;
using namespace std::chrono_literals;
using msgtrans::ChannelCapacity;
using msgtrans::ChannelStatus;
using msgtrans::ChannelStrategy;
using msgtrans::Errc;
using msgtrans::error_code;
using msgtrans::NextResult;

/// Copyable, counted, and alive where it is kept.
struct Value {
  static inline long alive = 0;
  int number;
  explicit Value(int n) : number(n) { ++alive; }
  Value() : Value(-1) {}
  Value(const Value& other) : number(other.number) { ++alive; }
  Value(Value&& other) noexcept : number(other.number) { ++alive; }
  Value& operator=(const Value&) = default;
  ~Value() { --alive; }
};

/// What was received: a value's number, or that so many were missed, or the end.
struct Got {
  std::optional<int> number;
  std::uint64_t missed = 0;
  bool closed = false;
};

template <ChannelStrategy strategy>
class Family;

template <>
class Family<ChannelStrategy::sync_high_perf> {
 public:
  explicit Family(std::size_t capacity) : channel(ChannelCapacity::bounded(capacity)) {}
  ChannelStatus send(int number) { return channel.try_send(Value(number)); }
  Got receive() { return got(channel.recv()); }
  /// Begins to receive and gives up before there is anything; whether it was told so.
  bool give_up_receiving() { return channel.recv_for(1ms).status() == ChannelStatus::timeout; }

  msgtrans::Channel<ChannelStrategy::sync_high_perf, Value> channel;

 private:
  static Got got(msgtrans::RecvResult<Value> result) {
    return result ? Got{result->number} : Got{{}, 0, result.status() == ChannelStatus::closed};
  }
};

template <>
class Family<ChannelStrategy::async_high_perf> {
 public:
  explicit Family(std::size_t capacity) : channel(context_.get_executor(), ChannelCapacity::bounded(capacity)) {}
  ChannelStatus send(int number) { return channel.try_send(Value(number)); }
  Got receive() {
    Got got;
    channel.async_recv([&got](error_code error, const Value& value) {
      got = error ? Got{{}, 0, error == msgtrans::make_error_code(Errc::closed)} : Got{value.number};
    });
    run();
    return got;
  }
  bool give_up_receiving() {
    asio::cancellation_signal signal;
    error_code result;
    channel.async_recv(
        asio::bind_cancellation_slot(signal.slot(), [&](error_code error, const Value&) { result = error; }));
    context_.restart();
    context_.poll();
    signal.emit(asio::cancellation_type::all);
    run();
    return result == asio::error::operation_aborted;
  }

 private:
  void run() {
    context_.restart();
    context_.run();
  }
  asio::io_context context_;

 public:
  msgtrans::Channel<ChannelStrategy::async_high_perf, Value> channel;
};

template <>
class Family<ChannelStrategy::broadcast> {
 public:
  explicit Family(std::size_t capacity)
      : channel(context_.get_executor(), capacity), subscription_(channel.subscribe()) {}
  ChannelStatus send(int number) { return channel.send(Value(number)); }
  Got receive() {
    Got got;
    subscription_.async_next([&got](error_code error, const NextResult<Value>& next) {
      got.closed = error == msgtrans::make_error_code(Errc::closed);
      got.missed = next.lagged();
      if (next) got.number = (*next).number;
    });
    run();
    return got;
  }
  bool give_up_receiving() {
    asio::cancellation_signal signal;
    error_code result;
    subscription_.async_next(asio::bind_cancellation_slot(
        signal.slot(), [&](error_code error, const NextResult<Value>&) { result = error; }));
    context_.restart();
    context_.poll();
    signal.emit(asio::cancellation_type::all);
    run();
    return result == asio::error::operation_aborted;
  }

 private:
  void run() {
    context_.restart();
    context_.run();
  }
  asio::io_context context_;

 public:
  msgtrans::Channel<ChannelStrategy::broadcast, Value> channel;

 private:
  msgtrans::Subscription<Value> subscription_;
};

template <class T>
class Families : public testing::Test {};
template <ChannelStrategy strategy>
struct Named {
  using type = Family<strategy>;
  static constexpr auto value = strategy;
};
using All = testing::Types<Named<ChannelStrategy::sync_high_perf>, Named<ChannelStrategy::async_high_perf>,
                           Named<ChannelStrategy::broadcast>>;
struct Names {
  template <class T>
  static std::string GetName(int) {
    switch (T::value) {
      case ChannelStrategy::sync_high_perf: return "Sync";
      case ChannelStrategy::async_high_perf: return "Async";
      case ChannelStrategy::broadcast: return "Broadcast";
    }
    return "";
  }
};
TYPED_TEST_SUITE(Families, All, Names);

TYPED_TEST(Families, OneSendersValuesKeepTheirOrder) {
  typename TypeParam::type it(8);
  for (int i = 0; i < 8; ++i) ASSERT_EQ(it.send(i), ChannelStatus::ok);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(it.receive().number, i);
}

TYPED_TEST(Families, AfterCloseWhatWasSentIsStillReceived) {
  typename TypeParam::type it(4);
  ASSERT_EQ(it.send(1), ChannelStatus::ok);
  it.channel.close();
  EXPECT_EQ(it.send(2), ChannelStatus::closed);
  EXPECT_EQ(it.receive().number, 1);
  EXPECT_TRUE(it.receive().closed);
  EXPECT_TRUE(it.receive().closed);
}

TYPED_TEST(Families, CapacityIsATrueMaximum) {
  typename TypeParam::type it(4);
  EXPECT_EQ(it.channel.capacity(), 4U);
  const long before = Value::alive;
  for (int i = 0; i < 10; ++i) (void)it.send(i);
  msgtrans::lockfree::Epoch::collect();
  EXPECT_EQ(Value::alive - before, 4);
}

TYPED_TEST(Families, EveryValueIsReceivedOrRefusedOrCountedAsMissed) {
  typename TypeParam::type it(4);
  int accepted = 0;
  std::uint64_t missed = 0;
  int received = 0;
  for (int i = 0; i < 100; ++i) {
    if (it.send(i) == ChannelStatus::ok) ++accepted;
    if (i % 10 != 9) continue;
    for (int k = 0; k < 3; ++k) {
      const Got got = it.receive();
      received += got.number ? 1 : 0;
      missed += got.missed;
    }
  }
  it.channel.close();
  for (;;) {
    const Got got = it.receive();
    if (got.closed) break;
    received += got.number ? 1 : 0;
    missed += got.missed;
  }
  EXPECT_EQ(static_cast<std::uint64_t>(received) + missed, static_cast<std::uint64_t>(accepted));
  EXPECT_GT(received, 20);
}

TYPED_TEST(Families, GivingUpAReceiveLosesNothing) {
  typename TypeParam::type it(4);
  EXPECT_TRUE(it.give_up_receiving());
  ASSERT_EQ(it.send(1), ChannelStatus::ok);
  EXPECT_EQ(it.receive().number, 1);
  EXPECT_TRUE(it.give_up_receiving());
}

TYPED_TEST(Families, EveryValueBuiltIsDestroyedOnce) {
  msgtrans::lockfree::Epoch::collect();  // what other tests have left
  const long before = Value::alive;
  {
    typename TypeParam::type it(4);
    for (int i = 0; i < 10; ++i) (void)it.send(i);
    (void)it.receive();
    (void)it.receive();
  }
  msgtrans::lockfree::Epoch::collect();
  EXPECT_EQ(Value::alive, before);
}

TYPED_TEST(Families, ADestroyedChannelLeavesNoValueBehind) {
  msgtrans::lockfree::Epoch::collect();  // what other tests have left
  const long before = Value::alive;
  for (int round = 0; round < 100; ++round) {
    typename TypeParam::type it(2);
    (void)it.send(round);
  }
  msgtrans::lockfree::Epoch::collect();
  EXPECT_EQ(Value::alive, before);
}

/// A value that cannot be copied. Every subscriber of a broadcast gets a copy, so there it is sent shared; the bare
/// type is refused when the program is compiled (rejected.cpp), like one whose move may throw by all three.
struct MoveOnly {
  explicit MoveOnly(int n) : number(std::make_unique<int>(n)) {}
  std::unique_ptr<int> number;
};

TYPED_TEST(Families, TakeMoveOnlyValues) {
  constexpr auto strategy = TypeParam::value;
  asio::io_context context;
  if constexpr (strategy == ChannelStrategy::broadcast) {
    msgtrans::Channel<strategy, std::shared_ptr<const MoveOnly>> channel(context.get_executor(), 4);
    auto first = channel.subscribe(), second = channel.subscribe();
    ASSERT_EQ(channel.send(std::make_shared<const MoveOnly>(7)), ChannelStatus::ok);
    const auto one = first.try_next(), other = second.try_next();
    EXPECT_EQ(*(*one)->number, 7);
    EXPECT_EQ(*one, *other);
  } else {
    const auto make = [&] {
      using Channel = msgtrans::Channel<strategy, MoveOnly>;
      if constexpr (strategy == ChannelStrategy::async_high_perf) {
        return std::make_unique<Channel>(context.get_executor(), ChannelCapacity::bounded(1));
      } else {
        return std::make_unique<Channel>(ChannelCapacity::bounded(1));
      }
    };
    const auto channel = make();
    MoveOnly refused(8);
    ASSERT_EQ(channel->try_send(MoveOnly(7)), ChannelStatus::ok);
    EXPECT_EQ(channel->try_send(std::move(refused)), ChannelStatus::full);
    EXPECT_EQ(*refused.number, 8);
    EXPECT_EQ(*channel->recv()->number, 7);
  }
}

}  // namespace
