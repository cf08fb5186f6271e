// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "pipe_transport.hpp"

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <msgtrans/server_transport.hpp>
#include <msgtrans/transport/certificate.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unistd.h>

namespace msgtrans::test {

/// What the tests that are about no transport in particular run over: as MSGTRANS_TEST_TRANSPORT says, TCP without it.
/// `custom`: the one of an example.
inline Transport tested_transport() {
  static const Transport transport = [] {
    const char* const name = std::getenv("MSGTRANS_TEST_TRANSPORT");
    if (name == nullptr) return Transport::tcp;
    if (name == to_string(Transport::custom)) {
      register_transport("pipe", std::make_shared<example::PipeTransport>());
      return Transport::custom;
    }
    for (const Transport one : transports) {
      if (to_string(one) == name) return one;
    }
    throw std::runtime_error("MSGTRANS_TEST_TRANSPORT names no transport: " + std::string(name));
  }();
  return transport;
}

/// A name that nobody else uses; of a Unix socket it is one in the abstract namespace.
inline std::string unused_name() {
  static std::atomic<unsigned> count{0};
  return "@msgtrans-test-" + std::to_string(::getpid()) + "-" + std::to_string(++count);
}

/// A certificate for 127.0.0.1, ::1 and localhost, from an authority that this process's clients trust.
inline const TlsIdentity& trusted_identity() {
  static const TlsIdentity identity = [] {
    const auto made = [](std::optional<CertificateAndKey> pair, const Error& error) {
      if (!pair) throw std::runtime_error("no certificate: " + error.message());
      return *std::move(pair);
    };
    Error error;
    const auto authority =
        made(make_certificate({.common_name = "The tests' authority", .authority = true}, error), error);
    const auto own =
        made(make_certificate({.common_name = "tests", .names = {"127.0.0.1", "::1", "localhost"}}, error, &authority),
             error);
    const auto file = std::filesystem::temp_directory_path() / ("msgtrans-test-" + std::to_string(::getpid()) + ".pem");
    static const struct Remover {
      std::filesystem::path path;
      ~Remover() { std::filesystem::remove(path); }
    } remover{file};
    std::ofstream(file) << authority.certificate_pem;
    ::setenv("SSL_CERT_FILE", file.c_str(), 1);
    return TlsIdentity{.certificate_pem = own.certificate_pem, .key_pem = own.key_pem};
  }();
  return identity;
}

/// For listening, over that transport.
inline Endpoint any_endpoint() {
  if (tested_transport() == Transport::unix_socket) return unix_socket(unused_name());
  if (tested_transport() == Transport::custom) return custom("pipe", unused_name());
  if (tested_transport() == Transport::in_process) return in_process(unused_name());
  return {.transport = tested_transport(), .host = "127.0.0.1", .path = is_websocket(tested_transport()) ? "/" : ""};
}

/// The same options, with what that transport needs.
inline ListenOptions any_listener(ListenOptions options = {}) {
  if (is_encrypted(tested_transport()) && options.tls.identity.empty()) options.tls.identity = trusted_identity();
  return options;
}

}  // namespace msgtrans::test
