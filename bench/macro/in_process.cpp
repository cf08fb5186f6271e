// SPDX-License-Identifier: Apache-2.0
// A server and its clients in one process, over each transport that can be: what the sockets cost. Each repetition runs
// every transport once, one after the other; ratios are formed within a repetition.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstdio>
#include <deque>
#include <map>
#include <msgtrans/msgtrans.hpp>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

struct Load {
  std::string mode = "oneway";
  unsigned connections = 100;
  unsigned in_flight = 16;
  std::size_t size = 64;
  bool one_thread = false;
  std::chrono::milliseconds duration{1000};
  std::chrono::milliseconds warm_up{200};
};

/// Messages a second that came back.
double measure(const msgtrans::Endpoint& endpoint, const Load& load) {
  boost::asio::io_context context(1);
  msgtrans::ServerOptions options{.shards = 1};
  if (load.one_thread) options.executors = {context.get_executor()};
  msgtrans::ServerTransport server(options);
  server.on_message([](msgtrans::Session& session, const msgtrans::Message& message) {
    if (message.is_request()) {
      session.respond(message, message.payload());
    } else {
      session.send(message.payload());
    }
  });
  const auto bound = server.listen(endpoint);
  server.start();

  std::atomic<std::uint64_t> came{0};
  std::atomic<bool> ended{false};
  const std::string payload(load.size, 'x');
  {
    std::deque<msgtrans::ClientTransport> clients;
    auto guard = boost::asio::make_work_guard(context);
    std::thread thread([&] { context.run(); });
    const auto count = [&came] { came.store(came.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed); };
    struct Asking {
      msgtrans::Session session;
      const std::string& payload;
      std::function<void()> count;
      std::atomic<bool>& ended;

      void ask() {
        session.async_request(payload, [this](msgtrans::error_code error, const msgtrans::Reply&) {
          if (error || ended) return;
          count();
          ask();
        });
      }
    };
    std::deque<Asking> asking;
    for (unsigned i = 0; i < load.connections; ++i) {
      auto& client = clients.emplace_back(msgtrans::ClientOptions{.executor = context.get_executor()});
      client.on_message([&](msgtrans::Session& session, const msgtrans::Message& message) {
        count();
        session.send(message.payload());
      });
      client.connect(bound.url());
    }
    for (auto& client : clients) {
      for (unsigned i = 0; i < load.in_flight; ++i) {
        if (load.mode == "oneway") {
          client.send(payload);
        } else {
          asking.emplace_back(*client.session(), payload, count, ended).ask();
        }
      }
    }
    std::this_thread::sleep_for(load.warm_up);
    const auto begin = Clock::now();
    const auto before = came.load();
    std::this_thread::sleep_for(load.duration);
    const auto after = came.load();
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    ended = true;
    server.stop(std::chrono::milliseconds(0));
    guard.reset();
    clients.clear();
    thread.join();
    return static_cast<double>(after - before) / seconds;
  }
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  Load load;
  unsigned repetitions = 5;
  unsigned milliseconds = 1000;
  CLI::App app("Server and clients in one process, over TCP, a Unix socket and in-process");
  app.add_option("--mode", load.mode, "what comes back: one-way messages, or answers to requests")
      ->check(CLI::IsMember({"oneway", "request"}));
  app.add_option("--connections", load.connections);
  app.add_option("--in-flight", load.in_flight, "messages of each connection");
  app.add_option("--size", load.size, "of a payload, in bytes");
  app.add_flag("--one-thread", load.one_thread, "server and clients on the same");
  app.add_option("--duration", milliseconds, "of a run, in ms");
  app.add_option("--repetitions", repetitions);
  std::string only;
  app.add_option("--only", only, "of the transports, for a profile: tcp, unix or inproc");
  CLI11_PARSE(app, argc, argv);
  load.duration = std::chrono::milliseconds(milliseconds);

  const std::vector<msgtrans::Endpoint> endpoints{
      msgtrans::tcp("127.0.0.1:0"), msgtrans::unix_socket("@msgtrans-bench"), msgtrans::in_process("bench")};
  std::map<std::string, std::vector<double>> rates, ratios;
  for (unsigned i = 0; i < repetitions; ++i) {
    double reference = 0;
    for (const auto& endpoint : endpoints) {
      const std::string name(to_string(endpoint.transport));
      if (!only.empty() && name != only) continue;
      const double rate = measure(endpoint, load);
      if (reference == 0) reference = rate;
      rates[name].push_back(rate);
      ratios[name].push_back(rate / reference);
    }
  }
  std::printf("%s, %zu bytes, %u connections x %u in flight, %s: median of %u\n", load.mode.c_str(), load.size,
              load.connections, load.in_flight, load.one_thread ? "one thread" : "a thread each", repetitions);
  for (const auto& endpoint : endpoints) {
    const std::string name(to_string(endpoint.transport));
    if (rates[name].empty()) continue;
    const auto [least, most] = std::ranges::minmax(ratios[name]);
    std::printf("  %-8s %9.0f k messages/s   %5.2f of tcp [%.2f - %.2f]\n", name.c_str(), median(rates[name]) / 1e3,
                median(ratios[name]), least, most);
  }
}
