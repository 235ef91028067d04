#include "cpu/dispatch.h"

#include <cstdlib>

#include "base/error.h"

namespace fastgen::cpu {

namespace generic {
extern const Kernels kKernels;
}
#if defined(FASTGEN_HAVE_AVX2)
namespace avx2 {
extern const Kernels kKernels;
}
#endif
#if defined(FASTGEN_HAVE_AVX512)
namespace avx512 {
extern const Kernels kKernels;
}
#endif
#if defined(FASTGEN_HAVE_AVX512_VNNI)
namespace avx512_vnni {
extern const Kernels kKernels;
}
#endif
#if defined(FASTGEN_HAVE_AVX512_BF16)
namespace avx512_bf16 {
extern const Kernels kKernels;
}
#endif

const std::vector<const Kernels*>& AllKernels() {
  static const std::vector<const Kernels*> all = {
      &generic::kKernels,
#if defined(FASTGEN_HAVE_AVX2)
      &avx2::kKernels,
#endif
#if defined(FASTGEN_HAVE_AVX512)
      &avx512::kKernels,
#endif
#if defined(FASTGEN_HAVE_AVX512_VNNI)
      &avx512_vnni::kKernels,
#endif
#if defined(FASTGEN_HAVE_AVX512_BF16)
      &avx512_bf16::kKernels,
#endif
  };
  return all;
}

const Kernels& ChooseKernels(const std::string& isa) {
  const char* environment = std::getenv("FASTGEN_ISA");
  const bool from_environment = isa.empty() && environment && *environment;
  const std::string wanted = from_environment ? environment : isa;
  const std::string option = from_environment ? "FASTGEN_ISA" : "isa";

  std::string names;
  const Kernels* best = nullptr;
  for (const Kernels* kernels : AllKernels()) {
    if (wanted == kernels->name) {
      if (kernels->supported()) return *kernels;
      throw base::Error(FASTGEN_UNSUPPORTED,
                        option + "=" + wanted + ": this machine cannot run that instruction set");
    }
    if (!kernels->supported()) continue;
    best = kernels;
    names += std::string(names.empty() ? "" : ", ") + kernels->name;
  }
  if (!wanted.empty()) {
    throw base::Error(FASTGEN_INVALID_ARGUMENT,
                      option + "=" + wanted +
                          " is not an instruction set of this build; this machine runs " + names);
  }
  return *best;
}

}  // namespace fastgen::cpu
