// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <iterator>
#include <memory>
#include <msgtrans/channel/channel_status.hpp>
#include <msgtrans/detail/blocking.hpp>
#include <msgtrans/detail/producer_seats.hpp>
#include <msgtrans/detail/tickets.hpp>
#include <msgtrans/detail/waiting_room.hpp>
#include <new>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

namespace msgtrans {

/// Many threads send, many receive, each value goes to one of them: the channel for control, between plain threads.
///
/// The queue is moodycamel's ConcurrentQueue; the account of what is in it is a word of tickets beside it, and threads
/// that wait sleep in an event count. A call that does not wait makes no system call unless it has to wake somebody.
///
/// Order: what one thread sends arrives in the order sent, at whichever receivers; between threads nothing is promised,
/// not even if one send happens before the other. (A value sent while a thread's `thread_local`s are being destroyed
/// may overtake that thread's earlier ones.)
///
/// Capacity: at most that many values are sent and not yet received, at any moment. A waiting sender has no place in
/// line: one that comes later may be faster.
///
/// Close: what was accepted before is still received, then every receive says `closed`. A send that is not `ok` leaves
/// its value to the caller.
///
/// Thread safety: every call from any thread, except the destructor. That closes, waits until those who wait inside
/// have left with `closed`, and destroys what nobody received; beginning a call meanwhile is an error. Calls that have
/// to wait do not on a thread that must not block (a shard's): they say `blocking_on_shard` instead.
///
/// Memory: a few hundred bytes, about 1 KiB more for each thread that has sent, and the values. The most that the
/// values ever took is kept until the channel goes. With `bad_alloc` a send leaves the channel and the value as they
/// were.
///
/// T needs a move constructor that does not throw; nothing else.
template <class T>
class SyncChannel {
  static_assert(std::is_nothrow_move_constructible_v<T>,
                "SyncChannel<T>: T must be nothrow move constructible, or a value could be lost half-way; wrap it in a "
                "std::unique_ptr");
  static_assert(std::is_nothrow_destructible_v<T> && std::is_object_v<T>);

 public:
  explicit SyncChannel(ChannelCapacity capacity)
      : limit_(capacity.is_bounded() ? capacity.count() : detail::Tickets::no_limit) {}
  ~SyncChannel() {
    close();
    receivers_.wait_until_empty();
    senders_.wait_until_empty();
    seats_->close();
  }
  SyncChannel(const SyncChannel&) = delete;
  SyncChannel& operator=(const SyncChannel&) = delete;

  // --- sending

  /// `ok`, `full` or `closed`. Lock-free but for memory.
  ChannelStatus try_send(T&& value) { return put(std::move(value)); }
  ChannelStatus try_send(const T& value) requires std::is_copy_constructible_v<T> {
    T copy(value);
    return put(std::move(copy));
  }

  /// Waits for room: `ok` or `closed`.
  ChannelStatus send(T&& value) { return send_until(std::move(value), detail::no_deadline); }
  ChannelStatus send(const T& value) requires std::is_copy_constructible_v<T> {
    T copy(value);
    return send_until(std::move(copy), detail::no_deadline);
  }
  /// The same, at most that long: also `timeout`.
  template <class Rep, class Period>
  ChannelStatus send_for(T&& value, std::chrono::duration<Rep, Period> time) {
    return send_until(std::move(value), detail::deadline_after(time));
  }

  /// Sends the values from the front on, waiting for room; how many were sent. Fewer only if the channel was closed, or
  /// would have to wait on a thread that must not, or there is no memory for the rest; `status`, if given, says which
  /// (`ok` if all were sent, and when memory was short). With `std::bad_alloc` none was sent. Much cheaper than one by
  /// one.
  std::size_t send_many(std::span<T> values, ChannelStatus* status = nullptr) {
    std::size_t sent = 0;
    auto result = ChannelStatus::ok;
    const auto visit = senders_.enter();
    while (sent < values.size()) {
      detail::Tickets::Added added{};
      try {
        const std::size_t count = put_some(values.subspan(sent), added);
        sent += count;
        if (count != 0) continue;
      } catch (const std::bad_alloc&) {
        if (sent == 0) throw;
        break;
      }
      if (added == detail::Tickets::Added::closed) {
        result = ChannelStatus::closed;
        break;
      }
      if (detail::must_not_block != 0) {
        result = ChannelStatus::blocking_on_shard;
        break;
      }
      wait_for_room(detail::no_deadline);
    }
    if (status != nullptr) *status = result;
    return sent;
  }

  // --- receiving

  /// A value, or `empty` or `closed`. Lock-free, but for a sender that is between its two steps.
  RecvResult<T> try_recv() noexcept {
    Slot slot;
    bool closed = false;
    if (take_one(slot, closed)) return slot.release();
    return closed ? ChannelStatus::closed : ChannelStatus::empty;
  }

  /// Waits: a value, or `closed`.
  RecvResult<T> recv() noexcept { return recv_until(detail::no_deadline); }
  /// The same, at most that long: also `timeout`.
  template <class Rep, class Period>
  RecvResult<T> recv_for(std::chrono::duration<Rep, Period> time) noexcept {
    return recv_until(detail::deadline_after(time));
  }

  /// Appends what is there to `out`, at most `max`, and waits until there is something; how many. 0: closed and empty,
  /// or it would have to wait on a thread that must not; `status`, if given, says which (`ok` otherwise). If `out`
  /// cannot grow, throws `std::bad_alloc`, and nothing was received.
  std::size_t recv_many(std::vector<T>& out, std::size_t max, ChannelStatus* status = nullptr) {
    const auto visit = receivers_.enter();
    for (;;) {
      bool closed = false;
      const std::size_t count = take_many(out, max, closed);
      const bool refused = count == 0 && !closed && max != 0 && detail::must_not_block != 0;
      if (count != 0 || closed || max == 0 || refused) {
        if (status != nullptr) {
          *status = refused            ? ChannelStatus::blocking_on_shard
                    : closed && !count ? ChannelStatus::closed
                                       : ChannelStatus::ok;
        }
        return count;
      }
      receivers_.wait([this] { return tickets_.count() != 0 || tickets_.closed(); },
                      [this] { return tickets_.count() != 0 || tickets_.closed(); }, detail::no_deadline);
    }
  }
  /// The same without waiting; `closed`, if given, says whether nothing will ever come again.
  std::size_t try_recv_many(std::vector<T>& out, std::size_t max, bool* closed = nullptr) {
    bool is_closed = false;
    const std::size_t count = take_many(out, max, is_closed);
    if (closed != nullptr) *closed = is_closed;
    return count;
  }

  // --- life

  /// Ends all waiting. Again: nothing.
  void close() noexcept {
    if (!tickets_.close()) return;
    receivers_.notify();
    senders_.notify();
  }
  [[nodiscard]] bool is_closed() const noexcept { return tickets_.closed(); }

  /// How many values are sent and not received. While others send and receive: as it was at some moment of the call,
  /// give or take sends that there was no memory for.
  [[nodiscard]] std::size_t size() const noexcept { return static_cast<std::size_t>(tickets_.values()); }
  /// 0: unbounded.
  [[nodiscard]] std::size_t capacity() const noexcept {
    return limit_ == detail::Tickets::no_limit ? 0 : static_cast<std::size_t>(limit_);
  }
  /// How many threads at once have used it so far; each costs memory for as long as the channel lives.
  [[nodiscard]] std::size_t seats() const noexcept { return seats_->size(); }

 private:
  using Queue = moodycamel::ConcurrentQueue<T, detail::QueueTraits>;

  /// Room for a value: moodycamel hands one out by assigning it.
  class Slot {
   public:
    Slot() noexcept {}
    ~Slot() {
      if (full_) value_.~T();
    }
    Slot(const Slot&) = delete;
    Slot& operator=(T&& value) noexcept {
      ::new (static_cast<void*>(&value_)) T(std::move(value));
      full_ = true;
      return *this;
    }
    T release() noexcept { return std::move(value_); }

   private:
    union {
      T value_;
    };
    bool full_ = false;
  };

  /// Appends to a vector that has room.
  class Appender {
   public:
    using iterator_category = std::output_iterator_tag;
    using value_type = void;
    using difference_type = std::ptrdiff_t;
    using pointer = void;
    using reference = void;

    explicit Appender(std::vector<T>& out) noexcept : out_(&out) {}
    Appender& operator*() noexcept { return *this; }
    Appender& operator++() noexcept { return *this; }
    Appender operator++(int) noexcept { return *this; }
    Appender& operator=(T&& value) noexcept {
      out_->push_back(std::move(value));
      return *this;
    }

   private:
    std::vector<T>* out_;
  };

  /// The calling thread's seat, or one for this call when the thread is ending.
  class SeatHold {
   public:
    explicit SeatHold(SyncChannel& channel)
        : channel_(channel), seat_(detail::ThreadSeats::find(channel.id_, channel.seats_, channel.queue_)) {
      if (seat_ != nullptr) return;
      seat_ = channel.seats_->take(channel.queue_);
      borrowed_ = true;
    }
    ~SeatHold() {
      if (borrowed_) channel_.seats_->give_back(seat_);
    }
    SeatHold(const SeatHold&) = delete;
    SeatHold& operator=(const SeatHold&) = delete;
    detail::Seat* operator->() const noexcept { return seat_; }

   private:
    SyncChannel& channel_;
    detail::Seat* seat_;
    bool borrowed_ = false;
  };

  ChannelStatus put(T&& value) {
    const SeatHold seat(*this);  // first: it may throw
    switch (tickets_.add(limit_)) {
      case detail::Tickets::Added::full: return ChannelStatus::full;
      case detail::Tickets::Added::closed: return ChannelStatus::closed;
      case detail::Tickets::Added::ok: break;
    }
    if (!queue_.enqueue(seat->producer, std::move(value))) {
      // Out of memory; moodycamel has not touched the value. Its ticket is out already.
      take_back(1);
      throw std::bad_alloc();
    }
    receivers_.notify();
    return ChannelStatus::ok;
  }

  std::size_t put_some(std::span<T> values, detail::Tickets::Added& added) {
    const SeatHold seat(*this);
    std::size_t count = values.size();
    added = tickets_.add_some(count, limit_);
    if (count == 0) return 0;
    if (!queue_.enqueue_bulk(seat->producer, std::make_move_iterator(values.begin()), count)) {
      take_back(count);
      throw std::bad_alloc();
    }
    receivers_.notify();
    return count;
  }

  void take_back(std::size_t tickets) noexcept {
    tickets_.give_back(tickets);
    if (limit_ != detail::Tickets::no_limit) senders_.notify();
  }

  ChannelStatus send_until(T&& value, detail::WaitDeadline deadline) {
    auto status = put(std::move(value));
    if (status != ChannelStatus::full) return status;
    if (detail::must_not_block != 0) return ChannelStatus::blocking_on_shard;
    const auto visit = senders_.enter();
    do {
      if (!wait_for_room(deadline)) return ChannelStatus::timeout;
      status = put(std::move(value));
    } while (status == ChannelStatus::full);
    return status;
  }

  /// Until there is room, or the channel is closed; false at the deadline.
  bool wait_for_room(detail::WaitDeadline deadline) noexcept {
    const auto ready = [this] { return has_room() || tickets_.closed(); };
    return senders_.wait(ready, ready, deadline);
  }

  [[nodiscard]] bool has_room() const noexcept { return tickets_.count() < limit_; }

  bool take_one(Slot& slot, bool& closed) noexcept {
    while (tickets_.take(1, closed) != 0) {
      const std::size_t got = tickets_.redeem(1, [&](std::size_t) { return dequeue(slot) ? 1U : 0U; });
      if (limit_ != detail::Tickets::no_limit) senders_.notify();  // a void ticket leaves room as well
      if (got != 0) return true;
    }
    return false;
  }

  std::size_t take_many(std::vector<T>& out, std::size_t max, bool& closed) {
    for (;;) {
      const auto there = static_cast<std::size_t>(tickets_.count());
      const std::size_t wanted = there < max ? there : max;
      if (out.capacity() - out.size() < wanted) {
        out.reserve(out.size() + wanted < 2 * out.size() ? 2 * out.size() : out.size() + wanted);
      }
      const std::size_t taken = tickets_.take(wanted, closed);
      if (taken == 0) return 0;
      const std::size_t got = tickets_.redeem(taken, [&](std::size_t count) { return dequeue(out, count); });
      if (limit_ != detail::Tickets::no_limit) senders_.notify();
      if (got != 0) return got;
    }
  }

  bool dequeue(Slot& slot) noexcept { return queue_.try_dequeue(slot); }
  std::size_t dequeue(std::vector<T>& out, std::size_t count) noexcept {
    return queue_.try_dequeue_bulk(Appender(out), count);
  }

  RecvResult<T> recv_until(detail::WaitDeadline deadline) noexcept {
    Slot slot;
    bool closed = false;
    if (take_one(slot, closed)) return slot.release();
    if (closed) return ChannelStatus::closed;
    if (detail::must_not_block != 0) return ChannelStatus::blocking_on_shard;
    bool received = false;
    const auto attempt = [&] {
      received = take_one(slot, closed);
      return received || closed;
    };
    receivers_.wait(
        attempt, [this] { return tickets_.count() != 0 || tickets_.closed(); }, deadline);
    if (received) return slot.release();
    return closed ? ChannelStatus::closed : ChannelStatus::timeout;
  }

  static constexpr std::size_t cache_line = 64;

  const std::uint64_t limit_;
  const std::uint64_t id_ = detail::next_queue_id();
  const std::shared_ptr<detail::SeatPool> seats_ = std::make_shared<detail::SeatPool>();
  Queue queue_{0};
  // A sender changes the tickets and then looks who waits to receive: one line.
  alignas(cache_line) detail::Tickets tickets_;
  detail::WaitingRoom receivers_;
  alignas(cache_line) detail::WaitingRoom senders_;
};

}  // namespace msgtrans
