// SPDX-License-Identifier: Apache-2.0
// Everything at once, for as long as wanted: two servers on every transport, handlers on one and coroutines on the
// other, and a third that lets few in; interceptors, groups, rates; clients of all kinds that come, talk, misbehave, go
// and connect again, pools, health checks, events, broadcasts. Says every ten seconds how it is, and in the end whether
// memory and descriptors stayed flat and everything is accounted for.
//
//     soak [SECONDS]
#include "stress/soak/account.hpp"
#include "stress/soak/reconnecting.hpp"
#include "support/sanitized.hpp"

#include <algorithm>
#include <any>
#include <array>
#include <atomic>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <fstream>
#include <malloc.h>
#include <memory>
#include <msgtrans/msgtrans.hpp>
#include <msgtrans/transport/certificate.hpp>
#include <optional>
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

using namespace test::soaking;
using test::sanitized;  // keeps freed memory

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

// --- the servers

constexpr std::size_t most_groups = 5;
constexpr std::size_t total_bytes = 600'000;  // of what all sessions of a server have queued
constexpr auto everybody = "everybody";

std::string some_room(std::mt19937& numbers) {
  return "room " + std::to_string(numbers() % 8);
}

void join(const Groups& groups, std::string_view name, SessionId session) {
  Error error;
  groups.join(name, session, error);
  const auto& code = error.code;
  if (code && code != Errc::closed && code != Errc::not_found && code != Errc::too_many_groups) {
    soak->fail("joining a group ended with " + error.message());
  }
}

/// Joins, leaves, and says something to the others.
void use_groups(const Groups& groups, Account& account, SessionId session, std::string_view text,
                std::mt19937& numbers) {
  if (text.starts_with(hello)) join(groups, everybody, session);
  if (soak->ending) return;
  switch (numbers() % 40) {
    case 0:
    case 1: join(groups, some_room(numbers), session); break;
    case 2: groups.leave(some_room(numbers), session); break;
    case 3:
      note_sent_to_many(account, groups.send(some_room(numbers), "somebody is here", {.biz_type = 3}, session));
      break;
    default: return;
  }
  if (groups.groups_of(session).size() > most_groups) soak->fail("a session is in too many groups");
}

/// Answers, asks back, and sends of its own accord; sometimes throws, or closes.
void handle(Account& account, const Groups& groups, Session& session, const Message& message) {
  auto& numbers = chance();
  ++account.handled;
  if (message.is_request()) {
    if (numbers() % 200 != 0) note_sent(account, session.respond(message, message.payload()));
  } else {
    note_sent(account, session.send(message.payload(), {.biz_type = 1}));
  }
  use_groups(groups, account, session.id(), message.text(), numbers);
  switch (numbers() % 4000) {
    case 0: throw std::runtime_error("by chance");
    case 1: session.close("by chance"); break;
    default: break;
  }
  if (numbers() % 20 != 0) return;
  ++soak->begun;
  const std::string question = some_payload(numbers);
  session.async_request(question, {.timeout = 2s}, [&account, question](const error_code& code, const Reply& reply) {
    note_request(account, code, code || reply.text() == question);
  });
}

awaitable<void> behave(Groups groups, SessionActor actor) {
  auto& account = soak->coroutines;
  const auto id = actor.session().id();
  std::mt19937 numbers{static_cast<unsigned>(id.value())};
  asio::steady_timer timer(actor.get_executor());
  while (auto message = co_await actor.receive()) {
    ++account.handled;
    use_groups(groups, account, id, message->text(), numbers);
    if (message->is_request()) {
      note_sent(account, message->respond(message->payload()));
    } else {
      ++soak->begun;
      const auto [code] = co_await actor.session().async_send(message->payload(), {.biz_type = 1}, as_result);
      soak->sends.add(code);
      ++soak->told;
      note_sent(account, code);
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

/// Whoever has ended is in no group any more, and cannot come back.
void check_left(const Groups& groups, SessionId session) {
  if (!groups.groups_of(session).empty()) soak->fail("a session that has ended is still in a group");
  Error error;
  if (groups.join(everybody, session, error) || error.code != Errc::not_found) {
    soak->fail("a session that has ended could join a group");
  }
}

void prepare(ServerTransport& server, Account& account) {
  intercept(server, account);
  server.on_disconnect([&account, groups = server.groups()](Session& session, const Error& reason) {
    ++account.went;
    if (reason.code == Errc::stopping || reason.code == Errc::drain_expired) ++account.drained;
    if (!reason) soak->fail("a session ended without a reason");
    const auto* const greeting = std::any_cast<std::string>(&session.user_data());
    if (reason.code == Errc::peer_silent && greeting != nullptr && *greeting == hello_with_heartbeats) {
      soak->fail("somebody who sends heartbeats is taken for silent");
    }
    check_left(groups, session.id());
  });
  server.on_error([&account](const ErrorEvent& event) { account.errors.add(event.error.code); });
}

// --- who is let in: at once, after a while, and once somebody else has heard the first message

Admission admit_at_once(Account& account, const Groups& groups, const Session& session) {
  ++account.asked;
  join(groups, everybody, session.id());
  if (session.id().value() % 97 == 0) {
    ++account.refuses;
    return Admission::refuse("by chance");
  }
  ++account.accepts;
  return Admission::accept();
}

awaitable<Admission> admit_later(Account* account, Groups groups, Session session) {
  ++account->asked;
  const auto what = session.id().value() % 97;
  join(groups, everybody, session.id());
  if (what % 3 == 0) {
    asio::steady_timer timer(co_await asio::this_coro::executor);
    timer.expires_after(what == 3 ? 1000ms : std::chrono::milliseconds(what % 7));  // 1 s is too late
    co_await timer.async_wait(as_result);
  }
  if (what < 2) ++account->refuses;
  if (what == 0) throw std::runtime_error("on_connect, by chance");
  if (what == 1) co_return Admission::refuse("by chance");
  ++account->accepts;
  co_return Admission::accept();
}

awaitable<void> decide(Account* account, OwnedMessage first, AdmissionPromise promise, unsigned what) {
  asio::steady_timer timer(co_await asio::this_coro::executor);
  timer.expires_after(what == 0 ? 600ms : std::chrono::milliseconds(what % 7));  // 600 ms are too late
  co_await timer.async_wait(as_result);
  if (first.is_request()) note_sent(*account, first.respond(first.payload()));
  ++(what < 6 ? account->refuses : account->accepts);
  if (what < 3) co_return;  // drops the promise
  promise.decide(what < 6 ? Admission::refuse("by chance") : Admission::accept(std::string(first.text())));
}

void let_decide(asio::thread_pool& deciders, Account& account, const Groups& groups, const Session& session,
                OwnedMessage first, AdmissionPromise promise) {
  ++account.asked;
  ++account.handled;
  join(groups, everybody, session.id());
  const auto what = static_cast<unsigned>(chance()() % 50);
  asio::co_spawn(deciders, decide(&account, std::move(first), std::move(promise), what), asio::detached);
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

/// Sessions that were told to finish, and must have.
class Drains {
 public:
  Drains(ServerTransport& server, Account& account) : server_(server), account_(account) {}

  void begin(SessionId session) {
    if (!server_.drain(session, {.within = 300ms, .quiet = 20ms, .reason = "by the operator"})) return;
    ++account_.drains;
    begun_.emplace_back(session, Clock::now());
  }
  void check() {
    constexpr auto enough = 15s;  // for a drain and a close, however busy the machine is
    while (!begun_.empty() && Clock::now() > begun_.front().second + enough) {
      if (server_.session_manager().contains(begun_.front().first)) soak->fail("a drained session has not ended");
      begun_.pop_front();
    }
  }

 private:
  ServerTransport& server_;
  Account& account_;
  std::deque<std::pair<SessionId, Clock::time_point>> begun_;
};

void speak(ServerTransport& server, Account& account, std::mt19937& numbers) {
  const SendOptions options{.biz_type = 2, .high_priority = numbers() % 4 == 0};
  note_sent_to_many(account, server.broadcast(some_payload(numbers), options));
  note_sent_to_many(account, server.groups().send(everybody, some_payload(numbers), options));
  note_sent_to_many(account, server.groups().send(some_room(numbers), some_payload(numbers), options));
}

/// What an operator does: speaks to all and to groups, sweeps, closes, drains.
awaitable<void> operate(ServerTransport* server, Account* account) {
  std::mt19937 numbers(1);
  asio::steady_timer timer(co_await asio::this_coro::executor);
  Drains drains(*server, *account);
  while (!soak->ending) {
    timer.expires_after(50ms);
    co_await timer.async_wait(as_result);
    speak(*server, *account, numbers);
    drains.check();
    if (numbers() % 100 == 0) server->session_manager().sweep(3s);
    const auto ids = server->session_manager().ids();
    if (ids.empty()) continue;
    const auto id = ids[numbers() % ids.size()];
    switch (numbers() % 20) {
      case 0: server->close(id, "by the operator"); break;
      case 1: drains.begin(id); break;
      case 2: (void)server->groups().leave_all(id); break;
      default: break;
    }
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

// --- the whole

struct Servers {
  explicit Servers(asio::thread_pool& deciders);

  ServerTransport handlers;
  ServerTransport coroutines;
  ServerTransport door;
};

SessionOptions session_options() {
  // Heartbeats are packets that nobody has sent: without them the account is exact.
  return {.outbound_bytes = 200'000,
          .slow_consumer = SlowConsumer::wait,
          .request_timeout = 2s,
          .first_packet_timeout = 2s,
          .idle_timeout = 5s,
          .read_stall_timeout = 1s,
          .write_stall_timeout = 1s,
          .close_timeout = 1s};
}

ServerOptions options_of_handlers() {
  return {.shards = 2,
          .outbound_bytes_total = total_bytes,
          .max_groups_per_session = most_groups,
          .event_capacity = 64,
          .session = session_options()};
}

ServerOptions options_of_coroutines() {
  ServerOptions options{.shards = 2,
                        .outbound_bytes_total = total_bytes,
                        .max_groups_per_session = most_groups,
                        .admission_timeout = 500ms,
                        .session = session_options()};
  options.session.slow_consumer = SlowConsumer::drop_oldest;
  options.session.outbound_bytes = 50'000;
  options.session.packets_per_second = 2000;
  options.session.packet_burst = 200;
  options.session.bytes_per_second = 4'000'000;
  options.session.byte_burst = 100'000;
  options.session.compression = {.codec = Compression::zstd, .threshold = 1000};
  return options;
}

ServerOptions options_of_door() {
  ServerOptions options{.shards = 1,
                        .max_sessions = 5,
                        .max_sessions_per_address = 4,
                        .outbound_bytes_total = total_bytes,
                        .max_groups_per_session = most_groups,
                        .accept_rate = 15,
                        .accept_burst = 7,
                        .accept_rate_per_address = 10,
                        .accept_burst_per_address = 6,
                        .admission_timeout = 300ms,
                        .session = session_options()};
  options.session.compression = {.codec = Compression::zlib, .threshold = 1000};
  options.session.heartbeat_interval = 300ms;
  options.session.max_missed_heartbeats = 20;
  return options;
}

Servers::Servers(asio::thread_pool& deciders)
    : handlers(options_of_handlers()), coroutines(options_of_coroutines()), door(options_of_door()) {
  prepare(handlers, soak->handlers);
  handlers.on_connect(
      [groups = handlers.groups()](Session& session) { return admit_at_once(soak->handlers, groups, session); });
  handlers.on_message([groups = handlers.groups()](Session& session, const Message& message) {
    handle(soak->handlers, groups, session, message);
  });
  prepare(coroutines, soak->coroutines);
  coroutines.on_connect([groups = coroutines.groups()](Session session) {
    return admit_later(&soak->coroutines, groups, std::move(session));
  });
  coroutines.on_session([groups = coroutines.groups()](SessionActor actor) { return behave(groups, std::move(actor)); },
                        {.mailbox = 16, .restart_delay = 10ms, .max_restarts = 1});
  prepare(door, soak->door);
  door.on_connect([&deciders, groups = door.groups()](Session& session, OwnedMessage first, AdmissionPromise promise) {
    let_decide(deciders, soak->door, groups, session, std::move(first), std::move(promise));
  });
  door.on_message([groups = door.groups()](Session& session, const Message& message) {
    handle(soak->door, groups, session, message);
  });
}

void listen_at_the_door(ServerTransport& server) {
  const auto plain = server.listen(tcp("127.0.0.1:0"));
  soak->raw.emplace_back(asio::ip::make_address("127.0.0.1"), plain.port);
  soak->doors.push_back(plain.url());
  soak->doors.push_back(server.listen(websocket("127.0.0.1:0/chat")).url());
  soak->doors.push_back(server.listen(unix_socket("@msgtrans-soak-c" + std::to_string(::getpid()))).url());
  soak->doors.push_back(server.listen(in_process("soak-c")).url());
}

void start(Servers& servers) {
  Error error;
  const auto authority = make_certificate({.common_name = "soak", .authority = true}, error);
  const auto certificate = make_certificate({.common_name = "soak", .names = {"127.0.0.1"}}, error, &*authority);
  soak->authority = authority->certificate_pem;
  soak->client_session = {.request_timeout = 2s, .first_packet_timeout = 0s, .close_timeout = 2s};
  listen_everywhere(servers.handlers, *certificate, "a");
  listen_everywhere(servers.coroutines, *certificate, "b");
  listen_at_the_door(servers.door);
  for (auto* const server : {&servers.handlers, &servers.coroutines, &servers.door}) {
    subscribe(std::make_shared<Subscription<Event>>(server->subscribe()));
    server->start();
  }
}

void print_progress(const Servers& servers, const Sample& sample, std::chrono::seconds since) {
  std::printf(
      "%5lld s: %7.1f MiB resident, %6.1f in use; %4zu descriptors, %4zu sessions; %llu connects, %llu requests, "
      "%llu sends, %llu by pools, %llu events, %llu connected again; %llu wrong\n",
      static_cast<long long>(since / 1s), mebibytes(sample.resident), mebibytes(sample.in_use), sample.descriptors,
      servers.handlers.session_count() + servers.coroutines.session_count() + servers.door.session_count(),
      number(soak->connects.total()), number(soak->requests.total()), number(soak->sends.total()),
      number(soak->pooled.total()), number(soak->events), number(soak->reconnections.connections), number(soak->wrong));
  std::fflush(stdout);
}

std::vector<Sample> watch(const Servers& servers, std::chrono::seconds duration) {
  std::vector<Sample> samples;
  const auto begun = Clock::now();
  auto told = begun;
  for (auto next = begun; next < begun + duration;) {
    next += std::min<Clock::duration>(500ms, Clock::duration(duration) / 30);
    std::this_thread::sleep_until(next);
    samples.push_back({resident_bytes(), ::mallinfo2().uordblks, open_descriptors()});
    if (next < told + 10s) continue;
    told += 10s;
    print_progress(servers, samples.back(), std::chrono::floor<std::chrono::seconds>(told - begun));
  }
  return samples;
}

/// All clients, from the first to the last.
std::vector<Sample> use(Servers& servers, std::chrono::seconds duration) {
  LoadBalancerOptions balanced{.urls = {soak->urls[0], soak->urls[4], "tcp://127.0.0.1:1"}};
  balanced.pool.max_connections = 4;
  balanced.pool.lifetime = 3s;
  balanced.pool.idle_time = 1s;
  balanced.pool.client.session.close_timeout = 1s;
  balanced.control = servers.handlers.control();
  LoadBalancer balancer(balanced);
  const HealthChecker checker(balancer, {.interval = 200ms, .timeout = 500ms});

  std::array<asio::io_context, 2> contexts;
  std::vector<std::thread> threads;
  unsigned seed = 1;
  for (auto& context : contexts) {
    for (int i = 0; i < 12; ++i) asio::co_spawn(context, client(seed++), asio::detached);
    for (int i = 0; i < 5; ++i) asio::co_spawn(context, reconnecting_client(seed++), asio::detached);
    for (int i = 0; i < 3; ++i) asio::co_spawn(context, offend(seed++), asio::detached);
    for (int i = 0; i < 3; ++i) asio::co_spawn(context, use_pool(&balancer, seed++), asio::detached);
  }
  asio::co_spawn(contexts[0], operate(&servers.handlers, &soak->handlers), asio::detached);
  asio::co_spawn(contexts[1], operate(&servers.coroutines, &soak->coroutines), asio::detached);
  asio::co_spawn(contexts[1], operate(&servers.door, &soak->door), asio::detached);
  for (auto& context : contexts) threads.emplace_back([&context] { context.run(); });
  auto samples = watch(servers, duration);
  soak->ending = true;
  for (auto& thread : threads) thread.join();
  return samples;
}

// --- the end

bool wait_until(const std::function<bool()>& condition) {
  for (int i = 0; i < 2000; ++i) {
    if (condition()) return true;
    std::this_thread::sleep_for(10ms);
  }
  return false;
}

/// A message larger than what all sessions together may have queued is taken only while nothing is: so nothing of what
/// went before takes room any more.
void check_room(const Audit& audit, Account& account, Session session) {
  const std::string text(total_bytes, 'x');
  auto result = SendResult::would_block;
  (void)wait_until([&] {
    result = session.send(text, {.compression = no_compression});
    note_sent(account, result);
    return result != SendResult::would_block;
  });
  if (result != SendResult::queued) audit.fail(std::string("the last message was not taken: ") + to_string(result));
}

/// When everybody has gone nothing is left of them, and one more is served as the first was.
void check_nothing_is_left(const char* name, ServerTransport& server, Account& account, const std::string& url) {
  const Audit audit(name);
  const auto groups = server.groups();
  if (!wait_until([&] { return server.session_count() == 0 && server.stats().awaiting_admission == 0; })) {
    audit.zero(server.session_count(), "sessions do not end");
  }
  audit.zero(groups.count(), "a group has members that have gone");
  ClientTransport last({.session = soak->client_session});
  std::atomic<bool> came{false};
  last.on_message([&came](Session&, const Message& message) {
    if (message.payload().size() == total_bytes) came = true;
  });
  Error error;
  bool admitted = false;
  for (int i = 0; i < 20 && !admitted; ++i) {  // it may be refused, by chance
    last.connect(url, error);
    (void)last.send(hello);  // the first one, and one that is handed out
    (void)last.send(hello);
    admitted = wait_until([&] { return groups.size(everybody) == 1 || !last.is_connected(); }) && last.is_connected();
  }
  audit.equal(server.session_count(), 1, "the last one is not served");
  audit.equal(groups.size(everybody), 1, "the last one is not alone in its group");
  audit.equal(groups.count(), 1, "the last one is not in one group");
  for (const auto id : server.session_manager().ids()) {
    if (auto session = server.session_manager().get(id)) check_room(audit, account, *session);
  }
  audit.equal(wait_until([&] { return came.load(); }) ? 1 : 0, 1, "the last message has not come");
  last.close();
}

void check_account(const char* name, const ServerTransport& server, const Account& account, const StopReport& report) {
  const Audit audit(name);
  print_account(name, server, account, report);
  check_traffic(audit, server, account, &account == &soak->door);
  if (&account == &soak->coroutines) {
    check_mailboxes(audit, server, account);
  } else {
    check_handled(audit, server, account);
  }
  check_interceptors(audit, server, account);
  check_sessions(audit, server, account);
  check_admission(audit, server, account);
  if (!report.complete) soak->fail(std::string(name) + ": the stop is not complete");
}

/// What is on has had an effect.
void check_effects(const Servers& servers) {
  const auto handlers = servers.handlers.stats();
  const auto coroutines = servers.coroutines.stats();
  const auto door = servers.door.stats();
  const Audit audit("the soak");
  audit.at_most(1, coroutines.throttled, "no session was over its rate");
  audit.zero(handlers.throttled + door.throttled, "a session was over a rate that it has not");
  audit.at_most(1, coroutines.compressed_packets, "nothing was compressed with zstd");
  audit.at_most(1, door.compressed_packets, "nothing was compressed with zlib");
  audit.at_most(1, door.sessions_refused, "nobody was refused");
  audit.at_most(1, handlers.dropped_inbound + coroutines.dropped_inbound,
                "nothing that was read was lost with its end");
  audit.at_most(1, soak->handlers.drained + soak->coroutines.drained + soak->door.drained, "no session was drained");
  audit.at_most(soak->reconnections.lives + 1, soak->reconnections.connections, "nobody has connected again");
  audit.at_most(1, soak->handlers.in.rejected + soak->coroutines.in.rejected, "nothing was rejected");
}

std::vector<Sample> run(std::chrono::seconds duration) {
  asio::thread_pool deciders(1);
  Servers servers(deciders);
  start(servers);
  auto samples = use(servers, duration);
  struct One {
    const char* name;
    ServerTransport& server;
    Account& account;
    const std::string& url;
  };
  for (const One& one : {One{"handlers", servers.handlers, soak->handlers, soak->urls[0]},
                         One{"coroutines", servers.coroutines, soak->coroutines, soak->urls[6]},
                         One{"door", servers.door, soak->door, soak->doors[0]}}) {
    check_nothing_is_left(one.name, one.server, one.account, one.url);
    const auto report = one.server.stop(5s);
    check_account(one.name, one.server, one.account, report);
  }
  deciders.join();
  constexpr auto enough = 15s;  // for everything to have happened by chance, unless all is slow
  if (duration >= enough && !sanitized) check_effects(servers);
  return samples;
}

void print_reconnections() {
  const auto& all = soak->reconnections;
  std::printf(
      "  connecting again: %llu clients, %llu connections, %llu given up; %llu messages kept, %llu requests sent "
      "again\n",
      number(all.lives), number(all.connections), number(all.given_up), number(all.kept), number(all.retried));
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
  soak->reconnections.connects.print("connecting for longer");
  print_reconnections();
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
      "  first and last third: %.1f and %.1f MiB resident, %.1f and %.1f in use, %zu and %zu descriptors; "
      "%zu before and %zu after\n",
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
