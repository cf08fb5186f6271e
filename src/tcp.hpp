// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "session_state.hpp"

#include <boost/asio/ip/tcp.hpp>
#include <functional>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <optional>
#include <vector>

namespace msgtrans::detail {

[[nodiscard]] Endpoint to_endpoint(const asio::ip::tcp::endpoint& address);

/// The addresses of an endpoint; a name is looked up, which blocks. Empty: `error` says why.
[[nodiscard]] std::vector<asio::ip::tcp::endpoint> look_up(const Endpoint& endpoint, bool for_listening, Error& error);

/// Sets the session's options on a connected, non-blocking socket.
void prepare(int descriptor, const SessionOptions& options) noexcept;

/// One shard's listening socket.
class TcpAcceptor : public std::enable_shared_from_this<TcpAcceptor> {
 public:
  /// Called on the shard for each connection.
  using OnConnection = std::function<void(Descriptor socket, const asio::ip::tcp::endpoint& peer)>;
  using OnFailure = std::function<void(Error)>;

  /// `descriptor` is bound and listens.
  TcpAcceptor(std::shared_ptr<Shard> shard, int descriptor, bool ipv6);
  ~TcpAcceptor();
  TcpAcceptor(const TcpAcceptor&) = delete;
  TcpAcceptor& operator=(const TcpAcceptor&) = delete;

  /// On the shard.
  void start(OnConnection on_connection, OnFailure on_failure);
  void stop() noexcept;
  /// Any thread, while the shard has not been started.
  void close_unstarted() noexcept;

 private:
  void wait();
  void accept_all();

  std::shared_ptr<Shard> shard_;
  int descriptor_;
  bool ipv6_;
  std::optional<asio::ip::tcp::acceptor> acceptor_;
  std::optional<asio::steady_timer> retry_;
  OnConnection on_connection_;
  OnFailure on_failure_;
};

/// `count` sockets that listen on the same address, each for one shard. Refuses an address that somebody else listens
/// on, also if he would share it. `bound` becomes the address with the real port.
[[nodiscard]] std::vector<int> listen_tcp(const asio::ip::tcp::endpoint& address, std::size_t count, int backlog,
                                          asio::ip::tcp::endpoint& bound, Error& error);

}  // namespace msgtrans::detail
