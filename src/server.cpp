// SPDX-License-Identifier: Apache-2.0
#include "server.hpp"

#include "broadcast.hpp"
#include "check_option.hpp"
#include "complete.hpp"
#include "custom_transports.hpp"
#include "handshake.hpp"
#include "shard_executor.hpp"
#include "websocket.hpp"

#include <algorithm>
#include <boost/asio/signal_set.hpp>
#include <csignal>
#include <msgtrans/detail/exception_text.hpp>
#include <msgtrans/detail/insist.hpp>
#include <msgtrans/lockfree/epoch.hpp>
#include <thread>
#include <unistd.h>

namespace msgtrans::detail {

namespace {

ServerOptions checked(ServerOptions options) {
  Error error = validate(options.session);
  const auto range = [&error](const char* name, std::uint64_t value, std::uint64_t least, std::uint64_t most) {
    if (!error) error = check_range(name, value, least, most);
  };
  range("shards", options.shards, 0, 1024);
  range("max_sessions", options.max_sessions, 1, ~std::uint64_t{0});
  range("max_group_name", options.max_group_name, 1, 65535);
  range("event_capacity", options.event_capacity, 1, BroadcastChannel<Event>::max_capacity);
  range("accept_rate", options.accept_rate, 0, protocol::TokenBucket::most);
  range("accept_burst", options.accept_burst, 0, protocol::TokenBucket::most);
  range("accept_rate_per_address", options.accept_rate_per_address, 0, protocol::TokenBucket::most);
  range("accept_burst_per_address", options.accept_burst_per_address, 0, protocol::TokenBucket::most);
  if (!error) error = check_duration("admission_timeout", options.admission_timeout);
  if (!error && options.drain.count() < 0) error = Error(Errc::invalid_option, "drain is negative");
  if (!error && !options.executors.empty()) {
    if (options.shards != 0 && options.shards != options.executors.size()) {
      error = Error(Errc::invalid_option, "shards is " + std::to_string(options.shards) + ", but there are " +
                                              std::to_string(options.executors.size()) + " executors");
    }
    if (std::ranges::any_of(options.executors, [](const auto& executor) { return !executor; })) {
      error = Error(Errc::invalid_option, "executors holds an empty executor");
    }
  }
  if (error) throw Exception(error);
  return options;
}

}  // namespace

Server::Server(ServerOptions options)
    : options_(checked(std::move(options))),
      registry_(std::make_shared<SessionRegistry>(
          SessionRegistry::Limits{.sessions = options_.max_sessions,
                                  .sessions_per_address = options_.max_sessions_per_address,
                                  .rate = options_.accept_rate,
                                  .burst = options_.accept_burst,
                                  .rate_per_address = options_.accept_rate_per_address,
                                  .burst_per_address = options_.accept_burst_per_address},
          Clock::now(),
          GroupLimits{.groups_per_session = options_.max_groups_per_session, .name = options_.max_group_name})),
      session_options_(std::make_shared<const SessionOptions>(options_.session)) {
  if (options_.executors.empty()) {
    const unsigned count = options_.shards != 0 ? options_.shards : std::max(1U, std::thread::hardware_concurrency());
    for (unsigned i = 0; i < count; ++i) shards_.push_back(std::make_shared<Shard>());
  } else {
    for (const auto& executor : options_.executors) shards_.push_back(std::make_shared<Shard>(executor));
  }
  control_ = std::make_shared<ControlLoop>(
      shards_.front()->executor(),
      options_.executors.empty() ? ControlLoop::Runs::on_own_thread : ControlLoop::Runs::on_executor,
      options_.event_capacity, shards_.front()->context());
  std::shared_ptr<OutboundShare> share;
  if (options_.outbound_bytes_total != 0) {
    share = std::make_shared<OutboundShare>(options_.outbound_bytes_total);
    std::vector<std::weak_ptr<Shard>> all(shards_.begin(), shards_.end());
    share->on_room = [all = std::move(all)] {
      for (const auto& weak : all) {
        if (const auto shard = weak.lock()) shard->post([raw = shard.get()] { raw->look_for_room(); });
      }
    };
  }
  for (const auto& shard : shards_) {
    shard->index = shard_executors_.size();
    shard->set_control(control_);
    shard->set_outbound_share(share);
    shard_executors_.emplace_back(ShardExecutor(shard));
  }
}

std::shared_ptr<Server> Server::make(ServerOptions options) {
  auto server = std::make_shared<Server>(std::move(options));
  server->actors_ = std::make_unique<ActorManager<OwnedMessage>>(
      server->shard_executors_,
      ActorManagerOptions{.on_event = [control = server->control_](const Event& event) { control->announce(event); },
                          .on_escalation =
                              [weak = std::weak_ptr(server)](const Error& error) {
                                const auto self = weak.lock();
                                if (!self) return;
                                self->failed({{}, error, nullptr});
                                self->begin_stop({.within = self->options_.drain});
                              }});
  return server;
}

Server::~Server() = default;

std::optional<Endpoint> Server::listen(const Endpoint& endpoint, const ListenOptions& options,
                                       std::span<ListeningSocket> sockets, Error& error) {
  error = {};
  if (options.session) error = validate(*options.session);
  if (!error) error = check_range("backlog", options.backlog, 1, 65535);
  if (!error && options.permissions > 0777) {
    error = Error(Errc::invalid_option, "permissions is " + std::to_string(options.permissions) +
                                            ", must be from 0 to " + std::to_string(0777) + " (0777)");
  }
  if (!error) error = check_duration("handshake_timeout", options.handshake_timeout);
  if (!error && is_websocket(endpoint.transport)) {
    error = validate(options.websocket);
    const bool is_path = endpoint.path.empty() || endpoint.path.front() == '/';
    if (!error && (!is_path || endpoint.path.find_first_of("?# ") != std::string::npos)) {
      error = Error(Errc::invalid_address, "invalid address \"" + endpoint.to_string() +
                                               "\": a listener's path begins with / and has no query");
    }
  }
  if (error) return std::nullopt;
  const auto session = options.session ? std::make_shared<const SessionOptions>(*options.session) : session_options_;
  std::shared_ptr<TlsOfListener> tls;
  auto make_connection = factory_for(endpoint, options, *session, tls, error);
  if (error) return std::nullopt;
  const bool is_unix = endpoint.transport == Transport::unix_socket;
  const auto custom = custom_transport_of(endpoint);
  if (endpoint.transport == Transport::custom && !custom) {
    error = Error(Errc::invalid_address, "no transport is registered for \"" + std::string(endpoint.scheme) + "\"");
    return std::nullopt;
  }
  if (custom && !sockets.empty()) {
    error = Error(Errc::invalid_option, endpoint.url() + " does not go over a socket");
    return std::nullopt;
  }
  std::vector<asio::ip::tcp::endpoint> addresses;
  if (!is_unix && !custom && sockets.empty() && (addresses = look_up(endpoint, true, error)).empty())
    return std::nullopt;

  // A user's code, so not under the lock.
  std::shared_ptr<CustomListener> custom_listener;
  std::string custom_address;
  if (custom) {
    try {
      custom_listener = custom->listen(endpoint.path, options, error);
      if (custom_listener) custom_address = custom_listener->address();
    } catch (const std::exception& failure) {
      custom_listener = nullptr;
      error = Error(make_error_code(boost::system::errc::not_enough_memory), failure.what());
    }
    if (!custom_listener) {
      if (!error) error = Error(Errc::not_supported);
      error.text = "cannot listen on " + endpoint.url() + ": " + error.message();
      return std::nullopt;
    }
  }

  const std::lock_guard lock(mutex_);
  if (state_ != State::idle && state_ != State::running) {
    error = Error(Errc::wrong_state, "the server has been stopped");
    return std::nullopt;
  }
  const auto record = std::make_shared<ListenerRecord>(
      ListenerRecord{.endpoint = {}, .shards = std::vector<ConnectionCounters>(shards_.size())});
  Listener listener{
      .endpoint = endpoint,
      .options = std::make_shared<const ListenerOptions>(ListenerOptions{.session = session,
                                                                         .handshake_timeout = options.handshake_timeout,
                                                                         .make_connection = std::move(make_connection),
                                                                         .record = record,
                                                                         .number = last_listener_ + 1,
                                                                         .drain = std::make_shared<ListenerDrain>()}),
      .acceptors = {},
      .file = {},
      .tls = std::move(tls),
      .custom = custom_listener};
  if (!sockets.empty()) {
    if (!adopt(sockets, listener, options, error)) return std::nullopt;
  } else if (custom) {
    listener.endpoint.path = custom_address;
    listener.endpoint.scheme = find_scheme(endpoint.scheme);  // the name that lasts
  } else if (is_unix) {
    // The system deals connections out among the listeners of a port, but a file has only one.
    listener.file = std::make_shared<SocketFile>();
    Descriptor socket = listen_unix(endpoint, options.backlog, options.permissions, *listener.file, error);
    if (!socket) return std::nullopt;
    listener.acceptors.push_back(std::make_shared<Acceptor>(shards_.front(), std::move(socket), endpoint.transport));
  } else {
    asio::ip::tcp::endpoint bound;
    auto made = listen_tcp(addresses.front(), shards_.size(), options.backlog, bound, error);
    if (made.empty()) return std::nullopt;
    listener.endpoint = Peer{.transport = endpoint.transport, .address = bound}.endpoint();
    listener.endpoint.path = endpoint.path;
    for (std::size_t i = 0; i < shards_.size(); ++i) {
      listener.acceptors.push_back(std::make_shared<Acceptor>(shards_[i], std::move(made[i]), endpoint.transport));
    }
  }
  record->endpoint = listener.endpoint;
  listeners_.push_back(listener);
  records_.push_back(record);
  ++last_listener_;
  if (state_ == State::running) start_accepting(listener);
  return listener.endpoint;
}

/// The sockets are taken only if all of them can be.
bool Server::adopt(std::span<ListeningSocket> sockets, Listener& listener, const ListenOptions& options,
                   Error& error) const {
  const Transport transport = listener.endpoint.transport;
  std::optional<Endpoint> bound;
  for (const auto& socket : sockets) {
    const auto address = prepare_listening(socket.descriptor(), transport, options.backlog, error);
    if (!address) return false;
    if (bound && *bound != *address) {
      error = Error(Errc::invalid_option, "one listener is to have a socket at " + bound->to_string() +
                                              " and another at " + address->to_string());
      return false;
    }
    bound = address;
  }
  if (transport == Transport::unix_socket) {
    if (std::ranges::any_of(sockets, &ListeningSocket::owns_file) && bound->path.front() != '@') {
      auto file = SocketFile::of(bound->path, error);
      if (!file) return false;
      listener.file = std::make_shared<SocketFile>(*std::move(file));
    }
    listener.endpoint.path = bound->path;
  } else {
    listener.endpoint.host = bound->host;
    listener.endpoint.port = bound->port;
  }
  for (std::size_t i = 0; i < sockets.size(); ++i) {
    listener.acceptors.push_back(std::make_shared<Acceptor>(shards_[i % shards_.size()], Descriptor(), transport));
  }
  for (std::size_t i = 0; i < sockets.size(); ++i) listener.acceptors[i]->take(Descriptor(sockets[i].release()));
  return true;
}

std::optional<Endpoint> Server::listen_or_adopt(const Endpoint& endpoint, const ListenOptions& options,
                                                std::vector<ListeningSocket>& inherited, Error& error) {
  error = {};
  const bool is_unix = endpoint.transport == Transport::unix_socket;
  std::vector<asio::ip::tcp::endpoint> wanted;
  if (!is_unix && !custom_transport_of(endpoint) && (wanted = look_up(endpoint, true, error)).empty()) {
    return std::nullopt;
  }
  const auto fits = [&](const ListeningSocket& socket) {
    Error none;
    const Endpoint address = socket.address(none);
    if (none || is_unix != (address.transport == Transport::unix_socket)) return false;
    if (is_unix) return address.path == endpoint.path;
    error_code code;
    const auto ip = asio::ip::make_address(address.host, code);
    return !code && !wanted.empty() && wanted.front() == asio::ip::tcp::endpoint(ip, address.port);
  };
  const auto others = std::stable_partition(inherited.begin(), inherited.end(), fits);
  const std::span<ListeningSocket> ours(inherited.begin(), others);
  auto bound = listen(endpoint, options, ours, error);
  if (bound) inherited.erase(inherited.begin(), others);
  return bound;
}

void Server::renew_tls(const Endpoint& listener, const TlsServerOptions& options, Error& error) {
  std::shared_ptr<TlsOfListener> tls;
  {
    const std::lock_guard lock(mutex_);
    const auto found = std::ranges::find(listeners_, listener, &Listener::endpoint);
    if (found != listeners_.end()) tls = found->tls;
  }
  if (!tls) {
    error = Error(Errc::not_found, "no encrypted listener on " + listener.to_string());
    return;
  }
  error = {};
  if (auto context = tls_context_for(listener, options, error)) tls->set(std::move(context));
}

bool Server::is_running() const {
  const std::lock_guard lock(mutex_);
  return state_ == State::running;
}

void Server::start_accepting(const Listener& listener) {
  if (listener.custom) return start_custom(listener);
  const bool deals = listener.acceptors.size() < shards_.size();
  for (const auto& acceptor : listener.acceptors) {
    Shard* const shard = acceptor->shard().get();
    const auto failed = [self = shared_from_this(), shard, record = listener.options->record](Error error) {
      self->accept_failed(*shard, *record, std::move(error));
    };
    Acceptor::OnConnection take = [self = shared_from_this(), shard, deals, options = listener.options](
                                      Descriptor socket, Peer peer) {
      peer.listener = options->number;
      if (deals) return self->deal_out({std::move(socket)}, std::move(peer), options);
      self->accepted(*shard, {std::move(socket)}, std::move(peer), options);
    };
    shard->post([self = shared_from_this(), acceptor, take = std::move(take), failed] {
      // Stopped meanwhile: the acceptor may be closed already.
      if (self->is_running()) acceptor->start(take, failed);
    });
  }
}

void Server::start_custom(const Listener& listener) {
  const auto& shard = shards_.front();
  CustomListener::OnConnection take = [self = shared_from_this(), options = listener.options,
                                       endpoint = listener.endpoint](std::unique_ptr<Connection> connection,
                                                                     std::string name) {
    if (!connection) {
      return self->post_accept_failure(options->record,
                                       Error(Errc::handshake_failed, "the transport gave no connection"));
    }
    self->deal_out({.connection = std::move(connection)},
                   {.transport = endpoint.transport,
                    .listener = options->number,
                    .path = std::move(name),
                    .scheme = endpoint.scheme},
                   options);
  };
  CustomListener::OnFailure failed = [self = shared_from_this(), record = listener.options->record](Error error) {
    self->post_accept_failure(record, std::move(error));
  };
  shard->post([self = shared_from_this(), custom = listener.custom, take = std::move(take), failed = std::move(failed),
               record = listener.options->record]() mutable {
    if (!self->is_running()) return;
    try {
      custom->start(self->shards_.front()->executor(), std::move(take), std::move(failed));
    } catch (const std::exception& exception) {
      self->no_memory(*self->shards_.front(), record->of(*self->shards_.front()), exception);
    }
  });
}

void Server::deal_out(Link link, Peer peer, const std::shared_ptr<const ListenerOptions>& options) {
  auto& to = *shards_[next_shard_.fetch_add(1, std::memory_order_relaxed) % shards_.size()];
  try {
    to.post([self = shared_from_this(), to = &to, options, link = std::move(link), peer = std::move(peer)]() mutable {
      if (!to->ending) self->accepted(*to, std::move(link), std::move(peer), options);
    });
  } catch (const std::bad_alloc&) {
    post_accept_failure(options->record, make_error_code(boost::system::errc::not_enough_memory));
  }
}

void Server::post_accept_failure(const RecordPtr& listener, Error error) {
  auto& shard = shards_.front();
  insist([&] {
    shard->post([self = shared_from_this(), shard = shard.get(), listener, error] {
      self->accept_failed(*shard, *listener, error);
    });
  });
}

void Server::accept_failed(Shard& shard, ListenerRecord& listener, Error error) noexcept {
  shard.counters().accept_failures.add(1);
  listener.of(shard).accept_failures.add(1);
  failed({{}, std::move(error), nullptr});
}

void Server::start() {
  const std::lock_guard lock(mutex_);
  if (state_ != State::idle) throw Exception(Error(Errc::wrong_state, "the server has been started before"));
  start_locked();
}

void Server::start_locked() {
  if (on_message && on_session) {
    throw Exception(Error(Errc::invalid_option, "on_message and on_session are both set"));
  }
  state_ = State::running;
  if (shards_.front()->abandoned()) {
    first_shard_gone_ = true;
    control_->abandon();
  }
  control_->start([shards = shards_](std::chrono::milliseconds idle_for) {
    for (const auto& shard : shards) {
      shard->post([raw = shard.get(), idle_for] {
        for (const auto& session : raw->sessions()) session->sweep(idle_for);
      });
    }
  });
  for (const auto& shard : shards_) {
    shard->start(
        [self = weak_from_this(), shard = shard.get()](const std::exception_ptr& exception) {
          shard->counters().handler_failures.add(1);
          if (const auto server = self.lock()) {
            server->failed({{}, Error(Errc::handler_failed, text_of(exception)), exception});
          }
        },
        shared_from_this(),
        [self = weak_from_this(), first = shard == shards_.front()] {
          const auto server = self.lock();
          if (!server) return;
          server->begin_stop({.within = std::chrono::milliseconds{0}});
          if (first) server->first_shard_abandoned();
        });
  }
  for (const auto& listener : listeners_) start_accepting(listener);
}

void Server::accepted(Shard& shard, Link link, Peer peer, const std::shared_ptr<const ListenerOptions>& options) {
  bool admitted = false;
  try {
    const auto refusal = registry_->admit(peer, shard.now());
    admitted = refusal == SessionRegistry::Refusal::none;
    if (!admitted) return turn_away(shard, std::move(link), peer, *options, refusal);
    if (link.connection) {
      link.ready = ReadyState::attach(shard.shared_from_this(), *link.connection);
    } else {
      prepare(link.socket.get(), *options->session);
      if (!options->make_connection) return connected(shard, std::move(link), std::move(peer), *options);
      link.connection = options->make_connection(link.socket.get());
    }
    const auto handshake = std::make_shared<Handshake>(
        shard.shared_from_this(), std::move(link),
        [self = shared_from_this(), raw = &shard, peer, options](const Error& error, Link agreed) mutable {
          if (error) return self->handshake_failed(*raw, *options->record, peer, error);
          self->connected(*raw, std::move(agreed), std::move(peer), *options);
        });
    handshake->start(options->handshake_timeout);
  } catch (const std::exception& exception) {  // out of memory, or of what the system gives
    if (admitted) registry_->leave(peer);
    no_memory(shard, options->record->of(shard), exception);
  }
}

void Server::handshake_failed(Shard& shard, ListenerRecord& listener, const Peer& peer, const Error& error) noexcept {
  registry_->leave(peer);
  no_session(shard, listener.of(shard), {}, peer, error);
}

void Server::no_session(Shard& shard, ConnectionCounters& listener, SessionId id, const Peer& peer,
                        const Error& error) noexcept {
  shard.counters().handshake_failures.add(1);
  shard.counters().handshakes_failed_by.add(error.code);
  listener.handshake_failures.add(1);
  try {
    failed({id, Error(error.code, "no session with " + peer.to_string() + ": " + error.message()), nullptr});
  } catch (const std::bad_alloc&) {
    failed({id, Error(error.code), nullptr});
  }
}

void Server::turn_away(Shard& shard, Link link, const Peer& peer, const ListenerOptions& options,
                       SessionRegistry::Refusal refusal) {
  using Refusal = SessionRegistry::Refusal;
  auto& counters = shard.counters();
  counters.sessions_refused.add(1);
  options.record->of(shard).sessions_refused.add(1);
  Errc code = Errc::too_many_sessions;
  const char* why = "too many sessions";
  switch (refusal) {
    case Refusal::none: break;
    case Refusal::sessions: counters.refused_sessions.add(1); break;
    case Refusal::address:
      counters.refused_address.add(1);
      why = "too many sessions from one address";
      break;
    case Refusal::rate:
      counters.refused_rate.add(1);
      code = Errc::rate_limited;
      why = "too many connections a second";
      break;
    case Refusal::address_rate:
      counters.refused_address_rate.add(1);
      code = Errc::rate_limited;
      why = "too many connections a second from one address";
      break;
  }
  tell_refused({}, peer, code, why);
  if (!link.socket) return;  // the connection is cut
  bool ends_now = true;
  if (is_websocket(peer.transport) && options.make_connection) {
    link.connection = options.make_connection(link.socket.get());
    if (auto* const websocket = dynamic_cast<WebSocketConnection*>(link.connection.get())) {
      websocket->refuse_handshake(Error(code, why));
      ends_now = false;
    }
  }
  const auto parting =
      std::make_shared<Handshake>(shard.shared_from_this(), std::move(link), [](const Error&, const Link&) {});
  (void)parting->refuse(ends_now);
}

void Server::tell_refused(SessionId id, const Peer& peer, Errc code, const std::string& why) noexcept {
  try {
    const Error error(code, "refused " + peer.to_string() + ": " + why);
    failed({id, error, nullptr});
    if (control_->has_subscribers()) {
      control_->announce({EventKind::session_refused, id, peer.to_string(), error});
    }
  } catch (const std::bad_alloc&) {
    failed({id, Error(code), nullptr});
  }
}

void Server::no_memory(Shard& shard, ConnectionCounters& listener, const std::exception& exception) noexcept {
  shard.counters().accept_failures.add(1);
  listener.accept_failures.add(1);
  try {
    failed({{}, Error(make_error_code(boost::system::errc::not_enough_memory), exception.what()), nullptr});
  } catch (const std::bad_alloc&) {
    failed({{}, Error(make_error_code(boost::system::errc::not_enough_memory)), nullptr});
  }
}

void Server::connected(Shard& shard, Link link, Peer peer, const ListenerOptions& options) noexcept {
  bool announced = false;
  SessionPtr state;
  std::shared_ptr<PendingAdmission> pending;
  try {
    state = SessionPtr(new SessionState(next_session_id(), shard.shared_from_this(), shared_from_this(),
                                        options.session, std::move(link), peer));
    state->count_in(options.record->of(shard));
    if (decides_later()) {
      pending = std::make_shared<PendingAdmission>(shared_from_this(), state, on_connect_wants_first_);
      state->await_admission(pending);
      awaiting_admission_.fetch_add(1);
      state->open();
      pending->start(options_.admission_timeout);
      if (auto rule = shard.drain_rule ? shard.drain_rule : options.drain->rule()) state->begin_drain(std::move(rule));
      return;
    }
    registry_->add(state);
    Admission admission;
    if (on_connect_ && !silent_.load() &&
        !call_handler(*state, [&](Session& session) { admission = on_connect_(session); })) {
      admission = Admission::refuse("on_connect threw");
    }
    if (!admission.accepted) {
      shard.counters().sessions_refused.add(1);
      options.record->of(shard).sessions_refused.add(1);
      shard.counters().refused_on_connect.add(1);
      tell_refused(state->id(), peer, Errc::refused, admission.reason);
      state->refuse(Error(Errc::refused, std::move(admission.reason)));
      registry_->remove(state->id());
      registry_->leave(peer);
      shard.collect_later();
      return;
    }
    if (admission.user_data.has_value()) state->user_data() = std::move(admission.user_data);
    control_->send_about(*state, ControlCommand::SessionAdded{});
    announced = true;
    if (on_session) spawn_actor(*state);
    state->open();
    if (auto rule = shard.drain_rule ? shard.drain_rule : options.drain->rule()) state->begin_drain(std::move(rule));
  } catch (const std::exception& exception) {  // out of memory, or of what the system gives
    if (pending) {
      pending->give_up();
      awaiting_admission_.fetch_sub(1);
    }
    if (state) {
      state->refuse();
      registry_->remove(state->id());
      shard.collect_later();
      if (announced) control_->send_about(*state, ControlCommand::SessionRemoved{Error(Errc::refused)}, true);
    }
    registry_->leave(peer);
    no_memory(shard, options.record->of(shard), exception);
  }
}

const asio::any_io_executor& Server::executor_of(const Shard& shard) const noexcept {
  const auto found = std::ranges::find(shards_, &shard, [](const auto& entry) { return entry.get(); });
  return shard_executors_[static_cast<std::size_t>(found - shards_.begin())];
}

void Server::ask_on_connect(SessionState& state, OwnedMessage first,
                            std::shared_ptr<PendingAdmission> pending) noexcept {
  const bool asked = !silent_.load() && call_handler(state, [&](Session& session) {
    if (on_connect_coroutine_) return pending->run(on_connect_coroutine_, std::move(first));
    on_connect_callback_(session, first, AdmissionPromise(pending));
  });
  if (!asked) pending->decide(Admission::refuse("on_connect threw"));
}

void Server::on_connect_threw(SessionState& state, const std::exception_ptr& exception) noexcept {
  state.shard().counters().handler_failures.add(1);
  failed({state.id(), Error(Errc::handler_failed, text_of(exception)), exception});
}

void Server::decided(SessionState& state, Admission admission) noexcept {
  awaiting_admission_.fetch_sub(1);
  auto& counters = state.shard().counters();
  if (!admission.accepted) {
    counters.sessions_refused.add(1);
    counters.refused_on_connect.add(1);
    state.connection_counters().sessions_refused.add(1);
    tell_refused(state.id(), state.peer(), Errc::refused, admission.reason);
    return state.turn_away(Error(Errc::refused, std::move(admission.reason)));
  }
  bool announced = false;
  try {
    registry_->add(SessionPtr(&state));
    if (admission.user_data.has_value()) state.user_data() = std::move(admission.user_data);
    control_->send_about(state, ControlCommand::SessionAdded{});
    announced = true;
    if (on_session) spawn_actor(state);
    state.admit();
  } catch (const std::exception& exception) {
    registry_->remove(state.id());
    if (announced) control_->send_about(state, ControlCommand::SessionRemoved{Error(Errc::refused)}, true);
    state.turn_away(Error(Errc::refused));
    no_memory(state.shard(), state.connection_counters(), exception);
  }
}

void Server::not_admitted(SessionState& state, const Error& late) noexcept {
  awaiting_admission_.fetch_sub(1);
  auto& counters = state.shard().counters();
  counters.sessions_refused.add(1);
  counters.refused_timeout.add(1);
  state.connection_counters().sessions_refused.add(1);
  tell_refused(state.id(), state.peer(), Errc::admission_timeout, late.text);
  state.turn_away(late);
}

void Server::left_unadmitted(SessionState& state, const Error& reason) noexcept {
  awaiting_admission_.fetch_sub(1);
  no_session(state.shard(), state.connection_counters(), state.id(), state.peer(), reason);
  state.turn_away(reason);
}

void Server::set_on_connect(std::function<Admission(Session&)> now, std::shared_ptr<const AdmissionCoroutine> coroutine,
                            AdmissionCallback callback, bool with_first_message) {
  const std::lock_guard lock(mutex_);
  if (state_ != State::idle) throw Exception(Error(Errc::wrong_state, "handlers are set before start()"));
  on_connect_ = std::move(now);
  on_connect_coroutine_ = std::move(coroutine);
  on_connect_callback_ = std::move(callback);
  on_connect_wants_first_ = with_first_message;
}

void Server::add_interceptor(bool inbound, Interceptor interceptor) {
  const std::lock_guard lock(mutex_);
  if (state_ != State::idle) throw Exception(Error(Errc::wrong_state, "interceptors are added before start()"));
  insert_interceptor(inbound ? intercept_in_ : intercept_out_, std::move(interceptor), weak_from_this(), first_shard());
}

void Server::spawn_actor(SessionState& state) {
  auto behaviour = [behaviour = on_session, session = SessionPtr(&state)](ProtocolActor<OwnedMessage> actor) {
    return (*behaviour)(SessionActor(std::move(actor), Session(session)));
  };
  auto core = std::make_shared<ActorCore<OwnedMessage>>(state.id(), executor_of(state.shard()), actor_options,
                                                        std::move(behaviour), actors_->state());
  state.set_actor(core);
  actors_->state()->spawn(core);
}

void Server::ended(SessionState& state, const Error& reason) noexcept {
  if (const auto pending = state.admission()) pending->gone(reason);
  if (!state.admitted()) return registry_->leave(state.peer());
  registry_->remove(state.id());
  registry_->leave(state.peer());
  control_->send_about(state, ControlCommand::SessionRemoved{reason}, true);
  if (!on_disconnect || silent_.load()) return;
  call_handler(state, [&](Session& session) { on_disconnect(session, reason); });
}

/// Calls one of the application's handlers; false if it threw, which is reported.
bool Server::call_handler(SessionState& state, const std::function<void(Session&)>& handler) noexcept {
  Session session{SessionPtr(&state)};
  std::exception_ptr exception;
  try {
    handler(session);
    return true;
  } catch (...) {
    exception = std::current_exception();
  }
  state.shard().counters().handler_failures.add(1);
  failed({state.id(), Error(Errc::handler_failed, text_of(exception)), exception});
  return false;
}

void Server::failed(const ErrorEvent& event) noexcept {
  if (!on_error || silent_.load()) return;
  try {
    on_error(event);
  } catch (...) {
    // There is nobody left to tell.
    if (Shard* const shard = Shard::current()) shard->counters().handler_failures.add(1);
  }
}

BroadcastResult Server::broadcast(BytesView payload, const SendOptions& options) {
  return intercept_broadcast(intercept_out_.get(), payload, options, [this](BytesView bytes, const SendOptions& how) {
    Broadcast broadcast(bytes, how);
    for (const auto& session : registry_->all()) broadcast.add(session);
    return broadcast.send();
  });
}

ServerStats Server::stats() const {
  ServerStats sum;
  sum.sessions = registry_->size();
  for (const auto& shard : shards_) {
    const auto& counters = std::as_const(*shard).counters();
    sum.sessions_refused += counters.sessions_refused.value();
    sum.accept_failures += counters.accept_failures.value();
    sum.handshake_failures += counters.handshake_failures.value();
    sum.protocol_errors += counters.protocol_errors.value();
    sum.handler_failures += counters.handler_failures.value();
    sum.unhandled += counters.unhandled.value();
    sum.dropped_oldest += counters.dropped_oldest.value();
    sum.dropped_at_close += counters.dropped_at_close.value();
    sum.dropped_inbound += counters.dropped_inbound.value();
    sum.queued_bytes += counters.queued_bytes.value();
    sum.queued_packets += counters.queued_packets.value();
    sum.requests_received += counters.requests_received.value();
    sum.answers_sent += counters.answers_sent.value();
    sum.requests_by_outcome += counters.requests.value();
    counters.request_latency.add_to(sum.request_latency);
    counters.ends.add_to(sum.ends);
    counters.handshakes_failed_by.add_to(sum.handshake_failures_by);
    sum.unmatched_responses += counters.unmatched_responses.value();
    sum.throttled += std::as_const(*shard).resources().throttled.value();
    sum.sessions_swept += counters.sessions_swept.value();
    sum.compressed_packets += counters.compressed_packets.value();
    sum.compressed_bytes_before += counters.compressed_bytes_before.value();
    sum.compressed_bytes_after += counters.compressed_bytes_after.value();
    sum.incompressible_packets += counters.incompressible_packets.value();
    sum.refusals.sessions += counters.refused_sessions.value();
    sum.refusals.address += counters.refused_address.value();
    sum.refusals.rate += counters.refused_rate.value();
    sum.refusals.address_rate += counters.refused_address_rate.value();
    sum.refusals.on_connect += counters.refused_on_connect.value();
    sum.refusals.timeout += counters.refused_timeout.value();
  }
  sum.awaiting_admission = awaiting_admission_.load();
  if (intercept_in_) sum.rejected_inbound = intercept_in_->rejected.load(std::memory_order_relaxed);
  if (intercept_out_) sum.rejected_outbound = intercept_out_->rejected.load(std::memory_order_relaxed);
  for (const auto& interceptors : {intercept_in_, intercept_out_}) {
    if (interceptors) sum.interceptor_failures += interceptors->failures.load(std::memory_order_relaxed);
  }
  sum.requests = sum.requests_by_outcome.made;
  sum.requests_timed_out = sum.requests_by_outcome.timed_out;
  sum.control = control_->stats();
  for (const auto& listener : listener_stats()) {
    sum.sessions_total += listener.sessions_total;
    sum.packets_in += listener.packets_in;
    sum.packets_out += listener.packets_out;
    sum.bytes_in += listener.bytes_in;
    sum.bytes_out += listener.bytes_out;
  }
  return sum;
}

std::vector<ListenerStats> Server::listener_stats() const {
  std::vector<RecordPtr> records;
  {
    const std::lock_guard lock(mutex_);
    records = records_;
  }
  std::vector<ListenerStats> all;
  all.reserve(records.size());
  for (const auto& record : records) {
    ListenerStats& sum = all.emplace_back();
    sum.endpoint = record->endpoint;
    for (const auto& counters : record->shards) {
      const auto ended = counters.sessions_ended.value();
      const auto total = counters.sessions_total.value();
      sum.sessions_total += total;
      sum.sessions += static_cast<std::size_t>(total - std::min(total, ended));
      sum.sessions_refused += counters.sessions_refused.value();
      sum.accept_failures += counters.accept_failures.value();
      sum.handshake_failures += counters.handshake_failures.value();
      sum.packets_in += counters.packets_in.value();
      sum.packets_out += counters.packets_out.value();
      sum.bytes_in += counters.bytes_in.value();
      sum.bytes_out += counters.bytes_out.value();
    }
  }
  return all;
}

std::vector<Endpoint> Server::endpoints() const {
  const std::lock_guard lock(mutex_);
  std::vector<Endpoint> all;
  for (const auto& listener : listeners_) all.push_back(listener.endpoint);
  return all;
}

// --- the end

StopReport Server::run() {
  if (Shard::must_not_block()) {
    throw Exception(Error(Errc::blocking_on_shard, "run() would block a thread that runs handlers"));
  }
  asio::io_context signals(1);
  asio::signal_set set(signals, SIGINT, SIGTERM);
  set.async_wait([](const error_code&, int) {});
  bool wait = false;
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::idle) start_locked();
    wait = state_ == State::running;
    if (wait) run_context_ = &signals;
  }
  if (wait) signals.run();
  {
    const std::lock_guard lock(mutex_);
    run_context_ = nullptr;
  }
  return stop({.within = options_.drain});
}

namespace {

/// Called when it has been told so many times, on whatever thread that is.
class Countdown {
 public:
  Countdown(std::size_t count, std::function<void()> done) : left_(count), done_(std::move(done)) {}
  void tell() const {
    if (left_.fetch_sub(1) == 1 && done_) done_();
  }

 private:
  mutable std::atomic<std::size_t> left_;
  const std::function<void()> done_;
};

}  // namespace

std::vector<std::shared_ptr<Acceptor>> Server::acceptors_of(const std::vector<Listener>& listeners,
                                                            const std::shared_ptr<Shard>& shard) const {
  std::vector<std::shared_ptr<Acceptor>> acceptors;
  for (const auto& listener : listeners) {
    for (const auto& acceptor : listener.acceptors) {
      if (acceptor->shard() == shard) acceptors.push_back(acceptor);
    }
  }
  return acceptors;
}

void Server::stop_accepting(std::vector<Listener> listeners, Rest rest, std::function<void()> done) {
  for (const auto& listener : listeners) {
    if (!listener.file) continue;
    if (rest == Rest::left) {
      listener.file->leave();
    } else {
      listener.file->remove();
    }
  }
  // They are no longer the server's, so nobody else would stop them.
  std::vector<std::vector<std::shared_ptr<Acceptor>>> acceptors;
  for (const auto& shard : shards_) {
    insist([&] { acceptors.push_back(acceptors_of(listeners, shard)); });
  }
  stop_custom(std::move(listeners));
  // Every shard, also where none accepts: what was dealt out to it before is there when it tells.
  const auto left = std::make_shared<const Countdown>(shards_.size(), std::move(done));
  for (std::size_t i = 0; i < shards_.size(); ++i) {
    const auto stop = [mine = std::move(acceptors[i]), rest, left] {
      for (const auto& acceptor : mine) {
        if (rest == Rest::accepted) acceptor->accept_rest();
        acceptor->stop();
      }
      left->tell();
    };
    const bool posted = insist([&] { return shards_[i]->post(stop); });
    if (!posted) left->tell();
  }
}

bool Server::close_listener(const Endpoint& listener, const DrainOptions* drain, std::function<void()> done) {
  std::vector<Listener> closed;  // may be a user's code: not to be destroyed under the lock
  bool ran = false;
  std::shared_ptr<const DrainRule> rule;
  if (drain != nullptr) rule = std::make_shared<const DrainRule>(rule_for(*drain));
  {
    const std::lock_guard lock(mutex_);
    if (state_ != State::idle && state_ != State::running) return false;
    const auto found = std::ranges::find(listeners_, listener, &Listener::endpoint);
    if (found == listeners_.end()) return false;
    closed.push_back(*found);
    listeners_.erase(found);
    ran = state_ == State::running;
    if (!ran) {
      for (const auto& acceptor : closed.front().acceptors) acceptor->close_unstarted();
    }
  }
  if (!ran) {
    if (closed.front().file) closed.front().file->remove();
    if (done) done();
    return true;
  }
  const auto options = closed.front().options;
  stop_accepting(std::move(closed), rule && rule->quiet.count() == 0 ? Rest::lost : Rest::accepted,
                 [self = shared_from_this(), options, rule, done = std::move(done)] {
                   if (rule) {
                     options->drain->begin(rule);
                     self->drain_sessions(options->number, rule);
                   }
                   if (done) done();
                 });
  return true;
}

void Server::drain_sessions(std::uint32_t listener, const std::shared_ptr<const DrainRule>& rule) {
  for (const auto& shard : shards_) {
    insist([&] {
      shard->post([raw = shard.get(), listener, rule] {
        for (const auto& session : insist([raw] { return raw->sessions(); })) {
          if (session->peer().listener == listener) session->begin_drain(rule);
        }
      });
    });
  }
}

void Server::async_close_listener(const Endpoint& listener, CloseHandler handler) {
  auto work = options_.executors.empty() ? tracked_executor(handler, asio::system_executor())
                                         : tracked_executor(handler, options_.executors.front());
  struct Waiter {
    CloseHandler handler;
    asio::any_completion_executor work;
  };
  // What is called by way of a std::function is copied.
  const auto waiter = std::make_shared<Waiter>(std::move(handler), std::move(work));
  const auto tell = [waiter, via = options_.executors.empty() ? asio::any_io_executor(asio::system_executor())
                                                              : options_.executors.front()](error_code code) noexcept {
    try {
      complete_later(via, std::move(waiter->work), std::move(waiter->handler), code);
    } catch (const std::exception&) {
      // No memory to tell it: the handler is destroyed, which ends its wait as well.
    }
  };
  if (!close_listener(listener, nullptr, [tell] { tell({}); })) tell(Errc::not_found);
}

void Server::release_listeners() {
  std::vector<Listener> released;
  bool ran = false;
  {
    const std::lock_guard lock(mutex_);
    if (state_ != State::idle && state_ != State::running) return;
    released.swap(listeners_);
    ran = state_ == State::running;
  }
  if (ran) return stop_accepting(released, Rest::left, nullptr);
  for (const auto& listener : released) {
    if (listener.file) listener.file->leave();
    for (const auto& acceptor : listener.acceptors) acceptor->close_unstarted();
  }
}

std::vector<ListeningSocket> Server::listening_sockets() const {
  std::vector<ListeningSocket> sockets;
  const std::lock_guard lock(mutex_);
  if (state_ != State::idle && state_ != State::running) return sockets;
  for (const auto& listener : listeners_) {
    const bool has_path = is_websocket(listener.endpoint.transport);
    std::string name = std::string(to_string(listener.endpoint.transport)) + (has_path ? listener.endpoint.path : "");
    std::ranges::replace(name, ':', '_');  // which stands between names
    for (const auto& acceptor : listener.acceptors) {
      Descriptor copy = acceptor->duplicate();
      if (!copy) {
        const error_code code(errno, boost::system::system_category());
        throw Exception(
            Error(code, "cannot duplicate the socket of " + listener.endpoint.url() + ": " + code.message()));
      }
      auto& socket = sockets.emplace_back(copy.release(), name);
      socket.set_owns_file(listener.file != nullptr && listener.file->owned());
    }
  }
  return sockets;
}

void Server::begin_stop(DrainOptions drain_options) {
  const auto drain = drain_options.within =
      std::clamp<std::chrono::milliseconds>(drain_options.within, std::chrono::milliseconds{0}, longest_duration);
  std::unique_lock lock(mutex_);
  if (state_ != State::idle && state_ != State::running) return;
  const bool ran = state_ == State::running;
  state_ = State::stopping;
  shards_draining_ = shards_left_ = shards_.size();
  stop_by_ = Clock::now() + drain;
  if (run_context_ != nullptr) run_context_->stop();
  const auto listeners = ran ? listeners_ : std::exchange(listeners_, {});
  lock.unlock();
  if (ran && drain_options.quiet.count() != 0) {
    // Nobody who has come as far as this is turned away.
    auto rule = rule_for(drain_options);
    rule.by = TimePoint::max();  // who is cut then is reported
    stop_accepting(listeners, Rest::accepted,
                   [self = shared_from_this(), drain, rule = std::make_shared<const DrainRule>(std::move(rule))] {
                     for (const auto& shard : self->shards_) {
                       const bool posted = insist([&] {
                         return shard->post([self, shard, drain, rule] {
                           shard->ending = true;
                           shard->drain_rule = rule;
                           self->drain_shard(shard, drain, rule);
                         });
                       });
                       if (!posted) self->shard_drained(*shard);
                     }
                   });
    return;
  }
  for (const auto& listener : listeners) {
    if (listener.file) listener.file->remove();
  }
  if (ran) stop_custom(listeners);
  for (std::size_t i = 0; i < shards_.size(); ++i) {
    const auto acceptors = acceptors_of(listeners, shards_[i]);
    if (ran) {
      const bool posted = shards_[i]->post([self = shared_from_this(), shard = shards_[i], acceptors, drain] {
        for (const auto& acceptor : acceptors) acceptor->stop();
        shard->ending = true;
        shard->end_handshakes(Error(Errc::stopping));
        self->drain_shard(shard, drain, nullptr);
      });
      if (!posted) shard_drained(*shards_[i]);  // its context has been destroyed
    } else {
      for (const auto& acceptor : acceptors) acceptor->close_unstarted();
    }
  }
  if (ran) return;
  actors_->close();
  actors_->state()->end_loop();
  control_->shut_down(nullptr);
  for (const auto& shard : shards_) shard->finish([self = shared_from_this()] { self->shard_finished(); });
}

/// Destroyed where it was stopped, unless the server still has it.
void Server::stop_custom(std::vector<Listener> listeners) {
  for (auto& listener : listeners) {
    if (listener.custom) shards_.front()->post([custom = std::move(listener.custom)] { custom->stop(); });
  }
}

StopReport Server::stop(const DrainOptions& drain_options) {
  const auto drain = std::min<std::chrono::milliseconds>(drain_options.within, longest_duration);
  begin_stop(drain_options);
  std::unique_lock lock(mutex_);
  const auto snapshot = [this] {
    StopReport report = report_;
    report.complete = state_ == State::stopped;
    return report;
  };
  if (Shard::must_not_block()) return snapshot();
  if (options_.executors.empty()) {
    changed_.wait(lock, [this] { return state_ == State::stopped; });
  } else {
    // The user's executors do the rest; should they not run, waiting longer would not help.
    changed_.wait_for(lock, drain + std::chrono::seconds(2), [this] { return state_ == State::stopped; });
  }
  const auto report = snapshot();
  lock.unlock();
  const std::lock_guard join_lock(join_mutex_);
  control_->join();
  for (const auto& shard : shards_) shard->join();
  // What the threads that have ended had taken out of maps.
  lockfree::Epoch::collect();
  return report;
}

void Server::async_stop(const DrainOptions& drain, StopHandler handler) {
  // Threads of the server's own are gone when it is over, so they cannot run the handler.
  auto work = options_.executors.empty() ? tracked_executor(handler, asio::system_executor())
                                         : tracked_executor(handler, options_.executors.front());
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::stopped) {
      complete_later(asio::system_executor(), std::move(work), std::move(handler), report_);
      return;
    }
    stop_waiters_.push_back({std::move(handler), std::move(work)});
  }
  begin_stop(drain);
}

void Server::end() {
  if (options_.executors.empty()) {
    stop({.within = options_.drain});
  } else {
    begin_stop({.within = std::chrono::milliseconds{0}});
  }
}

void Server::silence() noexcept {
  silent_.store(true);
  if (Shard::must_not_block()) return;
  for (const auto& shard : shards_) shard->wait_until_idle();
}

void Server::drain_shard(const std::shared_ptr<Shard>& shard, std::chrono::milliseconds drain,
                         const std::shared_ptr<const DrainRule>& rule) {
  if (rule) {
    // With those who are still to be a session: looked at when the turn ends.
    shard->on_idle = [self = shared_from_this(), raw = shard.get()] { self->shard_drained(*raw); };
  } else {
    if (shard->session_count() == 0) return shard_drained(*shard);
    shard->on_empty = [this, raw = shard.get()] { shard_drained(*raw); };
  }
  const auto cut_all = [self = shared_from_this(), raw = shard.get()] {
    StopReport cut;
    raw->end_handshakes(Error(Errc::drain_expired));
    for (const auto& session : raw->sessions()) {
      if (session->finished()) continue;
      ++cut.sessions_cut;
      cut.requests_cut += raw->requests().pending(session->id());
      cut.answers_cut += session->answers_owed();
      cut.packets_cut += session->stats().queued_packets;
      session->abort(Error(Errc::drain_expired));
    }
    const std::lock_guard lock(self->mutex_);
    self->report_.sessions_cut += cut.sessions_cut;
    self->report_.requests_cut += cut.requests_cut;
    self->report_.answers_cut += cut.answers_cut;
    self->report_.packets_cut += cut.packets_cut;
  };
  if (drain.count() == 0) return cut_all();
  for (const auto& session : shard->sessions()) session->begin_drain(rule);
  shard->run_at(shard->now() + drain, cut_all);
}

/// Its last session has gone.
void Server::shard_drained(Shard& shard) {
  if (Shard::current() == &shard) shard.send_control();
  bool gone = false;
  {
    const std::lock_guard lock(mutex_);
    if (--shards_draining_ != 0) return;
    gone = first_shard_gone_;
  }
  // Those without a session, and those that go on after theirs.
  actors_->close();
  if (gone || !shards_.front()->post([self = shared_from_this()] { self->end_actors(); })) actors_ended();
}

/// Its context is being destroyed: what runs there will not go on.
void Server::first_shard_abandoned() {
  bool drained = false;
  {
    const std::lock_guard lock(mutex_);
    first_shard_gone_ = true;
    drained = state_ == State::stopping && shards_draining_ == 0;
  }
  control_->abandon();
  if (drained) actors_ended();
}

/// On the first shard: lets them end within the time of the stop, then cancels what they wait for.
void Server::end_actors() {
  // Also if none is left: what they told the manager is carried out before this.
  actors_->state()->stop_all(false, [self = shared_from_this()] { self->actors_ended(); });
  if (actors_->size() == 0) return;
  shards_.front()->run_at(stop_by_, [self = shared_from_this()] {
    const std::size_t left = self->actors_->size();
    if (left == 0) return;
    {
      const std::lock_guard lock(self->mutex_);
      self->report_.actors_cut += left;
    }
    self->actors_->cut_all();
    // One that waits for what cannot be cancelled ends with its context.
    constexpr auto patience = std::chrono::seconds(1);
    self->shards_.front()->run_at(self->shards_.front()->now() + patience, [self] { self->actors_ended(); });
  });
}

void Server::actors_ended() {
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(actors_ended_, true)) return;
  }
  actors_->state()->end_loop();
  // The subscribers are told of every end before the shards go, one of which runs the broadcaster.
  control_->shut_down([self = shared_from_this()] { self->finish_shards(); });
}

void Server::finish_shards() {
  for (const auto& shard : shards_) {
    const bool posted = shard->post(
        [self = shared_from_this(), raw = shard.get()] { raw->finish([self] { self->shard_finished(); }); });
    if (!posted) shard_finished();
  }
}

void Server::shard_finished() {
  std::vector<StopWaiter> waiters;
  std::vector<Listener> listeners;  // which may be a user's code: not to be destroyed under the lock
  StopReport report;
  {
    const std::lock_guard lock(mutex_);
    if (--shards_left_ != 0) return;
    state_ = State::stopped;
    listeners.swap(listeners_);
    waiters.swap(stop_waiters_);
    report = report_;
    changed_.notify_all();
  }
  for (auto& waiter : waiters) complete(waiter.work, std::move(waiter.handler), report);
}

}  // namespace msgtrans::detail

namespace msgtrans {

ServerTransport::ServerTransport(ServerOptions options) : server_(detail::Server::make(std::move(options))) {}

ServerTransport::~ServerTransport() {
  server_->end();
  server_->silence();
}

Endpoint ServerTransport::listen(const Endpoint& endpoint, const ListenOptions& options) {
  Error error;
  const auto bound = server_->listen(endpoint, options, {}, error);
  if (!bound) throw Exception(error);
  return *bound;
}

std::optional<Endpoint> ServerTransport::listen(const Endpoint& endpoint, const ListenOptions& options, Error& error) {
  return server_->listen(endpoint, options, {}, error);
}

Endpoint ServerTransport::listen(const Endpoint& endpoint, const ListenOptions& options,
                                 std::vector<ListeningSocket>& inherited) {
  Error error;
  const auto bound = server_->listen_or_adopt(endpoint, options, inherited, error);
  if (!bound) throw Exception(error);
  return *bound;
}

Endpoint ServerTransport::adopt_listener(const Endpoint& as, std::span<ListeningSocket> sockets,
                                         const ListenOptions& options) {
  Error error;
  const auto bound = adopt_listener(as, sockets, options, error);
  if (!bound) throw Exception(error);
  return *bound;
}

std::optional<Endpoint> ServerTransport::adopt_listener(const Endpoint& as, std::span<ListeningSocket> sockets,
                                                        const ListenOptions& options, Error& error) {
  if (sockets.empty()) {
    error = Error(Errc::invalid_option, "there is no socket to adopt");
    return std::nullopt;
  }
  return server_->listen(as, options, sockets, error);
}

bool ServerTransport::close_listener(const Endpoint& listener) {
  return server_->close_listener(listener, nullptr, nullptr);
}

bool ServerTransport::drain_listener(const Endpoint& listener, const DrainOptions& options) {
  if (auto error = validate(options)) throw Exception(error);
  return server_->close_listener(listener, &options, nullptr);
}

void ServerTransport::start_close_listener(const std::shared_ptr<detail::Server>& server, const Endpoint& listener,
                                           detail::CloseHandler handler) {
  server->async_close_listener(listener, std::move(handler));
}

std::vector<ListeningSocket> ServerTransport::listening_sockets() const {
  return server_->listening_sockets();
}
void ServerTransport::release_listeners() {
  server_->release_listeners();
}

void ServerTransport::set_on_connect(std::function<Admission(Session&)> handler) {
  server_->set_on_connect(std::move(handler), nullptr, nullptr, false);
}
void ServerTransport::set_on_connect(detail::AdmissionCoroutine handler, bool with_first_message) {
  server_->set_on_connect(nullptr, std::make_shared<const detail::AdmissionCoroutine>(std::move(handler)), nullptr,
                          with_first_message);
}
void ServerTransport::set_on_connect(detail::AdmissionCallback handler, bool with_first_message) {
  server_->set_on_connect(nullptr, nullptr, std::move(handler), with_first_message);
}
void ServerTransport::add_interceptor(bool inbound, Interceptor interceptor) {
  server_->add_interceptor(inbound, std::move(interceptor));
}
void ServerTransport::on_message(MessageHandler handler) {
  server_->set(&detail::Server::on_message, std::move(handler));
}
void ServerTransport::on_session(SessionBehaviour behaviour, const ActorOptions& options) {
  if (auto error = validate(options)) throw Exception(error);
  server_->set(&detail::Server::actor_options, options);
  server_->set(&detail::Server::on_session,
               behaviour ? std::make_shared<const SessionBehaviour>(std::move(behaviour)) : nullptr);
}
void ServerTransport::on_disconnect(DisconnectHandler handler) {
  server_->set(&detail::Server::on_disconnect, std::move(handler));
}
void ServerTransport::on_writable(WritableHandler handler) {
  server_->set(&detail::Server::on_writable, std::move(handler));
}
void ServerTransport::on_error(ErrorHandler handler) {
  server_->set(&detail::Server::on_error, std::move(handler));
}

void ServerTransport::renew_tls(const Endpoint& listener, const TlsServerOptions& options) {
  Error error;
  renew_tls(listener, options, error);
  if (error) throw Exception(error);
}

void ServerTransport::renew_tls(const Endpoint& listener, const TlsServerOptions& options, Error& error) {
  server_->renew_tls(listener, options, error);
}

void ServerTransport::start() {
  server_->start();
}
StopReport ServerTransport::run() {
  return server_->run();
}
StopReport ServerTransport::stop(std::chrono::milliseconds drain) {
  return server_->stop({.within = drain});
}
StopReport ServerTransport::stop(const DrainOptions& drain) {
  if (auto error = validate(drain)) throw Exception(error);
  return server_->stop(drain);
}
void ServerTransport::start_stop(const std::shared_ptr<detail::Server>& server, const DrainOptions& drain,
                                 detail::StopHandler handler) {
  server->async_stop(drain, std::move(handler));
}
StopReport ServerTransport::stop() {
  return server_->stop({.within = server_->drain()});
}

SendResult ServerTransport::send(SessionId session, BytesView payload, const SendOptions& options) {
  const auto state = find(session);
  return state ? state->send(payload, options) : SendResult::not_found;
}

bool ServerTransport::close(SessionId session, std::string_view reason) {
  const auto state = find(session);
  if (state) state->close(Error(Errc::closed_by_user, std::string(reason)));
  return state != nullptr;
}

bool ServerTransport::drain(SessionId session, const DrainOptions& options) {
  if (auto error = validate(options)) throw Exception(error);
  const auto state = find(session);
  if (state) state->drain(options);
  return state != nullptr;
}

BroadcastResult ServerTransport::broadcast(BytesView payload, const SendOptions& options) {
  return server_->broadcast(payload, options);
}

SessionManager ServerTransport::session_manager() const {
  return SessionManager(server_->registry(), server_->control());
}
Groups ServerTransport::groups() const {
  return Groups(server_->registry());
}
ActorManager<OwnedMessage>& ServerTransport::actor_manager() const noexcept {
  return server_->actors();
}
Subscription<Event> ServerTransport::subscribe() {
  return server_->control()->subscribe();
}
Control ServerTransport::control() const {
  return Control(server_->control());
}
std::size_t ServerTransport::session_count() const noexcept {
  return server_->registry()->size();
}
ServerStats ServerTransport::stats() const {
  return server_->stats();
}
std::vector<ListenerStats> ServerTransport::listener_stats() const {
  return server_->listener_stats();
}
std::vector<Endpoint> ServerTransport::endpoints() const {
  return server_->endpoints();
}
detail::Home ServerTransport::home() const {
  return {server_->first_shard(), Errc::not_found};
}
detail::SessionPtr ServerTransport::find(SessionId session) const {
  return server_->registry()->find(session);
}

}  // namespace msgtrans
