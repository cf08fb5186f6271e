// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <msgtrans/error.hpp>
#include <string>

namespace msgtrans {

/// How sessions are let finish: of one session, of a listener, or of the whole server. Checked by the call that takes
/// it.
struct DrainOptions {
  /// Who has not finished by then is cut, and its `on_disconnect` gets `drain_expired`. Zero: cuts at once.
  std::chrono::milliseconds within{5'000};
  /// A session that owes nothing is closed once no packet has come or gone for this long (a new one: since it was
  /// connected). A request that is just on its way is answered then, and a peer that hangs up by itself when it has its
  /// answers loses none. Less than `within`. Zero: it is closed as soon as nothing is owed.
  std::chrono::milliseconds quiet{0};
  /// The text of the error that `on_disconnect` gets when all was finished, whose code is `stopping`; told to the peer
  /// where the transport can (WebSocket's Close).
  std::string reason = {};
};

/// What is wrong with them; no error if nothing is.
[[nodiscard]] Error validate(const DrainOptions& options);

}  // namespace msgtrans
