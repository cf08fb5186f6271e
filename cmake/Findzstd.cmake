# SPDX-License-Identifier: Apache-2.0
#[[
Finds zstd through its own CMake package, else through pkg-config's hints, else by looking.
Gives the target zstd::libzstd, the name that newer zstd packages use themselves.
]]
if(TARGET zstd::libzstd)
  set(zstd_FOUND TRUE)
  return()
endif()

find_package(zstd CONFIG QUIET)
if(zstd_FOUND)
  foreach(candidate IN ITEMS zstd::libzstd_shared zstd::libzstd_static)
    if(NOT TARGET zstd::libzstd AND TARGET ${candidate})
      add_library(zstd::libzstd INTERFACE IMPORTED)
      set_target_properties(zstd::libzstd PROPERTIES INTERFACE_LINK_LIBRARIES ${candidate})
    endif()
  endforeach()
endif()

if(NOT TARGET zstd::libzstd)
  find_package(PkgConfig QUIET)
  if(PkgConfig_FOUND)
    pkg_check_modules(PC_ZSTD QUIET libzstd)
  endif()
  find_path(ZSTD_INCLUDE_DIR zstd.h HINTS ${PC_ZSTD_INCLUDE_DIRS})
  find_library(ZSTD_LIBRARY zstd HINTS ${PC_ZSTD_LIBRARY_DIRS})
  mark_as_advanced(ZSTD_INCLUDE_DIR ZSTD_LIBRARY)
  if(ZSTD_INCLUDE_DIR AND ZSTD_LIBRARY)
    add_library(zstd::libzstd UNKNOWN IMPORTED)
    set_target_properties(zstd::libzstd PROPERTIES IMPORTED_LOCATION "${ZSTD_LIBRARY}"
                                                   INTERFACE_INCLUDE_DIRECTORIES "${ZSTD_INCLUDE_DIR}")
  endif()
endif()

include(FindPackageHandleStandardArgs)
if(TARGET zstd::libzstd)
  set(ZSTD_TARGET zstd::libzstd)
endif()
find_package_handle_standard_args(zstd REQUIRED_VARS ZSTD_TARGET)
