// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <msgtrans/server_transport.hpp>
#include <mutex>
#include <thread>

namespace msgtrans::tool {

/// Prints what a server has done, again and again while it is there, and a last time when it goes: a line of rates, or
/// all of its statistics as a JSON object in one line.
class StatisticsPrinter {
 public:
  /// `interval` zero: prints nothing.
  StatisticsPrinter(const ServerTransport& server, std::chrono::nanoseconds interval, bool as_json);
  ~StatisticsPrinter();
  StatisticsPrinter(const StatisticsPrinter&) = delete;
  StatisticsPrinter& operator=(const StatisticsPrinter&) = delete;

 private:
  using Clock = std::chrono::steady_clock;

  void run();
  void print();

  const ServerTransport& server_;
  const std::chrono::nanoseconds interval_;
  const bool as_json_;
  const Clock::time_point began_ = Clock::now();
  Clock::time_point last_ = began_;
  ServerStats before_;  // none: what came before the first line is in it
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace msgtrans::tool
