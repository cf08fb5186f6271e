// SPDX-License-Identifier: Apache-2.0

// Channels between coroutines: AsyncChannel and BroadcastChannel beside what one would use instead. Two contexts with a
// thread each, as the rivals in Rust have two workers. Names: <workload>/<library>.
//   async-seed/<messages>         a plain thread goes round 4 channels, with a coroutine at each
//   async-mpmc/<kind>/<P>x<C>     2,000,000 u64 from P to C coroutines; unbounded, or bounded to 1024
//   async-pingpong/<same|two>     two coroutines, on one context or on two; an operation is a round trip
//   broadcast/<mode>/<S>          200,000 events of 32 bytes to S coroutines; paced: the sender is a coroutine and lets
//   nobody
//                                 fall behind; flood: a thread that never waits. An operation is an event received.
//   async-idle                    100 channels with a coroutine parked at each: the share of a core they take

#include "micro.hpp"

#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/experimental/concurrent_channel.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <cstddef>
#include <deque>
#include <latch>
#include <memory>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/channel/broadcast_channel.hpp>
#include <mutex>
#include <sys/resource.h>
#include <vector>

namespace {

namespace asio = boost::asio;
using asio::awaitable;
using micro::Clock;
using micro::Sample;
using msgtrans::ChannelCapacity;
using msgtrans::ChannelStatus;

constexpr auto as_tuple = asio::as_tuple(asio::use_awaitable);

struct Message {
  std::uint64_t id = 0;
  std::vector<char> data;
};
constexpr std::uint64_t last = ~std::uint64_t{0};

class Contexts {
 public:
  explicit Contexts(std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      contexts_.push_back(std::make_unique<asio::io_context>(1));
      work_.push_back(asio::make_work_guard(*contexts_.back()));
    }
    for (auto& context : contexts_) threads_.emplace_back([&context] { context->run(); });
  }
  ~Contexts() { finish(); }
  void finish() {
    work_.clear();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
  }
  asio::io_context& operator[](std::size_t i) { return *contexts_[i % contexts_.size()]; }

 private:
  std::vector<std::unique_ptr<asio::io_context>> contexts_;
  std::vector<asio::executor_work_guard<asio::io_context::executor_type>> work_;
  std::vector<std::thread> threads_;
};

// Every rival: push(T) from a thread (unbounded); `co_await send(T)`; `co_await receive(f)`, which calls f(T) with what
// has come, once at least.
template <class T>
class Ours {
 public:
  Ours(asio::io_context& context, std::size_t capacity)
      : channel_(context.get_executor(),
                 capacity == 0 ? ChannelCapacity::unbounded() : ChannelCapacity::bounded(capacity)) {}
  void push(T value) { (void)channel_.try_send(std::move(value)); }
  bool try_push(T& value) { return channel_.try_send(std::move(value)) == ChannelStatus::ok; }
  awaitable<void> push_later(T value) { (void)co_await channel_.async_send(std::move(value), as_tuple); }
  template <class F>
  bool try_receive(F& f) {
    auto result = channel_.try_recv();
    if (!result) return false;
    f(std::move(*result));
    return true;
  }
  template <class F>
  awaitable<void> receive(F& f) {
    auto [error, value] = co_await channel_.async_recv(as_tuple);
    micro::require(!error, "receive");
    f(std::move(value));
  }

 protected:
  msgtrans::AsyncChannel<T> channel_;
};
/// The same by `async_recv_many`.
template <class T>
class OursMany : public Ours<T> {
 public:
  using Ours<T>::Ours;
  template <class F>
  bool try_receive(F&) {
    return false;
  }
  template <class F>
  awaitable<void> receive(F& f) {
    std::vector<T> batch;
    co_await this->channel_.async_recv_many(batch, 256, asio::use_awaitable);
    for (T& value : batch) f(std::move(value));
  }
};

/// Boost's, which has no end without a bound.
template <class T>
class Boost {
 public:
  Boost(asio::io_context& context, std::size_t capacity)
      : channel_(context.get_executor(), capacity == 0 ? ~std::size_t{0} >> 1 : capacity) {}
  void push(T value) { channel_.try_send(boost::system::error_code(), std::move(value)); }
  bool try_push(T& value) { return channel_.try_send(boost::system::error_code(), std::move(value)); }
  awaitable<void> push_later(T value) {
    (void)co_await channel_.async_send(boost::system::error_code(), std::move(value), as_tuple);
  }
  template <class F>
  bool try_receive(F& f) {
    return channel_.try_receive([&f](boost::system::error_code, T value) { f(std::move(value)); });
  }
  template <class F>
  awaitable<void> receive(F& f) {
    auto [error, value] = co_await channel_.async_receive(as_tuple);
    micro::require(!error, "receive");
    f(std::move(value));
  }

 private:
  asio::experimental::concurrent_channel<void(boost::system::error_code, T)> channel_;
};

template <class Queue>
awaitable<void> consume_messages(Queue& queue, std::uint64_t each, std::atomic<std::uint64_t>& bytes,
                                 std::latch& done) {
  std::uint64_t mine = 0;
  std::uint64_t count = 0;
  auto take = [&](Message message) {
    ++count;
    mine += message.data.size();
  };
  while (count < each) {
    if (!queue.try_receive(take)) co_await queue.receive(take);
  }
  bytes += mine;
  done.count_down();
}

template <class Queue>
Sample seed(std::uint64_t messages) {
  constexpr std::size_t actors = 4;
  const std::uint64_t each = messages / actors;
  Contexts contexts(2);
  std::atomic<std::uint64_t> bytes{0};
  std::latch done(actors);
  const auto begin = Clock::now();
  std::vector<std::unique_ptr<Queue>> queues;
  for (std::size_t i = 0; i < actors; ++i) {
    queues.push_back(std::make_unique<Queue>(contexts[i], 0));
    asio::co_spawn(contexts[i], consume_messages(*queues.back(), each, bytes, done), asio::detached);
  }
  for (std::uint64_t i = 0; i < each; ++i) {
    for (auto& queue : queues) queue->push({i, std::vector<char>(64)});
  }
  done.wait();
  const double secs = micro::seconds_since(begin);
  micro::require(bytes == messages * 64, "seed");
  contexts.finish();
  return {messages, secs};
}

constexpr std::uint64_t values = 2'000'000;

template <class Queue>
awaitable<void> produce(Queue& queue, std::uint64_t each) {
  for (std::uint64_t i = 1; i <= each; ++i) {
    std::uint64_t value = i;
    if (!queue.try_push(value)) co_await queue.push_later(value);
  }
}
template <class Queue>
awaitable<void> consume(Queue& queue, std::atomic<std::uint64_t>& left, std::atomic<std::uint64_t>& sum,
                        std::size_t consumers, std::latch& done) {
  std::uint64_t mine = 0;
  std::uint64_t count = 0;
  std::uint64_t ends = 0;
  auto take = [&](std::uint64_t value) {
    if (value == last) {
      ++ends;
      return;
    }
    mine += value;
    ++count;
  };
  while (ends == 0) {
    if (!queue.try_receive(take)) co_await queue.receive(take);
    // Whoever takes the last value sends the others home, and himself.
    if (count != 0 && left.fetch_sub(count) == count) {
      for (std::size_t i = 0; i < consumers; ++i) {
        std::uint64_t end = last;
        if (!queue.try_push(end)) co_await queue.push_later(end);
      }
    }
    count = 0;
    for (; ends > 1; --ends) {
      std::uint64_t end = last;
      if (!queue.try_push(end)) co_await queue.push_later(end);
    }
  }
  sum += mine;
  done.count_down();
}

template <class Queue>
Sample mpmc(std::size_t capacity, std::size_t producers, std::size_t consumers) {
  Contexts contexts(2);
  Queue queue(contexts[0], capacity);
  const std::uint64_t each = values / producers;
  std::atomic<std::uint64_t> left{values};
  std::atomic<std::uint64_t> sum{0};
  std::latch done(static_cast<std::ptrdiff_t>(consumers));
  const auto begin = Clock::now();
  for (std::size_t c = 0; c < consumers; ++c) {
    asio::co_spawn(contexts[c], consume(queue, left, sum, consumers, done), asio::detached);
  }
  for (std::size_t p = 0; p < producers; ++p) {
    asio::co_spawn(contexts[p + 1], produce(queue, each), asio::detached);
  }
  done.wait();
  const double secs = micro::seconds_since(begin);
  contexts.finish();
  micro::require(sum == producers * (each * (each + 1) / 2), "async-mpmc");
  return {values, secs};
}

template <class Queue>
awaitable<void> ping(Queue& there, Queue& back, std::uint64_t rounds, std::latch& done) {
  std::uint64_t expected = 0;
  auto take = [&](std::uint64_t value) { micro::require(value == expected, "async-pingpong"); };
  for (; expected < rounds; ++expected) {
    there.push(expected);
    co_await back.receive(take);
  }
  there.push(last);
  done.count_down();
}
template <class Queue>
awaitable<void> pong(Queue& there, Queue& back) {
  bool ended = false;
  auto take = [&](std::uint64_t value) {
    ended = value == last;
    back.push(value);
  };
  while (!ended) co_await there.receive(take);
}

template <class Queue>
Sample pingpong(bool same, std::uint64_t rounds) {
  Contexts contexts(same ? 1 : 2);
  Queue there(contexts[0], 0);
  Queue back(contexts[1], 0);
  std::latch done(1);
  const auto begin = Clock::now();
  asio::co_spawn(contexts[0], ping(there, back, rounds, done), asio::detached);
  asio::co_spawn(contexts[1], pong(there, back), asio::detached);
  done.wait();
  const double secs = micro::seconds_since(begin);
  contexts.finish();
  return {rounds, secs};
}

// ---- broadcast

struct Event {
  std::uint64_t words[4];
};
constexpr std::uint64_t events = 200'000;
constexpr std::size_t ring = 1024;
struct alignas(128) Seen {
  std::atomic<std::uint64_t> events{0};
};

/// Every rival: send(Event), subscribe() -> a subscriber with `co_await next(f, lag)`, false at the end.
class OurBroadcast {
 public:
  explicit OurBroadcast(asio::io_context& context) : channel_(context.get_executor(), ring) {}
  void send(const Event& event) { channel_.send(event); }
  void close() { channel_.close(); }

  class Subscriber {
   public:
    explicit Subscriber(msgtrans::Subscription<Event> subscription) : subscription_(std::move(subscription)) {}
    template <class F, class L>
    awaitable<bool> next(F& f, L& lag) {
      auto next = subscription_.try_next();
      if (next.kind() == msgtrans::NextResult<Event>::Kind::empty) {
        auto [error, later] = co_await subscription_.async_next(as_tuple);
        if (error) co_return false;
        next = std::move(later);
      }
      for (;; next = subscription_.try_next()) {
        if (next) {
          f(*next);
        } else if (next.lagged() != 0) {
          lag(next.lagged());
        } else {
          co_return !next.closed();
        }
      }
    }

   private:
    msgtrans::Subscription<Event> subscription_;
  };
  Subscriber subscribe() { return Subscriber(channel_.subscribe()); }

 private:
  msgtrans::BroadcastChannel<Event> channel_;
};

/// A channel of Boost's for each subscriber: what one does without a broadcast channel.
class BoostBroadcast {
  using Channel = asio::experimental::concurrent_channel<void(boost::system::error_code, Event)>;

 public:
  explicit BoostBroadcast(asio::io_context& context) : context_(context) {}
  void send(const Event& event) {
    for (auto& one : channels_) {
      if (!one->channel.try_send(boost::system::error_code(), event)) ++one->lagged;
    }
  }
  void close() {
    for (auto& one : channels_) {
      // close() would throw away what is still there.
      while (!one->channel.try_send(boost::asio::error::eof, Event{})) std::this_thread::yield();
    }
  }
  struct One {
    explicit One(asio::io_context& context) : channel(context.get_executor(), ring) {}
    Channel channel;
    std::uint64_t lagged = 0;  // the sender's, until the end
  };
  class Subscriber {
   public:
    explicit Subscriber(One& one) : one_(&one) {}
    template <class F, class L>
    awaitable<bool> next(F& f, L& lag) {
      for (;;) {
        auto [error, event] = co_await one_->channel.async_receive(as_tuple);
        if (error) {
          lag(one_->lagged);
          co_return false;
        }
        f(event);
        bool ended = false;
        while (one_->channel.try_receive([&](boost::system::error_code failed, const Event& more) {
          if (failed) {
            ended = true;
          } else {
            f(more);
          }
        })) {
          if (ended) break;
        }
        if (!ended) continue;
        lag(one_->lagged);
        co_return false;
      }
    }

   private:
    One* one_;
  };
  Subscriber subscribe() {
    channels_.push_back(std::make_unique<One>(context_));
    return Subscriber(*channels_.back());
  }

 private:
  asio::io_context& context_;
  std::vector<std::unique_ptr<One>> channels_;
};

template <class Subscriber>
awaitable<void> watch(Subscriber subscriber, Seen& seen, std::atomic<std::uint64_t>& received, std::latch& done) {
  std::uint64_t got = 0;
  std::uint64_t missed = 0;
  auto take = [&](const Event& event) {
    benchmark::DoNotOptimize(event);
    if (++got % 64 == 0) seen.events.store(got + missed, std::memory_order_release);
  };
  auto lag = [&](std::uint64_t count) { missed += count; };
  while (co_await subscriber.next(take, lag)) {
  }
  micro::require(got + missed == events, "broadcast");
  received += got;
  done.count_down();
}

template <class Channel>
awaitable<void> send_paced(Channel& channel, std::vector<Seen>& seen, double& secs) {
  const auto executor = co_await asio::this_coro::executor;
  const auto begin = Clock::now();
  for (std::uint64_t i = 0; i < events; ++i) {
    while (i % 64 == 0) {
      std::uint64_t least = i;
      for (const Seen& one : seen) least = std::min(least, one.events.load(std::memory_order_acquire));
      if (i - least <= ring - 128) break;
      co_await asio::post(executor, asio::use_awaitable);
    }
    channel.send(Event{{i, i, i, i}});
  }
  secs = micro::seconds_since(begin);
  channel.close();
}

template <class Channel>
Sample broadcast(bool paced, std::size_t subscribers) {
  Contexts contexts(2);
  Channel channel(contexts[0]);
  std::vector<Seen> seen(subscribers);
  std::atomic<std::uint64_t> received{0};
  std::latch done(static_cast<std::ptrdiff_t>(subscribers));
  double sending = 0;
  const auto begin = Clock::now();
  for (std::size_t i = 0; i < subscribers; ++i) {
    asio::co_spawn(contexts[i], watch(channel.subscribe(), seen[i], received, done), asio::detached);
  }
  if (paced) {
    asio::co_spawn(contexts[1], send_paced(channel, seen, sending), asio::detached);
  } else {
    const auto start = Clock::now();
    for (std::uint64_t i = 0; i < events; ++i) channel.send(Event{{i, i, i, i}});
    sending = micro::seconds_since(start);
    channel.close();
  }
  done.wait();
  const double secs = micro::seconds_since(begin);
  contexts.finish();
  return {received, secs, {{"send_ns", sending * 1e9 / static_cast<double>(events)}}};
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
  Contexts contexts(2);
  std::vector<std::unique_ptr<Queue>> queues;
  std::atomic<std::uint64_t> bytes{0};
  std::latch done(100);
  for (std::size_t i = 0; i < 100; ++i) {
    queues.push_back(std::make_unique<Queue>(contexts[i], 0));
    asio::co_spawn(contexts[i], consume_messages(*queues.back(), 1, bytes, done), asio::detached);
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  const double before = cpu_seconds();
  const auto begin = Clock::now();
  std::this_thread::sleep_for(std::chrono::seconds(1));
  const double secs = micro::seconds_since(begin);
  const double share = (cpu_seconds() - before) / secs;
  for (auto& queue : queues) queue->push({1, {}});
  done.wait();
  contexts.finish();
  return {100, secs, {{"core_share", share}}};
}

template <template <class> class Queue>
void add_library(const std::string& name) {
  using Numbers = Queue<std::uint64_t>;
  for (const std::uint64_t messages : {100'000U, 1'000'000U}) {
    micro::add("async-seed/" + std::to_string(messages) + "/" + name,
               [messages] { return seed<Queue<Message>>(messages); });
  }
  for (const bool bounded : {false, true}) {
    for (const auto& [p, c] : {std::pair{1, 1}, {4, 1}, {4, 4}, {1, 4}}) {
      micro::add("async-mpmc/" + std::string(bounded ? "bounded" : "unbounded") + "/" + std::to_string(p) + "x" +
                     std::to_string(c) + "/" + name,
                 [bounded, p = static_cast<std::size_t>(p), c = static_cast<std::size_t>(c)] {
                   return mpmc<Numbers>(bounded ? 1024 : 0, p, c);
                 });
    }
  }
  micro::add("async-pingpong/same/" + name, [] { return pingpong<Numbers>(true, 200'000); });
  micro::add("async-pingpong/two/" + name, [] { return pingpong<Numbers>(false, 50'000); });
  micro::add("async-idle/" + name, idle<Queue<Message>>);
}

template <class Channel>
void add_broadcast(const std::string& name) {
  for (const bool paced : {true, false}) {
    for (const std::size_t subscribers : {1U, 4U, 16U, 64U}) {
      micro::add("broadcast/" + std::string(paced ? "paced" : "flood") + "/" + std::to_string(subscribers) + "/" + name,
                 [=] { return broadcast<Channel>(paced, subscribers); });
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  add_library<Ours>("msgtrans");
  add_library<OursMany>("msgtrans_many");
  add_library<Boost>("boost");
  add_broadcast<OurBroadcast>("msgtrans");
  add_broadcast<BoostBroadcast>("boost_each");
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
