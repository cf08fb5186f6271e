// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <memory>
#include <openssl/bio.h>
#include <openssl/evp.h>
#include <openssl/x509.h>
#include <openssl/x509_vfy.h>
#include <string>
#include <string_view>
#include <vector>

namespace msgtrans::detail {

template <auto function>
struct FreeWith {
  template <class T>
  void operator()(T* object) const noexcept {
    function(object);
  }
};

using BioPtr = std::unique_ptr<BIO, FreeWith<BIO_free_all>>;
using X509Ptr = std::unique_ptr<X509, FreeWith<X509_free>>;
using KeyPtr = std::unique_ptr<EVP_PKEY, FreeWith<EVP_PKEY_free>>;

/// Cut to what fits in a line, with what would not print replaced.
[[nodiscard]] std::string printable(std::string_view text);

/// An IPv4 or IPv6 address, without zone or brackets.
[[nodiscard]] bool is_numeric_address(const std::string& text) noexcept;

/// As RFC 2253 writes it, in UTF-8.
[[nodiscard]] std::string subject_of(const X509& certificate);
/// Empty if there is none, or one that no name can be.
[[nodiscard]] std::string common_name_of(const X509& certificate);
/// DNS names and addresses.
[[nodiscard]] std::vector<std::string> names_of(const X509& certificate);

/// What an entry of OpenSSL's error queue says.
[[nodiscard]] std::string openssl_reason(unsigned long code);
/// The same of an entry by its TLS part: also names the alert of a peer that gave up.
[[nodiscard]] std::string describe_ssl_reason(unsigned long code, bool is_server);
/// Why verification refused a certificate (an X509_V_ERR), and which one, if any; `expected` has whom it must be for.
[[nodiscard]] std::string describe_refusal(int code, const X509* certificate, X509_VERIFY_PARAM* expected,
                                           bool of_client);

}  // namespace msgtrans::detail
