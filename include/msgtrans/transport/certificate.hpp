// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <msgtrans/error.hpp>
#include <optional>
#include <string>
#include <vector>

namespace msgtrans {

/// What a certificate is to say.
struct CertificateRequest {
  /// At most 64 characters, may be empty.
  std::string common_name{};
  /// DNS names (`*.example.org` too) and numeric addresses that it is for.
  std::vector<std::string> names{};
  /// In whole seconds. A little in the past, for clocks that are late.
  std::chrono::system_clock::time_point from = std::chrono::system_clock::now() - std::chrono::minutes(5);
  std::chrono::system_clock::time_point until = std::chrono::system_clock::now() + std::chrono::hours(24 * 365);
  /// It vouches for others, and is for nothing else.
  bool authority = false;
};

/// In PEM form.
struct CertificateAndKey {
  std::string certificate_pem;
  std::string key_pem;
};

/// Makes a key (EC P-256) and a certificate for it, signed by `issuer`, else by itself. For tests and for closed
/// groups; a server and a client may both show it. \returns none with `error` set if the request or the issuer is
/// wrong.
[[nodiscard]] std::optional<CertificateAndKey> make_certificate(const CertificateRequest& request, Error& error,
                                                                const CertificateAndKey* issuer = nullptr);

}  // namespace msgtrans
