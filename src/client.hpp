// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "connection_factory.hpp"
#include "session_state.hpp"
#include "shard.hpp"

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <msgtrans/client_transport.hpp>
#include <msgtrans/detail/clock.hpp>
#include <msgtrans/protocol/backoff.hpp>
#include <msgtrans/protocol/counter.hpp>
#include <msgtrans/protocol/outbound_budget.hpp>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace msgtrans::detail {

/// Names the first option of a connection that is out of its range: of its session, of TLS and of WebSocket.
[[nodiscard]] Error validate_connection(const ClientOptions& options);

/// What `ClientTransport` refers to; outlives it while its shard still finishes.
///
/// From a call of `connect` to the end of what came of it, with all reconnections, is a series. One-way messages that
/// are kept for a connection (`ReconnectOptions::keep_packets`) lie in two lanes, as in a session's queue; once
/// there is a connection, the first of each lane is offered to it, as a copy that waits for room there, until the
/// lane is empty. So none is lost with a connection that had not accepted it, and later ones stay behind.
class Client final : public SessionHost, public std::enable_shared_from_this<Client> {
 public:
  using Connected = asio::any_completion_handler<void(Error)>;

  explicit Client(ClientOptions options);
  ~Client() override;

  struct Target {
    Endpoint endpoint;
    ConnectionFactory make_connection;
    std::string url;
  };
  /// The right, and the duty, to call `connect`.
  struct Claim {
    std::uint64_t series = 0;
    std::vector<Target> targets;
  };

  /// Claims the client for one `connect`; nothing, and why, if that cannot be.
  [[nodiscard]] std::optional<Claim> begin_connect(std::span<const std::string> urls, Error& error);
  /// After it: `connected` is called on the shard, later.
  void connect(Claim claim, asio::cancellation_slot slot, Connected connected);
  void connect_and_wait(std::span<const std::string> urls, Error& error);
  /// Once, before anything else: starts the shard's thread.
  void start();
  void close();
  void cut();

  [[nodiscard]] const std::shared_ptr<Shard>& shard() const noexcept { return shard_; }
  /// Null while not connected.
  [[nodiscard]] SessionPtr current() const;
  [[nodiscard]] SessionStats stats() const;
  [[nodiscard]] ClientStats client_stats() const;

  template <class Handler>
  void set(Handler Client::*member, Handler handler) {
    const std::lock_guard lock(mutex_);
    if (state_ != State::idle) throw Exception(Error(Errc::wrong_state, "handlers are set before connect()"));
    this->*member = std::move(handler);
  }

  MessageHandler on_message;
  ClientConnectHandler on_connect;
  WritableHandler on_writable;
  DisconnectHandler on_disconnect;
  ReconnectHandler on_reconnecting;
  GaveUpHandler on_gave_up;
  ErrorHandler on_error;

  /// What is sent while there is no connection is kept.
  [[nodiscard]] bool keeps() const noexcept { return keeps_; }
  /// Requests are sent again.
  [[nodiscard]] bool retries() const noexcept { return retries_; }
  SendResult send(BytesView payload, const SendOptions& options);
  /// Of a client that keeps messages, or retries requests.
  [[nodiscard]] OutgoingCommandPtr make_outgoing(OutgoingCommand::Kind kind, const wire::Header& header,
                                                 BytesView extension, BytesView payload,
                                                 const std::optional<CompressionOptions>& compression) const;
  /// The same without interceptors.
  [[nodiscard]] OutgoingCommandPtr make_outgoing_past(OutgoingCommand::Kind kind, const wire::Header& header,
                                                      BytesView extension, BytesView payload,
                                                      const std::optional<CompressionOptions>& compression) const;
  [[nodiscard]] OutgoingCommandPtr make_request(BytesView payload, const RequestOptions& options) const;
  void start_send(OutgoingCommandPtr message, SendHandler handler);
  void start_request(OutgoingCommandPtr request, ReplyHandler handler);

  // SessionHost
  void message(Session& session, const Message& message) override { on_message(session, message); }
  [[nodiscard]] bool handles_messages() const noexcept override { return on_message && !silent_.load(); }
  void writable(Session& session) override {
    if (on_writable && !silent_.load()) on_writable(session);
  }
  void ended(SessionState& state, const Error& reason) noexcept override;
  void failed(const ErrorEvent& event) noexcept override;
  [[nodiscard]] std::shared_ptr<const Interceptors> inbound_interceptors() const noexcept override {
    return intercept_in_;
  }
  [[nodiscard]] std::shared_ptr<const Interceptors> outbound_interceptors() const noexcept override {
    return intercept_out_;
  }
  void add_interceptor(bool inbound, Interceptor interceptor);

  /// No handler is called any more; waits for those that run, unless this is called by one.
  void silence() noexcept;

 private:
  enum class State : std::uint8_t { idle, connecting, connected, reconnecting, cut };

  class Attempt;
  class Arrival;

  /// On the shard.
  struct Series {
    std::uint64_t number = 0;
    std::vector<Target> targets;
    Connected connected;    // until it was told
    std::size_t first = 0;  // where an attempt begins
    std::size_t tried = 0;  // in this attempt
    std::uint32_t attempt = 0;
    bool established = false;  // ever
    TimePoint since;           // of the latest connection
    Error error;               // of this attempt's tries

    [[nodiscard]] std::size_t current() const noexcept { return (first + tried - 1) % targets.size(); }
  };

  /// What a cancellation slot and the shard share.
  struct ClientOperation : Operation {
    std::uint64_t number = 0;  // once it is among the requests
  };

  struct Lane {
    std::deque<OutgoingCommandPtr> kept;
    std::deque<OutgoingCommandPtr> waiting;  // for room among the kept
    bool offered = false;                    // the first of the kept, to the session
  };
  static constexpr std::size_t lane_count = 2;  // normal, high priority

  /// A request that may be sent again.
  struct Retryable {
    OutgoingCommandPtr request;  // with its handler
    OperationPtr sent;           // null: it waits for a connection
    std::uint32_t turn = 0;      // how often it was sent
  };

  /// Numbers by chance that are the same everywhere: SplitMix64 (Steele, Lea and Flood, 2014).
  struct Chance {
    std::uint64_t state;
    [[nodiscard]] double fraction() noexcept;
  };

  // --- a series; on the shard
  void begin(Series series) noexcept;
  void try_next() noexcept;
  void attempted(Error error) noexcept;
  void established(Link link, Peer peer, Error& error);
  void open_to_all() noexcept;
  void tell_connected(Error error) noexcept;
  void schedule(Error error) noexcept;
  void backoff_over(std::uint64_t series) noexcept;
  void end_series(Error error, bool gave_up = false) noexcept;
  void leave_series(std::uint64_t series) noexcept;
  void series_ended(std::uint64_t series) noexcept;
  void cancel_connect(std::uint64_t series) noexcept;
  void close_here(std::uint64_t series) noexcept;
  void close_if_sent() noexcept;
  void abandoned() noexcept;
  template <class F>
  bool call_handler(SessionId session, F f, Error* failure = nullptr) noexcept;

  // --- what is kept
  /// Under the lock: somebody works for a connection, and nobody has closed.
  [[nodiscard]] bool in_series() const noexcept { return state_ != State::idle && state_ != State::cut && !closing_; }
  /// Under the lock: the session, if it is open for what is sent now.
  [[nodiscard]] SessionPtr usable() const noexcept;
  [[nodiscard]] bool has_room(std::size_t size) const noexcept;
  /// Under the lock: for room among the kept.
  [[nodiscard]] bool anybody_waits() const noexcept;
  void keep(Lane& lane, OutgoingCommandPtr& message);
  template <class Handler>
  void prepare_outgoing(OutgoingCommand& command, const Handler& handler);
  static void ended_before(OutgoingCommand& command);
  void request_arrived(OutgoingCommandPtr command, bool ahead) noexcept;
  void offer(std::size_t lane) noexcept;
  void offered(std::size_t lane, error_code code) noexcept;
  void admit_waiting(std::size_t lane) noexcept;
  void ask(Retryable& one, std::uint64_t number, const SessionPtr& session) noexcept;
  void ask_again() noexcept;
  void answered(std::uint64_t number, std::uint32_t turn, error_code code, Reply reply) noexcept;
  void finish_request(std::map<std::uint64_t, Retryable>::iterator which, error_code code, Reply reply) noexcept;
  void expire_requests() noexcept;
  void arm_requests() noexcept;
  void expire_sends() noexcept;
  void arm(std::optional<Timer>& timer, TimePoint at, void (Client::*expire)() noexcept) noexcept;
  void arm_sends(TimePoint deadline) noexcept;
  void cancel(const ClientOperation& operation) noexcept;
  [[nodiscard]] bool inside_on_connect() const noexcept { return Shard::current() == shard_.get() && in_on_connect_; }

  const ClientOptions options_;
  const bool keeps_;
  const bool retries_;
  const std::shared_ptr<const SessionOptions> session_options_;
  std::shared_ptr<Shard> shard_;
  TlsOfClient tls_;  // of whoever connects

  std::shared_ptr<Interceptors> intercept_in_, intercept_out_;  // null: none

  std::atomic<bool> silent_{false};
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  State state_ = State::idle;
  bool closing_ = false;  // the series
  bool opening_ = false;  // connected, but on_connect's turn is not over
  bool shard_finished_ = false;
  SessionPtr session_;               // the latest
  std::uint64_t series_number_ = 0;  // the latest
  std::uint64_t ended_series_ = 0;   // the latest that has
  std::array<Lane, lane_count> lanes_;
  protocol::OutboundDepth kept_;
  std::uint64_t kept_total_ = 0;
  std::uint64_t kept_dropped_ = 0;

  // on the shard
  std::optional<Series> series_;
  std::shared_ptr<Attempt> attempt_;
  std::optional<Timer> backoff_timer_;  // or how long a close may take
  std::optional<Timer> request_timer_;
  std::optional<Timer> send_timer_;
  std::map<std::uint64_t, Retryable> requests_;  // in the order in which they were made
  std::uint64_t last_request_ = 0;
  bool in_on_connect_ = false;
  Chance chance_;
  protocol::Counter connections_, attempts_, tries_, failures_, retried_;
  std::atomic<std::size_t> retryable_requests_{0}, retryable_bytes_{0};  // of requests_
};

}  // namespace msgtrans::detail
