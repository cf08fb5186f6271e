// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

namespace chat {

/// A small HTTP server for a fixed set of files that it keeps in memory; nothing else is ever read from the disk.
/// GET and HEAD; a thread of its own.
class StaticFiles {
 public:
  StaticFiles();
  ~StaticFiles();
  StaticFiles(const StaticFiles&) = delete;
  StaticFiles& operator=(const StaticFiles&) = delete;

  /// Before `start`. `path` as in the URL: `/style.css`. \throws std::runtime_error if the file cannot be read.
  void add_file(std::string path, std::string type, const std::filesystem::path& file);
  void add(std::string path, std::string type, std::string content);
  /// The page may connect to this port of the host it came from (`connect-src` of the content security policy).
  void allow_websocket(std::uint16_t port);

  /// \returns where it listens, with the real port. \throws std::exception that says why not.
  std::string start(std::string_view host_and_port);
  void stop();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace chat
