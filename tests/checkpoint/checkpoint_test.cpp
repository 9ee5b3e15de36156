#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <future>
#include <set>

#include "checkpoint/agreement.h"
#include "checkpoint/folder.h"
#include "checkpoint/manifest.h"
#include "checkpoint/reader.h"
#include "checkpoint/staging.h"
#include "checkpoint/writer.h"
#include "core/rng.h"
#include "sample.h"
#include "storage/digest.h"
#include "support/mpi_world.h"
#include "support/scratch.h"

namespace tforge {
namespace {

namespace fs = std::filesystem;
using test::error_of;
using test::sample;
using test::sample_row;
using test::Scratch;
using test::SharedFolder;
using test::Size;

std::size_t files_in(const std::string& folder) {
  return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder), {}));
}

void expect_rows(const CheckpointReader& reader, const CheckpointTensor& want, std::int64_t first, std::int64_t rows) {
  const std::size_t width = static_cast<std::size_t>(want.shape.columns()) * size_of(want.dtype);
  std::vector<std::byte> got(static_cast<std::size_t>(rows) * width);
  reader.read_rows(want.path, first, rows, want.dtype, got.data());
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::vector<std::byte> row = sample_row(want, first + r);
    ASSERT_EQ(std::memcmp(row.data(), got.data() + static_cast<std::size_t>(r) * width, width), 0)
        << want.path << " row " << first + r;
  }
}

void flip_byte(const std::string& path, std::uint64_t at) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(static_cast<std::streamoff>(at));
  const char value = static_cast<char>(file.get() ^ 0x10);
  file.seekp(static_cast<std::streamoff>(at));
  file.put(value);
}

/// A tiny checkpoint written by one rank.
std::string tiny(const std::string& folder, std::int64_t step = 42, Retention retention = Retention::rolling) {
  const auto self = create_self();
  test::Sample s = sample(0, 1, Size::tiny, step);
  s.contents.retention = retention;
  const std::string path = folder + "/" + checkpoint_name(step);
  save_checkpoint(*self, path, s.contents);
  return path;
}

/// Gives a file that was changed on purpose a manifest that fits it.
void renew_manifest(const std::string& path) {
  Manifest manifest = read_manifest(path);
  const PlainFile file(path, PlainFile::Access::read);
  manifest.bytes = file.size();
  manifest.blocks = digest_blocks(file, manifest.bytes, {0, Manifest::blocks_of(manifest.bytes)});
  write_file_atomically(manifest_path(path), manifest_text(manifest));
}

TEST(Checkpoint, AnyRanksReadWhatTheseWrote) {
  Communicator& world = test_world();
  const SharedFolder folder(world);
  const std::string path = folder.path(checkpoint_name(42));
  const test::Sample mine = sample(world.rank(), world.size(), Size::three_blocks);
  const CheckpointInfo saved = save_checkpoint(world, path, mine.contents);
  if (world.rank() == 0) {
    EXPECT_EQ(files_in(folder.folder()), 2U);
  }

  const CheckpointReader reader = CheckpointReader::open(world, path);
  EXPECT_EQ(reader.info().uuid, saved.uuid);
  EXPECT_EQ(reader.info().digest, saved.digest);
  EXPECT_EQ(reader.info().step, 42);
  EXPECT_EQ(reader.info().model_kind, "tokenformer");
  EXPECT_EQ(reader.info().parent_uuid, mine.contents.parent_uuid);
  EXPECT_EQ(reader.config(), mine.contents.config);
  EXPECT_EQ(reader.tokenizer().kind, "bytes");
  EXPECT_EQ(reader.tokenizer().fingerprint, "f00d");
  EXPECT_EQ(reader.tokenizer().bytes, mine.contents.tokenizer.bytes);
  EXPECT_EQ(reader.growth_history(), mine.contents.growth_history);
  Attributes state = mine.contents.state;
  state["step"] = std::int64_t{42};
  EXPECT_EQ(reader.state(), state);
  ASSERT_EQ(reader.tensors().size(), mine.contents.tensors.size());

  for (const CheckpointTensor& want : mine.contents.tensors) {
    const CheckpointReader::Tensor& got = reader.tensor(want.path);
    EXPECT_EQ(got.dtype, want.dtype);
    EXPECT_EQ(got.shape, want.shape);
    EXPECT_EQ(got.attributes, want.attributes);
    // As one rank, and as each rank of 2 and 5 would.
    for (const int ranks : {1, 2, 5}) {
      for (int rank = 0; rank < ranks; ++rank) {
        const RowBlock block = test::even_block(want.shape.rows(), rank, ranks)[0];
        expect_rows(reader, want, block.first_row, block.rows);
      }
    }
    reader.verify(got);
  }

  // The same content written by one rank has the same content digests.
  if (world.rank() == 0) {
    const auto self = create_self();
    const std::string alone = folder.path(checkpoint_name(43));
    save_checkpoint(*self, alone, sample(0, 1, Size::three_blocks).contents);
    const CheckpointReader other = CheckpointReader::open(alone);
    for (const CheckpointReader::Tensor& t : reader.tensors()) {
      EXPECT_EQ(other.tensor(t.path).content_digest, t.content_digest) << t.path;
    }
  }
}

TEST(Checkpoint, ConvertsBetweenF32AndF64Only) {
  if (test_world().rank() != 0) return;
  const Scratch scratch;
  const CheckpointReader reader = CheckpointReader::open(tiny(scratch.folder()));
  const CheckpointTensor want = sample(0, 1, Size::tiny).contents.tensors[0];
  std::vector<double> wide(5);
  reader.read_rows(want.path, 3, 1, DType::f64, wide.data());
  std::vector<float> stored(5);
  std::memcpy(stored.data(), sample_row(want, 3).data(), 20);
  EXPECT_EQ(wide, std::vector<double>(stored.begin(), stored.end()));
  std::vector<float> narrow(5);
  reader.read_rows("optim/layers.0.attention.query.keys/m", 12, 1, DType::f32, narrow.data());
  EXPECT_FLOAT_EQ(narrow[4], 0.25F * 12 - 3.0F * 4 + 37);
  EXPECT_THROW(reader.read_rows("model/counts", 0, 1, DType::f32, narrow.data()), DTypeError);
  EXPECT_THROW(reader.read_rows(want.path, 12, 2, DType::f32, narrow.data()), ShapeError);
  EXPECT_THROW(reader.read_rows("model/absent", 0, 1, DType::f32, narrow.data()), CheckpointError);
}

TEST(Checkpoint, StepsMayRunApart) {
  Communicator& world = test_world();
  const SharedFolder folder(world);
  const std::string path = folder.path("apart.h5");
  const test::Sample mine = sample(world.rank(), world.size(), Size::tiny);
  {
    CheckpointWriter dropped(world, path, mine.contents);
    dropped.write_rows(mine.contents.tensors);
    world.barrier();
    EXPECT_FALSE(fs::exists(path));
    world.barrier();
  }
  world.barrier();
  if (world.rank() == 0) {
    EXPECT_EQ(files_in(folder.folder()), 0U);
  }
  world.barrier();

  // Rows come from a copy, as a writer in the background would take them.
  CheckpointWriter writer(world, path, mine.contents);
  test::Sample staged = sample(world.rank(), world.size(), Size::tiny);
  writer.write_rows(staged.contents.tensors);
  writer.seal();
  writer.digest_blocks();
  writer.commit();
  for (const CheckpointTensor& want : mine.contents.tensors) {
    expect_rows(CheckpointReader::open(path), want, 0, want.shape.rows());
  }
}

TEST(Checkpoint, ErrorsAreEveryonesErrors) {
  Communicator& world = test_world();
  const SharedFolder folder(world);
  const std::string path = folder.path("x.h5");
  const int last = world.size() - 1;
  const std::string who = last == 0 ? "" : fmt::format("rank {}: ", last);
  EXPECT_EQ(error_of<ResourceError>([&] {
              together(world, [&]() -> std::string {
                if (world.rank() == last) throw ResourceError("no room");
                return "";
              });
            }),
            who + "no room");
  const auto code = [&] {
    try {
      together(world, [&]() -> std::string {
        if (world.rank() == last) throw CrashLoopError("again");
        return "";
      });
    } catch (const Error& error) {
      return error.code();
    }
    return ExitCode::done;
  };
  EXPECT_EQ(code(), ExitCode::crash_loop);

  test::Sample gap = sample(world.rank(), world.size(), Size::tiny);
  if (world.rank() == last) gap.contents.tensors[1].blocks[0].rows -= 1;
  EXPECT_EQ(error_of<InternalError>([&] { save_checkpoint(world, path, gap.contents); }),
            "checkpoint: optim/layers.0.attention.query.keys/m: rows 12 to 13 are owned by no rank");

  test::Sample twice = sample(world.rank(), world.size(), Size::tiny);
  if (world.rank() == last) twice.contents.tensors[0].blocks.back().first_row = 0;
  EXPECT_EQ(error_of<InternalError>([&] { save_checkpoint(world, path, twice.contents); }),
            "checkpoint: model/layers.0.attention.query.keys: rows 0 to 1 are not owned by exactly one rank");

  if (world.size() > 1) {
    test::Sample other = sample(world.rank(), world.size(), Size::tiny);
    if (world.rank() == last) other.contents.tensors[0].dtype = DType::f64;
    EXPECT_THROW(save_checkpoint(world, path, other.contents), InternalError);
  }
  EXPECT_EQ(error_of<DataError>([&] {
              save_checkpoint(world, folder.path("none/x.h5"), sample(world.rank(), world.size(), Size::tiny).contents);
            }),
            folder.path("none/x.h5") + ": cannot be created: No such file or directory");
  if (world.rank() == 0) {
    EXPECT_EQ(files_in(folder.folder()), 0U);
  }
}

TEST(Checkpoint, FullDiskIsAResourceErrorAndLeavesNothing) {
  Communicator& world = test_world();
  std::unique_ptr<test::SmallDisk> disk;
  if (world.rank() == 0) disk = std::make_unique<test::SmallDisk>(4);
  const std::string folder = world.all_gather_bytes(disk && disk->mounted() ? disk->folder() : "")[0];
  if (folder.empty()) GTEST_SKIP() << "mounting a tmpfs needs root";
  const test::Sample mine = sample(world.rank(), world.size(), Size::three_blocks);
  const std::string message =
      error_of<ResourceError>([&] { save_checkpoint(world, folder + "/step_00000001.h5", mine.contents); });
  EXPECT_NE(message.find("the disk is full"), std::string::npos) << message;
  if (world.rank() == 0) {
    EXPECT_EQ(files_in(folder), 0U);
    // A small one fits afterwards.
    tiny(folder);
    EXPECT_EQ(files_in(folder), 2U);
  }
  world.barrier();
}

TEST(Checkpoint, FullDiskAtAnyPage) {
  if (test_world().rank() != 0) return;
  const test::SmallDisk disk(1);
  if (!disk.mounted()) GTEST_SKIP() << "mounting a tmpfs needs root";
  int failures = 0;
  for (std::size_t free_pages = 0; free_pages < 32; ++free_pages) {
    const std::string filler = disk.path("filler");
    write_file_atomically(filler, std::string((256 - free_pages) * 4096, 'x'));
    try {
      const CheckpointReader reader = CheckpointReader::open(tiny(disk.folder()));
      EXPECT_EQ(reader.info().step, 42);
      break;  // enough room from here on
    } catch (const ResourceError&) {
      ++failures;
      EXPECT_EQ(files_in(disk.folder()), 1U) << free_pages << " free pages";
    }
    fs::remove(filler);
  }
  EXPECT_GT(failures, 2);
  EXPECT_EQ(files_in(disk.folder()), 3U);
}

TEST(Checkpoint, DamageIsNamed) {
  Communicator& world = test_world();
  const SharedFolder folder(world);
  const std::string path = folder.path("step_00000042.h5");
  save_checkpoint(world, path, sample(world.rank(), world.size(), Size::three_blocks).contents);
  CheckpointReader::Tensor wide = CheckpointReader::open(path).tensor("model/wide");
  world.barrier();
  // Row 2500 lies in the second 4 MiB; on 3 ranks rank 1 looks after it, and everyone hears of it.
  const std::uint64_t at = wide.offset + 2500 * 2800 + 17;
  if (world.rank() == 0) flip_byte(path, at);
  world.barrier();
  const std::string message = error_of<CheckpointError>([&] { CheckpointReader::open(world, path); });
  EXPECT_NE(message.find("step_00000042.h5: damaged between bytes 4194304 and 8388608: model/wide row 2500"),
            std::string::npos)
      << message;
  const CheckpointReader reader = CheckpointReader::open(path, CheckpointReader::Verify::rows_when_read);
  std::vector<float> rows(2 * 700);
  reader.read_rows("model/wide", 2498, 2, DType::f32, rows.data());
  EXPECT_EQ(error_of<CheckpointError>([&] { reader.read_rows("model/wide", 2499, 2, DType::f32, rows.data()); }),
            path + ": damaged: model/wide row 2500 does not match its digest");
}

TEST(Checkpoint, EveryFlippedByteAndTruncationIsFound) {
  if (test_world().rank() != 0) return;
  const Scratch scratch;
  const std::string path = tiny(scratch.folder());
  const Rng rng(1, "flips");
  for (const std::string& victim : {path, manifest_path(path)}) {
    const std::string whole = read_file(victim, 1U << 30);
    for (std::uint64_t trial = 0; trial < 60; ++trial) {
      flip_byte(victim, rng.below(trial, whole.size()));
      try {
        CheckpointReader::open(path);
        ADD_FAILURE() << victim << ": byte " << rng.below(trial, whole.size());
      } catch (const CheckpointError& error) {
        EXPECT_EQ(std::string_view(error.what()).find('\n'), std::string_view::npos);
      }
      write_file_atomically(victim, whole);
    }
    for (const std::uint64_t bytes : {std::uint64_t{0}, std::uint64_t{100}, whole.size() - 1}) {
      fs::resize_file(victim, bytes);
      EXPECT_THROW(CheckpointReader::open(path), CheckpointError) << victim << " cut to " << bytes;
      write_file_atomically(victim, whole);
    }
  }
  EXPECT_NO_THROW(CheckpointReader::open(path));
}

TEST(Checkpoint, AnythingInPlaceOfTheManifestIsDamage) {
  if (test_world().rank() != 0) return;
  const Scratch scratch;
  const std::string path = tiny(scratch.folder());
  for (const std::string& text : {std::string(), std::string("[]"), std::string("{\"format\":1e300}"),
                                  std::string("{\"format\":1}"), std::string(1000000, '['), std::string("\xff\0", 2)}) {
    write_file_atomically(manifest_path(path), text);
    const std::string message = error_of<CheckpointError>([&] { CheckpointReader::open(path); });
    EXPECT_EQ(message.rfind(manifest_path(path) + ": damaged: ", 0), 0U) << message;
  }
}

TEST(Checkpoint, LostRenamedAndExchangedFiles) {
  if (test_world().rank() != 0) return;
  const Scratch scratch;
  const std::string a = tiny(scratch.folder(), 1);
  const std::string b = tiny(scratch.folder(), 2);
  EXPECT_EQ(error_of<DataError>([&] { CheckpointReader::open(scratch.path("step_00000003.h5")); }),
            scratch.path("step_00000003.h5") + ": cannot be opened: No such file or directory");

  const std::string lost = tiny(scratch.folder(), 3);
  fs::remove(lost);
  EXPECT_EQ(error_of<CheckpointError>([&] { CheckpointReader::open(lost); }),
            lost + ": the file is missing; only its manifest is there");

  fs::rename(manifest_path(a), scratch.path("kept"));
  EXPECT_NE(error_of<CheckpointError>([&] { CheckpointReader::open(a); }).find("no readable manifest beside it"),
            std::string::npos);
  fs::rename(scratch.path("kept"), manifest_path(a));

  const std::string renamed = scratch.path("renamed.h5");
  fs::copy(a, renamed);
  fs::copy(manifest_path(a), manifest_path(renamed));
  EXPECT_EQ(error_of<CheckpointError>([&] { CheckpointReader::open(renamed); }),
            renamed + ": its manifest is that of step_00000001.h5; rename both files back");

  fs::rename(a, scratch.path("a"));
  fs::rename(b, a);
  fs::rename(scratch.path("a"), b);
  EXPECT_THROW(CheckpointReader::open(a), CheckpointError);
  // Even a manifest made to fit the bytes speaks of another step and uuid.
  renew_manifest(a);
  EXPECT_NE(error_of<CheckpointError>([&] { CheckpointReader::open(a); }).find("is that of another checkpoint"),
            std::string::npos);
}

TEST(Checkpoint, AttributesAndBlobsAreCovered) {
  if (!test::has_h5py()) GTEST_SKIP() << "needs python3-h5py";
  if (test_world().rank() != 0) return;
  const Scratch scratch;
  const struct {
    const char* change;
    const char* named;
  } cases[] = {
      {"f.attrs['uuid'] = np.bytes_('0')", "the attributes of / do not match"},
      {"f['state'].attrs['tokens'] = np.int64(1001)", "the attributes of /state do not match"},
      {"f['state'].attrs['more'] = np.int64(1)", "the attributes of /state do not match"},
      {"del f['growth/history/000001'].attrs['rule']", "the attributes of /growth/history/000001 do not match"},
      {"f['model/layers.0.attention.query.keys'].attrs['scale'] = 5.0", "attention.query.keys do not match"},
      {"f['tokenizer'][2] ^= 1", "/tokenizer does not match its digest"},
      {"f['model/extra'] = np.zeros(3, 'f4')", "/model/extra is not listed"},
  };
  std::int64_t step = 0;
  for (const auto& c : cases) {
    const std::string path = tiny(scratch.folder(), ++step);
    test::python(fmt::format("import h5py, numpy as np, sys\nf = h5py.File(sys.argv[1], 'r+')\n{}\n", c.change), path);
    EXPECT_THROW(CheckpointReader::open(path), CheckpointError);
    const std::string message =
        error_of<CheckpointError>([&] { CheckpointReader::open(path, CheckpointReader::Verify::rows_when_read); });
    EXPECT_NE(message.find(c.named), std::string::npos) << message;
  }
}

TEST(Checkpoint, ExistingOnesAreKeptUnlessReplaced) {
  Communicator& world = test_world();
  const SharedFolder folder(world);
  const std::string path = folder.path("step_00000042.h5");
  const test::Sample mine = sample(world.rank(), world.size(), Size::tiny);
  const CheckpointInfo first = save_checkpoint(world, path, mine.contents);
  EXPECT_NE(error_of<DataError>([&] { save_checkpoint(world, path, mine.contents); }).find("already"),
            std::string::npos);
  EXPECT_EQ(CheckpointReader::open(path).info().uuid, first.uuid);
  world.barrier();
  const CheckpointInfo second = save_checkpoint(world, path, mine.contents, OnExisting::replace);
  EXPECT_EQ(CheckpointReader::open(path).info().uuid, second.uuid);
  EXPECT_NE(first.uuid, second.uuid);
}

TEST(CheckpointFolder, NewestAndPruning) {
  if (test_world().rank() != 0) return;
  const Scratch scratch;
  const std::string folder = scratch.folder();
  EXPECT_FALSE(latest_checkpoint(folder).has_value());
  EXPECT_FALSE(latest_checkpoint(folder + "/none").has_value());
  EXPECT_EQ(checkpoint_name(1234), "step_00001234.h5");
  EXPECT_EQ(step_of_name("step_123456789.h5"), 123456789);
  EXPECT_FALSE(step_of_name("step_1234.h5"));
  EXPECT_FALSE(step_of_name("step_0000-234.h5"));

  tiny(folder, 10);
  const std::string stage_end = tiny(folder, 20, Retention::stage_end);
  tiny(folder, 30);
  const std::string kept = tiny(folder, 40);
  const std::string damaged = tiny(folder, 50);
  fs::resize_file(damaged, 10);
  std::ofstream(scratch.path("step_00000060.h5")) << "a save that did not finish";
  std::ofstream(scratch.path("notes.txt")) << "mine";
  EXPECT_EQ(latest_checkpoint(folder)->step, 50);

  EXPECT_EQ(prune_checkpoints(folder, 1),
            (std::vector<std::string>{folder + "/step_00000010.h5", folder + "/step_00000030.h5"}));
  std::vector<std::string> left;
  for (const CheckpointFile& file : list_checkpoints(folder)) left.push_back(file.path);
  EXPECT_EQ(left, (std::vector<std::string>{stage_end, kept, damaged}));
  EXPECT_TRUE(prune_checkpoints(folder, 1).empty());

  const std::string stale = folder + "/.step_00000070.h5.0123456789abcdef.tmp";
  const std::string foreign = folder + "/.other.0123456789abcdef.tmp";
  std::ofstream(stale) << "x";
  std::ofstream(foreign) << "x";
  EXPECT_EQ(remove_temporaries(folder), std::vector<std::string>{stale});
  EXPECT_TRUE(fs::exists(foreign));
}

/// The states in which a commit or a removal cut short leaves a folder: what recover_commits() makes of each.
TEST(CheckpointFolder, CommitsCutShortAreEnded) {
  if (test_world().rank() != 0) return;
  const auto names = [](const std::string& folder) {
    std::set<std::string> all;
    for (const auto& entry : fs::directory_iterator(folder)) all.insert(entry.path().filename());
    return all;
  };
  const std::string temporary = ".step_00000042.h5.0123456789abcdef.tmp";
  const std::string temporary_manifest = ".step_00000042.h5.manifest.fedcba9876543210.tmp";
  const std::set<std::string> whole = {"step_00000042.h5", "step_00000042.h5.manifest"};
  {
    // Between the two renames.
    const Scratch scratch;
    const std::string path = tiny(scratch.folder());
    const std::string digest = CheckpointReader::open(path).info().digest;
    fs::rename(manifest_path(path), scratch.path(temporary_manifest));
    EXPECT_EQ(recover_commits(scratch.folder()), std::vector<std::string>{path});
    EXPECT_EQ(names(scratch.folder()), whole);
    EXPECT_EQ(CheckpointReader::open(path).info().digest, digest);
    // Before the first one.
    fs::rename(manifest_path(path), scratch.path(temporary_manifest));
    fs::rename(path, scratch.path(temporary));
    EXPECT_EQ(recover_commits(scratch.folder()), std::vector<std::string>{path});
    EXPECT_EQ(CheckpointReader::open(path).info().digest, digest);
    EXPECT_TRUE(recover_commits(scratch.folder()).empty());
  }
  {
    // Replacing another one whose manifest is gone already.
    const Scratch scratch, other;
    const std::string path = tiny(scratch.folder()), replacement = tiny(other.folder());
    const std::string uuid = CheckpointReader::open(replacement).info().uuid;
    fs::remove(manifest_path(path));
    fs::copy(replacement, scratch.path(temporary));
    fs::copy(manifest_path(replacement), scratch.path(temporary_manifest));
    EXPECT_EQ(recover_commits(scratch.folder()), std::vector<std::string>{path});
    EXPECT_EQ(names(scratch.folder()), whole);
    EXPECT_EQ(CheckpointReader::open(path).info().uuid, uuid);
  }
  {
    // Not all of it had reached the disk; and one whose place is taken.
    const Scratch scratch;
    const std::string path = tiny(scratch.folder());
    fs::rename(manifest_path(path), scratch.path(temporary_manifest));
    flip_byte(path, 5000);
    EXPECT_TRUE(recover_commits(scratch.folder()).empty());
    flip_byte(path, 5000);
    const std::string text = read_file(scratch.path(temporary_manifest), 1U << 20);
    write_file_atomically(scratch.path(temporary_manifest), text.substr(0, text.size() / 2));
    EXPECT_TRUE(recover_commits(scratch.folder()).empty());
    write_file_atomically(manifest_path(path), text);
    write_file_atomically(scratch.path(temporary_manifest), text);
    EXPECT_TRUE(recover_commits(scratch.folder()).empty());
    EXPECT_EQ(remove_temporaries(scratch.folder()).size(), 1U);
    EXPECT_EQ(names(scratch.folder()), whole);
  }
}

TEST(CheckpointFolder, DamagedOnesAreSetAside) {
  if (test_world().rank() != 0) return;
  const Scratch scratch;
  const std::string path = tiny(scratch.folder());
  EXPECT_EQ(set_aside(path), path + ".damaged");
  EXPECT_TRUE(fs::exists(manifest_path(path + ".damaged")));
  EXPECT_TRUE(checkpoint_files(scratch.folder()).empty());
  std::ofstream(path) << "another, without a manifest";
  EXPECT_EQ(checkpoint_files(scratch.folder()).size(), 1U);
  EXPECT_TRUE(list_checkpoints(scratch.folder()).empty());
  EXPECT_EQ(set_aside(path), path + ".damaged2");
  std::ofstream(manifest_path(path)) << "without its file";
  EXPECT_EQ(checkpoint_files(scratch.folder()).size(), 1U);
  EXPECT_TRUE(list_checkpoints(scratch.folder()).empty());
  EXPECT_EQ(set_aside(path), path + ".damaged3");
  EXPECT_EQ(files_in(scratch.folder()), 4U);
}

TEST(Checkpoint, SalvageAllowsDamagedMomentsAlone) {
  Communicator& world = test_world();
  const SharedFolder folder(world);
  const std::string path = folder.path("step_00000042.h5");
  save_checkpoint(world, path, sample(world.rank(), world.size(), Size::three_blocks).contents);
  const auto tensor = [&](const std::string& name) { return CheckpointReader::open(path).tensor(name); };
  const std::string moments = "optim/layers.0.attention.query.keys/m";
  const std::uint64_t in_moments = tensor(moments).offset + 7 * 40 + 3;
  const std::uint64_t in_digests = tensor(moments).digests_offset + 9 * 8;
  const std::uint64_t in_model = tensor("model/wide").offset + 100 * 2800;
  const auto open = [&] { return CheckpointReader::open(world, path, CheckpointReader::Salvage::moments); };
  const auto flip = [&](std::uint64_t at) {
    world.barrier();
    if (world.rank() == 0) flip_byte(path, at);
    world.barrier();
  };
  EXPECT_TRUE(open().damaged().empty());
  for (const std::uint64_t at : {in_moments, in_digests}) {
    flip(at);
    EXPECT_THROW(CheckpointReader::open(world, path), CheckpointError);
    const CheckpointReader reader = open();
    EXPECT_EQ(reader.damaged(), std::vector<std::string>{moments});
    EXPECT_NO_THROW(reader.verify_rows(world));
    std::vector<double> rows(13 * 5);
    EXPECT_THROW(reader.read_rows(moments, 0, 13, DType::f64, rows.data()), CheckpointError);
    // More than moments: a parameter, or what HDF5 keeps for itself in the block of the damaged row.
    flip(in_model);
    EXPECT_NE(error_of<CheckpointError>([&] { open(); }).find("model/wide row 100"), std::string::npos);
    flip(in_model);
    flip(20);
    EXPECT_NE(error_of<CheckpointError>([&] { open(); }).find("damaged outside the tensors' rows"), std::string::npos);
    flip(20);
    flip(at);
  }
  flip(20);
  EXPECT_NE(error_of<CheckpointError>([&] { open(); }).find("outside the tensors' rows"), std::string::npos);
}

TEST(Checkpoint, RowsThatChangedBeforeTheyWereWrittenAreFound) {
  Communicator& world = test_world();
  const SharedFolder folder(world);
  const std::string path = folder.path("step_00000042.h5");
  save_checkpoint(world, path, sample(world.rank(), world.size(), Size::tiny).contents);
  const CheckpointReader good = CheckpointReader::open(world, path);
  EXPECT_NO_THROW(good.verify_rows(world));
  world.barrier();
  if (world.rank() == 0) {
    flip_byte(path, good.tensor("model/tables").offset + 5 * 8);
    renew_manifest(path);  // as if the file had been made so
  }
  world.barrier();
  const CheckpointReader reader = CheckpointReader::open(world, path);
  EXPECT_NE(error_of<CheckpointError>([&] { reader.verify_rows(world); }).find("model/tables row 5 does not match"),
            std::string::npos);
}

TEST(Checkpoint, AThreadWritesACopyBesideChanges) {
  Communicator& world = test_world();
  const SharedFolder folder(world);
  const std::string path = folder.path("staged.h5");
  test::Sample mine = sample(world.rank(), world.size(), Size::three_blocks);
  CheckpointContents copy = mine.contents;
  Allocator allocator;
  Staging staging(allocator);
  staging.copy(copy.tensors);
  EXPECT_EQ(allocator.report().in_use[static_cast<std::size_t>(Purpose::staging)] / 8,
            (bytes_of_blocks(mine.contents.tensors) + 7) / 8);
  CheckpointWriter writer(world, path, copy);
  const auto change = [&] {
    for (std::vector<std::byte>& bytes : mine.memory) {
      for (std::byte& b : bytes) b ^= std::byte{0x55};
    }
  };
  std::future<void> thread = std::async(std::launch::async, [&] { writer.write_rows(copy.tensors); });
  change();
  thread.get();
  writer.seal();
  thread = std::async(std::launch::async, [&] { writer.digest_blocks(); });
  change();
  thread.get();
  writer.commit();
  const CheckpointReader reader = CheckpointReader::open(world, path);
  EXPECT_NO_THROW(reader.verify_rows(world));
  for (const CheckpointTensor& want : copy.tensors) expect_rows(reader, want, 0, want.shape.rows());
}

TEST(Checkpoint, H5pyReadsIt) {
  if (!test::has_h5py()) GTEST_SKIP() << "needs python3-h5py";
  Communicator& world = test_world();
  const SharedFolder folder(world);
  const std::string path = folder.path("step_00000042.h5");
  save_checkpoint(world, path, sample(world.rank(), world.size(), Size::three_blocks).contents);
  if (world.rank() != 0) return;
  test::python(R"(
import h5py, json, numpy as np, os, sys
f = h5py.File(sys.argv[1], 'r')
text = lambda v: v.decode() if isinstance(v, bytes) else v
assert f.attrs['format_version'] == 1 and text(f.attrs['model_kind']) == 'tokenformer'
assert f['config'][()].decode() == '[model]\nkind = "tokenformer"  # größe\n'
assert bytes(f['tokenizer'][:]) == b'\0\1\xfftok' and text(f['tokenizer'].attrs['kind']) == 'bytes'
state = f['state'].attrs
assert state['step'] == 42 and state['tokens'] == 1000 and state['seed'] == 0xfedcba9876543210
assert state['learning_rate'] == 3e-4 and list(state['counters']) == [1, 2, 3]
assert json.loads(state['sampler']) == {'epoch': 1}

def row(path, r, columns):
    return 0.25 * r - 3.0 * (np.arange(columns) % 97) + len(path)
keys = f['model/layers.0.attention.query.keys']
assert keys.dtype == '<f4' and keys.shape == (13, 5) and keys.attrs['scale'] == 4.0
assert list(keys.attrs['age_segments']) == [0, 42, 8, 22]
for path in ['model/layers.0.attention.query.keys', 'optim/layers.0.attention.query.keys/m', 'model/wide']:
    d = f[path]
    want = np.stack([row(path, r, d.shape[1]) for r in range(d.shape[0])]).astype(d.dtype)
    assert (d[:] == want).all(), path
    assert d.chunks is None and d.compression is None
    assert f['integrity/rows'][path].shape == (d.shape[0],)
assert f['model/wide'].id.get_offset() % 4096 == 0
assert (f['model/norm.weight'][:] == row('model/norm.weight', 0, 6)).all()
tables = (f['model/tables'][:].astype('u4') << 16).view('f4').reshape(6, 4)
assert abs(tables - np.stack([row('model/tables', r, 4) for r in range(6)])).max() < 0.1

history = f['growth/history']
assert list(history) == ['000000', '000001']
first, second = history['000000'].attrs, history['000001'].attrs
assert text(first['rule']) == 'zero-key' and first['tokens_before'] == 16 and first['tokens_after'] == 32
assert text(second['layer_group']) == 'qkv' and second['stage'] == 2 and second['noise'] == 0.5
assert second['probe_error'] == 1e-15 and text(second['layout']) == '1x2 append'

manifest = json.load(open(sys.argv[1] + '.manifest'))
assert manifest['file'] == 'step_00000042.h5' and manifest['step'] == 42
assert manifest['bytes'] == os.path.getsize(sys.argv[1]) and len(manifest['blocks']) == 3
assert manifest['uuid'] == text(f.attrs['uuid'])
offsets = {t[0]: t[1] for t in manifest['tensors']}
assert offsets['model/wide'] == f['model/wide'].id.get_offset()
)",
               path);
}

}  // namespace
}  // namespace tforge
