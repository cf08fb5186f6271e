// SPDX-License-Identifier: Apache-2.0
// SyncChannel when memory is short; the rest of it is in tests/conformance.
#include "support/wait.hpp"
#include "unit/allocation_failure.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/channel/sync_channel.hpp>
#include <new>
#include <thread>
#include <utility>
#include <vector>

namespace {

using msgtrans::ChannelCapacity;
using msgtrans::ChannelStatus;
using msgtrans::SyncChannel;
using msgtrans::test::AllocationFailure;
using msgtrans::test::wait_until;
using Value = std::unique_ptr<int>;

/// The next send of this thread will need memory: the blocks that the channel has are full.
void use_up(SyncChannel<Value>& channel, std::size_t& sent) {
  for (;;) {
    const AllocationFailure failing(0);
    Value value;  // which needs none
    try {
      ASSERT_EQ(channel.try_send(std::move(value)), ChannelStatus::ok);
      ++sent;
    } catch (const std::bad_alloc&) {
      return;
    }
  }
}

TEST(SyncChannelWithoutMemory, ASendLeavesTheValueAndTheChannelWhicheverAllocationFails) {
  // The first send of a thread to a channel takes a seat, a block, an index, and their bookkeeping.
  int failures = 0;
  for (long successes = 0;; ++successes) {
    SyncChannel<Value> channel(ChannelCapacity::bounded(2));
    auto value = std::make_unique<int>(1);
    bool failed = false;
    {
      const AllocationFailure failing(successes);
      try {
        EXPECT_EQ(channel.try_send(std::move(value)), ChannelStatus::ok);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      if (!failed && !failing.happened()) break;  // no more than these
    }
    if (failed) {
      ++failures;
      ASSERT_TRUE(value) << "allocation " << successes;
      EXPECT_EQ(channel.size(), 0U);
      EXPECT_EQ(channel.try_recv().status(), ChannelStatus::empty);
      EXPECT_EQ(channel.try_send(std::move(value)), ChannelStatus::ok);
    }
    EXPECT_EQ(channel.size(), 1U);
    EXPECT_EQ(channel.try_send(std::make_unique<int>(2)), ChannelStatus::ok);
    EXPECT_EQ(channel.try_send(std::make_unique<int>(3)), ChannelStatus::full);
    EXPECT_EQ(**channel.try_recv(), 1);
    EXPECT_EQ(**channel.try_recv(), 2);
    EXPECT_EQ(channel.try_recv().status(), ChannelStatus::empty);
  }
  EXPECT_GE(failures, 3);
}

TEST(SyncChannelWithoutMemory, TheBoundStaysExact) {
  constexpr std::size_t capacity = 1000;
  SyncChannel<Value> channel(ChannelCapacity::bounded(capacity));
  ASSERT_EQ(channel.try_send(nullptr), ChannelStatus::ok);  // takes the thread's seat
  std::size_t sent = 1;
  use_up(channel, sent);
  for (int i = 0; i < 300; ++i) {
    const AllocationFailure failing(0);
    if (i % 3 == 0) {
      EXPECT_THROW(channel.try_send(nullptr), std::bad_alloc);
    } else if (i % 3 == 1) {
      EXPECT_THROW(channel.send(nullptr), std::bad_alloc);
    } else {
      EXPECT_THROW(channel.send_for(nullptr, msgtrans::test::patience), std::bad_alloc);
    }
  }
  EXPECT_EQ(channel.size(), sent);
  while (channel.try_send(nullptr) == ChannelStatus::ok) ++sent;
  EXPECT_EQ(sent, capacity);
  EXPECT_EQ(channel.size(), capacity);
  std::size_t received = 0;
  while (channel.try_recv()) ++received;
  EXPECT_EQ(received, capacity);
}

TEST(SyncChannelWithoutMemory, SendingManySendsNoneOrTheFirst) {
  // They go in pieces: 48, and then one at a time, which the third block is allocated for.
  constexpr std::size_t capacity = 48;
  int none = 0;
  int some = 0;
  for (long successes = 0;; ++successes) {
    SyncChannel<Value> channel(ChannelCapacity::bounded(capacity));
    std::vector<Value> values(100);
    for (auto& value : values) value = std::make_unique<int>(1);
    std::size_t sent = 0;
    bool happened = false;
    std::atomic<bool> done{false};
    std::thread sender([&] {
      const AllocationFailure failing(successes);
      try {
        auto status = ChannelStatus::full;
        sent = channel.send_many(values, &status);
        EXPECT_EQ(status, ChannelStatus::ok);
      } catch (const std::bad_alloc&) {
      }
      happened = failing.happened();
      done = true;
    });
    std::size_t received = 0;
    while (!done) {
      if (channel.size() == capacity && channel.try_recv()) ++received;
      std::this_thread::yield();
    }
    sender.join();
    EXPECT_EQ(channel.size(), sent - received) << "allocation " << successes;
    while (channel.try_recv()) ++received;
    EXPECT_EQ(received, sent) << "allocation " << successes;
    for (std::size_t i = 0; i < values.size(); ++i) ASSERT_EQ(values[i] == nullptr, i < sent) << i;
    if (!happened) {
      EXPECT_EQ(sent, values.size());
      break;
    }
    if (sent == 0) ++none;
    if (sent != 0 && sent != values.size()) ++some;
  }
  EXPECT_GT(none, 0);
  EXPECT_GT(some, 0);
}

TEST(SyncChannelWithoutMemory, AReceiverThatWaitsGetsTheNextValue) {
  for (long successes = 0;; ++successes) {
    SyncChannel<Value> channel(ChannelCapacity::bounded(1));
    std::atomic<int> received{0};
    std::thread receiver([&] {
      while (auto value = channel.recv()) received += **value;
    });
    // It sleeps by then, or is about to.
    if (successes % 2 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    auto value = std::make_unique<int>(1);
    bool failed = false;
    bool happened = false;
    {
      const AllocationFailure failing(successes);
      try {
        EXPECT_EQ(channel.send(std::move(value)), ChannelStatus::ok);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      happened = failing.happened();
    }
    if (failed) {
      EXPECT_EQ(channel.send(std::move(value)), ChannelStatus::ok);
    }
    EXPECT_TRUE(wait_until([&] { return received == 1; }));
    channel.close();
    receiver.join();
    if (!happened) break;
  }
}

// A ticket that has no value takes up room for a moment; whoever waits for that room must be woken.
TEST(SyncChannelWithoutMemory, ASenderThatWaitsGetsTheRoom) {
  for (int round = 0; round < 400; ++round) {
    SyncChannel<Value> channel(ChannelCapacity::bounded(1));
    std::thread unlucky([&] {
      auto value = std::make_unique<int>(1);
      for (long successes = 3; value; ++successes) {
        const AllocationFailure failing(successes);
        try {
          EXPECT_EQ(channel.send(std::move(value)), ChannelStatus::ok);
        } catch (const std::bad_alloc&) {
        }
      }
    });
    std::thread other([&] {
      for (int i = 0; i < 3; ++i) {
        EXPECT_EQ(channel.send_for(std::make_unique<int>(1), msgtrans::test::patience), ChannelStatus::ok);
      }
    });
    for (int i = 0; i < 4; ++i) EXPECT_TRUE(channel.recv_for(msgtrans::test::patience));
    unlucky.join();
    other.join();
    EXPECT_EQ(channel.size(), 0U);
  }
}

}  // namespace
