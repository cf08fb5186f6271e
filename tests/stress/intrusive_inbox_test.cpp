// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <gtest/gtest.h>
#include <latch>
#include <msgtrans/lockfree/intrusive_inbox.hpp>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using msgtrans::lockfree::InboxNode;
using msgtrans::lockfree::IntrusiveInbox;
using msgtrans::lockfree::Pushed;

constexpr auto patience = 60s;

struct Element : InboxNode<Element> {
  int producer = 0;
  int number = 0;  // not atomic: a race detector sees if the inbox does not publish it
};
using Inbox = IntrusiveInbox<Element>;

static_assert(alignof(Inbox) == 64 && sizeof(Inbox) == 64, "the head has a cache line of its own");

constexpr int producer_count = 4;
constexpr int pushes_each = 50000;

// Checks what one consumer takes out: nothing twice, nothing missing, FIFO for every producer.
class Ledger {
 public:
  void take(const Element& element) {
    int& expected = next_[static_cast<std::size_t>(element.producer)];
    ASSERT_EQ(element.number, expected) << "of producer " << element.producer;
    ++expected;
    ++total_;
  }
  [[nodiscard]] int total() const { return total_; }

 private:
  std::array<int, producer_count> next_{};
  int total_ = 0;
};

// Producers that push what they own; counts how often push said "wake the consumer".
class Producers {
 public:
  template <class Wake>
  Producers(Inbox& inbox, Wake wake) : elements_(producer_count, std::vector<Element>(pushes_each)) {
    for (int p = 0; p < producer_count; ++p) {
      threads_.emplace_back([this, &inbox, wake, p] {
        start_.arrive_and_wait();
        long wakes = 0;
        for (int i = 0; i < pushes_each; ++i) {
          Element& element = elements_[static_cast<std::size_t>(p)][static_cast<std::size_t>(i)];
          element.producer = p;
          element.number = i;
          if (inbox.push(&element) == Pushed::first) {
            ++wakes;
            wake();
          }
        }
        wakes_.fetch_add(wakes, std::memory_order_relaxed);
      });
    }
  }
  long join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    return wakes_.load();
  }
  ~Producers() { join(); }

 private:
  std::vector<std::vector<Element>> elements_;
  std::latch start_{producer_count};
  std::atomic<long> wakes_{0};
  std::vector<std::thread> threads_;
};

TEST(IntrusiveInbox, OneThreadTakesAllInThePushedOrder) {
  Inbox inbox;
  std::array<Element, 3> elements;
  EXPECT_TRUE(inbox.empty());
  EXPECT_EQ(inbox.take_all(), nullptr);
  EXPECT_EQ(inbox.push(&elements[0]), Pushed::first);
  EXPECT_EQ(inbox.push(&elements[1]), Pushed::behind);
  EXPECT_EQ(inbox.push(&elements[2]), Pushed::behind);
  EXPECT_FALSE(inbox.empty());
  Element* chain = inbox.take_all();
  for (Element& element : elements) {
    ASSERT_EQ(chain, &element);
    chain = chain->next;
  }
  EXPECT_EQ(chain, nullptr);
  EXPECT_TRUE(inbox.empty());
  EXPECT_EQ(inbox.push(&elements[1]), Pushed::first) << "drained, so the next push wakes again";
  EXPECT_EQ(inbox.take_all(), &elements[1]);
  EXPECT_EQ(elements[1].next, nullptr);
}

TEST(IntrusiveInbox, CloseTakesTheLastElementsOutAndRefusesAllLaterOnes) {
  Inbox inbox;
  std::array<Element, 3> elements;
  static_cast<void>(inbox.push(&elements[0]));
  static_cast<void>(inbox.push(&elements[1]));
  EXPECT_EQ(inbox.close(), &elements[0]);
  EXPECT_EQ(elements[0].next, &elements[1]);
  EXPECT_EQ(elements[1].next, nullptr);
  EXPECT_TRUE(inbox.empty());
  EXPECT_EQ(inbox.push(&elements[2]), Pushed::closed);
  EXPECT_EQ(inbox.take_all(), nullptr);
  EXPECT_EQ(inbox.push(&elements[2]), Pushed::closed) << "taking does not open it";
  EXPECT_EQ(inbox.close(), nullptr);
  EXPECT_TRUE(inbox.empty());
}

TEST(IntrusiveInbox, CloseOfAnEmptyInboxRefusesTheFirstElement) {
  Inbox inbox;
  Element element;
  EXPECT_EQ(inbox.close(), nullptr);
  EXPECT_EQ(inbox.push(&element), Pushed::closed);
  EXPECT_TRUE(inbox.empty());
}

// Nothing but the inbox orders the threads here, so a race detector checks its memory orders.
TEST(IntrusiveInbox, PollingConsumerGetsEveryElementOnceInOrderAndOneWakeADrain) {
  Inbox inbox;
  Producers producers(inbox, [] {});
  Ledger ledger;
  long drains = 0;
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (ledger.total() < producer_count * pushes_each) {
    Element* chain = inbox.take_all();
    if (chain == nullptr) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline) << "lost after " << ledger.total();
      std::this_thread::yield();
      continue;
    }
    ++drains;
    for (; chain != nullptr; chain = chain->next) ASSERT_NO_FATAL_FAILURE(ledger.take(*chain));
  }
  EXPECT_EQ(producers.join(), drains);
  EXPECT_TRUE(inbox.empty());
}

// Two producers push until they are refused, thousands of times over, so that every close meets their pushes: what was
// accepted before it must have been taken, by the close at the latest.
TEST(IntrusiveInbox, CloseAmidPushesLeavesNoAcceptedElementBehind) {
  constexpr int rounds = 5000;
  constexpr int threads_pushing = 2;
  struct Reused : InboxNode<Reused> {
    int producer = 0;
    int number = 0;
    std::atomic<bool> mine{true};  // the producer's, not in the inbox
  };
  struct Pusher {
    std::array<Reused, 512> elements;
    int accepted = 0;
    long wakes = 0;
  };
  std::array<Pusher, threads_pushing> pushers;
  IntrusiveInbox<Reused>* inbox = nullptr;
  std::atomic<int> round{0};
  std::atomic<int> done{0};
  std::atomic<bool> give_up{false};
  std::vector<std::thread> threads;
  for (int p = 0; p < threads_pushing; ++p) {
    threads.emplace_back([&, p] {
      Pusher& self = pushers[static_cast<std::size_t>(p)];
      for (int r = 1; r <= rounds; ++r) {
        while (round.load(std::memory_order_acquire) != r) {
          if (give_up.load(std::memory_order_relaxed)) return;
          std::this_thread::yield();
        }
        self.accepted = 0;
        self.wakes = 0;
        for (;;) {
          Reused& element = self.elements[static_cast<std::size_t>(self.accepted) % self.elements.size()];
          while (!element.mine.load(std::memory_order_acquire)) {
            if (give_up.load(std::memory_order_relaxed)) return;
            std::this_thread::yield();
          }
          element.mine.store(false, std::memory_order_relaxed);
          element.producer = p;
          element.number = self.accepted;
          const Pushed pushed = inbox->push(&element);
          if (pushed == Pushed::closed) {
            element.mine.store(true, std::memory_order_relaxed);
            break;
          }
          if (pushed == Pushed::first) ++self.wakes;
          ++self.accepted;
        }
        done.fetch_add(1, std::memory_order_release);
      }
    });
  }
  const auto deadline = std::chrono::steady_clock::now() + patience;
  const auto in_time = [&] { return std::chrono::steady_clock::now() < deadline; };
  for (int r = 1; r <= rounds && !HasFailure(); ++r) {
    IntrusiveInbox<Reused> fresh;
    inbox = &fresh;
    std::array<int, threads_pushing> taken{};
    long drains = 0;
    const auto take = [&](Reused* chain) {
      if (chain != nullptr) ++drains;
      while (chain != nullptr) {
        Reused* const element = std::exchange(chain, chain->next);
        EXPECT_EQ(element->number, taken[static_cast<std::size_t>(element->producer)]++);
        element->mine.store(true, std::memory_order_release);
      }
    };
    done.store(0, std::memory_order_relaxed);
    round.store(r, std::memory_order_release);
    // From the first element on the producers are at it; the close comes a little later each time.
    while (fresh.empty() && in_time()) std::this_thread::yield();
    for (int i = 0; i < r % 16; ++i) take(fresh.take_all());
    take(fresh.close());
    while (done.load(std::memory_order_acquire) < threads_pushing && in_time()) std::this_thread::yield();
    if (done.load(std::memory_order_acquire) < threads_pushing) {
      // Its producer waits for an element to come back: one was left behind.
      give_up.store(true, std::memory_order_relaxed);
      for (std::thread& thread : threads) thread.join();
      FAIL() << "a producer hangs, round " << r;
    }
    long wakes = 0;
    for (std::size_t p = 0; p < threads_pushing; ++p) {
      EXPECT_EQ(pushers[p].accepted, taken[p]) << "left behind, round " << r;
      wakes += pushers[p].wakes;
    }
    EXPECT_EQ(wakes, drains);
    EXPECT_EQ(fresh.take_all(), nullptr);
  }
  give_up.store(true, std::memory_order_relaxed);
  for (std::thread& thread : threads) thread.join();
}

TEST(IntrusiveInbox, ConsumerThatRunsOnlyWhenWokenMissesNothingAndNeverWakesInVain) {
  Inbox inbox;
  std::mutex mutex;
  std::condition_variable woken;
  long pending_wakes = 0;
  Producers producers(inbox, [&] {
    const std::lock_guard lock(mutex);
    ++pending_wakes;
    woken.notify_one();
  });
  Ledger ledger;
  const auto deadline = std::chrono::steady_clock::now() + patience;
  while (ledger.total() < producer_count * pushes_each) {
    {
      std::unique_lock lock(mutex);
      ASSERT_TRUE(woken.wait_until(lock, deadline, [&] { return pending_wakes > 0; }))
          << "a wake was lost after " << ledger.total();
      ASSERT_EQ(pending_wakes, 1) << "more than one wake for one drain";
      --pending_wakes;
    }
    Element* chain = inbox.take_all();
    ASSERT_NE(chain, nullptr) << "woken for nothing";
    for (; chain != nullptr; chain = chain->next) ASSERT_NO_FATAL_FAILURE(ledger.take(*chain));
  }
  producers.join();
  EXPECT_EQ(pending_wakes, 0);
}

// A token goes round; who holds it pushes its number and passes it on. Every push happens before the next, so the
// consumer, which runs meanwhile, must see plain counting.
TEST(IntrusiveInbox, PushesOrderedAcrossThreadsComeOutInThatOrder) {
  constexpr int thread_count = 3;
  constexpr int rounds = 6000;
  Inbox inbox;
  std::vector<Element> elements(thread_count * rounds);
  std::atomic<int> token{0};
  std::atomic<bool> give_up{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < thread_count; ++t) {
    threads.emplace_back([&, t] {
      for (int number = t; number < thread_count * rounds; number += thread_count) {
        while (token.load(std::memory_order_acquire) != number) {
          if (give_up.load(std::memory_order_relaxed)) return;
          std::this_thread::yield();
        }
        Element& element = elements[static_cast<std::size_t>(number)];
        element.number = number;
        static_cast<void>(inbox.push(&element));
        token.store(number + 1, std::memory_order_release);
      }
    });
  }
  const auto deadline = std::chrono::steady_clock::now() + patience;
  int expected = 0;
  bool ordered = true;
  while (expected < thread_count * rounds && ordered && std::chrono::steady_clock::now() < deadline) {
    Element* chain = inbox.take_all();
    if (chain == nullptr) std::this_thread::yield();
    for (; chain != nullptr && ordered; chain = chain->next) ordered = chain->number == expected++;
  }
  give_up.store(true, std::memory_order_relaxed);
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(ordered) << "at " << expected;
  EXPECT_EQ(expected, thread_count * rounds);
}

// Elements go back to their producer the moment they are taken, two for each: the head keeps returning to addresses it
// had before, while producers hold them from an earlier look.
TEST(IntrusiveInbox, ElementsPushedAgainAtOnceAreNeitherLostNorDoubled) {
  struct Recycled : InboxNode<Recycled> {
    int producer = 0;
    int number = 0;
    std::atomic<bool> mine{true};  // the producer's, not in the inbox
  };
  IntrusiveInbox<Recycled> inbox;
  std::array<std::array<Recycled, 2>, producer_count> pool;
  std::latch start(producer_count);
  std::atomic<bool> give_up{false};
  std::vector<std::thread> threads;
  for (int p = 0; p < producer_count; ++p) {
    threads.emplace_back([&, p] {
      start.arrive_and_wait();
      for (int i = 0; i < pushes_each / 5; ++i) {
        Recycled& element = pool[static_cast<std::size_t>(p)][static_cast<std::size_t>(i % 2)];
        while (!element.mine.load(std::memory_order_acquire)) {
          if (give_up.load(std::memory_order_relaxed)) return;
          std::this_thread::yield();
        }
        element.mine.store(false, std::memory_order_relaxed);
        element.producer = p;
        element.number = i;
        static_cast<void>(inbox.push(&element));
      }
    });
  }
  const auto deadline = std::chrono::steady_clock::now() + patience;
  std::array<int, producer_count> next{};
  int total = 0;
  bool ordered = true;
  while (total < producer_count * (pushes_each / 5) && ordered && std::chrono::steady_clock::now() < deadline) {
    Recycled* chain = inbox.take_all();
    if (chain == nullptr) std::this_thread::yield();
    while (chain != nullptr) {
      Recycled* const element = std::exchange(chain, chain->next);
      ordered = ordered && element->number == next[static_cast<std::size_t>(element->producer)]++;
      ++total;
      element->mine.store(true, std::memory_order_release);
    }
  }
  give_up.store(true, std::memory_order_relaxed);
  for (std::thread& thread : threads) thread.join();
  EXPECT_TRUE(ordered);
  EXPECT_EQ(total, producer_count * (pushes_each / 5));
}

}  // namespace
