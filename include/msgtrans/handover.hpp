// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/transport/listening_socket.hpp>
#include <string>
#include <sys/types.h>
#include <vector>

namespace msgtrans {

/// A process that is to take this one's place: a newer version of the program, or the same with another configuration.
///
///     auto successor = Successor::start(arguments, server.listening_sockets());
///     if (successor.wait_ready(30s, error)) {
///       server.release_listeners();                          // nothing more is accepted here
///       server.stop(DrainOptions{.within = 30s, .quiet = 1s});
///     }                                                      // else it was ended, and this process goes on
///
/// Meanwhile both accept, each connection once; nobody is refused. Movable, not thread-safe but for `give_up`.
class Successor {
 public:
  /// Starts `command`, a program (looked up in PATH unless there is a slash in it) and its arguments, in this process's
  /// directory and environment, and gives it the sockets in the way of `inherited_sockets`; for this process they are
  /// closed. \throws Exception: `invalid_option` if there is no command, no socket, or a name with a colon, or the
  /// system's error, which names the program if that cannot be started; then the sockets are closed as well.
  [[nodiscard]] static Successor start(const std::vector<std::string>& command, std::vector<ListeningSocket> sockets);

  Successor(Successor&&) noexcept;
  Successor& operator=(Successor&&) noexcept;
  /// Unless it is ready it is ended.
  ~Successor();

  [[nodiscard]] pid_t process() const noexcept;

  /// Blocks until the successor has called `announce_ready`. False, and it was ended (SIGKILL, if it was still there):
  /// it was not ready `within` that time (ETIMEDOUT), it ended before (`closed`), or `give_up` was called
  /// (`operation_aborted`). Not from a handler (`blocking_on_shard`; then it goes on).
  bool wait_ready(std::chrono::milliseconds within, Error& error);
  /// Ends the wait. Any thread, also before `wait_ready`.
  void give_up() noexcept;

 private:
  struct Core;
  explicit Successor(std::unique_ptr<Core> core) noexcept;

  std::unique_ptr<Core> core_;
};

/// Says that this process accepts connections: to its predecessor, if a `Successor` started it, and to systemd, if that
/// wants to know (`Type=notify`; with the number of this process, which may be a new one). To be called when all
/// listeners are there and the server is started. Once; without either it does nothing. Not thread-safe: it removes
/// what it was told from the environment.
void announce_ready() noexcept;

}  // namespace msgtrans
