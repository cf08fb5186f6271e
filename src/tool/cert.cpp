// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"

#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/transport/certificate.hpp>
#include <string>
#include <unistd.h>
#include <vector>

namespace msgtrans::tool {

namespace {

struct Cert {
  std::vector<std::string> names{"localhost", "127.0.0.1", "::1"};
  std::string certificate = "cert.pem", key = "key.pem";
  int days = 365;
  bool force = false;

  int run();
};

/// A file of that mode, which is not there yet unless `force`.
void write_file(const std::string& path, const std::string& text, mode_t mode, bool force) {
  const auto fail = [&path] {
    throw Exception(Error(error_code(errno, boost::system::system_category()),
                          "cannot write " + path + ": " + std::strerror(errno)));
  };
  if (force) ::unlink(path.c_str());  // its mode would stay
  const int file = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
  if (file < 0) fail();
  const bool written = ::write(file, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  if ((::close(file) != 0) || !written) fail();
}

int Cert::run() {
  Error error;
  const auto made = make_certificate({.common_name = names.front(),
                                      .names = names,
                                      .until = std::chrono::system_clock::now() + std::chrono::days(days)},
                                     error);
  if (!made) throw Exception(error);
  write_file(key, made->key_pem, 0600, force);
  write_file(certificate, made->certificate_pem, 0644, force);
  std::printf("%s and %s, for %s", certificate.c_str(), key.c_str(), names.front().c_str());
  for (std::size_t i = 1; i < names.size(); ++i) std::printf(", %s", names[i].c_str());
  std::printf("; valid for %d days\n", days);
  return 0;
}

}  // namespace

void add_cert(CLI::App& app, Action& action) {
  auto cert = std::make_shared<Cert>();
  CLI::App* const command =
      app.add_subcommand("cert", "Make a certificate that vouches for itself, and its key, for trying things out");
  command->add_option("NAME", cert->names, "Names and addresses that it is for")->capture_default_str();
  command->add_option("--cert", cert->certificate, "Where the certificate goes")
      ->type_name("FILE")
      ->capture_default_str();
  command->add_option("--key", cert->key, "Where the key goes, for its owner only")
      ->type_name("FILE")
      ->capture_default_str();
  command->add_option("--days", cert->days, "How long it is valid")->check(CLI::Range(1, 36500))->capture_default_str();
  command->add_flag("--force", cert->force, "Replace files that are there");
  command->final_callback([&action, cert] { action = [cert] { return cert->run(); }; });
}

}  // namespace msgtrans::tool
