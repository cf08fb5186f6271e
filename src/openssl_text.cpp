// SPDX-License-Identifier: Apache-2.0
#include "openssl_text.hpp"

#include <arpa/inet.h>
#include <array>
#include <cstdio>
#include <ctime>
#include <netinet/in.h>
#include <new>
#include <openssl/asn1.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

namespace msgtrans::detail {

namespace {

using NamesPtr = std::unique_ptr<GENERAL_NAMES, FreeWith<GENERAL_NAMES_free>>;

std::string text_of(const X509_NAME* name) {
  const BioPtr bio(BIO_new(BIO_s_mem()));
  if (!bio) throw std::bad_alloc();
  // Characters beyond ASCII as they are.
  constexpr unsigned long form = XN_FLAG_RFC2253 & ~static_cast<unsigned long>(ASN1_STRFLGS_ESC_MSB);
  if (X509_NAME_print_ex(bio.get(), name, 0, form) < 0) return {};
  char* text = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &text);
  return size > 0 ? std::string(text, static_cast<std::size_t>(size)) : std::string();
}

std::string text_of(const ASN1_TIME* time) {
  std::tm parts{};
  if (ASN1_TIME_to_tm(time, &parts) != 1) return "an unknown time";
  std::array<char, 64> text;
  const std::size_t size = std::strftime(text.data(), text.size(), "%Y-%m-%d %H:%M:%S UTC", &parts);
  return {text.data(), size};
}

/// Empty unless it can be a DNS name.
std::string dns_name(const ASN1_STRING* string) {
  const auto* const data = ASN1_STRING_get0_data(string);
  const std::string text(reinterpret_cast<const char*>(data), static_cast<std::size_t>(ASN1_STRING_length(string)));
  for (const char c : text) {
    if (c <= ' ' || c >= 0x7f) return {};
  }
  return text;
}

std::string address(const ASN1_STRING* string) {
  const int size = ASN1_STRING_length(string);
  if (size != 4 && size != 16) return {};
  std::array<char, INET6_ADDRSTRLEN> text;
  if (::inet_ntop(size == 4 ? AF_INET : AF_INET6, ASN1_STRING_get0_data(string), text.data(), text.size()) == nullptr) {
    return {};
  }
  return text.data();
}

std::string whom_it_is_for(const X509& certificate) {
  const auto names = names_of(certificate);
  constexpr std::size_t most = 8;
  std::string text;
  for (std::size_t i = 0; i < names.size() && i < most; ++i) text += (i == 0 ? "" : ", ") + printable(names[i]);
  if (names.size() > most) text += " and " + std::to_string(names.size() - most) + " more";
  if (text.empty()) text = printable(common_name_of(certificate));
  return text.empty() ? "no name" : text;
}

/// What the peer's alert says, in the words of RFC 8446.
std::string alert_text(int alert) {
  switch (alert) {
    case TLS1_AD_NO_APPLICATION_PROTOCOL: return "no application protocol";
    case TLS13_AD_CERTIFICATE_REQUIRED: return "certificate required";
    case TLS13_AD_MISSING_EXTENSION: return "missing extension";
    default: break;
  }
  std::string text = SSL_alert_desc_string_long(alert);
  return text == "unknown" ? "unknown alert" : text;
}

}  // namespace

std::string printable(std::string_view text) {
  constexpr std::size_t most = 256;
  std::string result(text.substr(0, most));
  for (char& c : result) {
    if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) c = '?';
  }
  if (text.size() > most) result += "...";
  return result;
}

bool is_numeric_address(const std::string& text) noexcept {
  in6_addr ignored;
  return ::inet_pton(AF_INET, text.c_str(), &ignored) == 1 || ::inet_pton(AF_INET6, text.c_str(), &ignored) == 1;
}

std::string subject_of(const X509& certificate) {
  return text_of(X509_get_subject_name(&certificate));
}

std::string common_name_of(const X509& certificate) {
  const X509_NAME* const subject = X509_get_subject_name(&certificate);
  int found = -1;
  for (int next = -1; (next = X509_NAME_get_index_by_NID(subject, NID_commonName, next)) >= 0;) found = next;
  if (found < 0) return {};
  unsigned char* utf8 = nullptr;
  const int size = ASN1_STRING_to_UTF8(&utf8, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, found)));
  if (size < 0) return {};
  std::string text;
  try {
    text.assign(reinterpret_cast<const char*>(utf8), static_cast<std::size_t>(size));
  } catch (...) {
    OPENSSL_free(utf8);
    throw;
  }
  OPENSSL_free(utf8);
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) return {};
  }
  return text;
}

std::vector<std::string> names_of(const X509& certificate) {
  const NamesPtr names(
      static_cast<GENERAL_NAMES*>(X509_get_ext_d2i(&certificate, NID_subject_alt_name, nullptr, nullptr)));
  std::vector<std::string> result;
  for (int i = 0; names && i < sk_GENERAL_NAME_num(names.get()); ++i) {
    int type = 0;
    const void* const value = GENERAL_NAME_get0_value(sk_GENERAL_NAME_value(names.get(), i), &type);
    if (type != GEN_DNS && type != GEN_IPADD) continue;
    const auto* const string = static_cast<const ASN1_STRING*>(value);
    if (std::string text = type == GEN_DNS ? dns_name(string) : address(string); !text.empty()) {
      result.push_back(std::move(text));
    }
  }
  return result;
}

std::string openssl_reason(unsigned long code) {
  if (code == 0) return "no reason given";
  if (ERR_SYSTEM_ERROR(code)) return std::string("system error ") + std::to_string(ERR_GET_REASON(code));
  const char* const text = ERR_reason_error_string(code);
  return text != nullptr ? text : "OpenSSL's error " + std::to_string(code);
}

std::string describe_ssl_reason(unsigned long code, bool is_server) {
  const int reason = ERR_GET_REASON(code);
  if (reason > SSL_AD_REASON_OFFSET && reason < SSL_AD_REASON_OFFSET + 256) {
    const int alert = reason - SSL_AD_REASON_OFFSET;
    return "the peer gave up: " + alert_text(alert) + " (alert " + std::to_string(alert) + ")";
  }
  switch (reason) {
    case SSL_R_HTTP_REQUEST: return "the peer speaks plain HTTP, not TLS";
    case SSL_R_HTTPS_PROXY_REQUEST: return "the peer takes this for an HTTP proxy";
    case SSL_R_WRONG_VERSION_NUMBER:
    case SSL_R_RECORD_LENGTH_MISMATCH:
    case SSL_R_UNKNOWN_PROTOCOL: return "what the peer sent is not TLS (" + openssl_reason(code) + ")";
    case SSL_R_UNSUPPORTED_PROTOCOL:
    case SSL_R_VERSION_TOO_LOW:
      return std::string("the ") + (is_server ? "client" : "server") + "'s version of TLS is not allowed here";
    case SSL_R_INAPPROPRIATE_FALLBACK: return "someone on the way tries to force an older version of TLS";
    case SSL_R_NO_APPLICATION_PROTOCOL: return "the client offers other protocols only (ALPN)";
    case SSL_R_NO_SHARED_CIPHER: return "the client offers no cipher that is allowed here";
    case SSL_R_PEER_DID_NOT_RETURN_A_CERTIFICATE: return "the client has no certificate, and one is required";
    default: return openssl_reason(code);
  }
}

std::string describe_refusal(int code, const X509* certificate, X509_VERIFY_PARAM* expected, bool of_client) {
  const std::string whose = of_client ? "the client's certificate" : "the server's certificate";
  if (certificate == nullptr) return whose + ": " + X509_verify_cert_error_string(code);
  const std::string subject = printable(subject_of(*certificate));
  switch (code) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
      return "certificate has expired: " + subject + ", on " + text_of(X509_get0_notAfter(certificate));
    case X509_V_ERR_CERT_NOT_YET_VALID:
      return "certificate is not yet valid: " + subject + ", only from " + text_of(X509_get0_notBefore(certificate));
    case X509_V_ERR_HOSTNAME_MISMATCH: {
      const char* const host = X509_VERIFY_PARAM_get0_host(expected, 0);
      return "host name mismatch: the certificate is for " + whom_it_is_for(*certificate) + ", not for " +
             (host != nullptr ? host : "the host");
    }
    case X509_V_ERR_IP_ADDRESS_MISMATCH: {
      char* const address = X509_VERIFY_PARAM_get1_ip_asc(expected);
      std::string text = "address mismatch: the certificate is for " + whom_it_is_for(*certificate) + ", not for " +
                         (address != nullptr ? address : "the address");
      OPENSSL_free(address);
      return text;
    }
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT:
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
      return "unknown authority: " + whose + " is issued by " + printable(text_of(X509_get_issuer_name(certificate)));
    case X509_V_ERR_DEPTH_ZERO_SELF_SIGNED_CERT:
      return "unknown authority: " + whose + " is signed by itself: " + subject;
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
      return "unknown authority: " + whose + " leads to " + subject + ", which is not trusted";
    default: return whose + ": " + X509_verify_cert_error_string(code) + ": " + subject;
  }
}

}  // namespace msgtrans::detail
