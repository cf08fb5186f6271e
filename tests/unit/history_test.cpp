// SPDX-License-Identifier: Apache-2.0
// The checkers of histories must find what is wrong, or the stress tests that use them prove nothing.
#include "support/history.hpp"

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <gtest/gtest.h>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace {

using namespace msgtrans::test;
using Kind = MapCall::Kind;

MapCall get(std::size_t thread, std::uint64_t begin, std::uint64_t end, std::optional<int> found) {
  return {Kind::get, thread, 0, 0, found, false, begin, end};
}
MapCall change(Kind kind, std::size_t thread, std::uint64_t begin, std::uint64_t end, int argument, bool result) {
  return {kind, thread, 0, argument, std::nullopt, result, begin, end};
}

TEST(MapHistory, OneThreadsCallsAreCheckedLiterally) {
  EXPECT_TRUE(is_linearizable_for_key({}));
  EXPECT_TRUE(is_linearizable_for_key({get(0, 1, 2, std::nullopt), change(Kind::insert, 0, 3, 4, 7, true),
                                       get(0, 5, 6, 7), change(Kind::assign, 0, 7, 8, 8, false), get(0, 9, 10, 8),
                                       change(Kind::erase, 0, 11, 12, 0, true), get(0, 13, 14, std::nullopt)}));
  EXPECT_FALSE(is_linearizable_for_key({get(0, 1, 2, 7)}));
  EXPECT_FALSE(is_linearizable_for_key({change(Kind::insert, 0, 1, 2, 7, false)}));
  EXPECT_FALSE(is_linearizable_for_key({change(Kind::erase, 0, 1, 2, 0, true)}));
  EXPECT_FALSE(is_linearizable_for_key({change(Kind::insert, 0, 1, 2, 7, true), get(0, 3, 4, std::nullopt)}));
}

TEST(MapHistory, CallsAtTheSameTimeMayTakeEffectInEitherOrder) {
  const auto insert = change(Kind::insert, 0, 1, 10, 7, true);
  EXPECT_TRUE(is_linearizable_for_key({insert, get(1, 2, 3, std::nullopt), get(1, 4, 5, 7)}));
  EXPECT_FALSE(is_linearizable_for_key({insert, get(1, 2, 3, 7), get(1, 4, 5, std::nullopt)})) << "there and gone";
  EXPECT_FALSE(is_linearizable_for_key({insert, get(1, 11, 12, std::nullopt)})) << "the insert had ended";
}

TEST(MapHistory, OfTwoInsertsAtTheSameTimeOneWins) {
  const auto one = change(Kind::insert, 0, 1, 10, 7, true);
  EXPECT_TRUE(is_linearizable_for_key({one, change(Kind::insert, 1, 2, 9, 8, false), get(2, 11, 12, 7)}));
  EXPECT_FALSE(is_linearizable_for_key({one, change(Kind::insert, 1, 2, 9, 8, true)}));
  EXPECT_FALSE(is_linearizable_for_key({one, change(Kind::insert, 1, 2, 9, 8, false), get(2, 11, 12, 8)}));
}

// Under a lock, and so right, but for what is left out.
template <bool replaces_in_two_steps, bool reads_a_stale_copy>
class BrokenMap {
 public:
  std::optional<int> get(int key) {
    const std::lock_guard lock(mutex_);
    const auto& from = reads_a_stale_copy && ++reads_ % 3 != 0 ? stale_ : map_;
    const auto found = from.find(key);
    const auto result = found == from.end() ? std::nullopt : std::optional(found->second);
    if (reads_a_stale_copy && reads_ % 7 == 0) stale_ = map_;
    return result;
  }
  bool insert(int key, int value) {
    const std::lock_guard lock(mutex_);
    return map_.emplace(key, value).second;
  }
  bool erase(int key) {
    const std::lock_guard lock(mutex_);
    return map_.erase(key) == 1;
  }
  bool insert_or_assign(int key, int value) {
    bool erased = false;
    {
      const std::lock_guard lock(mutex_);
      if (!replaces_in_two_steps) return map_.insert_or_assign(key, value).second;
      erased = map_.erase(key) == 1;
    }
    std::this_thread::yield();
    const std::lock_guard lock(mutex_);
    map_.insert_or_assign(key, value);
    return !erased;
  }

 private:
  std::mutex mutex_;
  std::map<int, int> map_;
  std::map<int, int> stale_;
  int reads_ = 0;
};

template <class Map>
int seeds_until_caught() {
  for (int seed = 1; seed <= 200; ++seed) {
    Map map;
    const MapWorkload work{.threads = 4, .calls_each = 100, .keys = 2, .seed = static_cast<std::uint64_t>(seed)};
    if (!keys_not_linearizable(record_map(map, work)).empty()) return seed;
  }
  return 0;
}

TEST(MapHistory, AMapThatIsRightIsFoundRight) {
  EXPECT_EQ((seeds_until_caught<BrokenMap<false, false>>()), 0);
}
TEST(MapHistory, AMapThatReplacesInTwoStepsIsCaught) {
  EXPECT_NE((seeds_until_caught<BrokenMap<true, false>>()), 0);
}
TEST(MapHistory, AMapThatReadsAStaleCopyIsCaught) {
  EXPECT_NE((seeds_until_caught<BrokenMap<false, true>>()), 0);
}

// ---- channels

ChannelHistory::Call call(int producer, int number, std::uint64_t begin, std::uint64_t end) {
  return {{producer, number}, begin, end};
}

TEST(ChannelHistories, FaultsAreNamed) {
  ChannelHistory good;
  good.sent = {call(0, 0, 1, 2), call(0, 1, 3, 4)};
  good.received = {call(0, 0, 5, 6), call(0, 1, 7, 8)};
  EXPECT_EQ(fault_of(good, ChannelOrder::per_producer), "");

  auto twice = good;
  twice.received.push_back(call(0, 1, 9, 10));
  EXPECT_EQ(fault_of(twice, ChannelOrder::per_producer), "value 0.1 was received twice");
  auto lost = good;
  lost.received.pop_back();
  EXPECT_EQ(fault_of(lost, ChannelOrder::per_producer), "value 0.1 was accepted and never received");
  auto invented = good;
  invented.received.push_back(call(1, 0, 9, 10));
  EXPECT_EQ(fault_of(invented, ChannelOrder::per_producer), "value 1.0 was received and not sent");
  auto early = good;
  early.sent[1] = call(0, 1, 9, 10);
  EXPECT_EQ(fault_of(early, ChannelOrder::per_producer), "value 0.1 was received before it was sent");
  auto swapped = good;
  swapped.received = {call(0, 1, 5, 6), call(0, 0, 7, 8)};
  EXPECT_EQ(fault_of(swapped, ChannelOrder::per_producer), "value 0.1 has overtaken value 0.0");
  auto overlapping = good;
  overlapping.received = {call(0, 1, 5, 7), call(0, 0, 6, 8)};
  EXPECT_EQ(fault_of(overlapping, ChannelOrder::per_producer), "") << "received at the same time";

  auto other = good;
  other.sent[1] = call(1, 0, 3, 4);
  other.received = {call(1, 0, 5, 6), call(0, 0, 7, 8)};
  EXPECT_EQ(fault_of(other, ChannelOrder::per_producer), "");
  EXPECT_EQ(fault_of(other, ChannelOrder::real_time), "value 1.0 has overtaken value 0.0");

  auto closed = good;
  closed.close = call(0, 0, 9, 10);
  closed.ends = {call(0, 0, 11, 12)};
  closed.refused = {call(0, 2, 11, 12)};
  EXPECT_EQ(fault_of(closed, ChannelOrder::per_producer), "");
  closed.refused = {call(0, 2, 5, 6)};
  EXPECT_EQ(fault_of(closed, ChannelOrder::per_producer), "value 0.2 was refused before the close");
  closed.refused = {};
  closed.ends = {call(0, 0, 5, 6)};
  EXPECT_EQ(fault_of(closed, ChannelOrder::per_producer), "value 0.1 was received after the end was told");
  closed.ends = {};
  closed.close = call(0, 0, 1, 2);
  EXPECT_EQ(fault_of(closed, ChannelOrder::per_producer), "value 0.1 was accepted after the close");
}

enum class Defect { none, last_in_first_out, loses_some, gives_some_twice, forgets_at_close };

template <Defect defect>
class BrokenQueue {
 public:
  Sent send(Item item) {
    const std::lock_guard lock(mutex_);
    if (closed_) return Sent::closed;
    if (defect == Defect::loses_some && ++count_ % 100 == 0) return Sent::ok;
    items_.push_back(item);
    changed_.notify_one();
    return Sent::ok;
  }
  std::optional<Item> receive() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !items_.empty() || closed_; });
    if (items_.empty()) return std::nullopt;
    return take();
  }
  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
    if (defect == Defect::forgets_at_close && !items_.empty()) items_.pop_back();
  }

 private:
  Item take() {
    const Item item = defect == Defect::last_in_first_out ? items_.back() : items_.front();
    if (defect == Defect::last_in_first_out) {
      items_.pop_back();
    } else if (defect != Defect::gives_some_twice || ++count_ % 100 != 0) {
      items_.pop_front();
    }
    return item;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> items_;
  int count_ = 0;
  bool closed_ = false;
};

template <Defect defect>
std::string first_fault() {
  for (int seed = 1; seed <= 100; ++seed) {
    BrokenQueue<defect> queue;
    const ChannelWorkload work{.close_early = seed % 2 == 0, .seed = static_cast<std::uint64_t>(seed)};
    if (auto fault = fault_of(record_channel(queue, work), ChannelOrder::real_time); !fault.empty()) return fault;
  }
  return {};
}

TEST(ChannelHistories, AQueueThatIsRightIsFoundRight) {
  EXPECT_EQ(first_fault<Defect::none>(), "");
}
TEST(ChannelHistories, BrokenQueuesAreCaught) {
  EXPECT_NE(first_fault<Defect::last_in_first_out>(), "");
  EXPECT_NE(first_fault<Defect::loses_some>(), "");
  EXPECT_NE(first_fault<Defect::gives_some_twice>(), "");
  EXPECT_NE(first_fault<Defect::forgets_at_close>(), "");
}

}  // namespace
