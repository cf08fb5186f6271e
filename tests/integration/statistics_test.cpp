// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/error.hpp>
#include <deque>
#include <map>
#include <msgtrans/testing/simulation.hpp>

namespace msgtrans::test {
namespace {

using testing::Simulation;

constexpr SessionOptions quiet{.first_packet_timeout = 0ms};

/// A server and its clients in one simulation. A request is answered with itself, unless it is "silence".
class World {
 public:
  explicit World(const SessionOptions& options = quiet, ServerOptions server_options = {}) {
    server_options.executors = {simulation.executor()};
    server_options.session = options;
    server.emplace(std::move(server_options));
    server->on_connect([this](Session& session) {
      came.push_back(session);
      return refuse ? Admission::refuse("the test says so") : Admission::accept();
    });
    server->on_message([](Session& session, const Message& message) { answer(session, message); });
    server->on_disconnect([this](Session& session, const Error& reason) {
      reasons.push_back(reason.code);
      at_the_end = session.stats();
    });
    server->listen(in_process(name), {});
    server->start();
  }

  static void answer(Session& session, const Message& message) {
    if (message.text() == "throw") throw std::runtime_error("as told");
    if (message.is_request() && message.text() != "silence") session.respond(message, message.payload());
  }

  ClientTransport& make_client(const SessionOptions& options = quiet) {
    auto& client = clients.emplace_back(ClientOptions{.executor = simulation.executor(), .session = options});
    client.on_message([this](Session& session, const Message& message) {
      got += message.is_request() ? 0 : 1;
      answer(session, message);
    });
    return client;
  }
  error_code connect(ClientTransport& client, const std::string& to) {
    std::optional<error_code> result;
    client.async_connect("inproc://" + to, [&](error_code code) { result = code; });
    EXPECT_TRUE(simulation.run_until([&] { return result.has_value(); }, 20s));
    return result.value_or(error_code{});
  }
  ClientTransport& connect(const SessionOptions& options = quiet) {
    auto& client = make_client(options);
    EXPECT_FALSE(connect(client, name));
    simulation.run();
    return client;
  }
  /// The result of it when it is there, in this.
  template <class To>
  std::shared_ptr<std::optional<error_code>> ask(To& to, BytesView payload, const RequestOptions& options = {}) {
    auto result = std::make_shared<std::optional<error_code>>();
    to.async_request(payload, options, [result](error_code code, const Reply&) { *result = code; });
    return result;
  }
  /// The connection of the newest session is cut, and all is settled.
  void cut() {
    EXPECT_TRUE(simulation.cut(came.back().peer()));
    simulation.run();
  }
  [[nodiscard]] ServerStats stats() const { return server->stats(); }

  Simulation simulation;
  std::string name = unused_name();
  bool refuse = false;
  std::size_t got = 0;  // one-way messages, by the clients
  std::vector<Session> came;
  std::vector<error_code> reasons;
  SessionStats at_the_end;
  std::optional<ServerTransport> server;
  std::deque<ClientTransport> clients;
};

std::uint64_t outcomes(const RequestCounts& counts) {
  return counts.answered + counts.timed_out + counts.cancelled + counts.connection_lost + counts.refused +
         counts.pending;
}

// --- requests

TEST(RequestStatistics, EachRequestIsCountedWithItsOutcome) {
  World world({.max_payload = 1000, .first_packet_timeout = 0ms});
  world.connect();
  Session session = world.came.front();
  world.simulation.set_faults({.least_delay = 10ms, .most_delay = 10ms});
  EXPECT_EQ(world.stats().requests_by_outcome, RequestCounts{});
  EXPECT_EQ(session.stats().requests, RequestCounts{});

  RequestCounts expected;
  const auto check = [&](const char* what) {
    expected.made = outcomes(expected);
    const auto stats = world.stats();
    const auto equal = [&](const RequestCounts& counts) {
      EXPECT_EQ(counts.made, expected.made) << what;
      EXPECT_EQ(counts.answered, expected.answered) << what;
      EXPECT_EQ(counts.timed_out, expected.timed_out) << what;
      EXPECT_EQ(counts.cancelled, expected.cancelled) << what;
      EXPECT_EQ(counts.connection_lost, expected.connection_lost) << what;
      EXPECT_EQ(counts.refused, expected.refused) << what;
      EXPECT_EQ(counts.pending, expected.pending) << what;
    };
    equal(stats.requests_by_outcome);
    equal(session.stats().requests);
    EXPECT_EQ(stats.requests, expected.made) << what;
    EXPECT_EQ(stats.requests_timed_out, expected.timed_out) << what;
    EXPECT_EQ(stats.request_latency.count(), expected.answered) << what;
  };

  for (int i = 0; i < 3; ++i) world.ask(session, "hello");
  world.simulation.run();
  expected.pending = 3;
  check("under way");
  world.simulation.advance(1s);
  expected.answered = std::exchange(expected.pending, 0);
  check("answered");

  for (int i = 0; i < 2; ++i) world.ask(session, "silence", {.timeout = 500ms});
  world.simulation.advance(1s);
  expected.timed_out = 2;
  check("timed out");

  detail::asio::cancellation_signal signal;
  session.async_request("silence", detail::asio::bind_cancellation_slot(signal.slot(), [](error_code code, Reply) {
                          EXPECT_EQ(code, detail::asio::error::operation_aborted);
                        }));
  world.simulation.run();
  signal.emit(detail::asio::cancellation_type::terminal);
  world.simulation.run();
  expected.cancelled = 1;
  check("cancelled");

  const auto too_large = world.ask(session, pattern(1001));
  const auto negative = world.ask(session, "x", {.timeout = -1ms});
  world.simulation.run();
  EXPECT_EQ(*too_large, Errc::too_large);
  EXPECT_EQ(*negative, Errc::invalid_option);
  expected.refused = 2;
  check("refused");

  for (int i = 0; i < 4; ++i) world.ask(session, "silence", {.timeout = 0ms});
  world.simulation.advance(1s);
  expected.pending = 4;
  check("for ever");
  world.cut();
  expected.connection_lost = std::exchange(expected.pending, 0);
  check("lost");

  const auto closed = world.ask(session, "x");
  world.simulation.run();
  EXPECT_EQ(*closed, Errc::closed);
  ++expected.refused;
  check("closed");

  // To nobody: no session's. While another is pending, which must not look like the outcome of this.
  world.connect();
  world.ask(world.came.back(), "silence", {.timeout = 0ms});
  std::optional<error_code> nobody;
  world.server->async_request(SessionId(~std::uint64_t{0}), "x", {},
                              [&](error_code code, const Reply&) { nobody = code; });
  world.simulation.run();
  EXPECT_EQ(*nobody, Errc::not_found);
  EXPECT_EQ(world.stats().requests_by_outcome.refused, expected.refused + 1);
  EXPECT_EQ(world.stats().requests_by_outcome.made, expected.made + 2);
  EXPECT_EQ(world.stats().requests_by_outcome.pending, 1U);
  EXPECT_EQ(session.stats().requests.refused, expected.refused);
}

TEST(RequestStatistics, RequestsThatWaitForRoomAreCountedAsWell) {
  World world({.outbound_bytes = 4096, .first_packet_timeout = 0ms});
  world.connect();
  Session session = world.came.front();
  world.simulation.set_faults({.stall = 1, .longest_stall = 1h});
  std::size_t filled = 0;
  for (; session.send(pattern(1000)) == SendResult::queued; ++filled) world.simulation.run();
  ASSERT_GE(filled, 3U);
  const auto late = world.ask(session, pattern(1000), {.timeout = 10ms});
  detail::asio::cancellation_signal signal;
  session.async_request(pattern(1000), {.timeout = 0ms},
                        detail::asio::bind_cancellation_slot(signal.slot(), [](error_code, Reply) {}));
  const auto closed = world.ask(session, pattern(1000), {.timeout = 0ms});
  world.simulation.run();
  EXPECT_EQ(world.stats().requests_by_outcome, (RequestCounts{.made = 3, .pending = 3}));
  signal.emit(detail::asio::cancellation_type::total);
  world.simulation.run();
  EXPECT_EQ(world.stats().requests_by_outcome, (RequestCounts{.made = 3, .cancelled = 1, .pending = 2}));
  world.simulation.advance(20ms);
  EXPECT_EQ(*late, Errc::request_timeout);
  world.cut();
  EXPECT_EQ(*closed, Errc::closed);
  const RequestCounts all{.made = 3, .timed_out = 1, .cancelled = 1, .refused = 1};
  EXPECT_EQ(world.stats().requests_by_outcome, all);
  EXPECT_EQ(session.stats().requests, all);
}

TEST(RequestStatistics, LatencyIsFromTheRequestToItsAnswer) {
  World world;
  world.connect();
  Session session = world.came.front();
  world.simulation.set_faults({.least_delay = 10ms, .most_delay = 10ms});
  for (int i = 0; i < 99; ++i) {
    world.ask(session, "quick");
    world.simulation.advance(25ms);
  }
  world.simulation.set_faults({.least_delay = 1s, .most_delay = 1s});
  world.ask(session, "slow");
  world.ask(session, "silence", {.timeout = 5s});
  world.simulation.advance(10s);
  const auto latency = world.stats().request_latency;
  EXPECT_EQ(latency.count(), 100U) << "who is not answered has none";
  EXPECT_GE(latency.min(), 20ms);
  EXPECT_LT(latency.min(), 21ms);
  EXPECT_GE(latency.quantile(0.99), 19ms);
  EXPECT_LT(latency.quantile(0.99), 22ms);
  EXPECT_GE(latency.max(), 2s);
  EXPECT_LT(latency.max(), 2001ms);
  EXPECT_EQ(latency.mean(), latency.total() / 100);
}

TEST(RequestStatistics, AClientCountsThoseOfAllItsConnections) {
  World world;
  auto& client = world.connect();
  for (int i = 0; i < 5; ++i) world.ask(client, "hello");
  world.simulation.run();
  world.ask(client, "silence");
  world.simulation.run();
  EXPECT_EQ(client.stats().requests, (RequestCounts{.made = 6, .sent = 6, .answered = 5, .pending = 1}));
  world.cut();
  EXPECT_EQ(client.stats().requests, (RequestCounts{.made = 6, .sent = 6, .answered = 5, .connection_lost = 1}));
  const auto nobody = world.ask(client, "hello");
  world.simulation.run();
  EXPECT_EQ(*nobody, Errc::closed);
  EXPECT_FALSE(world.connect(client, world.name));
  world.simulation.set_faults({.least_delay = 3ms, .most_delay = 3ms});
  world.ask(client, "hello");
  world.simulation.advance(1s);
  EXPECT_EQ(client.stats().requests, (RequestCounts{.made = 1, .sent = 1, .answered = 1})) << "of the latest";
  const auto stats = client.request_stats();
  EXPECT_EQ(stats.counts, (RequestCounts{.made = 8, .sent = 7, .answered = 6, .connection_lost = 1, .refused = 1}));
  EXPECT_EQ(stats.latency.count(), 6U);
  EXPECT_EQ(stats.latency.min(), 0ns) << "no time passed";
  EXPECT_GE(stats.latency.max(), 6ms);
  EXPECT_LT(stats.latency.max(), 7ms);
}

TEST(RequestStatistics, WhatPeersAskAndIsAnswered) {
  World world;
  auto& client = world.connect();
  for (int i = 0; i < 7; ++i) world.ask(client, "hello");
  for (int i = 0; i < 2; ++i) world.ask(client, "silence");
  client.send("no request");
  world.simulation.run();
  EXPECT_EQ(world.stats().requests_received, 9U);
  EXPECT_EQ(world.stats().answers_sent, 7U);
  EXPECT_EQ(world.stats().packets_in, 10U);
  EXPECT_EQ(world.stats().packets_out, 7U);
  EXPECT_EQ(world.stats().requests, 0U) << "this end made none";
}

TEST(RequestStatistics, LateAnswersAreUnmatched) {
  World world;
  world.connect();
  world.simulation.set_faults({.least_delay = 10ms, .most_delay = 10ms});
  world.ask(world.came.front(), "hello", {.timeout = 15ms});
  world.simulation.advance(1s);
  EXPECT_EQ(world.stats().unmatched_responses, 1U);
  EXPECT_EQ(world.stats().requests_by_outcome, (RequestCounts{.made = 1, .sent = 1, .timed_out = 1}));
  EXPECT_EQ(world.stats().request_latency.count(), 0U);
}

// --- how sessions end

TEST(EndStatistics, EachReasonIsCounted) {
  SessionOptions options{.max_payload = 1000, .first_packet_timeout = 0ms, .idle_timeout = 1h};
  World world(options);
  std::map<Errc, std::uint64_t> expected;
  std::uint64_t system = 0;
  const auto check = [&] {
    const auto stats = world.stats();
    std::uint64_t total = system;
    for (const auto& [code, count] : expected) {
      EXPECT_EQ(stats.ends[code], count) << to_string(code);
      total += count;
    }
    EXPECT_EQ(stats.ends.system(), system);
    EXPECT_EQ(stats.ends.total(), total);
    EXPECT_EQ(stats.sessions_total, stats.sessions + total);
    EXPECT_EQ(stats.protocol_errors, stats.ends.protocol_errors());
    EXPECT_EQ(world.reasons.size(), total);
  };
  const auto settle = [&](Errc code) {
    world.simulation.advance(5s);
    ++expected[code];
    check();
  };
  world.connect();  // which stays as long as nothing is idle
  check();
  world.connect().close();
  settle(Errc::closed_by_peer);
  world.connect();
  world.came.back().close("enough");
  settle(Errc::closed_by_user);
  world.connect({.max_payload = 5000, .first_packet_timeout = 0ms}).send(pattern(1001));
  settle(Errc::payload_too_large);
  world.connect().send("throw");
  settle(Errc::handler_failed);
  world.connect();
  world.cut();
  ++system;
  check();
  EXPECT_EQ(world.stats().sessions, 1U);
  world.simulation.advance(1h);
  settle(Errc::idle_timeout);
  EXPECT_EQ(world.stats().sessions, 0U);
}

TEST(EndStatistics, ProtocolErrorsByTheirKind) {
  TestServer server({.session = {.max_payload = 10'000, .max_extension = 100}});
  server.echo();
  const auto endpoint = server.transport.listen(tcp("127.0.0.1:0"));
  server.transport.start();
  std::uint64_t errors = 0;
  const auto break_it = [&](Errc kind, const auto& change) {
    wire::Header header;
    header.type = wire::PacketType::one_way;
    header.message_id = 1;
    header.payload_len = 4;
    Bytes bytes(wire::header_size + 4, std::byte{0x55});
    wire::encode_header(header, std::span<std::byte, wire::header_size>(bytes.data(), wire::header_size));
    change(bytes);
    RawPeer peer(endpoint);
    peer.send(bytes);
    ++errors;
    EXPECT_TRUE(wait_until([&] { return server.transport.stats().ends[kind] == 1; })) << to_string(kind);
  };
  break_it(Errc::bad_version, [](Bytes& bytes) { bytes[0] = std::byte{9}; });
  break_it(Errc::bad_compression, [](Bytes& bytes) { bytes[1] = std::byte{9}; });
  break_it(Errc::bad_type, [](Bytes& bytes) { bytes[2] = std::byte{9}; });
  break_it(Errc::extension_too_large, [](Bytes& bytes) { bytes[9] = std::byte{101}; });
  break_it(Errc::payload_too_large, [](Bytes& bytes) { bytes[11] = std::byte{1}; });
  break_it(Errc::fragmented, [](Bytes& bytes) { bytes[15] = std::byte{1}; });
  break_it(Errc::decompression_failed, [](Bytes& bytes) { bytes[1] = std::byte{2}; });
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().sessions == 0; }));
  const auto stats = server.transport.stats();
  EXPECT_EQ(stats.protocol_errors, errors);
  EXPECT_EQ(stats.ends.protocol_errors(), errors);
  EXPECT_EQ(stats.ends.total(), errors);
}

// --- queues and drops

TEST(QueueStatistics, SayWhatIsQueuedAndTheMostThatWas) {
  World world;
  world.connect();
  world.connect();
  world.simulation.set_faults({.stall = 1, .longest_stall = 10s});
  std::uint64_t bytes = 0;
  for (auto& session : world.came) {
    for (int i = 0; i < 10; ++i) {
      ASSERT_EQ(session.send(pattern(1000)), SendResult::queued);
      world.simulation.run();
    }
    const auto stats = session.stats();
    EXPECT_GE(stats.queued_packets, 9U) << "the first may have gone";
    EXPECT_EQ(stats.queued_bytes, stats.queued_packets * (1000 + wire::header_size));
    EXPECT_EQ(stats.most_queued_bytes, stats.queued_bytes);
    bytes += stats.queued_bytes;
  }
  EXPECT_EQ(world.stats().queued_bytes, bytes);
  EXPECT_EQ(world.stats().queued_packets, bytes / (1000 + wire::header_size));
  world.simulation.set_faults({});
  world.simulation.advance(1min);
  EXPECT_EQ(world.got, 20U);
  EXPECT_EQ(world.stats().queued_bytes, 0U);
  EXPECT_EQ(world.stats().queued_packets, 0U);
  EXPECT_EQ(world.came.front().stats().queued_bytes, 0U);
  EXPECT_GE(world.came.front().stats().most_queued_bytes, 9 * (1000 + wire::header_size)) << "it stays";
}

TEST(QueueStatistics, AreZeroWhenASessionWithAFullQueueHasEnded) {
  World world;
  world.connect();
  world.simulation.set_faults({.stall = 1, .longest_stall = 1h});
  for (int i = 0; i < 10; ++i) world.came.front().send(pattern(1000));
  world.simulation.run();
  EXPECT_GE(world.stats().queued_packets, 9U);
  world.cut();
  EXPECT_EQ(world.stats().queued_packets, 0U);
  EXPECT_EQ(world.stats().queued_bytes, 0U);
}

TEST(DropStatistics, WhatWasAcceptedIsWrittenOrDroppedForAReason) {
  World world({.outbound_bytes = 20'000, .slow_consumer = SlowConsumer::drop_oldest, .first_packet_timeout = 0ms});
  world.connect();
  Session session = world.came.front();
  std::uint64_t accepted = 0;
  const auto send = [&](int count) {
    for (int i = 0; i < count; ++i) {
      accepted += session.send(pattern(1000)) == SendResult::queued ? 1 : 0;
      world.simulation.run();
    }
  };
  const auto account = [&] {
    const auto server = world.stats();
    const auto one = session.stats();
    EXPECT_EQ(accepted, server.packets_out + server.dropped_oldest + server.dropped_at_close + server.queued_packets);
    EXPECT_EQ(accepted, one.packets_out + one.dropped_oldest + one.dropped_at_close + one.queued_packets);
    EXPECT_EQ(one.dropped_oldest, server.dropped_oldest);
    EXPECT_EQ(one.dropped_at_close, server.dropped_at_close);
    return server;
  };
  send(5);
  EXPECT_EQ(account().packets_out, 5U);
  world.simulation.set_faults({.stall = 1, .longest_stall = 1h});
  send(50);
  auto stats = account();
  EXPECT_GE(stats.dropped_oldest, 50U - 20 - 1);
  EXPECT_EQ(stats.dropped_at_close, 0U);
  EXPECT_EQ(stats.queued_packets, 19U) << "as many as have room";
  world.cut();
  stats = account();
  EXPECT_EQ(stats.dropped_at_close, 19U);
  EXPECT_EQ(world.at_the_end.dropped_at_close, 19U) << "on_disconnect sees it already";
}

TEST(DropStatistics, MessagesThatNobodyWantsAreCounted) {
  Simulation simulation;
  ServerTransport server({.executors = {simulation.executor()}, .session = quiet});
  ClientTransport client({.executor = simulation.executor()});
  const auto endpoint = server.listen(in_process(unused_name()));
  server.start();
  client.async_connect(endpoint.url(), [](error_code code) { EXPECT_FALSE(code); });
  simulation.run();
  for (int i = 0; i < 3; ++i) client.send("hello");
  simulation.run();
  EXPECT_EQ(server.stats().unhandled, 3U);
  EXPECT_EQ(server.stats().packets_in, 3U);
}

// --- listeners

TEST(ListenerStatistics, AreOfEachListenerAndAddUpToTheServers) {
  World world;
  const auto second = unused_name();
  world.server->listen(in_process(second), {});
  auto& one = world.connect();
  world.connect();
  auto& other = world.make_client();
  ASSERT_FALSE(world.connect(other, second));
  for (int i = 0; i < 3; ++i) world.ask(one, "hello");
  world.ask(other, pattern(500));
  other.send("one way");
  world.simulation.run();
  world.cut();  // the second listener's
  world.refuse = true;
  auto& refused = world.make_client();
  (void)world.connect(refused, second);
  world.simulation.advance(1s);

  const auto listeners = world.server->listener_stats();
  ASSERT_EQ(listeners.size(), 2U);
  EXPECT_EQ(listeners[0].endpoint, in_process(world.name));
  EXPECT_EQ(listeners[1].endpoint, in_process(second));
  EXPECT_EQ(listeners[0].sessions, 2U);
  EXPECT_EQ(listeners[0].sessions_total, 2U);
  EXPECT_EQ(listeners[0].sessions_refused, 0U);
  EXPECT_EQ(listeners[0].packets_in, 3U);
  EXPECT_EQ(listeners[0].packets_out, 3U);
  EXPECT_EQ(listeners[0].bytes_in, 3 * (wire::header_size + 5));
  EXPECT_EQ(listeners[0].bytes_out, 3 * (wire::header_size + 5));
  EXPECT_EQ(listeners[1].sessions, 0U);
  EXPECT_EQ(listeners[1].sessions_total, 1U);
  EXPECT_EQ(listeners[1].sessions_refused, 1U);
  EXPECT_EQ(listeners[1].packets_in, 2U);
  EXPECT_EQ(listeners[1].packets_out, 1U);
  EXPECT_EQ(listeners[1].bytes_in, 2 * wire::header_size + 507);
  EXPECT_EQ(listeners[1].bytes_out, wire::header_size + 500);

  const auto stats = world.stats();
  EXPECT_EQ(stats.sessions, 2U);
  EXPECT_EQ(stats.sessions_total, 3U);
  EXPECT_EQ(stats.sessions_refused, 1U);
  EXPECT_EQ(stats.packets_in, 5U);
  EXPECT_EQ(stats.packets_out, 4U);
  EXPECT_EQ(stats.bytes_in, listeners[0].bytes_in + listeners[1].bytes_in);
  EXPECT_EQ(stats.bytes_out, listeners[0].bytes_out + listeners[1].bytes_out);
}

TEST(ListenerStatistics, CountConnectionsThatBecomeNoSession) {
  TestServer server({.max_sessions = 1});
  server.echo();
  const auto plain = server.transport.listen(tcp("127.0.0.1:0"));
  const auto web = server.transport.listen(websocket("127.0.0.1:0"), {.handshake_timeout = 100ms});
  server.transport.start();
  const auto beside = tcp("127.0.0.1:" + std::to_string(web.port));  // without WebSocket's handshake
  const auto failures = [&] { return server.transport.listener_stats()[1].handshake_failures; };
  {
    RawPeer garbage(beside);
    garbage.send("this is not HTTP\r\n\r\n");
    EXPECT_TRUE(wait_until([&] { return failures() == 1; }));
  }
  {
    const RawPeer silent(beside);
    EXPECT_TRUE(wait_until([&] { return failures() == 2; }));
  }
  RawPeer only(plain);
  only.send(one_way(1, "hello"));
  (void)only.next();
  RawPeer one_too_many(plain);
  EXPECT_TRUE(wait_until([&] { return server.transport.listener_stats()[0].sessions_refused == 1; }));
  const auto listeners = server.transport.listener_stats();
  EXPECT_EQ(listeners[0].handshake_failures, 0U);
  EXPECT_EQ(listeners[0].sessions, 1U);
  EXPECT_EQ(listeners[1].sessions_total, 0U);
  const auto stats = server.transport.stats();
  EXPECT_EQ(stats.handshake_failures, 2U);
  EXPECT_EQ(stats.handshake_failures_by.total(), 2U);
  EXPECT_EQ(stats.handshake_failures_by[Errc::handshake_failed], 1U);
  EXPECT_EQ(stats.handshake_failures_by[Errc::handshake_timeout], 1U);
  EXPECT_EQ(stats.sessions_refused, 1U);
  EXPECT_EQ(stats.ends.total(), 0U);
}

TEST(ListenerStatistics, AreThereAfterTheStop) {
  TestServer server;
  server.echo().start();
  {
    RawPeer peer(server.endpoint);
    peer.send(one_way(1, "hello"));
    (void)peer.next();
  }
  server.transport.stop(patience);
  const auto stats = server.transport.stats();
  EXPECT_EQ(stats.sessions_total, 1U);
  EXPECT_EQ(stats.packets_in, 1U);
  EXPECT_EQ(stats.packets_out, 1U);
  EXPECT_EQ(stats.ends.total(), 1U);
  const auto listeners = server.transport.listener_stats();
  ASSERT_EQ(listeners.size(), 1U);
  EXPECT_EQ(listeners[0].endpoint, server.endpoint);
  EXPECT_EQ(listeners[0].sessions, 0U);
  EXPECT_EQ(listeners[0].sessions_total, 1U);
}

// --- events

TEST(EventStatistics, SayHowFarSubscribersAreBehind) {
  World world(quiet, {.event_capacity = 8});
  EXPECT_EQ(world.stats().control.subscribers, 0U);
  auto subscription = world.server->subscribe();
  auto second = world.server->subscribe();
  for (int i = 0; i < 5; ++i) world.connect();
  auto control = world.stats().control;
  EXPECT_EQ(control.subscribers, 2U);
  EXPECT_EQ(control.events, 5U);
  EXPECT_EQ(control.event_lag, 5U);
  EXPECT_EQ(control.events_missed, 0U);
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(subscription.try_next());
  EXPECT_EQ(subscription.lag(), 0U);
  EXPECT_EQ(world.stats().control.event_lag, 5U) << "of the other";
  for (int i = 0; i < 6; ++i) world.connect();
  EXPECT_EQ(second.try_next().lagged(), 3U);
  control = world.stats().control;
  EXPECT_EQ(control.events, 11U);
  EXPECT_EQ(control.events_missed, 3U);
  EXPECT_EQ(control.event_lag, 8U);
  second.unsubscribe();
  EXPECT_EQ(world.stats().control.event_lag, 6U);
  while (subscription.try_next().kind() != NextResult<Event>::Kind::empty) continue;
  EXPECT_EQ(world.stats().control.event_lag, 0U);
}

}  // namespace
}  // namespace msgtrans::test
