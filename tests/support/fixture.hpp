// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "raw_peer.hpp"
#include "wait.hpp"

#include <future>
#include <gtest/gtest.h>
#include <memory>
#include <msgtrans/msgtrans.hpp>
#include <optional>
#include <string>
#include <thread>
#include <utility>

namespace msgtrans::test {

/// How a session ended.
struct End {
  SessionId id;
  error_code code;
  std::string text;
};

/// A server on two shards (unless the options say otherwise) that notes who comes, who goes and what goes wrong. The
/// handlers of messages are the test's.
class TestServer {
 public:
  explicit TestServer(ServerOptions options = {}) : transport(two_shards(std::move(options))) {
    if (!has_socket(any_endpoint())) (void)SocketlessPeer::shard();  // whose thread is there before threads are counted
    transport.on_connect([came = came](Session& session) mutable { came.add(session.id()); });
    transport.on_disconnect([ends = ends](Session& session, const Error& reason) mutable {
      ends.add({session.id(), reason.code, reason.text});
    });
    transport.on_error([errors = errors](const ErrorEvent& event) mutable {
      errors.add({event.session, event.error.code, event.error.text});
    });
  }

  /// Listens and starts.
  TestServer& start(const ListenOptions& options = {}) {
    endpoint = transport.listen(any_endpoint(), any_listener(options));
    transport.start();
    return *this;
  }
  TestServer& echo() {
    transport.on_message([](Session& session, const Message& message) {
      if (message.is_request()) {
        session.respond(message, message.payload(), message.extension());
      } else {
        session.send(message.payload(), {.biz_type = message.biz_type(), .extension = message.extension()});
      }
    });
    return *this;
  }
  [[nodiscard]] std::string url() const { return endpoint.url(); }
  /// The only session, as soon as it is there.
  [[nodiscard]] Session session() const {
    const auto found = transport.session_manager().get(came.at(0));
    if (!found) throw std::runtime_error("no such session");
    return *found;
  }
  /// The session of that peer, as soon as it is there.
  [[nodiscard]] Session session(const RawPeer& peer) const {
    std::optional<Session> found;
    const bool there = wait_until([&] {
      transport.session_manager().for_each([&](Session& session) {
        if (peer.is(session.peer())) found = session;
      });
      return found.has_value();
    });
    if (!there) throw std::runtime_error("no session of that peer");
    return *found;
  }

  Record<SessionId> came;
  Record<End> ends;
  Record<End> errors;
  Endpoint endpoint;
  ServerTransport transport;

 private:
  static ServerOptions two_shards(ServerOptions options) {
    if (options.shards == 0 && options.executors.empty()) options.shards = 2;
    return options;
  }
};

/// The result, unless it does not come in time: then a default one, and the test has failed.
template <class T>
T in_time(std::future<T>& result) {
  if (result.wait_for(patience) != std::future_status::ready) {
    ADD_FAILURE() << "an operation does not complete";
    return T{};
  }
  return result.get();
}
template <class T>
T in_time(std::future<T>&& result) {
  return in_time(result);
}

/// A request under way to a session, or by way of a client: its code and its answer.
using Answer = std::future<std::pair<error_code, Reply>>;
template <class To>
Answer ask(To& to, BytesView payload, const RequestOptions& options = {}) {
  auto promise = std::make_shared<std::promise<std::pair<error_code, Reply>>>();
  auto answer = promise->get_future();
  to.async_request(payload, options, [promise](error_code code, Reply reply) {
    promise->set_value({code, std::move(reply)});
  });
  return answer;
}
template <class To>
std::future<error_code> submit(To& to, BytesView payload, const SendOptions& options = {}) {
  auto promise = std::make_shared<std::promise<error_code>>();
  auto done = promise->get_future();
  to.async_send(payload, options, [promise](error_code code) { promise->set_value(code); });
  return done;
}

/// Sends until the queue is full and stays so: until the system's own buffers take nothing more either.
/// \returns how many messages were taken.
inline std::size_t fill(Session& session, BytesView payload, std::chrono::milliseconds quiet = 200ms) {
  std::size_t taken = 0;
  for (auto last = Clock::now(); Clock::now() - last < quiet; std::this_thread::sleep_for(1ms)) {
    for (; session.send(payload) == SendResult::queued; ++taken) last = Clock::now();
  }
  return taken;
}

/// The code of the Exception that `call` throws; no error if it throws none.
template <class Call>
error_code thrown(Call call, std::string* text = nullptr) {
  try {
    call();
  } catch (const Exception& exception) {
    if (text != nullptr) *text = exception.what();
    return exception.code();
  }
  return {};
}

inline std::string pattern(std::size_t size, unsigned seed = 1) {
  std::string text(size, '\0');
  unsigned state = seed * 2654435761U + 1;
  for (char& c : text) {
    state = state * 1664525U + 1013904223U;
    c = static_cast<char>(state >> 24);
  }
  return text;
}

}  // namespace msgtrans::test
