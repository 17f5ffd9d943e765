// Torch's side of a launch, for the .cu files: the device of a tensor made current, the stream of that device, and
// under which name and dispatch key an op is registered:
//
//   STABLE_TORCH_LIBRARY_IMPL(FT_NAMESPACE, FT_KEY, m) { m.impl("kd", TORCH_BOX(&kd)); }
//
// The SIMT harness compiles the same .cu files with FT_SIMT into a library of CPU ops: there a tensor's device is the
// machine it runs on, and guard and stream mean nothing.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include "cuda/device.cuh"

#if !defined(FT_SIMT)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#if !defined(USE_CUDA)
#error "compile with -DUSE_CUDA: torch's header has the current stream only then"
#endif
#endif

#if !defined(FT_NAMESPACE)
#define FT_NAMESPACE fasttransfer
#endif
#if !defined(FT_KEY)
#define FT_KEY CUDA
#endif

namespace ft {

// Makes the tensor's device current for its lifetime: launches, `machine()` and new tensors are then of that device.
class DeviceGuard {
 public:
#if defined(FT_SIMT)
  explicit DeviceGuard(const torch::stable::Tensor&) {}
#else
  explicit DeviceGuard(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {}
#endif
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

#if !defined(FT_SIMT)
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// The stream that torch has made current on the tensor's device: what was queued there before is seen by a launch.
inline device::Stream current_stream([[maybe_unused]] const torch::stable::Tensor& t) {
#if defined(FT_SIMT)
  return {};
#else
  void* stream = nullptr;  // the stream itself, not its id in c10
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<device::Stream>(stream);
#endif
}

}  // namespace ft
