// SPDX-License-Identifier: Apache-2.0
#include "check_option.hpp"

#include <msgtrans/drain_options.hpp>
#include <msgtrans/protocol/outbound_budget.hpp>
#include <msgtrans/protocol/token_bucket.hpp>
#include <msgtrans/session_options.hpp>
#include <string>
#include <zstd.h>

namespace msgtrans {

Error validate(const DrainOptions& options) {
  Error error = detail::check_duration("within", options.within);
  if (!error) error = detail::check_duration("quiet", options.quiet);
  if (!error && options.quiet.count() != 0 && options.quiet >= options.within) {
    error = Error(Errc::invalid_option, "quiet is " + std::to_string(options.quiet.count()) +
                                            " ms, must be less than within, which is " +
                                            std::to_string(options.within.count()) + " ms");
  }
  return error;
}

namespace {

/// Remembers the first option out of its range.
class Check {
 public:
  void range(const char* name, std::uint64_t value, std::uint64_t least, std::uint64_t most) {
    found(detail::check_range(name, value, least, most));
  }
  void level(const char* name, int value, int least, int most) { found(detail::check_range(name, value, least, most)); }
  void seconds(const char* name, std::chrono::seconds value, std::int64_t least, std::int64_t most) {
    found(detail::check_range<std::int64_t>(name, value.count(), least, most, " s"));
  }
  void found(Error error) {
    if (!error_) error_ = std::move(error);
  }
  void duration(const char* name, std::chrono::milliseconds value, bool zero_allowed = true) {
    found(detail::check_duration(name, value, zero_allowed));
  }
  [[nodiscard]] Error take() && { return std::move(error_); }

 private:
  Error error_;
};

}  // namespace

Error validate(const OutboundLimits& limits) {
  Check check;
  check.range("outbound_bytes", limits.bytes, 1, protocol::OutboundBudget::max_bytes);
  check.range("outbound_packets", limits.packets, 1, protocol::OutboundBudget::max_packets);
  check.range("slow_consumer", static_cast<std::uint64_t>(limits.slow_consumer), 0,
              static_cast<std::uint64_t>(SlowConsumer::close));
  return std::move(check).take();
}

Error validate(const SessionOptions& options) {
  constexpr std::uint64_t gib = std::uint64_t{1} << 30;
  Check check;
  check.range("max_payload", options.max_payload, 1, gib);
  check.range("max_decompressed", options.max_decompressed, 1, gib);
  check.range("max_extension", options.max_extension, 0, 65535);
  check.found(validate(OutboundLimits{options.outbound_bytes, options.outbound_packets, options.slow_consumer}));
  check.range("low_mark_percent", options.low_mark_percent, 0, 99);
  check.range("packets_per_second", options.packets_per_second, 0, protocol::TokenBucket::most);
  check.range("packet_burst", options.packet_burst, 0, protocol::TokenBucket::most);
  check.range("bytes_per_second", options.bytes_per_second, 0, protocol::TokenBucket::most);
  check.range("byte_burst", options.byte_burst, 0, protocol::TokenBucket::most);
  check.seconds("tcp_keep_alive.idle", options.tcp_keep_alive.idle, 0, 32767);
  check.seconds("tcp_keep_alive.interval", options.tcp_keep_alive.interval, 1, 32767);
  check.level("tcp_keep_alive.probes", options.tcp_keep_alive.probes, 1, 127);
  check.duration("tcp_user_timeout", options.tcp_user_timeout);
  check.range("compression.codec", static_cast<std::uint64_t>(options.compression.codec), 0,
              static_cast<std::uint64_t>(Compression::zlib));
  check.range("compression.threshold", options.compression.threshold, 0, gib);
  if (options.compression.codec == Compression::zstd) {
    check.level("compression.level", options.compression.level, ZSTD_minCLevel(), ZSTD_maxCLevel());
  } else if (options.compression.codec == Compression::zlib) {
    check.level("compression.level", options.compression.level, 0, 9);
  }
  check.duration("request_timeout", options.request_timeout);
  check.duration("first_packet_timeout", options.first_packet_timeout);
  check.duration("idle_timeout", options.idle_timeout);
  check.duration("heartbeat_interval", options.heartbeat_interval);
  check.range("max_missed_heartbeats", options.max_missed_heartbeats, 1, 1000);
  check.duration("read_stall_timeout", options.read_stall_timeout);
  check.duration("write_stall_timeout", options.write_stall_timeout);
  check.duration("close_timeout", options.close_timeout, false);
  return std::move(check).take();
}

}  // namespace msgtrans
