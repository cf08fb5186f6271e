// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"
#include "support/process.hpp"
#include "tls.hpp"

#include <random>
#include <zlib.h>

namespace msgtrans::test {
namespace {

void start(TestServer& server, ListenOptions options = {}, const Endpoint& at = websocket("127.0.0.1:0/")) {
  if (is_encrypted(at.transport) && options.tls.identity.empty()) options.tls.identity = trusted_identity();
  server.endpoint = server.transport.listen(at, options);
  server.transport.start();
}

Endpoint over(Transport transport, Endpoint endpoint) {
  endpoint.transport = transport;
  return endpoint;
}
Endpoint at_path(Endpoint endpoint, std::string path) {
  endpoint.path = std::move(path);
  return endpoint;
}

::testing::AssertionResult has(const std::string& text, std::string_view part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "\"" << text << "\" does not say \"" << part << "\"";
}

Error connect(ClientTransport& client, const Endpoint& to) {
  Error error;
  client.connect(to.url(), error);
  return error;
}

void expect_served(const Endpoint& to, const ClientOptions& options = {}) {
  ClientTransport client(options);
  const Error error = connect(client, to);
  ASSERT_FALSE(error) << error.message();
  EXPECT_EQ(client.request("hello").text(), "hello");
}

void expect_handshake_failed(const TestServer& server, std::string_view part, std::size_t which = 0) {
  ASSERT_TRUE(server.errors.wait_for(which + 1)) << "nothing is told of the handshake";
  const End told = server.errors.at(which);
  EXPECT_EQ(told.code, Errc::handshake_failed) << told.code.message();
  EXPECT_TRUE(has(told.text, part));
  EXPECT_TRUE(has(told.text, "127.0.0.1:"));
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().handshake_failures == which + 1; }));
}

/// The request of a client by hand.
std::string upgrade(const std::string& target = "/", const std::string& further = "") {
  return "GET " + target +
         " HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
         "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n" +
         further + "\r\n";
}

/// Sends a request by hand, whose answer refuses it. \returns the whole answer.
std::string refusal(const TestServer& server, const std::string& request) {
  RawPeer peer(over(Transport::tcp, server.endpoint));
  peer.send(request);
  return peer.rest();
}

enum Opcode : unsigned { continuation = 0, text = 1, binary = 2, close = 8, ping = 9, pong = 10 };

struct Frame {
  unsigned first = 0;  // FIN, the reserved bits and the opcode
  std::string payload;

  [[nodiscard]] unsigned opcode() const noexcept { return first & 0xf; }
  /// Of a Close.
  [[nodiscard]] unsigned code() const {
    return payload.size() < 2 ? 0
                              : static_cast<unsigned>(static_cast<unsigned char>(payload[0])) << 8 |
                                    static_cast<unsigned char>(payload[1]);
  }
  [[nodiscard]] std::string reason() const { return payload.size() < 2 ? "" : payload.substr(2); }
};

constexpr unsigned fin = 0x80;

/// A frame by hand; a client's is masked, here with a key that shows in no byte.
std::string frame(unsigned first, std::string_view payload, bool masked = true, std::uint64_t announced = 0) {
  const std::uint64_t size = announced == 0 ? payload.size() : announced;
  const unsigned mask = masked ? 0x80 : 0;
  std::string out(1, static_cast<char>(first));
  if (size < 126) {
    out += static_cast<char>(mask | size);
  } else {
    out += static_cast<char>(mask | (size < 65536 ? 126 : 127));
    for (int shift = size < 65536 ? 8 : 56; shift >= 0; shift -= 8) out += static_cast<char>(size >> shift);
  }
  if (masked) out.append(4, '\0');
  return out.append(payload);
}

std::string text_of(const Bytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

/// A WebSocket client by hand, over a plain socket.
struct RawWebSocket {
  explicit RawWebSocket(const Endpoint& to, int receive_buffer = 0, const std::string& further = "")
      : peer(over(Transport::tcp, to), receive_buffer), answer((peer.send(upgrade(to.path, further)), head())) {}

  std::string head() { return peer.take_until("\r\n\r\n"); }
  void send(unsigned first, std::string_view payload) { peer.send(frame(first, payload)); }
  Frame receive() {
    const auto byte = [](char c) { return static_cast<unsigned char>(c); };
    const std::string start = peer.take(2);
    std::uint64_t size = byte(start[1]) & 0x7f;
    const bool masked = (byte(start[1]) & 0x80) != 0;
    if (size > 125) {
      const std::string extended = peer.take(size == 126 ? 2 : 8);
      size = 0;
      for (const char c : extended) size = size << 8 | byte(c);
    }
    const std::string key = masked ? peer.take(4) : std::string(4, '\0');
    Frame got{byte(start[0]), peer.take(size)};
    for (std::size_t i = 0; i < got.payload.size(); ++i)
      got.payload[i] = static_cast<char>(got.payload[i] ^ key[i % 4]);
    return got;
  }
  /// The next that is no ping.
  Frame next() {
    Frame got = receive();
    while (got.opcode() == ping) got = receive();
    return got;
  }

  RawPeer peer;
  std::string answer;
};

// --- the handshake

TEST(WebSocketHandshake, ByHandIsAnsweredAsTheRfcSays) {
  TestServer server;
  server.echo();
  start(server);
  RawWebSocket peer(server.endpoint);
  EXPECT_TRUE(has(peer.answer, "HTTP/1.1 101 Switching Protocols\r\n"));
  EXPECT_TRUE(has(peer.answer, "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
  EXPECT_FALSE(has(peer.answer, "Sec-WebSocket-Protocol"));
  peer.send(fin | binary, text_of(request(7, "hello")));
  const Frame got = peer.next();
  EXPECT_EQ(got.first, fin | binary);
  EXPECT_EQ(got.payload, text_of(response(7, "hello")));
  EXPECT_EQ(server.session().peer().transport, Transport::websocket);
  EXPECT_EQ(server.session().tls(), nullptr);
}

TEST(WebSocketHandshake, ForAnotherPathIsAnsweredWith404) {
  TestServer server;
  server.echo();
  start(server, {}, websocket("127.0.0.1:0/chat"));
  EXPECT_EQ(server.endpoint.path, "/chat");
  std::size_t failures = 0;
  for (const char* path : {"/other", "/", "/chat/", "/CHAT", "/chatter"}) {
    ClientTransport client;
    const Error error = connect(client, at_path(server.endpoint, path));
    EXPECT_EQ(error.code, Errc::handshake_failed) << path;
    EXPECT_TRUE(has(error.text, "HTTP/1.1 404 Not Found"));
    EXPECT_TRUE(has(error.text, "127.0.0.1:" + std::to_string(server.endpoint.port)));
    expect_handshake_failed(server, "no such path \"" + std::string(path) + "\" (answered with 404)", failures++);
  }
  EXPECT_TRUE(has(refusal(server, upgrade("/other")), "\r\n\r\nno such path \"/other\"\n"));
  EXPECT_EQ(server.came.size(), 0U);
  expect_served(server.endpoint);
}

TEST(WebSocketHandshake, DoesNotLookAtTheQuery) {
  TestServer server;
  server.echo();
  start(server, {}, websocket("127.0.0.1:0/chat"));
  expect_served(at_path(server.endpoint, "/chat?token=1&path=/other"));
}

TEST(WebSocketHandshake, AListenersPathHasNoQueryAndBeginsWithASlash) {
  TestServer server;
  for (const char* path : {"/chat?x=1", "/chat#x", "/a b", "chat"}) {
    std::string text;
    EXPECT_EQ(thrown([&] { server.transport.listen(at_path(websocket("127.0.0.1:0"), path)); }, &text),
              Errc::invalid_address)
        << path;
    EXPECT_TRUE(has(text, "a listener's path begins with / and has no query"));
    EXPECT_TRUE(has(text, path));
  }
  EXPECT_TRUE(server.transport.endpoints().empty());
}

TEST(WebSocketHandshake, TheHookSaysWhichOriginsMayConnect) {
  const Record<std::string> origins;
  ListenOptions options;
  options.websocket.check_origin = [origins](std::string_view origin) {
    origins.add(std::string(origin));
    if (origin == "https://broken.example") throw std::runtime_error("a secret");
    return origin == "https://good.example";
  };
  TestServer server;
  server.echo();
  start(server, options);
  const auto from = [](const char* origin) {
    ClientOptions client;
    client.websocket.origin = origin;
    return client;
  };
  expect_served(server.endpoint, from("https://good.example"));
  {
    ClientTransport client(from("https://evil.example"));
    const Error error = connect(client, server.endpoint);
    EXPECT_EQ(error.code, Errc::handshake_failed);
    EXPECT_TRUE(has(error.text, "403 Forbidden"));
    expect_handshake_failed(server, "origin \"https://evil.example\" is not allowed", 0);
  }
  ClientTransport client;
  EXPECT_TRUE(has(connect(client, server.endpoint).text, "403 Forbidden"));
  EXPECT_EQ(origins.all(), (std::vector<std::string>{"https://good.example", "https://evil.example", ""}));
  const std::string answer = refusal(server, upgrade("/", "Origin: https://broken.example\r\n"));
  EXPECT_TRUE(has(answer, "HTTP/1.1 500 Internal Server Error"));
  EXPECT_FALSE(has(answer, "secret"));
  expect_handshake_failed(server, "check_origin has thrown: a secret", 2);
  EXPECT_EQ(server.came.size(), 1U);
}

TEST(WebSocketHandshake, AgreesOnTheSubprotocolIfTheClientOffersIt) {
  const auto chosen = [](const std::string& of_server, const std::string& offers) {
    ListenOptions options;
    options.websocket.subprotocol = of_server;
    TestServer server;
    start(server, options);
    RawPeer peer(over(Transport::tcp, server.endpoint));
    peer.send(upgrade("/", offers));
    const std::string answer = peer.take_until("\r\n\r\n");
    EXPECT_TRUE(has(answer, "HTTP/1.1 101 "));
    constexpr std::string_view name = "Sec-WebSocket-Protocol: ";
    const auto at = answer.find(name);
    if (at == std::string::npos) return std::string();
    return answer.substr(at + name.size(), answer.find("\r\n", at) - at - name.size());
  };
  EXPECT_EQ(chosen("msgtrans", "Sec-WebSocket-Protocol: msgtrans\r\n"), "msgtrans");
  EXPECT_EQ(chosen("msgtrans", "Sec-WebSocket-Protocol: chat, msgtrans\r\n"), "msgtrans");
  EXPECT_EQ(chosen("msgtrans", "Sec-WebSocket-Protocol: chat\r\n"), "");
  EXPECT_EQ(chosen("msgtrans", ""), "");
  EXPECT_EQ(chosen("own.v2", "Sec-WebSocket-Protocol: msgtrans, own.v2\r\n"), "own.v2");
  EXPECT_EQ(chosen("", "Sec-WebSocket-Protocol: msgtrans\r\n"), "");
}

TEST(WebSocketHandshake, SucceedsWhateverTheSubprotocolsAre) {
  TestServer server;
  server.echo();
  start(server);
  for (const char* offer : {"", "msgtrans", "other"}) {
    ClientOptions options;
    options.websocket.subprotocol = offer;
    expect_served(server.endpoint, options);
  }
}

/// What a client asks of a server played by the test, which answers that. \returns the request and the client's error.
std::pair<std::string, Error> asked(const ClientOptions& options, const std::string& path, const std::string& answer) {
  RawListener listener(16, 0, tcp("127.0.0.1:0"));
  ClientTransport client(options);
  const Endpoint to = at_path(over(Transport::websocket, listener.endpoint()), path);
  auto result = std::async(std::launch::async, [&] { return connect(client, to); });
  RawPeer peer = listener.accept();
  std::string request = peer.take_until("\r\n\r\n");
  peer.send(answer);
  return {request, in_time(result)};
}

TEST(WebSocketHandshake, OfAClientAsksAsItsOptionsSay) {
  ClientOptions options;
  options.websocket.subprotocol = "own.v2";
  options.websocket.origin = "https://good.example";
  options.websocket.headers = {{"Authorization", "Bearer x"}, {"X-Trace", ""}};
  const auto [request, error] = asked(options, "/chat?x=1", "HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n");
  EXPECT_TRUE(request.starts_with("GET /chat?x=1 HTTP/1.1\r\nHost: 127.0.0.1:")) << request;
  EXPECT_TRUE(has(request, "\r\nSec-WebSocket-Protocol: own.v2\r\n"));
  EXPECT_TRUE(has(request, "\r\nOrigin: https://good.example\r\n"));
  EXPECT_TRUE(has(request, "\r\nAuthorization: Bearer x\r\n"));
  EXPECT_TRUE(has(request, "\r\nX-Trace: \r\n"));
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_TRUE(has(error.text, "the server answered \"HTTP/1.1 503 Later\""));

  options.websocket = {.subprotocol = ""};
  const auto plain = asked(options, "/", "HTTP/1.1 503 Later\r\nContent-Length: 0\r\n\r\n").first;
  EXPECT_FALSE(has(plain, "Sec-WebSocket-Protocol"));
  EXPECT_FALSE(has(plain, "Origin"));
}

TEST(WebSocketHandshake, OfAClientTakesNoAnswerOverItsLimit) {
  ClientOptions options;
  options.websocket.max_header = 256;
  const std::string answer = "HTTP/1.1 503 Later\r\nX: " + std::string(300, 'x') + "\r\n\r\n";
  EXPECT_TRUE(has(asked(options, "/", answer).second.text, "the head of the answer is over the limit of 256 bytes"));
  options.websocket.max_header = 512;
  EXPECT_TRUE(has(asked(options, "/", answer).second.text, "503"));
}

TEST(WebSocketHandshake, FurtherHeadersDoNoHarmAtAServer) {
  TestServer server;
  server.echo();
  start(server);
  ClientOptions options;
  options.websocket.headers = {{"Authorization", "Bearer x"}, {"Cookie", "a=b"}};
  expect_served(server.endpoint, options);
}

TEST(WebSocketHandshake, WithAHeadOverTheLimitIsAnsweredWith431) {
  ListenOptions options;
  options.websocket.max_header = 512;
  TestServer server;
  server.echo();
  start(server, options);
  ClientOptions client;
  client.websocket.headers = {{"X-Long", std::string(600, 'x')}};
  ClientTransport transport(client);
  const Error error = connect(transport, server.endpoint);
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_TRUE(has(error.text, "431 Request Header Fields Too Large"));
  expect_handshake_failed(server, "over the limit of 512 bytes");
  EXPECT_TRUE(has(refusal(server, "GET /" + std::string(600, 'x')), "HTTP/1.1 431 "));  // without its end
  client.websocket.headers = {{"X-Short", std::string(100, 'x')}};
  expect_served(server.endpoint, client);
}

TEST(WebSocketHandshake, ThatStallsIsAnsweredWith408AndFreesItsPlace) {
  TestServer server({.shards = 1, .max_sessions = 1});
  server.echo();
  start(server, {.handshake_timeout = 500ms});
  RawPeer staller(over(Transport::tcp, server.endpoint));
  staller.send("GET / HTTP/1.1\r\nHost: x\r\n");
  RawPeer refused(over(Transport::tcp, server.endpoint));
  EXPECT_TRUE(refused.sees_end());
  EXPECT_EQ(server.errors.at(0).code, Errc::too_many_sessions);
  const std::string answer = staller.rest();
  EXPECT_TRUE(answer.starts_with("HTTP/1.1 408 Request Timeout\r\n")) << answer;
  EXPECT_EQ(server.errors.at(1).code, Errc::handshake_timeout);
  EXPECT_TRUE(has(server.errors.at(1).text, "127.0.0.1:" + std::to_string(staller.port())));
  EXPECT_TRUE(
      has(server.errors.at(1).text,
          "the handshake was not finished within 500 ms: WebSocket handshake: 25 bytes of the client's request"));
  expect_served(server.endpoint);
  EXPECT_EQ(server.transport.stats().handshake_failures, 1U);
  EXPECT_EQ(server.transport.stats().sessions_total, 1U);
}

TEST(WebSocketHandshake, WhatIsNoUpgradeIsRefusedWithItsStatus) {
  TestServer server;
  server.echo();
  start(server);
  const auto without = [](const std::string& header, const std::string& instead = "") {
    std::string request = upgrade();
    const auto at = request.find(header + ":");
    return request.replace(at, request.find("\r\n", at) + 2 - at, instead);
  };
  std::size_t failures = 0;
  const auto expect = [&](const std::string& request, const std::string& status, std::string_view cause) {
    EXPECT_TRUE(has(refusal(server, request), "HTTP/1.1 " + status + "\r\n"));
    expect_handshake_failed(server, cause, failures++);
  };
  expect("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "426 Upgrade Required", "no upgrade to WebSocket");
  expect(without("Connection"), "426 Upgrade Required", "Connection is \"\"");
  expect(without("Sec-WebSocket-Version", "Sec-WebSocket-Version: 8\r\n"), "426 Upgrade Required", "must be 13");
  expect(without("Sec-WebSocket-Key"), "400 Bad Request", "Sec-WebSocket-Key");
  expect(without("Host"), "400 Bad Request", "Host");
  expect("hello\r\n\r\n", "400 Bad Request", "not HTTP");
  expect("POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", "405 Method Not Allowed", "must be GET");
  EXPECT_EQ(server.came.size(), 0U);
  EXPECT_EQ(server.transport.stats().handshake_failures, failures);
  expect_served(server.endpoint);
}

TEST(WebSocketHandshake, ThatStallsDoesNotDelayStopping) {
  TestServer server({.shards = 1});
  server.echo();
  start(server, {.handshake_timeout = 0ms});
  ClientTransport client;
  ASSERT_FALSE(connect(client, server.endpoint));
  EXPECT_EQ(client.request("x").text(), "x");
  const std::size_t before = descriptors();
  std::vector<RawPeer> peers;
  for (int i = 0; i < 20; ++i) {
    peers.emplace_back(over(Transport::tcp, server.endpoint));
    if (i % 2 == 0) peers.back().send("GET / HT");
  }
  EXPECT_TRUE(wait_until([&] { return descriptors() == before + 40; })) << descriptors() << " " << before;
  const auto begin = Clock::now();
  EXPECT_TRUE(server.transport.stop(2 * patience).clean());
  EXPECT_LT(Clock::now() - begin, patience);
  for (RawPeer& one : peers) EXPECT_TRUE(has(one.rest(), "HTTP/1.1 503 "));
  EXPECT_EQ(server.transport.stats().handshake_failures, 20U);
}

// --- peers that speak something else

TEST(WebSocketBesideOthers, AnUpgradeAtATcpListenerIsAnErrorAtBothEnds) {
  TestServer server;
  server.echo();
  start(server, {}, tcp("127.0.0.1:0"));
  ClientTransport client;
  const Error error = connect(client, at_path(over(Transport::websocket, server.endpoint), "/"));
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_TRUE(has(error.text, "the peer closed after 0 bytes of its answer"));
  EXPECT_EQ(server.ends.at(0).code, Errc::bad_version);
  expect_served(server.endpoint);
}

TEST(WebSocketBesideOthers, ATcpClientAtAWebSocketListenerIsAnErrorAtBothEndsAtOnce) {
  TestServer server;
  server.echo();
  start(server, {.handshake_timeout = 0ms});
  const Record<Error> ends;
  ClientTransport client;
  client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
  ASSERT_FALSE(connect(client, at_path(over(Transport::tcp, server.endpoint), "")));
  Error error;
  (void)client.request("hello", {}, error);
  EXPECT_EQ(error.code, Errc::connection_lost);
  EXPECT_EQ(ends.at(0).code, Errc::bad_version);  // it is told something in HTTP
  EXPECT_EQ(server.errors.at(0).code, Errc::handshake_failed);
  EXPECT_TRUE(has(server.errors.at(0).text, "is not HTTP: its first byte is 1"));
  EXPECT_EQ(server.transport.stats().handshake_failures, 1U);
  expect_served(server.endpoint);
}

TEST(WebSocketBesideOthers, OneWithTlsAndOneWithoutDoNotUnderstandEachOther) {
  TestServer server;
  server.echo();
  start(server, {.handshake_timeout = 0ms});
  ClientTransport client;
  Error error = connect(client, over(Transport::websocket_tls, server.endpoint));
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_TRUE(has(error.text, "not TLS"));
  TestServer encrypted;
  encrypted.echo();
  start(encrypted, {}, websocket_tls("127.0.0.1:0/"));
  error = connect(client, over(Transport::websocket, encrypted.endpoint));
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_NE(error.text, "");
  expect_handshake_failed(encrypted, "the peer speaks plain HTTP, not TLS");
  expect_served(server.endpoint);
  expect_served(encrypted.endpoint);
}

// --- frames

class WebSocketFrames : public ::testing::Test {
 protected:
  WebSocketFrames() {
    server.echo();
    SessionOptions session;
    session.max_payload = 1000;
    start(server, {.session = session});
  }
  /// Sends that, for which the server closes. \returns the Close frame.
  Frame closed_for(std::string_view bytes) {
    RawWebSocket peer(server.endpoint);
    peer.peer.send(bytes);
    Frame got = peer.next();
    EXPECT_EQ(got.first, fin | close);
    peer.send(fin | close, got.payload);
    EXPECT_TRUE(peer.peer.sees_end());
    return got;
  }

  TestServer server;
};

TEST_F(WebSocketFrames, ATextMessageClosesWith1003) {
  const Frame got = closed_for(frame(fin | text, "hello"));
  EXPECT_EQ(got.code(), 1003U) << got.reason();
  EXPECT_EQ(server.ends.at(0).code, Errc::websocket_violation);
  EXPECT_EQ(server.ends.at(0).text, got.reason());
  EXPECT_EQ(server.transport.stats().protocol_errors, 1U);
}

TEST_F(WebSocketFrames, AMalformedOneClosesWith1002) {
  const std::string packet = text_of(one_way(1, "x"));
  std::size_t which = 0;
  for (const std::string& bytes :
       {frame(fin | binary, packet, false), frame(fin | 0x40 | binary, packet), frame(fin | 3, packet),
        frame(fin | continuation, packet), frame(ping, "x"), frame(fin | ping, std::string(126, 'x')),
        frame(binary, packet.substr(0, 5)) + frame(fin | binary, packet), frame(fin | close, "x")}) {
    EXPECT_EQ(closed_for(bytes).code(), 1002U) << which;
    const End end = server.ends.at(which++);
    EXPECT_EQ(end.code, Errc::websocket_violation);
    EXPECT_NE(end.text, "");
  }
}

TEST_F(WebSocketFrames, AMessageThatIsNotOnePacketClosesWith1002) {
  const std::string packet = text_of(one_way(1, "x"));
  EXPECT_EQ(closed_for(frame(fin | binary, packet.substr(0, packet.size() - 1))).code(), 1002U);
  EXPECT_EQ(closed_for(frame(fin | binary, packet + packet)).code(), 1002U);
  EXPECT_EQ(server.ends.at(0).code, Errc::websocket_violation);
  EXPECT_EQ(server.ends.at(1).code, Errc::websocket_violation);
}

TEST_F(WebSocketFrames, ATooLargeOneClosesWith1009) {
  EXPECT_EQ(closed_for(frame(fin | binary, "", true, 100U << 20)).code(), 1009U);
  EXPECT_EQ(server.ends.at(0).code, Errc::payload_too_large) << server.ends.at(0).text;
  EXPECT_EQ(closed_for(frame(fin | binary, text_of(one_way(1, std::string(1001, 'x'))))).code(), 1009U);
  EXPECT_EQ(server.ends.at(1).code, Errc::payload_too_large) << server.ends.at(1).text;
  RawWebSocket peer(server.endpoint);
  peer.send(fin | binary, text_of(request(1, std::string(1000, 'x'))));
  EXPECT_EQ(peer.next().payload, text_of(response(1, std::string(1000, 'x'))));
}

// Who cannot send any more may give up before it has read why.
TEST_F(WebSocketFrames, TheRestOfATooLargeOneIsReadForNothing) {
  RawWebSocket peer(server.endpoint);
  EXPECT_TRUE(peer.peer.send(frame(fin | binary, std::string(16U << 20, 'x')))) << "the connection was reset";
  const Frame got = peer.next();
  EXPECT_EQ(got.code(), 1009U) << got.reason();
  peer.send(fin | close, got.payload);
  EXPECT_TRUE(peer.peer.sees_end());
}

TEST_F(WebSocketFrames, AMessageInFragmentsWithPingsBetweenThemIsWhole) {
  RawWebSocket peer(server.endpoint);
  const std::string packet = text_of(request(1, "in several fragments"));
  peer.send(binary, std::string_view(packet).substr(0, 3));
  peer.send(fin | ping, "one");
  EXPECT_EQ(peer.next().payload, "one");
  peer.send(continuation, "");
  peer.send(continuation, std::string_view(packet).substr(3, 20));
  peer.send(fin | ping, "two");
  peer.send(fin | continuation, std::string_view(packet).substr(23));
  const Frame pong_of_two = peer.next();
  EXPECT_EQ(pong_of_two.first, fin | pong);
  EXPECT_EQ(pong_of_two.payload, "two");
  EXPECT_EQ(peer.next().payload, text_of(response(1, "in several fragments")));
}

TEST_F(WebSocketFrames, AnUnaskedPongIsTaken) {
  RawWebSocket peer(server.endpoint);
  peer.send(fin | pong, "unasked");
  peer.send(fin | binary, text_of(request(1, "x")));
  EXPECT_EQ(peer.next().payload, text_of(response(1, "x")));
}

// --- permessage-deflate

/// What is agreed on at both ends, from 100 bytes on.
ListenOptions deflating_listener() {
  ListenOptions options;
  options.websocket.deflate = WebSocketDeflateOptions{.threshold = 100};
  return options;
}
ClientOptions deflating_client() {
  ClientOptions options;
  options.websocket.deflate = WebSocketDeflateOptions{.threshold = 100};
  return options;
}

/// The payload of a compressed message.
std::string deflated(std::string_view bytes) {
  z_stream stream{};
  EXPECT_EQ(deflateInit2(&stream, 9, Z_DEFLATED, -15, 9, Z_DEFAULT_STRATEGY), Z_OK);
  std::string out(bytes.size() + bytes.size() / 1000 + 100, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(::deflate(&stream, Z_SYNC_FLUSH), Z_OK);
  out.resize(stream.total_out - 4);
  deflateEnd(&stream);
  return out;
}

std::string inflated(std::string_view bytes) {
  const std::string whole = std::string(bytes) + std::string("\0\0\xff\xff", 4);
  z_stream stream{};
  EXPECT_EQ(inflateInit2(&stream, -15), Z_OK);
  std::string out(1 << 20, '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(whole.data()));
  stream.avail_in = static_cast<uInt>(whole.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(::inflate(&stream, Z_SYNC_FLUSH), Z_OK);
  out.resize(stream.total_out);
  inflateEnd(&stream);
  return out;
}

constexpr unsigned compressed = 0x40;
constexpr const char* deflate_offered = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n";

TEST(WebSocketDeflate, IsAgreedOnAndUsedBothWaysByHand) {
  TestServer server;
  server.echo();
  start(server, deflating_listener());
  RawWebSocket peer(server.endpoint, 0, deflate_offered);
  EXPECT_TRUE(has(peer.answer,
                  "\r\nSec-WebSocket-Extensions: permessage-deflate; server_no_context_takeover; "
                  "client_no_context_takeover\r\n"));
  const std::string words(5000, 'x');
  for (std::uint32_t i = 1; i <= 3; ++i) {
    peer.send(fin | compressed | binary, deflated(text_of(request(i, words))));
    const Frame got = peer.next();
    EXPECT_EQ(got.first, fin | compressed | binary);
    EXPECT_EQ(inflated(got.payload), text_of(response(i, words)));
  }
  const std::string packet = deflated(text_of(request(7, words)));
  peer.send(compressed | binary, std::string_view(packet).substr(0, 5));
  peer.send(fin | ping, "one");
  EXPECT_EQ(peer.next().payload, "one");
  peer.send(fin | continuation, std::string_view(packet).substr(5));
  EXPECT_EQ(inflated(peer.next().payload), text_of(response(7, words)));
  peer.send(fin | binary, text_of(request(8, "few")));
  const Frame got = peer.next();
  EXPECT_EQ(got.first, fin | binary);
  EXPECT_EQ(got.payload, text_of(response(8, "few")));
}

TEST(WebSocketDeflate, PassesWhateverIsSentWhoeverWantsIt) {
  std::vector<std::string> payloads{"", "few", std::string(84, 'x'), std::string(200'000, 'x')};
  std::mt19937 random(1);
  std::string noise;
  for (int i = 0; i < 200'000; ++i) noise += static_cast<char>(random());
  payloads.push_back(noise);
  payloads.push_back(noise.substr(0, 100'000) + std::string(700'000, 'y'));
  for (const bool encrypted : {false, true}) {
    for (const bool at_server : {false, true}) {
      TestServer server;
      server.echo();
      start(server, at_server ? deflating_listener() : ListenOptions{},
            encrypted ? websocket_tls("127.0.0.1:0/") : websocket("127.0.0.1:0/"));
      for (const bool at_client : {false, true}) {
        ClientTransport client(at_client ? deflating_client() : ClientOptions{});
        const Error error = connect(client, server.endpoint);
        ASSERT_FALSE(error) << error.message();
        for (const std::string& payload : payloads) {
          EXPECT_TRUE(client.request(payload).text() == payload) << payload.size();
        }
      }
    }
  }
}

TEST(WebSocketDeflate, ABombClosesWith1009AndGarbageWith1007) {
  TestServer server;
  server.echo();
  ListenOptions options = deflating_listener();
  SessionOptions session;
  session.max_payload = 1000;
  session.max_extension = 0;
  options.session = session;
  start(server, options);
  const auto closed_for = [&](const std::string& payload) {
    RawWebSocket peer(server.endpoint, 0, deflate_offered);
    peer.send(fin | compressed | binary, payload);
    const Frame got = peer.next();
    EXPECT_EQ(got.first, fin | close);
    peer.send(fin | close, got.payload);
    EXPECT_TRUE(peer.peer.sees_end());
    return got.code();
  };
  EXPECT_EQ(closed_for(deflated(text_of(one_way(1, std::string(1001, 'x'))))), 1009U);
  EXPECT_EQ(server.ends.at(0).code, Errc::payload_too_large);
  EXPECT_EQ(closed_for(deflated(text_of(one_way(1, std::string(1000, 'x'))) + std::string(900'000, '\0'))), 1009U);
  EXPECT_EQ(server.ends.at(1).code, Errc::payload_too_large);
  EXPECT_EQ(server.ends.at(1).text, "WebSocket message inflates to more than the limit of 1016 bytes");
  EXPECT_EQ(closed_for("\x06"), 1007U);
  EXPECT_EQ(server.ends.at(2).code, Errc::websocket_violation);
  EXPECT_EQ(server.transport.stats().protocol_errors, 3U);
  EXPECT_EQ(server.came.size(), 3U) << "sessions";
  expect_served(server.endpoint, deflating_client());
}

TEST(WebSocketDeflate, MuchThatCameAsLittleKeepsNobodyWaiting) {
  constexpr int count = 400;
  std::atomic<int> came{0};
  TestServer server({.shards = 1});
  server.transport.on_message([&came](Session& session, const Message& message) {
    if (message.is_request()) {
      session.respond(message, message.payload());
      return;
    }
    std::this_thread::sleep_for(2ms);
    ++came;
  });
  start(server, deflating_listener());
  ClientTransport client;
  ASSERT_FALSE(connect(client, server.endpoint));
  RawWebSocket peer(server.endpoint, 0, deflate_offered);
  const std::string one = frame(fin | compressed | binary, deflated(text_of(one_way(1, std::string(100'000, 'x')))));
  std::string all;
  for (int i = 0; i < count; ++i) all += one;
  ASSERT_LT(all.size(), 64U * 1024) << "it is one read";
  peer.peer.send(all);
  EXPECT_TRUE(wait_until([&] { return came.load() > 0; }));
  EXPECT_EQ(client.request("hello").text(), "hello");
  EXPECT_LT(came.load(), count);
  EXPECT_TRUE(wait_until([&] { return came.load() == count; })) << came.load();
}

TEST(WebSocketPing, IsAnsweredWhileTheOutboundQueueIsFull) {
  SessionOptions session;
  session.outbound_bytes = 4 << 20;
  TestServer server;
  start(server, {.session = session});
  RawWebSocket peer(server.endpoint, 8192);
  Session at_server = server.session();
  const std::size_t taken = fill(at_server, std::string(10000, 'x'));
  peer.send(fin | ping, "still there?");
  std::size_t before = 0;
  for (Frame got = peer.next(); got.opcode() != pong; got = peer.next(), ++before) {
    ASSERT_EQ(got.opcode(), binary);
    ASSERT_LT(before, taken);
  }
  EXPECT_LT(before, taken) << "the answer waited for the whole queue";
  for (std::size_t i = before; i < taken; ++i) EXPECT_EQ(peer.next().opcode(), binary);
  EXPECT_TRUE(at_server.is_open());
}

// --- ends

TEST(WebSocketEnd, ByTheServerReachesTheClientWithTextAndCode) {
  TestServer server;
  start(server);
  const Record<Error> ends;
  ClientTransport client;
  client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
  ASSERT_FALSE(connect(client, server.endpoint));
  server.session().close("maintenance at noon");
  EXPECT_EQ(ends.at(0).code, Errc::closed_by_peer);
  EXPECT_EQ(ends.at(0).text, "closed by peer, WebSocket code 1000: maintenance at noon");
  EXPECT_EQ(server.ends.at(0).code, Errc::closed_by_user);
  EXPECT_EQ(server.ends.at(0).text, "maintenance at noon");
}

TEST(WebSocketEnd, IsAnsweredByAClose) {
  TestServer server;
  start(server);
  RawWebSocket peer(server.endpoint);
  server.session().close("enough");
  const Frame got = peer.next();
  EXPECT_EQ(got.first, fin | close);
  EXPECT_EQ(got.payload, std::string("\x03\xe8") + "enough");
  peer.send(fin | close, got.payload);
  EXPECT_TRUE(peer.peer.sees_end());
  EXPECT_EQ(server.ends.at(0).code, Errc::closed_by_user);
}

TEST(WebSocketEnd, ByThePeerIsToldWithItsCodeAndText) {
  TestServer server;
  start(server);
  RawWebSocket peer(server.endpoint);
  peer.send(fin | close, std::string("\x0f\xa1") + "gone home");  // 4001
  const Frame got = peer.next();
  EXPECT_EQ(got.opcode(), close);
  EXPECT_EQ(got.code(), 4001U);
  EXPECT_TRUE(peer.peer.sees_end());
  EXPECT_EQ(server.ends.at(0).code, Errc::closed_by_peer);
  EXPECT_TRUE(has(server.ends.at(0).text, "WebSocket code 4001: gone home"));
}

TEST(WebSocketEnd, OfTheSocketWithoutACloseIsATruncation) {
  TestServer server;
  start(server);
  RawWebSocket peer(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(1));
  peer.peer.cut();
  EXPECT_EQ(server.ends.at(0).code, Errc::truncated);
  EXPECT_TRUE(has(server.ends.at(0).text, "without a Close frame"));
}

TEST(WebSocketEnd, ByStoppingSays1001) {
  TestServer server;
  start(server);
  const Record<Error> ends;
  ClientTransport client;
  client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
  ASSERT_FALSE(connect(client, server.endpoint));
  RawWebSocket peer(server.endpoint);
  ASSERT_TRUE(server.came.wait_for(2));
  auto report = std::async(std::launch::async, [&] { return server.transport.stop(patience); });
  const Frame got = peer.next();
  EXPECT_EQ(got.opcode(), close);
  EXPECT_EQ(got.code(), 1001U) << got.reason();
  peer.send(fin | close, got.payload);
  EXPECT_TRUE(in_time(report).clean());
  EXPECT_EQ(ends.at(0).code, Errc::closed_by_peer);
  EXPECT_TRUE(has(ends.at(0).text, "WebSocket code 1001"));
}

TEST(WebSocketEnd, ByARefusalIsToldWithItsCode) {
  TestServer server;
  server.transport.on_connect([](Session&) { return Admission::refuse("not you"); });
  start(server);
  RawWebSocket peer(server.endpoint);
  const Frame got = peer.next();
  EXPECT_EQ(got.opcode(), close);
  EXPECT_EQ(got.code(), 1008U);
  EXPECT_EQ(got.reason(), "not you");
  EXPECT_TRUE(peer.peer.sees_end());
}

// --- pings

TEST(WebSocketPings, EndASessionWhosePeerDoesNotAnswer) {
  for (const unsigned missed : {1U, 3U}) {
    ListenOptions options;
    options.websocket.ping_interval = 50ms;
    options.websocket.max_missed_pings = missed;
    TestServer server;
    start(server, options);
    RawWebSocket peer(server.endpoint);
    std::string pings;
    for (unsigned i = 0; i < missed; ++i) pings += frame(fin | ping, "", false);
    EXPECT_EQ(peer.peer.rest(), pings);
    const End end = server.ends.at(0);
    EXPECT_EQ(end.code, Errc::idle_timeout) << end.code.message();
    EXPECT_EQ(end.text, "WebSocket: nothing came after " + std::to_string(missed) + " pings, one every 50 ms");
  }
}

TEST(WebSocketPings, KeepASessionWhosePeerAnswers) {
  ListenOptions options;
  options.websocket.ping_interval = 100ms;
  options.websocket.max_missed_pings = 3;
  TestServer server;
  server.echo();
  start(server, options);
  RawWebSocket peer(server.endpoint);
  for (int i = 0; i < 6; ++i) {
    const Frame got = peer.receive();
    ASSERT_EQ(got.opcode(), ping);
    peer.send(fin | pong, got.payload);
  }
  peer.send(fin | binary, text_of(request(1, "x")));
  EXPECT_EQ(peer.next().payload, text_of(response(1, "x")));
  EXPECT_EQ(server.ends.size(), 0U);
}

TEST(WebSocketPings, OfOneEndOnlyAreAnsweredByTheOther) {
  struct Pair {
    explicit Pair(bool server_asks) : client(options(!server_asks)) {
      ListenOptions listener;
      if (!server_asks) listener.websocket.ping_interval = 0ms;
      if (server_asks) listener.websocket = {.ping_interval = 100ms, .max_missed_pings = 3};
      server.echo();
      start(server, listener);
      const Error error = connect(client, server.endpoint);
      EXPECT_FALSE(error) << error.message();
    }
    static ClientOptions options(bool asks) {
      ClientOptions options;
      options.websocket.ping_interval = asks ? 100ms : 0ms;
      options.websocket.max_missed_pings = 3;
      return options;
    }
    TestServer server;
    ClientTransport client;
  };
  Pair by_server(true), by_client(false);
  EXPECT_FALSE(by_server.server.ends.wait_for(1, 800ms));
  EXPECT_EQ(by_client.server.ends.size(), 0U);
  EXPECT_EQ(by_server.client.request("x").text(), "x");
  EXPECT_EQ(by_client.client.request("x").text(), "x");
}

TEST(WebSocketPings, AreNotSentWhereTheyAreOff) {
  ListenOptions options;
  options.websocket = {.ping_interval = 0ms, .max_missed_pings = 1};
  TestServer server;
  start(server, options);
  RawWebSocket peer(server.endpoint);
  EXPECT_FALSE(peer.peer.readable(200ms));
}

TEST(WebSocketPings, OfAClientEndASessionWhoseServerDoesNotAnswer) {
  RawListener listener(16, 0, websocket("127.0.0.1:0/"));
  ClientOptions options;
  options.websocket.ping_interval = 50ms;
  options.websocket.max_missed_pings = 3;
  const Record<Error> ends;
  ClientTransport client(options);
  client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
  auto result = std::async(std::launch::async, [&] { return connect(client, listener.endpoint()); });
  RawPeer silent = listener.accept();  // done with the handshake, it reads nothing more
  ASSERT_FALSE(in_time(result));
  EXPECT_EQ(ends.at(0).code, Errc::idle_timeout);
  EXPECT_EQ(ends.at(0).text, "WebSocket: nothing came after 3 pings, one every 50 ms");
}

// --- over TLS

TEST(WebSocketOverTls, HasTheOptionsOfBoth) {
  ListenOptions options;
  options.tls.identity = trusted_identity();
  options.tls.client_certificates = ClientCertificates::required;
  Error error;
  const auto worker = make_certificate({.common_name = "worker-7"}, error);
  ASSERT_TRUE(worker) << error.message();
  options.tls.client_ca_pem = worker->certificate_pem;
  options.websocket.check_origin = [](std::string_view origin) { return origin == "https://good.example"; };
  TestServer server;
  server.echo();
  const Record<TlsPeer> seen;
  const Record<Transport> over_what;
  server.transport.on_connect([=](Session& session) {
    over_what.add(session.peer().transport);
    seen.add(*session.tls());
  });
  start(server, options, websocket_tls("127.0.0.1:0/chat"));
  EXPECT_TRUE(server.url().starts_with("wss://127.0.0.1:")) << server.url();
  ClientOptions client_options;
  client_options.tls.identity = {.certificate_pem = worker->certificate_pem, .key_pem = worker->key_pem};
  client_options.websocket.origin = "https://good.example";
  ClientTransport client(client_options);
  error = connect(client, server.endpoint);
  ASSERT_FALSE(error) << error.message();
  EXPECT_EQ(client.request("hello").text(), "hello");
  EXPECT_EQ(seen.at(0).subject, "CN=worker-7");
  EXPECT_EQ(seen.at(0).alpn, "http/1.1");
  EXPECT_EQ(over_what.at(0), Transport::websocket_tls);
  EXPECT_EQ(client.session()->tls()->alpn, "http/1.1");
  EXPECT_EQ(client.session()->tls()->common_name, "tests");
  EXPECT_EQ(client.session()->peer().transport, Transport::websocket_tls);
  client.close();
  EXPECT_TRUE(has(connect(client, at_path(server.endpoint, "/")).text, "404 Not Found"));
  client_options.websocket.origin = "https://evil.example";
  ClientTransport evil(client_options);
  EXPECT_TRUE(has(connect(evil, server.endpoint).text, "403 Forbidden"));
  ClientTransport nobody;
  error = connect(nobody, server.endpoint);
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_TRUE(has(error.text, "it asked for a certificate, and this end has none"));
  expect_handshake_failed(server, "the client has no certificate, and one is required", 2);
  EXPECT_EQ(seen.size(), 1U);
}

TEST(WebSocketOverTls, AnUnknownAuthorityIsRefused) {
  Error error;
  const auto own = make_certificate({.common_name = "nobody", .names = {"127.0.0.1"}}, error);
  ASSERT_TRUE(own) << error.message();
  ListenOptions options;
  options.tls.identity = {.certificate_pem = own->certificate_pem, .key_pem = own->key_pem};
  TestServer server;
  start(server, options, websocket_tls("127.0.0.1:0/"));
  ClientTransport client;
  error = connect(client, server.endpoint);
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_TRUE(has(error.text, "unknown authority: the server's certificate is signed by itself: CN=nobody"));
  expect_handshake_failed(server, "the peer gave up: unknown CA");
}

TEST(WebSocketOverTls, GetsNewCertificates) {
  TestServer server;
  server.echo();
  start(server, {}, websocket_tls("127.0.0.1:0/chat"));
  ClientOptions options;
  options.tls.verify = TlsVerification::danger_accept_any_certificate();
  ClientTransport old(options);
  ASSERT_FALSE(connect(old, server.endpoint));
  Error error;
  const auto fresh = make_certificate({.common_name = "fresh"}, error);
  ASSERT_TRUE(fresh) << error.message();
  server.transport.renew_tls(
      server.endpoint, {.identity = {.certificate_pem = fresh->certificate_pem, .key_pem = fresh->key_pem}}, error);
  ASSERT_FALSE(error) << error.message();
  EXPECT_EQ(old.request("x").text(), "x");
  EXPECT_EQ(old.session()->tls()->common_name, "tests");
  ClientTransport client(options);
  ASSERT_FALSE(connect(client, server.endpoint));
  EXPECT_EQ(client.session()->tls()->common_name, "fresh");
  EXPECT_EQ(client.session()->tls()->alpn, "http/1.1");
}

TEST(WebSocketOverTls, ThatStallsAfterTlsIsAnsweredWith408) {
  TestServer server;
  start(server, {.handshake_timeout = 300ms}, websocket_tls("127.0.0.1:0/"));
  Error error;
  const auto context = detail::TlsContext::client({}, error, "http/1.1");
  ASSERT_TRUE(context) << error.message();
  const int socket = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const SocketAddress address(server.endpoint);
  ASSERT_EQ(::connect(socket, address.data(), address.size()), 0);
  RawPeer peer(socket, [&](int s) { return std::make_unique<detail::TlsConnection>(s, context, "127.0.0.1"); });
  peer.send("GET / HTTP/1.1\r\n");
  EXPECT_TRUE(has(peer.rest(), "HTTP/1.1 408 Request Timeout\r\n"));
  EXPECT_EQ(server.errors.at(0).code, Errc::handshake_timeout);
  EXPECT_TRUE(has(server.errors.at(0).text, "WebSocket handshake: 16 bytes of the client's request"));
}

TEST(WebSocketOverTls, WithoutACertificateIsRefusedByListen) {
  TestServer server;
  std::string text;
  EXPECT_EQ(thrown([&] { server.transport.listen(websocket_tls("127.0.0.1:0/")); }, &text), Errc::invalid_option);
  EXPECT_TRUE(has(text, "certificate_file and certificate_pem are both empty"));
}

// --- options

TEST(WebSocketOptionsOf, AListenerAreChecked) {
  TestServer server;
  const auto refused = [&](const WebSocketServerOptions& wrong, std::string_view part) {
    ListenOptions options;
    options.websocket = wrong;
    options.tls.identity = trusted_identity();
    for (const Endpoint& at : {websocket("127.0.0.1:0/"), websocket_tls("127.0.0.1:0/")}) {
      Error error;
      EXPECT_FALSE(server.transport.listen(at, options, error)) << part;
      EXPECT_EQ(error.code, Errc::invalid_option);
      EXPECT_TRUE(has(error.text, part));
    }
  };
  refused({.subprotocol = "a b"}, "subprotocol is \"a b\"");
  refused({.max_header = 255}, "max_header is 255");
  refused({.max_header = 65537}, "max_header is 65537");
  refused({.ping_interval = -1ms}, "ping_interval is -1");
  refused({.max_missed_pings = 0}, "max_missed_pings is 0");
  refused({.max_missed_pings = 1001}, "max_missed_pings is 1001");
  refused({.deflate = {{.window_bits = 8}}}, "deflate.window_bits is 8");
  EXPECT_TRUE(server.transport.endpoints().empty());
  ListenOptions options;
  options.handshake_timeout = -1ms;
  Error error;
  EXPECT_FALSE(server.transport.listen(websocket("127.0.0.1:0/"), options, error));
  EXPECT_TRUE(has(error.text, "handshake_timeout"));
}

TEST(WebSocketOptionsOf, AClientAreChecked) {
  const auto refused = [](const WebSocketClientOptions& wrong, std::string_view part) {
    ClientOptions options;
    options.websocket = wrong;
    std::string text;
    EXPECT_EQ(thrown([&] { ClientTransport client(options); }, &text), Errc::invalid_option) << part;
    EXPECT_TRUE(has(text, part));
  };
  refused({.subprotocol = "a,b"}, "subprotocol is \"a,b\"");
  refused({.origin = "a\r\nb"}, "origin is ");
  refused({.headers = {{"a b", "x"}}}, "headers has the name \"a b\"");
  refused({.headers = {{"X", "a\r\nb"}}}, "headers has the value ");
  refused({.headers = {{"hOST", "x"}}}, "headers has hOST");
  refused({.max_header = 255}, "max_header is 255");
  refused({.ping_interval = -1ms}, "ping_interval is -1");
  refused({.max_missed_pings = 0}, "max_missed_pings is 0");
  refused({.deflate = {{.level = 10}}}, "deflate.level is 10");
}

}  // namespace
}  // namespace msgtrans::test
