// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/asio/any_io_executor.hpp>
#include <cstddef>
#include <memory>
#include <msgtrans/channel/async_channel.hpp>
#include <msgtrans/channel/channel_status.hpp>
#include <utility>
#include <vector>

namespace msgtrans::detail {

/// An actor's mailbox: two lanes, each the inside of an AsyncChannel, and one place to wait for both. What is in the
/// urgent lane is received first.
template <class M>
class Mailbox {
 public:
  using Lane = AsyncChannelState<M>;

  Mailbox(const boost::asio::any_io_executor& executor, std::size_t capacity)
      : normal_(std::make_shared<Lane>(executor, ChannelCapacity::bounded(capacity))),
        urgent_(std::make_shared<Lane>(executor, ChannelCapacity::bounded(capacity))) {}

  [[nodiscard]] const boost::asio::any_io_executor& executor() const noexcept { return normal_->executor(); }
  [[nodiscard]] Lane& lane(bool urgent) noexcept { return urgent ? *urgent_ : *normal_; }

  ChannelStatus put(M&& message, bool urgent) {
    const auto status = lane(urgent).put(std::move(message));
    // Who receives waits in the normal lane; as in a channel, it looks once more after it has counted itself there.
    if (urgent && status == ChannelStatus::ok) normal_->wake_receiver();
    return status;
  }

  /// Appends at most `max` to `out`, urgent ones first; how many. If none, `closed` says whether there will never be
  /// any. Throws `std::bad_alloc`, and nothing was taken.
  std::size_t take(std::vector<M>& out, std::size_t max, bool& closed) {
    const std::size_t wanted = make_room(out, tickets(), max);
    const auto append = [&out](M&& message) noexcept { out.push_back(std::move(message)); };
    bool urgent_closed = false;
    bool normal_closed = false;
    std::size_t count = urgent_->get(wanted, urgent_closed, append);
    if (count < wanted || wanted == 0) count += normal_->get(wanted - count, normal_closed, append);
    closed = count == 0 && is_closed() && tickets() == 0;
    return count;
  }

  [[nodiscard]] bool can_receive() const noexcept { return tickets() != 0 || is_closed(); }
  [[nodiscard]] bool is_closed() const noexcept { return normal_->tickets().closed(); }
  [[nodiscard]] std::size_t size() const noexcept {
    return static_cast<std::size_t>(normal_->tickets().values() + urgent_->tickets().values());
  }
  void close() noexcept {
    urgent_->close();  // first: closed is what the normal lane says
    normal_->close();
  }
  [[nodiscard]] AsyncWaiters& receivers() noexcept { return normal_->receivers(); }

 private:
  [[nodiscard]] std::size_t tickets() const noexcept {
    return static_cast<std::size_t>(normal_->tickets().count() + urgent_->tickets().count());
  }

  const std::shared_ptr<Lane> normal_;
  const std::shared_ptr<Lane> urgent_;
};

/// How `SendStep` sends to one of a mailbox's lanes.
template <class M, bool Urgent>
struct IntoMailbox {
  using Value = M;
  using State = Mailbox<M>;
  static typename State::Lane& lane(State& state) noexcept { return state.lane(Urgent); }
  static ChannelStatus put(State& state, M&& message) { return state.put(std::move(message), Urgent); }
};

}  // namespace msgtrans::detail
