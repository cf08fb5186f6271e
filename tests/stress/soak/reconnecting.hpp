// SPDX-License-Identifier: Apache-2.0
// The soak's clients that connect again by themselves: to servers that refuse, limit, close, drain, and are not there.
#pragma once

#include "account.hpp"

#include <boost/asio/awaitable.hpp>
#include <boost/asio/steady_timer.hpp>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace msgtrans::test::soaking {

using asio::awaitable;
using namespace std::chrono_literals;

/// One such client from its beginning to its end, as its handlers saw it.
struct Reconnecting : std::enable_shared_from_this<Reconnecting> {
  Account account{true};
  Counter came{0};
  Counter went{0};
  Counter given_up{0};
  Counter greetings{0};  ///< that wait for their answer
  bool has_heartbeats = false;
  ReconnectOptions options;
};

inline awaitable<bool> becomes_true(std::function<bool()> condition, std::chrono::seconds within) {
  asio::steady_timer timer(co_await asio::this_coro::executor);
  const auto end = std::chrono::steady_clock::now() + within;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) co_return false;
    timer.expires_after(10ms);
    co_await timer.async_wait(as_result);
  }
  co_return true;
}

inline ReconnectOptions some_reconnect_options(std::mt19937& numbers) {
  return {.enabled = true,
          .initial_delay = 10ms,
          .max_delay = 200ms,
          .max_attempts = numbers() % 3 == 0 ? 8U : 0U,
          .reset_after = 300ms,
          .retry_first_connect = numbers() % 2 == 0,
          .keep_packets = numbers() % 3 == 0 ? 0U : 50U,
          .keep_bytes = 100'000,
          .retry_requests = numbers() % 3 == 0 ? 0U : 10U,
          .retry_bytes = 200'000};
}

/// The server that lets few in, perhaps nobody, and one that is there for certain.
inline std::vector<std::string> some_urls(std::mt19937& numbers) {
  std::vector<std::string> urls{soak->doors[numbers() % soak->doors.size()]};
  if (numbers() % 3 == 0) urls.emplace_back("tcp://127.0.0.1:1");
  if (numbers() % 2 == 0) urls.push_back(soak->doors[numbers() % soak->doors.size()]);
  urls.push_back(soak->urls[numbers() % soak->urls.size()]);
  return urls;
}

/// Says who it is, as the door wants it.
inline void greet(Reconnecting& self, Session& session) {
  const auto greeting = self.has_heartbeats ? hello_with_heartbeats : hello;
  if (chance()() % 2 == 0) return note_sent(self.account, session.send(greeting));
  ++soak->begun;
  ++self.greetings;
  session.async_request(greeting, {.timeout = 2s},
                        [keep = self.shared_from_this()](const error_code& code, const Reply&) {
                          note_request(keep->account, code, true);
                          --keep->greetings;
                        });
}

inline void check_event(const Reconnecting& self, const ReconnectEvent& event) {
  const auto& options = self.options;
  if (!event.error) soak->fail("a connection was lost without an error");
  if (event.attempt == 0 || (options.max_attempts != 0 && event.attempt > options.max_attempts)) {
    soak->fail("attempt " + std::to_string(event.attempt) + " to connect again");
  }
  const auto longest = options.max_delay + options.max_delay / 5 + 1ms;
  if (event.delay > longest) soak->fail("a delay of " + std::to_string(event.delay.count()) + " ms");
}

/// `self` lives longer than the client.
inline void prepare_reconnecting(ClientTransport& client, Reconnecting& self) {
  intercept(client, self.account);
  client.on_connect([&self](Session& session, const ConnectInfo&) {
    ++self.came;
    greet(self, session);
  });
  client.on_disconnect([&self](Session&, const Error& reason) {
    ++self.went;
    if (!reason) soak->fail("a client's session ended without a reason");
  });
  client.on_reconnecting([&self](const ReconnectEvent& event) { check_event(self, event); });
  client.on_gave_up([&self](const Error& last) {
    ++self.given_up;
    if (!last || self.options.max_attempts == 0) soak->fail("a client has given up for no reason");
  });
  client.on_error([&self](const ErrorEvent& event) { self.account.errors.add(event.error.code); });
  client.on_message([&self](Session& session, const Message& message) {
    ++self.account.handled;
    if (message.is_request()) note_sent(self.account, session.respond(message, message.payload()));
  });
}

inline awaitable<void> ask_again(ClientTransport* client, Reconnecting* self, std::string question, bool once_only) {
  const auto session = client->session();
  ++soak->begun;
  if (once_only && session) {
    Session one = *session;
    const auto [code, reply] = co_await one.async_request(question, {.timeout = 2s}, as_result);
    note_request(self->account, code, code || reply.text() == question);
  } else {
    const auto [code, reply] = co_await client->async_request(question, {.timeout = 2s}, as_result);
    note_request(self->account, code, code || reply.text() == question);
  }
}

inline awaitable<void> talk_on(ClientTransport* client, Reconnecting* self, unsigned seed) {
  std::mt19937 numbers(seed);
  asio::steady_timer timer(co_await asio::this_coro::executor);
  for (auto steps = 20 + numbers() % 300; steps != 0 && !soak->ending && self->given_up == 0; --steps) {
    switch (numbers() % 8) {
      case 0:
      case 1: co_await ask_again(client, self, some_payload(numbers), numbers() % 4 == 0); break;
      case 2: {
        const std::string text = some_payload(numbers);
        ++soak->begun;
        const auto [code] = co_await client->async_send(text, {.high_priority = numbers() % 5 == 0}, as_result);
        soak->sends.add(code);
        ++soak->told;
        note_sent(self->account, code);
        break;
      }
      case 3:
        for (auto i = numbers() % 30; i != 0; --i) note_sent(self->account, client->send(some_payload(numbers)));
        break;
      case 4:
        if (const auto session = client->session(); session && numbers() % 5 == 0) Session(*session).close("by chance");
        break;
      default:
        timer.expires_after(std::chrono::milliseconds(numbers() % 60 == 0 ? 1500 : numbers() % 20));
        co_await timer.async_wait(as_result);
    }
  }
}

inline std::uint64_t taken(const ClientStats& stats, const Reconnecting& self) {
  return self.account.took + stats.requests;
}

inline std::uint64_t written_or_dropped(const ClientStats& stats) {
  return stats.packets_out + stats.dropped_at_close + stats.dropped_oldest + stats.kept_dropped;
}

/// True when it has ended, and everything that it took is accounted for.
inline bool is_balanced(const ClientTransport& client, const Reconnecting& self) {
  const auto stats = client.client_stats();
  const auto took = taken(stats, self);
  const auto accounted = written_or_dropped(stats);
  return !client.is_connected() && self.came == self.went && stats.connections == self.came &&
         (self.has_heartbeats ? took <= accounted : took == accounted) && client.request_stats().counts.pending == 0 &&
         self.greetings == 0;
}

inline void check_reconnecting(const ClientTransport& client, const Reconnecting& self) {
  const Audit audit("a client that connects again");
  const auto stats = client.client_stats();
  const auto requests = client.request_stats().counts;
  const auto& account = self.account;
  const auto took = taken(stats, self);
  const auto accounted = written_or_dropped(stats);
  audit.at_most(took, accounted, "more was taken than was written and dropped");
  if (!self.has_heartbeats) audit.equal(took, accounted, "what was taken is not what was written and dropped");
  audit.equal(self.came, stats.connections, "connections are miscounted");
  audit.equal(self.came, self.went, "not every connection's end was told once");
  audit.zero(stats.kept_packets + stats.kept_bytes, "something is still kept");
  audit.zero(stats.retryable_requests + stats.retryable_bytes, "a request still waits to be sent again");
  audit.at_most(stats.kept_dropped, stats.kept_total, "more was dropped than was kept");
  audit.at_most(stats.connections + stats.failures, stats.tries, "tries are miscounted");
  audit.equal(requests.made,
              requests.answered + requests.timed_out + requests.cancelled + requests.connection_lost + requests.refused,
              "requests by outcome do not add up");
  audit.equal(stats.packets_in, account.in.all, "not everything that came was shown to the interceptor");
  audit.equal(account.handled, account.in.passed_messages, "what came is not what was handed out");
  audit.equal(requests.answered + stats.unmatched_responses, account.in.passed_answers, "answers got lost");
  audit.at_most(account.shown_surely, account.out.all, "the interceptor was not shown everything that was sent");
  audit.equal(account.told_rejected, account.out.rejected, "not every rejection was told");
  audit.equal(account.errors[Errc::handler_failed], stats.handler_failures + account.in.threw + account.out.threw,
              "not every exception was told");
}

inline void add_up(const ClientStats& stats, const Reconnecting& self) {
  auto& sum = soak->reconnections;
  ++sum.lives;
  sum.connections += stats.connections;
  sum.retried += stats.retried_requests;
  sum.kept += stats.kept_total;
  sum.given_up += self.given_up;
}

inline ClientOptions reconnecting_options(const asio::any_io_executor& executor, Reconnecting& self,
                                          std::mt19937& numbers) {
  self.options = some_reconnect_options(numbers);
  self.has_heartbeats = numbers() % 2 == 0;
  ClientOptions options{
      .executor = executor, .connect_timeout = 2s, .session = soak->client_session, .reconnect = self.options};
  options.tls.ca_pem = soak->authority;
  if (self.has_heartbeats) options.session.heartbeat_interval = 300ms;
  if (self.has_heartbeats) options.session.max_missed_heartbeats = 20;
  if (numbers() % 3 == 0) options.session.compression = {.codec = Compression::zlib};
  if (numbers() % 2 == 0) options.session.outbound_bytes = 10'000;
  return options;
}

/// Connects, goes on whatever comes, and closes; in the end it is connected, or knows that it is not.
inline awaitable<void> live_on(unsigned seed) {
  std::mt19937 numbers(seed);
  const auto executor = co_await asio::this_coro::executor;
  const auto self = std::make_shared<Reconnecting>();
  const auto client = std::make_unique<ClientTransport>(reconnecting_options(executor, *self, numbers));
  prepare_reconnecting(*client, *self);
  ++soak->begun;
  const auto urls = some_urls(numbers);
  const auto [code] = co_await client->async_connect(urls, as_result);
  soak->reconnections.connects.add(code);
  ++soak->told;
  if (!code) {
    co_await talk_on(client.get(), self.get(), static_cast<unsigned>(numbers()));
    const std::function<bool()> is_settled = [&client, &self] { return client->is_connected() || self->given_up != 0; };
    const bool settled = co_await becomes_true(is_settled, 20s);
    if (!settled) soak->fail("a client that connects again neither does nor gives up");
  }
  client->close();
  const std::function<bool()> balanced = [&client, &self] { return is_balanced(*client, *self); };
  (void)co_await becomes_true(balanced, 10s);
  check_reconnecting(*client, *self);
  add_up(client->client_stats(), *self);
}

inline awaitable<void> reconnecting_client(unsigned seed) {
  std::mt19937 numbers(seed);
  asio::steady_timer timer(co_await asio::this_coro::executor);
  while (!soak->ending) {
    co_await live_on(static_cast<unsigned>(numbers()));
    timer.expires_after(10ms);
    co_await timer.async_wait(as_result);
  }
}

}  // namespace msgtrans::test::soaking
