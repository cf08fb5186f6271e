// SPDX-License-Identifier: Apache-2.0

// LockFreeHashMap beside what one would use instead: u64 -> pointer, SIZE keys, each operation on a key drawn at
// random. A write is in turn an erase and the insert of the same key again, one operation each. Names:
//   map/<size>/<reads>-<writes>/<threads>/<library>
//   map-iterate/<size>/<library>    an operation is an entry

#include "micro.hpp"

#include <barrier>
#include <boost/unordered/unordered_flat_map.hpp>
#include <cstddef>
#include <memory>
#include <msgtrans/lockfree/hash_map.hpp>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>
#include <vector>
#if MSGTRANS_BENCH_TBB
#include <tbb/concurrent_hash_map.h>
#endif
#if MSGTRANS_BENCH_CUCKOO
#include <libcuckoo/cuckoohash_map.hh>
#endif

namespace {

using micro::Clock;
using micro::Sample;
using Value = const std::uint64_t*;

// Every rival: visit(key) -> whether it is there, having looked at the value; insert, erase, for_each(f).
class Ours {
 public:
  bool visit(std::uint64_t key) const {
    return map_.visit(key, [](Value value) { benchmark::DoNotOptimize(value); });
  }
  void insert(std::uint64_t key, Value value) { map_.insert(key, value); }
  void erase(std::uint64_t key) { map_.erase(key); }
  template <class F>
  void for_each(F f) const {
    map_.for_each([&f](std::uint64_t key, Value) { f(key); });
  }
  [[nodiscard]] double bytes() const { return static_cast<double>(map_.statistics().table_bytes); }

 private:
  msgtrans::lockfree::LockFreeHashMap<std::uint64_t, Value> map_;
};
/// With values that need a node of their own, copied out: what shared ownership costs.
class OursShared {
 public:
  bool visit(std::uint64_t key) const {
    auto value = map_.get(key);
    benchmark::DoNotOptimize(value);
    return value.has_value();
  }
  void insert(std::uint64_t key, Value value) { map_.insert(key, std::make_shared<const std::uint64_t>(*value)); }
  void erase(std::uint64_t key) { map_.erase(key); }
  template <class F>
  void for_each(F f) const {
    map_.for_each([&f](std::uint64_t key, const std::shared_ptr<const std::uint64_t>&) { f(key); });
  }
  [[nodiscard]] double bytes() const {
    const auto statistics = map_.statistics();
    // Two words and a shared_ptr, as malloc gives it out.
    return static_cast<double>(statistics.table_bytes + statistics.entries * (32 + 16));
  }

 private:
  msgtrans::lockfree::LockFreeHashMap<std::uint64_t, std::shared_ptr<const std::uint64_t>> map_;
};

/// The limit: no synchronisation at all, and so for one thread.
class Flat {
 public:
  static constexpr bool one_thread = true;
  bool visit(std::uint64_t key) const {
    const auto found = map_.find(key);
    if (found == map_.end()) return false;
    benchmark::DoNotOptimize(found->second);
    return true;
  }
  void insert(std::uint64_t key, Value value) { map_.emplace(key, value); }
  void erase(std::uint64_t key) { map_.erase(key); }
  template <class F>
  void for_each(F f) const {
    for (const auto& [key, value] : map_) f(key);
  }

 private:
  boost::unordered_flat_map<std::uint64_t, Value> map_;
};

template <std::size_t shards>
class SharedMutex {
 public:
  bool visit(std::uint64_t key) const {
    const Shard& in = shards_[key % shards];
    const std::shared_lock lock(in.mutex);
    const auto found = in.map.find(key);
    if (found == in.map.end()) return false;
    benchmark::DoNotOptimize(found->second);
    return true;
  }
  void insert(std::uint64_t key, Value value) {
    Shard& in = shards_[key % shards];
    const std::unique_lock lock(in.mutex);
    in.map.emplace(key, value);
  }
  void erase(std::uint64_t key) {
    Shard& in = shards_[key % shards];
    const std::unique_lock lock(in.mutex);
    in.map.erase(key);
  }
  template <class F>
  void for_each(F f) const {
    for (const Shard& in : shards_) {
      const std::shared_lock lock(in.mutex);
      for (const auto& [key, value] : in.map) f(key);
    }
  }

 private:
  struct alignas(128) Shard {
    mutable std::shared_mutex mutex;
    std::unordered_map<std::uint64_t, Value> map;
  };
  std::array<Shard, shards> shards_;
};

#if MSGTRANS_BENCH_TBB
class Tbb {
 public:
  bool visit(std::uint64_t key) const {
    Map::const_accessor at;
    if (!map_.find(at, key)) return false;
    benchmark::DoNotOptimize(at->second);
    return true;
  }
  void insert(std::uint64_t key, Value value) { map_.insert({key, value}); }
  void erase(std::uint64_t key) { map_.erase(key); }
  template <class F>
  void for_each(F f) const {
    for (const auto& [key, value] : map_) f(key);
  }

 private:
  using Map = tbb::concurrent_hash_map<std::uint64_t, Value>;
  Map map_;
};
#endif

#if MSGTRANS_BENCH_CUCKOO
class Cuckoo {
 public:
  bool visit(std::uint64_t key) const {
    return map_.find_fn(key, [](Value value) { benchmark::DoNotOptimize(value); });
  }
  void insert(std::uint64_t key, Value value) { map_.insert(key, value); }
  void erase(std::uint64_t key) { map_.erase(key); }
  template <class F>
  void for_each(F f) {
    auto locked = map_.lock_table();
    for (const auto& [key, value] : locked) f(key);
  }

 private:
  libcuckoo::cuckoohash_map<std::uint64_t, Value> map_;
};
#endif

constexpr auto duration = std::chrono::milliseconds(350);

template <class Map>
std::shared_ptr<Map> filled(std::uint64_t size) {
  static const std::vector<std::uint64_t> targets(1024, 7);
  auto map = std::make_shared<Map>();
  for (std::uint64_t key = 0; key < size; ++key) map->insert(key, &targets[key % targets.size()]);
  return map;
}

template <class Map>
Sample mixed(Map& map, std::uint64_t size, std::uint64_t write_percent, std::size_t threads) {
  static const std::uint64_t target = 7;
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> ops{0};
  std::atomic<std::uint64_t> misses{0};
  std::barrier start(static_cast<std::ptrdiff_t>(threads + 1));
  std::vector<std::thread> workers;
  Clock::time_point begin;
  for (std::size_t t = 0; t < threads; ++t) {
    workers.emplace_back([&, t] {
      std::uint64_t x = (t + 1) * 0x9e3779b97f4a7c15ULL;
      std::uint64_t mine = 0;
      std::uint64_t missed = 0;
      std::uint64_t removed = ~std::uint64_t{0};
      start.arrive_and_wait();
      while (!stop.load(std::memory_order_relaxed)) {
        for (int i = 0; i < 64; ++i, ++mine) {
          x ^= x >> 12;
          x ^= x << 25;
          x ^= x >> 27;
          const std::uint64_t random = x * 0x2545f4914f6cdd1dULL;
          const std::uint64_t key = ((random & 0xffffffff) * size) >> 32;
          if (((random >> 32) * 100) >> 32 >= write_percent) {
            missed += map.visit(key) ? 0 : 1;
          } else if (removed != ~std::uint64_t{0}) {
            map.insert(std::exchange(removed, ~std::uint64_t{0}), &target);
          } else {
            map.erase(key);
            removed = key;
          }
        }
      }
      if (removed != ~std::uint64_t{0}) map.insert(removed, &target);
      ops += mine;
      misses += missed;
    });
  }
  start.arrive_and_wait();
  begin = Clock::now();
  std::this_thread::sleep_for(duration);
  stop = true;
  const double secs = micro::seconds_since(begin);
  for (auto& worker : workers) worker.join();
  micro::require(misses * 50 <= ops, "map");
  return {ops, secs};
}

template <class Map>
void add_library(const std::string& name) {
  for (const std::uint64_t size : {1'000U, 100'000U, 1'000'000U}) {
    for (const std::uint64_t writes : {0U, 10U, 50U}) {
      for (const std::size_t threads : {1U, 2U}) {
        if constexpr (requires { Map::one_thread; }) {
          if (threads > 1) continue;
        }
        micro::add("map/" + std::to_string(size) + "/" + std::to_string(100 - writes) + "-" + std::to_string(writes) +
                       "/" + std::to_string(threads) + "/" + name,
                   [=, map = std::shared_ptr<Map>()]() mutable {
                     if (!map) map = filled<Map>(size);
                     return mixed(*map, size, writes, threads);
                   });
      }
    }
    micro::add("map-iterate/" + std::to_string(size) + "/" + name, [=, map = std::shared_ptr<Map>()]() mutable {
      if (!map) map = filled<Map>(size);
      const int rounds = static_cast<int>(2'000'000 / size);
      std::uint64_t sum = 0;
      std::uint64_t count = 0;
      const auto begin = Clock::now();
      for (int i = 0; i < rounds; ++i) {
        map->for_each([&](std::uint64_t key) {
          sum += key;
          ++count;
        });
      }
      Sample sample{count, micro::seconds_since(begin)};
      micro::require(count == size * static_cast<std::uint64_t>(rounds) &&
                         sum == size * (size - 1) / 2 * static_cast<std::uint64_t>(rounds),
                     "map-iterate");
      if constexpr (requires { map->bytes(); })
        sample.extra["bytes_per_entry"] = map->bytes() / static_cast<double>(size);
      return sample;
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  add_library<Ours>("msgtrans");
  add_library<OursShared>("msgtrans_shared_ptr");
  add_library<Flat>("flat_map_unsynchronised");
  add_library<SharedMutex<1>>("shared_mutex");
  add_library<SharedMutex<16>>("shared_mutex_x16");
#if MSGTRANS_BENCH_TBB
  add_library<Tbb>("tbb");
#endif
#if MSGTRANS_BENCH_CUCKOO
  add_library<Cuckoo>("libcuckoo");
#endif
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
