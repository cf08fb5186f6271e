// SPDX-License-Identifier: Apache-2.0
// The rule numbers (P1, L3, ...) are those of docs/wire_format.md.
#include "wire_test_util.hpp"

#include <algorithm>
#include <gtest/gtest.h>
#include <msgtrans/wire/decoder.hpp>
#include <random>
#include <vector>

namespace msgtrans::wire {
namespace {

using namespace test;
using Status = Decoder::Status;

/// Takes packets until there is none; the status that ended it.
Status drain(Decoder& decoder, std::vector<Packet>& packets) {
  PacketView view;
  Status status = decoder.next(view);
  for (; status == Status::packet; status = decoder.next(view)) {
    packets.push_back(copy_of(view));
    EXPECT_EQ(view.bytes.size(), view.header.packet_size());
  }
  return status;
}

/// What is held must be in proportion to the bytes that came.
void expect_no_hoarding(const Decoder& decoder) {
  if (decoder.buffered_bytes() == 0) {
    EXPECT_EQ(decoder.held_bytes(), 0U);
  } else {
    EXPECT_LE(decoder.held_bytes(), std::max<std::size_t>(256, 4 * decoder.buffered_bytes()));
  }
}

std::span<const std::byte> piece(const Bytes& bytes, std::size_t from, std::size_t to) {
  return std::span(bytes).subspan(from, to - from);
}

// P1
TEST(WireDecoder, AllPacketsOfOneReadAreYieldedInOrder) {
  const Stream stream = random_stream(200, 40, 300, 1);
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  decoder.feed(stream.bytes);
  std::vector<Packet> packets;
  EXPECT_EQ(drain(decoder, packets), Status::need_more);
  EXPECT_EQ(packets, stream.packets);
  EXPECT_FALSE(decoder.has_partial());
}

TEST(WireDecoder, PacketsThatLieWholeInTheReadAreNotCopied) {
  const Stream stream = random_stream(50, 40, 300, 2);
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  decoder.feed(stream.bytes);
  PacketView view;
  const std::byte* expected = stream.bytes.data();
  while (decoder.next(view) == Status::packet) {
    ASSERT_EQ(view.bytes.data(), expected);
    ASSERT_EQ(view.extension.data(), expected + header_size);
    ASSERT_EQ(view.payload.data(), view.extension.data() + view.extension.size());
    expected += view.bytes.size();
    ASSERT_EQ(decoder.held_bytes(), 0U);
  }
  EXPECT_EQ(expected, stream.bytes.data() + stream.bytes.size());
  EXPECT_EQ(pool.kept_bytes(), 0U) << "no buffer was ever needed";
}

TEST(WireDecoder, OfAReadThatEndsWithinAPacketOnlyThatPacketIsCopied) {
  const Stream stream = random_stream(3, 10, 100, 3);
  Bytes last;
  append_packet(last, Header{}, {}, random_bytes(500, 4));
  Bytes first_read = stream.bytes;
  first_read.insert(first_read.end(), last.begin(), last.begin() + 100);
  Bytes second_read(last.begin() + 100, last.end());
  const std::size_t own_end = second_read.size();
  second_read.insert(second_read.end(), stream.bytes.begin(), stream.bytes.end());

  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  decoder.feed(first_read);
  std::vector<Packet> packets;
  EXPECT_EQ(drain(decoder, packets), Status::need_more);
  EXPECT_EQ(packets, stream.packets);
  EXPECT_EQ(decoder.buffered_bytes(), 100U);
  EXPECT_TRUE(decoder.has_partial());

  decoder.feed(second_read);
  PacketView view;
  ASSERT_EQ(decoder.next(view), Status::packet);
  EXPECT_EQ(to_hex(view.bytes), to_hex(last));
  ASSERT_EQ(decoder.next(view), Status::packet);
  EXPECT_EQ(view.bytes.data(), second_read.data() + own_end) << "behind the cut packet it is zero-copy again";
  EXPECT_EQ(decoder.held_bytes(), 0U);
}

TEST(WireDecoder, AStreamCutAtAnyPositionGivesTheSamePackets) {
  const Stream stream = random_stream(12, 20, 60, 5);
  for (std::size_t cut = 0; cut <= stream.bytes.size(); ++cut) {
    BufferPool pool;
    Decoder decoder(Limits{}, pool);
    std::vector<Packet> packets;
    for (const auto part : {piece(stream.bytes, 0, cut), piece(stream.bytes, cut, stream.bytes.size())}) {
      // The lent bytes are copies that die with the round: the decoder may not look back at them.
      const Bytes lent(part.begin(), part.end());
      decoder.feed(lent);
      ASSERT_EQ(drain(decoder, packets), Status::need_more);
      expect_no_hoarding(decoder);
    }
    ASSERT_EQ(packets, stream.packets) << "cut at " << cut;
    ASSERT_FALSE(decoder.has_partial());
  }
}

TEST(WireDecoder, SingleBytesGiveTheSamePackets) {
  const Stream stream = random_stream(60, 100, 2000, 6);
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  std::vector<Packet> packets;
  for (const std::byte b : stream.bytes) {
    const Bytes lent{b};
    decoder.feed(lent);
    ASSERT_EQ(drain(decoder, packets), Status::need_more);
    expect_no_hoarding(decoder);
  }
  EXPECT_EQ(packets, stream.packets);
  EXPECT_FALSE(decoder.has_partial());
}

TEST(WireDecoder, RandomPiecesWithRandomParksGiveTheSamePackets) {
  for (std::uint32_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const Stream stream = random_stream(1 + random() % 60, 50, seed % 3 == 0 ? 20000 : 400, seed);
    const std::size_t largest_piece = std::size_t{1} << (random() % 16);
    BufferPool pool(random() % 3 == 0 ? 0 : 1 << 20);
    {
      Decoder decoder(Limits{}, pool);
      std::vector<Packet> packets;
      PacketView view;
      for (std::size_t at = 0; at < stream.bytes.size();) {
        const std::size_t end = std::min(stream.bytes.size(), at + 1 + random() % largest_piece);
        const Bytes lent(stream.bytes.begin() + static_cast<std::ptrdiff_t>(at),
                         stream.bytes.begin() + static_cast<std::ptrdiff_t>(end));
        at = end;
        decoder.feed(lent);
        // Sometimes the consumer stops within the read, and goes on behind later ones.
        const std::size_t most = random() % 3 == 0 ? random() % 4 : SIZE_MAX;
        std::size_t taken = 0;
        Status status = Status::packet;
        while (taken < most && (status = decoder.next(view)) == Status::packet) {
          packets.push_back(copy_of(view));
          ++taken;
        }
        ASSERT_NE(status, Status::error);
        if (status == Status::packet) decoder.park();
        if (status == Status::need_more) expect_no_hoarding(decoder);
      }
      ASSERT_EQ(drain(decoder, packets), Status::need_more);
      ASSERT_EQ(packets, stream.packets);
      ASSERT_FALSE(decoder.has_partial());
      ASSERT_EQ(decoder.held_bytes(), 0U);
    }
    ASSERT_LE(pool.kept_bytes(), std::size_t{1} << 20);
  }
}

TEST(WireDecoder, ParkingBehindAnyPacketKeepsTheRestAndFeedingAppends) {
  const Stream stream = random_stream(20, 20, 100, 7);
  const Stream later = random_stream(5, 20, 100, 8);
  for (std::size_t stop = 0; stop <= stream.packets.size(); ++stop) {
    SCOPED_TRACE(stop);
    BufferPool pool;
    Decoder decoder(Limits{}, pool);
    std::vector<Packet> packets;
    {
      Bytes lent = stream.bytes;
      decoder.feed(lent);
      PacketView view;
      for (std::size_t i = 0; i < stop; ++i) {
        ASSERT_EQ(decoder.next(view), Status::packet);
        packets.push_back(copy_of(view));
      }
      decoder.park();
      std::fill(lent.begin(), lent.end(), std::byte{0xee});
    }
    std::size_t undecoded = stream.bytes.size();
    for (const Packet& packet : packets) undecoded -= packet.header.packet_size();
    EXPECT_EQ(decoder.buffered_bytes(), undecoded);
    EXPECT_EQ(decoder.has_partial(), undecoded != 0);
    EXPECT_EQ(decoder.held_bytes() == 0, undecoded == 0);

    decoder.feed(later.bytes);
    ASSERT_EQ(drain(decoder, packets), Status::need_more);
    std::vector<Packet> expected = stream.packets;
    expected.insert(expected.end(), later.packets.begin(), later.packets.end());
    EXPECT_EQ(packets, expected);
    EXPECT_EQ(decoder.held_bytes(), 0U);
  }
}

TEST(WireDecoder, ParkingAgainWhileBytesAreParkedKeepsTheOrder) {
  const Stream stream = random_stream(30, 20, 100, 9);
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  std::vector<Packet> packets;
  PacketView view;
  // Each read brings 97 bytes and one packet is taken of each: what is parked grows and is cut anywhere.
  for (std::size_t at = 0; at < stream.bytes.size(); at += 97) {
    const std::size_t end = std::min(stream.bytes.size(), at + 97);
    const Bytes lent(stream.bytes.begin() + static_cast<std::ptrdiff_t>(at),
                     stream.bytes.begin() + static_cast<std::ptrdiff_t>(end));
    decoder.feed(lent);
    if (at % 2 == 0) {
      if (decoder.next(view) == Status::packet) packets.push_back(copy_of(view));
    }
    decoder.park();
    decoder.park();
  }
  ASSERT_EQ(drain(decoder, packets), Status::need_more);
  EXPECT_EQ(packets, stream.packets);
}

TEST(WireDecoder, FeedingBeforeALoanIsUsedUpParksTheRest) {
  const Stream stream = random_stream(10, 20, 100, 10);
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  std::vector<Packet> packets;
  PacketView view;
  const std::size_t half = stream.bytes.size() / 2;
  decoder.feed(piece(stream.bytes, 0, half));
  ASSERT_EQ(decoder.next(view), Status::packet);
  packets.push_back(copy_of(view));
  EXPECT_TRUE(decoder.has_partial());
  decoder.feed(piece(stream.bytes, half, stream.bytes.size()));
  ASSERT_EQ(drain(decoder, packets), Status::need_more);
  EXPECT_EQ(packets, stream.packets);
}

TEST(WireDecoder, AParkWithNothingLeftHoldsNothing) {
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  decoder.park();
  EXPECT_EQ(decoder.held_bytes(), 0U);
  const Stream stream = random_stream(1, 5, 5, 11);
  decoder.feed(piece(stream.bytes, 0, 3));
  PacketView view;
  ASSERT_EQ(decoder.next(view), Status::need_more);
  decoder.feed(piece(stream.bytes, 3, stream.bytes.size()));
  ASSERT_EQ(decoder.next(view), Status::packet);
  EXPECT_NE(decoder.held_bytes(), 0U) << "the view lies there";
  decoder.park();
  EXPECT_EQ(decoder.held_bytes(), 0U);
  EXPECT_EQ(decoder.next(view), Status::need_more);
}

// L3
TEST(WireDecoder, AnAnnounced16MiBFollowedBySilenceTakesLessThan1KiB) {
  Header header;
  header.payload_len = 16U << 20;
  header.ext_len = 65535;
  Bytes bytes(header_size);
  encode_header(header, std::span<std::byte, header_size>(bytes));
  BufferPool pool;
  {
    Decoder decoder(Limits{}, pool);
    decoder.feed(bytes);
    PacketView view;
    EXPECT_EQ(decoder.next(view), Status::need_more);
    EXPECT_EQ(decoder.buffered_bytes(), 16U);
    EXPECT_LT(decoder.held_bytes(), 1024U);
    EXPECT_TRUE(decoder.has_partial());
  }
  EXPECT_LT(pool.kept_bytes(), 1024U) << "all it ever took";
}

// L3
TEST(WireDecoder, AnAnnouncedPayloadAndSomeOfItsBytesTakeMemoryForThoseBytesNotEvenForAMoment) {
  Bytes bytes(header_size);
  Header header;
  header.payload_len = 2U << 20;
  encode_header(header, std::span<std::byte, header_size>(bytes));
  bytes.resize(header_size + 1000);
  for (const std::size_t first : {std::size_t{1}, header_size, header_size + 1, header_size + 500, bytes.size()}) {
    SCOPED_TRACE(first);
    BufferPool pool;
    {
      Decoder decoder(Limits{}, pool);
      PacketView view;
      decoder.feed(piece(bytes, 0, first));
      EXPECT_EQ(decoder.next(view), Status::need_more);
      decoder.feed(piece(bytes, first, bytes.size()));
      EXPECT_EQ(decoder.next(view), Status::need_more);
      EXPECT_EQ(decoder.buffered_bytes(), 1016U);
      EXPECT_LT(decoder.held_bytes(), 4096U);
    }
    EXPECT_LT(pool.kept_bytes(), 8192U) << "the pool has all that was ever taken";
  }
}

TEST(WireDecoder, ClearForgetsLentAndKeptBytesAndGivesTheMemoryBack) {
  const Stream stream = random_stream(6, 20, 100, 15);
  for (const bool parked : {false, true}) {
    BufferPool pool;
    Decoder decoder(Limits{}, pool);
    PacketView view;
    decoder.feed(piece(stream.bytes, 0, stream.bytes.size() - 1));
    ASSERT_EQ(decoder.next(view), Status::packet);
    if (parked) decoder.park();
    decoder.clear();
    EXPECT_FALSE(decoder.has_partial());
    EXPECT_EQ(decoder.held_bytes(), 0U);
    EXPECT_EQ(decoder.next(view), Status::need_more);
    decoder.feed(stream.bytes);
    std::vector<Packet> packets;
    EXPECT_EQ(drain(decoder, packets), Status::need_more);
    EXPECT_EQ(packets, stream.packets);
  }
}

// L1, L3
TEST(WireDecoder, APayloadOf16MiBArrivesAndMemoryGrowsWithWhatCame) {
  Bytes bytes;
  Header header;
  header.payload_len = 16U << 20;
  append_packet(bytes, header, {}, Bytes(16U << 20, std::byte{0x5a}));
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  PacketView view;
  Status status = Status::need_more;
  for (std::size_t at = 0; at < bytes.size(); at += 65536) {
    ASSERT_EQ(status, Status::need_more);
    decoder.feed(piece(bytes, at, std::min(bytes.size(), at + 65536)));
    status = decoder.next(view);
    ASSERT_LE(decoder.held_bytes(), 4 * std::min(bytes.size(), at + 65536));
  }
  ASSERT_EQ(status, Status::packet);
  EXPECT_TRUE(std::equal(view.bytes.begin(), view.bytes.end(), bytes.begin(), bytes.end()));
  EXPECT_EQ(decoder.next(view), Status::need_more);
  EXPECT_EQ(decoder.held_bytes(), 0U);
}

TEST(WireDecoder, ASmallRestDoesNotHoldTheBufferThatManyPacketsWereParkedIn) {
  Stream stream;
  for (int i = 0; i < 4000; ++i) stream.add(Header{}, {}, bytes_of("0123456789abcdef"));
  Bytes bytes = stream.bytes;
  bytes.resize(bytes.size() - 5);
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  decoder.feed(bytes);
  decoder.park();
  EXPECT_GE(decoder.held_bytes(), bytes.size());
  std::vector<Packet> packets;
  EXPECT_EQ(drain(decoder, packets), Status::need_more);
  EXPECT_EQ(decoder.buffered_bytes(), 27U);
  EXPECT_EQ(decoder.held_bytes(), 256U);
  decoder.feed(piece(stream.bytes, bytes.size(), stream.bytes.size()));
  EXPECT_EQ(drain(decoder, packets), Status::need_more);
  EXPECT_EQ(packets, stream.packets);
}

TEST(WireDecoder, ParkedPacketsAreYieldedWhereTheyLieWithoutBeingMoved) {
  Stream stream;
  for (int i = 0; i < 5000; ++i) stream.add(Header{}, {}, bytes_of("x"));
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  decoder.feed(stream.bytes);
  decoder.park();
  PacketView view;
  ASSERT_EQ(decoder.next(view), Status::packet);
  const std::byte* expected = view.bytes.data();
  for (int i = 1; i < 5000; ++i) {
    expected += view.bytes.size();
    decoder.park();
    ASSERT_EQ(decoder.next(view), Status::packet);
    ASSERT_EQ(view.bytes.data(), expected) << "packet " << i;
  }
}

// Every byte that is copied once more than needed shows in where the views lie: a queue that always holds 64 KiB, to
// which one small packet is added and from which one is taken, may move its bytes only every few thousand packets.
TEST(WireDecoder, AFullParkedBufferThatGoesOnFillingIsMovedRarely) {
  Bytes packet;
  append_packet(packet, Header{}, {}, bytes_of("0123456789abcdef"));
  Bytes many;
  for (int i = 0; i < 2047; ++i) many.insert(many.end(), packet.begin(), packet.end());
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  decoder.feed(many);
  decoder.park();
  PacketView view;
  int moves = 0;
  const std::byte* expected = nullptr;
  for (int i = 0; i < 100000; ++i) {
    decoder.feed(packet);
    decoder.park();
    ASSERT_EQ(decoder.next(view), Status::packet);
    if (view.bytes.data() != expected) ++moves;
    expected = view.bytes.data() + view.bytes.size();
  }
  EXPECT_LE(moves, 100);
  EXPECT_LE(decoder.held_bytes(), 4U * 65536U);
}

TEST(WireDecoder, AnIdleDecoderHoldsNoMemoryAndGivesItsBufferToThePool) {
  const Stream stream = random_stream(1, 10, 10, 12);
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  PacketView view;
  decoder.feed(piece(stream.bytes, 0, 1));
  ASSERT_EQ(decoder.next(view), Status::need_more);
  EXPECT_EQ(decoder.held_bytes(), 256U);
  EXPECT_EQ(pool.kept_bytes(), 0U);
  decoder.feed(piece(stream.bytes, 1, stream.bytes.size()));
  ASSERT_EQ(decoder.next(view), Status::packet);
  ASSERT_EQ(decoder.next(view), Status::need_more);
  EXPECT_EQ(decoder.held_bytes(), 0U);
  EXPECT_EQ(pool.kept_bytes(), 256U);
  EXPECT_LE(sizeof(Decoder), 96U) << "there is one a session";
}

TEST(WireDecoder, ADestroyedDecoderGivesItsBufferBack) {
  BufferPool pool;
  {
    Decoder decoder(Limits{}, pool);
    const Bytes bytes(5, std::byte{1});
    decoder.feed(bytes);
    decoder.park();
  }
  EXPECT_EQ(pool.kept_bytes(), 256U);
}

TEST(WireDecoder, AnEmptyReadChangesNothing) {
  const Stream stream = random_stream(1, 10, 10, 13);
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  PacketView view;
  decoder.feed({});
  EXPECT_EQ(decoder.next(view), Status::need_more);
  decoder.feed(piece(stream.bytes, 0, 7));
  EXPECT_EQ(decoder.next(view), Status::need_more);
  decoder.feed({});
  EXPECT_EQ(decoder.next(view), Status::need_more);
  EXPECT_EQ(decoder.buffered_bytes(), 7U);
  decoder.feed(piece(stream.bytes, 7, stream.bytes.size()));
  std::vector<Packet> packets;
  EXPECT_EQ(drain(decoder, packets), Status::need_more);
  EXPECT_EQ(packets, stream.packets);
}

struct BadHeader {
  const char* what;
  std::size_t offset;
  unsigned char value;
  Errc code;
  const char* text;
};

const BadHeader bad_headers[] = {
    {"version", 0, 2, Errc::bad_version, "version is 2, must be 1"},
    {"compression", 1, 3, Errc::bad_compression, "compression is 3, must be 0 (none), 1 (zstd) or 2 (zlib)"},
    {"type", 2, 9, Errc::bad_type, "type is 9, must be 0 (one-way), 1 (request) or 2 (response)"},
    {"ext_len", 8, 0xff, Errc::extension_too_large, "ext_len is 65280, over the limit of 1000 bytes"},
    {"payload_len", 10, 0x7f, Errc::payload_too_large, "payload_len is 2130706432, over the limit of 1000 bytes"},
    {"flags", 15, 0x03, Errc::fragmented, "flags is 3, bit 0 (fragmented) is reserved and must be 0"},
};

// E1, E2, L3
TEST(WireDecoder, ABadHeaderBehindGoodPacketsIsAnErrorThatStaysAndKeepsNoMemory) {
  const Limits limits{1000, 1000, 1000};
  for (const BadHeader& bad : bad_headers) {
    SCOPED_TRACE(bad.what);
    Stream stream = random_stream(5, 20, 100, 14);
    const std::size_t good = stream.bytes.size();
    Bytes bytes = stream.bytes;
    bytes.resize(good + header_size);
    encode_header(Header{}, std::span<std::byte, header_size>(bytes.data() + good, header_size));
    bytes[good + bad.offset] = static_cast<std::byte>(bad.value);
    // A good packet behind it must not be found again.
    bytes.insert(bytes.end(), stream.bytes.begin(), stream.bytes.end());

    // Whole, cut anywhere in the bad header, and parked: the same packets, the same error.
    for (std::size_t cut = good; cut <= good + header_size + 1; ++cut) {
      for (const bool parked : {false, true}) {
        BufferPool pool;
        Decoder decoder(limits, pool);
        std::vector<Packet> packets;
        decoder.feed(piece(bytes, 0, cut));
        if (parked) decoder.park();
        Status status = drain(decoder, packets);
        EXPECT_EQ(status == Status::error, cut >= good + header_size);
        decoder.feed(piece(bytes, cut, bytes.size()));
        if (parked) decoder.park();
        status = drain(decoder, packets);
        ASSERT_EQ(status, Status::error) << "cut at " << cut;
        EXPECT_EQ(packets, stream.packets);
        EXPECT_EQ(decoder.error().code, make_error_code(bad.code));
        EXPECT_EQ(decoder.error().text, bad.text);

        EXPECT_EQ(decoder.held_bytes(), 0U);
        EXPECT_EQ(decoder.buffered_bytes(), 0U);
        decoder.feed(stream.bytes);
        decoder.park();
        EXPECT_EQ(drain(decoder, packets), Status::error);
        EXPECT_EQ(packets, stream.packets);
        EXPECT_EQ(decoder.error().text, bad.text);
        EXPECT_FALSE(decoder.has_partial());
        EXPECT_EQ(decoder.held_bytes(), 0U);
      }
    }
  }
}

TEST(WireDecoder, HasNoErrorBeforeOne) {
  BufferPool pool;
  const Decoder decoder(Limits{}, pool);
  EXPECT_FALSE(decoder.error());
}

// L2
TEST(WireDecoder, LengthsEqualToTheLimitsPassAndOneMoreDoesNot) {
  const Limits limits{64, 32, 64};
  BufferPool pool;
  PacketView view;
  {
    Bytes bytes;
    append_packet(bytes, Header{}, Bytes(32), Bytes(64));
    Decoder decoder(limits, pool);
    decoder.feed(bytes);
    EXPECT_EQ(decoder.next(view), Status::packet);
  }
  for (const auto& [extension, payload, code] :
       {std::tuple{33, 64, Errc::extension_too_large}, std::tuple{32, 65, Errc::payload_too_large}}) {
    Bytes bytes;
    append_packet(bytes, Header{}, Bytes(static_cast<std::size_t>(extension)),
                  Bytes(static_cast<std::size_t>(payload)));
    Decoder decoder(limits, pool);
    decoder.feed(bytes);
    EXPECT_EQ(decoder.next(view), Status::error);
    EXPECT_EQ(decoder.error().code, make_error_code(code));
  }
}

// C1, C2: the decoder hands the payload on as it came.
TEST(WireDecoder, ACompressedPayloadIsYieldedAsItIsOnTheWireAndTheExtensionBesideIt) {
  Header header;
  header.compression = Compression::zstd;
  Bytes bytes;
  append_packet(bytes, header, bytes_of("plain"), bytes_of("no zstd frame"));
  BufferPool pool;
  Decoder decoder(Limits{}, pool);
  decoder.feed(bytes);
  PacketView view;
  ASSERT_EQ(decoder.next(view), Status::packet);
  EXPECT_EQ(text_of(view.extension), "plain");
  EXPECT_EQ(text_of(view.payload), "no zstd frame");
}

}  // namespace
}  // namespace msgtrans::wire
