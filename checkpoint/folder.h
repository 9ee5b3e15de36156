#pragma once
// A folder of checkpoints: names, which one is the newest, which may go. For one process; other ranks are told.
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tforge {

struct CheckpointFile {
  std::string path;
  std::int64_t step = 0;
};

/// "step_00001234.h5"
std::string checkpoint_name(std::int64_t step);
/// The step in such a name; nothing for any other name.
std::optional<std::int64_t> step_of_name(const std::string& name);

/// Checkpoints of a folder that have a manifest, oldest step first; none when the folder is missing. Whether they are
/// whole shows when they are opened. Throws DataError when the folder cannot be read.
std::vector<CheckpointFile> list_checkpoints(const std::string& folder);
/// The last of them.
std::optional<CheckpointFile> latest_checkpoint(const std::string& folder);

/// Removes all but the newest `keep_last` (at least 1) rolling checkpoints and returns what it removed. Ends of stages
/// stay, and so does anything whose manifest cannot be read.
std::vector<std::string> prune_checkpoints(const std::string& folder, int keep_last);

/// Removes what killed saves left behind: temporaries of checkpoints and manifests, no other file. Only while no other
/// job saves there. Returns what it removed.
std::vector<std::string> remove_temporaries(const std::string& folder);

}  // namespace tforge
