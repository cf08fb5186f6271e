// SPDX-License-Identifier: Apache-2.0
#include "client.hpp"

#include "complete.hpp"
#include "custom_transports.hpp"
#include "handshake.hpp"
#include "sockets.hpp"

#include <algorithm>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/ip/address.hpp>
#include <msgtrans/detail/exception_text.hpp>
#include <msgtrans/detail/insist.hpp>
#include <random>
#include <unistd.h>
#include <utility>

namespace msgtrans::detail {

using asio::ip::tcp;

/// One try to connect to one endpoint: looks the name up, then tries its addresses one after the other, all within the
/// time. On the shard.
class Client::Attempt : public std::enable_shared_from_this<Attempt> {
 public:
  Attempt(std::shared_ptr<Client> client, const Target& target)
      : client_(std::move(client)),
        target_(target.endpoint),
        make_connection_(target.make_connection),
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
    if (!std::exchange(active_, false)) return;
    deadline_.cancel();
    resolver_.cancel();
    retry_.cancel();
    error_code ignored;
    socket_.close(ignored);
    custom_attempt_ = nullptr;
    if (handshake_) std::exchange(handshake_, nullptr)->end(error);
    client_->attempted(std::move(error));
  }

 private:
  void next() {
    if (!active_) return;
    if (next_ == addresses_.size()) return end(std::move(last_error_));
    const tcp::endpoint address = addresses_[next_++];
    error_code ignored;
    socket_.close(ignored);
    socket_.async_connect(address, [self = shared_from_this(), address](const error_code& error) {
      Shard::Scope scope(*self->client_->shard_);
      if (!self->active_) return;
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
            if (self && self->active_) {
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
    if (!active_) return;
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
    if (!active_) return;
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
  bool active_ = true;
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
  if (!error) error = validate(options.reconnect);
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
      keeps_(options_.reconnect.enabled && options_.reconnect.keep_packets != 0),
      retries_(options_.reconnect.enabled && options_.reconnect.retry_requests != 0),
      session_options_(std::make_shared<const SessionOptions>(options_.session)),
      shard_(options_.executor ? std::make_shared<Shard>(options_.executor) : std::make_shared<Shard>()),
      chance_{options_.reconnect.jitter_seed} {
  if (options_.reconnect.enabled && chance_.state == 0) {
    std::random_device device;
    chance_.state = (std::uint64_t{device()} << 32) | device();
  }
}

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

// --- a series

std::optional<Client::Claim> Client::begin_connect(std::span<const std::string> urls, Error& error) {
  Claim claim;
  for (const auto& url : urls) {
    auto endpoint = parse_url(url, error);
    if (!endpoint) return std::nullopt;
    claim.targets.push_back({.endpoint = std::move(*endpoint), .make_connection = {}, .url = url});
  }
  if (claim.targets.empty()) {
    error = {Errc::invalid_address, "no URL to connect to"};
    return std::nullopt;
  }
  const std::lock_guard lock(mutex_);
  if (state_ != State::idle) {
    error = {Errc::wrong_state, state_ == State::cut            ? "the client, or its executor, has been destroyed"
                                : state_ == State::connecting   ? "another connect() is under way"
                                : state_ == State::reconnecting ? "the client is reconnecting"
                                                                : "already connected"};
    return std::nullopt;
  }
  for (auto& target : claim.targets) {
    target.make_connection = factory_for(target.endpoint, options_, tls_, error);
    if (error) return std::nullopt;
  }
  state_ = State::connecting;
  claim.series = ++series_number_;
  return claim;
}

void Client::connect(Claim claim, asio::cancellation_slot slot, Connected connected) {
  if (slot.is_connected()) {
    // Weak: the user's slot may outlive the context that the attempt's sockets are of.
    slot.assign([shard = shard_, weak = weak_from_this(), number = claim.series](asio::cancellation_type type) {
      if (type == asio::cancellation_type::none) return;
      shard->post([weak, number] {
        if (const auto self = weak.lock()) self->cancel_connect(number);
      });
    });
  }
  Series series;
  series.number = claim.series;
  series.targets = std::move(claim.targets);
  series.connected.swap(connected);  // assigning is broken in Boost 1.81
  shard_->post([self = shared_from_this(), series = std::move(series)]() mutable { self->begin(std::move(series)); });
}

void Client::begin(Series series) noexcept {
  series_.emplace(std::move(series));
  bool wanted = false;
  {
    const std::lock_guard lock(mutex_);
    wanted = state_ == State::connecting && !closing_;
  }
  if (!wanted) return end_series(Error(asio::error::operation_aborted, "closed while connecting"));
  try_next();
}

void Client::try_next() noexcept {
  if (series_->tried++ == 0) attempts_.add(1);
  tries_.add(1);
  std::shared_ptr<Attempt> attempt;
  try {
    attempt = std::make_shared<Attempt>(shared_from_this(), series_->targets[series_->current()]);
    attempt_ = attempt;
    attempt->start();
  } catch (const std::exception& failure) {
    Error error(make_error_code(boost::system::errc::not_enough_memory), failure.what());
    if (attempt) return attempt->end(std::move(error));
    attempted(std::move(error));
  }
}

/// The attempt at one endpoint is over.
void Client::attempted(Error error) noexcept {
  attempt_ = nullptr;
  if (!error) return;  // established() did the rest
  failures_.add(1);
  if (!series_) return;
  auto& series = *series_;
  bool wanted = false;
  {
    const std::lock_guard lock(mutex_);
    wanted = in_series();
  }
  if (!wanted) return end_series(Error(asio::error::operation_aborted, "closed while connecting"));
  if (series.error) {
    try {
      error.text = series.error.message() + "; " + error.message();
    } catch (const std::bad_alloc&) {
      // The last one's says enough.
    }
  }
  series.error = std::move(error);
  if (series.tried < series.targets.size()) {
    // Later: a long list must not fill the stack.
    insist([&] {
      shard_->post([self = shared_from_this(), number = series.number] {
        if (self->series_ && self->series_->number == number) self->try_next();
      });
    });
    return;
  }
  Error last = std::exchange(series.error, {});
  const auto& options = options_.reconnect;
  if (!options.enabled || (!series.established && !options.retry_first_connect)) return end_series(std::move(last));
  schedule(std::move(last));
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
  {
    const std::lock_guard lock(mutex_);
    session_ = session;
    if (state_ != State::connecting && state_ != State::reconnecting) {
      error = Error(asio::error::operation_aborted, "the client was destroyed");  // which cuts the session
      return;
    }
    state_ = State::connected;
    opening_ = true;
    for (auto& lane : lanes_) lane.offered = false;
  }
  connections_.add(1);
  auto& series = *series_;
  series.since = Clock::now();
  series.error = {};
  const bool first = !std::exchange(series.established, true);
  if (on_connect && !silent_.load()) {
    Error failure;
    in_on_connect_ = true;
    const bool good = call_handler(
        session->id(),
        [&] {
          Session lent{session};
          on_connect(lent,
                     {.reconnection = !first, .attempt = series.attempt, .url = series.targets[series.current()].url});
        },
        &failure);
    in_on_connect_ = false;
    if (!good) session->close(std::move(failure));
  }
  if (!keeps_ && !retries_) return open_to_all();
  // Behind what it has sent, which may still be on its way.
  insist([&] {
    shard_->post([self = shared_from_this(), session] {
      if (self->session_ == session) self->open_to_all();
    });
  });
}

/// What on_connect sent is on its way: now the others may.
void Client::open_to_all() noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (state_ != State::connected || !opening_) return;
    opening_ = false;
  }
  tell_connected({});
  if (retries_) ask_again();
  if (!keeps_) return;
  for (std::size_t lane = lane_count; lane-- > 0;) offer(lane);
  close_if_sent();
}

void Client::tell_connected(Error error) noexcept {
  if (!series_ || !series_->connected) return;
  Connected connected;
  connected.swap(series_->connected);
  std::move(connected)(std::move(error));
}

/// The attempt has failed, or its connection has ended: another, after a while.
void Client::schedule(Error error) noexcept {
  auto& series = *series_;
  const auto& options = options_.reconnect;
  bool wanted = false;
  {
    const std::lock_guard lock(mutex_);
    wanted = in_series();
    if (wanted) state_ = State::reconnecting;
  }
  if (!wanted) return end_series(Error(asio::error::operation_aborted, "the client was closed"));
  if (options.max_attempts != 0 && series.attempt >= options.max_attempts) return end_series(std::move(error), true);
  ++series.attempt;
  series.tried = 0;
  series.error = {};
  const protocol::Backoff backoff{
      .initial = options.initial_delay, .factor = options.factor, .max = options.max_delay, .jitter = options.jitter};
  const auto delay = backoff.delay(series.attempt, chance_.fraction());
  insist([&] {
    backoff_timer_.emplace(shard_->executor(), Clock::now() + delay);
    backoff_timer_->async_wait([self = shared_from_this(), number = series.number](const error_code& cancelled) {
      if (cancelled) return;
      Shard::Scope scope(*self->shard_);
      self->backoff_over(number);
    });
  });
  if (on_reconnecting && !silent_.load()) {
    const ReconnectEvent event{.attempt = series.attempt, .delay = delay, .error = std::move(error)};
    call_handler({}, [&] { on_reconnecting(event); });
  }
}

void Client::backoff_over(std::uint64_t series) noexcept {
  if (!series_ || series_->number != series) return;
  backoff_timer_.reset();
  bool wanted = false;
  {
    const std::lock_guard lock(mutex_);
    wanted = in_series();
  }
  if (!wanted) return end_series(Error(asio::error::operation_aborted, "the client was closed"));
  try_next();
}

/// While there is no session.
void Client::end_series(Error error, bool gave_up) noexcept {
  if (!series_) return;
  Series series = std::move(*series_);
  series_.reset();
  if (attempt_) attempt_->end(error);
  leave_series(series.number);
  if (series.connected) {
    std::move(series.connected)(std::move(error));
  } else if (gave_up && on_gave_up && !silent_.load()) {
    call_handler({}, [&] { on_gave_up(error); });
  }
  series_ended(series.number);
}

/// Nothing more comes of it: what waits for a connection ends. Then the client may be connected again.
void Client::leave_series(std::uint64_t series) noexcept {
  backoff_timer_.reset();
  request_timer_.reset();
  std::array<Lane, lane_count> left;
  {
    const std::lock_guard lock(mutex_);
    if (series_number_ != series) return;
    left.swap(lanes_);
    // The session may have taken what it was offered: offered() is about to be told.
    for (const auto& lane : left) kept_dropped_ += lane.kept.size() - (lane.offered ? 1 : 0);
    kept_ = {};
    opening_ = false;
  }
  send_timer_.reset();
  for (auto& lane : left) {
    for (auto& waiting : lane.waiting) waiting->finish(Errc::closed, *shard_);
  }
  while (!requests_.empty()) {
    const auto first = requests_.begin();
    const bool sent = first->second.turn != 0;
    finish_request(first, sent ? Errc::connection_lost : Errc::closed, {});
  }
  const std::lock_guard lock(mutex_);
  closing_ = false;
  if (state_ != State::cut) state_ = State::idle;
}

void Client::series_ended(std::uint64_t series) noexcept {
  const std::lock_guard lock(mutex_);
  ended_series_ = std::max(ended_series_, series);
  changed_.notify_all();
}

void Client::cancel_connect(std::uint64_t series) noexcept {
  if (!series_ || series_->number != series || !series_->connected || series_->established) return;
  end_series(Error(asio::error::operation_aborted, "connecting was cancelled"));
}

/// Calls a handler of the user; false if it threw, which is reported.
template <class F>
bool Client::call_handler(SessionId session, F f, Error* failure) noexcept {
  std::exception_ptr exception;
  try {
    f();
    return true;
  } catch (...) {
    exception = std::current_exception();
  }
  shard_->counters().handler_failures.add(1);
  const ErrorEvent event{session, Error(Errc::handler_failed, text_of(exception)), exception};
  if (failure != nullptr) *failure = event.error;
  failed(event);
  return false;
}

void Client::ended(SessionState& state, const Error& reason) noexcept {
  bool again = false;
  {
    const std::lock_guard lock(mutex_);
    again = state_ == State::connected && options_.reconnect.enabled && !closing_ && series_;
    if (again) state_ = State::reconnecting;
    opening_ = false;
  }
  if (series_) tell_connected({});  // it was
  std::uint64_t number = 0;
  if (series_) {
    number = series_->number;
    // First, so that the handler may connect again.
    if (!again) {
      series_.reset();
      leave_series(number);
    }
  }
  if (on_disconnect && !silent_.load()) {
    Session session{SessionPtr(&state)};
    call_handler(state.id(), [&] { on_disconnect(session, reason); });
  }
  if (!again) return series_ended(number);
  auto& series = *series_;
  const auto held = options_.reconnect.reset_after;
  if (Clock::now() - series.since >= held) {
    series.attempt = 0;
    series.first = 0;
  } else {
    series.first = (series.current() + 1) % series.targets.size();
  }
  schedule(reason);
}

void Client::failed(const ErrorEvent& event) noexcept {
  if (!on_error || silent_.load()) return;
  try {
    on_error(event);
  } catch (...) {
    shard_->counters().handler_failures.add(1);
  }
}

void Client::connect_and_wait(std::span<const std::string> urls, Error& error) {
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
  auto claim = begin_connect(urls, error);
  if (!claim) return;
  connect(std::move(*claim), {}, std::move(connected));
  std::unique_lock lock(waiter.mutex);
  waiter.ended.wait(lock, [&] { return waiter.done; });
  error = std::move(waiter.error);
}

SessionPtr Client::current() const {
  const std::lock_guard lock(mutex_);
  if (state_ != State::connected || (opening_ && Shard::current() != shard_.get())) return nullptr;
  return session_;
}

SessionStats Client::stats() const {
  const std::lock_guard lock(mutex_);
  return session_ ? session_->stats() : SessionStats{};
}

void Client::close() {
  std::uint64_t number = 0;
  SessionPtr session;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::idle || state_ == State::cut) return;
    number = series_number_;
    closing_ = true;
    if (state_ == State::connected && kept_.packets == 0) session = session_;
  }
  if (session) {
    session->close(Error(Errc::closed_by_user));
  } else {
    insist([&] { shard_->post([self = shared_from_this(), number] { self->close_here(number); }); });
  }
  // The user's executor may be run by this very thread.
  if (Shard::must_not_block() || options_.executor) return;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return ended_series_ >= number || shard_finished_; });
}

void Client::close_here(std::uint64_t series) noexcept {
  if (!series_ || series_->number != series) return;
  SessionPtr session;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::connected) session = session_;
  }
  if (!session) return end_series(Error(asio::error::operation_aborted, "the client was closed"));
  // What is kept was accepted, so it goes out first; in the time that a session has for that.
  insist([&] {
    backoff_timer_.emplace(shard_->executor(), Clock::now() + options_.session.close_timeout);
    backoff_timer_->async_wait([self = shared_from_this(), session](const error_code& cancelled) {
      if (cancelled) return;
      Shard::Scope scope(*self->shard_);
      session->close(Error(Errc::closed_by_user));
    });
  });
  close_if_sent();
}

/// What was kept has gone out, and the client is to be closed.
void Client::close_if_sent() noexcept {
  SessionPtr session;
  {
    const std::lock_guard lock(mutex_);
    if (!closing_ || opening_ || state_ != State::connected || kept_.packets != 0) return;
    session = session_;
  }
  backoff_timer_.reset();
  session->close(Error(Errc::closed_by_user));
}

void Client::cut() {
  {
    const std::lock_guard lock(mutex_);
    state_ = State::cut;
  }
  shard_->post([self = shared_from_this()] {
    const auto& shard = self->shard_;
    self->end_series(Error(asio::error::operation_aborted, "the client was destroyed"));
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
void Client::abandoned() noexcept {
  {
    const std::lock_guard lock(mutex_);
    state_ = State::cut;
  }
  end_series(Error(asio::error::operation_aborted, "the client's executor has gone"));
}

void Client::add_interceptor(bool inbound, Interceptor interceptor) {
  const std::lock_guard lock(mutex_);
  if (state_ != State::idle) throw Exception(Error(Errc::wrong_state, "interceptors are added before connect()"));
  insert_interceptor(inbound ? intercept_in_ : intercept_out_, std::move(interceptor), weak_from_this(), shard_);
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
void ClientTransport::add_interceptor(bool inbound, Interceptor interceptor) {
  client_->add_interceptor(inbound, std::move(interceptor));
}
void ClientTransport::on_error(ErrorHandler handler) {
  client_->set(&detail::Client::on_error, std::move(handler));
}

void ClientTransport::on_connect(ClientConnectHandler handler) {
  client_->set(&detail::Client::on_connect, std::move(handler));
}
void ClientTransport::on_reconnecting(ReconnectHandler handler) {
  client_->set(&detail::Client::on_reconnecting, std::move(handler));
}
void ClientTransport::on_gave_up(GaveUpHandler handler) {
  client_->set(&detail::Client::on_gave_up, std::move(handler));
}

void ClientTransport::connect(std::string_view url) {
  connect(std::vector<std::string>{std::string(url)});
}
void ClientTransport::connect(std::string_view url, Error& error) {
  connect(std::vector<std::string>{std::string(url)}, error);
}
void ClientTransport::connect(const std::vector<std::string>& urls) {
  Error error;
  connect(urls, error);
  if (error) throw Exception(error);
}
void ClientTransport::connect(const std::vector<std::string>& urls, Error& error) {
  client_->connect_and_wait(urls, error);
}

void ClientTransport::start_connect(const std::shared_ptr<detail::Client>& client, const std::vector<std::string>& urls,
                                    detail::ConnectHandler handler) {
  const auto shard = client->shard();
  const auto slot = detail::asio::get_associated_cancellation_slot(handler);
  auto work = detail::tracked_executor(handler, shard->executor());
  Error error;
  auto claim = client->begin_connect(urls, error);
  if (!claim) {
    detail::complete_later(shard->executor(), std::move(work), std::move(handler), error.code);
    return;
  }
  client->connect(std::move(*claim), slot,
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
  if (client_->keeps()) return client_->send(payload, options);
  const auto state = client_->current();
  return state ? state->send(payload, options) : SendResult::closed;
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
ClientStats ClientTransport::client_stats() const {
  return client_->client_stats();
}

}  // namespace msgtrans
