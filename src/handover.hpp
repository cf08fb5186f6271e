// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace msgtrans::detail {

/// What a successor is told in its environment beside LISTEN_FDS: where it says that it is ready, ...
inline constexpr const char* ready_variable = "MSGTRANS_READY_FD";
/// ... and which descriptors' files, separated by commas, are its to remove.
inline constexpr const char* files_variable = "MSGTRANS_SOCKET_FILES";

}  // namespace msgtrans::detail
