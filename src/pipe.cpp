// SPDX-License-Identifier: Apache-2.0
#include "pipe.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <utility>

namespace msgtrans::detail {

void Pipe::set_writer(ReadySignal signal) {
  const std::lock_guard lock(mutex_);
  writer_ = std::move(signal);
}

void Pipe::set_reader(ReadySignal signal) {
  const std::lock_guard lock(mutex_);
  reader_ = std::move(signal);
  reader_.readable();  // of what came before
}

Pipe::Status Pipe::room(std::size_t& bytes, bool& exact) {
  bytes = 0;
  exact = faults_ != nullptr;
  if (broken_.load(std::memory_order_acquire)) return Status::failed;
  if (const auto now = under_way(); now < capacity && !faults_) {
    bytes = capacity - now;
    return Status::done;
  }
  const std::lock_guard lock(mutex_);
  if (under_way() >= capacity) {
    writer_waits_ = true;
    return Status::blocked;
  }
  bytes = capacity - under_way();
  if (faults_) bytes = std::min(bytes, faults_->room(shared_from_this(), bytes));
  writer_waits_ = bytes == 0;
  return writer_waits_ ? Status::blocked : Status::done;
}

void Pipe::push(protocol::OutboundBlock& block) noexcept {
  if (broken_.load(std::memory_order_acquire)) return;
  under_way_.fetch_add(block.end - block.begin, std::memory_order_relaxed);
  if (!faults_) return deliver(block);
  try {
    faults_->push(shared_from_this(), block.bytes());
  } catch (const std::bad_alloc&) {
    const std::lock_guard lock(mutex_);
    run_out_of_memory();
  }
}

void Pipe::run_out_of_memory() noexcept {
  out_of_memory_ = true;
  broken_.store(true, std::memory_order_release);
  reader_.readable();
  writer_.writable();
}

void Pipe::deliver(protocol::OutboundBlock& block) noexcept {
  const std::lock_guard lock(mutex_);
  if (abandoned_ || ended_) return took(block.end - block.begin);
  const auto bytes = block.bytes();
  // Few bytes in a block made for more are copied: else many such blocks would hold a multiple of the capacity.
  constexpr std::size_t few = 512;
  constexpr std::size_t small_block = 4096;
  const std::size_t held = block.shared ? 0 : block.own.capacity();
  const bool wasteful = held > small_block && held > 4 * bytes.size();
  if ((bytes.size() <= few || wasteful) && !blocks_.empty() && blocks_.back().room() >= bytes.size()) {
    auto& last = blocks_.back();
    std::memcpy(last.own.data() + last.end, bytes.data(), bytes.size());
    last.end += bytes.size();
  } else {
    try {
      if (wasteful) {
        protocol::OutboundBlock copy{wire::Buffer(std::max(bytes.size(), small_block)), {}, 0, bytes.size()};
        std::memcpy(copy.own.data(), bytes.data(), bytes.size());
        blocks_.push(std::move(copy));
      } else {
        blocks_.push(std::move(block));
      }
    } catch (const std::bad_alloc&) {
      return run_out_of_memory();
    }
  }
  if (std::exchange(reader_waits_, false)) reader_.readable();
}

void Pipe::end(bool cut) noexcept {
  if (!faults_) return deliver_end(cut);
  try {
    faults_->end(shared_from_this(), cut);
  } catch (const std::bad_alloc&) {
    deliver_end(true);
  }
}

void Pipe::deliver_end(bool cut) noexcept {
  const std::lock_guard lock(mutex_);
  if (ended_) return;
  ended_ = true;
  cut_ = cut;
  reader_.readable();
}

void Pipe::lose(std::size_t bytes) noexcept {
  const std::lock_guard lock(mutex_);
  took(bytes);
}

void Pipe::let_write() noexcept {
  const std::lock_guard lock(mutex_);
  writer_waits_ = false;
  writer_.writable();
}

void Pipe::took(std::size_t bytes) noexcept {
  const std::size_t left = under_way_.fetch_sub(bytes, std::memory_order_relaxed) - bytes;
  // Who waits begins again when there is something to gain by it; who has ended waits for the last byte.
  if ((writer_waits_ && left <= capacity / 2) || (ended_ && left == 0)) {
    writer_waits_ = false;
    writer_.writable();
  }
}

Pipe::Status Pipe::take(protocol::OutboundBlock& block, bool& more) {
  const std::lock_guard lock(mutex_);
  more = false;
  if (out_of_memory_) return Status::failed;
  if (blocks_.empty()) {
    if (ended_) return cut_ ? Status::failed : Status::ended;
    reader_waits_ = true;
    return Status::blocked;
  }
  block = std::move(blocks_.front());
  blocks_.pop();
  more = !blocks_.empty() || ended_;
  reader_waits_ = !more;
  took(block.end - block.begin);
  return Status::done;
}

void Pipe::abandon() noexcept {
  const std::lock_guard lock(mutex_);
  abandoned_ = true;
  broken_.store(true, std::memory_order_release);
  while (!blocks_.empty()) {
    took(blocks_.front().end - blocks_.front().begin);
    blocks_.pop();
  }
  writer_waits_ = false;
  writer_.writable();
}

Error Pipe::failure() const {
  const std::lock_guard lock(mutex_);
  if (out_of_memory_) return make_error_code(boost::system::errc::not_enough_memory);
  return error_code(ECONNRESET, boost::system::system_category());
}

}  // namespace msgtrans::detail
