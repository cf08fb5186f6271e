// SPDX-License-Identifier: Apache-2.0
#include "poller.hpp"

#include <cerrno>
#include <chrono>
#include <fcntl.h>
#include <msgtrans/error.hpp>
#include <unistd.h>

namespace msgtrans::detail {

namespace {

[[noreturn]] void throw_last_error(const char* what) {
  throw boost::system::system_error(error_code(errno, boost::system::system_category()), what);
}

}  // namespace

Poller::Poller() : epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
  if (epoll_ < 0) throw_last_error("epoll_create1");
}

Poller::~Poller() {
  stop();
  ::close(epoll_);
}

epoll_event Poller::event(Watcher& watcher, bool read, bool write) noexcept {
  epoll_event wanted{};
  wanted.events =
      (read ? static_cast<std::uint32_t>(EPOLLIN) : 0U) | (write ? static_cast<std::uint32_t>(EPOLLOUT) : 0U);
  wanted.data.ptr = &watcher;
  return wanted;
}

void Poller::add(int descriptor, Watcher& watcher, bool read, bool write) {
  epoll_event wanted = event(watcher, read, write);
  if (::epoll_ctl(epoll_, EPOLL_CTL_ADD, descriptor, &wanted) != 0) throw_last_error("epoll_ctl");
}

void Poller::change(int descriptor, Watcher& watcher, bool read, bool write) noexcept {
  epoll_event wanted = event(watcher, read, write);
  ::epoll_ctl(epoll_, EPOLL_CTL_MOD, descriptor, &wanted);
}

void Poller::remove(int descriptor, Watcher& watcher) noexcept {
  ::epoll_ctl(epoll_, EPOLL_CTL_DEL, descriptor, nullptr);
  for (int i = 0; i < ready_count_; ++i) {
    auto& entry = ready_[static_cast<std::size_t>(i)];
    if (entry.data.ptr == &watcher) entry.data.ptr = nullptr;
  }
}

void Poller::resume(const asio::any_io_executor& executor) {
  if (!descriptor_) {
    // Asio closes what it holds; the instance itself must last until the sessions have left it.
    const int own = ::fcntl(epoll_, F_DUPFD_CLOEXEC, 0);
    if (own < 0) throw_last_error("fcntl");
    descriptor_.emplace(executor, own);
  }
  active_ = true;
  if (!waiting_) wait();
}

void Poller::pause() noexcept {
  active_ = false;
  error_code ignored;
  if (waiting_) descriptor_->cancel(ignored);
}

void Poller::stop() noexcept {
  active_ = false;
  descriptor_.reset();
}

void Poller::wait() {
  waiting_ = true;
  descriptor_->async_wait(asio::posix::stream_descriptor::wait_read,
                          [self = shared_from_this()](const error_code& error) {
                            self->waiting_ = false;
                            if (!self->active_) return;
                            if (error) return self->wait();  // of a pause that is over already
                            self->run_ready();
                          });
}

void Poller::run_ready() {
  // While there is something to do, ask again directly: going back through Asio costs two more system calls. Not for
  // ever: its other handlers want their turn, a stop's deadline among them, and a round may take long (TLS, a flood).
  // Never in the middle of a round: the system tells of those first again that had their turn.
  constexpr int most_rounds = 16;
  constexpr std::chrono::milliseconds longest{1};
  const auto began = std::chrono::steady_clock::now();
  for (int round = 0; round < most_rounds; ++round) {
    if (round != 0 && std::chrono::steady_clock::now() - began >= longest) break;
    ready_count_ = ::epoll_wait(epoll_, ready_.data(), batch, 0);
    if (ready_count_ <= 0) break;
    for (int i = 0; i < ready_count_; ++i) {
      const auto& entry = ready_[static_cast<std::size_t>(i)];
      if (entry.data.ptr == nullptr) continue;  // removed meanwhile
      static_cast<Watcher*>(entry.data.ptr)
          ->on_ready((entry.events & EPOLLIN) != 0, (entry.events & EPOLLOUT) != 0,
                     (entry.events & (EPOLLERR | EPOLLHUP)) != 0);
    }
  }
  ready_count_ = 0;
  if (active_ && !waiting_) wait();  // paused and resumed meanwhile, it waits already
}

}  // namespace msgtrans::detail
