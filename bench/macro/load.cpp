// SPDX-License-Identifier: Apache-2.0

// The load generator for every server of this benchmark: raw epoll, one thread, a closed loop. It checks what comes
// back: each packet's whole header (so its id and its length) and its payload's first and last byte. One JSON object on
// standard output for a run; exit status 1 when anything was wrong.
//
// bench_load echo   --port P [--pid SERVER] [--connections C] [--pipeline D] [--size S] [--duration S] [--warmup S]
// bench_load idle   --port P [--pid SERVER] [--connections N]
// bench_load accept --port P [--pid SERVER] [--connections N] [--window W]
// bench_load fanout --port P [--pid SERVER] [--connections N] [--size S] [--burst B] [--duration S] [--warmup S]
//
// echo and idle also take --transport tcp|tls|unix|ws|wss, and --path of a Unix socket (@name: abstract) instead of
// --port.

#include "common.hpp"

#include <algorithm>
#include <bit>
#include <chrono>
#include <ctime>
#include <dirent.h>
#include <fcntl.h>
#include <fstream>
#include <memory>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <optional>
#include <poll.h>
#include <span>
#include <sys/epoll.h>
#include <sys/uio.h>
#include <sys/un.h>
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

/// What stands before each packet on a WebSocket: the header of a binary frame that holds it alone. None elsewhere.
struct Prefix {
  std::array<std::uint8_t, 14> bytes{};
  std::uint32_t size = 0;

  /// Of a server's frame.
  static Prefix unmasked(std::size_t packet) noexcept {
    Prefix prefix;
    auto& bytes = prefix.bytes;
    bytes[0] = 0x82;
    prefix.size = 2;
    if (packet < 126) {
      bytes[1] = static_cast<std::uint8_t>(packet);
    } else if (packet <= 0xffff) {
      bytes[1] = 126;
      bytes[2] = static_cast<std::uint8_t>(packet >> 8);
      bytes[3] = static_cast<std::uint8_t>(packet);
      prefix.size = 4;
    } else {
      bytes[1] = 127;
      bench::store_u32(bytes.data() + 6, static_cast<std::uint32_t>(packet));
      prefix.size = 10;
    }
    return prefix;
  }

  /// Of a client's.
  static Prefix masked(std::size_t packet, std::uint32_t key) noexcept {
    Prefix prefix = unmasked(packet);
    prefix.bytes[1] |= 0x80;
    bench::store_u32(prefix.bytes.data() + prefix.size, key);
    prefix.size += 4;
    return prefix;
  }
};

/// All frames of a run are masked with this key, so that only what differs between packets is masked anew.
constexpr std::uint32_t websocket_key = 0x37FA213D;

constexpr std::uint8_t key_byte(std::uint32_t key, std::size_t index) noexcept {
  return static_cast<std::uint8_t>(key >> (24 - index % 4 * 8));
}

/// What a packet of this run looks like. All packets a run receives have the same size.
struct Expected {
  std::uint8_t type = bench::type_response;
  std::uint8_t biz_type = 0;
  std::uint32_t size = 0;
  std::uint32_t id = 0;  // of the next
  bool check_id = true;
  bool filled = false;  // the payload is all `fanout_fill`, else as of `first_byte` and `last_byte`
  Prefix prefix = {};

  static std::uint8_t first_byte(std::uint32_t id) noexcept { return static_cast<std::uint8_t>(id * 7 + 1); }
  static std::uint8_t last_byte(std::uint32_t id) noexcept { return static_cast<std::uint8_t>(id * 13 + 5); }
};

void check(const Expected& expected, const std::uint8_t* frame, const std::uint8_t* last) {
  const std::uint8_t* const header = frame + expected.prefix.size;
  const std::uint8_t* const first = header + header_size;
  if (expected.prefix.size != 0 && std::memcmp(frame, expected.prefix.bytes.data(), expected.prefix.size) != 0) {
    fail("wrong header of a WebSocket frame before packet " + std::to_string(expected.id));
  }
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
    const std::size_t frame = expected.prefix.size + header_size + expected.size;
    std::uint32_t packets = 0;
    while (count > 0) {
      if (have_ == 0 && count >= frame) [[likely]] {
        check(expected, at, at + frame - 1);
        at += frame;
        count -= frame;
      } else {
        const std::size_t part = std::min(frame - have_, count);
        if (have_ < head_.size()) std::memcpy(head_.data() + have_, at, std::min(part, head_.size() - have_));
        have_ += static_cast<std::uint32_t>(part);
        at += part;
        count -= part;
        if (have_ < frame) break;
        check(expected, head_.data(), at - 1);
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
  std::array<std::uint8_t, 10 + header_size + 1> head_{};
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

/// Where the server listens, and what it speaks there.
struct Target {
  sockaddr_storage address{};
  socklen_t length = 0;
  bool tls = false;
  bool websocket = false;

  static Target tcp(std::uint16_t port) {
    Target target;
    const sockaddr_in address = bench::loopback(1, port);
    std::memcpy(&target.address, &address, sizeof address);
    target.length = sizeof address;
    return target;
  }

  static Target unix_socket(const std::string& path) {
    Target target;
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.empty() || path.size() >= sizeof address.sun_path) throw std::invalid_argument("--path is wanted");
    std::memcpy(&address.sun_path, path.data(), path.size());
    if (path[0] == '@') address.sun_path[0] = 0;
    target.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size() + (path[0] == '@' ? 0 : 1));
    std::memcpy(&target.address, &address, sizeof address);
    return target;
  }

  [[nodiscard]] Prefix sent(std::uint32_t size) const noexcept {
    return websocket ? Prefix::masked(header_size + size, websocket_key) : Prefix{};
  }
  [[nodiscard]] Prefix received(std::uint32_t size) const noexcept {
    return websocket ? Prefix::unmasked(header_size + size) : Prefix{};
  }
};

/// A non-blocking socket; `source` is the last part of its own loopback address, 0 for the system's choice.
int begin_connect(const Target& target, std::uint32_t source) {
  const int fd = socket(target.address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) fail_errno("socket");
  const int on = 1;
  const bool tcp = target.address.ss_family == AF_INET;
  if (tcp && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0) fail_errno("TCP_NODELAY");
  if (tcp && source != 0) {
    if (setsockopt(fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on) != 0) fail_errno("IP_BIND_ADDRESS_NO_PORT");
    sockaddr_in own = bench::loopback(source, 0);
    if (bind(fd, reinterpret_cast<sockaddr*>(&own), sizeof own) != 0) fail_errno("bind");
  }
  if (connect(fd, reinterpret_cast<const sockaddr*>(&target.address), target.length) != 0 && errno != EINPROGRESS) {
    fail_errno("connect");
  }
  return fd;
}

int connect_to(const Target& target, std::uint32_t source = 0) {
  const int fd = begin_connect(target, source);
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

[[noreturn]] void fail_tls(const char* what) {
  std::array<char, 256> text{};
  ERR_error_string_n(ERR_get_error(), text.data(), text.size());
  fail(std::string(what) + ": " + text.data());
}

/// For all connections: trusts anyone, keeps no sessions, and asks the kernel for as many records at once as come.
SSL_CTX* tls_context() {
  static const std::unique_ptr<SSL_CTX, void (*)(SSL_CTX*)> context = [] {
    std::unique_ptr<SSL_CTX, void (*)(SSL_CTX*)> made(SSL_CTX_new(TLS_client_method()), SSL_CTX_free);
    if (made == nullptr) fail_tls("SSL_CTX_new");
    SSL_CTX_set_verify(made.get(), SSL_VERIFY_NONE, nullptr);
    SSL_CTX_set_session_cache_mode(made.get(), SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(made.get(),
                     SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER | SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_read_ahead(made.get(), 1);
    SSL_CTX_set_default_read_buffer_len(made.get(), 65536);
    return made;
  }();
  return context.get();
}

/// A connected socket, with TLS on it where the target has that.
class Link {
 public:
  explicit Link(int fd) noexcept : fd_(fd) {}

  [[nodiscard]] int fd() const noexcept { return fd_; }

  void begin_tls() {
    tls_.reset(SSL_new(tls_context()));
    if (tls_ == nullptr || SSL_set_fd(tls_.get(), fd_) != 1) fail_tls("SSL_new");
    for (;;) {
      ERR_clear_error();
      const int result = SSL_connect(tls_.get());
      if (result == 1) return;
      const int error = SSL_get_error(tls_.get(), result);
      if (error != SSL_ERROR_WANT_READ && error != SSL_ERROR_WANT_WRITE) fail_tls("TLS handshake");
      wait(error == SSL_ERROR_WANT_READ ? POLLIN : POLLOUT);
    }
  }

  /// How much was taken; 0: nothing now.
  [[nodiscard]] std::size_t send(std::span<const std::uint8_t> bytes) {
    if (tls_ != nullptr) return send_tls(bytes);
    const ssize_t result = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (result < 0 && errno != EAGAIN && errno != EINTR) fail_errno("send");
    return static_cast<std::size_t>(std::max<ssize_t>(result, 0));
  }

  /// What is there; fails when the connection is over. 0: nothing there.
  [[nodiscard]] std::size_t receive(std::vector<std::uint8_t>& buffer) {
    if (tls_ != nullptr) return receive_tls(buffer);
    const ssize_t got = recv(fd_, buffer.data(), buffer.size(), 0);
    if (got > 0) return static_cast<std::size_t>(got);
    if (got == 0) fail("the server closed a connection");
    if (errno != EAGAIN && errno != EINTR) fail_errno("recv");
    return 0;
  }

  /// True if `receive` filled the buffer and may have more that the kernel does not know of.
  [[nodiscard]] bool may_hold_more(std::size_t got, const std::vector<std::uint8_t>& buffer) const noexcept {
    return tls_ != nullptr && got == buffer.size();
  }

  void wait(short what) const {
    pollfd wait{fd_, what, 0};
    if (poll(&wait, 1, 10'000) != 1) fail("nothing from the server for 10 s");
  }

 private:
  struct Free {
    void operator()(SSL* tls) const noexcept { SSL_free(tls); }
  };

  // A record a call.
  std::size_t send_tls(std::span<const std::uint8_t> bytes) {
    std::size_t sent = 0;
    while (sent < bytes.size()) {
      std::size_t count = 0;
      ERR_clear_error();
      const int result = SSL_write_ex(tls_.get(), bytes.data() + sent, bytes.size() - sent, &count);
      if (result != 1) {
        if (SSL_get_error(tls_.get(), result) == SSL_ERROR_WANT_WRITE) break;
        fail_tls("SSL_write");
      }
      sent += count;
    }
    return sent;
  }

  std::size_t receive_tls(std::vector<std::uint8_t>& buffer) {
    std::size_t got = 0;
    while (got < buffer.size()) {
      std::size_t count = 0;
      ERR_clear_error();
      const int result = SSL_read_ex(tls_.get(), buffer.data() + got, buffer.size() - got, &count);
      if (result != 1) {
        if (SSL_get_error(tls_.get(), result) == SSL_ERROR_WANT_READ) break;
        fail_tls("SSL_read");
      }
      got += count;
    }
    return got;
  }

  int fd_;
  std::unique_ptr<SSL, Free> tls_;
};

void upgrade(Link& link) {
  static constexpr std::string_view request =
      "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
      "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";
  if (link.send({reinterpret_cast<const std::uint8_t*>(request.data()), request.size()}) != request.size()) {
    fail("a new connection took half a request");
  }
  std::string answer;
  std::vector<std::uint8_t> buffer(4096);
  while (!answer.ends_with("\r\n\r\n")) {
    link.wait(POLLIN);
    answer.append(reinterpret_cast<const char*>(buffer.data()), link.receive(buffer));
  }
  if (!answer.starts_with("HTTP/1.1 101 ")) fail("no WebSocket: " + answer);
}

/// Up to the end of what the transport agrees on.
Link open_link(const Target& target, std::uint32_t source = 0) {
  Link link(connect_to(target, source));
  if (target.tls) link.begin_tls();
  if (target.websocket) upgrade(link);
  return link;
}

/// Closes at once and leaves no TIME_WAIT behind: thousands of them would slow the next run.
void close_hard(int fd) noexcept {
  const linger at_once{1, 0};
  setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  close(fd);
}

struct Sockets {
  std::vector<Link> links;

  Sockets() = default;
  Sockets(const Sockets&) = delete;
  Sockets& operator=(const Sockets&) = delete;
  ~Sockets() {
    for (const Link& link : links) close_hard(link.fd());
  }
};

std::vector<std::uint8_t> make_request(std::uint32_t id, std::uint32_t size) {
  std::vector<std::uint8_t> frame(header_size + size, std::uint8_t{0x5A});
  bench::store_header(frame.data(), bench::type_request, 1, id, size);
  if (size > 1) frame.back() = Expected::last_byte(id);
  if (size > 0) frame[header_size] = Expected::first_byte(id);
  return frame;
}

/// The same as it is sent to that target.
std::vector<std::uint8_t> make_request(std::uint32_t id, std::uint32_t size, const Target& target) {
  std::vector<std::uint8_t> packet = make_request(id, size);
  if (!target.websocket) return packet;
  for (std::size_t i = 0; i < packet.size(); ++i) packet[i] ^= key_byte(websocket_key, i);
  const Prefix prefix = target.sent(size);
  packet.insert(packet.begin(), prefix.bytes.begin(), prefix.bytes.begin() + prefix.size);
  return packet;
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
  Target target = {};
  std::uint32_t connections = 0;
  std::uint32_t pipeline = 0;
  std::uint32_t size = 0;
  std::uint64_t duration = 0;
  std::uint64_t warmup = 0;
};

class Echo {
 public:
  explicit Echo(const EchoOptions& options) : options_(options), buffer_(receive_size) {
    const std::vector<std::uint8_t> frame = make_request(1, options.size, options.target);
    frame_ = frame.size();
    prefix_ = frame_ - header_size - options.size;
    if (options.target.websocket) key_ = websocket_key;
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
        messages += serve(index);
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

  // Takes what has come on a connection and asks for as much again; returns the number of answers.
  std::uint64_t serve(std::uint32_t index) {
    Connection& connection = connections_[index];
    std::uint64_t messages = 0;
    std::size_t got = 0;
    do {
      got = sockets_.links[index].receive(buffer_);
      if (got == 0) break;
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
    } while (sockets_.links[index].may_hold_more(got, buffer_));
    return messages;
  }

  void connect_all() {
    connections_.resize(options_.connections);
    for (std::uint32_t i = 0; i < options_.connections; ++i) {
      sockets_.links.push_back(open_link(options_.target));
      connections_[i].expected = {.type = bench::type_response,
                                  .biz_type = 1,
                                  .size = options_.size,
                                  .id = 1,
                                  .check_id = true,
                                  .prefix = options_.target.received(options_.size)};
      connections_[i].sent_at.resize(options_.pipeline);
      poller_.set(EPOLL_CTL_ADD, sockets_.links[i].fd(), EPOLLIN, i);
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
      std::uint8_t* const packet = out_.data() + i * frame_ + prefix_;
      const std::uint32_t id = connection.next_id + i;
      const std::size_t last = header_size + options_.size - 1;
      bench::store_u32(packet + 4, id ^ key_);
      if (options_.size > 1) packet[last] = Expected::last_byte(id) ^ key_byte(key_, last);
      if (options_.size > 0) packet[header_size] = Expected::first_byte(id) ^ key_byte(key_, 0);
    }
    const std::size_t left = connection.due * frame_ - connection.begun;
    const std::size_t sent = connection.begun + sockets_.links[index].send({out_.data() + connection.begun, left});
    const auto whole = static_cast<std::uint32_t>(sent / frame_);
    connection.next_id += whole;
    connection.due -= whole;
    connection.begun = sent % frame_;
    const bool blocked = connection.due != 0;
    if (blocked != connection.blocked) {
      connection.blocked = blocked;
      poller_.set(EPOLL_CTL_MOD, sockets_.links[index].fd(), blocked ? EPOLLIN | EPOLLOUT : EPOLLIN, index);
    }
  }

  EchoOptions options_;
  std::size_t frame_ = 0;
  std::size_t prefix_ = 0;
  std::uint32_t key_ = 0;
  std::vector<std::uint8_t> out_;  // as many requests as can be due on a connection
  std::vector<std::uint8_t> buffer_;
  Sockets sockets_;
  std::vector<Connection> connections_;
  Poller poller_;
  Histogram histogram_;
};

/// One 64-byte request and its answer, on a connection of its own; the socket stays open.
constexpr std::uint32_t small_size = 64;

void exchange(Link& link, const Target& target) {
  const std::vector<std::uint8_t> request = make_request(1, small_size, target);
  if (link.send(request) != request.size()) fail("a new connection took half a request");
  Receiver receiver;
  Expected expected{.biz_type = 1, .size = small_size, .id = 1, .prefix = target.received(small_size)};
  std::vector<std::uint8_t> buffer(4096);
  for (;;) {
    link.wait(POLLIN);
    if (receiver.consume(buffer.data(), link.receive(buffer), expected) == 1) return;
  }
}

constexpr std::uint32_t connections_per_address = 4096;  // far below the number of ephemeral ports

// Opens one connection after the other, each with an exchange, and tells what memory that took.
void run_idle(const Target& target, const Watched& server, std::uint32_t connections) {
  if (!server.known()) throw std::invalid_argument("--pid is wanted");
  Sockets sockets;
  sockets.links.push_back(open_link(target));
  exchange(sockets.links[0], target);
  const std::uint64_t baseline = server.resident();
  const std::uint64_t cpu = server.cpu_ns();
  const std::uint64_t own_cpu = own_cpu_ns();
  const std::uint64_t begin = now_ns();
  for (std::uint32_t i = 1; i <= connections; ++i) {
    sockets.links.push_back(open_link(target, 2 + i / connections_per_address));
    exchange(sockets.links.back(), target);
  }
  const double elapsed = seconds(now_ns() - begin);
  const std::uint64_t used = server.cpu_ns() - cpu;
  const std::uint64_t own_cpu_used = own_cpu_ns() - own_cpu;
  const std::uint64_t resident = server.resident();
  std::printf("{\"mode\":\"idle\",\"connections\":%u,\"seconds\":%.4f,\"loader_cpu\":%.3f,\"server_cpu\":%.3f",
              connections, elapsed, seconds(own_cpu_used) / elapsed, seconds(used) / elapsed);
  std::printf(",\"server_us_per_connection\":%.2f,\"resident_before\":%llu,\"resident_after\":%llu",
              static_cast<double>(used) / 1000 / connections, static_cast<unsigned long long>(baseline),
              static_cast<unsigned long long>(resident));
  std::printf(",\"resident_per_session\":%.1f,\"errors\":0}\n",
              (static_cast<double>(resident) - static_cast<double>(baseline)) / connections);
}

void run_accept(const Target& target, const Watched& server, std::uint32_t connections, std::uint32_t window) {
  Sockets sockets;
  // What a server sets up once, at its first session, is not a session's cost.
  sockets.links.push_back(open_link(target));
  exchange(sockets.links[0], target);
  const std::uint64_t baseline = server.known() ? server.resident() : 0;

  struct Opening {
    Receiver receiver;
    bool asked = false;
  };
  std::vector<Opening> opening(connections + 1);
  sockets.links.reserve(connections + 1);
  const std::vector<std::uint8_t> request = make_request(1, small_size);
  std::vector<std::uint8_t> buffer(4096);
  Poller poller;
  // On loopback the handshake is usually over when connect() returns.
  const auto ask = [&](std::uint32_t index) {
    const std::size_t sent = sockets.links[index].send(request);
    opening[index].asked = sent == request.size();
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
      sockets.links.emplace_back(begin_connect(target, 2 + index / connections_per_address));
      const bool asked = ask(index);
      poller.set(EPOLL_CTL_ADD, sockets.links[index].fd(), asked ? EPOLLIN : EPOLLIN | EPOLLOUT, index);
    }
    const std::size_t ready = poller.wait(events);
    for (std::size_t i = 0; i < ready; ++i) {
      const std::uint32_t index = events[i].data.u32;
      Opening& connection = opening[index];
      if (!connection.asked) {
        if (ask(index)) poller.set(EPOLL_CTL_MOD, sockets.links[index].fd(), EPOLLIN, index);
        continue;
      }
      Expected expected{.biz_type = 1, .size = small_size, .id = 1};
      const std::size_t got = sockets.links[index].receive(buffer);
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
  Target target = {};
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
    sockets.links.push_back(open_link(options.target));
    exchange(sockets.links[i], options.target);  // now the server has the session
    poller.set(EPOLL_CTL_ADD, sockets.links[i].fd(), EPOLLIN, i);
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
    if (sockets.links[id % options.connections].send(trigger) != trigger.size()) fail("a trigger was not sent whole");
    for (Listening& one : listening) one.packets = 0;
    std::uint32_t complete = 0;
    while (complete < options.connections) {
      const std::size_t ready = poller.wait(events);
      for (std::size_t i = 0; i < ready; ++i) {
        const std::uint32_t index = events[i].data.u32;
        Listening& one = listening[index];
        const std::uint32_t packets =
            one.receiver.consume(buffer.data(), sockets.links[index].receive(buffer), expected);
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

Target target_of(const bench::Arguments& arguments) {
  const std::string transport = arguments.text("--transport", "tcp");
  if (transport == "unix") return Target::unix_socket(arguments.text("--path", ""));
  const auto port = arguments.number<std::uint16_t>("--port", 0, 1, 65535);
  if (port == 0) throw std::invalid_argument("--port is wanted");
  Target target = Target::tcp(port);
  if (transport != "tcp") {
    target.tls = transport == "tls" || transport == "wss";
    target.websocket = transport == "ws" || transport == "wss";
    if (!target.tls && !target.websocket) {
      throw std::invalid_argument("--transport wants tcp, tls, unix, ws or wss, not '" + transport + "'");
    }
  }
  return target;
}

int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode != "echo" && mode != "idle" && mode != "accept" && mode != "fanout") {
    throw std::invalid_argument("the first argument says what to do: echo, idle, accept or fanout");
  }
  const bench::Arguments arguments = [&] {
    if (mode == "echo") {
      return bench::Arguments(argc - 1, argv + 1,
                              {"--port", "--path", "--transport", "--pid", "--connections", "--pipeline", "--size",
                               "--duration", "--warmup"},
                              {});
    }
    if (mode == "idle") {
      return bench::Arguments(argc - 1, argv + 1, {"--port", "--path", "--transport", "--pid", "--connections"}, {});
    }
    if (mode == "accept")
      return bench::Arguments(argc - 1, argv + 1, {"--port", "--pid", "--connections", "--window"}, {});
    return bench::Arguments(argc - 1, argv + 1,
                            {"--port", "--pid", "--connections", "--size", "--burst", "--duration", "--warmup"}, {});
  }();
  const Target target = target_of(arguments);
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
    const EchoOptions options{.target = target,
                              .connections = count("--connections", 100, 20'000),
                              .pipeline = count("--pipeline", 16, 65'536),
                              .size = size,
                              .duration = ns("--duration", 3),
                              .warmup = ns("--warmup", 0.5)};
    bench::raise_descriptor_limit(options.connections + 64);
    Echo(options).run(server);
  } else if (mode == "idle") {
    const std::uint32_t connections = count("--connections", 10'000, 1'000'000);
    bench::raise_descriptor_limit(connections + 64);
    run_idle(target, server, connections);
  } else if (mode == "accept") {
    const std::uint32_t connections = count("--connections", 10'000, 1'000'000);
    bench::raise_descriptor_limit(connections + 64);
    run_accept(target, server, connections, count("--window", 64, 4096));
  } else {
    const FanoutOptions options{.target = target,
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
