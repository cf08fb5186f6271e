// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <functional>
#include <string>

namespace msgtrans::tool {

/// What a subcommand does once the command line is read: returns the exit status.
using Action = std::function<int()>;

/// Each adds its subcommand; `action` is set when the user chose it.
void add_serve(CLI::App& app, Action& action);
void add_send(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);

inline constexpr int exit_failure = 1;  ///< it was tried and went wrong
inline constexpr int exit_usage = 2;    ///< the command line makes no sense

[[nodiscard]] inline std::chrono::milliseconds seconds(double value) {
  return std::chrono::milliseconds(std::llround(value * 1000));
}

}  // namespace msgtrans::tool
