// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <initializer_list>
#include <memory>
#include <msgtrans/reconnect_options.hpp>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/session/session.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/statistics.hpp>
#include <msgtrans/transport/tls.hpp>
#include <msgtrans/transport/websocket.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace msgtrans {

namespace detail {
class Client;
using ConnectHandler = asio::any_completion_handler<void(error_code)>;

/// A message on its way by a client: straight to the session, unless the client keeps it.
struct RoutedCommand {
  OutgoingCommandPtr command;
  std::shared_ptr<Client> client;  // null: it does not
};
void start_send(RoutedCommand message, SendHandler handler);
void start_request(RoutedCommand request, ReplyHandler handler);
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
  /// Off by default. With a pool it must be: that replaces its connections itself.
  ReconnectOptions reconnect = {};
};

/// One connection to a server. May be connected again after it ended, by itself if `ClientOptions::reconnect` says so;
/// each connection is a new session. Thread safety and exceptions of handlers: as `ServerTransport`.
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
  /// Called exactly once for each connection that was made, before any message of it and before `connect` completes.
  /// What it sends, or asks, through the session or this client goes out before anything else: the place to say who one
  /// is and to subscribe again. Until it has returned, other threads are not connected yet. An exception ends the
  /// session with `handler_failed`.
  void on_connect(ClientConnectHandler handler);
  /// Called exactly once for each connection that was made, with the reason.
  void on_disconnect(DisconnectHandler handler);
  /// As `ServerTransport::on_writable`.
  void on_writable(WritableHandler handler);
  /// Called before each wait for an attempt to connect again. `close` may be called in it.
  void on_reconnecting(ReconnectHandler handler);
  /// Called when `ReconnectOptions::max_attempts` have failed, with the last error; what was kept has been dropped, and
  /// `connect` may be called again. Not if a call of `connect` still waits: that gets the error.
  void on_gave_up(GaveUpHandler handler);
  void on_error(ErrorHandler handler);
  /// As `ServerTransport::intercept_inbound` and `intercept_outbound`. \throws Exception with `wrong_state` once it has
  /// connected, as the setters of handlers do.
  template <std::invocable<InterceptedMessage&> F>
  void intercept_inbound(F f) {
    add_interceptor(true, detail::make_interceptor(std::move(f)));
  }
  template <std::invocable<InterceptedMessage&> F>
  void intercept_outbound(F f) {
    add_interceptor(false, detail::make_interceptor(std::move(f)));
  }

  /// Connects to a URL as `parse_url` takes it; blocks. Not from a handler (`blocking_on_shard`).
  /// \throws Exception: `invalid_address`, the system's error, `asio::error::timed_out`, `wrong_state` if connected or
  /// reconnecting, `asio::error::operation_aborted` if closed meanwhile.
  void connect(std::string_view url);
  /// Connects to the first of these that can be, one after the other, each within `connect_timeout`; the list is in the
  /// order of preference. The error is the last one's, its text has all. When the connection is lost, the whole list is
  /// used again (see `ReconnectOptions`). An URL that cannot be parsed refuses the call, as does an empty list.
  void connect(const std::vector<std::string>& urls);
  void connect(std::initializer_list<std::string_view> urls) { connect(list_of(urls)); }
  /// The same without exceptions.
  void connect(std::string_view url, Error& error);
  void connect(const std::vector<std::string>& urls, Error& error);
  void connect(std::initializer_list<std::string_view> urls, Error& error) { connect(list_of(urls), error); }
  /// Completes with `void(error_code)`. Cancellation (all types): connecting is given up.
  template <class CompletionToken>
  auto async_connect(std::string_view url, CompletionToken&& token) {
    return async_connect(std::vector<std::string>{std::string(url)}, std::forward<CompletionToken>(token));
  }
  template <class CompletionToken>
  auto async_connect(std::initializer_list<std::string_view> urls, CompletionToken&& token) {
    return async_connect(list_of(urls), std::forward<CompletionToken>(token));
  }
  template <class CompletionToken>
  auto async_connect(std::vector<std::string> urls, CompletionToken&& token) {
    return detail::asio::async_initiate<CompletionToken, void(error_code)>(
        [](auto handler, std::shared_ptr<detail::Client> client, const std::vector<std::string>& targets) {
          start_connect(client, targets, std::move(handler));
        },
        token, client_, std::move(urls));
  }

  [[nodiscard]] bool is_connected() const noexcept;
  /// The session while connected.
  [[nodiscard]] std::optional<Session> session() const;

  /// As the calls of `Session`; `closed` while not connected. With `ReconnectOptions::keep_packets`, messages are also
  /// taken while the client connects for the first time or again: `would_block` when no more may be kept, for which
  /// `async_send` waits. What was kept is sent in its order, before later messages. With `retry_requests`, so are
  /// requests.
  SendResult send(BytesView payload, const SendOptions& options = {});
  template <class CompletionToken>
  auto async_send(BytesView payload, const SendOptions& options, CompletionToken&& token) {
    return detail::asio::async_initiate<CompletionToken, void(error_code)>(
        [](auto handler, detail::RoutedCommand message) { detail::start_send(std::move(message), std::move(handler)); },
        token, route_send(payload, options));
  }
  template <class CompletionToken>
  auto async_request(BytesView payload, const RequestOptions& options, CompletionToken&& token) {
    return detail::asio::async_initiate<CompletionToken, void(error_code, Reply)>(
        [](auto handler, detail::RoutedCommand request) {
          detail::start_request(std::move(request), std::move(handler));
        },
        token, route_request(payload, options));
  }
  template <class CompletionToken>
  auto async_request(BytesView payload, CompletionToken&& token) {
    return async_request(payload, RequestOptions{}, std::forward<CompletionToken>(token));
  }
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options = {});
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options, Error& error);

  /// Writes what was accepted, then closes (see `Session::close`), and waits for the end; from a handler, and with an
  /// executor of your own, it does not wait. Ends connecting and reconnecting at once: what was kept is dropped and
  /// counted, a call of `connect` ends with `operation_aborted`. No effect otherwise. `Session::close` ends one
  /// connection only, which a client that reconnects then does.
  void close();

  /// Of the latest session.
  [[nodiscard]] SessionStats stats() const;
  /// Requests by outcome, and how long answers took, of all sessions.
  [[nodiscard]] RequestStats request_stats() const;
  /// Of the client, over all its sessions.
  [[nodiscard]] ClientStats client_stats() const;

 private:
  static std::vector<std::string> list_of(std::initializer_list<std::string_view> urls) {
    return {urls.begin(), urls.end()};
  }
  static void start_connect(const std::shared_ptr<detail::Client>& client, const std::vector<std::string>& urls,
                            detail::ConnectHandler handler);
  void add_interceptor(bool inbound, Interceptor interceptor);
  [[nodiscard]] detail::RoutedCommand route_send(BytesView payload, const SendOptions& options) const;
  [[nodiscard]] detail::RoutedCommand route_request(BytesView payload, const RequestOptions& options) const;

  std::shared_ptr<detail::Client> client_;
};

}  // namespace msgtrans
