// SPDX-License-Identifier: Apache-2.0
#include "everything.hpp"

const boost::system::error_category& category_of_other_unit();

// an inline variable is one object in the program, not one a unit
int main() {
  return &msgtrans::error_category() == &category_of_other_unit() ? 0 : 1;
}
