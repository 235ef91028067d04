// libFuzzer target: fastgen.json and gpt.pdiparams, read as far as a device reads them.
//
// An input is the two files with "\n====\n" between them.
#include <cstddef>
#include <cstdint>
#include <string>

#include "engine/config.h"
#include "fuzzing.h"
#include "io/export.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace fastgen;  // NOLINT: a program, not a header
  std::string rest(reinterpret_cast<const char*>(data), size);
  fuzz::RemoveFiles();
  fuzz::SetFile("export/fastgen.json", fuzz::NextPart(&rest));
  fuzz::SetFile("export/gpt.pdiparams", rest);
  try {
    const io::ExportManifest manifest = io::ReadExportManifest("export");
    const engine::ModelConfig config = engine::ReadExportConfig(manifest.config, manifest.path);
    fuzz::ReadWeights(config, *io::OpenExport("export", manifest));
    fuzz::refusal.clear();
  } catch (const base::Error& error) {
    fuzz::Refused(error);
  }
  return 0;
}
