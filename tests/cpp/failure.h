// What a call that must fail has to say.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>

#include "base/error.h"

namespace fastgen::tests {

// The sentence that `call` fails with; "" if it does not.
inline std::string Failure(const std::function<void()>& call,
                           fastgen_status status = FASTGEN_BAD_FILE) {
  try {
    call();
  } catch (const base::Error& error) {
    EXPECT_EQ(error.status(), status) << error.what();
    return error.what();
  }
  return "";
}

inline void ExpectContains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' has no '" << part << "'";
}

}  // namespace fastgen::tests
