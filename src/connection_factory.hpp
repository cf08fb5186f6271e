// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tls.hpp"

#include <functional>
#include <memory>
#include <msgtrans/client_transport.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/session_options.hpp>
#include <msgtrans/transport/connection.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <mutex>

namespace msgtrans::detail {

/// Makes what stands between packets and that socket, which outlives it; empty if nothing does. Any thread. May throw.
using ConnectionFactory = std::function<std::unique_ptr<Connection>(int descriptor)>;

/// The TLS of a listener, which may be renewed while it serves. Any thread.
class TlsOfListener {
 public:
  explicit TlsOfListener(std::shared_ptr<const TlsContext> context) noexcept : context_(std::move(context)) {}

  [[nodiscard]] std::shared_ptr<const TlsContext> get() const {
    const std::lock_guard lock(mutex_);
    return context_;
  }
  void set(std::shared_ptr<const TlsContext> context) {
    const std::lock_guard lock(mutex_);
    context_.swap(context);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const TlsContext> context_;
};

/// The TLS of a client, once it was needed.
struct TlsOfClient {
  std::shared_ptr<const TlsContext> plain;
  std::shared_ptr<const TlsContext> below_websocket;
};

/// Files are read here. `tls` is set if the transport is encrypted.
[[nodiscard]] ConnectionFactory factory_for(const Endpoint& listener, const ListenOptions& options,
                                            const SessionOptions& session, std::shared_ptr<TlsOfListener>& tls,
                                            Error& error);
/// For renewing.
[[nodiscard]] std::shared_ptr<const TlsContext> tls_context_for(const Endpoint& listener,
                                                                const TlsServerOptions& options, Error& error);

/// The same for a client; the next connection may resume this one's session.
[[nodiscard]] ConnectionFactory factory_for(const Endpoint& target, const ClientOptions& options, TlsOfClient& tls,
                                            Error& error);

}  // namespace msgtrans::detail
