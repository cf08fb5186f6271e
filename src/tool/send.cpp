// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

#include <boost/asio/use_future.hpp>
#include <condition_variable>
#include <cstdio>
#include <iostream>
#include <memory>
#include <msgtrans/msgtrans.hpp>
#include <mutex>
#include <string>

namespace msgtrans::tool {

namespace {

struct Send {
  std::string url;
  std::string text = "-";
  bool request = false;
  std::uint64_t count = 1;
  unsigned biz = 0;
  double timeout = 10;
  CompressionOptions compression;
  TlsClientOptions tls;
  std::optional<WebSocketDeflateOptions> deflate;

  int run();
};

/// Prints the one-way messages that come back, and knows how many there were.
class Replies {
 public:
  void print(std::string_view text) {
    const std::lock_guard lock(mutex_);
    std::fwrite(text.data(), 1, text.size(), stdout);
    std::fputc('\n', stdout);
    ++count_;
    changed_.notify_all();
  }
  void end(const Error& reason) {
    const std::lock_guard lock(mutex_);
    ended_ = reason;
    changed_.notify_all();
  }
  /// Why the connection ended, if that was not this end's doing.
  Error ended() {
    const std::lock_guard lock(mutex_);
    return ended_.code == Errc::closed_by_user ? Error() : ended_;
  }
  /// Until that many came, the connection ended, or the time is over.
  bool wait_for(std::uint64_t wanted, std::chrono::milliseconds timeout, std::string& problem) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, timeout, [&] { return count_ >= wanted || ended_; });
    if (count_ >= wanted) return true;
    problem = std::to_string(count_) + " of " + std::to_string(wanted) + " replies came";
    if (ended_) problem += ": " + ended_.message();
    return false;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t count_ = 0;
  Error ended_;
};

int Send::run() {
  Replies replies;
  ClientOptions options{.connect_timeout = seconds(timeout)};
  options.session.compression = compression;
  options.tls = tls;
  options.websocket.deflate = deflate;
  ClientTransport client(options);
  client.on_message([&replies](Session&, const Message& message) { replies.print(message.text()); });
  client.on_disconnect([&replies](Session&, const Error& reason) { replies.end(reason); });
  client.connect(url);

  std::uint64_t sent = 0;
  const auto send_one = [&](const std::string& line) {
    for (std::uint64_t i = 0; i < count; ++i, ++sent) {
      if (request) {
        const Reply reply =
            client.request(line, {.biz_type = static_cast<std::uint8_t>(biz), .timeout = seconds(timeout)});
        replies.print(reply.text());
        continue;
      }
      // The replies may be slower than the lines: room comes as the peer takes what is queued.
      client.async_send(line, {.biz_type = static_cast<std::uint8_t>(biz)}, boost::asio::use_future).get();
    }
  };
  try {
    if (text != "-") {
      send_one(text);
    } else {
      for (std::string line; std::getline(std::cin, line);) send_one(line);
    }
  } catch (const Exception& failure) {
    client.close();  // which is over when the end has been told
    if (const Error reason = replies.ended()) throw Exception(Error(failure.code(), reason.message()));
    throw;
  }
  std::string problem;
  const bool all = replies.wait_for(sent, seconds(timeout), problem);
  client.close();
  std::fflush(stdout);
  if (all) return 0;
  std::fprintf(stderr, "msgtrans: %s\n", problem.c_str());
  return exit_failure;
}

}  // namespace

void add_send(CLI::App& app, Action& action) {
  auto send = std::make_shared<Send>();
  CLI::App* const command =
      app.add_subcommand("send", "Send a line of text, or each line of standard input, and print the replies");
  command->add_option("URL", send->url, url_help)->required();
  command->add_option("TEXT", send->text, "What to send; - for the lines of standard input")->capture_default_str();
  command->add_flag("--request", send->request, "As requests, each answered before the next is sent");
  command->add_option("--count", send->count, "Send each line this many times")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--biz", send->biz, "biz_type")->check(CLI::Range(0, 255))->capture_default_str();
  add_compression(*command, send->compression);
  add_client_tls(*command, send->tls);
  add_deflate(*command, send->deflate, client_deflate_help);
  command->add_option("--timeout", send->timeout, "For connecting, and for the replies")
      ->type_name("S")
      ->check(CLI::Range(0.001, 31536000.0))
      ->capture_default_str();
  command->final_callback([&action, send] { action = [send] { return send->run(); }; });
}

}  // namespace msgtrans::tool
