// SPDX-License-Identifier: Apache-2.0

// The rival "Beast": an echo server of binary WebSocket messages, each a packet in the framing of the other rivals, a
// coroutine for each connection as Beast's examples have it, one io_context on one thread.
//
// bench_beast_server [--port N]

#include "common.hpp"

#include <boost/asio.hpp>
#include <boost/beast/core/flat_buffer.hpp>
#include <boost/beast/websocket.hpp>
#include <csignal>

namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
using asio::ip::tcp;
using Stream = beast::websocket::stream<tcp::socket>;

asio::awaitable<void> session(Stream stream) {
  stream.binary(true);
  stream.auto_fragment(false);  // else 64 KiB go out in frames of 4 KiB
  try {
    co_await stream.async_accept(asio::use_awaitable);
    beast::flat_buffer buffer;
    for (;;) {
      co_await stream.async_read(buffer, asio::use_awaitable);
      auto* const packet = static_cast<std::uint8_t*>(buffer.data().data());
      if (buffer.size() < bench::header_size || bench::frame_size(packet) != buffer.size()) co_return;
      bench::turn_around(packet);
      co_await stream.async_write(buffer.cdata(), asio::use_awaitable);
      buffer.consume(buffer.size());
    }
  } catch (const boost::system::system_error&) {
    // The peer has gone.
  }
}

asio::awaitable<void> accept(tcp::acceptor& acceptor) {
  for (;;) {
    tcp::socket socket = co_await acceptor.async_accept(asio::use_awaitable);
    boost::system::error_code ignored;  // fails only on a connection that is gone already
    socket.set_option(tcp::no_delay(true), ignored);
    asio::co_spawn(acceptor.get_executor(), session(Stream(std::move(socket))), asio::detached);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run_main("bench_beast_server", [&] {
    const bench::Arguments arguments(argc, argv, {"--port"}, {});
    bench::raise_descriptor_limit(64);
    asio::io_context context(1);
    asio::signal_set signals(context, SIGINT, SIGTERM);
    signals.async_wait([&context](const boost::system::error_code&, int) { context.stop(); });
    const auto port = arguments.number<std::uint16_t>("--port", 0, 0, 65535);
    tcp::acceptor acceptor(context, {asio::ip::address_v4::loopback(), port});
    acceptor.listen(asio::socket_base::max_listen_connections);
    bench::announce(acceptor.local_endpoint().port(), "ws");
    asio::co_spawn(context, accept(acceptor), asio::detached);
    context.run();
    return 0;
  });
}
