// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <new>
#include <thread>

namespace msgtrans::detail {

/// What `f` gives, which is called until there is memory for it: for what must not be lost, where nobody could be told.
/// A few words of memory are soon there again. Any other exception of `f` goes on to the caller.
template <class F>
auto insist(F f) {
  for (;;) {
    try {
      return f();
    } catch (const std::bad_alloc&) {
      std::this_thread::yield();
    }
  }
}

}  // namespace msgtrans::detail
