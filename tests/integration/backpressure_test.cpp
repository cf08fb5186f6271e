// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <atomic>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/post.hpp>
#include <functional>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <thread>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;

constexpr std::size_t kibibyte = 1024;
constexpr std::size_t mebibyte = 1024 * kibibyte;
/// Small, so that the system's buffers between the two ends are full soon.
constexpr int small_window = 8 * 1024;

/// A payload whose packet has that many bytes.
std::string packet_of(std::size_t size) {
  return pattern(size - wire::header_size);
}

std::string numbered(int number, std::size_t size) {
  std::string text = std::to_string(number) + ":";
  text.resize(size, '.');
  return text;
}
int number_of(const RawPacket& packet) {
  return std::stoi(packet.payload);
}

/// A server with a peer that reads only when the test says so.
struct Pair {
  /// The deadline of the first packet is off unless the options change it: most of these peers never say a word.
  explicit Pair(SessionOptions options = {}, std::function<void(TestServer&)> prepare = {})
      : server({.shards = 1, .session = silent_allowed(options)}) {
    if (prepare) prepare(server);
    server.start();
    peer = std::make_unique<RawPeer>(server.endpoint, small_window);
    session.emplace(server.session(*peer));
  }

  static SessionOptions silent_allowed(SessionOptions options) {
    if (options.first_packet_timeout == SessionOptions().first_packet_timeout) options.first_packet_timeout = 0ms;
    return options;
  }

  TestServer server;
  std::unique_ptr<RawPeer> peer;
  std::optional<Session> session;
};

// --- the budget

TEST(FullQueue, SaysWouldBlockExactlyAtTheByteBudget) {
  Pair pair({.outbound_bytes = 64 * kibibyte});
  fill(*pair.session, packet_of(kibibyte));
  EXPECT_EQ(pair.session->stats().queued_bytes, 64 * kibibyte);
  EXPECT_EQ(pair.session->stats().queued_packets, 64U);
  EXPECT_EQ(pair.session->send(""), SendResult::would_block);
}

TEST(FullQueue, TakesTheLastByteOfTheBudgetAndNotOneMore) {
  for (const std::size_t more : {wire::header_size - 1, wire::header_size}) {
    Pair pair({.outbound_bytes = 64 * kibibyte + more});
    fill(*pair.session, packet_of(kibibyte));
    EXPECT_EQ(pair.session->send(""), more == wire::header_size ? SendResult::queued : SendResult::would_block);
    EXPECT_EQ(pair.session->send(""), SendResult::would_block);
  }
}

TEST(FullQueue, SaysWouldBlockExactlyAtThePacketBudget) {
  Pair pair({.outbound_bytes = 64 * mebibyte, .outbound_packets = 50});
  fill(*pair.session, packet_of(10 * kibibyte));
  EXPECT_EQ(pair.session->stats().queued_packets, 50U);
  EXPECT_EQ(pair.session->stats().queued_bytes, 50 * 10 * kibibyte);
  EXPECT_EQ(pair.session->send(""), SendResult::would_block);
}

TEST(FullQueue, HasRoomAgainWhenThePeerReadsAndAllArrivesInOrder) {
  Pair pair({.outbound_bytes = 64 * kibibyte});
  int taken = 0;
  for (auto last = Clock::now(); Clock::now() - last < 200ms;) {
    if (pair.session->send(numbered(taken, 1000)) != SendResult::queued) continue;
    ++taken;
    last = Clock::now();
  }
  for (int i = 0; i < taken; ++i) ASSERT_EQ(number_of(pair.peer->next()), i);
  EXPECT_TRUE(wait_until([&] { return pair.session->stats().queued_packets == 0; }));
  EXPECT_EQ(pair.session->stats().queued_bytes, 0U);
  EXPECT_EQ(pair.session->send(numbered(taken, 1000)), SendResult::queued);
  EXPECT_EQ(number_of(pair.peer->next()), taken);
  EXPECT_EQ(pair.server.transport.stats().dropped_oldest + pair.server.transport.stats().dropped_at_close, 0U);
}

TEST(FullQueue, TakesAMessageOverTheWholeBudgetOnlyWhenEmpty) {
  Pair pair({.outbound_bytes = 1000});
  const std::string large = pattern(16 * mebibyte);  // more than the system buffers
  for (int round = 0; round < 2; ++round) {
    ASSERT_EQ(pair.session->send(large), SendResult::queued);
    EXPECT_EQ(pair.session->stats().queued_packets, 1U);
    EXPECT_EQ(pair.session->send(large), SendResult::would_block);
    EXPECT_EQ(pair.session->send(""), SendResult::would_block);
    EXPECT_TRUE(pair.peer->next().payload == large);
    ASSERT_TRUE(wait_until([&] { return pair.session->stats().queued_packets == 0; }));
  }
}

// --- waiting for room

TEST(WaitingForRoom, CompletesInOrderWhenThePeerReads) {
  Pair pair({.outbound_bytes = 64 * kibibyte});
  const std::size_t before = fill(*pair.session, packet_of(kibibyte));
  Record<int> completed;
  for (int i = 0; i < 200; ++i) {
    pair.session->async_send(numbered(i, 1000),
                             [completed, i](error_code code) mutable { completed.add(code ? -1 : i); });
  }
  // Whoever waits goes first.
  EXPECT_TRUE(wait_until([&] { return pair.session->send("late") == SendResult::would_block; }));
  EXPECT_EQ(completed.size(), 0U);
  EXPECT_EQ(pair.session->stats().queued_bytes, 64 * kibibyte);
  for (std::size_t i = 0; i < before; ++i) ASSERT_TRUE(pair.peer->receive());
  for (int i = 0; i < 200; ++i) ASSERT_EQ(number_of(pair.peer->next()), i);
  ASSERT_TRUE(completed.wait_for(200));
  for (int i = 0; i < 200; ++i) ASSERT_EQ(completed.at(static_cast<std::size_t>(i)), i);
}

TEST(WaitingForRoom, IsEndedByCancellationAndTheMessageIsNotSent) {
  Pair pair({.outbound_bytes = 64 * kibibyte});
  const std::size_t before = fill(*pair.session, packet_of(kibibyte));
  auto signal = std::make_shared<asio::cancellation_signal>();
  Record<error_code> cancelled, other;
  pair.session->async_send(
      "cancelled",
      asio::bind_cancellation_slot(signal->slot(), [cancelled](error_code code) mutable { cancelled.add(code); }));
  pair.session->async_send("other", [other](error_code code) mutable { other.add(code); });
  EXPECT_EQ(cancelled.size(), 0U);
  // Signals are emitted where the handler runs, as always in Asio.
  asio::post(pair.session->get_executor(), [signal] { signal->emit(asio::cancellation_type::terminal); });
  EXPECT_EQ(cancelled.at(0), asio::error::operation_aborted);
  EXPECT_EQ(other.size(), 0U);
  for (std::size_t i = 0; i < before; ++i) ASSERT_TRUE(pair.peer->receive());
  EXPECT_EQ(pair.peer->next().payload, "other");
  EXPECT_FALSE(other.at(0));
  EXPECT_EQ(cancelled.size(), 1U);
}

TEST(WaitingForRoom, EndsWithClosedWhenTheSessionEnds) {
  Pair pair({.outbound_bytes = 64 * kibibyte});
  fill(*pair.session, packet_of(kibibyte));
  auto sent = submit(*pair.session, "x");
  auto answer = ask(*pair.session, "x");
  pair.peer->reset();
  EXPECT_EQ(in_time(sent), Errc::closed);
  EXPECT_EQ(in_time(answer).first, Errc::closed);
}

TEST(WaitingForRoom, CountsInARequestsTimeout) {
  Pair pair({.outbound_bytes = 64 * kibibyte});
  const std::size_t before = fill(*pair.session, packet_of(kibibyte));
  auto late = ask(*pair.session, "late", {.timeout = 50ms});
  auto patient = ask(*pair.session, "patient", {.timeout = 0ms});
  EXPECT_EQ(in_time(late).first, Errc::request_timeout);
  for (std::size_t i = 0; i < before; ++i) ASSERT_TRUE(pair.peer->receive());
  const auto asked = pair.peer->receive();
  EXPECT_EQ(asked->payload, "patient");
  pair.peer->send(response(asked->header.message_id, "there"));
  EXPECT_EQ(in_time(patient).second.text(), "there");
  EXPECT_EQ(pair.server.transport.stats().requests_timed_out, 1U);
}

// --- high priority

TEST(HighPriority, PassesAFullQueueAndOvertakesIt) {
  Pair pair({.outbound_bytes = 64 * kibibyte});
  const std::size_t before = fill(*pair.session, packet_of(kibibyte));
  ASSERT_EQ(pair.session->send("normal"), SendResult::would_block);
  ASSERT_EQ(pair.session->send("urgent", {.high_priority = true}), SendResult::queued);
  EXPECT_EQ(pair.session->stats().queued_packets, 65U);
  std::size_t overtaken = before;
  for (std::size_t i = 0; i <= before; ++i) {
    const auto got = pair.peer->receive();
    ASSERT_TRUE(got);
    if (got->payload != "urgent") continue;
    EXPECT_NE(got->header.flags & wire::flags::high_priority, 0);
    overtaken = before - i;
  }
  // All that was queued, but the one that may have begun.
  EXPECT_GE(overtaken, 63U);
  EXPECT_LE(overtaken, 64U);
}

TEST(HighPriority, HasABudgetOfItsOwn) {
  Pair pair({.outbound_bytes = 64 * kibibyte});
  fill(*pair.session, packet_of(kibibyte));
  int urgent = 0;
  while (pair.session->send(packet_of(kibibyte), {.high_priority = true}) == SendResult::queued) ++urgent;
  EXPECT_EQ(urgent, 64);
  EXPECT_EQ(pair.session->stats().queued_bytes, 128 * kibibyte);
}

TEST(HighPriority, PassesThoseWhoWaitForRoom) {
  Pair pair({.outbound_bytes = 64 * kibibyte});
  fill(*pair.session, packet_of(kibibyte));
  auto waiting = submit(*pair.session, "waits");
  auto urgent = submit(*pair.session, "urgent", {.high_priority = true});
  EXPECT_FALSE(in_time(urgent));
  EXPECT_EQ(waiting.wait_for(0s), std::future_status::timeout);
}

// --- the policies

/// Sends numbered messages by `send` until there are `count`, and reads what is left: in order, and the newest are
/// there.
void expect_oldest_dropped(Pair& pair, int count) {
  // What is neither written nor dropped is in the queue, once the shard has seen all.
  ASSERT_TRUE(wait_until([&] {
    const auto stats = pair.server.transport.stats();
    const auto queued = pair.session->stats();
    return queued.queued_bytes <= 64 * kibibyte &&
           stats.dropped_oldest + pair.session->stats().packets_out + queued.queued_packets >=
               static_cast<std::size_t>(count);
  }));
  int expected = 0;
  int received = 0;
  int gaps = 0;
  for (int last = -1; last != count - 1; ++received) {
    const auto got = pair.peer->receive();
    ASSERT_TRUE(got);
    last = number_of(*got);
    ASSERT_GE(last, expected);
    if (last != expected) ++gaps;
    expected = last + 1;
  }
  EXPECT_GT(gaps, 0);
  const auto dropped = pair.server.transport.stats().dropped_oldest;
  EXPECT_GT(dropped, 0U);
  EXPECT_EQ(static_cast<std::uint64_t>(received) + dropped, static_cast<std::uint64_t>(count));
  EXPECT_FALSE(pair.peer->readable(50ms));
}

constexpr int many = 20'000;  // of 1,000 bytes: far more than the system's buffers and the budget

TEST(DropOldest, FromAnotherThreadKeepsTheNewestInOrderAndCountsTheRest) {
  Pair pair({.outbound_bytes = 64 * kibibyte, .slow_consumer = SlowConsumer::drop_oldest});
  for (int i = 0; i < many; ++i) {
    ASSERT_TRUE(wait_until([&] { return pair.session->send(numbered(i, 1000)) == SendResult::queued; }));
  }
  expect_oldest_dropped(pair, many);
}

TEST(DropOldest, OnTheShardKeepsTheNewestInOrderAndCountsTheRest) {
  Record<std::shared_ptr<Session>> target;
  Record<std::size_t> most_queued;
  Pair pair({.outbound_bytes = 64 * kibibyte, .slow_consumer = SlowConsumer::drop_oldest},
            [target, most_queued](TestServer& server) {
              server.transport.on_message([target, most_queued](Session&, const Message&) mutable {
                std::size_t most = 0;
                for (int i = 0; i < many; ++i) {
                  EXPECT_EQ(target.at(0)->send(numbered(i, 1000)), SendResult::queued);
                  most = std::max(most, target.at(0)->stats().queued_bytes);
                }
                most_queued.add(most);
              });
            });
  target.add(std::make_shared<Session>(*pair.session));
  RawPeer commander(pair.server.endpoint);
  commander.send(one_way(1, "go"));
  ASSERT_TRUE(most_queued.wait_for(1));
  EXPECT_LE(most_queued.at(0), 64 * kibibyte);
  expect_oldest_dropped(pair, many);
}

TEST(DropOldest, NeverDropsAnswers) {
  Pair pair({.outbound_bytes = 64 * kibibyte, .slow_consumer = SlowConsumer::drop_oldest},
            [](TestServer& server) { server.echo(); });
  // Answers first, so that they are the oldest.
  Bytes requests;
  for (std::uint32_t id = 1; id <= 30; ++id) {
    const Bytes bytes = request(id, pattern(1000));
    requests.insert(requests.end(), bytes.begin(), bytes.end());
  }
  for (int i = 0; i < many / 2; ++i) {
    ASSERT_TRUE(wait_until([&] { return pair.session->send(numbered(i, 1000)) == SendResult::queued; }));
  }
  pair.peer->send(requests);
  ASSERT_TRUE(wait_until([&] { return pair.server.transport.stats().packets_in == 30; }));
  for (int i = many / 2; i < many; ++i) {
    ASSERT_TRUE(wait_until([&] { return pair.session->send(numbered(i, 1000)) == SendResult::queued; }));
  }
  std::uint32_t answers = 0;
  for (int last = -1; last != many - 1;) {
    const auto got = pair.peer->receive();
    ASSERT_TRUE(got);
    if (got->header.type == wire::PacketType::response) {
      EXPECT_EQ(got->header.message_id, ++answers);
    } else {
      last = number_of(*got);
    }
  }
  EXPECT_EQ(answers, 30U);
  EXPECT_GT(pair.server.transport.stats().dropped_oldest, 0U);
}

TEST(SlowConsumerClose, EndsTheSessionAndNoOther) {
  Pair pair({.outbound_bytes = 64 * kibibyte, .slow_consumer = SlowConsumer::close, .close_timeout = 100ms});
  RawPeer other(pair.server.endpoint);
  Session reads = pair.server.session(other);
  SendResult result = SendResult::queued;
  for (const auto until = Clock::now() + patience; result == SendResult::queued && Clock::now() < until;) {
    result = pair.session->send(packet_of(kibibyte));
  }
  EXPECT_EQ(result, SendResult::closed);
  EXPECT_FALSE(pair.session->is_open());
  EXPECT_EQ(pair.server.ends.at(0).code, Errc::slow_consumer);
  EXPECT_EQ(pair.server.ends.at(0).id, pair.session->id());
  EXPECT_NE(pair.server.ends.at(0).text.find("65536"), std::string::npos) << pair.server.ends.at(0).text;
  EXPECT_EQ(reads.send("fine"), SendResult::queued);
  EXPECT_EQ(other.next().payload, "fine");
}

// --- answers

TEST(EchoFlood, OfAPeerThatDoesNotReadIsBoundedAndThenAnsweredWhole) {
  Pair pair({.outbound_bytes = 64 * kibibyte}, [](TestServer& server) { server.echo(); });
  constexpr std::uint32_t count = 40'000;
  const std::string payload = packet_of(kibibyte);
  std::jthread flood([&] {
    for (std::uint32_t id = 1; id <= count; ++id) pair.peer->send(request(id, payload));
  });
  // It stands still: nothing more is read for a while, though not all has come.
  std::uint64_t seen = 0;
  auto since = Clock::now();
  EXPECT_TRUE(wait_until([&] {
    const auto now = pair.server.transport.stats().packets_in;
    EXPECT_LE(pair.session->stats().queued_bytes, 65 * kibibyte);
    if (now != seen) since = Clock::now();
    seen = now;
    return seen > 0 && Clock::now() - since > 300ms;
  }));
  EXPECT_LT(seen, count);
  EXPECT_GT(pair.session->stats().queued_bytes, 32 * kibibyte);  // the low mark, where reading would go on
  for (std::uint32_t id = 1; id <= count; ++id) {
    const auto got = pair.peer->receive();
    ASSERT_TRUE(got);
    ASSERT_EQ(got->header.message_id, id);
    ASSERT_EQ(got->payload.size(), payload.size());
  }
  flood.join();
  EXPECT_EQ(pair.server.transport.stats().packets_in, count);
}

TEST(EchoFlood, OfOneWayMessagesIsBoundedLikewise) {
  Pair pair({.outbound_bytes = 64 * kibibyte, .outbound_packets = 20}, [](TestServer& server) { server.echo(); });
  constexpr int count = 20'000;
  std::jthread flood([&] {
    for (int i = 0; i < count; ++i) pair.peer->send(one_way(1, numbered(i, 1000)));
  });
  std::uint64_t seen = 0;
  auto since = Clock::now();
  EXPECT_TRUE(wait_until([&] {
    const auto now = pair.server.transport.stats().packets_in;
    EXPECT_LE(pair.session->stats().queued_packets, 20U);
    if (now != seen) since = Clock::now();
    seen = now;
    return seen > 0 && Clock::now() - since > 300ms;
  }));
  EXPECT_LT(seen, static_cast<std::uint64_t>(count));
  for (int i = 0; i < count; ++i) ASSERT_EQ(number_of(pair.peer->next()), i);
  flood.join();
}

TEST(EchoFlood, IsBoundedAlsoWhileTheShardHasOtherThingsToDo) {
  constexpr std::size_t reply = 100 * kibibyte;
  std::atomic<std::uint32_t> handled = 0;
  Pair pair({.outbound_bytes = 1024 * kibibyte}, [&](TestServer& server) {
    server.transport.on_message(
        [&handled, transport = &server.transport, text = pattern(reply)](Session& session, const Message& message) {
          ++handled;
          transport->broadcast("x");  // goes through the shard's inbox, behind which answers queue up
          session.respond(message, text);
        });
  });
  constexpr std::uint32_t count = 1000;  // in one read
  Bytes requests;
  for (std::uint32_t id = 1; id <= count; ++id) {
    const Bytes one = request(id, "");
    requests.insert(requests.end(), one.begin(), one.end());
  }
  ASSERT_TRUE(pair.peer->send(requests));
  std::uint32_t seen = 0;
  auto since = Clock::now();
  EXPECT_TRUE(wait_until([&] {
    const std::uint32_t now = handled;
    if (now != seen) since = Clock::now();
    seen = now;
    return seen > 0 && Clock::now() - since > 300ms;
  }));
  // The budget, what the system and the transport take on their own, and one.
  EXPECT_LT(seen, 200U);
  std::uint32_t answered = 0;
  while (answered < count) answered += pair.peer->next().header.type == wire::PacketType::response ? 1 : 0;
  EXPECT_EQ(handled, count);
}

TEST(EchoFlood, LeavesOtherSessionsOfTheShardAlone) {
  Pair pair({.outbound_bytes = 64 * kibibyte}, [](TestServer& server) { server.echo(); });
  std::atomic<bool> done = false;
  std::jthread flood([&] {
    const std::string payload = packet_of(kibibyte);
    std::uint32_t id = 0;
    while (!done) {
      const Bytes bytes = request(++id, payload);
      if (pair.peer->send_until_full(bytes, 50ms) != bytes.size()) break;
    }
  });
  ClientTransport other;
  other.connect(pair.server.url());
  for (int i = 0; i < 200; ++i) {
    Error error;
    EXPECT_EQ(other.request("x", {}, error).text(), "x") << error.message();
  }
  done = true;
  flood.join();
}

/// Requests both ways at once between two ends of this library with small budgets, `window` of each end in flight;
/// returns how many were answered and how many failed.
std::pair<int, int> flood_each_other(int each, int window, std::chrono::milliseconds stall_deadline) {
  const SessionOptions options{
      .outbound_bytes = 64 * kibibyte, .first_packet_timeout = 0ms, .write_stall_timeout = stall_deadline};
  TestServer server({.session = options});
  server.echo().start();
  ClientTransport client({.session = options});
  client.on_message([](Session& session, const Message& message) { session.respond(message, message.payload()); });
  client.connect(server.url());
  Session here = server.session();
  Session there = *client.session();
  const std::string payload = pattern(2000);
  std::atomic<int> answered = 0, failed = 0;
  const auto flood = [&](Session& session) {
    std::atomic<int> in_flight = 0;
    for (int i = 0; i < each; ++i) {
      EXPECT_TRUE(wait_until([&] { return in_flight < window; }));
      ++in_flight;
      session.async_request(payload, {.timeout = 0ms}, [&](error_code code, const Reply&) {
        ++(code ? failed : answered);
        --in_flight;
      });
    }
    EXPECT_TRUE(wait_until([&] { return in_flight == 0; }));
  };
  std::thread other([&] { flood(here); });
  flood(there);
  other.join();
  return {answered, failed};
}

TEST(TwoEnds, ThatFloodEachOtherWithinTheirBudgetsBothGetEveryAnswer) {
  const auto [answered, failed] = flood_each_other(4000, 30, 30s);
  EXPECT_EQ(answered, 8000);
  EXPECT_EQ(failed, 0);
}

TEST(TwoEnds, ThatFloodEachOtherBeyondTheirBudgetsAreFreedByTheStallDeadlineAtWorst) {
  // Both full of answers, and neither may read: the bound on memory leaves no other way.
  const auto [answered, failed] = flood_each_other(4000, 4000, 300ms);
  EXPECT_EQ(answered + failed, 8000);
}

// --- deadlines

/// Two listeners of one server: the first with the options to test, the second with that deadline off.
struct OnAndOff {
  OnAndOff(const SessionOptions& on, const SessionOptions& off) {
    server.transport.on_message([](Session&, const Message&) {});
    server.start({.session = Pair::silent_allowed(on)});
    without = server.transport.listen(any_endpoint(), any_listener({.session = Pair::silent_allowed(off)}));
  }
  TestServer server;
  Endpoint without;
};

TEST(WriteStallTimeout, EndsASessionWhosePeerTakesNothingAndIsOffAtZero) {
  const OnAndOff both({.outbound_bytes = 64 * kibibyte, .write_stall_timeout = 400ms},
                      {.outbound_bytes = 64 * kibibyte, .write_stall_timeout = 0ms});
  const RawPeer unlimited(both.without, small_window);
  Session stays = both.server.session(unlimited);
  fill(stays, packet_of(kibibyte));
  const RawPeer stalled(both.server.endpoint, small_window);
  Session ends = both.server.session(stalled);
  fill(ends, packet_of(kibibyte), 50ms);
  EXPECT_EQ(both.server.ends.at(0).code, Errc::write_stalled);
  EXPECT_EQ(both.server.ends.at(0).id, ends.id());
  EXPECT_TRUE(stays.is_open());
  EXPECT_GT(both.server.transport.stats().dropped_at_close, 0U);
}

TEST(WriteStallTimeout, SparesAPeerThatIsOnlySlow) {
  Pair pair({.outbound_bytes = 64 * kibibyte, .write_stall_timeout = 1000ms});
  fill(*pair.session, packet_of(kibibyte));
  // It takes longer than the deadline for all, but each part in time.
  auto longest = Clock::duration::zero();
  auto last = Clock::now();
  for (const auto until = Clock::now() + 2s; Clock::now() < until; last = Clock::now()) {
    std::this_thread::sleep_for(20ms);
    for (int i = 0; i < 16; ++i) {
      ASSERT_TRUE(pair.peer->receive());
      (void)pair.session->send(packet_of(kibibyte));
      (void)pair.session->send(packet_of(kibibyte));
    }
    longest = std::max(longest, Clock::now() - last);
  }
  if (longest > 300ms) GTEST_SKIP() << "this machine was too slow to play a steady reader";
  EXPECT_EQ(pair.server.ends.size(), 0U) << pair.server.ends.at(0).code.message();
}

TEST(FirstPacketTimeout, EndsASilentSessionAndIsOffAtZero) {
  const OnAndOff both({.first_packet_timeout = 100ms}, {.first_packet_timeout = 0ms});
  const RawPeer unlimited(both.without);
  const Session stays = both.server.session(unlimited);
  const auto began = Clock::now();
  RawPeer silent(both.server.endpoint);
  RawPeer half(both.server.endpoint);
  const Bytes whole = one_way(1, "half a packet is none");
  half.send(std::span(whole).first(20));
  for (RawPeer* peer : {&silent, &half}) {
    EXPECT_TRUE(peer->sees_end());
    peer->close();
  }
  EXPECT_GE(Clock::now() - began, 100ms);
  EXPECT_EQ(both.server.ends.at(0).code, Errc::first_packet_timeout);
  EXPECT_EQ(both.server.ends.at(1).code, Errc::first_packet_timeout);
  EXPECT_TRUE(stays.is_open());
}

TEST(FirstPacketTimeout, IsOverWithTheFirstPacket) {
  Pair pair({.first_packet_timeout = 100ms}, [](TestServer& server) { server.echo(); });
  pair.peer->send(one_way(1, "first"));
  EXPECT_TRUE(pair.peer->receive());
  RawPeer silent(pair.server.endpoint);
  EXPECT_TRUE(silent.sees_end());  // later than the other's deadline was
  EXPECT_TRUE(pair.session->is_open());
}

TEST(IdleTimeout, EndsAQuietSessionAndIsOffAtZero) {
  const OnAndOff both({.idle_timeout = 100ms}, {.idle_timeout = 0ms});
  RawPeer unlimited(both.without);
  unlimited.send(one_way(1, "x"));
  const Session stays = both.server.session(unlimited);
  RawPeer peer(both.server.endpoint);
  peer.send(one_way(1, "x"));
  EXPECT_TRUE(peer.sees_end());
  peer.close();
  EXPECT_EQ(both.server.ends.at(0).code, Errc::idle_timeout);
  EXPECT_TRUE(stays.is_open());
}

TEST(IdleTimeout, StartsAnewWithEachPacketEitherWay) {
  for (const bool inward : {true, false}) {
    Pair pair({.idle_timeout = 600ms},
              [](TestServer& server) { server.transport.on_message([](Session&, const Message&) {}); });
    pair.peer->send(one_way(1, "x"));
    auto longest = Clock::duration::zero();
    auto last = Clock::now();
    for (const auto until = Clock::now() + 1500ms; Clock::now() < until; last = Clock::now()) {
      std::this_thread::sleep_for(30ms);
      if (inward) {
        pair.peer->send(one_way(1, "x"));
      } else {
        pair.session->send("x");
      }
      longest = std::max(longest, Clock::now() - last);
    }
    if (longest > 200ms) GTEST_SKIP() << "this machine was too slow to keep a session busy";
    EXPECT_EQ(pair.server.ends.size(), 0U);
    EXPECT_EQ(pair.server.ends.at(0).code, Errc::idle_timeout);  // and now it is quiet
  }
}

TEST(ReadStallTimeout, EndsASessionInTheMiddleOfAPacketAndIsOffAtZero) {
  const OnAndOff both({.read_stall_timeout = 100ms}, {.read_stall_timeout = 0ms});
  const Bytes whole = one_way(1, "whole");
  const auto half = std::span(whole).first(18);
  RawPeer unlimited(both.without);
  unlimited.send(whole);
  unlimited.send(half);
  const Session stays = both.server.session(unlimited);
  RawPeer between(both.server.endpoint);  // between two packets nothing has to come
  between.send(whole);
  const Session quiet = both.server.session(between);
  RawPeer stalled(both.server.endpoint);
  stalled.send(whole);
  stalled.send(half);
  EXPECT_TRUE(stalled.sees_end());
  stalled.close();
  EXPECT_EQ(both.server.ends.at(0).code, Errc::read_stalled);
  EXPECT_TRUE(stays.is_open());
  EXPECT_TRUE(quiet.is_open());
}

TEST(ReadStallTimeout, SparesAPeerThatSendsByteByByte) {
  Record<std::string> got;
  Pair pair({.read_stall_timeout = 800ms}, [got](TestServer& server) {
    server.transport.on_message(
        [got](Session&, const Message& message) mutable { got.add(std::string(message.text())); });
  });
  const Bytes bytes = one_way(1, pattern(60));
  auto longest = Clock::duration::zero();
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const auto began = Clock::now();
    pair.peer->send(std::span(bytes).subspan(i, 1));
    std::this_thread::sleep_for(20ms);
    longest = std::max(longest, Clock::now() - began);
  }
  if (longest > 300ms) GTEST_SKIP() << "this machine was too slow to send steadily";
  EXPECT_EQ(got.at(0), pattern(60));
  EXPECT_EQ(pair.server.ends.size(), 0U);
}

TEST(CloseTimeout, CutsAPeerThatDoesNotReadWhatIsLeft) {
  Pair pair({.outbound_bytes = 64 * kibibyte, .close_timeout = 150ms});
  fill(*pair.session, packet_of(kibibyte));
  const auto began = Clock::now();
  pair.session->close("enough");
  EXPECT_EQ(pair.server.ends.at(0).code, Errc::closed_by_user);
  EXPECT_EQ(pair.server.ends.at(0).text, "enough");
  EXPECT_GE(Clock::now() - began, 150ms);
  EXPECT_LT(Clock::now() - began, 4s);  // the default is 5 s
  EXPECT_EQ(pair.server.transport.stats().dropped_at_close, 64U);
}

TEST(CloseTimeout, CutsAPeerThatNeverClosesItsEnd) {
  Pair pair({.close_timeout = 150ms}, [](TestServer& server) { server.echo(); });
  std::atomic<bool> done = false;
  std::thread talks([&] {  // and goes on talking
    while (!done && pair.peer->send(one_way(1, "x"))) {
    }
  });
  ASSERT_TRUE(wait_until([&] { return pair.server.transport.stats().packets_in > 10; }));
  std::thread reads([&] { EXPECT_TRUE(pair.peer->sees_end()); });
  pair.session->close();
  EXPECT_TRUE(pair.server.ends.wait_for(1, 4s));
  done = true;
  talks.join();
  reads.join();
}

}  // namespace
}  // namespace msgtrans::test
