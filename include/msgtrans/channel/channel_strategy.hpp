// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/channel/broadcast_channel.hpp>
#include <msgtrans/channel/sync_channel.hpp>

namespace msgtrans {

/// Which channel for which scene; docs/channels.md says why.
enum class ChannelStrategy : unsigned char {
  sync_high_perf,   ///< control, between plain threads: SyncChannel
  async_high_perf,  ///< protocol actors and pipelines: AsyncChannel
  broadcast,        ///< events, to everyone: BroadcastChannel
};

namespace detail {
template <ChannelStrategy Strategy, class T>
struct ChannelOf;
template <class T>
struct ChannelOf<ChannelStrategy::sync_high_perf, T> {
  using type = SyncChannel<T>;
};
template <class T>
struct ChannelOf<ChannelStrategy::async_high_perf, T> {
  using type = AsyncChannel<T>;
};
template <class T>
struct ChannelOf<ChannelStrategy::broadcast, T> {
  using type = BroadcastChannel<T>;
};
}  // namespace detail

/// The class that a strategy means; nothing is decided when the program runs.
template <ChannelStrategy Strategy, class T>
using Channel = typename detail::ChannelOf<Strategy, T>::type;

}  // namespace msgtrans
