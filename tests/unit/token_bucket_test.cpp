// SPDX-License-Identifier: Apache-2.0
#include "support/start_time.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <gtest/gtest.h>
#include <limits>
#include <msgtrans/protocol/token_bucket.hpp>
#include <random>

namespace {

using namespace std::chrono_literals;
using msgtrans::protocol::TimePoint;
using msgtrans::protocol::TokenBucket;
using msgtrans::test::start_time;

TEST(TokenBucket, ABurstPassesAtOnceAndThenTheRate) {
  TokenBucket bucket(10, 3, start_time);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(bucket.try_take(1, start_time)) << i;
  EXPECT_FALSE(bucket.try_take(1, start_time));
  EXPECT_EQ(bucket.ready_at(start_time), start_time + 100ms);
  EXPECT_FALSE(bucket.try_take(1, start_time + 100ms - 1ns));
  EXPECT_TRUE(bucket.try_take(1, start_time + 100ms));
  EXPECT_FALSE(bucket.try_take(1, start_time + 100ms));
}

TEST(TokenBucket, NoMoreThanTheBurstIsSavedUp) {
  TokenBucket bucket(1000, 5, start_time);
  const TimePoint later = start_time + 24h;
  EXPECT_FALSE(bucket.try_take(6, later)) << "over the burst";
  EXPECT_TRUE(bucket.try_take(5, later)) << "all or none: the refused six took nothing";
  EXPECT_FALSE(bucket.try_take(1, later));
}

TEST(TokenBucket, NothingIsLostHoweverOftenItIsAsked) {
  // A rate that divides no nanosecond count, asked at odd times: in the end exactly what the rate says.
  constexpr std::uint64_t rate = 7;
  TokenBucket bucket(rate, 2, start_time);
  std::mt19937_64 random(1);
  std::uint64_t taken = 0;
  TimePoint now = start_time;
  const TimePoint end = start_time + 1000s;
  while (now < end) {
    while (bucket.try_take(1, now)) ++taken;
    // Never later than the next token, so that the burst loses nothing.
    now = std::min({now + std::chrono::nanoseconds(random() % 1'000'000 + 1), bucket.ready_at(now), end});
  }
  while (bucket.try_take(1, end)) ++taken;
  EXPECT_EQ(taken, 2 + rate * 1000);
}

TEST(TokenBucket, ReadyAtIsTheFirstTimeAtWhichItIsAndNoEarlier) {
  for (const std::uint64_t rate : {1ULL, 3ULL, 7ULL, 999'999'937ULL, 3'000'000'019ULL}) {
    TokenBucket bucket(rate, 2, start_time);
    ASSERT_TRUE(bucket.try_take(2, start_time));
    const TimePoint ready = bucket.ready_at(start_time);
    ASSERT_GT(ready, start_time) << rate;
    EXPECT_FALSE(TokenBucket(bucket).try_take(1, ready - 1ns)) << rate;
    EXPECT_TRUE(TokenBucket(bucket).try_take(1, ready)) << rate;
    EXPECT_EQ(bucket.ready_at(ready), ready) << rate;
  }
}

TEST(TokenBucket, DebtIsPaidBackBeforeAnythingElsePasses) {
  TokenBucket bucket(100, 10, start_time);
  bucket.take(60, start_time);  // 50 of debt, and one token to come
  EXPECT_EQ(bucket.ready_at(start_time), start_time + 510ms);
  EXPECT_FALSE(bucket.try_take(1, start_time + 509ms));
  bucket.take(10, start_time + 509ms);
  EXPECT_EQ(bucket.ready_at(start_time + 509ms), start_time + 610ms);
  EXPECT_TRUE(bucket.try_take(1, start_time + 610ms));
}

TEST(TokenBucket, IsFullOnlyWhenAllHasComeBack) {
  TokenBucket bucket(1000, 10, start_time);
  EXPECT_TRUE(bucket.full(start_time));
  EXPECT_TRUE(bucket.try_take(1, start_time));
  EXPECT_FALSE(bucket.full(start_time + 999999ns));
  EXPECT_TRUE(bucket.full(start_time + 1ms));
}

TEST(TokenBucket, ATimeThatGoesBackIsTakenForTheLatest) {
  TokenBucket bucket(1, 1, start_time);
  EXPECT_TRUE(bucket.try_take(1, start_time));
  EXPECT_FALSE(bucket.try_take(1, start_time - 1h));
  EXPECT_EQ(bucket.ready_at(start_time - 1h), start_time + 1s);
  EXPECT_FALSE(bucket.try_take(1, start_time + 1s - 1ns));
  EXPECT_TRUE(bucket.try_take(1, start_time + 1s));
}

TEST(TokenBucket, NoRateIsNoLimit) {
  TokenBucket bucket(0, 0, start_time);
  EXPECT_FALSE(bucket.limits());
  EXPECT_TRUE(bucket.try_take(std::numeric_limits<std::uint64_t>::max(), start_time));
  bucket.take(1000, start_time);
  EXPECT_EQ(bucket.ready_at(start_time), start_time);
  EXPECT_TRUE(bucket.full(start_time));
}

TEST(TokenBucket, ABurstOfNoneIsTakenForOne) {
  TokenBucket bucket(1, 0, start_time);
  EXPECT_TRUE(bucket.try_take(1, start_time));
  EXPECT_FALSE(bucket.try_take(1, start_time));
}

TEST(TokenBucket, ExtremesDoNotOverflow) {
  constexpr auto largest = std::numeric_limits<std::uint64_t>::max();
  TokenBucket fast(largest, largest, TimePoint::min());
  EXPECT_TRUE(fast.try_take(TokenBucket::most, TimePoint::min()));
  EXPECT_FALSE(fast.try_take(1, TimePoint::min()));
  EXPECT_TRUE(fast.full(TimePoint::max()));

  TokenBucket slow(1, 1, start_time);
  for (int i = 0; i < 100; ++i) slow.take(largest, start_time);
  EXPECT_EQ(slow.ready_at(start_time), TimePoint::max());
  EXPECT_FALSE(slow.try_take(1, TimePoint::max()));
}

}  // namespace
