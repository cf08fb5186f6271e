// SPDX-License-Identifier: Apache-2.0
// Before and after: the three stores of a server under one lock, as one writes them first, and as they are here.
//
//   sessions  find one of so many by its id and look at it; one operation in ten takes one out and puts one in
//   actors    find one of so many by its id and put a message into its mailbox; another thread empties the mailboxes
//   pool      take one of 16 idle connections and give it back
#include "micro.hpp"

#include <array>
#include <atomic>
#include <barrier>
#include <benchmark/benchmark.h>
#include <boost/asio/io_context.hpp>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <msgtrans/lockfree/queue.hpp>
#include <msgtrans/session_id.hpp>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using micro::Clock;
using micro::Sample;
using msgtrans::SessionId;

class Random {
 public:
  explicit Random(std::uint64_t seed) noexcept : state_(seed * 0x9e3779b97f4a7c15ULL + 1) {}
  std::uint64_t below(std::uint64_t limit) noexcept {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return (((state_ * 0x2545f4914f6cdd1dULL) >> 32) * limit) >> 32;
  }

 private:
  std::uint64_t state_;
};

/// Has `threads` threads call `work(thread, random)`, which gives how many operations it did, over and over for a
/// while.
template <class Work>
Sample in_threads(std::size_t threads, Work work) {
  constexpr auto duration = std::chrono::milliseconds(300);
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> ops{0};
  std::barrier start(static_cast<std::ptrdiff_t>(threads + 1));
  std::vector<std::thread> workers;
  for (std::size_t i = 0; i < threads; ++i) {
    workers.emplace_back([&, i] {
      Random random(i + 1);
      std::uint64_t mine = 0;
      start.arrive_and_wait();
      while (!stop.load(std::memory_order_relaxed)) mine += work(i, random);
      ops += mine;
    });
  }
  start.arrive_and_wait();
  const auto begin = Clock::now();
  std::this_thread::sleep_for(duration);
  stop = true;
  const double secs = micro::seconds_since(begin);
  for (auto& worker : workers) worker.join();
  return {ops, secs};
}

// ---- sessions

struct Session {
  std::atomic<std::uint64_t> packets{1};
};
using SessionPtr = std::shared_ptr<Session>;

class LockedMap {
 public:
  template <class F>
  bool visit(SessionId id, F f) {
    SessionPtr found;
    {
      const std::lock_guard lock(mutex_);
      const auto at = map_.find(id);
      if (at == map_.end()) return false;
      found = at->second;  // one does not work under the lock
    }
    f(found);
    return true;
  }
  void insert(SessionId id, SessionPtr session) {
    const std::lock_guard lock(mutex_);
    map_.emplace(id, std::move(session));
  }
  void erase(SessionId id) {
    SessionPtr gone;
    const std::lock_guard lock(mutex_);
    const auto at = map_.find(id);
    if (at == map_.end()) return;
    gone = std::move(at->second);
    map_.erase(at);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<SessionId, SessionPtr> map_;
};
using LockFreeMap = msgtrans::lockfree::LockFreeHashMap<SessionId, SessionPtr>;

template <class Map>
void add_sessions(const std::string& name) {
  for (const std::uint64_t size : {1'000U, 100'000U, 1'000'000U}) {
    for (const std::size_t threads : {1U, 2U}) {
      micro::add("migrate-sessions/" + std::to_string(size) + "/" + std::to_string(threads) + "/" + name,
                 [=, map = std::shared_ptr<Map>()]() mutable {
                   if (!map) {
                     map = std::make_shared<Map>();
                     for (std::uint64_t i = 1; i <= size; ++i) map->insert(SessionId(i), std::make_shared<Session>());
                   }
                   std::atomic<std::uint64_t> misses{0};
                   std::atomic<std::uint64_t> seen{0};
                   auto sample = in_threads(threads, [&](std::size_t, Random& random) {
                     std::uint64_t packets = 0;
                     std::uint64_t missed = 0;
                     for (int i = 0; i < 90; ++i) {
                       const SessionId id(1 + random.below(size));
                       const bool found = map->visit(id, [&packets](const SessionPtr& session) {
                         packets += session->packets.load(std::memory_order_relaxed);
                       });
                       missed += found ? 0 : 1;
                     }
                     for (int i = 0; i < 5; ++i) {
                       const SessionId id(1 + random.below(size));
                       map->erase(id);
                       map->insert(id, std::make_shared<Session>());
                     }
                     misses += missed;
                     seen += packets;
                     return std::uint64_t{100};
                   });
                   micro::require(seen > 0 && misses * 50 <= sample.ops, "migrate-sessions");
                   return sample;
                 });
    }
  }
}

// ---- actors

struct Message {
  std::uint64_t number = 0;
  std::array<char, 56> bytes{};
};

struct LockedActor {
  std::mutex mutex;
  std::deque<Message> mailbox;
  bool put(const Message& message) {
    const std::lock_guard lock(mutex);
    if (mailbox.size() >= 1024) return false;
    mailbox.push_back(message);
    return true;
  }
  std::size_t take(std::vector<Message>& out) {
    const std::lock_guard lock(mutex);
    const std::size_t count = std::min<std::size_t>(64, mailbox.size());
    out.assign(mailbox.begin(), mailbox.begin() + static_cast<std::ptrdiff_t>(count));
    mailbox.erase(mailbox.begin(), mailbox.begin() + static_cast<std::ptrdiff_t>(count));
    return count;
  }
};
struct ChannelActor {
  static inline boost::asio::io_context context;
  msgtrans::AsyncChannel<Message> mailbox{context.get_executor(), msgtrans::ChannelCapacity::bounded(1024)};
  bool put(const Message& message) { return mailbox.try_send(message) == msgtrans::ChannelStatus::ok; }
  std::size_t take(std::vector<Message>& out) {
    out.clear();
    return mailbox.try_recv_many(out, 64);
  }
};

class LockedStore {
 public:
  using Actor = LockedActor;
  void insert(SessionId id, std::shared_ptr<Actor> actor) {
    const std::lock_guard lock(mutex_);
    map_.emplace(id, std::move(actor));
  }
  bool tell(SessionId id, const Message& message) {
    std::shared_ptr<Actor> actor;
    {
      const std::lock_guard lock(mutex_);
      const auto at = map_.find(id);
      if (at == map_.end()) return false;
      actor = at->second;
    }
    return actor->put(message);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<SessionId, std::shared_ptr<Actor>> map_;
};
class LockFreeStore {
 public:
  using Actor = ChannelActor;
  void insert(SessionId id, std::shared_ptr<Actor> actor) { map_.insert(id, std::move(actor)); }
  bool tell(SessionId id, const Message& message) {
    bool told = false;
    map_.visit(id, [&](const std::shared_ptr<Actor>& actor) { told = actor->put(message); });
    return told;
  }

 private:
  msgtrans::lockfree::LockFreeHashMap<SessionId, std::shared_ptr<Actor>> map_;
};

template <class Store>
void add_actors(const std::string& name) {
  constexpr std::size_t count = 1000;
  micro::add("migrate-actors/" + std::to_string(count) + "/1/" + name, [] {
    Store store;
    std::vector<std::shared_ptr<typename Store::Actor>> actors;
    for (std::size_t i = 1; i <= count; ++i) {
      actors.push_back(std::make_shared<typename Store::Actor>());
      store.insert(SessionId(i), actors.back());
    }
    std::uint64_t told = 0;
    std::uint64_t taken = 0;
    auto sample = in_threads(2, [&](std::size_t thread, Random& random) -> std::uint64_t {
      if (thread == 0) {
        for (int i = 0; i < 64; ++i) {
          const SessionId id(1 + random.below(count));
          while (!store.tell(id, {told, {}})) std::this_thread::yield();
          ++told;
        }
        return 64;
      }
      static thread_local std::vector<Message> batch;
      for (auto& actor : actors) {
        while (const std::size_t got = actor->take(batch)) taken += got;
      }
      return 0;
    });
    std::vector<Message> rest;
    for (auto& actor : actors) {
      while (const std::size_t got = actor->take(rest)) taken += got;
    }
    micro::require(taken == told && told > 0, "migrate-actors");
    return sample;
  });
}

// ---- pool

struct Connection {
  std::uint64_t uses = 0;
};
using ConnectionPtr = std::unique_ptr<Connection>;

class LockedIdle {
 public:
  void give(ConnectionPtr connection) {
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(connection));
  }
  ConnectionPtr take() {
    const std::lock_guard lock(mutex_);
    if (idle_.empty()) return nullptr;
    auto connection = std::move(idle_.front());
    idle_.pop_front();
    return connection;
  }

 private:
  std::mutex mutex_;
  std::deque<ConnectionPtr> idle_;
};
class LockFreeIdle {
 public:
  void give(ConnectionPtr connection) { idle_.push(std::move(connection)); }
  ConnectionPtr take() {
    auto taken = idle_.try_pop();
    return taken ? std::move(*taken) : nullptr;
  }

 private:
  msgtrans::lockfree::LockFreeQueue<ConnectionPtr> idle_;
};

template <class Idle>
void add_pool(const std::string& name) {
  for (const std::size_t threads : {1U, 2U}) {
    micro::add("migrate-pool/16/" + std::to_string(threads) + "/" + name, [=] {
      Idle idle;
      for (int i = 0; i < 16; ++i) idle.give(std::make_unique<Connection>());
      auto sample = in_threads(threads, [&idle](std::size_t, Random&) {
        for (int i = 0; i < 64; ++i) {
          auto connection = idle.take();
          micro::require(connection != nullptr, "migrate-pool");
          ++connection->uses;
          idle.give(std::move(connection));
        }
        return std::uint64_t{64};
      });
      std::uint64_t uses = 0;
      while (auto connection = idle.take()) uses += connection->uses;
      micro::require(uses == sample.ops, "migrate-pool");
      return sample;
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  add_sessions<LockFreeMap>("msgtrans");
  add_sessions<LockedMap>("locked_map");
  add_actors<LockFreeStore>("msgtrans");
  add_actors<LockedStore>("locked_map");
  add_pool<LockFreeIdle>("msgtrans");
  add_pool<LockedIdle>("locked_deque");
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
