// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "custom_transports.hpp"
#include "in_process.hpp"
#include "link.hpp"
#include "pipe_transport.hpp"
#include "shard.hpp"
#include "wait.hpp"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/transport/connection.hpp>
#include <msgtrans/transport/custom_transport.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace msgtrans::test {

inline bool has_socket(const Endpoint& endpoint) {
  return endpoint.transport != Transport::in_process && endpoint.transport != Transport::custom;
}

/// What a test's peer is where the transport has no sockets: a connection, whose calls are all made on one thread.
class SocketlessPeer final : private detail::Poller::Watcher {
 public:
  using Status = Connection::Status;

  /// For all of them.
  static const std::shared_ptr<detail::Shard>& shard() {
    // To the end of the process, on a thread that is not counted as the library's.
    static auto* const context = new detail::asio::io_context(1);
    static const auto* const shared = [] {
      auto* const made = new std::shared_ptr(std::make_shared<detail::Shard>(context->get_executor()));
      std::thread([keep = detail::asio::make_work_guard(*context)] { context->run(); }).detach();
      return made;
    }();
    return *shared;
  }
  /// Runs `f` on the shard, and waits for it.
  static void run(const std::function<void()>& f) {
    std::promise<void> done;
    shard()->post([&] {
      f();
      done.set_value();
    });
    done.get_future().wait();
  }

  static std::unique_ptr<SocketlessPeer> connect(const Endpoint& to) {
    struct Result {
      std::promise<void> done;
      Error error;
      std::unique_ptr<Connection> connection;
    };
    const auto result = std::make_shared<Result>();
    std::shared_ptr<void> attempt;
    run([&] {
      attempt = detail::custom_transport_of(to)->connect(to.path, shard()->executor(),
                                                         [result](Error error, std::unique_ptr<Connection> made) {
                                                           result->error = std::move(error);
                                                           result->connection = std::move(made);
                                                           result->done.set_value();
                                                         });
    });
    const bool in_time = result->done.get_future().wait_for(patience) == std::future_status::ready;
    run([&] { attempt.reset(); });
    if (!in_time) throw std::runtime_error("cannot connect in time");
    if (result->error) throw std::runtime_error("cannot connect: " + result->error.message());
    return std::make_unique<SocketlessPeer>(std::move(result->connection));
  }

  explicit SocketlessPeer(std::unique_ptr<Connection> connection) {
    if (const auto* const one = dynamic_cast<detail::InProcessConnection*>(connection.get())) name_ = one->name();
    if (const auto* const one = dynamic_cast<example::PipeConnection*>(connection.get())) name_ = one->name();
    link_.connection = std::move(connection);
    run([this] {
      link_.ready = detail::ReadyState::attach(shard(), *link_.connection);
      link_.ready->watch(this, true, true);
    });
  }
  ~SocketlessPeer() {
    run([this] {
      link_.ready->watch(nullptr, false, false);
      link_ = {};
    });
  }

  /// How the other end knows this.
  [[nodiscard]] const std::string& name() const noexcept { return name_; }

  Status write(std::span<const std::byte> bytes, std::size_t& count) {
    const iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
    Status status{};
    run([&] { status = bytes.empty() ? link_.connection->flush() : link_.connection->write({&piece, 1}, count); });
    return status;
  }
  [[nodiscard]] bool wants_write() const {
    bool wants = false;
    run([&] { wants = link_.connection->wants_write(); });
    return wants;
  }
  void shut_down() {
    run([this] { (void)link_.connection->shut_down(Errc::closed_by_user); });
  }
  void reset() {
    run([this] {
      if (auto* const one = dynamic_cast<detail::InProcessConnection*>(link_.connection.get())) one->reset();
    });
  }

  /// Appends to `into`; false at the end. Throws if nothing comes in time.
  bool read_some(std::vector<std::byte>& into, std::chrono::milliseconds within) {
    const auto deadline = Clock::now() + within;
    for (;;) {
      const unsigned seen = count_of(readable_);
      const Status status = read(into);
      if (status != Status::blocked) return status == Status::done;
      if (!wait_for(readable_, seen, deadline)) {
        throw std::runtime_error("the other end neither sends nor takes anything in time");
      }
    }
  }
  /// True if bytes have come, or the end.
  bool has_input(std::vector<std::byte>& into, std::chrono::milliseconds within) {
    try {
      read_some(into, within);
      return true;
    } catch (const std::runtime_error&) {
      return false;
    }
  }
  [[nodiscard]] unsigned writable_seen() { return count_of(writable_); }
  /// Until it was said to be writable again.
  bool wait_writable(unsigned seen, std::chrono::milliseconds within) {
    return wait_for(writable_, seen, Clock::now() + within);
  }

 private:
  void on_ready(bool readable, bool writable, bool) override {
    const std::lock_guard lock(mutex_);
    readable_ += readable ? 1 : 0;
    writable_ += writable ? 1 : 0;
    changed_.notify_all();
  }
  Status read(std::vector<std::byte>& into) {
    Status status{};
    std::vector<std::byte> buffer(64 * 1024);
    run([&] {
      std::size_t count = 0;
      status = link_.connection->read(buffer, count);
      into.insert(into.end(), buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(count));
    });
    return status;
  }
  unsigned count_of(const unsigned& counter) {
    const std::lock_guard lock(mutex_);
    return counter;
  }
  bool wait_for(const unsigned& counter, unsigned seen, Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    return changed_.wait_until(lock, deadline, [&] { return counter != seen; });
  }

  detail::Link link_;
  std::string name_;
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned readable_ = 0;
  unsigned writable_ = 0;
};

/// Likewise, for clients. It accepts from the first `accept` on.
class SocketlessListener {
 public:
  SocketlessListener(const Endpoint& endpoint, int backlog) {
    Error error;
    listener_ = detail::custom_transport_of(endpoint)->listen(endpoint.path, {.backlog = backlog}, error);
    if (!listener_) throw std::runtime_error("cannot listen: " + error.message());
  }
  ~SocketlessListener() {
    SocketlessPeer::run([this] { listener_->stop(); });
    SocketlessPeer::run([this] { listener_.reset(); });
  }
  SocketlessListener(const SocketlessListener&) = delete;
  SocketlessListener& operator=(const SocketlessListener&) = delete;

  std::unique_ptr<SocketlessPeer> accept(std::chrono::milliseconds within) {
    if (!std::exchange(started_, true)) {
      SocketlessPeer::run([this] {
        listener_->start(
            SocketlessPeer::shard()->executor(),
            [this](std::unique_ptr<Connection> connection, const std::string&) {
              const std::lock_guard lock(mutex_);
              accepted_.push_back(std::move(connection));
              changed_.notify_all();
            },
            [](const Error&) {});
      });
    }
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, within, [this] { return !accepted_.empty(); })) {
      throw std::runtime_error("nobody connects");
    }
    auto connection = std::move(accepted_.front());
    accepted_.pop_front();
    lock.unlock();
    return std::make_unique<SocketlessPeer>(std::move(connection));
  }

 private:
  std::unique_ptr<CustomListener> listener_;
  bool started_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<Connection>> accepted_;
};

}  // namespace msgtrans::test
