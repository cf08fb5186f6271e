// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <memory>
#include <msgtrans/detail/asio.hpp>
#include <msgtrans/error.hpp>
#include <msgtrans/transport/connection.hpp>
#include <string>
#include <string_view>

namespace msgtrans {

struct ListenOptions;

/// Where a custom transport accepts connections. Destroyed when the server has stopped or closed it, or after a
/// `listen` that failed, on any thread, without `stop` if it was never started or the executor's context has gone. No
/// call of it is under way then; those that it makes must have ended when its destructor returns.
class CustomListener {
 public:
  /// Takes a connection, with the name of the peer that `Session::peer()` is to give as its path. Any thread, also
  /// from inside `start`; does not block. A connection that the server does not admit is destroyed.
  using OnConnection = std::function<void(std::unique_ptr<Connection> connection, std::string peer)>;
  /// Accepting failed; counted, and told to `on_error`. Any thread.
  using OnFailure = std::function<void(Error)>;

  CustomListener() = default;
  virtual ~CustomListener() = default;
  CustomListener(const CustomListener&) = delete;
  CustomListener& operator=(const CustomListener&) = delete;

  /// What clients put into their URL behind the scheme; `listen` returns it as the endpoint's path.
  [[nodiscard]] virtual std::string address() const = 0;
  /// Called once, when the server runs: from then on connections are handed over, those that came before too. On
  /// `executor`, which is one of the server's.
  virtual void start(const detail::asio::any_io_executor& executor, OnConnection on_connection,
                     OnFailure on_failure) = 0;
  /// Accepts no more, and hands nothing over once it has returned. Called at most once, on the same executor; also if
  /// it was not started.
  virtual void stop() noexcept = 0;
};

/// A transport that the library does not bring along. Its calls may come from any thread, at the same time.
class CustomTransport {
 public:
  /// With an error, or with a connection. Any thread, once, also from inside `connect`.
  using Connected = std::function<void(Error error, std::unique_ptr<Connection> connection)>;

  CustomTransport() = default;
  virtual ~CustomTransport() = default;
  CustomTransport(const CustomTransport&) = delete;
  CustomTransport& operator=(const CustomTransport&) = delete;

  /// Begins to listen at `address`, what follows `scheme://`: clients may connect from now on, and are handed over once
  /// the listener is started. Null, and `error` names what and where, if that cannot be. `ListenOptions::backlog` is
  /// for it to keep; what the options say of sessions and deadlines is the library's.
  virtual std::unique_ptr<CustomListener> listen(std::string_view address, const ListenOptions& options,
                                                 Error& error) = 0;

  /// Begins to connect to `address`. What is returned is destroyed when the attempt is over, or given up (cancelled, or
  /// at its timeout): then `connected` may still be called, and what it is given is destroyed. On `executor`, on which
  /// the connection's session will be. May return null.
  virtual std::shared_ptr<void> connect(std::string_view address, const detail::asio::any_io_executor& executor,
                                        Connected connected) = 0;
};

/// Makes `scheme://address` a URL of that transport, and `custom(scheme, address)` an endpoint, for the rest of the
/// process. Any thread. A scheme is a lower-case letter, then lower-case letters, digits, `+`, `-` and `.`.
/// \throws Exception with `Errc::invalid_option` if it is none, or taken.
void register_transport(std::string_view scheme, std::shared_ptr<CustomTransport> transport);

}  // namespace msgtrans
