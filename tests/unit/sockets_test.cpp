// SPDX-License-Identifier: Apache-2.0
#include "sockets.hpp"

#include <chrono>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

namespace msgtrans::detail {
namespace {

using namespace std::chrono_literals;

int option_of(const Descriptor& socket, int level, int name) {
  int value = -1;
  socklen_t size = sizeof value;
  EXPECT_EQ(::getsockopt(socket.get(), level, name, &value, &size), 0);
  return value;
}

Descriptor tcp_socket() {
  return Descriptor(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
}

TEST(PreparedSocket, HasWhatTheOptionsSay) {
  const Descriptor socket = tcp_socket();
  prepare(socket.get(), {.tcp_keep_alive = {.idle = 123s, .interval = 45s, .probes = 6}, .tcp_user_timeout = 78'900ms});
  EXPECT_EQ(option_of(socket, IPPROTO_TCP, TCP_NODELAY), 1);
  EXPECT_EQ(option_of(socket, SOL_SOCKET, SO_KEEPALIVE), 1);
  EXPECT_EQ(option_of(socket, IPPROTO_TCP, TCP_KEEPIDLE), 123);
  EXPECT_EQ(option_of(socket, IPPROTO_TCP, TCP_KEEPINTVL), 45);
  EXPECT_EQ(option_of(socket, IPPROTO_TCP, TCP_KEEPCNT), 6);
  EXPECT_EQ(option_of(socket, IPPROTO_TCP, TCP_USER_TIMEOUT), 78'900);
}

TEST(PreparedSocket, IsLeftAsTheSystemHasItWhereTheyAreOff) {
  const Descriptor socket = tcp_socket();
  const Descriptor untouched = tcp_socket();
  prepare(socket.get(), {.no_delay = false});
  EXPECT_EQ(option_of(socket, IPPROTO_TCP, TCP_NODELAY), 0);
  EXPECT_EQ(option_of(socket, SOL_SOCKET, SO_KEEPALIVE), 0);
  for (const int name : {TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_KEEPCNT, TCP_USER_TIMEOUT}) {
    EXPECT_EQ(option_of(socket, IPPROTO_TCP, name), option_of(untouched, IPPROTO_TCP, name));
  }
}

TEST(PreparedSocket, MayWaitAsLongAsOptionsAllow) {
  const Descriptor socket = tcp_socket();
  prepare(socket.get(), {.tcp_keep_alive = {.idle = 32'767s, .interval = 32'767s, .probes = 127},
                         .tcp_user_timeout = std::chrono::hours(24 * 365)});
  EXPECT_EQ(option_of(socket, IPPROTO_TCP, TCP_KEEPIDLE), 32'767);
  EXPECT_EQ(option_of(socket, IPPROTO_TCP, TCP_USER_TIMEOUT), 2'147'483'647);
}

}  // namespace
}  // namespace msgtrans::detail
