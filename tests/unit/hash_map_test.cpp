// SPDX-License-Identifier: Apache-2.0
#include "support/counted.hpp"
#include "unit/allocation_failure.hpp"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/lockfree/counter.hpp>
#include <msgtrans/lockfree/epoch.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <msgtrans/session_id.hpp>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using msgtrans::Errc;
using msgtrans::Exception;
using msgtrans::SessionId;
using msgtrans::lockfree::Epoch;
using msgtrans::lockfree::HashMapOptions;
using msgtrans::lockfree::LockFreeCounter;
using msgtrans::lockfree::LockFreeHashMap;
using msgtrans::test::Counted;

constexpr HashMapOptions one_shard{.shards = 1};

TEST(HashMap, HoldsWhatWasPutIn) {
  LockFreeHashMap<int, std::string> map;
  EXPECT_TRUE(map.empty());
  EXPECT_EQ(map.get(1), std::nullopt);
  EXPECT_TRUE(map.insert(1, "one"));
  EXPECT_FALSE(map.insert(1, "uno"));
  EXPECT_EQ(map.get(1), "one");
  EXPECT_FALSE(map.insert_or_assign(1, "eins"));
  EXPECT_TRUE(map.insert_or_assign(2, "zwei"));
  EXPECT_EQ(map.get(1), "eins");
  EXPECT_TRUE(map.contains(2));
  EXPECT_EQ(map.size(), 2U);
  EXPECT_TRUE(map.erase(1));
  EXPECT_FALSE(map.erase(1));
  EXPECT_FALSE(map.contains(1));
  EXPECT_EQ(map.size(), 1U);
}

// Those whose hash means something else in a slot among them.
TEST(HashMap, EveryNumberIsAKey) {
  using msgtrans::lockfree::unmix;
  LockFreeHashMap<std::uint64_t, int> map(one_shard);
  const std::vector<std::uint64_t> keys{0, 1, ~0ULL, unmix(0), unmix(~0ULL), unmix(1), 1ULL << 63};
  const std::set<std::uint64_t> different(keys.begin(), keys.end());
  for (const auto key : different) EXPECT_TRUE(map.insert(key, static_cast<int>(key % 1000)));
  for (const auto key : different) EXPECT_EQ(map.get(key), static_cast<int>(key % 1000));
  std::set<std::uint64_t> found;
  map.for_each([&](std::uint64_t key, int) { EXPECT_TRUE(found.insert(key).second); });
  EXPECT_EQ(found, different);
  EXPECT_EQ(map.size(), different.size());
  for (const auto key : different) EXPECT_TRUE(map.erase(key));
  EXPECT_TRUE(map.empty());
  for (const auto key : different) EXPECT_TRUE(map.insert(key, 1));
  map.clear();
  EXPECT_TRUE(map.empty());
  EXPECT_TRUE(map.snapshot().empty());
}

template <class V>
void keeps(const std::vector<V>& values) {
  LockFreeHashMap<int, V> map(one_shard);
  int key = 0;
  for (const V& value : values) {
    EXPECT_TRUE(map.insert(key, value));
    EXPECT_EQ(map.get(key), value);
    EXPECT_FALSE(map.insert_or_assign(key, value));
    EXPECT_EQ(map.get(key), value);
    ++key;
  }
  for (key = 0; key < static_cast<int>(values.size()); ++key) EXPECT_TRUE(map.erase(key));
  EXPECT_TRUE(map.empty());
}

TEST(HashMap, SmallValuesOfEveryBitPatternAreKept) {
  keeps<std::uint64_t>({0, 1, 2, 3, 4, 5, 7, 8, 12, ~0ULL, 1ULL << 63, 0x1000});
  keeps<void*>({nullptr, reinterpret_cast<void*>(1), reinterpret_cast<void*>(8), reinterpret_cast<void*>(~7ULL)});
  keeps<std::uint32_t>({0, 1, ~0U});
  keeps<char>({'\0', 'a', '\x7f', '\xff'});
  keeps<bool>({false, true});
  keeps<double>({0.0, -0.0, 1.5, -1e300});
}

TEST(HashMap, AgreesWithAReferenceThroughGrowthsAndReplacements) {
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    LockFreeHashMap<int, std::string> map({.shards = 2});
    std::unordered_map<int, std::string> reference;
    std::mt19937_64 random(seed);
    for (int i = 0; i < 60000; ++i) {
      const int key = static_cast<int>(random() % 3000);
      const std::string value = std::to_string(i);
      switch (random() % 5) {
        case 0: ASSERT_EQ(map.insert(key, value), reference.emplace(key, value).second); break;
        case 1: ASSERT_EQ(map.insert_or_assign(key, value), reference.insert_or_assign(key, value).second); break;
        case 2: ASSERT_EQ(map.erase(key), reference.erase(key) == 1); break;
        default: {
          const auto at = reference.find(key);
          ASSERT_EQ(map.get(key), at == reference.end() ? std::nullopt : std::optional(at->second));
        }
      }
    }
    ASSERT_EQ(map.size(), reference.size());
    std::size_t found = 0;
    map.for_each([&](int key, const std::string& value) {
      ++found;
      EXPECT_EQ(reference.at(key), value);
    });
    EXPECT_EQ(found, reference.size());
    EXPECT_GT(map.statistics().growths, 2U);
    EXPECT_EQ(map.statistics().entries, reference.size());
    EXPECT_GE(map.statistics().slots, reference.size());
  }
}

// Erased slots must not fill the table for ever.
TEST(HashMap, KeysThatComeAndGoDoNotMakeItGrow) {
  LockFreeHashMap<int, int> map(one_shard);
  for (int i = 0; i < 100000; ++i) {
    map.insert(i, i);
    if (i >= 10) map.erase(i - 10);
  }
  EXPECT_EQ(map.size(), 10U);
  EXPECT_LE(map.statistics().slots, 64U);
}

TEST(HashMap, StringsAreFoundByWhateverIsAStringView) {
  LockFreeHashMap<std::string, int> map;
  ASSERT_TRUE(map.insert("alpha", 1));
  EXPECT_EQ(map.get("alpha"), 1);
  EXPECT_EQ(map.get(std::string_view("alphabet").substr(0, 5)), 1);
  EXPECT_EQ(map.get(std::string("alpha")), 1);
  EXPECT_FALSE(map.contains("beta"));
  EXPECT_TRUE(map.erase(std::string_view("alpha")));
}

TEST(HashMap, SessionIdsAreKeys) {
  LockFreeHashMap<SessionId, std::string> map;
  ASSERT_TRUE(map.insert(SessionId(7), "seven"));
  EXPECT_EQ(map.get(SessionId(7)), "seven");
  const auto all = map.snapshot();
  ASSERT_EQ(all.size(), 1U);
  EXPECT_EQ(all[0].first, SessionId(7));
}

struct Same {
  std::size_t operator()(int) const noexcept { return 42; }
};

TEST(HashMap, AHashThatAlwaysCollidesCostsOnlyTime) {
  LockFreeHashMap<int, std::unique_ptr<int>, Same> map;
  for (int i = 0; i < 200; ++i) ASSERT_TRUE(map.insert(i, std::make_unique<int>(i)));
  for (int i = 0; i < 200; ++i) ASSERT_FALSE(map.insert(i, std::make_unique<int>(-1)));
  for (int i = 0; i < 200; i += 2) ASSERT_TRUE(map.erase(i));
  for (int i = 1; i < 200; i += 2) ASSERT_FALSE(map.insert_or_assign(i, std::make_unique<int>(i * 10)));
  EXPECT_EQ(map.size(), 100U);
  int seen = 0;
  map.for_each([&](int key, const std::unique_ptr<int>& value) {
    ++seen;
    EXPECT_EQ(*value, key * 10);
  });
  EXPECT_EQ(seen, 100);
  for (int i = 0; i < 200; ++i) EXPECT_EQ(map.contains(i), i % 2 == 1);
  map.clear();
  EXPECT_TRUE(map.empty());
}

TEST(HashMap, TakesMoveOnlyValuesAndGivesARefusedOneBack) {
  LockFreeHashMap<int, std::unique_ptr<int>> map;
  auto value = std::make_unique<int>(1);
  ASSERT_TRUE(map.insert(1, std::move(value)));
  value = std::make_unique<int>(2);
  ASSERT_FALSE(map.insert(1, std::move(value)));
  ASSERT_TRUE(value);
  EXPECT_EQ(*value, 2);
  int seen = 0;
  EXPECT_TRUE(map.visit(1, [&](const std::unique_ptr<int>& there) { seen = *there; }));
  EXPECT_EQ(seen, 1);
  EXPECT_FALSE(map.visit(2, [](const std::unique_ptr<int>&) { FAIL(); }));
}

TEST(HashMap, ErasesOnlyWhatMeetsTheCondition) {
  LockFreeHashMap<int, int> map;
  map.insert(1, 10);
  EXPECT_FALSE(map.erase_if(1, [](int value) { return value != 10; }));
  EXPECT_FALSE(map.erase_if(2, [](int) { return true; }));
  EXPECT_TRUE(map.erase_if(1, [](int value) { return value == 10; }));
  EXPECT_TRUE(map.empty());
}

TEST(HashMap, TheVisitedValueOutlivesItsErasure) {
  LockFreeHashMap<int, std::string> map;
  map.insert(1, "a value that is too long to be kept in the string itself");
  map.insert(2, "another");
  ASSERT_TRUE(map.visit(1, [&](const std::string& value) {
    EXPECT_TRUE(map.erase(1));
    EXPECT_TRUE(map.insert(1, "anew"));
    Epoch::collect();  // does nothing in a guard
    map.for_each([&](int key, const std::string&) { map.erase(key); });
    EXPECT_EQ(value, "a value that is too long to be kept in the string itself");
  }));
  EXPECT_TRUE(map.empty());
}

TEST(HashMap, EveryValueBuiltIsDestroyedOnce) {
  const long before = Counted::alive();
  {
    LockFreeHashMap<int, Counted> map(one_shard);
    for (int i = 0; i < 1000; ++i) ASSERT_TRUE(map.insert(i, Counted(i)));
    for (int i = 0; i < 1000; i += 2) ASSERT_TRUE(map.erase(i));
    for (int i = 1; i < 1000; i += 4) ASSERT_FALSE(map.insert_or_assign(i, Counted(-i)));
    Epoch::collect();
    EXPECT_EQ(Counted::alive() - before, 500);
  }
  Epoch::collect();
  EXPECT_EQ(Counted::alive(), before);
}

TEST(HashMap, AnErasedValueMayUseTheMapWhenItIsDestroyed) {
  struct Tidy {
    using Map = LockFreeHashMap<int, std::unique_ptr<Tidy>>;
    Tidy(Map& in, int next) : map(in), other(next) {}
    ~Tidy() { map.erase(other); }
    Map& map;
    const int other;
  };
  Tidy::Map map;
  for (int i = 0; i < 300; ++i) map.insert(i, std::make_unique<Tidy>(map, i + 1));
  EXPECT_EQ(map.size(), 300U);
  map.erase(0);
  for (int i = 0; i < 1000 && Epoch::pending() != 0; ++i) Epoch::collect();
  EXPECT_EQ(Epoch::pending(), 0U);
  EXPECT_TRUE(map.empty()) << "each took the next along";
}

TEST(HashMap, BadOptionsAreRefusedByName) {
  for (const std::size_t shards : {0U, 3U, 131072U}) {
    try {
      LockFreeHashMap<int, int> map({.shards = shards});
      FAIL() << shards;
    } catch (const Exception& exception) {
      EXPECT_EQ(exception.code(), msgtrans::make_error_code(Errc::invalid_option));
      EXPECT_NE(std::string(exception.what()).find("shards is " + std::to_string(shards)), std::string::npos);
    }
  }
  EXPECT_THROW((LockFreeHashMap<int, int>({.initial_capacity = ~std::size_t{0}})), Exception);
}

TEST(HashMap, InitialCapacitySavesGrowing) {
  LockFreeHashMap<int, int> map({.shards = 4, .initial_capacity = 20000});
  for (int i = 0; i < 10000; ++i) map.insert(i, i);
  EXPECT_EQ(map.statistics().growths, 0U);
}

struct ThrowingHash {
  static inline bool armed = false;
  std::size_t operator()(const std::string& key) const {
    if (armed) throw std::runtime_error("hash");
    return std::hash<std::string>{}(key);
  }
};
struct ThrowingValue {
  static inline bool armed = false;
  ThrowingValue() = default;
  ThrowingValue(const ThrowingValue&) {
    if (armed) throw std::runtime_error("copy");
  }
};

TEST(HashMap, ExceptionsOfHashesAndCopiesChangeNothing) {
  LockFreeHashMap<std::string, int, ThrowingHash> hashes;
  hashes.insert("a", 1);
  ThrowingHash::armed = true;
  EXPECT_THROW(hashes.insert("b", 2), std::runtime_error);
  EXPECT_THROW(hashes.erase(std::string("a")), std::runtime_error);
  EXPECT_THROW((void)hashes.get(std::string("a")), std::runtime_error);
  ThrowingHash::armed = false;
  EXPECT_EQ(hashes.size(), 1U);

  LockFreeHashMap<int, ThrowingValue> copies;
  const ThrowingValue value;
  copies.insert(1, value);
  ThrowingValue::armed = true;
  EXPECT_THROW((void)copies.get(1), std::runtime_error);
  EXPECT_THROW(copies.insert(2, value), std::runtime_error);
  EXPECT_THROW(copies.insert_or_assign(1, value), std::runtime_error);
  EXPECT_THROW((void)copies.snapshot(), std::runtime_error);
  ThrowingValue::armed = false;
  EXPECT_EQ(copies.size(), 1U);
  EXPECT_TRUE(copies.erase(1));
}

TEST(HashMap, WithoutMemoryNothingIsChanged) {
  LockFreeHashMap<int, std::string> map(one_shard);
  int next = 0;
  for (; next < 10; ++next) map.insert(next, std::to_string(next));
  const std::string value(100, 'x');
  // Every allocation of an insert that makes the table grow fails once.
  int failures = 0;
  for (; next < 200; ++next) {
    for (int after = 0;; ++after) {
      try {
        const msgtrans::test::AllocationFailure failing(after);
        ASSERT_TRUE(map.insert(next, value));
        break;
      } catch (const std::bad_alloc&) {
        ++failures;
        ASSERT_FALSE(map.contains(next));
        ASSERT_EQ(map.size(), static_cast<std::size_t>(next));
      }
    }
  }
  EXPECT_GT(failures, 200);
  for (int i = 0; i < 200; ++i) ASSERT_TRUE(map.contains(i));
}

// ---- threads

TEST(HashMap, ThreadsByTheThousandNeedNoSetUp) {
  LockFreeHashMap<int, std::string> map;
  for (int round = 0; round < 250; ++round) {
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&map, key = round * 4 + t] {
        map.insert(key, std::to_string(key));
        map.erase(key - 100);
      });
    }
    for (auto& thread : threads) thread.join();
  }
  EXPECT_EQ(map.size(), 100U);
}

TEST(HashMap, WhatAThreadErasedBeforeItsEndIsDestroyedByAnother) {
  const long before = Counted::alive();
  LockFreeHashMap<int, Counted> map;
  std::thread([&map] {
    for (int i = 0; i < 50; ++i) map.insert(i, Counted(i));
    for (int i = 0; i < 50; ++i) map.erase(i);
  }).join();
  Epoch::collect();
  EXPECT_EQ(Counted::alive(), before);
}

TEST(HashMap, WorksInDestructorsOfThreadLocals) {
  static LockFreeHashMap<int, std::string> map;
  struct AtEnd {
    int key = 0;
    ~AtEnd() {
      map.insert(key, "left behind");
      map.erase(key - 1);
      EXPECT_TRUE(map.contains(key));
    }
  };
  for (int i = 1; i <= 20; ++i) {
    std::thread([i] {
      // Made before the thread first uses the map, and so destroyed after its record was given back.
      static thread_local AtEnd at_end;
      at_end.key = i;
      EXPECT_FALSE(map.contains(0));
    }).join();
  }
  EXPECT_EQ(map.size(), 1U);
}

TEST(HashMap, AReaderAsleepHoldsUpNobody) {
  LockFreeHashMap<int, std::string> map(one_shard);
  map.insert(0, "zero");
  std::atomic<bool> inside{false};
  std::atomic<bool> done{false};
  std::thread reader([&] {
    map.visit(0, [&](const std::string& value) {
      inside = true;
      while (!done) std::this_thread::yield();
      EXPECT_EQ(value, "zero");
    });
  });
  while (!inside) std::this_thread::yield();
  // Were one of these to wait for the reader, it would wait for ever.
  EXPECT_TRUE(map.erase(0));
  for (int i = 1; i < 5000; ++i) ASSERT_TRUE(map.insert(i, std::to_string(i)));
  for (int i = 1; i < 5000; ++i) ASSERT_TRUE(map.erase(i));
  Epoch::collect();
  EXPECT_GE(Epoch::pending(), 1U) << "what the reader may see is kept";
  done = true;
  reader.join();
  Epoch::collect();
  EXPECT_EQ(Epoch::pending(), 0U);
}

// Run at the end of the process, after the destruction of whatever was made later: it must not matter.
struct UsedUntilTheEnd {
  LockFreeHashMap<int, std::string> map;
  ~UsedUntilTheEnd() {
    map.insert(2, "still works");
    map.erase(1);
    if (!map.contains(2) || map.contains(1)) std::abort();
  }
};
UsedUntilTheEnd used_until_the_end;

TEST(HashMap, AStaticMapWorksBeforeAndAfterMain) {
  EXPECT_TRUE(used_until_the_end.map.insert(1, "one"));  // the rest is in its destructor
}

// ---- the counter

TEST(Counter, AddsUpWhatAllThreadsCount) {
  LockFreeCounter counter;
  std::vector<std::thread> threads;
  for (int t = 0; t < 12; ++t) {
    threads.emplace_back([&counter] {
      for (int i = 0; i < 1000; ++i) counter.add();
      counter.sub(10);
      counter.add(5);
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(counter.value(), 12 * 995);
}

}  // namespace
