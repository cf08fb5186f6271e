// SPDX-License-Identifier: Apache-2.0
// Uses that must not compile, one for each CASE, and must say why: a test each in tests/CMakeLists.txt.
#include <boost/asio/io_context.hpp>
#include <memory>
#include <msgtrans/channel/channel_strategy.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <msgtrans/lockfree/queue.hpp>

struct ThrowingMove {
  ThrowingMove() = default;
  ThrowingMove(const ThrowingMove&) = default;
  ThrowingMove(ThrowingMove&&) noexcept(false) {}
};
struct NoHash {
  friend bool operator==(const NoHash&, const NoHash&) = default;
};

int main() {
  boost::asio::io_context context;
#if CASE == 1
  msgtrans::SyncChannel<ThrowingMove> channel(msgtrans::ChannelCapacity::unbounded());
#elif CASE == 2
  msgtrans::AsyncChannel<ThrowingMove> channel(context.get_executor(), msgtrans::ChannelCapacity::unbounded());
#elif CASE == 3
  msgtrans::BroadcastChannel<ThrowingMove> channel(context.get_executor(), 4);
#elif CASE == 4
  msgtrans::BroadcastChannel<std::unique_ptr<int> > channel(context.get_executor(), 4);
#elif CASE == 5
  msgtrans::lockfree::LockFreeQueue<ThrowingMove> queue;
#elif CASE == 6
  msgtrans::lockfree::LockFreeHashMap<NoHash, int> map;
  map.insert(NoHash(), 1);
#elif CASE == 7
  msgtrans::SyncChannel<int> channel;  // bounded or not has to be said
#endif
}
