// fuzz_seeds FOLDER: writes the seeds of each target to FOLDER/<target>/.
#include <cstdio>
#include <filesystem>

#include "fuzz/input.h"

int main(int argc, char** argv) {
  if (argc != 2) return std::fputs("fuzz_seeds FOLDER\n", stderr), 2;
  for (const tforge::fuzz::Target& target : tforge::fuzz::targets()) {
    const std::filesystem::path folder = std::filesystem::path(argv[1]) / target.name;
    std::filesystem::create_directories(folder);
    int i = 0;
    for (const std::string& seed : target.seeds())
      tforge::fuzz::write_bytes(folder / ("seed" + std::to_string(i++)), seed);
    std::puts(target.name);
  }
  return 0;
}
