// SPDX-License-Identifier: Apache-2.0
#include "session_registry.hpp"
#include "support/fixture.hpp"
#include "support/sanitized.hpp"

#include <algorithm>
#include <any>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/this_coro.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <cerrno>
#include <cstring>
#include <deque>
#include <fcntl.h>
#include <msgtrans/testing/simulation.hpp>
#include <stdexcept>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using detail::AddressKey;
using detail::AddressRates;
using detail::SessionRegistry;
using protocol::TimePoint;
using testing::Simulation;

const TimePoint start_time = TimePoint(1h);

bool has(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

AddressKey key(const char* address) {
  return detail::key_of(asio::ip::make_address(address));
}

Endpoint over(Transport transport, Endpoint endpoint) {
  endpoint.transport = transport;
  endpoint.path.clear();
  return endpoint;
}

detail::Peer peer_at(const std::string& address) {
  return {.address = {asio::ip::make_address(address), 1}};
}

// --- who counts as one

TEST(AddressesCounted, OfIPv6AreNetworksAndWhatIsMappedIsIPv4) {
  EXPECT_EQ(key("2001:db8:1:2::1"), key("2001:db8:1:2:ffff:ffff:ffff:ffff"));
  EXPECT_NE(key("2001:db8:1:2::1"), key("2001:db8:1:3::1"));
  EXPECT_EQ(key("::ffff:192.0.2.1"), key("192.0.2.1"));
  EXPECT_NE(key("192.0.2.1"), key("192.0.2.2"));
  EXPECT_NE(key("::1"), key("127.0.0.1"));
}

TEST(AddressesCounted, ByTheLimitOfSessionsAreNetworks) {
  using Refusal = SessionRegistry::Refusal;
  SessionRegistry registry({.sessions = 100, .sessions_per_address = 2}, start_time);
  EXPECT_EQ(registry.admit(peer_at("2001:db8::1"), start_time), Refusal::none);
  EXPECT_EQ(registry.admit(peer_at("2001:db8::2"), start_time), Refusal::none);
  EXPECT_EQ(registry.admit(peer_at("2001:db8::3"), start_time), Refusal::address);
  EXPECT_EQ(registry.admit(peer_at("2001:db8:0:1::3"), start_time), Refusal::none);
  registry.leave(peer_at("2001:db8::1"));
  EXPECT_EQ(registry.admit(peer_at("2001:db8::3"), start_time), Refusal::none);
}

TEST(AddressesCounted, ByTheirRatesDoNotTakeFromEachOther) {
  using Refusal = SessionRegistry::Refusal;
  SessionRegistry registry({.sessions = 1000, .rate = 10, .burst = 4, .rate_per_address = 1, .burst_per_address = 2},
                           start_time);
  EXPECT_EQ(registry.admit(peer_at("192.0.2.1"), start_time), Refusal::none);
  EXPECT_EQ(registry.admit(peer_at("192.0.2.1"), start_time), Refusal::none);
  // However often one address tries, the others have the whole rest of the server's burst.
  for (int i = 0; i < 100; ++i) {
    EXPECT_EQ(registry.admit(peer_at("192.0.2.1"), start_time), Refusal::address_rate);
  }
  EXPECT_EQ(registry.admit(peer_at("192.0.2.2"), start_time), Refusal::none);
  EXPECT_EQ(registry.admit(peer_at("192.0.2.2"), start_time), Refusal::none);
  EXPECT_EQ(registry.admit(peer_at("192.0.2.3"), start_time), Refusal::rate);
  EXPECT_EQ(registry.admit(peer_at("192.0.2.3"), start_time + 100ms), Refusal::none);
  EXPECT_EQ(registry.admit(peer_at("192.0.2.1"), start_time + 999ms), Refusal::address_rate);
  EXPECT_EQ(registry.admit(peer_at("192.0.2.1"), start_time + 1s), Refusal::none);
}

TEST(AddressRates, AreKeptAcrossGenerationsAndForgottenWhenFull) {
  AddressRates rates(1, 10, start_time);  // full again after 10 s, so a generation takes 11 s
  const auto one = key("192.0.2.1");
  for (int i = 0; i < 10; ++i) ASSERT_TRUE(rates.try_take(one, start_time + 10s));
  ASSERT_FALSE(rates.try_take(one, start_time + 10s));
  // In the next generation it still has what it had in the last.
  EXPECT_TRUE(rates.try_take(one, start_time + 11s));
  EXPECT_FALSE(rates.try_take(one, start_time + 11s));
  EXPECT_EQ(rates.size(), 1U);
  const auto other = key("192.0.2.2");
  EXPECT_TRUE(rates.try_take(other, start_time + 25s));
  EXPECT_TRUE(rates.try_take(other, start_time + 40s));
  EXPECT_EQ(rates.size(), 1U) << "who is full is forgotten";
}

TEST(AddressRates, TakeNoMoreMemoryThanTheyMay) {
  AddressRates rates(1, 100'000, start_time);
  AddressKey address{};
  for (std::uint32_t i = 0; i < 300'000; ++i) {
    std::memcpy(address.data(), &i, sizeof i);
    ASSERT_TRUE(rates.try_take(address, start_time));
    ASSERT_LE(rates.size(), AddressRates::most);
  }
  EXPECT_GE(rates.size(), AddressRates::most / 2);
}

// --- in simulated time

/// A server and clients in one simulation.
class World {
 public:
  explicit World(ServerOptions options = {}) {
    options.executors = {simulation.executor()};
    server.emplace(std::move(options));
    server->on_message([this](Session& session, const Message& message) {
      got.emplace_back(message.text());
      if (const auto* name = std::any_cast<std::string>(&session.user_data())) names.push_back(*name);
      if (message.is_request()) session.respond(message, "served: " + std::string(message.text()));
    });
    server->on_disconnect([this](Session&, const Error& reason) { ends.push_back(reason); });
    server->on_error([this](const ErrorEvent& event) { errors.push_back(event); });
  }
  ~World() {
    if (server) stop();
  }

  void start() {
    endpoint = server->listen(in_process(unused_name()));
    server->start();
    simulation.run();
  }
  StopReport stop() {
    std::optional<StopReport> report;
    server->async_stop(1s, [&report](const StopReport& told) { report = told; });
    EXPECT_TRUE(simulation.run_until([&] { return report.has_value(); }, 1h));
    return report.value_or(StopReport{});
  }
  ClientTransport& connect() {
    auto& client = clients.emplace_back(ClientOptions{.executor = simulation.executor()});
    client.on_disconnect([this](Session&, const Error& reason) { client_ends.push_back(reason); });
    bool done = false;
    client.async_connect(endpoint.url(), [&done](error_code) { done = true; });
    EXPECT_TRUE(simulation.run_until([&] { return done; }, 20s));
    simulation.run();
    return client;
  }

  Simulation simulation;
  Endpoint endpoint;
  std::vector<std::string> got, names;
  std::vector<Error> ends, client_ends;
  std::vector<ErrorEvent> errors;
  std::optional<ServerTransport> server;
  std::deque<ClientTransport> clients;
};

TEST(AcceptRate, LetsTheBurstInAndThenSoManyASecond) {
  World world({.accept_rate = 2, .accept_burst = 3});
  world.start();
  for (int i = 0; i < 5; ++i) world.connect();
  EXPECT_EQ(world.server->session_count(), 3U);
  EXPECT_EQ(world.server->stats().refusals.rate, 2U);
  EXPECT_EQ(world.server->stats().sessions_refused, 2U);
  ASSERT_EQ(world.errors.size(), 2U);
  EXPECT_EQ(world.errors[0].error.code, Errc::rate_limited);
  EXPECT_TRUE(has(world.errors[0].error.text, "too many connections a second")) << world.errors[0].error.text;
  EXPECT_TRUE(has(world.errors[0].error.text, "inproc://")) << "who it was: " << world.errors[0].error.text;
  world.simulation.advance(500ms);
  world.connect();
  EXPECT_EQ(world.server->session_count(), 4U);
  world.connect();
  EXPECT_EQ(world.server->session_count(), 4U);
  world.simulation.advance(1h);
  for (int i = 0; i < 5; ++i) world.connect();
  EXPECT_EQ(world.server->stats().refusals.rate, 5U) << "no more than the burst is saved up";
}

TEST(AcceptRate, WithoutABurstIsItsOwn) {
  World world({.accept_rate = 2});
  world.start();
  for (int i = 0; i < 3; ++i) world.connect();
  EXPECT_EQ(world.server->session_count(), 2U);
}

TEST(AcceptRate, OfAnAddressIsForThatOneAlone) {
  TestServer server({.accept_rate_per_address = 1, .accept_burst_per_address = 1});
  server.echo();
  server.endpoint = server.transport.listen(tcp("127.0.0.1:0"));
  server.transport.start();
  const Endpoint six = server.transport.listen(tcp("[::1]:0"));
  std::vector<RawPeer> peers;
  ASSERT_TRUE(wait_until([&] {
    peers.emplace_back(server.endpoint);
    return server.transport.stats().refusals.address_rate > 0;
  }));
  EXPECT_EQ(server.errors.at(0).code, Errc::rate_limited);
  EXPECT_TRUE(has(server.errors.at(0).text, "127.0.0.1:")) << server.errors.at(0).text;
  ClientTransport other;
  other.connect(six.url());
  EXPECT_EQ(other.request("another address").text(), "another address");
}

TEST(AcceptRate, OfAnAddressHasABurstOfItsOwn) {
  TestServer server({.accept_rate_per_address = 1, .accept_burst_per_address = 10});
  server.endpoint = server.transport.listen(tcp("127.0.0.1:0"));
  server.transport.start();
  std::deque<RawPeer> peers;
  for (int i = 0; i < 10; ++i) peers.emplace_back(server.endpoint);
  ASSERT_TRUE(wait_until([&] {
    const auto stats = server.transport.stats();
    return stats.sessions_total + stats.sessions_refused == 10;
  }));
  EXPECT_EQ(server.transport.stats().refusals.address_rate, 0U);
}

TEST(AcceptRate, OptionsOutOfRangeAreRefused) {
  std::string text;
  EXPECT_EQ(thrown([] { ServerTransport server({.accept_rate = ~std::uint64_t{0}}); }, &text), Errc::invalid_option);
  EXPECT_TRUE(has(text, "accept_rate is 18446744073709551615")) << text;
  EXPECT_EQ(thrown([] { ServerTransport server({.admission_timeout = -1ms}); }, &text), Errc::invalid_option);
  EXPECT_TRUE(has(text, "admission_timeout")) << text;
}

// --- refused, and told so

/// The answer of a WebSocket listener to whoever connects; the request is sent if wanted.
std::string answer_of(const Endpoint& listener, bool asks) {
  RawPeer peer(over(Transport::tcp, listener));
  if (asks) peer.send("GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n");
  return peer.rest();
}

TEST(RefusedWebSocket, IsAnsweredWith503AndTheReason) {
  TestServer server({.shards = 1, .max_sessions = 1});
  server.echo();
  server.endpoint = server.transport.listen(websocket("127.0.0.1:0/"));
  auto events = server.transport.subscribe();
  server.transport.start();
  ClientTransport inside;
  inside.connect(server.url());
  for (const bool asks : {true, false}) {
    const std::string answer = answer_of(server.endpoint, asks);
    EXPECT_TRUE(answer.starts_with("HTTP/1.1 503 Service Unavailable\r\n")) << answer;
    EXPECT_TRUE(answer.ends_with("\r\n\r\ntoo many sessions\n")) << answer;
  }
  ClientTransport client;
  Error error;
  client.connect(server.url(), error);
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_TRUE(has(error.text, "503 Service Unavailable")) << error.text;
  EXPECT_EQ(inside.request("untouched").text(), "untouched");
  const auto stats = server.transport.stats();
  EXPECT_EQ(stats.refusals.sessions, 3U);
  EXPECT_EQ(stats.sessions_refused, 3U);
  EXPECT_EQ(stats.handshake_failures, 0U) << "they are not counted twice";
  auto event = events.next_for(patience);
  while (event && event->kind != EventKind::session_refused) event = events.next_for(patience);
  ASSERT_TRUE(event);
  EXPECT_EQ(event->error.code, Errc::too_many_sessions);
  EXPECT_TRUE(has(event->subject, "127.0.0.1:")) << event->subject;
}

TEST(RefusedWebSocket, OverTlsIsAnsweredToo) {
  TestServer server({.shards = 1, .max_sessions = 1});
  server.echo();
  ListenOptions options;
  options.tls.identity = trusted_identity();
  server.endpoint = server.transport.listen(websocket_tls("127.0.0.1:0/"), options);
  server.transport.start();
  ClientTransport inside;
  inside.connect(server.url());
  ClientTransport client;
  Error error;
  client.connect(server.url(), error);
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_TRUE(has(error.text, "503 Service Unavailable")) << error.text;
  EXPECT_EQ(inside.request("untouched").text(), "untouched");
}

TEST(RefusedWebSocket, ByARateIsAnsweredWith429) {
  TestServer server({.shards = 1, .accept_rate = 1, .accept_burst = 1});
  server.endpoint = server.transport.listen(websocket("127.0.0.1:0/"));
  server.transport.start();
  std::vector<RawPeer> peers;
  std::string answer;
  ASSERT_TRUE(wait_until([&] {
    peers.emplace_back(over(Transport::tcp, server.endpoint));
    if (server.transport.stats().refusals.rate == 0) return false;
    for (auto& peer : peers) {
      if (peer.readable()) answer = peer.rest();
    }
    return !answer.empty();
  }));
  EXPECT_TRUE(answer.starts_with("HTTP/1.1 429 Too Many Requests\r\n")) << answer;
  EXPECT_TRUE(has(answer, "too many connections a second")) << answer;
}

TEST(RefusedWebSocket, FloodsAreCutInsteadOfPilingUp) {
  TestServer server({.shards = 1, .max_sessions = 1});
  server.echo();
  server.endpoint = server.transport.listen(websocket("127.0.0.1:0/"));
  server.transport.start();
  ClientTransport inside;
  inside.connect(server.url());
  constexpr std::size_t flood = 300;
  std::vector<RawPeer> peers;
  for (std::size_t i = 0; i < flood; ++i) peers.emplace_back(over(Transport::tcp, server.endpoint));
  std::size_t answered = 0;
  for (auto& peer : peers) {
    if (!peer.rest().empty()) ++answered;
  }
  EXPECT_GE(answered, 1U);
  EXPECT_LT(answered, flood) << "all of them were kept until they had read it";
  EXPECT_EQ(server.transport.stats().refusals.sessions, flood);
  EXPECT_EQ(inside.request("untouched").text(), "untouched");
  // Who goes makes room for others, who are told again.
  peers.clear();
  EXPECT_TRUE(wait_until([&] { return !answer_of(server.endpoint, true).empty(); }));
}

TEST(RefusedOverTcp, SeesAnOrderlyEndThoughItHasSentSomething) {
  TestServer server({.shards = 1, .max_sessions = 1});
  server.endpoint = server.transport.listen(tcp("127.0.0.1:0"));
  server.transport.start();
  const RawPeer inside(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(1));
  RawPeer refused(server.endpoint);
  ASSERT_TRUE(server.errors.wait_for(1));
  EXPECT_TRUE(refused.send(one_way(1, pattern(1000))));
  EXPECT_NO_THROW((void)refused.drain());
}

TEST(RefusedByOnConnect, WebSocketsAreToldWhy) {
  TestServer server;
  server.transport.on_connect([](Session&) { return Admission::refuse("not on the list"); });
  server.endpoint = server.transport.listen(websocket("127.0.0.1:0/"));
  server.transport.start();
  const Record<Error> ends;
  ClientTransport client;
  client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
  client.connect(server.url());
  EXPECT_EQ(ends.at(0).code, Errc::closed_by_peer);
  EXPECT_EQ(ends.at(0).text, "closed by peer, WebSocket code 1008: not on the list");
  EXPECT_EQ(server.transport.stats().refusals.on_connect, 1U);
}

// --- later

/// What a coroutine of `on_connect` does, and what became of it.
struct Script {
  std::chrono::milliseconds takes{0};
  Admission admission = {};
  bool throws = false;
  int begun = 0, ended = 0, cancelled = 0;
};

asio::awaitable<Admission> think(Script* script, Session session) {
  ++script->begun;
  EXPECT_TRUE(session.is_open());
  Simulation::Timer timer(co_await asio::this_coro::executor, script->takes);
  try {
    co_await timer.async_wait(asio::use_awaitable);
  } catch (const boost::system::system_error&) {
    ++script->cancelled;
    throw;
  }
  ++script->ended;
  if (script->throws) throw std::runtime_error("the database is gone");
  co_return script->admission;
}

auto thinks(Script& script) {
  return [&script](Session& session) { return think(&script, session); };
}

TEST(AsynchronousOnConnect, HandsNothingOutUntilItAccepts) {
  Script script{.takes = 5s, .admission = Admission::accept(std::string("alice"))};
  World world;
  world.server->on_connect(thinks(script));
  world.start();
  auto& client = world.connect();
  std::string answer;
  client.async_request("hello", [&](error_code, const Reply& reply) { answer = reply.text(); });
  client.send("one way");
  world.simulation.advance(5s - 1ms);
  EXPECT_EQ(script.begun, 1);
  EXPECT_EQ(world.got.size(), 0U);
  EXPECT_EQ(world.server->session_count(), 0U);
  EXPECT_EQ(world.server->broadcast("not for him").queued, 0U);
  auto stats = world.server->stats();
  EXPECT_EQ(stats.awaiting_admission, 1U);
  EXPECT_EQ(stats.sessions_total, 0U);
  world.simulation.advance(1ms);
  EXPECT_EQ(answer, "served: hello");
  EXPECT_EQ(world.got, (std::vector<std::string>{"hello", "one way"}));
  EXPECT_EQ(world.names.at(0), "alice");
  stats = world.server->stats();
  EXPECT_EQ(stats.awaiting_admission, 0U);
  EXPECT_EQ(stats.sessions_total, 1U);
  EXPECT_EQ(stats.sessions, 1U);
  EXPECT_EQ(stats.sessions_refused, 0U);
  client.close();
  world.simulation.advance(2s);
  EXPECT_EQ(world.ends.size(), 1U);
  EXPECT_EQ(world.server->session_count(), 0U);
}

TEST(AsynchronousOnConnect, RefusesWithoutASessionEverHavingBeenThere) {
  Script script{.takes = 1s, .admission = Admission::refuse("no such user")};
  World world({.max_sessions = 1});
  world.server->on_connect(thinks(script));
  world.start();
  world.connect();
  EXPECT_TRUE(world.clients[0].is_connected());
  world.simulation.advance(3s);
  EXPECT_FALSE(world.clients[0].is_connected());
  ASSERT_EQ(world.errors.size(), 1U);
  EXPECT_EQ(world.errors[0].error.code, Errc::refused);
  EXPECT_TRUE(has(world.errors[0].error.text, "no such user"));
  EXPECT_EQ(world.ends.size(), 0U);
  const auto stats = world.server->stats();
  EXPECT_EQ(stats.refusals.on_connect, 1U);
  EXPECT_EQ(stats.sessions_refused, 1U);
  EXPECT_EQ(stats.sessions_total, 0U);
  EXPECT_EQ(stats.awaiting_admission, 0U);
  // Its place is free again.
  script.admission = Admission::accept();
  world.connect();
  world.simulation.advance(1s);
  EXPECT_EQ(world.server->session_count(), 1U);
}

TEST(AsynchronousOnConnect, TakesAPlaceWhileItThinks) {
  Script script{.takes = 1s};
  World world({.max_sessions = 1});
  world.server->on_connect(thinks(script));
  world.start();
  world.connect();
  world.connect();
  EXPECT_EQ(script.begun, 1);
  EXPECT_EQ(world.server->stats().refusals.sessions, 1U);
}

TEST(AsynchronousOnConnect, ThatTakesTooLongIsCancelledAndRefuses) {
  Script script{.takes = 1h};
  World world({.admission_timeout = 3s});
  world.server->on_connect(thinks(script));
  world.start();
  world.connect();
  world.simulation.advance(3s - 20ms);
  EXPECT_EQ(script.cancelled, 0);
  EXPECT_TRUE(world.clients[0].is_connected());
  world.simulation.advance(3s);
  EXPECT_EQ(script.cancelled, 1);
  EXPECT_FALSE(world.clients[0].is_connected());
  ASSERT_EQ(world.errors.size(), 1U);
  EXPECT_EQ(world.errors[0].error.code, Errc::admission_timeout);
  EXPECT_TRUE(has(world.errors[0].error.text, "not admitted within 3000 ms"));
  const auto stats = world.server->stats();
  EXPECT_EQ(stats.refusals.timeout, 1U);
  EXPECT_EQ(stats.sessions_refused, 1U);
  EXPECT_EQ(stats.handler_failures, 0U) << "that it was cancelled is no failure of it";
}

TEST(AsynchronousOnConnect, IsCancelledWhenThePeerLeaves) {
  for (const bool cut : {false, true}) {
    Script script{.takes = 5s};
    World world({.max_sessions = 1});
    world.server->on_connect(thinks(script));
    world.start();
    auto& quiet = world.connect();
    if (cut) quiet.send("said before");
    world.simulation.advance(1s);
    ASSERT_EQ(script.begun, 1);
    if (cut) {
      world.clients.clear();
    } else {
      quiet.close();
    }
    world.simulation.advance(100ms);
    EXPECT_EQ(script.cancelled, 1) << cut;
    EXPECT_EQ(script.ended, 0);
    EXPECT_EQ(world.server->stats().handshake_failures, 1U);
    EXPECT_EQ(world.server->stats().awaiting_admission, 0U);
    ASSERT_FALSE(world.errors.empty());
    EXPECT_EQ(world.errors.back().error.code, Errc::closed_by_peer) << world.errors.back().error.message();
    world.simulation.advance(2s);
    script = {};
    world.connect();
    world.simulation.run();
    EXPECT_EQ(world.server->session_count(), 1U) << "its place is free";
  }
}

TEST(AsynchronousOnConnect, IsEndedByAStop) {
  Script script{.takes = 5s};
  World world;
  world.server->on_connect(thinks(script));
  world.start();
  world.connect();
  const auto begun = world.simulation.now();
  const auto report = world.stop();
  EXPECT_TRUE(report.clean());
  EXPECT_EQ(script.cancelled, 1);
  EXPECT_LT(world.simulation.now() - begun, 5s);
  EXPECT_EQ(world.server->stats().awaiting_admission, 0U);
  EXPECT_EQ(world.ends.size(), 0U);
  world.server.reset();
}

TEST(AsynchronousOnConnect, ThatThrowsRefuses) {
  Script script{.takes = 1s, .throws = true};
  World world;
  world.server->on_connect(thinks(script));
  world.start();
  world.connect();
  world.simulation.advance(3s);
  ASSERT_EQ(world.errors.size(), 2U);
  EXPECT_EQ(world.errors[0].error.code, Errc::handler_failed);
  EXPECT_EQ(world.errors[0].error.text, "the database is gone");
  EXPECT_TRUE(world.errors[0].exception);
  EXPECT_EQ(world.errors[1].error.code, Errc::refused);
  EXPECT_EQ(world.server->stats().handler_failures, 1U);
  EXPECT_EQ(world.server->stats().refusals.on_connect, 1U);
  EXPECT_FALSE(world.clients[0].is_connected());
}

TEST(AsynchronousOnConnect, DoesNotCountAgainstTheDeadlinesOfTheSession) {
  Script script{.takes = 1h};
  World world({.admission_timeout = 0ms, .session = {.first_packet_timeout = 2s, .idle_timeout = 3s}});
  world.server->on_connect(thinks(script));
  world.start();
  world.connect();
  world.simulation.advance(1h);
  EXPECT_EQ(world.server->session_count(), 1U);
  world.simulation.advance(2s - 20ms);
  EXPECT_EQ(world.server->session_count(), 1U);
  world.simulation.advance(2s);
  ASSERT_EQ(world.ends.size(), 1U);
  EXPECT_EQ(world.ends[0].code, Errc::first_packet_timeout);
}

TEST(AsynchronousOnConnect, ReadsNoMoreThanTheFirstOfAFlood) {
  Script script{.takes = 5s};
  World world;
  world.server->on_connect(thinks(script));
  world.start();
  auto& client = world.connect();
  std::size_t taken = 0;
  // 100 MB, as fast as it goes: the pipe and one read of it take some, the rest stays with the client.
  for (int i = 0; i < 100; ++i) {
    if (client.send(pattern(1 << 20)) == SendResult::queued) ++taken;
    world.simulation.advance(10ms);
  }
  EXPECT_LT(taken, 40U);
  EXPECT_LT(world.server->stats().bytes_in, 3U << 20);
  world.simulation.advance(5s);
  EXPECT_EQ(world.got.size(), taken);
}

TEST(AsynchronousOnConnect, GivesTheSessionItsCoroutineWhenItIsAccepted) {
  Script script{.takes = 1s};
  World world;
  world.server->on_message({});
  world.server->on_connect(thinks(script));
  std::vector<std::string> received;
  struct Behaviour {
    static asio::awaitable<void> run(SessionActor actor, std::vector<std::string>* into) {
      for (;;) {
        const auto message = co_await actor.receive();
        if (!message) break;
        into->emplace_back(message->text());
      }
    }
  };
  world.server->on_session([&received](SessionActor actor) { return Behaviour::run(std::move(actor), &received); });
  world.start();
  auto& client = world.connect();
  client.send("early");
  world.simulation.advance(900ms);
  EXPECT_EQ(world.server->actor_manager().size(), 0U);
  world.simulation.advance(200ms);
  EXPECT_EQ(received, std::vector<std::string>{"early"});
  client.close();
  world.simulation.advance(2s);
}

// --- the first message

asio::awaitable<Admission> log_in(Script* script, Session session, OwnedMessage first) {
  ++script->begun;
  Simulation::Timer timer(co_await asio::this_coro::executor, script->takes);
  co_await timer.async_wait(asio::use_awaitable);
  if (first.text() != "login alice") {
    first.respond("wrong");
    session.send("goodbye");
    co_return Admission::refuse("wrong login: " + std::string(first.text()));
  }
  first.respond("welcome");
  co_return Admission::accept(std::string("alice"));
}

auto logs_in(Script& script) {
  return [&script](Session& session, OwnedMessage first) { return log_in(&script, session, std::move(first)); };
}

TEST(OnConnectWithTheFirstMessage, AnswersTheLoginAndTakesItAway) {
  Script script{.takes = 1s};
  World world;
  world.server->on_connect(logs_in(script));
  world.start();
  auto& client = world.connect();
  world.simulation.advance(1s);
  EXPECT_EQ(script.begun, 0) << "nothing has come yet";
  std::vector<std::string> answers;
  for (const char* text : {"login alice", "second", "third"}) {
    client.async_request(text, [&](error_code, const Reply& reply) { answers.emplace_back(reply.text()); });
  }
  world.simulation.advance(900ms);
  EXPECT_EQ(script.begun, 1);
  EXPECT_EQ(answers.size(), 0U);
  world.simulation.advance(200ms);
  EXPECT_EQ(answers, (std::vector<std::string>{"welcome", "served: second", "served: third"}));
  EXPECT_EQ(world.got, (std::vector<std::string>{"second", "third"}));
  EXPECT_EQ(world.names, (std::vector<std::string>{"alice", "alice"}));
}

asio::awaitable<Admission> keep_first(std::vector<OwnedMessage>* kept, Session, OwnedMessage first) {
  kept->push_back(std::move(first));
  co_return Admission::accept();
}

TEST(OnConnectWithTheFirstMessage, CountsItAmongTheRequestsInFlight) {
  World world({.session = {.max_requests_in_flight = 1}});
  std::vector<OwnedMessage> kept;
  world.server->on_connect(
      [&kept](Session& session, OwnedMessage first) { return keep_first(&kept, session, std::move(first)); });
  world.start();
  auto& client = world.connect();
  std::vector<std::string> answers;
  for (const char* text : {"first", "second"}) {
    client.async_request(text, [&](error_code, const Reply& reply) { answers.emplace_back(reply.text()); });
  }
  world.simulation.run();
  ASSERT_EQ(kept.size(), 1U);
  EXPECT_EQ(world.got.size(), 0U) << "handed out though one is owed";
  kept[0].respond("done");
  world.simulation.run();
  EXPECT_EQ(answers, (std::vector<std::string>{"done", "served: second"}));
}

TEST(OnConnectWithTheFirstMessage, RefusesBehindTheAnswer) {
  Script script{.takes = 1s};
  World world;
  world.server->on_connect(logs_in(script));
  world.start();
  auto& client = world.connect();
  std::string answer;
  error_code second;
  client.async_request("login mallory", [&](error_code, const Reply& reply) { answer = reply.text(); });
  client.async_request("let me in", [&](error_code code, const Reply&) { second = code; });
  world.simulation.advance(4s);
  EXPECT_EQ(answer, "wrong");
  EXPECT_EQ(second, Errc::connection_lost);
  EXPECT_EQ(world.got.size(), 0U);
  EXPECT_FALSE(client.is_connected());
  EXPECT_EQ(world.server->stats().refusals.on_connect, 1U);
  EXPECT_EQ(world.server->stats().dropped_at_close, 0U);
  EXPECT_TRUE(has(world.errors.at(0).error.text, "wrong login: login mallory"));
}

TEST(OnConnectWithTheFirstMessage, WaitsNoLongerThanItMay) {
  Script script;
  World world({.admission_timeout = 3s, .session = {.first_packet_timeout = 0ms}});
  world.server->on_connect(logs_in(script));
  world.start();
  world.connect();
  world.simulation.advance(6s);
  EXPECT_EQ(script.begun, 0);
  EXPECT_FALSE(world.clients[0].is_connected());
  EXPECT_EQ(world.server->stats().refusals.timeout, 1U);
}

TEST(OnConnectWithTheFirstMessage, OfAPeerThatBreaksTheProtocolIsNotAsked) {
  TestServer server;
  server.transport.on_connect([](Session&, OwnedMessage) -> asio::awaitable<Admission> {
    ADD_FAILURE();
    co_return Admission::accept();
  });
  server.endpoint = server.transport.listen(tcp("127.0.0.1:0"));
  server.transport.start();
  RawPeer peer(server.endpoint);
  peer.send(std::string(64, 'x'));
  EXPECT_TRUE(peer.sees_end());
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().handshake_failures_by.protocol_errors() == 1; }));
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().awaiting_admission == 0; }));
  EXPECT_EQ(server.ends.size(), 0U);
}

// --- with a promise

TEST(OnConnectWithAPromise, DecidesOnAnyThread) {
  TestServer server;
  server.echo();
  Record<std::shared_ptr<AdmissionPromise>> promises;
  server.transport.on_connect([promises](Session&, AdmissionPromise promise) {
    promises.add(std::make_shared<AdmissionPromise>(std::move(promise)));
  });
  server.endpoint = server.transport.listen(tcp("127.0.0.1:0"));
  server.transport.start();
  ClientTransport client;
  client.connect(server.url());
  auto answer = ask(client, "hello");
  const auto promise = promises.at(0);
  EXPECT_TRUE(promise->is_awaited());
  EXPECT_EQ(answer.wait_for(50ms), std::future_status::timeout);
  promise->decide(Admission::accept());
  promise->decide(Admission::refuse());
  EXPECT_FALSE(promise->is_awaited());
  EXPECT_EQ(in_time(answer).second.text(), "hello");
}

TEST(OnConnectWithAPromise, RefusesWhenItIsDropped) {
  World world;
  std::optional<AdmissionPromise> kept;
  world.server->on_connect(
      [&kept](Session&, OwnedMessage, AdmissionPromise promise) { kept.emplace(std::move(promise)); });
  world.start();
  auto& client = world.connect();
  client.send("hello");
  world.simulation.advance(1s);
  ASSERT_TRUE(kept);
  EXPECT_TRUE(client.is_connected());
  kept.reset();
  world.simulation.advance(3s);
  EXPECT_FALSE(client.is_connected());
  EXPECT_EQ(world.server->stats().refusals.on_connect, 1U);
}

TEST(OnConnectWithAPromise, OfOneWhoHasLeftIsNotAwaited) {
  World world;
  std::optional<AdmissionPromise> kept;
  world.server->on_connect([&kept](Session&, AdmissionPromise promise) { kept.emplace(std::move(promise)); });
  world.start();
  world.connect().close();
  world.simulation.advance(3s);
  ASSERT_TRUE(kept);
  EXPECT_FALSE(kept->is_awaited());
  kept->decide(Admission::accept());
  world.simulation.run();
  EXPECT_EQ(world.server->session_count(), 0U);
  EXPECT_EQ(world.server->stats().sessions_total, 0U);
}

TEST(OnConnectWithAPromise, ThatThrowsRefuses) {
  World world;
  world.server->on_connect([](Session&, AdmissionPromise) { throw std::runtime_error("bad day"); });
  world.start();
  world.connect();
  world.simulation.advance(3s);
  EXPECT_FALSE(world.clients[0].is_connected());
  ASSERT_FALSE(world.errors.empty());
  EXPECT_EQ(world.errors[0].error.text, "bad day");
  EXPECT_EQ(world.server->stats().refusals.on_connect, 1U);
}

TEST(AsynchronousOnConnect, OverWebSocketTellsWhyItRefuses) {
  TestServer server({.admission_timeout = 200ms});
  const Record<std::shared_ptr<AdmissionPromise>> promises;
  server.transport.on_connect([promises](Session&, AdmissionPromise promise) {
    promises.add(std::make_shared<AdmissionPromise>(std::move(promise)));
  });
  server.endpoint = server.transport.listen(websocket("127.0.0.1:0/"));
  server.transport.start();
  const Record<Error> ends;
  for (std::size_t i = 0; i < 2; ++i) {
    ClientTransport client;
    client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
    client.connect(server.url());
    if (i == 0) promises.at(0)->decide(Admission::refuse("no such user"));
    ASSERT_TRUE(ends.wait_for(i + 1));
  }
  EXPECT_EQ(ends.at(0).text, "closed by peer, WebSocket code 1008: no such user");
  EXPECT_EQ(ends.at(1).text, "closed by peer, WebSocket code 1008: not admitted within 200 ms");
}

// --- without descriptors

/// Takes all descriptors that the process may have, and gives them back.
class NoDescriptors {
 public:
  NoDescriptors() {
    ::getrlimit(RLIMIT_NOFILE, &before_);
    rlimit few = before_;
    few.rlim_cur = std::min<rlim_t>(before_.rlim_cur, 1024);  // or it would take long
    ::setrlimit(RLIMIT_NOFILE, &few);
    for (int one; (one = ::open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0;) taken_.push_back(one);
  }
  ~NoDescriptors() { give_back(); }
  void give_back() {
    for (const int one : std::exchange(taken_, {})) ::close(one);
    ::setrlimit(RLIMIT_NOFILE, &before_);
  }
  NoDescriptors(const NoDescriptors&) = delete;
  NoDescriptors& operator=(const NoDescriptors&) = delete;

 private:
  rlimit before_{};
  std::vector<int> taken_;
};

TEST(WithoutDescriptors, AcceptingGoesOnWhenThereAreSomeAgain) {
  if (types_checked_by_pipe) GTEST_SKIP() << "the sanitizer needs descriptors itself";
  TestServer server({.shards = 1});
  server.echo();
  server.endpoint = server.transport.listen(tcp("127.0.0.1:0"));
  server.transport.start();
  ClientTransport inside;
  inside.connect(server.url());
  ASSERT_TRUE(server.came.wait_for(1));  // it needs a descriptor of the server too
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  ASSERT_GE(socket, 0);
  RawPeer waiting(socket);
  {
    NoDescriptors none;
    const SocketAddress address(server.endpoint);
    ASSERT_EQ(::connect(socket, address.data(), address.size()), 0) << "the system keeps it waiting";
    const End told = server.errors.at(0);
    EXPECT_EQ(told.code, error_code(EMFILE, boost::system::system_category())) << told.code.message();
    EXPECT_GE(server.transport.stats().accept_failures, 1U);
    EXPECT_EQ(inside.request("still served").text(), "still served");
    // It tries again now and then, and does not spin.
    const auto failures = server.transport.stats().accept_failures;
    EXPECT_TRUE(wait_until([&] { return server.transport.stats().accept_failures > failures; }));
    const auto from = Clock::now();
    const auto before = server.transport.stats().accept_failures;
    std::this_thread::sleep_for(300ms);
    const auto passed = std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - from);
    EXPECT_LE(server.transport.stats().accept_failures - before, static_cast<std::uint64_t>(passed.count()) / 100 + 2);
  }
  EXPECT_TRUE(waiting.send(request(1, "now")));
  EXPECT_EQ(waiting.next().payload, "now");
}

}  // namespace
}  // namespace msgtrans::test
