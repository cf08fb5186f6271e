# SPDX-License-Identifier: Apache-2.0
#[[
Finds moodycamel's ConcurrentQueue, headers only, through its own CMake package, else by looking for the header where
distributions put it. Gives the target concurrentqueue::concurrentqueue, the name that its package uses itself.
]]
if(TARGET concurrentqueue::concurrentqueue)
  set(concurrentqueue_FOUND TRUE)
  return()
endif()

find_package(concurrentqueue CONFIG QUIET)
if(NOT TARGET concurrentqueue::concurrentqueue)
  find_path(CONCURRENTQUEUE_INCLUDE_DIR
            NAMES concurrentqueue/moodycamel/concurrentqueue.h concurrentqueue/concurrentqueue.h concurrentqueue.h)
  mark_as_advanced(CONCURRENTQUEUE_INCLUDE_DIR)
  if(CONCURRENTQUEUE_INCLUDE_DIR)
    add_library(concurrentqueue::concurrentqueue INTERFACE IMPORTED)
    set_target_properties(concurrentqueue::concurrentqueue PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
                                                                      "${CONCURRENTQUEUE_INCLUDE_DIR}")
  endif()
endif()

include(FindPackageHandleStandardArgs)
if(TARGET concurrentqueue::concurrentqueue)
  set(CONCURRENTQUEUE_TARGET concurrentqueue::concurrentqueue)
endif()
find_package_handle_standard_args(concurrentqueue REQUIRED_VARS CONCURRENTQUEUE_TARGET)
