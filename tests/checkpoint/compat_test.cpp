// Checkpoints of older versions stay readable: tests/compat/ keeps one of each.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "checkpoint/reader.h"
#include "core/errors.h"
#include "sample.h"
#include "support/mpi_world.h"
#include "support/source_file.h"

namespace tforge {
namespace {

const std::string kVersion1 = source_file("tests/compat/v1.h5");

TEST(CheckpointCompat, Version1) {
  if (test_world().rank() != 0) return;
  if (std::getenv("TFORGE_WRITE_COMPAT") != nullptr) {  // makes the file; done once for each version
    const auto self = create_self();
    save_checkpoint(*self, kVersion1, test::sample(0, 1, test::Size::tiny).contents, OnExisting::replace);
  }
  const CheckpointReader reader = CheckpointReader::open(kVersion1);
  EXPECT_EQ(reader.info().format, 1);
  EXPECT_EQ(reader.info().step, 42);
  const CheckpointContents want = test::sample(0, 1, test::Size::tiny).contents;
  EXPECT_EQ(reader.config(), want.config);
  EXPECT_EQ(reader.tokenizer().bytes, want.tokenizer.bytes);
  EXPECT_EQ(reader.growth_history(), want.growth_history);
  EXPECT_EQ(state_value<std::int64_t>(reader.state(), "tokens"), 1000);
  ASSERT_EQ(reader.tensors().size(), want.tensors.size());
  for (const CheckpointTensor& t : want.tensors) {
    ASSERT_EQ(reader.tensor(t.path).shape, t.shape);
    EXPECT_EQ(reader.tensor(t.path).attributes, t.attributes);
    reader.verify(reader.tensor(t.path));
    std::vector<std::byte> row(static_cast<std::size_t>(t.shape.columns()) * size_of(t.dtype));
    for (std::int64_t r = 0; r < t.shape.rows(); ++r) {
      reader.read_rows(t.path, r, 1, t.dtype, row.data());
      EXPECT_EQ(row, test::sample_row(t, r)) << t.path << " row " << r;
    }
  }
}

TEST(CheckpointCompat, ANewerVersionIsRefusedByName) {
  if (!test::has_h5py()) GTEST_SKIP() << "needs python3-h5py";
  if (test_world().rank() != 0) return;
  const test::Scratch scratch;
  const std::string path = scratch.path("v1.h5");
  std::filesystem::copy(kVersion1, path);
  test::python(
      "import h5py, numpy as np, sys\nh5py.File(sys.argv[1], 'r+').attrs.modify('format_version', np.int64(2))\n",
      path);
  const PlainFile file(path, PlainFile::Access::read);
  std::filesystem::copy(manifest_path(kVersion1), manifest_path(path));
  Manifest manifest = read_manifest(path);
  manifest.blocks = digest_blocks(file, manifest.bytes, {0, Manifest::blocks_of(manifest.bytes)});
  write_file_atomically(manifest_path(path), manifest_text(manifest));
  EXPECT_EQ(test::error_of<DataError>([&] { CheckpointReader::open(path); }),
            path + ": checkpoint format 2 is newer than this program reads (1); it was written by tokenforge 0.1.0");

  std::string text = manifest_text(manifest);
  text.replace(text.find("\"format\":1"), 10, "\"format\":2");
  write_file_atomically(manifest_path(path), text);
  EXPECT_EQ(test::error_of<DataError>([&] { CheckpointReader::open(path); }),
            manifest_path(path) + ": checkpoint format 2 is newer than this program reads (1); use a newer TokenForge");
}

}  // namespace
}  // namespace tforge
