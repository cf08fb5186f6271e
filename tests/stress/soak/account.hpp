// SPDX-License-Identifier: Apache-2.0
// What the soak counts while it runs, and what must be equal in the end.
#pragma once

#include <algorithm>
#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <cstdint>
#include <cstdio>
#include <map>
#include <msgtrans/msgtrans.hpp>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace msgtrans::test::soaking {

namespace asio = boost::asio;
using Counter = std::atomic<std::uint64_t>;

inline constexpr std::string_view hello = "hello";
inline constexpr std::string_view hello_with_heartbeats = "hello, I send heartbeats";

inline constexpr auto as_result = asio::as_tuple(asio::use_awaitable);

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
  [[nodiscard]] std::uint64_t operator[](const error_code& code) const {
    const std::lock_guard lock(mutex_);
    const auto found = counts_.find(code);
    return found == counts_.end() ? 0 : found->second;
  }
  [[nodiscard]] std::uint64_t succeeded() const { return (*this)[{}]; }
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

/// What the interceptor of one end and direction was shown, and what it has done about it.
struct Shown {
  Counter all{0};
  Counter to_many{0};   ///< of these, to no session in particular
  Counter rejected{0};  ///< or answered, or thrown at
  Counter rejected_to_many{0};
  Counter threw{0};
  Counter passed_messages{0};  ///< one-way messages and requests
  Counter passed_requests{0};
  Counter passed_answers{0};

  void reject(const InterceptedMessage& message) {
    ++rejected;
    if (message.session() == nullptr) ++rejected_to_many;
  }
  void pass(const InterceptedMessage& message) {
    ++(message.is_response() ? passed_answers : passed_messages);
    if (message.is_request()) ++passed_requests;
  }
};

/// What one end was given to send and what became of it, who came and was let in, by its own count and by the tests'.
struct Account {
  explicit Account(bool client = false, bool at_once = false) : is_client(client), decides_at_once(at_once) {}

  const bool is_client;
  const bool decides_at_once;  ///< a server, in `on_connect`
  Counter took{0};             ///< but for requests, which the library counts
  Counter shown_surely{0};     ///< calls that have shown their message to the interceptor
  Counter shown_maybe{0};      ///< calls that were refused, so that they may not have
  Counter sent_to_many{0};     ///< calls
  Counter reached_many{0};     ///< of these, those with somebody to send to
  Counter told_rejected{0};    ///< calls
  Counter handled{0};          ///< messages that were handed out
  Counter asked{0};            ///< of `on_connect`
  Counter accepts{0};
  Counter refuses{0};  ///< or threw
  Counter went{0};
  Counter drains{0};
  Counter drained{0};  ///< of `went`
  Shown in;
  Shown out;
  Outcomes errors;  ///< told to `on_error`
};

/// What the clients that connect again by themselves have done in all their lives.
struct Reconnections {
  Outcomes connects;
  Counter lives{0};
  Counter connections{0};
  Counter retried{0};
  Counter kept{0};
  Counter given_up{0};
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
  std::vector<std::string> doors;            ///< of the server that lets few in
  std::vector<asio::ip::tcp::endpoint> raw;  ///< for peers that break the rules
  std::string authority;
  SessionOptions client_session;
  Account handlers{false, true};
  Account coroutines;
  Account door;
  Reconnections reconnections;

  void fail(const std::string& what) {
    if (wrong.fetch_add(1) < 20) std::fprintf(stderr, "soak: %s\n", what.c_str());
  }
};

inline Soak* soak = nullptr;  // the only one

inline std::mt19937& chance() {
  thread_local std::mt19937 numbers{std::random_device{}()};
  return numbers;
}

inline std::string some_payload(std::mt19937& numbers) {
  const auto kind = numbers() % 20;
  const std::size_t size = kind == 0  ? 20'000 + numbers() % 50'000
                           : kind < 4 ? 2000 + numbers() % 2000
                                      : numbers() % 300;
  std::string text = std::to_string(numbers()) + ":";
  text.resize(std::max(size, text.size()), static_cast<char>('a' + numbers() % 26));
  return text;
}

// --- calls

/// Of a call that sends; `maybe`: what is said before an interceptor is asked as well.
inline void note_sent(Account& account, const error_code& code) {
  const bool maybe =
      code == Errc::closed || code == Errc::not_found || (account.is_client && code == Errc::would_block);
  ++(maybe ? account.shown_maybe : account.shown_surely);
  if (!code) ++account.took;
  if (code == Errc::rejected) ++account.told_rejected;
  if (code && !maybe && code != Errc::rejected && code != Errc::would_block) {
    soak->fail("sending ended with " + code.message());
  }
}

inline void note_sent(Account& account, SendResult result) {
  note_sent(account, make_error_code(result));
}

inline void note_sent_to_many(Account& account, const BroadcastResult& result) {
  ++account.sent_to_many;
  if (result.queued + result.dropped + result.refused != 0) ++account.reached_many;
  account.took += result.queued;
}

inline bool may_end_a_request(const error_code& code) {
  return !code || code == Errc::request_timeout || code == Errc::connection_lost || code == Errc::closed ||
         code == asio::error::operation_aborted || code == Errc::not_found;
}

inline void note_request(const error_code& code, bool right) {
  soak->requests.add(code);
  ++soak->told;
  if (!may_end_a_request(code)) soak->fail("a request ended with " + code.message());
  if (!right) soak->fail("a wrong answer");
}

/// The same of an end with interceptors.
inline void note_request(Account& account, const error_code& code, bool right) {
  const bool too_many = account.is_client && code == Errc::would_block;
  const bool maybe = code == Errc::closed || code == Errc::not_found || too_many;
  ++(maybe ? account.shown_maybe : account.shown_surely);
  if (code == Errc::rejected) ++account.told_rejected;
  if (code != Errc::rejected && !too_many) return note_request(code, right);
  soak->requests.add(code);
  ++soak->told;
}

// --- interceptors

constexpr unsigned seldom = 3000;

/// By chance rejects, throws, answers, shortens.
inline Verdict judge_inbound(Account& account, InterceptedMessage& message) {
  ++account.in.all;
  switch (soak->ending ? 0 : 1 + chance()() % seldom) {
    case 1: account.in.reject(message); return Verdict::reject;
    case 2:
      account.in.reject(message);
      ++account.in.threw;
      throw std::runtime_error("an interceptor, by chance");
    case 3:
      if (!message.is_request() || message.respond(message.payload()) != SendResult::queued) break;
      ++account.took;
      account.in.reject(message);
      return Verdict::pass;
    case 4:
      if (message.is_one_way()) message.replace_payload(message.payload().first(message.payload().size() / 2));
      break;
    default: break;
  }
  account.in.pass(message);
  return Verdict::pass;
}

inline Verdict judge_outbound(Account& account, InterceptedMessage& message) {
  ++account.out.all;
  if (message.session() == nullptr) ++account.out.to_many;
  switch (soak->ending ? 0 : 1 + chance()() % seldom) {
    case 1: account.out.reject(message); return Verdict::reject;
    case 2:
      account.out.reject(message);
      ++account.out.threw;
      throw std::runtime_error("an interceptor, by chance");
    case 3:
      if (message.is_one_way()) message.replace_payload(std::string(message.text()) + ", and more");
      break;
    default: break;
  }
  account.out.pass(message);
  return Verdict::pass;
}

template <class End>
void intercept(End& end, Account& account) {
  end.intercept_inbound([&account](InterceptedMessage& message) { return judge_inbound(account, message); });
  end.intercept_outbound([&account](InterceptedMessage& message) { return judge_outbound(account, message); });
}

// --- what must be equal in the end

/// Says for one end what is not as it must be.
class Audit {
 public:
  explicit Audit(std::string name) : name_(std::move(name)) {}

  void equal(std::uint64_t one, std::uint64_t other, const char* what) const {
    if (one != other) fail(what, one, other);
  }
  void at_most(std::uint64_t one, std::uint64_t other, const char* what) const {
    if (one > other) fail(what, one, other);
  }
  void zero(std::uint64_t value, const char* what) const { equal(value, 0, what); }
  void fail(const std::string& what) const { soak->fail(name_ + ": " + what); }

 private:
  void fail(const char* what, std::uint64_t one, std::uint64_t other) const {
    fail(what + (" (" + std::to_string(one)) + ", " + std::to_string(other) + ")");
  }

  std::string name_;
};

inline void check_traffic(const Audit& audit, const ServerTransport& server, const Account& account,
                          bool has_heartbeats) {
  const auto stats = server.stats();
  const auto took = account.took + stats.requests_by_outcome.sent;
  const auto accounted = stats.packets_out + stats.dropped_oldest + stats.dropped_at_close;
  audit.at_most(took, accounted, "more was taken than was written and dropped");
  if (!has_heartbeats) audit.equal(took, accounted, "what was taken is not what was written and dropped");
  audit.zero(stats.queued_packets + stats.queued_bytes, "something is still queued");
  audit.equal(stats.packets_in, account.in.all, "not everything that came was shown to the interceptor");
  audit.equal(stats.requests_received, account.in.passed_requests, "requests got lost");
  audit.equal(stats.requests_by_outcome.answered + stats.unmatched_responses, account.in.passed_answers,
              "answers got lost");
  audit.zero(stats.requests_by_outcome.pending, "requests are pending");
  audit.at_most(stats.compressed_bytes_after, stats.compressed_bytes_before, "compression made it larger");
}

/// Everything that came was handed out, or rejected; by handlers.
inline void check_handled(const Audit& audit, const ServerTransport& server, const Account& account) {
  audit.zero(server.stats().unhandled, "something was not handed out");
  audit.equal(account.handled, account.in.passed_messages, "what came is not what was handed out");
}

/// The same with mailboxes.
inline void check_mailboxes(const Audit& audit, const ServerTransport& server, const Account& account) {
  const auto stats = server.actor_manager().stats();
  audit.equal(account.in.passed_messages, stats.told + stats.refused, "what came is not what mailboxes were given");
  audit.equal(stats.told, account.handled + stats.dropped, "what mailboxes took is not what was received and dropped");
}

inline void check_interceptors(const Audit& audit, const ServerTransport& server, const Account& account) {
  const auto stats = server.stats();
  const auto& out = account.out;
  const auto shown = out.all - out.to_many;
  audit.at_most(account.shown_surely, shown, "the interceptor was not shown everything that was sent");
  audit.at_most(shown, account.shown_surely + account.shown_maybe, "the interceptor was shown something twice");
  // What is sent to a group that has no members is shown to nobody.
  audit.at_most(account.reached_many + out.rejected_to_many, out.to_many, "not every broadcast was shown");
  audit.at_most(out.to_many, account.sent_to_many, "a broadcast was shown twice");
  audit.equal(stats.rejected_inbound, account.in.rejected, "rejections of what came are miscounted");
  audit.equal(stats.rejected_outbound, out.rejected, "rejections of what was to be sent are miscounted");
  audit.equal(account.told_rejected, out.rejected - out.rejected_to_many, "not every rejection was told");
  audit.equal(stats.interceptor_failures, account.in.threw + out.threw, "failures of interceptors are miscounted");
  audit.equal(account.errors[Errc::handler_failed], stats.handler_failures + stats.interceptor_failures,
              "not every exception was told");
}

inline void check_sessions(const Audit& audit, const ServerTransport& server, const Account& account) {
  const auto stats = server.stats();
  audit.zero(stats.sessions + server.session_count(), "a session is left");
  audit.zero(server.actor_manager().size(), "a coroutine is left");
  audit.zero(server.groups().count(), "a group is left");
  audit.equal(stats.sessions_total, account.went, "not every session that came has gone once");
  audit.equal(stats.ends.total(), account.went, "ends by reason are miscounted");
  audit.equal(stats.ends[Errc::stopping] + stats.ends[Errc::drain_expired], account.drained, "drains are miscounted");
  audit.at_most(account.drained, account.drains, "a session was drained that nobody wanted to be");
  audit.equal(stats.handshake_failures_by.total(), stats.handshake_failures, "handshakes by error are miscounted");
}

inline void check_admission(const Audit& audit, const ServerTransport& server, const Account& account) {
  const auto stats = server.stats();
  const auto& why = stats.refusals;
  audit.equal(stats.sessions_refused,
              why.sessions + why.address + why.rate + why.address_rate + why.on_connect + why.timeout,
              "refusals by reason do not add up");
  audit.equal(account.errors[Errc::refused], why.on_connect, "refusals by on_connect were not told");
  audit.equal(account.errors[Errc::admission_timeout], why.timeout, "late admissions were not told");
  audit.equal(account.errors[Errc::too_many_sessions], why.sessions + why.address, "refusals by limits were not told");
  audit.equal(account.errors[Errc::rate_limited], why.rate + why.address_rate, "refusals by rates were not told");
  audit.zero(stats.awaiting_admission, "somebody still waits to be let in");
  // Whoever left or was late meanwhile was decided on in vain.
  audit.at_most(stats.sessions_total, account.accepts, "somebody was let in whom nobody has accepted");
  audit.at_most(why.on_connect, account.refuses, "somebody was refused whom nobody has refused");
  audit.at_most(account.asked, stats.sessions_total + stats.sessions_refused + stats.handshake_failures,
                "somebody who came is unaccounted for");
  if (!account.decides_at_once) return;
  audit.equal(stats.sessions_total, account.accepts, "sessions are miscounted");
  audit.equal(why.on_connect, account.refuses, "refusals are miscounted");
}

inline unsigned long long number(std::uint64_t value) {
  return value;
}

inline void print_account(const char* name, const ServerTransport& server, const Account& account,
                          const StopReport& report) {
  const auto stats = server.stats();
  const auto& why = stats.refusals;
  std::printf(
      "  %s: %llu packets taken, %llu written, %llu + %llu dropped, %llu came, %llu more to nobody; %llu sessions, "
      "%llu failed handshakes, "
      "%llu protocol errors, %llu exceptions; %zu sessions cut at the stop\n",
      name, number(account.took + stats.requests_by_outcome.sent), number(stats.packets_out),
      number(stats.dropped_oldest), number(stats.dropped_at_close), number(stats.packets_in),
      number(stats.dropped_inbound), number(stats.sessions_total), number(stats.handshake_failures),
      number(stats.protocol_errors), number(stats.handler_failures), report.sessions_cut);
  std::printf(
      "    refused by sessions %llu, address %llu, rates %llu + %llu, on_connect %llu, time %llu; intercepted %llu + "
      "%llu, rejected %llu + %llu; %llu to groups and all; throttled %llu; drained %llu of %llu\n",
      number(why.sessions), number(why.address), number(why.rate), number(why.address_rate), number(why.on_connect),
      number(why.timeout), number(account.in.all), number(account.out.all), number(stats.rejected_inbound),
      number(stats.rejected_outbound), number(account.sent_to_many), number(stats.throttled), number(account.drained),
      number(account.drains));
}

}  // namespace msgtrans::test::soaking
