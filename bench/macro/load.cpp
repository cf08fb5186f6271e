// SPDX-License-Identifier: Apache-2.0

// The load generator for every server of this benchmark: raw epoll, one thread, a closed loop. It checks what comes
// back: each packet's whole header (so its id and its length) and its payload's first and last byte. One JSON object on
// standard output for a run; exit status 1 when anything was wrong.
//
// bench_load echo   --port P [--pid SERVER] [--connections C] [--pipeline D] [--size S] [--duration S] [--warmup S]
// bench_load accept --port P [--pid SERVER] [--connections N] [--window W]
// bench_load fanout --port P [--pid SERVER] [--connections N] [--size S] [--burst B] [--duration S] [--warmup S]

#include "common.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <ctime>
#include <dirent.h>
#include <fcntl.h>
#include <fstream>
#include <memory>
#include <optional>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <vector>

namespace {

using bench::fail_errno;
using bench::header_size;

constexpr std::size_t receive_size = 262144;
constexpr std::uint64_t second = 1'000'000'000;
constexpr std::uint64_t patience = 10 * second;  // without any byte from the server

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error(what);
}

std::uint64_t now_ns() noexcept {
  timespec time{};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * second + static_cast<std::uint64_t>(time.tv_nsec);
}

std::uint64_t own_cpu_ns() noexcept {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<std::uint64_t>(time.tv_sec) * second + static_cast<std::uint64_t>(time.tv_nsec);
}

double seconds(std::uint64_t ns) noexcept {
  return static_cast<double>(ns) / static_cast<double>(second);
}

/// Counts of durations in ns, in buckets of at most 1/128 relative width.
class Histogram {
 public:
  void record(std::uint64_t value) noexcept {
    ++counts_[index_of(value)];
    ++total_;
    largest_ = std::max(largest_, value);
  }

  /// The upper end of the bucket in which the value of that rank lies.
  [[nodiscard]] std::uint64_t quantile(double q) const noexcept {
    const auto wanted = static_cast<std::uint64_t>(q * static_cast<double>(total_));
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i < counts_.size(); ++i) {
      seen += counts_[i];
      if (seen > wanted) return std::min(upper_end(i), largest_);
    }
    return largest_;
  }

  [[nodiscard]] std::uint64_t largest() const noexcept { return largest_; }

 private:
  static constexpr unsigned sub_bits = 7;
  static constexpr std::size_t sub = std::size_t{1} << sub_bits;

  static std::size_t index_of(std::uint64_t value) noexcept {
    if (value < 2 * sub) return static_cast<std::size_t>(value);
    const auto shift = static_cast<unsigned>(std::bit_width(value)) - sub_bits - 1;
    return sub * shift + static_cast<std::size_t>(value >> shift);
  }

  static std::uint64_t upper_end(std::size_t index) noexcept {
    if (index < 2 * sub) return index;
    const auto shift = static_cast<unsigned>(index / sub - 1);
    return ((static_cast<std::uint64_t>(index - sub * shift) + 1) << shift) - 1;
  }

  std::vector<std::uint64_t> counts_ = std::vector<std::uint64_t>(sub * (64 - sub_bits) + sub);
  std::uint64_t total_ = 0;
  std::uint64_t largest_ = 0;
};

/// CPU and memory of the server process, where the starter named it.
class Watched {
 public:
  explicit Watched(int pid) : root_(pid == 0 ? std::string() : "/proc/" + std::to_string(pid)) {}

  /// CPU time of all its threads; 0 where it cannot be known.
  [[nodiscard]] std::uint64_t cpu_ns() const {
    if (root_.empty()) return 0;
    const std::string tasks = root_ + "/task";
    std::uint64_t total = 0;
    const std::unique_ptr<DIR, int (*)(DIR*)> directory(opendir(tasks.c_str()), closedir);
    if (directory == nullptr) fail("cannot read " + tasks + ": the server is gone");
    while (const dirent* entry = readdir(directory.get())) {
      if (entry->d_name[0] == '.') continue;
      std::ifstream file(tasks + "/" + entry->d_name + "/schedstat");
      std::uint64_t ns = 0;
      if (file >> ns) total += ns;
    }
    return total;
  }

  /// Resident bytes, counted page by page (the cheap counters of new kernels are off by hundreds of KiB). Waits until
  /// two readings agree.
  [[nodiscard]] std::uint64_t resident() const {
    std::uint64_t before = read_resident();
    for (int tries = 0; tries < 100; ++tries) {
      poll(nullptr, 0, 20);
      const std::uint64_t again = read_resident();
      if (again == before) return again;
      before = again;
    }
    fail("the server's memory does not come to rest");
  }

  [[nodiscard]] bool known() const noexcept { return !root_.empty(); }

 private:
  [[nodiscard]] std::uint64_t read_resident() const {
    std::ifstream file(root_ + "/smaps_rollup");
    std::string word;
    while (file >> word) {
      std::uint64_t kib = 0;
      if (word == "Rss:" && file >> kib) return kib * 1024;
    }
    fail("cannot read " + root_ + "/smaps_rollup");
  }

  std::string root_;
};

/// What a packet of this run looks like. All packets a run receives have the same size.
struct Expected {
  std::uint8_t type = bench::type_response;
  std::uint8_t biz_type = 0;
  std::uint32_t size = 0;
  std::uint32_t id = 0;  // of the next
  bool check_id = true;
  bool filled = false;  // the payload is all `fanout_fill`, else as of `first_byte` and `last_byte`

  static std::uint8_t first_byte(std::uint32_t id) noexcept { return static_cast<std::uint8_t>(id * 7 + 1); }
  static std::uint8_t last_byte(std::uint32_t id) noexcept { return static_cast<std::uint8_t>(id * 13 + 5); }
};

void check(const Expected& expected, const std::uint8_t* header, const std::uint8_t* first, const std::uint8_t* last) {
  std::array<std::uint8_t, header_size> wanted{};
  bench::store_header(wanted.data(), expected.type, expected.biz_type,
                      expected.check_id ? expected.id : bench::load_u32(header + 4), expected.size);
  if (std::memcmp(wanted.data(), header, header_size) != 0) {
    std::string shown;
    for (std::size_t i = 0; i < header_size; ++i) {
      std::array<char, 8> hex{};
      std::snprintf(hex.data(), hex.size(), "%02x ", static_cast<unsigned>(header[i]));
      shown += hex.data();
    }
    fail("wrong header " + shown + "instead of id " + std::to_string(expected.id) + ", size " +
         std::to_string(expected.size));
  }
  const std::uint8_t wanted_first = expected.filled ? bench::fanout_fill : Expected::first_byte(expected.id);
  const std::uint8_t wanted_last = expected.filled ? bench::fanout_fill : Expected::last_byte(expected.id);
  // A payload of one byte is sent with the first byte's value.
  if ((expected.size > 0 && *first != wanted_first) || (expected.size > 1 && *last != wanted_last)) {
    fail("wrong payload in packet " + std::to_string(bench::load_u32(header + 4)));
  }
}

/// A connection's stream cut into packets of one size. Keeps only what a check of a cut packet needs.
class Receiver {
 public:
  /// Checks what came and returns how many packets it completed. `expected.id` moves on.
  std::uint32_t consume(const std::uint8_t* at, std::size_t count, Expected& expected) {
    const std::size_t frame = header_size + expected.size;
    std::uint32_t packets = 0;
    while (count > 0) {
      if (have_ == 0 && count >= frame) [[likely]] {
        check(expected, at, at + header_size, at + frame - 1);
        at += frame;
        count -= frame;
      } else {
        const std::size_t part = std::min(frame - have_, count);
        if (have_ < head_.size()) std::memcpy(head_.data() + have_, at, std::min(part, head_.size() - have_));
        have_ += static_cast<std::uint32_t>(part);
        at += part;
        count -= part;
        if (have_ < frame) break;
        check(expected, head_.data(), head_.data() + header_size, at - 1);
        have_ = 0;
      }
      ++expected.id;
      ++packets;
    }
    return packets;
  }

  [[nodiscard]] bool in_packet() const noexcept { return have_ != 0; }

 private:
  std::uint32_t have_ = 0;
  std::array<std::uint8_t, header_size + 1> head_{};
};

class Poller {
 public:
  Poller() : fd_(epoll_create1(EPOLL_CLOEXEC)) {
    if (fd_ < 0) fail_errno("epoll_create1");
  }
  Poller(const Poller&) = delete;
  Poller& operator=(const Poller&) = delete;
  ~Poller() { close(fd_); }

  void set(int operation, int fd, std::uint32_t what, std::uint32_t index) const {
    epoll_event event{};
    event.events = what;
    event.data.u32 = index;
    if (epoll_ctl(fd_, operation, fd, &event) != 0) fail_errno("epoll_ctl");
  }

  /// Waits for at most 100 ms. Fails when nothing at all has come for `patience`.
  [[nodiscard]] std::size_t wait(std::array<epoll_event, 512>& events) {
    const int ready = epoll_wait(fd_, events.data(), static_cast<int>(events.size()), 100);
    if (ready > 0) {
      silent_since_ = 0;
      return static_cast<std::size_t>(ready);
    }
    if (ready < 0 && errno != EINTR) fail_errno("epoll_wait");
    const std::uint64_t now = now_ns();
    if (silent_since_ == 0) silent_since_ = now;
    if (now - silent_since_ > patience) fail("nothing came from the server for 10 s");
    return 0;
  }

 private:
  int fd_;
  std::uint64_t silent_since_ = 0;
};

/// A non-blocking socket; `source` is the last part of its own loopback address, 0 for the system's choice.
int begin_connect(std::uint16_t port, std::uint32_t source) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) fail_errno("socket");
  const int on = 1;
  if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0) fail_errno("TCP_NODELAY");
  if (source != 0) {
    if (setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on) != 0) fail_errno("IP_BIND_ADDRESS_NO_PORT");
    sockaddr_in own = bench::loopback(source, 0);
    if (bind(fd, reinterpret_cast<sockaddr*>(&own), sizeof own) != 0) fail_errno("bind");
  }
  sockaddr_in address = bench::loopback(1, port);
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof address) != 0 && errno != EINPROGRESS) {
    fail_errno("connect");
  }
  return fd;
}

int connect_to(std::uint16_t port) {
  const int fd = begin_connect(port, 0);
  pollfd wait{fd, POLLOUT, 0};
  if (poll(&wait, 1, 10'000) != 1) fail("connecting takes more than 10 s");
  int error = 0;
  socklen_t length = sizeof error;
  if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0) fail_errno("getsockopt");
  if (error != 0) {
    errno = error;
    fail_errno("connect");
  }
  return fd;
}

/// Closes at once and leaves no TIME_WAIT behind: thousands of them would slow the next run.
void close_hard(int fd) noexcept {
  const linger at_once{1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  close(fd);
}

struct Sockets {
  std::vector<int> fds;

  Sockets() = default;
  Sockets(const Sockets&) = delete;
  Sockets& operator=(const Sockets&) = delete;
  ~Sockets() {
    for (const int fd : fds) close_hard(fd);
  }
};

std::vector<std::uint8_t> make_request(std::uint32_t id, std::uint32_t size) {
  std::vector<std::uint8_t> frame(header_size + size, std::uint8_t{0x5A});
  bench::store_header(frame.data(), bench::type_request, 1, id, size);
  if (size > 1) frame.back() = Expected::last_byte(id);
  if (size > 0) frame[header_size] = Expected::first_byte(id);
  return frame;
}

/// One receive; fails when the connection is over. 0: nothing there.
std::size_t receive(int fd, std::vector<std::uint8_t>& buffer) {
  const ssize_t got = recv(fd, buffer.data(), buffer.size(), 0);
  if (got > 0) return static_cast<std::size_t>(got);
  if (got == 0) fail("the server closed a connection");
  if (errno != EAGAIN && errno != EINTR) fail_errno("recv");
  return 0;
}

/// The part of a run that counts, and what the processes used in it.
class Window {
 public:
  Window(const Watched& server, std::uint64_t warmup, std::uint64_t duration)
      : server_(server), begin_(now_ns() + warmup), duration_(duration) {}

  /// True at the first call within the window, when the caller's counts must start anew.
  bool opens(std::uint64_t now) {
    if (open_ || now < begin_) return false;
    open_ = true;
    server_cpu_ = server_.cpu_ns();
    own_cpu_ = own_cpu_ns();
    begin_ = now_ns();
    end_ = begin_ + duration_;
    return true;
  }

  [[nodiscard]] bool over(std::uint64_t now) const noexcept { return open_ && now >= end_; }

  void close() {
    end_ = now_ns();
    own_cpu_ = own_cpu_ns() - own_cpu_;
    if (server_.known()) server_cpu_ = server_.cpu_ns() - server_cpu_;
  }

  [[nodiscard]] double length() const noexcept { return seconds(end_ - begin_); }

  void print(std::uint64_t messages) const {
    std::printf(",\"seconds\":%.4f,\"messages\":%llu,\"messages_per_second\":%.1f,\"loader_cpu\":%.3f", length(),
                static_cast<unsigned long long>(messages), static_cast<double>(messages) / length(),
                seconds(own_cpu_) / length());
    if (server_.known()) {
      std::printf(",\"server_cpu\":%.3f,\"server_ns_per_message\":%.1f", seconds(server_cpu_) / length(),
                  static_cast<double>(server_cpu_) / static_cast<double>(std::max<std::uint64_t>(messages, 1)));
    }
  }

 private:
  const Watched& server_;
  std::uint64_t begin_;
  std::uint64_t duration_;
  std::uint64_t end_ = 0;
  std::uint64_t server_cpu_ = 0;
  std::uint64_t own_cpu_ = 0;
  bool open_ = false;
};

struct EchoOptions {
  std::uint16_t port = 0;
  std::uint32_t connections = 0;
  std::uint32_t pipeline = 0;
  std::uint32_t size = 0;
  std::uint64_t duration = 0;
  std::uint64_t warmup = 0;
};

class Echo {
 public:
  explicit Echo(const EchoOptions& options) : options_(options), buffer_(receive_size) {
    frame_ = header_size + options.size;
    const std::vector<std::uint8_t> frame = make_request(1, options.size);
    for (std::uint32_t i = 0; i < options.pipeline; ++i) out_.insert(out_.end(), frame.begin(), frame.end());
  }

  void run(const Watched& server) {
    connect_all();
    Window window(server, options_.warmup, options_.duration);
    std::uint64_t messages = 0;
    for (std::uint32_t i = 0; i < options_.connections; ++i) request(i, options_.pipeline, now_ns());
    std::array<epoll_event, 512> events{};
    for (bool over = false; !over;) {
      const std::size_t ready = poller_.wait(events);
      for (std::size_t i = 0; i < ready; ++i) {
        const std::uint32_t index = events[i].data.u32;
        if ((events[i].events & EPOLLOUT) != 0) push(index);
        if ((events[i].events & ~std::uint32_t{EPOLLOUT}) == 0) continue;
        const std::size_t got = receive(sockets_.fds[index], buffer_);
        if (got == 0) continue;
        Connection& connection = connections_[index];
        const std::uint32_t first = connection.expected.id;
        const std::uint32_t packets = connection.receiver.consume(buffer_.data(), got, connection.expected);
        if (packets == 0) continue;
        if (packets > connection.in_flight) fail("more answers than requests");
        connection.in_flight -= packets;
        const std::uint64_t now = now_ns();
        for (std::uint32_t id = first; id != connection.expected.id; ++id) {
          histogram_.record(now - connection.sent_at[id % options_.pipeline]);
        }
        messages += packets;
        request(index, packets, now);
      }
      const std::uint64_t now = now_ns();
      if (window.opens(now)) {
        messages = 0;
        histogram_ = {};
      }
      over = window.over(now);
    }
    window.close();
    std::printf("{\"mode\":\"echo\",\"connections\":%u,\"pipeline\":%u,\"size\":%u", options_.connections,
                options_.pipeline, options_.size);
    window.print(messages);
    const auto us = [](std::uint64_t ns) { return static_cast<double>(ns) / 1000; };
    std::printf(
        ",\"bytes_per_second\":%.1f,\"latency_us\":{\"p50\":%.2f,\"p90\":%.2f,\"p99\":%.2f,\"p99_9\":%.2f,\"max\":%.2f}"
        ",\"errors\":0}\n",
        static_cast<double>(messages) * options_.size / window.length(), us(histogram_.quantile(0.5)),
        us(histogram_.quantile(0.9)), us(histogram_.quantile(0.99)), us(histogram_.quantile(0.999)),
        us(histogram_.largest()));
  }

 private:
  struct Connection {
    Receiver receiver;
    Expected expected;
    std::uint32_t next_id = 1;  // of the first request not yet handed to the kernel whole
    std::uint32_t due = 0;      // requests not yet handed to the kernel whole
    std::uint32_t in_flight = 0;
    std::size_t begun = 0;  // bytes of the first of those that the kernel has
    bool blocked = false;
    std::vector<std::uint64_t> sent_at;  // by id modulo the pipeline's depth
  };

  void connect_all() {
    connections_.resize(options_.connections);
    for (std::uint32_t i = 0; i < options_.connections; ++i) {
      sockets_.fds.push_back(connect_to(options_.port));
      connections_[i].expected = {
          .type = bench::type_response, .biz_type = 1, .size = options_.size, .id = 1, .check_id = true};
      connections_[i].sent_at.resize(options_.pipeline);
      poller_.set(EPOLL_CTL_ADD, sockets_.fds[i], EPOLLIN, i);
    }
  }

  // `count` further requests are due now.
  void request(std::uint32_t index, std::uint32_t count, std::uint64_t now) {
    Connection& connection = connections_[index];
    for (std::uint32_t i = 0; i < count; ++i) {
      connection.sent_at[(connection.next_id + connection.due + i) % options_.pipeline] = now;
    }
    connection.due += count;
    connection.in_flight += count;
    if (!connection.blocked) push(index);
  }

  // Hands the kernel what is due. The bytes are made anew for each try: nothing is kept for a connection that blocks.
  void push(std::uint32_t index) {
    Connection& connection = connections_[index];
    for (std::uint32_t i = 0; i < connection.due; ++i) {
      std::uint8_t* const frame = out_.data() + i * frame_;
      const std::uint32_t id = connection.next_id + i;
      bench::store_u32(frame + 4, id);
      if (options_.size > 1) frame[frame_ - 1] = Expected::last_byte(id);
      if (options_.size > 0) frame[header_size] = Expected::first_byte(id);
    }
    const std::size_t left = connection.due * frame_ - connection.begun;
    const ssize_t result = send(sockets_.fds[index], out_.data() + connection.begun, left, MSG_NOSIGNAL);
    if (result < 0 && errno != EAGAIN && errno != EINTR) fail_errno("send");
    const std::size_t sent = connection.begun + static_cast<std::size_t>(std::max<ssize_t>(result, 0));
    const auto whole = static_cast<std::uint32_t>(sent / frame_);
    connection.next_id += whole;
    connection.due -= whole;
    connection.begun = sent % frame_;
    const bool blocked = connection.due != 0;
    if (blocked != connection.blocked) {
      connection.blocked = blocked;
      poller_.set(EPOLL_CTL_MOD, sockets_.fds[index], blocked ? EPOLLIN | EPOLLOUT : EPOLLIN, index);
    }
  }

  EchoOptions options_;
  std::size_t frame_ = 0;
  std::vector<std::uint8_t> out_;  // as many requests as can be due on a connection
  std::vector<std::uint8_t> buffer_;
  Sockets sockets_;
  std::vector<Connection> connections_;
  Poller poller_;
  Histogram histogram_;
};

/// One 64-byte request and its answer, on a connection of its own; the socket stays open.
constexpr std::uint32_t small_size = 64;

void exchange(int fd) {
  const std::vector<std::uint8_t> request = make_request(1, small_size);
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(request.size()))
    fail_errno("send");
  Receiver receiver;
  Expected expected{.biz_type = 1, .size = small_size, .id = 1};
  std::vector<std::uint8_t> buffer(4096);
  for (;;) {
    pollfd wait{fd, POLLIN, 0};
    if (poll(&wait, 1, 10'000) != 1) fail("no answer to a request within 10 s");
    if (receiver.consume(buffer.data(), receive(fd, buffer), expected) == 1) return;
  }
}

void run_accept(std::uint16_t port, const Watched& server, std::uint32_t connections, std::uint32_t window) {
  constexpr std::uint32_t per_address = 4096;  // far below the number of ephemeral ports
  Sockets sockets;
  // What a server sets up once, at its first session, is not a session's cost.
  sockets.fds.push_back(connect_to(port));
  exchange(sockets.fds[0]);
  const std::uint64_t baseline = server.known() ? server.resident() : 0;

  struct Opening {
    Receiver receiver;
    bool asked = false;
  };
  std::vector<Opening> opening(connections + 1);
  sockets.fds.reserve(connections + 1);
  const std::vector<std::uint8_t> request = make_request(1, small_size);
  std::vector<std::uint8_t> buffer(4096);
  Poller poller;
  // On loopback the handshake is usually over when connect() returns.
  const auto ask = [&](std::uint32_t index) {
    const ssize_t sent = send(sockets.fds[index], request.data(), request.size(), MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) fail_errno("send on a new connection");
    opening[index].asked = sent == static_cast<ssize_t>(request.size());
    if (sent > 0 && !opening[index].asked) fail("a new connection took half a request");
    return opening[index].asked;
  };

  std::array<epoll_event, 512> events{};
  std::uint32_t opened = 0;
  std::uint32_t done = 0;
  const std::uint64_t cpu = server.cpu_ns();
  const std::uint64_t own_cpu = own_cpu_ns();
  const std::uint64_t begin = now_ns();
  while (done < connections) {
    while (opened < connections && opened - done < window) {
      const std::uint32_t index = ++opened;
      sockets.fds.push_back(begin_connect(port, 2 + index / per_address));
      const bool asked = ask(index);
      poller.set(EPOLL_CTL_ADD, sockets.fds[index], asked ? EPOLLIN : EPOLLIN | EPOLLOUT, index);
    }
    const std::size_t ready = poller.wait(events);
    for (std::size_t i = 0; i < ready; ++i) {
      const std::uint32_t index = events[i].data.u32;
      Opening& connection = opening[index];
      if (!connection.asked) {
        if (ask(index)) poller.set(EPOLL_CTL_MOD, sockets.fds[index], EPOLLIN, index);
        continue;
      }
      Expected expected{.biz_type = 1, .size = small_size, .id = 1};
      const std::size_t got = receive(sockets.fds[index], buffer);
      done += connection.receiver.consume(buffer.data(), got, expected);
    }
  }
  const std::uint64_t elapsed = now_ns() - begin;
  const std::uint64_t own_cpu_used = own_cpu_ns() - own_cpu;
  std::printf("{\"mode\":\"accept\",\"connections\":%u,\"window\":%u,\"seconds\":%.4f,\"connections_per_second\":%.1f",
              connections, window, seconds(elapsed), connections / seconds(elapsed));
  std::printf(",\"loader_cpu\":%.3f", seconds(own_cpu_used) / seconds(elapsed));
  if (server.known()) {
    const std::uint64_t used = server.cpu_ns() - cpu;
    const std::uint64_t resident = server.resident();
    std::printf(",\"server_cpu\":%.3f,\"server_us_per_connection\":%.2f", seconds(used) / seconds(elapsed),
                static_cast<double>(used) / 1000 / connections);
    std::printf(",\"resident_before\":%llu,\"resident_after\":%llu,\"resident_per_session\":%.1f",
                static_cast<unsigned long long>(baseline), static_cast<unsigned long long>(resident),
                (static_cast<double>(resident) - static_cast<double>(baseline)) / connections);
  }
  std::printf(",\"errors\":0}\n");
}

struct FanoutOptions {
  std::uint16_t port = 0;
  std::uint32_t connections = 0;
  std::uint32_t size = 0;
  std::uint32_t burst = 0;
  std::uint64_t duration = 0;
  std::uint64_t warmup = 0;
};

// Round after round: one connection asks for `burst` packets to everyone, all must arrive whole at each.
void run_fanout(const FanoutOptions& options, const Watched& server) {
  Sockets sockets;
  Poller poller;
  for (std::uint32_t i = 0; i < options.connections; ++i) {
    sockets.fds.push_back(connect_to(options.port));
    exchange(sockets.fds[i]);  // now the server has the session
    poller.set(EPOLL_CTL_ADD, sockets.fds[i], EPOLLIN, i);
  }

  struct Listening {
    Receiver receiver;
    std::uint32_t packets = 0;
  };
  std::vector<Listening> listening(options.connections);
  std::array<std::uint8_t, header_size + bench::fanout_trigger_payload> trigger{};
  bench::store_u32(trigger.data() + header_size, options.burst);
  bench::store_u32(trigger.data() + header_size + 4, options.size);
  std::vector<std::uint8_t> buffer(receive_size);
  std::array<epoll_event, 512> events{};
  Expected expected{.type = bench::type_one_way,
                    .biz_type = bench::biz_fanout,
                    .size = options.size,
                    .check_id = false,
                    .filled = true};

  Window window(server, options.warmup, options.duration);
  std::uint64_t messages = 0;
  std::uint64_t rounds = 0;
  for (std::uint32_t id = 1;; ++id) {
    bench::store_header(trigger.data(), bench::type_one_way, bench::biz_fanout_trigger, id,
                        bench::fanout_trigger_payload);
    const std::uint64_t started = now_ns();
    if (send(sockets.fds[id % options.connections], trigger.data(), trigger.size(), MSG_NOSIGNAL) !=
        static_cast<ssize_t>(trigger.size())) {
      fail_errno("send");
    }
    for (Listening& one : listening) one.packets = 0;
    std::uint32_t complete = 0;
    while (complete < options.connections) {
      const std::size_t ready = poller.wait(events);
      for (std::size_t i = 0; i < ready; ++i) {
        const std::uint32_t index = events[i].data.u32;
        Listening& one = listening[index];
        const std::uint32_t packets =
            one.receiver.consume(buffer.data(), receive(sockets.fds[index], buffer), expected);
        if (packets == 0) continue;
        one.packets += packets;
        if (one.packets > options.burst) fail("a session got more packets than were sent to it");
        if (one.packets == options.burst) ++complete;
      }
      if (now_ns() - started > patience) {
        fail("a fan-out to " + std::to_string(options.connections) + " sessions was not complete after 10 s, only at " +
             std::to_string(complete));
      }
    }
    for (const Listening& one : listening) {
      if (one.receiver.in_packet()) fail("a session got half a packet too much");
    }
    messages += std::uint64_t{options.burst} * options.connections;
    ++rounds;
    const std::uint64_t now = now_ns();
    if (window.opens(now)) messages = rounds = 0;
    if (window.over(now)) break;
  }
  window.close();
  std::printf("{\"mode\":\"fanout\",\"connections\":%u,\"burst\":%u,\"size\":%u,\"rounds\":%llu", options.connections,
              options.burst, options.size, static_cast<unsigned long long>(rounds));
  window.print(messages);
  std::printf(",\"errors\":0}\n");
}

int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode != "echo" && mode != "accept" && mode != "fanout") {
    throw std::invalid_argument("the first argument says what to do: echo, accept or fanout");
  }
  const bench::Arguments arguments = [&] {
    if (mode == "echo") {
      return bench::Arguments(argc - 1, argv + 1,
                              {"--port", "--pid", "--connections", "--pipeline", "--size", "--duration", "--warmup"},
                              {});
    }
    if (mode == "accept")
      return bench::Arguments(argc - 1, argv + 1, {"--port", "--pid", "--connections", "--window"}, {});
    return bench::Arguments(argc - 1, argv + 1,
                            {"--port", "--pid", "--connections", "--size", "--burst", "--duration", "--warmup"}, {});
  }();
  const auto port = arguments.number<std::uint16_t>("--port", 0, 1, 65535);
  if (port == 0) throw std::invalid_argument("--port is wanted");
  const Watched server(arguments.number<int>("--pid", 0, 1, 1 << 22));
  const auto ns = [&](const char* name, double otherwise) {
    return static_cast<std::uint64_t>(arguments.number<double>(name, otherwise, 0, 86400) *
                                      static_cast<double>(second));
  };
  const auto count = [&](const char* name, std::uint32_t otherwise, std::uint32_t most) {
    return arguments.number<std::uint32_t>(name, otherwise, 1, most);
  };
  const auto size = arguments.number<std::uint32_t>("--size", 64, 0, bench::largest_payload);
  if (mode == "echo") {
    const EchoOptions options{.port = port,
                              .connections = count("--connections", 100, 20'000),
                              .pipeline = count("--pipeline", 16, 65'536),
                              .size = size,
                              .duration = ns("--duration", 3),
                              .warmup = ns("--warmup", 0.5)};
    bench::raise_descriptor_limit(options.connections + 64);
    Echo(options).run(server);
  } else if (mode == "accept") {
    const std::uint32_t connections = count("--connections", 10'000, 1'000'000);
    bench::raise_descriptor_limit(connections + 64);
    run_accept(port, server, connections, count("--window", 64, 4096));
  } else {
    const FanoutOptions options{.port = port,
                                .connections = count("--connections", 1000, 100'000),
                                .size = size,
                                .burst = count("--burst", 1, 1'000'000),
                                .duration = ns("--duration", 3),
                                .warmup = ns("--warmup", 0.5)};
    bench::raise_descriptor_limit(options.connections + 64);
    run_fanout(options, server);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run_main("bench_load", [&] { return run(argc, argv); });
}
