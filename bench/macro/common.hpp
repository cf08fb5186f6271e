// SPDX-License-Identifier: Apache-2.0
#pragma once

// What the rivals and the load generator share: the frame, sockets, the command line.
// None of it is the library's: the rivals must stay programs that know nothing of it.

#include <arpa/inet.h>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <map>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdexcept>
#include <string>
#include <string_view>
#include <sys/resource.h>
#include <sys/socket.h>
#include <system_error>
#include <unistd.h>

namespace bench {

inline constexpr std::size_t header_size = 16;
inline constexpr std::size_t largest_payload = std::size_t{16} << 20;

inline constexpr std::uint8_t type_one_way = 0;
inline constexpr std::uint8_t type_request = 1;
inline constexpr std::uint8_t type_response = 2;

/// A one-way packet of this biz_type with the payload `u32 count, u32 size` asks a server started with `--fanout` to
/// send `count` one-way packets of `size` payload bytes to every connection, the asking one too. It is not echoed.
inline constexpr std::uint8_t biz_fanout_trigger = 255;
/// The biz_type of the packets so sent, and the byte their payload is filled with.
inline constexpr std::uint8_t biz_fanout = 254;
inline constexpr std::uint8_t fanout_fill = 0xA5;
inline constexpr std::size_t fanout_trigger_payload = 8;

inline std::uint32_t load_u32(const std::uint8_t* from) noexcept {
  std::uint32_t value = 0;
  std::memcpy(&value, from, sizeof value);
  return __builtin_bswap32(value);
}

inline std::uint16_t load_u16(const std::uint8_t* from) noexcept {
  std::uint16_t value = 0;
  std::memcpy(&value, from, sizeof value);
  return __builtin_bswap16(value);
}

inline void store_u32(std::uint8_t* to, std::uint32_t value) noexcept {
  value = __builtin_bswap32(value);
  std::memcpy(to, &value, sizeof value);
}

/// Writes the 16 bytes of a header without extension, compression and flags.
inline void store_header(std::uint8_t* to, std::uint8_t type, std::uint8_t biz_type, std::uint32_t id,
                         std::uint32_t payload_size) noexcept {
  std::memset(to, 0, header_size);
  to[0] = 1;
  to[2] = type;
  to[3] = biz_type;
  store_u32(to + 4, id);
  store_u32(to + 10, payload_size);
}

/// Bytes of the whole frame whose 16 header bytes are given, or 0 where an echo server must refuse it: a wrong
/// version, compression or type, a fragment, a length over the limit, a response nobody asked for.
inline std::size_t frame_size(const std::uint8_t* header) noexcept {
  const std::size_t payload = load_u32(header + 10);
  const bool good = header[0] == 1 && header[1] <= 2 && header[2] <= type_request && (header[15] & 1) == 0 &&
                    payload <= largest_payload;
  return good ? header_size + load_u16(header + 8) + payload : 0;
}

/// Makes the answer of an echo server out of the frame it came in: a request becomes its response, a one-way packet
/// stays as it is.
inline void turn_around(std::uint8_t* header) noexcept {
  header[2] = static_cast<std::uint8_t>(header[2] << 1);
}

[[noreturn]] inline void fail_errno(const char* what) {
  throw std::system_error(errno, std::generic_category(), what);
}

/// The descriptor limit at its maximum; a program that cannot have `wanted` says so.
inline void raise_descriptor_limit(std::size_t wanted) {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) fail_errno("getrlimit");
  limit.rlim_cur = limit.rlim_max;
  if (setrlimit(RLIMIT_NOFILE, &limit) != 0) fail_errno("setrlimit");
  if (limit.rlim_cur < wanted) {
    throw std::runtime_error("at most " + std::to_string(limit.rlim_cur) + " descriptors allowed, " +
                             std::to_string(wanted) + " wanted (raise the hard limit of open files)");
  }
}

inline sockaddr_in loopback(std::uint32_t last_byte, std::uint16_t port) noexcept {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  address.sin_addr.s_addr = htonl(0x7F000000U + last_byte);
  return address;
}

/// `--name value` and `--flag` arguments; anything else is an error that names it.
class Arguments {
 public:
  Arguments(int argc, char** argv, std::initializer_list<std::string_view> with_value,
            std::initializer_list<std::string_view> flags) {
    for (int i = 1; i < argc; ++i) {
      const std::string_view argument = argv[i];
      bool known = false;
      for (const auto name : flags) {
        if (argument == name) {
          values_.insert_or_assign(std::string(name), std::string());
          known = true;
        }
      }
      for (const auto name : with_value) {
        if (argument == name) {
          if (i + 1 == argc) throw std::invalid_argument(std::string(name) + " wants a value");
          values_.insert_or_assign(std::string(name), std::string(argv[++i]));
          known = true;
        }
      }
      if (!known) throw std::invalid_argument("unknown argument '" + std::string(argument) + "'");
    }
  }

  [[nodiscard]] bool has(const std::string& name) const { return values_.contains(name); }

  [[nodiscard]] std::string text(const std::string& name, std::string otherwise) const {
    const auto found = values_.find(name);
    return found == values_.end() ? std::move(otherwise) : found->second;
  }

  template <typename T>
  [[nodiscard]] T number(const std::string& name, T otherwise, T least, T most) const {
    const auto found = values_.find(name);
    if (found == values_.end()) return otherwise;
    const std::string& value = found->second;
    T result{};
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
    if (error != std::errc{} || end != value.data() + value.size() || result < least || result > most) {
      throw std::invalid_argument(name + " wants a number from " + std::to_string(least) + " to " +
                                  std::to_string(most) + ", not '" + value + "'");
    }
    return result;
  }

 private:
  std::map<std::string, std::string> values_;
};

/// Tells the starter where to connect. The only line a server prints.
inline void announce(std::uint16_t port, const char* transport = "tcp") {
  std::printf("listening %s 127.0.0.1:%u\n", transport, static_cast<unsigned>(port));
  std::fflush(stdout);
}

/// Runs a program's main part and turns what it throws into a line on standard error: exit status 2 for bad arguments,
/// 1 for the rest.
template <typename Main>
int run_main(const char* name, Main&& main_part) {
  try {
    return main_part();
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return 1;
  }
}

}  // namespace bench
