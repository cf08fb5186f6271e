// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/unordered/unordered_flat_map.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <msgtrans/protocol/time.hpp>
#include <msgtrans/protocol/timer_wheel.hpp>
#include <msgtrans/session_id.hpp>
#include <optional>
#include <type_traits>
#include <utility>

namespace msgtrans::protocol {

/// The requests of one shard that wait for their responses, each keyed by (session, message id) and holding the
/// completion that its outcome goes to. A response that matches none of them - late, duplicate, forged, or of another
/// session - is counted and touches nothing.
///
/// `Completion` may be move-only; moving it must not throw, and neither must destroying it.
///
/// The callbacks of `expire` and `fail_all` get their completion after its request has left the registry, and may call
/// everything here but the destructor. If one throws, the exception passes through: its own request is gone and
/// counted, those not yet handed out stay pending. Completions left when the registry is destroyed are destroyed
/// without being called; a destructor among them that calls `take` or `cancel` finds nothing.
///
/// Thread safety: none; one thread at a time.
/// Complexity: `add`, `take`, `cancel`, `contains`, `pending` O(1) expected; `fail_all` O(pending requests of that
/// session); `expire` as TimerWheel::advance. Once it has grown to its load it allocates nothing for a request: nodes
/// come from a free list, and only the hash tables move to fresh memory now and then, once in a thousand requests or
/// less. After a burst the memory goes back: at most `size() + 1024` free nodes are kept, the tables shrink, and of a
/// session without pending requests nothing is kept. All of it comes from `Allocator`.
template <class Completion, class Allocator = std::allocator<std::byte>>
class RequestRegistry {
  static_assert(std::is_object_v<Completion> && !std::is_const_v<Completion>);
  static_assert(std::is_nothrow_move_constructible_v<Completion>, "moving a completion must not throw");
  static_assert(std::is_nothrow_destructible_v<Completion>, "destroying a completion must not throw");

 public:
  /// started == completed + timed_out + cancelled + failed + size(), at any time.
  struct Stats {
    std::uint64_t started = 0;    ///< taken by `add`
    std::uint64_t completed = 0;  ///< handed out by `take`
    std::uint64_t timed_out = 0;  ///< handed out by `expire`
    std::uint64_t cancelled = 0;  ///< handed out by `cancel`
    std::uint64_t failed = 0;     ///< handed out by `fail_all`
    std::uint64_t unmatched = 0;  ///< responses that `take` found no request for
  };

  /// `start`: as for TimerWheel, the earliest time that `expire` will be given.
  explicit RequestRegistry(TimePoint start, const Allocator& allocator = Allocator())
      : wheel_(start), index_(allocator), sessions_(allocator), node_allocator_(allocator) {}

  RequestRegistry(const RequestRegistry&) = delete;
  RequestRegistry& operator=(const RequestRegistry&) = delete;

  ~RequestRegistry() {
    while (!index_.empty()) {
      Index doomed(index_.get_allocator());
      doomed.swap(index_);
      sessions_.clear();
      for (auto& [key, node] : doomed) wheel_.disarm(*node);
      for (auto& [key, node] : doomed) {
        std::destroy_at(&node->completion);
        dispose(node);
      }
    }
    trim_free(0);
  }

  /// Adds a request. `deadline` is when `expire` gives up on it, TimePoint::max() means never. False, with
  /// `completion` untouched, if that key is pending already. Throws what the allocator throws, then nothing
  /// has changed.
  [[nodiscard]] bool add(SessionId session, std::uint32_t id, TimePoint deadline, Completion&& completion) {
    const auto [entry, inserted] = index_.try_emplace(Key{session, id}, nullptr);
    if (!inserted) return false;
    Node* node = nullptr;
    Waiting* waiting = nullptr;
    try {
      node = acquire();
      waiting = &sessions_[session];
    } catch (...) {
      if (node != nullptr) release(node);
      index_.erase(entry);
      throw;
    }
    std::construct_at(&node->completion, std::move(completion));
    node->key = Key{session, id};
    node->number = ++stats_.started;
    node->prev = waiting->last;
    node->next = nullptr;
    (waiting->last != nullptr ? waiting->last->next : waiting->first) = node;
    waiting->last = node;
    ++waiting->count;
    entry->second = node;
    if (deadline != TimePoint::max()) wheel_.arm(*node, deadline);
    return true;
  }

  [[nodiscard]] bool contains(SessionId session, std::uint32_t id) const noexcept {
    return index_.contains(Key{session, id});
  }

  /// A response came: its request's completion, or nullopt, counted as unmatched, if no such request is pending.
  [[nodiscard]] std::optional<Completion> take(SessionId session, std::uint32_t id) noexcept {
    const auto entry = index_.find(Key{session, id});
    if (entry == index_.end()) {
      ++stats_.unmatched;
      return std::nullopt;
    }
    ++stats_.completed;
    return std::optional<Completion>(remove(entry));
  }

  /// The caller gave up on the request: its completion, or nullopt, not counted, if no such request is pending.
  [[nodiscard]] std::optional<Completion> cancel(SessionId session, std::uint32_t id) noexcept {
    const auto entry = index_.find(Key{session, id});
    if (entry == index_.end()) return std::nullopt;
    ++stats_.cancelled;
    return std::optional<Completion>(remove(entry));
  }

  /// Removes every request whose deadline is `now` or earlier and calls `f(SessionId, std::uint32_t, Completion&&)` for
  /// each, in the order of their deadlines to the millisecond, and within one in the order added. Returns how many.
  /// What `f` adds meanwhile, it does not reach in the same call.
  template <class F>
  std::size_t expire(TimePoint now, F&& f) {
    return wheel_.advance(now, [&](TimerWheel::Timer& timer) {
      const Key key = static_cast<Node&>(timer).key;
      ++stats_.timed_out;
      f(key.session, key.id, remove(index_.find(key)));
    });
  }

  /// The session ended: removes every request of it and calls `f(SessionId, std::uint32_t, Completion&&)` for each, in
  /// the order added. Returns how many. Requests that `f` adds meanwhile stay; those that it takes or cancels, or that
  /// a nested call reaches first, are not handed out twice.
  template <class F>
  std::size_t fail_all(SessionId session, F&& f) {
    const std::uint64_t last = stats_.started;
    std::size_t count = 0;
    // Looked up anew each time: f may have changed anything.
    for (auto waiting = sessions_.find(session); waiting != sessions_.end() && waiting->second.first->number <= last;
         waiting = sessions_.find(session)) {
      const Key key = waiting->second.first->key;
      ++stats_.failed;
      ++count;
      f(key.session, key.id, remove(index_.find(key)));
    }
    return count;
  }

  /// When to call `expire` next, as TimerWheel::next_deadline; nullopt if no pending request has a deadline.
  [[nodiscard]] std::optional<TimePoint> next_deadline() const noexcept { return wheel_.next_deadline(); }

  /// How many requests are pending.
  [[nodiscard]] std::size_t size() const noexcept { return index_.size(); }

  /// How many requests of that session are pending.
  [[nodiscard]] std::size_t pending(SessionId session) const noexcept {
    const auto waiting = sessions_.find(session);
    return waiting == sessions_.end() ? 0 : waiting->second.count;
  }

  [[nodiscard]] const Stats& stats() const noexcept { return stats_; }

 private:
  static constexpr std::size_t spare_nodes = 1024;
  static constexpr std::size_t small_table = 4096;  // buckets; tables up to this size never shrink

  struct Key {
    SessionId session;
    std::uint32_t id = 0;
    friend bool operator==(const Key&, const Key&) noexcept = default;
  };

  struct SessionHash {
    using is_avalanching = void;
    std::size_t operator()(SessionId session) const noexcept { return std::hash<SessionId>{}(session); }
  };

  struct KeyHash {
    using is_avalanching = void;
    std::size_t operator()(const Key& key) const noexcept {
      // The golden ratio's first 2^30 multiples are more than 2^32 apart: a sum has one (session, id) only.
      return SessionHash{}(SessionId(key.session.value() * 0x9e3779b97f4a7c15ULL + key.id));
    }
  };

  struct Node : TimerWheel::Timer {
    Node() noexcept {}
    ~Node() {}

    Key key;
    std::uint64_t number = 0;  // counted up by every add
    Node* prev = nullptr;      // the session's requests, in the order added
    Node* next = nullptr;      // the same; in the free list: the next free node
    union {
      Completion completion;  // alive while the node is in the index
    };
  };

  /// A session's pending requests; exists only while there is one.
  struct Waiting {
    Node* first = nullptr;
    Node* last = nullptr;
    std::size_t count = 0;
  };

  using Traits = std::allocator_traits<Allocator>;
  template <class K, class V, class Hash>
  using Table = boost::unordered_flat_map<K, V, Hash, std::equal_to<K>,
                                          typename Traits::template rebind_alloc<std::pair<const K, V>>>;
  using Index = Table<Key, Node*, KeyHash>;
  using Sessions = Table<SessionId, Waiting, SessionHash>;
  using NodeAllocator = typename Traits::template rebind_alloc<Node>;

  /// Takes the request out of everything; the caller counts it.
  Completion remove(typename Index::iterator entry) noexcept {
    Node* const node = entry->second;
    index_.erase(entry);
    shrink(index_);
    wheel_.disarm(*node);
    unlink(node);
    Completion completion(std::move(node->completion));
    std::destroy_at(&node->completion);
    release(node);
    return completion;
  }

  void unlink(Node* node) noexcept {
    const auto entry = sessions_.find(node->key.session);
    Waiting& waiting = entry->second;
    if (--waiting.count == 0) {
      sessions_.erase(entry);
      shrink(sessions_);
      return;
    }
    (node->prev != nullptr ? node->prev->next : waiting.first) = node->next;
    (node->next != nullptr ? node->next->prev : waiting.last) = node->prev;
  }

  Node* acquire() {
    if (free_ == nullptr) return std::construct_at(std::allocator_traits<NodeAllocator>::allocate(node_allocator_, 1));
    --free_count_;
    return std::exchange(free_, free_->next);
  }

  void release(Node* node) noexcept {
    node->next = std::exchange(free_, node);
    ++free_count_;
    trim_free(size() + spare_nodes);
  }

  void trim_free(std::size_t most) noexcept {
    while (free_count_ > most) {
      --free_count_;
      dispose(std::exchange(free_, free_->next));
    }
  }

  void dispose(Node* node) noexcept {
    std::destroy_at(node);
    std::allocator_traits<NodeAllocator>::deallocate(node_allocator_, node, 1);
  }

  /// Gives back the memory of a table that a burst has left nearly empty. What stays is about a quarter full, far from
  /// both the next shrinking and the next growth.
  template <class AnyTable>
  static void shrink(AnyTable& table) noexcept {
    if (table.bucket_count() <= small_table || table.size() * 16 > table.bucket_count()) return;
    try {
      table.rehash(table.size() * 4);
    } catch (...) {
      // It stays large, and the next removal tries again.
    }
  }

  TimerWheel wheel_;
  Index index_;
  Sessions sessions_;
  [[no_unique_address]] NodeAllocator node_allocator_;
  Node* free_ = nullptr;
  std::size_t free_count_ = 0;
  Stats stats_;
};

}  // namespace msgtrans::protocol
