// SPDX-License-Identifier: Apache-2.0
// Sessions come, join, leave and vanish while several threads send to their group; and at the end everything is
// accounted for.
#include "support/fixture.hpp"

#include <array>
#include <atomic>
#include <cstdlib>
#include <gtest/gtest.h>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace msgtrans::test {
namespace {

constexpr std::size_t senders = 3;

int messages_of_each() {
  const char* const factor = std::getenv("MSGTRANS_STRESS");
  return 1500 * (factor != nullptr ? std::atoi(factor) : 1);
}

/// Checks what it gets: of each sender each message at most once, in order.
class Member {
 public:
  explicit Member(const TestServer& server) {
    client_.on_message([this](Session&, const Message& message) {
      const std::size_t sender = message.biz_type();
      const int number = std::stoi(std::string(message.text()));
      const std::lock_guard lock(mutex_);
      if (number <= last_[sender]) ++out_of_order_;
      last_[sender] = number;
      ++received_;
    });
    client_.connect(server.url());
  }
  [[nodiscard]] std::size_t received() const {
    const std::lock_guard lock(mutex_);
    return received_;
  }
  [[nodiscard]] std::size_t out_of_order() const {
    const std::lock_guard lock(mutex_);
    return out_of_order_;
  }

 private:
  mutable std::mutex mutex_;
  std::array<int, senders> last_{-1, -1, -1};
  std::size_t received_ = 0;
  std::size_t out_of_order_ = 0;
  ClientTransport client_;
};

TEST(GroupsUnderStress, LoseNothingTwistNothingAndLeaveNothingBehind) {
  constexpr std::size_t always = 6, sometimes = 6;
  const int count = messages_of_each();
  TestServer server(
      {.shards = 4,
       .session = {.outbound_bytes = std::size_t{1} << 30, .outbound_packets = 1 << 20, .first_packet_timeout = 0ms}});
  auto& transport = server.transport;
  const Groups groups = transport.groups();
  transport.on_connect([groups, came = server.came](Session& session) mutable {
    groups.join("room", session.id());
    groups.join("a room of its own for " + to_string(session.id()), session.id());
    came.add(session.id());
  });
  server.start();

  std::vector<std::unique_ptr<Member>> members;
  for (std::size_t i = 0; i < always + sometimes; ++i) members.push_back(std::make_unique<Member>(server));
  ASSERT_TRUE(server.came.wait_for(members.size()));
  const auto ids = server.came.all();

  std::atomic<bool> over{false};
  std::atomic<std::uint64_t> queued{0}, refused{0};
  std::vector<std::thread> sending, others;
  for (std::size_t sender = 0; sender < senders; ++sender) {
    sending.emplace_back([&, sender] {
      for (int i = 0; i < count; ++i) {
        const auto result = groups.send("room", std::to_string(i), {.biz_type = static_cast<std::uint8_t>(sender)});
        queued += result.queued;
        refused += result.refused;
        EXPECT_GE(result.queued, always);
        EXPECT_EQ(result.dropped, 0U);
        if (i % 8 == 0) std::this_thread::yield();
      }
    });
  }
  // Members that come and go ...
  for (unsigned which = 0; which < 2; ++which) {
    others.emplace_back([&, which] {
      std::mt19937 random(which);
      while (!over) {
        const SessionId id = ids[always + random() % sometimes];
        switch (random() % 6) {
          case 0: groups.leave_all(id); break;
          case 1:
          case 2: groups.leave("room", id); break;
          default: groups.join(random() % 3 == 0 ? "another" : "room", id); break;
        }
        EXPECT_GE(groups.size("room"), always);
        EXPECT_GE(groups.members("room").size(), always);
        EXPECT_LE(groups.groups_of(id).size(), 3U);
      }
    });
  }
  // ... and sessions, which somebody has join until the end.
  others.emplace_back([&] {
    std::mt19937 random(5);
    while (!over) {
      RawPeer visitor(server.endpoint);
      (void)visitor.readable(std::chrono::milliseconds(random() % 3));
      if (random() % 2 == 0) visitor.reset();
    }
  });
  others.emplace_back([&] {
    while (!over) {
      const std::size_t known = server.came.size();
      Error error;
      groups.join("latest", server.came.at(known - 1), error);
    }
  });
  for (auto& thread : sending) thread.join();
  over = true;
  for (auto& thread : others) thread.join();

  const std::size_t all = senders * static_cast<std::size_t>(count);
  // Which of the clients are those that stayed is the server's secret: as many as that have got everything.
  EXPECT_TRUE(wait_until([&] {
    std::size_t complete = 0;
    for (const auto& member : members) complete += member->received() == all ? 1 : 0;
    return complete >= always;
  }));
  for (const auto& member : members) {
    EXPECT_EQ(member->out_of_order(), 0U);
    EXPECT_LE(member->received(), all);
  }
  members.clear();
  ASSERT_TRUE(wait_until([&] { return transport.session_count() == 0; }));
  EXPECT_EQ(groups.count(), 0U) << "a session that has ended is still a member";
  const auto stats = transport.stats();
  EXPECT_EQ(stats.packets_out + stats.dropped_at_close, queued) << "what was queued is written, or counted";
}

}  // namespace
}  // namespace msgtrans::test
