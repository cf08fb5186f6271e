// SPDX-License-Identifier: Apache-2.0

// Channels between plain threads: SyncChannel beside what one would use instead. Names: <workload>/<library>.
//   seed/<messages>         one producer goes round 4 channels with a consumer thread each; messages of {u64, 64 bytes
//   on the
//                           heap}
//   mpmc/<kind>/<P>x<C>     2,000,000 u64 from P producers to C consumers; unbounded, or bounded to 1024
//   mpmc-many/...           the same, 256 at a time
//   pingpong                two threads, two channels; an operation is a round trip
//   idle                    100 channels with a thread asleep in each: the share of a core they take

#include "micro.hpp"

#include <concurrentqueue/blockingconcurrentqueue.h>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <msgtrans/channel/sync_channel.hpp>
#include <mutex>
#include <optional>
#include <sys/resource.h>
#include <vector>
#if MSGTRANS_BENCH_TBB
#include <tbb/concurrent_queue.h>
#endif

namespace {

using micro::Clock;
using micro::Sample;
using msgtrans::ChannelCapacity;

struct Message {
  std::uint64_t id = 0;
  std::vector<char> data;
};
constexpr std::uint64_t last = ~std::uint64_t{0};

// Every rival: Queue(capacity; 0 is unbounded), push(T), pop() -> T, both waiting; finish(n, end): nothing more comes,
// and each of n consumers is to get `end`.
template <class T>
class Ours {
 public:
  explicit Ours(std::size_t capacity)
      : channel_(capacity == 0 ? ChannelCapacity::unbounded() : ChannelCapacity::bounded(capacity)) {}
  void push(T value) { channel_.send(std::move(value)); }
  T pop() {
    auto result = channel_.recv();
    return result ? std::move(*result) : end_;
  }
  void finish(std::size_t, T end) {
    end_ = std::move(end);
    channel_.close();
  }
  void push_many(std::vector<T>& values) { channel_.send_many(values); }
  void pop_many(std::vector<T>& out, std::size_t max) { channel_.recv_many(out, max); }

 private:
  msgtrans::SyncChannel<T> channel_;
  T end_{};  // set before the close
};

/// For queues whose consumers are sent home by a value each.
template <class Queue, class T>
void push_ends(Queue& queue, std::size_t consumers, const T& end) {
  for (std::size_t i = 0; i < consumers; ++i) queue.push(end);
}

template <class T>
class MutexDeque {
 public:
  explicit MutexDeque(std::size_t capacity) : capacity_(capacity) {}
  void push(T value) {
    {
      std::unique_lock lock(mutex_);
      if (capacity_ != 0) room_.wait(lock, [this] { return values_.size() < capacity_; });
      values_.push_back(std::move(value));
    }
    filled_.notify_one();
  }
  T pop() {
    std::unique_lock lock(mutex_);
    filled_.wait(lock, [this] { return !values_.empty(); });
    T value = std::move(values_.front());
    values_.pop_front();
    lock.unlock();
    if (capacity_ != 0) room_.notify_one();
    return value;
  }
  void finish(std::size_t consumers, const T& end) { push_ends(*this, consumers, end); }

 private:
  std::mutex mutex_;
  std::condition_variable filled_;
  std::condition_variable room_;
  std::deque<T> values_;
  std::size_t capacity_;
};

/// moodycamel alone: no bound; its own waiting. It has no close, and what different threads put in comes out in any
/// order, so its end is when nothing has come for a millisecond, which is in its time.
template <class T>
class Moodycamel {
 public:
  explicit Moodycamel(std::size_t) {}
  void push(T value) { queue_.enqueue(std::move(value)); }
  T pop() {
    T value{};
    while (!queue_.wait_dequeue_timed(value, 1000)) {
      if (finished_.load(std::memory_order_acquire)) return end_;
    }
    return value;
  }
  void finish(std::size_t, T end) {
    end_ = std::move(end);
    finished_.store(true, std::memory_order_release);
  }

 private:
  moodycamel::BlockingConcurrentQueue<T> queue_;
  std::atomic<bool> finished_{false};
  T end_{};
};

#if MSGTRANS_BENCH_TBB
template <class T>
class Tbb {
 public:
  explicit Tbb(std::size_t capacity) {
    if (capacity != 0) queue_.set_capacity(static_cast<std::ptrdiff_t>(capacity));
  }
  void push(T value) { queue_.push(std::move(value)); }
  T pop() {
    T value{};
    queue_.pop(value);
    return value;
  }
  void finish(std::size_t consumers, const T& end) { push_ends(*this, consumers, end); }

 private:
  tbb::concurrent_bounded_queue<T> queue_;
};
#endif

template <class Queue>
Sample seed(std::uint64_t messages) {
  constexpr std::size_t actors = 4;
  const std::uint64_t each = messages / actors;
  const auto begin = Clock::now();
  std::vector<std::unique_ptr<Queue>> queues;
  std::vector<std::thread> consumers;
  std::atomic<std::uint64_t> bytes{0};
  for (std::size_t i = 0; i < actors; ++i) {
    queues.push_back(std::make_unique<Queue>(0));
    consumers.emplace_back([&queue = *queues.back(), &bytes] {
      std::uint64_t mine = 0;
      for (;;) {
        const Message message = queue.pop();
        if (message.id == last) break;
        mine += message.data.size();
      }
      bytes += mine;
    });
  }
  for (std::uint64_t i = 0; i < each; ++i) {
    for (auto& queue : queues) queue->push({i, std::vector<char>(64)});
  }
  for (auto& queue : queues) queue->finish(1, Message{last, {}});
  for (auto& consumer : consumers) consumer.join();
  micro::require(bytes == messages * 64, "seed");
  return {messages, micro::seconds_since(begin)};
}

constexpr std::uint64_t values = 2'000'000;

template <class Queue, bool many = false>
Sample mpmc(std::size_t capacity, std::size_t producers, std::size_t consumers) {
  Queue queue(capacity);
  std::atomic<std::uint64_t> sum{0};
  const auto begin = Clock::now();
  std::vector<std::thread> sending;
  std::vector<std::thread> receiving;
  const std::uint64_t each = values / producers;
  for (std::size_t p = 0; p < producers; ++p) {
    sending.emplace_back([&] {
      if constexpr (many) {
        std::vector<std::uint64_t> batch;
        for (std::uint64_t i = 1; i <= each; ++i) {
          batch.push_back(i);
          if (batch.size() == 256 || i == each) {
            queue.push_many(batch);
            batch.clear();
          }
        }
      } else {
        for (std::uint64_t i = 1; i <= each; ++i) queue.push(i);
      }
    });
  }
  for (std::size_t c = 0; c < consumers; ++c) {
    receiving.emplace_back([&] {
      std::uint64_t mine = 0;
      if constexpr (many) {
        std::vector<std::uint64_t> batch;
        for (;; batch.clear()) {
          queue.pop_many(batch, 256);
          if (batch.empty()) break;
          for (const auto value : batch) mine += value;
        }
      } else {
        for (std::uint64_t value = 0; (value = queue.pop()) != last;) mine += value;
      }
      sum += mine;
    });
  }
  for (auto& thread : sending) thread.join();
  queue.finish(consumers, last);
  for (auto& thread : receiving) thread.join();
  micro::require(sum == producers * (each * (each + 1) / 2), "mpmc");
  return {values, micro::seconds_since(begin)};
}

template <class Queue>
Sample pingpong() {
  constexpr std::uint64_t rounds = 50'000;
  Queue there(0);
  Queue back(0);
  const auto begin = Clock::now();
  std::thread partner([&] {
    for (std::uint64_t value = 0; (value = there.pop()) != last;) back.push(value);
  });
  for (std::uint64_t i = 0; i < rounds; ++i) {
    there.push(i);
    micro::require(back.pop() == i, "pingpong");
  }
  const double secs = micro::seconds_since(begin);
  there.finish(1, last);
  partner.join();
  return {rounds, secs};
}

double cpu_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto of = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
  };
  return of(usage.ru_utime) + of(usage.ru_stime);
}

template <class Queue>
Sample idle() {
  std::vector<std::unique_ptr<Queue>> queues;
  std::vector<std::thread> threads;
  for (int i = 0; i < 100; ++i) {
    queues.push_back(std::make_unique<Queue>(0));
    threads.emplace_back([&queue = *queues.back()] { micro::require(queue.pop() == 1, "idle"); });
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double before = cpu_seconds();
  const auto begin = Clock::now();
  std::this_thread::sleep_for(std::chrono::seconds(1));
  const double secs = micro::seconds_since(begin);
  const double share = (cpu_seconds() - before) / secs;
  for (auto& queue : queues) queue->push(1);
  for (auto& thread : threads) thread.join();
  return {100, secs, {{"core_share", share}}};
}

template <template <class> class Queue>
void add_library(const std::string& name, bool has_bound = true) {
  using Numbers = Queue<std::uint64_t>;
  for (const std::uint64_t messages : {100'000U, 1'000'000U}) {
    micro::add("seed/" + std::to_string(messages) + "/" + name, [messages] { return seed<Queue<Message>>(messages); });
  }
  for (const bool bounded : {false, true}) {
    if (bounded && !has_bound) continue;
    for (const auto& [p, c] : {std::pair{1, 1}, {4, 1}, {4, 4}, {1, 4}}) {
      const std::string shape = std::to_string(p) + "x" + std::to_string(c);
      micro::add("mpmc/" + std::string(bounded ? "bounded" : "unbounded") + "/" + shape + "/" + name,
                 [bounded, p = static_cast<std::size_t>(p), c = static_cast<std::size_t>(c)] {
                   return mpmc<Numbers>(bounded ? 1024 : 0, p, c);
                 });
      if constexpr (requires(Numbers queue, std::vector<std::uint64_t> batch) { queue.push_many(batch); }) {
        micro::add("mpmc-many/" + std::string(bounded ? "bounded" : "unbounded") + "/" + shape + "/" + name,
                   [bounded, p = static_cast<std::size_t>(p), c = static_cast<std::size_t>(c)] {
                     return mpmc<Numbers, true>(bounded ? 1024 : 0, p, c);
                   });
      }
    }
  }
  micro::add("pingpong/" + name, pingpong<Numbers>);
  if (has_bound) micro::add("idle/" + name, idle<Numbers>);  // it does wait by itself then
}

}  // namespace

int main(int argc, char** argv) {
  add_library<Ours>("msgtrans");
  add_library<MutexDeque>("mutex_deque");
  add_library<Moodycamel>("moodycamel", false);
#if MSGTRANS_BENCH_TBB
  add_library<Tbb>("tbb");
#endif
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
