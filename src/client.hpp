// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "connection_factory.hpp"
#include "session_state.hpp"
#include "shard.hpp"

#include <atomic>
#include <condition_variable>
#include <msgtrans/client_transport.hpp>
#include <mutex>
#include <optional>

namespace msgtrans::detail {

/// Names the first option of a connection that is out of its range: of its session, of TLS and of WebSocket.
[[nodiscard]] Error validate_connection(const ClientOptions& options);

/// What `ClientTransport` refers to; outlives it while its shard still finishes.
class Client final : public SessionHost, public std::enable_shared_from_this<Client> {
 public:
  using Connected = asio::any_completion_handler<void(Error)>;

  explicit Client(ClientOptions options);
  ~Client() override;

  struct Target {
    Endpoint endpoint;
    ConnectionFactory make_connection;
  };

  /// Claims the client for one `connect`; nothing, and why, if that cannot be.
  [[nodiscard]] std::optional<Target> begin_connect(std::string_view url, Error& error);
  /// After it: `connected` is called on the shard, later.
  void connect(Target target, asio::cancellation_slot slot, Connected connected);
  void connect_and_wait(std::string_view url, Error& error);
  /// Once, before anything else: starts the shard's thread.
  void start();
  void close();
  void cut();

  [[nodiscard]] const std::shared_ptr<Shard>& shard() const noexcept { return shard_; }
  /// Null while not connected.
  [[nodiscard]] SessionPtr current() const;
  [[nodiscard]] SessionStats stats() const;

  template <class Handler>
  void set(Handler Client::*member, Handler handler) {
    const std::lock_guard lock(mutex_);
    if (state_ != State::idle) throw Exception(Error(Errc::wrong_state, "handlers are set before connect()"));
    this->*member = std::move(handler);
  }

  MessageHandler on_message;
  WritableHandler on_writable;
  DisconnectHandler on_disconnect;
  ErrorHandler on_error;

  // SessionHost
  void message(Session& session, const Message& message) override { on_message(session, message); }
  [[nodiscard]] bool handles_messages() const noexcept override { return on_message && !silent_.load(); }
  void writable(Session& session) override {
    if (on_writable && !silent_.load()) on_writable(session);
  }
  void ended(SessionState& state, const Error& reason) noexcept override;
  void failed(const ErrorEvent& event) noexcept override;

  /// No handler is called any more; waits for those that run, unless this is called by one.
  void silence() noexcept;

 private:
  enum class State : std::uint8_t { idle, connecting, connected, cut };

  class Attempt;

  void abandoned();
  void settle_attempt(Error error, Connected connected);
  void established(Link link, Peer peer, Error& error);

  const ClientOptions options_;
  const std::shared_ptr<const SessionOptions> session_options_;
  std::shared_ptr<Shard> shard_;
  TlsOfClient tls_;  // of whoever connects

  std::atomic<bool> silent_{false};
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  State state_ = State::idle;
  bool shard_finished_ = false;
  SessionPtr session_;                // the latest
  SessionId last_ended_;              // of its sessions, which come one after the other
  std::shared_ptr<Attempt> attempt_;  // on the shard
};

}  // namespace msgtrans::detail
