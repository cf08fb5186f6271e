// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <msgtrans/compression_options.hpp>
#include <msgtrans/error.hpp>

namespace msgtrans {

/// What happens when a message finds its session's outbound queue full.
enum class SlowConsumer : std::uint8_t {
  wait,         ///< the message is not taken: `send` says `would_block`, `async_send` waits
  drop_oldest,  ///< the oldest queued messages that are neither answers nor begun are dropped and counted
  close,        ///< the session ends with `Errc::slow_consumer`
};

/// TCP's own probes of a connection on which nothing moves; other transports ignore them.
struct TcpKeepAlive {
  std::chrono::seconds idle{0};       ///< without a byte, before the first probe; zero: off. Up to 32767 s.
  std::chrono::seconds interval{10};  ///< between probes. 1 to 32767 s.
  int probes = 3;                     ///< without an answer, after which the connection is lost. 1 to 127.
};

/// The outbound queue's bounds of one session, and what happens there. Checked as `SessionOptions` are, where they come
/// from; see there.
struct OutboundLimits {
  std::size_t bytes = 1024 * 1024;
  std::size_t packets = 4096;
  SlowConsumer slow_consumer = SlowConsumer::wait;

  friend bool operator==(const OutboundLimits&, const OutboundLimits&) = default;
};

/// Limits and deadlines of one session. Durations: zero means off. Checked by the call that takes them.
struct SessionOptions {
  /// Largest payload on the wire, either way, in bytes; itself allowed. 1 byte to 1 GiB.
  std::uint32_t max_payload = 16 * 1024 * 1024;
  /// Largest payload after decompression, in bytes; itself allowed. 1 byte to 1 GiB.
  std::uint32_t max_decompressed = 16 * 1024 * 1024;
  /// Largest extension header, either way, in bytes. 0 to 65535.
  std::uint32_t max_extension = 65535;

  /// Budget of the outbound queue, in bytes on the wire and in packets; strict, counted with the message being added.
  /// A message larger than the whole byte budget is taken only into an empty queue. Answers are always taken; while
  /// they alone are over the budget the session is handed no further packets. 1 byte to 16 GiB; 1 to 50 million.
  std::size_t outbound_bytes = 1024 * 1024;
  std::size_t outbound_packets = 4096;
  SlowConsumer slow_consumer = SlowConsumer::wait;
  /// Where a queue that was found full counts as emptied, in percent of its budget: then `on_writable` is called, and
  /// packets that were held back for their answers are handed out again. 0 to 99.
  unsigned low_mark_percent = 50;

  /// Requests of the peer that were handed out and retained, and are not answered yet. At so many nothing more is
  /// handed out, nor read, until one of them is answered or given up; answers of the peer behind them wait as well.
  /// 0: no limit.
  std::size_t max_requests_in_flight = 4096;
  /// What the peer may send: packets, and bytes on the wire, a second, and at once after a pause. A session over its
  /// rate is not read from until it is within it again. A rate of 0: no limit; a burst of 0: one second's worth.
  std::uint64_t packets_per_second = 0;
  std::uint64_t packet_burst = 0;
  std::uint64_t bytes_per_second = 0;
  std::uint64_t byte_burst = 0;

  /// For what is sent, answers too, by calls that say nothing else. A payload over `max_decompressed` is not
  /// compressed; a compressed one may be over `max_payload` before, but not on the wire.
  CompressionOptions compression = {};

  /// For requests that name no timeout of their own.
  std::chrono::milliseconds request_timeout{10'000};
  /// From accepting the connection to the end of its first whole packet.
  std::chrono::milliseconds first_packet_timeout{10'000};
  /// No packet either way; heartbeats are none.
  std::chrono::milliseconds idle_timeout{0};
  /// A heartbeat, for transports that have none of their own (WebSocket pings): an end that has sent nothing for that
  /// long sends an empty one-way packet of `heartbeat_biz_type`. Such packets are not handed to anybody, if both ends
  /// have this option; set it at both, to about the same. Not with a `biz_type` that the application uses.
  std::chrono::milliseconds heartbeat_interval{0};
  std::uint8_t heartbeat_biz_type = 255;
  /// The session ends with `Errc::peer_silent` when nothing has come for one interval more than that many. 1 to 1000.
  std::uint32_t max_missed_heartbeats = 2;
  /// A packet has begun to arrive, and no byte of it for this long.
  std::chrono::milliseconds read_stall_timeout{30'000};
  /// Something is to be written, and the peer takes no byte of it for this long.
  std::chrono::milliseconds write_stall_timeout{30'000};
  /// How long a session that ends may take to write what it had accepted and to hear the peer's end. Not zero.
  std::chrono::milliseconds close_timeout{5'000};

  /// Send small packets at once (TCP_NODELAY).
  bool no_delay = true;
  TcpKeepAlive tcp_keep_alive = {};
  /// Bytes that were sent, and not acknowledged by the peer's system for this long, lose the connection
  /// (TCP_USER_TIMEOUT), and probes that stay unanswered. Zero: as the system does.
  std::chrono::milliseconds tcp_user_timeout{0};
};

/// Names the first option that is out of its range, with its value; no error if none is.
[[nodiscard]] Error validate(const SessionOptions& options);
[[nodiscard]] Error validate(const OutboundLimits& limits);

}  // namespace msgtrans
