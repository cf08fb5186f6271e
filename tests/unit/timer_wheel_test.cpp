// SPDX-License-Identifier: Apache-2.0
#include "support/start_time.hpp"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/protocol/timer_wheel.hpp>
#include <optional>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using msgtrans::protocol::Duration;
using msgtrans::protocol::TimePoint;
using msgtrans::protocol::TimerWheel;
using msgtrans::test::start_time;

struct Named : TimerWheel::Timer {
  explicit Named(int n = 0) : name(n) {}
  int name;
};

std::vector<int> fired_by(TimerWheel& wheel, TimePoint now) {
  std::vector<int> names;
  const std::size_t count =
      wheel.advance(now, [&](TimerWheel::Timer& timer) { names.push_back(static_cast<Named&>(timer).name); });
  EXPECT_EQ(count, names.size());
  return names;
}

using Names = std::vector<int>;

TEST(TimerWheel, RefusesATickThatIsNotPositive) {
  EXPECT_THROW(TimerWheel(start_time, Duration(0)), std::invalid_argument);
  EXPECT_THROW(TimerWheel(start_time, Duration(-1)), std::invalid_argument);
}

TEST(TimerWheel, FiresAtItsDeadlineAndNotANanosecondBefore) {
  for (const Duration delay :
       {Duration(1ns), Duration(999999ns), Duration(1ms), Duration(1ms + 1ns), Duration(63ms), Duration(64ms),
        Duration(4095ms + 5us), Duration(4096ms), Duration(10s), Duration(1h), Duration(300h), Duration(24h * 365)}) {
    TimerWheel wheel(start_time);
    Named timer(1);
    wheel.arm(timer, start_time + delay);
    EXPECT_EQ(timer.deadline(), start_time + delay);
    EXPECT_EQ(fired_by(wheel, start_time + delay - 1ns), Names{}) << delay.count();
    EXPECT_TRUE(timer.armed());
    EXPECT_EQ(fired_by(wheel, start_time + delay), Names{1}) << delay.count();
    EXPECT_FALSE(timer.armed());
    EXPECT_TRUE(wheel.empty());
  }
}

TEST(TimerWheel, DeadlineInThePastFiresInTheNextAdvanceAlsoAtTheSameTime) {
  TimerWheel wheel(start_time);
  EXPECT_EQ(fired_by(wheel, start_time + 100ms), Names{});
  Named before_start(1), past(2), present(3);
  wheel.arm(before_start, start_time - 1h);
  wheel.arm(past, start_time + 50ms);
  wheel.arm(present, start_time + 100ms);
  EXPECT_EQ(wheel.next_deadline(), start_time - 1h);
  EXPECT_EQ(fired_by(wheel, start_time + 100ms), (Names{1, 2, 3}));
}

TEST(TimerWheel, TimeGoingBackFiresNothingThatIsLater) {
  TimerWheel wheel(start_time);
  EXPECT_EQ(fired_by(wheel, start_time + 10s), Names{});
  Named timer(1);
  wheel.arm(timer, start_time + 5s);
  EXPECT_EQ(fired_by(wheel, start_time + 4s), Names{});
  EXPECT_EQ(fired_by(wheel, start_time + 5s), Names{1});
}

TEST(TimerWheel, FiresInTheOrderOfTicksAndWithinOneInTheOrderArmed) {
  TimerWheel wheel(start_time);
  Named far(5), same_tick_first(2), same_tick_second(3), middle(4), near(1);
  wheel.arm(far, start_time + 24h * 40);
  wheel.arm(same_tick_first, start_time + 9000ms + 900us);
  EXPECT_EQ(fired_by(wheel, start_time + 8990ms), Names{});
  wheel.arm(same_tick_second, start_time + 9000ms + 100us);  // armed from nearby, so straight into a lower level
  wheel.arm(middle, start_time + 1h);
  wheel.arm(near, start_time + 8991ms);
  EXPECT_EQ(fired_by(wheel, start_time + 24h * 50), (Names{1, 2, 3, 4, 5}));
}

TEST(TimerWheel, DisarmedAndDestroyedTimersDoNotFire) {
  TimerWheel wheel(start_time);
  Named disarmed(1), stays(2);
  wheel.arm(disarmed, start_time + 1s);
  wheel.arm(stays, start_time + 1s);
  {
    Named destroyed(3);
    wheel.arm(destroyed, start_time + 1s);
    EXPECT_EQ(wheel.size(), 3U);
  }
  EXPECT_EQ(wheel.size(), 2U);
  wheel.disarm(disarmed);
  wheel.disarm(disarmed);
  EXPECT_FALSE(disarmed.armed());
  EXPECT_EQ(wheel.size(), 1U);
  EXPECT_EQ(fired_by(wheel, start_time + 2s), Names{2});
}

TEST(TimerWheel, NothingIsWokenForATimerThatWasDisarmed) {
  for (const Duration soon : {Duration(10ms), Duration(100ms), Duration(10s), Duration(1h)}) {
    TimerWheel wheel(start_time);
    Named disarmed(1), stays(2);
    wheel.arm(disarmed, start_time + soon);
    wheel.arm(stays, start_time + 24h);
    wheel.disarm(disarmed);
    EXPECT_GT(*wheel.next_deadline(), start_time + soon);
  }
}

TEST(TimerWheel, RearmingReplacesTheDeadlineAlsoFromAnotherWheel) {
  TimerWheel wheel(start_time), other(start_time);
  Named timer(1);
  other.arm(timer, start_time + 1s);
  wheel.arm(timer, start_time + 2s);
  wheel.arm(timer, start_time + 3s);
  EXPECT_TRUE(other.empty());
  EXPECT_EQ(other.next_deadline(), std::nullopt);
  EXPECT_EQ(wheel.size(), 1U);
  EXPECT_EQ(fired_by(other, start_time + 9s), Names{});
  EXPECT_EQ(fired_by(wheel, start_time + 2s), Names{});
  EXPECT_EQ(fired_by(wheel, start_time + 3s), Names{1});
}

TEST(TimerWheel, TimerOutlivesTheWheel) {
  Named near(1), far(2);
  {
    TimerWheel wheel(start_time);
    wheel.arm(near, start_time + 1s);
    wheel.arm(far, start_time + 24h * 365);
  }
  EXPECT_FALSE(near.armed());
  EXPECT_FALSE(far.armed());
}

TEST(TimerWheel, CallbackMayDisarmAndDestroyTimersDueInTheSameAdvance) {
  TimerWheel wheel(start_time);
  Named first(1), disarmed(2), last(4);
  auto destroyed = std::make_unique<Named>(3);
  for (Named* timer : {&first, &disarmed, destroyed.get(), &last}) wheel.arm(*timer, start_time + 1s);
  Names names;
  wheel.advance(start_time + 1s, [&](TimerWheel::Timer& timer) {
    names.push_back(static_cast<Named&>(timer).name);
    EXPECT_FALSE(timer.armed());
    if (&timer != &first) return;
    EXPECT_TRUE(disarmed.armed());
    EXPECT_EQ(wheel.size(), 3U);
    EXPECT_EQ(wheel.next_deadline(), start_time + 1s);
    wheel.disarm(disarmed);
    destroyed.reset();
  });
  EXPECT_EQ(names, (Names{1, 4}));
  EXPECT_TRUE(wheel.empty());
}

TEST(TimerWheel, CallbackMayDestroyItsOwnTimer) {
  TimerWheel wheel(start_time);
  auto own = std::make_unique<Named>(1);
  Named other(2);
  wheel.arm(*own, start_time + 1s);
  wheel.arm(other, start_time + 1s);
  EXPECT_EQ(wheel.advance(start_time + 1s,
                          [&](TimerWheel::Timer& timer) {
                            if (&timer == own.get()) own.reset();
                          }),
            2U);
}

TEST(TimerWheel, ATimerArmedInACallbackNeverFiresInTheSameAdvance) {
  TimerWheel wheel(start_time);
  Named again(1), pulled_in(2);
  wheel.arm(again, start_time + 1s);
  wheel.arm(pulled_in, start_time + 5s);
  const std::size_t fired = wheel.advance(start_time + 2s, [&](TimerWheel::Timer& timer) {
    ASSERT_EQ(&timer, &again);
    wheel.arm(again, start_time + 1s);
    wheel.arm(pulled_in, start_time + 2s);
  });
  EXPECT_EQ(fired, 1U);
  EXPECT_EQ(wheel.next_deadline(), start_time + 1s);
  EXPECT_EQ(fired_by(wheel, start_time + 2s), (Names{1, 2}));
}

TEST(TimerWheel, NestedAdvanceFiresEachTimerOnce) {
  TimerWheel wheel(start_time);
  Named a(1), b(2), c(3);
  wheel.arm(a, start_time + 1s);
  wheel.arm(b, start_time + 1s);
  wheel.arm(c, start_time + 3s);
  Names inner;
  EXPECT_EQ(wheel.advance(start_time + 1s, [&](TimerWheel::Timer&) { inner = fired_by(wheel, start_time + 3s); }), 1U);
  EXPECT_EQ(inner, (Names{2, 3}));
}

TEST(TimerWheel, AfterAThrowingCallbackTheOthersStayArmed) {
  TimerWheel wheel(start_time);
  Named a(1), b(2), c(3);
  for (Named* timer : {&a, &b, &c}) wheel.arm(*timer, start_time + 1s);
  EXPECT_THROW(wheel.advance(start_time + 1s, [](TimerWheel::Timer&) { throw std::runtime_error("handler"); }),
               std::runtime_error);
  EXPECT_EQ(wheel.size(), 2U);
  EXPECT_EQ(wheel.next_deadline(), start_time + 1s);
  EXPECT_EQ(fired_by(wheel, start_time + 1s), (Names{2, 3}));
}

TEST(TimerWheel, ALateAdvanceOverYearsIsFast) {
  TimerWheel wheel(start_time);
  std::vector<Named> timers(10000);
  std::mt19937_64 random(1);
  const auto years = std::chrono::duration_cast<Duration>(24h * 365 * 20);
  for (Named& timer : timers) {
    wheel.arm(timer,
              start_time + Duration(static_cast<Duration::rep>(random() % static_cast<std::uint64_t>(years.count()))));
  }
  Named never(1);
  wheel.arm(never, TimePoint::max());
  // It takes milliseconds; a walk over the ticks in between (6e11) would take an hour, and the test not end.
  EXPECT_EQ(wheel.advance(start_time + years, [](TimerWheel::Timer&) {}), timers.size());
  EXPECT_EQ(wheel.advance(TimePoint::max() - 1ns, [](TimerWheel::Timer&) {}), 0U);
  EXPECT_EQ(fired_by(wheel, TimePoint::max()), Names{1});
}

TEST(TimerWheel, ExtremeStartAndDeadlinesDoNotOverflow) {
  TimerWheel wheel(TimePoint::min());
  Named earliest(1), middle(2), latest(3);
  wheel.arm(latest, TimePoint::max());
  wheel.arm(middle, TimePoint{});
  wheel.arm(earliest, TimePoint::min());
  EXPECT_EQ(wheel.next_deadline(), TimePoint::min());
  EXPECT_EQ(fired_by(wheel, TimePoint{} - 1ns), Names{1});
  EXPECT_EQ(fired_by(wheel, TimePoint{}), Names{2});
  EXPECT_EQ(fired_by(wheel, TimePoint::max()), Names{3});
}

TEST(TimerWheel, ADriverThatSleepsUntilNextDeadlineIsExactAndNeverSpins) {
  TimerWheel wheel(start_time);
  std::mt19937_64 random(2);
  std::vector<Named> timers(2000);
  for (Named& timer : timers) {
    const unsigned bits = static_cast<unsigned>(random() % 52);
    wheel.arm(timer, start_time + Duration(static_cast<Duration::rep>(random() & ((std::uint64_t{1} << bits) - 1))));
  }
  for (std::size_t i = 0; i < timers.size(); i += 2) wheel.disarm(timers[i]);  // leaves bounds that are too early
  std::size_t fired = 0;
  std::size_t wakes = 0;
  TimePoint now = start_time;
  while (const auto next = wheel.next_deadline()) {
    if (wakes != 0) {
      ASSERT_GT(*next, now) << "woken for nothing at the same time";
    }
    now = std::max(now, *next);
    ++wakes;
    fired += wheel.advance(now, [&](TimerWheel::Timer& timer) { EXPECT_EQ(timer.deadline(), now); });
  }
  EXPECT_EQ(fired, timers.size() / 2);
  // For each timer at most one wake at every level it passes, one for the disarmed neighbour, and its own.
  EXPECT_LE(wakes, fired * 7);
}

// The wheel against a plain list, through random arming, disarming, callbacks that do the same, and jumps of all sizes.
class TimerWheelModel : public testing::TestWithParam<std::uint64_t> {
 protected:
  struct Modelled : TimerWheel::Timer {
    std::optional<TimePoint> deadline_in_model;
    bool armed_in_this_advance = false;
  };

  // Half of the distances are within a second; the rest go up to about 50 days.
  Duration distance() {
    const unsigned bits =
        random_() % 2 == 0 ? static_cast<unsigned>(random_() % 30) : static_cast<unsigned>(random_() % 53);
    return Duration(static_cast<Duration::rep>(random_() & ((std::uint64_t{1} << bits) - 1)));
  }

  void arm_one() {
    Modelled& timer = timers_[random_() % timers_.size()];
    const TimePoint deadline = random_() % 8 == 0 ? now_ - distance() : now_ + distance();
    wheel_.arm(timer, deadline);
    timer.deadline_in_model = deadline;
    timer.armed_in_this_advance = true;
  }

  void disarm_one() {
    Modelled& timer = timers_[random_() % timers_.size()];
    wheel_.disarm(timer);
    timer.deadline_in_model.reset();
  }

  void advance() {
    for (Modelled& timer : timers_) timer.armed_in_this_advance = false;
    now_ += distance();
    std::optional<Duration::rep> last_tick;
    wheel_.advance(now_, [&](TimerWheel::Timer& fired) {
      Modelled& timer = static_cast<Modelled&>(fired);
      ASSERT_TRUE(timer.deadline_in_model.has_value()) << "fired, but not armed";
      ASSERT_EQ(timer.deadline(), *timer.deadline_in_model);
      ASSERT_LE(timer.deadline(), now_) << "fired before its deadline";
      ASSERT_FALSE(timer.armed_in_this_advance);
      const Duration::rep tick = std::max<Duration::rep>((timer.deadline() - start_time) / 1ms, reached_);
      if (last_tick) {
        ASSERT_GE(tick, *last_tick) << "fired out of order";
      }
      last_tick = tick;
      timer.deadline_in_model.reset();
      if (random_() % 4 == 0) arm_one();
      if (random_() % 4 == 0) disarm_one();
    });
    reached_ = (now_ - start_time) / 1ms;
    for (const Modelled& timer : timers_) {
      if (timer.deadline_in_model && !timer.armed_in_this_advance) {
        ASSERT_GT(*timer.deadline_in_model, now_) << "due, but not fired";
      }
    }
  }

  void check() {
    std::size_t armed = 0;
    TimePoint earliest = TimePoint::max();
    for (const Modelled& timer : timers_) {
      ASSERT_EQ(timer.armed(), timer.deadline_in_model.has_value());
      if (!timer.deadline_in_model) continue;
      ++armed;
      earliest = std::min(earliest, *timer.deadline_in_model);
    }
    ASSERT_EQ(wheel_.size(), armed);
    ASSERT_EQ(wheel_.empty(), armed == 0);
    ASSERT_EQ(wheel_.next_deadline().has_value(), armed != 0);
    if (armed != 0) {
      ASSERT_LE(*wheel_.next_deadline(), earliest);
    }
  }

  std::mt19937_64 random_{GetParam()};
  TimePoint now_ = start_time;
  Duration::rep reached_ = 0;  // tick
  TimerWheel wheel_{start_time};
  std::vector<Modelled> timers_ = std::vector<Modelled>(100);
};

TEST_P(TimerWheelModel, BehavesAsAPlainListOfDeadlines) {
  for (int step = 0; step < 50000; ++step) {
    const auto choice = random_() % 8;
    if (choice < 4) {
      arm_one();
    } else if (choice < 6) {
      disarm_one();
    } else {
      advance();
    }
    check();
    if (HasFatalFailure()) FAIL() << "seed " << GetParam() << ", step " << step;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, TimerWheelModel, testing::Range<std::uint64_t>(1, 9));

}  // namespace
