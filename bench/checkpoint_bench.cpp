// Saving and restoring a checkpoint of a given size, beside plain writes and reads of as many bytes in the same folder.
// Prints one JSON line a round; times are the slowest rank's, in seconds. scripts/bench_checkpoint.sh makes tables of
// them.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/reader.h"
#include "checkpoint/staging.h"
#include "checkpoint/writer.h"
#include "core/rng.h"
#include "jobs/job.h"
#include "storage/atomic_file.h"

using namespace tforge;

namespace {

constexpr std::int64_t kColumns = 768;
constexpr std::int64_t kTensors = 48;
constexpr std::size_t kPiece = 4U << 20;

/// Seconds of the slowest rank.
double timed(Communicator& world, const std::function<void()>& work) {
  world.barrier();
  const auto begin = std::chrono::steady_clock::now();
  work();
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  Stream stream;
  world.all_reduce(stream, TensorView{&seconds, DType::f64, Device::cpu, Shape{1}, 1}, ReduceOp::max);
  return seconds;
}

/// What this rank holds: its rows of tensors that together are `bytes` over all ranks.
struct Model {
  Model(const Communicator& world, std::int64_t bytes) {
    const std::int64_t rows = std::max<std::int64_t>(bytes / (kTensors * kColumns * 4), world.size());
    const std::int64_t first = rows * world.rank() / world.size();
    const std::int64_t mine = rows * (world.rank() + 1) / world.size() - first;
    const auto elements = static_cast<std::size_t>(mine * kColumns);
    contents.model_kind = "tokenformer";
    contents.tokenizer = {"bytes", "0", ""};
    for (std::int64_t t = 0; t < kTensors; ++t) {
      const Rng rng(static_cast<std::uint64_t>(t), "bench");
      std::vector<float>& values = memory.emplace_back(elements);
      for (std::size_t i = 0; i < elements; ++i) values[i] = static_cast<float>(rng.bits(i) >> 8);
      contents.tensors.push_back({fmt::format("model/layers.{}", t),
                                  DType::f32,
                                  Shape{rows, kColumns},
                                  {{first, mine, values.data()}},
                                  {{"scale", 1.0}}});
    }
  }
  CheckpointContents contents;
  std::vector<std::vector<float>> memory;
};

/// Lets the system forget what it has of a file in memory.
void forget(const std::string& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  ::posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
  ::close(descriptor);
}

/// As many bytes as the tensors have, each rank its share, synced.
double plain_write(Communicator& world, const Model& model, const std::string& path) {
  return timed(world, [&] {
    if (world.rank() == 0) ::close(::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    world.barrier();
    const PlainFile file(path, PlainFile::Access::write);
    const std::uint64_t mine = bytes_of_blocks(model.contents.tensors);
    std::uint64_t at = mine * static_cast<std::uint64_t>(world.rank());
    for (const std::vector<float>& values : model.memory) {
      const std::size_t bytes = values.size() * sizeof(float);
      for (std::size_t done = 0; done < bytes; done += kPiece) {
        file.write_at(at + done, reinterpret_cast<const char*>(values.data()) + done, std::min(kPiece, bytes - done));
      }
      at += bytes;
    }
    file.sync();
  });
}

double plain_read(Communicator& world, const std::string& path) {
  return timed(world, [&] {
    const PlainFile file(path, PlainFile::Access::read);
    const auto ranks = static_cast<std::uint64_t>(world.size()), rank = static_cast<std::uint64_t>(world.rank());
    const std::uint64_t begin = file.size() * rank / ranks, end = file.size() * (rank + 1) / ranks;
    std::vector<char> piece(kPiece);
    for (std::uint64_t at = begin; at < end; at += kPiece) {
      file.read_at(at, piece.data(), std::min<std::uint64_t>(kPiece, end - at));
    }
  });
}

/// What tf_train does at its start: verify all, verify the rows, read one's own.
double restore(Communicator& world, Model& model, const std::string& path) {
  return timed(world, [&] {
    const CheckpointReader reader = CheckpointReader::open(world, path);
    reader.verify_rows(world);
    for (std::size_t t = 0; t < model.memory.size(); ++t) {
      const CheckpointTensor& tensor = model.contents.tensors[t];
      reader.read_rows(tensor.path, tensor.blocks[0].first_row, tensor.blocks[0].rows, DType::f32,
                       model.memory[t].data());
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  std::string folder;
  std::int64_t megabytes = 256, rounds = 3;
  const JobInfo info{
      .name = "checkpoint_bench",
      .description = "Times saving and restoring a checkpoint, beside plain writes and reads of as many bytes.",
      .options = {{"folder", "DIR", &folder, "where to write", Need::required},
                  {"megabytes", "N", &megabytes, "size of the tensors over all ranks"},
                  {"rounds", "N", &rounds, "how often"}},
      .examples = {"mpirun -n 2 checkpoint_bench --folder /tmp --megabytes 1024"},
      .world_options = {},
  };
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    Model model(world, megabytes * 1000000);
    const std::string path = folder + "/checkpoint_bench.h5", plain = folder + "/checkpoint_bench.plain";
    const std::string manifest = manifest_path(path);
    Allocator allocator;
    Staging staging(allocator);
    staging.reserve(model.contents.tensors);
    for (std::int64_t round = 0; round < rounds; ++round) {
      nlohmann::ordered_json line = {{"ranks", world.size()}, {"megabytes", megabytes}, {"round", round}};
      line["plain_write"] = plain_write(world, model, plain);
      line["save"] = timed(world, [&] { save_checkpoint(world, path, model.contents, OnExisting::replace); });
      // The same in parts: what training waits for, and what a thread does beside it.
      CheckpointContents copy = model.contents;
      std::optional<CheckpointWriter> writer;
      line["copy"] = timed(world, [&] { staging.copy(copy.tensors); });
      line["layout"] = timed(world, [&] { writer.emplace(world, path, copy, OnExisting::replace); });
      line["rows"] = timed(world, [&] { writer->write_rows(copy.tensors); });
      line["seal"] = timed(world, [&] { writer->seal(); });
      line["digests"] = timed(world, [&] { writer->digest_blocks(); });
      line["commit"] = timed(world, [&] { writer->commit(); });
      writer.reset();
      line["plain_read"] = plain_read(world, path);
      line["restore"] = restore(world, model, path);
      if (world.rank() == 0) forget(path), forget(plain);
      line["plain_read_cold"] = plain_read(world, plain);
      line["restore_cold"] = restore(world, model, path);
      if (world.rank() == 0) {
        std::puts(line.dump().c_str());
        std::fflush(stdout);
        for (const std::string& done : {path, manifest, plain}) ::unlink(done.c_str());
      }
      world.barrier();
    }
    return ExitCode::done;
  });
}
