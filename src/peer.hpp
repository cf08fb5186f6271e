// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/asio/ip/tcp.hpp>
#include <cstdint>
#include <msgtrans/detail/asio.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <msgtrans/transport/peer_credentials.hpp>
#include <string>

namespace msgtrans::detail {

/// Who is at the other end of a socket.
struct Peer {
  Transport transport = Transport::tcp;
  asio::ip::tcp::endpoint address = {};  // unless it is a Unix socket
  PeerCredentials credentials = {};      // if it is
  std::uint32_t listener = 0;            // of the server, by which it came
  std::string path = {};                 // unless it has an address; empty if that end has no name
  std::string_view scheme = {};          // of a custom transport

  [[nodiscard]] bool has_address() const noexcept {
    return transport != Transport::unix_socket && transport != Transport::in_process && transport != Transport::custom;
  }
  [[nodiscard]] Endpoint endpoint() const {
    if (!has_address()) return {.transport = transport, .path = path, .scheme = scheme};
    return {.transport = transport, .host = address.address().to_string(), .port = address.port()};
  }
  /// For people: the address, or the name of the socket or else of the process.
  [[nodiscard]] std::string to_string() const {
    if (transport == Transport::in_process || transport == Transport::custom) return endpoint().url();
    if (has_address() || !path.empty()) return endpoint().to_string();
    return "process " + std::to_string(credentials.process) + " of user " + std::to_string(credentials.user);
  }
};

}  // namespace msgtrans::detail
