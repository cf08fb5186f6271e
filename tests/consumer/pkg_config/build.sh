#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# An installed msgtrans without CMake: build.sh SOURCE PROGRAM
set -euo pipefail
flags=$(pkg-config --cflags --libs msgtrans)
# shellcheck disable=SC2086 # the flags are words
exec "${CXX:-g++}" -std=c++20 "$1" $flags -o "$2"
