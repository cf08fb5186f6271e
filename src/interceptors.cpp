// SPDX-License-Identifier: Apache-2.0
#include "interceptors.hpp"

#include "session_state.hpp"

#include <utility>

namespace msgtrans {

namespace detail {

constinit thread_local bool Interceptors::running_ = false;

bool Interceptors::pass(InterceptedMessage& message) const noexcept {
  struct Running {
    Running() noexcept : before(std::exchange(running_, true)) {}
    ~Running() { running_ = before; }
    bool before;
  } const running;
  for (const auto& interceptor : list) {
    Verdict verdict = Verdict::reject;
    std::exception_ptr exception;
    try {
      verdict = interceptor(message);
    } catch (...) {
      exception = std::current_exception();
    }
    if (verdict == Verdict::pass && !message.answered_) continue;
    rejected.fetch_add(1, std::memory_order_relaxed);
    if (exception) {
      failures.fetch_add(1, std::memory_order_relaxed);
      failed(message.session() != nullptr ? message.session()->id() : SessionId{}, exception);
    }
    return false;
  }
  return true;
}

}  // namespace detail

SendResult InterceptedMessage::respond(BytesView payload, BytesView extension) {
  if (answers_ == nullptr || answered_) return SendResult::not_found;
  const auto result = answers_->respond(header_, payload, extension, std::nullopt);
  answered_ = result == SendResult::queued;
  return result;
}

}  // namespace msgtrans
