// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <boost/asio/post.hpp>
#include <functional>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/wire/compression.hpp>
#include <thread>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;

constexpr std::size_t kibibyte = 1024;

/// Text that any codec makes much smaller.
std::string text(std::size_t size) {
  constexpr std::string_view words = "the same few words again and again, ";
  std::string all;
  while (all.size() < size) all += words;
  all.resize(size);
  return all;
}
/// Of whose size about `rest` bytes stay.
std::string half_text(std::size_t rest, std::size_t size) {
  return pattern(rest) + text(size - rest);
}

/// What the application at the other end would get.
std::string unpacked(const RawPacket& packet) {
  Bytes out;
  const BytesView payload(packet.payload);
  const auto error = wire::decompress(packet.header.compression, payload, 64 << 20, out);
  return error ? "does not decompress: " + error->text : std::string(BytesView(out).text());
}

SessionOptions silent(CompressionOptions compression) {
  return {.compression = compression, .first_packet_timeout = 0ms};
}

/// A server whose one session is with a peer that sees the bytes on the wire.
struct Pair {
  explicit Pair(const SessionOptions& options, const std::function<void(TestServer&)>& prepare = {},
                int receive_buffer = 0)
      : server({.shards = 1, .session = options}) {
    if (prepare) prepare(server);
    server.start();
    peer = std::make_unique<RawPeer>(server.endpoint, receive_buffer);
    session.emplace(server.session(*peer));
  }

  /// Runs `f` on the session's shard, outside its handlers.
  void on_shard(std::function<void()> f) const {
    std::promise<void> done;
    asio::post(session->get_executor(), [&] {
      f();
      done.set_value();
    });
    done.get_future().get();
  }

  TestServer server;
  std::unique_ptr<RawPeer> peer;
  std::optional<Session> session;
};

void expect_packed(const RawPacket& packet, Compression codec, const std::string& payload) {
  EXPECT_EQ(packet.header.compression, codec);
  EXPECT_TRUE(unpacked(packet) == payload) << unpacked(packet).substr(0, 100);
  if (codec == Compression::none) {
    EXPECT_EQ(packet.payload.size(), payload.size());
  } else {
    EXPECT_LT(packet.payload.size(), payload.size());
  }
}

void expect_nothing_compressed(const Pair& pair) {
  for (const auto& [packets, before, after, incompressible] :
       {std::tuple(pair.session->stats().compressed_packets, pair.session->stats().compressed_bytes_before,
                   pair.session->stats().compressed_bytes_after, pair.session->stats().incompressible_packets),
        std::tuple(pair.server.transport.stats().compressed_packets,
                   pair.server.transport.stats().compressed_bytes_before,
                   pair.server.transport.stats().compressed_bytes_after,
                   pair.server.transport.stats().incompressible_packets)}) {
    EXPECT_EQ(packets + before + after + incompressible, 0U);
  }
}

TEST(CompressionWhenSending, IsOffUnlessAskedForThoughThePeerCompresses) {
  Pair pair(silent({}), [](TestServer& server) { server.echo(); });
  const std::string payload = text(10'000);
  wire::SmallerPayload packed;
  ASSERT_EQ(packed.compress(Compression::zstd, BytesView(payload)), wire::SmallerPayload::Outcome::smaller);
  for (const auto type : {wire::PacketType::request, wire::PacketType::one_way}) {
    wire::Header header;
    header.compression = Compression::zstd;
    header.type = type;
    header.message_id = 1;
    Bytes bytes;
    wire::append_packet(bytes, header, {}, packed.bytes());
    pair.peer->send(bytes);
    expect_packed(pair.peer->next(), Compression::none, payload);
  }
  pair.session->send(payload);
  expect_packed(pair.peer->next(), Compression::none, payload);
  expect_nothing_compressed(pair);
}

class EachCodec : public ::testing::TestWithParam<Compression> {};
INSTANTIATE_TEST_SUITE_P(Codecs, EachCodec, ::testing::Values(Compression::zstd, Compression::zlib),
                         [](const auto& param) { return param.param == Compression::zstd ? "zstd" : "zlib"; });

TEST_P(EachCodec, OfASessionIsUsedForAllThatItSends) {
  const std::string payload = text(10'000);
  Pair pair(silent({.codec = GetParam()}), [&](TestServer& server) {
    server.transport.on_message([&payload](Session& session, const Message& message) {
      if (message.text() == "later") {
        auto owned = std::make_shared<OwnedMessage>(message.retain());
        std::thread([owned, &payload] { owned->respond(payload); }).join();
      } else if (message.is_request()) {
        session.respond(message, payload, text(1000));
      } else {
        session.send(payload);
      }
    });
  });
  const auto next = [&](wire::PacketType type) {
    const auto packet = pair.peer->next();
    EXPECT_EQ(packet.header.type, type);
    expect_packed(packet, GetParam(), payload);
    return packet;
  };
  // From a thread of its own: a send, one that waits, high priority, a request.
  pair.session->send(payload, {.biz_type = 9, .extension = text(2000), .route_tag = true});
  const auto first = next(wire::PacketType::one_way);
  EXPECT_EQ(first.header.biz_type, 9);
  EXPECT_EQ(first.header.flags, wire::flags::route_tag);
  EXPECT_EQ(first.extension, text(2000)) << "extension headers are never compressed";
  EXPECT_FALSE(in_time(submit(*pair.session, payload)));
  next(wire::PacketType::one_way);
  pair.session->send(payload, {.high_priority = true});
  EXPECT_EQ(next(wire::PacketType::one_way).header.flags, wire::flags::high_priority);
  auto answer = ask(*pair.session, payload);
  pair.peer->send(response(next(wire::PacketType::request).header.message_id, "yes"));
  EXPECT_EQ(in_time(answer).second.text(), "yes");
  // On the shard, in a handler and outside, and an answer from elsewhere.
  pair.on_shard([&] { pair.session->send(payload); });
  next(wire::PacketType::one_way);
  pair.peer->send(one_way(1, "x"));
  next(wire::PacketType::one_way);
  pair.peer->send(request(2, "x"));
  EXPECT_EQ(next(wire::PacketType::response).extension, text(1000));
  pair.peer->send(request(3, "later"));
  EXPECT_EQ(next(wire::PacketType::response).header.message_id, 3U);
  EXPECT_EQ(pair.session->stats().compressed_packets, 8U);
  EXPECT_EQ(pair.server.transport.stats().compressed_packets, 8U);
}

TEST_P(EachCodec, OfAMessageGoesBeforeTheSessions) {
  const std::string payload = text(10'000);
  const CompressionOptions mine{.codec = GetParam()};
  const CompressionOptions other{.codec = GetParam() == Compression::zstd ? Compression::zlib : Compression::zstd};
  for (const auto& of_session : {no_compression, other}) {
    for (const auto& of_message : {no_compression, mine}) {
      Pair pair(silent(of_session), [&](TestServer& server) {
        server.transport.on_message([&](Session& session, const Message& message) {
          if (message.text() == "later") {
            message.retain().respond(payload, {}, of_message);
          } else {
            session.respond(message, payload, {}, of_message);
          }
        });
      });
      const auto expect_next = [&] { expect_packed(pair.peer->next(), of_message.codec, payload); };
      pair.session->send(payload, {.compression = of_message});
      expect_next();
      EXPECT_FALSE(in_time(submit(*pair.session, payload, {.compression = of_message})));
      expect_next();
      const auto answer = ask(*pair.session, payload, {.compression = of_message});
      expect_next();
      pair.peer->send(request(1, "now"));
      expect_next();
      pair.peer->send(request(2, "later"));
      expect_next();
      pair.server.transport.broadcast(payload, {.compression = of_message});
      expect_next();
      pair.session->send(payload);
      expect_packed(pair.peer->next(), of_session.codec, payload);
    }
  }
}

TEST_P(EachCodec, LeavesPayloadsBelowTheThresholdAlone) {
  for (const std::uint32_t threshold : {0U, 1U, 512U, 5000U}) {
    SCOPED_TRACE(threshold);
    Pair pair(silent({.codec = GetParam(), .threshold = threshold}));
    pair.session->send("");
    expect_packed(pair.peer->next(), Compression::none, "");
    if (threshold > 100) {
      pair.session->send(text(threshold - 1));
      expect_packed(pair.peer->next(), Compression::none, text(threshold - 1));
      expect_nothing_compressed(pair);
      pair.session->send(text(threshold));
      expect_packed(pair.peer->next(), GetParam(), text(threshold));
    } else {
      pair.session->send("x");
      expect_packed(pair.peer->next(), Compression::none, "x");
      EXPECT_EQ(pair.session->stats().incompressible_packets, 1U) << "it was tried";
      pair.session->send(text(200));
      expect_packed(pair.peer->next(), GetParam(), text(200));
    }
    EXPECT_EQ(pair.session->stats().compressed_packets, 1U);
  }
}

TEST_P(EachCodec, HonoursTheLevel) {
  std::string payload;
  for (const char c : pattern(20'000)) payload += std::to_string(static_cast<unsigned char>(c) % 50 * 7919) + " ";
  const int most = GetParam() == Compression::zstd ? 19 : 9;
  Pair pair(silent({.codec = GetParam(), .level = most}));
  const auto size_at = [&](const SendOptions& options) {
    pair.session->send(payload, options);
    const auto packet = pair.peer->next();
    expect_packed(packet, GetParam(), payload);
    return packet.payload.size();
  };
  const auto at = [&](int level) {
    return SendOptions{.compression = CompressionOptions{.codec = GetParam(), .level = level}};
  };
  EXPECT_EQ(size_at({}), size_at(at(most)));
  EXPECT_LT(size_at({}), size_at(at(1)));
  EXPECT_EQ(size_at(at(0)), size_at(at(GetParam() == Compression::zstd ? 3 : 6)));
  EXPECT_EQ(size_at(at(1'000'000)), size_at(at(GetParam() == Compression::zstd ? 22 : 9)));
}

TEST_P(EachCodec, SendsAsItIsWhatDoesNotGetSmallerAndCountsExactly) {
  Pair pair(silent({.codec = GetParam()}), [](TestServer& server) { server.echo(); });
  std::uint64_t before = 0;
  std::uint64_t after = 0;
  std::uint32_t id = 0;
  for (const std::size_t size : {100U, 1000U, 20'000U, 100'000U}) {
    for (const auto& payload : {pattern(size), text(size), half_text(size / 2, size)}) {
      const bool packs = size >= 512 && payload != pattern(size);
      const auto expect_next = [&] {
        const auto packet = pair.peer->next();
        expect_packed(packet, packs ? GetParam() : Compression::none, payload);
        if (packs) before += payload.size(), after += packet.payload.size();
      };
      pair.session->send(payload);
      expect_next();
      pair.peer->send(request(++id, payload));
      expect_next();
    }
  }
  const auto session = pair.session->stats();
  const auto server = pair.server.transport.stats();
  EXPECT_EQ(session.compressed_packets, 12U);
  EXPECT_EQ(session.compressed_bytes_before, before);
  EXPECT_EQ(session.compressed_bytes_after, after);
  EXPECT_EQ(session.incompressible_packets, 6U);
  EXPECT_EQ(server.compressed_packets, session.compressed_packets);
  EXPECT_EQ(server.compressed_bytes_before, session.compressed_bytes_before);
  EXPECT_EQ(server.compressed_bytes_after, session.compressed_bytes_after);
  EXPECT_EQ(server.incompressible_packets, session.incompressible_packets);
}

TEST_P(EachCodec, TakesRoomInTheQueueForWhatGoesOnTheWire) {
  SessionOptions options = silent({});
  options.outbound_bytes = 64 * kibibyte + 300;
  Pair pair(options, {}, 8 * 1024);
  const CompressionOptions pack{.codec = GetParam()};
  fill(*pair.session, pattern(kibibyte - wire::header_size));
  ASSERT_EQ(pair.session->stats().queued_bytes, 64 * kibibyte);
  const std::string payload = text(10'000);
  EXPECT_EQ(pair.session->send(payload), SendResult::would_block);
  EXPECT_EQ(pair.session->send(pattern(10'000), {.compression = pack}), SendResult::would_block);
  ASSERT_EQ(pair.session->send(payload, {.compression = pack}), SendResult::queued);
  ASSERT_TRUE(wait_until([&] { return pair.session->stats().compressed_packets == 1; }));
  EXPECT_EQ(pair.session->stats().queued_bytes,
            64 * kibibyte + wire::header_size + pair.session->stats().compressed_bytes_after);
  int taken = 1;
  while (pair.session->send(payload, {.compression = pack}) == SendResult::queued) ++taken;
  EXPECT_LE(pair.session->stats().queued_bytes, options.outbound_bytes);
  pair.on_shard([] {});
  EXPECT_EQ(pair.session->stats().compressed_packets, static_cast<unsigned>(taken))
      << "what was not taken is not counted";
  EXPECT_EQ(pair.session->stats().incompressible_packets, 0U);
  EXPECT_EQ(pair.session->send(payload, {.high_priority = true, .compression = pack}), SendResult::queued)
      << "high priority has a budget of its own";
  while (pair.session->stats().queued_packets != 0) pair.peer->next();
  EXPECT_EQ(pair.session->stats().queued_bytes, 0U);
}

TEST_P(EachCodec, OfWhatWaitsForRoomIsDoneOnceAndCountedWhenItIsTaken) {
  SessionOptions options = silent({.codec = GetParam()});
  options.outbound_bytes = 64 * kibibyte;
  Pair pair(options, {}, 8 * 1024);
  fill(*pair.session, pattern(kibibyte - wire::header_size), 300ms);
  const auto incompressible = pair.session->stats().incompressible_packets;
  EXPECT_EQ(pair.session->stats().queued_packets, 64U);
  auto done = submit(*pair.session, text(10'000));
  pair.on_shard([] {});
  EXPECT_EQ(pair.session->stats().compressed_packets, 0U);
  for (RawPacket packet; packet.header.compression == Compression::none;) packet = pair.peer->next();
  EXPECT_FALSE(in_time(done));
  EXPECT_EQ(pair.session->stats().compressed_packets, 1U);
  EXPECT_EQ(pair.session->stats().incompressible_packets, incompressible);
}

TEST_P(EachCodec, HasTheLimitsOfTheWireAndOfWhatComesOut) {
  for (const bool by_override : {false, true}) {
    const CompressionOptions pack{.codec = GetParam()};
    SessionOptions options = silent(by_override ? no_compression : pack);
    options.max_payload = 10'000;
    options.max_decompressed = 50'000;
    const std::optional<CompressionOptions> own = by_override ? std::optional(pack) : std::nullopt;
    Record<std::string> answers;
    Record<SendResult> said;
    Pair pair(options, [&](TestServer& server) {
      server.transport.on_message([answers, said, own](Session& session, const Message& message) {
        said.add(session.respond(message, answers.all().back(), {}, own));
        session.respond(message, "", {}, no_compression);
      });
    });
    std::uint32_t id = 0;
    const auto expect = [&](const std::string& payload, SendResult expected) {
      EXPECT_EQ(pair.session->send(payload, {.compression = own}), expected);
      if (expected == SendResult::queued) expect_packed(pair.peer->next(), GetParam(), payload);
      EXPECT_EQ(in_time(submit(*pair.session, payload, {.compression = own})), make_error_code(expected));
      if (expected == SendResult::queued) expect_packed(pair.peer->next(), GetParam(), payload);
      const auto sent = pair.server.transport.broadcast(payload, {.compression = own});
      EXPECT_EQ(sent.queued, expected == SendResult::queued ? 1U : 0U);
      EXPECT_EQ(sent.refused, expected == SendResult::queued ? 0U : 1U);
      if (expected == SendResult::queued) expect_packed(pair.peer->next(), GetParam(), payload);
      answers.add(payload);
      pair.peer->send(request(++id, "?"));
      expect_packed(pair.peer->next(), expected == SendResult::queued ? GetParam() : Compression::none,
                    expected == SendResult::queued ? payload : "");
      EXPECT_EQ(said.at(id - 1), expected);
    };
    expect(text(10'000), SendResult::queued);
    expect(text(10'001), SendResult::queued);
    expect(text(50'000), SendResult::queued);
    expect(text(50'001), SendResult::too_large);
    expect(pattern(10'001), SendResult::too_large);
    expect(half_text(11'000, 40'000), SendResult::too_large);
    EXPECT_EQ(pair.session->stats().incompressible_packets, 0U);
  }
}

TEST_P(EachCodec, IsNotUsedForWhatAPeerWithTheSameLimitsWouldRefuse) {
  SessionOptions options = silent({.codec = GetParam()});
  options.max_decompressed = 5'000;
  Pair pair(options);
  pair.session->send(text(5'000));
  expect_packed(pair.peer->next(), GetParam(), text(5'000));
  pair.session->send(text(5'001));
  expect_packed(pair.peer->next(), Compression::none, text(5'001));
}

TEST_P(EachCodec, KeepsTheOrderOfPackedAndPlain) {
  Pair pair(silent({.codec = GetParam()}));
  constexpr int count = 300;
  std::thread sender([&] {
    for (int i = 0; i < count; ++i) {
      const auto payload = std::to_string(i) + ":" + text(i % 3 == 0 ? 3000 : 10);
      while (pair.session->send(payload) == SendResult::would_block) std::this_thread::sleep_for(1ms);
    }
  });
  for (int i = 0; i < count; ++i) {
    const auto packet = pair.peer->next();
    EXPECT_EQ(packet.header.compression, i % 3 == 0 ? GetParam() : Compression::none);
    EXPECT_EQ(std::stoi(unpacked(packet)), i);
  }
  sender.join();
}

TEST_P(EachCodec, IsUnderstoodByTheLibraryItself) {
  TestServer server({.session = silent({.codec = GetParam(), .threshold = 0})});
  server.echo().start();
  ClientOptions options;
  options.session.compression = {.codec = Compression::zlib, .threshold = 0};
  ClientTransport client(options);
  client.connect(server.url());
  for (const std::size_t size : {0U, 1U, 100U, 10'000U, 1'000'000U}) {
    EXPECT_TRUE(client.request(text(size)).text() == text(size));
    EXPECT_TRUE(client.request(pattern(size)).text() == pattern(size));
  }
  EXPECT_EQ(client.stats().compressed_packets, 3U);
  EXPECT_LT(client.stats().bytes_out, 2 * 1'000'000U) << "half of it was compressed";
  EXPECT_EQ(server.transport.stats().compressed_packets, 3U);
}

TEST(CompressedBroadcast, ReachesEachSessionAsItsOptionsSay) {
  TestServer server({.session = silent({.codec = Compression::zstd})});
  const Endpoint zlib =
      server.transport.listen(tcp("127.0.0.1:0"), {.session = silent({.codec = Compression::zlib, .threshold = 1000})});
  const Endpoint plain = server.transport.listen(tcp("127.0.0.1:0"), {.session = silent({})});
  server.start();
  struct Listening {
    Endpoint endpoint;
    Compression codec;
    std::uint32_t threshold;
  };
  struct Peer {
    RawPeer peer;
    Listening listening;
  };
  std::vector<Peer> peers;
  for (int i = 0; i < 3; ++i) {
    for (const auto& listening : {Listening{server.endpoint, Compression::zstd, 512},
                                  Listening{zlib, Compression::zlib, 1000}, Listening{plain, Compression::none, 0}}) {
      peers.push_back({RawPeer(listening.endpoint), listening});
    }
  }
  ASSERT_TRUE(wait_until([&] { return server.transport.session_count() == peers.size(); }));
  // Small, over one threshold only, and so large that the sessions share it also when it is compressed.
  std::uint64_t after = 0;
  for (const auto& payload : {text(600), text(50'000), half_text(30'000, 200'000), pattern(30'000)}) {
    EXPECT_EQ(server.transport.broadcast(payload, {.extension = "ext"}).queued, peers.size());
    for (auto& [peer, listening] : peers) {
      const auto packet = peer.next();
      EXPECT_EQ(packet.extension, "ext");
      const bool packs = payload.size() >= listening.threshold && payload != pattern(30'000);
      expect_packed(packet, packs ? listening.codec : Compression::none, payload);
      if (packet.header.compression != Compression::none) after += packet.payload.size();
    }
  }
  const auto stats = server.transport.stats();
  EXPECT_EQ(stats.compressed_packets, 3U * 3 + 3U * 2);
  EXPECT_EQ(stats.compressed_bytes_before, 3U * (600 + 2 * 50'000 + 2 * 200'000));
  EXPECT_EQ(stats.compressed_bytes_after, after);
  EXPECT_EQ(stats.incompressible_packets, 6U);
  // The override is for all.
  server.transport.broadcast(text(600), {.compression = CompressionOptions{.codec = Compression::zlib}});
  for (auto& entry : peers) expect_packed(entry.peer.next(), Compression::zlib, text(600));
  server.transport.broadcast(text(50'000), {.compression = no_compression});
  for (auto& entry : peers) expect_packed(entry.peer.next(), Compression::none, text(50'000));
}

TEST(CompressionOfManyThreads, CountsEachPacketOnce) {
  Pair pair(silent({.codec = Compression::zstd}));
  constexpr int threads = 4;
  constexpr int each = 500;
  std::vector<std::thread> senders;
  for (int t = 0; t < threads; ++t) {
    senders.emplace_back([&pair, t] {
      const CompressionOptions mine{.codec = t % 2 == 0 ? Compression::zstd : Compression::zlib};
      for (int i = 0; i < each; ++i) {
        while (pair.session->send(text(2000), {.compression = mine}) == SendResult::would_block) {
          std::this_thread::sleep_for(1ms);
        }
      }
    });
  }
  std::uint64_t after = 0;
  for (int i = 0; i < threads * each; ++i) {
    const auto packet = pair.peer->next();
    EXPECT_EQ(unpacked(packet), text(2000));
    after += packet.payload.size();
  }
  for (auto& sender : senders) sender.join();
  const auto stats = pair.session->stats();
  EXPECT_EQ(stats.compressed_packets, std::uint64_t{threads * each});
  EXPECT_EQ(stats.compressed_bytes_before, std::uint64_t{threads * each * 2000});
  EXPECT_EQ(stats.compressed_bytes_after, after);
  EXPECT_EQ(pair.server.transport.stats().compressed_bytes_after, after);
}

TEST(CompressionOptionsOutOfTheirRange, AreRefusedByEveryCallThatTakesThem) {
  const SessionOptions bad = silent({.codec = Compression::zlib, .level = 10});
  std::string said;
  EXPECT_EQ(thrown([&] { ServerTransport server({.session = bad}); }, &said), Errc::invalid_option);
  EXPECT_NE(said.find("compression.level is 10, must be from 0 to 9"), std::string::npos) << said;
  EXPECT_EQ(thrown([&] { ClientTransport client({.session = bad}); }), Errc::invalid_option);
  ServerTransport server;
  EXPECT_EQ(thrown([&] { server.listen(tcp("127.0.0.1:0"), {.session = bad}); }), Errc::invalid_option);
}

}  // namespace
}  // namespace msgtrans::test
