// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "support/wait.hpp"

#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <gtest/gtest.h>
#include <memory>
#include <thread>
#include <vector>

namespace msgtrans::test {

/// For what must end, also at a high stress_factor(); less than ctest's.
inline constexpr std::chrono::milliseconds stress_deadline = 240s;

/// Runs `work`; if it does not end in time, `give_up` has to make it end, and the test has failed. If not even that
/// ends it, there is nothing left to join, and so the process ends.
inline void must_end(const std::function<void()>& work, const std::function<void()>& give_up) {
  const Gate done;
  std::thread worker([&] {
    work();
    done.open();
  });
  const bool in_time = done.wait(stress_deadline);
  EXPECT_TRUE(in_time) << "a wake-up was lost";
  if (!in_time) {
    give_up();
    if (!done.wait()) {
      std::fputs("a wake-up was lost, and those of the close as well\n", stderr);
      std::abort();
    }
  }
  worker.join();
}

/// Contexts with a thread each.
class Contexts {
 public:
  explicit Contexts(int count) {
    for (int i = 0; i < count; ++i) {
      contexts_.push_back(std::make_unique<boost::asio::io_context>(1));
      work_.push_back(boost::asio::make_work_guard(*contexts_.back()));
    }
    for (auto& context : contexts_) threads_.emplace_back([&context] { context->run(); });
  }
  ~Contexts() { finish(); }
  Contexts(const Contexts&) = delete;
  Contexts& operator=(const Contexts&) = delete;
  void finish() {
    work_.clear();
    for (auto& thread : threads_) {
      if (thread.joinable()) thread.join();
    }
  }
  boost::asio::io_context& operator[](std::size_t i) { return *contexts_[i]; }

 private:
  std::vector<std::unique_ptr<boost::asio::io_context>> contexts_;
  std::vector<boost::asio::executor_work_guard<boost::asio::io_context::executor_type>> work_;
  std::vector<std::thread> threads_;
};

}  // namespace msgtrans::test
