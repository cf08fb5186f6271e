// SPDX-License-Identifier: Apache-2.0
#include "everything.hpp"

const boost::system::error_category& category_of_other_unit();
const boost::system::error_category& category_of_other_unit() {
  return msgtrans::error_category();
}
