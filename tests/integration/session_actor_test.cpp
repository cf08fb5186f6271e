// SPDX-License-Identifier: Apache-2.0
// A coroutine for each session, over real sockets: its mailbox and the peer's backpressure, failures, the end.
#include "support/fixture.hpp"

#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <gtest/gtest.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using asio::awaitable;
using asio::use_awaitable;

awaitable<void> echo(SessionActor actor) {
  while (auto message = co_await actor.receive()) {
    if (message->is_request()) {
      message->respond(message->payload());
    } else {
      actor.session().send(message->payload());
    }
  }
}

TEST(SessionCoroutines, EchoMessagesAndRequestsInOrder) {
  TestServer server;
  server.transport.on_session(echo);
  server.start();
  RawPeer peer(server.endpoint);
  constexpr int packets = 500;
  for (int i = 0; i < packets; ++i) peer.send(one_way(1, std::to_string(i)));
  for (int i = 0; i < packets; ++i) ASSERT_EQ(peer.next().payload, std::to_string(i));
  ClientTransport client;
  client.connect(server.url());
  EXPECT_EQ(client.request("ping").text(), "ping");
  const auto stats = server.transport.actor_manager().stats();
  EXPECT_EQ(stats.actors, 2U);
  EXPECT_EQ(stats.told, static_cast<std::uint64_t>(packets) + 1);
}

// Behaviours are called for every session and must not capture; what their test shares with them is here.
struct Shared {
  std::atomic<bool> go{false};
  std::atomic<int> received{0};
  Record<std::string> seen;
  Record<int> starts;
};
std::shared_ptr<Shared> shared;

class CoroutinesOfSessions : public ::testing::Test {
 protected:
  CoroutinesOfSessions() { shared = std::make_shared<Shared>(); }
};

awaitable<void> wait_for_go_then_count(SessionActor actor) {
  asio::steady_timer timer(actor.get_executor());
  while (!shared->go) {
    timer.expires_after(1ms);
    co_await timer.async_wait(use_awaitable);
  }
  while (auto message = co_await actor.receive()) {
    ++shared->received;
    if (message->is_request()) message->respond("done");
  }
}

TEST_F(CoroutinesOfSessions, WithAFullMailboxHoldUpTheirPeerAndNobodyElse) {
  TestServer server({.shards = 1});
  server.transport.on_session(wait_for_go_then_count, {.mailbox = 8});
  server.start();
  RawPeer slow(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(1));
  // Until the peer's own socket takes no more: it feels that nobody reads.
  constexpr std::size_t packets = 1000;
  const Bytes one = one_way(1, std::string(64 * 1024, 'x'));
  Bytes all;
  for (std::size_t i = 0; i < packets; ++i) all.insert(all.end(), one.begin(), one.end());
  const std::size_t sent = slow.send_until_full(all);
  EXPECT_LT(sent, all.size());
  const auto stats = server.transport.actor_manager().stats();
  EXPECT_LE(stats.mailbox_depth, 8U);
  EXPECT_LE(stats.told, 8U);
  EXPECT_EQ(shared->received, 0);
  // The shard is not blocked: it tells others' actors, and stops.
  RawPeer other(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(2));
  const auto before = server.transport.actor_manager().stats().told;
  other.send(one_way(1, "hello"));
  EXPECT_TRUE(wait_until([&] { return server.transport.actor_manager().stats().told == before + 1; }));

  shared->go = true;
  slow.send(std::span(all).subspan(sent));
  EXPECT_TRUE(wait_until([&] { return shared->received == static_cast<int>(packets) + 1; })) << shared->received;
}

awaitable<void> note_after_go(SessionActor actor) {
  asio::steady_timer timer(actor.get_executor());
  while (!shared->go) {
    timer.expires_after(1ms);
    co_await timer.async_wait(use_awaitable);
  }
  while (auto message = co_await actor.receive()) shared->seen.add(std::string(message->text()));
}

TEST_F(CoroutinesOfSessions, ReceiveHighPriorityMessagesFirst) {
  TestServer server;
  server.transport.on_session(note_after_go);
  server.start();
  ClientTransport client;
  client.connect(server.url());
  client.send("normal 1");
  client.send("normal 2");
  client.send("urgent", {.high_priority = true});
  EXPECT_TRUE(wait_until([&] { return server.transport.actor_manager().stats().told == 3; }));
  shared->go = true;
  ASSERT_TRUE(shared->seen.wait_for(3));
  EXPECT_EQ(shared->seen.all(), (std::vector<std::string>{"urgent", "normal 1", "normal 2"}));
}

awaitable<void> fail_on_bad(SessionActor actor) {
  shared->starts.add(static_cast<int>(actor.restarts()));
  while (auto message = co_await actor.receive()) {
    if (message->text() == "bad") throw std::runtime_error("a bad message");
    if (message->is_request()) message->respond(message->payload());
  }
}

TEST_F(CoroutinesOfSessions, AreStartedAgainAfterAnExceptionAndTheirSessionGoesOn) {
  TestServer server;
  server.transport.on_session(fail_on_bad, {.restart_delay = 1ms});
  server.start();
  auto events = server.transport.subscribe();
  ClientTransport client;
  client.connect(server.url());
  client.send("bad");
  EXPECT_EQ(client.request("good").text(), "good");
  EXPECT_EQ(shared->starts.all(), (std::vector<int>{0, 1}));
  for (;;) {
    const auto event = events.next_for(patience);
    ASSERT_TRUE(event) << "no actor_failed";
    if (event->kind != EventKind::actor_failed) continue;
    EXPECT_EQ(event->session, server.came.at(0));
    EXPECT_EQ(event->error.text, "a bad message");
    break;
  }
}

TEST_F(CoroutinesOfSessions, ThatFailTooOftenEndTheirSessionWithTheReason) {
  TestServer server;
  server.transport.on_session(fail_on_bad, {.restart_delay = 0ms, .max_restarts = 1});
  server.start();
  ClientTransport client, other;
  client.connect(server.url());
  other.connect(server.url());
  client.send("bad");
  client.send("bad");
  const End end = server.ends.at(0);
  EXPECT_EQ(end.code, Errc::actor_failed);
  EXPECT_EQ(end.text, "a bad message");
  EXPECT_EQ(other.request("good").text(), "good");
}

TEST_F(CoroutinesOfSessions, StopTheServerByAFailureThatIsEverybodys) {
  TestServer server;
  server.transport.on_session(fail_on_bad, {.on_failure = OnFailure::escalate});
  server.start();
  ClientTransport client, other;
  client.connect(server.url());
  other.connect(server.url());
  ASSERT_TRUE(server.came.wait_for(2));
  client.send("bad");
  EXPECT_TRUE(server.ends.wait_for(2));
  EXPECT_TRUE(server.transport.stop(1s).complete);
  EXPECT_EQ(server.errors.at(0).code, Errc::actor_failed);
}

awaitable<void> leave_after_one(SessionActor actor) {
  auto message = co_await actor.receive();
  if (message) actor.session().send("bye");
}

TEST_F(CoroutinesOfSessions, ThatReturnEndTheirSessionAfterWhatTheySent) {
  TestServer server;
  server.transport.on_session(leave_after_one);
  server.start();
  RawPeer peer(server.endpoint);
  peer.send(one_way(1, "hello"));
  EXPECT_EQ(peer.next().payload, "bye");
  EXPECT_TRUE(peer.sees_end());
  EXPECT_EQ(server.ends.at(0).code, Errc::closed_by_user);
  EXPECT_TRUE(wait_until([&] { return server.transport.actor_manager().size() == 0; }));
}

awaitable<void> receive_slowly(SessionActor actor) {
  asio::steady_timer timer(actor.get_executor());
  while (auto message = co_await actor.receive()) {
    timer.expires_after(1ms);
    co_await timer.async_wait(use_awaitable);
    ++shared->received;
    shared->seen.add(std::string(message->text()));
  }
  shared->starts.add(-1);
}

TEST_F(CoroutinesOfSessions, StillReceiveWhatCameBeforeTheirSessionEnded) {
  TestServer server;
  server.transport.on_session(receive_slowly);
  server.start();
  {
    RawPeer peer(server.endpoint);
    for (int i = 0; i < 50; ++i) peer.send(one_way(1, std::to_string(i)));
    EXPECT_TRUE(wait_until([&] { return server.transport.actor_manager().stats().told == 50; }));
  }
  EXPECT_TRUE(server.ends.wait_for(1));
  EXPECT_TRUE(shared->starts.wait_for(1));
  EXPECT_EQ(shared->received, 50);
}

TEST_F(CoroutinesOfSessions, AreWaitedForByAStopThatDrains) {
  TestServer server;
  server.transport.on_session(receive_slowly);
  server.start();
  RawPeer peer(server.endpoint);
  for (int i = 0; i < 50; ++i) peer.send(one_way(1, std::to_string(i)));
  EXPECT_TRUE(wait_until([&] { return server.transport.actor_manager().stats().told == 50; }));
  const auto report = server.transport.stop(patience);
  EXPECT_TRUE(report.clean());
  EXPECT_EQ(shared->received, 50);
  EXPECT_EQ(shared->starts.all(), std::vector<int>{-1});
  EXPECT_EQ(server.ends.at(0).code, Errc::stopping);
}

awaitable<void> ignore_the_end(SessionActor actor) {
  asio::steady_timer timer(actor.get_executor(), 1h);
  co_await timer.async_wait(use_awaitable);
}

TEST_F(CoroutinesOfSessions, ThatGoOnAfterTheirSessionAreCancelledAtTheEndOfTheDrainAndReported) {
  TestServer server;
  server.transport.on_session(ignore_the_end);
  server.start();
  RawPeer peer(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(1));
  EXPECT_TRUE(wait_until([&] { return server.transport.actor_manager().size() == 1; }));
  const auto report = server.transport.stop(50ms);
  EXPECT_TRUE(report.complete);
  EXPECT_FALSE(report.clean());
  EXPECT_EQ(report.actors_cut, 1U);
  EXPECT_EQ(server.transport.actor_manager().size(), 0U);
}

TEST_F(CoroutinesOfSessions, AreToldAndAskedFromWithinTheProcess) {
  TestServer server;
  server.transport.on_session(fail_on_bad);
  server.start();
  ClientTransport client;
  client.connect(server.url());
  const SessionId id = server.came.at(0);
  auto& actors = server.transport.actor_manager();
  ASSERT_TRUE(wait_until([&] { return actors.find(id).has_value(); }));
  error_code code;
  const auto make = [](ReplyTo<Reply> to) { return OwnedMessage("from within", {.biz_type = 7}, std::move(to)); };
  const Reply reply = actors.ask<Reply>(id, make, 10s, code);
  EXPECT_FALSE(code);
  EXPECT_EQ(reply.text(), "from within");
  EXPECT_EQ(reply.biz_type(), 7);
  EXPECT_TRUE(reply.is_local());
  // Not answered, since it is one-way; and a question that is dropped says so.
  EXPECT_EQ(actors.tell(id, OwnedMessage("one-way")), ChannelStatus::ok);
  const auto bad = [](ReplyTo<Reply> to) { return OwnedMessage("bad", {}, std::move(to)); };
  (void)actors.ask<Reply>(id, bad, 10s, code);
  EXPECT_EQ(code, Errc::no_answer);
}

TEST_F(CoroutinesOfSessions, RunFreeStandingActorsBesideTheSessions) {
  TestServer server;
  server.start();
  auto actor = server.transport.actor_manager().spawn([](ProtocolActor<OwnedMessage> self) -> awaitable<void> {
    while (auto message = co_await self.receive()) shared->seen.add(std::string(message->text()));
  });
  EXPECT_EQ(actor.try_tell(OwnedMessage("hello")), ChannelStatus::ok);
  EXPECT_EQ(shared->seen.at(0), "hello");
  EXPECT_TRUE(server.transport.stop(1s).clean());
  EXPECT_EQ(actor.try_tell(OwnedMessage("too late")), ChannelStatus::closed);
}

TEST_F(CoroutinesOfSessions, AreRefusedBesideAHandlerOfMessagesAndWithBadOptions) {
  ServerTransport server;
  EXPECT_EQ(thrown([&] { server.on_session(echo, {.mailbox = 0}); }), Errc::invalid_option);
  server.on_session(echo);
  server.on_message([](Session&, const Message&) {});
  EXPECT_EQ(thrown([&] { server.start(); }), Errc::invalid_option);
  server.on_message(nullptr);
  server.start();
  EXPECT_EQ(thrown([&] { server.on_session(echo); }), Errc::wrong_state);
}

TEST_F(CoroutinesOfSessions, RunOnExecutorsOfTheUsers) {
  asio::io_context context(1);
  auto server = std::make_unique<TestServer>(ServerOptions{.executors = {context.get_executor()}});
  server->transport.on_session(echo);
  server->start();
  std::thread runner([&] { context.run(); });
  {
    ClientTransport client;
    client.connect(server->url());
    EXPECT_EQ(client.request("ping").text(), "ping");
  }
  EXPECT_TRUE(server->transport.stop(5s).complete);
  server.reset();
  runner.join();
}

TEST_F(CoroutinesOfSessions, AreDestroyedWithTheContextTheyRunOn) {
  auto context = std::make_unique<asio::io_context>(1);
  TestServer server(ServerOptions{.executors = {context->get_executor()}});
  server.transport.on_session(echo);
  server.start();
  RawPeer peer(server.endpoint);
  peer.send(one_way(1, "x"));
  const auto deadline = Clock::now() + patience;
  while (server.transport.stats().packets_out == 0 && Clock::now() < deadline) context->run_one_for(10ms);
  EXPECT_EQ(server.transport.actor_manager().size(), 1U);
  context.reset();
  EXPECT_EQ(server.transport.actor_manager().size(), 0U);
  EXPECT_EQ(server.ends.size(), 1U);
  EXPECT_TRUE(server.transport.stop(0ms).complete);
}

}  // namespace
}  // namespace msgtrans::test
