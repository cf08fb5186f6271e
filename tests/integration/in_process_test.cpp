// SPDX-License-Identifier: Apache-2.0
#include "in_process.hpp"

#include "support/fixture.hpp"

#include <boost/asio/io_context.hpp>

namespace msgtrans::test {
namespace {

const error_code in_use(EADDRINUSE, boost::system::system_category());
const error_code refused(ECONNREFUSED, boost::system::system_category());
const error_code reset(ECONNRESET, boost::system::system_category());

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
  server.endpoint = server.transport.listen(in_process(unused_name()));
  server.transport.start();
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
  server.endpoint = server.transport.listen(in_process(unused_name()));
  server.transport.start();
  ClientTransport client;
  client.connect(server.url());
  EXPECT_EQ(client.request("x").text(), "x");
  EXPECT_EQ(server.session().peer().url(), server.url() + "#1");
  EXPECT_EQ(client.session()->peer(), server.endpoint);
  EXPECT_FALSE(client.session()->peer_credentials());
}

TEST(InProcess, BoundsWhatIsUnderWayToAPeerThatDoesNotRead) {
  TestServer server({.session = {.outbound_bytes = 100'000}});
  server.endpoint = server.transport.listen(in_process(unused_name()));
  server.transport.start();
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
  server.endpoint = server.transport.listen(in_process(unused_name()));
  server.transport.start();
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

TEST(InProcess, LargeBroadcastIsSharedByAllItsSessionsAndArrivesWhole) {
  TestServer server({.session = {.outbound_bytes = 8'000'000}});
  server.endpoint = server.transport.listen(in_process(unused_name()));
  server.transport.start();
  std::vector<std::unique_ptr<RawPeer>> peers;
  for (int i = 0; i < 5; ++i) peers.push_back(std::make_unique<RawPeer>(server.endpoint));
  (void)server.came.at(4);
  const auto payload = pattern(2'000'000);
  EXPECT_EQ(server.transport.broadcast(payload).queued, 5U);
  for (auto& peer : peers) EXPECT_EQ(peer->next().payload, payload);
}

}  // namespace
}  // namespace msgtrans::test
