// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace msgtrans::test {

/// Threads of this process that the library started.
inline std::size_t library_threads() {
  std::size_t count = 0;
  std::error_code gone;  // threads may end while we look
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", gone)) {
    std::string name;
    std::ifstream(task.path() / "comm") >> name;
    if (name == "msgtrans") ++count;
  }
  return count;
}

/// Threads of this process.
inline std::size_t threads() {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/task"), {}));
}

/// Open descriptors of this process.
inline std::size_t descriptors() {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {}));
}

}  // namespace msgtrans::test
