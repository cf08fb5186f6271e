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
#include <mutex>
#include <optional>
#include <string>
#include <sys/stat.h>
#include <vector>

namespace msgtrans::detail {

/// The addresses of an endpoint; a name is looked up, which blocks. Empty: `error` says why.
[[nodiscard]] std::vector<asio::ip::tcp::endpoint> look_up(const Endpoint& endpoint, bool for_listening, Error& error);

/// Sets the session's options on a connected, non-blocking socket.
void prepare(int descriptor, const SessionOptions& options) noexcept;

/// What a socket is bound to: with `Transport::tcp` if it has a port, or `Transport::unix_socket`.
[[nodiscard]] Endpoint bound_address(int descriptor, Error& error);

/// Makes a stream socket from elsewhere ready to accept: checks that it is one, bound, and of the kind that
/// `transport` needs; has it listen if it does not yet; makes it non-blocking. Whoever holds it too sees that.
/// \returns what it is bound to; none: `error` says why.
[[nodiscard]] std::optional<Endpoint> prepare_listening(int descriptor, Transport transport, int backlog, Error& error);

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
  /// It stays, whatever happens to this.
  void leave() noexcept { path_.clear(); }
  [[nodiscard]] bool owned() const noexcept { return !path_.empty(); }
  /// What is there now; none: `error` says why.
  [[nodiscard]] static std::optional<SocketFile> of(const std::string& path, Error& error);

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

  /// `socket` is bound and listens; or there is none, and it is still to be taken.
  Acceptor(std::shared_ptr<Shard> shard, Descriptor socket, Transport transport);
  ~Acceptor();
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  // --- on the shard

  void start(OnConnection on_connection, OnFailure on_failure);
  /// Accepts what waits by now, but not without end, should more come all the time.
  void accept_rest();
  void stop() noexcept;

  // --- any thread

  [[nodiscard]] const std::shared_ptr<Shard>& shard() const noexcept { return shard_; }
  /// Another descriptor of the socket; none if it is closed, or the system has none left (errno says so).
  [[nodiscard]] Descriptor duplicate() const noexcept;
  /// While the shard has not been started.
  void close_unstarted() noexcept;
  void take(Descriptor socket) noexcept { socket_ = std::move(socket); }

 private:
  void wait();
  void accept_all();
  /// \returns false if none waits, or none can be had now.
  bool accept_one();
  void close() noexcept;
  void fail(Error error);

  std::shared_ptr<Shard> shard_;
  mutable std::mutex mutex_;  // of closing it
  Descriptor socket_;
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
