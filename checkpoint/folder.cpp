#include "checkpoint/folder.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <set>

#include "checkpoint/manifest.h"
#include "core/errors.h"
#include "storage/atomic_file.h"

namespace tforge {
namespace {

namespace fs = std::filesystem;

constexpr std::string_view kPrefix = "step_";
constexpr std::string_view kSuffix = ".h5";
constexpr std::string_view kManifest = ".manifest";
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

/// A regular file. Throws DataError where the folder lets nobody look.
bool exists(const std::string& path) {
  std::error_code error;
  const bool file = fs::is_regular_file(path, error);
  if (error == std::errc::permission_denied) throw DataError("{}: {}", path, error.message());
  return file;
}

/// Anything of that name, be it a link to nowhere.
bool is_taken(const std::string& path) {
  std::error_code ignored;
  return fs::exists(fs::symlink_status(path, ignored));
}

void move(const std::string& from, const std::string& to) {
  std::error_code error;
  fs::rename(from, to, error);
  if (error) throw DataError("{}: cannot be renamed to {}: {}", from, to, error.message());
}

void remove(const std::string& path) {
  std::error_code error;
  fs::remove(path, error);
  if (error) throw DataError("{}: cannot be removed: {}", path, error.message());
}

/// Whether the manifest in `manifest` is that of the bytes of `file`, as a checkpoint called `name`.
bool fits(const std::string& file, const std::string& manifest, const std::string& name) {
  if (!exists(file)) return false;
  try {
    const Manifest m = read_manifest(file, manifest, name);
    verify_blocks(PlainFile(file, PlainFile::Access::read), m, {0, m.blocks.size()});
    return true;
  } catch (const Error&) {
    return false;
  }
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

std::vector<CheckpointFile> checkpoint_files(const std::string& folder) {
  std::set<std::int64_t> steps;
  for (std::string name : names_in(folder)) {
    const std::string path = folder + "/" + name;
    if (name.ends_with(kManifest)) name.resize(name.size() - kManifest.size());
    const std::optional<std::int64_t> step = step_of_name(name);
    if (step && exists(path)) steps.insert(*step);
  }
  std::vector<CheckpointFile> found;
  for (const std::int64_t step : steps) found.push_back({folder + "/" + checkpoint_name(step), step});
  return found;
}

std::vector<CheckpointFile> list_checkpoints(const std::string& folder) {
  std::vector<CheckpointFile> found = checkpoint_files(folder);
  std::erase_if(found,
                [](const CheckpointFile& file) { return !exists(file.path) || !exists(manifest_path(file.path)); });
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
    // Under the names of temporaries, what is left of a removal cut short is taken for no damage: it is removed later,
    // or put back while it is still whole.
    const std::string manifest = temporary_name(manifest_path(path)), file = temporary_name(path);
    move(manifest_path(path), manifest);
    move(path, file);
    remove(manifest);
    remove(file);
  }
  return rolling;
}

std::vector<std::string> recover_commits(const std::string& folder) {
  std::vector<std::string> recovered;
  const std::vector<std::string> names = names_in(folder);
  for (const std::string& manifest : names) {
    if (!is_temporary_name(manifest)) continue;
    const std::string target = folder + "/" + std::string(target_of_temporary(manifest));
    if (!target.ends_with(kManifest) || exists(target)) continue;
    const std::string path = target.substr(0, target.size() - kManifest.size());
    const std::string name = path.substr(folder.size() + 1);
    if (!step_of_name(name)) continue;
    // The file may still have the name of its temporary, beside one that it was to replace.
    std::vector<std::string> files = {path};
    for (const std::string& other : names) {
      if (is_temporary_name(other) && target_of_temporary(other) == name) files.push_back(folder + "/" + other);
    }
    const auto file =
        std::ranges::find_if(files, [&](const std::string& f) { return fits(f, folder + "/" + manifest, name); });
    if (file == files.end()) continue;
    if (*file != path) {
      move(*file, path);
      sync_folder(folder);
    }
    move(folder + "/" + manifest, target);
    sync_folder(folder);
    recovered.push_back(path);
  }
  return recovered;
}

std::string set_aside(const std::string& path) {
  std::string to = path + ".damaged";
  for (int i = 2; is_taken(to) || is_taken(manifest_path(to)); ++i) to = fmt::format("{}.damaged{}", path, i);
  if (is_taken(path)) move(path, to);
  if (is_taken(manifest_path(path))) move(manifest_path(path), manifest_path(to));
  sync_folder(folder_of(path));
  return to;
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
