// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <msgtrans/transport/custom_transport.hpp>
#include <msgtrans/transport/endpoint.hpp>
#include <string_view>

namespace msgtrans::detail {

/// The registered scheme of that name, which lasts as long as the process; empty if there is none.
[[nodiscard]] std::string_view find_scheme(std::string_view name);

/// What carries the connections of an endpoint that has no socket of the library's; null of any other.
[[nodiscard]] std::shared_ptr<CustomTransport> custom_transport_of(const Endpoint& endpoint);

}  // namespace msgtrans::detail
