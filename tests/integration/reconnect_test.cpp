// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/io_context.hpp>
#include <deque>
#include <map>
#include <msgtrans/pool/connection_pool.hpp>
#include <msgtrans/pool/health_checker.hpp>
#include <msgtrans/pool/load_balancer.hpp>
#include <msgtrans/testing/simulation.hpp>
#include <set>
#include <string>
#include <vector>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using testing::Simulation;
using Strings = std::vector<std::string>;

constexpr ReconnectOptions plain{.enabled = true, .jitter = 0, .reset_after = 0ms};

ReconnectOptions keeping(std::size_t packets) {
  ReconnectOptions options = plain;
  options.keep_packets = packets;
  return options;
}

ReconnectOptions retrying(std::size_t requests) {
  ReconnectOptions options = plain;
  options.retry_requests = requests;
  return options;
}

/// A server that can be there or not.
class Host {
 public:
  Host(Simulation& simulation, std::string name) : simulation_(simulation), name_(std::move(name)) {}

  void start() {
    transport_.emplace(ServerOptions{.executors = {simulation_.executor()}, .session = session});
    transport_->on_connect([this](Session& one) {
      ++sessions;
      if (!greeting.empty()) one.send(greeting);
    });
    transport_->on_message([this](Session& one, const Message& message) {
      got.emplace_back(message.text());
      told.push_back(message.told_timeout());
      if (message.is_request() && answers) one.respond(message, message.payload());
    });
    transport_->listen(in_process(name_));
    transport_->start();
  }
  void stop() {
    cut();
    transport_.reset();
    simulation_.run();
  }
  /// All connections, both ways.
  void cut() {
    std::vector<Endpoint> peers;
    transport_->session_manager().for_each([&](const Session& one) { peers.push_back(one.peer()); });
    for (const auto& peer : peers) simulation_.cut(peer);
    simulation_.run();
  }
  [[nodiscard]] std::string url() const { return "inproc://" + name_; }

  SessionOptions session{.first_packet_timeout = 0ms};
  std::string greeting;
  bool answers = true;
  int sessions = 0;
  Strings got;
  std::vector<std::optional<std::chrono::milliseconds>> told;  // of what it got

 private:
  Simulation& simulation_;
  std::string name_;
  std::optional<ServerTransport> transport_;
};

/// What happened to a client, in words, and when.
class World {
 public:
  explicit World(std::uint64_t seed = 1) : simulation(seed) {}

  Host& host() { return hosts.emplace_back(simulation, unused_name()); }

  ClientTransport& make(const ReconnectOptions& reconnect,
                        const SessionOptions& session = {.first_packet_timeout = 0ms}) {
    client.emplace(ClientOptions{.executor = simulation.executor(), .session = session, .reconnect = reconnect});
    client->on_connect([this](Session& one, const ConnectInfo& info) {
      note((info.reconnection ? "again " : "first ") + std::to_string(info.attempt));
      urls.push_back(info.url);
      if (at_connect) at_connect(one);
    });
    client->on_disconnect([this](Session&, const Error& reason) {
      note("lost");
      last = reason.code;
    });
    client->on_reconnecting([this](const ReconnectEvent& event) {
      note("wait " + std::to_string(event.attempt));
      delays.push_back(event.delay);
      last = event.error.code;
      if (at_reconnecting) at_reconnecting();
    });
    client->on_gave_up([this](const Error& error) {
      note("gave up");
      last = error.code;
    });
    client->on_message([this](Session&, const Message& message) { note("got " + std::string(message.text())); });
    return *client;
  }

  /// A client like that, connected to a server that is started for it.
  ClientTransport& make_connected(Host& host, const ReconnectOptions& reconnect,
                                  const SessionOptions& session = {.first_packet_timeout = 0ms}) {
    host.start();
    make(reconnect, session);
    if (const auto code = connect(host)) throw boost::system::system_error(code, "connecting");
    return *client;
  }

  error_code connect(const Strings& targets) {
    std::optional<error_code> told;
    client->async_connect(targets, [&](error_code code) {
      told = code;
      note("connected");
    });
    EXPECT_TRUE(simulation.run_until([&] { return told.has_value(); }, 1h));
    return told.value_or(error_code());
  }
  error_code connect(const Host& host) { return connect(Strings{host.url()}); }
  void note(std::string what) {
    log.push_back(std::move(what));
    times.push_back(simulation.now());
  }
  [[nodiscard]] ClientStats stats() const { return client->client_stats(); }
  /// How often it happened.
  [[nodiscard]] long count(const std::string& what) const { return std::ranges::count(log, what); }

  Simulation simulation;
  std::deque<Host> hosts;
  std::function<void(Session&)> at_connect;
  std::function<void()> at_reconnecting;
  Strings log, urls;
  std::vector<Simulation::Clock::time_point> times;
  std::vector<std::chrono::milliseconds> delays;
  error_code last;
  std::optional<ClientTransport> client;  // goes first
};

// --- when

TEST(Reconnect, IsOffByDefault) {
  World world;
  auto& host = world.host();
  host.start();
  world.make({});
  ASSERT_FALSE(world.connect(host));
  host.cut();
  world.simulation.advance(1h);
  EXPECT_EQ(world.log, (Strings{"first 0", "connected", "lost"}));
  EXPECT_EQ(host.sessions, 1);
  EXPECT_FALSE(world.connect(host));
}

TEST(Reconnect, WaitsAsLongAsItSaysBeforeEachAttempt) {
  World world;
  auto& host = world.host();
  host.start();
  world.make({.enabled = true, .initial_delay = 100ms, .factor = 2, .max_delay = 500ms, .jitter = 0});
  ASSERT_FALSE(world.connect(host));
  world.simulation.advance(1min);
  const auto begun = world.simulation.now();
  host.stop();
  EXPECT_EQ(world.last, error_code(ECONNRESET, boost::system::system_category()));
  world.simulation.advance(1600ms);
  EXPECT_EQ(world.last, error_code(asio::error::connection_refused));
  host.start();
  world.simulation.advance(1s);
  EXPECT_EQ(world.log,
            (Strings{"first 0", "connected", "lost", "wait 1", "wait 2", "wait 3", "wait 4", "wait 5", "again 5"}));
  EXPECT_EQ(world.delays, (std::vector<std::chrono::milliseconds>{100ms, 200ms, 400ms, 500ms, 500ms}));
  const std::vector<std::chrono::milliseconds> at{0ms, 100ms, 300ms, 700ms, 1200ms, 1700ms};
  for (std::size_t i = 0; i < at.size(); ++i) EXPECT_EQ(world.times[3 + i] - begun, at[i]) << i;
  const auto stats = world.stats();
  EXPECT_EQ(stats.connections, 2U);
  EXPECT_EQ(stats.attempts, 6U);
  EXPECT_EQ(stats.tries, 6U);
  EXPECT_EQ(stats.failures, 4U);
}

TEST(Reconnect, BeginsWithTheInitialDelayOfTheOptions) {
  World world;
  auto& host = world.host();
  host.start();
  world.make({.enabled = true, .initial_delay = 7s, .factor = 3, .jitter = 0});
  ASSERT_FALSE(world.connect(host));
  host.stop();
  world.simulation.advance(1min);
  EXPECT_EQ(world.delays, (std::vector<std::chrono::milliseconds>{7s, 21s, 30s, 30s}));
}

std::vector<std::chrono::milliseconds> jittered(std::uint64_t seed, double jitter) {
  World world;
  auto& host = world.host();
  host.start();
  world.make({.enabled = true, .factor = 1, .jitter = jitter, .jitter_seed = seed});
  EXPECT_FALSE(world.connect(host));
  host.stop();
  world.simulation.advance(1min);
  return world.delays;
}

TEST(Reconnect, JitterIsWithinItsBoundsAndFromItsSeed) {
  const auto delays = jittered(7, 0.3);
  ASSERT_GT(delays.size(), 400U);
  for (const auto delay : delays) {
    EXPECT_GE(delay, 70ms);
    EXPECT_LE(delay, 130ms);
  }
  const auto [least, most] = std::ranges::minmax(delays);
  EXPECT_LT(least, 75ms);
  EXPECT_GT(most, 125ms);
  EXPECT_EQ(delays, jittered(7, 0.3));
  EXPECT_NE(delays, jittered(8, 0.3));
  EXPECT_NE(jittered(0, 0.3), jittered(0, 0.3));
}

TEST(Reconnect, GivesUpAfterSoManyAttempts) {
  World world;
  auto& host = world.host();
  host.start();
  ReconnectOptions options = plain;
  options.max_attempts = 3;
  options.keep_packets = 10;
  auto& client = world.make(options);
  ASSERT_FALSE(world.connect(host));
  host.stop();
  EXPECT_EQ(client.send("kept in vain"), SendResult::queued);
  world.simulation.advance(1h);
  EXPECT_EQ(world.log, (Strings{"first 0", "connected", "lost", "wait 1", "wait 2", "wait 3", "gave up"}));
  EXPECT_EQ(world.last, error_code(asio::error::connection_refused));
  EXPECT_EQ(client.send("too late"), SendResult::closed);
  EXPECT_EQ(world.stats().kept_dropped, 1U);
  EXPECT_EQ(world.stats().kept_packets, 0U);
  host.start();
  world.simulation.advance(1h);
  EXPECT_EQ(host.sessions, 1);
  EXPECT_FALSE(world.connect(host));
  EXPECT_TRUE(client.is_connected());
}

TEST(Reconnect, MayConnectAgainFromTheHandlerOfGivingUp) {
  World world;
  auto& host = world.host();
  host.start();
  ReconnectOptions options = plain;
  options.max_attempts = 1;
  auto& client = world.make(options);
  bool again = false;
  client.on_gave_up([&](const Error&) {
    host.start();
    client.async_connect(host.url(), [&](error_code code) { again = !code; });
  });
  ASSERT_FALSE(world.connect(host));
  host.stop();
  world.simulation.advance(1s);
  EXPECT_TRUE(again);
  EXPECT_TRUE(client.is_connected());
}

TEST(Reconnect, OnlyAConnectionThatHeldResetsTheBackoff) {
  World world;
  auto& host = world.host();
  host.start();
  world.make({.enabled = true, .factor = 2, .jitter = 0, .reset_after = 10s});
  ASSERT_FALSE(world.connect(host));
  for (int i = 0; i < 3; ++i) {
    world.simulation.advance(9s);
    host.cut();
    world.simulation.advance(900ms);  // connected again for a part of it
  }
  EXPECT_EQ(world.delays, (std::vector<std::chrono::milliseconds>{100ms, 200ms, 400ms}));
  world.simulation.advance(10s);
  host.cut();
  EXPECT_EQ(world.delays.back(), 100ms);
  EXPECT_EQ(world.log.back(), "wait 1");
}

TEST(Reconnect, ConnectionsThatDoNotHoldCountForGivingUp) {
  World world;
  auto& host = world.host();
  host.start();
  world.make({.enabled = true, .jitter = 0, .max_attempts = 2, .reset_after = 10s});
  ASSERT_FALSE(world.connect(host));
  for (int i = 0; i < 3; ++i) {
    host.cut();
    world.simulation.advance(1s);
  }
  EXPECT_EQ(world.log, (Strings{"first 0", "connected", "lost", "wait 1", "again 1", "lost", "wait 2", "again 2",
                                "lost", "gave up"}));
}

TEST(Reconnect, ClosingASessionIsALossLikeAnother) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, plain);
  client.session()->close();
  world.simulation.advance(1s);
  EXPECT_EQ(world.log, (Strings{"first 0", "connected", "lost", "wait 1", "again 1"}));
}

TEST(Reconnect, FirstConnectFailsAtOnceUnlessItIsToBeRetried) {
  World world;
  auto& host = world.host();
  world.make(plain);
  EXPECT_EQ(world.connect(host), error_code(asio::error::connection_refused));
  world.simulation.advance(1h);
  EXPECT_EQ(world.stats().tries, 1U);
  EXPECT_EQ(world.log, Strings{"connected"});

  ReconnectOptions patient = plain;
  patient.retry_first_connect = true;
  auto& client = world.make(patient);
  std::optional<error_code> told;
  client.async_connect(host.url(), [&](error_code code) { told = code; });
  world.simulation.advance(1s);
  EXPECT_FALSE(told);
  host.start();
  world.simulation.advance(10s);
  EXPECT_EQ(told, error_code());
  EXPECT_EQ(world.log.back(), "first " + std::to_string(world.delays.size()));
}

TEST(Reconnect, FirstConnectThatIsRetriedIsToldWhenItIsGivenUp) {
  World world;
  auto& host = world.host();
  ReconnectOptions options = plain;
  options.retry_first_connect = true;
  options.max_attempts = 2;
  auto& client = world.make(options);
  EXPECT_EQ(world.connect(host), error_code(asio::error::connection_refused));
  EXPECT_EQ(world.log, (Strings{"wait 1", "wait 2", "connected"})) << "on_gave_up is for when nobody waits";

  options.max_attempts = 0;
  auto& second = world.make(options);
  (void)client;
  asio::cancellation_signal signal;
  std::optional<error_code> told;
  second.async_connect(host.url(), asio::bind_cancellation_slot(signal.slot(), [&](error_code code) { told = code; }));
  world.simulation.advance(10s);
  EXPECT_FALSE(told);
  signal.emit(asio::cancellation_type::terminal);
  world.simulation.run();
  EXPECT_EQ(told, error_code(asio::error::operation_aborted));
  const auto tries = world.stats().tries;
  world.simulation.advance(1h);
  EXPECT_EQ(world.stats().tries, tries);
}

// --- where

TEST(Failover, TriesTheEndpointsInOrderWithinOneAttempt) {
  World world;
  auto& a = world.host();
  auto& b = world.host();
  auto& c = world.host();
  c.start();
  world.make({});  // needs no reconnecting
  ASSERT_FALSE(world.connect({a.url(), b.url(), c.url()}));
  EXPECT_EQ(world.urls, Strings{c.url()});
  EXPECT_EQ(world.stats().attempts, 1U);
  EXPECT_EQ(world.stats().tries, 3U);
  EXPECT_EQ(world.stats().failures, 2U);
}

TEST(Failover, TellsOfAllEndpointsWhenNoneCanBeReached) {
  World world;
  auto& a = world.host();
  auto& b = world.host();
  world.make({});
  EXPECT_EQ(world.connect({a.url(), b.url()}), error_code(asio::error::connection_refused));
  EXPECT_EQ(world.stats().tries, 2U);
  // With sockets, blocking.
  ClientTransport client;
  Error error;
  client.connect({"unix:///nonexistent/a", "unix:///nonexistent/b"}, error);
  EXPECT_EQ(error.code, error_code(ENOENT, boost::system::system_category()));
  EXPECT_NE(error.text.find("nonexistent/a"), std::string::npos) << error.text;
  EXPECT_NE(error.text.find("nonexistent/b"), std::string::npos) << error.text;
}

TEST(Failover, RefusesAListWithAnUrlThatMakesNoSense) {
  ClientTransport client;
  EXPECT_EQ(thrown([&] { client.connect({"tcp://127.0.0.1:1", "nonsense"}); }), Errc::invalid_address);
  EXPECT_EQ(thrown([&] { client.connect(Strings{}); }), Errc::invalid_address);
  EXPECT_EQ(client.client_stats().tries, 0U);
}

TEST(Failover, ReturnsToTheFirstAfterAConnectionThatHeld) {
  World world;
  auto& a = world.host();
  auto& b = world.host();
  b.start();
  world.make({.enabled = true, .jitter = 0, .reset_after = 5s});
  ASSERT_FALSE(world.connect({a.url(), b.url()}));
  a.start();
  world.simulation.advance(5s);
  b.cut();
  world.simulation.advance(1s);
  EXPECT_EQ(world.urls, (Strings{b.url(), a.url()}));
}

TEST(Failover, GoesOnBehindAnEndpointThatDidNotHold) {
  World world;
  auto& a = world.host();
  auto& b = world.host();
  a.start();
  b.start();
  world.make({.enabled = true, .jitter = 0, .reset_after = 5s});
  ASSERT_FALSE(world.connect({a.url(), b.url()}));
  a.cut();
  world.simulation.advance(1s);
  b.cut();
  world.simulation.advance(1s);
  EXPECT_EQ(world.urls, (Strings{a.url(), b.url(), a.url()}));
  EXPECT_EQ(world.log.back(), "again 2");
}

TEST(Failover, WaitsOnlyBetweenWholeRounds) {
  World world;
  auto& a = world.host();
  auto& b = world.host();
  a.start();
  world.make({.enabled = true, .factor = 1, .jitter = 0, .reset_after = 0ms});
  ASSERT_FALSE(world.connect({a.url(), b.url()}));
  a.stop();
  const auto before = world.stats().tries;
  world.simulation.advance(1s);
  EXPECT_EQ(world.stats().tries - before, 20U);  // both, ten times
  EXPECT_EQ(world.delays.size(), 11U);
}

// --- hooks

TEST(ReconnectHooks, ComeInOrderAndOnceForEachConnection) {
  World world;
  auto& host = world.host();
  host.greeting = "hello";
  host.start();
  world.make(plain);
  ASSERT_FALSE(world.connect(host));
  for (int i = 0; i < 3; ++i) {
    world.simulation.advance(1s);
    host.cut();
  }
  world.simulation.advance(1s);
  world.client->close();
  world.simulation.advance(1h);
  Strings expected{"first 0", "connected", "got hello"};
  if (world.log.size() > 1 && world.log[1] == "got hello") std::swap(expected[1], expected[2]);
  for (int i = 0; i < 3; ++i) expected.insert(expected.end(), {"lost", "wait 1", "again 1", "got hello"});
  expected.emplace_back("lost");
  EXPECT_EQ(world.log, expected);
}

TEST(ReconnectHooks, AreSetBeforeConnecting) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, plain);
  host.stop();
  EXPECT_EQ(thrown([&] { client.on_connect({}); }), Errc::wrong_state);
  EXPECT_EQ(thrown([&] { client.on_reconnecting({}); }), Errc::wrong_state);
  EXPECT_EQ(thrown([&] { client.on_gave_up({}); }), Errc::wrong_state);
}

TEST(ReconnectHooks, WhatOnConnectSendsGoesFirstThenRequestsThenWhatWasKept) {
  World world;
  auto& host = world.host();
  host.start();
  ReconnectOptions options = plain;
  options.keep_packets = 100;
  options.retry_requests = 100;
  auto& client = world.make(options);
  ASSERT_FALSE(world.connect(host));
  host.answers = false;
  std::vector<error_code> answers;
  const auto noted = [&](error_code code, const Reply&) { answers.push_back(code); };
  client.async_request("asked before", {.timeout = 1h}, noted);
  world.simulation.run();
  host.stop();
  host.got.clear();
  client.send("kept 1");
  bool sent = false;
  client.async_send("kept 2", {}, [&](error_code code) { sent = !code; });
  client.async_request("asked meanwhile", {.timeout = 1h}, noted);
  client.send("kept urgently", {.high_priority = true});
  world.simulation.run();
  EXPECT_TRUE(sent) << "it is accepted when it is kept";
  world.at_connect = [&](Session& session) {
    EXPECT_TRUE(client.is_connected());
    EXPECT_EQ(session.send("hook 1"), SendResult::queued);
    EXPECT_EQ(client.send("hook 2"), SendResult::queued);
    client.async_send("hook 3", {}, [](error_code code) { EXPECT_FALSE(code); });
    client.async_request("hook 4", {.timeout = 1h}, noted);
    session.async_request("hook 5", {.timeout = 1h}, noted);
    EXPECT_EQ(session.send("hook 6"), SendResult::queued);
  };
  host.answers = true;
  host.start();
  world.simulation.advance(1s);
  // The urgent lane overtakes, as always.
  auto got = host.got;
  EXPECT_EQ(std::erase(got, "kept urgently"), 1U);
  EXPECT_EQ(got, (Strings{"hook 1", "hook 2", "hook 3", "hook 4", "hook 5", "hook 6", "asked before", "asked meanwhile",
                          "kept 1", "kept 2"}));
  EXPECT_EQ(answers.size(), 4U);
  EXPECT_EQ(std::ranges::count(answers, error_code()), 4);
}

TEST(ReconnectHooks, ThatThrowEndTheSessionAndAreReported) {
  World world;
  auto& host = world.host();
  host.start();
  auto& client = world.make(plain);
  std::vector<Error> errors;
  client.on_error([&](const ErrorEvent& event) { errors.push_back(event.error); });
  int left = 2;
  world.at_connect = [&](Session&) {
    if (left-- > 0) throw std::runtime_error("no");
  };
  world.at_reconnecting = [] { throw std::runtime_error("nor this"); };
  ASSERT_FALSE(world.connect(host));
  world.simulation.advance(1s);
  ASSERT_EQ(errors.size(), 4U);
  EXPECT_EQ(errors[0].code, Errc::handler_failed);
  EXPECT_EQ(errors[0].text, "no");
  EXPECT_EQ(errors[1].text, "nor this");
  EXPECT_EQ(world.last, Errc::handler_failed);
  EXPECT_EQ(world.count("lost"), 2);
  EXPECT_TRUE(client.is_connected());
  EXPECT_EQ(world.stats().handler_failures, 4U);
}

TEST(ReconnectHooks, AreCalledWithoutReconnectingToo) {
  TestServer server;
  server.echo().start();
  ClientTransport client;
  Record<std::string> seen;
  client.on_connect([seen](Session& session, const ConnectInfo& info) mutable {
    seen.add(info.url + (info.reconnection ? " again" : ""));
    session.send("from the hook");
  });
  client.on_message([seen](Session&, const Message& message) mutable { seen.add(std::string(message.text())); });
  client.connect(server.url());
  EXPECT_EQ(seen.size() >= 1 ? seen.at(0) : "", server.url()) << "before connect() has returned";
  EXPECT_EQ(seen.at(1), "from the hook");
}

// --- what is kept

TEST(Kept, NothingIsByDefault) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, plain);
  host.stop();
  EXPECT_EQ(client.send("x"), SendResult::closed);
  error_code code;
  client.async_send("x", {}, [&](error_code told) { code = told; });
  world.simulation.run();
  EXPECT_EQ(code, Errc::closed);
}

TEST(Kept, IsSentInOrderAndBeforeWhatIsSentLater) {
  World world;
  auto& host = world.host();
  // Less than is kept: it has to wait for room there.
  auto& client = world.make_connected(host, keeping(1000), {.outbound_packets = 3, .first_packet_timeout = 0ms});
  host.stop();
  Strings expected;
  const auto send = [&](SendResult wanted) {
    const auto text = std::to_string(expected.size());
    EXPECT_EQ(client.send(text), wanted);
    if (wanted == SendResult::queued) expected.push_back(text);
  };
  for (int i = 0; i < 500; ++i) send(SendResult::queued);
  EXPECT_EQ(world.stats().kept_packets, 500U);
  host.start();
  world.simulation.set_faults({.stall = 0.9, .longest_stall = 1ms, .least_delay = 1ms, .most_delay = 3ms});
  while (!client.is_connected()) world.simulation.advance(1ms);
  EXPECT_GT(world.stats().kept_packets, 400U) << "the next ones have something to wait for";
  for (int i = 0; i < 100; ++i) {
    send(SendResult::queued);
    world.simulation.run();
  }
  world.simulation.advance(10min);
  send(SendResult::queued);
  world.simulation.advance(10s);
  EXPECT_EQ(host.got, expected);
  EXPECT_EQ(world.stats().kept_packets, 0U);
  EXPECT_EQ(world.stats().kept_bytes, 0U);
  EXPECT_EQ(world.stats().kept_total, 600U) << "the last one had nobody before it";
  EXPECT_EQ(world.stats().kept_dropped, 0U);
}

TEST(Kept, PacketsAreBoundedAndTheNextOneWouldBlock) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(3));
  host.stop();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(client.send("x", {.high_priority = i == 1}), SendResult::queued);
  EXPECT_EQ(client.send("x"), SendResult::would_block);
  EXPECT_EQ(client.send("x", {.high_priority = true}), SendResult::would_block);
  EXPECT_EQ(world.stats().kept_packets, 3U);
  host.start();
  world.simulation.advance(1s);
  EXPECT_EQ(host.got.size(), 3U);
}

TEST(Kept, BytesAreBoundedToTheLast) {
  World world;
  auto& host = world.host();
  host.start();
  ReconnectOptions options = plain;
  options.keep_packets = 100;
  options.keep_bytes = 2 * (wire::header_size + 10);
  auto& client = world.make(options, {.max_payload = 1000, .first_packet_timeout = 0ms});
  ASSERT_FALSE(world.connect(host));
  host.stop();
  EXPECT_EQ(client.send("0123456789"), SendResult::queued);
  EXPECT_EQ(client.send("0123456789a"), SendResult::would_block);
  EXPECT_EQ(client.send("012345678", {.extension = "ab"}), SendResult::would_block);
  EXPECT_EQ(client.send("012345678", {.extension = "a"}), SendResult::queued);
  EXPECT_EQ(world.stats().kept_bytes, options.keep_bytes);
  EXPECT_EQ(client.send(""), SendResult::would_block);
  EXPECT_EQ(client.send(pattern(1001)), SendResult::would_block);
  host.start();
  world.simulation.advance(1s);
  host.stop();
  EXPECT_EQ(client.send(pattern(1001)), SendResult::too_large);
  EXPECT_EQ(client.send(pattern(1000)), SendResult::would_block) << "larger than the bound";
}

TEST(Kept, AnAsyncSendWaitsForRoomInItsTurnAndCanBeCancelled) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(1));
  host.stop();
  std::map<int, error_code> done;
  const auto noted = [&](int which) { return [&done, which](error_code code) { done[which] = code; }; };
  client.async_send("0", {}, noted(0));
  client.async_send("1", {}, noted(1));
  asio::cancellation_signal signal;
  client.async_send("2", {}, asio::bind_cancellation_slot(signal.slot(), noted(2)));
  client.async_send("3", {}, noted(3));
  world.simulation.run();
  EXPECT_EQ(done.size(), 1U);
  EXPECT_TRUE(done.contains(0));
  EXPECT_EQ(client.send("4"), SendResult::would_block);
  signal.emit(asio::cancellation_type::total);
  world.simulation.run();
  EXPECT_EQ(done.at(2), error_code(asio::error::operation_aborted));
  EXPECT_EQ(done.size(), 2U);
  host.start();
  world.simulation.advance(1s);
  EXPECT_EQ(host.got, (Strings{"0", "1", "3"}));
  EXPECT_EQ(done.size(), 4U);
  EXPECT_FALSE(done.at(1));
  EXPECT_FALSE(done.at(3));
}

TEST(Kept, AnAsyncSendOfAConnectedClientWaitsForRoomNoLongerThanItMay) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(10),
                                      {.outbound_packets = 1, .first_packet_timeout = 0ms, .write_stall_timeout = 0ms});
  world.simulation.set_faults({.stall = 1, .longest_stall = std::chrono::hours(10)});
  ASSERT_EQ(client.send("fills it"), SendResult::queued);
  const auto begun = world.simulation.now();
  std::optional<error_code> told;
  client.async_send("in time", {.timeout = 2s}, [&](error_code code) { told = code; });
  ASSERT_TRUE(world.simulation.run_until([&] { return told.has_value(); }, 1min));
  EXPECT_EQ(told, error_code(Errc::send_timeout));
  EXPECT_GE(world.simulation.now() - begun, 2s);
}

TEST(Kept, AnAsyncSendWaitsForRoomAmongTheKeptNoLongerThanItMay) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(1));
  host.stop();
  std::map<std::string, error_code> done;
  std::map<std::string, Simulation::Clock::duration> after;
  const auto begun = world.simulation.now();
  const auto send = [&](const std::string& text, std::chrono::milliseconds timeout, bool high_priority = false) {
    client.async_send(text, {.high_priority = high_priority, .timeout = timeout}, [&, text](error_code code) {
      done[text] = code;
      after[text] = world.simulation.now() - begun;
    });
  };
  send("kept", 1s);
  send("late", 2s);
  send("for ever", 0ms);
  send("later", 3s);
  send("earlier", 1500ms, true);
  send("in time", 1h);
  world.simulation.advance(10s);
  EXPECT_EQ(done.size(), 4U);
  EXPECT_FALSE(done.at("kept"));
  for (const auto& [text, wait] : {std::pair("late", 2000ms), {"later", 3000ms}, {"earlier", 1500ms}}) {
    EXPECT_EQ(done.at(text), error_code(Errc::send_timeout));
    EXPECT_GE(after.at(text), wait);
    EXPECT_LT(after.at(text), wait + 10ms);
  }
  host.start();
  world.simulation.advance(1min);
  EXPECT_EQ(host.got, (Strings{"kept", "for ever", "in time"}));
  EXPECT_FALSE(done.at("for ever"));
  EXPECT_FALSE(done.at("in time"));
}

TEST(Kept, AnAsyncSendThatWaitsForTheClientAndThenForItsSessionHasOneTimeout) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(1),
                                      {.outbound_packets = 2, .first_packet_timeout = 0ms, .write_stall_timeout = 0ms});
  host.stop();
  ASSERT_EQ(client.send("kept"), SendResult::queued);
  const auto begun = world.simulation.now();
  std::optional<error_code> told;
  client.async_send("late", {.timeout = 60s}, [&](error_code code) { told = code; });
  world.simulation.advance(40s);
  world.simulation.set_faults({.stall = 1, .longest_stall = std::chrono::hours(10)});
  world.at_connect = [](Session& session) { EXPECT_EQ(session.send("fills it"), SendResult::queued); };
  host.start();
  ASSERT_TRUE(world.simulation.run_until([&] { return told.has_value(); }, 10min));
  EXPECT_EQ(world.stats().kept_packets, 0U) << "the session has taken it, and what waited is in its line";
  EXPECT_EQ(told, error_code(Errc::send_timeout));
  EXPECT_GE(world.simulation.now() - begun, 60s);
  EXPECT_LT(world.simulation.now() - begun, 61s);
}

TEST(Kept, ATimeoutThatIsNotNeededAnyMoreKeepsNoContextRunning) {
  asio::io_context context;
  ClientTransport client({.executor = context.get_executor(), .reconnect = {.enabled = true, .keep_packets = 1}});
  const std::string name = unused_name();
  std::optional<ServerTransport> server;
  server.emplace(ServerOptions{.executors = {context.get_executor()}});
  server->listen(in_process(name));
  server->start();
  bool connected = false;
  client.async_connect("inproc://" + name, [&](error_code code) { connected = !code; });
  while (!connected) context.run_one();
  std::vector<error_code> done;
  const auto noted = [&](error_code code) { done.push_back(code); };
  server.reset();
  while (client.is_connected()) context.run_one();
  client.async_send("0", {.timeout = 1h}, noted);
  client.async_send("1", {.timeout = 1h}, noted);
  while (done.empty()) context.run_one();
  client.close();
  const auto begun = std::chrono::steady_clock::now();
  context.restart();
  context.run();
  EXPECT_LT(std::chrono::steady_clock::now() - begun, 1min);
  EXPECT_EQ(done, (std::vector<error_code>{{}, make_error_code(Errc::closed)}));
}

TEST(Kept, WithHighPriorityIsSentFirst) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(3));
  host.stop();
  EXPECT_EQ(client.send("first"), SendResult::queued);
  EXPECT_EQ(client.send("second"), SendResult::queued);
  EXPECT_EQ(client.send("urgent", {.high_priority = true}), SendResult::queued);
  host.start();
  world.simulation.advance(1s);
  EXPECT_EQ(host.got, (Strings{"urgent", "first", "second"}));
}

TEST(Kept, AnAsyncSendThatWaitsIsToldWhenTheClientIsClosed) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(1));
  host.stop();
  client.send("0");
  std::optional<error_code> done;
  client.async_send("1", {}, [&](error_code code) { done = code; });
  world.simulation.run();
  EXPECT_FALSE(done);
  client.close();
  world.simulation.run();
  EXPECT_EQ(done, error_code(Errc::closed));
  EXPECT_EQ(world.stats().kept_dropped, 1U);
}

TEST(Kept, IsNotLostWithAConnectionThatHadNotTakenIt) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(1000), {.outbound_packets = 2, .first_packet_timeout = 0ms});
  host.stop();
  for (int i = 0; i < 200; ++i) client.send(std::to_string(i) + std::string(5000, '.'));
  host.start();
  for (int i = 0; i < 20; ++i) {
    // Nothing is taken: the connection ends with a few in its queue, and the rest stays.
    world.simulation.set_faults({.stall = 1, .longest_stall = 1s});
    while (!client.is_connected()) world.simulation.advance(1ms);
    world.simulation.run();
    host.cut();
    EXPECT_GE(world.stats().kept_packets, 200U - 2U * static_cast<unsigned>(i + 1));
  }
  world.simulation.set_faults({});
  world.simulation.advance(1min);
  const auto stats = world.stats();
  EXPECT_EQ(stats.kept_packets, 0U);
  EXPECT_GT(stats.dropped_at_close, 0U);
  EXPECT_EQ(stats.packets_out + stats.dropped_at_close, 200U);
  EXPECT_EQ(host.got.size(), stats.packets_out);
  for (std::size_t i = 1; i < host.got.size(); ++i) EXPECT_LT(std::stoi(host.got[i - 1]), std::stoi(host.got[i]));
}

TEST(Kept, IsCompressedAsItWouldHaveBeen) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(10),
                                      {.compression = {.codec = Compression::zstd}, .first_packet_timeout = 0ms});
  host.stop();
  const std::string text(100'000, 'x');
  EXPECT_EQ(client.send(text), SendResult::queued);
  EXPECT_LT(world.stats().kept_bytes, 1000U);
  host.start();
  world.simulation.advance(1s);
  EXPECT_EQ(host.got, Strings{text});
}

TEST(Kept, IsKeptWhileConnectingForTheFirstTime) {
  World world;
  auto& host = world.host();
  host.start();
  ReconnectOptions options = plain;
  options.keep_packets = 10;
  auto& client = world.make(options);
  EXPECT_EQ(client.send("nobody connects"), SendResult::closed);
  client.async_connect(host.url(), [](error_code code) { EXPECT_FALSE(code); });
  EXPECT_EQ(client.send("early"), SendResult::queued);
  world.simulation.run();
  EXPECT_EQ(host.got, Strings{"early"});
}

TEST(Kept, IsSentBeforeAClientThatIsClosedMeanwhileCloses) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(1000),
                                      {.outbound_packets = 2, .first_packet_timeout = 0ms, .close_timeout = 1h});
  host.stop();
  for (int i = 0; i < 200; ++i) client.send(std::to_string(i));
  host.start();
  world.simulation.set_faults({.stall = 0.9, .longest_stall = 1ms});
  while (!client.is_connected()) world.simulation.advance(1ms);
  client.close();
  EXPECT_GT(world.stats().kept_packets, 0U);
  EXPECT_EQ(client.send("too late"), SendResult::closed);
  world.simulation.advance(10min);
  EXPECT_EQ(host.got.size(), 200U);
  EXPECT_EQ(world.stats().kept_dropped, 0U);
  EXPECT_EQ(world.count("lost"), 2);
  EXPECT_EQ(world.last, Errc::closed_by_user);
}

TEST(Kept, IsDroppedAndCountedWhenClosingTakesTooLong) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, keeping(1000),
                                      {.outbound_packets = 2, .first_packet_timeout = 0ms, .close_timeout = 2s});
  host.stop();
  for (int i = 0; i < 200; ++i) client.send(pattern(1000));
  host.start();
  world.simulation.set_faults({.stall = 1, .longest_stall = 1h});
  while (!client.is_connected()) world.simulation.advance(1ms);
  client.close();
  world.simulation.advance(5s);
  EXPECT_EQ(world.count("lost"), 2);
  const auto stats = world.stats();
  EXPECT_GT(stats.kept_dropped, 100U);
  EXPECT_EQ(stats.packets_out + stats.dropped_at_close + stats.kept_dropped, 200U);
  EXPECT_EQ(stats.kept_packets, 0U);
}

// --- requests

TEST(PendingRequests, FailWithConnectionLostAndAreNotSentAgain) {
  World world;
  auto& host = world.host();
  host.answers = false;
  auto& client = world.make_connected(host, plain);
  error_code code;
  client.async_request("once", {.timeout = 1h}, [&](error_code told, const Reply&) { code = told; });
  world.simulation.run();
  host.cut();
  EXPECT_EQ(code, Errc::connection_lost);
  world.simulation.advance(1h);
  EXPECT_EQ(host.got, Strings{"once"});
  EXPECT_EQ(world.stats().retried_requests, 0U);
}

TEST(PendingRequests, AreSentAgainIfTheOptionsSaySo) {
  World world;
  auto& host = world.host();
  host.answers = false;
  auto& client = world.make_connected(host, retrying(10));
  Strings answers;
  for (const char* const text : {"a", "b", "c"}) {
    client.async_request(text, {.timeout = 1h}, [&](error_code code, const Reply& reply) {
      EXPECT_FALSE(code) << code.message();
      answers.emplace_back(reply.text());
    });
  }
  world.simulation.run();
  EXPECT_EQ(world.stats().retryable_requests, 3U);
  host.cut();
  world.simulation.advance(1s);
  EXPECT_EQ(host.got, (Strings{"a", "b", "c", "a", "b", "c"}));
  EXPECT_EQ(world.stats().retried_requests, 3U);
  host.stop();
  host.answers = true;
  host.start();
  world.simulation.advance(10s);
  EXPECT_EQ(answers, (Strings{"a", "b", "c"}));
  EXPECT_EQ(world.stats().retried_requests, 6U);
  EXPECT_EQ(world.stats().retryable_requests, 0U);
  EXPECT_EQ(world.stats().retryable_bytes, 0U);
  host.cut();
  world.simulation.advance(10s);
  EXPECT_EQ(host.got.size(), 9U) << "answered ones are not sent again";
}

TEST(PendingRequests, EndAtTheirTimeoutHoweverOftenTheyAreSentAgain) {
  World world;
  auto& host = world.host();
  host.answers = false;
  auto& client = world.make_connected(host, retrying(10));
  std::optional<error_code> connected, unconnected;
  const auto begun = world.simulation.now();
  Simulation::Clock::time_point ended;
  client.async_request("a", {.timeout = 3s}, [&](error_code code, const Reply&) {
    connected = code;
    ended = world.simulation.now();
  });
  for (int i = 0; i < 4; ++i) {
    world.simulation.advance(500ms);
    host.cut();
  }
  EXPECT_FALSE(connected);
  world.simulation.advance(2s);
  EXPECT_EQ(connected, error_code(Errc::request_timeout));
  EXPECT_GE(ended - begun, 3s);
  EXPECT_LT(ended - begun, 3100ms);
  // Without any connection.
  host.stop();
  client.async_request("later", {.timeout = 20s}, [](error_code, const Reply&) {});
  client.async_request("b", {.timeout = 3s}, [&](error_code code, const Reply&) { unconnected = code; });
  world.simulation.advance(2999ms);
  EXPECT_FALSE(unconnected);
  world.simulation.advance(1ms);
  EXPECT_EQ(unconnected, error_code(Errc::request_timeout));
  host.start();
  world.simulation.advance(10s);
  EXPECT_EQ(host.got.back(), "later");
  EXPECT_EQ(world.stats().requests_timed_out, 2U);
}

TEST(PendingRequests, ThatMayBeSentAgainTakeTheTimeoutOfTheSessionsOptions) {
  World world;
  auto& host = world.host();
  host.answers = false;
  auto& client = world.make_connected(host, retrying(1), {.request_timeout = 3s, .first_packet_timeout = 0ms});
  std::optional<error_code> told;
  client.async_request("?", {}, [&](error_code code, const Reply&) { told = code; });
  world.simulation.advance(2999ms);
  EXPECT_FALSE(told);
  world.simulation.advance(2s);
  EXPECT_EQ(told, error_code(Errc::request_timeout));
}

TEST(PendingRequests, ThatWaitForAConnectionTellWhatIsLeftOfTheirTimeout) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, retrying(1));
  host.stop();
  client.async_request("?", {.timeout = 20s, .tell_timeout = true}, [](error_code, const Reply&) {});
  world.simulation.advance(10s);
  host.start();
  world.simulation.advance(5s);
  ASSERT_EQ(host.told.size(), 1U);
  ASSERT_TRUE(host.told.front());
  EXPECT_LE(*host.told.front(), 10s);
  EXPECT_GE(*host.told.front(), 5s);
}

TEST(PendingRequests, ThatMayBeSentAgainAreBounded) {
  World world;
  auto& host = world.host();
  host.answers = false;
  host.start();
  ReconnectOptions options = plain;
  options.retry_requests = 2;
  options.retry_bytes = 100;
  auto& client = world.make(options);
  ASSERT_FALSE(world.connect(host));
  std::map<std::string, error_code> done;
  const auto ask = [&](const std::string& text, std::size_t size) {
    client.async_request(text + std::string(size - wire::header_size - text.size(), '.'), {.timeout = 1h},
                         [&done, text](error_code code, const Reply&) { done[text] = code; });
    world.simulation.run();
  };
  ask("a", 60);
  ask("b", 41);
  EXPECT_EQ(done.at("b"), Errc::would_block) << "bytes";
  ask("c", 40);
  EXPECT_EQ(world.stats().retryable_bytes, 100U);
  EXPECT_FALSE(done.contains("c"));
  ask("d", 20);
  EXPECT_EQ(done.at("d"), Errc::would_block) << "requests";
  EXPECT_EQ(host.got.size(), 2U) << "the others were not sent at all";
  client.close();
  world.simulation.advance(1s);
  EXPECT_EQ(done.at("a"), Errc::connection_lost);
  EXPECT_EQ(done.at("c"), Errc::connection_lost);
  EXPECT_EQ(world.stats().retryable_bytes, 0U);
}

TEST(PendingRequests, CanBeCancelledWithAndWithoutAConnection) {
  World world;
  auto& host = world.host();
  host.answers = false;
  auto& client = world.make_connected(host, retrying(10));
  std::map<int, error_code> done;
  std::deque<asio::cancellation_signal> signals(2);
  for (int i = 0; i < 2; ++i) {
    client.async_request("x", {.timeout = 1h},
                         asio::bind_cancellation_slot(signals[static_cast<std::size_t>(i)].slot(),
                                                      [&done, i](error_code code, const Reply&) { done[i] = code; }));
  }
  world.simulation.run();
  signals[0].emit(asio::cancellation_type::terminal);
  world.simulation.run();
  EXPECT_EQ(done.at(0), error_code(asio::error::operation_aborted));
  host.stop();
  signals[1].emit(asio::cancellation_type::terminal);
  world.simulation.run();
  EXPECT_EQ(done.at(1), error_code(asio::error::operation_aborted));
  host.start();
  world.simulation.advance(10s);
  EXPECT_EQ(host.got.size(), 2U);
  EXPECT_EQ(world.stats().retryable_requests, 0U);
}

TEST(PendingRequests, ThatWereNeverSentEndAsClosed) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, retrying(10));
  host.stop();
  error_code code;
  client.async_request("never", {.timeout = 1h}, [&](error_code told, const Reply&) { code = told; });
  world.simulation.run();
  client.close();
  world.simulation.run();
  EXPECT_EQ(code, Errc::closed);
  client.async_request("closed", [&](error_code told, const Reply&) { code = told; });
  code = {};
  world.simulation.run();
  EXPECT_EQ(code, Errc::closed);
}

// --- the end

TEST(ClosingAReconnectingClient, EndsItAtOnceInTheMiddleOfAWait) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, plain);
  host.stop();
  EXPECT_EQ(world.log.back(), "wait 1");
  EXPECT_EQ(world.connect(host), Errc::wrong_state) << "it connects by itself";
  world.log.clear();
  client.close();
  world.simulation.run();
  host.start();
  const auto tries = world.stats().tries;
  world.simulation.advance(1h);
  EXPECT_EQ(world.stats().tries, tries);
  EXPECT_TRUE(world.log.empty()) << world.log.front();
  EXPECT_EQ(host.sessions, 1);
  EXPECT_FALSE(world.connect(host));
  EXPECT_EQ(world.log, (Strings{"first 0", "connected"})) << "a call of connect begins anew";
}

TEST(ClosingAReconnectingClient, WorksFromItsHandlers) {
  for (const bool at_the_loss : {true, false}) {
    World world;
    auto& host = world.host();
    host.start();
    auto& client = world.make(plain);
    if (at_the_loss) client.on_disconnect([&](Session&, const Error&) { client.close(); });
    world.at_reconnecting = [&] { client.close(); };
    ASSERT_FALSE(world.connect(host));
    host.cut();
    world.simulation.advance(1h);
    EXPECT_EQ(world.delays.size(), at_the_loss ? 0U : 1U);
    EXPECT_EQ(host.sessions, 1);
    EXPECT_FALSE(world.connect(host)) << "it can be used again";
  }
}

TEST(ClosingAReconnectingClient, WhileConnectedDoesNotReconnect) {
  World world;
  auto& host = world.host();
  auto& client = world.make_connected(host, plain);
  client.close();
  world.simulation.advance(1h);
  EXPECT_EQ(world.log, (Strings{"first 0", "connected", "lost"}));
  EXPECT_EQ(host.sessions, 1);
}

TEST(ClosingAReconnectingClient, EndsACallOfConnect) {
  World world;
  auto& host = world.host();
  ReconnectOptions options = plain;
  options.retry_first_connect = true;
  auto& client = world.make(options);
  std::optional<error_code> told;
  client.async_connect(host.url(), [&](error_code code) { told = code; });
  world.simulation.advance(10s);
  EXPECT_FALSE(told);
  client.close();
  world.simulation.run();
  EXPECT_EQ(told, error_code(asio::error::operation_aborted));
}

TEST(DestroyingAReconnectingClient, LeavesNoWaiter) {
  World world;
  auto& host = world.host();
  host.start();
  ReconnectOptions options = plain;
  options.keep_packets = 1;
  options.retry_requests = 1;
  auto& client = world.make(options);
  ASSERT_FALSE(world.connect(host));
  host.stop();
  client.send("kept");
  std::vector<error_code> ends;
  client.async_send("waits", {}, [&](error_code code) { ends.push_back(code); });
  client.async_request("waits", {.timeout = 1h}, [&](error_code code, const Reply&) { ends.push_back(code); });
  world.simulation.run();
  EXPECT_TRUE(ends.empty());
  world.client.reset();
  world.simulation.run();
  EXPECT_EQ(ends, (std::vector<error_code>{Errc::closed, Errc::closed}));
  world.simulation.advance(1h);
  EXPECT_EQ(host.sessions, 1);
}

TEST(DestroyingAReconnectingClient, WorksFromItsHandlers) {
  World world;
  auto& host = world.host();
  host.start();
  world.make(plain);
  world.at_reconnecting = [&] { world.client.reset(); };
  ASSERT_FALSE(world.connect(host));
  host.cut();
  world.simulation.advance(1h);
  EXPECT_EQ(host.sessions, 1);
  EXPECT_EQ(world.count("lost"), 1);
}

TEST(DestroyingAReconnectingClient, MayComeAfterItsContextWent) {
  ReconnectOptions options = plain;
  options.retry_first_connect = true;
  options.keep_packets = 1;
  options.retry_requests = 1;
  std::optional<asio::io_context> context(std::in_place);
  ClientTransport client({.executor = context->get_executor(), .reconnect = options});
  client.async_connect("inproc://" + unused_name(), [](error_code) {});
  client.async_request("x", [](error_code, const Reply&) {});
  EXPECT_EQ(client.send("x"), SendResult::queued);
  client.async_send("x", {}, [](error_code) {});
  ASSERT_TRUE(wait_until([&] {
    context->poll();
    return client.client_stats().attempts >= 2;
  }));
  context.reset();
  EXPECT_EQ(client.send("x"), SendResult::closed);
  EXPECT_EQ(client.client_stats().kept_dropped, 1U);
  client.close();
}

TEST(DestroyingAReconnectingClient, DoesNotWaitForTheNextAttempt) {
  ClientTransport client({.reconnect = {.enabled = true, .initial_delay = 1h, .max_delay = 1h, .reset_after = 0ms}});
  Record<int> waits;
  client.on_reconnecting([waits](const ReconnectEvent&) mutable { waits.add(1); });
  {
    TestServer server;
    server.start();
    client.connect(server.url());
  }
  ASSERT_TRUE(waits.wait_for(1));
  EXPECT_FALSE(client.is_connected());
  client.close();  // blocks, until it is over
  TestServer second;
  second.echo().start();
  client.connect(second.url());
  EXPECT_EQ(client.request("x").text(), "x");
  second.session().close();
  ASSERT_TRUE(waits.wait_for(2));
}

TEST(ReconnectOptions, AreRefusedByTheConstructorAndByWhatReplacesConnectionsItself) {
  std::string text;
  EXPECT_EQ(thrown([] { const ClientTransport client({.reconnect = {.factor = 0.5}}); }, &text), Errc::invalid_option);
  EXPECT_NE(text.find("reconnect.factor is 0.5"), std::string::npos) << text;
  EXPECT_EQ(
      thrown(
          [] { const ConnectionPool pool({.url = "tcp://127.0.0.1:1", .client = {.reconnect = {.enabled = true}}}); },
          &text),
      Errc::invalid_option);
  EXPECT_NE(text.find("client.reconnect.enabled"), std::string::npos) << text;
  LoadBalancer balancer({.urls = {"tcp://127.0.0.1:1"}});
  EXPECT_EQ(thrown([&] { const HealthChecker checker(balancer, {.client = {.reconnect = {.enabled = true}}}); }, &text),
            Errc::invalid_option);
  EXPECT_NE(text.find("client.reconnect.enabled"), std::string::npos) << text;
}

// --- by chance

/// Messages and requests while connections are cut, and the server goes and comes. The account is checked.
std::string troubled_run(std::uint64_t seed) {
  World world(seed);
  auto& simulation = world.simulation;
  auto& a = world.host();
  auto& b = world.host();
  a.start();
  b.start();
  std::map<Host*, bool> up{{&a, true}, {&b, true}};
  const auto chance = [&](std::uint64_t one_in) { return simulation.random() % one_in == 0; };
  ReconnectOptions options{.enabled = true, .jitter_seed = seed + 1, .reset_after = 200ms, .keep_packets = 30};
  if (chance(2)) options.retry_requests = 20;
  auto& client = world.make(
      options, {.outbound_packets = 1 + simulation.random() % 20, .request_timeout = 2s, .first_packet_timeout = 0ms});
  EXPECT_FALSE(world.connect({a.url(), b.url()}));
  // Cut only when nothing is under way: then what was accepted arrives, all of it.
  const bool gentle = chance(2);
  std::uint64_t number = 0, accepted = 0, waiting = 0, taken_later = 0, asked = 0, answered = 0;
  const auto turn = [&] {
    for (std::uint64_t i = simulation.random() % 5; i != 0; --i) {
      if (chance(4)) {
        ++waiting;
        client.async_send("a" + std::to_string(number++), {}, [&](error_code code) {
          --waiting;
          taken_later += !code ? 1 : 0;
          EXPECT_TRUE(!code || code == Errc::closed) << code.message();
        });
      } else {
        const auto result = client.send("s" + std::to_string(number));
        ++number;
        accepted += result == SendResult::queued ? 1 : 0;
        EXPECT_TRUE(result == SendResult::queued || result == SendResult::would_block) << to_string(result);
      }
    }
    if (chance(3)) {
      ++asked;
      client.async_request("r", [&](error_code code, const Reply&) {
        ++answered;
        EXPECT_TRUE(!code || code == Errc::request_timeout || code == Errc::would_block ||
                    (options.retry_requests == 0 && (code == Errc::connection_lost || code == Errc::closed)))
            << code.message();
      });
    }
  };
  simulation.set_faults({.cut = gentle ? 0 : 0.01,
                         .half_write = 0.1,
                         .stall = 0.05,
                         .longest_stall = 30ms,
                         .least_delay = 100us,
                         .most_delay = 5ms});
  for (int i = 0; i < 150; ++i) {
    turn();
    simulation.advance(std::chrono::milliseconds(simulation.random() % 20));
    if (!chance(10)) continue;
    Host& host = chance(2) ? a : b;
    if (gentle) simulation.advance(2s);
    if (!up[&host]) {
      host.start();
      up[&host] = true;
    } else if (chance(2)) {
      host.stop();
      up[&host] = false;
    } else {
      host.cut();
    }
  }
  for (auto& [host, there] : up) {
    if (!there) host->start();
  }
  simulation.set_faults({});
  simulation.advance(2min);
  EXPECT_EQ(waiting, 0U);
  EXPECT_EQ(answered, asked);
  EXPECT_TRUE(client.is_connected());
  client.close();
  simulation.advance(1min);
  accepted += taken_later;
  const auto stats = world.stats();
  EXPECT_EQ(accepted + stats.requests, stats.packets_out + stats.dropped_at_close + stats.kept_dropped)
      << "gentle " << gentle;
  EXPECT_EQ(stats.kept_packets + stats.kept_bytes + stats.retryable_requests + stats.retryable_bytes, 0U);
  EXPECT_EQ(stats.tries, stats.connections + stats.failures);
  EXPECT_EQ(static_cast<std::uint64_t>(world.count("lost")), stats.connections);
  EXPECT_EQ(world.urls.size(), stats.connections);
  EXPECT_EQ(client.stats().queued_packets, 0U);
  std::size_t arrived = 0;
  std::set<std::uint64_t> seen;
  for (Host* const host : {&a, &b}) {
    // Each kind by itself: of a session whose queue is full, `send` may get the room that an earlier `async_send` is
    // only about to wait for.
    std::map<char, std::uint64_t> last;
    for (const auto& text : host->got) {
      if (text[0] == 'r') continue;
      auto& before = last[text[0]];
      const auto now = std::stoull(text.substr(1)) + 1;
      EXPECT_LT(before, now) << "out of order, or twice";
      before = now;
      EXPECT_TRUE(seen.insert(now).second) << "at both";
      ++arrived;
    }
  }
  EXPECT_LE(arrived, accepted);
  if (gentle) {
    EXPECT_EQ(arrived, accepted) << "nothing was under way when connections were lost";
  }
  std::string trace;
  for (const auto& entry : world.log) trace += entry + ' ';
  return trace + std::to_string(arrived) + ' ' + std::to_string(stats.retried_requests);
}

TEST(ReconnectSimulation, IsTheSameAgainWithTheSameSeed) {
  EXPECT_EQ(troubled_run(3), troubled_run(3));
  EXPECT_NE(troubled_run(3), troubled_run(4));
}

TEST(ReconnectSimulation, AccountsForEverythingWhateverIsCut) {
  for (std::uint64_t seed = 1000; seed < 1400 && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    (void)troubled_run(seed);
  }
}

// --- over sockets

TEST(ReconnectOverTcp, FindsAServerThatWasStoppedAndStartedAgain) {
  Record<std::string> got;
  std::optional<ServerTransport> server;
  const auto start = [&](const Endpoint& endpoint) {
    server.emplace(ServerOptions{.shards = 2});
    server->on_message([got](Session& session, const Message& message) mutable {
      if (message.is_request()) {
        session.respond(message, message.payload());
      } else {
        got.add(std::string(message.text()));
      }
    });
    const auto bound = server->listen(endpoint);
    server->start();
    return bound;
  };
  const Endpoint bound = start(tcp("127.0.0.1:0"));
  ClientTransport client({.reconnect = {.enabled = true,
                                        .initial_delay = 5ms,
                                        .max_delay = 50ms,
                                        .keep_packets = 100'000,
                                        .keep_bytes = 64 * 1024 * 1024,
                                        .retry_requests = 10}});
  Record<bool> connected;
  Record<Error> lost;
  client.on_connect([connected](Session&, const ConnectInfo& info) mutable { connected.add(info.reconnection); });
  client.on_disconnect([lost](Session&, const Error& reason) mutable { lost.add(reason); });
  client.connect({"tcp://127.0.0.1:1", bound.url()});
  std::atomic<bool> over{false};
  std::vector<std::thread> threads;
  std::array<std::vector<int>, 2> taken;
  for (int which = 0; which < 2; ++which) {
    threads.emplace_back([&, which] {
      for (int i = 0; !over.load(); ++i) {
        if (client.send(std::to_string(which) + " " + std::to_string(i)) == SendResult::queued) {
          taken[static_cast<std::size_t>(which)].push_back(i);
        }
        std::this_thread::sleep_for(50us);
      }
    });
  }
  for (std::size_t round = 1; round <= 3; ++round) {
    ASSERT_TRUE(connected.wait_for(round));
    ASSERT_TRUE(got.wait_for(100 * round));
    // Sent while it stops, or when it has: answered by the next.
    server->stop(1s);
    auto answer = ask(client, "still there?", {.timeout = 60s});
    server.reset();
    (void)start(bound);
    const auto [code, reply] = in_time(answer);
    EXPECT_FALSE(code) << code.message();
    EXPECT_EQ(reply.text(), "still there?");
  }
  ASSERT_TRUE(connected.wait_for(4));
  over.store(true);
  for (auto& thread : threads) thread.join();
  client.close();
  server->stop(1s);
  const auto stats = client.client_stats();
  EXPECT_GE(stats.connections, 4U);
  EXPECT_EQ(lost.size(), stats.connections);
  EXPECT_EQ(stats.kept_packets, 0U);
  EXPECT_EQ(stats.kept_dropped, 0U);
  EXPECT_GT(stats.kept_total, 0U);
  const std::size_t accepted = taken[0].size() + taken[1].size();
  EXPECT_EQ(accepted + stats.requests, stats.packets_out + stats.dropped_at_close);
  std::array<int, 2> last{-1, -1};
  for (const auto& text : got.all()) {
    auto& before = last.at(static_cast<std::size_t>(text[0] - '0'));
    const int number = std::stoi(text.substr(2));
    EXPECT_LT(before, number);
    before = number;
  }
  EXPECT_LE(got.size(), accepted);
  EXPECT_FALSE(client.is_connected());
}

TEST(ReconnectOverTcp, BlockingRequestsWaitForTheNextConnection) {
  TestServer first;
  first.echo().start();
  Record<int> waits;
  std::optional<TestServer> second(std::in_place);
  second->echo().start();
  ClientTransport client({.reconnect = {.enabled = true, .initial_delay = 1ms, .retry_requests = 1}});
  client.on_reconnecting([waits](const ReconnectEvent&) mutable { waits.add(1); });
  client.connect({first.url(), second->url()});
  first.transport.stop(0s);
  ASSERT_TRUE(waits.wait_for(1));
  EXPECT_EQ(client.request("x", {.timeout = 60s}).text(), "x");
  second.reset();
  Error error;
  (void)client.request("nobody", {.timeout = 50ms}, error);
  EXPECT_EQ(error.code, Errc::request_timeout) << error.message();
}

}  // namespace
}  // namespace msgtrans::test
