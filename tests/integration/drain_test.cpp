// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <deque>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <map>
#include <msgtrans/testing/simulation.hpp>
#include <set>
#include <sys/stat.h>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using testing::Simulation;

// --- of a session, in simulated time

/// A server and clients in one simulation. Requests are echoed at once, unless their text is "later": those are kept.
class SessionDrain : public ::testing::Test {
 protected:
  explicit SessionDrain(std::uint64_t seed = 1) : simulation(seed) {
    server.emplace(ServerOptions{.executors = {simulation.executor()}, .session = {.first_packet_timeout = 0ms}});
    server->on_connect([this](Session& session) { sessions.push_back(session); });
    server->on_message([this](Session& session, const Message& message) {
      if (message.text() == "later") {
        kept.push_back(message.retain());
      } else if (message.is_request()) {
        session.respond(message, message.payload());
      }
    });
    server->on_disconnect([this](Session& session, const Error& reason) {
      ends.push_back({session.id(), reason.code, reason.text});
    });
    server->listen(in_process(name));
    server->start();
  }
  ~SessionDrain() override { kept.clear(); }

  ClientTransport& connect(const std::string& to) {
    auto& client = clients.emplace_back(
        ClientOptions{.executor = simulation.executor(), .session = {.first_packet_timeout = 0ms}});
    client.on_message([](Session& session, const Message& message) {
      if (message.is_request() && message.text() != "never") session.respond(message, "from the client");
    });
    error_code result = Errc::no_answer;
    client.async_connect("inproc://" + to, [&](error_code code) { result = code; });
    EXPECT_TRUE(simulation.run_until([&] { return result != Errc::no_answer; }, 20s));
    EXPECT_FALSE(result) << result.message();
    return client;
  }
  ClientTransport& connect() { return connect(name); }

  struct Asked {
    bool done = false;
    error_code code;
    std::string text;
  };
  template <class To>
  std::shared_ptr<Asked> ask(To& to, std::string_view text, std::chrono::milliseconds timeout = 0ms) {
    auto asked = std::make_shared<Asked>();
    to.async_request(text, RequestOptions{.timeout = timeout}, [asked](error_code code, const Reply& reply) {
      *asked = {true, code, std::string(reply.text())};
    });
    simulation.run();
    return asked;
  }

  Simulation simulation;
  std::string name = unused_name();
  std::vector<Session> sessions;
  std::vector<OwnedMessage> kept;
  std::vector<End> ends;
  std::optional<ServerTransport> server;
  std::deque<ClientTransport> clients;
};

TEST_F(SessionDrain, ThatOwesNothingClosesItAtOnceWithTheReason) {
  auto& client = connect();
  sessions.at(0).drain({.reason = "moving house"});
  simulation.run();
  ASSERT_EQ(ends.size(), 1U);
  EXPECT_EQ(ends[0].code, Errc::stopping);
  EXPECT_EQ(ends[0].text, "moving house");
  EXPECT_FALSE(client.is_connected());
}

TEST_F(SessionDrain, LeavesTheOthersAlone) {
  connect();
  auto& other = connect();
  sessions.at(0).drain();
  simulation.advance(1h);
  EXPECT_EQ(ends.size(), 1U);
  EXPECT_EQ(ask(other, "still there?")->text, "still there?");
}

TEST_F(SessionDrain, AnswersWhatItWasAskedAndIsStillAsked) {
  auto& client = connect();
  const auto first = ask(client, "later");
  sessions.at(0).drain({.within = 60s});
  simulation.advance(10s);
  EXPECT_EQ(ends.size(), 0U);
  EXPECT_EQ(ask(client, "and this?")->text, "and this?");
  const auto second = ask(client, "later");
  ASSERT_EQ(kept.size(), 2U);
  EXPECT_EQ(kept[0].respond("the first"), SendResult::queued);
  simulation.advance(10s);
  EXPECT_EQ(first->text, "the first");
  EXPECT_EQ(ends.size(), 0U);
  EXPECT_EQ(kept[1].respond("the second"), SendResult::queued);
  simulation.run();
  EXPECT_EQ(second->text, "the second");
  ASSERT_EQ(ends.size(), 1U);
  EXPECT_EQ(ends[0].code, Errc::stopping);
}

TEST_F(SessionDrain, GetsWhatItAskedFor) {
  connect();
  simulation.set_faults({.least_delay = 3s, .most_delay = 3s});
  const auto answer = ask(sessions.at(0), "who are you?");
  sessions.at(0).drain({.within = 60s});
  simulation.advance(5s);
  EXPECT_FALSE(answer->done);
  EXPECT_EQ(ends.size(), 0U);
  simulation.advance(2s);
  EXPECT_EQ(answer->text, "from the client");
  EXPECT_EQ(ends.size(), 1U);
}

TEST_F(SessionDrain, CutsAtTheEndOfItsTime) {
  auto& client = connect();
  const auto asked = ask(client, "later");
  sessions.at(0).drain({.within = 7s});
  simulation.advance(6900ms);
  EXPECT_EQ(ends.size(), 0U);
  simulation.advance(200ms);
  ASSERT_EQ(ends.size(), 1U);
  EXPECT_EQ(ends[0].code, Errc::drain_expired);
  EXPECT_EQ(asked->code, Errc::connection_lost);
}

TEST_F(SessionDrain, WithoutTimeCutsAtOnce) {
  connect();
  sessions.at(0).drain({.within = 0ms});
  simulation.run();
  ASSERT_EQ(ends.size(), 1U);
  EXPECT_EQ(ends[0].code, Errc::drain_expired);
}

TEST_F(SessionDrain, AgainEndsAtTheEarlierTime) {
  auto& client = connect();
  ask(client, "later");
  sessions.at(0).drain({.within = 5s});
  sessions.at(0).drain({.within = 50s});
  simulation.advance(5100ms);
  EXPECT_EQ(ends.size(), 1U);
}

TEST_F(SessionDrain, WithQuietWaitsUntilThePeerIsQuiet) {
  auto& client = connect();
  sessions.at(0).drain({.within = 60s, .quiet = 2s});
  for (int i = 0; i < 10; ++i) {
    simulation.advance(1900ms);
    EXPECT_EQ(ask(client, "again")->text, "again") << i;
  }
  EXPECT_EQ(ends.size(), 0U);
  simulation.advance(1900ms);
  EXPECT_EQ(ends.size(), 0U);
  simulation.advance(200ms);
  ASSERT_EQ(ends.size(), 1U);
  EXPECT_EQ(ends[0].code, Errc::stopping);
}

TEST_F(SessionDrain, WithQuietDoesNotWaitForAPeerThatHangsUp) {
  auto& client = connect();
  sessions.at(0).drain({.within = 60s, .quiet = 20s});
  ask(client, "x");
  client.close();
  simulation.advance(1500ms);
  ASSERT_EQ(ends.size(), 1U);
  EXPECT_EQ(ends[0].code, Errc::closed_by_peer);
}

TEST_F(SessionDrain, WithQuietStillEndsInTime) {
  auto& client = connect();
  sessions.at(0).drain({.within = 10s, .quiet = 2s});
  for (int i = 0; i < 9; ++i) {
    simulation.advance(1s);
    EXPECT_EQ(ask(client, "again")->text, "again") << i;
  }
  EXPECT_EQ(ends.size(), 0U);
  simulation.advance(1100ms);
  ASSERT_EQ(ends.size(), 1U);
  EXPECT_EQ(ends[0].code, Errc::drain_expired);
}

TEST_F(SessionDrain, ByItsIdSaysWhetherThereIsOne) {
  connect();
  const SessionId id = sessions.at(0).id();
  EXPECT_TRUE(server->drain(id));
  simulation.run();
  EXPECT_EQ(ends.size(), 1U);
  EXPECT_FALSE(server->drain(id));
}

TEST_F(SessionDrain, RefusesOptionsThatMakeNoSense) {
  connect();
  std::string text;
  EXPECT_EQ(thrown([&] { sessions.at(0).drain({.within = -1ms}); }, &text), Errc::invalid_option);
  EXPECT_NE(text.find("within is -1"), std::string::npos) << text;
  EXPECT_EQ(thrown([&] { server->drain(sessions.at(0).id(), {.within = 1s, .quiet = 1s}); }, &text),
            Errc::invalid_option);
  EXPECT_NE(text.find("quiet is 1000"), std::string::npos) << text;
  EXPECT_EQ(thrown([&] { server->drain_listener(in_process(name), {.quiet = -1ms}); }), Errc::invalid_option);
  EXPECT_EQ(thrown([&] { server->stop(DrainOptions{.within = -1ms}); }), Errc::invalid_option);
  simulation.advance(1h);
  EXPECT_EQ(ends.size(), 0U);
}

TEST_F(SessionDrain, OfAHandleWhoseSessionHasEndedDoesNothing) {
  connect();
  sessions.at(0).close();
  simulation.advance(10s);
  ASSERT_EQ(ends.size(), 1U);
  sessions.at(0).drain();
  simulation.advance(10s);
  EXPECT_EQ(ends.size(), 1U);
}

/// What the world looks like after clients have asked all the time while their sessions were drained one by one.
class SeededDrain : public SessionDrain {
 public:
  explicit SeededDrain(std::uint64_t seed) : SessionDrain(seed) {}
  void TestBody() override {}

  void run_all() {
    std::vector<ClientTransport*> all;
    for (int i = 0; i < 6; ++i) all.push_back(&connect());
    simulation.set_faults({.half_write = 0.2, .stall = 0.05, .longest_stall = 200ms, .most_delay = 30ms});
    std::vector<std::shared_ptr<Asked>> asked;
    for (int round = 0; round < 40; ++round) {
      for (auto* client : all) {
        if (simulation.random() % 2 == 0)
          asked.push_back(ask(*client, simulation.random() % 4 == 0 ? "later" : "x", 30s));
      }
      if (round % 6 == 5 && !sessions.empty()) {
        sessions[simulation.random() % sessions.size()].drain(
            {.within = std::chrono::milliseconds(200 + simulation.random() % 3000),
             .quiet = std::chrono::milliseconds(simulation.random() % 200)});
      }
      if (!kept.empty() && simulation.random() % 3 != 0) {
        kept.front().respond("late");
        kept.erase(kept.begin());
      }
      simulation.advance(std::chrono::milliseconds(simulation.random() % 100));
    }
    for (auto& session : sessions) session.drain({.within = 2s});
    kept.clear();
    simulation.advance(10s);
    EXPECT_EQ(ends.size(), sessions.size());
    std::set<std::uint64_t> once;
    for (const End& end : ends) {
      once.insert(end.id.value());
      EXPECT_TRUE(end.code == Errc::stopping || end.code == Errc::drain_expired) << end.code.message();
    }
    EXPECT_EQ(once.size(), ends.size());
    EXPECT_EQ(server->session_count(), 0U);
    for (const auto& one : asked) EXPECT_TRUE(one->done);
    const auto stats = server->stats();
    EXPECT_EQ(stats.sessions_total, sessions.size());
  }
};

TEST(SessionDrainUnderFaults, EndsEachSessionOnceAndLeavesNobodyWaiting) {
  for (std::uint64_t seed = 1; seed <= 30 && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    SeededDrain world(seed);
    world.run_all();
  }
}

// --- of a listener, in simulated time

class CloseListener : public SessionDrain {
 protected:
  std::string second = unused_name();

  error_code try_to_connect(const std::string& to) {
    auto& client = clients.emplace_back(ClientOptions{.executor = simulation.executor()});
    error_code result = Errc::no_answer;
    client.async_connect("inproc://" + to, [&](error_code code) { result = code; });
    EXPECT_TRUE(simulation.run_until([&] { return result != Errc::no_answer; }, 20s));
    return result;
  }
};

TEST_F(CloseListener, AcceptsNoMoreWhileItsSessionsGoOn) {
  auto& client = connect();
  server->listen(in_process(second));
  EXPECT_TRUE(server->close_listener(in_process(name)));
  EXPECT_EQ(server->endpoints(), std::vector<Endpoint>{in_process(second)});
  simulation.run();
  EXPECT_EQ(try_to_connect(name), boost::system::errc::connection_refused);
  EXPECT_EQ(ask(client, "still there?")->text, "still there?");
  simulation.advance(1h);
  EXPECT_EQ(ends.size(), 0U);
  EXPECT_FALSE(try_to_connect(second));
  EXPECT_FALSE(server->close_listener(in_process(name))) << "again";
  // The name is free.
  server->listen(in_process(name));
  EXPECT_FALSE(try_to_connect(name));
}

TEST_F(CloseListener, TellsWhenItIsClosed) {
  std::vector<error_code> told;
  const auto note = [&](error_code code) { told.push_back(code); };
  server->async_close_listener(in_process(name), note);
  server->async_close_listener(in_process("@nobody"), note);
  EXPECT_EQ(told.size(), 0U) << "inside the call";
  simulation.run();
  ASSERT_EQ(told.size(), 2U);
  std::ranges::sort(told, {}, &error_code::value);
  EXPECT_EQ(told[0], error_code());
  EXPECT_EQ(told[1], Errc::not_found);
}

TEST_F(CloseListener, WithDrainDrainsItsOwnSessionsOnly) {
  server->listen(in_process(second));
  auto& first = connect();
  auto& other = connect(second);
  const auto asked = ask(first, "later");
  EXPECT_TRUE(server->drain_listener(in_process(name), {.within = 60s, .reason = "closing"}));
  simulation.advance(30s);
  EXPECT_EQ(ends.size(), 0U) << "owes an answer";
  kept.at(0).respond("here");
  simulation.advance(1s);
  EXPECT_EQ(asked->text, "here");
  ASSERT_EQ(ends.size(), 1U);
  EXPECT_EQ(ends[0].id, sessions.at(0).id());
  EXPECT_EQ(ends[0].code, Errc::stopping);
  EXPECT_EQ(ends[0].text, "closing");
  simulation.advance(1h);
  EXPECT_EQ(ask(other, "still there?")->text, "still there?");
}

TEST_F(CloseListener, WithDrainCutsAtTheEndOfItsTime) {
  auto& client = connect();
  connect();
  ask(client, "later");
  server->drain_listener(in_process(name), {.within = 3s});
  simulation.advance(2900ms);
  EXPECT_EQ(ends.size(), 1U);
  simulation.advance(200ms);
  ASSERT_EQ(ends.size(), 2U);
  EXPECT_EQ(ends[1].code, Errc::drain_expired);
}

TEST_F(CloseListener, AfterTheServerWasStoppedIsFalse) {
  server->async_stop(0ms, [](const StopReport&) {});
  EXPECT_FALSE(server->close_listener(in_process(name)));
  simulation.run();
  EXPECT_FALSE(server->close_listener(in_process(name)));
}

TEST_F(CloseListener, RightBeforeAStopIsHarmless) {
  connect();
  server->close_listener(in_process(name));
  bool stopped = false;
  server->async_stop(1s, [&](const StopReport& report) { stopped = report.clean(); });
  simulation.advance(2s);
  EXPECT_TRUE(stopped);
  EXPECT_EQ(ends.size(), 1U);
}

// --- with sockets

/// A directory of the test's own, and sockets.
class Sockets : public ::testing::Test {
 protected:
  Sockets() {
    std::string directory = (std::filesystem::temp_directory_path() / "msgtrans-XXXXXX").string();
    if (::mkdtemp(directory.data()) == nullptr) throw std::runtime_error("mkdtemp");
    directory_ = directory;
  }
  ~Sockets() override { std::filesystem::remove_all(directory_); }

  [[nodiscard]] Endpoint file() const { return unix_socket((directory_ / "socket").string()); }
  static bool exists(const Endpoint& endpoint) {
    struct stat found {};
    return ::lstat(endpoint.path.c_str(), &found) == 0;
  }
  /// Bound, and listening if wanted.
  static ListeningSocket bound(const Endpoint& endpoint, bool listens = true) {
    const SocketAddress address(endpoint);
    const int socket = ::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (socket < 0 || ::bind(socket, address.data(), address.size()) != 0 || (listens && ::listen(socket, 64) != 0)) {
      throw std::runtime_error(std::string("cannot listen: ") + std::strerror(errno));
    }
    return ListeningSocket(socket);
  }
  static bool is_open(int descriptor) { return ::fcntl(descriptor, F_GETFD) >= 0; }
  static void expect_answers(const Endpoint& endpoint) {
    ClientTransport client;
    client.connect(endpoint.url());
    EXPECT_EQ(client.request("hello").text(), "hello");
  }
  /// Once its acceptors have closed what they had.
  static void close_and_wait(ServerTransport& server, const Endpoint& endpoint) {
    auto promise = std::make_shared<std::promise<error_code>>();
    auto closed = promise->get_future();
    server.async_close_listener(endpoint, [promise](error_code code) { promise->set_value(code); });
    EXPECT_EQ(in_time(closed), error_code());
  }
  static Endpoint loopback() { return tcp("127.0.0.1:0"); }
  /// One that has begun to ask a WebSocket listener for its upgrade.
  static RawPeer half_a_handshake(Endpoint listener) {
    listener.transport = Transport::tcp;
    listener.path.clear();
    RawPeer peer(listener);
    peer.send(std::string_view("GET / HTTP/1.1\r\nHost: x\r\n"));
    return peer;
  }

  std::filesystem::path directory_;
};

class CloseListenerOfSockets : public Sockets {};
class AdoptListener : public Sockets {};
class Handover : public Sockets {};

TEST_F(CloseListenerOfSockets, LeavesThePortToOthersAndTheSessionsGoOn) {
  TestServer server({.shards = 3});
  server.echo();
  const auto endpoint = server.transport.listen(loopback());
  server.transport.start();
  ClientTransport client;
  client.connect(endpoint.url());
  EXPECT_EQ(client.request("before").text(), "before");
  close_and_wait(server.transport, endpoint);
  EXPECT_EQ(server.transport.endpoints().size(), 0U);
  EXPECT_THROW(RawPeer{endpoint}, std::runtime_error);
  {
    ServerTransport other;  // nobody shares the port
    EXPECT_EQ(other.listen(endpoint), endpoint);
  }
  EXPECT_EQ(client.request("after").text(), "after");
  EXPECT_EQ(server.ends.size(), 0U);
  EXPECT_EQ(server.transport.listen(endpoint), endpoint);
  expect_answers(endpoint);
}

TEST_F(CloseListenerOfSockets, RemovesAFileAtOnce) {
  TestServer server;
  server.echo();
  server.transport.listen(file());
  server.transport.start();
  ClientTransport client;
  client.connect(file().url());
  EXPECT_TRUE(server.transport.close_listener(file()));
  EXPECT_FALSE(exists(file()));
  EXPECT_EQ(client.request("after").text(), "after");
}

TEST_F(CloseListenerOfSockets, BeforeTheStartClosesToo) {
  ServerTransport server;
  server.listen(file());
  const auto endpoint = server.listen(loopback());
  EXPECT_TRUE(server.close_listener(file()));
  EXPECT_TRUE(server.close_listener(endpoint));
  EXPECT_FALSE(exists(file()));
  ServerTransport other;
  EXPECT_EQ(other.listen(endpoint), endpoint);
}

TEST_F(CloseListenerOfSockets, AcceptsWhoHasConnectedBefore) {
  asio::io_context context(1);
  TestServer server({.executors = {context.get_executor()}});
  server.echo();
  const auto endpoint = server.transport.listen(loopback(), {.backlog = 200});
  server.transport.start();
  context.poll();
  std::deque<RawPeer> peers;  // more than are accepted in one turn; the server does not run yet
  for (int i = 0; i < 150; ++i) peers.emplace_back(endpoint);
  bool closed = false;
  server.transport.async_close_listener(endpoint, [&](error_code code) { closed = !code; });
  EXPECT_TRUE(wait_until([&] {
    context.poll();
    return closed;
  }));
  EXPECT_EQ(server.transport.session_count(), 150U);
  for (auto& peer : peers) peer.send(request(1, "x"));
  EXPECT_TRUE(wait_until([&] {
    context.poll();
    return server.transport.stats().packets_out == 150;
  }));
  for (auto& peer : peers) EXPECT_EQ(peer.next().payload, "x");
  server.transport.async_stop(0ms, [](const StopReport&) {});
  context.run();
}

TEST_F(CloseListenerOfSockets, WithDrainServesThoseInTheirHandshakeToo) {
  TestServer server({.shards = 2});
  server.echo();
  const auto endpoint = server.transport.listen(websocket("127.0.0.1:0/"));
  server.transport.start();
  RawPeer half = half_a_handshake(endpoint);
  // Those of one listener are accepted in their order.
  ClientTransport client;
  client.connect(endpoint.url());
  ASSERT_TRUE(server.came.wait_for(1));
  server.transport.drain_listener(endpoint, {.within = patience, .quiet = patience / 2});
  EXPECT_EQ(client.request("x").text(), "x");
  half.send(
      std::string_view("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                       "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"));
  EXPECT_NE(half.take_until("\r\n\r\n").find("101"), std::string::npos);
  ASSERT_TRUE(server.came.wait_for(2));
  EXPECT_EQ(server.ends.size(), 0U);
  half.close();
  ASSERT_TRUE(server.ends.wait_for(1));
}

TEST_F(CloseListenerOfSockets, WithDrainWithoutQuietEndsWhoComesOutOfHisHandshake) {
  TestServer server({.shards = 1});
  server.echo();
  const auto endpoint = server.transport.listen(websocket("127.0.0.1:0/"));
  server.transport.start();
  RawPeer half = half_a_handshake(endpoint);
  ClientTransport client;
  client.connect(endpoint.url());
  ASSERT_TRUE(server.came.wait_for(1));
  server.transport.drain_listener(endpoint, {.within = patience});
  ASSERT_TRUE(server.ends.wait_for(1));
  half.send(
      std::string_view("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                       "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"));
  EXPECT_TRUE(half.sees_end());
  half.close();
  ASSERT_TRUE(server.ends.wait_for(2));
  EXPECT_EQ(server.ends.at(1).code, Errc::stopping);
}

// --- sockets from elsewhere

TEST_F(AdoptListener, ServesAllShardsOverOneSocket) {
  TestServer server({.shards = 2});
  Record<asio::any_io_executor> executors;
  server.transport.on_message([&](Session& session, const Message& message) {
    executors.add(session.get_executor());
    session.respond(message, message.payload());
  });
  std::vector<ListeningSocket> sockets;
  sockets.push_back(bound(loopback()));
  Error error;
  const Endpoint address = sockets[0].address(error);
  EXPECT_EQ(server.transport.adopt_listener(tcp("1.2.3.4:5"), sockets), address);
  EXPECT_FALSE(sockets[0]);
  EXPECT_EQ(server.transport.endpoints(), std::vector<Endpoint>{address});
  server.transport.start();
  for (int i = 0; i < 4; ++i) expect_answers(address);
  EXPECT_EQ(std::ranges::count(executors.all(), executors.at(0)), 2);
  close_and_wait(server.transport, address);
  EXPECT_THROW(RawPeer{address}, std::runtime_error);
}

TEST_F(AdoptListener, MakesABoundSocketListen) {
  TestServer server;
  server.echo();
  std::vector<ListeningSocket> sockets;
  sockets.push_back(bound(loopback(), false));
  const auto address = server.transport.adopt_listener(tcp("0.0.0.0:0"), sockets);
  server.transport.start();
  expect_answers(address);
}

TEST_F(AdoptListener, SpeaksWhatItIsTold) {
  TestServer server;
  server.echo();
  std::vector<ListeningSocket> sockets;
  sockets.push_back(bound(loopback()));
  const auto address = server.transport.adopt_listener(websocket("0.0.0.0:0/chat"), sockets);
  EXPECT_EQ(address.path, "/chat");
  EXPECT_NE(address.port, 0);
  server.transport.start();
  expect_answers(address);
}

TEST_F(AdoptListener, OfBothFamiliesShowsPeersOfTheOlderAsSuch) {
  const int socket = ::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in6 any{};
  any.sin6_family = AF_INET6;
  if (socket < 0 || ::bind(socket, reinterpret_cast<const sockaddr*>(&any), sizeof any) != 0) {
    GTEST_SKIP() << "no IPv6 here";
  }
  std::vector<ListeningSocket> sockets;
  sockets.emplace_back(socket);
  TestServer server;
  const auto address = server.transport.adopt_listener(tcp("0.0.0.0:0"), sockets);
  EXPECT_EQ(address.host, "::");
  server.transport.start();
  const RawPeer peer({.host = "127.0.0.1", .port = address.port});
  EXPECT_EQ(server.session().peer().host, "127.0.0.1");
}

TEST_F(AdoptListener, LeavesAFileUnlessItIsItsOwn) {
  for (const bool owns : {false, true}) {
    std::vector<ListeningSocket> sockets;
    sockets.push_back(bound(file()));
    sockets[0].set_owns_file(owns);
    {
      TestServer server;
      server.echo();
      EXPECT_EQ(server.transport.adopt_listener(unix_socket("@whatever"), sockets), file());
      server.transport.start();
      expect_answers(file());
    }
    EXPECT_EQ(exists(file()), !owns);
    std::filesystem::remove(file().path);
  }
}

TEST_F(AdoptListener, SaysWhatIsWrongAndLeavesTheSocketAlone) {
  ServerTransport server;
  const auto refused = [&](ListeningSocket socket, const Endpoint& as) {
    std::vector<ListeningSocket> sockets;
    sockets.push_back(std::move(socket));
    const int descriptor = sockets[0].descriptor();
    Error error;
    EXPECT_FALSE(server.adopt_listener(as, sockets, {}, error));
    EXPECT_EQ(sockets[0].descriptor(), descriptor);
    EXPECT_EQ(is_open(descriptor), error.code != boost::system::errc::bad_file_descriptor);
    if (is_open(descriptor)) {
      EXPECT_EQ(error.code, Errc::invalid_option);
    } else {
      sockets[0].release();
    }
    EXPECT_NE(error.text.find("descriptor " + std::to_string(descriptor)), std::string::npos) << error.text;
    return error.text;
  };
  const auto contains = [](const std::string& text, std::string_view what) {
    EXPECT_NE(text.find(what), std::string::npos) << text;
  };
  const Endpoint any = tcp("0.0.0.0:0");
  contains(refused(ListeningSocket(::open("/dev/null", O_RDONLY | O_CLOEXEC)), any), "is no socket");
  contains(refused(ListeningSocket(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0)), any), "is no stream socket");
  contains(refused(ListeningSocket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)), any), "is not bound");
  contains(refused(ListeningSocket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)), unix_socket("@x")),
           "is not bound");
  contains(refused(bound(file()), any), "is a Unix socket");
  contains(refused(bound(loopback()), unix_socket("@x")), "is a TCP socket");
  contains(refused(ListeningSocket(999'999), any), "Bad file descriptor");
  {
    const RawListener listener(1, 0, loopback());
    const int connected = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const SocketAddress to(listener.endpoint());
    ASSERT_EQ(::connect(connected, to.data(), to.size()), 0);
    contains(refused(ListeningSocket(connected), any), "is connected");
  }
  std::vector<ListeningSocket> two;
  two.push_back(bound(loopback()));
  two.push_back(bound(loopback()));
  EXPECT_EQ(thrown([&] { server.adopt_listener(any, two); }), Errc::invalid_option);
  EXPECT_TRUE(two[0] && two[1]);
  EXPECT_EQ(thrown([&] { server.adopt_listener(any, {}); }), Errc::invalid_option);
  EXPECT_EQ(thrown([&] { server.adopt_listener(in_process("x"), two); }), Errc::invalid_option);
  EXPECT_EQ(thrown([&] { server.adopt_listener(any, std::span(two).first(1), {.backlog = 0}); }), Errc::invalid_option);
  EXPECT_EQ(server.endpoints().size(), 0U);
}

TEST_F(AdoptListener, ByListenTakesThoseOfTheAddressAndBindsTheRest) {
  TestServer server;
  server.echo();
  std::vector<ListeningSocket> inherited;
  inherited.push_back(bound(loopback()));
  inherited.push_back(bound(file()));
  inherited.push_back(bound(loopback()));
  Error error;
  const auto first = inherited[0].address(error), third = inherited[2].address(error);
  EXPECT_EQ(server.transport.listen(third, {}, inherited), third);
  ASSERT_EQ(inherited.size(), 2U);
  EXPECT_EQ(inherited[0].address(error), first);
  EXPECT_EQ(server.transport.listen(file(), {}, inherited), file());
  EXPECT_EQ(inherited.size(), 1U);
  const auto fresh = server.transport.listen(loopback(), {}, inherited);
  EXPECT_NE(fresh, first);
  EXPECT_EQ(inherited.size(), 1U);
  server.transport.start();
  for (const auto& one : {third, file(), fresh}) expect_answers(one);
}

// --- from one server to another

TEST_F(Handover, ServesOnEachSocketOfAPort) {
  // Four sockets share the port, among which the system divides the connections: who takes only some of them over
  // leaves clients hanging.
  for (const unsigned shards : {1U, 3U, 8U}) {
    auto old = std::make_unique<TestServer>(ServerOptions{.shards = 4});
    old->echo();
    const auto endpoint = old->transport.listen(loopback());
    old->transport.start();
    auto sockets = old->transport.listening_sockets();
    ASSERT_EQ(sockets.size(), 4U);
    for (const auto& socket : sockets) EXPECT_EQ(socket.name(), "tcp");
    TestServer next({.shards = shards});
    next.echo();
    EXPECT_EQ(next.transport.listen(endpoint, {}, sockets), endpoint);
    EXPECT_EQ(sockets.size(), 0U);
    next.transport.start();
    old->transport.release_listeners();
    old->transport.stop(0ms);
    const auto by_old = old->came.size();
    old.reset();
    std::deque<RawPeer> peers;
    for (int i = 0; i < 64; ++i) {
      peers.emplace_back(endpoint);
      peers.back().send(request(1, "x"));
    }
    for (auto& peer : peers) EXPECT_EQ(peer.next().payload, "x");
    EXPECT_EQ(by_old, 0U);
    EXPECT_EQ(next.came.size(), 64U);
  }
}

TEST_F(Handover, LosesNobodyWhoWaitsToBeAccepted) {
  asio::io_context context(1);
  auto old = std::make_unique<TestServer>(ServerOptions{.executors = {context.get_executor()}});
  const auto endpoint = old->transport.listen(loopback());
  old->transport.listen(file());
  old->transport.start();
  context.poll();
  std::deque<RawPeer> peers;
  for (int i = 0; i < 20; ++i) {
    peers.emplace_back(endpoint);
    peers.back().send(request(1, "x"));
    peers.emplace_back(file());
    peers.back().send(request(1, "x"));
  }
  auto sockets = old->transport.listening_sockets();
  EXPECT_EQ(sockets.size(), 2U);
  old->transport.release_listeners();
  old.reset();  // without having run again
  TestServer next;
  next.echo();
  next.transport.listen(endpoint, {}, sockets);
  next.transport.adopt_listener(unix_socket("@x"), sockets);
  next.transport.start();
  for (auto& peer : peers) EXPECT_EQ(peer.next().payload, "x");
}

TEST_F(Handover, LeavesTheFileToTheSuccessor) {
  auto old = std::make_unique<TestServer>();
  old->echo();
  old->transport.listen(file());
  old->transport.start();
  auto sockets = old->transport.listening_sockets();
  ASSERT_EQ(sockets.size(), 1U);
  EXPECT_TRUE(sockets[0].owns_file());
  EXPECT_EQ(sockets[0].name(), "unix");
  auto next = std::make_unique<TestServer>();
  next->echo();
  next->transport.listen(file(), {}, sockets);
  next->transport.start();
  old->transport.release_listeners();
  EXPECT_EQ(old->transport.endpoints().size(), 0U);
  old.reset();
  EXPECT_TRUE(exists(file()));
  expect_answers(file());
  next.reset();
  EXPECT_FALSE(exists(file()));
}

TEST_F(Handover, GoesOnWhereItWasIfTheSuccessorDoesNotCome) {
  TestServer server;
  server.echo();
  const auto endpoint = server.transport.listen(loopback());
  server.transport.start();
  { const auto sockets = server.transport.listening_sockets(); }  // closed by whoever had them
  for (int i = 0; i < 8; ++i) expect_answers(endpoint);
  EXPECT_EQ(server.transport.endpoints().size(), 1U);
}

/// What all reactors of this process watch.
std::size_t watched() {
  std::size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fdinfo")) {
    std::ifstream info(entry.path());
    for (std::string line; std::getline(info, line);) count += line.starts_with("tfd:") ? 1 : 0;
  }
  return count;
}

TEST_F(Handover, StopsWatchingSocketsThatLiveOn) {
  // A reactor that still watched it would wake for each connection to the successor, with what it was told of a socket
  // that has gone.
  TestServer old({.shards = 1}), next({.shards = 1});
  old.echo();
  next.echo();
  const auto endpoint = old.transport.listen(loopback());
  old.transport.start();
  auto sockets = old.transport.listening_sockets();
  next.transport.listen(endpoint, {}, sockets);
  next.transport.start();
  expect_answers(endpoint);  // both have begun
  expect_answers(endpoint);
  ASSERT_TRUE(wait_until([&] { return old.ends.size() + next.ends.size() == 2; }));
  const auto before = watched();
  close_and_wait(old.transport, endpoint);
  EXPECT_EQ(watched(), before - 1);
  for (int i = 0; i < 4; ++i) expect_answers(endpoint);
  EXPECT_EQ(old.came.size() + next.came.size(), 6U);
}

TEST_F(Handover, HasNothingToGiveOnceItStops) {
  TestServer server;
  server.transport.listen(loopback());
  EXPECT_EQ(server.transport.listening_sockets().size(), 2U) << "also before the start";
  server.transport.start();
  server.transport.stop(0ms);
  EXPECT_EQ(server.transport.listening_sockets().size(), 0U);
  server.transport.release_listeners();
}

// --- a stop that turns nobody away

TEST_F(Handover, StopWithQuietServesThoseInTheirHandshake) {
  for (const bool quiet : {true, false}) {
    TestServer server({.shards = 2});
    server.echo();
    const auto endpoint = server.transport.listen(websocket("127.0.0.1:0/"));
    server.transport.start();
    Endpoint bare = endpoint;
    bare.transport = Transport::tcp;
    bare.path.clear();
    std::deque<RawPeer> half;
    for (int i = 0; i < 4; ++i) {
      half.emplace_back(bare);
      half.back().send(std::string_view("GET / HTTP/1.1\r\nHost: x\r\n"));
    }
    // All have been accepted when their sockets are there.
    ClientTransport client;
    for (int i = 0; i < 8; ++i) {
      ClientTransport other;
      other.connect(endpoint.url());
    }
    client.connect(endpoint.url());
    auto stopped = std::async(std::launch::async, [&] {
      return server.transport.stop({.within = patience, .quiet = quiet ? patience / 4 : 0ms});
    });
    if (quiet) {
      // It has begun when nobody can connect any more.
      ASSERT_TRUE(wait_until([&] {
        try {
          const RawPeer late(bare);
          return false;
        } catch (const std::runtime_error&) {
          return true;
        }
      }));
      EXPECT_EQ(client.request("during").text(), "during");
      client.close();
      for (auto& peer : half) {
        peer.send(
            std::string_view("Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                             "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"));
        EXPECT_NE(peer.take_until("\r\n\r\n").find("101"), std::string::npos);
        peer.cut();
        peer.close();
      }
    } else {
      for (auto& peer : half) EXPECT_TRUE(peer.sees_end());
    }
    const auto report = in_time(stopped);
    EXPECT_TRUE(report.complete);
    EXPECT_EQ(report.sessions_cut, 0U);
    EXPECT_EQ(server.came.size(), quiet ? 13U : 9U);
  }
}

TEST_F(Handover, StopWithQuietAcceptsWhoHasConnected) {
  asio::io_context context(1);
  TestServer server({.executors = {context.get_executor()}});
  server.echo();
  const auto endpoint = server.transport.listen(loopback());
  server.transport.start();
  context.poll();
  std::deque<RawPeer> peers;
  for (int i = 0; i < 100; ++i) {
    peers.emplace_back(endpoint);
    peers.back().send(request(1, "x"));
    peers.back().shut_sending();
  }
  // As release_listeners and stop do it, with the command before what the reactor has to say.
  Record<StopReport> reports;
  std::thread runs([&] { context.run_for(patience); });
  auto stopped = server.transport.stop(DrainOptions{.within = patience / 2, .quiet = 1s});
  runs.join();
  EXPECT_EQ(stopped.sessions_cut, 0U);
  EXPECT_EQ(server.came.size(), 100U);
  for (auto& peer : peers) EXPECT_EQ(peer.next().payload, "x");
}

TEST_F(Handover, StopWithQuietCutsAndCountsInTheEnd) {
  Simulation simulation;
  ServerTransport server({.executors = {simulation.executor()}});
  std::vector<OwnedMessage> kept;
  server.on_message([&](Session&, const Message& message) { kept.push_back(message.retain()); });
  const auto endpoint = server.listen(in_process(unused_name()));
  server.start();
  ClientTransport client({.executor = simulation.executor()});
  client.async_connect(endpoint.url(), [](error_code) {});
  simulation.run();
  client.async_request("?", RequestOptions{.timeout = 0ms}, [](error_code, const Reply&) {});
  simulation.run();
  std::optional<StopReport> report;
  server.async_stop(DrainOptions{.within = 5s, .quiet = 1s}, [&](const StopReport& done) { report = done; });
  simulation.advance(4900ms);
  EXPECT_FALSE(report);
  simulation.advance(1s);
  ASSERT_TRUE(report);
  EXPECT_EQ(report->sessions_cut, 1U);
  EXPECT_EQ(report->answers_cut, 1U);
}

// --- what a process is started with

class Inherited : public ::testing::Test {
 protected:
  ~Inherited() override {
    for (const char* name : {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}) ::unsetenv(name);
  }
  static void set(const std::string& process, const std::string& count, const char* names = nullptr) {
    ::setenv("LISTEN_PID", process.c_str(), 1);
    ::setenv("LISTEN_FDS", count.c_str(), 1);
    if (names != nullptr) ::setenv("LISTEN_FDNAMES", names, 1);
  }
  static std::string us() { return std::to_string(::getpid()); }
};

TEST_F(Inherited, AreNoneUnlessTheyAreForThisProcess) {
  Error error;
  EXPECT_EQ(inherited_sockets(error).size(), 0U);
  set(std::to_string(::getppid()), "1");
  EXPECT_EQ(inherited_sockets(error).size(), 0U);
  EXPECT_FALSE(error) << error.message();
  EXPECT_NE(std::getenv("LISTEN_FDS"), nullptr) << "another's variables were taken";
  set(us(), "0");
  EXPECT_EQ(inherited_sockets(error).size(), 0U);
  EXPECT_FALSE(error) << error.message();
}

TEST_F(Inherited, SayWhatIsWrong) {
  const auto told = [](std::string_view what) {
    Error error;
    EXPECT_EQ(inherited_sockets(error).size(), 0U);
    EXPECT_TRUE(error);
    EXPECT_NE(error.text.find(what), std::string::npos) << error.text;
    EXPECT_EQ(thrown([] { (void)inherited_sockets(); }), error.code);
    EXPECT_NE(std::getenv("LISTEN_PID"), nullptr);
  };
  set("me", "1");
  told("LISTEN_PID is \"me\"");
  set(us(), "one");
  told("LISTEN_FDS is \"one\"");
  set(us(), "-1");
  told("LISTEN_FDS is \"-1\"");
  set(us(), "2", "a:b:c");
  told("LISTEN_FDNAMES is \"a:b:c\"");
  ::unsetenv("LISTEN_FDNAMES");
  set(us(), "60000");
  told("of LISTEN_FDS=60000: Bad file descriptor");
}

// --- processes

class SuccessorProcess : public Sockets {
 protected:
  static Successor shell(const std::string& script, int count = 1) {
    std::vector<ListeningSocket> sockets;
    for (int i = 0; i < count; ++i) {
      sockets.push_back(bound(loopback()));
      sockets.back().set_name("name-" + std::to_string(i));
    }
    return Successor::start({"sh", "-c", script}, std::move(sockets));
  }
  static bool is_gone(pid_t process) { return ::kill(process, 0) != 0 && errno == ESRCH; }
};

TEST_F(SuccessorProcess, GetsItsSocketsAndSaysThatItIsReady) {
  auto successor = shell(
      "[ $LISTEN_PID = $$ ] && [ $LISTEN_FDS = 2 ] && [ $LISTEN_FDNAMES = name-0:name-1 ] && "
      "ls -l /proc/$$/fd/3 /proc/$$/fd/4 | grep -c socket: | grep -q 2 && [ ! -e /proc/$$/fd/6 ] && "
      "eval \"printf x >&$MSGTRANS_READY_FD\"",
      2);
  Error error;
  EXPECT_TRUE(successor.wait_ready(patience, error)) << error.message();
  EXPECT_FALSE(error);
}

TEST_F(SuccessorProcess, ThatEndsBeforeIsAnError) {
  auto successor = shell("exit 0");
  Error error;
  EXPECT_FALSE(successor.wait_ready(patience, error));
  EXPECT_EQ(error.code, Errc::closed);
  EXPECT_TRUE(is_gone(successor.process()));
}

TEST_F(SuccessorProcess, ThatIsNotReadyInTimeIsEnded) {
  auto successor = shell("exec sleep 1000");
  EXPECT_FALSE(is_gone(successor.process()));
  Error error;
  EXPECT_FALSE(successor.wait_ready(50ms, error));
  EXPECT_EQ(error.code, boost::system::errc::timed_out);
  EXPECT_TRUE(is_gone(successor.process()));
}

TEST_F(SuccessorProcess, ThatIsGivenUpIsEnded) {
  auto successor = shell("exec sleep 1000");
  std::thread gives_up([&] { successor.give_up(); });
  Error error;
  EXPECT_FALSE(successor.wait_ready(patience, error));
  EXPECT_EQ(error.code, asio::error::operation_aborted);
  EXPECT_TRUE(is_gone(successor.process()));
  gives_up.join();
}

TEST_F(SuccessorProcess, ThatNobodyWaitedForIsEnded) {
  pid_t process = 0;
  { process = shell("exec sleep 1000").process(); }
  EXPECT_TRUE(is_gone(process));
}

TEST_F(SuccessorProcess, ThatCannotBeStartedIsAnErrorThatNamesIt) {
  const auto start = [](const std::vector<std::string>& command, std::string name = {}) {
    std::vector<ListeningSocket> sockets;
    sockets.push_back(bound(loopback()));
    sockets.back().set_name(std::move(name));
    (void)Successor::start(command, std::move(sockets));
  };
  std::string text;
  EXPECT_EQ(thrown([&] { start({"/no/such/program"}); }, &text), boost::system::errc::no_such_file_or_directory);
  EXPECT_NE(text.find("/no/such/program"), std::string::npos) << text;
  EXPECT_EQ(thrown([&] { start({"no-such-program"}); }, &text), boost::system::errc::no_such_file_or_directory);
  EXPECT_EQ(thrown([&] { start({"/dev/null"}); }, &text), boost::system::errc::permission_denied);
  EXPECT_EQ(thrown([&] { start({}); }), Errc::invalid_option);
  EXPECT_EQ(thrown([&] { start({"true"}, "a:b"); }), Errc::invalid_option);
  EXPECT_EQ(thrown([&] { (void)Successor::start({"true"}, {}); }), Errc::invalid_option);
}

TEST_F(SuccessorProcess, TellsSystemdToo) {
  const Endpoint where = unix_socket(unused_name());
  const SocketAddress address(where);
  const int socket = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  ASSERT_EQ(::bind(socket, address.data(), address.size()), 0);
  ::setenv("NOTIFY_SOCKET", where.path.c_str(), 1);
  announce_ready();
  ::unsetenv("NOTIFY_SOCKET");
  char text[200];
  const ssize_t count = ::recv(socket, text, sizeof text, MSG_DONTWAIT);
  ASSERT_GT(count, 0);
  EXPECT_EQ(std::string(text, static_cast<std::size_t>(count)), "READY=1\nMAINPID=" + std::to_string(::getpid()));
  ::close(socket);
}

}  // namespace
}  // namespace msgtrans::test
