// SPDX-License-Identifier: Apache-2.0
#include "chat.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

namespace chat {

namespace {

using Json = nlohmann::ordered_json;

/// Thrown within a turn; becomes its answer.
struct Refused {
  std::string code;
  std::string text;
};

std::string to_text(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Names that differ in the case of ASCII letters only are the same.
std::string key_of(std::string_view name) {
  std::string key(name);
  for (char& c : key) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return key;
}

// The code points of valid UTF-8, which the JSON parser has checked.
template <class F>
void for_each_character(std::string_view text, F f) {
  for (std::size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const std::size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    constexpr std::array<unsigned, 5> masks{0, 0x7f, 0x1f, 0x0f, 0x07};
    char32_t character = lead & masks[length];
    for (std::size_t k = 1; k < length && i + k < text.size(); ++k) {
      character = (character << 6) | (static_cast<unsigned char>(text[i + k]) & 0x3fU);
    }
    f(character);
    i += length;
  }
}

// Controls, and what is not seen but changes what is: marks of direction, spaces of no width, tags.
bool is_invisible(char32_t c) {
  return c < 0x20 || (c >= 0x7f && c < 0xa0) || c == 0xad || c == 0x61c || c == 0x115f || c == 0x1160 || c == 0x3164 ||
         (c >= 0x200b && c <= 0x200f) || (c >= 0x2028 && c <= 0x202e) || (c >= 0x2060 && c <= 0x206f) || c == 0xfeff ||
         c == 0xffa0 || (c >= 0xfff9 && c <= 0xfffb) || (c >= 0xe0000 && c <= 0xe0fff);
}

// In texts some of those are of use: line ends, and the joiners of emoji and scripts.
bool is_allowed_in_text(char32_t c) {
  return c == '\n' || c == '\t' || c == 0x200c || c == 0x200d || (c >= 0xe0020 && c <= 0xe007f) || !is_invisible(c);
}

bool is_space(char32_t c) {
  return c == ' ' || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x202f || c == 0x205f ||
         c == 0x3000;
}

std::string field(const Json& request, const char* name) {
  const auto found = request.find(name);
  if (found == request.end()) throw Refused{"bad_field", std::string("\"") + name + "\" is missing"};
  if (!found->is_string()) throw Refused{"bad_field", std::string("\"") + name + "\" is not a string"};
  return found->get<std::string>();
}

// A name of somebody or of a room.
std::string name_field(const Json& request, const char* field_name, const char* code, std::size_t limit) {
  std::string name = field(request, field_name);
  std::size_t length = 0;
  bool invisible = false, space_before = true, spaces = false;
  for_each_character(name, [&](char32_t c) {
    ++length;
    invisible = invisible || is_invisible(c);
    const bool space = is_space(c);
    spaces = spaces || (space && (c != ' ' || space_before));
    space_before = space;
  });
  if (length == 0) throw Refused{code, "a name needs at least one character"};
  if (length > limit) throw Refused{code, "a name may have " + std::to_string(limit) + " characters"};
  if (invisible) throw Refused{code, "a name may have no invisible characters"};
  if (spaces || space_before) throw Refused{code, "a name may have single spaces, and only between words"};
  return name;
}

std::string text_field(const Json& request, std::size_t limit) {
  std::string text = field(request, "text");
  std::size_t length = 0;
  bool seen = false, allowed = true;
  for_each_character(text, [&](char32_t c) {
    ++length;
    seen = seen || !(is_invisible(c) || is_space(c));
    allowed = allowed && is_allowed_in_text(c);
  });
  if (!seen) throw Refused{"bad_text", "there is nothing in it"};
  if (length > limit) throw Refused{"bad_text", "a text may have " + std::to_string(limit) + " characters"};
  if (!allowed) throw Refused{"bad_text", "a text may have no control characters but line ends and tabs"};
  return text;
}

std::string new_token() {
  std::random_device random;
  std::string token;
  for (int i = 0; i < 32; ++i) token += "0123456789abcdef"[random() & 15U];
  return token;
}

// The groups.
constexpr const char* everybody = "everybody";
std::string members_of(const std::string& key) {
  return "room " + key;
}

}  // namespace

Now Now::now() {
  const auto since = std::chrono::system_clock::now().time_since_epoch();
  return {std::chrono::steady_clock::now(), std::chrono::duration_cast<std::chrono::milliseconds>(since).count()};
}

std::string refusal(std::string_view code, std::string_view text) {
  return to_text({{"ok", false}, {"error", code}, {"text", text}});
}

bool is_refusal(std::string_view answer) {
  return answer.starts_with(R"({"ok":false)");
}

std::string delivered(bool answered, std::string_view reply, const std::string& name) {
  if (!answered) return refusal("not_delivered", name + " did not answer");
  const Json json = Json::parse(reply, nullptr, false);
  const auto ok = json.is_object() ? json.find("ok") : json.end();
  if (!json.is_object() || ok == json.end() || *ok != true) return refusal("not_delivered", name + " did not take it");
  return to_text({{"ok", true}, {"delivered", true}});
}

Chat::Chat(msgtrans::Groups groups, Limits limits, std::vector<std::string> permanent_rooms)
    : groups_(std::move(groups)), limits_(limits) {
  for (auto& name : permanent_rooms) rooms_[key_of(name)] = Room{name, true, {}, 0, 0};
}

Turn Chat::ask(SessionId who, std::uint8_t kind, std::string_view payload, const Now& now) {
  Turn turn;
  const auto [it, is_new] = clients_.try_emplace(who);
  Client& client = it->second;
  if (is_new) {
    client.allowance = limits_.burst;
    client.refilled = now.steady;
  }
  try {
    if (too_fast(client, now)) {
      if (client.strikes >= limits_.strikes) turn.close = Closing{who, "too fast for too long"};
      throw Refused{"too_fast", "that was too much at once; wait a moment"};
    }
    if (payload.size() > limits_.request)
      throw Refused{"too_long", "a request may have " + std::to_string(limits_.request) + " bytes"};
    const Json request = Json::parse(payload, nullptr, false);
    if (request.is_discarded()) throw Refused{"bad_json", "the payload is no JSON in UTF-8"};
    if (!request.is_object()) throw Refused{"bad_json", "the payload is no JSON object"};
    if (kind < 1 || kind > 6) throw Refused{"unknown_kind", "there is no request of kind " + std::to_string(kind)};
    if (client.name.empty() && kind != static_cast<std::uint8_t>(Kind::hello)) {
      throw Refused{"hello_first", "say hello first, with a name"};
    }
    switch (static_cast<Kind>(kind)) {
      case Kind::hello: hello(who, request, turn); break;
      case Kind::join: join(who, request, turn); break;
      case Kind::leave: leave(who, request, turn); break;
      case Kind::say: say(who, request, now, turn); break;
      case Kind::whisper: whisper(who, request, now, turn); break;
      default: turn.answer = to_text({{"ok", true}, {"rooms", room_list()}}); break;
    }
  } catch (const Refused& refused) {
    ++counts_.refused;
    turn.answer = refusal(refused.code, refused.text);
  }
  return turn;
}

std::vector<News> Chat::gone(SessionId who) {
  std::vector<News> news;
  const auto it = clients_.find(who);
  if (it == clients_.end()) return news;
  for (const auto rooms = it->second.rooms; const auto& key : rooms) leave_room(who, key, "gone", news);
  if (!it->second.name.empty()) names_.erase(key_of(it->second.name));
  groups_.leave_all(who);  // who is told to go may still be there
  clients_.erase(it);
  return news;
}

void Chat::hello(SessionId who, const Json& request, Turn& turn) {
  Client& client = clients_[who];
  if (!client.name.empty()) throw Refused{"already_named", "you are " + client.name + " already"};
  const std::string name = name_field(request, "name", "bad_name", limits_.name);
  const std::string key = key_of(name);
  if (const auto taken = names_.find(key); taken != names_.end()) {
    // Who lost a connection that is not known to be dead yet takes its name back with the token.
    const auto token = request.find("token");
    if (token == request.end() || *token != clients_[taken->second].token) {
      if (++client.name_attempts >= limits_.name_attempts) turn.close = Closing{who, "too many names tried"};
      throw Refused{"name_taken", "somebody is called " + name + " already"};
    }
    take_over(taken->second, turn);
  }
  client.name = name;
  client.token = new_token();
  names_[key] = who;
  groups_.join(everybody, who);
  turn.answer = to_text({{"ok", true},
                         {"name", name},
                         {"token", client.token},
                         {"rooms", room_list()},
                         {"limits",
                          {{"name", limits_.name},
                           {"text", limits_.text},
                           {"rooms", limits_.rooms_per_client},
                           {"history", limits_.history}}}});
}

void Chat::take_over(SessionId old, Turn& turn) {
  turn.close = Closing{old, "the same user has connected again"};
  for (auto& news : gone(old)) turn.news.push_back(std::move(news));
}

void Chat::join(SessionId who, const Json& request, Turn& turn) {
  Client& client = clients_[who];
  const std::string name = name_field(request, "room", "bad_room", limits_.name);
  const std::string key = key_of(name);
  const bool is_new = !client.rooms.contains(key);
  if (is_new && client.rooms.size() >= limits_.rooms_per_client) {
    throw Refused{"too_many_rooms", "you are in " + std::to_string(client.rooms.size()) + " rooms; leave one first"};
  }
  if (!rooms_.contains(key) && !make_room(key, name)) {
    throw Refused{"no_more_rooms", "there are as many rooms as there can be, and somebody is in each"};
  }
  Room& room = rooms_[key];
  room.used = ++uses_;
  client.rooms.insert(key);
  groups_.join(members_of(key), who);
  Json history = Json::array();
  for (const auto& message : room.history) history.push_back(message);
  turn.answer = to_text({{"ok", true}, {"room", room.name}, {"members", names_in(key)}, {"history", history}});
  if (!is_new) return;
  turn.news.push_back(
      {members_of(key), Kind::presence, to_text({{"room", room.name}, {"name", client.name}, {"event", "join"}}), who});
  turn.news.push_back(room_news(key));
}

void Chat::leave(SessionId who, const Json& request, Turn& turn) {
  const std::string key = key_of(field(request, "room"));
  if (!clients_[who].rooms.contains(key)) throw Refused{"not_in_room", "you are not in that room"};
  leave_room(who, key, "leave", turn.news);
  turn.answer = to_text({{"ok", true}});
}

void Chat::leave_room(SessionId who, const std::string& key, std::string_view how, std::vector<News>& news) {
  Room& room = rooms_[key];
  Client& client = clients_[who];
  groups_.leave(members_of(key), who);
  room.used = ++uses_;
  client.rooms.erase(key);
  news.push_back(
      {members_of(key), Kind::presence, to_text({{"room", room.name}, {"name", client.name}, {"event", how}})});
  news.push_back(room_news(key));
}

void Chat::say(SessionId who, const Json& request, const Now& now, Turn& turn) {
  Client& client = clients_[who];
  const std::string key = key_of(field(request, "room"));
  if (!client.rooms.contains(key)) throw Refused{"not_in_room", "you are not in that room"};
  const std::string text = text_field(request, limits_.text);
  Room& room = rooms_[key];
  room.used = ++uses_;
  const Json message{
      {"room", room.name}, {"id", ++room.last_id}, {"from", client.name}, {"text", text}, {"time", now.unix_ms}};
  room.history.push_back(message);
  if (room.history.size() > limits_.history) room.history.pop_front();
  ++counts_.messages;
  turn.news.push_back({members_of(key), Kind::message, to_text(message)});
  turn.answer = to_text({{"ok", true}, {"id", room.last_id}, {"time", now.unix_ms}});
}

void Chat::whisper(SessionId who, const Json& request, const Now& now, Turn& turn) {
  const std::string to = field(request, "to");
  const std::string text = text_field(request, limits_.text);
  const auto found = names_.find(key_of(to));
  if (found == names_.end()) throw Refused{"no_such_user", "nobody of that name is here"};
  if (found->second == who) throw Refused{"no_such_user", "that is you yourself"};
  ++counts_.whispers;
  turn.whisper = Whisper{found->second, clients_[found->second].name,
                         to_text({{"from", clients_[who].name}, {"text", text}, {"time", now.unix_ms}})};
}

// If there is no place for one more, the room that has been empty for longest goes.
bool Chat::make_room(const std::string& key, const std::string& name) {
  if (rooms_.size() >= limits_.rooms) {
    auto oldest = rooms_.end();
    for (auto it = rooms_.begin(); it != rooms_.end(); ++it) {
      if (it->second.permanent || groups_.size(members_of(it->first)) != 0) continue;
      if (oldest == rooms_.end() || it->second.used < oldest->second.used) oldest = it;
    }
    if (oldest == rooms_.end()) return false;
    rooms_.erase(oldest);
  }
  rooms_[key] = Room{name, false, {}, 0, 0};
  return true;
}

// A bucket of tokens: every message takes one.
bool Chat::too_fast(Client& client, const Now& now) {
  const std::chrono::duration<double> since = now.steady - client.refilled;
  client.refilled = now.steady;
  client.allowance = std::min(limits_.burst, client.allowance + since.count() * limits_.per_second);
  if (client.allowance < 1) {
    ++client.strikes;
    return true;
  }
  client.allowance -= 1;
  client.strikes = 0;
  return false;
}

Chat::Json Chat::room_list() const {
  Json list = Json::array();
  for (const auto& [key, room] : rooms_) {
    list.push_back({{"room", room.name}, {"members", groups_.size(members_of(key))}});
  }
  return list;
}

// In the order in which they connected.
Chat::Json Chat::names_in(const std::string& key) const {
  auto members = groups_.members(members_of(key));
  std::sort(members.begin(), members.end());
  Json names = Json::array();
  for (const SessionId member : members) names.push_back(clients_.at(member).name);
  return names;
}

News Chat::room_news(const std::string& key) const {
  return {everybody, Kind::room, to_text({{"room", rooms_.at(key).name}, {"members", groups_.size(members_of(key))}})};
}

}  // namespace chat
