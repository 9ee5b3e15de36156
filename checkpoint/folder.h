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

/// The checkpoints of a folder, by their names, of which the file or the manifest is there, oldest step first; none
/// when the folder is missing. Throws DataError when the folder cannot be read.
std::vector<CheckpointFile> checkpoint_files(const std::string& folder);
/// Those of them that have both. Whether they are whole shows when they are opened.
std::vector<CheckpointFile> list_checkpoints(const std::string& folder);
/// The last of them.
std::optional<CheckpointFile> latest_checkpoint(const std::string& folder);

/// Removes all but the newest `keep_last` (at least 1) rolling checkpoints and returns what it removed. Ends of stages
/// stay, and so does anything whose manifest cannot be read.
std::vector<std::string> prune_checkpoints(const std::string& folder, int keep_last);

/// Ends the commits that were cut short after the file and its manifest had reached the disk and before both had their
/// names. Returns the checkpoints that have their names now. Only while no other job saves there.
std::vector<std::string> recover_commits(const std::string& folder);

/// Renames a checkpoint and its manifest, or what is there of them, to PATH.damaged (PATH.damaged2, ...), which no job
/// takes for a checkpoint of a run. Returns the new name. Throws DataError.
std::string set_aside(const std::string& path);

/// Removes what killed saves left behind: temporaries of checkpoints and manifests, no other file. Only while no other
/// job saves there. Returns what it removed.
std::vector<std::string> remove_temporaries(const std::string& folder);

}  // namespace tforge
