// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"
#include "support/process.hpp"

#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_allocator.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/deferred.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <thread>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using asio::use_awaitable;

/// A server that echoes, leaves "silence" unanswered, and a client of it.
class Async : public ::testing::Test {
 protected:
  void SetUp() override {
    server.transport.on_message([](Session& session, const Message& message) {
      if (message.text() == "silence") return;
      if (message.is_request()) session.respond(message, message.payload());
    });
    server.start();
    client.connect(server.url());
  }

  /// Runs a coroutine to its end on a thread that has nothing to do with the library.
  template <class T>
  T run(asio::awaitable<T> body) {
    asio::io_context context(1);
    auto result = asio::co_spawn(context, std::move(body), asio::use_future);
    context.run_for(patience);
    return in_time(result);
  }

  TestServer server{{.session = {.max_payload = 1000 * 1000}}};
  ClientTransport client;
};

// --- completion tokens

TEST_F(Async, CompletesACallback) {
  Record<std::string> got;
  client.async_request("call me", [got](error_code code, const Reply& reply) mutable {
    got.add(code ? code.message() : std::string(reply.text()));
  });
  EXPECT_EQ(got.at(0), "call me");
}

TEST_F(Async, CompletesAFutureWithTheAnswerOrAnException) {
  auto answer = client.async_request("future", asio::use_future);
  EXPECT_EQ(in_time(answer).text(), "future");
  auto sent = client.async_send("x", {}, asio::use_future);
  ASSERT_EQ(sent.wait_for(patience), std::future_status::ready);
  EXPECT_NO_THROW(sent.get());
  auto late = client.async_request("silence", {.timeout = 20ms}, asio::use_future);
  ASSERT_EQ(late.wait_for(patience), std::future_status::ready);
  try {
    (void)late.get();
    FAIL() << "no exception";
  } catch (const boost::system::system_error& error) {
    EXPECT_EQ(error.code(), Errc::request_timeout);
  }
}

TEST_F(Async, CompletesACoroutineOnItsOwnThread) {
  const auto text = run([](ClientTransport& to) -> asio::awaitable<std::string> {
    const auto here = std::this_thread::get_id();
    std::string all;
    for (int i = 0; i < 100; ++i) {
      const Reply reply = co_await to.async_request(std::to_string(i), use_awaitable);
      EXPECT_EQ(std::this_thread::get_id(), here);
      EXPECT_EQ(reply.text(), std::to_string(i));
      all += reply.text();
    }
    co_await to.async_send("one-way", {}, use_awaitable);
    co_return all;
  }(client));
  EXPECT_EQ(text.size(), 190U);
}

TEST_F(Async, ThrowsIntoACoroutineOrReturnsATuple) {
  run([](ClientTransport& to) -> asio::awaitable<int> {
    bool thrown = false;
    try {
      (void)co_await to.async_request("silence", {.timeout = 20ms}, use_awaitable);
    } catch (const boost::system::system_error& error) {
      thrown = error.code() == Errc::request_timeout;
    }
    EXPECT_TRUE(thrown);
    const auto [code, reply] = co_await to.async_request("silence", {.timeout = 20ms}, asio::as_tuple(use_awaitable));
    EXPECT_EQ(code, Errc::request_timeout);
    EXPECT_TRUE(reply.payload().empty());
    const auto [sent] = co_await to.async_send("x", {}, asio::as_tuple(use_awaitable));
    EXPECT_FALSE(sent);
    co_return 0;
  }(client));
}

TEST_F(Async, KeepsTheBytesOfADeferredOperationThatStartsLater) {
  auto operation = [this] {
    const std::string gone = pattern(5000);
    return client.async_request(gone, asio::deferred);
  }();
  Record<std::string> got;
  std::move(operation)([got](error_code, const Reply& reply) mutable { got.add(std::string(reply.text())); });
  EXPECT_TRUE(got.at(0) == pattern(5000));
}

TEST_F(Async, ConnectsByEveryToken) {
  ClientTransport by_future, by_coroutine;
  auto connected = by_future.async_connect(server.url(), asio::use_future);
  ASSERT_EQ(connected.wait_for(patience), std::future_status::ready);
  EXPECT_NO_THROW(connected.get());
  EXPECT_TRUE(by_future.is_connected());
  run([](ClientTransport& one, std::string url) -> asio::awaitable<int> {
    co_await one.async_connect(url, use_awaitable);
    EXPECT_EQ((co_await one.async_request("connected", use_awaitable)).text(), "connected");
    const auto [again] = co_await one.async_connect(url, asio::as_tuple(use_awaitable));
    EXPECT_EQ(again, Errc::wrong_state);
    co_return 0;
  }(by_coroutine, server.url()));
}

TEST_F(Async, TakesAHandlerThatCanOnlyBeMoved) {
  std::promise<std::string> done;
  auto text = done.get_future();
  client.async_request("moved", [promise = std::move(done)](error_code, const Reply& reply) mutable {
    promise.set_value(std::string(reply.text()));
  });
  EXPECT_EQ(in_time(text), "moved");
}

TEST_F(Async, AsksByWayOfTheServerToo) {
  ASSERT_TRUE(server.came.wait_for(1));  // the shards accept on their own, in any order
  ClientTransport answers;
  answers.on_message([](Session& session, const Message& message) { session.respond(message, "from the client"); });
  answers.connect(server.url());
  ASSERT_TRUE(server.came.wait_for(2));
  const SessionId id = server.came.at(1);
  run([](ServerTransport& transport, SessionId to) -> asio::awaitable<int> {
    const Reply reply = co_await transport.async_request(to, "?", {}, use_awaitable);
    EXPECT_EQ(reply.text(), "from the client");
    co_await transport.async_send(to, "one-way", {}, use_awaitable);
    co_return 0;
  }(server.transport, id));
}

TEST_F(Async, ServesACoroutineOnTheSessionsExecutor) {
  std::promise<std::string> result;
  auto text = result.get_future();
  Session session = *client.session();
  asio::co_spawn(
      session.get_executor(),
      [&]() -> asio::awaitable<void> {
        std::string all;
        for (int i = 0; i < 10; ++i) all += (co_await session.async_request(std::to_string(i), use_awaitable)).text();
        session.send("x");
        result.set_value(all);
      },
      asio::detached);
  EXPECT_EQ(in_time(text), "0123456789");
}

// --- where and how handlers run

TEST_F(Async, RunsABoundHandlerOnItsExecutor) {
  asio::thread_pool pool(1);
  const auto pool_thread = asio::post(pool, asio::use_future([] { return std::this_thread::get_id(); })).get();
  Record<std::thread::id> ran;
  const auto note = [&] { ran.add(std::this_thread::get_id()); };
  const auto bound = [&](auto handler) { return asio::bind_executor(pool, std::move(handler)); };
  client.async_request("x", bound([&](error_code, const Reply&) { note(); }));
  client.async_request("silence", {.timeout = 10ms}, bound([&](error_code, const Reply&) { note(); }));
  client.async_request(pattern(20'000'000), bound([&](error_code, const Reply&) { note(); }));  // too large
  client.async_send("x", {}, bound([&](error_code) { note(); }));
  client.async_connect(server.url(), bound([&](error_code) { note(); }));  // wrong state
  server.transport.async_send(SessionId(), "x", {}, bound([&](error_code) { note(); }));
  ASSERT_TRUE(ran.wait_for(6));
  for (const auto& thread : ran.all()) EXPECT_EQ(thread, pool_thread);
  pool.join();
}

TEST_F(Async, KeepsTheHandlersContextRunningUntilItCompletes) {
  asio::io_context context(1);
  bool completed = false;
  client.async_request("silence", {.timeout = 100ms},
                       asio::bind_executor(context, [&](error_code, const Reply&) { completed = true; }));
  context.run_for(patience);  // ends earlier when there is no work left
  EXPECT_TRUE(completed);
  EXPECT_TRUE(context.stopped());
}

/// Counts what is allocated through it, and what of that has not been freed.
template <class T>
struct CountingAllocator {
  using value_type = T;
  struct Counts {
    std::atomic<int> allocations = 0;
    std::atomic<int> alive = 0;
  };
  explicit CountingAllocator(Counts& counts) noexcept : counts_(&counts) {}
  template <class U>
  CountingAllocator(const CountingAllocator<U>& other) noexcept : counts_(reinterpret_cast<Counts*>(other.address())) {}
  T* allocate(std::size_t count) {
    ++counts_->allocations;
    ++counts_->alive;
    return std::allocator<T>().allocate(count);
  }
  void deallocate(T* memory, std::size_t count) noexcept {
    --counts_->alive;
    std::allocator<T>().deallocate(memory, count);
  }
  [[nodiscard]] void* address() const noexcept { return counts_; }
  template <class U>
  bool operator==(const CountingAllocator<U>& other) const noexcept {
    return address() == other.address();
  }

 private:
  Counts* counts_;
};

TEST_F(Async, UsesTheHandlersAllocatorAndGivesAllBackBeforeTheUpcall) {
  // One type of counts for all, whatever is allocated.
  CountingAllocator<char>::Counts counts;
  Record<int> alive;
  client.async_request("x", asio::bind_allocator(CountingAllocator<char>(counts),
                                                 [&](error_code, const Reply&) { alive.add(counts.alive); }));
  ASSERT_TRUE(alive.wait_for(1));
  EXPECT_GT(counts.allocations, 0);
  EXPECT_EQ(alive.at(0), 0);
  EXPECT_TRUE(wait_until([&] { return counts.alive == 0; }));
}

TEST_F(Async, NeverCompletesInsideTheInitiatingCall) {
  // On a thread of the test, and on the shard, where a result could be at hand at once.
  std::atomic<int> completed = 0, inside = 0;
  static thread_local bool initiating = false;
  const auto try_all = [&](Session session) {
    const auto note = [&](auto&&...) {
      if (initiating) ++inside;
      ++completed;
    };
    initiating = true;
    session.async_request("x", note);
    session.async_request(pattern(20'000'000), note);
    session.async_request("x", {.timeout = -1ms}, note);
    session.async_send("x", note);
    session.async_send(pattern(20'000'000), note);
    client.async_connect("nonsense", note);
    client.async_connect(server.url(), note);
    server.transport.async_send(SessionId(), "x", {}, note);
    server.transport.async_request(SessionId(), "x", {}, note);
    initiating = false;
  };
  try_all(*client.session());
  EXPECT_TRUE(wait_until([&] { return completed == 9; }));
  asio::post(client.session()->get_executor(), [&] { try_all(*client.session()); });
  EXPECT_TRUE(wait_until([&] { return completed == 18; }));
  Gate done;
  client.async_request("in a completion", [&](error_code, const Reply&) {
    try_all(*client.session());
    done.open();
  });
  ASSERT_TRUE(done.wait());
  EXPECT_TRUE(wait_until([&] { return completed == 27; })) << completed;
  EXPECT_EQ(inside, 0);
}

// --- cancellation

TEST_F(Async, CancelsARequestInFlightAndCountsItsLateAnswer) {
  RawPeer peer(server.endpoint);
  Session session = server.session(peer);
  auto signal = std::make_shared<asio::cancellation_signal>();
  Record<error_code> result;
  session.async_request("?", {.timeout = 0ms},
                        asio::bind_cancellation_slot(
                            signal->slot(), [result](error_code code, const Reply&) mutable { result.add(code); }));
  const auto asked = peer.next();
  EXPECT_EQ(result.size(), 0U);
  asio::post(session.get_executor(), [signal] { signal->emit(asio::cancellation_type::total); });
  EXPECT_EQ(result.at(0), asio::error::operation_aborted);
  peer.send(response(asked.header.message_id, "late"));
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().unmatched_responses == 1; }));
  EXPECT_EQ(result.size(), 1U);
}

TEST_F(Async, IgnoresACancellationAfterTheEnd) {
  auto signal = std::make_shared<asio::cancellation_signal>();
  Record<error_code> result;
  client.async_request("x", asio::bind_cancellation_slot(
                                signal->slot(), [result](error_code code, const Reply&) mutable { result.add(code); }));
  ASSERT_TRUE(result.wait_for(1));
  asio::post(client.session()->get_executor(), [signal] { signal->emit(asio::cancellation_type::all); });
  EXPECT_EQ(client.request("still here").text(), "still here");
  EXPECT_EQ(result.size(), 1U);
}

TEST_F(Async, CancelsAnAttemptToConnectAndTheClientCanConnectAgain) {
  const RawListener full(0);
  // Until the backlog is full, clients do connect.
  for (int i = 0; i < 8; ++i) {
    ClientTransport waiting({.connect_timeout = 0ms});
    auto signal = std::make_shared<asio::cancellation_signal>();
    Record<error_code> result;
    asio::io_context context(1);  // where the handler runs, and so where the signal is emitted
    waiting.async_connect(
        full.endpoint().url(),
        asio::bind_executor(context, asio::bind_cancellation_slot(
                                         signal->slot(), [result](error_code code) mutable { result.add(code); })));
    context.run_for(100ms);
    if (result.size() != 0) {
      // It keeps its place in the backlog though it goes.
      continue;
    }
    signal->emit(asio::cancellation_type::terminal);
    context.restart();
    context.run_for(patience);
    EXPECT_EQ(result.at(0), asio::error::operation_aborted);
    EXPECT_EQ(result.size(), 1U);
    waiting.connect(server.url());
    EXPECT_EQ(waiting.request("again").text(), "again");
    return;
  }
  FAIL() << "the backlog is never full";
}

TEST_F(Async, LosesNothingInARaceWithATimer) {
  using namespace asio::experimental::awaitable_operators;
  const auto outcome = run([](ClientTransport& to) -> asio::awaitable<std::pair<int, int>> {
    int answers = 0, timeouts = 0;
    asio::steady_timer timer(co_await asio::this_coro::executor);
    for (int i = 0; i < 300; ++i) {
      timer.expires_after(std::chrono::microseconds(i % 3 == 0 ? 10 : 100'000'000));
      const bool silent = i % 3 == 0 && i % 2 == 0;
      auto result =
          co_await (to.async_request(silent ? "silence" : "echo", use_awaitable) || timer.async_wait(use_awaitable));
      if (result.index() == 0) {
        EXPECT_EQ(std::get<0>(result).text(), "echo");
        ++answers;
      } else {
        EXPECT_EQ(i % 3, 0);
        ++timeouts;
      }
    }
    co_return std::pair(answers, timeouts);
  }(client));
  EXPECT_EQ(outcome.first + outcome.second, 300);
  EXPECT_GE(outcome.first, 200);
  EXPECT_GE(outcome.second, 50);
  EXPECT_EQ(client.request("still in step").text(), "still in step");
}

// --- blocking calls

TEST(BlockingCalls, AreRefusedWhereHandlersRun) {
  TestServer server;
  Record<error_code> codes;
  const auto blocks = [codes](Session& session) {
    Error error;
    (void)session.request("x", {}, error);
    codes.add(error.code);
  };
  server.transport.on_message([blocks](Session& session, const Message&) mutable { blocks(session); });
  server.start();
  ClientTransport client;
  client.on_disconnect([&, blocks](Session& session, const Error&) mutable { blocks(session); });
  client.connect(server.url());
  Session session = *client.session();
  client.send("in on_message");
  ASSERT_TRUE(codes.wait_for(1));
  client.async_request("in a completion handler", {.timeout = 10ms},
                       [&, blocks](error_code, const Reply&) mutable { blocks(session); });
  ASSERT_TRUE(codes.wait_for(3));  // the request's own on_message too
  asio::post(session.get_executor(), [&, blocks]() mutable { blocks(session); });
  ASSERT_TRUE(codes.wait_for(4));
  asio::post(session.get_executor(), [&, codes]() mutable {
    Error error;
    client.connect(server.url(), error);
    codes.add(error.code);
  });
  ASSERT_TRUE(codes.wait_for(5));
  server.session().close();
  ASSERT_TRUE(codes.wait_for(6));
  for (const auto& code : codes.all()) EXPECT_EQ(code, Errc::blocking_on_shard);
}

TEST(BlockingCalls, AreAnsweredOnOtherThreadsFromManyAtOnce) {
  TestServer server;
  server.echo().start();
  ClientTransport client;
  client.connect(server.url());
  std::vector<std::thread> threads;
  std::atomic<int> right = 0;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 100; ++i) {
        const std::string text = std::to_string(t * 1000 + i);
        if (client.request(text).text() == text) ++right;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(right, 800);
}

// --- exceptions of completion handlers

TEST(CompletionHandlerThatThrows, DoesNotEndTheProcess) {
  TestServer server;
  server.echo().start();
  Record<End> errors;
  ClientTransport client;
  client.on_error([errors](const ErrorEvent& event) mutable {
    errors.add({event.session, event.error.code, event.error.text});
  });
  client.connect(server.url());
  // At an answer, at a timeout, and at a refusal.
  client.async_send("x", {}, [](error_code) { throw std::runtime_error("sent"); });
  ASSERT_TRUE(errors.wait_for(1));
  client.async_send(pattern(20'000'000), {}, [](error_code) { throw std::runtime_error("too large"); });
  ASSERT_TRUE(errors.wait_for(2));
  client.async_request("x", [](error_code, const Reply&) { throw std::runtime_error("answered"); });
  ASSERT_TRUE(errors.wait_for(3));
  EXPECT_EQ(errors.at(0).text, "sent");
  EXPECT_EQ(errors.at(1).text, "too large");
  EXPECT_EQ(errors.at(2).text, "answered");
  for (const End& error : errors.all()) EXPECT_EQ(error.code, Errc::handler_failed);
}

// --- executors of the user's

TEST(UsersExecutors, ServeAServerOnTwoContextsWithoutAnyThreadOfOurs) {
  asio::io_context one(1), two(1);
  TestServer server({.executors = {one.get_executor(), two.get_executor()}});
  Record<std::thread::id> ran;
  server.transport.on_message([ran](Session& session, const Message& message) mutable {
    ran.add(std::this_thread::get_id());
    session.respond(message, message.payload());
  });
  const auto before = threads();
  server.start();
  EXPECT_EQ(threads(), before);
  auto keep_one = asio::make_work_guard(one);
  auto keep_two = asio::make_work_guard(two);
  std::thread first([&] { one.run(); }), second([&] { two.run(); });
  {
    std::vector<std::unique_ptr<RawPeer>> peers;
    for (int i = 0; i < 40; ++i) {
      peers.push_back(std::make_unique<RawPeer>(server.endpoint));
      peers.back()->send(request(1, "x"));
    }
    for (auto& peer : peers) EXPECT_EQ(peer->next().payload, "x");
  }
  EXPECT_EQ(threads(), before + 2);
  EXPECT_EQ(library_threads(), 0U);
  for (const auto& thread : ran.all()) EXPECT_TRUE(thread == first.get_id() || thread == second.get_id());
  EXPECT_TRUE(server.transport.stop(5s).complete);
  EXPECT_EQ(server.ends.size(), 40U);
  keep_one.reset();
  keep_two.reset();
  first.join();
  second.join();
}

TEST(UsersExecutors, AreSharedByManyClientsAndReturnWhenAllIsDone) {
  TestServer server;
  server.echo().start();
  const auto before = threads();
  int answered = 0;
  asio::io_context context(1);
  {
    std::vector<std::unique_ptr<ClientTransport>> clients;
    for (int i = 0; i < 20; ++i) {
      clients.push_back(std::make_unique<ClientTransport>(ClientOptions{.executor = context.get_executor()}));
      asio::co_spawn(
          context,
          [&server, &answered, &client = *clients.back()]() -> asio::awaitable<void> {
            co_await client.async_connect(server.url(), use_awaitable);
            const Reply reply = co_await client.async_request("x", use_awaitable);
            answered += reply.text() == "x" ? 1 : 0;
            client.close();
          },
          asio::detached);
    }
    const auto began = Clock::now();
    context.run_for(patience);
    EXPECT_LT(Clock::now() - began, patience) << "something is left running";
    EXPECT_EQ(answered, 20);
    EXPECT_EQ(threads(), before);
    EXPECT_TRUE(server.ends.wait_for(20));
  }
  context.restart();
  context.poll();
}

TEST(UsersExecutors, MayBeStrandsOfAPool) {
  asio::thread_pool pool(3);
  std::atomic<int> right = 0;
  {
    TestServer server({.executors = {asio::make_strand(pool), asio::make_strand(pool)}});
    server.echo().start();
    ClientTransport client({.executor = asio::make_strand(pool)});
    client.connect(server.url());  // blocks a thread that is none of theirs
    for (int i = 0; i < 200; ++i) right += client.request(std::to_string(i)).text() == std::to_string(i) ? 1 : 0;
    client.close();
    EXPECT_TRUE(server.transport.stop(5s).complete);
    EXPECT_EQ(server.ends.size(), 1U);
  }
  pool.join();
  EXPECT_EQ(right, 200);
}

TEST(UsersExecutors, RunTheHandlersOfRefusalsTooAndNoThreadIsStarted) {
  TestServer server;
  server.echo().start();
  asio::io_context context(1);
  ClientTransport client({.executor = context.get_executor()});
  const auto before = threads();
  Record<std::thread::id> ran;
  const auto note = [ran](auto&&...) { ran.add(std::this_thread::get_id()); };
  client.async_connect("nonsense", note);
  context.run_for(patience);
  client.async_connect(server.url(), note);
  EXPECT_TRUE(wait_until([&] {
    context.restart();
    context.poll();
    return ran.size() == 2;
  }));
  client.async_connect(server.url(), note);  // connected already
  client.async_send(pattern(20'000'000), {}, note);
  client.async_request(pattern(20'000'000), note);
  client.async_request("x", {.timeout = -1ms}, note);
  EXPECT_TRUE(wait_until([&] {
    context.restart();
    context.poll();
    return ran.size() == 6;
  }));
  for (const auto& thread : ran.all()) EXPECT_EQ(thread, std::this_thread::get_id());
  EXPECT_EQ(threads(), before);
}

TEST(UsersExecutors, RefuseBlockingCallsInEveryHandlerTheyRun) {
  TestServer server;
  server.transport.on_message([](Session&, const Message&) {});
  server.start();
  // What a handler that blocks for ever would need lives as long as it: a failure here is no crash of what follows.
  struct Stage {
    asio::io_context context{1};
    std::optional<ClientTransport> client;
    Record<error_code> codes;
  };
  const auto stage = std::make_shared<Stage>();
  stage->client.emplace(ClientOptions{.executor = stage->context.get_executor()});
  const auto blocks = [raw = stage.get()](auto&&...) {
    Error error;
    (void)raw->client->request("x", {}, error);
    raw->codes.add(error.code);
  };
  stage->client->async_connect(server.url(), blocks);
  std::thread runs([stage] { stage->context.run(); });
  bool completed = stage->codes.wait_for(1);
  if (completed) {
    stage->client->async_request("x", {.timeout = 10ms}, blocks);  // completes by its timeout
    completed = stage->codes.wait_for(2);
  }
  if (!completed) {
    runs.detach();
    FAIL() << "the handler blocks the thread that it waits for";
  }
  for (const auto& code : stage->codes.all()) EXPECT_EQ(code, Errc::blocking_on_shard);
  stage->client.reset();
  runs.join();
}

}  // namespace
}  // namespace msgtrans::test
