// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "hash_ring.hpp"
#include "pool.hpp"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <msgtrans/pool/load_balancer.hpp>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace msgtrans::detail {

/// Whom the policy chooses of `count` endpoints, by index; none if none is usable. `turn` counts the choices; `key` is
/// the hash of a key. `usable(i)` and `load(i)` say what is known of them.
template <class Usable, class Load>
std::optional<std::size_t> choose(Balance balance, std::size_t count, std::uint64_t turn, Usable usable, Load load,
                                  const HashRing& ring, std::optional<std::uint64_t> key) {
  if (balance == Balance::consistent_hash && key) return ring.find(*key, usable);
  std::size_t there = 0;
  for (std::size_t i = 0; i < count; ++i) there += usable(i) ? 1 : 0;
  if (there == 0) return std::nullopt;
  // Among the usable ones, so that the neighbour of one that is not gets no more than the others.
  std::size_t skip = static_cast<std::size_t>(turn % there);
  std::optional<std::size_t> best;
  std::size_t least = 0;
  const bool by_load = balance == Balance::least_loaded;
  // From the one whose turn it is, around.
  std::size_t first = 0;
  for (;; ++first) {
    if (!usable(first)) continue;
    if (skip == 0) break;
    --skip;
  }
  if (!by_load) return first;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = (first + i) % count;
    if (!usable(at)) continue;
    const std::size_t its = load(at);
    if (best && its >= least) continue;
    best = at;
    least = its;
  }
  return best;
}

/// One endpoint of a balancer.
struct BalancedEndpoint {
  explicit BalancedEndpoint(ConnectionPoolOptions options)
      : pool(std::make_shared<ConnectionPool>(std::move(options))) {}

  [[nodiscard]] const std::string& url() const noexcept { return pool->url(); }
  [[nodiscard]] EndpointStats stats() const;

  const std::shared_ptr<ConnectionPool> pool;
  std::atomic<bool> healthy{true};
  std::atomic<std::uint64_t> requests{0};
  std::atomic<std::uint64_t> failed{0};
  std::atomic<std::uint64_t> passed{0};
};
using EndpointPtr = std::shared_ptr<BalancedEndpoint>;

/// What `LoadBalancer` refers to.
class Balancer final : public std::enable_shared_from_this<Balancer> {
 public:
  /// The endpoints at one time; never changed.
  struct Endpoints {
    std::vector<EndpointPtr> all;
    HashRing ring;
  };

  explicit Balancer(LoadBalancerOptions options);
  void start();

  // All from any thread.

  void add(std::string_view url);
  bool remove(std::string_view url);
  bool set_healthy(std::string_view url, bool healthy);
  /// Not one of `tried`; null if there is none left. `turn` is of the same request each time.
  [[nodiscard]] EndpointPtr choose_endpoint(std::uint64_t turn, std::optional<std::uint64_t> key,
                                            const std::vector<EndpointPtr>& tried) const;
  [[nodiscard]] std::uint64_t next_turn() noexcept { return turn_.fetch_add(1, std::memory_order_relaxed); }
  [[nodiscard]] std::shared_ptr<const Endpoints> endpoints() const;
  void close();
  void destroy();
  [[nodiscard]] LoadBalancerStats stats() const;

  [[nodiscard]] const std::shared_ptr<Shard>& shard() const noexcept { return shard_; }
  /// Null once the context of the user's executor has gone.
  [[nodiscard]] std::shared_ptr<ControlLoop> loop() const noexcept {
    const std::lock_guard lock(mutex_);
    return loop_;
  }
  [[nodiscard]] bool has_ended() const noexcept { return finishing_.load(); }
  [[nodiscard]] bool is_closed() const noexcept { return closed_.load(); }

 private:
  [[nodiscard]] EndpointPtr make_endpoint(std::string_view url) const;
  void replace(std::vector<EndpointPtr> all);
  void pool_finished() noexcept;
  void finish() noexcept;
  void set_finished();

  const LoadBalancerOptions options_;
  const std::shared_ptr<Shard> shard_;
  const bool owns_loop_;
  std::atomic<std::uint64_t> turn_{0};
  std::atomic<bool> closed_{false};
  std::atomic<bool> finishing_{false};

  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::shared_ptr<ControlLoop> loop_;
  std::shared_ptr<const Endpoints> endpoints_;
  mutable std::vector<EndpointPtr> leaving_;  // removed; kept, as their pools' destructors would cut what is in use
  std::size_t pools_left_ = 0;                // of a balancer that is destroyed
  bool finished_ = false;
  bool left_to_users_ = false;
};

}  // namespace msgtrans::detail
