// SPDX-License-Identifier: Apache-2.0
// Actors, their manager and its supervision, on an io_context and without a server.
#include "support/counted.hpp"
#include "support/wait.hpp"

#include <atomic>
#include <boost/asio/as_tuple.hpp>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/bind_cancellation_slot.hpp>
#include <boost/asio/bind_executor.hpp>
#include <boost/asio/cancellation_signal.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/experimental/awaitable_operators.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/use_future.hpp>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/actor/actor_manager.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

namespace {

namespace asio = boost::asio;
using namespace std::chrono_literals;
using namespace asio::experimental::awaitable_operators;
using asio::awaitable;
using asio::use_awaitable;
using msgtrans::ActorHandle;
using msgtrans::ActorManager;
using msgtrans::ActorManagerOptions;
using msgtrans::ActorOptions;
using msgtrans::ChannelStatus;
using msgtrans::Errc;
using msgtrans::error_code;
using msgtrans::Event;
using msgtrans::EventKind;
using msgtrans::make_error_code;
using msgtrans::OnFailure;
using msgtrans::ProtocolActor;
using msgtrans::ReplyTo;
using msgtrans::SessionId;
using msgtrans::Urgency;
using msgtrans::test::Record;
using msgtrans::test::wait_until;

constexpr auto as_tuple = asio::as_tuple(use_awaitable);

/// What the tests' actors are told: a number, and perhaps a question.
struct Job {
  int number = 0;
  std::shared_ptr<ReplyTo<int>> reply = nullptr;
};

// What behaviours, which must not capture, share with their test.
struct Script {
  Record<int> seen;
  Record<int> starts;
  std::atomic<bool> hold{false};
};

using Behave = awaitable<void> (*)(ProtocolActor<Job>, std::shared_ptr<Script>);

awaitable<void> note_all(ProtocolActor<Job> actor, std::shared_ptr<Script> script) {
  script->starts.add(static_cast<int>(actor.restarts()));
  while (auto job = co_await actor.receive()) {
    script->seen.add(job->number);
    if (job->reply) job->reply->answer(10 * job->number);
    if (job->number < 0) throw std::runtime_error("job " + std::to_string(job->number));
  }
}

class Actors : public testing::Test {
 protected:
  Actors() : manager_(std::make_unique<ActorManager<Job>>(context_.get_executor(), options())) {}

  ActorManagerOptions options() {
    return {
        .on_event = [events = events_](const Event& event) { events.add(event); },
        .on_escalation = [escalations = escalations_](const msgtrans::Error& error) { escalations.add(error.text); }};
  }
  ActorHandle<Job> spawn(const ActorOptions& with = {}, Behave behave = note_all) {
    return manager_->spawn(
        [behave, script = script_](ProtocolActor<Job> actor) { return behave(std::move(actor), script); }, with);
  }
  /// Runs what is ready, and what becomes so.
  void run() {
    context_.restart();
    context_.poll();
  }
  /// Runs until it holds; false if that takes too long.
  template <class Predicate>
  bool run_until(Predicate predicate) {
    const auto deadline = std::chrono::steady_clock::now() + msgtrans::test::patience;
    context_.restart();
    while (!predicate() && std::chrono::steady_clock::now() < deadline) context_.run_one_for(10ms);
    return predicate();
  }
  std::vector<int> seen() const { return script_->seen.all(); }
  std::vector<EventKind> kinds() const {
    std::vector<EventKind> all;
    for (const Event& event : events_.all()) all.push_back(event.kind);
    return all;
  }

  Record<Event> events_;
  Record<std::string> escalations_;
  std::shared_ptr<Script> script_ = std::make_shared<Script>();
  asio::io_context context_{1};
  std::unique_ptr<ActorManager<Job>> manager_;
};

TEST_F(Actors, ReceiveWhatTheyAreToldInOrder) {
  auto actor = spawn();
  for (int i = 0; i < 200; ++i) ASSERT_EQ(actor.try_tell({i}), ChannelStatus::ok);
  EXPECT_EQ(actor.mailbox_size(), 200U);
  EXPECT_EQ(manager_->stats().mailbox_depth, 200U);
  run();
  ASSERT_EQ(seen().size(), 200U);
  for (int i = 0; i < 200; ++i) EXPECT_EQ(seen()[static_cast<std::size_t>(i)], i);
  EXPECT_EQ(manager_->stats().told, 200U);
}

TEST_F(Actors, ReceiveUrgentMessagesFirst) {
  auto actor = spawn();
  for (int i = 0; i < 3; ++i) (void)actor.try_tell({i});
  for (int i = 100; i < 103; ++i) (void)actor.try_tell({i}, Urgency::urgent);
  run();
  EXPECT_EQ(seen(), (std::vector<int>{100, 101, 102, 0, 1, 2}));
}

TEST_F(Actors, AreWokenByAnUrgentMessageWhileTheyWait) {
  auto actor = spawn();
  run();
  EXPECT_EQ(actor.try_tell({7}, Urgency::urgent), ChannelStatus::ok);
  run();
  EXPECT_EQ(seen(), std::vector<int>{7});
}

TEST_F(Actors, TakeAtMost64MessagesBeforeOthersHaveTheirTurn) {
  auto actor = spawn();
  for (int i = 0; i < 200; ++i) (void)actor.try_tell({i});
  std::size_t seen_by_other = 0;
  // After its first turn, behind its second, which it has asked for already.
  while (seen().empty()) context_.run_one();
  asio::post(context_, [&] { seen_by_other = seen().size(); });
  run();
  EXPECT_EQ(seen_by_other, 128U);
  EXPECT_EQ(seen().size(), 200U);
}

TEST_F(Actors, RefuseWhatTheirMailboxHasNoRoomForAndGiveItBack) {
  auto actor = spawn({.mailbox = 2});
  (void)actor.try_tell({1});
  (void)actor.try_tell({2});
  Job third{3, std::make_shared<ReplyTo<int>>(nullptr)};
  EXPECT_EQ(actor.try_tell(std::move(third)), ChannelStatus::full);
  EXPECT_NE(third.reply, nullptr);
  EXPECT_EQ(actor.try_tell({4}, Urgency::urgent), ChannelStatus::ok);
  run();
  EXPECT_EQ(seen(), (std::vector<int>{4, 1, 2}));
  EXPECT_EQ(manager_->stats().refused, 1U);
}

TEST_F(Actors, AreToldLaterByThoseWhoWaitForRoom) {
  auto actor = spawn({.mailbox = 1});
  (void)actor.try_tell({1});
  std::vector<error_code> ends;
  for (const auto urgency : {Urgency::normal, Urgency::normal}) {
    actor.async_tell({2}, urgency, [&](error_code error, std::optional<Job> rejected) {
      EXPECT_FALSE(rejected);
      ends.push_back(error);
    });
  }
  EXPECT_TRUE(ends.empty());
  EXPECT_TRUE(run_until([&] { return ends.size() == 2 && seen().size() == 3; }));
  EXPECT_EQ(ends, std::vector<error_code>(2));
  EXPECT_EQ(manager_->stats().told, 3U);
}

TEST_F(Actors, GiveBackTheMessageOfAWaitThatIsCancelledOrMeetsTheEnd) {
  auto actor = spawn({.mailbox = 1});
  (void)actor.try_tell({1});
  asio::cancellation_signal signal;
  std::vector<std::pair<error_code, int>> ends;
  const auto note = [&](error_code error, std::optional<Job> rejected) {
    ends.emplace_back(error, rejected ? rejected->number : 0);
  };
  (void)actor.try_tell({1}, Urgency::urgent);
  actor.async_tell({2}, Urgency::urgent, asio::bind_cancellation_slot(signal.slot(), note));
  signal.emit(asio::cancellation_type::total);
  actor.async_tell({3}, Urgency::normal, note);
  actor.stop();
  EXPECT_TRUE(run_until([&] { return ends.size() == 2; }));
  std::ranges::sort(ends, {}, &std::pair<error_code, int>::second);
  EXPECT_EQ(ends[0], std::pair(error_code(asio::error::operation_aborted), 2));
  EXPECT_EQ(ends[1], std::pair(make_error_code(Errc::closed), 3));
}

TEST_F(Actors, HoldUpAThreadThatTellsThemMoreThanTheyHaveRoomFor) {
  auto actor = spawn({.mailbox = 4});
  std::thread teller([&] {
    for (int i = 0; i < 1000; ++i) EXPECT_EQ(actor.tell({i}), ChannelStatus::ok);
  });
  EXPECT_TRUE(run_until([&] { return seen().size() == 1000; }));
  teller.join();
  for (int i = 0; i < 1000; ++i) ASSERT_EQ(seen()[static_cast<std::size_t>(i)], i);
}

TEST_F(Actors, EndAfterTheRestWhenTheyAreStopped) {
  auto actor = spawn();
  for (int i = 0; i < 100; ++i) (void)actor.try_tell({i});
  EXPECT_TRUE(manager_->stop(actor.id()));
  EXPECT_FALSE(actor.is_running());
  EXPECT_EQ(actor.try_tell({100}), ChannelStatus::closed);
  run();
  EXPECT_EQ(seen().size(), 100U);
  EXPECT_EQ(manager_->size(), 0U);
  EXPECT_FALSE(manager_->find(actor.id()));
  EXPECT_FALSE(manager_->stop(actor.id()));
  EXPECT_EQ(manager_->try_tell(actor.id(), {1}), ChannelStatus::closed);
  EXPECT_EQ(manager_->stats().dropped, 0U);
  EXPECT_TRUE(kinds().empty());
}

awaitable<void> wait_for_ever(ProtocolActor<Job> actor, std::shared_ptr<Script> script) {
  script->starts.add(0);
  asio::steady_timer timer(actor.get_executor(), std::chrono::hours(1));
  co_await timer.async_wait(use_awaitable);
}

TEST_F(Actors, AreCutOutOfWhateverTheyWaitForAndWhatTheyLeaveIsCounted) {
  auto actor = spawn({}, wait_for_ever);
  for (int i = 0; i < 5; ++i) (void)actor.try_tell({i});
  run();
  actor.stop();
  run();
  EXPECT_EQ(manager_->size(), 1U);  // it does not look at its mailbox
  actor.cut();
  run();
  EXPECT_EQ(manager_->size(), 0U);
  EXPECT_EQ(manager_->stats().dropped, 5U);
  EXPECT_EQ(manager_->stats().failures, 0U);
  actor.cut();
  run();
}

TEST_F(Actors, GoOnWithTheRestAfterAFailure) {
  auto actor = spawn({.restart_delay = 1ms});
  for (const int i : {1, 2, -1, 3, 4}) (void)actor.try_tell({i});
  EXPECT_TRUE(run_until([&] { return seen().size() == 5; }));
  EXPECT_EQ(seen(), (std::vector<int>{1, 2, -1, 3, 4}));
  EXPECT_EQ(script_->starts.all(), (std::vector<int>{0, 1}));
  EXPECT_TRUE(run_until([&] { return events_.size() == 1; }));
  EXPECT_EQ(events_.at(0).kind, EventKind::actor_failed);
  EXPECT_EQ(events_.at(0).session, actor.id());
  EXPECT_EQ(events_.at(0).error.code, Errc::actor_failed);
  EXPECT_EQ(events_.at(0).error.text, "job -1");
  const auto stats = manager_->stats();
  EXPECT_EQ(stats.failures, 1U);
  EXPECT_EQ(stats.restarts, 1U);
  EXPECT_EQ(stats.given_up, 0U);
}

TEST_F(Actors, AreGivenUpWhenTheyFailTooOften) {
  auto actor = spawn({.restart_delay = 0ms, .max_restarts = 2});
  for (const int i : {-1, -2, -3, 4, 5}) (void)actor.try_tell({i});
  EXPECT_TRUE(run_until([&] { return manager_->size() == 0 && events_.size() == 3; }));
  EXPECT_EQ(seen(), (std::vector<int>{-1, -2, -3}));
  EXPECT_EQ(kinds(), (std::vector{EventKind::actor_failed, EventKind::actor_failed, EventKind::actor_stopped}));
  EXPECT_EQ(events_.at(2).error.text, "job -3");
  const auto stats = manager_->stats();
  EXPECT_EQ(stats.given_up, 1U);
  EXPECT_EQ(stats.restarts, 2U);
  EXPECT_EQ(stats.dropped, 2U);
  EXPECT_EQ(actor.try_tell({6}), ChannelStatus::closed);
}

TEST_F(Actors, ForgetFailuresThatAreOlderThanTheWindow) {
  auto actor = spawn({.restart_delay = 0ms, .max_restarts = 1, .restart_window = 1ms});
  for (int i = 1; i <= 5; ++i) {
    (void)actor.try_tell({-i});
    ASSERT_TRUE(run_until([&] { return seen().size() == static_cast<std::size_t>(i); }));
    const auto later = std::chrono::steady_clock::now() + 2ms;
    EXPECT_TRUE(run_until([&] { return std::chrono::steady_clock::now() > later; }));
  }
  EXPECT_EQ(manager_->size(), 1U);
  EXPECT_EQ(manager_->stats().restarts, 5U);
}

TEST_F(Actors, WaitLongerAfterEachFailureUpToTheLongest) {
  auto actor = spawn({.restart_delay = 20ms, .restart_delay_factor = 3.0, .longest_restart_delay = 50ms});
  std::vector<std::chrono::milliseconds> waits;
  for (int i = 1; i <= 3; ++i) {
    const auto before = std::chrono::steady_clock::now();
    (void)actor.try_tell({-i});
    ASSERT_TRUE(run_until([&] { return script_->starts.size() == static_cast<std::size_t>(i + 1); }));
    waits.push_back(std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - before));
  }
  EXPECT_GE(waits[0], 20ms);
  EXPECT_GE(waits[1], 50ms);  // 60, were it not for the longest
  EXPECT_GE(waits[2], 50ms);
  EXPECT_LT(waits[2], 180ms) << "the longest delay is not kept";
}

TEST_F(Actors, DoNotWaitToBeStartedAgainWhenTheyAreStopped) {
  auto actor = spawn({.restart_delay = 10min, .longest_restart_delay = 10min});
  auto cut = spawn({.restart_delay = 10min, .longest_restart_delay = 10min});
  for (const int i : {-1, 2}) (void)actor.try_tell({i});
  (void)cut.try_tell({-1});
  EXPECT_TRUE(run_until([&] { return events_.size() == 2; }));
  actor.stop();
  cut.cut();
  EXPECT_TRUE(run_until([&] { return manager_->size() == 0; }));
  EXPECT_EQ(script_->seen.all(), (std::vector<int>{-1, -1, 2}));
  EXPECT_EQ(manager_->stats().restarts, 1U);
  EXPECT_EQ(manager_->stats().given_up, 1U);
}

TEST_F(Actors, AreGivenUpAtOnceIfTheirOptionsSaySo) {
  auto actor = spawn({.on_failure = OnFailure::stop});
  auto other = spawn();
  (void)actor.try_tell({-1});
  EXPECT_TRUE(run_until([&] { return events_.size() == 1; }));
  EXPECT_EQ(kinds(), std::vector{EventKind::actor_stopped});
  EXPECT_EQ(manager_->size(), 1U);
  EXPECT_TRUE(other.is_running());
  EXPECT_TRUE(escalations_.all().empty());
}

TEST_F(Actors, AreAllStoppedByAFailureThatIsEverybodys) {
  auto actor = spawn({.on_failure = OnFailure::escalate});
  auto other = spawn();
  (void)other.try_tell({1});
  (void)actor.try_tell({-1});
  EXPECT_TRUE(run_until([&] { return manager_->size() == 0; }));
  EXPECT_EQ(escalations_.all(), std::vector<std::string>{"job -1"});
  EXPECT_EQ(seen().size(), 2U);
  EXPECT_THROW(spawn(), msgtrans::Exception);
}

awaitable<void> fail_at_the_start(ProtocolActor<Job> actor, std::shared_ptr<Script> script) {
  script->starts.add(static_cast<int>(actor.restarts()));
  throw 42;
  co_return;
}

TEST_F(Actors, ThatThrowAtTheStartSomethingThatIsNoExceptionAreGivenUpToo) {
  spawn({.restart_delay = 0ms, .max_restarts = 3}, fail_at_the_start);
  EXPECT_TRUE(run_until([&] { return manager_->size() == 0 && events_.size() == 4; }));
  EXPECT_EQ(script_->starts.size(), 4U);
  EXPECT_EQ(events_.at(3).error.text, "something that is no std::exception");
}

awaitable<void> fail_on_stop(ProtocolActor<Job> actor, std::shared_ptr<Script>) {
  while (const auto message = co_await actor.receive()) {
  }
  throw std::runtime_error("at the end");
}

TEST_F(Actors, ThatThrowWhenTheyAreStoppedAreToldOfAndEnd) {
  auto actor = spawn({.restart_delay = 0ms, .max_restarts = 1}, fail_on_stop);
  run();
  actor.stop();
  EXPECT_TRUE(run_until([&] { return manager_->size() == 0 && events_.size() == 2; }));
  EXPECT_EQ(kinds(), (std::vector{EventKind::actor_failed, EventKind::actor_stopped}));
}

// ---- asking

auto question(int number) {
  return [number](ReplyTo<int> reply) { return Job{number, std::make_shared<ReplyTo<int>>(std::move(reply))}; };
}

TEST_F(Actors, AnswerWhoAsks) {
  auto actor = spawn();
  auto answer = manager_->async_ask<int>(actor.id(), question(4), 10s, asio::use_future);
  run();
  ASSERT_EQ(answer.wait_for(10s), std::future_status::ready);  // a future is told by a thread of its own
  EXPECT_EQ(answer.get(), 40);
}

awaitable<void> drop_all(ProtocolActor<Job> actor, std::shared_ptr<Script> script) {
  while (auto job = co_await actor.receive()) script->seen.add(job->number);
}
awaitable<void> keep_all(ProtocolActor<Job> actor, std::shared_ptr<Script> script) {
  std::vector<Job> kept;
  while (auto job = co_await actor.receive()) {
    script->seen.add(job->number);
    kept.push_back(std::move(*job));
  }
}

struct Asked {
  error_code code;
  bool done = false;
  int answer = -1;
};
template <class Manager>
std::shared_ptr<Asked> ask(Manager& manager, SessionId id, int number, std::chrono::milliseconds timeout,
                           asio::cancellation_slot slot = {}) {
  auto asked = std::make_shared<Asked>();
  manager.template async_ask<int>(id, question(number), timeout,
                                  asio::bind_cancellation_slot(slot, [asked](error_code code, int answer) {
                                    EXPECT_FALSE(asked->done);
                                    *asked = {code, true, answer};
                                  }));
  return asked;
}

TEST_F(Actors, TellWhoAsksThatThereIsNoAnswerAndWhy) {
  auto dropping = spawn({}, drop_all);
  auto keeping = spawn({}, keep_all);
  auto full = spawn({.mailbox = 1}, wait_for_ever);
  auto failing = spawn({.on_failure = OnFailure::stop});
  (void)full.try_tell({1});
  asio::cancellation_signal signal;
  const auto dropped = ask(*manager_, dropping.id(), 1, 10s);
  const auto late = ask(*manager_, keeping.id(), 2, 5ms);
  const auto cancelled = ask(*manager_, keeping.id(), 3, 10s, signal.slot());
  const auto nobody = ask(*manager_, SessionId(1'000'000'000), 4, 10s);
  const auto crowded = ask(*manager_, full.id(), 5, 10s);
  (void)failing.try_tell({-1});
  const auto failed = ask(*manager_, failing.id(), 6, 10s);
  EXPECT_FALSE(nobody->done) << "completed inside the call";
  signal.emit(asio::cancellation_type::terminal);
  EXPECT_TRUE(run_until(
      [&] { return dropped->done && late->done && cancelled->done && nobody->done && crowded->done && failed->done; }));
  EXPECT_EQ(dropped->code, Errc::no_answer);
  EXPECT_EQ(late->code, Errc::request_timeout);
  EXPECT_EQ(cancelled->code, asio::error::operation_aborted);
  EXPECT_EQ(nobody->code, Errc::closed);
  EXPECT_EQ(crowded->code, Errc::would_block);
  EXPECT_EQ(failed->code, Errc::no_answer);
}

TEST_F(Actors, AnswerAThreadThatBlocksAndRefuseOneThatMustNot) {
  auto actor = spawn();
  auto keeping = spawn({}, keep_all);
  std::thread runner([&] { run_until([&] { return manager_->size() == 0; }); });
  error_code code;
  EXPECT_EQ(manager_->ask<int>(actor.id(), question(5), 10s, code), 50);
  EXPECT_FALSE(code);
  (void)manager_->ask<int>(keeping.id(), question(5), 5ms, code);
  EXPECT_EQ(code, Errc::request_timeout);
  ++msgtrans::detail::must_not_block;
  (void)manager_->ask<int>(actor.id(), question(6), 10s, code);
  --msgtrans::detail::must_not_block;
  EXPECT_EQ(code, Errc::blocking_on_shard);
  manager_->stop_all();
  runner.join();
}

// ---- racing a receive

awaitable<void> race_with_timers(ProtocolActor<Job> actor, std::shared_ptr<Script> script) {
  for (;;) {
    asio::steady_timer timer(actor.get_executor(), 50us);
    const auto first = co_await (actor.async_receive(as_tuple) || timer.async_wait(as_tuple));
    if (first.index() == 1) {
      script->starts.add(0);
      continue;
    }
    auto& [error, job] = std::get<0>(first);
    if (error) co_return;
    script->seen.add(job->number);
  }
}

TEST_F(Actors, LoseNoMessageWhenAReceiveIsRacedAgainstATimer) {
  auto actor = spawn({}, race_with_timers);
  constexpr int messages = 20'000;
  std::thread teller([&] {
    for (int i = 0; i < messages; ++i) {
      (void)actor.tell({i});
      if (i % 1000 != 0) continue;
      // So that timers win as well.
      const auto before = script_->starts.size();
      EXPECT_TRUE(wait_until([&] { return script_->starts.size() > before; }));
    }
    actor.stop();
  });
  EXPECT_TRUE(run_until([&] { return manager_->size() == 0; }));
  teller.join();
  const auto all = seen();
  ASSERT_EQ(all.size(), static_cast<std::size_t>(messages));
  for (int i = 0; i < messages; ++i) ASSERT_EQ(all[static_cast<std::size_t>(i)], i);
}

// ---- all of them

TEST_F(Actors, AreVisitedAndStoppedTogether) {
  for (int i = 0; i < 10; ++i) spawn();
  std::size_t visited = 0;
  manager_->for_each([&](const ActorHandle<Job>& actor) {
    ++visited;
    (void)actor.try_tell({1});
  });
  EXPECT_EQ(visited, 10U);
  bool done = false;
  manager_->async_stop_all([&] { done = true; });
  EXPECT_FALSE(done);
  EXPECT_TRUE(run_until([&] { return done; }));
  EXPECT_EQ(manager_->size(), 0U);
  EXPECT_EQ(seen().size(), 10U);
  EXPECT_GE(manager_->stats().commands, 11U);
  spawn();  // stop_all is for those that are there
  manager_->close();
  EXPECT_THROW(spawn(), msgtrans::Exception);
}

TEST_F(Actors, EndWhenTheirManagerGoes) {
  auto actor = spawn();
  (void)actor.try_tell({1});
  run();
  manager_.reset();
  run();
  EXPECT_EQ(seen(), std::vector<int>{1});
  EXPECT_EQ(actor.try_tell({2}), ChannelStatus::closed);
}

TEST(ActorsAndContexts, WhatWaitsIsDestroyedWithTheContextAndNothingIsLeft) {
  using msgtrans::test::Counted;
  auto context = std::make_unique<asio::io_context>(1);
  auto manager = std::make_unique<ActorManager<std::shared_ptr<int>>>(context->get_executor());
  std::weak_ptr<int> told;
  {
    auto value = std::make_shared<int>(1);
    told = value;
    auto actor = manager->spawn([](ProtocolActor<std::shared_ptr<int>> self) -> awaitable<void> {
      while (const auto message = co_await self.receive()) {
      }
    });
    context->poll();
    (void)actor.try_tell(std::move(value));
  }
  manager.reset();
  context.reset();
  EXPECT_TRUE(told.expired());
}

TEST(ActorOptionsValidate, NamesWhatIsOutOfRange) {
  EXPECT_FALSE(msgtrans::validate(ActorOptions{}));
  const auto text = [](const ActorOptions& options) { return msgtrans::validate(options).text; };
  EXPECT_EQ(text({.mailbox = 0}), "mailbox is 0, must be from 1 to 1073741824");
  EXPECT_NE(text({.restart_delay = -1ms}).find("restart_delay is -1 ms"), std::string::npos);
  EXPECT_NE(text({.restart_delay_factor = 0.5}).find("restart_delay_factor"), std::string::npos);
  EXPECT_NE(text({.restart_delay = 2s, .longest_restart_delay = 1s}).find("longest_restart_delay"), std::string::npos);
  EXPECT_NE(text({.restart_window = -1ms}).find("restart_window"), std::string::npos);
  asio::io_context context;
  ActorManager<Job> manager(context.get_executor());
  EXPECT_THROW(manager.spawn([](ProtocolActor<Job>) -> awaitable<void> { co_return; }, {.mailbox = 0}),
               msgtrans::Exception);
  EXPECT_THROW(ActorManager<Job>(std::vector<asio::any_io_executor>{}), msgtrans::Exception);
}

}  // namespace
