// SPDX-License-Identifier: Apache-2.0

// The rival "plain Asio": an echo server in the same framing as a competent user of Asio writes it by hand, one
// io_context on one thread.
//
// bench_asio_server [--port N] [--style callback|coroutine]
//
//   callback   reads as much as there is into a buffer of its own for each connection, answers all frames of a read by
//              one write
//   coroutine  the tutorial's way: read a header, read a body, write the answer, a message at a time

#include "common.hpp"

#include <algorithm>
#include <boost/asio.hpp>
#include <csignal>
#include <memory>
#include <vector>

namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;

class CallbackSession : public std::enable_shared_from_this<CallbackSession> {
 public:
  explicit CallbackSession(tcp::socket socket) : socket_(std::move(socket)), buffer_(65536) {}

  void read() {
    socket_.async_read_some(asio::buffer(buffer_.data() + filled_, buffer_.size() - filled_),
                            [self = shared_from_this()](const error_code& error, std::size_t got) {
                              if (!error) self->on_read(got);
                            });
  }

 private:
  void on_read(std::size_t got) {
    filled_ += got;
    std::size_t ready = 0;
    while (filled_ - ready >= bench::header_size) {
      const std::size_t size = bench::frame_size(buffer_.data() + ready);
      if (size == 0) return;  // nobody holds the session any more: its socket closes
      if (filled_ - ready < size) {
        if (size > buffer_.size() - ready && ready == 0) buffer_.resize(2 * size);
        break;
      }
      bench::turn_around(buffer_.data() + ready);
      ready += size;
    }
    if (ready == 0) {
      read();
      return;
    }
    asio::async_write(socket_, asio::buffer(buffer_.data(), ready),
                      [self = shared_from_this(), ready](const error_code& error, std::size_t) {
                        if (!error) self->on_written(ready);
                      });
  }

  void on_written(std::size_t size) {
    const auto begin = buffer_.begin();
    const auto end = begin + static_cast<std::ptrdiff_t>(filled_);
    std::copy(begin + static_cast<std::ptrdiff_t>(size), end, begin);
    filled_ -= size;
    read();
  }

  tcp::socket socket_;
  std::vector<std::uint8_t> buffer_;
  std::size_t filled_ = 0;
};

asio::awaitable<void> coroutine_session(tcp::socket socket) {
  std::vector<std::uint8_t> frame(bench::header_size);
  try {
    for (;;) {
      frame.resize(bench::header_size);
      co_await asio::async_read(socket, asio::buffer(frame), asio::use_awaitable);
      const std::size_t size = bench::frame_size(frame.data());
      if (size == 0) co_return;
      frame.resize(size);
      if (size > bench::header_size) {
        co_await asio::async_read(socket, asio::buffer(frame) + bench::header_size, asio::use_awaitable);
      }
      bench::turn_around(frame.data());
      co_await asio::async_write(socket, asio::buffer(frame), asio::use_awaitable);
    }
  } catch (const boost::system::system_error&) {
    // The peer has gone.
  }
}

class Listener {
 public:
  Listener(asio::io_context& context, std::uint16_t port, bool coroutines)
      : acceptor_(context, {asio::ip::address_v4::loopback(), port}), coroutines_(coroutines) {
    acceptor_.listen(asio::socket_base::max_listen_connections);
    bench::announce(acceptor_.local_endpoint().port());
    accept();
  }

 private:
  void accept() {
    acceptor_.async_accept([this](const error_code& error, tcp::socket socket) {
      if (error == asio::error::operation_aborted) return;
      if (!error) start(std::move(socket));
      accept();
    });
  }

  void start(tcp::socket socket) {
    error_code ignored;  // fails only on a connection that is gone already
    socket.set_option(tcp::no_delay(true), ignored);
    if (coroutines_) {
      asio::co_spawn(acceptor_.get_executor(), coroutine_session(std::move(socket)), asio::detached);
    } else {
      std::make_shared<CallbackSession>(std::move(socket))->read();
    }
  }

  tcp::acceptor acceptor_;
  bool coroutines_;
};

}  // namespace

int main(int argc, char** argv) {
  return bench::run_main("bench_asio_server", [&] {
    const bench::Arguments arguments(argc, argv, {"--port", "--style"}, {});
    const std::string style = arguments.text("--style", "callback");
    if (style != "callback" && style != "coroutine") {
      throw std::invalid_argument("--style wants callback or coroutine, not '" + style + "'");
    }
    bench::raise_descriptor_limit(64);
    asio::io_context context(1);
    asio::signal_set signals(context, SIGINT, SIGTERM);
    signals.async_wait([&context](const error_code&, int) { context.stop(); });
    const Listener listener(context, arguments.number<std::uint16_t>("--port", 0, 0, 65535), style == "coroutine");
    context.run();
    return 0;
  });
}
