// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <memory>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/session/session.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/statistics.hpp>
#include <msgtrans/transport/tls.hpp>
#include <msgtrans/transport/websocket.hpp>
#include <optional>
#include <string_view>
#include <utility>

namespace msgtrans {

namespace detail {
class Client;
using ConnectHandler = asio::any_completion_handler<void(error_code)>;
}  // namespace detail

/// Checked by the constructor of `ClientTransport`.
struct ClientOptions {
  /// Your own executor, under the same conditions as `ServerOptions::executors`; then no thread is started, and many
  /// clients may share it. None: one thread of its own.
  detail::asio::any_io_executor executor = {};
  /// Looking up the name, connecting and what the transport has to agree on, together. Zero: no limit of ours.
  std::chrono::milliseconds connect_timeout{10'000};
  /// Of `tls://` and `wss://`. Files are read by the first connect that needs them.
  TlsClientOptions tls = {};
  /// Of `ws://` and `wss://`.
  WebSocketClientOptions websocket = {};
  /// A server need not speak first, so there is no first-packet deadline by default.
  SessionOptions session = {.first_packet_timeout = std::chrono::milliseconds{0}};
};

/// One connection to a server. May be connected again after it ended; each connection is a new session.
/// Thread safety and exceptions of handlers: as `ServerTransport`.
class ClientTransport {
 public:
  /// \throws Exception with `Errc::invalid_option`.
  explicit ClientTransport(ClientOptions options = {});
  /// Cuts the connection (call `close` first to have everything queued written). When it has returned no handler runs;
  /// from a handler: no further handler is called.
  ~ClientTransport();
  ClientTransport(const ClientTransport&) = delete;
  ClientTransport& operator=(const ClientTransport&) = delete;

  /// Called for each request and one-way message of the server. Set before connecting (`wrong_state`).
  void on_message(MessageHandler handler);
  /// Called exactly once for each connection that was made, with the reason.
  void on_disconnect(DisconnectHandler handler);
  /// As `ServerTransport::on_writable`.
  void on_writable(WritableHandler handler);
  void on_error(ErrorHandler handler);

  /// Connects to a URL as `parse_url` takes it; blocks. Not from a handler (`blocking_on_shard`).
  /// \throws Exception: `invalid_address`, the system's error, `asio::error::timed_out`, `wrong_state` if connected.
  void connect(std::string_view url);
  /// The same without exceptions.
  void connect(std::string_view url, Error& error);
  /// Completes with `void(error_code)`. Cancellation (all types): the attempt is given up.
  template <class CompletionToken>
  auto async_connect(std::string_view url, CompletionToken&& token) {
    return detail::asio::async_initiate<CompletionToken, void(error_code)>(
        [](auto handler, std::shared_ptr<detail::Client> client, std::string target) {
          start_connect(client, target, std::move(handler));
        },
        token, client_, std::string(url));
  }

  [[nodiscard]] bool is_connected() const noexcept;
  /// The session while connected.
  [[nodiscard]] std::optional<Session> session() const;

  /// As the calls of `Session`; `closed` while not connected.
  SendResult send(BytesView payload, const SendOptions& options = {});
  template <class CompletionToken>
  auto async_send(BytesView payload, const SendOptions& options, CompletionToken&& token) {
    return detail::async_send(current(), home(), payload, options, std::forward<CompletionToken>(token));
  }
  template <class CompletionToken>
  auto async_request(BytesView payload, const RequestOptions& options, CompletionToken&& token) {
    return detail::async_request(current(), home(), payload, options, std::forward<CompletionToken>(token));
  }
  template <class CompletionToken>
  auto async_request(BytesView payload, CompletionToken&& token) {
    return detail::async_request(current(), home(), payload, RequestOptions{}, std::forward<CompletionToken>(token));
  }
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options = {});
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options, Error& error);

  /// Writes what was accepted, then closes (see `Session::close`), and waits for the end; from a handler, and with an
  /// executor of your own, it does not wait. No effect while not connected.
  void close();

  /// Of the latest connection.
  [[nodiscard]] SessionStats stats() const;
  /// Requests by outcome, and how long answers took, of all connections.
  [[nodiscard]] RequestStats request_stats() const;

 private:
  static void start_connect(const std::shared_ptr<detail::Client>& client, const std::string& url,
                            detail::ConnectHandler handler);
  [[nodiscard]] detail::SessionPtr current() const;
  [[nodiscard]] detail::Home home() const;

  std::shared_ptr<detail::Client> client_;
};

}  // namespace msgtrans
