// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <msgtrans/wire/deflate.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace msgtrans::detail {

/// A name as RFC 7230 has it.
inline bool is_token(std::string_view text) noexcept {
  constexpr std::string_view others = "!#$%&'*+-.^_`|~";
  return !text.empty() && std::ranges::all_of(text, [&](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           others.find(c) != std::string_view::npos;
  });
}

/// One of Sec-WebSocket-Extensions: `name; parameter; parameter=value`. Its texts are those of the header.
struct Extension {
  struct Parameter {
    std::string_view name;
    std::optional<std::string> value;
  };

  std::string_view name;
  std::vector<Parameter> parameters;
};

/// Reads what RFC 6455, 9.1, calls an extension-list.
class ExtensionList {
 public:
  /// Nothing if it is none.
  static std::optional<std::vector<Extension>> read(std::string_view text) {
    ExtensionList list(text);
    std::vector<Extension> all;
    do {
      list.skip_blanks();
      if (list.rest_.empty() || list.rest_.front() == ',') continue;  // an empty element
      if (!list.take_extension(all.emplace_back())) return std::nullopt;
    } while (list.take(','));
    if (!list.rest_.empty() || all.empty()) return std::nullopt;
    return all;
  }

 private:
  explicit ExtensionList(std::string_view text) noexcept : rest_(text) {}

  bool take_extension(Extension& extension) {
    if (!take_token(extension.name)) return false;
    while (take(';')) {
      Extension::Parameter& parameter = extension.parameters.emplace_back();
      if (!take_token(parameter.name)) return false;
      if (take('=') && !take_value(parameter.value.emplace())) return false;
    }
    return true;
  }

  bool take_value(std::string& value) {
    if (!take('"')) {
      std::string_view token;
      if (!take_token(token)) return false;
      value = token;
      return true;
    }
    while (!rest_.empty() && rest_.front() != '"') {
      if (rest_.front() == '\\') rest_.remove_prefix(1);
      if (rest_.empty()) return false;
      value += rest_.front();
      rest_.remove_prefix(1);
    }
    return take('"') && is_token(value);
  }

  bool take_token(std::string_view& token) noexcept {
    skip_blanks();
    token = rest_.substr(0, rest_.find_first_of(" \t,;=\""));
    rest_.remove_prefix(token.size());
    return is_token(token);
  }

  bool take(char c) noexcept {
    skip_blanks();
    if (!rest_.starts_with(c)) return false;
    rest_.remove_prefix(1);
    return true;
  }

  void skip_blanks() noexcept { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t"), rest_.size())); }

  std::string_view rest_;
};

/// The parameters of permessage-deflate (RFC 7692, 7.1) in an offer or an answer.
struct DeflateParameters {
  bool server_no_context_takeover = false;
  bool client_no_context_takeover = false;
  bool client_window = false;  // client_max_window_bits is there, perhaps without a value
  std::optional<int> server_max_window_bits;
  std::optional<int> client_max_window_bits;

  /// \returns what is wrong; empty: nothing.
  std::string read(const Extension& extension) {
    for (const auto& [name, value] : extension.parameters) {
      bool twice = false;
      bool right = false;
      if (name == "server_no_context_takeover") {
        twice = std::exchange(server_no_context_takeover, true);
        right = !value;
      } else if (name == "client_no_context_takeover") {
        twice = std::exchange(client_no_context_takeover, true);
        right = !value;
      } else if (name == "server_max_window_bits") {
        twice = server_max_window_bits.has_value();
        right = value && read_bits(*value, server_max_window_bits);
      } else if (name == "client_max_window_bits") {
        twice = std::exchange(client_window, true);
        right = !value || read_bits(*value, client_max_window_bits);
      } else {
        return "the unknown parameter " + std::string(name);
      }
      if (twice) return std::string(name) + " twice";
      if (!right) return std::string(name) + (value ? " = " + *value : " without a value");
    }
    return {};
  }

 private:
  static bool read_bits(std::string_view text, std::optional<int>& bits) {
    static constexpr std::array<std::string_view, 8> allowed{"8", "9", "10", "11", "12", "13", "14", "15"};
    const auto at = std::ranges::find(allowed, text);
    if (at == allowed.end()) return false;
    bits = wire::least_window_bits + static_cast<int>(at - allowed.begin());
    return true;
  }
};

inline constexpr std::string_view deflate_name = "permessage-deflate";

/// What a server agrees to.
struct DeflateAgreement {
  int window_bits = 0;  // of what it sends
  std::string answer;
};

/// Of what a client offers the first that is right. \param window_bits  the most the server compresses with
inline std::optional<DeflateAgreement> accept_deflate(const std::vector<Extension>& offers, int window_bits) {
  for (const Extension& offer : offers) {
    DeflateParameters wanted;
    if (offer.name != deflate_name || !wanted.read(offer).empty()) continue;
    DeflateAgreement agreed{.window_bits = window_bits,
                            .answer = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"};
    if (wanted.server_max_window_bits) {
      agreed.window_bits = std::min(window_bits, *wanted.server_max_window_bits);
      agreed.answer += "; server_max_window_bits=" + std::to_string(agreed.window_bits);
    }
    return agreed;
  }
  return std::nullopt;
}

/// \param window_bits  the most the client compresses with
inline std::string deflate_offer(int window_bits) {
  std::string offer =
      "permessage-deflate; server_no_context_takeover; client_no_context_takeover; client_max_window_bits";
  if (window_bits < wire::most_window_bits) offer += "=" + std::to_string(window_bits);
  return offer;
}

/// Whether a server's answer is one to that offer. \returns the window bits of what the client sends; 0 if not, with
/// what is wrong.
inline int check_deflate_answer(const std::vector<Extension>& chosen, int window_bits, std::string& problem) {
  if (chosen.size() != 1 || chosen.front().name != deflate_name) {
    problem = "which was not offered";
    return 0;
  }
  DeflateParameters agreed;
  if (problem = agreed.read(chosen.front()); !problem.empty()) {
    problem = "which has " + problem;
    return 0;
  }
  if (!agreed.server_no_context_takeover) {
    problem = "without server_no_context_takeover, which the offer demands";
    return 0;
  }
  if (!agreed.client_window) return window_bits;
  if (!agreed.client_max_window_bits || *agreed.client_max_window_bits > window_bits) {
    problem = "with more client_max_window_bits than the " + std::to_string(window_bits) + " offered";
    return 0;
  }
  return *agreed.client_max_window_bits;
}

}  // namespace msgtrans::detail
