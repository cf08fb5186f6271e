// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <iosfwd>
#include <msgtrans/error.hpp>
#include <optional>
#include <string>
#include <string_view>

namespace msgtrans {

/// The transports that this version has.
enum class Transport : std::uint8_t { tcp, unix_socket };

[[nodiscard]] std::string_view to_string(Transport transport) noexcept;

/// Where to listen, or whom to connect to.
struct Endpoint {
  Transport transport = Transport::tcp;
  /// A numeric IPv4 or IPv6 address (without brackets), or a name to look up.
  std::string host = {};
  /// 0 lets the system choose when listening.
  std::uint16_t port = 0;
  /// Of a Unix socket: its file, or `@name` in the abstract namespace, which has no files. Empty for a peer that has
  /// bound its socket to none, as clients do.
  std::string path = {};

  /// `127.0.0.1:8001`, `[::1]:8001`, `/run/server.sock`.
  [[nodiscard]] std::string to_string() const;
  /// `tcp://127.0.0.1:8001`, `unix:///run/server.sock`.
  [[nodiscard]] std::string url() const;

  friend bool operator==(const Endpoint&, const Endpoint&) = default;
};

std::ostream& operator<<(std::ostream& out, const Endpoint& endpoint);

/// `host:port` as a TCP endpoint: `127.0.0.1:8001`, `[::1]:0`, `localhost:8001`.
/// \throws Exception with `Errc::invalid_address` that shows what was given.
[[nodiscard]] Endpoint tcp(std::string_view host_and_port);

/// A file, at most 107 bytes, or `@name` in the abstract namespace.
/// \throws Exception with `Errc::invalid_address` that shows what was given.
[[nodiscard]] Endpoint unix_socket(std::string_view path);

/// `tcp://host:port`, `unix://path`, `unix://@name`. On failure empty, and `error` says what is wrong with which part.
[[nodiscard]] std::optional<Endpoint> parse_url(std::string_view url, Error& error);

}  // namespace msgtrans
