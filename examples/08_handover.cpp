// SPDX-License-Identifier: Apache-2.0
// A server that is replaced without refusing a connection: `kill -USR2` starts a successor, which gets the listening
// sockets; when that is ready, this process lets its sessions finish and ends. It also takes its socket from systemd.
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <chrono>
#include <csignal>
#include <exception>
#include <functional>
#include <iostream>
#include <msgtrans/msgtrans.hpp>
#include <string>
#include <thread>
#include <vector>

using namespace std::chrono_literals;

namespace {

/// False: this process goes on.
bool hand_over(msgtrans::ServerTransport& server, const std::vector<std::string>& command) {
  try {
    auto successor = msgtrans::Successor::start(command, server.listening_sockets());
    msgtrans::Error error;
    if (!successor.wait_ready(30s, error)) throw msgtrans::Exception(error);
    std::cout << "process " << successor.process() << " has taken over" << std::endl;
  } catch (const std::exception& error) {
    std::cerr << "no successor: " << error.what() << '\n';
    return false;
  }
  server.release_listeners();
  server.stop(msgtrans::DrainOptions{.within = 30s, .quiet = 1s, .reason = "restarting"});
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  msgtrans::ServerTransport server;
  server.on_message([](msgtrans::Session& session, const msgtrans::Message& message) {
    if (message.is_request()) {
      session.respond(message, message.payload());
    } else {
      session.send(message.payload());
    }
  });
  auto inherited = msgtrans::inherited_sockets();  // none if it was started by hand
  const auto endpoint = server.listen(msgtrans::tcp(argc > 1 ? argv[1] : "127.0.0.1:8001"), {}, inherited);
  std::cout << "listening tcp " << endpoint << std::endl;

  boost::asio::io_context context(1);
  boost::asio::signal_set restart(context, SIGUSR2);
  const std::vector<std::string> command{argv[0], endpoint.to_string()};
  const std::function<void()> wait = [&] {
    restart.async_wait([&](const msgtrans::error_code& stopped, int) {
      if (!stopped && !hand_over(server, command)) wait();
    });
  };
  wait();
  std::thread restarts([&] { context.run(); });
  server.start();
  msgtrans::announce_ready();
  server.run();  // until SIGINT, SIGTERM, or until it has been replaced
  context.stop();
  restarts.join();
}
