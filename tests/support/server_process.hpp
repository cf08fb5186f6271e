// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "wait.hpp"

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <stdexcept>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

extern char** environ;

namespace msgtrans::test {

/// The tool, serving echoes in a process of its own: one that can be killed.
class ServerProcess {
 public:
  /// `tool`: its path. It listens on a port that the system picks.
  explicit ServerProcess(std::string tool) : tool_(std::move(tool)) { start(); }
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;
  ~ServerProcess() { kill(); }

  /// Returns when it listens: on the same port as before.
  void start() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error(std::strerror(errno));
    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    ::posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    std::vector<std::string> words{tool_, "serve", "--tcp", "127.0.0.1:" + std::to_string(port_), "--shards", "1"};
    std::vector<char*> arguments;
    for (auto& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    const int failed = ::posix_spawn(&process_, tool_.c_str(), &actions, nullptr, arguments.data(), environ);
    ::posix_spawn_file_actions_destroy(&actions);
    ::close(ends[1]);
    if (failed != 0) throw std::runtime_error(tool_ + ": " + std::strerror(failed));
    std::string line;
    for (char c = 0; line.empty() || line.back() != '\n'; line += c) {
      pollfd entry{ends[0], POLLIN, 0};
      if (::poll(&entry, 1, static_cast<int>(patience.count())) <= 0 || ::read(ends[0], &c, 1) != 1) break;
    }
    ::close(ends[0]);
    const auto colon = line.rfind(':');
    if (line.rfind("listening tcp ", 0) != 0 || colon == std::string::npos) {
      throw std::runtime_error("the server printed \"" + line + "\"");
    }
    port_ = static_cast<std::uint16_t>(std::stoi(line.substr(colon + 1)));
  }
  /// At once, with no chance to say good-bye.
  void kill() {
    if (process_ == 0) return;
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
    process_ = 0;
  }
  /// It does nothing any more, but its connections stay; until `resume`.
  void suspend() const { ::kill(process_, SIGSTOP); }
  void resume() const { ::kill(process_, SIGCONT); }

  [[nodiscard]] std::string url() const { return "tcp://127.0.0.1:" + std::to_string(port_); }

 private:
  const std::string tool_;
  pid_t process_ = 0;
  std::uint16_t port_ = 0;
};

}  // namespace msgtrans::test
