// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/execution_context.hpp>
#include <boost/asio/post.hpp>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace msgtrans::detail {

/// An asynchronous operation that waits for a channel. Whoever takes it out of AsyncWaiters owns it, and must either
/// wake or discard it.
class AsyncWaiter {
 public:
  AsyncWaiter() = default;
  AsyncWaiter(const AsyncWaiter&) = delete;
  AsyncWaiter& operator=(const AsyncWaiter&) = delete;

  /// Has it look again, on its executor.
  virtual void wake() noexcept = 0;
  /// Has it look again, now; on its executor. May throw what its handler throws.
  virtual void look() = 0;
  /// Destroys it without completing it: the context it would complete on is being destroyed.
  virtual void discard() noexcept = 0;
  /// Its executor, if that is of the type that can be compared with others'; or null.
  [[nodiscard]] virtual const boost::asio::any_io_executor* executor() const noexcept = 0;

 protected:
  ~AsyncWaiter() = default;

 private:
  friend class AsyncWaiters;
  AsyncWaiter* next_ = nullptr;
  AsyncWaiter* previous_ = nullptr;
  bool parked_ = false;
};

/// The operations that are parked until something changes; first come, first woken. Those that change it look at a
/// count, and take the lock only if somebody is there.
class AsyncWaiters {
 public:
  AsyncWaiters() = default;
  AsyncWaiters(const AsyncWaiters&) = delete;
  AsyncWaiters& operator=(const AsyncWaiters&) = delete;

  /// Unless `cancelled`, which is read under the lock that `take` takes. After true the waiter may be gone at once.
  bool park(AsyncWaiter& waiter, const std::atomic<bool>& cancelled) noexcept {
    const std::lock_guard lock(mutex_);
    if (cancelled.load(std::memory_order_relaxed)) return false;
    waiter.parked_ = true;
    waiter.next_ = nullptr;
    waiter.previous_ = last_;
    (last_ != nullptr ? last_->next_ : first_) = &waiter;
    last_ = &waiter;
    count_.fetch_add(1);
    return true;
  }

  /// For cancelling: sets `cancelled`, and says whether the waiter was parked, and is the caller's now.
  [[nodiscard]] bool take(AsyncWaiter& waiter, std::atomic<bool>& cancelled) noexcept {
    const std::lock_guard lock(mutex_);
    cancelled.store(true, std::memory_order_relaxed);
    if (!waiter.parked_) return false;
    unlink(waiter);
    return true;
  }

  /// The caller has changed something by a sequentially consistent operation before.
  void wake_one() noexcept {
    if (count_.load() == 0) return;
    AsyncWaiter* waiter = nullptr;
    {
      const std::lock_guard lock(mutex_);
      waiter = first_;
      if (waiter == nullptr) return;
      unlink(*waiter);
    }
    waiter->wake();
  }
  void wake_all() noexcept {
    for (AsyncWaiter* waiter = detach_all(); waiter != nullptr;) {
      AsyncWaiter* const next = waiter->next_;
      waiter->wake();
      waiter = next;
    }
  }
  /// The same with one post for all that have the same executor: for who wakes many at a time.
  void wake_all_grouped() noexcept {
    if (count_.load() == 0) return;
    for (AsyncWaiter* waiter = detach_all(); waiter != nullptr;) {
      AsyncWaiter* const first = waiter;
      waiter = first->next_;
      first->next_ = nullptr;
      const auto* const executor = first->executor();
      if (executor == nullptr || waiter == nullptr) {
        first->wake();
        continue;
      }
      AsyncWaiter** end = &first->next_;
      for (AsyncWaiter** at = &waiter; *at != nullptr;) {
        const auto* const other = (*at)->executor();
        if (other == nullptr || *other != *executor) {
          at = &(*at)->next_;
          continue;
        }
        *end = *at;
        *at = (*at)->next_;
        end = &(*end)->next_;
        *end = nullptr;
      }
      Group::post(*first, *executor);
    }
  }
  void discard_all() noexcept {
    for (AsyncWaiter* waiter = detach_all(); waiter != nullptr;) {
      AsyncWaiter* const next = waiter->next_;
      waiter->discard();
      waiter = next;
    }
  }

  [[nodiscard]] std::uint32_t count() const noexcept { return count_.load(); }

 private:
  /// Waiters on their way to their executor together.
  class Group {
   public:
    static void post(AsyncWaiter& first, boost::asio::any_io_executor executor) noexcept {
      posting_ = &first;
      try {
        boost::asio::post(executor, Group(&first));
        posting_ = nullptr;
      } catch (...) {
        posting_ = nullptr;
        wake_each(&first);  // which know how to go on
      }
    }

    explicit Group(AsyncWaiter* first) noexcept : first_(first) {}
    Group(Group&& other) noexcept : first_(std::exchange(other.first_, nullptr)) {}
    Group& operator=(Group&&) = delete;
    ~Group() {
      if (first_ == nullptr || first_ == posting_) return;
      if (running_) {
        wake_each(first_);  // a handler has thrown
      } else {
        while (first_ != nullptr) pop()->discard();
      }
    }
    void operator()() {
      running_ = true;
      while (first_ != nullptr) pop()->look();
    }

   private:
    static void wake_each(AsyncWaiter* waiter) noexcept {
      while (waiter != nullptr) std::exchange(waiter, waiter->next_)->wake();
    }
    AsyncWaiter* pop() noexcept { return std::exchange(first_, first_->next_); }

    // Of a post that fails the group is destroyed on the way out, and its waiters are still the poster's.
    static inline constinit thread_local AsyncWaiter* posting_ = nullptr;

    AsyncWaiter* first_;
    bool running_ = false;
  };

  AsyncWaiter* detach_all() noexcept {
    const std::lock_guard lock(mutex_);
    for (AsyncWaiter* waiter = first_; waiter != nullptr; waiter = waiter->next_) waiter->parked_ = false;
    AsyncWaiter* const all = first_;
    first_ = last_ = nullptr;
    count_.store(0);
    return all;
  }
  void unlink(AsyncWaiter& waiter) noexcept {
    (waiter.previous_ != nullptr ? waiter.previous_->next_ : first_) = waiter.next_;
    (waiter.next_ != nullptr ? waiter.next_->previous_ : last_) = waiter.previous_;
    waiter.parked_ = false;
    count_.fetch_sub(1);
  }

  // No wake is lost: parking counts up and then looks at the channel again; a change is made and then the count is
  // read. All four are sequentially consistent, so one of the two sees the other (Dekker).
  std::atomic<std::uint32_t> count_{0};
  std::mutex mutex_;
  AsyncWaiter* first_ = nullptr;
  AsyncWaiter* last_ = nullptr;
};

/// What has to know when the execution context that it was made for is destroyed. Held by `std::shared_ptr`.
class ContextMember : public std::enable_shared_from_this<ContextMember> {
 public:
  ContextMember(const ContextMember&) = delete;
  ContextMember& operator=(const ContextMember&) = delete;

 protected:
  /// Throws `std::bad_alloc`.
  explicit ContextMember(const boost::asio::any_io_executor& executor) {
    namespace asio = boost::asio;
    auto& context = asio::query(executor, asio::execution::context_as<asio::execution_context&>);
    registry_ = asio::use_service<Service>(context).registry();
    const std::lock_guard lock(registry_->mutex);
    next_ = registry_->first;
    if (next_ != nullptr) next_->previous_ = this;
    registry_->first = this;
  }
  virtual ~ContextMember() {
    const std::lock_guard lock(registry_->mutex);
    (previous_ != nullptr ? previous_->next_ : registry_->first) = next_;
    if (next_ != nullptr) next_->previous_ = previous_;
  }

  /// While the context's services are being shut down, once: nothing may be given to its executors any more.
  virtual void on_context_end() noexcept = 0;

 private:
  struct Registry {
    std::mutex mutex;
    ContextMember* first = nullptr;
  };
  class Service final : public boost::asio::execution_context::service {
   public:
    using key_type = Service;
    static inline boost::asio::execution_context::id id;

    explicit Service(boost::asio::execution_context& context) : service(context) {}
    [[nodiscard]] const std::shared_ptr<Registry>& registry() const noexcept { return registry_; }

    void shutdown() override {
      std::vector<std::shared_ptr<ContextMember>> left;
      {
        const std::lock_guard lock(registry_->mutex);
        for (ContextMember* member = registry_->first; member != nullptr; member = member->next_) {
          if (auto alive = member->weak_from_this().lock()) left.push_back(std::move(alive));
        }
      }
      for (const auto& member : left) member->on_context_end();
    }

   private:
    const std::shared_ptr<Registry> registry_ = std::make_shared<Registry>();
  };

  std::shared_ptr<Registry> registry_;  // of the context, which may go first
  ContextMember* next_ = nullptr;
  ContextMember* previous_ = nullptr;
};

}  // namespace msgtrans::detail
