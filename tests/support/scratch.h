#pragma once
// A folder of a test's own, a small disk, python scripts, and the text of an expected error.
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace tforge::test {

class Scratch {
 public:
  Scratch() {
    std::string name = (std::filesystem::temp_directory_path() / "tforge_test_XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("no scratch folder at " + name);
    folder_ = name;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  std::string folder() const { return folder_; }
  std::string path(const std::string& name) const { return folder_ + "/" + name; }

 private:
  std::string folder_;
};

/// A tmpfs of a few MiB; mounting needs root.
class SmallDisk {
 public:
  explicit SmallDisk(int mebibytes) {
    const std::string options = "size=" + std::to_string(mebibytes) + "m";
    mounted_ = ::mount("tmpfs", scratch_.folder().c_str(), "tmpfs", 0, options.c_str()) == 0;
  }
  ~SmallDisk() {
    if (mounted_) ::umount2(scratch_.folder().c_str(), MNT_DETACH);
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;
  bool mounted() const { return mounted_; }
  std::string folder() const { return scratch_.folder(); }
  std::string path(const std::string& name) const { return scratch_.path(name); }

 private:
  Scratch scratch_;
  bool mounted_ = false;
};

/// Whether the system's Python has h5py, with which some tests read and write files as others would.
inline bool has_h5py() { return std::system("/usr/bin/python3 -c 'import h5py' >/dev/null 2>&1") == 0; }

/// Runs a script with the system's Python (numpy and h5py are Debian's); a failure is the test's.
inline void python(const std::string& script, const std::string& arguments) {
  const Scratch scratch;
  std::ofstream(scratch.path("script.py")) << script;
  const std::string command = "/usr/bin/python3 " + scratch.path("script.py") + " " + arguments;
  ASSERT_EQ(std::system(command.c_str()), 0) << command;
}

/// The message of the error of type E that `f` throws; any other outcome is the test's failure.
template <class E, class F>
std::string error_of(F&& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another error: " << error.what();
    return error.what();
  }
  ADD_FAILURE() << "no error";
  return {};
}

}  // namespace tforge::test
