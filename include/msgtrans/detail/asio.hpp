// SPDX-License-Identifier: Apache-2.0
#pragma once

// The little of Asio that the public headers need; everything else is included by the sources alone.
#include <boost/asio/any_completion_handler.hpp>
#include <boost/asio/any_io_executor.hpp>
#include <boost/asio/async_result.hpp>

namespace msgtrans::detail {
namespace asio = boost::asio;
}  // namespace msgtrans::detail
