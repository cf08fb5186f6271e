// SPDX-License-Identifier: Apache-2.0
// The rule numbers (C1, L5, ...) are those of docs/wire_format.md.
#include "allocation_failure.hpp"
#include "wire_test_util.hpp"

#include <gtest/gtest.h>
#include <msgtrans/wire/compression.hpp>
#include <thread>
#include <vector>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

namespace msgtrans::wire {
namespace {

using namespace test;

constexpr std::size_t mebi = std::size_t{1} << 20;

std::string zstd_text(ZSTD_ErrorCode code) {
  return ZSTD_getErrorString(code);
}

/// Runs it with no memory from `new`; the codecs have their own ways.
template <class F>
void without_memory(F f) {
  const msgtrans::test::AllocationFailure failure(0);
  f();
}

class WireCompression : public testing::TestWithParam<Compression> {
 protected:
  static const char* name() { return GetParam() == Compression::zstd ? "zstd" : "zlib"; }

  static Bytes compressed(std::span<const std::byte> in) {
    Bytes out;
    const std::optional<Error> error = compress(GetParam(), in, out);
    EXPECT_FALSE(error) << error->message();
    return out;
  }

  /// Decompresses what must fail, into an output that held something.
  static Error failure(std::span<const std::byte> in, std::size_t limit = 16 * mebi) {
    Bytes out = bytes_of("what was here before");
    std::optional<Error> error = decompress(GetParam(), in, limit, out);
    EXPECT_TRUE(out.empty());
    EXPECT_EQ(out.capacity(), 0U) << "no memory is left behind";
    return error ? *error : Error{};
  }

  static void expect_failed(std::span<const std::byte> in, const std::string& reason) {
    const Error error = failure(in);
    EXPECT_EQ(error.code, make_error_code(Errc::decompression_failed));
    EXPECT_TRUE(is_protocol_error(error.code));
    EXPECT_EQ(error.text, std::string("payload (") + name() + ") does not decompress: " + reason);
  }

  static void expect_too_large(std::span<const std::byte> in, std::size_t limit) {
    const Error error = failure(in, limit);
    EXPECT_EQ(error.code, make_error_code(Errc::decompressed_too_large));
    EXPECT_TRUE(is_protocol_error(error.code));
    EXPECT_EQ(error.text, std::string("payload (") + name() + ") decompresses to more than the limit of " +
                              std::to_string(limit) + " bytes");
  }

  static void expect_round_trip(const Bytes& in, std::size_t limit) {
    const Bytes packed = compressed(in);
    Bytes out = bytes_of("what was here before");
    const std::optional<Error> error = decompress(GetParam(), packed, limit, out);
    ASSERT_FALSE(error) << error->message();
    EXPECT_EQ(out, in);
  }
};

INSTANTIATE_TEST_SUITE_P(Codecs, WireCompression, testing::Values(Compression::zstd, Compression::zlib),
                         [](const auto& param) { return param.param == Compression::zstd ? "zstd" : "zlib"; });

// C1, C3
TEST_P(WireCompression, WhatWasCompressedComesBack) {
  for (const std::size_t size : {0U, 1U, 2U, 63U, 64U, 65U, 1000U, 65536U, 1000000U}) {
    SCOPED_TRACE(size);
    expect_round_trip(random_bytes(size, 1), 16 * mebi);
    expect_round_trip(Bytes(size, std::byte{'a'}), 16 * mebi);
  }
}

TEST_P(WireCompression, EveryLevelComesBackAndOneOutOfRangeIsNamed) {
  const bool zstd = GetParam() == Compression::zstd;
  Bytes in = random_bytes(300, 2);
  in.resize(3000);
  for (int level = zstd ? -7 : 0; level <= (zstd ? ZSTD_maxCLevel() : 9); ++level) {
    SCOPED_TRACE(level);
    Bytes packed;
    ASSERT_FALSE(compress(GetParam(), in, packed, level));
    Bytes out;
    ASSERT_FALSE(decompress(GetParam(), packed, 16 * mebi, out));
    ASSERT_EQ(out, in);
  }
  for (const int level : {zstd ? ZSTD_minCLevel() - 1 : -2, zstd ? ZSTD_maxCLevel() + 1 : 10}) {
    Bytes packed = bytes_of("as it was");
    const std::optional<Error> error = compress(GetParam(), in, packed, level);
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code, make_error_code(Errc::invalid_option));
    EXPECT_EQ(error->text.rfind(std::string("compression level (") + name() + ") is " + std::to_string(level), 0), 0U)
        << error->text;
    EXPECT_EQ(text_of(packed), "as it was");
  }
}

TEST_P(WireCompression, AHigherLevelIsHonoured) {
  Bytes in;
  for (int i = 0; i < 3000; ++i) {
    const Bytes word = bytes_of(std::to_string(i * i % 997));
    in.insert(in.end(), word.begin(), word.end());
  }
  Bytes fast;
  Bytes small;
  ASSERT_FALSE(compress(GetParam(), in, fast, 1));
  ASSERT_FALSE(compress(GetParam(), in, small, GetParam() == Compression::zstd ? 19 : 9));
  EXPECT_LT(small.size(), fast.size());
}

// L2, L5
TEST_P(WireCompression, TheLimitItselfIsAllowedAndOneByteMoreIsNot) {
  for (const std::size_t size : {1U, 64U, 65U, 1000U, 4096U, 100000U}) {
    SCOPED_TRACE(size);
    for (const Bytes& in : {random_bytes(size, 3), Bytes(size, std::byte{0})}) {
      expect_round_trip(in, size);
      expect_too_large(compressed(in), size - 1);
    }
  }
}

TEST_P(WireCompression, ALimitOf0AllowsTheEmptyPayloadAlone) {
  expect_round_trip({}, 0);
  expect_too_large(compressed(bytes_of("x")), 0);
}

// L5
TEST_P(WireCompression, ABombStopsAtTheLimit) {
  // Zeros: a thousandth of their size for zlib, a thirty thousandth for zstd.
  const Bytes bomb = compressed(Bytes(64 * mebi));
  ASSERT_LT(bomb.size(), mebi / 8);
  expect_too_large(bomb, 16 * mebi);
  expect_too_large(bomb, 1000);
}

// C4
TEST_P(WireCompression, EveryPrefixOfAPayloadIsIncomplete) {
  const Bytes packed = compressed(random_bytes(500, 4));
  for (std::size_t size = 1; size < packed.size(); ++size) {
    SCOPED_TRACE(size);
    const Error error = failure(std::span(packed).first(size));
    ASSERT_EQ(error.code, make_error_code(Errc::decompression_failed)) << error.text;
  }
  expect_failed(std::span(packed).first(packed.size() - 1),
                GetParam() == Compression::zstd ? "incomplete frame" : "incomplete stream");
}

// C5
TEST_P(WireCompression, AnEmptyPayloadIsAnError) {
  expect_failed({}, "empty payload");
}

// C4
TEST_P(WireCompression, GarbageIsAnErrorWithTheCodecsOwnText) {
  expect_failed(bytes_of("this was never compressed"),
                GetParam() == Compression::zstd ? zstd_text(ZSTD_error_prefix_unknown) : "incorrect header check");
}

// C4
TEST_P(WireCompression, ADamagedByteIsAnErrorWhereverTheCodecCanSeeIt) {
  const Bytes in = random_bytes(500, 9);
  const Bytes packed = compressed(in);
  std::size_t refused = 0;
  for (std::size_t i = 0; i < packed.size(); ++i) {
    Bytes damaged = packed;
    damaged[i] ^= std::byte{0x55};
    Bytes out;
    const std::optional<Error> error = decompress(GetParam(), damaged, 16 * mebi, out);
    if (!error) continue;
    ++refused;
    EXPECT_EQ(out.capacity(), 0U);
    EXPECT_FALSE(error->text.empty());
  }
  // A zlib stream ends in a checksum; a zstd frame without one has its magic number and its block headers.
  EXPECT_GE(refused, GetParam() == Compression::zlib ? packed.size() : 4U);
}

// C4
TEST_P(WireCompression, BytesBehindTheEndAreAnError) {
  const Bytes in = random_bytes(100, 5);
  Bytes packed = compressed(in);
  packed.push_back(std::byte{0});
  if (GetParam() == Compression::zlib) {
    expect_failed(packed, "1 bytes after the end of the stream");
  } else {
    EXPECT_EQ(failure(packed).code, make_error_code(Errc::decompression_failed));
  }
  const Bytes garbage = bytes_of("garbage!");
  packed.insert(packed.end(), garbage.begin(), garbage.end());
  EXPECT_EQ(failure(packed).code, make_error_code(Errc::decompression_failed));
}

TEST_P(WireCompression, AFailureDoesNotSpoilTheNextCall) {
  const Bytes in = random_bytes(2000, 6);
  const Bytes packed = compressed(in);
  for (int i = 0; i < 3; ++i) {
    (void)failure(std::span(packed).first(packed.size() / 2));
    expect_round_trip(in, in.size());
    expect_too_large(packed, 10);
    expect_round_trip(in, in.size());
  }
}

TEST_P(WireCompression, ALargeOutputIsReusedForASmallPayload) {
  Bytes out;
  out.reserve(mebi);
  const std::byte* const memory = out.data();
  const Bytes in = bytes_of("small");
  ASSERT_FALSE(decompress(GetParam(), compressed(in), 16 * mebi, out));
  EXPECT_EQ(out, in);
  EXPECT_EQ(out.data(), memory);
}

TEST_P(WireCompression, ThreadsDoNotShareContexts) {
  const Compression codec = GetParam();
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, -1);
  for (std::size_t t = 0; t < wrong.size(); ++t) {
    threads.emplace_back([t, codec, &wrong] {
      int bad = 0;
      for (std::uint32_t i = 0; i < 50; ++i) {
        const Bytes in = random_bytes(1000 + 37 * i, static_cast<std::uint32_t>(t) * 1000 + i);
        Bytes packed;
        Bytes out;
        if (compress(codec, in, packed) || decompress(codec, packed, in.size(), out) || out != in) ++bad;
      }
      wrong[t] = bad;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(4, 0));
}

// --- for sending

using Outcome = SmallerPayload::Outcome;

TEST_P(WireCompression, ASmallerPayloadIsSmallerAndComesBack) {
  for (const std::size_t size : {100U, 1000U, 64U * 1024, 64U * 1024 + 2, 3000000U}) {
    SCOPED_TRACE(size);
    const Bytes in(size, std::byte{'a'});
    SmallerPayload packed;
    ASSERT_EQ(packed.compress(GetParam(), in), Outcome::smaller);
    EXPECT_LT(packed.bytes().size(), size);
    Bytes out;
    ASSERT_FALSE(decompress(GetParam(), packed.bytes(), size, out));
    EXPECT_EQ(out, in);
  }
}

TEST_P(WireCompression, APayloadThatWouldNotGetSmallerIsLeftAlone) {
  for (const std::size_t size : {0U, 1U, 2U, 3U, 10U, 1000U, 100000U}) {
    SCOPED_TRACE(size);
    SmallerPayload packed;
    EXPECT_EQ(packed.compress(GetParam(), random_bytes(size, 9)), Outcome::not_smaller);
    EXPECT_TRUE(packed.bytes().empty());
  }
}

TEST_P(WireCompression, OneThatDidNotGetSmallerDoesNotSpoilTheNext) {
  for (int round = 0; round < 3; ++round) {
    SmallerPayload bad;
    ASSERT_EQ(bad.compress(GetParam(), random_bytes(5000, 10)), Outcome::not_smaller);
    const Bytes in(5000, std::byte{'b'});
    SmallerPayload good;
    ASSERT_EQ(good.compress(GetParam(), in), Outcome::smaller);
    Bytes out;
    ASSERT_FALSE(decompress(GetParam(), good.bytes(), in.size(), out));
    EXPECT_EQ(out, in);
  }
}

TEST_P(WireCompression, TheEdgeWhereItGetsSmallerIsFoundWithinAFewBytes) {
  // From "does not" to "does" exactly once as the payload gets longer, and never to more than there was.
  int changes = 0;
  bool was_smaller = false;
  for (std::size_t size = 1; size < 200; ++size) {
    const Bytes in(size, std::byte{'c'});
    SmallerPayload packed;
    const bool smaller = packed.compress(GetParam(), in) == Outcome::smaller;
    if (smaller) {
      EXPECT_LT(packed.bytes().size(), size);
    }
    const Bytes whole = compressed(in);
    if (whole.size() >= size) {
      EXPECT_FALSE(smaller) << size;
    }
    if (whole.size() + 12 < size) {
      EXPECT_TRUE(smaller) << size;
    }
    if (smaller != was_smaller) ++changes;
    was_smaller = smaller;
  }
  EXPECT_TRUE(was_smaller);
  EXPECT_EQ(changes, 1);
}

TEST_P(WireCompression, ALevelForSendingIsHonouredAndHeldToItsRange) {
  Bytes in;
  for (int i = 0; i < 3000; ++i) {
    const Bytes word = bytes_of(std::to_string(i * i % 997));
    in.insert(in.end(), word.begin(), word.end());
  }
  const auto size_at = [&in](int level) {
    SmallerPayload packed;
    EXPECT_EQ(packed.compress(GetParam(), in, level), Outcome::smaller) << level;
    return packed.bytes().size();
  };
  const bool zstd = GetParam() == Compression::zstd;
  const int most = zstd ? ZSTD_maxCLevel() : 9;
  EXPECT_LT(size_at(most), size_at(1));
  EXPECT_EQ(size_at(1000000), size_at(most));
  EXPECT_EQ(size_at(default_compression_level), size_at(zstd ? ZSTD_CLEVEL_DEFAULT : 6));
  if (!zstd) {
    EXPECT_EQ(size_at(-1000000), size_at(6));
  }
}

TEST_P(WireCompression, SeveralAtOnceOnOneThreadDoNotShareTheirMemory) {
  const Bytes a(1000, std::byte{'a'});
  const Bytes b(1000, std::byte{'b'});
  SmallerPayload first;
  SmallerPayload second;
  ASSERT_EQ(first.compress(GetParam(), a), Outcome::smaller);
  ASSERT_EQ(second.compress(GetParam(), b), Outcome::smaller);
  Bytes out;
  ASSERT_FALSE(decompress(GetParam(), first.bytes(), 1000, out));
  EXPECT_EQ(out, a);
  ASSERT_FALSE(decompress(GetParam(), second.bytes(), 1000, out));
  EXPECT_EQ(out, b);
}

TEST_P(WireCompression, ForSendingMemoryIsKeptUpTo64KiBAndNoLargerOne) {
  const Bytes small(64 * 1024, std::byte{'s'});
  const Bytes large(mebi, std::byte{'l'});
  const auto pack = [](const Bytes& in) {
    SmallerPayload packed;
    EXPECT_EQ(packed.compress(GetParam(), in), Outcome::smaller);
  };
  pack(small);
  without_memory([&] { pack(small); });
  pack(large);
  without_memory([&] {
    SmallerPayload packed;
    EXPECT_EQ(packed.compress(GetParam(), large), Outcome::failed) << "there was memory left of the last";
  });
  without_memory([&] { pack(small); });
}

TEST_P(WireCompression, WithoutMemoryNothingIsThrown) {
  // The contexts are the codecs' own business; this thread has none yet.
  std::thread([codec = GetParam()] {
    const Bytes in(1000, std::byte{'a'});
    SmallerPayload packed;
    without_memory([&] { EXPECT_EQ(packed.compress(codec, in), Outcome::failed); });
    EXPECT_TRUE(packed.bytes().empty());
    SmallerPayload again;
    EXPECT_EQ(again.compress(codec, in), Outcome::smaller);
  }).join();
}

TEST(WireCompressionNone, IsNeverSmaller) {
  SmallerPayload packed;
  EXPECT_EQ(packed.compress(Compression::none, Bytes(1000)), Outcome::not_smaller);
  EXPECT_EQ(packed.compress(static_cast<Compression>(3), Bytes(1000)), Outcome::not_smaller);
  EXPECT_TRUE(packed.bytes().empty());
}

TEST(WireCompressionZstd, BetweenCallsAThreadKeepsNoContextOfAHighLevel) {
  const Bytes in = random_bytes(3 * mebi, 11);
  SmallerPayload packed;
  EXPECT_EQ(packed.compress(Compression::zstd, in, ZSTD_maxCLevel()), Outcome::not_smaller);
  EXPECT_LE(ZSTD_sizeof_CCtx(detail::CodecContexts::of_this_thread().zstd_encoder()), 4 * mebi);
}

// A destructor of the thread's may say goodbye when the codecs are gone already.
TEST(WireCompressionThread, AtItsEndSendsAsItIs) {
  static Outcome at_the_end = Outcome::smaller;
  struct Goodbye {
    bool armed = false;
    ~Goodbye() {
      if (!armed) return;
      SmallerPayload packed;
      at_the_end = packed.compress(Compression::zstd, Bytes(1000));
    }
  };
  std::thread([] {
    thread_local Goodbye goodbye;  // made before the codecs' contexts, so destroyed after them
    goodbye.armed = true;
    SmallerPayload packed;
    EXPECT_EQ(packed.compress(Compression::zstd, Bytes(1000)), Outcome::smaller);
  }).join();
  EXPECT_EQ(at_the_end, Outcome::failed);
}

TEST(WireCompressionNone, CopiesUpToTheLimit) {
  const Bytes in = bytes_of("12345");
  Bytes out;
  EXPECT_FALSE(compress(Compression::none, in, out));
  EXPECT_EQ(out, in);
  out.clear();
  EXPECT_FALSE(decompress(Compression::none, in, 5, out));
  EXPECT_EQ(out, in);
  const std::optional<Error> error = decompress(Compression::none, in, 4, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->text, "payload (none) decompresses to more than the limit of 4 bytes");
  EXPECT_TRUE(out.empty());
}

TEST(WireCompressionNone, ACodecThatIsNoneIsNamed) {
  Bytes out;
  for (const auto& error : {compress(static_cast<Compression>(3), {}, out),
                            decompress(static_cast<Compression>(3), bytes_of("x"), 10, out)}) {
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code, make_error_code(Errc::bad_compression));
    EXPECT_EQ(error->text, "compression is 3, must be 0 (none), 1 (zstd) or 2 (zlib)");
  }
}

// V11, V12 of the document: made by the zstd 1.5 command line tool and by Python's zlib.
TEST(WireCompressionVectors, PayloadsOfOtherImplementationsDecompress) {
  Bytes out;
  ASSERT_FALSE(decompress(Compression::zstd, from_hex("28b52ffd045859000068656c6c6f20776f726c6468691eb2"), 11, out));
  EXPECT_EQ(text_of(out), "hello world");
  ASSERT_FALSE(decompress(Compression::zlib, from_hex("789ccb48cdc9c95728cf2fca4901001a0b045d"), 11, out));
  EXPECT_EQ(text_of(out), "hello world");
}

/// A zstd frame written as a stream, so without an announced size.
Bytes zstd_stream(std::span<const std::byte> in, int window_log = 0, bool checksum = false) {
  ZSTD_CCtx* const context = ZSTD_createCCtx();
  if (window_log != 0) ZSTD_CCtx_setParameter(context, ZSTD_c_windowLog, window_log);
  ZSTD_CCtx_setParameter(context, ZSTD_c_checksumFlag, checksum ? 1 : 0);
  Bytes out(ZSTD_compressBound(in.size()) + 64);
  ZSTD_outBuffer target{out.data(), out.size(), 0};
  // Fed in two steps: an end in the first call would let zstd announce the size after all.
  ZSTD_inBuffer first{in.data(), in.size() / 2, 0};
  EXPECT_EQ(ZSTD_isError(ZSTD_compressStream2(context, &target, &first, ZSTD_e_flush)), 0U);
  ZSTD_inBuffer second{in.data() + in.size() / 2, in.size() - in.size() / 2, 0};
  EXPECT_EQ(ZSTD_compressStream2(context, &target, &second, ZSTD_e_end), 0U);
  ZSTD_freeCCtx(context);
  out.resize(target.pos);
  return out;
}

TEST(WireCompressionZstd, AFrameWithoutAnAnnouncedSizeComesBackAndHasTheSameLimit) {
  const Bytes in(300000, std::byte{'z'});
  const Bytes packed = zstd_stream(in, 0, true);
  ASSERT_EQ(ZSTD_getFrameContentSize(packed.data(), packed.size()), ZSTD_CONTENTSIZE_UNKNOWN);
  Bytes out;
  ASSERT_FALSE(decompress(Compression::zstd, packed, in.size(), out));
  EXPECT_EQ(out, in);
  const std::optional<Error> error = decompress(Compression::zstd, packed, in.size() - 1, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code, make_error_code(Errc::decompressed_too_large));
}

TEST(WireCompressionZstd, AWrongChecksumIsAnError) {
  Bytes packed = zstd_stream(random_bytes(1000, 7), 0, true);
  packed.back() ^= std::byte{1};
  Bytes out;
  const std::optional<Error> error = decompress(Compression::zstd, packed, mebi, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->text, "payload (zstd) does not decompress: " + zstd_text(ZSTD_error_checksum_wrong));
}

// C6
TEST(WireCompressionZstd, FramesOneBehindAnotherAreOnePayloadUnderOneLimit) {
  const Bytes part(1000, std::byte{'p'});
  Bytes packed_part;
  ASSERT_FALSE(compress(Compression::zstd, part, packed_part));
  Bytes packed;
  for (int i = 0; i < 100; ++i) packed.insert(packed.end(), packed_part.begin(), packed_part.end());
  Bytes out;
  ASSERT_FALSE(decompress(Compression::zstd, packed, 100000, out));
  EXPECT_EQ(out, Bytes(100000, std::byte{'p'}));
  const std::optional<Error> error = decompress(Compression::zstd, packed, 99999, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code, make_error_code(Errc::decompressed_too_large));
}

// L5
TEST(WireCompressionZstd, ABombOfManyFramesStopsAtTheLimit) {
  Bytes packed_part;
  ASSERT_FALSE(compress(Compression::zstd, Bytes(8 * mebi), packed_part));
  Bytes packed;
  for (int i = 0; i < 100; ++i) packed.insert(packed.end(), packed_part.begin(), packed_part.end());
  Bytes out;
  const std::optional<Error> error = decompress(Compression::zstd, packed, 16 * mebi, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code, make_error_code(Errc::decompressed_too_large));
  EXPECT_EQ(out.capacity(), 0U);
}

// C6
TEST(WireCompressionZstd, ASkippableFrameAddsNothing) {
  Bytes packed = from_hex("502a4d18 03000000 aabbcc");
  Bytes frame;
  ASSERT_FALSE(compress(Compression::zstd, bytes_of("data"), frame));
  packed.insert(packed.end(), frame.begin(), frame.end());
  Bytes out;
  ASSERT_FALSE(decompress(Compression::zstd, packed, 4, out));
  EXPECT_EQ(text_of(out), "data");
}

// L5: a frame may announce anything; memory follows what it really holds.
TEST(WireCompressionZstd, AnAnnouncedTebibyteTakesNoMemory) {
  // Single segment, 8-byte content size 2^40, one raw block of one byte marked last.
  const Bytes packed = from_hex("28b52ffd e0 0000000000010000 090000 61");
  ASSERT_EQ(ZSTD_getFrameContentSize(packed.data(), packed.size()), 1ULL << 40);
  Bytes out;
  const std::optional<Error> error = decompress(Compression::zstd, packed, 16 * mebi, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code, make_error_code(Errc::decompression_failed));
  EXPECT_EQ(error->text, "payload (zstd) does not decompress: " + zstd_text(ZSTD_error_frameParameter_windowTooLarge));
}

// L5
TEST(WireCompressionZstd, AnAnnouncedSizeIsNotBelievedEvenWithinTheLimit) {
  // A window of 2 KiB, content size 2^50, one raw block of one byte marked last.
  const Bytes packed = from_hex("28b52ffd c0 08 0000000000000400 090000 61");
  ASSERT_EQ(ZSTD_getFrameContentSize(packed.data(), packed.size()), 1ULL << 50);
  Bytes out;
  std::optional<Error> error;
  ASSERT_NO_THROW(error = decompress(Compression::zstd, packed, std::size_t{1} << 51, out));
  ASSERT_TRUE(error);
  EXPECT_EQ(error->code, make_error_code(Errc::decompression_failed)) << error->text;
}

// C7: also where zstd itself looks the other way, which depends on the room for the output.
TEST(WireCompressionZstd, AFrameThatHoldsLessThanItAnnouncesIsAnErrorUnderEveryLimit) {
  // Single segment, content size 44, one raw block of no byte marked last.
  const Bytes packed = from_hex("28b52ffd 20 2c 010000");
  Bytes out;
  for (const std::size_t limit : {std::size_t{0}, std::size_t{32}, std::size_t{43}, std::size_t{44}, mebi}) {
    const std::optional<Error> error = decompress(Compression::zstd, packed, limit, out);
    ASSERT_TRUE(error) << limit;
    EXPECT_EQ(error->code, make_error_code(Errc::decompression_failed));
  }
  const std::optional<Error> error = decompress(Compression::zstd, packed, 32, out);
  EXPECT_EQ(error->text, "payload (zstd) does not decompress: a frame of 0 bytes announced 44");
}

// L6
TEST(WireCompressionZstd, AWindowUpTo8MiBOrTheLimitIsTakenAndALargerOneRefused) {
  const Bytes in(100000, std::byte{'w'});
  Bytes out;
  // A small limit still takes 8 MiB, the largest window every decoder must know.
  EXPECT_FALSE(decompress(Compression::zstd, zstd_stream(in, 23), in.size(), out));
  EXPECT_EQ(out, in);
  const std::optional<Error> over = decompress(Compression::zstd, zstd_stream(in, 24), in.size(), out);
  ASSERT_TRUE(over);
  EXPECT_EQ(over->text, "payload (zstd) does not decompress: " + zstd_text(ZSTD_error_frameParameter_windowTooLarge));
  // With a limit of 16 MiB a window of 16 MiB.
  EXPECT_FALSE(decompress(Compression::zstd, zstd_stream(in, 24), 16 * mebi, out));
  EXPECT_EQ(out, in);
  EXPECT_TRUE(decompress(Compression::zstd, zstd_stream(in, 25), 16 * mebi, out));
  EXPECT_TRUE(decompress(Compression::zstd, zstd_stream(in, 27), 16 * mebi, out));
  EXPECT_FALSE(decompress(Compression::zstd, zstd_stream(in, 25), 16 * mebi + 1, out));
}

TEST(WireCompressionZstd, BetweenCallsAThreadKeepsNoContextOfALargeWindow) {
  const Bytes in = random_bytes(5 * mebi, 8);
  Bytes out;
  ASSERT_FALSE(decompress(Compression::zstd, zstd_stream(in, 23), in.size(), out));
  EXPECT_EQ(out, in);
  EXPECT_LE(ZSTD_sizeof_DCtx(detail::CodecContexts::of_this_thread().zstd_decoder()), 4 * mebi);
}

// C4
TEST(WireCompressionZstd, AFrameThatNeedsADictionaryIsAnError) {
  const Bytes packed = from_hex("28b52ffd 21 2a 01 090000 61");
  Bytes out;
  const std::optional<Error> error = decompress(Compression::zstd, packed, mebi, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->text, "payload (zstd) does not decompress: " + zstd_text(ZSTD_error_dictionary_wrong));
}

// C4
TEST(WireCompressionZlib, AStreamThatNeedsADictionaryIsAnError) {
  z_stream stream{};
  ASSERT_EQ(deflateInit(&stream, 6), Z_OK);
  const Bytes dictionary = bytes_of("dictionary");
  ASSERT_EQ(deflateSetDictionary(&stream, reinterpret_cast<const Bytef*>(dictionary.data()),
                                 static_cast<uInt>(dictionary.size())),
            Z_OK);
  Bytes packed(100);
  Bytes in = dictionary;
  stream.next_in = reinterpret_cast<Bytef*>(in.data());
  stream.avail_in = static_cast<uInt>(in.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  ASSERT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  packed.resize(packed.size() - stream.avail_out);
  deflateEnd(&stream);
  Bytes out;
  const std::optional<Error> error = decompress(Compression::zlib, packed, mebi, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->text, "payload (zlib) does not decompress: preset dictionary needed");
}

// C7: RFC 1950, neither raw deflate (RFC 1951) nor gzip (RFC 1952).
TEST(WireCompressionZlib, RawDeflateAndGzipAreRefused) {
  Bytes out;
  for (const char* hex :
       {"cb48cdc9c95728cf2fca490100", "1f8b0800000000000003cb48cdc9c95728cf2fca49010085114a0d0b000000"}) {
    const std::optional<Error> error = decompress(Compression::zlib, from_hex(hex), mebi, out);
    ASSERT_TRUE(error);
    EXPECT_EQ(error->code, make_error_code(Errc::decompression_failed));
  }
}

// C6
TEST(WireCompressionZlib, ASecondStreamBehindTheFirstIsAnError) {
  Bytes packed;
  ASSERT_FALSE(compress(Compression::zlib, bytes_of("a"), packed));
  const std::size_t one = packed.size();
  packed.insert(packed.end(), packed.begin(), packed.begin() + static_cast<std::ptrdiff_t>(one));
  Bytes out;
  const std::optional<Error> error = decompress(Compression::zlib, packed, mebi, out);
  ASSERT_TRUE(error);
  EXPECT_EQ(error->text,
            "payload (zlib) does not decompress: " + std::to_string(one) + " bytes after the end of the stream");
}

}  // namespace
}  // namespace msgtrans::wire
