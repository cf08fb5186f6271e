// SPDX-License-Identifier: Apache-2.0
// A transport of one's own: `pipe://name` connects two ends of one process by a pair of the system's pipes.
#pragma once

#include <boost/asio/posix/stream_descriptor.hpp>
#include <csignal>
#include <fcntl.h>
#include <map>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/transport/custom_transport.hpp>
#include <mutex>
#include <unistd.h>

namespace example {

using Descriptor = boost::asio::posix::stream_descriptor;
inline msgtrans::error_code last_error() {
  return {errno, boost::system::system_category()};
}

/// One end: reads from one pipe, writes to the other. The calls come on one thread, and none may wait: what would have
/// to is answered by `blocked`, and Asio tells the signal when it would not any more.
class PipeConnection final : public msgtrans::Connection {
 public:
  PipeConnection(int in, int out, std::string name) : in_(in), out_(out), name_(std::move(name)) {}
  ~PipeConnection() override {
    if (in_ >= 0) ::close(in_);  // never attached
    if (out_ >= 0) ::close(out_);
  }
  [[nodiscard]] const std::string& name() const { return name_; }
  void attach(msgtrans::ReadySignal signal) override {
    reader_.emplace(signal.executor(), in_), in_ = -1;
    writer_.emplace(signal.executor(), out_), out_ = -1;
    signal_ = std::move(signal);
  }
  Status read(std::span<std::byte> into, std::size_t& count) override {
    const ssize_t result = ::read(reader_->native_handle(), into.data(), into.size());
    if (result == 0) return Status::ended;
    if (result < 0) return wait(*reader_, Descriptor::wait_read, read_waits_);
    count = static_cast<std::size_t>(result);
    return Status::done;
  }
  Status write(std::span<const iovec> pieces, std::size_t& taken) override {
    if (!writer_) return fail(msgtrans::Errc::closed);
    const ssize_t result = ::writev(writer_->native_handle(), pieces.data(), static_cast<int>(pieces.size()));
    if (result < 0) return wait(*writer_, Descriptor::wait_write, write_waits_);
    taken = static_cast<std::size_t>(result);
    return Status::done;
  }
  Status shut_down(const msgtrans::Error&) override {
    writer_.reset();
    return Status::done;
  }
  /// A pipe does not tell its writer what was read: the peer's end says that all was.
  [[nodiscard]] bool awaits_peers_end() const noexcept override { return true; }

 private:
  Status wait(Descriptor& descriptor, Descriptor::wait_type what, const std::shared_ptr<bool>& waits) {
    if (errno != EAGAIN && errno != EINTR) return fail(last_error());
    if (std::exchange(*waits, true)) return Status::blocked;
    // The handler may run when this is gone: it has what it needs.
    descriptor.async_wait(what, [signal = signal_, waits, what](msgtrans::error_code error) {
      *waits = false;
      if (error) return;
      what == Descriptor::wait_read ? signal.readable() : signal.writable();
    });
    return Status::blocked;
  }

  int in_, out_;  // until it is attached
  const std::string name_;
  msgtrans::ReadySignal signal_;
  std::optional<Descriptor> reader_, writer_;
  const std::shared_ptr<bool> read_waits_ = std::make_shared<bool>(), write_waits_ = std::make_shared<bool>();
};

class PipeTransport final : public msgtrans::CustomTransport {
 public:
  PipeTransport() { std::signal(SIGPIPE, SIG_IGN); }  // a pipe knows no MSG_NOSIGNAL

  std::unique_ptr<msgtrans::CustomListener> listen(std::string_view address, const msgtrans::ListenOptions&,
                                                   msgtrans::Error& error) override {
    const auto server = std::make_shared<Server>();
    const std::lock_guard lock(mutex_);
    if (auto& place = servers_[std::string(address)]; place.expired()) {
      place = server;
      return std::make_unique<Listener>(std::string(address), server);
    }
    error = msgtrans::error_code(EADDRINUSE, boost::system::system_category());
    return nullptr;
  }

  std::shared_ptr<void> connect(std::string_view address, const boost::asio::any_io_executor&,
                                Connected connected) override {
    const std::lock_guard lock(mutex_);
    const auto found = servers_.find(address);
    const auto server = found == servers_.end() ? nullptr : found->second.lock();
    int there[2], back[2];
    errno = ECONNREFUSED;
    if (!server || ::pipe2(there, O_NONBLOCK | O_CLOEXEC) != 0) return connected(last_error(), nullptr), nullptr;
    if (::pipe2(back, O_NONBLOCK | O_CLOEXEC) != 0) {
      connected(last_error(), nullptr);
      return ::close(there[0]), ::close(there[1]), nullptr;
    }
    const std::string name = found->first + "#" + std::to_string(++count_);
    server->take(std::make_unique<PipeConnection>(there[0], back[1], name), name);
    return connected({}, std::make_unique<PipeConnection>(back[0], there[1], name)), nullptr;
  }

 private:
  /// Where connections wait until the server runs.
  struct Server {
    void take(std::unique_ptr<msgtrans::Connection> connection, const std::string& name) {
      const std::lock_guard lock(mutex);
      if (stopped) return;  // the client sees the end
      if (on_connection) return on_connection(std::move(connection), name);
      waiting.emplace_back(std::move(connection), name);
    }
    std::mutex mutex;
    bool stopped = false;
    msgtrans::CustomListener::OnConnection on_connection;
    std::vector<std::pair<std::unique_ptr<msgtrans::Connection>, std::string>> waiting;
  };

  class Listener final : public msgtrans::CustomListener {
   public:
    Listener(std::string address, std::shared_ptr<Server> server) : address_(std::move(address)), server_(server) {}
    [[nodiscard]] std::string address() const override { return address_; }
    void start(const boost::asio::any_io_executor&, OnConnection on_connection, OnFailure) override {
      const std::lock_guard lock(server_->mutex);
      server_->on_connection = std::move(on_connection);
      for (auto& [connection, name] : server_->waiting) server_->on_connection(std::move(connection), name);
    }
    void stop() noexcept override {
      const std::lock_guard lock(server_->mutex);
      server_->stopped = true;
    }

   private:
    const std::string address_;
    const std::shared_ptr<Server> server_;
  };

  std::mutex mutex_;
  std::map<std::string, std::weak_ptr<Server>, std::less<>> servers_;
  unsigned count_ = 0;
};

}  // namespace example
