#include "storage/hdf5_file.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <numeric>

#include "storage/atomic_file.h"
#include "support/scratch.h"

namespace tforge {
namespace {

using test::error_of;
using test::Scratch;

std::string small_file(const Scratch& scratch) {
  const std::string path = scratch.path("small.h5");
  Hdf5File file = Hdf5File::create(path);
  const std::vector<std::int32_t> values = {1, 2, 3, 4, 5, 6};
  const std::uint64_t shape[] = {3, 2};
  file.write<std::int32_t>("/group/values", shape, values);
  file.set_attribute("/group", "scale", 0.25);
  file.close();
  return path;
}

TEST(Hdf5File, EveryTypeComesBack) {
  const Scratch scratch;
  const std::string path = scratch.path("types.h5");
  const auto values = []<class T>(T) { return std::vector<T>{T(1), T(2), T(250)}; };
  Hdf5File file = Hdf5File::create(path);
  const auto put = [&]<class T>(T zero) {
    file.write<T>(fmt::format("/t/{}", name_of(stored_type_of<T>::value)), values(zero));
  };
  put(float{}), put(double{}), put(std::int32_t{}), put(std::int64_t{});
  put(std::uint8_t{}), put(std::uint16_t{}), put(std::uint32_t{}), put(std::uint64_t{});
  const std::string blob("a\0b\xff", 4);
  file.write_bytes("/blob", blob);
  file.write_bytes("/empty", "");
  file.write_text("/text", "naïve\nline");
  file.write_text("/no_text", "");
  file.close();

  file = Hdf5File::open(path);
  const auto check = [&]<class T>(T zero) {
    EXPECT_EQ(file.read<T>(fmt::format("/t/{}", name_of(stored_type_of<T>::value))), values(zero));
  };
  check(float{}), check(double{}), check(std::int32_t{}), check(std::int64_t{});
  check(std::uint8_t{}), check(std::uint16_t{}), check(std::uint32_t{}), check(std::uint64_t{});
  EXPECT_EQ(file.read_bytes("/blob"), blob);
  EXPECT_EQ(file.read_bytes("/empty"), "");
  EXPECT_EQ(file.read_text("/text"), "naïve\nline");
  EXPECT_EQ(file.read_text("/no_text"), "");
  EXPECT_EQ(file.children("/"), (std::vector<std::string>{"blob", "empty", "no_text", "t", "text"}));
  EXPECT_EQ(file.datasets_below("/t").size(), 8U);
  EXPECT_TRUE(file.is_group("/t"));
  EXPECT_FALSE(file.is_dataset("/t"));
  EXPECT_FALSE(file.exists("/t/none"));
  EXPECT_EQ(error_of<DataError>([&] { file.read<float>("/t/f64"); }), path + ": /t/f64: holds f64 [3], want f32");
}

TEST(Hdf5File, RowRangesAndPlacement) {
  const Scratch scratch;
  const std::string path = scratch.path("rows.h5");
  const std::uint64_t shape[] = {700, 3};
  {
    Hdf5File file = Hdf5File::create(path);
    file.create_dataset("/rows", StoredType::f64, shape);
    std::vector<double> part(2 * 3);
    std::iota(part.begin(), part.end(), 1.0);
    file.write_rows<double>("/rows", 698, part);
    file.close();
  }
  const Hdf5File file = Hdf5File::open(path);
  std::vector<double> row(3);
  file.read_rows<double>("/rows", 699, row);
  EXPECT_EQ(row, (std::vector<double>{4, 5, 6}));
  EXPECT_THROW(file.read_rows<double>("/rows", 700, row), DataError);
  EXPECT_THROW(file.read_rows<double>("/rows", 0, std::span(row).first(2)), DataError);

  // The bytes are where info() says, at a page border, for readers without HDF5.
  const DatasetInfo info = file.info("/rows");
  EXPECT_EQ(info.shape, (std::vector<std::uint64_t>{700, 3}));
  EXPECT_EQ(info.bytes, 700U * 3 * 8);
  ASSERT_TRUE(info.mappable);
  EXPECT_EQ(info.offset % 4096, 0U);
  PlainFile(path, PlainFile::Access::read).read_at(info.offset + 699 * 24, row.data(), 24);
  EXPECT_EQ(row, (std::vector<double>{4, 5, 6}));
}

TEST(Hdf5File, AttributesKeepTheirType) {
  const Scratch scratch;
  const std::string path = scratch.path("attributes.h5");
  const std::string long_text(100000, 'x');
  Hdf5File file = Hdf5File::create(path);
  file.create_group("/a/b");
  file.set_attribute("/a/b", "count", std::int64_t{-3});
  file.set_attribute("/a/b", "count", std::int64_t{-4});  // replaces
  file.set_attribute("/a/b", "seed", std::uint64_t{0xffffffffffffffffU});
  file.set_attribute("/a/b", "rate", 1e-4);
  file.set_attribute("/a/b", "name", std::string("zero-key"));
  file.set_attribute("/a/b", "none", std::string());
  file.set_attribute("/a/b", "long", long_text);
  file.set_attribute("/a/b", "ages", std::vector<std::int64_t>{0, 10, 64, 2});
  file.set_attribute("/a/b", "no_ages", std::vector<std::int64_t>{});
  file.close();

  file = Hdf5File::open(path);
  EXPECT_EQ(file.attribute<std::int64_t>("/a/b", "count"), -4);
  EXPECT_EQ(file.attribute<std::uint64_t>("/a/b", "seed"), 0xffffffffffffffffU);
  EXPECT_EQ(file.attribute<double>("/a/b", "rate"), 1e-4);
  EXPECT_EQ(file.attribute<std::string>("/a/b", "name"), "zero-key");
  EXPECT_EQ(file.attribute<std::string>("/a/b", "none"), "");
  EXPECT_EQ(file.attribute<std::string>("/a/b", "long"), long_text);
  EXPECT_EQ(file.attribute<std::vector<std::int64_t>>("/a/b", "ages"), (std::vector<std::int64_t>{0, 10, 64, 2}));
  EXPECT_TRUE(file.attribute<std::vector<std::int64_t>>("/a/b", "no_ages").empty());
  EXPECT_EQ(file.attribute_names("/a/b").size(), 8U);
  EXPECT_EQ(error_of<DataError>([&] { file.attribute<double>("/a/b", "name"); }),
            path + ": /a/b: attribute 'name' is a string, want a float");
  EXPECT_EQ(error_of<DataError>([&] { file.attribute<std::uint64_t>("/a/b", "count"); }),
            path + ": /a/b: attribute 'count' is -4, out of range");
  EXPECT_EQ(error_of<DataError>([&] { file.attribute<double>("/a/b", "missing"); }),
            path + ": /a/b: has no attribute 'missing'");
}

TEST(Hdf5File, BrokenFilesGiveOneLine) {
  const Scratch scratch;
  const std::string path = small_file(scratch);
  EXPECT_EQ(error_of<DataError>([&] { Hdf5File::open(scratch.path("none.h5")); }),
            scratch.path("none.h5") + ": cannot be opened: No such file or directory");
  EXPECT_EQ(error_of<DataError>([&] { Hdf5File::open(path).read<float>("/group/nothing"); }),
            path + ": /group/nothing: not in the file");

  const auto size = std::filesystem::file_size(path);
  std::filesystem::resize_file(path, size - 10);
  EXPECT_EQ(
      error_of<DataError>([&] { Hdf5File::open(path); }),
      fmt::format("{}: the HDF5 file is truncated ({} bytes on disk); copy it again or make it anew", path, size - 10));

  const std::string text = scratch.path("text.h5");
  std::ofstream(text) << "not HDF5 at all";
  EXPECT_EQ(error_of<DataError>([&] { Hdf5File::open(text); }), text + ": not an HDF5 file (15 bytes)");
}

// Files that h5py makes and that must not be followed or believed.
TEST(Hdf5File, UntrustedLayoutsAreRefused) {
  if (!test::has_h5py()) GTEST_SKIP() << "needs python3-h5py";
  const Scratch scratch;
  const std::string path = scratch.path("foreign.h5");
  test::python(R"(
import h5py, numpy as np, sys
f = h5py.File(sys.argv[1], 'w')
f['plain'] = np.arange(6, dtype='f4').reshape(2, 3)
f['big_endian'] = np.arange(3, dtype='>f8')
f.create_dataset('chunked', data=np.zeros(100), chunks=(10,), compression='gzip')
f.create_dataset('bomb', shape=(1 << 40,), chunks=(1 << 20,), dtype='f8')
f.create_dataset('late', shape=(1 << 40,), dtype='f8')
f.create_dataset('external', shape=(4,), dtype='u1', external=[('/etc/passwd', 0, 4)])
f['soft'] = h5py.SoftLink('/plain')
f['outside'] = h5py.ExternalLink('/etc/hostname.h5', '/x')
f['loop'] = f['/']
f.attrs['text'] = 'variable length'
f.attrs['count'] = np.int16(7)
f.attrs['matrix'] = np.zeros((2, 2))
f['words'] = 'a string'
# 40 floors of two doors each: 2^40 ways up
for i in range(40):
  f.create_group(f'tower/{i}')
for i in range(39):
  f[f'tower/{i}/a'] = f[f'tower/{i}/b'] = f[f'tower/{i + 1}']
f['nothing'] = np.zeros((1 << 20, 0))
f.create_dataset('impossible', shape=(1 << 62, 4, 0), dtype='f4')
layout = h5py.VirtualLayout(shape=(0,), maxshape=(None,), dtype='f8')
source = h5py.VirtualSource('/etc/hostname', 'x', shape=(0,), maxshape=(None,))
layout[0:h5py.h5s.UNLIMITED] = source[0:h5py.h5s.UNLIMITED]
f.create_virtual_dataset('virtual', layout)
f.attrs['odd'] = np.array(3, dtype='>i4')
)",
               path);
  EXPECT_EQ(error_of<DataError>([&] { Hdf5File::open(path); }),
            path + ": an HDF5 file that no writer of TokenForge has made; make it anew");
  const Hdf5File file = Hdf5File::open(path, Hdf5File::Access::read, Hdf5File::Maker::anybody);
  EXPECT_EQ(file.read<float>("/plain").size(), 6U);
  EXPECT_EQ(file.attribute<std::string>("/", "text"), "variable length");
  EXPECT_EQ(file.attribute<std::int64_t>("/", "count"), 7);
  EXPECT_EQ(file.read_text("/words"), "a string");
  const auto refused = [&](const std::string& name, const std::string& why) {
    const std::string message = error_of<DataError>([&] { file.info(name); });
    EXPECT_EQ(message.rfind(path + ": " + name + ": " + why, 0), 0U) << message;
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
  };
  refused("/big_endian", "its element type is not one of");
  refused("/chunked", "stored in chunks, virtual");
  refused("/bomb", "stored in chunks, virtual");
  refused("/late", "claims 8796093022208 bytes");
  refused("/external", "stored in an external file");
  refused("/soft", "a soft or external link");
  refused("/outside", "a soft or external link");
  refused("/outside/x", "a soft or external link");
  EXPECT_FALSE(file.exists("/outside/x"));
  EXPECT_FALSE(file.exists("/soft/x"));
  refused("/virtual", "stored in chunks, virtual");
  refused("/impossible", "has impossible extents");
  EXPECT_EQ(file.info("/nothing").elements(), 0U);
  EXPECT_THROW(file.datasets_below("/tower"), DataError);
  EXPECT_THROW(file.attribute("/", "odd"), DataError);
  EXPECT_THROW(file.attribute("/", "matrix"), DataError);
  EXPECT_THROW(file.datasets_below("/"), DataError);  // the loop and the links
}

TEST(Hdf5File, OurOwnFilesHaveTextOfFixedLength) {
  if (!test::has_h5py()) GTEST_SKIP() << "needs python3-h5py";
  const Scratch scratch;
  const std::string path = small_file(scratch);
  test::python("import h5py, sys\nf = h5py.File(sys.argv[1], 'r+')\nf.attrs['text'] = 'x'\nf['words'] = 'x'\n", path);
  const Hdf5File file = Hdf5File::open(path);
  EXPECT_THROW(file.attribute("/", "text"), DataError);
  EXPECT_THROW(file.read_text("/words"), DataError);
}

TEST(Hdf5File, FullDiskIsAResourceErrorAndTheProcessEndsWell) {
  const test::SmallDisk disk(1);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a tmpfs needs root";
  // In a process of its own, because what a failed write leaves inside the library shows when the process ends.
  const pid_t child = ::fork();
  if (child == 0) {
    int code = 1;
    try {
      Hdf5File file = Hdf5File::create(disk.path("full.h5"));
      file.write<double>("/values", std::vector<double>(1U << 20, 1.0));
      file.close();
    } catch (const ResourceError&) {
      code = 0;
    } catch (...) {
      code = 2;
    }
    std::exit(code);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace tforge
