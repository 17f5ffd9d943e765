// The host side of device.cuh under nvcc: a launch and what a launch is planned by. Included by device.cuh only.
//
// cudart is linked statically: it and torch's own share the device's primary context, so the current device and
// streams mean the same to both. Nothing here synchronises or allocates on the device, so a CUDA graph can capture
// all of it (after one run, as torch asks for anyway: a first launch loads the kernel).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace ft::device {

// `doing`: what did not work, for a person to read.
inline void check(cudaError_t status, const std::string& doing) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // else the next one to ask, perhaps torch, is told of this error
  std::string message = "fasttransfer: " + doing + ": " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorUnsupportedPtxVersion) {
    message +=
        " (fasttransfer was not built for this GPU: rebuild it with TORCH_CUDA_ARCH_LIST naming its compute "
        "capability; fasttransfer.build_info()['built_with'] says what it was built for)";
  }
  throw std::runtime_error(message);
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  return device;
}

// A kernel is allowed more than 48 KiB of dynamic shared memory only once that is asked for, per device. The
// allowance only grows: a launch on another thread may be counting on the larger one.
inline void allow_shared(const void* kernel, int64_t bytes) {
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (bytes <= kWithoutAsking) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& most = allowed[{kernel, current_device()}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "asking for " + std::to_string(bytes) + " bytes of shared memory");
  most = bytes;
}

template <class P>
void launch(void (*kernel)(P), const Grid& grid, Stream stream, const P& params) {
  if (grid.blocks == 0) return;
  allow_shared(reinterpret_cast<const void*>(kernel), grid.shared_bytes);
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = unsigned(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid.blocks));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, params);
  if (status == cudaSuccess) return;
  check(status, "launching " + std::to_string(grid.blocks) + " blocks of " + std::to_string(grid.threads) +
                    " threads, clusters of " + std::to_string(grid.cluster) + ", " +
                    std::to_string(grid.shared_bytes) + " bytes of shared memory");
}

template <int>
__global__ void probe() {}

// Clusters need code that was compiled for sm_90 or later, not only a device that has them: PTX of compute_80 runs on
// such a device with the cluster functions of device.cuh compiled to those of a single block.
inline int most_cluster(int device) {
  int has_clusters = 0;
  check(cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device), "asking for clusters");
  if (!has_clusters) return 1;
  cudaFuncAttributes code = {};
  check(cudaFuncGetAttributes(&code, probe<0>), "asking what the kernels were compiled for");
  return code.ptxVersion >= 90 ? 8 : 1;
}

inline const Machine& machine() {
  static std::mutex mutex;
  static std::map<int, Machine> known;  // a map's elements stay where they are
  const int device = current_device();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, attribute, device), "asking for a property of the device");
    return value;
  };
  Machine m = {};
  m.multiprocessors = ask(cudaDevAttrMultiProcessorCount);
  m.shared_per_block = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  m.shared_per_multiprocessor = ask(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  m.most_cluster = most_cluster(device);
  return known.emplace(device, m).first->second;
}

}  // namespace ft::device
