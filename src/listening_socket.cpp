// SPDX-License-Identifier: Apache-2.0
#include "handover.hpp"
#include "sockets.hpp"

#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <fcntl.h>
#include <msgtrans/transport/listening_socket.hpp>
#include <optional>
#include <string_view>
#include <unistd.h>

namespace msgtrans {

namespace {

constexpr int first_descriptor = 3;

template <class T>
std::optional<T> number(std::string_view text) {
  T value = 0;
  const auto [end, fault] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (fault != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::vector<std::string> split(std::string_view text, char at) {
  std::vector<std::string> parts;
  for (std::size_t end = 0; end != std::string_view::npos;) {
    end = text.find(at);
    parts.emplace_back(text.substr(0, end));
    if (end != std::string_view::npos) text.remove_prefix(end + 1);
  }
  return parts;
}

}  // namespace

ListeningSocket::~ListeningSocket() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

Endpoint ListeningSocket::address(Error& error) const {
  error = {};
  return detail::bound_address(descriptor_, error);
}

std::vector<ListeningSocket> inherited_sockets(Error& error) {
  error = {};
  const char* const process = std::getenv("LISTEN_PID");
  const char* const count_text = std::getenv("LISTEN_FDS");
  if (process == nullptr || count_text == nullptr) return {};
  const auto complain = [&error](const char* name, const char* value, const char* what) {
    error = Error(Errc::invalid_option, std::string(name) + " is \"" + value + "\", " + what);
    return std::vector<ListeningSocket>();
  };
  const auto for_whom = number<pid_t>(process);
  if (!for_whom) return complain("LISTEN_PID", process, "no process");
  if (*for_whom != ::getpid()) return {};
  const auto count = number<int>(count_text);
  constexpr int most = 65536;
  if (!count || *count < 0 || *count > most) return complain("LISTEN_FDS", count_text, "no number of descriptors");
  std::vector<std::string> names;
  if (const char* const text = std::getenv("LISTEN_FDNAMES")) {
    names = split(text, ':');
    if (names.size() != static_cast<std::size_t>(*count)) {
      return complain("LISTEN_FDNAMES", text, "not as many names as LISTEN_FDS says");
    }
  }
  for (int i = 0; i < *count; ++i) {
    const int descriptor = first_descriptor + i;
    if (::fcntl(descriptor, F_GETFD) >= 0) continue;
    const error_code code(errno, boost::system::system_category());
    error = Error(code,
                  "descriptor " + std::to_string(descriptor) + " of LISTEN_FDS=" + count_text + ": " + code.message());
    return {};
  }
  std::vector<ListeningSocket> sockets;
  sockets.reserve(static_cast<std::size_t>(*count));
  names.resize(static_cast<std::size_t>(*count), "unknown");
  const char* const files = std::getenv(detail::files_variable);
  const auto owned = files != nullptr ? split(files, ',') : std::vector<std::string>();
  for (int i = 0; i < *count; ++i) {
    const int descriptor = first_descriptor + i;
    ::fcntl(descriptor, F_SETFD, FD_CLOEXEC);
    auto& socket = sockets.emplace_back(descriptor, std::move(names[static_cast<std::size_t>(i)]));
    for (const auto& one : owned) {
      if (one == std::to_string(descriptor)) socket.set_owns_file(true);
    }
  }
  for (const char* variable :
       {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID", detail::files_variable}) {
    ::unsetenv(variable);
  }
  return sockets;
}

std::vector<ListeningSocket> inherited_sockets() {
  Error error;
  auto sockets = inherited_sockets(error);
  if (error) throw Exception(error);
  return sockets;
}

}  // namespace msgtrans
