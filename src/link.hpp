// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "descriptor.hpp"
#include "poller.hpp"

#include <atomic>
#include <cstdint>
#include <memory>
#include <msgtrans/lockfree/intrusive_inbox.hpp>
#include <msgtrans/transport/connection.hpp>

namespace msgtrans::detail {

class Shard;

/// What a connection without a socket of the library's says of itself, on its way to whoever watches it on the shard.
class ReadyState final : public lockfree::InboxNode<ReadyState>, public std::enable_shared_from_this<ReadyState> {
 public:
  /// Attaches `connection`, which is to be of that shard.
  static std::shared_ptr<ReadyState> attach(std::shared_ptr<Shard> shard, Connection& connection);

  explicit ReadyState(std::shared_ptr<Shard> shard);
  ~ReadyState();

  // --- any thread

  static constexpr std::uint8_t readable = 1;
  static constexpr std::uint8_t writable = 2;

  void tell(std::uint8_t what) noexcept;
  [[nodiscard]] const asio::any_io_executor& executor() const noexcept;

  // --- on the shard

  /// What was said while nobody watched for it is told again.
  void watch(Poller::Watcher* watcher, bool read, bool write) noexcept;
  /// Tells the watcher; then this may be gone.
  void deliver() noexcept;
  /// Instead, after the shard's end.
  void discard() noexcept { keep_.reset(); }

 private:
  const std::shared_ptr<Shard> shard_;
  // What was said since `deliver` took it. Whoever makes it other than 0 puts this into the shard's inbox, and is the
  // only one to do so until `deliver` has made it 0 again: the inbox holds this at most once. Acquire and release, so
  // that who puts it in sees that it was taken out, and `deliver` what was done before it was said.
  std::atomic<std::uint8_t> said_{0};
  std::shared_ptr<ReadyState> keep_;  // itself, while it is in the inbox
  Poller::Watcher* watcher_ = nullptr;
  std::uint8_t watched_ = 0;
};

/// What carries a session's packets: a socket, a socket and what stands between it and the packets, or something that
/// is no socket of ours.
struct Link {
  Descriptor socket = {};
  std::unique_ptr<Connection> connection = {};  // null: the packets are the socket's bytes
  std::shared_ptr<ReadyState> ready = {};       // set if there is no socket

  /// \throws boost::system::system_error when the system has no room for it.
  void watch(Poller& poller, Poller::Watcher& watcher, bool read, bool write) const;
  /// Of what is watched.
  void change_watch(Poller& poller, Poller::Watcher& watcher, bool read, bool write) const noexcept;
  /// No call of the watcher follows.
  void end_watch(Poller& poller, Poller::Watcher& watcher) const noexcept;
};

}  // namespace msgtrans::detail
