// SPDX-License-Identifier: Apache-2.0
#include "control_loop.hpp"
#include "support/fixture.hpp"
#include "support/process.hpp"
#include "support/server_process.hpp"

#include <array>
#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/deferred.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/system_executor.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <random>
#include <thread>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using asio::use_awaitable;

/// Nobody listens there.
std::string dead_url() {
  return RawListener().endpoint().url();
}

/// What an acquire under way came to.
struct Acquired {
  error_code code;
  std::shared_ptr<PooledConnection> connection;
};
using Acquiring = std::future<Acquired>;

Acquiring begin_acquire(ConnectionPool& pool) {
  auto promise = std::make_shared<std::promise<Acquired>>();
  auto result = promise->get_future();
  pool.async_acquire([promise](error_code code, PooledConnection connection) {
    promise->set_value({code, std::make_shared<PooledConnection>(std::move(connection))});
  });
  return result;
}

/// Every connection that was ever made is somewhere.
void expect_account(const PoolStats& stats) {
  EXPECT_EQ(stats.made, stats.idle + stats.in_use + stats.probing + stats.closed());
  EXPECT_EQ(stats.waiting, 0U);
}

/// A server that echoes, leaves "silence" unanswered, and ends the session at "die".
class Pool : public ::testing::Test {
 protected:
  void SetUp() override {
    server.transport.on_message([this](Session& session, const Message& message) {
      if (message.biz_type() == probe_type) {
        probes.add(std::string(message.text()));
        if (!answers_probes) return;
      }
      if (message.text() == "silence") return;
      if (message.text() == "die") return session.close();
      if (message.text() == "say something") session.send("something");
      if (message.is_request()) {
        session.respond(message, message.payload());
      } else {
        one_way.add(std::string(message.text()));
      }
    });
    server.start();
    ASSERT_TRUE(wait_until([] {
      return library_threads() == 3;
    }));  // the server's shards and its control loop; they are named when they run
  }
  [[nodiscard]] ConnectionPoolOptions options(std::size_t min, std::size_t max) const {
    ConnectionPoolOptions options;
    options.url = server.url();
    options.min_connections = min;
    options.max_connections = max;
    options.acquire_timeout = patience;
    options.idle_time = 0ms;
    return options;
  }
  /// Ends every session, from the server's side.
  void end_sessions() {
    for (const SessionId id : server.transport.session_manager().ids()) server.transport.close(id);
  }

  static constexpr std::uint8_t probe_type = 77;
  std::atomic<bool> answers_probes{true};
  Record<std::string> probes;
  Record<std::string> one_way;
  TestServer server;
};

// --- taking and giving back

TEST_F(Pool, HandsOutAConnectionAndTakesItBack) {
  ConnectionPool pool(options(0, 4));
  for (int i = 0; i < 10; ++i) {
    auto connection = pool.acquire();
    EXPECT_EQ(connection->request(std::to_string(i)).text(), std::to_string(i));
    EXPECT_EQ(pool.stats().in_use, 1U);
  }
  const auto stats = pool.stats();
  EXPECT_EQ(stats.made, 1U);
  EXPECT_EQ(stats.idle, 1U);
  EXPECT_EQ(stats.in_use, 0U);
  EXPECT_EQ(stats.acquired, 10U);
  EXPECT_EQ(stats.waited, 1U);  // for the first there was none
  EXPECT_EQ(server.came.size(), 1U);
  expect_account(stats);
}

TEST_F(Pool, MovesAConnectionAndGivesItBackOnce) {
  ConnectionPool pool(options(0, 4));
  auto first = pool.acquire();
  PooledConnection second(std::move(first));
  EXPECT_TRUE(second);
  EXPECT_FALSE(first);  // NOLINT: what is left of it
  first = std::move(second);
  PooledConnection& same = first;
  first = std::move(same);
  EXPECT_EQ(first->request("x").text(), "x");
  EXPECT_EQ(pool.stats().in_use, 1U);
  first = {};
  EXPECT_EQ(pool.stats().in_use, 0U);
  first.discard();
  EXPECT_EQ(pool.stats().idle, 1U);
}

TEST_F(Pool, TakesWhatIsThereWithoutWaiting) {
  ConnectionPool pool(options(0, 4));
  EXPECT_FALSE(pool.try_acquire());
  EXPECT_EQ(pool.stats().connecting, 0U);
  (void)pool.acquire();
  EXPECT_TRUE(pool.try_acquire());
}

TEST_F(Pool, KeepsTheMinimum) {
  ConnectionPool pool(options(3, 5));
  EXPECT_TRUE(wait_until([&] { return pool.stats().idle == 3; }));
  EXPECT_TRUE(server.came.wait_for(3));
  EXPECT_EQ(pool.stats().made, 3U);
}

TEST_F(Pool, MakesNoMoreThanTheMaximumAndServesWhoWaitsWithWhatIsGivenBack) {
  ConnectionPool pool(options(0, 2));
  auto first = pool.acquire();
  auto second = pool.acquire();
  auto third = begin_acquire(pool);
  auto fourth = begin_acquire(pool);
  EXPECT_TRUE(wait_until([&] { return pool.stats().waited == 4; }));
  EXPECT_EQ(pool.stats().waiting, 2U);
  EXPECT_EQ(pool.stats().connecting, 0U);
  EXPECT_EQ(third.wait_for(0ms), std::future_status::timeout);
  const auto id = first->session()->id();
  first = {};
  const auto got = in_time(third);
  ASSERT_FALSE(got.code);
  EXPECT_EQ((*got.connection)->session()->id(), id);
  second = {};
  EXPECT_FALSE(in_time(fourth).code);
  EXPECT_EQ(pool.stats().made, 2U);
  EXPECT_TRUE(server.came.wait_for(2));  // a connection is made before it is accepted
  EXPECT_EQ(server.came.size(), 2U);
}

TEST_F(Pool, TimesOutInLine) {
  auto with = options(0, 1);
  with.acquire_timeout = 80ms;
  ConnectionPool pool(with);
  const auto held = pool.acquire();
  const auto began = Clock::now();
  Error error;
  EXPECT_FALSE(pool.acquire(error));
  EXPECT_EQ(error.code, asio::error::timed_out);
  EXPECT_NE(error.text.find("80 ms"), std::string::npos) << error.text;
  EXPECT_GE(Clock::now() - began, 80ms);
  EXPECT_EQ(thrown([&] { (void)pool.acquire(); }), asio::error::timed_out);
  Error refused;
  EXPECT_TRUE(pool.request("x", {}, refused).payload().empty());
  EXPECT_EQ(refused.code, asio::error::timed_out);
  const auto stats = pool.stats();
  EXPECT_EQ(stats.timed_out, 3U);
  expect_account(stats);
}

TEST_F(Pool, SaysWhyThereIsNoConnection) {
  auto with = options(0, 1);
  with.url = dead_url();
  with.acquire_timeout = 50ms;
  ConnectionPool pool(with);
  Error error;
  EXPECT_FALSE(pool.acquire(error));
  EXPECT_EQ(error.code, asio::error::timed_out);
  EXPECT_NE(error.text.find("refused"), std::string::npos) << error.text;
  EXPECT_GE(pool.stats().failed, 1U);
}

TEST_F(Pool, ServesTheLineInOrderAndLetsNobodyOvertake) {
  constexpr int waiters = 200;
  ConnectionPool pool(options(0, 1));
  Record<int> order;
  auto held = pool.acquire();
  for (int i = 0; i < waiters; ++i) {
    pool.async_acquire([order, i](error_code code, PooledConnection) { order.add(code ? -2 : i); });
  }
  std::atomic<bool> stop = false;
  std::vector<std::thread> newcomers;
  for (int t = 0; t < 3; ++t) {
    newcomers.emplace_back([&, order] {
      while (!stop) {
        if (pool.try_acquire()) order.add(-1);
      }
    });
  }
  std::thread late([&] {
    EXPECT_FALSE(pool.acquire()->request("x").payload().empty());
    order.add(waiters);
  });
  held = {};
  const bool all = order.wait_for(waiters + 1);
  stop = true;
  for (auto& thread : newcomers) thread.join();
  late.join();
  ASSERT_TRUE(all);
  for (int i = 0; i < waiters; ++i) ASSERT_EQ(order.at(static_cast<std::size_t>(i)), i);
}

// --- cancellation

TEST_F(Pool, LeavesTheLineWhenCancelled) {
  ConnectionPool pool(options(0, 1));
  auto held = pool.acquire();
  asio::io_context context(1);
  asio::cancellation_signal signal;
  Record<error_code> result;
  pool.async_acquire(asio::bind_executor(
      context, asio::bind_cancellation_slot(signal.slot(), [result](error_code code, PooledConnection connection) {
        EXPECT_FALSE(connection);
        result.add(code);
      })));
  auto next = begin_acquire(pool);
  EXPECT_TRUE(wait_until([&] { return pool.stats().waited == 3; }));
  signal.emit(asio::cancellation_type::partial);
  context.run_for(patience);
  EXPECT_EQ(result.at(0), asio::error::operation_aborted);
  EXPECT_EQ(pool.stats().cancelled, 1U);
  held = {};
  EXPECT_FALSE(in_time(next).code);
}

asio::awaitable<int> race_timers(ConnectionPool& pool, int rounds) {
  using namespace asio::experimental::awaitable_operators;
  int got = 0;
  asio::steady_timer timer(co_await asio::this_coro::executor);
  for (int i = 0; i < rounds; ++i) {
    timer.expires_after(std::chrono::microseconds(i % 5 * 20));
    const auto result = co_await (pool.async_acquire(asio::as_tuple(use_awaitable)) || timer.async_wait(use_awaitable));
    if (result.index() == 0 && !std::get<0>(std::get<0>(result))) ++got;
  }
  co_return got;
}

TEST_F(Pool, LosesNoConnectionToCancelledWaiters) {
  ConnectionPool pool(options(2, 2));
  asio::thread_pool threads(2);
  std::vector<std::future<int>> racers;
  for (int i = 0; i < 8; ++i) {
    racers.push_back(asio::co_spawn(asio::make_strand(threads), race_timers(pool, 200), asio::use_future));
  }
  int got = 0;
  for (auto& racer : racers) got += in_time(racer);
  EXPECT_GT(got, 0);
  EXPECT_TRUE(wait_until([&] { return pool.stats().idle == 2; }));
  const auto stats = pool.stats();
  EXPECT_GT(stats.cancelled, 0U);
  EXPECT_EQ(stats.made, 2U);
  expect_account(stats);
}

TEST_F(Pool, CancelsARequestInLineAndInFlight) {
  ConnectionPool pool(options(0, 1));
  for (const bool in_line : {true, false}) {
    auto held = in_line ? pool.acquire() : PooledConnection();
    asio::io_context context(1);
    asio::cancellation_signal signal;
    Record<error_code> result;
    pool.async_request("silence", {.timeout = 0ms},
                       asio::bind_executor(
                           context, asio::bind_cancellation_slot(
                                        signal.slot(), [result](error_code code, const Reply&) { result.add(code); })));
    EXPECT_TRUE(wait_until([&] { return in_line ? pool.stats().waiting == 1 : pool.stats().in_use == 1; }));
    signal.emit(asio::cancellation_type::terminal);
    context.run_for(patience);
    EXPECT_EQ(result.at(0), asio::error::operation_aborted);
    held = {};
    EXPECT_TRUE(wait_until([&] { return pool.stats().idle == 1; }));
  }
  EXPECT_EQ(pool.request("still there").text(), "still there");
  EXPECT_EQ(pool.stats().made, 1U);
}

// --- requests

TEST_F(Pool, AsksByEveryToken) {
  ConnectionPool pool(options(0, 2));
  EXPECT_EQ(pool.request("blocking").text(), "blocking");
  EXPECT_EQ(in_time(pool.async_request("future", asio::use_future)).text(), "future");
  auto deferred = [&] {
    const std::string gone = pattern(5000);
    return pool.async_request(gone, {.biz_type = 3}, asio::deferred);
  }();
  EXPECT_TRUE(in_time(std::move(deferred)(asio::use_future)).text() == pattern(5000));
  asio::io_context context(1);
  auto result = asio::co_spawn(
      context,
      [](ConnectionPool& from) -> asio::awaitable<std::string> {
        const auto here = std::this_thread::get_id();
        auto connection = co_await from.async_acquire(use_awaitable);
        EXPECT_EQ(std::this_thread::get_id(), here);
        const Reply reply = co_await connection->async_request("acquired", use_awaitable);
        co_return std::string(reply.text()) +
            std::string((co_await from.async_request(" asked", use_awaitable)).text());
      }(pool),
      asio::use_future);
  context.run_for(patience);
  EXPECT_EQ(in_time(result), "acquired asked");
  EXPECT_LE(pool.stats().made, 2U);
}

TEST_F(Pool, PassesOnWhatARequestFailsWith) {
  ConnectionPool pool(options(0, 1));
  const auto code_of = [&](BytesView payload, const RequestOptions& options) {
    Error error;
    (void)pool.request(payload, options, error);
    return error.code;
  };
  EXPECT_EQ(code_of("silence", {.timeout = 10ms}), Errc::request_timeout);
  EXPECT_EQ(code_of("x", {.timeout = -1ms}), Errc::invalid_option);
  EXPECT_EQ(code_of(pattern(20'000'000), {}), Errc::too_large);
  EXPECT_EQ(code_of("die", {}), Errc::connection_lost);  // it was sent, so it is not sent again
  EXPECT_EQ(pool.request("x").text(), "x");
  EXPECT_TRUE(wait_until([&] { return pool.stats().closed_broken == 1; }));
  EXPECT_EQ(server.came.size(), 2U);
}

TEST_F(Pool, NeverCompletesInsideTheInitiatingCall) {
  ConnectionPool pool(options(1, 1));
  ASSERT_TRUE(wait_until([&] { return pool.stats().idle == 1; }));
  static thread_local bool initiating = false;
  std::atomic<int> completed = 0, inside = 0;
  const auto note = [&](auto&&...) {
    if (initiating) ++inside;
    ++completed;
  };
  const auto try_all = [&] {
    initiating = true;
    pool.async_acquire(note);
    pool.async_acquire(note);
    pool.async_request("x", note);
    pool.async_request("x", {.timeout = -1ms}, note);
    initiating = false;
  };
  try_all();
  ASSERT_TRUE(wait_until([&] { return completed == 4; }));
  asio::post(pool.get_executor(), try_all);
  ASSERT_TRUE(wait_until([&] { return completed == 8; }));
  pool.close();
  try_all();
  ASSERT_TRUE(wait_until([&] { return completed == 12; }));
  EXPECT_EQ(inside, 0);
}

TEST_F(Pool, RefusesToBlockWhereHandlersRun) {
  ConnectionPool pool(options(1, 1));
  Record<error_code> codes;
  pool.async_request("x", [&, codes](error_code, const Reply&) {
    Error error;
    (void)pool.acquire(error);
    codes.add(error.code);
    (void)pool.request("x", {}, error);
    codes.add(error.code);
  });
  EXPECT_EQ(codes.at(0), Errc::blocking_on_shard);
  EXPECT_EQ(codes.at(1), Errc::blocking_on_shard);
}

TEST_F(Pool, CountsWhatHandlersThrowAndGoesOn) {
  ConnectionPool pool(options(0, 1));
  pool.async_acquire([](error_code, PooledConnection) { throw std::runtime_error("a handler's"); });
  EXPECT_TRUE(wait_until([&] { return pool.stats().handler_failures == 1; }));
  EXPECT_EQ(pool.request("x").text(), "x");
}

TEST_F(Pool, WritesWhatWasSentOnAConnectionThatIsGivenUp) {
  ConnectionPool pool(options(0, 1));
  const std::string large = pattern(3'000'000);
  {
    auto connection = pool.acquire();
    EXPECT_EQ(connection->send(large), SendResult::queued);
    connection.discard();
    EXPECT_FALSE(connection);
  }
  EXPECT_TRUE(one_way.at(0) == large);
  EXPECT_TRUE(wait_until([&] { return pool.stats().closed_discarded == 1; }));
}

// --- what is broken, idle or old

TEST_F(Pool, NoticesABrokenIdleConnectionAndReplacesItDownToTheMinimum) {
  auto with = options(2, 4);
  with.backoff.initial = 1ms;
  ConnectionPool pool(with);
  {
    std::vector<PooledConnection> four;
    for (int i = 0; i < 4; ++i) four.push_back(pool.acquire());
  }
  EXPECT_EQ(pool.stats().idle, 4U);
  ASSERT_TRUE(server.came.wait_for(4));
  end_sessions();
  EXPECT_TRUE(wait_until([&] { return pool.stats().closed_broken == 4 && pool.stats().idle == 2; }));
  const auto stats = pool.stats();
  EXPECT_EQ(stats.made, 6U);
  EXPECT_EQ(stats.replaced, 2U);
  expect_account(stats);
}

TEST_F(Pool, DropsAConnectionThatBrokeInUse) {
  ConnectionPool pool(options(0, 1));
  auto held = pool.acquire();
  auto waiting = begin_acquire(pool);
  end_sessions();
  EXPECT_TRUE(wait_until([&] { return !held->is_connected(); }));
  EXPECT_EQ(pool.stats().in_use, 1U);  // still the user's
  held = {};
  const auto got = in_time(waiting);  // a new one
  ASSERT_FALSE(got.code);
  EXPECT_EQ((*got.connection)->request("x").text(), "x");
  EXPECT_EQ(pool.stats().closed_broken, 1U);
  EXPECT_EQ(pool.stats().replaced, 1U);
}

TEST_F(Pool, ReplacesWhatWasDiscarded) {
  ConnectionPool pool(options(1, 1));
  auto connection = pool.acquire();
  const auto id = connection->session()->id();
  connection.discard();
  EXPECT_NE(pool.acquire()->session()->id(), id);
  EXPECT_EQ(pool.stats().closed_discarded, 1U);
  EXPECT_EQ(pool.stats().replaced, 1U);
}

TEST_F(Pool, ClosesWhatIsIdleForTooLongDownToTheMinimum) {
  auto with = options(1, 4);
  ConnectionPool keeps(with);
  with.idle_time = 100ms;
  ConnectionPool closes(with);
  for (auto* const pool : {&keeps, &closes}) {
    std::vector<PooledConnection> all;
    for (int i = 0; i < 4; ++i) all.push_back(pool->acquire());
    if (pool == &closes) {
      const auto began = Clock::now();
      const auto kept = std::move(all.back());
      all.clear();
      EXPECT_TRUE(wait_until([&] { return pool->stats().closed_idle == 3; }));
      EXPECT_GE(Clock::now() - began, 100ms);
      EXPECT_EQ(pool->stats().in_use, 1U);
    }
  }
  EXPECT_TRUE(wait_until([&] { return server.ends.size() == 3; }));
  EXPECT_FALSE(wait_until([&] { return closes.stats().closed_idle > 3; }, 300ms));
  EXPECT_EQ(closes.stats().idle, 1U);
  EXPECT_EQ(keeps.stats().idle, 4U);
  EXPECT_EQ(keeps.stats().closed(), 0U);
}

TEST_F(Pool, UseKeepsAConnectionFromBeingIdle) {
  auto with = options(0, 1);
  with.idle_time = 2s;
  ConnectionPool pool(with);
  const auto id = pool.acquire()->session()->id();
  for (const auto until = Clock::now() + 3s; Clock::now() < until; std::this_thread::sleep_for(100ms)) {
    ASSERT_EQ(pool.acquire()->session()->id(), id);
  }
}

TEST_F(Pool, ReplacesWhatIsTooOldWhenNobodyUsesIt) {
  auto with = options(1, 1);
  with.lifetime = 150ms;
  with.backoff.initial = 1ms;
  ConnectionPool pool(with);
  auto held = pool.acquire();
  const auto id = held->session()->id();
  EXPECT_FALSE(wait_until([&] { return pool.stats().closed() != 0; }, 300ms));
  EXPECT_EQ(held->request("in spite of its age").text(), "in spite of its age");
  held = {};
  EXPECT_TRUE(wait_until([&] { return pool.stats().closed_expired >= 1; }));
  EXPECT_NE(pool.acquire()->session()->id(), id);
  // And those that nobody touches, again and again.
  EXPECT_TRUE(wait_until([&] { return pool.stats().closed_expired >= 4; }));
  EXPECT_GE(pool.stats().replaced, 3U);
}

// --- probes

TEST_F(Pool, ProbesIdleConnectionsAndKeepsThoseThatAnswer) {
  auto with = options(2, 2);
  with.probe = {.interval = 30ms, .timeout = 10s, .payload = "are you there?", .biz_type = probe_type};
  ConnectionPool pool(with);
  ASSERT_TRUE(probes.wait_for(6));
  for (const auto& probe : probes.all()) EXPECT_EQ(probe, "are you there?");
  EXPECT_EQ(pool.stats().closed(), 0U);
  EXPECT_EQ(pool.stats().made, 2U);
}

TEST_F(Pool, ReplacesWhatDoesNotAnswerItsProbeInTime) {
  auto with = options(1, 1);
  with.probe = {.interval = 20ms, .timeout = 60ms, .biz_type = probe_type};
  ConnectionPool pool(with);
  answers_probes = false;
  ASSERT_TRUE(wait_until([&] { return pool.stats().closed_probe == 2; }));
  answers_probes = true;
  const auto made = pool.stats().made;
  ASSERT_TRUE(probes.wait_for(probes.size() + 3));
  EXPECT_LE(pool.stats().made, made + 1);
  EXPECT_GE(pool.stats().replaced, 2U);
}

TEST_F(Pool, LetsTheUserJudgeTheAnswerToAProbe) {
  auto with = options(1, 1);
  std::atomic<int> verdict = 0;  // good, bad, an exception
  with.probe = {.interval = 10ms, .payload = "p", .biz_type = probe_type, .accept = [&verdict](const Reply& reply) {
                  EXPECT_EQ(reply.text(), "p");
                  if (verdict == 2) throw std::runtime_error("no");
                  return verdict == 0;
                }};
  ConnectionPool pool(with);
  ASSERT_TRUE(probes.wait_for(3));
  EXPECT_EQ(pool.stats().closed_probe, 0U);
  verdict = 1;
  ASSERT_TRUE(wait_until([&] { return pool.stats().closed_probe >= 2; }));
  EXPECT_EQ(pool.stats().handler_failures, 0U);
  verdict = 2;
  ASSERT_TRUE(wait_until([&] { return pool.stats().handler_failures >= 1; }));
}

TEST_F(Pool, DoesNotProbeUnlessAskedTo) {
  auto with = options(1, 1);
  with.probe.biz_type = probe_type;
  ConnectionPool pool(with);
  EXPECT_TRUE(wait_until([&] { return pool.stats().idle == 1; }));
  EXPECT_FALSE(probes.wait_for(1, 100ms));
}

// --- connecting

/// When the pool's count of failures was seen to reach 1, 2, ...
std::vector<Clock::time_point> failures(const ConnectionPool& pool, std::size_t count) {
  std::vector<Clock::time_point> seen;
  while (seen.size() < count) {
    if (!wait_until([&] { return pool.stats().failed > seen.size(); })) {
      ADD_FAILURE() << "only " << seen.size() << " attempts";
      seen.resize(count);
      return seen;
    }
    seen.push_back(Clock::now());
  }
  return seen;
}

TEST_F(Pool, WaitsLongerAfterEachFailureToConnect) {
  auto with = options(1, 4);
  with.url = dead_url();
  with.backoff = {.initial = 40ms, .factor = 3, .max = 10s};
  ConnectionPool pool(with);
  const auto at = failures(pool, 4);
  EXPECT_GE(at[3] - at[0], 40ms + 120ms + 360ms - 20ms);
  EXPECT_EQ(pool.stats().connecting, 0U);
}

TEST_F(Pool, WaitsNoLongerThanTheMaximum) {
  auto with = options(1, 1);
  with.url = dead_url();
  with.backoff = {.initial = 20ms, .factor = 100, .max = 40ms};
  ConnectionPool pool(with);
  const auto at = failures(pool, 5);
  EXPECT_LT(at[4] - at[0], 10s);
  EXPECT_GE(at[4] - at[0], 20ms + 3 * 40ms - 20ms);
}

TEST_F(Pool, WaitsForAServerThatComesBack) {
  auto with = options(1, 2);
  with.backoff = {.initial = 5ms, .factor = 1, .max = 5ms};
  const auto later = RawListener().endpoint();
  with.url = later.url();
  ConnectionPool pool(with);
  auto first = begin_acquire(pool);
  auto second = ask(pool, "patience");
  ASSERT_TRUE(wait_until([&] { return pool.stats().failed >= 3; }));
  TestServer back;
  back.echo();
  back.transport.listen(later);
  back.transport.start();
  EXPECT_FALSE(in_time(first).code);
  EXPECT_EQ(in_time(second).second.text(), "patience");
}

TEST_F(Pool, DoesNotPesterAServerThatEndsWhatItAccepts) {
  std::atomic<int> came = 0;
  TestServer hostile;
  hostile.transport.on_connect([&](Session&) {
    ++came;
    return Admission::refuse();
  });
  hostile.start();
  auto with = options(1, 1);
  with.url = hostile.url();
  with.backoff = {.initial = 100ms, .factor = 100, .max = 1h};
  ConnectionPool pool(with);
  EXPECT_TRUE(wait_until([&] { return came == 2; }));  // the second after 100 ms, the third after 10 s
  EXPECT_FALSE(wait_until([&] { return came > 2; }, 500ms));
}

TEST_F(Pool, HonoursTheClientsOptions) {
  auto with = options(0, 1);
  with.client.session.max_payload = 10;
  ConnectionPool pool(with);
  Error error;
  (void)pool.request("more than ten bytes", {}, error);
  EXPECT_EQ(error.code, Errc::too_large);
  EXPECT_EQ(pool.request("ten bytes!").text(), "ten bytes!");
}

TEST_F(Pool, GivesUpAnAttemptToConnectInTime) {
  const RawListener full(0);
  auto with = options(20, 20);
  with.url = full.endpoint().url();
  with.client.connect_timeout = 50ms;
  ConnectionPool pool(with);
  EXPECT_TRUE(wait_until([&] { return pool.stats().failed >= 1; }));
}

TEST_F(Pool, HandsOverWhatTheServerSends) {
  auto with = options(1, 1);
  Record<std::string> got;
  with.on_message = [got](Session& session, const Message& message) {
    got.add(std::string(message.text()));
    if (message.is_request()) session.respond(message, "an answer");
  };
  ConnectionPool pool(with);
  Session session = server.session();
  session.send("news");
  EXPECT_EQ(session.request("a question").text(), "an answer");
  EXPECT_EQ(got.at(0), "news");
  EXPECT_EQ(got.at(1), "a question");
}

TEST_F(Pool, RefusesOptionsOutOfTheirRange) {
  const auto text_of = [this](auto change) {
    auto with = options(0, 1);
    change(with);
    std::string text;
    const auto code = thrown([&] { const ConnectionPool pool(with); }, &text);
    EXPECT_TRUE(code == Errc::invalid_option || code == Errc::invalid_address) << code.message();
    return text;
  };
  using Options = ConnectionPoolOptions;
  const std::pair<const char*, std::string> cases[] = {
      {"nonsense", text_of([](Options& o) { o.url = "nonsense"; })},
      {"max_connections", text_of([](Options& o) { o.max_connections = 0; })},
      {"max_connections", text_of([](Options& o) { o.max_connections = 100'001; })},
      {"min_connections", text_of([](Options& o) { o.min_connections = 2; })},
      {"idle_time", text_of([](Options& o) { o.idle_time = -1ms; })},
      {"lifetime", text_of([](Options& o) { o.lifetime = -1ms; })},
      {"probe.interval", text_of([](Options& o) { o.probe.interval = -1ms; })},
      {"probe.timeout", text_of([](Options& o) { o.probe.timeout = 0ms; })},
      {"acquire_timeout", text_of([](Options& o) { o.acquire_timeout = -1ms; })},
      {"backoff.initial", text_of([](Options& o) { o.backoff.initial = 0ms; })},
      {"backoff.factor", text_of([](Options& o) { o.backoff.factor = 0.5; })},
      {"backoff.max", text_of([](Options& o) { o.backoff.max = 1ms; })},
      {"client.connect_timeout", text_of([](Options& o) { o.client.connect_timeout = -1ms; })},
      {"client.executor", text_of([](Options& o) { o.client.executor = asio::system_executor(); })},
      {"max_payload", text_of([](Options& o) { o.client.session.max_payload = 0; })},
      {"server_name", text_of([](Options& o) { o.client.tls.server_name = "a b"; })},
      {"max_header", text_of([](Options& o) { o.client.websocket.max_header = 1; })},
  };
  for (const auto& [name, text] : cases) EXPECT_NE(text.find(name), std::string::npos) << name << ": " << text;
}

// --- threads and executors

TEST_F(Pool, HasOneThreadForAllItsConnections) {
  const auto before = library_threads();
  ConnectionPool pool(options(5, 5));
  ASSERT_TRUE(wait_until([&] { return pool.stats().idle == 5; }));
  EXPECT_EQ(library_threads(), before + 1);
}

TEST_F(Pool, RunsOnTheUsersExecutorAndStartsNoThread) {
  const auto before = threads();
  asio::io_context own(1);
  auto with = options(2, 4);
  with.executor = own.get_executor();
  ConnectionPool pool(with);
  std::string text;
  std::thread::id ran;
  pool.async_request("x", [&](error_code, const Reply& reply) {
    text = reply.text();
    ran = std::this_thread::get_id();
  });
  for (const auto until = Clock::now() + patience; text.empty() && Clock::now() < until;) own.run_for(1ms);
  EXPECT_EQ(text, "x");
  EXPECT_EQ(ran, std::this_thread::get_id());
  EXPECT_EQ(threads(), before);
}

TEST_F(Pool, EndsWhatWaitsWhenTheUsersContextGoesFirst) {
  std::optional<ConnectionPool> pool;
  PooledConnection held;
  std::thread blocked;
  {
    asio::io_context own(1);
    auto work = asio::make_work_guard(own);
    std::thread runs([&] { own.run(); });
    auto with = options(0, 1);
    with.executor = own.get_executor();
    pool.emplace(with);
    held = pool->acquire();
    blocked = std::thread([&] {
      Error error;
      EXPECT_FALSE(pool->acquire(error));
      EXPECT_EQ(error.code, Errc::closed);
    });
    EXPECT_TRUE(wait_until([&] { return pool->stats().waiting == 1; }));
    own.stop();
    runs.join();
  }
  blocked.join();
  EXPECT_FALSE(held->is_connected());
  Error error;
  EXPECT_FALSE(pool->acquire(error));
  EXPECT_EQ(error.code, Errc::closed);
  held = {};
}

// --- resizing, by way of the control loop

TEST_F(Pool, GrowsAndShrinksByWayOfItsControlLoopAndSaysSo) {
  ConnectionPool pool(options(0, 2));
  auto news = pool.subscribe();
  pool.resize(3, 4);
  auto event = news.next_for(patience);
  ASSERT_TRUE(event);
  EXPECT_EQ(event->kind, EventKind::pool_grown);
  EXPECT_EQ(event->subject, server.url());
  EXPECT_TRUE(wait_until([&] { return pool.stats().idle == 3; }));
  EXPECT_EQ(pool.stats().min_connections, 3U);
  EXPECT_EQ(pool.stats().max_connections, 4U);
  pool.resize(0, 1);
  EXPECT_TRUE(wait_until([&] { return pool.stats().closed_shrunk == 2; }));
  EXPECT_EQ(pool.stats().idle, 1U);
  int grown = 0, shrunk = 0;
  while (grown + shrunk < 6) {  // three made; the limits, and two closed
    event = news.next_for(patience);
    ASSERT_TRUE(event);
    if (event->kind == EventKind::pool_grown) ++grown;
    if (event->kind == EventKind::pool_shrunk) {
      ++shrunk;
      EXPECT_FALSE(event->error.text.empty());
    }
  }
  EXPECT_EQ(grown, 3);
  EXPECT_EQ(shrunk, 3);
}

TEST_F(Pool, ShrinksWhileAllIsInUse) {
  ConnectionPool pool(options(0, 4));
  std::vector<PooledConnection> all;
  for (int i = 0; i < 4; ++i) all.push_back(pool.acquire());
  pool.resize(0, 1);
  EXPECT_TRUE(wait_until([&] { return pool.stats().max_connections == 1; }));
  auto waiting = begin_acquire(pool);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(all.back()->request("still mine").text(), "still mine");
    all.pop_back();
    EXPECT_TRUE(wait_until([&] { return pool.stats().closed_shrunk == static_cast<std::uint64_t>(i) + 1; }));
    EXPECT_EQ(waiting.wait_for(0ms), std::future_status::timeout);
  }
  all.clear();
  EXPECT_FALSE(in_time(waiting).code);
  EXPECT_EQ(pool.stats().made, 4U);
}

TEST_F(Pool, ClosesWhatIsGivenBackAboveTheMaximumThoughNobodyWaits) {
  ConnectionPool pool(options(0, 2));
  auto first = pool.acquire();
  auto second = pool.acquire();
  pool.resize(0, 1);
  EXPECT_TRUE(wait_until([&] { return pool.stats().max_connections == 1; }));
  first = {};
  EXPECT_TRUE(wait_until([&] { return pool.stats().closed_shrunk == 1; }));
  second = {};
  EXPECT_EQ(pool.stats().idle, 1U);
}

TEST_F(Pool, GrowsForThoseWhoWait) {
  ConnectionPool pool(options(0, 1));
  auto held = pool.acquire();
  auto waiting = begin_acquire(pool);
  EXPECT_TRUE(wait_until([&] { return pool.stats().waiting == 1; }));
  pool.resize(0, 2);
  EXPECT_FALSE(in_time(waiting).code);
}

TEST_F(Pool, RefusesLimitsThatMakeNoSense) {
  ConnectionPool pool(options(0, 2));
  EXPECT_EQ(thrown([&] { pool.resize(3, 2); }), Errc::invalid_option);
  EXPECT_EQ(thrown([&] { pool.resize(0, 0); }), Errc::invalid_option);
  EXPECT_EQ(pool.stats().max_connections, 2U);
  pool.close();
  EXPECT_EQ(thrown([&] { pool.resize(0, 3); }), Errc::closed);
}

TEST_F(Pool, SharesAControlLoopThatItIsGiven) {
  asio::thread_pool threads(1);
  const auto loop =
      std::make_shared<detail::ControlLoop>(threads.get_executor(), detail::ControlLoop::Runs::on_own_thread);
  loop->start();
  auto news = loop->subscribe();
  {
    auto with = options(0, 1);
    with.control = Control(loop);
    ConnectionPool pool(with);
    const auto before = loop->stats().commands;
    pool.resize(1, 1);
    EXPECT_TRUE(wait_until([&] { return pool.stats().idle == 1; }));
    EXPECT_GT(loop->stats().commands, before);
    const auto event = news.next_for(patience);
    ASSERT_TRUE(event);
    EXPECT_EQ(event->kind, EventKind::pool_grown);
  }
  EXPECT_TRUE(loop->send({detail::ControlCommand::ResizePool{[] {}}}));  // it is not the pool's to end
  loop->shut_down({});
  loop->join();
  auto with = options(0, 1);
  with.control = Control(loop);
  ConnectionPool pool(with);
  EXPECT_EQ(thrown([&] { pool.resize(1, 1); }), Errc::closed);
  EXPECT_EQ(pool.request("works without").text(), "works without");
  threads.join();
}

// --- the end

TEST_F(Pool, CloseEndsWhoWaitsAndLetsThoseInUseFinish) {
  ConnectionPool pool(options(0, 2));
  auto first = pool.acquire();
  auto second = pool.acquire();
  auto news = pool.subscribe();
  std::vector<Acquiring> waiting;
  for (int i = 0; i < 10; ++i) waiting.push_back(begin_acquire(pool));
  auto asked = ask(pool, "x");
  pool.close();
  for (auto& one : waiting) EXPECT_EQ(in_time(one).code, Errc::closed);
  EXPECT_EQ(in_time(asked).first, Errc::closed);
  EXPECT_EQ(first->request("still mine").text(), "still mine");
  first = {};
  second = {};
  EXPECT_TRUE(wait_until([&] { return pool.stats().closed_at_end == 2; }));
  ASSERT_TRUE(server.ends.wait_for(2));
  while (news.next_for(patience)) {
  }
  EXPECT_EQ(news.try_next().kind(), NextResult<Event>::Kind::closed);
  EXPECT_EQ(in_time(begin_acquire(pool)).code, Errc::closed);
  EXPECT_EQ(in_time(ask(pool, "x")).first, Errc::closed);
  EXPECT_FALSE(pool.try_acquire());
  Error error;
  EXPECT_FALSE(pool.acquire(error));
  EXPECT_EQ(error.code, Errc::closed);
  expect_account(pool.stats());
  EXPECT_EQ(pool.stats().refused, 14U);
}

TEST_F(Pool, DestroyedWithWaitersEndsThem) {
  for (int round = 0; round < 20; ++round) {
    std::vector<Acquiring> waiting;
    Answer asked;
    {
      ConnectionPool pool(options(0, 1));
      auto held = pool.acquire();
      for (int i = 0; i < 10; ++i) waiting.push_back(begin_acquire(pool));
      asked = ask(pool, "x");
      if (round % 2 == 0) held = {};
    }
    for (auto& one : waiting) {
      const auto result = in_time(one);
      EXPECT_TRUE(!result.code || result.code == Errc::closed) << result.code.message();
    }
    const auto code = in_time(asked).first;
    EXPECT_TRUE(!code || code == Errc::closed || code == Errc::connection_lost) << code.message();
  }
}

TEST_F(Pool, DestroyedWithConnectionsOutEndsThemAndWhatTheyWaitFor) {
  const auto before = library_threads();
  PooledConnection held;
  Answer asked, by_pool;
  {
    ConnectionPool pool(options(0, 2));
    held = pool.acquire();
    asked = ask(*held, "silence", {.timeout = 0ms});
    by_pool = ask(pool, "silence", {.timeout = 0ms});
    EXPECT_TRUE(wait_until([&] { return pool.stats().in_use == 2; }));
  }
  EXPECT_EQ(in_time(asked).first, Errc::connection_lost);
  EXPECT_EQ(in_time(by_pool).first, Errc::connection_lost);
  EXPECT_FALSE(held->is_connected());
  EXPECT_EQ(held->send("x"), SendResult::closed);
  Error error;
  (void)held->request("x", {}, error);
  EXPECT_EQ(error.code, Errc::closed);
  held = {};
  EXPECT_TRUE(wait_until([&] { return library_threads() == before; }));
}

TEST_F(Pool, DestructorWaitsForItsThreadIfNobodyHasAConnection) {
  const auto before = library_threads();
  for (int i = 0; i < 20; ++i) {
    Answer asked;
    {
      ConnectionPool pool(options(2, 4));
      asked = ask(pool, i % 2 == 0 ? "silence" : "x", {.timeout = 0ms});
      EXPECT_TRUE(i % 3 != 0 || wait_until([&] { return pool.stats().made != 0; }));
    }
    EXPECT_EQ(asked.wait_for(0ms), std::future_status::ready);
    EXPECT_EQ(library_threads(), before);
  }
}

TEST_F(Pool, DestructorWaitsForItsThreadAtEveryMomentOfARequest) {
  const auto before = library_threads();
  constexpr auto longest = 400us;  // an answer has come by then, mostly
  for (auto moment = 0us; moment < longest; moment += 2us) {
    std::array<Answer, 3> asked;
    {
      ConnectionPool pool(options(0, 1));
      for (auto& one : asked) one = ask(pool, "x", {.timeout = 0ms});
      for (const auto until = Clock::now() + moment; Clock::now() < until;) {
      }
    }
    for (const auto& one : asked) EXPECT_EQ(one.wait_for(0ms), std::future_status::ready) << moment.count();
    EXPECT_EQ(library_threads(), before) << moment.count();
  }
}

TEST_F(Pool, DestroyedByItsOwnHandlers) {
  const auto before = library_threads();
  for (int round = 0; round < 30; ++round) {
    const auto pool = std::make_shared<std::optional<ConnectionPool>>();
    auto with = options(1, 2);
    Gate done;
    const auto end = [pool, done] {
      pool->reset();
      done.open();
    };
    with.on_message = [end](Session&, const Message&) { end(); };
    pool->emplace(with);
    PooledConnection held;
    switch (round % 3) {
      case 0: (*pool)->async_acquire([end](error_code, const PooledConnection&) { end(); }); break;
      case 1: (*pool)->async_request("x", [end](error_code, const Reply&) { end(); }); break;
      case 2:
        held = (*pool)->acquire();
        EXPECT_EQ(held->send("say something"), SendResult::queued);
        break;
    }
    ASSERT_TRUE(done.wait());
    EXPECT_TRUE(wait_until([&] { return !held || !held->is_connected(); }));
  }
  EXPECT_TRUE(wait_until([&] { return library_threads() == before; }));
  EXPECT_TRUE(wait_until([&] { return server.transport.session_count() == 0; }));
}

TEST_F(Pool, DestroyedWhileConnecting) {
  const RawListener full(0);
  for (int round = 0; round < 10; ++round) {
    Acquiring waiting;
    {
      auto with = options(10, 10);
      with.url = round % 2 == 0 ? full.endpoint().url() : server.url();
      ConnectionPool pool(with);
      std::vector<Acquiring> more;
      for (int i = 0; i < 15; ++i) more.push_back(begin_acquire(pool));
      waiting = begin_acquire(pool);
    }
    const auto code = in_time(waiting).code;
    EXPECT_TRUE(!code || code == Errc::closed) << code.message();
  }
  EXPECT_TRUE(wait_until([&] { return server.transport.session_count() == 0; }));
}

TEST_F(Pool, LeavesNoDescriptorBehind) {
  {
    // The server's shards take one each with their first session.
    const ConnectionPool warm(options(16, 16));
    ASSERT_TRUE(wait_until([&] { return warm.stats().idle == 16; }));
  }
  ASSERT_TRUE(wait_until([&] { return server.transport.session_count() == 0; }));
  const auto before = descriptors();
  for (int i = 0; i < 5; ++i) {
    ConnectionPool pool(options(2, 4));
    EXPECT_EQ(pool.request("x").text(), "x");
  }
  EXPECT_TRUE(wait_until([&] { return descriptors() == before; })) << descriptors() << " instead of " << before;
}

// --- many threads

TEST_F(Pool, StandsManyThreadsThatDoEverythingAtOnce) {
  auto with = options(1, 4);
  with.idle_time = 5ms;
  with.lifetime = 50ms;
  with.probe = {.interval = 3ms, .biz_type = probe_type};
  with.backoff = {.initial = 1ms, .factor = 1, .max = 1ms};
  std::optional<ConnectionPool> pool(with);
  std::atomic<std::uint64_t> asked = 0, answered = 0, async_begun = 0, async_ended = 0;
  std::atomic<bool> stop = false;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      while (!stop) {
        Error error;
        switch (random() % 6) {
          case 0:
            if (auto connection = pool->acquire(error); connection && random() % 8 == 0) connection.discard();
            break;
          case 1:
            if (auto connection = pool->try_acquire()) (void)connection->request("x", {}, error);
            break;
          case 2:
            ++asked;
            if (pool->request("x", {}, error).text() == "x") ++answered;
            EXPECT_TRUE(!error || error.code == Errc::connection_lost) << error.code.message();
            break;
          case 3:
            ++async_begun;
            pool->async_acquire([&](error_code, const PooledConnection&) { ++async_ended; });
            break;
          case 4:
            ++async_begun;
            pool->async_request("x", [&](error_code, const Reply&) { ++async_ended; });
            break;
          case 5:
            if (random() % 10 == 0) pool->resize(random() % 3, 3 + random() % 3);
            if (random() % 50 == 0) end_sessions();
            break;
        }
      }
    });
  }
  std::this_thread::sleep_for(1500ms);
  stop = true;
  for (auto& thread : threads) thread.join();
  EXPECT_TRUE(wait_until([&] { return async_begun == async_ended; })) << async_begun << " " << async_ended;
  EXPECT_GT(answered.load(), 0U);
  EXPECT_TRUE(wait_until([&] {
    const auto stats = pool->stats();
    return stats.in_use + stats.waiting + stats.connecting == 0 &&
           stats.made == stats.idle + stats.probing + stats.closed();
  }));
  const auto stats = pool->stats();
  EXPECT_EQ(stats.timed_out, 0U);
  EXPECT_EQ(stats.refused, 0U);
  pool.reset();
  EXPECT_TRUE(wait_until([&] { return server.transport.session_count() == 0; }));
}

// --- a process that is killed

#ifdef MSGTRANS_TOOL
TEST(PoolAndProcess, LosesOnlyWhatIsInFlightWhenTheServerIsKilledUnderLoad) {
  constexpr std::size_t most = 4;
  constexpr int kills = 3;
  ServerProcess process(MSGTRANS_TOOL);
  ConnectionPool pool({.url = process.url(),
                       .min_connections = 1,
                       .max_connections = most,
                       .acquire_timeout = patience,
                       .backoff = {.initial = 5ms, .factor = 1.5, .max = 50ms}});
  std::atomic<std::uint64_t> answered = 0, lost = 0, wrong = 0;
  std::atomic<bool> stop = false;
  std::vector<std::thread> users;
  for (int t = 0; t < 6; ++t) {
    users.emplace_back([&] {
      while (!stop) {
        Error error;
        const auto reply = pool.request("payload", {}, error);
        if (!error && reply.text() == "payload") {
          ++answered;
        } else if (error.code == Errc::connection_lost) {
          ++lost;
        } else {
          ++wrong;
          ADD_FAILURE() << error.code.message();
        }
      }
    });
  }
  for (int i = 0; i < kills; ++i) {
    const auto before = answered.load();
    EXPECT_TRUE(wait_until([&] { return answered > before + 200; }));
    process.kill();
    const auto failed = pool.stats().failed;
    EXPECT_TRUE(wait_until([&] { return pool.stats().failed > failed; }));
    process.start();
  }
  const auto before = answered.load();
  EXPECT_TRUE(wait_until([&] { return answered > before + 200; }));
  stop = true;
  for (auto& user : users) user.join();
  EXPECT_EQ(wrong, 0U);
  // On each connection one request at most was in flight. (A process that dies may still have accepted some.)
  EXPECT_LE(lost, pool.stats().closed_broken);
  EXPECT_LE(lost, 2 * most * kills);
  EXPECT_GE(lost, 1U);
  EXPECT_GE(pool.stats().replaced, 1U);
}
#endif

}  // namespace
}  // namespace msgtrans::test
