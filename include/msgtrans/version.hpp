// SPDX-License-Identifier: Apache-2.0
#pragma once

/// The one place that holds the version: CMake, the package files and the tool read it from here.
#define MSGTRANS_VERSION_MAJOR 0
#define MSGTRANS_VERSION_MINOR 1
#define MSGTRANS_VERSION_PATCH 0
#define MSGTRANS_VERSION_STRING "0.1.0"

namespace msgtrans {

/// `major.minor.patch` of the headers a program was compiled with.
inline constexpr const char* version = MSGTRANS_VERSION_STRING;

}  // namespace msgtrans
