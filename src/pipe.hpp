// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/protocol/outbound_queue.hpp>
#include <msgtrans/transport/connection.hpp>
#include <mutex>
#include <span>

namespace msgtrans::detail {

class Pipe;

/// What may happen to the bytes of one direction on their way; a test kit's. On the thread that writes.
class PipeFaults {
 public:
  virtual ~PipeFaults() = default;
  /// How many of that many bytes the writer gets rid of now; if none, `Pipe::let_write` is to follow.
  virtual std::size_t room(const std::shared_ptr<Pipe>& pipe, std::size_t room) = 0;
  /// Bytes were written: instead of `Pipe::deliver`, which may follow at any time, or `Pipe::lose`.
  virtual void push(const std::shared_ptr<Pipe>& pipe, std::span<const std::byte> bytes) = 0;
  /// The writer has ended: instead of `Pipe::deliver_end`.
  virtual void end(const std::shared_ptr<Pipe>& pipe, bool cut) = 0;
};

/// One direction of a connection within the process: bytes in blocks, from the queue of one session to another, in
/// order and bounded. Any thread; one writes and one reads.
class Pipe final : public std::enable_shared_from_this<Pipe> {
 public:
  using Status = Connection::Status;

  /// Bytes under way at most, and a block.
  static constexpr std::size_t capacity = 256 * 1024;

  // --- who writes

  void set_writer(ReadySignal signal);
  /// How many bytes may be written now: `done`, or 0 with `blocked` or `failed`. `exact`: not one more.
  Status room(std::size_t& bytes, bool& exact);
  /// Moves from `block`, or copies. Memory that is missing fails both ends.
  void push(protocol::OutboundBlock& block) noexcept;
  /// Nothing follows. `cut`: not in order; the reader is told so behind what was written.
  void end(bool cut) noexcept;
  /// Bytes that were written and not read.
  [[nodiscard]] std::size_t under_way() const noexcept { return under_way_.load(std::memory_order_relaxed); }

  // --- who reads

  void set_reader(ReadySignal signal);
  /// The next block. `more`: there is another, or the end; if not, the signal will tell.
  Status take(protocol::OutboundBlock& block, bool& more);
  /// Nobody reads any more.
  void abandon() noexcept;

  [[nodiscard]] Error failure() const;

  // --- faults

  /// Before anything else.
  void set_faults(std::unique_ptr<PipeFaults> faults) noexcept { faults_ = std::move(faults); }
  void deliver(protocol::OutboundBlock& block) noexcept;
  void deliver_end(bool cut) noexcept;
  void lose(std::size_t bytes) noexcept;
  void let_write() noexcept;

 private:
  void took(std::size_t bytes) noexcept;
  void run_out_of_memory() noexcept;

  // Held for some pointers' time, once a block at each end; a block is what one turn of a session has written.
  mutable std::mutex mutex_;
  protocol::Fifo<protocol::OutboundBlock> blocks_;
  // The writer adds to it, who reads or loses takes from it, the latter under the lock: the writer may find less room
  // than there is, and looks again under the lock before it waits.
  std::atomic<std::size_t> under_way_{0};
  std::atomic<bool> broken_{false};  // abandoned_ or out_of_memory_, for the writer
  bool ended_ = false;               // nothing comes behind the blocks
  bool cut_ = false;                 // and that was not in order
  bool abandoned_ = false;           // the reader has gone
  bool out_of_memory_ = false;
  bool reader_waits_ = true;
  bool writer_waits_ = false;
  ReadySignal reader_;
  ReadySignal writer_;
  std::unique_ptr<PipeFaults> faults_;
};

}  // namespace msgtrans::detail
