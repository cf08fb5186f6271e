// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "shard.hpp"

#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/prefer.hpp>
#include <boost/asio/query.hpp>
#include <boost/asio/require.hpp>
#include <memory>
#include <type_traits>
#include <utility>

namespace msgtrans::detail {

/// The executor of a shard for coroutines that talk to its sessions: what runs on it is in the shard's scope, so that
/// what it sends is appended to the queues directly, and leaves in one write when it comes to rest.
class ShardExecutor {
 public:
  explicit ShardExecutor(std::shared_ptr<Shard> shard) : shard_(std::move(shard)), inner_(shard_->executor()) {}

  template <class F>
  void execute(F&& f) const {
    inner_.execute([shard = shard_, f = std::forward<F>(f)]() mutable {
      Shard::Scope scope(*shard);
      std::move(f)();
    });
  }

  template <class Property>
  requires asio::can_query<const asio::any_io_executor&, Property>::value decltype(auto) query(
      const Property& property) const {
    return asio::query(inner_, property);
  }
  template <class Property>
  requires asio::can_require<const asio::any_io_executor&, Property>::value ShardExecutor
  require(const Property& property)
  const { return ShardExecutor(shard_, asio::require(inner_, property)); }
  template <class Property>
  requires asio::can_prefer<const asio::any_io_executor&, Property>::value ShardExecutor
  prefer(const Property& property)
  const { return ShardExecutor(shard_, asio::prefer(inner_, property)); }

  friend bool operator==(const ShardExecutor& a, const ShardExecutor& b) noexcept {
    return a.shard_ == b.shard_ && a.inner_ == b.inner_;
  }

 private:
  ShardExecutor(std::shared_ptr<Shard> shard, asio::any_io_executor inner)
      : shard_(std::move(shard)), inner_(std::move(inner)) {}

  std::shared_ptr<Shard> shard_;
  asio::any_io_executor inner_;
};

}  // namespace msgtrans::detail
