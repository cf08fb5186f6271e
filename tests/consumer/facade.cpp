// SPDX-License-Identifier: Apache-2.0
// A consumer of the whole library: serves and asks in one process.
#include <iostream>
#include <msgtrans/msgtrans.hpp>

int main() {
  msgtrans::ServerTransport server;
  const msgtrans::Endpoint at = server.listen(msgtrans::tcp("127.0.0.1:0"));
  server.on_message([](msgtrans::Session& session, const msgtrans::Message& message) {
    if (message.is_request()) session.respond(message, message.payload());
  });
  server.start();

  msgtrans::ClientTransport client;
  client.connect("tcp://" + at.to_string());
  const msgtrans::Reply reply = client.request("ping");
  client.close();
  const bool clean = server.stop().clean();

  // needs OpenSSL, also of a static library
  const bool checked = validate(msgtrans::TlsServerOptions{}).code == msgtrans::Errc::invalid_option;

  std::cout << "facade " << msgtrans::version << ": " << reply.text() << (clean ? ", clean" : ", not clean") << '\n';
  return reply.text() == "ping" && clean && checked ? 0 : 1;
}
