// SPDX-License-Identifier: Apache-2.0
#include <chrono>
#include <cstdint>
#include <gtest/gtest.h>
#include <limits>
#include <msgtrans/protocol/backoff.hpp>
#include <msgtrans/reconnect_options.hpp>
#include <string>
#include <vector>

namespace {

using namespace std::chrono_literals;
using msgtrans::Errc;
using msgtrans::ReconnectOptions;
using msgtrans::protocol::Backoff;

TEST(Backoff, GrowsByTheFactorUpToTheLongest) {
  const Backoff backoff{.initial = 100ms, .factor = 1.6, .max = 30s};
  const std::vector<std::chrono::milliseconds> expected{100ms, 160ms, 256ms, 410ms};
  for (std::uint64_t attempt = 1; attempt <= 4; ++attempt) EXPECT_EQ(backoff.delay(attempt), expected[attempt - 1]);
  EXPECT_EQ(backoff.delay(13), 28'147ms);
  EXPECT_EQ(backoff.delay(14), 30s);
  EXPECT_EQ(backoff.delay(1000), 30s);
}

TEST(Backoff, StaysWhereItIsWithAFactorOfOne) {
  const Backoff backoff{.initial = 7ms, .factor = 1, .max = 1h};
  for (const std::uint64_t attempt : {1U, 2U, 100U, 1'000'000U}) EXPECT_EQ(backoff.delay(attempt), 7ms);
}

TEST(Backoff, DoesNotOverflow) {
  const Backoff backoff{.initial = 1ms, .factor = 100, .max = 365 * 24h, .jitter = 1};
  EXPECT_EQ(backoff.delay(std::numeric_limits<std::uint64_t>::max()), 365 * 24h);
  EXPECT_EQ(backoff.delay(std::numeric_limits<std::uint64_t>::max(), 1), 2 * 365 * 24h);
}

TEST(Backoff, TakesAttemptZeroForTheFirst) {
  EXPECT_EQ(Backoff{}.delay(0), 100ms);
}

TEST(Backoff, JitterIsItsShareEitherWay) {
  const Backoff backoff{.initial = 100ms, .factor = 10, .max = 1s, .jitter = 0.2};
  EXPECT_EQ(backoff.delay(1, 0), 80ms);
  EXPECT_EQ(backoff.delay(1, 0.25), 90ms);
  EXPECT_EQ(backoff.delay(1, 0.5), 100ms);
  EXPECT_EQ(backoff.delay(1, 1), 120ms);
  // Of the longest too, so that those who wait long do not come together.
  EXPECT_EQ(backoff.delay(50, 0), 800ms);
  EXPECT_EQ(backoff.delay(50, 1), 1200ms);
}

TEST(ReconnectOptions, DefaultsAreTheDocumentedOnesAndValid) {
  const ReconnectOptions options;
  EXPECT_FALSE(options.enabled);
  EXPECT_EQ(options.initial_delay, 100ms);
  EXPECT_EQ(options.factor, 1.6);
  EXPECT_EQ(options.max_delay, 30s);
  EXPECT_EQ(options.jitter, 0.2);
  EXPECT_EQ(options.max_attempts, 0U);
  EXPECT_EQ(options.reset_after, 5s);
  EXPECT_FALSE(options.retry_first_connect);
  EXPECT_EQ(options.keep_packets, 0U);
  EXPECT_EQ(options.keep_bytes, 1'048'576U);
  EXPECT_EQ(options.retry_requests, 0U);
  EXPECT_EQ(options.retry_bytes, 1'048'576U);
  EXPECT_FALSE(validate(options)) << validate(options).message();
}

TEST(ReconnectOptions, OutOfRangeAreRefusedByName) {
  struct Case {
    std::string expected;
    void (*set)(ReconnectOptions&);
  };
  const Case cases[] = {
      {"reconnect.initial_delay is 0 ms", [](ReconnectOptions& o) { o.initial_delay = 0ms; }},
      {"reconnect.factor is 0.9", [](ReconnectOptions& o) { o.factor = 0.9; }},
      {"reconnect.factor is 101", [](ReconnectOptions& o) { o.factor = 101; }},
      {"reconnect.factor is nan", [](ReconnectOptions& o) { o.factor = std::numeric_limits<double>::quiet_NaN(); }},
      {"reconnect.max_delay is 99 ms, less than reconnect.initial_delay, 100 ms",
       [](ReconnectOptions& o) { o.max_delay = 99ms; }},
      {"reconnect.jitter is -0.1", [](ReconnectOptions& o) { o.jitter = -0.1; }},
      {"reconnect.jitter is 1.1", [](ReconnectOptions& o) { o.jitter = 1.1; }},
      {"reconnect.reset_after is -1 ms", [](ReconnectOptions& o) { o.reset_after = -1ms; }},
      {"reconnect.keep_packets is 50000001", [](ReconnectOptions& o) { o.keep_packets = 50'000'001; }},
      {"reconnect.keep_bytes is 0", [](ReconnectOptions& o) { o.keep_bytes = 0; }},
      {"reconnect.retry_requests is 50000001", [](ReconnectOptions& o) { o.retry_requests = 50'000'001; }},
      {"reconnect.retry_bytes is 0", [](ReconnectOptions& o) { o.retry_bytes = 0; }},
  };
  for (const auto& [expected, set] : cases) {
    ReconnectOptions options;
    set(options);
    const auto error = validate(options);
    EXPECT_EQ(error.code, Errc::invalid_option) << expected;
    EXPECT_EQ(error.text.find(expected), 0U) << error.text;
  }
}

}  // namespace
