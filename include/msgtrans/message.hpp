// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <boost/smart_ptr/intrusive_ptr.hpp>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <msgtrans/send.hpp>
#include <msgtrans/wire/header.hpp>
#include <msgtrans/wire/told_timeout.hpp>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

namespace msgtrans {

class OwnedMessage;
class Session;
template <class R>
class ReplyTo;

namespace detail {
class SessionState;
struct Interceptors;
void intrusive_ptr_add_ref(const SessionState* state) noexcept;
void intrusive_ptr_release(const SessionState* state) noexcept;
using SessionPtr = boost::intrusive_ptr<SessionState>;

/// Who asked from within the process. Destroyed without an answer, it tells him so.
class LocalAsker {
 public:
  virtual ~LocalAsker() = default;
  virtual void answer(OwnedMessage reply) = 0;
};
}  // namespace detail

/// A message that came in, lent to a handler: valid during the call. `retain()` makes one that lasts.
/// Not thread-safe, and not to be passed to another thread: retain it for that.
class Message {
 public:
  [[nodiscard]] bool is_request() const noexcept { return header_.type == wire::PacketType::request; }
  [[nodiscard]] bool is_one_way() const noexcept { return header_.type == wire::PacketType::one_way; }
  [[nodiscard]] std::uint8_t biz_type() const noexcept { return header_.biz_type; }
  /// The sender's count; each end counts its own.
  [[nodiscard]] std::uint32_t id() const noexcept { return header_.message_id; }
  [[nodiscard]] bool high_priority() const noexcept { return (header_.flags & wire::flags::high_priority) != 0; }
  [[nodiscard]] bool has_route_tag() const noexcept { return (header_.flags & wire::flags::route_tag) != 0; }
  /// The payload, decompressed if it came compressed.
  [[nodiscard]] std::span<const std::byte> payload() const noexcept { return payload_; }
  [[nodiscard]] std::string_view text() const noexcept { return BytesView(payload_).text(); }
  [[nodiscard]] std::span<const std::byte> extension() const noexcept { return extension_; }
  /// How long the peer still waited for the answer when it asked, if it has told (`RequestOptions::tell_timeout`); then
  /// the first 8 bytes of `extension` are that.
  [[nodiscard]] std::optional<std::chrono::milliseconds> told_timeout() const noexcept {
    return is_request() ? wire::read_told_timeout(extension_) : std::nullopt;
  }

  /// A copy that owns its bytes. The copy of a request takes over the duty to answer: from now on
  /// `OwnedMessage::respond` answers it, from any thread, and `Session::respond` with this message says `not_found`.
  /// O(size), one allocation. \throws std::bad_alloc; then nothing has changed.
  [[nodiscard]] OwnedMessage retain() const;

  Message(const Message&) = delete;
  Message& operator=(const Message&) = delete;

 private:
  friend class detail::SessionState;
  friend class Session;

  Message(const wire::Header& header, std::span<const std::byte> extension, std::span<const std::byte> payload,
          detail::SessionState* session) noexcept
      : header_(header), extension_(extension), payload_(payload), session_(session) {}

  wire::Header header_;
  std::span<const std::byte> extension_;
  std::span<const std::byte> payload_;
  detail::SessionState* session_;
  mutable bool answerable_ = false;  // a request that still wants its one answer
};

/// A message that owns its bytes: the answer to a request, a retained message, or one made to tell an actor something.
/// Move-only; each object is used by one thread at a time, any thread.
class OwnedMessage {
 public:
  OwnedMessage() = default;
  /// A one-way message from within the process: what an actor is told looks like what its peer sends.
  /// \throws Exception with `too_large` if the extension header is over 65,535 bytes or the payload over 4 GiB.
  explicit OwnedMessage(BytesView payload, const SendOptions& options = {});
  /// A request from within the process, for `ActorManager::async_ask` and `ask`: `respond` answers whoever asks there.
  OwnedMessage(BytesView payload, const SendOptions& options, ReplyTo<OwnedMessage> reply_to);
  OwnedMessage(OwnedMessage&& other) noexcept { swap(other); }
  OwnedMessage& operator=(OwnedMessage&& other) noexcept {
    OwnedMessage(std::move(other)).swap(*this);
    return *this;
  }
  /// A request that nobody answered is given up: the peer's request times out there; who asked from within the process
  /// is told.
  ~OwnedMessage();

  [[nodiscard]] bool is_request() const noexcept { return header_.type == wire::PacketType::request; }
  [[nodiscard]] bool is_one_way() const noexcept { return header_.type == wire::PacketType::one_way; }
  [[nodiscard]] std::uint8_t biz_type() const noexcept { return header_.biz_type; }
  [[nodiscard]] std::uint32_t id() const noexcept { return header_.message_id; }
  [[nodiscard]] bool high_priority() const noexcept { return (header_.flags & wire::flags::high_priority) != 0; }
  [[nodiscard]] bool has_route_tag() const noexcept { return (header_.flags & wire::flags::route_tag) != 0; }
  [[nodiscard]] std::span<const std::byte> payload() const noexcept {
    return {bytes_.get() + extension_size_, payload_size_};
  }
  [[nodiscard]] std::string_view text() const noexcept { return BytesView(payload()).text(); }
  [[nodiscard]] std::span<const std::byte> extension() const noexcept { return {bytes_.get(), extension_size_}; }
  /// As `Message::told_timeout`.
  [[nodiscard]] std::optional<std::chrono::milliseconds> told_timeout() const noexcept {
    return is_request() ? wire::read_told_timeout(extension()) : std::nullopt;
  }
  /// True if it was made within the process.
  [[nodiscard]] bool is_local() const noexcept { return local_; }

  /// Answers a retained request, once, from any thread. `not_found` if this is not a request or was answered;
  /// `closed` if its session has ended; `too_large` leaves it answerable. `compression` as in `SendOptions`.
  SendResult respond(BytesView payload, BytesView extension = {},
                     const std::optional<CompressionOptions>& compression = {});

 private:
  friend class detail::SessionState;
  friend class Message;

  OwnedMessage(const wire::Header& header, std::span<const std::byte> extension, std::span<const std::byte> payload);

  void swap(OwnedMessage& other) noexcept {
    std::swap(header_, other.header_);
    std::swap(bytes_, other.bytes_);
    std::swap(extension_size_, other.extension_size_);
    std::swap(payload_size_, other.payload_size_);
    std::swap(session_, other.session_);
    std::swap(asker_, other.asker_);
    std::swap(local_, other.local_);
  }

  wire::Header header_;
  std::unique_ptr<std::byte[]> bytes_;
  std::size_t extension_size_ = 0;
  std::size_t payload_size_ = 0;
  detail::SessionPtr session_;                 // set while a request of the peer wants its answer
  std::unique_ptr<detail::LocalAsker> asker_;  // set while a request from within the process does
  bool local_ = false;
};

/// The answer to a request.
using Reply = OwnedMessage;

}  // namespace msgtrans
