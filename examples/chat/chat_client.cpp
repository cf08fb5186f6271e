// SPDX-License-Identifier: Apache-2.0
// The chat for a terminal: chat_client URL NAME [ROOM]
//
// Prints what is said in the room, and says there each line of its input; "/to NAME TEXT" tells it to one person alone.
// At the end of the input it leaves. The protocol is at the head of server.cpp.
#include "chat.hpp"

#include <cstdlib>
#include <exception>
#include <future>
#include <iomanip>
#include <iostream>
#include <msgtrans/msgtrans.hpp>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <syncstream>
#include <utility>

namespace {

using chat::Kind;
using Json = nlohmann::json;

constexpr std::string_view usage =
    "chat_client URL NAME [ROOM]\n"
    "  URL   of the chat, say ws://127.0.0.1:8002/ or tcp://127.0.0.1:8001\n"
    "  ROOM  default Lobby\n"
    "Each line of the input is said in the room; /to NAME TEXT is for one person (\"NAME\" if there are spaces in "
    "it).\n";

struct Refused : std::runtime_error {
  using runtime_error::runtime_error;
};

Json answer_of(const msgtrans::Reply& reply) {
  Json answer = Json::parse(reply.text());
  if (answer.at("ok") != true) throw Refused(answer.at("text").get<std::string>());
  return answer;
}

// Two threads print. What has several lines is indented, so that none of them looks like the words of somebody else.
void print(std::string line) {
  for (auto at = line.find('\n'); at != std::string::npos; at = line.find('\n', at + 1)) line.insert(at + 1, "  ");
  std::osyncstream(std::cout) << line << std::endl;
}

void print_message(const Json& message) {
  print(message.at("from").get<std::string>() + ": " + message.at("text").get<std::string>());
}

class ChatClient {
 public:
  ChatClient(std::string name, std::string room) : name_(std::move(name)), room_(std::move(room)) {
    client_.on_message(
        [this](msgtrans::Session& session, const msgtrans::Message& message) { hear(session, message); });
    client_.on_disconnect([](msgtrans::Session&, const msgtrans::Error& reason) {
      if (reason.code == msgtrans::Errc::closed_by_user) return;
      print("* the connection has ended: " + reason.message());
      std::quick_exit(1);  // the other thread waits for input, and nothing else wakes it
    });
  }

  void run(const std::string& url) {
    client_.connect(url);
    ask(Kind::hello, {{"name", name_}});
    join();
    for (std::string line; std::getline(std::cin, line);) {
      try {
        take(line);
      } catch (const Refused& refused) {
        print(std::string("! ") + refused.what());
      }
    }
    ask(Kind::leave, {{"room", room_}});
    client_.close();
  }

 private:
  Json ask(Kind kind, const Json& fields) {
    return answer_of(client_.request(to_text(fields), {.biz_type = static_cast<std::uint8_t>(kind)}));
  }

  // With a callback: it runs on the thread of `hear`, so what was said before is printed before what is said from now
  // on.
  void join() {
    std::promise<void> promise;
    auto joined = promise.get_future();
    client_.async_request(
        to_text({{"room", room_}}), {.biz_type = static_cast<std::uint8_t>(Kind::join)},
        [promise = std::move(promise)](const msgtrans::error_code& error, const msgtrans::Reply& reply) mutable {
          try {
            if (error) throw msgtrans::Exception(error);
            print_room(answer_of(reply));
            promise.set_value();
          } catch (...) {
            promise.set_exception(std::current_exception());
          }
        });
    joined.get();
  }

  static void print_room(const Json& room) {
    for (const Json& message : room.at("history")) print_message(message);
    std::string members;
    for (const Json& member : room.at("members")) members += (members.empty() ? "" : ", ") + member.get<std::string>();
    print("* in " + room.at("room").get<std::string>() + ": " + members);
  }

  void take(const std::string& line) {
    if (line.empty()) return;
    if (line.front() != '/') {
      ask(Kind::say, {{"room", room_}, {"text", line}});
      return;
    }
    std::istringstream words(line);
    std::string command, to, text;
    words >> command >> std::quoted(to) >> std::ws;
    std::getline(words, text);
    if (command != "/to" || text.empty()) throw Refused("there is only /to NAME TEXT");
    ask(Kind::whisper, {{"to", to}, {"text", text}});  // answered when it has been shown
    print("* delivered to " + to);
  }

  void hear(msgtrans::Session& session, const msgtrans::Message& message) {
    const Json news = Json::parse(message.text());
    switch (static_cast<Kind>(message.biz_type())) {
      case Kind::message:
        if (news.at("from") != name_) print_message(news);
        break;
      case Kind::presence:
        print("* " + news.at("name").get<std::string>() + " " + what_happened(news.at("event")));
        break;
      case Kind::private_message:
        print(news.at("from").get<std::string>() + " to you alone: " + news.at("text").get<std::string>());
        session.respond(message, R"({"ok":true})");
        break;
      default: break;
    }
  }

  static std::string what_happened(const Json& event) {
    if (event == "join") return "came in";
    return event == "leave" ? "left" : "has gone offline";
  }

  static std::string to_text(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

  const std::string name_;
  const std::string room_;
  msgtrans::ClientTransport client_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "--help") {
    std::cout << usage;
    return 0;
  }
  if (argc < 3 || argc > 4) {
    std::cerr << usage;
    return 2;
  }
  try {
    ChatClient(argv[2], argc == 4 ? argv[3] : "Lobby").run(argv[1]);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "chat_client: " << error.what() << "\n";
    return 1;
  }
}
