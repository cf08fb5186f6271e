// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/system/error_category.hpp>
#include <msgtrans/error.hpp>
#include <string>

namespace msgtrans {
namespace detail {

class ErrorCategory final : public boost::system::error_category {
 public:
  constexpr ErrorCategory() noexcept : boost::system::error_category(0x8f1c4d2e6b7a9035ULL) {}

  const char* name() const noexcept override { return "msgtrans"; }

  std::string message(int value) const override { return text(static_cast<Errc>(value)); }

  char const* message(int value, char*, std::size_t) const noexcept override { return text(static_cast<Errc>(value)); }

 private:
  static const char* text(Errc e) noexcept {
    switch (e) {
      case Errc::bad_version: return "unknown protocol version";
      case Errc::bad_compression: return "unknown compression";
      case Errc::bad_type: return "unknown packet type";
      case Errc::fragmented: return "reserved fragment flag set";
      case Errc::extension_too_large: return "extension header too large";
      case Errc::payload_too_large: return "payload too large";
      case Errc::decompressed_too_large: return "decompressed payload too large";
      case Errc::decompression_failed: return "payload does not decompress";
      case Errc::websocket_violation: return "WebSocket protocol broken";
      case Errc::would_block: return "outbound queue full";
      case Errc::too_large: return "message too large to send";
      case Errc::closed: return "session closed";
      case Errc::not_found: return "no such session";
      case Errc::request_timeout: return "request timed out";
      case Errc::connection_lost: return "connection lost before the answer";
      case Errc::no_answer: return "nobody answered";
      case Errc::rejected: return "rejected by an interceptor";
      case Errc::closed_by_peer: return "closed by peer";
      case Errc::truncated: return "closed by peer inside a packet";
      case Errc::closed_by_user: return "closed by this end";
      case Errc::refused: return "refused";
      case Errc::first_packet_timeout: return "no first packet in time";
      case Errc::handshake_timeout: return "no handshake in time";
      case Errc::handshake_failed: return "handshake failed";
      case Errc::idle_timeout: return "idle for too long";
      case Errc::peer_silent: return "peer is silent";
      case Errc::read_stalled: return "peer stopped inside a packet";
      case Errc::write_stalled: return "peer stopped reading";
      case Errc::send_timeout: return "no room in time";
      case Errc::slow_consumer: return "slow consumer";
      case Errc::handler_failed: return "handler failed";
      case Errc::actor_failed: return "actor failed";
      case Errc::stopping: return "stopping";
      case Errc::drain_expired: return "cut at the end of the drain time";
      case Errc::too_many_sessions: return "too many sessions";
      case Errc::rate_limited: return "over the rate limit";
      case Errc::admission_timeout: return "not admitted in time";
      case Errc::invalid_option: return "invalid option";
      case Errc::invalid_address: return "invalid address";
      case Errc::not_supported: return "not supported";
      case Errc::wrong_state: return "wrong state for this call";
      case Errc::too_many_groups: return "too many groups";
      case Errc::blocking_on_shard: return "blocking call on a thread that must not block";
    }
    return "unknown msgtrans error";
  }
};

// constant-initialised: usable before main and after static destruction
inline constexpr ErrorCategory error_category_instance;

}  // namespace detail

inline const boost::system::error_category& error_category() noexcept {
  return detail::error_category_instance;
}

constexpr const char* to_string(Errc e) noexcept {
  switch (e) {
    case Errc::bad_version: return "bad_version";
    case Errc::bad_compression: return "bad_compression";
    case Errc::bad_type: return "bad_type";
    case Errc::fragmented: return "fragmented";
    case Errc::extension_too_large: return "extension_too_large";
    case Errc::payload_too_large: return "payload_too_large";
    case Errc::decompressed_too_large: return "decompressed_too_large";
    case Errc::decompression_failed: return "decompression_failed";
    case Errc::websocket_violation: return "websocket_violation";
    case Errc::would_block: return "would_block";
    case Errc::too_large: return "too_large";
    case Errc::closed: return "closed";
    case Errc::not_found: return "not_found";
    case Errc::request_timeout: return "request_timeout";
    case Errc::connection_lost: return "connection_lost";
    case Errc::no_answer: return "no_answer";
    case Errc::rejected: return "rejected";
    case Errc::closed_by_peer: return "closed_by_peer";
    case Errc::truncated: return "truncated";
    case Errc::closed_by_user: return "closed_by_user";
    case Errc::refused: return "refused";
    case Errc::admission_timeout: return "admission_timeout";
    case Errc::first_packet_timeout: return "first_packet_timeout";
    case Errc::handshake_timeout: return "handshake_timeout";
    case Errc::handshake_failed: return "handshake_failed";
    case Errc::idle_timeout: return "idle_timeout";
    case Errc::peer_silent: return "peer_silent";
    case Errc::read_stalled: return "read_stalled";
    case Errc::write_stalled: return "write_stalled";
    case Errc::send_timeout: return "send_timeout";
    case Errc::slow_consumer: return "slow_consumer";
    case Errc::handler_failed: return "handler_failed";
    case Errc::actor_failed: return "actor_failed";
    case Errc::stopping: return "stopping";
    case Errc::drain_expired: return "drain_expired";
    case Errc::too_many_sessions: return "too_many_sessions";
    case Errc::rate_limited: return "rate_limited";
    case Errc::too_many_groups: return "too_many_groups";
    case Errc::invalid_option: return "invalid_option";
    case Errc::invalid_address: return "invalid_address";
    case Errc::not_supported: return "not_supported";
    case Errc::wrong_state: return "wrong_state";
    case Errc::blocking_on_shard: return "blocking_on_shard";
  }
  return "?";
}

inline bool is_fatal(const error_code& code) noexcept {
  if (!code.failed() || is_retryable(code)) return false;
  if (code == boost::system::errc::operation_canceled) return false;
  if (code.category() != error_category()) return true;
  switch (static_cast<Errc>(code.value())) {
    case Errc::too_large:
    case Errc::no_answer:
    case Errc::rejected:
    case Errc::send_timeout:
    case Errc::invalid_option:
    case Errc::invalid_address:
    case Errc::not_supported:
    case Errc::wrong_state:
    case Errc::too_many_groups:
    case Errc::blocking_on_shard: return false;
    default: return true;
  }
}

}  // namespace msgtrans
