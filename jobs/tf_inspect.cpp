// Prints a checkpoint, verifies it, or compares our model with a published file.
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "checkpoint/folder.h"
#include "checkpoint/reader.h"
#include "core/printable.h"
#include "data/token_dataset.h"
#include "jobs/job.h"
#include "kernels/gemm.h"
#include "model/accounting.h"
#include "train/compare.h"
#include "train/run_state.h"
#include "train/threads.h"

using namespace tforge;

namespace {

std::string text_of(const AttributeValue& value) {
  return std::visit(
      [](const auto& v) {
        if constexpr (requires { v.begin(); } && !std::is_same_v<std::decay_t<decltype(v)>, std::string>) {
          std::string text = "[";
          for (const auto& x : v) text += (text.size() > 1 ? ", " : "") + fmt::format("{}", x);
          return text + "]";
        } else {
          return fmt::format("{}", v);
        }
      },
      value);
}

/// The worst error of a group of tensors, one line each, the worst of all last. True when all are within `tolerance`.
bool print_comparison(const std::vector<TensorError>& errors, double tolerance) {
  struct Group {
    std::string name;
    std::size_t tensors = 0;
    const TensorError* worst = nullptr;
  };
  std::vector<Group> groups;
  for (const TensorError& e : errors) {
    // "hidden/0" -> hidden; "grads/sequential.2.attention.query.key_param_tokens" -> grads attention.query
    std::string name = e.name.substr(0, e.name.find('/'));
    for (const char* part :
         {"attention.query", "attention.key", "attention.value", "attention.proj", "mlp", "norm", "word_embeddings"}) {
      if (e.name.find(std::string(".") + part + ".") != std::string::npos) name += std::string(" ") + part;
    }
    auto found = std::ranges::find(groups, name, &Group::name);
    if (found == groups.end()) found = groups.insert(groups.end(), Group{name});
    ++found->tensors;
    if (found->worst == nullptr || e.error > found->worst->error) found->worst = &e;
  }
  const TensorError* worst = groups[0].worst;
  for (const Group& group : groups) {
    std::printf("%-24s %3zu tensors  worst %.3e\n", group.name.c_str(), group.tensors, group.worst->error);
    if (group.worst->error > worst->error) worst = group.worst;
  }
  const bool close = worst->error <= tolerance;
  std::printf("worst: %s %.3e, %s the tolerance %.1e\n", worst->name.c_str(), worst->error, close ? "within" : "over",
              tolerance);
  return close;
}

void print_checkpoint(const CheckpointReader& reader) {
  const CheckpointInfo& info = reader.info();
  std::printf("file        %s (%.1f MB, format %lld)\n", reader.path().c_str(),
              static_cast<double>(info.file_bytes) / 1e6, static_cast<long long>(info.format));
  std::printf("uuid        %s\nparent      %s\ncreated     %s\nby          %s\n", info.uuid.c_str(),
              info.parent_uuid.empty() ? "none" : info.parent_uuid.c_str(), info.created.c_str(),
              info.code_version.c_str());
  std::printf("model       %s, step %lld%s\n", info.model_kind.c_str(), static_cast<long long>(info.step),
              info.retention == Retention::stage_end ? ", end of a stage" : "");
  std::printf("tokenizer   %s, fingerprint %s\n", reader.tokenizer().kind.c_str(),
              reader.tokenizer().fingerprint.c_str());
  for (const auto& [name, value] : reader.state())
    std::printf("state       %s = %s\n", name.c_str(), text_of(value).c_str());

  const RunConfig config = stored_config(reader);
  std::printf("parameters  %lld\n", static_cast<long long>(config.model.parameters()));
  std::printf("FLOPs/token %.4g forward at length %lld\n", config.model.forward_flops_per_token(config.seq()),
              static_cast<long long>(config.seq()));
  std::printf("\n%s", accounting_text(config.model, config.seq()).c_str());
  std::printf("\ntensors\n");
  for (const CheckpointReader::Tensor& tensor : reader.tensors()) {
    if (tensor.path.starts_with("optim/")) continue;
    const auto scale = tensor.attributes.find("scale");
    std::printf("  %-44s %s %-14s%s\n", tensor.path.c_str() + (tensor.path.starts_with("model/") ? 6 : 0),
                std::string(name_of(tensor.dtype)).c_str(), tensor.shape.text().c_str(),
                scale == tensor.attributes.end() ? "" : fmt::format(" scale {}", text_of(scale->second)).c_str());
  }
  std::printf("\ngrowth history%s\n", reader.growth_history().empty() ? ": none" : "");
  for (const GrowthRecord& r : reader.growth_history()) {
    std::printf(
        "  stage %lld at step %lld (%lld tokens): %-5s %lld -> %lld, rule %s, seed %llu, scale %.6g -> %.6g, "
        "probe change %.3g, parent %s, %s\n",
        static_cast<long long>(r.stage), static_cast<long long>(r.step), static_cast<long long>(r.tokens),
        r.layer_group.c_str(), static_cast<long long>(r.tokens_before), static_cast<long long>(r.tokens_after),
        r.rule.c_str(), static_cast<unsigned long long>(r.seed), r.scale_before, r.scale_after, r.probe_error,
        r.parent_uuid.c_str(), r.created.c_str());
  }
}

void print_config(const CheckpointReader& reader) {
  std::istringstream lines(reader.config());
  for (std::string line; std::getline(lines, line);) std::puts(printable(line).c_str());
}

/// What print_checkpoint() says for programs, without the tensors.
void print_json(const CheckpointReader& reader) {
  using nlohmann::ordered_json;
  const CheckpointInfo& info = reader.info();
  ordered_json state = ordered_json::object(), history = ordered_json::array();
  for (const auto& [name, value] : reader.state()) {
    std::visit([&, &key = name](const auto& v) { state[key] = v; }, value);
  }
  for (const GrowthRecord& r : reader.growth_history()) {
    history.push_back({{"stage", r.stage},
                       {"step", r.step},
                       {"tokens", r.tokens},
                       {"layer_group", r.layer_group},
                       {"tokens_before", r.tokens_before},
                       {"tokens_after", r.tokens_after},
                       {"rule", r.rule},
                       {"seed", r.seed},
                       {"probe_error", r.probe_error},
                       {"parent_uuid", r.parent_uuid},
                       {"created", r.created}});
  }
  const RunConfig config = stored_config(reader);
  const ordered_json json = {{"file", reader.path()},
                             {"bytes", info.file_bytes},
                             {"format", info.format},
                             {"uuid", info.uuid},
                             {"parent_uuid", info.parent_uuid},
                             {"created", info.created},
                             {"code_version", info.code_version},
                             {"model_kind", info.model_kind},
                             {"step", info.step},
                             {"retention", name_of(info.retention)},
                             {"parameters", config.model.parameters()},
                             {"state", state},
                             {"growth_history", history}};
  std::puts(json.dump(2).c_str());
}

/// One line: whole or damaged, every byte and every row having been compared with its digest.
ExitCode print_state(Communicator& world, const std::string& path) {
  std::string line;
  ExitCode code = ExitCode::done;
  try {
    const CheckpointReader reader = CheckpointReader::open(world, path);
    reader.verify_rows(world);
    line = fmt::format("whole    {}  step {}", path, reader.info().step);
  } catch (const CheckpointError& e) {
    line = fmt::format("damaged  {}", printable(e.what()));
    code = ExitCode::damaged;
  }
  if (world.rank() == 0) std::puts(line.c_str());
  return code;
}

ExitCode verify_folder(Communicator& world, const std::string& folder) {
  const std::vector<CheckpointFile> files = checkpoint_files(folder);
  if (files.empty()) throw DataError("{} holds no checkpoint", folder);
  ExitCode worst = ExitCode::done;
  bool lost = false;
  for (const CheckpointFile& file : files) {
    std::error_code ignored;
    // A manifest alone, older than a whole checkpoint, is what a removal left that was cut short: named, but no damage.
    if (print_state(world, file.path) == ExitCode::done) lost = false;
    else if (!std::filesystem::exists(file.path, ignored)) lost = true;
    else worst = ExitCode::damaged;
  }
  return lost ? ExitCode::damaged : worst;
}

}  // namespace

int main(int argc, char** argv) {
  std::string path;
  std::optional<std::string> compare;
  std::optional<double> tolerance;
  std::string dtype = "f64";
  std::int64_t tp = 0, threads = 0;
  bool config = false, json = false, verify = false;
  std::optional<std::string> dataset;
  const JobInfo info{
      .name = "tf_inspect",
      .description =
          "Prints what a checkpoint holds: identity, configuration, tensors, growth history. Opening it checks every "
          "byte against its digests; a damaged one ends with exit code 4. With --compare it runs a published file of "
          "tensors through the model instead and prints one line a tensor group, the worst last; exit code 5 when "
          "that is over the tolerance.",
      .options = {{"checkpoint", "FILE", &path, "checkpoint, or a folder of checkpoints, each of which is verified"},
                  {"verify", "", &verify, "only says whether the checkpoint is whole, and what is damaged"},
                  {"dataset", "FILE", &dataset, "reads all of a token dataset and compares it with its fingerprint"},
                  {"config", "", &config, "prints the stored configuration alone"},
                  {"json", "", &json, "prints identity, state and growth history as JSON"},
                  {"compare", "FILE", &compare, "published file (HDF5: weights, hidden, logits, loss, grads)"},
                  {"tolerance", "X", &tolerance, "bound of --compare; default 1e-6 in f64, 2e-5 in f32"},
                  {"dtype", "TYPE", &dtype, "f64 or f32, for --compare"},
                  {"tp", "N", &tp, "ranks that share the model in --compare; 0: all"},
                  {"threads", "N", &threads, "OpenMP threads a rank; 0: cores / ranks on the node"}},
      .positional = "checkpoint",
      .examples = {"tf_inspect run/step_00000400.h5", "tf_inspect --verify run",
                   "mpirun -n 4 tf_inspect --verify run/step_00000400.h5",
                   "tf_inspect --compare tokenformer_softmax.h5",
                   "mpirun -n 3 tf_inspect --compare tokenformer_softmax.h5 --dtype f32"},
      .world_options = {},
  };
  return run_mpi_job(argc, argv, info, [&](Communicator& world) {
    kernels::start_cpu_runtime(threads_per_rank(world, threads));
    if (compare) {
      const DType type = dtype_from_name(dtype);
      if (type != DType::f32 && type != DType::f64) throw UsageError("--dtype {}: want f64 or f32", dtype);
      Mesh mesh = tp == 0 ? Mesh::create(world, 1, 0) : Mesh::create(world, 0, static_cast<int>(tp));
      Workplace place(world, Device::cpu);
      const std::vector<TensorError> errors = compare_with_published(*compare, type, mesh, place);
      const double bound = tolerance.value_or(type == DType::f64 ? 1e-6 : 2e-5);
      const bool close = std::ranges::all_of(errors, [&](const TensorError& e) { return e.error <= bound; });
      if (world.rank() == 0) print_comparison(errors, bound);
      return close ? ExitCode::done : ExitCode::differs;
    }
    if (dataset) {
      const TokenDataset tokens(*dataset);
      tokens.verify();
      if (world.rank() == 0)
        std::printf("whole    %s  fingerprint %s\n", dataset->c_str(), tokens.fingerprint().c_str());
      return ExitCode::done;
    }
    if (path.empty()) throw UsageError("name a checkpoint, a folder of checkpoints, --dataset FILE, or --compare FILE");
    if (std::filesystem::is_directory(path)) return verify_folder(world, path);
    if (verify) return print_state(world, path);
    const CheckpointReader reader = CheckpointReader::open(world, path);
    if (world.rank() != 0) return ExitCode::done;
    if (config) print_config(reader);
    else if (json) print_json(reader);
    else print_checkpoint(reader);
    return ExitCode::done;
  });
}
