// Libraries that are loaded when a device is asked for.
#include "core/cuda/library.h"

#include <gtest/gtest.h>

#include <string>

#include "core/errors.h"

namespace tforge {
namespace {

TEST(CudaLibraries, ThatAreMissingAreNamed) {
  try {
    cuda::load_library("libnone-such.so.1", "NoneSuch");
    FAIL() << "it is there";
  } catch (const DeviceError& error) {
    const std::string text = error.what();
    EXPECT_EQ(error.code(), ExitCode::no_resources);
    EXPECT_EQ(text.find("libnone-such.so.1 of NoneSuch cannot be loaded (libnone-such.so.1: cannot open"), 0U) << text;
    EXPECT_TRUE(text.ends_with("): install it, or put its folder into LD_LIBRARY_PATH")) << text;
    EXPECT_EQ(text.find('\n'), std::string::npos);
  }
}

}  // namespace
}  // namespace tforge
