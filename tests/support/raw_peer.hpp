// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "connection_factory.hpp"
#include "socketless_peer.hpp"
#include "tested_transport.hpp"
#include "wait.hpp"

#include <arpa/inet.h>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <msgtrans/bytes_view.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <msgtrans/wire/encoder.hpp>
#include <msgtrans/wire/header.hpp>
#include <mutex>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <optional>
#include <poll.h>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <utility>
#include <vector>

namespace msgtrans::test {

using Bytes = std::vector<std::byte>;

/// A packet as it was on the wire.
struct RawPacket {
  wire::Header header;
  std::string extension;
  std::string payload;
};

/// The bytes of one packet, whatever its header says.
inline Bytes packet(wire::PacketType type, std::uint32_t id, BytesView payload, BytesView extension = {},
                    std::uint8_t biz_type = 0, std::uint16_t flags = 0) {
  wire::Header header;
  header.type = type;
  header.message_id = id;
  header.biz_type = biz_type;
  header.flags = flags;
  Bytes out;
  wire::append_packet(out, header, extension, payload);
  return out;
}
inline Bytes one_way(std::uint32_t id, BytesView payload) {
  return packet(wire::PacketType::one_way, id, payload);
}
inline Bytes request(std::uint32_t id, BytesView payload) {
  return packet(wire::PacketType::request, id, payload);
}
inline Bytes response(std::uint32_t id, BytesView payload) {
  return packet(wire::PacketType::response, id, payload);
}

/// An endpoint as the system takes it.
class SocketAddress {
 public:
  explicit SocketAddress(const Endpoint& of) {
    if (of.transport == Transport::unix_socket) {
      auto& address = *reinterpret_cast<sockaddr_un*>(&storage_);
      address.sun_family = AF_UNIX;
      std::memcpy(address.sun_path, of.path.data(), of.path.size());
      size_ = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + of.path.size());
      if (of.path.front() == '@') {
        address.sun_path[0] = '\0';
      } else {
        ++size_;
      }
    } else if (of.host.find(':') != std::string::npos) {
      auto& address = *reinterpret_cast<sockaddr_in6*>(&storage_);
      address.sin6_family = AF_INET6;
      address.sin6_port = htons(of.port);
      ::inet_pton(AF_INET6, of.host.c_str(), &address.sin6_addr);
      size_ = sizeof address;
    } else {
      auto& address = *reinterpret_cast<sockaddr_in*>(&storage_);
      address.sin_family = AF_INET;
      address.sin_port = htons(of.port);
      ::inet_pton(AF_INET, of.host.c_str(), &address.sin_addr);
      size_ = sizeof address;
    }
  }
  [[nodiscard]] const sockaddr* data() const noexcept { return reinterpret_cast<const sockaddr*>(&storage_); }
  [[nodiscard]] socklen_t size() const noexcept { return size_; }
  [[nodiscard]] int family() const noexcept { return storage_.ss_family; }

 private:
  sockaddr_storage storage_{};
  socklen_t size_ = 0;
};

/// The other end of a connection, played by the test: a blocking socket with deadlines, which does what no well-behaved
/// peer would, over whatever transport is tested. One thread reads and one writes at a time.
class RawPeer {
 public:
  /// Connects. A receive buffer of that size (the system's own sizing is off then): 0 leaves it to the system.
  explicit RawPeer(const Endpoint& to, int receive_buffer = 0)
      : RawPeer(has_socket(to) ? ::socket(SocketAddress(to).family(), SOCK_STREAM | SOCK_CLOEXEC, 0) : -1) {
    if (!has_socket(to)) {
      socketless_ = SocketlessPeer::connect(to);
      return;
    }
    if (socket_ < 0) fail("socket");
    if (receive_buffer != 0) ::setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    if (to.transport == Transport::unix_socket) {
      // A name, so that the other end can tell which peer this is.
      const SocketAddress own(unix_socket(unused_name()));
      if (::bind(socket_, own.data(), own.size()) != 0) fail("bind");
    } else {
      const int on = 1;
      ::setsockopt(socket_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    const SocketAddress address(to);
    if (::connect(socket_, address.data(), address.size()) != 0) fail("connect");
    Error error;
    detail::TlsOfClient tls;
    static const ClientOptions any{.session = {.max_payload = 1U << 30, .max_decompressed = 1U << 30}};
    agree(detail::factory_for(to, any, tls, error));
  }
  /// Of a connected socket, whose handshake, if there is one, is still to come.
  RawPeer(int descriptor, const detail::ConnectionFactory& factory) : RawPeer(descriptor) { agree(factory); }
  explicit RawPeer(int descriptor) noexcept : socket_(descriptor) {}
  explicit RawPeer(std::unique_ptr<SocketlessPeer> peer) noexcept : socketless_(std::move(peer)) {}
  RawPeer(RawPeer&& other) noexcept
      : socket_(std::exchange(other.socket_, -1)),
        socketless_(std::move(other.socketless_)),
        connection_(std::move(other.connection_)),
        pending_(std::move(other.pending_)) {}
  RawPeer& operator=(RawPeer&&) = delete;
  ~RawPeer() { close(); }

  /// All of it, unless the other end is gone (false) or takes nothing for the whole patience (throws).
  bool send(std::span<const std::byte> bytes) {
    while (!bytes.empty() || unwritten()) {
      std::size_t count = 0;
      const auto seen = writable_seen();
      switch (write(bytes, count)) {
        case Status::failed: return false;
        case Status::blocked: wait(POLLOUT, patience, seen); break;
        default: break;
      }
      bytes = bytes.subspan(count);
    }
    return true;
  }
  bool send(std::string_view text) { return send(std::as_bytes(std::span(text))); }
  /// As much as the other end takes without anybody reading: until nothing more fits for `quiet`. In whole packets but
  /// for the last. \returns the bytes that went out.
  std::size_t send_until_full(std::span<const std::byte> bytes, std::chrono::milliseconds quiet = 300ms) {
    std::size_t sent = 0;
    while (socketless_ && sent < bytes.size()) {
      std::size_t count = 0;
      const auto seen = writable_seen();
      const auto status = write(bytes.subspan(sent), count);
      sent += count;
      if (status == Status::failed || (status == Status::blocked && !socketless_->wait_writable(seen, quiet))) break;
    }
    while (!socketless_ && sent < bytes.size()) {
      pollfd entry{socket_, POLLOUT, 0};
      if (::poll(&entry, 1, static_cast<int>(quiet.count())) <= 0) break;
      std::size_t count = 0;
      if (write(bytes.subspan(sent), count) == Status::failed) break;
      sent += count;
    }
    return sent;
  }

  /// The next packet; empty at the end of the stream. Throws if neither comes in time.
  std::optional<RawPacket> receive(std::chrono::milliseconds within = patience) {
    if (!fill(wire::header_size, within)) return std::nullopt;
    RawPacket got;
    const auto fault = wire::decode_header(std::span(pending_).first<wire::header_size>(),
                                           {.max_payload = 1U << 30, .max_extension = 65535}, got.header);
    if (fault) throw std::runtime_error("the library sent a bad header: " + fault->text);
    if (!fill(got.header.packet_size(), within)) return std::nullopt;
    const auto* text = reinterpret_cast<const char*>(pending_.data()) + wire::header_size;
    got.extension.assign(text, got.header.ext_len);
    got.payload.assign(text + got.header.ext_len, got.header.payload_len);
    pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(got.header.packet_size()));
    return got;
  }
  /// The same where the end would be a fault: then it throws.
  RawPacket next() {
    auto got = receive();
    if (!got) throw std::runtime_error("the other end closed instead of sending a packet");
    return *std::move(got);
  }
  /// Everything up to the end of the stream; how many bytes. Throws if the end does not come in time.
  std::size_t drain(std::chrono::milliseconds within = patience) {
    std::size_t count = pending_.size();
    pending_.clear();
    while (read_some(within)) {
      count += pending_.size();
      pending_.clear();
    }
    return count;
  }
  /// The same as text. Throws if the stream ends earlier.
  std::string take(std::size_t size) {
    if (!fill(size, patience)) throw std::runtime_error("the other end closed after \"" + text_of(pending_) + "\"");
    std::string text = text_of(pending_).substr(0, size);
    pending_.erase(pending_.begin(), pending_.begin() + static_cast<std::ptrdiff_t>(size));
    return text;
  }
  /// Up to the end of that text.
  std::string take_until(std::string_view end) {
    std::size_t at = 0;
    while ((at = text_of(pending_).find(end)) == std::string::npos) {
      if (!read_some(patience)) throw std::runtime_error("the other end closed after \"" + text_of(pending_) + "\"");
    }
    return take(at + end.size());
  }
  /// Everything up to the end of the stream.
  std::string rest() {
    while (read_some(patience)) {
    }
    return text_of(std::exchange(pending_, {}));
  }
  /// True if the other end closes, whatever it says before.
  bool sees_end(std::chrono::milliseconds within = patience) {
    try {
      drain(within);
      return true;
    } catch (const std::runtime_error&) {
      return false;
    }
  }
  /// True if bytes wait, or the end.
  [[nodiscard]] bool readable(std::chrono::milliseconds within = 0ms) {
    if (socketless_) return !pending_.empty() || socketless_->has_input(pending_, within);
    pollfd entry{socket_, POLLIN, 0};
    return !pending_.empty() || ::poll(&entry, 1, static_cast<int>(within.count())) > 0;
  }

  /// This end's port: how the other end knows us.
  [[nodiscard]] std::uint16_t port() const {
    sockaddr_storage address{};
    socklen_t size = sizeof address;
    if (::getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size) != 0) fail("getsockname");
    // The port lies at the same place in both families.
    return ntohs(reinterpret_cast<const sockaddr_in*>(&address)->sin_port);
  }

  /// Whether that is how the other end knows us.
  [[nodiscard]] bool is(const Endpoint& peer) const {
    if (socketless_) return peer.path == socketless_->name();
    if (peer.transport != Transport::unix_socket) return peer.port == port();
    sockaddr_un address{};
    socklen_t size = sizeof address;
    if (::getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size) != 0) fail("getsockname");
    const SocketAddress named(peer);
    return size == named.size() && std::memcmp(&address, named.data(), size) == 0;
  }

  void shut_sending() {
    if (!say_end()) ::shutdown(socket_, SHUT_WR);
  }
  /// Says the end as the transport does, then closes.
  void close() {
    if (socketless_) {
      socketless_->shut_down();
      socketless_.reset();
    }
    if (socket_ < 0) return;
    (void)say_end();
    connection_.reset();
    ::close(std::exchange(socket_, -1));
  }
  /// Ends what is sent at the socket, whatever the transport would have to say first.
  void cut() const {
    if (socketless_) return socketless_->shut_down();
    ::shutdown(socket_, SHUT_WR);
  }
  /// Ends the connection by a reset instead of an orderly end.
  void reset() {
    if (socketless_) {
      socketless_->reset();
      return socketless_.reset();
    }
    const linger at_once{1, 0};
    ::setsockopt(socket_, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    connection_.reset();
    ::close(std::exchange(socket_, -1));
  }

 private:
  using Status = Connection::Status;

  /// What two threads use, one reading and one writing; no call blocks.
  struct Guarded {
    std::mutex mutex;
    std::unique_ptr<Connection> connection;
  };

  [[noreturn]] static void fail(const char* what) {
    throw std::runtime_error(std::string(what) + ": " + std::strerror(errno));
  }
  [[nodiscard]] unsigned writable_seen() const { return socketless_ ? socketless_->writable_seen() : 0; }
  void wait(int events, std::chrono::milliseconds within, unsigned seen = 0) const {
    if (socketless_) {
      if (socketless_->wait_writable(seen, within)) return;
      throw std::runtime_error("the other end takes nothing in time");
    }
    pollfd entry{socket_, static_cast<short>(events), 0};
    for (const auto deadline = Clock::now() + within; Clock::now() < deadline;) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now());
      if (::poll(&entry, 1, static_cast<int>(left.count())) > 0) return;
    }
    throw std::runtime_error("the other end neither sends nor takes anything in time");
  }
  void agree(const detail::ConnectionFactory& factory) {
    if (!factory) return;
    ::fcntl(socket_, F_SETFL, ::fcntl(socket_, F_GETFL) | O_NONBLOCK);
    connection_ = std::make_unique<Guarded>();
    auto& connection = *(connection_->connection = factory(socket_));
    for (Status status; (status = connection.handshake()) != Status::done;) {
      if (status == Status::failed) throw std::runtime_error(connection.error().message());
      wait(connection.wants_write() ? POLLIN | POLLOUT : POLLIN, patience);
    }
  }
  Status write(std::span<const std::byte> bytes, std::size_t& count) {
    if (socketless_) return socketless_->write(bytes, count);
    if (connection_) {
      const std::lock_guard lock(connection_->mutex);
      if (bytes.empty()) return connection_->connection->flush();
      const iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
      return connection_->connection->write({&piece, 1}, count);
    }
    const ssize_t result = ::send(socket_, bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (result < 0) return errno == EAGAIN || errno == EINTR ? Status::blocked : Status::failed;
    count = static_cast<std::size_t>(result);
    return Status::done;
  }
  [[nodiscard]] bool unwritten() const {
    if (socketless_) return socketless_->wants_write();
    if (!connection_) return false;
    const std::lock_guard lock(connection_->mutex);
    return connection_->connection->wants_write();
  }
  /// \returns false if the socket has to say it itself.
  [[nodiscard]] bool say_end() {
    if (socketless_) {
      socketless_->shut_down();
      return true;
    }
    if (!connection_) return false;
    const std::lock_guard lock(connection_->mutex);
    (void)connection_->connection->shut_down(Errc::closed_by_user);
    return connection_->connection->awaits_peers_end();
  }
  bool read_some(std::chrono::milliseconds within) {
    if (socketless_) return socketless_->read_some(pending_, within);
    std::byte buffer[64 * 1024];
    if (connection_) {
      for (;;) {
        std::size_t count = 0;
        {
          const std::lock_guard lock(connection_->mutex);
          const Status status = connection_->connection->read(buffer, count);
          pending_.insert(pending_.end(), buffer, buffer + count);
          if (status == Status::done) return true;
          if (status != Status::blocked) return false;
        }
        wait(POLLIN, within);
      }
    }
    wait(POLLIN, within);
    const ssize_t count = ::recv(socket_, buffer, sizeof buffer, 0);
    if (count <= 0) return false;
    pending_.insert(pending_.end(), buffer, buffer + count);
    return true;
  }
  static std::string text_of(const Bytes& bytes) { return {reinterpret_cast<const char*>(bytes.data()), bytes.size()}; }
  bool fill(std::size_t size, std::chrono::milliseconds within) {
    while (pending_.size() < size) {
      if (!read_some(within)) return false;
    }
    return true;
  }

  int socket_ = -1;
  std::unique_ptr<SocketlessPeer> socketless_;  // instead
  std::unique_ptr<Guarded> connection_;         // null: packets are the socket's bytes
  Bytes pending_;
};

/// A listening socket, for clients that connect to a peer played by the test.
class RawListener {
 public:
  explicit RawListener(int backlog = 16, int receive_buffer = 0, Endpoint endpoint = any_endpoint())
      : endpoint_(std::move(endpoint)) {
    if (!has_socket(endpoint_)) {
      socketless_ = std::make_unique<SocketlessListener>(endpoint_, backlog);
      return;
    }
    SocketAddress address(endpoint_);
    socket_ = ::socket(address.family(), SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (receive_buffer != 0) ::setsockopt(socket_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    if (socket_ < 0 || ::bind(socket_, address.data(), address.size()) != 0 || ::listen(socket_, backlog) != 0) {
      throw std::runtime_error(std::string("cannot listen: ") + std::strerror(errno));
    }
    if (endpoint_.transport == Transport::unix_socket) return;
    sockaddr_in bound{};
    socklen_t size = sizeof bound;
    ::getsockname(socket_, reinterpret_cast<sockaddr*>(&bound), &size);
    endpoint_.port = ntohs(bound.sin_port);
  }
  RawListener(const RawListener&) = delete;
  RawListener& operator=(const RawListener&) = delete;
  ~RawListener() { close(); }

  [[nodiscard]] std::uint16_t port() const noexcept { return endpoint_.port; }
  [[nodiscard]] const Endpoint& endpoint() const noexcept { return endpoint_; }

  RawPeer accept(std::chrono::milliseconds within = patience) {
    if (socketless_) return RawPeer(socketless_->accept(within));
    pollfd entry{socket_, POLLIN, 0};
    if (::poll(&entry, 1, static_cast<int>(within.count())) <= 0) throw std::runtime_error("nobody connects");
    Error error;
    std::shared_ptr<detail::TlsOfListener> tls;
    ListenOptions options;
    if (is_encrypted(endpoint_.transport)) options.tls.identity = trusted_identity();
    const auto factory = detail::factory_for(endpoint_, options, SessionOptions{}, tls, error);
    return RawPeer(::accept4(socket_, nullptr, nullptr, SOCK_CLOEXEC), factory);
  }
  void close() {
    socketless_.reset();
    if (socket_ >= 0) ::close(std::exchange(socket_, -1));
  }

 private:
  int socket_ = -1;
  std::unique_ptr<SocketlessListener> socketless_;  // instead
  Endpoint endpoint_;
};

}  // namespace msgtrans::test
