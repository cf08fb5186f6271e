// SPDX-License-Identifier: Apache-2.0
#include "connection_factory.hpp"

#include "websocket.hpp"

#include <msgtrans/protocol/session_protocol.hpp>
#include <string>
#include <string_view>
#include <utility>

namespace msgtrans::detail {

namespace {

/// What ALPN calls the protocol that a WebSocket handshake is spoken in.
constexpr std::string_view http = "http/1.1";

std::string_view alpn_of(Transport transport) noexcept {
  return is_websocket(transport) ? http : tls_protocol;
}

std::string path_of(const Endpoint& endpoint) {
  return endpoint.path.empty() ? "/" : endpoint.path;
}

/// As in an HTTP request: the port only if it is not the usual one.
std::string host_header(const Endpoint& target) {
  const bool usual = target.port == (is_encrypted(target.transport) ? 443 : 80);
  const std::string host = target.host.find(':') != std::string::npos ? "[" + target.host + "]" : target.host;
  return usual ? host : host + ":" + std::to_string(target.port);
}

}  // namespace

std::shared_ptr<const TlsContext> tls_context_for(const Endpoint& listener, const TlsServerOptions& options,
                                                  Error& error) {
  return TlsContext::server(options, error, alpn_of(listener.transport));
}

ConnectionFactory factory_for(const Endpoint& listener, const ListenOptions& options, const SessionOptions& session,
                              std::shared_ptr<TlsOfListener>& tls, Error& error) {
  if (is_encrypted(listener.transport)) {
    auto context = tls_context_for(listener, options.tls, error);
    if (!context) return {};
    tls = std::make_shared<TlsOfListener>(std::move(context));
  }
  if (!is_websocket(listener.transport)) {
    if (!tls) return {};
    return [tls](int socket) { return std::make_unique<TlsConnection>(socket, tls->get()); };
  }
  const auto websocket = std::make_shared<const WebSocketServerOptions>(options.websocket);
  return [tls, websocket, path = path_of(listener),
          limits = protocol::limits_of(session)](int socket) -> std::unique_ptr<Connection> {
    if (!tls) return WebSocketConnection::server(socket, websocket, path, limits);
    return WebSocketConnection::server(std::make_unique<TlsConnection>(socket, tls->get()), websocket, path, limits);
  };
}

ConnectionFactory factory_for(const Endpoint& target, const ClientOptions& options, TlsOfClient& tls, Error& error) {
  std::shared_ptr<const TlsContext> context;
  if (is_encrypted(target.transport)) {
    auto& kept = is_websocket(target.transport) ? tls.below_websocket : tls.plain;
    if (!kept) kept = TlsContext::client(options.tls, error, alpn_of(target.transport));
    if (!kept) return {};
    context = kept;
  }
  const std::string key = target.host + ":" + std::to_string(target.port);
  if (!is_websocket(target.transport)) {
    if (!context) return {};
    return [context, host = target.host, key](int socket) {
      return std::make_unique<TlsConnection>(socket, context, host, key);
    };
  }
  const auto websocket = std::make_shared<const WebSocketClientOptions>(options.websocket);
  return [context, websocket, target, key,
          limits = protocol::limits_of(options.session)](int socket) -> std::unique_ptr<Connection> {
    if (!context) {
      return WebSocketConnection::client(socket, websocket, host_header(target), path_of(target), limits);
    }
    return WebSocketConnection::client(std::make_unique<TlsConnection>(socket, context, target.host, key), websocket,
                                       host_header(target), path_of(target), limits);
  };
}

}  // namespace msgtrans::detail
