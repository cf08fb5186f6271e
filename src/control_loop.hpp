// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "session_state.hpp"

#include <atomic>
#include <boost/asio/any_io_executor.hpp>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <msgtrans/channel/event_broadcaster.hpp>
#include <msgtrans/channel/sync_channel.hpp>
#include <msgtrans/event.hpp>
#include <msgtrans/session/session_manager.hpp>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

namespace msgtrans::detail {

/// What the control loop is told.
struct ControlCommand {
  struct SessionAdded {};
  struct SessionRemoved {
    Error reason;
  };
  /// News; about the command's session, if it has one.
  struct Announce {
    Event event;
  };
  /// Close the sessions that had no packet either way for that long.
  struct Sweep {
    std::chrono::milliseconds idle_for;
  };
  /// What a pool wants done about its size, on the loop.
  struct ResizePool {
    std::function<void()> apply;
  };

  std::variant<SessionAdded, SessionRemoved, Announce, Sweep, ResizePool> what;
  SessionPtr session = {};     // null if it is about none
  std::uint32_t sequence = 0;  // of the commands about that session, from 0
};

/// The loop behind `Control`: commands come through a SyncChannel, events go to an EventBroadcaster. Shutting down is
/// the channel's close, so it has one place among the commands of all.
///
/// It runs on a thread of its own, which sleeps in the channel; or, where no thread may be started, on an executor, to
/// which it is posted when the channel stops being empty. Any thread may make any call.
class ControlLoop : public std::enable_shared_from_this<ControlLoop> {
 public:
  enum class Runs : std::uint8_t { on_own_thread, on_executor };
  using Sweeper = std::function<void(std::chrono::milliseconds idle_for)>;

  static constexpr std::size_t default_event_capacity = 4096;

  /// `executor` runs the event broadcaster, and the loop if it has no thread. `context`: what is to be kept for it.
  ControlLoop(asio::any_io_executor executor, Runs runs, std::size_t event_capacity = default_event_capacity,
              std::shared_ptr<void> context = nullptr);
  ~ControlLoop();
  ControlLoop(const ControlLoop&) = delete;
  ControlLoop& operator=(const ControlLoop&) = delete;

  /// Once. Commands sent before are kept until then. `sweeper` is called for sweeps, on the loop.
  void start(Sweeper sweeper = {});
  /// Once. What was sent before is carried out, every event is sent, the subscriptions are closed; then `done` is
  /// called, once, on the executor or where that is being destroyed. Later commands are refused. If the loop was not
  /// started, this call does what there is to do.
  void shut_down(std::function<void()> done);
  /// The context of the executor is being destroyed, or has been: if the loop was to run there, what is left is done in
  /// this call, or in that of `shut_down`.
  void abandon() noexcept;
  /// After `shut_down`: waits for the thread. Not from a thread that must not block.
  void join();

  /// False, and counted, if the loop has been shut down.
  bool send(ControlCommand command) noexcept;
  /// The same for several with one wake; empties the vector.
  void send_all(std::vector<ControlCommand>& commands) noexcept;
  /// The next command about a session, from any thread; the last, if it is said so: then none follows.
  void send_about(SessionState& session, decltype(ControlCommand::what) what, bool last = false) noexcept;
  /// Tells the subscribers, if there are any.
  void announce(Event event) noexcept;
  [[nodiscard]] bool has_subscribers() const noexcept { return broadcaster_.subscribers() != 0; }
  [[nodiscard]] Subscription<Event> subscribe() { return broadcaster_.subscribe(); }

  [[nodiscard]] ControlStats stats() const noexcept;

 private:
  void run_thread() noexcept;
  void schedule() noexcept;
  void run_posted() noexcept;
  void handle_batch() noexcept;
  void in_order(ControlCommand& command) noexcept;
  void carry_out(ControlCommand& command) noexcept;
  void publish(Event event) noexcept;
  void run_here() noexcept;
  void finish() noexcept;

  const std::shared_ptr<void> context_;
  const asio::any_io_executor executor_;
  const Runs runs_;
  SyncChannel<ControlCommand> channel_{ChannelCapacity::unbounded()};
  EventBroadcaster<Event> broadcaster_;
  std::thread thread_;
  std::function<void()> done_;  // written before the channel is closed, read after that was seen

  // Of the loop.
  Sweeper sweeper_;
  std::vector<ControlCommand> batch_;
  // Commands about a session that came before an earlier one about it: producers are many, and the channel keeps only
  // the order of each. Nearly always empty.
  std::map<SessionId, std::map<std::uint32_t, ControlCommand>> early_;  // by their sequence

  std::atomic<bool> started_{false};
  std::atomic<bool> scheduled_{false};  // on the executor: posted, or running
  std::atomic<bool> abandoned_{false};  // what it runs on has gone, and nobody else can be in the loop
  bool finished_ = false;               // the loop's
  std::atomic<std::uint64_t> handled_{0};
  std::atomic<std::uint64_t> refused_{0};
  std::atomic<std::uint64_t> reordered_{0};
  std::atomic<std::uint64_t> failed_{0};
};

}  // namespace msgtrans::detail
