// SPDX-License-Identifier: Apache-2.0
// A client without a line of Asio: one-way messages, a request, a request that nobody answers, and an error.
#include <chrono>
#include <future>
#include <iostream>
#include <msgtrans/msgtrans.hpp>
#include <string>

using namespace std::chrono_literals;

int main() {
  // The other end: greets whoever asks, keeps quiet when asked for nothing, returns one-way messages in capitals.
  msgtrans::ServerTransport server({.shards = 1});
  const auto where = server.listen(msgtrans::tcp("127.0.0.1:0"));
  server.on_message([](msgtrans::Session& session, const msgtrans::Message& message) {
    std::string text(message.text());
    if (message.is_one_way()) {
      for (char& c : text) c = static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
      session.send(text);
    } else if (!text.empty()) {
      session.respond(message, "hello, " + text);
    }
  });
  server.start();

  msgtrans::ClientTransport client;
  std::promise<std::string> shouted;
  client.on_message([&shouted](msgtrans::Session&, const msgtrans::Message& message) {
    shouted.set_value(std::string(message.text()));
  });
  client.connect(where.url());

  client.send("one-way");
  std::cout << "one-way came back as: " << shouted.get_future().get() << "\n";

  std::cout << "request answered: " << client.request("world").text() << "\n";

  try {
    (void)client.request("", {.timeout = 100ms});
  } catch (const msgtrans::Exception& error) {
    if (error.code() == msgtrans::Errc::request_timeout) std::cout << "request without answer: timed out\n";
  }

  server.stop();
  msgtrans::Error error;  // the form without exceptions
  (void)client.request("anybody?", {}, error);
  std::cout << "after the server has gone: " << (error ? "error" : "no error") << "\n";
}
