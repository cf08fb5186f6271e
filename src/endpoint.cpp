// SPDX-License-Identifier: Apache-2.0
#include "custom_transports.hpp"

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
    endpoint.path = path;
    return true;
  }
  return false;
}

/// `host`, `host:port`, either with a path behind it.
bool split_websocket(std::string_view text, Endpoint& endpoint, std::string& problem) {
  const auto slash = text.find_first_of("/?#");
  const std::string_view authority = text.substr(0, slash);
  const std::string_view path = slash == std::string_view::npos ? std::string_view() : text.substr(slash);
  const bool printable = std::ranges::all_of(path, [](char c) { return c > ' ' && c < 127; });
  if (!printable || path.find('#') != std::string_view::npos) {
    problem = "\"" + std::string(path) + "\" is no path";
    return false;
  }
  endpoint.path = path.starts_with('/') ? std::string(path) : "/" + std::string(path);
  const auto colon = authority.rfind(':');
  if (colon != std::string_view::npos && authority.find(']', colon) == std::string_view::npos) {
    return split(authority, endpoint, problem);
  }
  const char* const usual = endpoint.transport == Transport::websocket_tls ? ":443" : ":80";
  return split(std::string(authority) + usual, endpoint, problem);
}

bool check_name(std::string_view name, Endpoint& endpoint, std::string& problem) {
  if (name.empty()) {
    problem = "no name";
  } else if (!std::ranges::all_of(name, [](char c) { return c > ' ' && c < 127 && c != '#'; })) {
    problem = "\"" + std::string(name) + "\" is no name";
  } else {
    endpoint.path = name;
    return true;
  }
  return false;
}

bool parse(Transport transport, std::string_view text, Endpoint& endpoint, std::string& problem) {
  endpoint.transport = transport;
  if (transport == Transport::in_process) return check_name(text, endpoint, problem);
  if (transport == Transport::unix_socket) return check_path(text, endpoint, problem);
  if (!is_websocket(transport)) return split(text, endpoint, problem);
  if (text.find("://") == std::string_view::npos) return split_websocket(text, endpoint, problem);
  return split(text, endpoint, problem);  // which says what is wrong with it
}

std::string all_schemes() {
  std::string all;
  for (const Transport one : transports) {
    if (!all.empty()) all += one == transports.back() ? " and " : ", ";
    all += to_string(one);
  }
  return all;
}

Error invalid(std::string_view text, const std::string& problem) {
  return {Errc::invalid_address, "invalid address \"" + std::string(text) + "\": " + problem};
}

Endpoint parsed(Transport transport, std::string_view text) {
  Endpoint endpoint;
  std::string problem;
  if (!parse(transport, text, endpoint, problem)) throw Exception(invalid(text, problem));
  return endpoint;
}

}  // namespace

std::string_view to_string(Transport transport) noexcept {
  switch (transport) {
    case Transport::tcp: return "tcp";
    case Transport::tls: return "tls";
    case Transport::unix_socket: return "unix";
    case Transport::websocket: return "ws";
    case Transport::websocket_tls: return "wss";
    case Transport::in_process: return "inproc";
    case Transport::custom: return "custom";
  }
  return "?";
}

std::string Endpoint::to_string() const {
  if (transport == Transport::unix_socket || transport == Transport::in_process || transport == Transport::custom) {
    return path;
  }
  const bool ipv6 = host.find(':') != std::string::npos;
  const std::string behind = is_websocket(transport) && path != "/" ? path : std::string();
  return (ipv6 ? "[" + host + "]" : host) + ":" + std::to_string(port) + behind;
}

std::string Endpoint::url() const {
  return std::string(transport == Transport::custom ? scheme : msgtrans::to_string(transport)) + "://" + to_string();
}

std::ostream& operator<<(std::ostream& out, const Endpoint& endpoint) {
  return out << endpoint.to_string();
}

Endpoint tcp(std::string_view host_and_port) {
  return parsed(Transport::tcp, host_and_port);
}
Endpoint tls(std::string_view host_and_port) {
  return parsed(Transport::tls, host_and_port);
}
Endpoint websocket(std::string_view host_and_port) {
  return parsed(Transport::websocket, host_and_port);
}
Endpoint websocket_tls(std::string_view host_and_port) {
  return parsed(Transport::websocket_tls, host_and_port);
}
Endpoint unix_socket(std::string_view path) {
  return parsed(Transport::unix_socket, path);
}

Endpoint in_process(std::string_view name) {
  return parsed(Transport::in_process, name);
}

Endpoint custom(std::string_view scheme, std::string_view address) {
  const auto registered = detail::find_scheme(scheme);
  if (registered.empty()) {
    throw Exception(invalid(std::string(scheme) + "://" + std::string(address), "no such scheme is registered"));
  }
  return {.transport = Transport::custom, .path = std::string(address), .scheme = registered};
}

std::optional<Endpoint> parse_url(std::string_view url, Error& error) {
  const auto mark = url.find("://");
  const std::string_view scheme = mark == std::string_view::npos ? std::string_view() : url.substr(0, mark);
  const std::string_view rest = mark == std::string_view::npos ? std::string_view() : url.substr(mark + 3);
  std::string problem;
  if (scheme.empty()) {
    problem = "no scheme; write it as tcp://host:port";
  } else {
    const auto named = std::ranges::find(transports, scheme, [](Transport one) { return to_string(one); });
    Endpoint endpoint;
    if (const auto registered = detail::find_scheme(scheme); !registered.empty()) {
      return Endpoint{.transport = Transport::custom, .path = std::string(rest), .scheme = registered};
    }
    if (named == transports.end()) {
      problem = "unknown scheme \"" + std::string(scheme) + "\"; there are " + all_schemes();
    } else if (parse(*named, rest, endpoint, problem)) {
      return endpoint;
    }
  }
  error = invalid(url, problem);
  return std::nullopt;
}

}  // namespace msgtrans
