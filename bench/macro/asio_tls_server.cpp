// SPDX-License-Identifier: Apache-2.0

// The rival "Asio and OpenSSL": an echo server in the same framing on ssl::stream, a coroutine for each connection, one
// io_context on one thread.
//
// bench_asio_tls_server --certificate FILE --key FILE [--port N] [--style batch|message]
//
//   batch    reads as much as there is into a buffer of its own for each connection, answers all frames of a read by
//            one write
//   message  the tutorial's way: read a header, read a body, write the answer, a message at a time

#include "common.hpp"

#include <algorithm>
#include <boost/asio.hpp>
#include <boost/asio/ssl.hpp>
#include <csignal>
#include <vector>

namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using Stream = asio::ssl::stream<tcp::socket>;

asio::awaitable<void> batches(Stream& stream) {
  std::vector<std::uint8_t> buffer(65536);
  std::size_t filled = 0;
  for (;;) {
    filled += co_await stream.async_read_some(asio::buffer(buffer) + filled, asio::use_awaitable);
    std::size_t ready = 0;
    while (filled - ready >= bench::header_size) {
      const std::size_t size = bench::frame_size(buffer.data() + ready);
      if (size == 0) co_return;
      if (filled - ready < size) {
        if (size > buffer.size() - ready && ready == 0) buffer.resize(2 * size);
        break;
      }
      bench::turn_around(buffer.data() + ready);
      ready += size;
    }
    if (ready == 0) continue;
    co_await asio::async_write(stream, asio::buffer(buffer.data(), ready), asio::use_awaitable);
    const auto begin = buffer.begin();
    std::copy(begin + static_cast<std::ptrdiff_t>(ready), begin + static_cast<std::ptrdiff_t>(filled), begin);
    filled -= ready;
  }
}

asio::awaitable<void> messages(Stream& stream) {
  std::vector<std::uint8_t> frame(bench::header_size);
  for (;;) {
    frame.resize(bench::header_size);
    co_await asio::async_read(stream, asio::buffer(frame), asio::use_awaitable);
    const std::size_t size = bench::frame_size(frame.data());
    if (size == 0) co_return;
    frame.resize(size);
    if (size > bench::header_size) {
      co_await asio::async_read(stream, asio::buffer(frame) + bench::header_size, asio::use_awaitable);
    }
    bench::turn_around(frame.data());
    co_await asio::async_write(stream, asio::buffer(frame), asio::use_awaitable);
  }
}

asio::awaitable<void> session(Stream stream, bool batch) {
  try {
    co_await stream.async_handshake(Stream::server, asio::use_awaitable);
    if (batch) {
      co_await batches(stream);
    } else {
      co_await messages(stream);
    }
  } catch (const boost::system::system_error&) {
    // The peer has gone.
  }
}

asio::awaitable<void> accept(tcp::acceptor& acceptor, asio::ssl::context& tls, bool batch) {
  for (;;) {
    tcp::socket socket = co_await acceptor.async_accept(asio::use_awaitable);
    boost::system::error_code ignored;  // fails only on a connection that is gone already
    socket.set_option(tcp::no_delay(true), ignored);
    asio::co_spawn(acceptor.get_executor(), session(Stream(std::move(socket), tls), batch), asio::detached);
  }
}

}  // namespace

int main(int argc, char** argv) {
  return bench::run_main("bench_asio_tls_server", [&] {
    const bench::Arguments arguments(argc, argv, {"--port", "--style", "--certificate", "--key"}, {});
    const std::string style = arguments.text("--style", "batch");
    if (style != "batch" && style != "message") {
      throw std::invalid_argument("--style wants batch or message, not '" + style + "'");
    }
    bench::raise_descriptor_limit(64);
    asio::io_context context(1);
    asio::ssl::context tls(asio::ssl::context::tls_server);
    tls.use_certificate_chain_file(arguments.text("--certificate", ""));
    tls.use_private_key_file(arguments.text("--key", ""), asio::ssl::context::pem);
    asio::signal_set signals(context, SIGINT, SIGTERM);
    signals.async_wait([&context](const boost::system::error_code&, int) { context.stop(); });
    const auto port = arguments.number<std::uint16_t>("--port", 0, 0, 65535);
    tcp::acceptor acceptor(context, {asio::ip::address_v4::loopback(), port});
    acceptor.listen(asio::socket_base::max_listen_connections);
    bench::announce(acceptor.local_endpoint().port(), "tls");
    asio::co_spawn(context, accept(acceptor, tls, style == "batch"), asio::detached);
    context.run();
    return 0;
  });
}
