// SPDX-License-Identifier: Apache-2.0
#include "tls.hpp"

#include "check_option.hpp"
#include "openssl_text.hpp"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <fcntl.h>
#include <iterator>
#include <new>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509_vfy.h>
#include <openssl/x509v3.h>
#include <sys/socket.h>
#include <unistd.h>
#include <utility>

namespace msgtrans {

namespace {

/// An error unless one of the two is set, or none where that is allowed.
Error check_one(const char* file_option, const std::string& file, const char* pem_option, const std::string& pem,
                bool needed) {
  if (!file.empty() && !pem.empty()) {
    return detail::invalid_option(std::string(file_option) + " and " + pem_option +
                                  " are both set, must be one of them");
  }
  if (needed && file.empty() && pem.empty()) {
    return detail::invalid_option(std::string(file_option) + " and " + pem_option +
                                  " are both empty, must be one of them");
  }
  if (file.find('\0') != std::string::npos)
    return detail::invalid_option(std::string(file_option) + " has a zero byte in it");
  return {};
}

Error check_identity(const TlsIdentity& identity) {
  if (Error error =
          check_one("certificate_file", identity.certificate_file, "certificate_pem", identity.certificate_pem, true)) {
    return error;
  }
  return check_one("key_file", identity.key_file, "key_pem", identity.key_pem, true);
}

Error check_versions(TlsVersion least, TlsVersion most) {
  const auto known = [](TlsVersion version) { return version == TlsVersion::tls1_2 || version == TlsVersion::tls1_3; };
  if (!known(least))
    return detail::invalid_option("min_version is " + std::to_string(static_cast<int>(least)) + ", must be 0 or 1");
  if (!known(most))
    return detail::invalid_option("max_version is " + std::to_string(static_cast<int>(most)) + ", must be 0 or 1");
  if (least > most) {
    return detail::invalid_option("min_version is " + std::string(to_string(least)) +
                                  ", must not be above max_version, " + std::string(to_string(most)));
  }
  return {};
}

}  // namespace

std::string_view to_string(TlsVersion version) noexcept {
  switch (version) {
    case TlsVersion::tls1_2: return "TLS 1.2";
    case TlsVersion::tls1_3: return "TLS 1.3";
  }
  return "unknown";
}

Error validate(const TlsServerOptions& options) {
  if (Error error = check_identity(options.identity)) return error;
  switch (options.client_certificates) {
    case ClientCertificates::none:
      if (options.client_ca_file.empty() && options.client_ca_pem.empty()) break;
      return detail::invalid_option(std::string(options.client_ca_file.empty() ? "client_ca_pem" : "client_ca_file") +
                                    " is set, but client_certificates is none");
    case ClientCertificates::optional:
    case ClientCertificates::required:
      if (Error error =
              check_one("client_ca_file", options.client_ca_file, "client_ca_pem", options.client_ca_pem, true)) {
        return error;
      }
      break;
    default:
      return detail::invalid_option("client_certificates is " +
                                    std::to_string(static_cast<int>(options.client_certificates)) +
                                    ", must be from 0 to 2");
  }
  return check_versions(options.min_version, options.max_version);
}

Error validate(const TlsClientOptions& options) {
  if (Error error = check_one("ca_file", options.ca_file, "ca_pem", options.ca_pem, false)) return error;
  if (!options.identity.empty()) {
    if (Error error = check_identity(options.identity)) return error;
  }
  const auto in_a_name = [](char c) { return c > ' ' && c < 0x7f && c != '/' && c != '[' && c != ']'; };
  if (options.server_name.size() > 253 ||
      !std::all_of(options.server_name.begin(), options.server_name.end(), in_a_name)) {
    return detail::invalid_option("server_name is no name of a host, and no numeric address without brackets");
  }
  return check_versions(options.min_version, options.max_version);
}

namespace detail {

namespace {

constexpr std::size_t record_size = 16 * 1024;                    // the most plaintext in one
constexpr std::size_t ciphertext_size = 8 * (record_size + 512);  // for one call of send
constexpr int read_size = 64 * 1024;                              // what is read from the socket at once
constexpr std::size_t answers_limit = 16 * 1024;
constexpr std::size_t file_limit = 16 * 1024 * 1024;

/// Of one thread, in use within one operation only.
struct Scratch {
  std::size_t size = 0;  // of what is in batch
  std::array<std::byte, ciphertext_size> batch;
  std::array<std::byte, record_size> staging;
};

/// \throws std::bad_alloc
Scratch& scratch() {
  static thread_local std::unique_ptr<Scratch> mine;
  if (!mine) mine.reset(new Scratch);  // not make_unique, which would clear it
  return *mine;
}

void initialise_openssl() {
  // Not torn down by OpenSSL at exit: a server in a global object may be closed after that.
  static const int done = OPENSSL_init_ssl(OPENSSL_INIT_NO_ATEXIT, nullptr);
  static_cast<void>(done);
}

Error out_of_memory() noexcept {
  return {make_error_code(boost::system::errc::not_enough_memory)};
}

Error system_error(int code, const std::string& what) {
  const error_code error(code, boost::system::system_category());
  return {error, what + ": " + error.message()};
}

// --- PEM

/// A text in PEM form, and where it is from.
struct Pem {
  std::string where;
  std::string text;

  Pem() = default;
  Pem(Pem&&) = default;
  Pem& operator=(Pem&&) = default;
  ~Pem() { OPENSSL_cleanse(text.data(), text.size()); }
};

Error read_file(const std::string& path, const std::string& where, std::string& text) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return system_error(errno, where);
  Error error;
  std::array<char, 16384> buffer;
  text.reserve(buffer.size());  // so that a key is not moved about, and left behind
  while (true) {
    const ssize_t count = ::read(file, buffer.data(), buffer.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) error = system_error(errno, where);
    if (count <= 0) break;
    text.append(buffer.data(), static_cast<std::size_t>(count));
    if (text.size() > file_limit) {
      error = detail::invalid_option(where + ": larger than 16 MiB");
      break;
    }
  }
  ::close(file);
  OPENSSL_cleanse(buffer.data(), buffer.size());
  return error;
}

Error get_pem(const char* file_option, const std::string& file, const char* pem_option, const std::string& pem,
              Pem& result) {
  if (file.empty()) {
    result.where = pem_option;
    result.text = pem;
    return {};
  }
  result.where = std::string(file_option) + " " + file;
  return read_file(file, result.where, result.text);
}

BioPtr memory_bio(const Pem& pem) {
  BioPtr bio(BIO_new_mem_buf(pem.text.data(), static_cast<int>(pem.text.size())));
  if (!bio) throw std::bad_alloc();
  return bio;
}

/// What the last call of OpenSSL found wrong.
std::string reason_of_last() {
  return openssl_reason(ERR_peek_last_error());
}

/// All certificates of the text, at least one.
Error parse_certificates(const Pem& pem, std::vector<X509Ptr>& certificates) {
  const BioPtr bio = memory_bio(pem);
  ERR_clear_error();
  while (X509* const one = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    X509Ptr owner(one);
    certificates.push_back(std::move(owner));
  }
  const auto last = ERR_peek_last_error();
  if (ERR_GET_LIB(last) == ERR_LIB_PEM && ERR_GET_REASON(last) == PEM_R_NO_START_LINE) {
    if (!certificates.empty()) return {};
    return detail::invalid_option(pem.where + ": no certificate in PEM form in it");
  }
  return detail::invalid_option(pem.where + ": certificate " + std::to_string(certificates.size() + 1) +
                                " in it cannot be read: " + reason_of_last());
}

Error parse_key(const Pem& pem, KeyPtr& key) {
  const BioPtr bio = memory_bio(pem);
  bool asked = false;
  const auto no_password = [](char*, int, int, void* flag) {
    *static_cast<bool*>(flag) = true;
    return -1;
  };
  ERR_clear_error();
  key.reset(PEM_read_bio_PrivateKey(bio.get(), nullptr, no_password, &asked));
  if (key) return {};
  if (asked) return detail::invalid_option(pem.where + ": the private key is encrypted; it must be in plain PEM form");
  if (pem.text.find("PRIVATE KEY-----") == std::string::npos) {
    return detail::invalid_option(pem.where + ": no private key in PEM form in it");
  }
  return detail::invalid_option(pem.where + ": the private key in it cannot be read: " + reason_of_last());
}

}  // namespace

// --- what OpenSSL calls

struct TlsConnection::Hooks {
  static TlsConnection& of(BIO* bio) noexcept { return *static_cast<TlsConnection*>(BIO_get_data(bio)); }
  static TlsConnection& of(const SSL* ssl) noexcept { return *static_cast<TlsConnection*>(SSL_get_app_data(ssl)); }

  static int read(BIO* bio, char* into, int size) noexcept {
    BIO_clear_retry_flags(bio);
    const int count = of(bio).receive(into, size);
    if (count < 0 && of(bio).read_error_ == 0) BIO_set_retry_read(bio);
    return count;
  }

  static int write(BIO* bio, const char* bytes, int size) noexcept {
    BIO_clear_retry_flags(bio);
    return of(bio).send(bytes, size);
  }

  static long control(BIO* bio, int command, long, void*) noexcept {
    switch (command) {
      case BIO_CTRL_FLUSH: return 1;
      case BIO_CTRL_EOF: return of(bio).at_end_ ? 1 : 0;
      default: return 0;
    }
  }

  /// How OpenSSL reaches the socket: through the connection.
  static const BIO_METHOD* method() {
    static BIO_METHOD* const made = [] {
      BIO_METHOD* const method = BIO_meth_new(BIO_TYPE_SOURCE_SINK, "msgtrans");
      if (method == nullptr) throw std::bad_alloc();
      BIO_meth_set_read(method, read);
      BIO_meth_set_write(method, write);
      BIO_meth_set_ctrl(method, control);
      return method;
    }();
    return made;
  }

  static int verify(int valid, X509_STORE_CTX* store) noexcept {
    if (valid == 1) return 1;
    const auto* const ssl = static_cast<SSL*>(X509_STORE_CTX_get_ex_data(store, SSL_get_ex_data_X509_STORE_CTX_idx()));
    of(ssl).note_refused_certificate(*store);
    return 0;
  }

  static int select_protocol(SSL*, const unsigned char** selected, unsigned char* size, const unsigned char* offered,
                             unsigned int offered_size, void* argument) noexcept {
    const auto& alpn = *static_cast<const std::string*>(argument);
    unsigned char* found = nullptr;
    if (SSL_select_next_proto(&found, size, reinterpret_cast<const unsigned char*>(alpn.data()),
                              static_cast<unsigned>(alpn.size()), offered, offered_size) != OPENSSL_NPN_NEGOTIATED) {
      return SSL_TLSEXT_ERR_ALERT_FATAL;
    }
    *selected = found;
    return SSL_TLSEXT_ERR_OK;
  }

  static int asked_for_certificate(SSL* ssl, void*) noexcept {
    of(ssl).asked_for_certificate_ = true;
    return 1;
  }

  static int new_session(SSL* ssl, SSL_SESSION* session) noexcept {
    const TlsConnection& connection = of(ssl);
    try {
      connection.context_->sessions_.put(connection.session_key_, *session);
    } catch (const std::bad_alloc&) {
      // The next connection begins anew.
    }
    return 0;  // it stays OpenSSL's
  }
};

// --- sessions to resume

void TlsContext::FreeSession::operator()(ssl_session_st* session) const noexcept {
  SSL_SESSION_free(session);
}

void TlsContext::Sessions::put(const std::string& key, ssl_session_st& session) {
  constexpr std::size_t most = 256;
  constexpr std::ptrdiff_t most_of_one = 4;
  // A copy: the connection goes on changing its own.
  Entry entry{key, SessionHandle(SSL_SESSION_dup(&session))};
  if (!entry.session) return;
  const std::scoped_lock lock(mutex_);
  const auto same = [&](const Entry& other) { return other.key == key; };
  if (std::count_if(entries_.begin(), entries_.end(), same) >= most_of_one) {
    entries_.erase(std::find_if(entries_.begin(), entries_.end(), same));
  } else if (entries_.size() >= most) {
    entries_.pop_front();
  }
  entries_.push_back(std::move(entry));
}

TlsContext::SessionHandle TlsContext::Sessions::take(const std::string& key) {
  const std::scoped_lock lock(mutex_);
  for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry) {
    if (entry->key != key) continue;
    SessionHandle session = std::move(entry->session);
    entries_.erase(std::next(entry).base());
    return session;
  }
  return nullptr;
}

// --- TlsContext

TlsContext::TlsContext(bool is_server, std::string_view protocol) : is_server_(is_server) {
  alpn_.push_back(static_cast<char>(protocol.size()));
  alpn_.append(protocol);
}

TlsContext::~TlsContext() {
  SSL_CTX_free(context_);
}

std::shared_ptr<const TlsContext> TlsContext::server(const TlsServerOptions& options, Error& error,
                                                     std::string_view protocol) {
  if (error = validate(options); error) return nullptr;
  std::shared_ptr<TlsContext> context(new TlsContext(true, protocol));
  error = context->set_up(options.min_version, options.max_version);
  if (!error) error = context->set_up_server(options);
  ERR_clear_error();
  if (error) return nullptr;
  return context;
}

std::shared_ptr<const TlsContext> TlsContext::client(const TlsClientOptions& options, Error& error,
                                                     std::string_view protocol) {
  if (error = validate(options); error) return nullptr;
  std::shared_ptr<TlsContext> context(new TlsContext(false, protocol));
  error = context->set_up(options.min_version, options.max_version);
  if (!error) error = context->set_up_client(options);
  ERR_clear_error();
  if (error) return nullptr;
  return context;
}

Error TlsContext::set_up(TlsVersion least, TlsVersion most) {
  initialise_openssl();
  ERR_clear_error();
  context_ = SSL_CTX_new(is_server_ ? TLS_server_method() : TLS_client_method());
  if (context_ == nullptr) return detail::invalid_option("OpenSSL cannot be used: " + reason_of_last());
  const auto number = [](TlsVersion version) {
    return version == TlsVersion::tls1_3 ? TLS1_3_VERSION : TLS1_2_VERSION;
  };
  // Of TLS 1.2 only what is as good as 1.3: forward secret, and encrypted with authentication.
  if (SSL_CTX_set_min_proto_version(context_, number(least)) != 1 ||
      SSL_CTX_set_max_proto_version(context_, number(most)) != 1 ||
      SSL_CTX_set_cipher_list(context_, "ECDHE+AESGCM:ECDHE+CHACHA20") != 1) {
    return detail::invalid_option("OpenSSL cannot be used: " + reason_of_last());
  }
  SSL_CTX_clear_options(context_, SSL_OP_IGNORE_UNEXPECTED_EOF);
  SSL_CTX_set_options(context_, SSL_OP_NO_COMPRESSION | SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE |
                                    SSL_OP_PRIORITIZE_CHACHA);
  SSL_CTX_set_mode(context_, SSL_MODE_RELEASE_BUFFERS | SSL_MODE_NO_AUTO_CHAIN | SSL_MODE_ENABLE_PARTIAL_WRITE |
                                 SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  SSL_CTX_set_read_ahead(context_, 1);
  SSL_CTX_set_default_read_buffer_len(context_, read_size);
  return {};
}

Error TlsContext::set_up_server(const TlsServerOptions& options) {
  if (Error error = use(options.identity)) return error;
  // Sessions go to the clients, as tickets, and are not kept here. The keys are this context's, so that a new one,
  // which may trust others, resumes none of an old one.
  SSL_CTX_set_session_cache_mode(context_, SSL_SESS_CACHE_OFF);
  constexpr std::string_view scope = "msgtrans";
  SSL_CTX_set_session_id_context(context_, reinterpret_cast<const unsigned char*>(scope.data()),
                                 static_cast<unsigned>(scope.size()));
  SSL_CTX_set_alpn_select_cb(context_, TlsConnection::Hooks::select_protocol, &alpn_);
  if (options.client_certificates == ClientCertificates::none) {
    verifies_ = false;
    return {};
  }
  if (Error error = trust("client_ca_file", options.client_ca_file, "client_ca_pem", options.client_ca_pem)) {
    return error;
  }
  const bool required = options.client_certificates == ClientCertificates::required;
  SSL_CTX_set_verify(context_, SSL_VERIFY_PEER | (required ? SSL_VERIFY_FAIL_IF_NO_PEER_CERT : 0),
                     TlsConnection::Hooks::verify);
  return {};
}

Error TlsContext::set_up_client(const TlsClientOptions& options) {
  server_name_ = options.server_name;
  verifies_ = options.verify.enabled();
  if (!options.identity.empty()) {
    if (Error error = use(options.identity)) return error;
  }
  if (!options.ca_file.empty() || !options.ca_pem.empty()) {
    if (Error error = trust("ca_file", options.ca_file, "ca_pem", options.ca_pem)) return error;
  } else if (verifies_ && SSL_CTX_set_default_verify_paths(context_) != 1) {
    return detail::invalid_option("the system's certificate authorities cannot be read: " + reason_of_last());
  }
  if (verifies_) SSL_CTX_set_verify(context_, SSL_VERIFY_PEER, TlsConnection::Hooks::verify);
  if (SSL_CTX_set_alpn_protos(context_, reinterpret_cast<const unsigned char*>(alpn_.data()),
                              static_cast<unsigned>(alpn_.size())) != 0) {
    return out_of_memory();
  }
  SSL_CTX_set_cert_cb(context_, TlsConnection::Hooks::asked_for_certificate, nullptr);
  SSL_CTX_set_session_cache_mode(context_, SSL_SESS_CACHE_CLIENT | SSL_SESS_CACHE_NO_INTERNAL);
  SSL_CTX_sess_set_new_cb(context_, TlsConnection::Hooks::new_session);
  return {};
}

Error TlsContext::use(const TlsIdentity& identity) {
  Pem certificate;
  Pem private_key;
  if (Error error = get_pem("certificate_file", identity.certificate_file, "certificate_pem", identity.certificate_pem,
                            certificate)) {
    return error;
  }
  if (Error error = get_pem("key_file", identity.key_file, "key_pem", identity.key_pem, private_key)) return error;
  std::vector<X509Ptr> chain;
  if (Error error = parse_certificates(certificate, chain)) return error;
  KeyPtr key;
  if (Error error = parse_key(private_key, key)) return error;
  ERR_clear_error();
  if (X509_check_private_key(chain.front().get(), key.get()) != 1) {
    return detail::invalid_option("the private key in " + private_key.where +
                                  " does not belong to the certificate in " + certificate.where + " (" +
                                  subject_of(*chain.front()) + ")");
  }
  if (SSL_CTX_use_certificate(context_, chain.front().get()) != 1) {
    return detail::invalid_option(certificate.where + ": the certificate cannot be used: " + reason_of_last());
  }
  if (SSL_CTX_use_PrivateKey(context_, key.get()) != 1) {
    return detail::invalid_option(private_key.where + ": the private key cannot be used: " + reason_of_last());
  }
  for (std::size_t i = 1; i < chain.size(); ++i) {
    if (SSL_CTX_add1_chain_cert(context_, chain[i].get()) != 1) {
      return detail::invalid_option(certificate.where + ": certificate " + std::to_string(i + 1) +
                                    " in it cannot be used: " + reason_of_last());
    }
  }
  return {};
}

Error TlsContext::trust(const char* file_option, const std::string& file, const char* pem_option,
                        const std::string& pem) {
  Pem text;
  if (Error error = get_pem(file_option, file, pem_option, pem, text)) return error;
  std::vector<X509Ptr> authorities;
  if (Error error = parse_certificates(text, authorities)) return error;
  X509_STORE* const store = SSL_CTX_get_cert_store(context_);
  for (std::size_t i = 0; i < authorities.size(); ++i) {
    if (X509_STORE_add_cert(store, authorities[i].get()) != 1 ||
        (is_server_ && SSL_CTX_add_client_CA(context_, authorities[i].get()) != 1)) {
      return detail::invalid_option(text.where + ": certificate " + std::to_string(i + 1) +
                                    " in it cannot be used: " + reason_of_last());
    }
  }
  X509_STORE_set_flags(store, X509_V_FLAG_PARTIAL_CHAIN);
  return {};
}

// --- TlsConnection

TlsConnection::TlsConnection(int socket, std::shared_ptr<const TlsContext> context)
    : context_(std::move(context)), socket_(socket) {
  create(true);
}

TlsConnection::TlsConnection(int socket, std::shared_ptr<const TlsContext> context, std::string_view host,
                             std::string_view session_key)
    : context_(std::move(context)), socket_(socket), session_key_(session_key.empty() ? host : session_key) {
  create(false);
  try {
    expect(context_->server_name_.empty() ? host : std::string_view(context_->server_name_));
    if (const auto session = context_->sessions_.take(session_key_)) SSL_set_session(ssl_, session.get());
  } catch (...) {
    SSL_free(ssl_);
    throw;
  }
}

TlsConnection::~TlsConnection() {
  SSL_free(ssl_);
}

void TlsConnection::create(bool is_server) {
  BioPtr bio(BIO_new(Hooks::method()));
  if (!bio) throw std::bad_alloc();
  ssl_ = SSL_new(context_->context_);
  if (ssl_ == nullptr) throw std::bad_alloc();
  BIO_set_data(bio.get(), this);
  BIO_set_init(bio.get(), 1);
  SSL_set_bio(ssl_, bio.get(), bio.get());
  static_cast<void>(bio.release());
  SSL_set_app_data(ssl_, this);
  if (is_server) {
    SSL_set_accept_state(ssl_);
  } else {
    SSL_set_connect_state(ssl_);
  }
}

/// Sets whom the certificate must be for.
void TlsConnection::expect(std::string_view host) {
  std::string name(host.substr(0, host.find('%')));  // without the zone of an IPv6 address
  if (!name.empty() && name.back() == '.') name.pop_back();
  X509_VERIFY_PARAM* const parameters = SSL_get0_param(ssl_);
  if (name.empty()) {
    if (context_->verifies_) misuse_ = detail::invalid_option("no host name to check the server's certificate for");
  } else if (is_numeric_address(name)) {
    if (X509_VERIFY_PARAM_set1_ip_asc(parameters, name.c_str()) != 1) throw std::bad_alloc();
  } else {
    X509_VERIFY_PARAM_set_hostflags(parameters, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    if (name.find('\0') != std::string::npos ||
        X509_VERIFY_PARAM_set1_host(parameters, name.data(), name.size()) != 1 ||
        SSL_set_tlsext_host_name(ssl_, name.c_str()) != 1) {
      misuse_ = detail::invalid_option("no name of a host: " + printable(name));
    }
  }
  ERR_clear_error();
}

template <class F>
Connection::Status TlsConnection::guarded(F&& operation) noexcept {
  try {
    begin();
    return operation();
  } catch (const std::exception&) {
    return fail(out_of_memory());  // nothing else throws
  }
}

void TlsConnection::begin() {
  ERR_clear_error();
  scratch().size = 0;
  socket_empty_ = false;
  received_ = 0;
  send_pending();
}

/// \returns the count; 0 at the end; -1 if there is nothing now, or with read_error_ set.
int TlsConnection::receive(char* into, int size) noexcept {
  // After what is asked for at once, others have their turn; and after a short read there is nothing more.
  constexpr std::size_t fair = 1024 * 1024;
  if (socket_empty_ || received_ >= fair) return -1;
  ssize_t count = 0;
  do {
    count = ::recv(socket_, into, static_cast<std::size_t>(size), 0);
  } while (count < 0 && errno == EINTR);
  if (count < 0) {
    if (errno != EAGAIN && errno != EWOULDBLOCK) read_error_ = errno;
    socket_empty_ = true;
    return -1;
  }
  if (count == 0) at_end_ = true;
  received_ += static_cast<std::size_t>(count);
  socket_empty_ = count < size;
  return static_cast<int>(count);
}

/// Takes all: what the socket does not take is pending.
int TlsConnection::send(const char* bytes, int size) noexcept {
  if (write_error_ != 0) return size;  // the operation tells it
  const auto* const first = reinterpret_cast<const std::byte*>(bytes);
  const auto count = static_cast<std::size_t>(size);
  try {
    Scratch& mine = scratch();
    if (pending_.empty() && count > mine.batch.size() - mine.size) send_batch();
    if (pending_.empty() && count <= mine.batch.size() - mine.size) {
      std::memcpy(mine.batch.data() + mine.size, first, count);
      mine.size += count;
    } else {
      pending_.insert(pending_.end(), first, first + count);
    }
  } catch (const std::bad_alloc&) {
    out_of_memory_ = true;
    return -1;
  }
  return size;
}

std::size_t TlsConnection::send_now(const std::byte* bytes, std::size_t size) noexcept {
  std::size_t sent = 0;
  while (sent < size) {
    const ssize_t count = ::send(socket_, bytes + sent, size - sent, MSG_NOSIGNAL);
    if (count >= 0) {
      const bool all = sent + static_cast<std::size_t>(count) == size;
      sent += static_cast<std::size_t>(count);
      if (!all) break;  // it is full
    } else if (errno != EINTR) {
      if (errno != EAGAIN && errno != EWOULDBLOCK) write_error_ = errno;
      break;
    }
  }
  return sent;
}

void TlsConnection::send_batch() {
  Scratch& mine = scratch();
  if (mine.size == 0) return;
  const std::size_t size = std::exchange(mine.size, 0);
  const std::size_t sent = send_now(mine.batch.data(), size);
  if (sent < size && write_error_ == 0) {
    pending_.assign(mine.batch.data() + sent, mine.batch.data() + size);
    pending_sent_ = 0;
  }
}

void TlsConnection::send_pending() noexcept {
  if (pending_.empty() || write_error_ != 0) return;
  pending_sent_ += send_now(pending_.data() + pending_sent_, pending_.size() - pending_sent_);
  if (pending_sent_ == pending_.size() || write_error_ != 0) {
    std::vector<std::byte>().swap(pending_);  // an idle connection keeps no memory for it
    pending_sent_ = 0;
    answers_ = 0;
  }
}

Connection::Status TlsConnection::handshake() {
  return guarded([&] {
    if (misuse_) return fail(misuse_);
    const int result = SSL_do_handshake(ssl_);
    const int why = result == 1 ? SSL_ERROR_NONE : SSL_get_error(ssl_, result);
    Error error;
    if (why != SSL_ERROR_NONE && why != SSL_ERROR_WANT_READ) error = describe(why, true);
    send_batch();
    if (error) return fail(std::move(error));
    if (write_error_ != 0) return fail(write_failure());
    if (why != SSL_ERROR_NONE) return Status::blocked;
    established_ = true;
    // A server has heard all of the client, and so has a client of TLS 1.2 of its server.
    confirmed_ = context_->is_server_ || SSL_version(ssl_) < TLS1_3_VERSION;
    has_input_ = SSL_has_pending(ssl_) == 1;
    // One of TLS 1.2 serves again, now that it has served; of 1.3 the server sends others.
    if (!context_->is_server_ && SSL_version(ssl_) < TLS1_3_VERSION && SSL_session_reused(ssl_) == 1) {
      context_->sessions_.put(session_key_, *SSL_get_session(ssl_));
    }
    return Status::done;
  });
}

Connection::Status TlsConnection::read(std::span<std::byte> into, std::size_t& count) {
  count = 0;
  return guarded([&] {
    if (deferred_) return fail(std::move(deferred_));
    const std::size_t pending_before = pending_.size();
    int why = SSL_ERROR_NONE;
    while (count < into.size()) {
      std::size_t part = 0;
      const int result = SSL_read_ex(ssl_, into.data() + count, into.size() - count, &part);
      if (result != 1) {
        why = SSL_get_error(ssl_, result);
        break;
      }
      count += part;
    }
    if (count != 0) confirmed_ = true;
    Error error;
    switch (why) {
      case SSL_ERROR_NONE: has_input_ = SSL_has_pending(ssl_) == 1; break;
      case SSL_ERROR_WANT_READ: has_input_ = !socket_empty_; break;
      case SSL_ERROR_ZERO_RETURN: has_input_ = count != 0; break;
      default: error = describe(why, !confirmed_); has_input_ = count != 0;
    }
    send_batch();
    if (!pending_.empty()) {
      answers_ += pending_.size() - std::min(pending_before, pending_.size());
      if (!error && answers_ > answers_limit) {
        error = Error(Errc::slow_consumer, "TLS: the peer asks for more key updates than it reads");
        has_input_ = count != 0;
      }
    }
    if (count != 0) {
      deferred_ = std::move(error);
      return Status::done;
    }
    if (error) return fail(std::move(error));
    return why == SSL_ERROR_ZERO_RETURN ? Status::ended : Status::blocked;
  });
}

Connection::Status TlsConnection::write(std::span<const iovec> pieces, std::size_t& taken) {
  taken = 0;
  const Status status = guarded([&] {
    std::size_t at = 0;      // the piece
    std::size_t offset = 0;  // in it
    const auto left = [&] { return pieces[at].iov_len - offset; };
    const auto bytes = [&] { return static_cast<const std::byte*>(pieces[at].iov_base) + offset; };
    // What the socket refuses is pending: then no more is taken.
    while (pending_.empty() && write_error_ == 0) {
      while (at < pieces.size() && left() == 0) {
        ++at;
        offset = 0;
      }
      if (at == pieces.size()) break;
      const std::byte* source = bytes();
      std::size_t size = left();
      if (size >= record_size || at + 1 == pieces.size()) {
        size = std::min(size, record_size);
        offset += size;
      } else {
        // small pieces, in one record
        auto& staging = scratch().staging;
        size = 0;
        while (at < pieces.size() && size < staging.size()) {
          const std::size_t part = std::min(left(), staging.size() - size);
          if (part != 0) std::memcpy(staging.data() + size, bytes(), part);
          size += part;
          offset += part;
          if (left() == 0) {
            ++at;
            offset = 0;
          }
        }
        source = staging.data();
      }
      if (Error error = encrypt(source, size)) return fail(std::move(error));
      taken += size;
    }
    return written();
  });
  if (status == Status::failed) taken = 0;
  return status;
}

Error TlsConnection::encrypt(const std::byte* bytes, std::size_t size) {
  if (records_left_-- == 0) {
    records_left_ = records_of_a_key_ - 1;
    if (SSL_version(ssl_) == TLS1_3_VERSION) SSL_key_update(ssl_, SSL_KEY_UPDATE_NOT_REQUESTED);
  }
  std::size_t done = 0;
  const int result = SSL_write_ex(ssl_, bytes, size, &done);
  if (result == 1 && done == size) return {};
  if (result == 1) return {make_error_code(boost::system::errc::protocol_error), "TLS: a record was written in part"};
  return describe(SSL_get_error(ssl_, result), false);
}

Connection::Status TlsConnection::flush() {
  return guarded([&] { return written(); });
}

Connection::Status TlsConnection::shut_down(const Error&) {
  return guarded([&] {
    if (established_ && !shut_ && write_error_ == 0) {
      shut_ = true;
      SSL_shutdown(ssl_);
    }
    return written();
  });
}

std::string TlsConnection::describe_handshake() const {
  return std::string("TLS handshake: ") + SSL_state_string_long(ssl_);
}

/// Sends what is in the batch, and says how it stands.
Connection::Status TlsConnection::written() {
  send_batch();
  if (write_error_ != 0) return fail(write_failure());
  return pending_.empty() ? Status::done : Status::blocked;
}

// --- what went wrong

namespace {

/// Of OpenSSL's queue the first entry about TLS, else the first; 0 if there is none. Empties the queue.
unsigned long take_cause() noexcept {
  unsigned long cause = 0;
  while (const auto code = ERR_get_error()) {
    if (ERR_GET_REASON(code) == ERR_R_MALLOC_FAILURE) cause = code;
    if (cause == 0 || (ERR_GET_LIB(cause) != ERR_LIB_SSL && ERR_GET_LIB(code) == ERR_LIB_SSL &&
                       ERR_GET_REASON(cause) != ERR_R_MALLOC_FAILURE)) {
      cause = code;
    }
  }
  return cause;
}

}  // namespace

void TlsConnection::note_refused_certificate(x509_store_ctx_st& store) noexcept {
  try {
    if (refused_certificate_.empty()) {
      refused_certificate_ = describe_refusal(X509_STORE_CTX_get_error(&store), X509_STORE_CTX_get_current_cert(&store),
                                              SSL_get0_param(ssl_), context_->is_server_);
    }
  } catch (const std::bad_alloc&) {
    // OpenSSL's own text serves.
  }
}

Error TlsConnection::describe(int ssl_error, bool handshaking) {
  const std::string prefix = handshaking ? "TLS handshake: " : "TLS: ";
  const auto code =
      handshaking ? make_error_code(Errc::handshake_failed) : make_error_code(boost::system::errc::protocol_error);
  const auto cause = take_cause();
  const int reason = ERR_GET_REASON(cause);
  if (out_of_memory_ || reason == ERR_R_MALLOC_FAILURE) return out_of_memory();
  // A server that takes packets closes at what it takes for one.
  const std::string hint = context_->is_server_ || established_ ? "" : "; perhaps it does not speak TLS";
  if (read_error_ != 0) {
    Error error = system_error(read_error_, prefix + "read");
    if (read_error_ == ECONNRESET) error.text += hint;
    return error;
  }
  const bool ended = ERR_GET_LIB(cause) == ERR_LIB_SSL && reason == SSL_R_UNEXPECTED_EOF_WHILE_READING;
  if (ended || (cause == 0 && at_end_)) {
    if (!handshaking || established_) {
      return {Errc::truncated, "TLS: the peer's connection ended without its saying so: bytes may be missing"};
    }
    return {code, prefix + "the peer closed the connection" + hint};
  }
  if (cause == 0) return {code, prefix + "OpenSSL gave up (" + std::to_string(ssl_error) + ")"};
  if (ERR_GET_LIB(cause) != ERR_LIB_SSL) return {code, prefix + openssl_reason(cause)};
  if (reason == SSL_R_CERTIFICATE_VERIFY_FAILED) {
    return {code, prefix + (refused_certificate_.empty() ? X509_verify_cert_error_string(SSL_get_verify_result(ssl_))
                                                         : refused_certificate_)};
  }
  std::string text = prefix + describe_ssl_reason(cause, context_->is_server_);
  if (reason > SSL_AD_REASON_OFFSET && asked_for_certificate_ && SSL_get_certificate(ssl_) == nullptr) {
    text += "; it asked for a certificate, and this end has none";
  }
  return {code, std::move(text)};
}

/// Why the socket takes nothing any more. The peer may have said so before it closed.
Error TlsConnection::write_failure() {
  const bool handshaking = !established_ || !confirmed_;
  std::array<std::byte, 1024> discarded;
  for (int turn = 0; turn < 256; ++turn) {
    std::size_t count = 0;
    ERR_clear_error();
    const int result =
        established_ ? SSL_read_ex(ssl_, discarded.data(), discarded.size(), &count) : SSL_do_handshake(ssl_);
    if (result == 1 && established_) continue;
    if (result == 1 || SSL_get_error(ssl_, result) != SSL_ERROR_SSL) break;
    const auto cause = ERR_peek_error();
    if (ERR_GET_LIB(cause) == ERR_LIB_SSL && ERR_GET_REASON(cause) > SSL_AD_REASON_OFFSET) {
      return describe(SSL_ERROR_SSL, handshaking);
    }
    break;
  }
  return system_error(write_error_, std::string(handshaking ? "TLS handshake: " : "TLS: ") + "write");
}

std::optional<TlsPeer> TlsConnection::tls_peer() const {
  if (!established_) return std::nullopt;
  std::optional<TlsPeer> peer(std::in_place);
  if (X509* const certificate = SSL_get0_peer_certificate(ssl_)) {
    peer->subject = subject_of(*certificate);
    peer->common_name = common_name_of(*certificate);
    peer->names = names_of(*certificate);
    peer->verified = context_->verifies_ && SSL_get_verify_result(ssl_) == X509_V_OK;
  }
  peer->version = SSL_version(ssl_) == TLS1_3_VERSION ? TlsVersion::tls1_3 : TlsVersion::tls1_2;
  peer->cipher = SSL_get_cipher_name(ssl_);
  const unsigned char* alpn = nullptr;
  unsigned int size = 0;
  SSL_get0_alpn_selected(ssl_, &alpn, &size);
  if (size != 0) peer->alpn.assign(reinterpret_cast<const char*>(alpn), size);
  peer->resumed = SSL_session_reused(ssl_) == 1;
  return peer;
}

}  // namespace detail
}  // namespace msgtrans
