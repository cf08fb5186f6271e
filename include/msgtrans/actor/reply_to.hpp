// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/asio/any_completion_executor.hpp>
#include <boost/asio/any_completion_handler.hpp>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/associated_cancellation_slot.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/execution/outstanding_work.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/prefer.hpp>
#include <boost/asio/system_executor.hpp>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <msgtrans/detail/clock.hpp>
#include <msgtrans/error.hpp>
#include <mutex>
#include <type_traits>
#include <utility>

namespace msgtrans {

namespace detail {

/// A question that waits for its answer. Any thread.
template <class R>
class Question {
 public:
  virtual ~Question() = default;
  /// The first time ends it; then nothing.
  virtual void settle(error_code code, R result) = 0;
};

/// Ended by whichever comes first of the answer, its loss, the timeout and the cancellation. Its timer and its last
/// step are on the handler's executor where that is one of a context, else on the fallback; the handler always is on
/// its own.
template <class R>
class AsyncQuestion final : public Question<R>, public std::enable_shared_from_this<AsyncQuestion<R>> {
 public:
  using Handler = boost::asio::any_completion_handler<void(error_code, R)>;

  /// `fallback`: for a handler without an executor.
  template <class H>
  AsyncQuestion(H handler, const boost::asio::any_io_executor& fallback)
      : executor_(
            boost::asio::prefer(executor_of(handler, fallback), boost::asio::execution::outstanding_work.tracked)),
        timer_(executor_),
        handler_(std::move(handler)) {}

  /// Once. Zero: no timeout.
  void start(std::chrono::milliseconds timeout) {
    auto slot = boost::asio::get_associated_cancellation_slot(handler_);
    if (slot.is_connected()) {
      slot.assign([weak = this->weak_from_this()](boost::asio::cancellation_type type) {
        const auto self = weak.lock();
        if (self && type != boost::asio::cancellation_type::none) {
          self->settle(boost::asio::error::operation_aborted, R());
        }
      });
    }
    if (timeout.count() == 0) return;
    const std::lock_guard lock(mutex_);
    timer_.expires_after(timeout);
    timer_.async_wait([weak = this->weak_from_this()](const error_code& error) {
      const auto self = weak.lock();
      if (self && !error) self->settle(make_error_code(Errc::request_timeout), R());
    });
  }

  void settle(error_code code, R result) override {
    const std::lock_guard lock(mutex_);
    if (settled_) return;
    settled_ = true;
    timer_.cancel();
    const auto executor = std::move(executor_);
    boost::asio::post(executor, [executor, handler = std::move(handler_), code, result = std::move(result)]() mutable {
      const auto own = boost::asio::get_associated_executor(handler, boost::asio::any_completion_executor(executor));
      boost::asio::dispatch(own, [handler = std::move(handler), code, result = std::move(result)]() mutable {
        auto slot = boost::asio::get_associated_cancellation_slot(handler);
        if (slot.is_connected()) slot.clear();
        std::move(handler)(code, std::move(result));
      });
    });
  }

 private:
  template <class H>
  static boost::asio::any_io_executor executor_of(const H& handler, const boost::asio::any_io_executor& fallback) {
    using Executor = boost::asio::associated_executor_t<H, boost::asio::any_io_executor>;
    // The system's would start threads for it.
    constexpr bool is_of_a_context = std::is_convertible_v<Executor, boost::asio::any_io_executor> &&
                                     !std::is_same_v<Executor, boost::asio::system_executor>;
    if constexpr (is_of_a_context) {
      return boost::asio::get_associated_executor(handler, fallback);
    } else {
      return fallback;
    }
  }

  boost::asio::any_io_executor executor_;  // keeps its context running meanwhile
  std::mutex mutex_;                       // of all below: answers, timer and cancellation come from anywhere
  detail::Timer timer_;
  bool settled_ = false;
  Handler handler_;
};

/// For a thread that waits.
template <class R>
class BlockingQuestion final : public Question<R> {
 public:
  void settle(error_code code, R result) override {
    const std::lock_guard lock(mutex_);
    if (settled_) return;
    settled_ = true;
    code_ = code;
    result_ = std::move(result);
    changed_.notify_all();
  }
  /// Zero: for ever.
  R wait(std::chrono::milliseconds timeout, error_code& code) {
    std::unique_lock lock(mutex_);
    const auto settled = [this] { return settled_; };
    if (timeout.count() == 0) {
      changed_.wait(lock, settled);
    } else if (!changed_.wait_for(lock, timeout, settled)) {
      settled_ = true;
      code_ = make_error_code(Errc::request_timeout);
    }
    code = code_;
    return std::move(result_);
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool settled_ = false;
  error_code code_;
  R result_{};
};

}  // namespace detail

/// Where one answer to a question goes: part of the message that asks. Whoever got it answers once, from any thread;
/// destroyed without an answer, it tells the one who asks (`no_answer`). Movable; each object is used by one thread at
/// a time.
template <class R>
class ReplyTo {
 public:
  explicit ReplyTo(std::shared_ptr<detail::Question<R>> question) noexcept : question_(std::move(question)) {}
  ReplyTo(ReplyTo&&) noexcept = default;
  ReplyTo& operator=(ReplyTo&& other) noexcept {
    ReplyTo(std::move(other)).question_.swap(question_);
    return *this;
  }
  ~ReplyTo() {
    if (!question_) return;
    try {
      question_->settle(make_error_code(Errc::no_answer), R());
    } catch (...) {
      // Out of memory for telling it; the handler has been destroyed, which ends its wait.
    }
  }

  /// False if it was answered before. Should the question have timed out or been cancelled, the answer is dropped.
  bool answer(R result) {
    if (!question_) return false;
    std::exchange(question_, nullptr)->settle({}, std::move(result));
    return true;
  }

 private:
  std::shared_ptr<detail::Question<R>> question_;
};

}  // namespace msgtrans
