// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "descriptor.hpp"
#include "peer.hpp"
#include "shard.hpp"

#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <functional>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <optional>
#include <string>
#include <sys/stat.h>
#include <vector>

namespace msgtrans::detail {

/// The addresses of an endpoint; a name is looked up, which blocks. Empty: `error` says why.
[[nodiscard]] std::vector<asio::ip::tcp::endpoint> look_up(const Endpoint& endpoint, bool for_listening, Error& error);

/// Sets the session's options on a connected, non-blocking socket.
void prepare(int descriptor, const SessionOptions& options) noexcept;

/// The file of a listening Unix socket: removed with this, if it is still the same.
class SocketFile {
 public:
  SocketFile() noexcept = default;
  SocketFile(std::string path, const struct stat& made) : path_(std::move(path)), made_(made) {}
  SocketFile(SocketFile&& other) noexcept : path_(std::exchange(other.path_, {})), made_(other.made_) {}
  SocketFile& operator=(SocketFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(made_, other.made_);
    return *this;
  }
  ~SocketFile() { remove(); }

  void remove() noexcept;

 private:
  std::string path_;  // empty: none
  struct stat made_ {};
};

/// A shard's listening socket, or the one that accepts for several shards.
class Acceptor : public std::enable_shared_from_this<Acceptor> {
 public:
  /// Called on the shard for each connection.
  using OnConnection = std::function<void(Descriptor socket, Peer peer)>;
  using OnFailure = std::function<void(Error)>;

  /// `socket` is bound and listens.
  Acceptor(std::shared_ptr<Shard> shard, Descriptor socket, Transport transport);
  ~Acceptor();
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  /// On the shard.
  void start(OnConnection on_connection, OnFailure on_failure);
  void stop() noexcept;
  /// Any thread, while the shard has not been started.
  void close_unstarted() noexcept;

 private:
  void wait();
  void accept_all();
  void fail(Error error);

  std::shared_ptr<Shard> shard_;
  Descriptor socket_;  // until it is started
  const Transport transport_;
  std::optional<asio::posix::stream_descriptor> listening_;
  std::optional<Timer> retry_;
  OnConnection on_connection_;
  OnFailure on_failure_;
};

/// `count` sockets that listen on the same address, each for one shard. Refuses an address that somebody else listens
/// on, also if he would share it. `bound` becomes the address with the real port.
[[nodiscard]] std::vector<Descriptor> listen_tcp(const asio::ip::tcp::endpoint& address, std::size_t count, int backlog,
                                                 asio::ip::tcp::endpoint& bound, Error& error);

/// A listening Unix socket; none: `error` says why. A file that a dead server has left there is replaced; anything else
/// there is an error. `permissions` of the file, before anybody can connect; 0: as the umask says.
[[nodiscard]] Descriptor listen_unix(const Endpoint& endpoint, int backlog, unsigned permissions, SocketFile& file,
                                     Error& error);

/// A connected, non-blocking Unix socket; none: the reason is in `code`, and is `would_block` if the server's queue of
/// connections is full.
[[nodiscard]] Descriptor connect_unix(const Endpoint& endpoint, error_code& code);

/// Of the other end of a Unix socket; zeros if the system does not say.
[[nodiscard]] PeerCredentials credentials_of(int descriptor) noexcept;

}  // namespace msgtrans::detail
