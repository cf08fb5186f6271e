// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "link.hpp"
#include "poller.hpp"
#include "session_state.hpp"
#include "shard.hpp"

#include <chrono>
#include <functional>
#include <memory>
#include <msgtrans/error.hpp>

namespace msgtrans::detail {

/// A connection that has to agree on something with its peer before it is a session's. Its shard holds it from `start`
/// until it is over. On the shard.
class Handshake final : public std::enable_shared_from_this<Handshake>, private Poller::Watcher {
 public:
  /// Called once, never inside of `start`: with the link if there is no error.
  using Done = std::function<void(Error error, Link link)>;

  Handshake(std::shared_ptr<Shard> shard, Link link, Done done);
  ~Handshake();
  Handshake(const Handshake&) = delete;
  Handshake& operator=(const Handshake&) = delete;

  /// `timeout` zero: none. \throws std::bad_alloc, boost::system::system_error; then `done` is not called.
  void start(std::chrono::milliseconds timeout);
  /// Instead of `start`, for a peer that is to be told that it is refused, and let go in order: by the handshake
  /// itself, which is to fail, or without one (`ends_now`) by the end of the connection. `done` is told that it has
  /// failed. False, and nothing has been done, if that many are on their way already. \throws as `start`.
  bool refuse(bool ends_now);
  /// Gives it up at once; `done` gets that error unless it has been called.
  void end(const Error& why) noexcept;

 private:
  struct Timer final : ShardTimer {
    explicit Timer(Handshake& owner) noexcept : handshake(owner) {}
    void expired() override { handshake.expired(); }
    Handshake& handshake;
  };

  void on_ready(bool readable, bool writable, bool broken) override;
  void step();
  void expired() noexcept;
  void failed(Error error) noexcept;
  void discard() noexcept;
  void tell(Error error, Link link) noexcept;
  void leave() noexcept;

  std::shared_ptr<Shard> shard_;
  Link link_;
  Done done_;  // null once called: then what is left is to let the peer read why
  Timer timer_;
  std::chrono::milliseconds timeout_{0};
  bool watching_write_ = false;
  bool watched_ = false;
  bool refuses_ = false;  // and is counted by the shard
};

}  // namespace msgtrans::detail
