// SPDX-License-Identifier: Apache-2.0
// Either end may ask. The server asks each client that connects for its name, then tells everybody who has come.
#include <boost/asio/use_future.hpp>
#include <future>
#include <iostream>
#include <msgtrans/msgtrans.hpp>
#include <string>

int main() {
  msgtrans::ServerTransport server({.shards = 1});
  const auto where = server.listen(msgtrans::tcp("127.0.0.1:0"));
  server.on_message([&server](msgtrans::Session& session, const msgtrans::Message& message) {
    if (!message.is_request()) return;
    session.respond(message, "first tell me your name");
    // A callback; it runs on the session's shard, where it must not block but may do anything else.
    session.async_request("what is your name?",
                          [&server](const msgtrans::error_code& error, const msgtrans::Reply& name) {
                            if (!error) server.broadcast(std::string(name.text()) + " has come");
                          });
  });
  server.start();

  msgtrans::ClientTransport client;
  std::promise<std::string> news;
  client.on_message([&news](msgtrans::Session& session, const msgtrans::Message& message) {
    if (message.is_request()) {
      std::cout << "server asks: " + std::string(message.text()) + "\n";
      session.respond(message, "Ada");
    } else {
      news.set_value(std::string(message.text()));
    }
  });
  client.connect(where.url());

  // a std::future instead of a callback
  std::future<msgtrans::Reply> answer = client.async_request("let me in", boost::asio::use_future);
  std::cout << "server answers: " + std::string(answer.get().text()) + "\n";
  std::cout << "everybody hears: " + news.get_future().get() + "\n";
  client.close();
  return server.stop().clean() ? 0 : 1;
}
