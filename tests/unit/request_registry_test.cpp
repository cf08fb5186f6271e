// SPDX-License-Identifier: Apache-2.0
#include "support/start_time.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <limits>
#include <map>
#include <memory>
#include <msgtrans/protocol/request_registry.hpp>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using msgtrans::SessionId;
using msgtrans::protocol::Duration;
using msgtrans::protocol::RequestRegistry;
using msgtrans::protocol::TimePoint;
using msgtrans::test::start_time;

constexpr TimePoint never = TimePoint::max();

using Completion = std::unique_ptr<int>;
using Registry = RequestRegistry<Completion>;

struct Heap {
  std::size_t allocations = 0;
  std::size_t bytes = 0;                                       // in use
  std::size_t left = std::numeric_limits<std::size_t>::max();  // allocations until memory runs out
};

// Takes its memory from the usual place and keeps count of it in a Heap.
template <class T>
struct Counting {
  using value_type = T;
  Heap* heap;
  explicit Counting(Heap& h) : heap(&h) {}
  template <class U>
  Counting(const Counting<U>& other) : heap(other.heap) {}
  T* allocate(std::size_t n) {
    if (heap->left == 0) throw std::bad_alloc();
    --heap->left;
    T* const p = std::allocator<T>().allocate(n);
    ++heap->allocations;
    heap->bytes += n * sizeof(T);
    return p;
  }
  void deallocate(T* p, std::size_t n) {
    heap->bytes -= n * sizeof(T);
    std::allocator<T>().deallocate(p, n);
  }
  friend bool operator==(const Counting&, const Counting&) = default;
};

Completion numbered(int n) {
  return std::make_unique<int>(n);
}

void expect_balance(const Registry& registry) {
  const auto& s = registry.stats();
  ASSERT_EQ(s.started, s.completed + s.timed_out + s.cancelled + s.failed + registry.size());
}

std::vector<int> numbers_failed(Registry& registry, SessionId session) {
  std::vector<int> numbers;
  const std::size_t count = registry.fail_all(session, [&](SessionId of, std::uint32_t, Completion&& completion) {
    EXPECT_EQ(of, session);
    numbers.push_back(*completion);
  });
  EXPECT_EQ(count, numbers.size());
  return numbers;
}

TEST(RequestRegistry, AResponseTakesItsRequestsCompletionOnce) {
  Registry registry(start_time);
  ASSERT_TRUE(registry.add(SessionId(1), 7, start_time + 10s, numbered(17)));
  EXPECT_TRUE(registry.contains(SessionId(1), 7));
  EXPECT_EQ(registry.size(), 1U);
  EXPECT_EQ(registry.pending(SessionId(1)), 1U);
  const auto taken = registry.take(SessionId(1), 7);
  ASSERT_TRUE(taken.has_value());
  EXPECT_EQ(**taken, 17);
  EXPECT_FALSE(registry.contains(SessionId(1), 7));
  EXPECT_EQ(registry.pending(SessionId(1)), 0U);
  EXPECT_EQ(registry.next_deadline(), std::nullopt);
  EXPECT_EQ(registry.take(SessionId(1), 7), std::nullopt) << "a duplicate";
  EXPECT_EQ(registry.stats().completed, 1U);
  EXPECT_EQ(registry.stats().unmatched, 1U);
}

TEST(RequestRegistry, ForgedResponsesAreCountedAndTouchNothing) {
  Registry registry(start_time);
  ASSERT_TRUE(registry.add(SessionId(1), 7, start_time + 10s, numbered(1)));
  ASSERT_TRUE(registry.add(SessionId(2), 8, start_time + 10s, numbered(2)));
  EXPECT_EQ(registry.take(SessionId(2), 7), std::nullopt) << "another session's id";
  EXPECT_EQ(registry.take(SessionId(1), 8), std::nullopt) << "another session's id";
  EXPECT_EQ(registry.take(SessionId(1), 9), std::nullopt) << "an id never used";
  EXPECT_EQ(registry.take(SessionId(1), 0), std::nullopt);
  EXPECT_EQ(registry.take(SessionId(3), 7), std::nullopt) << "a session never seen";
  EXPECT_EQ(registry.stats().unmatched, 5U);
  EXPECT_EQ(registry.size(), 2U);
  EXPECT_EQ(**registry.take(SessionId(1), 7), 1);
  EXPECT_EQ(**registry.take(SessionId(2), 8), 2);
}

TEST(RequestRegistry, ALateResponseIsUnmatched) {
  Registry registry(start_time);
  ASSERT_TRUE(registry.add(SessionId(1), 7, start_time + 1s, numbered(1)));
  EXPECT_EQ(registry.expire(start_time + 1s, [](SessionId, std::uint32_t, Completion&&) {}), 1U);
  EXPECT_EQ(registry.take(SessionId(1), 7), std::nullopt);
  EXPECT_EQ(registry.stats().timed_out, 1U);
  EXPECT_EQ(registry.stats().unmatched, 1U);
}

TEST(RequestRegistry, AKeyThatIsPendingIsRefusedAndTheCompletionKept) {
  Registry registry(start_time);
  ASSERT_TRUE(registry.add(SessionId(1), 7, start_time + 1s, numbered(1)));
  Completion second = numbered(2);
  EXPECT_FALSE(registry.add(SessionId(1), 7, start_time + 9s, std::move(second)));
  ASSERT_NE(second, nullptr);
  EXPECT_EQ(*second, 2);
  EXPECT_EQ(registry.stats().started, 1U);
  EXPECT_EQ(registry.pending(SessionId(1)), 1U);
  EXPECT_LE(*registry.next_deadline(), start_time + 1s);
  EXPECT_EQ(**registry.take(SessionId(1), 7), 1);
  EXPECT_TRUE(registry.add(SessionId(1), 7, start_time + 9s, std::move(second))) << "free again";
}

TEST(RequestRegistry, CancelGivesTheCompletionBackAndIsNotAResponse) {
  Registry registry(start_time);
  ASSERT_TRUE(registry.add(SessionId(1), 7, start_time + 1s, numbered(1)));
  EXPECT_EQ(**registry.cancel(SessionId(1), 7), 1);
  EXPECT_EQ(registry.cancel(SessionId(1), 7), std::nullopt);
  EXPECT_EQ(registry.stats().cancelled, 1U);
  EXPECT_EQ(registry.stats().unmatched, 0U);
  EXPECT_EQ(registry.expire(start_time + 2s, [](SessionId, std::uint32_t, Completion&&) { FAIL(); }), 0U);
}

TEST(RequestRegistry, ExpiresAtTheDeadlineAndNotBeforeAndNeverWithoutOne) {
  Registry registry(start_time);
  ASSERT_TRUE(registry.add(SessionId(1), 1, never, numbered(1)));
  EXPECT_EQ(registry.next_deadline(), std::nullopt);
  ASSERT_TRUE(registry.add(SessionId(1), 2, start_time + 2s, numbered(2)));
  ASSERT_TRUE(registry.add(SessionId(2), 1, start_time + 1s, numbered(3)));
  ASSERT_TRUE(registry.next_deadline().has_value());
  EXPECT_LE(*registry.next_deadline(), start_time + 1s);
  std::vector<std::string> expired;
  const auto note = [&](SessionId session, std::uint32_t id, Completion&& completion) {
    expired.push_back(to_string(session) + "/" + std::to_string(id) + "=" + std::to_string(*completion));
  };
  EXPECT_EQ(registry.expire(start_time + 1s - 1ns, note), 0U);
  EXPECT_EQ(registry.expire(start_time + 1s, note), 1U);
  EXPECT_EQ(registry.expire(start_time + 24h * 365, note), 1U);
  EXPECT_EQ(expired, (std::vector<std::string>{"session-2/1=3", "session-1/2=2"}));
  EXPECT_EQ(registry.size(), 1U);
  EXPECT_EQ(registry.next_deadline(), std::nullopt);
}

TEST(RequestRegistry, FailAllEndsThatSessionsRequestsInTheOrderAddedAndNoOthers) {
  Registry registry(start_time);
  for (int n = 0; n < 100; ++n) {
    const auto id = static_cast<std::uint32_t>(n * 7919 % 1009);  // neither rising nor falling
    ASSERT_TRUE(registry.add(SessionId(n % 2 == 0 ? 1U : 2U), id, start_time + 1s, numbered(n)));
  }
  ASSERT_TRUE(registry.take(SessionId(1), 0));                   // the first of its session
  ASSERT_TRUE(registry.take(SessionId(1), 98 * 7919 % 1009));    // the last
  ASSERT_TRUE(registry.cancel(SessionId(1), 50 * 7919 % 1009));  // one between
  std::vector<int> expected;
  for (int n = 2; n < 98; n += 2) {
    if (n != 50) expected.push_back(n);
  }
  EXPECT_EQ(numbers_failed(registry, SessionId(1)), expected);
  EXPECT_EQ(registry.pending(SessionId(1)), 0U);
  EXPECT_EQ(registry.pending(SessionId(2)), 50U);
  EXPECT_EQ(registry.stats().failed, expected.size());
  EXPECT_EQ(registry.expire(start_time + 1s, [](SessionId session, auto, auto&&) { EXPECT_EQ(session, SessionId(2)); }),
            50U);
  expect_balance(registry);
}

TEST(RequestRegistry, WhatAFailureCallbackAddsToTheSameSessionStays) {
  Registry registry(start_time);
  ASSERT_TRUE(registry.add(SessionId(1), 1, start_time + 1s, numbered(1)));
  ASSERT_TRUE(registry.add(SessionId(1), 2, start_time + 1s, numbered(2)));
  std::uint32_t next = 3;
  EXPECT_EQ(registry.fail_all(SessionId(1),
                              [&](SessionId session, std::uint32_t id, Completion&& completion) {
                                ASSERT_LT(next, 10U) << "it goes on with what it was given";
                                EXPECT_FALSE(registry.contains(session, id));
                                ASSERT_TRUE(registry.add(session, id, never, std::move(completion))) << "the same id";
                                ASSERT_TRUE(registry.add(session, next++, never, numbered(0)));
                              }),
            2U);
  EXPECT_EQ(registry.pending(SessionId(1)), 4U);
  expect_balance(registry);
}

TEST(RequestRegistry, ACallbackMayTakeCancelAndFailTheRequestsThatAreNext) {
  Registry registry(start_time);
  for (std::uint32_t id = 1; id <= 6; ++id) {
    ASSERT_TRUE(registry.add(SessionId(1), id, start_time + 1s, numbered(static_cast<int>(id))));
  }
  std::vector<std::uint32_t> expired;
  std::vector<int> failed;
  EXPECT_EQ(registry.expire(start_time + 1s,
                            [&](SessionId session, std::uint32_t id, Completion&&) {
                              expired.push_back(id);
                              if (id == 1) {
                                EXPECT_EQ(**registry.take(session, 2), 2);
                              } else {
                                EXPECT_EQ(**registry.cancel(session, 4), 4);
                                failed = numbers_failed(registry, session);
                              }
                            }),
            2U);
  EXPECT_EQ(expired, (std::vector<std::uint32_t>{1, 3}));
  EXPECT_EQ(failed, (std::vector<int>{5, 6}));
  EXPECT_EQ(registry.size(), 0U);
  expect_balance(registry);
}

TEST(RequestRegistry, AfterAThrowingCallbackTheOthersStayPending) {
  Registry registry(start_time);
  for (std::uint32_t id = 1; id <= 4; ++id) ASSERT_TRUE(registry.add(SessionId(1), id, start_time + 1s, numbered(1)));
  const auto thrower = [](SessionId, std::uint32_t, Completion&&) { throw std::runtime_error("handler"); };
  EXPECT_THROW(registry.expire(start_time + 1s, thrower), std::runtime_error);
  EXPECT_THROW(registry.fail_all(SessionId(1), thrower), std::runtime_error);
  EXPECT_EQ(registry.pending(SessionId(1)), 2U);
  expect_balance(registry);
  EXPECT_EQ(registry.expire(start_time + 1s, [](SessionId, std::uint32_t, Completion&&) {}), 2U);
}

TEST(RequestRegistry, DestructionDestroysWhatIsPendingAndItsDestructorsMayAsk) {
  struct Loud {
    std::shared_ptr<int> alive;
    RequestRegistry<Loud>* registry = nullptr;
    Loud(std::shared_ptr<int> a, RequestRegistry<Loud>* r) : alive(std::move(a)), registry(r) {}
    Loud(Loud&& other) noexcept : alive(std::move(other.alive)), registry(other.registry) {}
    Loud& operator=(Loud&&) = delete;
    ~Loud() {
      if (alive == nullptr) return;
      for (std::uint32_t id = 0; id < 20; ++id) EXPECT_FALSE(registry->cancel(SessionId(1), id).has_value());
    }
  };
  const auto token = std::make_shared<int>(0);
  {
    RequestRegistry<Loud> registry(start_time);
    for (std::uint32_t id = 0; id < 20; ++id) {
      ASSERT_TRUE(registry.add(SessionId(1), id, start_time + 1s, Loud(token, &registry)));
    }
    EXPECT_EQ(token.use_count(), 21);
  }
  EXPECT_EQ(token.use_count(), 1);
}

TEST(RequestRegistry, OverAlignedCompletionsAreKeptAligned) {
  struct alignas(64) Aligned {
    std::unique_ptr<int> value;
  };
  RequestRegistry<Aligned> registry(start_time);
  for (std::uint32_t id = 0; id < 20; ++id) ASSERT_TRUE(registry.add(SessionId(1), id, never, Aligned{numbered(3)}));
  registry.fail_all(SessionId(1), [](SessionId, std::uint32_t, Aligned&& completion) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(&completion) % 64, 0U);
    EXPECT_EQ(*completion.value, 3);
  });
}

using Counted = RequestRegistry<std::shared_ptr<int>, Counting<std::byte>>;

TEST(RequestRegistry, AllocatesNothingForARequestInSteadyState) {
  Heap heap;
  Counted registry(start_time, Counting<std::byte>(heap));
  std::uint32_t next = 0;
  TimePoint now = start_time;
  const auto add = [&] {
    ++next;
    return registry.add(SessionId(next % 50), next, now + 10s, nullptr);
  };
  for (int i = 0; i < 1000; ++i) ASSERT_TRUE(add());
  const std::size_t allocations = heap.allocations;
  const std::uint64_t started = registry.stats().started;
  for (int i = 0; i < 200000; ++i) {
    now += 1us;
    const std::uint32_t oldest = next - 999;
    ASSERT_TRUE(registry.take(SessionId(oldest % 50), oldest));
    ASSERT_TRUE(add());
  }
  // Batches: all answered, then as many asked again.
  for (int batch = 0; batch < 100; ++batch) {
    for (std::uint32_t id = next - 999; id <= next; ++id) ASSERT_TRUE(registry.take(SessionId(id % 50), id));
    for (int i = 0; i < 1000; ++i) ASSERT_TRUE(add());
  }
  EXPECT_LT((heap.allocations - allocations) * 1000, registry.stats().started - started);
}

TEST(RequestRegistry, GivesTheMemoryOfABurstBack) {
  Heap heap;
  {
    Counted registry(start_time, Counting<std::byte>(heap));
    constexpr std::uint32_t burst = 200000;
    for (std::uint32_t id = 1; id <= burst; ++id) {
      ASSERT_TRUE(registry.add(SessionId(id), id, id % 2 == 0 ? never : start_time + 1s, nullptr));
    }
    EXPECT_GT(heap.bytes, std::size_t{20} << 20) << "not a burst";
    registry.expire(start_time + 1s, [](SessionId, std::uint32_t, std::shared_ptr<int>&&) {});
    for (std::uint32_t id = 2; id <= burst; id += 2) ASSERT_TRUE(registry.take(SessionId(id), id));
    EXPECT_EQ(registry.size(), 0U);
    EXPECT_LT(heap.bytes, std::size_t{512} << 10);
  }
  EXPECT_EQ(heap.bytes, 0U);
}

TEST(RequestRegistry, AnAddThatRunsOutOfMemoryChangesNothing) {
  const auto token = std::make_shared<int>(0);
  std::size_t most_allocations = 0;
  for (std::uint32_t before = 0; before < 100; ++before) {
    bool added = false;
    for (std::size_t allowed = 0; !added; ++allowed) {
      Heap heap;
      Counted registry(start_time, Counting<std::byte>(heap));
      for (std::uint32_t id = 0; id < before; ++id) {
        ASSERT_TRUE(registry.add(SessionId(1 + id), id, start_time + 1s, std::shared_ptr<int>(token)));
      }
      const SessionId session(1 + before);
      std::shared_ptr<int> completion = token;
      heap.left = allowed;
      try {
        added = registry.add(session, before, start_time + 1s, std::move(completion));
        most_allocations = std::max(most_allocations, allowed);
        continue;
      } catch (const std::bad_alloc&) {
      }
      ASSERT_EQ(completion, token);
      ASSERT_EQ(registry.size(), before);
      ASSERT_FALSE(registry.contains(session, before));
      ASSERT_EQ(registry.pending(session), 0U);
      ASSERT_EQ(registry.stats().started, before);
      heap.left = 100;
      ASSERT_TRUE(registry.add(session, before, start_time + 1s, std::move(completion)));
      ASSERT_EQ(registry.expire(start_time + 1s, [](SessionId, std::uint32_t, std::shared_ptr<int>&&) {}), before + 1);
      ASSERT_EQ(token.use_count(), 1);
    }
  }
  EXPECT_EQ(most_allocations, 3U) << "index, node and session: each must have failed once";
}

TEST(RequestRegistry, AResponseIsTakenAlsoWhenThereIsNoMemoryToShrinkInto) {
  Heap heap;
  Counted registry(start_time, Counting<std::byte>(heap));
  constexpr std::uint32_t burst = 20000;
  for (std::uint32_t id = 0; id < burst; ++id) ASSERT_TRUE(registry.add(SessionId(1 + id), id, never, nullptr));
  heap.left = 0;
  for (std::uint32_t id = 0; id < burst; ++id) ASSERT_TRUE(registry.take(SessionId(1 + id), id));
  EXPECT_EQ(registry.size(), 0U);
}

// The registry against plain maps, through random calls that are also made inside its callbacks.
class RequestRegistryModel : public testing::TestWithParam<std::uint64_t> {
 protected:
  struct Pending {
    TimePoint deadline;
    int number;
  };
  using Key = std::pair<std::uint64_t, std::uint32_t>;

  Key random_key() { return {1 + random_() % 8, static_cast<std::uint32_t>(1 + random_() % 40)}; }

  void add() {
    const Key key = random_key();
    TimePoint deadline = never;
    if (random_() % 4 != 0) deadline = now_ - 1s + Duration(static_cast<Duration::rep>(random_() % 20'000'000'000));
    const bool is_new = !model_.contains(key);
    Completion completion = numbered(next_number_);
    ASSERT_EQ(registry_.add(SessionId(key.first), key.second, deadline, std::move(completion)), is_new);
    ASSERT_EQ(completion == nullptr, is_new);
    if (!is_new) return;
    model_.emplace(key, Pending{deadline, next_number_++});
  }

  void take_or_cancel(bool response) {
    const Key key = random_key();
    const auto got = response ? registry_.take(SessionId(key.first), key.second)
                              : registry_.cancel(SessionId(key.first), key.second);
    const auto entry = model_.find(key);
    ASSERT_EQ(got.has_value(), entry != model_.end());
    if (!got) {
      if (response) ++stats_.unmatched;
      return;
    }
    ASSERT_EQ(**got, entry->second.number);
    model_.erase(entry);
    ++(response ? stats_.completed : stats_.cancelled);
  }

  // What both callbacks check: it was pending, and before the call began; then it does something itself.
  void handed_out(SessionId session, std::uint32_t id, Completion completion, int first_new, std::uint64_t& count) {
    const auto entry = model_.find({session.value(), id});
    ASSERT_NE(entry, model_.end()) << "handed out, but not pending";
    ASSERT_EQ(*completion, entry->second.number);
    ASSERT_LT(*completion, first_new) << "added meanwhile";
    ASSERT_FALSE(registry_.contains(session, id));
    model_.erase(entry);
    ++count;
    expect_balance(registry_);
    if (random_() % 3 == 0) step(depth_ < 3);
  }

  void fail_all() {
    const SessionId session(1 + random_() % 8);
    const int first_new = next_number_;
    int last = -1;
    ++depth_;
    registry_.fail_all(session, [&](SessionId of, std::uint32_t id, Completion&& completion) {
      ASSERT_EQ(of, session);
      ASSERT_GT(*completion, last) << "not in the order added";
      last = *completion;
      handed_out(of, id, std::move(completion), first_new, stats_.failed);
    });
    --depth_;
    for (const auto& [key, pending] : model_) {
      ASSERT_TRUE(key.first != session.value() || pending.number >= first_new) << "forgotten";
    }
  }

  void expire() {
    const int first_new = next_number_;
    ++depth_;
    registry_.expire(now_, [&](SessionId session, std::uint32_t id, Completion&& completion) {
      const auto entry = model_.find({session.value(), id});
      ASSERT_NE(entry, model_.end());
      ASSERT_LE(entry->second.deadline, now_) << "too early";
      handed_out(session, id, std::move(completion), first_new, stats_.timed_out);
    });
    --depth_;
    for (const auto& [key, pending] : model_) {
      ASSERT_TRUE(pending.deadline > now_ || pending.number >= first_new) << "due, but not expired";
    }
  }

  void step(bool may_nest) {
    const auto choice = random_() % 40;
    if (choice < 20) {
      add();
    } else if (choice < 30) {
      take_or_cancel(true);
    } else if (choice < 36) {
      take_or_cancel(false);
    } else if (choice < 38 && may_nest) {
      fail_all();
    } else if (may_nest && depth_ == 0) {
      now_ += Duration(static_cast<Duration::rep>(random_() % 2'000'000'000));
      expire();
    }
  }

  void check() {
    ASSERT_EQ(registry_.size(), model_.size());
    std::map<std::uint64_t, std::size_t> pending;
    TimePoint earliest = never;
    for (const auto& [key, value] : model_) {
      ++pending[key.first];
      earliest = std::min(earliest, value.deadline);
    }
    for (std::uint64_t session = 1; session <= 8; ++session) {
      ASSERT_EQ(registry_.pending(SessionId(session)), pending[session]);
    }
    ASSERT_EQ(registry_.next_deadline().has_value(), earliest != never);
    if (earliest != never) {
      ASSERT_LE(*registry_.next_deadline(), earliest);
    }
    const Key key = random_key();
    ASSERT_EQ(registry_.contains(SessionId(key.first), key.second), model_.contains(key));
    const auto& stats = registry_.stats();
    ASSERT_EQ(stats.started, static_cast<std::uint64_t>(next_number_));
    ASSERT_EQ(stats.completed, stats_.completed);
    ASSERT_EQ(stats.timed_out, stats_.timed_out);
    ASSERT_EQ(stats.cancelled, stats_.cancelled);
    ASSERT_EQ(stats.failed, stats_.failed);
    ASSERT_EQ(stats.unmatched, stats_.unmatched);
    expect_balance(registry_);
  }

  std::mt19937_64 random_{GetParam()};
  TimePoint now_ = start_time;
  Registry registry_{start_time};
  std::map<Key, Pending> model_;
  Registry::Stats stats_;
  int next_number_ = 0;
  int depth_ = 0;
};

TEST_P(RequestRegistryModel, BehavesAsAMapUnderRandomCallsAlsoFromCallbacks) {
  for (int i = 0; i < 30000; ++i) {
    step(true);
    check();
    if (HasFatalFailure()) FAIL() << "seed " << GetParam() << ", step " << i;
  }
  const auto& stats = registry_.stats();
  for (const std::uint64_t outcome :
       {stats.completed, stats.timed_out, stats.cancelled, stats.failed, stats.unmatched}) {
    EXPECT_GT(outcome, 100U) << "the steps miss a case";
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RequestRegistryModel, testing::Range<std::uint64_t>(1, 9));

}  // namespace
