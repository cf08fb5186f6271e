// SPDX-License-Identifier: Apache-2.0
// The loop behind the control path, on sessions that have no socket.
#include "control_loop.hpp"

#include "support/no_host.hpp"
#include "support/wait.hpp"

#include <atomic>
#include <boost/asio/io_context.hpp>
#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace msgtrans::detail {
namespace {

using namespace std::chrono_literals;
using test::patience;

SessionPtr session_without_socket(const std::shared_ptr<Shard>& shard) {
  return SessionPtr(new SessionState(next_session_id(), shard, std::make_shared<test::NoHost>(),
                                     std::make_shared<const SessionOptions>(), Link(), Peer()));
}

ControlCommand news(const SessionPtr& session, std::uint32_t sequence, std::string text) {
  return {ControlCommand::Announce{{EventKind::slow_consumer, session->id(), std::move(text)}}, session, sequence};
}

class ControlLoops : public testing::TestWithParam<ControlLoop::Runs> {
 protected:
  ControlLoops()
      : loop_(std::make_shared<ControlLoop>(context_.get_executor(), GetParam(), 1 << 16)),
        events_(loop_->subscribe()),
        runner_([this] { context_.run(); }) {}
  ~ControlLoops() override {
    if (!ended_) end();
    work_.reset();
    runner_.join();
  }
  void end() {
    ended_ = true;
    std::promise<void> done;
    loop_->shut_down([&done] { done.set_value(); });
    EXPECT_EQ(done.get_future().wait_for(patience), std::future_status::ready);
    loop_->join();
  }
  std::string next() {
    const auto event = events_.next_for(patience);
    return event ? event->subject : "no event";
  }

  asio::io_context context_{1};
  asio::executor_work_guard<asio::io_context::executor_type> work_ = asio::make_work_guard(context_);
  std::shared_ptr<Shard> shard_ = std::make_shared<Shard>();
  std::shared_ptr<ControlLoop> loop_;
  Subscription<Event> events_;
  std::thread runner_;
  bool ended_ = false;
};

INSTANTIATE_TEST_SUITE_P(Runs, ControlLoops,
                         testing::Values(ControlLoop::Runs::on_own_thread, ControlLoop::Runs::on_executor));

TEST_P(ControlLoops, CarryOutWhatWasSentBeforeTheStart) {
  const auto session = session_without_socket(shard_);
  loop_->send(news(session, 0, "early"));
  EXPECT_FALSE(events_.try_next());
  loop_->start();
  EXPECT_EQ(next(), "early");
}

TEST_P(ControlLoops, PutCommandsAboutOneSessionInOrderHoweverTheyCome) {
  const auto session = session_without_socket(shard_);
  const auto other = session_without_socket(shard_);
  loop_->start();
  loop_->send(news(session, 2, "third"));
  loop_->send(news(session, 1, "second"));
  loop_->send(news(other, 0, "another's"));
  EXPECT_EQ(next(), "another's");
  loop_->send(news(session, 0, "first"));
  EXPECT_EQ(next(), "first");
  EXPECT_EQ(next(), "second");
  EXPECT_EQ(next(), "third");
  EXPECT_EQ(loop_->stats().reordered, 2U);
}

TEST_P(ControlLoops, NeverReverseCommandsOfManyThreadsAboutOneSession) {
  loop_->start();
  constexpr int threads = 4, each = 3000, sessions = 3;
  struct Made {
    std::mutex mutex;
    int count = 0;
  };
  std::vector<SessionPtr> targets;
  std::vector<Made> made(sessions);
  for (int i = 0; i < sessions; ++i) targets.push_back(session_without_socket(shard_));
  std::vector<std::thread> makers;
  for (int t = 0; t < threads; ++t) {
    makers.emplace_back([&, t] {
      std::mt19937 random(static_cast<unsigned>(t));
      for (int i = 0; i < each; ++i) {
        const std::size_t which = random() % sessions;
        ControlCommand command;
        {
          // Made in this order; sent in whatever order the threads come to it.
          const std::lock_guard lock(made[which].mutex);
          const auto sequence = targets[which]->control().next(false);
          command = news(targets[which], *sequence, std::to_string(made[which].count++));
        }
        if (random() % 4 == 0) std::this_thread::yield();
        loop_->send(std::move(command));
      }
    });
  }
  for (auto& maker : makers) maker.join();
  end();
  std::vector<int> seen(sessions, 0);
  for (int i = 0; i < threads * each; ++i) {
    const auto event = events_.next_for(patience);
    ASSERT_TRUE(event);
    std::size_t which = 0;
    while (targets[which]->id() != event->session) ++which;
    ASSERT_EQ(event->subject, std::to_string(seen[which]++));
  }
  EXPECT_TRUE(events_.next_for(patience).closed());
  EXPECT_EQ(loop_->stats().commands, static_cast<std::uint64_t>(threads * each));
}

TEST_P(ControlLoops, TakeNoCommandAboutASessionAfterItsLast) {
  const auto session = session_without_socket(shard_);
  loop_->start();
  loop_->send_about(*session, ControlCommand::SessionAdded{});
  loop_->send_about(*session, ControlCommand::SessionRemoved{Error(Errc::closed_by_peer)}, true);
  loop_->send_about(*session, ControlCommand::SessionAdded{});
  end();
  EXPECT_EQ(events_.next_for(patience)->kind, EventKind::session_connected);
  EXPECT_EQ(events_.next_for(patience)->kind, EventKind::session_disconnected);
  EXPECT_TRUE(events_.next_for(patience).closed());
  EXPECT_EQ(loop_->stats().commands, 2U);
}

TEST_P(ControlLoops, CarryOutAllThatWasSentBeforeTheyAreShutDownAndRefuseTheRest) {
  loop_->start();
  std::atomic<int> resized = 0;
  constexpr int commands = 2000;
  for (int i = 0; i < commands; ++i) loop_->send({ControlCommand::ResizePool{[&resized] { ++resized; }}});
  end();
  EXPECT_EQ(resized, commands);
  EXPECT_FALSE(loop_->send({ControlCommand::ResizePool{[&resized] { ++resized; }}}));
  EXPECT_EQ(resized, commands);
  EXPECT_EQ(loop_->stats().refused, 1U);
}

TEST_P(ControlLoops, GoOnAfterACommandThatThrows) {
  loop_->start();
  loop_->send({ControlCommand::ResizePool{[] { throw std::bad_alloc(); }}});
  loop_->announce({EventKind::pool_grown, {}, "after it"});
  EXPECT_EQ(next(), "after it");
  EXPECT_EQ(loop_->stats().failed, 1U);
}

TEST_P(ControlLoops, EndWithoutEverHavingBeenStarted) {
  loop_->announce({EventKind::pool_grown, {}, "never started"});
  end();
  EXPECT_EQ(next(), "never started");
  EXPECT_TRUE(events_.next_for(patience).closed());
}

}  // namespace
}  // namespace msgtrans::detail
