// Measures the profile of a device that tf_plan predicts with: steps of small models, every kernel timed, and for each
// kernel the three costs that fit what was measured (train/device_profile.h).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <map>

#include "core/errors.h"
#include "core/log.h"
#include "jobs/job.h"
#include "kernels/device_libraries.h"
#include "kernels/gemm.h"
#include "profile_table.h"
#include "train/device_profile.h"
#include "train/lone_rank.h"
#include "train/trainer.h"
#include "train/workplace.h"

using namespace tforge;

namespace {

struct Case {
  const char* kind;
  std::vector<const char*> set;
};

/// One or two blocks each: widths from 96 to 1024, heads of 32 to 128, sequences of 96 to 1024, tables that fit into
/// the caches and others that do not, every kind of model and of attention, and a share of two tensor-parallel ranks.
const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      {"tokenformer",
       {"model.dim=96", "model.heads=3", "model.tokens.query=96", "model.tokens.key=96", "model.tokens.value=96",
        "model.tokens.proj=96", "model.tokens.ffn=384", "model.vocab=512", "model.max_seq=128", "train.batch=32"}},
      {"tokenformer",
       {"model.dim=192", "model.heads=6", "model.tokens.query=192", "model.tokens.key=192", "model.tokens.value=192",
        "model.tokens.proj=192", "model.tokens.ffn=768", "model.vocab=2048", "model.max_seq=512", "train.batch=4"}},
      {"tokenformer",
       {"model.dim=384", "model.heads=6", "model.tokens.query=384", "model.tokens.key=384", "model.tokens.value=384",
        "model.tokens.proj=384", "model.tokens.ffn=1536", "model.vocab=8192", "model.max_seq=256", "train.batch=4"}},
      {"tokenformer",
       {"model.dim=1024", "model.heads=16", "model.tokens.query=512", "model.tokens.key=512", "model.tokens.value=512",
        "model.tokens.proj=512", "model.tokens.ffn=4096", "model.vocab=32000", "model.max_seq=512", "train.batch=1",
        "model.layers=1"}},
      {"tokenformer",
       {"model.dim=256", "model.heads=4", "model.tokens.query=128", "model.tokens.key=128", "model.tokens.value=128",
        "model.tokens.proj=128", "model.tokens.ffn=512", "model.vocab=16000", "model.max_seq=1024", "train.batch=1",
        "train.recompute=scores", "train.saved_dtype=bf16"}},
      {"tokenformer",
       {"model.dim=320", "model.heads=5", "model.vocab=4000", "model.max_seq=256", "train.batch=4", "parallel.tp=2"}},
      {"tokenformer",
       {"model.dim=512", "model.heads=4", "model.tokens.ffn=2048", "model.vocab=4000", "model.max_seq=384",
        "train.batch=2", "model.norm=softmax"}},
      {"tokenformer",
       {"model.dim=192", "model.heads=3", "model.vocab=4000", "model.max_seq=256", "train.batch=4",
        "model.norm=gelu_l2_norm", "parallel.tp=2"}},
      {"transformer", {"model.dim=96", "model.heads=3", "model.vocab=512", "model.max_seq=128", "train.batch=32"}},
      {"transformer", {"model.dim=384", "model.heads=6", "model.vocab=8192", "model.max_seq=256", "train.batch=4"}},
      {"transformer",
       {"model.dim=1024", "model.heads=16", "model.vocab=32000", "model.max_seq=512", "train.batch=1",
        "model.layers=1"}},
      {"transformer", {"model.dim=640", "model.heads=10", "model.vocab=48000", "model.max_seq=96", "train.batch=2"}},
      {"transformer",
       {"model.dim=256", "model.heads=4", "model.vocab=4000", "model.max_seq=512", "train.batch=2", "parallel.tp=2"}},
      {"transformer",
       {"model.dim=256", "model.heads=4", "model.vocab=2000", "model.max_seq=512", "train.batch=2",
        "model.attention.kind=linformer"}},
      {"transformer",
       {"model.dim=256", "model.heads=4", "model.vocab=2000", "model.max_seq=512", "train.batch=2",
        "model.attention.kind=performer"}},
      {"transformer",
       {"model.dim=256", "model.heads=4", "model.vocab=2000", "model.max_seq=512", "train.batch=2",
        "model.attention.kind=cosformer", "model.rotary_fraction=0"}},
      {"memoryformer",
       {"model.dim=128", "model.heads=4", "model.hash_bits.attention=4", "model.hash_bits.ffn_in=4",
        "model.hash_bits.ffn_out=6", "model.vocab=512", "model.max_seq=256", "train.batch=16"}},
      {"memoryformer",
       {"model.dim=192", "model.heads=3", "model.hash_bits.attention=8", "model.hash_bits.ffn_in=8",
        "model.hash_bits.ffn_out=8", "model.vocab=8000", "model.max_seq=256", "train.batch=6"}},
      {"memoryformer",
       {"model.dim=384", "model.heads=6", "model.hash_bits.attention=8", "model.hash_bits.ffn_in=8",
        "model.hash_bits.ffn_out=10", "model.vocab=2000", "model.max_seq=512", "train.batch=2"}},
  };
  return all;
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&now, &utc);
  return fmt::format("{:04}-{:02}-{:02}", utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday);
}

/// As /proc/cpuinfo calls the processor.
std::string processor() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

/// The middle one.
double median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

/// What was measured of a kernel in one case, a round each.
struct Rounds {
  std::int64_t calls = 0;
  Work work;
  std::vector<double> seconds;
};

/// A case over all rounds.
struct Measured {
  std::map<std::string, Rounds> kernels;
  std::vector<double> seconds;  // of the step
};

/// `settings` are those of all cases.
RunConfig configured(const Case& from, const std::vector<std::string>& settings) {
  std::vector<std::string> set = {"model.layers=2"};
  for (const char* setting : from.set) set.emplace_back(setting);
  set.insert(set.end(), settings.begin(), settings.end());
  RunConfig config = parse_config(fmt::format("[model]\nkind = \"{}\"\n[data]\npath = \"random tokens\"\n"
                                              "[run]\ndir = \"none\"",
                                              from.kind),
                                  "device_bench", set)
                         .config;
  // What keeps a processor at work is little for a device.
  if (config.run.device != Device::cpu) config.train.batch *= 16;
  return config;
}

/// Calls f(seconds so far) until it returns false; the seconds of all calls.
template <class F>
double seconds_of(const F& f) {
  const auto begun = std::chrono::steady_clock::now();
  const auto so_far = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count(); };
  while (f(so_far())) {
  }
  return so_far();
}

void measure(const RunConfig& config, Measured& to) {
  const MeshPlace place{.tp = static_cast<int>(config.parallel.tp)};
  LoneRank rank(config, plan_shards(config, place.tp, nullptr), place, Execution::real);
  rank.step();
  Profile profile;
  rank.stream().set_profile(&profile);
  // A step after another, until there is something to measure.
  constexpr double kEnough = 0.2;
  int steps = 0;
  double seconds = seconds_of([&](double so_far) {
    if (steps >= 2 && so_far >= kEnough) return false;
    rank.step();
    return ++steps > 0;
  });
  rank.stream().set_profile(nullptr);
  // To time its kernels, a device is waited for behind each.
  if (config.run.device != Device::cpu) {
    int left = steps;
    seconds = seconds_of([&](double) {
      rank.step();
      wait(rank.stream());
      return --left > 0;
    });
  }
  std::int64_t calls = 0;
  double known = 0;
  const auto add = [&](const std::string& name, std::int64_t count, const Work& work, double taken) {
    Rounds& rounds = to.kernels[name];
    rounds.calls = count / steps;
    rounds.work = {work.flops / steps, work.bytes / steps};
    rounds.seconds.push_back(taken / steps);
  };
  for (const Profile::Entry& entry : profile.entries()) {
    add(std::string(entry.name), entry.calls, entry.work, entry.seconds);
    calls += entry.calls;
    known += entry.seconds;
  }
  add(kBetweenKernels, calls, {}, std::max(0.0, seconds - known));
  to.seconds.push_back(seconds / steps);
}

}  // namespace

int main(int argc, char** argv) {
  std::int64_t threads = 2, rounds = 3;
  std::optional<std::string> path, name;
  std::vector<std::string> set;
  bool table = false;
  const JobInfo info{
      .name = "device_bench",
      .description =
          "Measures what tf_plan predicts with: steps of small models in rounds, every kernel timed; for each kernel "
          "the "
          "costs of a call, a FLOP and a byte that fit. Takes a minute; nothing else should run.",
      .options = {{"threads", "N", &threads, "OpenMP threads, those of a rank of the runs to be planned"},
                  {"rounds", "N", &rounds, "rounds over all models, of which the median counts"},
                  {"set", "KEY=VALUE", &set, "run.device, train.dtype or train.tf32, as for tf_train; may be repeated"},
                  {"name", "TEXT", &name, "of the device; left out: of the processor"},
                  {"write-profile", "FILE", &path, "where the profile (TOML) goes; left out: standard output"},
                  {"table", "", &table, "also prints each model's step as it was measured and as the fit has it"}},
      .examples = {"device_bench --threads 2 --write-profile cpu.toml",
                   "device_bench --set run.device=cuda --set train.dtype=bf16 --write-profile gpu.toml"}};
  return run_job(argc, argv, info, [&] {
    if (threads < 1 || rounds < 1) throw UsageError("--threads {} --rounds {}: want 1 or more", threads, rounds);
    kernels::start_cpu_runtime(static_cast<int>(threads));
    std::vector<RunConfig> configs;
    for (const Case& c : cases()) {
      // Some kinds of model have not every dtype.
      try {
        configs.push_back(configured(c, set));
      } catch (const ConfigError& error) {
        if (configs.empty()) throw;
        log::warning("left out: {}", error.what());
      }
    }
    const RunConfig& common = configs.front();
    const auto world = create_self();
    std::vector<Measured> measured(configs.size());
    std::vector<double> flops, bytes;
    std::string device;
    for (std::int64_t round = 0; round < rounds; ++round) {
      for (std::size_t i = 0; i < configs.size(); ++i) measure(configs[i], measured[i]);
      Workplace place(*world, common);
      device = place.libraries().bits_depend_on();
      const bench::Ceilings ceilings = bench::measure_ceilings(place.stream(), place.memory(), common.train.dtype);
      flops.push_back(ceilings.flops_per_second);
      bytes.push_back(ceilings.bytes_per_second);
    }
    std::map<std::string, std::vector<KernelSample>> samples;
    for (const Measured& m : measured) {
      for (const auto& [kernel, r] : m.kernels) {
        samples[kernel].push_back({r.calls, r.work, median(r.seconds), median(m.seconds)});
      }
    }
    DeviceProfile profile;
    profile.name = name.value_or(common.run.device == Device::cpu ? processor() : device);
    profile.date = today();
    profile.device = common.run.device;
    profile.threads = threads;
    profile.dtype = common.train.dtype;
    profile.f32_products = common.train.f32_products;
    profile.flops_per_second = median(flops);
    profile.bytes_per_second = median(bytes);
    for (const auto& [kernel, of_kernel] : samples) profile.kernels[kernel] = fit(of_kernel);
    if (table) {
      for (std::size_t i = 0; i < cases().size(); ++i) {
        double predicted = 0;
        for (const auto& [kernel, r] : measured[i].kernels)
          predicted += profile.kernels[kernel].seconds(r.calls, r.work);
        const double seconds = median(measured[i].seconds);
        std::fprintf(stderr, "%2zu %-12s %8.2f ms, fit %8.2f (%+.1f %%)\n", i, configs[i].model.kind.c_str(),
                     seconds * 1e3, predicted * 1e3, 100 * (predicted / seconds - 1));
      }
    }
    const std::string text = to_toml(profile);
    if (!path) {
      std::fputs(text.c_str(), stdout);
      return ExitCode::done;
    }
    std::ofstream file(*path);
    file << text;
    file.close();
    if (!file) throw ResourceError("{}: cannot be written", *path);
    return ExitCode::done;
  });
}
