// SPDX-License-Identifier: Apache-2.0
#include "link.hpp"

#include "shard.hpp"

#include <exception>
#include <utility>

namespace msgtrans {

void ReadySignal::readable() const noexcept {
  if (state_) state_->tell(detail::ReadyState::readable);
}

void ReadySignal::writable() const noexcept {
  if (state_) state_->tell(detail::ReadyState::writable);
}

const detail::asio::any_io_executor& ReadySignal::executor() const {
  static const detail::asio::any_io_executor none;
  return state_ ? state_->executor() : none;
}

namespace detail {

std::shared_ptr<ReadyState> ReadyState::attach(std::shared_ptr<Shard> shard, Connection& connection) {
  auto state = std::make_shared<ReadyState>(std::move(shard));
  connection.attach(ReadySignal(state));
  return state;
}

ReadyState::ReadyState(std::shared_ptr<Shard> shard) : shard_(std::move(shard)) {}

ReadyState::~ReadyState() = default;

const asio::any_io_executor& ReadyState::executor() const noexcept {
  return shard_->executor();
}

void ReadyState::tell(std::uint8_t what) noexcept {
  if (said_.fetch_or(what, std::memory_order_acq_rel) != 0) return;
  keep_ = shared_from_this();
  if (!shard_->post(*this)) keep_.reset();  // for good: nobody is there to be told any more
}

void ReadyState::deliver() noexcept {
  const auto keep = std::move(keep_);
  const auto said = static_cast<std::uint8_t>(said_.exchange(0, std::memory_order_acq_rel) & watched_);
  if (watcher_ != nullptr && said != 0) watcher_->on_ready((said & readable) != 0, (said & writable) != 0, false);
}

void ReadyState::watch(Poller::Watcher* watcher, bool read, bool write) noexcept {
  const auto wanted = static_cast<std::uint8_t>((read ? readable : 0) | (write ? writable : 0));
  const auto fresh = static_cast<std::uint8_t>(watcher == watcher_ ? wanted & ~watched_ : wanted);
  watcher_ = watcher;
  watched_ = wanted;
  if (fresh != 0) tell(fresh);
}

void Link::watch(Poller& poller, Poller::Watcher& watcher, bool read, bool write) const {
  if (ready) return ready->watch(&watcher, read, write);
  poller.add(socket.get(), watcher, read, write);
}

void Link::change_watch(Poller& poller, Poller::Watcher& watcher, bool read, bool write) const noexcept {
  if (ready) return ready->watch(&watcher, read, write);
  poller.change(socket.get(), watcher, read, write);
}

void Link::end_watch(Poller& poller, Poller::Watcher& watcher) const noexcept {
  if (ready) return ready->watch(nullptr, false, false);
  poller.remove(socket.get(), watcher);
}

}  // namespace detail

}  // namespace msgtrans
