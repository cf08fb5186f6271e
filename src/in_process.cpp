// SPDX-License-Identifier: Apache-2.0
#include "in_process.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <msgtrans/server_transport.hpp>
#include <mutex>
#include <utility>
#include <vector>

namespace msgtrans::detail {

namespace {

constinit thread_local PipesOfThread::Made* pipes_of_thread = nullptr;

Error system_error(int code) {
  return error_code(code, boost::system::system_category());
}

/// A client's try to connect. He gives it up by letting go of it.
struct Attempt {
  CustomTransport::Connected connected;
  std::unique_ptr<InProcessConnection> client;
  std::unique_ptr<InProcessConnection> server;
};

/// What a server's listener and its clients share. Any thread.
class Listening {
 public:
  Listening(std::string name, std::size_t backlog) : name_(std::move(name)), backlog_(backlog) {}

  [[nodiscard]] const std::string& name() const noexcept { return name_; }

  std::shared_ptr<Attempt> connect(CustomTransport::Connected connected) {
    std::unique_lock lock(mutex_);
    const std::string client = name_ + "#" + std::to_string(++count_);
    const auto attempt = std::make_shared<Attempt>();
    attempt->connected = std::move(connected);
    const auto requests = std::make_shared<Pipe>();
    const auto answers = std::make_shared<Pipe>();
    if (pipes_of_thread != nullptr) {
      (*pipes_of_thread)(client, requests);
      (*pipes_of_thread)(client, answers);
    }
    attempt->client = std::make_unique<InProcessConnection>(answers, requests, client);
    attempt->server = std::make_unique<InProcessConnection>(requests, answers, client);
    if (!stopped_ && !on_connection_ && waiting_.size() >= backlog_) {
      late_.push_back(attempt);
    } else {
      admit(lock, *attempt);
    }
    return attempt;
  }

  void start(CustomListener::OnConnection on_connection) {
    std::unique_lock lock(mutex_);
    on_connection_ = std::move(on_connection);
    for (auto& server : std::exchange(waiting_, {})) {
      const std::string client = server->name();
      on_connection_(std::move(server), client);
    }
    for (const auto& one : std::exchange(late_, {})) {
      if (const auto attempt = one.lock()) admit(lock, *attempt);
    }
  }

  void stop() noexcept {
    std::unique_lock lock(mutex_);
    stopped_ = true;
    on_connection_ = nullptr;
    waiting_.clear();
    for (const auto& one : std::exchange(late_, {})) {
      if (const auto attempt = one.lock()) admit(lock, *attempt);
    }
  }

 private:
  /// Tells the client outside of the lock. The server is told inside, lest it is told after `stop`.
  void admit(std::unique_lock<std::mutex>& lock, Attempt& attempt) {
    const bool refused = stopped_;
    if (on_connection_) {
      on_connection_(std::move(attempt.server), attempt.client->name());
    } else if (!refused) {
      waiting_.push_back(std::move(attempt.server));
    }
    lock.unlock();
    if (refused) {
      attempt.connected(system_error(ECONNREFUSED), nullptr);
    } else {
      attempt.connected({}, std::move(attempt.client));
    }
    lock.lock();
  }

  const std::string name_;
  const std::size_t backlog_;
  std::mutex mutex_;
  std::uint64_t count_ = 0;
  bool stopped_ = false;
  CustomListener::OnConnection on_connection_;                 // between start and stop
  std::vector<std::unique_ptr<InProcessConnection>> waiting_;  // until it starts
  std::vector<std::weak_ptr<Attempt>> late_;                   // more of them, whose clients wait too
};

class InProcessTransport final : public CustomTransport, public std::enable_shared_from_this<InProcessTransport> {
 public:
  std::unique_ptr<CustomListener> listen(std::string_view address, const ListenOptions& options,
                                         Error& error) override {
    auto listening = std::make_shared<Listening>(std::string(address), static_cast<std::size_t>(options.backlog));
    const std::lock_guard lock(mutex_);
    if (!servers_.try_emplace(listening->name(), listening).second) {
      error = system_error(EADDRINUSE);
      return nullptr;
    }
    return std::make_unique<Listener>(shared_from_this(), std::move(listening));
  }

  std::shared_ptr<void> connect(std::string_view address, const asio::any_io_executor&, Connected connected) override {
    std::shared_ptr<Listening> server;
    {
      const std::lock_guard lock(mutex_);
      const auto found = servers_.find(address);
      if (found != servers_.end()) server = found->second;
    }
    if (server) return server->connect(std::move(connected));
    connected(system_error(ECONNREFUSED), nullptr);
    return nullptr;
  }

 private:
  class Listener final : public CustomListener {
   public:
    Listener(std::shared_ptr<InProcessTransport> transport, std::shared_ptr<Listening> listening) noexcept
        : transport_(std::move(transport)), listening_(std::move(listening)) {}
    ~Listener() override { stop(); }

    [[nodiscard]] std::string address() const override { return listening_->name(); }
    void start(const asio::any_io_executor&, OnConnection on_connection, OnFailure) override {
      listening_->start(std::move(on_connection));
    }
    void stop() noexcept override {
      {
        const std::lock_guard lock(transport_->mutex_);
        const auto found = transport_->servers_.find(listening_->name());
        if (found != transport_->servers_.end() && found->second == listening_) transport_->servers_.erase(found);
      }
      listening_->stop();
    }

   private:
    const std::shared_ptr<InProcessTransport> transport_;
    const std::shared_ptr<Listening> listening_;
  };

  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Listening>, std::less<>> servers_;
};

}  // namespace

std::shared_ptr<CustomTransport> in_process_transport() {
  static auto* const transport = new std::shared_ptr(std::make_shared<InProcessTransport>());  // outlives all users
  return *transport;
}

PipesOfThread::PipesOfThread(Made made) : made_(std::move(made)), before_(std::exchange(pipes_of_thread, &made_)) {}

PipesOfThread::~PipesOfThread() {
  pipes_of_thread = before_;
}

// --- InProcessConnection

InProcessConnection::InProcessConnection(std::shared_ptr<Pipe> in, std::shared_ptr<Pipe> out, std::string name) noexcept
    : in_(std::move(in)), out_(std::move(out)), name_(std::move(name)) {}

/// As the system does with a socket: in order if all was read that had come, else as a reset.
InProcessConnection::~InProcessConnection() {
  out_->end(unread_.end != unread_.begin || in_->under_way() != 0);
  in_->abandon();
  // The peer keeps the pipes: it is not to tell, nor to keep, what may go with this.
  out_->set_writer({});
  in_->set_reader({});
}

void InProcessConnection::attach(ReadySignal signal) {
  out_->set_writer(signal);
  in_->set_reader(std::move(signal));
}

InProcessConnection::Status InProcessConnection::told(Status status, const Pipe& pipe) {
  return status == Status::failed ? fail(pipe.failure()) : status;
}

InProcessConnection::Status InProcessConnection::read(protocol::OutboundBlock& block, bool& more) {
  return told(in_->take(block, more), *in_);
}

InProcessConnection::Status InProcessConnection::read(std::span<std::byte> into, std::size_t& count) {
  count = 0;
  if (unread_.begin == unread_.end) {
    bool more = false;
    if (const auto status = read(unread_, more); status != Status::done) return status;
  }
  count = std::min(into.size(), unread_.end - unread_.begin);
  std::memcpy(into.data(), unread_.bytes().data(), count);
  unread_.begin += count;
  if (unread_.begin == unread_.end) unread_ = {};
  return Status::done;
}

InProcessConnection::Status InProcessConnection::room(std::size_t& bytes, bool& exact) {
  return told(out_->room(bytes, exact), *out_);
}

InProcessConnection::Status InProcessConnection::write(std::span<const iovec> pieces, std::size_t& taken) {
  taken = 0;
  for (const auto& piece : pieces) {
    const std::span bytes(static_cast<const std::byte*>(piece.iov_base), piece.iov_len);
    for (std::size_t done = 0; done != bytes.size();) {
      std::size_t most = 0;
      bool exact = false;
      if (const auto status = room(most, exact); status != Status::done) return status;
      most = std::min(most, bytes.size() - done);
      protocol::OutboundBlock block{wire::Buffer(most), {}, 0, most};
      std::memcpy(block.own.data(), bytes.data() + done, most);
      write(block);
      done += most;
      taken += most;
    }
  }
  return Status::done;
}

InProcessConnection::Status InProcessConnection::shut_down(const Error&) {
  out_->end(false);
  return Status::done;
}

void InProcessConnection::reset() noexcept {
  out_->end(true);
  in_->abandon();
}

}  // namespace msgtrans::detail
