// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace msgtrans::detail {

/// How many reasons the calling thread has not to block: it is a shard's own, it runs code of a shard, ... Blocking
/// calls refuse unless this is 0. Visible, so that there is one in the process and not one in each shared library.
/// Initialised as a constant, so that every access is a plain one.
[[gnu::visibility("default")]] inline constinit thread_local unsigned must_not_block = 0;

}  // namespace msgtrans::detail
