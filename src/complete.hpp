// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/asio/any_completion_executor.hpp>
#include <boost/asio/associated_allocator.hpp>
#include <boost/asio/associated_cancellation_slot.hpp>
#include <boost/asio/associated_executor.hpp>
#include <boost/asio/bind_allocator.hpp>
#include <boost/asio/dispatch.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/prefer.hpp>
#include <msgtrans/detail/asio.hpp>
#include <utility>

namespace msgtrans::detail {

/// The handler's executor (`fallback` if it has none of its own), kept from running out of work until released.
template <class Handler, class Executor>
asio::any_completion_executor tracked_executor(const Handler& handler, const Executor& fallback) {
  return asio::prefer(asio::get_associated_executor(handler, fallback), asio::execution::outstanding_work.tracked);
}

/// Calls `handler(args...)` on `executor` with the handler's own allocator; possibly before this returns, so never
/// inside an initiating function.
template <class Handler, class... Args>
void complete(const asio::any_completion_executor& executor, Handler handler, Args... args) {
  auto allocator = asio::get_associated_allocator(handler);
  asio::dispatch(executor,
                 asio::bind_allocator(allocator, [handler = std::move(handler), ... args = std::move(args)]() mutable {
                   // Here, and not where the operation ended: a slot may be used only where its handler
                   // runs.
                   if (auto slot = asio::get_associated_cancellation_slot(handler); slot.is_connected()) {
                     slot.clear();
                   }
                   std::move(handler)(std::move(args)...);
                 }));
}

/// The same, but never before this returns: by way of `via`. (An any_completion_executor can dispatch, but not post.)
template <class Via, class Handler, class... Args>
void complete_later(const Via& via, asio::any_completion_executor executor, Handler handler, Args... args) {
  asio::post(via, [executor = std::move(executor), handler = std::move(handler), ... args = std::move(args)]() mutable {
    complete(executor, std::move(handler), std::move(args)...);
  });
}

}  // namespace msgtrans::detail
