// SPDX-License-Identifier: Apache-2.0
#include "openssl_text.hpp"

#include <msgtrans/transport/certificate.hpp>
#include <new>
#include <openssl/bn.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <utility>

namespace msgtrans {

using namespace detail;

namespace {

using ExtensionPtr = std::unique_ptr<X509_EXTENSION, FreeWith<X509_EXTENSION_free>>;
using NumberPtr = std::unique_ptr<BIGNUM, FreeWith<BN_free>>;

/// A step that OpenSSL refused.
struct Refused {
  const char* what;
};

void insist_on(bool done, const char* what) {
  if (!done) throw Refused{what};
}

template <class F>
std::string to_pem(F&& write) {
  const BioPtr bio(BIO_new(BIO_s_mem()));
  insist_on(bio && write(bio.get()) == 1, "writing PEM");
  char* text = nullptr;
  const long size = BIO_get_mem_data(bio.get(), &text);
  return {text, static_cast<std::size_t>(size)};
}

BioPtr memory_bio(const std::string& text) {
  BioPtr bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
  insist_on(bio != nullptr, "reading PEM");
  return bio;
}

void add_extension(X509& certificate, X509& issuer, int what, const std::string& value) {
  X509V3_CTX context;
  X509V3_set_ctx(&context, &issuer, &certificate, nullptr, nullptr, 0);
  X509V3_set_ctx_nodb(&context);
  const ExtensionPtr extension(X509V3_EXT_conf_nid(nullptr, &context, what, value.c_str()));
  insist_on(extension && X509_add_ext(&certificate, extension.get(), -1) == 1, OBJ_nid2sn(what));
}

void set_serial(X509& certificate) {
  const NumberPtr number(BN_new());
  // 127 bits, none of them known before, and above zero
  insist_on(number && BN_rand(number.get(), 127, BN_RAND_TOP_ONE, BN_RAND_BOTTOM_ANY) == 1 &&
                BN_to_ASN1_INTEGER(number.get(), X509_get_serialNumber(&certificate)) != nullptr,
            "serial number");
}

void set_time(ASN1_TIME* time, std::chrono::system_clock::time_point value) {
  insist_on(ASN1_TIME_set(time, std::chrono::system_clock::to_time_t(value)) != nullptr, "validity");
}

Error check(const CertificateRequest& request) {
  if (request.from >= request.until) return {Errc::invalid_option, "the certificate would end before it begins"};
  if (request.common_name.size() > 64) return {Errc::invalid_option, "the common name is longer than 64 characters"};
  for (const std::string& name : request.names) {
    // No comma: it would begin another extension value.
    const bool fits = !name.empty() && name.find_first_not_of(
                                           "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                           "0123456789.-_*:") == std::string::npos;
    if (!fits || (name.find(':') != std::string::npos && !is_numeric_address(name))) {
      return {Errc::invalid_option, "no name of a host and no numeric address: " + printable(name)};
    }
  }
  return {};
}

CertificateAndKey make(const CertificateRequest& request, const CertificateAndKey* issuer) {
  const KeyPtr key(EVP_EC_gen("P-256"));
  insist_on(key != nullptr, "generating a key");
  const X509Ptr certificate(X509_new());
  insist_on(certificate && X509_set_version(certificate.get(), X509_VERSION_3) == 1, "certificate");
  X509Ptr issuers_certificate;
  KeyPtr issuers_key;
  if (issuer != nullptr) {
    const auto no_password = [](char*, int, int, void*) { return -1; };
    issuers_certificate.reset(PEM_read_bio_X509(memory_bio(issuer->certificate_pem).get(), nullptr, nullptr, nullptr));
    insist_on(issuers_certificate != nullptr, "the issuer's certificate");
    issuers_key.reset(PEM_read_bio_PrivateKey(memory_bio(issuer->key_pem).get(), nullptr, no_password, nullptr));
    insist_on(issuers_key && X509_check_private_key(issuers_certificate.get(), issuers_key.get()) == 1,
              "the issuer's key");
  }
  X509& signer = issuers_certificate ? *issuers_certificate : *certificate;

  set_serial(*certificate);
  set_time(X509_getm_notBefore(certificate.get()), request.from);
  set_time(X509_getm_notAfter(certificate.get()), request.until);
  insist_on(X509_set_pubkey(certificate.get(), key.get()) == 1, "public key");
  X509_NAME* const subject = X509_get_subject_name(certificate.get());
  if (!request.common_name.empty()) {
    insist_on(X509_NAME_add_entry_by_NID(subject, NID_commonName, MBSTRING_UTF8,
                                         reinterpret_cast<const unsigned char*>(request.common_name.data()),
                                         static_cast<int>(request.common_name.size()), -1, 0) == 1,
              "common name");
  }
  insist_on(X509_set_issuer_name(certificate.get(), X509_get_subject_name(&signer)) == 1, "issuer");

  add_extension(*certificate, signer, NID_basic_constraints,
                request.authority ? "critical,CA:TRUE" : "critical,CA:FALSE");
  add_extension(*certificate, signer, NID_key_usage,
                request.authority ? "critical,keyCertSign,cRLSign" : "critical,digitalSignature");
  if (!request.authority) add_extension(*certificate, signer, NID_ext_key_usage, "serverAuth,clientAuth");
  add_extension(*certificate, signer, NID_subject_key_identifier, "hash");
  add_extension(*certificate, signer, NID_authority_key_identifier, "keyid");
  std::string names;
  for (const std::string& name : request.names) {
    names += (names.empty() ? "" : ",") + std::string(is_numeric_address(name) ? "IP:" : "DNS:") + name;
  }
  // Without a subject they are all there is.
  if (!names.empty()) {
    add_extension(*certificate, signer, NID_subject_alt_name, (request.common_name.empty() ? "critical," : "") + names);
  }

  insist_on(X509_sign(certificate.get(), issuers_key ? issuers_key.get() : key.get(), EVP_sha256()) > 0, "signing");
  return {to_pem([&](BIO* out) { return PEM_write_bio_X509(out, certificate.get()); }), to_pem([&](BIO* out) {
            return PEM_write_bio_PKCS8PrivateKey(out, key.get(), nullptr, nullptr, 0, nullptr, nullptr);
          })};
}

}  // namespace

std::optional<CertificateAndKey> make_certificate(const CertificateRequest& request, Error& error,
                                                  const CertificateAndKey* issuer) {
  if (error = check(request); error) return std::nullopt;
  ERR_clear_error();
  try {
    return make(request, issuer);
  } catch (const Refused& refused) {
    error = Error(Errc::invalid_option, "a certificate cannot be made: " + std::string(refused.what) + ": " +
                                            openssl_reason(ERR_peek_last_error()));
    ERR_clear_error();
    return std::nullopt;
  }
}

}  // namespace msgtrans
