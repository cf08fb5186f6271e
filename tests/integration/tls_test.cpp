// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"
#include "support/process.hpp"

#include <filesystem>
#include <fstream>

namespace msgtrans::test {
namespace {

CertificateAndKey certificate(const CertificateRequest& request, const CertificateAndKey* issuer) {
  Error error;
  auto made = make_certificate(request, error, issuer);
  if (!made) throw std::runtime_error(error.message());
  return *std::move(made);
}

/// Which no system trusts.
const CertificateAndKey& authority() {
  static const auto made = certificate({.common_name = "The authority", .authority = true}, nullptr);
  return made;
}
const CertificateAndKey& other_authority() {
  static const auto made = certificate({.common_name = "Another authority", .authority = true}, nullptr);
  return made;
}

TlsIdentity identity(const CertificateRequest& request, const CertificateAndKey& issuer = authority()) {
  auto made = certificate(request, &issuer);
  return {.certificate_pem = std::move(made.certificate_pem), .key_pem = std::move(made.key_pem)};
}
TlsIdentity server_identity(const std::string& common_name = "server") {
  return identity({.common_name = common_name, .names = {"127.0.0.1"}});
}

/// Listens there, with a certificate of the authority unless the options have one, and starts.
void start(TestServer& server, ListenOptions options = {}, const Endpoint& at = tls("127.0.0.1:0")) {
  if (is_encrypted(at.transport) && options.tls.identity.empty()) options.tls.identity = server_identity();
  server.endpoint = server.transport.listen(at, options);
  server.transport.start();
}

/// Options of a client that trusts the authority.
ClientOptions trusting(TlsClientOptions options = {}) {
  options.ca_pem = authority().certificate_pem;
  ClientOptions client;
  client.tls = std::move(options);
  return client;
}

Endpoint over(Transport transport, Endpoint endpoint) {
  endpoint.transport = transport;
  return endpoint;
}

/// What a client learns of a connection that is to fail: in connecting, or, where the client is done before the server
/// is, a moment later.
Error failure_of(const ClientOptions& options, const std::string& url) {
  const Record<Error> ends;
  ClientTransport client(options);
  client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
  Error error;
  client.connect(url, error);
  return error ? error : ends.at(0);
}

void expect_served(const ClientOptions& options, const std::string& url) {
  ClientTransport client(options);
  Error error;
  client.connect(url, error);
  ASSERT_FALSE(error) << error.message();
  EXPECT_EQ(client.request("hello").text(), "hello");
}

ClientOptions careless() {
  ClientOptions options;
  options.tls.verify = TlsVerification::danger_accept_any_certificate();
  return options;
}

::testing::AssertionResult has(const std::string& text, std::string_view part) {
  if (text.find(part) != std::string::npos) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << "\"" << text << "\" does not say \"" << part << "\"";
}

/// The server has told that handshake, and only that, and has no session.
void expect_handshake_failed(const TestServer& server, std::string_view part, std::size_t which = 0) {
  ASSERT_TRUE(server.errors.wait_for(which + 1)) << "nothing is told of the handshake";
  const End told = server.errors.at(which);
  EXPECT_EQ(told.code, Errc::handshake_failed) << told.code.message();
  EXPECT_TRUE(has(told.text, part));
  EXPECT_TRUE(has(told.text, "127.0.0.1:"));
  EXPECT_FALSE(told.id);
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().handshake_failures == which + 1; }));
  EXPECT_EQ(server.errors.size(), which + 1);
}

// --- whom a client trusts

struct Refused {
  const char* name;
  TlsIdentity (*identity)();
  ClientOptions (*client)();
  const char* told_client;
  const char* told_server;

  friend std::ostream& operator<<(std::ostream& out, const Refused& refused) { return out << refused.name; }
};

class TlsOfAClient : public ::testing::TestWithParam<Refused> {};

TEST_P(TlsOfAClient, RefusesAServerAndBothSaySo) {
  ListenOptions options;
  options.tls.identity = GetParam().identity();
  TestServer server;
  server.echo();
  start(server, options);
  ClientTransport client(GetParam().client());
  Error error;
  client.connect(server.url(), error);
  EXPECT_EQ(error.code, Errc::handshake_failed) << error.code.message();
  EXPECT_TRUE(has(error.text, GetParam().told_client));
  EXPECT_TRUE(has(error.text, server.endpoint.to_string()));
  EXPECT_FALSE(client.is_connected());
  expect_handshake_failed(server, GetParam().told_server);
  EXPECT_EQ(server.came.size(), 0U);
  expect_served(careless(), server.url());
}

using std::chrono::hours;
using std::chrono::system_clock;

INSTANTIATE_TEST_SUITE_P(
    All, TlsOfAClient,
    ::testing::Values(
        Refused{"OfAnAuthorityTheSystemDoesNotKnow", [] { return server_identity(); }, [] { return ClientOptions{}; },
                "unknown authority: the server's certificate is issued by CN=The authority", "unknown CA"},
        Refused{"OfAnotherAuthority",
                [] { return identity({.common_name = "server", .names = {"127.0.0.1"}}, other_authority()); },
                [] { return trusting(); }, "issued by CN=Another authority", "unknown CA"},
        Refused{"ForAnotherAddress",
                [] {
                  return identity({.names = {"127.0.0.2", "other.example"}});
                },
                [] { return trusting(); },
                "address mismatch: the certificate is for 127.0.0.2, other.example, not for 127.0.0.1",
                "bad certificate"},
        Refused{"ForAnotherName", [] { return server_identity(); },
                [] { return trusting({.server_name = "wanted.example"}); },
                "host name mismatch: the certificate is for 127.0.0.1, not for wanted.example", "bad certificate"},
        Refused{"Expired",
                [] {
                  return identity({.common_name = "old",
                                   .names = {"127.0.0.1"},
                                   .from = system_clock::now() - hours(48),
                                   .until = system_clock::now() - hours(24)});
                },
                [] { return trusting(); }, "certificate has expired: CN=old, on 20", "certificate expired"},
        Refused{"NotYetValid",
                [] {
                  return identity({.common_name = "young",
                                   .names = {"127.0.0.1"},
                                   .from = system_clock::now() + hours(24),
                                   .until = system_clock::now() + hours(48)});
                },
                [] { return trusting(); }, "certificate is not yet valid: CN=young, only from 20", "bad certificate"}),
    [](const auto& each) { return std::string(each.param.name); });

TEST(Tls, TakesTheAuthorityAsAFileOrAsText) {
  TestServer server;
  server.echo();
  start(server);
  expect_served(trusting(), server.url());
  const auto file = std::filesystem::temp_directory_path() / ("msgtrans-ca-" + std::to_string(::getpid()) + ".pem");
  std::ofstream(file) << authority().certificate_pem;
  ClientOptions options;
  options.tls.ca_file = file.string();
  expect_served(options, server.url());
  std::filesystem::remove(file);
  // read by the first connect, which says so
  ClientTransport client(options);
  Error error;
  client.connect(server.url(), error);
  EXPECT_EQ(error.code, boost::system::errc::no_such_file_or_directory);
  EXPECT_TRUE(has(error.text, "ca_file " + file.string()));
}

TEST(Tls, ChecksTheNameThatTheOptionsGiveInsteadOfTheUrls) {
  ListenOptions options;
  options.tls.identity = identity({.names = {"service.example"}});
  TestServer server;
  server.echo();
  start(server, options);
  expect_served(trusting({.server_name = "service.example"}), server.url());
}

TEST(Tls, AcceptsAnythingWhereDangerIsAskedFor) {
  ListenOptions options;
  options.tls.identity = identity({.names = {"other.example"}}, other_authority());
  TestServer server;
  server.echo();
  start(server, options);
  ClientTransport client(careless());
  client.connect(server.url());
  EXPECT_EQ(client.request("hello").text(), "hello");
  ASSERT_NE(client.session()->tls(), nullptr);
  EXPECT_FALSE(client.session()->tls()->verified);
}

TEST(Tls, WrongOptionsOfAClientAreRefusedAtOnce) {
  const auto refused = [](TlsClientOptions tls, std::string_view part) {
    ClientOptions options;
    options.tls = std::move(tls);
    std::string text;
    EXPECT_EQ(thrown([&] { ClientTransport client(options); }, &text), Errc::invalid_option) << part;
    EXPECT_TRUE(has(text, part));
  };
  refused({.ca_file = "a", .ca_pem = "b"}, "ca_file and ca_pem");
  refused({.server_name = "[::1]"}, "server_name");
  refused({.identity = {.certificate_pem = "x"}}, "key_file and key_pem");
  refused({.identity = {.key_pem = "x"}}, "certificate_file and certificate_pem");
  refused({.min_version = TlsVersion::tls1_3, .max_version = TlsVersion::tls1_2}, "min_version is TLS 1.3");
}

// --- what both ends know of each other

TEST(Tls, TellsBothEndsOfEachOther) {
  TestServer server;
  const Record<TlsPeer> seen;
  const Record<Transport> transports_seen;
  server.echo();
  server.transport.on_connect([=](Session& session) {
    transports_seen.add(session.peer().transport);
    if (session.tls() != nullptr) seen.add(*session.tls());
  });
  start(server, {}, tls("127.0.0.1:0"));
  const Endpoint plain = server.transport.listen(tcp("127.0.0.1:0"));
  ClientTransport client(trusting());
  client.connect(server.url());
  const TlsPeer at_server = seen.at(0);
  EXPECT_EQ(at_server.alpn, "msgtrans/1");
  EXPECT_EQ(at_server.version, TlsVersion::tls1_3);
  EXPECT_FALSE(at_server.cipher.empty());
  EXPECT_EQ(at_server.subject, "");
  EXPECT_FALSE(at_server.verified);
  const Session session = *client.session();
  ASSERT_NE(session.tls(), nullptr);
  EXPECT_EQ(session.tls()->alpn, "msgtrans/1");
  EXPECT_EQ(session.tls()->subject, "CN=server");
  EXPECT_EQ(session.tls()->common_name, "server");
  EXPECT_EQ(session.tls()->names, std::vector<std::string>{"127.0.0.1"});
  EXPECT_TRUE(session.tls()->verified);
  EXPECT_FALSE(session.tls()->resumed);
  EXPECT_EQ(session.peer(), server.endpoint);
  EXPECT_EQ(session.peer().transport, Transport::tls);
  EXPECT_EQ(transports_seen.at(0), Transport::tls);

  ClientTransport other;
  other.connect(plain.url());
  EXPECT_EQ(transports_seen.at(1), Transport::tcp);
  EXPECT_EQ(seen.size(), 1U);
  EXPECT_EQ(other.session()->tls(), nullptr);
}

class TlsOfEachVersion : public ::testing::TestWithParam<TlsVersion> {
 protected:
  static ListenOptions asking(ClientCertificates how) {
    ListenOptions options;
    options.tls.client_certificates = how;
    options.tls.client_ca_pem = authority().certificate_pem;
    options.tls.max_version = GetParam();
    return options;
  }
};
INSTANTIATE_TEST_SUITE_P(All, TlsOfEachVersion, ::testing::Values(TlsVersion::tls1_2, TlsVersion::tls1_3),
                         [](const auto& each) { return each.param == TlsVersion::tls1_2 ? "Tls12" : "Tls13"; });

TEST_P(TlsOfEachVersion, AClientsCertificateIsSeenInOnConnect) {
  for (const auto how : {ClientCertificates::optional, ClientCertificates::required}) {
    TestServer server;
    const Record<TlsPeer> seen;
    server.echo();
    server.transport.on_connect([seen](Session& session) { seen.add(*session.tls()); });
    start(server, asking(how));
    expect_served(trusting({.identity = identity({.common_name = "worker-7", .names = {"worker.example"}})}),
                  server.url());
    const TlsPeer peer = seen.at(0);
    EXPECT_EQ(peer.subject, "CN=worker-7");
    EXPECT_EQ(peer.common_name, "worker-7");
    EXPECT_EQ(peer.names, std::vector<std::string>{"worker.example"});
    EXPECT_TRUE(peer.verified);
    EXPECT_EQ(peer.version, GetParam());
  }
}

TEST_P(TlsOfEachVersion, AClientWithoutARequiredCertificateIsAnErrorAtBothEnds) {
  TestServer server;
  server.echo();
  start(server, asking(ClientCertificates::required));
  const Error error = failure_of(trusting(), server.url());
  EXPECT_EQ(error.code, Errc::handshake_failed) << error.code.message();
  EXPECT_TRUE(has(error.text, "it asked for a certificate, and this end has none"));
  expect_handshake_failed(server, "the client has no certificate, and one is required");
  EXPECT_EQ(server.came.size(), 0U);
}

TEST_P(TlsOfEachVersion, AClientsCertificateOfAnotherAuthorityIsAnErrorAtBothEnds) {
  for (const auto how : {ClientCertificates::optional, ClientCertificates::required}) {
    TestServer server;
    server.echo();
    start(server, asking(how));
    const Error error =
        failure_of(trusting({.identity = identity({.common_name = "spy"}, other_authority())}), server.url());
    EXPECT_EQ(error.code, Errc::handshake_failed) << error.code.message();
    EXPECT_TRUE(has(error.text, "unknown CA"));
    expect_handshake_failed(server, "the client's certificate is issued by CN=Another authority");
    EXPECT_EQ(server.came.size(), 0U);
  }
}

TEST_P(TlsOfEachVersion, AnOptionalCertificateMayBeMissing) {
  TestServer server;
  const Record<TlsPeer> seen;
  server.echo();
  server.transport.on_connect([seen](Session& session) { seen.add(*session.tls()); });
  start(server, asking(ClientCertificates::optional));
  expect_served(trusting(), server.url());
  EXPECT_EQ(seen.at(0).subject, "");
  EXPECT_FALSE(seen.at(0).verified);
}

TEST(Tls, AServerThatAsksForNoCertificateIsShownNone) {
  TestServer server;
  const Record<TlsPeer> seen;
  server.echo();
  server.transport.on_connect([seen](Session& session) { seen.add(*session.tls()); });
  start(server);
  expect_served(trusting({.identity = identity({.common_name = "worker-7"})}), server.url());
  EXPECT_EQ(seen.at(0).subject, "");
}

TEST(Tls, AServerOfANewerVersionRefusesAClientOfAnOlderAndTheReverse) {
  {
    ListenOptions options;
    options.tls.min_version = TlsVersion::tls1_3;
    TestServer server;
    server.echo();
    start(server, options);
    const Error error = failure_of(trusting({.max_version = TlsVersion::tls1_2}), server.url());
    EXPECT_EQ(error.code, Errc::handshake_failed) << error.code.message();
    EXPECT_TRUE(has(error.text, "protocol version (alert 70)"));
    expect_handshake_failed(server, "the client's version of TLS is not allowed here");
    expect_served(trusting(), server.url());
  }
  {
    ListenOptions options;
    options.tls.max_version = TlsVersion::tls1_2;
    TestServer server;
    server.echo();
    start(server, options);
    const Error error = failure_of(trusting({.min_version = TlsVersion::tls1_3}), server.url());
    EXPECT_EQ(error.code, Errc::handshake_failed) << error.code.message();
    EXPECT_TRUE(has(error.text, "protocol version (alert 70)"));
    expect_handshake_failed(server, "the client's version of TLS is not allowed here");
    ClientTransport client(trusting());
    client.connect(server.url());
    EXPECT_EQ(client.session()->tls()->version, TlsVersion::tls1_2);
  }
}

TEST_P(TlsOfEachVersion, AClientResumesItsSessionWhenItConnectsAgain) {
  ListenOptions options;
  options.tls.max_version = GetParam();
  TestServer server;
  const Record<bool> resumed;
  server.echo();
  server.transport.on_connect([resumed](Session& session) { resumed.add(session.tls()->resumed); });
  start(server, options);
  ClientTransport client(trusting());
  for (int i = 0; i < 3; ++i) {
    client.connect(server.url());
    EXPECT_EQ(client.session()->tls()->resumed, i != 0);
    EXPECT_EQ(client.session()->tls()->subject, "CN=server");
    EXPECT_TRUE(client.session()->tls()->verified);
    EXPECT_EQ(client.request("x").text(), "x");
    EXPECT_EQ(resumed.at(static_cast<std::size_t>(i)), i != 0);
    client.close();
  }
  ClientTransport other(trusting());
  other.connect(server.url());
  EXPECT_FALSE(other.session()->tls()->resumed);
}

// --- new certificates

TEST(TlsRenewal, IsForNewConnectionsWhileAnOldSessionGoesOn) {
  ListenOptions options;
  options.tls.identity = server_identity("first");
  TestServer server;
  server.echo();
  start(server, options);
  ClientTransport old(trusting());
  old.connect(server.url());
  EXPECT_EQ(old.request("before").text(), "before");
  server.transport.renew_tls(server.endpoint, {.identity = server_identity("second")});
  EXPECT_EQ(old.request("after").text(), "after");
  EXPECT_EQ(old.session()->tls()->common_name, "first");
  ClientTransport fresh(trusting());
  fresh.connect(server.url());
  EXPECT_EQ(fresh.session()->tls()->common_name, "second");
  old.close();
  old.connect(server.url());
  EXPECT_EQ(old.session()->tls()->common_name, "second");
  EXPECT_FALSE(old.session()->tls()->resumed);
}

TEST(TlsRenewal, BringsNewRulesToo) {
  TestServer server;
  server.echo();
  start(server);
  expect_served(trusting(), server.url());
  server.transport.renew_tls(server.endpoint, {.identity = server_identity(),
                                               .client_certificates = ClientCertificates::required,
                                               .client_ca_pem = authority().certificate_pem});
  EXPECT_EQ(failure_of(trusting(), server.url()).code, Errc::handshake_failed);
  expect_served(trusting({.identity = identity({.common_name = "worker"})}), server.url());
}

TEST(TlsRenewal, ThatFailsChangesNothing) {
  ListenOptions options;
  options.tls.identity = server_identity("first");
  TestServer server;
  start(server, options);
  TlsServerOptions wrong{.identity = server_identity("second")};
  wrong.identity.key_pem = server_identity("third").key_pem;
  Error error;
  server.transport.renew_tls(server.endpoint, wrong, error);
  EXPECT_EQ(error.code, Errc::invalid_option);
  EXPECT_TRUE(has(error.text, "key_pem does not belong to the certificate in certificate_pem (CN=second)"));
  std::string text;
  EXPECT_EQ(thrown([&] { server.transport.renew_tls(server.endpoint, {}); }, &text), Errc::invalid_option);
  EXPECT_TRUE(has(text, "certificate_file and certificate_pem are both empty"));
  server.transport.renew_tls(server.endpoint, {.identity = {.certificate_file = "/missing", .key_pem = "x"}}, error);
  EXPECT_EQ(error.code, boost::system::errc::no_such_file_or_directory);
  ClientTransport client(trusting());
  client.connect(server.url());
  EXPECT_EQ(client.session()->tls()->common_name, "first");
  server.transport.renew_tls(server.endpoint, {.identity = server_identity("second")}, error);
  EXPECT_FALSE(error);
}

TEST(TlsRenewal, OfWhatIsNoEncryptedListenerIsNotFound) {
  TestServer server;
  start(server);
  const Endpoint plain = server.transport.listen(tcp("127.0.0.1:0"));
  for (const Endpoint& one : {plain, tls("127.0.0.1:1"), over(Transport::tcp, server.endpoint)}) {
    std::string text;
    EXPECT_EQ(thrown([&] { server.transport.renew_tls(one, {.identity = server_identity()}); }, &text),
              Errc::not_found);
    EXPECT_TRUE(has(text, one.to_string()));
  }
}

TEST(Tls, ListeningWithWrongOptionsNamesOptionAndFile) {
  const auto directory = std::filesystem::temp_directory_path() / ("msgtrans-listen-" + std::to_string(::getpid()));
  std::filesystem::create_directory(directory);
  const auto file = [&](const char* name, const std::string& text) {
    const auto path = (directory / name).string();
    std::ofstream(path) << text;
    return path;
  };
  const auto own = server_identity();
  const auto certificate = file("certificate.pem", own.certificate_pem);
  const auto key = file("key.pem", own.key_pem);
  const auto other_key = file("other.pem", server_identity().key_pem);
  const auto missing = (directory / "missing.pem").string();
  TestServer server;
  server.echo();
  const auto refused = [&](TlsServerOptions tls_options, const error_code& code, std::vector<std::string> parts) {
    ListenOptions options;
    options.tls = std::move(tls_options);
    Error error;
    EXPECT_FALSE(server.transport.listen(tls("127.0.0.1:0"), options, error));
    EXPECT_EQ(error.code, code) << error.code.message();
    for (const auto& part : parts) EXPECT_TRUE(has(error.text, part));
  };
  const error_code invalid = make_error_code(Errc::invalid_option);
  const error_code no_file = make_error_code(boost::system::errc::no_such_file_or_directory);
  using boost::system::system_category;
  refused({.identity = {.certificate_file = missing, .key_file = key}}, {ENOENT, system_category()},
          {"certificate_file " + missing, no_file.message()});
  refused({.identity = {.certificate_file = certificate, .key_file = missing}}, {ENOENT, system_category()},
          {"key_file " + missing, no_file.message()});
  refused({.identity = {.certificate_file = directory.string(), .key_file = key}}, {EISDIR, system_category()},
          {"certificate_file " + directory.string()});
  refused({.identity = {.certificate_file = certificate, .key_file = other_key}}, invalid,
          {"key_file " + other_key, "does not belong", "certificate_file " + certificate, "CN=server"});
  refused({.identity = {.certificate_file = key, .key_file = key}}, invalid,
          {"certificate_file " + key + ": no certificate in PEM form"});
  refused({}, invalid, {"certificate_file and certificate_pem are both empty"});
  refused({.identity = {.certificate_file = certificate}}, invalid, {"key_file and key_pem are both empty"});
  refused({.identity = {.certificate_file = certificate, .certificate_pem = "x", .key_file = key}}, invalid,
          {"certificate_file and certificate_pem are both set"});
  refused({.identity = own, .client_certificates = ClientCertificates::required}, invalid,
          {"client_ca_file and client_ca_pem are both empty"});
  refused({.identity = own, .client_ca_pem = "x"}, invalid, {"client_ca_pem is set"});
  refused({.identity = own, .client_certificates = ClientCertificates::optional, .client_ca_file = missing},
          {ENOENT, system_category()}, {"client_ca_file " + missing});
  refused({.identity = own, .min_version = TlsVersion::tls1_3, .max_version = TlsVersion::tls1_2}, invalid,
          {"min_version is TLS 1.3"});
  EXPECT_TRUE(server.transport.endpoints().empty());
  ListenOptions right;
  right.tls.identity = {.certificate_file = certificate, .key_file = key};
  start(server, right);
  std::filesystem::remove_all(directory);
  expect_served(trusting(), server.url());
}

// --- peers that speak something else

TEST(TlsBesidePlain, ATlsClientAtAPlainListenerIsAnErrorAtBothEnds) {
  TestServer server;
  server.echo();
  start(server, {}, tcp("127.0.0.1:0"));
  const Error error = failure_of(trusting(), over(Transport::tls, server.endpoint).url());
  EXPECT_EQ(error.code, Errc::handshake_failed) << error.code.message();
  EXPECT_TRUE(has(error.text, "perhaps it does not speak TLS"));
  EXPECT_EQ(server.ends.at(0).code, Errc::bad_version);
  EXPECT_EQ(server.transport.stats().protocol_errors, 1U);
  expect_served({}, server.url());
}

TEST(TlsBesidePlain, APlainClientAtATlsListenerIsAnErrorAtBothEnds) {
  TestServer server;
  server.echo();
  start(server);
  const Record<Error> ends;
  ClientTransport client;
  client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
  client.connect(over(Transport::tcp, server.endpoint).url());
  Error error;
  (void)client.request("hello", {}, error);
  EXPECT_EQ(error.code, Errc::connection_lost) << error.message();
  EXPECT_TRUE(ends.at(0)) << "the session ended for no reason";
  EXPECT_NE(ends.at(0).message(), "");
  expect_handshake_failed(server, "what the peer sent is not TLS");
  EXPECT_EQ(server.came.size(), 0U);
  expect_served(trusting(), server.url());
}

TEST(TlsBesidePlain, HttpAtATlsListenerIsNamed) {
  TestServer server;
  server.echo();
  start(server);
  RawPeer peer(over(Transport::tcp, server.endpoint));
  peer.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_TRUE(peer.sees_end());
  expect_handshake_failed(server, "the peer speaks plain HTTP, not TLS");
  EXPECT_TRUE(has(server.errors.at(0).text, "127.0.0.1:" + std::to_string(peer.port())));
  expect_served(trusting(), server.url());
}

TEST(TlsBesidePlain, HttpAtAPlainListenerEndsTheSessionOnly) {
  TestServer server;
  server.echo();
  start(server, {}, tcp("127.0.0.1:0"));
  RawPeer peer(server.endpoint);
  peer.send("GET / HTTP/1.1\r\nHost: x\r\n\r\n");
  EXPECT_TRUE(peer.sees_end());
  EXPECT_EQ(server.ends.at(0).code, Errc::bad_version);
  EXPECT_TRUE(has(server.ends.at(0).text, "71"));  // G
  expect_served({}, server.url());
}

// --- ends

/// A server whose certificate every RawPeer trusts.
void start_trusted(TestServer& server, ListenOptions options = {}) {
  options.tls.identity = trusted_identity();
  start(server, std::move(options));
}

TEST(TlsEnd, OfTheSocketWithoutACloseNotifyIsATruncation) {
  TestServer server;
  server.echo();
  start_trusted(server);
  RawPeer peer(server.endpoint);
  peer.send(request(1, "x"));
  EXPECT_EQ(peer.next().payload, "x");
  peer.cut();
  EXPECT_EQ(server.ends.at(0).code, Errc::truncated) << server.ends.at(0).code.message();
  EXPECT_TRUE(has(server.ends.at(0).text, "bytes may be missing"));
}

TEST(TlsEnd, WithACloseNotifyIsThePeersClose) {
  TestServer server;
  server.echo();
  start_trusted(server);
  RawPeer peer(server.endpoint);
  peer.send(request(1, "x"));
  EXPECT_EQ(peer.next().payload, "x");
  peer.shut_sending();
  EXPECT_EQ(server.ends.at(0).code, Errc::closed_by_peer) << server.ends.at(0).code.message();
}

TEST(TlsEnd, OfTheServersSocketWithoutACloseNotifyIsATruncationForTheClient) {
  (void)trusted_identity();
  RawListener listener(16, 0, tls("127.0.0.1:0"));
  const Record<Error> ends;
  ClientTransport client;
  client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
  auto connected = std::async(std::launch::async, [&] {
    Error error;
    client.connect(listener.endpoint().url(), error);
    return error;
  });
  RawPeer peer = listener.accept();
  const Error error = in_time(connected);
  ASSERT_FALSE(error) << error.message();
  peer.cut();
  EXPECT_EQ(ends.at(0).code, Errc::truncated) << ends.at(0).code.message();
}

TEST(TlsEnd, ByARefusalIsNoTruncation) {
  TestServer server;
  server.transport.on_connect([](Session&) { return Admission::refuse("not you"); });
  start(server);
  const Error error = failure_of(trusting(), server.url());
  EXPECT_EQ(error.code, Errc::closed_by_peer) << error.message();
}

TEST(TlsEnd, OfTheServerIsToldToTheClient) {
  TestServer server;
  server.echo();
  start(server);
  const Record<Error> ends;
  ClientTransport client(trusting());
  client.on_disconnect([ends](Session&, const Error& reason) { ends.add(reason); });
  client.connect(server.url());
  ASSERT_TRUE(server.came.wait_for(1));
  EXPECT_TRUE(server.transport.stop(patience).clean());
  EXPECT_EQ(ends.at(0).code, Errc::closed_by_peer) << ends.at(0).code.message();
}

// --- handshakes that do not end

/// The beginning of a ClientHello.
constexpr std::string_view half_hello("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11);

TEST(TlsStall, HoldsAPlaceUntilTheTimeoutOnly) {
  TestServer server({.shards = 1, .max_sessions = 1});
  server.echo();
  start(server, {.handshake_timeout = 500ms});
  RawPeer staller(over(Transport::tcp, server.endpoint));
  staller.send(half_hello);
  RawPeer next(over(Transport::tcp, server.endpoint));
  EXPECT_TRUE(next.sees_end());
  EXPECT_EQ(server.errors.at(0).code, Errc::too_many_sessions);
  const End late = server.errors.at(1);
  EXPECT_EQ(late.code, Errc::handshake_timeout);
  EXPECT_TRUE(has(late.text, "127.0.0.1:" + std::to_string(staller.port())));
  EXPECT_TRUE(has(late.text, "the handshake was not finished within 500 ms: TLS handshake: "));
  expect_served(trusting(), server.url());
  EXPECT_TRUE(staller.sees_end());
  const auto stats = server.transport.stats();
  EXPECT_EQ(stats.handshake_failures, 1U);
  EXPECT_EQ(stats.sessions_refused, 1U);
  EXPECT_EQ(stats.sessions_total, 1U);
}

TEST(TlsStall, OfAServerEndsByTheClientsTimeout) {
  RawListener listener(16, 0, tcp("127.0.0.1:0"));
  auto options = trusting();
  options.connect_timeout = 100ms;
  ClientTransport client(options);
  Error error;
  client.connect(over(Transport::tls, listener.endpoint()).url(), error);
  EXPECT_EQ(error.code, boost::asio::error::timed_out) << error.message();
}

TEST(TlsStall, OfHundredsDisturbsNoSessionAndLeavesNothing) {
  constexpr std::size_t count = 300;
  TestServer server({.shards = 1});
  server.echo();
  start(server, {.handshake_timeout = 1s});
  ClientTransport client(trusting());
  client.connect(server.url());
  EXPECT_EQ(client.request("x").text(), "x");
  const std::size_t before = descriptors();
  std::vector<RawPeer> peers;
  peers.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    peers.emplace_back(over(Transport::tcp, server.endpoint));
    if (i % 2 == 0) peers.back().send(half_hello);
  }
  const auto deadline = Clock::now() + patience;
  while (server.transport.stats().handshake_failures < count) {
    ASSERT_EQ(client.request("x").text(), "x");
    ASSERT_LT(Clock::now(), deadline);
  }
  EXPECT_TRUE(server.errors.wait_for(count));
  const auto told = server.errors.all();
  EXPECT_EQ(told.size(), count);
  for (const End& one : told) EXPECT_EQ(one.code, Errc::handshake_timeout) << one.text;
  for (RawPeer& one : peers) EXPECT_TRUE(one.sees_end());
  peers.clear();
  EXPECT_TRUE(wait_until([&] { return descriptors() == before; })) << descriptors() << " of " << before;
  EXPECT_EQ(client.request("x").text(), "x");
  EXPECT_EQ(server.transport.stats().handshake_failures, count);
  EXPECT_EQ(server.transport.stats().sessions, 1U);
  EXPECT_EQ(server.transport.stats().sessions_total, 1U);
}

/// That many connections whose handshakes have begun, of a server with one shard that waits for them without end, and a
/// session.
std::vector<RawPeer> half_open(TestServer& server, ClientTransport& client, std::size_t count) {
  client.connect(server.url());
  EXPECT_TRUE(server.came.wait_for(1));
  const std::size_t before = descriptors();
  std::vector<RawPeer> peers;
  for (std::size_t i = 0; i < count; ++i) {
    peers.emplace_back(over(Transport::tcp, server.endpoint));
    if (i % 2 == 0) peers.back().send(half_hello);
  }
  EXPECT_TRUE(wait_until([&] { return descriptors() == before + 2 * count; })) << descriptors() << " " << before;
  return peers;
}

TEST(TlsStall, DoesNotDelayStopping) {
  TestServer server({.shards = 1});
  start(server, {.handshake_timeout = 0ms});
  ClientTransport client(trusting());
  auto peers = half_open(server, client, 20);
  const auto begin = Clock::now();
  EXPECT_TRUE(server.transport.stop(2 * patience).clean());
  EXPECT_LT(Clock::now() - begin, patience);
  for (RawPeer& one : peers) EXPECT_TRUE(one.sees_end());
  EXPECT_EQ(server.transport.stats().handshake_failures, 20U);
  EXPECT_EQ(server.came.size(), 1U);
  EXPECT_EQ(server.errors.size(), 20U);
  for (const End& one : server.errors.all()) EXPECT_EQ(one.code, Errc::stopping) << one.text;
}

TEST(TlsStall, DoesNotDelayDestroyingTheServer) {
  const auto before = descriptors();
  std::vector<RawPeer> peers;
  const auto begin = Clock::now();
  {
    ClientTransport client(trusting());
    TestServer server({.shards = 1, .drain = 2 * patience});
    start(server, {.handshake_timeout = 0ms});
    for (auto& one : half_open(server, client, 20)) peers.push_back(std::move(one));
  }
  EXPECT_LT(Clock::now() - begin, patience);
  for (RawPeer& one : peers) EXPECT_TRUE(one.sees_end());
  peers.clear();
  EXPECT_EQ(descriptors(), before);
  EXPECT_EQ(library_threads(), 0U);
}

TEST(TlsStall, OfAServerEndsWithTheClient) {
  RawListener listener(16, 0, tcp("127.0.0.1:0"));
  auto client = std::make_unique<ClientTransport>(trusting());
  auto promise = std::make_shared<std::promise<error_code>>();
  auto result = promise->get_future();
  client->async_connect(over(Transport::tls, listener.endpoint()).url(),
                        [promise](error_code code) { promise->set_value(code); });
  RawPeer peer = listener.accept();
  EXPECT_FALSE(peer.take(1).empty());  // of its ClientHello
  client.reset();
  EXPECT_TRUE(in_time(result));
  EXPECT_TRUE(peer.sees_end());
}

TEST(TlsStall, OfAServerEndsByCancelling) {
  RawListener listener(16, 0, tcp("127.0.0.1:0"));
  ClientTransport client(trusting());
  boost::asio::cancellation_signal cancel;
  auto promise = std::make_shared<std::promise<error_code>>();
  auto result = promise->get_future();
  client.async_connect(
      over(Transport::tls, listener.endpoint()).url(),
      boost::asio::bind_cancellation_slot(cancel.slot(), [promise](error_code code) { promise->set_value(code); }));
  RawPeer peer = listener.accept();
  EXPECT_FALSE(peer.take(1).empty());
  cancel.emit(boost::asio::cancellation_type::all);
  EXPECT_EQ(in_time(result), boost::asio::error::operation_aborted);
  EXPECT_TRUE(peer.sees_end());
}

// --- pools

TEST(Tls, ServesAPool) {
  TestServer server;
  server.echo();
  start(server);
  ConnectionPoolOptions options;
  options.url = server.url();
  options.max_connections = 2;
  options.acquire_timeout = patience;
  options.client = trusting();
  ConnectionPool pool(options);
  {
    auto first = pool.acquire();
    auto second = pool.acquire();
    EXPECT_EQ(first->request("a").text(), "a");
    EXPECT_EQ(second->request("b").text(), "b");
    EXPECT_TRUE(first->session()->tls()->verified);
  }
  EXPECT_EQ(pool.acquire()->request("c").text(), "c");
  EXPECT_EQ(pool.stats().made, 2U);
}

}  // namespace
}  // namespace msgtrans::test
