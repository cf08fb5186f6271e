// SPDX-License-Identifier: Apache-2.0
#include <boost/asio/io_context.hpp>
#include <cctype>
#include <cerrno>
#include <gtest/gtest.h>
#include <map>
#include <msgtrans/channel/broadcast_channel.hpp>
#include <msgtrans/channel/event_broadcaster.hpp>
#include <msgtrans/statistics.hpp>
#include <set>
#include <string>

namespace msgtrans {
namespace {

TEST(ErrorNames, EveryErrorHasOneOfItsOwn) {
  std::set<std::string> names;
  for (std::size_t i = 1; i < ErrorCounts::size; ++i) {
    const std::string name = to_string(static_cast<Errc>(i));
    for (const char c : name) EXPECT_TRUE(c == '_' || std::islower(static_cast<unsigned char>(c)) != 0) << name;
    EXPECT_TRUE(names.insert(name).second) << name;
  }
  EXPECT_STREQ(to_string(Errc::bad_version), "bad_version");
  EXPECT_STREQ(to_string(Errc::blocking_on_shard), "blocking_on_shard");
  EXPECT_STREQ(to_string(static_cast<Errc>(ErrorCounts::size)), "?")
      << "a value was added at the end: ErrorCounts::size needs the new last one";
}

TEST(ErrorCounts, CountsEachCodeByItself) {
  ErrorCounts counts;
  EXPECT_EQ(counts.total(), 0U);
  counts.for_each([](const char* name, std::uint64_t) { ADD_FAILURE() << name; });
  for (std::size_t i = 1; i < ErrorCounts::size; ++i) counts.add(static_cast<Errc>(i), i);
  counts.add(error_code(ECONNRESET, boost::system::system_category()), 1000);
  for (std::size_t i = 1; i < ErrorCounts::size; ++i) EXPECT_EQ(counts[static_cast<Errc>(i)], i);
  EXPECT_EQ(counts.system(), 1000U);
  std::map<std::string, std::uint64_t> named;
  counts.for_each([&named](const char* name, std::uint64_t count) { named[name] = count; });
  EXPECT_EQ(named.size(), ErrorCounts::size);
  EXPECT_EQ(named["system"], 1000U);
  EXPECT_EQ(named["closed_by_peer"], static_cast<std::uint64_t>(Errc::closed_by_peer));
  EXPECT_EQ(counts.total(), 1000 + (ErrorCounts::size - 1) * ErrorCounts::size / 2);
  std::uint64_t protocol = 0;
  for (int i = 1; i <= static_cast<int>(Errc::websocket_violation); ++i) protocol += static_cast<std::uint64_t>(i);
  EXPECT_EQ(counts.protocol_errors(), protocol);
}

TEST(ErrorCounts, WhatIsNoErrcIsOfTheSystem) {
  ErrorCounts counts;
  counts.add(error_code(9999, error_category()));
  counts.add(error_code());
  counts.add(error_code(static_cast<int>(Errc::closed), boost::system::generic_category()));
  EXPECT_EQ(counts.system(), 3U);
  EXPECT_EQ(counts.total(), 3U);
}

TEST(ErrorCounts, AddUp) {
  ErrorCounts one, other;
  one.add(Errc::closed, 2);
  other.add(Errc::closed, 3);
  other.add(Errc::truncated);
  one += other;
  EXPECT_EQ(one[Errc::closed], 5U);
  EXPECT_EQ(one[Errc::truncated], 1U);
  EXPECT_EQ(one.total(), 6U);
}

TEST(RequestCounts, AddUp) {
  const RequestCounts one{1, 2, 3, 4, 5, 6, 7, 8};
  RequestCounts sum{10, 20, 30, 40, 50, 60, 70, 80};
  sum += one;
  EXPECT_EQ(sum, (RequestCounts{11, 22, 33, 44, 55, 66, 77, 88}));
}

TEST(EventLag, IsThatOfTheSubscriberFurthestBehind) {
  boost::asio::io_context context;
  BroadcastChannel<int> channel(context.get_executor(), 4);
  EXPECT_EQ(channel.lag(), 0U);
  channel.send(0);
  EXPECT_EQ(channel.lag(), 0U) << "nobody listens";
  auto quick = channel.subscribe();
  auto slow = std::make_optional(channel.subscribe());
  for (int i = 1; i <= 3; ++i) channel.send(i);
  EXPECT_EQ(quick.lag(), 3U);
  for (int i = 1; i <= 3; ++i) EXPECT_EQ(*quick.try_next(), i);
  EXPECT_EQ(quick.lag(), 0U);
  EXPECT_EQ(slow->lag(), 3U);
  EXPECT_EQ(channel.lag(), 3U);
  for (int i = 4; i <= 10; ++i) channel.send(i);
  EXPECT_EQ(slow->lag(), 10U) << "those that are gone included, as long as it has not been told";
  EXPECT_EQ(slow->try_next().lagged(), 6U);
  EXPECT_EQ(slow->lag(), 4U);
  EXPECT_EQ(channel.lag(), 7U) << "the quick one is the slow one now";
  slow->unsubscribe();
  while (quick.try_next().kind() != NextResult<int>::Kind::empty) continue;
  EXPECT_EQ(channel.lag(), 0U) << "who has ended is not behind";
  slow.reset();
  channel.close();
  EXPECT_EQ(quick.lag(), 0U);
}

TEST(EventLag, IsToldByTheBroadcaster) {
  boost::asio::io_context context;
  EventBroadcaster<int> events(context.get_executor());
  auto subscription = events.subscribe();
  for (int i = 0; i < 5; ++i) events.publish(i);
  context.poll();
  EXPECT_EQ(events.statistics().lag, 5U);
  EXPECT_EQ(*subscription.try_next(), 0);
  EXPECT_EQ(events.statistics().lag, 4U);
}

}  // namespace
}  // namespace msgtrans
