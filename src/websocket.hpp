// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/protocol/time.hpp>
#include <msgtrans/transport/connection.hpp>
#include <msgtrans/transport/websocket.hpp>
#include <msgtrans/wire/header.hpp>
#include <msgtrans/wire/websocket.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <sys/uio.h>
#include <utility>
#include <vector>

namespace msgtrans::detail {

/// WebSocket above a socket, or above another connection (TLS: `wss`).
///
/// After the peer's Close `read` says `ended`; what is still owed may be written then, and `shut_down` answers with the
/// Close that ends the connection (RFC 6455, 5.5.1, lets it wait for that). A peer that breaks the rules is sent a
/// Close with the reason before `failed` is returned, if the socket takes it.
class WebSocketConnection final : public Connection {
 public:
  /// Who carries the bytes.
  struct Below {
    Below(int socket) noexcept : descriptor(socket) {}
    template <std::derived_from<Connection> C>
    Below(std::unique_ptr<C> other) noexcept : connection(std::move(other)) {}

    int descriptor = -1;
    std::unique_ptr<Connection> connection;
  };

  /// The end that waits for the request, which must be for `path`.
  static std::unique_ptr<WebSocketConnection> server(Below below, std::shared_ptr<const WebSocketServerOptions> options,
                                                     std::string path, const wire::Limits& limits);
  /// The end that makes it: of `target` (`/path?query`), from the server known as `host` (`example.org:8002`).
  static std::unique_ptr<WebSocketConnection> client(Below below, std::shared_ptr<const WebSocketClientOptions> options,
                                                     std::string host, std::string target, const wire::Limits& limits);
  ~WebSocketConnection() override;

  Status handshake() override;
  /// Before it: a server's end is to answer that it has no place (503), or that too many come at once (429).
  void refuse_handshake(Error why);
  Status read(std::span<std::byte> into, std::size_t& count) override;
  [[nodiscard]] bool has_input() const noexcept override;
  Status write(std::span<const iovec> pieces, std::size_t& taken) override;
  Status flush() override;
  [[nodiscard]] bool wants_write() const noexcept override;
  Status shut_down(const Error& reason) override;
  [[nodiscard]] bool awaits_peers_end() const noexcept override;

  /// Where a handshake that is not over stands, for the error of one that takes too long.
  [[nodiscard]] std::string describe_handshake() const override;
  /// What was agreed; empty: none.
  [[nodiscard]] const std::string& subprotocol() const noexcept { return subprotocol_; }
  /// Whether permessage-deflate was agreed on.
  [[nodiscard]] bool deflates() const noexcept { return deflates_; }

  /// When `keep_alive` is due; `TimePoint::max()`: never.
  [[nodiscard]] protocol::TimePoint keep_alive_due() const noexcept override { return keep_alive_due_; }
  /// Sends a ping if it is time and nothing has come, `failed` if too many had no answer. Once after the handshake,
  /// then whenever it is due and the session reads; then as after `read`, something may have to be flushed.
  Status keep_alive(protocol::TimePoint now) override;

  /// Why `read` said `ended`, with the code and the text of the peer's Close.
  [[nodiscard]] Error end_reason() const override;
  [[nodiscard]] std::optional<TlsPeer> tls_peer() const override { return below_ ? below_->tls_peer() : std::nullopt; }
  /// `close_code::no_status` if the Close had none; 0 before it.
  [[nodiscard]] std::uint16_t peer_close_code() const noexcept { return peer_code_; }
  [[nodiscard]] std::string_view peer_close_text() const noexcept {
    return peer_text_ ? *peer_text_ : std::string_view();
  }

 private:
  struct Handshake;
  struct Pong;

  WebSocketConnection(Below below, wire::WebSocketRole role, const wire::Limits& limits,
                      std::chrono::milliseconds ping_interval, std::uint32_t max_missed_pings);

  Status serve_handshake();
  Status take_request(std::string_view head);
  Status ask_handshake();
  Status take_answer(std::string_view head);
  /// Reads on until the head of a request or an answer is whole.
  Status read_head(std::size_t limit, std::string_view& head);
  Status refuse(unsigned status, const std::string& cause, std::string_view headers = {});

  /// From below, as `read`.
  Status receive(std::span<std::byte> into, std::size_t& count);
  /// To below, as `write`.
  Status transmit(std::span<iovec> pieces, std::size_t& taken);
  Status flush_pending();
  /// One round of `read` where messages may be compressed.
  Status read_inflating(std::span<std::byte>& out);
  /// `Out` is the place for packets, as the reader knows it: `std::byte*` or `std::span<std::byte>`.
  template <class Out>
  Status take_frames(std::span<const std::byte>& in, Out& out);
  Status at_end();
  void take_close();
  void agree_to_deflate(const WebSocketDeflateOptions& options, int window_bits);
  struct Front;
  struct Unsent;
  Front deflate_front(Unsent& unsent, std::span<std::byte>& room);
  /// \returns the length of the frame that was put to the front of `to`; 0 if the packet gets no smaller.
  std::size_t put_deflated(const Unsent& unsent, std::size_t size, std::span<std::byte> to);
  /// Appends a control frame if it may be sent now; false if not.
  bool put_control(wire::Opcode opcode, std::span<const std::byte> payload);
  void put_pong();
  [[nodiscard]] bool may_put_control() const noexcept;
  [[nodiscard]] std::optional<wire::MaskKey> control_key() const;
  void append(std::span<const std::byte> bytes);
  Status refuse_frames();
  /// Before `failed`: lets the peer have what was written, though it may have sent more than was read.
  void part();

  int descriptor_;
  wire::WebSocketRole role_;
  bool handshaken_ = false;
  bool heard_ = true;              // something since the last ping
  bool ping_out_ = false;          // a ping was sent and nothing has come since
  bool close_sent_ = false;        // or need not be
  bool close_impossible_ = false;  // ended within a frame
  bool end_told_ = false;
  bool blocked_ = false;   // the socket took less than it was offered
  bool deflates_ = false;  // as agreed
  std::uint16_t peer_code_ = 0;
  std::uint32_t missed_pings_ = 0;
  std::uint32_t max_missed_pings_;
  std::chrono::milliseconds ping_interval_;
  protocol::TimePoint keep_alive_due_;
  std::unique_ptr<Connection> below_;
  std::unique_ptr<Handshake> handshake_;  // until it is over
  std::vector<std::byte> input_;          // came, and was not read yet
  std::vector<std::byte> pending_;        // to be written; from pending_at_ on
  std::size_t pending_at_ = 0;
  std::unique_ptr<Pong> pong_;      // the latest that could not be put into pending_
  std::unique_ptr<Error> failure_;  // told once everything before it has been read
  std::unique_ptr<std::string> peer_text_;
  std::string subprotocol_;
  WebSocketDeflateOptions deflate_;
  wire::FrameReader reader_;
  wire::PacketFramer framer_;
};

}  // namespace msgtrans::detail
