# SPDX-License-Identifier: Apache-2.0
# msgtrans_warnings: linked PRIVATE by everything built here, never seen by a consumer.
add_library(msgtrans_warnings INTERFACE)
target_compile_options(
  msgtrans_warnings INTERFACE -Wall -Wextra -Wpedantic -Wshadow -Wconversion $<$<BOOL:${MSGTRANS_WERROR}>:-Werror>)
