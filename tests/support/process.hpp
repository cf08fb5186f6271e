// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <string>
#include <sys/types.h>
#include <system_error>
#include <thread>

namespace msgtrans::test {

/// What the system says of a thread of this process behind its name: state, numbers.
inline std::string state_of(const std::string& thread) {
  std::string stat;
  std::getline(std::ifstream("/proc/self/task/" + thread + "/stat"), stat);
  const auto name_end = stat.rfind(')');
  return name_end == std::string::npos ? std::string() : stat.substr(name_end + 1);
}

/// Whether that thread of this process sleeps, in whatever it waits for.
inline bool is_asleep(pid_t thread) {
  return state_of(std::to_string(thread)).starts_with(" S ");
}

/// Threads of this process that `counts(name)`. One that was joined may still be listed for a moment, as exiting; it is
/// not counted.
template <class Predicate>
std::size_t threads_where(Predicate counts) {
  constexpr unsigned exiting = 0x4;  // PF_EXITING of Linux, set before a join returns
  std::size_t count = 0;
  std::error_code gone;  // threads may end while we look
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task", gone)) {
    std::string name, skipped;
    std::ifstream(task.path() / "comm") >> name;
    std::istringstream state(state_of(task.path().filename()));
    for (int i = 0; i < 6; ++i) state >> skipped;
    unsigned flags = exiting;  // of a thread that is gone already
    state >> flags;
    if ((flags & exiting) == 0 && counts(name)) ++count;
  }
  return count;
}

/// Threads of this process that the library started.
inline std::size_t library_threads() {
  return threads_where([](const std::string& name) { return name.starts_with("msgtrans"); });
}

/// Threads of this process.
inline std::size_t threads() {
  // ThreadSanitizer starts one of its own beside the first.
  static const bool first_started = (std::thread([] {}).join(), true);
  (void)first_started;
  return threads_where([](const std::string&) { return true; });
}

/// Open descriptors of this process.
inline std::size_t descriptors() {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {}));
}

}  // namespace msgtrans::test
