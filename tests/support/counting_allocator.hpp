// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <memory>

namespace msgtrans::test {

/// Counts how often it was asked, and how many pieces are out.
template <class T>
struct CountingAllocator {
  using value_type = T;
  CountingAllocator(int& all, int& now) : allocated(&all), alive(&now) {}
  template <class U>
  CountingAllocator(const CountingAllocator<U>& other) : allocated(other.allocated), alive(other.alive) {}
  T* allocate(std::size_t n) {
    ++*allocated;
    ++*alive;
    return std::allocator<T>().allocate(n);
  }
  void deallocate(T* p, std::size_t n) {
    --*alive;
    std::allocator<T>().deallocate(p, n);
  }
  friend bool operator==(const CountingAllocator&, const CountingAllocator&) = default;
  int* allocated;
  int* alive;
};

}  // namespace msgtrans::test
