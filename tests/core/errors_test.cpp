// Typed errors and their exit codes; printable text; the nearest name; the norms' names and first scales.
#include "core/errors.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "core/nearest.h"
#include "core/pattention_norm.h"
#include "core/printable.h"
#include "core/version.h"
#include "support/scratch.h"

namespace tforge {
namespace {

template <class E>
int code_of() {
  try {
    throw E("{} is {}", "a", 3);
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "a is 3");
    return static_cast<int>(error.code());
  }
}

TEST(Printable, NothingThatATerminalObeysIsLeft) {
  EXPECT_EQ(printable("caf\xc3\xa9 \xf0\x9f\x98\x80 \\x1b"), "caf\xc3\xa9 \xf0\x9f\x98\x80 \\x1b");
  EXPECT_EQ(printable(std::string_view("a\0\n\t\x1b[2J\x7f", 9)), "a\\x00\\x0a\\x09\\x1b[2J\\x7f");
  EXPECT_EQ(printable("\xc2\x9b"
                      "2J \xc2\xa0 \xc2"),
            "\\xc2\\x9b"
            "2J \xc2\xa0 \xc2");
}

// The numbers are what scripts of users compare with: docs/exit_codes.md.
TEST(Errors, EachKindHasItsExitCode) {
  EXPECT_EQ(code_of<UsageError>(), 2);
  EXPECT_EQ(code_of<ConfigError>(), 2);
  EXPECT_EQ(code_of<DataError>(), 2);
  EXPECT_EQ(code_of<ResourceError>(), 3);
  EXPECT_EQ(code_of<DeviceError>(), 3);
  EXPECT_EQ(code_of<CheckpointError>(), 4);
  EXPECT_EQ(code_of<DivergedError>(), 11);
  EXPECT_EQ(code_of<CrashLoopError>(), 13);
  EXPECT_EQ(code_of<ShapeError>(), 70);
  EXPECT_EQ(code_of<DTypeError>(), 70);
  EXPECT_EQ(code_of<InternalError>(), 70);
  EXPECT_EQ(code_of<CommunicationError>(), 12);
  EXPECT_EQ(static_cast<int>(ExitCode::done), 0);
  EXPECT_EQ(static_cast<int>(ExitCode::differs), 5);
  EXPECT_EQ(static_cast<int>(ExitCode::requeue), 10);
  EXPECT_EQ(static_cast<int>(ExitCode::hang), 12);
}

TEST(Errors, AMessageWithoutArgumentsIsTakenAsItIs) {
  EXPECT_STREQ(DataError(std::string("a {} in a file's name")).what(), "a {} in a file's name");
}

const std::vector<std::string> kKeys = {"train.lr", "train.steps", "model.heads", "model.dim", "run.dir"};

TEST(Nearest, OneSlip) {
  EXPECT_EQ(nearest("train.step", kKeys), "train.steps");   // a letter missing
  EXPECT_EQ(nearest("train.lrr", kKeys), "train.lr");       // one too many
  EXPECT_EQ(nearest("model.headz", kKeys), "model.heads");  // another one
  EXPECT_EQ(nearest("model.haeds", kKeys), "model.heads");  // two swapped
  EXPECT_EQ(nearest("run.dir", kKeys), "run.dir");
}

TEST(Nearest, NothingWhenAllAreFar) {
  EXPECT_EQ(nearest("optimizer.beta", kKeys), "");
  EXPECT_EQ(nearest("", kKeys), "");
  EXPECT_EQ(nearest("x", std::vector<std::string>{"ab"}), "");  // two changes make any word of two letters
  EXPECT_EQ(nearest("train.lr", std::vector<std::string>{}), "");
}

TEST(Nearest, TheFirstOfTwoEquallyNear) {
  EXPECT_EQ(nearest("heat", std::vector<std::string>{"head", "heap"}), "head");
}

TEST(Nearest, ASwapIsNearerThanTwoReplacements) {
  EXPECT_EQ(nearest("abdc", std::vector<std::string>{"abxy", "abcd"}), "abcd");
  // One swap against one replacement and more: the swap counts as one slip, not as two.
  EXPECT_EQ(nearest("tets", std::vector<std::string>{"teeth", "test"}), "test");
}

TEST(Nearest, AsAQuestion) {
  EXPECT_EQ(did_you_mean("model.head", kKeys), "; did you mean `model.heads`?");
  EXPECT_EQ(did_you_mean("completely else", kKeys), "");
}

TEST(PattentionNorm, NamesAndFirstScales) {
  for (const PattentionNorm norm :
       {PattentionNorm::l2_norm_gelu, PattentionNorm::gelu_l2_norm, PattentionNorm::softmax}) {
    EXPECT_EQ(pattention_norm_from_name(name_of(norm)), norm);
  }
  EXPECT_EQ(test::error_of<ConfigError>([] { pattention_norm_from_name("l2"); }),
            "'l2' is no normalisation; there are l2_norm_gelu, gelu_l2_norm and softmax");
  EXPECT_EQ(initial_scale(PattentionNorm::l2_norm_gelu, 576), 24);
  EXPECT_EQ(initial_scale(PattentionNorm::gelu_l2_norm, 576), 24);
  EXPECT_EQ(initial_scale(PattentionNorm::softmax, 576), 576);
}

TEST(Version, SaysWhatWasBuilt) {
  const std::string text = version_text();
  EXPECT_EQ(text.rfind("tokenforge " + version() + ", commit " + commit() + ", ", 0), 0U) << text;
  for (const char* part : {"OpenBLAS", "MPI", "HDF5", "CUDA"}) EXPECT_NE(text.find(part), std::string::npos) << part;
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 0);
}

}  // namespace
}  // namespace tforge
