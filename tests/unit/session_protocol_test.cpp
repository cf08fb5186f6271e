// SPDX-License-Identifier: Apache-2.0
#include "allocation_failure.hpp"
#include "wire_test_util.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/protocol/session_protocol.hpp>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace msgtrans::protocol {
namespace {

using namespace std::chrono_literals;
using wire::test::Bytes;
using wire::test::bytes_of;
using wire::test::Packet;
using wire::test::random_bytes;
using wire::test::Stream;
using wire::test::text_of;
using Phase = SessionProtocol::Phase;
using View = std::span<const std::byte>;

constexpr TimePoint start{1000h};
constexpr TimePoint never = TimePoint::max();
struct HandlerFault {};  // what a handler throws here

SessionOptions without_deadlines() {
  SessionOptions options;
  options.first_packet_timeout = 0ms;
  options.idle_timeout = 0ms;
  options.read_stall_timeout = 0ms;
  options.write_stall_timeout = 0ms;
  return options;
}

wire::Header request_header(std::uint32_t id) {
  wire::Header header;
  header.type = wire::PacketType::request;
  header.message_id = id;
  return header;
}

Bytes request(std::uint32_t id, const Bytes& payload = {}) {
  Bytes out;
  wire::append_packet(out, request_header(id), {}, payload);
  return out;
}

Bytes operator+(Bytes a, const Bytes& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

/// One session and its owner, who answers every packet with `answer_size` bytes if that is not zero.
class Owner {
 public:
  explicit Owner(const SessionOptions& session_options = {}, std::size_t answer_bytes = 0)
      : options(session_options), answer_size(answer_bytes) {}

  auto deliver() {
    return [this](const wire::Header& header, View extension, View payload) {
      packets.push_back({header, {extension.begin(), extension.end()}, {payload.begin(), payload.end()}});
      if (during) during();
      if (answer_size != 0) answer(header.message_id);
    };
  }
  void answer(std::uint32_t id) {
    wire::Header header;
    header.type = wire::PacketType::response;
    header.message_id = id;
    session.outbound().append(header, {}, Bytes(answer_size - wire::header_size), OutboundKind::answer);
  }
  void push(std::size_t size) {
    session.outbound().append({}, {}, Bytes(size - wire::header_size), OutboundKind::push);
  }

  /// The bytes must not be needed after the call: they are gone then.
  void receive(const Bytes& bytes) {
    const auto lent = std::make_unique<Bytes>(bytes);
    session.receive(*lent, now, deliver());
  }
  void resume() { session.resume(now, deliver()); }

  /// Takes up to `most` bytes of what is to be written.
  std::size_t write(std::size_t most = ~std::size_t{0}) {
    std::size_t done = 0;
    while (done < most && !session.outbound_empty()) {
      std::array<View, 8> pieces;
      const std::size_t count = session.outbound().gather(pieces);
      std::size_t size = 0;
      for (std::size_t i = 0; i < count && size < most - done; ++i) {
        const View part = pieces[i].first(std::min(pieces[i].size(), most - done - size));
        written.insert(written.end(), part.begin(), part.end());
        size += part.size();
      }
      session.written(size, now);
      done += size;
    }
    return done;
  }

  [[nodiscard]] std::vector<std::uint32_t> ids() const {
    std::vector<std::uint32_t> out;
    for (const Packet& packet : packets) out.push_back(packet.header.message_id);
    return out;
  }

  SessionOptions options;
  std::size_t answer_size;
  TimePoint now = start;
  SharedResources shared;
  SessionProtocol session{options, shared, start};
  std::vector<Packet> packets;
  std::function<void()> during;
  Bytes written;
};

std::vector<std::uint32_t> counted(std::uint32_t from, std::uint32_t to) {
  std::vector<std::uint32_t> out;
  for (std::uint32_t id = from; id <= to; ++id) out.push_back(id);
  return out;
}

Bytes requests(std::uint32_t from, std::uint32_t to, std::size_t payload = 10) {
  Bytes out;
  for (std::uint32_t id = from; id <= to; ++id) out = std::move(out) + request(id, random_bytes(payload, id));
  return out;
}

// --- delivery

TEST(SessionProtocol, PacketsAreDeliveredWholeHoweverTheyAreCut) {
  Stream stream;
  for (std::uint32_t id = 1; id <= 30; ++id) {
    stream.add(request_header(id), random_bytes(id % 4, id), random_bytes(id * 7 % 90, id));
  }
  for (const std::size_t cut :
       {std::size_t{1}, std::size_t{2}, std::size_t{15}, std::size_t{17}, std::size_t{300}, stream.bytes.size()}) {
    Owner owner;
    for (std::size_t at = 0; at < stream.bytes.size(); at += cut) {
      const auto first = stream.bytes.begin() + static_cast<std::ptrdiff_t>(at);
      owner.receive({first, first + static_cast<std::ptrdiff_t>(std::min(cut, stream.bytes.size() - at))});
    }
    EXPECT_EQ(owner.packets, stream.packets) << "cut " << cut;
    EXPECT_EQ(owner.session.packets_in(), 30U);
    EXPECT_EQ(owner.session.bytes_in(), stream.bytes.size());
    EXPECT_FALSE(owner.session.has_partial());
    EXPECT_EQ(owner.session.phase(), Phase::open);
    EXPECT_FALSE(owner.session.reason());
  }
}

TEST(SessionProtocol, CompressedPayloadsAreDeliveredDecompressed) {
  for (const auto codec : {wire::Compression::zstd, wire::Compression::zlib}) {
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{100'000}, std::size_t{3'000'000}}) {
      Bytes plain(size, std::byte{7});
      Bytes packed;
      ASSERT_FALSE(wire::compress(codec, plain, packed));
      auto header = request_header(1);
      header.compression = codec;
      Stream stream;
      stream.add(header, bytes_of("ext"), packed);
      Owner owner;
      owner.receive(stream.bytes + request(2, bytes_of("plain")));
      ASSERT_EQ(owner.packets.size(), 2U);
      EXPECT_EQ(owner.packets[0].payload, plain);
      EXPECT_EQ(text_of(owner.packets[0].extension), "ext");
      EXPECT_EQ(owner.packets[0].header.compression, codec) << "says how it came";
      EXPECT_EQ(text_of(owner.packets[1].payload), "plain");
      EXPECT_LE(owner.shared.decompressed.capacity(), 1024U * 1024U) << "a large one is not kept";
    }
  }
}

TEST(SessionProtocol, ADecompressionBombEndsTheSessionAndIsNotDelivered) {
  for (const auto codec : {wire::Compression::zstd, wire::Compression::zlib}) {
    for (const std::size_t beyond : {std::size_t{0}, std::size_t{1}, std::size_t{50'000'000}}) {
      SessionOptions options;
      options.max_decompressed = 10'000;
      Bytes packed;
      ASSERT_FALSE(wire::compress(codec, Bytes(10'000 + beyond), packed));
      auto header = request_header(2);
      header.compression = codec;
      Bytes bytes = request(1);
      wire::append_packet(bytes, header, {}, packed);
      bytes = std::move(bytes) + request(3);
      Owner owner(options);
      owner.receive(bytes);
      if (beyond == 0) {
        EXPECT_EQ(owner.ids(), counted(1, 3)) << "the limit itself is allowed";
        continue;
      }
      EXPECT_EQ(owner.ids(), counted(1, 1));
      EXPECT_EQ(owner.session.reason().code, Errc::decompressed_too_large);
      EXPECT_NE(owner.session.reason().text.find("10000"), std::string::npos) << owner.session.reason().text;
      EXPECT_EQ(owner.session.phase(), Phase::closing);
      EXPECT_LE(owner.shared.decompressed.capacity(), 20'000U);
    }
  }
}

TEST(SessionProtocol, APayloadThatIsNotWhatItsCodecSaysEndsTheSession) {
  auto header = request_header(1);
  header.compression = wire::Compression::zstd;
  Bytes bytes;
  wire::append_packet(bytes, header, {}, bytes_of("garbage"));
  Owner owner;
  owner.receive(bytes);
  EXPECT_TRUE(owner.packets.empty());
  EXPECT_EQ(owner.session.reason().code, Errc::decompression_failed);
}

// --- the end

TEST(SessionProtocol, AProtocolErrorEndsItWithTheFieldAndValueButRepliesBeforeItStillLeave) {
  Owner owner({}, 40);
  owner.receive(requests(1, 3) + Bytes(16, std::byte{9}) + requests(4, 5));
  EXPECT_EQ(owner.ids(), counted(1, 3));
  auto& session = owner.session;
  EXPECT_EQ(session.reason().code, Errc::bad_version);
  EXPECT_EQ(session.reason().text, "version is 9, must be 1");
  EXPECT_EQ(session.phase(), Phase::closing);
  EXPECT_FALSE(session.accepts());
  EXPECT_FALSE(session.wants_read());
  EXPECT_FALSE(session.resumable());
  EXPECT_FALSE(session.shutdown_due()) << "replies are queued";
  owner.write(119);
  EXPECT_FALSE(session.shutdown_due());
  owner.write();
  EXPECT_EQ(owner.written.size(), 120U);
  EXPECT_TRUE(session.shutdown_due());
  session.shut_down(owner.now);
  EXPECT_EQ(session.phase(), Phase::lingering);
  EXPECT_FALSE(session.shutdown_due());
  EXPECT_TRUE(session.wants_read()) << "to discard it";
  owner.receive(requests(6, 9));
  EXPECT_EQ(owner.ids(), counted(1, 3));
  EXPECT_EQ(session.phase(), Phase::lingering);
  session.receive_end(owner.now, 1s);
  EXPECT_TRUE(session.ended());
  EXPECT_EQ(session.reason().code, Errc::bad_version);
}

TEST(SessionProtocol, AllThatWasWrittenHavingArrivedEndsTheLingering) {
  Owner owner;
  owner.session.delivered();
  EXPECT_EQ(owner.session.phase(), Phase::open) << "means something only while lingering";
  owner.session.close(Errc::closed_by_user, owner.now);
  owner.session.shut_down(owner.now);
  owner.session.delivered();
  EXPECT_TRUE(owner.session.ended());
}

TEST(SessionProtocol, ThePeersEndBetweenPacketsIsACloseAndInsideOneATruncation) {
  const Bytes packet = request(1, random_bytes(20, 1));
  for (std::size_t cut = 0; cut <= packet.size(); ++cut) {
    Owner owner;
    owner.receive(requests(1, 1));
    owner.receive(Bytes(packet.begin(), packet.begin() + static_cast<std::ptrdiff_t>(cut)));
    owner.session.receive_end(owner.now, 5s);
    EXPECT_EQ(owner.session.reason().code, cut == 0 || cut == packet.size() ? Errc::closed_by_peer : Errc::truncated)
        << "after " << cut;
    EXPECT_EQ(owner.session.phase(), Phase::draining);
    EXPECT_TRUE(owner.session.accepts()) << "what it asked before can still be answered";
    EXPECT_TRUE(owner.session.peer_ended());
    EXPECT_FALSE(owner.session.wants_read());
  }
}

TEST(SessionProtocol, AfterThePeersEndWhatItIsOwedIsWrittenAndThenItEndsWithoutLingering) {
  Owner owner({}, 100);
  owner.receive(requests(1, 2));
  owner.session.receive_end(owner.now, 7s);
  EXPECT_EQ(owner.session.deadline(), start + 7s);
  owner.push(50);
  EXPECT_EQ(owner.write(), 250U);
  owner.session.close(Errc::stopping, owner.now);
  EXPECT_TRUE(owner.session.shutdown_due());
  owner.session.shut_down(owner.now);
  EXPECT_TRUE(owner.session.ended()) << "nothing more can come";
  EXPECT_EQ(owner.session.reason().code, Errc::closed_by_peer) << "the first reason stays";
}

TEST(SessionProtocol, AfterThePeersEndPausedPacketsAreStillDelivered) {
  auto options = without_deadlines();
  options.outbound_bytes = 1000;
  Owner owner(options, 100);
  owner.receive(requests(1, 12));
  owner.write(500);
  ASSERT_TRUE(owner.session.resumable());
  owner.session.receive_end(owner.now, 5s);
  EXPECT_EQ(owner.session.reason().code, Errc::closed_by_peer) << "what waits is whole packets";
  EXPECT_TRUE(owner.session.resumable());
  owner.resume();
  EXPECT_EQ(owner.ids(), counted(1, 12));
}

TEST(SessionProtocol, ThePeersEndWhileClosingLetsTheRestBeWritten) {
  Owner owner({}, 100);
  owner.receive(requests(1, 1));
  owner.session.close(Errc::closed_by_user, owner.now);
  owner.session.receive_end(owner.now, 1s);
  EXPECT_EQ(owner.session.phase(), Phase::closing);
  EXPECT_EQ(owner.session.deadline(), start + 5s) << "the time for it is that of the close";
  EXPECT_FALSE(owner.session.shutdown_due());
  owner.write();
  EXPECT_TRUE(owner.session.shutdown_due());
  owner.session.shut_down(owner.now);
  EXPECT_TRUE(owner.session.ended());
}

TEST(SessionProtocol, CloseInAHandlerStopsDeliveryAtOnce) {
  Owner owner;
  owner.during = [&] {
    if (owner.packets.size() == 3) owner.session.close(Errc::closed_by_user, owner.now);
  };
  owner.receive(requests(1, 8) + Bytes(3));
  EXPECT_EQ(owner.ids(), counted(1, 3));
  EXPECT_EQ(owner.session.phase(), Phase::closing);
  EXPECT_FALSE(owner.session.resumable());
  owner.receive(requests(9, 10));
  owner.resume();
  EXPECT_EQ(owner.ids(), counted(1, 3));
  EXPECT_EQ(owner.session.reason().code, Errc::closed_by_user);
}

TEST(SessionProtocol, AbortInAHandlerStopsDeliveryAtOnceAndEnds) {
  Owner owner({}, 50);
  owner.during = [&] { owner.session.abort(Errc::write_stalled); };
  owner.receive(requests(1, 8));
  EXPECT_EQ(owner.ids(), counted(1, 1));
  EXPECT_TRUE(owner.session.ended());
  EXPECT_EQ(owner.session.deadline(), never);
  owner.session.expire(owner.now + 1000h);
  owner.session.close(Errc::closed_by_user, owner.now);
  owner.session.begin_drain();
  EXPECT_TRUE(owner.session.ended());
  EXPECT_EQ(owner.session.reason().code, Errc::write_stalled);
}

TEST(SessionProtocol, MutedItHandsOutNothingMoreAndDoesNotWantToRead) {
  Owner owner;
  owner.during = [&] {
    if (owner.packets.size() == 2) owner.session.mute();
  };
  owner.receive(requests(1, 5));
  EXPECT_EQ(owner.ids(), counted(1, 2));
  EXPECT_EQ(owner.session.phase(), Phase::open);
  EXPECT_FALSE(owner.session.wants_read());
  EXPECT_FALSE(owner.session.resumable());
  owner.resume();
  owner.receive(requests(6, 7));
  EXPECT_EQ(owner.ids(), counted(1, 2));
  owner.push(30);
  owner.session.close(Errc::closed_by_user, owner.now);
  EXPECT_EQ(owner.write(), 30U);
  EXPECT_TRUE(owner.session.shutdown_due());
}

TEST(SessionProtocol, DrainingItGoesOnUntilClosed) {
  Owner owner({}, 50);
  owner.session.begin_drain();
  EXPECT_EQ(owner.session.phase(), Phase::draining);
  EXPECT_TRUE(owner.session.wants_read());
  owner.receive(requests(1, 3));
  EXPECT_EQ(owner.ids(), counted(1, 3));
  EXPECT_EQ(owner.write(), 150U);
  EXPECT_FALSE(owner.session.shutdown_due()) << "the owner knows whether more is owed";
  EXPECT_FALSE(owner.session.reason());
  owner.session.close(Errc::stopping, owner.now);
  EXPECT_TRUE(owner.session.shutdown_due());
  EXPECT_EQ(owner.session.reason().code, Errc::stopping);
}

TEST(SessionProtocol, AHandlerThatThrowsLosesNothing) {
  Owner owner;
  const Bytes bytes = requests(1, 6);
  owner.during = [&] {
    if (owner.packets.size() % 2 == 0) throw HandlerFault();
  };
  // the last packet is cut, and comes later
  EXPECT_THROW(owner.receive({bytes.begin(), bytes.end() - 4}), HandlerFault);
  EXPECT_EQ(owner.ids(), counted(1, 2));
  EXPECT_TRUE(owner.session.resumable());
  EXPECT_THROW(owner.resume(), HandlerFault);
  EXPECT_EQ(owner.ids(), counted(1, 4));
  owner.resume();
  EXPECT_EQ(owner.ids(), counted(1, 5));
  EXPECT_FALSE(owner.session.resumable()) << "what is left is no whole packet";
  EXPECT_THROW(owner.receive({bytes.end() - 4, bytes.end()}), HandlerFault);
  EXPECT_EQ(owner.ids(), counted(1, 6));
  EXPECT_FALSE(owner.session.resumable());
  EXPECT_FALSE(owner.session.has_partial());
  EXPECT_TRUE(owner.session.wants_read());
}

// --- pausing

SessionOptions small_budget() {
  auto options = without_deadlines();
  options.outbound_bytes = 1000;
  options.outbound_packets = 20;
  return options;
}

TEST(SessionProtocol, AnswersOverTheirBudgetStopDeliveryInTheMiddleOfARead) {
  Owner owner(small_budget(), 100);
  owner.receive(requests(1, 100));
  EXPECT_EQ(owner.ids(), counted(1, 10)) << "ten answers of 100 bytes are the budget";
  EXPECT_FALSE(owner.session.wants_read());
  EXPECT_FALSE(owner.session.resumable());
  owner.resume();
  EXPECT_EQ(owner.ids(), counted(1, 10));
  owner.write(401);
  EXPECT_FALSE(owner.session.wants_read()) << "600 bytes are above half";
  EXPECT_FALSE(owner.session.resumable());
  owner.write(99);
  EXPECT_TRUE(owner.session.resumable()) << "500 bytes are half";
  owner.resume();
  EXPECT_EQ(owner.ids(), counted(1, 15));
  while (owner.packets.size() < 100) {
    const std::size_t before = owner.packets.size();
    owner.write(700);
    ASSERT_TRUE(owner.session.resumable());
    owner.resume();
    ASSERT_GT(owner.packets.size(), before);
  }
  EXPECT_EQ(owner.ids(), counted(1, 100));
  EXPECT_FALSE(owner.session.resumable());
}

TEST(SessionProtocol, ManySmallAnswersPauseByTheirNumber) {
  Owner owner(small_budget(), 16);
  owner.receive(requests(1, 60));
  EXPECT_EQ(owner.ids(), counted(1, 20));
  owner.write(9 * 16);
  EXPECT_FALSE(owner.session.resumable());
  owner.write(16);
  EXPECT_TRUE(owner.session.resumable());
}

TEST(SessionProtocol, PausedWithNothingLeftItWantsToReadAgainOnceTheAnswersHaveLeft) {
  Owner owner(small_budget(), 100);
  owner.receive(requests(1, 10));
  EXPECT_EQ(owner.packets.size(), 10U);
  EXPECT_FALSE(owner.session.wants_read());
  owner.write(499);
  EXPECT_FALSE(owner.session.wants_read());
  owner.write(1);
  EXPECT_TRUE(owner.session.wants_read());
  EXPECT_FALSE(owner.session.resumable()) << "there is nothing to resume";
  owner.receive(requests(11, 12));
  EXPECT_EQ(owner.ids(), counted(1, 12));
}

TEST(SessionProtocol, PausedWithHalfAPacketLeftItWantsToReadAgainOnceTheAnswersHaveLeft) {
  Owner owner(small_budget(), 100);
  const Bytes bytes = requests(1, 11);
  owner.receive({bytes.begin(), bytes.end() - 1});
  EXPECT_FALSE(owner.session.wants_read());
  owner.write();
  if (owner.session.resumable()) owner.resume();
  EXPECT_TRUE(owner.session.wants_read());
  EXPECT_FALSE(owner.session.resumable());
  owner.receive({bytes.end() - 1, bytes.end()});
  EXPECT_EQ(owner.ids(), counted(1, 11));
}

TEST(SessionProtocol, PushesNeverPause) {
  Owner owner(small_budget());
  owner.during = [&] { owner.push(500); };
  owner.receive(requests(1, 100));
  EXPECT_EQ(owner.ids(), counted(1, 100));
  EXPECT_TRUE(owner.session.wants_read());
}

TEST(SessionProtocol, BytesThatComeWhilePausedAreKeptBehindThoseThatWait) {
  Owner owner(small_budget(), 100);
  owner.receive(requests(1, 15));
  const Bytes more = requests(16, 30);
  for (const std::byte b : more) owner.receive({b});  // the owner had them before it could know
  EXPECT_EQ(owner.ids(), counted(1, 10));
  while (owner.write() != 0) {
    if (owner.session.resumable()) owner.resume();
  }
  EXPECT_EQ(owner.ids(), counted(1, 30));
  EXPECT_FALSE(owner.session.has_partial());
}

TEST(SessionProtocol, RandomReadsWritesPausesAndFaultsDeliverEverythingOnceInOrder) {
  for (std::uint32_t seed = 1; seed <= 30; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    auto options = without_deadlines();
    options.outbound_bytes = 1 + random() % 3000;
    options.outbound_packets = 1 + random() % 30;
    Stream stream;
    for (std::uint32_t id = 1; id <= 400; ++id) {
      const std::size_t size = random() % 20 == 0 ? random() % 5000 : random() % 60;
      stream.add(request_header(id), {}, random_bytes(size, id));
    }
    Owner owner(options, 16);
    std::size_t answered = 0;
    owner.during = [&] {
      const auto answers = owner.session.outbound_empty() ? OutboundDepth{} : owner.session.outbound().answers();
      ASSERT_LT(answers.bytes, options.outbound_bytes) << "handed out though the answers were over the budget";
      ASSERT_LT(answers.packets, options.outbound_packets);
      if (random() % 40 == 0) {
        owner.answer_size = 0;
        throw HandlerFault();
      }
      owner.answer_size = random() % 5 == 0 ? 0 : 16 + random() % 300;
      answered += owner.answer_size;
    };
    std::size_t at = 0;
    int rounds = 0;
    while (at < stream.bytes.size() || owner.session.resumable() || !owner.session.outbound_empty()) {
      ASSERT_LT(++rounds, 200'000) << "stuck at " << owner.packets.size();
      ASSERT_EQ(owner.session.phase(), Phase::open) << owner.session.reason().message();
      try {
        // An owner that may read before it resumes, and now and then even unasked.
        if (random() % 3 == 0 && at < stream.bytes.size() && (owner.session.wants_read() || random() % 50 == 0)) {
          const std::size_t count = std::min<std::size_t>(stream.bytes.size() - at, 1 + random() % 900);
          const auto first = stream.bytes.begin() + static_cast<std::ptrdiff_t>(at);
          at += count;
          owner.receive({first, first + static_cast<std::ptrdiff_t>(count)});
        } else if (random() % 2 == 0) {
          owner.write(random() % 600);
        } else if (owner.session.resumable()) {
          owner.resume();
        }
      } catch (const HandlerFault&) {
      }
      // Nothing may wait for ever: with no answers left it either resumes or reads.
      if (owner.session.outbound_empty()) {
        ASSERT_TRUE(owner.session.wants_read());
      }
    }
    ASSERT_EQ(owner.packets, stream.packets);
    EXPECT_EQ(owner.written.size(), answered);
    EXPECT_EQ(owner.session.bytes_out(), answered);
    EXPECT_FALSE(owner.session.has_partial());
  }
}

// --- deadlines

/// The earliest moment at which `expire` does something, which must be what `deadline` says.
void expect_ends_exactly_at(Owner& owner, TimePoint when, Errc reason, Phase phase) {
  ASSERT_EQ(owner.session.deadline(), when);
  const Phase before = owner.session.phase();
  owner.session.expire(when - 1ns);
  ASSERT_EQ(owner.session.phase(), before) << "too early";
  owner.session.expire(when);
  EXPECT_EQ(owner.session.phase(), phase);
  EXPECT_EQ(owner.session.reason().code, reason) << owner.session.reason().message();
}

TEST(SessionProtocolDeadlines, TheFirstPacketMustComeInTimeAndWhole) {
  Owner silent;
  expect_ends_exactly_at(silent, start + 10s, Errc::first_packet_timeout, Phase::closing);
  Owner slow;
  const Bytes bytes = request(1, random_bytes(100, 1));
  for (std::size_t i = 0; i + 1 < bytes.size(); ++i) {
    slow.now += 80ms;
    slow.receive({bytes[i]});
  }
  expect_ends_exactly_at(slow, start + 10s, Errc::first_packet_timeout, Phase::closing);
  Owner good;
  good.now += 9999ms;
  good.receive(bytes);
  EXPECT_EQ(good.session.deadline(), never) << "idle is off";
}

TEST(SessionProtocolDeadlines, APacketSentIsNoFirstPacketReceived) {
  Owner owner;
  owner.push(100);
  owner.write();
  expect_ends_exactly_at(owner, start + 10s, Errc::first_packet_timeout, Phase::closing);
}

TEST(SessionProtocolDeadlines, IdleRunsFromTheLastPacketEitherWay) {
  auto options = without_deadlines();
  options.idle_timeout = 60s;
  Owner owner(options);
  EXPECT_EQ(owner.session.deadline(), start + 60s);
  owner.now += 50s;
  owner.receive(requests(1, 1));
  EXPECT_EQ(owner.session.deadline(), start + 110s);
  owner.now += 50s;
  owner.push(100);
  owner.write(99);
  EXPECT_EQ(owner.session.deadline(), start + 110s) << "no packet has left yet";
  owner.write(1);
  EXPECT_EQ(owner.session.deadline(), start + 160s);
  owner.now += 50s;
  owner.receive(Bytes(1, std::byte{1}));
  expect_ends_exactly_at(owner, start + 160s, Errc::idle_timeout, Phase::closing);
}

Bytes heartbeat(std::uint8_t biz_type = 255, const Bytes& payload = {}) {
  wire::Header header;
  header.biz_type = biz_type;
  header.message_id = 1;
  Bytes out;
  wire::append_packet(out, header, {}, payload);
  return out;
}

TEST(SessionProtocolHeartbeat, IsSentWhenNothingElseWasForAnInterval) {
  auto options = without_deadlines();
  options.heartbeat_interval = 10s;
  options.max_missed_heartbeats = 1000;
  Owner owner(options);
  EXPECT_EQ(owner.session.deadline(), start + 10s);
  owner.now += 9s;
  owner.session.send_heartbeat(owner.now);
  EXPECT_TRUE(owner.session.outbound_empty()) << "not yet";
  owner.push(100);
  EXPECT_GT(owner.session.deadline(), start + 1h) << "what is queued will do";
  owner.write();
  EXPECT_EQ(owner.session.deadline(), start + 19s);
  owner.written.clear();
  owner.now = start + 19s;
  owner.session.expire(owner.now);
  owner.session.send_heartbeat(owner.now);
  owner.session.send_heartbeat(owner.now);
  owner.write();
  EXPECT_EQ(owner.written.size(), wire::header_size) << "one";
  EXPECT_EQ(owner.written[3], std::byte{255});
  EXPECT_EQ(owner.session.deadline(), start + 29s);
}

TEST(SessionProtocolHeartbeat, IsNotSentToAPeerThatHasEnded) {
  SessionOptions options = without_deadlines();
  options.heartbeat_interval = 10s;
  Owner owner(options);
  owner.session.receive_end(owner.now, 1h);
  EXPECT_EQ(owner.session.deadline(), owner.now + 1h);
  owner.now += 20s;
  owner.session.send_heartbeat(owner.now);
  EXPECT_TRUE(owner.session.outbound_empty());
}

TEST(SessionProtocolHeartbeat, OfThePeerIsHandedToNobodyAndKeepsTheSession) {
  auto options = without_deadlines();
  options.heartbeat_interval = 10s;
  options.heartbeat_biz_type = 9;
  Owner owner(options);
  for (int i = 0; i < 100; ++i) {
    owner.now += 10s;
    owner.receive(heartbeat(9));
    owner.session.expire(owner.now);
    owner.session.send_heartbeat(owner.now);
    owner.write();
  }
  EXPECT_TRUE(owner.session.accepts());
  EXPECT_TRUE(owner.packets.empty());
  EXPECT_EQ(owner.session.packets_in(), 100U);
  owner.receive(heartbeat(8));
  owner.receive(heartbeat(9, Bytes(1)));
  EXPECT_EQ(owner.packets.size(), 2U) << "neither of these is one";
}

TEST(SessionProtocolHeartbeat, OfThePeerIsAMessageLikeAnyWhereTheOptionIsOff) {
  Owner owner(without_deadlines());
  owner.receive(heartbeat());
  EXPECT_EQ(owner.packets.size(), 1U);
  EXPECT_EQ(owner.session.deadline(), never);
}

TEST(SessionProtocolHeartbeat, EndsASessionWhosePeerIsSilent) {
  auto options = without_deadlines();
  options.heartbeat_interval = 10s;
  options.max_missed_heartbeats = 3;
  Owner owner(options);
  owner.now += 25s;
  owner.receive(Bytes(1, std::byte{1}));  // of a packet: it is there
  for (owner.now = start + 64s; owner.now < start + 65s; owner.now += 100ms) {
    owner.session.send_heartbeat(owner.now);
    owner.write();
  }
  expect_ends_exactly_at(owner, start + 65s, Errc::peer_silent, Phase::closing);
}

TEST(SessionProtocolHeartbeat, NobodyIsSilentWhileNobodyListens) {
  auto options = without_deadlines();
  options.heartbeat_interval = 10s;
  Owner owner(options);
  owner.session.hold(true);
  for (int i = 0; i < 100; ++i) {
    owner.now += 10s;
    owner.session.expire(owner.now);
    owner.session.send_heartbeat(owner.now);
    owner.write();
    EXPECT_GT(owner.session.deadline(), owner.now);
  }
  EXPECT_TRUE(owner.session.accepts());
}

TEST(SessionProtocolHeartbeat, IsNoPacketForTheIdleTimeout) {
  auto options = without_deadlines();
  options.heartbeat_interval = 10s;
  options.idle_timeout = 60s;
  Owner owner(options);
  for (int i = 0; i < 5; ++i) {
    owner.now += 10s;
    owner.receive(heartbeat());
    owner.session.expire(owner.now);
    owner.session.send_heartbeat(owner.now);
    owner.write();
  }
  EXPECT_TRUE(owner.session.accepts());
  owner.now += 10s;
  owner.receive(heartbeat());
  owner.session.expire(owner.now);
  EXPECT_EQ(owner.session.reason().code, Errc::idle_timeout);
}

// --- rates

TEST(SessionProtocolRate, HandsOutABurstAndThenWhatTheRateAllows) {
  SessionOptions options = without_deadlines();
  options.packets_per_second = 10;
  options.packet_burst = 3;
  Owner owner(options);
  owner.receive(requests(1, 6));
  EXPECT_EQ(owner.ids(), counted(1, 3));
  EXPECT_FALSE(owner.session.wants_read());
  EXPECT_FALSE(owner.session.resumable());
  for (std::uint32_t id = 4; id <= 6; ++id) {
    EXPECT_EQ(owner.session.deadline(), owner.now + 100ms);
    owner.now += 100ms - 1ns;
    owner.session.expire(owner.now);
    EXPECT_FALSE(owner.session.resumable());
    owner.now += 1ns;
    owner.session.expire(owner.now);
    ASSERT_TRUE(owner.session.resumable());
    owner.resume();
    EXPECT_EQ(owner.ids(), counted(1, id));
  }
  EXPECT_EQ(owner.shared.throttled.value(), 4U);
}

TEST(SessionProtocolRate, OfBytesCountsWholePacketsAndHeartbeatsToo) {
  SessionOptions options = without_deadlines();
  options.bytes_per_second = 1000;
  options.byte_burst = 100;
  options.heartbeat_interval = 10s;
  Owner owner(options);
  owner.receive(request(1, random_bytes(1084, 1)));
  EXPECT_EQ(owner.ids(), counted(1, 1)) << "what is larger than the burst is handed out, and paid for afterwards";
  EXPECT_EQ(owner.session.deadline(), owner.now + 1001ms);
  owner.now += 1001ms;
  owner.session.expire(owner.now);
  EXPECT_TRUE(owner.session.wants_read());
  owner.receive(heartbeat());
  EXPECT_FALSE(owner.session.wants_read());
}

TEST(SessionProtocolRate, WhileItWaitsThePeerIsNeitherIdleNorSilentNorStalled) {
  SessionOptions options;
  options.packets_per_second = 1;
  options.packet_burst = 1;
  options.idle_timeout = 100ms;
  options.heartbeat_interval = 50ms;
  options.read_stall_timeout = 100ms;
  Owner owner(options);
  owner.receive(requests(1, 5) + Bytes(3));
  for (int i = 0; i < 300 && owner.ids().size() < 5; ++i) {
    owner.now += 20ms;
    owner.session.expire(owner.now);
    if (owner.session.resumable()) owner.resume();
  }
  EXPECT_EQ(owner.ids(), counted(1, 5));
  EXPECT_EQ(owner.session.phase(), Phase::open) << owner.session.reason().message();
}

TEST(SessionProtocol, OneCallDeliversSoManyPacketsAtMostAndResumeTheRest) {
  Owner owner(without_deadlines());
  owner.session.set_packets_a_call(3);
  owner.receive(requests(1, 7) + Bytes(4));
  EXPECT_EQ(owner.ids(), counted(1, 3));
  EXPECT_TRUE(owner.session.stopped_at_limit());
  for (const std::uint32_t last : {6U, 7U}) {
    ASSERT_TRUE(owner.session.resumable());
    owner.resume();
    EXPECT_EQ(owner.ids(), counted(1, last));
  }
  EXPECT_FALSE(owner.session.stopped_at_limit());
  EXPECT_FALSE(owner.session.resumable());
}

TEST(SessionProtocol, WhoseLastPacketIsTheLimitsHasNothingLeft) {
  Owner owner(without_deadlines());
  owner.session.set_packets_a_call(3);
  owner.receive(requests(1, 3));
  EXPECT_FALSE(owner.session.stopped_at_limit()) << "nothing would come back for it";
  EXPECT_TRUE(owner.session.wants_read());
}

TEST(SessionProtocol, HeldForAnswersItHandsOutNothing) {
  Owner owner(without_deadlines());
  owner.during = [&] { owner.session.hold_for_answers(true); };
  owner.receive(requests(1, 3));
  EXPECT_EQ(owner.ids(), counted(1, 1));
  EXPECT_FALSE(owner.session.wants_read());
  owner.session.hold_for_answers(false);
  ASSERT_TRUE(owner.session.resumable());
  owner.resume();
  EXPECT_EQ(owner.ids(), counted(1, 2));
}

TEST(SessionProtocol, TheLowMarkIsWhereItGoesOnAfterAPause) {
  for (const unsigned percent : {0U, 30U, 90U}) {
    SessionOptions options = without_deadlines();
    options.outbound_bytes = 1000;
    options.low_mark_percent = percent;
    Owner owner(options, 100);
    owner.receive(requests(1, 20));
    EXPECT_EQ(owner.ids(), counted(1, 10));
    owner.write(1000 - percent * 10 - 100);
    EXPECT_FALSE(owner.session.resumable());
    owner.write(100);
    EXPECT_TRUE(owner.session.resumable());
  }
}

TEST(SessionProtocol, ItsLimitCanBeChanged) {
  SessionOptions options = without_deadlines();
  options.outbound_bytes = 1000;
  Owner owner(options, 100);
  owner.session.set_outbound_limit({300, 100});
  owner.receive(requests(1, 20));
  EXPECT_EQ(owner.ids(), counted(1, 3));
}

TEST(SessionProtocol, WithTheTotalUsedUpItHandsOutOneByOne) {
  OutboundTotal total(1000);
  Owner owner(without_deadlines(), 100);
  owner.shared.total = &total;
  total.reserve(1000);
  owner.receive(requests(1, 5));
  for (std::uint32_t id = 1; id <= 3; ++id) {
    EXPECT_EQ(owner.ids(), counted(1, id));
    owner.write();
    ASSERT_TRUE(owner.session.resumable());
    owner.resume();
  }
  owner.write();
  (void)total.release(1000);
  owner.resume();
  EXPECT_EQ(owner.ids(), counted(1, 5));
}

TEST(SessionProtocolDeadlines, AReadStallRunsFromTheLastByteWithinAPacket) {
  auto options = without_deadlines();
  options.read_stall_timeout = 30s;
  Owner owner(options);
  EXPECT_EQ(owner.session.deadline(), never) << "no packet has begun";
  const Bytes bytes = requests(1, 3);
  owner.receive({bytes.begin(), bytes.begin() + 30});
  EXPECT_EQ(owner.session.deadline(), start + 30s);
  owner.now += 29s;
  owner.receive({bytes[30]});
  EXPECT_EQ(owner.session.deadline(), start + 59s);
  owner.now += 29s;
  owner.receive({bytes.begin() + 31, bytes.end()});
  EXPECT_EQ(owner.session.deadline(), never);
  owner.receive({bytes[0]});
  expect_ends_exactly_at(owner, start + 88s, Errc::read_stalled, Phase::closing);
}

TEST(SessionProtocolDeadlines, WhilePausedThereIsNoReadStallAndResumingStartsItAnew) {
  auto options = small_budget();
  options.read_stall_timeout = 30s;
  Owner owner(options, 100);
  const Bytes bytes = requests(1, 12);
  owner.receive({bytes.begin(), bytes.end() - 1});
  EXPECT_EQ(owner.session.deadline(), never);
  owner.now += 100h;
  owner.session.expire(owner.now);
  EXPECT_EQ(owner.session.phase(), Phase::open);
  owner.write();
  ASSERT_TRUE(owner.session.resumable());
  owner.resume();
  EXPECT_EQ(owner.ids(), counted(1, 11));
  expect_ends_exactly_at(owner, owner.now + 30s, Errc::read_stalled, Phase::closing);
}

TEST(SessionProtocolDeadlines, AWriteStallRunsFromTheFirstRefusalSinceProgress) {
  auto options = without_deadlines();
  options.write_stall_timeout = 30s;
  Owner owner(options);
  owner.push(1000);
  EXPECT_EQ(owner.session.deadline(), never) << "not tried yet";
  owner.session.write_blocked(owner.now);
  owner.now += 20s;
  owner.session.write_blocked(owner.now);
  EXPECT_EQ(owner.session.deadline(), start + 30s) << "from the first";
  owner.write(1);
  EXPECT_EQ(owner.session.deadline(), never) << "a byte is progress";
  owner.now += 5s;
  owner.session.write_blocked(owner.now);
  EXPECT_EQ(owner.session.deadline(), start + 55s);
  owner.session.note_written(10, 0, owner.now);
  EXPECT_EQ(owner.session.deadline(), never) << "so is one that never was in the queue";
  owner.session.write_blocked(owner.now);
  expect_ends_exactly_at(owner, start + 55s, Errc::write_stalled, Phase::ended);
}

TEST(SessionProtocolDeadlines, AWriteStallEndsAClosingSessionButTheReasonStays) {
  auto options = without_deadlines();
  options.write_stall_timeout = 3s;
  Owner owner(options);
  owner.push(1000);
  owner.session.write_blocked(owner.now);
  owner.session.close(Errc::closed_by_user, owner.now);
  expect_ends_exactly_at(owner, start + 3s, Errc::closed_by_user, Phase::ended);
}

TEST(SessionProtocolDeadlines, ClosingLastsAtMostTheCloseTimeout) {
  auto options = without_deadlines();
  options.close_timeout = 1234ms;
  Owner owner(options);
  owner.push(1000);
  owner.now += 1h;
  owner.session.close(Error(Errc::closed_by_user, "enough"), owner.now);
  owner.write(500);
  expect_ends_exactly_at(owner, start + 1h + 1234ms, Errc::closed_by_user, Phase::ended);
  EXPECT_EQ(owner.session.reason().text, "enough");
}

TEST(SessionProtocolDeadlines, LingeringLastsASecondAndNotBeyondTheCloseTimeout) {
  Owner soon;
  soon.receive(requests(1, 1));
  soon.session.close(Errc::closed_by_user, soon.now);
  soon.session.shut_down(soon.now + 100ms);
  expect_ends_exactly_at(soon, start + 1100ms, Errc::closed_by_user, Phase::ended);
  Owner late;
  late.session.close(Errc::closed_by_user, late.now);
  late.session.shut_down(late.now + 4900ms);
  expect_ends_exactly_at(late, start + 5s, Errc::closed_by_user, Phase::ended);
}

TEST(SessionProtocolDeadlines, ADrainAfterThePeersEndLastsAsLongAsItIsGiven) {
  Owner owner;
  owner.receive(requests(1, 1));
  owner.session.receive_end(owner.now, 7s);
  expect_ends_exactly_at(owner, start + 7s, Errc::closed_by_peer, Phase::ended);
}

TEST(SessionProtocolDeadlines, ZeroTurnsEachOff) {
  Owner owner(without_deadlines());
  owner.receive(Bytes(1, std::byte{1}));
  owner.push(100);
  owner.session.write_blocked(owner.now);
  EXPECT_EQ(owner.session.deadline(), never);
  owner.session.expire(owner.now + 24h * 365);
  EXPECT_EQ(owner.session.phase(), Phase::open);
  // and each alone is on
  using Member = std::chrono::milliseconds SessionOptions::*;
  for (const Member member : {&SessionOptions::first_packet_timeout, &SessionOptions::idle_timeout,
                              &SessionOptions::read_stall_timeout, &SessionOptions::write_stall_timeout}) {
    auto options = without_deadlines();
    options.*member = 4321ms;
    Owner one(options);
    one.receive(Bytes(1, std::byte{1}));
    one.push(100);
    one.session.write_blocked(one.now);
    EXPECT_EQ(one.session.deadline(), start + 4321ms);
  }
}

TEST(SessionProtocolDeadlines, AThousandHoursOfTrafficEndOnlyWhenTheTrafficDoes) {
  SessionOptions options;
  options.idle_timeout = 1h;
  Owner owner(options, 30);
  std::uint32_t id = 0;
  while (owner.now < start + 1000h) {
    owner.session.expire(owner.now);
    ASSERT_EQ(owner.session.phase(), Phase::open) << owner.session.reason().message();
    owner.receive(requests(id + 1, id + 1));
    ++id;
    owner.write();
    // a packet that takes its time, but never stalls
    ++id;
    const Bytes bytes = request(id, random_bytes(50, id));
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      owner.now += 29s;
      owner.session.expire(owner.now);
      owner.receive({bytes[i]});
    }
    owner.write();
    owner.now += 59min;
    owner.packets.clear();
    owner.written.clear();
  }
  EXPECT_EQ(owner.session.packets_in(), id);
  EXPECT_EQ(owner.session.packets_out(), id);
  expect_ends_exactly_at(owner, owner.now + 1min, Errc::idle_timeout, Phase::closing);
}

// Whatever happens: before the deadline `expire` does nothing, and at it, it does something.
TEST(SessionProtocolDeadlines, DeadlineIsExactlyWhenExpireActs) {
  int acted = 0;
  for (std::uint32_t seed = 1; seed <= 2000; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto some = [&random](int most) {
      return std::chrono::milliseconds(random() % 3 == 0 ? 0 : 1 + random() % static_cast<unsigned>(most));
    };
    SessionOptions options;
    options.first_packet_timeout = some(300);
    options.idle_timeout = some(500);
    options.read_stall_timeout = some(300);
    options.write_stall_timeout = some(300);
    options.close_timeout = std::chrono::milliseconds(1 + random() % 2000);
    options.outbound_bytes = 300;
    Owner owner(options, 100);
    auto& session = owner.session;
    std::uint32_t id = 1;
    Bytes incoming;
    for (int step = 0; step < 60 && !session.ended(); ++step) {
      switch (random() % 14) {
        case 0:
        case 1:
        case 2: {
          if (!session.wants_read()) break;
          if (incoming.empty()) incoming = requests(id, id + 3);
          id += 4;
          const auto count = static_cast<std::ptrdiff_t>(1 + random() % incoming.size());
          owner.receive({incoming.begin(), incoming.begin() + count});
          incoming.erase(incoming.begin(), incoming.begin() + count);
          break;
        }
        case 3:
          if (session.resumable()) owner.resume();
          break;
        case 4:
        case 5: owner.write(random() % 200); break;
        case 6:
          if (!session.outbound_empty()) session.write_blocked(owner.now);
          break;
        case 7:
          if (session.accepts()) owner.push(50);
          break;
        case 8:
          if (random() % 6 == 0) session.begin_drain();
          break;
        case 9:
          if (random() % 6 == 0) session.close(Errc::closed_by_user, owner.now);
          break;
        case 10:
          if (random() % 8 == 0) session.receive_end(owner.now, std::chrono::milliseconds(random() % 1000));
          break;
        case 11:
          if (session.shutdown_due()) session.shut_down(owner.now);
          break;
        default: owner.now += std::chrono::microseconds(random() % 100'000);
      }
      const TimePoint deadline = session.deadline();
      const Phase before = session.phase();
      if (session.ended()) {
        EXPECT_EQ(deadline, never);
        break;
      }
      if (deadline > owner.now) {
        session.expire(owner.now);
        ASSERT_EQ(session.phase(), before);
        ASSERT_EQ(session.deadline(), deadline);
        if (deadline != never) {
          session.expire(deadline - 1ns);
          ASSERT_EQ(session.phase(), before);
        }
      }
      if (deadline <= owner.now || (deadline != never && random() % 20 == 0)) {
        owner.now = std::max(owner.now, deadline);
        session.expire(owner.now);
        ++acted;
        ASSERT_NE(session.phase(), before) << "at its deadline nothing happened";
        ASSERT_TRUE(session.reason());
        ASSERT_GT(session.deadline(), owner.now) << "or a timer would fire without end";
      }
    }
  }
  EXPECT_GT(acted, 1000);
}

// --- memory and counts

TEST(SessionProtocol, ReleaseGivesAllMemoryBack) {
  Owner owner(small_budget(), 100);
  const Bytes half = request(99, random_bytes(50'000, 1));
  const auto live = [&](SessionProtocol& session) {
    const auto nothing = [](const wire::Header&, View, View) {};
    session.receive(View(half).first(40'000), start, nothing);
    wire::Header header;
    for (int i = 0; i < 20; ++i) session.outbound().append(header, {}, Bytes(9000), OutboundKind::push);
    session.outbound().append(header, {}, Bytes(40'000), OutboundKind::answer);
  };
  std::size_t all = 0;
  for (int round = 0; round < 3; ++round) {
    SessionProtocol session(owner.options, owner.shared, start);
    live(session);
    if (round != 0) {
      EXPECT_LE(owner.shared.buffers.kept_bytes(), all / 2);
    }
    if (round == 1) session.abort(Errc::stopping);
    session.release();
    if (round == 0) {
      all = owner.shared.buffers.kept_bytes();
      EXPECT_GE(all, 260'000U);
    }
    EXPECT_EQ(owner.shared.buffers.kept_bytes(), all);
    EXPECT_TRUE(session.outbound_empty());
    EXPECT_FALSE(session.has_partial());
    session.release();
  }
  {
    SessionProtocol session(owner.options, owner.shared, start);
    live(session);
    EXPECT_LE(owner.shared.buffers.kept_bytes(), all / 2);
  }
  EXPECT_EQ(owner.shared.buffers.kept_bytes(), all) << "its destructor releases";
}

TEST(SessionProtocol, AnIdleSessionHoldsNoBuffersAndNoQueue) {
  Owner owner({}, 100);
  const OutboundQueue* const queue = &owner.session.outbound();
  owner.receive(requests(1, 5));
  owner.write();
  const std::size_t kept = owner.shared.buffers.kept_bytes();
  EXPECT_GT(kept, 0U);
  SessionProtocol other(owner.options, owner.shared, start);
  EXPECT_EQ(&other.outbound(), queue) << "the queue is lent to the next that needs one";
}

TEST(SessionProtocol, ASessionThatEndsInTheMiddleOfAReadKeepsNothingOfIt) {
  Owner owner;
  owner.during = [&] { owner.session.close(Errc::closed_by_user, owner.now); };
  const Bytes bytes = requests(1, 50, 1000);
  owner.receive({bytes.begin(), bytes.begin() + 100});
  owner.receive({bytes.begin() + 100, bytes.end()});
  EXPECT_EQ(owner.packets.size(), 1U);
  EXPECT_FALSE(owner.session.has_partial());
}

// A large read makes a session's own queue take a large block, since its answers are about as long. What its handler
// sends to others meanwhile must not: a broadcast from a handler would take such a block for every session there is.
TEST(SessionProtocol, ALargeReadOfOneSessionMakesNoLargeBlocksForOthers) {
  const auto block_taken = [](bool own) {
    Owner owner;
    SessionProtocol other(owner.options, owner.shared, start);
    SessionProtocol& target = own ? owner.session : other;
    bool first = true;
    owner.during = [&] {
      if (std::exchange(first, false)) target.outbound().append({}, {}, bytes_of("news"), OutboundKind::push);
    };
    owner.receive(requests(1, 500, 100));
    target.release();
    return owner.shared.buffers.kept_bytes();
  };
  EXPECT_EQ(block_taken(true), 65'536U);
  EXPECT_LE(block_taken(false), 2048U);
}

TEST(SessionProtocol, AReadThatAHandlersFaultCutShortIsOverForTheNextSession) {
  Owner owner;
  owner.during = [] { throw HandlerFault(); };
  EXPECT_THROW(owner.receive(requests(1, 500, 100)), HandlerFault);
  owner.push(20);
  EXPECT_EQ(owner.write(), 20U);
  EXPECT_LE(owner.shared.buffers.kept_bytes(), 2048U);
}

TEST(SessionProtocol, CountsWhatWentInAndOut) {
  Owner owner({}, 100);
  owner.receive(requests(1, 3) + Bytes(5, std::byte{1}));
  EXPECT_EQ(owner.session.packets_in(), 3U);
  EXPECT_EQ(owner.session.bytes_in(), 3U * 26 + 5);
  owner.write(250);
  EXPECT_EQ(owner.session.packets_out(), 2U);
  EXPECT_EQ(owner.session.bytes_out(), 250U);
  owner.session.note_written(1000, 1, owner.now);
  EXPECT_EQ(owner.session.packets_out(), 3U);
  EXPECT_EQ(owner.session.bytes_out(), 1250U);
}

TEST(SessionProtocol, CountsWholePacketsThatWereReadAndNotHandedOutWhenItEnds) {
  const auto aborted = [](Owner& owner) { owner.session.abort(Errc::connection_lost); };
  const auto closed = [](Owner& owner) { owner.session.close(Errc::closed_by_user, owner.now); };
  const std::array<std::function<void(Owner&)>, 2> ends{aborted, closed};
  for (const auto& end : ends) {
    Owner held;
    held.session.hold(true);
    held.receive(requests(1, 7) + Bytes(5, std::byte{1}));
    EXPECT_EQ(held.session.dropped_inbound(), 0U) << "they wait";
    end(held);
    held.session.release();
    EXPECT_EQ(held.session.dropped_inbound(), 7U);
    EXPECT_EQ(held.session.packets_in(), 0U);

    Owner in_a_handler;
    in_a_handler.during = [&] {
      if (in_a_handler.packets.size() == 3) end(in_a_handler);
    };
    in_a_handler.receive(requests(1, 9));
    EXPECT_EQ(in_a_handler.session.dropped_inbound(), 6U);
    in_a_handler.receive(requests(10, 20));
    in_a_handler.session.release();
    EXPECT_EQ(in_a_handler.session.dropped_inbound(), 6U) << "what comes after the end is not";
    EXPECT_EQ(in_a_handler.session.packets_in(), 3U);
  }
}

TEST(SessionProtocol, CountsNothingAsReadOfWhatBreaksTheProtocol) {
  Owner owner;
  owner.receive(requests(1, 2) + Bytes(100, std::byte{0xff}));
  owner.session.release();
  EXPECT_EQ(owner.session.packets_in(), 2U);
  EXPECT_EQ(owner.session.dropped_inbound(), 0U);
}

TEST(SessionProtocol, MessageIdsCountFromOne) {
  Owner owner;
  EXPECT_EQ(owner.session.next_message_id(), 1U);
  EXPECT_EQ(owner.session.next_message_id(), 2U);
}

// Every allocation of a receive fails once: either nothing is lost, or the session is mute; never does it go on with a
// torn stream, and never does the process end.
TEST(SessionProtocol, WhoAwaitsAdmissionIsReadSomeWayAheadAndHandedNothing) {
  SessionOptions options = without_deadlines();
  options.first_packet_timeout = 1s;
  options.idle_timeout = 2s;
  options.read_stall_timeout = 3s;
  options.heartbeat_interval = 1s;
  SharedResources shared;
  SessionProtocol session(options, shared, start);
  std::vector<std::string> got;
  const auto deliver = [&got](const wire::Header&, View, View payload) { got.push_back(text_of(payload)); };
  session.await_admission();
  session.receive(request(1, bytes_of("early")), start, deliver);
  EXPECT_TRUE(session.wants_read()) << "its end would not be seen";
  EXPECT_FALSE(session.resumable());
  session.expire(start + 1h);
  EXPECT_EQ(session.phase(), Phase::open);
  session.receive(request(2, Bytes(64 * 1024)), start + 1h, deliver);
  EXPECT_FALSE(session.wants_read());
  EXPECT_TRUE(got.empty());
  session.admit(start + 2h);
  ASSERT_TRUE(session.resumable());
  session.resume(start + 2h, deliver);
  ASSERT_EQ(got.size(), 2U);
  EXPECT_EQ(got[0], "early");
  EXPECT_TRUE(session.wants_read());
  session.expire(start + 2h + 2s - 1ms);
  EXPECT_EQ(session.phase(), Phase::open);
  session.expire(start + 2h + 2s);
  EXPECT_NE(session.phase(), Phase::open) << "from the admission on the deadlines run";
  session.release();
}

TEST(SessionProtocol, RunningOutOfMemoryInAReadLosesNoPacketUnnoticed) {
  const Bytes bytes = requests(1, 30, 200);
  int failures = 0;
  int mute = 0;
  for (const bool fault : {false, true}) {
    for (long successes = 0;; ++successes) {
      ASSERT_LT(successes, 1000);
      Owner owner(small_budget(), 0);
      std::vector<std::uint32_t> seen;
      seen.reserve(100);
      const auto deliver = [&](const wire::Header& header, View, View) {
        seen.push_back(header.message_id);
        if (fault && seen.size() == 5) throw HandlerFault();
        if (seen.size() == 12) owner.session.outbound().append({}, {}, bytes, OutboundKind::answer);  // pauses
      };
      bool failed = false;
      std::size_t at = 0;
      const auto next = [&](std::size_t count) {
        const View lent = View(bytes).subspan(at, count);
        at += count;
        owner.session.receive(lent, start, deliver);
      };
      {
        const test::AllocationFailure failure(successes);
        for (const std::size_t count : {std::size_t{1300}, std::size_t{2000}}) {
          try {
            next(count);
          } catch (const std::bad_alloc&) {
            failed = true;
          } catch (const HandlerFault&) {
          }
        }
        failed = failed || failure.happened();
      }
      owner.write();
      if (owner.session.wants_read()) {
        if (owner.session.resumable()) owner.session.resume(start, deliver);
        owner.write();
        if (owner.session.resumable()) owner.session.resume(start, deliver);
        try {
          next(bytes.size() - at);
        } catch (const HandlerFault&) {
        }
        owner.write();
        while (owner.session.resumable()) {
          owner.session.resume(start, deliver);
          owner.write();
        }
        ASSERT_EQ(seen, counted(1, 30)) << "allocation " << successes;
      } else {
        ++mute;
        ASSERT_FALSE(owner.session.resumable());
        const std::size_t before = seen.size();
        next(bytes.size() - at);
        owner.session.resume(start, deliver);
        ASSERT_EQ(seen.size(), before);
        ASSERT_EQ(seen, counted(1, static_cast<std::uint32_t>(before)));
      }
      if (!failed) break;
      ++failures;
    }
  }
  EXPECT_GT(failures, 4);
  EXPECT_GT(mute, 0);
}

}  // namespace
}  // namespace msgtrans::protocol
