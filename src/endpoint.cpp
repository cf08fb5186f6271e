// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <charconv>
#include <msgtrans/transport/endpoint.hpp>
#include <ostream>
#include <sys/socket.h>
#include <sys/un.h>

namespace msgtrans {

namespace {

/// `host:port` or `[v6]:port`.
bool split(std::string_view text, Endpoint& endpoint, std::string& problem) {
  if (text.find("://") != std::string_view::npos) {
    problem = "a scheme does not belong here; write it as host:port";
    return false;
  }
  const auto colon = text.rfind(':');
  if (colon == std::string_view::npos) {
    problem = "no port";
    return false;
  }
  std::string_view host = text.substr(0, colon);
  const std::string_view port = text.substr(colon + 1);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
    if (!host.empty() && host.find(':') == std::string_view::npos) {
      problem = "brackets are for IPv6 addresses";
      return false;
    }
  } else if (host.find(':') != std::string_view::npos) {
    problem = "an IPv6 address needs brackets, as in [::1]:8001";
    return false;
  }
  if (host.empty()) {
    problem = "no host";
    return false;
  }
  const bool printable =
      std::ranges::all_of(host, [](char c) { return static_cast<unsigned char>(c) > ' ' && c != 127; });
  if (!printable || host.find_first_of("[]/?#@") != std::string_view::npos) {
    problem = "\"" + std::string(host) + "\" is no host";
    return false;
  }
  unsigned number = 0;
  const auto [end, failure] = std::from_chars(port.data(), port.data() + port.size(), number);
  if (failure != std::errc() || end != port.data() + port.size() || number > 65535) {
    problem = "\"" + std::string(port) + "\" is no port";
    return false;
  }
  endpoint.host = host;
  endpoint.port = static_cast<std::uint16_t>(number);
  return true;
}

bool check_path(std::string_view path, Endpoint& endpoint, std::string& problem) {
  constexpr std::size_t most = sizeof(sockaddr_un::sun_path) - 1;
  if (path.empty() || path == "@") {
    problem = "no path";
  } else if (path.size() > most) {
    problem =
        "it is " + std::to_string(path.size()) + " bytes long, and a socket's path at most " + std::to_string(most);
  } else if (path.find('\0') != std::string_view::npos) {
    problem = "it holds a zero byte";
  } else {
    endpoint.transport = Transport::unix_socket;
    endpoint.path = path;
    return true;
  }
  return false;
}

Error invalid(std::string_view text, const std::string& problem) {
  return {Errc::invalid_address, "invalid address \"" + std::string(text) + "\": " + problem};
}

}  // namespace

std::string_view to_string(Transport transport) noexcept {
  switch (transport) {
    case Transport::tcp: return "tcp";
    case Transport::unix_socket: return "unix";
  }
  return "?";
}

std::string Endpoint::to_string() const {
  if (transport == Transport::unix_socket) return path;
  const bool ipv6 = host.find(':') != std::string::npos;
  return (ipv6 ? "[" + host + "]" : host) + ":" + std::to_string(port);
}

std::string Endpoint::url() const {
  return std::string(msgtrans::to_string(transport)) + "://" + to_string();
}

std::ostream& operator<<(std::ostream& out, const Endpoint& endpoint) {
  return out << endpoint.to_string();
}

Endpoint tcp(std::string_view host_and_port) {
  Endpoint endpoint;
  std::string problem;
  if (!split(host_and_port, endpoint, problem)) throw Exception(invalid(host_and_port, problem));
  return endpoint;
}

Endpoint unix_socket(std::string_view path) {
  Endpoint endpoint;
  std::string problem;
  if (!check_path(path, endpoint, problem)) throw Exception(invalid(path, problem));
  return endpoint;
}

std::optional<Endpoint> parse_url(std::string_view url, Error& error) {
  const auto mark = url.find("://");
  const std::string_view scheme = mark == std::string_view::npos ? std::string_view() : url.substr(0, mark);
  const std::string_view rest = mark == std::string_view::npos ? std::string_view() : url.substr(mark + 3);
  std::string problem;
  Endpoint endpoint;
  if (scheme.empty()) {
    problem = "no scheme; write it as tcp://host:port";
  } else if (scheme == to_string(Transport::tcp)) {
    if (split(rest, endpoint, problem)) return endpoint;
  } else if (scheme == to_string(Transport::unix_socket)) {
    if (check_path(rest, endpoint, problem)) return endpoint;
  } else {
    problem = "unknown scheme \"" + std::string(scheme) + "\"; there are tcp and unix";
  }
  error = invalid(url, problem);
  return std::nullopt;
}

}  // namespace msgtrans
