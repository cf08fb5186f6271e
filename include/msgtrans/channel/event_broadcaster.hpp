// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/channel/broadcast_channel.hpp>
#include <msgtrans/channel/channel_status.hpp>
#include <msgtrans/detail/clock.hpp>
#include <msgtrans/error.hpp>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

namespace msgtrans {

template <class T>
struct EventBroadcasterOptions {
  /// Events on their way in. When it is full, `publish` says so, and counts.
  std::size_t input_capacity = 1024;
  /// Events kept for subscribers that are behind; rounded up to a power of two.
  std::size_t ring_capacity = 1024;
  /// Calls `on_tick` so often; 0: never.
  std::chrono::milliseconds tick{0};
  /// What it gives is sent as an event: a summary, say, or a sign of life. On the broadcaster's executor. If it throws,
  /// that tick is left out and counted.
  std::function<std::optional<T>()> on_tick = {};
};

/// An EventBroadcaster's counters since it began.
struct EventBroadcasterStatistics {
  std::uint64_t published = 0;     ///< accepted by `publish`
  std::uint64_t dropped = 0;       ///< refused by `publish`: the input was full, or closed
  std::uint64_t broadcast = 0;     ///< sent to the subscribers, ticks' events among them
  std::uint64_t lost = 0;          ///< accepted, but not broadcast: no memory, or the context went first
  std::uint64_t ticks = 0;         ///< of the timer
  std::uint64_t failed_ticks = 0;  ///< of these, `on_tick` threw
  std::uint64_t missed = 0;        ///< events that subscribers were told they have missed, in all
  std::uint64_t lag = 0;           ///< events that the subscriber furthest behind has still to get, now
  std::size_t subscribers = 0;
};

/// Collects events from everywhere and sends them to all subscribers: a coroutine that waits for its input, a timer and
/// the sign to stop at once. Those who publish pay for one send to a channel, however many subscribers have to be
/// woken.
///
/// Thread safety: every call from any thread, except the destructor. That stops; events that are still on their way are
/// then sent by the coroutine, as long as its context runs.
///
/// It ends when it is stopped, when its context is destroyed, and when there is no memory to go on. However it ends,
/// what was accepted and not sent is counted as lost, `publish` says `closed`, and every subscription is closed.
template <class T>
class EventBroadcaster {
 public:
  /// Begins at once, on a strand of `executor`. `context`: as of BroadcastChannel. Throws `Exception` with
  /// `Errc::invalid_option`, or `std::bad_alloc`.
  explicit EventBroadcaster(boost::asio::any_io_executor executor, EventBroadcasterOptions<T> options = {},
                            std::shared_ptr<void> context = nullptr)
      : core_(std::make_shared<Core>(std::move(executor), std::move(options), std::move(context))) {
    boost::asio::co_spawn(boost::asio::make_strand(core_->executor), run(End(core_)), boost::asio::detached);
  }
  ~EventBroadcaster() { stop(); }
  EventBroadcaster(const EventBroadcaster&) = delete;
  EventBroadcaster& operator=(const EventBroadcaster&) = delete;

  /// `ok`, `full` or `closed`. Never waits. Order as of AsyncChannel.
  ChannelStatus publish(T event) {
    const auto status = core_->input.try_send(std::move(event));
    (status == ChannelStatus::ok ? core_->published : core_->dropped).fetch_add(1, std::memory_order_relaxed);
    return status;
  }
  /// Of the events that are broadcast from now on. Throws `std::bad_alloc`.
  [[nodiscard]] Subscription<T> subscribe() { return core_->output.subscribe(); }

  /// What was published before is still sent, then every subscription is closed. Again: nothing.
  void stop() noexcept {
    core_->input.close();
    core_->shutdown.close();
  }
  /// The same; then calls `ended`, once: on the broadcaster's executor, or where its context is being destroyed, or in
  /// this call if it has ended already.
  void stop(std::function<void()> ended) {
    {
      const std::lock_guard lock(core_->mutex);
      if (!core_->ended) core_->on_end.push_back(std::exchange(ended, nullptr));
    }
    if (ended) ended();
    stop();
  }

  [[nodiscard]] std::size_t subscribers() const noexcept { return core_->output.subscribers(); }
  [[nodiscard]] EventBroadcasterStatistics statistics() const noexcept {
    EventBroadcasterStatistics result;
    result.published = core_->published.load(std::memory_order_relaxed);
    result.dropped = core_->dropped.load(std::memory_order_relaxed);
    result.broadcast = core_->output.sent();
    result.lost = core_->lost.load(std::memory_order_relaxed);
    result.ticks = core_->ticks.load(std::memory_order_relaxed);
    result.failed_ticks = core_->failed_ticks.load(std::memory_order_relaxed);
    result.missed = core_->output.missed();
    result.lag = core_->output.lag();
    result.subscribers = core_->output.subscribers();
    return result;
  }

 private:
  struct Core {
    Core(boost::asio::any_io_executor on, EventBroadcasterOptions<T> with, std::shared_ptr<void> keep)
        : context(keep),
          executor(std::move(on)),
          options(checked(std::move(with))),
          input(executor, ChannelCapacity::bounded(options.input_capacity)),
          shutdown(executor, ChannelCapacity::bounded(1)),
          output(executor, options.ring_capacity, std::move(keep)) {}

    static EventBroadcasterOptions<T> checked(EventBroadcasterOptions<T> options) {
      if (options.tick.count() < 0) {
        throw Exception(Error(Errc::invalid_option, "tick is negative"));
      }
      if (options.tick.count() > 0 && !options.on_tick) {
        throw Exception(Error(Errc::invalid_option, "tick is set, and on_tick is not"));
      }
      return options;
    }

    const std::shared_ptr<void> context;
    // Not the strand: a strand must not outlive its context, and this may.
    const boost::asio::any_io_executor executor;
    const EventBroadcasterOptions<T> options;
    AsyncChannel<T> input;
    AsyncChannel<std::monostate> shutdown;  // nothing is sent on it: it is closed
    BroadcastChannel<T> output;
    std::atomic<std::uint64_t> published{0};
    std::atomic<std::uint64_t> dropped{0};
    std::atomic<std::uint64_t> lost{0};
    std::atomic<std::uint64_t> ticks{0};
    std::atomic<std::uint64_t> failed_ticks{0};
    std::vector<T> events;  // taken from the input, and not sent yet; the coroutine's
    std::mutex mutex;
    bool ended = false;
    std::vector<std::function<void()>> on_end;
  };

  /// Lives in the coroutine's frame, and so goes with it, whatever ends it.
  class End {
   public:
    explicit End(std::shared_ptr<Core> core) noexcept : core_(std::move(core)) {}
    End(End&&) noexcept = default;
    End& operator=(End&&) = delete;
    ~End() {
      if (!core_) return;
      core_->input.close();
      std::uint64_t lost = core_->events.size();
      for (auto left = core_->input.try_recv(); left; left = core_->input.try_recv()) ++lost;
      core_->lost.fetch_add(lost, std::memory_order_relaxed);
      core_->output.close();
      std::vector<std::function<void()>> on_end;
      {
        const std::lock_guard lock(core_->mutex);
        core_->ended = true;
        on_end.swap(core_->on_end);
      }
      for (const auto& call : on_end) call();
    }
    [[nodiscard]] Core& core() const noexcept { return *core_; }

   private:
    std::shared_ptr<Core> core_;
  };

  static boost::asio::awaitable<void> run(End end) {
    namespace asio = boost::asio;
    using namespace asio::experimental::awaitable_operators;  // NOLINT: it is operators
    constexpr auto token = asio::as_tuple(asio::use_awaitable);
    constexpr std::size_t batch = 256;

    Core& core = end.core();
    std::vector<T>& events = core.events;
    detail::Timer timer(co_await asio::this_coro::executor);
    const bool has_tick = core.options.tick.count() > 0;
    timer.expires_at(has_tick ? detail::Clock::now() + core.options.tick : detail::Clock::time_point::max());
    bool stopping = false;
    while (!stopping) {
      const auto first = co_await (core.input.async_recv_many(events, batch, token) || timer.async_wait(token) ||
                                   core.shutdown.async_recv(token));
      // By the clock: while there is always something in the input, the timer is never the first.
      if (has_tick && timer.expiry() <= detail::Clock::now()) {
        timer.expires_at(std::max(timer.expiry() + core.options.tick, detail::Clock::now()));
        tick(core);
      }
      stopping = first.index() == 2;
      send_all(core);
    }
    do {  // the rest
      core.input.try_recv_many(events, batch);
      send_all(core);
    } while (core.input.size() != 0);
  }

  static void tick(Core& core) {
    core.ticks.fetch_add(1, std::memory_order_relaxed);
    try {
      if (auto event = core.options.on_tick()) core.output.send(std::move(*event));
    } catch (...) {
      core.failed_ticks.fetch_add(1, std::memory_order_relaxed);
    }
  }
  static void send_all(Core& core) {
    for (T& event : core.events) {
      try {
        core.output.send(std::move(event));
      } catch (const std::bad_alloc&) {
        core.lost.fetch_add(1, std::memory_order_relaxed);
      }
    }
    core.events.clear();
  }

  const std::shared_ptr<Core> core_;
};

}  // namespace msgtrans
