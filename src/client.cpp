// SPDX-License-Identifier: Apache-2.0
#include "client.hpp"

#include "complete.hpp"
#include "custom_transports.hpp"
#include "handshake.hpp"
#include "sockets.hpp"

#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/ip/address.hpp>
#include <msgtrans/detail/exception_text.hpp>
#include <msgtrans/detail/insist.hpp>
#include <unistd.h>
#include <utility>

namespace msgtrans::detail {

using asio::ip::tcp;

/// One try to connect: looks the name up, then tries its addresses one after the other, all within the time.
/// On the shard.
class Client::Attempt : public std::enable_shared_from_this<Attempt> {
 public:
  Attempt(std::shared_ptr<Client> client, Target target, Connected connected)
      : client_(std::move(client)),
        target_(std::move(target.endpoint)),
        make_connection_(std::move(target.make_connection)),
        connected_(std::move(connected)),
        resolver_(client_->shard_->executor()),
        socket_(client_->shard_->executor()),
        retry_(client_->shard_->executor()),
        deadline_(client_->shard_->executor()),
        custom_(custom_transport_of(target_)) {}

  void start() {
    if (client_->options_.connect_timeout.count() != 0) {
      deadline_.expires_after(std::min(client_->options_.connect_timeout, longest_duration));
      deadline_.async_wait([self = shared_from_this()](const error_code& error) {
        if (error) return;
        Shard::Scope scope(*self->client_->shard_);
        self->end(Error(asio::error::timed_out, "cannot connect to " + self->target_.to_string() + " within " +
                                                    std::to_string(self->client_->options_.connect_timeout.count()) +
                                                    " ms"));
      });
    }
    if (custom_) return connect_custom();
    if (target_.transport == Transport::unix_socket) return try_unix();
    error_code code;
    if (const auto address = asio::ip::make_address(target_.host, code); !code) {
      addresses_.emplace_back(address, target_.port);
      return next();
    }
    resolver_.async_resolve(
        target_.host, std::to_string(target_.port),
        [self = shared_from_this()](const error_code& error, const tcp::resolver::results_type& found) {
          Shard::Scope scope(*self->client_->shard_);
          if (error) {
            return self->end(Error(error, "cannot look up \"" + self->target_.host + "\": " + error.message()));
          }
          for (const auto& entry : found) self->addresses_.push_back(entry.endpoint());
          self->next();
        });
  }

  void end(Error error) {
    if (!connected_) return;
    auto connected = std::exchange(connected_, nullptr);
    deadline_.cancel();
    resolver_.cancel();
    retry_.cancel();
    error_code ignored;
    socket_.close(ignored);
    custom_attempt_ = nullptr;
    if (handshake_) std::exchange(handshake_, nullptr)->end(error);
    client_->settle_attempt(std::move(error), std::move(connected));
  }

 private:
  void next() {
    if (!connected_) return;
    if (next_ == addresses_.size()) return end(std::move(last_error_));
    const tcp::endpoint address = addresses_[next_++];
    error_code ignored;
    socket_.close(ignored);
    socket_.async_connect(address, [self = shared_from_this(), address](const error_code& error) {
      Shard::Scope scope(*self->client_->shard_);
      if (!self->connected_) return;
      if (error) {
        self->last_error_ =
            Error(error, "cannot connect to " + Peer{.address = address}.to_string() + ": " + error.message());
        return self->next();
      }
      error_code code;
      self->agree(Descriptor(self->socket_.release(code)), {.transport = self->target_.transport, .address = address});
    });
  }

  void connect_custom() {
    struct Result {
      Error error;
      std::unique_ptr<Connection> connection;
    };
    try {
      auto connected = [weak = weak_from_this(), shard = client_->shard_, result = std::make_shared<Result>()](
                           Error error, std::unique_ptr<Connection> connection) {
        if (!error && !connection) error = Error(Errc::handshake_failed, "the transport gave no connection");
        result->error = std::move(error);
        result->connection = std::move(connection);
        // Without it the attempt would wait for ever.
        insist([&] {
          shard->post([weak, result] {
            const auto self = weak.lock();
            if (self && self->connected_) {
              self->custom_connected(std::move(result->error), std::move(result->connection));
            }
          });
        });
      };
      custom_attempt_ = custom_->connect(target_.path, client_->shard_->executor(), std::move(connected));
    } catch (const std::exception& failure) {
      end(Error(make_error_code(boost::system::errc::not_enough_memory), failure.what()));
    }
  }

  void custom_connected(Error error, std::unique_ptr<Connection> connection) {
    if (error) return end(Error(error.code, "cannot connect to " + target_.url() + ": " + error.message()));
    Link link{.connection = std::move(connection)};
    try {
      link.ready = ReadyState::attach(client_->shard_, *link.connection);
    } catch (const std::exception& failure) {
      return end(Error(make_error_code(boost::system::errc::not_enough_memory), failure.what()));
    }
    agree(std::move(link), {.transport = target_.transport, .path = target_.path, .scheme = target_.scheme});
  }

  void try_unix() {
    if (!connected_) return;
    error_code code;
    Descriptor socket = connect_unix(target_, code);
    if (socket) {
      const auto credentials = credentials_of(socket.get());
      return agree(std::move(socket),
                   {.transport = target_.transport, .credentials = credentials, .path = target_.path});
    }
    if (code != boost::system::errc::resource_unavailable_try_again) {
      return end(Error(code, "cannot connect to " + target_.to_string() + ": " + code.message()));
    }
    // The server's queue is full, and the system does not say when it no longer is.
    retry_.expires_after(std::chrono::milliseconds(5));
    retry_.async_wait([self = shared_from_this()](const error_code& error) {
      if (error) return;
      Shard::Scope scope(*self->client_->shard_);
      self->try_unix();
    });
  }

  /// What the transport has to, before there is a session.
  void agree(Descriptor socket, Peer peer) {
    prepare(socket.get(), *client_->session_options_);
    Link link{.socket = std::move(socket)};
    if (!make_connection_) return established(std::move(link), std::move(peer));
    try {
      link.connection = make_connection_(link.socket.get());
    } catch (const std::exception& failure) {
      return end(Error(make_error_code(boost::system::errc::not_enough_memory), failure.what()));
    }
    agree(std::move(link), std::move(peer));
  }

  void agree(Link link, Peer peer) {
    try {
      handshake_ = std::make_shared<Handshake>(
          client_->shard_, std::move(link), [self = shared_from_this(), peer](const Error& error, Link agreed) mutable {
            self->handshake_ = nullptr;
            if (!error) return self->established(std::move(agreed), std::move(peer));
            Error told(error.code);
            try {
              told.text = "no session with " + peer.to_string() + ": " + error.message();
            } catch (const std::bad_alloc&) {
              // The code says enough.
            }
            self->end(std::move(told));
          });
      handshake_->start(std::chrono::milliseconds{0});  // the attempt's deadline is for this too
    } catch (const std::exception& failure) {
      handshake_ = nullptr;
      end(Error(make_error_code(boost::system::errc::not_enough_memory), failure.what()));
    }
  }

  void established(Link link, Peer peer) noexcept {
    if (!connected_) return;
    Error failure;
    try {
      client_->established(std::move(link), std::move(peer), failure);
    } catch (const std::exception& exception) {
      failure = Error(make_error_code(boost::system::errc::not_enough_memory), exception.what());
    }
    end(std::move(failure));
  }

  std::shared_ptr<Client> client_;
  const Endpoint target_;
  const ConnectionFactory make_connection_;  // none: packets are the socket's bytes
  Connected connected_;
  tcp::resolver resolver_;
  tcp::socket socket_;
  Timer retry_;  // of a Unix socket
  Timer deadline_;
  std::shared_ptr<CustomTransport> custom_;  // null: the library connects
  std::shared_ptr<void> custom_attempt_;     // while it connects
  std::shared_ptr<Handshake> handshake_;     // while there is one
  std::vector<tcp::endpoint> addresses_;
  std::size_t next_ = 0;
  Error last_error_;
};

Error validate_connection(const ClientOptions& options) {
  Error error = validate(options.session);
  if (!error) error = validate(options.tls);
  if (!error) error = validate(options.websocket);
  return error;
}

namespace {

ClientOptions checked(ClientOptions options) {
  Error error = validate_connection(options);
  if (!error && options.connect_timeout.count() < 0) {
    error = Error(Errc::invalid_option, "connect_timeout is negative");
  }
  if (error) throw Exception(error);
  return options;
}

}  // namespace

Client::Client(ClientOptions options)
    : options_(checked(std::move(options))),
      session_options_(std::make_shared<const SessionOptions>(options_.session)),
      shard_(options_.executor ? std::make_shared<Shard>(options_.executor) : std::make_shared<Shard>()) {}

Client::~Client() = default;

void Client::start() {
  shard_->start(
      [self = weak_from_this(), shard = shard_.get()](const std::exception_ptr& exception) {
        shard->counters().handler_failures.add(1);
        if (const auto client = self.lock()) {
          client->failed({{}, Error(Errc::handler_failed, text_of(exception)), exception});
        }
      },
      nullptr,
      [self = weak_from_this()] {
        if (const auto client = self.lock()) client->abandoned();
      });
}

std::optional<Client::Target> Client::begin_connect(std::string_view url, Error& error) {
  auto endpoint = parse_url(url, error);
  if (!endpoint) return std::nullopt;
  Target target{.endpoint = std::move(*endpoint), .make_connection = {}};
  const std::lock_guard lock(mutex_);
  if (state_ != State::idle) {
    error = {Errc::wrong_state, state_ == State::cut          ? "the client, or its executor, has been destroyed"
                                : state_ == State::connecting ? "another connect() is under way"
                                                              : "already connected"};
    return std::nullopt;
  }
  target.make_connection = factory_for(target.endpoint, options_, tls_, error);
  if (error) return std::nullopt;
  state_ = State::connecting;
  return target;
}

void Client::connect(Target target, asio::cancellation_slot slot, Connected connected) {
  const auto attempt = std::make_shared<Attempt>(shared_from_this(), std::move(target), std::move(connected));
  if (slot.is_connected()) {
    // Weak: the user's slot may outlive the context that the attempt's sockets are of.
    slot.assign([shard = shard_, watched = std::weak_ptr(attempt)](asio::cancellation_type type) {
      if (type == asio::cancellation_type::none) return;
      shard->post([watched] {
        const auto alive = watched.lock();
        if (alive) alive->end(Error(asio::error::operation_aborted, "connecting was cancelled"));
      });
    });
  }
  shard_->post([self = shared_from_this(), attempt] {
    self->attempt_ = attempt;
    attempt->start();
  });
}

void Client::established(Link link, Peer peer, Error& error) {
  const SessionPtr session(new SessionState(next_session_id(), shard_, shared_from_this(), session_options_,
                                            std::move(link), std::move(peer)));
  try {
    session->open();
  } catch (const boost::system::system_error& failure) {
    session->refuse();
    error = Error(failure.code(), failure.what());
    return;
  } catch (const std::exception&) {
    session->refuse();
    throw;
  }
  const std::lock_guard lock(mutex_);
  session_ = session;
  if (state_ == State::connecting) {
    state_ = State::connected;
  } else {
    error = Error(asio::error::operation_aborted, "the client was destroyed");  // which cuts the session
  }
}

/// The attempt is over.
void Client::settle_attempt(Error error, Connected connected) {
  attempt_ = nullptr;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::connecting) state_ = State::idle;
    changed_.notify_all();
  }
  std::move(connected)(std::move(error));
}

void Client::ended(SessionState& state, const Error& reason) noexcept {
  {
    // First, so that the handler may connect again.
    const std::lock_guard lock(mutex_);
    if (state_ == State::connected) state_ = State::idle;
  }
  if (on_disconnect && !silent_.load()) {
    Session session{SessionPtr(&state)};
    std::exception_ptr exception;
    try {
      on_disconnect(session, reason);
    } catch (...) {
      exception = std::current_exception();
    }
    if (exception) {
      shard_->counters().handler_failures.add(1);
      failed({state.id(), Error(Errc::handler_failed, text_of(exception)), exception});
    }
  }
  const std::lock_guard lock(mutex_);
  last_ended_ = state.id();
  changed_.notify_all();
}

void Client::failed(const ErrorEvent& event) noexcept {
  if (!on_error || silent_.load()) return;
  try {
    on_error(event);
  } catch (...) {
    shard_->counters().handler_failures.add(1);
  }
}

void Client::connect_and_wait(std::string_view url, Error& error) {
  error = {};
  if (Shard::must_not_block()) {
    error = Error(Errc::blocking_on_shard, "connect() would block a thread that runs handlers; use async_connect");
    return;
  }
  struct Waiter {
    std::mutex mutex;
    std::condition_variable ended;
    bool done = false;
    Error error;
  } waiter;
  Connected connected = [&waiter](Error result) {
    const std::lock_guard lock(waiter.mutex);
    waiter.error = std::move(result);
    waiter.done = true;
    waiter.ended.notify_one();
  };
  auto target = begin_connect(url, error);
  if (!target) return;
  connect(std::move(*target), {}, std::move(connected));
  std::unique_lock lock(waiter.mutex);
  waiter.ended.wait(lock, [&] { return waiter.done; });
  error = std::move(waiter.error);
}

SessionPtr Client::current() const {
  const std::lock_guard lock(mutex_);
  return state_ == State::connected ? session_ : nullptr;
}

SessionStats Client::stats() const {
  const std::lock_guard lock(mutex_);
  return session_ ? session_->stats() : SessionStats{};
}

void Client::close() {
  const SessionPtr session = current();
  if (!session) return;
  session->close(Error(Errc::closed_by_user));
  // The user's executor may be run by this very thread.
  if (Shard::must_not_block() || options_.executor) return;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return last_ended_ >= session->id(); });
}

void Client::cut() {
  {
    const std::lock_guard lock(mutex_);
    state_ = State::cut;
  }
  shard_->post([self = shared_from_this()] {
    const auto& shard = self->shard_;
    if (self->attempt_) self->attempt_->end(Error(asio::error::operation_aborted, "the client was destroyed"));
    const auto finish = [self] {
      self->shard_->finish([self] {
        const std::lock_guard lock(self->mutex_);
        self->shard_finished_ = true;
        self->changed_.notify_all();
      });
    };
    if (shard->session_count() == 0) return finish();
    shard->on_empty = finish;
    for (const auto& session : shard->sessions()) session->abort(Error(Errc::closed_by_user));
  });
  // On the user's executor there is nothing to wait for: it may never run again.
  if (Shard::must_not_block() || options_.executor) return;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return shard_finished_; });
  lock.unlock();
  shard_->join();
}

/// The context of the shard is being destroyed.
void Client::abandoned() {
  {
    const std::lock_guard lock(mutex_);
    state_ = State::cut;
  }
  if (attempt_) attempt_->end(Error(asio::error::operation_aborted, "the client's executor has gone"));
}

void Client::silence() noexcept {
  silent_.store(true);
  if (!Shard::must_not_block()) shard_->wait_until_idle();
}

}  // namespace msgtrans::detail

namespace msgtrans {

ClientTransport::ClientTransport(ClientOptions options)
    : client_(std::make_shared<detail::Client>(std::move(options))) {
  client_->start();
}

ClientTransport::~ClientTransport() {
  client_->cut();
  client_->silence();
}

void ClientTransport::on_message(MessageHandler handler) {
  client_->set(&detail::Client::on_message, std::move(handler));
}
void ClientTransport::on_disconnect(DisconnectHandler handler) {
  client_->set(&detail::Client::on_disconnect, std::move(handler));
}
void ClientTransport::on_writable(WritableHandler handler) {
  client_->set(&detail::Client::on_writable, std::move(handler));
}
void ClientTransport::on_error(ErrorHandler handler) {
  client_->set(&detail::Client::on_error, std::move(handler));
}

void ClientTransport::connect(std::string_view url) {
  Error error;
  connect(url, error);
  if (error) throw Exception(error);
}

void ClientTransport::connect(std::string_view url, Error& error) {
  client_->connect_and_wait(url, error);
}

void ClientTransport::start_connect(const std::shared_ptr<detail::Client>& client, const std::string& url,
                                    detail::ConnectHandler handler) {
  const auto shard = client->shard();
  const auto slot = detail::asio::get_associated_cancellation_slot(handler);
  auto work = detail::tracked_executor(handler, shard->executor());
  Error error;
  auto target = client->begin_connect(url, error);
  if (!target) {
    detail::complete_later(shard->executor(), std::move(work), std::move(handler), error.code);
    return;
  }
  client->connect(std::move(*target), slot,
                  [shard, work = std::move(work), handler = std::move(handler)](const Error& result) mutable {
                    shard->later(std::move(work), std::move(handler), result.code);
                  });
}

bool ClientTransport::is_connected() const noexcept {
  const auto state = client_->current();
  return state && state->is_open();
}

std::optional<Session> ClientTransport::session() const {
  if (auto state = client_->current()) return Session(std::move(state));
  return std::nullopt;
}

SendResult ClientTransport::send(BytesView payload, const SendOptions& options) {
  const auto state = client_->current();
  return state ? state->send(payload, options) : SendResult::closed;
}

Reply ClientTransport::request(BytesView payload, const RequestOptions& options) {
  Error error;
  Reply reply = request(payload, options, error);
  if (error) throw Exception(error);
  return reply;
}

Reply ClientTransport::request(BytesView payload, const RequestOptions& options, Error& error) {
  auto state = client_->current();
  if (!state) {
    error = Error(Errc::closed, "not connected");
    return {};
  }
  return detail::request(std::move(state), payload, options, error);
}

void ClientTransport::close() {
  client_->close();
}
SessionStats ClientTransport::stats() const {
  return client_->stats();
}
RequestStats ClientTransport::request_stats() const {
  const auto& counters = std::as_const(*client_->shard()).counters();
  RequestStats stats{.counts = counters.requests.value(), .latency = {}};
  counters.request_latency.add_to(stats.latency);
  return stats;
}
detail::SessionPtr ClientTransport::current() const {
  return client_->current();
}

detail::Home ClientTransport::home() const {
  return {client_->shard(), Errc::closed};
}

}  // namespace msgtrans
