// SPDX-License-Identifier: Apache-2.0
// Connections over a pair of sockets, driven by hand on one thread; the other end is a connection too, or raw bytes.
#include "allocation_failure.hpp"
#include "deflate_agreement.hpp"
#include "websocket.hpp"
#include "wire_test_util.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <fcntl.h>
#include <functional>
#include <gtest/gtest.h>
#include <malloc.h>
#include <memory>
#include <msgtrans/transport/websocket.hpp>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>
#include <utility>
#include <vector>

namespace msgtrans::detail {
namespace {

using namespace std::chrono_literals;
using wire::test::Bytes;
using wire::test::bytes_of;
using wire::test::deflated;
using wire::test::from_hex;
using wire::test::random_bytes;
using wire::test::random_stream;
using wire::test::text_of;
using wire::test::to_hex;
using Status = Connection::Status;

constexpr wire::Limits limits;
constexpr std::size_t read_size = 65536;

/// Both ends of a connection. They close with it.
class Sockets {
 public:
  explicit Sockets(int type = SOCK_STREAM) {
    EXPECT_EQ(::socketpair(AF_UNIX, type | SOCK_NONBLOCK, 0, ends_.data()), 0);
  }
  ~Sockets() {
    close(0);
    close(1);
  }
  Sockets(const Sockets&) = delete;
  Sockets& operator=(const Sockets&) = delete;

  [[nodiscard]] int operator[](std::size_t end) const noexcept { return ends_.at(end); }
  void close(std::size_t end) {
    if (ends_.at(end) >= 0) ::close(std::exchange(ends_.at(end), -1));
  }
  void shrink() {
    for (const int end : ends_) {
      const int size = 1;  // the system makes of it the least it has
      EXPECT_EQ(::setsockopt(end, SOL_SOCKET, SO_SNDBUF, &size, sizeof size), 0);
    }
  }

 private:
  std::array<int, 2> ends_{-1, -1};
};

void put(int socket, const Bytes& bytes) {
  ASSERT_EQ(::send(socket, bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
}
void put(int socket, std::string_view text) {
  put(socket, bytes_of(text));
}

/// All that has come.
Bytes drain(int socket) {
  Bytes all;
  Bytes buffer(1 << 20);
  for (;;) {
    const ssize_t count = ::recv(socket, buffer.data(), buffer.size(), 0);
    if (count <= 0) return all;
    all.insert(all.end(), buffer.begin(), buffer.begin() + count);
  }
}

bool at_end(int socket) {
  char byte = 0;
  return ::recv(socket, &byte, 1, MSG_PEEK) == 0;
}

/// Reads until there is nothing more; the status that ended it.
Status read_all(Connection& connection, Bytes& into) {
  Bytes buffer(read_size);
  for (;;) {
    std::size_t count = 0;
    const Status status = connection.read(buffer, count);
    if (status != Status::done) {
      EXPECT_EQ(count, 0U);
      return status;
    }
    EXPECT_GT(count, 0U);
    into.insert(into.end(), buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(count));
  }
}

Status write(Connection& connection, const Bytes& bytes, std::size_t& taken) {
  const iovec piece{const_cast<std::byte*>(bytes.data()), bytes.size()};
  return connection.write({&piece, 1}, taken);
}

void write_whole(Connection& connection, const Bytes& bytes) {
  std::size_t taken = 0;
  ASSERT_EQ(write(connection, bytes, taken), Status::done) << connection.error().message();
  ASSERT_EQ(taken, bytes.size());
}

std::unique_ptr<WebSocketConnection> make_server(WebSocketConnection::Below below, WebSocketServerOptions options = {},
                                                 const wire::Limits& its = limits, std::string path = "/") {
  return WebSocketConnection::server(std::move(below), std::make_shared<const WebSocketServerOptions>(options),
                                     std::move(path), its);
}

std::unique_ptr<WebSocketConnection> make_client(WebSocketConnection::Below below, WebSocketClientOptions options = {},
                                                 std::string target = "/") {
  return WebSocketConnection::client(std::move(below), std::make_shared<const WebSocketClientOptions>(options),
                                     "example.org:8002", std::move(target), limits);
}

/// A server and a client that have agreed.
struct Pair {
  explicit Pair(WebSocketServerOptions server_options = {}, WebSocketClientOptions client_options = {},
                int type = SOCK_STREAM)
      : sockets(type),
        server(make_server(sockets[0], std::move(server_options))),
        client(make_client(sockets[1], std::move(client_options))) {
    EXPECT_EQ(client->handshake(), Status::blocked);
    EXPECT_EQ(server->handshake(), Status::done) << server->error().message();
    EXPECT_EQ(client->handshake(), Status::done) << client->error().message();
  }

  Sockets sockets;
  std::unique_ptr<WebSocketConnection> server;
  std::unique_ptr<WebSocketConnection> client;
};

constexpr std::string_view request =
    "GET / HTTP/1.1\r\nHost: example.org\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n";  // the key of RFC 6455, 1.3
constexpr std::string_view accepted =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// The request with one line changed, or left out if `to` is empty.
std::string changed(std::string_view from, std::string_view to) {
  std::string text(request);
  const std::size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

/// A server that has agreed with a raw peer.
struct RawClient {
  explicit RawClient(WebSocketServerOptions options = {}, const wire::Limits& its = limits)
      : server(make_server(sockets[0], std::move(options), its)) {
    put(sockets[1], request);
    EXPECT_EQ(server->handshake(), Status::done) << server->error().message();
    EXPECT_EQ(text_of(drain(sockets[1])), accepted);
  }
  [[nodiscard]] int peer() const { return sockets[1]; }

  Sockets sockets;
  std::unique_ptr<WebSocketConnection> server;
};

Bytes packet(std::size_t payload, std::uint32_t seed = 1) {
  Bytes bytes;
  wire::append_packet(bytes, wire::Header{}, {}, random_bytes(payload, seed));
  return bytes;
}

/// What a client sends: masked with a key of zeros, so that it can be read here.
std::string frame(std::string_view first, const std::string& payload_hex) {
  const std::size_t size = payload_hex.size() / 2;
  std::string head(first);
  if (size <= 125) {
    head += to_hex(Bytes{static_cast<std::byte>(0x80U | size)});
  } else {
    head += "fe" + to_hex(Bytes{static_cast<std::byte>(size >> 8), static_cast<std::byte>(size)});
  }
  return head + "00000000" + payload_hex;
}

// --- handshake

TEST(WebSocketHandshake, TheExampleOfTheRfcIsAnsweredAsThere) {
  Sockets sockets;
  const auto server = make_server(sockets[0]);
  EXPECT_EQ(server->handshake(), Status::blocked) << "nothing has come";
  put(sockets[1], request);
  EXPECT_EQ(server->handshake(), Status::done);
  EXPECT_EQ(text_of(drain(sockets[1])), accepted);
  EXPECT_FALSE(server->has_input());
  EXPECT_FALSE(server->wants_write());
  EXPECT_EQ(server->handshake(), Status::done);
}

TEST(WebSocketHandshake, ARequestMayBeCutAnywhere) {
  for (std::size_t cut = 1; cut < request.size(); ++cut) {
    Sockets sockets;
    const auto server = make_server(sockets[0]);
    put(sockets[1], request.substr(0, cut));
    ASSERT_EQ(server->handshake(), Status::blocked);
    ASSERT_NE(server->describe_handshake().find(std::to_string(cut) + " bytes of the client's request"),
              std::string::npos)
        << server->describe_handshake();
    put(sockets[1], request.substr(cut));
    ASSERT_EQ(server->handshake(), Status::done) << "cut at " << cut;
  }
}

TEST(WebSocketHandshake, WhatCameBehindTheRequestIsKept) {
  Sockets sockets;
  const auto server = make_server(sockets[0]);
  const Bytes first = packet(30);
  put(sockets[1], bytes_of(std::string(request) + text_of(from_hex(frame("82", to_hex(first)) + "8281"))));
  ASSERT_EQ(server->handshake(), Status::done);
  EXPECT_TRUE(server->has_input());
  Bytes in;
  EXPECT_EQ(read_all(*server, in), Status::blocked);
  EXPECT_EQ(to_hex(in), to_hex(first));
  EXPECT_FALSE(server->has_input());
}

TEST(WebSocketHandshake, ClientAndServerAgree) {
  const Pair pair;
  EXPECT_EQ(pair.client->subprotocol(), "msgtrans");
  EXPECT_EQ(pair.server->subprotocol(), "msgtrans");
  const Pair without({}, {.subprotocol = ""});
  EXPECT_EQ(without.client->subprotocol(), "");
  EXPECT_EQ(without.server->subprotocol(), "");
  const Pair other({.subprotocol = "v2"}, {});
  EXPECT_EQ(other.client->subprotocol(), "");
  EXPECT_EQ(other.server->subprotocol(), "");
}

TEST(WebSocketHandshake, TheClientsRequestIsAsConfigured) {
  Sockets sockets;
  const auto client = make_client(
      sockets[1], {.subprotocol = "v2", .origin = "https://a.example", .headers = {{"Authorization", "Bearer x"}}},
      "/chat?room=1");
  EXPECT_EQ(client->handshake(), Status::blocked);
  const std::string text = text_of(drain(sockets[0]));
  EXPECT_TRUE(text.starts_with("GET /chat?room=1 HTTP/1.1\r\nHost: example.org:8002\r\n")) << text;
  for (const char* line : {"Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13",
                           "Sec-WebSocket-Protocol: v2", "Origin: https://a.example", "Authorization: Bearer x"}) {
    EXPECT_NE(text.find(std::string("\r\n") + line + "\r\n"), std::string::npos) << line << " in " << text;
  }
  EXPECT_EQ(text.find("Sec-WebSocket-Extensions"), std::string::npos);
  EXPECT_TRUE(text.ends_with("\r\n\r\n"));
}

TEST(WebSocketHandshake, EveryClientHasAKeyOfItsOwn) {
  const auto key = [] {
    Sockets sockets;
    const auto client = make_client(sockets[1]);
    EXPECT_EQ(client->handshake(), Status::blocked);
    const std::string text = text_of(drain(sockets[0]));
    return text.substr(text.find("Sec-WebSocket-Key: "), 43);
  };
  EXPECT_NE(key(), key());
}

struct Variant {
  const char* name;
  std::string request;
  WebSocketServerOptions options = {};
  std::string path = "/";
};

TEST(WebSocketHandshake, WhatTheRfcAllowsIsTaken) {
  const std::vector<Variant> variants = {
      {"query", changed("GET / ", "GET /?token=x ")},
      {"path", changed("GET / ", "GET /a/b "), {}, "/a/b"},
      {"absolute form", changed("GET / ", "GET http://example.org/ ")},
      {"absolute form without path", changed("GET / ", "GET ws://example.org ")},
      {"case", changed("Upgrade: websocket\r\nConnection: Upgrade", "uPGRADE: WebSocket\r\nconnection: upgrade")},
      {"lists", changed("Connection: Upgrade", "Connection: keep-alive, Upgrade")},
      {"two lines", changed("Connection: Upgrade", "Connection: keep-alive\r\nConnection: Upgrade")},
      {"extensions offered", changed("\r\n\r\n", "\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n")},
      {"other subprotocols", changed("\r\n\r\n", "\r\nSec-WebSocket-Protocol: chat, MSGTRANS\r\n\r\n")},
      {"empty body", changed("\r\n\r\n", "\r\nContent-Length: 0\r\n\r\n")},
  };
  for (const Variant& variant : variants) {
    Sockets sockets;
    const auto server = make_server(sockets[0], variant.options, limits, variant.path);
    put(sockets[1], variant.request);
    EXPECT_EQ(server->handshake(), Status::done) << variant.name << ": " << server->error().message();
    EXPECT_EQ(text_of(drain(sockets[1])), accepted) << variant.name;
  }
}

TEST(WebSocketHandshake, ASubprotocolIsChosenFromAList) {
  Sockets sockets;
  const auto server = make_server(sockets[0]);
  put(sockets[1],
      changed("\r\n\r\n", "\r\nSec-WebSocket-Protocol: chat\r\nSec-WebSocket-Protocol: v2, msgtrans\r\n\r\n"));
  EXPECT_EQ(server->handshake(), Status::done);
  EXPECT_NE(text_of(drain(sockets[1])).find("\r\nSec-WebSocket-Protocol: msgtrans\r\n"), std::string::npos);
}

struct Refusal {
  const char* name;
  std::string request;
  std::string status;
  std::string cause;        // in the error
  std::string header = {};  // in the answer
};

std::vector<Refusal> refusals() {
  return {
      {"path", changed("GET / ", "GET /x "), "404 Not Found", "no such path \"/x\""},
      {"path with blanks to see", changed("GET / ", "GET /\xff\x80 "), "404 Not Found", "no such path \"/??\""},
      {"method", changed("GET / ", "POST / "), "405 Method Not Allowed", "method is \"POST\", must be GET",
       "Allow: GET"},
      {"no upgrade", changed("Upgrade: websocket\r\n", ""), "426 Upgrade Required", "Upgrade is \"\"",
       "Upgrade: websocket"},
      {"other upgrade", changed("Upgrade: websocket", "Upgrade: h2c"), "426 Upgrade Required", "Upgrade is \"h2c\""},
      {"connection", changed("Connection: Upgrade", "Connection: close"), "426 Upgrade Required",
       "Connection is \"close\""},
      {"version", changed("Version: 13", "Version: 8"), "426 Upgrade Required",
       "Sec-WebSocket-Version is \"8\", must be 13", "Sec-WebSocket-Version: 13"},
      {"no version", changed("Sec-WebSocket-Version: 13\r\n", ""), "426 Upgrade Required",
       "Sec-WebSocket-Version is \"\", must be 13", "Sec-WebSocket-Version: 13"},
      {"no key", changed("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n", ""), "400 Bad Request",
       "Sec-WebSocket-Key is \"\""},
      {"short key", changed("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhbXBsZSBub25j"), "400 Bad Request",
       "Sec-WebSocket-Key is \"dGhl"},
      {"key of other letters", changed("dGhlIHNhbXBsZSBub25jZQ==", "dGhlIHNhb!BsZSBub25jZQ=="), "400 Bad Request",
       "Sec-WebSocket-Key is \"dGhl"},
      {"two keys", changed("Upgrade: w", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nUpgrade: w"),
       "400 Bad Request", "must be one of 16 bytes"},
      {"no host", changed("Host: example.org\r\n", ""), "400 Bad Request", "must have one Host"},
      {"HTTP/1.0", changed("HTTP/1.1", "HTTP/1.0"), "400 Bad Request", "HTTP version is below 1.1"},
      {"body", changed("\r\n\r\n", "\r\nContent-Length: 5\r\n\r\nhello"), "400 Bad Request", "the request has a body"},
      {"chunked body", changed("\r\n\r\n", "\r\nTransfer-Encoding: chunked\r\n\r\n"), "400 Bad Request",
       "the request has a body"},
      {"no HTTP", "hello\r\n\r\n", "400 Bad Request", "the request is not HTTP"},
      {"broken header", changed("Host: ", "Ho st: "), "400 Bad Request", "the request is not HTTP"},
      {"long header", changed("\r\n\r\n", "\r\nX: " + std::string(9000, 'x')), "431 Request Header Fields Too Large",
       "the head of the request is over the limit of 8192 bytes"},
      {"long header with an end", changed("\r\n\r\n", "\r\nX: " + std::string(9000, 'x') + "\r\n\r\n"),
       "431 Request Header Fields Too Large", "the head of the request is over the limit of 8192 bytes"},
  };
}

TEST(WebSocketHandshake, WhatIsRefusedIsToldToBothEnds) {
  for (const Refusal& refusal : refusals()) {
    SCOPED_TRACE(refusal.name);
    Sockets sockets;
    const auto server = make_server(sockets[0]);
    put(sockets[1], refusal.request);
    ASSERT_EQ(server->handshake(), Status::failed);
    EXPECT_EQ(server->error().code, Errc::handshake_failed);
    EXPECT_TRUE(server->error().text.starts_with("WebSocket handshake: ")) << server->error().text;
    EXPECT_NE(server->error().text.find(refusal.cause), std::string::npos) << server->error().text;
    const std::string answer = text_of(drain(sockets[1]));
    EXPECT_TRUE(answer.starts_with("HTTP/1.1 " + refusal.status + "\r\n")) << answer;
    EXPECT_NE(answer.find("\r\nConnection: close\r\n"), std::string::npos) << answer;
    if (!refusal.header.empty()) {
      EXPECT_NE(answer.find("\r\n" + refusal.header + "\r\n"), std::string::npos) << answer;
    }
    const std::size_t body = answer.find("\r\n\r\n") + 4;
    EXPECT_NE(answer.find("\r\nContent-Length: " + std::to_string(answer.size() - body) + "\r\n"), std::string::npos);
    EXPECT_NE(answer.find(refusal.cause, body), std::string::npos) << answer;
    EXPECT_TRUE(at_end(sockets[1])) << "nothing follows";
  }
}

TEST(WebSocketHandshake, TheLimitOfTheHeadIsTheOptions) {
  for (const std::size_t size : {request.size(), request.size() - 1}) {
    Sockets sockets;
    WebSocketServerOptions options;
    options.max_header = size;
    const auto server = make_server(sockets[0], options);
    put(sockets[1], request);
    EXPECT_EQ(server->handshake(), size == request.size() ? Status::done : Status::failed);
  }
}

TEST(WebSocketHandshake, TheOriginIsTheHooksToCheck) {
  std::vector<std::string> asked;
  WebSocketServerOptions options;
  options.check_origin = [&](std::string_view origin) {
    asked.emplace_back(origin);
    if (origin == "https://throws") throw std::runtime_error("a secret");
    return origin == "https://good" || origin.empty();
  };
  const auto ask = [&](const std::string& lines, Status expected) {
    Sockets sockets;
    const auto server = make_server(sockets[0], options);
    put(sockets[1], changed("\r\n\r\n", "\r\n" + lines + "\r\n"));
    EXPECT_EQ(server->handshake(), expected) << lines;
    return text_of(drain(sockets[1])) + server->error().text;
  };
  ask("Origin: https://good\r\n", Status::done);
  ask("", Status::done);
  const std::string bad = ask("Origin: https://bad\r\n", Status::failed);
  EXPECT_TRUE(bad.starts_with("HTTP/1.1 403 Forbidden\r\n")) << bad;
  EXPECT_NE(bad.find("WebSocket handshake: origin \"https://bad\" is not allowed"), std::string::npos) << bad;
  EXPECT_EQ(asked, (std::vector<std::string>{"https://good", "", "https://bad"}));
  ask("Origin: https://good\r\nOrigin: https://bad\r\n", Status::failed);
  const std::string thrown = ask("Origin: https://throws\r\n", Status::failed);
  EXPECT_TRUE(thrown.starts_with("HTTP/1.1 500 Internal Server Error\r\n")) << thrown;
  EXPECT_EQ(thrown.find("secret"), thrown.rfind("secret")) << "in the error, and not in the answer";
  EXPECT_GT(thrown.find("secret"), thrown.find("WebSocket handshake: "));
}

TEST(WebSocketHandshake, APeerThatLeavesIsSaidToHave) {
  Sockets sockets;
  const auto server = make_server(sockets[0]);
  put(sockets[1], "GET / HTTP");
  sockets.close(1);
  EXPECT_EQ(server->handshake(), Status::failed);
  EXPECT_EQ(server->error().code, Errc::handshake_failed);
  EXPECT_EQ(server->error().text, "WebSocket handshake: the peer closed after 10 bytes of its request");
}

TEST(WebSocketHandshake, AServerThatEndsInItAnswersTheClient) {
  for (const auto& [reason, status] : {std::pair{Errc::handshake_timeout, "408 Request Timeout"},
                                       std::pair{Errc::stopping, "503 Service Unavailable"}}) {
    Sockets sockets;
    const auto server = make_server(sockets[0]);
    put(sockets[1], "GET / HTTP");
    EXPECT_EQ(server->handshake(), Status::blocked);
    EXPECT_EQ(server->shut_down(Error(reason)), Status::done);
    EXPECT_FALSE(server->awaits_peers_end());
    EXPECT_TRUE(text_of(drain(sockets[1])).starts_with(std::string("HTTP/1.1 ") + status + "\r\n"));
  }
}

TEST(WebSocketHandshake, AClientTakesOnlyWhatItAskedFor) {
  struct Answer {
    const char* name;
    std::function<std::string(std::string)> change;  // of the right one
    std::string cause;                               // empty: taken
  };
  const auto replace = [](std::string from, std::string to) {
    return [from, to](std::string text) { return text.replace(text.find(from), from.size(), to); };
  };
  const std::vector<Answer> answers = {
      {"right", [](std::string text) { return text; }, ""},
      {"case", replace("Upgrade: websocket", "upgrade: WebSocket"), ""},
      {"its subprotocol", replace("\r\n\r\n", "\r\nSec-WebSocket-Protocol: msgtrans\r\n\r\n"), ""},
      {"status", [](const std::string&) { return "HTTP/1.1 404 Not Found\r\nContent-Length: 3\r\n\r\nabc"; },
       "the server answered \"HTTP/1.1 404 Not Found\""},
      {"redirect", [](const std::string&) { return "HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n"; },
       "the server answered \"HTTP/1.1 302 Found\""},
      {"no HTTP", [](const std::string&) { return "SSH-2.0-OpenSSH\r\n\r\n"; }, "the answer is not HTTP"},
      {"accept", replace("Accept: ", "Accept: x"), "Sec-WebSocket-Accept is \"x"},
      {"upgrade", replace("Upgrade: websocket", "Upgrade: h2c"), "the answer's Upgrade is \"h2c\""},
      {"connection", replace("Connection: Upgrade", "Connection: close"), "the answer's Connection is \"close\""},
      {"extension", replace("\r\n\r\n", "\r\nSec-WebSocket-Extensions: permessage-deflate\r\n\r\n"),
       "the server chose the extension \"permessage-deflate\""},
      {"subprotocol", replace("\r\n\r\n", "\r\nSec-WebSocket-Protocol: chat\r\n\r\n"),
       "the server chose the subprotocol \"chat\""},
      {"too long", replace("\r\n\r\n", "\r\nX: " + std::string(9000, 'x')),
       "the head of the answer is over the limit of 8192 bytes"},
  };
  for (const Answer& answer : answers) {
    SCOPED_TRACE(answer.name);
    Sockets sockets;
    const auto server = make_server(sockets[0], {.subprotocol = ""});
    Sockets other;  // the client's, so that the answer can be changed on its way
    const auto client = make_client(other[1]);
    ASSERT_EQ(client->handshake(), Status::blocked);
    put(sockets[1], drain(other[0]));
    ASSERT_EQ(server->handshake(), Status::done);
    put(other[0], answer.change(text_of(drain(sockets[1]))));
    EXPECT_EQ(client->handshake(), answer.cause.empty() ? Status::done : Status::failed);
    if (answer.cause.empty()) continue;
    EXPECT_EQ(client->error().code, Errc::handshake_failed);
    EXPECT_TRUE(client->error().text.starts_with("WebSocket handshake: " + answer.cause)) << client->error().text;
  }
}

TEST(WebSocketHandshake, AClientAsksForNoTargetThatWouldBreakTheRequest) {
  for (const char* target : {"", "x", "/a b", "/\r\nX: y"}) {
    Sockets sockets;
    const auto client = make_client(sockets[1], {}, target);
    EXPECT_EQ(client->handshake(), Status::failed);
    EXPECT_EQ(client->error().code, Errc::invalid_address);
    EXPECT_TRUE(drain(sockets[0]).empty());
  }
}

// --- packets

TEST(WebSocketConnection, PacketsArriveWholeBothWays) {
  const Pair pair;
  const auto stream = random_stream(200, 50, 3000, 1);
  for (Connection* from : {static_cast<Connection*>(pair.server.get()), static_cast<Connection*>(pair.client.get())}) {
    Connection& to = from == pair.server.get() ? static_cast<Connection&>(*pair.client) : *pair.server;
    Bytes in;
    for (std::size_t at = 0; at < stream.bytes.size();) {
      std::size_t taken = 0;
      const Bytes rest(stream.bytes.begin() + static_cast<std::ptrdiff_t>(at), stream.bytes.end());
      ASSERT_NE(write(*from, rest, taken), Status::failed);
      at += taken;
      ASSERT_EQ(read_all(to, in), Status::blocked) << to.error().message();
    }
    while (from->wants_write()) {
      ASSERT_NE(from->flush(), Status::failed);
      ASSERT_EQ(read_all(to, in), Status::blocked);
    }
    EXPECT_TRUE(in == stream.bytes);
  }
}

TEST(WebSocketConnection, PacketsCutAnywherePassTinySocketBuffers) {
  for (std::uint32_t seed = 0; seed < 12; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    Pair pair;
    pair.sockets.shrink();
    const auto stream = random_stream(40, 60, seed % 3 == 0 ? 200'000 : 2000, seed);
    Connection& from = seed % 2 == 0 ? static_cast<Connection&>(*pair.server) : *pair.client;
    Connection& to = seed % 2 == 0 ? static_cast<Connection&>(*pair.client) : *pair.server;
    Bytes in;
    std::size_t at = 0;
    for (int round = 0; at < stream.bytes.size() || from.wants_write(); ++round) {
      ASSERT_LT(round, 1'000'000);
      std::vector<iovec> pieces;
      std::size_t offered = 0;
      const std::size_t count = random() % 20;
      for (std::size_t i = 0; i < count && at + offered < stream.bytes.size(); ++i) {
        const std::size_t most = std::size_t{1} << (random() % 18);
        const std::size_t size = std::min(stream.bytes.size() - at - offered, 1 + random() % most);
        pieces.push_back({const_cast<std::byte*>(stream.bytes.data()) + at + offered, size});
        offered += size;
      }
      std::size_t taken = 0;
      const Status status = from.write(pieces, taken);
      ASSERT_LE(taken, offered);
      ASSERT_EQ(status, status == Status::done ? Status::done : Status::blocked) << from.error().message();
      ASSERT_TRUE(status == Status::blocked || taken == offered);
      ASSERT_TRUE(status == Status::done || from.wants_write());
      at += taken;
      if (random() % 2 == 0) {
        ASSERT_EQ(read_all(to, in), Status::blocked) << to.error().message();
      }
      if (random() % 2 == 0) {
        ASSERT_NE(from.flush(), Status::failed);
      }
    }
    ASSERT_EQ(read_all(to, in), Status::blocked);
    ASSERT_TRUE(in == stream.bytes);
  }
}

TEST(WebSocketConnection, EachPacketIsAMessageOfItsOwn) {
  const RawClient raw;
  const Bytes small = packet(0);
  const Bytes medium = packet(300);
  const Bytes large = packet(100'000);
  Bytes all = small;
  all.insert(all.end(), medium.begin(), medium.end());
  all.insert(all.end(), large.begin(), large.end());
  std::size_t taken = 0;
  Bytes in;
  for (std::size_t at = 0; at < all.size(); at += taken) {
    write(*raw.server, Bytes(all.begin() + static_cast<std::ptrdiff_t>(at), all.end()), taken);
    const Bytes more = drain(raw.peer());
    in.insert(in.end(), more.begin(), more.end());
  }
  EXPECT_TRUE(to_hex(in) ==
              "8210" + to_hex(small) + "827e013c" + to_hex(medium) + "827f00000000000186b0" + to_hex(large));
}

TEST(WebSocketConnection, AClientMasksWithAFreshKeyEachTime) {
  const Pair pair;
  const Bytes one = packet(4);
  std::vector<std::string> keys;
  for (int i = 0; i < 3; ++i) {
    write_whole(*pair.client, one);
    const Bytes frame = drain(pair.sockets[0]);
    ASSERT_EQ(frame.size(), 6U + one.size());
    EXPECT_EQ(to_hex(std::span(frame).first(2)), "8294");
    Bytes plain(frame.begin() + 6, frame.end());
    for (std::size_t j = 0; j < plain.size(); ++j) plain[j] ^= frame[2 + j % 4];
    EXPECT_EQ(to_hex(plain), to_hex(one));
    keys.push_back(to_hex(std::span(frame).subspan(2, 4)));
  }
  EXPECT_NE(keys[0], keys[1]);
  EXPECT_NE(keys[1], keys[2]);
}

TEST(WebSocketConnection, AHundredPacketsAreOneCallOfTheSystem) {
  const Pair pair({}, {}, SOCK_SEQPACKET);  // what one call sends stays together
  Bytes all;
  for (std::uint32_t i = 0; i < 100; ++i) {
    const Bytes one = packet(64, i);
    all.insert(all.end(), one.begin(), one.end());
  }
  write_whole(*pair.server, all);
  write_whole(*pair.client, all);
  for (const std::size_t end : {1U, 0U}) {
    Bytes buffer(read_size);
    EXPECT_EQ(::recv(pair.sockets[end], buffer.data(), buffer.size(), 0), 100 * (80 + (end == 1 ? 2 : 6)));
    EXPECT_LT(::recv(pair.sockets[end], buffer.data(), buffer.size(), 0), 0);
  }
}

TEST(WebSocketConnection, FramesTakeNoMemory) {
  const Pair pair;
  Bytes all;
  for (std::uint32_t i = 0; i < 100; ++i) {
    const Bytes one = packet(64, i);
    all.insert(all.end(), one.begin(), one.end());
  }
  write_whole(*pair.server, packet(1));  // the thread's buffer
  Bytes buffer(read_size);
  std::size_t count = 0;
  ASSERT_EQ(pair.client->read(buffer, count), Status::done);
  const iovec piece{all.data(), all.size()};
  std::size_t taken = 0;
  Status wrote = Status::failed;
  Status read = Status::failed;
  bool allocated = true;
  {
    const test::AllocationFailure failure(0);
    wrote = pair.server->write({&piece, 1}, taken);
    read = pair.client->read(buffer, count);
    allocated = failure.happened();
  }
  EXPECT_FALSE(allocated);
  EXPECT_EQ(wrote, Status::done);
  EXPECT_EQ(read, Status::done);
  EXPECT_EQ(count, all.size());
  EXPECT_LE(sizeof(WebSocketConnection), 640U) << "an idle session has nothing else";
}

TEST(WebSocketConnection, AFullSocketTakesLittleOfALargePayload) {
  const RawClient raw;
  Bytes large = packet(8'000'000);
  std::size_t at = 0;
  for (;;) {
    std::size_t taken = 0;
    const Bytes rest(large.begin() + static_cast<std::ptrdiff_t>(at), large.end());
    ASSERT_EQ(write(*raw.server, rest, taken), Status::blocked);
    EXPECT_TRUE(raw.server->wants_write());
    at += taken;
    if (taken == 0) break;
  }
  const Bytes held = drain(raw.peer());
  EXPECT_EQ(held.size(), 10 + at) << "what was taken went to the socket, and is not kept";
  EXPECT_EQ(raw.server->flush(), Status::done);
  EXPECT_FALSE(raw.server->wants_write());
}

TEST(WebSocketConnection, WhatAFullSocketDidNotTakeIsKeptInBounds) {
  const RawClient raw;
  Bytes all;
  for (std::uint32_t i = 0; i < 20'000; ++i) {
    const Bytes one = packet(64, i);
    all.insert(all.end(), one.begin(), one.end());
  }
  std::size_t at = 0;
  for (int i = 0; i < 3; ++i) {
    std::size_t taken = 0;
    const Bytes rest(all.begin() + static_cast<std::ptrdiff_t>(at), all.end());
    ASSERT_EQ(write(*raw.server, rest, taken), Status::blocked);
    EXPECT_TRUE(i == 0 || taken == 0);
    at += taken;
  }
  const std::size_t went = drain(raw.peer()).size();
  EXPECT_LE(at, went + 65536);
  ASSERT_EQ(raw.server->flush(), Status::done);
  EXPECT_GT(drain(raw.peer()).size(), 0U);
}

TEST(WebSocketConnection, FragmentsAreJoined) {
  const RawClient raw;
  const std::string hex = to_hex(packet(100));
  put(raw.peer(), from_hex(frame("02", hex.substr(0, 20)) + frame("00", hex.substr(20, 100)) + frame("89", "61") +
                           frame("00", "") + frame("80", hex.substr(120))));
  Bytes in;
  EXPECT_EQ(read_all(*raw.server, in), Status::blocked);
  EXPECT_EQ(to_hex(in), hex);
  EXPECT_EQ(to_hex(drain(raw.peer())), "8a0161");
}

// --- ping and pong

TEST(WebSocketConnection, EveryPingIsAnswered) {
  const RawClient raw;
  put(raw.peer(), from_hex(frame("89", "") + frame("82", to_hex(packet(0))) + frame("89", "0102") + frame("8a", "03")));
  Bytes in;
  EXPECT_EQ(read_all(*raw.server, in), Status::blocked);
  EXPECT_EQ(to_hex(in), to_hex(packet(0)));
  EXPECT_EQ(to_hex(drain(raw.peer())), "8a008a020102");
}

TEST(WebSocketConnection, AClientsPongIsMasked) {
  const Pair pair;
  put(pair.sockets[0], from_hex("8901ff"));
  Bytes in;
  EXPECT_EQ(read_all(*pair.client, in), Status::blocked);
  const Bytes pong = drain(pair.sockets[0]);
  ASSERT_EQ(pong.size(), 7U);
  EXPECT_EQ(to_hex(std::span(pong).first(2)), "8a81");
  EXPECT_EQ(pong[6] ^ pong[2], std::byte{0xff});
}

/// Writes packets until the socket is full.
void fill(WebSocketConnection& connection, const Bytes& one) {
  Bytes all;
  while (all.size() < 4'000'000) all.insert(all.end(), one.begin(), one.end());
  std::size_t taken = 0;
  ASSERT_EQ(write(connection, all, taken), Status::blocked);
  EXPECT_EQ(taken % one.size(), 0U) << "small packets are taken whole";
}

/// All that comes while the connection is flushed.
Bytes drain_flushed(WebSocketConnection& connection, int peer) {
  Bytes all;
  for (int i = 0; i < 100; ++i) {
    const bool more = connection.wants_write();
    const Bytes came = drain(peer);
    all.insert(all.end(), came.begin(), came.end());
    if (!more) return all;
    EXPECT_NE(connection.flush(), Status::failed);
  }
  ADD_FAILURE() << "it always wants to write";
  return all;
}

TEST(WebSocketConnection, PingsAreAnsweredThoughThePeerTakesNothing) {
  const RawClient raw;
  fill(*raw.server, packet(50));
  Bytes in;
  for (int i = 0; i < 1000; ++i) {
    put(raw.peer(), from_hex(frame("89", to_hex(Bytes{static_cast<std::byte>(i >> 8), static_cast<std::byte>(i)}))));
    ASSERT_EQ(read_all(*raw.server, in), Status::blocked);
  }
  Bytes out = drain_flushed(*raw.server, raw.peer());
  wire::FrameReader reader(wire::WebSocketRole::client, limits);
  std::span<const std::byte> input = out;
  std::byte* to = out.data();
  int pongs = 0;
  std::string last;
  for (auto event = reader.read(input, to); event != wire::FrameReader::Event::need_more;
       event = reader.read(input, to)) {
    ASSERT_EQ(event, wire::FrameReader::Event::pong) << reader.error().message();
    ++pongs;
    last = to_hex(reader.control_payload());
  }
  EXPECT_FALSE(reader.has_partial());
  EXPECT_EQ(last, "03e7") << "the latest";
  EXPECT_LT(pongs, 1000) << "and not all were kept";
  EXPECT_EQ((to - out.data()) % 66, 0) << "between the frames";
}

TEST(WebSocketConnection, APingInsideAFrameThatIsBeingSentIsAnsweredBehindIt) {
  const RawClient raw;
  const Bytes one = packet(84);
  std::size_t taken = 0;
  ASSERT_EQ(write(*raw.server, Bytes(one.begin(), one.begin() + 50), taken), Status::done);
  ASSERT_EQ(taken, 50U);
  put(raw.peer(), from_hex(frame("89", "aa") + frame("89", "bbcc")));
  Bytes in;
  EXPECT_EQ(read_all(*raw.server, in), Status::blocked);
  EXPECT_FALSE(raw.server->wants_write()) << "no flush could write it";
  ASSERT_EQ(write(*raw.server, Bytes(one.begin() + 50, one.end()), taken), Status::done);
  EXPECT_EQ(to_hex(drain(raw.peer())), "8264" + to_hex(one) + "8a02bbcc");
}

TEST(WebSocketConnection, APeerThatAnswersPingsIsAlive) {
  const RawClient raw({.ping_interval = 30s, .max_missed_pings = 2});
  protocol::TimePoint now{};
  EXPECT_LT(raw.server->keep_alive_due(), now);
  EXPECT_EQ(raw.server->keep_alive(now), Status::done);
  EXPECT_TRUE(drain(raw.peer()).empty());
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(raw.server->keep_alive_due(), now + 30s);
    EXPECT_EQ(raw.server->keep_alive(now + 29s), Status::done);
    EXPECT_TRUE(drain(raw.peer()).empty());
    now += 30s;
    EXPECT_EQ(raw.server->keep_alive(now), Status::done);
    EXPECT_EQ(to_hex(drain(raw.peer())), "8900");
    put(raw.peer(), from_hex(frame("8a", "")));
    Bytes in;
    EXPECT_EQ(read_all(*raw.server, in), Status::blocked);
  }
  // Nothing from here on: the ping of the next interval, and two that are missed.
  for (int i = 0; i < 2; ++i) EXPECT_EQ(raw.server->keep_alive(now += 30s), Status::done) << i;
  EXPECT_EQ(raw.server->keep_alive(now += 30s), Status::failed);
  EXPECT_EQ(raw.server->error().code, Errc::idle_timeout);
  EXPECT_EQ(raw.server->error().text, "WebSocket: nothing came after 2 pings, one every 30000 ms");
}

TEST(WebSocketConnection, WithoutAnIntervalThereAreNoPings) {
  const RawClient raw({.ping_interval = 0s});
  EXPECT_EQ(raw.server->keep_alive_due(), protocol::TimePoint::max());
  EXPECT_EQ(raw.server->keep_alive(protocol::TimePoint{} + 1h), Status::done);
  EXPECT_TRUE(drain(raw.peer()).empty());
}

// --- close

TEST(WebSocketConnection, ThePeersCloseIsAnsweredBehindWhatIsOwed) {
  const RawClient raw;
  put(raw.peer(), from_hex(frame("82", to_hex(packet(3))) + frame("88", "03e962796521")));
  Bytes in;
  EXPECT_EQ(read_all(*raw.server, in), Status::ended);
  EXPECT_EQ(to_hex(in), to_hex(packet(3))) << "what came before it";
  EXPECT_EQ(raw.server->peer_close_code(), 1001);
  EXPECT_EQ(raw.server->peer_close_text(), "bye!");
  EXPECT_EQ(raw.server->end_reason().code, Errc::closed_by_peer);
  EXPECT_EQ(raw.server->end_reason().text, "closed by peer, WebSocket code 1001: bye!");
  EXPECT_TRUE(drain(raw.peer()).empty());
  write_whole(*raw.server, packet(5));
  EXPECT_EQ(raw.server->shut_down(raw.server->end_reason()), Status::done);
  EXPECT_FALSE(raw.server->awaits_peers_end());
  EXPECT_EQ(to_hex(drain(raw.peer())), "8215" + to_hex(packet(5)) + "880203e9");
  EXPECT_EQ(raw.server->shut_down(raw.server->end_reason()), Status::done);
  EXPECT_TRUE(drain(raw.peer()).empty()) << "once";
}

TEST(WebSocketConnection, ACloseThatCameWithAPacketIsStillToBeRead) {
  const RawClient raw;
  put(raw.peer(), from_hex(frame("82", to_hex(packet(3))) + frame("88", "")));
  Bytes buffer(read_size);
  std::size_t count = 0;
  EXPECT_EQ(raw.server->read(buffer, count), Status::done);
  EXPECT_TRUE(raw.server->has_input());
  EXPECT_EQ(raw.server->read(buffer, count), Status::ended);
  EXPECT_FALSE(raw.server->has_input());
  EXPECT_EQ(raw.server->end_reason().text, "closed by peer, WebSocket code none");
  EXPECT_EQ(raw.server->shut_down(Error(Errc::closed_by_peer)), Status::done);
  EXPECT_EQ(to_hex(drain(raw.peer())), "8800");
}

TEST(WebSocketConnection, ACloseThatCameAloneIsReadAtOnce) {
  const RawClient raw;
  put(raw.peer(), from_hex(frame("88", "03e8")));
  Bytes in;
  EXPECT_EQ(read_all(*raw.server, in), Status::ended);
  EXPECT_FALSE(raw.server->has_input());
}

TEST(WebSocketConnection, OurCloseIsAnsweredByThePeer) {
  const Pair pair;
  write_whole(*pair.server, packet(3));
  EXPECT_EQ(pair.server->shut_down(Error(Errc::stopping)), Status::done);
  EXPECT_TRUE(pair.server->awaits_peers_end());
  Bytes in;
  EXPECT_EQ(read_all(*pair.client, in), Status::ended);
  EXPECT_EQ(to_hex(in), to_hex(packet(3)));
  EXPECT_EQ(pair.client->end_reason().text, "closed by peer, WebSocket code 1001: stopping");
  write_whole(*pair.client, packet(4));
  EXPECT_EQ(pair.client->shut_down(Error(Errc::closed_by_peer)), Status::done);
  EXPECT_FALSE(pair.client->awaits_peers_end());
  in.clear();
  EXPECT_EQ(read_all(*pair.server, in), Status::ended);
  EXPECT_EQ(to_hex(in), to_hex(packet(4)));
  EXPECT_EQ(pair.server->peer_close_code(), 1001) << "an answer repeats the code";
}

TEST(WebSocketConnection, TheReasonHasItsCode) {
  struct Reason {
    Error error;
    std::string payload;
  };
  const auto close = [](int code, std::string_view text) {
    return to_hex(Bytes{static_cast<std::byte>(code >> 8), static_cast<std::byte>(code)}) + to_hex(bytes_of(text));
  };
  const std::vector<Reason> reasons = {
      {Error(), close(1000, "")},
      {Error(Errc::closed_by_user), close(1000, "")},
      {Error(Errc::closed_by_user, "had enough"), close(1000, "had enough")},
      {Error(Errc::stopping), close(1001, "stopping")},
      {Error(Errc::drain_expired), close(1001, "cut at the end of the drain time")},
      {Error(Errc::bad_version, "version is 7, must be 1"), close(1002, "version is 7, must be 1")},
      {Error(Errc::decompression_failed, "x"), close(1002, "x")},
      {Error(Errc::payload_too_large, "payload_len is 9"), close(1009, "payload_len is 9")},
      {Error(Errc::extension_too_large, "x"), close(1009, "x")},
      {Error(Errc::decompressed_too_large, "x"), close(1009, "x")},
      {Error(Errc::idle_timeout), close(1008, "idle for too long")},
      {Error(Errc::first_packet_timeout), close(1008, "no first packet in time")},
      {Error(Errc::slow_consumer, "x"), close(1008, "x")},
      {Error(Errc::refused), close(1008, "refused")},
      {Error(Errc::too_many_sessions), close(1013, "too many sessions")},
      {Error(Errc::rate_limited), close(1013, "over the rate limit")},
      {Error(Errc::admission_timeout), close(1008, "not admitted in time")},
      {Error(Errc::handler_failed, "a secret"), close(1011, "handler failed")},
      {Error(make_error_code(boost::system::errc::not_enough_memory), "a secret"), close(1011, "")},
  };
  for (const Reason& reason : reasons) {
    const RawClient raw;
    EXPECT_EQ(raw.server->shut_down(reason.error), Status::done);
    const std::string sent = to_hex(drain(raw.peer()));
    ASSERT_GE(sent.size(), 8U);
    EXPECT_EQ(sent.substr(0, 2), "88");
    EXPECT_EQ(sent.substr(4), reason.payload) << reason.error.message();
  }
}

TEST(WebSocketConnection, ACloseWaitsBehindWhatAFullSocketDidNotTake) {
  const RawClient raw;
  fill(*raw.server, packet(50));
  EXPECT_EQ(raw.server->shut_down(Error(Errc::closed_by_user)), Status::blocked);
  EXPECT_EQ(raw.server->shut_down(Error(Errc::closed_by_user)), Status::blocked);
  const Bytes out = drain_flushed(*raw.server, raw.peer());
  EXPECT_EQ(raw.server->shut_down(Error(Errc::closed_by_user)), Status::done);
  EXPECT_EQ(to_hex(std::span(out).last(4)), "880203e8");
  EXPECT_EQ(out.size() % 68, 4U);
  EXPECT_TRUE(drain(raw.peer()).empty());
}

TEST(WebSocketConnection, AConnectionThatEndsWithoutACloseIsBroken) {
  for (const bool inside : {false, true}) {
    Pair pair;
    if (inside) put(pair.sockets[0], from_hex("8210010203"));
    pair.sockets.close(0);
    Bytes in;
    EXPECT_EQ(read_all(*pair.client, in), Status::failed);
    EXPECT_EQ(pair.client->error().code, Errc::truncated);
    EXPECT_EQ(pair.client->error().text, std::string("WebSocket: the connection ended without a Close frame") +
                                             (inside ? ", inside a message" : ""));
  }
}

TEST(WebSocketConnection, BehindOurCloseTheEndOfTheConnectionIsAnAnswerToo) {
  Pair pair;
  EXPECT_EQ(pair.client->shut_down(Error(Errc::closed_by_user)), Status::done);
  drain(pair.sockets[0]);  // else the system reports a reset
  pair.sockets.close(0);
  Bytes in;
  EXPECT_EQ(read_all(*pair.client, in), Status::ended);
  EXPECT_EQ(pair.client->end_reason().message(), "closed by peer");
}

TEST(WebSocketConnection, InsideAFrameNoCloseCanBeSent) {
  const RawClient raw;
  const Bytes one = packet(84);
  std::size_t taken = 0;
  ASSERT_EQ(write(*raw.server, Bytes(one.begin(), one.begin() + 50), taken), Status::done);
  EXPECT_EQ(raw.server->shut_down(Error(Errc::stopping)), Status::done);
  EXPECT_FALSE(raw.server->awaits_peers_end()) << "the end of the socket is all the peer will see";
  EXPECT_EQ(drain(raw.peer()).size(), 52U);
}

TEST(WebSocketConnection, AFaultIsToldThePeerWithItsCode) {
  struct Fault {
    const char* name;
    std::string bytes;
    int code;
    Errc error;
    std::string text;
  };
  const wire::Limits small{.max_payload = 1000, .max_extension = 100, .max_decompressed = 1000};
  const std::string good = to_hex(packet(0));
  const std::vector<Fault> faults = {
      {"text", frame("81", "61"), 1003, Errc::websocket_violation, "WebSocket message is text, must be binary"},
      {"reserved", frame("c2", good), 1002, Errc::websocket_violation, "WebSocket frame: reserved bits are 4"},
      {"not masked", "8210" + good, 1002, Errc::websocket_violation, "WebSocket frame: not masked"},
      {"too long", "82ff0000000100000000", 1009, Errc::payload_too_large, "WebSocket message has 0 + 4294967296 bytes"},
      {"no UTF-8", frame("88", "03e8ff"), 1007, Errc::websocket_violation, "WebSocket frame: Close frame's text"},
      {"bad code", frame("88", "03ed"), 1002, Errc::websocket_violation, "WebSocket frame: Close frame's code is 1005"},
      {"two packets", frame("82", good + good), 1002, Errc::websocket_violation,
       "WebSocket message is 32 bytes long, its packet is 16"},
      {"payload_len", frame("82", good.substr(0, 20) + "00100000" + good.substr(28)), 1009, Errc::payload_too_large,
       "payload_len is 1048576, over the limit of 1000 bytes"},
  };
  for (const Fault& fault : faults) {
    SCOPED_TRACE(fault.name);
    const RawClient raw({}, small);
    // A length of 64 bits has its mask key still to come.
    put(raw.peer(), from_hex(frame("82", good) + fault.bytes + "00000000" + std::string(2000, '0')));
    Bytes in;
    ASSERT_EQ(read_all(*raw.server, in), Status::failed);
    EXPECT_EQ(to_hex(in), good) << "what came before it";
    EXPECT_EQ(raw.server->error().code, fault.error);
    EXPECT_TRUE(raw.server->error().text.starts_with(fault.text)) << raw.server->error().text;
    const std::string sent = text_of(drain(raw.peer()));
    ASSERT_GE(sent.size(), 4U);
    EXPECT_EQ(to_hex(bytes_of(sent.substr(0, 1))), "88");
    EXPECT_EQ(static_cast<unsigned char>(sent[2]) * 256 + static_cast<unsigned char>(sent[3]), fault.code);
    EXPECT_TRUE(sent.substr(4).starts_with(fault.text)) << sent.substr(4);
    EXPECT_TRUE(at_end(raw.peer()));
  }
}

TEST(WebSocketConnection, AReadErrorIsTheSystems) {
  Sockets sockets;
  const auto server = make_server(-1);
  EXPECT_EQ(server->handshake(), Status::failed);
  EXPECT_EQ(server->error().code, boost::system::errc::bad_file_descriptor);
  EXPECT_TRUE(server->error().text.starts_with("WebSocket: read: ")) << server->error().text;
}

TEST(WebSocketConnection, AWriteToAPeerThatIsGoneFails) {
  Pair pair;
  pair.sockets.close(1);
  std::size_t taken = 0;
  EXPECT_EQ(write(*pair.server, packet(3), taken), Status::failed);
  EXPECT_EQ(pair.server->error().code, boost::system::errc::broken_pipe);
}

// --- above another connection

/// Plain bytes, as TLS would carry them; takes and gives few at a time.
class Plain final : public Connection {
 public:
  Plain(int socket, std::string& log) : socket_(socket), log_(&log) {}

  [[nodiscard]] std::string describe_handshake() const override { return "agreeing below"; }
  Status handshake() override {
    log_->append("handshake ");
    return std::exchange(agreed_, true) ? Status::done : Status::blocked;
  }
  Status read(std::span<std::byte> into, std::size_t& count) override {
    count = 0;
    const ssize_t result = ::recv(socket_, into.data(), std::min<std::size_t>(into.size(), 100), 0);
    if (result == 0) return Status::ended;
    if (result < 0) return errno == EAGAIN ? Status::blocked : fail(Error(Errc::connection_lost, "below"));
    count = static_cast<std::size_t>(result);
    return Status::done;
  }
  [[nodiscard]] bool has_input() const noexcept override { return false; }
  Status write(std::span<const iovec> pieces, std::size_t& taken) override {
    taken = 0;
    for (const iovec& piece : pieces) {
      const std::size_t size = std::min<std::size_t>(piece.iov_len, 1000);
      const ssize_t result = ::send(socket_, piece.iov_base, size, MSG_NOSIGNAL);
      if (result < 0) return errno == EAGAIN ? Status::blocked : fail(Error(Errc::connection_lost, "below"));
      taken += size;
      if (size < piece.iov_len) return Status::blocked;
    }
    return Status::done;
  }
  Status flush() override { return Status::done; }
  [[nodiscard]] bool wants_write() const noexcept override { return false; }
  Status shut_down(const Error&) override {
    log_->append("shut_down ");
    return Status::done;
  }
  [[nodiscard]] bool awaits_peers_end() const noexcept override { return false; }

 private:
  int socket_;
  bool agreed_ = false;
  std::string* log_;
};

TEST(WebSocketConnection, ItLiesAboveAnotherConnection) {
  Sockets sockets;
  std::string server_log;
  std::string client_log;
  const auto server = make_server(std::make_unique<Plain>(sockets[0], server_log));
  const auto client = make_client(std::make_unique<Plain>(sockets[1], client_log));
  Status served = Status::blocked;
  Status asked = Status::blocked;
  EXPECT_EQ(server->handshake(), Status::blocked);
  EXPECT_EQ(server->describe_handshake(), "agreeing below");
  for (int i = 0; i < 100 && (served == Status::blocked || asked == Status::blocked); ++i) {
    if (served == Status::blocked) served = server->handshake();
    if (asked == Status::blocked) asked = client->handshake();
  }
  ASSERT_EQ(served, Status::done);
  ASSERT_EQ(asked, Status::done);
  EXPECT_EQ(client_log, "handshake handshake ");

  const auto stream = random_stream(50, 50, 40'000, 7);
  Bytes in;
  for (std::size_t at = 0; at < stream.bytes.size() || server->wants_write();) {
    std::size_t taken = 0;
    ASSERT_NE(write(*server, Bytes(stream.bytes.begin() + static_cast<std::ptrdiff_t>(at), stream.bytes.end()), taken),
              Status::failed);
    at += taken;
    ASSERT_NE(server->flush(), Status::failed);
    ASSERT_EQ(read_all(*client, in), Status::blocked);
  }
  EXPECT_TRUE(in == stream.bytes);

  server_log.clear();
  client_log.clear();
  EXPECT_EQ(server->shut_down(Error(Errc::stopping)), Status::done);
  EXPECT_EQ(server_log, "") << "the other one goes on until the peer has answered";
  EXPECT_EQ(read_all(*client, in), Status::ended);
  EXPECT_EQ(client->shut_down(client->end_reason()), Status::done);
  EXPECT_EQ(client_log, "shut_down ");
  EXPECT_EQ(read_all(*server, in), Status::ended);
  EXPECT_EQ(server_log, "shut_down ");
}

TEST(WebSocketConnection, AFailureBelowIsItsOwn) {
  std::string log;
  const auto server = make_server(std::make_unique<Plain>(-1, log));
  EXPECT_EQ(server->handshake(), Status::blocked);
  EXPECT_EQ(server->handshake(), Status::failed);
  EXPECT_EQ(server->error().text, "below");
}

// --- permessage-deflate (RFC 7692)

/// What a server that compresses with so many bits answers to that header: its agreement, "-", or "malformed".
std::string accepted_of(std::string_view offers, int window_bits = 15) {
  const auto extensions = ExtensionList::read(offers);
  if (!extensions) return "malformed";
  const auto agreed = accept_deflate(*extensions, window_bits);
  if (!agreed) return "-";
  constexpr std::string_view always = "permessage-deflate; server_no_context_takeover; client_no_context_takeover";
  EXPECT_TRUE(agreed->answer.starts_with(always)) << agreed->answer;
  return std::to_string(agreed->window_bits) + agreed->answer.substr(always.size());
}

TEST(WebSocketDeflate, TheFirstOfferThatIsRightIsTaken) {
  struct Offer {
    const char* header;
    const char* accepted;
    int window_bits = 15;
  };
  const std::vector<Offer> offers = {
      {"permessage-deflate", "15"},
      {"permessage-deflate", "10", 10},
      {"permessage-deflate; client_max_window_bits", "15"},
      {"permessage-deflate; client_max_window_bits=10", "15"},
      {"permessage-deflate;client_max_window_bits=\"10\"", "15"},
      {"permessage-deflate ; server_no_context_takeover ; client_no_context_takeover", "15"},
      {"permessage-deflate; server_max_window_bits=12", "12; server_max_window_bits=12"},
      {"permessage-deflate; server_max_window_bits=\"12\"", "12; server_max_window_bits=12"},
      {"permessage-deflate; server_max_window_bits=\"1\\2\"", "12; server_max_window_bits=12"},
      {"permessage-deflate; server_max_window_bits=12", "9; server_max_window_bits=9", 9},
      {"permessage-deflate; server_max_window_bits=15", "15; server_max_window_bits=15"},
      {"permessage-deflate; server_max_window_bits=8", "8; server_max_window_bits=8"},
      {"permessage-deflate; client_max_window_bits; server_max_window_bits=9", "9; server_max_window_bits=9"},
      // none, or others
      {"x-webkit-deflate-frame", "-"},
      {"Permessage-Deflate", "-"},
      {"permessage-bzip2; permessage-deflate", "-"},
      {"x-other; a=b; c=\"d\", permessage-deflate", "15"},
      {", permessage-deflate ,", "15"},
      {"\tpermessage-deflate\t", "15"},
      // unknown, twice, or with a wrong value
      {"permessage-deflate; max_window_bits=10", "-"},
      {"permessage-deflate; Server_no_context_takeover", "-"},
      {"permessage-deflate; server_no_context_takeover; server_no_context_takeover", "-"},
      {"permessage-deflate; client_no_context_takeover; client_no_context_takeover", "-"},
      {"permessage-deflate; client_max_window_bits; client_max_window_bits=10", "-"},
      {"permessage-deflate; server_max_window_bits=10; server_max_window_bits=10", "-"},
      {"permessage-deflate; server_no_context_takeover=1", "-"},
      {"permessage-deflate; client_no_context_takeover=true", "-"},
      {"permessage-deflate; server_max_window_bits", "-"},
      {"permessage-deflate; server_max_window_bits=7", "-"},
      {"permessage-deflate; server_max_window_bits=16", "-"},
      {"permessage-deflate; server_max_window_bits=010", "-"},
      {"permessage-deflate; server_max_window_bits=+9", "-"},
      {"permessage-deflate; server_max_window_bits=1e1", "-"},
      {"permessage-deflate; client_max_window_bits=7", "-"},
      {"permessage-deflate; client_max_window_bits=16", "-"},
      {"permessage-deflate; client_max_window_bits=4294967305", "-"},
      // several
      {"permessage-deflate; server_max_window_bits=10, permessage-deflate", "10; server_max_window_bits=10"},
      {"permessage-deflate; server_max_window_bits=7, permessage-deflate; server_max_window_bits=11",
       "11; server_max_window_bits=11"},
      {"permessage-deflate; x, permessage-deflate; y", "-"},
      // no list of extensions
      {"", "malformed"},
      {",", "malformed"},
      {"permessage-deflate;", "malformed"},
      {"permessage-deflate; ;", "malformed"},
      {"permessage-deflate; a=", "malformed"},
      {"permessage-deflate; a=b=c", "malformed"},
      {"permessage-deflate; a=\"", "malformed"},
      {"permessage-deflate; a=\"b", "malformed"},
      {"permessage-deflate; a=\"\"", "malformed"},
      {"permessage-deflate; a=\"b c\"", "malformed"},
      {"permessage-deflate; a=\"b\\", "malformed"},
      {"permessage-deflate a", "malformed"},
      {"permessage deflate", "malformed"},
      {"=a", "malformed"},
      {"\"permessage-deflate\"", "malformed"},
      {"permessage-deflate, @", "malformed"},
  };
  for (const Offer& offer : offers)
    EXPECT_EQ(accepted_of(offer.header, offer.window_bits), offer.accepted) << offer.header;
}

TEST(WebSocketDeflate, AClientTakesOnlyAnAnswerToItsOffer) {
  struct Answer {
    const char* header;
    int bits;
    const char* problem = "";
    int window_bits = 15;
  };
  const std::vector<Answer> answers = {
      {"permessage-deflate; server_no_context_takeover", 15},
      {"permessage-deflate; server_no_context_takeover; client_no_context_takeover", 15},
      {"permessage-deflate; server_no_context_takeover; client_max_window_bits=15", 15},
      {"permessage-deflate; server_no_context_takeover; client_max_window_bits=9", 9},
      {"permessage-deflate; server_no_context_takeover; client_max_window_bits=8", 8},
      {"permessage-deflate; server_no_context_takeover; client_max_window_bits=10", 10, "", 10},
      {"permessage-deflate; server_no_context_takeover; server_max_window_bits=10", 15},
      {"permessage-deflate; server_no_context_takeover", 11, "", 11},
      {"permessage-deflate", 0, "without server_no_context_takeover, which the offer demands"},
      {"permessage-deflate; client_no_context_takeover", 0,
       "without server_no_context_takeover, which the offer demands"},
      {"permessage-deflate; server_no_context_takeover; client_max_window_bits=11", 0,
       "with more client_max_window_bits than the 10 offered", 10},
      {"permessage-deflate; server_no_context_takeover; client_max_window_bits", 0,
       "with more client_max_window_bits than the 15 offered"},
      {"permessage-deflate; server_no_context_takeover; client_max_window_bits=16", 0,
       "which has client_max_window_bits = 16"},
      {"permessage-deflate; server_no_context_takeover; server_max_window_bits", 0,
       "which has server_max_window_bits without a value"},
      {"permessage-deflate; server_no_context_takeover=1", 0, "which has server_no_context_takeover = 1"},
      {"permessage-deflate; server_no_context_takeover; server_no_context_takeover", 0,
       "which has server_no_context_takeover twice"},
      {"permessage-deflate; server_no_context_takeover; level=9", 0, "which has the unknown parameter level"},
      {"x-webkit-deflate-frame", 0, "which was not offered"},
      {"permessage-deflate; server_no_context_takeover, permessage-deflate", 0, "which was not offered"},
  };
  for (const Answer& answer : answers) {
    std::string problem;
    const auto extensions = ExtensionList::read(answer.header);
    ASSERT_TRUE(extensions) << answer.header;
    EXPECT_EQ(check_deflate_answer(*extensions, answer.window_bits, problem), answer.bits) << answer.header;
    EXPECT_EQ(problem, answer.problem) << answer.header;
  }
}

constexpr std::string_view agreed_lines =
    "\r\nSec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover\r\n";

TEST(WebSocketDeflate, AClientOffersWhatItsOptionsSay) {
  const auto offer = [](WebSocketDeflateOptions options) {
    Sockets sockets;
    const auto client = make_client(sockets[1], {.deflate = options});
    EXPECT_EQ(client->handshake(), Status::blocked);
    const std::string text = text_of(drain(sockets[0]));
    const std::size_t at = text.find("Sec-WebSocket-Extensions: ");
    return at == std::string::npos ? text : text.substr(at, text.find("\r\n", at) - at);
  };
  EXPECT_EQ(offer({}),
            "Sec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; client_no_context_takeover; "
            "client_max_window_bits");
  EXPECT_TRUE(offer({.window_bits = 9}).ends_with("; client_max_window_bits=9"));
}

TEST(WebSocketDeflate, ItIsAgreedOnOnlyWhereBothWantIt) {
  const WebSocketServerOptions server{.deflate = WebSocketDeflateOptions{}};
  const WebSocketClientOptions client{.deflate = WebSocketDeflateOptions{}};
  const auto agreed = [](const Pair& pair) {
    EXPECT_EQ(pair.server->deflates(), pair.client->deflates());
    return pair.server->deflates();
  };
  EXPECT_TRUE(agreed(Pair(server, client)));
  EXPECT_FALSE(agreed(Pair(server, {})));
  EXPECT_FALSE(agreed(Pair({}, client)));
  EXPECT_FALSE(agreed(Pair({}, {})));
}

/// The answer to a request with such a header, or several.
std::string answer_to(const std::string& lines, Status expected = Status::done, std::string* error = nullptr) {
  Sockets sockets;
  const auto server = make_server(sockets[0], {.deflate = WebSocketDeflateOptions{}});
  put(sockets[1], changed("\r\n\r\n", "\r\n" + lines + "\r\n"));
  EXPECT_EQ(server->handshake(), expected) << server->error().message();
  if (error != nullptr) *error = server->error().text;
  return text_of(drain(sockets[1]));
}

TEST(WebSocketDeflate, TheOffersMayBeOnSeveralLines) {
  EXPECT_NE(
      answer_to("Sec-WebSocket-Extensions: a\r\nSec-WebSocket-Extensions: permessage-deflate\r\n").find(agreed_lines),
      std::string::npos);
  EXPECT_EQ(answer_to("Sec-WebSocket-Extensions: permessage-deflate; x\r\n"), accepted) << "it goes on without";
  EXPECT_EQ(answer_to(""), accepted);
}

TEST(WebSocketDeflate, WhatIsNoListOfExtensionsIsRefused) {
  std::string error;
  const std::string answer = answer_to("Sec-WebSocket-Extensions: permessage-deflate; =\r\n", Status::failed, &error);
  EXPECT_TRUE(answer.starts_with("HTTP/1.1 400 Bad Request\r\n")) << answer;
  EXPECT_EQ(error,
            "WebSocket handshake: Sec-WebSocket-Extensions is \"permessage-deflate; =\", which is no such list "
            "(answered with 400)");
}

TEST(WebSocketDeflate, AnAnswerThatWasNotOfferedFailsTheHandshake) {
  const auto ask = [](const std::string& extensions) {
    Sockets sockets;
    const auto server = make_server(sockets[0], {.subprotocol = ""});
    Sockets other;
    const auto client = make_client(other[1], {.deflate = WebSocketDeflateOptions{}});
    EXPECT_EQ(client->handshake(), Status::blocked);
    put(sockets[1], drain(other[0]));
    EXPECT_EQ(server->handshake(), Status::done);
    std::string answer = text_of(drain(sockets[1]));
    answer.insert(answer.size() - 2, "Sec-WebSocket-Extensions: " + extensions + "\r\n");
    put(other[0], answer);
    const Status status = client->handshake();
    EXPECT_EQ(status, client->error() ? Status::failed : Status::done);
    return client->error().text;
  };
  EXPECT_EQ(ask("permessage-deflate; server_no_context_takeover; client_max_window_bits=9"), "");
  EXPECT_EQ(ask("permessage-deflate"),
            "WebSocket handshake: the server chose the extension \"permessage-deflate\", without "
            "server_no_context_takeover, which the offer demands");
  EXPECT_EQ(ask("x-other"), "WebSocket handshake: the server chose the extension \"x-other\", which was not offered");
  EXPECT_EQ(ask("permessage-deflate;;"),
            "WebSocket handshake: the server chose the extension \"permessage-deflate;;\", which is no list of "
            "extensions");
}

std::string first_byte(const Bytes& bytes) {
  return to_hex(bytes).substr(0, 2);
}

/// A packet that gets much smaller.
Bytes wordy(std::size_t payload, std::uint32_t seed = 1) {
  Bytes bytes = packet(payload, seed);
  for (std::size_t i = wire::header_size + 16; i < bytes.size(); ++i) bytes[i] = bytes[i - 7];
  return bytes;
}

/// Both ends want it, with these options.
Pair deflating(WebSocketDeflateOptions server = {}, WebSocketDeflateOptions client = {}, int type = SOCK_STREAM) {
  return Pair({.deflate = server}, {.deflate = client}, type);
}

/// A server that does, and a raw peer.
struct RawDeflating {
  explicit RawDeflating(WebSocketDeflateOptions options = {}, const wire::Limits& its = limits,
                        const std::string& parameters = "")
      : server(make_server(sockets[0], {.deflate = options}, its)) {
    put(sockets[1], changed("\r\n\r\n", "\r\nSec-WebSocket-Extensions: permessage-deflate" + parameters + "\r\n\r\n"));
    EXPECT_EQ(server->handshake(), Status::done) << server->error().message();
    EXPECT_NE(text_of(drain(sockets[1])).find("permessage-deflate"), std::string::npos);
  }
  [[nodiscard]] int peer() const { return sockets[1]; }
  /// What the server sends for these packets, as far as the socket takes it.
  Bytes sent_for(const Bytes& packets) {
    std::size_t taken = 0;
    EXPECT_NE(write(*server, packets, taken), Status::failed);
    return drain(peer());
  }

  Sockets sockets;
  std::unique_ptr<WebSocketConnection> server;
};

TEST(WebSocketDeflate, PacketsCutAnywherePassTinySocketBuffers) {
  for (std::uint32_t seed = 0; seed < 24; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const WebSocketDeflateOptions options{.threshold = seed % 4 == 0 ? 0U : 200U,
                                          .window_bits = seed % 5 == 0 ? 9 : 15};
    Pair pair = deflating(options, options);
    pair.sockets.shrink();
    Bytes stream;
    for (int i = 0; i < 60; ++i) {
      const std::size_t most = seed % 3 == 0 && i % 8 == 0 ? 700'000 : 4000;
      const Bytes one = random() % 3 == 0 ? packet(random() % most, seed) : wordy(random() % most, seed);
      stream.insert(stream.end(), one.begin(), one.end());
    }
    Connection& from = seed % 2 == 0 ? static_cast<Connection&>(*pair.server) : *pair.client;
    Connection& to = seed % 2 == 0 ? static_cast<Connection&>(*pair.client) : *pair.server;
    Bytes in;
    std::size_t at = 0;
    for (int round = 0; at < stream.size() || from.wants_write(); ++round) {
      ASSERT_LT(round, 1'000'000);
      std::vector<iovec> pieces;
      std::size_t offered = 0;
      const std::size_t count = random() % 20;
      for (std::size_t i = 0; i < count && at + offered < stream.size(); ++i) {
        const std::size_t most = std::size_t{1} << (random() % 20);
        const std::size_t size = std::min(stream.size() - at - offered, random() % most);
        pieces.push_back({const_cast<std::byte*>(stream.data()) + at + offered, size});
        offered += size;
      }
      std::size_t taken = 0;
      const Status status = from.write(pieces, taken);
      ASSERT_LE(taken, offered);
      ASSERT_TRUE(status == Status::blocked || (status == Status::done && taken == offered)) << from.error().message();
      ASSERT_TRUE(status == Status::done || from.wants_write());
      at += taken;
      if (random() % 2 == 0) {
        ASSERT_EQ(read_all(to, in), Status::blocked) << to.error().message();
      }
      if (random() % 2 == 0) {
        ASSERT_NE(from.flush(), Status::failed);
      }
    }
    ASSERT_EQ(read_all(to, in), Status::blocked) << to.error().message();
    ASSERT_TRUE(in == stream);
    ASSERT_FALSE(to.has_input());
  }
}

TEST(WebSocketDeflate, OnlyWhatIsLargeAndGetsSmallerIsSentCompressed) {
  RawDeflating raw({.threshold = 400});
  const auto first = [&raw](const Bytes& one) { return first_byte(raw.sent_for(one)); };
  EXPECT_EQ(first(wordy(400 - 16)), "c2");
  EXPECT_EQ(first(wordy(399 - 16)), "82") << "below the threshold";
  EXPECT_EQ(first(packet(5000)), "82") << "noise";
  EXPECT_EQ(first(packet(100'000)), "82") << "much of it";
  Bytes packed = wordy(5000);
  packed[1] = static_cast<std::byte>(wire::Compression::zstd);
  EXPECT_EQ(first(packed), "82") << "compressed already";
  EXPECT_EQ(first(wordy(512 * 1024 - 16)), "c2");
  EXPECT_EQ(first(wordy(512 * 1024 - 15)), "82") << "too large";
}

TEST(WebSocketDeflate, APeerThatCanOnlyTakeASmallWindowGetsNothingCompressed) {
  RawDeflating raw({}, limits, "; server_max_window_bits=8");
  const Bytes one = wordy(5000);
  EXPECT_EQ(first_byte(raw.sent_for(one)), "82");
  put(raw.peer(), from_hex(frame("c2", deflated(one))));
  Bytes in;
  EXPECT_EQ(read_all(*raw.server, in), Status::blocked);
  EXPECT_TRUE(in == one) << "but may send it";
}

TEST(WebSocketDeflate, CompressedAndPlainPacketsLeaveInOrderAndInOneCall) {
  const Pair pair = deflating({}, {}, SOCK_SEQPACKET);  // what one call sends stays together
  Bytes all;
  for (std::uint32_t i = 0; i < 50; ++i) {
    for (const Bytes& one : {wordy(1000, i), packet(64, i), packet(600, i)})
      all.insert(all.end(), one.begin(), one.end());
  }
  for (Connection* from : {static_cast<Connection*>(pair.server.get()), static_cast<Connection*>(pair.client.get())}) {
    Connection& to = from == pair.server.get() ? static_cast<Connection&>(*pair.client) : *pair.server;
    write_whole(*from, all);
    Bytes in(2 * all.size());
    std::size_t count = 0;
    ASSERT_EQ(to.read(in, count), Status::done);
    in.resize(count);
    EXPECT_TRUE(in == all);
    in.resize(1);
    EXPECT_EQ(to.read(in, count), Status::blocked) << "it was one call";
  }
}

TEST(WebSocketDeflate, WithoutItNothingIsCompressedAndNothingIsTaken) {
  RawClient raw;
  std::size_t taken = 0;
  ASSERT_EQ(write(*raw.server, wordy(5000), taken), Status::done);
  EXPECT_EQ(first_byte(drain(raw.peer())), "82");
  put(raw.peer(), from_hex(frame("c2", deflated(wordy(100)))));
  Bytes in;
  EXPECT_EQ(read_all(*raw.server, in), Status::failed);
  EXPECT_EQ(raw.server->error().text, "WebSocket frame: reserved bits are 4, must be 0");
  EXPECT_EQ(to_hex(drain(raw.peer())).substr(4, 4), "03ea");
}

TEST(WebSocketDeflate, FragmentsAreInflatedAndAPingBetweenThemIsAnswered) {
  RawDeflating raw;
  const Bytes one = wordy(1000);
  const std::string hex = deflated(one);
  put(raw.peer(),
      from_hex(frame("42", hex.substr(0, 20)) + frame("89", "61") + frame("00", "") + frame("00", hex.substr(20, 10))));
  Bytes in;
  EXPECT_EQ(read_all(*raw.server, in), Status::blocked);
  EXPECT_EQ(to_hex(drain(raw.peer())), "8a0161") << "at once";
  put(raw.peer(), from_hex(frame("80", hex.substr(30)) + frame("82", to_hex(packet(3)))));
  EXPECT_EQ(read_all(*raw.server, in), Status::blocked);
  const Bytes last = packet(3);
  EXPECT_TRUE(std::equal(in.begin(), in.end() - static_cast<std::ptrdiff_t>(last.size()), one.begin(), one.end()));
  EXPECT_TRUE(std::equal(in.end() - static_cast<std::ptrdiff_t>(last.size()), in.end(), last.begin()));
}

TEST(WebSocketDeflate, AFaultIsToldThePeerWithItsCode) {
  const wire::Limits small{.max_payload = 1000, .max_extension = 0, .max_decompressed = 1000};
  Bytes large = wordy(1001);
  Bytes bomb = wordy(1000);
  bomb.resize(500'000);
  Bytes more = wordy(999);
  more.resize(more.size() + 1);
  struct Fault {
    const char* name;
    std::string bytes;
    int code;
    Errc error;
    std::string text;
  };
  const std::vector<Fault> faults = {
      {"corrupt", frame("c2", "06"), 1007, Errc::websocket_violation,
       "WebSocket message does not inflate: invalid block type"},
      {"cut", frame("c2", deflated(wordy(900)).substr(0, 60)), 1007, Errc::websocket_violation,
       "WebSocket message does not inflate: "},
      {"bomb", frame("c2", deflated(bomb)), 1009, Errc::payload_too_large,
       "WebSocket message inflates to more than the limit of 1016 bytes"},
      {"payload_len", frame("c2", deflated(large)), 1009, Errc::payload_too_large,
       "payload_len is 1001, over the limit of 1000 bytes"},
      {"two bytes more", frame("c2", deflated(more)), 1002, Errc::websocket_violation,
       "WebSocket message is more than 1015 bytes long, its packet is 1015"},
      {"control frame", frame("c9", ""), 1002, Errc::websocket_violation, "WebSocket frame: reserved bits are 4"},
      {"continuation", frame("02", to_hex(packet(0)).substr(0, 8)) + frame("c0", "00"), 1002, Errc::websocket_violation,
       "WebSocket frame: reserved bits are 4"},
      {"text", frame("c1", "f248cdc9c90700"), 1003, Errc::websocket_violation, "WebSocket message is text"},
  };
  const Bytes good = wordy(500);
  for (const Fault& fault : faults) {
    SCOPED_TRACE(fault.name);
    const RawDeflating raw({}, small);
    put(raw.peer(), from_hex(frame("c2", deflated(good)) + fault.bytes));
    Bytes in;
    ASSERT_EQ(read_all(*raw.server, in), Status::failed);
    ASSERT_GE(in.size(), good.size());
    EXPECT_TRUE(std::equal(good.begin(), good.end(), in.begin())) << "what came before it";
    EXPECT_LE(in.size(), good.size() + 1016) << "no more than the limit";
    EXPECT_EQ(raw.server->error().code, fault.error);
    EXPECT_TRUE(raw.server->error().text.starts_with(fault.text)) << raw.server->error().text;
    const std::string sent = text_of(drain(raw.peer()));
    ASSERT_GE(sent.size(), 4U);
    EXPECT_EQ(to_hex(bytes_of(sent.substr(0, 1))), "88");
    EXPECT_EQ(static_cast<unsigned char>(sent[2]) * 256 + static_cast<unsigned char>(sent[3]), fault.code);
    EXPECT_TRUE(at_end(raw.peer()));
  }
}

TEST(WebSocketDeflate, AReadGivesNoMoreThanThereIsRoomForAndKeepsTheRestAsItCame) {
  RawDeflating raw;
  Bytes all;
  std::string frames;
  for (std::uint32_t i = 0; i < 5; ++i) {
    const Bytes one = wordy(100'000, i);
    all.insert(all.end(), one.begin(), one.end());
    frames += frame("c2", deflated(one)) + frame("89", "61");
  }
  put(raw.peer(), from_hex(frames + frame("88", "03e8")));
  Bytes in;
  Bytes buffer(5000);
  std::size_t count = 0;
  for (Status status = Status::done; status == Status::done;) {
    status = raw.server->read(buffer, count);
    in.insert(in.end(), buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(count));
    ASSERT_TRUE(status == Status::ended || raw.server->has_input());
    ASSERT_EQ(status == Status::ended, in.size() == all.size() && count == 0);
  }
  EXPECT_TRUE(in == all);
  EXPECT_EQ(raw.server->peer_close_code(), 1000);
}

TEST(WebSocketDeflate, WhatIsLeftWhenAllInputIsTakenIsSaidToBeThere) {
  const Bytes one = wordy(1000);
  const std::string hex = deflated(one);
  std::size_t had_output = 0;
  for (std::size_t cut = 1; cut < hex.size() / 2; ++cut) {
    RawDeflating raw;
    put(raw.peer(), from_hex(frame("42", hex.substr(0, 2 * cut))));
    Bytes in;
    Bytes buffer(1);
    std::size_t count = 0;
    while (raw.server->read(buffer, count) == Status::done) {
      in.push_back(buffer.front());
      if (!raw.server->has_input()) break;
      ++had_output;
    }
    EXPECT_EQ(raw.server->read(buffer, count), Status::blocked) << "of a message cut at " << cut << " there is more";
    EXPECT_FALSE(raw.server->has_input());
    EXPECT_TRUE(std::equal(in.begin(), in.end(), one.begin()));
  }
  EXPECT_GT(had_output, 0U);
}

TEST(WebSocketDeflate, WhatHasNoRoomInABatchIsCompressedForTheNext) {
  RawDeflating raw;
  Bytes one = packet(4000);
  std::fill(one.begin() + 2000, one.end(), std::byte{0});
  Bytes all;
  for (int i = 0; i < 70; ++i) all.insert(all.end(), one.begin(), one.end());
  const Bytes sent = raw.sent_for(all);
  std::size_t frames = 0;
  for (std::size_t at = 0; at < sent.size(); ++frames) {
    ASSERT_EQ(to_hex(std::span(sent).subspan(at, 2)), "c27e") << frames;
    at += 4 + std::to_integer<std::size_t>(sent[at + 2]) * 256 + std::to_integer<std::size_t>(sent[at + 3]);
  }
  EXPECT_EQ(frames, 70U);
  EXPECT_GT(sent.size(), 2U * 65536);
}

std::size_t heap_in_use() {
  return ::mallinfo2().uordblks;
}

TEST(WebSocketDeflate, AnIdleSessionHoldsNothingForIt) {
  constexpr std::size_t count = 50;
  const Bytes one = wordy(5000);
  const std::string hex = deflated(one);
  const auto echo = [&one](const Pair& pair) {
    write_whole(*pair.client, one);
    Bytes in;
    EXPECT_EQ(read_all(*pair.server, in), Status::blocked);
    EXPECT_TRUE(in == one);
    write_whole(*pair.server, one);
    EXPECT_EQ(read_all(*pair.client, in), Status::blocked);
  };
  echo(deflating());  // the thread's streams
  std::vector<std::unique_ptr<Pair>> pairs;
  pairs.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    pairs.push_back(std::make_unique<Pair>(WebSocketServerOptions{.deflate = WebSocketDeflateOptions{}},
                                           WebSocketClientOptions{.deflate = WebSocketDeflateOptions{}}));
  }
  const std::size_t before = heap_in_use();
  for (const auto& pair : pairs) echo(*pair);
  const std::size_t idle = heap_in_use();
  EXPECT_LE(idle, before + count * 16);
  for (const auto& pair : pairs) put(pair->sockets[1], from_hex(frame("42", hex.substr(0, 100))));
  Bytes in;
  for (const auto& pair : pairs) EXPECT_EQ(read_all(*pair->server, in), Status::blocked);
  EXPECT_LE(heap_in_use(), idle + in.capacity() + count * 41 * 1024) << "in the middle of a message";
  pairs.clear();
}

TEST(WebSocketDeflate, AnInflaterLentOnOneThreadMayBeGivenBackOnAnother) {
  auto raw = std::make_unique<RawDeflating>();
  const Bytes one = wordy(1000);
  const std::string hex = deflated(one);
  Bytes in;
  for (const auto& part :
       {frame("42", hex.substr(0, 20)), frame("00", hex.substr(20, 20)), frame("80", hex.substr(40))}) {
    std::thread([&] {
      put(raw->peer(), from_hex(part));
      EXPECT_EQ(read_all(*raw->server, in), Status::blocked);
    }).join();
  }
  EXPECT_TRUE(in == one);
  put(raw->peer(), from_hex(frame("42", hex.substr(0, 20))));
  std::thread([&] { EXPECT_EQ(read_all(*raw->server, in), Status::blocked); }).join();
  raw.reset();
}

TEST(WebSocketDeflate, WithoutMemoryForACompressorPacketsAreSentAsTheyAre) {
  const Bytes one = wordy(1000);
  std::thread([&one] {  // which has no streams yet
    RawDeflating raw;
    raw.sent_for(packet(1));  // its buffer
    std::size_t taken = 0;
    Status status = Status::failed;
    {
      const test::AllocationFailure failure(0);
      status = write(*raw.server, one, taken);
    }
    EXPECT_EQ(status, Status::done);
    EXPECT_EQ(first_byte(drain(raw.peer())), "82");
    EXPECT_EQ(first_byte(raw.sent_for(one)), "c2");
  })
      .join();
}

TEST(WebSocketDeflate, AnotherConnectionMayLieBelow) {
  Sockets sockets;
  std::string log;
  const auto server = make_server(std::make_unique<Plain>(sockets[0], log), {.deflate = WebSocketDeflateOptions{}});
  const auto client = make_client(std::make_unique<Plain>(sockets[1], log), {.deflate = WebSocketDeflateOptions{}});
  Status served = Status::blocked;
  Status asked = Status::blocked;
  for (int i = 0; i < 100 && (served == Status::blocked || asked == Status::blocked); ++i) {
    if (served == Status::blocked) served = server->handshake();
    if (asked == Status::blocked) asked = client->handshake();
  }
  ASSERT_TRUE(server->deflates() && client->deflates());
  Bytes stream;
  for (std::uint32_t i = 0; i < 20; ++i) {
    for (const Bytes& one : {wordy(i * 2000, i), packet(i * 100, i)})
      stream.insert(stream.end(), one.begin(), one.end());
  }
  Bytes in;
  for (std::size_t at = 0; at < stream.size() || server->wants_write();) {
    std::size_t taken = 0;
    ASSERT_NE(write(*server, Bytes(stream.begin() + static_cast<std::ptrdiff_t>(at), stream.end()), taken),
              Status::failed);
    at += taken;
    ASSERT_NE(server->flush(), Status::failed);
    ASSERT_EQ(read_all(*client, in), Status::blocked) << client->error().message();
  }
  EXPECT_TRUE(in == stream);
}

// --- options

TEST(WebSocketOptions, DefaultsAreTheDocumentedOnesAndValid) {
  const WebSocketServerOptions server;
  EXPECT_EQ(server.subprotocol, "msgtrans");
  EXPECT_EQ(server.max_header, 8192U);
  EXPECT_EQ(server.ping_interval, 30s);
  EXPECT_EQ(server.max_missed_pings, 2U);
  EXPECT_FALSE(server.check_origin);
  EXPECT_FALSE(server.deflate);
  EXPECT_FALSE(validate(server)) << validate(server).message();
  const WebSocketClientOptions client;
  EXPECT_EQ(client.subprotocol, "msgtrans");
  EXPECT_EQ(client.max_header, 8192U);
  EXPECT_EQ(client.ping_interval, 30s);
  EXPECT_EQ(client.max_missed_pings, 2U);
  EXPECT_FALSE(client.deflate);
  constexpr WebSocketDeflateOptions deflate;
  EXPECT_EQ(deflate.threshold, 512U);
  EXPECT_EQ(deflate.level, 0);
  EXPECT_EQ(deflate.window_bits, 15);
  EXPECT_FALSE(validate(client)) << validate(client).message();
}

TEST(WebSocketOptions, OneOutOfItsRangeIsNamedWithItsValue) {
  const auto server = [](const std::function<void(WebSocketServerOptions&)>& set) {
    WebSocketServerOptions options;
    set(options);
    const Error error = validate(options);
    EXPECT_TRUE(!error || error.code == Errc::invalid_option);
    return error.text;
  };
  EXPECT_EQ(server([](auto& o) { o.subprotocol = "a,b"; }), "subprotocol is \"a,b\", must be empty or a token of HTTP");
  EXPECT_EQ(server([](auto& o) { o.subprotocol = ""; }), "");
  EXPECT_EQ(server([](auto& o) { o.max_header = 255; }), "max_header is 255, must be from 256 to 65536");
  EXPECT_EQ(server([](auto& o) { o.max_header = 65537; }), "max_header is 65537, must be from 256 to 65536");
  EXPECT_EQ(server([](auto& o) { o.max_header = 256; }), "");
  EXPECT_EQ(server([](auto& o) { o.max_header = 65536; }), "");
  EXPECT_EQ(server([](auto& o) { o.ping_interval = -1ms; }), "ping_interval is -1 ms, must be from 0 (off) to a year");
  EXPECT_EQ(server([](auto& o) { o.ping_interval = 0ms; }), "");
  EXPECT_EQ(server([](auto& o) { o.max_missed_pings = 0; }), "max_missed_pings is 0, must be from 1 to 1000");
  const auto server_deflate = [&](int level, int bits) {
    return server([=](auto& o) { o.deflate = {.level = level, .window_bits = bits}; });
  };
  EXPECT_EQ(server_deflate(0, 9), "");
  EXPECT_EQ(server_deflate(9, 15), "");
  EXPECT_EQ(server_deflate(-1, 15), "deflate.level is -1, must be from 1 to 9, or 0 for the default");
  EXPECT_EQ(server_deflate(10, 15), "deflate.level is 10, must be from 1 to 9, or 0 for the default");
  EXPECT_EQ(server_deflate(0, 8), "deflate.window_bits is 8, must be from 9 to 15");
  EXPECT_EQ(server_deflate(0, 16), "deflate.window_bits is 16, must be from 9 to 15");
  EXPECT_EQ(server([](auto& o) { o.max_missed_pings = 1001; }), "max_missed_pings is 1001, must be from 1 to 1000");

  const auto client = [](const std::function<void(WebSocketClientOptions&)>& set) {
    WebSocketClientOptions options;
    set(options);
    return validate(options).text;
  };
  EXPECT_EQ(client([](auto& o) { o.origin = "a\r\nb"; }), "origin is \"a??b\", must be one line");
  EXPECT_EQ(client([](auto& o) {
              o.headers = {{"a b", "c"}};
            }),
            "headers has the name \"a b\", must be a token of HTTP");
  EXPECT_EQ(client([](auto& o) {
              o.headers = {{"a", "b\r\nc"}};
            }),
            "headers has the value \"b??c\" of a, must be one line");
  EXPECT_EQ(client([](auto& o) { o.headers = {{"host", "x"}}; }), "headers has host, which is the handshake's own");
  EXPECT_EQ(client([](auto& o) { o.headers = {{"Cookie", "a=b"}}; }), "");
  EXPECT_EQ(client([](auto& o) { o.subprotocol = "a b"; }), "subprotocol is \"a b\", must be empty or a token of HTTP");
  EXPECT_EQ(client([](auto& o) { o.max_header = 1; }), "max_header is 1, must be from 256 to 65536");
  EXPECT_EQ(client([](auto& o) { o.ping_interval = -1ms; }), "ping_interval is -1 ms, must be from 0 (off) to a year");
  EXPECT_EQ(client([](auto& o) { o.max_missed_pings = 0; }), "max_missed_pings is 0, must be from 1 to 1000");
  const auto client_deflate = [&](int level, int bits) {
    return client([=](auto& o) { o.deflate = {.level = level, .window_bits = bits}; });
  };
  EXPECT_EQ(client_deflate(0, 9), "");
  EXPECT_EQ(client_deflate(9, 15), "");
  EXPECT_EQ(client_deflate(-1, 15), "deflate.level is -1, must be from 1 to 9, or 0 for the default");
  EXPECT_EQ(client_deflate(10, 15), "deflate.level is 10, must be from 1 to 9, or 0 for the default");
  EXPECT_EQ(client_deflate(0, 8), "deflate.window_bits is 8, must be from 9 to 15");
  EXPECT_EQ(client_deflate(0, 16), "deflate.window_bits is 16, must be from 9 to 15");
}

}  // namespace
}  // namespace msgtrans::detail
