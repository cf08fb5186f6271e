// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <msgtrans/error.hpp>
#include <msgtrans/protocol/time.hpp>
#include <msgtrans/transport/tls.hpp>
#include <optional>
#include <span>
#include <string>
#include <sys/uio.h>
#include <utility>

namespace msgtrans::detail {

/// What stands between a session's packets and its socket where the packets are not simply the socket's bytes: TLS,
/// WebSocket. It has the descriptor lent, which is non-blocking and outlives it. On one thread at a time; no call
/// waits.
///
///     handshake... -> (read | write | flush)... -> shut_down... ;   destroyed at any time
class Connection {
 public:
  enum class Status : std::uint8_t {
    done,
    blocked,  ///< the socket cannot go on now: again when it is readable, or writable if `wants_write`
    ended,    ///< the peer has ended its side in order; no byte follows
    failed,   ///< `error` says why; only destroying is left
  };

  Connection() = default;
  virtual ~Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  /// Goes on with what has to be agreed before the first packet: `done`, `blocked` or `failed`. Once after
  /// construction, then whenever the socket is ready, until done. Writes what the peer should be told of a failure.
  virtual Status handshake() = 0;

  /// Bytes of packets into `into`, as many as there are: `done` with `count` above zero, else `blocked`, `ended` or
  /// `failed`. Answers what the transport itself is asked (a ping, a key update) if it can, else `wants_write`.
  virtual Status read(std::span<std::byte> into, std::size_t& count) = 0;
  /// True if `read` would give something though the socket has nothing more.
  [[nodiscard]] virtual bool has_input() const noexcept = 0;

  /// Takes bytes of packets, `taken` of them, possibly fewer than offered and none of a failure: `done` if all taken is
  /// written, `blocked` if the socket is full, also if something was taken. What was taken is its own from then on, at
  /// most some hundred KiB. The bytes of all calls, one behind the other, are whole packets.
  virtual Status write(std::span<const iovec> pieces, std::size_t& taken) = 0;
  /// Writes what was taken and what the transport itself has to say: `done`, `blocked` or `failed`.
  virtual Status flush() = 0;
  /// True if it has something that `flush` would write.
  [[nodiscard]] virtual bool wants_write() const noexcept = 0;

  /// Tells the peer that this end is over, behind everything taken: `done`, `blocked` (again when writable) or
  /// `failed`.
  virtual Status shut_down(const Error& reason) = 0;
  /// True if the peer answers to `shut_down` with its own end, and the socket stays whole until then; false if the
  /// sending side of the socket is shut once `shut_down` is done.
  [[nodiscard]] virtual bool awaits_peers_end() const noexcept = 0;

  /// After `ended`: what the peer said of it, if it did.
  [[nodiscard]] virtual Error end_reason() const { return {}; }
  /// After `blocked` of `handshake`: what is being waited for.
  [[nodiscard]] virtual std::string describe_handshake() const { return {}; }
  /// After the handshake.
  [[nodiscard]] virtual std::optional<TlsPeer> tls_peer() const { return std::nullopt; }

  /// When `keep_alive` is due, after the handshake; TimePoint::max() if never.
  [[nodiscard]] virtual protocol::TimePoint keep_alive_due() const noexcept { return protocol::TimePoint::max(); }
  /// Asks the peer whether it is there: `done`, or `failed` if it has not answered. Then as after `read`, something may
  /// have to be flushed. To be called when it is due and the session reads.
  virtual Status keep_alive(protocol::TimePoint) { return Status::done; }

  /// After `failed`.
  [[nodiscard]] const Error& error() const noexcept { return error_; }

 protected:
  /// \returns `failed`.
  Status fail(Error error) noexcept {
    error_ = std::move(error);
    return Status::failed;
  }

 private:
  Error error_;
};

}  // namespace msgtrans::detail
