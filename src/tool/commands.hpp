// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>
#include <chrono>
#include <cmath>
#include <functional>
#include <map>
#include <msgtrans/compression_options.hpp>
#include <msgtrans/transport/tls.hpp>
#include <msgtrans/transport/websocket.hpp>
#include <optional>
#include <string>

namespace msgtrans::tool {

/// What a subcommand does once the command line is read: returns the exit status.
using Action = std::function<int()>;

/// Each adds its subcommand; `action` is set when the user chose it.
void add_serve(CLI::App& app, Action& action);
void add_send(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_cert(CLI::App& app, Action& action);

inline constexpr int exit_failure = 1;  ///< it was tried and went wrong
inline constexpr int exit_usage = 2;    ///< the command line makes no sense

[[nodiscard]] inline std::chrono::milliseconds seconds(double value) {
  return std::chrono::milliseconds(std::llround(value * 1000));
}

/// CLI11 would take "-1" for a very large number.
[[nodiscard]] inline CLI::Validator whole_number() {
  return {[](const std::string& text) {
            const bool whole = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
            return whole ? std::string() : "\"" + text + "\" is no whole number";
          },
          ""};
}

/// `--compress` and `--compress-above`.
inline void add_compression(CLI::App& command, CompressionOptions& options) {
  command.add_option("--compress", options.codec, "Compress what is sent, where that makes it smaller")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, Compression>{{"zstd", Compression::zstd}, {"zlib", Compression::zlib}}))
      ->option_text("zstd|zlib (default: nothing)");
  command.add_option("--compress-above", options.threshold, "Payloads of at least that size")
      ->check(whole_number())
      ->type_name("BYTES")
      ->capture_default_str();
}

/// `--ws-deflate`.
inline void add_deflate(CLI::App& command, std::optional<WebSocketDeflateOptions>& options, const char* help) {
  command.add_flag_callback(
      "--ws-deflate", [&options] { options.emplace(); }, help);
}

/// What a client knows of TLS: `--ca`, `--cert`, `--key`, `--server-name`, `--danger-accept-any-certificate`.
inline void add_client_tls(CLI::App& command, TlsClientOptions& options) {
  command.add_option("--ca", options.ca_file, "Trust the certificates in it, instead of the system's")
      ->type_name("FILE");
  auto* const certificate =
      command.add_option("--cert", options.identity.certificate_file, "Show it to the server")->type_name("FILE");
  command.add_option("--key", options.identity.key_file, "Of that certificate")->type_name("FILE")->needs(certificate);
  command
      .add_option("--server-name", options.server_name, "Whom the certificate must be for (default: the URL's host)")
      ->type_name("NAME");
  command.add_flag_callback(
      "--danger-accept-any-certificate",
      [&options] { options.verify = TlsVerification::danger_accept_any_certificate(); },
      "Do not check who the server is: anyone on the way can read and change everything");
}

/// `--ws-deflate` of a client.
inline constexpr const char* client_deflate_help = "Offer WebSocket's own compression, permessage-deflate";

/// What a URL may be.
inline constexpr const char* url_help = "tcp://H:P, tls://H:P, unix://PATH, ws://H:P/PATH or wss://H:P/PATH";

}  // namespace msgtrans::tool
