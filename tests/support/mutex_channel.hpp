// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <msgtrans/channel/channel_status.hpp>
#include <msgtrans/detail/blocking.hpp>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

namespace msgtrans::test {

/// The plainest channel there is, with the interface of SyncChannel: what the others must do, this does obviously.
template <class T>
class MutexChannel {
 public:
  explicit MutexChannel(ChannelCapacity capacity) : limit_(capacity.count()) {}
  ~MutexChannel() {
    close();
    std::unique_lock lock(mutex_);
    left_.wait(lock, [this] { return waiting_ == 0; });
  }

  ChannelStatus try_send(T&& value) {
    const std::lock_guard lock(mutex_);
    if (closed_) return ChannelStatus::closed;
    if (is_full()) return ChannelStatus::full;
    put(std::move(value));
    return ChannelStatus::ok;
  }
  ChannelStatus try_send(const T& value) { return try_send(T(value)); }
  ChannelStatus send(T&& value) {
    std::unique_lock lock(mutex_);
    if (!closed_ && is_full() && detail::must_not_block != 0) return ChannelStatus::blocking_on_shard;
    wait(lock, [this] { return closed_ || !is_full(); });
    if (closed_) return ChannelStatus::closed;
    put(std::move(value));
    return ChannelStatus::ok;
  }
  ChannelStatus send(const T& value) { return send(T(value)); }
  template <class Time>
  ChannelStatus send_for(T&& value, Time time) {
    std::unique_lock lock(mutex_);
    if (!closed_ && is_full() && detail::must_not_block != 0) return ChannelStatus::blocking_on_shard;
    if (!wait_for(lock, time, [this] { return closed_ || !is_full(); })) return ChannelStatus::timeout;
    if (closed_) return ChannelStatus::closed;
    put(std::move(value));
    return ChannelStatus::ok;
  }

  RecvResult<T> try_recv() {
    const std::lock_guard lock(mutex_);
    if (!values_.empty()) return take();
    return closed_ ? ChannelStatus::closed : ChannelStatus::empty;
  }
  RecvResult<T> recv() {
    std::unique_lock lock(mutex_);
    if (!closed_ && values_.empty() && detail::must_not_block != 0) return ChannelStatus::blocking_on_shard;
    wait(lock, [this] { return closed_ || !values_.empty(); });
    return values_.empty() ? RecvResult<T>(ChannelStatus::closed) : take();
  }
  template <class Time>
  RecvResult<T> recv_for(Time time) {
    std::unique_lock lock(mutex_);
    if (!closed_ && values_.empty() && detail::must_not_block != 0) return ChannelStatus::blocking_on_shard;
    if (!wait_for(lock, time, [this] { return closed_ || !values_.empty(); })) return ChannelStatus::timeout;
    return values_.empty() ? RecvResult<T>(ChannelStatus::closed) : take();
  }
  std::size_t recv_many(std::vector<T>& out, std::size_t max, ChannelStatus* status = nullptr) {
    std::unique_lock lock(mutex_);
    if (status != nullptr) *status = ChannelStatus::ok;
    if (max == 0) return 0;
    if (!closed_ && values_.empty() && detail::must_not_block != 0) {
      if (status != nullptr) *status = ChannelStatus::blocking_on_shard;
      return 0;
    }
    wait(lock, [this] { return closed_ || !values_.empty(); });
    if (status != nullptr && values_.empty()) *status = ChannelStatus::closed;
    return take_many(out, max);
  }
  std::size_t try_recv_many(std::vector<T>& out, std::size_t max, bool* closed = nullptr) {
    const std::lock_guard lock(mutex_);
    if (closed != nullptr) *closed = closed_ && values_.empty();
    return take_many(out, max);
  }

  void close() {
    const std::lock_guard lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }
  [[nodiscard]] bool is_closed() const {
    const std::lock_guard lock(mutex_);
    return closed_;
  }
  [[nodiscard]] std::size_t size() const {
    const std::lock_guard lock(mutex_);
    return values_.size();
  }
  [[nodiscard]] std::size_t capacity() const { return limit_; }

 private:
  template <class Ready>
  void wait(std::unique_lock<std::mutex>& lock, Ready ready) {
    ++waiting_;
    changed_.wait(lock, ready);
    if (--waiting_ == 0) left_.notify_all();
  }
  template <class Time, class Ready>
  bool wait_for(std::unique_lock<std::mutex>& lock, Time time, Ready ready) {
    ++waiting_;
    const bool done = changed_.wait_for(lock, time, ready);
    if (--waiting_ == 0) left_.notify_all();
    return done;
  }
  [[nodiscard]] bool is_full() const { return limit_ != 0 && values_.size() >= limit_; }
  void put(T&& value) {
    values_.push_back(std::move(value));
    changed_.notify_all();
  }
  RecvResult<T> take() {
    RecvResult<T> result(std::move(values_.front()));
    values_.pop_front();
    changed_.notify_all();
    return result;
  }
  std::size_t take_many(std::vector<T>& out, std::size_t max) {
    std::size_t count = 0;
    for (; count < max && !values_.empty(); ++count) {
      out.push_back(std::move(values_.front()));
      values_.pop_front();
    }
    changed_.notify_all();
    return count;
  }

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable left_;
  std::deque<T> values_;
  const std::size_t limit_;
  int waiting_ = 0;
  bool closed_ = false;
};

}  // namespace msgtrans::test
