// SPDX-License-Identifier: Apache-2.0
#include "session_state.hpp"

#include "admission.hpp"
#include "complete.hpp"
#include "control_loop.hpp"
#include "in_process.hpp"

#include <algorithm>
#include <array>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/error.hpp>
#include <cerrno>
#include <limits>
#include <linux/sockios.h>
#include <msgtrans/detail/exception_text.hpp>
#include <msgtrans/detail/insist.hpp>
#include <msgtrans/session/session_actor.hpp>
#include <msgtrans/wire/told_timeout.hpp>
#include <new>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>
#include <utility>

namespace msgtrans::detail {

namespace {

iovec iovec_of(std::span<const std::byte> bytes) noexcept {
  return {const_cast<std::byte*>(bytes.data()), bytes.size()};  // sendmsg only reads
}

std::unique_ptr<const TlsPeer> tls_peer_of(const Connection& connection) {
  auto peer = connection.tls_peer();
  return peer ? std::make_unique<const TlsPeer>(*std::move(peer)) : nullptr;
}

bool high_priority(const wire::Header& header) noexcept {
  return (header.flags & wire::flags::high_priority) != 0;
}

}  // namespace

wire::Header header_for(wire::PacketType type, const SendOptions& options) noexcept {
  wire::Header header;
  header.type = type;
  header.biz_type = options.biz_type;
  header.flags = static_cast<std::uint16_t>((options.high_priority ? wire::flags::high_priority : 0) |
                                            (options.route_tag ? wire::flags::route_tag : 0));
  return header;
}

void intrusive_ptr_add_ref(const SessionState* state) noexcept {
  state->references_.fetch_add(1, std::memory_order_relaxed);
}

void intrusive_ptr_release(const SessionState* state) noexcept {
  // acq_rel: what every holder did to the session happens before its destruction.
  if (state->references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete state;
}

// --- OutgoingCommand

OutgoingCommandPtr OutgoingCommand::make(SessionPtr session, Kind kind, const wire::Header& header, BytesView extension,
                                         BytesView payload, Packing packing) {
  void* const memory = ::operator new(sizeof(OutgoingCommand) + extension.size() + payload.size());
  auto* const command =
      ::new (memory) OutgoingCommand(std::move(session), kind, header, extension.size(), payload.size());
  command->header.compression = packing.codec;
  command->packing = packing;
  auto* const bytes = reinterpret_cast<std::byte*>(command + 1);
  std::copy_n(extension.data(), extension.size(), bytes);
  std::copy_n(payload.data(), payload.size(), bytes + extension.size());
  return OutgoingCommandPtr(command);
}

void OutgoingCommandDeleter::operator()(OutgoingCommand* command) const noexcept {
  delete command;
}

OutgoingCommand::~OutgoingCommand() {
  if (session && reserved) session->unreserve(packet_size(), high_priority(header));
  if (in_line) session->leave_line(*this);
  if (session && counted) session->protocol().answer_arrived(packet_size());
}

void OutgoingCommand::run(std::unique_ptr<Command> self) noexcept {
  self.release();
  OutgoingCommandPtr mine(this);
  if (kind == Kind::request) {
    if (session) {
      session->count_request(&RequestCounters::made);
    } else {
      Shard::current()->counters().requests.made.add(1);
    }
  }
  if (refusal) return finish(refusal, *Shard::current());
  SessionState& to = *session;
  to.take(std::move(mine));
}

void OutgoingCommand::finish(error_code code, Shard& shard) noexcept {
  if (kind == Kind::request) {
    const auto outcome = code == Errc::request_timeout            ? &RequestCounters::timed_out
                         : code == asio::error::operation_aborted ? &RequestCounters::cancelled
                                                                  : &RequestCounters::refused;
    if (session) {
      session->count_request(outcome);
    } else {
      (shard.counters().requests.*outcome).add(1);
    }
  }
  try {
    if (on_sent) shard.later(std::move(work), std::move(on_sent), code);
    if (on_reply) shard.later(std::move(work), std::move(on_reply), code, Reply{});
  } catch (const std::exception&) {
    // Out of memory for telling it: the handler is destroyed, which ends its wait as well.
  }
}

// --- any thread

DrainRule rule_for(const DrainOptions& options) {
  const auto by = options.within.count() == 0 ? TimePoint::min() : Clock::now() + options.within;
  return {by, options.quiet, Error(Errc::stopping, options.reason)};
}

SessionState::SessionState(SessionId id, std::shared_ptr<Shard> shard, std::shared_ptr<SessionHost> host,
                           std::shared_ptr<const SessionOptions> options, Link link, Peer peer)
    : slow_consumer_(options->slow_consumer),
      id_(id),
      shard_(std::move(shard)),
      host_(std::move(host)),
      options_(std::move(options)),
      peer_(std::move(peer)),
      link_(std::move(link)),
      in_process_(dynamic_cast<InProcessConnection*>(link_.connection.get())),
      bare_(!link_.connection),
      tls_(link_.connection ? tls_peer_of(*link_.connection) : nullptr),
      outbound_limit_({options_->outbound_bytes, options_->outbound_packets}),
      counters_(&shard_->counters().connections),
      protocol_(*options_, shard_->resources(), shard_->now()),
      intercept_in_(host_->inbound_interceptors()),
      intercept_out_(host_->outbound_interceptors()),
      timer_(*this) {
  // Some ten microseconds' worth: whoever floods his shard must not keep the others waiting.
  constexpr std::uint32_t packets_a_turn = 256;
  protocol_.set_packets_a_call(packets_a_turn);
}

SessionState::~SessionState() {
  delete requests_.load(std::memory_order_relaxed);
}

SessionStats SessionState::stats() const noexcept {
  const auto normal = budget_.depth();
  const auto priority = priority_budget_.depth();
  SessionStats stats{.packets_in = protocol_.packets_in(),
                     .packets_out = protocol_.packets_out(),
                     .bytes_in = protocol_.bytes_in(),
                     .bytes_out = protocol_.bytes_out(),
                     .queued_bytes = normal.bytes + priority.bytes,
                     .queued_packets = normal.packets + priority.packets,
                     .most_queued_bytes = most_queued_.load(std::memory_order_relaxed),
                     .dropped_oldest = dropped_oldest_.value(),
                     .dropped_at_close = dropped_at_close_.value(),
                     .dropped_inbound = protocol_.dropped_inbound(),
                     .compressed_packets = compressed_packets_.value(),
                     .compressed_bytes_before = compressed_bytes_before_.value(),
                     .compressed_bytes_after = compressed_bytes_after_.value(),
                     .incompressible_packets = incompressible_packets_.value()};
  if (const auto* const requests = requests_.load(std::memory_order_acquire)) stats.requests = requests->value();
  return stats;
}

void SessionState::count_request(protocol::Counter RequestCounters::*what) noexcept {
  (shard_->counters().requests.*what).add(1);
  auto* mine = requests_.load(std::memory_order_relaxed);
  if (mine == nullptr && what == &RequestCounters::made) {
    // Most sessions of a server make none, and an idle one is to be small. Short of memory only the shard counts.
    mine = new (std::nothrow) RequestCounters;
    requests_.store(mine, std::memory_order_release);
  }
  if (mine != nullptr) (mine->*what).add(1);
}

SendResult SessionState::check(std::size_t payload, std::size_t extension) const noexcept {
  if (!is_open()) return SendResult::closed;
  if (payload > options_->max_payload || extension > options_->max_extension) return SendResult::too_large;
  return SendResult::queued;
}

OutboundLimits SessionState::outbound_limits() const noexcept {
  const auto limit = outbound_limit_.get();
  return {limit.bytes, limit.packets, slow_consumer_.load(std::memory_order_relaxed)};
}

void SessionState::set_outbound_limits(const OutboundLimits& limits) {
  if (auto error = validate(limits)) throw Exception(std::move(error));
  auto tell_shard = [self = SessionPtr(this), limits] {
    self->protocol_.set_outbound_limit({limits.bytes, limits.packets});
    self->shard_->touch(*self);  // there may be room now for those who wait
  };
  shard_->post(std::move(tell_shard));
  outbound_limit_.set({limits.bytes, limits.packets});
  slow_consumer_.store(limits.slow_consumer, std::memory_order_relaxed);
}

SessionState::Room SessionState::take_room(std::size_t size, bool priority, protocol::OutboundDepth limit) noexcept {
  auto& budget = priority ? priority_budget_ : budget_;
  if (!budget.try_reserve(size, limit)) return Room::session_full;
  auto* const total = shard_->outbound_total();
  if (total == nullptr || total->try_reserve(size)) return Room::taken;
  budget.release({size, 1});
  return Room::server_full;
}

SendResult SessionState::reserve(std::size_t size, bool priority) noexcept {
  auto limit = outbound_limit_.get();
  const auto policy = slow_consumer_.load(std::memory_order_relaxed);
  if (policy == SlowConsumer::drop_oldest && !priority) {
    // The oldest are dropped by the shard, where the queue is; until then, what is on its way there is bounded by a
    // second budget.
    limit = {2 * limit.bytes, 2 * limit.packets};
  }
  Room room = Room::session_full;
  bool others_wait = false;
  // Again once it is known to be found full: else the shard might have made room in between, and tell nobody.
  for (const bool told : {false, true}) {
    others_wait = !priority && normal_waiting_.load() != 0;
    if (!others_wait && (room = take_room(size, priority, limit)) == Room::taken) return SendResult::queued;
    if (!told) found_full();
  }
  if (others_wait || priority || policy != SlowConsumer::close || room == Room::server_full) {
    return SendResult::would_block;
  }
  std::string text;
  try {
    text = describe_full();
  } catch (const std::bad_alloc&) {
    // The code says enough.
  }
  close(Error(Errc::slow_consumer, std::move(text)));
  return SendResult::closed;
}

std::string SessionState::describe_full() const {
  const auto depth = budget_.depth();
  const auto limit = outbound_limit_.get();
  return "outbound queue full: " + std::to_string(depth.bytes) + " bytes in " + std::to_string(depth.packets) +
         " packets, limits " + std::to_string(limit.bytes) + " and " + std::to_string(limit.packets);
}

/// Tells it once, until the queue has been below its low mark again.
void SessionState::found_full() noexcept {
  // Sequentially consistent, and always written: either whoever sets it finds room when he looks again, or the shard
  // sees it after the next packet that leaves.
  if (slow_.exchange(true)) return;
  ControlLoop* const control = shard_->control();
  if (control == nullptr || !control->has_subscribers()) return;
  try {
    Event event{EventKind::slow_consumer, id_, peer_.to_string(), Error(Errc::slow_consumer, describe_full())};
    control->send_about(*this, ControlCommand::Announce{std::move(event)});
  } catch (const std::bad_alloc&) {
    // News may be lost.
  }
}

bool SessionState::is_emptied() const noexcept {
  const auto low = protocol::part_of(outbound_limit_.get(), options_->low_mark_percent);
  const auto* const total = shard_->outbound_total();
  for (const auto* budget : {&budget_, &priority_budget_}) {
    const auto depth = budget->depth();
    if (depth.bytes > low.bytes || depth.packets > low.packets) return false;
  }
  return total == nullptr || !total->starved();
}

void SessionState::claim(OutgoingCommand& command) noexcept {
  if (high_priority(command.header)) return;  // which overtakes anyway
  if (normal_waiting_.load() == 0 && reserve_waited(command)) return;
  command.in_line = true;
  normal_waiting_.fetch_add(1);
}

void SessionState::leave_line(OutgoingCommand& command) noexcept {
  if (!std::exchange(command.in_line, false)) return;
  normal_waiting_.fetch_sub(1);
  if (slow_.load() && Shard::current() != shard_.get()) touch_from_anywhere();
}

void SessionState::give_back(protocol::OutboundDepth depth, bool priority) noexcept {
  if (depth.packets == 0) return;
  (priority ? priority_budget_ : budget_).release(depth);
  if (auto* const total = shard_->outbound_total(); total != nullptr && total->release(depth.bytes)) {
    shard_->tell_room();
  }
}

void SessionState::unreserve(std::size_t size, bool priority) noexcept {
  give_back({size, 1}, priority);
  // Nothing leaves the queue, so the shard would not look.
  if (slow_.load() && Shard::current() != shard_.get()) touch_from_anywhere();
}

void SessionState::touch_from_anywhere() noexcept {
  insist([this] { shard_->post([self = SessionPtr(this)] { self->shard_->touch(*self); }); });
}

/// Who tries until there is room is not to compress each time: refuses what not even a byte of has room.
SendResult SessionState::refuse_unpacked(std::size_t payload, const SendOptions& options) noexcept {
  if (const auto refused = check(0, options.extension.size()); refused != SendResult::queued) return refused;
  const auto depth = (options.high_priority ? priority_budget_ : budget_).depth();
  const auto limit = outbound_limit_.get();
  const bool doubled = slow_consumer_.load(std::memory_order_relaxed) == SlowConsumer::drop_oldest;
  const std::size_t factor = doubled && !options.high_priority ? 2 : 1;
  const std::size_t least = wire::header_size + options.extension.size() + 1;
  if (depth.packets == 0 || (depth.packets < factor * limit.packets && depth.bytes + least <= factor * limit.bytes)) {
    return SendResult::queued;
  }
  const std::size_t size = least - 1 + payload;
  const auto full = reserve(size, options.high_priority);
  if (full == SendResult::queued) unreserve(size, options.high_priority);  // there is room after all
  return full;
}

// In line, so that what is not compressed pays for nothing.
[[gnu::always_inline]] inline SendResult SessionState::send_packed(BytesView payload, Packing packing,
                                                                   const SendOptions& options) noexcept {
  if (const auto refused = check(payload.size(), options.extension.size()); refused != SendResult::queued) {
    return refused;
  }
  const std::size_t size = wire::header_size + options.extension.size() + payload.size();
  const bool here = Shard::current() == shard_.get();
  const bool answer = here && delivering_;
  if (!answer) {
    if (const auto full = reserve(size, options.high_priority); full != SendResult::queued) return full;
  }
  auto header = header_for(wire::PacketType::one_way, options);
  header.compression = packing.codec;
  const auto kind = answer ? protocol::OutboundKind::answer : protocol::OutboundKind::push;
  if (here && shard_->caught_up()) {
    count(packing, payload.size());
    enqueue(header, options.extension, payload, kind);
    return SendResult::queued;
  }
  try {
    auto command = OutgoingCommand::make(this, answer ? OutgoingCommand::Kind::answer : OutgoingCommand::Kind::one_way,
                                         header, options.extension, payload, packing);
    if (answer) return post_answer(std::move(command));
    command->reserved = true;
    return shard_->post(std::unique_ptr<Command>(command.release())) ? SendResult::queued : SendResult::closed;
  } catch (const std::bad_alloc&) {
    if (!answer) unreserve(size, options.high_priority);
    return SendResult::would_block;
  }
}

SendResult SessionState::post_answer(OutgoingCommandPtr command) noexcept {
  command->counted = Shard::current() == shard_.get();
  if (command->counted) protocol_.answer_under_way(command->packet_size());
  return shard_->post(std::unique_ptr<Command>(command.release())) ? SendResult::queued : SendResult::closed;
}

SendResult SessionState::send(BytesView payload, const SendOptions& options) noexcept {
  if (intercept_out_) [[unlikely]]
    return send_intercepted(payload, options);
  return send_past(payload, options);
}

[[gnu::noinline]] SendResult SessionState::send_intercepted(BytesView payload, const SendOptions& options) noexcept {
  if (Interceptors::running()) return send_past(payload, options);
  if (!is_open()) return SendResult::closed;
  Session session{SessionPtr(this)};
  auto message =
      Interceptors::outbound(header_for(wire::PacketType::one_way, options), options.extension, payload, &session);
  if (!intercept_out_->pass(message)) return SendResult::rejected;
  SendOptions changed = options;
  changed.biz_type = message.biz_type();
  changed.extension = message.extension();
  return send_past(message.payload(), changed);
}

[[gnu::always_inline]] inline SendResult SessionState::send_past(BytesView payload,
                                                                 const SendOptions& options) noexcept {
  if (may_pack(*options_, options.compression)) return pack_and_send(payload, options);
  return send_packed(payload, {}, options);
}

[[gnu::noinline]] SendResult SessionState::pack_and_send(BytesView payload, const SendOptions& options) noexcept {
  const auto how = packing_of(*options_, options.compression, payload.size());
  const bool answer = Shard::current() == shard_.get() && delivering_;
  if (how.codec != Compression::none && !answer) {
    if (const auto refused = refuse_unpacked(payload.size(), options); refused != SendResult::queued) return refused;
  }
  const PackedPayload packed(how, payload);
  return send_packed(packed.bytes(), packed.packing(), options);
}

[[gnu::always_inline]] inline SendResult SessionState::respond_packed(const wire::Header& request, BytesView payload,
                                                                      Packing packing, BytesView extension) noexcept {
  if (const auto refused = check(payload.size(), extension.size()); refused != SendResult::queued) return refused;
  wire::Header header;
  header.type = wire::PacketType::response;
  header.biz_type = request.biz_type;
  header.message_id = request.message_id;
  header.flags = static_cast<std::uint16_t>(request.flags & wire::flags::high_priority);
  header.compression = packing.codec;
  if (Shard::current() == shard_.get() && shard_->caught_up()) {
    count(packing, payload.size());
    enqueue(header, extension, payload, protocol::OutboundKind::answer);
    return SendResult::queued;
  }
  try {
    return post_answer(OutgoingCommand::make(this, OutgoingCommand::Kind::answer, header, extension, payload, packing));
  } catch (const std::bad_alloc&) {
    return SendResult::would_block;
  }
}

SendResult SessionState::respond(const wire::Header& request, BytesView payload, BytesView extension,
                                 const Override& compression) noexcept {
  if (intercept_out_) [[unlikely]]
    return respond_intercepted(request, payload, extension, compression);
  return respond_past(request, payload, extension, compression);
}

[[gnu::noinline]] SendResult SessionState::respond_intercepted(const wire::Header& request, BytesView payload,
                                                               BytesView extension,
                                                               const Override& compression) noexcept {
  if (Interceptors::running()) return respond_past(request, payload, extension, compression);
  if (!is_open()) return SendResult::closed;
  wire::Header header = request;
  header.type = wire::PacketType::response;
  Session session{SessionPtr(this)};
  auto message = Interceptors::outbound(header, extension, payload, &session);
  if (!intercept_out_->pass(message)) return SendResult::rejected;
  header.biz_type = message.biz_type();
  return respond_past(header, message.payload(), message.extension(), compression);
}

[[gnu::always_inline]] inline SendResult SessionState::respond_past(const wire::Header& request, BytesView payload,
                                                                    BytesView extension,
                                                                    const Override& compression) noexcept {
  if (may_pack(*options_, compression)) return pack_and_respond(request, payload, extension, compression);
  return respond_packed(request, payload, {}, extension);
}

[[gnu::noinline]] SendResult SessionState::pack_and_respond(const wire::Header& request, BytesView payload,
                                                            BytesView extension, const Override& compression) noexcept {
  if (const auto refused = check(0, extension.size()); refused != SendResult::queued) return refused;
  const PackedPayload packed(packing_of(*options_, compression, payload.size()), payload);
  return respond_packed(request, packed.bytes(), packed.packing(), extension);
}

SendResult SessionState::respond(const Message& request, BytesView payload, BytesView extension,
                                 const Override& compression) noexcept {
  if (!request.answerable_) return SendResult::not_found;
  const auto result = respond(request.header_, payload, extension, compression);
  if (result == SendResult::queued) request.answerable_ = false;
  return result;
}

SendResult SessionState::respond_retained(const wire::Header& request, BytesView payload, BytesView extension,
                                          const Override& compression) noexcept {
  const auto result = respond(request, payload, extension, compression);
  // After the answer is on its way: a draining session must not see nothing owed in between.
  if (result == SendResult::queued) give_up_answer();
  return result;
}

void SessionState::give_up_answer() noexcept {
  // Sequentially consistent on both sides: either the shard, having set draining_ or waits_for_answers_, sees the new
  // count, or this sees the flag and wakes it.
  const auto left = answers_owed_.fetch_sub(1) - 1;
  const bool last = left == 0 && draining_.load();
  const bool room = left < options_->max_requests_in_flight && waits_for_answers_.load();
  if (last || (room && waits_for_answers_.exchange(false))) touch_from_anywhere();
}

/// Hands out no more requests while too many want their answers.
void SessionState::bound_requests() noexcept {
  const std::size_t most = options_->max_requests_in_flight;
  if (most == 0 || answers_owed_.load(std::memory_order_relaxed) < most) return;
  protocol_.hold_for_answers(true);
  waits_for_answers_.store(true);
  // Given since: whoever did may not have seen the flag, and settling looks at it.
  if (answers_owed_.load() < most) waits_for_answers_.store(false);
}

void SessionState::close(Error reason) noexcept {
  // At once, from wherever: nothing later is accepted, and inside a handler no further message is handed out. The end
  // itself is a command like any other, so that what was accepted before it is written before it.
  open_.store(false, std::memory_order_release);
  if (Shard::current() == shard_.get()) protocol_.mute();
  // It takes no more messages, so it must end.
  insist([&] {
    // A copy: posting again needs the reason again.
    shard_->post([self = SessionPtr(this), why = reason]() mutable {
      self->protocol_.close(std::move(why), self->shard_->now());
      self->shard_->touch(*self);
    });
  });
}

// --- starting an operation, any thread

namespace {

OutgoingCommandPtr make_command_past(SessionPtr session, const Home& home, OutgoingCommand::Kind kind,
                                     const wire::Header& header, BytesView extension, BytesView payload,
                                     const std::optional<CompressionOptions>& compression) {
  const PackedPayload packed(
      session && session->is_open() ? packing_of(session->options(), compression, payload.size()) : no_compression,
      payload);
  if (session &&
      (packed.bytes().size() > session->options().max_payload || extension.size() > session->options().max_extension)) {
    auto command = OutgoingCommand::make(std::move(session), kind, header, {}, {});
    command->refusal = Errc::too_large;
    return command;
  }
  const bool known = session != nullptr;
  auto command = OutgoingCommand::make(std::move(session), kind, header, extension, packed.bytes(), packed.packing());
  if (!known) {
    command->refusal = home.nobody;
    command->home = home.shard;
  }
  return command;
}

OutgoingCommandPtr make_command(SessionPtr session, const Home& home, OutgoingCommand::Kind kind,
                                const wire::Header& header, BytesView extension, BytesView payload,
                                const std::optional<CompressionOptions>& compression) {
  const Interceptors* const interceptors = session ? session->outbound_interceptors() : nullptr;
  if (interceptors == nullptr || Interceptors::running() || !session->is_open()) {
    return make_command_past(std::move(session), home, kind, header, extension, payload, compression);
  }
  Session to(session);
  auto message = Interceptors::outbound(header, extension, payload, &to);
  if (!interceptors->pass(message)) {
    auto command = OutgoingCommand::make(std::move(session), kind, header, {}, {});
    command->refusal = Errc::rejected;
    return command;
  }
  wire::Header changed = header;
  changed.biz_type = message.biz_type();
  return make_command_past(std::move(session), home, kind, changed, message.extension(), message.payload(),
                           compression);
}

/// Hands the command with its handler to the shard, which also tells of a refusal.
template <class Handler>
void launch(OutgoingCommandPtr command, const Handler& handler) {
  const std::shared_ptr<Shard> shard = command->session ? command->session->shard().shared_from_this() : command->home;
  command->work = tracked_executor(handler, shard->executor());
  if (auto slot = asio::get_associated_cancellation_slot(handler); slot.is_connected() && !command->refusal) {
    command->operation = std::make_shared<Operation>();
    slot.assign([session = command->session, operation = command->operation](asio::cancellation_type type) {
      if (type == asio::cancellation_type::none) return;
      session->shard().post([session, operation] { session->cancel(*operation); });
    });
  }
  if (command->session && !command->refusal) command->session->claim(*command);
  std::unique_ptr<Command> posted(command.release());
  if (shard->post(std::move(posted))) return;
  // The shard has ended, so its executor may run nothing any more.
  command.reset(static_cast<OutgoingCommand*>(posted.release()));
  const error_code code = command->refusal ? command->refusal : make_error_code(Errc::closed);
  auto work = tracked_executor(handler, asio::system_executor());
  if (command->on_sent) complete_later(asio::system_executor(), std::move(work), std::move(command->on_sent), code);
  if (command->on_reply) {
    complete_later(asio::system_executor(), std::move(work), std::move(command->on_reply), code, Reply{});
  }
}

}  // namespace

RequestExtension::RequestExtension(const RequestOptions& options, std::chrono::milliseconds timeout)
    : plain_(options.extension), tells_timeout_(options.tell_timeout && timeout.count() > 0) {
  if (!tells_timeout_) return;
  with_timeout_.resize(wire::told_timeout_size + plain_.size());
  // Written again when it goes out.
  wire::write_told_timeout(timeout, std::span(with_timeout_).first<wire::told_timeout_size>());
  std::ranges::copy(plain_, with_timeout_.begin() + wire::told_timeout_size);
}

OutgoingCommandPtr make_send(SessionPtr session, const Home& home, BytesView payload, const SendOptions& options) {
  auto command =
      make_command(std::move(session), home, OutgoingCommand::Kind::one_way,
                   header_for(wire::PacketType::one_way, options), options.extension, payload, options.compression);
  command->timeout = std::min(options.timeout, longest_duration);
  if (options.timeout.count() < 0) command->refusal = Errc::invalid_option;
  return command;
}

OutgoingCommandPtr make_request(SessionPtr session, const Home& home, BytesView payload,
                                const RequestOptions& options) {
  const auto timeout =
      options.timeout.value_or(session ? session->options().request_timeout : std::chrono::milliseconds{0});
  const auto header = header_for(
      wire::PacketType::request,
      {.biz_type = options.biz_type, .high_priority = options.high_priority, .route_tag = options.route_tag});
  const RequestExtension extension(options, timeout);
  auto command = make_command(std::move(session), home, OutgoingCommand::Kind::request, header, extension.bytes(),
                              payload, options.compression);
  command->tells_timeout = extension.tells_timeout_in(*command);
  command->timeout = std::min(timeout, longest_duration);
  if (timeout.count() < 0) command->refusal = Errc::invalid_option;
  return command;
}

void start_send(OutgoingCommandPtr command, SendHandler handler) {
  auto* const raw = command.get();
  raw->on_sent.swap(handler);  // assigning is broken in Boost 1.81: it wraps the handler in itself without end
  launch(std::move(command), raw->on_sent);
}

void start_request(OutgoingCommandPtr command, ReplyHandler handler) {
  auto* const raw = command.get();
  raw->on_reply.swap(handler);
  launch(std::move(command), raw->on_reply);
}

// --- on the shard: out

void SessionState::enqueue(wire::Header header, std::span<const std::byte> extension,
                           std::span<const std::byte> payload, protocol::OutboundKind kind) noexcept {
  const std::size_t size = wire::header_size + extension.size() + payload.size();
  if (!protocol_.accepts()) {
    if (kind == protocol::OutboundKind::push) unreserve(size, high_priority(header));
    note_dropped_at_close(1);
    return;
  }
  if (header.type == wire::PacketType::response) shard_->counters().answers_sent.add(1);
  try {
    if (header.type == wire::PacketType::one_way) header.message_id = protocol_.next_message_id();
    if (kind == protocol::OutboundKind::push &&
        slow_consumer_.load(std::memory_order_relaxed) == SlowConsumer::drop_oldest && !high_priority(header)) {
      make_room(size);
    }
    if (payload.size() < protocol::OutboundQueue::large_payload || write_waiting_ || in_process_ != nullptr ||
        !write_through(header, extension, payload, kind)) {
      protocol_.outbound().append(header, extension, payload, kind);
    }
  } catch (const std::exception&) {
    if (kind == protocol::OutboundKind::push) unreserve(size, high_priority(header));
    note_dropped_at_close(1);
    protocol_.abort(Error(make_error_code(boost::system::errc::not_enough_memory), "out of memory for a packet"));
  }
  if (!touched) shard_->touch(*this);
}

/// A large payload goes to the socket from where it is, if all before it is written; only a rest is copied.
bool SessionState::write_through(const wire::Header& header, std::span<const std::byte> extension,
                                 std::span<const std::byte> payload, protocol::OutboundKind kind) {
  const auto is_lost = [&] {  // by a failure of the connection
    if (protocol_.accepts() || protocol_.ended()) return false;
    if (kind == protocol::OutboundKind::push) {
      unreserve(wire::header_size + extension.size() + payload.size(), high_priority(header));
    }
    note_dropped_at_close(1);
    return true;
  };
  write_out();
  if (is_lost()) return true;
  if (!protocol_.outbound_empty() || protocol_.ended() || write_waiting_) return false;
  wire::Header complete = header;
  complete.ext_len = static_cast<std::uint16_t>(extension.size());
  complete.payload_len = static_cast<std::uint32_t>(payload.size());
  std::array<std::byte, wire::header_size> head;
  wire::encode_header(complete, head);
  std::array<iovec, 3> pieces{iovec_of(head), iovec_of(extension), iovec_of(payload)};
  const std::size_t size = complete.packet_size();
  bool full = false;
  const std::size_t written = write_some(pieces, size, full);
  if (is_lost()) return true;
  if (written == size) {
    protocol_.note_written(written, 1, shard_->now());
    counters_->packets_out.add(1);
    if (kind == protocol::OutboundKind::push) unreserve(size, high_priority(header));
    return true;
  }
  if (written != 0) protocol_.note_written(written, 0, shard_->now());
  if (!protocol_.ended()) protocol_.write_blocked(shard_->now());
  protocol_.outbound().append_rest(header, extension, payload, kind, written);
  return true;
}

/// What was compressed, or could not be, and is now accepted; `size`: on the wire.
void SessionState::note_packed(Packing packing, std::size_t size) noexcept {
  auto& counters = shard_->counters();
  if (packing.codec == Compression::none) {
    incompressible_packets_.add(1);
    counters.incompressible_packets.add(1);
    return;
  }
  compressed_packets_.add(1);
  compressed_bytes_before_.add(packing.tried);
  compressed_bytes_after_.add(size);
  counters.compressed_packets.add(1);
  counters.compressed_bytes_before.add(packing.tried);
  counters.compressed_bytes_after.add(size);
}

void SessionState::make_room(std::size_t size) noexcept {
  auto depth = protocol_.outbound().depth();
  const auto limit = outbound_limit_.get();
  while (depth.packets != 0 && (depth.bytes + size > limit.bytes || depth.packets + 1 > limit.packets)) {
    const std::size_t dropped = protocol_.outbound().drop_oldest();
    if (dropped == 0) return;
    found_full();
    give_back({dropped, 1}, false);
    shard_->counters().dropped_oldest.add(1);
    dropped_oldest_.add(1);
    depth = protocol_.outbound().depth();
  }
}

void SessionState::take(OutgoingCommandPtr command) noexcept {
  if (!protocol_.accepts()) {
    if (command->waits()) {
      command->finish(Errc::closed, *shard_);
    } else {
      note_dropped_at_close(1);
    }
    return;
  }
  if (command->waits()) {
    // Not the turn's beginning: no request may time out early.
    const bool timed = command->timeout.count() != 0;
    if (timed || command->kind == OutgoingCommand::Kind::request) command->started = Clock::now();
    // A client's that has waited for its session has its deadline from then.
    if (timed) command->deadline = std::min(command->deadline, command->started + command->timeout);
    const std::size_t lane = high_priority(command->header) ? 1 : 0;
    const bool first = !waiting_ || waiting_->lanes[lane].empty();
    if (!command->reserved && (!first || !reserve_waited(*command))) {
      try {
        if (!waiting_) waiting_ = std::make_unique<Waiting>();
        waiting_->deadline = std::min(waiting_->deadline, command->deadline);
        auto& line = waiting_->lanes[lane];
        line.push_back(std::move(command));
        if (lane == 0 && !std::exchange(line.back()->in_line, true)) normal_waiting_.fetch_add(1);
      } catch (const std::bad_alloc&) {
        if (command) command->finish(Errc::would_block, *shard_);
      }
      shard_->touch(*this);
      return;
    }
  }
  start(std::move(command));
}

/// Room is reserved.
void SessionState::start(OutgoingCommandPtr command) noexcept {
  using Kind = OutgoingCommand::Kind;
  leave_line(*command);
  command->reserved = false;
  if (command->kind == Kind::request) {
    PendingRequest pending{std::move(command->on_reply), std::move(command->work), command->operation, command->started,
                           requests_.load(std::memory_order_relaxed)};
    std::uint32_t id = protocol_.next_message_id();
    try {
      // After a wrap an old request may still hold the id.
      while (!shard_->requests().add(id_, id, command->deadline, std::move(pending))) id = protocol_.next_message_id();
    } catch (const std::bad_alloc&) {
      unreserve(command->packet_size(), high_priority(command->header));
      count_request(&RequestCounters::refused);
      shard_->later(std::move(pending.work), std::move(pending.handler), make_error_code(Errc::would_block), Reply{});
      return;
    }
    count_request(&RequestCounters::sent);
    command->header.message_id = id;
    if (command->tells_timeout) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(command->deadline - Clock::now());
      wire::write_told_timeout(left, command->extension_to_fill());
    }
    if (command->operation) command->operation->message_id = id;
  }
  count(command->packing, command->payload().size());
  const auto kind = command->kind == Kind::answer ? protocol::OutboundKind::answer : protocol::OutboundKind::push;
  enqueue(command->header, command->extension(), command->payload(), kind);
  if (command->on_sent) command->finish({}, *shard_);
}

void SessionState::take(const wire::Header& header, std::span<const std::byte> extension,
                        const protocol::SharedBytes& payload, Packing packing) noexcept {
  if (protocol_.accepts()) count(packing, payload->size());
  if (payload->size() < protocol::OutboundQueue::large_payload || !protocol_.accepts()) {
    return enqueue(header, extension, *payload, protocol::OutboundKind::push);
  }
  const std::size_t size = wire::header_size + extension.size() + payload->size();
  try {
    wire::Header mine = header;
    mine.message_id = protocol_.next_message_id();
    if (slow_consumer_.load(std::memory_order_relaxed) == SlowConsumer::drop_oldest && !high_priority(mine)) {
      make_room(size);
    }
    protocol_.outbound().append(mine, extension, payload, protocol::OutboundKind::push);
  } catch (const std::exception&) {
    unreserve(size, high_priority(header));
    note_dropped_at_close(1);
    protocol_.abort(Error(make_error_code(boost::system::errc::not_enough_memory), "out of memory for a packet"));
  }
  shard_->touch(*this);
}

void SessionState::cancel(const Operation& operation) noexcept {
  if (auto command = take_waiting([&](const auto& waiter) { return waiter.operation.get() == &operation; })) {
    command->finish(asio::error::operation_aborted, *shard_);
    return;
  }
  if (operation.message_id == 0) return;
  if (auto pending = shard_->requests().cancel(id_, operation.message_id)) {
    count_request(&RequestCounters::cancelled);
    shard_->later(std::move(pending->work), std::move(pending->handler), error_code(asio::error::operation_aborted),
                  Reply{});
    shard_->touch(*this);
  }
}

/// Takes room for one that may wait, whatever the policy for those that may not.
bool SessionState::reserve_waited(OutgoingCommand& command) noexcept {
  command.reserved =
      take_room(command.packet_size(), high_priority(command.header), outbound_limit_.get()) == Room::taken;
  return command.reserved;
}

/// Takes the first waiter that `f` accepts out of the line; null if there is none.
template <class F>
OutgoingCommandPtr SessionState::take_waiting(F&& f) noexcept {
  if (!waiting_) return nullptr;
  for (std::size_t lane = 0; lane < waiting_->lanes.size(); ++lane) {
    auto& line = waiting_->lanes[lane];
    const auto found = std::ranges::find_if(line, [&f](const auto& waiter) { return f(*waiter); });
    if (found == line.end()) continue;
    auto command = std::move(*found);
    line.erase(found);
    return command;
  }
  return nullptr;
}

/// High priority first, each lane in order and against its own budget.
void SessionState::admit_waiting() noexcept {
  if (!waiting_ || !protocol_.accepts()) return;
  publish_answers();  // those that were just written are no more in the way, and nobody may come back here
  for (const std::size_t lane : {std::size_t{1}, std::size_t{0}}) {
    auto& line = waiting_->lanes[lane];
    while (!line.empty() && reserve_waited(*line.front())) {
      auto command = std::move(line.front());
      line.pop_front();
      start(std::move(command));
    }
  }
  if (waiting_->empty()) waiting_.reset();
}

void SessionState::expire_waiting() noexcept {
  const TimePoint now = shard_->now();
  if (!waiting_ || waiting_->deadline > now) return;
  waiting_->deadline = TimePoint::max();
  for (auto& line : waiting_->lanes) {
    const auto next = take_late(line, now, [this](OutgoingCommandPtr& waiter) {
      waiter->finish(waiter->kind == OutgoingCommand::Kind::request ? Errc::request_timeout : Errc::send_timeout,
                     *shard_);
      waiter.reset();
    });
    waiting_->deadline = std::min(waiting_->deadline, next);
  }
}

/// The session takes no more: those who wait for room are told.
void SessionState::refuse_waiting() noexcept {
  while (auto command = take_waiting([](const auto&) { return true; })) command->finish(Errc::closed, *shard_);
  waiting_.reset();
}

std::size_t SessionState::write_some(std::span<iovec> pieces, std::size_t offered, bool& full) {
  if (link_.connection) {
    std::size_t taken = 0;
    const auto status = link_.connection->write(pieces, taken);
    full = taken < offered && (status == Connection::Status::blocked || taken == 0);
    counters_->bytes_out.add(taken);
    if (status == Connection::Status::failed) connection_failed();
    return taken;
  }
  if (!bare_) return 0;  // the connection has failed: nothing may go out without it
  ssize_t count = 0;
  do {
    if (pieces.size() == 1) {  // noticeably cheaper
      count = ::send(link_.socket.get(), pieces.front().iov_base, pieces.front().iov_len, MSG_NOSIGNAL);
    } else {
      msghdr message{};
      message.msg_iov = pieces.data();
      message.msg_iovlen = pieces.size();
      count = ::sendmsg(link_.socket.get(), &message, MSG_NOSIGNAL);
    }
  } while (count < 0 && errno == EINTR);
  full = count < 0 || static_cast<std::size_t>(count) < offered;
  if (count >= 0) {
    counters_->bytes_out.add(static_cast<std::uint64_t>(count));
    return static_cast<std::size_t>(count);
  }
  if (errno != EAGAIN && errno != EWOULDBLOCK) abort_by_system("write to");
  return 0;
}

void SessionState::flush_connection() {
  switch (link_.connection->flush()) {
    case Connection::Status::failed: connection_failed(); break;
    case Connection::Status::blocked:
      protocol_.write_blocked(shard_->now());
      write_waiting_ = true;
      unacknowledged_ = unacknowledged();
      break;
    default: protocol_.note_written(0, 0, shard_->now());
  }
}

bool SessionState::shut_down() {
  if (link_.connection) {
    const auto status = link_.connection->shut_down(protocol_.reason());
    if (status == Connection::Status::blocked) {
      protocol_.write_blocked(shard_->now());
      write_waiting_ = true;
      return false;
    }
    if (status == Connection::Status::failed) {
      protocol_.abort(link_.connection->error());
      return false;
    }
    if (link_.connection->awaits_peers_end()) return true;
  }
  if (link_.socket) ::shutdown(link_.socket.get(), SHUT_WR);
  return true;
}

/// Nothing can be said through it any more; but what it has told the peer of the reason should not be lost by a reset,
/// so the socket ends as any other.
void SessionState::connection_failed() {
  const Error error = link_.connection->error() ? link_.connection->error() : Error(Errc::connection_lost);
  const bool lost = error.code.category() == boost::system::system_category();
  awaits_peers_end_ = link_.socket && link_.connection->awaits_peers_end();
  link_.connection.reset();
  in_process_ = nullptr;
  write_waiting_ = false;
  if (lost || !protocol_.accepts()) return protocol_.abort(error);
  drop_outbound();
  protocol_.close(error, shard_->now());
}

void SessionState::drop_outbound() noexcept {
  if (protocol_.outbound_empty()) return;
  const auto left = protocol_.outbound().clear();
  release(left);
  note_dropped_at_close(left.packets);
}

void SessionState::abort_by_system(const char* what) {
  const error_code code(errno, boost::system::system_category());
  protocol_.abort(Error(code, std::string(what) + " " + peer_.to_string() + ": " + code.message()));
}

void SessionState::hand_over() {
  while (!protocol_.outbound_empty() && !protocol_.ended() && !write_waiting_) {
    std::size_t most = 0;
    bool exact = false;
    switch (in_process_->room(most, exact)) {
      case Connection::Status::done: break;
      case Connection::Status::failed: return connection_failed();
      default:
        protocol_.write_blocked(shard_->now());
        write_waiting_ = true;
        unacknowledged_ = unacknowledged();
        return;
    }
    std::size_t count = 0;
    const auto left = protocol_.hand_over(most, exact, shard_->now(), count,
                                          [this](protocol::OutboundBlock& block) { in_process_->write(block); });
    counters_->bytes_out.add(count);
    counters_->packets_out.add(left.packets);
    release(left);
  }
}

void SessionState::write_out() {
  if (in_process_ != nullptr) return hand_over();
  std::array<std::span<const std::byte>, 64> pieces;
  std::array<iovec, 64> vectors;
  while (!protocol_.outbound_empty() && !protocol_.ended() && !write_waiting_) {
    const std::size_t count = protocol_.outbound().gather(pieces);
    std::size_t offered = 0;
    for (std::size_t i = 0; i < count; ++i) {
      vectors[i] = iovec_of(pieces[i]);
      offered += pieces[i].size();
    }
    bool full = false;
    const std::size_t written = write_some(std::span(vectors).first(count), offered, full);
    if (protocol_.outbound_empty()) return;  // the connection failed
    if (written != 0) {
      const auto left = protocol_.written(written, shard_->now());
      counters_->packets_out.add(left.packets);
      release(left);
    }
    if (full && !protocol_.ended()) {
      // The socket's buffer is full: asking again at once would only cost a call.
      protocol_.write_blocked(shard_->now());
      write_waiting_ = true;
      unacknowledged_ = unacknowledged();
    }
  }
  if (link_.connection && link_.connection->wants_write() && !write_waiting_ && !protocol_.ended()) flush_connection();
}

void SessionState::release(const protocol::OutboundQueue::Written& left) noexcept {
  give_back(left.normal, false);
  give_back(left.priority, true);
}

/// After what left the queue was given back. \returns whether somebody was told.
bool SessionState::tell_writable() noexcept {
  if (slow_.load() && is_emptied()) {
    slow_.store(false);
    writable_due_ = true;
  }
  if (!writable_due_ || waiting_ || !is_open()) return false;
  writable_due_ = false;
  try {
    Session session{SessionPtr(this)};
    host_->writable(session);
  } catch (...) {
    handler_failed(std::current_exception());
  }
  return true;
}

/// Counts the answers that are queued in the budget, for those who send from elsewhere. Most answers are written before
/// anybody could have seen them, so this is done once a turn and not for each.
void SessionState::publish_answers() noexcept {
  const auto now = protocol_.outbound_empty() ? protocol::OutboundDepth{} : protocol_.outbound().answers();
  if (now == published_answers_) return;
  budget_.release(published_answers_);
  budget_.reserve(now);
  if (auto* const total = shard_->outbound_total()) {
    if (now.bytes >= published_answers_.bytes) {
      total->reserve(now.bytes - published_answers_.bytes);
    } else if (total->release(published_answers_.bytes - now.bytes)) {
      shard_->tell_room();
    }
  }
  published_answers_ = now;
}

void SessionState::note_dropped_at_close(std::size_t packets) noexcept {
  shard_->counters().dropped_at_close.add(packets);
  dropped_at_close_.add(packets);
}

void SessionState::publish_queued(protocol::OutboundDepth depth) noexcept {
  auto& counters = shard_->counters();
  counters.queued_bytes.add(depth.bytes - published_queue_.bytes);
  counters.queued_packets.add(depth.packets - published_queue_.packets);
  published_queue_ = depth;
  if (depth.bytes > most_queued_.load(std::memory_order_relaxed)) {
    most_queued_.store(depth.bytes, std::memory_order_relaxed);
  }
}

// --- on the shard: in

void SessionState::open() {
  link_.watch(shard_->poller(), *this, true, false);
  watching_read_ = true;
  opened_ = true;
  if (link_.connection) (void)link_.connection->keep_alive(shard_->now());  // from now on
  shard_->add(*this);
  if (admitted_) counters_->sessions_total.add(1);
  shard_->touch(*this);
}

void SessionState::await_admission(std::shared_ptr<PendingAdmission> pending) {
  admission_ = std::move(pending);
  admitted_ = false;
  if (!admission_->wants_first()) protocol_.await_admission();
}

void SessionState::end_admission() noexcept {
  admission_ = nullptr;
}

void SessionState::admit() noexcept {
  admitted_ = true;
  protocol_.admit(shard_->now());
  counters_->sessions_total.add(1);
  shard_->touch(*this);
}

void SessionState::turn_away(Error reason) noexcept {
  protocol_.close(std::move(reason), shard_->now());
  shard_->touch(*this);
}

void SessionState::refuse(const Error& reason) noexcept {
  finished_ = true;
  if (watching_read_) link_.end_watch(shard_->poller(), *this);
  release_actor();
  open_.store(false, std::memory_order_release);
  protocol_.abort(reason);
  refuse_waiting();
  fail_requests();
  drop_outbound();
  release_protocol();
  try {
    // In order, as far as that goes without waiting: else the peer would take it for a cut.
    if (link_.connection) (void)link_.connection->shut_down(reason);
  } catch (const std::exception&) {
    // It sees the end without a word.
  }
  link_ = {};
  host_ = nullptr;
}

bool SessionState::read_connection() {
  std::size_t count = 0;
  bool more = false;  // the signal does not tell of it again
  protocol::OutboundBlock block;
  std::span<const std::byte> bytes;
  Connection::Status status{};
  if (in_process_ != nullptr) {
    status = in_process_->read(block, more);
    input_drained_ = !more;
    bytes = block.bytes();
  } else {
    const auto buffer = Shard::read_buffer();
    status = link_.connection->read(buffer, count);
    input_drained_ = !link_.connection->has_input();
    bytes = buffer.first(count);
    more = link_.ready && status == Connection::Status::done;
  }
  // Not at once: others want their turn.
  if (more) link_.ready->tell(ReadyState::readable);
  switch (status) {
    case Connection::Status::done: receive(bytes); break;
    case Connection::Status::blocked: return false;
    case Connection::Status::ended: {
      Error reason = link_.connection->end_reason();
      receive_end(reason ? std::move(reason) : Error(Errc::closed_by_peer));
      break;
    }
    case Connection::Status::failed: connection_failed(); break;
  }
  shard_->resources().buffers.give(std::move(block.own));
  return true;
}

bool SessionState::read_once() {
  if (link_.connection) return read_connection();
  if (!link_.socket) return false;  // the connection has failed
  const auto buffer = Shard::read_buffer();
  const ssize_t result = ::recv(link_.socket.get(), buffer.data(), buffer.size(), 0);
  if (result < 0) {
    if (errno == EINTR) return true;
    if (errno == EAGAIN || errno == EWOULDBLOCK) {
      input_drained_ = true;
      return false;
    }
    abort_by_system("read from");
    return true;
  }
  if (result == 0) {
    input_drained_ = true;
    receive_end();
    return true;
  }
  const auto count = static_cast<std::size_t>(result);
  input_drained_ = count < buffer.size();
  receive(buffer.first(count));
  return true;
}

void SessionState::receive_end(Error reason) {
  if (const auto pending = admission_) pending->gone(reason);
  const auto finish_within = std::max(options_->close_timeout, options_->request_timeout);
  protocol_.receive_end(shard_->now(), finish_within, std::move(reason));
  draining_.store(true);
}

void SessionState::receive(std::span<const std::byte> bytes) {
  counters_->bytes_in.add(bytes.size());
  Session session{SessionPtr(this)};
  protocol_.receive(
      bytes, shard_->now(),
      [this, &session](const wire::Header& header, std::span<const std::byte> extension,
                       std::span<const std::byte> payload) { deliver(session, header, extension, payload); });
  turn_over_ = protocol_.stopped_at_limit();
}

void SessionState::on_ready(bool readable, bool writable, bool broken) {
  Shard::Scope scope(*shard_);
  if (writable) write_waiting_ = false;  // settling writes
  try {
    if (readable && wants_read()) {
      read_once();
    } else if (readable && link_.ready) {
      // It says so only once: it is asked again when the session reads.
      watching_read_ = false;
      link_.change_watch(shard_->poller(), *this, false, watching_write_);
    } else if (broken && !awaits_turn()) {
      int code = 0;
      socklen_t size = sizeof code;
      ::getsockopt(link_.socket.get(), SOL_SOCKET, SO_ERROR, &code, &size);
      errno = code != 0 ? code : ECONNRESET;
      abort_by_system("lost");
    }
  } catch (const std::exception& failure) {
    protocol_.abort(Error(make_error_code(boost::system::errc::not_enough_memory), failure.what()));
  }
  shard_->touch(*this);
}

void SessionState::deliver(Session& session, const wire::Header& header, std::span<const std::byte> extension,
                           std::span<const std::byte> payload) {
  counters_->packets_in.add(1);
  if (intercept_in_) [[unlikely]]
    return deliver_intercepted(session, header, extension, payload);
  deliver_past(session, header, extension, payload);
}

[[gnu::noinline]] void SessionState::deliver_intercepted(Session& session, const wire::Header& header,
                                                         std::span<const std::byte> extension,
                                                         std::span<const std::byte> payload) noexcept {
  InterceptedMessage message(header, extension, payload, &session);
  if (header.type == wire::PacketType::request) message.answers_ = this;
  if (!intercept_in_->pass(message)) return;
  deliver_past(session, message.header_, message.extension_, message.payload_);
}

[[gnu::always_inline]] inline void SessionState::deliver_past(Session& session, const wire::Header& header,
                                                              std::span<const std::byte> extension,
                                                              std::span<const std::byte> payload) noexcept {
  auto& counters = shard_->counters();
  try {
    if (header.type == wire::PacketType::response) {
      if (auto pending = shard_->requests().take(id_, header.message_id)) {
        count_request(&RequestCounters::answered);
        // It may have been made in this very turn, whose time is that of its beginning.
        counters.request_latency.record(std::max(shard_->now() - pending->started, TimePoint::duration::zero()));
        complete(pending->work, std::move(pending->handler), error_code(), Reply(header, extension, payload));
      } else {
        counters.unmatched_responses.add(1);
      }
      return;
    }
    Message message(header, extension, payload, this);
    message.answerable_ = message.is_request();
    if (message.answerable_) counters.requests_received.add(1);
    if (admission_) [[unlikely]] {
      protocol_.await_admission();
      admission_->first(message.retain());
      return bound_requests();
    }
    if (actor_) {
      deliver_to_actor(message);
      return bound_requests();
    }
    if (!host_->handles_messages()) {
      counters.unhandled.add(1);
      return;
    }
    struct Delivery {
      explicit Delivery(bool& flag) noexcept : delivering(flag) { delivering = true; }
      ~Delivery() { delivering = false; }
      bool& delivering;
    } delivery(delivering_);
    host_->message(session, message);
    bound_requests();
  } catch (...) {
    handler_failed(std::current_exception());
  }
}

void SessionState::set_actor(std::shared_ptr<ActorCore<OwnedMessage>> actor) {
  actor->on_idle = [self = SessionPtr(this)] {
    if (self->draining_.load(std::memory_order_relaxed)) self->shard_->touch(*self);
  };
  actor->on_end = [self = SessionPtr(this)](const Error& failure) {
    if (self->is_open()) self->close(failure ? failure : Error(Errc::closed_by_user, "its coroutine has ended"));
  };
  actor_ = std::move(actor);
}

void SessionState::release_protocol() noexcept {
  protocol_.release();
  shard_->counters().dropped_inbound.add(protocol_.dropped_inbound());
}

void SessionState::release_actor() noexcept {
  if (!actor_) return;
  actor_->stop();
  actor_.reset();
}

void SessionState::deliver_to_actor(const Message& message) {
  auto owned = message.retain();
  const bool urgent = message.high_priority();
  const auto status = actor_->mailbox->put(std::move(owned), urgent);
  if (status != ChannelStatus::full) {
    actor_->manager->count(status);  // closed: it has ended, and so will the session
    return;
  }
  // It waits for room in line with others that tell the actor something; meanwhile nothing more is read.
  protocol_.hold(true);
  ActorHandle<OwnedMessage>(actor_).async_tell(
      std::move(owned), urgent ? Urgency::urgent : Urgency::normal,
      asio::bind_executor(actor_->executor, [self = SessionPtr(this)](error_code, const std::optional<OwnedMessage>&) {
        self->protocol_.hold(false);
        self->shard_->touch(*self);
      }));
}

void SessionState::handler_failed(const std::exception_ptr& exception) noexcept {
  Error error(Errc::handler_failed, text_of(exception));
  shard_->counters().handler_failures.add(1);
  host_->failed({id_, error, exception});
  protocol_.close(std::move(error), shard_->now());
}

// --- on the shard: life

int SessionState::unacknowledged() const noexcept {
  if (!link_.socket) {
    constexpr std::size_t most = std::numeric_limits<int>::max();
    return link_.connection ? static_cast<int>(std::min(link_.connection->unacknowledged(), most)) : 0;
  }
  int bytes = 0;
  return ::ioctl(link_.socket.get(), SIOCOUTQ, &bytes) == 0 ? bytes : 0;
}

bool SessionState::nothing_owed() noexcept {
  return protocol_.outbound_empty() && answers_owed_.load() == 0 && !waiting_ && !protocol_.held() &&
         (!actor_ || actor_->is_idle()) &&
         (protocol_.peer_ended() || (shard_->requests().pending(id_) == 0 && !protocol_.has_partial()));
}

TimePoint SessionState::quiet_until() const noexcept {
  return drain_rule_ && !protocol_.peer_ended() ? protocol_.idle_since() + drain_rule_->quiet : TimePoint::min();
}

/// Whether everything that was accepted before nothing was owed any more has come in. An answer given on another thread
/// is in the inbox before it stops being owed, and may still be there.
bool SessionState::flushed() {
  if (shard_->caught_up() || flushed_) return true;
  if (!flush_asked_) {
    flush_asked_ = true;
    shard_->post([self = SessionPtr(this), turn = flush_turn_] {
      if (turn == self->flush_turn_) self->flushed_ = true;
      self->shard_->touch(*self);
    });
  }
  return false;
}

void SessionState::settle() noexcept {
  if (finished_ || !opened_) return;
  const SessionPtr keep(this);
  try {
    constexpr int most_probes = 4;  // a flooding peer must not keep the others waiting
    int probes = 0;
    int reads = 0;
    bool told_writable = false;
    for (;;) {
      write_out();
      admit_waiting();
      if (protocol_.held_for_answers() && !waits_for_answers_.load()) protocol_.hold_for_answers(false);
      if (slow_.load() || writable_due_) {
        publish_answers();  // those that were just written are no more in the way
        if (!told_writable) {
          told_writable = tell_writable();
        } else if (is_emptied()) {
          shard_->touch_later(*this);  // who sends again each time must not keep the others waiting
        }
      }
      if (!write_waiting_ && !protocol_.outbound_empty() && !protocol_.ended()) continue;
      // It may hold what the socket does not show.
      if (link_.connection && link_.connection->has_input() && wants_read() && !protocol_.ended()) {
        if (reads == most_probes) {
          shard_->touch_later(*this);
        } else if (++reads; read_once()) {
          continue;
        }
      }
      if (awaits_turn()) {
        shard_->touch_next_turn(*this);
        break;
      }
      if (protocol_.resumable()) {
        Session session(keep);
        protocol_.resume(
            shard_->now(),
            [this, &session](const wire::Header& header, std::span<const std::byte> extension,
                             std::span<const std::byte> payload) { deliver(session, header, extension, payload); });
        turn_over_ = protocol_.stopped_at_limit();
        continue;
      }
      awaits_quiet_ = false;
      const bool draining = protocol_.phase() == protocol::SessionProtocol::Phase::draining;
      if (draining && !nothing_owed()) {
        ++flush_turn_;
        flush_asked_ = flushed_ = false;
      } else if (draining && flushed()) {
        if (quiet_until() > shard_->now()) {
          awaits_quiet_ = true;
          break;
        }
        // What the peer had sent before it can know of the end is still answered.
        if (!protocol_.peer_ended() && read_once()) {
          if (++probes < most_probes) continue;
          break;  // the poller comes again
        }
        protocol_.close(drain_rule_ ? drain_rule_->reason : Error(Errc::stopping), shard_->now());
      }
      break;
    }
    if (!protocol_.accepts() || protocol_.peer_ended()) stop_accepting();
    if (protocol_.shutdown_due() && shut_down()) protocol_.shut_down(shard_->now());
    // Data that arrives after our end is gone makes the system answer with a reset, which may overtake what we wrote:
    // only when the peer has all of it is it safe to go at once. Our own end counts as one byte.
    if (protocol_.phase() == protocol::SessionProtocol::Phase::lingering && input_drained_ &&
        !(link_.connection ? link_.connection->awaits_peers_end() : awaits_peers_end_) && unacknowledged() <= 1) {
      protocol_.delivered();
    }
    if (protocol_.ended()) return finish();
    publish_answers();
    if (!protocol_.outbound_empty()) {
      const auto normal = budget_.depth();
      const auto priority = priority_budget_.depth();
      publish_queued({normal.bytes + priority.bytes, normal.packets + priority.packets});
    } else if (published_queue_.packets != 0) {
      publish_queued({});
    }
    arm();
  } catch (const std::exception& failure) {
    protocol_.abort(Error(make_error_code(boost::system::errc::not_enough_memory), failure.what()));
    stop_accepting();
    finish();
  }
}

/// Once: nothing can be sent any more, and whoever waits for this session is told.
void SessionState::stop_accepting() noexcept {
  if (accepting_stopped_) return;
  const bool for_good = !protocol_.accepts();
  if (for_good) {
    accepting_stopped_ = true;
    open_.store(false, std::memory_order_release);
    refuse_waiting();
  }
  // No answer can come after the peer's end either, though it may still be written to.
  fail_requests();
}

void SessionState::fail_requests() noexcept {
  shard_->requests().fail_all(id_, [this](SessionId, std::uint32_t, PendingRequest&& pending) {
    count_request(&RequestCounters::connection_lost);
    shard_->later(std::move(pending.work), std::move(pending.handler), make_error_code(Errc::connection_lost), Reply{});
  });
}

void SessionState::arm() {
  const bool read = wants_read();
  const bool lingers = protocol_.phase() == protocol::SessionProtocol::Phase::lingering;
  const bool write = write_waiting_ || (lingers && link_.ready);  // which tells when all has arrived
  if (read != watching_read_ || write != watching_write_) {
    watching_read_ = read;
    watching_write_ = write;
    link_.change_watch(shard_->poller(), *this, read, write);
  }
  TimePoint next = protocol_.deadline();
  if (lingers) {
    next = std::min(next, shard_->now() + std::chrono::milliseconds(10));  // asks again whether all has arrived
  }
  if (waiting_) next = std::min(next, waiting_->deadline);
  if (awaits_quiet_) next = std::min(next, quiet_until());
  if (link_.connection && read && protocol_.accepts()) next = std::min(next, link_.connection->keep_alive_due());
  if (next != TimePoint::max() && (!timer_.armed() || next < timer_.deadline())) shard_->timers().arm(timer_, next);
}

void SessionState::expired() {
  if (write_waiting_) {
    // The socket says "writable" only when a third of its buffer is free; a peer that takes less is slow, not stalled.
    const int now = unacknowledged();
    if (now < unacknowledged_) protocol_.write_progress(shard_->now());
    unacknowledged_ = now;
  }
  protocol_.expire(shard_->now());
  try {
    protocol_.send_heartbeat(shard_->now());
  } catch (const std::bad_alloc&) {
    protocol_.abort(make_error_code(boost::system::errc::not_enough_memory));
  }
  expire_waiting();
  keep_alive();
  shard_->touch(*this);
}

void SessionState::keep_alive() noexcept {
  if (!link_.connection || !protocol_.accepts() || link_.connection->keep_alive_due() > shard_->now()) return;
  try {
    if (protocol_.wants_read() && link_.connection->keep_alive(shard_->now()) == Connection::Status::failed) {
      connection_failed();
    }
  } catch (const std::exception&) {
    protocol_.abort(make_error_code(boost::system::errc::not_enough_memory));
  }
}

void SessionState::begin_drain(std::shared_ptr<const DrainRule> rule) {
  if (finished_) return;
  if (const auto pending = admission_) return pending->gone(Error(Errc::stopping));
  if (rule && rule->by == TimePoint::min()) return abort(Errc::drain_expired);
  draining_.store(true);
  drain_rule_ = std::move(rule);
  protocol_.begin_drain(drain_rule_ ? drain_rule_->by : TimePoint::max());
  shard_->touch(*this);
}

void SessionState::drain(const DrainOptions& options) {
  const auto rule = std::make_shared<const DrainRule>(rule_for(options));
  shard_->post([self = SessionPtr(this), rule] { self->begin_drain(rule); });
}

void SessionState::abort(Error reason) {
  protocol_.abort(std::move(reason));
  shard_->touch(*this);
}

void SessionState::sweep(std::chrono::milliseconds idle_for) {
  if (!protocol_.accepts() || protocol_.idle_since() + idle_for > shard_->now()) return;
  shard_->counters().sessions_swept.add(1);
  protocol_.close(Error(Errc::idle_timeout, "swept"), shard_->now());
  shard_->touch(*this);
}

void SessionState::finish() noexcept {
  finished_ = true;
  stop_accepting();
  drop_outbound();
  publish_answers();
  publish_queued({});
  release_actor();
  release_protocol();
  shard_->timers().disarm(timer_);
  link_.end_watch(shard_->poller(), *this);
  link_ = {};
  if (admitted_) {
    counters_->sessions_ended.add(1);
    shard_->counters().ends.add(protocol_.reason().code);
  }
  if (admitted_ && is_protocol_error(protocol_.reason().code)) {
    shard_->counters().protocol_errors.add(1);
    host_->failed({id_, protocol_.reason(), nullptr});
    if (auto* const control = shard_->control(); control != nullptr && control->has_subscribers()) {
      try {
        control->send_about(
            *this, ControlCommand::Announce{{EventKind::protocol_error, id_, peer_.to_string(), protocol_.reason()}});
      } catch (const std::bad_alloc&) {
        // News may be lost; the session's end tells the reason too.
      }
    }
  }
  const auto host = std::move(host_);
  host->ended(*this, protocol_.reason());
  shard_->remove(*this);
}

}  // namespace msgtrans::detail
