// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstring>
#include <memory>
#include <new>
#include <span>
#include <stdexcept>
#include <utility>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MSGTRANS_WIRE_ASAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define MSGTRANS_WIRE_ASAN 1
#endif
#if defined(MSGTRANS_WIRE_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace msgtrans::wire {

/// Raw bytes of a fixed capacity, of which the first `size()` are in use. Move-only; a moved-from buffer is empty and
/// has no capacity. Not thread-safe.
class Buffer {
 public:
  Buffer() noexcept = default;
  /// Takes `capacity` bytes, not zeroed. Throws std::bad_alloc.
  explicit Buffer(std::size_t capacity)
      : data_(capacity == 0 ? nullptr : new std::byte[capacity]), capacity_(capacity) {}

  Buffer(Buffer&& other) noexcept
      : data_(std::move(other.data_)),
        size_(std::exchange(other.size_, 0)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    data_ = std::move(other.data_);
    size_ = std::exchange(other.size_, 0);
    capacity_ = std::exchange(other.capacity_, 0);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() = default;

  [[nodiscard]] std::byte* data() noexcept { return data_.get(); }
  [[nodiscard]] const std::byte* data() const noexcept { return data_.get(); }
  [[nodiscard]] std::size_t size() const noexcept { return size_; }
  [[nodiscard]] std::size_t capacity() const noexcept { return capacity_; }
  [[nodiscard]] bool empty() const noexcept { return size_ == 0; }

  /// Sets the size; bytes that come into use are not zeroed. Throws std::length_error beyond the capacity, and then
  /// nothing has changed.
  void resize(std::size_t size) {
    if (size > capacity_) throw std::length_error("msgtrans: Buffer::resize beyond its capacity");
    size_ = size;
  }

  /// Copies `bytes` behind those in use. Throws std::length_error when they do not fit, and then nothing has changed.
  void append(std::span<const std::byte> bytes) {
    if (bytes.size() > capacity_ - size_) throw std::length_error("msgtrans: Buffer::append beyond its capacity");
    if (!bytes.empty()) std::memcpy(data_.get() + size_, bytes.data(), bytes.size());
    size_ += bytes.size();
  }

  void clear() noexcept { size_ = 0; }

  /// The bytes in use.
  [[nodiscard]] operator std::span<const std::byte>() const noexcept { return {data_.get(), size_}; }
  [[nodiscard]] operator std::span<std::byte>() noexcept { return {data_.get(), size_}; }

 private:
  friend class BufferPool;

  std::unique_ptr<std::byte[]> data_;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

/// Keeps free buffers for reuse, so that a large one is neither given back to the system and faulted in again for every
/// packet nor hoarded. Capacities are powers of two from 256 bytes on; the free buffers of a size are linked through
/// their own memory, so keeping one allocates nothing. One pool a shard: not thread-safe. All calls are O(1) but for
/// the allocation itself. Under AddressSanitizer the memory of a kept buffer is poisoned, so that a view that outlived
/// its buffer is found.
class BufferPool {
 public:
  static constexpr std::size_t min_capacity = 256;

  /// Keeps at most `keep_bytes` bytes of free buffers; a buffer given beyond that is freed.
  explicit BufferPool(std::size_t keep_bytes = std::size_t{8} << 20) noexcept : keep_bytes_(keep_bytes) {}
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;

  ~BufferPool() {
    for (Node*& head : free_) {
      while (head != nullptr) unlink(head);
    }
  }

  /// An empty buffer of at least `capacity` bytes. Throws std::bad_alloc, and then nothing has changed.
  [[nodiscard]] Buffer take(std::size_t capacity) {
    constexpr std::size_t largest = std::size_t{1} << 62;
    if (capacity > largest) throw std::bad_alloc();
    const std::size_t size = std::bit_ceil(capacity < min_capacity ? min_capacity : capacity);
    Node*& head = free_[class_of(size)];
    if (head == nullptr) return Buffer(size);
    kept_bytes_ -= size;
    Buffer buffer;
    buffer.data_ = unlink(head);
    buffer.capacity_ = size;
    return buffer;
  }

  /// Takes `buffer` back, whatever it holds; it is left without capacity. Buffers this pool never handed out may be
  /// given too: one of an odd capacity is freed.
  void give(Buffer&& buffer) noexcept {
    const std::size_t size = buffer.capacity_;
    std::unique_ptr<std::byte[]> memory = std::move(buffer.data_);
    buffer.size_ = 0;
    buffer.capacity_ = 0;
    if (size < min_capacity || !std::has_single_bit(size) || size > keep_bytes_ - kept_bytes_) return;
    Node*& head = free_[class_of(size)];
    head = ::new (static_cast<void*>(memory.release())) Node{head, size};
    kept_bytes_ += size;
#if defined(MSGTRANS_WIRE_ASAN)
    __asan_poison_memory_region(head + 1, size - sizeof(Node));
#endif
  }

  /// Bytes of free buffers kept now, never more than the constructor's bound.
  [[nodiscard]] std::size_t kept_bytes() const noexcept {
    return kept_bytes_;
  }

 private:
  struct Node {
    Node* next;
    std::size_t size;
  };

  static std::size_t class_of(std::size_t size) noexcept {
    return static_cast<std::size_t>(std::countr_zero(size));
  }

  /// Takes the first buffer of a list out of it.
  static std::unique_ptr<std::byte[]> unlink(Node*& head) noexcept {
    Node* const node = head;
    head = node->next;
#if defined(MSGTRANS_WIRE_ASAN)
    __asan_unpoison_memory_region(node, node->size);
#endif
    return std::unique_ptr<std::byte[]>(reinterpret_cast<std::byte*>(node));
  }

  std::array<Node*, 63> free_{};
  std::size_t keep_bytes_;
  std::size_t kept_bytes_ = 0;
};

}  // namespace msgtrans::wire
