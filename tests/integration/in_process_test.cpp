// SPDX-License-Identifier: Apache-2.0
#include "in_process.hpp"

#include "support/fixture.hpp"

#include <boost/asio/awaitable.hpp>
#include <boost/asio/io_context.hpp>
#include <deque>
#include <msgtrans/session/session_actor.hpp>

namespace msgtrans::test {
namespace {

const error_code in_use(EADDRINUSE, boost::system::system_category());
const error_code refused(ECONNREFUSED, boost::system::system_category());
const error_code reset(ECONNRESET, boost::system::system_category());

void start(TestServer& server) {
  server.endpoint = server.transport.listen(in_process(unused_name()));
  server.transport.start();
}

TEST(InProcess, NameThatIsTakenCannotBeListenedOnUntilItIsFree) {
  const auto name = in_process(unused_name());
  std::string text;
  {
    TestServer first, second;
    first.transport.listen(name);
    EXPECT_EQ(thrown([&] { second.transport.listen(name); }, &text), in_use);
    EXPECT_NE(text.find(name.url()), std::string::npos) << text;
  }
  TestServer third;
  EXPECT_EQ(third.transport.listen(name), name);
}

TEST(InProcess, NameOfNobodyRefusesAndSaysWhich) {
  ClientTransport client;
  Error error;
  client.connect("inproc://nobody-is-here", error);
  EXPECT_EQ(error.code, refused);
  EXPECT_NE(error.text.find("inproc://nobody-is-here"), std::string::npos) << error.text;
}

TEST(InProcess, NameIsFreeAsSoonAsTheServerStops) {
  TestServer server;
  server.echo();
  start(server);
  ClientTransport client;
  client.connect(server.url());
  server.transport.stop(5s);
  ClientTransport late;
  Error error;
  late.connect(server.url(), error);
  EXPECT_EQ(error.code, refused);
}

TEST(InProcess, ClientsOfAServerThatNeverRanSeeTheEnd) {
  ClientTransport client;
  Record<End> ends;
  client.on_disconnect([ends](Session& session, const Error& reason) mutable {
    ends.add({session.id(), reason.code, reason.text});
  });
  {
    TestServer server;
    server.endpoint = server.transport.listen(in_process(unused_name()));
    client.connect(server.url());
    EXPECT_TRUE(client.is_connected());
  }
  EXPECT_TRUE(ends.at(0).code == reset || ends.at(0).code == Errc::closed_by_peer) << ends.at(0).code.message();
}

TEST(InProcess, PeersAreNamedByServerAndNumber) {
  TestServer server;
  server.echo();
  start(server);
  ClientTransport client;
  client.connect(server.url());
  EXPECT_EQ(client.request("x").text(), "x");
  EXPECT_EQ(server.session().peer().url(), server.url() + "#1");
  EXPECT_EQ(client.session()->peer(), server.endpoint);
  EXPECT_FALSE(client.session()->peer_credentials());
}

TEST(InProcess, BoundsWhatIsUnderWayToAPeerThatDoesNotRead) {
  TestServer server({.session = {.outbound_bytes = 100'000}});
  start(server);
  RawPeer peer(server.endpoint);
  Session session = server.session();
  const std::size_t taken = fill(session, std::string(1000, 'x'));
  const std::size_t bytes = taken * 1016;
  EXPECT_GE(bytes, detail::Pipe::capacity);
  EXPECT_LE(bytes, detail::Pipe::capacity + 65'536 + 100'000);
  // And nothing of it is lost.
  std::size_t got = 0;
  for (; got < taken; ++got) EXPECT_EQ(peer.next().payload.size(), 1000U);
}

TEST(InProcess, BothEndsMayLiveOnOneThread) {
  detail::asio::io_context context(1);
  TestServer server({.executors = {context.get_executor()}});
  server.echo();
  start(server);
  ClientTransport client({.executor = context.get_executor()});
  int answered = 0;
  client.async_connect(server.url(), [&](error_code code) {
    ASSERT_FALSE(code) << code.message();
    for (int i = 0; i < 1000; ++i) {
      client.async_request(pattern(100), {}, [&](error_code error, const Reply& reply) {
        answered += !error && reply.text() == pattern(100) ? 1 : 0;
        if (answered != 1000) return;
        client.close();
        server.transport.async_stop(1s, [](const StopReport& report) { EXPECT_TRUE(report.clean()); });
      });
    }
  });
  context.run_for(patience);
  EXPECT_EQ(answered, 1000);
  EXPECT_EQ(server.ends.size(), 1U);
}

detail::asio::awaitable<void> answer_with_much(SessionActor actor) {
  const std::string much(2 * 1024 * 1024, 'x');
  for (;;) {
    auto message = co_await actor.receive();
    if (!message) co_return;
    message->respond(much);
  }
}

TEST(InProcess, AnswersOverTheWholeBudgetDoNotMakeASessionDeaf) {
  TestServer server({.shards = 1});
  server.transport.on_session(answer_with_much);
  start(server);
  ClientTransport client;
  client.connect(server.url());
  std::deque<Answer> answers;
  for (int i = 0; i < 200; ++i) {
    while (answers.size() >= 4) {
      const auto [code, reply] = in_time(answers.front());
      ASSERT_FALSE(code) << code.message();
      ASSERT_EQ(reply.payload().size(), 2U * 1024 * 1024);
      answers.pop_front();
    }
    answers.push_back(ask(client, "more", {.timeout = patience}));
  }
  for (auto& answer : answers) EXPECT_FALSE(in_time(answer).first);
}

TEST(InProcess, FewBytesInLargeBlocksDoNotPileUp) {
  const auto pipe = std::make_shared<detail::Pipe>();
  std::size_t bytes = 0;
  bool exact = false;
  std::size_t written = 0;
  while (pipe->room(bytes, exact) == Connection::Status::done) {
    protocol::OutboundBlock block{wire::Buffer(64 * 1024), {}, 0, 600};
    std::fill_n(block.own.data(), 600, std::byte{1});
    pipe->push(block);
    EXPECT_TRUE(block.own.capacity() != 0 || written == 0) << "it was kept";
    written += 600;
  }
  std::size_t held = 0, read = 0;
  bool more = true;
  while (more) {
    protocol::OutboundBlock block;
    ASSERT_EQ(pipe->take(block, more), Connection::Status::done);
    held += block.own.capacity();
    read += block.bytes().size();
  }
  EXPECT_EQ(read, written);
  EXPECT_LE(held, 2 * detail::Pipe::capacity);
}

TEST(InProcess, LargeBroadcastIsSharedByAllItsSessionsAndArrivesWhole) {
  TestServer server({.session = {.outbound_bytes = 8'000'000}});
  start(server);
  std::vector<std::unique_ptr<RawPeer>> peers;
  for (int i = 0; i < 5; ++i) peers.push_back(std::make_unique<RawPeer>(server.endpoint));
  (void)server.came.at(4);
  const auto payload = pattern(2'000'000);
  EXPECT_EQ(server.transport.broadcast(payload).queued, 5U);
  for (auto& peer : peers) EXPECT_EQ(peer->next().payload, payload);
}

}  // namespace
}  // namespace msgtrans::test
