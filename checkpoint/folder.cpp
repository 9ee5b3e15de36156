#include "checkpoint/folder.h"

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "checkpoint/manifest.h"
#include "core/errors.h"
#include "storage/atomic_file.h"

namespace tforge {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "step_";
constexpr std::string_view kSuffix = ".h5";
constexpr std::size_t kDigits = 8;

std::vector<std::string> names_in(const std::string& folder) {
  std::vector<std::string> names;
  std::error_code error;
  if (!fs::exists(folder, error)) return names;
  for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    names.push_back(it->path().filename().string());
  }
  if (error) throw DataError("{}: the folder cannot be read: {}", folder, error.message());
  return names;
}

void remove(const std::string& path) {
  std::error_code error;
  fs::remove(path, error);
  if (error) throw DataError("{}: cannot be removed: {}", path, error.message());
}

}  // namespace

std::string checkpoint_name(std::int64_t step) { return fmt::format("{}{:0{}}{}", kPrefix, step, kDigits, kSuffix); }

std::optional<std::int64_t> step_of_name(const std::string& name) {
  if (!name.starts_with(kPrefix) || !name.ends_with(kSuffix)) return std::nullopt;
  const char* first = name.data() + kPrefix.size();
  const char* last = name.data() + name.size() - kSuffix.size();
  std::int64_t step = 0;
  const auto result = std::from_chars(first, last, step);
  if (result.ec != std::errc() || result.ptr != last || name != checkpoint_name(step)) return std::nullopt;
  return step;
}

std::vector<CheckpointFile> list_checkpoints(const std::string& folder) {
  std::vector<CheckpointFile> found;
  for (const std::string& name : names_in(folder)) {
    const std::optional<std::int64_t> step = step_of_name(name);
    const std::string path = folder + "/" + name;
    std::error_code error;
    if (step && fs::is_regular_file(manifest_path(path), error)) found.push_back({path, *step});
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  return found;
}

std::optional<CheckpointFile> latest_checkpoint(const std::string& folder) {
  const std::vector<CheckpointFile> all = list_checkpoints(folder);
  if (all.empty()) return std::nullopt;
  return all.back();
}

std::vector<std::string> prune_checkpoints(const std::string& folder, int keep_last) {
  if (keep_last < 1) throw InternalError("prune_checkpoints: {} to keep", keep_last);
  std::vector<std::string> rolling;
  for (const CheckpointFile& file : list_checkpoints(folder)) {
    try {
      if (read_manifest(file.path).retention == Retention::rolling) rolling.push_back(file.path);
    } catch (const Error&) {
      // A damaged one is for its owner to judge, and does not count as kept.
    }
  }
  const std::size_t keep = std::min(rolling.size(), static_cast<std::size_t>(keep_last));
  rolling.resize(rolling.size() - keep);
  for (const std::string& path : rolling) {
    remove(manifest_path(path));  // first: what is left of a removal cut short is not taken for a checkpoint
    remove(path);
  }
  return rolling;
}

std::vector<std::string> remove_temporaries(const std::string& folder) {
  std::vector<std::string> removed;
  for (const std::string& name : names_in(folder)) {
    if (!is_temporary_name(name) || !name.starts_with(".step_")) continue;
    removed.push_back(folder + "/" + name);
    remove(removed.back());
  }
  return removed;
}

}  // namespace tforge
