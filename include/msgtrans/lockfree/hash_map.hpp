// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/lockfree/epoch.hpp>
#include <msgtrans/lockfree/hash.hpp>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace msgtrans::lockfree {

struct HashMapOptions {
  /// Tables that grow for themselves; a power of two up to 65,536.
  std::size_t shards = 16;
  /// How many entries there is room for from the start, in all.
  std::size_t initial_capacity = 0;
};

/// What a map is made of at the moment; see LockFreeHashMap::statistics.
struct HashMapStatistics {
  std::size_t entries = 0;
  std::size_t slots = 0;        ///< in the tables that are in use
  std::size_t table_bytes = 0;  ///< of these tables; an entry has besides a node of two pointers, its value, and its
                                ///< key unless that is a number
  std::uint64_t growths = 0;    ///< tables replaced by another since the map was made
};

/// A map for any number of threads: reads write nothing shared and wait for nobody, writes are lock-free.
///
/// It is a set of open-addressing tables with linear probing. A slot belongs to one hash for good; what a key's value
/// is, is one word beside it, changed by compare-exchange. A table that has filled up is copied to another, by all who
/// write meanwhile and slot by slot, after the manner of C. Click ("A lock-free hash table", JavaOne 2007) and J.
/// Maier, P. Sanders, R. Dementiev ("Concurrent hash tables: fast and general(?)!", PPoPP 2016). Reclamation is by
/// Epoch.
///
/// Every operation on one key is linearizable. Values are not changed in place but replaced, and are seen as `const`;
/// one that must change holds an atomic, or a pointer.
///
/// Thread safety: every call from any thread, without set-up, also while threads or the process end; except the
/// destructor. Calls may be nested: the function given to `visit` or `for_each` may use this map or another.
///
/// An erased or replaced value is destroyed later, when no reader can see it any more, by whichever thread gets to it
/// (`Epoch`); `Epoch::collect()` does it at once for what the calling thread has erased. A function given to `visit`
/// that takes long holds up that, and nobody.
///
/// Errors: with `std::bad_alloc`, or when a hash, a comparison or a copy of K or V throws, the map is as it was.
///
/// K and V: destructors that do not throw. K: a hash and `==`; a number or enumeration or SessionId (see KeyBits) needs
/// neither. A hash that is bad costs time, and nothing else: keys with one and the same hash are searched one by one.
template <class K, class V, class Hash = DefaultHash<K>, class Equal = std::equal_to<>>
class LockFreeHashMap {
  static_assert(std::is_nothrow_destructible_v<K> && std::is_nothrow_destructible_v<V>);
  // A key that is a number is its hash, if nobody asked for another hash.
  static constexpr bool key_is_hash = KeyBits<K>::is_known && std::is_same_v<Hash, DefaultHash<K>>;

 public:
  /// Throws `Exception` with `Errc::invalid_option`, or `std::bad_alloc`.
  explicit LockFreeHashMap(const HashMapOptions& options = {}, Hash hash = Hash(), Equal equal = Equal())
      : hash_(std::move(hash)), equal_(std::move(equal)) {
    constexpr std::size_t most_shards = 65536;
    if (!std::has_single_bit(options.shards) || options.shards > most_shards) {
      throw Exception(Error(Errc::invalid_option, "shards is " + std::to_string(options.shards) +
                                                      ", must be a power of two up to " + std::to_string(most_shards)));
    }
    if (options.initial_capacity > most_entries) {
      throw Exception(Error(Errc::invalid_option, "initial_capacity is " + std::to_string(options.initial_capacity) +
                                                      ", must be at most " + std::to_string(most_entries)));
    }
    shard_mask_ = options.shards - 1;
    shard_shift_ = options.shards == 1 ? 0 : 64 - static_cast<unsigned>(std::countr_zero(options.shards));
    shards_ = std::vector<Shard>(options.shards);
    const std::size_t slots = slots_for(options.initial_capacity / options.shards);
    for (Shard& shard : shards_) {
      shard.first.reset(Table::make(slots));
      shard.root.store(shard.first.get(), std::memory_order_relaxed);
    }
    // From here on nothing throws, and tables come and go by themselves.
    for (Shard& shard : shards_) (void)shard.first.release();
  }
  /// Destroys all that is in it. What was erased before may be destroyed after.
  ~LockFreeHashMap() {
    for (Shard& shard : shards_) {
      Table* table = shard.root.load(std::memory_order_acquire);
      if (table == nullptr) continue;
      while (Table* const next = table->next.load(std::memory_order_acquire)) {
        copy_all(*table);
        Table::destroy(table);
        table = next;
      }
      for (std::size_t i = 0; i < table->slots(); ++i) destroy_now(table->at(i).value.load(std::memory_order_acquire));
      Table::destroy(table);
    }
    for (const auto& word : reserved_) destroy_now(word.load(std::memory_order_acquire));
  }
  LockFreeHashMap(const LockFreeHashMap&) = delete;
  LockFreeHashMap& operator=(const LockFreeHashMap&) = delete;

  // --- reading

  /// Calls `f(const V&)` if the key is there; whether it is. The value lives until `f` returns, also if it is erased
  /// meanwhile. O(1).
  template <class Q, class F>
  bool visit(const Q& key, F&& f) const {
    const Epoch::Guard guard;
    const Word word = find(key);
    if (!holds_one(word)) return false;
    with_value(word, std::forward<F>(f));
    return true;
  }
  /// A copy.
  template <class Q>
  [[nodiscard]] std::optional<V> get(const Q& key) const {
    std::optional<V> copy;
    visit(key, [&copy](const V& value) { copy.emplace(value); });
    return copy;
  }
  template <class Q>
  [[nodiscard]] bool contains(const Q& key) const {
    const Epoch::Guard guard;
    return holds_one(find(key));
  }

  /// How many entries there are; with others writing, as it was at about the time of the call. O(shards).
  [[nodiscard]] std::size_t size() const noexcept {
    std::int64_t sum = 0;
    for (const Shard& shard : shards_) sum += shard.entries.load(std::memory_order_relaxed);
    return sum > 0 ? static_cast<std::size_t>(sum) : 0;
  }
  [[nodiscard]] bool empty() const noexcept { return size() == 0; }

  /// Calls `f(const K&, const V&)` with every entry that is there during the whole call, once; with one that comes,
  /// goes or is replaced meanwhile at most once. O(slots). The whole call is one reader to Epoch.
  template <class F>
  void for_each(F&& f) const {
    const Epoch::Guard guard;
    const auto tell = [&f](std::uint64_t hash, Word word) {
      for_each_in(word, [&](Word one) { with_value(one, [&](const V& value) { f(key_of(one, hash), value); }); });
    };
    for (std::size_t i = 0; i < reserved_.size(); ++i)
      tell(reserved_hashes[i], reserved_[i].load(std::memory_order_acquire));
    for (const Shard& shard : shards_) {
      const Table& table = settled(const_cast<Shard&>(shard));
      for (std::size_t i = 0; i < table.slots(); ++i) {
        const std::uint64_t hash = table.at(i).hash.load(std::memory_order_acquire);
        if (is_reserved(hash)) continue;
        const Word word = table.at(i).value.load(std::memory_order_acquire);
        tell(hash, (word & frozen) == 0 ? word : newest(table, hash, word));
      }
    }
  }
  /// Copies of what `for_each` gives.
  [[nodiscard]] std::vector<std::pair<K, V>> snapshot() const {
    std::vector<std::pair<K, V>> all;
    all.reserve(size());
    for_each([&all](const K& key, const V& value) { all.emplace_back(key, value); });
    return all;
  }

  /// O(shards); nothing is counted for it on the way of reads and writes but the entries.
  [[nodiscard]] HashMapStatistics statistics() const {
    const Epoch::Guard guard;
    HashMapStatistics result;
    result.entries = size();
    for (const Shard& shard : shards_) {
      const Table& table = *shard.root.load(std::memory_order_acquire);
      result.slots += table.slots();
      result.table_bytes += table.bytes();
      result.growths += shard.growths.load(std::memory_order_relaxed);
    }
    return result;
  }

  // --- writing

  /// False if the key is there: nothing is changed then. O(1) but for the share of a growth.
  bool insert(const K& key, const V& value) requires std::is_copy_constructible_v<V> {
    NewNode made;
    return put(key, made, false, value);
  }
  /// If it is false the value is the caller's still; but if another thread was faster by a hair, and the value cannot
  /// be assigned to, it is gone.
  bool insert(const K& key, V&& value) {
    NewNode made;
    const bool inserted = put(key, made, false, std::move(value));
    if constexpr (std::is_move_assignable_v<V>) {
      if (!inserted && made) value = std::move(made->value);
    }
    return inserted;
  }
  /// True if the key was not there.
  template <class Value>
  requires std::is_constructible_v<V, Value&&>
  bool insert_or_assign(const K& key, Value&& value) {
    NewNode made;
    return put(key, made, true, std::forward<Value>(value));
  }

  /// False if it was not there.
  template <class Q>
  bool erase(const Q& key) {
    return erase_if(key, [](const V&) noexcept { return true; });
  }
  /// Erases the key if `condition(const V&)` holds for the very value that is erased; whether it did. The condition is
  /// asked again if the value is replaced meanwhile.
  template <class Q, class Condition>
  bool erase_if(const Q& key, Condition&& condition) {
    const Epoch::Guard guard;
    return change(hash_of(key), false, [&](Word word) -> Change {
             const Word one = match(word, key);
             if (!holds_one(one)) return {word};
             bool holds = false;
             with_value(one, [&](const V& value) { holds = condition(value); });
             if (!holds) return {word};
             return {without(word, one), -1, one};
           }).entries != 0;
  }
  /// Erases all that is there during the whole call.
  void clear() {
    const Epoch::Guard guard;
    const auto empty = [](Word word) noexcept -> Change {
      if (is_chain(word)) return {erased, -static_cast<int>(chain_of(word)->words.size())};
      if (holds_one(word)) return {erased, -1, word};
      return {word};
    };
    for (const std::uint64_t hash : reserved_hashes) {
      if constexpr (key_is_hash) change(hash, false, empty);
    }
    for (Shard& shard : shards_) {
      const Table& table = settled(shard);
      for (std::size_t i = 0; i < table.slots(); ++i) {
        const std::uint64_t hash = table.at(i).hash.load(std::memory_order_acquire);
        if (!is_reserved(hash)) change(hash, false, empty);
      }
    }
  }

 private:
  using Word = std::uint64_t;

  struct NoKey {
    template <class Q>
    explicit NoKey(const Q&) noexcept {}
  };
  struct Node : Retired {
    template <class Value>
    Node(const K& k, Value&& v) : key(k), value(std::forward<Value>(v)) {
      destroy = [](Retired* self) noexcept { delete static_cast<Node*>(self); };
    }
    [[no_unique_address]] std::conditional_t<key_is_hash, NoKey, K> key;
    V value;
  };
  using NewNode = std::unique_ptr<Node>;

  /// The words of several keys with the same hash. It does not change; another takes its place.
  struct Chain : Retired {
    explicit Chain(std::vector<Word> all) noexcept : words(std::move(all)) {
      destroy = [](Retired* self) noexcept { delete static_cast<Chain*>(self); };
    }
    const std::vector<Word> words;
  };

  static constexpr std::size_t cache_line = 64;

  // What a word is: virgin, has never held anything; erased; a Node's address and `boxed`; a Chain's and `chained`; or
  // else a small value itself, whose three low bits are 0. Once its table is being copied it is `frozen` besides.
  static constexpr Word virgin = 0;
  static constexpr Word chained = 1;
  static constexpr Word frozen = 2;
  static constexpr Word boxed = 4;
  static constexpr Word erased = boxed;  // a box without a node
  static constexpr Word flags = 7;

  static bool is_chain(Word word) noexcept { return !key_is_hash && (word & chained) != 0; }
  static bool is_node(Word word) noexcept { return (word & boxed) != 0 && word > flags; }
  /// Not frozen: whether there is a value in it.
  static bool holds_one(Word word) noexcept { return word > flags && !is_chain(word); }
  static Node* node_of(Word word) noexcept { return reinterpret_cast<Node*>(word & ~flags); }
  static Chain* chain_of(Word word) noexcept { return reinterpret_cast<Chain*>(word & ~flags); }
  static Word word_of(Node* node) noexcept { return reinterpret_cast<Word>(node) | boxed; }
  static Word word_of(std::vector<Word> words) {
    static_assert(alignof(Node) > flags && alignof(Chain) > flags);
    return reinterpret_cast<Word>(new Chain(std::move(words))) | chained;
  }

  // Small values of keys that are numbers need no node, and that saves a read the second cache miss: anything of less
  // than eight bytes, and of those with eight the ones that look like a pointer to something aligned.
  static constexpr bool may_be_bare =
      key_is_hash && std::is_trivially_copyable_v<V> && std::is_copy_constructible_v<V> && sizeof(V) <= 8;
  /// The value as a word; `virgin` if it needs a node.
  static Word bare_word(const V& value) noexcept requires may_be_bare {
    Word bits = 0;
    std::memcpy(&bits, &value, sizeof(V));
    if constexpr (sizeof(V) < sizeof(Word)) return (bits + 1) << 3;
    return (bits & flags) == 0 ? bits : virgin;
  }
  template <class F>
  static void with_value(Word word, F&& f) {
    if constexpr (may_be_bare) {
      if ((word & boxed) == 0) {
        if constexpr (sizeof(V) < sizeof(Word)) word = (word >> 3) - 1;
        alignas(V) std::byte room[sizeof(V)];
        std::memcpy(room, &word, sizeof(V));
        std::forward<F>(f)(std::as_const(*std::launder(reinterpret_cast<V*>(room))));
        return;
      }
    }
    std::forward<F>(f)(std::as_const(node_of(word)->value));
  }

  // What a slot's hash can be besides a hash. Keys that have these hashes (numbers: the others' are moved aside) have
  // words of their own, reserved_.
  static constexpr std::uint64_t free_slot = 0;
  static constexpr std::uint64_t dead_slot = ~std::uint64_t{0};
  static constexpr std::array<std::uint64_t, 2> reserved_hashes{free_slot, dead_slot};
  static bool is_reserved(std::uint64_t hash) noexcept { return hash == free_slot || hash == dead_slot; }

  /// A cache line: the four slots that a search begins with are compared at once, since a branch for each that is taken
  /// or not by chance costs more than all four comparisons.
  static constexpr std::size_t group_slots = 4;
  struct alignas(cache_line) Group {
    std::atomic<std::uint64_t> hashes[group_slots]{};
    std::atomic<Word> values[group_slots]{};
  };
  struct Slot {
    std::atomic<std::uint64_t>& hash;
    std::atomic<Word>& value;
  };

  // Invariants.
  //
  // (1) A slot's hash changes once: to the hash that claims it, or, when the table is being copied and the slot is
  // still
  //     free, to dead. Words of a hash begin to be looked for at the same slot always, and claims are made at the first
  //     free one: so a hash has at most one slot in a table, and none behind a slot that is free.
  // (2) A word that is frozen does not change any more. A table has a `next` before any of its slots is dead or frozen.
  // (3) A word in `next` is virgin until that of the same hash here has been copied, or was found to have nothing to
  // copy:
  //     who writes in `next` first sees his hash's slot here frozen and copies it, or the free slot that ends its
  //     search dead. After that it is never virgin again (erased is not virgin), so copying twice changes nothing.
  // (4) `next` gets a `next` of its own only when all of this table is copied and it is the root.
  //
  // A reader that comes upon a frozen word therefore looks in `next`: virgin there means that at that moment the frozen
  // one still counted; anything else supersedes it. One that comes upon a free slot is done: at that moment the key was
  // not behind it, and by (3) not in `next`.
  //
  // Memory order: hash and value are published by release and read by acquire; a node is whole before its word is
  // stored, and lives while anybody who is in a guard may have read it. (2) and (3) are orders of modification of one
  // atomic each, and read-after-read through acquire: frozen is set after `next` (fetch_or, acquire-release), so who
  // reads it sees `next`; who reads a word in `next` sees all that was done here before it was written.
  struct alignas(cache_line) Table : Retired {
    static Table* make(std::size_t slots) {
      void* const memory =
          ::operator new(sizeof(Table) + slots / group_slots * sizeof(Group), std::align_val_t(cache_line));
      return ::new (memory) Table(slots);
    }
    static void destroy(Table* table) noexcept {
      table->~Table();
      ::operator delete(table, std::align_val_t(cache_line));
    }

    [[nodiscard]] std::size_t slots() const noexcept { return (mask + 1) * group_slots; }
    [[nodiscard]] std::size_t bytes() const noexcept { return sizeof(Table) + (mask + 1) * sizeof(Group); }
    [[nodiscard]] Group& group(std::size_t i) noexcept { return reinterpret_cast<Group*>(this + 1)[i]; }
    [[nodiscard]] const Group& group(std::size_t i) const noexcept {
      return reinterpret_cast<const Group*>(this + 1)[i];
    }
    [[nodiscard]] Slot at(std::size_t i) const noexcept {
      Group& in = const_cast<Table*>(this)->group(i / group_slots);
      return {in.hashes[i % group_slots], in.values[i % group_slots]};
    }
    /// Where the search for a hash begins; and where it goes on.
    [[nodiscard]] std::size_t first(std::uint64_t hash) const noexcept { return (hash & mask) * group_slots; }
    [[nodiscard]] std::size_t after(std::size_t i) const noexcept { return (i + 1) & (slots() - 1); }
    /// Slots that may be claimed before another table is due. More cost time, fewer memory.
    [[nodiscard]] std::size_t limit() const noexcept { return slots() / 16 * 13; }
    /// Of these, slots that may be claimed for new hashes before all is copied to here; with the others', of which
    /// there are at most the former table's limit, there is always a free one left.
    [[nodiscard]] std::size_t fresh_limit() const noexcept { return slots() / 8; }

    const std::size_t mask;               // of groups
    std::atomic<std::size_t> claimed{0};  // at least as many as are; counted up before
    std::atomic<std::size_t> fresh{0};    // the same, while the table is not the root
    std::atomic<Table*> next{nullptr};
    std::atomic<std::size_t> to_copy{0};  // the first slot that nobody has set out to copy
    std::atomic<std::size_t> copied{0};

   private:
    explicit Table(std::size_t slots) noexcept : mask(slots / group_slots - 1) {
      Retired::destroy = [](Retired* self) noexcept { Table::destroy(static_cast<Table*>(self)); };
      for (std::size_t i = 0; i <= mask; ++i) ::new (static_cast<void*>(&group(i))) Group();
    }
    ~Table() = default;
  };

  struct DestroyTable {
    void operator()(Table* table) const noexcept { Table::destroy(table); }
  };
  struct alignas(cache_line) Shard {
    std::atomic<Table*> root{nullptr};
    std::atomic<std::int64_t> entries{0};
    std::atomic<std::uint64_t> growths{0};
    std::unique_ptr<Table, DestroyTable> first;  // only while the map is being made
  };

  /// What to do with a word.
  struct Change {
    Word word;           // the new one; the same: nothing
    int entries = 0;     // how many more there are then
    Word gone = virgin;  // whose time is over; without one, and fewer entries, all of the old word
    [[nodiscard]] bool is_change_of(Word old) const noexcept { return word != old; }
  };
  struct Changed {
    bool done;
    int entries;
  };

  static constexpr std::size_t most_entries = std::size_t{1} << 40;
  static constexpr std::size_t least_slots = 16;
  static std::size_t slots_for(std::size_t entries) noexcept {
    return std::max(least_slots, std::bit_ceil(entries * 16 / 13 + 1));
  }

  template <class Q>
  [[nodiscard]] std::uint64_t hash_of(const Q& key) const {
    if constexpr (key_is_hash) {
      static_assert(std::is_same_v<Q, K> || (std::is_integral_v<Q> && std::is_integral_v<K> && sizeof(Q) <= sizeof(K)),
                    "this key is of a wider type than the map's: convert it, lest another be found");
      return mix(KeyBits<K>::to_bits(key));
    } else {
      const std::uint64_t hash = mix(static_cast<std::uint64_t>(hash_(key)));
      return is_reserved(hash) ? 1 : hash;
    }
  }
  static decltype(auto) key_of(Word word, std::uint64_t hash) noexcept {
    if constexpr (key_is_hash) {
      return KeyBits<K>::from_bits(unmix(hash));
    } else {
      return std::as_const(node_of(word)->key);
    }
  }
  // Shards by the high bits, slots by the low ones.
  [[nodiscard]] std::size_t shard_of(std::uint64_t hash) const noexcept {
    return static_cast<std::size_t>(hash >> shard_shift_) & shard_mask_;
  }
  static std::size_t reserved_index(std::uint64_t hash) noexcept { return hash == free_slot ? 0 : 1; }

  template <class F>
  static void for_each_in(Word word, F f) {
    if (is_chain(word)) {
      for (const Word one : chain_of(word)->words) f(one);
    } else if (holds_one(word)) {
      f(word);
    }
  }

  /// What a word, not frozen, holds for the key; see `holds_one`.
  template <class Q>
  [[nodiscard]] Word match(Word word, const Q& key) const {
    if constexpr (key_is_hash) {
      return word;
    } else {
      if (is_node(word)) return equal_(std::as_const(node_of(word)->key), key) ? word : virgin;
      if (!is_chain(word)) return virgin;
      for (const Word one : chain_of(word)->words) {
        if (equal_(std::as_const(node_of(one)->key), key)) return one;
      }
      return virgin;
    }
  }
  // The word with another one; with one in another's place; with one less.
  static Word with(Word word, Word added) {
    if (is_chain(word)) {
      auto words = chain_of(word)->words;
      words.push_back(added);
      return word_of(std::move(words));
    }
    return holds_one(word) ? word_of(std::vector<Word>{word, added}) : added;
  }
  static Word with(Word word, Word added, Word old) {
    if (!is_chain(word)) return added;
    auto words = chain_of(word)->words;
    *std::find(words.begin(), words.end(), old) = added;
    return word_of(std::move(words));
  }
  static Word without(Word word, Word gone) {
    if (!is_chain(word)) return erased;
    auto words = chain_of(word)->words;
    words.erase(std::find(words.begin(), words.end(), gone));
    return words.size() == 1 ? words.front() : word_of(std::move(words));
  }

  /// In a guard.
  template <class Q>
  [[nodiscard]] Word find(const Q& key) const {
    const std::uint64_t hash = hash_of(key);
    if constexpr (key_is_hash) {
      if (is_reserved(hash)) return match(reserved_[reserved_index(hash)].load(std::memory_order_acquire), key);
    }
    const Table& table = *shards_[shard_of(hash)].root.load(std::memory_order_acquire);
    const Word word = look_up(table, hash);
    return match((word & frozen) == 0 ? word : newest(table, hash, word), key);
  }

  /// The word of `hash` in that table as it is: `frozen` alone if it has none there and none can come.
  static Word look_up(const Table& table, std::uint64_t hash) noexcept {
    for (std::size_t g = hash & table.mask;; g = (g + 1) & table.mask) {
      const Group& group = table.group(g);
      // Not a loop: compilers do not unroll one over atomics.
      static_assert(group_slots == 4);
      const std::uint64_t there[group_slots] = {
          group.hashes[0].load(std::memory_order_acquire), group.hashes[1].load(std::memory_order_acquire),
          group.hashes[2].load(std::memory_order_acquire), group.hashes[3].load(std::memory_order_acquire)};
      // Sums, since g++ makes branches of the like with `|`.
      const std::uint64_t found =
          (is(there[0], hash) + 2 * is(there[1], hash)) + 4 * (is(there[2], hash) + 2 * is(there[3], hash));
      if (found != 0) [[likely]] {
        return group.values[std::countr_zero(found)].load(std::memory_order_acquire);
      }
      // The first that is free or dead decides; what was loaded before or after it does not matter, see (1).
      for (const std::uint64_t other : there) {
        if (other == free_slot) return virgin;
        if (other == dead_slot) return frozen;
      }
    }
  }
  static std::uint64_t is(std::uint64_t a, std::uint64_t b) noexcept { return static_cast<std::uint64_t>(a == b); }
  /// What counts, for a hash whose word in `table` is frozen.
  static Word newest(const Table& table, std::uint64_t hash, Word word) noexcept {
    const Table* at = &table;
    do {
      const Table* const next = at->next.load(std::memory_order_acquire);
      const Word newer = look_up(*next, hash);
      if (newer == virgin) break;
      word = newer;
      at = next;
    } while ((word & frozen) != 0);
    return word & ~frozen;
  }

  template <class Value>
  bool put(const K& key, NewNode& made, bool assign, Value&& value) {
    const Epoch::Guard guard;
    bool is_bare = false;
    const Changed changed = change(hash_of(key), true, [&](Word word) -> Change {
      const Word there = match(word, key);
      if (holds_one(there) && !assign) return {word};
      Word added = virgin;
      if constexpr (may_be_bare) {
        if (!made) added = bare_word(V(value));
        is_bare = added != virgin;
      }
      if (!is_bare) {
        if (!made) made = std::make_unique<Node>(key, std::forward<Value>(value));
        added = word_of(made.get());
      }
      if (holds_one(there)) return {with(word, added, there), 0, there};
      return {with(word, added), 1};
    });
    if (changed.done) (void)made.release();
    return changed.entries != 0;
  }

  /// Has `f(Word) -> Change` decide about the word of `hash`; without `claim`, if it has one. In a guard. If `f`
  /// throws, or there is no memory for a table, nothing was changed.
  template <class F>
  Changed change(std::uint64_t hash, bool claim, F f) {
    if constexpr (key_is_hash) {
      if (is_reserved(hash)) return *change_word(reserved_[reserved_index(hash)], shards_[0], f);
    }
    Shard& shard = shards_[shard_of(hash)];
    for (Table* table = shard.root.load(std::memory_order_acquire);;) {
      if (table->next.load(std::memory_order_acquire) != nullptr) copy_some(shard, *table);
      const std::optional<Slot> slot = locate(shard, *table, hash, claim);
      if (slot && slot->hash.load(std::memory_order_relaxed) != hash) return {false, 0};
      if (slot) {
        if (const auto changed = change_word(slot->value, shard, f)) return *changed;
        copy(*table, *slot);
      }
      table = table->next.load(std::memory_order_acquire);
    }
  }

  /// Nothing if the word is frozen.
  template <class F>
  static std::optional<Changed> change_word(std::atomic<Word>& place, Shard& shard, F& f) {
    Word old = place.load(std::memory_order_acquire);
    while ((old & frozen) == 0) {
      const Change change = f(old);
      if (!change.is_change_of(old)) return Changed{false, 0};
      if (!place.compare_exchange_strong(old, change.word, std::memory_order_acq_rel, std::memory_order_acquire)) {
        if (is_chain(change.word)) delete chain_of(change.word);
        continue;
      }
      if (change.entries != 0) shard.entries.fetch_add(change.entries, std::memory_order_relaxed);
      if (change.gone != virgin) {
        retire(change.gone);
      } else if (change.entries < 0) {
        for_each_in(old, retire);
      }
      if (is_chain(old)) Epoch::retire(*chain_of(old));
      return Changed{true, change.entries};
    }
    return std::nullopt;
  }

  static void retire(Word one) noexcept {
    if (is_node(one)) Epoch::retire(*node_of(one));
  }

  /// The slot of `hash`; if it has none, one that is claimed for it, or without `claim` the free one that ends the
  /// search. Null if there is none and none can come, and `next` is to be used.
  std::optional<Slot> locate(Shard& shard, Table& table, std::uint64_t hash, bool claim) {
    for (std::size_t i = table.first(hash);; i = table.after(i)) {
      const Slot slot = table.at(i);
      std::uint64_t there = slot.hash.load(std::memory_order_acquire);
      if (there == free_slot) {
        if (!claim) return slot;
        const bool may_claim = reserve(shard, table);
        if (slot.hash.compare_exchange_strong(there, may_claim ? hash : dead_slot, std::memory_order_acq_rel,
                                              std::memory_order_acquire)) {
          return may_claim ? std::optional(slot) : std::nullopt;
        }
        if (may_claim) unreserve(table);
      }
      if (there == hash) return slot;
      if (there == dead_slot) return std::nullopt;
    }
  }

  /// Whether one more slot may be claimed for a new hash. If not, the table has a `next`. May throw `std::bad_alloc`.
  bool reserve(Shard& shard, Table& table) {
    for (;;) {
      if (table.next.load(std::memory_order_acquire) != nullptr) return false;
      if (shard.root.load(std::memory_order_acquire) == &table) {
        if (table.claimed.fetch_add(1, std::memory_order_relaxed) < table.limit()) return true;
        table.claimed.fetch_sub(1, std::memory_order_relaxed);
        grow(shard, table);
        return false;
      }
      if (table.fresh.fetch_add(1, std::memory_order_relaxed) < table.fresh_limit()) {
        table.claimed.fetch_add(1, std::memory_order_relaxed);
        return true;
      }
      table.fresh.fetch_sub(1, std::memory_order_relaxed);
      finish_copying(shard, table);
    }
  }
  /// It was claimed by somebody else: by whom does not matter, it is counted once.
  static void unreserve(Table& table) noexcept { table.claimed.fetch_sub(1, std::memory_order_relaxed); }

  void grow(Shard& shard, Table& table) {
    const std::int64_t entries = shard.entries.load(std::memory_order_relaxed);
    // Most of it may be erased slots: then there is only to be tidied up.
    const bool crowded = entries > 0 && static_cast<std::size_t>(entries) > table.slots() / 16 * 6;
    std::unique_ptr<Table, DestroyTable> made(Table::make(crowded ? 2 * table.slots() : table.slots()));
    Table* none = nullptr;
    if (!table.next.compare_exchange_strong(none, made.get(), std::memory_order_acq_rel)) return;
    (void)made.release();
    shard.growths.fetch_add(1, std::memory_order_relaxed);
  }

  /// Until `table`, which another is being copied to, is the root or is being copied itself.
  static void finish_copying(Shard& shard, const Table& table) noexcept {
    for (;;) {
      Table* const root = shard.root.load(std::memory_order_acquire);
      if (root == &table || table.next.load(std::memory_order_acquire) != nullptr) return;
      copy_all(*root);
      promote(shard, *root);
    }
  }
  /// The root, at a moment when nothing is being copied.
  static Table& settled(Shard& shard) noexcept {
    for (;;) {
      Table* const root = shard.root.load(std::memory_order_acquire);
      if (root->next.load(std::memory_order_acquire) == nullptr) return *root;
      copy_all(*root);
      promote(shard, *root);
    }
  }

  /// A writer's share.
  static void copy_some(Shard& shard, Table& table) noexcept {
    constexpr std::size_t share = 32;
    if (table.to_copy.load(std::memory_order_relaxed) >= table.slots()) return;
    const std::size_t first = table.to_copy.fetch_add(share, std::memory_order_relaxed);
    if (first >= table.slots()) return;
    const std::size_t last = std::min(first + share, table.slots());
    for (std::size_t i = first; i < last; ++i) copy(table, table.at(i));
    if (table.copied.fetch_add(last - first, std::memory_order_acq_rel) + (last - first) == table.slots()) {
      promote(shard, table);
    }
  }
  /// Waits for nobody: what others have set out to copy is copied again.
  static void copy_all(Table& table) noexcept {
    for (std::size_t i = 0; i < table.slots(); ++i) copy(table, table.at(i));
  }
  static void promote(Shard& shard, Table& table) noexcept {
    Table* root = &table;
    if (shard.root.compare_exchange_strong(root, table.next.load(std::memory_order_acquire),
                                           std::memory_order_acq_rel)) {
      Epoch::retire(table);
    }
  }

  static void copy(Table& table, Slot slot) noexcept {
    std::uint64_t hash = slot.hash.load(std::memory_order_acquire);
    if (hash == free_slot &&
        slot.hash.compare_exchange_strong(hash, dead_slot, std::memory_order_acq_rel, std::memory_order_acquire)) {
      return;
    }
    if (hash == dead_slot) return;
    const Word word = slot.value.fetch_or(frozen, std::memory_order_acq_rel) & ~frozen;
    if (word == virgin || word == erased) return;
    Table& next = *table.next.load(std::memory_order_acquire);
    for (std::size_t i = next.first(hash);; i = next.after(i)) {
      const Slot target = next.at(i);
      std::uint64_t there = target.hash.load(std::memory_order_acquire);
      if (there == free_slot) {
        if (target.hash.compare_exchange_strong(there, hash, std::memory_order_acq_rel, std::memory_order_acquire)) {
          next.claimed.fetch_add(1, std::memory_order_relaxed);
          there = hash;
        }
      }
      if (there == dead_slot) return;  // then everything has been copied long ago
      if (there != hash) continue;
      Word none = virgin;
      target.value.compare_exchange_strong(none, word, std::memory_order_acq_rel, std::memory_order_acquire);
      return;
    }
  }

  static void destroy_now(Word word) noexcept {
    for_each_in(word, [](Word one) noexcept {
      if (is_node(one)) delete node_of(one);
    });
    if (is_chain(word)) delete chain_of(word);
  }

  [[no_unique_address]] Hash hash_;
  [[no_unique_address]] Equal equal_;
  unsigned shard_shift_ = 0;
  std::size_t shard_mask_ = 0;
  std::vector<Shard> shards_;
  std::array<std::atomic<Word>, 2> reserved_{};
};

}  // namespace msgtrans::lockfree
