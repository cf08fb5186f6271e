// SPDX-License-Identifier: Apache-2.0
#include "custom_transports.hpp"

#include "in_process.hpp"

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace msgtrans {

namespace detail {

namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::string, std::shared_ptr<CustomTransport>, std::less<>> transports;
};

Registry& registry() {
  static auto* const all = new Registry;  // for the rest of the process: endpoints refer to the schemes
  return *all;
}

bool is_scheme(std::string_view text) {
  const auto letter = [](char c) { return c >= 'a' && c <= 'z'; };
  return !text.empty() && letter(text.front()) && std::ranges::all_of(text, [&](char c) {
    return letter(c) || (c >= '0' && c <= '9') || c == '+' || c == '-' || c == '.';
  });
}

}  // namespace

std::string_view find_scheme(std::string_view name) {
  auto& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.transports.find(name);
  return found == all.transports.end() ? std::string_view() : std::string_view(found->first);
}

std::shared_ptr<CustomTransport> custom_transport_of(const Endpoint& endpoint) {
  if (endpoint.transport == Transport::in_process) return in_process_transport();
  if (endpoint.transport != Transport::custom) return nullptr;
  auto& all = registry();
  const std::lock_guard lock(all.mutex);
  const auto found = all.transports.find(endpoint.scheme);
  return found == all.transports.end() ? nullptr : found->second;
}

}  // namespace detail

void register_transport(std::string_view scheme, std::shared_ptr<CustomTransport> transport) {
  const auto refuse = [&scheme](const char* why) {
    throw Exception(Error(Errc::invalid_option, "scheme is \"" + std::string(scheme) + "\", " + why));
  };
  if (!detail::is_scheme(scheme)) refuse("which is no scheme");
  if (!transport) refuse("but there is no transport");
  const bool built_in =
      std::ranges::find(transports, scheme, [](Transport one) { return to_string(one); }) != transports.end();
  auto& all = detail::registry();
  const std::lock_guard lock(all.mutex);
  if (built_in || !all.transports.try_emplace(std::string(scheme), std::move(transport)).second) {
    refuse("which is taken");
  }
}

}  // namespace msgtrans
