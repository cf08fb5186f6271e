// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "interceptors.hpp"
#include "link.hpp"
#include "packed_payload.hpp"
#include "peer.hpp"
#include "poller.hpp"
#include "shard.hpp"

#include <algorithm>
#include <any>
#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <msgtrans/protocol/outbound_budget.hpp>
#include <msgtrans/protocol/session_protocol.hpp>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/wire/told_timeout.hpp>
#include <span>
#include <string>
#include <sys/uio.h>
#include <vector>

namespace msgtrans::detail {

template <class M>
class ActorCore;
class InProcessConnection;
class PendingAdmission;

/// The header of what a caller sends; its message id and lengths are not set.
[[nodiscard]] wire::Header header_for(wire::PacketType type, const SendOptions& options) noexcept;

/// What a facade is to its sessions. Called on shards; nothing may escape from the noexcept ones.
class SessionHost {
 public:
  virtual ~SessionHost() = default;
  /// The application's handler; may throw.
  virtual void message(Session& session, const Message& message) = 0;
  [[nodiscard]] virtual bool handles_messages() const noexcept = 0;
  /// There is room again in a queue that was found full; may throw.
  virtual void writable(Session& session) = 0;
  /// The session has ended and is no longer known; called once for each that was opened.
  virtual void ended(SessionState& session, const Error& reason) noexcept = 0;
  virtual void failed(const ErrorEvent& event) noexcept = 0;
  /// Null if there are none; asked once by each session.
  [[nodiscard]] virtual std::shared_ptr<const Interceptors> inbound_interceptors() const noexcept { return nullptr; }
  [[nodiscard]] virtual std::shared_ptr<const Interceptors> outbound_interceptors() const noexcept { return nullptr; }
};

/// A message on its way into a session's queue from outside its shard, or one that waits for room, or a request.
class OutgoingCommand final : public Command {
 public:
  enum class Kind : std::uint8_t { one_way, answer, request };

  /// With the bytes behind the object, in one allocation.
  static OutgoingCommandPtr make(SessionPtr session, Kind kind, const wire::Header& header, BytesView extension,
                                 BytesView payload, Packing packing = {});
  ~OutgoingCommand() override;
  void run(std::unique_ptr<Command> self) noexcept override;

  void operator delete(void* memory) noexcept { ::operator delete(memory); }

  [[nodiscard]] std::span<const std::byte> extension() const noexcept { return {bytes(), extension_size_}; }
  [[nodiscard]] std::span<const std::byte> payload() const noexcept {
    return {bytes() + extension_size_, payload_size_};
  }
  [[nodiscard]] std::span<std::byte, wire::told_timeout_size> extension_to_fill() noexcept {
    return std::span<std::byte, wire::told_timeout_size>(reinterpret_cast<std::byte*>(this + 1),
                                                         wire::told_timeout_size);
  }

  SessionPtr session;           // null: to nobody; the handler gets `refusal` ...
  std::shared_ptr<Shard> home;  // ... on this shard
  Kind kind;
  bool reserved = false;       // has room in the budget already
  bool in_line = false;        // counted among those of the normal lane that wait for room
  bool tells_timeout = false;  // its extension header begins with one
  bool counted = false;        // among the answers that are under way
  wire::Header header;
  Packing packing;
  error_code refusal;  // found at the start; told through the handler
  std::chrono::milliseconds timeout{0};
  SendHandler on_sent;
  ReplyHandler on_reply;
  asio::any_completion_executor work;
  OperationPtr operation;
  TimePoint started{};  // of a request: when its shard got it
  TimePoint deadline = TimePoint::max();

  [[nodiscard]] std::size_t packet_size() const noexcept { return wire::header_size + extension_size_ + payload_size_; }
  [[nodiscard]] bool waits() const noexcept { return on_sent || on_reply; }
  /// Tells the waiting handler, if any. On the shard.
  void finish(error_code code, Shard& shard) noexcept;

 private:
  OutgoingCommand(SessionPtr to, Kind what, const wire::Header& head, std::size_t extension_size,
                  std::size_t payload_size) noexcept
      : session(std::move(to)),
        kind(what),
        header(head),
        extension_size_(extension_size),
        payload_size_(payload_size) {}

  [[nodiscard]] const std::byte* bytes() const noexcept { return reinterpret_cast<const std::byte*>(this + 1); }

  std::size_t extension_size_;
  std::size_t payload_size_;
};

/// Shows `late` those of a line whose time is over, which takes them out by moving from them. The others stay in order.
/// One pass, however many there are: thousands may wait, and expire one after the other.
/// \returns the earliest deadline of those that are left.
template <class Late>
TimePoint take_late(std::deque<OutgoingCommandPtr>& line, TimePoint now, Late late) {
  TimePoint next = TimePoint::max();
  auto stays = line.begin();
  for (auto& waiter : line) {
    if (waiter->deadline <= now) late(waiter);
    if (!waiter) continue;
    next = std::min(next, waiter->deadline);
    if (&*stays != &waiter) *stays = std::move(waiter);
    ++stays;
  }
  line.erase(stays, line.end());
  return next;
}

/// The extension header of a request: place for what is told of its timeout, if that is wanted, and the caller's.
class RequestExtension {
 public:
  RequestExtension(const RequestOptions& options, std::chrono::milliseconds timeout);
  [[nodiscard]] BytesView bytes() const noexcept {
    return tells_timeout_ ? BytesView(with_timeout_) : BytesView(plain_);
  }
  /// Whether it still begins with that: an interceptor may have replaced it.
  [[nodiscard]] bool tells_timeout_in(const OutgoingCommand& command) const noexcept {
    return tells_timeout_ && wire::read_told_timeout(command.extension()).has_value();
  }

 private:
  std::span<const std::byte> plain_;
  std::vector<std::byte> with_timeout_;
  bool tells_timeout_;
};
/// How a drain goes; shared by the sessions that it is of.
struct DrainRule {
  TimePoint by = TimePoint::max();  // then they are cut; TimePoint::min(): at once
  std::chrono::milliseconds quiet{0};
  Error reason = Errc::stopping;
};
/// From now on. Of valid options.
[[nodiscard]] DrainRule rule_for(const DrainOptions& options);

/// The order of the commands to the control loop about one session: they are made on any thread.
class ControlOrder {
 public:
  /// The number of the next; none if the last has been made.
  [[nodiscard]] std::optional<std::uint32_t> next(bool last) noexcept {
    // Relaxed: the channel orders what the numbers stand for, and the loop puts them in order again.
    auto word = made_.load(std::memory_order_relaxed);
    do {
      if ((word & ended) != 0) return std::nullopt;
    } while (!made_.compare_exchange_weak(word, (word + one) | (last ? ended : 0), std::memory_order_relaxed));
    return word / one;
  }

  std::uint32_t handled = 0;  // the control loop's

 private:
  static constexpr std::uint32_t ended = 1;
  static constexpr std::uint32_t one = 2;
  std::atomic<std::uint32_t> made_{0};  // how many, twice, and whether that is all
};

/// One session: what its handles refer to. It owns the link and does what its `SessionProtocol` says.
///
/// Members are for the shard unless marked. A session is kept alive by its shard's list from `open` to `finish`, by
/// the operations that are under way, and by the users' handles.
class SessionState final : public ShardMember, private Poller::Watcher {
 public:
  SessionState(SessionId id, std::shared_ptr<Shard> shard, std::shared_ptr<SessionHost> host,
               std::shared_ptr<const SessionOptions> options, Link link, Peer peer);
  ~SessionState();

  // --- any thread

  [[nodiscard]] SessionId id() const noexcept { return id_; }
  [[nodiscard]] Shard& shard() const noexcept { return *shard_; }
  [[nodiscard]] bool is_open() const noexcept { return open_.load(std::memory_order_acquire); }
  [[nodiscard]] const Peer& peer() const noexcept { return peer_; }
  /// Null unless it is encrypted.
  [[nodiscard]] const TlsPeer* tls() const noexcept { return tls_.get(); }
  [[nodiscard]] SessionStats stats() const noexcept;
  [[nodiscard]] const SessionOptions& options() const noexcept { return *options_; }

  [[nodiscard]] OutboundLimits outbound_limits() const noexcept;
  void set_outbound_limits(const OutboundLimits& limits);

  SendResult send(BytesView payload, const SendOptions& options) noexcept;
  using Override = std::optional<CompressionOptions>;
  SendResult respond(const Message& request, BytesView payload, BytesView extension,
                     const Override& compression) noexcept;
  SendResult respond(const wire::Header& request, BytesView payload, BytesView extension,
                     const Override& compression) noexcept;
  /// A retained message took over to answer a request of the peer, which keeps a draining session waiting ...
  void owe_answer() noexcept { answers_owed_.fetch_add(1); }
  /// ... answers it (once) ...
  SendResult respond_retained(const wire::Header& request, BytesView payload, BytesView extension,
                              const Override& compression) noexcept;
  /// ... or never will.
  void give_up_answer() noexcept;
  void close(Error reason) noexcept;
  /// `options` are valid.
  void drain(const DrainOptions& options);
  /// Whether a message of that size, on the wire, may be sent at all.
  [[nodiscard]] SendResult check(std::size_t payload, std::size_t extension) const noexcept;
  /// Takes room for a packet as the session's policy says. `would_block` or `closed` if there is none.
  SendResult reserve(std::size_t size, bool high_priority) noexcept;
  /// Posts an answer. On the session's shard it counts at once, lest a handler be handed more than its answers may be.
  SendResult post_answer(OutgoingCommandPtr command) noexcept;
  /// Room for one that may wait, or a place in the line: at once, so that what is sent after it stays behind it.
  void claim(OutgoingCommand& command) noexcept;
  void leave_line(OutgoingCommand& command) noexcept;
  /// Gives back what `reserve` took.
  void unreserve(std::size_t size, bool high_priority) noexcept;
  [[nodiscard]] const Interceptors* outbound_interceptors() const noexcept { return intercept_out_.get(); }
  [[nodiscard]] ControlOrder& control() noexcept { return control_order_; }

  // --- on the shard

  /// Before `open`: where its connection is counted, instead of with those of the shard. They must be there until its
  /// host has been told of the end.
  void count_in(ConnectionCounters& counters) noexcept { counters_ = &counters; }
  [[nodiscard]] ConnectionCounters& connection_counters() const noexcept { return *counters_; }
  /// One of its requests: made, or its outcome.
  void count_request(protocol::Counter RequestCounters::*what) noexcept;
  /// Before `open`: its messages go to this actor instead of to the host.
  void set_actor(std::shared_ptr<ActorCore<OwnedMessage>> actor);
  /// Begins to serve the connection.
  void open();
  /// Before `open`: hands out nothing but the first message, and that to `pending` if it wants it, until `admit`.
  void await_admission(std::shared_ptr<PendingAdmission> pending);
  void end_admission() noexcept;
  [[nodiscard]] const std::shared_ptr<PendingAdmission>& admission() const noexcept { return admission_; }
  [[nodiscard]] bool admitted() const noexcept { return admitted_; }
  void admit() noexcept;
  /// Instead of `admit`: ends it when what was sent is written.
  void turn_away(Error reason) noexcept;
  /// Instead of `open`: ends the connection that was not admitted.
  void refuse(const Error& reason = Errc::refused) noexcept;
  void settle() noexcept;
  /// Null: until nothing is owed, however long that takes. Again: the latest rule holds, and the earliest end.
  void begin_drain(std::shared_ptr<const DrainRule> rule = nullptr);
  void abort(Error reason);
  /// Ends it if it had no packet either way for that long.
  void sweep(std::chrono::milliseconds idle_for);
  /// Does what the command says, or lets it wait for room.
  void take(OutgoingCommandPtr command) noexcept;
  /// One of a broadcast; room is reserved.
  void take(const wire::Header& header, std::span<const std::byte> extension, const protocol::SharedBytes& payload,
            Packing packing) noexcept;
  void cancel(const Operation& operation) noexcept;
  [[nodiscard]] protocol::SessionProtocol& protocol() noexcept { return protocol_; }
  [[nodiscard]] std::any& user_data() noexcept { return user_data_; }
  [[nodiscard]] std::size_t answers_owed() const noexcept { return answers_owed_.load(); }
  [[nodiscard]] bool finished() const noexcept { return finished_; }
  /// Somebody waits for room in its queue, or for being told of it.
  [[nodiscard]] bool wants_room() const noexcept { return waiting_ || slow_.load(); }

  static OwnedMessage own(const wire::Header& header, std::span<const std::byte> extension,
                          std::span<const std::byte> payload) {
    return OwnedMessage(header, extension, payload);
  }

  bool touched = false;    // in the shard's list of sessions to settle
  bool next_turn = false;  // in that of those to settle when others had their turn
  void begin_turn() noexcept { turn_over_ = false; }

 private:
  friend void intrusive_ptr_add_ref(const SessionState* state) noexcept;
  friend void intrusive_ptr_release(const SessionState* state) noexcept;

  /// Who waits for room in the queue, each lane in order.
  struct Waiting {
    std::array<std::deque<OutgoingCommandPtr>, 2> lanes;  // normal, high priority
    TimePoint deadline = TimePoint::max();                // nobody's is earlier

    [[nodiscard]] bool empty() const noexcept { return lanes[0].empty() && lanes[1].empty(); }
  };

  struct Timer final : ShardTimer {
    explicit Timer(SessionState& owner) noexcept : session(owner) {}
    void expired() override { session.expired(); }
    SessionState& session;
  };

  /// On the shard, with room reserved.
  void enqueue(wire::Header header, std::span<const std::byte> extension, std::span<const std::byte> payload,
               protocol::OutboundKind kind) noexcept;
  bool write_through(const wire::Header& header, std::span<const std::byte> extension,
                     std::span<const std::byte> payload, protocol::OutboundKind kind);
  SendResult send_past(BytesView payload, const SendOptions& options) noexcept;
  SendResult send_intercepted(BytesView payload, const SendOptions& options) noexcept;
  SendResult respond_past(const wire::Header& request, BytesView payload, BytesView extension,
                          const Override& compression) noexcept;
  SendResult respond_intercepted(const wire::Header& request, BytesView payload, BytesView extension,
                                 const Override& compression) noexcept;
  SendResult pack_and_send(BytesView payload, const SendOptions& options) noexcept;
  SendResult pack_and_respond(const wire::Header& request, BytesView payload, BytesView extension,
                              const Override& compression) noexcept;
  SendResult send_packed(BytesView payload, Packing packing, const SendOptions& options) noexcept;
  SendResult respond_packed(const wire::Header& request, BytesView payload, Packing packing,
                            BytesView extension) noexcept;
  void count(Packing packing, std::size_t size) noexcept {
    if (packing.tried != 0) note_packed(packing, size);
  }
  void note_packed(Packing packing, std::size_t size) noexcept;
  SendResult refuse_unpacked(std::size_t payload, const SendOptions& options) noexcept;
  void make_room(std::size_t size) noexcept;
  void start(OutgoingCommandPtr command) noexcept;
  void admit_waiting() noexcept;
  [[nodiscard]] bool reserve_waited(OutgoingCommand& command) noexcept;
  template <class F>
  OutgoingCommandPtr take_waiting(F&& f) noexcept;
  void expire_waiting() noexcept;
  void refuse_waiting() noexcept;

  void expired();
  /// More is there for it, but others have their turn before.
  [[nodiscard]] bool awaits_turn() noexcept { return turn_over_ && protocol_.resumable(); }
  [[nodiscard]] bool wants_read() noexcept { return protocol_.wants_read() && !awaits_turn(); }
  void keep_alive() noexcept;
  /// \returns false if there was nothing to read.
  bool read_once();
  bool read_connection();
  void receive(std::span<const std::byte> bytes);
  void receive_end(Error reason = Errc::closed_by_peer);
  void on_ready(bool readable, bool writable, bool broken) override;
  void deliver(Session& session, const wire::Header& header, std::span<const std::byte> extension,
               std::span<const std::byte> payload);
  void deliver_intercepted(Session& session, const wire::Header& header, std::span<const std::byte> extension,
                           std::span<const std::byte> payload) noexcept;
  void deliver_past(Session& session, const wire::Header& header, std::span<const std::byte> extension,
                    std::span<const std::byte> payload) noexcept;
  void deliver_to_actor(const Message& message);
  void release_actor() noexcept;
  void release_protocol() noexcept;
  void write_out();
  /// The same without copying.
  void hand_over();
  /// With errno as the reason.
  void abort_by_system(const char* what);
  /// \returns how many bytes the link took, 0 if none now or if it failed: then the session is aborted. `full`: it
  /// takes no more until the poller says so.
  std::size_t write_some(std::span<iovec> pieces, std::size_t offered, bool& full);
  /// Writes what the connection has taken, and what it says itself.
  void flush_connection();
  void connection_failed();
  /// \returns false if the peer cannot be told yet.
  [[nodiscard]] bool shut_down();
  void release(const protocol::OutboundQueue::Written& left) noexcept;
  /// Packets that were accepted are lost.
  void note_dropped_at_close(std::size_t packets) noexcept;
  /// Tells the statistics what is queued now.
  void publish_queued(protocol::OutboundDepth depth) noexcept;
  /// What is queued is lost, and counted.
  void drop_outbound() noexcept;
  enum class Room : std::uint8_t { taken, session_full, server_full };
  [[nodiscard]] Room take_room(std::size_t size, bool high_priority, protocol::OutboundDepth limit) noexcept;
  /// To the budget, and to the server's.
  void give_back(protocol::OutboundDepth depth, bool high_priority) noexcept;
  void found_full() noexcept;
  [[nodiscard]] bool is_emptied() const noexcept;
  bool tell_writable() noexcept;
  void bound_requests() noexcept;
  void touch_from_anywhere() noexcept;
  [[nodiscard]] std::string describe_full() const;
  void publish_answers() noexcept;
  [[nodiscard]] bool nothing_owed() noexcept;
  [[nodiscard]] bool flushed();
  /// Until when a draining session that owes nothing is left to its peer.
  [[nodiscard]] TimePoint quiet_until() const noexcept;
  /// Bytes the system still holds for the peer.
  [[nodiscard]] int unacknowledged() const noexcept;
  void stop_accepting() noexcept;
  void fail_requests() noexcept;
  void arm();
  void finish() noexcept;
  void handler_failed(const std::exception_ptr& exception) noexcept;

  mutable std::atomic<std::uint32_t> references_{0};
  std::atomic<std::uint32_t> normal_waiting_{0};  // in line, for send(): those who wait go first
  std::atomic<std::uint32_t> answers_owed_{0};    // requests retained, and neither answered nor given up
  std::atomic<bool> open_{true};
  std::atomic<bool> slow_{false};               // its queue was found full, and has not been below its low mark since
  std::atomic<bool> waits_for_answers_{false};  // to too many of the peer's requests
  std::atomic<SlowConsumer> slow_consumer_;
  ControlOrder control_order_;
  std::atomic<bool> draining_{false};
  bool write_waiting_ = false;  // until the poller says that the socket takes bytes again
  bool watching_read_ = false;  // what the poller was told
  bool watching_write_ = false;
  bool input_drained_ = true;  // the last read took all there was
  bool accepting_stopped_ = false;
  bool finished_ = false;
  bool awaits_peers_end_ = false;  // of a connection that has failed
  bool delivering_ = false;
  bool opened_ = false;
  bool admitted_ = true;
  bool flush_asked_ = false;  // since nothing is owed
  bool flushed_ = false;
  bool turn_over_ = false;        // it was handed as many packets as others should wait for
  bool writable_due_ = false;     // on_writable is to be called
  bool awaits_quiet_ = false;     // drained, and nothing is owed
  std::uint32_t flush_turn_ = 0;  // of what was asked; an earlier turn's answer is void

  int unacknowledged_ = 0;  // when last looked at, while write_waiting_
  SessionId id_;
  std::shared_ptr<Shard> shard_;
  std::shared_ptr<SessionHost> host_;
  std::shared_ptr<const SessionOptions> options_;
  const Peer peer_;
  Link link_;                        // the connection also null once it has failed
  InProcessConnection* in_process_;  // if it is that one
  const bool bare_;                  // there never was a connection
  const std::unique_ptr<const TlsPeer> tls_;
  protocol::OutboundLimit outbound_limit_;
  protocol::OutboundBudget budget_;  // of the normal lane, and of published_answers_
  protocol::OutboundDepth published_answers_;
  protocol::OutboundBudget priority_budget_;
  protocol::Counter compressed_packets_, compressed_bytes_before_, compressed_bytes_after_, incompressible_packets_;
  protocol::Counter dropped_oldest_, dropped_at_close_;
  ConnectionCounters* counters_;
  std::atomic<RequestCounters*> requests_{nullptr};  // from the first request on; owned
  protocol::OutboundDepth published_queue_;          // what the shard's statistics have of it
  std::atomic<std::size_t> most_queued_{0};          // bytes
  protocol::SessionProtocol protocol_;
  std::shared_ptr<const DrainRule> drain_rule_;  // null: closed as soon as nothing is owed
  std::unique_ptr<Waiting> waiting_;             // null if nobody waits
  std::shared_ptr<PendingAdmission> admission_;
  const std::shared_ptr<const Interceptors> intercept_in_;   // null: none
  const std::shared_ptr<const Interceptors> intercept_out_;  // the same
  std::shared_ptr<ActorCore<OwnedMessage>> actor_;
  Timer timer_;
  std::any user_data_;
};

}  // namespace msgtrans::detail
