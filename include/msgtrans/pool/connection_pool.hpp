// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/asio/associated_allocator.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/bind_allocator.hpp>
#include <boost/asio/post.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <msgtrans/channel/broadcast_channel.hpp>
#include <msgtrans/client_transport.hpp>
#include <msgtrans/control.hpp>
#include <msgtrans/detail/asio.hpp>
#include <msgtrans/event.hpp>
#include <optional>
#include <string>
#include <utility>

namespace msgtrans {

class PooledConnection;

namespace detail {

class Pool;
class PoolSlot;
class PoolRequest;
struct PoolRequestDeleter {
  void operator()(PoolRequest* request) const noexcept;
};
using PoolRequestPtr = std::unique_ptr<PoolRequest, PoolRequestDeleter>;
using AcquireHandler = asio::any_completion_handler<void(error_code, PooledConnection)>;

}  // namespace detail

/// How a pool asks a connection that nobody uses whether it still works.
struct PoolProbe {
  /// After so long without use, and again each time; 0: never.
  std::chrono::milliseconds interval{0};
  /// For the answer. At least 1 ms.
  std::chrono::milliseconds timeout{1'000};
  /// The request.
  std::string payload = {};
  std::uint8_t biz_type = 0;
  /// Whether the answer will do; if there is none, any answer does. On the pool's executor; must not block. An
  /// exception counts as false.
  std::function<bool(const Reply&)> accept = {};
};

/// How long a pool waits after a failed attempt to connect before the next one. After a failure one attempt is made at
/// a time, until one succeeds. A connection that ends within `initial` of being made, before anybody had it, counts as
/// a failed attempt.
struct ConnectBackoff {
  std::chrono::milliseconds initial{100};  ///< at least 1 ms
  double factor = 1.6;                     ///< 1 to 100
  std::chrono::milliseconds max{30'000};   ///< at least `initial`
};

/// Checked by the constructor of `ConnectionPool`. Durations: zero means off.
struct ConnectionPoolOptions {
  /// Whom to connect to, as for `ClientTransport::connect`.
  std::string url = {};
  /// Connections that are kept, whether or not somebody needs them. At most `max_connections`.
  std::size_t min_connections = 0;
  /// Connections at once, those being made included; those being closed are not. 1 to 100,000.
  std::size_t max_connections = 8;
  /// A connection above `min_connections` that nobody has used for so long is closed.
  std::chrono::milliseconds idle_time{60'000};
  /// A connection that is older is closed as soon as nobody uses it, and replaced as a broken one is.
  std::chrono::milliseconds lifetime{0};
  PoolProbe probe = {};
  /// How long to wait in line for a connection.
  std::chrono::milliseconds acquire_timeout{5'000};
  ConnectBackoff backoff = {};
  /// Of each connection. `client.executor` must not be set: see `executor`.
  ClientOptions client = {};
  /// Called for what the server sends on its own account, as `ClientTransport::on_message`.
  MessageHandler on_message = {};
  /// Your own executor, under the same conditions as `ServerOptions::executors`; then no thread is started. None: one
  /// thread for all connections of the pool.
  detail::asio::any_io_executor executor = {};
  /// Whose control loop to use and whose subscribers to tell, say a server's. None: a loop of the pool's own, on its
  /// executor.
  std::optional<Control> control = {};
};

/// A pool's counters. Each is exact; the whole is not one instant's picture.
struct PoolStats {
  std::size_t min_connections = 0;  ///< as last resized
  std::size_t max_connections = 0;  ///< as last resized
  std::size_t idle = 0;             ///< connected, for anybody to take
  std::size_t in_use = 0;           ///< handed out
  std::size_t connecting = 0;       ///< being made
  std::size_t probing = 0;          ///< being probed
  std::size_t waiting = 0;          ///< calls in line

  std::uint64_t made = 0;      ///< attempts to connect that succeeded
  std::uint64_t failed = 0;    ///< attempts to connect that failed
  std::uint64_t replaced = 0;  ///< made in the place of one that was broken, too old, failed its probe or was discarded

  std::uint64_t closed_idle = 0;       ///< unused for `idle_time`
  std::uint64_t closed_expired = 0;    ///< older than `lifetime`
  std::uint64_t closed_broken = 0;     ///< ended by itself
  std::uint64_t closed_probe = 0;      ///< failed its probe
  std::uint64_t closed_shrunk = 0;     ///< above a lowered maximum
  std::uint64_t closed_discarded = 0;  ///< by `PooledConnection::discard`
  std::uint64_t closed_at_end = 0;     ///< because the pool was closed

  std::uint64_t acquired = 0;   ///< handed out
  std::uint64_t waited = 0;     ///< calls that found no connection and stood in line; they end in `acquired` or below
  std::uint64_t timed_out = 0;  ///< left the line because of `acquire_timeout`
  std::uint64_t cancelled = 0;  ///< left the line because they were cancelled
  std::uint64_t refused = 0;    ///< left the line because the pool was closed, or could not connect (`LoadBalancer`)

  std::uint64_t handler_failures = 0;  ///< exceptions of completion handlers and of `PoolProbe::accept`

  [[nodiscard]] std::uint64_t closed() const noexcept {
    return closed_idle + closed_expired + closed_broken + closed_probe + closed_shrunk + closed_discarded +
           closed_at_end;
  }
};

/// A connection out of a pool, for one user at a time; gives it back when it is destroyed. Move-only; one thread at a
/// time, but the transport it leads to may be used as every `ClientTransport`, by many.
///
/// Give it back when what you began on it is done: whoever has it next shares its fate. It may be used and given back
/// after the pool has been destroyed; then its calls say `closed`.
class PooledConnection {
 public:
  PooledConnection() noexcept = default;
  PooledConnection(PooledConnection&&) noexcept = default;
  PooledConnection& operator=(PooledConnection&& other) noexcept {
    PooledConnection(std::move(other)).swap(*this);
    return *this;
  }
  ~PooledConnection();

  /// False if there is none in it: empty, moved from, or discarded.
  explicit operator bool() const noexcept { return slot_ != nullptr; }
  [[nodiscard]] ClientTransport& operator*() const noexcept { return *client_; }
  [[nodiscard]] ClientTransport* operator->() const noexcept { return client_; }

  /// Gives it back as one that must not be used again, say after an answer that makes no sense. What was accepted for
  /// sending is still written; then it is closed, and replaced if need be. Nothing if empty.
  void discard() noexcept;

  void swap(PooledConnection& other) noexcept {
    slot_.swap(other.slot_);
    std::swap(client_, other.client_);
  }

 private:
  friend class detail::Pool;
  friend class detail::PoolRequest;
  PooledConnection(std::shared_ptr<detail::PoolSlot> slot, ClientTransport& client) noexcept
      : slot_(std::move(slot)), client_(&client) {}

  std::shared_ptr<detail::PoolSlot> slot_;
  ClientTransport* client_ = nullptr;
};

namespace detail {

[[nodiscard]] PooledConnection try_acquire(Pool& pool) noexcept;
[[nodiscard]] asio::any_io_executor executor_of(const Pool& pool) noexcept;
void start_acquire(const std::shared_ptr<Pool>& pool, AcquireHandler handler);

template <class Handler>
void acquire(const std::shared_ptr<Pool>& pool, Handler handler) {
  PooledConnection found = try_acquire(*pool);
  if (!found) return start_acquire(pool, std::move(handler));
  auto executor = asio::get_associated_executor(handler, executor_of(*pool));
  auto allocator = asio::get_associated_allocator(handler);
  asio::post(executor,
             asio::bind_allocator(allocator, [handler = std::move(handler), found = std::move(found)]() mutable {
               std::move(handler)(error_code(), std::move(found));
             }));
}

[[nodiscard]] PoolRequestPtr make_request(const std::shared_ptr<Pool>& pool, BytesView payload,
                                          const RequestOptions& options);
void start_request(PoolRequestPtr request, ReplyHandler handler);

}  // namespace detail

/// Connections to one server, for many users one after the other.
///
/// Taking one that is there, when nobody waits, is a pop from a lock-free list, from any thread. Otherwise the call
/// stands in line: first come, first served, and who comes later never overtakes, neither for a connection given back
/// nor for a new one. Connections are made when somebody waits and there are fewer than the maximum. Those that break
/// are noticed and dropped at once; down to the minimum they are replaced unasked, with backoff while the server cannot
/// be reached. While it cannot, calls wait in line, and time out there.
///
/// Thread safety: every call from any thread, except the destructor. Calls that block fail with `blocking_on_shard` on
/// a thread that must not, and never return on the thread that runs your own executor.
class ConnectionPool {
 public:
  /// Begins to make the minimum of connections. \throws Exception: `invalid_option`, `invalid_address`.
  explicit ConnectionPool(ConnectionPoolOptions options);
  /// `close`, and ends what is still connected, in use or not, at once: requests under way fail with `connection_lost`,
  /// what waits with `closed`. Waits for its thread, unless called by a handler, or while somebody still has a
  /// `PooledConnection`: then the thread ends when that is given back. No handler of the options runs when it has
  /// returned.
  ~ConnectionPool();
  ConnectionPool(const ConnectionPool&) = delete;
  ConnectionPool& operator=(const ConnectionPool&) = delete;

  /// Completes with `void(error_code, PooledConnection)`: success; `boost::asio::error::timed_out` after
  /// `acquire_timeout`; `closed`; `operation_aborted`. Never inside the call; on the handler's executor (by default the
  /// pool's). Cancellation (all types) leaves the line; a connection is never lost by it.
  template <class CompletionToken>
  auto async_acquire(CompletionToken&& token) {
    return detail::asio::async_initiate<CompletionToken, void(error_code, PooledConnection)>(
        [](auto handler, std::shared_ptr<detail::Pool> pool) { detail::acquire(pool, std::move(handler)); }, token,
        pool_);
  }
  /// The same for programs without Asio: blocks the thread. \throws Exception with the error.
  [[nodiscard]] PooledConnection acquire();
  /// The same; on failure an empty one, and `error` is set. Its text names the last failure to connect, if there was
  /// one since the last success.
  [[nodiscard]] PooledConnection acquire(Error& error);
  /// One that is there at once, or an empty one: also while others wait. Never blocks, and makes no connection.
  [[nodiscard]] PooledConnection try_acquire() noexcept { return detail::try_acquire(*pool_); }

  /// Acquires, asks, gives back. The bytes are copied by this call. Completes with `void(error_code, Reply)`: as
  /// `async_acquire`, then as `Session::async_request`, whose timeout begins when there is a connection. A request that
  /// a connection did not take since it had ended goes to another one; one that may have been sent never does: it fails
  /// with `connection_lost`. Cancellation (all types): ends it at once.
  template <class CompletionToken>
  auto async_request(BytesView payload, const RequestOptions& options, CompletionToken&& token) {
    return detail::asio::async_initiate<CompletionToken, void(error_code, Reply)>(
        [](auto handler, detail::PoolRequestPtr request) {
          detail::start_request(std::move(request), std::move(handler));
        },
        token, detail::make_request(pool_, payload, options));
  }
  template <class CompletionToken>
  auto async_request(BytesView payload, CompletionToken&& token) {
    return async_request(payload, RequestOptions{}, std::forward<CompletionToken>(token));
  }
  /// The same for programs without Asio: blocks the thread. \throws Exception with the error.
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options = {});
  /// The same; on failure an empty reply, and `error` is set.
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options, Error& error);

  /// Changes the limits, by way of the control loop: when it has been there, idle connections above the maximum are
  /// closed, those in use when they are given back, and missing ones made. Returns at once.
  /// \throws Exception: `invalid_option`; `closed` if the pool or its control loop has ended. Nothing has changed then.
  void resize(std::size_t min_connections, std::size_t max_connections);

  /// Ends it: who waits, and every later call, gets `closed`; attempts to connect are given up; connections are closed,
  /// those in use when they are given back. Returns at once. Again: nothing.
  void close();

  [[nodiscard]] PoolStats stats() const;
  /// News of this pool: `pool_grown` and `pool_shrunk`, with the URL as subject; with `ConnectionPoolOptions::control`,
  /// all that loop's news. \throws Exception with `closed` if the
  /// context of your executor has been destroyed.
  [[nodiscard]] Subscription<Event> subscribe();
  [[nodiscard]] const std::string& url() const noexcept;
  /// What handlers run on that have no executor of their own.
  [[nodiscard]] detail::asio::any_io_executor get_executor() const noexcept { return detail::executor_of(*pool_); }

  /// For the library's own use.
  [[nodiscard]] const std::shared_ptr<detail::Pool>& impl() const noexcept { return pool_; }

 private:
  std::shared_ptr<detail::Pool> pool_;
};

}  // namespace msgtrans
