// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/associated_allocator.hpp>
#include <boost/asio/associated_cancellation_slot.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/error.hpp>
#include <boost/asio/executor_work_guard.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/recycling_allocator.hpp>
#include <memory>
#include <msgtrans/detail/async_waiters.hpp>
#include <msgtrans/error.hpp>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>

namespace msgtrans::detail {

/// An asynchronous call on a channel, from its beginning to its handler: looks, on the handler's executor; looks a few
/// times more, since what is waited for is often made by what runs there next; parks; is woken; and looks again.
///
/// What is received is claimed only while it looks, after it has looked whether it was cancelled, and the handler is
/// called at once: so nothing that was claimed can be lost by cancelling.
///
/// Step, which is moved about before it starts and not after, has
///   bool attempt(State&)        true: completed, or failed; never waits
///   Probe probe()               what is needed of the step once it has parked, and may be gone at any moment:
///     bool ready(State&)          whether an attempt would end it now
///     void wake(State&)           wakes it, or another to whom it is all the same
///   static AsyncWaiters& waiters(State&)
///   static void pass_on(State&) the next one may go, if there is something for him
///   void complete(Handler&&, error_code)
template <class State, class Step, class Handler>
class AsyncOperation final : public AsyncWaiter {
 public:
  /// Throws what allocating throws, and then the handler is gone, as with every Asio operation.
  static void start(std::shared_ptr<State> state, Step step, Handler handler) {
    auto executor = boost::asio::get_associated_executor(handler, state->executor());
    Allocator allocator(boost::asio::get_associated_allocator(handler, Recycling()));
    AsyncOperation* const memory = Traits::allocate(allocator, 1);
    AsyncOperation* operation = nullptr;
    try {
      operation = ::new (static_cast<void*>(memory))
          AsyncOperation(std::move(state), std::move(step), std::move(handler), std::move(executor));
    } catch (...) {
      Traits::deallocate(allocator, memory, 1);
      throw;
    }
    Turn turn(operation);
    auto slot = boost::asio::get_associated_cancellation_slot(operation->handler_);
    if (slot.is_connected()) {
      slot.assign([operation](boost::asio::cancellation_type type) {
        if (type != boost::asio::cancellation_type::none) operation->cancel();
      });
    }
    operation->post_turn(std::move(turn));
  }

  void wake() noexcept override { post_turn(Turn(this)); }
  void discard() noexcept override { Turn{this}; }
  void look() override {
    constexpr int looks = 4;
    if (cancelled_.load(std::memory_order_relaxed)) return complete(boost::asio::error::operation_aborted);
    if (step_.attempt(*state_)) return complete({});
    if (++looks_ < looks) return post_turn(Turn(this));
    looks_ = 0;
    const auto state = state_;
    const auto probe = step_.probe();
    if (!Step::waiters(*state).park(*this, cancelled_)) return complete(boost::asio::error::operation_aborted);
    // Now it belongs to whoever wakes it, on another thread already perhaps.
    if (probe.ready(*state)) probe.wake(*state);
  }
  [[nodiscard]] const boost::asio::any_io_executor* executor() const noexcept override {
    if constexpr (std::is_same_v<Executor, boost::asio::any_io_executor>) {
      return &executor_;
    } else {
      return nullptr;
    }
  }

 private:
  using Executor = boost::asio::associated_executor_t<Handler, boost::asio::any_io_executor>;
  using Recycling = boost::asio::recycling_allocator<void>;
  using Allocator = typename std::allocator_traits<
      boost::asio::associated_allocator_t<Handler, Recycling>>::template rebind_alloc<AsyncOperation>;
  using Traits = std::allocator_traits<Allocator>;

  /// Owns the operation on its way to its executor; destroyed on the way, it ends it there.
  class Turn {
   public:
    explicit Turn(AsyncOperation* operation) noexcept : operation_(operation) {}
    Turn(Turn&& other) noexcept : operation_(std::exchange(other.operation_, nullptr)) {}
    Turn& operator=(Turn&&) = delete;
    ~Turn() {
      if (operation_ == nullptr || operation_ == posting_) return;
      const auto state = operation_->state_;
      // Handlers may own what they wait for: they go before anybody else is woken.
      destroy(operation_);
      Step::pass_on(*state);
    }
    /// After a failed post, which may have taken the operation along or not.
    void reset(AsyncOperation* operation) noexcept { operation_ = operation; }
    void operator()() { std::exchange(operation_, nullptr)->look(); }

   private:
    AsyncOperation* operation_;
  };

  AsyncOperation(std::shared_ptr<State> state, Step step, Handler handler, Executor executor)
      : state_(std::move(state)),
        step_(std::move(step)),
        handler_(std::move(handler)),
        executor_(std::move(executor)),
        work_(executor_) {}
  ~AsyncOperation() = default;

  static void destroy(AsyncOperation* operation) noexcept {
    Allocator allocator(boost::asio::get_associated_allocator(operation->handler_, Recycling()));
    // Out of it first: what the handler's end sets off may be anything.
    [[maybe_unused]] const Handler handler(std::move(operation->handler_));
    operation->~AsyncOperation();
    Traits::deallocate(allocator, operation, 1);
  }

  void complete(error_code cancelled) {
    auto slot = boost::asio::get_associated_cancellation_slot(handler_);
    if (slot.is_connected()) slot.clear();
    const auto state = std::move(state_);
    const auto work = std::move(work_);
    Step step(std::move(step_));
    Allocator allocator(boost::asio::get_associated_allocator(handler_, Recycling()));
    Handler handler(std::move(handler_));
    this->~AsyncOperation();
    Traits::deallocate(allocator, this, 1);
    Step::pass_on(*state);
    step.complete(std::move(handler), cancelled);
  }

  void cancel() noexcept {
    if (Step::waiters(*state_).take(*this, cancelled_)) post_turn(Turn(this));
  }

  void post_turn(Turn turn) noexcept {
    const Executor where = executor_;  // this may be gone before the post has returned
    for (;;) {
      posting_ = this;
      try {
        post_to(where, std::move(turn));
        posting_ = nullptr;
        return;
      } catch (const std::bad_alloc&) {
        // A wake must not get lost. The memory is a few words, and soon there again.
        posting_ = nullptr;
        std::this_thread::yield();
        turn.reset(this);
      } catch (...) {
        // An executor that takes nothing any more, like that of a context that has gone.
        posting_ = nullptr;
        turn.reset(this);
        return;
      }
    }
  }

  static void post_to(const Executor& executor, Turn turn) {
    if constexpr (std::is_same_v<Executor, boost::asio::any_io_executor>) {
      // What nearly every coroutine runs on; directly it is one allocation and two indirect calls less.
      using Common = boost::asio::io_context::executor_type;
      if (const auto* const common = executor.template target<Common>()) {
        return boost::asio::post(*common, std::move(turn));
      }
    }
    boost::asio::post(executor, std::move(turn));
  }

  // A turn destroyed while it is being posted was not posted, and its operation is still its poster's.
  static inline constinit thread_local AsyncOperation* posting_ = nullptr;

  std::shared_ptr<State> state_;
  Step step_;
  Handler handler_;
  const Executor executor_;
  boost::asio::executor_work_guard<Executor> work_;
  std::atomic<bool> cancelled_{false};
  int looks_ = 0;
};

}  // namespace msgtrans::detail
