#include "fuzzing.h"

#include <map>
#include <vector>

#include "engine/weights.h"
#include "io/mapped_file.h"
#include "io/quantized.h"

namespace fastgen::fuzz {

std::string refusal;

namespace {

std::map<std::string, std::string>& Files() {
  static std::map<std::string, std::string> files;
  return files;
}

const std::string& FindFile(const std::string& path) {
  const auto found = Files().find(path);
  if (found == Files().end()) {
    throw base::Error(FASTGEN_NOT_FOUND, path + ": cannot be opened: " + base::ErrnoText(ENOENT));
  }
  return found->second;
}

}  // namespace

std::string NextPart(std::string* rest) {
  static const std::string kSeparator = "\n====\n";
  const size_t end = rest->find(kSeparator);
  const std::string part = rest->substr(0, end);
  rest->erase(0, end == std::string::npos ? end : end + kSeparator.size());
  return part;
}

void SetFile(const std::string& path, const std::string& content) { Files()[path] = content; }

void RemoveFiles() { Files().clear(); }

void ReadWeights(const engine::ModelConfig& config, io::TensorSource& source) {
  using engine::Matrix;
  using engine::Vector;
  engine::WeightSource weights(config, source, "model");
  const bool has_scales = *weights.matrix_scales() != 0;
  const int64_t hidden = config.hidden_size;
  const int64_t inner = config.intermediate_size;
  std::vector<float> row(static_cast<size_t>(hidden));
  for (int64_t i = 0; i < config.vocab_size; ++i) {
    weights.ReadEmbeddingRows(i, i + 1, row.data());
    weights.ReadHeadRows(i, i + 1, row.data());
    if (!has_scales) continue;
    std::vector<uint16_t> scales(static_cast<size_t>(io::ScaleGroups(hidden)));
    weights.ReadEmbeddingScales(i, i + 1, scales.data());
    weights.ReadHeadScales(i, i + 1, scales.data());
  }
  for (int64_t i = 0; i < config.max_positions; ++i) weights.ReadPositionRows(i, i + 1, row.data());
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    for (int which = 0; which < engine::kNumMatrices; ++which) {
      const auto matrix = static_cast<Matrix>(which);
      const int64_t in = matrix == Matrix::kFeedForwardOut ? inner : hidden;
      const int64_t out = matrix == Matrix::kFeedForwardIn ? inner : hidden;
      // In two pieces, the second of which begins inside a head's columns.
      const int64_t middle = (out + 1) / 2;
      std::vector<float> columns(static_cast<size_t>(in * out));
      weights.ReadColumns(layer, matrix, 0, middle, columns.data(), out);
      weights.ReadColumns(layer, matrix, middle, out, columns.data() + middle, out);
      if (!has_scales) continue;
      std::vector<uint16_t> scales(static_cast<size_t>(io::ScaleGroups(in) * out));
      weights.ReadColumnScales(layer, matrix, 0, middle, scales.data(), out);
      weights.ReadColumnScales(layer, matrix, middle, out, scales.data() + middle, out);
    }
    for (int which = 0; which < engine::kNumVectors; ++which) {
      const auto vector = static_cast<Vector>(which);
      const bool wide = vector == Vector::kFeedForwardInBias;
      std::vector<float> values(static_cast<size_t>(wide ? inner : hidden));
      weights.ReadVector(layer, vector, values.data());
    }
    weights.ReleaseLayer(layer);
  }
  std::vector<float> bias(static_cast<size_t>(hidden));
  weights.ReadFinalNorm(row.data(), bias.data());
  weights.ReleaseEnds();
}

void Refused(const base::Error& error) {
  refusal = error.what();
  Require(!refusal.empty() && refusal.size() <= 1000);
  for (const char c : refusal) Require(c >= 0x20 && c < 0x7f);
  Require(error.status() == FASTGEN_BAD_FILE || error.status() == FASTGEN_UNSUPPORTED ||
          error.status() == FASTGEN_NOT_FOUND || error.status() == FASTGEN_INVALID_ARGUMENT);
}

}  // namespace fastgen::fuzz

// ---- io/mapped_file.h -----------------------------------------------------------------------

namespace fastgen::io {

MappedFile::MappedFile(const std::string& path) : path_(path) {
  const std::string& content = fuzz::FindFile(path);
  size_ = content.size();
  if (size_ == 0) return;
  char* copy = new char[size_];
  content.copy(copy, size_);
  data_ = copy;
}

MappedFile::~MappedFile() { delete[] data_; }

void MappedFile::DropPages(uint64_t begin, uint64_t end) const {
  fuzz::Require(begin <= end && end <= size_);
}

std::string ReadTextFile(const std::string& path, uint64_t max_bytes) {
  const std::string& content = fuzz::FindFile(path);
  fuzz::Require(content.size() <= max_bytes);
  return content;
}

}  // namespace fastgen::io
