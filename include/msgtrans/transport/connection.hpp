// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <msgtrans/detail/asio.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/protocol/time.hpp>
#include <msgtrans/transport/tls.hpp>
#include <optional>
#include <span>
#include <string>
#include <sys/uio.h>
#include <utility>

namespace msgtrans {

namespace detail {
class ReadyState;
}

/// By which a connection says that it can go on where it was blocked. Copies say it to the same session, which may be
/// gone. Any thread; O(1), never blocks. Saying it for nothing costs a turn and is harmless.
class ReadySignal {
 public:
  /// Says it to nobody.
  ReadySignal() noexcept = default;

  /// `read` would give something now, or the end, or a failure.
  void readable() const noexcept;
  /// `write`, `flush` or `shut_down` would take something now; or the peer has taken all that it was sent.
  void writable() const noexcept;
  /// The session's, on which all calls of the connection are made; for waiting there.
  [[nodiscard]] const detail::asio::any_io_executor& executor() const;

 private:
  friend class detail::ReadyState;
  explicit ReadySignal(std::shared_ptr<detail::ReadyState> state) noexcept : state_(std::move(state)) {}

  std::shared_ptr<detail::ReadyState> state_;
};

/// What a transport implements: one connection, to which the library gives the bytes of packets, and which gives it
/// those of the peer, both in order and without loss. All calls are made on one thread at a time, that of the session;
/// none may wait. One that cannot go on says `blocked`, and later tells the `ReadySignal`.
///
///     attach, handshake... -> (read | write | flush)... -> shut_down... ;   destroyed at any time
///
/// Destroyed without `shut_down` the connection has been cut: the peer should see an end, and if bytes were lost a
/// failure. A std::exception that is thrown ends the session as if there were no memory.
class Connection {
 public:
  enum class Status : std::uint8_t {
    done,
    blocked,  ///< it cannot go on now
    ended,    ///< the peer has ended its side in order; no byte follows
    failed,   ///< `error` says why; only destroying is left
  };

  Connection() = default;
  virtual ~Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  /// The first call, once. Not made where the library itself watches the connection's socket.
  virtual void attach(ReadySignal) {}

  /// Goes on with what has to be agreed before the first packet: `done`, `blocked` or `failed`. Until done, whenever
  /// the signal is told. Writes what the peer should be told of a failure. The listener's handshake timeout, or the
  /// client's connect timeout, is the library's.
  virtual Status handshake() { return Status::done; }

  /// Bytes of packets into `into`, as many as there are: `done` with `count` above zero, else `blocked`, `ended` or
  /// `failed`. Answers what the transport itself is asked (a ping, a key update) if it can, else `wants_write`.
  virtual Status read(std::span<std::byte> into, std::size_t& count) = 0;
  /// True if `read` would give something though the signal may not be told again; only of what is bounded.
  [[nodiscard]] virtual bool has_input() const noexcept { return false; }

  /// Takes bytes of packets, `taken` of them, possibly fewer than offered and none of a failure: `done` if all taken is
  /// written, `blocked` if the peer can take no more now, also if something was taken. What was taken is its own from
  /// then on, at most some hundred KiB. The bytes of all calls, one behind the other, are whole packets.
  virtual Status write(std::span<const iovec> pieces, std::size_t& taken) = 0;
  /// Writes what was taken and what the transport itself has to say: `done`, `blocked` or `failed`.
  virtual Status flush() { return Status::done; }
  /// True if it has something that `flush` would write.
  [[nodiscard]] virtual bool wants_write() const noexcept { return false; }
  /// Bytes on their way that the peer has not taken yet, its own end counted as one or not at all; 0 if it cannot tell.
  /// A session that ends waits until there are none, and one whose peer takes some of them is not stalled.
  [[nodiscard]] virtual std::size_t unacknowledged() const noexcept { return 0; }

  /// Tells the peer that this end is over, behind everything taken: `done`, `blocked` or `failed`.
  virtual Status shut_down(const Error& reason) = 0;
  /// True if the peer answers to `shut_down` with its own end, which is then waited for.
  [[nodiscard]] virtual bool awaits_peers_end() const noexcept { return false; }

  /// After `ended`: what the peer said of it, if it did.
  [[nodiscard]] virtual Error end_reason() const { return {}; }
  /// After `blocked` of `handshake`: what is being waited for.
  [[nodiscard]] virtual std::string describe_handshake() const { return {}; }
  /// After the handshake.
  [[nodiscard]] virtual std::optional<TlsPeer> tls_peer() const { return std::nullopt; }

  /// When `keep_alive` is due, after the handshake; TimePoint::max() if never.
  [[nodiscard]] virtual protocol::TimePoint keep_alive_due() const noexcept { return protocol::TimePoint::max(); }
  /// Asks the peer whether it is there: `done`, or `failed` if it has not answered. Then as after `read`, something may
  /// have to be flushed. Called when it is due and the session reads.
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

}  // namespace msgtrans
