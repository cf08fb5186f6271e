// SPDX-License-Identifier: Apache-2.0
// Loaded, used and unloaded by main.cpp.
#include <memory>
#include <msgtrans/channel/channel_status.hpp>
#include <msgtrans/channel/sync_channel.hpp>
#include <msgtrans/lockfree/counter.hpp>
#include <msgtrans/lockfree/hash_map.hpp>
#include <string>
#include <thread>

namespace {

msgtrans::lockfree::LockFreeHashMap<int, std::string> kept;

bool use() {
  msgtrans::lockfree::LockFreeHashMap<std::string, int> map;
  msgtrans::SyncChannel<std::string> channel(msgtrans::ChannelCapacity::bounded(4));
  msgtrans::lockfree::LockFreeCounter counter;
  std::thread other([&] {
    for (int i = 0; i < 1000; ++i) {
      const std::string key = std::to_string(i);
      map.insert(key, i);
      if (i % 2 == 0) map.erase(key);
      kept.insert_or_assign(i % 10, key);
      (void)channel.send(std::string(key));
      counter.add();
    }
    channel.close();
  });
  int received = 0;
  while (auto value = channel.recv()) {
    if (*value == std::to_string(received)) ++received;
  }
  other.join();
  return received == 1000 && counter.value() == 1000 && map.size() == 500 && kept.size() == 10;
}

}  // namespace

extern "C" [[gnu::visibility("default")]] int msgtrans_test_plugin() {
  return use() ? 1 : 0;
}
