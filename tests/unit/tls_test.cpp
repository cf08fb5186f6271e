// SPDX-License-Identifier: Apache-2.0
#include "tls.hpp"

#include "allocation_failure.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fcntl.h>
#include <filesystem>
#include <fstream>
#include <functional>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/transport/certificate.hpp>
#include <openssl/ssl.h>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <sys/socket.h>
#include <thread>
#include <tuple>
#include <unistd.h>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using msgtrans::CertificateAndKey;
using msgtrans::CertificateRequest;
using msgtrans::ClientCertificates;
using msgtrans::Connection;
using msgtrans::Errc;
using msgtrans::Error;
using msgtrans::make_certificate;
using msgtrans::TlsClientOptions;
using msgtrans::TlsIdentity;
using msgtrans::TlsPeer;
using msgtrans::TlsServerOptions;
using msgtrans::TlsVerification;
using msgtrans::TlsVersion;
using msgtrans::detail::TlsConnection;
using msgtrans::detail::TlsContext;
using Status = Connection::Status;

const auto not_enough_memory = make_error_code(boost::system::errc::not_enough_memory);

// --- certificates

CertificateAndKey certificate(const CertificateRequest& request, const CertificateAndKey* issuer = nullptr) {
  Error error;
  auto made = make_certificate(request, error, issuer);
  if (!made) throw msgtrans::Exception(error);
  return *made;
}

const CertificateAndKey& authority() {
  static const auto made = certificate({.common_name = "Test CA", .authority = true});
  return made;
}

const CertificateAndKey& other_authority() {
  static const auto made = certificate({.common_name = "Other CA", .authority = true});
  return made;
}

const CertificateAndKey& server_certificate() {
  static const auto made = certificate(
      {.common_name = "the server", .names = {"a.example", "*.b.example", "127.0.0.1", "::1"}}, &authority());
  return made;
}

const CertificateAndKey& client_certificate() {
  static const auto made = certificate({.common_name = "worker-7", .names = {"worker-7.example"}}, &authority());
  return made;
}

TlsIdentity identity(const CertificateAndKey& from) {
  return {.certificate_pem = from.certificate_pem, .key_pem = from.key_pem};
}

TlsServerOptions server_options() {
  return {.identity = identity(server_certificate())};
}

TlsServerOptions mutual(ClientCertificates what) {
  auto options = server_options();
  options.client_certificates = what;
  options.client_ca_pem = authority().certificate_pem;
  return options;
}

TlsClientOptions client_options() {
  return {.ca_pem = authority().certificate_pem};
}

std::shared_ptr<const TlsContext> server_context(const TlsServerOptions& options = server_options(),
                                                 std::string_view protocol = msgtrans::detail::tls_protocol) {
  Error error;
  auto context = TlsContext::server(options, error, protocol);
  if (!context) throw msgtrans::Exception(error);
  return context;
}

std::shared_ptr<const TlsContext> client_context(const TlsClientOptions& options = client_options(),
                                                 std::string_view protocol = msgtrans::detail::tls_protocol) {
  Error error;
  auto context = TlsContext::client(options, error, protocol);
  if (!context) throw msgtrans::Exception(error);
  return context;
}

// --- the two ends, on one thread

struct Sockets {
  explicit Sockets(int buffer = 0) {
    std::array<int, 2> ends;
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, ends.data()) != 0) throw std::bad_alloc();
    client = ends[0];
    server = ends[1];
    if (buffer != 0) {
      for (const int end : ends) {
        ::setsockopt(end, SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
        ::setsockopt(end, SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
      }
    }
  }
  Sockets(const Sockets&) = delete;
  Sockets& operator=(const Sockets&) = delete;
  ~Sockets() {
    close(client);
    close(server);
  }
  static void close(int& end) {
    if (end >= 0) ::close(std::exchange(end, -1));
  }

  int client = -1;
  int server = -1;
};

iovec piece(std::span<const std::byte> bytes) {
  return {const_cast<std::byte*>(bytes.data()), bytes.size()};
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

class Ends {
 public:
  Ends(std::shared_ptr<const TlsContext> server_context, std::shared_ptr<const TlsContext> client_context,
       std::string_view host = "a.example", int buffer = 0)
      : sockets(buffer),
        server(sockets.server, std::move(server_context)),
        client(sockets.client, std::move(client_context), host) {}

  /// Until both are done or failed. After that each reads once, as the end of one may only then be known to the other.
  bool handshake() {
    auto at_server = Status::blocked;
    auto at_client = Status::blocked;
    const auto step = [](TlsConnection& end, Status& status) {
      if (status == Status::blocked)
        status = end.handshake();
      else if (status == Status::done && end.wants_write())
        static_cast<void>(end.flush());
    };
    for (int turn = 0; turn < 100'000; ++turn) {
      step(client, at_client);
      step(server, at_server);
      if (at_client != Status::blocked && at_server != Status::blocked) break;
      if (at_client == Status::failed || at_server == Status::failed) {
        step(client, at_client);
        step(server, at_server);
        break;
      }
    }
    if (at_client == Status::failed) client_error = client.error();
    if (at_server == Status::failed) server_error = server.error();
    if (at_client == Status::done && at_server == Status::failed) {
      std::array<std::byte, 16> buffer;
      std::size_t count = 0;
      if (client.read(buffer, count) == Status::failed) client_error = client.error();
    }
    return at_client == Status::done && at_server == Status::done;
  }

  Sockets sockets;
  TlsConnection server;
  TlsConnection client;
  Error server_error;
  Error client_error;
};

Status write(TlsConnection& end, std::string_view text) {
  const std::array pieces{piece(bytes_of(text))};
  std::size_t taken = 0;
  const Status status = end.write(pieces, taken);
  if (status != Status::failed) {
    EXPECT_EQ(taken, text.size());
  }
  return status;
}

/// All that there is now.
std::string read_all(TlsConnection& end, Status& last) {
  std::string text;
  std::array<std::byte, 70'000> buffer;
  while (true) {
    std::size_t count = 0;
    last = end.read(buffer, count);
    if (last != Status::done) return text;
    text.append(reinterpret_cast<const char*>(buffer.data()), count);
  }
}

std::string read_all(TlsConnection& end) {
  Status last;
  auto text = read_all(end, last);
  EXPECT_EQ(last, Status::blocked) << end.error().message();
  return text;
}

#define EXPECT_HAS(text, part) \
  EXPECT_NE(std::string(text).find(part), std::string::npos) << "in \"" << (text) << "\": " << (part)

/// What each end is told of a handshake that does not come about.
void expect_refused(Ends& ends, std::string_view at_server, std::string_view at_client) {
  EXPECT_FALSE(ends.handshake());
  EXPECT_EQ(ends.server_error.code, Errc::handshake_failed) << ends.server_error.message();
  EXPECT_EQ(ends.client_error.code, Errc::handshake_failed) << ends.client_error.message();
  EXPECT_HAS(ends.server_error.text, "TLS handshake: ");
  EXPECT_HAS(ends.client_error.text, "TLS handshake: ");
  EXPECT_HAS(ends.server_error.text, at_server);
  EXPECT_HAS(ends.client_error.text, at_client);
}

struct Directory {
  Directory() {
    std::string name = (std::filesystem::temp_directory_path() / "msgtrans-tls-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::bad_alloc();
    path = name;
  }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;
  ~Directory() { std::filesystem::remove_all(path); }
  std::string put(const std::string& name, const std::string& text) const {
    std::ofstream(path / name) << text;
    return (path / name).string();
  }
  std::filesystem::path path;
};

/// A certificate's PEM as another's bytes, broken in the middle.
std::string broken(std::string pem) {
  pem.replace(pem.size() / 2, 8, "????????");
  return pem;
}

// --- of both versions

class TlsOfEachVersion : public testing::TestWithParam<TlsVersion> {
 protected:
  static TlsServerOptions server(TlsServerOptions options = server_options()) {
    options.max_version = GetParam();
    return options;
  }
  static TlsClientOptions client(TlsClientOptions options = client_options()) {
    options.max_version = GetParam();
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(Tls, TlsOfEachVersion, testing::Values(TlsVersion::tls1_2, TlsVersion::tls1_3),
                         [](const auto& tested) { return tested.param == TlsVersion::tls1_2 ? "Tls12" : "Tls13"; });

TEST_P(TlsOfEachVersion, CarriesBytesBothWays) {
  Ends ends(server_context(server()), client_context(client()));
  ASSERT_TRUE(ends.handshake()) << ends.server_error.message() << ends.client_error.message();
  EXPECT_EQ(write(ends.client, "question"), Status::done);
  EXPECT_EQ(read_all(ends.server), "question");
  EXPECT_EQ(write(ends.server, "answer"), Status::done);
  EXPECT_EQ(read_all(ends.client), "answer");
  EXPECT_FALSE(ends.client.wants_write());
  EXPECT_FALSE(ends.client.has_input());
  EXPECT_FALSE(ends.client.awaits_peers_end());
}

TEST_P(TlsOfEachVersion, NamesVersionCipherProtocolAndPeer) {
  Ends ends(server_context(server()), client_context(client()));
  EXPECT_FALSE(ends.client.tls_peer());
  ASSERT_TRUE(ends.handshake());
  const auto of_client = ends.server.tls_peer();
  const auto of_server = ends.client.tls_peer();
  ASSERT_TRUE(of_client && of_server);
  EXPECT_EQ(of_server->version, GetParam());
  EXPECT_EQ(of_client->version, GetParam());
  EXPECT_EQ(of_server->cipher, of_client->cipher);
  EXPECT_HAS(of_server->cipher, "AES");
  EXPECT_EQ(of_server->alpn, "msgtrans/1");
  EXPECT_EQ(of_client->alpn, "msgtrans/1");
  EXPECT_EQ(of_server->subject, "CN=the server");
  EXPECT_EQ(of_server->common_name, "the server");
  EXPECT_EQ(of_server->names, (std::vector<std::string>{"a.example", "*.b.example", "127.0.0.1", "::1"}));
  EXPECT_TRUE(of_server->verified);
  EXPECT_FALSE(of_server->resumed);
  EXPECT_EQ(of_client->subject, "");
  EXPECT_FALSE(of_client->verified);
}

TEST_P(TlsOfEachVersion, AClientsCertificateIsSeenByTheServer) {
  auto options = client();
  options.identity = identity(client_certificate());
  Ends ends(server_context(server(mutual(ClientCertificates::required))), client_context(options));
  ASSERT_TRUE(ends.handshake()) << ends.server_error.message() << ends.client_error.message();
  const auto peer = ends.server.tls_peer();
  ASSERT_TRUE(peer);
  EXPECT_EQ(peer->subject, "CN=worker-7");
  EXPECT_EQ(peer->common_name, "worker-7");
  EXPECT_EQ(peer->names, std::vector<std::string>{"worker-7.example"});
  EXPECT_TRUE(peer->verified);
}

TEST_P(TlsOfEachVersion, AMissingClientCertificateIsRefused) {
  Ends ends(server_context(server(mutual(ClientCertificates::required))), client_context(client()));
  expect_refused(ends, "the client has no certificate, and one is required",
                 "it asked for a certificate, and this end has none");
}

TEST_P(TlsOfEachVersion, AnOptionalClientCertificateMayBeMissing) {
  Ends ends(server_context(server(mutual(ClientCertificates::optional))), client_context(client()));
  ASSERT_TRUE(ends.handshake()) << ends.server_error.message() << ends.client_error.message();
  EXPECT_FALSE(ends.server.tls_peer()->verified);
}

TEST_P(TlsOfEachVersion, AnOptionalClientCertificateOfAnUnknownAuthorityIsRefused) {
  auto options = client();
  options.identity = identity(certificate({.common_name = "intruder"}, &other_authority()));
  Ends ends(server_context(server(mutual(ClientCertificates::optional))), client_context(options));
  expect_refused(ends, "unknown authority: the client's certificate is issued by CN=Other CA", "unknown CA");
}

TEST_P(TlsOfEachVersion, AnExpiredClientCertificateIsRefused) {
  const auto now = std::chrono::system_clock::now();
  auto options = client();
  options.identity =
      identity(certificate({.common_name = "late", .from = now - 48h, .until = now - 24h}, &authority()));
  Ends ends(server_context(server(mutual(ClientCertificates::required))), client_context(options));
  expect_refused(ends, "certificate has expired: CN=late", "certificate expired");
}

TEST_P(TlsOfEachVersion, ACertificateForAnotherHostIsRefused) {
  Ends ends(server_context(server()), client_context(client()), "wrong.example");
  expect_refused(ends, "the peer gave up: bad certificate",
                 "host name mismatch: the certificate is for a.example, *.b.example, 127.0.0.1, ::1, not for "
                 "wrong.example");
}

TEST_P(TlsOfEachVersion, AnExpiredCertificateIsRefused) {
  const auto now = std::chrono::system_clock::now();
  const auto expired =
      certificate({.common_name = "old", .names = {"a.example"}, .from = now - 48h, .until = now - 24h}, &authority());
  Ends ends(server_context(server({.identity = identity(expired)})), client_context(client()));
  expect_refused(ends, "the peer gave up: certificate expired", "certificate has expired: CN=old, on 20");
}

TEST_P(TlsOfEachVersion, ACertificateThatIsNotYetValidIsRefused) {
  const auto now = std::chrono::system_clock::now();
  const auto early =
      certificate({.common_name = "new", .names = {"a.example"}, .from = now + 24h, .until = now + 48h}, &authority());
  Ends ends(server_context(server({.identity = identity(early)})), client_context(client()));
  expect_refused(ends, "bad certificate", "certificate is not yet valid: CN=new, only from 20");
}

TEST_P(TlsOfEachVersion, ACertificateOfAnUnknownAuthorityIsRefused) {
  Ends ends(server_context(server()), client_context(client({.ca_pem = other_authority().certificate_pem})));
  expect_refused(ends, "the peer gave up: unknown CA",
                 "unknown authority: the server's certificate is issued by CN=Test CA");
}

TEST_P(TlsOfEachVersion, AServersCertificateForNoServerIsRefused) {
  // An authority's own is not for servers.
  Ends ends(server_context(server({.identity = identity(authority())})), client_context(client()));
  EXPECT_FALSE(ends.handshake());
  EXPECT_EQ(ends.client_error.code, Errc::handshake_failed);
}

TEST_P(TlsOfEachVersion, TheSystemsAuthoritiesDoNotKnowAnOwnOne) {
  Ends ends(server_context(server()), client_context(client({})));
  expect_refused(ends, "unknown CA", "unknown authority");
}

TEST_P(TlsOfEachVersion, DangerAcceptsAnyCertificateAndSaysSo) {
  Ends ends(server_context(server()),
            client_context(client({.verify = TlsVerification::danger_accept_any_certificate()})), "wrong.example");
  ASSERT_TRUE(ends.handshake()) << ends.client_error.message();
  EXPECT_FALSE(ends.client.tls_peer()->verified);
  EXPECT_EQ(ends.client.tls_peer()->subject, "CN=the server");
  auto options = client();
  options.verify = TlsVerification::danger_accept_any_certificate();
  Ends by_chance(server_context(server()), client_context(options));
  ASSERT_TRUE(by_chance.handshake());
  EXPECT_FALSE(by_chance.client.tls_peer()->verified);
}

TEST_P(TlsOfEachVersion, ASessionIsResumed) {
  const auto at_server = server_context(server(mutual(ClientCertificates::optional)));
  auto options = client();
  options.identity = identity(client_certificate());
  const auto at_client = client_context(options);
  for (int i = 0; i < 4; ++i) {
    Ends ends(at_server, at_client);
    ASSERT_TRUE(ends.handshake()) << ends.server_error.message() << ends.client_error.message();
    EXPECT_EQ(ends.client.tls_peer()->resumed, i != 0) << i;
    EXPECT_EQ(ends.server.tls_peer()->resumed, i != 0) << i;
    EXPECT_TRUE(ends.client.tls_peer()->verified);
    EXPECT_TRUE(ends.server.tls_peer()->verified);
    EXPECT_EQ(ends.server.tls_peer()->subject, "CN=worker-7");
    EXPECT_EQ(ends.client.tls_peer()->subject, "CN=the server");
    EXPECT_EQ(ends.client.tls_peer()->alpn, "msgtrans/1");
    write(ends.server, "with this comes the ticket");
    EXPECT_EQ(read_all(ends.client), "with this comes the ticket");
    // cut without a word
  }
}

TEST_P(TlsOfEachVersion, ASessionWhoseHandshakeFailedIsNotTriedAgain) {
  const auto at_server = server_context(server());
  const auto at_client = client_context(client());
  // At once, so that none resumes another's.
  std::vector<std::unique_ptr<Ends>> connections(6);
  for (auto& ends : connections) ends = std::make_unique<Ends>(at_server, at_client);
  for (auto& ends : connections) {
    ASSERT_TRUE(ends->handshake());
    write(ends->server, "ticket");
    read_all(ends->client);
  }
  // each takes one of those that are kept
  for (int i = 0; i < 4; ++i) {
    Sockets sockets;
    TlsConnection cut(sockets.client, at_client, "a.example");
    EXPECT_EQ(cut.handshake(), Status::blocked);
  }
  Ends next(at_server, at_client);
  ASSERT_TRUE(next.handshake());
  EXPECT_FALSE(next.client.tls_peer()->resumed);
}

TEST_P(TlsOfEachVersion, AContextServesThreadsAtOnce) {
  const auto at_server = server_context(server());
  const auto at_client = client_context(client());
  std::atomic<int> resumed{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 25; ++round) {
        Ends ends(at_server, at_client);
        ASSERT_TRUE(ends.handshake()) << ends.server_error.message() << ends.client_error.message();
        if (ends.client.tls_peer()->resumed) ++resumed;
        write(ends.server, "ticket");
        EXPECT_EQ(read_all(ends.client), "ticket");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(resumed, 0);
}

TEST_P(TlsOfEachVersion, OnlyTheNewestSessionsAreKept) {
  const auto at_server = server_context(server());
  const auto at_client = client_context(client());
  for (int i = 0; i < 300; ++i) {
    Ends ends(at_server, at_client, std::to_string(i) + ".b.example");
    ASSERT_TRUE(ends.handshake());
    write(ends.server, "ticket");
    read_all(ends.client);
  }
  Ends oldest(at_server, at_client, "0.b.example");
  ASSERT_TRUE(oldest.handshake());
  EXPECT_FALSE(oldest.client.tls_peer()->resumed);
  Ends newest(at_server, at_client, "299.b.example");
  ASSERT_TRUE(newest.handshake());
  EXPECT_TRUE(newest.client.tls_peer()->resumed);
}

TEST_P(TlsOfEachVersion, ASessionIsNotResumedWithAnotherHost) {
  const auto at_server = server_context(server());
  const auto at_client = client_context(client());
  for (const char* const host : {"a.example", "x.b.example", "127.0.0.1"}) {
    Ends ends(at_server, at_client, host);
    ASSERT_TRUE(ends.handshake()) << host << ends.client_error.message();
    EXPECT_FALSE(ends.client.tls_peer()->resumed) << host;
    write(ends.server, "ticket");
    read_all(ends.client);
  }
  Ends wrong(at_server, at_client, "wrong.example");
  EXPECT_FALSE(wrong.handshake());
}

TEST_P(TlsOfEachVersion, ANewCertificateServesNewConnectionsAndOldOnesGoOn) {
  const auto at_client = client_context(client());
  Ends before(server_context(server()), at_client);
  ASSERT_TRUE(before.handshake());
  write(before.server, "ticket");
  read_all(before.client);
  const auto renewed = certificate({.common_name = "renewed", .names = {"a.example"}}, &authority());
  Ends after(server_context(server({.identity = identity(renewed)})), at_client);
  ASSERT_TRUE(after.handshake()) << after.server_error.message() << after.client_error.message();
  EXPECT_EQ(after.client.tls_peer()->common_name, "renewed");
  EXPECT_FALSE(after.client.tls_peer()->resumed);
  EXPECT_EQ(write(before.client, "still here"), Status::done);
  EXPECT_EQ(read_all(before.server), "still here");
}

TEST_P(TlsOfEachVersion, AnEndInOrderIsToldAfterTheBytesBeforeIt) {
  Ends ends(server_context(server()), client_context(client()));
  ASSERT_TRUE(ends.handshake());
  write(ends.server, "last words");
  EXPECT_EQ(ends.server.shut_down({}), Status::done);
  EXPECT_EQ(ends.server.shut_down({}), Status::done);
  std::array<std::byte, 100> buffer;
  std::size_t count = 0;
  EXPECT_EQ(ends.client.read(buffer, count), Status::done);
  EXPECT_EQ(count, 10U);
  EXPECT_TRUE(ends.client.has_input()) << "the end is to be read";
  EXPECT_EQ(ends.client.read(buffer, count), Status::ended);
  EXPECT_FALSE(ends.client.has_input());
  // The other direction is open still.
  EXPECT_EQ(write(ends.client, "and mine"), Status::done);
  EXPECT_EQ(ends.client.shut_down({}), Status::done);
  Status last;
  EXPECT_EQ(read_all(ends.server, last), "and mine");
  EXPECT_EQ(last, Status::ended);
}

TEST_P(TlsOfEachVersion, AnEndOfTheConnectionAloneIsATruncation) {
  Ends ends(server_context(server()), client_context(client()));
  ASSERT_TRUE(ends.handshake());
  write(ends.client, "whole");
  ::shutdown(ends.sockets.client, SHUT_WR);
  Status last;
  EXPECT_EQ(read_all(ends.server, last), "whole");
  EXPECT_EQ(last, Status::failed);
  EXPECT_EQ(ends.server.error().code, Errc::truncated);
  EXPECT_HAS(ends.server.error().text, "bytes may be missing");
  // And so it is for the client.
  Ends others(server_context(server()), client_context(client()));
  ASSERT_TRUE(others.handshake());
  read_all(others.client);
  Sockets::close(others.sockets.server);
  read_all(others.client, last);
  EXPECT_EQ(last, Status::failed);
  EXPECT_EQ(others.client.error().code, Errc::truncated) << others.client.error().message();
}

TEST_P(TlsOfEachVersion, ARecordCutInTheMiddleIsATruncation) {
  Ends ends(server_context(server()), client_context(client()));
  ASSERT_TRUE(ends.handshake());
  Status last;
  read_all(ends.client, last);
  write(ends.server, "abcdefgh");
  std::array<char, 100> record;
  const ssize_t size = ::recv(ends.sockets.client, record.data(), record.size(), 0);
  ASSERT_GT(size, 10);
  ASSERT_EQ(::send(ends.sockets.server, record.data(), static_cast<std::size_t>(size) - 4, 0), size - 4);
  std::array<std::byte, 100> buffer;
  std::size_t count = 0;
  EXPECT_EQ(ends.client.read(buffer, count), Status::blocked);
  EXPECT_FALSE(ends.client.has_input());
  Sockets::close(ends.sockets.server);
  EXPECT_EQ(ends.client.read(buffer, count), Status::failed);
  EXPECT_EQ(ends.client.error().code, Errc::truncated);
}

TEST_P(TlsOfEachVersion, ARecordThatWasChangedOnTheWayIsRefused) {
  Ends ends(server_context(server()), client_context(client()));
  ASSERT_TRUE(ends.handshake());
  read_all(ends.client);
  write(ends.server, "abcdefgh");
  std::array<char, 100> record;
  const ssize_t size = ::recv(ends.sockets.client, record.data(), record.size(), 0);
  ASSERT_GT(size, 10);
  record[static_cast<std::size_t>(size) - 1] ^= 1;
  ASSERT_EQ(::send(ends.sockets.server, record.data(), static_cast<std::size_t>(size), 0), size);
  std::array<std::byte, 100> buffer;
  std::size_t count = 0;
  EXPECT_EQ(ends.client.read(buffer, count), Status::failed);
  EXPECT_FALSE(ends.client.error().code == Errc::truncated);
  EXPECT_HAS(ends.client.error().text, "bad record mac");
  EXPECT_EQ(ends.server.read(buffer, count), Status::failed);
  EXPECT_HAS(ends.server.error().text, "the peer gave up: bad record mac (alert 20)");
}

TEST_P(TlsOfEachVersion, HandshakesAndCarriesThroughTinyBuffers) {
  // Both send at once, more than the sockets hold, in pieces of all sizes.
  Ends ends(server_context(server()), client_context(client()), "a.example", 4096);
  ASSERT_TRUE(ends.handshake()) << ends.server_error.message() << ends.client_error.message();
  constexpr std::size_t total = 3'000'000;
  struct Side {
    TlsConnection* end;
    std::vector<std::byte> out;
    std::vector<std::byte> in;
    std::size_t written = 0;
    bool blocked = false;
  };
  std::mt19937 random(7);
  std::array<Side, 2> sides{Side{&ends.client, {}, {}}, Side{&ends.server, {}, {}}};
  for (Side& side : sides) {
    side.out.resize(total);
    for (std::byte& byte : side.out) byte = static_cast<std::byte>(random());
  }
  bool blocked = false;
  for (int turn = 0; turn < 1'000'000; ++turn) {
    for (Side& side : sides) {
      if (side.written < total) {
        std::vector<iovec> pieces;
        std::size_t offered = 0;
        const std::size_t count = 1 + random() % 20;
        for (std::size_t i = 0; i < count; ++i) {
          constexpr std::array<std::size_t, 6> sizes{0, 16, 300, 5000, 16384, 70'000};
          const std::size_t size = std::min(sizes[random() % sizes.size()], total - side.written - offered);
          pieces.push_back(piece(std::span(side.out).subspan(side.written + offered, size)));
          offered += size;
        }
        std::size_t taken = 0;
        const Status status = side.end->write(pieces, taken);
        ASSERT_NE(status, Status::failed) << side.end->error().message();
        ASSERT_LE(taken, offered);
        if (status == Status::done) {
          ASSERT_EQ(taken, offered);
          ASSERT_FALSE(side.end->wants_write());
        } else {
          ASSERT_TRUE(side.end->wants_write());
          blocked = true;
        }
        side.written += taken;
      } else if (side.end->wants_write()) {
        ASSERT_NE(side.end->flush(), Status::failed);
      }
      std::array<std::byte, 9000> buffer;
      std::size_t count = 0;
      const auto room = std::span(buffer).first(1 + random() % buffer.size());
      const Status status = side.end->read(room, count);
      ASSERT_NE(status, Status::failed) << side.end->error().message();
      ASSERT_EQ(status == Status::done, count != 0);
      side.in.insert(side.in.end(), buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(count));
    }
    if (sides[0].in.size() == total && sides[1].in.size() == total) break;
  }
  EXPECT_TRUE(blocked);
  EXPECT_TRUE(sides[0].in == sides[1].out);
  EXPECT_TRUE(sides[1].in == sides[0].out);
}

TEST_P(TlsOfEachVersion, WhatIsPendingGoesBeforeTheEnd) {
  Ends ends(server_context(server()), client_context(client()), "a.example", 4096);
  ASSERT_TRUE(ends.handshake());
  read_all(ends.client);
  const std::string text(200'000, 'x');
  const std::array pieces{piece(bytes_of(text))};
  std::size_t taken = 0;
  ASSERT_EQ(ends.server.write(pieces, taken), Status::blocked);
  ASSERT_GT(taken, 16'384U);
  ASSERT_EQ(ends.server.shut_down({}), Status::blocked);
  std::string got;
  Status at_server = Status::blocked;
  Status at_client = Status::blocked;
  for (int turn = 0; turn < 10'000 && at_client == Status::blocked; ++turn) {
    got += read_all(ends.client, at_client);
    if (at_server == Status::blocked) at_server = ends.server.shut_down({});
  }
  EXPECT_EQ(at_server, Status::done);
  EXPECT_EQ(at_client, Status::ended);
  EXPECT_EQ(got.size(), taken);
}

TEST_P(TlsOfEachVersion, TakesABoundedAmountAheadOfTheSocket) {
  Ends ends(server_context(server()), client_context(client()), "a.example", 4096);
  ASSERT_TRUE(ends.handshake());
  const std::string text(4'000'000, 'x');
  const std::array pieces{piece(bytes_of(text))};
  std::size_t all = 0;
  for (int i = 0; i < 100; ++i) {
    std::size_t taken = 0;
    ASSERT_EQ(ends.server.write(pieces, taken), Status::blocked);
    all += taken;
  }
  EXPECT_LE(all, 512U * 1024);
}

TEST_P(TlsOfEachVersion, SmallPiecesShareARecord) {
  Ends ends(server_context(server()), client_context(client()));
  ASSERT_TRUE(ends.handshake());
  read_all(ends.client);
  const std::string text(1000, 'x');
  std::vector<iovec> pieces;
  for (std::size_t i = 0; i < 100; ++i) pieces.push_back(piece(bytes_of(text).subspan(i * 10, 10)));
  std::size_t taken = 0;
  ASSERT_EQ(ends.server.write(pieces, taken), Status::done);
  EXPECT_EQ(taken, 1000U);
  std::array<char, 4000> record;
  const ssize_t size = ::recv(ends.sockets.client, record.data(), record.size(), 0);
  EXPECT_GT(size, 1000);
  EXPECT_LT(size, 1040);
}

TEST_P(TlsOfEachVersion, HasInputWhileDecryptedBytesWait) {
  Ends ends(server_context(server()), client_context(client()));
  ASSERT_TRUE(ends.handshake());
  write(ends.server, "abcdefgh");
  write(ends.server, "ijkl");
  std::string text;
  std::array<std::byte, 3> buffer;
  std::size_t count = 0;
  ASSERT_EQ(ends.client.read(buffer, count), Status::done);
  for (std::size_t got = count; got < 12; got += count) {
    ASSERT_TRUE(ends.client.has_input()) << got;
    ASSERT_EQ(ends.client.read(buffer, count), Status::done);
  }
  EXPECT_EQ(ends.client.read(buffer, count), Status::blocked);
  EXPECT_FALSE(ends.client.has_input());
}

TEST_P(TlsOfEachVersion, BytesBehindTheHandshakeAreInput) {
  Ends ends(server_context(server()), client_context(client()));
  auto at_client = Status::blocked;
  auto at_server = Status::blocked;
  for (int turn = 0; turn < 10 && at_client == Status::blocked; ++turn) {
    at_client = ends.client.handshake();
    if (at_client == Status::blocked) at_server = ends.server.handshake();
  }
  ASSERT_EQ(at_client, Status::done);
  write(ends.client, "at once");
  if (at_server == Status::blocked) {
    ASSERT_EQ(ends.server.handshake(), Status::done);
    EXPECT_TRUE(ends.server.has_input());
  }
  EXPECT_EQ(read_all(ends.server), "at once");
}

TEST_P(TlsOfEachVersion, APeerThatOffersOtherProtocolsOnlyIsRefused) {
  Ends ends(server_context(server()), client_context(client(), "http/1.1"));
  expect_refused(ends, "other protocols only", "no application protocol (alert 120)");
}

TEST_P(TlsOfEachVersion, AnEndDuringTheHandshakeIsTold) {
  Ends ends(server_context(server()), client_context(client()));
  EXPECT_EQ(ends.server.handshake(), Status::blocked);
  EXPECT_EQ(ends.client.handshake(), Status::blocked);
  EXPECT_EQ(ends.server.handshake(), Status::blocked);
  ::shutdown(ends.sockets.client, SHUT_WR);
  EXPECT_EQ(ends.server.handshake(), Status::failed);
  EXPECT_EQ(ends.server.error().text, "TLS handshake: the peer closed the connection");
  EXPECT_EQ(ends.server.error().code, Errc::handshake_failed);
  Ends others(server_context(server()), client_context(client()));
  EXPECT_EQ(others.client.handshake(), Status::blocked);
  ::shutdown(others.sockets.server, SHUT_WR);
  EXPECT_EQ(others.client.handshake(), Status::failed);
  EXPECT_EQ(others.client.error().text, "TLS handshake: the peer closed the connection; perhaps it does not speak TLS");
}

TEST_P(TlsOfEachVersion, AResetDuringTheHandshakeIsTold) {
  Ends ends(server_context(server()), client_context(client()));
  EXPECT_EQ(ends.client.handshake(), Status::blocked);
  Sockets::close(ends.sockets.server);  // with what it has not read
  EXPECT_EQ(ends.client.handshake(), Status::failed);
  EXPECT_EQ(ends.client.error().code, boost::system::errc::connection_reset);
  EXPECT_EQ(ends.client.error().text, "TLS handshake: read: Connection reset by peer; perhaps it does not speak TLS");
}

TEST_P(TlsOfEachVersion, AClosedSocketIsTheSystemsErrorAndNoSignal) {
  Ends ends(server_context(server()), client_context(client()));
  ASSERT_TRUE(ends.handshake());
  Sockets::close(ends.sockets.client);
  std::size_t taken = 0;
  const std::array pieces{piece(bytes_of("lost"))};
  EXPECT_EQ(ends.server.write(pieces, taken), Status::failed);
  EXPECT_EQ(taken, 0U);
  EXPECT_EQ(ends.server.error().code, boost::system::errc::broken_pipe);
  EXPECT_HAS(ends.server.error().text, "TLS: write: Broken pipe");
}

TEST_P(TlsOfEachVersion, TheCauseIsToldToAWriterWhosePeerGaveUp) {
  Ends ends(server_context(server()), client_context(client()));
  ASSERT_TRUE(ends.handshake());
  read_all(ends.client);
  ASSERT_EQ(::send(ends.sockets.server, "\x17\x03\x03\x00\x10 0123456789abcde", 21, 0), 21);
  std::array<std::byte, 10> buffer;
  std::size_t count = 0;
  ASSERT_EQ(ends.client.read(buffer, count), Status::failed);
  Sockets::close(ends.sockets.client);
  std::size_t taken = 0;
  const std::array pieces{piece(bytes_of("lost"))};
  EXPECT_EQ(ends.server.write(pieces, taken), Status::failed);
  EXPECT_HAS(ends.server.error().text, "the peer gave up: ");
}

// --- versions

TEST(Tls, TheNewestVersionIsTaken) {
  Ends ends(server_context(), client_context());
  ASSERT_TRUE(ends.handshake());
  EXPECT_EQ(ends.client.tls_peer()->version, TlsVersion::tls1_3);
}

TEST(Tls, TwoConnectionsAtOnceResumeTheSessionsOfOne) {
  const auto at_server = server_context();
  const auto at_client = client_context();
  Ends before(at_server, at_client);
  ASSERT_TRUE(before.handshake());
  write(before.server, "tickets");
  read_all(before.client);
  Ends one(at_server, at_client);
  Ends other(at_server, at_client);
  ASSERT_TRUE(one.handshake() && other.handshake());
  EXPECT_TRUE(one.client.tls_peer()->resumed);
  EXPECT_TRUE(other.client.tls_peer()->resumed);
}

TEST(Tls, AClientBelowTheServersVersionIsRefused) {
  auto at_server = server_options();
  at_server.min_version = TlsVersion::tls1_3;
  auto at_client = client_options();
  at_client.max_version = TlsVersion::tls1_2;
  Ends ends(server_context(at_server), client_context(at_client));
  expect_refused(ends, "the client's version of TLS is not allowed here", "protocol version (alert 70)");
}

TEST(Tls, AServerBelowTheClientsVersionIsRefused) {
  auto at_server = server_options();
  at_server.max_version = TlsVersion::tls1_2;
  auto at_client = client_options();
  at_client.min_version = TlsVersion::tls1_3;
  Ends ends(server_context(at_server), client_context(at_client));
  EXPECT_FALSE(ends.handshake());
  EXPECT_HAS(ends.server_error.text + ends.client_error.text, "version");
}

TEST(Tls, ADowngradeByAnyoneOnTheWayIsFound) {
  // What the client offers is sent on without its offer of TLS 1.3.
  Sockets near;
  Sockets far;
  TlsConnection client(near.client, client_context(), "a.example");
  TlsConnection server(far.server, server_context());
  ASSERT_EQ(client.handshake(), Status::blocked);
  std::array<char, 4096> buffer;
  const auto forward = [&](int from, int to, const std::function<void(std::span<char>)>& change) {
    const ssize_t count = ::recv(from, buffer.data(), buffer.size(), 0);
    if (count <= 0) return;
    const auto bytes = std::span(buffer).first(static_cast<std::size_t>(count));
    change(bytes);
    ASSERT_EQ(::send(to, bytes.data(), bytes.size(), 0), count);
  };
  forward(near.server, far.client, [](std::span<char> hello) {
    // supported_versions with 1.3 and 1.2
    constexpr std::string_view offer("\x00\x2b\x00\x05\x04\x03\x04\x03\x03", 9);
    const auto found = std::search(hello.begin(), hello.end(), offer.begin(), offer.end());
    ASSERT_NE(found, hello.end());
    *found = '\x7f';  // an extension that nobody knows
  });
  ASSERT_EQ(server.handshake(), Status::blocked);
  forward(far.client, near.server, [](std::span<char>) {});
  EXPECT_EQ(client.handshake(), Status::failed);
  EXPECT_EQ(client.error().text, "TLS handshake: someone on the way tries to force an older version of TLS");
  forward(near.server, far.client, [](std::span<char>) {});
  EXPECT_EQ(server.handshake(), Status::failed);
  EXPECT_HAS(server.error().text, "illegal parameter");
}

TEST(Tls, ARefusalAfterTheClientsPartOfTheHandshakeIsToldToOneThatWrites) {
  Ends ends(server_context(mutual(ClientCertificates::required)), client_context());
  ASSERT_EQ(ends.client.handshake(), Status::blocked);
  ASSERT_EQ(ends.server.handshake(), Status::blocked);
  ASSERT_EQ(ends.client.handshake(), Status::done);
  ASSERT_EQ(ends.server.handshake(), Status::failed);
  Sockets::close(ends.sockets.server);
  std::size_t taken = 0;
  const std::array pieces{piece(bytes_of("lost"))};
  EXPECT_EQ(ends.client.write(pieces, taken), Status::failed);
  EXPECT_EQ(ends.client.error().code, Errc::handshake_failed);
  EXPECT_HAS(ends.client.error().text, "TLS handshake: the peer gave up: certificate required (alert 116)");
}

// --- peers that do not speak TLS

std::string server_told(std::string_view sent) {
  Sockets sockets;
  TlsConnection server(sockets.server, server_context());
  EXPECT_EQ(::send(sockets.client, sent.data(), sent.size(), 0), static_cast<ssize_t>(sent.size()));
  EXPECT_EQ(server.handshake(), Status::failed);
  EXPECT_EQ(server.error().code, Errc::handshake_failed);
  return server.error().text;
}

TEST(Tls, AServerToldInPlainSaysSo) {
  EXPECT_HAS(server_told("GET / HTTP/1.1\r\n\r\n"), "the peer speaks plain HTTP");
  EXPECT_HAS(server_told(std::string_view("\x01\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x05\x00\x00\x00\x00hello", 21)),
             "what the peer sent is not TLS (wrong version number)");
  EXPECT_HAS(server_told("SSH-2.0-OpenSSH_9.2\r\n"), "what the peer sent is not TLS");
}

TEST(Tls, AClientToldInPlainSaysSo) {
  Sockets sockets;
  TlsConnection client(sockets.client, client_context(), "a.example");
  EXPECT_EQ(client.handshake(), Status::blocked);
  EXPECT_EQ(::send(sockets.server, "220 mail.example ESMTP\r\n", 24, 0), 24);
  EXPECT_EQ(client.handshake(), Status::failed);
  EXPECT_EQ(client.error().code, Errc::handshake_failed);
  EXPECT_EQ(client.error().text, "TLS handshake: what the peer sent is not TLS (wrong version number)");
}

TEST(Tls, AnOldClientIsRefused) {
  // TLS 1.0, as far as its version says
  std::string hello("\x16\x03\x01\x00\x2d\x01\x00\x00\x29\x03\x01", 11);
  hello.append(32, 'r');
  hello.append("\x00\x00\x02\xc0\x13\x01\x00", 7);
  EXPECT_HAS(server_told(hello), "the client's version of TLS is not allowed here");
}

// --- OpenSSL itself as the peer

class ForeignClient {
 public:
  ForeignClient(int socket, TlsVersion version)
      : context_(SSL_CTX_new(TLS_client_method()), SSL_CTX_free), ssl_(SSL_new(context_.get()), SSL_free) {
    SSL_set_max_proto_version(ssl_.get(), version == TlsVersion::tls1_2 ? TLS1_2_VERSION : TLS1_3_VERSION);
    SSL_set_fd(ssl_.get(), socket);
    SSL_set_connect_state(ssl_.get());
  }
  bool handshake(TlsConnection& server) {
    auto status = Status::blocked;
    bool done = false;
    for (int turn = 0; turn < 10 && !(done && status == Status::done); ++turn) {
      done = done || SSL_do_handshake(ssl_.get()) == 1;
      if (status == Status::blocked) status = server.handshake();
    }
    return done && status == Status::done;
  }
  [[nodiscard]] SSL* ssl() const { return ssl_.get(); }

 private:
  std::unique_ptr<SSL_CTX, void (*)(SSL_CTX*)> context_;
  std::unique_ptr<SSL, void (*)(SSL*)> ssl_;
};

TEST_P(TlsOfEachVersion, AClientThatNamesNoProtocolIsServed) {
  Sockets sockets;
  TlsConnection server(sockets.server, server_context());
  ForeignClient client(sockets.client, GetParam());
  ASSERT_TRUE(client.handshake(server)) << server.error().message();
  EXPECT_EQ(server.tls_peer()->alpn, "");
  EXPECT_EQ(server.tls_peer()->version, GetParam());
  EXPECT_EQ(SSL_write(client.ssl(), "hello", 5), 5);
  EXPECT_EQ(read_all(server), "hello");
  EXPECT_EQ(write(server, "welcome"), Status::done);
  std::array<char, 10> buffer;
  EXPECT_EQ(SSL_read(client.ssl(), buffer.data(), 10), 7);
  EXPECT_EQ(server.shut_down({}), Status::done);
  EXPECT_EQ(SSL_read(client.ssl(), buffer.data(), 10), 0);
  EXPECT_EQ(SSL_get_error(client.ssl(), 0), SSL_ERROR_ZERO_RETURN);
}

TEST(Tls, RenegotiationIsRefused) {
  Sockets sockets;
  TlsConnection server(sockets.server, server_context());
  ForeignClient client(sockets.client, TlsVersion::tls1_2);
  ASSERT_TRUE(client.handshake(server)) << server.error().message();
  ASSERT_EQ(SSL_renegotiate(client.ssl()), 1);
  SSL_do_handshake(client.ssl());
  Status last;
  EXPECT_EQ(read_all(server, last), "");
  EXPECT_EQ(SSL_do_handshake(client.ssl()), -1);
  EXPECT_EQ(SSL_get_error(client.ssl(), -1), SSL_ERROR_SSL);
}

TEST(Tls, AKeyUpdateIsAnsweredAndTheBytesBehindItAreRead) {
  Sockets sockets;
  TlsConnection server(sockets.server, server_context());
  ForeignClient client(sockets.client, TlsVersion::tls1_3);
  ASSERT_TRUE(client.handshake(server)) << server.error().message();
  for (int i = 0; i < 5; ++i) {
    ASSERT_EQ(SSL_key_update(client.ssl(), SSL_KEY_UPDATE_REQUESTED), 1);
    ASSERT_EQ(SSL_write(client.ssl(), "new key", 7), 7);
    EXPECT_EQ(read_all(server), "new key");
    EXPECT_EQ(write(server, "mine too"), Status::done);
    std::array<char, 10> buffer;
    EXPECT_EQ(SSL_read(client.ssl(), buffer.data(), 10), 8);
  }
}

TEST(Tls, AKeyIsReplacedAfterItsRecords) {
  Ends ends(server_context(), client_context());
  ASSERT_TRUE(ends.handshake());
  read_all(ends.client);
  ends.server.set_records_of_a_key(3);
  std::vector<int> longer;
  for (int i = 0; i < 9; ++i) {
    write(ends.server, "text");
    std::array<char, 200> record;
    const ssize_t size = ::recv(ends.sockets.client, record.data(), record.size(), MSG_PEEK);
    if (size > 26) longer.push_back(i);
    EXPECT_EQ(read_all(ends.client), "text");
  }
  EXPECT_EQ(longer, (std::vector{3, 6})) << "a key update goes before";
}

TEST_P(TlsOfEachVersion, AnEndBeforeTheHandshakeHasNothingToSay) {
  Ends ends(server_context(server()), client_context(client()));
  EXPECT_EQ(ends.server.shut_down({}), Status::done);
  EXPECT_EQ(ends.client.handshake(), Status::blocked);
  EXPECT_EQ(ends.client.shut_down({}), Status::done);
  EXPECT_FALSE(ends.client.wants_write());
}

TEST(Tls, APeerThatAsksForKeysAndReadsNoneIsCut) {
  Sockets sockets(4096);
  TlsConnection server(sockets.server, server_context());
  ForeignClient client(sockets.client, TlsVersion::tls1_3);
  ASSERT_TRUE(client.handshake(server)) << server.error().message();
  const std::string text(100'000, 'x');
  const std::array pieces{piece(bytes_of(text))};
  std::size_t taken = 0;
  ASSERT_EQ(server.write(pieces, taken), Status::blocked);
  Status last = Status::blocked;
  int updates = 0;
  for (; updates < 10'000 && last == Status::blocked; ++updates) {
    ASSERT_EQ(SSL_key_update(client.ssl(), SSL_KEY_UPDATE_REQUESTED), 1);
    ASSERT_EQ(SSL_do_handshake(client.ssl()), 1);
    std::array<std::byte, 10> buffer;
    std::size_t count = 0;
    last = server.read(buffer, count);
  }
  EXPECT_EQ(last, Status::failed);
  EXPECT_EQ(server.error().code, Errc::slow_consumer);
  EXPECT_GT(updates, 100);
  EXPECT_LT(updates, 1000);
}

// --- names

bool reaches(std::string_view host, std::string_view server_name = {}) {
  auto options = client_options();
  options.server_name = server_name;
  static const auto at_server = server_context();
  Ends ends(at_server, client_context(options), host);
  return ends.handshake();
}

TEST(Tls, AHostIsCheckedByNameWildcardOrAddress) {
  EXPECT_TRUE(reaches("a.example"));
  EXPECT_TRUE(reaches("A.Example"));
  EXPECT_TRUE(reaches("a.example."));
  EXPECT_TRUE(reaches("x.b.example"));
  EXPECT_FALSE(reaches("x.y.b.example"));
  EXPECT_FALSE(reaches("b.example"));
  EXPECT_FALSE(reaches("the server")) << "names beside a common name are all that counts";
  EXPECT_TRUE(reaches("127.0.0.1"));
  EXPECT_FALSE(reaches("127.0.0.2"));
  EXPECT_TRUE(reaches("::1"));
  EXPECT_TRUE(reaches("0:0::1%lo"));
  EXPECT_FALSE(reaches("::2"));
  EXPECT_TRUE(reaches("10.0.0.1", "a.example"));
  EXPECT_FALSE(reaches("a.example", "c.example"));
  EXPECT_TRUE(reaches("c.example", "127.0.0.1"));
}

TEST(Tls, AWildcardForPartOfALabelIsRefused) {
  const auto partial = certificate({.common_name = "p", .names = {"w*.c.example"}}, &authority());
  Ends ends(server_context({.identity = identity(partial)}), client_context(), "www.c.example");
  EXPECT_FALSE(ends.handshake());
}

TEST(Tls, WithoutAHostNothingCanBeVerified) {
  Sockets sockets;
  TlsConnection client(sockets.client, client_context(), "");
  EXPECT_EQ(client.handshake(), Status::failed);
  EXPECT_EQ(client.error().code, Errc::invalid_option);
  EXPECT_HAS(client.error().text, "no host name");
}

TEST(Tls, ASelfSignedCertificateIsItsOwnAuthority) {
  const auto own = certificate({.common_name = "self", .names = {"a.example"}});
  Ends ends(server_context({.identity = identity(own)}), client_context({.ca_pem = own.certificate_pem}));
  EXPECT_TRUE(ends.handshake()) << ends.client_error.message();
  Ends others(server_context({.identity = identity(own)}), client_context());
  expect_refused(others, "unknown CA", "unknown authority: the server's certificate is signed by itself: CN=self");
}

TEST(Tls, AChainIsSentWhole) {
  const auto middle = certificate({.common_name = "Middle CA", .authority = true}, &authority());
  const auto leaf = certificate({.common_name = "leaf", .names = {"a.example"}}, &middle);
  auto chain = identity(leaf);
  Ends without(server_context({.identity = chain}), client_context());
  expect_refused(without, "unknown CA", "unknown authority: the server's certificate is issued by CN=Middle CA");
  chain.certificate_pem += middle.certificate_pem;
  Ends with(server_context({.identity = chain}), client_context());
  EXPECT_TRUE(with.handshake()) << with.client_error.message();
  Ends trusted(server_context({.identity = identity(leaf)}), client_context({.ca_pem = middle.certificate_pem}));
  EXPECT_TRUE(trusted.handshake()) << trusted.client_error.message();
}

TEST(Tls, WhatACertificateSaysCannotBreakALine) {
  const auto evil = certificate({.common_name = "a\nlog: all is well,\x1b[0m", .names = {"a.example"}}, &authority());
  Ends ends(server_context({.identity = identity(evil)}), client_context());
  ASSERT_TRUE(ends.handshake());
  EXPECT_EQ(ends.client.tls_peer()->subject, "CN=a\\0Alog: all is well\\,\\1B[0m");
  EXPECT_EQ(ends.client.tls_peer()->common_name, "");
  const auto unicode = certificate({.common_name = "M\xc3\xbcller", .names = {"a.example"}}, &authority());
  Ends others(server_context({.identity = identity(unicode)}), client_context());
  ASSERT_TRUE(others.handshake());
  EXPECT_EQ(others.client.tls_peer()->subject, "CN=M\xc3\xbcller");
  EXPECT_EQ(others.client.tls_peer()->common_name, "M\xc3\xbcller");
}

// --- options

Error refusal(const TlsServerOptions& options) {
  Error error;
  EXPECT_EQ(TlsContext::server(options, error), nullptr);
  return error;
}

Error refusal(const TlsClientOptions& options) {
  Error error;
  EXPECT_EQ(TlsContext::client(options, error), nullptr);
  return error;
}

TEST(TlsOptions, FilesServeAsWellAsTexts) {
  const Directory directory;
  auto server = mutual(ClientCertificates::required);
  server.identity = {.certificate_file = directory.put("cert.pem", server_certificate().certificate_pem),
                     .key_file = directory.put("key.pem", server_certificate().key_pem)};
  server.client_ca_pem.clear();
  server.client_ca_file = directory.put("ca.pem", authority().certificate_pem);
  const TlsClientOptions client{
      .ca_file = directory.put("ca.pem", authority().certificate_pem),
      .identity = {.certificate_file = directory.put("client.pem", client_certificate().certificate_pem),
                   .key_pem = client_certificate().key_pem}};
  Ends ends(server_context(server), client_context(client));
  EXPECT_TRUE(ends.handshake()) << ends.server_error.message() << ends.client_error.message();
}

TEST(TlsOptions, AFileThatCannotBeReadIsNamedWithTheReason) {
  const Directory directory;
  const auto cert = directory.put("cert.pem", server_certificate().certificate_pem);
  const auto missing = (directory.path / "missing.pem").string();
  Error error =
      refusal(TlsServerOptions{.identity = {.certificate_file = missing, .key_pem = server_certificate().key_pem}});
  EXPECT_EQ(error.code, boost::system::errc::no_such_file_or_directory);
  EXPECT_EQ(error.text, "certificate_file " + missing + ": No such file or directory");
  error = refusal(TlsServerOptions{.identity = {.certificate_file = cert, .key_file = missing}});
  EXPECT_EQ(error.text, "key_file " + missing + ": No such file or directory");
  error = refusal(TlsServerOptions{.identity = {.certificate_file = directory.path.string(), .key_file = missing}});
  EXPECT_EQ(error.code, boost::system::errc::is_a_directory);
  EXPECT_HAS(error.text, "certificate_file " + directory.path.string() + ": Is a directory");
  auto server = mutual(ClientCertificates::required);
  server.client_ca_pem.clear();
  server.client_ca_file = missing;
  EXPECT_EQ(refusal(server).text, "client_ca_file " + missing + ": No such file or directory");
  EXPECT_EQ(refusal(TlsClientOptions{.ca_file = missing}).text, "ca_file " + missing + ": No such file or directory");
  EXPECT_EQ(refusal(TlsServerOptions{.identity = {.certificate_file = "/dev/zero", .key_file = missing}}).text,
            "certificate_file /dev/zero: larger than 16 MiB");
}

TEST(TlsOptions, WhatIsNotPemIsNamed) {
  const Directory directory;
  const auto junk = directory.put("junk.pem", "this is no certificate\n");
  const auto& pair = server_certificate();
  Error error = refusal(TlsServerOptions{.identity = {.certificate_file = junk, .key_pem = pair.key_pem}});
  EXPECT_EQ(error.code, Errc::invalid_option);
  EXPECT_EQ(error.text, "certificate_file " + junk + ": no certificate in PEM form in it");
  error = refusal(TlsServerOptions{.identity = {.certificate_pem = pair.certificate_pem, .key_file = junk}});
  EXPECT_EQ(error.text, "key_file " + junk + ": no private key in PEM form in it");
  EXPECT_EQ(
      refusal(TlsServerOptions{.identity = {.certificate_pem = pair.key_pem, .key_pem = pair.certificate_pem}}).text,
      "certificate_pem: no certificate in PEM form in it");
  EXPECT_HAS(
      refusal(TlsServerOptions{.identity = {.certificate_pem = broken(pair.certificate_pem), .key_pem = pair.key_pem}})
          .text,
      "certificate_pem: certificate 1 in it cannot be read: ");
  EXPECT_HAS(
      refusal(TlsServerOptions{.identity = {.certificate_pem = pair.certificate_pem + broken(pair.certificate_pem),
                                            .key_pem = pair.key_pem}})
          .text,
      "certificate_pem: certificate 2 in it cannot be read: ");
  EXPECT_HAS(
      refusal(TlsServerOptions{.identity = {.certificate_pem = pair.certificate_pem, .key_pem = broken(pair.key_pem)}})
          .text,
      "key_pem: the private key in it cannot be read: ");
  EXPECT_EQ(refusal(TlsClientOptions{.ca_file = junk}).text, "ca_file " + junk + ": no certificate in PEM form in it");
}

TEST(TlsOptions, AKeyOfAnotherCertificateIsRefused) {
  const Directory directory;
  const auto cert = directory.put("cert.pem", server_certificate().certificate_pem);
  const auto key = directory.put("key.pem", client_certificate().key_pem);
  const Error error = refusal(TlsServerOptions{.identity = {.certificate_file = cert, .key_file = key}});
  EXPECT_EQ(error.code, Errc::invalid_option);
  EXPECT_EQ(error.text, "the private key in key_file " + key +
                            " does not belong to the certificate in certificate_file " + cert + " (CN=the server)");
}

TEST(TlsOptions, AnEncryptedKeyIsRefusedAndNobodyAsked) {
  // openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -aes256 -pass pass:secret
  constexpr const char* encrypted =
      "-----BEGIN ENCRYPTED PRIVATE KEY-----\n"
      "MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAhRfkH4LfJ5MQICCAAw\n"
      "DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEC73dFKmDAFRmr/nAXbfJDIEgZCW\n"
      "MkHUS+oBd40+DfNAxNHDU87akbzrgQRLa3kLOY35GOzj3qsvqxUBwXqSUrgyvPM9\n"
      "pNYtxwXhMh1urmOUNjEX8Caewp5dHIknLwDy3j/1uW07utbGPFgx7pseIqfmAFP6\n"
      "FfeCWEzrnxhe72OwKm4oQV3owRbHdYGg+4l5GXLhyE1UpC3JxsW2ZgjV1+nmyOA=\n"
      "-----END ENCRYPTED PRIVATE KEY-----\n";
  const Error error = refusal(
      TlsServerOptions{.identity = {.certificate_pem = server_certificate().certificate_pem, .key_pem = encrypted}});
  EXPECT_EQ(error.code, Errc::invalid_option);
  EXPECT_EQ(error.text, "key_pem: the private key is encrypted; it must be in plain PEM form");
}

TEST(TlsOptions, WhatContradictsItselfIsRefused) {
  const auto check = [](TlsServerOptions options, const std::function<void(TlsServerOptions&)>& change) {
    EXPECT_FALSE(validate(options));
    change(options);
    EXPECT_EQ(validate(options).code, Errc::invalid_option);
    EXPECT_EQ(refusal(options).text, validate(options).text);
    return validate(options).text;
  };
  EXPECT_EQ(check(server_options(), [](auto& o) { o.identity.certificate_pem.clear(); }),
            "certificate_file and certificate_pem are both empty, must be one of them");
  EXPECT_EQ(check(server_options(), [](auto& o) { o.identity.certificate_file = "x"; }),
            "certificate_file and certificate_pem are both set, must be one of them");
  EXPECT_EQ(check(server_options(), [](auto& o) { o.identity.key_pem.clear(); }),
            "key_file and key_pem are both empty, must be one of them");
  EXPECT_EQ(check(server_options(), [](auto& o) { o.client_certificates = ClientCertificates::optional; }),
            "client_ca_file and client_ca_pem are both empty, must be one of them");
  EXPECT_EQ(check(mutual(ClientCertificates::required), [](auto& o) { o.client_ca_file = "x"; }),
            "client_ca_file and client_ca_pem are both set, must be one of them");
  EXPECT_EQ(check(mutual(ClientCertificates::required), [](auto& o) { o.client_certificates = {}; }),
            "client_ca_pem is set, but client_certificates is none");
  EXPECT_EQ(check(mutual(ClientCertificates::required),
                  [](auto& o) { o.client_certificates = static_cast<ClientCertificates>(3); }),
            "client_certificates is 3, must be from 0 to 2");
  EXPECT_EQ(check(server_options(), [](auto& o) { o.min_version = static_cast<TlsVersion>(2); }),
            "min_version is 2, must be 0 or 1");
  EXPECT_EQ(check(server_options(),
                  [](auto& o) {
                    o.min_version = TlsVersion::tls1_3;
                    o.max_version = TlsVersion::tls1_2;
                  }),
            "min_version is TLS 1.3, must not be above max_version, TLS 1.2");

  EXPECT_FALSE(validate(TlsClientOptions{}));
  EXPECT_EQ(refusal(TlsClientOptions{.ca_file = "x", .ca_pem = "y"}).text,
            "ca_file and ca_pem are both set, must be one of them");
  EXPECT_EQ(refusal(TlsClientOptions{.identity = {.certificate_file = "x"}}).text,
            "key_file and key_pem are both empty, must be one of them");
  EXPECT_HAS(refusal(TlsClientOptions{.server_name = "a b"}).text, "server_name");
  EXPECT_HAS(refusal(TlsClientOptions{.server_name = "[::1]"}).text, "server_name");
  EXPECT_EQ(refusal(TlsClientOptions{.max_version = static_cast<TlsVersion>(7)}).text,
            "max_version is 7, must be 0 or 1");
}

TEST(TlsOptions, VerificationIsOnUnlessDangerTurnsItOff) {
  EXPECT_TRUE(TlsClientOptions{}.verify.enabled());
  EXPECT_FALSE(TlsVerification::danger_accept_any_certificate().enabled());
  EXPECT_EQ(TlsServerOptions{}.min_version, TlsVersion::tls1_2);
  EXPECT_EQ(TlsClientOptions{}.min_version, TlsVersion::tls1_2);
  EXPECT_EQ(TlsServerOptions{}.client_certificates, ClientCertificates::none);
}

// --- memory

TEST(Tls, AFailureOfAllocationFailsTheConnectionOnly) {
  const auto at_server = server_context();
  const auto at_client = client_context();
  bool failed = true;
  int failures = 0;
  for (long successes = 0; failed; ++successes) {
    ASSERT_LT(successes, 10'000);
    Ends ends(at_server, at_client, "a.example", 4096);
    const std::string text(300'000, 'x');
    const std::array pieces{piece(bytes_of(text))};
    std::size_t taken = 0;
    Status status = Status::failed;
    {
      const msgtrans::test::AllocationFailure failure(successes);
      if (ends.handshake()) status = ends.server.write(pieces, taken);
      failed = failure.happened();
    }
    if (!failed) {
      EXPECT_EQ(status, Status::blocked);
    } else if (status == Status::failed) {
      ++failures;
      for (const auto* const end : {&ends.server, &ends.client}) {
        if (end->error()) {
          EXPECT_TRUE(end->error().code == not_enough_memory) << end->error().message();
        }
      }
    }
  }
  EXPECT_GT(failures, 0);
}

// --- the maker of certificates

TEST(Certificate, WhatCannotBeOneIsRefused) {
  const auto refused = [](const CertificateRequest& request, const CertificateAndKey* issuer = nullptr) {
    Error error;
    EXPECT_FALSE(make_certificate(request, error, issuer));
    EXPECT_EQ(error.code, Errc::invalid_option);
    return error.text;
  };
  const auto now = std::chrono::system_clock::now();
  EXPECT_HAS(refused({.from = now, .until = now}), "would end before it begins");
  EXPECT_HAS(refused({.common_name = std::string(65, 'x')}), "longer than 64");
  EXPECT_HAS(refused({.names = {"a.example,IP:1.2.3.4"}}), "no name of a host");
  EXPECT_HAS(refused({.names = {"email:a"}}), "no name of a host");
  EXPECT_HAS(refused({.names = {""}}), "no name of a host");
  EXPECT_HAS(refused({.common_name = "\xff"}), "common name");
  const CertificateAndKey mixed{authority().certificate_pem, other_authority().key_pem};
  EXPECT_HAS(refused({.common_name = "x"}, &mixed), "the issuer's key");
  const CertificateAndKey none{"", ""};
  EXPECT_HAS(refused({.common_name = "x"}, &none), "the issuer's certificate");
}

TEST(Certificate, EachHasANumberOfItsOwn) {
  const auto a = certificate({.common_name = "same"}, &authority());
  const auto b = certificate({.common_name = "same"}, &authority());
  EXPECT_NE(a.certificate_pem, b.certificate_pem);
  EXPECT_NE(a.key_pem, b.key_pem);
}

}  // namespace
