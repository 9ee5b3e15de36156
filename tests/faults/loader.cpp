// Says from which state tf_train would go on. It goes the way that tf_train goes: the same functions in the same order,
// up to the first step.
//
//   faults_loader CONFIG < questions
//
// A question is a line: run.dir, run.resume and nothing or "salvage", separated by tabs. So are the parts of an answer:
//
//   state STEP DIGEST PARAMETERS SALVAGED [what was said of a newer checkpoint...]
//   new                                     a model from scratch
//   refused CODE TEXT
//
// DIGEST is of everything that the trainer holds, PARAMETERS of the parameters alone.
#include <cstdio>
#include <iostream>
#include <sstream>

#include "checkpoint/agreement.h"
#include "core/log.h"
#include "jobs/job.h"
#include "kernels/gemm.h"
#include "storage/digest.h"
#include "train/start.h"

using namespace tforge;

namespace {

std::string text_of(const AttributeValue& value) {
  return std::visit(
      [](const auto& v) {
        if constexpr (requires { v.begin(); } && !std::is_same_v<std::decay_t<decltype(v)>, std::string>) {
          std::string text;
          for (const auto& x : v) text += fmt::format("{},", x);
          return text;
        } else {
          return fmt::format("{}", v);
        }
      },
      value);
}

std::uint64_t digest_of(const std::string& text) { return digest64(text.data(), text.size()); }

/// Of the rows that this rank would write into a checkpoint; the sum over ranks does not depend on the layout.
std::uint64_t digest_of_rows(const CheckpointContents& contents, std::string_view prefix) {
  std::uint64_t sum = 0;
  for (const CheckpointTensor& tensor : contents.tensors) {
    if (!tensor.path.starts_with(prefix)) continue;
    const auto row_bytes =
        static_cast<std::size_t>(tensor.shape.elements() / tensor.shape.rows()) * size_of(tensor.dtype);
    for (const RowBlock& block : tensor.blocks) {
      const auto* bytes = static_cast<const std::byte*>(block.data);
      for (std::int64_t r = 0; r < block.rows; ++r) {
        const std::uint64_t row = digest64(bytes + static_cast<std::size_t>(r) * row_bytes, row_bytes);
        sum += digest_of(fmt::format("{} {} {:x}", tensor.path, block.first_row + r, row));
      }
    }
  }
  return sum;
}

/// Of everything else, which all ranks hold, but for what the layout decides.
std::uint64_t digest_of_state(const CheckpointContents& contents) {
  std::uint64_t sum = digest_of(contents.tokenizer.fingerprint + contents.tokenizer.bytes);
  for (const CheckpointTensor& tensor : contents.tensors) {
    for (const auto& [name, value] : tensor.attributes) {
      if (name != "shard_borders") sum += digest_of(fmt::format("{} {} {}", tensor.path, name, text_of(value)));
    }
  }
  for (const auto& [name, value] : contents.state) {
    if (name != "layout") sum += digest_of(fmt::format("state {} {}", name, text_of(value)));
  }
  for (const GrowthRecord& record : contents.growth_history) {
    sum += digest_of(fmt::format("{} {} {} {} {}", record.stage, record.step, record.layer_group, record.tokens_after,
                                 record.parent_digest));
  }
  return sum;
}

std::string sum_over_ranks(Communicator& world, std::uint64_t mine, std::uint64_t of_all) {
  for (const std::string& part : world.all_gather_bytes(std::to_string(mine))) of_all += std::stoull(part);
  return hex(of_all);
}

std::string answer(Communicator& world, const RunRequest& request) {
  try {
    const TokenDataset dataset(request.asked.config.data.path);
    if (world.rank() == 0) recover_folder(request.asked.config.run.dir);
    Start start = prepare_start(world, request, dataset);
    together(world, [&] {
      if (world.rank() == 0) prepare_folder(start);
      return std::string();
    });
    std::string text = "new";
    if (start.reader) {
      Mesh mesh =
          Mesh::create(world, static_cast<int>(start.config.parallel.dp), static_cast<int>(start.config.parallel.tp));
      Allocator allocator;
      Stream stream;
      const std::unique_ptr<Trainer> trainer = make_trainer(start, dataset, mesh, allocator, stream);
      const CheckpointContents contents = trainer->contents(Retention::rolling);
      text = fmt::format("state\t{}\t{}\t{}\t{}", contents.step,
                         sum_over_ranks(world, digest_of_rows(contents, ""), digest_of_state(contents)),
                         sum_over_ranks(world, digest_of_rows(contents, "model/"), 0), trainer->state().salvaged);
      for (const DamagedCheckpoint& damaged : start.damaged) text += "\t" + damaged.what;
    }
    return text;
  } catch (const Error& error) {
    return fmt::format("refused\t{}\t{}", static_cast<int>(error.code()), error.what());
  } catch (const std::exception& error) {
    return fmt::format("refused\t{}\t{}", static_cast<int>(ExitCode::internal), error.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::string config_path;
  const JobInfo info{.name = "faults_loader",
                     .description = "Says from which state tf_train would go on in each folder.",
                     .options = {{"config", "FILE", &config_path, "configuration", Need::required}},
                     .positional = "config",
                     .examples = {},
                     .world_options = {}};
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    log::set_level(log::Level::error);
    RunRequest request;
    request.asked = load_config(config_path, {});
    request.asked.config.run.max_restarts = 0;  // a question is no crash
    kernels::start_cpu_runtime(1);
    while (true) {
      // Rank 0 reads for all.
      std::istringstream question(together(world, [&] {
        std::string line;
        return world.rank() == 0 && std::getline(std::cin, line) ? line : std::string();
      })[0]);
      std::string salvage;
      RunSettings& run = request.asked.config.run;
      std::getline(question, run.dir, '\t');
      std::getline(question, run.resume, '\t');
      std::getline(question, salvage);
      if (run.dir.empty()) return ExitCode::done;
      request.salvage = salvage.empty() ? CheckpointReader::Salvage::nothing : CheckpointReader::Salvage::moments;
      const std::string text = answer(world, request);
      if (world.rank() == 0) {
        std::puts(text.c_str());
        std::fflush(stdout);
      }
    }
  });
}
