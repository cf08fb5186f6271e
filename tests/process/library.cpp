// SPDX-License-Identifier: Apache-2.0
#include "process/library.hpp"

#include <memory>
#include <msgtrans/channel/channel_status.hpp>
#include <msgtrans/channel/sync_channel.hpp>
#include <msgtrans/lockfree/epoch.hpp>
#include <thread>

namespace process_test {
namespace {

struct Early {
  Map map;
  Channel channel{msgtrans::ChannelCapacity::unbounded()};
  Counter counter;
  std::thread thread{[this] {
    for (int i = 0; i < early_values; ++i) {
      map.insert(i, std::make_shared<int>(i));
      (void)channel.send(i);
      counter.add();
    }
  }};
  ~Early() { thread.join(); }
};
Early early;  // NOLINT: that it begins before main is the point

}  // namespace

Map& Library::map() {
  return early.map;
}
Channel& Library::channel() {
  return early.channel;
}
Counter& Library::counter() {
  return early.counter;
}
void Library::erase(Map& map, int key) {
  map.erase(key);
}
void Library::collect() {
  std::thread([] {
    for (int i = 0; i < 8; ++i) msgtrans::lockfree::Epoch::collect();
  }).join();
}
void Library::send(Channel& channel, int value) {
  (void)channel.send(value);
}
std::unique_ptr<Channel> Library::make_channel() {
  return std::make_unique<Channel>(msgtrans::ChannelCapacity::unbounded());
}
void Library::run_in_a_thread(void (*function)()) {
  std::thread(function).join();
}
const void* Library::epochs() {
  return &msgtrans::lockfree::epoch_detail::domain;
}

}  // namespace process_test
