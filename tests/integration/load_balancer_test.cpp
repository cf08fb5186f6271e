// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"
#include "support/process.hpp"
#include "support/raw_peer.hpp"
#include "support/server_process.hpp"

#include <algorithm>
#include <atomic>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/system_executor.hpp>
#include <boost/asio/use_future.hpp>
#include <gtest/gtest.h>
#include <map>
#include <memory>
#include <set>
#include <thread>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;

/// A server that answers with its name; "silence" it leaves unanswered, at "die" it ends the session.
struct NamedServer {
  explicit NamedServer(std::string is) : name(std::move(is)) {
    server.transport.on_message([this](Session& session, const Message& message) {
      if (message.biz_type() == probe_type) {
        ++probes;
        if (!answers_probes) return;
      }
      if (message.text() == "silence") return held.add(message.id());
      if (message.text() == "die") return session.close();
      session.respond(message, name);
    });
    server.start();
  }
  [[nodiscard]] std::string url() const { return server.url(); }

  static constexpr std::uint8_t probe_type = 78;
  const std::string name;
  std::atomic<bool> answers_probes{true};
  std::atomic<int> probes{0};
  Record<std::uint32_t> held;
  TestServer server;
};

class Balancing : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(wait_until([] { return library_threads() == 9; }));  // the servers'; they are named when they run
  }
  [[nodiscard]] LoadBalancerOptions options(Balance balance = Balance::round_robin) const {
    LoadBalancerOptions options;
    options.balance = balance;
    options.urls = {a.url(), b.url(), c.url()};
    options.pool.acquire_timeout = patience;
    return options;
  }
  static EndpointStats stats_of(const LoadBalancer& balancer, const NamedServer& server) {
    for (auto& endpoint : balancer.stats().endpoints) {
      if (endpoint.url == server.url()) return endpoint;
    }
    ADD_FAILURE() << "no endpoint " << server.url();
    return {};
  }
  /// Who answers how often.
  static std::map<std::string, int> answers(LoadBalancer& balancer, int count, std::string_view key = {}) {
    std::map<std::string, int> times;
    for (int i = 0; i < count; ++i) ++times[std::string(balancer.request("?", {}, key).text())];
    return times;
  }
  using Times = std::map<std::string, int>;

  NamedServer a{"a"}, b{"b"}, c{"c"};
};

TEST_F(Balancing, RoundRobinAsksOneAfterTheOther) {
  LoadBalancer balancer(options());
  EXPECT_EQ(answers(balancer, 30), (Times{{"a", 10}, {"b", 10}, {"c", 10}}));
  EXPECT_EQ(stats_of(balancer, a).requests, 10U);
  EXPECT_EQ(stats_of(balancer, a).failed, 0U);
}

TEST_F(Balancing, LeastLoadedAvoidsWhoIsBusy) {
  LoadBalancer balancer(options(Balance::least_loaded));
  balancer.set_healthy(c.url(), false);
  std::vector<PooledConnection> busy;
  for (int i = 0; i < 4; ++i) busy.push_back(balancer.pick()->acquire());
  EXPECT_EQ(stats_of(balancer, a).pool.in_use, 2U);
  EXPECT_EQ(stats_of(balancer, b).pool.in_use, 2U);
  balancer.set_healthy(c.url(), true);
  EXPECT_EQ(answers(balancer, 9), (Times{{"c", 9}}));
}

TEST_F(Balancing, LeastLoadedCountsThoseWhoWaitInLine) {
  auto with = options(Balance::least_loaded);
  with.urls = {a.url(), b.url()};
  with.pool.max_connections = 1;
  LoadBalancer balancer(with);
  std::vector<Answer> waiting;
  const auto ask_and_wait_for = [&](const NamedServer& server, std::size_t in_line) {
    waiting.push_back(ask(balancer, "silence", {.timeout = 0ms}));
    EXPECT_TRUE(wait_until([&] {
      const auto stats = stats_of(balancer, server).pool;
      return stats.in_use == 1 && stats.waiting == in_line;
    })) << server.name
        << in_line;
  };
  balancer.set_healthy(b.url(), false);
  for (std::size_t i = 0; i < 4; ++i) ask_and_wait_for(a, i);
  balancer.set_healthy(b.url(), true);
  for (std::size_t i = 0; i < 4; ++i) ask_and_wait_for(b, i);
}

TEST_F(Balancing, ConsistentHashStaysWithTheKey) {
  LoadBalancer balancer(options(Balance::consistent_hash));
  std::map<std::string, std::string> owner;
  std::set<std::string> all;
  for (int i = 0; i < 60; ++i) {
    const auto key = "key-" + std::to_string(i);
    const auto times = answers(balancer, 3, key);
    ASSERT_EQ(times.size(), 1U);
    owner[key] = times.begin()->first;
    all.insert(owner[key]);
  }
  EXPECT_EQ(all.size(), 3U);
  ASSERT_TRUE(balancer.remove(b.url()));
  for (const auto& [key, name] : owner) {
    const auto now = answers(balancer, 1, key).begin()->first;
    if (name != "b") {
      EXPECT_EQ(now, name);
    } else {
      EXPECT_NE(now, "b");
    }
  }
  balancer.add(b.url());
  for (const auto& [key, name] : owner) EXPECT_EQ(answers(balancer, 1, key).begin()->first, name);
  // Without a key they take turns.
  EXPECT_EQ(answers(balancer, 30), (Times{{"a", 10}, {"b", 10}, {"c", 10}}));
}

TEST_F(Balancing, SpreadsByTheNumberOfVirtualNodes) {
  const auto owners = [&](std::size_t nodes) {
    auto with = options(Balance::consistent_hash);
    with.virtual_nodes = nodes;
    LoadBalancer balancer(with);
    std::vector<std::string> all;
    for (int i = 0; i < 300; ++i) all.push_back(balancer.pick(std::to_string(i))->url());
    return all;
  };
  EXPECT_NE(owners(1), owners(500));
  EXPECT_EQ(owners(500), owners(500));
}

TEST_F(Balancing, AddsAnEndpointWhileItRuns) {
  auto with = options();
  with.urls = {a.url()};
  LoadBalancer balancer(with);
  EXPECT_EQ(answers(balancer, 4), (Times{{"a", 4}}));
  balancer.add(b.url());
  EXPECT_EQ(answers(balancer, 4), (Times{{"a", 2}, {"b", 2}}));
  EXPECT_EQ(thrown([&] { balancer.add(b.url()); }), Errc::invalid_option);
  EXPECT_EQ(thrown([&] { balancer.add("nonsense"); }), Errc::invalid_address);
}

TEST_F(Balancing, RemovesAnEndpointAndLetsItFinish) {
  auto with = options();
  with.urls = {a.url()};
  with.pool.max_connections = 1;
  LoadBalancer balancer(with);
  auto held = balancer.pick()->acquire();
  auto in_line = ask(balancer, "?");
  EXPECT_TRUE(wait_until([&] { return stats_of(balancer, a).pool.waiting == 1; }));
  balancer.add(b.url());
  EXPECT_TRUE(balancer.remove(a.url()));
  EXPECT_FALSE(balancer.remove(a.url()));
  EXPECT_EQ(in_time(in_line).second.text(), "b");  // nothing was sent, so it goes elsewhere
  EXPECT_EQ(held->request("?").text(), "a");
  EXPECT_EQ(answers(balancer, 3), (Times{{"b", 3}}));
  EXPECT_EQ(balancer.stats().leaving, 1U);
  held = {};
  EXPECT_TRUE(wait_until([&] { return a.server.transport.session_count() == 0; }));
  EXPECT_TRUE(wait_until([&] { return balancer.stats().leaving == 0; }));
  ASSERT_TRUE(balancer.remove(b.url()));
  Error error;
  (void)balancer.request("?", {}, {}, error);
  EXPECT_EQ(error.code, Errc::not_found);
  EXPECT_EQ(balancer.pick(), nullptr);
}

TEST_F(Balancing, AvoidsWhoIsMarkedUnhealthyUnlessAllAre) {
  for (const Balance balance : {Balance::round_robin, Balance::least_loaded, Balance::consistent_hash}) {
    LoadBalancer balancer(options(balance));
    EXPECT_TRUE(balancer.set_healthy(b.url(), false));
    EXPECT_FALSE(balancer.set_healthy("tcp://127.0.0.1:1", false));
    EXPECT_FALSE(stats_of(balancer, b).healthy);
    EXPECT_EQ(answers(balancer, 10).count("b"), 0U);
    EXPECT_TRUE(balancer.set_healthy(a.url(), false));
    EXPECT_EQ(answers(balancer, 5), (Times{{"c", 5}}));
    EXPECT_TRUE(balancer.set_healthy(c.url(), false));
    EXPECT_EQ(answers(balancer, 30).size(), 3U);
    EXPECT_TRUE(balancer.set_healthy(b.url(), true));
    EXPECT_EQ(answers(balancer, 5), (Times{{"b", 5}}));
  }
}

TEST_F(Balancing, GoesOnToTheNextWhereItCannotConnect) {
  auto with = options();
  with.urls.push_back(RawListener().endpoint().url());  // nobody there
  with.pool.backoff = {.initial = 1h, .factor = 1, .max = 1h};
  LoadBalancer balancer(with);
  EXPECT_EQ(answers(balancer, 40).size(), 3U);
  const auto dead = balancer.stats().endpoints[3];
  EXPECT_EQ(dead.passed, 10U);
  EXPECT_EQ(dead.requests, 0U);
  EXPECT_EQ(dead.pool.failed, 1U);  // asked once, then known for as long as the backoff lasts
}

TEST_F(Balancing, GoesOnToTheNextWhoseLineIsTooLong) {
  auto with = options();
  with.urls = {a.url(), b.url()};
  with.pool.max_connections = 1;
  with.pool.acquire_timeout = 50ms;
  LoadBalancer balancer(with);
  std::vector<PooledConnection> held;
  held.push_back(balancer.pick()->acquire());
  ASSERT_EQ(held[0]->request("?").text(), "a");
  EXPECT_EQ(answers(balancer, 4), (Times{{"b", 4}}));
  EXPECT_GE(stats_of(balancer, a).pool.timed_out, 1U);
}

TEST_F(Balancing, SaysWhatTheLastOneSaidIfNoneCanBeHad) {
  auto with = options();
  with.urls = {RawListener().endpoint().url(), RawListener().endpoint().url()};
  LoadBalancer balancer(with);
  for (int i = 0; i < 3; ++i) {
    Error error;
    (void)balancer.request("?", {}, {}, error);
    EXPECT_EQ(error.code, asio::error::connection_refused);
  }
}

TEST_F(Balancing, NeverSendsAgainWhatMayHaveBeenSent) {
  LoadBalancer balancer(options());
  for (int i = 0; i < 6; ++i) {
    Error error;
    (void)balancer.request("die", {}, {}, error);
    EXPECT_EQ(error.code, Errc::connection_lost);
  }
  std::uint64_t requests = 0, failed = 0;
  for (const auto& endpoint : balancer.stats().endpoints) {
    requests += endpoint.requests;
    failed += endpoint.failed;
  }
  EXPECT_EQ(requests, 6U);
  EXPECT_EQ(failed, 6U);
  std::uint64_t arrived = 0;
  for (const auto* const server : {&a, &b, &c}) arrived += server->server.transport.stats().packets_in;
  EXPECT_EQ(arrived, 6U);
}

TEST_F(Balancing, CancelsARequestWhereverItIs) {
  auto with = options();
  with.urls = {a.url()};
  with.pool.max_connections = 1;
  LoadBalancer balancer(with);
  for (const bool in_line : {false, true}) {
    PooledConnection held;
    if (in_line) held = balancer.pick()->acquire();
    asio::io_context context(1);
    asio::cancellation_signal signal;
    Record<error_code> result;
    balancer.async_request("silence", {.timeout = 0ms},
                           asio::bind_executor(context, asio::bind_cancellation_slot(
                                                            signal.slot(), [result](error_code code, const Reply&) {
                                                              result.add(code);
                                                            })));
    EXPECT_TRUE(wait_until([&] {
      const auto stats = stats_of(balancer, a).pool;
      return in_line ? stats.waiting == 1 : stats.in_use == 1;
    }));
    signal.emit(asio::cancellation_type::total);
    context.run_for(patience);
    EXPECT_EQ(result.at(0), asio::error::operation_aborted);
    EXPECT_TRUE(wait_until([&] { return stats_of(balancer, a).pool.waiting == 0; }));
  }
}

TEST_F(Balancing, ServesEveryToken) {
  LoadBalancer balancer(options());
  EXPECT_FALSE(in_time(balancer.async_request("?", asio::use_future)).text().empty());
  EXPECT_FALSE(in_time(balancer.async_request("?", {.biz_type = 1}, "key", asio::use_future)).text().empty());
}

TEST_F(Balancing, HasOneThreadForAllEndpoints) {
  const auto before = library_threads();
  {
    auto with = options();
    with.pool.min_connections = 2;
    LoadBalancer balancer(with);
    EXPECT_TRUE(
        wait_until([&] { return stats_of(balancer, a).pool.idle == 2 && stats_of(balancer, c).pool.idle == 2; }));
    EXPECT_EQ(library_threads(), before + 1);
  }
  EXPECT_EQ(library_threads(), before);
  asio::io_context own(1);
  auto with = options();
  with.executor = own.get_executor();
  LoadBalancer balancer(with);
  std::string text;
  balancer.async_request("?", [&](error_code, const Reply& reply) { text = reply.text(); });
  for (const auto until = Clock::now() + patience; text.empty() && Clock::now() < until;) own.run_for(1ms);
  EXPECT_FALSE(text.empty());
  EXPECT_EQ(library_threads(), before);
}

TEST_F(Balancing, CloseAndDestructorEndWhatWaits) {
  const auto before = library_threads();
  for (const bool close : {true, false}) {
    std::vector<Answer> waiting;
    std::shared_ptr<ConnectionPool> kept;
    PooledConnection held;
    {
      auto with = options();
      with.urls = {a.url()};
      with.pool.max_connections = 1;
      LoadBalancer balancer(with);
      kept = balancer.pick();
      held = kept->acquire();
      for (int i = 0; i < 5; ++i) waiting.push_back(ask(balancer, "?"));
      if (close) {
        balancer.close();
        for (auto& one : waiting) EXPECT_EQ(in_time(one).first, Errc::closed);
        EXPECT_EQ(held->request("?").text(), "a");
        EXPECT_EQ(in_time(ask(balancer, "?")).first, Errc::closed);
        EXPECT_EQ(thrown([&] { balancer.add(b.url()); }), Errc::closed);
      }
    }
    if (!close) {
      for (auto& one : waiting) EXPECT_EQ(in_time(one).first, Errc::closed);
    }
    EXPECT_FALSE(held->is_connected());
    EXPECT_FALSE(kept->try_acquire());
    held = {};
    EXPECT_TRUE(wait_until([&] { return library_threads() == before; }));
    Error error;
    (void)kept->request("?", {}, error);
    EXPECT_EQ(error.code, Errc::closed);
  }
}

TEST_F(Balancing, RefusesOptionsOutOfTheirRange) {
  const auto text_of = [this](auto change) {
    auto with = options();
    change(with);
    std::string text;
    const auto code = thrown([&] { const LoadBalancer balancer(with); }, &text);
    EXPECT_TRUE(code == Errc::invalid_option || code == Errc::invalid_address) << code.message();
    return text;
  };
  using Options = LoadBalancerOptions;
  const std::pair<const char*, std::string> cases[] = {
      {"balance", text_of([](Options& o) { o.balance = static_cast<Balance>(9); })},
      {"virtual_nodes", text_of([](Options& o) { o.virtual_nodes = 0; })},
      {"virtual_nodes", text_of([](Options& o) { o.virtual_nodes = 10'001; })},
      {"pool.url", text_of([this](Options& o) { o.pool.url = a.url(); })},
      {"pool.executor", text_of([](Options& o) { o.pool.executor = asio::system_executor(); })},
      {"idle_time", text_of([](Options& o) { o.pool.idle_time = -1ms; })},
      {"nonsense", text_of([](Options& o) { o.urls.emplace_back("nonsense"); })},
      {"there already", text_of([this](Options& o) { o.urls.push_back(a.url()); })},
  };
  for (const auto& [name, text] : cases) EXPECT_NE(text.find(name), std::string::npos) << name << ": " << text;
}

TEST_F(Balancing, EndpointsComeAndGoUnderLoad) {
  LoadBalancer balancer(options(Balance::least_loaded));
  std::atomic<bool> stop = false;
  std::atomic<std::uint64_t> answered = 0;
  std::vector<std::thread> users;
  for (int t = 0; t < 3; ++t) {
    users.emplace_back([&] {
      while (!stop) {
        Error error;
        (void)balancer.request("?", {}, {}, error);
        EXPECT_FALSE(error) << error.message();
        ++answered;
      }
    });
  }
  for (int i = 0; i < 30; ++i) {
    const auto before = answered.load();
    EXPECT_TRUE(balancer.remove(i % 2 == 0 ? a.url() : b.url()));
    EXPECT_TRUE(wait_until([&] { return answered > before + 10; }));
    balancer.add(i % 2 == 0 ? a.url() : b.url());
  }
  stop = true;
  for (auto& user : users) user.join();
  EXPECT_TRUE(wait_until([&] { return balancer.stats().leaving == 0; }));
}

// --- health checks

class Health : public Balancing {
 protected:
  [[nodiscard]] static HealthCheckerOptions checks() {
    return {.interval = 10ms, .timeout = 500ms, .rise = 2, .fall = 3, .payload = "probe", .biz_type = probe_type};
  }
  static constexpr auto probe_type = NamedServer::probe_type;
  static HealthStats health_of(const HealthChecker& checker, const NamedServer& server) {
    for (auto& stats : checker.stats()) {
      if (stats.url == server.url()) return stats;
    }
    return {};
  }
  /// About that subject, or about any.
  static std::optional<Event> next_of(Subscription<Event>& news, EventKind kind, std::string_view subject = {}) {
    for (auto event = news.next_for(patience); event; event = news.next_for(patience)) {
      if (event->kind == kind && (subject.empty() || event->subject == subject)) return *event;
    }
    return std::nullopt;
  }
};

TEST_F(Health, LeavesThoseThatAnswerAlone) {
  LoadBalancer balancer(options());
  const HealthChecker checker(balancer, checks());
  EXPECT_TRUE(wait_until([&] { return a.probes >= 5 && b.probes >= 5 && c.probes >= 5; }));
  for (const auto& stats : checker.stats()) {
    EXPECT_TRUE(stats.healthy);
    EXPECT_EQ(stats.failed + stats.downs + stats.ups, 0U);
  }
  // By a connection of its own, which it keeps.
  EXPECT_EQ(a.server.came.size(), 1U);
  EXPECT_EQ(stats_of(balancer, a).pool.made, 0U);
}

TEST_F(Health, TakesOutWhoDoesNotAnswerAndBringsItBackAndSaysSo) {
  LoadBalancer balancer(options());
  auto news = balancer.subscribe();
  auto with = checks();
  with.timeout = 30ms;
  const HealthChecker checker(balancer, with);
  ASSERT_TRUE(wait_until([&] { return b.probes >= 1; }));
  b.answers_probes = false;
  const auto down = next_of(news, EventKind::endpoint_down, b.url());
  ASSERT_TRUE(down);
  EXPECT_EQ(down->error.code, Errc::request_timeout);
  EXPECT_FALSE(stats_of(balancer, b).healthy);
  EXPECT_EQ(answers(balancer, 10).count("b"), 0U);
  auto stats = health_of(checker, b);
  EXPECT_FALSE(stats.healthy);
  EXPECT_EQ(stats.downs, 1U);
  EXPECT_GE(stats.failed, with.fall);
  b.answers_probes = true;
  ASSERT_TRUE(next_of(news, EventKind::endpoint_up, b.url()));
  EXPECT_TRUE(stats_of(balancer, b).healthy);
  EXPECT_EQ(answers(balancer, 9), (Times{{"a", 3}, {"b", 3}, {"c", 3}}));
  EXPECT_EQ(health_of(checker, b).ups, 1U);
  EXPECT_EQ(health_of(checker, a).downs, 0U);
}

/// Lets so many probes fail or succeed, by the verdict.
TEST_F(Health, ChangesItsMindOnlyAfterEnoughInARow) {
  auto with = options();
  with.urls = {a.url()};
  LoadBalancer balancer(with);
  auto how = checks();
  how.interval = 1ms;
  how.rise = 4;
  how.fall = 5;
  // Nearly enough failures, one success, and again; then enough. The same upwards.
  const std::string script = "xxxx.xxxx.xxxxx...x...x....";
  std::atomic<std::size_t> step = 0;
  Record<bool> marks;
  how.accept = [&](const Reply&) {
    marks.add(balancer.stats().endpoints[0].healthy);
    const auto at = step++;
    return at >= script.size() || script[at] == '.';
  };
  const HealthChecker checker(balancer, how);
  ASSERT_TRUE(marks.wait_for(script.size() + 1));
  for (std::size_t i = 0; i <= script.size(); ++i) {
    const bool healthy = i < 15 || i >= script.size();  // as it was before that probe
    EXPECT_EQ(marks.at(i), healthy) << i;
  }
  EXPECT_EQ(health_of(checker, a).downs, 1U);
  EXPECT_EQ(health_of(checker, a).ups, 1U);
}

TEST_F(Health, TellsTheSubscribersOfTheServerWhoseControlIsUsed) {
  auto news = a.server.transport.subscribe();
  auto with = options();
  with.control = a.server.transport.control();
  {
    LoadBalancer balancer(with);
    const auto before = a.server.transport.session_manager().stats().commands;
    const HealthChecker checker(balancer, checks());
    EXPECT_FALSE(balancer.request("?").text().empty());
    EXPECT_TRUE(next_of(news, EventKind::pool_grown));
    ASSERT_TRUE(wait_until([&] { return b.probes >= 1; }));
    b.answers_probes = false;
    EXPECT_TRUE(next_of(news, EventKind::endpoint_down, b.url()));
    EXPECT_GT(a.server.transport.session_manager().stats().commands, before);
  }
  // The loop is the server's, and goes on.
  const RawPeer peer(a.server.endpoint);
  EXPECT_TRUE(next_of(news, EventKind::session_connected));
}

TEST_F(Health, AnExceptionOfTheJudgeIsAFailure) {
  LoadBalancer balancer(options());
  auto news = balancer.subscribe();
  auto with = checks();
  with.accept = [](const Reply& reply) -> bool {
    if (reply.text() == "c") throw std::runtime_error("no");
    return true;
  };
  const HealthChecker checker(balancer, with);
  const auto down = next_of(news, EventKind::endpoint_down, c.url());
  ASSERT_TRUE(down);
  EXPECT_EQ(down->error.code, Errc::handler_failed);
}

TEST_F(Health, KeepsItsInterval) {
  LoadBalancer balancer(options());
  auto with = checks();
  with.interval = 1h;
  const HealthChecker checker(balancer, with);
  EXPECT_TRUE(wait_until([&] { return a.probes == 1; }));
  EXPECT_FALSE(wait_until([&] { return a.probes > 1; }, 100ms));
}

TEST_F(Health, UsesTheClientsOptions) {
  LoadBalancer balancer(options());
  auto news = balancer.subscribe();
  auto with = checks();
  with.client.session.max_payload = 3;  // less than the probe
  const HealthChecker checker(balancer, with);
  const auto down = next_of(news, EventKind::endpoint_down, a.url());
  ASSERT_TRUE(down);
  EXPECT_EQ(down->error.code, Errc::too_large);
}

TEST_F(Health, ProbesWhoIsAddedAndForgetsWhoIsRemoved) {
  auto with = options();
  with.urls = {a.url()};
  LoadBalancer balancer(with);
  const HealthChecker checker(balancer, checks());
  ASSERT_TRUE(wait_until([&] { return a.probes >= 2; }));
  balancer.add(b.url());
  EXPECT_TRUE(wait_until([&] { return b.probes >= 2; }));
  balancer.remove(a.url());
  EXPECT_TRUE(wait_until([&] { return checker.stats().size() == 1; }));
  EXPECT_EQ(checker.stats()[0].url, b.url());
  EXPECT_TRUE(wait_until([&] { return a.server.transport.session_count() == 0; }));
}

TEST_F(Health, EndsBeforeOrAfterItsBalancer) {
  const auto before = library_threads();
  for (int round = 0; round < 20; ++round) {
    auto balancer = std::make_unique<LoadBalancer>(options());
    auto with = checks();
    with.interval = 1ms;
    std::atomic<bool> over = false;
    with.accept = [&over](const Reply&) {
      EXPECT_FALSE(over);
      return true;
    };
    auto checker = std::make_unique<HealthChecker>(*balancer, with);
    EXPECT_TRUE(round % 4 == 0 || wait_until([&] { return a.probes > 0; }));
    if (round % 2 == 0) {
      checker.reset();
      over = true;
      balancer.reset();
    } else {
      balancer.reset();
      checker.reset();
      over = true;
    }
    a.probes = 0;
  }
  EXPECT_TRUE(wait_until([&] { return library_threads() == before; }));
  for (const auto* const server : {&a, &b, &c}) {
    EXPECT_TRUE(wait_until([&] { return server->server.transport.session_count() == 0; }));
  }
}

TEST_F(Health, RefusesOptionsOutOfTheirRange) {
  LoadBalancer balancer(options());
  const auto text_of = [&balancer](auto change) {
    auto with = checks();
    change(with);
    std::string text;
    EXPECT_EQ(thrown([&] { const HealthChecker checker(balancer, with); }, &text), Errc::invalid_option);
    return text;
  };
  using Options = HealthCheckerOptions;
  const std::pair<const char*, std::string> cases[] = {
      {"interval", text_of([](Options& o) { o.interval = 0ms; })},
      {"timeout", text_of([](Options& o) { o.timeout = 0ms; })},
      {"rise", text_of([](Options& o) { o.rise = 0; })},
      {"fall", text_of([](Options& o) { o.fall = 1001; })},
      {"client.executor", text_of([](Options& o) { o.client.executor = asio::system_executor(); })},
      {"max_payload", text_of([](Options& o) { o.client.session.max_payload = 0; })},
      {"server_name", text_of([](Options& o) { o.client.tls.server_name = "a b"; })},
      {"max_header", text_of([](Options& o) { o.client.websocket.max_header = 1; })},
  };
  for (const auto& [name, text] : cases) EXPECT_NE(text.find(name), std::string::npos) << name << ": " << text;
}

// --- processes that are killed

#ifdef MSGTRANS_TOOL
TEST(BalancerAndProcesses, LosesOnlyWhatIsInFlightOnTheOneThatIsKilled) {
  constexpr std::size_t most = 4;
  ServerProcess one(MSGTRANS_TOOL), two(MSGTRANS_TOOL), three(MSGTRANS_TOOL);
  LoadBalancer balancer({.balance = Balance::least_loaded,
                         .urls = {one.url(), two.url(), three.url()},
                         .pool = {.max_connections = most, .acquire_timeout = patience}});
  auto news = balancer.subscribe();
  const HealthChecker checker(balancer, {.interval = 20ms, .timeout = 5s, .rise = 2, .fall = 2});
  std::atomic<std::uint64_t> answered = 0, lost = 0;
  std::atomic<bool> stop = false;
  std::vector<std::thread> users;
  for (int t = 0; t < 6; ++t) {
    users.emplace_back([&] {
      while (!stop) {
        Error error;
        (void)balancer.request("payload", {}, {}, error);
        if (!error) {
          ++answered;
        } else {
          ++lost;
          EXPECT_EQ(error.code, Errc::connection_lost) << error.message();
        }
      }
    });
  }
  const auto flows = [&] {
    const auto before = answered.load();
    return wait_until([&] { return answered > before + 300; });
  };
  const auto hears = [&](EventKind kind) {
    for (auto event = news.next_for(patience); event; event = news.next_for(patience)) {
      if (event->kind == kind && event->subject == two.url()) return true;
    }
    return false;
  };
  EXPECT_TRUE(flows());
  two.kill();
  EXPECT_TRUE(hears(EventKind::endpoint_down));
  EXPECT_TRUE(flows());
  two.start();
  EXPECT_TRUE(hears(EventKind::endpoint_up));
  const auto before = balancer.stats().endpoints[1].requests;
  EXPECT_TRUE(wait_until([&] { return balancer.stats().endpoints[1].requests > before + 50; }));
  stop = true;
  for (auto& user : users) user.join();
  EXPECT_LE(lost, balancer.stats().endpoints[1].pool.closed_broken);  // one at most on each connection
  EXPECT_LE(lost, 2 * most);  // a process that dies may still have accepted some
  EXPECT_EQ(balancer.stats().endpoints[0].failed, 0U);
  EXPECT_EQ(balancer.stats().endpoints[2].failed, 0U);
  EXPECT_EQ(balancer.stats().endpoints[1].failed, lost);
}

TEST(BalancerAndProcesses, TakesOutAServerThatHangs) {
  ServerProcess one(MSGTRANS_TOOL), two(MSGTRANS_TOOL);
  LoadBalancer balancer({.urls = {one.url(), two.url()}});
  const HealthChecker checker(balancer, {.interval = 10ms, .timeout = 1s, .rise = 1, .fall = 1});
  two.suspend();
  EXPECT_TRUE(wait_until([&] { return !balancer.stats().endpoints[1].healthy; }));
  for (int i = 0; i < 5; ++i) EXPECT_EQ(balancer.request("x").text(), "x");
  two.resume();
  EXPECT_TRUE(wait_until([&] { return balancer.stats().endpoints[1].healthy; }));
}
#endif

}  // namespace
}  // namespace msgtrans::test
