// SPDX-License-Identifier: Apache-2.0
#include "static_files.hpp"

#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <fstream>
#include <iterator>
#include <map>
#include <msgtrans/msgtrans.hpp>
#include <stdexcept>
#include <thread>
#include <utility>

namespace chat {

namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using Request = http::request<http::empty_body>;
using Response = http::response<http::span_body<const char>>;

constexpr std::chrono::seconds request_timeout{10};
constexpr std::size_t max_connections = 256;
constexpr std::uint32_t max_header = 8 * 1024;

struct File {
  std::string type;
  std::string content;
};

const File not_found{"text/plain; charset=utf-8", "There is nothing here.\n"};
const File not_allowed{"text/plain; charset=utf-8", "GET and HEAD only.\n"};

// The name in a Host header, if it is a plain one.
std::string_view host_name(std::string_view host) {
  const std::string_view name = host.substr(0, host.find(':'));
  return name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-") == name.npos
             ? name
             : std::string_view();
}

}  // namespace

struct StaticFiles::Impl {
  asio::io_context context{1};
  tcp::acceptor acceptor{context};
  std::map<std::string, File, std::less<>> files;
  std::uint16_t websocket = 0;
  std::size_t connections = 0;
  std::thread thread;

  [[nodiscard]] std::string policy(std::string_view host) const {
    const std::string_view name = host_name(host);
    const std::string port = std::to_string(websocket);
    const std::string there =
        name.empty() ? "ws: wss:"
                     : "ws://" + std::string(name) + ":" + port + " wss://" + std::string(name) + ":" + port;
    return "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self' " + there +
           "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
  }

  Response respond(const Request& request) const {
    Response response;
    response.version(request.version());
    response.keep_alive(request.keep_alive());
    response.set(http::field::cache_control, "no-cache");
    response.set("X-Content-Type-Options", "nosniff");
    response.set("Referrer-Policy", "no-referrer");
    response.set("Cross-Origin-Opener-Policy", "same-origin");
    response.set("Cross-Origin-Resource-Policy", "same-origin");
    response.set("Content-Security-Policy", policy(request[http::field::host]));
    const File* file = &not_allowed;
    if (request.method() == http::verb::get || request.method() == http::verb::head) {
      const std::string_view target = request.target();
      const auto found = files.find(target.substr(0, target.find('?')));
      file = found == files.end() ? &not_found : &found->second;
      response.result(found == files.end() ? http::status::not_found : http::status::ok);
    } else {
      response.result(http::status::method_not_allowed);
      response.set(http::field::allow, "GET, HEAD");
    }
    response.set(http::field::content_type, file->type);
    response.content_length(file->content.size());
    if (request.method() != http::verb::head) response.body() = {file->content.data(), file->content.size()};
    return response;
  }

  asio::awaitable<void> serve(beast::tcp_stream stream) {
    beast::flat_buffer buffer(max_header);
    for (bool more = true; more;) {
      beast::error_code error;
      auto token = asio::redirect_error(asio::use_awaitable, error);
      http::request_parser<http::empty_body> parser;
      parser.header_limit(max_header);
      stream.expires_after(request_timeout);
      co_await http::async_read(stream, buffer, parser, token);
      if (error) break;
      Response response = respond(parser.get());
      http::response_serializer<http::span_body<const char>> serializer(response);
      more = response.keep_alive();
      stream.expires_after(request_timeout);
      if (parser.get().method() == http::verb::head) {
        co_await http::async_write_header(stream, serializer, token);
      } else {
        co_await http::async_write(stream, serializer, token);
      }
      if (error) break;
    }
    beast::error_code ignored;
    stream.socket().shutdown(tcp::socket::shutdown_send, ignored);
  }

  asio::awaitable<void> accept() {
    for (;;) {
      beast::error_code error;
      tcp::socket socket = co_await acceptor.async_accept(asio::redirect_error(asio::use_awaitable, error));
      if (error == asio::error::operation_aborted) co_return;
      if (error) {  // say, no file descriptor left
        asio::steady_timer pause(context, std::chrono::milliseconds(100));
        co_await pause.async_wait(asio::use_awaitable);
        continue;
      }
      if (connections >= max_connections) continue;  // closes it
      ++connections;
      asio::co_spawn(context, serve(beast::tcp_stream(std::move(socket))),
                     [this](const std::exception_ptr&) { --connections; });
    }
  }
};

StaticFiles::StaticFiles() : impl_(std::make_unique<Impl>()) {}

StaticFiles::~StaticFiles() {
  stop();
}

void StaticFiles::add_file(std::string path, std::string type, const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  std::string content((std::istreambuf_iterator<char>(in)), {});
  if (!in) throw std::runtime_error(file.string() + ": cannot be read");
  add(std::move(path), std::move(type), std::move(content));
}

void StaticFiles::add(std::string path, std::string type, std::string content) {
  impl_->files[std::move(path)] = File{std::move(type), std::move(content)};
}

void StaticFiles::allow_websocket(std::uint16_t port) {
  impl_->websocket = port;
}

std::string StaticFiles::start(std::string_view host_and_port) {
  const msgtrans::Endpoint where = msgtrans::tcp(host_and_port);
  tcp::resolver resolver(impl_->context);
  const tcp::endpoint endpoint =
      resolver.resolve(where.host, std::to_string(where.port), tcp::resolver::passive)->endpoint();
  auto& acceptor = impl_->acceptor;
  try {
    acceptor.open(endpoint.protocol());
    acceptor.set_option(tcp::acceptor::reuse_address(true));
    acceptor.bind(endpoint);
    acceptor.listen();
  } catch (const std::exception& error) {
    throw std::runtime_error(std::string(host_and_port) + ": " + error.what());
  }
  asio::co_spawn(impl_->context, impl_->accept(), asio::detached);
  impl_->thread = std::thread([this] { impl_->context.run(); });
  return msgtrans::Endpoint{where.transport, where.host, acceptor.local_endpoint().port()}.to_string();
}

void StaticFiles::stop() {
  impl_->context.stop();
  if (impl_->thread.joinable()) impl_->thread.join();
}

}  // namespace chat
