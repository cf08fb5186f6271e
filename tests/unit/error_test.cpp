// SPDX-License-Identifier: Apache-2.0
#include <boost/asio/error.hpp>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <limits>
#include <msgtrans/error.hpp>
#include <msgtrans/session_id.hpp>
#include <set>
#include <sstream>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace {

using msgtrans::Errc;
using msgtrans::Error;
using msgtrans::error_code;
using msgtrans::make_error_code;
using msgtrans::SessionId;

std::vector<Errc> all_errors() {
  std::vector<Errc> all;
  for (int value = 1; value <= static_cast<int>(Errc::blocking_on_shard); ++value)
    all.push_back(static_cast<Errc>(value));
  return all;
}

TEST(ErrorCode, EveryValueHasAMessageOfItsOwn) {
  const std::string unknown = error_code(9999, msgtrans::error_category()).message();
  EXPECT_FALSE(unknown.empty());
  std::set<std::string> seen{unknown};
  for (const Errc e : all_errors()) {
    const std::string message = make_error_code(e).message();
    EXPECT_FALSE(message.empty()) << static_cast<int>(e);
    EXPECT_TRUE(seen.insert(message).second) << message;
  }
  EXPECT_EQ(error_code(static_cast<int>(Errc::blocking_on_shard) + 1, msgtrans::error_category()).message(), unknown)
      << "a value was added at the end: extend all_errors()";
}

TEST(ErrorCode, ConvertsFromTheEnumAndComparesWithIt) {
  const error_code code = Errc::closed;
  EXPECT_TRUE(code.failed());
  EXPECT_EQ(code, Errc::closed);
  EXPECT_NE(code, Errc::not_found);
  EXPECT_STREQ(code.category().name(), "msgtrans");
  EXPECT_NE(code, error_code(static_cast<int>(Errc::closed), boost::system::system_category()));
}

TEST(ErrorCode, EveryValueIsAFailure) {
  EXPECT_FALSE(error_code().failed());
  for (const Errc e : all_errors()) EXPECT_TRUE(make_error_code(e).failed()) << static_cast<int>(e);
}

TEST(ErrorCode, CategoriesOfTwoCopiesOfTheLibraryAreTheSame) {
  const msgtrans::detail::ErrorCategory copy;
  EXPECT_NE(&copy, &msgtrans::error_category());
  EXPECT_EQ(error_code(static_cast<int>(Errc::closed), copy), Errc::closed);
}

const std::string message_before_main = make_error_code(Errc::write_stalled).message();

TEST(ErrorCode, WorksDuringStaticInitialisation) {
  EXPECT_EQ(message_before_main, make_error_code(Errc::write_stalled).message());
}

TEST(ErrorQueries, ProtocolErrorsAreExactlyTheViolationsOfTheWireFormat) {
  const std::set<Errc> protocol{Errc::bad_version,
                                Errc::bad_compression,
                                Errc::bad_type,
                                Errc::fragmented,
                                Errc::extension_too_large,
                                Errc::payload_too_large,
                                Errc::decompressed_too_large,
                                Errc::decompression_failed,
                                Errc::websocket_violation};
  for (const Errc e : all_errors()) {
    EXPECT_EQ(msgtrans::is_protocol_error(make_error_code(e)), protocol.contains(e)) << make_error_code(e).message();
  }
  EXPECT_FALSE(msgtrans::is_protocol_error({}));
  EXPECT_FALSE(msgtrans::is_protocol_error({1, boost::system::system_category()}));
}

TEST(ErrorQueries, RetryableAreAFullQueueAndALateAnswer) {
  const std::set<Errc> retryable{Errc::would_block, Errc::request_timeout};
  for (const Errc e : all_errors()) {
    EXPECT_EQ(msgtrans::is_retryable(make_error_code(e)), retryable.contains(e)) << make_error_code(e).message();
  }
  EXPECT_FALSE(msgtrans::is_retryable({}));
}

TEST(ErrorQueries, FatalAreThoseThatEndTheSession) {
  const std::set<Errc> survivable{Errc::would_block,    Errc::request_timeout, Errc::too_large,
                                  Errc::invalid_option, Errc::invalid_address, Errc::not_supported,
                                  Errc::wrong_state,    Errc::too_many_groups, Errc::blocking_on_shard,
                                  Errc::no_answer,      Errc::rejected,        Errc::send_timeout};
  for (const Errc e : all_errors()) {
    EXPECT_EQ(msgtrans::is_fatal(make_error_code(e)), !survivable.contains(e)) << make_error_code(e).message();
  }
  EXPECT_FALSE(msgtrans::is_fatal({}));
  EXPECT_TRUE(msgtrans::is_fatal(boost::asio::error::connection_reset));
  EXPECT_FALSE(msgtrans::is_fatal(boost::asio::error::operation_aborted));
}

TEST(Error, IsTrueOnlyWithACode) {
  EXPECT_FALSE(Error());
  EXPECT_TRUE(Error(Errc::closed));
  EXPECT_TRUE(Error(boost::asio::error::connection_reset));
}

TEST(Error, MessageIsTheTextAndWithoutOneTheCodesOwn) {
  EXPECT_EQ(Error(Errc::bad_version, "version is 7, must be 1").message(), "version is 7, must be 1");
  EXPECT_EQ(Error(Errc::bad_version).message(), make_error_code(Errc::bad_version).message());
}

TEST(Exception, CarriesCodeAndText) {
  try {
    throw msgtrans::Exception(Error(Errc::invalid_option, "shards is 0, must be at least 1"));
  } catch (const boost::system::system_error& error) {
    EXPECT_EQ(error.code(), Errc::invalid_option);
    EXPECT_NE(std::string(error.what()).find("shards is 0, must be at least 1"), std::string::npos);
  }
}

TEST(SessionId, PrintsAsSessionAndItsNumber) {
  const SessionId id(18446744073709551615ULL);
  EXPECT_EQ(to_string(SessionId(42)), "session-42");
  EXPECT_EQ(to_string(id), "session-18446744073709551615");
  std::ostringstream out;
  out << SessionId(42) << ' ' << id;
  EXPECT_EQ(out.str(), "session-42 session-18446744073709551615");
  std::wostringstream wide;
  wide << SessionId(42);
  EXPECT_EQ(wide.str(), L"session-42");
}

TEST(SessionId, ZeroNamesNone) {
  EXPECT_FALSE(SessionId());
  EXPECT_FALSE(SessionId(0));
  EXPECT_TRUE(SessionId(1));
  EXPECT_EQ(SessionId(), SessionId(0));
}

TEST(SessionId, IsOrderedAndDoesNotMixWithNumbers) {
  EXPECT_LT(SessionId(1), SessionId(2));
  EXPECT_GT(SessionId(std::numeric_limits<std::uint64_t>::max()), SessionId(1));
  EXPECT_NE(SessionId(1), SessionId(2));
  static_assert(!std::is_convertible_v<std::uint64_t, SessionId>);
  static_assert(!std::is_convertible_v<SessionId, std::uint64_t>);
  static_assert(!std::is_convertible_v<SessionId, bool>);
}

TEST(SessionId, HashSpreadsNeighboursOverHighAndLowBits) {
  constexpr std::uint64_t count = 4096;
  const std::hash<SessionId> hash;
  std::unordered_map<std::size_t, int> low;
  std::unordered_map<std::size_t, int> high;
  int in_step = 0;
  for (std::uint64_t value = 1; value <= count; ++value) {
    const std::size_t h = hash(SessionId(value));
    ++low[h % 256];
    ++high[h >> (std::numeric_limits<std::size_t>::digits - 8)];
    if (hash(SessionId(value + 1)) - h == 1) ++in_step;
  }
  EXPECT_EQ(in_step, 0);
  // 16 a bucket on average; 48 in one would be eight standard deviations off.
  for (const auto& [bucket, n] : low) EXPECT_LT(n, 48) << bucket;
  for (const auto& [bucket, n] : high) EXPECT_LT(n, 48) << bucket;
}

}  // namespace
