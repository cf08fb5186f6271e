// SPDX-License-Identifier: Apache-2.0
// A chat server with rooms, and the page to use it with: chat_server [--http HOST:PORT] [--ws HOST:PORT]
//
// The protocol. Payloads are JSON objects; biz_type says what they are. Clients ask, by requests:
//
//   1 hello    {"name"}            {"name","token","rooms":[{"room","members":3}..],"limits"}; before anything else
//              {"name","token"}    the same, and takes the name back from a connection that is not known to be dead yet
//   2 join     {"room"}            {"room","members":["Ada"..],"history":[message..]}; makes the room if there is none
//   3 leave    {"room"}            {}
//   4 say      {"room","text"}     {"id","time"}
//   5 whisper  {"to","text"}       {"delivered":true}, once the receiver's client has said so
//   6 rooms    {}                  {"rooms"}
//
// An answer has "ok":true, or is {"ok":false,"error","text"}: a word for programs and a sentence for people. What is
// sent one-way instead does the same; only its errors come back, as 20. The server tells clients, one-way:
//
//   16 message   {"room","id","from","text","time"}    was said in a room of theirs; time in ms since 1970
//   17 presence  {"room","name","event"}               "join", "leave" or "gone" (the connection ended)
//   18 room      {"room","members"}                    how many are in a room now, any room
//   20 error     {"ok":false,"error","text"}
//
// and asks them, by a request:
//
//   19 private   {"from","text","time"}                answered {"ok":true} when it was shown
#include "chat.hpp"
#include "static_files.hpp"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <exception>
#include <filesystem>
#include <iostream>
#include <memory>
#include <msgtrans/msgtrans.hpp>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

using namespace std::chrono_literals;

namespace {

struct Options {
  std::string http = "127.0.0.1:8080";
  std::string ws = "127.0.0.1:8002";
  std::optional<std::string> tcp;
  std::filesystem::path files = CHAT_FILES;
};

constexpr std::string_view usage =
    "chat_server [--http HOST:PORT] [--ws HOST:PORT] [--tcp HOST:PORT] [--files DIRECTORY]\n"
    "  --http   the page (default 127.0.0.1:8080); port 0 takes any that is free, here and below\n"
    "  --ws     what the page connects to (default 127.0.0.1:8002)\n"
    "  --tcp    the same chat for programs, over TCP (default: not)\n"
    "  --files  where the directories chat/web and web are\n";

/// Whether a page that names itself so was served by this machine, or under the host name that the page is served as.
bool is_own_page(std::string_view origin, std::string_view http) {
  const auto host_of = [](std::string_view authority) { return authority.substr(0, authority.rfind(':')); };
  if (!origin.starts_with("http://")) return false;
  const auto host = host_of(origin.substr(7));
  return host == "127.0.0.1" || host == "localhost" || host == "[::1]" || host == host_of(http);
}

class Server {
 public:
  Server() {
    server_.on_message(
        [this](msgtrans::Session& session, const msgtrans::Message& message) { take(session, message); });
    server_.on_disconnect(
        [this](msgtrans::Session& session, const msgtrans::Error&) { tell(chat_.gone(session.id())); });
  }

  int run(const Options& options) {
    // Pages from elsewhere may not chat in the name of whoever looks at them.
    const auto where = server_.listen(msgtrans::websocket(options.ws),
                                      {.websocket = {.check_origin = [http = options.http](std::string_view origin) {
                                         return origin.empty() || is_own_page(origin, http);
                                       }}});

    chat::StaticFiles files;
    const auto page = options.files / "chat" / "web";
    files.add_file("/", "text/html; charset=utf-8", page / "index.html");
    files.add_file("/index.html", "text/html; charset=utf-8", page / "index.html");
    files.add_file("/style.css", "text/css; charset=utf-8", page / "style.css");
    files.add_file("/chat.js", "text/javascript; charset=utf-8", page / "chat.js");
    files.add_file("/icon.svg", "image/svg+xml", page / "icon.svg");
    files.add_file("/msgtrans.js", "text/javascript; charset=utf-8", options.files / "web" / "msgtrans.js");
    files.add("/config.json", "application/json", nlohmann::json{{"ws", where.port}}.dump());
    files.allow_websocket(where.port);
    const std::string http = files.start(options.http);

    std::cout << "chat at " << where.url() << "\n";
    if (options.tcp) std::cout << "chat at " << server_.listen(msgtrans::tcp(*options.tcp)).url() << "\n";
    std::cout << "chat at http://" << http << "/" << std::endl;
    server_.run();
    const auto& counts = chat_.counts();
    std::cout << "served " << server_.stats().sessions_total << " sessions: " << counts.messages << " messages, "
              << counts.whispers << " private ones, " << delivered_ << " of them delivered; " << counts.refused
              << " refused" << std::endl;
    return 0;
  }

 private:
  void take(msgtrans::Session& session, const msgtrans::Message& message) {
    chat::Turn turn = chat_.ask(session.id(), message.biz_type(), message.text(), chat::Now::now());
    if (turn.whisper) {
      if (message.is_request()) {
        whisper(*turn.whisper, message.retain());
      } else {
        whisper(*turn.whisper, {});
      }
    } else if (message.is_request()) {
      session.respond(message, turn.answer);
    } else if (chat::is_refusal(turn.answer)) {
      session.send(turn.answer, {.biz_type = static_cast<std::uint8_t>(chat::Kind::error)});
    }
    tell(turn.news);
    if (turn.close) server_.close(turn.close->who, turn.close->reason);
  }

  // Who whispered is answered when the receiver has answered.
  void whisper(const chat::Whisper& whisper, msgtrans::OwnedMessage asked) {
    server_.async_request(whisper.to, whisper.json,
                          {.biz_type = static_cast<std::uint8_t>(chat::Kind::private_message), .timeout = 5s},
                          [this, asked = std::move(asked), name = whisper.name](const msgtrans::error_code& error,
                                                                                const msgtrans::Reply& reply) mutable {
                            const std::string answer = chat::delivered(!error, reply.text(), name);
                            if (!chat::is_refusal(answer)) ++delivered_;
                            asked.respond(answer);
                          });
  }

  // Never blocks: a client that does not read is closed when its queue is full.
  void tell(const std::vector<chat::News>& all) {
    for (const auto& news : all) {
      groups_.send(news.group, news.json, {.biz_type = static_cast<std::uint8_t>(news.kind)}, news.except);
    }
  }

  std::uint64_t delivered_ = 0;
  // One shard, so everything here runs on one thread, and the chat needs no lock.
  msgtrans::ServerTransport server_{{.shards = 1,
                                     .max_sessions = 1000,
                                     .session = {.max_payload = 1024 * 1024,  // a history is larger than a request
                                                 .max_decompressed = 64 * 1024,
                                                 .max_extension = 256,
                                                 .outbound_bytes = 256 * 1024,
                                                 .slow_consumer = msgtrans::SlowConsumer::close}}};
  msgtrans::Groups groups_ = server_.groups();
  chat::Chat chat_{groups_};  // run() returns when the server has stopped, so no handler needs it any more
};

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (name == "--help") {
      std::cout << usage;
      return 0;
    }
    const bool known = name == "--http" || name == "--ws" || name == "--tcp" || name == "--files";
    if (!known || i + 1 == argc) {
      std::cerr << "chat_server: " << name << (known ? " needs a value" : " is not known") << "\n" << usage;
      return 2;
    }
    const std::string value = argv[++i];
    if (name == "--http") options.http = value;
    if (name == "--ws") options.ws = value;
    if (name == "--tcp") options.tcp = value;
    if (name == "--files") options.files = value;
  }
  try {
    return Server().run(options);
  } catch (const std::exception& error) {
    std::cerr << "chat_server: " << error.what() << "\n";
    return 1;
  }
}
