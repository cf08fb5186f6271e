// SPDX-License-Identifier: Apache-2.0
// Everything asynchronous takes any completion token. Here: coroutines, on an io_context of the program's own.
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <chrono>
#include <iostream>
#include <msgtrans/msgtrans.hpp>
#include <string>

namespace asio = boost::asio;
using asio::use_awaitable;
using namespace asio::experimental::awaitable_operators;
using namespace std::chrono_literals;

// The server's side of one slow request: the message was retained, so it can be answered whenever it suits.
asio::awaitable<void> answer_later(msgtrans::OwnedMessage request) {
  asio::steady_timer timer(co_await asio::this_coro::executor, request.text() == "slow" ? 300ms : 20ms);
  co_await timer.async_wait(use_awaitable);
  request.respond("done: " + std::string(request.text()));
}

asio::awaitable<void> talk(msgtrans::ClientTransport& client, std::string url) {
  co_await client.async_connect(url, use_awaitable);

  const msgtrans::Reply first = co_await client.async_request("first", use_awaitable);
  std::cout << first.text() << "\n";

  // two at once, on one connection
  const auto [a, b] =
      co_await (client.async_request("second", use_awaitable) && client.async_request("third", use_awaitable));
  std::cout << a.text() << ", " << b.text() << "\n";

  // errors as values
  const auto [error, reply] = co_await client.async_request("slow", {.timeout = 50ms}, asio::as_tuple(use_awaitable));
  std::cout << "slow: " << error.message() << "\n";

  // whichever comes first; the other one is cancelled
  asio::steady_timer patience(co_await asio::this_coro::executor, 50ms);
  const auto winner = co_await (client.async_request("slow", use_awaitable) || patience.async_wait(use_awaitable));
  std::cout << (winner.index() == 0 ? "an answer" : "out of patience") << "\n";
}

asio::awaitable<void> run(msgtrans::ServerTransport& server, msgtrans::ClientTransport& client, std::string url) {
  co_await talk(client, url);
  client.close();
  const msgtrans::StopReport report = co_await server.async_stop(1s, use_awaitable);
  std::cout << (report.clean() ? "stopped, nothing lost" : "stopped, something was cut") << "\n";
}

int main() {
  asio::io_context context(1);  // one thread runs it: it can be a shard of the server and serve the client, too
  msgtrans::ServerTransport server({.executors = {context.get_executor()}});
  const auto where = server.listen(msgtrans::tcp("127.0.0.1:0"));
  server.on_message([](msgtrans::Session& session, const msgtrans::Message& message) {
    asio::co_spawn(session.get_executor(), answer_later(message.retain()), asio::detached);
  });
  server.start();

  msgtrans::ClientTransport client({.executor = context.get_executor()});
  int status = 1;
  asio::co_spawn(context, run(server, client, where.url()),
                 [&status](std::exception_ptr failure) { status = failure ? 1 : 0; });
  context.run();
  return status;
}
