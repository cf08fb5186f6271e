// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace msgtrans::test {

using namespace std::chrono_literals;

using Clock = std::chrono::steady_clock;

/// For what must happen: far beyond what a loaded machine under a sanitizer needs.
inline constexpr std::chrono::milliseconds patience = 20s;

/// Waits until `predicate()` holds; false if it does not within the time.
template <class Predicate>
[[nodiscard]] bool wait_until(Predicate predicate, std::chrono::milliseconds within = patience) {
  const auto deadline = Clock::now() + within;
  auto pause = 50us;
  while (!predicate()) {
    if (Clock::now() >= deadline) return predicate();
    std::this_thread::sleep_for(pause);
    if (pause < 2ms) pause *= 2;
  }
  return true;
}

/// What handlers on any thread saw, in the order it was noted. A copy refers to the same record, so that a handler may
/// hold it longer than the test's scope.
template <class T>
class Record {
 public:
  void add(T item) const {
    const std::lock_guard lock(state_->mutex);
    state_->items.push_back(std::move(item));
    state_->changed.notify_all();
  }
  [[nodiscard]] std::vector<T> all() const {
    const std::lock_guard lock(state_->mutex);
    return state_->items;
  }
  [[nodiscard]] std::size_t size() const {
    const std::lock_guard lock(state_->mutex);
    return state_->items.size();
  }
  /// The one at that place, as soon as it is there; a default one, if it does not come.
  [[nodiscard]] T at(std::size_t index, std::chrono::milliseconds within = patience) const {
    std::unique_lock lock(state_->mutex);
    const bool there =
        state_->changed.wait_until(lock, Clock::now() + within, [&] { return state_->items.size() > index; });
    return there ? state_->items[index] : T{};
  }
  [[nodiscard]] bool wait_for(std::size_t count, std::chrono::milliseconds within = patience) const {
    std::unique_lock lock(state_->mutex);
    return state_->changed.wait_until(lock, Clock::now() + within, [&] { return state_->items.size() >= count; });
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<T> items;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

/// Opened once, by anybody; waited for with a deadline. Copies are the same gate.
class Gate {
 public:
  void open() const {
    const std::lock_guard lock(state_->mutex);
    state_->open = true;
    state_->changed.notify_all();
  }
  [[nodiscard]] bool wait(std::chrono::milliseconds within = patience) const {
    std::unique_lock lock(state_->mutex);
    return state_->changed.wait_until(lock, Clock::now() + within, [&] { return state_->open; });
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool open = false;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

}  // namespace msgtrans::test
