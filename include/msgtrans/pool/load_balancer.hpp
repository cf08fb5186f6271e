// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <msgtrans/control.hpp>
#include <msgtrans/detail/asio.hpp>
#include <msgtrans/event.hpp>
#include <msgtrans/pool/connection_pool.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace msgtrans {

namespace detail {

class Balancer;

[[nodiscard]] PoolRequestPtr make_request(const std::shared_ptr<Balancer>& balancer, BytesView payload,
                                          const RequestOptions& options, std::string_view key);

}  // namespace detail

/// Whom a load balancer chooses, of the endpoints that are marked healthy.
enum class Balance : std::uint8_t {
  /// One after the other. O(endpoints).
  round_robin,
  /// Who has the fewest connections in use and calls waiting for one; of equals, one after the other. O(endpoints).
  least_loaded,
  /// By a key: the same one as long as it is there, and when an endpoint comes or goes only the keys that it gets or
  /// had
  /// change theirs. A ring of hashes with virtual nodes: D. Karger et al., "Consistent Hashing and Random Trees" (STOC
  /// 1997). Calls without a key take turns. O(log(endpoints * virtual nodes)).
  consistent_hash,
};

[[nodiscard]] const char* to_string(Balance balance) noexcept;

/// Checked by the constructor of `LoadBalancer`.
struct LoadBalancerOptions {
  Balance balance = Balance::round_robin;
  /// The endpoints to begin with; no two alike. `LoadBalancer::add` adds more.
  std::vector<std::string> urls = {};
  /// For each endpoint's pool. Its `url`, `executor` and `control` must not be set.
  ConnectionPoolOptions pool = {};
  /// Places an endpoint has on the ring: more make it more even, and cost memory. 1 to 10,000.
  std::size_t virtual_nodes = 128;
  /// Your own executor, under the same conditions as `ServerOptions::executors`. None: one thread for all endpoints.
  detail::asio::any_io_executor executor = {};
  /// As `ConnectionPoolOptions::control`; for all pools.
  std::optional<Control> control = {};
};

/// One endpoint's counters.
struct EndpointStats {
  std::string url;
  bool healthy = true;
  std::uint64_t requests = 0;  ///< that got a connection here, ended
  std::uint64_t failed = 0;    ///< of these, without an answer
  std::uint64_t passed = 0;    ///< that got no connection here, and went on to another endpoint or failed
  PoolStats pool;
};

struct LoadBalancerStats {
  std::vector<EndpointStats> endpoints;  ///< in the order they were added
  std::size_t leaving = 0;               ///< removed, and something of theirs is still in use
};

/// Spreads requests over several endpoints, each with a pool of its own.
///
/// A request that could get no connection at an endpoint, because it cannot be reached or its pool is exhausted for
/// `acquire_timeout`, goes on to the next healthy one, as nothing was sent. A request that may have been sent is never
/// sent again: if its connection ends, it fails with `connection_lost`.
///
/// An endpoint is healthy until somebody says otherwise: `set_healthy`, or a `HealthChecker`. If all are marked
/// unhealthy the marks are ignored, since a check that fails everywhere is more often wrong than right; if no endpoint
/// can then be reached, calls fail with what the last one said.
///
/// Thread safety: every call from any thread, except the destructor.
class LoadBalancer {
 public:
  /// \throws Exception: `invalid_option`, `invalid_address`.
  explicit LoadBalancer(LoadBalancerOptions options);
  /// As the destructor of `ConnectionPool`, for every endpoint.
  ~LoadBalancer();
  LoadBalancer(const LoadBalancer&) = delete;
  LoadBalancer& operator=(const LoadBalancer&) = delete;

  /// Adds an endpoint. O(endpoints * virtual nodes). \throws Exception: `invalid_address`; `invalid_option` if it is
  /// there; `closed`.
  void add(std::string_view url);
  /// Takes an endpoint out for good: no request is given to it any more, those that have a connection go on, and
  /// connections are closed when they are given back; who waits for one goes on to another endpoint. False if there is
  /// none.
  bool remove(std::string_view url);
  /// Marks an endpoint. False if there is none.
  bool set_healthy(std::string_view url, bool healthy);

  /// The pool that a request with that key would go to; null if there is no endpoint. For more than one request on the
  /// same connection. The pool may be kept longer than the balancer.
  [[nodiscard]] std::shared_ptr<ConnectionPool> pick(std::string_view key = {});

  /// Asks one of the endpoints; the bytes are copied by this call. `key` matters to `Balance::consistent_hash`; empty
  /// is none. Completes with `void(error_code, Reply)`: as `ConnectionPool::async_request`; or the error of the last
  /// endpoint's connect, if none could be had; or `not_found`, if there is no endpoint. Cancellation (all types): ends
  /// it at once.
  template <class CompletionToken>
  auto async_request(BytesView payload, const RequestOptions& options, std::string_view key, CompletionToken&& token) {
    return detail::asio::async_initiate<CompletionToken, void(error_code, Reply)>(
        [](auto handler, detail::PoolRequestPtr request) {
          detail::start_request(std::move(request), std::move(handler));
        },
        token, detail::make_request(balancer_, payload, options, key));
  }
  template <class CompletionToken>
  auto async_request(BytesView payload, const RequestOptions& options, CompletionToken&& token) {
    return async_request(payload, options, std::string_view(), std::forward<CompletionToken>(token));
  }
  template <class CompletionToken>
  auto async_request(BytesView payload, CompletionToken&& token) {
    return async_request(payload, RequestOptions{}, std::string_view(), std::forward<CompletionToken>(token));
  }
  /// The same for programs without Asio: blocks the thread. \throws Exception with the error.
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options = {}, std::string_view key = {});
  /// The same; on failure an empty reply, and `error` is set.
  [[nodiscard]] Reply request(BytesView payload, const RequestOptions& options, std::string_view key, Error& error);

  /// As `ConnectionPool::close`, for every endpoint.
  void close();

  [[nodiscard]] LoadBalancerStats stats() const;
  /// News of all its pools, and of health checks; with `LoadBalancerOptions::control`, all that loop's news. \throws
  /// Exception with `closed` if the context of your executor has been destroyed.
  [[nodiscard]] Subscription<Event> subscribe();
  /// What handlers run on that have no executor of their own.
  [[nodiscard]] detail::asio::any_io_executor get_executor() const noexcept;

  /// For the library's own use.
  [[nodiscard]] const std::shared_ptr<detail::Balancer>& impl() const noexcept { return balancer_; }

 private:
  std::shared_ptr<detail::Balancer> balancer_;
};

}  // namespace msgtrans
