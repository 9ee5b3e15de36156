// The profile of a device, and what is predicted with it, by hand.
#include "train/device_profile.h"

#include <gtest/gtest.h>

#include <array>

#include "model/shard_plan.h"
#include "support/corpus.h"
#include "train/lone_rank.h"
#include "train/plan.h"

namespace tforge {
namespace {

using test::expect_error;

TEST(DeviceProfile, AFitFindsTheCostsThatSamplesFollow) {
  const KernelCost truth{2e-6, 5e-12, 3e-11};
  std::vector<KernelSample> samples;
  for (const auto& [calls, flops, bytes] :
       {std::tuple{4, 1e9, 2e7}, std::tuple{8, 4e9, 3e7}, std::tuple{100, 1e6, 1e8}, std::tuple{2, 9e9, 5e6}}) {
    const Work work{flops, bytes};
    samples.push_back({calls, work, truth.seconds(calls, work), 0.1});
  }
  const KernelCost cost = fit(samples);
  EXPECT_NEAR(cost.call, truth.call, 1e-9 * truth.call);
  EXPECT_NEAR(cost.flop, truth.flop, 1e-9 * truth.flop);
  EXPECT_NEAR(cost.byte, truth.byte, 1e-9 * truth.byte);
}

TEST(DeviceProfile, AFitHasNoCostBelowNothing) {
  // More bytes take less time here: bytes cost nothing, and the FLOPs all of it, in the least squares of one number.
  const std::array<KernelSample, 2> samples = {KernelSample{0, {1e9, 3e7}, 1.0, 2.0},
                                               KernelSample{0, {1e9, 1e7}, 2.0, 2.0}};
  const KernelCost cost = fit(samples);
  EXPECT_EQ(cost.call, 0);
  EXPECT_EQ(cost.byte, 0);
  EXPECT_NEAR(cost.flop, 1.5e-9, 1e-18);
}

TEST(DeviceProfile, AnErrorCountsByItsPartOfTheStep) {
  // Two measurements that contradict: a step in which the kernel is nearly all, and one in which it is nearly nothing.
  const std::array<KernelSample, 2> samples = {KernelSample{0, {1e9, 0}, 1.0, 1.0},
                                               KernelSample{0, {1e9, 0}, 2.0, 1000.0}};
  EXPECT_NEAR(fit(samples).flop, 1e-9, 1e-14);
}

DeviceProfile machine() {
  DeviceProfile profile;
  profile.name = "a \"machine\"";
  profile.date = "2026-11-22";
  profile.threads = 2;
  profile.flops_per_second = 100e9;
  profile.bytes_per_second = 10e9;
  profile.kernels = {{"gemm", {1e-6, 2e-11, 0}}, {"adamw_update", {0, 0, 2e-10}}, {kBetweenKernels, {1e-6, 0, 0}}};
  profile.link = Link{1e9, 1e-6};
  return profile;
}

TEST(DeviceProfile, IsWhatItsTextSays) {
  const DeviceProfile before = machine();
  const DeviceProfile after = parse_device_profile(to_toml(before), "machine.toml");
  EXPECT_EQ(after.name, before.name);
  EXPECT_EQ(after.date, before.date);
  EXPECT_EQ(after.threads, 2);
  EXPECT_EQ(after.device, Device::cpu);
  EXPECT_EQ(after.precision(), "f32");
  EXPECT_DOUBLE_EQ(after.flops_per_second, before.flops_per_second);
  EXPECT_DOUBLE_EQ(after.bytes_per_second, before.bytes_per_second);
  ASSERT_TRUE(after.link);
  EXPECT_DOUBLE_EQ(after.link->bytes_per_second, 1e9);
  EXPECT_DOUBLE_EQ(after.link->latency, 1e-6);
  ASSERT_EQ(after.kernels.size(), 3U);
  EXPECT_NEAR(after.kernels.at("gemm").flop, 2e-11, 1e-20);
  EXPECT_EQ(after.kernels.at("gemm").byte, 0);
  EXPECT_NEAR(after.kernels.at("gemm").call, 1e-6, 1e-15);
  EXPECT_NEAR(after.kernels.at("adamw_update").byte, 2e-10, 1e-19);
}

TEST(DeviceProfile, SaysOfWhatItIs) {
  DeviceProfile before = machine();
  before.device = Device::cuda;
  before.f32_products = F32Products::tf32;
  DeviceProfile after = parse_device_profile(to_toml(before), "machine.toml");
  EXPECT_EQ(after.device, Device::cuda);
  EXPECT_EQ(after.precision(), "tf32");
  EXPECT_EQ(after.dtype, DType::f32);
  before.f32_products = F32Products::exact;
  before.dtype = DType::bf16;
  after = parse_device_profile(to_toml(before), "machine.toml");
  EXPECT_EQ(after.precision(), "bf16");
  EXPECT_EQ(after.f32_products, F32Products::exact);
}

TEST(DeviceProfile, SaysWhereItIsWrong) {
  const std::string device = "[device]\nname = \"x\"\ndate = \"today\"\ngflops = 1\ngbytes = 1\n";
  const auto refused = [](const std::string& text, const std::string& why) {
    expect_error<ConfigError>([&] { parse_device_profile(text, "p.toml"); }, why);
  };
  EXPECT_EQ(parse_device_profile(device, "p.toml").threads, 1);
  refused("", "p.toml: there is no [device]");
  refused("[device\n", "p.toml:1:");
  refused(device + "gflop = 1\n", "p.toml: [device]: unknown key gflop; did you mean `gflops`?");
  refused("[device]\nname = \"x\"\ndate = \"d\"\ngbytes = 1\n", "p.toml: [device]: gflops is missing");
  refused(device + "threads = 0\n", "p.toml: [device]: threads = 0: want 1 or more");
  refused(device + "threads = 1.5\n", "p.toml: [device]: threads: want an integer");
  refused(device + "device = \"gpu\"\n", "p.toml: [device]: device = \"gpu\": there are cpu and cuda");
  refused(device + "dtype = \"f16\"\n", "p.toml: [device]: dtype: 'f16' is no element type");
  refused(device + "[kernels]\ngemm = 3\n", "p.toml: kernels.gemm: want a table");
  refused(device + "[kernels]\ngemm = {}\n", "p.toml: kernels.gemm: want at least one of");
  refused(device + "[kernels]\ngemm = { gflops = -1 }\n", "p.toml: kernels.gemm: gflops = -1: want more than 0");
  refused(device + "[kernels]\ngemm = { gflops = inf }\n", "p.toml: kernels.gemm: gflops = inf: want more than 0");
  refused(device + "[kernels]\ngemm = { gflops = \"1\" }\n", "p.toml: kernels.gemm: gflops: want a number");
  refused(device + "[link]\ngbytes = 1\n", "p.toml: [link]: latency_us is missing");
  refused(device + "[links]\n", "p.toml: unknown key links; did you mean `link`?");
}

/// 2 ranks of dp: a product, an update, and a kernel that the profile does not know.
StepPlan by_hand() {
  StepPlan plan;
  plan.mesh = {2, 1};
  plan.tokens = 1000;
  plan.kernels = {{"gemm", 3, 0, {2e9, 5e6}}, {"adamw_update", 5, 0, {7e6, 1e8}}, {"strange", 2, 0, {1e8, 3e7}}};
  plan.exchanges = {{"gradients", MeshAxis::dp, Collective::all_reduce, 1, 4'000'000, Timing::in_line}};
  return plan;
}

TEST(Plan, PredictsTheSumOfWhatThereIsToDo) {
  const DeviceProfile device = machine();
  const StepTime time = predict({}, by_hand(), device, device.link);
  const double gemm = 3 * 1e-6 + 2e9 * 2e-11, adamw = 1e8 * 2e-10, strange = 3e7 / 10e9;  // more than 1e8 / 100e9
  EXPECT_DOUBLE_EQ(time.kernels, gemm + adamw + strange);
  EXPECT_DOUBLE_EQ(time.between, 10 * 1e-6);
  EXPECT_DOUBLE_EQ(time.exposed, 2 * (1e-6 + 4e6 / 2 / 1e9));
  EXPECT_DOUBLE_EQ(time.total(), time.kernels + time.between + time.exposed);
  EXPECT_EQ(time.unknown, std::vector<std::string>{"strange"});
}

TEST(Plan, RefusesWhatAProfileIsNotOf) {
  const DeviceProfile device = machine();
  RunConfig config;
  expect_error<ConfigError>([&] { predict(config, by_hand(), device, {}); }, "2 ranks need a link");
  config.run.threads = 1;
  expect_error<ConfigError>([&] { predict(config, by_hand(), device, device.link); },
                            "run.threads = 1, and the profile");
  config = {};
  config.train.dtype = DType::f64;
  expect_error<ConfigError>([&] { predict(config, by_hand(), device, device.link); }, "train.dtype = \"f64\"");
  config = {};
  config.train.f32_products = F32Products::tf32;
  expect_error<ConfigError>([&] { predict(config, by_hand(), device, device.link); },
                            "train.tf32 = true, and the profile of a \"machine\" is of \"f32\"");
  config = {};
  config.run.device = Device::cuda;
  expect_error<ConfigError>([&] { predict(config, by_hand(), device, device.link); },
                            "run.device = \"cuda\", and the profile of a \"machine\" is of a \"cpu\"");
}

const Profile::Entry& kernel_of(const StepPlan& plan, std::string_view name) {
  const auto found = std::ranges::find(plan.kernels, name, &Profile::Entry::name);
  if (found == plan.kernels.end()) throw InternalError("no {} in the plan", name);
  return *found;
}

TEST(Plan, CountsTheWorkThatTheShapesSay) {
  RunConfig config;
  config.model.layers = 3;
  config.model.dim = 64;
  config.model.heads = 4;
  config.model.vocab = 500;
  config.model.max_seq = 32;
  config.model.tokens = {40, 48, 56, 64, 200};
  config.train.batch = 8;
  const double T = 4 * 32, d = 64, n = 40 + 48 + 56 + 64 + 200;  // of one of 2 ranks
  const StepPlan plan = plan_step(config, ShardPlan::even(config.model, 1), {2, 1});
  EXPECT_EQ(plan.tokens, 8 * 32);
  EXPECT_DOUBLE_EQ(plan.flops, config.model.train_flops_per_token(32) * 8 * 32);
  const Profile::Entry& forward = kernel_of(plan, "pattention_forward");
  EXPECT_EQ(forward.calls, 3 * 3);  // q, k and v together; proj; ffn
  EXPECT_DOUBLE_EQ(forward.work.flops, 3 * 2 * T * n * 2 * d);
  EXPECT_DOUBLE_EQ(kernel_of(plan, "pattention_backward").work.flops, 2 * forward.work.flops);
  EXPECT_DOUBLE_EQ(kernel_of(plan, "gemm").work.flops, 3 * 2 * T * 500 * d);
  const auto parameters = static_cast<double>(config.model.parameters());
  EXPECT_DOUBLE_EQ(kernel_of(plan, "adamw_update").work.bytes, 7 * 4 * parameters);  // reads 4, writes 3
  ASSERT_EQ(plan.memory.size(), 1U);
  EXPECT_GE(plan.memory[0].weights, 4 * parameters);  // and the rotary tables
  EXPECT_LT(plan.memory[0].weights, 4.1 * parameters);
  EXPECT_GE(plan.memory[0].moments, 8 * parameters);
  EXPECT_GE(volume_of(plan.exchanges, MeshAxis::dp).bytes, static_cast<std::int64_t>(4 * parameters));
}

}  // namespace
}  // namespace tforge
