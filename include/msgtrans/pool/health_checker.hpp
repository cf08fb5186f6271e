// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <msgtrans/client_transport.hpp>
#include <msgtrans/pool/load_balancer.hpp>
#include <string>
#include <vector>

namespace msgtrans {

namespace detail {
class Checker;
}

/// Checked by the constructor of `HealthChecker`.
struct HealthCheckerOptions {
  /// From one probe of an endpoint to the next. At least 1 ms.
  std::chrono::milliseconds interval{1'000};
  /// For connecting, if need be, and for the answer, each. At least 1 ms.
  std::chrono::milliseconds timeout{1'000};
  /// Successes, one after the other, that bring an endpoint back. 1 to 1000.
  unsigned rise = 2;
  /// Failures, one after the other, that take an endpoint out. 1 to 1000.
  unsigned fall = 3;
  /// The request.
  std::string payload = {};
  std::uint8_t biz_type = 0;
  /// Whether the answer will do; if there is none, any answer does. On the balancer's executor; must not block. An
  /// exception counts as false.
  std::function<bool(const Reply&)> accept = {};
  /// Of the connections that it probes by. `client.executor` must not be set, and `client.connect_timeout` is
  /// `timeout`.
  ClientOptions client = {};
};

/// What a health checker knows of an endpoint.
struct HealthStats {
  std::string url;
  bool healthy = true;
  std::uint64_t probes = 0;  ///< ended
  std::uint64_t failed = 0;  ///< of these, without an answer that will do
  std::uint64_t downs = 0;   ///< times it was taken out
  std::uint64_t ups = 0;     ///< times it was brought back
};

/// Probes each endpoint of a load balancer, takes out those that fail, and brings them back when they answer again.
/// Each is probed by a connection of its own, not the pool's, that is kept between probes and made anew when it has
/// ended. Says so as events: `endpoint_down` with the last probe's error, and `endpoint_up`, to the balancer's
/// subscribers.
///
/// It marks an endpoint when it changes its mind, so a `LoadBalancer::set_healthy` of yours lasts until then. Endpoints
/// that are added are probed from the next interval on; those removed are forgotten.
///
/// It runs on the balancer's executor and starts no thread. Thread safety: every call from any thread, except the
/// destructor. May outlive the balancer: then it has nothing to probe.
class HealthChecker {
 public:
  /// Begins at once. \throws Exception with `invalid_option`.
  explicit HealthChecker(LoadBalancer& balancer, HealthCheckerOptions options = {});
  /// Ends it; the marks stay as they are. No `accept` runs when it has returned.
  ~HealthChecker();
  HealthChecker(const HealthChecker&) = delete;
  HealthChecker& operator=(const HealthChecker&) = delete;

  /// Of each endpoint that has been probed, in no order.
  [[nodiscard]] std::vector<HealthStats> stats() const;

 private:
  std::shared_ptr<detail::Checker> checker_;
};

}  // namespace msgtrans
