// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"
#include "support/process.hpp"

#include <atomic>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/thread_pool.hpp>
#include <csignal>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <set>
#include <thread>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;

/// Far below the drain times that the tests give, so that "did not wait for the drain" and "a slow machine" differ.
constexpr auto soon = 10s;
constexpr auto long_drain = 30s;

/// What an operation ends with; `start` is given its handler.
template <class Start>
error_code code_of(Start start) {
  // No use_future: ThreadSanitizer does not see how libstdc++ counts the references of the exceptions in it.
  const auto promise = std::make_shared<std::promise<error_code>>();
  auto code = promise->get_future();
  start([promise](error_code result, const auto&...) { promise->set_value(result); });
  return in_time(code);
}

std::unique_ptr<ClientTransport> connect(const TestServer& server) {
  auto client = std::make_unique<ClientTransport>();
  client->connect(server.url());
  return client;
}

template <class Call>
auto takes_less_than(std::chrono::milliseconds limit, Call call) {
  const auto began = Clock::now();
  auto result = call();
  EXPECT_LT(Clock::now() - began, limit);
  return result;
}

// --- in any order

TEST(Stop, OfIdleSessionsIsQuickAndClean) {
  TestServer server;
  server.echo().start();
  RawPeer silent(server.endpoint);  // never says a word
  const auto client = connect(server);
  EXPECT_EQ(client->request("x").text(), "x");
  ASSERT_TRUE(server.came.wait_for(2));
  // Each hangs up when it sees the end, as peers do.
  std::thread hangs_up([&silent] {
    EXPECT_TRUE(silent.sees_end());
    silent.close();
  });
  const auto report = takes_less_than(soon, [&] { return server.transport.stop(long_drain); });
  EXPECT_TRUE(report.clean()) << report.sessions_cut;
  EXPECT_TRUE(report.complete);
  hangs_up.join();
  ASSERT_EQ(server.ends.size(), 2U);
  for (const End& end : server.ends.all()) EXPECT_EQ(end.code, Errc::stopping) << end.code.message();
  EXPECT_EQ(server.transport.session_count(), 0U);
}

TEST(Stop, AfterAReadThatFilledTheBufferIsQuick) {
  TestServer server;
  server.transport.on_message([](Session&, const Message&) {});
  server.start();
  RawPeer peer(server.endpoint);
  // Packets that together are a multiple of every read size the library might use.
  const Bytes one = one_way(1, pattern(4096 - wire::header_size));
  Bytes all;
  for (int i = 0; i < 512; ++i) all.insert(all.end(), one.begin(), one.end());
  peer.send(all);
  ASSERT_TRUE(wait_until([&] { return server.transport.stats().packets_in == 512; }));
  std::thread hangs_up([&peer] {
    EXPECT_TRUE(peer.sees_end());
    peer.close();
  });
  EXPECT_TRUE(takes_less_than(soon, [&] { return server.transport.stop(long_drain); }).clean());
  hangs_up.join();
}

TEST(Stop, TwiceGivesTheSameReport) {
  TestServer server;
  server.start();
  const RawPeer peer(server.endpoint);
  Session session = server.session();
  auto answer = ask(session, "?", {.timeout = 0ms});
  const auto first = server.transport.stop(0ms);
  const auto second = server.transport.stop(long_drain);
  EXPECT_EQ(first.requests_cut, 1U);
  EXPECT_EQ(second.requests_cut, 1U);
  EXPECT_EQ(second.sessions_cut, first.sessions_cut);
  EXPECT_TRUE(second.complete);
  EXPECT_EQ(in_time(answer).first, Errc::connection_lost);
}

TEST(Stop, FromSeveralThreadsAtOnceReturnsInEach) {
  for (int round = 0; round < 20; ++round) {
    TestServer server;
    server.echo().start();
    const auto client = connect(server);
    EXPECT_EQ(client->request("x").text(), "x");
    std::vector<std::thread> threads;
    std::atomic<int> complete = 0;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] { complete += server.transport.stop(long_drain).complete ? 1 : 0; });
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(complete, 4);
    EXPECT_EQ(server.ends.size(), 1U);
  }
}

TEST(Stop, FromAHandlerBeginsAndReturnsAtOnce) {
  auto server = std::make_unique<TestServer>();
  Record<bool> complete;
  server->transport.on_message(
      [&transport = server->transport, complete](Session& session, const Message& message) mutable {
        session.respond(message, "stopping");
        complete.add(transport.stop(long_drain).complete);
      });
  server->start();
  const auto client = connect(*server);
  EXPECT_EQ(client->request("stop").text(), "stopping");
  EXPECT_FALSE(complete.at(0));
  EXPECT_TRUE(takes_less_than(soon, [&] { return server->transport.stop(0ms).complete; }));
  EXPECT_EQ(server->ends.size(), 1U);
  server.reset();
}

TEST(Stop, FromAHandlerFollowedByTheDestructorLeavesNothing) {
  for (int round = 0; round < 10; ++round) {
    Record<End> ends;
    {
      TestServer server;
      ends = server.ends;
      Gate stopped;
      server.transport.on_message([&transport = server.transport, stopped](Session&, const Message&) mutable {
        transport.stop(long_drain);
        stopped.open();
      });
      server.start();
      const auto client = connect(server);
      client->send("stop");
      ASSERT_TRUE(stopped.wait());
    }
    EXPECT_EQ(ends.size(), 1U);
    EXPECT_EQ(library_threads(), 0U);
  }
}

TEST(Stop, BeforeTheStartClosesTheListenersAndIsFinal) {
  TestServer server;
  server.endpoint = server.transport.listen(any_endpoint(), any_listener());
  EXPECT_TRUE(server.transport.stop(long_drain).clean());
  EXPECT_EQ(thrown([&] { server.transport.start(); }), Errc::wrong_state);
  EXPECT_EQ(thrown([&] { server.transport.listen(any_endpoint(), any_listener()); }), Errc::wrong_state);
  EXPECT_THROW(RawPeer{server.endpoint}, std::runtime_error);
  EXPECT_TRUE(server.transport.run().clean());  // returns at once
}

TEST(Stop, MakesALaterStartAnError) {
  TestServer server;
  server.start();
  server.transport.stop(0ms);
  EXPECT_EQ(thrown([&] { server.transport.start(); }), Errc::wrong_state);
}

TEST(Destroying, WithoutStartOrListenWorks) {
  {
    const TestServer nothing;
    TestServer bound;
    bound.transport.listen(any_endpoint(), any_listener());
    const ClientTransport client;
  }
  EXPECT_EQ(library_threads(), 0U);
}

TEST(Destroying, FromAHandlerReturnsAtOnceAndNoHandlerIsCalledAgain) {
  for (int round = 0; round < 10; ++round) {
    Record<End> ends;
    Record<int> messages;
    auto* server = new TestServer({.shards = 1, .drain = long_drain});
    ends = server->ends;
    Gate destroyed;
    std::atomic<TestServer*> doomed = server;
    server->transport.on_message([messages, destroyed, &doomed](Session&, const Message&) mutable {
      // The closure dies with the server: what is needed afterwards lives on the stack.
      auto gate = destroyed;
      messages.add(1);
      delete doomed.exchange(nullptr);
      gate.open();
    });
    server->start();
    RawPeer peer(server->endpoint);
    Bytes three;
    for (std::uint32_t id = 1; id <= 3; ++id) {
      const Bytes bytes = one_way(id, "x");
      three.insert(three.end(), bytes.begin(), bytes.end());
    }
    peer.send(three);
    ASSERT_TRUE(destroyed.wait());
    EXPECT_TRUE(peer.sees_end());
    peer.close();
    EXPECT_TRUE(wait_until([] { return library_threads() == 0; }));
    EXPECT_EQ(messages.size(), 1U);
    EXPECT_EQ(ends.size(), 0U);
  }
}

TEST(Destroying, AClientFromItsHandlersWorks) {
  TestServer server;
  server.echo().start();
  for (int round = 0; round < 20; ++round) {
    Gate destroyed;
    auto* client = new ClientTransport;
    std::atomic<ClientTransport*> doomed = client;
    client->on_message([&doomed, destroyed](Session&, const Message&) mutable {
      auto gate = destroyed;
      delete doomed.exchange(nullptr);
      gate.open();
    });
    client->connect(server.url());
    client->send("x");
    ASSERT_TRUE(destroyed.wait());
  }
  EXPECT_TRUE(server.ends.wait_for(20));
  server.transport.stop(1s);
  EXPECT_TRUE(wait_until([] { return library_threads() == 0; }));
}

TEST(Destroying, AClientFailsWhatIsPendingAndUnderWay) {
  TestServer server;
  server.transport.on_message([](Session&, const Message&) {});
  server.start();
  auto client = connect(server);
  auto answer = ask(*client, "never answered", {.timeout = 0ms});
  client.reset();
  EXPECT_EQ(in_time(answer).first, Errc::connection_lost);

  const RawListener full(0);
  std::vector<std::unique_ptr<ClientTransport>> clients;
  Record<error_code> results;
  for (int i = 0; i < 6; ++i) {
    clients.push_back(std::make_unique<ClientTransport>(ClientOptions{.connect_timeout = 0ms}));
    clients.back()->async_connect(full.endpoint().url(), [results](error_code code) mutable { results.add(code); });
  }
  clients.clear();
  EXPECT_TRUE(results.wait_for(6));
}

TEST(Destroying, WhileAnotherThreadSendsThroughHandlesIsSafe) {
  Record<std::shared_ptr<Session>> handle;
  std::atomic<bool> done = false;
  std::atomic<int> pending = 0;
  std::thread sender;
  {
    TestServer server;
    server.echo().start();
    const auto client = connect(server);
    handle.add(std::make_shared<Session>(server.session()));
    sender = std::thread([&] {
      const auto session = handle.at(0);
      while (!done) {
        (void)session->send("x");
        (void)session->stats();
        if (pending > 1000) continue;  // operations that wait have no bound of their own
        ++pending;
        session->async_request("x", [&](error_code, const Reply&) { --pending; });
      }
    });
    ASSERT_TRUE(wait_until([&] { return server.transport.stats().packets_out > 100; }));
    server.transport.stop(0ms);
  }
  done = true;
  sender.join();
  EXPECT_TRUE(wait_until([&] { return pending == 0; }));
  EXPECT_EQ(handle.at(0)->send("x"), SendResult::closed);
  EXPECT_EQ(in_time(ask(*handle.at(0), "x")).first, Errc::closed);
  handle.at(0)->close();
}

// --- the drain

TEST(Drain, LetsAnAnswerThatTakesItsTimeArrive) {
  TestServer server;
  std::thread later;
  Gate asked;
  server.transport.on_message([&](Session&, const Message& message) {
    later = std::thread([owned = message.retain()]() mutable {
      std::this_thread::sleep_for(200ms);  // the answer takes its time
      EXPECT_EQ(owned.respond("worth waiting for"), SendResult::queued);
    });
    asked.open();
  });
  server.start();
  const auto client = connect(server);
  auto answer = ask(*client, "?");
  ASSERT_TRUE(asked.wait());
  const auto report = takes_less_than(soon, [&] { return server.transport.stop(long_drain); });
  EXPECT_TRUE(report.clean());
  EXPECT_EQ(in_time(answer).second.text(), "worth waiting for");
  later.join();
}

TEST(Drain, LetsAnAnswerToThisEndArrive) {
  TestServer server;
  server.start();
  RawPeer peer(server.endpoint);
  Session session = server.session();
  auto answer = ask(session, "?");
  const auto asked = peer.receive();
  auto report = std::async(std::launch::async, [&] { return server.transport.stop(long_drain); });
  ASSERT_TRUE(wait_until([&] {  // stopping has begun once nobody can connect any more
    try {
      RawPeer probe(server.endpoint);
      return probe.readable(10ms);
    } catch (const std::runtime_error&) {
      return true;
    }
  }));
  peer.send(response(asked->header.message_id, "in time"));
  EXPECT_EQ(in_time(answer).second.text(), "in time");
  EXPECT_TRUE(peer.sees_end());
  peer.close();
  EXPECT_TRUE(in_time(report).clean());
}

TEST(Drain, WritesAllThatIsQueuedToASlowReader) {
  TestServer server({.session = {.outbound_bytes = 4 * 1024 * 1024}});
  server.start();
  RawPeer peer(server.endpoint, 8 * 1024);
  Session session = server.session();
  const std::size_t taken = fill(session, pattern(10'000));
  auto report = std::async(std::launch::async, [&] { return server.transport.stop(long_drain); });
  EXPECT_EQ(peer.drain(), taken * (10'000 + wire::header_size));
  peer.close();
  EXPECT_TRUE(in_time(report).clean());
}

TEST(Drain, AnswersWhatThePeerHadSentBefore) {
  TestServer server;
  server.echo().start();
  for (int round = 0; round < 20; ++round) {
    TestServer one;
    one.echo().start();
    RawPeer peer(one.endpoint);
    (void)one.session();
    peer.send(request(1, "sent before the stop"));
    auto report = std::async(std::launch::async, [&] { return one.transport.stop(long_drain); });
    const auto answer = peer.receive();
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->payload, "sent before the stop");
    EXPECT_FALSE(peer.receive());
    peer.close();
    EXPECT_TRUE(in_time(report).clean());
  }
}

TEST(Drain, ThatExpiresCutsAndReportsWhat) {
  TestServer server;
  Record<std::shared_ptr<OwnedMessage>> kept;
  server.transport.on_message(
      [kept](Session&, const Message& message) mutable { kept.add(std::make_shared<OwnedMessage>(message.retain())); });
  server.start();
  RawPeer owed(server.endpoint), asked(server.endpoint), full(server.endpoint, 8 * 1024);
  owed.send(request(1, "never answered"));
  owed.send(request(2, "never answered"));
  ASSERT_TRUE(kept.wait_for(2));
  Session session = server.session(asked);
  auto answer = ask(session, "never answered", {.timeout = 0ms});
  Session behind = server.session(full);
  fill(behind, pattern(10'000));
  const std::size_t queued = behind.stats().queued_packets;
  ASSERT_GT(queued, 0U);
  const auto began = Clock::now();
  const auto report = server.transport.stop(300ms);
  EXPECT_GE(Clock::now() - began, 300ms);
  EXPECT_LT(Clock::now() - began, soon);
  EXPECT_EQ(report.sessions_cut, 3U);
  EXPECT_EQ(report.answers_cut, 2U);
  EXPECT_EQ(report.requests_cut, 1U);
  EXPECT_EQ(report.packets_cut, queued);
  EXPECT_FALSE(report.clean());
  EXPECT_TRUE(report.complete);
  EXPECT_EQ(in_time(answer).first, Errc::connection_lost);
  EXPECT_EQ(server.transport.stats().dropped_at_close, queued);
  ASSERT_EQ(server.ends.size(), 3U);
  for (const End& end : server.ends.all()) EXPECT_EQ(end.code, Errc::drain_expired);
  EXPECT_EQ(kept.at(0)->respond("too late"), SendResult::closed);
}

TEST(Drain, OfZeroCutsAtOnce) {
  TestServer server;
  server.transport.on_message([](Session&, const Message&) {});
  server.start();
  RawPeer asked(server.endpoint);
  Session session = server.session();
  auto answer = ask(session, "?", {.timeout = 0ms});
  const auto report = takes_less_than(soon, [&] { return server.transport.stop(0ms); });
  EXPECT_EQ(report.requests_cut, 1U);
  EXPECT_EQ(report.sessions_cut, 1U);
  EXPECT_EQ(in_time(answer).first, Errc::connection_lost);
  EXPECT_EQ(server.ends.at(0).code, Errc::drain_expired);
}

TEST(Drain, EndsInTimeUnderAFloodOfOneWayMessages) {
  TestServer server({.shards = 1});
  server.transport.on_message([](Session&, const Message&) {});
  server.start();
  std::atomic<bool> done = false;
  std::vector<std::thread> floods;
  for (int i = 0; i < 2; ++i) {
    floods.emplace_back([&done, peer = RawPeer(server.endpoint)]() mutable {
      Bytes batch;
      for (int n = 0; n < 64; ++n) {
        const Bytes bytes = one_way(1, pattern(1000));
        batch.insert(batch.end(), bytes.begin(), bytes.end());
      }
      while (!done && peer.send(batch)) {
      }
    });
  }
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().packets_in > 1000; }));
  EXPECT_TRUE(takes_less_than(soon, [&] { return server.transport.stop(200ms); }).complete);
  done = true;
  for (auto& flood : floods) flood.join();
}

TEST(Drain, OfTheOptionsIsWhatTheDestructorAndThePlainStopUse) {
  for (const bool by_destructor : {true, false}) {
    Record<End> ends;
    Record<std::shared_ptr<OwnedMessage>> kept;
    const auto began = Clock::now();
    ClientTransport client;  // outlives the server: its own end would be another reason
    {
      TestServer server({.drain = 150ms});
      ends = server.ends;
      server.transport.on_message([kept](Session&, const Message& message) mutable {
        kept.add(std::make_shared<OwnedMessage>(message.retain()));
      });
      server.start();
      client.connect(server.url());
      client.async_request("never answered", [](error_code, Reply) {});
      ASSERT_TRUE(kept.wait_for(1));
      if (!by_destructor) {
        EXPECT_EQ(server.transport.stop().answers_cut, 1U);
      }
    }
    EXPECT_GE(Clock::now() - began, 150ms);
    EXPECT_LT(Clock::now() - began, 5s);
    EXPECT_EQ(ends.at(0).code, Errc::drain_expired);
    EXPECT_EQ(ends.size(), 1U);
  }
}

// --- run

TEST(Run, ReturnsAfterStopFromAnotherThread) {
  TestServer server;
  server.echo();
  server.endpoint = server.transport.listen(any_endpoint(), any_listener());
  auto report = std::async(std::launch::async, [&] { return server.transport.run(); });
  {
    const auto client = connect(server);
    EXPECT_EQ(client->request("running").text(), "running");
  }
  EXPECT_TRUE(server.transport.stop(long_drain).clean());
  EXPECT_TRUE(in_time(report).clean());
}

TEST(Run, DrainsAfterSigtermAndSigint) {
  for (const int signal : {SIGTERM, SIGINT}) {
    TestServer server({.drain = long_drain});
    server.echo();
    server.endpoint = server.transport.listen(any_endpoint(), any_listener());
    auto report = std::async(std::launch::async, [&] { return server.transport.run(); });
    const auto client = connect(server);
    EXPECT_EQ(client->request("running").text(), "running");  // so run() waits for signals by now
    std::raise(signal);
    EXPECT_TRUE(in_time(report).clean());
    EXPECT_EQ(server.ends.at(0).code, Errc::stopping);
  }
}

TEST(Run, FromAHandlerIsRefused) {
  TestServer server;
  Record<error_code> code;
  server.transport.on_message([&transport = server.transport, code](Session&, const Message&) mutable {
    code.add(thrown([&] { transport.run(); }));
  });
  server.start();
  const auto client = connect(server);
  client->send("run");
  EXPECT_EQ(code.at(0), Errc::blocking_on_shard);
}

TEST(Run, MayFollowStartAndStopOfAHandler) {
  TestServer server;
  server.transport.on_message(
      [&transport = server.transport](Session&, const Message&) { transport.stop(long_drain); });
  server.start();
  auto report = std::async(std::launch::async, [&] { return server.transport.run(); });
  const auto client = connect(server);
  client->send("stop");
  EXPECT_TRUE(in_time(report).complete);
}

// --- with executors of the user's

TEST(UsersExecutor, AsyncStopCompletesOnTheThreadThatRunsIt) {
  asio::io_context context(1);
  TestServer server({.executors = {context.get_executor()}});
  server.echo().start();
  RawPeer peer(server.endpoint);
  peer.send(request(1, "x"));
  peer.shut_sending();
  const auto before = threads();
  Record<StopReport> reports;
  server.transport.async_stop(long_drain, [reports](const StopReport& report) mutable { reports.add(report); });
  EXPECT_EQ(reports.size(), 0U);
  context.run_for(patience);
  ASSERT_EQ(reports.size(), 1U);
  EXPECT_TRUE(reports.at(0).clean());
  EXPECT_EQ(threads(), before);
}

TEST(UsersExecutor, ThatNeverRunsDoesNotHoldTheDestructor) {
  asio::io_context context(1);
  const auto began = Clock::now();
  {
    TestServer server({.executors = {context.get_executor()}, .drain = long_drain});
    server.start();
    const RawPeer peer(server.endpoint);
    ClientTransport client({.executor = context.get_executor()});
    client.async_connect(server.url(), [](error_code) {});
  }
  EXPECT_LT(Clock::now() - began, soon);
}

TEST(UsersExecutor, ThatHasGoneLeavesHandlesHarmless) {
  std::optional<Session> kept;
  {
    asio::io_context context(1);
    TestServer server({.executors = {context.get_executor()}});
    server.echo().start();
    RawPeer peer(server.endpoint);
    peer.send(request(1, "x"));
    EXPECT_TRUE(wait_until([&] {
      context.poll();
      return server.transport.stats().packets_out == 1;
    }));
    kept = server.session();
  }
  EXPECT_EQ(kept->stats().packets_in, 1U);
  EXPECT_FALSE(kept->is_open());
  EXPECT_EQ(kept->send("to nobody"), SendResult::closed);
  EXPECT_EQ(code_of([&](auto handler) { kept->async_send("to nobody", {}, handler); }), Errc::closed);
  EXPECT_EQ(code_of([&](auto handler) { kept->async_request("to nobody", handler); }), Errc::closed);
  kept->close();
}

TEST(UsersExecutor, MayGoBeforeTheServerWhichThenStops) {
  std::optional<asio::io_context> context(std::in_place, 1);
  asio::thread_pool other(1);
  TestServer server({.executors = {context->get_executor(), asio::make_strand(other)}, .drain = long_drain});
  server.echo().start();
  std::vector<std::unique_ptr<RawPeer>> peers;
  for (int i = 0; i < 10; ++i) {
    peers.push_back(std::make_unique<RawPeer>(server.endpoint));
    peers.back()->send(request(1, "x"));
  }
  EXPECT_TRUE(wait_until([&] {
    context->poll();
    return server.transport.stats().packets_out == 10;
  }));
  context.reset();
  const auto report = server.transport.stop(long_drain);
  EXPECT_TRUE(report.complete);
  EXPECT_EQ(server.ends.size(), 10U);
  EXPECT_EQ(server.transport.stats().sessions, 0U);
  for (auto& peer : peers) EXPECT_TRUE(peer->sees_end());
}

TEST(UsersExecutor, MayGoBeforeTheServerWasStarted) {
  std::optional<asio::io_context> context(std::in_place, 1);
  TestServer server({.executors = {context->get_executor()}});
  context.reset();
  server.start();
  EXPECT_TRUE(server.transport.stop(long_drain).complete);
}

TEST(UsersExecutor, MayGoBeforeTheClient) {
  TestServer server;
  server.echo().start();
  for (const bool half_way : {false, true}) {
    std::optional<asio::io_context> context(std::in_place, 1);
    ClientTransport client({.executor = context->get_executor()});
    const auto unfinished = std::make_shared<int>();
    asio::cancellation_signal cancel;
    client.async_connect(server.url(), asio::bind_cancellation_slot(cancel.slot(), [unfinished](error_code) {}));
    if (half_way) {
      context->run_one();
    } else {
      EXPECT_TRUE(wait_until([&] {
        context->poll();
        return client.is_connected();
      }));
      client.async_request("x", [unfinished](error_code, const Reply&) {});
    }
    context.reset();
    EXPECT_EQ(unfinished.use_count(), 1);
    EXPECT_FALSE(client.is_connected());
    EXPECT_EQ(client.send("x"), SendResult::closed);
    EXPECT_EQ(code_of([&](auto handler) { client.async_connect(server.url(), handler); }), Errc::wrong_state);
    cancel.emit(asio::cancellation_type::terminal);
  }
}

// --- what is left

TEST(Stop, LeavesNoThreadAndNoDescriptor) {
  { TestServer warm_up; }
  const std::size_t threads_before = threads();
  const std::size_t descriptors_before = descriptors();
  for (int round = 0; round < 5; ++round) {
    TestServer server({.shards = 3});
    server.echo().start();
    server.transport.listen(any_endpoint(), any_listener());
    std::vector<std::unique_ptr<ClientTransport>> clients;
    for (int i = 0; i < 10; ++i) {
      clients.push_back(connect(server));
      EXPECT_EQ(clients.back()->request("x").text(), "x");
    }
    EXPECT_GE(library_threads(), 13U);
    if (round % 2 == 0) server.transport.stop(round == 0 ? 0ms : 5000ms);
  }
  EXPECT_TRUE(wait_until([&] { return threads() == threads_before; })) << threads() << " " << threads_before;
  EXPECT_TRUE(wait_until([&] { return descriptors() == descriptors_before; }))
      << descriptors() << " " << descriptors_before;
}

TEST(Stop, TellsOnDisconnectOnceForEverySession) {
  for (const auto drain : {0ms, 500ms}) {
    TestServer server;
    server.echo().start();
    std::vector<std::unique_ptr<ClientTransport>> clients;
    for (int i = 0; i < 50; ++i) clients.push_back(connect(server));
    ASSERT_TRUE(server.came.wait_for(50));
    std::atomic<bool> done = false;
    std::thread traffic([&] {
      while (!done) {
        for (auto& client : clients) (void)client->send("x");
      }
    });
    server.transport.stop(drain);
    const auto at_return = server.ends.size();
    done = true;
    traffic.join();
    EXPECT_EQ(at_return, 50U);
    std::set<SessionId> ids;
    for (const End& end : server.ends.all()) ids.insert(end.id);
    EXPECT_EQ(ids.size(), 50U);
    EXPECT_EQ(server.ends.size(), 50U);
  }
}

}  // namespace
}  // namespace msgtrans::test
