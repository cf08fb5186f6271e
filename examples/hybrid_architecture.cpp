// SPDX-License-Identifier: Apache-2.0
// The composition that the library stands on, and what it is worth: three scenes, each on the channel that fits it,
// beside the same scenes on one mechanism for everything.
//
//   control   session added / removed: a map, and commands from many threads to one loop
//   protocol  packets of 64 bytes to four actors
//   events    health checks and session news to four subscribers
//   whole     all of it at once
//
//   hybrid    LockFreeHashMap + SyncChannel, ActorManager, EventBroadcaster: as inside ServerTransport
//   channel   a map under a mutex, and Asio's concurrent_channel wherever something is handed over
//   locks     a map under a mutex, and a deque, a mutex and a condition variable wherever something is handed over
//
// A line is one run of all three after another, repeated; medians, operations a second and the time from sending to
// handling. Usage: hybrid_architecture [operations a scene and run] [runs]
#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio.hpp>
#include <boost/asio/experimental/concurrent_channel.hpp>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <msgtrans/actor/actor_manager.hpp>
#include <msgtrans/channel/channel_strategy.hpp>
#include <msgtrans/channel/event_broadcaster.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace asio = boost::asio;
using Clock = std::chrono::steady_clock;

namespace {

constexpr std::size_t capacity = 1024;
constexpr std::size_t actors = 4;
constexpr std::size_t subscribers = 4;
constexpr std::size_t producers = 2;

/// What happened to the messages of a scene: how many were handled, and how long they were under way.
class Meter {
 public:
  void note(Clock::time_point sent) {
    // One look at the clock in 16: more would be the larger part of the work.
    if (handled_.fetch_add(1, std::memory_order_relaxed) % 16 != 0) return;
    const auto taken = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - sent);
    const std::lock_guard lock(mutex_);
    times_.push_back(taken.count());
  }
  void wait_for(std::size_t count) const {
    while (handled_.load() < count) std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
  double microseconds(double part) {
    if (times_.empty()) return 0;
    const auto at = times_.begin() + static_cast<std::ptrdiff_t>(part * static_cast<double>(times_.size() - 1));
    std::nth_element(times_.begin(), at, times_.end());
    return static_cast<double>(*at) / 1000.0;
  }

 private:
  std::atomic<std::size_t> handled_{0};
  std::mutex mutex_;
  std::vector<long> times_;
};

struct Command {
  msgtrans::SessionId session;
  bool added = false;
  Clock::time_point sent;
};
struct Packet {
  Clock::time_point sent;
  std::unique_ptr<std::array<char, 64>> bytes;
};
struct Event {
  Clock::time_point sent;
  msgtrans::SessionId session;
  std::uint32_t kind = 0;
};
struct Session {
  std::string peer = "127.0.0.1:40000";
};

/// A thread that runs a context.
class Runner {
 public:
  Runner() : work_(asio::make_work_guard(context_)), thread_([this] { context_.run(); }) {}
  ~Runner() { finish(); }
  /// Waits until nothing is left to do on it.
  void finish() {
    work_.reset();
    if (thread_.joinable()) thread_.join();
  }
  asio::io_context& context() { return context_; }

 private:
  asio::io_context context_{1};
  asio::executor_work_guard<asio::io_context::executor_type> work_;
  std::thread thread_;
};

// ---- hybrid

class Hybrid {
 public:
  Hybrid(Meter& control, Meter& protocol, Meter& events)
      : control_([this, &control] {
          std::vector<Command> batch;
          while (commands_.recv_many(batch, 256) != 0) {
            for (const Command& command : batch) control.note(command.sent);
            batch.clear();
          }
        }),
        manager_(io_.context().get_executor()),
        broadcaster_(news_.context().get_executor(), {.input_capacity = capacity, .ring_capacity = 16 * capacity}) {
    for (std::size_t i = 0; i < actors; ++i) {
      actors_.push_back(manager_.spawn(
          [&protocol](msgtrans::ProtocolActor<Packet> actor) { return handle(std::move(actor), &protocol); },
          {.mailbox = capacity}));
    }
    for (std::size_t i = 0; i < subscribers; ++i) {
      asio::co_spawn(news_.context(), hear(broadcaster_.subscribe(), &events), asio::detached);
    }
  }
  ~Hybrid() {
    commands_.close();
    control_.join();
    manager_.close();
    broadcaster_.stop();
  }

  void add(msgtrans::SessionId id) {
    sessions_.insert(id, std::make_shared<Session>());
    commands_.send({id, true, Clock::now()});
  }
  void remove(msgtrans::SessionId id) {
    sessions_.erase(id);
    commands_.send({id, false, Clock::now()});
  }
  void packet(std::size_t to, Packet packet) { actors_[to].tell(std::move(packet)); }
  void event(Event event) {
    while (broadcaster_.publish(event) == msgtrans::ChannelStatus::full) std::this_thread::yield();
  }

 private:
  static asio::awaitable<void> handle(msgtrans::ProtocolActor<Packet> actor, Meter* meter) {
    while (auto packet = co_await actor.receive()) meter->note(packet->sent);
  }
  static asio::awaitable<void> hear(msgtrans::Subscription<Event> news, Meter* meter) {
    for (;;) {
      auto [error, next] = co_await news.async_next(asio::as_tuple(asio::use_awaitable));
      if (error) co_return;
      for (;; next = news.try_next()) {  // what is there already costs no wait
        if (next) {
          meter->note(next->sent);
        } else if (next.lagged() == 0) {
          break;
        } else {
          // A bus may lose news, but says how many: they count as heard late.
          for (auto missed = next.lagged(); missed != 0; --missed) meter->note(Clock::now());
        }
      }
    }
  }

  msgtrans::lockfree::LockFreeHashMap<msgtrans::SessionId, std::shared_ptr<Session>> sessions_;
  msgtrans::SyncChannel<Command> commands_{msgtrans::ChannelCapacity::bounded(capacity)};
  std::thread control_;
  Runner io_;
  Runner news_;
  msgtrans::ActorManager<Packet> manager_;
  std::vector<msgtrans::ActorHandle<Packet>> actors_;
  msgtrans::EventBroadcaster<Event> broadcaster_;
};

// ---- one Asio channel for everything

template <class T>
class AsioQueue {
 public:
  AsioQueue(asio::io_context& context, Meter& meter) : channel_(context, capacity) {
    asio::co_spawn(context, receive(this, &meter), asio::detached);
  }
  void send(T value) {
    auto shared = std::make_shared<T>(std::move(value));  // its channels want copyable values
    while (!channel_.try_send(boost::system::error_code(), shared)) std::this_thread::yield();
  }
  void close() { channel_.close(); }

 private:
  static asio::awaitable<void> receive(AsioQueue* self, Meter* meter) {
    for (;;) {
      while (self->channel_.try_receive(
          [meter](boost::system::error_code, const std::shared_ptr<T>& value) { meter->note(value->sent); })) {
      }
      const auto [error, value] = co_await self->channel_.async_receive(asio::as_tuple(asio::use_awaitable));
      if (error) co_return;
      meter->note(value->sent);
    }
  }
  asio::experimental::concurrent_channel<void(boost::system::error_code, std::shared_ptr<T>)> channel_;
};

// ---- one lock for everything

template <class T>
class LockedQueue {
 public:
  explicit LockedQueue(Meter& meter)
      : thread_([this, &meter] {
          for (;;) {
            std::unique_lock lock(mutex_);
            changed_.wait(lock, [this] { return closed_ || !values_.empty(); });
            if (values_.empty()) return;
            const T value = std::move(values_.front());
            values_.pop_front();
            lock.unlock();
            room_.notify_one();
            meter.note(value.sent);
          }
        }) {}
  ~LockedQueue() { thread_.join(); }
  void send(T value) {
    {
      std::unique_lock lock(mutex_);
      room_.wait(lock, [this] { return values_.size() < capacity; });
      values_.push_back(std::move(value));
    }
    changed_.notify_one();
  }
  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable room_;
  std::deque<T> values_;
  bool closed_ = false;
  std::thread thread_;
};

/// Both of the latter: the same queue wherever something is handed over.
template <template <class> class Queue, class... Contexts>
class Uniform {
 public:
  Uniform(Meter& control, Meter& protocol, Meter& events) {
    commands_ = make<Command>(1, control);
    packets_ = make<Packet>(actors, protocol);
    events_ = make<Event>(subscribers, events);
  }
  ~Uniform() {
    for (auto& queue : commands_) queue->close();
    for (auto& queue : packets_) queue->close();
    for (auto& queue : events_) queue->close();
    std::apply([](auto&... contexts) { (contexts.finish(), ...); }, contexts_);
  }
  void add(msgtrans::SessionId id) {
    {
      const std::lock_guard lock(mutex_);
      sessions_.emplace(id, std::make_shared<Session>());
    }
    commands_[0]->send({id, true, Clock::now()});
  }
  void remove(msgtrans::SessionId id) {
    {
      const std::lock_guard lock(mutex_);
      sessions_.erase(id);
    }
    commands_[0]->send({id, false, Clock::now()});
  }
  void packet(std::size_t to, Packet packet) { packets_[to]->send(std::move(packet)); }
  void event(Event event) {
    for (auto& queue : events_) queue->send(event);
  }

 private:
  template <class T>
  std::vector<std::unique_ptr<Queue<T>>> make(std::size_t count, Meter& meter) {
    std::vector<std::unique_ptr<Queue<T>>> queues;
    for (std::size_t i = 0; i < count; ++i) {
      if constexpr (sizeof...(Contexts) == 0) {
        queues.push_back(std::make_unique<Queue<T>>(meter));
      } else {
        queues.push_back(std::make_unique<Queue<T>>(std::get<0>(contexts_).context(), meter));
      }
    }
    return queues;
  }

  std::tuple<Contexts...> contexts_;
  std::mutex mutex_;
  std::unordered_map<msgtrans::SessionId, std::shared_ptr<Session>> sessions_;
  std::vector<std::unique_ptr<Queue<Command>>> commands_;
  std::vector<std::unique_ptr<Queue<Packet>>> packets_;
  std::vector<std::unique_ptr<Queue<Event>>> events_;
};
using OneChannel = Uniform<AsioQueue, Runner>;
using Locks = Uniform<LockedQueue>;

// ---- the work

struct Figures {
  double per_second = 0;
  double p50 = 0;
  double p99 = 0;
};
using Scenes = std::map<std::string, Figures>;

template <class System>
void control_work(System& system, std::size_t operations) {
  std::vector<std::thread> threads;
  for (std::size_t p = 0; p < producers; ++p) {
    threads.emplace_back([&system, p, each = operations / producers] {
      for (std::size_t i = 0; i < each / 2; ++i) {
        const msgtrans::SessionId id(1 + p * each + i);
        system.add(id);
        system.remove(id);
      }
    });
  }
  for (auto& thread : threads) thread.join();
}
template <class System>
void protocol_work(System& system, std::size_t operations) {
  for (std::size_t i = 0; i < operations; ++i) {
    system.packet(i % actors, {Clock::now(), std::make_unique<std::array<char, 64>>()});
  }
}
template <class System>
void event_work(System& system, std::size_t operations) {
  for (std::size_t i = 0; i < operations / subscribers; ++i) {
    system.event({Clock::now(), msgtrans::SessionId(i + 1), static_cast<std::uint32_t>(i % 3)});
  }
}

template <class Work>
Figures measure(Meter& meter, std::size_t operations, Work work) {
  const auto start = Clock::now();
  work();
  meter.wait_for(operations);
  const std::chrono::duration<double> taken = Clock::now() - start;
  return {static_cast<double>(operations) / taken.count(), meter.microseconds(0.5), meter.microseconds(0.99)};
}

template <class System>
Scenes run(std::size_t operations) {
  Scenes scenes;
  {
    Meter control, protocol, events;
    System system(control, protocol, events);
    scenes["1 control"] = measure(control, operations, [&] { control_work(system, operations); });
    scenes["2 protocol"] = measure(protocol, operations, [&] { protocol_work(system, operations); });
    scenes["3 events"] = measure(events, operations, [&] { event_work(system, operations); });
  }
  Meter all;
  System system(all, all, all);
  scenes["4 whole"] = measure(all, 3 * operations, [&] {
    std::thread control([&] { control_work(system, operations); });
    std::thread events([&] { event_work(system, operations); });
    protocol_work(system, operations);
    control.join();
    events.join();
  });
  return scenes;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t wanted = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 200'000;
  const std::size_t operations = std::max<std::size_t>(16, wanted / 16 * 16);
  const int runs = argc > 2 ? std::max(1, std::atoi(argv[2])) : 5;

  const std::vector<std::pair<std::string, std::function<Scenes(std::size_t)>>> systems{
      {"hybrid", run<Hybrid>}, {"channel", run<OneChannel>}, {"locks", run<Locks>}};
  std::map<std::string, std::map<std::string, std::vector<Figures>>> results;  // scene, system
  for (int i = 0; i < runs; ++i) {
    for (const auto& [name, system] : systems) {
      for (const auto& [scene, figures] : system(operations)) results[scene][name].push_back(figures);
    }
  }

  std::printf("%zu operations a scene, medians of %d interleaved runs, %u cores\n\n", operations, runs,
              std::thread::hardware_concurrency());
  std::printf("%-12s%-10s%14s%14s%14s%14s\n", "scene", "system", "operations/s", "p50 us", "p99 us", "hybrid is");
  for (const auto& [scene, by_system] : results) {
    const auto of = [&](const std::string& name, double Figures::*field) {
      std::vector<double> values;
      for (const Figures& figures : by_system.at(name)) values.push_back(figures.*field);
      return median(values);
    };
    for (const auto& [name, unused] : systems) {
      const double rate = of(name, &Figures::per_second);
      std::printf("%-12s%-10s%14.0f%14.1f%14.1f", scene.c_str() + 2, name.c_str(), rate, of(name, &Figures::p50),
                  of(name, &Figures::p99));
      if (name == "hybrid") {
        std::printf("\n");
      } else {
        std::printf("%9.2f times\n", of("hybrid", &Figures::per_second) / rate);
      }
    }
  }
  return 0;
}
