// SPDX-License-Identifier: Apache-2.0
#include "tcp.hpp"

#include <boost/asio/error.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <cerrno>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>
#include <utility>

namespace msgtrans::detail {

using asio::ip::tcp;

namespace {

error_code last_error() noexcept {
  return {errno, boost::system::system_category()};
}

void close_all(std::vector<int>& descriptors) noexcept {
  for (const int descriptor : descriptors) ::close(descriptor);
  descriptors.clear();
}

}  // namespace

Endpoint to_endpoint(const tcp::endpoint& address) {
  return {Transport::tcp, address.address().to_string(), address.port()};
}

std::vector<tcp::endpoint> look_up(const Endpoint& endpoint, bool for_listening, Error& error) {
  error_code code;
  if (const auto address = asio::ip::make_address(endpoint.host, code); !code) {
    return {tcp::endpoint(address, endpoint.port)};
  }
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = for_listening ? AI_PASSIVE : AI_ADDRCONFIG;
  addrinfo* list = nullptr;
  const int status = ::getaddrinfo(endpoint.host.c_str(), nullptr, &hints, &list);
  std::vector<tcp::endpoint> found;
  for (const addrinfo* entry = list; entry != nullptr; entry = entry->ai_next) {
    tcp::endpoint address;
    if (entry->ai_addrlen > address.capacity()) continue;
    address.resize(entry->ai_addrlen);
    std::copy_n(reinterpret_cast<const std::byte*>(entry->ai_addr), entry->ai_addrlen,
                reinterpret_cast<std::byte*>(address.data()));
    address.port(endpoint.port);
    found.push_back(address);
  }
  if (list != nullptr) ::freeaddrinfo(list);
  if (found.empty()) {
    error = Error(asio::error::host_not_found,
                  "cannot look up \"" + endpoint.host + "\": " + (status != 0 ? ::gai_strerror(status) : "no address"));
  }
  return found;
}

void prepare(int descriptor, const SessionOptions& options) noexcept {
  if (!options.no_delay) return;
  const int on = 1;
  ::setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

std::vector<int> listen_tcp(const tcp::endpoint& address, std::size_t count, int backlog, tcp::endpoint& bound,
                            Error& error) {
  std::vector<int> descriptors;
  bound = address;
  const auto fail = [&](const char* what) {
    const error_code code = last_error();
    error = Error(code, std::string("cannot ") + what + " " + to_endpoint(bound).to_string() + ": " + code.message());
    close_all(descriptors);
    return descriptors;
  };
  for (std::size_t i = 0; i < count; ++i) {
    const int descriptor =
        ::socket(address.protocol().family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP);
    if (descriptor < 0) return fail("open a socket for");
    descriptors.push_back(descriptor);
    const int on = 1;
    ::setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address.protocol() == tcp::v6()) ::setsockopt(descriptor, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    // The first one binds without sharing, so that another server on this address is an error and not a silent
    // partner; only then it lets its own siblings in.
    if (i != 0 && ::setsockopt(descriptor, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on) != 0) return fail("share");
    if (::bind(descriptor, bound.data(), static_cast<socklen_t>(bound.size())) != 0) return fail("bind");
    if (i == 0) {
      if (count > 1 && ::setsockopt(descriptor, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on) != 0) return fail("share");
      auto size = static_cast<socklen_t>(bound.capacity());
      if (::getsockname(descriptor, bound.data(), &size) != 0) return fail("ask the name of");
      bound.resize(size);
    }
    if (::listen(descriptor, backlog) != 0) return fail("listen on");
  }
  return descriptors;
}

TcpAcceptor::TcpAcceptor(std::shared_ptr<Shard> shard, int descriptor, bool ipv6)
    : shard_(std::move(shard)), descriptor_(descriptor), ipv6_(ipv6) {}

TcpAcceptor::~TcpAcceptor() {
  close_unstarted();
}

void TcpAcceptor::close_unstarted() noexcept {
  if (!acceptor_ && descriptor_ >= 0) ::close(std::exchange(descriptor_, -1));
}

void TcpAcceptor::start(OnConnection on_connection, OnFailure on_failure) {
  on_connection_ = std::move(on_connection);
  on_failure_ = std::move(on_failure);
  acceptor_.emplace(shard_->executor());
  error_code code;
  acceptor_->assign(ipv6_ ? tcp::v6() : tcp::v4(), descriptor_, code);
  if (code) {
    acceptor_.reset();
    close_unstarted();
    on_failure_(Error(code, "cannot accept: " + code.message()));
    return;
  }
  retry_.emplace(shard_->executor());
  wait();
}

void TcpAcceptor::stop() noexcept {
  close_unstarted();
  acceptor_.reset();
  descriptor_ = -1;  // was the acceptor's
  retry_.reset();
  on_connection_ = nullptr;
  on_failure_ = nullptr;
}

void TcpAcceptor::wait() {
  acceptor_->async_wait(tcp::acceptor::wait_read, [self = shared_from_this()](const error_code& error) {
    if (!error && self->acceptor_) self->accept_all();
  });
}

void TcpAcceptor::accept_all() {
  Shard::Scope scope(*shard_);
  constexpr int fair_share = 64;  // connections before the sessions get their turn
  for (int i = 0; i < fair_share && acceptor_; ++i) {
    tcp::endpoint peer;
    auto size = static_cast<socklen_t>(peer.capacity());
    Descriptor socket(::accept4(descriptor_, peer.data(), &size, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (socket) {
      peer.resize(size);
      on_connection_(std::move(socket), peer);
      continue;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) break;
    if (errno == EINTR || errno == ECONNABORTED || errno == EPROTO) continue;
    // No descriptor or memory left: accepting goes on when some may have come back. Meanwhile the system keeps the
    // connections waiting.
    const error_code code = last_error();
    on_failure_(Error(code, "cannot accept: " + code.message()));
    retry_->expires_after(std::chrono::milliseconds(100));
    retry_->async_wait([self = shared_from_this()](const error_code& error) {
      if (!error && self->acceptor_) self->wait();
    });
    return;
  }
  if (acceptor_) wait();
}

}  // namespace msgtrans::detail
