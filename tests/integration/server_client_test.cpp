// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <array>
#include <atomic>
#include <boost/asio/error.hpp>
#include <boost/asio/use_future.hpp>
#include <cerrno>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <set>
#include <sstream>
#include <thread>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;

constexpr std::size_t mebibyte = 1024 * 1024;

std::unique_ptr<ClientTransport> connect(const TestServer& server, ClientOptions options = {}) {
  auto client = std::make_unique<ClientTransport>(std::move(options));
  client->connect(server.url());
  return client;
}

error_code request_error(ClientTransport& client, BytesView payload, const RequestOptions& options = {}) {
  Error error;
  const Reply reply = client.request(payload, options, error);
  return error.code;
}

// --- messages

class PayloadSize : public ::testing::TestWithParam<std::size_t> {};

TEST_P(PayloadSize, IsAnsweredUnchangedInBothDirections) {
  TestServer server;
  server.echo().start();
  ClientTransport client;
  client.on_message([](Session& session, const Message& message) {
    if (message.is_request()) session.respond(message, message.payload());
  });
  client.connect(server.url());
  const std::string payload = pattern(GetParam());
  EXPECT_EQ(client.request(payload).text(), payload);
  EXPECT_EQ(server.session().request(payload).text(), payload);
}

TEST_P(PayloadSize, ArrivesAsOneWayUnchangedInBothDirections) {
  TestServer server;
  server.echo().start();
  Record<std::string> got;
  ClientTransport client;
  client.on_message([got](Session&, const Message& message) mutable { got.add(std::string(message.text())); });
  client.connect(server.url());
  const std::string payload = pattern(GetParam());
  ASSERT_EQ(client.send(payload), SendResult::queued);
  EXPECT_TRUE(got.at(0) == payload);
}

INSTANTIATE_TEST_SUITE_P(Bytes, PayloadSize,
                         ::testing::Values(0, 1, 16 * 1024 - 1, 16 * 1024, 16 * 1024 + 1, 256 * 1024 - 16, 256 * 1024,
                                           mebibyte, 16 * mebibyte),
                         ::testing::PrintToStringParamName());

TEST(Limits, APayloadOverTheLimitIsRefusedHereAndTheSessionGoesOn) {
  TestServer server;
  server.echo().start();
  const auto client = connect(server, {.session = {.max_payload = 1000, .max_extension = 10}});
  EXPECT_EQ(client->send(pattern(1001)), SendResult::too_large);
  EXPECT_EQ(request_error(*client, pattern(1001)), Errc::too_large);
  EXPECT_EQ(in_time(submit(*client, pattern(1001))), Errc::too_large);
  EXPECT_EQ(client->send("", {.extension = pattern(11)}), SendResult::too_large);
  EXPECT_EQ(client->request(pattern(1000), {.extension = pattern(10)}).text(), pattern(1000));
}

TEST(Limits, APayloadOverTheReceiversLimitEndsTheSessionThereAndNoOther) {
  TestServer server({.session = {.max_payload = 1000}});
  server.echo().start();
  const auto other = connect(server);
  const auto client = connect(server);
  EXPECT_EQ(client->request(pattern(1000)).text(), pattern(1000));
  EXPECT_EQ(request_error(*client, pattern(1001)), Errc::connection_lost);
  EXPECT_EQ(server.ends.at(0).code, Errc::payload_too_large);
  EXPECT_NE(server.ends.at(0).text.find("1001"), std::string::npos) << server.ends.at(0).text;
  EXPECT_EQ(server.errors.at(0).code, Errc::payload_too_large);
  EXPECT_EQ(server.transport.stats().protocol_errors, 1U);
  EXPECT_EQ(other->request("still here").text(), "still here");
}

TEST(Limits, AnAnswerOverTheLimitIsRefusedAndTheRequestCanStillBeAnswered) {
  TestServer server({.session = {.max_payload = 100}});
  Record<SendResult> results;
  server.transport.on_message([results](Session& session, const Message& message) mutable {
    results.add(session.respond(message, pattern(101)));
    results.add(session.respond(message, "short"));
  });
  server.start();
  EXPECT_EQ(connect(server)->request("?").text(), "short");
  EXPECT_EQ(results.all(), (std::vector{SendResult::too_large, SendResult::queued}));
}

TEST(Messages, CarryBizTypeExtensionPriorityAndRouteTagBothWays) {
  TestServer server;
  struct Seen {
    int biz_type = -1;
    std::string extension;
    bool priority = false, route_tag = false, request = false;
  };
  Record<Seen> seen;
  server.transport.on_message([seen](Session& session, const Message& message) mutable {
    seen.add({message.biz_type(), std::string(BytesView(message.extension()).text()), message.high_priority(),
              message.has_route_tag(), message.is_request()});
    if (message.is_request()) session.respond(message, "answer", "its extension");
  });
  server.start();
  const auto client = connect(server);
  const auto reply =
      client->request("x", {.biz_type = 255, .extension = "trace", .high_priority = true, .route_tag = true});
  EXPECT_EQ(reply.biz_type(), 255);
  EXPECT_EQ(BytesView(reply.extension()).text(), "its extension");
  EXPECT_TRUE(reply.high_priority());
  EXPECT_EQ(reply.text(), "answer");
  EXPECT_FALSE(reply.is_request());
  client->send("y", {.biz_type = 7, .extension = pattern(65535)});
  const Seen first = seen.at(0);
  EXPECT_EQ(first.biz_type, 255);
  EXPECT_EQ(first.extension, "trace");
  EXPECT_TRUE(first.priority && first.route_tag && first.request);
  const Seen second = seen.at(1);
  EXPECT_EQ(second.biz_type, 7);
  EXPECT_TRUE(second.extension == pattern(65535));
  EXPECT_FALSE(second.priority || second.route_tag || second.request);
}

TEST(Messages, EachEndCountsItsOwnIdsFromOneForOneWayAndRequestsTogether) {
  TestServer server;
  server.echo().start();
  RawPeer peer(server.endpoint);
  const Session session = server.session();
  Session(session).send("first");
  Session(session).async_request("second", [](error_code, Reply) {});
  Session(session).send("third");
  for (std::uint32_t id = 1; id <= 3; ++id) EXPECT_EQ(peer.next().header.message_id, id);
  peer.send(request(77, "ping"));
  const auto pong = peer.receive();
  EXPECT_EQ(pong->header.message_id, 77U);
  EXPECT_EQ(pong->header.type, wire::PacketType::response);
  EXPECT_EQ(pong->payload, "ping");
}

TEST(Messages, ARetainedRequestIsAnsweredLaterFromAnotherThread) {
  TestServer server;
  std::promise<OwnedMessage> retained;
  Record<SendResult> at_once;
  server.transport.on_message([&retained, at_once](Session& session, const Message& message) mutable {
    auto owned = message.retain();
    at_once.add(session.respond(message, "the retained one answers"));
    retained.set_value(std::move(owned));
  });
  server.start();
  const auto client = connect(server);
  auto answer = client->async_request("question", {.biz_type = 3}, asio::use_future);
  OwnedMessage owned = retained.get_future().get();
  EXPECT_TRUE(owned.is_request());
  EXPECT_EQ(owned.text(), "question");
  EXPECT_EQ(owned.biz_type(), 3);
  EXPECT_EQ(owned.respond("later", "ext"), SendResult::queued);
  EXPECT_EQ(owned.respond("again"), SendResult::not_found);
  const Reply reply = answer.get();
  EXPECT_EQ(reply.text(), "later");
  EXPECT_EQ(BytesView(reply.extension()).text(), "ext");
  EXPECT_EQ(at_once.at(0), SendResult::not_found);
}

TEST(Messages, ARetainedRequestOfASessionThatEndedCannotBeAnswered) {
  // An end of the peer's sending side may still want the answer: it is kept for that long.
  TestServer server({.session = {.request_timeout = 50ms, .close_timeout = 50ms}});
  Record<std::shared_ptr<OwnedMessage>> retained;
  server.transport.on_message([retained](Session&, const Message& message) mutable {
    retained.add(std::make_shared<OwnedMessage>(message.retain()));
  });
  server.start();
  auto client = connect(server);
  client->async_request("question", [](error_code, Reply) {});
  const auto owned = retained.at(0);
  ASSERT_TRUE(owned);
  client.reset();
  ASSERT_TRUE(server.ends.wait_for(1));
  EXPECT_EQ(owned->respond("too late"), SendResult::closed);
}

TEST(Messages, AnsweringTwiceOrAOneWayOrAnothersMessageSaysNotFound) {
  TestServer server;
  Record<SendResult> results;
  std::atomic<const TestServer*> self = &server;
  server.transport.on_message([results, &self](Session& session, const Message& message) mutable {
    if (message.is_one_way()) {
      results.add(session.respond(message, "to a one-way"));
      return;
    }
    for (const SessionId id : self.load()->transport.session_manager().ids()) {
      if (id == session.id()) continue;
      auto other = *self.load()->transport.session_manager().get(id);
      results.add(other.respond(message, "from another session"));
    }
    results.add(session.respond(message, "right"));
    results.add(session.respond(message, "twice"));
  });
  server.start();
  const auto other = connect(server);
  const auto client = connect(server);
  ASSERT_TRUE(server.came.wait_for(2));
  client->send("one-way");
  EXPECT_EQ(client->request("?").text(), "right");
  EXPECT_EQ(results.all(),
            (std::vector{SendResult::not_found, SendResult::not_found, SendResult::queued, SendResult::not_found}));
}

TEST(Messages, WithoutAHandlerAreCountedAsUnhandled) {
  TestServer server;
  server.start();
  const auto client = connect(server);
  client->send("one");
  EXPECT_EQ(request_error(*client, "two", {.timeout = 50ms}), Errc::request_timeout);
  EXPECT_EQ(server.transport.stats().unhandled, 2U);
  EXPECT_EQ(server.transport.stats().packets_in, 2U);
}

TEST(Messages, OfOneSessionArriveInOrder) {
  TestServer server;
  Record<std::string> got;
  server.transport.on_message(
      [got](Session&, const Message& message) mutable { got.add(std::string(message.text())); });
  server.start();
  const auto client = connect(server);
  std::vector<std::string> sent;
  for (int i = 0; i < 2000; ++i) {
    sent.push_back(std::to_string(i) + pattern(i % 50 == 0 ? 20'000 : 10, static_cast<unsigned>(i)));
    ASSERT_TRUE(wait_until([&] { return client->send(sent.back()) == SendResult::queued; }));
  }
  ASSERT_TRUE(got.wait_for(sent.size()));
  EXPECT_TRUE(got.all() == sent);
}

// --- requests

TEST(Requests, TimeOutAndTheLateAnswerIsCountedAsUnmatched) {
  TestServer server;
  server.start();
  RawPeer peer(server.endpoint);
  Session session = server.session();
  Error error;
  (void)session.request("?", {.timeout = 30ms}, error);
  EXPECT_EQ(error.code, Errc::request_timeout);
  EXPECT_EQ(server.transport.stats().requests, 1U);
  EXPECT_EQ(server.transport.stats().requests_timed_out, 1U);
  peer.send(response(peer.next().header.message_id, "late"));
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().unmatched_responses == 1; }));
  EXPECT_TRUE(session.is_open());
}

TEST(Requests, TakeTheTimeoutOfTheSessionsOptions) {
  TestServer server({.session = {.request_timeout = 40ms}});
  server.start();
  const RawPeer peer(server.endpoint);
  const auto began = Clock::now();
  Error error;
  (void)server.session().request("?", {}, error);
  EXPECT_EQ(error.code, Errc::request_timeout);
  EXPECT_GE(Clock::now() - began, 40ms);
  EXPECT_LT(Clock::now() - began, 8s);  // not the ten seconds of the default
}

TEST(Requests, ForgedAndDuplicateAnswersAreCountedAndReachNobody) {
  TestServer server;
  Record<std::string> got;
  server.transport.on_message(
      [got](Session&, const Message& message) mutable { got.add(std::string(message.text())); });
  server.start();
  RawPeer peer(server.endpoint);
  auto answer = server.session().async_request("?", asio::use_future);
  const auto id = peer.next().header.message_id;
  peer.send(response(id + 1, "forged"));
  peer.send(response(id, "true"));
  peer.send(response(id, "duplicate"));
  peer.send(one_way(1, "end"));
  EXPECT_EQ(answer.get().text(), "true");
  EXPECT_EQ(got.at(0), "end");
  EXPECT_EQ(server.transport.stats().unmatched_responses, 2U);
}

TEST(Requests, AnotherSessionsAnswerDoesNotMatch) {
  TestServer server;
  server.start();
  RawPeer asked(server.endpoint);
  const Session session = server.session(asked);
  RawPeer other(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(2));
  auto answer = Session(session).async_request("?", asio::use_future);
  const auto id = asked.next().header.message_id;
  other.send(response(id, "from the wrong session"));
  ASSERT_TRUE(wait_until([&] { return server.transport.stats().unmatched_responses == 1; }));
  asked.send(response(id, "right"));
  EXPECT_EQ(answer.get().text(), "right");
}

TEST(Requests, MayBeAnsweredInAnyOrder) {
  TestServer server;
  server.start();
  RawPeer peer(server.endpoint);
  Session session = server.session();
  std::vector<std::future<Reply>> answers;
  for (int i = 0; i < 50; ++i) answers.push_back(session.async_request(std::to_string(i), asio::use_future));
  std::vector<RawPacket> asked;
  for (int i = 0; i < 50; ++i) asked.push_back(peer.next());
  for (auto it = asked.rbegin(); it != asked.rend(); ++it) {
    peer.send(response(it->header.message_id, "answer " + it->payload));
  }
  for (int i = 0; i < 50; ++i) {
    EXPECT_EQ(answers[static_cast<std::size_t>(i)].get().text(), "answer " + std::to_string(i));
  }
}

TEST(Requests, FailAtOnceWhenThePeerDies) {
  TestServer server;
  server.start();
  RawPeer peer(server.endpoint);
  Session session = server.session();
  std::vector<Answer> answers;
  for (int i = 0; i < 10; ++i) answers.push_back(ask(session, "?"));
  ASSERT_TRUE(peer.receive());
  const auto began = Clock::now();
  peer.reset();
  for (auto& answer : answers) EXPECT_EQ(in_time(answer).first, Errc::connection_lost);
  EXPECT_LT(Clock::now() - began, 8s);  // the timeout of a request is 10 s
  EXPECT_EQ(in_time(ask(session, "?")).first, Errc::closed);
}

TEST(Requests, ToAPeerThatShutItsSendingSideFailAtOnce) {
  TestServer server;
  server.transport.on_message([](Session&, const Message&) {});
  server.start();
  RawPeer peer(server.endpoint);
  Session session = server.session();
  auto answer = ask(session, "?");
  ASSERT_TRUE(peer.receive());
  peer.shut_sending();
  EXPECT_EQ(in_time(answer).first, Errc::connection_lost);
}

TEST(Requests, OfAPeerThatShutItsSendingSideAreAnsweredWithinTheLongerOfTheTwoTimeouts) {
  for (const bool closing_is_longer : {false, true}) {
    TestServer server({.session = {.request_timeout = closing_is_longer ? 100ms : 20s,
                                   .close_timeout = closing_is_longer ? 20s : 100ms}});
    const Record<std::shared_ptr<OwnedMessage>> asked;
    server.transport.on_message(
        [asked](Session&, const Message& message) { asked.add(std::make_shared<OwnedMessage>(message.retain())); });
    server.start();
    RawPeer peer(server.endpoint);
    peer.send(request(1, "?"));
    peer.shut_sending();
    const auto message = asked.at(0);
    ASSERT_TRUE(message);
    EXPECT_FALSE(server.ends.wait_for(1, 500ms)) << "an answer is owed: " << server.ends.at(0).code.message();
    EXPECT_EQ(message->respond("late"), SendResult::queued);
    const auto answer = peer.receive();
    ASSERT_TRUE(answer);
    EXPECT_EQ(answer->payload, "late");
  }
}

// --- listening and connecting

TEST(Listening, OnIpv6Works) {
  TestServer server;
  server.echo();
  server.endpoint = server.transport.listen(tcp("[::1]:0"));
  server.transport.start();
  EXPECT_EQ(server.endpoint.url().substr(0, 12), "tcp://[::1]:");
  EXPECT_EQ(connect(server)->request("six").text(), "six");
  EXPECT_EQ(server.errors.size(), 0U);
}

TEST(Listening, OnTwoAddressesHonoursEachOnesOptions) {
  TestServer server;
  server.echo().start();
  const Endpoint small =
      server.transport.listen(tcp("127.0.0.1:0"), {.session = SessionOptions{.max_payload = 10}});  // while running
  EXPECT_EQ(server.transport.endpoints(), (std::vector{server.endpoint, small}));
  EXPECT_EQ(connect(server)->request(pattern(11)).text(), pattern(11));
  ClientTransport client;
  client.connect(small.url());
  EXPECT_EQ(client.request(pattern(10)).text(), pattern(10));
  EXPECT_EQ(request_error(client, pattern(11)), Errc::connection_lost);
}

TEST(Listening, OnANameWorks) {
  TestServer server;
  server.echo();
  server.endpoint = server.transport.listen(tcp("localhost:0"));
  server.transport.start();
  ClientTransport client;
  client.connect("tcp://localhost:" + std::to_string(server.endpoint.port));
  EXPECT_EQ(client.request("named").text(), "named");
}

TEST(Listening, OnAPortInUseNamesTheAddress) {
  const RawListener taken;
  TestServer server;
  std::string text;
  EXPECT_EQ(thrown([&] { server.transport.listen(taken.endpoint()); }, &text).value(), EADDRINUSE);
  EXPECT_NE(text.find(taken.endpoint().to_string()), std::string::npos) << text;
  EXPECT_TRUE(server.transport.endpoints().empty());
}

TEST(Listening, OnAPortOfAnotherServerIsAnErrorAndNoSilentSharing) {
  TestServer first;
  first.echo().start();
  for (const bool running : {false, true}) {
    TestServer second;
    if (running) second.start();
    Error error;
    EXPECT_FALSE(second.transport.listen(first.endpoint, {}, error));
    EXPECT_EQ(error.code.value(), EADDRINUSE);
    EXPECT_NE(error.text.find(first.endpoint.to_string()), std::string::npos) << error.text;
  }
  EXPECT_EQ(thrown([&] { first.transport.listen(first.endpoint); }).value(), EADDRINUSE);
  EXPECT_EQ(connect(first)->request("mine").text(), "mine");
}

TEST(Listening, OnABadAddressIsAnError) {
  TestServer server;
  EXPECT_EQ(thrown([] { (void)tcp("127.0.0.1"); }), Errc::invalid_address);
  EXPECT_EQ(thrown([] { (void)tcp("127.0.0.1:65536"); }), Errc::invalid_address);
  EXPECT_EQ(thrown([] { (void)tcp("::1:80"); }), Errc::invalid_address);
  EXPECT_TRUE(thrown([&] { server.transport.listen(tcp("no-such-host.invalid:0")); }));
  EXPECT_TRUE(thrown([&] { server.transport.listen(tcp("192.0.2.1:0")); }));  // an address of nobody
}

TEST(Listening, IsFreedByStopForTheNextServer) {
  auto first = std::make_unique<TestServer>();
  first->echo().start();
  const Endpoint where = first->endpoint;
  const auto client = connect(*first);
  first->transport.stop(1s);
  TestServer second;
  EXPECT_EQ(second.transport.listen(where), where);
}

TEST(Connecting, ToAPortOfNobodyIsRefused) {
  Endpoint nobodys;
  {
    const RawListener gone;
    nobodys = gone.endpoint();
  }
  ClientTransport client;
  std::string text;
  const auto code = thrown([&] { client.connect(nobodys.url()); }, &text);
  EXPECT_EQ(code, asio::error::connection_refused);
  EXPECT_NE(text.find(nobodys.to_string()), std::string::npos) << text;
  EXPECT_FALSE(client.is_connected());
}

TEST(Connecting, ToABadUrlSaysWhatIsWrong) {
  ClientTransport client;
  for (const char* url : {"", "tcp://", "tcp://host", "http://127.0.0.1:80", "127.0.0.1:80", "tcp://127.0.0.1:x"}) {
    EXPECT_EQ(thrown([&] { client.connect(url); }), Errc::invalid_address) << url;
  }
  Record<error_code> result;
  client.async_connect("nonsense", [result](error_code code) mutable { result.add(code); });
  EXPECT_EQ(result.at(0), Errc::invalid_address);
}

TEST(Connecting, ToANameThatDoesNotResolveIsAnError) {
  ClientTransport client;
  std::string text;
  EXPECT_TRUE(thrown([&] { client.connect("tcp://no-such-host.invalid:80"); }, &text));
  EXPECT_NE(text.find("no-such-host.invalid"), std::string::npos) << text;
}

TEST(Connecting, GivesUpAfterItsTimeout) {
  // Nobody accepts, so further connections stay unanswered as soon as the backlog is full.
  const RawListener listener(0);
  std::vector<std::unique_ptr<ClientTransport>> clients;
  error_code code;
  while (!code && clients.size() < 8) {
    clients.push_back(std::make_unique<ClientTransport>(ClientOptions{.connect_timeout = 100ms}));
    code = thrown([&] { clients.back()->connect(listener.endpoint().url()); });
  }
  EXPECT_EQ(code, asio::error::timed_out);
}

TEST(Connecting, TwiceIsRefusedAndTheConnectionStays) {
  TestServer server;
  server.echo().start();
  const auto client = connect(server);
  EXPECT_EQ(thrown([&] { client->connect(server.url()); }), Errc::wrong_state);
  EXPECT_EQ(client->request("still").text(), "still");
}

TEST(Connecting, AgainAfterTheEndMakesANewSession) {
  TestServer server;
  server.echo().start();
  Record<End> ends;
  ClientTransport client;
  client.on_disconnect([ends](Session& session, const Error& reason) mutable {
    ends.add({session.id(), reason.code, reason.text});
  });
  std::set<SessionId> ids;
  for (int i = 0; i < 5; ++i) {
    client.connect(server.url());
    ASSERT_TRUE(client.is_connected());
    ids.insert(client.session()->id());
    EXPECT_EQ(client.request("x").text(), "x");
    EXPECT_EQ(client.request("x").id(), 2U);  // counted anew
    client.close();
    EXPECT_FALSE(client.is_connected());
    EXPECT_FALSE(client.session());
    EXPECT_EQ(client.send("x"), SendResult::closed);
    EXPECT_EQ(request_error(client, "x"), Errc::closed);
    client.close();  // again: no effect
  }
  EXPECT_EQ(ids.size(), 5U);
  EXPECT_EQ(ends.size(), 5U);
  EXPECT_TRUE(server.ends.wait_for(5));
}

TEST(Connecting, AgainFromTheDisconnectHandlerWorks) {
  TestServer server;
  server.echo().start();
  Record<error_code> reconnected;
  ClientTransport client;
  client.on_disconnect([&](Session&, const Error&) {
    client.async_connect(server.url(), [reconnected](error_code code) mutable { reconnected.add(code); });
  });
  client.connect(server.url());
  server.session().close();
  ASSERT_TRUE(reconnected.wait_for(1));
  EXPECT_FALSE(reconnected.at(0)) << reconnected.at(0).message();
  EXPECT_EQ(client.request("back").text(), "back");
}

TEST(Connecting, IsReportedToTheClientsDisconnectHandlerExactlyOnceAtTheEnd) {
  TestServer server;
  server.echo().start();
  Record<End> ends;
  ClientTransport client;
  client.on_disconnect([ends](Session& session, const Error& reason) mutable {
    ends.add({session.id(), reason.code, reason.text});
  });
  client.connect(server.url());
  const SessionId id = client.session()->id();
  server.session().close("go away");
  EXPECT_EQ(ends.at(0).code, Errc::closed_by_peer);
  EXPECT_EQ(ends.at(0).id, id);
  EXPECT_TRUE(wait_until([&] { return !client.is_connected(); }));
  client.close();
  EXPECT_EQ(ends.size(), 1U);
}

// --- admission

TEST(Admission, RefusesBeyondMaxSessionsAndTakesTheNextWhenOneHasGone) {
  TestServer server({.max_sessions = 2});
  server.echo().start();
  const auto first = connect(server);
  auto second = connect(server);
  ASSERT_TRUE(server.came.wait_for(2));
  {
    ClientTransport third;
    Error error;
    third.connect(server.url(), error);  // over TCP it succeeds before the server has looked
    EXPECT_TRUE(error || wait_until([&] { return !third.is_connected(); }));
  }
  EXPECT_EQ(server.errors.at(0).code, Errc::too_many_sessions);
  EXPECT_EQ(server.transport.stats().sessions_refused, 1U);
  EXPECT_EQ(server.transport.session_count(), 2U);
  second->close();
  ASSERT_TRUE(server.ends.wait_for(1));
  EXPECT_EQ(connect(server)->request("room again").text(), "room again");
  EXPECT_EQ(first->request("untouched").text(), "untouched");
  EXPECT_EQ(server.came.size(), 3U);  // on_connect never saw the refused one
}

TEST(Admission, CountsSessionsPerAddressApart) {
  TestServer server({.max_sessions_per_address = 1, .session = {.first_packet_timeout = 0ms}});
  server.echo().start();
  const Endpoint six = server.transport.listen(tcp("[::1]:0"));
  const auto four = connect(server);
  ASSERT_TRUE(server.came.wait_for(1));
  RawPeer again(server.endpoint);
  EXPECT_TRUE(again.sees_end());
  EXPECT_EQ(server.transport.stats().refusals.address, 1U);
  ClientTransport other;
  other.connect(six.url());
  EXPECT_EQ(other.request("another address").text(), "another address");
  four->close();
  ASSERT_TRUE(server.ends.wait_for(1));
  EXPECT_EQ(connect(server)->request("again").text(), "again");
}

TEST(Admission, OnConnectRefusesWithAReasonForTheErrorHook) {
  TestServer server;
  server.echo();
  server.transport.on_connect([](Session&) { return Admission::refuse("not on the list"); });
  server.start();
  RawPeer peer(server.endpoint);
  EXPECT_TRUE(peer.sees_end());
  EXPECT_EQ(server.errors.at(0).code, Errc::refused);
  EXPECT_NE(server.errors.at(0).text.find("not on the list"), std::string::npos);
  EXPECT_TRUE(wait_until([&] { return server.transport.session_count() == 0; }));
  const auto stats = server.transport.stats();
  EXPECT_EQ(stats.sessions_refused, 1U);
  EXPECT_EQ(stats.sessions_total, 0U);
  EXPECT_EQ(server.ends.size(), 0U);
}

TEST(Admission, OnConnectThatThrowsRefusesThatOneOnly) {
  TestServer server;
  server.echo();
  std::atomic<int> count = 0;
  server.transport.on_connect([&count](Session&) {
    if (count++ == 0) throw std::runtime_error("bad day");
    if (count == 2) throw 42;
  });
  server.start();
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(RawPeer(server.endpoint).sees_end());
  EXPECT_EQ(server.errors.at(0).code, Errc::handler_failed);
  EXPECT_EQ(server.errors.at(0).text, "bad day");
  EXPECT_EQ(connect(server)->request("fine").text(), "fine");
  EXPECT_EQ(server.transport.stats().handler_failures, 2U);
  EXPECT_EQ(server.transport.stats().sessions_refused, 2U);
}

TEST(Admission, OnConnectMayGreetAskAndKeepTheHandle) {
  TestServer server;
  server.echo();
  Record<std::string> answers;
  server.transport.on_connect([answers](Session& session) {
    session.send("welcome");
    session.send(pattern(100'000));
    session.async_request("who are you?",
                          [answers](error_code, Reply reply) mutable { answers.add(std::string(reply.text())); });
  });
  server.start();
  RawPeer peer(server.endpoint);
  EXPECT_EQ(peer.next().payload, "welcome");
  EXPECT_TRUE(peer.next().payload == pattern(100'000));
  const auto question = peer.receive();
  EXPECT_EQ(question->payload, "who are you?");
  peer.send(response(question->header.message_id, "me"));
  EXPECT_EQ(answers.at(0), "me");
}

TEST(Admission, AGreetingIsNotLostWhenOnConnectClosesAtOnce) {
  TestServer server;
  server.transport.on_connect([](Session& session) {
    session.send("welcome and goodbye");
    session.close("only to greet");
  });
  server.start();
  RawPeer peer(server.endpoint);
  EXPECT_EQ(peer.next().payload, "welcome and goodbye");
  EXPECT_FALSE(peer.receive());
  peer.close();
  EXPECT_EQ(server.ends.at(0).text, "only to greet");
}

TEST(Admission, SendsOfARefusedSessionAreCountedAsDropped) {
  TestServer server;
  Record<std::shared_ptr<Session>> kept;
  server.transport.on_connect([kept](Session& session) mutable {
    kept.add(std::make_shared<Session>(session));
    session.send("for nobody");
    return Admission::refuse();
  });
  server.start();
  EXPECT_TRUE(RawPeer(server.endpoint).sees_end());
  ASSERT_TRUE(server.errors.wait_for(1));
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().dropped_at_close == 1; }));
  EXPECT_EQ(kept.at(0)->send("later"), SendResult::closed);
}

// --- the end of a session

TEST(End, CountsWhatWasReadAndNotHandedOut) {
  TestServer server({.session = {.max_requests_in_flight = 2, .read_stall_timeout = 0ms}});
  Record<std::shared_ptr<OwnedMessage>> kept;  // so that nothing more is handed out
  server.transport.on_message(
      [kept](Session&, const Message& message) mutable { kept.add(std::make_shared<OwnedMessage>(message.retain())); });
  SessionStats at_the_end;
  Record<error_code> ends;
  server.transport.on_disconnect([&at_the_end, ends](Session& session, const Error& reason) mutable {
    at_the_end = session.stats();
    ends.add(reason.code);
  });
  server.start();
  RawPeer peer(server.endpoint);
  Bytes bytes;
  for (std::uint32_t id = 1; id <= 11; ++id) {
    const Bytes one = request(id, "to wait");
    bytes.insert(bytes.end(), one.begin(), id == 11 ? one.end() - 1 : one.end());
  }
  peer.send(bytes);
  Session session = server.session(peer);
  ASSERT_TRUE(wait_until([&] { return session.stats().bytes_in >= bytes.size(); }));
  ASSERT_TRUE(kept.wait_for(2));
  EXPECT_EQ(session.stats().dropped_inbound, 0U) << "they wait";
  peer.reset();
  if (!has_socket(server.endpoint)) session.close();  // within the process the reset comes behind what was written
  ASSERT_TRUE(ends.wait_for(1));
  EXPECT_EQ(at_the_end.packets_in, 2U);
  EXPECT_EQ(at_the_end.dropped_inbound, 8U) << "and what is not whole is no packet";
  EXPECT_EQ(server.transport.stats().dropped_inbound, 8U);
}

TEST(End, CountsWhatAClientHasReadAndNotHandedOut) {
  RawListener listener(1, 0, tcp("127.0.0.1:0"));
  ClientTransport client({.session = {.max_requests_in_flight = 3, .first_packet_timeout = 0ms}});
  Record<std::shared_ptr<OwnedMessage>> kept;
  client.on_message(
      [kept](Session&, const Message& message) mutable { kept.add(std::make_shared<OwnedMessage>(message.retain())); });
  std::thread connects([&] { client.connect(listener.endpoint().url()); });
  RawPeer peer = listener.accept();
  connects.join();
  Bytes bytes;
  for (std::uint32_t id = 1; id <= 10; ++id) {
    const Bytes one = request(id, "to wait");
    bytes.insert(bytes.end(), one.begin(), one.end());
  }
  peer.send(bytes);
  ASSERT_TRUE(wait_until([&] { return client.client_stats().bytes_in >= bytes.size(); }));
  ASSERT_TRUE(kept.wait_for(3));
  client.close();
  EXPECT_EQ(client.client_stats().packets_in, 3U);
  EXPECT_EQ(client.client_stats().dropped_inbound, 7U);
}

TEST(End, HasTheReasonOfWhatHappened) {
  const auto ended_by = [](auto peer_does) {
    TestServer server;
    server.echo().start();
    RawPeer peer(server.endpoint);
    peer.send(one_way(1, "x"));
    EXPECT_TRUE(peer.receive());
    peer_does(peer);
    const End end = server.ends.at(0);
    EXPECT_EQ(server.ends.size(), 1U);
    return end;
  };
  const auto with_byte = [](std::size_t at, int value) {
    return [at, value](RawPeer& peer) {
      auto bytes = one_way(2, "bad");
      bytes[at] = static_cast<std::byte>(value);
      peer.send(bytes);
      EXPECT_TRUE(peer.sees_end());
      peer.close();
    };
  };
  EXPECT_EQ(ended_by([](RawPeer& peer) { peer.close(); }).code, Errc::closed_by_peer);
  EXPECT_EQ(ended_by([](RawPeer& peer) { peer.shut_sending(); }).code, Errc::closed_by_peer);
  EXPECT_EQ(ended_by([](RawPeer& peer) {
              const Bytes bytes = one_way(2, "half a packet");
              peer.send(std::span(bytes).first(20));
              peer.close();
            }).code,
            Errc::truncated);
  // A Unix socket has no reset.
  const error_code reset = tested_transport() == Transport::unix_socket ? make_error_code(Errc::closed_by_peer)
                                                                        : asio::error::connection_reset;
  EXPECT_EQ(ended_by([](RawPeer& peer) { peer.reset(); }).code, reset);
  EXPECT_EQ(ended_by(with_byte(0, 2)).code, Errc::bad_version);
  EXPECT_EQ(ended_by(with_byte(1, 3)).code, Errc::bad_compression);
  EXPECT_EQ(ended_by(with_byte(2, 3)).code, Errc::bad_type);
  EXPECT_EQ(ended_by(with_byte(15, 1)).code, Errc::fragmented);
  EXPECT_EQ(ended_by(with_byte(10, 255)).code, Errc::payload_too_large);
  EXPECT_EQ(ended_by(with_byte(1, 1)).code, Errc::decompression_failed);
}

TEST(End, ByCloseHasItsTextHereAndClosedByPeerThere) {
  TestServer server;
  server.echo().start();
  Record<End> there;
  ClientTransport client;
  client.on_disconnect([there](Session& session, const Error& reason) mutable {
    there.add({session.id(), reason.code, reason.text});
  });
  client.connect(server.url());
  Session session = server.session();
  session.close("maintenance");
  session.close("again");
  EXPECT_FALSE(session.is_open());
  EXPECT_EQ(session.send("after close"), SendResult::closed);
  EXPECT_EQ(server.ends.at(0).code, Errc::closed_by_user);
  EXPECT_EQ(server.ends.at(0).text, "maintenance");
  EXPECT_EQ(there.at(0).code, Errc::closed_by_peer);
  EXPECT_EQ(server.ends.size(), 1U);
}

TEST(End, ByCloseByIdWorksOnceAndIsFalseForNobody) {
  TestServer server;
  server.echo().start();
  const auto client = connect(server);
  const SessionId id = server.came.at(0);
  EXPECT_TRUE(server.transport.close(id, "by id"));
  EXPECT_EQ(server.ends.at(0).text, "by id");
  EXPECT_FALSE(server.transport.close(id));
  EXPECT_FALSE(server.transport.close(SessionId(0)));
  EXPECT_EQ(server.transport.send(id, "gone"), SendResult::not_found);
}

TEST(End, ByCloseWritesWhatWasAcceptedBefore) {
  TestServer server;
  server.echo().start();
  RawPeer peer(server.endpoint);
  Session session = server.session();
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(session.send(std::to_string(i)), SendResult::queued);
  session.send(pattern(500'000));
  session.close();
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(peer.next().payload, std::to_string(i));
  EXPECT_TRUE(peer.next().payload == pattern(500'000));
  EXPECT_FALSE(peer.receive());
  peer.close();
  EXPECT_EQ(server.ends.at(0).code, Errc::closed_by_user);
  EXPECT_EQ(server.transport.stats().dropped_at_close, 0U);
}

TEST(End, ByCloseInAHandlerHandsOutNoFurtherMessage) {
  TestServer server;
  Record<std::string> got;
  server.transport.on_message([got](Session& session, const Message& message) mutable {
    got.add(std::string(message.text()));
    session.send("answer to " + std::string(message.text()));
    if (message.text() == "b") {
      session.close();
      EXPECT_EQ(session.send("after close"), SendResult::closed);
    }
  });
  server.start();
  RawPeer peer(server.endpoint);
  Bytes all;
  for (const char* text : {"a", "b", "c", "d"}) {
    const auto bytes = one_way(1, text);
    all.insert(all.end(), bytes.begin(), bytes.end());
  }
  peer.send(all);
  EXPECT_EQ(peer.next().payload, "answer to a");
  EXPECT_EQ(peer.next().payload, "answer to b");
  EXPECT_FALSE(peer.receive());
  peer.close();
  ASSERT_TRUE(server.ends.wait_for(1));
  EXPECT_EQ(got.all(), (std::vector<std::string>{"a", "b"}));
}

TEST(End, OfThePeersSendingSideLeavesItEveryAnswerItAskedFor) {
  TestServer server;
  std::vector<std::thread> later;
  std::mutex mutex;
  server.transport.on_message([&](Session& session, const Message& message) {
    if (message.text().starts_with("now")) {
      session.respond(message, message.payload());
      return;
    }
    const std::lock_guard lock(mutex);
    later.emplace_back([owned = message.retain()]() mutable {
      std::this_thread::sleep_for(50ms);  // the answer takes its time
      owned.respond("later");
    });
  });
  server.start();
  RawPeer peer(server.endpoint);
  for (std::uint32_t id = 1; id <= 500; ++id) peer.send(request(id, id % 100 == 0 ? "later" : "now"));
  peer.shut_sending();
  std::set<std::uint32_t> answered;
  while (const auto answer = peer.receive()) answered.insert(answer->header.message_id);
  EXPECT_EQ(answered.size(), 500U);
  EXPECT_EQ(server.ends.at(0).code, Errc::closed_by_peer);
  for (auto& thread : later) thread.join();
}

TEST(End, OfThePeersSendingSideLeavesItAnswersThatManyThreadsGiveAtOnce) {
  constexpr std::size_t threads = 4, each = 8;
  TestServer server;
  std::mutex mutex;
  std::vector<OwnedMessage> asked;
  std::atomic<bool> all_asked{false};
  server.transport.on_message([&](Session&, const Message& message) {
    const std::lock_guard lock(mutex);
    asked.push_back(message.retain());
    all_asked = asked.size() == threads * each;
  });
  server.start();
  for (int round = 0; round < 200; ++round) {
    RawPeer peer(server.endpoint);
    for (std::uint32_t id = 1; id <= threads * each; ++id) peer.send(request(id, "x"));
    peer.shut_sending();
    ASSERT_TRUE(wait_until([&] { return all_asked.load(); }));
    std::vector<std::thread> answering;
    for (std::size_t i = 0; i < threads; ++i) {
      answering.emplace_back([&, i] {
        for (std::size_t k = i * each; k < (i + 1) * each; ++k) asked[k].respond("late");
      });
    }
    for (auto& thread : answering) thread.join();
    std::set<std::uint32_t> answered;
    while (const auto answer = peer.receive()) answered.insert(answer->header.message_id);
    ASSERT_EQ(answered.size(), threads * each) << "in round " << round;
    const std::lock_guard lock(mutex);
    asked.clear();
    all_asked = false;
  }
}

TEST(End, OfThePeersSendingSideWithAnAnswerNeverGivenDoesNotHoldTheSessionForEver) {
  TestServer server({.session = {.request_timeout = 100ms, .close_timeout = 100ms}});
  Record<std::shared_ptr<OwnedMessage>> kept;
  server.transport.on_message(
      [kept](Session&, const Message& message) mutable { kept.add(std::make_shared<OwnedMessage>(message.retain())); });
  server.start();
  RawPeer peer(server.endpoint);
  peer.send(request(1, "?"));
  peer.shut_sending();
  EXPECT_FALSE(peer.receive());
  EXPECT_EQ(server.ends.at(0).code, Errc::closed_by_peer);
}

TEST(End, IsToldToOnDisconnectOnceForEveryKindOfEndAtOnce) {
  TestServer server;
  server.echo().start();
  constexpr int rounds = 20;
  for (int i = 0; i < rounds; ++i) {
    RawPeer peer(server.endpoint);
    Session session = server.session(peer);
    peer.send(std::array<std::byte, 16>{std::byte{9}});  // a bad version
    session.close();
    if (i % 2 == 0) peer.reset();
  }
  ASSERT_TRUE(server.ends.wait_for(rounds));
  server.transport.stop(1s);
  EXPECT_EQ(server.ends.size(), static_cast<std::size_t>(rounds));
  std::set<SessionId> ids;
  for (const End& end : server.ends.all()) ids.insert(end.id);
  EXPECT_EQ(ids.size(), static_cast<std::size_t>(rounds));
}

// --- handlers that fail

TEST(HandlerThatThrows, EndsOnlyItsSessionAndTellsTheErrorHook) {
  TestServer server;
  server.transport.on_message([](Session& session, const Message& message) {
    if (message.text() == "exception") throw std::runtime_error("cannot cope");
    if (message.text() == "int") throw 42;
    session.respond(message, message.payload());
  });
  server.start();
  const auto other = connect(server);
  ASSERT_TRUE(server.came.wait_for(1));
  std::size_t count = 0;
  for (const char* text : {"exception", "int"}) {
    const auto client = connect(server);
    EXPECT_EQ(request_error(*client, text), Errc::connection_lost);
    const End end = server.ends.at(count);
    EXPECT_EQ(end.code, Errc::handler_failed);
    EXPECT_EQ(server.errors.at(count).code, Errc::handler_failed);
    EXPECT_EQ(server.errors.at(count).id, end.id);
    ++count;
  }
  EXPECT_EQ(server.ends.at(0).text, "cannot cope");
  EXPECT_EQ(server.transport.stats().handler_failures, 2U);
  EXPECT_EQ(other->request("unharmed").text(), "unharmed");
}

TEST(HandlerThatThrows, LosesNoAnswerGivenBefore) {
  TestServer server;
  server.transport.on_message([](Session& session, const Message& message) {
    session.respond(message, "answered first");
    throw std::logic_error("then failed");
  });
  server.start();
  EXPECT_EQ(connect(server)->request("?").text(), "answered first");
  EXPECT_EQ(server.ends.at(0).code, Errc::handler_failed);
}

TEST(HandlerThatThrows, InOnDisconnectOrOnErrorIsCountedAndTheServerGoesOn) {
  TestServer server;
  server.echo();
  server.transport.on_disconnect([](Session&, const Error&) { throw std::runtime_error("in on_disconnect"); });
  server.transport.on_error([](const ErrorEvent&) { throw std::runtime_error("in on_error"); });
  server.start();
  connect(server)->close();
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().handler_failures == 2; }));
  EXPECT_EQ(connect(server)->request("on").text(), "on");
}

TEST(HandlerThatThrows, InTheClientEndsItsSession) {
  TestServer server;
  server.echo().start();
  Record<End> ends, errors;
  ClientTransport client;
  client.on_message([](Session&, const Message&) { throw std::runtime_error("client"); });
  client.on_disconnect([ends](Session& session, const Error& reason) mutable {
    ends.add({session.id(), reason.code, reason.text});
  });
  client.on_error([errors](const ErrorEvent& event) mutable { errors.add({event.session, event.error.code, {}}); });
  client.connect(server.url());
  client.send("come back");
  EXPECT_EQ(ends.at(0).code, Errc::handler_failed);
  EXPECT_EQ(errors.at(0).code, Errc::handler_failed);
}

// --- many sessions

TEST(Broadcast, ReachesAllAndItsCountsAddUpToTheSessions) {
  TestServer server({.session = {.outbound_bytes = 64 * 1024}});
  server.transport.on_message([](Session&, const Message&) {});
  server.start();
  std::vector<std::unique_ptr<RawPeer>> peers;
  for (int i = 0; i < 40; ++i) peers.push_back(std::make_unique<RawPeer>(server.endpoint, 4096));
  ASSERT_TRUE(server.came.wait_for(40));
  // One is full.
  Session full = server.session(*peers[0]);
  EXPECT_GT(fill(full, pattern(30'000)), 0U);
  // One is ending, and cannot yet, since it has much to write and its peer takes nothing.
  Session ending = server.session(*peers[1]);
  fill(ending, pattern(30'000));
  ending.close();
  for (const std::size_t size : {std::size_t{20'000}, std::size_t{40'000}}) {
    const auto result = server.transport.broadcast(pattern(size), {.biz_type = 9, .extension = "to all"});
    EXPECT_EQ(result.queued + result.dropped + result.refused, 40U);
    EXPECT_EQ(result.queued, 38U);
    EXPECT_EQ(result.dropped, 1U);
    EXPECT_EQ(result.refused, 1U);
    for (std::size_t i = 2; i < peers.size(); ++i) {
      const auto got = peers[i]->receive();
      ASSERT_TRUE(got);
      EXPECT_TRUE(got->payload == pattern(size));
      EXPECT_EQ(got->extension, "to all");
      EXPECT_EQ(got->header.biz_type, 9);
    }
  }
}

TEST(Broadcast, OfTooMuchIsRefusedByEach) {
  TestServer server({.session = {.max_payload = 100}});
  server.start();
  const RawPeer one(server.endpoint), two(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(2));
  const auto result = server.transport.broadcast(pattern(101));
  EXPECT_EQ(result.refused, 2U);
  EXPECT_EQ(result.queued + result.dropped, 0U);
}

TEST(Sessions, AreFoundListedAndCounted) {
  TestServer server;
  server.echo().start();
  const auto manager = server.transport.session_manager();
  EXPECT_EQ(manager.size(), 0U);
  std::vector<std::unique_ptr<ClientTransport>> clients;
  for (int i = 0; i < 5; ++i) clients.push_back(connect(server));
  ASSERT_TRUE(server.came.wait_for(5));
  EXPECT_EQ(manager.size(), 5U);
  EXPECT_EQ(server.transport.session_count(), 5U);
  std::set<SessionId> ids;
  manager.for_each([&](Session& session) { ids.insert(session.id()); });
  const auto listed = manager.ids();
  EXPECT_EQ(std::set<SessionId>(listed.begin(), listed.end()), ids);
  const auto came = server.came.all();
  EXPECT_EQ(std::set<SessionId>(came.begin(), came.end()), ids);
  EXPECT_EQ(ids.size(), 5U);
  for (const SessionId id : ids) EXPECT_EQ(manager.get(id)->id(), id);
  EXPECT_FALSE(manager.get(SessionId(0)));
  EXPECT_FALSE(manager.contains(SessionId(~0ULL)));
  std::ostringstream out;
  out << *ids.begin();
  EXPECT_EQ(out.str(), "session-" + std::to_string(ids.begin()->value()));
  const Session session = *manager.get(*ids.begin());
  const Endpoint peer = session.peer();
  EXPECT_EQ(peer.transport, tested_transport());
  clients.clear();
  ASSERT_TRUE(server.ends.wait_for(5));
  EXPECT_EQ(manager.size(), 0U);
  EXPECT_FALSE(manager.contains(session.id()));
  EXPECT_FALSE(session.is_open());
  EXPECT_EQ(session.peer(), peer);  // the handle keeps the record
}

TEST(Sessions, KeepTheApplicationsDataBetweenHandlers) {
  TestServer server;
  Record<int> last;
  server.transport.on_connect([](Session& session) { session.user_data() = 0; });
  server.transport.on_message([](Session& session, const Message& message) {
    auto& count = std::any_cast<int&>(session.user_data());
    session.respond(message, std::to_string(++count));
  });
  server.transport.on_disconnect(
      [last](Session& session, const Error&) mutable { last.add(std::any_cast<int>(session.user_data())); });
  server.start();
  auto client = connect(server);
  const auto other = connect(server);
  EXPECT_EQ(client->request("").text(), "1");
  EXPECT_EQ(client->request("").text(), "2");
  EXPECT_EQ(other->request("").text(), "1");
  client->close();
  EXPECT_EQ(last.at(0), 2);
}

TEST(Statistics, AddUpAtBothEnds) {
  TestServer server;
  server.echo().start();
  const auto client = connect(server);
  std::size_t payload_bytes = 0;
  constexpr std::uint64_t count = 100;
  for (std::uint64_t i = 0; i < count; ++i) {
    payload_bytes += i * 100;
    ASSERT_EQ(client->request(pattern(i * 100)).payload().size(), i * 100);
  }
  const std::uint64_t bytes = payload_bytes + count * wire::header_size;
  const auto end = client->stats();
  EXPECT_EQ(end.packets_out, count);
  EXPECT_EQ(end.packets_in, count);
  EXPECT_EQ(end.bytes_out, bytes);
  EXPECT_EQ(end.bytes_in, bytes);
  EXPECT_EQ(end.queued_bytes + end.queued_packets, 0U);
  EXPECT_TRUE(wait_until([&] { return server.session().stats().packets_out == count; }));
  const auto session = server.session().stats();
  EXPECT_EQ(session.packets_in, count);
  EXPECT_EQ(session.bytes_in, bytes);
  EXPECT_EQ(session.bytes_out, bytes);
  const auto stats = server.transport.stats();
  EXPECT_EQ(stats.packets_in, count);
  EXPECT_EQ(stats.packets_out, count);
  EXPECT_EQ(stats.bytes_in, bytes);
  EXPECT_EQ(stats.bytes_out, bytes);
  EXPECT_EQ(stats.sessions, 1U);
  EXPECT_EQ(stats.sessions_total, 1U);
  EXPECT_EQ(stats.requests + stats.unhandled + stats.unmatched_responses + stats.protocol_errors +
                stats.handler_failures + stats.dropped_at_close + stats.dropped_oldest + stats.sessions_refused,
            0U);
}

// --- calls that cannot be carried out

TEST(BadOptions, AreNamedByTheCallThatGetsThem) {
  const auto text_of = [](auto call) {
    std::string text;
    EXPECT_EQ(thrown(call, &text), Errc::invalid_option);
    return text;
  };
  const auto names = [](const std::string& text, const char* option) {
    EXPECT_NE(text.find(option), std::string::npos) << text;
  };
  names(text_of([] { ServerTransport({.shards = 1025}); }), "shards");
  names(text_of([] { ServerTransport({.max_sessions = 0}); }), "max_sessions");
  names(text_of([] { ServerTransport({.drain = -1ms}); }), "drain");
  names(text_of([] { ServerTransport({.executors = {asio::any_io_executor()}}); }), "executors");
  names(text_of([] { ServerTransport({.session = {.max_payload = 0}}); }), "max_payload");
  names(text_of([] { ClientTransport({.connect_timeout = -1ms}); }), "connect_timeout");
  names(text_of([] { ClientTransport({.session = {.close_timeout = 0ms}}); }), "close_timeout");
  TestServer server;
  names(text_of([&] { server.transport.listen(tcp("127.0.0.1:0"), {.backlog = 0}); }), "backlog");
  names(
      text_of([&] { server.transport.listen(tcp("127.0.0.1:0"), {.session = SessionOptions{.outbound_packets = 0}}); }),
      "outbound_packets");
  EXPECT_TRUE(server.transport.endpoints().empty());
  server.start();
  const auto client = connect(server);
  EXPECT_EQ(request_error(*client, "x", {.timeout = -1ms}), Errc::invalid_option);
}

TEST(WrongState, IsSaidOfHandlersAndStartsThatComeTooLate) {
  TestServer server;
  server.echo().start();
  EXPECT_EQ(thrown([&] { server.transport.start(); }), Errc::wrong_state);
  EXPECT_EQ(thrown([&] { server.transport.on_message({}); }), Errc::wrong_state);
  EXPECT_EQ(thrown([&] { server.transport.on_connect([](Session&) {}); }), Errc::wrong_state);
  EXPECT_EQ(thrown([&] { server.transport.on_disconnect({}); }), Errc::wrong_state);
  EXPECT_EQ(thrown([&] { server.transport.on_error({}); }), Errc::wrong_state);
  const auto client = connect(server);
  EXPECT_EQ(thrown([&] { client->on_message({}); }), Errc::wrong_state);
  server.transport.stop(1s);
  EXPECT_EQ(thrown([&] { server.transport.listen(tcp("127.0.0.1:0")); }), Errc::wrong_state);
}

TEST(UnknownSession, IsNotFoundByEveryCall) {
  TestServer server;
  server.start();
  const SessionId nobody(~0ULL);
  EXPECT_EQ(server.transport.send(nobody, "x"), SendResult::not_found);
  Record<error_code> results;
  server.transport.async_send(nobody, "x", {}, [results](error_code code) mutable { results.add(code); });
  EXPECT_EQ(results.at(0), Errc::not_found);
  server.transport.async_request(nobody, "x", {}, [results](error_code code, Reply) mutable { results.add(code); });
  EXPECT_EQ(results.at(1), Errc::not_found);
  EXPECT_FALSE(server.transport.close(nobody));
}

}  // namespace
}  // namespace msgtrans::test
