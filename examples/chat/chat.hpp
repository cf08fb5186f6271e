// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <msgtrans/session/groups.hpp>
#include <msgtrans/session_id.hpp>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace chat {

using msgtrans::SessionId;

/// What a message is; its biz_type. See server.cpp for the protocol.
enum class Kind : std::uint8_t {
  hello = 1,
  join = 2,
  leave = 3,
  say = 4,
  whisper = 5,
  rooms = 6,
  message = 16,
  presence = 17,
  room = 18,
  private_message = 19,
  error = 20,
};

struct Limits {
  std::size_t name = 24;            ///< characters
  std::size_t text = 2000;          ///< characters
  std::size_t request = 32 * 1024;  ///< bytes; JSON may spell a character in 12
  std::size_t rooms_per_client = 8;
  std::size_t rooms = 64;
  std::size_t history = 50;
  double burst = 20;            ///< messages of a client at once
  double per_second = 5;        ///< and after that
  unsigned strikes = 100;       ///< messages refused for being too fast, in a row, before the client has to go
  unsigned name_attempts = 20;  ///< a client that guesses tokens has to go
};

struct Now {
  std::chrono::steady_clock::time_point steady;
  std::int64_t unix_ms = 0;
  static Now now();
};

/// To be sent to that group, but not to `except`.
struct News {
  std::string group;
  Kind kind;
  std::string json;
  SessionId except = {};
};

/// To be asked of the one it is meant for; what comes of it is the answer to who sent it.
struct Whisper {
  SessionId to;
  std::string name;
  std::string json;
};

struct Closing {
  SessionId who;
  std::string reason;
};

/// What comes of a message.
struct Turn {
  std::string answer;
  std::vector<News> news;
  std::optional<Whisper> whisper;
  std::optional<Closing> close;
};

struct Counts {
  std::uint64_t messages = 0;
  std::uint64_t whispers = 0;
  std::uint64_t refused = 0;
};

/// Who is there, in which rooms, and what was said. Knows no sockets: it is told what came, and says what is to be
/// sent. Rooms are groups of the server's sessions, and so is everybody who has a name. Not thread-safe.
class Chat {
 public:
  explicit Chat(msgtrans::Groups groups, Limits limits = {},
                std::vector<std::string> permanent_rooms = {"Lobby", "Help", "Random"});

  /// A client asks something (or says it one-way; then nobody hears the answer, unless it is an error).
  Turn ask(SessionId who, std::uint8_t kind, std::string_view payload, const Now& now);
  /// A client has gone.
  std::vector<News> gone(SessionId who);

  [[nodiscard]] const Counts& counts() const noexcept { return counts_; }
  [[nodiscard]] std::size_t room_count() const noexcept { return rooms_.size(); }

 private:
  using Json = nlohmann::ordered_json;

  struct Client {
    std::string name;  // empty until it has said hello
    std::string token;
    std::set<std::string> rooms;  // their keys; also when it has gone, and is in no group any more
    double allowance = 0;
    std::chrono::steady_clock::time_point refilled;
    unsigned strikes = 0;
    unsigned name_attempts = 0;
  };

  struct Room {
    std::string name;
    bool permanent = false;
    std::deque<Json> history;
    std::uint64_t last_id = 0;
    std::uint64_t used = 0;  // when, for the one that has been unused for longest
  };

  void hello(SessionId who, const Json& request, Turn& turn);
  void join(SessionId who, const Json& request, Turn& turn);
  void leave(SessionId who, const Json& request, Turn& turn);
  void say(SessionId who, const Json& request, const Now& now, Turn& turn);
  void whisper(SessionId who, const Json& request, const Now& now, Turn& turn);
  void leave_room(SessionId who, const std::string& key, std::string_view how, std::vector<News>& news);
  void take_over(SessionId old, Turn& turn);
  bool make_room(const std::string& key, const std::string& name);
  bool too_fast(Client& client, const Now& now);
  [[nodiscard]] Json room_list() const;
  [[nodiscard]] Json names_in(const std::string& key) const;
  [[nodiscard]] News room_news(const std::string& key) const;

  msgtrans::Groups groups_;
  Limits limits_;
  Counts counts_;
  std::map<SessionId, Client> clients_;
  std::map<std::string, SessionId> names_;  // by their keys: letters of ASCII in lower case
  std::map<std::string, Room> rooms_;       // the same
  std::uint64_t uses_ = 0;
};

/// The answer to who whispered, from what its receiver said; empty `reply` if it did not.
std::string delivered(bool answered, std::string_view reply, const std::string& name);

/// `{"ok":false,"error":code,"text":text}`
std::string refusal(std::string_view code, std::string_view text);

/// Whether an answer is a refusal.
bool is_refusal(std::string_view answer);

}  // namespace chat
