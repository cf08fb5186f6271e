// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "shard.hpp"

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <msgtrans/detail/exception_text.hpp>
#include <msgtrans/detail/insist.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/interceptor.hpp>
#include <msgtrans/session_id.hpp>
#include <utility>
#include <vector>

namespace msgtrans::detail {

/// Those of one direction, of a server or a client; not changed once there are sessions. Any thread.
struct Interceptors {
  std::vector<Interceptor> list;
  /// Told what they throw; any thread.
  std::function<void(SessionId, const std::exception_ptr&)> failed;

  mutable std::atomic<std::uint64_t> rejected{0};
  mutable std::atomic<std::uint64_t> failures{0};  // of those

  /// False: it goes no further, and was counted.
  [[nodiscard]] bool pass(InterceptedMessage& message) const noexcept;

  /// What is to be sent.
  [[nodiscard]] static InterceptedMessage outbound(const wire::Header& header, BytesView extension, BytesView payload,
                                                   Session* to) noexcept {
    return InterceptedMessage(header, extension, payload, to);
  }
  /// True on a thread whose interceptor runs: what it sends itself is not shown to any.
  [[nodiscard]] static bool running() noexcept { return running_; }

 private:
  static constinit thread_local bool running_;
};

/// Adds one to those of a host, which is told what they throw, on `shard` or the one that it happened on.
template <class Host>
void insert_interceptor(std::shared_ptr<Interceptors>& interceptors, Interceptor interceptor, std::weak_ptr<Host> host,
                        std::shared_ptr<Shard> shard) {
  if (!interceptors) {
    auto fresh = std::make_shared<Interceptors>();
    fresh->failed = [host = std::move(host), shard = std::move(shard)](SessionId id,
                                                                       const std::exception_ptr& exception) {
      const auto tell = [host, id, exception] {
        if (const auto alive = host.lock()) {
          alive->failed({id, Error(Errc::handler_failed, text_of(exception)), exception});
        }
      };
      if (Shard::current() != nullptr) return tell();
      insist([&] { shard->post(tell); });
    };
    interceptors = std::move(fresh);
  }
  interceptors->list.push_back(std::move(interceptor));
}

}  // namespace msgtrans::detail
