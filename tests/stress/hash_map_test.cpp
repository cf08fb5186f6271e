// SPDX-License-Identifier: Apache-2.0
#include "support/counted.hpp"
#include "support/history.hpp"

#include <array>
#include <atomic>
#include <cstdint>
#include <gtest/gtest.h>
#include <latch>
#include <msgtrans/lockfree/epoch.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

using msgtrans::lockfree::Epoch;
using msgtrans::lockfree::LockFreeHashMap;
using msgtrans::test::Counted;
using msgtrans::test::keys_not_linearizable;
using msgtrans::test::MapWorkload;
using msgtrans::test::record_map;
using msgtrans::test::stress_factor;

struct Colliding {
  std::size_t operator()(int key) const noexcept { return static_cast<std::size_t>(key % 2); }
};

// Values that need a node; small ones in the table; keys with one hash; and other keys that come and go beside, so that
// the table is copied all the time.
struct Nodes {
  LockFreeHashMap<int, std::string> map{{.shards = 1}};
  std::optional<int> get(int key) {
    const auto value = map.get(key);
    return value ? std::optional(std::stoi(*value)) : std::nullopt;
  }
  bool insert(int key, int value) { return map.insert(key, std::to_string(value)); }
  bool erase(int key) { return map.erase(key); }
  bool insert_or_assign(int key, int value) { return map.insert_or_assign(key, std::to_string(value)); }
};
template <class Map>
struct Direct {
  Map map{{.shards = 1}};
  std::optional<int> get(int key) { return map.get(key); }
  bool insert(int key, int value) { return map.insert(key, value); }
  bool erase(int key) { return map.erase(key); }
  bool insert_or_assign(int key, int value) { return map.insert_or_assign(key, value); }
};
struct Bare : Direct<LockFreeHashMap<int, int>> {};
struct Chained : Direct<LockFreeHashMap<int, int, Colliding>> {};

template <class Map>
class MapHistories : public testing::Test {};
using Maps = testing::Types<Nodes, Bare, Chained>;
TYPED_TEST_SUITE(MapHistories, Maps);

TYPED_TEST(MapHistories, AreLinearizableWhileTheTableIsCopied) {
  const int seeds = 60 * stress_factor();
  for (int seed = 1; seed <= seeds; ++seed) {
    TypeParam map;
    std::atomic<bool> done{false};
    std::thread churn([&] {
      for (int i = 1000; !done; ++i) {
        map.insert(i, i);
        if (i >= 1008) map.erase(i - 8);
      }
    });
    const MapWorkload work{.threads = 4, .calls_each = 150, .keys = 3, .seed = static_cast<std::uint64_t>(seed)};
    const auto history = record_map(map, work);
    done = true;
    churn.join();
    const auto bad = keys_not_linearizable(history);
    ASSERT_TRUE(bad.empty()) << "seed " << seed << ", key " << bad.front();
  }
}

// Each thread has keys of its own, of which it knows what they must be; all of them share tables that grow.
TEST(HashMapStress, WhatOneThreadKnowsIsSoThroughAllGrowths) {
  constexpr int threads = 4;
  const int calls = 100000 * stress_factor();
  const long before = Counted::alive();
  {
    LockFreeHashMap<int, Counted> map({.shards = 2});
    std::latch start(threads + 1);
    std::atomic<int> running{threads};
    std::vector<std::thread> workers;
    std::array<std::size_t, threads> left{};
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        std::mt19937 random(static_cast<unsigned>(t));
        std::vector<int> mine(2000, -1);
        start.arrive_and_wait();
        for (int i = 0; i < calls; ++i) {
          const int index = static_cast<int>(random() % mine.size());
          const int key = index * threads + t;
          int& value = mine[static_cast<std::size_t>(index)];
          switch (random() % 4) {
            case 0:
              ASSERT_EQ(map.insert(key, Counted(i)), value < 0);
              if (value < 0) value = i;
              break;
            case 1:
              ASSERT_EQ(map.insert_or_assign(key, Counted(i)), value < 0);
              value = i;
              break;
            case 2:
              ASSERT_EQ(map.erase(key), value >= 0);
              value = -1;
              break;
            default: {
              int seen = -1;
              map.visit(key, [&seen](const Counted& there) { seen = there.holds() ? there.value() : -2; });
              ASSERT_EQ(seen, value);
            }
          }
        }
        for (const int value : mine) left[static_cast<std::size_t>(t)] += value >= 0 ? 1 : 0;
        --running;
      });
    }
    // Iterating meanwhile meets no key twice, and nothing that has ended.
    std::thread reader([&] {
      start.arrive_and_wait();
      while (running > 0) {
        std::vector<bool> seen(2000 * threads);
        map.for_each([&](int key, const Counted& value) {
          ASSERT_TRUE(value.holds());
          ASSERT_FALSE(seen[static_cast<std::size_t>(key)]) << key;
          seen[static_cast<std::size_t>(key)] = true;
        });
      }
    });
    for (auto& worker : workers) worker.join();
    reader.join();
    std::size_t sum = 0;
    for (const auto count : left) sum += count;
    EXPECT_EQ(map.size(), sum);
    EXPECT_GT(map.statistics().growths, 4U);
  }
  Epoch::collect();
  EXPECT_EQ(Counted::alive(), before);
}

TEST(HashMapStress, ForEachSeesWhatIsThereAllTheTimeExactlyOnce) {
  const int rounds = 40 * stress_factor();
  for (int round = 0; round < rounds; ++round) {
    LockFreeHashMap<int, int> map({.shards = 1});
    constexpr int stable = 50;
    for (int i = 0; i < stable; ++i) map.insert(i, i);
    std::atomic<bool> done{false};
    std::thread churn([&] {
      for (int i = stable; i < 20000; ++i) {
        map.insert(i, i);
        map.insert_or_assign(i % stable, i % stable);
        if (i % 2 == 0) map.erase(i - 10 > stable ? i - 10 : i);
      }
      done = true;
    });
    while (!done) {
      std::array<int, stable> seen{};
      map.for_each([&](int key, int) {
        if (key < stable) ++seen[static_cast<std::size_t>(key)];
      });
      for (int i = 0; i < stable; ++i) ASSERT_EQ(seen[static_cast<std::size_t>(i)], 1) << i;
    }
    churn.join();
  }
}

TEST(HashMapStress, ClearingMeanwhileLosesCountOfNothing) {
  const long before = Counted::alive();
  {
    LockFreeHashMap<int, Counted> map({.shards = 1});
    std::atomic<int> running{2};
    std::vector<std::thread> writers;
    for (int t = 0; t < 2; ++t) {
      writers.emplace_back([&, t] {
        for (int i = 0; i < 100000 * stress_factor(); ++i) map.insert_or_assign(i % 500 + t * 300, Counted(i));
        --running;
      });
    }
    while (running > 0) map.clear();
    for (auto& writer : writers) writer.join();
    std::size_t counted = 0;
    map.for_each([&](int, const Counted&) { ++counted; });
    EXPECT_EQ(map.size(), counted);
    map.clear();
    EXPECT_TRUE(map.empty());
  }
  Epoch::collect();
  EXPECT_EQ(Counted::alive(), before);
}

}  // namespace
