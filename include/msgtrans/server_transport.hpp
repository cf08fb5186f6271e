// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/asio/awaitable.hpp>
#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <msgtrans/admission.hpp>
#include <msgtrans/channel/broadcast_channel.hpp>
#include <msgtrans/control.hpp>
#include <msgtrans/drain_options.hpp>
#include <msgtrans/event.hpp>
#include <msgtrans/interceptor.hpp>
#include <msgtrans/session/groups.hpp>
#include <msgtrans/session/session.hpp>
#include <msgtrans/session/session_actor.hpp>
#include <msgtrans/session/session_manager.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/statistics.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <msgtrans/transport/listening_socket.hpp>
#include <msgtrans/transport/tls.hpp>
#include <msgtrans/transport/websocket.hpp>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace msgtrans {

struct StopReport;

namespace detail {
class Server;
using StopHandler = asio::any_completion_handler<void(StopReport)>;
using CloseHandler = asio::any_completion_handler<void(error_code)>;
}  // namespace detail

/// Something went wrong that no call could report.
struct ErrorEvent {
  /// Whose session it was; 0 if it belongs to none.
  SessionId session;
  Error error;
  /// The exception, if a handler threw one.
  std::exception_ptr exception;
};

/// Called on shard threads; must not block; may make any call of the library that does not block.
using MessageHandler = std::function<void(Session&, const Message&)>;
using DisconnectHandler = std::function<void(Session&, const Error& reason)>;
using WritableHandler = std::function<void(Session&)>;
using ErrorHandler = std::function<void(const ErrorEvent&)>;

/// Checked by the constructor of `ServerTransport`.
struct ServerOptions {
  /// Threads that serve sessions; a session lives on one of them. 0: one a core; at most 1024.
  unsigned shards = 0;
  /// Your own executors, one a shard; then no thread is started and `shards` must be 0 or their number. Each must run
  /// one thing at a time (a strand, or an `io_context` that one thread runs) and must be running until `stop` returned.
  /// A context that is destroyed earlier cuts its sessions and stops the server; one that a strand here belongs to must
  /// live longer than the server, since Asio's strands refer to it to their end.
  std::vector<detail::asio::any_io_executor> executors = {};
  /// Sessions at once; further connections are closed and counted as refused. At least 1.
  std::size_t max_sessions = 1'000'000;
  /// Sessions at once from one address, or from one network of IPv6 (/64), since whoever has one address there has them
  /// all; 0: no limit. Unix sockets have no address, and are not counted.
  std::size_t max_sessions_per_address = 0;
  /// What all sessions together may have queued for sending, in bytes on the wire; strict, counted with the message
  /// being added, but for answers: while these are over it, a session is handed nothing more until its own are written.
  /// A message larger than all of it is taken only while nothing is queued.
  /// At the limit `send` says `would_block` whatever the session's policy, and `async_send` waits. 0: no limit.
  std::size_t outbound_bytes_total = 0;

  /// Groups that a session may be in at once; 0: no limit.
  std::size_t max_groups_per_session = 1000;
  /// Longest name of a group in bytes. 1 to 65535.
  std::size_t max_group_name = 256;
  /// Connections a second; those over it are closed and counted as refused. 0: no limit.
  std::uint64_t accept_rate = 0;
  /// So many at once, if there were fewer before. 0: as many as `accept_rate`.
  std::uint64_t accept_burst = 0;
  /// The same for each address, or network, as `max_sessions_per_address` counts them. Of at most 65,536 that came
  /// lately it is remembered how many; should there be more, those that came least lately begin anew.
  std::uint64_t accept_rate_per_address = 0;
  std::uint64_t accept_burst_per_address = 0;
  /// How long an asynchronous `on_connect` may take; a newcomer not decided on by then is refused, and the coroutine
  /// cancelled. Zero: no limit.
  std::chrono::milliseconds admission_timeout{10'000};
  /// How long `run` and the destructor let sessions finish; see `ServerTransport::stop`.
  std::chrono::milliseconds drain{5'000};
  /// Events kept for subscribers that are behind, and on their way to them; rounded up to a power of two. 1 to 2^24.
  std::size_t event_capacity = 4096;
  /// For every listener that names no options of its own.
  SessionOptions session = {};
};

/// Checked by `listen`.
struct ListenOptions {
  /// Instead of `ServerOptions::session`.
  std::optional<SessionOptions> session = {};
  /// Connections that the system keeps waiting before they are accepted. 1 to 65535.
  int backlog = 4096;
  /// From accepting a connection to the end of what its transport has to agree on with the peer, which it does before
  /// `on_connect`: TLS and WebSocket do. Until then it counts as a session for the limits.
  /// Zero: no limit.
  std::chrono::milliseconds handshake_timeout{10'000};
  /// Of `tls` and `websocket_tls`, which need a certificate and its key.
  TlsServerOptions tls = {};
  /// Of `websocket` and `websocket_tls`.
  WebSocketServerOptions websocket = {};
  /// Of a Unix socket's file, as `chmod` takes them; the directory's matter too. 0: as the process's umask says.
  unsigned permissions = 0;
};

/// Counters since the start, summed over the shards; each is exact, the whole is not one instant's picture.
struct ServerStats {
  std::size_t sessions = 0;               ///< open now
  std::uint64_t sessions_total = 0;       ///< accepted ever
  std::uint64_t sessions_refused = 0;     ///< by a limit or by `on_connect`
  std::uint64_t accept_failures = 0;      ///< the system could not give a connection (say, no file descriptor left)
  std::uint64_t handshake_failures = 0;   ///< connections that ended, or were late, before they were a session
  std::uint64_t packets_in = 0;           ///< whole packets received
  std::uint64_t packets_out = 0;          ///< packets written whole
  std::uint64_t bytes_in = 0;             ///< bytes received
  std::uint64_t bytes_out = 0;            ///< bytes written
  std::uint64_t protocol_errors = 0;      ///< sessions ended because the peer broke the protocol
  std::uint64_t handler_failures = 0;     ///< exceptions that handlers threw
  std::uint64_t unhandled = 0;            ///< messages received while there was no `on_message`
  std::uint64_t dropped_oldest = 0;       ///< packets dropped by `SlowConsumer::drop_oldest`
  std::uint64_t dropped_at_close = 0;     ///< packets accepted, but not written when their session ended
  std::uint64_t dropped_inbound = 0;      ///< whole packets read, but not handed out when their session ended
  std::uint64_t queued_bytes = 0;         ///< in outbound queues now: what connections do not take for the moment
  std::uint64_t queued_packets = 0;       ///< the same
  std::uint64_t requests_received = 0;    ///< requests of peers
  std::uint64_t answers_sent = 0;         ///< to those, accepted for sending
  std::uint64_t requests = 0;             ///< requests that this end made
  std::uint64_t requests_timed_out = 0;   ///< of those
  std::uint64_t unmatched_responses = 0;  ///< late, duplicate and forged answers, dropped
  std::uint64_t throttled = 0;            ///< times that a session was over its rate, and not read from for a while
  std::uint64_t sessions_swept = 0;       ///< ended by `SessionManager::sweep`
  // As in `SessionStats`:
  std::uint64_t compressed_packets = 0;       ///< whose payload was compressed ...
  std::uint64_t compressed_bytes_before = 0;  ///< ... from this many bytes ...
  std::uint64_t compressed_bytes_after = 0;   ///< ... to these
  std::uint64_t incompressible_packets = 0;   ///< sent as they are, because compressing made them no smaller
  RefusalCounts refusals = {};                ///< `sessions_refused` by reason
  std::size_t awaiting_admission = 0;         ///< connections now that `on_connect` has not decided on
  std::uint64_t rejected_inbound = 0;         ///< messages that an interceptor rejected, or answered
  std::uint64_t rejected_outbound = 0;        ///< the same of those that were to be sent; a broadcast counts once
  std::uint64_t interceptor_failures = 0;     ///< of those, because an interceptor threw
  /// Sessions that have ended, by the reason that `on_disconnect` gets. In all `sessions_total` less those open.
  ErrorCounts ends = {};
  /// `handshake_failures` by their errors.
  ErrorCounts handshake_failures_by = {};
  /// `requests` by what became of them.
  RequestCounts requests_by_outcome = {};
  /// Of the answered ones: from the moment the session's shard has taken the request, so the wait for room in the queue
  /// included, until the turn of the shard that handed out the answer began.
  LatencyHistogram request_latency = {};
  /// Of the control path, and of the events for subscribers and how far these are behind; as `SessionManager::stats`.
  ControlStats control = {};
};

/// Of one listener; the same counters of `ServerStats` are sums of these.
struct ListenerStats {
  Endpoint endpoint;                     ///< as `listen` returned it
  std::size_t sessions = 0;              ///< open now
  std::uint64_t sessions_total = 0;      ///< accepted ever
  std::uint64_t sessions_refused = 0;    ///< by a limit or by `on_connect`
  std::uint64_t accept_failures = 0;     ///< the system could not give a connection
  std::uint64_t handshake_failures = 0;  ///< connections that ended, or were late, before they were a session
  std::uint64_t packets_in = 0;          ///< whole packets received
  std::uint64_t packets_out = 0;         ///< packets written whole
  std::uint64_t bytes_in = 0;            ///< bytes received
  std::uint64_t bytes_out = 0;           ///< bytes written
};

/// What `stop` had to cut at the end of the drain time; all zero if everything finished.
struct StopReport {
  std::size_t sessions_cut = 0;   ///< sessions that still had something to finish
  std::size_t requests_cut = 0;   ///< requests this end had made, failed with `connection_lost`
  std::size_t answers_cut = 0;    ///< requests of peers whose answer was still owed
  std::uint64_t packets_cut = 0;  ///< packets accepted for sending and not written
  std::size_t actors_cut = 0;     ///< coroutines that went on after their session had gone, or had none; cancelled
  /// False if the server was still stopping when the call returned (called from a handler, or an executor did not run).
  bool complete = true;

  [[nodiscard]] bool clean() const noexcept {
    return complete && sessions_cut == 0 && requests_cut == 0 && answers_cut == 0 && packets_cut == 0 &&
           actors_cut == 0;
  }
};

/// A message server: sessions on shards, behind any number of listeners.
///
/// Life: constructed, (`listen`, handlers)*, `start` or `run`, `stop`. Stopped is final. Destroying stops, with the
/// drain time of the options, and no handler runs when the destructor has returned. That is allowed from a handler too:
/// then the destructor returns at once, no further handler is called, and the shards finish by themselves. With
/// executors of yours the destructor does not wait either, since they may not run any more: it cuts; call `stop`
/// before. Thread safety: every call may be made from any thread. Handlers are set before `start`. Nothing here prints,
/// ends the process or lets an exception of a handler out: that session ends with `handler_failed`, the rest goes on.
class ServerTransport {
 public:
  /// \throws Exception with `Errc::invalid_option`.
  explicit ServerTransport(ServerOptions options = {});
  ~ServerTransport();
  ServerTransport(const ServerTransport&) = delete;
  ServerTransport& operator=(const ServerTransport&) = delete;

  /// Binds at once, so that errors come here and the port is known; accepts once started, or immediately if it is.
  /// Each shard listens for itself on the same port; a Unix socket's connections are dealt out to them in turn. Its
  /// file is removed when the server stops; one that a dead server has left there is replaced. Looking a name up
  /// blocks; not to be called from a handler then. \returns where it listens, with the real port. \throws Exception:
  /// the system's error (the text names the address), `invalid_option`, `wrong_state`.
  Endpoint listen(const Endpoint& endpoint, const ListenOptions& options = {});
  /// The same without exceptions; on failure nothing has changed.
  std::optional<Endpoint> listen(const Endpoint& endpoint, const ListenOptions& options, Error& error);

  /// The same with sockets that the process was started with (`inherited_sockets`): those that are bound to that
  /// address are taken out of `inherited` and adopted, as by `adopt_listener`; if there is none, it binds. So one
  /// program starts by itself, by systemd and as a successor. \throws Exception as both do; then nothing has changed.
  Endpoint listen(const Endpoint& endpoint, const ListenOptions& options, std::vector<ListeningSocket>& inherited);
  /// Listens on sockets from elsewhere. `as` says what is spoken there: its transport and, of WebSocket, the path; host
  /// and port, or the file, are the sockets' own. They must be stream sockets, bound, all to one address; one that does
  /// not listen yet is made to, with `options.backlog`. One alone serves all shards, which get connections in turn;
  /// several (a port's, from a predecessor) are divided among the shards. They are made non-blocking, which everybody
  /// sees who holds them. `options.permissions` is not for them. A file is removed in the end only if
  /// `ListeningSocket::owns_file`. \returns where it listens. \throws Exception: as `listen`, or `invalid_option` that
  /// says what is wrong with which descriptor; then the sockets are still the caller's. If it succeeds they have been
  /// taken.
  Endpoint adopt_listener(const Endpoint& as, std::span<ListeningSocket> sockets, const ListenOptions& options = {});
  /// The same without exceptions.
  std::optional<Endpoint> adopt_listener(const Endpoint& as, std::span<ListeningSocket> sockets,
                                         const ListenOptions& options, Error& error);

  /// Accepts no more at that listener (as `listen` returned it) and gives its address up; `endpoints` no longer names
  /// it. What has connected by then is still accepted; its sessions go on, and so do handshakes under way. A Unix
  /// socket's file is removed at once, the sockets are closed a moment after this returns. Any thread.
  /// \returns false if there is none, or the server stops.
  bool close_listener(const Endpoint& listener);
  /// The same, and its sessions are drained, see `Session::drain`; those too that are in their handshake, once they are
  /// sessions. Without `quiet`, what waits to be accepted is not, and the system ends it. \throws Exception with
  /// `invalid_option`.
  bool drain_listener(const Endpoint& listener, const DrainOptions& options = {});
  /// As `close_listener`; completes with `void(error_code)` when the sockets are closed, and the address is free:
  /// success or `not_found`. Not cancellable.
  template <class CompletionToken>
  auto async_close_listener(const Endpoint& listener, CompletionToken&& token) {
    return detail::asio::async_initiate<CompletionToken, void(error_code)>(
        [](auto handler, std::shared_ptr<detail::Server> server, const Endpoint& which) {
          start_close_listener(server, which, std::move(handler));
        },
        token, server_, listener);
  }

  /// Duplicates of all listening sockets, for a successor (`Successor::start`, or `SCM_RIGHTS`), who must accept on
  /// each of them: where the shards listen for themselves the system divides a port's connections among them. They are
  /// named by their transport and, of WebSocket, path (`tcp`, `ws/chat`, with `_` for a colon); a name may be changed.
  /// This server goes on accepting. Empty once it stops. \throws Exception: the system's error, when there is no
  /// descriptor left.
  [[nodiscard]] std::vector<ListeningSocket> listening_sockets() const;
  /// Accepts no more, at no listener, since another process does on duplicates of their sockets: what waits there is
  /// its. Files of Unix sockets stay. Listeners without sockets (`inproc://`, custom ones) are closed. Sessions and
  /// handshakes go on; `stop` is what usually follows. Returns at once.
  void release_listeners();

  /// Connections that come to that listener (as `listen` returned it) from now on get these certificates and rules;
  /// sessions go on with those they began with. Reads files; not to be called from a handler then.
  /// \throws Exception: `not_found` if it is no encrypted listener, `invalid_option`, or the system's error of a file;
  /// then nothing has changed.
  void renew_tls(const Endpoint& listener, const TlsServerOptions& options);
  /// The same without exceptions.
  void renew_tls(const Endpoint& listener, const TlsServerOptions& options, Error& error);

  /// Called for each newcomer before any of its messages, once its transport has agreed with the peer; it sees the
  /// address, the TLS peer and the credentials, and may send. Instead of any set before. `f` is one of
  ///
  ///     Admission f(Session&);                                          // or void: "always accept"
  ///     asio::awaitable<Admission> f(Session);                          // a coroutine
  ///     asio::awaitable<Admission> f(Session, OwnedMessage first);      // the same, once its first message is there
  ///     void f(Session&, AdmissionPromise);                             // decides later, on any thread
  ///     void f(Session&, OwnedMessage first, AdmissionPromise);
  ///
  /// The later forms: until it is decided the session is in no list, and gets no broadcast; nothing more of what the
  /// peer sends is handed out, not the answer to a question of this end either, and at most one read of it is kept. It
  /// takes a place of the limits. The first message is not handed out again; if it is a request, answer it before you
  /// decide: what was sent by then is written before a refusal ends the connection. It is refused if it takes longer
  /// than `admission_timeout`, or if `f` throws. Should the peer leave meanwhile (also if only its sending end is
  /// closed), the time be over, or the server stop, then the coroutine, which runs on the session's shard, is cancelled
  /// (terminal), and what it decides has no effect. \throws Exception with `wrong_state` once started, as all setters
  /// of handlers do.
  template <std::invocable<Session&> F>
  void on_connect(F f) {
    using Result = std::invoke_result_t<F&, Session&>;
    if constexpr (std::is_same_v<Result, detail::asio::awaitable<Admission>>) {
      set_on_connect(detail::AdmissionCoroutine(
                         [f = std::move(f)](Session& session, OwnedMessage&) mutable { return f(session); }),
                     false);
    } else if constexpr (std::is_void_v<Result>) {
      set_on_connect(std::function<Admission(Session&)>([f = std::move(f)](Session& session) mutable {
        f(session);
        return Admission::accept();
      }));
    } else {
      set_on_connect(std::function<Admission(Session&)>(std::move(f)));
    }
  }
  template <std::invocable<Session&, OwnedMessage> F>
  void on_connect(F f) {
    set_on_connect(detail::AdmissionCoroutine([f = std::move(f)](Session& session, OwnedMessage& first) mutable {
                     return f(session, std::move(first));
                   }),
                   true);
  }
  template <std::invocable<Session&, AdmissionPromise> F>
  void on_connect(F f) {
    set_on_connect(detail::AdmissionCallback(
                       [f = std::move(f)](Session& session, OwnedMessage&, AdmissionPromise promise) mutable {
                         f(session, std::move(promise));
                       }),
                   false);
  }
  template <std::invocable<Session&, OwnedMessage, AdmissionPromise> F>
  void on_connect(F f) {
    set_on_connect(detail::AdmissionCallback(
                       [f = std::move(f)](Session& session, OwnedMessage& first, AdmissionPromise promise) mutable {
                         f(session, std::move(first), std::move(promise));
                       }),
                   true);
  }
  /// `f` takes `InterceptedMessage&`, and returns a `Verdict`, or nothing for "passes". Called for every message and
  /// answer that comes in, on the session's shard, before anybody else gets it; several in the order they were added. A
  /// message that is rejected is as if it had not come (a request for which nobody responds times out at the peer), but
  /// counted. One that throws rejects, and `on_error` is told. Without interceptors a message pays for one test of a
  /// pointer. \throws Exception with `wrong_state` once started.
  template <std::invocable<InterceptedMessage&> F>
  void intercept_inbound(F f) {
    add_interceptor(true, detail::make_interceptor(std::move(f)));
  }
  /// The same for everything that is sent, one-way messages, requests and answers, on the thread that sends, possibly
  /// several at once: before it is compressed, and before it is known whether there is room, so again each time
  /// somebody tries again. Whoever sends what is rejected is told `rejected`. A broadcast is shown once, without a
  /// session; if it is rejected, no session was visited. What an interceptor itself sends is not shown to any.
  template <std::invocable<InterceptedMessage&> F>
  void intercept_outbound(F f) {
    add_interceptor(false, detail::make_interceptor(std::move(f)));
  }
  /// Called for each request and one-way message, in the order a session sent them.
  void on_message(MessageHandler handler);
  /// Gives each session that `on_connect` accepted a coroutine of its own, which receives its messages through a
  /// bounded mailbox; instead of `on_message`. `behaviour` takes a `SessionActor`; options: of its mailbox, and of what
  /// is done when an exception leaves it. When it is given up the session ends with `actor_failed`; when it returns,
  /// with `closed_by_user`. With `OnFailure::escalate` a failure stops the server, which drains. \throws Exception with
  /// `invalid_option`, or `wrong_state` once started.
  void on_session(SessionBehaviour behaviour, const ActorOptions& options = {});
  /// Called exactly once for each session that was accepted, after its last message, with the reason. What a session's
  /// coroutine has in its mailbox by then is still received there.
  void on_disconnect(DisconnectHandler handler);
  /// Called when a session's outbound queue, which a message was not taken into or dropped from, has come down to its
  /// low mark, and nobody waits in `async_send`: once for each time that it was full. By then a `send` on another
  /// thread may not have returned yet.
  void on_writable(WritableHandler handler);
  /// Called for what no call can report: a handler's exception, a protocol error, a failed accept.
  void on_error(ErrorHandler handler);

  /// Starts the shards and accepting. \throws Exception with `wrong_state` if started or stopped before.
  void start();
  /// `start` unless started, then waits for SIGINT, SIGTERM or `stop`, then stops with the options' drain time.
  /// Not from a handler (`blocking_on_shard`).
  StopReport run();
  /// Stops accepting; lets each session write what is queued, answer what it was asked and get what it asked for,
  /// within `drain`; closes; calls every `on_disconnect`; joins the threads. Zero: cuts at once.
  /// Again, or while another thread stops: waits for that and returns the same report. From a handler: begins, and
  /// returns at once with `complete` false. With executors of your own it waits at most 2 s longer than `drain`: on the
  /// thread that runs them use `async_stop`.
  StopReport stop(std::chrono::milliseconds drain);
  StopReport stop();  ///< with `ServerOptions::drain`
  /// The same with more to say. With `quiet`, what has connected by now is still accepted, and handshakes under way go
  /// on and are served; without, both are ended. \throws Exception with `invalid_option`.
  StopReport stop(const DrainOptions& drain);
  /// The same without blocking; for programs that run the executors themselves. Completes with `void(StopReport)` when
  /// all sessions are gone; threads of the server are joined by the destructor. Not cancellable: a stop goes on.
  template <class CompletionToken>
  auto async_stop(std::chrono::milliseconds drain, CompletionToken&& token) {
    return detail::asio::async_initiate<CompletionToken, void(StopReport)>(
        [](auto handler, std::shared_ptr<detail::Server> server, std::chrono::milliseconds within) {
          start_stop(server, {.within = within}, std::move(handler));
        },
        token, server_, drain);
  }

  template <class CompletionToken>
  auto async_stop(const DrainOptions& drain, CompletionToken&& token) {
    if (auto error = validate(drain)) throw Exception(error);
    return detail::asio::async_initiate<CompletionToken, void(StopReport)>(
        [](auto handler, std::shared_ptr<detail::Server> server, const DrainOptions& options) {
          start_stop(server, options, std::move(handler));
        },
        token, server_, drain);
  }

  /// As the calls of `Session`; `not_found` if there is none with that id. O(1) more.
  SendResult send(SessionId session, BytesView payload, const SendOptions& options = {});
  template <class CompletionToken>
  auto async_send(SessionId session, BytesView payload, const SendOptions& options, CompletionToken&& token) {
    return detail::async_send(find(session), home(), payload, options, std::forward<CompletionToken>(token));
  }
  template <class CompletionToken>
  auto async_request(SessionId session, BytesView payload, const RequestOptions& options, CompletionToken&& token) {
    return detail::async_request(find(session), home(), payload, options, std::forward<CompletionToken>(token));
  }
  /// False if there is none with that id.
  bool close(SessionId session, std::string_view reason = {});
  /// The same of `Session::drain`.
  bool drain(SessionId session, const DrainOptions& options = {});
  /// Sends to every session that is there. Encoded once, and compressed once for all sessions whose options, or the
  /// override, name the same codec and level; never blocks; O(sessions). Overflow is treated as by `send`.
  BroadcastResult broadcast(BytesView payload, const SendOptions& options = {});

  /// What happens from now on: sessions that come and go, protocol errors, slow consumers, failing actors, and what
  /// pools and health checkers tell that share this server's control. Messages are not among them. Every subscriber
  /// gets every event or is told how many it has missed. Ends when the server has stopped, after the last
  /// `session_disconnected`. \throws std::bad_alloc
  [[nodiscard]] Subscription<Event> subscribe();
  /// The control path, for pools and health checkers.
  [[nodiscard]] Control control() const;

  [[nodiscard]] SessionManager session_manager() const;
  /// Sessions by the names of what they take part in, to send to all that do.
  [[nodiscard]] Groups groups() const;
  /// The sessions' coroutines, by the ids of their sessions, and free-standing ones that are spawned there; these run
  /// on the shards in turn and are stopped with the server. Valid while the server is.
  [[nodiscard]] ActorManager<OwnedMessage>& actor_manager() const noexcept;
  [[nodiscard]] std::size_t session_count() const noexcept;
  /// O(shards x listeners), whatever the number of sessions; some microseconds a shard. Also after the stop.
  [[nodiscard]] ServerStats stats() const;
  /// Of every listener, in the order of the calls of `listen`. As cheap. Also after the stop.
  [[nodiscard]] std::vector<ListenerStats> listener_stats() const;
  /// Where it listens.
  [[nodiscard]] std::vector<Endpoint> endpoints() const;

 private:
  static void start_stop(const std::shared_ptr<detail::Server>& server, const DrainOptions& drain,
                         detail::StopHandler handler);
  static void start_close_listener(const std::shared_ptr<detail::Server>& server, const Endpoint& listener,
                                   detail::CloseHandler handler);
  void set_on_connect(std::function<Admission(Session&)> handler);
  void set_on_connect(detail::AdmissionCoroutine handler, bool with_first_message);
  void set_on_connect(detail::AdmissionCallback handler, bool with_first_message);
  void add_interceptor(bool inbound, Interceptor interceptor);
  [[nodiscard]] detail::SessionPtr find(SessionId session) const;
  [[nodiscard]] detail::Home home() const;

  std::shared_ptr<detail::Server> server_;
};

}  // namespace msgtrans
