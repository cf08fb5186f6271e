#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One consumer test: run.sh install | find_package | add_subdirectory | two_units | pkg_config
# ctest sets BUILD, WORK, VERSION, CMAKE, CXX.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
prefix=$WORK/prefix
out=$WORK/$1

install_prefix() {
  rm -rf "$prefix" "$WORK/staged"
  "$CMAKE" --install "$BUILD" --prefix "$WORK/staged"
  # used from another place than it was installed to: nothing in the package may depend on its path
  mv "$WORK/staged" "$prefix"
  [[ ! -e $prefix/bin/msgtrans ]] || "$prefix/bin/msgtrans" --help >/dev/null
}

cmake_project() {
  "$CMAKE" -S "$here/$1" -B "$out" -DCMAKE_CXX_FLAGS=-O0 -DCMAKE_PREFIX_PATH="$prefix" -DEXPECTED_VERSION="$VERSION"
  "$CMAKE" --build "$out" --parallel
}

pkg_config() {
  PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name msgtrans.pc)")
  export PKG_CONFIG_PATH
  [[ $(pkg-config --modversion msgtrans) == "$VERSION" ]]
  mkdir "$out"
  "$here/pkg_config/build.sh" "$here/facade.cpp" "$out/facade"
}

rm -rf "$out"
case $1 in
  install) install_prefix ;;
  find_package | add_subdirectory)
    cmake_project "$1"
    "$out/facade"
    "$out/core_only"
    ;;
  two_units)
    cmake_project "$1"
    "$out/two_units"
    ;;
  pkg_config)
    pkg_config
    "$out/facade"
    ;;
  *)
    echo "run.sh: there is no consumer $1" >&2
    exit 2
    ;;
esac
