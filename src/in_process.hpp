// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "pipe.hpp"

#include <cstddef>
#include <functional>
#include <memory>
#include <msgtrans/protocol/outbound_queue.hpp>
#include <msgtrans/transport/connection.hpp>
#include <msgtrans/transport/custom_transport.hpp>
#include <span>
#include <string>
#include <utility>

namespace msgtrans::detail {

/// One end of a connection within the process: in order, without loss and bounded, as a stream socket.
class InProcessConnection final : public Connection {
 public:
  InProcessConnection(std::shared_ptr<Pipe> in, std::shared_ptr<Pipe> out, std::string name) noexcept;
  ~InProcessConnection() override;

  void attach(ReadySignal signal) override;
  Status read(std::span<std::byte> into, std::size_t& count) override;
  Status write(std::span<const iovec> pieces, std::size_t& taken) override;
  [[nodiscard]] std::size_t unacknowledged() const noexcept override {
    const std::size_t bytes = out_->under_way();
    return bytes == 0 ? 0 : bytes + 1;  // the end, which counts as one
  }
  Status shut_down(const Error& reason) override;

  /// How the server knows the client.
  [[nodiscard]] const std::string& name() const noexcept { return name_; }

  // --- without copying

  /// As `Pipe::take`.
  Status read(protocol::OutboundBlock& block, bool& more);
  /// As `Pipe::room`, then `write` that many.
  Status room(std::size_t& bytes, bool& exact);
  void write(protocol::OutboundBlock& block) noexcept { out_->push(block); }

  /// Ends both directions at once, as the reset of a socket does.
  void reset() noexcept;

 private:
  Status told(Status status, const Pipe& pipe);

  const std::shared_ptr<Pipe> in_;
  const std::shared_ptr<Pipe> out_;
  const std::string name_;
  protocol::OutboundBlock unread_;  // of the `read` that copies
};

/// `inproc://name`.
[[nodiscard]] std::shared_ptr<CustomTransport> in_process_transport();

/// While it lives it is shown the pipes of each connection that the thread makes within the process; a test kit's.
class PipesOfThread {
 public:
  using Made = std::function<void(const std::string& client, const std::shared_ptr<Pipe>& pipe)>;

  explicit PipesOfThread(Made made);
  ~PipesOfThread();
  PipesOfThread(const PipesOfThread&) = delete;
  PipesOfThread& operator=(const PipesOfThread&) = delete;

 private:
  Made made_;
  Made* before_;
};

}  // namespace msgtrans::detail
