// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <msgtrans/bytes_view.hpp>
#include <msgtrans/compression_options.hpp>
#include <msgtrans/error.hpp>
#include <optional>

namespace msgtrans {

/// What became of a message at once. Whatever is not `queued` was not taken: the payload stays the caller's.
enum class SendResult : std::uint8_t {
  queued,       ///< accepted: it is written, or counted as dropped if the session ends before it could be
  would_block,  ///< the outbound queue has no room; `async_send` waits for it
  too_large,    ///< the payload is on the wire over `SessionOptions::max_payload`, or the extension header over
                ///< `max_extension`
  closed,       ///< the session has ended or is ending
  not_found,    ///< no session has that id; for `respond`: this message awaits no answer (any more)
  rejected,     ///< an interceptor rejected it
};

/// The same as an error: none for `queued`.
[[nodiscard]] inline error_code make_error_code(SendResult result) noexcept {
  switch (result) {
    case SendResult::queued: return {};
    case SendResult::would_block: return Errc::would_block;
    case SendResult::too_large: return Errc::too_large;
    case SendResult::closed: return Errc::closed;
    case SendResult::not_found: return Errc::not_found;
    case SendResult::rejected: return Errc::rejected;
  }
  return Errc::closed;
}

[[nodiscard]] inline const char* to_string(SendResult result) noexcept {
  switch (result) {
    case SendResult::queued: return "queued";
    case SendResult::would_block: return "would_block";
    case SendResult::too_large: return "too_large";
    case SendResult::closed: return "closed";
    case SendResult::not_found: return "not_found";
    case SendResult::rejected: return "rejected";
  }
  return "?";
}

/// What goes out beside the payload.
struct SendOptions {
  /// The application's own kind of message.
  std::uint8_t biz_type = 0;
  /// Extension header: route tags, trace ids, metadata; never compressed. At most `SessionOptions::max_extension`
  /// bytes.
  BytesView extension = {};
  /// Overtakes what is queued with normal priority, through a budget of its own; sets the wire flag.
  bool high_priority = false;
  /// Tells the receiver that the extension header holds a route tag (a wire flag).
  bool route_tag = false;
  /// Instead of `SessionOptions::compression`; `no_compression` sends it as it is. A level out of its range is taken
  /// for the nearest that is not.
  std::optional<CompressionOptions> compression = {};
  /// Of `async_send`: how long to wait for room in the session's queue; zero: for ever. The others do not wait. Not for
  /// a place among what a client keeps while it is not connected (`ReconnectOptions`): that wait ends with the client's
  /// trying.
  std::chrono::milliseconds timeout{0};
};

struct RequestOptions {
  std::uint8_t biz_type = 0;
  BytesView extension = {};
  bool high_priority = false;
  bool route_tag = false;
  /// How long to wait for room in the queue and for the answer together; unset: `SessionOptions::request_timeout`;
  /// zero: for ever.
  std::optional<std::chrono::milliseconds> timeout = {};
  /// Tells the peer what is left of the timeout when the request goes out, in 8 bytes before `extension`; the peer's
  /// `Message::told_timeout` reads them. For peers that know of it.
  bool tell_timeout = false;
  /// As `SendOptions::compression`.
  std::optional<CompressionOptions> compression = {};
};

/// What became of a broadcast; the three add up to the sessions that were visited.
struct BroadcastResult {
  std::size_t queued = 0;   ///< accepted, in the same sense as `SendResult::queued`
  std::size_t dropped = 0;  ///< not accepted: the session's queue was full
  std::size_t refused = 0;  ///< not accepted: the session is ending, or the payload is over its limit
};

}  // namespace msgtrans
