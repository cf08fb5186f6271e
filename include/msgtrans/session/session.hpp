// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <any>
#include <chrono>
#include <cstdint>
#include <memory>
#include <msgtrans/detail/asio.hpp>
#include <msgtrans/drain_options.hpp>
#include <msgtrans/message.hpp>
#include <msgtrans/send.hpp>
#include <msgtrans/session_id.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/statistics.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <msgtrans/transport/peer_credentials.hpp>
#include <msgtrans/transport/tls.hpp>
#include <optional>
#include <utility>

namespace msgtrans {

namespace detail {

using SendHandler = asio::any_completion_handler<void(error_code)>;
using ReplyHandler = asio::any_completion_handler<void(error_code, Reply)>;

/// One message on its way in: made from the caller's bytes at once, so that nothing of the caller's is kept when the
/// operation itself starts later (as with `use_awaitable` or `deferred`).
class OutgoingCommand;
class Shard;
struct OutgoingCommandDeleter {
  void operator()(OutgoingCommand* command) const noexcept;
};
using OutgoingCommandPtr = std::unique_ptr<OutgoingCommand, OutgoingCommandDeleter>;

/// If there is no session: the error, and the shard that tells it.
struct Home {
  std::shared_ptr<Shard> shard;
  Errc nobody = Errc::closed;
};

[[nodiscard]] OutgoingCommandPtr make_send(SessionPtr session, const Home& home, BytesView payload,
                                           const SendOptions& options);
[[nodiscard]] OutgoingCommandPtr make_request(SessionPtr session, const Home& home, BytesView payload,
                                              const RequestOptions& options);
void start_send(OutgoingCommandPtr command, SendHandler handler);
void start_request(OutgoingCommandPtr command, ReplyHandler handler);

template <class CompletionToken>
auto async_send(SessionPtr session, const Home& home, BytesView payload, const SendOptions& options,
                CompletionToken&& token) {
  return asio::async_initiate<CompletionToken, void(error_code)>(
      [](auto handler, OutgoingCommandPtr command) { start_send(std::move(command), std::move(handler)); }, token,
      make_send(std::move(session), home, payload, options));
}

template <class CompletionToken>
auto async_request(SessionPtr session, const Home& home, BytesView payload, const RequestOptions& options,
                   CompletionToken&& token) {
  return asio::async_initiate<CompletionToken, void(error_code, Reply)>(
      [](auto handler, OutgoingCommandPtr command) { start_request(std::move(command), std::move(handler)); }, token,
      make_request(std::move(session), home, payload, options));
}

/// Blocks the calling thread. Errc::blocking_on_shard on a thread that must not block.
[[nodiscard]] Reply request(SessionPtr session, BytesView payload, const RequestOptions& options, Error& error);

}  // namespace detail

/// A session's counters since it began.
struct SessionStats {
  std::uint64_t packets_in = 0;
  std::uint64_t packets_out = 0;
  std::uint64_t bytes_in = 0;
  std::uint64_t bytes_out = 0;
  std::size_t queued_bytes = 0;    ///< in the outbound queue now
  std::size_t queued_packets = 0;  ///< in the outbound queue now
  /// The most bytes that ever were left in the queue because the connection took no more for the moment.
  std::size_t most_queued_bytes = 0;
  std::uint64_t dropped_oldest = 0;    ///< packets dropped by `SlowConsumer::drop_oldest`
  std::uint64_t dropped_at_close = 0;  ///< packets accepted, but not written when the session ended
  std::uint64_t dropped_inbound = 0;   ///< whole packets that came, but were not handed out when the session ended
  RequestCounts requests = {};         ///< that were made through this session
  // What was accepted for sending:
  std::uint64_t compressed_packets = 0;       ///< whose payload was compressed ...
  std::uint64_t compressed_bytes_before = 0;  ///< ... from this many bytes ...
  std::uint64_t compressed_bytes_after = 0;   ///< ... to these
  std::uint64_t incompressible_packets = 0;   ///< sent as they are, because compressing made them no smaller
};

/// A handle to one session: who is connected, and the way to talk back. Handlers are lent one; copy it to keep it.
/// A copy keeps the session's record alive, not its connection: when that has ended, calls say `closed`.
///
/// Thread safety: different handles, also to the same session, may be used from any threads at once. `user_data` is
/// the exception: handlers of this session only.
class Session {
 public:
  /// Never refers to nothing: handles come from the library.
  explicit Session(detail::SessionPtr state) noexcept : state_(std::move(state)) {}

  [[nodiscard]] SessionId id() const noexcept;
  /// False once the session has ended or is ending.
  [[nodiscard]] bool is_open() const noexcept;
  /// The address at the other end; of a Unix socket the path, which is empty for a peer that has no name.
  [[nodiscard]] Endpoint peer() const;
  /// Whose process is at the other end of a Unix socket; nothing for other transports.
  [[nodiscard]] std::optional<PeerCredentials> peer_credentials() const noexcept;
  /// What TLS knows of the other end, its certificate's subject for one; null if the session is not encrypted. Valid
  /// while a handle to the session is kept.
  [[nodiscard]] const TlsPeer* tls() const noexcept;
  [[nodiscard]] SessionStats stats() const noexcept;
  /// The bounds of its outbound queue: at first those of `SessionOptions`.
  [[nodiscard]] OutboundLimits outbound_limits() const noexcept;
  /// From now on these. Any thread. What is queued stays, also over the new bounds; with `drop_oldest` it goes when the
  /// next message is added. \throws Exception with `invalid_option`, or std::bad_alloc; then nothing has changed.
  void set_outbound_limits(const OutboundLimits& limits);
  /// The executor of the shard that serves this session: work on it runs one at a time with the session's handlers.
  [[nodiscard]] detail::asio::any_io_executor get_executor() const noexcept;

  /// Queues a one-way message. Any thread; never blocks; O(size); what is to be compressed is compressed by this call,
  /// on the calling thread, as with all calls that send. Messages of one thread to one session arrive in the
  /// order sent, and so do messages of several threads where one send happens before the other. It is complete (in the
  /// sense of the result `queued`) when this returns, on the wire a moment later. Inside this session's own
  /// `on_message` it counts as an answer: always taken (see `SessionOptions::outbound_bytes`).
  SendResult send(BytesView payload, const SendOptions& options = {});

  /// Answers a request, once, inside the handler that was lent it (later: `Message::retain`). Always taken while the
  /// session is open. `not_found` if the message is no request or was answered or retained.
  /// `compression` as in `SendOptions`.
  SendResult respond(const Message& request, BytesView payload, BytesView extension = {},
                     const std::optional<CompressionOptions>& compression = {});

  /// Queues a one-way message, waiting for room if there is none; waiting messages go in the order they came, before
  /// later ones of `send`. Any thread; the bytes are copied by this call.
  /// Completes with `void(error_code)`: success (accepted), `too_large`, `closed`, `send_timeout` (see
  /// `SendOptions::timeout`; the message is not taken), or `operation_aborted`.
  /// Cancellation (all types): ends the wait; the message is not taken. An accepted message cannot be called back.
  template <class CompletionToken>
  auto async_send(BytesView payload, const SendOptions& options, CompletionToken&& token) {
    return detail::async_send(state_, detail::Home{}, payload, options, std::forward<CompletionToken>(token));
  }
  template <class CompletionToken>
  auto async_send(BytesView payload, CompletionToken&& token) {
    return detail::async_send(state_, detail::Home{}, payload, SendOptions{}, std::forward<CompletionToken>(token));
  }

  /// Asks the peer and waits for its answer; either end may ask. Any thread; the bytes are copied by this call.
  /// Completes with `void(error_code, Reply)`: success, `request_timeout`, `connection_lost` (the session ended first;
  /// whether the peer acted on the request is unknown), `closed`, `too_large`, or `operation_aborted`.
  /// Cancellation (all types): the wait ends at once; an answer that comes later is dropped and counted.
  template <class CompletionToken>
  auto async_request(BytesView payload, const RequestOptions& options, CompletionToken&& token) {
    return detail::async_request(state_, detail::Home{}, payload, options, std::forward<CompletionToken>(token));
  }
  template <class CompletionToken>
  auto async_request(BytesView payload, CompletionToken&& token) {
    return detail::async_request(state_, detail::Home{}, payload, RequestOptions{},
                                 std::forward<CompletionToken>(token));
  }

  /// The same for programs without Asio: blocks the calling thread until the answer, the timeout or the end of the
  /// session. Any thread but those that run handlers: there it fails with `blocking_on_shard` at once.
  /// \throws Exception with the error.
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options = {}) {
    Error error;
    Reply reply = request(payload, options, error);
    if (error) throw Exception(error);
    return reply;
  }
  /// The same; on failure an empty reply, and `error` is set.
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options, Error& error) {
    return detail::request(state_, payload, options, error);
  }

  /// Ends the session: no further message is handed out, what was accepted for sending is written (at most for
  /// `SessionOptions::close_timeout`), then the connection closes. Pending requests fail with `connection_lost`.
  /// Any thread; returns at once; again has no effect. `on_disconnect` gets `closed_by_user` with `reason`.
  void close(std::string_view reason = {});

  /// The same, but goes on first: answers what it was asked and is still asked, gets what it asked for, takes what is
  /// sent; then closes, as soon as nothing is owed either way and `options.quiet` is over, and cuts when
  /// `options.within` is. Any thread; returns at once; again: the latest options hold, and the earliest end.
  /// `on_disconnect` gets `stopping` or `drain_expired`. \throws Exception with `invalid_option`, std::bad_alloc
  void drain(const DrainOptions& options = {});

  /// The application's own data of this session. Only inside handlers of this session.
  [[nodiscard]] std::any& user_data() noexcept;

  friend bool operator==(const Session&, const Session&) noexcept = default;

 private:
  detail::SessionPtr state_;
};

}  // namespace msgtrans
