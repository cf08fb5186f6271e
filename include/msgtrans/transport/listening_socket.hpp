// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <msgtrans/error.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <string>
#include <utility>
#include <vector>

namespace msgtrans {

/// A listening socket that comes from somebody else, or is on its way to him: from systemd, to a successor, or by way
/// of a Unix socket (`SCM_RIGHTS`). It owns the descriptor, a reference to the socket: another process may hold one
/// too, and what waits in the socket is lost only when nobody holds it any more. Not thread-safe.
class ListeningSocket {
 public:
  /// Takes the descriptor over; nothing is checked before a server adopts it. `name`: see `inherited_sockets`.
  explicit ListeningSocket(int descriptor, std::string name = {}) noexcept
      : descriptor_(descriptor), name_(std::move(name)) {}
  ListeningSocket(ListeningSocket&& other) noexcept
      : descriptor_(other.release()), name_(std::move(other.name_)), owns_file_(other.owns_file_) {}
  ListeningSocket& operator=(ListeningSocket&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    std::swap(name_, other.name_);
    std::swap(owns_file_, other.owns_file_);
    return *this;
  }
  ~ListeningSocket();

  /// -1: none any more, since a server has adopted it.
  [[nodiscard]] int descriptor() const noexcept { return descriptor_; }
  explicit operator bool() const noexcept { return descriptor_ >= 0; }
  /// The descriptor is the caller's from now on.
  int release() noexcept { return std::exchange(descriptor_, -1); }

  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  void set_name(std::string name) noexcept { name_ = std::move(name); }

  /// Of a Unix socket: whether the server that adopts it removes the file in the end. Not unless it is said: the file
  /// of a socket of systemd is systemd's. `listening_sockets` says it of files that the server made, or got so itself.
  [[nodiscard]] bool owns_file() const noexcept { return owns_file_; }
  void set_owns_file(bool owns) noexcept { owns_file_ = owns; }

  /// What it is bound to, as the system says: with `Transport::tcp` if it has a port, whatever is spoken there, or
  /// `Transport::unix_socket`. If it is neither, an error that says what it is.
  [[nodiscard]] Endpoint address(Error& error) const;

 private:
  int descriptor_;
  std::string name_;
  bool owns_file_ = false;
};

/// The sockets that this process was started with, in the way of systemd (`sd_listen_fds(3)`): descriptors from 3 on,
/// as many as `LISTEN_FDS` says, if `LISTEN_PID` is this process; their names from `LISTEN_FDNAMES` ("unknown" if it
/// does not say). Empty if they are for another process, or none were given. They are made close-on-exec, and the
/// variables are removed, so that no child takes them for its own and a second call gives nothing; to be called before
/// other threads use the environment. A `Successor` gets its sockets this way too.
/// \throws Exception: `invalid_option` if a variable makes no sense (the text shows it), or EBADF if a descriptor is
/// not open (the text says which); then descriptors and variables are left as they are.
[[nodiscard]] std::vector<ListeningSocket> inherited_sockets();
/// The same without exceptions; empty on failure.
[[nodiscard]] std::vector<ListeningSocket> inherited_sockets(Error& error);

}  // namespace msgtrans
