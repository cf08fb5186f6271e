// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <msgtrans/error.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace msgtrans {

/// permessage-deflate (RFC 7692): messages are compressed between the two ends, and neither has to know more of it than
/// that. Each message stands for itself (no context takeover, in both directions), so a session at rest holds nothing
/// for it; one in the middle of receiving a compressed message holds 40 KiB. Each thread keeps, besides, one compressor
/// of at most 268 KiB, and 40 KiB for the next message that comes. A message that inflates to more than the packet it
/// must be, or to one over the limits, ends the session before memory is taken for it.
///
/// Sent compressed is a message that gets smaller by it, unless its payload is compressed already
/// (`CompressionOptions`) or it has more than 512 KiB; what the socket does not take at once of such a one is kept
/// besides the queue. It is done on the shard's thread, for each receiver of a
/// broadcast anew. As with TLS, who can have text of his own sent in one message with a secret, and sees how long it
/// gets, can find out the secret.
struct WebSocketDeflateOptions {
  /// Messages of fewer bytes, the 16 of the header among them, are sent as they are.
  std::uint32_t threshold = 512;
  /// zlib's, 1 to 9; 0: its default, 6.
  int level = 0;
  /// Of the window that this end compresses with, 9 to 15; the peer may ask for less. A peer that asks for 8, with
  /// which zlib cannot compress, is sent nothing compressed.
  int window_bits = 15;
};

/// How a server takes WebSocket connections. Checked by the call that takes them. The endpoint names the one path there
/// is, requests for others are answered with 404; what follows a `?` is not looked at.
struct WebSocketServerOptions {
  /// Agreed on with a client that offers it; empty: with none. Clients that offer none, or only others, are taken
  /// without one.
  std::string subprotocol = "msgtrans";
  /// Says whether a page from there may connect; false is answered with 403. Given the request's Origin header, or an
  /// empty text if there is none: browsers always send it, other programs seldom. Empty: all are taken, so any page
  /// that a user's browser shows may connect in that user's name. Called on a shard's thread, for several connections
  /// at once; what it throws is answered with 500.
  std::function<bool(std::string_view origin)> check_origin = {};
  /// Largest head of a request, in bytes; a longer one is answered with 431. 256 bytes to 64 KiB.
  std::size_t max_header = 8 * 1024;
  /// How often the peer is asked with a ping. Zero is off.
  std::chrono::milliseconds ping_interval{30'000};
  /// The session ends when that many pings in a row were followed by nothing for an interval. 1 to 1000.
  std::uint32_t max_missed_pings = 2;
  /// Agreed on with a client that offers it; empty: with none.
  std::optional<WebSocketDeflateOptions> deflate = {};
};

/// How a client makes WebSocket connections. Checked by the call that takes them.
struct WebSocketClientOptions {
  /// Offered to the server, which need not take it; empty: none is offered.
  std::string subprotocol = "msgtrans";
  /// The Origin header; empty: none is sent.
  std::string origin = {};
  /// Further headers of the request, say `{"Authorization", "Bearer ..."}`: names and values. Not those of the
  /// handshake itself.
  std::vector<std::pair<std::string, std::string>> headers = {};
  /// Largest head of an answer, in bytes. 256 bytes to 64 KiB.
  std::size_t max_header = 8 * 1024;
  /// As for a server.
  std::chrono::milliseconds ping_interval{30'000};
  std::uint32_t max_missed_pings = 2;
  /// Offered to the server, which need not take it; empty: it is not offered.
  std::optional<WebSocketDeflateOptions> deflate = {};
};

/// Names the first option that is out of its range, with its value; no error if none is.
[[nodiscard]] Error validate(const WebSocketServerOptions& options);
[[nodiscard]] Error validate(const WebSocketClientOptions& options);

}  // namespace msgtrans
