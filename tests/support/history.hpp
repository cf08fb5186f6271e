// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <latch>
#include <map>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

/// Records what threads do to a map or a channel at the same time, and checks afterwards whether it could have been.
namespace msgtrans::test {

/// How much longer than usual the stress tests run: the environment's MSGTRANS_STRESS, or 1.
[[nodiscard]] inline int stress_factor() {
  const char* const text = std::getenv("MSGTRANS_STRESS");
  const int factor = text == nullptr ? 1 : std::atoi(text);
  return std::clamp(factor, 1, 10000);
}

/// One order of all beginnings and ends: a call that has ended before another has begun has the smaller number.
class HistoryClock {
 public:
  [[nodiscard]] std::uint64_t now() noexcept { return next_.fetch_add(1); }

 private:
  std::atomic<std::uint64_t> next_{1};
};

// ---- maps

struct MapCall {
  enum class Kind { get, insert, erase, assign };

  Kind kind = Kind::get;
  std::size_t thread = 0;
  int key = 0;
  int argument = 0;          // of insert and assign
  std::optional<int> found;  // by get
  bool result = false;       // of the others
  std::uint64_t begin = 0;
  std::uint64_t end = 0;

  /// Whether the call may give what it gave where the key's value is `state`, which becomes what it is afterwards.
  [[nodiscard]] bool apply(std::optional<int>& state) const {
    switch (kind) {
      case Kind::get: return found == state;
      case Kind::insert:
        if (result == state.has_value()) return false;
        if (result) state = argument;
        return true;
      case Kind::erase:
        if (result != state.has_value()) return false;
        state.reset();
        return true;
      case Kind::assign:
        if (result == state.has_value()) return false;
        state = argument;
        return true;
    }
    return false;
  }
};

/// Whether the calls on one key, at most one at a time in each thread, are linearizable: J. Wing, C. Gong, "Testing and
/// verifying concurrent objects" (1993), with all that is possible so far kept step by step (G. Lowe, "Testing for
/// linearizability", 2017). The key has no value at first.
[[nodiscard]] inline bool is_linearizable_for_key(const std::vector<MapCall>& calls) {
  struct Step {
    std::uint64_t time;
    bool is_end;
    const MapCall* call;
  };
  std::vector<Step> steps;
  for (const MapCall& call : calls) {
    steps.push_back({call.begin, false, &call});
    steps.push_back({call.end, true, &call});
  }
  std::sort(steps.begin(), steps.end(), [](const Step& a, const Step& b) { return a.time < b.time; });

  // The value, and which of the calls under way have taken effect (bits by thread).
  using Possible = std::set<std::pair<std::optional<int>, std::uint64_t>>;
  Possible all{{std::nullopt, 0}};
  std::map<std::size_t, const MapCall*> under_way;
  for (const Step& step : steps) {
    const std::uint64_t bit = std::uint64_t{1} << step.call->thread;
    if (!step.is_end) {
      under_way[step.call->thread] = step.call;
      continue;
    }
    std::vector<Possible::value_type> to_do(all.begin(), all.end());
    while (!to_do.empty()) {
      const auto [value, done] = to_do.back();
      to_do.pop_back();
      for (const auto& [thread, call] : under_way) {
        const std::uint64_t its_bit = std::uint64_t{1} << thread;
        auto after = value;
        if ((done & its_bit) == 0 && call->apply(after)) {
          if (const auto [at, added] = all.emplace(after, done | its_bit); added) to_do.push_back(*at);
        }
      }
    }
    Possible left;
    for (const auto& [value, done] : all) {
      if ((done & bit) != 0) left.emplace(value, done & ~bit);
    }
    all = std::move(left);
    under_way.erase(step.call->thread);
    if (all.empty()) return false;
  }
  return true;
}

/// Of calls on all keys: the keys whose calls are not linearizable.
[[nodiscard]] inline std::vector<int> keys_not_linearizable(const std::vector<MapCall>& calls) {
  std::map<int, std::vector<MapCall>> by_key;
  for (const MapCall& call : calls) by_key[call.key].push_back(call);
  std::vector<int> bad;
  for (const auto& [key, of_key] : by_key) {
    if (!is_linearizable_for_key(of_key)) bad.push_back(key);
  }
  return bad;
}

struct MapWorkload {
  std::size_t threads = 4;
  int calls_each = 200;
  int keys = 4;
  std::uint64_t seed = 1;
};

/// `Map` has get(int) -> optional<int>, insert(int, int), erase(int), insert_or_assign(int, int).
template <class Map>
[[nodiscard]] std::vector<MapCall> record_map(Map& map, const MapWorkload& work) {
  HistoryClock clock;
  std::vector<std::vector<MapCall>> of_thread(work.threads);
  std::latch start(static_cast<std::ptrdiff_t>(work.threads));
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < work.threads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(work.seed * 1000 + t);
      auto& calls = of_thread[t];
      calls.reserve(static_cast<std::size_t>(work.calls_each));
      start.arrive_and_wait();
      for (int i = 0; i < work.calls_each; ++i) {
        MapCall call;
        call.thread = t;
        call.key = static_cast<int>(random() % static_cast<std::uint64_t>(work.keys));
        call.argument = static_cast<int>(t) * 1000000 + i;
        call.kind = static_cast<MapCall::Kind>(random() % 4);
        call.begin = clock.now();
        switch (call.kind) {
          case MapCall::Kind::get: call.found = map.get(call.key); break;
          case MapCall::Kind::insert: call.result = map.insert(call.key, call.argument); break;
          case MapCall::Kind::erase: call.result = map.erase(call.key); break;
          case MapCall::Kind::assign: call.result = map.insert_or_assign(call.key, call.argument); break;
        }
        call.end = clock.now();
        calls.push_back(call);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  std::vector<MapCall> all;
  for (const auto& calls : of_thread) all.insert(all.end(), calls.begin(), calls.end());
  return all;
}

// ---- channels and queues

/// A value in a channel: which producer's, and its how many-eth.
struct Item {
  int producer = 0;
  int number = 0;
  friend auto operator<=>(const Item&, const Item&) = default;
};

struct ChannelHistory {
  struct Call {
    Item item;
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
  };
  std::vector<Call> sent;     // accepted
  std::vector<Call> refused;  // because it was closed
  std::vector<Call> received;
  std::vector<Call> ends;  // receives that said "closed"; the item means nothing
  std::optional<Call> close;

  void append(const ChannelHistory& other) {
    sent.insert(sent.end(), other.sent.begin(), other.sent.end());
    refused.insert(refused.end(), other.refused.begin(), other.refused.end());
    received.insert(received.end(), other.received.begin(), other.received.end());
    ends.insert(ends.end(), other.ends.begin(), other.ends.end());
    if (other.close) close = other.close;
  }
};

enum class ChannelOrder {
  per_producer,  ///< what one producer sends is received in that order
  real_time,     ///< what was sent before something else is received before it, whoever sent it
};

/// What is wrong with it; empty: nothing. Every receive there was must be in it, to the last value.
[[nodiscard]] inline std::string fault_of(const ChannelHistory& history, ChannelOrder order) {
  const auto name = [](const Item& item) {
    return "value " + std::to_string(item.producer) + "." + std::to_string(item.number);
  };
  std::map<Item, const ChannelHistory::Call*> sent;
  for (const auto& call : history.sent) sent[call.item] = &call;
  std::map<Item, const ChannelHistory::Call*> received;
  for (const auto& call : history.received) {
    if (!received.emplace(call.item, &call).second) return name(call.item) + " was received twice";
    const auto from = sent.find(call.item);
    if (from == sent.end()) return name(call.item) + " was received and not sent";
    if (call.end < from->second->begin) return name(call.item) + " was received before it was sent";
  }
  for (const auto& [item, call] : sent) {
    if (!received.contains(item)) return name(item) + " was accepted and never received";
  }
  if (history.close) {
    for (const auto& call : history.sent) {
      if (call.begin > history.close->end) return name(call.item) + " was accepted after the close";
    }
    for (const auto& call : history.refused) {
      if (call.end < history.close->begin) return name(call.item) + " was refused before the close";
    }
  } else if (!history.refused.empty() || !history.ends.empty()) {
    return "there was no close";
  }
  for (const auto& end : history.ends) {
    for (const auto& call : history.received) {
      if (call.begin > end.end) return name(call.item) + " was received after the end was told";
    }
  }

  // A value is too late if another that must come after it was received before its receive began.
  struct Pair {
    const ChannelHistory::Call* sent;
    const ChannelHistory::Call* received;
  };
  std::map<int, std::vector<Pair>> groups;
  for (const auto& [item, call] : sent) {
    groups[order == ChannelOrder::per_producer ? item.producer : 0].push_back({call, received.at(item)});
  }
  for (auto& [group, pairs] : groups) {
    auto by_end = pairs;
    std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.sent->begin < b.sent->begin; });
    std::sort(by_end.begin(), by_end.end(), [](const Pair& a, const Pair& b) { return a.sent->end < b.sent->end; });
    std::size_t before = 0;
    const Pair* last = nullptr;  // of those sent before, the one whose receive began last
    for (const Pair& pair : pairs) {
      while (before < by_end.size() && by_end[before].sent->end < pair.sent->begin) {
        if (last == nullptr || by_end[before].received->begin > last->received->begin) last = &by_end[before];
        ++before;
      }
      if (last != nullptr && pair.received->end < last->received->begin) {
        return name(pair.sent->item) + " has overtaken " + name(last->sent->item);
      }
    }
  }
  return {};
}

struct ChannelWorkload {
  int producers = 2;
  int consumers = 2;
  int items_each = 500;
  bool close_early = false;  ///< by another thread, while they send
  std::uint64_t seed = 1;
};

enum class Sent { ok, closed };

/// `Channel` has send(Item) -> Sent, receive() -> optional<Item> (nothing: closed), close().
template <class Channel>
[[nodiscard]] ChannelHistory record_channel(Channel& channel, const ChannelWorkload& work) {
  HistoryClock clock;
  const auto threads_in_all = static_cast<std::size_t>(work.producers + work.consumers + (work.close_early ? 1 : 0));
  std::vector<ChannelHistory> parts(threads_in_all + 1);
  std::latch start(static_cast<std::ptrdiff_t>(threads_in_all));
  const auto closing = [&](ChannelHistory& part) {
    ChannelHistory::Call call;
    call.begin = clock.now();
    channel.close();
    call.end = clock.now();
    part.close = call;
  };
  std::vector<std::thread> producers;
  std::vector<std::thread> others;
  for (int p = 0; p < work.producers; ++p) {
    producers.emplace_back([&, p] {
      auto& part = parts[static_cast<std::size_t>(p)];
      start.arrive_and_wait();
      for (int i = 0; i < work.items_each; ++i) {
        ChannelHistory::Call call{{p, i}, clock.now(), 0};
        const Sent result = channel.send(call.item);
        call.end = clock.now();
        (result == Sent::ok ? part.sent : part.refused).push_back(call);
      }
    });
  }
  for (int c = 0; c < work.consumers; ++c) {
    others.emplace_back([&, c] {
      auto& part = parts[static_cast<std::size_t>(work.producers + c)];
      start.arrive_and_wait();
      for (;;) {
        ChannelHistory::Call call{{}, clock.now(), 0};
        const std::optional<Item> item = channel.receive();
        call.end = clock.now();
        if (item) call.item = *item;
        (item ? part.received : part.ends).push_back(call);
        if (!item) return;
      }
    });
  }
  if (work.close_early) {
    others.emplace_back([&] {
      std::mt19937_64 random(work.seed);
      start.arrive_and_wait();
      // Not by yielding, which on a busy machine takes milliseconds each time.
      const auto moment = std::chrono::steady_clock::now() + std::chrono::microseconds(random() % 200);
      while (std::chrono::steady_clock::now() < moment) {
      }
      closing(parts[threads_in_all - 1]);
    });
  }
  for (auto& thread : producers) thread.join();
  if (!work.close_early) closing(parts[threads_in_all]);
  for (auto& thread : others) thread.join();
  ChannelHistory all;
  for (const auto& part : parts) all.append(part);
  return all;
}

}  // namespace msgtrans::test
