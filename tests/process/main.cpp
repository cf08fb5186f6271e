// SPDX-License-Identifier: Apache-2.0
// The lock-free classes at the edges of a process: before main and after it, in the destructors of what is static and
// of what is a thread's, in threads of a library that runs since before main, and across shared libraries with hidden
// visibility. main.cpp PLUGIN; ends with 0 if all went well.
#include "process/library.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <memory>
#include <msgtrans/channel/channel_status.hpp>
#include <msgtrans/lockfree/epoch.hpp>
#include <thread>
#include <vector>

namespace {

using process_test::Channel;
using process_test::Counter;
using process_test::early_values;
using process_test::Library;
using process_test::Map;

/// Also when main has returned.
void expect(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::_Exit(1);
}

/// Uses each class as it is.
void use_all(Map& map, Channel& channel, Counter& counter, const char* where) {
  for (int key = -300; key < 0; ++key) {
    map.insert_or_assign(key, std::make_shared<int>(key));
    expect(map.get(key).has_value(), where);
    expect(map.erase(key), where);
    expect(channel.send(key) == msgtrans::ChannelStatus::ok, where);
    counter.add();
  }
  for (int i = 0; i < 300; ++i) expect(static_cast<bool>(channel.try_recv()), where);
  counter.sub(300);
}

struct OfAThread {
  OfAThread() = default;
  OfAThread(const OfAThread&) = delete;
  OfAThread& operator=(const OfAThread&) = delete;
  ~OfAThread() {
    use_all(map, *channel, counter, "the end of a thread");
    use_all(Library::map(), Library::channel(), Library::counter(), "a library at the end of a thread");
    ++ended;
  }
  static inline std::atomic<int> ended{0};
  Counter counter;
  Map map;
  std::unique_ptr<Channel> channel = std::make_unique<Channel>(msgtrans::ChannelCapacity::unbounded());
};
OfAThread& of_this_thread() {
  static thread_local OfAThread mine;
  return mine;
}

struct Static {
  Static(const Static&) = delete;
  Static& operator=(const Static&) = delete;
  Static() { use_all(map, channel, counter, "before main"); }
  ~Static() {
    use_all(map, channel, counter, "after main");
    std::thread([this] { use_all(map, channel, counter, "a thread after main"); }).join();
  }
  Map map;
  Channel channel{msgtrans::ChannelCapacity::unbounded()};
  Counter counter;
};
Static outer;  // NOLINT: that it begins before main is the point
Static inner;  // NOLINT: as before

void one_epoch_domain() {
  expect(Library::epochs() == &msgtrans::lockfree::epoch_detail::domain, "there are two domains");
  Map& map = Library::map();
  map.insert(-1, std::make_shared<int>(7));
  std::weak_ptr<int> watched;
  // Read here, erased there: it must live on while it is read.
  const bool found = map.visit(-1, [&](const std::shared_ptr<int>& value) {
    watched = value;
    Library::erase(map, -1);
    Library::collect();
    expect(!watched.expired(), "a value was destroyed that is being read");
    expect(*value == 7, "a value was changed");
  });
  expect(found, "a value was not found");
  for (int i = 0; i < 8; ++i) msgtrans::lockfree::Epoch::collect();
  expect(watched.expired(), "a value was kept that nobody reads");
}

void channels_of_two_libraries_are_two() {
  constexpr int count = 40;
  std::vector<std::unique_ptr<Channel>> theirs;
  std::vector<std::unique_ptr<Channel>> ours;
  for (int i = 0; i < count; ++i) {
    theirs.push_back(Library::make_channel());
    ours.push_back(std::make_unique<Channel>(msgtrans::ChannelCapacity::unbounded()));
  }
  for (int i = 0; i < count; ++i) {
    for (auto* channels : {&theirs, &ours}) {
      Channel& channel = *(*channels)[static_cast<std::size_t>(i)];
      (void)channel.send(i);
      Library::send(channel, i);
    }
  }
  for (int i = 0; i < count; ++i) {
    for (auto* channels : {&theirs, &ours}) {
      Channel& channel = *(*channels)[static_cast<std::size_t>(i)];
      expect(channel.size() == 2, "a value is in another channel");
      for (int n = 0; n < 2; ++n) {
        const auto value = channel.recv_for(std::chrono::seconds(20));
        expect(value && *value == i, "a value is another channel's");
      }
    }
  }
}

void load_and_unload(const char* path) {
  for (int round = 0; round < 3; ++round) {
    void* const plugin = ::dlopen(path, RTLD_NOW | RTLD_LOCAL);
    expect(plugin != nullptr, "the plugin was not loaded");
    using Use = int (*)();
    const auto use = reinterpret_cast<Use>(::dlsym(plugin, "msgtrans_test_plugin"));
    expect(use != nullptr && use() == 1, "the plugin");
    std::thread([use] { expect(use() == 1, "the plugin in a thread"); }).join();
    ::dlclose(plugin);
    for (int i = 0; i < 8; ++i) msgtrans::lockfree::Epoch::collect();
    use_all(outer.map, outer.channel, outer.counter, "after a plugin has gone");
  }
}

}  // namespace

int main(int count, char** arguments) {
  expect(count == 2, "needs the plugin's path");
  // What the library's thread has done since before main.
  for (int i = 0; i < early_values; ++i) {
    const auto value = Library::channel().recv_for(std::chrono::seconds(20));
    expect(value && *value == i, "what was sent before main");
    expect(Library::map().get(i).has_value(), "what was inserted before main");
  }
  one_epoch_domain();
  channels_of_two_libraries_are_two();
  Library::run_in_a_thread([] { (void)of_this_thread(); });
  std::thread([] { (void)of_this_thread(); }).join();
  expect(OfAThread::ended == 2, "threads that have ended");
  (void)of_this_thread();
  load_and_unload(arguments[1]);
  return 0;
}
