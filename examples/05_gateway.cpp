// SPDX-License-Identifier: Apache-2.0
// A gateway: clients talk to one server, which spreads their requests over three backends. One backend is killed while
// requests flow, and comes back. Only what was in flight on it may fail: what was not sent goes to another backend, and
// what may have been sent is never sent twice.
#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <iostream>
#include <memory>
#include <msgtrans/msgtrans.hpp>
#include <spawn.h>
#include <string>
#include <string_view>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <vector>

using namespace std::chrono_literals;

// --- a backend: this program again, as a process of its own, so that it can really be killed

int serve(const std::string& port) {
  msgtrans::ServerTransport server({.shards = 1});
  const auto where = server.listen(msgtrans::tcp("127.0.0.1:" + port));
  server.on_message([](msgtrans::Session& session, const msgtrans::Message& message) {
    session.respond(message, message.payload());
  });
  server.start();
  std::cout << where.port << std::endl;  // ready, and where
  server.run();
  return 0;
}

class Backend {
 public:
  Backend() { start(); }
  ~Backend() { kill(); }
  Backend(const Backend&) = delete;
  Backend& operator=(const Backend&) = delete;

  void start() {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) != 0) throw std::runtime_error("no pipe");
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    std::array<char*, 4> arguments{const_cast<char*>("gateway"), const_cast<char*>("backend"), port_.data(), nullptr};
    if (::posix_spawn(&process_, "/proc/self/exe", &actions, nullptr, arguments.data(), environ) != 0) {
      throw std::runtime_error("cannot start a backend");
    }
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    FILE* const output = ::fdopen(ends[0], "r");
    unsigned port = 0;
    if (std::fscanf(output, "%u", &port) != 1) throw std::runtime_error("a backend did not start");
    std::fclose(output);
    port_ = std::to_string(port);
  }
  void kill() {
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
  }
  [[nodiscard]] std::string url() const { return "tcp://127.0.0.1:" + port_; }

 private:
  pid_t process_ = 0;
  std::string port_ = "0";
};

// --- the gateway, and clients that keep it busy

template <class Condition>
void wait_for(std::string_view what, Condition condition) {
  for (int i = 0; !condition(); ++i) {
    if (i == 2000) throw std::runtime_error("in vain: " + std::string(what));
    std::this_thread::sleep_for(10ms);
  }
}

void wait_for(msgtrans::Subscription<msgtrans::Event>& news, msgtrans::EventKind kind, const std::string& subject) {
  for (;;) {
    const auto event = news.next_for(20s);
    if (!event) throw std::runtime_error(std::string("in vain: ") + msgtrans::to_string(kind));
    if (event->kind == kind && event->subject == subject) return;
  }
}

int run() {
  std::array<Backend, 3> backends;
  msgtrans::LoadBalancer balancer({.balance = msgtrans::Balance::least_loaded,
                                   .urls = {backends[0].url(), backends[1].url(), backends[2].url()},
                                   .pool = {.max_connections = 4}});
  const msgtrans::HealthChecker checker(balancer, {.interval = 50ms, .rise = 2, .fall = 2});
  auto news = balancer.subscribe();

  msgtrans::ServerTransport gateway({.shards = 1});
  const auto where = gateway.listen(msgtrans::tcp("127.0.0.1:0"));
  gateway.on_message([&balancer](msgtrans::Session&, const msgtrans::Message& message) {
    auto request = std::make_shared<msgtrans::OwnedMessage>(message.retain());
    balancer.async_request(request->payload(),
                           [request](const msgtrans::error_code& error, const msgtrans::Reply& reply) {
                             if (error) {
                               request->respond({}, error.message());
                             } else {
                               request->respond(reply.payload());
                             }
                           });
  });
  gateway.start();

  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> answered{0}, lost{0}, wrong{0};
  std::vector<std::thread> clients;
  for (int i = 0; i < 6; ++i) {
    clients.emplace_back([&] {
      msgtrans::ClientTransport client;
      client.connect(where.url());
      while (!stop) {
        const msgtrans::Reply reply = client.request("payload");
        const msgtrans::BytesView error(reply.extension());
        const bool is_lost = error.text() == make_error_code(msgtrans::Errc::connection_lost).message();
        ++(error.empty() && reply.text() == "payload" ? answered : is_lost ? lost : wrong);
      }
    });
  }
  const auto flow = [&] { wait_for("answers", [&, before = answered.load()] { return answered > before + 500; }); };

  flow();
  std::cout << "three backends answer\n";
  backends[1].kill();
  wait_for(news, msgtrans::EventKind::endpoint_down, backends[1].url());
  std::cout << "the second was killed, and is out\n";
  flow();
  std::cout << "two backends answer\n";
  backends[1].start();
  wait_for(news, msgtrans::EventKind::endpoint_up, backends[1].url());
  std::cout << "the second has come back, and is in\n";
  const auto served = [&balancer] { return balancer.stats().endpoints[1].requests; };
  wait_for("requests at the second", [&, before = served()] { return served() > before + 100; });
  std::cout << "three backends answer again\n";
  stop = true;
  for (auto& client : clients) client.join();

  const auto stats = balancer.stats().endpoints;
  std::cerr << answered << " answered, " << lost << " lost with the second backend, " << wrong << " otherwise\n";
  // A connection carries one request at a time, so no more were in flight than connections broke.
  const bool only_those = wrong == 0 && stats[0].failed == 0 && stats[2].failed == 0 && stats[1].failed == lost &&
                          lost <= stats[1].pool.closed_broken;
  if (only_those) std::cout << "nothing failed but what was in flight on the second\n";
  return only_those && gateway.stop().clean() ? 0 : 1;
}

int main(int argc, char** argv) {
  try {
    return argc == 3 ? serve(argv[2]) : run();
  } catch (const std::exception& failure) {
    std::cerr << "gateway: " << failure.what() << "\n";
    return 1;
  }
}
