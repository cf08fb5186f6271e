// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "admission.hpp"
#include "connection_factory.hpp"
#include "control_loop.hpp"
#include "interceptors.hpp"
#include "link.hpp"
#include "session_registry.hpp"
#include "session_state.hpp"
#include "shard.hpp"
#include "sockets.hpp"

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <msgtrans/actor/actor_manager.hpp>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/transport/custom_transport.hpp>
#include <mutex>
#include <span>
#include <vector>

namespace msgtrans::detail {

/// What `ServerTransport` refers to; outlives it while shards still finish.
class Server final : public SessionHost, public std::enable_shared_from_this<Server> {
 public:
  [[nodiscard]] static std::shared_ptr<Server> make(ServerOptions options);
  explicit Server(ServerOptions options);
  ~Server() override;

  /// With `sockets`, which are taken if it succeeds: those, instead of binding any.
  std::optional<Endpoint> listen(const Endpoint& endpoint, const ListenOptions& options,
                                 std::span<ListeningSocket> sockets, Error& error);
  std::optional<Endpoint> listen_or_adopt(const Endpoint& endpoint, const ListenOptions& options,
                                          std::vector<ListeningSocket>& inherited, Error& error);
  /// `drain`: its sessions too. \returns false if there is none, and then `done` is not called; else it is once all
  /// sockets are closed, on any thread, possibly before this returns.
  bool close_listener(const Endpoint& listener, const DrainOptions* drain, std::function<void()> done);
  void async_close_listener(const Endpoint& listener, CloseHandler handler);
  void release_listeners();
  [[nodiscard]] std::vector<ListeningSocket> listening_sockets() const;
  void renew_tls(const Endpoint& listener, const TlsServerOptions& options, Error& error);
  void start();
  StopReport run();
  StopReport stop(const DrainOptions& drain);
  void async_stop(const DrainOptions& drain, StopHandler handler);
  /// For the destructor of the facade.
  void end();
  [[nodiscard]] std::chrono::milliseconds drain() const noexcept { return options_.drain; }

  BroadcastResult broadcast(BytesView payload, const SendOptions& options);
  [[nodiscard]] const std::shared_ptr<SessionRegistry>& registry() const noexcept { return registry_; }
  [[nodiscard]] const std::shared_ptr<ControlLoop>& control() const noexcept { return control_; }
  [[nodiscard]] ActorManager<OwnedMessage>& actors() const noexcept { return *actors_; }
  [[nodiscard]] const std::shared_ptr<Shard>& first_shard() const noexcept { return shards_.front(); }
  [[nodiscard]] ServerStats stats() const;
  [[nodiscard]] std::vector<ListenerStats> listener_stats() const;
  [[nodiscard]] std::vector<Endpoint> endpoints() const;

  /// Sets a handler, unless the server has been started.
  template <class Handler>
  void set(Handler Server::*member, Handler handler) {
    const std::lock_guard lock(mutex_);
    if (state_ != State::idle) throw Exception(Error(Errc::wrong_state, "handlers are set before start()"));
    this->*member = std::move(handler);
  }

  void set_on_connect(std::function<Admission(Session&)> now, std::shared_ptr<const AdmissionCoroutine> coroutine,
                      AdmissionCallback callback, bool with_first_message);
  void add_interceptor(bool inbound, Interceptor interceptor);

  MessageHandler on_message;
  std::shared_ptr<const SessionBehaviour> on_session;
  ActorOptions actor_options;
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
  [[nodiscard]] std::shared_ptr<const Interceptors> inbound_interceptors() const noexcept override {
    return intercept_in_;
  }
  [[nodiscard]] std::shared_ptr<const Interceptors> outbound_interceptors() const noexcept override {
    return intercept_out_;
  }

  // Of sessions that `on_connect` decides on later; on their shards.
  [[nodiscard]] const asio::any_io_executor& executor_of(const Shard& shard) const noexcept;
  void ask_on_connect(SessionState& state, OwnedMessage first, std::shared_ptr<PendingAdmission> pending) noexcept;
  void on_connect_threw(SessionState& state, const std::exception_ptr& exception) noexcept;
  void decided(SessionState& state, Admission admission) noexcept;
  void not_admitted(SessionState& state, const Error& late) noexcept;
  void left_unadmitted(SessionState& state, const Error& reason) noexcept;

  /// No handler is called any more; waits for those that run, unless this is called by one.
  void silence() noexcept;

 private:
  enum class State : std::uint8_t { idle, running, stopping, stopped };

  /// What a listener's connections are counted in. It stays when the listener goes.
  struct ListenerRecord {
    Endpoint endpoint;
    std::vector<ConnectionCounters> shards;

    [[nodiscard]] ConnectionCounters& of(const Shard& shard) noexcept { return shards[shard.index]; }
  };
  using RecordPtr = std::shared_ptr<ListenerRecord>;
  /// What becomes of those whose handshake is not finished when their listener is drained.
  class ListenerDrain {
   public:
    /// At most once.
    void begin(std::shared_ptr<const DrainRule> rule) noexcept {
      rule_ = std::move(rule);
      begun_.store(true, std::memory_order_release);
    }
    /// Any thread. Null: it goes on.
    [[nodiscard]] std::shared_ptr<const DrainRule> rule() const noexcept {
      return begun_.load(std::memory_order_acquire) ? rule_ : nullptr;
    }

   private:
    std::shared_ptr<const DrainRule> rule_;
    std::atomic<bool> begun_{false};
  };

  /// What its connections need to know of a listener.
  struct ListenerOptions {
    std::shared_ptr<const SessionOptions> session;
    std::chrono::milliseconds handshake_timeout;
    ConnectionFactory make_connection;  // none: packets are the socket's bytes
    RecordPtr record;
    std::uint32_t number = 0;  // `Peer::listener`
    std::shared_ptr<ListenerDrain> drain = {};
  };

  struct Listener {
    Endpoint endpoint;
    std::shared_ptr<const ListenerOptions> options;
    // One a shard; or fewer, which deal out to all; or more, if they come from a predecessor with more shards.
    std::vector<std::shared_ptr<Acceptor>> acceptors;
    std::shared_ptr<SocketFile> file;        // of a Unix socket
    std::shared_ptr<TlsOfListener> tls;      // null: not encrypted
    std::shared_ptr<CustomListener> custom;  // instead of acceptors
  };

  bool adopt(std::span<ListeningSocket> sockets, Listener& listener, const ListenOptions& options, Error& error) const;
  void start_locked();
  void begin_stop(DrainOptions drain);
  /// What waits in the sockets.
  enum class Rest : std::uint8_t {
    accepted,  // as far as it is there by now
    lost,
    left,  // to whoever holds them too
  };
  /// Then `done` is called on any thread. When it is, all that was accepted there is on its way to its shard.
  void stop_accepting(std::vector<Listener> listeners, Rest rest, std::function<void()> done);
  void drain_sessions(std::uint32_t listener, const std::shared_ptr<const DrainRule>& rule);
  [[nodiscard]] std::vector<std::shared_ptr<Acceptor>> acceptors_of(const std::vector<Listener>& listeners,
                                                                    const std::shared_ptr<Shard>& shard) const;
  [[nodiscard]] bool is_running() const;
  void start_accepting(const Listener& listener);
  void start_custom(const Listener& listener);
  void stop_custom(std::vector<Listener> listeners);
  /// To the shards in turn. Any thread.
  void deal_out(Link link, Peer peer, const std::shared_ptr<const ListenerOptions>& options);
  /// On `shard`, from whatever shard it was accepted on. `link`: a socket, or a connection without one.
  void accepted(Shard& shard, Link link, Peer peer, const std::shared_ptr<const ListenerOptions>& options);
  void accept_failed(Shard& shard, ListenerRecord& listener, Error error) noexcept;
  /// The same from any thread.
  void post_accept_failure(const RecordPtr& listener, Error error);
  /// It has a place, and no handshake is left to do.
  void connected(Shard& shard, Link link, Peer peer, const ListenerOptions& options) noexcept;
  void handshake_failed(Shard& shard, ListenerRecord& listener, const Peer& peer, const Error& error) noexcept;
  /// By a limit, before there is a session.
  void turn_away(Shard& shard, Link link, const Peer& peer, const ListenerOptions& options,
                 SessionRegistry::Refusal refusal);
  void no_session(Shard& shard, ConnectionCounters& listener, SessionId id, const Peer& peer,
                  const Error& error) noexcept;
  void tell_refused(SessionId id, const Peer& peer, Errc code, const std::string& why) noexcept;
  [[nodiscard]] bool decides_later() const noexcept { return on_connect_coroutine_ || on_connect_callback_; }
  void no_memory(Shard& shard, ConnectionCounters& listener, const std::exception& exception) noexcept;
  bool call_handler(SessionState& state, const std::function<void(Session&)>& handler) noexcept;
  void drain_shard(const std::shared_ptr<Shard>& shard, std::chrono::milliseconds drain,
                   const std::shared_ptr<const DrainRule>& rule);
  void spawn_actor(SessionState& state);
  void shard_drained(Shard& shard);
  void first_shard_abandoned();
  void end_actors();
  void actors_ended();
  void finish_shards();
  void shard_finished();

  const ServerOptions options_;
  const std::shared_ptr<SessionRegistry> registry_;
  const std::shared_ptr<const SessionOptions> session_options_;
  std::vector<std::shared_ptr<Shard>> shards_;
  std::vector<asio::any_io_executor> shard_executors_;  // ShardExecutors
  std::shared_ptr<ControlLoop> control_;
  std::unique_ptr<ActorManager<OwnedMessage>> actors_;

  std::function<Admission(Session&)> on_connect_;  // at most one of these
  std::shared_ptr<const AdmissionCoroutine> on_connect_coroutine_;
  AdmissionCallback on_connect_callback_;
  bool on_connect_wants_first_ = false;
  std::atomic<std::size_t> awaiting_admission_{0};
  std::shared_ptr<Interceptors> intercept_in_, intercept_out_;  // null: none

  std::atomic<bool> silent_{false};
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::mutex join_mutex_;
  State state_ = State::idle;
  std::vector<Listener> listeners_;
  std::vector<RecordPtr> records_;  // of all there ever were
  std::uint32_t last_listener_ = 0;
  std::atomic<std::size_t> next_shard_{0};   // of those that one acceptor deals out to
  asio::io_context* run_context_ = nullptr;  // of run(), while it waits
  std::size_t shards_draining_ = 0;
  TimePoint stop_by_{};
  bool first_shard_gone_ = false;
  bool actors_ended_ = false;
  std::size_t shards_left_ = 0;
  StopReport report_;
  struct StopWaiter {
    StopHandler handler;
    asio::any_completion_executor work;
  };
  std::vector<StopWaiter> stop_waiters_;
};

}  // namespace msgtrans::detail
