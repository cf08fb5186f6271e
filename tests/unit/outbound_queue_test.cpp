// SPDX-License-Identifier: Apache-2.0
#include "allocation_failure.hpp"
#include "wire_test_util.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/protocol/outbound_budget.hpp>
#include <msgtrans/protocol/outbound_queue.hpp>
#include <new>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace msgtrans::protocol {

std::ostream& operator<<(std::ostream& out, const OutboundDepth& depth) {
  return out << depth.bytes << " bytes in " << depth.packets << " packets";
}

namespace {

using wire::test::Bytes;
using wire::test::random_bytes;

constexpr std::size_t large = OutboundQueue::large_payload;
constexpr auto push = OutboundKind::push;
constexpr auto answer = OutboundKind::answer;

wire::Header header_of(bool priority, std::uint32_t id = 7) {
  wire::Header header;
  header.type = wire::PacketType::one_way;
  header.biz_type = 3;
  header.message_id = id;
  header.flags = priority ? wire::flags::high_priority : std::uint16_t{0};
  return header;
}

Bytes packet_bytes(const wire::Header& header, const Bytes& extension, const Bytes& payload) {
  Bytes out;
  wire::append_packet(out, header, extension, payload);
  return out;
}

Bytes gathered(const OutboundQueue& queue, std::size_t pieces = 4096) {
  std::vector<std::span<const std::byte>> list(pieces);
  const std::size_t count = queue.gather(list);
  EXPECT_LE(count, pieces);
  Bytes out;
  for (std::size_t i = 0; i < count; ++i) {
    EXPECT_FALSE(list[i].empty()) << "an empty piece, " << i;
    out.insert(out.end(), list[i].begin(), list[i].end());
  }
  return out;
}

std::size_t piece_count(const OutboundQueue& queue) {
  std::vector<std::span<const std::byte>> list(100'000);
  return queue.gather(list);
}

/// Writes all there is, in pieces of at most `step` bytes.
Bytes write_all(OutboundQueue& queue, std::size_t step = ~std::size_t{0}) {
  Bytes out;
  while (!queue.empty()) {
    const Bytes next = gathered(queue);
    const std::size_t count = std::min(step, next.size());
    if (count == 0) {
      ADD_FAILURE() << "not empty, but nothing to write";
      break;
    }
    out.insert(out.end(), next.begin(), next.begin() + static_cast<std::ptrdiff_t>(count));
    queue.consume(count);
  }
  return out;
}

Bytes joined(std::initializer_list<Bytes> parts) {
  Bytes out;
  for (const Bytes& part : parts) out.insert(out.end(), part.begin(), part.end());
  return out;
}

Bytes tail(const Bytes& bytes, std::size_t from) {
  return {bytes.begin() + static_cast<std::ptrdiff_t>(from), bytes.end()};
}

/// What the queue ought to do, in the plainest form.
class Model {
 public:
  struct Packet {
    Bytes bytes;
    OutboundKind kind;
    SharedBytes shared;  // that the queue shares until its last byte is written
    std::size_t written = 0;
  };

  void add(bool priority, Packet packet) { lanes_[priority ? 1 : 0].push_back(std::move(packet)); }

  [[nodiscard]] bool empty() const { return lanes_[0].empty() && lanes_[1].empty(); }
  [[nodiscard]] std::size_t packets() const { return lanes_[0].size() + lanes_[1].size(); }
  [[nodiscard]] OutboundDepth depth() const {
    return sum(lanes_[0], [](const Packet&) { return true; });
  }
  [[nodiscard]] OutboundDepth answers() const {
    const auto is_answer = [](const Packet& packet) { return packet.kind == answer; };
    const auto normal = sum(lanes_[0], is_answer);
    const auto priority = sum(lanes_[1], is_answer);
    return {normal.bytes + priority.bytes, normal.packets + priority.packets};
  }

  /// All bytes in the order in which they leave if nothing is added.
  [[nodiscard]] Bytes stream() const {
    Bytes out;
    const auto add = [&out](const Packet& packet) {
      out.insert(out.end(), packet.bytes.begin() + static_cast<std::ptrdiff_t>(packet.written), packet.bytes.end());
    };
    const bool normal_begun = !lanes_[0].empty() && lanes_[0].front().written != 0;
    if (normal_begun) add(lanes_[0].front());
    for (const Packet& packet : lanes_[1]) add(packet);
    for (std::size_t i = normal_begun ? 1 : 0; i < lanes_[0].size(); ++i) add(lanes_[0][i]);
    return out;
  }

  OutboundQueue::Written consume(std::size_t count) {
    OutboundQueue::Written done;
    while (count != 0) {
      const bool normal = lanes_[1].empty() || (!lanes_[0].empty() && lanes_[0].front().written != 0);
      auto& lane = lanes_[normal ? 0 : 1];
      Packet& packet = lane.front();
      const std::size_t step = std::min(count, packet.bytes.size() - packet.written);
      packet.written += step;
      count -= step;
      if (packet.written == packet.bytes.size()) {
        note(done, !normal, packet);
        gone(packet);
        lane.pop_front();
      }
    }
    return done;
  }

  std::size_t drop_oldest() {
    const auto it = std::find_if(lanes_[0].begin(), lanes_[0].end(),
                                 [](const Packet& packet) { return packet.kind == push && packet.written == 0; });
    if (it == lanes_[0].end()) return 0;
    const std::size_t size = it->bytes.size();
    gone(*it);
    lanes_[0].erase(it);
    return size;
  }

  OutboundQueue::Written clear() {
    OutboundQueue::Written left;
    for (std::size_t lane = 0; lane < 2; ++lane) {
      for (const Packet& packet : lanes_[lane]) {
        note(left, lane == 1, packet);
        gone(packet);
      }
      lanes_[lane].clear();
    }
    return left;
  }

  /// Shared payloads of packets that are gone: nobody else may hold them.
  std::vector<SharedBytes> left_shared;

 private:
  void gone(const Packet& packet) {
    if (packet.shared) left_shared.push_back(packet.shared);
  }
  static void note(OutboundQueue::Written& sum, bool priority, const Packet& packet) {
    ++sum.packets;
    if (packet.kind == answer) return;
    OutboundDepth& depth = priority ? sum.priority : sum.normal;
    depth.bytes += packet.bytes.size();
    ++depth.packets;
  }
  template <class Predicate>
  static OutboundDepth sum(const std::deque<Packet>& lane, Predicate wanted) {
    OutboundDepth depth;
    for (const Packet& packet : lane) {
      if (!wanted(packet)) continue;
      depth.bytes += packet.bytes.size();
      ++depth.packets;
    }
    return depth;
  }

  std::array<std::deque<Packet>, 2> lanes_;
};

void expect_written(const OutboundQueue::Written& is, const OutboundQueue::Written& expected) {
  EXPECT_EQ(is.packets, expected.packets);
  EXPECT_EQ(is.normal, expected.normal);
  EXPECT_EQ(is.priority, expected.priority);
}

/// The queue and the model, driven together.
class Pair {
 public:
  explicit Pair(std::uint32_t seed) : random_(seed) {}

  std::size_t pick(std::size_t below) { return std::uniform_int_distribution<std::size_t>(0, below - 1)(random_); }

  std::size_t payload_size() {
    switch (pick(12)) {
      case 0: return 0;
      case 1: return large - 2 + pick(5);
      case 2: return large + pick(3 * large);
      case 3: return 1000 + pick(8000);
      default: return pick(120);
    }
  }

  void append(bool priority, OutboundKind kind) {
    const auto header = header_of(priority, static_cast<std::uint32_t>(random_()));
    const Bytes extension = random_bytes(pick(3) == 0 ? pick(60) : 0, static_cast<std::uint32_t>(random_()));
    const Bytes payload = random_bytes(payload_size(), static_cast<std::uint32_t>(random_()));
    Bytes bytes = packet_bytes(header, extension, payload);
    if (queue.empty() && pick(2) == 0) {
      const std::size_t written = pick(bytes.size());
      queue.append_rest(header, extension, payload, kind, written);
      model.add(priority, {std::move(bytes), kind, nullptr, written});
    } else if (pick(4) == 0) {
      auto shared = std::make_shared<const Bytes>(payload);
      queue.append(header, extension, shared, kind);
      EXPECT_EQ(shared.use_count(), payload.size() < large ? 1 : 2) << "a small payload is copied, a large one shared";
      model.add(priority, {std::move(bytes), kind, std::move(shared)});
    } else {
      queue.append(header, extension, payload, kind);
      model.add(priority, {std::move(bytes), kind, nullptr});
    }
  }

  void hand_over_some() {
    const bool exact = pick(2) == 0;
    const std::size_t most = 1 + pick(pick(2) == 0 ? 100 : 100'000);
    const Bytes stream = model.stream();
    Bytes taken;
    const auto done = queue.hand_over(most, exact, [&](OutboundBlock& block) {
      const auto bytes = block.bytes();
      taken.insert(taken.end(), bytes.begin(), bytes.end());
      if (pick(2) == 0) pool.give(std::move(OutboundBlock(std::move(block)).own));  // else the queue does
    });
    ASSERT_LE(taken.size(), stream.size());
    ASSERT_TRUE(std::equal(taken.begin(), taken.end(), stream.begin())) << "not the bytes that are next";
    if (exact) {
      ASSERT_EQ(taken.size(), std::min(most, stream.size()));
    }
    ASSERT_GE(taken.size(), std::min(most, stream.size()));
    expect_written(done, model.consume(taken.size()));
  }

  void write_some() {
    if (pick(3) == 0) return hand_over_some();
    const Bytes next = gathered(queue, 1 + pick(20));
    const Bytes stream = model.stream();
    ASSERT_LE(next.size(), stream.size());
    ASSERT_TRUE(std::equal(next.begin(), next.end(), stream.begin())) << "not the bytes that are next";
    ASSERT_EQ(next.empty(), stream.empty());
    if (next.empty()) return;
    std::size_t count = 0;
    switch (pick(4)) {
      case 0: count = std::min<std::size_t>(next.size(), pick(20)); break;
      case 1: count = next.size(); break;
      default: count = pick(next.size() + 1);
    }
    expect_written(queue.consume(count), model.consume(count));
  }

  void compare() {
    ASSERT_EQ(queue.empty(), model.empty());
    ASSERT_EQ(queue.packets(), model.packets());
    ASSERT_EQ(queue.depth(), model.depth());
    ASSERT_EQ(queue.answers(), model.answers());
    for (const SharedBytes& shared : model.left_shared) ASSERT_EQ(shared.use_count(), 1) << "held beyond its packet";
    model.left_shared.clear();
    most_kept = std::max(most_kept, pool.kept_bytes());
    if (queue.empty()) {
      // The pool keeps whatever it is given here: if an empty queue held a block, there would be less than before.
      ASSERT_EQ(pool.kept_bytes(), most_kept);
    }
  }

  wire::BufferPool pool{std::size_t{1} << 40};
  OutboundQueue queue{pool};
  Model model;
  std::size_t most_kept = 0;

 private:
  std::mt19937 random_;
};

TEST(OutboundQueue, RandomUseWritesEveryPacketInOrderAndKeepsExactAccounts) {
  for (std::uint32_t seed = 1; seed <= 12; ++seed) {
    SCOPED_TRACE(seed);
    Pair pair(seed);
    for (int step = 0; step < 4000; ++step) {
      // Long stretches that fill the queue, and long ones that empty it.
      const bool filling = (step / 150) % 2 == 0;
      const std::size_t action = pair.pick(100);
      if (action < (filling ? 55U : 20U)) {
        pair.append(pair.pick(4) == 0, pair.pick(3) == 0 ? answer : push);
      } else if (action < 65) {
        if (!filling || pair.pick(3) == 0) {
          ASSERT_NO_FATAL_FAILURE(pair.write_some());
        }
      } else if (action < (filling ? 80U : 68U)) {
        ASSERT_EQ(pair.queue.drop_oldest(), pair.model.drop_oldest());
      } else if (action == 99 && pair.pick(5) == 0) {
        expect_written(pair.queue.clear(), pair.model.clear());
      } else if (!filling) {
        ASSERT_NO_FATAL_FAILURE(pair.write_some());
      }
      ASSERT_NO_FATAL_FAILURE(pair.compare());
    }
    while (!pair.queue.empty()) ASSERT_NO_FATAL_FAILURE(pair.write_some());
    ASSERT_NO_FATAL_FAILURE(pair.compare());
  }
}

TEST(OutboundQueue, APriorityPacketOvertakesWhatHasNotBegun) {
  wire::BufferPool pool;
  OutboundQueue queue(pool);
  const Bytes payload = random_bytes(50, 1);
  const Bytes a = packet_bytes(header_of(false, 1), {}, payload);
  const Bytes b = packet_bytes(header_of(false, 2), {}, payload);
  const Bytes p = packet_bytes(header_of(true, 3), {}, payload);
  queue.append(header_of(false, 1), {}, payload, push);
  queue.append(header_of(false, 2), {}, payload, push);
  queue.append(header_of(true, 3), {}, payload, push);
  EXPECT_EQ(gathered(queue), joined({p, a, b}));
  EXPECT_EQ(write_all(queue, 1), joined({p, a, b}));
}

// A normal packet is stopped after every one of its bytes, and then a priority packet comes.
TEST(OutboundQueue, APriorityPacketNeverBreaksIntoAPacketThatHasBegun) {
  const Bytes extension = random_bytes(5, 2);
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{40}}) {
    const Bytes payload = random_bytes(size, 1);
    const Bytes a = packet_bytes(header_of(false, 1), extension, payload);
    const Bytes b = packet_bytes(header_of(false, 2), extension, payload);
    const Bytes p = packet_bytes(header_of(true, 3), extension, payload);
    for (std::size_t stop = 0; stop <= a.size(); ++stop) {
      for (const std::size_t step : {std::size_t{1}, std::size_t{7}, ~std::size_t{0}}) {
        wire::BufferPool pool;
        OutboundQueue queue(pool);
        queue.append(header_of(false, 1), extension, payload, push);
        queue.append(header_of(false, 2), extension, payload, push);
        queue.consume(stop);
        queue.append(header_of(true, 3), extension, payload, push);
        const Bytes expected = stop == 0 ? joined({p, a, b}) : joined({tail(a, stop), p, b});
        ASSERT_EQ(write_all(queue, step), expected) << "stopped after " << stop;
      }
    }
  }
}

TEST(OutboundQueue, APriorityPacketThatHasBegunEndsBeforeANormalOne) {
  const Bytes payload = random_bytes(20, 1);
  const Bytes a = packet_bytes(header_of(false, 1), {}, payload);
  const Bytes p = packet_bytes(header_of(true, 3), {}, payload);
  for (std::size_t stop = 1; stop < p.size(); ++stop) {
    wire::BufferPool pool;
    OutboundQueue queue(pool);
    queue.append(header_of(true, 3), {}, payload, push);
    queue.consume(stop);
    queue.append(header_of(false, 1), {}, payload, push);
    EXPECT_EQ(queue.drop_oldest(), a.size()) << "the normal packet has not begun";
    queue.append(header_of(false, 1), {}, payload, push);
    queue.append(header_of(true, 3), {}, payload, push);
    ASSERT_EQ(write_all(queue, 3), joined({tail(p, stop), p, a}));
  }
}

TEST(OutboundQueue, TheRestOfAPacketPartWrittenElsewhereIsExactlyItsOtherBytes) {
  const Bytes extension = random_bytes(9, 2);
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{300}, large - 1, large, large + 500}) {
    const Bytes payload = random_bytes(size, 1);
    for (const bool priority : {false, true}) {
      const Bytes whole = packet_bytes(header_of(priority), extension, payload);
      for (std::size_t written = 0; written < whole.size(); written += written < 400 ? 1 : 997) {
        wire::BufferPool pool;
        OutboundQueue queue(pool);
        queue.append_rest(header_of(priority), extension, payload, answer, written);
        ASSERT_EQ(queue.answers(), (OutboundDepth{whole.size(), 1}));
        ASSERT_EQ(queue.drop_oldest(), 0U);
        queue.append(header_of(!priority, 9), {}, Bytes{}, push);
        const Bytes other = packet_bytes(header_of(!priority, 9), {}, {});
        const Bytes expected =
            written == 0 && !priority ? joined({other, whole}) : joined({tail(whole, written), other});
        ASSERT_EQ(write_all(queue, 700), expected) << "written " << written << " of " << whole.size();
        ASSERT_TRUE(queue.empty());
      }
    }
  }
}

TEST(OutboundQueue, APushPartWrittenElsewhereCountsAsBegun) {
  wire::BufferPool pool;
  OutboundQueue queue(pool);
  const Bytes payload = random_bytes(100, 1);
  queue.append_rest(header_of(false), {}, payload, push, 1);
  EXPECT_EQ(queue.drop_oldest(), 0U);
  EXPECT_EQ(queue.depth(), (OutboundDepth{116, 1}));
  const auto done = queue.consume(115);
  EXPECT_EQ(done.packets, 1U);
  EXPECT_EQ(done.normal, (OutboundDepth{116, 1})) << "counted whole";
}

TEST(OutboundQueue, TheLengthsInTheHeaderComeFromTheSpans) {
  wire::BufferPool pool;
  OutboundQueue queue(pool);
  auto header = header_of(false);
  header.ext_len = 999;
  header.payload_len = 999;
  const Bytes extension = random_bytes(3, 1);
  const Bytes payload = random_bytes(4, 2);
  queue.append(header, extension, payload, push);
  EXPECT_EQ(queue.depth().bytes, 23U);
  EXPECT_EQ(gathered(queue), packet_bytes(header_of(false), extension, payload));
}

// After every number of bytes written, all pushes are dropped: what is left must be the packet that had begun and the
// answers, untouched.
TEST(OutboundQueue, DropOldestAtEveryMomentLeavesWhatHasBegunAndEveryAnswer) {
  constexpr std::size_t sizes[] = {3, 40, 0, 17, large + 10, 25, 2500, 60};
  std::vector<Bytes> packets;
  std::vector<OutboundKind> kinds;
  std::vector<Bytes> payloads;
  std::size_t total = 0;
  for (std::size_t i = 0; i < std::size(sizes); ++i) {
    payloads.push_back(random_bytes(sizes[i], static_cast<std::uint32_t>(i)));
    packets.push_back(packet_bytes(header_of(false, static_cast<std::uint32_t>(i)), {}, payloads[i]));
    kinds.push_back(i % 3 == 1 ? answer : push);
    total += packets[i].size();
  }
  for (const bool shared : {false, true}) {
    for (std::size_t written = 0; written <= total; written += written < 200 || written > 16'600 ? 1 : 501) {
      SCOPED_TRACE(written);
      wire::BufferPool pool;
      OutboundQueue queue(pool);
      for (std::size_t i = 0; i < packets.size(); ++i) {
        const auto header = header_of(false, static_cast<std::uint32_t>(i));
        if (shared) {
          queue.append(header, {}, std::make_shared<const Bytes>(payloads[i]), kinds[i]);
        } else {
          queue.append(header, {}, payloads[i], kinds[i]);
        }
      }
      queue.consume(std::min(written, total));
      Bytes expected;
      std::vector<std::size_t> dropped;
      OutboundDepth depth;
      std::size_t at = 0;
      for (std::size_t i = 0; i < packets.size(); ++i) {
        const std::size_t end = at + packets[i].size();
        const std::size_t gone = std::clamp(written, at, end) - at;
        if (gone == 0 && kinds[i] == push) {
          dropped.push_back(packets[i].size());
        } else if (gone < packets[i].size()) {
          const Bytes rest = tail(packets[i], gone);
          expected.insert(expected.end(), rest.begin(), rest.end());
          depth.bytes += packets[i].size();
          ++depth.packets;
        }
        at = end;
      }
      for (const std::size_t size : dropped) ASSERT_EQ(queue.drop_oldest(), size);
      ASSERT_EQ(queue.drop_oldest(), 0U);
      ASSERT_EQ(queue.depth(), depth);
      ASSERT_EQ(write_all(queue, 1000), expected);
    }
  }
}

TEST(OutboundQueue, DropOldestLeavesThePriorityLaneAlone) {
  wire::BufferPool pool;
  OutboundQueue queue(pool);
  queue.append(header_of(true), {}, Bytes{}, push);
  EXPECT_EQ(queue.drop_oldest(), 0U);
  EXPECT_EQ(queue.packets(), 1U);
  EXPECT_EQ(queue.depth(), OutboundDepth{}) << "of the normal lane";
}

TEST(OutboundQueue, ASharedPayloadIsLetGoWhenItsPacketIsWrittenThoughOthersWait) {
  wire::BufferPool pool;
  OutboundQueue queue(pool);
  const auto first = std::make_shared<const Bytes>(random_bytes(large, 1));
  const auto second = std::make_shared<const Bytes>(random_bytes(large, 2));
  for (const auto& payload : {first, second}) queue.append(header_of(false), {}, payload, push);
  EXPECT_EQ(first.use_count(), 2);
  queue.consume(16 + large);
  EXPECT_EQ(first.use_count(), 1);
  EXPECT_EQ(second.use_count(), 2);
  queue.append(header_of(false), {}, first, push);
  queue.drop_oldest();
  EXPECT_EQ(second.use_count(), 1);
  EXPECT_EQ(first.use_count(), 2);
  queue.clear();
  EXPECT_EQ(first.use_count(), 1);
}

TEST(OutboundQueue, AnEmptiedQueueHoldsNoBlocks) {
  wire::BufferPool pool(std::size_t{1} << 30);
  OutboundQueue queue(pool);
  const auto fill = [&] {
    for (std::uint32_t i = 0; i < 300; ++i) {
      queue.append(header_of(i % 5 == 0), {}, random_bytes(i % 50 == 0 ? large : 100, i), i % 2 == 0 ? answer : push);
    }
  };
  fill();
  EXPECT_EQ(pool.kept_bytes(), 0U);
  write_all(queue);
  const std::size_t all = pool.kept_bytes();
  EXPECT_GE(all, 300U * 100U + 6 * large);
  fill();
  EXPECT_LT(pool.kept_bytes(), all / 2) << "they are in use again";
  queue.clear();
  EXPECT_EQ(pool.kept_bytes(), all);
  fill();
  while (queue.drop_oldest() != 0) {
  }
  write_all(queue, 5000);
  EXPECT_EQ(pool.kept_bytes(), all);
  {
    OutboundQueue other(pool);
    other.append(header_of(false), {}, random_bytes(large, 1), push);
    EXPECT_LT(pool.kept_bytes(), all);
  }
  EXPECT_EQ(pool.kept_bytes(), all) << "its destructor gives them back";
}

TEST(OutboundQueue, ClearSaysWhatWasNotWrittenAPacketInPartWrittenIncluded) {
  wire::BufferPool pool;
  OutboundQueue queue(pool);
  queue.append(header_of(false), {}, random_bytes(84, 1), push);
  queue.append(header_of(false), {}, random_bytes(84, 2), answer);
  queue.consume(50);
  queue.append(header_of(true), {}, random_bytes(4, 3), push);
  queue.append(header_of(true), {}, random_bytes(4, 3), answer);
  expect_written(queue.clear(), {.packets = 4, .normal = {100, 1}, .priority = {20, 1}});
  EXPECT_TRUE(queue.empty());
  EXPECT_EQ(queue.answers(), OutboundDepth{});
  expect_written(queue.clear(), {});
  const Bytes payload = random_bytes(10, 4);
  queue.append(header_of(false), {}, payload, push);
  EXPECT_EQ(gathered(queue), packet_bytes(header_of(false), {}, payload)) << "from its first byte on";
}

TEST(OutboundQueue, AsManyPiecesAsThereIsRoomForAreGathered) {
  wire::BufferPool pool;
  OutboundQueue queue(pool);
  Bytes expected;
  for (std::uint32_t i = 0; i < 5; ++i) {
    const Bytes payload = random_bytes(large, i);
    queue.append(header_of(false, i), {}, std::make_shared<const Bytes>(payload), push);
    const Bytes packet = packet_bytes(header_of(false, i), {}, payload);
    expected.insert(expected.end(), packet.begin(), packet.end());
  }
  EXPECT_EQ(gathered(queue, 0), Bytes{});
  EXPECT_EQ(gathered(queue, 1).size(), 16U);
  EXPECT_EQ(gathered(queue, 3), Bytes(expected.begin(), expected.begin() + 32 + large));
  EXPECT_EQ(gathered(queue), expected);
}

TEST(OutboundQueue, ManySmallPacketsLieInFewPieces) {
  wire::BufferPool pool;
  OutboundQueue queue(pool);
  for (std::uint32_t i = 0; i < 10'000; ++i) queue.append(header_of(false), {}, random_bytes(64, i), push);
  EXPECT_LE(piece_count(queue), 800'000U / (64 * 1024) + 8);
}

TEST(OutboundQueue, WhatWasExpectedLiesInOnePiece) {
  const auto pieces = [](std::size_t expected) {
    wire::BufferPool pool;
    OutboundQueue queue(pool);
    if (expected != 0) queue.expect(expected);
    for (std::uint32_t i = 0; i < 700; ++i) queue.append(header_of(false), {}, random_bytes(64, i), push);
    return piece_count(queue);
  };
  EXPECT_EQ(pieces(700 * 80), 1U);
  EXPECT_GT(pieces(0), 1U);
}

// Whatever allocation fails, the queue is as it was, and the same call made again succeeds.
TEST(OutboundQueue, AnAppendThatRunsOutOfMemoryChangesNothing) {
  using Action = std::function<void(OutboundQueue&)>;
  const Bytes extension = random_bytes(20, 1);
  const Bytes small = random_bytes(50, 2);
  const Bytes medium = random_bytes(large - 1, 3);
  const Bytes big = random_bytes(3 * large, 4);
  const auto shared = std::make_shared<const Bytes>(big);
  const Action appends[] = {
      [&](OutboundQueue& queue) { queue.append(header_of(false), extension, small, push); },
      [&](OutboundQueue& queue) { queue.append(header_of(true), extension, small, answer); },
      [&](OutboundQueue& queue) { queue.append(header_of(false), extension, medium, answer); },
      [&](OutboundQueue& queue) { queue.append(header_of(false), extension, big, push); },
      [&](OutboundQueue& queue) { queue.append(header_of(true), extension, big, push); },
      [&](OutboundQueue& queue) { queue.append(header_of(false), extension, shared, push); },
  };
  const auto rest = [&](OutboundQueue& queue) { queue.append_rest(header_of(false), extension, big, push, 21); };
  const auto nothing = [](OutboundQueue&) {};
  // so full that the next packet spans two blocks, or that a list of packets must grow
  const auto filled = [&](std::size_t packets, std::size_t written) {
    return [&, packets, written](OutboundQueue& queue) {
      for (std::size_t i = 0; i < packets; ++i) queue.append(header_of(i % 3 == 0), {}, small, push);
      queue.consume(written);
    };
  };
  const Action starts[] = {
      nothing,        filled(1, 0),
      filled(31, 10), filled(64, 66 * 5 + 1),
      filled(128, 0), [&](OutboundQueue& queue) { queue.append(header_of(false), {}, shared, push); }};
  int failures = 0;
  const auto check = [&](const Action& start, const Action& append) {
    wire::BufferPool reference_pool;
    OutboundQueue reference(reference_pool);
    start(reference);
    const Bytes before = gathered(reference);
    append(reference);
    const Bytes after = write_all(reference);
    for (long successes = 0;; ++successes) {
      ASSERT_LT(successes, 100);
      wire::BufferPool pool(0);  // keeps nothing, so that every block is an allocation
      OutboundQueue queue(pool);
      start(queue);
      const auto depth = queue.depth();
      const auto answers = queue.answers();
      const auto packets = queue.packets();
      bool failed = false;
      {
        const test::AllocationFailure failure(successes);
        try {
          append(queue);
        } catch (const std::bad_alloc&) {
          failed = true;
        }
        ASSERT_EQ(failed, failure.happened());
      }
      if (!failed) {
        ASSERT_EQ(write_all(queue), after);
        return;
      }
      ++failures;
      ASSERT_EQ(queue.depth(), depth);
      ASSERT_EQ(queue.answers(), answers);
      ASSERT_EQ(queue.packets(), packets);
      ASSERT_EQ(gathered(queue), before);
      append(queue);
      ASSERT_EQ(write_all(queue), after);
    }
  };
  for (const Action& start : starts) {
    for (const Action& append : appends) ASSERT_NO_FATAL_FAILURE(check(start, append));
  }
  ASSERT_NO_FATAL_FAILURE(check(nothing, rest));
  EXPECT_GT(failures, 30) << "the injection must have met allocations";
}

// --- Fifo

TEST(Fifo, RandomUseEqualsADeque) {
  std::mt19937 random(1);
  Fifo<std::shared_ptr<int>> fifo;
  std::deque<std::shared_ptr<int>> model;
  for (int step = 0; step < 30'000; ++step) {
    const auto action = random() % 16;
    const bool filling = (step / 1000) % 2 == 0;
    if (action < (filling ? 9U : 5U)) {
      auto item = std::make_shared<int>(step);
      fifo.push(item);
      model.push_back(std::move(item));
    } else if (action < 15 && !model.empty()) {
      const std::size_t index = action < 12 ? 0 : random() % model.size();
      const auto item = model[index];
      model.erase(model.begin() + static_cast<std::ptrdiff_t>(index));
      if (index == 0 && action % 2 == 0) {
        fifo.pop();
      } else {
        fifo.erase(index);
      }
      ASSERT_EQ(item.use_count(), 1) << "what was taken out is still held";
    } else if (action == 15 && random() % 64 == 0) {
      fifo.clear();
      model.clear();
    }
    ASSERT_EQ(fifo.size(), model.size());
    ASSERT_EQ(fifo.empty(), model.empty());
    if (model.empty()) continue;
    ASSERT_EQ(fifo.front(), model.front());
    ASSERT_EQ(fifo.back(), model.back());
    const std::size_t index = random() % model.size();
    ASSERT_EQ(fifo[index], model[index]);
  }
}

// --- OutboundQueuePool

TEST(OutboundQueuePool, AQueueGivenBackIsLentAgain) {
  wire::BufferPool buffers;
  OutboundQueuePool pool(buffers);
  auto first = pool.take();
  auto second = pool.take();
  ASSERT_NE(first, nullptr);
  ASSERT_NE(first, second);
  const OutboundQueue* const address = first.get();
  pool.give(std::move(first));
  EXPECT_EQ(pool.take().get(), address);
}

TEST(OutboundQueuePool, KeepsABoundedNumber) {
  wire::BufferPool buffers;
  OutboundQueuePool pool(buffers);
  std::vector<std::unique_ptr<OutboundQueue>> queues;
  for (int i = 0; i < 1000; ++i) queues.push_back(pool.take());
  for (auto& queue : queues) pool.give(std::move(queue));
  int kept = 0;
  for (;; ++kept) {
    ASSERT_LT(kept, 1000);
    const test::AllocationFailure failure(0);
    try {
      queues[static_cast<std::size_t>(kept)] = pool.take();
    } catch (const std::bad_alloc&) {
      break;
    }
  }
  EXPECT_EQ(kept, 256);
}

// --- OutboundBudget

TEST(OutboundBudget, TakesUpToTheLimitTheMessageBeingAddedIncluded) {
  OutboundBudget budget;
  EXPECT_TRUE(budget.try_reserve(60, {100, 10}));
  EXPECT_FALSE(budget.try_reserve(41, {100, 10}));
  EXPECT_EQ(budget.depth(), (OutboundDepth{60, 1})) << "a refusal takes nothing";
  EXPECT_TRUE(budget.try_reserve(40, {100, 10})) << "the limit itself is allowed";
  EXPECT_FALSE(budget.try_reserve(0, {99, 10}));
  EXPECT_FALSE(budget.try_reserve(1, {100, 10}));
  budget.release({60, 1});
  EXPECT_TRUE(budget.try_reserve(60, {100, 10}));
  EXPECT_EQ(budget.depth(), (OutboundDepth{100, 2}));
}

TEST(OutboundBudget, PacketsAreLimitedApart) {
  OutboundBudget budget;
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(budget.try_reserve(16, {1'000'000, 3}));
  EXPECT_FALSE(budget.try_reserve(16, {1'000'000, 3}));
  budget.release({16, 1});
  EXPECT_TRUE(budget.try_reserve(16, {1'000'000, 3}));
}

TEST(OutboundBudget, AMessageLargerThanTheLimitIsTakenOnlyWhenNothingIsQueued) {
  OutboundBudget budget;
  EXPECT_TRUE(budget.try_reserve(5000, {100, 1}));
  EXPECT_FALSE(budget.try_reserve(1, {100, 1}));
  EXPECT_FALSE(budget.try_reserve(5000, {100, 10}));
  budget.release({5000, 1});
  EXPECT_TRUE(budget.try_reserve(16, {100, 10}));
  EXPECT_FALSE(budget.try_reserve(5000, {100, 10}));
  budget.release({16, 1});
  EXPECT_TRUE(budget.try_reserve(5000, {100, 10}));
}

TEST(OutboundBudget, AReserveWithoutALimitMayOvershootAndThenNothingElseIsTaken) {
  OutboundBudget budget;
  EXPECT_TRUE(budget.try_reserve(90, {100, 10}));
  budget.reserve({500, 20});
  EXPECT_EQ(budget.depth(), (OutboundDepth{590, 21}));
  EXPECT_FALSE(budget.try_reserve(1, {100, 10}));
  budget.release({500, 20});
  EXPECT_TRUE(budget.try_reserve(10, {100, 10}));
}

TEST(OutboundBudget, TheLargestLimitsFitWithoutOneCountSpillingIntoTheOther) {
  OutboundBudget budget;
  constexpr OutboundDepth most{OutboundBudget::max_bytes, OutboundBudget::max_packets};
  budget.reserve({most.bytes - 100, most.packets - 1});
  EXPECT_FALSE(budget.try_reserve(101, most));
  EXPECT_TRUE(budget.try_reserve(100, most));
  EXPECT_EQ(budget.depth(), most);
  EXPECT_FALSE(budget.try_reserve(0, most));
  budget.reserve(most);  // answers, twice over
  EXPECT_EQ(budget.depth(), (OutboundDepth{2 * most.bytes, 2 * most.packets}));
  budget.release(most);
  budget.release(most);
  EXPECT_EQ(budget.depth(), OutboundDepth{});
}

TEST(OutboundLimit, HoldsBothHalvesAndPartsOfThem) {
  constexpr OutboundDepth most{OutboundBudget::max_bytes, OutboundBudget::max_packets};
  OutboundLimit limit({100, 7});
  EXPECT_EQ(limit.get(), (OutboundDepth{100, 7}));
  limit.set(most);
  EXPECT_EQ(limit.get(), most);
  EXPECT_EQ(part_of(most, 50), (OutboundDepth{most.bytes / 2, most.packets / 2}));
  EXPECT_EQ(part_of({100, 10}, 99), (OutboundDepth{99, 9}));
  EXPECT_EQ(part_of(most, 0), OutboundDepth{});
}

// --- OutboundTotal

TEST(OutboundTotal, TakesUpToTheLimitAndMoreOnlyWhenNothingIsQueued) {
  OutboundTotal total(100);
  EXPECT_TRUE(total.try_reserve(500));
  EXPECT_TRUE(total.exhausted());
  EXPECT_FALSE(total.try_reserve(1));
  EXPECT_TRUE(total.release(500));
  EXPECT_TRUE(total.try_reserve(60));
  EXPECT_FALSE(total.try_reserve(41));
  EXPECT_TRUE(total.try_reserve(40));
  EXPECT_EQ(total.used(), 100U);
}

TEST(OutboundTotal, WakesOnceAndOnlyIfSomebodyWasRefusedAndHalfIsFree) {
  OutboundTotal total(100);
  EXPECT_TRUE(total.try_reserve(100));
  EXPECT_FALSE(total.release(60)) << "nobody was refused";
  EXPECT_TRUE(total.try_reserve(60));
  EXPECT_FALSE(total.try_reserve(1));
  EXPECT_TRUE(total.starved());
  EXPECT_FALSE(total.release(49)) << "over half";
  EXPECT_TRUE(total.release(1));
  EXPECT_FALSE(total.starved());
  EXPECT_FALSE(total.release(50)) << "they were told";
}

TEST(OutboundTotal, NeverLosesWhoWasRefusedWhileItEmptied) {
  constexpr std::size_t limit = 1000;
  constexpr int rounds = 20'000;
  OutboundTotal total(limit);
  std::atomic<int> wakes{0};
  std::thread releases([&] {
    for (int i = 0; i < rounds;) {
      if (total.used() < limit) {
        std::this_thread::yield();
        continue;
      }
      if (total.release(limit)) wakes.fetch_add(1);
      ++i;
    }
  });
  for (int i = 0; i < rounds; ++i) {
    while (total.used() != 0) std::this_thread::yield();
    ASSERT_TRUE(total.try_reserve(limit));
    const int before = wakes.load();
    // Refused: told of room afterwards. Not refused: there was room, and it is given back below.
    if (total.try_reserve(1)) {
      (void)total.release(1);
    } else {
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (wakes.load() == before && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
      ASSERT_NE(wakes.load(), before) << "never told";
    }
  }
  releases.join();
}

}  // namespace
}  // namespace msgtrans::protocol
