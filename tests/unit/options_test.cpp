// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <limits>
#include <msgtrans/bytes_view.hpp>
#include <msgtrans/send.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>
#include <zstd.h>

namespace {

using namespace std::chrono_literals;
using msgtrans::BytesView;
using msgtrans::Compression;
using msgtrans::CompressionOptions;
using msgtrans::Endpoint;
using msgtrans::Errc;
using msgtrans::Error;
using msgtrans::SendResult;
using msgtrans::SessionOptions;
using msgtrans::SlowConsumer;
using msgtrans::TcpKeepAlive;

// --- SessionOptions

TEST(SessionOptions, DefaultsAreTheDocumentedOnesAndValid) {
  const SessionOptions options;
  EXPECT_EQ(options.max_payload, 16'777'216U);
  EXPECT_EQ(options.max_decompressed, 16'777'216U);
  EXPECT_EQ(options.max_extension, 65'535U);
  EXPECT_EQ(options.outbound_bytes, 1'048'576U);
  EXPECT_EQ(options.low_mark_percent, 50U);
  EXPECT_EQ(options.max_requests_in_flight, 4096U);
  EXPECT_EQ(options.packets_per_second, 0U);
  EXPECT_EQ(options.bytes_per_second, 0U);
  EXPECT_EQ(options.tcp_keep_alive.idle, 0s);
  EXPECT_EQ(options.tcp_user_timeout, 0ms);
  EXPECT_EQ(options.outbound_packets, 4'096U);
  EXPECT_EQ(options.slow_consumer, SlowConsumer::wait);
  EXPECT_EQ(options.compression.codec, msgtrans::Compression::none);
  EXPECT_EQ(options.compression.threshold, 512U);
  EXPECT_EQ(options.compression.level, 0);
  EXPECT_EQ(options.request_timeout, 10s);
  EXPECT_EQ(options.first_packet_timeout, 10s);
  EXPECT_EQ(options.idle_timeout, 0s);
  EXPECT_EQ(options.read_stall_timeout, 30s);
  EXPECT_EQ(options.write_stall_timeout, 30s);
  EXPECT_EQ(options.close_timeout, 5s);
  EXPECT_TRUE(options.no_delay);
  EXPECT_FALSE(validate(options)) << validate(options).message();
}

struct OptionCase {
  const char* name;
  std::function<void(SessionOptions&, std::int64_t)> set;
  std::int64_t least;
  std::int64_t most;
  std::int64_t largest;  // that the field can hold
  const char* range;     // as the error says it
};

std::vector<OptionCase> option_cases() {
  constexpr std::int64_t gib = 1'073'741'824;
  constexpr std::int64_t year = std::int64_t{365} * 24 * 3600 * 1000;
  constexpr std::int64_t any32 = std::numeric_limits<std::uint32_t>::max();
  constexpr std::int64_t any64 = std::numeric_limits<std::int64_t>::max();
  const auto milliseconds = [](auto member) {
    return
        [member](SessionOptions& options, std::int64_t value) { options.*member = std::chrono::milliseconds(value); };
  };
  const auto number = [](auto member) {
    return [member](SessionOptions& options, std::int64_t value) {
      options.*member = static_cast<std::remove_reference_t<decltype(options.*member)>>(value);
    };
  };
  const auto compression = [](auto member) {
    return [member](SessionOptions& options, std::int64_t value) {
      options.compression.*member = static_cast<std::remove_reference_t<decltype(options.compression.*member)>>(value);
    };
  };
  const auto probes = [](auto member) {
    return [member](SessionOptions& options, std::int64_t value) {
      options.tcp_keep_alive.*member =
          static_cast<std::remove_reference_t<decltype(options.tcp_keep_alive.*member)>>(value);
    };
  };
  constexpr std::int64_t rate = std::int64_t{1} << 62;
  const char* const any_rate = "must be from 0 to 4611686018427387904";
  const char* const off_to_year = "must be from 0 (off) to a year";
  return {
      {"max_payload", number(&SessionOptions::max_payload), 1, gib, any32, "must be from 1 to 1073741824"},
      {"max_decompressed", number(&SessionOptions::max_decompressed), 1, gib, any32, "must be from 1 to 1073741824"},
      {"max_extension", number(&SessionOptions::max_extension), 0, 65535, any32, "must be from 0 to 65535"},
      {"outbound_bytes", number(&SessionOptions::outbound_bytes), 1, 16 * gib, any64, "must be from 1 to 17179869184"},
      {"outbound_packets", number(&SessionOptions::outbound_packets), 1, 50'000'000, any64,
       "must be from 1 to 50000000"},
      {"slow_consumer", number(&SessionOptions::slow_consumer), 0, 2, 255, "must be from 0 to 2"},
      {"low_mark_percent", number(&SessionOptions::low_mark_percent), 0, 99, any32, "must be from 0 to 99"},
      {"packets_per_second", number(&SessionOptions::packets_per_second), 0, rate, any64, any_rate},
      {"packet_burst", number(&SessionOptions::packet_burst), 0, rate, any64, any_rate},
      {"bytes_per_second", number(&SessionOptions::bytes_per_second), 0, rate, any64, any_rate},
      {"byte_burst", number(&SessionOptions::byte_burst), 0, rate, any64, any_rate},
      {"tcp_keep_alive.probes", probes(&TcpKeepAlive::probes), 1, 127, 0x7FFF'FFFF, "must be from 1 to 127"},
      {"compression.codec", compression(&CompressionOptions::codec), 0, 2, 255, "must be from 0 to 2"},
      {"compression.threshold", compression(&CompressionOptions::threshold), 0, gib, any32,
       "must be from 0 to 1073741824"},
      {"request_timeout", milliseconds(&SessionOptions::request_timeout), 0, year, any64, off_to_year},
      {"first_packet_timeout", milliseconds(&SessionOptions::first_packet_timeout), 0, year, any64, off_to_year},
      {"idle_timeout", milliseconds(&SessionOptions::idle_timeout), 0, year, any64, off_to_year},
      {"heartbeat_interval", milliseconds(&SessionOptions::heartbeat_interval), 0, year, any64, off_to_year},
      {"max_missed_heartbeats", number(&SessionOptions::max_missed_heartbeats), 1, 1000, any32,
       "must be from 1 to 1000"},
      {"read_stall_timeout", milliseconds(&SessionOptions::read_stall_timeout), 0, year, any64, off_to_year},
      {"write_stall_timeout", milliseconds(&SessionOptions::write_stall_timeout), 0, year, any64, off_to_year},
      {"tcp_user_timeout", milliseconds(&SessionOptions::tcp_user_timeout), 0, year, any64, off_to_year},
      {"close_timeout", milliseconds(&SessionOptions::close_timeout), 1, year, any64, "must be from 1 ms to a year"},
  };
}

bool is_duration(const OptionCase& option) {
  return std::string_view(option.name).ends_with("_timeout") || std::string_view(option.name).ends_with("_interval");
}

void expect_refused(const OptionCase& option, std::int64_t value) {
  SessionOptions options;
  option.set(options, value);
  const Error error = validate(options);
  EXPECT_EQ(error.code, Errc::invalid_option) << option.name << ' ' << value;
  EXPECT_EQ(error.text, std::string(option.name) + " is " + std::to_string(value) +
                            (is_duration(option) ? " ms, " : ", ") + option.range);
}

TEST(SessionOptions, BothEndsOfEveryRangeAreAllowed) {
  for (const OptionCase& option : option_cases()) {
    for (const std::int64_t value : {option.least, option.most}) {
      SessionOptions options;
      option.set(options, value);
      EXPECT_FALSE(validate(options)) << validate(options).message();
    }
  }
}

TEST(SessionOptions, AValueJustOutsideItsRangeIsNamedWithTheFieldAndTheRange) {
  for (const OptionCase& option : option_cases()) {
    expect_refused(option, option.most + 1);
    expect_refused(option, option.largest);
    if (option.least > 0) expect_refused(option, option.least - 1);
    if (is_duration(option)) {
      expect_refused(option, -1);
      expect_refused(option, std::numeric_limits<std::int64_t>::min());
    }
  }
}

TEST(SessionOptions, ALevelOfCompressionIsOnItsCodecsScale) {
  SessionOptions options;
  const auto error = [&options](Compression codec, int level) {
    options.compression = {.codec = codec, .level = level};
    return validate(options).text;
  };
  for (const int level : {ZSTD_minCLevel(), -1, 0, 1, ZSTD_maxCLevel()}) EXPECT_EQ(error(Compression::zstd, level), "");
  for (const int level : {0, 1, 9}) EXPECT_EQ(error(Compression::zlib, level), "");
  const std::string zstd_range =
      ", must be from " + std::to_string(ZSTD_minCLevel()) + " to " + std::to_string(ZSTD_maxCLevel());
  for (const int level : {ZSTD_minCLevel() - 1, ZSTD_maxCLevel() + 1}) {
    EXPECT_EQ(error(Compression::zstd, level), "compression.level is " + std::to_string(level) + zstd_range);
  }
  EXPECT_EQ(error(Compression::zlib, -1), "compression.level is -1, must be from 0 to 9");
  EXPECT_EQ(error(Compression::zlib, 10), "compression.level is 10, must be from 0 to 9");
  EXPECT_EQ(validate(options).code, Errc::invalid_option);
  EXPECT_EQ(error(Compression::none, 10), "") << "nobody uses it";
}

TEST(SessionOptions, TheTimesOfKeepAliveAreInSeconds) {
  SessionOptions options;
  options.tcp_keep_alive = {.idle = 32'767s, .interval = 32'767s, .probes = 127};
  EXPECT_FALSE(validate(options));
  options.tcp_keep_alive.idle = 32'768s;
  EXPECT_EQ(validate(options).text, "tcp_keep_alive.idle is 32768 s, must be from 0 to 32767");
  options.tcp_keep_alive = {.interval = 0s};
  EXPECT_EQ(validate(options).text, "tcp_keep_alive.interval is 0 s, must be from 1 to 32767");
}

TEST(SessionOptions, ANegativeSizeIsNotTakenForALargeOne) {
  SessionOptions options;
  options.outbound_bytes = static_cast<std::size_t>(-1);
  EXPECT_EQ(validate(options).text, "outbound_bytes is 18446744073709551615, must be from 1 to 17179869184");
}

TEST(SessionOptions, OfSeveralFaultsTheFirstIsNamed) {
  SessionOptions options;
  options.close_timeout = 0ms;
  options.max_extension = 65536;
  options.idle_timeout = -5ms;
  EXPECT_EQ(validate(options).text, "max_extension is 65536, must be from 0 to 65535");
  options.max_extension = 0;
  EXPECT_EQ(validate(options).text, "idle_timeout is -5 ms, must be from 0 (off) to a year");
  options.idle_timeout = 0ms;
  EXPECT_EQ(validate(options).text, "close_timeout is 0 ms, must be from 1 ms to a year");
  options.close_timeout = 1ms;
  EXPECT_FALSE(validate(options));
}

// --- Endpoint

struct GoodAddress {
  const char* text;
  const char* host;
  std::uint16_t port;
  const char* printed;
};

constexpr GoodAddress good_addresses[] = {
    {"127.0.0.1:8001", "127.0.0.1", 8001, "127.0.0.1:8001"},
    {"0.0.0.0:0", "0.0.0.0", 0, "0.0.0.0:0"},
    {"localhost:65535", "localhost", 65535, "localhost:65535"},
    {"a-b.example_1.org:1", "a-b.example_1.org", 1, "a-b.example_1.org:1"},
    {"[::1]:8001", "::1", 8001, "[::1]:8001"},
    {"[::]:0", "::", 0, "[::]:0"},
    {"[fe80::1%eth0]:80", "fe80::1%eth0", 80, "[fe80::1%eth0]:80"},
    {"[::ffff:1.2.3.4]:80", "::ffff:1.2.3.4", 80, "[::ffff:1.2.3.4]:80"},
    {"host:0080", "host", 80, "host:80"},
};

TEST(Endpoint, GoodAddressesAreTakenApartAndPutTogether) {
  for (const GoodAddress& good : good_addresses) {
    const Endpoint endpoint = msgtrans::tcp(good.text);
    EXPECT_EQ(endpoint.transport, msgtrans::Transport::tcp);
    EXPECT_EQ(endpoint.host, good.host);
    EXPECT_EQ(endpoint.port, good.port);
    EXPECT_EQ(endpoint.to_string(), good.printed);
    EXPECT_EQ(endpoint.url(), std::string("tcp://") + good.printed);
    std::ostringstream out;
    out << endpoint;
    EXPECT_EQ(out.str(), good.printed);
    EXPECT_EQ(msgtrans::tcp(endpoint.to_string()), endpoint);
    Error error;
    const auto from_url = msgtrans::parse_url(endpoint.url(), error);
    ASSERT_TRUE(from_url) << error.text;
    EXPECT_EQ(*from_url, endpoint);
    EXPECT_FALSE(error);
  }
}

struct BadAddress {
  std::string_view text;
  std::string_view problem;
};

using namespace std::string_view_literals;

const BadAddress bad_addresses[] = {
    {"", "no port"},
    {"localhost", "no port"},
    {"127.0.0.1", "no port"},
    {":", "no host"},
    {":8001", "no host"},
    {"[]:8001", "no host"},
    {"localhost:", "\"\" is no port"},
    {"localhost:http", "\"http\" is no port"},
    {"localhost:65536", "\"65536\" is no port"},
    {"localhost:99999999999999999999", "\"99999999999999999999\" is no port"},
    {"localhost:-1", "\"-1\" is no port"},
    {"localhost:+1", "\"+1\" is no port"},
    {"localhost: 1", "\" 1\" is no port"},
    {"localhost:1 ", "\"1 \" is no port"},
    {"localhost:0x10", "\"0x10\" is no port"},
    {"localhost:80/path", "\"80/path\" is no port"},
    {"localhost:80\0"sv, "\"80\0\" is no port"sv},
    {"::1", "an IPv6 address needs brackets, as in [::1]:8001"},
    {"::1:8001", "an IPv6 address needs brackets, as in [::1]:8001"},
    {"[::1]", "an IPv6 address needs brackets, as in [::1]:8001"},
    {"[::1:8001", "an IPv6 address needs brackets, as in [::1]:8001"},
    {"[::1]x:8001", "an IPv6 address needs brackets, as in [::1]:8001"},
    {"[localhost]:8001", "brackets are for IPv6 addresses"},
    {"[127.0.0.1]:8001", "brackets are for IPv6 addresses"},
    {"[[::1]]:8001", "\"[::1]\" is no host"},
    {"[localhost:8001", "\"[localhost\" is no host"},
    {" :8001", "\" \" is no host"},
    {"local host:8001", "\"local host\" is no host"},
    {"localhost\n:8001", "\"localhost\n\" is no host"},
    {"local\0host:8001"sv, "\"local\0host\" is no host"sv},
    {"user@localhost:8001", "\"user@localhost\" is no host"},
    {"/run/socket:8001", "\"/run/socket\" is no host"},
    {"tcp://localhost:8001", "a scheme does not belong here; write it as host:port"},
};

TEST(Endpoint, BadAddressesAreShownWithWhatIsWrong) {
  for (const BadAddress& bad : bad_addresses) {
    try {
      const Endpoint endpoint = msgtrans::tcp(bad.text);
      ADD_FAILURE() << bad.text << " was taken as " << endpoint;
    } catch (const msgtrans::Exception& failure) {
      EXPECT_EQ(failure.code(), Errc::invalid_address);
      const std::string what = failure.what();
      // what() ends at the first zero byte, as every C string
      const auto zero = bad.text.find('\0');
      const std::string start = "invalid address \"" + std::string(bad.text.substr(0, zero));
      EXPECT_NE(what.find(start), std::string::npos) << what;
      if (zero == std::string_view::npos) {
        EXPECT_NE(what.find(start + "\": " + std::string(bad.problem)), std::string::npos) << what;
      }
    }
  }
}

TEST(Endpoint, BadUrlsAreShownWithWhatIsWrong) {
  const auto expect = [](const std::string& url, std::string_view problem) {
    Error error;
    EXPECT_FALSE(msgtrans::parse_url(url, error)) << url;
    EXPECT_EQ(error.code, Errc::invalid_address);
    EXPECT_EQ(error.text, "invalid address \"" + url + "\": " + std::string(problem));
  };
  for (const BadAddress& bad : bad_addresses) expect("tcp://" + std::string(bad.text), bad.problem);
  expect("", "no scheme; write it as tcp://host:port");
  expect("localhost:8001", "no scheme; write it as tcp://host:port");
  expect("//localhost:8001", "no scheme; write it as tcp://host:port");
  expect("://localhost:8001", "no scheme; write it as tcp://host:port");
  expect("http://localhost:8001", "unknown scheme \"http\"; there are tcp, tls, unix, ws, wss and inproc");
  expect("tcp ://localhost:8001", "unknown scheme \"tcp \"; there are tcp, tls, unix, ws, wss and inproc");
  expect("tcp://localhost:8001/", "\"8001/\" is no port");
  expect("ws://localhost:8001/a#b", "\"/a#b\" is no path");
  expect("wss://localhost:8001/a b", "\"/a b\" is no path");
  expect("ws://", "no host");
  expect("wss://[::1", "an IPv6 address needs brackets, as in [::1]:8001");
}

TEST(Endpoint, OfWebSocketHasAPathAndAUsualPort) {
  const auto parsed = [](std::string_view url) {
    Error error;
    const auto endpoint = msgtrans::parse_url(url, error);
    EXPECT_TRUE(endpoint) << error.text;
    return endpoint.value_or(Endpoint{});
  };
  const Endpoint plain{.transport = msgtrans::Transport::websocket, .host = "localhost", .port = 80, .path = "/"};
  EXPECT_EQ(parsed("ws://localhost"), plain);
  EXPECT_EQ(parsed("ws://localhost/"), plain);
  EXPECT_EQ(parsed("ws://localhost:80"), plain);
  EXPECT_EQ(plain.url(), "ws://localhost:80");
  const Endpoint six{.transport = msgtrans::Transport::websocket_tls, .host = "::1", .port = 443, .path = "/a/b?c=d"};
  EXPECT_EQ(parsed("wss://[::1]/a/b?c=d"), six);
  EXPECT_EQ(parsed(six.url()), six);
  EXPECT_EQ(msgtrans::websocket_tls("[::1]:443/a/b?c=d"), six);
  EXPECT_EQ(parsed("ws://localhost?x").path, "/?x");
  EXPECT_EQ(parsed("tls://localhost:1"), msgtrans::tls("localhost:1"));
}

TEST(Endpoint, WithinTheProcessIsAName) {
  Error error;
  const auto endpoint = msgtrans::parse_url("inproc://orders/eu-1", error);
  ASSERT_TRUE(endpoint) << error.text;
  EXPECT_EQ(*endpoint, msgtrans::in_process("orders/eu-1"));
  EXPECT_EQ(endpoint->transport, msgtrans::Transport::in_process);
  EXPECT_EQ(endpoint->to_string(), "orders/eu-1");
  EXPECT_EQ(endpoint->url(), "inproc://orders/eu-1");
  for (const std::string bad : {"", "a b", "a#1", "a\n", "\xff"}) {
    EXPECT_FALSE(msgtrans::parse_url("inproc://" + bad, error)) << bad;
    EXPECT_EQ(error.code, Errc::invalid_address);
    EXPECT_EQ(error.text, "invalid address \"inproc://" + bad +
                              "\": " + (bad.empty() ? std::string("no name") : "\"" + bad + "\" is no name"));
  }
}

// --- BytesView

TEST(BytesView, TextAndEveryRangeOfByteSizedElementsAreSeenInPlace) {
  const std::string text = "hello";
  const std::vector<std::uint8_t> octets{'h', 'e', 'l', 'l', 'o'};
  const std::array<char, 5> array{'h', 'e', 'l', 'l', 'o'};
  const std::vector<std::byte> bytes(5, std::byte{'x'});
  EXPECT_EQ(BytesView("hello").text(), "hello");
  EXPECT_EQ(BytesView(text).text(), "hello");
  EXPECT_EQ(static_cast<const void*>(BytesView(text).data()), text.data());
  EXPECT_EQ(BytesView(std::string_view(text).substr(1, 3)).text(), "ell");
  EXPECT_EQ(BytesView(octets).text(), "hello");
  EXPECT_EQ(static_cast<const void*>(BytesView(octets).data()), octets.data());
  EXPECT_EQ(BytesView(array).text(), "hello");
  EXPECT_EQ(BytesView(bytes).text(), "xxxxx");
  EXPECT_EQ(BytesView(std::span(bytes).first(2)).size(), 2U);
  EXPECT_EQ(BytesView(std::as_bytes(std::span(octets))).text(), "hello");
  const std::span<const std::byte> back = BytesView(text);
  EXPECT_EQ(back.size(), 5U);
}

TEST(BytesView, ZeroBytesAreKeptWhereALengthIsKnown) {
  EXPECT_EQ(BytesView(std::string("a\0b", 3)).size(), 3U);
  EXPECT_EQ(BytesView("a\0b"sv).size(), 3U);
  EXPECT_EQ(BytesView("a\0b").size(), 1U) << "as every C string";
}

TEST(BytesView, NothingIsEmpty) {
  EXPECT_TRUE(BytesView().empty());
  EXPECT_TRUE(BytesView("").empty());
  EXPECT_TRUE(BytesView(std::vector<std::byte>()).empty());
  EXPECT_EQ(BytesView().text(), "");
}

TEST(BytesView, WiderElementsAreNotTakenForBytes) {
  static_assert(std::is_convertible_v<std::vector<char>, BytesView>);
  static_assert(std::is_convertible_v<std::span<std::byte>, BytesView>);
  static_assert(!std::is_constructible_v<BytesView, std::vector<int>>);
  static_assert(!std::is_constructible_v<BytesView, std::u16string>);
  static_assert(!std::is_constructible_v<BytesView, int>);
  static_assert(!std::is_constructible_v<BytesView, std::vector<bool>>);
}

// --- SendResult

TEST(SendResult, EveryValueHasItsNameAndItsError) {
  EXPECT_FALSE(make_error_code(SendResult::queued).failed());
  EXPECT_EQ(make_error_code(SendResult::would_block), Errc::would_block);
  EXPECT_EQ(make_error_code(SendResult::too_large), Errc::too_large);
  EXPECT_EQ(make_error_code(SendResult::closed), Errc::closed);
  EXPECT_EQ(make_error_code(SendResult::not_found), Errc::not_found);
  std::set<std::string> names;
  for (const auto result : {SendResult::queued, SendResult::would_block, SendResult::too_large, SendResult::closed,
                            SendResult::not_found}) {
    names.insert(to_string(result));
  }
  EXPECT_EQ(names, (std::set<std::string>{"queued", "would_block", "too_large", "closed", "not_found"}));
}

TEST(SendOptions, DefaultsSendAPlainMessage) {
  const msgtrans::SendOptions message;
  EXPECT_EQ(message.biz_type, 0);
  EXPECT_TRUE(message.extension.empty());
  EXPECT_FALSE(message.high_priority);
  EXPECT_FALSE(message.route_tag);
  EXPECT_FALSE(message.compression) << "then the session's own counts";
  const msgtrans::RequestOptions request;
  EXPECT_EQ(request.biz_type, 0);
  EXPECT_TRUE(request.extension.empty());
  EXPECT_FALSE(request.high_priority);
  EXPECT_FALSE(request.route_tag);
  EXPECT_FALSE(request.compression) << "likewise";
  EXPECT_FALSE(request.timeout) << "then the session's own counts";
}

}  // namespace
