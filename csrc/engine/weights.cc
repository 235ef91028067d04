#include "engine/weights.h"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "io/quantized.h"

namespace fastgen::engine {

namespace {

using io::DType;
using io::TensorView;

// How a family of checkpoints names its tensors. Roles of a layer are completed by ".weight" and
// ".bias"; everything but the head may stand behind `prefix`.
struct Naming {
  const char* prefix;
  const char* embedding;
  const char* positions;
  const char* final_norm;
  const char* layer;
  const char* norm1;
  const char* query;  // q, k and v apart; null if the family always fuses them
  const char* key;
  const char* value;
  const char* fused;  // q, k and v in one tensor
  bool interleaved;   // fused head by head, [heads, 3, head_size], rather than [3, hidden]
  const char* attention_out;
  const char* norm2;
  const char* feed_forward_in;
  const char* feed_forward_out;
  const char* heads[2];
  const char* buffers[2];  // of a layer: no weights, left out
};

constexpr Naming kNamings[] = {
    // HuggingFace GPT-2
    {"transformer.",
     "wte.weight",
     "wpe.weight",
     "ln_f",
     "h.",
     "ln_1",
     nullptr,
     nullptr,
     nullptr,
     "attn.c_attn",
     false,
     "attn.c_proj",
     "ln_2",
     "mlp.c_fc",
     "mlp.c_proj",
     {"lm_head.weight", nullptr},
     {"attn.bias", "attn.masked_bias"}},
    // PaddleNLP GPT
    {"gpt.",
     "embeddings.word_embeddings.weight",
     "embeddings.position_embeddings.weight",
     "decoder.norm",
     "decoder.layers.",
     "norm1",
     "self_attn.q_proj",
     "self_attn.k_proj",
     "self_attn.v_proj",
     "self_attn.qkv_proj",
     true,
     "self_attn.out_proj",
     "norm2",
     "linear1",
     "linear2",
     {"lm_head.weight", "lm_head.decoder_weight"},
     {nullptr, nullptr}},
};

constexpr int Index(Matrix which) { return static_cast<int>(which); }
constexpr int Index(Vector which) { return static_cast<int>(which); }

constexpr Matrix kQkvMatrices[] = {Matrix::kQuery, Matrix::kKey, Matrix::kValue};
constexpr Vector kQkvBiases[] = {Vector::kQueryBias, Vector::kKeyBias, Vector::kValueBias};

void CheckRange(int64_t begin, int64_t end, int64_t size) {
  if (begin < 0 || begin > end || end > size) {
    throw base::Error(FASTGEN_INTERNAL, "weights [" + std::to_string(begin) + ", " +
                                            std::to_string(end) + ") of " + std::to_string(size) +
                                            " were asked for");
  }
}

}  // namespace

// Finds the tensors of every role and keeps account of what is missing, wrong or left over.
class WeightSource::Binder {
 public:
  Binder(const ModelConfig& config, const io::TensorSource& source, const std::string& where)
      : config_(config), where_(where) {
    for (const TensorView& tensor : source.tensors()) {
      if (!tensors_.emplace(tensor.name, &tensor).second) {
        Fail("tensor " + base::Quote(tensor.name) + " is given twice");
      }
    }
    ChooseNaming(source);
  }

  void Bind(WeightSource* weights) {
    const int64_t hidden = config_.hidden_size;
    weights->embedding_ = FindTable(prefix_ + naming_->embedding);
    weights->positions_ = Find(prefix_ + naming_->positions, {config_.max_positions, hidden});
    weights->layers_.resize(static_cast<size_t>(config_.num_layers));
    for (int32_t i = 0; i < config_.num_layers; ++i) {
      BindLayer(prefix_ + naming_->layer + std::to_string(i) + ".",
                &weights->layers_[static_cast<size_t>(i)]);
    }
    weights->final_norm_weight_ = Find(prefix_ + naming_->final_norm + ".weight", {hidden});
    weights->final_norm_bias_ = Find(prefix_ + naming_->final_norm + ".bias", {hidden});
    BindHead(weights);
    Finish();
  }

 private:
  [[noreturn]] void Fail(const std::string& what) const {
    throw base::Error(FASTGEN_BAD_FILE, where_ + ": " + what);
  }

  bool Has(const std::string& name) const { return tensors_.count(name) != 0; }
  // In any form.
  bool HasMatrix(const std::string& name) const {
    return Has(name) || Has(name + io::kInt8Suffix) || Has(name + io::kInt4Suffix);
  }

  void ChooseNaming(const io::TensorSource& source) {
    for (const Naming& naming : kNamings) {
      for (const char* prefix : {naming.prefix, ""}) {
        const std::string name = std::string(prefix) + naming.embedding;
        if (Has(name) || Has(name + io::kInt8Suffix)) {
          naming_ = &naming;
          prefix_ = prefix;
          return;
        }
      }
    }
    Fail(std::string("has no word embedding, neither ") + base::Quote(kNamings[0].embedding) +
         " (HuggingFace GPT-2) nor " + base::Quote(kNamings[1].embedding) + " (PaddleNLP GPT); " +
         (source.tensors().empty()
              ? std::string("it has no tensor at all")
              : "its first tensor is " + base::Quote(source.tensors()[0].name)));
  }

  // The tensor `name`, or null after noting what is wrong. `type` is what the configuration says of it;
  // kOther: any float will do.
  const TensorView* Find(const std::string& name, const std::vector<int64_t>& shape,
                         DType type = DType::kOther) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      NoteOtherForm(name);
      if (num_missing_++ == 0) first_missing_ = name;
      return nullptr;
    }
    const TensorView* tensor = found->second;
    used_.insert(name);
    if (!first_wrong_.empty()) return tensor;
    if (tensor->shape != shape) {
      first_wrong_ = "tensor " + base::Quote(name) + " has the shape " + tensor->ShapeText() +
                     ", the configuration asks for " + io::ShapeText(shape);
    } else if (type != DType::kOther && tensor->dtype != type) {
      first_wrong_ = "tensor " + base::Quote(name) + " has the type " +
                     base::Quote(tensor->TypeText()) + ", it must be " + io::DTypeName(type) +
                     " where fastgen_weights of the configuration says " + config_.weight_dtype;
    } else if (type == DType::kOther && !io::IsFloat(tensor->dtype)) {
      first_wrong_ = "tensor " + base::Quote(name) + " has the type " +
                     base::Quote(tensor->TypeText()) + ", it must be float32, float16 or bfloat16";
    }
    return tensor;
  }

  // A missing tensor may be there in a form that the configuration does not tell of.
  void NoteOtherForm(const std::string& name) {
    for (const char* suffix : {io::kInt8Suffix, io::kInt4Suffix}) {
      if (!first_wrong_.empty() || !Has(name + suffix)) continue;
      first_wrong_ = "tensor " + base::Quote(name) + " is there as " + base::Quote(name + suffix) +
                     ", the configuration " +
                     (config_.weight_dtype.empty() ? "has no fastgen_weights"
                                                   : "says " + config_.weight_dtype);
    }
  }

  // A matrix [rows, columns], of which a table's inputs are the columns and another's the rows.
  Table FindMatrix(const std::string& name, int64_t rows, int64_t columns, bool is_table) {
    const std::string& type = config_.weight_dtype;
    if (type == "float16") return {Find(name, {rows, columns}, DType::kFloat16), nullptr};
    if (type == "bfloat16") return {Find(name, {rows, columns}, DType::kBFloat16), nullptr};
    if (type.empty()) return {Find(name, {rows, columns}), nullptr};
    const bool four = type == "int4" && !is_table;
    Table found;
    found.tensor = four ? Find(name + io::kInt4Suffix, {(rows + 1) / 2, columns}, DType::kUInt8)
                        : Find(name + io::kInt8Suffix, {rows, columns}, DType::kInt8);
    found.scales = Find(
        name + io::kScalesSuffix,
        {is_table ? rows : io::ScaleGroups(rows), is_table ? io::ScaleGroups(columns) : columns},
        DType::kFloat16);
    return found;
  }

  Table FindTable(const std::string& name) {
    return FindMatrix(name, config_.vocab_size, config_.hidden_size, true);
  }

  // Weight and bias of one matrix that has its tensors to itself.
  void BindMatrix(const std::string& name, int64_t in, int64_t out, Part* weight, Part* bias) {
    const Table found = FindMatrix(name + ".weight", in, out, false);
    *weight = {found.tensor, out, 0, out, 0, in, found.scales};
    *bias = {Find(name + ".bias", {out}), out, 0, out, 0};
  }

  void BindLayer(const std::string& layer, Layer* parts) {
    const int64_t hidden = config_.hidden_size;
    const int64_t inner = config_.intermediate_size;
    Part* m = parts->matrices;
    Part* v = parts->vectors;
    const auto norm = [&](const char* name, Vector weight, Vector bias) {
      v[Index(weight)] = {Find(layer + name + ".weight", {hidden}), hidden, 0, hidden, 0};
      v[Index(bias)] = {Find(layer + name + ".bias", {hidden}), hidden, 0, hidden, 0};
    };
    norm(naming_->norm1, Vector::kNorm1Weight, Vector::kNorm1Bias);
    BindQkv(layer, parts);
    BindMatrix(layer + naming_->attention_out, hidden, hidden, &m[Index(Matrix::kAttentionOut)],
               &v[Index(Vector::kAttentionOutBias)]);
    norm(naming_->norm2, Vector::kNorm2Weight, Vector::kNorm2Bias);
    BindMatrix(layer + naming_->feed_forward_in, hidden, inner, &m[Index(Matrix::kFeedForwardIn)],
               &v[Index(Vector::kFeedForwardInBias)]);
    BindMatrix(layer + naming_->feed_forward_out, inner, hidden, &m[Index(Matrix::kFeedForwardOut)],
               &v[Index(Vector::kFeedForwardOutBias)]);
    for (const char* buffer : naming_->buffers) {
      if (buffer != nullptr) used_.insert(layer + buffer);
    }
  }

  void BindQkv(const std::string& layer, Layer* parts) {
    const int64_t hidden = config_.hidden_size;
    const std::string fused = layer + naming_->fused;
    if (naming_->query != nullptr && !HasMatrix(fused + ".weight")) {
      const char* names[] = {naming_->query, naming_->key, naming_->value};
      for (int i = 0; i < 3; ++i) {
        BindMatrix(layer + names[i], hidden, hidden, &parts->matrices[Index(kQkvMatrices[i])],
                   &parts->vectors[Index(kQkvBiases[i])]);
      }
      return;
    }
    const Table weight = FindMatrix(fused + ".weight", hidden, 3 * hidden, false);
    const TensorView* bias = Find(fused + ".bias", {3 * hidden});
    const int64_t group = naming_->interleaved ? config_.head_size() : hidden;
    for (int i = 0; i < 3; ++i) {
      parts->matrices[Index(kQkvMatrices[i])] = {weight.tensor, hidden, i * group,    group,
                                                 3 * group,     hidden, weight.scales};
      parts->vectors[Index(kQkvBiases[i])] = {bias, hidden, i * group, group, 3 * group};
    }
  }

  void BindHead(WeightSource* weights) {
    for (const char* name : naming_->heads) {
      if (name != nullptr && HasMatrix(name)) {
        weights->head_ = FindTable(name);
        return;
      }
    }
    if (config_.head == Head::kSeparate) {
      FindTable(naming_->heads[0]);
    }
  }

  // Complains in the order of what explains most.
  void Finish() const {
    if (!first_wrong_.empty()) Fail(first_wrong_);
    if (num_missing_ > 0) {
      Fail("tensor " + base::Quote(first_missing_) + " is missing (" +
           std::to_string(num_missing_) + " missing in all); the configuration has num_layers " +
           std::to_string(config_.num_layers));
    }
    for (const auto& tensor : tensors_) {
      if (used_.count(tensor.first) == 0) {
        Fail("tensor " + base::Quote(tensor.first) +
             " is left over: it is no part of a GPT-2 with num_layers " +
             std::to_string(config_.num_layers));
      }
    }
  }

  const ModelConfig& config_;
  const std::string& where_;
  std::map<std::string, const TensorView*> tensors_;
  std::set<std::string> used_;
  const Naming* naming_ = nullptr;
  std::string prefix_;
  std::string first_wrong_;
  std::string first_missing_;
  int64_t num_missing_ = 0;
};

WeightSource::WeightSource(const ModelConfig& config, io::TensorSource& source,
                           const std::string& where)
    : source_(source) {
  Binder(config, source, where).Bind(this);
  if (head_.tensor == nullptr) return;
  if (HeadEqualsEmbedding()) {
    source_.Release(*head_.tensor);
    if (head_.scales != nullptr) source_.Release(*head_.scales);
    head_ = Table();
  } else if (config.head == Head::kTied) {
    throw base::Error(FASTGEN_BAD_FILE, where + ": tensor " + base::Quote(head_.tensor->name) +
                                            " differs from " +
                                            base::Quote(embedding_.tensor->name) +
                                            ", the configuration says that they are tied");
  }
}

bool WeightSource::HeadEqualsEmbedding() {
  const io::TensorView& head = *head_.tensor;
  const io::TensorView& embedding = *embedding_.tensor;
  if (head.dtype != embedding.dtype) return false;
  if (head_.scales != nullptr && !source_.Equal(*head_.scales, *embedding_.scales)) return false;
  return head.data == embedding.data || source_.Equal(head, embedding);
}

void WeightSource::ReadPart(const Part& part, int64_t begin, int64_t end, float* out, int64_t ld) {
  CheckRange(begin, end, part.size);
  const io::TensorView& tensor = *part.tensor;
  const int64_t element = static_cast<int64_t>(io::DTypeSize(tensor.dtype));
  const int64_t row_bytes = tensor.shape.back() * element;
  const char* data = static_cast<const char*>(tensor.data);
  // A few columns of many rows: every row is on another page, where no hardware prefetcher follows.
  constexpr int64_t kAhead = 16;
  const int64_t row_inputs = tensor.dtype == io::DType::kUInt8 ? 2 : 1;
  for (int64_t row = 0; row < part.rows; ++row) {
    for (int64_t column = begin; column < end;) {
      const int64_t group = column / part.group_size;
      const int64_t in_group = column % part.group_size;
      const int64_t count = std::min(end - column, part.group_size - in_group);
      const int64_t stored = part.offset + group * part.group_stride + in_group;
      if (row + kAhead < part.rows) {
        const char* next = data + (row + kAhead) / row_inputs * row_bytes + stored * element;
        __builtin_prefetch(next);
        __builtin_prefetch(next + count * element - 1);
      }
      float* const to = out + row * ld + (column - begin);
      if (part.scales != nullptr) {
        io::DequantizeInput(tensor, *part.scales, row, stored, count, to);
      } else {
        io::ToFloat32(tensor.dtype, data + row * row_bytes + stored * element, count, to);
      }
      column += count;
    }
  }
}

void WeightSource::ReadRows(const Table& table, int64_t begin, int64_t end, float* out) {
  const io::TensorView& tensor = *table.tensor;
  const int64_t columns = tensor.shape[1];
  CheckRange(begin, end, tensor.shape[0]);
  if (table.scales != nullptr) {
    for (int64_t row = begin; row < end; ++row) {
      io::DequantizeOutput(tensor, *table.scales, row, out + (row - begin) * columns);
    }
    return;
  }
  io::ToFloat32(tensor.dtype, tensor.At(begin, 0), (end - begin) * columns, out);
}

void WeightSource::ReadRowScales(const Table& table, int64_t begin, int64_t end, uint16_t* out) {
  CheckRange(begin, end, table.tensor->shape[0]);
  io::CopyScales(*table.scales, begin, 0, (end - begin) * table.scales->shape[1], out);
}

const char* WeightSource::matrix_scales() const {
  const Part& part = layers_.front().matrices[0];
  if (part.scales == nullptr) return "";
  return part.tensor->dtype == DType::kInt8 ? "int8" : "int4";
}

const char* WeightSource::table_scales() const { return embedding_.scales ? "int8" : ""; }

bool WeightSource::matrix_scales_in_runs() const {
  for (const Layer& layer : layers_) {
    for (const Part& part : layer.matrices) {
      if (part.scales == nullptr || !io::ScalesInRuns(*part.scales, false)) return false;
    }
  }
  return true;
}

bool WeightSource::table_scales_in_runs() const {
  return embedding_.scales != nullptr && io::ScalesInRuns(*embedding_.scales, true) &&
         (head_is_tied() || (head_.scales != nullptr && io::ScalesInRuns(*head_.scales, true)));
}

void WeightSource::ReadColumnScales(int32_t layer, Matrix which, int64_t begin, int64_t end,
                                    uint16_t* out, int64_t ld) const {
  const Part& part = matrix(layer, which);
  CheckRange(begin, end, part.size);
  for (int64_t group = 0; group < part.scales->shape[0]; ++group) {
    for (int64_t column = begin; column < end;) {
      const int64_t in_group = column % part.group_size;
      const int64_t count = std::min(end - column, part.group_size - in_group);
      const int64_t stored = part.offset + column / part.group_size * part.group_stride + in_group;
      io::CopyScales(*part.scales, group, stored, count, out + group * ld + (column - begin));
      column += count;
    }
  }
}

void WeightSource::ReadEmbeddingScales(int64_t begin, int64_t end, uint16_t* out) const {
  ReadRowScales(embedding_, begin, end, out);
}

void WeightSource::ReadHeadScales(int64_t begin, int64_t end, uint16_t* out) const {
  ReadRowScales(head(), begin, end, out);
}

void WeightSource::ReadColumns(int32_t layer, Matrix which, int64_t begin, int64_t end, float* out,
                               int64_t ld) const {
  ReadPart(matrix(layer, which), begin, end, out, ld);
}

void WeightSource::ReadVector(int32_t layer, Vector which, float* out) const {
  const Part& part = vector(layer, which);
  ReadPart(part, 0, part.size, out, part.size);
}

void WeightSource::ReadFinalNorm(float* weight, float* bias) const {
  io::ToFloat32(final_norm_weight_->dtype, final_norm_weight_->data,
                final_norm_weight_->num_elements(), weight);
  io::ToFloat32(final_norm_bias_->dtype, final_norm_bias_->data, final_norm_bias_->num_elements(),
                bias);
}

void WeightSource::ReadEmbeddingRows(int64_t begin, int64_t end, float* out) const {
  ReadRows(embedding_, begin, end, out);
}

void WeightSource::ReadPositionRows(int64_t begin, int64_t end, float* out) const {
  ReadRows({positions_, nullptr}, begin, end, out);
}

void WeightSource::ReadHeadRows(int64_t begin, int64_t end, float* out) const {
  ReadRows(head(), begin, end, out);
}

const WeightSource::Part& WeightSource::matrix(int32_t layer, Matrix which) const {
  return layers_[static_cast<size_t>(layer)].matrices[Index(which)];
}

const WeightSource::Part& WeightSource::vector(int32_t layer, Vector which) const {
  return layers_[static_cast<size_t>(layer)].vectors[Index(which)];
}

WeightSource::Part WeightSource::end(End which) const {
  const io::TensorView* tensor = nullptr;
  switch (which) {
    case End::kEmbedding: tensor = embedding_.tensor; break;
    case End::kPositions: tensor = positions_; break;
    case End::kHead: tensor = head().tensor; break;
    case End::kFinalNormWeight: tensor = final_norm_weight_; break;
    case End::kFinalNormBias: tensor = final_norm_bias_; break;
  }
  const int64_t size = tensor->shape.back();
  return {tensor, size, 0, size, 0};
}

void WeightSource::ReleaseLayer(int32_t layer) {
  // q, k and v may share a tensor, which is then released three times: that does no harm.
  const Layer& parts = layers_[static_cast<size_t>(layer)];
  for (const Part& part : parts.matrices) {
    source_.Release(*part.tensor);
    if (part.scales != nullptr) source_.Release(*part.scales);
  }
  for (const Part& part : parts.vectors) source_.Release(*part.tensor);
}

void WeightSource::ReleaseEnds() {
  for (const io::TensorView* tensor :
       {embedding_.tensor, embedding_.scales, positions_, head_.tensor, head_.scales,
        final_norm_weight_, final_norm_bias_}) {
    if (tensor != nullptr) source_.Release(*tensor);
  }
}

}  // namespace fastgen::engine
