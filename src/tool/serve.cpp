// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "statistics.hpp"

#include <algorithm>
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <msgtrans/msgtrans.hpp>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace msgtrans::tool {

namespace {

struct Serve {
  std::vector<std::string> tcp, tls, unix_sockets, websocket, websocket_tls;
  TlsServerOptions certificates;
  std::optional<WebSocketDeflateOptions> deflate;
  bool echo = true;
  bool json = false;
  bool verbose = false;
  double idle = 0, first_packet = 10, write_stall = 30, drain = 5;
  double statistics = 0;  // seconds from line to line; 0: none
  double handover_timeout = 30, handover_drain = 30, handover_quiet = 1;
  ServerOptions options;
  std::uint32_t max_message = SessionOptions{}.max_payload;

  int run();

 private:
  [[nodiscard]] ListenOptions listen_options() const {
    return {.tls = certificates, .websocket = {.deflate = deflate}};
  }
  void listen(ServerTransport& server, const std::vector<Endpoint>& endpoints, std::vector<ListeningSocket> inherited);

  struct Listening {
    Endpoint endpoint;
    std::string name;  // for a successor
  };
  std::vector<Listening> listeners_;
};

void print_summary(const ServerStats& stats, const StopReport& report, bool compresses, bool as_json) {
  const std::uint64_t dropped = stats.dropped_oldest + stats.dropped_at_close;
  if (as_json) {
    const nlohmann::ordered_json summary{{"sessions", stats.sessions_total},
                                         {"refused", stats.sessions_refused},
                                         {"packets_in", stats.packets_in},
                                         {"packets_out", stats.packets_out},
                                         {"bytes_in", stats.bytes_in},
                                         {"bytes_out", stats.bytes_out},
                                         {"dropped", dropped},
                                         {"dropped_inbound", stats.dropped_inbound},
                                         {"protocol_errors", stats.protocol_errors},
                                         {"unmatched_responses", stats.unmatched_responses},
                                         {"accept_failures", stats.accept_failures},
                                         {"handshake_failures", stats.handshake_failures},
                                         {"compressed_packets", stats.compressed_packets},
                                         {"compressed_bytes_before", stats.compressed_bytes_before},
                                         {"compressed_bytes_after", stats.compressed_bytes_after},
                                         {"incompressible_packets", stats.incompressible_packets},
                                         {"sessions_cut", report.sessions_cut}};
    std::printf("%s\n", summary.dump().c_str());
  } else {
    std::printf("served %llu sessions (%llu refused): %llu packets in, %llu out; %llu bytes in, %llu out\n",
                static_cast<unsigned long long>(stats.sessions_total),
                static_cast<unsigned long long>(stats.sessions_refused),
                static_cast<unsigned long long>(stats.packets_in), static_cast<unsigned long long>(stats.packets_out),
                static_cast<unsigned long long>(stats.bytes_in), static_cast<unsigned long long>(stats.bytes_out));
    std::printf(
        "dropped %llu packets and %llu inbound, %llu protocol errors, %llu unmatched responses, %zu sessions cut\n",
        static_cast<unsigned long long>(dropped), static_cast<unsigned long long>(stats.dropped_inbound),
        static_cast<unsigned long long>(stats.protocol_errors),
        static_cast<unsigned long long>(stats.unmatched_responses), report.sessions_cut);
    if (compresses) {
      std::printf("compressed %llu payloads from %llu bytes to %llu; %llu would not get smaller\n",
                  static_cast<unsigned long long>(stats.compressed_packets),
                  static_cast<unsigned long long>(stats.compressed_bytes_before),
                  static_cast<unsigned long long>(stats.compressed_bytes_after),
                  static_cast<unsigned long long>(stats.incompressible_packets));
    }
  }
  std::fflush(stdout);
}

/// Reads the certificates again at each SIGHUP.
class Renewal {
 public:
  Renewal(ServerTransport& server, std::vector<Endpoint> listeners, TlsServerOptions certificates)
      : server_(server), listeners_(std::move(listeners)), certificates_(std::move(certificates)) {
    if (listeners_.empty()) return;
    signals_.emplace(context_, SIGHUP);
    wait();
    thread_ = std::thread([this] { context_.run(); });
  }
  ~Renewal() {
    context_.stop();
    if (thread_.joinable()) thread_.join();
  }
  Renewal(const Renewal&) = delete;
  Renewal& operator=(const Renewal&) = delete;

 private:
  void wait() {
    signals_->async_wait([this](const error_code& stopped, int) {
      if (stopped) return;
      for (const auto& listener : listeners_) {
        Error error;
        server_.renew_tls(listener, certificates_, error);
        std::fprintf(stderr, "msgtrans: %s: %s\n", listener.url().c_str(),
                     error ? ("certificate not renewed: " + error.message()).c_str() : "certificate renewed");
      }
      wait();
    });
  }

  ServerTransport& server_;
  const std::vector<Endpoint> listeners_;
  const TlsServerOptions certificates_;
  boost::asio::io_context context_{1};
  std::optional<boost::asio::signal_set> signals_;
  std::thread thread_;
};

/// Starts a successor at each SIGUSR2, with the same arguments and the sockets, and stops when that is ready. Until the
/// server waits for SIGINT and SIGTERM by itself, this does.
class Handover {
 public:
  Handover(ServerTransport& server, std::function<std::string(const Endpoint&)> name_of, DrainOptions drain,
           std::chrono::milliseconds ready_within)
      : server_(server), name_of_(std::move(name_of)), drain_(std::move(drain)), ready_within_(ready_within) {
    wait();
    ends_.async_wait([this](const error_code& stopped, int) {
      if (!stopped) server_.stop();
    });
    thread_ = std::thread([this] { context_.run(); });
  }
  ~Handover() {
    context_.stop();
    {
      const std::lock_guard lock(mutex_);
      over_ = true;
      if (successor_) successor_->give_up();
    }
    thread_.join();
  }
  Handover(const Handover&) = delete;
  Handover& operator=(const Handover&) = delete;

 private:
  void wait() {
    signals_.async_wait([this](const error_code& stopped, int) {
      if (stopped) return;
      try {
        if (hand_over()) return;
      } catch (const std::exception& error) {
        std::fprintf(stderr, "msgtrans: no successor: %s\n", error.what());
      }
      wait();
    });
  }

  bool hand_over() {
    auto sockets = server_.listening_sockets();
    for (auto& socket : sockets) {
      Error error;
      if (auto name = name_of_(socket.address(error)); !name.empty()) socket.set_name(std::move(name));
    }
    {
      const std::lock_guard lock(mutex_);
      if (over_) return true;
      successor_.emplace(Successor::start(own_command(), std::move(sockets)));
    }
    Error error;
    const bool ready = successor_->wait_ready(ready_within_, error);
    const pid_t process = successor_->process();
    {
      const std::lock_guard lock(mutex_);
      successor_.reset();
      if (over_ && !ready) return true;
    }
    if (!ready) throw Exception(error);
    std::fprintf(stderr, "msgtrans: process %ld has taken over\n", static_cast<long>(process));
    server_.release_listeners();
    server_.stop(drain_);
    return true;
  }

  /// As this process was started.
  static std::vector<std::string> own_command() {
    std::ifstream file("/proc/self/cmdline", std::ios::binary);
    std::vector<std::string> words;
    for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
    return words;
  }

  ServerTransport& server_;
  const std::function<std::string(const Endpoint&)> name_of_;
  const DrainOptions drain_;
  const std::chrono::milliseconds ready_within_;
  boost::asio::io_context context_{1};
  boost::asio::signal_set signals_{context_, SIGUSR2};
  boost::asio::signal_set ends_{context_, SIGINT, SIGTERM};
  std::mutex mutex_;
  bool over_ = false;
  std::optional<Successor> successor_;
  std::thread thread_;
};

constexpr std::string_view numbered = "listener-";

/// What a socket of that name, which no argument is about, is to be used for: `ws/chat` says it; any other name leaves
/// it to what the socket is.
Endpoint named_endpoint(const std::string& name, const Endpoint& bound) {
  Endpoint endpoint = bound;
  const auto slash = name.find('/');
  const auto scheme = std::string_view(name).substr(0, slash);
  for (const Transport transport : {Transport::tcp, Transport::tls, Transport::websocket, Transport::websocket_tls}) {
    if (bound.transport == Transport::tcp && scheme == to_string(transport)) {
      endpoint.transport = transport;
      if (is_websocket(transport) && slash != std::string::npos) endpoint.path = name.substr(slash);
    }
  }
  return endpoint;
}

/// With the sockets that it was started with: each is for the argument that its name gives the number of, or for that
/// with its address, or it is one more. Then what is left of the arguments is bound.
void Serve::listen(ServerTransport& server, const std::vector<Endpoint>& endpoints,
                   std::vector<ListeningSocket> inherited) {
  for (std::size_t i = 0; i < endpoints.size(); ++i) {
    const std::string name = std::string(numbered) + std::to_string(i);
    const auto others = std::stable_partition(inherited.begin(), inherited.end(),
                                              [&](const ListeningSocket& socket) { return socket.name() == name; });
    if (others != inherited.begin()) {
      listeners_.push_back(
          {server.adopt_listener(endpoints[i], std::span(inherited.begin(), others), listen_options()), name});
      inherited.erase(inherited.begin(), others);
    } else {
      listeners_.push_back({server.listen(endpoints[i], listen_options(), inherited), name});
    }
  }
  while (!inherited.empty()) {
    Error error;
    const std::string name = inherited.front().name();
    const Endpoint bound = inherited.front().address(error);
    if (error) throw Exception(error);
    const Endpoint endpoint = named_endpoint(name, bound);
    const auto others = std::stable_partition(inherited.begin(), inherited.end(), [&](const ListeningSocket& socket) {
      Error none;
      return socket.name() == name && socket.address(none) == bound;
    });
    listeners_.push_back(
        {server.adopt_listener(endpoint, std::span(inherited.begin(), others), listen_options()), name});
    inherited.erase(inherited.begin(), others);
  }
}

int Serve::run() {
  options.session.max_payload = options.session.max_decompressed = max_message;
  options.session.idle_timeout = seconds(idle);
  options.session.first_packet_timeout = seconds(first_packet);
  options.session.write_stall_timeout = seconds(write_stall);
  options.drain = seconds(drain);
  const DrainOptions handover_options{
      .within = seconds(handover_drain), .quiet = seconds(handover_quiet), .reason = "restarting"};
  if (auto error = validate(handover_options)) throw Exception(error);
  std::vector<Endpoint> endpoints;
  for (const auto& address : tcp) endpoints.push_back(msgtrans::tcp(address));
  for (const auto& address : tls) endpoints.push_back(msgtrans::tls(address));
  for (const auto& path : unix_sockets) endpoints.push_back(unix_socket(path));
  for (const auto& address : websocket) endpoints.push_back(msgtrans::websocket(address));
  for (const auto& address : websocket_tls) endpoints.push_back(msgtrans::websocket_tls(address));
  auto inherited = inherited_sockets();
  // Not if systemd has said where.
  if (endpoints.empty() && inherited.empty()) endpoints.push_back(msgtrans::tcp("127.0.0.1:8001"));

  ServerTransport server(options);
  server.on_message([](Session& session, const Message& message) {
    if (message.is_request()) {
      session.respond(message, message.payload());
    } else {
      session.send(message.payload(), {.biz_type = message.biz_type()});
    }
  });
  if (verbose) {
    server.on_connect([](Session& session) {
      const auto process = session.peer_credentials();
      std::string who = process ? "process " + std::to_string(process->process) : session.peer().to_string();
      if (session.tls() != nullptr && !session.tls()->subject.empty()) who += ", " + session.tls()->subject;
      std::fprintf(stderr, "%s connected from %s\n", to_string(session.id()).c_str(), who.c_str());
    });
    server.on_disconnect([](Session& session, const Error& reason) {
      std::fprintf(stderr, "%s ended: %s\n", to_string(session.id()).c_str(), reason.message().c_str());
    });
    server.on_error([](const ErrorEvent& event) {
      std::fprintf(stderr, "%s error: %s\n", to_string(event.session).c_str(), event.error.message().c_str());
    });
  }
  listen(server, endpoints, std::move(inherited));
  std::vector<Endpoint> encrypted;
  for (const auto& listener : listeners_) {
    if (is_encrypted(listener.endpoint.transport)) encrypted.push_back(listener.endpoint);
  }
  const auto name_of = [this](const Endpoint& address) {
    for (const auto& [endpoint, name] : listeners_) {
      const bool same = address.transport == Transport::unix_socket
                            ? endpoint.transport == Transport::unix_socket && endpoint.path == address.path
                            : endpoint.transport != Transport::unix_socket && endpoint.host == address.host &&
                                  endpoint.port == address.port;
      if (same) return name;
    }
    return std::string();
  };
  const Handover handover(server, name_of, handover_options, seconds(handover_timeout));
  const Renewal renewal(server, std::move(encrypted), certificates);
  // Whoever reads this may send signals, and connect.
  for (const auto& [endpoint, name] : listeners_) {
    std::printf("listening %s %s\n", std::string(to_string(endpoint.transport)).c_str(), endpoint.to_string().c_str());
  }
  std::fflush(stdout);
  server.start();
  announce_ready();
  StopReport report;
  {
    const StatisticsPrinter printer(server, std::chrono::nanoseconds(std::llround(std::ceil(statistics * 1e9))), json);
    report = server.run();
  }
  print_summary(server.stats(), report, options.session.compression.codec != Compression::none, json);
  return 0;
}

}  // namespace

void add_serve(CLI::App& app, Action& action) {
  auto serve = std::make_shared<Serve>();
  CLI::App* const command =
      app.add_subcommand("serve", "Serve until SIGINT or SIGTERM, then drain; at SIGUSR2 hand over to a successor");
  const auto add_listener = [&](const char* name, std::vector<std::string>& where, const char* type, const char* help) {
    command->add_option(name, where, help)
        ->type_name(type)
        ->expected(1)
        ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  };
  add_listener(
      "--tcp", serve->tcp, "H:P",
      "Listen on HOST:PORT; port 0 picks a free one; repeatable (default, without any listener: 127.0.0.1:8001)");
  add_listener("--tls", serve->tls, "H:P", "The same for TLS; needs --cert and --key; repeatable");
  add_listener("--ws", serve->websocket, "H:P[/PATH]", "The same for WebSocket; repeatable");
  add_listener("--wss", serve->websocket_tls, "H:P[/PATH]",
               "The same for WebSocket over TLS; needs --cert and --key; repeatable");
  add_deflate(*command, serve->deflate,
              "Agree on WebSocket's own compression, permessage-deflate, with clients that offer it");
  add_listener("--unix", serve->unix_sockets, "PATH",
               "Listen on a Unix socket, a file or @NAME in the abstract namespace; repeatable");
  command
      ->add_option("--cert", serve->certificates.identity.certificate_file,
                   "The server's certificate, and those that lead to its authority; read again at SIGHUP")
      ->type_name("FILE");
  command->add_option("--key", serve->certificates.identity.key_file, "Of that certificate")->type_name("FILE");
  command
      ->add_option_function<std::string>(
          "--client-ca",
          [serve = serve.get()](const std::string& file) {
            serve->certificates.client_ca_file = file;
            serve->certificates.client_certificates = ClientCertificates::required;
          },
          "Let in only clients with a certificate that those in it vouch for")
      ->type_name("FILE");
  command->add_flag("--echo", serve->echo,
                    "Answer requests and return one-way messages with the same payload (default)");
  command->add_option("--shards", serve->options.shards, "Threads that serve; 0: one a core")
      ->check(whole_number())
      ->capture_default_str();
  command->add_option("--max-message", serve->max_message, "Largest payload, also decompressed")
      ->check(whole_number())
      ->type_name("BYTES")
      ->capture_default_str();
  command->add_option("--outbound-limit", serve->options.session.outbound_bytes, "Outbound queue of a session")
      ->check(whole_number())
      ->type_name("BYTES")
      ->capture_default_str();
  command->add_option("--slow-consumer", serve->options.session.slow_consumer, "When that queue is full")
      ->transform(CLI::CheckedTransformer(std::map<std::string, SlowConsumer>{
          {"wait", SlowConsumer::wait}, {"drop-oldest", SlowConsumer::drop_oldest}, {"close", SlowConsumer::close}}))
      ->option_text("wait|drop-oldest|close (default wait)");
  add_compression(*command, serve->options.session.compression);
  command->add_option("--max-sessions", serve->options.max_sessions, "Sessions at once")
      ->check(whole_number())
      ->capture_default_str();
  command
      ->add_option("--max-sessions-per-address", serve->options.max_sessions_per_address, "Of one address; 0: no limit")
      ->check(whole_number())
      ->capture_default_str();
  const auto add_seconds = [&](const char* name, double& value, const char* help) {
    command->add_option(name, value, help)
        ->check(CLI::Range(0.0, 31536000.0))
        ->option_text("S (default " + std::to_string(static_cast<int>(value)) + ")");
  };
  add_seconds("--idle-timeout", serve->idle, "End sessions without a packet for this long; 0: off");
  add_seconds("--first-packet-timeout", serve->first_packet, "From connecting to the first whole packet; 0: off");
  add_seconds("--write-stall", serve->write_stall, "End sessions that take no byte for this long; 0: off");
  add_seconds("--drain", serve->drain, "Time for sessions to finish when stopping");
  add_seconds("--handover-timeout", serve->handover_timeout,
              "At SIGUSR2: time for the successor, which gets the same arguments and the sockets, to be ready");
  add_seconds("--handover-drain", serve->handover_drain, "Then: time for the sessions here to finish");
  add_seconds("--handover-quiet", serve->handover_quiet,
              "Of that: end a session that owes nothing after so long without a packet; 0: at once");
  command
      ->add_option("--stats", serve->statistics,
                   "Print a line of rates every so many seconds, and a last one at the end; with --json all statistics")
      ->check(CLI::PositiveNumber & CLI::Range(0.0, 31536000.0))
      ->option_text("S (default: nothing)");
  command->add_flag("--json", serve->json, "Print the summary, and with --stats each line, as one JSON object");
  command->add_flag("--verbose", serve->verbose, "Tell about sessions and errors on standard error");
  command->final_callback([&action, serve] { action = [serve] { return serve->run(); }; });
}

}  // namespace msgtrans::tool
