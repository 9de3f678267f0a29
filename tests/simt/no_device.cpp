// Stands in for the parts of libtorch and of the CUDA runtime that need a device, so that the CUDA
// ops can be called with CPU tensors: the CPU is the CUDA device, there is one stream, guards do
// nothing.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

const char* cudaGetErrorString(cudaError_t) { return "refused by the launcher"; }
}
