// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>
#include <msgtrans/channel/sync_channel.hpp>
#include <msgtrans/lockfree/counter.hpp>
#include <msgtrans/lockfree/hash_map.hpp>

// A shared library that knows nothing of the program but these types. Both are compiled with hidden visibility.
namespace process_test {

using Map = msgtrans::lockfree::LockFreeHashMap<int, std::shared_ptr<int>>;
using Channel = msgtrans::SyncChannel<int>;
using Counter = msgtrans::lockfree::LockFreeCounter;

inline constexpr int early_values = 1000;

struct [[gnu::visibility("default")]] Library {
  /// What its own thread, which runs since it was loaded, puts `early_values` into.
  static Map& map();
  static Channel& channel();
  static Counter& counter();

  static void erase(Map & map, int key);
  /// From a thread of its own.
  static void collect();
  static void send(Channel & channel, int value);
  static std::unique_ptr<Channel> make_channel();
  static void run_in_a_thread(void (*function)());
  static const void* epochs();
};

}  // namespace process_test
