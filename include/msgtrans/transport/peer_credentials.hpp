// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/types.h>

namespace msgtrans {

/// Whose process is at the other end of a Unix socket, as the system knew when it connected (SO_PEERCRED): not to be
/// forged, but a process may have handed its socket on since, or have ended and its number be another's.
struct PeerCredentials {
  pid_t process = 0;
  uid_t user = 0;
  gid_t group = 0;

  friend bool operator==(const PeerCredentials&, const PeerCredentials&) = default;
};

}  // namespace msgtrans
