# SPDX-License-Identifier: Apache-2.0
# msgtrans_warnings: linked PRIVATE by everything built here, never seen by a consumer.
add_library(msgtrans_warnings INTERFACE)
target_compile_options(
  msgtrans_warnings
  INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion $<$<BOOL:${MSGTRANS_WERROR}>:-Werror>
            # g++ 12: false for std::string's operator+ (GCC bug 105651), for a std::optional that is moved and destroyed,
            # for moodycamel's enqueue_bulk, and for the slot it moves a value into
            $<$<AND:$<CXX_COMPILER_ID:GNU>,$<VERSION_LESS:$<CXX_COMPILER_VERSION>,13>>:-Wno-restrict;-Wno-stringop-overflow;-Wno-uninitialized>
            # moodycamel's fences, of which ThreadSanitizer knows nothing: see tests/sanitizers/tsan.supp
            $<$<CXX_COMPILER_ID:GNU>:-Wno-tsan>)
