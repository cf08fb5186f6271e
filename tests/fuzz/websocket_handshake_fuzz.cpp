// SPDX-License-Identifier: Apache-2.0
// The handshake of WebSocket, and what follows it, above a connection in memory: what the peer sends is the input,
// given whole and byte by byte, which must come to the same.
//
// Input: byte 0 picks the role and the options, the rest is what the peer sends. A client's peer may write $ACCEPT,
// once in that header, for the proof that belongs to the key it was sent.
#include "../../src/websocket.hpp"

#include <algorithm>
#include <array>
#include <boost/beast/core/detail/base64.hpp>
#include <boost/beast/core/detail/sha1.hpp>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace msgtrans;
using detail::WebSocketConnection;
using Status = Connection::Status;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "violated: %s\n", what);
  std::abort();
}

/// What the peer sends, `most` bytes a call, and what it is sent.
struct Peer {
  std::string input;
  std::string output;
  std::size_t most = SIZE_MAX;
  std::size_t at = 0;
};

class Memory final : public Connection {
 public:
  explicit Memory(Peer& peer) : peer_(&peer) {}

  Status handshake() override { return Status::done; }
  Status read(std::span<std::byte> into, std::size_t& count) override {
    count = std::min({peer_->most, into.size(), peer_->input.size() - peer_->at});
    if (count == 0) return Status::blocked;
    std::copy_n(peer_->input.data() + peer_->at, count, reinterpret_cast<char*>(into.data()));
    peer_->at += count;
    return Status::done;
  }
  [[nodiscard]] bool has_input() const noexcept override { return peer_->at < peer_->input.size(); }
  Status write(std::span<const iovec> pieces, std::size_t& taken) override {
    taken = 0;
    for (const iovec& piece : pieces) {
      peer_->output.append(static_cast<const char*>(piece.iov_base), piece.iov_len);
      taken += piece.iov_len;
    }
    return Status::done;
  }
  Status flush() override { return Status::done; }
  [[nodiscard]] bool wants_write() const noexcept override { return false; }
  Status shut_down(const Error&) override { return Status::done; }
  [[nodiscard]] bool awaits_peers_end() const noexcept override { return false; }

 private:
  Peer* peer_;
};

std::string accept_of(std::string key) {
  namespace beast = boost::beast::detail;
  key += "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
  beast::sha1_context context;
  std::array<char, 20> digest;
  beast::init(context);
  beast::update(context, key.data(), key.size());
  beast::finish(context, digest.data());
  std::string text(beast::base64::encoded_size(digest.size()), '\0');
  text.resize(beast::base64::encode(text.data(), digest.data(), digest.size()));
  return text;
}

struct Outcome {
  Status handshake = Status::blocked;
  Status end = Status::blocked;  // of reading
  std::string error;
  std::string answer;  // to the handshake
  std::string data;
  std::string subprotocol;
  bool deflates = false;
  std::uint16_t peer_code = 0;
};

Outcome run(std::uint8_t kind, std::string_view input, std::size_t most) {
  Peer peer;
  peer.most = most;
  const bool server = kind % 2 == 0;
  const bool deflate = (kind & 16U) != 0;
  const wire::Limits limits{.max_payload = 1000, .max_extension = 100, .max_decompressed = 1000};
  std::unique_ptr<WebSocketConnection> connection;
  if (server) {
    WebSocketServerOptions options;
    if ((kind & 4U) != 0) options.subprotocol.clear();
    if ((kind & 8U) != 0) options.check_origin = [](std::string_view origin) { return origin != "http://evil"; };
    if (deflate) options.deflate = {.window_bits = 12};
    options.max_header = 512;
    peer.input = input;
    connection = WebSocketConnection::server(std::make_unique<Memory>(peer),
                                             std::make_shared<const WebSocketServerOptions>(options),
                                             (kind & 2U) != 0 ? "/chat" : "/", limits);
  } else {
    WebSocketClientOptions options;
    if ((kind & 4U) != 0) options.subprotocol.clear();
    if (deflate) options.deflate = {.window_bits = 12};
    options.max_header = 512;
    connection = WebSocketConnection::client(
        std::make_unique<Memory>(peer), std::make_shared<const WebSocketClientOptions>(options), "host", "/", limits);
    require(connection->handshake() == Status::blocked, "a client waits for the answer");
    constexpr std::string_view name = "Sec-WebSocket-Key: ";
    const std::string accept = accept_of(peer.output.substr(peer.output.find(name) + name.size(), 24));
    constexpr std::string_view header = "Accept: ";
    constexpr std::string_view placeholder = "$ACCEPT";
    peer.input = input;
    if (const auto at = peer.input.find(std::string(header).append(placeholder)); at != std::string::npos) {
      peer.input.replace(at + header.size(), placeholder.size(), accept);
    }
    peer.output.clear();
  }
  Outcome outcome;
  outcome.handshake = connection->handshake();
  outcome.answer = std::move(peer.output);
  peer.output.clear();
  require(outcome.handshake != Status::ended, "a handshake has no end");
  if (outcome.handshake == Status::done) {
    outcome.subprotocol = connection->subprotocol();
    outcome.deflates = connection->deflates();
    require(deflate || !outcome.deflates, "it is agreed on only where it is wanted");
    require(!server || outcome.deflates == (outcome.answer.find("\r\nSec-WebSocket-Extensions: permessage-deflate; "
                                                                "server_no_context_takeover") != std::string::npos),
            "and then the client is told");
    require(!server || outcome.answer.starts_with("HTTP/1.1 101 "), "who is taken is told");
    std::vector<std::byte> buffer(1024);
    for (;;) {
      std::size_t count = 0;
      outcome.end = connection->read(buffer, count);
      if (outcome.end == Status::blocked && connection->has_input()) continue;
      if (outcome.end != Status::done) break;
      require(count != 0 && count <= buffer.size(), "done means something");
      outcome.data.append(reinterpret_cast<const char*>(buffer.data()), count);
    }
    outcome.peer_code = connection->peer_close_code();
    require((outcome.end == Status::ended) == (outcome.peer_code != 0), "only a Close is an end");
  } else if (outcome.handshake == Status::failed) {
    require(connection->error().code == make_error_code(Errc::handshake_failed), "a failure has its code");
    require(!server || outcome.answer.starts_with("HTTP/1.1 4"), "who is refused is told");
  }
  if (outcome.handshake == Status::failed || outcome.end == Status::failed) {
    require(!connection->error().text.empty(), "a failure has a text");
    for (const char c : connection->error().text) require(c >= 0x20 && c < 0x7f, "that can be shown");
    outcome.error = connection->error().text;
  } else {
    require(connection->shut_down(Error(Errc::stopping)) == Status::done, "it can always end");
  }
  require(!connection->wants_write(), "everything was written");
  return outcome;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 1) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data) + 1, size - 1);
  const Outcome whole = run(data[0], input, SIZE_MAX);
  const Outcome single = run(data[0], input, 1);
  require(whole.handshake == single.handshake && whole.end == single.end, "byte by byte it ends as whole");
  require(whole.answer == single.answer && whole.subprotocol == single.subprotocol && whole.deflates == single.deflates,
          "the same answer");
  require(whole.peer_code == single.peer_code, "the same Close");
  // A client's errors may show what its key was.
  require(data[0] % 2 == 1 || whole.error == single.error, "the same error");
  const std::size_t common = std::min(whole.data.size(), single.data.size());
  require(whole.data.compare(0, common, single.data, 0, common) == 0, "the same packets");
  require(whole.end == Status::failed || whole.data.size() == single.data.size(), "all of them");
  return 0;
}
