// SPDX-License-Identifier: Apache-2.0
#include "websocket.hpp"

#include "check_option.hpp"
#include "deflate_agreement.hpp"

#include <algorithm>
#include <array>
#include <boost/beast/core/detail/base64.hpp>
#include <boost/beast/core/detail/sha1.hpp>
#include <boost/beast/core/string.hpp>
#include <boost/beast/http/empty_body.hpp>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/rfc7230.hpp>
#include <cerrno>
#include <cstring>
#include <exception>
#include <sys/random.h>
#include <sys/socket.h>
#include <utility>

namespace msgtrans {

namespace {

constexpr std::size_t least_header = 256;
constexpr std::size_t most_header = 64 * 1024;
constexpr std::uint32_t most_missed_pings = 1000;

bool is_field_value(std::string_view text) noexcept {
  return std::ranges::all_of(text,
                             [](char c) { return c == '\t' || (static_cast<unsigned char>(c) >= 0x20 && c != 0x7f); });
}

/// Visible characters of a request's target.
bool is_target(std::string_view text) noexcept {
  return text.starts_with('/') && std::ranges::all_of(text, [](char c) { return c > 0x20 && c < 0x7f; });
}

/// What a peer sent, fit for a message: in quotation marks, cut, with question marks for what cannot be shown.
std::string quoted(std::string_view text) {
  constexpr std::size_t most = 100;
  std::string shown = "\"";
  for (const char c : text.substr(0, most)) shown += c >= 0x20 && c < 0x7f && c != '"' ? c : '?';
  return shown + (text.size() > most ? "...\"" : "\"");
}

/// What a server's options and a client's both have.
template <class Options>
Error validate_common(const Options& options) {
  if (!options.subprotocol.empty() && !detail::is_token(options.subprotocol)) {
    return detail::invalid_option("subprotocol is " + quoted(options.subprotocol) +
                                  ", must be empty or a token of HTTP");
  }
  Error error = detail::check_range<std::size_t>("max_header", options.max_header, least_header, most_header);
  if (!error) error = detail::check_duration("ping_interval", options.ping_interval);
  if (!error) error = detail::check_range("max_missed_pings", options.max_missed_pings, 1U, most_missed_pings);
  if (error) return error;
  if (!options.deflate) return {};
  if (const int level = options.deflate->level; level < 0 || level > 9) {
    return detail::invalid_option("deflate.level is " + std::to_string(level) +
                                  ", must be from 1 to 9, or 0 for the default");
  }
  if (const int bits = options.deflate->window_bits;
      bits < wire::least_deflate_window_bits || bits > wire::most_window_bits) {
    return detail::invalid_option("deflate.window_bits is " + std::to_string(bits) + ", must be from 9 to 15");
  }
  return {};
}

}  // namespace

Error validate(const WebSocketServerOptions& options) {
  return validate_common(options);
}

Error validate(const WebSocketClientOptions& options) {
  if (!is_field_value(options.origin))
    return detail::invalid_option("origin is " + quoted(options.origin) + ", must be one line");
  for (const auto& [name, value] : options.headers) {
    if (!detail::is_token(name))
      return detail::invalid_option("headers has the name " + quoted(name) + ", must be a token of HTTP");
    if (!is_field_value(value)) {
      return detail::invalid_option("headers has the value " + quoted(value) + " of " + name + ", must be one line");
    }
    for (const std::string_view own :
         {"Host", "Upgrade", "Connection", "Sec-WebSocket-Key", "Sec-WebSocket-Version", "Sec-WebSocket-Protocol",
          "Sec-WebSocket-Extensions", "Origin", "Content-Length", "Transfer-Encoding"}) {
      if (boost::beast::iequals(name, own))
        return detail::invalid_option("headers has " + name + ", which is the handshake's own");
    }
  }
  return validate_common(options);
}

namespace detail {

namespace {

namespace http = boost::beast::http;
using boost::beast::string_view;

/// Packets up to this size are copied behind their frame headers; what is larger is written from where it lies.
constexpr std::size_t direct_size = 16 * 1024;
constexpr std::size_t frames_size = 64 * 1024;
constexpr std::size_t most_direct_pieces = 16;
/// Packets over this size are not compressed: that would take the thread too long, and what the socket does not take of
/// them has to be kept.
constexpr std::size_t most_deflated = 512 * 1024;
/// Control frames wait in line up to that much; of pings that come then only the latest is answered.
constexpr std::size_t most_pending_controls = 4 * 1024;

std::span<std::byte> batch_buffer() {
  static thread_local const auto buffer = std::make_unique_for_overwrite<std::byte[]>(frames_size);
  return {buffer.get(), frames_size};
}

/// Unpredictable mask keys, a few hundred for a call of the system.
wire::MaskKey random_key() {
  struct Pool {
    std::array<wire::MaskKey, 512> keys;
    std::size_t left = 0;
  };
  static thread_local Pool pool;
  if (pool.left == 0) {
    auto* const bytes = reinterpret_cast<char*>(pool.keys.data());
    for (std::size_t have = 0; have < sizeof pool.keys;) {
      const ssize_t count = ::getrandom(bytes + have, sizeof pool.keys - have, 0);
      if (count > 0) {
        have += static_cast<std::size_t>(count);
      } else if (errno != EINTR) {
        throw boost::system::system_error(errno, boost::system::system_category(), "getrandom");
      }
    }
    pool.left = pool.keys.size();
  }
  return std::exchange(pool.keys[--pool.left], 0);
}

std::string base64(const void* bytes, std::size_t size) {
  namespace base64 = boost::beast::detail::base64;
  std::string text(base64::encoded_size(size), '\0');
  text.resize(base64::encode(text.data(), bytes, size));
  return text;
}

/// RFC 6455, 4.2.2: what proves that the server has understood the key.
std::string accept_of(std::string_view key) {
  namespace sha1 = boost::beast::detail;
  constexpr std::string_view guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
  sha1::sha1_context context;
  std::array<char, sha1::sha1_context::digest_size> digest;
  sha1::init(context);
  sha1::update(context, key.data(), key.size());
  sha1::update(context, guid.data(), guid.size());
  sha1::finish(context, digest.data());
  return base64(digest.data(), digest.size());
}

bool is_key(std::string_view text) {
  constexpr std::size_t size = 24;  // 16 bytes in base64
  if (text.size() != size || !text.ends_with("==")) return false;
  std::array<char, 18> bytes;
  static_assert(boost::beast::detail::base64::decoded_size(size) == bytes.size());
  const auto [written, read] = boost::beast::detail::base64::decode(bytes.data(), text.data(), text.size());
  return written == 16 && read >= size - 2;
}

std::string_view view(string_view text) noexcept {
  return {text.data(), text.size()};
}

/// Whether a comma-separated list, on however many lines, has the word; in any case.
bool has_token(const http::fields& fields, http::field name, std::string_view token) {
  const auto [first, last] = fields.equal_range(name);
  return std::any_of(first, last, [&](const auto& field) {
    return http::token_list(field.value()).exists({token.data(), token.size()});
  });
}

/// And exactly so.
bool has_exact_token(const http::fields& fields, http::field name, std::string_view token) {
  const auto [first, last] = fields.equal_range(name);
  return std::any_of(first, last, [&](const auto& field) {
    return std::ranges::any_of(http::token_list(field.value()), [&](string_view one) { return view(one) == token; });
  });
}

/// The lists on all lines of that name as one; nothing if it is not there.
std::optional<std::string> whole_list(const http::fields& fields, http::field name) {
  std::optional<std::string> whole;
  const auto [first, last] = fields.equal_range(name);
  for (auto at = first; at != last; ++at) {
    if (whole) {
      *whole += ',';
    } else {
      whole.emplace();
    }
    whole->append(view(at->value()));
  }
  return whole;
}

/// A request's target without host and query.
std::string_view path_of(std::string_view target) noexcept {
  for (const std::string_view scheme : {"http://", "https://", "ws://", "wss://"}) {
    if (!target.starts_with(scheme)) continue;
    target.remove_prefix(scheme.size());
    const std::size_t slash = target.find_first_of("/?");
    if (slash == std::string_view::npos || target[slash] == '?') return "/";
    target.remove_prefix(slash);
    break;
  }
  return target.substr(0, target.find('?'));
}

std::string_view reason_phrase(unsigned status) {
  return view(http::obsolete_reason(http::int_to_status(status)));
}

iovec iovec_of(std::span<const std::byte> bytes) noexcept {
  return {const_cast<std::byte*>(bytes.data()), bytes.size()};  // sendmsg only reads
}

Error system_error(const char* what) {
  const error_code code(errno, boost::system::system_category());
  return Error(code, std::string("WebSocket: ") + what + ": " + code.message());
}

Error handshake_error(const std::string& cause) {
  return Error(Errc::handshake_failed, "WebSocket handshake: " + cause);
}

/// What the Close frame says of why a session ends.
std::uint16_t close_code_of(const Error& reason) noexcept {
  if (!reason) return wire::close_code::normal;
  if (reason.code.category() != error_category()) return wire::close_code::internal_error;
  switch (static_cast<Errc>(reason.code.value())) {
    case Errc::closed:
    case Errc::closed_by_user:
    case Errc::closed_by_peer: return wire::close_code::normal;
    case Errc::stopping:
    case Errc::drain_expired: return wire::close_code::going_away;
    case Errc::payload_too_large:
    case Errc::extension_too_large:
    case Errc::decompressed_too_large: return wire::close_code::message_too_big;
    case Errc::refused:
    case Errc::admission_timeout:
    case Errc::first_packet_timeout:
    case Errc::idle_timeout:
    case Errc::read_stalled:
    case Errc::write_stalled:
    case Errc::slow_consumer: return wire::close_code::policy_violation;
    case Errc::rate_limited:
    case Errc::too_many_sessions: return wire::close_code::try_again_later;
    default: break;
  }
  return is_protocol_error(reason.code) ? wire::close_code::protocol_error : wire::close_code::internal_error;
}

/// And with which text. What a handler threw, or the system said, is not for the peer.
std::string close_text_of(const Error& reason, std::uint16_t code) {
  if (code == wire::close_code::internal_error) {
    return reason.code.category() == error_category() ? reason.code.message() : std::string();
  }
  return code == wire::close_code::normal ? reason.text : reason.message();
}

}  // namespace

/// What only the handshake needs.
struct WebSocketConnection::Handshake {
  std::shared_ptr<const WebSocketServerOptions> server;  // the one ...
  std::shared_ptr<const WebSocketClientOptions> client;  // ... or the other
  std::string host;
  std::string target;
  std::string key;
  std::string head;  // as far as it came, and what came behind it
  std::unique_ptr<const Error> refusal;
  bool below_done = false;
  bool asked = false;
};

/// A ping that waits for its answer.
struct WebSocketConnection::Pong {
  std::size_t size = 0;
  std::array<std::byte, wire::max_control_payload> payload;
};

WebSocketConnection::WebSocketConnection(Below below, wire::WebSocketRole role, const wire::Limits& limits,
                                         std::chrono::milliseconds ping_interval, std::uint32_t max_missed_pings)
    : descriptor_(below.descriptor),
      role_(role),
      max_missed_pings_(max_missed_pings),
      ping_interval_(ping_interval),
      keep_alive_due_(ping_interval.count() == 0 ? protocol::TimePoint::max() : protocol::TimePoint::min()),
      below_(std::move(below.connection)),
      handshake_(std::make_unique<Handshake>()),
      reader_(role, limits),
      framer_(role) {}

WebSocketConnection::~WebSocketConnection() = default;

std::unique_ptr<WebSocketConnection> WebSocketConnection::server(Below below,
                                                                 std::shared_ptr<const WebSocketServerOptions> options,
                                                                 std::string path, const wire::Limits& limits) {
  std::unique_ptr<WebSocketConnection> self(new WebSocketConnection(
      std::move(below), wire::WebSocketRole::server, limits, options->ping_interval, options->max_missed_pings));
  self->handshake_->server = std::move(options);
  self->handshake_->target = std::move(path);
  return self;
}

std::unique_ptr<WebSocketConnection> WebSocketConnection::client(Below below,
                                                                 std::shared_ptr<const WebSocketClientOptions> options,
                                                                 std::string host, std::string target,
                                                                 const wire::Limits& limits) {
  std::unique_ptr<WebSocketConnection> self(new WebSocketConnection(
      std::move(below), wire::WebSocketRole::client, limits, options->ping_interval, options->max_missed_pings));
  self->handshake_->client = std::move(options);
  self->handshake_->host = std::move(host);
  self->handshake_->target = std::move(target);
  return self;
}

// --- below

Connection::Status WebSocketConnection::receive(std::span<std::byte> into, std::size_t& count) {
  count = 0;
  if (below_) {
    const Status status = below_->read(into, count);
    if (status == Status::failed) return fail(below_->error());
    if (status == Status::done) heard_ = true;
    return status;
  }
  ssize_t result = 0;
  do result = ::recv(descriptor_, into.data(), into.size(), 0);
  while (result < 0 && errno == EINTR);
  if (result == 0) return Status::ended;
  if (result < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? Status::blocked : fail(system_error("read"));
  count = static_cast<std::size_t>(result);
  heard_ = true;
  return Status::done;
}

Connection::Status WebSocketConnection::transmit(std::span<iovec> pieces, std::size_t& taken) {
  taken = 0;
  if (below_) {
    const Status status = below_->write(pieces, taken);
    blocked_ = status == Status::blocked;
    return status == Status::failed ? fail(below_->error()) : status;
  }
  std::size_t offered = 0;
  for (const iovec& piece : pieces) offered += piece.iov_len;
  ssize_t result = 0;
  do {
    if (pieces.size() == 1) {  // noticeably cheaper
      result = ::send(descriptor_, pieces.front().iov_base, pieces.front().iov_len, MSG_NOSIGNAL);
    } else {
      msghdr message{};
      message.msg_iov = pieces.data();
      message.msg_iovlen = pieces.size();
      result = ::sendmsg(descriptor_, &message, MSG_NOSIGNAL);
    }
  } while (result < 0 && errno == EINTR);
  if (result < 0 && errno != EAGAIN && errno != EWOULDBLOCK) return fail(system_error("write"));
  if (result > 0) taken = static_cast<std::size_t>(result);
  blocked_ = taken < offered;
  return blocked_ ? Status::blocked : Status::done;
}

void WebSocketConnection::append(std::span<const std::byte> bytes) {
  pending_.insert(pending_.end(), bytes.begin(), bytes.end());
}

Connection::Status WebSocketConnection::flush_pending() {
  while (pending_at_ < pending_.size()) {
    iovec piece = iovec_of(std::span(pending_).subspan(pending_at_));
    std::size_t taken = 0;
    const Status status = transmit({&piece, 1}, taken);
    pending_at_ += taken;
    if (pending_at_ < pending_.size()) {
      if (status != Status::done) return status;
    } else {
      std::vector<std::byte>().swap(pending_);  // an idle session holds no memory
      pending_at_ = 0;
      if (status != Status::done) return status;
    }
  }
  return Status::done;
}

// --- handshake

std::string WebSocketConnection::describe_handshake() const {
  if (!handshake_) return "WebSocket handshake: over";
  if (below_ && !handshake_->below_done) return below_->describe_handshake();
  return "WebSocket handshake: " + std::to_string(handshake_->head.size()) + " bytes of the " +
         (role_ == wire::WebSocketRole::server ? "client's request" : "server's answer") + " came, not all of its head";
}

Connection::Status WebSocketConnection::handshake() {
  if (!handshake_) return Status::done;
  if (below_ && !handshake_->below_done) {
    const Status status = below_->handshake();
    if (status == Status::failed) return fail(below_->error());
    if (status != Status::done) return status;
    handshake_->below_done = true;
  }
  if (handshake_->refusal) {
    // Not for the request, which would cost more: it is read, and thrown away, until the peer goes.
    const bool too_fast = handshake_->refusal->code == make_error_code(Errc::rate_limited);
    return refuse(too_fast ? 429 : 503, handshake_->refusal->message(), "Retry-After: 1\r\n");
  }
  const Status status = role_ == wire::WebSocketRole::server ? serve_handshake() : ask_handshake();
  if (status == Status::done) {
    handshake_.reset();
    handshaken_ = true;
  }
  return status;
}

void WebSocketConnection::refuse_handshake(Error why) {
  handshake_->refusal = std::make_unique<const Error>(std::move(why));
}

Connection::Status WebSocketConnection::read_head(std::size_t limit, std::string_view& head) {
  std::string& have = handshake_->head;
  const char* const whose = role_ == wire::WebSocketRole::server ? "request" : "answer";
  for (;;) {
    std::array<std::byte, 2048> buffer;
    std::size_t count = 0;
    const Status status = receive(buffer, count);
    if (status == Status::ended) {
      return fail(handshake_error("the peer closed after " + std::to_string(have.size()) + " bytes of its " + whose));
    }
    if (status != Status::done) return status;
    constexpr std::string_view end = "\r\n\r\n";
    const std::size_t from = have.size() < end.size() ? 0 : have.size() - end.size() + 1;
    have.append(reinterpret_cast<const char*>(buffer.data()), count);
    // Nobody who speaks something else should have to wait for the deadline.
    if (have.front() < 'A' || have.front() > 'Z') {
      const std::string cause = std::string("the ") + whose + " is not HTTP: its first byte is " +
                                std::to_string(static_cast<unsigned char>(have.front()));
      return role_ == wire::WebSocketRole::server ? refuse(400, cause) : fail(handshake_error(cause));
    }
    const std::size_t at = have.find(end, from);
    const std::size_t size = at == std::string::npos ? have.size() : at + end.size();
    if (size > limit) {
      const std::string cause =
          std::string("the head of the ") + whose + " is over the limit of " + std::to_string(limit) + " bytes";
      return role_ == wire::WebSocketRole::server ? refuse(431, cause) : fail(handshake_error(cause));
    }
    if (at == std::string::npos) continue;
    const auto behind = std::as_bytes(std::span(have)).subspan(size);
    input_.assign(behind.begin(), behind.end());
    head = std::string_view(have).substr(0, size);
    return Status::done;
  }
}

Connection::Status WebSocketConnection::serve_handshake() {
  std::string_view head;
  const Status status = read_head(handshake_->server->max_header, head);
  return status == Status::done ? take_request(head) : status;
}

Connection::Status WebSocketConnection::take_request(std::string_view head) {
  const WebSocketServerOptions& options = *handshake_->server;
  http::request_parser<http::empty_body> parser;
  parser.header_limit(static_cast<std::uint32_t>(head.size()));
  error_code code;
  parser.put(boost::asio::const_buffer(head.data(), head.size()), code);
  if (code || !parser.is_header_done()) {
    return refuse(400, "the request is not HTTP: " + (code ? code.message() : "no head"));
  }
  const auto& request = parser.get();
  const std::string_view target = view(request.target());
  if (request.method() != http::verb::get) {
    return refuse(405, "method is " + quoted(view(request.method_string())) + ", must be GET", "Allow: GET\r\n");
  }
  if (path_of(target) != handshake_->target) return refuse(404, "no such path " + quoted(target));
  if (request.version() < 11) return refuse(400, "HTTP version is below 1.1");
  if (request.count(http::field::host) != 1) return refuse(400, "must have one Host header");
  constexpr std::string_view upgrade = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n";
  if (!has_token(request, http::field::upgrade, "websocket")) {
    return refuse(426, "no upgrade to WebSocket: Upgrade is " + quoted(view(request[http::field::upgrade])), upgrade);
  }
  if (!has_token(request, http::field::connection, "upgrade")) {
    return refuse(426, "no upgrade: Connection is " + quoted(view(request[http::field::connection])), upgrade);
  }
  if (const auto version = view(request[http::field::sec_websocket_version]);
      version != "13" || request.count(http::field::sec_websocket_version) != 1) {
    return refuse(426, "Sec-WebSocket-Version is " + quoted(version) + ", must be 13", upgrade);
  }
  const auto key = view(request[http::field::sec_websocket_key]);
  if (request.count(http::field::sec_websocket_key) != 1 || !is_key(key)) {
    return refuse(400, "Sec-WebSocket-Key is " + quoted(key) + ", must be one of 16 bytes in base64");
  }
  if (parser.chunked() || parser.content_length().value_or(0) != 0) return refuse(400, "the request has a body");
  if (options.check_origin) {
    const auto origin = view(request[http::field::origin]);
    bool allowed = false;
    try {
      allowed = request.count(http::field::origin) <= 1 && options.check_origin(origin);
    } catch (const std::exception& thrown) {
      return refuse(500, std::string("check_origin has thrown: ") + thrown.what());
    } catch (...) {
      return refuse(500, "check_origin has thrown");
    }
    if (!allowed) return refuse(403, "origin " + quoted(origin) + " is not allowed");
  }
  std::optional<DeflateAgreement> deflate;
  if (options.deflate) {
    if (const auto offered = whole_list(request, http::field::sec_websocket_extensions)) {
      const auto extensions = ExtensionList::read(*offered);
      if (!extensions)
        return refuse(400, "Sec-WebSocket-Extensions is " + quoted(*offered) + ", which is no such list");
      deflate = accept_deflate(*extensions, options.deflate->window_bits);
    }
  }
  std::string answer =
      "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
      "Sec-WebSocket-Accept: " +
      accept_of(key) + "\r\n";
  if (!options.subprotocol.empty() &&
      has_exact_token(request, http::field::sec_websocket_protocol, options.subprotocol)) {
    subprotocol_ = options.subprotocol;
    answer += "Sec-WebSocket-Protocol: " + subprotocol_ + "\r\n";
  }
  if (deflate) {
    agree_to_deflate(*options.deflate, deflate->window_bits);
    answer += "Sec-WebSocket-Extensions: " + deflate->answer + "\r\n";
  }
  answer += "\r\n";
  append(std::as_bytes(std::span(answer)));
  return flush_pending() == Status::failed ? Status::failed : Status::done;
}

Connection::Status WebSocketConnection::refuse(unsigned status, const std::string& cause, std::string_view headers) {
  // What a function of the application's has thrown is not for the peer.
  const std::string body = (status == 500 ? std::string(reason_phrase(status)) : cause) + "\n";
  std::string answer = "HTTP/1.1 " + std::to_string(status) + " ";
  answer.append(reason_phrase(status)).append("\r\nConnection: close\r\n");
  answer.append(headers).append("Content-Type: text/plain\r\nX-Content-Type-Options: nosniff\r\n");
  answer += "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body;
  append(std::as_bytes(std::span(answer)));
  part();
  return fail(handshake_error(cause + " (answered with " + std::to_string(status) + ")"));
}

Connection::Status WebSocketConnection::ask_handshake() {
  if (!handshake_->asked) {
    handshake_->asked = true;
    if (!is_target(handshake_->target) || handshake_->host.empty() || !is_field_value(handshake_->host)) {
      return fail(Error(Errc::invalid_address,
                        "WebSocket: host is " + quoted(handshake_->host) + ", path is " + quoted(handshake_->target)));
    }
    const WebSocketClientOptions& options = *handshake_->client;
    std::array<wire::MaskKey, 4> nonce;
    std::ranges::generate(nonce, random_key);
    handshake_->key = base64(nonce.data(), sizeof nonce);
    std::string request = "GET " + handshake_->target + " HTTP/1.1\r\nHost: " + handshake_->host +
                          "\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                          "Sec-WebSocket-Key: " +
                          handshake_->key + "\r\n";
    if (!options.subprotocol.empty()) request += "Sec-WebSocket-Protocol: " + options.subprotocol + "\r\n";
    if (options.deflate) request += "Sec-WebSocket-Extensions: " + deflate_offer(options.deflate->window_bits) + "\r\n";
    if (!options.origin.empty()) request += "Origin: " + options.origin + "\r\n";
    for (const auto& [name, value] : options.headers) request += name + ": " + value + "\r\n";
    request += "\r\n";
    append(std::as_bytes(std::span(request)));
  }
  const Status status = flush();
  if (status == Status::failed) return status;
  std::string_view head;
  const Status read = read_head(handshake_->client->max_header, head);
  return read == Status::done ? take_answer(head) : read;
}

Connection::Status WebSocketConnection::take_answer(std::string_view head) {
  const WebSocketClientOptions& options = *handshake_->client;
  http::response_parser<http::empty_body> parser;
  parser.header_limit(static_cast<std::uint32_t>(head.size()));
  parser.skip(true);
  error_code code;
  parser.put(boost::asio::const_buffer(head.data(), head.size()), code);
  if (code || !parser.is_header_done()) {
    return fail(handshake_error("the answer is not HTTP: " + (code ? code.message() : "no head")));
  }
  const auto& answer = parser.get();
  if (answer.result_int() != 101) {
    return fail(handshake_error("the server answered " + quoted(head.substr(0, head.find("\r\n")))));
  }
  if (!has_token(answer, http::field::upgrade, "websocket")) {
    return fail(handshake_error("the answer's Upgrade is " + quoted(view(answer[http::field::upgrade]))));
  }
  if (!has_token(answer, http::field::connection, "upgrade")) {
    return fail(handshake_error("the answer's Connection is " + quoted(view(answer[http::field::connection]))));
  }
  if (const auto accept = view(answer[http::field::sec_websocket_accept]);
      accept != accept_of(handshake_->key) || answer.count(http::field::sec_websocket_accept) != 1) {
    return fail(handshake_error("Sec-WebSocket-Accept is " + quoted(accept) + ", which does not belong to the key"));
  }
  if (const auto chosen = whole_list(answer, http::field::sec_websocket_extensions)) {
    const auto refused = [&](const std::string& why) {
      return fail(handshake_error("the server chose the extension " + quoted(*chosen) + ", " + why));
    };
    if (!options.deflate) return refused("none was offered");
    const auto extensions = ExtensionList::read(*chosen);
    if (!extensions) return refused("which is no list of extensions");
    std::string problem;
    const int window_bits = check_deflate_answer(*extensions, options.deflate->window_bits, problem);
    if (window_bits == 0) return refused(problem);
    agree_to_deflate(*options.deflate, window_bits);
  }
  if (const auto count = answer.count(http::field::sec_websocket_protocol); count != 0) {
    const auto chosen = view(answer[http::field::sec_websocket_protocol]);
    if (count != 1 || chosen.empty() || chosen != options.subprotocol) {
      return fail(handshake_error("the server chose the subprotocol " + quoted(chosen) + ", which was not offered"));
    }
    subprotocol_ = chosen;
  }
  return Status::done;
}

void WebSocketConnection::agree_to_deflate(const WebSocketDeflateOptions& options, int window_bits) {
  deflates_ = true;
  deflate_ = options;
  deflate_.window_bits = window_bits;
  reader_.take_compressed();
}

// --- in

Connection::Status WebSocketConnection::read(std::span<std::byte> into, std::size_t& count) {
  count = 0;
  if (failure_) return fail(*failure_);
  if (peer_code_ != 0) {
    end_told_ = true;
    return Status::ended;
  }
  constexpr int most_rounds = 8;  // a peer that sends nothing but pings must not keep the others waiting
  std::byte* out = into.data();
  Status status = Status::done;
  for (int round = 0; round < most_rounds && out == into.data() && status == Status::done; ++round) {
    if (deflates_) [[unlikely]] {
      auto room = into;
      status = read_inflating(room);
      out = room.data();
      continue;
    }
    std::size_t size = 0;
    if (!input_.empty()) {
      size = std::min(input_.size(), into.size());
      std::memcpy(into.data(), input_.data(), size);
      input_.erase(input_.begin(), input_.begin() + static_cast<std::ptrdiff_t>(size));
      if (input_.empty()) std::vector<std::byte>().swap(input_);
    } else if (status = receive(into, size); status == Status::ended) {
      status = at_end();
    }
    std::span<const std::byte> in = into.first(size);
    if (status == Status::done) status = take_frames(in, out);
  }
  count = static_cast<std::size_t>(out - into.data());
  if (count == 0) {
    if (status == Status::ended) end_told_ = true;
    return status == Status::done ? Status::blocked : status;
  }
  // What else was found is told by the next call.
  if (status == Status::failed) failure_ = std::make_unique<Error>(error());
  return Status::done;
}

Connection::Status WebSocketConnection::read_inflating(std::span<std::byte>& out) {
  const bool kept = !input_.empty() || reader_.has_output();
  std::span<const std::byte> in = input_;
  if (!kept) {
    const auto buffer = batch_buffer();  // nothing else uses it meanwhile
    std::size_t size = 0;
    if (const Status status = receive(buffer, size); status != Status::done) {
      return status == Status::ended ? at_end() : status;
    }
    in = buffer.first(size);
  }
  const Status status = take_frames(in, out);
  if (!kept) {
    input_.assign(in.begin(), in.end());
  } else if (in.empty()) {
    std::vector<std::byte>().swap(input_);  // an idle session holds no memory
  } else {
    input_.erase(input_.begin(), input_.end() - static_cast<std::ptrdiff_t>(in.size()));
  }
  return status;
}

template <class Out>
Connection::Status WebSocketConnection::take_frames(std::span<const std::byte>& in, Out& out) {
  using Event = wire::FrameReader::Event;
  Status status = Status::done;
  for (bool more = true; more;) {
    switch (reader_.read(in, out)) {
      case Event::need_more:
      case Event::full: more = false; break;
      case Event::pong: break;
      case Event::ping:
        if (!put_control(wire::Opcode::pong, reader_.control_payload())) {
          if (!pong_) pong_ = std::make_unique<Pong>();
          const auto payload = reader_.control_payload();
          pong_->size = payload.size();
          std::ranges::copy(payload, pong_->payload.begin());
        }
        break;
      case Event::close:
        take_close();
        status = Status::ended;
        more = false;
        break;
      case Event::violation: return refuse_frames();
    }
  }
  if (pending_at_ < pending_.size() && flush_pending() == Status::failed) return Status::failed;
  return status;
}

void WebSocketConnection::take_close() {
  peer_code_ = reader_.peer_code();
  if (const auto text = reader_.peer_text(); !text.empty()) peer_text_ = std::make_unique<std::string>(text);
  if (close_sent_ && below_) below_->shut_down(Error(Errc::closed_by_peer));
}

/// The bytes have ended, and no Close was among them.
Connection::Status WebSocketConnection::at_end() {
  if (close_sent_) return Status::ended;
  return fail(Error(Errc::truncated, std::string("WebSocket: the connection ended without a Close frame") +
                                         (reader_.has_partial() ? ", inside a message" : "")));
}

Error WebSocketConnection::end_reason() const {
  if (peer_code_ == 0) return Error(Errc::closed_by_peer);
  std::string text = "closed by peer, WebSocket code ";
  text += peer_code_ == wire::close_code::no_status ? "none" : std::to_string(peer_code_);
  if (peer_text_) text += ": " + *peer_text_;
  return Error(Errc::closed_by_peer, std::move(text));
}

bool WebSocketConnection::has_input() const noexcept {
  return !input_.empty() || reader_.has_output() || failure_ || (peer_code_ != 0 && !end_told_) ||
         (below_ && below_->has_input());
}

Connection::Status WebSocketConnection::refuse_frames() {
  if (!close_sent_ && framer_.at_boundary()) {
    wire::ControlFrame frame;
    append(std::span(frame).first(
        wire::encode_close_frame(reader_.violation_code(), reader_.error().text, control_key(), frame)));
  }
  close_sent_ = true;
  part();
  return fail(reader_.error());
}

void WebSocketConnection::part() {
  if (flush() != Status::done) return;
  if (below_) {
    below_->shut_down(Error(Errc::closed_by_user));
    return;
  }
  // A socket that is closed with something unread makes the system throw away what was written.
  ::shutdown(descriptor_, SHUT_WR);
  std::array<std::byte, 4096> rest;
  for (int i = 0; i < 64 && ::recv(descriptor_, rest.data(), rest.size(), 0) > 0; ++i) {
  }
}

// --- out

std::optional<wire::MaskKey> WebSocketConnection::control_key() const {
  if (role_ == wire::WebSocketRole::server) return std::nullopt;
  return random_key();
}

bool WebSocketConnection::may_put_control() const noexcept {
  return handshaken_ && !close_sent_ && framer_.at_boundary() && pending_.size() - pending_at_ <= most_pending_controls;
}

bool WebSocketConnection::put_control(wire::Opcode opcode, std::span<const std::byte> payload) {
  if (!may_put_control()) return false;
  wire::ControlFrame frame;
  append(std::span(frame).first(wire::encode_control_frame(opcode, payload, control_key(), frame)));
  if (opcode == wire::Opcode::pong) pong_.reset();  // an older one
  return true;
}

void WebSocketConnection::put_pong() {
  if (pong_ && may_put_control()) {
    const auto pong = std::move(pong_);
    put_control(wire::Opcode::pong, std::span(pong->payload).first(pong->size));
  }
}

/// What `write` was given and has not taken yet.
struct WebSocketConnection::Unsent {
  std::span<const iovec> pieces;
  std::span<const std::byte> in = {};  // the rest of the piece before the next

  bool refill() {
    while (in.empty() && !pieces.empty()) {
      in = {static_cast<const std::byte*>(pieces.front().iov_base), pieces.front().iov_len};
      pieces = pieces.subspan(1);
    }
    return !in.empty();
  }
  void skip(std::size_t count) {
    while (count != 0 && refill()) {
      const std::size_t size = std::min(count, in.size());
      in = in.subspan(size);
      count -= size;
    }
  }
  /// Calls `take` for the pieces of the next `count` bytes, until it returns false. \returns false if there are fewer
  /// bytes, or it did.
  template <class Take>
  bool each(std::size_t count, Take take) const {
    Unsent rest = *this;
    while (count != 0) {
      if (!rest.refill()) return false;
      const auto piece = rest.in.first(std::min(count, rest.in.size()));
      if (!take(piece)) return false;
      rest.in = rest.in.subspan(piece.size());
      count -= piece.size();
    }
    return true;
  }
};

/// What is to become of the next bytes.
struct WebSocketConnection::Front {
  std::size_t deflated = 0;  // so many were put to the front of the room, or to pending_, as a frame
  std::size_t plain = 0;     // else so many are to be framed as they are; 0: what is in the batch has to go first
};

WebSocketConnection::Front WebSocketConnection::deflate_front(Unsent& unsent, std::span<std::byte>& room) {
  if (!framer_.at_boundary()) return {.plain = framer_.left()};
  if (const std::size_t left = framer_.head_left(); left != 0) return {.plain = left};
  std::array<std::byte, wire::header_size> head;
  std::byte* end = head.data();
  const bool whole_head = unsent.each(head.size(), [&end](std::span<const std::byte> piece) {
    end = std::ranges::copy(piece, end).out;
    return true;
  });
  if (!whole_head) return {.plain = unsent.in.size()};
  const std::size_t size = wire::detail::packet_size(head.data());
  if (size < deflate_.threshold || size > most_deflated || deflate_.window_bits < wire::least_deflate_window_bits ||
      static_cast<wire::Compression>(head[1]) != wire::Compression::none ||
      !unsent.each(size, [](std::span<const std::byte>) { return true; })) {
    return {.plain = size};
  }
  const std::size_t most = wire::max_frame_header + size + wire::detail::deflate_tail.size();
  if (most <= frames_size) {
    if (room.size() < most) return {};
    const std::size_t length = put_deflated(unsent, size, room.first(most));
    if (length == 0) return {.plain = size};
    room = room.subspan(length);
  } else {
    if (room.size() < frames_size) return {};
    pending_.resize(most);
    pending_.resize(put_deflated(unsent, size, pending_));
    pending_.shrink_to_fit();
    if (pending_.empty()) return {.plain = size};
  }
  unsent.skip(size);
  return {.deflated = size};
}

std::size_t WebSocketConnection::put_deflated(const Unsent& unsent, std::size_t size, std::span<std::byte> to) {
  wire::detail::Deflater* const deflater = wire::detail::DeflateStreams::deflater(deflate_.level, deflate_.window_bits);
  if (deflater == nullptr) return 0;
  const auto data = to.subspan(wire::max_frame_header);
  deflater->begin(data);
  if (!unsent.each(size, [deflater](std::span<const std::byte> piece) { return deflater->add(piece); })) return 0;
  const std::size_t smaller = deflater->finish();
  if (smaller == 0) return 0;
  std::array<std::byte, wire::max_frame_header> head;
  const auto key = control_key();
  const std::size_t length = wire::encode_frame_header(wire::Opcode::binary, smaller, key, head.data());
  head[0] |= wire::compressed_bit;
  std::ranges::copy(std::span(head).first(length), to.begin());
  wire::detail::mask_copy(to.data() + length, data.data(), smaller, key.value_or(0));
  return length + smaller;
}

Connection::Status WebSocketConnection::write(std::span<const iovec> pieces, std::size_t& taken) {
  taken = 0;
  put_pong();
  if (const Status status = flush_pending(); status != Status::done) return status;
  const auto batch = batch_buffer();
  Unsent unsent{pieces};
  auto& in = unsent.in;
  while (unsent.refill()) {
    std::array<iovec, 1 + most_direct_pieces> vectors;
    std::size_t count = 1;
    std::span<std::byte> room = batch;
    for (;;) {
      auto part = in;
      if (deflates_) [[unlikely]] {
        const Front front = deflate_front(unsent, room);
        taken += front.deflated;
        if (front.deflated != 0) {
          if (!pending_.empty() || !unsent.refill()) break;
          continue;
        }
        if (front.plain == 0) break;
        part = in.first(std::min(in.size(), front.plain));
      }
      const std::size_t before = part.size();
      framer_.frame(part, room, direct_size, random_key);
      const std::size_t framed = before - part.size();
      taken += framed;
      in = in.subspan(framed);
      if (!part.empty() || !unsent.refill()) break;
    }
    const std::size_t copied = batch.size() - room.size();
    // A large rest of the frame goes from where it lies, on as many pieces as it has.
    std::size_t direct = 0;
    if (role_ == wire::WebSocketRole::server && !in.empty() && std::min(framer_.left(), in.size()) >= direct_size) {
      auto left = framer_.left();
      auto here = in;
      auto further = unsent.pieces;
      while (left != 0 && count < vectors.size()) {
        const std::size_t size = std::min(left, here.size());
        vectors[count++] = iovec_of(here.first(size));
        direct += size;
        left -= size;
        if (size < here.size() || further.empty()) break;
        here = {static_cast<const std::byte*>(further.front().iov_base), further.front().iov_len};
        further = further.subspan(1);
      }
    }
    if (copied + direct == 0) {
      if (const Status status = flush_pending(); status != Status::done)
        return status;  // what was too large for a batch
      continue;
    }
    vectors[0] = iovec_of(batch.first(copied));
    std::size_t sent = 0;
    const auto offered = copied == 0 ? std::span(vectors).subspan(1, count - 1) : std::span(vectors).first(count);
    const Status status = transmit(offered, sent);
    if (status == Status::failed) return status;
    if (sent < copied) {
      append(batch.subspan(sent, copied - sent));
    } else {
      const std::size_t gone = sent - copied;
      unsent.skip(gone);
      framer_.skip(gone);
      taken += gone;
    }
    if (status == Status::blocked) return status;
    if (pong_) {
      put_pong();
      if (const Status put = flush_pending(); put != Status::done) return put;
    }
  }
  return Status::done;
}

Connection::Status WebSocketConnection::flush() {
  put_pong();
  Status status = flush_pending();
  if (status == Status::done && pong_) {
    put_pong();
    status = flush_pending();
  }
  if (status == Status::done && below_ && below_->wants_write()) {
    status = below_->flush();
    if (status == Status::failed) return fail(below_->error());
  }
  blocked_ = status == Status::blocked;
  return status;
}

bool WebSocketConnection::wants_write() const noexcept {
  return blocked_ || pending_at_ < pending_.size() || (pong_ && may_put_control()) || (below_ && below_->wants_write());
}

Connection::Status WebSocketConnection::shut_down(const Error& reason) {
  if (handshake_) {
    // There is nobody to send a Close to; a client that waits for its answer gets one.
    close_impossible_ = true;
    if (role_ == wire::WebSocketRole::server && (!below_ || handshake_->below_done) && !close_sent_) {
      close_sent_ = true;
      const bool late = reason.code == make_error_code(Errc::handshake_timeout);
      const std::string answer = std::string("HTTP/1.1 ") + (late ? "408 Request Timeout" : "503 Service Unavailable") +
                                 "\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
      append(std::as_bytes(std::span(answer)));
    }
  } else if (!close_sent_) {
    pong_.reset();
    close_impossible_ = !framer_.at_boundary();
    if (!close_impossible_) {
      wire::ControlFrame frame;
      std::size_t size = 0;
      if (peer_code_ != 0) {
        size = wire::encode_close_frame(peer_code_, {}, control_key(), frame);
      } else {
        const std::uint16_t code = close_code_of(reason);
        size = wire::encode_close_frame(code, close_text_of(reason, code), control_key(), frame);
      }
      append(std::span(frame).first(size));
    }
    close_sent_ = true;
  }
  const Status status = flush();
  if (status != Status::done || !below_ || awaits_peers_end()) return status;
  const Status below = below_->shut_down(reason);
  return below == Status::failed ? fail(below_->error()) : below;
}

bool WebSocketConnection::awaits_peers_end() const noexcept {
  return peer_code_ == 0 && !close_impossible_;
}

Connection::Status WebSocketConnection::keep_alive(protocol::TimePoint now) {
  if (now < keep_alive_due_ || handshake_ || close_sent_ || peer_code_ != 0) return Status::done;
  if (keep_alive_due_ != protocol::TimePoint::min()) {
    if (heard_) {
      missed_pings_ = 0;
    } else if (ping_out_ && ++missed_pings_ >= max_missed_pings_) {
      return fail(Error(Errc::idle_timeout, "WebSocket: nothing came after " + std::to_string(missed_pings_) +
                                                " pings, one every " + std::to_string(ping_interval_.count()) + " ms"));
    }
    ping_out_ = put_control(wire::Opcode::ping, {});
    heard_ = false;
  }
  keep_alive_due_ = now + ping_interval_;
  return flush() == Status::failed ? Status::failed : Status::done;
}

}  // namespace detail

}  // namespace msgtrans
