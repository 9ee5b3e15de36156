#include "storage/atomic_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <set>

#include "core/errors.h"
#include "storage/digest.h"
#include "support/scratch.h"

namespace tforge {
namespace {

using test::error_of;
using test::Scratch;

std::size_t files_in(const std::string& folder) {
  return static_cast<std::size_t>(std::distance(std::filesystem::directory_iterator(folder), {}));
}

TEST(AtomicFile, AppearsAtCommitOnly) {
  const Scratch scratch;
  const std::string target = scratch.path("target");
  write_file_atomically(target, "old");
  {
    const AtomicFile dropped(target);
    dropped.file().write_at(0, "new", 3);
    EXPECT_EQ(folder_of(dropped.temporary()), scratch.folder());
    EXPECT_TRUE(is_temporary_name(std::filesystem::path(dropped.temporary()).filename().string()));
    EXPECT_EQ(read_file(target, 10), "old");
    EXPECT_EQ(files_in(scratch.folder()), 2U);
  }
  EXPECT_EQ(files_in(scratch.folder()), 1U);
  EXPECT_EQ(read_file(target, 10), "old");

  AtomicFile kept(target);
  kept.file().write_at(0, "newer", 5);
  kept.commit();
  EXPECT_EQ(read_file(target, 10), "newer");
  EXPECT_EQ(files_in(scratch.folder()), 1U);
  EXPECT_FALSE(is_temporary_name("target"));
  EXPECT_FALSE(is_temporary_name(".target.0123456789abcdeg.tmp"));
}

TEST(AtomicFile, FollowsTheUmask) {
  const Scratch scratch;
  const mode_t before = ::umask(027);
  write_file_atomically(scratch.path("file"), "x");
  ::umask(before);
  struct stat status {};
  ASSERT_EQ(::stat(scratch.path("file").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777U, 0640U);
}

TEST(AtomicFile, TemporaryNamesAreDrawnAnew) {
  const Scratch scratch;
  std::set<std::string> names;
  for (int i = 0; i < 100; ++i) names.insert(AtomicFile(scratch.path("file")).temporary());
  EXPECT_EQ(names.size(), 100U);
}

TEST(AtomicFile, TemporariesOfKilledJobsAreRemovedByTarget) {
  const Scratch scratch;
  const std::string own = temporary_name(scratch.path("file")), other = temporary_name(scratch.path("file.manifest"));
  for (const std::string& path : {own, other, scratch.path("file"), scratch.path(".file.tmp")})
    std::ofstream(path) << 1;
  remove_temporaries_of(scratch.path("file"));
  EXPECT_FALSE(std::filesystem::exists(own));
  for (const std::string& path : {other, scratch.path("file"), scratch.path(".file.tmp")}) {
    EXPECT_TRUE(std::filesystem::exists(path)) << path;
  }
  remove_temporaries_of(scratch.path("none/file"));
}

TEST(AtomicFile, ErrorsNameTheFile) {
  const Scratch scratch;
  EXPECT_EQ(error_of<DataError>([&] { AtomicFile(scratch.path("none/file")); }),
            scratch.path("none/file") + ": cannot be created: No such file or directory");
  write_file_atomically(scratch.path("file"), "12345");
  EXPECT_EQ(error_of<DataError>([&] { read_file(scratch.path("file"), 4); }),
            scratch.path("file") + ": 5 bytes, want at most 4");
  char buffer[8];
  EXPECT_EQ(
      error_of<DataError>([&] { PlainFile(scratch.path("file"), PlainFile::Access::read).read_at(2, buffer, 8); }),
      scratch.path("file") + ": ends at byte 5, 5 more were expected");
}

TEST(AtomicFile, FullDiskLeavesNothing) {
  const test::SmallDisk disk(1);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a tmpfs needs root";
  const std::string bytes(2U << 20, 'x');
  EXPECT_THROW(write_file_atomically(disk.path("file"), bytes), ResourceError);
  EXPECT_THROW(AtomicFile(disk.path("file")).file().reserve(2U << 20), ResourceError);
  EXPECT_EQ(files_in(disk.folder()), 0U);
}

TEST(Digest, KnownValuesAndStreaming) {
  // Of the empty input, from the reference implementation.
  EXPECT_EQ(hex(digest64("", 0)), "2d06800538d394c2");
  EXPECT_EQ(digest128(""), "99aa06d3014798d86001c324468d497f");
  std::string text;
  Digest digest;
  for (int i = 0; i < 1000; ++i) {
    const std::string piece = std::to_string(i * i);
    text += piece;
    digest.add(piece);
  }
  EXPECT_EQ(digest.text(), digest128(text));
  EXPECT_NE(digest64(text.data(), text.size(), 1), digest64(text.data(), text.size()));
}

}  // namespace
}  // namespace tforge
