// SPDX-License-Identifier: Apache-2.0
#include "sockets.hpp"

#include <algorithm>
#include <boost/asio/error.hpp>
#include <boost/asio/ip/address.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <exception>
#include <fcntl.h>
#include <limits>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <new>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/un.h>
#include <unistd.h>
#include <utility>

namespace msgtrans::detail {

using asio::ip::tcp;

namespace {

error_code last_error() noexcept {
  return {errno, boost::system::system_category()};
}

Error failed_to(const char* what, const std::string& where, const error_code& code) {
  return {code, std::string("cannot ") + what + " " + where + ": " + code.message()};
}

sockaddr_un unix_address(const std::string& path, socklen_t& size) noexcept {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::copy(path.begin(), path.end(), address.sun_path);  // parsing has seen to its length
  size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
  if (path.front() == '@') {
    address.sun_path[0] = '\0';
  } else {
    ++size;  // with the zero behind the name
  }
  return address;
}

/// Of a peer; empty if it has none.
std::string path_of(const sockaddr_un& address, socklen_t size) {
  const std::size_t length = size - std::min<std::size_t>(size, offsetof(sockaddr_un, sun_path));
  if (length == 0) return {};
  if (address.sun_path[0] == '\0') return "@" + std::string(address.sun_path + 1, length - 1);
  return {address.sun_path, ::strnlen(address.sun_path, length)};
}

Descriptor open_unix() noexcept {
  return Descriptor(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

/// Whether that is a socket which nobody listens on any more.
bool is_stale(const Endpoint& endpoint) {
  struct stat found {};
  if (::lstat(endpoint.path.c_str(), &found) != 0 || !S_ISSOCK(found.st_mode)) return false;
  error_code code;
  return !connect_unix(endpoint, code) && code == boost::system::errc::connection_refused;
}

}  // namespace

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
  const auto set = [descriptor](int level, int name, int value) {
    ::setsockopt(descriptor, level, name, &value, sizeof value);  // a Unix socket has none of these
  };
  if (options.no_delay) set(IPPROTO_TCP, TCP_NODELAY, 1);
  if (const auto& probes = options.tcp_keep_alive; probes.idle.count() != 0) {
    set(IPPROTO_TCP, TCP_KEEPIDLE, static_cast<int>(probes.idle.count()));
    set(IPPROTO_TCP, TCP_KEEPINTVL, static_cast<int>(probes.interval.count()));
    set(IPPROTO_TCP, TCP_KEEPCNT, probes.probes);
    set(SOL_SOCKET, SO_KEEPALIVE, 1);
  }
  if (options.tcp_user_timeout.count() != 0) {
    constexpr std::chrono::milliseconds longest{std::numeric_limits<int>::max()};
    set(IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(std::min(options.tcp_user_timeout, longest).count()));
  }
}

std::vector<Descriptor> listen_tcp(const tcp::endpoint& address, std::size_t count, int backlog, tcp::endpoint& bound,
                                   Error& error) {
  std::vector<Descriptor> sockets;
  bound = address;
  const auto fail = [&](const char* what) {
    const error_code code = last_error();  // before anything else may change errno
    error = failed_to(what, Peer{.address = bound}.to_string(), code);
    return std::vector<Descriptor>();
  };
  for (std::size_t i = 0; i < count; ++i) {
    Descriptor socket(::socket(address.protocol().family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, IPPROTO_TCP));
    if (!socket) return fail("open a socket for");
    const int on = 1;
    ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (address.protocol() == tcp::v6()) ::setsockopt(socket.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    // The first one binds without sharing, so that another server on this address is an error and not a silent
    // partner; only then it lets its own siblings in.
    if (i != 0 && ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEPORT, &on, sizeof on) != 0) return fail("share");
    if (::bind(socket.get(), bound.data(), static_cast<socklen_t>(bound.size())) != 0) return fail("bind");
    if (i == 0) {
      if (count > 1 && ::setsockopt(socket.get(), SOL_SOCKET, SO_REUSEPORT, &on, sizeof on) != 0) return fail("share");
      auto size = static_cast<socklen_t>(bound.capacity());
      if (::getsockname(socket.get(), bound.data(), &size) != 0) return fail("ask the name of");
      bound.resize(size);
    }
    if (::listen(socket.get(), backlog) != 0) return fail("listen on");
    sockets.push_back(std::move(socket));
  }
  return sockets;
}

Endpoint bound_address(int descriptor, Error& error) {
  const auto fail = [&](const std::string& what) {
    error = Error(Errc::invalid_option, "descriptor " + std::to_string(descriptor) + " " + what);
    return Endpoint();
  };
  sockaddr_storage address{};
  socklen_t size = sizeof address;
  if (::getsockname(descriptor, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
    const error_code code = last_error();
    error = Error(code, "descriptor " + std::to_string(descriptor) + ": " + code.message());
    return {};
  }
  if (address.ss_family == AF_UNIX) {
    return {.transport = Transport::unix_socket, .path = path_of(reinterpret_cast<const sockaddr_un&>(address), size)};
  }
  if (address.ss_family != AF_INET && address.ss_family != AF_INET6) return fail("is a socket without an address");
  tcp::endpoint bound;
  std::copy_n(reinterpret_cast<const std::byte*>(&address), size, reinterpret_cast<std::byte*>(bound.data()));
  bound.resize(size);
  return Peer{.transport = Transport::tcp, .address = bound}.endpoint();
}

std::optional<Endpoint> prepare_listening(int descriptor, Transport transport, int backlog, Error& error) {
  const auto fail = [&](const std::string& what) {
    error = Error(Errc::invalid_option, "descriptor " + std::to_string(descriptor) + " " + what);
    return std::nullopt;
  };
  const auto fail_to = [&](const char* what) {
    const error_code code = last_error();
    error = Error(code,
                  std::string("cannot ") + what + " descriptor " + std::to_string(descriptor) + ": " + code.message());
    return std::nullopt;
  };
  const auto option = [descriptor](int which) {
    int value = -1;
    socklen_t size = sizeof value;
    return ::getsockopt(descriptor, SOL_SOCKET, which, &value, &size) == 0 ? value : -1;
  };
  struct stat found {};
  if (::fstat(descriptor, &found) != 0) return fail_to("use");
  if (!S_ISSOCK(found.st_mode)) return fail("is no socket");
  if (option(SO_TYPE) != SOCK_STREAM) return fail("is no stream socket");
  Endpoint bound = bound_address(descriptor, error);
  if (error) return std::nullopt;
  const bool is_unix = bound.transport == Transport::unix_socket;
  if (is_unix != (transport == Transport::unix_socket)) {
    return fail(std::string("is a ") + (is_unix ? "Unix" : "TCP") + " socket, which " +
                std::string(to_string(transport)) + " does not go over");
  }
  if (is_unix ? bound.path.empty() : bound.port == 0) return fail("is not bound");
  if (option(SO_ACCEPTCONN) != 1) {
    sockaddr_storage peer{};
    socklen_t size = sizeof peer;
    if (::getpeername(descriptor, reinterpret_cast<sockaddr*>(&peer), &size) == 0) return fail("is connected");
    if (::listen(descriptor, backlog) != 0) return fail_to("listen on");
  }
  const int flags = ::fcntl(descriptor, F_GETFL);
  if (flags < 0 || ::fcntl(descriptor, F_SETFL, flags | O_NONBLOCK) != 0) return fail_to("use");
  (void)::fcntl(descriptor, F_SETFD, FD_CLOEXEC);
  return bound;
}

std::optional<SocketFile> SocketFile::of(const std::string& path, Error& error) {
  struct stat found {};
  if (::lstat(path.c_str(), &found) == 0) return SocketFile(path, found);
  error = failed_to("find", path, last_error());
  return std::nullopt;
}

void SocketFile::remove() noexcept {
  struct stat found {};
  if (!path_.empty() && ::lstat(path_.c_str(), &found) == 0 && found.st_dev == made_.st_dev &&
      found.st_ino == made_.st_ino) {
    ::unlink(path_.c_str());
  }
  path_.clear();
}

Descriptor listen_unix(const Endpoint& endpoint, int backlog, unsigned permissions, SocketFile& file, Error& error) {
  const auto fail = [&](const char* what) {
    const error_code code = last_error();
    error = failed_to(what, endpoint.path, code);
    return Descriptor();
  };
  Descriptor socket = open_unix();
  if (!socket) return fail("open a socket for");
  socklen_t size = 0;
  const sockaddr_un address = unix_address(endpoint.path, size);
  const auto bind = [&] { return ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), size) == 0; };
  if (!bind()) {
    const int why = errno;
    const bool stale = why == EADDRINUSE && endpoint.path.front() != '@' && is_stale(endpoint);
    if (!stale) errno = why;
    if (!stale || (::unlink(endpoint.path.c_str()), !bind())) return fail("bind");
  }
  if (endpoint.path.front() != '@') {
    struct stat made {};
    if (::lstat(endpoint.path.c_str(), &made) != 0) return fail("find");
    file = SocketFile(endpoint.path, made);
    // Until it listens nobody gets in.
    if (permissions != 0 && ::chmod(endpoint.path.c_str(), permissions) != 0) return fail("set the permissions of");
  }
  if (::listen(socket.get(), backlog) != 0) return fail("listen on");
  return socket;
}

Descriptor connect_unix(const Endpoint& endpoint, error_code& code) {
  Descriptor socket = open_unix();
  socklen_t size = 0;
  const sockaddr_un address = unix_address(endpoint.path, size);
  if (socket && ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), size) == 0) {
    code = {};
    return socket;
  }
  code = last_error();
  return {};
}

PeerCredentials credentials_of(int descriptor) noexcept {
  ucred found{};
  socklen_t size = sizeof found;
  if (::getsockopt(descriptor, SOL_SOCKET, SO_PEERCRED, &found, &size) != 0) return {};
  return {found.pid, found.uid, found.gid};
}

Acceptor::Acceptor(std::shared_ptr<Shard> shard, Descriptor socket, Transport transport)
    : shard_(std::move(shard)), socket_(std::move(socket)), transport_(transport) {}

Acceptor::~Acceptor() {
  stop();
}

Descriptor Acceptor::duplicate() const noexcept {
  const std::lock_guard lock(mutex_);
  errno = EBADF;
  return socket_ ? Descriptor(::fcntl(socket_.get(), F_DUPFD_CLOEXEC, 0)) : Descriptor();
}

void Acceptor::close() noexcept {
  const std::lock_guard lock(mutex_);
  socket_.reset();
}

void Acceptor::close_unstarted() noexcept {
  close();
}

void Acceptor::start(OnConnection on_connection, OnFailure on_failure) {
  on_connection_ = std::move(on_connection);
  on_failure_ = std::move(on_failure);
  listening_.emplace(shard_->executor());
  error_code code;
  listening_->assign(socket_.get(), code);
  if (code) {
    listening_.reset();
    close();
    return fail(Error(code, "cannot accept: " + code.message()));
  }
  retry_.emplace(shard_->executor());
  wait();
}

void Acceptor::accept_rest() {
  if (!listening_) return;
  Shard::Scope scope(*shard_);
  constexpr int most = 65'535;  // the longest queue there is
  try {
    for (int i = 0; i < most && accept_one(); ++i) {
    }
  } catch (const std::bad_alloc&) {
    // Those who still wait see the end of the socket.
  }
}

void Acceptor::stop() noexcept {
  if (listening_) {
    // No longer watched, which it would be if another process has it too; closed below, where nobody duplicates it.
    try {
      (void)listening_->release();
    } catch (const std::exception&) {
      // Only where that is not supported, which is not here.
    }
    listening_.reset();
  }
  close();
  retry_.reset();
  on_connection_ = nullptr;
  on_failure_ = nullptr;
}

void Acceptor::fail(Error error) {
  // A copy: the handler may stop this.
  const auto told = on_failure_;
  told(std::move(error));
}

void Acceptor::wait() {
  listening_->async_wait(asio::posix::stream_descriptor::wait_read,
                         [self = shared_from_this()](const error_code& error) {
                           if (!error && self->listening_) self->accept_all();
                         });
}

bool Acceptor::accept_one() {
  for (;;) {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    Descriptor socket(
        ::accept4(socket_.get(), reinterpret_cast<sockaddr*>(&address), &size, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (socket) {
      Peer peer{.transport = transport_};
      if (peer.has_address()) {
        peer.address.resize(size);
        std::copy_n(reinterpret_cast<const std::byte*>(&address), size,
                    reinterpret_cast<std::byte*>(peer.address.data()));
        // From a socket for both families, which comes from elsewhere.
        if (const auto ip = peer.address.address(); ip.is_v6() && ip.to_v6().is_v4_mapped()) {
          peer.address.address(asio::ip::make_address_v4(asio::ip::v4_mapped, ip.to_v6()));
        }
      } else {
        peer.credentials = credentials_of(socket.get());
        peer.path = path_of(reinterpret_cast<const sockaddr_un&>(address), size);
      }
      on_connection_(std::move(socket), std::move(peer));
      return true;
    }
    // Of one connection, which is gone.
    if (errno != EINTR && errno != ECONNABORTED && errno != EPROTO) return false;
  }
}

void Acceptor::accept_all() {
  Shard::Scope scope(*shard_);
  constexpr int fair_share = 64;  // connections before the sessions get their turn
  for (int i = 0; i < fair_share && listening_; ++i) {
    if (accept_one()) continue;
    if (errno == EAGAIN || errno == EWOULDBLOCK) break;
    // No descriptor or memory left: accepting goes on when some may have come back. Meanwhile the system keeps the
    // connections waiting.
    const error_code code = last_error();
    fail(Error(code, "cannot accept: " + code.message()));
    if (!retry_) return;
    retry_->expires_after(std::chrono::milliseconds(100));
    retry_->async_wait([self = shared_from_this()](const error_code& error) {
      if (!error && self->listening_) self->wait();
    });
    return;
  }
  if (listening_) wait();
}

}  // namespace msgtrans::detail
