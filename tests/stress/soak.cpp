// SPDX-License-Identifier: Apache-2.0
// Everything at once, for as long as wanted: two servers on every transport, handlers on one and coroutines on the
// other, clients of all kinds that come, talk, misbehave and go, pools, health checks, events, broadcasts. Says every
// ten seconds how it is, and in the end whether memory and descriptors stayed flat and everything is accounted for.
//
//     soak [SECONDS]
#include "support/sanitized.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <fstream>
#include <malloc.h>
#include <map>
#include <memory>
#include <msgtrans/msgtrans.hpp>
#include <msgtrans/transport/certificate.hpp>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

namespace {

using namespace msgtrans;
using namespace std::chrono_literals;
namespace asio = boost::asio;
using asio::awaitable;
using Clock = std::chrono::steady_clock;
using Counter = std::atomic<std::uint64_t>;

using test::sanitized;  // keeps freed memory

constexpr auto as_result = asio::as_tuple(asio::use_awaitable);

std::size_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  std::size_t all = 0, resident = 0;
  file >> all >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

std::size_t open_descriptors() {
  const std::filesystem::directory_iterator directory("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(directory), end(directory)));
}

double mebibytes(std::size_t bytes) {
  return static_cast<double>(bytes) / (1024.0 * 1024.0);
}

/// Operations by how they ended. What is not expected is unaccounted.
class Outcomes {
 public:
  void add(const error_code& code) {
    const std::lock_guard lock(mutex_);
    ++counts_[code];
  }
  [[nodiscard]] std::uint64_t total() const {
    const std::lock_guard lock(mutex_);
    std::uint64_t sum = 0;
    for (const auto& [code, count] : counts_) sum += count;
    return sum;
  }
  [[nodiscard]] std::uint64_t succeeded() const {
    const std::lock_guard lock(mutex_);
    const auto found = counts_.find(error_code());
    return found == counts_.end() ? 0 : found->second;
  }
  void print(const char* what) const {
    const std::lock_guard lock(mutex_);
    std::printf("  %s:", what);
    for (const auto& [code, count] : counts_) {
      std::printf(" %llu %s;", static_cast<unsigned long long>(count), code ? code.message().c_str() : "succeeded");
    }
    std::printf("\n");
  }

 private:
  mutable std::mutex mutex_;
  std::map<error_code, std::uint64_t> counts_;
};

/// What one server was given to send and what became of it, by its own count and by the tests'.
struct Account {
  Counter took{0};  ///< but for requests, which the server counts
  Counter came{0};
  Counter went{0};
  Counter refused{0};
};

struct Soak {
  std::atomic<bool> ending{false};
  Outcomes connects;
  Outcomes requests;
  Outcomes sends;
  Outcomes pooled;
  Counter begun{0};  ///< operations with a handler
  Counter told{0};   ///< of these, ended
  Counter wrong{0};  ///< answers, orders, reasons that must not be
  Counter client_came{0};
  Counter client_went{0};
  Counter events{0};
  std::vector<std::string> urls;
  std::vector<asio::ip::tcp::endpoint> raw;  ///< for peers that break the rules
  std::string authority;
  SessionOptions client_session;
  Account handlers;
  Account coroutines;

  void fail(const std::string& what) {
    if (wrong.fetch_add(1) < 20) std::fprintf(stderr, "soak: %s\n", what.c_str());
  }
};

Soak* soak = nullptr;  // the only one

void note_request(const error_code& code, bool right) {
  soak->requests.add(code);
  ++soak->told;
  const bool expected = !code || code == Errc::request_timeout || code == Errc::connection_lost ||
                        code == Errc::closed || code == asio::error::operation_aborted || code == Errc::not_found;
  if (!expected) soak->fail("a request ended with " + code.message());
  if (!right) soak->fail("a wrong answer");
}

std::string some_payload(std::mt19937& numbers) {
  const auto kind = numbers() % 20;
  const std::size_t size = kind == 0  ? 20'000 + numbers() % 50'000
                           : kind < 4 ? 2000 + numbers() % 2000
                                      : numbers() % 300;
  std::string text = std::to_string(numbers()) + ":";
  text.resize(std::max(size, text.size()), static_cast<char>('a' + numbers() % 26));
  return text;
}

// --- the servers

/// Answers, asks back, and sends of its own accord; sometimes throws, or closes.
void handle(Account& account, Session& session, const Message& message) {
  thread_local std::mt19937 numbers{std::random_device{}()};
  if (message.is_request()) {
    if (numbers() % 200 != 0 && session.respond(message, message.payload()) == SendResult::queued) ++account.took;
  } else if (session.send(message.payload(), {.biz_type = 1}) == SendResult::queued) {
    ++account.took;
  }
  switch (numbers() % 4000) {
    case 0: throw std::runtime_error("by chance");
    case 1: session.close("by chance"); break;
    default: break;
  }
  if (numbers() % 20 != 0) return;
  ++soak->begun;
  const std::string question = some_payload(numbers);
  session.async_request(question, {.timeout = 2s}, [question](const error_code& code, const Reply& reply) {
    note_request(code, code || reply.text() == question);
  });
}

awaitable<void> behave(SessionActor actor) {
  std::mt19937 numbers{static_cast<unsigned>(actor.session().id().value())};
  asio::steady_timer timer(actor.get_executor());
  while (auto message = co_await actor.receive()) {
    if (message->is_request()) {
      if (message->respond(message->payload()) == SendResult::queued) ++soak->coroutines.took;
    } else {
      ++soak->begun;
      const auto [code] = co_await actor.session().async_send(message->payload(), {.biz_type = 1}, as_result);
      soak->sends.add(code);
      ++soak->told;
      if (!code) ++soak->coroutines.took;
    }
    const auto chance = numbers() % 2000;
    if (chance < 20) {
      timer.expires_after(std::chrono::milliseconds(numbers() % 50));
      co_await timer.async_wait(as_result);
    }
    if (chance == 1999) throw std::runtime_error("by chance");
    if (chance == 1998) co_return;
  }
}

void prepare(ServerTransport& server, Account& account) {
  server.on_connect([&account](Session& session) {
    if (session.id().value() % 97 == 0) {
      ++account.refused;
      return Admission::refuse("by chance");
    }
    ++account.came;
    return Admission::accept();
  });
  server.on_disconnect([&account](Session&, const Error& reason) {
    ++account.went;
    if (!reason) soak->fail("a session ended without a reason");
  });
}

void listen_everywhere(ServerTransport& server, const CertificateAndKey& certificate, const std::string& name) {
  ListenOptions encrypted;
  encrypted.tls.identity = {.certificate_pem = certificate.certificate_pem, .key_pem = certificate.key_pem};
  const auto plain = server.listen(tcp("127.0.0.1:0"));
  soak->raw.emplace_back(asio::ip::make_address("127.0.0.1"), plain.port);
  const auto websocket_at = server.listen(websocket("127.0.0.1:0/chat"));
  soak->raw.emplace_back(asio::ip::make_address("127.0.0.1"), websocket_at.port);
  soak->urls.push_back(plain.url());
  soak->urls.push_back(websocket_at.url());
  soak->urls.push_back(server.listen(tls("127.0.0.1:0"), encrypted).url());
  soak->urls.push_back(server.listen(websocket_tls("127.0.0.1:0/"), encrypted).url());
  soak->urls.push_back(server.listen(unix_socket("@msgtrans-soak-" + name + std::to_string(::getpid()))).url());
  soak->urls.push_back(server.listen(in_process("soak-" + name)).url());
}

// --- the clients

/// One request that is cancelled after a while, unless it ends before.
awaitable<void> ask_and_cancel(Session session, std::string question, std::chrono::microseconds after) {
  const auto executor = co_await asio::this_coro::executor;
  const auto signal = std::make_shared<asio::cancellation_signal>();
  ++soak->begun;
  session.async_request(
      question, {.timeout = 5s},
      asio::bind_executor(executor, asio::bind_cancellation_slot(
                                        signal->slot(), [signal, question](const error_code& code, const Reply& reply) {
                                          note_request(code, code || reply.text() == question);
                                        })));
  asio::steady_timer timer(executor, after);
  co_await timer.async_wait(as_result);
  signal->emit(asio::cancellation_type::terminal);
}

awaitable<void> talk(Session session, unsigned seed) {
  std::mt19937 numbers(seed);
  asio::steady_timer timer(co_await asio::this_coro::executor);
  for (auto steps = 5 + numbers() % 60; steps != 0 && session.is_open() && !soak->ending; --steps) {
    switch (numbers() % 8) {
      case 0:
      case 1:
      case 2: {
        const std::string question = some_payload(numbers);
        ++soak->begun;
        const auto [code, reply] =
            co_await session.async_request(question, {.high_priority = numbers() % 5 == 0, .timeout = 2s}, as_result);
        note_request(code, code || reply.text() == question);
        break;
      }
      case 3:
        co_await ask_and_cancel(session, some_payload(numbers), std::chrono::microseconds(numbers() % 2000));
        break;
      case 4: {
        const std::string text = some_payload(numbers);
        ++soak->begun;
        const auto [code] = co_await session.async_send(text, {.high_priority = numbers() % 5 == 0}, as_result);
        soak->sends.add(code);
        ++soak->told;
        if (code && code != Errc::closed) soak->fail("async_send ended with " + code.message());
        break;
      }
      case 5:
        for (auto i = numbers() % 50; i != 0; --i) (void)session.send(some_payload(numbers));
        break;
      default: timer.expires_after(std::chrono::milliseconds(numbers() % 20)); co_await timer.async_wait(as_result);
    }
  }
}

/// Connects again and again, each time elsewhere and with other options.
awaitable<void> client(unsigned seed) {
  std::mt19937 numbers(seed);
  const auto executor = co_await asio::this_coro::executor;
  asio::steady_timer timer(executor);
  while (!soak->ending) {
    ClientOptions options{.executor = executor, .connect_timeout = 5s, .session = soak->client_session};
    options.tls.ca_pem = soak->authority;
    if (numbers() % 3 == 0) {
      options.session.compression = {.codec = numbers() % 2 == 0 ? Compression::zstd : Compression::zlib};
    }
    options.session.outbound_bytes = numbers() % 2 == 0 ? 10'000 : 1 << 20;
    const auto transport = std::make_unique<ClientTransport>(options);
    const bool hears_end = numbers() % 2 == 0;
    const auto ended = std::make_shared<std::atomic<bool>>(false);
    transport->on_message([](Session& session, const Message& message) {
      if (message.is_request()) session.respond(message, message.payload());
    });
    transport->on_disconnect([ended](Session&, const Error&) {
      ++soak->client_went;
      *ended = true;
    });
    ++soak->begun;
    const auto [code] = co_await transport->async_connect(soak->urls[numbers() % soak->urls.size()], as_result);
    soak->connects.add(code);
    ++soak->told;
    if (!code) {
      if (auto session = transport->session()) co_await talk(*session, static_cast<unsigned>(numbers()));
      if (hears_end) {
        // In order, and the end is told; else it is cut.
        transport->close();
        for (int i = 0; i < 1000 && !*ended; ++i) {
          timer.expires_after(10ms);
          co_await timer.async_wait(as_result);
        }
        if (!*ended) soak->fail("the end of a connection was not told");
        ++soak->client_came;
      } else if (*ended) {
        ++soak->client_came;
      } else {
        // Destroyed, so that nothing is told of it any more.
      }
    } else if (!soak->ending) {
      timer.expires_after(50ms);
      co_await timer.async_wait(as_result);
    }
  }
}

/// Peers that are none of ours: garbage, half a packet, a flood that is not read, silence; then a reset.
awaitable<void> offend(unsigned seed) {
  std::mt19937 numbers(seed);
  const auto executor = co_await asio::this_coro::executor;
  asio::steady_timer timer(executor);
  while (!soak->ending) {
    asio::ip::tcp::socket socket(executor);
    const auto [failed] = co_await socket.async_connect(soak->raw[numbers() % soak->raw.size()], as_result);
    if (!failed) {
      std::string bytes;
      const std::string packet("\1\0\1\0\0\0\0\1\0\0\0\0\0\x64\0\0", 16);  // a request with 100 bytes to come
      switch (numbers() % 5) {
        case 0:
          for (auto i = 1 + numbers() % 1000; i != 0; --i) bytes += static_cast<char>(numbers());
          break;
        case 1: bytes = packet + "half"; break;
        case 2: bytes = packet.substr(0, 5); break;
        case 3:
          for (int i = 0; i < 5000; ++i) bytes += packet + std::string(100, 'x');
          break;
        default: break;
      }
      error_code ignored;
      socket.set_option(asio::ip::tcp::socket::linger(true, 0), ignored);
      if (!bytes.empty()) (void)co_await asio::async_write(socket, asio::buffer(bytes), as_result);
      timer.expires_after(std::chrono::milliseconds(numbers() % 500));
      co_await timer.async_wait(as_result);
    }
    socket.close();
    timer.expires_after(std::chrono::milliseconds(numbers() % 30));
    co_await timer.async_wait(as_result);
  }
}

awaitable<void> use_pool(LoadBalancer* balancer, unsigned seed) {
  std::mt19937 numbers(seed);
  asio::steady_timer timer(co_await asio::this_coro::executor);
  while (!soak->ending) {
    const std::string question = some_payload(numbers);
    ++soak->begun;
    const auto [code, reply] = co_await balancer->async_request(question, {.timeout = 2s}, as_result);
    soak->pooled.add(code);
    ++soak->told;
    if (!code && reply.text() != question) soak->fail("a pool got a wrong answer");
    timer.expires_after(std::chrono::milliseconds(numbers() % 10));
    co_await timer.async_wait(as_result);
  }
}

/// What an operator does: broadcasts, sweeps, closes.
awaitable<void> operate(ServerTransport* server, Account* account) {
  std::mt19937 numbers(1);
  asio::steady_timer timer(co_await asio::this_coro::executor);
  while (!soak->ending) {
    timer.expires_after(50ms);
    co_await timer.async_wait(as_result);
    account->took +=
        server->broadcast(some_payload(numbers), {.biz_type = 2, .high_priority = numbers() % 4 == 0}).queued;
    if (numbers() % 100 == 0) server->session_manager().sweep(3s);
    if (numbers() % 20 != 0) continue;
    const auto ids = server->session_manager().ids();
    if (!ids.empty()) server->close(ids[numbers() % ids.size()], "by the operator");
  }
}

void subscribe(const std::shared_ptr<Subscription<Event>>& subscription) {
  subscription->async_next([subscription](const error_code& code, const NextResult<Event>& event) {
    if (code) return;
    soak->events += event ? 1 : event.lagged();
    subscribe(subscription);
  });
}

struct Sample {
  std::size_t resident;
  std::size_t in_use;  ///< of the heap: what allocators keep is in the other, not in this
  std::size_t descriptors;
};

template <class F>
std::size_t median(const std::vector<Sample>& samples, std::size_t from, std::size_t to, F&& value) {
  std::vector<std::size_t> values;
  for (std::size_t i = from; i < to; ++i) values.push_back(value(samples[i]));
  std::ranges::sort(values);
  return values.empty() ? 0 : values[values.size() / 2];
}

/// Counts what the server took, and says so if it is not what was written and dropped.
void check_account(const char* name, const ServerTransport& server, const Account& account, const StopReport& report) {
  const auto stats = server.stats();
  const auto took = account.took + stats.requests_by_outcome.sent;
  const auto accounted = stats.packets_out + stats.dropped_oldest + stats.dropped_at_close;
  std::printf(
      "  %s: %llu packets taken, %llu written, %llu + %llu dropped; %llu sessions, %llu refused, %llu failed "
      "handshakes, %llu protocol errors, %llu exceptions; %zu sessions cut at the stop\n",
      name, static_cast<unsigned long long>(took), static_cast<unsigned long long>(stats.packets_out),
      static_cast<unsigned long long>(stats.dropped_oldest), static_cast<unsigned long long>(stats.dropped_at_close),
      static_cast<unsigned long long>(stats.sessions_total), static_cast<unsigned long long>(stats.sessions_refused),
      static_cast<unsigned long long>(stats.handshake_failures), static_cast<unsigned long long>(stats.protocol_errors),
      static_cast<unsigned long long>(stats.handler_failures), report.sessions_cut);
  if (accounted != took) soak->fail(std::string(name) + ": what was taken is not what was written and dropped");
  if (account.came != account.went) soak->fail(std::string(name) + ": not every session that came has gone once");
  if (stats.sessions_total != account.came) soak->fail(std::string(name) + ": sessions are miscounted");
  if (stats.sessions_refused != account.refused) soak->fail(std::string(name) + ": refusals are miscounted");
  if (stats.sessions != 0 || server.session_count() != 0) soak->fail(std::string(name) + ": a session is left");
  if (server.actor_manager().size() != 0) soak->fail(std::string(name) + ": a coroutine is left");
  if (!report.complete) soak->fail(std::string(name) + ": the stop is not complete");
}

std::vector<Sample> run(std::chrono::seconds duration) {
  Error error;
  const auto authority = make_certificate({.common_name = "soak", .authority = true}, error);
  const auto certificate = make_certificate({.common_name = "soak", .names = {"127.0.0.1"}}, error, &*authority);
  soak->authority = authority->certificate_pem;
  SessionOptions session{.outbound_bytes = 200'000,
                         .slow_consumer = SlowConsumer::wait,
                         .request_timeout = 2s,
                         .first_packet_timeout = 2s,
                         .idle_timeout = 5s,
                         .read_stall_timeout = 1s,
                         .write_stall_timeout = 1s,
                         .close_timeout = 1s};
  soak->client_session = {.request_timeout = 2s, .first_packet_timeout = 0s, .close_timeout = 2s};
  // Heartbeats are packets that nobody has sent: without them the account is exact.
  ServerTransport handlers({.shards = 2, .event_capacity = 64, .session = session});
  session.slow_consumer = SlowConsumer::drop_oldest;
  session.outbound_bytes = 50'000;
  session.compression = {.codec = Compression::zstd, .threshold = 1000};
  ServerTransport coroutines({.shards = 2, .session = session});
  prepare(handlers, soak->handlers);
  handlers.on_message([](Session& one, const Message& message) { handle(soak->handlers, one, message); });
  prepare(coroutines, soak->coroutines);
  coroutines.on_session(behave, {.mailbox = 16, .restart_delay = 10ms, .max_restarts = 1});
  listen_everywhere(handlers, *certificate, "a");
  listen_everywhere(coroutines, *certificate, "b");
  subscribe(std::make_shared<Subscription<Event>>(handlers.subscribe()));
  subscribe(std::make_shared<Subscription<Event>>(coroutines.subscribe()));
  handlers.start();
  coroutines.start();

  std::vector<Sample> samples;
  {
    LoadBalancerOptions balanced{.urls = {soak->urls[0], soak->urls[4], "tcp://127.0.0.1:1"}};
    balanced.pool.max_connections = 4;
    balanced.pool.lifetime = 3s;
    balanced.pool.idle_time = 1s;
    balanced.pool.client.session.close_timeout = 1s;
    balanced.control = handlers.control();
    LoadBalancer balancer(balanced);
    const HealthChecker checker(balancer, {.interval = 200ms, .timeout = 500ms});

    std::array<asio::io_context, 2> contexts;
    std::vector<std::thread> threads;
    unsigned seed = 1;
    for (auto& context : contexts) {
      for (int i = 0; i < 12; ++i) asio::co_spawn(context, client(seed++), asio::detached);
      for (int i = 0; i < 3; ++i) asio::co_spawn(context, offend(seed++), asio::detached);
      for (int i = 0; i < 3; ++i) asio::co_spawn(context, use_pool(&balancer, seed++), asio::detached);
    }
    asio::co_spawn(contexts[0], operate(&handlers, &soak->handlers), asio::detached);
    asio::co_spawn(contexts[1], operate(&coroutines, &soak->coroutines), asio::detached);
    for (auto& context : contexts) threads.emplace_back([&context] { context.run(); });

    const auto begun = Clock::now();
    for (auto next = begun; next < begun + duration;) {
      next += std::min<Clock::duration>(500ms, Clock::duration(duration) / 30);
      std::this_thread::sleep_until(next);
      samples.push_back({resident_bytes(), ::mallinfo2().uordblks, open_descriptors()});
      static auto told = begun;
      if (next < told + 10s) continue;
      told += 10s;
      std::printf(
          "%5lld s: %7.1f MiB resident, %6.1f in use; %4zu descriptors, %4zu sessions; %llu connects, %llu requests, "
          "%llu sends, "
          "%llu by pools, %llu events; %llu wrong\n",
          static_cast<long long>((told - begun) / 1s), mebibytes(samples.back().resident),
          mebibytes(samples.back().in_use), samples.back().descriptors,
          handlers.session_count() + coroutines.session_count(),
          static_cast<unsigned long long>(soak->connects.total()),
          static_cast<unsigned long long>(soak->requests.total()), static_cast<unsigned long long>(soak->sends.total()),
          static_cast<unsigned long long>(soak->pooled.total()), static_cast<unsigned long long>(soak->events.load()),
          static_cast<unsigned long long>(soak->wrong.load()));
      std::fflush(stdout);
    }
    soak->ending = true;
    for (auto& thread : threads) thread.join();
  }
  const auto report_of_handlers = handlers.stop(5s);
  const auto report_of_coroutines = coroutines.stop(5s);
  check_account("handlers", handlers, soak->handlers, report_of_handlers);
  check_account("coroutines", coroutines, soak->coroutines, report_of_coroutines);
  return samples;
}

}  // namespace

int main(int argc, char** argv) {
  const long seconds = argc > 1 ? std::strtol(argv[1], nullptr, 10) : 600;
  if (seconds < 3) {
    std::fprintf(stderr, "soak [SECONDS]: at least 3\n");
    return 2;
  }
  const auto state = std::make_unique<Soak>();
  soak = state.get();
  const auto descriptors_before = open_descriptors();
  const auto samples = run(std::chrono::seconds(seconds));
  const auto descriptors_after = open_descriptors();

  soak->connects.print("connecting");
  soak->requests.print("requests");
  soak->sends.print("waiting sends");
  soak->pooled.print("requests of pools");
  if (soak->begun != soak->told) {
    soak->fail(std::to_string(soak->begun - soak->told) + " operations have not ended");
  }
  if (soak->client_came != soak->client_went) soak->fail("not every client's connection that ended was told of once");
  if (soak->requests.succeeded() == 0 || soak->pooled.succeeded() == 0 || soak->connects.succeeded() == 0) {
    soak->fail("nothing succeeded");
  }
  const auto third = samples.size() / 3;
  const auto first_and_last = [&](auto value) {
    return std::pair(median(samples, 0, third, value), median(samples, samples.size() - third, samples.size(), value));
  };
  const auto [resident_first, resident_last] = first_and_last([](const Sample& sample) { return sample.resident; });
  const auto [used_first, used_last] = first_and_last([](const Sample& sample) { return sample.in_use; });
  const auto [descriptors_first, descriptors_last] =
      first_and_last([](const Sample& sample) { return sample.descriptors; });
  std::printf(
      "  first and last third: %.1f and %.1f MiB resident, %.1f and %.1f in use, %zu and %zu descriptors; %zu before "
      "and "
      "%zu after\n",
      mebibytes(resident_first), mebibytes(resident_last), mebibytes(used_first), mebibytes(used_last),
      descriptors_first, descriptors_last, descriptors_before, descriptors_after);
  // In a shorter run the first third is when pools and queues grow to their size.
  constexpr long warmed_up = 120;
  const auto grows = [seconds](std::size_t first, std::size_t last, std::size_t allowed_mebibytes) {
    return !sanitized && seconds >= warmed_up && last > first + first / 10 + (allowed_mebibytes << 20);
  };
  if (grows(resident_first, resident_last, 24)) soak->fail("resident memory grows");
  if (grows(used_first, used_last, 6)) soak->fail("memory in use grows");
  if (descriptors_last > descriptors_first + descriptors_first / 5 + 10) soak->fail("descriptors grow");
  constexpr std::size_t allowed_descriptors = 5;  // of Asio's own, made once
  if (descriptors_after > descriptors_before + allowed_descriptors) soak->fail("descriptors are left open");
  std::printf("soak: %s\n", soak->wrong == 0 ? "flat, and everything is accounted for" : "FAILED");
  return soak->wrong == 0 ? 0 : 1;
}
