// Where the time of a CPU step goes, region by region, with random weights of a GPT-2's shape.
//
//   step_speed [--shape small|medium|large|xl] [--weight_dtype T] [--cache_dtype T] [--isa NAME]
//              [--threads N] [--rows N] [--context N] [--steps N]
//
// Prints the median time of a prefill of `context` tokens and of a decode step of `rows` sequences behind
// it, and each region's share.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "engine/cpu_device.h"
#include "io/tensor.h"

namespace {

using namespace fastgen;

struct Shape {
  const char* name;
  int32_t layers, hidden, heads;
};
constexpr Shape kShapes[] = {{"small", 12, 768, 12},
                             {"medium", 24, 1024, 16},
                             {"large", 36, 1280, 20},
                             {"xl", 48, 1600, 25}};
constexpr const char* kRegions[engine::kNumRegions] = {
    "embedding",       "norm, q k v, cache", "attention",     "projection, residual",
    "norm, FC1, GELU", "FC2, residual",      "norm, LM head", "sampling"};

struct Settings {
  std::string shape = "small", weight_dtype = "float32", cache_dtype, isa;
  int threads = 0, rows = 1, context = 128, steps = 32;
};

bool Parse(int argc, char** argv, Settings* settings) {
  const std::map<std::string, std::string*> texts = {{"--shape", &settings->shape},
                                                     {"--weight_dtype", &settings->weight_dtype},
                                                     {"--cache_dtype", &settings->cache_dtype},
                                                     {"--isa", &settings->isa}};
  const std::map<std::string, int*> numbers = {{"--threads", &settings->threads},
                                               {"--rows", &settings->rows},
                                               {"--context", &settings->context},
                                               {"--steps", &settings->steps}};
  for (int i = 1; i < argc; i += 2) {
    if (i + 1 == argc) return false;
    const auto text = texts.find(argv[i]);
    const auto number = numbers.find(argv[i]);
    if (text != texts.end()) {
      *text->second = argv[i + 1];
    } else if (number != numbers.end()) {
      *number->second = std::atoi(argv[i + 1]);
      if (*number->second < 1) return false;
    } else {
      return false;
    }
  }
  return settings->context + settings->steps <= 1024;
}

// All tensors are views of the same numbers: their values do not matter here.
std::vector<io::TensorView> Tensors(const engine::ModelConfig& config,
                                    const std::vector<float>& numbers) {
  const int64_t h = config.hidden_size, wide = config.intermediate_size;
  std::vector<io::TensorView> tensors;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    io::TensorView view;
    view.name = name;
    view.data = numbers.data();
    view.shape = std::move(shape);
    tensors.push_back(view);
  };
  add("wte.weight", {config.vocab_size, h});
  add("wpe.weight", {config.max_positions, h});
  for (int32_t i = 0; i < config.num_layers; ++i) {
    const std::string layer = "h." + std::to_string(i);
    const auto linear = [&](const char* name, int64_t in, int64_t out) {
      add(layer + name + ".weight", {in, out});
      add(layer + name + ".bias", {out});
    };
    for (const char* norm : {".ln_1", ".ln_2"}) {
      add(layer + norm + ".weight", {h});
      add(layer + norm + ".bias", {h});
    }
    linear(".attn.c_attn", h, 3 * h);
    linear(".attn.c_proj", h, h);
    linear(".mlp.c_fc", h, wide);
    linear(".mlp.c_proj", wide, h);
  }
  add("ln_f.weight", {h});
  add("ln_f.bias", {h});
  return tensors;
}

void Print(const char* what, std::vector<engine::RegionTimes> runs) {
  const auto total = [](const engine::RegionTimes& times) {
    double sum = 0.0;
    for (const double seconds : times.seconds) sum += seconds;
    return sum;
  };
  std::sort(runs.begin(), runs.end(),
            [&](const auto& a, const auto& b) { return total(a) < total(b); });
  const engine::RegionTimes& median = runs[runs.size() / 2];
  std::printf("%s: %.3f ms median, %.3f best\n", what, 1e3 * total(median), 1e3 * total(runs[0]));
  for (int i = 0; i < engine::kNumRegions; ++i) {
    std::printf("  %-22s %9.3f ms %6.1f %%\n", kRegions[i], 1e3 * median.seconds[i],
                100.0 * median.seconds[i] / total(median));
  }
}

int Run(const Settings& settings) {
  const Shape* shape = std::find_if(std::begin(kShapes), std::end(kShapes),
                                    [&](const Shape& each) { return settings.shape == each.name; });
  if (shape == std::end(kShapes)) return 2;
  engine::ModelConfig config;
  config.vocab_size = 50257;
  config.max_positions = 1024;
  config.hidden_size = shape->hidden;
  config.num_layers = shape->layers;
  config.num_heads = shape->heads;
  config.intermediate_size = 4 * shape->hidden;
  std::vector<float> numbers(static_cast<size_t>(config.vocab_size) * config.hidden_size);
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, 0.02f);
  for (float& number : numbers) number = normal(random);
  io::MemoryTensorSource tensors(Tensors(config, numbers));
  engine::WeightSource weights(config, tensors, "random weights");
  engine::DeviceOptions options;
  options.isa = settings.isa;
  options.weight_dtype = settings.weight_dtype;
  options.cache_dtype = settings.cache_dtype;
  options.num_threads = settings.threads;
  engine::CpuDevice device(config, weights, options);
  const engine::DeviceInfo& info = device.info();
  std::printf("%s, %s weights, %s cache, %s, %d threads, %d rows, context %d\n", shape->name,
              info.weight_dtype.c_str(), info.cache_dtype.c_str(), info.isa.c_str(),
              info.num_threads, settings.rows, settings.context);

  engine::RegionTimes times;
  device.Measure(&times);
  std::vector<int32_t> prompt(settings.context);
  for (int32_t& token : prompt) token = static_cast<int32_t>(random() % config.vocab_size);
  engine::SequenceSpec spec;
  spec.prompt = prompt.data();
  spec.prompt_length = settings.context;
  spec.sampling.max_length = settings.steps + 1;
  spec.sampling.eos_token_id = -1;
  std::vector<int32_t> slots;
  std::vector<engine::RegionTimes> prefills, steps;
  // Twice: the first time the pages of the cache are new.
  for (int round = 0; round < 2; ++round) {
    for (const int32_t slot : slots) device.Close(slot);
    slots.clear();
    prefills.clear();
    for (int row = 0; row < settings.rows; ++row) {
      slots.push_back(device.Open(spec));
      times = {};
      engine::PrefillChunk chunk;
      chunk.slot = slots.back();
      chunk.count = settings.context;
      device.Prefill(&chunk, 1);
      prefills.push_back(times);
    }
  }
  std::vector<engine::DecodeResult> results(slots.size());
  for (int step = 0; step < settings.steps; ++step) {
    times = {};
    device.Decode(slots.data(), slots.size(), 1, results.data(), nullptr);
    steps.push_back(times);
  }
  Print("prefill", prefills);
  Print("decode step", steps);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Settings settings;
  int status = 2;
  try {
    if (Parse(argc, argv, &settings)) status = Run(settings);
  } catch (const fastgen::base::Error& error) {
    std::fprintf(stderr, "step_speed: %s\n", error.what());
    return 1;
  }
  if (status == 2) {
    std::fprintf(stderr,
                 "usage: step_speed [--shape small|medium|large|xl] [--weight_dtype T] "
                 "[--cache_dtype T] [--isa NAME] [--threads N] [--rows N] [--context N] "
                 "[--steps N]; numbers from 1 on, context + steps at most 1024\n");
  }
  return status;
}
