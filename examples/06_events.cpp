// SPDX-License-Identifier: Apache-2.0
// A coroutine that waits for whatever comes first of a server's events, a timer and the sign to stop, and loses
// nothing.
#include <atomic>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/deferred.hpp>
#include <boost/asio/experimental/parallel_group.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <chrono>
#include <iostream>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/msgtrans.hpp>
#include <thread>
#include <variant>

namespace asio = boost::asio;
using namespace std::chrono_literals;

void tell(const msgtrans::NextResult<msgtrans::Event>& next) {
  if (next) std::cout << to_string(next->kind) << (next->error ? ": " + next->error.message() : "") << std::endl;
  if (next.lagged() != 0) std::cout << "missed " << next.lagged() << " events" << std::endl;
}

// All three in one group, which gives every result: an event that came together with the timer's end is not thrown
// away.
asio::awaitable<void> watch(msgtrans::Subscription<msgtrans::Event> events,
                            msgtrans::AsyncChannel<std::monostate>& shutdown) {
  asio::steady_timer timer(co_await asio::this_coro::executor);
  bool ticked = false;
  for (;;) {
    timer.expires_after(20ms);
    auto [order, no_event, next, no_tick, no_shutdown, nothing] =
        co_await asio::experimental::make_parallel_group(
            events.async_next(asio::deferred), timer.async_wait(asio::deferred), shutdown.async_recv(asio::deferred))
            .async_wait(asio::experimental::wait_for_one(), asio::use_awaitable);
    if (!no_event) tell(next);
    if (!no_tick && !ticked) {
      ticked = true;
      std::cout << "the timer, while nothing happened" << std::endl;
    }
    if (!no_shutdown) {
      // What has come by then is still told.
      for (auto left = events.try_next(); left || left.lagged() != 0; left = events.try_next()) tell(left);
      std::cout << "told to stop" << std::endl;
    }
    if (!no_shutdown || no_event == msgtrans::Errc::closed) co_return;  // closed: the server has stopped
  }
}

int main() {
  msgtrans::ServerTransport server;
  const auto where = server.listen(msgtrans::tcp("127.0.0.1:0"));

  asio::io_context context(1);
  msgtrans::AsyncChannel<std::monostate> shutdown(context.get_executor(), msgtrans::ChannelCapacity::bounded(1));
  auto watching = asio::co_spawn(context, watch(server.subscribe(), shutdown), asio::use_future);
  std::thread thread([&context] { context.run(); });

  server.start();
  {
    msgtrans::ClientTransport client;
    client.connect(where.url());
    std::this_thread::sleep_for(100ms);  // so that the timer has its turn
    client.close();
  }
  // Both events are on their way to the coroutine when they have been broadcast.
  while (server.session_manager().stats().events != 2) std::this_thread::sleep_for(1ms);
  shutdown.send({});
  watching.get();
  thread.join();
  server.stop();
}
