# SPDX-License-Identifier: Apache-2.0
include(CMakePackageConfigHelpers)

set(package_dir "${CMAKE_INSTALL_LIBDIR}/cmake/msgtrans")
install(
  TARGETS msgtrans_core msgtrans
  EXPORT msgtransTargets
  FILE_SET HEADERS
  FILE_SET detail)
install(EXPORT msgtransTargets NAMESPACE msgtrans:: DESTINATION "${package_dir}")
if(TARGET msgtrans_tool)
  install(TARGETS msgtrans_tool)
endif()

# OpenSSL is seen by consumers only if they link it themselves
get_target_property(msgtrans_type msgtrans TYPE)
set(pc_requires "")
set(pc_requires_private "")
if(msgtrans_type STREQUAL "STATIC_LIBRARY")
  set(pc_requires " openssl >= 3.0")
else()
  set(pc_requires_private " openssl >= 3.0")
endif()

configure_package_config_file(cmake/msgtransConfig.cmake.in "${PROJECT_BINARY_DIR}/msgtransConfig.cmake"
                              INSTALL_DESTINATION "${package_dir}")
# before 1.0 a minor version may break
write_basic_package_version_file("${PROJECT_BINARY_DIR}/msgtransConfigVersion.cmake" COMPATIBILITY SameMinorVersion)
install(FILES "${PROJECT_BINARY_DIR}/msgtransConfig.cmake" "${PROJECT_BINARY_DIR}/msgtransConfigVersion.cmake"
              cmake/Findzstd.cmake cmake/Findconcurrentqueue.cmake DESTINATION "${package_dir}")

# The prefix of the pkg-config file is relative to where the file lies, so that the tree can be moved; directories that
# were given as absolute stay absolute.
set(pc_dir "${CMAKE_INSTALL_LIBDIR}/pkgconfig")
if(IS_ABSOLUTE "${pc_dir}")
  set(pc_prefix "${CMAKE_INSTALL_PREFIX}")
else()
  file(RELATIVE_PATH pc_prefix "/${pc_dir}" "/")
  string(REGEX REPLACE "/$" "" pc_prefix "${pc_prefix}")
  set(pc_prefix "\${pcfiledir}/${pc_prefix}")
endif()
foreach(dir IN ITEMS INCLUDEDIR LIBDIR)
  cmake_path(APPEND pc_${dir} "\${prefix}" "${CMAKE_INSTALL_${dir}}")
endforeach()
configure_file(cmake/msgtrans.pc.in "${PROJECT_BINARY_DIR}/msgtrans.pc" @ONLY)
install(FILES "${PROJECT_BINARY_DIR}/msgtrans.pc" DESTINATION "${pc_dir}")
