// SPDX-License-Identifier: Apache-2.0
// An echo server in ten lines: answers requests, returns one-way messages, drains on SIGINT or SIGTERM.
// Try it with: msgtrans send tcp://127.0.0.1:8001 --request hello
#include <iostream>
#include <msgtrans/msgtrans.hpp>

int main(int argc, char** argv) {
  msgtrans::ServerTransport server;
  const auto where = server.listen(msgtrans::tcp(argc > 1 ? argv[1] : "127.0.0.1:8001"));
  server.on_message([](msgtrans::Session& session, const msgtrans::Message& message) {
    if (message.is_request()) {
      session.respond(message, message.payload());
    } else {
      session.send(message.payload());
    }
  });
  std::cout << "listening tcp " << where << std::endl;
  server.run();
}
