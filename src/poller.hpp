// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <functional>
#include <memory>
#include <msgtrans/detail/asio.hpp>
#include <optional>
#include <sys/epoll.h>

namespace msgtrans::detail {

/// Tells a shard's sessions when their descriptors are ready.
///
/// An epoll instance of our own, which Asio waits for as one descriptor. Asio's `async_wait` on each socket costs an
/// epoll_ctl and an allocation a wait, an eighth of the server's time in a pipelined echo; a level-triggered
/// registration that lasts costs neither. On the shard only.
class Poller : public std::enable_shared_from_this<Poller> {
 public:
  class Watcher {
   public:
    /// `broken`: the connection is gone both ways, whatever was asked for.
    virtual void on_ready(bool readable, bool writable, bool broken) = 0;

   protected:
    ~Watcher() = default;
  };

  Poller();
  ~Poller();
  Poller(const Poller&) = delete;
  Poller& operator=(const Poller&) = delete;

  /// \throws boost::system::system_error when the system has no room for it.
  void add(int descriptor, Watcher& watcher, bool read, bool write);
  void change(int descriptor, Watcher& watcher, bool read, bool write) noexcept;
  /// No call of the watcher follows.
  void remove(int descriptor, Watcher& watcher) noexcept;

  /// Waits, on that executor, from the first `resume` to `pause`; between them the executor has work.
  void resume(const asio::any_io_executor& executor);
  void pause() noexcept;
  /// Before the executor's context may go.
  void stop() noexcept;

 private:
  static constexpr int batch = 128;

  void wait();
  void run_ready();
  [[nodiscard]] static epoll_event event(Watcher& watcher, bool read, bool write) noexcept;

  int epoll_;
  bool active_ = false;   // between resume and pause
  bool waiting_ = false;  // Asio has our wait
  std::optional<asio::posix::stream_descriptor> descriptor_;
  std::array<epoll_event, batch> ready_;
  int ready_count_ = 0;  // of ready_, while they are told
};

}  // namespace msgtrans::detail
