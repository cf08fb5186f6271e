// SPDX-License-Identifier: Apache-2.0
// A transport of one's own behind the same server and client; what it takes is in pipe_transport.hpp.
#include "pipe_transport.hpp"

#include <iostream>
#include <msgtrans/msgtrans.hpp>

int main() {
  msgtrans::register_transport("pipe", std::make_shared<example::PipeTransport>());

  msgtrans::ServerTransport server({.shards = 1});
  const auto endpoint = server.listen(msgtrans::custom("pipe", "greeter"));
  server.on_message([](msgtrans::Session& session, const msgtrans::Message& message) {
    std::cout << session.peer().url() << " asks: " << message.text() << std::endl;
    session.respond(message, "hello over a pipe");
  });
  server.start();

  msgtrans::ClientTransport client;
  client.connect(endpoint.url());  // pipe://greeter
  const auto reply = client.request("who are you?");
  std::cout << "answered: " << reply.text() << std::endl;
  client.close();

  std::cout << (server.stop().clean() ? "stopped, nothing lost" : "something was cut") << std::endl;
}
