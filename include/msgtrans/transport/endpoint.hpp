// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <iosfwd>
#include <msgtrans/error.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace msgtrans {

/// The transports that this version has.
enum class Transport : std::uint8_t {
  tcp,
  tls,
  unix_socket,
  websocket,
  websocket_tls,
  in_process,
  custom,  ///< one that was registered, see `register_transport`
};

/// All that the library brings along.
inline constexpr std::array transports{Transport::tcp,       Transport::tls,           Transport::unix_socket,
                                       Transport::websocket, Transport::websocket_tls, Transport::in_process};

/// As in a URL: `tcp`, `tls`, `unix`, `ws`, `wss`, `inproc`; `custom`, where the endpoint names the scheme.
[[nodiscard]] std::string_view to_string(Transport transport) noexcept;

/// Where to listen, or whom to connect to.
struct Endpoint {
  Transport transport = Transport::tcp;
  /// A numeric IPv4 or IPv6 address (without brackets), or a name to look up.
  std::string host = {};
  /// 0 lets the system choose when listening.
  std::uint16_t port = 0;
  /// Of a Unix socket: its file, or `@name` in the abstract namespace, which has no files. Empty for a peer that has
  /// bound its socket to none, as clients do. Of WebSocket: what the request is for, `/` or `/path?query`. In process:
  /// the server's name, or `name#n` for the n-th connection to one. Of a custom transport: its address.
  std::string path = {};
  /// Of a custom transport; registered, and so for the rest of the process.
  std::string_view scheme = {};

  /// `127.0.0.1:8001`, `[::1]:8001`, `/run/server.sock`, `127.0.0.1:8002/chat`, `name`.
  [[nodiscard]] std::string to_string() const;
  /// `tcp://127.0.0.1:8001`, `unix:///run/server.sock`, `ws://127.0.0.1:8002/chat`, `inproc://name`.
  [[nodiscard]] std::string url() const;

  friend bool operator==(const Endpoint&, const Endpoint&) = default;
};

/// Whether that transport is TLS, or goes over it.
[[nodiscard]] constexpr bool is_encrypted(Transport transport) noexcept {
  return transport == Transport::tls || transport == Transport::websocket_tls;
}
/// Whether that transport is WebSocket, with or without TLS.
[[nodiscard]] constexpr bool is_websocket(Transport transport) noexcept {
  return transport == Transport::websocket || transport == Transport::websocket_tls;
}

std::ostream& operator<<(std::ostream& out, const Endpoint& endpoint);

/// `host:port` as a TCP endpoint: `127.0.0.1:8001`, `[::1]:0`, `localhost:8001`.
/// \throws Exception with `Errc::invalid_address` that shows what was given.
[[nodiscard]] Endpoint tcp(std::string_view host_and_port);
/// The same for TLS.
[[nodiscard]] Endpoint tls(std::string_view host_and_port);
/// The same for WebSocket, where `host:port/path` takes a path.
[[nodiscard]] Endpoint websocket(std::string_view host_and_port);
/// The same over TLS.
[[nodiscard]] Endpoint websocket_tls(std::string_view host_and_port);

/// A file, at most 107 bytes, or `@name` in the abstract namespace.
/// \throws Exception with `Errc::invalid_address` that shows what was given.
[[nodiscard]] Endpoint unix_socket(std::string_view path);

/// A name for a server within this process: printable, without spaces and `#`.
/// \throws Exception with `Errc::invalid_address` that shows what was given.
[[nodiscard]] Endpoint in_process(std::string_view name);

/// Of the transport that was registered for that scheme.
/// \throws Exception with `Errc::invalid_address` if there is none.
[[nodiscard]] Endpoint custom(std::string_view scheme, std::string_view address);

/// `tcp://host:port`, `tls://host:port`, `unix://path`, `unix://@name`, `ws://host:port/path`, `wss://host:port/path`,
/// `inproc://name`, `scheme://address` of what was registered; the path of WebSocket's may be left out, and their port,
/// which is 80 or 443 then. On failure empty, and `error` says what is wrong with which part.
[[nodiscard]] std::optional<Endpoint> parse_url(std::string_view url, Error& error);

}  // namespace msgtrans
