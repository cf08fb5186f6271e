// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <msgtrans/bytes_view.hpp>
#include <msgtrans/message.hpp>
#include <msgtrans/send.hpp>
#include <msgtrans/session/session.hpp>
#include <msgtrans/wire/header.hpp>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace msgtrans {

/// What an interceptor says of a message.
enum class Verdict : std::uint8_t {
  pass,    ///< it goes on, to the next interceptor
  reject,  ///< it ends here
};

/// A message on its way in or out, lent to interceptors during their call; what one of them replaces, the next one
/// sees. Payloads are as the application has them: decompressed already, or not compressed yet.
class InterceptedMessage {
 public:
  [[nodiscard]] bool is_request() const noexcept { return header_.type == wire::PacketType::request; }
  [[nodiscard]] bool is_one_way() const noexcept { return header_.type == wire::PacketType::one_way; }
  [[nodiscard]] bool is_response() const noexcept { return header_.type == wire::PacketType::response; }
  [[nodiscard]] std::uint8_t biz_type() const noexcept { return header_.biz_type; }
  [[nodiscard]] bool high_priority() const noexcept { return (header_.flags & wire::flags::high_priority) != 0; }
  [[nodiscard]] bool has_route_tag() const noexcept { return (header_.flags & wire::flags::route_tag) != 0; }
  [[nodiscard]] std::span<const std::byte> payload() const noexcept { return payload_; }
  [[nodiscard]] std::string_view text() const noexcept { return BytesView(payload_).text(); }
  [[nodiscard]] std::span<const std::byte> extension() const noexcept { return extension_; }
  /// From whom, or to whom; null: to many at once (a broadcast).
  [[nodiscard]] Session* session() const noexcept { return session_; }

  void set_biz_type(std::uint8_t type) noexcept { header_.biz_type = type; }
  /// Copies; what `payload` gave before is no longer valid. What it is replaced with may lie in it. \throws
  /// std::bad_alloc; then nothing has changed.
  void replace_payload(BytesView bytes) { replace(payload_, own_payload_, bytes); }
  /// The same for the extension header.
  void replace_extension(BytesView bytes) { replace(extension_, own_extension_, bytes); }

  /// Answers a request that came in, instead of whoever would have got it: it goes no further, whatever the verdict.
  /// Once; `not_found` if this is no request that came in, or was answered.
  SendResult respond(BytesView payload, BytesView extension = {});

  InterceptedMessage(const InterceptedMessage&) = delete;
  InterceptedMessage& operator=(const InterceptedMessage&) = delete;

 private:
  friend class detail::SessionState;
  friend struct detail::Interceptors;

  InterceptedMessage(const wire::Header& header, std::span<const std::byte> extension,
                     std::span<const std::byte> payload, Session* session) noexcept
      : header_(header), extension_(extension), payload_(payload), session_(session) {}

  static void replace(std::span<const std::byte>& view, std::vector<std::byte>& own, std::span<const std::byte> bytes) {
    std::vector<std::byte> fresh(bytes.begin(), bytes.end());
    own.swap(fresh);
    view = own;
  }

  wire::Header header_;
  std::span<const std::byte> extension_;
  std::span<const std::byte> payload_;
  std::vector<std::byte> own_extension_;
  std::vector<std::byte> own_payload_;
  Session* session_;
  detail::SessionState* answers_ = nullptr;  // of a request that came in and wants its answer
  bool answered_ = false;
};

using Interceptor = std::function<Verdict(InterceptedMessage&)>;

namespace detail {

/// `f` may also return nothing, for "always passes".
template <class F>
Interceptor make_interceptor(F f) {
  if constexpr (std::is_void_v<std::invoke_result_t<F&, InterceptedMessage&>>) {
    return [f = std::move(f)](InterceptedMessage& message) mutable {
      f(message);
      return Verdict::pass;
    };
  } else {
    return f;
  }
}

}  // namespace detail

}  // namespace msgtrans
