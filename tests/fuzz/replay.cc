// Runs a fuzz target over files, without libFuzzer: any compiler builds it.
//
//   fuzz <file>...
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>

#include "fuzzing.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

int main(int count, char** paths) {
  for (int i = 1; i < count; ++i) {
    std::ifstream file(paths[i], std::ios::binary);
    const std::string input{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (!file) {
      std::perror(paths[i]);
      return 1;
    }
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(input.data()), input.size());
    const std::string& refusal = fastgen::fuzz::refusal;
    std::printf("%s: %s\n", paths[i], refusal.empty() ? "good" : refusal.c_str());
  }
}
