// SPDX-License-Identifier: Apache-2.0
#include "support/fixture.hpp"

#include <boost/asio/error.hpp>
#include <stdexcept>

namespace msgtrans::test {
namespace {

/// A transport that does what the test says, and counts what is left of it.
class Scripted final : public CustomTransport {
 public:
  struct Plan {
    std::function<Connection::Status(Error&)> handshake = {};
    std::function<void()> read = {};
    bool throws_on_connect = false;
    bool answers = true;
    bool gives_nothing = false;
  };

  class Link final : public Connection {
   public:
    explicit Link(Plan plan) : plan_(std::move(plan)) { ++alive; }
    ~Link() override { --alive; }
    void attach(ReadySignal signal) override { signal_ = std::move(signal); }
    Status handshake() override {
      if (!plan_.handshake) return Status::done;
      Error error;
      const auto status = plan_.handshake(error);
      return status == Status::failed ? fail(error) : status;
    }
    Status read(std::span<std::byte>, std::size_t&) override {
      if (plan_.read) plan_.read();
      return Status::blocked;
    }
    Status write(std::span<const iovec> pieces, std::size_t& taken) override {
      for (const auto& piece : pieces) taken += piece.iov_len;
      return Status::done;
    }
    Status shut_down(const Error&) override { return Status::done; }
    [[nodiscard]] std::string describe_handshake() const override { return "the secret word"; }

    static inline std::atomic<int> alive{0};

   private:
    Plan plan_;
    ReadySignal signal_;
  };

  std::unique_ptr<CustomListener> listen(std::string_view address, const ListenOptions& options,
                                         Error& error) override {
    if (address == "throws") throw std::runtime_error("a listener that throws");
    if (address == "fails") {
      error = error_code(EACCES, boost::system::system_category());
      return nullptr;
    }
    backlog = options.backlog;
    return std::make_unique<Listener>(*this);
  }
  std::shared_ptr<void> connect(std::string_view, const detail::asio::any_io_executor&, Connected connected) override {
    if (plan.throws_on_connect) throw std::runtime_error("a transport that throws");
    if (plan.gives_nothing) {
      connected({}, nullptr);
      return nullptr;
    }
    if (plan.answers) {
      connected({}, std::make_unique<Link>(plan));
      return nullptr;
    }
    return std::make_shared<Connected>(std::move(connected));  // for ever
  }

  struct Listener final : CustomListener {
    explicit Listener(Scripted& transport) : owner(transport) {}
    ~Listener() override { owner.accept = nullptr; }
    [[nodiscard]] std::string address() const override { return "there-17"; }
    void start(const detail::asio::any_io_executor&, OnConnection on_connection, OnFailure on_failure) override {
      owner.accept = std::move(on_connection);
      owner.failed = std::move(on_failure);
      owner.started.add(1);
    }
    void stop() noexcept override { owner.stopped.add(1); }
    Scripted& owner;
  };

  Plan plan;
  int backlog = 0;
  CustomListener::OnConnection accept;
  CustomListener::OnFailure failed;
  Record<int> started, stopped;
};

std::shared_ptr<Scripted> registered(const std::string& scheme) {
  auto transport = std::make_shared<Scripted>();
  register_transport(scheme, transport);
  return transport;
}

TEST(CustomTransport, SchemeMustBeOneAndFree) {
  std::string text;
  const auto refused = [&](std::string_view scheme) {
    return thrown([&] { register_transport(scheme, std::make_shared<Scripted>()); }, &text);
  };
  EXPECT_EQ(refused(""), Errc::invalid_option);
  EXPECT_EQ(refused("9p"), Errc::invalid_option);
  EXPECT_EQ(refused("Pipe"), Errc::invalid_option);
  EXPECT_EQ(refused("a b"), Errc::invalid_option);
  EXPECT_EQ(refused("tcp"), Errc::invalid_option);
  EXPECT_EQ(refused("inproc"), Errc::invalid_option);
  EXPECT_NE(text.find("inproc"), std::string::npos) << text;
  EXPECT_EQ(thrown([] { register_transport("nothing", nullptr); }), Errc::invalid_option);
  EXPECT_FALSE(refused("scripted+1.x-y"));
  EXPECT_EQ(refused("scripted+1.x-y"), Errc::invalid_option);
}

TEST(CustomTransport, SchemeThatIsNotRegisteredIsNoAddress) {
  Error error;
  EXPECT_FALSE(parse_url("carrier-pigeon://roof", error));
  EXPECT_EQ(error.code, Errc::invalid_address);
  EXPECT_EQ(thrown([] { (void)custom("carrier-pigeon", "roof"); }), Errc::invalid_address);
}

TEST(CustomTransport, AddressIsWhatTheListenerSaysAndOptionsReachIt) {
  const auto transport = registered("scripted-address");
  TestServer server;
  const auto bound = server.transport.listen(custom("scripted-address", "anywhere"), {.backlog = 7});
  EXPECT_EQ(bound.url(), "scripted-address://there-17");
  EXPECT_EQ(transport->backlog, 7);
  server.transport.start();
  EXPECT_EQ(transport->started.at(0), 1);
  server.transport.stop(1s);
  EXPECT_EQ(transport->stopped.size(), 1U);
  EXPECT_FALSE(transport->accept);
}

TEST(CustomTransport, FailureToListenNamesTheUrl) {
  registered("scripted-listen");
  TestServer server;
  std::string text;
  EXPECT_EQ(thrown([&] { server.transport.listen(custom("scripted-listen", "fails")); }, &text),
            error_code(EACCES, boost::system::system_category()));
  EXPECT_NE(text.find("scripted-listen://fails"), std::string::npos) << text;
  EXPECT_TRUE(thrown([&] { server.transport.listen(custom("scripted-listen", "throws")); }, &text));
  EXPECT_NE(text.find("a listener that throws"), std::string::npos) << text;
}

TEST(CustomTransport, ExceptionsEndTheirAttemptOrSessionAndNothingElse) {
  const auto transport = registered("scripted-throw");
  ClientTransport client;
  Error error;
  transport->plan.throws_on_connect = true;
  client.connect("scripted-throw://x", error);
  EXPECT_NE(error.text.find("a transport that throws"), std::string::npos) << error.text;
  transport->plan = {
      .handshake = [](Error&) -> Connection::Status { throw std::runtime_error("a handshake that throws"); }};
  client.connect("scripted-throw://x", error);
  EXPECT_NE(error.text.find("a handshake that throws"), std::string::npos) << error.text;
  Record<End> ends;
  ClientTransport noting;
  noting.on_disconnect([ends](Session& session, const Error& reason) mutable {
    ends.add({session.id(), reason.code, reason.text});
  });
  transport->plan = {.read = [] { throw std::runtime_error("a read that throws"); }};
  noting.connect("scripted-throw://x", error);
  EXPECT_NE(ends.at(0).text.find("a read that throws"), std::string::npos) << ends.at(0).text;
  EXPECT_TRUE(wait_until([] { return Scripted::Link::alive == 0; }));
}

TEST(CustomTransport, HandshakeThatFailsSaysWhyAtBothEnds) {
  const auto transport = registered("scripted-fail");
  transport->plan.handshake = [](Error& error) {
    error = Error(Errc::handshake_failed, "the word was wrong");
    return Connection::Status::failed;
  };
  ClientTransport client;
  Error error;
  client.connect("scripted-fail://x", error);
  EXPECT_EQ(error.code, Errc::handshake_failed);
  EXPECT_NE(error.text.find("the word was wrong"), std::string::npos) << error.text;

  TestServer server;
  server.transport.listen(custom("scripted-fail", "x"));
  server.transport.start();
  (void)transport->started.at(0);
  transport->accept(std::make_unique<Scripted::Link>(transport->plan), "somebody");
  EXPECT_EQ(server.errors.at(0).code, Errc::handshake_failed);
  EXPECT_NE(server.errors.at(0).text.find("scripted-fail"), std::string::npos) << server.errors.at(0).text;
  EXPECT_TRUE(wait_until([&] { return server.transport.stats().handshake_failures == 1; }));
  EXPECT_EQ(server.came.size(), 0U);
}

TEST(CustomTransport, NeitherErrorNorConnectionIsAnErrorAllTheSame) {
  const auto transport = registered("scripted-nothing");
  transport->plan.gives_nothing = true;
  ClientTransport client;
  Error error;
  client.connect("scripted-nothing://x", error);
  EXPECT_EQ(error.code, Errc::handshake_failed);
  transport->plan = {.handshake = [](Error&) { return Connection::Status::failed; }};
  client.connect("scripted-nothing://x", error);
  EXPECT_EQ(error.code, Errc::handshake_failed);
  TestServer server;
  server.transport.listen(custom("scripted-nothing", "x"));
  server.transport.start();
  (void)transport->started.at(0);
  transport->accept(nullptr, "nobody");
  EXPECT_EQ(server.errors.at(0).code, Errc::handshake_failed);
  EXPECT_EQ(server.transport.stats().accept_failures, 1U);
  EXPECT_EQ(server.transport.listener_stats().at(0).accept_failures, 1U);
}

TEST(CustomTransport, HandshakeThatStallsFreesItsPlaceAtTheTimeout) {
  const auto transport = registered("scripted-stall");
  TestServer server({.max_sessions = 1});
  server.transport.listen(custom("scripted-stall", "x"), {.handshake_timeout = 50ms});
  server.transport.start();
  (void)transport->started.at(0);
  const Scripted::Plan stalls{.handshake = [](Error&) { return Connection::Status::blocked; }};
  transport->accept(std::make_unique<Scripted::Link>(stalls), "slow");
  EXPECT_EQ(server.errors.at(0).code, Errc::handshake_timeout);
  EXPECT_NE(server.errors.at(0).text.find("the secret word"), std::string::npos) << server.errors.at(0).text;
  transport->accept(std::make_unique<Scripted::Link>(Scripted::Plan{}), "quick");
  EXPECT_EQ(server.session().peer().path, "quick");
  transport->accept(std::make_unique<Scripted::Link>(Scripted::Plan{}), "one too many");
  EXPECT_EQ(server.errors.at(1).code, Errc::too_many_sessions);
}

TEST(CustomTransport, AttemptWithoutAnAnswerEndsAtTheConnectTimeoutAndIsGivenUp) {
  const auto transport = registered("scripted-silent");
  transport->plan.answers = false;
  ClientTransport client({.connect_timeout = 50ms});
  Error error;
  client.connect("scripted-silent://x", error);
  EXPECT_EQ(error.code, detail::asio::error::timed_out);
}

TEST(CustomTransport, FailureToAcceptIsCountedAndTold) {
  const auto transport = registered("scripted-accept");
  TestServer server;
  server.transport.listen(custom("scripted-accept", "x"));
  server.transport.start();
  (void)transport->started.at(0);
  transport->failed(Error(Errc::not_supported, "nobody can come in"));
  EXPECT_EQ(server.errors.at(0).text, "nobody can come in");
  EXPECT_EQ(server.transport.stats().accept_failures, 1U);
  EXPECT_EQ(server.transport.listener_stats().at(0).accept_failures, 1U);
}

}  // namespace
}  // namespace msgtrans::test
