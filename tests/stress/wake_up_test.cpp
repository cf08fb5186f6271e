// SPDX-License-Identifier: Apache-2.0
// Hunts for lost wake-ups, for every operation that waits: a ping-pong; a race of what wakes it with what makes it give
// up (its time, or a cancellation); and a race of what wakes it with the close. channel_test.cpp has the same for many
// at once.
#include "support/history.hpp"
#include "support/stress.hpp"
#include "support/wait.hpp"

#include <algorithm>
#include <atomic>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/cancellation_type.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <functional>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/channel/broadcast_channel.hpp>
#include <msgtrans/channel/sync_channel.hpp>
#include <msgtrans/error.hpp>
#include <optional>
#include <ostream>
#include <random>
#include <span>
#include <string>
#include <sys/prctl.h>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace msgtrans::test {
namespace {

namespace asio = boost::asio;
using namespace std::chrono_literals;
using std::chrono::microseconds;

// A million with MSGTRANS_STRESS=200, which takes about ten minutes on two cores.
int rounds() {
  return 5000 * stress_factor();
}

enum class Passed { yes, gave_up, closed };

/// What is waited for. Somebody who waits is stopped at it, until somebody else knocks.
class Door {
 public:
  Door() = default;
  Door(const Door&) = delete;
  Door& operator=(const Door&) = delete;
  virtual ~Door() = default;

  /// Lets one pass, or each, if it is for everyone.
  virtual void knock() = 0;
  virtual void close() noexcept = 0;
  /// At the end: whether what went in has come out.
  [[nodiscard]] virtual bool adds_up() = 0;
  [[nodiscard]] virtual bool for_everyone() const noexcept { return false; }
  /// Whether who has been let in passes also if it is closed before he does.
  [[nodiscard]] virtual bool keeps_word() const noexcept { return true; }
};

/// Where threads wait.
class ThreadDoor : public virtual Door {
 public:
  /// `limit` is for the calls that have one.
  virtual Passed pass(std::size_t waiter, microseconds limit) = 0;
};

/// Where asynchronous operations wait.
class HandlerDoor : public virtual Door {
 public:
  using Then = std::function<void(Passed)>;
  virtual void start(std::size_t waiter, asio::io_context& where, asio::cancellation_slot slot, Then then) = 0;

 protected:
  static Passed outcome(error_code error) {
    if (!error) return Passed::yes;
    return error == asio::error::operation_aborted ? Passed::gave_up : Passed::closed;
  }
  template <class Handler>
  static auto bind(asio::io_context& where, asio::cancellation_slot slot, Handler handler) {
    return asio::bind_cancellation_slot(slot, asio::bind_executor(where.get_executor(), std::move(handler)));
  }
};

template <class Channel>
Channel make(asio::io_context& context, ChannelCapacity capacity) {
  if constexpr (std::is_same_v<Channel, SyncChannel<int>>) {
    return Channel(capacity);
  } else {
    return Channel(context.get_executor(), capacity);
  }
}

/// Who waits wants to receive.
template <class Channel>
class ReceiveDoor : public virtual Door {
 public:
  explicit ReceiveDoor(asio::io_context& context) : channel_(make<Channel>(context, ChannelCapacity::unbounded())) {}
  void knock() override {
    sent_ += ++last_;
    EXPECT_EQ(channel_.try_send(last_), ChannelStatus::ok);
  }
  void close() noexcept override { channel_.close(); }
  bool adds_up() override { return channel_.size() == 0 && sent_ == received_; }

 protected:
  Channel channel_;
  std::atomic<long> received_{0};

 private:
  int last_ = 0;
  long sent_ = 0;
};

/// Who waits wants to send, and the only place is taken.
template <class Channel>
class SendDoor : public virtual Door {
 public:
  explicit SendDoor(asio::io_context& context) : channel_(make<Channel>(context, ChannelCapacity::bounded(1))) {
    (void)channel_.try_send(0);
  }
  void knock() override {
    auto taken = channel_.try_recv();
    ASSERT_TRUE(taken) << "it must be full";
    received_ += *taken;
  }
  void close() noexcept override { channel_.close(); }
  bool adds_up() override {
    if (auto left = channel_.try_recv()) received_ += *left;
    return channel_.size() == 0 && sent_ == received_;
  }
  bool keeps_word() const noexcept override { return false; }

 protected:
  int next() noexcept { return ++last_; }
  Channel channel_;
  std::atomic<long> sent_{0};

 private:
  std::atomic<int> last_{0};
  std::atomic<long> received_{0};  // the next one may knock before this one has counted
};

/// Who waits is a subscriber; there are two.
class EventDoor : public virtual Door {
 public:
  explicit EventDoor(asio::io_context& context) : channel_(context.get_executor(), 4) {
    for (int i = 0; i < 2; ++i) subscriptions_.push_back(channel_.subscribe());
  }
  void knock() override { EXPECT_EQ(channel_.send(++last_), ChannelStatus::ok); }
  void close() noexcept override { channel_.close(); }
  bool adds_up() override { return seen_[0] == last_ && (seen_[1] == last_ || seen_[1] == 0); }
  bool for_everyone() const noexcept override { return true; }

 protected:
  Passed note(std::size_t waiter, const NextResult<int>& next) {
    if (next.kind() == NextResult<int>::Kind::timeout) return Passed::gave_up;
    if (next.closed()) return Passed::closed;
    EXPECT_EQ(next.lagged(), 0U);
    if (next) {
      EXPECT_EQ(*next, ++seen_[waiter]);
    }
    return Passed::yes;
  }
  BroadcastChannel<int> channel_;
  std::vector<Subscription<int>> subscriptions_;

 private:
  int last_ = 0;
  int seen_[2] = {};
};

// ---- the calls of threads

enum class Call { plain, with_limit, many };

template <class Channel, Call call>
class Recv final : public ReceiveDoor<Channel>, public ThreadDoor {
 public:
  using ReceiveDoor<Channel>::ReceiveDoor;
  Passed pass(std::size_t, microseconds limit) override {
    if constexpr (call == Call::many) {
      std::vector<int> out;
      auto status = ChannelStatus::ok;
      if (this->channel_.recv_many(out, 4, &status) == 0) {
        EXPECT_EQ(status, ChannelStatus::closed);
        return Passed::closed;
      }
      EXPECT_EQ(out.size(), 1U);
      this->received_ += out.front();
      return Passed::yes;
    } else {
      auto result = call == Call::plain ? this->channel_.recv() : this->channel_.recv_for(limit);
      if (!result) return result.status() == ChannelStatus::timeout ? Passed::gave_up : Passed::closed;
      this->received_ += *result;
      return Passed::yes;
    }
  }
};

template <class Channel, Call call>
class Send final : public SendDoor<Channel>, public ThreadDoor {
 public:
  using SendDoor<Channel>::SendDoor;
  Passed pass(std::size_t, microseconds limit) override {
    int value = this->next();
    auto status = ChannelStatus::ok;
    if constexpr (call == Call::many) {
      const std::size_t sent = this->channel_.send_many(std::span(&value, 1), &status);
      EXPECT_EQ(sent, status == ChannelStatus::ok ? 1U : 0U);
    } else if constexpr (call == Call::plain) {
      status = this->channel_.send(std::move(value));
    } else {
      status = this->channel_.send_for(std::move(value), limit);
    }
    if (status != ChannelStatus::ok) return status == ChannelStatus::timeout ? Passed::gave_up : Passed::closed;
    this->sent_ += value;
    return Passed::yes;
  }
};

template <Call call>
class Next final : public EventDoor, public ThreadDoor {
 public:
  using EventDoor::EventDoor;
  Passed pass(std::size_t waiter, microseconds limit) override {
    auto& subscription = subscriptions_[waiter];
    return note(waiter, call == Call::plain ? subscription.next() : subscription.next_for(limit));
  }
};

// ---- the asynchronous operations

class AsyncRecv final : public ReceiveDoor<AsyncChannel<int>>, public HandlerDoor {
 public:
  using ReceiveDoor::ReceiveDoor;
  void start(std::size_t, asio::io_context& where, asio::cancellation_slot slot, Then then) override {
    channel_.async_recv(bind(where, slot, [this, then = std::move(then)](error_code error, int value) {
      received_ += value;
      then(outcome(error));
    }));
  }
};

class AsyncRecvMany final : public ReceiveDoor<AsyncChannel<int>>, public HandlerDoor {
 public:
  using ReceiveDoor::ReceiveDoor;
  void start(std::size_t, asio::io_context& where, asio::cancellation_slot slot, Then then) override {
    channel_.async_recv_many(
        4, bind(where, slot, [this, then = std::move(then)](error_code error, const std::vector<int>& values) {
          EXPECT_EQ(values.size(), error ? 0U : 1U);
          for (const int value : values) received_ += value;
          then(outcome(error));
        }));
  }
};

class AsyncRecvManyIntoAVector final : public ReceiveDoor<AsyncChannel<int>>, public HandlerDoor {
 public:
  using ReceiveDoor::ReceiveDoor;
  void start(std::size_t waiter, asio::io_context& where, asio::cancellation_slot slot, Then then) override {
    auto& values = values_[waiter];
    values.clear();
    channel_.async_recv_many(
        values, 4, bind(where, slot, [this, &values, then = std::move(then)](error_code error, std::size_t count) {
          EXPECT_EQ(count, error ? 0U : 1U);
          EXPECT_EQ(values.size(), count);
          for (const int value : values) received_ += value;
          then(outcome(error));
        }));
  }

 private:
  std::vector<int> values_[2];
};

class AsyncSend final : public SendDoor<AsyncChannel<int>>, public HandlerDoor {
 public:
  using SendDoor::SendDoor;
  void start(std::size_t, asio::io_context& where, asio::cancellation_slot slot, Then then) override {
    const int value = next();
    channel_.async_send(
        value, bind(where, slot, [this, value, then = std::move(then)](error_code error, std::optional<int> mine) {
          EXPECT_EQ(mine, error ? std::optional(value) : std::nullopt);
          if (!error) sent_ += value;
          then(outcome(error));
        }));
  }
};

class AsyncNext final : public EventDoor, public HandlerDoor {
 public:
  using EventDoor::EventDoor;
  void start(std::size_t waiter, asio::io_context& where, asio::cancellation_slot slot, Then then) override {
    subscriptions_[waiter].async_next(
        bind(where, slot, [this, waiter, then = std::move(then)](error_code error, const NextResult<int>& next) {
          then(error ? outcome(error) : note(waiter, next));
        }));
  }
};

// ---- the table

template <class Kind>
struct Waiting {
  const char* name = nullptr;
  std::unique_ptr<Kind> (*make)(asio::io_context&) = nullptr;
  friend std::ostream& operator<<(std::ostream& out, const Waiting& waiting) { return out << waiting.name; }
};
template <class Kind, class Made>
Waiting<Kind> waiting(const char* name) {
  return {name, [](asio::io_context& context) -> std::unique_ptr<Kind> { return std::make_unique<Made>(context); }};
}
template <class Made>
Waiting<ThreadDoor> thread(const char* name) {
  return waiting<ThreadDoor, Made>(name);
}
template <class Made>
Waiting<HandlerDoor> handler(const char* name) {
  return waiting<HandlerDoor, Made>(name);
}

using Sync = SyncChannel<int>;
using Async = AsyncChannel<int>;

const auto without_limit =
    testing::Values(thread<Recv<Sync, Call::plain>>("SyncRecv"), thread<Recv<Sync, Call::many>>("SyncRecvMany"),
                    thread<Send<Sync, Call::plain>>("SyncSend"), thread<Send<Sync, Call::many>>("SyncSendMany"),
                    thread<Recv<Async, Call::plain>>("AsyncRecv"), thread<Recv<Async, Call::many>>("AsyncRecvMany"),
                    thread<Send<Async, Call::plain>>("AsyncSend"), thread<Next<Call::plain>>("BroadcastNext"));
const auto with_limit = testing::Values(
    thread<Recv<Sync, Call::with_limit>>("SyncRecvFor"), thread<Send<Sync, Call::with_limit>>("SyncSendFor"),
    thread<Recv<Async, Call::with_limit>>("AsyncRecvFor"), thread<Send<Async, Call::with_limit>>("AsyncSendFor"),
    thread<Next<Call::with_limit>>("BroadcastNextFor"));
const auto operations = testing::Values(handler<AsyncRecv>("AsyncRecv"), handler<AsyncRecvMany>("AsyncRecvMany"),
                                        handler<AsyncRecvManyIntoAVector>("AsyncRecvManyIntoAVector"),
                                        handler<AsyncSend>("AsyncSend"), handler<AsyncNext>("AsyncNext"));

const auto name_of = [](const auto& info) { return std::string(info.param.name); };

// ---- the moments

constexpr microseconds for_ever = 1h;

/// Random moments, as much before as after what they race with.
class Moments {
 public:
  explicit Moments(unsigned seed) : random_(seed) {}
  microseconds below(int limit) { return microseconds(random_() % static_cast<unsigned>(limit)); }
  bool one_in(unsigned many) { return random_() % many == 0; }
  /// By spinning: a sleep is longer than all that is of interest here.
  void pass_time(int limit) {
    const auto until = std::chrono::steady_clock::now() + below(limit);
    while (std::chrono::steady_clock::now() < until) {
    }
  }

 private:
  std::minstd_rand random_;
};

/// A sleep of this thread ends when it should, and not up to 50 us later.
void be_punctual() {
  ::prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
}

class LostWakeUpsOfThreads : public testing::TestWithParam<Waiting<ThreadDoor>> {
 protected:
  std::unique_ptr<ThreadDoor> make() { return GetParam().make(context_); }
  asio::io_context context_{1};  // blocking calls need none that runs
};
class LostWakeUpsOfThreadsInTime : public LostWakeUpsOfThreads {};
class LostWakeUpsOfOperations : public testing::TestWithParam<Waiting<HandlerDoor>> {
 protected:
  std::unique_ptr<HandlerDoor> make() { return GetParam().make(contexts_[0]); }
  Contexts contexts_{2};
};

INSTANTIATE_TEST_SUITE_P(Waiting, LostWakeUpsOfThreads, without_limit, name_of);
INSTANTIATE_TEST_SUITE_P(WaitingInTime, LostWakeUpsOfThreads, with_limit, name_of);
INSTANTIATE_TEST_SUITE_P(Waiting, LostWakeUpsOfThreadsInTime, with_limit, name_of);
INSTANTIATE_TEST_SUITE_P(Waiting, LostWakeUpsOfOperations, operations, name_of);

// ---- ping-pong

TEST_P(LostWakeUpsOfThreads, InAPingPong) {
  const auto here = make();
  const auto there = make();
  int returned = 0;
  must_end(
      [&] {
        std::thread partner([&] {
          Moments moments(1);
          while (there->pass(0, for_ever) == Passed::yes) {
            // Some long enough for the other one to fall asleep.
            if (moments.one_in(4)) moments.pass_time(20);
            here->knock();
          }
        });
        Moments moments(2);
        for (; returned < rounds(); ++returned) {
          there->knock();
          if (here->pass(0, for_ever) != Passed::yes) break;
          if (moments.one_in(4)) moments.pass_time(20);
        }
        there->close();
        partner.join();
      },
      [&] {
        there->close();
        here->close();
      });
  EXPECT_EQ(returned, rounds());
  EXPECT_TRUE(here->adds_up());
  EXPECT_TRUE(there->adds_up());
}

/// One side of a ping-pong of handlers.
struct Player {
  HandlerDoor& mine;
  HandlerDoor& other;
  asio::io_context& context;
  const int last;
  const Gate& over;
  Moments moments;
  int returned = 0;

  void wait() {
    mine.start(0, context, {}, [this](Passed passed) {
      if (passed != Passed::yes || ++returned == last) return over.open();
      if (moments.one_in(4)) moments.pass_time(20);
      other.knock();
      wait();
    });
  }
};

TEST_P(LostWakeUpsOfOperations, InAPingPong) {
  const auto here = make();
  const auto there = make();
  const Gate over;
  Player one{*here, *there, contexts_[0], rounds(), over, Moments(1)};
  Player two{*there, *here, contexts_[1], rounds() + 1, over, Moments(2)};
  must_end(
      [&] {
        one.wait();
        two.wait();
        there->knock();
        (void)over.wait(stress_deadline * 2);
        there->close();
        here->close();
        contexts_.finish();
      },
      [&] {
        there->close();
        here->close();
      });
  EXPECT_EQ(one.returned, rounds());
  EXPECT_TRUE(here->adds_up());
  EXPECT_TRUE(there->adds_up());
}

// ---- giving up
//
// Two wait: a hasty one, who gives up at any moment, and a patient one. If the hasty one takes the wake and not what it
// was for, the patient one sleeps for ever.

/// What the two tell.
struct Race {
  std::atomic<int> round{0};
  std::atomic<int> ended{0};  // the hasty one's rounds
  std::atomic<int> passed{0};
  std::atomic<int> hasty_passed{0};
  std::atomic<int> gave_up{0};
  std::atomic<bool> failed{false};

  /// Whether the round is over as it should.
  bool finish(int number, bool for_everyone) {
    while (ended != number || passed != (for_everyone ? 2 : 1) * number) {
      if (failed) return false;
      std::this_thread::yield();
    }
    return true;
  }
  void expect_all(bool for_everyone) const {
    EXPECT_EQ(ended, rounds());
    // How often is the machine's business: beside other processes who waits may always be too late, or never.
    std::printf("gave up %d times in %d rounds\n", gave_up.load(), rounds());
    EXPECT_EQ(hasty_passed + (for_everyone ? 0 : gave_up.load()), rounds());
  }
};

TEST_P(LostWakeUpsOfThreadsInTime, WhenTheTimeIsOverAtAnyMoment) {
  constexpr int longest = 20;
  const auto door = make();
  const bool for_everyone = door->for_everyone();
  Race race;
  must_end(
      [&] {
        std::thread patient([&] {
          while (door->pass(1, for_ever) == Passed::yes) ++race.passed;
        });
        std::thread hasty([&] {
          be_punctual();
          Moments moments(1);
          for (int number = 1; number <= rounds(); ++number) {
            while (race.round != number) {
              if (race.failed) return;
              std::this_thread::yield();
            }
            auto passed = Passed::gave_up;
            do {
              passed = door->pass(0, moments.below(longest));
              if (passed == Passed::closed) return;
              ++(passed == Passed::yes ? race.hasty_passed : race.gave_up);
            } while (passed == Passed::gave_up && for_everyone);
            if (passed == Passed::yes) ++race.passed;
            race.ended = number;
          }
        });
        Moments moments(2);
        for (int number = 1; number <= rounds(); ++number) {
          race.round = number;
          moments.pass_time(longest + (for_everyone ? 50 : 10));
          door->knock();
          if (!race.finish(number, for_everyone)) break;
        }
        hasty.join();
        door->close();
        patient.join();
      },
      [&] {
        race.failed = true;
        door->close();
      });
  race.expect_all(for_everyone);
  EXPECT_TRUE(door->adds_up());
}

/// The patient one. It waits anew only when it is told to, so that the hasty one may come before it in the line.
struct Patient {
  HandlerDoor& door;
  asio::io_context& context;
  Race& race;
  std::atomic<bool> waiting{false};

  void wait() {
    door.start(1, context, {}, [this](Passed passed) {
      waiting = false;
      if (passed == Passed::yes) ++race.passed;
    });
  }
};

/// The hasty one. Its calls are in its context, which is its strand.
struct Hasty {
  HandlerDoor& door;
  asio::io_context& context;
  Race& race;
  asio::cancellation_signal signal;

  void wait(int number) {
    door.start(0, context, signal.slot(), [this, number](Passed passed) {
      if (passed == Passed::closed) return;
      ++(passed == Passed::yes ? race.hasty_passed : race.gave_up);
      if (passed == Passed::gave_up && door.for_everyone()) return wait(number);
      if (passed == Passed::yes) ++race.passed;
      race.ended = number;
    });
  }
};

TEST_P(LostWakeUpsOfOperations, WhenTheyAreCancelledAtAnyMoment) {
  constexpr int longest = 6;
  const auto door = make();
  const bool for_everyone = door->for_everyone();
  Race race;
  Hasty hasty{*door, contexts_[0], race, {}};
  Patient patient{*door, contexts_[1], race, {}};
  must_end(
      [&] {
        Moments moments(1);
        const auto cancel = [&] {
          asio::post(contexts_[0], [&hasty] { hasty.signal.emit(asio::cancellation_type::terminal); });
        };
        for (int number = 1; number <= rounds(); ++number) {
          asio::post(contexts_[0], [&hasty, number] { hasty.wait(number); });
          if (moments.one_in(2)) moments.pass_time(longest);
          if (!patient.waiting.exchange(true)) asio::post(contexts_[1], [&patient] { patient.wait(); });
          moments.pass_time(longest);
          const bool first = moments.one_in(2);
          if (first) cancel();
          if (moments.one_in(2)) moments.pass_time(longest);
          door->knock();
          if (!first) {
            if (moments.one_in(2)) moments.pass_time(longest);
            cancel();
          }
          if (!race.finish(number, for_everyone)) break;
        }
        door->close();
        contexts_.finish();
      },
      [&] {
        race.failed = true;
        door->close();
      });
  race.expect_all(for_everyone);
  EXPECT_TRUE(door->adds_up());
}

// ---- closing

/// Lets one in, in every other round, and closes, at any moment; how many were let in.
int knock_and_close(Door& door, int number, Moments& moments) {
  constexpr int longest = 8;
  if (moments.one_in(2)) moments.pass_time(longest);
  const bool knocks = number % 2 == 0;
  if (knocks) door.knock();
  if (moments.one_in(2)) moments.pass_time(longest);
  door.close();
  return knocks ? 1 : 0;
}

void expect_passed(Door& door, int let_in, int passed) {
  if (door.keeps_word()) {
    EXPECT_EQ(passed, let_in);
  } else {
    EXPECT_LE(passed, let_in);
  }
  EXPECT_TRUE(door.adds_up());
}

TEST_P(LostWakeUpsOfThreads, WhenItIsClosedAtAnyMoment) {
  std::atomic<ThreadDoor*> current{nullptr};
  std::atomic<int> passed{0};
  std::atomic<bool> over{false};
  int number = 0;
  must_end(
      [&] {
        std::thread waiter([&] {
          while (!over) {
            ThreadDoor* const door = current;
            if (door == nullptr) {
              std::this_thread::yield();
              continue;
            }
            while (door->pass(0, for_ever) == Passed::yes) ++passed;
            current = nullptr;
          }
        });
        Moments moments(1);
        for (; number < rounds(); ++number) {
          const auto door = make();
          passed = 0;
          current = door.get();
          const int let_in = knock_and_close(*door, number, moments);
          while (current != nullptr && !over) std::this_thread::yield();
          if (current != nullptr) break;
          expect_passed(*door, let_in, passed);
        }
        over = true;
        waiter.join();
      },
      [&] { over = true; });
  EXPECT_EQ(number, rounds());
}

TEST_P(LostWakeUpsOfOperations, WhenItIsClosedAtAnyMoment) {
  Race race;
  int number = 0;
  std::unique_ptr<HandlerDoor> door;
  std::function<void()> wait = [&] {
    door->start(0, contexts_[1], {}, [&](Passed passed) {
      if (passed != Passed::yes) {
        race.ended = 1;
        return;
      }
      ++race.passed;
      wait();
    });
  };
  must_end(
      [&] {
        Moments moments(1);
        for (; number < rounds(); ++number) {
          door = make();
          race.passed = 0;
          race.ended = 0;
          asio::post(contexts_[1], wait);
          const int let_in = knock_and_close(*door, number, moments);
          while (race.ended == 0 && !race.failed) std::this_thread::yield();
          if (race.failed) break;
          expect_passed(*door, let_in, race.passed);
        }
        contexts_.finish();
      },
      [&] { race.failed = true; });
  EXPECT_EQ(number, rounds());
}

}  // namespace
}  // namespace msgtrans::test
