// SPDX-License-Identifier: Apache-2.0
// What a client keeps for its next connection: one-way messages, and requests that are sent again.
#include "check_option.hpp"
#include "client.hpp"
#include "complete.hpp"
#include "pool.hpp"

#include <algorithm>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/system_executor.hpp>
#include <msgtrans/detail/insist.hpp>
#include <new>
#include <string>
#include <utility>

namespace msgtrans {

Error validate(const ReconnectOptions& options) {
  Error error;
  const auto first = [&error](Error found) {
    if (!error) error = std::move(found);
  };
  const auto range = [&error](const char* name, std::uint64_t value, std::uint64_t least, std::uint64_t most) {
    if (!error) error = detail::check_range(name, value, least, most);
  };
  const auto real = [&error](const char* name, double value, double least, double most) {
    if (!error) error = detail::check_range(name, value, least, most);
  };
  first(detail::check_duration("reconnect.initial_delay", options.initial_delay, false));
  real("reconnect.factor", options.factor, 1, 100);
  first(detail::check_duration("reconnect.max_delay", options.max_delay, false));
  if (!error && options.max_delay < options.initial_delay) {
    error = Error(Errc::invalid_option, "reconnect.max_delay is " + std::to_string(options.max_delay.count()) +
                                            " ms, less than reconnect.initial_delay, " +
                                            std::to_string(options.initial_delay.count()) + " ms");
  }
  real("reconnect.jitter", options.jitter, 0, 1);
  first(detail::check_duration("reconnect.reset_after", options.reset_after));
  range("reconnect.keep_packets", options.keep_packets, 0, protocol::OutboundBudget::max_packets);
  range("reconnect.keep_bytes", options.keep_bytes, 1, protocol::OutboundBudget::max_bytes);
  range("reconnect.retry_requests", options.retry_requests, 0, protocol::OutboundBudget::max_packets);
  range("reconnect.retry_bytes", options.retry_bytes, 1, protocol::OutboundBudget::max_bytes);
  return error;
}

}  // namespace msgtrans

namespace msgtrans::detail {

namespace {

std::size_t lane_of(const wire::Header& header) noexcept {
  return (header.flags & wire::flags::high_priority) != 0 ? 1 : 0;
}

}  // namespace

double Client::Chance::fraction() noexcept {
  state += 0x9e3779b97f4a7c15;
  std::uint64_t z = state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

ClientStats Client::client_stats() const {
  ClientStats stats;
  stats.connections = connections_.value();
  stats.attempts = attempts_.value();
  stats.tries = tries_.value();
  stats.failures = failures_.value();
  stats.retryable_requests = retryable_requests_.load(std::memory_order_relaxed);
  stats.retryable_bytes = retryable_bytes_.load(std::memory_order_relaxed);
  stats.retried_requests = retried_.value();
  const auto& counters = std::as_const(*shard_).counters();
  stats.packets_in = counters.connections.packets_in.value();
  stats.packets_out = counters.connections.packets_out.value();
  stats.bytes_in = counters.connections.bytes_in.value();
  stats.bytes_out = counters.connections.bytes_out.value();
  stats.dropped_at_close = counters.dropped_at_close.value();
  stats.dropped_inbound = counters.dropped_inbound.value();
  stats.dropped_oldest = counters.dropped_oldest.value();
  stats.requests = counters.requests.sent.value();
  stats.requests_timed_out = counters.requests.timed_out.value();
  stats.unmatched_responses = counters.unmatched_responses.value();
  stats.handler_failures = counters.handler_failures.value();
  const std::lock_guard lock(mutex_);
  stats.kept_packets = kept_.packets;
  stats.kept_bytes = kept_.bytes;
  stats.kept_total = kept_total_;
  stats.kept_dropped = kept_dropped_;
  return stats;
}

// --- any thread

SessionPtr Client::usable() const noexcept {
  if (state_ != State::connected || !session_->is_open()) return nullptr;
  if (opening_ && !inside_on_connect()) return nullptr;
  return session_;
}

bool Client::has_room(std::size_t size) const noexcept {
  return kept_.packets < options_.reconnect.keep_packets && size <= options_.reconnect.keep_bytes - kept_.bytes;
}

bool Client::anybody_waits() const noexcept {
  return std::ranges::any_of(lanes_, [](const Lane& lane) { return !lane.waiting.empty(); });
}

/// Under the lock. \throws std::bad_alloc, and nothing has changed.
void Client::keep(Lane& lane, OutgoingCommandPtr& message) {
  const std::size_t size = message->packet_size();
  lane.kept.push_back(std::move(message));
  kept_.bytes += size;
  ++kept_.packets;
  ++kept_total_;
}

SendResult Client::send(BytesView payload, const SendOptions& options) {
  const std::size_t lane_index = options.high_priority ? 1 : 0;
  OutgoingCommandPtr message;
  for (;;) {
    SessionPtr session;
    {
      const std::lock_guard lock(mutex_);
      if (!in_series()) return SendResult::closed;
      Lane& lane = lanes_[lane_index];
      session = usable();
      // Behind those that wait, except for what on_connect sends.
      if (session && !opening_ && (!lane.kept.empty() || !lane.waiting.empty())) session = nullptr;
      if (!session) {
        // Who tries until there is room is not to copy and compress each time.
        const std::size_t least = message ? message->packet_size() : wire::header_size + options.extension.size();
        if (!lane.waiting.empty() || !has_room(least)) return SendResult::would_block;
        if (message) {
          try {
            keep(lane, message);
          } catch (const std::bad_alloc&) {
            return SendResult::would_block;
          }
          return SendResult::queued;
        }
      }
    }
    if (session) {
      const auto result = session->send(payload, options);
      if (result != SendResult::closed || session->is_open()) return result;
      continue;  // it has just ended
    }
    try {
      message = make_outgoing(OutgoingCommand::Kind::one_way, header_for(wire::PacketType::one_way, options),
                              options.extension, payload, options.compression);
    } catch (const std::bad_alloc&) {
      return SendResult::would_block;
    }
    if (message->refusal) return message->refusal == Errc::rejected ? SendResult::rejected : SendResult::too_large;
  }
}

OutgoingCommandPtr Client::make_outgoing(OutgoingCommand::Kind kind, const wire::Header& header, BytesView extension,
                                         BytesView payload,
                                         const std::optional<CompressionOptions>& compression) const {
  if (!intercept_out_ || Interceptors::running()) {
    return make_outgoing_past(kind, header, extension, payload, compression);
  }
  auto message = Interceptors::outbound(header, extension, payload, nullptr);
  if (!intercept_out_->pass(message)) {
    auto command = OutgoingCommand::make(nullptr, kind, header, {}, {});
    command->refusal = Errc::rejected;
    return command;
  }
  wire::Header changed = header;
  changed.biz_type = message.biz_type();
  return make_outgoing_past(kind, changed, message.extension(), message.payload(), compression);
}

OutgoingCommandPtr Client::make_outgoing_past(OutgoingCommand::Kind kind, const wire::Header& header,
                                              BytesView extension, BytesView payload,
                                              const std::optional<CompressionOptions>& compression) const {
  const auto& session = *session_options_;
  const PackedPayload packed(packing_of(session, compression, payload.size()), payload);
  if (packed.bytes().size() > session.max_payload || extension.size() > session.max_extension) {
    auto command = OutgoingCommand::make(nullptr, kind, header, {}, {});
    command->refusal = Errc::too_large;
    return command;
  }
  return OutgoingCommand::make(nullptr, kind, header, extension, packed.bytes(), packed.packing());
}

OutgoingCommandPtr Client::make_request(BytesView payload, const RequestOptions& options) const {
  const auto header = header_for(
      wire::PacketType::request,
      {.biz_type = options.biz_type, .high_priority = options.high_priority, .route_tag = options.route_tag});
  const auto timeout = options.timeout.value_or(session_options_->request_timeout);
  const RequestExtension extension(options, timeout);
  auto command = make_outgoing(OutgoingCommand::Kind::request, header, extension.bytes(), payload, options.compression);
  command->tells_timeout = extension.tells_timeout_in(*command);
  command->timeout = std::min(timeout, longest_duration);
  if (timeout.count() < 0) command->refusal = Errc::invalid_option;
  return command;
}

/// An asynchronous call on its way to the shard: a request, or a message that was kept, whose handler is to be told.
class Client::Arrival final : public Command {
 public:
  Arrival(std::shared_ptr<Client> client, OutgoingCommandPtr command, bool ahead) noexcept
      : command_(std::move(command)), client_(std::move(client)), ahead_(ahead) {}

  void run(std::unique_ptr<Command>) noexcept override {
    if (command_->on_sent) return command_->finish({}, *client_->shard_);
    client_->request_arrived(std::move(command_), ahead_);
  }
  [[nodiscard]] OutgoingCommand& command() noexcept { return *command_; }

 private:
  OutgoingCommandPtr command_;
  const std::shared_ptr<Client> client_;
  const bool ahead_;  // made by on_connect
};

/// Before the command is where the slot's owner could find it.
template <class Handler>
void Client::prepare_outgoing(OutgoingCommand& command, const Handler& handler) {
  command.work = tracked_executor(handler, shard_->executor());
  auto slot = asio::get_associated_cancellation_slot(handler);
  if (!slot.is_connected()) return;
  auto operation = std::make_shared<ClientOperation>();
  command.operation = operation;
  slot.assign([shard = shard_, weak = weak_from_this(), operation](asio::cancellation_type type) {
    if (type == asio::cancellation_type::none) return;
    shard->post([weak, operation] {
      if (const auto self = weak.lock()) self->cancel(*operation);
    });
  });
}

/// Decided here and not on the shard, so that it keeps its place before what the caller sends next.
void Client::start_send(OutgoingCommandPtr message, SendHandler handler) {
  message->home = shard_;
  if (message->refusal) return detail::start_send(std::move(message), std::move(handler));
  Lane& lane = lanes_[lane_of(message->header)];
  auto told = OutgoingCommand::make(nullptr, message->kind, message->header, {}, {});
  prepare_outgoing(*message, handler);
  const bool timed = message->timeout.count() != 0;
  const TimePoint deadline = timed ? Clock::now() + message->timeout : TimePoint::max();
  enum class Fate { none, session, kept, waits } fate = Fate::none;
  {
    const std::lock_guard lock(mutex_);
    if (in_series()) {
      SessionPtr session = usable();
      if (session && (opening_ || (lane.kept.empty() && lane.waiting.empty()))) {
        fate = Fate::session;
        message->session = std::move(session);
      } else if (lane.waiting.empty() && has_room(message->packet_size())) {
        fate = Fate::kept;
        told->work = std::move(message->work);
        keep(lane, message);
      } else {
        fate = Fate::waits;
        message->deadline = deadline;
        message->on_sent.swap(handler);
        lane.waiting.push_back(std::move(message));
      }
    }
  }
  switch (fate) {
    case Fate::none: message->refusal = Errc::closed; [[fallthrough]];
    case Fate::session: message->operation = nullptr; return detail::start_send(std::move(message), std::move(handler));
    case Fate::waits:
      if (timed) insist([&] { shard_->post([self = shared_from_this(), deadline] { self->arm_sends(deadline); }); });
      return;
    case Fate::kept: break;
  }
  told->on_sent.swap(handler);
  std::unique_ptr<Command> posted = std::make_unique<Arrival>(shared_from_this(), std::move(told), false);
  if (!shard_->post(std::move(posted))) ended_before(static_cast<Arrival&>(*posted).command());
}

void Client::start_request(OutgoingCommandPtr request, ReplyHandler handler) {
  request->home = shard_;
  if (request->refusal) return detail::start_request(std::move(request), std::move(handler));
  prepare_outgoing(*request, handler);
  request->on_reply.swap(handler);
  std::unique_ptr<Command> posted =
      std::make_unique<Arrival>(shared_from_this(), std::move(request), inside_on_connect());
  if (!shard_->post(std::move(posted))) ended_before(static_cast<Arrival&>(*posted).command());
}

/// The shard has ended, so its executor may run nothing any more.
void Client::ended_before(OutgoingCommand& command) {
  const auto code = make_error_code(Errc::closed);
  if (command.on_sent) {
    auto work = tracked_executor(command.on_sent, asio::system_executor());
    complete_later(asio::system_executor(), std::move(work), std::move(command.on_sent), code);
  } else {
    auto work = tracked_executor(command.on_reply, asio::system_executor());
    complete_later(asio::system_executor(), std::move(work), std::move(command.on_reply), code, Reply{});
  }
}

void start_send(RoutedCommand message, SendHandler handler) {
  if (!message.client) return start_send(std::move(message.command), std::move(handler));
  message.client->start_send(std::move(message.command), std::move(handler));
}

void start_request(RoutedCommand request, ReplyHandler handler) {
  if (!request.client) return start_request(std::move(request.command), std::move(handler));
  request.client->start_request(std::move(request.command), std::move(handler));
}

// --- on the shard

/// The first of the lane, to the session; and so on.
void Client::offer(std::size_t index) noexcept {
  Lane& lane = lanes_[index];
  SessionPtr session;
  const OutgoingCommand* first = nullptr;  // only the shard takes any out
  {
    const std::lock_guard lock(mutex_);
    if (state_ != State::connected || opening_ || lane.offered || !session_->is_open()) return;
    if (!lane.kept.empty()) {
      session = session_;
      first = lane.kept.front().get();
      lane.offered = true;
    }
  }
  if (first == nullptr) return admit_waiting(index);
  insist([&] {
    auto copy = OutgoingCommand::make(session, first->kind, first->header, first->extension(), first->payload(),
                                      first->packing);
    SendHandler handler = asio::bind_executor(asio::system_executor(),
                                              [self = shared_from_this(), session, index](error_code code) mutable {
                                                auto tell = [self, session, index, code] {
                                                  // A later session is told of by itself.
                                                  if (self->session_ == session) self->offered(index, code);
                                                };
                                                if (Shard::current() == self->shard_.get()) return tell();
                                                self->shard_->post(std::move(tell));
                                              });
    copy->work = tracked_executor(handler, asio::system_executor());
    copy->on_sent.swap(handler);
    shard_->post(std::unique_ptr<Command>(copy.release()));
  });
}

void Client::offered(std::size_t index, error_code code) noexcept {
  Lane& lane = lanes_[index];
  OutgoingCommandPtr done;
  bool again = true;
  {
    const std::lock_guard lock(mutex_);
    if (!lane.offered) {  // the series has ended meanwhile
      if (code) ++kept_dropped_;
      return;
    }
    lane.offered = false;
    if (!code) {
      done = std::move(lane.kept.front());
      lane.kept.pop_front();
      kept_.bytes -= done->packet_size();
      --kept_.packets;
    } else {
      again = code != make_error_code(Errc::closed);  // the next connection gets it
    }
  }
  admit_waiting(0);
  admit_waiting(1);
  if (again) offer(index);
  close_if_sent();
}

/// Those who wait for room among what is kept, or for a session that takes what they have.
void Client::admit_waiting(std::size_t index) noexcept {
  Lane& lane = lanes_[index];
  for (;;) {
    SessionPtr session;
    OutgoingCommandPtr first;
    try {
      const std::lock_guard lock(mutex_);
      if (lane.waiting.empty() || !in_series()) return;
      auto& waiting = lane.waiting.front();
      if (state_ == State::connected && !opening_ && lane.kept.empty() && session_->is_open() &&
          session_->protocol().accepts()) {
        session = session_;
      } else if (has_room(waiting->packet_size())) {
        auto kept = OutgoingCommand::make(nullptr, waiting->kind, waiting->header, waiting->extension(),
                                          waiting->payload(), waiting->packing);
        keep(lane, kept);
      } else {
        return;
      }
      first = std::move(waiting);
      lane.waiting.pop_front();
    } catch (const std::bad_alloc&) {
      return;  // when the next one has gone, or at the next connection
    }
    if (session) {
      first->session = session;
      session->take(std::move(first));
    } else {
      first->finish({}, *shard_);
    }
  }
}

// --- requests

void Client::request_arrived(OutgoingCommandPtr command, bool ahead) noexcept {
  const auto& options = options_.reconnect;
  SessionPtr session;
  bool refused = false;
  {
    const std::lock_guard lock(mutex_);
    refused = !in_series();
    if (!refused && state_ == State::connected && (!opening_ || ahead) && session_->is_open() &&
        session_->protocol().accepts()) {
      session = session_;
    }
  }
  if (refused) return command->finish(Errc::closed, *shard_);
  const std::size_t size = command->packet_size();
  const std::size_t bytes = retryable_bytes_.load(std::memory_order_relaxed);
  if (requests_.size() >= options.retry_requests || size > options.retry_bytes - bytes) {
    return command->finish(Errc::would_block, *shard_);
  }
  if (command->timeout.count() != 0) command->deadline = Clock::now() + command->timeout;
  const std::uint64_t number = ++last_request_;
  if (command->operation) static_cast<ClientOperation&>(*command->operation).number = number;
  std::map<std::uint64_t, Retryable>::iterator place;
  try {
    place = requests_.emplace_hint(requests_.end(), number, Retryable{});
  } catch (const std::bad_alloc&) {
    return command->finish(Errc::would_block, *shard_);
  }
  place->second.request = std::move(command);
  retryable_requests_.store(requests_.size(), std::memory_order_relaxed);
  retryable_bytes_.store(bytes + size, std::memory_order_relaxed);
  if (session) return ask(place->second, number, session);
  arm_requests();
}

void Client::ask(Retryable& one, std::uint64_t number, const SessionPtr& session) noexcept {
  insist([&] {
    const auto& request = *one.request;
    auto copy = OutgoingCommand::make(session, request.kind, request.header, request.extension(), request.payload(),
                                      request.packing);
    auto operation = std::make_shared<Operation>();
    const std::uint32_t turn = one.turn + 1;
    ReplyHandler handler = asio::bind_executor(
        asio::system_executor(), [self = shared_from_this(), number, turn](error_code code, Reply reply) mutable {
          if (Shard::current() == self->shard_.get()) return self->answered(number, turn, code, std::move(reply));
          self->shard_->post([self, number, turn, code, reply = std::move(reply)]() mutable {
            self->answered(number, turn, code, std::move(reply));
          });
        });
    copy->work = tracked_executor(handler, asio::system_executor());
    copy->on_reply.swap(handler);
    copy->operation = operation;
    copy->deadline = request.deadline;
    copy->tells_timeout = request.tells_timeout;
    if (one.turn != 0) retried_.add(1);
    one.turn = turn;
    one.sent = std::move(operation);
    session->count_request(&RequestCounters::made);
    session->take(std::move(copy));
  });
}

/// Over a new connection.
void Client::ask_again() noexcept {
  SessionPtr session;
  {
    const std::lock_guard lock(mutex_);
    session = usable();
  }
  if (!session || !session->protocol().accepts()) return;
  request_timer_.reset();
  for (auto& [number, one] : requests_) {
    if (!one.sent) ask(one, number, session);
  }
}

void Client::answered(std::uint64_t number, std::uint32_t turn, error_code code, Reply reply) noexcept {
  const auto found = requests_.find(number);
  if (found == requests_.end() || found->second.turn != turn) return;
  if (code == Errc::connection_lost || code == Errc::closed) {
    bool again = false;
    {
      const std::lock_guard lock(mutex_);
      again = in_series();
    }
    if (again) {
      found->second.sent = nullptr;
      return arm_requests();
    }
  }
  finish_request(found, code, std::move(reply));
}

void Client::finish_request(std::map<std::uint64_t, Retryable>::iterator which, error_code code, Reply reply) noexcept {
  const OutgoingCommandPtr request = std::move(which->second.request);
  requests_.erase(which);
  retryable_requests_.store(requests_.size(), std::memory_order_relaxed);
  retryable_bytes_.store(retryable_bytes_.load(std::memory_order_relaxed) - request->packet_size(),
                         std::memory_order_relaxed);
  shard_->later(std::move(request->work), std::move(request->on_reply), code, std::move(reply));
}

/// For those without a connection; the others' time is their session's business.
void Client::arm_requests() noexcept {
  TimePoint next = TimePoint::max();
  for (const auto& [number, one] : requests_) {
    if (!one.sent) next = std::min(next, one.request->deadline);
  }
  if (next == TimePoint::max()) return request_timer_.reset();
  arm(request_timer_, next, &Client::expire_requests);
}

/// Calls it at that time, unless it is called before.
void Client::arm(std::optional<Timer>& timer, TimePoint at, void (Client::*expire)() noexcept) noexcept {
  if (timer && timer->expiry() <= at) return;
  insist([&] {
    timer.emplace(shard_->executor(), at);
    timer->async_wait([weak = weak_from_this(), expire](const error_code& cancelled) {
      const auto self = weak.lock();
      if (cancelled || !self) return;
      Shard::Scope scope(*self->shard_);
      (self.get()->*expire)();
    });
  });
}

void Client::expire_requests() noexcept {
  request_timer_.reset();
  const TimePoint now = Clock::now();
  for (auto next = requests_.begin(); next != requests_.end();) {
    const auto one = next++;
    if (one->second.sent || one->second.request->deadline > now) continue;
    shard_->counters().requests.made.add(1);
    shard_->counters().requests.timed_out.add(1);
    finish_request(one, Errc::request_timeout, {});
  }
  arm_requests();
}

/// For those who wait for room among what is kept.
void Client::arm_sends(TimePoint deadline) noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (!anybody_waits()) return;  // a timer would keep the context running
  }
  arm(send_timer_, deadline, &Client::expire_sends);
}

void Client::expire_sends() noexcept {
  send_timer_.reset();
  const TimePoint now = Clock::now();
  TimePoint next = TimePoint::max();
  std::size_t most = 0;
  {
    const std::lock_guard lock(mutex_);
    for (const auto& lane : lanes_) most += lane.waiting.size();
  }
  std::vector<OutgoingCommandPtr> late;
  insist([&] { late.reserve(most); });
  {
    const std::lock_guard lock(mutex_);
    for (auto& lane : lanes_) {
      next = std::min(next, take_late(lane.waiting, now, [&](OutgoingCommandPtr& waiter) {
                        if (late.size() < most) late.push_back(std::move(waiter));  // who has come since is next
                      }));
    }
  }
  for (auto& waiter : late) waiter->finish(Errc::send_timeout, *shard_);
  for (std::size_t lane = 0; lane < lane_count; ++lane) admit_waiting(lane);
  if (next != TimePoint::max()) arm_sends(next);
}

void Client::cancel(const ClientOperation& operation) noexcept {
  SessionPtr session;
  OutgoingCommandPtr waiting;
  {
    const std::lock_guard lock(mutex_);
    session = session_;
    for (auto& lane : lanes_) {
      const auto found =
          std::ranges::find_if(lane.waiting, [&](const auto& one) { return one->operation.get() == &operation; });
      if (found == lane.waiting.end()) continue;
      waiting = std::move(*found);
      lane.waiting.erase(found);
      break;
    }
  }
  if (waiting) {
    waiting->finish(asio::error::operation_aborted, *shard_);
    for (std::size_t lane = 0; lane < lane_count; ++lane) admit_waiting(lane);
    return;
  }
  if (const auto found = requests_.find(operation.number); found != requests_.end()) {
    const auto sent = found->second.sent;
    finish_request(found, asio::error::operation_aborted, {});
    if (sent && session) session->cancel(*sent);
    return;
  }
  if (session) session->cancel(operation);
}

}  // namespace msgtrans::detail

namespace msgtrans {

detail::RoutedCommand ClientTransport::route_send(BytesView payload, const SendOptions& options) const {
  if (!client_->keeps()) {
    return {detail::make_send(client_->current(), {client_->shard(), Errc::closed}, payload, options), nullptr};
  }
  auto command = client_->make_outgoing(detail::OutgoingCommand::Kind::one_way,
                                        detail::header_for(wire::PacketType::one_way, options), options.extension,
                                        payload, options.compression);
  command->timeout = std::min(options.timeout, detail::longest_duration);
  if (options.timeout.count() < 0) command->refusal = Errc::invalid_option;
  return {std::move(command), client_};
}

detail::RoutedCommand ClientTransport::route_request(BytesView payload, const RequestOptions& options) const {
  if (!client_->retries()) {
    return {detail::make_request(client_->current(), {client_->shard(), Errc::closed}, payload, options), nullptr};
  }
  return {client_->make_request(payload, options), client_};
}

Reply ClientTransport::request(BytesView payload, const RequestOptions& options) {
  Error error;
  Reply reply = request(payload, options, error);
  if (error) throw Exception(error);
  return reply;
}

Reply ClientTransport::request(BytesView payload, const RequestOptions& options, Error& error) {
  if (client_->retries()) {
    const auto start = [&](detail::ReplyHandler handler) {
      detail::start_request(route_request(payload, options), std::move(handler));
    };
    return detail::wait_for_reply(start, "request() would block a thread that runs handlers; use async_request", error);
  }
  auto state = client_->current();
  if (!state) {
    error = Error(Errc::closed, "not connected");
    return {};
  }
  return detail::request(std::move(state), payload, options, error);
}

}  // namespace msgtrans
