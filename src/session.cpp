// SPDX-License-Identifier: Apache-2.0
#include "session_state.hpp"

#include <algorithm>
#include <condition_variable>
#include <msgtrans/actor/reply_to.hpp>
#include <msgtrans/session/session.hpp>
#include <mutex>

namespace msgtrans {

namespace detail {
namespace {

wire::Header local_header(wire::PacketType type, BytesView payload, const SendOptions& options) {
  constexpr std::size_t largest_extension = 65'535;
  constexpr std::uint64_t largest_payload = 0xffff'ffff;
  if (options.extension.size() > largest_extension || payload.size() > largest_payload) {
    throw Exception(Error(Errc::too_large, "a payload of " + std::to_string(payload.size()) +
                                               " bytes with an extension header of " +
                                               std::to_string(options.extension.size())));
  }
  wire::Header header = header_for(type, options);
  header.ext_len = static_cast<std::uint16_t>(options.extension.size());
  header.payload_len = static_cast<std::uint32_t>(payload.size());
  return header;
}

}  // namespace
}  // namespace detail

// --- Message and OwnedMessage

OwnedMessage Message::retain() const {
  OwnedMessage owned(header_, extension_, payload_);
  if (answerable_) {
    owned.session_ = session_;
    session_->owe_answer();
    answerable_ = false;
  }
  return owned;
}

OwnedMessage::OwnedMessage(const wire::Header& header, std::span<const std::byte> extension,
                           std::span<const std::byte> payload)
    : header_(header), extension_size_(extension.size()), payload_size_(payload.size()) {
  if (extension_size_ + payload_size_ == 0) return;
  bytes_ = std::make_unique_for_overwrite<std::byte[]>(extension_size_ + payload_size_);
  std::copy_n(extension.data(), extension_size_, bytes_.get());
  std::copy_n(payload.data(), payload_size_, bytes_.get() + extension_size_);
}

OwnedMessage::OwnedMessage(BytesView payload, const SendOptions& options)
    : OwnedMessage(detail::local_header(wire::PacketType::one_way, payload, options), options.extension, payload) {
  local_ = true;
}

OwnedMessage::OwnedMessage(BytesView payload, const SendOptions& options, ReplyTo<OwnedMessage> reply_to)
    : OwnedMessage(detail::local_header(wire::PacketType::request, payload, options), options.extension, payload) {
  struct Asker final : detail::LocalAsker {
    explicit Asker(ReplyTo<OwnedMessage> to) noexcept : reply_to(std::move(to)) {}
    void answer(OwnedMessage reply) override { reply_to.answer(std::move(reply)); }
    ReplyTo<OwnedMessage> reply_to;
  };
  asker_ = std::make_unique<Asker>(std::move(reply_to));
  local_ = true;
}

OwnedMessage::~OwnedMessage() {
  if (session_) session_->give_up_answer();
}

SendResult OwnedMessage::respond(BytesView payload, BytesView extension,
                                 const std::optional<CompressionOptions>& compression) {
  if (asker_) {
    OwnedMessage reply(detail::local_header(wire::PacketType::response, payload,
                                            {.biz_type = header_.biz_type, .extension = extension}),
                       extension, payload);
    reply.local_ = true;
    std::exchange(asker_, nullptr)->answer(std::move(reply));
    return SendResult::queued;
  }
  if (!session_) return SendResult::not_found;
  const auto result = session_->respond_retained(header_, payload, extension, compression);
  if (result == SendResult::queued) session_ = nullptr;
  return result;
}

// --- Session

SessionId Session::id() const noexcept {
  return state_->id();
}
bool Session::is_open() const noexcept {
  return state_->is_open();
}
const TlsPeer* Session::tls() const noexcept {
  return state_->tls();
}

std::optional<PeerCredentials> Session::peer_credentials() const noexcept {
  if (state_->peer().transport != Transport::unix_socket) return std::nullopt;
  return state_->peer().credentials;
}

Endpoint Session::peer() const {
  return state_->peer().endpoint();
}
OutboundLimits Session::outbound_limits() const noexcept {
  return state_->outbound_limits();
}

void Session::set_outbound_limits(const OutboundLimits& limits) {
  state_->set_outbound_limits(limits);
}

SessionStats Session::stats() const noexcept {
  return state_->stats();
}
detail::asio::any_io_executor Session::get_executor() const noexcept {
  return state_->shard().executor();
}

SendResult Session::send(BytesView payload, const SendOptions& options) {
  return state_->send(payload, options);
}

SendResult Session::respond(const Message& request, BytesView payload, BytesView extension,
                            const std::optional<CompressionOptions>& compression) {
  if (request.session_ != state_.get()) return SendResult::not_found;
  return state_->respond(request, payload, extension, compression);
}

void Session::close(std::string_view reason) {
  state_->close(Error(Errc::closed_by_user, std::string(reason)));
}

void Session::drain(const DrainOptions& options) {
  if (auto error = validate(options)) throw Exception(error);
  state_->drain(options);
}

std::any& Session::user_data() noexcept {
  return state_->user_data();
}

// --- blocking

namespace detail {

Reply request(SessionPtr session, BytesView payload, const RequestOptions& options, Error& error) {
  if (Shard::must_not_block()) {
    error = Error(Errc::blocking_on_shard, "request() would block a thread that runs handlers; use async_request");
    return {};
  }
  struct Waiter {
    std::mutex mutex;
    std::condition_variable ended;
    bool done = false;
    error_code code;
    Reply reply;
  } waiter;
  struct Handler {
    Waiter* waiter;
    // Wherever the answer arrives: this only wakes the thread that waits.
    using executor_type = asio::system_executor;
    [[nodiscard]] executor_type get_executor() const noexcept { return {}; }
    void operator()(error_code code, Reply reply) const {
      // Notified under the lock: the waiter lives on the stack of the thread that this lets go.
      const std::lock_guard lock(waiter->mutex);
      waiter->code = code;
      waiter->reply = std::move(reply);
      waiter->done = true;
      waiter->ended.notify_one();
    }
  };
  start_request(make_request(std::move(session), Home{}, payload, options), Handler{&waiter});
  std::unique_lock lock(waiter.mutex);
  waiter.ended.wait(lock, [&] { return waiter.done; });
  error = waiter.code ? Error(waiter.code) : Error();
  return std::move(waiter.reply);
}

}  // namespace detail

}  // namespace msgtrans
