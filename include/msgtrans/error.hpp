// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/system/error_code.hpp>
#include <boost/system/system_error.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

namespace msgtrans {

using boost::system::error_code;

/// What can go wrong, and why a session ended. Errors of the operating system and of Asio keep their own categories
/// (`boost::system::system_category()`, `boost::asio::error::...`); a cancelled operation ends with
/// `boost::asio::error::operation_aborted`, as everywhere in Asio.
enum class Errc {
  // The peer broke the wire protocol: the session ends, `Error::text` names the field and the value.
  bad_version = 1,         ///< header byte 0 is not 1
  bad_compression,         ///< header byte 1 is not a known codec
  bad_type,                ///< header byte 2 is not one-way, request or response
  fragmented,              ///< the reserved fragment flag is set
  extension_too_large,     ///< ext_len is over the limit
  payload_too_large,       ///< payload_len is over the limit
  decompressed_too_large,  ///< the payload grows over the limit when decompressed
  decompression_failed,    ///< the payload is not what its codec byte says
  websocket_violation,     ///< a WebSocket frame breaks RFC 6455, or a message is not exactly one binary packet

  // A message was not taken, or not answered.
  would_block,      ///< the outbound queue is full; the payload stays the caller's
  too_large,        ///< the payload or the extension header is over the limit for sending
  closed,           ///< the session or channel has ended or is ending
  not_found,        ///< no session has that id
  request_timeout,  ///< no answer within the request's time
  connection_lost,  ///< the connection ended before the answer came
  no_answer,        ///< whoever was asked dropped the question
  rejected,         ///< an interceptor of this end rejected it

  // Why a session ended.
  closed_by_peer,        ///< the peer closed between two packets
  truncated,             ///< the peer closed in the middle of a packet
  closed_by_user,        ///< close() was called at this end
  refused,               ///< on_connect refused it
  first_packet_timeout,  ///< connected, but no whole packet came in time
  handshake_timeout,     ///< connected, but TLS or WebSocket was not agreed upon in time
  handshake_failed,      ///< TLS or WebSocket could not be agreed upon; the text says why
  idle_timeout,          ///< no packet either way for the idle time
  peer_silent,           ///< nothing came from the peer, not even heartbeats
  read_stalled,          ///< the peer began a packet and sent no byte of it for the stall deadline
  write_stalled,         ///< the peer took no byte for the stall deadline
  send_timeout,          ///< the outbound queue had no room in time
  slow_consumer,         ///< its outbound queue was full and the policy says close
  handler_failed,        ///< a handler threw; the text is the exception's
  actor_failed,          ///< its actor threw, and was not started again; the text is the exception's
  stopping,              ///< it was drained, or the server or client stops; all queued and pending was finished
  drain_expired,         ///< the same, but something was cut at the end of the drain time
  too_many_sessions,     ///< a limit on sessions was reached
  rate_limited,          ///< more came, in all or from that address, than its rate lets in
  admission_timeout,     ///< on_connect had not decided in time

  // A call that cannot be carried out; nothing was changed.
  invalid_option,     ///< an option is out of its range; the text names it
  invalid_address,    ///< an address or URL cannot be parsed; the text shows it
  not_supported,      ///< this build or platform has no such transport
  wrong_state,        ///< already started, stopped, or not yet started
  too_many_groups,    ///< the session is in as many groups as it may be
  blocking_on_shard,  ///< a blocking call was made on a thread that must not block
};

/// The category of `Errc`, named "msgtrans".
[[nodiscard]] inline const boost::system::error_category& error_category() noexcept;

[[nodiscard]] inline error_code make_error_code(Errc e) noexcept {
  return {static_cast<int>(e), error_category()};
}

/// The enumerator's name, for logs and statistics; "?" if it is none. What it means for people is its message.
[[nodiscard]] constexpr const char* to_string(Errc e) noexcept;

/// An error code and, beside it, text that names what was wrong: field, value, limit, peer.
/// `text` may hold what a peer sent; treat it as untrusted when you print it.
struct Error {
  error_code code;
  std::string text;

  Error() = default;
  Error(error_code c, std::string t = {}) : code(c), text(std::move(t)) {}
  Error(Errc e, std::string t = {}) : code(make_error_code(e)), text(std::move(t)) {}

  /// True if this is an error.
  explicit operator bool() const noexcept { return code.failed(); }
  /// `text` if there is some, else the code's own message.
  [[nodiscard]] std::string message() const { return text.empty() ? code.message() : text; }
};

/// What the throwing forms throw: `code()` is the code, `what()` the error's message.
class Exception : public boost::system::system_error {
 public:
  explicit Exception(const Error& error) : boost::system::system_error(error.code), message_(error.message()) {}

  [[nodiscard]] const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

/// True if the peer broke the wire protocol (the first group of `Errc`).
[[nodiscard]] inline bool is_protocol_error(const error_code& code) noexcept {
  return code.category() == error_category() && code.value() >= static_cast<int>(Errc::bad_version) &&
         code.value() <= static_cast<int>(Errc::websocket_violation);
}

/// True if the same call may succeed later on the same session: the queue was full, or the answer was late.
[[nodiscard]] inline bool is_retryable(const error_code& code) noexcept {
  return code == make_error_code(Errc::would_block) || code == make_error_code(Errc::request_timeout);
}

/// True if the session that reported it cannot be used any more. A cancelled operation leaves it as it was.
[[nodiscard]] inline bool is_fatal(const error_code& code) noexcept;

}  // namespace msgtrans

template <>
struct boost::system::is_error_code_enum<msgtrans::Errc> : std::true_type {};

#include <msgtrans/detail/error_impl.hpp>
