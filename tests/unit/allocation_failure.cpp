// SPDX-License-Identifier: Apache-2.0
#include "allocation_failure.hpp"

#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

thread_local bool armed = false;
thread_local long successes_left = 0;

void* try_allocate(std::size_t size) noexcept {
  if (armed && successes_left-- == 0) return nullptr;
  return std::malloc(size == 0 ? 1 : size);
}
void* allocate(std::size_t size) {
  if (void* const memory = try_allocate(size)) return memory;
  throw std::bad_alloc();
}

}  // namespace

namespace msgtrans::test {

AllocationFailure::AllocationFailure(long successes) noexcept {
  successes_left = successes;
  armed = true;
}

AllocationFailure::~AllocationFailure() {
  armed = false;
}

bool AllocationFailure::happened() const noexcept {
  return successes_left < 0;
}

}  // namespace msgtrans::test

// All of them: a sanitizer's own would else be used for those left out.
void* operator new(std::size_t size) {
  return allocate(size);
}
void* operator new[](std::size_t size) {
  return allocate(size);
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  return try_allocate(size);
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  return try_allocate(size);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, std::size_t) noexcept {
  std::free(memory);
}
void operator delete(void* memory, const std::nothrow_t&) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, const std::nothrow_t&) noexcept {
  std::free(memory);
}
