// SPDX-License-Identifier: Apache-2.0

// The limit the library is measured against: an echo server on bare epoll, one thread, nothing between it and the
// kernel. One receive buffer for all connections, all frames of a read answered in place by one send; a connection
// keeps bytes of its own only while half a frame has come or a send did not go through.
//
// bench_epoll_server [--port N] [--buffer BYTES] [--fanout]

#include "common.hpp"

#include <csignal>
#include <memory>
#include <span>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/uio.h>
#include <utility>
#include <vector>

namespace {

using bench::fail_errno;

struct Block {
  std::unique_ptr<std::uint8_t[]> bytes;
  std::size_t capacity = 0;
};

Block make_block(std::size_t capacity) {
  return {std::make_unique_for_overwrite<std::uint8_t[]>(capacity), capacity};
}

/// Keeps freed blocks for the next large frame: glibc would give their pages back and fetch them again each time.
class BlockPool {
 public:
  Block take(std::size_t wanted) {
    if (!spare_.empty() && spare_.back().capacity >= wanted) {
      Block block = std::move(spare_.back());
      spare_.pop_back();
      return block;
    }
    return make_block(wanted);
  }

  void give_back(Block block) {
    if (block.bytes != nullptr && block.capacity <= largest_kept && spare_.size() < most_kept) {
      spare_.push_back(std::move(block));
    }
  }

 private:
  static constexpr std::size_t largest_kept = std::size_t{1} << 20;
  static constexpr std::size_t most_kept = 128;
  std::vector<Block> spare_;
};

struct Connection {
  int fd = -1;
  std::uint32_t index = 0;  // where it stands in the list of all connections
  bool blocked = false;     // waits for room in the kernel's send buffer, and is not read meanwhile
  std::uint32_t partial_size = 0;
  Block partial;  // the beginning of a frame; holds the whole frame if that is larger than the headroom
  std::size_t pending_sent = 0;
  std::vector<std::uint8_t> pending;  // what the kernel did not take
};

class Server {
 public:
  Server(std::uint16_t port, std::size_t buffer_size, bool fanout)
      : buffer_size_(buffer_size),
        buffer_(std::make_unique<std::uint8_t[]>(headroom + buffer_size)),
        receive_(buffer_.get() + headroom),
        fanout_(fanout) {
    epoll_ = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_ < 0) fail_errno("epoll_create1");

    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    if (sigprocmask(SIG_BLOCK, &signals, nullptr) != 0) fail_errno("sigprocmask");
    signals_ = signalfd(-1, &signals, SFD_CLOEXEC);
    if (signals_ < 0) fail_errno("signalfd");
    watch(signals_, &signals_);

    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (listener_ < 0) fail_errno("socket");
    const int on = 1;
    setsockopt(listener_, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    // Accepted sockets inherit it on Linux, which saves a call for each.
    if (setsockopt(listener_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0) fail_errno("TCP_NODELAY");
    sockaddr_in address = bench::loopback(1, port);
    if (bind(listener_, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) fail_errno("bind");
    if (listen(listener_, SOMAXCONN) != 0) fail_errno("listen");
    socklen_t length = sizeof address;
    if (getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &length) != 0) fail_errno("getsockname");
    watch(listener_, &listener_);
    bench::announce(ntohs(address.sin_port));
  }

  void run() {
    std::array<epoll_event, 512> events{};
    for (;;) {
      const int ready = epoll_wait(epoll_, events.data(), static_cast<int>(events.size()), -1);
      if (ready < 0 && errno != EINTR) fail_errno("epoll_wait");
      for (int i = 0; i < ready; ++i) {
        const epoll_event& event = events[static_cast<std::size_t>(i)];
        if (event.data.ptr == &listener_) {
          accept_all();
        } else if (event.data.ptr == &signals_) {
          return;
        } else {
          auto& connection = *static_cast<Connection*>(event.data.ptr);
          const bool alive = connection.blocked ? flush(connection) : serve(connection);
          if (!alive) close_connection(connection);
        }
      }
    }
  }

 private:
  // A partial frame up to this size is put in front of what is read next, so that frames are whole in memory; a larger
  // one is read into a block of its own size.
  static constexpr std::size_t headroom = 16384;

  void watch(int fd, void* tag) {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.ptr = tag;
    if (epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) != 0) fail_errno("epoll_ctl");
  }

  void wait_for(Connection& connection, std::uint32_t what) {
    epoll_event event{};
    event.events = what;
    event.data.ptr = &connection;
    if (epoll_ctl(epoll_, EPOLL_CTL_MOD, connection.fd, &event) != 0) fail_errno("epoll_ctl");
  }

  void accept_all() {
    for (;;) {
      const int fd = accept4(listener_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
      if (fd < 0) {
        if (errno == EAGAIN) return;
        if (errno == EINTR || errno == ECONNABORTED) continue;
        fail_errno("accept4");
      }
      auto connection = std::make_unique<Connection>();
      connection->fd = fd;
      connection->index = static_cast<std::uint32_t>(connections_.size());
      watch(fd, connection.get());
      connections_.push_back(std::move(connection));
    }
  }

  // Called only while the connection's own event is handled: another event of the same wait may still point to it.
  void close_connection(Connection& connection) {
    close(connection.fd);
    if (connection.partial.capacity > headroom) pool_.give_back(std::move(connection.partial));
    const std::uint32_t index = connection.index;
    connections_.back()->index = index;
    std::swap(connections_[index], connections_.back());
    connections_.pop_back();
  }

  // Reads once and answers what came. False when the connection is over.
  bool serve(Connection& connection) {
    const std::size_t held = connection.partial_size;
    if (connection.partial.capacity > headroom) return serve_large(connection);

    const ssize_t got = recv(connection.fd, receive_, buffer_size_, 0);
    if (got <= 0) return got < 0 && (errno == EAGAIN || errno == EINTR);
    std::uint8_t* begin = receive_ - held;
    if (held != 0) {
      std::memcpy(begin, connection.partial.bytes.get(), held);
      connection.partial = {};
      connection.partial_size = 0;
    }
    const std::uint8_t* const end = receive_ + got;
    const Turned turned = turn_frames(begin, end);
    if (turned.answers_end != begin && !send_bytes(connection, {begin, turned.answers_end}, {})) return false;
    if (turned.good) keep_partial(connection, turned.rest, end);
    return turned.good;
  }

  // The same when a large frame has begun: its rest goes where it belongs, what follows into the common buffer.
  bool serve_large(Connection& connection) {
    std::uint8_t* const frame = connection.partial.bytes.get();
    const std::size_t size = bench::frame_size(frame);
    const std::size_t missing = size - connection.partial_size;
    std::array<iovec, 2> parts{{{frame + connection.partial_size, missing}, {receive_, buffer_size_}}};
    const ssize_t result = readv(connection.fd, parts.data(), 2);
    if (result <= 0) return result < 0 && (errno == EAGAIN || errno == EINTR);
    const auto got = static_cast<std::size_t>(result);
    if (got < missing) {
      connection.partial_size += static_cast<std::uint32_t>(got);
      return true;
    }
    Block block = std::move(connection.partial);
    connection.partial = {};
    connection.partial_size = 0;
    bench::turn_around(frame);
    const std::uint8_t* const end = receive_ + (got - missing);
    const Turned turned = turn_frames(receive_, end);
    const bool alive = send_bytes(connection, {frame, size}, {receive_, turned.answers_end}) && turned.good;
    pool_.give_back(std::move(block));
    if (alive) keep_partial(connection, turned.rest, end);
    return alive;
  }

  struct Turned {
    bool good;                  // false on a malformed frame
    std::uint8_t* answers_end;  // the answers stand from where it began up to here
    const std::uint8_t* rest;   // the first frame that is not whole
  };

  // Turns every whole frame of [begin, end) into its answer, in place.
  Turned turn_frames(std::uint8_t* const begin, const std::uint8_t* end) {
    std::uint8_t* at = begin;
    std::uint8_t* answer = begin;
    while (static_cast<std::size_t>(end - at) >= bench::header_size) {
      const std::size_t size = bench::frame_size(at);
      if (size == 0) return {false, answer, at};
      if (static_cast<std::size_t>(end - at) < size) break;
      if (fanout_ && is_trigger(at, size)) {
        fan_out(bench::load_u32(at + bench::header_size), bench::load_u32(at + bench::header_size + 4));
      } else {
        bench::turn_around(at);
        if (answer != at) std::memmove(answer, at, size);  // after a trigger only
        answer += size;
      }
      at += size;
    }
    return {true, answer, at};
  }

  static bool is_trigger(const std::uint8_t* frame, std::size_t size) noexcept {
    return frame[2] == bench::type_one_way && frame[3] == bench::biz_fanout_trigger &&
           size == bench::header_size + bench::fanout_trigger_payload;
  }

  void keep_partial(Connection& connection, const std::uint8_t* from, const std::uint8_t* end) {
    if (from == end) return;
    const auto size = static_cast<std::size_t>(end - from);
    std::size_t room = size;
    if (size >= bench::header_size) {
      const std::size_t whole = bench::frame_size(from);
      if (whole > headroom) room = whole;
    }
    connection.partial = room > headroom ? pool_.take(room) : make_block(room);
    std::memcpy(connection.partial.bytes.get(), from, size);
    connection.partial_size = static_cast<std::uint32_t>(size);
  }

  // One call for both parts; what the kernel does not take is copied and sent when it has room.
  bool send_bytes(Connection& connection, std::span<const std::uint8_t> first, std::span<const std::uint8_t> second) {
    if (connection.blocked) {
      append(connection, first);
      append(connection, second);
      return true;
    }
    ssize_t result = 0;
    if (second.empty()) {
      result = send(connection.fd, first.data(), first.size(), MSG_NOSIGNAL);
    } else {
      std::array<iovec, 2> parts{{{const_cast<std::uint8_t*>(first.data()), first.size()},
                                  {const_cast<std::uint8_t*>(second.data()), second.size()}}};
      msghdr message{};
      message.msg_iov = parts.data();
      message.msg_iovlen = parts.size();
      result = sendmsg(connection.fd, &message, MSG_NOSIGNAL);
    }
    if (result < 0) {
      if (errno != EAGAIN && errno != EINTR) return false;
      result = 0;
    }
    const auto sent = static_cast<std::size_t>(result);
    if (sent == first.size() + second.size()) return true;
    append(connection, first.subspan(sent < first.size() ? sent : first.size()));
    append(connection, second.subspan(sent > first.size() ? sent - first.size() : 0));
    connection.blocked = true;
    wait_for(connection, EPOLLOUT);
    return true;
  }

  static void append(Connection& connection, std::span<const std::uint8_t> bytes) {
    connection.pending.insert(connection.pending.end(), bytes.begin(), bytes.end());
  }

  bool flush(Connection& connection) {
    const std::size_t left = connection.pending.size() - connection.pending_sent;
    const ssize_t sent = send(connection.fd, connection.pending.data() + connection.pending_sent, left, MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN || errno == EINTR;
    connection.pending_sent += static_cast<std::size_t>(sent);
    if (connection.pending_sent != connection.pending.size()) return true;
    connection.pending = {};
    connection.pending_sent = 0;
    connection.blocked = false;
    wait_for(connection, EPOLLIN);
    return true;
  }

  // One write a socket a packet, as a user of bare sockets would write it.
  void fan_out(std::uint32_t count, std::uint32_t size) {
    if (size > bench::largest_payload) return;
    packet_.assign(bench::header_size + size, bench::fanout_fill);
    for (std::uint32_t i = 1; i <= count; ++i) {
      bench::store_header(packet_.data(), bench::type_one_way, bench::biz_fanout, i, size);
      // A connection that fails here is found dead by its own event, which the kernel raises as well.
      for (const auto& connection : connections_) send_bytes(*connection, packet_, {});
    }
  }

  std::size_t buffer_size_;
  std::unique_ptr<std::uint8_t[]> buffer_;
  std::uint8_t* receive_;
  bool fanout_;
  int epoll_ = -1;
  int signals_ = -1;
  int listener_ = -1;
  BlockPool pool_;
  std::vector<std::unique_ptr<Connection>> connections_;
  std::vector<std::uint8_t> packet_;
};

}  // namespace

int main(int argc, char** argv) {
  return bench::run_main("bench_epoll_server", [&] {
    const bench::Arguments arguments(argc, argv, {"--port", "--buffer"}, {"--fanout"});
    bench::raise_descriptor_limit(64);
    Server server(arguments.number<std::uint16_t>("--port", 0, 0, 65535),
                  arguments.number<std::size_t>("--buffer", 262144, 4096, std::size_t{1} << 26),
                  arguments.has("--fanout"));
    server.run();
    return 0;
  });
}
