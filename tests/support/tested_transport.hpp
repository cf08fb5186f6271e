// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <atomic>
#include <cstdlib>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unistd.h>

namespace msgtrans::test {

/// What the tests that are about no transport in particular run over: as MSGTRANS_TEST_TRANSPORT says, TCP without it.
inline Transport tested_transport() {
  static const Transport transport = [] {
    const char* const name = std::getenv("MSGTRANS_TEST_TRANSPORT");
    if (name == nullptr) return Transport::tcp;
    for (const Transport one : {Transport::tcp, Transport::unix_socket}) {
      if (to_string(one) == name) return one;
    }
    throw std::runtime_error("MSGTRANS_TEST_TRANSPORT names no transport: " + std::string(name));
  }();
  return transport;
}

/// A name in the abstract namespace that nobody else uses.
inline std::string unused_name() {
  static std::atomic<unsigned> count{0};
  return "@msgtrans-test-" + std::to_string(::getpid()) + "-" + std::to_string(++count);
}

/// For listening, over that transport.
inline Endpoint any_endpoint() {
  if (tested_transport() == Transport::unix_socket) return unix_socket(unused_name());
  return {.transport = tested_transport(), .host = "127.0.0.1"};
}

}  // namespace msgtrans::test
