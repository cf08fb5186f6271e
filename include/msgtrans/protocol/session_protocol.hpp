// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/protocol/counter.hpp>
#include <msgtrans/protocol/outbound_budget.hpp>
#include <msgtrans/protocol/outbound_queue.hpp>
#include <msgtrans/protocol/time.hpp>
#include <msgtrans/protocol/token_bucket.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/wire/compression.hpp>
#include <msgtrans/wire/decoder.hpp>
#include <msgtrans/wire/message_id.hpp>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace msgtrans::protocol {

/// What the sessions of one shard share.
struct SharedResources {
  wire::BufferPool buffers;
  OutboundQueuePool queues{buffers};
  OutboundTotal* total = nullptr;       ///< of all sessions of the server, if that is limited
  Counter throttled;                    ///< times that a session was over its rate; any thread may read it
  const void* reader = nullptr;         ///< the session whose read is being delivered
  std::size_t reading = 0;              ///< bytes of that read
  std::vector<std::byte> decompressed;  ///< the payload being delivered, if it came compressed
};

/// What of a session's options is for the wire.
[[nodiscard]] inline wire::Limits limits_of(const SessionOptions& options) noexcept {
  return {.max_payload = options.max_payload,
          .max_extension = options.max_extension,
          .max_decompressed = options.max_decompressed};
}

/// The life of one session, whatever carries its bytes: decoding, handing out packets no faster than their answers
/// leave, deadlines, and the orderly end. No socket, no thread, no clock: bytes and the time come in; what is to be
/// done next is asked for (`wants_read`, `outbound`, `shutdown_due`, `ended`, `deadline`). Not thread-safe.
///
///     open ──begin_drain, or the peer's end──> draining ──close, once nothing is owed──┐
///       └────────────────────────────close────────────────────────────> closing ──all written, shut_down──> lingering
///     lingering ──the peer's end, or the deadline──> ended;   from anywhere ──abort──> ended
class SessionProtocol {
 public:
  enum class Phase : std::uint8_t {
    open,
    draining,   ///< as open, but the owner closes it as soon as nothing is owed either way
    closing,    ///< nothing is handed out or accepted any more; what was accepted is being written
    lingering,  ///< our end is shut; input is discarded until the peer's end, lest the last bytes be lost by a reset
    ended,
  };

  /// `options` and `shared` must outlive this.
  SessionProtocol(const SessionOptions& options, SharedResources& shared, TimePoint now)
      : options_(&options),
        shared_(&shared),
        decoder_(limits_of(options), shared.buffers),
        rates_(options.packets_per_second != 0 || options.bytes_per_second != 0 ? std::make_unique<Rates>(options, now)
                                                                                : nullptr),
        limit_{options.outbound_bytes, options.outbound_packets},
        began_(now),
        last_read_(now),
        last_packet_(now),
        last_heard_(now),
        last_write_(now) {}

  ~SessionProtocol() { release(); }
  SessionProtocol(const SessionProtocol&) = delete;
  SessionProtocol& operator=(const SessionProtocol&) = delete;

  [[nodiscard]] Phase phase() const noexcept { return phase_; }
  [[nodiscard]] bool accepts() const noexcept { return phase_ <= Phase::draining; }
  [[nodiscard]] bool ended() const noexcept { return phase_ == Phase::ended; }
  [[nodiscard]] bool peer_ended() const noexcept { return peer_ended_; }
  /// Why the session ends; no error while it is open.
  [[nodiscard]] const Error& reason() const noexcept {
    static const Error none;
    return reason_ ? *reason_ : none;
  }

  // --- in

  /// True if the owner should read: not while the answers are over their budget, nor after the peer's end.
  [[nodiscard]] bool wants_read() noexcept {
    if (peer_ended_) return false;
    if (awaits_admission_ && accepts()) return read_ahead_ < most_read_ahead;  // lest its end not be seen
    return phase_ == Phase::lingering || deliverable();
  }

  /// Bytes arrived. Calls `deliver(const wire::Header&, extension, payload)` for each whole packet, with the payload
  /// decompressed; views are valid during the call. `deliver` may call anything of this object but `receive`, `resume`
  /// and `release`, and may throw: then nothing is lost, and the rest stays undecoded until `resume`. If there is no
  /// memory to keep the rest, std::bad_alloc is thrown and nothing is handed out any more: only `abort` is left.
  template <class Deliver>
  void receive(std::span<const std::byte> bytes, TimePoint now, Deliver&& deliver) {
    bytes_in_.add(bytes.size());
    if (awaits_admission_) [[unlikely]]
      read_ahead_ += bytes.size();
    last_read_ = last_heard_ = now;
    if (!accepts()) return;
    struct Reading {
      Reading(SharedResources& resources, const void* reader, std::size_t size) noexcept : shared(resources) {
        shared.reader = reader;
        shared.reading = size;
      }
      ~Reading() { shared.reader = nullptr; }
      SharedResources& shared;
    } reading{*shared_, this, bytes.size()};
    decoder_.feed(bytes);
    pump(now, deliver);
  }

  /// True if packets wait that `resume` would deliver now.
  [[nodiscard]] bool resumable() noexcept { return parked_ && deliverable(); }
  /// From now on one call of `receive` or `resume` delivers so many packets at most, and leaves the rest to `resume`.
  /// 0: no limit.
  void set_packets_a_call(std::uint32_t most) noexcept { packets_a_call_ = most; }
  /// True if the latest such call stopped for that.
  [[nodiscard]] bool stopped_at_limit() const noexcept { return stopped_at_limit_ && parked_; }

  template <class Deliver>
  void resume(TimePoint now, Deliver&& deliver) {
    last_read_ = last_heard_ = now;  // while it was not read from, the peer could not go on
    pump(now, deliver);
  }

  /// The peer will send no more. What it is still owed can be written until `finish_within` is over. `reason`, unless
  /// it ended in the middle of a packet.
  void receive_end(TimePoint now, Duration finish_within, Error reason = Errc::closed_by_peer) {
    peer_ended_ = true;
    if (phase_ == Phase::lingering) {
      phase_ = Phase::ended;
    } else if (accepts()) {
      set_reason(decoder_.has_partial() && !parked_ ? Error(Errc::truncated) : std::move(reason));
      phase_ = Phase::draining;
      end_by_ = std::min(end_by_, now + finish_within);
    }
  }

  [[nodiscard]] bool has_partial() const noexcept { return decoder_.has_partial(); }

  // --- out

  [[nodiscard]] bool outbound_empty() const noexcept { return !queue_ || queue_->empty(); }
  /// For reading: gather, depth, drop_oldest.
  [[nodiscard]] OutboundQueue& outbound() {
    if (!queue_) {
      queue_ = shared_->queues.take();
      // Answers are about as long as what they answer; what a handler sends to other sessions is not.
      queue_->expect(shared_->reader == this ? shared_->reading : 0);
    }
    return *queue_;
  }
  /// The id for the next packet that is no answer.
  [[nodiscard]] std::uint32_t next_message_id() noexcept { return ids_.next(); }

  /// The transport took `count` bytes of what `outbound().gather` showed.
  OutboundQueue::Written written(std::size_t count, TimePoint now) noexcept {
    const auto done = queue_->consume(count);
    note_written(count, done.packets, now);
    if (queue_->empty()) shared_->queues.give(std::move(queue_));
    return done;
  }
  /// The transport takes blocks of what is queued over, as `OutboundQueue::hand_over`. `count`: how many bytes.
  template <class Take>
  OutboundQueue::Written hand_over(std::size_t most, bool exact, TimePoint now, std::size_t& count, Take&& take) {
    const auto done = queue_->hand_over(most, exact, [&](OutboundBlock& block) {
      count += block.end - block.begin;
      take(block);
    });
    note_written(count, done.packets, now);
    if (queue_->empty()) shared_->queues.give(std::move(queue_));
    return done;
  }
  /// The transport took bytes, and packets, that never were in the queue.
  void note_written(std::size_t bytes, std::size_t packets, TimePoint now) noexcept {
    bytes_out_.add(bytes);
    packets_out_.add(packets);
    if (packets != 0) {
      if (packets > (heartbeat_queued_ ? 1U : 0U)) last_packet_ = now;
      heartbeat_queued_ = false;
    }
    last_write_ = now;
    blocked_ = false;
  }
  /// The transport can take no byte now. The stall deadline runs from the first such call after progress.
  void write_blocked(TimePoint now) noexcept {
    if (!blocked_) blocked_since_ = now;
    blocked_ = true;
  }

  /// Queues a heartbeat if it is time for one. \throws std::bad_alloc
  void send_heartbeat(TimePoint now) {
    // Not to one that has ended: he may be gone, and his system's reset would take what is still being handed out.
    if (options_->heartbeat_interval.count() == 0 || !accepts() || peer_ended_ || !outbound_empty() ||
        now < last_write_ + options_->heartbeat_interval) {
      return;
    }
    wire::Header header;
    header.type = wire::PacketType::one_way;
    header.biz_type = options_->heartbeat_biz_type;
    header.message_id = next_message_id();
    outbound().append(header, {}, std::span<const std::byte>(), OutboundKind::answer);
    heartbeat_queued_ = true;
  }

  /// The peer took some of what the transport holds for it, though the transport can take no more yet.
  void write_progress(TimePoint now) noexcept { blocked_since_ = now; }

  // --- the end

  /// Goes on, but the owner is to call `close(reason)` once nothing is owed; it ends at `by` at the latest.
  void begin_drain(TimePoint by = TimePoint::max()) noexcept {
    if (phase_ == Phase::open) phase_ = Phase::draining;
    end_by_ = std::min(end_by_, by);
  }

  /// The orderly end: what was accepted is written, then the connection is shut; at most for `close_timeout`.
  void close(Error reason, TimePoint now) {
    if (!accepts()) return;
    set_reason(std::move(reason));
    phase_ = Phase::closing;
    end_by_ = std::min(end_by_, now + options_->close_timeout);
  }

  /// Hands out nothing more; `close` is to follow.
  void mute() noexcept { muted_ = true; }

  /// Hands out nothing while held: whoever gets the packets has no room for another.
  void hold(bool held) noexcept { held_ = held; }
  [[nodiscard]] bool held() const noexcept { return held_; }
  /// The same while too many of the peer's requests want their answers.
  void hold_for_answers(bool held) noexcept { held_for_answers_ = held; }
  [[nodiscard]] bool held_for_answers() const noexcept { return held_for_answers_; }

  /// Bounds the answers that may be queued while more is handed out; instead of the options'.
  void set_outbound_limit(OutboundDepth limit) noexcept { limit_ = limit; }

  /// Until `admit` nothing is handed out, and the peer is owed nothing in time: somebody thinks about it. What it sends
  /// is kept, up to some 64 KiB and one read more; for the rest it is not read from.
  void await_admission() noexcept { awaits_admission_ = true; }
  void admit(TimePoint now) noexcept {
    awaits_admission_ = false;
    read_ahead_ = 0;
    began_ = last_read_ = last_packet_ = last_heard_ = now;
  }

  /// An answer is on its way into the queue: it counts as being there, until it is, or is given up.
  void answer_under_way(std::size_t size) noexcept {
    answers_under_way_.bytes += size;
    ++answers_under_way_.packets;
  }
  void answer_arrived(std::size_t size) noexcept {
    answers_under_way_.bytes -= size;
    --answers_under_way_.packets;
  }

  /// Ends at once.
  void abort(Error reason) {
    phase_ = Phase::ended;
    set_reason(std::move(reason));
  }

  /// True if the owner is to shut its sending side and then call `shut_down`.
  [[nodiscard]] bool shutdown_due() const noexcept { return phase_ == Phase::closing && outbound_empty(); }
  void shut_down(TimePoint now) noexcept {
    phase_ = peer_ended_ ? Phase::ended : Phase::lingering;
    end_by_ = std::min(end_by_, now + longest_linger);
  }
  /// While lingering: all that was written has arrived.
  void delivered() noexcept {
    if (phase_ == Phase::lingering) phase_ = Phase::ended;
  }

  /// After the end: gives back all memory taken from the shared resources, which are not used again.
  void release() noexcept {
    drop_read();
    if (queue_) {
      queue_->clear();
      shared_->queues.give(std::move(queue_));
    }
  }

  // --- time

  /// When `expire` has something to do at the earliest, unless something happens before; TimePoint::max() if never.
  [[nodiscard]] TimePoint deadline() const noexcept {
    if (ended()) return TimePoint::max();
    TimePoint earliest = end_by_;
    const auto at = [&earliest](TimePoint from, std::chrono::milliseconds after) {
      if (after.count() != 0) earliest = std::min(earliest, TimePoint(from + after));
    };
    if (blocked_) at(blocked_since_, options_->write_stall_timeout);
    if (throttled_) earliest = std::min(earliest, rates_->ready);
    if (accepts() && !peer_ended_ && !awaits_admission_) {
      if (packets_in_.value() == 0) at(began_, options_->first_packet_timeout);
      if (options_->idle_timeout.count() != 0) at(last_packet_, options_->idle_timeout);
      if (decoder_.has_partial() && !parked_) at(last_read_, options_->read_stall_timeout);
      if (options_->heartbeat_interval.count() != 0) at(last_heard_, longest_silence());
    }
    // What is queued says that we are there as well, as soon as it can.
    if (accepts() && !peer_ended_ && outbound_empty()) at(last_write_, options_->heartbeat_interval);
    return earliest;
  }

  /// Ends the session if a deadline has passed, with the reason.
  void expire(TimePoint now) {
    const auto passed = [now](TimePoint from, std::chrono::milliseconds after) {
      return after.count() != 0 && now >= from + after;
    };
    if (ended()) return;
    if (throttled_) {
      last_packet_ = now;  // more is there, and waits for us
      throttled_ = now < rates_->ready;
    }
    if (blocked_ && passed(blocked_since_, options_->write_stall_timeout)) return abort(Errc::write_stalled);
    if (now >= end_by_) return abort(Errc::drain_expired);
    if (!accepts() || peer_ended_ || awaits_admission_) return;
    if (packets_in_.value() == 0 && passed(began_, options_->first_packet_timeout)) {
      close(Errc::first_packet_timeout, now);
    } else if (decoder_.has_partial() && !parked_ && passed(last_read_, options_->read_stall_timeout)) {
      close(Errc::read_stalled, now);
    } else if (options_->heartbeat_interval.count() != 0 && now >= last_heard_ + longest_silence()) {
      if (deliverable()) {
        close(Error(Errc::peer_silent, "nothing came for " + std::to_string(longest_silence().count()) + " ms"), now);
      } else {
        last_heard_ = now;  // nobody listened
      }
    } else if (passed(last_packet_, options_->idle_timeout)) {
      close(Errc::idle_timeout, now);
    }
  }

  /// When the last packet came or went; the beginning, if none did.
  [[nodiscard]] TimePoint idle_since() const noexcept { return last_packet_; }

  /// Any thread may read these.
  [[nodiscard]] std::uint64_t packets_in() const noexcept { return packets_in_.value(); }
  [[nodiscard]] std::uint64_t packets_out() const noexcept { return packets_out_.value(); }
  [[nodiscard]] std::uint64_t bytes_in() const noexcept { return bytes_in_.value(); }
  [[nodiscard]] std::uint64_t bytes_out() const noexcept { return bytes_out_.value(); }
  /// Whole packets that were read before the end and not handed out; final after `release`.
  [[nodiscard]] std::uint64_t dropped_inbound() const noexcept { return dropped_inbound_.value(); }

 private:
  /// Whether the next packet may be handed out: between the marks it stays as it was.
  [[nodiscard]] bool deliverable() noexcept {
    if (!accepts() || muted_ || held_ || held_for_answers_ || throttled_ || awaits_admission_) return false;
    OutboundDepth answers = queue_ ? queue_->answers() : OutboundDepth{};
    answers.bytes += answers_under_way_.bytes;
    answers.packets += answers_under_way_.packets;
    // With the server's total used up each session may still have one answer on its way, or nothing would move.
    const bool over_total = answers.packets != 0 && shared_->total != nullptr && shared_->total->exhausted();
    if (answers.bytes >= limit_.bytes || answers.packets >= limit_.packets || over_total) {
      paused_ = true;
    } else if (paused_) {
      const OutboundDepth low = part_of(limit_, options_->low_mark_percent);
      paused_ = answers.bytes > low.bytes || answers.packets > low.packets;
    }
    return !paused_;
  }

  struct Rates {
    Rates(const SessionOptions& options, TimePoint now) noexcept
        : packets(options.packets_per_second, burst(options.packet_burst, options.packets_per_second), now),
          bytes(options.bytes_per_second, burst(options.byte_burst, options.bytes_per_second), now) {}
    static std::uint64_t burst(std::uint64_t given, std::uint64_t rate) noexcept { return given != 0 ? given : rate; }

    TokenBucket packets;
    TokenBucket bytes;
    TimePoint ready{};  // while throttled
  };

  /// A packet counts whole when it is handed out, so the next is what waits.
  void charge(std::size_t size, TimePoint now) noexcept {
    rates_->packets.take(1, now);
    rates_->bytes.take(size, now);
    rates_->ready = std::max(rates_->packets.ready_at(now), rates_->bytes.ready_at(now));
    throttled_ = rates_->ready > now;
    if (throttled_) shared_->throttled.add(1);
  }

  [[nodiscard]] std::chrono::milliseconds longest_silence() const noexcept {
    constexpr std::chrono::milliseconds most = std::chrono::hours(24 * 365);
    return std::min(most, options_->heartbeat_interval * (options_->max_missed_heartbeats + 1));
  }
  [[nodiscard]] bool is_heartbeat(const wire::PacketView& packet) const noexcept {
    return packet.header.type == wire::PacketType::one_way && packet.header.biz_type == options_->heartbeat_biz_type &&
           packet.payload.empty() && packet.extension.empty();
  }

  template <class Deliver>
  void pump(TimePoint now, Deliver& deliver) {
    try {
      deliver_all(now, deliver);
    } catch (...) {
      park();
      throw;
    }
  }

  template <class Deliver>
  void deliver_all(TimePoint now, Deliver& deliver) {
    wire::PacketView packet;
    std::uint32_t left = packets_a_call_ != 0 ? packets_a_call_ : ~std::uint32_t{0};
    stopped_at_limit_ = false;
    while (deliverable()) {
      if (left == 0) {
        stopped_at_limit_ = true;
        break;
      }
      if (packets_a_call_ != 0) --left;
      switch (decoder_.next(packet)) {
        case wire::Decoder::Status::need_more: parked_ = false; return;
        case wire::Decoder::Status::error: close(decoder_.error(), now); return park();
        case wire::Decoder::Status::packet: break;
      }
      packets_in_.add(1);
      if (rates_) charge(packet.header.packet_size(), now);
      if (options_->heartbeat_interval.count() != 0 && is_heartbeat(packet)) continue;
      last_packet_ = now;
      if (packet.header.compression == wire::Compression::none) [[likely]] {
        deliver(packet.header, packet.extension, packet.payload);
      } else {
        auto& out = shared_->decompressed;
        if (auto error = wire::decompress(packet.header.compression, packet.payload, options_->max_decompressed, out)) {
          close(std::move(*error), now);
          break;
        }
        deliver(packet.header, packet.extension, std::span<const std::byte>(out));
        if (out.capacity() > keep_decompressed) std::vector<std::byte>().swap(out);
      }
    }
    park();
  }

  /// The lent bytes that are left are kept for `resume`.
  void park() {
    parked_ = false;
    if (!accepts()) return drop_read();
    try {
      decoder_.park();
    } catch (...) {
      // They are gone with the loan, and what came after them would be garbage.
      drop_read();
      muted_ = true;
      throw;
    }
    parked_ = decoder_.has_partial();
  }

  /// What was read before the end and is left is not handed out any more.
  void drop_read() noexcept {
    try {
      wire::PacketView packet;
      while (decoder_.next(packet) == wire::Decoder::Status::packet) dropped_inbound_.add(1);
    } catch (const std::bad_alloc&) {
      // For a packet that is not whole: all others have been counted.
    }
    decoder_.clear();
  }

  void set_reason(Error reason) {
    if (!reason_) reason_ = std::make_unique<Error>(std::move(reason));
  }

  static constexpr Duration longest_linger = std::chrono::seconds(1);
  static constexpr std::size_t keep_decompressed = 1024 * 1024;
  static constexpr std::size_t most_read_ahead = 64 * 1024;

  const SessionOptions* options_;
  SharedResources* shared_;
  wire::Decoder decoder_;
  std::unique_ptr<OutboundQueue> queue_;  // only while there is something to write
  std::unique_ptr<Error> reason_;
  std::unique_ptr<Rates> rates_;  // null: no limit
  OutboundDepth limit_;
  OutboundDepth answers_under_way_;
  std::size_t read_ahead_ = 0;  // since it awaits its admission
  wire::MessageIdCounter ids_;
  Phase phase_ = Phase::open;
  bool paused_ = false;  // the answers have been over their budget and not yet down to the low mark
  bool muted_ = false;
  bool held_ = false;
  bool held_for_answers_ = false;
  bool throttled_ = false;
  bool awaits_admission_ = false;
  bool parked_ = false;  // whole packets may wait undecoded
  bool stopped_at_limit_ = false;
  std::uint32_t packets_a_call_ = 0;
  bool peer_ended_ = false;
  bool heartbeat_queued_ = false;
  bool blocked_ = false;  // the transport took no byte since blocked_since_
  TimePoint began_;
  TimePoint last_read_;
  TimePoint last_packet_;
  TimePoint last_heard_;  // while somebody listened
  TimePoint last_write_;
  TimePoint blocked_since_{};
  TimePoint end_by_ = TimePoint::max();
  Counter packets_in_;
  Counter packets_out_;
  Counter bytes_in_;
  Counter bytes_out_;
  Counter dropped_inbound_;
};

}  // namespace msgtrans::protocol
