// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <msgtrans/error.hpp>
#include <msgtrans/transport/connection.hpp>
#include <msgtrans/transport/tls.hpp>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

// OpenSSL's, which only tls.cpp includes
struct ssl_st;
struct ssl_ctx_st;
struct ssl_session_st;
struct x509_store_ctx_st;

namespace msgtrans::detail {

/// What ALPN calls this protocol over TLS.
inline constexpr std::string_view tls_protocol = "msgtrans/1";

/// What all connections of a listener or of a client share: options with their files read. Does not change, so new
/// certificates are a new context; connections keep the one they began with. Any thread.
class TlsContext {
 public:
  /// `protocol`: the name for ALPN. \returns null with `error` set if the options are wrong (`Errc::invalid_option`) or
  /// a file cannot be read (the system's error); the text names the option, the file, and what is wrong.
  static std::shared_ptr<const TlsContext> server(const TlsServerOptions& options, Error& error,
                                                  std::string_view protocol = tls_protocol);
  static std::shared_ptr<const TlsContext> client(const TlsClientOptions& options, Error& error,
                                                  std::string_view protocol = tls_protocol);

  ~TlsContext();
  TlsContext(const TlsContext&) = delete;
  TlsContext& operator=(const TlsContext&) = delete;

 private:
  friend class TlsConnection;

  struct FreeSession {
    void operator()(ssl_session_st* session) const noexcept;
  };
  using SessionHandle = std::unique_ptr<ssl_session_st, FreeSession>;

  /// A client's sessions that can be resumed, the oldest first: of a server the newest few, of all a bounded number.
  /// Each is handed out once, so that one that the server does not like is not tried again.
  class Sessions {
   public:
    void put(const std::string& key, ssl_session_st& session);
    [[nodiscard]] SessionHandle take(const std::string& key);

   private:
    struct Entry {
      std::string key;
      SessionHandle session;
    };
    std::mutex mutex_;
    std::deque<Entry> entries_;
  };

  TlsContext(bool is_server, std::string_view protocol);

  [[nodiscard]] Error set_up(TlsVersion least, TlsVersion most);
  [[nodiscard]] Error set_up_server(const TlsServerOptions& options);
  [[nodiscard]] Error set_up_client(const TlsClientOptions& options);
  [[nodiscard]] Error use(const TlsIdentity& identity);
  [[nodiscard]] Error trust(const char* file_option, const std::string& file, const char* pem_option,
                            const std::string& pem);

  bool is_server_;
  bool verifies_ = true;
  ssl_ctx_st* context_ = nullptr;
  std::string alpn_;  // length and name
  std::string server_name_;
  mutable Sessions sessions_;
};

/// TLS over a TCP socket or anything like it.
class TlsConnection final : public Connection {
 public:
  /// The server's end.
  TlsConnection(int socket, std::shared_ptr<const TlsContext> context);
  /// The client's end. `host`: the name or numeric address that the user gave. `session_key`: connections with the same
  /// one, of one context, resume each other's sessions; they must go to the same host. Empty: the host.
  /// \throws std::bad_alloc
  TlsConnection(int socket, std::shared_ptr<const TlsContext> context, std::string_view host,
                std::string_view session_key = {});
  ~TlsConnection() override;

  Status handshake() override;
  Status read(std::span<std::byte> into, std::size_t& count) override;
  [[nodiscard]] bool has_input() const noexcept override { return has_input_; }
  Status write(std::span<const iovec> pieces, std::size_t& taken) override;
  Status flush() override;
  [[nodiscard]] bool wants_write() const noexcept override { return !pending_.empty() || write_error_ != 0; }
  Status shut_down(const Error& reason) override;
  [[nodiscard]] bool awaits_peers_end() const noexcept override { return false; }
  [[nodiscard]] std::string describe_handshake() const override;

  /// How many records one key of TLS 1.3 serves; RFC 8446 has 24 million as the limit.
  void set_records_of_a_key(std::uint32_t count) noexcept { records_of_a_key_ = records_left_ = count; }

  /// None before the handshake is done. \throws std::bad_alloc
  [[nodiscard]] std::optional<TlsPeer> tls_peer() const override;

 private:
  friend class TlsContext;

  struct Hooks;  // what OpenSSL calls

  void create(bool is_server);
  void expect(std::string_view host);
  template <class F>
  Status guarded(F&& operation) noexcept;
  void begin();
  int receive(char* into, int size) noexcept;
  int send(const char* bytes, int size) noexcept;
  /// \returns how many bytes the socket took; sets write_error_.
  std::size_t send_now(const std::byte* bytes, std::size_t size) noexcept;
  void send_batch();
  void send_pending() noexcept;
  [[nodiscard]] Error encrypt(const std::byte* bytes, std::size_t size);
  [[nodiscard]] Error describe(int ssl_error, bool handshaking);
  [[nodiscard]] Error write_failure();
  void note_refused_certificate(x509_store_ctx_st& store) noexcept;
  [[nodiscard]] Status written();

  std::shared_ptr<const TlsContext> context_;
  ssl_st* ssl_ = nullptr;
  int socket_;
  int read_error_ = 0;  // errno
  int write_error_ = 0;
  std::uint32_t records_of_a_key_ = 1U << 23;
  std::uint32_t records_left_ = records_of_a_key_;
  bool established_ = false;
  bool confirmed_ = false;  // the peer has sent something since
  bool shut_ = false;
  bool at_end_ = false;         // the socket is
  bool socket_empty_ = false;   // found so in this call
  bool out_of_memory_ = false;  // found so in a hook
  bool asked_for_certificate_ = false;
  bool has_input_ = false;
  std::size_t received_ = 0;  // in this call
  std::size_t answers_ = 0;   // bytes in pending_ that the peer has asked for
  std::size_t pending_sent_ = 0;
  std::vector<std::byte> pending_;  // written by TLS, not yet taken by the socket
  std::string session_key_;
  std::string refused_certificate_;
  Error misuse_;    // found when it was made
  Error deferred_;  // found behind bytes that were handed out first
};

}  // namespace msgtrans::detail
