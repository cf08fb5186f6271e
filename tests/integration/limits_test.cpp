// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/error.hpp>
#include <deque>
#include <fstream>
#include <msgtrans/testing/simulation.hpp>
#include <sstream>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using testing::Simulation;

/// A server and clients in a simulation. The clients' sessions are on the server in the order they came.
class World {
 public:
  explicit World(ServerOptions options) {
    options.executors = {simulation.executor()};
    server.emplace(std::move(options));
    server->on_connect([this](Session& session) { sessions.push_back(session); });
    server->on_disconnect([this](Session&, const Error& reason) { ends.push_back(reason.code); });
    server->on_writable([this](Session& session) {
      ++writable[session.id()];
      if (when_writable) when_writable(session);
    });
  }

  void start() {
    server->listen(in_process(name), {});
    server->start();
  }

  ClientTransport& connect(SessionOptions options = {.first_packet_timeout = 0ms}) {
    auto& client = clients.emplace_back(ClientOptions{.executor = simulation.executor(), .session = options});
    client.on_message([this](Session&, const Message& message) {
      if (message.is_one_way()) got.emplace_back(message.text());
      if (message.is_request()) asked.push_back(message.retain());
    });
    bool done = false;
    client.async_connect("inproc://" + name, [&](error_code code) {
      EXPECT_FALSE(code) << code.message();
      done = true;
    });
    EXPECT_TRUE(simulation.run_until([&] { return done && sessions.size() == clients.size(); }, 20s));
    return client;
  }

  /// From now on nothing arrives ...
  void block() { simulation.set_faults({.stall = 1, .longest_stall = std::chrono::hours(10)}); }
  /// ... and now it does, what was stalled too.
  void unblock() {
    simulation.set_faults({});
    simulation.advance(10h);
  }

  std::size_t fill(Session& session, std::size_t size) {
    std::size_t taken = 0;
    while (session.send(pattern(size)) == SendResult::queued) ++taken;
    return taken;
  }

  Simulation simulation;
  std::string name = unused_name();
  std::vector<Session> sessions;
  std::vector<error_code> ends;
  std::map<SessionId, int> writable;
  std::function<void(Session&)> when_writable;
  std::vector<std::string> got;
  std::vector<OwnedMessage> asked;
  std::optional<ServerTransport> server;
  std::deque<ClientTransport> clients;
};

SessionOptions patient(SessionOptions options) {
  options.first_packet_timeout = 0ms;
  options.write_stall_timeout = 0ms;
  return options;
}

// --- on_writable and the low mark

TEST(Writable, IsToldOnceWhenTheQueueIsDownToItsLowMark) {
  for (const unsigned percent : {0U, 50U, 99U}) {
    World world({.session = patient({.outbound_bytes = 10'000, .low_mark_percent = percent})});
    world.start();
    world.connect();
    Session session = world.sessions.front();
    std::size_t queued_then = ~std::size_t{0};
    world.when_writable = [&](Session& told) { queued_then = told.stats().queued_bytes; };
    world.block();
    world.fill(session, 984);
    world.simulation.advance(1s);
    EXPECT_EQ(world.writable[session.id()], 0);
    world.unblock();
    EXPECT_EQ(world.writable[session.id()], 1);
    EXPECT_LE(queued_then, 10'000U * percent / 100);
    EXPECT_EQ(session.send("x"), SendResult::queued);
    world.simulation.advance(1s);
    EXPECT_EQ(world.writable[session.id()], 1) << "told of a queue that was not found full";
  }
}

TEST(Writable, IsToldAtTheLowMarkOfTheOptionsAndNotBefore) {
  struct Case {
    unsigned percent;
    std::size_t above;  // so many bytes, of which ten thousand are more than that share
    std::size_t below;
  };
  for (const auto& [percent, above, below] : {Case{20, 49'000, 50'000}, Case{80, 12'400, 12'500}}) {
    World world({.session = patient({.outbound_bytes = 10'000, .low_mark_percent = percent})});
    world.start();
    world.connect();
    Session session = world.sessions.front();
    world.block();
    ASSERT_EQ(world.fill(session, 984), 10U);
    session.set_outbound_limits({.bytes = above});
    world.simulation.advance(1s);
    EXPECT_EQ(world.writable[session.id()], 0) << percent;
    session.set_outbound_limits({.bytes = below});
    world.simulation.advance(1s);
    EXPECT_EQ(world.writable[session.id()], 1) << percent;
  }
}

TEST(Writable, IsToldAgainEachTimeAndWhoSendsThenKeepsTheOthersFromNothing) {
  World world({.session = patient({.outbound_bytes = 10'000})});
  world.start();
  world.connect();
  world.connect();
  Session greedy = world.sessions[0];
  Session other = world.sessions[1];
  int rounds = 0;
  world.when_writable = [&](Session& session) {
    if (session == greedy && ++rounds < 100) world.fill(session, 984);
    if (rounds == 50) {
      EXPECT_EQ(other.send("between"), SendResult::queued);
    }
  };
  world.fill(greedy, 984);
  world.simulation.advance(10s);
  EXPECT_EQ(rounds, 100);
  EXPECT_EQ(std::ranges::count(world.got, "between"), 1);
}

TEST(Writable, WaitersGoFirst) {
  World world({.session = patient({.outbound_bytes = 10'000})});
  world.start();
  world.connect();
  Session session = world.sessions.front();
  world.block();
  world.fill(session, 984);
  int sent = 0;
  for (int i = 0; i < 30; ++i) {
    session.async_send(pattern(984), [&](error_code code) { sent += code ? 0 : 1; });
  }
  world.simulation.run();
  world.when_writable = [&](Session& told) { EXPECT_EQ(told.send("after"), SendResult::queued); };
  world.unblock();
  EXPECT_EQ(sent, 30);
  EXPECT_EQ(world.got.back(), "after");
  EXPECT_EQ(world.writable[session.id()], 1);
}

TEST(Writable, AHandlerThatThrowsEndsThatSessionOnly) {
  World world({.session = patient({.outbound_bytes = 10'000})});
  world.start();
  world.connect();
  world.connect();
  world.when_writable = [](Session&) { throw std::runtime_error("from on_writable"); };
  world.fill(world.sessions[0], 984);
  world.simulation.advance(10s);
  EXPECT_EQ(world.ends, std::vector<error_code>{Errc::handler_failed});
  EXPECT_TRUE(world.sessions[1].is_open());
}

TEST(Writable, IsToldToClientsToo) {
  World world({.session = patient({})});
  world.start();
  auto& client = world.clients.emplace_back(
      ClientOptions{.executor = world.simulation.executor(), .session = patient({.outbound_bytes = 10'000})});
  int told = 0;
  client.on_writable([&](Session&) { ++told; });
  bool done = false;
  client.async_connect("inproc://" + world.name, [&](error_code) { done = true; });
  ASSERT_TRUE(world.simulation.run_until([&] { return done; }, 1s));
  while (client.send(pattern(984)) == SendResult::queued) {
  }
  world.simulation.advance(1s);
  EXPECT_EQ(told, 1);
}

/// Real threads: whoever is refused is told afterwards, whatever the moment.
TEST(Writable, IsNeverMissedByThreadsThatSendWhileTheQueueEmpties) {
  TestServer server({.session = {.outbound_bytes = 4096, .first_packet_timeout = 0ms}});
  std::atomic<int> told{0};
  server.transport.on_writable([&](Session&) {
    told.fetch_add(1);
    told.notify_all();
  });
  server.start();
  ClientTransport client;
  client.connect(server.url());
  Session session = server.session();
  std::vector<std::thread> senders;
  std::atomic<int> finished{0};
  for (int t = 0; t < 3; ++t) {
    senders.emplace_back([&] {
      for (int i = 0; i < 2000;) {
        const int before = told.load();
        if (session.send(pattern(500)) == SendResult::queued) {
          ++i;
        } else if (!wait_until([&] { return told.load() != before; })) {
          ADD_FAILURE() << "never told";
          return;
        }
      }
      finished.fetch_add(1);
    });
  }
  for (auto& sender : senders) sender.join();
  EXPECT_EQ(finished.load(), 3);
}

// --- limits of one session, changed while it runs

TEST(OutboundLimitsOfASession, CanBeChangedAndHoldFromThenOn) {
  World world({.session = patient({.outbound_bytes = 10'000})});
  world.start();
  world.connect();
  world.connect();
  Session session = world.sessions[0];
  EXPECT_EQ(session.outbound_limits(), (OutboundLimits{10'000, 4096, SlowConsumer::wait}));
  session.set_outbound_limits({.bytes = 20'000, .packets = 5});
  EXPECT_EQ(session.outbound_limits(), (OutboundLimits{20'000, 5, SlowConsumer::wait}));
  world.block();
  EXPECT_EQ(world.fill(session, 984), 5U);
  session.set_outbound_limits({.bytes = 20'000});
  EXPECT_EQ(world.fill(session, 984), 15U);
  EXPECT_EQ(world.fill(world.sessions[1], 984), 10U) << "the other one's are as they were";
  session.set_outbound_limits({.bytes = 20'000, .slow_consumer = SlowConsumer::drop_oldest});
  world.simulation.run();
  EXPECT_EQ(session.send("newest"), SendResult::queued);
  world.simulation.run();
  EXPECT_GE(world.server->stats().dropped_oldest, 1U);
  session.set_outbound_limits({.bytes = 100, .slow_consumer = SlowConsumer::close});
  EXPECT_EQ(session.send("one too many"), SendResult::closed);
  world.simulation.advance(1min);
  EXPECT_EQ(world.ends, std::vector<error_code>{Errc::slow_consumer});
}

TEST(OutboundLimitsOfASession, AdmitsWaitersWhenRaised) {
  World world({.session = patient({.outbound_bytes = 10'000})});
  world.start();
  world.connect();
  Session session = world.sessions.front();
  world.block();
  world.fill(session, 984);
  bool sent = false;
  session.async_send(pattern(984), [&](error_code code) { sent = !code; });
  world.simulation.advance(1s);
  EXPECT_FALSE(sent);
  session.set_outbound_limits({.bytes = 11'000});
  world.simulation.run();
  EXPECT_TRUE(sent);
}

TEST(OutboundLimitsOfASession, HoldForItsAnswersToo) {
  World world({.session = patient({.outbound_bytes = 100'000})});
  int handed_out = 0;
  world.server->on_message([&](Session& session, const Message& message) {
    if (++handed_out == 1) world.block();
    session.respond(message, pattern(984));
  });
  world.start();
  auto& client = world.connect();
  world.sessions.front().set_outbound_limits({.bytes = 5000});
  world.simulation.run();
  int answered = 0;
  for (int i = 0; i < 50; ++i) {
    client.async_request("?", {.timeout = 0ms}, [&](error_code code, const Reply&) { answered += code ? 0 : 1; });
  }
  world.simulation.advance(1s);
  EXPECT_EQ(handed_out, 5) << "while its answers wait";
  world.unblock();
  EXPECT_EQ(answered, 50);
}

TEST(OutboundLimitsOfASession, AreCheckedAndThenNothingChanges) {
  World world({.session = patient({.outbound_bytes = 10'000})});
  world.start();
  world.connect();
  Session session = world.sessions.front();
  std::string text;
  EXPECT_EQ(thrown([&] { session.set_outbound_limits({.bytes = 0}); }, &text), Errc::invalid_option);
  EXPECT_NE(text.find("outbound_bytes is 0"), std::string::npos) << text;
  EXPECT_EQ(thrown([&] { session.set_outbound_limits({.packets = 0}); }), Errc::invalid_option);
  EXPECT_EQ(session.outbound_limits().bytes, 10'000U);
}

// --- async_send in time

TEST(AsyncSend, ThatFindsNoRoomInTimeIsNotTaken) {
  World world({.session = patient({.outbound_bytes = 10'000})});
  world.start();
  world.connect();
  Session session = world.sessions.front();
  world.block();
  const auto taken = world.fill(session, 984);
  const auto begun = world.simulation.now();
  error_code code;
  session.async_send("in time", {.timeout = 2s}, [&](error_code told) { code = told; });
  bool patient_sent = false;
  session.async_send("for ever", [&](error_code told) { patient_sent = !told; });
  ASSERT_TRUE(world.simulation.run_until([&] { return code.failed(); }, 1h));
  EXPECT_EQ(code, Errc::send_timeout);
  EXPECT_GE(world.simulation.now() - begun, 2s);
  EXPECT_LT(world.simulation.now() - begun, 2100ms);
  EXPECT_EQ(world.server->stats().requests_timed_out, 0U);
  world.unblock();
  EXPECT_TRUE(patient_sent);
  EXPECT_EQ(world.got.size(), taken + 1);
  EXPECT_EQ(std::ranges::count(world.got, "in time"), 0);
  error_code negative;
  session.async_send("x", {.timeout = -1ms}, [&](error_code told) { negative = told; });
  world.simulation.run();
  EXPECT_EQ(negative, Errc::invalid_option);
}

TEST(AsyncSend, ThatFindsNoRoomIsNotOvertakenByWhatIsSentAfterIt) {
  World world({.session = patient({.outbound_bytes = 10'000})});
  world.start();
  world.connect();
  Session session = world.sessions.front();
  world.block();
  for (int i = 0; i < 9; ++i) ASSERT_EQ(session.send(pattern(984)), SendResult::queued);
  bool sent = false;
  session.async_send("first" + pattern(2000), [&](error_code code) { sent = !code; });
  EXPECT_EQ(session.send("second"), SendResult::would_block) << "it would have had room";
  asio::cancellation_signal cancel;
  error_code cancelled;
  session.async_send("never", asio::bind_cancellation_slot(cancel.slot(), [&](error_code code) { cancelled = code; }));
  cancel.emit(asio::cancellation_type::all);
  world.unblock();
  EXPECT_TRUE(sent);
  EXPECT_EQ(cancelled, asio::error::operation_aborted);
  EXPECT_EQ(session.send("second"), SendResult::queued) << "nobody is in line any more";
  world.simulation.advance(1s);
  ASSERT_EQ(world.got.size(), 11U);
  EXPECT_EQ(world.got[9].substr(0, 5), "first");
  EXPECT_EQ(world.got[10], "second");
}

// --- the server's total

TEST(TotalBudget, HoldsForAllSessionsTogetherWhateverTheirPolicy) {
  World world({.outbound_bytes_total = 30'000,
               .session = patient({.outbound_bytes = 20'000, .slow_consumer = SlowConsumer::close})});
  world.start();
  for (int i = 0; i < 3; ++i) world.connect();
  world.block();
  for (int i = 0; i < 20; ++i) ASSERT_EQ(world.sessions[0].send(pattern(984)), SendResult::queued);
  EXPECT_EQ(world.fill(world.sessions[1], 984), 10U);
  EXPECT_EQ(world.sessions[2].send("x"), SendResult::would_block);
  EXPECT_EQ(world.sessions[2].send("x", {.high_priority = true}), SendResult::would_block);
  EXPECT_TRUE(world.sessions[1].is_open()) << "closed for what others have queued";
  const auto result = world.server->broadcast("y");
  EXPECT_EQ(result.queued, 0U);
  world.unblock();
  EXPECT_EQ(world.fill(world.sessions[2], 984), 20U);
}

TEST(TotalBudget, WakesWhoWaitsForItInOtherSessionsAndTellsWhoWasRefused) {
  World world({.outbound_bytes_total = 20'000, .session = patient({.outbound_bytes = 20'000})});
  world.start();
  for (int i = 0; i < 3; ++i) world.connect();
  world.block();
  world.fill(world.sessions[0], 984);
  bool sent = false;
  world.sessions[1].async_send("waits", [&](error_code code) { sent = !code; });
  EXPECT_EQ(world.sessions[2].send("refused"), SendResult::would_block);
  world.simulation.advance(1s);
  EXPECT_FALSE(sent);
  EXPECT_EQ(world.writable.size(), 0U);
  world.unblock();
  EXPECT_TRUE(sent);
  EXPECT_EQ(world.writable[world.sessions[2].id()], 1);
}

TEST(TotalBudget, IsGivenBackByAllThatLeavesTheQueues) {
  World world({.outbound_bytes_total = 20'000,
               .session = patient({.outbound_bytes = 10'000, .slow_consumer = SlowConsumer::drop_oldest})});
  world.server->on_message([](Session& session, const Message& message) {
    session.respond(message, message.payload());
    session.send("and an answer that is none");
  });
  world.start();
  for (int round = 0; round < 20; ++round) {
    auto& client = world.connect();
    Session session = world.sessions.back();
    int answered = 0;
    for (int i = 0; i < 3; ++i) {
      client.async_request(pattern(3000), {.timeout = 1s}, [&](error_code, const Reply&) { ++answered; });
    }
    world.block();
    for (int i = 0; i < 50; ++i) {
      session.send(pattern(984));
      session.send(pattern(500), {.high_priority = i % 7 == 0});
      world.server->broadcast(pattern(200));
      world.simulation.run();
    }
    if (round % 3 == 0) session.close();
    if (round % 3 == 1) client.close();
    world.unblock();
    world.simulation.advance(1min);
    EXPECT_EQ(answered, 3);
  }
  for (auto& client : world.clients) client.close();
  world.unblock();
  EXPECT_EQ(world.server->session_count(), 0U);
  world.connect();
  world.block();
  EXPECT_EQ(world.sessions.back().send(pattern(19'984)), SendResult::queued) << "something was not given back";
}

TEST(TotalBudget, LetsEverySessionAnswerOneByOneWhenAnswersUseItUp) {
  World world({.outbound_bytes_total = 10'000, .session = patient({.outbound_bytes = 100'000})});
  world.server->on_message([](Session& session, const Message& message) { session.respond(message, pattern(5000)); });
  world.start();
  int answered = 0;
  for (int i = 0; i < 5; ++i) world.connect();
  world.block();
  for (auto& client : world.clients) {
    for (int n = 0; n < 20; ++n) {
      client.async_request("?", {.timeout = 0ms}, [&](error_code code, const Reply&) { answered += code ? 0 : 1; });
    }
  }
  world.unblock();
  EXPECT_EQ(answered, 100);
}

TEST(TotalBudget, IsTakenByAnswersToo) {
  World world({.outbound_bytes_total = 10'000, .session = patient({.outbound_bytes = 100'000})});
  std::optional<OwnedMessage> asked;
  world.server->on_message([&](Session&, const Message& message) { asked = message.retain(); });
  world.start();
  auto& client = world.connect();
  world.connect();
  int answered = 0;
  client.async_request("?", {.timeout = 0ms}, [&](error_code code, const Reply&) { answered += code ? 0 : 1; });
  world.simulation.run();
  ASSERT_TRUE(asked);
  world.block();
  EXPECT_EQ(asked->respond(pattern(20'000)), SendResult::queued);
  world.simulation.advance(1s);
  EXPECT_EQ(world.sessions[1].send("x"), SendResult::would_block);
  world.unblock();
  EXPECT_EQ(answered, 1);
  EXPECT_EQ(world.sessions[1].send("x"), SendResult::queued);
}

TEST(TotalBudget, ThatIsUsedUpKeepsASessionWithAnEmptyQueueFromBeingToldThatItMaySend) {
  World world({.outbound_bytes_total = 10'000, .session = patient({.outbound_bytes = 10'000})});
  world.start();
  world.connect();
  auto& client = world.connect();
  world.block();
  ASSERT_EQ(world.fill(world.sessions[0], 984), 10U);
  EXPECT_EQ(world.sessions[1].send("x"), SendResult::would_block);
  world.sessions[1].set_outbound_limits({.bytes = 10'000});  // whatever makes it look at its queue
  world.simulation.advance(1s);
  EXPECT_EQ(world.writable[world.sessions[1].id()], 0);
  world.unblock();
  EXPECT_EQ(world.writable[world.sessions[1].id()], 1);
  EXPECT_TRUE(client.is_connected());
}

// --- dropping the oldest

TEST(DroppingTheOldest, TakesTwiceTheBudgetAtMostUntilTheShardHasDropped) {
  for (const bool by_bytes : {true, false}) {
    SessionOptions options{.slow_consumer = SlowConsumer::drop_oldest};
    (by_bytes ? options.outbound_bytes : options.outbound_packets) = by_bytes ? 10'000 : 10;
    World world({.session = patient(options)});
    world.start();
    world.connect();
    int taken = 0;
    while (taken < 100 && world.sessions.front().send(pattern(984)) == SendResult::queued) ++taken;
    EXPECT_EQ(taken, 20) << (by_bytes ? "bytes" : "packets");
  }
}

TEST(DroppingTheOldest, KeepsToTheBudgetOfPackets) {
  World world({.session = patient({.outbound_packets = 5, .slow_consumer = SlowConsumer::drop_oldest})});
  world.start();
  world.connect();
  world.block();
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(world.sessions.front().send(std::to_string(i)), SendResult::queued);
    world.simulation.run();
    EXPECT_LE(world.sessions.front().stats().queued_packets, 5U);
  }
  EXPECT_EQ(world.sessions.front().stats().dropped_oldest, 3U);
  world.unblock();
  EXPECT_EQ(world.got.back(), "7");
}

TEST(DroppingTheOldest, IsDoneForLargeBroadcastsToo) {
  World world({.session = patient({.outbound_bytes = 100'000, .slow_consumer = SlowConsumer::drop_oldest})});
  world.start();
  world.connect();
  world.block();
  const std::string large = pattern(30'000 - wire::header_size);
  for (int i = 0; i < 10; ++i) {
    EXPECT_EQ(world.server->broadcast(large).queued, 1U);
    world.simulation.run();
    EXPECT_LE(world.sessions.front().stats().queued_bytes, 100'000U);
  }
  EXPECT_EQ(world.sessions.front().stats().dropped_oldest, 7U);
}

// --- requests in flight

TEST(RequestsInFlight, AreNotHandedOutOverTheLimitUntilOneIsAnswered) {
  for (const std::size_t most : {std::size_t{1}, std::size_t{5}, std::size_t{0}}) {
    World world({.session = patient({.max_requests_in_flight = most})});
    std::deque<OwnedMessage> kept;
    world.server->on_message([&](Session&, const Message& message) { kept.push_back(message.retain()); });
    world.start();
    auto& client = world.connect();
    int answered = 0;
    for (int i = 0; i < 20; ++i) {
      client.async_request(std::to_string(i), {.timeout = 0ms}, [&, i](error_code code, const Reply& reply) {
        EXPECT_FALSE(code);
        EXPECT_EQ(reply.text(), std::to_string(i));
        ++answered;
      });
    }
    world.simulation.run();
    EXPECT_EQ(kept.size(), most == 0 ? 20 : most);
    while (!kept.empty()) {
      ASSERT_EQ(kept.front().respond(kept.front().text()), SendResult::queued);
      kept.pop_front();
      world.simulation.run();
      EXPECT_LE(kept.size(), most == 0 ? 20 : most);
    }
    EXPECT_EQ(answered, 20);
  }
}

TEST(RequestsInFlight, ThatAreGivenUpMakeRoomAsWell) {
  World world({.session = patient({.max_requests_in_flight = 2})});
  std::deque<OwnedMessage> kept;
  int seen = 0;
  world.server->on_message([&](Session&, const Message& message) {
    ++seen;
    kept.push_back(message.retain());
  });
  world.start();
  auto& client = world.connect();
  for (int i = 0; i < 6; ++i) client.async_request("?", {.timeout = 1s}, [](error_code, const Reply&) {});
  world.simulation.run();
  EXPECT_EQ(seen, 2);
  kept.clear();
  world.simulation.run();
  EXPECT_EQ(seen, 4);
}

/// Real threads: the last answer and the hold may meet at any moment.
TEST(RequestsInFlight, AnsweredByOtherThreadsNeverLeaveASessionHeld) {
  TestServer server({.session = {.max_requests_in_flight = 1}});
  Record<std::shared_ptr<OwnedMessage>> kept;
  server.transport.on_message(
      [kept](Session&, const Message& message) mutable { kept.add(std::make_shared<OwnedMessage>(message.retain())); });
  server.start();
  ClientTransport client;
  client.connect(server.url());
  constexpr std::size_t count = 3000;
  std::thread answers([&] {
    for (std::size_t i = 0; i < count; ++i) kept.at(i)->respond("done");
  });
  std::vector<Answer> waiting;
  for (std::size_t i = 0; i < count; ++i) {
    waiting.push_back(ask(client, "?", {.timeout = 0ms}));
    if (waiting.size() < 16) continue;
    for (auto& one : waiting) ASSERT_EQ(in_time(one).second.text(), "done");
    waiting.clear();
  }
  for (auto& one : waiting) EXPECT_EQ(in_time(one).second.text(), "done");
  answers.join();
}

// --- rates

TEST(RateOfASession, LetsABurstThroughAndThenSoManyASecond) {
  World world({.session = patient({.packets_per_second = 10, .packet_burst = 5})});
  std::vector<Simulation::Clock::time_point> times;
  world.server->on_message([&](Session&, const Message&) { times.push_back(world.simulation.now()); });
  world.start();
  auto& client = world.connect();
  const auto begun = world.simulation.now();
  for (int i = 0; i < 35; ++i) EXPECT_EQ(client.send(std::to_string(i)), SendResult::queued);
  world.simulation.advance(1min);
  ASSERT_EQ(times.size(), 35U) << "nothing is dropped";
  EXPECT_EQ(times[4], begun);
  EXPECT_GE(times[34] - begun, 2900ms);
  EXPECT_LE(times[34] - begun, 3200ms);
  EXPECT_GE(world.server->stats().throttled, 28U);
}

TEST(RateOfASession, CountsBytesOnTheWireAndHoldsForThatSessionOnly) {
  World world({.session = patient({.bytes_per_second = 10'000})});
  std::map<SessionId, int> seen;
  world.server->on_message([&](Session& session, const Message&) { ++seen[session.id()]; });
  world.start();
  auto& flood = world.connect();
  auto& normal = world.connect();
  for (int i = 0; i < 100; ++i) EXPECT_EQ(flood.send(pattern(984)), SendResult::queued);
  world.simulation.advance(2s);
  EXPECT_EQ(normal.send("x"), SendResult::queued);
  world.simulation.run();
  EXPECT_EQ(seen[world.sessions[1].id()], 1);
  EXPECT_GE(seen[world.sessions[0].id()], 29);
  EXPECT_LE(seen[world.sessions[0].id()], 32);
  world.simulation.advance(10s);
  EXPECT_EQ(seen[world.sessions[0].id()], 100);
}

TEST(RateOfASession, IsNoReasonToTakeThePeerForIdleSilentOrStalled) {
  World world({.session = patient({.packets_per_second = 1,
                                   .packet_burst = 1,
                                   .idle_timeout = 300ms,
                                   .heartbeat_interval = 100ms,
                                   .read_stall_timeout = 300ms})});
  int seen = 0;
  world.server->on_message([&](Session&, const Message&) { ++seen; });
  world.start();
  auto& client = world.connect();
  for (int i = 0; i < 5; ++i) EXPECT_EQ(client.send(std::to_string(i)), SendResult::queued);
  world.simulation.advance(4500ms);
  EXPECT_EQ(seen, 5);
  EXPECT_TRUE(world.ends.empty());
}

TEST(RateOfASession, OfBytesHasABurst) {
  World world({.session = patient({.bytes_per_second = 1000, .byte_burst = 20'000})});
  int seen = 0;
  world.server->on_message([&](Session&, const Message&) { ++seen; });
  world.start();
  auto& client = world.connect();
  for (int i = 0; i < 30; ++i) EXPECT_EQ(client.send(pattern(984)), SendResult::queued);
  world.simulation.run();
  EXPECT_GE(seen, 20);
  EXPECT_LE(seen, 21);
  world.simulation.advance(1min);
  EXPECT_EQ(seen, 30);
}

// --- heartbeats

TEST(Heartbeats, AreSentWithTheirTypeAndASilentPeerIsTakenForGoneAfterSoMany) {
  World world({.session = patient({.heartbeat_interval = 1s, .heartbeat_biz_type = 7, .max_missed_heartbeats = 5})});
  world.start();
  auto& client = world.clients.emplace_back(
      ClientOptions{.executor = world.simulation.executor(), .session = {.first_packet_timeout = 0ms}});
  std::vector<int> types;
  client.on_message([&](Session&, const Message& message) { types.push_back(message.biz_type()); });
  client.async_connect("inproc://" + world.name, [](error_code code) { EXPECT_FALSE(code) << code.message(); });
  ASSERT_TRUE(world.simulation.run_until([&] { return !world.sessions.empty(); }, 20s));
  world.simulation.advance(5900ms);
  EXPECT_EQ(types, std::vector<int>(5, 7));
  EXPECT_TRUE(world.ends.empty());
  world.simulation.advance(1s);
  EXPECT_EQ(world.ends, std::vector<error_code>{Errc::peer_silent});
}

TEST(Heartbeats, OfBothEndsKeepASessionAndAreHandedToNobody) {
  const auto options = patient({.heartbeat_interval = 1s, .heartbeat_biz_type = 7});
  World world({.session = options});
  int handed_out = 0;
  world.server->on_message([&](Session&, const Message&) { ++handed_out; });
  world.start();
  world.connect(options);
  world.simulation.advance(1h);
  EXPECT_TRUE(world.ends.empty());
  EXPECT_EQ(handed_out, 0);
  EXPECT_TRUE(world.got.empty());
  EXPECT_GE(world.sessions.front().stats().packets_in, 3000U);
}

// --- what is told of a timeout

TEST(ToldTimeout, IsWhatIsLeftWhenTheRequestGoesOutAndThenTheExtension) {
  World world({.session = patient({})});
  std::vector<std::optional<std::chrono::milliseconds>> told;
  std::vector<std::string> extensions;
  world.server->on_message([&](Session& session, const Message& message) {
    told.push_back(message.told_timeout());
    const auto kept = message.retain();
    EXPECT_EQ(kept.told_timeout(), told.back());
    extensions.emplace_back(BytesView(message.extension()).text());
    session.respond(message, "");
  });
  world.start();
  auto& client = world.connect(patient({.outbound_bytes = 10'000}));
  const auto nothing = [](error_code, const Reply&) {};
  client.async_request("a", {.timeout = 2s, .tell_timeout = true}, nothing);
  client.async_request("b", {.extension = "mine", .timeout = 2s, .tell_timeout = true}, nothing);
  client.async_request("c", {.extension = "mine", .timeout = 2s}, nothing);
  client.async_request("d", {.timeout = 0ms, .tell_timeout = true}, nothing);
  world.simulation.run();
  ASSERT_EQ(told.size(), 4U);
  EXPECT_EQ(told[0], 2s);
  EXPECT_EQ(told[1], 2s);
  EXPECT_EQ(extensions[1].substr(wire::told_timeout_size), "mine");
  EXPECT_EQ(told[2], std::nullopt);
  EXPECT_EQ(extensions[2], "mine");
  EXPECT_EQ(told[3], std::nullopt) << "for ever";
  // One that waits for room says what is left then.
  world.block();
  while (client.send(pattern(984)) == SendResult::queued) {
  }
  client.async_request("e", {.timeout = 15h, .tell_timeout = true}, nothing);
  world.simulation.advance(1h);
  world.unblock();
  ASSERT_GT(told.size(), 4U);
  const auto last = std::ranges::find_if(told.begin() + 4, told.end(), [](const auto& one) { return one.has_value(); });
  ASSERT_NE(last, told.end());
  EXPECT_LT(**last, 15h);
  EXPECT_GT(**last, 4h);
}

// --- TCP's own options

/// The timers that the system runs for a TCP connection from one port to another: 2 is that of keep-alive.
int timer_of(std::uint16_t local, std::uint16_t remote) {
  std::ifstream table("/proc/net/tcp");
  std::string line;
  std::getline(table, line);
  while (std::getline(table, line)) {
    std::istringstream fields(line);
    std::string number, from, to, state, queues, timer;
    fields >> number >> from >> to >> state >> queues >> timer;
    const auto port_of = [](const std::string& address) { return std::stoi(address.substr(9), nullptr, 16); };
    if (port_of(from) == local && port_of(to) == remote) return std::stoi(timer.substr(0, 2), nullptr, 16);
  }
  return -1;
}

TEST(TcpKeepAlive, IsOnForSessionsOfServersAndClientsWhoseOptionsSaySo) {
  for (const bool on : {false, true}) {
    const SessionOptions options{.first_packet_timeout = 0ms,
                                 .tcp_keep_alive = {.idle = std::chrono::seconds(on ? 1000 : 0)}};
    ServerTransport server({.session = options});
    std::promise<Endpoint> came;
    server.on_connect([&](Session& session) { came.set_value(session.peer()); });
    const Endpoint listens = server.listen(tcp("127.0.0.1:0"));
    server.start();
    ClientTransport client({.session = options});
    client.connect(listens.url());
    auto future = came.get_future();
    const Endpoint peer = in_time(future);
    EXPECT_EQ(timer_of(listens.port, peer.port), on ? 2 : 0);
    EXPECT_EQ(timer_of(peer.port, listens.port), on ? 2 : 0);
  }
}

}  // namespace
}  // namespace msgtrans::test
