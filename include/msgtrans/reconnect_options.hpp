// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <msgtrans/error.hpp>
#include <string>

namespace msgtrans {

class Session;

/// What a `ClientTransport` does about a connection that was lost. Nothing here is read while `enabled` is false.
/// An attempt tries each endpoint of the list once, in turn.
struct ReconnectOptions {
  bool enabled = false;

  /// Before the first attempt after a loss; at least 1 ms ...
  std::chrono::milliseconds initial_delay{100};
  /// ... before each further one so many times as long, 1 to 100 ...
  double factor = 1.6;
  /// ... but no longer than this, the jitter apart; at least `initial_delay`.
  std::chrono::milliseconds max_delay{30'000};
  /// Each delay is longer or shorter by up to this share of itself, by chance. 0 to 1.
  double jitter = 0.2;
  /// What that chance starts from; the same seed gives the same delays. 0: another one each time.
  std::uint64_t jitter_seed = 0;
  /// Attempts in a row that fail, or whose connection does not hold, before it is given up. 0: no limit.
  std::uint32_t max_attempts = 0;
  /// A connection that lasted that long has held: after it the delays begin anew, with the first endpoint. One that did
  /// not counts as a failed attempt, and the next attempt begins with the endpoint behind. 0: every connection holds.
  std::chrono::milliseconds reset_after{5'000};
  /// Whether the first connection is tried for like a lost one; if not, `connect` fails when its one attempt does.
  bool retry_first_connect = false;

  /// One-way messages that are kept while there is no connection, at most; 0: none, and `send` says `closed`. Strict.
  /// Up to 50 million.
  std::size_t keep_packets = 0;
  /// The same in bytes on the wire. 1 byte to 16 GiB.
  std::size_t keep_bytes = 1024 * 1024;

  /// Requests without an answer, at most, of which a copy is kept so that they are sent again over the next connection,
  /// each until its timeout; one more fails with `would_block`. The peer may get such a request more than once. 0: none
  /// is sent again, all fail with `connection_lost`. Strict. Up to 50 million.
  std::size_t retry_requests = 0;
  /// The same in bytes on the wire. 1 byte to 16 GiB.
  std::size_t retry_bytes = 1024 * 1024;
};

/// Names the first option that is out of its range, with its value; no error if none is.
[[nodiscard]] Error validate(const ReconnectOptions& options);

/// A connection that was made.
struct ConnectInfo {
  /// False for the first one since the call of `connect`.
  bool reconnection = false;
  /// As in `ReconnectEvent`; 0 if it was made by the call of `connect` at once.
  std::uint32_t attempt = 0;
  /// The endpoint, as it was given.
  std::string url = {};
};

/// An attempt that will be made.
struct ReconnectEvent {
  /// Its number, from 1, since a connection last held.
  std::uint32_t attempt = 0;
  /// After how long.
  std::chrono::milliseconds delay{0};
  /// Why: the loss of the connection, or what the attempt before failed with.
  Error error = {};
};

/// Called on the client's shard, as `MessageHandler`.
using ClientConnectHandler = std::function<void(Session&, const ConnectInfo&)>;
using ReconnectHandler = std::function<void(const ReconnectEvent&)>;
using GaveUpHandler = std::function<void(const Error& last)>;

/// A client's counters since it was made, over all its connections. Each is exact; the whole is not one instant's
/// picture.
struct ClientStats {
  std::uint64_t connections = 0;  ///< made
  std::uint64_t attempts = 0;  ///< begun, calls of `connect` included; each tries the endpoints until one can be used
  std::uint64_t tries = 0;     ///< of single endpoints: each a connection, a failure, or still under way
  std::uint64_t failures = 0;  ///< of these tries

  std::size_t kept_packets = 0;        ///< one-way messages that wait for a connection now
  std::size_t kept_bytes = 0;          ///< the same on the wire
  std::uint64_t kept_total = 0;        ///< ever kept: sent, dropped, or waiting
  std::uint64_t kept_dropped = 0;      ///< because the client was closed or gave up
  std::size_t retryable_requests = 0;  ///< unanswered requests with a copy for the next connection now
  std::size_t retryable_bytes = 0;     ///< the same on the wire
  std::uint64_t retried_requests = 0;  ///< sent again, each time counted

  std::uint64_t packets_in = 0;           ///< whole packets received
  std::uint64_t packets_out = 0;          ///< packets written whole
  std::uint64_t bytes_in = 0;             ///< bytes received
  std::uint64_t bytes_out = 0;            ///< bytes written
  std::uint64_t dropped_at_close = 0;     ///< packets a connection had accepted, but not written when it ended
  std::uint64_t dropped_inbound = 0;      ///< whole packets read, but not handed out when a connection ended
  std::uint64_t dropped_oldest = 0;       ///< packets dropped by `SlowConsumer::drop_oldest`
  std::uint64_t requests = 0;             ///< sent, each time counted
  std::uint64_t requests_timed_out = 0;   ///< of those
  std::uint64_t unmatched_responses = 0;  ///< late, duplicate and forged answers, dropped
  std::uint64_t handler_failures = 0;     ///< exceptions that handlers threw
};

}  // namespace msgtrans
