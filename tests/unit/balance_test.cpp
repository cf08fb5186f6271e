// SPDX-License-Identifier: Apache-2.0
#include "balancer.hpp"

#include <algorithm>
#include <gtest/gtest.h>
#include <map>
#include <string>
#include <vector>

namespace msgtrans::detail {
namespace {

std::vector<std::string> names(std::size_t count) {
  std::vector<std::string> all;
  for (std::size_t i = 0; i < count; ++i) all.push_back("tcp://10.0.0." + std::to_string(i) + ":8001");
  return all;
}

constexpr auto all_of_them = [](std::size_t) { return true; };
constexpr auto no_load = [](std::size_t) { return std::size_t{0}; };

/// Whose each of so many keys is.
std::vector<std::string> owners(const std::vector<std::string>& of, std::size_t keys, std::size_t places = 128) {
  const HashRing ring(of, places);
  std::vector<std::string> owner;
  for (std::size_t i = 0; i < keys; ++i) {
    owner.push_back(of[*ring.find(HashRing::hash("user-" + std::to_string(i)), all_of_them)]);
  }
  return owner;
}

TEST(HashRing, GivesEachNameAboutAsManyKeys) {
  constexpr std::size_t keys = 100'000, count = 10;
  std::map<std::string, std::size_t> share;
  for (const auto& owner : owners(names(count), keys)) ++share[owner];
  ASSERT_EQ(share.size(), count);
  for (const auto& [name, number] : share) {
    EXPECT_GT(number, keys / count * 7 / 10) << name;
    EXPECT_LT(number, keys / count * 13 / 10) << name;
  }
}

TEST(HashRing, IsMoreEvenWithMorePlaces) {
  const auto most = [](std::size_t places) {
    std::map<std::string, std::size_t> share;
    for (const auto& owner : owners(names(10), 20'000, places)) ++share[owner];
    std::size_t largest = 0;
    for (const auto& [name, number] : share) largest = std::max(largest, number);
    return largest;
  };
  EXPECT_GT(most(1), most(1000) * 3 / 2);
}

TEST(HashRing, MovesOnlyTheKeysOfWhoLeavesAndOfWhoComes) {
  constexpr std::size_t keys = 20'000;
  auto some = names(10);
  const auto before = owners(some, keys);
  const auto gone = some[4];
  some.erase(some.begin() + 4);
  const auto after = owners(some, keys);
  std::size_t moved = 0;
  for (std::size_t i = 0; i < keys; ++i) {
    if (before[i] == gone) {
      ++moved;
    } else {
      EXPECT_EQ(before[i], after[i]);
    }
  }
  EXPECT_GT(moved, keys / 20);
  EXPECT_LT(moved, keys / 5);
  // And back, in another order.
  some.push_back(gone);
  EXPECT_TRUE(owners(some, keys) == before);
}

TEST(HashRing, GoesOnToTheNextThatWillDo) {
  const auto five = names(5);
  const HashRing ring(five, 64);
  std::map<std::size_t, std::map<std::size_t, int>> heirs;
  for (int i = 0; i < 5000; ++i) {
    const auto key = HashRing::hash(std::to_string(i));
    const auto first = ring.find(key, all_of_them);
    const auto second = ring.find(key, [&](std::size_t at) { return at != *first; });
    ASSERT_TRUE(first && second);
    EXPECT_NE(*first, *second);
    ++heirs[*first][*second];
  }
  // Those of one are spread over all others.
  for (const auto& [from, to] : heirs) EXPECT_EQ(to.size(), 4U) << from;
  EXPECT_FALSE(ring.find(1, [](std::size_t) { return false; }));
  EXPECT_FALSE(HashRing({}, 64).find(1, all_of_them));
}

TEST(HashRing, FindsAPlaceForEveryNumber) {
  const HashRing ring(names(3), 4);
  EXPECT_TRUE(ring.find(0, all_of_them));
  EXPECT_EQ(ring.find(0, all_of_them), ring.find(~std::uint64_t{0}, all_of_them));  // around
}

std::map<std::size_t, int> turns(Balance balance, std::size_t count, int rounds, auto usable, auto load) {
  const HashRing none({}, 0);
  std::map<std::size_t, int> times;
  for (int i = 0; i < rounds; ++i) {
    const auto found = choose(balance, count, static_cast<std::uint64_t>(i), usable, load, none, std::nullopt);
    if (found) ++times[*found];
  }
  return times;
}

TEST(Policies, RoundRobinTakesTurns) {
  const HashRing none({}, 0);
  for (std::uint64_t turn = 0; turn < 12; ++turn) {
    EXPECT_EQ(choose(Balance::round_robin, 4, turn, all_of_them, no_load, none, std::nullopt), turn % 4);
  }
}

TEST(Policies, TheNeighboursOfOneThatIsOutShareItsTurns) {
  for (const Balance balance : {Balance::round_robin, Balance::least_loaded, Balance::consistent_hash}) {
    const auto times = turns(
        balance, 4, 300, [](std::size_t at) { return at != 1; }, no_load);
    EXPECT_EQ(times, (std::map<std::size_t, int>{{0, 100}, {2, 100}, {3, 100}})) << to_string(balance);
  }
}

TEST(Policies, LeastLoadedTakesTheLeastAndTurnsAmongEquals) {
  const std::vector<std::size_t> load{5, 2, 9, 2};
  const auto of = [&load](std::size_t at) { return load[at]; };
  const auto times = turns(Balance::least_loaded, 4, 400, all_of_them, of);
  EXPECT_EQ(times.size(), 2U);
  EXPECT_GE(times.at(1), 100);
  EXPECT_GE(times.at(3), 100);
  EXPECT_EQ(turns(
                Balance::least_loaded, 4, 10, [](std::size_t at) { return at == 0 || at == 2; }, of),
            (std::map<std::size_t, int>{{0, 10}}));
}

TEST(Policies, ConsistentHashGoesByTheKey) {
  const auto five = names(5);
  const HashRing ring(five, 64);
  for (int i = 0; i < 100; ++i) {
    const auto key = HashRing::hash(std::to_string(i));
    const auto first = choose(Balance::consistent_hash, 5, 0, all_of_them, no_load, ring, key);
    for (std::uint64_t turn = 1; turn < 5; ++turn) {
      EXPECT_EQ(choose(Balance::consistent_hash, 5, turn, all_of_them, no_load, ring, key), first);
    }
  }
}

TEST(Policies, NobodyIsChosenWhereNobodyWillDo) {
  const HashRing none({}, 0);
  for (const Balance balance : {Balance::round_robin, Balance::least_loaded, Balance::consistent_hash}) {
    EXPECT_FALSE(choose(balance, 0, 0, all_of_them, no_load, none, std::nullopt));
    EXPECT_FALSE(choose(
        balance, 3, 0, [](std::size_t) { return false; }, no_load, none, std::uint64_t{1}));
  }
}

}  // namespace
}  // namespace msgtrans::detail
