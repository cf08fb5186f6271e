// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <msgtrans/error.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace msgtrans {

enum class TlsVersion : std::uint8_t { tls1_2, tls1_3 };

/// `TLS 1.2`, `TLS 1.3`.
[[nodiscard]] std::string_view to_string(TlsVersion version) noexcept;

/// A certificate with its private key, both in PEM form: each the name of a file, or the text itself, not both.
struct TlsIdentity {
  /// The certificate, then those that lead from it to the authority, if any.
  std::string certificate_file{};
  std::string certificate_pem{};
  /// Not encrypted: nobody is asked for a password.
  std::string key_file{};
  std::string key_pem{};

  /// True if nothing is set.
  [[nodiscard]] bool empty() const noexcept {
    return certificate_file.empty() && key_file.empty() && certificate_pem.empty() && key_pem.empty();
  }
};

/// What a server does about the certificates of clients.
enum class ClientCertificates : std::uint8_t {
  none,      ///< does not ask for one
  optional,  ///< asks, and refuses a client whose certificate does not verify; one without is let in
  required,  ///< refuses a client without a certificate that verifies
};

/// How a server speaks TLS. Files are read by the call that takes it, and only then.
struct TlsServerOptions {
  TlsIdentity identity{};
  ClientCertificates client_certificates = ClientCertificates::none;
  /// The authorities that vouch for clients, in PEM form: a file, or the text itself. One of the two if clients are
  /// asked for certificates, else neither. Each certificate in it is trusted, also one that is no root.
  std::string client_ca_file{};
  std::string client_ca_pem{};
  TlsVersion min_version = TlsVersion::tls1_2;
  TlsVersion max_version = TlsVersion::tls1_3;
};

/// Whether a client checks that it talks to whom it means: as made, it does.
class TlsVerification {
 public:
  /// The certificate must be valid now, come from a trusted authority, and be for the host's name.
  constexpr TlsVerification() noexcept = default;

  /// Checks nothing: anyone on the way can read and change everything. For tests.
  [[nodiscard]] static constexpr TlsVerification danger_accept_any_certificate() noexcept {
    TlsVerification none;
    none.enabled_ = false;
    return none;
  }

  [[nodiscard]] constexpr bool enabled() const noexcept { return enabled_; }

 private:
  bool enabled_ = true;
};

/// How a client speaks TLS. Files are read by the call that takes it, and only then.
struct TlsClientOptions {
  /// The authorities that vouch for servers, in PEM form: a file, or the text itself; neither: the system's. Each
  /// certificate in it is trusted, also one that is no root.
  std::string ca_file{};
  std::string ca_pem{};
  /// The name or numeric address that the certificate must be for, and which the server is told if it is a name. Empty:
  /// the URL's host.
  std::string server_name{};
  /// Shown to a server that asks for a certificate; may be empty.
  TlsIdentity identity{};
  TlsVersion min_version = TlsVersion::tls1_2;
  TlsVersion max_version = TlsVersion::tls1_3;
  TlsVerification verify{};
};

/// What is known of the other end of a TLS connection. Strings that come from its certificate are the peer's words;
/// they are true as far as `verified`.
struct TlsPeer {
  /// Of its certificate, as RFC 2253 writes it, in UTF-8: `CN=worker-7,O=Example`. Empty: it has shown none.
  std::string subject;
  /// The subject's last common name; may be empty.
  std::string common_name;
  /// The DNS names and addresses that its certificate is for.
  std::vector<std::string> names;
  TlsVersion version = TlsVersion::tls1_3;
  /// `TLS_AES_256_GCM_SHA384`, `ECDHE-RSA-AES128-GCM-SHA256`.
  std::string cipher;
  /// The protocol agreed upon, `msgtrans/1`; empty if the peer named none.
  std::string alpn;
  /// It has shown a certificate that was checked and found valid: by a client also for the host's name.
  bool verified = false;
  /// The handshake took up an earlier session, whose certificate this is.
  bool resumed = false;
};

/// Names the first option that is wrong, as far as can be told without reading files; no error if none is.
[[nodiscard]] Error validate(const TlsServerOptions& options);
[[nodiscard]] Error validate(const TlsClientOptions& options);

}  // namespace msgtrans
