// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"
#include "support/process.hpp"
#include "support/server_process.hpp"

#include <filesystem>
#include <fstream>
#include <set>
#include <sys/stat.h>

namespace msgtrans::test {
namespace {

/// A directory of the test's own.
class UnixSocket : public ::testing::Test {
 protected:
  UnixSocket() {
    std::string name = (std::filesystem::temp_directory_path() / "msgtrans-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp");
    directory_ = name;
  }
  ~UnixSocket() override { std::filesystem::remove_all(directory_); }

  [[nodiscard]] Endpoint file(const char* name = "socket") const { return unix_socket((directory_ / name).string()); }
  static bool exists(const Endpoint& endpoint) {
    struct stat found {};
    return ::lstat(endpoint.path.c_str(), &found) == 0;
  }
  static unsigned mode(const Endpoint& endpoint) {
    struct stat found {};
    EXPECT_EQ(::lstat(endpoint.path.c_str(), &found), 0);
    return found.st_mode & 0777U;
  }
  /// What a server leaves behind that was killed.
  static void leave_stale(const Endpoint& endpoint) {
    const int socket = ::socket(AF_UNIX, SOCK_STREAM, 0);
    const SocketAddress address(endpoint);
    ASSERT_EQ(::bind(socket, address.data(), address.size()), 0);
    ASSERT_EQ(::listen(socket, 1), 0);
    ::close(socket);
  }
  static void expect_answers(const Endpoint& endpoint) {
    ClientTransport client;
    client.connect(endpoint.url());
    EXPECT_EQ(client.request("hello").text(), "hello");
  }

  std::filesystem::path directory_;
};

TEST_F(UnixSocket, OfAFileServesAndIsRemovedWhenTheServerStops) {
  TestServer server;
  server.echo();
  EXPECT_EQ(server.transport.listen(file()), file());
  server.transport.start();
  EXPECT_EQ(file().url(), "unix://" + file().path);
  expect_answers(file());
  EXPECT_TRUE(exists(file()));
  server.transport.stop(0ms);
  EXPECT_FALSE(exists(file()));
  ClientTransport late;
  std::string text;
  EXPECT_EQ(thrown([&] { late.connect(file().url()); }, &text), boost::system::errc::no_such_file_or_directory);
  EXPECT_NE(text.find(file().path), std::string::npos) << text;
}

TEST_F(UnixSocket, OfAServerThatNeverStartedIsRemovedToo) {
  {
    ServerTransport server;
    server.listen(file());
    EXPECT_TRUE(exists(file()));
  }
  EXPECT_FALSE(exists(file()));
}

TEST_F(UnixSocket, OfAnAbstractNameServesWithoutAFile) {
  TestServer server;
  server.echo();
  const auto endpoint = server.transport.listen(unix_socket(unused_name()));
  server.transport.start();
  expect_answers(endpoint);
  EXPECT_FALSE(std::filesystem::exists(endpoint.path));
  ServerTransport other;
  std::string text;
  EXPECT_EQ(thrown([&] { other.listen(endpoint); }, &text), boost::system::errc::address_in_use);
  EXPECT_NE(text.find(endpoint.path), std::string::npos) << text;
}

TEST_F(UnixSocket, LeftByADeadServerIsReplaced) {
  leave_stale(file());
  ASSERT_TRUE(exists(file()));
  TestServer server;
  server.echo();
  server.transport.listen(file());
  server.transport.start();
  expect_answers(file());
}

TEST_F(UnixSocket, OfALivingServerIsAnErrorAndStaysItsOwn) {
  TestServer server;
  server.echo();
  server.transport.listen(file());
  server.transport.start();
  {
    ServerTransport other;
    EXPECT_EQ(thrown([&] { other.listen(file()); }), boost::system::errc::address_in_use);
  }
  expect_answers(file());
}

TEST_F(UnixSocket, DoesNotReplaceWhatIsNoSocket) {
  std::ofstream(file().path) << "precious";
  std::filesystem::create_symlink(file().path, file("link").path);
  for (const char* name : {"socket", "link"}) {
    ServerTransport server;
    EXPECT_EQ(thrown([&] { server.listen(file(name)); }), boost::system::errc::address_in_use);
  }
  std::string content;
  std::ifstream(file().path) >> content;
  EXPECT_EQ(content, "precious");
}

TEST_F(UnixSocket, RemovesNoFileThatSomebodyElsePutInItsPlace) {
  {
    ServerTransport server;
    server.listen(file());
    std::filesystem::remove(file().path);
    leave_stale(file());
  }
  EXPECT_TRUE(exists(file()));
}

TEST_F(UnixSocket, HasThePermissionsAskedForOrTheUmasks) {
  const auto old = ::umask(027);
  ServerTransport server;
  server.listen(file(), {.permissions = 0600});
  server.listen(file("other"));
  server.listen(file("open"), {.permissions = 0777});
  ::umask(old);
  EXPECT_EQ(mode(file()), 0600U);
  EXPECT_EQ(mode(file("other")), 0750U);
  EXPECT_EQ(mode(file("open")), 0777U);
  std::string text;
  EXPECT_EQ(thrown([&] { server.listen(file("none"), {.permissions = 01000}); }, &text), Errc::invalid_option);
  EXPECT_NE(text.find("permissions"), std::string::npos) << text;
  EXPECT_FALSE(exists(file("none")));
}

TEST_F(UnixSocket, ShowsOnConnectWhosProcessIsThere) {
  ServerTransport server;
  Record<std::pair<std::optional<PeerCredentials>, Endpoint>> came;
  server.on_connect([came](Session& session) { came.add({session.peer_credentials(), session.peer()}); });
  const auto tcp_endpoint = server.listen(tcp("127.0.0.1:0"));
  server.listen(file());
  server.start();
  ClientTransport client;
  client.connect(file().url());
  const auto [credentials, peer] = came.at(0);
  EXPECT_EQ(credentials, (PeerCredentials{::getpid(), ::getuid(), ::getgid()}));
  EXPECT_EQ(peer, (Endpoint{.transport = Transport::unix_socket}));
  ASSERT_TRUE(client.session());
  EXPECT_EQ(client.session()->peer(), file());
  EXPECT_EQ(client.session()->peer_credentials(), credentials);
  const RawPeer named(file());
  EXPECT_TRUE(named.is(came.at(1).second));
  ClientTransport other;
  other.connect(tcp_endpoint.url());
  EXPECT_FALSE(came.at(2).first);
}

TEST_F(UnixSocket, DealsItsSessionsOutToTheShards) {
  ServerTransport server({.shards = 3});
  Record<std::thread::id> threads;
  server.on_connect([threads](Session&) { threads.add(std::this_thread::get_id()); });
  server.listen(file());
  server.start();
  std::vector<std::unique_ptr<RawPeer>> peers;
  for (int i = 0; i < 9; ++i) peers.push_back(std::make_unique<RawPeer>(file()));
  ASSERT_TRUE(threads.wait_for(9));
  std::multiset<std::thread::id> all;
  for (const auto& one : threads.all()) all.insert(one);
  for (const auto& one : all) EXPECT_EQ(all.count(one), 3U);
}

TEST_F(UnixSocket, IsNotCountedByTheLimitForAnAddressButByTheWhole) {
  TestServer server({.max_sessions = 2, .max_sessions_per_address = 1});
  server.echo();
  server.transport.listen(file());
  server.transport.start();
  const RawPeer first(file()), second(file());
  ASSERT_TRUE(server.came.wait_for(2));
  RawPeer third(file());
  EXPECT_TRUE(third.sees_end());
  EXPECT_EQ(server.errors.at(0).code, Errc::too_many_sessions);
  EXPECT_NE(server.errors.at(0).text.find("@msgtrans-test"), std::string::npos) << server.errors.at(0).text;
}

TEST_F(UnixSocket, ConnectingWaitsWhileTheServersQueueIsFull) {
  TestServer server;
  server.echo();
  server.transport.listen(file(), {.backlog = 1});  // bound and listening, but nobody accepts yet
  std::vector<std::unique_ptr<ClientTransport>> clients;
  std::vector<std::future<error_code>> results;
  for (int i = 0; i < 8; ++i) {
    clients.push_back(std::make_unique<ClientTransport>());
    auto promise = std::make_shared<std::promise<error_code>>();
    results.push_back(promise->get_future());
    clients.back()->async_connect(file().url(), [promise](error_code code) { promise->set_value(code); });
  }
  ClientTransport hasty({.connect_timeout = 50ms});
  std::string text;
  EXPECT_EQ(thrown([&] { hasty.connect(file().url()); }, &text), boost::asio::error::timed_out) << text;
  server.transport.start();
  for (auto& one : results) EXPECT_EQ(in_time(one), error_code());
  for (auto& one : clients) EXPECT_EQ(one->request("x").text(), "x");
}

TEST_F(UnixSocket, NamesWhatIsWrongWithAPath) {
  const auto text_of = [](std::string_view path) {
    std::string text;
    EXPECT_EQ(thrown([&] { (void)unix_socket(path); }, &text), Errc::invalid_address) << path;
    return text;
  };
  EXPECT_NE(text_of("").find("no path"), std::string::npos);
  EXPECT_NE(text_of("@").find("no path"), std::string::npos);
  EXPECT_NE(text_of(std::string(108, 'x')).find("107"), std::string::npos);
  EXPECT_EQ(unix_socket(std::string(107, 'x')).path.size(), 107U);
  Error error;
  EXPECT_FALSE(parse_url(std::string_view("unix://a\0b", 10), error));
  EXPECT_NE(error.text.find("zero byte"), std::string::npos);
  EXPECT_FALSE(parse_url("unix://", error));
  EXPECT_EQ(error.code, Errc::invalid_address);
  EXPECT_EQ(parse_url("unix:///run/x", error), unix_socket("/run/x"));
  EXPECT_EQ(parse_url("unix://@x", error), unix_socket("@x"));

  ServerTransport server;
  std::string text;
  EXPECT_EQ(thrown([&] { server.listen(unix_socket((directory_ / "missing" / "socket").string())); }, &text),
            boost::system::errc::no_such_file_or_directory);
  EXPECT_NE(text.find("missing/socket"), std::string::npos) << text;
}

TEST_F(UnixSocket, ThatNobodyListensOnIsRefused) {
  leave_stale(file());
  ClientTransport client;
  std::string text;
  EXPECT_EQ(thrown([&] { client.connect(file().url()); }, &text), boost::system::errc::connection_refused);
  EXPECT_NE(text.find(file().path), std::string::npos) << text;
}

}  // namespace
}  // namespace msgtrans::test
