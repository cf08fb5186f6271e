// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <atomic>
#include <boost/asio/awaitable.hpp>
#include <deque>
#include <msgtrans/testing/simulation.hpp>
#include <stdexcept>

namespace msgtrans::test {
namespace {

using testing::Simulation;

/// A server that answers, and a client, in one simulation; interceptors are added before `start`.
class World {
 public:
  explicit World(const SessionOptions& options = {})
      : server({.executors = {simulation.executor()}, .session = options}),
        client({.executor = simulation.executor(), .session = options}) {
    server.on_message([this](Session& session, const Message& message) {
      got.emplace_back(message.text());
      biz_types.push_back(message.biz_type());
      extensions.emplace_back(BytesView(message.extension()).text());
      if (message.is_request()) responded.push_back(session.respond(message, "answer", "trace"));
    });
    server.on_error([this](const ErrorEvent& event) { errors.push_back(event); });
    server.on_connect([this](Session& session) { sessions.push_back(session); });
    client.on_message([this](Session&, const Message& message) { client_got.emplace_back(message.text()); });
    client.on_error([this](const ErrorEvent& event) { errors.push_back(event); });
  }
  ~World() {
    client.close();
    bool stopped = false;
    server.async_stop(1s, [&stopped](const StopReport&) { stopped = true; });
    EXPECT_TRUE(simulation.run_until([&] { return stopped; }, 1h));
    sessions.clear();
  }

  World& start() {
    const Endpoint endpoint = server.listen(in_process(unused_name()));
    server.start();
    bool done = false;
    client.async_connect(endpoint.url(), [&done](error_code code) {
      EXPECT_FALSE(code) << code.message();
      done = true;
    });
    EXPECT_TRUE(simulation.run_until([&] { return done; }, 20s));
    simulation.run();
    return *this;
  }
  /// Code and text of the answer.
  template <class To>
  std::pair<error_code, std::string> ask(To& to, std::string_view text) {
    std::optional<std::pair<error_code, std::string>> answer;
    to.async_request(text, RequestOptions{.timeout = 5s}, [&answer](error_code code, const Reply& reply) {
      answer.emplace(code, std::string(reply.text()) + std::string(BytesView(reply.extension()).text()));
    });
    EXPECT_TRUE(simulation.run_until([&] { return answer.has_value(); }, 1min));
    return answer.value_or(std::pair<error_code, std::string>{});
  }

  Simulation simulation;
  std::vector<std::string> got, extensions, client_got;
  std::vector<unsigned> biz_types;
  std::vector<SendResult> responded;
  std::vector<ErrorEvent> errors;
  std::deque<Session> sessions;
  ServerTransport server;
  ClientTransport client;
};

using Answered = std::pair<error_code, std::string>;

// --- in

TEST(InboundInterceptors, SeeEveryMessageInTheOrderTheyWereAdded) {
  World world;
  std::vector<std::string> seen;
  world.server.intercept_inbound([&seen](InterceptedMessage& message) {
    EXPECT_NE(message.session(), nullptr);
    EXPECT_EQ(message.is_one_way() + message.is_request() + message.is_response(), 1);
    const char* const kind = message.is_one_way() ? "one-way " : message.is_request() ? "request " : "response ";
    seen.push_back("first " + (kind + std::string(message.text())));
  });
  world.server.intercept_inbound([&seen](InterceptedMessage& message) {
    seen.push_back("second " + std::string(message.text()));
    return Verdict::pass;
  });
  world.client.on_message([](Session& session, const Message& message) {
    if (message.is_request()) session.respond(message, "from the client");
  });
  world.start();
  world.client.send("a");
  EXPECT_EQ(world.ask(world.client, "b"), Answered({}, "answertrace"));
  EXPECT_EQ(world.ask(world.sessions.at(0), "c"), Answered({}, "from the client"));
  EXPECT_EQ(seen, (std::vector<std::string>{"first one-way a", "second a", "first request b", "second b",
                                            "first response from the client", "second from the client"}));
  EXPECT_EQ(world.got, (std::vector<std::string>{"a", "b"}));
}

TEST(InboundInterceptors, Rewrite) {
  World world;
  world.server.intercept_inbound([](InterceptedMessage& message) {
    if (message.is_response()) return message.replace_payload("rewritten answer");
    message.replace_payload(std::string(message.text()) + ", once rewritten");
    // With a part of itself.
    message.replace_payload(BytesView(message.payload()).text().substr(2));
    message.replace_extension("stamp");
    message.set_biz_type(7);
  });
  world.server.intercept_inbound([](InterceptedMessage& message) {
    if (message.is_response()) return;
    EXPECT_EQ(message.text(), "llo, once rewritten");
    EXPECT_EQ(BytesView(message.extension()).text(), "stamp");
    EXPECT_EQ(message.biz_type(), 7U);
  });
  world.client.on_message([](Session& session, const Message& message) { session.respond(message, "x"); });
  world.start();
  world.client.send("hello", {.biz_type = 1, .extension = "route"});
  world.simulation.run();
  EXPECT_EQ(world.got, std::vector<std::string>{"llo, once rewritten"});
  EXPECT_EQ(world.extensions, std::vector<std::string>{"stamp"});
  EXPECT_EQ(world.biz_types, std::vector<unsigned>{7});
  EXPECT_EQ(world.ask(world.sessions.at(0), "?").second, "rewritten answer");
}

TEST(InboundInterceptors, RejectAndItIsCounted) {
  World world;
  int second = 0;
  world.server.intercept_inbound(
      [](InterceptedMessage& message) { return message.text() == "bad" ? Verdict::reject : Verdict::pass; });
  world.server.intercept_inbound([&second](InterceptedMessage&) { ++second; });
  world.start();
  world.client.send("bad");
  world.client.send("good");
  EXPECT_EQ(world.ask(world.client, "bad").first, Errc::request_timeout);
  EXPECT_EQ(world.got, std::vector<std::string>{"good"});
  EXPECT_EQ(second, 1);
  const auto stats = world.server.stats();
  EXPECT_EQ(stats.rejected_inbound, 2U);
  EXPECT_EQ(stats.interceptor_failures, 0U);
  EXPECT_EQ(stats.packets_in, 3U);
  EXPECT_EQ(world.errors.size(), 0U);
}

TEST(InboundInterceptors, AnswerInsteadOfTheHandler) {
  World world;
  world.server.intercept_inbound([](InterceptedMessage& message) {
    if (!message.is_request()) {
      EXPECT_EQ(message.respond("no"), SendResult::not_found);
      return;
    }
    EXPECT_EQ(message.respond("not for you"), SendResult::queued);
    EXPECT_EQ(message.respond("twice"), SendResult::not_found);
  });
  world.start();
  world.client.send("hello");
  EXPECT_EQ(world.ask(world.client, "may I?"), Answered({}, "not for you"));
  EXPECT_EQ(world.got, std::vector<std::string>{"hello"});
  EXPECT_EQ(world.server.stats().rejected_inbound, 1U);
}

TEST(InboundInterceptors, ThatThrowRejectThatMessageOnly) {
  World world;
  world.server.intercept_inbound([](InterceptedMessage& message) {
    if (message.text() == "bad") throw std::runtime_error("cannot read it");
    if (message.text() == "worse") throw 42;
  });
  world.start();
  for (const char* text : {"bad", "worse", "good"}) world.client.send(text);
  world.simulation.run();
  EXPECT_EQ(world.got, std::vector<std::string>{"good"});
  ASSERT_EQ(world.errors.size(), 2U);
  EXPECT_EQ(world.errors[0].error.code, Errc::handler_failed);
  EXPECT_EQ(world.errors[0].error.text, "cannot read it");
  EXPECT_EQ(world.errors[0].session, world.sessions.at(0).id());
  EXPECT_TRUE(world.errors[0].exception);
  EXPECT_EQ(world.server.stats().interceptor_failures, 2U);
  EXPECT_EQ(world.server.stats().rejected_inbound, 2U);
  EXPECT_TRUE(world.client.is_connected());
}

TEST(InboundInterceptors, SeeTheFirstMessageBeforeOnConnect) {
  struct Login {
    static boost::asio::awaitable<Admission> run(Session, OwnedMessage first) {
      first.respond(first.text());
      co_return Admission::accept();
    }
  };
  World world;
  world.server.on_connect([](Session& session, OwnedMessage first) { return Login::run(session, std::move(first)); });
  world.server.intercept_inbound([](InterceptedMessage& message) { message.replace_payload("decoded"); });
  world.start();
  EXPECT_EQ(world.ask(world.client, "encoded"), Answered({}, "decoded"));
}

// --- out

TEST(OutboundInterceptors, RewriteWhateverIsSent) {
  World world;
  std::vector<std::string> kinds;
  world.server.intercept_outbound([&kinds](InterceptedMessage& message) {
    EXPECT_NE(message.session(), nullptr);
    kinds.emplace_back(message.is_one_way() ? "one-way" : message.is_request() ? "request" : "response");
    message.replace_payload("<" + std::string(message.text()) + ">");
    if (message.is_response()) message.replace_extension("!");
  });
  std::vector<std::string> asked;
  world.client.on_message([&](Session& session, const Message& message) {
    asked.emplace_back(message.text());
    if (message.is_request()) session.respond(message, "yes");
  });
  world.start();
  auto& session = world.sessions.at(0);
  EXPECT_EQ(session.send("sent"), SendResult::queued);
  session.async_send("waited", {}, [](error_code code) { EXPECT_FALSE(code); });
  EXPECT_EQ(world.ask(session, "asked").second, "yes");
  EXPECT_EQ(world.server.send(session.id(), "by id"), SendResult::queued);
  EXPECT_EQ(world.ask(world.client, "?"), Answered({}, "<answer>!"));
  EXPECT_EQ(asked, (std::vector<std::string>{"<sent>", "<waited>", "<asked>", "<by id>"}));
  EXPECT_EQ(kinds, (std::vector<std::string>{"one-way", "one-way", "request", "one-way", "response"}));
}

TEST(OutboundInterceptors, RejectAndTheSenderIsTold) {
  World world;
  bool rejects = true;
  world.server.intercept_outbound(
      [&rejects](InterceptedMessage&) { return rejects ? Verdict::reject : Verdict::pass; });
  std::optional<OwnedMessage> kept;
  world.server.on_message([&](Session&, const Message& message) { kept.emplace(message.retain()); });
  world.start();
  auto& session = world.sessions.at(0);
  EXPECT_EQ(session.send("x"), SendResult::rejected);
  error_code sent;
  session.async_send("x", {}, [&sent](error_code code) { sent = code; });
  EXPECT_EQ(world.ask(session, "x").first, Errc::rejected);
  EXPECT_EQ(sent, Errc::rejected);
  std::string answer;
  world.client.async_request("?", [&](error_code, const Reply& reply) { answer = reply.text(); });
  world.simulation.run();
  ASSERT_TRUE(kept);
  EXPECT_EQ(kept->respond("no"), SendResult::rejected);
  EXPECT_EQ(world.server.stats().rejected_outbound, 4U);
  EXPECT_EQ(world.client_got.size(), 0U);
  rejects = false;
  EXPECT_EQ(kept->respond("yes"), SendResult::queued) << "a rejected answer may be given again";
  world.simulation.run();
  EXPECT_EQ(answer, "yes");
  EXPECT_EQ(to_string(SendResult::rejected), std::string("rejected"));
  EXPECT_EQ(make_error_code(SendResult::rejected), Errc::rejected);
}

/// What goes to many, by `send(world)`: to the one there is.
template <class Send>
void expect_shown_once(World& world, Send send) {
  int shown = 0;
  bool rejects = false;
  world.server.intercept_outbound([&](InterceptedMessage& message) {
    ++shown;
    EXPECT_EQ(message.session(), nullptr);
    message.replace_payload("to all of you");
    return rejects ? Verdict::reject : Verdict::pass;
  });
  world.start();
  EXPECT_EQ(send(world).queued, 1U);
  EXPECT_EQ(shown, 1);
  world.simulation.run();
  EXPECT_EQ(world.client_got, std::vector<std::string>{"to all of you"});
  rejects = true;
  const BroadcastResult result = send(world);
  EXPECT_EQ(result.queued + result.dropped + result.refused, 0U);
  EXPECT_EQ(shown, 2);
  EXPECT_EQ(world.server.stats().rejected_outbound, 1U);
}

TEST(OutboundInterceptors, SeeABroadcastOnceAndWithoutASession) {
  World world;
  expect_shown_once(world, [](World& there) { return there.server.broadcast("to all"); });
}

TEST(OutboundInterceptors, SeeWhatAGroupIsSentOnceAndWithoutASession) {
  World world;
  expect_shown_once(world, [](World& there) {
    const auto groups = there.server.groups();
    groups.join("room", there.sessions.at(0).id());
    EXPECT_EQ(groups.send("nobody's", "to all").queued, 0U);
    return groups.send("room", "to all");
  });
}

/// An extension header that an interceptor has put in the place of the one that tells of a timeout is left alone.
TEST(OutboundInterceptors, MayReplaceTheExtensionHeaderOfARequestThatTellsItsTimeout) {
  World world;
  world.server.intercept_outbound([](InterceptedMessage& message) { message.replace_extension("mine"); });
  world.start();
  error_code told = Errc::would_block;
  world.sessions.at(0).async_request("?", {.timeout = std::chrono::milliseconds(100), .tell_timeout = true},
                                     [&](error_code code, const Reply&) { told = code; });
  world.simulation.advance(std::chrono::seconds(1));
  EXPECT_NE(told, Errc::would_block);
}

TEST(OutboundInterceptors, ThatThrowRejectAndAreReported) {
  World world;
  world.server.intercept_outbound([](InterceptedMessage&) { throw std::runtime_error("no key"); });
  world.start();
  EXPECT_EQ(world.sessions.at(0).send("x"), SendResult::rejected);
  world.simulation.run();
  ASSERT_EQ(world.errors.size(), 1U);
  EXPECT_EQ(world.errors[0].error.text, "no key");
  EXPECT_EQ(world.errors[0].session, world.sessions.at(0).id());
  EXPECT_EQ(world.server.stats().interceptor_failures, 1U);
  EXPECT_TRUE(world.client.is_connected());
}

TEST(OutboundInterceptors, DoNotSeeWhatInterceptorsSend) {
  World world;
  int shown = 0;
  world.server.intercept_outbound([&shown](InterceptedMessage& message) {
    ++shown;
    EXPECT_EQ(message.session()->send("copy"), SendResult::queued);
  });
  world.start();
  world.sessions.at(0).send("original");
  world.simulation.run();
  EXPECT_EQ(shown, 1);
  EXPECT_EQ(world.client_got, (std::vector<std::string>{"copy", "original"}));
}

TEST(OutboundInterceptors, SeeAndMakeWhatIsCompressedAfterwards) {
  World world({.compression = {.codec = Compression::zlib, .threshold = 64}});
  world.server.intercept_outbound([](InterceptedMessage& message) {
    EXPECT_EQ(message.payload().size(), 10U);
    message.replace_payload(std::string(10'000, 'x'));
  });
  world.client.intercept_inbound([](InterceptedMessage& message) {
    EXPECT_EQ(message.payload().size(), 10'000U);
    message.replace_payload("unpacked");
  });
  world.start();
  world.sessions.at(0).send("ten bytes!");
  world.simulation.run();
  EXPECT_EQ(world.client_got, std::vector<std::string>{"unpacked"});
  EXPECT_EQ(world.server.stats().compressed_packets, 1U);
}

TEST(OutboundInterceptors, RunOnTheThreadThatSends) {
  TestServer server;
  std::atomic<std::thread::id> ran_on{};
  server.transport.intercept_outbound([&ran_on](InterceptedMessage&) { ran_on = std::this_thread::get_id(); });
  server.endpoint = server.transport.listen(tcp("127.0.0.1:0"));
  server.transport.start();
  RawPeer peer(server.endpoint);
  EXPECT_EQ(server.session().send("x"), SendResult::queued);
  EXPECT_EQ(ran_on.load(), std::this_thread::get_id());
  EXPECT_EQ(peer.next().payload, "x");
}

TEST(OutboundInterceptors, OfAnEndedSessionAreNotAsked) {
  World world;
  int shown = 0;
  world.server.intercept_outbound([&shown](InterceptedMessage&) { ++shown; });
  world.start();
  world.client.close();
  world.simulation.advance(2s);
  EXPECT_EQ(world.sessions.at(0).send("x"), SendResult::closed);
  EXPECT_EQ(shown, 0);
}

// --- of a client

TEST(ClientInterceptors, SeeBothDirections) {
  World world;
  std::vector<std::string> seen;
  world.client.intercept_outbound([&seen](InterceptedMessage& message) {
    seen.push_back("out " + std::string(message.text()));
    return message.text() == "secret" ? Verdict::reject : Verdict::pass;
  });
  world.client.intercept_inbound([&seen](InterceptedMessage& message) {
    seen.push_back("in " + std::string(message.text()));
    message.replace_payload("seen");
  });
  world.start();
  EXPECT_EQ(world.client.send("secret"), SendResult::rejected);
  EXPECT_EQ(world.ask(world.client, "?"), Answered({}, "seentrace"));
  world.sessions.at(0).send("news");
  world.simulation.run();
  EXPECT_EQ(world.client_got, std::vector<std::string>{"seen"});
  EXPECT_EQ(seen, (std::vector<std::string>{"out secret", "out ?", "in answer", "in news"}));
}

TEST(Interceptors, AreAddedBeforeTheStart) {
  World world;
  world.start();
  const auto f = [](InterceptedMessage&) {};
  EXPECT_EQ(thrown([&] { world.server.intercept_inbound(f); }), Errc::wrong_state);
  EXPECT_EQ(thrown([&] { world.server.intercept_outbound(f); }), Errc::wrong_state);
  EXPECT_EQ(thrown([&] { world.client.intercept_inbound(f); }), Errc::wrong_state);
}

}  // namespace
}  // namespace msgtrans::test
