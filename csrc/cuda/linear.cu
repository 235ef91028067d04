#include <cmath>

#include "cuda/linear.h"

namespace fastgen {
namespace cuda {

cudaError_t Linear(const LinearArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.w.out == 0) return cudaSuccess;
  LinearTask task;
  task.args = args;
  task.normed = args.norm != nullptr;
  if (task.normed) task.norm = *args.norm;
  if (args.epilogue == Epilogue::kQkv) {
    task.query_divisor = std::sqrt(static_cast<float>(args.cache.head_size));
    task.head_size = DivisorOf(args.cache.head_size);
  }
  bool taken = false;
  cudaError_t status = LinearCluster(task, stream, &taken);
  if (status != cudaSuccess || taken) return status;
  status = LinearMma(task, stream, &taken);
  return status != cudaSuccess || taken ? status : LinearFma(task, stream);
}

}  // namespace cuda
}  // namespace fastgen
