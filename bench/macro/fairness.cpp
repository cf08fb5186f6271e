// SPDX-License-Identifier: Apache-2.0
// What one flooding session does to its neighbours: 99 sessions ask now and then, alone; while a peer floods the shard
// that serves them; and, to know what it does just by taking the machine's time, while it floods another shard. Each
// repetition does all three, one after the other; ratios are formed within a repetition.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <deque>
#include <exception>
#include <msgtrans/msgtrans.hpp>
#include <msgtrans/wire/header.hpp>
#include <netinet/in.h>
#include <optional>
#include <poll.h>
#include <stdexcept>
#include <string>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

namespace asio = boost::asio;
using Clock = std::chrono::steady_clock;

enum class Flood { none, elsewhere, here };

struct Load {
  unsigned sessions = 99;
  std::chrono::microseconds interval{10'000};
  std::size_t size = 64;
  std::size_t flood_size = 64;
  std::chrono::milliseconds duration{2000};
  std::chrono::milliseconds warm_up{300};
};

/// Requests as fast as they are taken, by a bare socket, so that it costs the machine little; answers are thrown away
/// by the kernel.
class Flooder {
 public:
  Flooder(std::uint16_t port, std::size_t payload) {
    msgtrans::wire::Header header;
    header.type = msgtrans::wire::PacketType::request;
    header.message_id = 1;
    header.payload_len = static_cast<std::uint32_t>(payload);
    std::array<std::byte, msgtrans::wire::header_size> head;
    msgtrans::wire::encode_header(header, head);
    std::vector<std::byte> packet(head.begin(), head.end());
    packet.resize(packet.size() + payload);
    constexpr std::size_t enough = 256 * 1024;
    while (packets_.size() < enough) packets_.insert(packets_.end(), packet.begin(), packet.end());

    socket_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (socket_ < 0 || ::connect(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
      throw std::runtime_error(std::string("cannot connect the flooder: ") + std::strerror(errno));
    }
    thread_ = std::thread([this] { run(); });
  }
  ~Flooder() {
    ending_ = true;
    ::shutdown(socket_, SHUT_RDWR);
    thread_.join();
    ::close(socket_);
  }
  Flooder(const Flooder&) = delete;
  Flooder& operator=(const Flooder&) = delete;

  [[nodiscard]] std::uint64_t answered_bytes() const noexcept { return answered_.load(std::memory_order_relaxed); }

 private:
  void run() {
    std::size_t at = 0;
    while (!ending_) {
      pollfd ready{socket_, POLLIN | POLLOUT, 0};
      ::poll(&ready, 1, 100);
      if ((ready.revents & POLLIN) != 0) {
        constexpr std::size_t most = 1024 * 1024;
        const auto count = ::recv(socket_, nullptr, most, MSG_TRUNC | MSG_DONTWAIT);  // TCP throws it away
        if (count == 0 || (count < 0 && errno != EAGAIN && errno != EINTR)) return;
        if (count > 0) answered_.fetch_add(static_cast<std::uint64_t>(count), std::memory_order_relaxed);
      }
      if ((ready.revents & POLLOUT) != 0) {
        const auto count = ::send(socket_, packets_.data() + at, packets_.size() - at, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (count < 0 && errno != EAGAIN && errno != EINTR) return;
        if (count > 0) at = (at + static_cast<std::size_t>(count)) % packets_.size();
      }
    }
  }

  std::vector<std::byte> packets_;
  int socket_ = -1;
  std::atomic<bool> ending_{false};
  std::atomic<std::uint64_t> answered_{0};
  std::thread thread_;
};

struct Measured {
  double p50 = 0, p99 = 0, worst = 0;  ///< us
  double flood = 0;                    ///< answers to the flooder, a second
};

/// Asks every now and then, from a moment of its own on.
asio::awaitable<void> ask(msgtrans::Session session, const Load* load, unsigned number, Clock::time_point from,
                          Clock::time_point until, std::vector<double>* latencies) {
  asio::steady_timer timer(co_await asio::this_coro::executor);
  const std::string payload(load->size, 'x');
  auto next = Clock::now() + load->interval * number / load->sessions;
  while (next < until) {
    timer.expires_at(next);
    co_await timer.async_wait(asio::as_tuple(asio::use_awaitable));
    const auto begun = Clock::now();
    const auto [error, reply] =
        co_await session.async_request(payload, msgtrans::RequestOptions{}, asio::as_tuple(asio::use_awaitable));
    if (error) throw std::runtime_error("a request failed: " + error.message());
    const auto now = Clock::now();
    // From when it was due: a request that could not begin since the one before was slow has waited as well.
    if (begun >= from) latencies->push_back(std::chrono::duration<double, std::micro>(now - next).count());
    next += load->interval;
  }
}

Measured measure(const Load& load, Flood flood) {
  const auto answer = [](msgtrans::Session& session, const msgtrans::Message& message) {
    session.respond(message, message.payload());
  };
  msgtrans::ServerTransport server({.shards = 1}), other({.shards = 1});
  server.on_message(answer);
  other.on_message(answer);
  const auto bound = server.listen(msgtrans::tcp("127.0.0.1:0"));
  const auto bound_elsewhere = other.listen(msgtrans::tcp("127.0.0.1:0"));
  server.start();
  other.start();

  std::optional<Flooder> flooder;
  if (flood != Flood::none) {
    flooder.emplace(flood == Flood::here ? bound.port : bound_elsewhere.port, load.flood_size);
  }
  std::vector<double> latencies;
  std::uint64_t answered = 0;
  {
    asio::io_context context(1);
    std::deque<msgtrans::ClientTransport> clients;
    auto guard = asio::make_work_guard(context);
    std::thread thread([&] { context.run(); });
    for (unsigned i = 0; i < load.sessions; ++i) {
      clients.emplace_back(msgtrans::ClientOptions{.executor = context.get_executor()}).connect(bound.url());
    }
    const auto from = Clock::now() + load.warm_up;
    const auto until = from + load.duration;
    unsigned number = 0;
    std::atomic<unsigned> asking{load.sessions};
    std::exception_ptr failure;  // of the thread, until it is joined
    for (auto& client : clients) {
      asio::co_spawn(context, ask(*client.session(), &load, number++, from, until, &latencies),
                     [&](std::exception_ptr thrown) {
                       if (thrown) failure = thrown;
                       asking.fetch_sub(1);
                       asking.notify_one();
                     });
    }
    std::this_thread::sleep_until(from);
    const auto before = flooder ? flooder->answered_bytes() : 0;
    std::this_thread::sleep_until(until);
    answered = flooder ? flooder->answered_bytes() - before : 0;
    for (unsigned left = asking; left != 0; left = asking) asking.wait(left);
    guard.reset();
    clients.clear();
    thread.join();
    if (failure) std::rethrow_exception(failure);
  }
  flooder.reset();
  server.stop(std::chrono::milliseconds(0));
  other.stop(std::chrono::milliseconds(0));
  if (latencies.empty()) throw std::runtime_error("nothing was measured");
  std::ranges::sort(latencies);
  const auto at = [&](double part) {
    return latencies[static_cast<std::size_t>(part * static_cast<double>(latencies.size() - 1))];
  };
  const double packet = static_cast<double>(msgtrans::wire::header_size + load.flood_size);
  return {at(0.5), at(0.99), latencies.back(),
          static_cast<double>(answered) / packet / std::chrono::duration<double>(load.duration).count()};
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

void print(const char* name, const std::vector<double>& values, const char* unit) {
  const auto [least, most] = std::ranges::minmax(values);
  std::printf("%-34s %10.1f  (%.1f to %.1f) %s\n", name, median(values), least, most, unit);
}

}  // namespace

int main(int argc, char** argv) {
  Load load;
  unsigned repetitions = 7;
  unsigned milliseconds = 2000;
  unsigned interval = 10;
  CLI::App app("What one flooding session does to 99 others of its shard");
  app.add_option("--sessions", load.sessions, "beside the flooding one")->check(CLI::Range(1U, 10'000U));
  app.add_option("--interval", interval, "from one request of a session to its next, in ms")
      ->check(CLI::Range(1U, 10'000U));
  app.add_option("--size", load.size, "of their payloads, in bytes");
  app.add_option("--flood-size", load.flood_size, "of the flooder's payloads, in bytes");
  app.add_option("--duration", milliseconds, "of a run, in ms");
  app.add_option("--repetitions", repetitions)->check(CLI::Range(1U, 1000U));
  CLI11_PARSE(app, argc, argv);
  load.duration = std::chrono::milliseconds(milliseconds);
  load.interval = std::chrono::milliseconds(interval);

  std::vector<double> alone, elsewhere, here, ratio, own, flood;
  try {
    for (unsigned i = 0; i < repetitions; ++i) {
      const auto undisturbed = measure(load, Flood::none);
      const auto beside = measure(load, Flood::elsewhere);
      const auto disturbed = measure(load, Flood::here);
      alone.push_back(undisturbed.p99);
      elsewhere.push_back(beside.p99);
      here.push_back(disturbed.p99);
      ratio.push_back(disturbed.p99 / undisturbed.p99);
      own.push_back(disturbed.p99 / beside.p99);
      flood.push_back(disturbed.flood);
      std::printf("%2u: p50 %.1f, %.1f, %.1f us; p99 %.1f, %.1f, %.1f us; at most %.1f, %.1f, %.1f us\n", i + 1,
                  undisturbed.p50, beside.p50, disturbed.p50, undisturbed.p99, beside.p99, disturbed.p99,
                  undisturbed.worst, beside.worst, disturbed.worst);
      std::fflush(stdout);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_fairness: %s\n", error.what());
    return 1;
  }
  std::printf("\n%u sessions, a request each %u ms, %zu bytes; medians of %u repetitions (lowest to highest)\n",
              load.sessions, interval, load.size, repetitions);
  print("p99 alone", alone, "us");
  print("p99, a flooder on another shard", elsewhere, "us");
  print("p99, a flooder on their shard", here, "us");
  print("the flooder, answers a second", flood, "");
  print("ratio to alone (wanted: at most 5)", ratio, "");
  print("ratio to the flooder elsewhere", own, "");
  return 0;
}
