// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <ranges>
#include <span>
#include <string_view>
#include <type_traits>

namespace msgtrans {

/// A view of somebody's bytes, made from text or from any contiguous range of byte-sized elements, so that
/// `send("hello")`, `send(message.payload())` and `send(vector_of_uint8)` are all written the same way.
/// Like `std::string_view` it owns nothing; no call of this library keeps one beyond its return.
class BytesView {
 public:
  constexpr BytesView() noexcept = default;
  constexpr BytesView(std::span<const std::byte> bytes) noexcept : bytes_(bytes) {}
  BytesView(std::string_view text) noexcept : bytes_(std::as_bytes(std::span(text.data(), text.size()))) {}
  BytesView(const char* text) noexcept : BytesView(std::string_view(text)) {}

  template <class Range>
  requires(std::ranges::contiguous_range<const Range>&& std::ranges::sized_range<const Range> &&
           sizeof(std::ranges::range_value_t<const Range>) == 1 &&
           std::is_trivially_copyable_v<std::ranges::range_value_t<const Range>> && !std::is_array_v<Range>)
      BytesView(const Range& range)
  noexcept : bytes_(std::as_bytes(std::span(std::ranges::data(range), std::ranges::size(range)))) {}

  [[nodiscard]] constexpr const std::byte* data() const noexcept { return bytes_.data(); }
  [[nodiscard]] constexpr std::size_t size() const noexcept { return bytes_.size(); }
  [[nodiscard]] constexpr bool empty() const noexcept { return bytes_.empty(); }
  constexpr operator std::span<const std::byte>() const noexcept { return bytes_; }

  /// The bytes as text, whatever they are.
  [[nodiscard]] std::string_view text() const noexcept {
    return {reinterpret_cast<const char*>(bytes_.data()), bytes_.size()};
  }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace msgtrans
