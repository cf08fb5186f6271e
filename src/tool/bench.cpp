// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "histogram.hpp"

#include <atomic>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/use_future.hpp>
#include <cstdio>
#include <deque>
#include <memory>
#include <msgtrans/msgtrans.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <unistd.h>
#include <vector>

namespace msgtrans::tool {

namespace {

using Clock = std::chrono::steady_clock;

enum class Mode { request, oneway };

struct Bench {
  std::string url;
  unsigned connections = 1;
  unsigned pipeline = 1;
  std::uint32_t size = 64;
  double duration = 5;
  Mode mode = Mode::request;
  bool json = false;
  CompressionOptions compression;
  TlsClientOptions tls;
  std::optional<WebSocketDeflateOptions> deflate;

  int run();
};

/// One connection that keeps `pipeline` messages in flight. Lives on the context's one thread once started.
class Connection {
 public:
  Connection(const Bench& bench, const boost::asio::any_io_executor& executor)
      : bench_(bench), payload_(bench.size, std::byte{0x5a}), client_(client_options(bench, executor)) {
    client_.on_message([this](Session&, const Message& message) { came_back(message.payload().size()); });
    client_.on_disconnect([this](Session&, const Error& reason) {
      if (!stopping_) failures_ += 1;
      if (reason.code != Errc::closed_by_user) problem_ = reason.message();
      in_flight_ = 0;
    });
  }

  void connect() { client_.connect(bench_.url); }

  /// On the thread.
  void start() {
    session_ = client_.session();
    for (unsigned i = 0; session_ && i < bench_.pipeline; ++i) send();
  }
  void stop() { stopping_ = true; }
  void close() { client_.close(); }

  [[nodiscard]] const Histogram& histogram() const { return histogram_; }
  [[nodiscard]] std::uint64_t failures() const { return failures_; }
  [[nodiscard]] const std::string& problem() const { return problem_; }
  [[nodiscard]] std::uint64_t done() const { return done_.load(std::memory_order_relaxed); }
  [[nodiscard]] unsigned in_flight() const { return in_flight_; }

 private:
  static ClientOptions client_options(const Bench& bench, const boost::asio::any_io_executor& executor) {
    ClientOptions options{.executor = executor};
    options.session.compression = bench.compression;
    options.tls = bench.tls;
    options.websocket.deflate = bench.deflate;
    return options;
  }
  void send() {
    ++in_flight_;
    if (bench_.mode == Mode::request) {
      session_->async_request(payload_, [this, begin = Clock::now()](const error_code& error, const Reply& reply) {
        if (error) return failed(error);
        finished(begin, reply.payload().size());
      });
    } else {
      begun_.push_back(Clock::now());  // a session returns them in order
      session_->async_send(payload_, [this](const error_code& error) {
        if (error) failed(error);
      });
    }
  }
  void came_back(std::size_t size) {
    if (begun_.empty()) {
      ++failures_;
      return;
    }
    const auto begin = begun_.front();
    begun_.pop_front();
    finished(begin, size);
  }
  void finished(Clock::time_point begin, std::size_t size) {
    if (in_flight_ != 0) --in_flight_;
    if (size != payload_.size()) {
      ++failures_;
      problem_ = "a reply had " + std::to_string(size) + " bytes";
    }
    histogram_.add(Clock::now() - begin);
    done_.store(done_.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    if (!stopping_) send();
  }
  void failed(const error_code& error) {
    if (in_flight_ != 0) --in_flight_;
    if (stopping_ && error == Errc::connection_lost) return;
    ++failures_;
    problem_ = error.message();
  }

  const Bench& bench_;
  std::vector<std::byte> payload_;
  std::optional<Session> session_;
  std::deque<Clock::time_point> begun_;
  Histogram histogram_;
  std::uint64_t failures_ = 0;
  unsigned in_flight_ = 0;
  bool stopping_ = false;
  std::string problem_;
  std::atomic<std::uint64_t> done_{0};
  ClientTransport client_;  // last: its end may still call the above
};

int Bench::run() {
  boost::asio::io_context context(1);
  auto work = boost::asio::make_work_guard(context);
  std::thread thread([&context] { context.run(); });
  std::vector<std::unique_ptr<Connection>> all;
  const auto end = [&] {
    for (auto& connection : all) connection->close();
    all.clear();
    work.reset();
    thread.join();
  };
  // Runs `f` on the context's thread and waits for it.
  const auto on_thread = [&context](auto f) {
    boost::asio::post(context, boost::asio::use_future([&f] { return f(); })).get();
  };
  try {
    for (unsigned i = 0; i < connections; ++i) {
      all.push_back(std::make_unique<Connection>(*this, context.get_executor()));
      all.back()->connect();
    }
  } catch (...) {
    end();
    throw;
  }
  const auto begin = Clock::now();
  on_thread([&] {
    for (auto& connection : all) connection->start();
  });
  const bool show_progress = !json && ::isatty(STDERR_FILENO) != 0;
  const auto until = begin + seconds(duration);
  std::uint64_t before = 0;
  for (auto now = begin; now < until; now = Clock::now()) {
    std::this_thread::sleep_for(std::min<Clock::duration>(until - now, std::chrono::seconds(1)));
    if (!show_progress) continue;
    std::uint64_t done = 0;
    for (const auto& connection : all) done += connection->done();
    std::fprintf(stderr, "\r%llu messages/s   ", static_cast<unsigned long long>(done - before));
    before = done;
  }
  if (show_progress) std::fprintf(stderr, "\r                         \r");

  Histogram histogram;
  std::uint64_t failures = 0;
  std::string problem;
  double elapsed = 0;
  on_thread([&] {
    elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
    for (auto& connection : all) {
      histogram.merge(connection->histogram());
      connection->stop();
    }
  });
  // What is still on its way comes back, so that nothing is taken for lost.
  const auto patience = Clock::now() + std::chrono::seconds(5);
  for (bool idle = false; !idle && Clock::now() < patience;) {
    on_thread([&] {
      idle = true;
      for (const auto& connection : all) idle = idle && connection->in_flight() == 0;
    });
    if (!idle) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  on_thread([&] {
    for (auto& connection : all) {
      failures += connection->failures() + connection->in_flight();
      if (problem.empty()) problem = connection->problem();
    }
  });
  end();

  const double rate = static_cast<double>(histogram.count()) / elapsed;
  const double bytes = rate * size;
  if (json) {
    const nlohmann::ordered_json result{
        {"messages", histogram.count()},         {"seconds", elapsed},
        {"messages_per_second", rate},           {"bytes_per_second", bytes},
        {"p50_us", histogram.quantile_us(0.5)},  {"p90_us", histogram.quantile_us(0.9)},
        {"p99_us", histogram.quantile_us(0.99)}, {"p99_9_us", histogram.quantile_us(0.999)},
        {"max_us", histogram.max_us()},          {"errors", failures}};
    std::printf("%s\n", result.dump().c_str());
  } else {
    std::printf("%u connections x %u in flight, %u bytes, %s\n", connections, pipeline, size,
                mode == Mode::request ? "requests" : "one-way echoes");
    std::printf("%.0f messages/s, %.1f MB/s, %llu in all in %.2f s\n", rate, bytes / 1e6,
                static_cast<unsigned long long>(histogram.count()), elapsed);
    std::printf("latency us: p50 %.1f  p90 %.1f  p99 %.1f  p99.9 %.1f  max %.1f\n", histogram.quantile_us(0.5),
                histogram.quantile_us(0.9), histogram.quantile_us(0.99), histogram.quantile_us(0.999),
                histogram.max_us());
  }
  std::fflush(stdout);
  if (failures == 0 && histogram.count() != 0) return 0;
  std::fprintf(stderr, "msgtrans: %llu errors%s%s\n", static_cast<unsigned long long>(failures),
               problem.empty() ? "" : ": ", problem.c_str());
  return exit_failure;
}

}  // namespace

void add_bench(CLI::App& app, Action& action) {
  auto bench = std::make_shared<Bench>();
  CLI::App* const command = app.add_subcommand("bench", "Load an echo server and print throughput and latency");
  command->add_option("URL", bench->url, url_help)->required();
  command->add_option("--connections", bench->connections)->check(CLI::Range(1U, 100000U))->capture_default_str();
  command->add_option("--pipeline", bench->pipeline, "Messages in flight on each connection")
      ->check(CLI::Range(1U, 100000U))
      ->capture_default_str();
  command->add_option("--size", bench->size, "Payload")
      ->type_name("BYTES")
      ->check(CLI::Range(0U, 16U << 20))
      ->capture_default_str();
  command->add_option("--duration", bench->duration)
      ->type_name("S")
      ->check(CLI::Range(0.01, 86400.0))
      ->capture_default_str();
  command->add_option("--mode", bench->mode)
      ->transform(
          CLI::CheckedTransformer(std::map<std::string, Mode>{{"request", Mode::request}, {"oneway", Mode::oneway}}))
      ->default_str("request");
  add_compression(*command, bench->compression);
  add_client_tls(*command, bench->tls);
  add_deflate(*command, bench->deflate, client_deflate_help);
  command->add_flag("--json", bench->json, "Print the result as one JSON object");
  command->final_callback([&action, bench] { action = [bench] { return bench->run(); }; });
}

}  // namespace msgtrans::tool
